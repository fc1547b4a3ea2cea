"""Read annotations, frames and features: everything between the disk and the encoder or the head.

    ANNOTATIONS.json    ActivityNet JSON: {"database": {VIDEO: {"subset", "duration",
                        "annotations": [{"segment": [start, end], "label"}]}}}, in seconds; without
                        a duration, as in THUMOS14, the config or the media tell it
    ANNOTATIONS.csv     or .tsv, .txt: a table with columns video, start, end, label[, subset], or
                        an export of ELAN, BORIS or VIA, without durations
    FRAMES/VIDEO.zip    prepared frames, or folders of JPEG frames, or video files: see media.py
    FEATURES/VIDEO.npy  (L, C), any L; or FEATURES/VIDEO.h5, or one HDF5 file for all videos

VIDEO may be spelt with v_ in one place and without it in another.
In memory: frames (L, T, 3, H, W) uint8, features (C, L), segments (N, 2) as fractions of the video.
Legend: B videos, C channels, L snippets, T frames a snippet, N segments, F frames.
"""

import atexit
import contextlib
import copy
import csv
import io
import json
import math
import multiprocessing
import os
import re
import signal
import sys
from dataclasses import astuple, dataclass, replace
from functools import lru_cache, partial
from hashlib import blake2b, sha256
from itertools import chain, compress, zip_longest
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate, pad
from torch.utils.data import DataLoader, default_collate, get_worker_info
from tqdm import tqdm

import media
from evaluate import is_ambiguous, load_json, without_gc
from media import InputError, snippet_frames
from sola import sample_subsequences


def seed_of(*key):
    """Return a 63-bit seed, a pure function of `key` (seed, epoch, step, ...): a resumed run, all
    whose randomness comes from such seeds, needs no random state."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


# ------------------------------------------------------------------------------------- annotations


@dataclass(eq=False)
class Video:
    """A video with its segments (N, 2) in seconds, exactly as annotated, and their N labels."""

    name: str
    duration: float  # seconds, NaN where unknown
    segments: np.ndarray
    labels: tuple[str, ...]
    path: str | None = None  # of its frames or features

    @property
    def annotated(self) -> tuple[torch.Tensor, tuple[str, ...]]:
        """Return the usable segments (n, 2), as fractions clipped to [0, 1], and their n labels."""
        if math.isnan(self.duration):
            raise InputError(f"video {self.name} has no known duration: set data.durations")
        clipped = (self.segments / self.duration).clip(0, 1).astype(np.float32)
        usable = (clipped[:, 1] > clipped[:, 0]) & np.isfinite(self.segments).all(1)
        return torch.from_numpy(clipped[usable]), tuple(compress(self.labels, usable))

    @property
    def actions(self) -> tuple[torch.Tensor, tuple[str, ...]]:
        """Return the same without what is labelled Ambiguous, which training leaves out."""
        segments, labels = self.annotated
        clear = torch.tensor([not is_ambiguous(label) for label in labels], dtype=torch.bool)
        return segments[clear], tuple(compress(labels, clear))


MAX_RATIO = 2000  # of features' bytes to their file's, which may declare any; gzip reaches 1000
MAX_SECONDS = 1e9  # of a video: 30 years
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


@contextlib.contextmanager
def _expecting(expected, path):
    """Turn what malformed content of a file raises into one InputError."""
    try:
        yield
    except MALFORMED as error:
        reason = f"{type(error).__name__}: {error!s:.300}"
        raise InputError(f"{path} is not valid ({reason}); expected {expected}") from None


def load_annotations(path: str, split=("training", "validation", 0.2)) -> dict[str, list[Video]]:
    """Read an ActivityNet JSON or a table: {subset: [Video, ...]}, in the file's order.

    split: of a table without subsets: what the two are called, and the share of the second.
    """
    if not os.path.isfile(path):
        toy = "make toy data with `python -m tools.make_toy --out data/toy`"
        raise InputError(f"no annotation file {path}: set data.annotations, or {toy}")
    if path.lower().endswith((".xlsx", ".xls", ".ods", ".numbers")):
        raise InputError(f"{path} is a spreadsheet: save it as CSV in UTF-8, and name that")
    is_table = path.lower().endswith(TABLES)
    content = _read_rows(path, *split) if is_table else load_json(path)
    entry = '{"subset", "duration": seconds, "annotations": [{"segment": [start, end], "label"}]}'
    with _expecting(f'{{"database": {{VIDEO: {entry}}}}}', path):
        return _parse_database(content)


@without_gc()
def _parse_database(content):
    subsets = {}
    for name, entry in content["database"].items():
        try:
            duration = math.nan if entry.get("duration") is None else float(entry["duration"])
            annotations = entry.get("annotations") or []
            labels = [annotation["label"] for annotation in annotations]
            segments = np.array([annotation["segment"] for annotation in annotations], np.float64)
            segments = segments.reshape(len(labels), 2)
            if duration <= 0 or duration >= MAX_SECONDS or not isinstance(entry["subset"], str):
                raise ValueError(f"duration {duration}, subset {entry['subset']}")
            if not all(isinstance(label, (str, int, float)) for label in labels):
                raise ValueError(f"labels {labels}, expected text")
            if any(media.UNSHOWN.search(str(word)) for word in (name, *labels)):
                raise ValueError(f"control characters in its name or in labels {labels}")
            video = Video(name, duration, segments, tuple(map(str, labels)))
            subsets.setdefault(entry["subset"], []).append(video)
        except MALFORMED as error:
            raise ValueError(f"video {name!r}, {type(error).__name__}: {error}") from None
    return subsets


def activitynet(subsets):
    """Return {subset: [Video, ...]} as the content of an ActivityNet JSON."""
    database = {}
    for subset, v in ((name, video) for name, videos in subsets.items() for video in videos):
        actions = zip(v.segments.tolist(), v.labels, strict=True)
        actions = [{"segment": segment, "label": label} for segment, label in actions]
        duration = None if math.isnan(v.duration) else v.duration
        database[v.name] = {"subset": subset, "duration": duration, "annotations": actions}
    return {"database": database}


# ------------------------------------------------------------------------------------------ tables

TABLES = (".csv", ".tsv", ".txt")  # how their names end

# What BORIS and ELAN call the columns.
SYNONYMS = dict.fromkeys(("observation id", "media file", "media file name", "file name"), "video")
SYNONYMS |= {"file path": "video", "behavior": "label", "split": "subset"}
SYNONYMS |= {"start (s)": "start", "stop (s)": "end"}
for unit in ("hh:mm:ss.ms", "ss.msec"):
    SYNONYMS |= {f"begin time - {unit}": "start", f"end time - {unit}": "end"}


def read_table(path, parse, expected):
    """Call parse(row, seconds) for each row {column: text} of a CSV or TSV, without empty cells.

    seconds(text) reads 12.5, 0:12 or 1:02:03.5; decimal commas, too, unless commas divide cells.
    Lines at the top that begin with # are skipped. Raises InputError with the row's number.
    """
    where = "as CSV"
    try:
        with open(path, "rb") as file:
            raw = file.read()
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        notes = re.match(r'(("?#[^,;\t]|sep=).*\n?|\s*\n)*', text)[0]
        via = re.search("# CSV_HEADER = (.*)", notes)  # which gives the columns there
        names = via and via[1].strip().split(",")
        text = text[len(notes) :]
        first_line = via[1] if via else text.partition("\n")[0]
        delimiter = next((mark for mark in "\t;" if mark in first_line), ",")
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        seconds = partial(_seconds, comma="," if delimiter != "," else ".")
        for cells in filter(any, ([cell.strip() for cell in cells] for cells in rows)):
            where = f"row {notes.count(chr(10)) + rows.line_num}"
            if names is None:
                names, is_header = _columns(cells)
                if is_header:
                    continue
            row = {name: cell for name, cell in zip_longest(names, cells, fillvalue="") if cell}
            where += f" {row}"[:300]
            if "" in row:
                raise ValueError(f"{row['']!r} stands beyond the columns")
            parse(_row_of_via(row, notes) if via else row, seconds)
    except (OSError, IndexError, csv.Error, *MALFORMED) as error:
        problem = f"{type(error).__name__}: {error}"
        raise InputError(f"cannot read {path} {where} ({problem}); expected {expected}") from None


def _seconds(text, comma):
    parts = text.replace(comma, ".").split(":")
    return sum(float(part) * 60**i for i, part in enumerate(reversed(parts)))


def _columns(cells):
    """Return the names of columns in lower case, and whether `cells`, the first row, are these.

    ELAN either has a column of labels for each tier, or gives no names: tier, participant, times in
    up to three formats each, label, file.
    """
    clocks = [i for i, cell in enumerate(cells) if re.fullmatch(r"\d+:\d\d:\d\d\.\d+", cell)]
    files = [i for i, cell in enumerate(cells) if cell.endswith(".eaf")]
    if len(clocks) > 1 and files:
        known = {clocks[0]: "start", clocks[1]: "end", files[0]: "video"}
        known[clocks[-1] + clocks[1] - clocks[0]] = "label"
        return [known.get(i, str(i)) for i in range(len(cells))], False
    names = [name.lower() for name in cells]
    if any(name.startswith("begin time - ") for name in names):
        no_tier = ("begin time - ", "end time - ", "duration - ", "file ")
        names = [n if n.startswith(no_tier) else f"label of {n}" for n in names]
    return names, True


def _row_of_via(row, notes):
    """Return a row of VIA with our columns; its label may stand for the name of an option."""
    (video, *_), times = json.loads(row["file_list"]), json.loads(row["temporal_coordinates"])
    if len(times) != 2:
        return {"video": video}
    (key, label), *_ = json.loads(row["metadata"]).items()
    if attributes := re.search("# ATTRIBUTE = (.*)", notes):
        label = json.loads(attributes[1])[key]["options"].get(label, label)
    return {"video": video, "start": str(times[0]), "end": str(times[1]), "label": label}


def _add_row(database, begun, row, seconds):
    """Add a row to the database of an ActivityNet JSON; begun: {action: start}, of BORIS."""
    row = {SYNONYMS.get(name, name): text for name, text in row.items()}
    folder, name = os.path.split(row["video"].replace("\\", "/"))
    stem, suffix = os.path.splitext(name)
    name = stem if suffix.lower() in (*media.VIDEO_SUFFIXES, ".zip", ".eaf") else name
    entry = database.setdefault(name, {"annotations": []})
    for key, value in {"folder": folder, "subset": row.get("subset")}.items():
        if value is not None and entry.setdefault(key, value) != value:
            raise ValueError(f"{key} {value!r} of video {name}, which had {entry[key]!r} before")
    event, action = row.get("behavior type"), (name, row.get("subject"), row.get("label"))
    if event in ("START", "STOP"):
        if (event == "START") == (action in begun):
            raise ValueError(f"{event} twice, or without the other")
        if event == "START":
            begun[action] = row["time"]
            return
        row |= {"start": begun.pop(action), "end": row["time"]}
    tiers = [column for column in row if column.startswith("label of ")] or ["label"]
    if event != "POINT" and {"start", "end", *tiers} & row.keys():
        segment = [seconds(row["start"]), seconds(row["end"])]
        if not math.isfinite(sum(segment)):
            raise ValueError("start and end must be finite")
        entry["annotations"] += [{"segment": segment, "label": row[tier]} for tier in tiers]


def held_out(names, share):
    """Return about `share` of the videos, by a hash of each name: at least one, but not all."""
    ranked = sorted((seed_of("split", name.removeprefix("v_")), name) for name in names)
    count = sum(place < share * 2**63 for place, _ in ranked)
    return {name for _, name in ranked[: min(max(count, 1), len(ranked) - 1)]}


def _read_rows(path, train, val, share):
    """Return the content of an ActivityNet JSON that a table stands for."""
    database, begun = {}, {}
    expected = "UTF-8 columns video, start, end, label[, subset], or what ELAN, BORIS or VIA export"
    read_table(path, partial(_add_row, database, begun), expected)
    if begun or not database:
        reason = f"START without a STOP of {next(iter(begun))}" if begun else "no video in it"
        raise InputError(f"{path}: {reason}; expected {expected}")
    left = [name for name, entry in database.items() if "subset" not in entry]
    val_names = held_out(left, share)
    for name in left:
        database[name]["subset"] = val if name in val_names else train
    return {"database": database}


def class_names(videos: list[Video]) -> list[str]:
    """Return the labels of the usable segments, sorted."""
    # Without a known duration any end is taken to lie in the video.
    known = [replace(v, duration=MAX_SECONDS) if math.isnan(v.duration) else v for v in videos]
    labels = set().union(*(video.annotated[1] for video in known))
    return sorted(label for label in labels if not is_ambiguous(label))


def targets_of(segments, labels, classes):
    """Return {"segments" (N, 2), "labels" (N,): the index of each one's class, -1 for others,
    "target" (n,): equal shares for the classes that occur}."""
    index = {name: i for i, name in enumerate(classes)}
    target = torch.tensor([float(c in labels) for c in classes])
    labels = torch.tensor([index.get(label, -1) for label in labels], dtype=torch.long)
    return {"segments": segments, "labels": labels, "target": target / target.sum().clamp(min=1)}


def list_hash(names):
    """Return a hash of a list of videos, in any order."""
    return blake2b("\n".join(sorted(names)).encode(), digest_size=8).hexdigest()


def file_hash(path):
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return sha256(file.read()).hexdigest()


def fingerprint(items):
    """Return {"count", "hash"} of videos with their segments, or of clips; not where they lie."""
    digest = blake2b(digest_size=8)
    if items and isinstance(items[0], Video):
        digest.update(np.array([v.duration for v in items]).tobytes())
        digest.update(np.cumsum([0, *(len(v.labels) for v in items)]).tobytes())
        digest.update(np.concatenate([v.segments for v in items]).tobytes())
        words = [v.name for v in items] + [label for v in items for label in v.labels]
    else:
        stems = [os.path.splitext(os.path.basename(clip.path))[0] for clip in items]
        words = [repr(astuple(replace(items[i], path=stem))) for i, stem in enumerate(stems)]
    digest.update("\n".join(words).encode(errors="surrogatepass"))
    return {"count": len(items), "hash": digest.hexdigest()}


def as_list(source):
    """Return a source of features, one path or a list of them, as a list."""
    return source if isinstance(source, (list, tuple)) else [source]


def first_names(names, most=10):
    """Return the first names, as messages give them."""
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")


def select_videos(
    subsets, subset, source, kind, log=print, *, durations=None, frames=None, settings=None
) -> list[Video]:
    """Return the videos of a subset that have frames or features and a duration, with their path.

    The others are named through `log` and left out; InputError if none is left. kind: "frames" in
    the folder `source`, or "features" in the folder or HDF5 file `source`, or in each of a list of
    them. durations, frames: a JSON {video: seconds} and a folder for videos whose annotation has no
    duration. settings: what frames should be prepared for; those of the first video are looked at.
    """
    if subset not in subsets:
        raise InputError(f"no subset {subset!r}, only {sorted(subsets)}: see data.train_subset")
    names = [video.name for video in subsets[subset]]
    sources = as_list(source)
    find = media.find_media if kind == "frames" else find_features
    found = [find(one, names) for one in sources]
    paths = {name: path for name, path in found[0].items() if all(name in f for f in found)}
    frame_paths = paths if kind == "frames" else media.find_media(frames or "", names)
    videos = [replace(v, path=paths[v.name]) for v in subsets[subset] if v.name in paths]
    videos = fill_durations(videos, durations, sources if kind == "features" else (), frame_paths)
    untimed = [video.name for video in videos if math.isnan(video.duration)]
    missing = [name for name in names if name not in paths]
    lacks = {f"no {kind} in {' and '.join(map(str, sources))}": missing}
    lacks["no duration (set data.durations to a JSON {video: seconds})"] = untimed
    text = "{} of {} videos have {} and are left out: {}".format
    reasons = [text(len(x), len(names), lack, first_names(x)) for lack, x in lacks.items() if x]
    videos = [video for video in videos if not math.isnan(video.duration)]
    if not videos:
        raise InputError(f"{subset}: {'; '.join(reasons)}")
    if reasons:
        log(f"{subset}: {'; '.join(reasons)}")
    others = {v.name for other in subsets if other != subset for v in subsets[other]}
    if twice := [v.name for v in videos if not others.isdisjoint(media.spellings(v.name))]:
        log(f"{subset}: {first_names(twice)} also in another subset, with v_ or without")
    for doubt in _doubts(videos, frame_paths, settings if kind == "frames" else None):
        log(f"{subset}: {doubt}")
    return videos


def _doubts(videos, frame_paths, settings):
    """Yield what is odd about videos' segments, and about the frames of the first that has some."""
    for video in [video for video in videos if video.name in frame_paths][:1]:
        with contextlib.suppress(InputError):
            path = frame_paths[video.name]
            told = _media_duration(path) or video.duration
            if not 0.9 < video.duration / told < 1.1:
                yield f"{path} has {told:g} s, {video.duration:g} s are given: milliseconds?"
            source = media.FrameZip(path) if settings and path.endswith(".zip") else None
            prepared = source and source.prepared
            differs = prepared and {key: prepared.get(key) for key in settings} != settings
            if differs and len(source.kept) < source.num_frames:
                why = f"{path} was prepared for {prepared}, the config has {settings}"
                yield f"{why}: nearest frames are used, which blurs time; prepare them again"
    total = sum(len(video.labels) for video in videos)
    if ambiguous := sum(is_ambiguous(label) for video in videos for label in video.labels):
        yield f"{ambiguous} of {total} segments are labelled Ambiguous, and are no actions"
    if lost := total - sum(len(video.annotated[1]) for video in videos):
        yield f"{lost} of {total} segments cannot be used, see python -m tools.check_data"


def fill_durations(videos, durations=None, features=(), paths=()):
    """Return the videos with durations where the annotations have none, NaN where nothing tells:
    from the JSON file `durations` {video: seconds}, else from the features.json beside the first of
    `features`, else from media, paths {name: path}."""
    names = [video.name for video in videos if math.isnan(video.duration)]
    known = {}
    if names and durations is not None:
        with _expecting("{VIDEO: seconds}", durations):
            known = _parse_durations(load_json(durations))
    elif names:
        for info in read_feature_info(features[:1]):
            known = {name: v["duration_sec"] for name, v in info.get("videos", {}).items()}
    known = media.look_up(names, known)
    known |= {n: _media_duration(paths[n]) for n in names if n in paths and n not in known}
    return [replace(v, duration=float(known.get(v.name) or v.duration)) for v in videos]


def _parse_durations(content):
    known = {name: float(seconds) for name, seconds in content.items()}
    if wrong := {name: sec for name, sec in known.items() if not 0 < sec < MAX_SECONDS}:
        raise ValueError(f"{wrong!s:.80}, expected seconds above 0, below {MAX_SECONDS:.0e}")
    return known


@lru_cache(None)
def _media_duration(path):
    """Return seconds, or None if the media does not tell; looked up once a process."""
    with contextlib.suppress(InputError):
        return media.open_media(path).duration


class Fidelity(NamedTuple):
    """Temporal and spatial resolution of a batch: L snippets of size x size pixels."""

    name: str
    snippets: int | None
    size: int | None


# Features as long as they are on disk, in batches of one video.
NATIVE = Fidelity("native", None, None)


@dataclass
class CyclicFidelitySampler:
    """Batches of (index, Fidelity) pairs, all of a batch at one fidelity: LoFi, section 3.2 (IV).

    fidelities: the cycle, in order; one alone is S-, T- or ST-LoFi. cycle: it moves on every
    `cycle_length` epochs ("epoch", the paper's long cycle, c_l) or batches ("batch", the short one,
    c_s); None: 1 epoch or 16 batches, as in the paper. batch_size: over all ranks, which have the
    same fidelity at the same step. group_size: so many consecutive samples stay together. Each
    video comes once an epoch, up to padding of the last batch with the epoch's first ones. Indices
    go on over epochs, epoch * num_videos + i: what is random in a sample is drawn by its index.
    """

    num_videos: int
    batch_size: int
    fidelities: list[Fidelity]
    cycle: str = "epoch"
    cycle_length: int | None = None
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    group_size: int = 1

    def __post_init__(self):
        for total, part in (self.num_videos, self.group_size), (self.batch_size, self.world_size):
            if total < 1 or total % part:
                raise InputError(f"{total} samples, expected a multiple of {part} above 0: {self}")
        self.cycle_length = self.cycle_length or {"epoch": 1, "batch": 16}[self.cycle]
        self.steps_per_epoch = math.ceil(self.num_videos / self.batch_size)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch of the next iteration, and the step to resume at."""
        self.epoch = epoch
        self.first_step = first_step

    def fidelity(self, epoch: int, step: int) -> Fidelity:
        position = epoch if self.cycle == "epoch" else epoch * self.steps_per_epoch + step
        return self.fidelities[position // self.cycle_length % len(self.fidelities)]

    def __len__(self):
        return self.steps_per_epoch - self.first_step

    def __iter__(self):
        generator = torch.Generator().manual_seed(seed_of(self.seed, "order", self.epoch))
        groups = torch.randperm(self.num_videos // self.group_size, generator=generator)
        order = groups[:, None] * self.group_size + torch.arange(self.group_size)
        order = order.flatten().tolist()
        per_rank = self.batch_size // self.world_size
        for step in range(self.first_step, self.steps_per_epoch):
            fidelity = self.fidelity(self.epoch, step)
            first = step * self.batch_size + self.rank * per_rank
            indices = [order[k % self.num_videos] for k in range(first, first + per_rank)]
            yield [(self.epoch * self.num_videos + i, fidelity) for i in indices]


def snippet_rows(full: int, snippets: int, shift: float = 0.0) -> torch.Tensor:
    """Return which of the `full` snippets stand for fewer, evenly spread ones: (L,) int64. With an
    even ratio the middle falls between two: shift 0 takes the later, 0.5 the earlier."""
    centre = (torch.arange(snippets, dtype=torch.float64) + 0.5) * full / snippets
    return (centre - shift).floor().clamp(0, full - 1).long()


# ------------------------------------------------------------------------------------------ frames


def crop_resize(frame, size, ratio, corner=(0.5, 0.5), flip=False):
    """Crop a square of `ratio` times the short side of a frame (H, W, 3) uint8 and resize it:
    (size, size, 3). corner: where it lies, (y, x) in [0, 1]; (0.5, 0.5): central."""
    # Slices of arrays cost a third of tensors', and a sample has 800 frames.
    height, width = frame.shape[:2]
    side = round(min(height, width) * ratio)
    y, x = round(corner[0] * (height - side)), round(corner[1] * (width - side))
    frame = frame[y : y + side, x : x + side]
    if side != size:
        frame = torch.from_numpy(frame).permute(2, 0, 1)[None]
        frame = interpolate(frame, (size, size), mode="bilinear", antialias=True)
        frame = frame[0].permute(1, 2, 0).numpy()
    return torch.from_numpy(frame).flip(1).numpy() if flip else frame


def read_view(source, numbers, size, ratio, corner=(0.5, 0.5), flip=False):
    """Read frames of a media object, each as crop_resize makes it: (F, 3, size, size) uint8."""
    view = partial(crop_resize, size=size, ratio=ratio, corner=corner, flip=flip)
    return source.read(numbers, short_side=size / ratio, view=view)


@dataclass(eq=False)
class VideoDataset:
    """Untrimmed videos as frames: dataset[index, fidelity] -> {"name", "frames" (L, T, 3, H, W),
    "last"} and targets_of its segments.

    snippets: L at full fidelity. rate: snippets a second instead. Training then takes windows of
    `snippets` of them that have a segment (window_overlap: see FeatureDataset); else a video comes
    in pieces of at most `snippets`, of which the last is marked: "last". Training takes one random
    crop (`crop` of the short side), flip and snippet phase a video, a pure function of (seed,
    epoch, index); else all are central.
    """

    videos: list[Video]
    snippets: int
    frames_per_snippet: int
    stride: int
    size: int
    classes: list[str] = ()
    crop: float = 0.875
    flip: bool = True
    rate: float | None = None
    window_overlap: tuple = (0.5, 0.5)
    train: bool = False
    seed: int = 0

    def __post_init__(self):
        self.full = Fidelity("full", self.snippets, self.size)
        self.counts = [self.snippets] * len(self.videos)
        if self.rate:
            self.counts = [max(round(video.duration * self.rate), 1) for video in self.videos]
        # The video and the first snippet of each sample.
        self.items = [(i, k) for i, n in enumerate(self.counts) for k in range(0, n, self.snippets)]
        if self.rate and self.train:
            least = self.window_overlap[0]
            self.items = windows_with_segments(self.videos, self.counts, self.snippets, least)
        # Ranks share out videos, not pieces of them.
        self.owners = [i for i, _ in self.items]

    def subset(self, indices) -> "VideoDataset":
        return replace(self, videos=[self.videos[i] for i in indices])

    def __len__(self):
        return len(self.items)

    def __getitem__(self, pair):
        index, fidelity = pair
        epoch, index = divmod(index, len(self))
        i, first = self.items[index]
        video, count = self.videos[i], self.counts[i]
        segments, labels = video.actions
        shift, corner, flip = 0.0, (0.5, 0.5), False
        if self.train:
            rng = np.random.default_rng(seed_of(self.seed, "view", epoch, index))
            shift, corner = rng.choice([0.0, 0.5]), tuple(rng.random(2).tolist())
            flip = self.flip and rng.random() < 0.5
        source = media.open_media(video.path)
        numbers = snippet_frames(source.num_frames, count, self.frames_per_snippet, self.stride)
        numbers = numbers[first : first + self.snippets]
        if self.rate and self.train:
            least = self.window_overlap[1]
            segments, labels = clip_to_window(segments, labels, count, first, self.snippets, least)
            # Beyond the end of a short video its last snippet is repeated.
            numbers = numbers[torch.arange(self.snippets).clamp(max=len(numbers) - 1)]
        if self.train or not self.rate:
            numbers = numbers[snippet_rows(self.snippets, fidelity.snippets, shift)]
        rows = numbers.flatten().numpy()
        frames = read_view(source, rows, fidelity.size, self.crop, corner, flip)
        sample = {"name": video.name, "frames": frames.unflatten(0, numbers.shape)}
        sample["last"] = first + self.snippets >= count
        return sample | targets_of(segments, labels, self.classes)


# ---------------------------------------------------------------------------------------- features


@contextlib.contextmanager
def _open_hdf5(path):
    try:
        import h5py

        with h5py.File(path, "r", locking=False) as file:
            yield file
    except ImportError:
        raise InputError(f"{path} is an HDF5 file, which needs h5py: pip install h5py") from None
    except (OSError, RuntimeError, UnicodeError) as error:
        raise InputError(f"{path} is not a valid HDF5 file ({error})") from None


def find_features(source, names):
    """Return {name: path} of the videos that have features: SOURCE/VIDEO.npy, .h5 or .hdf5, or
    FILE::VIDEO in one HDF5 file."""
    found = {}
    if os.path.isdir(source):
        # In this order an .npy file is the one that stays.
        for suffix in (".hdf5", ".h5", ".npy"):
            files = [f for f in os.listdir(source) if f.endswith(suffix)]
            found |= {f.removesuffix(suffix): f"{source}/{f}" for f in files}
    elif os.path.isfile(source):
        with _open_hdf5(source) as file:
            # Names may have slashes, which HDF5 takes for groups.
            keys = [key for name in names for key in media.spellings(name) if key in file]
            found = {key: f"{source}::{key}" for key in keys}
    return media.look_up(names, found)


def _read_hdf5(path, rows):
    # Opened for each video: workers must not share a file that was open at their fork.
    path, _, key = path.partition("::")
    with _open_hdf5(path) as file:
        node = file[key or "/"]
        for depth in range(8):  # a group may hold itself
            if hasattr(node, "keys") and (len(node) != 1 or depth == 7):
                raise ValueError(f"a group of {len(node)} within {depth} groups, not an array")
            node = node[next(iter(node))] if hasattr(node, "keys") else node
        if not node.is_virtual and node.nbytes > MAX_RATIO * node.id.get_storage_size():
            raise ValueError(f"an array of shape {node.shape} with little in it")
        if rows is None:
            return np.broadcast_to(np.zeros((), node.dtype), node.shape)
        return node[rows if node.shape else ()]


def read_features(path, rows=slice(None)):
    """Return the features at a path of find_features: (L, C), .npy memory-mapped.

    rows: a slice of the L; no others are read. None: only the shape is wanted.
    """
    try:
        is_npy = path.endswith(".npy")
        features = np.load(path, mmap_mode="r") if is_npy else _read_hdf5(path, rows)
        if features.ndim != 2 or not len(features) or features.dtype.kind != "f":
            raise ValueError(f"shape {features.shape}, {features.dtype}")
    except Exception as error:  # a damaged file makes numpy raise almost anything
        expected = "expected floating-point features (L, C), .npy or HDF5"
        raise InputError(f"{path} cannot be read ({error}); {expected}") from None
    return features[rows] if rows and is_npy else features


def check_finite(x, path, dtype=None):
    """Return a copy of features. Raises InputError if they have NaN or infinite values."""
    x = np.array(x, dtype)
    with np.errstate(over="ignore"):
        finite = np.isfinite(x.astype(np.float32, copy=False)).all()
    if not finite:
        raise InputError(f"{path} has NaN or infinite values: remove it, make it again")
    return x


def read_feature_info(source):
    """Return the features.json beside each source of features, a list of those that exist."""
    folders = [s if os.path.isdir(s) else os.path.dirname(s) or "." for s in as_list(source)]
    found = []
    for path in filter(os.path.exists, dict.fromkeys(f"{f}/features.json" for f in folders)):
        with _expecting('{"videos": {VIDEO: {"duration_sec": seconds}}, ...}', path):
            info = load_json(path)
            videos = info.get("videos", {}).items()
            _parse_durations({name: video["duration_sec"] for name, video in videos})
            if not isinstance(info.get("seconds", 0.0), (int, float)):
                raise ValueError(f"seconds {info['seconds']}")
            found.append(info)
    return found


class FeatureDataset:
    """Videos as features: dataset[index, fidelity] -> {"name", "features" (C, L) float32} and
    targets_of its segments.

    source: a folder or HDF5 file, or a list of them, whose channels are put side by side. window:
    the samples are windows of so many snippets that have a segment, at the features' own rate, zero
    beyond the end of a short video; None: whole videos. window_overlap: share of a segment within
    a window from which on the window is a sample, and share from which on its segments count.
    """

    def __init__(self, videos, source, classes=(), window=None, window_overlap=(0.5, 0.5)):
        self.videos = videos
        self.classes = list(classes)
        self.paths = []  # of each source, of each video
        names = [video.name for video in videos]
        for one in as_list(source):
            found = find_features(one, names)
            if missing := [name for name in names if name not in found]:
                raise InputError(f"{one} has no features of {first_names(missing)}")
            self.paths.append([found[name] for name in names])
        self.widths = [read_features(paths[0], None).shape[1] for paths in self.paths]
        self.channels = sum(self.widths)
        self.window, (least, self.least) = window, window_overlap
        if window:
            self.counts = [self.num_snippets(i) for i in range(len(videos))]
            self.items = windows_with_segments(videos, self.counts, window, least)

    def _open(self, k, index, rows=slice(None)):
        path = self.paths[k][index]
        x = read_features(path, rows)
        if x.shape[1] != self.widths[k]:
            first, width = self.paths[k][0], self.widths[k]
            raise InputError(f"{path} has {x.shape[1]} channels, {first} has {width}")
        return x, path

    def subset(self, indices) -> "FeatureDataset":
        """Return the data set of some of the videos, each as a whole."""
        other = copy.copy(self)
        other.window = None
        other.videos = [self.videos[i] for i in indices]
        other.paths = [[paths[i] for i in indices] for paths in self.paths]
        return other

    def __len__(self):
        return len(self.items if self.window else self.videos)

    def num_snippets(self, index: int) -> int:
        """Return how many snippets a video has on disk, in the first source."""
        return len(read_features(self.paths[0][index], None))

    def features(self, index: int, snippets: int | None = None, rows=slice(None)) -> torch.Tensor:
        """Return a video's features, (C, L) float32, resized to `snippets` (None: to the length of
        the first source); of these, `rows`."""
        parts = []
        # Of one source, at its own length, no other rows are read: for SoLa 23 of a long video.
        alone = len(self.paths) == 1 and not snippets
        for k in range(len(self.paths)):
            x, path = self._open(k, index, rows if alone else slice(None))
            snippets = snippets or len(x)
            resized = len(x) != snippets
            own = slice(None) if resized or alone else rows
            x = torch.from_numpy(check_finite(x[own], path, np.float32)).t()
            if resized:
                x = interpolate(x[None], snippets, mode="linear", align_corners=False)[0][:, rows]
            parts.append(x)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __getitem__(self, pair):
        index, fidelity = pair
        index %= len(self)
        if self.window:
            i, first = self.items[index]
            x = self.features(i, rows=slice(first, first + self.window))
            x = pad(x, (0, self.window - x.shape[1]))
            place = (self.counts[i], first, self.window, self.least)
            actions = clip_to_window(*self.videos[i].actions, *place)
        else:
            i = index
            x = self.features(i, fidelity.snippets)
            actions = self.videos[i].actions
        return {"name": self.videos[i].name, "features": x} | targets_of(*actions, self.classes)

    def statistics(self, max_videos: int = 2000) -> tuple[torch.Tensor, ...]:
        """Return mean and deviation of snippets, and the deviation of videos' means: three (C,),
        over at most `max_videos` evenly picked videos; deviations are kept above 0."""
        count = len(self.videos)
        picked = np.linspace(0, count - 1, min(count, max_videos)).round().astype(int).tolist()
        columns = []
        for k in range(len(self.paths)):
            arrays = (check_finite(*self._open(k, i), np.float64) for i in picked)
            rows = [(len(x), x.sum(0), (x * x).sum(0), x.mean(0)) for x in arrays]
            counts, sums, squares, means = zip(*rows, strict=True)
            mean = sum(sums) / sum(counts)
            std = np.sqrt((sum(squares) / sum(counts) - mean**2).clip(0))
            columns.append((mean, std, np.std(means, 0)))
        statistics = np.concatenate(columns, 1)
        statistics[1:] = statistics[1:].clip(1e-3 * statistics[1].max() + 1e-6)
        return torch.from_numpy(statistics).float().unbind()


class SubsequenceDataset:
    """Random subsequences of features, to train SoLa: dataset[index, fidelity] -> {"name",
    "features" (C, length)}.

    Each video gives `per_video` of them an epoch, a pure function of (seed, epoch, index); those
    that are shorter are named in .left_out. Features of at most `cache_gb` are kept in memory.
    """

    def __init__(self, features: FeatureDataset, length, *, per_video=1, seed=0, cache_gb=1.0):
        self.dataset = features
        self.videos = features.videos
        self.length = length
        self.per_video = per_video
        self.seed = seed
        self.counts = [features.num_snippets(i) for i in range(len(features))]
        self.kept = [i for i, count in enumerate(self.counts) if count >= length]
        self.left_out = [self.videos[i].name for i, n in enumerate(self.counts) if n < length]
        if not self.kept:
            longest = f"{length} snippets, the longest has {max(self.counts)}"
            raise InputError(f"all videos are shorter than sola.subsequence of {longest}")
        cached = 4e-9 * sum(self.counts) * features.channels <= cache_gb
        self.cache = {i: features.features(i) for i in self.kept} if cached else {}

    def __len__(self):
        return len(self.kept) * self.per_video

    def __getitem__(self, pair):
        epoch, index = divmod(pair[0], len(self))
        i = self.kept[index % len(self.kept)]
        key = seed_of(self.seed, "subsequence", epoch, index)
        generator = torch.Generator().manual_seed(key)
        start = sample_subsequences([self.counts[i]], self.length, generator=generator).item()
        rows = slice(start, start + self.length)
        x = self.cache[i][:, rows] if self.cache else self.dataset.features(i, rows=rows)
        return {"name": self.videos[i].name, "features": x.contiguous()}


def window_starts(count: int, length: int) -> list[int]:
    """Return the first snippets of windows of `length` over `count` snippets: each overlaps the one
    before by half, the last ends with the video."""
    return [*range(0, count - length, length // 2), max(count - length, 0)]


def cut_windows(features: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut features (C, L) into windows (W, C, length), zero beyond the end; and their starts."""
    starts = window_starts(features.shape[1], length)
    features = pad(features, (0, max(length - features.shape[1], 0)))
    windows = torch.stack([features[:, i : i + length] for i in starts])
    return windows, torch.tensor(starts, device=features.device)


def clip_to_window(segments, labels, count, first, length, least=0.5):
    """Return the segments (N, 2) of a video of `count` snippets of which at least a share `least`
    lies in a window from snippet `first` on, as fractions of it, clipped, and their labels."""
    segments = (segments * count - first) / length
    clipped = segments.clamp(0, 1)
    seen = clipped[:, 1] - clipped[:, 0]
    keep = (seen > 0) & (seen >= least * (segments[:, 1] - segments[:, 0]))
    return clipped[keep], tuple(compress(labels, keep.tolist()))


def windows_with_segments(videos, counts, length, least=0.5):
    """Return (video, first snippet) of every window that training sees: those with a segment of
    which at least a share `least` lies in them; counts: of snippets."""
    found = [(i, f) for i, count in enumerate(counts) for f in window_starts(count, length)]
    seen = [clip_to_window(*videos[i].actions, counts[i], f, length, least)[1] for i, f in found]
    found = list(compress(found, seen))
    if not found:
        words = f"no window of {length} snippets (video.snippets)"
        raise InputError(f"{words} holds {least:.0%} of a segment (data.window_overlap)")
    return found


# ----------------------------------------------------------------------------------------- loading


def collate(samples: list[dict]) -> dict:
    """Return a batch: tensors are stacked, numbers become a tensor, names and segments lists."""
    batch = {key: [sample[key] for sample in samples] for key in samples[0]}
    for key in batch.keys() - {"name", "segments", "labels"}:
        values = batch[key]
        if len(values) == 1 and torch.is_tensor(values[0]):
            batch[key] = values[0][None]
        elif key == "frames" and len(values[0]) > 1:
            # Channels stay last in memory. numpy takes new memory in huge pages: half the time.
            stack = default_collate if get_worker_info() else np.stack
            batch[key] = torch.as_tensor(stack([x.movedim(2, -1) for x in values])).movedim(-1, 3)
        else:
            batch[key] = default_collate(values)
    if get_worker_info() is not None:
        # Shared here: an error in a worker's sending thread would be lost.
        for x in filter(torch.is_tensor, chain(*map(as_list, batch.values()))):
            x.share_memory_()
    return batch


def _start_worker(_):
    # These reach the whole process group: the main process decides, and ends its workers.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class BatchLoader(DataLoader):
    """The batches of a data set, collated, as `batch_sampler` lists them: [(index, Fidelity), ...].

    workers: processes; 0: this one. An InputError in a worker is raised here with its own message,
    another exception with its traceback. A killed worker or a full /dev/shm is an InputError too.
    """

    def __init__(self, dataset, batch_sampler, workers: int, device: torch.device):
        options = {"num_workers": workers, "persistent_workers": workers > 0}
        options |= {"worker_init_fn": _start_worker, "pin_memory": device.type == "cuda"}
        super().__init__(dataset, batch_sampler=batch_sampler, collate_fn=collate, **options)

    def __iter__(self):
        batches = super().__iter__()
        self.processes = multiprocessing.active_children()
        if self.num_workers:
            # torch's handler would raise for a killed worker in the middle of a training step,
            # not when its batch is due.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # Registered last, so run first: torch and multiprocessing wait for workers to end.
            atexit.register(stop_workers)
        try:
            yield from batches
        except media.InputError as error:
            # Without the worker's traceback, which torch puts before.
            raise InputError(str(error).rpartition("InputError: ")[2].strip()) from None
        except RuntimeError as error:
            killed_by = [-p.exitcode for p in self.processes if (p.exitcode or 0) < 0]
            if signal.SIGBUS in killed_by or "shared memory" in str(error):
                remedy = "start Docker with --shm-size=16g or set data.workers=0"
                raise InputError(f"/dev/shm is full: {remedy}") from None
            if killed_by:
                worker = f"a data loading worker was killed ({signal.Signals(killed_by[0]).name})"
                raise InputError(f"{worker}; out of memory? set data.workers lower") from None
            raise


def stop_workers() -> None:
    """Kill what loader processes are left, for the end of a program: they ignore SIGTERM."""
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


def to_device(batch: dict, device: torch.device) -> dict:
    tensors = {k: v.to(device, non_blocking=True) for k, v in batch.items() if torch.is_tensor(v)}
    return batch | tensors


def iterate(dataset, fidelity, batch_size, *, rank=0, world_size=1, workers=0, device, title=None):
    """Yield the batches of a data set in order, on the device; each rank its share of the videos.
    title: of a progress bar, shown by rank 0 in a terminal."""
    owners = getattr(dataset, "owners", range(len(dataset)))
    pairs = [(k, fidelity) for k, i in enumerate(owners) if i % world_size == rank]
    batches = [pairs[k : k + batch_size] for k in range(0, len(pairs), batch_size)]
    loader = BatchLoader(dataset, batches, workers, device)
    hidden = title is None or rank > 0 or not sys.stderr.isatty()
    for batch in tqdm(loader, title, unit="batch", leave=False, disable=hidden):
        yield to_device(batch, device)
