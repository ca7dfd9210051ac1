"""The implementation of each command, imported when the user calls the command.

A line here may call every other room, write to the streams of the command line and exit with a code.
"""
