"""Compare the folded G-TAD and BMN heads with the materialising ones: speed and memory.

    python -m benchmarks.head                  # ActivityNet sizes; batch 4 on CPU, 16 on a GPU
    python -m benchmarks.head --head bmn       # BMN, its release's sizes
    python -m benchmarks.head --batch 1 --length 50 --repeats 9

Same weights, same input, one run. A step is forward, loss and backward. Times are medians over
alternating steps after a warm-up. CPU memory is the growth of the resident set over one first step
in a process of its own, which has done a tiny step before, for the libraries' own memory:
activations, gradients and fixed interpolation weights. `tensors` is the peak of what tensors hold,
beside the fixed weights. The share of peak: of a large matrix product's FLOP/s.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import torch

from benchmarks import bmn_materialised, gtad_materialised
from benchmarks.gpu import count_flops, share_of_peak
from benchmarks.table import Row, rounded
from bmn import BMN
from checkpoint import machine_name, peak_memory_gb
from gtad import GTAD, loss_weights, losses, make_targets

CPU = torch.device("cpu")
WAYS = ("folded", "materialised")


@dataclass(frozen=True)
class Head:
    """A network, the same network materialising its map, and the release's channels."""

    network: type
    materialised: object
    channels: int


HEADS = {
    "gtad": Head(GTAD, gtad_materialised.materialised, 512),
    "bmn": Head(BMN, bmn_materialised.materialised, 400),
}


def make_step(args, device):
    """Return step(way, dtype) -> (detached outputs, gradient of the input)."""
    torch.manual_seed(0)
    head = HEADS[args.head].network(in_channels=args.channels).to(device)
    x = torch.randn(args.batch, args.channels, args.length, device=device, requires_grad=True)
    segments = [torch.tensor([[0.2, 0.5], [0.6, 0.9]])] * args.batch
    targets = make_targets(segments, args.length, device=device)
    weights = loss_weights(targets, generator=torch.Generator().manual_seed(0))

    def step(way, dtype=torch.float32):
        head.zero_grad()
        x.grad = None
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            outputs = head(x) if way == "folded" else HEADS[args.head].materialised(head, x)
        terms = losses(*outputs, targets, weights)
        (terms["node"] + 10 * terms["regression"] + terms["classification"]).backward()
        return [output.detach() for output in outputs], x.grad

    return step


def print_difference(step):
    """Print the largest difference of outputs, and of the gradient relative to its largest."""
    outputs, gradient = step("folded")
    expected, expected_gradient = step("materialised")
    pairs = zip(outputs, expected, strict=True)
    largest = max((a - b).abs().max().item() for a, b in pairs)
    relative = (gradient - expected_gradient).abs().max() / expected_gradient.abs().max()
    print(f"largest difference of outputs {largest:.1e}, of the gradient (relative) {relative:.1e}")


def measure_times(step, repeats, synchronize=lambda: None, **options):
    """Return {way: seconds of each repeat}.

    The ways alternate, so that a busy machine is busy for both.
    """
    times = {way: [] for way in WAYS}
    for repeat in range(repeats + 1):
        for way in WAYS:
            synchronize()
            begin = time.perf_counter()
            step(way, **options)
            synchronize()
            if repeat:
                times[way].append(time.perf_counter() - begin)
    return times


def resident_growth_mb(args, way):
    """Return how much this process grows in its first step, after a tiny one."""
    tiny = argparse.Namespace(**{**vars(args), "batch": 1, "length": 4})
    make_step(tiny, CPU)(way)
    step = make_step(args, CPU)
    before = peak_memory_gb(CPU)
    step(way)
    return (peak_memory_gb(CPU) - before) * 1e9 / 2**20


def tensors_mb(step, way):
    """Return the peak of what tensors hold in a step, in MB, by the profiler's account."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    step(way)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step(way)
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        with open(f"{folder}/trace.json") as file:
            events = json.load(file)["traceEvents"]
    memory = [e for e in events if e.get("name") == "[memory]"]
    memory.sort(key=lambda e: e["ts"])
    totals = [e["args"]["Total Allocated"] for e in memory]
    return (max(totals) - totals[0]) / 2**20


def report(title, times, memory_mb):
    """Print a table; return how much faster and smaller ours is, and the seconds of both."""
    print(f"\n{title}\n{'':14}{'median s':>10}{'min':>9}{'max':>9}{'memory MB':>12}")
    medians = {}
    for way, values in times.items():
        medians[way] = statistics.median(values)
        span = f"{min(values):9.4f}{max(values):9.4f}"
        print(f"{way:14}{medians[way]:10.4f}{span}{memory_mb[way]:12.0f}")
    faster = medians["materialised"] / medians["folded"]
    smaller = memory_mb["materialised"] / max(memory_mb["folded"], 1e-3)
    print(f"{'ratio':14}{faster:10.1f}{'':18}{smaller:12.1f}")
    return faster, smaller, [medians[way] for way in WAYS]


def run_on_cpu(args, alone=True):
    """Return what `report` does, and how many times less our tensors hold.

    alone: memory is measured in processes of their own.
    """
    names = ("head", "batch", "length", "channels", "threads")
    options = [f"--{name}={getattr(args, name)}" for name in names]
    memory_mb = {}
    for way in WAYS:
        if not alone:
            memory_mb[way] = resident_growth_mb(args, way)
            continue
        command = [sys.executable, "-m", "benchmarks.head", "--memory", way, *options]
        memory_mb[way] = float(subprocess.check_output(command, text=True))
    step = make_step(args, CPU)
    print_difference(step)
    held = {way: tensors_mb(step, way) for way in WAYS}
    ratio = held["materialised"] / held["folded"]
    words = ", ".join(f"{way} {mb:.0f} MB" for way, mb in held.items())
    print(f"tensors: {words}, ratio {ratio:.1f}")
    times = measure_times(step, args.repeats)
    seconds = statistics.median(times["folded"])
    print(share_of_peak(count_flops(lambda: step("folded")), seconds, CPU, torch.float32))
    title = f"CPU, float32, batch {args.batch}, {torch.get_num_threads()} threads"
    return *report(title, times, memory_mb), ratio


def run_on_gpu(args):
    device = torch.device("cuda")
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, for both
    step = make_step(args, device)
    print(f"\n{machine_name(device)}")
    print_difference(step)
    for dtype in (torch.float32, torch.bfloat16):
        times = measure_times(step, args.repeats, torch.cuda.synchronize, dtype=dtype)
        memory_mb = {}
        for way in WAYS:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(way, dtype)
            memory_mb[way] = (torch.cuda.max_memory_allocated() - before) / 2**20
        name = str(dtype).removeprefix("torch.")
        report(f"GPU, {name}, batch {args.batch}", times, memory_mb)
        flops = count_flops(lambda dtype=dtype: step("folded", dtype))
        print(share_of_peak(flops, statistics.median(times["folded"]), device, dtype))


def rows(quick=False):
    """Return rows of the benchmarks' table, measured on a CPU."""
    found = []
    for name, head in HEADS.items():
        batch, length, repeats = (1, 8, 1) if quick else (4, 100, 3)
        sizes = {"head": name, "batch": batch, "length": length, "channels": head.channels}
        args = argparse.Namespace(**sizes, repeats=repeats, threads=torch.get_num_threads())
        faster, smaller, seconds, held = run_on_cpu(args, alone=not quick)
        title = {"gtad": "G-TAD", "bmn": "BMN"}[name]
        what = (
            f"{title} head, L = {length}, C = {head.channels}, batch {batch}, forward and backward"
        )
        ratio = f"{faster:.1f} x faster, {smaller:.1f} x less memory, {held:.1f} x by tensors alone"
        both = ", ".join(map(rounded, seconds))
        found.append(Row(what, "materialising the proposal map", ratio, both))
    return found


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.head",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--head", choices=HEADS, default="gtad")
    parser.add_argument("--batch", type=int, help="videos; default 4 on CPU, 16 on GPU")
    parser.add_argument("--length", type=int, default=100, help="L, snippets a video")
    parser.add_argument("--channels", type=int, help="C; default 512, BMN 400")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.channels = args.channels or HEADS[args.head].channels
    torch.set_num_threads(args.threads)
    if args.memory:
        print(resident_growth_mb(args, args.memory))
        return
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    print(f"{args.head} head, C = {args.channels}, L = D = {args.length}")
    print(f"{versions}, {machine_name(CPU)}")
    batch = args.batch
    args.batch = batch or 4
    run_on_cpu(args)
    if torch.cuda.is_available():
        args.batch = batch or 16
        run_on_gpu(args)


if __name__ == "__main__":
    main()
