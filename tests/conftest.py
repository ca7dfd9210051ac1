"""What holds for all tests."""

import signal

import torch
from hypothesis import settings

# The models here are so small that a second thread only waits for the first.
torch.set_num_threads(1)

# Under `nohup` SIGHUP is ignored, here and in every process that a test starts, where a run then ignores it, too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A deadline is a timed assertion: it fails on a busy machine, not on a wrong program.
settings.register_profile("noether", settings(), deadline=None)
settings.load_profile("noether")

# There are no doctests here, and several folders have a module of this name.
collect_ignore_glob = ["conftest.py", "*/conftest.py"]
