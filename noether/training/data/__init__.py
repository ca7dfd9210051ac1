"""Batches as a function of the position of the run, so that a resumed run reads those of the uncut run.

`batches` has the arithmetic, `indexed` reads datasets by index, `streamed` reads them in order. A line in here may
touch the dataset, the seeds and, for a stream, the state.
"""
