"""Measure memory and time of LoFi's training step, as ratios of what one run measures side by side.

    python -m benchmarks.training [--runs 5]

1. One step of one video at S, T, ST and full fidelity, and at full fidelity in chunks: each in a
   process of its own, peak memory above what it held before its first step. TSM-ResNet-18, full
   width: the paper's sizes on a GPU, 64 snippets x 8 frames x 112 pixels on a CPU.
2. The whole training step (loader, encoder, head, targets, losses, optimizer) against the bare
   encoder's forward and backward of the same frames.
3. The TSM encoder against the same network without shift, forward and backward: time, and memory
   held for the backward pass; and a plain shift, which leaves a shifted copy of the activations.
4. The same encoder in bfloat16 against float32 (config key precision), forward and backward; the
   share of a large matrix product's FLOP/s, and the encoder compiled (config key lofi.compile).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial

import torch

import checkpoint
import data
import tsm
from benchmarks.gpu import count_flops, share_of_peak
from benchmarks.table import Row, rounded
from localizer import Distributed, Localizer, localization_step
from tools.make_toy import Toy, make_toy

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else the profiler tells of GPUs that are not there
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
FRAMES = 8
WIDTH = 64
FULL = data.Fidelity("full", 100, 224) if CUDA else data.Fidelity("full", 64, 112)
CHUNK = 8 if CUDA else 4
LOSS = {"node": 1.0, "regression": 10.0, "classification": 1.0}


def fidelities():
    """Return the paper's S, T and ST of FULL."""
    L, H = FULL.snippets, FULL.size
    sizes = {"S": [L, H // 2], "T": [L // 4, H], "ST": [L // 2, round(H / 2**0.5)]}
    return {"full": FULL} | {name: data.Fidelity(name, *size) for name, size in sizes.items()}


def clock():
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def median_times(*functions, runs):
    """Return median seconds of each function, called in turn: noise disturbs all of them."""
    for function in functions:
        function()
    times = [[] for _ in functions]
    for _ in range(runs):
        for function, own in zip(functions, times, strict=True):
            started = clock()
            function()
            own.append(clock() - started)
    return [statistics.median(own) for own in times]


def build_localizer():
    torch.manual_seed(0)
    encoder = tsm.TSM(width=WIDTH, frozen_bn=True)
    return Localizer("gtad", {}, encoder.channels, encoder=encoder).to(DEVICE).train()


def train_step(model, optimizer, batch, chunk_snippets=None):
    optimizer.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(0)
    options = {"class_weight": 0.0, "chunk_snippets": chunk_snippets}
    ddp = Distributed(0, 1, DEVICE)
    localization_step(model, batch, generator, loss=LOSS, options=options, ddp=ddp)
    optimizer.step()


def random_batch(fidelity):
    shape = (1, fidelity.snippets, FRAMES, 3, fidelity.size, fidelity.size)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
    return {"frames": frames, "segments": [torch.tensor([[0.2, 0.6]])]}


def measure_fidelity(name, runs):
    """Return [peak memory in GB above the start, median seconds a step] of this process."""
    fidelity = fidelities()[name.removesuffix(" in chunks")]
    chunk = CHUNK if name.endswith("in chunks") else None
    model = build_localizer()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    # A tiny step first: the libraries' own memory.
    train_step(model, optimizer, random_batch(data.Fidelity("tiny", 2, 32)))
    batch = random_batch(fidelity)
    optimizer.zero_grad(set_to_none=True)
    before = checkpoint.peak_memory_gb(DEVICE)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e9
    (seconds,) = median_times(partial(train_step, model, optimizer, batch, chunk), runs=runs)
    return [checkpoint.peak_memory_gb(DEVICE) - before, seconds]


def compare_fidelities(runs, alone=True):
    """Return {fidelity: what measure_fidelity does}; alone: in processes of their own, and all."""
    print("\n1. one training step of one video, encoder and head")
    print("| fidelity | peak memory GB | of full | seconds | of full |\n|---|--:|--:|--:|--:|")
    measured = {}
    for name in ("full", "full in chunks", "S", "T", "ST") if alone else ("full", "S"):
        command = [
            sys.executable,
            "-m",
            "benchmarks.training",
            "--fidelity",
            name,
            "--runs",
            str(runs),
        ]
        if not alone:
            measured[name] = measure_fidelity(name, runs)
            continue
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        measured[name] = json.loads(done.stdout.splitlines()[-1])
    full_memory, full_seconds = measured["full"]
    for name, (memory, seconds) in measured.items():
        memory_ratio, time_ratio = memory / max(full_memory, 1e-9), seconds / full_seconds
        print(f"| {name} | {memory:.2f} | {memory_ratio:.3f} | {seconds:.2f} | {time_ratio:.2f} |")
    low = [measured[name][0] for name in ("S", "T", "ST") if name in measured]
    print(f"largest over smallest memory of S, T, ST: {max(low) / max(min(low), 1e-9):.2f}")
    return measured


def compare_whole_step(runs):
    """Load real JPEG frames through the real loader."""
    fidelity = fidelities()["S"]
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"size": round(FULL.size / 0.875), "snippets": FULL.snippets}
        toy = Toy(train=2, val=1, clips=1, stills=1, frames_per_snippet=FRAMES, **sizes)
        make_toy(f"{folder}/toy", toy, workers=0)
        subsets = data.load_annotations(f"{folder}/toy/annotations.json")
        videos = data.select_videos(subsets, "training", f"{folder}/toy/frames", "frames")
        view = {"frames_per_snippet": FRAMES, "stride": 1, "size": FULL.size}
        dataset = data.VideoDataset(videos, snippets=FULL.snippets, train=True, **view)
        model = build_localizer()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        batches = [[(0, fidelity), (1, fidelity)]] * (2 * runs + 4)
        loader = iter(data.BatchLoader(dataset, batches, 1, DEVICE))
        batch = data.to_device(next(loader), DEVICE)

        def whole_step():
            train_step(model, optimizer, data.to_device(next(loader), DEVICE))

        def encoder_alone():
            with Distributed(0, 1, DEVICE).autocast():
                features = model.encoder(batch["frames"])
            features.backward(torch.ones_like(features))

        step, encoder = median_times(whole_step, encoder_alone, runs=runs)
        data.stop_workers()
    print(f"\n2. whole training step, 2 videos of {fidelity}: {step:.3f} s; encoder alone:")
    print(f"{encoder:.3f} s; ratio {step / encoder:.2f}")
    return step, encoder


def plain_shifted_conv(conv, x, frames, div):
    return conv(tsm.temporal_shift(x, frames, div))


def forward_backward(model, frames, conv=tsm.shifted_conv, precision="auto"):
    own, tsm.shifted_conv = tsm.shifted_conv, conv
    with Distributed(0, 1, DEVICE, precision).autocast():
        out = model(frames)
    out.sum().backward()
    tsm.shifted_conv = own


def held_memory(model, frames, conv=tsm.shifted_conv):
    """Return the MB that a forward pass leaves allocated for the backward pass."""
    own, tsm.shifted_conv = tsm.shifted_conv, conv
    try:
        if CUDA:
            before = torch.cuda.memory_allocated()
            with Distributed(0, 1, DEVICE).autocast():
                out = model(frames)
            held = torch.cuda.memory_allocated() - before
            del out
            return held / 1e6
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            out = model(frames)
        del out
        return sum(event.self_cpu_memory_usage for event in profile.key_averages()) / 1e6
    finally:
        tsm.shifted_conv = own


def compare_encoders(runs):
    frames = random_batch(data.Fidelity("x", 25 if CUDA else 8, FULL.size))["frames"]
    shifting = tsm.TSM(width=WIDTH, frozen_bn=True).to(DEVICE).train()
    still = tsm.TSM(width=WIDTH, shift_div=0, frozen_bn=True).to(DEVICE).train()
    cases = {
        "TSM": (shifting, frames),
        "no shift": (still, frames),
        "TSM, plain shift": (shifting, frames, plain_shifted_conv),
    }
    functions = [partial(forward_backward, *case) for case in cases.values()]
    times = median_times(*functions, runs=3 * runs)
    held = [held_memory(*case) for case in cases.values()]
    print("\n3. encoder, forward and backward")
    print("| | seconds | of no shift | MB held | of no shift |\n|---|--:|--:|--:|--:|")
    for name, seconds, memory in zip(cases, times, held, strict=True):
        ratios = f"{seconds / times[1]:.3f} | {memory:.1f} | {memory / held[1]:.3f}"
        print(f"| {name} | {seconds:.3f} | {ratios} |")

    precisions = ("float32", "bfloat16")
    steps = [partial(forward_backward, shifting, frames, precision=p) for p in precisions]
    full, half = median_times(*steps, runs=runs)
    print(f"\n4. encoder, forward and backward: float32 {full:.3f} s, bfloat16 {half:.3f} s;")
    print(f"float32 / bfloat16 {full / half:.2f}")
    print(share_of_peak(count_flops(steps[0]), full, DEVICE, torch.float32))
    print(share_of_peak(count_flops(steps[1]), half, DEVICE, torch.bfloat16))
    return times, held, (full, half)


def compare_compiled(runs):
    """Compile the encoder, which on a CPU needs a C++ compiler."""
    frames = random_batch(data.Fidelity("x", 25 if CUDA else 8, FULL.size))["frames"]
    encoder = tsm.TSM(width=WIDTH, frozen_bn=True).to(DEVICE).train()
    compiled = partial(forward_backward, torch.compile(encoder), frames)
    started = clock()
    compiled()
    seconds = clock() - started
    plain, fast = median_times(partial(forward_backward, encoder, frames), compiled, runs=runs)
    print(f"\n5. encoder, compiled in {seconds:.0f} s; plain / compiled {plain / fast:.2f}")


def rows(quick=False):
    """Return rows of the benchmarks' table."""
    global FULL, FRAMES, WIDTH
    if quick:
        FULL, FRAMES, WIDTH = data.Fidelity("full", 16, 16), 2, 16
    runs = 1 if quick else 2
    measured = compare_fidelities(runs, alone=not quick)
    memory, seconds = measured.pop("full")
    found = []
    for name, (own_memory, own_seconds) in measured.items():
        what = (
            f"training step of one video, {FULL.snippets} x {FRAMES} x {FULL.size} pixels: {name}"
        )
        ratio = f"memory {own_memory / max(memory, 1e-9):.3f}, time {own_seconds / seconds:.2f}"
        both = f"{rounded(own_seconds)}, {rounded(seconds)}"
        found.append(Row(what, "full fidelity", ratio, both))
    step, encoder = compare_whole_step(runs)
    what = "whole step, 2 videos at S: loader, encoder, head, targets, losses, optimizer"
    both = f"{rounded(step)}, {rounded(encoder)}"
    found.append(Row(what, "encoder alone", f"time {step / encoder:.2f}", both))
    (shifting, still, plain), held, (full, half) = compare_encoders(runs)
    what = "TSM-ResNet-18, forward and backward"
    ratio = f"time {shifting / still:.2f}, memory held {held[0] / held[1]:.2f}"
    ratio += f"; a plain shift {plain / still:.2f}, {held[2] / held[1]:.2f}"
    both = f"{rounded(shifting)}, {rounded(still)}"
    found.append(Row(what, "the same without shift", ratio, both))
    both = f"{rounded(half)}, {rounded(full)}"
    found.append(Row(f"{what}, bfloat16", "float32", f"{full / half:.2f} x faster", both))
    return found


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--fidelity", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fidelity:
        print(json.dumps(measure_fidelity(args.fidelity, args.runs)))
        return
    machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if CUDA else machine
    print(f"torch {torch.__version__}, {machine}, {FRAMES} frames a snippet, {FULL}")
    print(f"medians of {args.runs} runs")
    compare_fidelities(args.runs)
    compare_whole_step(args.runs)
    compare_encoders(args.runs)
    compare_compiled(args.runs)


if __name__ == "__main__":
    main()
