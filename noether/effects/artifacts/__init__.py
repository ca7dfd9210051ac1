"""Artifacts: figures, images, histograms, tables, texts and files of a run, as files named by their content.

A line here may touch files through `Disk`, and read figures, tensors and files that an effect names.
"""
