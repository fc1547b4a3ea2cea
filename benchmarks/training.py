"""Memory and time of LoFi's training step; ratios of what is measured side by side in one run.

    python benchmarks/training.py [--runs 5]

1. One step of one video at S, T, ST and full fidelity, and at full fidelity in chunks: each in a process of its own, peak memory above what the
   process held before its first step. TSM-ResNet-18, full width: the paper's sizes on a GPU, 64 snippets x 8 frames x 112 pixels on a CPU.
2. The whole training step (loader, encoder, head, targets, losses, optimizer) against the bare encoder's forward and backward of the same frames.
3. The TSM encoder against the same network without shift, forward and backward: time, and memory held for the backward pass; also a plain shift
   that leaves a shifted copy of the activations behind.
4. The same encoder in bfloat16 against float32 (config key precision), forward and backward.
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

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler tells of GPUs that are not there
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data
import engine
import toy
import tsm
from localizer import Localizer, train_step

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SNIPPETS, FRAMES, SIZE, CHUNK = (100, 8, 224, 8) if CUDA else (64, 8, 112, 4)
LOSS = {"node": 1, "regression": 10, "classification": 1}
GTAD = dict(hidden=256, gcn_width=128, gcn_groups=32, inner_bins=32, context_bins=4, map_hidden=(512, 128))


def clock():
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def median_times(*functions, runs):
    """Median seconds of each function, called in turn: what disturbs the machine disturbs all of them."""
    for f in functions:
        f()
    times = [[] for _ in functions]
    for _ in range(runs):
        for f, t in zip(functions, times):
            started = clock()
            f()
            t.append(clock() - started)
    return [statistics.median(t) for t in times]


def localizer():
    torch.manual_seed(0)
    return Localizer("gtad", GTAD, channels=512, encoder=tsm.TSM(frozen_bn=True)).to(DEVICE).train()


def step_of(model, optimizer, batch, chunk=0):
    optimizer.zero_grad(set_to_none=True)
    train_step(model, batch, loss=LOSS, class_weight=0, generator=torch.Generator().manual_seed(0), shard=(0, 1), reduce=None,
               autocast=partial(engine.autocast, DEVICE), chunk=chunk)
    optimizer.step()


def random_batch(fidelity, videos=1):
    frames = torch.randint(0, 256, (videos, fidelity.snippets, FRAMES, 3, fidelity.size, fidelity.size), dtype=torch.uint8, device=DEVICE)
    return {"frames": frames, "segments": [torch.tensor([[0.2, 0.6]])] * videos}


def one_fidelity(name, runs):
    """In a process of its own: (peak memory in GB above the start, median seconds a step)."""
    f = data.fidelities(SNIPPETS, SIZE)[name.removesuffix(" in chunks")]
    model, chunk = localizer(), CHUNK if name.endswith("in chunks") else 0
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    warm = {"frames": random_batch(f)["frames"][:, :2, :, :, :32, :32], "segments": [torch.tensor([[0.2, 0.6]])]}
    step_of(model, optimizer, warm)  # the libraries' own memory
    batch = random_batch(f)
    optimizer.zero_grad(set_to_none=True)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() / 1e9 if CUDA else engine.peak_memory_gb(DEVICE)
    seconds, = median_times(partial(step_of, model, optimizer, batch, chunk), runs=runs)
    print(json.dumps([engine.peak_memory_gb(DEVICE) - before, seconds]))


def held_memory(model, frames):
    """MB that a forward pass leaves allocated for the backward pass."""
    if CUDA:
        before = torch.cuda.memory_allocated()
        with engine.autocast(DEVICE):
            out = model(frames)
        return (torch.cuda.memory_allocated() - before) / 1e6, out
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = model(frames)
    return sum(e.self_cpu_memory_usage for e in profile.key_averages()) / 1e6, out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--fidelity", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fidelity:
        return one_fidelity(args.fidelity, args.runs)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if CUDA else platform.machine() + f' CPU, {torch.get_num_threads()} threads'}, "
          f"{SNIPPETS} snippets x {FRAMES} frames x {SIZE} pixels, medians of {args.runs} runs")

    print("\n1. one training step of one video, encoder and head\n| fidelity | peak memory GB | of full | seconds | of full |\n|---|--:|--:|--:|--:|")
    names = ["full", "full in chunks", "S", "T", "ST"]
    measured = {n: json.loads(subprocess.run([sys.executable, __file__, "--fidelity", n, "--runs", str(args.runs)], check=True, capture_output=True,
                                             text=True).stdout.splitlines()[-1]) for n in names}
    for n, (memory, seconds) in measured.items():
        print(f"| {n} | {memory:.2f} | {memory / measured['full'][0]:.3f} | {seconds:.2f} | {seconds / measured['full'][1]:.2f} |")
    low = [measured[n][0] for n in ("S", "T", "ST")]
    print(f"largest over smallest memory of S, T, ST: {max(low) / min(low):.2f}")

    with tempfile.TemporaryDirectory() as folder:  # real JPEG frames through the real loader
        toy.make_toy(f"{folder}/toy", train=2, val=1, clips=1, stills=1, size=round(SIZE / 0.875), snippets=SNIPPETS, frames_per_snippet=FRAMES, workers=1)
        videos = data.load_annotations(f"{folder}/toy/annotations.json")["training"]
        f = data.fidelities(SNIPPETS, SIZE)["S"]
        dataset = data.VideoDataset(videos, f"{folder}/toy/frames", snippets=SNIPPETS, frames=FRAMES, stride=1, train=True)
        model = localizer()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        loader = iter(engine.make_loader(dataset, [[(0, f), (1, f)]] * (2 * args.runs + 4), data.collate, 1, DEVICE))
        batch = engine.to_device(next(loader), DEVICE)

        def encoder_alone():
            with engine.autocast(DEVICE):
                features = model.encoder(batch["frames"])
            features.backward(torch.ones_like(features))
        step, encoder = median_times(lambda: step_of(model, optimizer, engine.to_device(next(loader), DEVICE)), encoder_alone, runs=args.runs)
        print(f"\n2. whole training step, 2 videos of {f.snippets} x {FRAMES} x {f.size}: {step:.3f} s; encoder alone: {encoder:.3f} s; ratio {step / encoder:.2f}")

    frames = random_batch(data.Fidelity("x", 8 if not CUDA else 25, SIZE))["frames"]
    ours, still = (tsm.TSM(shift_div=div, frozen_bn=True).to(DEVICE).train() for div in (8, 0))

    def plain(conv, x, frames, div):
        return conv(tsm.temporal_shift(x, frames, div))

    def run(model, conv=tsm.shifted_conv):
        kept, tsm.shifted_conv = tsm.shifted_conv, conv
        with engine.autocast(DEVICE):
            out = model(frames)
        out.sum().backward()
        tsm.shifted_conv = kept
    times = median_times(lambda: run(ours), lambda: run(still), lambda: run(ours, plain), runs=3 * args.runs)
    held = [held_memory(ours, frames)[0], held_memory(still, frames)[0]]
    kept, tsm.shifted_conv = tsm.shifted_conv, plain
    held.append(held_memory(ours, frames)[0])
    tsm.shifted_conv = kept
    print("\n3. encoder, forward and backward\n| | seconds | of no shift | MB held | of no shift |\n|---|--:|--:|--:|--:|")
    for name, t, m in zip(("TSM", "no shift", "TSM, plain shift"), times, held):
        print(f"| {name} | {t:.3f} | {t / times[1]:.3f} | {m:.1f} | {m / held[1]:.3f} |")

    def at(precision):
        with engine.autocast(DEVICE, precision):
            out = ours(frames)
        out.sum().backward()
    full, half = median_times(partial(at, "float32"), partial(at, "bfloat16"), runs=args.runs)
    print(f"\n4. encoder, forward and backward: float32 {full:.3f} s, bfloat16 {half:.3f} s; float32 / bfloat16 {full / half:.2f}")


if __name__ == "__main__":
    main()
