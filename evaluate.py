"""Turn proposals into detections and score them: soft-NMS, classes, mAP, AR@AN, error analysis.

    python evaluate.py --gt GT.json --pred RESULT.json [--subset validation]
                       [--tiou 0.5:0.95:0.05] [--ar] [--json OUT.json]

Ground truth is ActivityNet JSON, {"database": {video: {"subset", "duration", "annotations":
[{"segment", "label"}]}}}, a result {"version", "results": {video: [{"label", "score", "segment"}]},
"external_data"}; segments in seconds. Legend: B videos, K proposals a video; G segments of V videos
and n classes in a ground truth, P predictions in a result; T tIoU thresholds.

Imports torch and numpy only: copy this file where you need it.
"""

import argparse
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray | Tensor
Source = str | os.PathLike | Mapping

ACTIVITYNET_TIOU = np.linspace(0.5, 0.95, 10)
# Bounds between the length classes of DETAD, in fractions of the video.
LENGTHS = (0.2, 0.4, 0.6, 0.8)
# The kinds of predictions in DETAD's sense; `_errors` relies on their order.
ERRORS = (
    *("true_positive", "double_detection", "wrong_label"),
    *("localization", "confusion", "background"),
)


class InputError(ValueError):
    """What a user can mend: a file, a path, an option."""


# ------------------------------------------------------------------------- proposals to detections


def tiou(a: Array, b: Array) -> Array:
    """Return the temporal intersection over union of every pair: (N, 2), (M, 2) -> (N, M).

    Torch tensors (any device) or numpy arrays of (start, end). Two zero-length segments have tIoU 0
    (but see `evaluate`).
    """
    xp = torch if isinstance(a, Tensor) else np
    a = a[:, None]
    inter = (xp.minimum(a[..., 1], b[:, 1]) - xp.maximum(a[..., 0], b[:, 0])).clip(0)
    union = (a[..., 1] - a[..., 0]) + (b[:, 1] - b[:, 0]) - inter
    return inter / xp.where(union > 0, union, 1.0)


def soft_nms(
    segments: Tensor, scores: Tensor, valid: Tensor | None = None, *, sigma=0.84, top_k=100
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply Gaussian soft-NMS (Bodla et al., ICCV 2017) to a padded batch, on its own device.

    Repeat: take the highest score of each video (of equal ones the lowest index), then multiply
    every remaining score by exp(-tIoU^2 / sigma). LoFi uses sigma 0.84, G-TAD 0.8.

    segments (B, K, 2), scores (B, K) >= 0, valid (B, K) bool or None: False is never picked.
    Returns segments (B, k, 2), decayed scores (B, k), highest first, valid (B, k), where
    k = min(top_k, K); what follows a video's last candidate is zero, not valid. No gradient.
    """
    return _nms(segments, scores, valid, top_k, sigma=sigma)


def hard_nms(
    segments: Tensor, scores: Tensor, valid: Tensor | None = None, *, threshold: float, top_k=100
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply greedy NMS: a picked segment removes those with tIoU > threshold; see `soft_nms`."""
    return _nms(segments, scores, valid, top_k, threshold=threshold)


@torch.no_grad()
def _nms(segments, scores, valid, top_k, **rule):
    B, K = scores.shape
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    if segments.shape != (B, K, 2) or valid.shape != (B, K):
        got = f"{tuple(segments.shape)}, {(B, K)} and {tuple(valid.shape)}"
        raise ValueError(f"expected segments (B, K, 2), scores (B, K) and valid (B, K), got {got}")
    # On a CPU, blocks of videos that stay in the cache: up to twice as fast.
    at_once = max(1, 40_000 // max(K, 1)) if scores.device.type == "cpu" else max(B, 1)
    parts = []
    for first in range(0, max(B, 1), at_once):
        block = slice(first, first + at_once)
        parts.append(_nms_block(segments[block], scores[block], valid[block], top_k, **rule))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _nms_block(segments, scores, valid, top_k, *, sigma=None, threshold=None):
    """Pick k times the best of each video; sigma: soft-NMS, else hard NMS at the threshold."""
    B, K = scores.shape
    k = min(top_k, K)
    dtype = torch.promote_types(torch.promote_types(segments.dtype, scores.dtype), torch.float32)
    segments = segments.to(dtype).masked_fill(~valid[..., None], 0)
    start = segments[..., 0].clone()
    end = segments[..., 1].clone()
    # At least tiny, so that two segments of zero length have tIoU 0.
    length = (end - start).clamp_(min=torch.finfo(dtype).tiny)
    # The scores of what is left, -inf elsewhere.
    live = scores.to(dtype).masked_fill(~valid, -torch.inf)
    picked = torch.zeros(B, k, dtype=torch.long, device=scores.device)
    kept = torch.zeros(B, k, dtype=dtype, device=scores.device)
    for n in range(k):
        best, i = live.max(1, keepdim=True)  # (B, 1), the first of equal scores
        kept[:, n] = best[:, 0]
        picked[:, n] = i[:, 0]
        best_start = start.gather(1, i)
        overlap = torch.minimum(end, end.gather(1, i)).sub_(torch.maximum(start, best_start))
        overlap.clamp_(min=0)
        overlap.div_((length + length.gather(1, i)).sub_(overlap))
        if sigma is None:
            live.masked_fill_(overlap > threshold, -torch.inf)
        else:
            live.mul_(overlap.square_().mul_(-1 / sigma).exp_())
        # What is picked has no extent from now on: -inf is never multiplied by a factor of 0.
        live.scatter_(1, i, -torch.inf)
        end.scatter_(1, i, best_start)
    valid = kept > -torch.inf
    segments = segments.gather(1, picked[..., None].expand(-1, -1, 2))
    return segments.masked_fill(~valid[..., None], 0), kept.masked_fill(~valid, 0), valid


def load_class_scores(
    source: Source, videos: Sequence[str], *, subset="validation", ground_truth=False
) -> tuple[np.ndarray, list[str]]:
    """Read video-level class scores: (len(videos), n) float64, and the n labels.

    source: path or loaded JSON, in one of three layouts: {"results": {video: [n scores]}, "class":
    [n names]} (CUHK's file); {video: [{"label", "score"}, ...]}; with ground_truth, annotations: 1
    for the classes of `subset` that occur in the video (an analysis mode: name it in the result's
    `class_source`). Names with and without the prefix "v_" are the same video. Videos without
    scores get zeros (no detections), with one warning. Raises InputError, also for scores below 0.
    """
    data, name = _load(source, "class scores")
    if not ground_truth and isinstance(data.get("results"), dict) and "class" in data:
        labels = list(data["class"])
        table = data["results"]
    else:
        if ground_truth:
            listed = _read_ground_truth(data, name, subset, [])
            labels = listed.classes
        else:
            listed = _read_entries(data.get("results", data), name, ("label", "score"), [])
            labels = sorted(listed.classes)
        rows = np.full((len(listed.videos), len(labels)), -np.inf)
        np.maximum.at(rows, (listed.video, listed.label), listed.score)
        rows[rows == -np.inf] = 0
        rows = rows[:, _index(labels, listed.classes)]
        table = dict(zip(listed.videos, rows, strict=True))
    found = {}
    for i, video in enumerate(videos):
        for spelling in (video, video.removeprefix("v_"), "v_" + video):
            if spelling in table:
                found.setdefault(i, spelling)
    if len(found) < len(videos):
        missing = _count([v for i, v in enumerate(videos) if i not in found], "video")
        note = f"{name}: no class scores for {missing} of {len(videos)}: no detections there"
        warnings.warn(note, stacklevel=2)
    rows = [table[spelling] for spelling in found.values()]
    places = [f"{name}: video {spelling!r}" for spelling in found.values()]
    scores = np.zeros((len(videos), len(labels)))
    scores[list(found)] = _numbers(rows, (len(labels),), places.__getitem__, "class scores")
    if (scores < 0).any():
        lowest = f"(lowest {scores.min():g})"
        raise InputError(f"{name}: class scores below 0 {lowest}; give probabilities, not logits")
    return scores, labels


def fuse_classes(
    segments: Array,
    scores: Array,
    valid: Array | None,
    videos: Sequence[str],
    durations: Sequence[float] | Array,
    class_scores: Array,
    labels: Sequence[str],
    *,
    top_k: int = 1,
) -> dict[str, list[dict]]:
    """Give class-agnostic proposals the classes of their video: detections in seconds.

    Every valid proposal is emitted for each of the video's top_k classes (2 on ActivityNet, 1 on
    HACS) with score = proposal score * class score. A class with score 0 is not emitted.

    segments (B, K, 2) fractions of the video, scores (B, K), valid (B, K) or None, videos: B names,
    durations: B seconds, class_scores (B, n), labels: n names.
    Returns {video: [{"label", "score", "segment": [start_sec, end_sec]}, ...]}, best first.
    Raises InputError if a number is not finite.
    """
    B, K = scores.shape
    valid = np.ones((B, K)) if valid is None else valid
    valid = _checked("valid", valid, (B, K)).astype(bool)
    segments = _checked("segments", segments, (B, K, 2), valid)
    scores = _checked("scores", scores, (B, K), valid)
    durations = _checked("durations", durations, (B,))
    class_scores = _checked("class_scores", class_scores, (B, len(labels)))
    best = np.argsort(-class_scores, axis=1, kind="stable")[:, :top_k]  # (B, top_k)
    results = {}
    for b, video in zip(range(B), videos, strict=True):
        classes = best[b, class_scores[b, best[b]] != 0]
        proposals = scores[b, valid[b]].astype(np.float64)
        fused = np.outer(proposals, class_scores[b, classes]).ravel()
        order = np.argsort(-fused, kind="stable")
        proposal, column = np.divmod(order, max(len(classes), 1))
        seconds = segments[b, valid[b]].astype(np.float64) * durations[b]
        columns = (classes[column].tolist(), fused[order].tolist(), seconds[proposal].tolist())
        results[video] = [
            {"label": labels[label], "score": score, "segment": segment}
            for label, score, segment in zip(*columns, strict=True)
        ]
    return results


def _checked(name, x, shape, valid=...):
    """Return x as an array; ValueError for another shape, InputError for a bad valid number."""
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    x = np.asarray(x)
    if x.shape != shape:
        raise ValueError(f"{name} has shape {x.shape}, expected {shape}")
    bad = ~np.isfinite(x[valid])
    if bad.any():
        count = f"{bad.sum()} of {bad.size} numbers in {name} are NaN or infinite"
        raise InputError(f"{count}; check the head and the video classifier that made them")
    return x


def save_results(results: Mapping[str, list[dict]], path: str | os.PathLike, **external) -> None:
    """Write {"version", "results", "external_data"} in ActivityNet's layout, atomically.

    external goes to external_data; give class_source ("video classifier of the run", "external file
    X", "ground truth (analysis)"), which `evaluate` reports.
    """
    _write_json({"version": "VERSION 1.3", "results": results, "external_data": external}, path)


# ------------------------------------------------------------------------------ reading and writing


@dataclass
class _Segments:
    """Segments of a file in its order: P of a result, or the G of the ground truth."""

    name: str  # of the file
    videos: list[str]  # V
    video: np.ndarray  # (P,) index among videos, -1 unknown
    classes: list[str] | None = None  # n
    label: np.ndarray | None = None  # (P,) index among classes, -1 unknown
    segment: np.ndarray | None = None  # (P, 2) seconds
    score: np.ndarray | None = None  # (P,)
    durations: np.ndarray | None = None  # (V,) seconds, NaN where unknown

    def where(self, i):
        """Return the place of entry i, for messages."""
        first = np.searchsorted(self.video, self.video[i])
        return f"{self.name}: video {self.videos[self.video[i]]!r}, entry {i - first}"

    def take(self, rows):
        """Return some of them, in the order of `rows`."""
        columns = {key: getattr(self, key)[rows] for key in ("video", "label", "segment", "score")}
        return replace(self, **columns)

    def groups(self, by_class):
        """Return the video, or video and class, as a number; -1 for what can match nothing."""
        group = self.video * len(self.classes) + self.label if by_class else self.video
        possible = (self.video >= 0) & (self.segment[:, 1] >= self.segment[:, 0])
        return np.where(possible, group, -1)


def _read_entries(table, name, keys, notes, *, optional=None):
    """Read columns of {video: [entry, ...]}; one is optional if no entry at all has it."""
    if not isinstance(table, dict):
        raise InputError(f"{name}: expected {{video: [entries]}}, got {type(table).__name__}")
    for video, entries in table.items():
        if not isinstance(entries, list):
            raise InputError(f"{name}: video {video!r} must have a list, got {str(entries)[:80]}")
    entries = list(chain.from_iterable(table.values()))
    video = np.repeat(np.arange(len(table)), [*map(len, table.values())])
    read = _Segments(name, list(table), video)
    for key in keys:
        try:
            values = [entry[key] for entry in entries]
        except (KeyError, TypeError, IndexError):
            there = [isinstance(entry, dict) and key in entry for entry in entries]
            if key == optional and not any(there):
                continue
            i = there.index(False)
            got = str(entries[i])[:80]
            raise InputError(f"{read.where(i)} has no {key}: {got}") from None
        if key == "label":
            labels = _strings(values, read.where)
            read.classes = list(dict.fromkeys(labels))
            read.label = _index(labels, read.classes)
        elif key == "score":
            read.score = _numbers(values, (), read.where, key)
        else:
            read.segment = _numbers(values, (2,), read.where, key).astype(np.float64)
            _note_reversed(read, notes)
    return read


def _index(names, known):
    """Return the place of each name among the known ones, -1 for others."""
    index = {name: i for i, name in enumerate(known)}
    return np.array([index.get(name, -1) for name in names], dtype=int)


def _note_reversed(read, notes):
    bad = np.flatnonzero(read.segment[:, 1] < read.segment[:, 0])
    if len(bad):
        first = f"{read.where(bad[0])}, {read.segment[bad[0]].tolist()}"
        note = f"{len(bad)} of {len(read.video)} segments end before they start, first: {first}"
        notes.append(f"{note}; they match nothing")


def _strings(labels, where):
    """Return labels as strings: some annotations hold class indices."""
    if set(map(type, labels)) <= {str}:
        return labels
    for i, label in enumerate(labels):
        if not isinstance(label, (str, int, float)):
            raise InputError(f"{where(i)}: label must be a string, got {str(label)[:80]}")
    return [str(label) for label in labels]


def _numbers(values, shape, where, what):
    """Return values as an array (len(values), *shape); where(i): the place of one, for messages."""
    array = _finite(values, shape)
    if array is None:
        i = [_finite([value], shape) is None for value in values].index(True)
        expected = f"{shape[0]} finite numbers" if shape else "a finite number"
        got = str(values[i])[:80]
        raise InputError(f"{where(i)}: {what} must be {expected}, got {got!r}")
    return array


def _finite(values, shape):
    """Return an array of integers or floats, or None if one has another shape or is not finite."""
    try:
        array = np.array(values) if values else np.zeros((0, *shape))
        # THUMOS14's annotations hold strings.
        array = array if array.dtype.kind in "if" else array.astype(np.float64)
    except (ValueError, TypeError, OverflowError):
        return None
    return array if array.shape[1:] == shape and np.isfinite(array).all() else None


def _read_ground_truth(data, name, subset, notes):
    """Return the ground truth of a subset."""
    database = data.get("database")
    if not isinstance(database, dict):
        raise InputError(f'{name}: no "database"; expected ActivityNet annotations')
    for video, info in database.items():
        if not isinstance(info, dict) or not isinstance(info.get("subset"), str):
            raise InputError(
                f'{name}: video {video!r} has no "subset" (a string): {str(info)[:80]}'
            )
    chosen = {video: info for video, info in database.items() if info["subset"] == subset}
    if not chosen:
        there = ", ".join(sorted({repr(info["subset"]) for info in database.values()})) or "none"
        raise InputError(f"{name}: no video of subset {subset!r}; there are {there}")
    durations = []
    for info in chosen.values():
        duration = info.get("duration")
        # None and NaN: unknown.
        durations.append(0 if duration is None or duration != duration else duration)
    places = [f"{name}: video {video!r}" for video in chosen]
    durations = _numbers(durations, (), places.__getitem__, "duration")
    annotations = {video: info.get("annotations") for video, info in chosen.items()}
    truth = _read_entries(annotations, name, ("label", "segment"), notes)
    if not len(truth.video):
        raise InputError(f"{name}: no annotation in the {len(chosen)} videos of subset {subset!r}")
    truth.durations = np.where(durations > 0, durations, np.nan)
    truth.score = np.ones(len(truth.video))
    return truth


def _read_predictions(results, name, truth, subset, ar, notes):
    """Return the segments of a result; for AR@AN without labels, if no entry has one."""
    optional = "label" if ar else None
    read = _read_entries(results, name, ("segment", "score", "label"), notes, optional=optional)
    place = _index(read.videos, truth.videos)
    unknown = [read.videos[i] for i in np.flatnonzero(place < 0)]
    video = place[read.video]
    if unknown:
        note = f"{(video < 0).sum()} predictions are for {_count(unknown, 'video')} that subset"
        notes.append(f"{note} {subset!r} does not have: false positives")
    predicted = replace(truth, video=video, label=None, segment=read.segment, score=read.score)
    if read.label is None:
        return predicted
    place = _index(read.classes, truth.classes)
    unknown = [read.classes[i] for i in np.flatnonzero(place < 0)]
    predicted.label = place[read.label]
    if unknown:
        note = f"{(predicted.label < 0).sum()} of {len(video)} predictions have"
        note = f"{note} {_count(unknown, 'label')} that the ground truth of subset {subset!r}"
        notes.append(f"{note} does not have: they count for no class")
    return predicted


def _count(names, noun):
    """Return how many there are, and the first few: "4 videos (a, b, c, ...)"."""
    shown = ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'} ({shown})"


def _load(source, what):
    """Return a JSON object, from a path or loaded already, and its name for messages."""
    name = what
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        try:
            with open(source, encoding="utf-8-sig") as file:
                source = json.load(file)
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{name} cannot be read as JSON: {error}") from None
    if not isinstance(source, dict):
        raise InputError(f"{name}: expected a JSON object, got {type(source).__name__}")
    return source, name


def _write_json(data, path, indent=None):
    """Write JSON to a temporary file, then rename it: a reader never sees half a file."""
    text = json.dumps(data, indent=indent, allow_nan=False) + "\n"
    part = f"{os.fspath(path)}.part-{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(part) or ".", exist_ok=True)
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        if os.path.exists(part):
            os.remove(part)


# ----------------------------------------------------------------------------------- mAP and AR@AN


@dataclass
class _Matching:
    """What each prediction matches: predictions class by class, best score first."""

    ranked: _Segments
    bounds: np.ndarray  # (n + 1,) of the classes among them
    match: np.ndarray  # (T, P) index of the ground truth, or -1
    positives: np.ndarray  # (n,) ground truths of each class
    ap: np.ndarray  # (classes with positives, T)


def _match_predictions(truth, predicted, thresholds):
    """Match at every threshold. Equal scores fall as in the official evaluator.

    That is numpy's default argsort of a class's scores in file order, reversed.
    """
    num_classes = len(truth.classes)
    order = np.flatnonzero(predicted.label >= 0)
    order = order[np.argsort(predicted.label[order], kind="stable")]
    bounds = np.searchsorted(predicted.label[order], np.arange(num_classes + 1))
    for first, last in pairwise(bounds):
        rows = order[first:last]
        order[first:last] = rows[predicted.score[rows].argsort()[::-1]]
    ranked = predicted.take(order)
    p, t, overlap = _candidates(truth, ranked, min(thresholds), by_class=True)
    match = np.empty((len(thresholds), len(order)), np.int32)
    for row, threshold in zip(match, thresholds, strict=True):
        near = ~(overlap < threshold)
        row[:] = _match(p[near], t[near], len(order), len(truth.video))
    positives = np.bincount(truth.label, minlength=num_classes)
    ap = _average_precision(match >= 0, bounds, positives)
    return _Matching(ranked, bounds, match, positives, ap)


def _candidates(truth, predicted, lowest, *, by_class):
    """Find the pairs of one video, and of one class if asked for, with tIoU >= lowest.

    The tIoU of two zero-length segments is undefined (NaN) and below nothing. Returns the pairs'
    predictions, ascending, ground truths and tIoU; for each prediction the ground truths are in the
    official order, tIoU.argsort()[::-1].
    """
    truth_group = truth.groups(by_class)
    members = np.argsort(truth_group, kind="stable")
    members = members[truth_group[members] >= 0]
    groups, first, size = np.unique(truth_group[members], return_index=True, return_counts=True)
    # Where each prediction's group stands in `groups`; the last one is nobody's.
    groups = np.append(groups, np.iinfo(int).max)
    group = predicted.groups(by_class)
    at = np.searchsorted(groups, group)
    rows = np.flatnonzero(groups[at] == group)
    at = at[rows]
    found = [(np.zeros(0, int), np.zeros(0, int), np.zeros(0))]
    # All predictions that face g ground truths at once, in blocks of a bounded size.
    for g in np.unique(size[at]):
        facing = np.flatnonzero(size[at] == g)
        for block in np.array_split(facing, len(facing) * g // 2_000_000 + 1):
            p = rows[block]
            t = members[first[at[block], None] + np.arange(g)]  # (len(block), g)
            overlap = _official_tiou(predicted.segment[p, None], truth.segment[t])
            # Only rows with a near pair are worth sorting.
            keep = ~(overlap < lowest).all(1)
            overlap = overlap[keep]
            order = overlap.argsort(1)[:, ::-1]
            overlap = np.take_along_axis(overlap, order, 1)
            t = np.take_along_axis(t[keep], order, 1)
            row, column = np.nonzero(~(overlap < lowest))
            found.append((p[keep][row], t[row, column], overlap[row, column]))
    p, t, overlap = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.argsort(p, kind="stable")
    return p[order], t[order], overlap[order]


def _official_tiou(a, b):
    """Return the tIoU of segments (..., 2): NaN for two of zero length."""
    inter = (np.minimum(a[..., 1], b[..., 1]) - np.maximum(a[..., 0], b[..., 0])).clip(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return inter / ((b[..., 1] - b[..., 0]) + (a[..., 1] - a[..., 0]) - inter)


def _match(p, t, P, G):
    """Match greedily: predictions in order, each takes the first free ground truth of its pairs.

    p, t (m,): the pairs, as `_candidates` returns them. Returns (P,), -1 for none. The sequential
    loop's result, in a few rounds: a pair is sure if it is the first of its prediction and of its
    ground truth, as no better-ranked prediction wants that; it takes both out of the next round.
    """
    match = np.full(P, -1)
    free = np.ones(G, bool)
    first = np.empty(G, int)
    while len(p):
        choice = np.flatnonzero(np.diff(p, prepend=-1))
        # Backwards: of a ground truth's pairs the first is written last, and stays.
        first[t[::-1]] = np.arange(len(t))[::-1]
        sure = choice[first[t[choice]] == choice]
        match[p[sure]] = t[sure]
        free[t[sure]] = False
        left = free[t] & (match[p] < 0)
        p = p[left]
        t = t[left]
    return match


def _average_precision(hits, bounds, positives, counted=None):
    """Return the area under the interpolated precision-recall curve: (classes with positives, T).

    hits (T, P) bool in ranked order, bounds (n + 1,), positives (n,): ground truths of each class;
    counted (T, P): False is ignored.
    """
    ap = np.zeros((len(positives), len(hits)))
    for t, hit in enumerate(hits):
        for c, (first, last) in enumerate(pairwise(bounds)):
            at = np.flatnonzero(hit[first:last])
            if not len(at):
                continue
            seen = at + 1 if counted is None else np.cumsum(counted[t, first:last])[at]
            precision = np.arange(1, len(at) + 1) / seen
            # Each hit adds 1 / positives to the recall, at the best precision from there on.
            ap[c, t] = np.maximum.accumulate(precision[::-1]).sum() / positives[c]
    return ap[positives > 0]


def _summary(ap, thresholds):
    """Return {"mAP": {threshold: value}, "average_mAP"} of AP (n, T)."""
    mean = ap.mean(0) if len(ap) else np.zeros(len(thresholds))
    by_threshold = {f"{t:g}": float(m) for t, m in zip(thresholds, mean, strict=True)}
    return {"mAP": by_threshold, "average_mAP": float(mean.mean())}


def _errors(truth, matching, thresholds):
    """Count the kinds of predictions at the threshold next to 0.5 (DETAD, Alwassel, ECCV 2018).

    A false positive is named after the ground truth of its video, of any class, with the highest
    tIoU. At least the threshold: double detection (own class) or wrong label; at least 0.1:
    localization (own class) or confusion (another class); else background. Counted over all
    predictions and over the first 10 g of each class with g ground truths.
    """
    nearest = np.abs(thresholds - 0.5).argmin()
    label = matching.ranked.label
    p, t, overlap = _candidates(truth, matching.ranked, 0.1, by_class=False)
    # Zero length on zero length is a match, as for mAP.
    overlap = np.nan_to_num(overlap, nan=1.0)
    own = truth.label[t] == label[p]
    # Of each prediction the highest tIoU, own class first among equals.
    best = np.lexsort((~own, -overlap, p))
    best = best[np.flatnonzero(np.diff(p[best], prepend=-1))]
    near = overlap[best] >= thresholds[nearest]
    own = own[best]
    kind = np.full(len(label), ERRORS.index("background"))
    kind[p[best]] = np.select([near & own, near, own], [1, 2, 3], default=4)
    kind[matching.match[nearest] >= 0] = 0
    rank = np.arange(len(label)) - np.repeat(matching.bounds[:-1], np.diff(matching.bounds))
    first = kind[rank < 10 * matching.positives[label]]
    errors = {"tiou": float(thresholds[nearest])}
    for name, kinds in {"all": kind, "top_10G": first}.items():
        counts = np.bincount(kinds, minlength=len(ERRORS)).tolist()
        errors[name] = dict(zip(ERRORS, counts, strict=True))
    return errors


def _by_length(truth, matching, thresholds):
    """Return mAP by the ground truth's length in fractions of its video.

    The mean is over the classes that occur. Ground truths of other lengths are ignored with the
    predictions that match them; an unmatched prediction is a false positive of its own length only
    (the convention of COCO's object sizes).
    """
    match = matching.match
    truth_length = _length_class(truth)
    length = np.where(match >= 0, truth_length[match], _length_class(matching.ranked))  # (T, P)
    rows = []
    for i, (low, high) in enumerate(pairwise((0.0, *LENGTHS, 1.0))):
        positives = np.bincount(truth.label[truth_length == i], minlength=len(matching.positives))
        occurs = positives > 0
        row = {"from": low, "to": high}
        row |= {"segments": int(positives.sum()), "classes": int(occurs.sum())}
        if occurs.any():
            counted = length == i
            ap = _average_precision(counted & (match >= 0), matching.bounds, positives, counted)
            row |= _summary(ap, thresholds)
        rows.append(row)
    return rows


def _length_class(segments):
    """Return the length class of each segment, -1 where the duration is unknown."""
    duration = np.where(segments.video >= 0, segments.durations[segments.video], np.nan)
    length = (segments.segment[:, 1] - segments.segment[:, 0]) / duration
    length_class = np.searchsorted(LENGTHS, length, side="left").astype(np.int8)
    return np.where(np.isfinite(length), length_class, -1)


def _average_recall(truth, predicted, most=100):
    """Return average recall against the average number of proposals a video, as ActivityNet does.

    Of every video the same fraction of its proposals is kept, such that the mean over the annotated
    videos is AN = 1..100. The area under the curve ("AUC") is divided by 100, hence in [0, 1].
    """
    annotated = np.unique(truth.video)
    order = np.argsort(predicted.video, kind="stable")
    bounds = np.searchsorted(predicted.video[order], np.arange(len(truth.videos) + 1))
    available = np.diff(bounds)[annotated]
    share = most * len(annotated) / max(len(order), 1)
    kept = np.minimum((available * share).astype(int), available)
    fraction = np.arange(1, most + 1) / most * (most * len(annotated) / max(kept.sum(), 1))
    # The highest tIoU among the proposals kept, by ground truth and AN.
    best = np.zeros((len(truth.video), most))
    for v, k in zip(annotated, kept, strict=True):
        rows = np.flatnonzero(truth.video == v)
        mine = order[bounds[v] : bounds[v + 1]]
        mine = mine[predicted.score[mine].argsort()[::-1]][:k]
        overlap = np.zeros((len(rows), k + 1))
        overlap[:, 1:] = tiou(truth.segment[rows], predicted.segment[mine])
        running = np.maximum.accumulate(overlap, 1)
        best[rows] = running[:, np.minimum((k * fraction).astype(int), k)]
    recall = np.mean([(best >= t).mean(0) for t in ACTIVITYNET_TIOU], 0)
    area = ((recall[1:] + recall[:-1]) / 2).sum() / most
    metrics = {"AN": list(range(1, most + 1)), "recall": recall.tolist(), "AUC": float(area)}
    return metrics | {f"AR@{k}": float(recall[k - 1]) for k in (1, 5, 10, 50, 100)}


# ---------------------------------------------------------------------------- evaluate and report


def evaluate(
    ground_truth: Source,
    predictions: Source,
    *,
    subset: str = "validation",
    thresholds: Iterable[float] | None = None,
    ar: bool = False,
    analysis: bool = True,
) -> dict:
    """Score a result: mAP as ActivityNet's official evaluator, ties and zero lengths included.

    By class, the predictions of all videos take, best score first, the free ground truth of their
    video and class with the highest tIoU >= threshold; without one they are false positives. AP is
    the area under the interpolated precision-recall curve, mAP its mean over the subset's classes.
    As officially, the tIoU of two zero-length segments is undefined and a match, and predictions
    for unknown videos are false positives.

    ground_truth, predictions: paths or loaded JSON. thresholds: tIoU, default 0.5:0.05:0.95
    (THUMOS14: 0.3:0.1:0.7). ar: also AR@AN, of proposals (only that, if no entry has a "label").
    analysis: also the kinds of errors and mAP by length.
    Returns {"mAP": {"0.5": ...}, "average_mAP", "common": both over the videos with predictions,
    "AP": by class, "evaluated_videos", "class_source", "errors", "by_length", "AR", ...}; scores in
    [0, 1]; "warnings" are issued too. Raises InputError for input that cannot be scored.
    """
    notes = []
    thresholds = np.asarray(ACTIVITYNET_TIOU if thresholds is None else thresholds, np.float64)
    possible = (thresholds > 0) & (thresholds <= 1)
    if thresholds.ndim != 1 or not len(thresholds) or not possible.all():
        raise InputError(f"tIoU thresholds must be in (0, 1], got {thresholds.tolist()}")
    data, name = _load(ground_truth, "ground truth")
    truth = _read_ground_truth(data, name, subset, notes)
    data, name = _load(predictions, "result")
    if "results" not in data:
        raise InputError(f'{name}: no "results"; expected {{"results": {{video: [entries]}}}}')
    predicted = _read_predictions(data["results"], name, truth, subset, ar, notes)
    external = data.get("external_data")
    source = external.get("class_source", "unknown") if isinstance(external, dict) else "unknown"
    if predicted.label is None:
        source = "none (class-agnostic proposals)"
    metrics = {
        "subset": subset,
        "thresholds": thresholds.tolist(),
        "evaluated_videos": len(np.unique(predicted.video[predicted.video >= 0])),
        "ground_truth_videos": len(truth.videos),
        "segments": len(truth.video),
        "classes": len(truth.classes),
        "predictions": len(predicted.video),
        "unknown_videos": len(data["results"].keys() - set(truth.videos)),
        "class_source": str(source),
    }
    if predicted.label is not None:
        metrics = _score_detections(truth, predicted, thresholds, metrics, analysis, notes)
    if ar:
        metrics["AR"] = _average_recall(truth, predicted)
        _note_repeated(predicted, notes)
    metrics["warnings"] = notes
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return metrics


def _score_detections(truth, predicted, thresholds, counts, analysis, notes):
    """Return mAP over all videos and over those with predictions, the counts, the analyses."""
    matching = _match_predictions(truth, predicted, thresholds)
    common = matching
    if counts["evaluated_videos"] < len(truth.videos) or counts["unknown_videos"]:
        few = truth.take(np.isin(truth.video, predicted.video))
        known = predicted.take(predicted.video >= 0)
        common = _match_predictions(few, known, thresholds)
    metrics = _summary(matching.ap, thresholds)
    metrics["common"] = _summary(common.ap, thresholds)
    metrics |= counts
    metrics["AP"] = dict(zip(truth.classes, matching.ap.mean(1).tolist(), strict=True))
    if not analysis:
        return metrics
    metrics["errors"] = _errors(truth, matching, thresholds)
    untimed = np.isnan(truth.durations).sum()
    if untimed:
        note = f"{untimed} of {len(truth.videos)} videos have no (positive) duration"
        notes.append(f"{note}: left out of mAP by length")
    if untimed < len(truth.videos):
        metrics["by_length"] = _by_length(truth, matching, thresholds)
    return metrics


def _note_repeated(predicted, notes):
    """Note the segments of detections that repeat one: AR@AN counts each."""
    if predicted.label is None:
        return
    rows = np.column_stack([predicted.video, predicted.segment])
    repeated = len(rows) - len(np.unique(rows, axis=0))
    if repeated:
        note = f"{repeated} of {len(rows)} predictions repeat a segment of their video (under"
        note = f"{note} another label?): AR@AN counts each, score the proposals themselves instead"
        notes.append(note)


def report(metrics: Mapping) -> str:
    """Return what `evaluate` returned as text."""
    m = metrics
    lines = [
        f"evaluated {m['evaluated_videos']} of {m['ground_truth_videos']} ground-truth videos of "
        f"subset {m['subset']!r}: {m['predictions']} predictions, {m['segments']} segments, "
        f"{m['classes']} classes",
        f"class labels from: {m['class_source']}",
    ]
    if "mAP" in m:
        rows = []
        sides = {"all videos": m, f"the {m['evaluated_videos']} with predictions": m["common"]}
        for name, side in sides.items():
            rows.append([name, *map(percent, [*side["mAP"].values(), side["average_mAP"]])])
        lines += ["", markdown_table(["mAP (%) at tIoU", *m["mAP"], "average"], rows)]
    if "AR" in m:
        keys = [key for key in m["AR"] if key == "AUC" or key.startswith("AR@")]
        values = [percent(m["AR"][key]) for key in keys]
        header = ["AR@AN (%), tIoU 0.5:0.95:0.05", *keys]
        lines += ["", markdown_table(header, [["proposals", *values]])]
    if "errors" in m:
        lines += ["", _errors_table(m["errors"])]
    if "by_length" in m:
        lines += ["", _length_table(m["by_length"], [*m["mAP"]])]
    return "\n".join(lines)


def _errors_table(errors):
    header = [f"predictions at tIoU {errors['tiou']:g}"]
    rows = [[kind.replace("_", " ")] for kind in ERRORS]
    titles = {"all": "all", "top_10G": "first 10 x ground truths of each class"}
    for part, title in titles.items():
        total = sum(errors[part].values())
        header.append(f"{title} ({total})")
        for row, count in zip(rows, errors[part].values(), strict=True):
            row.append(f"{count} ({100 * count / max(total, 1):.1f} %)")
    return markdown_table(header, rows)


def _length_table(by_length, keys):
    ends = list(dict.fromkeys((keys[0], keys[-1])))
    header = ["mAP (%) by length / video", "segments", "classes", *(f"@{key}" for key in ends)]
    rows = []
    for row in by_length:
        values = [row.get("mAP", {}).get(key) for key in ends] + [row.get("average_mAP")]
        length = f"{row['from']:.1f} to {row['to']:.1f}"
        rows.append([length, row["segments"], row["classes"], *map(percent, values)])
    return markdown_table([*header, "average"], rows)


def percent(x: float | None) -> str:
    """Return a fraction as a percentage with two digits, "-" for None."""
    return "-" if x is None else f"{100 * x:.2f}"


def markdown_table(header: Iterable, rows: Iterable[Iterable]) -> str:
    """Return Markdown that also reads well on a screen: first column left, the others right."""
    table = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("| " + " | ".join(cells) + " |")
    rules = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], "|" + "|".join(rules) + "|", *lines[1:]])


# ----------------------------------------------------------------------------------------- program


def _thresholds(text):
    """Read LOW:HIGH:STEP with HIGH on a step, or a list with commas. Raises ValueError."""
    if ":" not in text:
        return np.array([float(t) for t in text.split(",")])
    low, high, step = map(float, text.split(":"))
    count = round((high - low) / step) if step else 0
    if abs(low + count * step - high) > 1e-6:
        raise ValueError
    return np.linspace(low, high, count + 1)


def _check_replaceable(path):
    """Raise InputError for a file that this program did not write; a run's metrics have a seed."""
    if not os.path.lexists(path):
        return
    try:
        found = _load(path, "metrics")[0].keys()
    except InputError:
        found = set()
    if not {"thresholds", "warnings"} <= found or "seed" in found:
        raise InputError(f"{path} already exists and is no output of this program: not replaced")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Score a result.")
    parser.add_argument("--gt", required=True, help="annotations, ActivityNet JSON")
    parser.add_argument("--pred", required=True, help="result JSON")
    parser.add_argument("--subset", default="validation", help="default: %(default)s")
    tiou_help = "LOW:HIGH:STEP or a list (default: 0.5:0.95:0.05; THUMOS14: 0.3:0.7:0.1)"
    parser.add_argument("--tiou", type=_thresholds, default=ACTIVITYNET_TIOU, help=tiou_help)
    parser.add_argument(
        "--ar", action="store_true", help="also AR@AN, for class-agnostic proposals"
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers at full precision")
    args = parser.parse_args(argv)
    try:
        if args.json:
            _check_replaceable(args.json)
        with warnings.catch_warnings():
            # Printed below.
            warnings.simplefilter("ignore", UserWarning)
            options = {"subset": args.subset, "thresholds": args.tiou, "ar": args.ar}
            metrics = evaluate(args.gt, args.pred, **options)
        for note in metrics["warnings"]:
            print(f"warning: {note}", file=sys.stderr)
        if args.json:
            _write_json(metrics, args.json, indent=1)
    except InputError as error:
        sys.exit(f"{parser.prog}: {error}")
    # Last: a reader that is gone, as `| head` may be, ends the program here.
    print(report(metrics))


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # Names in letters that the terminal lacks are no reason to fail.
    sys.stdout.reconfigure(errors="replace")
    main()
