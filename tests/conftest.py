"""Run all tests on one thread: they and the processes they start then round alike, bit for bit.

Programs of @pytest.mark.beside run beside the tests that come first, one program at a time, on a
core that is idle else; the tests that are so marked wait for theirs.
"""

import signal
import time

import pytest
import torch
from processes import ENV, ROOT, Process

torch.set_num_threads(1)
# A job in the background of a shell ignores Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

waiting = {}  # the words after `python`, by test
started = {}  # processes, by test


def start(name):
    started[name] = Process(*waiting.pop(name), env={**ENV, "PYTHONPATH": str(ROOT)})


def pytest_configure(config):
    config.addinivalue_line("markers", "beside(*argv): start `python *argv` early, see `beside`")


def pytest_collection_finish(session):
    for item in session.items:
        for mark in item.iter_markers("beside"):
            waiting[item.nodeid] = mark.args


def pytest_runtest_logstart():
    if waiting and all(process.poll() is not None for process in started.values()):
        start(next(iter(waiting)))


@pytest.fixture
def beside(request):
    """The program of the test's mark, when it has ended: a Process."""
    name = request.node.nodeid
    if name in waiting:
        start(name)
    while started[name].poll() is None:
        time.sleep(0.02)
    return started.pop(name)
