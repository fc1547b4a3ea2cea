"""Time mAP and soft-NMS against plain loops that take the public code's steps, and compare results.

    python -m benchmarks.evaluation [--annotations activitynet.json] [--predictions 1000000]
                                    [--full] [--json OUT.json]

mAP: predictions around the validation segments of ActivityNet's annotations, if given, else around
as many made up ones. The public design keeps them in
pandas frames and walks them row by row, which takes minutes for a million: without --full it scores
a few whole classes, and its rate is what is compared. It needs pandas (no dependency of the
project); the same loop over numpy arrays is timed too.
Soft-NMS: the public loop over Python lists, one video after the other, here with the last candidate
kept. On a GPU, too, where there is one.
All in one thread, wall clock; ours is the best of --repeats, the loops run once.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import evaluate as ev
from benchmarks.scale import NUM_VIDEOS, make_entries, write_object
from benchmarks.table import Row, rounded


def timed(function, repeats=1):
    """Return what the function returns, and its best time in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        out = function()
        times.append(time.perf_counter() - start)
    return out, min(times)


# ----------------------------------------------------------------------------- the public designs


def average_precision(hits, positives):
    """Return the area under the interpolated curve, walked point by point."""
    hits = np.asarray(hits, dtype=float)
    precision = np.concatenate([[0], np.cumsum(hits) / np.arange(1, len(hits) + 1), [0]])
    recall = np.concatenate([[0], np.cumsum(hits) / positives, [1]])
    for i in range(len(precision) - 1)[::-1]:
        precision[i] = max(precision[i], precision[i + 1])
    steps = np.flatnonzero(recall[1:] != recall[:-1]) + 1
    return ((recall[steps] - recall[steps - 1]) * precision[steps]).sum()


def overlaps(start, end, starts, ends):
    """Return the tIoU of one segment with several."""
    inter = (np.minimum(end, ends) - np.maximum(start, starts)).clip(0)
    with np.errstate(invalid="ignore"):
        return inter / ((ends - starts) + (end - start) - inter)


def take(overlap, index, taken, thresholds):
    """Return hit or not of one prediction at every threshold; mark the ground truth it takes."""
    order = overlap.argsort()[::-1]
    hit = np.zeros(len(thresholds))
    for t, threshold in enumerate(thresholds):
        for j in order:
            if overlap[j] < threshold:
                break
            if not taken[t, index[j]]:
                taken[t, index[j]] = 1
                hit[t] = 1
                break
    return hit


def pandas_map(truth, results, thresholds, labels):
    """Return AP over frames walked row by row: {class: mean over the thresholds}."""
    import pandas as pd

    columns = ["video", "label", "start", "end", "score"]
    rows = []
    for video, entries in results.items():
        for entry in entries:
            rows.append((video, entry["label"], *map(float, entry["segment"]), entry["score"]))
    truth_by_label = pd.DataFrame(truth, columns=columns[:4]).groupby("label")
    by_label = pd.DataFrame(rows, columns=columns).groupby("label")
    ap = {}
    for label in labels:
        gt = truth_by_label.get_group(label).reset_index(drop=True)
        mine = by_label.get_group(label).reset_index(drop=True)
        mine = mine.loc[mine["score"].to_numpy().argsort()[::-1]].reset_index(drop=True)
        by_video = gt.groupby("video")
        taken = np.zeros((len(thresholds), len(gt)))
        hits = np.zeros((len(thresholds), len(mine)))
        for i, row in mine.iterrows():
            try:
                here = by_video.get_group(row["video"]).reset_index()
            except KeyError:
                continue
            segments = (here["start"].to_numpy(), here["end"].to_numpy())
            overlap = overlaps(row["start"], row["end"], *segments)
            hits[:, i] = take(overlap, here["index"].to_numpy(), taken, thresholds)
        ap[label] = np.mean([average_precision(h, len(gt)) for h in hits])
    return ap


def numpy_map(truth, results, thresholds, labels):
    """Return what pandas_map does, by the same loop without frames."""
    gt = {label: {} for label in labels}
    for video, label, start, end in truth:
        if label in gt:
            gt[label].setdefault(video, []).append((start, end))
    rows = {label: [] for label in labels}
    for video, entries in results.items():
        for entry in entries:
            rows[entry["label"]].append((video, *entry["segment"], entry["score"]))
    ap = {}
    for label in labels:
        here = {}
        n = 0
        for video, segments in gt[label].items():
            here[video] = (np.arange(n, n + len(segments)), *np.array(segments).T)
            n += len(segments)
        taken = np.zeros((len(thresholds), n))
        hits = np.zeros((len(thresholds), len(rows[label])))
        for i, k in enumerate(np.array([row[3] for row in rows[label]]).argsort()[::-1]):
            video, start, end, _ = rows[label][k]
            if video in here:
                index, starts, ends = here[video]
                overlap = overlaps(start, end, starts, ends)
                hits[:, i] = take(overlap, index, taken, thresholds)
        ap[label] = np.mean([average_precision(h, n) for h in hits])
    return ap


def pair_tiou(s1, e1, s2, e2):
    """Return the tIoU of two segments."""
    if s2 > e1 or s1 > e2:
        return 0
    return (min(e1, e2) - max(s1, s2)) / (max(e1, e2) - min(s1, s2))


def list_soft_nms(segments, scores, sigma, top_k):
    """Return (start, end, score) of one video: the highest score leaves, all others decay."""
    segments = list(segments)
    scores = list(scores)
    out = []
    while scores and len(out) < top_k:
        best = int(np.argmax(scores))
        for i in range(len(scores)):
            if i != best:
                overlap = pair_tiou(*segments[best], *segments[i])
                if overlap > 0:
                    scores[i] = scores[i] * np.exp(-np.square(overlap) / sigma)
        out.append((*segments.pop(best), scores.pop(best)))
    return out


# -------------------------------------------------------------------------------------------- mAP


def make_results(database, subset, number, seed=0):
    """Return predictions: two thirds around the video's segments, one third anywhere, any label."""
    rng = np.random.default_rng(seed)
    chosen = {}
    for video, info in database.items():
        if info["subset"] == subset and info["annotations"]:
            chosen[video] = info
    labels = sorted({a["label"] for info in chosen.values() for a in info["annotations"]})
    results = {}
    remaining = number
    for n, (video, info) in enumerate(chosen.items()):
        k = remaining // (len(chosen) - n)
        remaining -= k
        picks = rng.integers(0, len(info["annotations"]), k)
        around = [info["annotations"][i] for i in picks]
        segment = np.array([a["segment"] for a in around], dtype=np.float64).reshape(k, 2)
        segment += rng.normal(0, 0.25, (k, 2)) * (segment[:, 1:] - segment[:, :1])
        free = rng.random(k) < 1 / 3
        segment[free] = rng.random((free.sum(), 2)) * info["duration"]
        segment = np.sort(segment.clip(0, info["duration"]), 1).tolist()
        any_label = rng.integers(0, len(labels), k)
        scores = rng.random(k).round(4).tolist()
        results[video] = []
        for i in range(k):
            label = labels[any_label[i]] if free[i] else around[i]["label"]
            detection = {"label": label, "score": scores[i], "segment": segment[i]}
            results[video].append(detection)
    return results


def peak_memory(gt, pred, subset):
    """Return the GiB of a fresh process that scores the file."""
    command = [sys.executable, ev.__file__, "--gt", gt, "--pred", pred, "--subset", subset]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError("scoring the file in a process of its own failed")
    return usage.ru_maxrss / 2**20


def time_ours(data, results, args):
    """Return our metrics, seconds by what they cover, seconds of loading the file, GiB."""
    subset = args.subset
    seconds = {}
    truth = ev._read_ground_truth(data, "ground truth", subset, [])
    loaded = {"results": results}
    predicted = ev._read_predictions(loaded, "result", truth, subset, False, [])
    match = timed(
        lambda: ev._match_predictions(truth, predicted, ev.ACTIVITYNET_TIOU, True), args.repeats
    )
    seconds["arrays only (no parsing)"] = match[1]
    metrics, seconds["from loaded dictionaries"] = timed(
        lambda: ev.evaluate(data, loaded, subset=subset, analysis=False), args.repeats
    )
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "result.json")
        ev.save_results(results, file, class_source="benchmark")
        memory = 0.0 if args.quick else peak_memory(args.annotations, file, subset)
        _, loading = timed(lambda: json.loads(Path(file).read_text()), args.repeats)
        _, seconds["from the JSON file"] = timed(
            lambda: ev.evaluate(data, file, subset=subset, analysis=False), args.repeats
        )
        _, seconds["from the file, with error analysis"] = timed(
            lambda: ev.evaluate(data, file, subset=subset), args.repeats
        )
    return metrics, seconds, loading, memory


def bench_map(args):
    """Time mAP, print a table and return the figures."""
    data = json.loads(Path(args.annotations).read_text())
    results = make_results(data["database"], args.subset, args.predictions, args.seed)
    metrics, seconds, loading, memory = time_ours(data, results, args)
    num = metrics["predictions"]
    rows = {f"ours, {what}": {"predictions": num, "seconds": s} for what, s in seconds.items()}
    truth = []
    for video, info in data["database"].items():
        if info["subset"] == args.subset:
            for a in info["annotations"]:
                truth.append((video, a["label"], *map(float, a["segment"])))
    labels = list(metrics["AP"])
    if not args.full:
        labels = labels[:: max(1, len(labels) // args.classes)][: args.classes]
    some = {}
    for video, entries in results.items():
        some[video] = [entry for entry in entries if entry["label"] in labels]
    some_num = sum(map(len, some.values()))
    loops = {"pandas (the public design)": pandas_map, "numpy": numpy_map}
    for name, loop in loops.items():
        try:
            ap, s = timed(lambda loop=loop: loop(truth, some, ev.ACTIVITYNET_TIOU, labels))
        except ImportError:
            print("pandas is not installed: the public design's loop is left out")
            continue
        difference = max(abs(ap[label] - metrics["AP"][label]) for label in labels)
        if not difference < 1e-9:
            raise RuntimeError(f"plain loop, {name}: AP differs by {difference}")
        for what, cost in (
            ("loaded dictionaries", s),
            ("the JSON file", s + loading * some_num / num),
        ):
            key = f"plain loop, {name}, from {what}"
            rows[key] = {"predictions": some_num, "seconds": cost}
        print(f"{name}: {len(labels)} classes, largest difference of AP {difference:.1e}")
    print_map(rows)
    print(
        f"average mAP {metrics['average_mAP']:.4f}; peak memory of `python evaluate.py` on the "
        f"file: {memory:.2f} GiB\n"
    )
    return {"rows": rows, "peak_gib": memory}


def print_map(rows):
    """Print predictions, seconds and rates; of the loops how much faster ours is."""
    lines = []
    for name, row in rows.items():
        rate = row["predictions"] / row["seconds"]
        faster = ""
        if not name.startswith("ours"):
            ours = rows["ours, " + name.rpartition(", ")[2]]
            faster = f"{ours['predictions'] / ours['seconds'] / rate:.0f} x"
        lines.append([name, row["predictions"], f"{row['seconds']:.2f}", f"{rate:,.0f}", faster])
    header = [
        "mAP, 10 thresholds",
        "predictions",
        "seconds",
        "predictions / s",
        "ours is faster by",
    ]
    print(ev.markdown_table(header, lines))


# --------------------------------------------------------------------------------------- soft-NMS


def bench_soft_nms(args):
    """Time soft-NMS, print a table and return the figures."""
    B = args.videos
    snippets = 100
    g = torch.Generator().manual_seed(args.seed)
    # All segments between snippet boundaries.
    pairs = torch.combinations(torch.arange(snippets + 1)) / snippets
    picks = [torch.randperm(len(pairs), generator=g)[: args.proposals] for _ in range(B)]
    segments = torch.stack([pairs[pick] for pick in picks]).double()
    # Start x end x both maps.
    scores = torch.rand(B, segments.shape[1], 4, generator=g, dtype=torch.float64).prod(-1)
    seconds = {}
    for dtype in (torch.float32, torch.float64):
        s = segments.to(dtype)
        p = scores.to(dtype)
        ev.soft_nms(s[:4], p[:4])
        kept, seconds[f"ours, {str(dtype)[6:]}"] = timed(
            lambda s=s, p=p: ev.soft_nms(s, p), args.repeats
        )
        if torch.cuda.is_available():
            on_gpu = s.cuda(), p.cuda()
            ev.soft_nms(*on_gpu)[1].cpu()
            _, seconds[f"ours, {str(dtype)[6:]}, {torch.cuda.get_device_name()}"] = timed(
                lambda on_gpu=on_gpu: ev.soft_nms(*on_gpu)[1].cpu(), args.repeats
            )
    plain, seconds["plain loop, lists"] = timed(
        lambda: [
            list_soft_nms(segments[b].tolist(), scores[b].tolist(), 0.84, 100) for b in range(B)
        ]
    )
    ours = torch.cat([kept[0], kept[1][..., None]], -1)
    difference = (torch.tensor(plain, dtype=torch.float64) - ours).abs().max().item()
    if not difference < 1e-12:
        raise RuntimeError(f"soft-NMS differs by {difference}")
    lines = []
    for name, s in seconds.items():
        faster = seconds["plain loop, lists"] / s
        lines.append([name, f"{s:.3f}", f"{1e3 * s / B:.2f}", f"{faster:.0f} x"])
    title = f"soft-NMS, {B} x {segments.shape[1]}, top 100"
    print(ev.markdown_table([title, "seconds", "ms / video", "faster by"], lines))
    print(f"largest difference of segments and scores (float64): {difference:.1e}")
    return {"seconds": seconds}


def bench(args, folder):
    """Return the figures of both; annotations are made in a folder if there are none."""
    if not args.annotations:
        args.annotations = f"{folder}/annotations.json"
        write_object(args.annotations, "database", make_entries(args.gt_videos))
    return {"map": bench_map(args), "soft_nms": bench_soft_nms(args)}


def rows(quick=False):
    """Return rows of the benchmarks' table."""
    sizes = ["--predictions=3000", "--gt-videos=50", "--videos=2", "--proposals=200"]
    sizes = [*sizes, "--repeats=1", "--quick"] if quick else ["--videos=64"]
    with tempfile.TemporaryDirectory() as folder:
        args = parse_arguments(sizes)
        figures = bench(args, folder)
    found = []
    timed_rows = figures["map"]["rows"]
    what = f"mAP of {args.predictions:,} detections"
    for name, row in timed_rows.items():
        if name.startswith("plain"):
            ours = timed_rows["ours, " + name.rpartition(", ")[2]]
            scaled = row["seconds"] / row["predictions"] * ours["predictions"]
            both = f"{rounded(ours['seconds'])}, {rounded(scaled)}"
            both += "" if row["predictions"] == ours["predictions"] else " (by its rate)"
            _, loop, source = name.split(", ")
            ratio = f"{scaled / ours['seconds']:.0f} x faster"
            found.append(Row(f"{what}, {source}", f"a plain loop, {loop}", ratio, both))
    if not any("pandas" in name for name in timed_rows):
        found.append(Row(what, "a plain loop, pandas", "not measured: pandas is not installed"))
    seconds = figures["soft_nms"]["seconds"]
    *ours, plain = seconds.items()
    for name, own in ours:
        what = (
            f"soft-NMS, {args.videos} videos x {args.proposals:,} proposals, {name.split(', ')[1]}"
        )
        both = f"{rounded(own)}, {rounded(plain[1])}"
        found.append(Row(what, "a plain loop, lists", f"{plain[1] / own:.0f} x faster", both))
    return found


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--annotations", help="ActivityNet's; default: made up ones")
    videos = "videos of the made up annotations"
    parser.add_argument("--gt-videos", type=int, default=NUM_VIDEOS, help=videos)
    parser.add_argument("--subset", default="validation")
    parser.add_argument("--predictions", type=int, default=1_000_000)
    classes = "classes that the plain loops score without --full"
    parser.add_argument("--classes", type=int, default=4, help=classes)
    full = "the plain loops score everything (minutes)"
    parser.add_argument("--full", action="store_true", help=full)
    parser.add_argument("--videos", type=int, default=256)
    parser.add_argument("--proposals", type=int, default=2500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the figures")
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main():
    """Run the command line."""
    args = parse_arguments()
    torch.set_num_threads(1)
    machine = platform.processor() or platform.machine()
    versions = f"Python {platform.python_version()}, numpy {np.__version__}"
    print(f"{machine}, 1 thread, {versions}, torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory() as folder:
        figures = bench(args, folder)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
