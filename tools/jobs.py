"""Run one function on many jobs in worker processes, for the other tools."""

import os
import signal
from contextlib import suppress
from multiprocessing.connection import Pipe, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.resource_tracker import ensure_running

import torch
from tqdm import tqdm

# What a damaged file may make a job raise; anything else is a bug of ours.
FAILURES = (ValueError, OSError, RuntimeError, EOFError, MemoryError)


def available_cores():
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def run_jobs(function, jobs, workers, title, unit="video"):
    """Call function(job) for {name: job} in `workers` processes (0: in this one).

    Yields (name, result, error) as they end, with a progress bar. error: what the function raised
    of FAILURES, or that its process died, as a decoder may crash on a damaged file; else None.
    """
    here = ((name, *_attempt(function, job)) for name, job in jobs.items())
    with tqdm(total=len(jobs), desc=title, unit=unit, smoothing=0, disable=None) as bar:
        for outcome in _run_parallel(function, jobs, workers) if workers else here:
            bar.update()
            yield outcome


def _run_parallel(function, jobs, workers):
    pending = list(reversed(jobs.items()))
    idle = []
    busy = {}
    try:
        while pending or busy:
            while pending and len(busy) < workers:
                name, job = pending.pop()
                worker = idle.pop() if idle else Worker(function)
                worker.pipe.send(job)
                busy[worker.pipe] = name, worker
            for pipe in wait(busy):
                name, worker = busy.pop(pipe)
                try:
                    outcome = pipe.recv()
                    idle.append(worker)
                except (EOFError, OSError):
                    outcome = None, RuntimeError("its process died: damaged file, or out of memory")
                yield name, *outcome
    finally:
        for worker in [*idle, *(worker for _, worker in busy.values())]:
            worker.process.kill()


class Worker:
    """A process that calls a function on one job after another, which come through a pipe."""

    def __init__(self, function):
        self.pipe, far_end = Pipe()
        self.process = SpawnProcess(target=_serve, args=(function, far_end), daemon=True)
        # Ctrl-C reaches the whole process group: workers inherit that it is blocked. The start of
        # multiprocessing's tracker would unblock it.
        ensure_running()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self.process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        far_end.close()


def _serve(function, pipe):
    torch.set_num_threads(1)
    # Until the main process is gone.
    with suppress(EOFError, OSError):
        while True:
            pipe.send(_attempt(function, pipe.recv()))


def _attempt(function, job):
    try:
        return function(job), None
    except FAILURES as error:
        return None, error
