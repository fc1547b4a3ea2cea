"""Pre-train a snippet encoder by classification, as the baselines of LoFi's Tables 1 and 7 do.

Each task is a choice of clips and classes for the one training loop, and leaves an encoder:
    icp                  still images: SOURCE/{train,val}/CLASS/*.jpg
    acp                  trimmed clips of an auxiliary set, by action
    acp_plus             the target's annotated segments, by action (section 4.2)
    acp_plus_background  the same, and what lies between them as one more class: a control
    arrow                forward or reversed? Arrow of Time, Wei et al., CVPR 2018 (section 4.7)
    speed                normal or double speed? SpeedNet, Benaim et al., CVPR 2020 (section 4.7)

acp, arrow and speed read a folder SOURCE/{train,val}/CLASS/ of ZIPs of frames, folders of frames
or video files; a CSV; or the segments of an ActivityNet JSON.
"""

import math
import os
from collections import Counter, namedtuple
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

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
PLAYBACKS = {"arrow": ("forward", "reversed"), "speed": ("normal", "double")}  # their classes
SUBSETS = ("training", "validation")


def tasks_of(method, pretrained):
    """Return the tasks left to train; a `pretrained` encoder replaces the first one.

    Raises InputError where that encoder would pass for one that `method` has trained.
    """
    if method not in METHODS:
        raise InputError(f"pretrain.method is {method!r}, expected one of {', '.join(METHODS)}")
    if pretrained and (method in PLAYBACKS or (method == "icp" and pretrained != "torchvision")):
        raise InputError(
            f"pretrain.pretrained {pretrained} cannot replace the training of pretrain.method "
            f"{method}:\nset pretrain.pretrained=null, or pretrain.method=none for that encoder"
        )
    return METHODS[method][1:] if pretrained else METHODS[method]


def task_options(block, task):
    """Return a task's options from the config block `pretrain`: arrow and speed without a source
    take the clips of acp."""
    options = dict(block[task.removesuffix("_background")])
    if task in PLAYBACKS and options["source"] is None:
        options |= {key: block["acp"][key] for key in ("source", "media")}
    return options


@dataclass(frozen=True)
class Clip:
    """A part of a video, of all of it from 0 to inf, and its class. playback: see clip_frames.

    duration_sec: of the whole video, as annotated; times are then fractions of it, as in every
    stage. None: the media tell their frame rate.
    """

    path: str
    start_sec: float
    end_sec: float
    label: int
    duration_sec: float | None = None
    playback: str = "forward"


Clips = namedtuple("Clips", "train val classes")  # two lists of Clip, and the names of classes


def load_clips(task, options, *, videos=None, num_snippets=None, subsets=SUBSETS, log=print):
    """Return the Clips of a task; InputError for what its source lacks.

    options: source, and media, the frames of a JSON's videos (None: `frames` beside it). videos:
    (train, val) lists of data.Video, for acp_plus. num_snippets: of a video; shorter background is
    none. subsets: train and val in a JSON; if it lacks them, training and validation.
    """
    if task.startswith("acp_plus"):
        return segment_clips(*videos, 1 / num_snippets if task == "acp_plus_background" else None)
    source = options["source"]
    if source is None:
        raise InputError(f"pretrain.{task}.source is not set: name a folder, CSV or JSON of clips")
    suffix = os.path.splitext(source)[1].lower()
    if suffix == ".csv" and task != "icp":
        clips = csv_clips(source, log)
    elif suffix == ".json" and task != "icp":
        annotated = data.load_annotations(source)
        both = (subsets, SUBSETS)
        names = next((names for names in both if set(names) <= set(annotated)), subsets)
        folder = options["media"] or os.path.join(os.path.dirname(source), "frames")
        videos = [data.select_videos(annotated, name, folder, "frames", log) for name in names]
        clips = segment_clips(*videos)
    else:
        suffixes = (".jpg", ".jpeg", ".JPG", ".JPEG") if task == "icp" else None
        train, classes = list_clips(f"{source}/train", suffixes)
        clips = Clips(train, list_clips(f"{source}/val", suffixes, classes)[0], classes)
    if task not in PLAYBACKS:
        return clips
    # Each clip once in each playback, which is its class.
    ways = list(enumerate(PLAYBACKS[task]))
    train = [replace(clip, label=k, playback=way) for clip in clips.train for k, way in ways]
    val = [replace(clip, label=k, playback=way) for clip in clips.val for k, way in ways]
    return Clips(train, val, list(PLAYBACKS[task]))


def list_clips(folder, suffixes=None, classes=None):
    """Return ([Clip], [class]) of FOLDER/CLASS/: files with these suffixes, or media of any kind.

    Raises InputError if there are none, or others than `classes`.
    """
    found = sorted(path.name for path in Path(folder).glob("*") if path.is_dir())
    classes = classes or found
    unknown = [name for name in found if name not in classes]
    if unknown:
        raise InputError(f"{folder}: no training clips of classes {data.first_names(unknown)}")
    clips = []
    for name in found:
        paths = media.find_media(f"{folder}/{name}").values()
        if suffixes:
            files = os.scandir(f"{folder}/{name}")
            paths = sorted(file.path for file in files if file.name.endswith(suffixes))
        clips += [Clip(path, 0.0, math.inf, classes.index(name)) for path in paths]
    if not clips:
        raise InputError(f"no {'image' if suffixes else 'video'} in {folder}/CLASS/")
    return clips, classes


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
            for label, times in zip(labels, (segments * video.duration).tolist(), strict=True):
                if label in classes:
                    clips.append(Clip(video.path, *times, classes.index(label), video.duration))
        if min_background and clips:  # without segments, nothing tells what is background
            for video in videos:
                for start, end in gaps(video.annotated[0], min_background):
                    times = (start * video.duration, end * video.duration)
                    clips.append(Clip(video.path, *times, len(classes), video.duration))
        parts.append(clips)
    return Clips(*parts, [*classes, "background"] if min_background else classes)


def gaps(segments, shortest):
    """Return [(start, end)] of at least `shortest` that segments (N, 2) leave of [0, 1]."""
    starts, ends = segments[segments[:, 0].argsort()].T
    covered = [0.0, *ends.cummax(0).values.tolist()]
    left = zip(covered, [*starts.tolist(), 1.0], strict=True)
    return [(start, end) for start, end in left if end - start >= shortest]


def csv_clips(path, log=print):
    """Return the Clips of a CSV file.

    Its first line names the columns: path (of a video file, a ZIP or a folder of frames, relative
    to the CSV), label and, where wanted, start and end (seconds or h:mm:ss; empty: the whole clip)
    and split (train or val; without it every clip trains). Missing files are logged and left out.
    """
    parts = {"train": [], "val": []}
    missing = []

    def add(row, seconds):
        part = parts[row.pop("split", "train")]
        file = os.path.join(os.path.dirname(path), row.pop("path"))
        times = (seconds(row.pop("start", "0")), seconds(row.pop("end", "inf")))
        clip = Clip(file, *times, row.pop("label"))
        if row or not 0 <= clip.start_sec < clip.end_sec:
            raise ValueError("columns, or start and end")
        (part if os.path.exists(file) else missing).append(clip)

    expected = "columns path, label and optionally start, end (0 <= start < end, seconds), split"
    data.read_table(path, add, f"{expected} (train or val)")
    if missing:
        names = data.first_names([clip.path for clip in missing])
        log(f"{path}: {len(missing)} files are missing and left out: {names}")
    classes = sorted({clip.label for clip in parts["train"]})
    unknown = sorted({clip.label for clip in parts["val"]} - set(classes))
    if unknown or not classes:
        raise InputError(f"{path}: no training clips of {data.first_names(unknown) or 'any class'}")
    for split, clips in parts.items():
        parts[split] = [replace(clip, label=classes.index(clip.label)) for clip in clips]
    return Clips(**parts, classes=classes)


def clip_frames(first, end, frames, stride, where=0.5, playback="forward"):
    """Return T frame numbers, `stride` apart, of a clip from frame `first` to `end`: (T,) int64.

    They are clamped to the clip. where: 0 the earliest, 1 the latest in the clip. playback: see
    PLAYBACKS; double speed takes every second frame of normal. In a clip too short for T frames so,
    both take a smaller stride, as clamping would give the answer away; it must have 2 T frames.
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
    and flip; else all are central. All playbacks of a clip, `group_size` in a row, get the same and
    belong into one batch (SpeedNet): else the looks of the clips drown what tells them apart.
    """

    videos: list
    frames: int
    stride: int
    crop: float = 0.875
    flip: bool = True
    train: bool = False
    seed: int = 0

    def __post_init__(self):
        self.group_size = len({clip.playback for clip in self.videos})

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, pair):
        index, fidelity = pair
        epoch, index = divmod(index, len(self))
        clip = self.videos[index]
        source = media.open_media(clip.path)
        first, end = 0, source.num_frames
        if (clip.start_sec, clip.end_sec) != (0, math.inf):
            fps = source.num_frames / clip.duration_sec if clip.duration_sec else source.fps
            if not fps:
                raise InputError(f"{clip.path}: no frame rate, put a video.json beside the frames")
            first, end = clip.start_sec * fps, min(clip.end_sec * fps, end)
        needed = 2 * self.frames if clip.playback in PLAYBACKS["speed"] else 0
        if not first < end or end - first < needed:
            raise InputError(
                f"{clip.path}: {max(end - first, 0):g} frames from {clip.start_sec:g} to "
                f"{clip.end_sec:g} s, expected {needed or 'more'}: correct its times or remove it"
            )
        draws = [0.5, 0.5, 0.5, 1.0]
        if self.train:
            group = index // self.group_size
            rng = np.random.default_rng(data.seed_of(self.seed, "view", epoch, group))
            draws = rng.random(4).tolist()
        where, *corner, chance = draws
        flip = self.flip and chance < 0.5
        numbers = clip_frames(first, end, self.frames, self.stride, where, clip.playback)
        frames = data.read_view(source, numbers, fidelity.size, self.crop, corner, flip)
        return {"name": clip.path, "frames": frames[None], "label": clip.label}


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
    loss = nn.functional.cross_entropy(logits, batch["label"])
    loss.backward()
    accuracy = (logits.argmax(1) == batch["label"]).float().mean()
    return {"loss": loss.detach(), "accuracy": accuracy}


def held_out_accuracy(model, batches, clips, ddp):
    """Return a record of a trained classifier: numbers of Clips, and its accuracy on held-out ones.

    batches: this process' share of them, on the device. "top1" and "chance", the share of the most
    frequent class, are None without held-out clips.
    """
    model.eval()
    correct = 0
    with torch.no_grad(), ddp.autocast():
        for batch in batches:
            correct += (model(batch["frames"]).argmax(1) == batch["label"]).sum().item()
    correct = sum(ddp.gather(correct))
    total = len(clips.val)
    counts = Counter(clip.label for clip in clips.val)
    return {
        "classes": len(clips.classes),
        "training_clips": len(clips.train),
        "held_out_clips": total,
        "top1": correct / total if total else None,
        "chance": max(counts.values()) / total if total else None,
    }
