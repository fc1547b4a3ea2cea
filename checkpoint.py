"""Write and read what a run leaves: its folder, weights, checkpoints that training resumes from.

Every file is written aside and renamed when it is whole and on disk, so that a kill at any moment
leaves the file before it. Everything random in a step is a pure function of (seed, epoch, step):
a resumed run ends with the weights of an undisturbed one, and a checkpoint needs no random state.
"""

import json
import os
import platform
import re
import resource
import signal
import socket
import sys
import threading
import time

import torch
from tqdm import tqdm

from media import InputError


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


# ------------------------------------------------------------------------------------------- files


def write_atomic(path, write):
    """Call write(file) on a temporary file, then rename it to `path`.

    Raises InputError if the folder cannot be written to or the disk is full.
    """
    part = f"{path}.part-{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if os.path.exists(part):
            os.remove(part)


def save_json(obj, path):
    """Write an object as indented JSON."""
    text = json.dumps(obj, indent=1) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def load_json(path):
    """Read a JSON file. Raises InputError if it is missing or not valid JSON."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None


def save_weights(model, path, **metadata):
    """Write {"model": state dict on the CPU, **metadata}, which weights_only loading accepts."""
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    write_atomic(path, lambda file: torch.save({"model": state, **metadata}, file))


def save_encoder(encoder, path, options, seconds):
    """Write an encoder with its config block and what it cost, with all that it was made from."""
    save_weights(encoder, path, encoder=dict(options), seconds=seconds)


def load_state(path):
    """Read a file of `save_weights` or a checkpoint. Raises InputError if it cannot be read."""
    if not os.path.isfile(path):
        raise InputError(f"no file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file makes torch raise almost anything
        raise InputError(f"{path} cannot be read ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}, expected a dictionary")
    return state


def seconds_of(path):
    """Return what an encoder file cost with all that it was made from; 0 if others made it."""
    return load_state(path).get("seconds", 0.0) if os.path.isfile(path or "") else 0.0


def remove_stale_parts(folder):
    """Remove what killed processes of this program were writing in this folder of ours."""
    for directory, _, names in os.walk(folder):
        for name in names:
            ours = re.fullmatch(r".+\.(json|jsonl|npy|npz|pt)\.part-(\d+)", name)
            if ours and not _is_alive(int(ours[2])):
                os.remove(f"{directory}/{name}")


def _is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# ------------------------------------------------------------------------------------- checkpoints


def load_checkpoint(path, log=print):
    """Return the newest readable training state at PATH or PATH.previous; None if there is none."""
    candidates = [p for p in (path, f"{path}.previous") if os.path.exists(p)]
    for candidate in candidates:
        try:
            return load_state(candidate)
        except InputError as error:
            log(f"checkpoint {error}; trying the one before it")
    if candidates:
        raise InputError(f"no checkpoint {path} can be read: remove it to start this stage again")
    return None


class Progress:
    """Keep where a training stands: all that a resumed one needs beside weights.

    folder: of the stage; it gets checkpoint.pt, and metrics.jsonl with a line an epoch.
    """

    def __init__(self, folder, model, optimizer, log=print):
        self.folder, self.model, self.optimizer, self.log = folder, model, optimizer, log
        self.path = f"{folder}/checkpoint.pt"
        self.epoch, self.step = 0, 0
        self.sums, self.history = {}, []
        self.started = self.last_save = time.monotonic()

    def resume(self, **metadata):
        """Restore the newest checkpoint, if there is one.

        metadata: plain data to keep beside, such as the config. "trained_on" tells the training
        data from others; InputError for a checkpoint of others, whose steps meant something else.
        """
        self.metadata = metadata
        saved = load_checkpoint(self.path, self.log)
        if saved is None:
            return
        before, now = saved["trained_on"], metadata["trained_on"]
        if before != now:
            raise InputError(
                f"{self.path} was trained on other data: {before}, now {now}.\n"
                f"Restore those data, or remove {self.folder} to train anew"
            )
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.epoch, self.step = saved["epoch"], saved["step"]
        self.sums, self.history = saved["sums"], saved["history"]
        self.started -= saved["seconds"]
        self.log(f"{self.folder}: resuming at epoch {self.epoch + 1}, step {self.step + 1}")

    @property
    def seconds(self):
        """Return how long training has taken, with the starts before this one."""
        return time.monotonic() - self.started

    def end_step(self, losses):
        """Count one step and its losses, {term: number}."""
        for term, value in losses.items():
            self.sums[term] = self.sums.get(term, 0.0) + value
        self.step += 1

    def is_due(self, checkpoint_sec):
        """Return whether so many seconds have passed since the last checkpoint."""
        return time.monotonic() - self.last_save > checkpoint_sec

    def save(self, write=True):
        """Write the checkpoint, on the process that should."""
        self.last_save = time.monotonic()
        if write:
            keys = ("epoch", "step", "sums", "history", "seconds")
            state = {key: getattr(self, key) for key in keys}
            state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            if os.path.exists(self.path):
                os.replace(self.path, f"{self.path}.previous")
            state = {**state, **self.metadata}
            write_atomic(self.path, lambda file: torch.save(state, file))

    def end_epoch(self, record, write=True):
        """Close an epoch with its record, one more line of metrics.jsonl."""
        self.history.append(record)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
        self.save(write)
        if write:
            lines = "".join(json.dumps(record) + "\n" for record in self.history)
            path = f"{self.folder}/metrics.jsonl"
            write_atomic(path, lambda file: file.write(lines.encode()))


class Stopwatch:
    """Measure work that may be killed and started again, over all its starts."""

    def __init__(self, path, write=True):
        self.path, self.write = path, write
        earlier = load_json(path)["seconds"] if os.path.exists(path) else 0.0
        self.started = time.monotonic() - earlier

    def save(self):
        """Return the seconds so far, and note them on the process that should."""
        seconds = time.monotonic() - self.started
        if self.write:
            save_json({"seconds": seconds}, self.path)
        return seconds


class EpochLog:
    """Show how an epoch goes: a bar in a terminal, elsewhere a line every `log_every` steps."""

    def __init__(self, task, progress, sampler, options, log_every, ddp):
        self.progress, self.sampler, self.log_every, self.ddp = progress, sampler, log_every, ddp
        self.title = f"{task} {progress.epoch + 1}/{options['epochs']}"
        self.first_step, self.started = progress.step, time.monotonic()
        steps = {"total": sampler.steps_per_epoch, "initial": progress.step, "unit": "step"}
        silent = not (ddp.is_main and sys.stderr.isatty())
        self.bar = tqdm(desc=self.title, leave=False, disable=silent, **steps)

    def step(self):
        """Show a step that progress has just counted."""
        self.bar.update()
        epoch, step, last = self.progress.epoch, self.progress.step, self.sampler.steps_per_epoch
        due = step % self.log_every == 0 and step < last
        first = (epoch, step) == (0, 1)  # it tells the memory that the whole stage will take
        if self.bar.disable and not (due or first):
            return
        line = self._line({"fidelity": self.sampler.fidelity(epoch, step - 1).name})
        self.bar.set_postfix_str(line, refresh=False)
        if self.bar.disable:
            self.ddp.log(f"{self.title}, step {step}/{last}: {line}")

    def stop_if_bad(self, bad, names, loss, gradient_norm):
        """Raise InputError if a process has a loss or gradient that is not finite.

        bad: the share of processes that have; names: the videos of this one's batch.
        """
        if bad:
            epoch, step = self.progress.epoch, self.progress.step
            raise InputError(
                f"{self.title}, step {step + 1}, {self.sampler.fidelity(epoch, step).name}: "
                f"loss {float(loss):g} or gradient norm {float(gradient_norm):g} is not finite\n"
                f"videos of this process: {', '.join(map(str, names))}; try a smaller lr"
            )

    def close(self):
        """End the epoch; return its record."""
        self.bar.close()
        epoch, sampler = self.progress.epoch, self.sampler
        cycles = sampler.cycle == "batch" and len(sampler.fidelities) > 1
        fidelity = {"fidelity": "cycle" if cycles else sampler.fidelity(epoch, 0).name}
        self.ddp.log(f"{self.title}: {self._line(fidelity)}")
        return {"epoch": epoch + 1, **fidelity, **self._measures()}

    def _measures(self):
        steps, seconds = self.progress.step, time.monotonic() - self.started
        videos = (steps - self.first_step) * self.sampler.batch_size
        measures = {"lr": self.progress.optimizer.param_groups[0]["lr"]}
        measures |= {term: total / steps for term, total in self.progress.sums.items()}
        measures |= {"seconds": seconds, "videos_per_sec": videos / seconds}
        return {**measures, "peak_memory_gb": peak_memory_gb(self.ddp.device)}

    def _line(self, fidelity):
        measures = [f"{name} {value:.4g}" for name, value in self._measures().items()]
        return ", ".join([f"fidelity {fidelity['fidelity']}", *measures])


# --------------------------------------------------------------------------------------- optimizer

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def build_optimizer(model, options):
    """Return the optimizer of a config block: optimizer, lr, weight_decay and, of sgd, momentum."""
    keys = ["lr", "weight_decay"] + ["momentum"] * (options["optimizer"] == "sgd")
    parameters = [p for p in model.parameters() if p.requires_grad]
    return OPTIMIZERS[options["optimizer"]](parameters, **{key: options[key] for key in keys})


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


# ----------------------------------------------------------------------------------------- signals


class StopSignals:
    """Note SIGINT and SIGTERM in a `with` block; the second one ends the process at once.

    defer: the first is only noted in `received`, for training to stop after a step; else it raises
    KeyboardInterrupt. Python runs handlers between two of its instructions only, so a process that
    waits in a collective would not notice the second: a thread does, which reads the numbers that
    Python's own C handler writes to a socket at once.
    """

    def __init__(self, defer=True):
        self.defer, self.received = defer, None

    @property
    def number(self):
        """Return the signal to stop by, which another process may have received."""
        return self.received or signal.SIGTERM

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
        self.received = self.received or number
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


# ----------------------------------------------------------------------------------------- machine


def peak_memory_gb(device):
    """Return the peak memory of this process in GB: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:  # on Linux ru_maxrss begins with the peak of the parent process
        with open("/proc/self/status") as file:
            return int(re.search(r"VmHWM:\s+(\d+)", file.read())[1]) * 1024 / 1e9
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS counts bytes


def machine_name(device):
    """Return the model of the GPU or CPU of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = re.search(r"model name\s*: (.*)", file.read())
        name = model[1] if model else name
    return f"{name}, {os.cpu_count()} cores"
