"""Run once on a GPU what this project promises of one, and measure what share of it is used.

    python -m benchmarks.gpu [--out runs/gpu]

1. Every stage of a small toy on the GPU.
2. The same by two processes that share one GPU (over gloo: NCCL wants a GPU for each), which train
   on the same global batches.
3. benchmarks.training, benchmarks.head and benchmarks.evaluation, one after the other.
Without a GPU all of it runs on the CPU, so that the program is tested: --stages leaves out 3.
"""

import argparse
import os
import subprocess
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from evaluate import load_json
from tools.make_toy import Toy, make_toy

PROGRAMS = ("training", "head", "evaluation")


def count_flops(function):
    """Return the floating point operations of products and convolutions in a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def measured_peak(device, dtype, repeats=5):
    """Return the FLOP/s of a large matrix product: what this machine reaches at its best."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the product
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[1:])


def share_of_peak(flops, seconds, device, dtype):
    """Return a line that tells the speed reached, and its share of `measured_peak`."""
    peak = measured_peak(device, dtype)
    name = str(dtype).removeprefix("torch.")
    words = f"{flops / seconds / 1e12:.3f} TFLOP/s of {peak / 1e12:.3f} of a large {name} product"
    return f"{words}: {flops / seconds / peak:.0%}"


def share_one_device(cfg):
    """Join the process group as lofi_tal.setup_distributed does, all ranks on one device."""
    import localizer

    cuda = torch.cuda.is_available() and cfg.device != "cpu"
    dist.init_process_group("gloo", timeout=timedelta(minutes=10), **localizer.fresh_group())
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    return localizer.Distributed(dist.get_rank(), dist.get_world_size(), device, cfg.precision)


def run_stages(out):
    """Run all stages by one process and by two; print their metrics."""
    toy = f"{out}/toy"
    if not os.path.exists(f"{toy}/annotations.json"):
        make_toy(toy, Toy(train=16, val=8, clips=16, stills=24, size=20, snippets=16), workers=0)
    settings = [
        f"data.annotations={toy}/annotations.json",
        f"data.frames={toy}/frames",
        f"pretrain.acp.source={toy}/clips",
        f"pretrain.icp.source={toy}/stills",
        "stages=[pretrain, lofi, features, sola, head, detect]",
        "video.size=16",
        "video.snippets=16",
        "fidelities={S: [16, 8], T: [4, 16], ST: [8, 11]}",
        "data.workers=0",
        "encoder.width=8",
        "pretrain.acp={epochs: 1, batch_size: 8}",
        "lofi={epochs: 2, batch_size: 4}",
        "sola={epochs: 1, batch_size: 4, subsequence: 6, positions: [2, 3, 4]}",
        "head.epochs=2",
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    two = [*torchrun, "--nproc_per_node=2", "-m", "benchmarks.gpu", "--rank"]
    for name, program in {"one": [sys.executable, "lofi_tal.py"], "two": two}.items():
        options = ["--cfg", "configs/toy.yaml", "--set", f"out={out}/{name}", *settings]
        subprocess.run([*program, *options], check=True)
    for name in ("one", "two"):
        metrics = load_json(f"{out}/{name}/metrics.json")
        print(f"{name}: average mAP {metrics['average_mAP']}, {metrics['seconds']:.0f} s")


def main():
    if "--rank" in sys.argv[1:2]:
        import lofi_tal

        lofi_tal.setup_distributed = share_one_device
        lofi_tal.main(sys.argv[2:])
        return
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", default="runs/gpu")
    parser.add_argument("--stages", action="store_true", help="no more than 1 and 2")
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: all on the CPU")
    run_stages(args.out)
    for name in () if args.stages else PROGRAMS:
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)


if __name__ == "__main__":
    main()
