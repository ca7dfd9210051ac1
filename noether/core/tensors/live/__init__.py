"""Live modules and optimizers: states that view them, and saved values that are written back into them.

`views` are read when a field of a state is read, `weights`, `optimizer` and `extra_state` check and write, `aliases`
copies what a callback remembers of a live tensor. Only `weights` and `optimizer` write to tensors, after every check.
"""
