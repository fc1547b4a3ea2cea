"""BatchLoader in real processes: what a worker meets ends the program, at once and in words."""

import os
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from processes import Process

import data

# A program that loads 8 batches of 8 samples, of which the second meets trouble.
PROGRAM = """
import ctypes, os, signal, subprocess, sys, time, torch
import config, data

class Troubled:
    def __getitem__(self, pair):
        index, fidelity = pair
        if index == 9 and trouble.endswith(".npy"):
            data.read_features(trouble)
        if index == 9 and trouble == "slip":
            return None + 1
        if index == 9 and trouble == "SIGBUS":
            os.kill(os.getpid(), signal.SIGBUS)
        frames = torch.zeros(2, 1, 3, size, size, dtype=torch.uint8)
        return {"name": str(index), "frames": frames, "segments": torch.zeros(index % 2, 2)}

trouble, workers, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if trouble == "shm":  # of this process alone
    assert not ctypes.CDLL(None).unshare(0x20000)
    for words in ["--make-rprivate /", "-t tmpfs -o size=64m tmpfs /dev/shm"]:
        subprocess.run(["mount", *words.split()], check=True)
batches = [[(i, None) for i in range(k, k + 8)] for k in range(0, 64, 8)]
with config.one_line_errors("program"):
    loader = data.BatchLoader(Troubled(), batches, workers, torch.device("cpu"))
    for batch in loader:
        if trouble == "SIGKILL" and batch["name"][0] == "8":
            os.kill(loader.processes[0].pid, signal.SIGKILL)
            try:
                time.sleep(0.3)
            except RuntimeError:
                print("interrupted")
"""


def may_unshare():
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    try:
        return not subprocess.run(command, capture_output=True).returncode
    except OSError:
        return False


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Run the program on all troubles at once: {trouble: (exit status, stdout, stderr)}."""
    path = tmp_path_factory.mktemp("features") / "v.npy"
    path.write_bytes(b"torn")
    arguments = {"file 1": (path, 1, 8), "file 2": (path, 2, 8)}
    arguments |= {name: (name, 2, 8) for name in ("slip", "SIGBUS", "SIGKILL")}
    if may_unshare():
        arguments["shm"] = ("shm", 2, 1200)
    processes = {name: Process("-c", PROGRAM, *words) for name, words in arguments.items()}
    outcomes = {}
    for name, process in processes.items():
        out, err = process.communicate()
        # torch's handler of SIGBUS writes a zero byte.
        outcomes[name] = process.returncode, out, err.replace("\0", "")
    return outcomes


@pytest.mark.parametrize("workers", [1, 2])
def test_a_broken_file_is_one_line(outcomes, workers):
    status, _, err = outcomes[f"file {workers}"]
    assert status == 1 and err.startswith("program: ") and err.count("\n") == 1
    assert "v.npy cannot be read" in err


def test_a_slip_shows_its_file_and_line(outcomes):
    status, _, err = outcomes["slip"]
    assert status == 1 and "TypeError: unsupported operand" in err
    assert 'File "<string>", line 11, in __getitem__' in err


def test_a_bus_error_is_one_line(outcomes):
    status, _, err = outcomes["SIGBUS"]
    last = err.splitlines()[-1]
    assert status == 1 and last.startswith("program: ") and "--shm-size" in last
    assert "Traceback" not in err


def test_a_full_shared_memory_is_one_line(outcomes):
    """Docker gives 64 MB, a batch has 69."""
    if "shm" not in outcomes and not may_unshare():
        pytest.skip("unshare is not permitted")
    status, _, err = outcomes["shm"]
    assert status == 1 and err.count("\n") == 1
    assert "--shm-size" in err and "data.workers=0" in err


def test_a_killed_worker_is_one_line_and_does_not_interrupt_a_step(outcomes):
    """It is missed when its batch is due, not in the middle of the main process' work."""
    status, out, err = outcomes["SIGKILL"]
    assert status == 1 and "interrupted" not in out and err.count("\n") == 1
    assert "SIGKILL" in err and "out of memory? set data.workers lower" in err


class Epochs:
    """A data set that tells the epoch of its index and the worker's threads."""

    def __getitem__(self, pair):
        row = [pair[0], pair[0] // 6, torch.get_num_threads(), os.getpid()]
        ignored = signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        empty = torch.zeros(0)  # the target of a video where there are no classes
        return {"row": torch.tensor(row), "ignored": ignored, "target": empty}


def test_workers_live_on_see_the_epoch_and_ignore_signals():
    dataset = Epochs()
    sampler = data.CyclicFidelitySampler(6, 2, [data.NATIVE])
    loader = data.BatchLoader(dataset, sampler, 2, torch.device("cpu"))
    assert len(loader) == 3
    processes = []
    for epoch in range(2):
        sampler.set_epoch(epoch, first_step=epoch)
        batches = list(loader)
        assert len(batches) == 3 - epoch
        rows = torch.cat([batch["row"] for batch in batches])
        assert all(batch["target"].shape == (2, 0) for batch in batches)
        expected = [i for batch in sampler for i, _ in batch]
        assert rows[:, 0].tolist() == expected and set(rows[:, 1].tolist()) == {epoch}
        assert set(rows[:, 2].tolist()) == {1}
        assert all(batch["ignored"].all() and batch["row"].is_shared() for batch in batches)
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
    # Samples that are pieces of a video stay with one rank.
    dataset.owners = [0, 0, 1, 1, 2]
    names = [
        [batch["name"] for batch in data.iterate(dataset, data.NATIVE, 9, rank=r, **options)]
        for r in range(2)
    ]
    assert names == [[["0", "1", "4"]], [["2", "3"]]]
