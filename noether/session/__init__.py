"""`Session`: the same callbacks in a loop that is not ours. May touch the clock, the live model and one state."""
