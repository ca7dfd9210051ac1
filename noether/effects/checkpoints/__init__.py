"""The checkpoint store: writes, verifies, lists and prunes immutable checkpoints on disk.

`saver` carries out requests, `store` reads and saves, `writer` has the steps of a save, `retention` the rules about
which checkpoints stay. A line here may touch files, through `noether.effects.disk` only, and read the state.
"""
