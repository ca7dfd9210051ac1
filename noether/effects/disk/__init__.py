"""The only code that calls the operating system's file functions, and the file formats built on it.

Every call passes through `Disk`, where tests count calls, inject faults, or end the process. A line here may touch
files; tensors only to encode or decode them.
"""
