"""The training loop: epochs, checkpoints, resume, signals, progress, one process or many. It knows no stage, no model and no data set.

Everything random in a step must be a pure function of (epoch, step): then a run that was stopped anywhere and started again ends with the
weights of an undisturbed one, bit for bit on CPU, and a checkpoint needs no random state.
"""
import datetime
import json
import os
import platform
import resource
import signal
import sys
import time
import uuid
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm


class Process(NamedTuple):
    rank: int
    world: int
    device: torch.device
    precision: str = "auto"  # of forward passes: see PRECISIONS

    @property
    def is_main(self):
        return self.rank == 0

    def autocast(self):
        return autocast(self.device, self.precision)

    def say(self, *words):
        """Prints, on the main process. Training goes on when nobody reads it any more, as after `| head`: metrics.jsonl has it all."""
        if self.is_main:
            try:
                tqdm.write(" ".join(map(str, words)), file=sys.stdout)
                sys.stdout.flush()
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def agree(store, rank, world, timeout_sec=600):
    """A word that the processes of this very start share, and no earlier ones. torchrun's restart counts do not serve: nodes count differently.
    Each process asks under a name that it has just made up, so that no answer to a dead one is taken for its own."""
    word = uuid.uuid4().hex
    if rank:
        store.set(f"asks/{rank}", word)
        word = store.get(f"answer/{word}").decode()
        store.set(f"heard/{word}/{rank}", "")
        return word
    missing, deadline = set(range(1, world)), time.monotonic() + timeout_sec
    while missing:
        for r in sorted(missing):
            if store.check([f"asks/{r}"]):  # perhaps a dead one's: then it is asked anew
                store.set(f"answer/{store.get(f'asks/{r}').decode()}", word)
            if store.check([f"heard/{word}/{r}"]):
                missing.remove(r)
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {sorted(missing)} of {world} have not joined after {timeout_sec} s: see what they said, and whether all nodes were started")
        time.sleep(0.01)
    return word


def world_size():
    """How many processes torchrun started; one without it."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1


def start_process(device="auto", precision="auto"):
    """This process' place: joins torchrun's group when torchrun started it (NCCL on GPUs, gloo on CPU), else stands alone."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {device!r}: expected auto, cpu or cuda (CUDA_VISIBLE_DEVICES or torchrun choose which GPU)")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch finds no GPU here (torch.cuda.is_available() is False); use auto or cpu")
    cuda = device != "cpu" and torch.cuda.is_available()
    if "RANK" not in os.environ:
        return Process(0, 1, torch.device("cuda" if cuda else "cpu"), precision)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    store, rank, world = next(dist.rendezvous("env://"))
    # After a restart torchrun's store still holds the addresses of the dead: look elsewhere in it.
    store = dist.PrefixStore(agree(store, rank, world), store)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world,
                            timeout=datetime.timedelta(hours=1), device_id=device if cuda else None)  # one process may encode an hour longer than another
    return Process(dist.get_rank(), dist.get_world_size(), device, precision)


def end_process(process):
    if process.world > 1:
        dist.destroy_process_group()


def barrier(process):
    if process.world > 1:
        dist.barrier()


def mean_over_ranks(x):
    """The mean of a tensor over all processes; x itself in a single one."""
    if dist.is_available() and dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def average_gradients(model):
    """Averages gradients over processes, where DDP did not: as one flat tensor, so that it is one message."""
    if dist.is_available() and dist.is_initialized():
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        mean = mean_over_ranks(torch.cat([g.flatten() for g in grads]))
        for g, m in zip(grads, mean.split([g.numel() for g in grads])):
            g.copy_(m.view_as(g))


def gather(x, process):
    """A list of every process' x, by rank."""
    parts = [x] * process.world
    if process.world > 1:
        dist.all_gather_object(parts, x)
    return parts


def write_aside(path, write):
    """write(file) goes to a temporary file that is renamed to `path` when it is whole and on disk."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part = f"{path}.part-{os.getpid()}"
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


def save_json(obj, path):
    write_aside(path, lambda f: f.write((json.dumps(obj, indent=1) + "\n").encode()))


def save_weights(model, path, **facts):
    """{"model": state dict on the CPU, **facts}, for torch.load(path, weights_only=True)."""
    state = {k: v.cpu() for k, v in model.state_dict().items()}
    write_aside(path, lambda f: torch.save({"model": state, **facts}, f))


def seconds_of(path):
    """The cost of an encoder checkpoint, with all that it was made from; 0 if somebody else made it."""
    return torch.load(path, map_location="cpu", weights_only=True).get("seconds", 0.0) if os.path.isfile(path or "") else 0.0


def save_checkpoint(state, path):
    """Keeps the checkpoint before this one beside it, as PATH.previous."""
    if os.path.exists(path):
        os.replace(path, f"{path}.previous")
    write_aside(path, lambda f: torch.save(state, f))


def load_checkpoint(path, say=print):
    """The newest readable state at PATH or PATH.previous; None if there is neither. One that cannot be read is named."""
    for candidate in (path, f"{path}.previous"):
        if os.path.exists(candidate):
            try:
                return torch.load(candidate, map_location="cpu", weights_only=True)
            except Exception as error:  # whatever a truncated or foreign file makes torch raise
                say(f"checkpoint {candidate} cannot be read ({type(error).__name__}), trying the one before it")
    if os.path.exists(path) or os.path.exists(f"{path}.previous"):
        raise ValueError(f"neither {path} nor the checkpoint before it can be read: remove them to start this stage again")


OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SCHEDULES = ("step", "cosine")


def make_optimizer(parameters, *, optimizer, lr, weight_decay, momentum=0.0):
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer {optimizer!r}: expected {', '.join(OPTIMIZERS)}")
    more = {"momentum": momentum} if optimizer == "sgd" else {}
    return OPTIMIZERS[optimizer]([p for p in parameters if p.requires_grad], lr, weight_decay=weight_decay, **more)


def lr_factor(epoch, epochs, *, schedule, every=5, factor=0.5, warmup=0.3):
    """What the learning rate is multiplied by at `epoch`, a fraction (2.5 is the middle of the third epoch).

    "step": times `factor` after every `every` epochs. "cosine": linear from 1/25 over the first `warmup` of training, then a cosine to 0.
    """
    if schedule == "step":
        return factor ** (epoch // every)
    if schedule != "cosine":
        raise ValueError(f"schedule {schedule!r}: expected step or cosine")
    progress = epoch / epochs
    if progress < warmup:
        return 0.04 + 0.96 * progress / warmup
    return 0.5 * (1 + torch.cos(torch.tensor((progress - warmup) / (1 - warmup) * torch.pi, dtype=torch.float64)).item())


def peak_memory_gb(device):
    """Peak memory of this process in GB: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if os.path.exists("/proc/self/status"):  # Linux, where ru_maxrss begins with the peak of the program that started this one
        with open("/proc/self/status") as f:
            own = [int(line.split()[1]) * 1024 / 1e9 for line in f if line.startswith("VmHWM")]
        if own:
            return own[0]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def _worker(_):
    for s in (signal.SIGINT, signal.SIGTERM):  # they reach the whole process group: the main process decides, and ends its workers
        signal.signal(s, signal.SIG_IGN)
    torch.set_num_threads(1)


def machine_of(device):
    """GPU or CPU of a device on this machine, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        name = next((line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


PRECISIONS = ("auto", "float32", "bfloat16")


def autocast(device, precision="auto"):
    """The context of a forward pass: bfloat16 or none, float32; auto: bfloat16 on a GPU, float32 on a CPU. Weights are float32 in each."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: expected {', '.join(PRECISIONS)}")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16" or precision == "auto" and device.type == "cuda")


def make_loader(dataset, batch_sampler, collate, workers, device):
    return DataLoader(dataset, batch_sampler=batch_sampler, collate_fn=collate, num_workers=workers, worker_init_fn=_worker,
                      persistent_workers=workers > 0, pin_memory=device.type == "cuda")


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def batches(dataset, fidelity, size, collate, *, name, process, workers=0):
    """Batches of a data set in order, on the device, with a progress bar; each rank its share, dataset.share(rank, world) if the data set decides
    that itself, so that each sample comes once."""
    own = dataset.share(process.rank, process.world) if hasattr(dataset, "share") else range(process.rank, len(dataset), process.world)
    loader = make_loader(dataset, [[(i, fidelity) for i in own[k:k + size]] for k in range(0, len(own), size)], collate, workers, process.device)
    for batch in tqdm(loader, name, unit="batch", leave=False, disable=not (process.is_main and sys.stderr.isatty())):
        yield to_device(batch, process.device)


class Interrupted(SystemExit):
    """A signal stopped training after its state was saved; as an exit status, 128 + signal."""


def fit(model, step, dataset, sampler, collate, *, options, name, folder, process, workers=0, save_sec=60.0,
        about=None, training=None):
    """Trains `model` in place and returns (seconds, history), or raises Interrupted with everything saved in `folder`.

    step(net, batch, epoch, i): forward and backward of one batch through `net`, the model or its DDP wrapper; returns {term: scalar
    tensor} with "loss" in it. options: epochs and the arguments of make_optimizer and lr_factor; clip, the largest gradient norm, if any.
    Writes folder/checkpoint.pt every `save_sec` seconds, after an epoch and on SIGINT or SIGTERM, and resumes from it;
    folder/metrics.jsonl has a line an epoch. about: plain data to keep in the checkpoint, such as the config. training: plain data that tells
    the training data from others; ValueError for a checkpoint of others, whose epochs and steps would mean something else.
    Raises FloatingPointError, naming the videos, when a loss or a gradient is not finite, before it can reach weights or checkpoint.
    """
    path, device = f"{folder}/checkpoint.pt", process.device
    epochs, clip = options["epochs"], options.get("clip", 0)
    optimizer = make_optimizer(model.parameters(), **{k: options[k] for k in ("optimizer", "lr", "momentum", "weight_decay")})
    shape = {k: options[k] for k in ("schedule", "every", "factor", "warmup")}
    state = {"epoch": 0, "step": 0, "sums": {}, "history": [], "seconds": 0.0}  # where it stands: all that a resumed run needs beside weights
    saved = load_checkpoint(path, process.say)
    if saved:
        model.load_state_dict(saved.pop("model"))
        optimizer.load_state_dict(saved.pop("optimizer"))
        saved.pop("about", None)
        began = saved.pop("training", None)
        if None not in (began, training) and began != training:
            raise ValueError(f"{path} was begun on other training data: {began} there, {training} now. Bring those back, or remove {folder} to begin this stage anew")
        state = saved
        process.say(f"{name}: resuming at epoch {state['epoch'] + 1}, step {state['step'] + 1}")
    net = model
    if process.world > 1:
        net = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    net.train()
    loader = make_loader(dataset, sampler, collate, workers, device)
    signals = []
    before = {s: signal.signal(s, lambda number, _: signals.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    started, last_save = time.monotonic() - state["seconds"], time.monotonic()

    def save():
        state["seconds"] = time.monotonic() - started
        if process.is_main:
            save_checkpoint({"model": model.state_dict(), "optimizer": optimizer.state_dict(), **state, "about": about, "training": training}, path)

    try:
        for epoch in range(state["epoch"], epochs):
            dataset.set_epoch(epoch)
            sampler.set_epoch(epoch, state["step"])
            bar = tqdm(total=sampler.steps, initial=state["step"], desc=f"{name} {epoch + 1}/{epochs}", leave=False, unit="step",
                       disable=not (process.is_main and sys.stderr.isatty()))
            epoch_started, first = time.monotonic(), state["step"]
            for i, batch in enumerate(loader, state["step"]):
                for group in optimizer.param_groups:
                    group["lr"] = options["lr"] * lr_factor(epoch + i / sampler.steps, epochs, **shape)
                optimizer.zero_grad(set_to_none=True)
                terms = step(net, to_device(batch, device), epoch, i)
                finite = bool(torch.isfinite(terms["loss"]))
                flags = mean_over_ranks(torch.tensor([float(not finite), float(bool(signals)), *map(float, terms.values())], device=device)).tolist()
                if flags[0]:
                    where = f"{name}: loss is not finite at epoch {epoch + 1}, step {i + 1}, {sampler.fidelity(epoch, i)}"
                    raise FloatingPointError(f"{where}: {', '.join(map(str, batch['name'])) if not finite else 'on another process'}")
                values = dict(zip(terms, flags[2:]))
                norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
                if not torch.isfinite(norm):
                    raise FloatingPointError(f"{name}: the gradient is not finite at epoch {epoch + 1}, step {i + 1}, {sampler.fidelity(epoch, i)}: "
                                             + ", ".join(map(str, batch["name"])) + (", or those of another process" if process.world > 1 else ""))
                if clip:
                    torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip, norm)
                    values["gradient_norm"] = norm.item()
                optimizer.step()
                for key, value in values.items():
                    state["sums"][key] = state["sums"].get(key, 0.0) + value
                state["step"] = i + 1
                if epoch == i == 0:
                    process.say(f"{name}: after the first step, peak memory {peak_memory_gb(device):.2f} GB a process")
                done = (i + 1 - first) * sampler.batch_size
                if not bar.disable:
                    bar.set_postfix({"fidelity": sampler.fidelity(epoch, i).name, **{k: f"{v / (i + 1):.3f}" for k, v in state["sums"].items()},
                                     "videos/s": f"{done / (time.monotonic() - epoch_started):.1f}", "GB": f"{peak_memory_gb(device):.1f}"}, refresh=False)
                bar.update()
                if flags[1]:
                    save()
                    number = signals[0] if signals else signal.SIGTERM
                    process.say(f"\n{name}: stopped by {signal.Signals(number).name} in epoch {epoch + 1} after step {i + 1}; the same command goes on from there")
                    raise Interrupted(128 + number)
                if i + 1 < sampler.steps and time.monotonic() - last_save > save_sec:
                    save()
                    last_save = time.monotonic()
            bar.close()
            seconds = time.monotonic() - epoch_started
            record = {"epoch": epoch + 1, "fidelity": sampler.fidelity(epoch, 0).name, "lr": optimizer.param_groups[0]["lr"],
                      **{k: v / sampler.steps for k, v in state["sums"].items()}, "seconds": seconds,
                      "videos_per_sec": (sampler.steps - first) * sampler.batch_size / seconds, "peak_memory_gb": peak_memory_gb(device)}
            state["history"].append(record)
            state.update(epoch=epoch + 1, step=0, sums={})
            save()
            last_save = time.monotonic()
            if process.is_main:
                write_aside(f"{folder}/metrics.jsonl", lambda f: f.write("".join(json.dumps(r) + "\n" for r in state["history"]).encode()))
            process.say(f"{name} {epoch + 1}/{epochs}: " + ", ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items() if k != "epoch"))
        if signals:  # one that came during the last save
            raise Interrupted(128 + signals[0])
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    for buffer in model.buffers() if process.world > 1 else ():  # a training BatchNorm's: the last step's are each process' own
        dist.broadcast(buffer, 0)
    return time.monotonic() - started, state["history"]
