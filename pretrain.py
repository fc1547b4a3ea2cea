"""Pre-train a snippet encoder by classification, as the baselines of LoFi's Tables 1 and 7 do.

Each task is a choice of clips and classes for the one training loop:
    icp                  still images: SOURCE/{train,val}/CLASS/*.jpg
    acp                  trimmed clips of an auxiliary set, by action
    acp_plus             the target's annotated segments, by action (section 4.2)
    acp_plus_background  the same, and what lies between them as one more class: a control
    arrow                forward or reversed? Arrow of Time, Wei et al., CVPR 2018 (section 4.7)
    speed                normal or double speed? SpeedNet, Benaim et al., CVPR 2020 (section 4.7)

acp, arrow and speed read a folder SOURCE/{train,val}/CLASS/ of ZIPs of frames, folders of frames
or video files; a CSV; or the segments of an ActivityNet JSON. Every task leaves an encoder.
"""

import csv
import math
import os
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import data
import media
from media import InputError

METHODS = {  # pretrain.method -> its tasks, in order
    "none": [],
    "icp": ["icp"],
    "acp": ["acp"],
    "acp_plus": ["acp", "acp_plus"],
    "acp_plus_background": ["acp", "acp_plus_background"],
    "arrow": ["arrow"],
    "speed": ["speed"],
}
OPTIONS = {"acp_plus_background": "acp_plus"}  # task -> its block of options, if not of its name
PLAYBACKS = {"arrow": ("forward", "reversed"), "speed": ("normal", "double")}  # their classes
SUBSETS = ("training", "validation")


def tasks_of(method, pretrained):
    """Return the tasks left to train; a `pretrained` encoder replaces the first one.

    Raises InputError where that encoder would pass for one that `method` has trained.
    """
    if method not in METHODS:
        raise InputError(f"pretrain.method is {method!r}, expected one of {', '.join(METHODS)}")
    if not pretrained:
        return METHODS[method]
    if method in PLAYBACKS or (method == "icp" and pretrained != "torchvision"):
        raise InputError(
            f"pretrain.pretrained {pretrained} cannot replace the training of pretrain.method "
            f"{method}:\nset pretrain.pretrained=null, or pretrain.method=none for that encoder"
        )
    return METHODS[method][1:]


def task_options(block, task):
    """Return a task's options from the config block `pretrain`.

    arrow and speed without a source take the clips of acp.
    """
    options = dict(block[OPTIONS.get(task, task)])
    if task in PLAYBACKS and options["source"] is None:
        options |= {key: block["acp"][key] for key in ("source", "media")}
    return options


def group_size(task):
    """Return how many clips in a row belong into one batch: all playbacks of one (SpeedNet).

    Else the looks of the clips drown what tells the playbacks apart.
    """
    return len(PLAYBACKS.get(task, ("forward",)))


# ------------------------------------------------------------------------------------------- clips


@dataclass(frozen=True)
class Clip:
    """A part of a video and its class.

    start_sec, end_sec: 0 and inf for a trimmed clip. duration_sec: of the whole video, as
    annotated; times are then fractions of it, as in every stage. None: the media tell their frame
    rate. playback: see clip_frames.
    """

    path: str
    start_sec: float
    end_sec: float
    label: int
    duration_sec: float | None = None
    playback: str = "forward"


@dataclass
class Clips:
    """Training and held-out clips and the names of their classes."""

    train: list
    val: list
    classes: list


def load_clips(task, options, *, videos=None, num_snippets=None, subsets=SUBSETS, log=print):
    """Return the Clips of a task; InputError for what its source lacks.

    options: source and media. videos: (train, val) lists of data.Video, for acp_plus. num_snippets:
    of a video; shorter background is none. subsets: train and val in an ActivityNet JSON; if it
    lacks them, training and validation.
    """
    if task in ("acp_plus", "acp_plus_background"):
        return segment_clips(*videos, 1 / num_snippets if task == "acp_plus_background" else None)
    source = options["source"]
    if source is None:
        raise InputError(f"pretrain.{task}.source is not set: name a folder, CSV or JSON of clips")
    if task != "icp" and source.lower().endswith(".csv"):
        clips = csv_clips(source, log)
    elif task != "icp" and source.lower().endswith(".json"):
        clips = json_clips(source, options["media"], subsets, log)
    else:
        suffixes = (".jpg", ".jpeg", ".JPG", ".JPEG") if task == "icp" else None
        train, classes = list_clips(f"{source}/train", suffixes)
        val, _ = list_clips(f"{source}/val", suffixes, classes)
        clips = Clips(train, val, classes)
    if task not in PLAYBACKS:
        return clips
    playbacks = PLAYBACKS[task]
    return Clips(play(clips.train, playbacks), play(clips.val, playbacks), list(playbacks))


def play(clips, playbacks):
    """Return each clip once in each playback, which is its class."""
    return [
        replace(clip, label=label, playback=playback)
        for clip in clips
        for label, playback in enumerate(playbacks)
    ]


def list_clips(folder, suffixes=None, classes=None):
    """Return ([Clip], [class]) of FOLDER/CLASS/: files with these suffixes, or media of any kind.

    Raises InputError if there are none, or others than `classes`.
    """
    found = []
    if os.path.isdir(folder):
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    classes = classes or found
    unknown = [name for name in found if name not in classes]
    if unknown:
        raise InputError(f"{folder}: no training clips of classes {data.first_names(unknown)}")
    clips = []
    for name in found:
        paths = media.find_media(f"{folder}/{name}").values()
        if suffixes:
            files = sorted(f for f in os.listdir(f"{folder}/{name}") if f.endswith(suffixes))
            paths = [f"{folder}/{name}/{file}" for file in files]
        clips += [Clip(path, 0.0, math.inf, classes.index(name)) for path in paths]
    if not clips:
        raise InputError(f"no {'image' if suffixes else 'video'} in {folder}/CLASS/")
    return clips, classes


def json_clips(path, folder, subsets, log=print):
    """Return the segments of an ActivityNet JSON as Clips; see load_clips.

    folder: of its videos' frames; None: `frames` beside the JSON.
    """
    annotated = data.load_annotations(path)
    present = [names for names in (subsets, SUBSETS) if set(names) <= set(annotated)]
    if not present:
        raise InputError(
            f"{path} has subsets {', '.join(sorted(annotated))}, expected {' and '.join(subsets)}\n"
            "(config keys data.train_subset and data.val_subset), or training and validation"
        )
    folder = folder or f"{os.path.dirname(path) or '.'}/frames"
    return segment_clips(
        *(data.select_videos(annotated, name, folder, "frames", log) for name in present[0])
    )


def segment_clips(train, val, min_background=None):
    """Return the segments of untrimmed videos as Clips (section 4.2: ACP+).

    Held-out segments of other classes than the training videos' are left out. min_background:
    stretches without a segment, at least this fraction of their video, are one more class.
    """
    classes = data.class_names(train)
    parts = []
    for videos in (train, val):
        clips = []
        for video in videos:
            segments, labels = video.actions
            times = (segments * video.duration).tolist()
            for label, (start, end) in zip(labels, times, strict=True):
                if label in classes:
                    clips.append(Clip(video.path, start, end, classes.index(label), video.duration))
        if min_background and clips:  # without segments, nothing tells what is background
            for video in videos:
                for start, end in gaps(video.actions[0], min_background):
                    times = (start * video.duration, end * video.duration)
                    clips.append(Clip(video.path, *times, len(classes), video.duration))
        parts.append(clips)
    return Clips(*parts, [*classes, "background"] if min_background else classes)


def gaps(segments, shortest):
    """Return [(start, end)] of at least `shortest` that segments (N, 2) leave of [0, 1]."""
    found = []
    covered = 0.0
    for start, end in [*sorted(segments.tolist()), [1.0, 1.0]]:
        if start - covered >= shortest:
            found.append((covered, start))
        covered = max(covered, end)
    return found


def csv_clips(path, log=print):
    """Return the Clips of a CSV file.

    Its first line names the columns: path (of a video file, a ZIP or a folder of frames, relative
    to the CSV), label and, where wanted, start and end (seconds; empty: the whole clip) and split
    (train or val; without it every clip trains). Missing files are logged and left out.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeError, csv.Error) as error:
        raise InputError(f"cannot read CSV file {path} ({error})") from None
    parts = {"train": [], "val": []}
    missing = []
    for row in rows:
        try:
            split, clip = _csv_clip(row, os.path.dirname(path))
        except ValueError:
            raise InputError(
                f"{path}: {row} is not valid, expected path, label and optionally\n"
                "start and end (0 <= start < end, seconds) and split (train or val)"
            ) from None
        if os.path.exists(clip.path):
            parts[split].append(clip)
        else:
            missing.append(clip.path)
    if missing:
        log(f"{path}: {len(missing)} files are missing and left out: {data.first_names(missing)}")
    classes = sorted({clip.label for clip in parts["train"]})
    unknown = sorted({clip.label for clip in parts["val"]} - set(classes))
    if unknown or not classes:
        raise InputError(f"{path}: no training clips of {data.first_names(unknown) or 'any class'}")
    for split, clips in parts.items():
        parts[split] = [replace(clip, label=classes.index(clip.label)) for clip in clips]
    return Clips(**parts, classes=classes)


def _csv_clip(row, folder):
    """Return the split of a row and its Clip, labelled by name; ValueError if it is not valid."""
    row = {"start": 0, "end": math.inf, "split": "train"} | {k: v for k, v in row.items() if v}
    start = float(row["start"])
    end = float(row["end"])
    is_valid = row.keys() == {"path", "label", "start", "end", "split"} and 0 <= start < end
    if not is_valid or row["split"] not in ("train", "val"):
        raise ValueError(row)
    return row["split"], Clip(os.path.join(folder, row["path"]), start, end, row["label"])


# ---------------------------------------------------------------------------------------- data set


def clip_frames(first, end, frames, stride, where=0.5, playback="forward"):
    """Return T frame numbers, `stride` apart, of a clip from frame `first` to `end`: (T,) int64.

    They are clamped to the clip. where: 0 the earliest, 1 the latest in the clip. playback:
    "forward", "reversed", "normal" or "double" speed, which takes every second frame of normal. In
    a clip too short for T frames at double speed both take a smaller stride, so that clamping does
    not give the answer away; it must have 2 T frames.
    """
    if playback in PLAYBACKS["speed"]:
        stride = min(stride, int((end - first) // (2 * frames)))
    if playback == "double":
        stride *= 2
    slack = max(end - first - frames * stride, 0)
    numbers = np.floor(first + where * slack + (np.arange(frames) + 0.5) * stride)
    numbers = numbers.clip(first // 1, max(math.ceil(end) - 1, 0)).astype(np.int64)
    return numbers[::-1].copy() if playback == "reversed" else numbers


@dataclass(eq=False)
class ClipDataset:
    """Clips: dataset[index, fidelity] -> {"name", "frames" (1, T, 3, H, W) uint8, "label" int}.

    Training takes T frames, `stride` apart, at a random time within the clip, with a random crop
    and flip, the same for `group_size` clips that follow each other; else all are central.
    """

    videos: list
    frames: int
    stride: int
    crop: float = 0.875
    flip: bool = True
    train: bool = False
    seed: int = 0
    group_size: int = 1

    def __post_init__(self):
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # loader processes see it

    set_epoch = data.VideoDataset.set_epoch

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, pair):
        index, fidelity = pair
        clip = self.videos[index]
        source = media.open_media(clip.path)
        first, end = self._frame_range(clip, source)
        where = 0.5
        view = {}
        if self.train:
            group = index // self.group_size
            rng = np.random.default_rng(data.seed_of(self.seed, "view", int(self.epoch), group))
            where = rng.random()
            view["corner"] = tuple(rng.random(2).tolist())
            view["flip"] = self.flip and rng.random() < 0.5
        numbers = clip_frames(first, end, self.frames, self.stride, where, clip.playback)
        frames = data.read_view(source, numbers, fidelity.size, self.crop, **view)
        return {"name": clip.path, "frames": frames[None], "label": clip.label}

    def _frame_range(self, clip, source):
        """Return where a clip begins and ends, in frames."""
        first = 0
        end = source.num_frames
        if (clip.start_sec, clip.end_sec) != (0, math.inf):
            fps = source.num_frames / clip.duration_sec if clip.duration_sec else source.fps
            if not fps:
                raise InputError(f"{clip.path}: no frame rate, put a video.json beside the frames")
            first = clip.start_sec * fps
            end = min(clip.end_sec * fps, end)
        needed = 2 * self.frames if clip.playback in PLAYBACKS["speed"] else 0
        if not first < end or end - first < needed:
            raise InputError(
                f"{clip.path}: {max(end - first, 0):g} frames from {clip.start_sec:g} to "
                f"{clip.end_sec:g} s, expected {needed or 'more'}: correct its times or remove it"
            )
        return first, end


# -------------------------------------------------------------------------------------- classifier


class ClipClassifier(nn.Module):
    """Classify clips by the snippet encoder and a linear layer: (B, 1, T, 3, H, W) -> (B, n)."""

    def __init__(self, encoder, num_classes):
        super().__init__()
        self.encoder = encoder
        self.linear = nn.Linear(encoder.channels, num_classes)

    def forward(self, frames):
        return self.linear(self.encoder(frames).mean(2))


def classification_step(net, batch, autocast, generator=None):
    """Run forward and backward of a batch; return {"loss", "accuracy"}. Nothing is drawn."""
    with autocast():
        logits = net(batch["frames"]).float()
    loss = cross_entropy(logits, batch["label"])
    loss.backward()
    accuracy = (logits.argmax(1) == batch["label"]).float().mean()
    return {"loss": loss.detach(), "accuracy": accuracy}


def held_out_accuracy(model, batches, clips, autocast, sum_over_ranks):
    """Return a record of a trained classifier: numbers of clips and its accuracy.

    batches: this process' held-out ones, on the device. clips: a Clips. sum_over_ranks(tensor).
    "top1" and "chance", the share of the most frequent class, are None without held-out clips.
    """
    model.eval()
    device = next(model.parameters()).device
    correct = torch.zeros(1, dtype=torch.float64, device=device)
    with torch.no_grad(), autocast():
        for batch in batches:
            correct += (model(batch["frames"]).argmax(1) == batch["label"]).sum()
    total = len(clips.val)
    correct = sum_over_ranks(correct).item()
    counts = torch.bincount(torch.tensor([clip.label for clip in clips.val], dtype=torch.int64))
    return {
        "classes": len(clips.classes),
        "training_clips": len(clips.train),
        "held_out_clips": total,
        "top1": correct / total if total else None,
        "chance": counts.max().item() / total if total else None,
    }
