"""What each command does, imported when the command is called.

A line here may call every other room, write to the streams of the command line and exit with a code.
"""
