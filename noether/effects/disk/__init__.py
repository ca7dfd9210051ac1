"""The only code that calls the operating system's file functions, and the file formats built on it."""
