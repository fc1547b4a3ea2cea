import os
import subprocess
import sys
import time

import checkpoint
from tools import jobs


def test_results_and_errors_come_by_name():
    tasks = {"a": "1 + 1", "b": "int('x')", "c": "open('/none')"}
    (a, b, c) = jobs.run_jobs(eval, tasks, 0, "test")
    assert a == ("a", 2, None)
    assert (b[0], type(b[2]), c[0], type(c[2])) == ("b", ValueError, "c", FileNotFoundError)


def test_a_process_that_dies_costs_its_own_job_only():
    tasks = {"a": "__import__('os')._exit(3)", "b": "2 + 2", "c": "int('x')"}
    outcomes = {name: rest for name, *rest in jobs.run_jobs(eval, tasks, 1, "test")}
    assert outcomes["b"] == [4, None] and type(outcomes["c"][1]) is ValueError
    assert "process died" in str(outcomes["a"][1])


def test_the_processes_end_with_the_loop():
    tasks = {"a": "__import__('os').getpid()", "b": "__import__('time').sleep(60)"}
    for name, pid, _ in jobs.run_jobs(eval, tasks, 2, "test"):
        assert name == "a" and checkpoint.is_alive(pid)
        break
    deadline = time.monotonic() + 10
    while _is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _is_running(pid)


def _is_running(pid):
    """Return whether a process is neither gone nor a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_process_is_alive_or_not():
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    assert checkpoint.is_alive(os.getpid()) and not checkpoint.is_alive(dead.pid)
    assert 1 <= jobs.available_cores() <= os.cpu_count()
