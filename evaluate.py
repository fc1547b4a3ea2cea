"""Turn proposals into detections and score them: soft-NMS, classes, mAP, AR@AN, error analysis.

    python evaluate.py --gt GT.json --pred RESULT.json [--subset validation]
                       [--tiou 0.5:0.95:0.05] [--ar [AN ...]] [--recall K ...]
                       [--no-interpolation] [--json OUT.json]

Ground truth is ActivityNet JSON, {"database": {video: {"subset", "duration", "annotations":
[{"segment", "label"}]}}}, a result {"version", "results": {video: [{"label", "score", "segment"}]},
"external_data"}; segments in seconds. Legend: B videos, K proposals a video; G segments of V videos
and n classes in a ground truth, P predictions in a result; T tIoU thresholds. Imports torch and
numpy only: copy this file where you need it.
"""

import argparse
import gc
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, pairwise

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray | Tensor
Source = str | os.PathLike | Mapping

ACTIVITYNET_TIOU = np.linspace(0.5, 0.95, 10)
# Bounds of the length classes of DETAD, in fractions of the video.
LENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
# What malformed JSON raises where numbers are made of it.
MALFORMED = (AttributeError, KeyError, TypeError, ValueError, OverflowError)
MARK = "python evaluate.py --json"  # tells its files from others
# In place of a prediction's ground truth: none, and then either wrong or not counted.
FALSE, IGNORED = -1, -2


class InputError(ValueError):
    """What a user can mend: a file, a path, an option."""


def is_ambiguous(label: str) -> bool:
    """Return whether a label is THUMOS14's for what is neither an action nor none: "Ambiguous"."""
    return label.lower() == "ambiguous"


# ------------------------------------------------------------------------- proposals to detections


def tiou(a: Array, b: Array, *, undefined=0.0) -> Array:
    """Return the temporal intersection over union of all pairs: (..., N, 2), (..., M, 2) -> (N, M).

    Torch tensors (any device) or numpy arrays of (start, end). undefined: of two zero lengths.
    """
    xp = torch if isinstance(a, Tensor) else np
    start, end = a[..., :1], a[..., 1:]  # (..., N, 1)
    inter = (xp.minimum(end, b[..., None, :, 1]) - xp.maximum(start, b[..., None, :, 0])).clip(0)
    union = (b[..., None, :, 1] - b[..., None, :, 0]) + (end - start) - inter
    with np.errstate(invalid="ignore"):
        return xp.where(union == 0, undefined, inter / union)


@torch.no_grad()
def soft_nms(
    segments: Tensor,
    scores: Tensor,
    valid: Tensor | None = None,
    *,
    sigma=0.84,
    top_k=100,
    decay="gaussian",
    decay_above=(0.0, 0.0),
    min_score=0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply soft-NMS (Bodla et al., ICCV 2017) to a padded batch, on its own device.

    Repeat: take the highest score of each video (of equal ones the lowest index), then multiply
    every remaining score by exp(-tIoU^2 / sigma); decay "linear": by 1 - tIoU; "hard": remove it
    (greedy NMS). LoFi uses sigma 0.84, G-TAD 0.8. decay_above: the tIoU above which it does, for a
    picked segment of no width and for one of width 1, linear between; BMN: 0.5 and 0.9.

    segments (B, K, 2), scores (B, K) >= 0, valid (B, K) bool or None: False is never picked.
    Returns segments (B, k, 2), decayed scores (B, k), highest first, valid (B, k), where
    k = min(top_k, K); what follows a video's last candidate, or the last with a decayed score of at
    least min_score, is zero, not valid. No gradient.
    """
    B, K = scores.shape
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    if segments.shape != (B, K, 2) or valid.shape != (B, K):
        got = f"{tuple(segments.shape)}, {(B, K)} and {tuple(valid.shape)}"
        raise ValueError(f"expected segments (B, K, 2), scores (B, K) and valid (B, K), got {got}")
    if decay not in ("gaussian", "linear", "hard"):
        raise ValueError(f"decay must be gaussian, linear or hard, got {decay!r}")
    # On a CPU, blocks of videos that stay in the cache: up to twice as fast.
    width = max(segments.element_size(), scores.element_size(), 4)
    at_once = max(1, 640_000 // max(K * width, 1)) if scores.device.type == "cpu" else max(B, 1)
    blocks = zip(*(x.split(at_once) for x in (segments, scores, valid)), strict=True)
    parts = [_nms(*block, min(top_k, K), decay, sigma, decay_above) for block in blocks]
    segments, scores, valid = (torch.cat(part) for part in zip(*parts, strict=True))
    valid &= scores >= min_score
    return segments.masked_fill(~valid[..., None], 0), scores.masked_fill(~valid, 0), valid


def _nms(segments, scores, valid, k, decay, sigma, above):
    """Pick the best of each video, k times; its score is -inf where none is left."""
    dtype = torch.promote_types(torch.promote_types(segments.dtype, scores.dtype), torch.float32)
    segments = segments.to(dtype).masked_fill(~valid[..., None], 0)
    start, end = (x.clone() for x in segments.unbind(-1))
    # At least tiny, so that two segments of zero length have tIoU 0.
    length = (end - start).clamp_(min=torch.finfo(dtype).tiny)
    remaining = scores.to(dtype).masked_fill(~valid, -torch.inf)
    picked, kept = [valid[:, :0].long()], [remaining[:, :0]]
    for _ in range(k):
        # i (B, 1): the first of equal scores. On a CPU numpy finds it ten times as fast.
        if remaining.device.type == "cpu":
            i = torch.from_numpy(remaining.numpy().argmax(1))[:, None]
        else:
            i = remaining.argmax(1, keepdim=True)
        picked.append(i)
        kept.append(remaining.gather(1, i))
        best_start = start.gather(1, i)
        overlap = torch.minimum(end, end.gather(1, i)).sub_(torch.maximum(start, best_start))
        overlap.clamp_(min=0)
        overlap.div_((length + length.gather(1, i)).sub_(overlap))
        if any(above):  # BMN: a long segment spares more of the others
            least = above[0] + (above[1] - above[0]) * length.gather(1, i)
            overlap.masked_fill_(overlap <= least, 0)
        if decay == "gaussian":
            remaining.mul_(overlap.square_().mul_(-1 / sigma).exp_())
        elif decay == "linear":
            remaining.mul_(overlap.neg_().add_(1))
        else:
            remaining.masked_fill_(overlap > 0, -torch.inf)
        # What is picked has no extent from now on: -inf is never multiplied by a factor of 0.
        remaining.scatter_(1, i, -torch.inf)
        end.scatter_(1, i, best_start)
    picked, kept = torch.cat(picked, 1), torch.cat(kept, 1)
    return segments.gather(1, picked[..., None].expand(-1, -1, 2)), kept, kept > -torch.inf


def class_wise(nms, segments, scores, valid, class_scores, *, top_k: int = 1):
    """Call nms(segments, scores, valid) such that only proposals of one class compete.

    Each proposal takes part in its top_k classes, with score * class score, unless that is 0.
    segments (B, K, 2) fractions of the video, scores (B, K), valid (B, K), class_scores (B, n) or,
    of each proposal, (B, K, n). Returns what nms does, best of all classes first, and the class
    of each, (B, k, n): 1 for its own, else 0, as `fuse_classes` takes it.
    """
    n = class_scores.shape[-1]
    class_scores = class_scores if class_scores.ndim == 3 else class_scores[:, None]
    best, label = class_scores.sort(dim=-1, descending=True, stable=True)
    best, label = (x[..., :top_k].expand(-1, scores.shape[1], -1) for x in (best, label))
    # Segments of different classes lie apart. In float64 they come back as they were.
    moved = segments[:, :, None].double() + 2 * label[..., None]
    parts = (moved, scores[..., None] * best, valid[..., None] & (best > 0))
    kept, *others = nms(*(x.flatten(1, 2) for x in parts))
    label = kept[..., :1].div(2, rounding_mode="floor")
    own = torch.nn.functional.one_hot(label[..., 0].long(), n)
    return (kept - 2 * label).to(segments.dtype), *others, own


def vote(nms, segments, scores, valid, *, threshold: float):
    """Call nms(segments, scores, valid), and move each segment that it keeps to a mean.

    As ActionFormer's segment voting: the mean of all candidates that it has tIoU >= threshold with,
    weighted by their scores before NMS. Shapes as in `soft_nms`; returns what nms does.
    """
    kept, *others = nms(segments, scores, valid)
    segments = segments.to(kept.dtype).masked_fill(~valid[..., None], 0)
    near = (tiou(kept, segments) >= threshold) & valid[:, None]
    weight = torch.where(near, scores[:, None], 0).to(kept.dtype)
    total = weight.sum(-1, keepdim=True)
    return torch.where(total > 0, weight @ segments / total, kept), *others


def load_class_scores(
    source: Source, videos: Sequence[str], *, subset="validation", ground_truth=False
) -> tuple[np.ndarray, list[str]]:
    """Read video-level class scores: (len(videos), n) float64, and the n labels.

    source: path or loaded JSON, in one of three layouts: {"results": {video: [n scores]}, "class":
    [n names]} (CUHK's file); {video: [{"label", "score"}, ...]}; with ground_truth, annotations: 1
    for the classes of `subset` that occur in the video (an analysis: say so in `class_source`).
    Names with and without the prefix "v_" are the same video; videos without scores get zeros (no
    detections), with one warning. Raises InputError, also for scores below 0, or of no video.
    """
    data, name = _load(source, "class scores")
    if ground_truth:
        truth = _read_ground_truth(data, name, subset, [])
        labels = truth.classes
        present = np.zeros((len(truth.videos), len(labels)))
        present[truth.video, truth.label] = 1
        table = dict(zip(truth.videos, present.tolist(), strict=True))
    elif isinstance(data.get("results"), dict) and "class" in data:
        labels = data["class"]
        table = data["results"]
        if not isinstance(labels, list) or not all(isinstance(x, (str, int)) for x in labels):
            raise InputError(f'{name}: "class" must be a list of names, got {labels!s:.80}')
    else:
        table = data.get("results", data)
        columns = _read_entries(table, name, ("label", "score"), [])
        labels = sorted({*columns["label"]})
        best = [{} for _ in table]
        for video, label, score in zip(*columns.values(), strict=True):
            best[video][label] = max(score, best[video].get(label, score))
        rows = [[row.get(label, 0) for label in labels] for row in best]
        table = dict(zip(table, rows, strict=True))
    spellings = [(video, video.removeprefix("v_"), "v_" + video) for video in videos]
    found = [next(filter(table.__contains__, names), None) for names in spellings]
    missing = [video for video, key in zip(videos, found, strict=True) if key is None]
    if missing:
        note = f"{name}: no class scores for {_count(missing, 'video')} of {len(videos)}"
        if len(missing) == len(videos):
            raise InputError(f"{note}: its names are {[*table][:3]!s:.80}")
        warnings.warn(f"{note}: no detections there", stacklevel=2)
    rows = [[0] * len(labels) if key is None else table[key] for key in found]
    convert = partial(_numbers, shape=(len(labels),), least=0)
    expected = f"{len(labels)} class scores of at least 0"
    return _convert(rows, convert, expected, lambda i: f"{name}: video {found[i]!r}"), labels


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
    """Give class-agnostic proposals the classes of their video, or of each: detections in seconds.

    Every valid proposal is emitted for each of its top_k classes (2 on ActivityNet, 1 on HACS) with
    score = proposal score * class score. A class with score 0 is not emitted.

    segments (B, K, 2) fractions of the video, scores (B, K), valid (B, K) or None, B videos and
    their durations in seconds, class_scores (B, n) or, of each proposal, (B, K, n), n labels.
    Raises InputError for NaN and infinity.
    Returns {video: [{"label", "score", "segment": [start_sec, end_sec]}, ...]}, best first.
    """
    B, K = scores.shape
    valid = np.ones((B, K)) if valid is None else valid
    given = (segments, scores, valid, durations, class_scores)
    arrays = [torch.as_tensor(x).detach().cpu().double().numpy() for x in given]
    segments, scores, valid, durations, class_scores = arrays
    shapes = [x.shape for x in arrays]
    expected = [(B, K, 2), (B, K), (B, K), (B,)]
    if shapes[:4] != expected or shapes[4] not in ((B, len(labels)), (B, K, len(labels))):
        raise ValueError(f"shapes {shapes} do not fit {expected} and {len(labels)} labels")
    valid = valid.astype(bool)
    if not all(np.isfinite(x).all() for x in (segments[valid], scores[valid], class_scores)):
        raise InputError("NaN or infinite scores; check the head and the video classifier")
    class_scores = class_scores if class_scores.ndim == 3 else class_scores[:, None]
    best = np.argsort(-class_scores, axis=-1, kind="stable")[..., :top_k]
    class_scores = np.take_along_axis(class_scores, best, -1)
    best = np.broadcast_to(best, (B, K, best.shape[2]))
    fused = scores[:, :, None] * class_scores  # (B, K, top_k)
    emitted = valid[:, :, None] & (class_scores != 0)
    results = {}
    for b, video in zip(range(B), videos, strict=True):
        proposal, column = emitted[b].nonzero()
        found = (best[b, proposal, column], fused[b, proposal, column])
        order = np.argsort(-found[1], kind="stable")
        seconds = segments[b, proposal] * durations[b]
        rows = zip(*(x[order].tolist() for x in (*found, seconds)), strict=True)
        results[video] = [{"label": labels[c], "score": x, "segment": s} for c, x, s in rows]
    return results


def load_results(path: str | os.PathLike) -> tuple[dict[str, list[dict]], dict]:
    """Read what `save_results` wrote, results and external data; InputError for anything else."""
    data, name = _load(path, "results")
    _read_entries(data.get("results"), name, ("label", "segment", "score"), [])
    external = data.get("external_data") or {}
    with suppress(*MALFORMED):
        known = external.get("videos", {}).values()
        if all(os.fspath(video["path"]) and 0 < video["duration"] < np.inf for video in known):
            return data["results"], external
    raise InputError(f"{name}: external_data is not what localize.py writes: {external!s:.80}")


def save_results(results: Mapping[str, list[dict]], path: str | os.PathLike, **external) -> None:
    """Write {"version", "results", "external_data"} in ActivityNet's layout, atomically.

    external: the external data; `evaluate` reports class_source ("external file X", ...) of it.
    """
    write_json({"version": "VERSION 1.3", "results": results, "external_data": external}, path)


# ------------------------------------------------------------------------------ reading and writing


@dataclass
class _Segments:
    """Columns of N entries, in a file's order, in terms of a ground truth's videos and classes."""

    video: np.ndarray  # (N,) index among the videos, -1 unknown
    label: np.ndarray | None  # (N,) index among the classes, -1 unknown
    segment: np.ndarray  # (N, 2) seconds
    score: np.ndarray  # (N,)
    videos: list[str] = ()  # V
    classes: list[str] = ()  # n
    durations: np.ndarray | None = None  # (V,) seconds, NaN where unknown
    ambiguous: "_Segments | None" = None  # of a ground truth: what is labelled so, in no class

    def take(self, rows):
        """Return some of them, in the order of `rows`."""
        columns = {key: getattr(self, key)[rows] for key in ("video", "label", "segment", "score")}
        return replace(self, **columns)


def _read_entries(table, name, keys, notes, needs_label=True):
    """Return columns {"video": its place in the table, **keys} of {video: [entry, ...]}."""
    lists = [*table.values()] if isinstance(table, dict) else [None]
    if not all(isinstance(entries, list) for entries in lists):
        raise InputError(f"{name}: expected {{video: [entry, ...]}}, got {table!s:.200}")
    entries = [*chain.from_iterable(lists)]
    video = np.repeat(np.arange(len(table)), [*map(len, lists)])

    def where(i):
        return f"{name}: video {[*table][video[i]]!r}, entry {i - np.searchsorted(video, video[i])}"

    labelled = any(isinstance(entry, dict) and "label" in entry for entry in entries)
    if not needs_label and entries and not labelled:
        keys = [key for key in keys if key != "label"]
    parts = {"label": "label (text)", "segment": "segment (2 finite numbers)"}
    expected = ", ".join(parts.get(key, "score (a finite number)") for key in keys)
    columns = _convert(entries, partial(_columns, keys=keys), expected, where)
    if "segment" in columns:
        bad = np.flatnonzero(columns["segment"][:, 1] < columns["segment"][:, 0])
        if len(bad):
            note = f"{len(bad)} of {len(entries)} segments end before they start, matching nothing"
            notes.append(f"{note}; first: {where(bad[0])}, {entries[bad[0]]['segment']}")
    return {"video": video, **columns}


def _columns(entries, keys):
    """Return {key: column} of entries."""
    columns = {}
    for key in keys:
        values = [entry[key] for entry in entries]
        if key == "label":
            # Some annotations hold class indices.
            types = {*map(type, values)}
            if not types <= {str, int, float}:
                raise TypeError
            columns[key] = values if types == {str} else [*map(str, values)]
        else:
            columns[key] = _numbers(values, shape=(2,) if key == "segment" else ())
    return columns


def _numbers(values, shape=(), least=-np.inf):
    """Return finite numbers, also of strings, as THUMOS14 has them: (len(values), *shape)."""
    array = np.array(values, np.float64) if len(values) else np.zeros((0, *shape))
    if array.shape[1:] != shape or not np.isfinite(array).all() or (array < least).any():
        raise ValueError
    return array


def _convert(values, convert, expected, where):
    """Return convert(values); InputError tells the place, where(i), of the first it cannot take."""
    try:
        return convert(values)
    except MALFORMED:
        for i, value in enumerate(values):
            with suppress(*MALFORMED):
                convert([value])
                continue
            raise InputError(f"{where(i)}: expected {expected}, got {value!s:.100}") from None
        raise


def _index(names, known):
    """Return the place of each name among the known ones, -1 for others."""
    index = {name: i for i, name in enumerate(known)}
    return np.array([index.get(name, -1) for name in names], dtype=int)


def _read_ground_truth(data, name, subset, notes):
    database = data.get("database")
    if not isinstance(database, dict):
        raise InputError(f'{name}: no "database"; expected ActivityNet annotations')
    expected = "subset (text), duration (a finite number or none)"
    infos = [*database.values()]
    durations = _convert(infos, _durations, expected, lambda i: f"{name}: video {[*database][i]!r}")
    chosen = {video: info for video, info in database.items() if info["subset"] == subset}
    if not chosen:
        there = ", ".join(sorted({repr(info["subset"]) for info in infos})) or "none"
        raise InputError(f"{name}: no video of subset {subset!r}; there are {there}")
    annotations = {video: info.get("annotations") or [] for video, info in chosen.items()}
    columns = _read_entries(annotations, name, ("label", "segment"), notes)
    classes = [x for x in dict.fromkeys(columns["label"]) if not is_ambiguous(x)]
    listed = _Segments(
        video=columns["video"],
        label=_index(columns["label"], classes),
        segment=columns["segment"],
        score=np.ones(len(columns["video"])),
        videos=[*chosen],
        classes=classes,
        durations=durations[[info["subset"] == subset for info in infos]],
    )
    if not classes:
        raise InputError(f"{name}: no annotation in the {len(chosen)} videos of subset {subset!r}")
    return replace(listed.take(listed.label >= 0), ambiguous=listed.take(listed.label < 0))


def _durations(infos):
    """Return the seconds of videos, NaN where they are unknown: nothing above 0."""
    seconds = np.array([info.get("duration") for info in infos], np.float64).reshape(len(infos))
    if np.isinf(seconds).any() or not all(isinstance(info["subset"], str) for info in infos):
        raise ValueError
    return np.where(seconds > 0, seconds, np.nan)


def _read_predictions(data, name, truth, subset, ar, notes):
    """Return the segments of a result, for AR@AN without labels, if no entry has one."""
    if "results" not in data:
        raise InputError(f'{name}: no "results"; expected {{"results": {{video: [entries]}}}}')
    keys = ["segment", "score", "label"]
    columns = _read_entries(data["results"], name, keys, notes, needs_label=not ar)
    videos = [*data["results"]]
    video = _index(videos, truth.videos)[columns["video"]]
    _note_unknown(video, lambda i: videos[columns["video"][i]], "video", subset, notes)
    label = None
    if "label" in columns:
        label = _index(columns["label"], truth.classes)
        _note_unknown(label, columns["label"].__getitem__, "label", subset, notes)
    segment = columns["segment"]
    end = segment[video >= 0, 1]
    duration = truth.durations[video[video >= 0]]
    late = end > 1.5 * duration
    if len(end) and (late.mean() > 0.5 or ((end <= 1) & (duration > 2)).all()):
        notes.append("predictions end long after their video, or all within 1 s: not in seconds?")
    return replace(truth, video=video, label=label, segment=segment, score=columns["score"])


def _note_unknown(place, name, noun, subset, notes):
    """Note how many predictions have place -1, and the names, name(i), that are not known."""
    unknown = np.flatnonzero(place < 0)
    if len(unknown):
        note = f"{len(unknown)} of {len(place)} predictions have"
        note += f" {_count([*dict.fromkeys(map(name, unknown))], noun)} that subset {subset!r}"
        notes.append(f"{note} does not have: none of them is right")


def _count(names, noun):
    """Return how many there are, and the first few: "4 videos (a, b, c, ...)"."""
    shown = ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'} ({shown})"


def unique_keys(pairs):
    """Return the dictionary of a JSON object; json.load would keep the last of equal keys."""
    items = dict(pairs)
    if len(items) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {max(keys, key=keys.count)!r}")
    return items


@contextmanager
def without_gc():
    """Look for no garbage meanwhile: among millions of new objects that takes half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@without_gc()
def parse_json(raw):
    """Return what the bytes of a JSON file hold, by the rules of Python's reader and unique_keys.

    orjson, where it is installed, is faster, and rounds whole numbers beyond 64 bits. What it
    refuses (NaN, a byte order mark), and equal keys, of which it keeps the last, are for Python's.
    """
    with suppress(ImportError, ValueError):
        import orjson

        content = orjson.loads(raw)
        num_keys = _count_keys(content)
        # Each key has its colon; there are more where it kept fewer keys, or strings have some.
        if num_keys == raw.count(b":") or num_keys == len(re.findall(rb'"\s*:', raw)):
            return content
    return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique_keys)


def _count_keys(content):
    """Return how many keys the objects in parsed JSON have."""
    level, count = [content], 0
    while level:
        objects = [x for x in level if type(x) is dict]
        lists = [x for x in level if type(x) is list]
        count += sum(map(len, objects))
        level = [*chain.from_iterable(map(dict.values, objects)), *chain.from_iterable(lists)]
    return count


def load_json(path, what="content"):
    """Return the object in a JSON file; InputError if there is none, or the file is above 2 GB."""
    try:
        if os.path.getsize(path) > 2**31:
            raise ValueError(f"it has {os.path.getsize(path)} bytes")
        with open(path, "rb") as file:
            content = parse_json(file.read())
    except (OSError, ValueError, RecursionError) as error:
        is_json = str(path).endswith(".json")
        hint = "" if is_json else "; tools.check_data --json makes it of a table"
        raise InputError(f"{path} cannot be read as JSON: {error}{hint}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected {what} as a JSON object, got {type(content).__name__}")
    return content


def _load(source, what):
    """Return a JSON object, from a path or loaded already, and its name for messages."""
    if isinstance(source, Mapping):
        return source, what
    return load_json(source, what), os.fspath(source)


def write_atomic(path, write, host=""):
    """Call write(file) on a temporary file, then rename it to `path`; InputError if that fails.

    host: to begin what tells the writer in the temporary file's name.
    """
    part = f"{os.fspath(path)}.part-{host}{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(part) or ".", exist_ok=True)
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, UnicodeError, RuntimeError) as error:  # from torch, where the disk is full
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise InputError(f"{path} cannot be written: {reason}") from error
    finally:
        if os.path.exists(part):
            os.remove(part)


def refuse_to_replace(path, mark, at=0):
    """Raise InputError if there is such a file, and `mark` does not begin by byte `at`."""
    if path and os.path.lexists(path):
        with suppress(OSError), open(path, "rb") as file:
            if mark.encode() in file.read(at + len(mark.encode())):
                return
        raise InputError(f"{path} already exists, of another program: name another file")


def write_json(content, path, indent=None, allow_nan=False):
    """Write JSON, which has no NaN unless Python reads it; a reader never sees half a file."""
    text = json.dumps(content, indent=indent, allow_nan=allow_nan)
    write_atomic(path, lambda file: file.write(f"{text}\n".encode()))


# ----------------------------------------------------------------------------------- mAP and AR@AN


def _match_predictions(truth, predicted, thresholds, interpolate):
    """Return predictions class by class, best first, their ground truths (T, P), and AP.

    Without a ground truth a prediction is IGNORED if it overlaps an ambiguous segment, else FALSE.
    Equal scores fall as in the official evaluator: numpy's default argsort of a class's scores in
    file order, reversed.
    """
    order = np.flatnonzero(predicted.label >= 0)
    order = order[np.argsort(predicted.label[order], kind="stable")]
    for rows in np.split(order, np.flatnonzero(np.diff(predicted.label[order])) + 1):
        rows[:] = rows[predicted.score[rows].argsort()[::-1]]
    ranked = predicted.take(order)
    p, t, overlap = _candidates(truth, ranked, min(thresholds), by_class=True)
    match = np.empty((len(thresholds), len(order)), np.int32)
    for row, threshold in zip(match, thresholds, strict=True):
        near = ~(overlap < threshold)
        row[:] = _match(p[near], t[near], len(order), len(truth.video))
    if len(truth.ambiguous.video):
        p, _, overlap = _candidates(truth.ambiguous, ranked, 0, by_class=False)
        p = p[overlap > 0]
        match[:, p] = np.where(match[:, p] == FALSE, IGNORED, match[:, p])
    positives = np.bincount(truth.label, minlength=len(truth.classes))
    return ranked, match, _average_precision(match, ranked.label, positives, interpolate)


def _candidates(truth, predicted, lowest, *, by_class):
    """Find the pairs of one video, and of one class if asked for, with tIoU >= lowest.

    Returns predictions, ascending, ground truths and tIoU (NaN, and below nothing, for two zero
    lengths); for each prediction the ground truths in the official order, tIoU.argsort()[::-1].
    """
    groups = []
    for segments in (truth, predicted):
        group = segments.video * len(truth.classes) + segments.label if by_class else segments.video
        # 0 for what can match nothing.
        possible = (segments.video >= 0) & (segments.segment[:, 1] >= segments.segment[:, 0])
        groups.append(np.where(possible, group + 1, 0))
    members = np.argsort(groups[0], kind="stable")
    size = np.bincount(groups[0], minlength=len(truth.videos) * len(truth.classes) + 1)
    first = (np.cumsum(size) - size)[groups[1]]
    size[0] = 0
    faced = size[groups[1]]
    found = [(np.zeros(0, int), np.zeros(0, int), np.zeros(0))]
    # All predictions that face g ground truths at once, in blocks of a bounded size.
    for g in np.unique(faced[faced > 0]):
        facing = np.flatnonzero(faced == g)
        for p in np.array_split(facing, len(facing) * g // 2_000_000 + 1):
            t = members[first[p, None] + np.arange(g)]  # (len(p), g)
            overlap = tiou(predicted.segment[p, None], truth.segment[t], undefined=np.nan)[:, 0]
            order = overlap.argsort(1)[:, ::-1]
            overlap = np.take_along_axis(overlap, order, 1)
            t = np.take_along_axis(t, order, 1)
            row, column = np.nonzero(~(overlap < lowest))
            found.append((p[row], t[row, column], overlap[row, column]))
    p, t, overlap = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.argsort(p, kind="stable")
    return p[order], t[order], overlap[order]


def _match(p, t, P, G):
    """Match greedily: predictions in order, each takes the first free ground truth of its pairs.

    p, t (m,): pairs of `_candidates`. Returns (P,), else FALSE: the sequential loop's result, in a
    few rounds. A pair is sure if it is the first of its prediction and of its ground truth, as no
    better-ranked prediction wants that; it takes both out of the next round.
    """
    match = np.full(P, FALSE)
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


def _average_precision(match, label, positives, interpolate):
    """Return the area under the precision-recall curve: (classes with positives, T).

    match (T, P) in ranked order, label (P,), positives (n,): ground truths of each class.
    """
    bounds = np.searchsorted(label, np.arange(len(positives) + 1))
    ap = np.zeros((len(positives), len(match)))
    for t, row in enumerate(match):
        for c, (first, last) in enumerate(pairwise(bounds)):
            at = np.flatnonzero(row[first:last] >= 0)
            if len(at):
                seen = np.cumsum(row[first:last] != IGNORED)[at]
                precision = np.arange(1, len(at) + 1) / seen
                if interpolate:  # the best precision from there on
                    precision = np.maximum.accumulate(precision[::-1])
                # Each hit adds 1 / positives to the recall.
                ap[c, t] = precision.sum() / positives[c]
    return ap[positives > 0]


def _summary(ap, thresholds):
    """Return {"mAP": {threshold: value}, "average_mAP"} of AP (n, T)."""
    mean = ap.mean(0) if len(ap) else np.zeros(len(thresholds))
    by_threshold = {f"{t:g}": float(m) for t, m in zip(thresholds, mean, strict=True)}
    return {"mAP": by_threshold, "average_mAP": float(mean.mean())}


def _errors(truth, ranked, match, thresholds):
    """Count the kinds of predictions at the threshold next to 0.5 (DETAD, Alwassel, ECCV 2018).

    A false positive is named after the ground truth of its video, of any class, with the highest
    tIoU. At least the threshold: double detection (own class) or wrong label; at least 0.1:
    localization (own class) or confusion (another class); else background. Counted over all
    predictions but the ignored, and over the first 10 g of each class with g ground truths.
    """
    nearest = np.abs(thresholds - 0.5).argmin()
    match = match[nearest]
    ranked = ranked.take(match != IGNORED)
    match = match[match != IGNORED]
    label = ranked.label
    p, t, overlap = _candidates(truth, ranked, 0.1, by_class=False)
    # Zero length on zero length is a match, as for mAP.
    overlap = np.nan_to_num(overlap, nan=1.0)
    own = truth.label[t] == label[p]
    # Of each prediction the highest tIoU, own class first among equals.
    best = np.lexsort((~own, -overlap, p))
    best = best[np.flatnonzero(np.diff(p[best], prepend=-1))]
    near = overlap[best] >= thresholds[nearest]
    own = own[best]
    names = ["true_positive", "double_detection", "wrong_label"]
    names += ["localization", "confusion", "background"]
    kind = np.full(len(label), 5)
    kind[p[best]] = np.select([near & own, near, own], [1, 2, 3], default=4)
    kind[match >= 0] = 0
    rank = np.arange(len(label)) - np.searchsorted(label, label)
    errors = {"tiou": float(thresholds[nearest])}
    first = rank < 10 * np.bincount(truth.label)[label]
    for part, kinds in {"all": kind, "top_10G": kind[first]}.items():
        counts = np.bincount(kinds, minlength=len(names)).tolist()
        errors[part] = dict(zip(names, counts, strict=True))
    return errors


def _by_length(truth, ranked, match, thresholds, interpolate):
    """Return mAP by the ground truth's length in fractions of its video, of those with a duration.

    The mean is over the classes that occur. Like COCO's object sizes: ground truths of other
    lengths are ignored with the predictions that match them, and an unmatched prediction is a false
    positive of its own length only.
    """
    lengths = []
    for segments in (truth, ranked):
        # A NaN for video -1.
        duration = np.append(truth.durations, np.nan)[segments.video]
        length = (segments.segment[:, 1] - segments.segment[:, 0]) / duration
        length_class = np.searchsorted(LENGTHS[1:-1], length).astype(np.int8)
        lengths.append(np.where(np.isfinite(length), length_class, -1))
    length = np.where(match >= 0, lengths[0][match.clip(0)], lengths[1])  # (T, P)
    rows = []
    for i, (low, high) in enumerate(pairwise(LENGTHS)):
        positives = np.bincount(truth.label[lengths[0] == i], minlength=len(truth.classes))
        row = {"from": low, "to": high}
        row |= {"segments": int(positives.sum()), "classes": int((positives > 0).sum())}
        if row["segments"]:
            counted = np.where(length == i, match, IGNORED)
            ap = _average_precision(counted, ranked.label, positives, interpolate)
            row |= _summary(ap, thresholds)
        rows.append(row)
    return rows


def _recall_of_first(truth, ranked, thresholds, times):
    """Return {"R@1x": {threshold: recall}, ...} for each k of `times`, as ActionFormer (Ego4D).

    Of a class with g ground truths in a video the first k g predictions there count; a ground truth
    is found if any of them has tIoU >= threshold. The mean over classes.
    """
    groups = [x.label * (len(truth.videos) + 1) + x.video + 1 for x in (truth, ranked)]
    order = np.argsort(groups[1], kind="stable")
    rank = np.empty(len(order))
    rank[order] = np.arange(len(order)) - np.searchsorted(groups[1][order], groups[1][order])
    p, t, overlap = _candidates(truth, ranked, min(thresholds), by_class=True)
    depth = rank[p] / np.bincount(groups[0])[groups[1][p]]
    recall = {}
    for k in times:
        row = recall[f"R@{k}x"] = {}
        for threshold in thresholds:
            found = np.zeros(len(truth.video))
            found[t[(depth < k) & (overlap >= threshold)]] = 1
            by_class = np.bincount(truth.label, found) / np.bincount(truth.label)
            row[f"{threshold:g}"] = float(by_class.mean())
    return recall


def _average_recall(truth, predicted, numbers, notes):
    """Return average recall against the average number of proposals a video, as ActivityNet does.

    Of every video the same fraction of its proposals is kept, such that the mean over the annotated
    videos is AN = 1, 2, ... to the largest of `numbers`, 100 in the official evaluation. The area
    under the curve ("AUC") is divided by that, hence in [0, 1].
    """
    rows = np.column_stack([predicted.video, predicted.segment])
    repeated = len(rows) - len(np.unique(rows, axis=0))
    if repeated and predicted.label is not None:
        note = f"{repeated} of {len(rows)} predictions repeat a segment (under another label?)"
        notes.append(f"{note}: AR@AN counts each, score the proposals themselves instead")
    annotated = np.unique(truth.video)
    order = np.argsort(predicted.video, kind="stable")
    bounds = np.searchsorted(predicted.video[order], np.arange(len(truth.videos) + 1))
    available = np.diff(bounds)[annotated]
    most = max(numbers)
    share = most * len(annotated) / max(len(order), 1)
    kept = np.minimum((available * share).astype(int), available)
    fraction = np.arange(1, most + 1) / most * (most * len(annotated) / max(kept.sum(), 1))
    # The highest tIoU among the proposals kept, by ground truth and AN.
    best = np.zeros((len(truth.video), most))
    # The ground truth is in the order of its videos.
    of_video = np.split(np.arange(len(truth.video)), np.flatnonzero(np.diff(truth.video)) + 1)
    for v, k, rows in zip(annotated, kept, of_video, strict=True):
        mine = order[bounds[v] : bounds[v + 1]]
        mine = mine[predicted.score[mine].argsort()[::-1]][:k]
        overlap = np.zeros((len(rows), k + 1))
        overlap[:, 1:] = tiou(truth.segment[rows], predicted.segment[mine])
        running = np.maximum.accumulate(overlap, 1)
        best[rows] = running[:, np.minimum((k * fraction).astype(int), k)]
    recall = np.mean([(best >= t).mean(0) for t in ACTIVITYNET_TIOU], 0)
    area = ((recall[1:] + recall[:-1]) / 2).sum() / most
    metrics = {"AN": list(range(1, most + 1)), "recall": recall.tolist(), "AUC": float(area)}
    return metrics | {f"AR@{k}": float(recall[k - 1]) for k in numbers}


# ---------------------------------------------------------------------------- evaluate and report


@without_gc()
def evaluate(
    gt: Source,
    pred: Source,
    *,
    subset="validation",
    thresholds=None,
    ar: bool | Sequence[int] = False,
    analysis=True,
    recall: Sequence[int] = (),
    interpolate=True,
) -> dict:
    """Score a result: mAP as ActivityNet's official evaluator, ties and zero lengths included.

    By class, the predictions of all videos take, best score first, the free ground truth of their
    video and class with the highest tIoU >= threshold; without one they are false positives, as in
    unknown videos. The tIoU of two zero lengths is undefined and a match. AP is the area under the
    interpolated precision-recall curve, mAP its mean over the subset's classes.
    Segments labelled Ambiguous are no ground truth (nor for AR) and no class. As in THUMOS14's
    TH14eventdetpr, a prediction of any class that takes no ground truth and overlaps one, by any
    tIoU above 0 whatever the threshold, is ignored: neither hit nor false positive.

    gt, pred: ground truth and result, paths or loaded JSON. thresholds: default 0.5:0.95:0.05
    (THUMOS14: 0.3:0.7:0.1). ar: also AR@AN, of proposals (only that, if no entry has a "label"), at
    1, 5, 10, 50, 100 or the AN given. analysis: also the kinds of errors and mAP by length. recall:
    for each k, that of the first k x g predictions of a class with g segments in a video.
    interpolate: False: AP is the sum of the precision at each hit over the number of ground truths,
    as THUMOS14 has it. Raises InputError for unusable input.
    Returns {"mAP": {"0.5": ...}, "average_mAP", "common": both over the videos with predictions,
    "AP": by class, "interpolated", "evaluated_videos", "class_source", "errors", "by_length",
    "recall", "AR", "warnings" (in the report, too), ...}; scores in [0, 1].
    """
    notes = []
    ar = (1, 5, 10, 50, 100) if ar is True else ar
    thresholds = _check_options(thresholds, {"AN": ar or (), "k of the recall": recall})
    truth = _read_ground_truth(*_load(gt, "ground truth"), subset, notes)
    data, name = _load(pred, "results")
    predicted = _read_predictions(data, name, truth, subset, ar, notes)
    source = "none (class-agnostic proposals)" if predicted.label is None else _class_source(data)
    metrics = {
        "subset": subset,
        "thresholds": thresholds.tolist(),
        "evaluated_videos": len(np.unique(predicted.video[predicted.video >= 0])),
        "ground_truth_videos": len(truth.videos),
        "segments": len(truth.video),
        "ambiguous": len(truth.ambiguous.video),
        "classes": len(truth.classes),
        "predictions": len(predicted.video),
        "unknown_videos": len(data["results"].keys() - {*truth.videos}),
        "class_source": str(source),
        "interpolated": bool(interpolate),
    }
    if predicted.label is not None:
        metrics = _score_detections(truth, predicted, thresholds, metrics, analysis, recall)
        if analysis and (untimed := np.isnan(truth.durations).sum()):
            notes.append(f"{untimed} of the videos lack a duration: no mAP by length")
    if ar:
        metrics["AR"] = _average_recall(truth, predicted, ar, notes)
    metrics["warnings"] = notes
    return metrics


def _class_source(result):
    """Return who made the classes of a result, as its external data say."""
    external = result.get("external_data")
    return external.get("class_source", "unknown") if isinstance(external, dict) else "unknown"


def _check_options(thresholds, counts):
    """Return the thresholds as an array; InputError for impossible ones, or counts below 1."""
    thresholds = np.asarray(ACTIVITYNET_TIOU if thresholds is None else thresholds, np.float64)
    possible = (thresholds > 0) & (thresholds <= 1)
    if thresholds.ndim != 1 or not thresholds.size or not possible.all():
        raise InputError(f"tIoU thresholds must be in (0, 1], got {thresholds.tolist()}")
    for name, numbers in counts.items():
        if not all(k in range(1, 10_001) for k in numbers):
            raise InputError(f"{name} must be whole numbers from 1 to 10000, got {[*numbers]}")
    return thresholds


def _score_detections(truth, predicted, thresholds, counts, analysis, recall):
    """Return mAP over all videos and over those with predictions, the counts, the analyses."""
    interpolate = counts["interpolated"]
    ranked, match, ap = _match_predictions(truth, predicted, thresholds, interpolate)
    common = ap
    if counts["evaluated_videos"] < len(truth.videos) or counts["unknown_videos"]:
        few = truth.take(np.isin(truth.video, predicted.video))
        known = predicted.take(predicted.video >= 0)
        common = _match_predictions(few, known, thresholds, interpolate)[2]
    metrics = _summary(ap, thresholds)
    metrics["common"] = _summary(common, thresholds)
    metrics |= counts
    metrics["AP"] = dict(zip(truth.classes, ap.mean(1).tolist(), strict=True))
    if recall:
        metrics["recall"] = _recall_of_first(truth, ranked, thresholds, recall)
    if analysis:
        metrics["errors"] = _errors(truth, ranked, match, thresholds)
        metrics["by_length"] = _by_length(truth, ranked, match, thresholds, interpolate)
    return metrics


def report(metrics: Mapping) -> str:
    """Return what `evaluate` returned as text."""
    m = metrics
    tables = []
    if "mAP" in m:
        kind = "" if m["interpolated"] else ", AP not interpolated,"
        rows = {"all videos": m, f"the {m['evaluated_videos']} with predictions": m["common"]}
        rows = {name: [*row["mAP"].values(), row["average_mAP"]] for name, row in rows.items()}
        tables.append(([f"mAP (%){kind} at tIoU", *m["mAP"], "average"], rows))
    if "recall" in m:
        rows = {name: row.values() for name, row in m["recall"].items()}
        tables.append((["recall (%) at tIoU", *m["mAP"]], rows))
    if "AR" in m:
        keys = [key for key in m["AR"] if key == "AUC" or key.startswith("AR@")]
        rows = {"proposals": [m["AR"][key] for key in keys]}
        tables.append((["AR@AN (%), tIoU 0.5:0.95:0.05", *keys], rows))
    if "errors" in m:
        parts = [m["errors"]["all"], m["errors"]["top_10G"]]
        totals = [max(sum(part.values()), 1) for part in parts]
        header = [f"predictions (%) at tIoU {m['errors']['tiou']:g}"]
        header += [f"all {totals[0]}", f"first 10 x ground truths of each class: {totals[1]}"]
        pairs = list(zip(parts, totals, strict=True))
        rows = {
            kind.replace("_", " "): [part[kind] / total for part, total in pairs]
            for kind in parts[0]
        }
        tables.append((header, rows))
    if "by_length" in m:
        rows = {}
        for row in m["by_length"]:
            values = [*row["mAP"].values(), row["average_mAP"]] if row["segments"] else []
            name = f"{row['from']:.1f} to {row['to']:.1f}: {row['segments']} segments"
            rows[name] = values or [None] * (len(m["mAP"]) + 1)
        tables.append((["mAP (%) by length / video", *m["mAP"], "average"], rows))
    text = f"evaluated {m['evaluated_videos']} of {m['ground_truth_videos']} ground-truth videos"
    text += f" of subset {m['subset']!r}: {m['predictions']} predictions, {m['segments']} segments"
    text += f", {m['classes']} classes\nclass labels from: {m['class_source']}"
    if m["ambiguous"]:
        text += f"\nambiguous, hence no segment of these, and no error there: {m['ambiguous']}"
    for header, rows in tables:
        cells = [[name, *map(percent, row)] for name, row in rows.items()]
        text += f"\n\n{markdown_table(header, cells)}"
    return "\n".join([text, *(f"\nwarning: {note}" for note in m["warnings"])])


def percent(x: float | None) -> str:
    """Return a fraction as a percentage with two digits, "-" for None."""
    return "-" if x is None else f"{100 * x:.2f}"


def markdown_table(header: Iterable, rows: Iterable[Iterable]) -> str:
    """Return Markdown that also reads well on a screen: first column left, the others right."""
    table = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rules = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    lines = []
    for first, *others in table:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([lines[0], "|" + "|".join(rules) + "|", *lines[1:]])


def _thresholds(text):
    """Read LOW:HIGH:STEP with HIGH on a step, or a list with commas. Raises ValueError."""
    if ":" not in text:
        return np.array(text.split(","), dtype=np.float64)
    low, high, step = map(float, text.split(":"))
    count = round((high - low) / step) if step else 0
    if abs(low + count * step - high) > 1e-6:
        raise ValueError
    return np.linspace(low, high, count + 1)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Score a result.")
    add = parser.add_argument
    add("--gt", required=True, help="annotations, ActivityNet JSON")
    add("--pred", required=True, help="result JSON")
    add("--subset", default="validation", help="default: %(default)s")
    tiou_help = "LOW:HIGH:STEP or a list (default: 0.5:0.95:0.05; THUMOS14: 0.3:0.7:0.1)"
    add("--tiou", type=_thresholds, default=ACTIVITYNET_TIOU, help=tiou_help)
    add("--ar", nargs="*", type=int, metavar="AN", help="also AR@AN, for proposals, at such AN")
    add("--recall", nargs="+", type=int, default=(), metavar="K", help="also R@Kx, as Ego4D has it")
    add("--no-interpolation", action="store_true", help="AP as THUMOS14 has it")
    add("--json", metavar="FILE", help="write the numbers at full precision")
    args = parser.parse_args(argv)
    try:
        refuse_to_replace(args.json, f'{{\n "made_by": "{MARK}')
        options = {"subset": args.subset, "thresholds": args.tiou, "recall": args.recall}
        options |= {"ar": args.ar == [] or args.ar, "interpolate": not args.no_interpolation}
        metrics = evaluate(args.gt, args.pred, **options)
        if args.json:
            write_json({"made_by": MARK, **metrics}, args.json, indent=1)
    except InputError as error:
        sys.exit(f"{parser.prog}: {error}")
    # Last: a reader that is gone, as `| head` may be, ends the program here.
    print(report(metrics))


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # Names in letters that the terminal lacks are no reason to fail.
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")
    main()
