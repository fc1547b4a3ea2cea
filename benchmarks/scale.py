"""Measure what the amount of data costs: time and memory from small to large, and how they grow.

    python -m benchmarks.scale annotations [--sizes 1000 10000 ...] [--json scale.json]
    python -m benchmarks.scale detections
    python -m benchmarks.scale videos              needs FFmpeg's command
    python -m benchmarks.scale features
    python -m benchmarks.scale rows                needs h5py
    python -m benchmarks.scale plot --json scale.json --out scale.png     needs matplotlib

annotations: an ActivityNet JSON of so many videos with one to three segments each: reading it, the
    peak memory, what the list of videos holds, and what a forked loader worker comes to hold of its
    own once it has read the segments of all videos, as in an epoch.
detections: a result of so many in 4,728 videos (ActivityNet's validation set): reading the file,
    scoring with error analysis, peak memory.
videos: `localize` on a video file of so many minutes, 5 frames a second, 64 x 48 pixels, a small
    network: with 100 snippets a video, and with windows of 100 snippets at one a second.
features: an epoch of a small head and of SoLa on so many files of 16 snippets x 32 channels: making
    the data set, loading alone, and loading and training; the cache of SoLa is off.
rows: a subsequence of 23 snippets from a video of so many, 512 channels, against reading all of it.

Everything is made in a temporary folder. Each point is a process of its own, in one thread; seconds
are CPU time, which other programs disturb less, with files in the system's cache; memory is above
that of the idle process. "grows" compares with the size before: where it is as much as
the data, cost is linear.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import config
import data
import evaluate
import localize
import sola
from benchmarks.data import repeat_video
from benchmarks.table import Row, rounded
from localizer import Distributed, Localizer, build_encoder, localization_step

CPU = torch.device("cpu")
NUM_CLASSES = 200
NUM_VIDEOS = 4728  # of ActivityNet's validation set, with segments
FPS = 5


def memory_gb(key):
    """Return VmRSS, what this process holds, or VmHWM, the most that it held, in GB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+)", status)[1]) * 1024 / 1e9


def timed(function, *args):
    """Return what a function returns, and its seconds."""
    started = time.process_time()
    result = function(*args)
    return result, time.process_time() - started


def make_entries(count, seed=0):
    """Yield (name, entry) of an ActivityNet JSON's database."""
    rng = np.random.default_rng(seed)
    durations = rng.uniform(10, 240, count).round(2)
    times = np.sort(rng.random((count, 3, 2)), 2)
    numbers = rng.integers(1, 4, count)
    for i, (duration, number) in enumerate(zip(durations.tolist(), numbers.tolist(), strict=True)):
        segments = (times[i, :number] * duration).round(3).tolist()
        label = f"class {i % NUM_CLASSES}"
        actions = [{"segment": segment, "label": label} for segment in segments]
        entry = {"subset": "validation", "duration": duration, "annotations": actions}
        yield f"v_{i:011d}", entry


def write_object(path, key, items):
    """Write {key: {name: value}} as JSON without holding it."""
    with open(path, "w") as file:
        file.write(f'{{"{key}": {{')
        for i, (name, value) in enumerate(items):
            file.write(f'{", " if i else ""}"{name}": {json.dumps(value)}')
        file.write("}}")


# ---------------------------------------------------------------------------- annotations


def private_gb():
    """Return what this process shares with no other, in GB."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"Private_Dirty:\s+(\d+)", rollup)[1]) * 1024 / 1e9


def worker_gb(videos):
    """Return what a forked process comes to hold of its own in an epoch over the videos."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        before = private_gb()
        for i in random.Random(0).sample(range(len(videos)), len(videos)):
            _ = videos[i].actions
        os.write(writer, str(private_gb() - before).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    return float(os.read(reader, 100))


def annotations_point(count, folder):
    path = f"{folder}/annotations.json"
    write_object(path, "database", make_entries(count))
    before = memory_gb("VmRSS")
    subsets, seconds = timed(data.load_annotations, path)
    figures = {"file MB": os.path.getsize(path) / 1e6, "load s": seconds}
    figures["peak GB"] = memory_gb("VmHWM") - before
    figures["held GB"] = memory_gb("VmRSS") - before
    figures["a worker GB"] = worker_gb(subsets["validation"])
    classes = timed(data.class_names, subsets["validation"])
    figures["classes s"] = classes[1]
    figures["fingerprint s"] = timed(data.fingerprint, subsets["validation"])[1]
    return figures


# ----------------------------------------------------------------------------- detections


def make_detections(entries, count, seed=0):
    """Yield (video, detections): two thirds around its segments, the others anywhere."""
    rng = np.random.default_rng(seed)
    for k, (video, entry) in enumerate(entries):
        own = count * (k + 1) // len(entries) - count * k // len(entries)
        actions = entry["annotations"]
        near = np.array([a["segment"] for a in actions])[rng.integers(0, len(actions), own)]
        near += rng.normal(0, 0.25, (own, 2)) * (near[:, 1:] - near[:, :1])
        free = rng.random((own, 1)) < 1 / 3
        segments = np.where(free, rng.random((own, 2)) * entry["duration"], near)
        segments = np.sort(segments.clip(0, entry["duration"]), 1).tolist()
        labels = rng.integers(0, NUM_CLASSES, own).tolist()
        scores = rng.random(own).tolist()
        found = []
        for i, x in enumerate(scores):
            label = f"class {labels[i]}" if free[i, 0] else actions[0]["label"]
            found.append({"label": label, "score": x, "segment": segments[i]})
        yield video, found


def detections_point(count, folder):
    entries = [*make_entries(NUM_VIDEOS)]
    path = f"{folder}/result.json"
    write_object(path, "results", make_detections(entries, count))
    truth = {"database": dict(entries)}
    before = memory_gb("VmRSS")
    results, reading = timed(evaluate.load_json, path)
    size = os.path.getsize(path) / 1e6
    figures = {"file MB": size, "read s": reading}
    figures["score s"] = timed(evaluate.evaluate, truth, results)[1]
    figures["peak GB"] = memory_gb("VmHWM") - before
    figures["us a detection"] = 1e6 * (reading + figures["score s"]) / count
    return figures


# --------------------------------------------------------------------------------- videos


def make_video(path, minutes):
    """Make a video by repeating a minute of a test picture."""
    minute = f"{path}.mkv"
    picture = f"testsrc2=size=64x48:rate={FPS}:duration={min(60, 60 * minutes)}"
    encode = ["-f", "lavfi", "-i", picture, "-c:v", "mpeg4", "-g", "50", "-pix_fmt", "yuv420p"]
    subprocess.run(["ffmpeg", "-v", "error", "-y", *encode, minute], check=True)
    repeat_video(minute, 60 * minutes, path)


def small_model(rate):
    """Return a localize.Model of random weights; rate: snippets a second, or None."""
    head = "{hidden: 16, gcn_width: 16, gcn_groups: 4, stem_groups: 4, inner_bins: 4, "
    head += "context_bins: 2, map_hidden: [16, 16]}"
    changes = [f"gtad={head}", "encoder={width: 8, maxpool: false}"]
    changes.append(
        f"video={{snippets: 100, frames_per_snippet: 4, size: 32, rate: {rate or 'null'}}}"
    )
    changes.append(f"data.windows={'true' if rate else 'false'}")
    path = os.path.join(config.HERE, "configs/toy.yaml")
    cfg = config.from_command_line("", ["--cfg", path, "--set", *changes])
    torch.manual_seed(0)
    encoder = build_encoder(**cfg.encoder).eval().requires_grad_(False)
    localizer = Localizer(**config.head_options(cfg, encoder.channels), classes=["a", "b"])
    localizer.eval().requires_grad_(False)
    return localize.Model(cfg, encoder, None, localizer, CPU, 25)


def videos_point(minutes, folder):
    short, path = f"{folder}/short.mp4", f"{folder}/video.mp4"
    make_video(short, 0.1)
    make_video(path, minutes)
    figures = {"file MB": os.path.getsize(path) / 1e6}
    for name, rate in {"100 snippets": None, "windows": 1}.items():
        model = small_model(rate)
        localize.localize(model, short)  # the libraries' own memory
        before = memory_gb("VmRSS")
        figures[f"{name} s"] = timed(localize.localize, model, path)[1]
        figures[f"{name} GB"] = memory_gb("VmHWM") - before
    return figures


# ------------------------------------------------------------------------------- features


def epoch(dataset, fidelity, batch_size, step=None):
    """Return the seconds of an epoch of loading, in this process, and of step(batch)."""
    sampler = data.CyclicFidelitySampler(len(dataset), batch_size, [fidelity])
    started = time.process_time()
    for batch in data.BatchLoader(dataset, sampler, 0, CPU):
        if step:
            step(batch)
    return time.process_time() - started


def training_step(model, backward):
    """Return step(batch): a step of training with Adam."""
    optimizer = torch.optim.Adam(model.parameters())

    def step(batch):
        optimizer.zero_grad(set_to_none=True)
        backward(model, batch, generator=torch.Generator().manual_seed(0))
        optimizer.step()

    return step


def features_point(count, folder):
    L, C = 16, 32
    source = f"{folder}/features"
    os.mkdir(source)
    x = np.random.default_rng(0).normal(size=(100, L, C)).astype(np.float32)
    for i in range(count):
        np.save(f"{source}/v_{i:011d}.npy", x[i % 100])
    subsets = data._parse_database({"database": dict(make_entries(count))})
    before = memory_gb("VmRSS")
    videos, seconds = timed(data.select_videos, subsets, "validation", source, "features")
    figures = {"select s": seconds}
    classes = data.class_names(videos)
    dataset, figures["data set s"] = timed(data.FeatureDataset, videos, source, classes)
    figures["statistics s"] = timed(dataset.statistics)[1]
    full = data.Fidelity("full", L, 32)
    ddp = Distributed(0, 1, CPU)
    sizes = {"hidden": 16, "gcn_width": 16, "gcn_groups": 4, "inner_bins": 2, "context_bins": 1}
    head = Localizer("gtad", {**sizes, "map_hidden": [8, 8]}, C, classes)
    weights = {"node": 1.0, "regression": 10.0, "classification": 1.0}
    backward = partial(localization_step, loss=weights, options={"class_weight": 1.0}, ddp=ddp)
    figures["head: loading s"] = epoch(dataset, full, 64)
    figures["head: epoch s"] = epoch(dataset, full, 64, training_step(head, backward))
    make = partial(data.SubsequenceDataset, dataset, 8, cache_gb=0)
    subsequences, figures["SoLa: data set s"] = timed(make)
    module = sola.SimilarityMatching(sola.SoLa(C, 32), sola.Predictor(C, 32), [1, 3, 5])
    backward = partial(sola.similarity_step, autocast=ddp.autocast)
    step = training_step(module, backward)
    figures["SoLa: loading s"] = epoch(subsequences, data.NATIVE, 256)
    figures["SoLa: epoch s"] = epoch(subsequences, data.NATIVE, 256, step)
    figures["peak GB"] = memory_gb("VmHWM") - before
    return figures


def rows_point(count, folder):
    import h5py

    x = np.random.default_rng(0).normal(size=(count, 512)).astype(np.float32)
    np.save(f"{folder}/v.npy", x)
    with h5py.File(f"{folder}/v.h5", "w") as file:
        file["v"] = x
    video = data.Video("v", 1.0, np.zeros((0, 2)), ())
    figures = {"file MB": x.nbytes / 1e6}
    for name, source in {".npy": folder, "HDF5": f"{folder}/v.h5"}.items():
        features = data.FeatureDataset([video], source)
        part = data.SubsequenceDataset(features, 23, cache_gb=0)
        rows, whole = [], []
        for _ in range(5):
            rows.append(timed(part.__getitem__, (0, data.NATIVE))[1])
            whole.append(timed(features.features, 0)[1])
        rows, whole = statistics.median(rows), statistics.median(whole)
        figures |= {f"{name}: rows ms": 1e3 * rows, f"{name}: all ms": 1e3 * whole}
        figures[f"{name}: all / rows"] = whole / rows
    return figures


# ------------------------------------------------------------------------------- programs

POINTS = {  # of each kind: the function, its sizes, those of `python -m benchmarks`, what they are
    "annotations": (annotations_point, [1000, 10_000, 100_000, 1_000_000], 100_000, "videos"),
    "detections": (detections_point, [10_000, 100_000, 1_000_000, 10_000_000], 1_000_000, ""),
    "videos": (videos_point, [1, 10, 60, 600], 60, "minutes"),
    "features": (features_point, [1000, 10_000, 100_000], 10_000, "videos"),
    "rows": (rows_point, [100, 1000, 10_000, 100_000], 10_000, "snippets"),
}


def measure(kind, size, alone=True):
    """Return the figures of a point, measured in a process of its own, or in this one."""
    with tempfile.TemporaryDirectory() as folder:
        if not alone:
            return POINTS[kind][0](size, folder)
        command = [sys.executable, "-m", "benchmarks.scale", kind, "--point", str(size)]
        text = subprocess.check_output([*command, "--out", folder], text=True, cwd=config.HERE)
        return json.loads(text.splitlines()[-1])


def table(kind, points):
    """Return Markdown of {size: figures}: each with how it grows."""
    names = [*next(iter(points.values()))]
    header = [POINTS[kind][3] or kind]
    for name in names:
        header += [name, "grows"] if name[-2:] in (" s", "GB") else [name]
    rows = []
    previous = None
    for size, figures in points.items():
        row = [f"{int(size):,}"]
        for name in names:
            row.append(f"{figures[name]:.3g}" if figures[name] < 1000 else f"{figures[name]:.0f}")
            if name[-2:] in (" s", "GB"):
                known = previous and previous[name] > 5e-3
                row.append(f"{figures[name] / previous[name]:.1f} x" if known else "")
        rows.append(row)
        previous = figures
    return evaluate.markdown_table(header, rows)


def rows(quick=False):
    """Return rows of the benchmarks' table: how cost grows with tenfold data."""
    found = []
    for kind, (_, sizes, large, unit) in POINTS.items():
        large = {"videos": 1, "rows": 1000, "features": 64}.get(kind, sizes[0]) if quick else large
        small = large // 10 if large >= 10 else 0.5
        before, after = (measure(kind, size, alone=not quick) for size in (small, large))
        for name in after:
            if name[-2:] != " s" and name[-4:] != "rows":
                continue
            what = f"{kind}: {name.removesuffix(' s')}, {large:,} {unit}".strip()
            if name[-4:] == "rows":
                against = "rows alone, as SoLa reads them"
                found.append(Row(what, against, f"{after[name]:.0f} x the time"))
            elif before[name] > 0:
                ratio = f"{after[name] / before[name]:.1f} x the time"
                seconds = f"{rounded(after[name])}, {rounded(before[name])}"
                found.append(Row(what, f"{small:,} {unit}".strip(), ratio, seconds))
    return found


SHOWN = {  # of each kind what the picture has: seconds, GB
    "annotations": (["load s"], ["peak GB", "a worker GB"]),
    "detections": (["read s", "score s"], ["peak GB"]),
    "videos": (["100 snippets s", "windows s"], ["100 snippets GB", "windows GB"]),
    "features": (["head: epoch s", "SoLa: epoch s", "SoLa: loading s"], ["peak GB"]),
}


STYLES = "o-", "s:"


def plot(measured, path):
    """Draw seconds and GB against size, both logarithmic, with a line that is linear."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(SHOWN), figsize=(13, 3.4), layout="constrained")
    for axis, (kind, names) in zip(axes, SHOWN.items(), strict=True):
        points = {int(size): figures for size, figures in measured[kind].items()}
        lines = [
            (name, style) for style, group in zip(STYLES, names, strict=True) for name in group
        ]
        for name, style in lines:
            values = [max(figures[name], 1e-2) for figures in points.values()]
            axis.loglog([*points], values, style, label=name)
        sizes = np.array([*points])
        last = points[max(points)][names[0][-1]]
        axis.loglog(sizes, last * sizes / sizes[-1], "-", color="0.8", label="linear")
        axis.set_xlabel(f"{kind}, {POINTS[kind][3]}".removesuffix(", "))
        axis.legend(fontsize=7)
    axes[0].set_ylabel("seconds, GB")
    figure.savefig(path, dpi=80)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=[*POINTS, "plot"])
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--json", default="scale.json", help="the figures, added to what it has")
    parser.add_argument("--out", default="scale.png", help="the picture")
    parser.add_argument("--point", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.point:
        print(json.dumps(POINTS[args.what][0](args.point, args.out)))
        return
    if args.what == "plot":
        plot(load(args.json), args.out)
        return
    for size in args.sizes or POINTS[args.what][1]:
        figures = measure(args.what, size)
        measured = load(args.json)
        points = measured.setdefault(args.what, {})
        points[str(size)] = figures
        measured[args.what] = dict(sorted(points.items(), key=lambda item: int(item[0])))
        Path(args.json).write_text(json.dumps(measured, indent=1))
        print(table(args.what, measured[args.what]), flush=True)


def load(path):
    """Return the figures of earlier starts, {kind: {size: figures}}."""
    return json.loads(Path(path).read_text()) if os.path.exists(path) else {}


if __name__ == "__main__":
    main()
