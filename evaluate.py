"""Post-processing and evaluation of temporal action localization. Needs torch and numpy only; can be copied alone.

    python evaluate.py --gt GT.json --pred RESULT.json [--subset validation] [--tiou 0.5:0.95:0.05] [--ar]
                       [--json OUT.json] [--plot OUT.png]
    python evaluate.py --compare RUN [NAME=RUN ...] [--json OUT.json] [--markdown OUT.md] [--plot OUT.png]

Proposals to detections: `soft_nms` or `hard_nms`, `load_class_scores`, `fuse_classes`, `save_results`.
Detections to numbers:   `evaluate` (mAP, AR@AN, error analysis), `compare` (a table of several runs).

Ground truth is ActivityNet JSON {"database": {video: {"subset", "duration", "annotations": [{"segment", "label"}]}}},
a result is {"version", "results": {video: [{"label", "score", "segment"}]}, "external_data"}; segments in seconds.
B videos, K proposals of a video, N segments, P predictions of a file, G ground-truth segments, T tIoU thresholds.
"""

import argparse
import json
import os
import signal
import sys
import warnings
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import torch

ACTIVITYNET_TIOU = np.linspace(0.5, 0.95, 10)
LENGTHS = (0.2, 0.4, 0.6, 0.8)  # bounds between the length classes of DETAD, in fractions of the video
ERRORS = ("true_positive", "double_detection", "wrong_label", "localization", "confusion", "background")


# ---------------------------------------------------------------------------------------- proposals to detections

def tiou(a, b):
    """Temporal intersection over union of every pair: (N, 2), (M, 2) -> (N, M) in [0, 1].

    Torch tensors (any device) or numpy arrays of (start, end). A pair whose union is empty (two zero-length
    segments) has tIoU 0. mAP treats that pair otherwise, as the official evaluator does: see `evaluate`.
    """
    xp = torch if isinstance(a, torch.Tensor) else np
    a, b = a[:, None], b[None]
    inter = (xp.minimum(a[..., 1], b[..., 1]) - xp.maximum(a[..., 0], b[..., 0])).clip(0)
    union = (a[..., 1] - a[..., 0]) + (b[..., 1] - b[..., 0]) - inter
    return inter / xp.where(union > 0, union, 1.0)


def soft_nms(segments, scores, valid=None, *, sigma=0.84, top_k=100):
    """Gaussian soft-NMS (Bodla et al., ICCV 2017) of a padded batch, on the tensors' own device.

    Repeats: take the highest score of each video (of equal ones the lowest index), then multiply every remaining
    score by exp(-tIoU^2 / sigma). LoFi uses sigma 0.84, G-TAD 0.8.

    Args: segments (B, K, 2), scores (B, K) >= 0, valid (B, K) bool or None: False entries are never picked.
    Returns: segments (B, k, 2), decayed scores (B, k), highest first, valid (B, k); k = min(top_k, K). Entries
    beyond a video's last candidate are zero and not valid. Not differentiable.
    """
    return _nms(segments, scores, valid, top_k,
                lambda live, overlap: live.mul_(overlap.square_().mul_(-1 / sigma).exp_()))


def hard_nms(segments, scores, valid=None, *, threshold, top_k=100):
    """Greedy NMS: a picked segment removes the remaining ones with tIoU > threshold. Otherwise as `soft_nms`."""
    return _nms(segments, scores, valid, top_k,
                lambda live, overlap: live.masked_fill_(overlap > threshold, -torch.inf))


@torch.no_grad()
def _nms(segments, scores, valid, top_k, decay):
    B, K = scores.shape
    if segments.shape != (B, K, 2) or (valid is not None and valid.shape != (B, K)):
        raise ValueError(f"NMS needs segments (B, K, 2), scores (B, K) and valid (B, K), got {tuple(segments.shape)}, "
                         f"{tuple(scores.shape)} and {None if valid is None else tuple(valid.shape)}")
    block = max(1, 40_000 // max(K, 1))
    if scores.device.type == "cpu" and B > block:  # blocks of videos that stay in the cache: up to twice as fast
        parts = [_nms(segments[b:b + block], scores[b:b + block], None if valid is None else valid[b:b + block],
                      top_k, decay) for b in range(0, B, block)]
        return tuple(torch.cat(part) for part in zip(*parts))
    dtype = torch.promote_types(torch.promote_types(segments.dtype, scores.dtype), torch.float32)
    segments, live = segments.to(dtype), scores.to(dtype, copy=True)  # live (B, K): -inf for what is gone or not valid
    if valid is not None:
        segments, live = segments.masked_fill(~valid[..., None], 0), live.masked_fill_(~valid, -torch.inf)
    start, end = segments[..., 0].contiguous(), segments[..., 1].clone(memory_format=torch.contiguous_format)
    length = (end - start).clamp_(min=torch.finfo(dtype).tiny)  # two of zero length: 0 / tiny = 0
    overlap, union = torch.empty_like(start), torch.empty_like(start)
    k = min(top_k, K)
    picked = torch.zeros(B, k, dtype=torch.long, device=scores.device)
    kept = torch.zeros(B, k, dtype=dtype, device=scores.device)
    for n in range(k):
        best, i = live.max(1, keepdim=True)  # (B, 1), the first of equal scores
        picked[:, n], kept[:, n] = i[:, 0], best[:, 0]
        s, e, size = start.gather(1, i), end.gather(1, i), length.gather(1, i)
        live.scatter_(1, i, -torch.inf)
        end.scatter_(1, i, s)  # overlaps nothing from now on, so that -inf is never multiplied by a factor of 0
        torch.minimum(end, e, out=overlap), torch.maximum(start, s, out=union)
        overlap.sub_(union).clamp_(min=0)
        torch.add(length, size, out=union).sub_(overlap)
        decay(live, overlap.div_(union))
    valid = kept > -torch.inf
    segments = segments.gather(1, picked[..., None].expand(-1, -1, 2))
    return segments.masked_fill(~valid[..., None], 0), kept.masked_fill(~valid, 0), valid


def load_class_scores(source, videos, *, subset="validation", ground_truth=False):
    """Video-level class scores from a file: (scores (len(videos), n) float64, n labels).

    source: path or loaded JSON, in one of three layouts: {"results": {video: [n scores]}, "class": [n names]} (CUHK's
    file); {video: [{"label", "score"}, ...]}; with ground_truth=True, annotations: 1 for the classes of `subset`
    that occur in the video (an analysis mode: name it in the result's `class_source`). Names with and without the
    prefix "v_" are the same video. Scores are >= 0; videos without any get zeros (no detections), with one warning.
    """
    data, name = _load(source, "class scores")
    if not ground_truth and isinstance(data.get("results"), dict) and "class" in data:
        labels, table = list(data["class"]), data["results"]
    else:
        if ground_truth:
            truth = _read_ground_truth(data, name, subset, [])
            names, labels, video, label, score = (*(truth[k] for k in ("videos", "labels", "video", "label")), 1.0)
        else:
            table = data.get("results", data)
            entries = _read_entries(table, ("label", "score"), name)
            names, labels, video, score = list(table), sorted(entries["labels"]), entries["video"], entries["score"]
            index = {c: i for i, c in enumerate(labels)}
            label = np.array([index[c] for c in entries["label"]], dtype=int)
        if (np.asarray(score) < 0).any():
            raise ValueError(f"{name}: class scores below 0 (lowest {np.min(score):g}); give probabilities, not logits")
        rows = np.zeros((len(names), len(labels)))
        np.maximum.at(rows, (video, label), score)
        table = dict(zip(names, rows.tolist()))
    keys = [next((v for v in (video, video.removeprefix("v_"), "v_" + video) if v in table), None) for video in videos]
    missing = [video for video, key in zip(videos, keys) if key is None]
    if missing:
        warnings.warn(f"{name}: no class scores for {_some(missing, 'video')} of {len(videos)}: no detections there",
                      stacklevel=2)
    found = [key for key in keys if key is not None]
    scores = np.zeros((len(videos), len(labels)))
    scores[[key is not None for key in keys]] = _numbers(
        [table[key] for key in found], (len(labels),), lambda i: f"{name}: video {found[i]!r}", "class scores")
    if (scores < 0).any():
        raise ValueError(f"{name}: class scores below 0 (lowest {scores.min():g}); give probabilities, not logits")
    return scores, labels


def fuse_classes(segments, scores, valid, videos, durations, class_scores, labels, *, top_k=1):
    """Gives class-agnostic proposals the classes of their video: detections in seconds.

    Every valid proposal is emitted for each of the video's top_k classes (2 on ActivityNet, 1 on HACS) with
    score = proposal score * class score. A class with score 0 is not emitted.

    Args: segments (B, K, 2) fractions of the video, scores (B, K), valid (B, K) or None, videos: B names,
    durations: B seconds, class_scores (B, n), labels: n names; tensors or arrays.
    Returns: {video: [{"label", "score", "segment": [start_sec, end_sec]}, ...]}, highest score first.
    """
    segments, scores, class_scores, durations = (_numpy(x) for x in (segments, scores, class_scores, durations))
    valid = np.ones(scores.shape, bool) if valid is None else _numpy(valid).astype(bool)
    B, K = scores.shape
    shapes = {"segments": (segments.shape, (B, K, 2)), "valid": (valid.shape, (B, K)), "videos": ((len(videos),), (B,)),
              "durations": (durations.shape, (B,)), "class_scores": (class_scores.shape, (B, len(labels)))}
    for what, (got, expected) in shapes.items():
        if got != expected:
            raise ValueError(f"fuse_classes: {what} has shape {got}, expected {expected}")
    for what, x in {"segments": segments[valid], "scores": scores[valid], "durations": durations,
                    "class_scores": class_scores}.items():
        if not np.isfinite(x).all():
            raise ValueError(f"fuse_classes: {(~np.isfinite(x)).sum()} of {x.size} numbers in {what} are NaN or "
                             "infinite; check the head and the video classifier that made them")
    best = np.argsort(-class_scores, axis=1, kind="stable")[:, :top_k]  # (B, top_k)
    results = {}
    for b, video in enumerate(videos):
        classes = best[b][class_scores[b, best[b]] != 0]
        fused = scores[b, valid[b], None].astype(np.float64) * class_scores[b, classes]  # (proposals, classes)
        order = np.argsort(-fused, axis=None, kind="stable")
        seconds = (segments[b, valid[b]].astype(np.float64) * durations[b])[order // max(len(classes), 1)]
        names = [labels[c] for c in classes[order % max(len(classes), 1)]]
        results[video] = [{"label": c, "score": s, "segment": t}
                          for c, s, t in zip(names, fused.ravel()[order].tolist(), seconds.tolist())]
    return results


def save_results(results, path, **external):
    """Writes {"version", "results", "external_data"} in ActivityNet's layout; a reader never sees half a file.

    external goes to external_data; give class_source ("video classifier of the run", "external file X", "ground
    truth (analysis)"), which `evaluate` reports.
    """
    _write_json(path, {"version": "VERSION 1.3", "results": results, "external_data": external}, indent=None)


# ------------------------------------------------------------------------------------------------- reading, writing

def _numpy(x):
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return np.asarray(x)


def _some(names, noun=None):
    """'3 videos (a, b, ...)': how many, and the first few."""
    names = list(names)
    shown = ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {noun}{'s' * (len(names) != 1)} ({shown})" if noun else shown


def _write(path, save):
    """Calls save(a temporary path of the same extension), then renames."""
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    root, extension = os.path.splitext(path)
    aside = f"{root}.{os.getpid()}.tmp{extension}"
    try:
        save(aside)
        os.replace(aside, path)
    finally:
        if os.path.exists(aside):
            os.remove(aside)


def _write_text(path, text):
    _write(path, lambda aside: Path(aside).write_text(text, encoding="utf-8"))


def _write_json(path, data, indent=1):
    _write_text(path, json.dumps(data, indent=indent, allow_nan=False) + "\n")


def _load(source, what):
    """Loaded JSON object and a name for messages, from a path or a loaded object."""
    name = what
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        with open(source, encoding="utf-8") as f:
            try:
                source = json.load(f)
            except ValueError as e:
                raise ValueError(f"{name}: not valid JSON ({e}); is the file cut off?") from None
    if not isinstance(source, dict):
        raise ValueError(f"{name}: expected a JSON object, got {type(source).__name__}")
    return source, name


def _columns(table, keys, name):
    """{video: [entry, ...]} -> entries a video, {key: list over all entries}; errors name the video and the entry."""
    if not isinstance(table, dict):
        raise ValueError(f"{name}: expected {{video: [entries]}}, got {type(table).__name__}")
    try:
        flat = list(chain.from_iterable(table.values()))
        return [len(entries) for entries in table.values()], {k: [e[k] for e in flat] for k in keys}
    except (KeyError, TypeError, IndexError):
        for video, entries in table.items():
            if not isinstance(entries, list):
                raise ValueError(f"{name}: video {video!r} must have a list, got {type(entries).__name__}") from None
            for i, e in enumerate(entries):
                missing = [k for k in keys if not isinstance(e, dict) or k not in e]
                if missing:
                    raise ValueError(f"{name}: video {video!r}, entry {i} has no {_some(missing)}: "
                                     f"{str(e)[:80]}") from None
        raise


def _numbers(values, shape, where, what):
    """List of P entries of numbers, or of strings that are numbers -> array (P, *shape), all finite."""
    try:
        array = np.array(values) if values else np.zeros((0, *shape))
        array = array if array.dtype.kind in "if" else array.astype(np.float64)  # THUMOS14's annotations hold strings
        fine = array.shape == (len(values), *shape)
    except (ValueError, TypeError):
        fine = False
    if not fine:
        for i, value in enumerate(values):
            try:
                fine = np.array(value, dtype=np.float64).shape == shape
            except (ValueError, TypeError):
                fine = False
            if not fine:
                raise ValueError(f"{where(i)}: {what} must be {shape[0] if shape else 'a'} number{'s' * len(shape)}, "
                                 f"got {str(value)[:80]!r}")
        array = np.array([np.array(value, dtype=np.float64) for value in values])
    bad = np.flatnonzero(~np.isfinite(array).all(tuple(range(1, array.ndim))))
    if len(bad):
        raise ValueError(f"{len(bad)} of {len(array)} entries have a NaN or infinite {what}, first: {where(bad[0])}: "
                         f"{str(values[bad[0]])[:80]}")
    return array


def _read_entries(table, keys, name, notes=None):
    """{video: [entry]} -> columns over all entries P in the file's order.

    "video" (P,) index into the table, "segment" (P, 2), "score" (P,), "label" a list, "labels" the distinct ones.
    """
    counts, columns = _columns(table, keys, name)
    names, first = list(table), np.cumsum(counts, dtype=int) - counts
    columns["video"] = video = np.repeat(np.arange(len(names)), counts)

    def where(i):
        return f"{name}: video {names[video[i]]!r}, entry {i - first[video[i]]}"

    if "label" in keys:
        try:
            columns["labels"] = list(dict.fromkeys(columns["label"]))
            if not all(isinstance(c, str) for c in columns["labels"]):
                columns["label"] = [str(c) if isinstance(c, (int, float)) else c for c in columns["label"]]
                columns["labels"] = list(dict.fromkeys(columns["label"]))
            if not all(isinstance(c, str) for c in columns["labels"]):
                raise TypeError
        except TypeError:
            i = next(i for i, c in enumerate(columns["label"]) if not isinstance(c, (str, int, float)))
            raise ValueError(f"{where(i)}: label must be a string, got {str(columns['label'][i])[:80]}") from None
    if "score" in keys:
        columns["score"] = _numbers(columns["score"], (), where, "score")
    if "segment" in keys:
        columns["segment"] = segment = _numbers(columns["segment"], (2,), where, "segment").astype(np.float64)
        bad = np.flatnonzero(segment[:, 1] < segment[:, 0])
        if len(bad):
            notes.append(f"{len(bad)} of {len(video)} segments end before they start, first: {where(bad[0])}, "
                         f"{segment[bad[0]].tolist()}; they match nothing")
    return columns


def _read_ground_truth(data, name, subset, notes):
    database = data.get("database")
    if not isinstance(database, dict):
        raise ValueError(f'{name}: no "database" object; expected ActivityNet annotations, got keys {_some(data)}')
    found = Counter()
    for video, info in database.items():
        if not isinstance(info, dict) or not isinstance(info.get("subset"), str):
            raise ValueError(f'{name}: video {video!r} has no "subset" (a string): {str(info)[:80]}')
        found[info["subset"]] += 1
    if subset not in found:
        raise ValueError(f"{name}: no video of subset {subset!r}; there are "
                         + (", ".join(f"{s!r} ({n} videos)" for s, n in found.items()) or "none"))
    chosen = {v: info for v, info in database.items() if info["subset"] == subset}
    for video, info in chosen.items():
        if "annotations" not in info:
            raise ValueError(f'{name}: video {video!r} has no "annotations"')
    truth = _read_entries({v: info["annotations"] for v, info in chosen.items()}, ("label", "segment"), name, notes)
    if not truth["label"]:
        raise ValueError(f"{name}: subset {subset!r} has {len(chosen)} videos and no annotation: nothing to score")
    truth["videos"], index = list(chosen), {c: i for i, c in enumerate(truth["labels"])}
    truth["label"] = np.array([index[c] for c in truth["label"]])
    duration = [0 if info.get("duration") is None else info["duration"] for info in chosen.values()]
    duration = _numbers(duration, (), lambda i: f"{name}: video {truth['videos'][i]!r}", "duration")
    truth["duration"] = np.where(duration > 0, duration, np.nan)
    return truth


# ------------------------------------------------------------------------------------------------------------- mAP

def _rank(label, score, n):
    """Rows class by class, best score first: order (P,), bounds (n + 1,) of the classes in it.

    Equal scores fall as in the official evaluator: numpy's default argsort of a class's scores in file order, reversed.
    """
    order = np.argsort(label, kind="stable")
    bounds = np.searchsorted(label[order], np.arange(n + 1))
    for a, b in zip(bounds[:-1], bounds[1:]):
        order[a:b] = order[a:b][score[order[a:b]].argsort()[::-1]]
    return order, bounds


def _candidates(segment, group, truth_segment, truth_group, lowest):
    """Pairs of a prediction and a ground truth of its group with tIoU >= lowest, or undefined (both of zero length).

    Groups are integers (a video, or a video and class), negative for none. Returns prediction (n,), truth (n,) indices
    and tIoU (n,); predictions ascending, and for each the ground truths in the official order: tIoU.argsort()[::-1].
    """
    by_group = np.argsort(truth_group, kind="stable")
    by_group = by_group[truth_group[by_group] >= 0]
    groups, first, size = np.unique(truth_group[by_group], return_index=True, return_counts=True)
    at = np.searchsorted(groups, group).clip(max=max(len(groups) - 1, 0))
    member = (groups[at] == group) if len(groups) else np.zeros(len(group), bool)
    rows = np.flatnonzero(member)
    at = at[rows]
    found = [(np.zeros(0, int), np.zeros(0, int), np.zeros(0))]
    for g in np.unique(size[at]):  # all predictions that face g ground truths, in blocks of a bounded size
        mine, step = np.flatnonzero(size[at] == g), max(1, 2_000_000 // g)
        for block in (mine[i:i + step] for i in range(0, len(mine), step)):
            p, t = rows[block], by_group[first[at[block], None] + np.arange(g)]  # (n,), (n, g)
            s, e, ts, te = segment[p, 0, None], segment[p, 1, None], truth_segment[t, 0], truth_segment[t, 1]
            inter = (np.minimum(e, te) - np.maximum(s, ts)).clip(0)
            with np.errstate(invalid="ignore", divide="ignore"):
                overlap = inter / ((te - ts) + (e - s) - inter)
            keep = ~(overlap < lowest).all(1)
            p, t, overlap = p[keep], t[keep], overlap[keep]
            order = overlap.argsort(1)[:, ::-1]  # NaN first
            overlap, t = np.take_along_axis(overlap, order, 1), np.take_along_axis(t, order, 1)
            r, c = np.nonzero(~(overlap < lowest))
            found.append((p[r], t[r, c], overlap[r, c]))
    p, t, overlap = (np.concatenate(x) for x in zip(*found))
    order = np.argsort(p, kind="stable")
    return p[order], t[order], overlap[order]


def _match(prediction, truth, P, G):
    """Greedy matching: predictions in order, each takes the first free ground truth of its list. -> truth or -1 (P,).

    prediction, truth (n,): the lists, as `_candidates` returns them. All predictions ask at once for their first
    choice, a ground truth keeps the best-ranked one, whoever is refused or displaced asks for the next: as every ground
    truth prefers the better-ranked prediction, this ends (after a few rounds) in the sequential loop's result.
    """
    n, holder = len(prediction), np.full(G, len(prediction))  # holder: place in the lists, n for free
    asking = np.flatnonzero(np.diff(prediction, prepend=-1))
    while len(asking):
        wanted = truth[asking]
        before = holder[wanted]
        np.minimum.at(holder, wanted, asking)
        won = holder[wanted] == asking
        displaced = before[won]
        asking = np.concatenate([asking[~won], displaced[displaced < n]]) + 1
        asking = asking[asking < n]
        asking = asking[prediction[asking] == prediction[asking - 1]]
    match, held = np.full(P, -1), np.flatnonzero(holder < n)
    match[prediction[holder[held]]] = held
    return match


def _average_precision(hit, bounds, positives, counted=None):
    """Area under the interpolated precision-recall curve, by class.

    hit (P,) bool in ranked order, bounds (n + 1,), positives (n,) ground truths; counted (P,): False is ignored.
    """
    ap = np.zeros(len(positives))
    for c, (a, b) in enumerate(zip(bounds[:-1], bounds[1:])):
        at = np.flatnonzero(hit[a:b])
        if len(at) and positives[c]:
            seen = at + 1 if counted is None else np.cumsum(counted[a:b])[at]
            precision = np.arange(1, len(at) + 1) / seen
            # Each hit adds 1 / positives to the recall, at the best precision from there on.
            ap[c] = np.maximum.accumulate(precision[::-1]).sum() / positives[c]
    return ap


def _mean_ap(truth, predicted, thresholds):
    """AP (n, T) by class and threshold; for the analysis order (P,), bounds (n + 1,), match (T, P) in ranked order."""
    n = len(truth["labels"])
    order, bounds = _rank(predicted["label"], predicted["score"], n)
    segment, video, label = (predicted[k][order] for k in ("segment", "video", "label"))
    P, G = len(order), len(truth["label"])
    # A segment that ends before it starts is in no group, so that it matches nothing.
    group = np.where((video >= 0) & (segment[:, 1] >= segment[:, 0]), video * n + label, -1)
    ordered = truth["segment"][:, 1] >= truth["segment"][:, 0]
    truth_group = np.where(ordered, truth["video"] * n + truth["label"], -1)
    p, t, overlap = _candidates(segment, group, truth["segment"], truth_group, min(thresholds))
    match = np.full((len(thresholds), P), -1, np.int32)
    for i, threshold in enumerate(thresholds):
        keep = ~(overlap < threshold)
        match[i] = _match(p[keep], t[keep], P, G)
    positives = np.bincount(truth["label"], minlength=n)
    ap = np.stack([_average_precision(m >= 0, bounds, positives) for m in match], 1)
    return ap, order, bounds, match


def _restrict(truth, predicted, videos):
    """Both sides without the other videos (and without the classes that then have no ground truth)."""
    keep, rows = np.isin(truth["video"], videos), np.isin(predicted["video"], videos)
    classes, label = np.unique(truth["label"][keep], return_inverse=True)
    index = np.full(len(truth["labels"]), -1)
    index[classes] = np.arange(len(classes))
    rows &= index[predicted["label"]] >= 0
    small = {"video": truth["video"][keep], "segment": truth["segment"][keep], "label": label,
             "labels": [truth["labels"][c] for c in classes]}
    return small, {"video": predicted["video"][rows], "segment": predicted["segment"][rows],
                   "score": predicted["score"][rows], "label": index[predicted["label"][rows]]}


# --------------------------------------------------------------------------------------------------- error analysis

def _errors(truth, predicted, order, bounds, match, threshold):
    """Kinds of predictions at one threshold, after DETAD (Alwassel et al., ECCV 2018).

    A false positive is named after the ground truth of its video, of any class, with the highest tIoU. At least the
    threshold: double detection (own class) or wrong label; at least 0.1: localization (own class) or confusion (another
    class); else background. Counted over all predictions and over the first 10 G of each class with G ground truths.
    """
    label, segment = predicted["label"][order], predicted["segment"][order]
    video = np.where(segment[:, 1] >= segment[:, 0], predicted["video"][order], -1)
    p, t, overlap = _candidates(segment, video, truth["segment"], truth["video"], 0.1)
    overlap = np.nan_to_num(overlap, nan=1.0)  # zero length on zero length: a match, as for mAP
    own = truth["label"][t] == label[p]
    best = np.lexsort((~own, -overlap, p))  # highest tIoU first, own class first among equals
    best = best[np.flatnonzero(np.diff(p[best], prepend=-1))]
    kind = np.full(len(order), ERRORS.index("background"))
    near, own = overlap[best] >= threshold, own[best]
    kind[p[best]] = np.where(near, np.where(own, 1, 2), np.where(own, 3, 4))
    kind[match >= 0] = 0
    rank = np.arange(len(order)) - np.repeat(bounds[:-1], np.diff(bounds))
    first = rank < 10 * np.bincount(truth["label"], minlength=len(truth["labels"]))[label]
    count = {name: dict(zip(ERRORS, np.bincount(k, minlength=len(ERRORS)).tolist()))
             for name, k in (("all", kind), ("top_10G", kind[first]))}
    return {"tiou": float(threshold), **count}


def _by_length(truth, predicted, order, bounds, match, thresholds):
    """mAP by the ground truth's length in fractions of its video; the mean is over the classes that occur.

    Ground truths of other lengths are ignored with the predictions that match them; an unmatched prediction is a
    false positive of its own length only (the convention of COCO's object sizes).
    """
    duration = truth["duration"]
    segment, video = predicted["segment"][order], predicted["video"][order]
    with np.errstate(invalid="ignore", divide="ignore"):
        size = (truth["segment"][:, 1] - truth["segment"][:, 0]) / duration[truth["video"]]
        predicted_size = (segment[:, 1] - segment[:, 0]) / np.where(video >= 0, duration[video], np.nan)
    edges, rows = (0.0, *LENGTHS, 1.0), []
    truth_bin = np.where(np.isfinite(size), np.searchsorted(LENGTHS, size, side="left"), -1)
    predicted_bin = np.where(np.isfinite(predicted_size), np.searchsorted(LENGTHS, predicted_size, side="left"), -1)
    for b in range(len(LENGTHS) + 1):
        positives = np.bincount(truth["label"][truth_bin == b], minlength=len(truth["labels"]))
        row = {"from": edges[b], "to": edges[b + 1], "segments": int(positives.sum()),
               "classes": int((positives > 0).sum())}
        if row["segments"]:
            ap = []
            for m in match:
                hit = (m >= 0) & (truth_bin[m] == b)
                ap.append(_average_precision(hit, bounds, positives, hit | ((m < 0) & (predicted_bin == b))))
            row |= _summary(np.stack(ap, 1)[positives > 0], thresholds)
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------------------ AR@AN

def _average_recall(truth, predicted, thresholds=ACTIVITYNET_TIOU, most=100):
    """Average recall against the average number of proposals a video, as ActivityNet's proposal evaluation.

    Of every video the same fraction of its proposals is kept, such that the mean over the annotated videos is AN
    = 1..100. The area under the curve ("AUC") is divided by 100, hence in [0, 1].
    """
    annotated = np.unique(truth["video"])
    V, P = len(annotated), len(predicted["video"])
    rows, by_video = (np.argsort(x["video"], kind="stable") for x in (predicted, truth))
    lo, hi = (np.searchsorted(predicted["video"][rows], annotated, side=s) for s in ("left", "right"))
    truth_lo, truth_hi = (np.searchsorted(truth["video"][by_video], annotated, side=s) for s in ("left", "right"))
    kept = np.minimum(((hi - lo) * (most * V / max(P, 1))).astype(int), hi - lo)
    fraction = np.arange(1, most + 1) / 100.0 * (most * float(V) / max(kept.sum(), 1))
    best = np.zeros((len(by_video), most))  # highest tIoU among the proposals kept, by ground truth and AN
    for a, b, k, ta, tb in zip(lo, hi, kept, truth_lo, truth_hi):
        mine = rows[a:b]
        mine = mine[predicted["score"][mine].argsort()[::-1]][:k]
        overlap = tiou(truth["segment"][by_video[ta:tb]], predicted["segment"][mine])
        running = np.maximum.accumulate(np.concatenate([np.zeros((tb - ta, 1)), overlap], 1), 1)
        best[ta:tb] = running[:, np.minimum((k * fraction).astype(int), k)]
    recall = np.mean([(best >= t).mean(0) for t in thresholds], 0)
    return {"AN": list(range(1, most + 1)), "recall": recall.tolist(),
            "AUC": float(((recall[1:] + recall[:-1]) / 2).sum() / most),
            **{f"AR@{k}": float(recall[k - 1]) for k in (1, 5, 10, 50, 100)}}


# --------------------------------------------------------------------------------------------------------- evaluate

def _key(threshold):
    return f"{round(float(threshold), 6):g}"


def _summary(ap, thresholds):
    """{"mAP": {threshold: value}, "average_mAP"} of AP (n, T)."""
    mean = ap.mean(0) if len(ap) else np.zeros(len(thresholds))
    return {"mAP": {_key(t): float(m) for t, m in zip(thresholds, mean)}, "average_mAP": float(mean.mean())}


def evaluate(ground_truth, predictions, *, subset="validation", thresholds=None, ar=False, analysis=True):
    """Scores a result: mAP exactly as ActivityNet's official evaluator, with ties, duplicates and zero-length segments.

    By class, predictions of all videos by descending score (equal scores in numpy's argsort()[::-1] order); each takes
    the free ground truth of its video and class with the highest tIoU >= threshold, otherwise it is a false positive.
    AP is the area under the interpolated precision-recall curve, mAP its mean over the subset's classes. As officially,
    the tIoU of two zero-length segments is undefined and counts as a match, and predictions for unknown videos are
    false positives.

    Args: ground_truth, predictions: paths or loaded JSON objects; thresholds: tIoU, default 0.5:0.05:0.95 (THUMOS14:
    0.3, 0.4, ... 0.7); ar: also AR@AN, for proposals (without any "label" in the file, only that); analysis: also the
    kinds of errors and mAP by length.
    Returns: {"mAP": {"0.5": ...}, "average_mAP", "common": both over the videos that have predictions, "AP": mean over
    the thresholds by class, "evaluated_videos", "ground_truth_videos", "segments", "classes", "predictions",
    "class_source", "warnings", "errors", "by_length", "AR", ...}; scores in [0, 1]. Warnings are also issued through
    `warnings`. Raises ValueError for input that cannot be scored.
    """
    notes = []
    thresholds = np.asarray(ACTIVITYNET_TIOU if thresholds is None else thresholds, dtype=np.float64)
    if thresholds.ndim != 1 or not len(thresholds) or not ((thresholds > 0) & (thresholds <= 1)).all():
        raise ValueError(f"tIoU thresholds must be a list of numbers in (0, 1], got {thresholds.tolist()}")
    data, truth_name = _load(ground_truth, "ground truth")
    truth = _read_ground_truth(data, truth_name, subset, notes)
    data, name = _load(predictions, "result")
    if "results" not in data:
        raise ValueError(f'{name}: no "results"; expected {{"results": {{video: [{{"label", "score", "segment"}}]}}}}, '
                         f"got keys {_some(data)}")
    results, external = data["results"], data.get("external_data")
    predicted = _read_entries(results, ("segment", "score") if ar else ("segment", "score", "label"), name, notes)
    proposals = ar and any(results.values()) and not any("label" in e for e in chain.from_iterable(results.values()))
    if ar and not proposals:
        predicted |= _read_entries(results, ("label",), name)
    index = {v: i for i, v in enumerate(truth["videos"])}
    in_subset = np.array([index.get(v, -1) for v in results], dtype=int)
    predicted["video"] = in_subset[predicted["video"]]  # -1 for an unknown video
    unknown = [v for v in results if v not in index]
    if unknown:
        notes.append(f"{int((predicted['video'] < 0).sum())} predictions are for {_some(unknown, 'video')} that subset "
                     f"{subset!r} does not have: false positives")
    evaluated = np.unique(predicted["video"][predicted["video"] >= 0])
    out = {"subset": subset, "thresholds": thresholds.tolist(), "evaluated_videos": len(evaluated),
           "ground_truth_videos": len(truth["videos"]), "segments": len(truth["label"]),
           "classes": len(truth["labels"]), "predictions": len(predicted["video"]), "unknown_videos": len(unknown),
           "class_source": str(external.get("class_source", "unknown")) if isinstance(external, dict) else "unknown"}
    if proposals:
        out["class_source"] = "none (class-agnostic proposals)"
    else:
        index = {c: i for i, c in enumerate(truth["labels"])}
        label = np.array([index.get(c, -1) for c in predicted["label"]], dtype=int)
        if (label < 0).any():
            strange = [c for c in predicted["labels"] if c not in index]
            notes.append(f"{int((label < 0).sum())} of {len(label)} predictions have {_some(strange, 'label')} that "
                         f"the ground truth of subset {subset!r} does not have: they count for no class")
        known = np.flatnonzero(label >= 0)
        detected = {k: predicted[k][known] for k in ("video", "segment", "score")} | {"label": label[known]}
        ap, order, bounds, match = _mean_ap(truth, detected, thresholds)
        out = _summary(ap, thresholds) | {"common": _summary(ap, thresholds)} | out
        if len(evaluated) < len(truth["videos"]) or unknown:
            out["common"] = _summary(_mean_ap(*_restrict(truth, detected, evaluated), thresholds)[0], thresholds)
        out["AP"] = dict(zip(truth["labels"], ap.mean(1).tolist()))
        if analysis:
            at = int(np.abs(thresholds - 0.5).argmin())
            out["errors"] = _errors(truth, detected, order, bounds, match[at], thresholds[at])
            untimed = int(np.isnan(truth["duration"]).sum())
            if untimed:
                notes.append(f"{untimed} of {len(truth['videos'])} videos have no (positive) duration: left out of mAP "
                             "by length")
            if untimed < len(truth["videos"]):
                out["by_length"] = _by_length(truth, detected, order, bounds, match, thresholds)
    if ar:
        out["AR"] = _average_recall(truth, predicted)
        rows = np.column_stack([predicted["video"], predicted["segment"]])
        repeated = 0 if proposals else len(rows) - len(np.unique(rows, axis=0))
        if repeated:
            notes.append(f"{repeated} of {len(rows)} predictions repeat a segment of their video (under another "
                         "label?): AR@AN counts each, score the proposals themselves instead")
    out["warnings"] = notes
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return out


# ---------------------------------------------------------------------------------------------------- tables, plots

def compare(runs):
    """One row for each run: [{"name", "0.5", "0.75", "0.95", "average", "seconds", "seeds", "std": {...}, ...}].

    runs: "PATH" or "NAME=PATH[,PATH...]". PATH is a folder with metrics.json (what `evaluate` returns, with "seconds" if known),
    or a folder of such folders; several are one row's seeds, which must differ ("seed" of metrics.json), of which the mean and the sample standard deviation ("std", null for
    one seed) are given. Fractions, full precision. If no run has 0.75 or 0.95 (THUMOS14), all thresholds are columns.
    """
    read = []
    for run in runs:
        name, _, path = run.partition("=") if "=" in run and not os.path.exists(run) else ("", "", run)
        folders = []
        for part in [path] if os.path.exists(path) else path.split(","):
            if not os.path.isdir(part):
                raise ValueError(f"no folder {part} (of {run}): expected a run's folder, or one of such folders, as PATH or NAME=PATH[,PATH...]")
            folders += [part] if os.path.exists(os.path.join(part, "metrics.json")) else sorted(
                f.path for f in os.scandir(part) if f.is_dir())
        unfinished = [f for f in folders if not os.path.exists(os.path.join(f, "metrics.json"))]
        if len(unfinished) == len(folders):
            raise ValueError(f"{path}: no metrics.json in it or in its folders; has the run finished?")
        if unfinished:
            warnings.warn(f"{path}: no metrics.json in {_some(unfinished, 'folder')}: left out", stacklevel=2)
        metrics = []
        for file in (os.path.join(f, "metrics.json") for f in folders if f not in unfinished):
            metrics.append(_load(file, "metrics")[0])
            if not isinstance(metrics[-1].get("mAP"), dict) or "average_mAP" not in metrics[-1]:
                raise ValueError(f'{file}: no "mAP" and "average_mAP"; it must hold what evaluate() returns')
        seeds = [m.get("seed") for m in metrics]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{path}: its {len(folders)} runs have seeds {seeds}, so they are not the seeds of one row; "
                             "name each run by itself, or one row's as NAME=PATH,PATH,...")
        read.append((name or os.path.basename(os.path.abspath(path)), metrics))
    present = list(dict.fromkeys(t for _, metrics in read for m in metrics for t in m["mAP"]))
    columns = ["0.5", "0.75", "0.95"] if {"0.75", "0.95"} & set(present) else present
    rows = []
    for name, metrics in read:
        values = {t: [m["mAP"].get(t) for m in metrics] for t in columns}
        values |= {"average": [m["average_mAP"] for m in metrics], "seconds": [m.get("seconds") for m in metrics]}
        values = {k: [x for x in v if x is not None] for k, v in values.items()}
        row = {"name": name} | {k: float(np.mean(v)) if v else None for k, v in values.items()}
        row["seeds"], row["mAP"] = len(metrics), _mean_curve([m["mAP"] for m in metrics])
        row["std"] = None if len(metrics) == 1 else {
            k: float(np.std(v, ddof=1)) if len(v) > 1 else None for k, v in values.items()}
        for key in ("evaluated_videos", "ground_truth_videos", "subset", "class_source"):
            different = list(dict.fromkeys(m.get(key, "unknown") for m in metrics))
            row[key] = different[0] if len(different) == 1 else _some(different)
        rows.append(row)
    for key in ("ground_truth_videos", "subset", "class_source"):
        if len({row[key] for row in rows}) > 1:
            warnings.warn(f"the runs differ in {key}: their numbers are not comparable as they stand", stacklevel=2)
    return rows


def _mean_curve(curves):
    return {t: float(np.mean([c[t] for c in curves])) for t in curves[0] if all(t in c for c in curves)}


def _table(header, rows):
    """Markdown that also reads well on a screen: first column left, the others right."""
    rows = [[str(cell) for cell in row] for row in (header, *rows)]
    width = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, width))) + " |"
             for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(width)) + "|")
    return "\n".join(lines)


def _percent(x):
    return "-" if x is None else f"{100 * x:.2f}"


def _compare_table(rows):
    columns = [k for k in rows[0] if k[0].isdigit()] + ["average"]
    timed = any(row["seconds"] is not None for row in rows)

    def cell(row, key, show):
        std = (row["std"] or {}).get(key)
        return show(row[key]) + (f" ± {show(std)}" if std is not None else "")

    return _table(
        ["mAP (%)", *(c if c == "average" else f"@{c}" for c in columns), *["seconds"] * timed, "seeds", "evaluated",
         "classes from"],
        [[row["name"], *(cell(row, c, _percent) for c in columns),
          *[cell(row, "seconds", lambda x: "-" if x is None else f"{x:.1f}")] * timed, row["seeds"],
          f"{row['evaluated_videos']} of {row['ground_truth_videos']}", row["class_source"]] for row in rows])


def report(metrics):
    """What `evaluate` returned, as text."""
    m, keys = metrics, [_key(t) for t in metrics["thresholds"]]
    lines = [f"evaluated {m['evaluated_videos']} of {m['ground_truth_videos']} ground-truth videos of subset "
             f"{m['subset']!r}: {m['predictions']} predictions, {m['segments']} segments, {m['classes']} classes",
             f"class labels from: {m['class_source']}"]
    if "mAP" in m:
        sides = {"all videos": m, f"the {m['evaluated_videos']} with predictions": m["common"]}
        lines += ["", _table(["mAP (%) at tIoU", *keys, "average"], [
            [name, *(_percent(x["mAP"][k]) for k in keys), _percent(x["average_mAP"])] for name, x in sides.items()])]
    if "AR" in m:
        ar = {k: v for k, v in m["AR"].items() if k.startswith("A") and k != "AN"}
        lines += ["", _table(["AR@AN (%), tIoU 0.5:0.95:0.05", *ar], [["proposals", *map(_percent, ar.values())]])]
    if "errors" in m:
        parts = [m["errors"]["all"], m["errors"]["top_10G"]]
        total = [sum(part.values()) for part in parts]
        lines += ["", _table([f"predictions at tIoU {_key(m['errors']['tiou'])}", f"all ({total[0]})",
                              f"first 10 x ground truths of each class ({total[1]})"], [
            [kind.replace("_", " "), *(f"{p[kind]} ({100 * p[kind] / max(n, 1):.1f} %)" for p, n in zip(parts, total))]
            for kind in ERRORS])]
    if "by_length" in m:
        ends = list(dict.fromkeys((keys[0], keys[-1])))
        header = ["mAP (%) by length / video", "segments", "classes", *(f"@{k}" for k in ends), "average"]
        lines += ["", _table(header, [
            [f"{r['from']:.1f} to {r['to']:.1f}", r["segments"], r["classes"],
             *(_percent(r.get("mAP", {}).get(k)) for k in ends), _percent(r.get("average_mAP"))]
            for r in m["by_length"]])]
    return "\n".join(lines)


def plot(rows, path):
    """Draws mAP against tIoU to an image file: rows of `compare`, or what `evaluate` returns. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('the plot needs matplotlib: pip install matplotlib') from None
    figure = Figure(figsize=(6.4, 4 + 0.4 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        curve, average = row["mAP"], 100 * np.mean(list(row["mAP"].values()))
        axes.plot([float(t) for t in curve], [100 * v for v in curve.values()], marker="o",
                  label=f"{row.get('name', 'mAP')}: average {average:.2f}\n{row['evaluated_videos']} of "
                        f"{row['ground_truth_videos']} videos, classes from: {row['class_source']}")
    axes.set(xlabel="tIoU threshold", ylabel="mAP (%)", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize="small")
    _write(path, lambda aside: figure.savefig(aside, dpi=150))


# ---------------------------------------------------------------------------------------------------------- program

def _thresholds(text):
    """"0.5:0.95:0.05" or "0.5" or "0.3,0.5,0.7" -> array."""
    try:
        if ":" not in text:
            return np.array([float(t) for t in text.split(",")])
        low, high, step = map(float, text.split(":"))
        count = round((high - low) / step)
        if abs(low + count * step - high) > 1e-6:
            raise ValueError
        return np.linspace(low, high, count + 1)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError("expected LOW:HIGH:STEP with HIGH on a step, or a list with commas, "
                                         f"got {text!r}") from None


def main(argv=None):
    parser = argparse.ArgumentParser(description="Scores temporal action localization results, or compares runs.")
    parser.add_argument("--gt", help="annotations, ActivityNet JSON")
    parser.add_argument("--pred", help="result JSON")
    parser.add_argument("--subset", default="validation", help="subset of the annotations (default: %(default)s)")
    parser.add_argument("--tiou", type=_thresholds, default=ACTIVITYNET_TIOU, metavar="LOW:HIGH:STEP",
                        help="tIoU thresholds (default: 0.5:0.95:0.05; THUMOS14: 0.3:0.7:0.1)")
    parser.add_argument("--ar", action="store_true", help="also AR@AN, for class-agnostic proposals")
    parser.add_argument("--compare", nargs="+", metavar="RUN",
                        help="PATH or NAME=PATH of run folders (metrics.json in it, or in its folders: one a seed)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers at full precision")
    parser.add_argument("--markdown", metavar="FILE", help="with --compare: write the table")
    parser.add_argument("--plot", metavar="FILE", help="draw mAP against tIoU (needs matplotlib)")
    args = parser.parse_args(argv)
    if bool(args.compare) == bool(args.gt or args.pred) or bool(args.gt) != bool(args.pred):
        parser.error("give either --gt and --pred, or --compare")
    if args.markdown and not args.compare:
        parser.error("--markdown goes with --compare")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if args.compare:
                rows = compare(args.compare)
                data, text = {"rows": rows}, _compare_table(rows)
            else:
                data = evaluate(args.gt, args.pred, subset=args.subset, thresholds=args.tiou, ar=args.ar)
                text = report(data)
        for w in caught:
            print(f"warning: {w.message}", file=sys.stderr)
        try:
            if args.json:
                _write_json(args.json, data)
            if args.markdown:
                _write_text(args.markdown, text + "\n")
            if args.plot:
                if not args.compare and "mAP" not in data:
                    raise ValueError("--plot draws mAP, and proposals without labels have none")
                plot(rows if args.compare else [{"name": os.path.basename(args.pred), **data}], args.plot)
        finally:
            print(text)  # last: a reader that is gone ends the program here
    except (ValueError, OSError, ImportError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    main()
