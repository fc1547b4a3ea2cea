"""Run all tests on one thread: they and the processes they start then round alike, bit for bit."""

import signal

import torch

torch.set_num_threads(1)
# A job in the background of a shell ignores Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
