"""One optimizer update as a function: `(state, micro-batches) -> (state, event)`."""
