"""`Session`: the same callbacks in a plain training loop, and in the loops of other frameworks.

Code here may touch the clock, the global random generators, the data iterator, live models and optimizers, one state
variable and the interpreter. `session.py` is the public class; `events.py` is what frameworks call.
"""
