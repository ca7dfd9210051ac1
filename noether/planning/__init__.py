"""Plans of runs before training, and replays of recorded runs after it.

A line here may call callbacks and build experiments on the meta device; it trains nothing and writes no file.
"""
