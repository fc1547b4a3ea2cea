"""Read frames by number from prepared ZIPs, folders of JPEG files, video files and still images.

    FOLDER/VIDEO.zip            JPEG frames 000000.jpg ... by frame number, stored, not deflated,
                                and video.json: {"fps", "num_frames", "duration_sec", "frames":
                                [their numbers]}; tools.prepare_data adds smaller copies in 181/ and
                                128/, and what docs/data_formats.md lists
    FOLDER/VIDEO/img_00001.jpg  all frames, or every n-th; a video.json may tell fps, duration_sec
    FOLDER/VIDEO.mp4 ...        whatever FFmpeg decodes, through torchcodec
    IMAGE.jpg                   a video of one frame

Frames are numbered by the video's own clock: frame i is the one on screen at (i + 0.5) / fps, where
fps = num_frames / duration. At a constant frame rate that is the i-th in presentation order; at a
variable one, even numbers mean even times, as after `ffmpeg -r`. Rotation tags are followed;
non-square pixels are left as they are.

Legend: L snippets, T frames a snippet, F frames. This file imports nothing of the project.
"""

import contextlib
import itertools
import json
import math
import os
import re
import unicodedata
import weakref
import zipfile
import zlib
from collections.abc import Iterator
from functools import cached_property
from io import FileIO

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchcodec.decoders import AudioDecoder, ColorConverter, Demuxer, VideoDecoder, decode_jpeg
from torchcodec.transforms import Resize

MIN_COVERAGE = 0.9  # a video of which less decodes is refused

# The preferred ones first.
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv")
VIDEO_SUFFIXES += (".ts", ".3gp", ".ogv", ".m2ts", ".mts", ".vob", ".mxf", ".gif")
PROGRAM_STREAMS = (".mpg", ".mpeg", ".vob")
MPEG_STREAMS = (".ts", ".m2ts", ".mts", *PROGRAM_STREAMS)  # their clock begins anywhere
UNSTAMPED = (".avi", ".mxf", *PROGRAM_STREAMS)  # their stamps, if any, are not those of B-frames

UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # escapes, and what is not UTF-8

# Beyond these, an image or an entry of a ZIP is not read: 8K, and a video.json of a day.
MAX_PIXELS = 2**26
MAX_BYTES = 2**25

# What reading or decoding a damaged JPEG, or a damaged entry of a ZIP, may raise.
DAMAGE = (OSError, KeyError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


class InputError(ValueError):
    """What a user can mend: a file, a path, an option."""


def snippet_frames(num_frames: int, snippets: int, frames_per_snippet: int, stride: int) -> Tensor:
    """Return the frame numbers of L evenly spread snippets: (L, T) int64.

    A snippet is a window of T * stride frames around its centre, (i + 0.5) / L of the video, of
    which every stride-th is kept (LoFi, section 3: 64 frames, every 8th); clamped to the video.
    """
    centre = (torch.arange(snippets, dtype=torch.float64) + 0.5) * num_frames / snippets
    offset = (torch.arange(frames_per_snippet, dtype=torch.float64) + 0.5) * stride
    offset = offset - frames_per_snippet * stride / 2
    return (centre[:, None] + offset).floor().clamp(0, num_frames - 1).long()


def open_media(path: str | os.PathLike) -> "JpegFrames | FrameZip | VideoFile":
    """Open a video, whatever its kind.

    It has .path, .num_frames, .fps and .duration (seconds; both None where unknown), .note (what is
    wrong with it, or None), .read and .decode. Raises InputError if it cannot be opened.
    """
    path = os.fspath(path)
    if UNSHOWN.search(path):
        raise InputError(f"{path!r} has characters that no terminal shows: rename it")
    if not os.path.exists(path):
        raise InputError(f"no frames at {path}: no such file or folder")
    if os.path.isdir(path):
        return open_folder(path)
    kind = os.path.splitext(path)[1].lower()
    if kind in (".jpg", ".jpeg"):
        return JpegFrames(path, {0: path}, fps=1.0, duration=1.0)
    return FrameZip(path) if kind == ".zip" else VideoFile(path)


def spellings(name: str) -> list[str]:
    """Return spellings of a video's name, its own first: v_ or none, ü as one character or two."""
    both = [name, name[2:] if name.startswith("v_") else f"v_{name}"]
    composed = [unicodedata.normalize(form, spelt) for form in ("NFC", "NFD") for spelt in both]
    return list(dict.fromkeys([*both, *composed]))


def look_up(names, table: dict) -> dict:
    """Return {name: value} of the names that a table has in whichever of their spellings."""
    return {name: table[s] for name in names for s in spellings(name)[::-1] if s in table}


def find_media(folder, names=None, *, prepared=True, skip=None, log=None) -> dict[str, str]:
    """Return the media of a folder, {video name: path}; nothing is opened.

    names: the videos to look for, spelt with v_ or without, which are then the keys; None: all, by
    the names of their files. A ZIP is preferred to a folder of frames, and that to a video file.
    prepared: False leaves out ZIPs. skip: a folder to leave out, with the folders that hold it.
    log: is told which of several video files of one name is used.
    """
    kinds = (".zip" if prepared else None, "/", *VIDEO_SUFFIXES)
    skipped = f"{os.path.realpath(skip)}/" if skip else ""
    found = {}
    for entry in os.scandir(folder) if os.path.isdir(folder) else ():
        stem, kind = (entry.name, "/") if entry.is_dir() else os.path.splitext(entry.name)
        if stem.startswith((".", "__MACOSX")) or kind.lower() not in kinds:
            continue
        stem = repr(stem)[1:-1] if UNSHOWN.search(stem) else stem
        if kind != "/" or not skipped.startswith(f"{os.path.realpath(entry.path)}/"):
            found.setdefault(stem, []).append((kinds.index(kind.lower()), entry.path))

    media = {}
    for name, files in look_up(sorted(found) if names is None else names, found).items():
        (rank, media[name]), *others = sorted(files)
        if log and others and kinds[rank] in VIDEO_SUFFIXES:
            log(f"{media[name]} is used, not {', '.join(path for _, path in others)}")
    return media


# ----------------------------------------------------------------------------------- JPEG frames


def nearest(kept: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return where in `kept`, ascending, the nearest to each number is; of two the later."""
    after = np.searchsorted(kept, numbers).clip(0, len(kept) - 1)
    before = (after - 1).clip(0)
    return np.where(numbers - kept[before] < kept[after] - numbers, before, after)


# The memory of the last two results, each with a weak reference to the array that was given of it.
_spare = []


def spare_array(shape):
    """Return an array of undefined bytes, in the memory of an earlier one that is gone, or in new:
    for the kernel to hand out and clear new memory takes up to a tenth of decoding into it."""
    size = math.prod(shape)
    fits = [k for k, (memory, user) in enumerate(_spare) if user() is None and memory.size >= size]
    memory = _spare.pop(fits[0])[0] if fits else np.empty(size, np.uint8)
    array = memory[:size].reshape(shape)
    _spare.append((memory, weakref.ref(array)))
    del _spare[:-2]
    return array


def stack_frames(frames, places, view=None, path=""):
    """Stack frames that come one by one, (3, H, W): the k-th wherever the F `places` are k.

    view: what to keep of a frame, say a crop: (H, W, 3) array -> (h, w, 3) array. Returns
    (F, 3, h, w) uint8 with channels-last memory, as decoders and cuDNN have it.
    """
    rows = {}
    for row, k in enumerate(places.tolist()):
        rows.setdefault(k, []).append(row)
    stacked = None
    for k, frame in enumerate(frames):
        # numpy's slices and copies cost a third of torch's, and a video has 800 frames.
        frame = frame.numpy().transpose(1, 2, 0)
        frame = view(frame) if view else frame
        if stacked is None:
            stacked = spare_array((len(places), *frame.shape))
        if frame.shape != stacked.shape[1:]:
            raise InputError(f"{path} has frames of sizes {frame.shape} and {stacked.shape[1:]}")
        for row in rows[k]:
            stacked[row] = frame
    return torch.from_numpy(stacked).permute(0, 3, 1, 2)


def num_pixels(jpeg) -> int:
    """Return how many pixels the header of a JPEG image tells, 0 without one."""
    at = 2
    while at + 9 <= len(jpeg) and jpeg[at] == 0xFF:
        # The frame header, among those of tables: its height and width.
        if 0xC0 <= jpeg[at + 1] <= 0xCF and jpeg[at + 1] not in (0xC4, 0xC8, 0xCC):
            height, width = jpeg[at + 5 : at + 7], jpeg[at + 7 : at + 9]
            return int.from_bytes(height, "big") * int.from_bytes(width, "big")
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return 0


def positive(*values):
    """Return values of a video.json. Raises ValueError unless they are numbers above 0."""
    if not all(isinstance(x, (int, float)) and 0 < x < 2**53 for x in values):
        raise ValueError(f"expected numbers above 0, got {values}")
    return values


class JpegFrames:
    """A video as JPEG files {frame number: path}. kept: their numbers, ascending (K,)."""

    note = None
    short_sides = (None,)

    def __init__(self, path, files, fps=None, duration=None):
        self.path = path
        self.names = [files[number] for number in sorted(files)]
        self.kept = np.array(sorted(files))
        self.num_frames = int(self.kept[-1]) + 1
        self.fps = fps
        self.duration = duration

    def read(self, numbers, short_side: float | None = None, view=None) -> Tensor:
        """Read frames by number, each replaced by the nearest one kept: (F, 3, H, W) uint8.

        short_side: as many pixels are enough, rounded; a prepared ZIP then takes the smallest of
        its copies that have them. view: see stack_frames.
        """
        least = short_side - 0.5 if short_side else math.inf
        copy = max((c for c, side in enumerate(self.short_sides) if c and side > least), default=0)
        # Clamped snippets ask for a frame several times: each is decoded once.
        kept, places = np.unique(nearest(self.kept, np.asarray(numbers)), return_inverse=True)
        frames = (self._decode(k, copy) for k in kept.tolist())
        return stack_frames(frames, places, view, self.path)

    def decode(self, numbers, short_side: float | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield (number, frame (3, H, W)) for each of the numbers, ascending."""
        for number in np.unique(numbers).tolist():
            yield number, self.read([number], short_side)[0]

    def _decode(self, k, copy):
        """Return the k-th frame kept, of the copy-th size."""
        try:
            jpeg = self._jpeg(k, copy)
            if len(jpeg) > MAX_BYTES or num_pixels(jpeg) > MAX_PIXELS:
                raise ValueError(f"more than {MAX_BYTES} bytes or {MAX_PIXELS} pixels")
            return decode_jpeg(torch.frombuffer(jpeg, dtype=torch.uint8))
        except DAMAGE as error:
            words = f"{os.path.basename(self.names[k])} is not a valid JPEG image"
            raise InputError(f"{self.path}: {words} ({_reason(error)}): make it again") from None

    def _jpeg(self, k, copy):
        with open(self.names[k], "rb") as file:
            return bytearray(file.read(MAX_BYTES + 1))


def open_folder(path):
    """Return the JpegFrames of a folder, whose files end in their number, counted from the first
    one that is there. A video.json in it may tell fps and duration_sec."""
    found = {}
    for entry in os.scandir(path):
        if match := re.fullmatch(r"(.*?)(\d+)\.jpe?g", entry.name, re.IGNORECASE):
            found.setdefault(match[1], {})[int(match[2])] = f"{path}/{entry.name}"
    # Optical flow may lie beside the frames: flow_x_00001.jpg.
    prefixes = [p for p in ("img_", "image_") if p in found][:1] or sorted(found)
    if len(prefixes) != 1:
        kinds = f"frames of several kinds, {prefixes}" if prefixes else "no frames"
        raise InputError(f"{path} holds {kinds}: expected files img_00001.jpg ..., or a video file")
    files = found[prefixes[0]]
    first = min(files)
    times = ()
    if os.path.exists(f"{path}/video.json"):
        try:
            with open(f"{path}/video.json") as file:
                info = json.load(file)
            times = positive(info["fps"], info["duration_sec"])
        except (*DAMAGE, TypeError) as error:
            expected = f'{{"fps": 25, "duration_sec": 10.0}} ({type(error).__name__}: {error})'
            raise InputError(f"{path}/video.json: expected {expected}") from None
    return JpegFrames(path, {number - first: file for number, file in files.items()}, *times)


class FrameZip(JpegFrames):
    """A video prepared as a ZIP of JPEG frames, as the head of this file describes it.

    num_frames, fps and duration are those of the video, not of what is kept of it. prepared: the
    settings it was prepared with, or None. short_sides: of its copies, the largest first.
    """

    def __init__(self, path):
        self.path = path
        self.starts = None  # where each JPEG begins, of each copy: (copies, K)
        try:
            self.file = FileIO(path)
            info = self._read_info()
            self.kept = np.array(info["frames"])
            whole = self.kept.dtype.kind == "i" and self.kept.ndim == 1
            if not whole or (np.diff(self.kept, prepend=-1) < 1).any():
                raise ValueError("expected frame numbers in ascending order as frames")
            keys = ("fps", "duration_sec", "num_frames")
            self.fps, self.duration, self.num_frames = positive(*(info[key] for key in keys))
            frames = self.fps * self.duration
            if self.kept[-1] >= self.num_frames or not 0.5 < frames / self.num_frames < 2:
                raise ValueError("fps, duration_sec, num_frames and frames contradict each other")
        except (*DAMAGE, TypeError, IndexError) as error:
            problem = f"not a valid ZIP of frames ({error})"
            raise InputError(f"{path} is {problem}; prepare this video again") from None
        self.note = str(info["note"]) if info.get("note") else None
        self.prepared = info["prepared"] if isinstance(info.get("prepared"), dict) else None

    @cached_property
    def archive(self):
        return zipfile.ZipFile(self.path)

    def _read_info(self):
        """Read video.json; if the ZIP is one of ours, note where each JPEG lies.

        For every sample zipfile would parse a directory of 2,400 entries and check a sum of each
        JPEG: a tenth of its time at full fidelity, a third at fidelity S. Our ZIPs begin with
        video.json, which has the sizes of the JPEGs that follow, each after 30 bytes and its name.
        """
        # The signature, the method 0 (stored), the lengths of name and extra field, the name.
        header = self.file.read(40)
        if header[:4] + header[8:10] + header[26:] != b"PK\3\4\0\0\x0a\0\0\0video.json":
            return json.loads(self._read_entry("video.json"))
        length = int.from_bytes(header[18:22], "little")
        info = json.loads(self.file.read(min(length, MAX_BYTES)))
        if "bytes" in info:
            positive(*info["short_sides"])
            self.short_sides, self.sizes = info["short_sides"], info["bytes"]
            sizes = np.array(self.sizes)
            shape = (len(self.short_sides), len(info["frames"]))
            whole = sizes.dtype.kind == "i" and sizes.shape == shape
            if not whole or sizes.min() < 1 or sizes.max() > MAX_BYTES:
                raise ValueError(f"expected the sizes of {shape} JPEGs as bytes")
            names = [[len(entry_name(0, copy, self.short_sides))] for copy in range(shape[0])]
            names = np.array(names) + [len(f"{n:06d}") - 6 for n in info["frames"]]
            ends = self.file.tell() + np.cumsum(30 + names + sizes).reshape(shape)
            if (size := os.path.getsize(self.path)) < ends[-1, -1]:
                raise ValueError(f"truncated: {size} of at least {ends[-1, -1]} bytes")
            self.starts = (ends - sizes).tolist()
        return info

    @cached_property
    def names(self):
        return [entry_name(number, 0, None) for number in self.kept]

    def _jpeg(self, k, copy):
        if self.starts:
            jpeg = bytearray(self.sizes[copy][k])
            os.preadv(self.file.fileno(), [jpeg], self.starts[copy][k])
            if jpeg.startswith(b"\xff\xd8"):
                return jpeg
        # A ZIP of other origin, or one packed again: its full frames.
        return self._read_entry(self.names[k])

    def _read_entry(self, name):
        size = self.archive.getinfo(name).file_size
        if size > MAX_BYTES:
            raise ValueError(f"{name} has {size} bytes, expected at most {MAX_BYTES}")
        return bytearray(self.archive.read(name))


def entry_name(number, copy, short_sides):
    """Return the name of a frame in the ZIP; all copies but the first are in a folder of theirs."""
    return f"{short_sides[copy]}/{number:06d}.jpg" if copy else f"{number:06d}.jpg"


# ------------------------------------------------------------------------------------ video files


class VideoFile:
    """A video file, whose packets are read once when it is opened, for the time of every frame.

    Time counts from the file's zero, as players show it, also where the first frame comes later.
    """

    def __init__(self, path):
        self.path = path
        self.note = None
        self.suffix = os.path.splitext(path)[1].lower()
        scan, stream, container = scan_video(path)
        fps = stream.average_fps_from_header or 25
        # When each frame appears: by the file's clock, and from its zero on.
        self.stamps = scan.pts_seconds.numpy()
        stamped = self.stamps > -1e9
        if self.suffix in PROGRAM_STREAMS or not stamped.all():
            # Not every packet has a stamp of its own.
            first = np.append(self.stamps[stamped], 0.0)[0]
            self.stamps = first + np.arange(len(scan)) / fps
        self.times = self.stamps - self._zero_sec(stream, container)
        self.by_order = self.suffix in UNSTAMPED or not stamped.all()
        self.seeks = self.suffix not in MPEG_STREAMS and stamped.all()
        self.key_frames = scan.key_frame_indices.numpy()
        self.height, self.width = stream.height, stream.width
        shown_sec = self.times[-1] - self.times[0]
        usual_sec = shown_sec / max(len(scan) - 1, 1)
        if self.times[0] < 0.1:  # the delay of an encoder
            self.times = self.times - self.times[0]
        shown_sec += max(scan.duration_seconds[-1].item(), usual_sec) or 1 / fps
        self.end = self.duration = self.times[0] + shown_sec
        declared = self._declared_sec(stream, container)
        if self.end < 0.99 * declared - 0.1:
            self.note = f"frames cover {self.end:.2f} of the {declared:.2f} s that its header tells"
            if self.end < MIN_COVERAGE * declared:
                raise InputError(f"{path} is truncated: {self.note}; copy it anew")
            # Annotations count on the whole video: its last frame stays on screen to the end.
            self.duration = declared
        self.num_frames = round(len(scan) * self.duration / shown_sec)
        self.fps = self.num_frames / self.duration

    def _zero_sec(self, stream, container):
        """Return where on the file's clock its zero is: anywhere in MPEG streams, else at 0."""
        if self.suffix not in MPEG_STREAMS:
            return 0.0
        begins = [stream.begin_stream_seconds_from_header, self.stamps[0]]
        if container.best_audio_stream_index is not None:
            begins.append(AudioDecoder(self.path).metadata.begin_stream_seconds_from_header)
        return min(sec for sec in begins if sec is not None)

    def _declared_sec(self, stream, container):
        """Return when the file ends as its header declares, or else when its frames do."""
        if self.suffix in MPEG_STREAMS:  # without such a header: FFmpeg guesses from packets
            return self.end
        fps = stream.average_fps_from_header
        if self.suffix == ".avi" and stream.num_frames_from_header and fps:
            # FFmpeg derives the duration of a truncated AVI from its size.
            return stream.num_frames_from_header / fps
        declared = container.duration_seconds_from_header or self.end
        if stream.duration_seconds_from_header:
            declared = self.times[0] + stream.duration_seconds_from_header
        if self.suffix == ".wmv":  # whose header counts what comes before the first frame already
            declared -= self.times[0]
        if self.end < 0.99 * declared and container.best_audio_stream_index is not None:
            # The file's duration may be that of its sound: not if that ends early, too.
            with contextlib.suppress(RuntimeError):
                AudioDecoder(self.path).get_samples_played_in_range(0.97 * declared)
                return self.end
        return declared

    def index(self, numbers) -> np.ndarray:
        """Return which frame in presentation order each number is, -1 after the last: (F,)."""
        seconds = (np.asarray(numbers) + 0.5) / self.fps
        shown = np.searchsorted(self.times, seconds, side="right") - 1
        return np.where(seconds < self.end, shown.clip(0), -1)

    def read(self, numbers, short_side: float | None = None, view=None) -> Tensor:
        """Read frames as JpegFrames.read does; the nearest stands for one that does not decode."""
        wanted, back = np.unique(numbers, return_inverse=True)
        decoded = dict(self.decode(wanted, short_side))
        check_coverage(self.path, len(decoded), len(wanted))
        places = nearest(np.array(list(decoded)), wanted)[back]
        return stack_frames(decoded.values(), places, view, self.path)

    def decode(self, numbers, short_side: float | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield (number, frame (3, H, W) uint8) for each of the numbers, ascending, in one pass.

        What does not decode is left out, and with it what follows up to the next key frame, which
        builds on it. short_side: what the decoder shrinks larger frames to, rounded up.
        """
        numbers = np.unique(numbers)
        index = self.index(numbers)
        numbers, index = numbers[index >= 0], index[index >= 0]
        scale = np.ceil(short_side) / min(self.height, self.width) if short_side else 1
        size = (round(self.height * scale), round(self.width * scale)) if scale < 1 else None
        resize = [Resize(size)] if size else None
        decoder = None
        k = 0
        seeks = self.seeks and (not self.by_order or self.can_seek)
        while seeks and k < len(index):
            try:
                decoder = decoder or VideoDecoder(self.path, transforms=resize)
                frame = self._frame_at(decoder, index[k])
            except (RuntimeError, ValueError):
                # After an error the state of a decoder is undefined.
                decoder = None
                seeks = self.can_seek
                later_keys = self.key_frames[self.key_frames > index[k]]
                if seeks:
                    k = int(np.searchsorted(index, later_keys.min(initial=len(self.times))))
                continue
            yield int(numbers[k]), frame
            k += 1
        for position, raw_frame in self._decode_all() if k < len(index) else ():
            if index[k] <= position:
                frame = ColorConverter().convert(raw_frame).data
                if size:
                    frame = interpolate(frame[None], size, mode="bilinear", antialias=True)[0]
            while index[k] <= position:
                yield int(numbers[k]), frame
                k += 1
                if k == len(index):
                    return

    def _frame_at(self, decoder, index):
        frame = decoder.get_frame_at(int(index))
        if abs(frame.pts_seconds - self.stamps[index]) > 1e-4:
            raise RuntimeError("frames are missing")
        return frame.data

    @cached_property
    def can_seek(self):
        """Whether frames can be decoded alone: not in AVI with B-frames."""
        try:
            for index in range(min(3, len(self.times))):
                self._frame_at(VideoDecoder(self.path), index)
        except (RuntimeError, ValueError):  # the latter for a codec without a decoder
            return False
        return True

    def _decode_all(self):
        """Yield (index, RawFrame) of all frames from the first on, which needs no seeking."""
        demuxer = Demuxer(self.path)
        try:
            decoder = demuxer.streams[0].make_decoder()
        except RuntimeError as error:
            reason = f"{_reason(error)}; FFmpeg here has no decoder for it"
            raise InputError(f"{self.path} cannot be decoded ({reason})") from None
        index = -1
        for packet in itertools.chain(demuxer, [None]):
            try:
                raw_frames = decoder.drain() if packet is None else decoder.decode(packet)
            except RuntimeError:
                continue
            for raw_frame in raw_frames:
                index += 1
                if not self.by_order:
                    near = int(np.searchsorted(self.stamps, raw_frame.pts_seconds - 1e-4))
                    same = abs(self.stamps[near : near + 1] - raw_frame.pts_seconds) < 1e-4
                    index = max(near, index) if same.any() else index
                yield index, raw_frame


def check_coverage(path: str, decoded: int, wanted: int) -> None:
    """Raise InputError if too few of the wanted frames were decoded."""
    if decoded < MIN_COVERAGE * wanted or not decoded:
        counts = f"only {decoded} of the {wanted} frames needed decode"
        raise InputError(f"{path} is damaged: {counts}; copy it anew")


def _reason(error):
    """Return the first line of an error without the names of torchcodec's source files."""
    return re.sub(r"^.*\.cpp:\d+,\s*", "", str(error)).strip().partition("\n")[0]


def scan_video(path):
    """Return the frame index of a video file, its stream's metadata and its container's."""
    try:
        demuxer = Demuxer(path)
        stream = demuxer.streams[0]
        scan = stream.scan()
    except (ImportError, RuntimeError, ValueError, IndexError) as error:
        reason = _reason(error)
        if isinstance(error, ImportError) or "libtorchcodec" in reason:
            needed = "FFmpeg (apt-get install ffmpeg) and torchcodec 0.17 or newer"
            raise InputError(f"{path}: video files need {needed}") from None
        advice = f"or try ffmpeg -i {path} -c copy {os.path.splitext(path)[0]}-remuxed.mkv"
        problem = f"is not a valid video ({reason}): copy it anew"
        raise InputError(f"{path} {problem}, {advice}") from None
    if not len(scan):
        raise InputError(f"{path} has a video stream without frames; copy it anew")
    return scan, stream.metadata, demuxer.metadata
