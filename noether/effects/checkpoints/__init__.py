"""The checkpoint store: writes, verifies, lists and prunes immutable checkpoints on disk."""
