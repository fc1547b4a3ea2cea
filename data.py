"""Annotations, frames, snippets, fidelities and features: everything between the disk and the encoder or the head.

On disk:
    ANNOTATIONS.json  ActivityNet JSON: {"database": {VIDEO: {"subset", "duration", "annotations": [{"segment": [start, end], "label"}]}}},
                      seconds
    FRAMES/VIDEO.zip  JPEG frames 000000.jpg ... by frame number, and video.json: {"fps", "num_frames", "duration_sec",
                      "frames": [numbers of the frames that are kept]}
    FEATURES/VIDEO.npy (L, C) float32

In memory: frames (L, T, 3, H, W) uint8, features (C, L), segments (N, 2) as fractions of the video, in [0, 1].
Legend: B videos, C channels, L snippets, T frames a snippet, N segments, F frames.
"""
import json
import math
import os
import zipfile
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate
from torchcodec.decoders import decode_jpeg


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


def load_annotations(path):
    """Reads an ActivityNet JSON: {subset: [Video, ...]}, in the file's order. Segments that are empty after clipping are left out.

    Raises FileNotFoundError or ValueError with what is wrong and where.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no annotation file {path}: set data.annotations, or make the toy data with `python toy.py --out data/toy`")
    with open(path) as f:
        try:
            database = json.load(f)["database"]
            database.items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no ActivityNet annotation file: expected JSON {{'database': {{VIDEO: {{'subset', 'duration', "
                             f"'annotations'}}}}}}, reading it failed with {type(error).__name__}: {error}") from None
    subsets = {}
    for name, entry in database.items():
        try:
            duration = float(entry["duration"])
            if not 0 < duration < math.inf:
                raise ValueError(f"duration {duration}")
            segments = np.array([a["segment"] for a in entry["annotations"]], np.float64).reshape(-1, 2)
            segments = torch.from_numpy((segments / duration).clip(0, 1).astype(np.float32))
            labels = [str(a["label"]) for a in entry["annotations"]]
            subset = entry["subset"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: video {name!r} needs a subset, a duration > 0 and annotations with segment [start, end] and label; "
                             f"found {json.dumps(entry)[:200]} ({type(error).__name__}: {error})") from None
        keep = segments[:, 1] > segments[:, 0]
        video = Video(name, duration, segments[keep], tuple(x for x, k in zip(labels, keep.tolist()) if k))
        subsets.setdefault(subset, []).append(video)
    return subsets


def list_hash(names):
    """Tells one list of videos from another, so that two numbers are known to be of the same videos."""
    return blake2b("\n".join(sorted(names)).encode(), digest_size=8).hexdigest()


def class_names(videos):
    """The labels of some videos, sorted."""
    return sorted({label for v in videos for label in v.labels})


def class_target(video, classes):
    """What a video classifier is trained towards, (n,): equal shares for the video's classes; zeros if it has none of them."""
    target = torch.tensor([float(c in video.labels) for c in classes])
    return target / target.sum().clamp(min=1)


def select(subsets, subset, folder, suffix, say=print):
    """The videos of one subset that have media or features in `folder`; the others are counted, named through `say` and left out.

    Raises ValueError if the subset does not exist or nothing of it is left.
    """
    if subset not in subsets:
        raise ValueError(f"no video of subset {subset!r} in the annotations, which have {sorted(subsets)}: set data.train_subset, data.val_subset")
    present = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    found = [v for v in subsets[subset] if v.name + suffix in present]
    missing = [v.name for v in subsets[subset] if v.name + suffix not in present]
    if not found:
        raise ValueError(f"none of the {len(missing)} {subset} videos has a {suffix} file in {folder}: expected, say, {folder}/{missing[0]}{suffix}")
    if missing:
        say(f"{subset}: {len(missing)} of {len(subsets[subset])} videos have no {suffix} file in {folder} and are left out: "
            + ", ".join(missing[:10]) + (" ..." if len(missing) > 10 else ""))
    return found


# ---------------------------------------------------------------- fidelities

class Fidelity(NamedTuple):
    name: str
    snippets: int  # L
    size: int  # H = W, pixels


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
    Pass it to DataLoader as batch_sampler; `set_epoch(epoch, step)` before an epoch, with the step to resume at.
    """

    def __init__(self, num_videos, batch_size, fidelities, *, cycle="long", period=1, seed=0, rank=0, world=1, shuffle=True):
        if num_videos < 1:
            raise ValueError("no videos to sample from")
        if cycle not in ("long", "short") or period < 1:
            raise ValueError(f"cycle {cycle!r} with period {period}: expected 'long' or 'short', and a period of at least 1")
        if batch_size % world:
            raise ValueError(f"the global batch size {batch_size} cannot be divided evenly over {world} processes")
        self.num_videos, self.batch_size, self.fidelities = num_videos, batch_size, list(fidelities)
        self.cycle, self.period, self.seed, self.rank, self.world, self.shuffle = cycle, period, seed, rank, world, shuffle
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
            order = torch.randperm(self.num_videos, generator=generator)
        order = order.repeat(math.ceil(self.steps * self.batch_size / self.num_videos)).tolist()
        own = self.batch_size // self.world
        for step in range(self.first, self.steps):
            first = step * self.batch_size + self.rank * own
            yield [(i, self.fidelity(self.epoch, step)) for i in order[first:first + own]]


# ---------------------------------------------------------------- frames

def snippet_frames(num_frames, snippets, frames, stride):
    """Frame numbers of L snippets, evenly spread: (L, T) int64. A snippet is a window of T * stride frames around its centre
    (i + 0.5) / L of the video, of which every stride-th is kept (LoFi, section 3: 64 frames, every 8th); clamped to the video."""
    centre = (torch.arange(snippets, dtype=torch.float64) + 0.5) * num_frames / snippets
    offset = (torch.arange(frames, dtype=torch.float64) + 0.5) * stride - frames * stride / 2
    return (centre[:, None] + offset).floor().clamp(0, num_frames - 1).long()


def snippet_rows(full, snippets, shift=0.0):
    """Which of the `full` snippets stand for fewer, evenly spread ones: (L,) int64. With an even ratio the middle falls between two
    snippets: shift 0 takes the later, 0.5 the earlier."""
    return ((torch.arange(snippets, dtype=torch.float64) + 0.5) * full / snippets - shift).floor().clamp(0, full - 1).long()


class FrameZip:
    """A video prepared as a ZIP of JPEG frames. num_frames, fps and duration are those of the video, not of what is kept of it."""

    def __init__(self, path):
        self.path = path
        try:
            self.zip = zipfile.ZipFile(path)
            info = json.loads(self.zip.read("video.json"))
            self.fps, self.num_frames, self.duration = info["fps"], info["num_frames"], info["duration_sec"]
            self.kept = np.asarray(info["frames"])
        except FileNotFoundError:
            raise FileNotFoundError(f"no frames at {path}") from None
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            raise ValueError(f"{path} is no ZIP of frames with a video.json in it ({error}): remove it and prepare this video again") from None

    def read(self, numbers):
        """Frames by number, each replaced by the nearest one kept: (F, 3, H, W) uint8."""
        at = np.searchsorted(self.kept, numbers).clip(1, max(len(self.kept) - 1, 1))
        if len(self.kept) > 1:
            at = at - (numbers - self.kept[at - 1] < self.kept[at] - numbers)
        else:
            at = np.zeros_like(at)
        decoded = {}  # clamped snippets ask for a frame several times
        for n in np.unique(self.kept[at]).tolist():
            try:
                decoded[n] = decode_jpeg(self.zip.read(f"{n:06d}.jpg"))
            except (KeyError, RuntimeError, zipfile.BadZipFile) as error:
                raise ValueError(f"{self.path}: frame {n:06d}.jpg cannot be read ({error}): remove the file and prepare this video again") from None
        return torch.stack([decoded[n] for n in self.kept[at].tolist()])


class Still:
    """One JPEG image, as a video of one frame."""
    num_frames, fps = 1, 1.0

    def __init__(self, path):
        self.path = path

    def read(self, numbers):
        try:
            return decode_jpeg(self.path)[None].expand(len(numbers), -1, -1, -1)
        except RuntimeError as error:
            raise ValueError(f"{self.path} is no JPEG image ({error})") from None


def crop_resize(frames, size, ratio, corner=(0.5, 0.5), flip=False):
    """A square crop of `ratio` times the short side, resized to size x size: (F, 3, H, W) uint8 -> (F, 3, size, size) uint8.

    corner: where the crop lies, (y, x) in [0, 1]; (0.5, 0.5) is the centre. The same for all frames.
    """
    h, w = frames.shape[2:]
    side = round(min(h, w) * ratio)
    y, x = round(corner[0] * (h - side)), round(corner[1] * (w - side))
    frames = frames[:, :, y:y + side, x:x + side]
    if side != size:
        frames = interpolate(frames, (size, size), mode="bilinear", antialias=True)
    return frames.flip(3) if flip else frames


class VideoDataset:
    """Untrimmed videos: dataset[index, fidelity] -> {"name", "frames" (L, T, 3, H, W) uint8, "segments" (N, 2), "target" (n,)}.

    Training takes one random crop, flip and snippet phase a video, a pure function of (seed, epoch, index); else all are central.
    """

    def __init__(self, videos, folder, *, classes=(), snippets, frames, stride, crop=0.875, flip=True, train=False, seed=0):
        self.videos, self.folder, self.classes, self.train, self.seed = videos, folder, list(classes), train, seed
        self.snippets, self.frames, self.stride, self.crop, self.flip = snippets, frames, stride, crop, flip
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that live on

    def set_epoch(self, epoch):
        self.epoch.fill_(epoch)

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, pair):
        index, fidelity = pair
        video = self.videos[index]
        media = FrameZip(f"{self.folder}/{video.name}.zip")
        shift, corner, flip = 0.0, (0.5, 0.5), False
        if self.train:
            rng = np.random.default_rng(seed_of(self.seed, "view", int(self.epoch), index))
            shift, corner, flip = rng.choice([0.0, 0.5]), tuple(rng.random(2)), bool(self.flip and rng.random() < 0.5)
        numbers = snippet_frames(media.num_frames, self.snippets, self.frames, self.stride)
        numbers = numbers[snippet_rows(self.snippets, fidelity.snippets, shift)]
        frames = crop_resize(media.read(numbers.flatten().numpy()), fidelity.size, self.crop, corner, flip)
        return {"name": video.name, "frames": frames.view(*numbers.shape, *frames.shape[1:]), "segments": video.segments,
                "target": class_target(video, self.classes)}


class Clip(NamedTuple):
    path: str
    start_sec: float  # a trimmed clip: 0
    end_sec: float  # a trimmed clip: inf
    label: int


def list_clips(folder, suffix, classes=None):
    """FOLDER/CLASS/*suffix -> ([Clip, ...], [class names]), sorted. Raises ValueError if there are none, or others than `classes`."""
    found = sorted(d.name for d in os.scandir(folder) if d.is_dir()) if os.path.isdir(folder) else []
    classes = found if classes is None else classes
    if not set(found) <= set(classes):
        raise ValueError(f"{folder} has classes that the training clips lack: {sorted(set(found) - set(classes))[:10]}")
    clips = [Clip(f"{folder}/{c}/{f}", 0.0, math.inf, classes.index(c)) for c in found
             for f in sorted(os.listdir(f"{folder}/{c}")) if f.endswith(suffix)]
    if not clips:
        raise ValueError(f"no {suffix} file in {folder}/CLASS/: name a folder with one sub-folder a class")
    return clips, classes


def segment_clips(videos, folder, classes):
    """The annotated segments of untrimmed videos as clips to classify (LoFi, section 4.2: ACP+); those of other classes are left out."""
    return [Clip(f"{folder}/{v.name}.zip", *(v.segments[i] * v.duration).tolist(), classes.index(label))
            for v in videos for i, label in enumerate(v.labels) if label in classes]


class ClipDataset:
    """Trimmed clips: dataset[index, fidelity] -> {"name", "frames" (1, T, 3, H, W) uint8, "label" int}.

    Training takes T frames, `stride` apart, at a random time within the clip, at a random crop and flip; else all are central.
    """

    def __init__(self, clips, *, frames, stride, crop=0.875, flip=True, train=False, seed=0):
        self.clips, self.frames, self.stride, self.crop, self.flip = clips, frames, stride, crop, flip
        self.train, self.seed = train, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    set_epoch = VideoDataset.set_epoch

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, pair):
        index, fidelity = pair
        clip = self.clips[index]
        media = FrameZip(clip.path) if clip.path.endswith(".zip") else Still(clip.path)
        where, corner, flip = 0.5, (0.5, 0.5), False
        if self.train:
            rng = np.random.default_rng(seed_of(self.seed, "view", int(self.epoch), index))
            where, corner, flip = rng.random(), tuple(rng.random(2)), bool(self.flip and rng.random() < 0.5)
        first, end = clip.start_sec * media.fps, min(clip.end_sec * media.fps, media.num_frames)
        slack = max(end - first - self.frames * self.stride, 0)
        numbers = np.floor(first + where * slack + (np.arange(self.frames) + 0.5) * self.stride).clip(first // 1, max(math.ceil(end) - 1, 0))
        frames = crop_resize(media.read(numbers.astype(np.int64)), fidelity.size, self.crop, corner, flip)
        return {"name": clip.path, "frames": frames[None], "label": clip.label}


# ---------------------------------------------------------------- features

class FeatureDataset:
    """Features: dataset[index, fidelity] -> {"name", "features" (C, L) float32, "segments" (N, 2), "target" (n,) class distribution}."""

    def __init__(self, videos, folder, classes):
        self.videos, self.folder, self.classes = videos, folder, classes
        self.channels = self._read(videos[0]).shape[1]

    def _read(self, video):
        path = f"{self.folder}/{video.name}.npy"
        try:
            features = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} cannot be read ({error}): expected an .npy array (L, C)") from None
        if features.ndim != 2:
            raise ValueError(f"{path} has shape {features.shape}, expected (L, C)")
        return features

    def set_epoch(self, epoch):
        pass  # no augmentation

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, pair):
        index, fidelity = pair
        video = self.videos[index]
        features = torch.from_numpy(np.array(self._read(video), np.float32)).t()  # (C, L)
        if features.shape[0] != self.channels:
            raise ValueError(f"{self.folder}/{video.name}.npy has {features.shape[0]} channels, {self.videos[0].name}.npy {self.channels}")
        if not features.isfinite().all():
            raise ValueError(f"{self.folder}/{video.name}.npy has NaN or infinite features: extract this video again")
        if features.shape[1] != fidelity.snippets:
            features = interpolate(features[None], fidelity.snippets, mode="linear", align_corners=False)[0]
        return {"name": video.name, "features": features, "segments": video.segments, "target": class_target(video, self.classes)}

    def statistics(self, most=2000):
        """Mean and standard deviation of each channel over snippets, and standard deviation of a video's mean: three (C,) float32.

        Over at most `most` evenly picked videos. A channel that never changes gets a small, positive deviation.
        """
        count, total, square, means = 0, 0.0, 0.0, []
        for i in np.linspace(0, len(self) - 1, min(len(self), most)).round().astype(int):
            x = np.asarray(self._read(self.videos[i]), np.float64)
            if not np.isfinite(x).all():
                raise ValueError(f"{self.folder}/{self.videos[i].name}.npy has NaN or infinite features: extract this video again")
            count, total, square = count + len(x), total + x.sum(0), square + (x * x).sum(0)
            means.append(x.mean(0))
        mean = total / count
        stds = np.sqrt(np.maximum(square / count - mean**2, 0)), np.std(means, 0)
        return tuple(torch.from_numpy(x).float() for x in (mean, *(np.maximum(std, 1e-3 * stds[0].max() + 1e-6) for std in stds)))


def collate(samples):
    """Tensors of one shape are stacked, numbers become a tensor; names and segments stay lists of B."""
    batch = {}
    for key in samples[0]:
        values = [s[key] for s in samples]
        if key in ("name", "segments"):
            batch[key] = values
        else:
            batch[key] = torch.stack(values) if torch.is_tensor(values[0]) else torch.tensor(values)
    return batch
