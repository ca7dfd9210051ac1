"""The trainer: a loop over a state, and what it is put together from."""
