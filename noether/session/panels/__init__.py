"""What a run says of itself at its start and at its end, as plain panels; `effects/console` draws them.

The code may touch states, callbacks and the summary, to read.
"""
