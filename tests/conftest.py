"""Run all tests on one thread: they and the processes they start then round alike, bit for bit.

What is marked `beside` needs nothing of other tests and runs beside those that come before it, one
program at a time, on a core that is idle else; the test itself waits for its end.
"""

import os
import signal
import time

import pytest
import torch
from processes import ENV, ROOT, Process

torch.set_num_threads(1)
# A job in the background of a shell ignores Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

CHILD = "LOFI_TAL_BESIDE"  # set in a program of marked tests
PYTEST = ["-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "--color=no"]
MANY = 3  # tests; of fewer, marked ones run where they stand, for a debugger, say
program_of = {}  # the name of each marked test's program
waiting = {}  # programs still to start, the words after `python`
started = {}  # Processes


def pytest_configure(config):
    explained = "beside(*argv): start `python *argv`, or else this test, early and aside"
    config.addinivalue_line("markers", explained)


def pytest_collection_finish(session):
    for item in session.items if CHILD not in os.environ else ():
        for mark in item.iter_markers("beside"):
            if mark.args:
                program_of[item.nodeid] = item.nodeid
                waiting[item.nodeid] = mark.args
            elif len(session.items) >= MANY:  # a program for those of a file
                program_of[item.nodeid] = str(item.path)
                waiting.setdefault(str(item.path), [*PYTEST]).append(item.nodeid)


def start(name):
    env = {**ENV, CHILD: "1", "PYTHONPATH": str(ROOT)}
    started[name] = Process(*waiting.pop(name), env=env)


def pytest_runtest_logstart():
    if waiting and all(process.poll() is not None for process in started.values()):
        start(next(iter(waiting)))


def ended(test):
    """Return the program of a test when it has ended."""
    name = program_of[test]
    if name in waiting:
        start(name)
    while started[name].poll() is None:
        time.sleep(0.02)
    return started[name]


@pytest.fixture
def beside(request):
    """The program that the test's mark names, ended: a Process."""
    return ended(request.node.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    test = pyfuncitem.nodeid
    if program_of.get(test, test) == test:
        return None
    output = ended(test).read(1)
    assert f"PASSED {test}\n" in output, output[-10000:] + ended(test).read(2)
    return True
