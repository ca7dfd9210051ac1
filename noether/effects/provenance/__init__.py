"""Where a run comes from: the process that trains it, and the state of the user's code in git.

A line here may read the process, the machine and the repository of the working directory; it never changes these.
"""
