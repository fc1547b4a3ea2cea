"""Run all benchmarks on this machine and write benchmarks/README.md from what they found.

    python -m benchmarks [--only head scale ...] [--quick] [--out FOLDER]

FOLDER (default: benchmarks) gets figures.json, {machine: {"date", "versions", "rows"}}, to which
another machine adds, and README.md, made of it alone: a table for each machine, the latest first.
One thread, about 20 minutes on two cores; let the machine do nothing else meanwhile. --quick:
tiny sizes, to see that all of it runs; its ratios mean nothing.
"""

import argparse
import datetime
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torchcodec
import torchvision

from benchmarks.table import Row
from checkpoint import machine_name, write_atomic

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAMS = ("head", "training", "evaluation", "data", "disk", "sola", "scale")

INTRODUCTION = """# Benchmarks

`python -m benchmarks` measures all of this on one machine, in one thread, and writes this page: a
table for each machine. Each program measures both sides in one run; seconds are of a machine that
may do other things, too: believe the ratios. Each runs alone as well, without any data, and tells
its options with `--help`:

```bash
python -m benchmarks.head                 # and with --head bmn
python -m benchmarks.training
python -m benchmarks.evaluation
python -m benchmarks.data                 # needs FFmpeg's command
python -m benchmarks.disk parts           # and settings
python -m benchmarks.sola cost
python -m benchmarks.scale annotations    # and with detections, videos, features, rows
```

On a GPU `head` and `training` take the paper's sizes and bfloat16 by themselves. What the papers'
claims come to, with seconds, memory and parameters of every row, is in
[reproduce/README.md](../reproduce/README.md), how cost grows with the amount of data in
[docs/memory_and_speed.md](../docs/memory_and_speed.md#scale).
"""


def measure(name, quick):
    """Return the rows of a program, from a process of its own unless quick."""
    if quick:
        return [*importlib.import_module(f"benchmarks.{name}").rows(quick=True)]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/rows.json"
        command = [sys.executable, "-m", "benchmarks", "--program", name, "--out", path]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, cwd=os.path.dirname(HERE))
        if done.returncode:
            return [Row("all of it", "", "not measured: the program failed")]
        return [Row(*row) for row in json.loads(Path(path).read_text())]


def versions():
    """Return what ran, as text."""
    libraries = (torch, torchvision, torchcodec, np)
    named = [f"{library.__name__} {library.__version__}" for library in libraries]
    return ", ".join([f"Python {platform.python_version()}", *named])


def page(figures):
    """Return README.md of {machine: {"date", "versions", "rows": {program: [Row]}}}."""
    text = [INTRODUCTION]
    for machine, found in sorted(figures.items(), key=lambda item: item[1]["date"], reverse=True):
        text.append(f"## {machine}\n\n{found['date']}; {found['versions']}.\n")
        text.append("| program | what | against | result | seconds: ours, theirs |")
        text.append("|---|---|---|---|---|")
        for program, rows in found["rows"].items():
            text += [f"| `{program}` | {' | '.join(row)} |" for row in rows]
        text.append("")
    return "\n".join(text)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", default=HERE, metavar="FOLDER")
    parser.add_argument("--program", choices=PROGRAMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.program:
        rows = importlib.import_module(f"benchmarks.{args.program}").rows()
        Path(args.out).write_text(json.dumps(rows))
        return
    path = f"{args.out}/figures.json"
    figures = json.loads(Path(path).read_text()) if os.path.exists(path) else {}
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    machine = " and ".join(machine_name(torch.device(device)) for device in devices)
    here = figures.setdefault(machine, {"rows": {}})
    here |= {"date": f"{datetime.date.today():%Y-%m-%d}", "versions": versions()}
    for name in args.only:
        print(f"\n{name}\n", flush=True)
        here["rows"][name] = measure(name, args.quick)
        text = f"{json.dumps(figures, indent=1)}\n".encode()
        write_atomic(path, lambda file, text=text: file.write(text))
        write_atomic(f"{args.out}/README.md", lambda file: file.write(page(figures).encode()))


if __name__ == "__main__":
    main()
