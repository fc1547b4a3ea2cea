"""Write and read what a run leaves: its folder, weights, checkpoints that training resumes from.

Every file is written aside and renamed when it is whole and on disk: a kill at any moment leaves
the file before it. Everything random in a step is a pure function of (seed, epoch, step), so a
resumed run ends with the weights of an undisturbed one, and a checkpoint needs no random state.
"""

import fcntl
import functools
import json
import os
import pathlib
import platform
import re
import resource
import signal
import socket
import sys
import threading
import time
from hashlib import blake2b

import numpy as np
import torch
from tqdm import tqdm

import tsm
from evaluate import load_json, write_atomic, write_json
from media import InputError

# What a file with other contents than expected may raise.
DAMAGE = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError)

save_json = functools.partial(write_json, indent=1, allow_nan=True)  # NaN: unknown durations


class RunFolder:
    """Know where a run keeps its files; a stage keeps its own in a folder of its name."""

    def __init__(self, path):
        self.path = os.fspath(path)
        self.config = f"{self.path}/config.json"
        self.versions = f"{self.path}/versions.json"
        self.accuracy = f"{self.path}/pretrain/accuracy.json"
        self.features = f"{self.path}/features"
        self.sola = f"{self.path}/sola/sola.pt"
        self.sola_features = f"{self.path}/sola/features"
        self.head = f"{self.path}/head/head.pt"
        self.proposals = f"{self.path}/proposals.json"
        self.result = f"{self.path}/result.json"
        self.metrics = f"{self.path}/metrics.json"

    def encoder(self, stage):
        """Return the encoder file of stage pretrain or lofi."""
        return f"{self.path}/{stage}/encoder.pt"

    def inputs(self, stage):
        """Return the file that tells what a stage works on."""
        return f"{self.path}/{stage}/inputs.json"

    def lock(self):
        """Hold the folder while this object lives; InputError if another process holds it."""
        try:
            os.makedirs(self.path, exist_ok=True)
            self._lock = open(f"{self.path}/lock", "a+")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"out={self.path} cannot be written: {error.strerror}") from None
        try:
            # Not flock, which the loader's workers would inherit and hold after a kill.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._lock.seek(0)
            holder = self._lock.read() or "another process"
            remedy = "wait until that ends, or name another folder with --set out=..."
            raise InputError(f"{self.path} is in use by {holder}; {remedy}") from None
        except OSError:  # a file system without locks
            return
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {platform.node()} since {time.ctime()}")
        self._lock.flush()


def save_weights(model, path, **metadata):
    """Write {"model": state dict on the CPU, **metadata}, which weights_only loading accepts."""
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    write_atomic(path, lambda file: torch.save({"model": state, **metadata}, file))


def files_fingerprint(paths):
    """Return what tells files from others: names and sizes, and the first MB of up to 16."""
    digest = blake2b(digest_size=8)
    for path in paths:
        digest.update(f"{os.path.basename(path)} {os.path.getsize(path)}\n".encode())
    for i in np.linspace(0, len(paths) - 1, min(len(paths), 16)).round().astype(int):
        with open(paths[i], "rb") as file:
            digest.update(file.read(2**20))
    return {"count": len(paths), "content": digest.hexdigest()}


def seconds_of(path):
    """Return what an encoder file cost with all that it was made from; 0 if others made it."""
    seconds = tsm.load_state(path).get("seconds") if os.path.isfile(path or "") else None
    return seconds if isinstance(seconds, (int, float)) else 0.0


def remove_stale_parts(folder, host=""):
    """Remove what killed processes of this program were writing in this folder of ours: files of a
    run, or with `host`, as in write_atomic, frame ZIPs that this machine prepared."""
    suffixes = (".zip",) if host else (".json", ".jsonl", ".pt", ".npy")
    for part in list(pathlib.Path(folder).rglob(f"*.part-{host}*")):
        name, _, pid = part.name.rpartition(f".part-{host}")
        if name.endswith(suffixes) and pid.isdigit() and not is_alive(int(pid)):
            part.unlink(missing_ok=True)  # another start may do the same


def is_alive(pid):
    """Return whether there is such a process on this machine."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


# ---------------------------------------------------------------------------------------- training


def load_checkpoint(path, log=print):
    """Return the newest readable training state at PATH or PATH.previous; None if there is none."""
    candidates = [p for p in (path, f"{path}.previous") if os.path.exists(p)]
    for candidate in candidates:
        try:
            return tsm.load_state(candidate)
        except tsm.InputError:
            log(f"checkpoint {candidate} cannot be read; trying the one before it")
    if candidates:
        raise InputError(f"no checkpoint {path} can be read: remove it to start this stage again")


class Stopwatch:
    """Measure work that may be killed and started again, over all its starts."""

    def __init__(self, path, write=True):
        self.path, self.write = path, write
        earlier = load_json(path).get("seconds") if os.path.exists(path) else None
        self.started = time.monotonic() - (earlier if isinstance(earlier, float) else 0.0)

    def save(self):
        """Return the seconds so far, and note them on the process that should."""
        seconds = time.monotonic() - self.started
        if self.write:
            save_json({"seconds": seconds}, self.path)
        return seconds


class Progress:
    """Keep and show where a training stands: an epoch, the steps done in it, their losses.

    Below cfg.out/name the main process writes checkpoint.pt, with all that a resumed training
    needs, and metrics.jsonl, a line an epoch. An epoch is a bar in a terminal, and a line of the
    log every cfg.log_every steps; with cfg.tensorboard the same numbers are scalars, too.
    `started` lies back as far as all starts together took.
    """

    def __init__(self, name, model, optimizer, sampler, options, cfg, ddp):
        self.folder, self.path = f"{cfg.out}/{name}", f"{cfg.out}/{name}/checkpoint.pt"
        self.model, self.optimizer, self.sampler, self.ddp = model, optimizer, sampler, ddp
        self.epochs, self.steps = options["epochs"], sampler.steps_per_epoch
        self.log_every, self.tensorboard, self.writer = cfg.log_every, cfg.tensorboard, None
        self.epoch, self.step = 0, 0
        self.sums, self.history = {}, []
        self.started = self.last_save = time.monotonic()

    def resume(self, **metadata):
        """Restore the newest checkpoint, if there is one; InputError if it is of other data.

        metadata: plain data to keep beside, such as "trained_on", which tells data from others.
        """
        self.metadata = metadata
        saved = load_checkpoint(self.path, self.ddp.log)
        if saved is None:
            return
        before, now = saved.get("trained_on"), metadata["trained_on"]
        if before != now:
            words = f"{self.path} was trained on other data: {before!s:.200}, now {now}"
            raise InputError(f"{words}.\nRestore those data, or remove {self.folder} to train anew")
        try:
            self.model.load_state_dict(saved["model"])
            load_optimizer(self.optimizer, saved["optimizer"])
            self.epoch, self.step = int(saved["epoch"]), int(saved["step"])
            self.sums = {term: float(total) for term, total in saved["sums"].items()}
            self.history = [*json.loads(json.dumps(saved["history"]))]  # else no JSON: TypeError
            self.started -= saved["seconds"]
        except DAMAGE as error:
            words = f"is not a checkpoint of this training ({' '.join(str(error).split())[:200]})"
            raise InputError(f"{self.path} {words}; remove it to start this stage again") from None
        self._write_history()  # a kill may have come between the checkpoint and this
        self.ddp.log(f"{self.folder}: resuming at epoch {self.epoch + 1}, step {self.step + 1}")

    def save(self):
        """Write the checkpoint."""
        self.last_save = time.monotonic()
        if self.writer:
            self.writer.flush()
        if self.ddp.is_main:
            state = {key: getattr(self, key) for key in ("epoch", "step", "sums", "history")}
            state |= {"seconds": self.last_save - self.started, **self.metadata}
            state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            if os.path.exists(self.path):
                os.replace(self.path, f"{self.path}.previous")
            write_atomic(self.path, lambda file: torch.save(state, file))

    def start_epoch(self):
        """Begin an epoch, or go on with it at step `step`."""
        self.title = f"{os.path.basename(self.folder)} {self.epoch + 1}/{self.epochs}"
        self.first_step, self.waited, self.epoch_started = self.step, 0.0, time.monotonic()
        if self.tensorboard and self.ddp.is_main and self.writer is None:
            from torch.utils.tensorboard import SummaryWriter  # an extra: config.check asks for it

            # A killed start may have written more steps than its checkpoint has: they come again.
            done = self.epoch * self.steps + self.step
            self.writer = SummaryWriter(self.folder, purge_step=done + 1)

    def batches(self, loader):
        """Yield the batches of a loader; `wait` is how long this process waited for the last."""
        silent = not (self.ddp.is_main and sys.stderr.isatty())
        where = {"total": self.steps, "initial": self.step, "unit": "step"}
        asked = time.monotonic()
        for batch in tqdm(loader, self.title, leave=False, disable=silent, **where):
            self.wait = time.monotonic() - asked
            yield batch
            asked = time.monotonic()

    def stop_if_bad(self, bad, names, loss, gradient_norm):
        """Raise InputError, with videos' names, if a process has numbers that are not finite."""
        if bad:
            fidelity = self.sampler.fidelity(self.epoch, self.step).name
            measures = f"loss {float(loss):g} or gradient norm {float(gradient_norm):g}"
            words = f"{self.title}, step {self.step + 1}, {fidelity}: {measures} is not finite"
            videos = f"videos of this process: {', '.join(map(str, names))}"
            raise InputError(f"{words}\n{videos}; try a smaller lr")

    def end_step(self, losses):
        """Count one step and its losses, {term: number}, and show them; "wait": see `batches`."""
        self.waited += losses.pop("wait")
        for term, value in losses.items():
            self.sums[term] = self.sums.get(term, 0.0) + value
        self.step += 1
        first = (self.epoch, self.step) == (0, 1)  # it tells the memory that the stage will take
        if first or (self.step % self.log_every == 0 and self.step < self.steps):
            fidelity = self.sampler.fidelity(self.epoch, self.step - 1).name
            self._measure(f"{self.title}, step {self.step}/{self.steps}", fidelity)

    def end_epoch(self):
        """Close an epoch: a line of the log and of metrics.jsonl, and a checkpoint."""
        cycles = self.sampler.cycle == "batch" and len(self.sampler.fidelities) > 1
        fidelity = "cycle" if cycles else self.sampler.fidelity(self.epoch, 0).name
        measures = self._measure(self.title, fidelity)
        self.history.append({"epoch": self.epoch + 1, "fidelity": fidelity, **measures})
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
        self.save()
        self._write_history()

    def _write_history(self):
        if self.ddp.is_main:
            lines = "".join(json.dumps(record) + "\n" for record in self.history)
            write_atomic(f"{self.folder}/metrics.jsonl", lambda file: file.write(lines.encode()))

    def _measure(self, title, fidelity):
        """Log the epoch so far, for TensorBoard, too, and return its numbers."""
        seconds, steps = time.monotonic() - self.epoch_started, self.step - self.first_step
        done = self.epoch * self.steps + self.step
        measures = {"lr": self.optimizer.param_groups[0]["lr"]}
        measures |= {term: total / self.step for term, total in self.sums.items()}
        videos_per_sec = steps * self.sampler.batch_size / seconds
        measures |= {"seconds": seconds, "videos_per_sec": videos_per_sec}
        measures["data_wait"] = self.waited / seconds  # share of waiting for a batch
        measures["peak_memory_gb"] = peak_memory_gb(self.ddp.device)
        left = (self.epochs * self.steps - done) * seconds / max(steps, 1)  # at this epoch's pace
        if self.writer:
            for name, value in {**measures, "hours_left": left / 3600}.items():
                self.writer.add_scalar(name, value, done)
        line = ", ".join(f"{name} {value:.4g}" for name, value in measures.items())
        self.ddp.log(f"{title}: fidelity {fidelity}, {line}, {tqdm.format_interval(left)} left")
        return measures


OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def build_optimizer(model, options):
    """Return the optimizer of a config block: optimizer, lr, weight_decay and, of sgd, momentum."""
    keys = ["lr", "weight_decay"] + ["momentum"] * (options["optimizer"] == "sgd")
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings = {key: options[key] for key in keys}
    if parameters[0].is_cuda:
        settings["fused"] = True  # a few kernels for all parameters
    return OPTIMIZERS[options["optimizer"]](parameters, **settings)


def load_optimizer(optimizer, saved):
    """Restore what an optimizer learnt, not its options; ValueError if it was another's."""
    optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["state"]})
    optimizer.param_groups[0]["lr"] = float(saved["param_groups"][0]["lr"])  # of the last step
    first = next(iter(optimizer.state.values()), {})
    for p, slots in optimizer.state.items():
        tensors = [x for x in slots.values() if x is not None]
        fit = all(x.shape in (p.shape, ()) and x.is_floating_point() for x in tensors)
        if slots.keys() != first.keys() or not fit or not all(x.isfinite().all() for x in tensors):
            raise ValueError("its optimizer has another state")


def learning_rate(options, epoch):
    """Return the learning rate at `epoch`, a fraction: 2.5 is the middle of the third epoch.

    schedule "constant"; "step": times lr_gamma after every lr_step_epochs; "cosine": linear from
    1/25 of lr over the first warmup_fraction of training, then a cosine to 0.
    """
    lr, schedule = options["lr"], options["schedule"]
    if schedule == "constant":
        return lr
    if schedule == "step":
        return lr * options["lr_gamma"] ** (epoch // options["lr_step_epochs"])
    progress, warmup = epoch / options["epochs"], options["warmup_fraction"]
    if progress < warmup:
        return lr * (0.04 + 0.96 * progress / warmup)
    angle = torch.tensor((progress - warmup) / (1 - warmup) * torch.pi, dtype=torch.float64)
    return lr * (0.5 * (1 + angle.cos().item()))


# ----------------------------------------------------------------------------- signals and machine


class StopSignals:
    """Note SIGINT and SIGTERM in a `with` block; the second one ends the process at once.

    defer: the first is only noted in `received`, for training to stop after a step; else it raises
    KeyboardInterrupt. Python runs handlers between two of its instructions only, so a process that
    waits in a collective would not notice the second: a thread does, which reads the numbers that
    Python's own C handler writes to a socket at once.
    """

    def __init__(self, defer=True):
        self.defer, self.received = defer, None
        self.number = signal.SIGTERM  # to stop by, where only another process has received one

    def __enter__(self):
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.handlers = {number: signal.signal(number, self._note) for number in numbers}
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        self.wakeup_fd = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind, *_):
        signal.set_wakeup_fd(self.wakeup_fd)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.writer.close()
        if self.received and kind is None:
            raise SystemExit(128 + self.received)  # it came when no step was left to stop after

    def _note(self, number, _):
        self.received = self.number = self.received or number
        if not self.defer:
            raise KeyboardInterrupt

    def _watch(self):
        # torchrun passes a signal on that its processes have received already: the same one.
        window_sec = 1.0 if "RANK" in os.environ else 0.0
        first = None
        while numbers := self.reader.recv(16):
            for number in (n for n in numbers if n in self.handlers):
                now = time.monotonic()
                first = first or now
                if now - first > window_sec:
                    os._exit(128 + number)
        self.reader.close()


def peak_memory_gb(device):
    """Return the peak memory of this process in GB: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # On Linux ru_maxrss begins with the peak of the parent process; on macOS it counts bytes.
    peak = re.search(r"VmHWM:\s+(\d+)", _text("/proc/self/status"))
    if peak:
        return int(peak[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def machine_name(device):
    """Return the model of the GPU or CPU of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = re.search(r"model name\s*: (.*)", _text("/proc/cpuinfo"))
    name = model[1] if model else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _text(path):
    return pathlib.Path(path).read_text() if os.path.exists(path) else ""
