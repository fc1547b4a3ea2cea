"""mAP and soft-NMS against plain loops that take the public code's steps: side by side, same data, results compared.

    python benchmarks/evaluation.py --annotations activitynet.json [--predictions 1000000] [--full] [--json OUT.json]

mAP: predictions around ActivityNet's real validation segments. The public design keeps them in pandas frames and walks
them row by row, which takes minutes for a million: without --full it scores a few whole classes, and its rate is what
is compared. It needs pandas (no dependency of the project); the same loop over numpy arrays is timed too.
Soft-NMS: the public loop over Python lists, one video after the other, here with the last candidate kept.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate as ev  # noqa: E402


def timed(function, repeats=1):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        out = function()
        times.append(time.perf_counter() - start)
    return out, min(times)


# ------------------------------------------------------------------------------------------- the public designs

def average_precision(hits, positives):
    """Area under the interpolated curve, walked point by point."""
    hits = np.asarray(hits, dtype=float)
    precision = np.concatenate([[0], np.cumsum(hits) / np.arange(1, len(hits) + 1), [0]])
    recall = np.concatenate([[0], np.cumsum(hits) / positives, [1]])
    for i in range(len(precision) - 1)[::-1]:
        precision[i] = max(precision[i], precision[i + 1])
    steps = np.flatnonzero(recall[1:] != recall[:-1]) + 1
    return ((recall[steps] - recall[steps - 1]) * precision[steps]).sum()


def overlaps(start, end, starts, ends):
    inter = (np.minimum(end, ends) - np.maximum(start, starts)).clip(0)
    with np.errstate(invalid="ignore"):
        return inter / ((ends - starts) + (end - start) - inter)


def take(overlap, index, taken, thresholds):
    """One prediction at every threshold: hit or not; marks the ground truth it takes."""
    order, hit = overlap.argsort()[::-1], np.zeros(len(thresholds))
    for t, threshold in enumerate(thresholds):
        for j in order:
            if overlap[j] < threshold:
                break
            if not taken[t, index[j]]:
                taken[t, index[j]] = hit[t] = 1
                break
    return hit


def pandas_map(truth, results, thresholds, labels):
    """AP averaged over the thresholds, by class, from frames walked row by row. Also the number of predictions."""
    import pandas as pd

    truth = pd.DataFrame(truth, columns=["video", "label", "start", "end"])
    rows = {"video": [], "label": [], "start": [], "end": [], "score": []}
    for video, entries in results.items():
        for e in entries:
            rows["video"].append(video)
            rows["label"].append(e["label"])
            rows["start"].append(float(e["segment"][0]))
            rows["end"].append(float(e["segment"][1]))
            rows["score"].append(e["score"])
    frame, ap = pd.DataFrame(rows), {}
    truth_by_label, by_label = truth.groupby("label"), frame.groupby("label")
    for label in labels:
        gt, mine = (groups.get_group(label).reset_index(drop=True) for groups in (truth_by_label, by_label))
        mine = mine.loc[mine["score"].to_numpy().argsort()[::-1]].reset_index(drop=True)
        by_video, taken = gt.groupby("video"), np.zeros((len(thresholds), len(gt)))
        hits = np.zeros((len(thresholds), len(mine)))
        for i, row in mine.iterrows():
            try:
                here = by_video.get_group(row["video"])
            except KeyError:
                continue
            here = here.reset_index()
            overlap = overlaps(row["start"], row["end"], here["start"].to_numpy(), here["end"].to_numpy())
            hits[:, i] = take(overlap, here["index"].to_numpy(), taken, thresholds)
        ap[label] = np.mean([average_precision(h, len(gt)) for h in hits])
    return ap, len(frame)


def numpy_map(truth, results, thresholds, labels):
    """The same loop without frames."""
    gt, rows = {label: {} for label in labels}, {label: [] for label in labels}
    for video, label, start, end in truth:
        if label in labels:
            gt[label].setdefault(video, []).append((start, end))
    for video, entries in results.items():
        for e in entries:
            rows[e["label"]].append((video, *e["segment"], e["score"]))
    ap = {}
    for label in labels:
        here, n = {}, 0
        for video, segments in gt[label].items():
            here[video] = np.arange(n, n + len(segments)), *np.array(segments).T
            n += len(segments)
        taken, hits = np.zeros((len(thresholds), n)), np.zeros((len(thresholds), len(rows[label])))
        for i, k in enumerate(np.array([row[3] for row in rows[label]]).argsort()[::-1]):
            video, start, end, _ = rows[label][k]
            if video in here:
                index, starts, ends = here[video]
                hits[:, i] = take(overlaps(start, end, starts, ends), index, taken, thresholds)
        ap[label] = np.mean([average_precision(h, n) for h in hits])
    return ap, sum(map(len, rows.values()))


def pair_tiou(s1, e1, s2, e2):
    if s2 > e1 or s1 > e2:
        return 0
    return (min(e1, e2) - max(s1, s2)) / (max(e1, e2) - min(s1, s2))


def list_soft_nms(starts, ends, scores, sigma, top_k):
    """One video, lists: the highest score leaves, all others decay."""
    starts, ends, scores, out = list(starts), list(ends), list(scores), []
    while scores and len(out) < top_k:
        best = int(np.argmax(scores))
        s, e = starts[best], ends[best]
        for i in range(len(scores)):
            if i != best:
                overlap = pair_tiou(s, e, starts[i], ends[i])
                if overlap > 0:
                    scores[i] = scores[i] * np.exp(-np.square(overlap) / sigma)
        out.append((s, e, scores[best]))
        for column in (starts, ends, scores):
            column.pop(best)
    return out


# ------------------------------------------------------------------------------------------------------- the runs

def make_results(database, subset, number, seed=0):
    """`number` predictions: two thirds around the video's segments with their label, one third anywhere, any label."""
    rng = np.random.default_rng(seed)
    chosen = {v: info for v, info in database.items() if info["subset"] == subset and info["annotations"]}
    labels = sorted({a["label"] for info in chosen.values() for a in info["annotations"]})
    results, left = {}, number
    for n, (video, info) in enumerate(chosen.items()):
        k = left // (len(chosen) - n)
        left -= k
        around = [info["annotations"][i] for i in rng.integers(0, len(info["annotations"]), k)]
        segment = np.array([a["segment"] for a in around], dtype=np.float64).reshape(k, 2)
        segment += rng.normal(0, 0.25, (k, 2)) * (segment[:, 1:] - segment[:, :1])
        free = rng.random(k) < 1 / 3
        segment[free] = rng.random((free.sum(), 2)) * info["duration"]
        segment = np.sort(segment.clip(0, info["duration"]), 1)
        strange = rng.integers(0, len(labels), k)
        results[video] = [{"label": labels[c] if f else a["label"], "score": s, "segment": t} for a, c, f, s, t in zip(
            around, strange, free, rng.random(k).round(4).tolist(), segment.tolist())]
    return results


def peak_memory(gt, pred, subset):
    """GiB of a fresh process that scores the file."""
    command = [sys.executable, ev.__file__, "--gt", gt, "--pred", pred, "--subset", subset]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError("scoring the file in a process of its own failed")
    return usage.ru_maxrss / 2**20


def bench_map(args):
    data = json.loads(Path(args.annotations).read_text())
    results = make_results(data["database"], args.subset, args.predictions, args.seed)
    truth = [(v, a["label"], *map(float, a["segment"])) for v, info in data["database"].items()
             if info["subset"] == args.subset for a in info["annotations"]]
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "result.json")
        ev.save_results(results, file, class_source="benchmark")
        memory = peak_memory(args.annotations, file, args.subset)
        options = {"subset": args.subset}
        _, loading = timed(lambda: json.loads(Path(file).read_text()), args.repeats)
        _, from_file = timed(lambda: ev.evaluate(data, file, analysis=False, **options), args.repeats)
        _, with_analysis = timed(lambda: ev.evaluate(data, file, **options), args.repeats)
    loaded = {"results": results}
    out, from_dicts = timed(lambda: ev.evaluate(data, loaded, analysis=False, **options), args.repeats)
    gt_columns = ev._read_ground_truth(data, "ground truth", args.subset, [])
    columns = ev._read_entries(results, ("segment", "score", "label"), "result", [])
    video, label = ({name: i for i, name in enumerate(gt_columns[k])} for k in ("videos", "labels"))
    columns["video"] = np.array([video[v] for v in results])[columns["video"]]
    columns["label"] = np.array([label[c] for c in columns["label"]])
    _, arrays = timed(lambda: ev._mean_ap(gt_columns, columns, ev.ACTIVITYNET_TIOU), args.repeats)

    P = out["predictions"]
    labels = list(out["AP"]) if args.full else list(out["AP"])[::max(1, len(out["AP"]) // args.classes)][:args.classes]
    keep = set(labels)
    some = {v: [e for e in entries if e["label"] in keep] for v, entries in results.items()}
    rows = {"ours, arrays only (no parsing)": (P, arrays), "ours, from loaded dictionaries": (P, from_dicts),
            "ours, from the JSON file": (P, from_file), "ours, from the file, with error analysis": (P, with_analysis)}
    for name, plain in (("plain loop, pandas (the public design)", pandas_map), ("plain loop, numpy", numpy_map)):
        try:
            (ap, n), seconds = timed(lambda: plain(truth, some, ev.ACTIVITYNET_TIOU, labels))
        except ImportError:
            print("pandas is not installed: the public design's loop is left out")
            continue
        difference = max(abs(ap[c] - out["AP"][c]) for c in labels)
        if not difference < 1e-9:
            raise RuntimeError(f"{name}: AP differs by {difference}")
        rows[f"{name}, from loaded dictionaries"] = n, seconds
        rows[f"{name}, from the JSON file"] = n, seconds + loading * n / P
        print(f"{name}: {len(labels)} classes, {n} predictions, largest difference of AP {difference:.1e}")

    def ratio(name):
        if name.startswith("ours"):
            return ""
        ours, (n, seconds) = rows["ours, " + name.rpartition(", ")[2]], rows[name]
        return f"{seconds / n / (ours[1] / ours[0]):.0f} x"

    print(ev._table(["mAP, 10 thresholds", "predictions", "seconds", "predictions / s", "ours is faster by"], [
        [name, n, f"{s:.2f}", f"{n / s:,.0f}", ratio(name)] for name, (n, s) in rows.items()]))
    print(f"average mAP {out['average_mAP']:.4f}; peak memory of `python evaluate.py` on the file: {memory:.2f} GiB\n")
    return {"rows": {k: {"predictions": n, "seconds": s} for k, (n, s) in rows.items()}, "peak_gib": memory}


def bench_soft_nms(args):
    B, K, L = args.videos, args.proposals, 100
    g = torch.Generator().manual_seed(args.seed)
    pairs = torch.combinations(torch.arange(L + 1)) / L  # all segments between snippet boundaries
    segments = torch.stack([pairs[torch.randperm(len(pairs), generator=g)[:K]] for _ in range(B)]).double()
    scores = torch.rand(B, len(segments[0]), 4, generator=g, dtype=torch.float64).prod(-1)  # start x end x both maps
    rows, outputs = {}, {}
    for dtype in (torch.float64, torch.float32):
        s, p = segments.to(dtype), scores.to(dtype)
        ev.soft_nms(s[:4], p[:4])
        outputs[dtype], rows[f"ours, {str(dtype)[6:]}"] = timed(lambda: ev.soft_nms(s, p), args.repeats)
    plain, rows["plain loop, lists"] = timed(lambda: [
        list_soft_nms(*segments[b].T.tolist(), scores[b].tolist(), 0.84, 100) for b in range(B)])
    kept, decayed, _ = outputs[torch.float64]
    ours = torch.cat([kept, decayed[..., None]], -1)
    difference = (torch.tensor(plain, dtype=torch.float64) - ours).abs().max().item()
    if not difference < 1e-12:
        raise RuntimeError(f"soft-NMS differs by {difference}")
    print(ev._table([f"soft-NMS, {B} x {segments.shape[1]}, top 100", "seconds", "ms / video", "faster by"], [
        [name, f"{s:.3f}", f"{1e3 * s / B:.2f}", f"{rows['plain loop, lists'] / s:.0f} x"]
        for name, s in rows.items()]))
    print(f"largest difference of segments and scores (float64): {difference:.1e}")
    return {"seconds": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", required=True, help="ActivityNet's annotations")
    parser.add_argument("--subset", default="validation")
    parser.add_argument("--predictions", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=4, help="classes that the plain loops score without --full")
    parser.add_argument("--full", action="store_true", help="the plain loops score everything (minutes)")
    parser.add_argument("--videos", type=int, default=256)
    parser.add_argument("--proposals", type=int, default=2500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, 1 thread, Python {platform.python_version()}, "
          f"numpy {np.__version__}, torch {torch.__version__}\n")
    figures = {"map": bench_map(args), "soft_nms": bench_soft_nms(args)}
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
