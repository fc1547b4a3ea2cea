"""Run all tests on one thread: they and the processes they start then round alike, bit for bit."""

import torch

torch.set_num_threads(1)
