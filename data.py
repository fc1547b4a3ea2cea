"""Annotations, snippets, fidelities, frames and features: everything between the disk and the encoder or the head.

    python data.py check --cfg configs/anet13.yaml                     what there is, what is missing, every problem to a file
    python data.py prepare --videos DIR --annotations JSON --out DIR   video files -> one ZIP of JPEG frames a video

On disk:
    ANNOTATIONS.json    ActivityNet JSON: {"database": {VIDEO: {"subset", "duration", "annotations": [{"segment": [start, end], "label"}]}}},
                        seconds; a duration that is missing, as in THUMOS14, is taken from the media
    FRAMES/VIDEO.zip    prepared frames, or folders of JPEG frames, or video files: see media.py
    FEATURES/VIDEO.npy  (L, C), any L; or FEATURES/VIDEO.h5, or one HDF5 file for all videos

VIDEO may be spelt with v_ in one place and without in another.
In memory: frames (L, T, 3, H, W) uint8, features (C, L), segments (N, 2) as fractions of the video, in [0, 1].
Legend: B videos, C channels, L snippets, T frames a snippet, N segments, F frames.
"""
import argparse
import copy
import json
import math
import os
import signal
import sys
import threading
import weakref
from array import array
from collections.abc import Sequence
from functools import lru_cache, partial
from hashlib import blake2b, sha256
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate
from tqdm import tqdm

import media
from media import snippet_frames


def seed_of(*key):
    """A 63-bit seed that is a pure function of `key`: (seed, epoch, step, ...). All randomness of a run hangs on such seeds,
    so that a resumed run draws what an undisturbed one draws, with no random state to store."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


# ---------------------------------------------------------------- annotations

class Video(NamedTuple):
    name: str
    duration: float  # seconds
    segments: torch.Tensor  # (N, 2), fractions of the video, clipped to [0, 1]
    labels: tuple  # N class names
    path: str | None = None  # of its media, where select found any


class Strings:
    """Strings in two arrays. A list would hold an object each, and counting references to it would copy its page into every loader worker."""

    def __init__(self, strings):
        encoded = [s.encode(errors="surrogatepass") for s in strings]
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        i = range(len(self))[i]
        return self.bytes[self.ends[i]:self.ends[i + 1]].tobytes().decode(errors="surrogatepass")


class Videos(Sequence):
    """Many videos in a few arrays: videos[i] is a Video, made when asked for; its segments are clipped, empty ones left out.

    names: V Strings; duration: (V,) seconds, NaN where unknown; rows: (V + 1,), video i has the segments rows[i]:rows[i + 1]; segments: (N, 2)
    seconds, as they stand in the file; labels: (N,) into classes; paths: V Strings or None.
    """

    def __init__(self, names, duration, rows, segments, labels, classes, paths=None):
        self.names, self.duration, self.rows, self.segments = names, np.asarray(duration, np.float64), np.asarray(rows, np.int64), segments
        self.labels, self.classes, self.paths = np.asarray(labels, np.int32), classes, paths

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return self.take(range(len(self))[i])
        i = range(len(self))[i]
        if math.isnan(self.duration[i]):
            raise ValueError(f"video {self.names[i]} has no duration in the annotations, and none was found elsewhere: set data.durations")
        rows = slice(self.rows[i], self.rows[i + 1])
        segments, keep = fractions(self.segments[rows], self.duration[i])
        labels = tuple(self.classes[k] for k in self.labels[rows][keep])
        return Video(self.names[i], float(self.duration[i]), torch.from_numpy(segments[keep]), labels, self.paths[i] if self.paths else None)

    def take(self, index, duration=None, paths=None):
        """Those at `index`, a sequence of numbers; with other durations and paths, if they are given."""
        index = np.asarray(index, np.int64)
        count = (self.rows[1:] - self.rows[:-1])[index]
        ends = np.cumsum(count)
        rows = np.arange(count.sum()) + np.repeat(self.rows[index] - (ends - count), count)
        if paths is None and self.paths:
            paths = [self.paths[i] for i in index]
        return Videos(Strings(self.names[i] for i in index), self.duration[index] if duration is None else duration, np.concatenate([[0], ends]),
                      self.segments[rows], self.labels[rows], self.classes, paths and Strings(paths))

    def owners(self):
        """Which video each segment belongs to: (N,)."""
        return np.repeat(np.arange(len(self)), np.diff(self.rows))


def fractions(segments, duration):
    """Segments in seconds -> fractions of the video, clipped to [0, 1], (N, 2) float32, and which of them are not empty, (N,)."""
    with np.errstate(invalid="ignore"):
        clipped = (segments / np.asarray(duration)[..., None]).clip(0, 1).astype(np.float32)
        return clipped, (clipped[:, 1] > clipped[:, 0]) & np.isfinite(segments).all(1)


def without_repeats(pairs):
    """The dictionary of a JSON object. json.load alone would let the last of several equal keys win, so that videos vanish."""
    known = dict(pairs)
    if len(known) < len(pairs):
        keys = [k for k, _ in pairs]
        raise ValueError(f"{next(k for k in keys if keys.count(k) > 1)!r} stands there more than once")
    return known


def load_annotations(path):
    """Reads an ActivityNet JSON: {subset: Videos}, in the file's order, each with its segments in seconds as they stand there.

    Raises FileNotFoundError or ValueError with what is wrong and where.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no annotation file {path}: set data.annotations, or make the toy data with `python toy.py --out data/toy`")
    with open(path, "rb") as f:
        try:
            database = json.load(f, object_pairs_hook=without_repeats)["database"]
            database.items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no ActivityNet annotation file: expected JSON {{'database': {{VIDEO: {{'subset', 'duration', "
                             f"'annotations'}}}}}}, reading it failed with {type(error).__name__}: {error}") from None
    classes, subsets = {}, {}
    for name, entry in database.items():
        try:
            duration = math.nan if entry.get("duration") is None else float(entry["duration"])
            if not (math.isnan(duration) or 0 < duration < math.inf):
                raise ValueError(f"duration {duration}")
            segments = [(float(start), float(end)) for start, end in (a["segment"] for a in entry["annotations"])]
            if any(a["label"] is None for a in entry["annotations"]):
                raise ValueError("label null")
            labels = [classes.setdefault(str(a["label"]), len(classes)) for a in entry["annotations"]]
            names, durations, rows, flat, flat_labels = subsets.setdefault(entry["subset"], ([], [], [0], array("d"), array("i")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: video {name!r} needs a subset, annotations with segment [start, end] and label, and a duration > 0 if it has one; "
                             f"found {json.dumps(entry)[:200]} ({type(error).__name__}: {error})") from None
        names.append(name)
        durations.append(duration)
        for segment in segments:
            flat.extend(segment)
        flat_labels.extend(labels)
        rows.append(len(flat_labels))
    del database
    return {subset: Videos(Strings(names), durations, rows, np.frombuffer(flat, np.float64).reshape(-1, 2), np.frombuffer(flat_labels, np.int32), tuple(classes))
            for subset, (names, durations, rows, flat, flat_labels) in subsets.items()}


CONSEQUENCES = {"segment is not a number": "left out of training; evaluation refuses them", "segment ends before it starts": "left out",
                "segment outside the video": "clipped to it, and left out if nothing remains", "segment twice": "kept, as the official evaluation does", "label Ambiguous": "a class like any other here; THUMOS14's evaluation ignores it"}


def segment_problems(videos):
    """{problem: the segments that have it, row numbers}, for the keys of CONSEQUENCES. Up to 10 ms behind the end is no problem."""
    (start, end), owner = videos.segments.T, videos.owners()
    finite = np.isfinite(videos.segments).all(1)
    order = np.lexsort((videos.labels, end, start, owner))
    rows = np.stack([owner, start, end, videos.labels], 1)[order]
    ambiguous = [i for i, c in enumerate(videos.classes) if c.lower() == "ambiguous"]
    return {"segment is not a number": np.flatnonzero(~finite), "segment ends before it starts": np.flatnonzero(finite & (end <= start)),
            "segment outside the video": np.flatnonzero(finite & (end > start) & ((start < 0) | (end > videos.duration[owner] + 0.01))),
            "segment twice": np.sort(order[1:][(rows[1:] == rows[:-1]).all(1)]), "label Ambiguous": np.flatnonzero(np.isin(videos.labels, ambiguous))}


def names_of(videos):
    return list(videos.names) if isinstance(videos, Videos) else [v.name for v in videos]


def list_hash(names):
    """Tells one list of videos from another, so that two numbers are known to be of the same videos."""
    return blake2b("\n".join(sorted(names)).encode(), digest_size=8).hexdigest()


def fingerprint(items):
    """{"count", "hash"} of videos, with their durations, segments and labels, or of clips: tells training data from others; not where they lie."""
    digest = blake2b(digest_size=8)
    if isinstance(items, Videos):
        words = [*items.names, *(items.classes[k] for k in items.labels)]
        for numbers in (items.duration, items.rows, items.segments):
            digest.update(np.ascontiguousarray(numbers).tobytes())
    else:
        words = [repr((*item._replace(path=os.path.splitext(os.path.basename(item.path or ""))[0]),)) for item in items]
    digest.update("\n".join(words).encode(errors="surrogatepass"))
    return {"count": len(items), "hash": digest.hexdigest()}


def file_hash(path):
    with open(path, "rb") as f:
        return sha256(f.read()).hexdigest()


def facts_of_features(source):
    """What the features.json say that lie in a folder of features, beside an HDF5 file, or with each of a list of these: dictionaries, of those that exist."""
    paths = [f"{s if os.path.isdir(s) else os.path.dirname(s) or '.'}/features.json" for s in (source if isinstance(source, (list, tuple)) else [source])]
    return [json.load(open(path)) for path in dict.fromkeys(paths) if os.path.exists(path)]  # two files in one folder share one


def describe(videos):
    """{name: {"duration_sec", "fps"}}, to stand beside their features; the frame rate of what is not prepared, which takes reading all of it, is null."""
    return {v.name: {"duration_sec": v.duration, "fps": media.FrameZip(v.path).fps if (v.path or "").endswith(".zip") else None} for v in videos}


def class_names(videos):
    """The labels of some videos, sorted."""
    if isinstance(videos, Videos):
        _, keep = fractions(videos.segments, np.nan_to_num(videos.duration, nan=1e9)[videos.owners()])
        return sorted(videos.classes[k] for k in np.unique(videos.labels[keep]))
    return sorted({label for v in videos for label in v.labels})


def class_target(video, classes):
    """What a video classifier is trained towards, (n,): equal shares for the video's classes; zeros if it has none of them."""
    target = torch.tensor([float(c in video.labels) for c in classes])
    return target / target.sum().clamp(min=1)


def find(source, kind, names):
    """Where the frames (kind "frames") or features ("features") of some videos lie: {name: path}, for those that have any."""
    return media.find_media(source, names) if kind == "frames" else find_features(source, names)


def check_segments(subsets, train=None, val=None, classes=False):
    """ValueError if subset `train` has no segment that can be trained on, or `val` one that evaluation refuses, a NaN, or none though its `classes` are wanted."""
    if train in subsets and not class_names(subsets[train]):
        raise ValueError(f"subset {train} has {len(subsets[train])} videos and no segment that can be trained on: expected one that ends after it starts, within its video")
    if classes and val in subsets and not len(subsets[val].segments):
        raise ValueError(f"detect.classes_from is ground_truth, but subset {val} has no segments to take classes from")
    if val in subsets and len(bad := np.flatnonzero(~np.isfinite(subsets[val].segments).all(1))):
        names = names_of(subsets[val])
        raise ValueError(f"subset {val} has {len(bad)} segments that are NaN or infinite, first in video {names[subsets[val].owners()[bad[0]]]}: evaluation needs numbers, take them out")


def settings_of(cfg):
    """What frames should have been prepared for, of the config's block `data`: snippets, or rate, and frames and stride."""
    return {**({"rate": cfg.rate} if cfg.rate else {"snippets": cfg.snippets, "rate": None}), "frames": cfg.frames_per_snippet, "stride": cfg.stride}


def select(subsets, subset, source, kind, say=print, *, durations=None, frames=None, settings=None):
    """The videos of one subset that have what training needs; the others are counted, named through `say` and left out.

    kind: "frames", in folder `source`; or "features", in the folder or HDF5 file `source`, or in each of a list of them.
    durations: a JSON {video: seconds} for videos whose annotation has none. Without one, theirs come from their frames, here or in the folder
    `frames`, or from the features.json beside their features. settings: see settings_of; says so if frames were prepared for others, going by the first ZIP.
    ValueError if the subset does not exist or nothing of it is left.
    """
    if subset not in subsets:
        raise ValueError(f"no video of subset {subset!r} in the annotations, which have {sorted(subsets)}: set data.train_subset, data.val_subset")
    videos = subsets[subset]
    names, sources = names_of(videos), source if isinstance(source, (list, tuple)) else [source]
    found = [find(s, kind, names) for s in sources]
    index = [i for i, name in enumerate(names) if all(name in f for f in found)]
    where = " and ".join(map(str, sources))
    if not index:
        expected = "a .zip of frames, a folder of JPEG frames or a video file" if kind == "frames" else "a .npy file or HDF5 entry (L, C)"
        raise ValueError(f"none of the {len(names)} {subset} videos has {kind} in {where}: expected, say, {expected} of the name {names[0]}")
    left_out(say, f"{subset}: {len(names) - len(index)} of {len(names)} videos have no {kind} in {where}", names, set(range(len(names))).difference(index))
    duration = videos.duration[index]
    if np.isnan(duration).any():
        paths = found[0] if kind == "frames" else media.find_media(frames, names) if frames else None
        duration = fill_durations([names[i] for i in index], duration, told=durations, source=sources[0] if kind == "features" else None, paths=paths)
        unknown = np.isnan(duration)
        left_out(say, f"{subset}: {unknown.sum()} of {len(index)} videos have no duration", names, np.asarray(index)[unknown])
        index, duration = np.asarray(index)[~unknown], duration[~unknown]
        if not len(index):
            raise ValueError(f"none of the {len(unknown)} {subset} videos has a duration, in the annotations or elsewhere: set data.durations to a JSON "
                             "{video: seconds}, or data.frames to their frames or video files")
    videos = videos.take(index, duration, [found[0][names[i]] for i in index])
    if kind == "frames" and settings and (path := next((p for p in videos.paths if p.endswith(".zip")), None)):
        first = media.FrameZip(path)
        if first.prepared and len(first.kept) < first.num_frames and {k: first.prepared.get(k) for k in settings} != settings:
            say(f"{subset}: {path} was prepared for {first.prepared}, this config asks for {settings}: the nearest frames that it keeps are taken, which blurs time; prepare anew")
    problems = {k: len(rows) for k, rows in segment_problems(videos).items() if len(rows)}
    if problems:
        say(f"{subset}: " + ", ".join(f"{n} x {k} ({CONSEQUENCES[k]})" for k, n in problems.items()) + "; `python data.py check` lists them")
    return videos


def left_out(say, words, names, index):
    """Says that the videos at `index`, if any, are left out."""
    index = sorted(index)
    if index:
        say(f"{words} and are left out: " + ", ".join(names[i] for i in index[:10]) + (" ..." if len(index) > 10 else ""))


def fill_durations(names, duration, *, told=None, source=None, paths=None):
    """(V,) seconds with the gaps (NaN) of `duration` filled, where that can be done: from the JSON file `told` {video: seconds}, else from the
    features.json beside the features in `source`, else from media, paths {name: path}."""
    about = {}
    if told is not None:
        try:
            with open(told) as f:
                about = {name: float(seconds) for name, seconds in json.load(f).items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{told} cannot be read as durations ({type(error).__name__}: {error}): expected JSON {{VIDEO: seconds}}") from None
    elif source is not None:
        about = {name: video["duration_sec"] for facts in facts_of_features(source) for name, video in facts.get("videos", {}).items()}
    out = duration.copy()
    for i in np.flatnonzero(np.isnan(duration)).tolist():
        seconds = next((about[s] for s in media.spellings(names[i]) if s in about), None)
        if seconds is None and paths and names[i] in paths:
            seconds = media_duration(paths[names[i]])
        out[i] = math.nan if seconds is None else float(seconds)
    return out


@lru_cache(None)
def media_duration(path):
    """Seconds, or None if the media does not tell or cannot be opened; looked up once a process."""
    try:
        return media.open_media(path).duration
    except ValueError:
        return None


# ---------------------------------------------------------------- fidelities

class Fidelity(NamedTuple):
    name: str
    snippets: int  # L
    size: int  # H = W, pixels


NATIVE = Fidelity("native", None, None)  # features as long as they are on disk; batches of one video


def fidelities(snippets, size, *, r_t=4.0, r_s=2.0, st=(2.0, math.sqrt(2))):
    """Full, spatial, temporal and spatio-temporal fidelity (LoFi, section 3.2, equations 1-4) as {name: Fidelity}.

    S divides both sides of the frame by r_s, T the number of snippets by r_t, ST does both by `st` = (r_t, r_s). The paper's values,
    which are the defaults, keep the memory of a video the same: 100 x 112, 25 x 224 and 50 x 158 of 100 x 224 (snippets x pixels).
    """
    if snippets / max(r_t, st[0]) < 1 or size / max(r_s, st[1]) < 1 or min(r_t, r_s, *st) < 1:
        raise ValueError(f"factors r_t {r_t}, r_s {r_s}, ST {st} must be at least 1 and leave a snippet and a pixel of {snippets} x {size}")
    return {f.name: f for f in (
        Fidelity("full", snippets, size),
        Fidelity("S", snippets, round(size / r_s)),
        Fidelity("T", round(snippets / r_t), size),
        Fidelity("ST", round(snippets / st[0]), round(size / st[1])))}


class CyclicFidelitySampler:
    """Batches of (index, Fidelity) pairs, all of a batch at one fidelity: LoFi, section 3.2 (IV).

    fidelities: the cycle, in order; one alone is S-, T- or ST-LoFi. cycle "long" moves on every `period` epochs (c_l), "short" every
    `period` batches (c_s). What a step brings is a pure function of (seed, epoch, step, rank, world): every rank has the same fidelity at
    the same step and the same number of steps; each video comes once an epoch, up to padding of the last batch with the epoch's first.
    together: so many that follow each other stay together in the shuffled order.
    Pass it to DataLoader as batch_sampler; `set_epoch(epoch, step)` before an epoch, with the step to resume at.
    """

    def __init__(self, num_videos, batch_size, fidelities, *, cycle="long", period=1, seed=0, rank=0, world=1, shuffle=True, together=1):
        if num_videos < 1:
            raise ValueError("no videos to sample from")
        if cycle not in ("long", "short") or period < 1:
            raise ValueError(f"cycle {cycle!r} with period {period}: expected 'long' or 'short', and a period of at least 1")
        if batch_size % world:
            raise ValueError(f"the global batch size {batch_size} cannot be divided evenly over {world} processes")
        self.num_videos, self.batch_size, self.fidelities = num_videos, batch_size, list(fidelities)
        if num_videos % together:
            raise ValueError(f"{num_videos} samples cannot be kept together in groups of {together}")
        self.cycle, self.period, self.seed, self.rank, self.world, self.shuffle, self.together = cycle, period, seed, rank, world, shuffle, together
        self.steps = math.ceil(num_videos / batch_size)  # an epoch
        self.set_epoch(0)

    def set_epoch(self, epoch, step=0):
        self.epoch, self.first = epoch, step

    def fidelity(self, epoch, step):
        position = epoch if self.cycle == "long" else epoch * self.steps + step
        return self.fidelities[position // self.period % len(self.fidelities)]

    def __len__(self):
        return self.steps - self.first

    def __iter__(self):
        order = torch.arange(self.num_videos)
        if self.shuffle:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "order", self.epoch))
            order = torch.randperm(self.num_videos // self.together, generator=generator)[:, None] * self.together + torch.arange(self.together)
            order = order.flatten()
        order = order.repeat(math.ceil(self.steps * self.batch_size / self.num_videos)).tolist()
        own = self.batch_size // self.world
        for step in range(self.first, self.steps):
            first = step * self.batch_size + self.rank * own
            yield [(i, self.fidelity(self.epoch, step)) for i in order[first:first + own]]


# ---------------------------------------------------------------- frames

def snippet_rows(full, snippets, shift=0.0):
    """Which of the `full` snippets stand for fewer, evenly spread ones: (L,) int64. With an even ratio the middle falls between two
    snippets: shift 0 takes the later, 0.5 the earlier."""
    return ((torch.arange(snippets, dtype=torch.float64) + 0.5) * full / snippets - shift).floor().clamp(0, full - 1).long()


def square(h, w, ratio=1.0, corner=(0.5, 0.5)):
    """Top, left and side of a square crop of `ratio` times the short side; corner: where it lies, (y, x) in [0, 1]; (0.5, 0.5) is the centre."""
    side = round(min(h, w) * ratio)
    return round(corner[0] * (h - side)), round(corner[1] * (w - side)), side


def crop_resize(frames, size, ratio, corner=(0.5, 0.5), flip=False):
    """A square crop of `ratio` times the short side, resized to size x size: (F, 3, H, W) uint8 -> (F, 3, size, size) uint8.

    corner: where the crop lies, (y, x) in [0, 1]; (0.5, 0.5) is the centre. The same for all frames.
    """
    y, x, side = square(*frames.shape[2:], ratio, corner)
    frames = frames[:, :, y:y + side, x:x + side]
    if side != size:
        frames = interpolate(frames, (size, size), mode="bilinear", antialias=True)
    return frames.flip(3) if flip else frames


def read_view(source, numbers, size, ratio, corner, flip, out=None):
    """Frames of a media object as crop_resize makes them, each cropped when it is decoded: (F, 3, size, size) uint8; out: memory for them, channels last."""
    places = {}

    def view(frame):  # (H, W, 3) array
        y, x, side = places.get(frame.shape) or places.setdefault(frame.shape, square(*frame.shape[:2], ratio, corner))
        frame = frame[y:y + side, x:x + side]
        if side != size:
            frame = interpolate(torch.from_numpy(frame).permute(2, 0, 1)[None], (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
        return torch.from_numpy(frame).flip(1).numpy() if flip else frame
    return source.read(numbers, short_side=size / ratio, view=view, out=out)


_spare = threading.local()


def pixels(count):
    """(count,) uint8 to decode frames into: the memory of an earlier batch that nobody holds any more, or new. For the kernel to hand out and clear
    new memory takes a tenth of the time that decoding into it does."""
    kept = _spare.__dict__.setdefault("kept", [])  # (array, weak reference to what was given away of it)
    free = next((k for k, (array, user) in enumerate(kept) if array.size >= count and user() is None), None)
    array = np.empty(count, np.uint8) if free is None else kept.pop(free)[0]
    given = array[:count]  # alive as long as any tensor made of it
    kept[:] = [(array, weakref.ref(given)), *kept[:1]]
    return torch.from_numpy(given)


class VideoDataset:
    """Untrimmed videos: dataset[index, fidelity] -> {"name", "frames" (L, T, 3, H, W) uint8, "segments" (N, 2), "target" (n,)}.

    Training takes one random crop, flip and snippet phase a video, a pure function of (seed, epoch, index); else all are central.
    rate: snippets a second; then a video has as many as its duration asks for. Training takes windows of `snippets` of them that have a segment; else
    a video comes in pieces of at most `snippets`, one after the other, of which the last says so: "last".
    """

    def __init__(self, videos, folder, *, classes=(), snippets, frames, stride, crop=0.875, flip=True, train=False, seed=0, rate=None):
        self.videos, self.folder, self.classes, self.train, self.seed = videos, folder, list(classes), train, seed
        self.snippets, self.frames, self.stride, self.crop, self.flip, self.rate = snippets, frames, stride, crop, flip, rate
        self.items = self.items_of(videos)
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that live on

    def count(self, video):
        """Snippets of a video at full fidelity."""
        return max(round(video.duration * self.rate), 1) if self.rate else self.snippets

    def items_of(self, videos):
        """(video, first snippet) of each sample, (n, 2) int64; None without a rate: each video is a sample."""
        if self.rate and self.train:
            return windows_with_segments(videos, (self.count(v) for v in videos), self.snippets)
        return np.array([(i, first) for i, v in enumerate(videos) for first in range(0, self.count(v), self.snippets)], np.int64).reshape(-1, 2) if self.rate else None

    def only(self, index):
        """The same of the videos at `index` alone."""
        other = copy.copy(self)
        other.videos = self.videos.take(index) if isinstance(self.videos, Videos) else [self.videos[i] for i in index]
        other.items = other.items_of(other.videos)
        return other

    def share(self, rank, world):
        """The samples of every world-th video, in order."""
        return range(rank, len(self), world) if self.items is None else np.flatnonzero(self.items[:, 0] % world == rank).tolist()

    def set_epoch(self, epoch):
        self.epoch.fill_(epoch)

    def __len__(self):
        return len(self.videos) if self.items is None else len(self.items)

    def __getitem__(self, pair):
        return self.__getitems__([pair])[0]

    def __getitems__(self, pairs):
        """The samples of a batch, as a DataLoader asks for them. Their frames lie side by side in memory, channels last, so that collate need not copy them."""
        plans = [self._plan(*pair) for pair in pairs]
        shapes = [(*numbers.shape, f.size, f.size, 3) for (_, f), (_, numbers, _) in zip(pairs, plans)]
        for (sample, numbers, read), shape, memory in zip(plans, shapes, pixels(sum(map(math.prod, shapes))).split([*map(math.prod, shapes)])):
            read(numbers.flatten().numpy(), out=memory.view(-1, *shape[2:]))
            sample["frames"] = memory.view(shape).movedim(-1, 2)
        return [sample for sample, *_ in plans]

    def _plan(self, index, fidelity):
        """A sample but for its frames, the numbers of these, (L, T), and read_view with all but them."""
        i, first = (index, 0) if self.items is None else self.items[index].tolist()
        video = self.videos[i]
        source = media.open_media(video.path or f"{self.folder}/{video.name}.zip")
        shift, corner, flip = 0.0, (0.5, 0.5), False
        if self.train:
            rng = np.random.default_rng(seed_of(self.seed, "view", int(self.epoch), index))
            shift, corner, flip = rng.choice([0.0, 0.5]), tuple(rng.random(2).tolist()), bool(self.flip and rng.random() < 0.5)
        count, length = self.count(video), self.snippets
        numbers = snippet_frames(source.num_frames, count, self.frames, self.stride)[first:first + length]
        if self.items is not None and self.train:
            video = in_window(video, count, first, length)
            numbers = numbers[torch.arange(length).clamp(max=len(numbers) - 1)]  # beyond a short video its last snippet
        if self.items is None or self.train:
            numbers = numbers[snippet_rows(length, fidelity.snippets, shift)]
        sample = {"name": video.name, "segments": video.segments, "target": class_target(video, self.classes), "last": first + length >= count}
        return sample, numbers, partial(read_view, source, size=fidelity.size, ratio=self.crop, corner=corner, flip=flip)


class Clip(NamedTuple):
    path: str
    start_sec: float  # a trimmed clip: 0
    end_sec: float  # a trimmed clip: inf
    label: int
    duration_sec: float | None = None  # of the whole video, as annotated: times are then parts of it, as in every stage; None: its media tell their frame rate
    play: str = "forward"  # see clip_frames


def clip_frames(first, end, frames, stride, where=0.5, play="forward"):
    """Frame numbers of T frames, `stride` apart, of a clip that lasts from frame `first` to `end`: (T,) int64, clamped to the clip.

    where: 0 the earliest, 1 the latest in the clip. play: "forward", "reversed", "normal" or "double" speed, of which the last takes every second
    frame of the one before. In a clip too short for T frames at double speed the stride is made smaller for both, so that clamping does not
    give the answer away; ValueError if the clip has less than 2 T frames.
    """
    if play in ("normal", "double"):
        stride = min(stride, int((end - first) // (2 * frames)))
        if stride < 1:
            raise ValueError(f"{end - first:g} frames are too few for {frames} at double speed: expected at least {2 * frames}; leave the clip out, or take fewer frames")
        stride *= 2 if play == "double" else 1
    slack = max(end - first - frames * stride, 0)
    numbers = np.floor(first + where * slack + (np.arange(frames) + 0.5) * stride).clip(first // 1, max(math.ceil(end) - 1, 0)).astype(np.int64)
    return numbers[::-1].copy() if play == "reversed" else numbers


def list_clips(folder, suffix=None, classes=None):
    """FOLDER/CLASS/*suffix, or any media of these folders, -> ([Clip, ...], [class names]), sorted. ValueError if there are none, or others than `classes`."""
    found = sorted(d.name for d in os.scandir(folder) if d.is_dir()) if os.path.isdir(folder) else []
    classes = found if classes is None else classes
    if not set(found) <= set(classes):
        raise ValueError(f"{folder} has classes that the training clips lack: {sorted(set(found) - set(classes))[:10]}")
    clips = [Clip(path, 0.0, math.inf, classes.index(c)) for c in found for path in (
             [f"{folder}/{c}/{f}" for f in sorted(os.listdir(f"{folder}/{c}")) if f.endswith(suffix)] if suffix else media.find_media(f"{folder}/{c}").values())]
    if not clips:
        raise ValueError(f"no {suffix or 'video'} file in {folder}/CLASS/: name a folder with one sub-folder a class")
    return clips, classes


def segment_clips(videos, folder, classes):
    """The annotated segments of untrimmed videos as clips to classify (LoFi, section 4.2: ACP+); those of other classes are left out."""
    return [Clip(v.path or f"{folder}/{v.name}.zip", *(v.segments[i] * v.duration).tolist(), classes.index(label), v.duration)
            for v in videos for i, label in enumerate(v.labels) if label in classes]


class ClipDataset:
    """Trimmed clips: dataset[index, fidelity] -> {"name", "frames" (1, T, 3, H, W) uint8, "label" int}.

    Training takes T frames, `stride` apart, at a random time within the clip, at a random crop and flip, the same for `together` clips that follow each
    other; else all are central.
    """

    def __init__(self, clips, *, frames, stride, crop=0.875, flip=True, train=False, seed=0, together=1):
        self.clips, self.frames, self.stride, self.crop, self.flip = clips, frames, stride, crop, flip
        self.train, self.seed, self.together = train, seed, together
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    set_epoch = VideoDataset.set_epoch

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, pair):
        index, fidelity = pair
        clip = self.clips[index]
        source = media.open_media(clip.path)
        whole = (clip.start_sec, clip.end_sec) == (0, math.inf)
        fps = source.num_frames / clip.duration_sec if clip.duration_sec else 1.0 if whole else source.fps
        if not fps:
            raise ValueError(f"{clip.path} tells no frame rate, so where are {clip.start_sec:g} to {clip.end_sec:g} s? Put a video.json with fps beside its frames")
        where, corner, flip = 0.5, (0.5, 0.5), False
        if self.train:
            rng = np.random.default_rng(seed_of(self.seed, "view", int(self.epoch), index // self.together))
            where, corner, flip = rng.random(), tuple(rng.random(2).tolist()), bool(self.flip and rng.random() < 0.5)
        first, end = clip.start_sec * fps, min(clip.end_sec * fps, source.num_frames)
        if not first < end:
            raise ValueError(f"{clip.path}: a clip from {clip.start_sec:g} to {clip.end_sec:g} s, of a video of {source.num_frames / fps:g} s, has no frame: "
                             "correct its times")
        try:
            numbers = clip_frames(first, end, self.frames, self.stride, where, clip.play)
        except ValueError as error:
            raise ValueError(f"{clip.path}: {error}") from None
        frames = read_view(source, numbers, fidelity.size, self.crop, corner, flip)
        return {"name": clip.path, "frames": frames[None], "label": clip.label}


# ---------------------------------------------------------------- features

def open_hdf5(path):
    try:
        import h5py
    except ImportError:
        raise ValueError(f"{path} is an HDF5 file, which needs h5py: pip install h5py") from None
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}): expected an HDF5 file of arrays (L, C)") from None


def find_features(source, names):
    """Where the features of some videos lie, {name: path} for those that have any: SOURCE/VIDEO.npy, .h5 or .hdf5, or FILE\0VIDEO in one HDF5 file."""
    found = {}
    if os.path.isdir(source):
        for entry in os.scandir(source):
            stem, suffix = os.path.splitext(entry.name)
            if suffix in (".npy", ".h5", ".hdf5"):
                found[stem] = min(found.get(stem, entry.path), entry.path, key=lambda path: not path.endswith(".npy"))
    elif os.path.isfile(source):
        with open_hdf5(source) as f:
            found = {key: f"{source}\0{key}" for key in f}
    return {name: found[s] for name in names for s in media.spellings(name)[::-1] if s in found}


def shown(path):
    return path.replace("\0", ":")


def read_features(path, values=True):
    """The features of one video as find_features names them: (L, C), memory-mapped if it is an .npy file. ValueError if they cannot be read.

    values: False if only their shape is wanted: an HDF5 file's are then not read, but zeros."""
    file, _, key = path.partition("\0")
    try:
        if file.endswith(".npy"):
            features = np.load(file, mmap_mode="r")
        else:
            with open_hdf5(file) as f:  # opened for each video: a loader's workers must not share one that was open when they were forked
                node = f[key] if key else f
                while hasattr(node, "keys"):  # a file or group of one array
                    if len(node) != 1:
                        raise ValueError(f"{len(node)} entries instead of one array: {list(node)[:5]}")
                    node = node[next(iter(node))]
                features = node[()] if values else np.broadcast_to(np.zeros((), node.dtype), node.shape)
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise ValueError(f"{shown(path)} cannot be read ({error}): expected an .npy or HDF5 array (L, C)") from None
    if features.ndim != 2 or not features.shape[0] or not np.issubdtype(features.dtype, np.floating):
        raise ValueError(f"{shown(path)} has shape {features.shape}, {features.dtype}; expected floating-point features (L, C), snippets first")
    return features


def finite(x, path):
    if not np.isfinite(x).all():
        raise ValueError(f"{shown(path)} has NaN or infinite features: extract this video again")
    return x


class FeatureDataset:
    """Features: dataset[index, fidelity] -> {"name", "features" (C, L) float32, "segments" (N, 2), "target" (n,) class distribution}.

    source: a folder or HDF5 file of features, or a list of them, whose channels are put side by side, each resized to the wanted L.
    """

    def __init__(self, videos, source, classes):
        self.videos, self.classes = videos, classes
        sources, names = source if isinstance(source, (list, tuple)) else [source], names_of(videos)
        found = [find_features(s, names) for s in sources]
        for s, f in zip(sources, found):
            if len(f) < len(names):
                raise ValueError(f"{s} has no features of {next(n for n in names if n not in f)}")
        self.paths = [Strings(f[n] for n in names) for f in found]
        self.widths = [x.shape[1] for x in self._read(0)]
        self.channels = sum(self.widths)

    def _read(self, index, widths=None):
        read = [read_features(paths[index]) for paths in self.paths]
        for paths, x, width in zip(self.paths, read, widths or ()):
            if x.shape[1] != width:
                raise ValueError(f"{shown(paths[index])} has {x.shape[1]} channels, {shown(paths[0])} has {width}")
        return read

    def set_epoch(self, epoch):
        pass  # no augmentation

    def __len__(self):
        return len(self.videos)

    def snippets(self, index):
        """How many snippets a video has on disk, in the first source: what the fidelity NATIVE gives."""
        return len(read_features(self.paths[0][index], values=False))

    def features(self, index, snippets=None, rows=slice(None)):
        """The snippets `rows` of video `index`, (C, L) float32, resized to `snippets` if told; the rate of several sources is that of the first."""
        parts, sources = [], self._read(index, self.widths)
        for paths, x in zip(self.paths, sources):
            if rows != slice(None) and len(x) != len(sources[0]):
                x = interpolate(torch.from_numpy(np.array(x, np.float32)).t()[None], len(sources[0]), mode="linear", align_corners=False)[0].t().numpy()
            x = torch.from_numpy(np.array(x[rows], np.float32)).t()  # (C, L)
            finite(x.numpy(), paths[index])
            wanted = snippets or (parts or [x])[0].shape[1]
            parts.append(x if x.shape[1] == wanted else interpolate(x[None], wanted, mode="linear", align_corners=False)[0])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __getitem__(self, pair):
        index, fidelity = pair
        video = self.videos[index]
        return {"name": video.name, "features": self.features(index, fidelity.snippets), "segments": video.segments, "target": class_target(video, self.classes)}

    def statistics(self, most=2000):
        """Mean and standard deviation of each channel over snippets, and standard deviation of a video's mean: three (C,) float32.

        Over at most `most` evenly picked videos. A channel that never changes gets a small, positive deviation.
        """
        sums, means = [[0, 0.0, 0.0] for _ in self.paths], []
        for i in np.linspace(0, len(self) - 1, min(len(self), most)).round().astype(int).tolist():
            means.append([])
            for part, paths, x in zip(sums, self.paths, self._read(i, self.widths)):
                x = finite(np.asarray(x, np.float64), paths[i])
                part[0], part[1], part[2] = part[0] + len(x), part[1] + x.sum(0), part[2] + (x * x).sum(0)
                means[-1].append(x.mean(0))
        mean, square_mean = (np.concatenate([part[k] / part[0] for part in sums]) for k in (1, 2))
        stds = np.sqrt(np.maximum(square_mean - mean**2, 0)), np.std([np.concatenate(m) for m in means], 0)
        return tuple(torch.from_numpy(x).float() for x in (mean, *(np.maximum(std, 1e-3 * stds[0].max() + 1e-6) for std in stds)))


# ---------------------------------------------------------------- windows

def window_starts(count, length):
    """First snippets of windows of `length` over `count` snippets: each overlaps the one before by half, the last ends with the video."""
    return [*range(0, count - length, length // 2), max(count - length, 0)]


def windows_of(features, length):
    """The windows of one video, features (C, count): (W, C, length), zero beyond the end of a video that is shorter than a window, and where they start."""
    starts = window_starts(features.shape[1], length)
    return torch.stack([torch.nn.functional.pad(x, (0, length - x.shape[1])) for x in (features[:, i:i + length] for i in starts)]), starts


def in_window(video, count, first, length, inside=0.5):
    """The video as one of its windows sees it: segments as fractions of the window, clipped to it; those of which less than `inside` lies in it are gone."""
    segments = (video.segments * count - first) / length
    clipped = segments.clamp(0, 1)
    keep = (clipped[:, 1] - clipped[:, 0] > 0) & (clipped[:, 1] - clipped[:, 0] >= inside * (segments[:, 1] - segments[:, 0]))
    return video._replace(segments=clipped[keep], labels=tuple(c for c, k in zip(video.labels, keep.tolist()) if k))


def windows_with_segments(videos, counts, length):
    """(video, first snippet) of every window that training sees: (W, 2) int64. ValueError if there is none."""
    found = [(i, first) for i, count in enumerate(counts) for first in window_starts(count, length) if len(in_window(videos[i], count, first, length).labels)]
    if not found:
        raise ValueError(f"no window of {length} snippets has a segment at least half in it: see data.snippets and data.windows")
    return np.array(found, np.int64)


class WindowDataset:
    """Windows of `length` snippets over a FeatureDataset at its own rate, as on THUMOS14, whose videos are long and whose actions are short.

    Training: dataset[index, fidelity] is a window with a segment, as a sample of FeatureDataset. Else it is a video, with all its windows:
    {"name", "features" (W, C, length), "first" (W,), "snippets"}; batches of one. What lies beyond a video that is shorter than a window is zero.
    """

    def __init__(self, dataset, length, train=False):
        self.dataset, self.length, self.train, self.classes, self.channels = dataset, length, train, dataset.classes, dataset.channels
        self.videos, self.statistics, self.set_epoch = dataset.videos, dataset.statistics, dataset.set_epoch
        self.items = windows_with_segments(self.videos, map(dataset.snippets, range(len(dataset))), length) if train else None

    def __len__(self):
        return len(self.items) if self.train else len(self.videos)

    def __getitem__(self, pair):
        if self.train:
            index, first = self.items[pair[0]].tolist()
            seen = in_window(self.videos[index], self.dataset.snippets(index), first, self.length)
            x = self.dataset.features(index, rows=slice(first, first + self.length))
            x = torch.nn.functional.pad(x, (0, self.length - x.shape[1]))
            return {"name": seen.name, "features": x, "segments": seen.segments, "target": class_target(seen, self.classes)}
        x = self.dataset.features(pair[0])
        windows, starts = windows_of(x, self.length)
        return {"name": self.videos[pair[0]].name, "features": windows, "first": torch.tensor(starts), "snippets": x.shape[1]}


def collate(samples):
    """Tensors of one shape are stacked, numbers become a tensor; names and segments stay lists of B."""
    batch = {}
    for key in samples[0]:
        values = [s[key] for s in samples]
        if key in ("name", "segments"):
            batch[key] = values
        else:
            batch[key] = stack(values) if torch.is_tensor(values[0]) else torch.tensor(values)
    return batch


def stack(tensors):
    """torch.stack; without a copy, if they lie side by side in memory, as VideoDataset's frames do."""
    first = tensors[0]
    step, storage = first.numel() * first.element_size(), first.untyped_storage().data_ptr()
    if all(t.untyped_storage().data_ptr() == storage and t.data_ptr() == first.data_ptr() + i * step and t.stride() == first.stride()
           for i, t in enumerate(tensors)):
        return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))
    return torch.stack(tensors)


# ---------------------------------------------------------------- python data.py

def main_prepare(args):
    if not os.path.isdir(args.videos):
        raise ValueError(f"no folder {args.videos}: name the folder of video files with --videos")
    if args.annotations:
        known = load_annotations(args.annotations)
        if set(args.subsets or known) - set(known):
            raise ValueError(f"the annotations have no subset {sorted(set(args.subsets) - set(known))}, only {sorted(known)}")
        names = [n for s in args.subsets or known for n in names_of(known[s])]
    else:
        names = None
    found = media.find_media(args.videos, names, prepared=False, skip=args.out, say=print)
    names = list(found) if names is None else names
    missing = [n for n in names if n not in found]
    if not found:
        raise ValueError(f"none of the {len(names)} videos is in {args.videos}: expected, say, {args.videos}/{(names or ['VIDEO'])[0]}.mp4")
    left_out(print, f"{len(missing)} of {len(names)} videos are not in {args.videos}", missing, range(len(missing)))
    copies = [round(args.short_side / 2**0.5), args.short_side // 2] if args.copies is None else args.copies
    settings = {k: getattr(args, k) for k in ("snippets", "frames", "stride", "short_side", "quality")} | {"copies": copies, "rate": args.rate}
    if min(*(v for k, v in settings.items() if k not in ("copies", "rate")), *copies) < 1 or args.quality > 100 or args.rate is not None and args.rate <= 0:
        raise ValueError(f"{settings}: expected numbers of at least 1, and a quality of at most 100")
    made, failed = media.prepare(found, args.out, settings, args.workers, tqdm.write)
    print(f"{args.out}: {len(made)} prepared, {len(found) - len(made) - len(failed)} were there already, {len(failed)} failed, {len(missing)} missing")
    for name, words in sorted(failed.items()):
        print(f"  {name}: {words}")
    return 1 if failed else 0


def main(argv=None):
    parser = argparse.ArgumentParser(prog="data.py", description="Check a data set, or prepare its videos for training.")
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("check", help="what there is, what is missing, every problem to a file",
                               description="Counts videos, segments, hours, classes, frames and features of each subset and lists every problem. "
                                           "Exit status 1 when training could not start.")
    look.add_argument("--cfg", help="a YAML of configs/, which tells all paths")
    look.add_argument("--set", nargs="+", default=[], action="extend", metavar="key.sub=value", help="change single keys of it")
    look.add_argument("--annotations", help="ActivityNet JSON")
    look.add_argument("--frames", help="folder of prepared ZIPs, folders of JPEG frames or video files")
    look.add_argument("--features", nargs="+", help="folder of .npy or HDF5 files, or one HDF5 file; several: their channels side by side")
    look.add_argument("--durations", help="JSON {video: seconds}, for videos whose annotation has no duration")
    look.add_argument("--subsets", nargs="+", help="subsets to look at (default: those of the config, or all that have segments)")
    look.add_argument("--problems", help="file for the list of problems (default: beside the annotations, NAME.problems.txt)")
    look.add_argument("--workers", type=int, default=0, help="processes that open the frames (default: 0, this one)")
    do = commands.add_parser("prepare", help="video files -> one ZIP of JPEG frames a video",
                             description="Decodes each video once and keeps the frames that full fidelity needs. Needs FFmpeg. Started again, it goes on "
                                         "where it stopped. Exit status 1 if a video failed.")
    do.add_argument("--videos", required=True, help="folder of video files, or of folders of JPEG frames")
    do.add_argument("--annotations", help="ActivityNet JSON: only its videos (default: all videos of the folder)")
    do.add_argument("--subsets", nargs="+", help="only these subsets of it (default: all)")
    do.add_argument("--out", required=True, help="folder for VIDEO.zip; config key data.frames")
    do.add_argument("--snippets", type=int, default=100, help="L; config key data.snippets (default: %(default)s)")
    do.add_argument("--rate", type=float, help="snippets a second instead, for windows; data.rate")
    do.add_argument("--frames", type=int, default=8, help="T, frames a snippet; config key data.frames_per_snippet (default: %(default)s)")
    do.add_argument("--stride", type=int, default=8, help="frames between two of a snippet; config key data.stride (default: %(default)s)")
    do.add_argument("--short-side", type=int, default=256, help="pixels; smaller videos keep their size (default: %(default)s)")
    do.add_argument("--copies", type=int, nargs="*", help="short sides of smaller copies of each frame (default: short side / sqrt 2 and / 2, for low spatial "
                    "fidelity: a ZIP is 1.7 times as large, S and ST samples load 3 to 4 times as fast as full ones; no number: no copies)")
    do.add_argument("--quality", type=int, default=90, help="of the JPEGs; of the copies 5 less (default: %(default)s)")
    do.add_argument("--workers", type=int, default=media.cores(), help="processes; 0: this one (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        if args.workers < 0:
            raise ValueError(f"--workers {args.workers}: expected 0 or more")
        if args.command == "check":
            from check import main_check  # a file that reads this one
        status = (main_check if args.command == "check" else main_prepare)(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("data.py: interrupted" + ("; the same command goes on from here" if args.command == "prepare" else ""), file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: worker processes end as well
    sys.exit(main())
