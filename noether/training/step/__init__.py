"""One optimizer update as a function: `(state, micro-batches) -> (state, event)`.

`step` and `compiled` make an update, `gradients`, `optimizer` and `kernels` are its parts. A line in here may touch the
model, torch and, where the state was donated, its tensors in place; no files, no callbacks.
"""
