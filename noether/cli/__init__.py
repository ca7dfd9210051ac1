"""The command line: parses arguments, calls the library, prints results and sets the exit code.

A line here may print and exit; everything else belongs to the library, so that Python users have it, too.
"""
