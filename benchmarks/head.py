"""Speed and memory of the folded G-TAD and BMN heads against the materialising ones: same weights, same input, one run.

    python benchmarks/head.py                  # ActivityNet sizes; batch 4 on CPU, batch 16 on a GPU where there is one
    python benchmarks/head.py --head bmn       # BMN, its release's sizes
    python benchmarks/head.py --batch 1 --length 50 --repeats 9

A step is forward, loss and backward. Times are medians over alternating steps after a warm-up. CPU memory is the growth
of the resident set over one first step in a process of its own: activations, gradients and fixed interpolation weights.
"""
import argparse
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import engine  # noqa: E402
from benchmarks import bmn_materialised, gtad_materialised  # noqa: E402
from bmn import BMN  # noqa: E402
from gtad import GTAD, loss_weights, losses, make_targets  # noqa: E402

HEADS = {"gtad": (GTAD, gtad_materialised.materialised, 512), "bmn": (BMN, bmn_materialised.materialised, 400)}
WAYS = "folded", "materialised"


def setup(args, device):
    torch.manual_seed(0)
    make, materialised, _ = HEADS[args.head]
    head = make(in_channels=args.channels).to(device)
    x = torch.randn(args.batch, args.channels, args.length, device=device, requires_grad=True)
    targets = make_targets([torch.tensor([[0.2, 0.5], [0.6, 0.9]])] * args.batch, args.length, device=device)
    weights = loss_weights(targets, generator=torch.Generator().manual_seed(0))

    def step(name, dtype=torch.float32):
        head.zero_grad()
        x.grad = None
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            outputs = head(x) if name == "folded" else materialised(head, x)
        terms = losses(*outputs, targets, weights)
        (terms["node"] + 10 * terms["regression"] + terms["classification"]).backward()
        return [output.detach() for output in outputs], x.grad
    return step


def difference(step):
    """Largest absolute difference of the outputs, and of the gradient by x relative to its largest entry."""
    (first, gradient), (second, expected) = step("folded"), step("materialised")
    return (max((a - b).abs().max().item() for a, b in zip(first, second)),
            ((gradient - expected).abs().max() / expected.abs().max()).item())


def seconds(step, repeats, synchronise=lambda: None, **arguments):
    """{name: (median, min, max) seconds}; the two alternate, so that a busy machine is busy for both."""
    times = {name: [] for name in WAYS}
    for repeat in range(repeats + 1):
        for name in WAYS:
            synchronise()
            begin = time.perf_counter()
            step(name, **arguments)
            synchronise()
            if repeat:
                times[name].append(time.perf_counter() - begin)
    return {name: (statistics.median(values), min(values), max(values)) for name, values in times.items()}


def resident_growth(args, name):
    """MB; in the child process."""
    step = setup(args, torch.device("cpu"))
    before = engine.peak_memory_gb(torch.device("cpu"))
    step(name)
    return (engine.peak_memory_gb(torch.device("cpu")) - before) * 1e9 / 2 ** 20


def report(title, times, memory):
    print(f"\n{title}\n{'':14}{'median s':>10}{'min':>9}{'max':>9}{'memory MB':>12}")
    for name, (median, low, high) in times.items():
        print(f"{name:14}{median:10.4f}{low:9.4f}{high:9.4f}{memory[name]:12.0f}")
    faster, smaller = times["materialised"][0] / times["folded"][0], memory["materialised"] / memory["folded"]
    print(f"{'ratio':14}{faster:10.1f}{'':18}{smaller:12.1f}")


def on_cpu(args):
    options = [f"--{key}={getattr(args, key)}" for key in ("head", "batch", "length", "channels", "threads")]
    memory = {name: float(subprocess.run([sys.executable, __file__, "--memory", name, *options], check=True,
                                         stdout=subprocess.PIPE, text=True).stdout) for name in WAYS}
    step = setup(args, torch.device("cpu"))
    print("largest difference of outputs %.1e, of the gradient (relative) %.1e" % difference(step))
    times = seconds(step, args.repeats)
    report(f"CPU, float32, batch {args.batch}, {torch.get_num_threads()} threads", times, memory)


def on_gpu(args):
    device = torch.device("cuda")
    torch.backends.cudnn.allow_tf32 = False                     # float32 is float32, for both
    step = setup(args, device)
    print("\n%s: largest difference of outputs %.1e, of the gradient (relative) %.1e"
          % (torch.cuda.get_device_name(), *difference(step)))
    for dtype in (torch.float32, torch.bfloat16):
        times, memory = seconds(step, args.repeats, torch.cuda.synchronize, dtype=dtype), {}
        for name in WAYS:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(name, dtype)
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2 ** 20
        report(f"GPU, {str(dtype).removeprefix('torch.')}, batch {args.batch}", times, memory)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", choices=HEADS, default="gtad")
    parser.add_argument("--batch", type=int, help="videos; default 4 on CPU, 16 on GPU")
    parser.add_argument("--length", type=int, default=100, help="L, snippets a video")
    parser.add_argument("--channels", type=int, help="C; default 512, BMN 400")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.channels = args.channels or HEADS[args.head][2]
    torch.set_num_threads(args.threads)
    if args.memory:
        print(resident_growth(args, args.memory))
        return
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    models = [line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")]
    cpu = f"{len(models)} x {models[0]}" if models else platform.processor()
    print(f"{args.head} head, C = {args.channels}, L = D = {args.length}; "
          f"python {platform.python_version()}, torch {torch.__version__}, {cpu}")
    batch = args.batch
    args.batch = batch or 4
    on_cpu(args)
    if torch.cuda.is_available():
        args.batch = batch or 16
        on_gpu(args)


if __name__ == "__main__":
    main()
