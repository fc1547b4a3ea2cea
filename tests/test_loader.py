"""BatchLoader in real processes: what a worker meets ends the program, at once and in words."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data

# A program that loads 8 batches of 8 frames, of which the second meets trouble.
PROGRAM = """
import os, signal, sys, torch
import config, data

class Troubled:
    def __init__(self, trouble, size):
        self.trouble = trouble
        self.size = size

    def __getitem__(self, pair):
        index, fidelity = pair
        if index == 9 and self.trouble.endswith(".npy"):
            data.read_features(self.trouble)
        if index == 9 and self.trouble == "slip":
            return None + 1
        if index == 9 and self.trouble.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[self.trouble])
        frames = torch.zeros(2, 1, 3, self.size, self.size, dtype=torch.uint8)
        return {"name": str(index), "frames": frames, "segments": torch.zeros(index % 2, 2)}

trouble, workers, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
batches = [[(i, None) for i in range(k, k + 8)] for k in range(0, 64, 8)]
with config.one_line_errors("program"):
    loader = data.BatchLoader(Troubled(trouble, size), batches, workers, torch.device("cpu"))
    for batch in loader:
        print(batch["name"][0], batch["frames"].is_shared())
print("done")
"""
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.dirname(data.__file__)}


def run(trouble, workers, size=8, before=()):
    command = [*before, sys.executable, "-c", PROGRAM, str(trouble), str(workers), str(size)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=60)
    finally:
        # What hangs ends with the test.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out.decode(), err.decode(errors="replace")


def test_batches_come_in_order_and_through_shared_memory():
    status, out, _ = run("none", 2)
    assert status == 0 and out.splitlines() == [f"{k} True" for k in range(0, 64, 8)] + ["done"]
    assert run("none", 0)[1].splitlines()[0] == "0 False"


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_broken_file_is_one_line(tmp_path, workers):
    path = tmp_path / "v.npy"
    path.write_bytes(b"torn")
    status, _, err = run(path, workers)
    assert status == 1 and err.startswith(f"program: {path} cannot be read") and len(err) < 300
    assert err.count("\n") == 1


def test_a_slip_shows_its_file_and_line():
    status, _, err = run("slip", 2)
    assert status == 1 and "TypeError: unsupported operand" in err
    assert 'File "<string>", line 16, in __getitem__' in err


@pytest.mark.parametrize(
    "name, words", [("SIGKILL", "killed (SIGKILL); out of memory?"), ("SIGBUS", "--shm-size")]
)
def test_a_worker_that_is_killed_is_one_line(name, words):
    status, _, err = run(name, 2)
    last = err.splitlines()[-1]
    assert status == 1 and last.startswith("program: ") and words in last
    assert "data.workers" in last and "Traceback" not in err


def test_a_full_shared_memory_is_one_line():
    """Docker gives 64 MB, a batch has 69."""
    script = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    before = ["unshare", "--mount", "sh", "-c", script, "sh"]
    try:
        permitted = subprocess.run([*before, "true"], capture_output=True).returncode == 0
    except OSError:
        permitted = False
    if not permitted:
        pytest.skip("unshare is not permitted")
    status, out, err = run("none", 2, 1200, before)
    assert status == 1 and out == "" and err.count("\n") == 1
    assert "--shm-size" in err and "data.workers=0" in err


def test_a_killed_worker_does_not_interrupt_a_step():
    """It is missed when its batch is due, not in the middle of the main process' work."""
    code = """
import os, signal, time, torch
import config, data
from multiprocessing import active_children

class Numbers:
    def __getitem__(self, pair):
        time.sleep(0.02)
        return {"x": pair[0]}

with config.one_line_errors("program"):
    loader = data.BatchLoader(Numbers(), [[(i, None)] for i in range(99)], 1, torch.device("cpu"))
    for batch in loader:
        if batch["x"] == 0:
            os.kill(active_children()[0].pid, signal.SIGKILL)
            try:
                time.sleep(0.3)
            except RuntimeError:
                print("interrupted")
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=60)
    assert done.stdout == "" and "SIGKILL" in done.stderr and done.returncode == 1


class Epochs:
    """A data set that tells its epoch and the worker's threads."""

    def __init__(self):
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __getitem__(self, pair):
        row = [pair[0], int(self.epoch), torch.get_num_threads(), os.getpid()]
        return {"row": torch.tensor(row), "ignored": signal.getsignal(signal.SIGTERM).value}


def test_workers_live_on_see_the_epoch_and_ignore_signals():
    dataset = Epochs()
    sampler = data.CyclicFidelitySampler(6, 2, [data.NATIVE])
    loader = data.BatchLoader(dataset, sampler, 2, torch.device("cpu"))
    assert len(loader) == 3
    processes = []
    for epoch in range(2):
        dataset.epoch.fill_(epoch)
        sampler.set_epoch(epoch, first_step=epoch)
        batches = list(loader)
        assert len(batches) == 3 - epoch
        rows = torch.cat([batch["row"] for batch in batches])
        expected = [i for batch in sampler for i, _ in batch]
        assert rows[:, 0].tolist() == expected and set(rows[:, 1].tolist()) == {epoch}
        assert set(rows[:, 2].tolist()) == {1}
        assert all(batch["ignored"].eq(signal.SIG_IGN).all() for batch in batches)
        processes.append(set(rows[:, 3].tolist()))
    assert processes[0] == processes[1] and len(processes[0]) == 2
    started = time.monotonic()
    data.stop_workers()
    assert time.monotonic() - started < 5
    assert not any(os.path.exists(f"/proc/{pid}/cmdline") for pid in processes[0])


def test_ranks_share_the_samples_in_order(tmp_path):
    for i in range(5):
        np.save(tmp_path / f"{i}.npy", np.full((2, 1), i, np.float32))
    videos = [data.Video(str(i), 1.0, np.zeros((0, 2)), ()) for i in range(5)]
    dataset = data.FeatureDataset(videos, str(tmp_path))
    device = torch.device("cpu")
    options = {"device": device, "world_size": 2, "title": "features"}
    names = [
        [batch["name"] for batch in data.iterate(dataset, data.NATIVE, 2, rank=r, **options)]
        for r in range(2)
    ]
    assert names == [[["0", "2"], ["4"]], [["1", "3"]]]
