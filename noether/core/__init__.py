"""The pure ground: no I/O, no clock, no configuration."""
