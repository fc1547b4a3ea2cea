"""Between a file and its frames: prepared ZIPs, folders of JPEG files, video files, still images; and the making of prepared ZIPs.

    FOLDER/VIDEO.zip            JPEG frames 000000.jpg ... by frame number, stored, not deflated; smaller copies of the same frames in 181/, 128/; and
                                video.json: {"fps", "num_frames", "duration_sec", "frames": [numbers of the frames that are kept],
                                "times_sec": [theirs, from the first frame of the video on], "note": what was wrong with the source, or null,
                                "prepared": settings, "short_sides": [256, 181, 128], "bytes": [[sizes of the JPEGs] of each short side]};
                                the first four are enough for a ZIP that somebody else makes
    FOLDER/VIDEO/img_00001.jpg  all frames, or every n-th; a video.json beside them may tell fps and duration_sec
    FOLDER/VIDEO.mp4 ...        whatever FFmpeg decodes, through torchcodec
    IMAGE.jpg                   a video of one frame

Frames are numbered by the video's own clock: frame i is the one on screen at (i + 0.5) / fps, and fps = num_frames / duration. At a constant
frame rate that is the i-th in presentation order. At a variable one even numbers mean even times, as after `ffmpeg -r`.
Rotation tags are followed; non-square pixels are left as they are. This file imports nothing of the project.
"""
import json
import os
import re
import signal
import socket
import struct
import zipfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
from torch.nn.functional import interpolate
from torchcodec.decoders import decode_jpeg
from torchcodec.encoders import JpegEncoder
from tqdm import tqdm

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".ts", ".3gp", ".ogv")
ENOUGH = 0.9  # a video of which less decodes is refused


def cores():
    """How many processors this process may use, which need not be all that there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def snippet_frames(num_frames, snippets, frames, stride):
    """Frame numbers of L snippets, evenly spread: (L, T) int64. A snippet is a window of T * stride frames around its centre
    (i + 0.5) / L of the video, of which every stride-th is kept (LoFi, section 3: 64 frames, every 8th); clamped to the video."""
    centre = (torch.arange(snippets, dtype=torch.float64) + 0.5) * num_frames / snippets
    offset = (torch.arange(frames, dtype=torch.float64) + 0.5) * stride - frames * stride / 2
    return (centre[:, None] + offset).floor().clamp(0, num_frames - 1).long()


def open_media(path):
    """What `path` holds, by its kind: an object with .path, .num_frames, .fps, .duration (seconds; None where unknown), .note (what is wrong with
    it, or None) and .read. FileNotFoundError or ValueError if it cannot be opened."""
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"no frames at {path}: there is no such file or folder")
    if os.path.isdir(path):
        return FrameFolder(path)
    suffix = os.path.splitext(path)[1].lower()
    return {".zip": FrameZip, ".jpg": Still, ".jpeg": Still}.get(suffix, VideoFile)(path)


def spellings(name):
    """A video's name as ActivityNet's annotations and files spell it: with and without v_."""
    return (name, name[2:]) if name.startswith("v_") else (name, f"v_{name}")


def find_media(folder, names=None, *, prepared=True, skip=None, say=None):
    """The media of a folder, {video name: path}: prepared ZIPs, else folders of frames, else video files. One scan of the folder, nothing is opened.

    names: the videos to look for, found whether spelt with v_ or without; the keys are then these names. Without: all, by the names of their files.
    prepared: False leaves out ZIPs. skip: a folder to leave out, with what holds it. say: is told of video files of one name, which is taken.
    """
    found, others, skip = {}, {}, skip and os.path.realpath(skip) + "/"
    kinds = (".zip", "/", *VIDEO_SUFFIXES)
    for entry in os.scandir(folder) if os.path.isdir(folder) else ():
        stem, suffix = (entry.name, "/") if entry.is_dir() else os.path.splitext(entry.name)
        if suffix.lower() not in kinds[not prepared:] or stem.startswith(".") or skip and suffix == "/" and skip.startswith(os.path.realpath(entry.path) + "/"):
            continue
        new = kinds.index(suffix.lower()), entry.path
        if say and stem in found and min(new, found[stem])[0] > 1:  # both are video files
            others[stem] = max(new, found[stem])[1]
        found[stem] = min(found.get(stem, new), new)
    stems = {s: s for s in sorted(found)} if names is None else {n: s for n in names for s in spellings(n)[::-1] if s in found}  # the annotation's own spelling wins
    for s in [s for s in stems.values() if s in others]:
        say(f"{found[s][1]} is taken, not {others[s]}")
    return {name: found[s][1] for name, s in stems.items()}


def positive(info, *keys):
    """The values of a video.json, which must be numbers above 0."""
    values = [info[k] for k in keys]
    if not all(isinstance(x, (int, float)) and 0 < x < float("inf") for x in values):
        raise ValueError(f"expected numbers above 0 as {', '.join(keys)}, not {values}")
    return values


def nearest(kept, numbers):
    """Where in `kept`, ascending, the number nearest to each of `numbers` stands; the later of two equally near ones."""
    at = np.searchsorted(kept, numbers).clip(0, len(kept) - 1)
    before = (at - 1).clip(0)
    return np.where(numbers - kept[before] < kept[at] - numbers, before, at)


def gather(frames, at, view=None, out=None, path=""):
    """(F, 3, H, W) uint8 from frames that come one by one, (3, H, W): the k-th goes wherever the F numbers `at` are k.

    view: what to keep of a frame, say a crop of it, (H, W, 3) array -> array. out: (F, H, W, 3), to be filled; else it is made. The memory is
    channels-last, as decoders and cuDNN have it. ValueError if the frames differ in size.
    """
    order, at, k = np.argsort(at, kind="stable").tolist(), at.tolist(), 0
    for number, frame in enumerate(frames):
        frame = frame.permute(1, 2, 0).numpy()  # from here on numpy: its slices and copies cost a third of torch's, and there are 800 a video
        if view is not None:
            frame = view(frame)
        if out is None:
            out = torch.empty(len(at), *frame.shape, dtype=torch.uint8)
        if not number:
            array = out.numpy()
        if array.shape[1:] != frame.shape:
            raise ValueError(f"{path} has frames that come out as {frame.shape[:2]} pixels, expected {array.shape[1:3]} like the others")
        while k < len(order) and at[order[k]] == number:
            array[order[k]] = frame
            k += 1
    return out.permute(0, 3, 1, 2)


class Jpegs:
    """A video as JPEG files. kept: numbers of those that there are, ascending; _reader(short_side): what reads one by its number, bytes or a tensor of
    them; _name(number): what an error calls it."""
    note = None

    def read(self, numbers, short_side=None, view=None, out=None):
        """Frames by number, each replaced by the nearest one kept: (F, 3, H, W) uint8.

        short_side: as many pixels will do; a prepared ZIP then takes its smallest copies that have them. view, out: see gather.
        """
        at, back = np.unique(nearest(self.kept, np.asarray(numbers)), return_inverse=True)  # clamped snippets ask for a frame several times
        reader = self._reader(short_side)
        return gather((self._decode(n, reader) for n in self.kept[at].tolist()), back, view, out, self.path)

    def decode(self, numbers, short_side=None):
        """Yields (number, frame (3, H, W)) for each of the numbers, ascending."""
        for n in np.unique(numbers).tolist():
            yield n, self.read([n], short_side)[0]

    def _decode(self, number, reader):
        try:
            return decode_jpeg(reader(number))
        except (OSError, KeyError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.path}: frame {self._name(number)} cannot be read ({error}): remove it and prepare this video again") from None


class FrameZip(Jpegs):
    """A video prepared as a ZIP of JPEG frames. num_frames, fps and duration are those of the video, not of what is kept of it."""

    def __init__(self, path):
        self.path, self.zip, self.at = path, None, None
        try:
            self.file = open(path, "rb", buffering=0)
            info = self._first_entry() or json.loads(self._zip().read("video.json"))
            self.fps, self.num_frames, self.duration = positive(info, "fps", "num_frames", "duration_sec")
            self.kept, self.note, self.prepared = np.asarray(info["frames"]), info.get("note"), info.get("prepared")
            if not len(self.kept) or self.kept.ndim != 1:
                raise ValueError("it keeps no frame")
        except FileNotFoundError:
            raise FileNotFoundError(f"no frames at {path}") from None
        except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no ZIP of frames with a video.json in it ({error}): remove it and prepare this video again") from None

    def _first_entry(self):
        """A prepared ZIP starts with its video.json, which tells how long the others are: no directory of thousands of entries to parse."""
        header = self.file.read(30)
        if len(header) < 30:
            return None
        magic, flags, method, size, name, extra = struct.unpack("<4s2xHH8xL4xHH", header)
        if (magic, flags & 8, method) != (b"PK\3\4", 0, 0) or self.file.read(name) != b"video.json":
            return None
        self.file.seek(extra, os.SEEK_CUR)
        info = json.loads(self.file.read(size))
        if "bytes" in info:
            self.sides, numbers, sizes = info["short_sides"], np.asarray(info["frames"]), np.asarray(info["bytes"])
            headers = 40 + sum(numbers >= 10**d for d in range(6, 10)) + np.array([[len(entry_name(0, k, self.sides)) - 10] for k in range(len(self.sides))])
            ends = self.file.tell() + np.cumsum(headers + sizes).reshape(sizes.shape)
            if os.fstat(self.file.fileno()).st_size < ends[-1, -1]:
                raise ValueError(f"it breaks off after {os.fstat(self.file.fileno()).st_size} of at least {ends[-1, -1]} bytes")
            self.at = [dict(zip(info["frames"], zip(size, at))) for size, at in zip(info["bytes"], (ends - sizes).tolist())]  # {number: (bytes, where)}
        return info

    def _zip(self):
        self.zip = self.zip or zipfile.ZipFile(self.path)
        return self.zip

    def _reader(self, short_side):
        def by_name(number):  # somebody else's ZIP, or one packed again
            return self._zip().read(self._name(number))

        def by_place(number):
            size, start = at[number]
            jpeg = bytearray(size)
            os.preadv(file, [jpeg], start)
            return torch.frombuffer(jpeg, dtype=torch.uint8) if jpeg[:2] == b"\xff\xd8" else by_name(number)
        if self.at is None:
            return by_name
        wide = [k for k, side in enumerate(self.sides) if k and short_side and side > short_side - 0.5]
        at, file = self.at[wide[-1] if wide else 0], self.file.fileno()
        return by_place

    def _name(self, number):
        return f"{number:06d}.jpg"


def entry_name(number, k, sides):
    """Where the ZIP has a frame at the k-th of its short sides."""
    return f"{number:06d}.jpg" if not k else f"{sides[k]}/{number:06d}.jpg"


class FrameFolder(Jpegs):
    """A folder of JPEG files that end in their number, from 0, 1 or whatever comes first; missing numbers are replaced by the nearest.

    fps and duration come from a video.json in the folder; without, they are None.
    """

    def __init__(self, path):
        self.path, names = path, {}
        for entry in os.scandir(path):
            found = re.fullmatch(r"(.*?)(\d+)\.jpe?g", entry.name, re.IGNORECASE)
            if found:
                names.setdefault(found[1], {})[int(found[2])] = entry.name
        prefix = next((p for p in ("img_", "image_", "frame_", *names) if p in names), None)  # flow_x_00001.jpg may lie beside
        if prefix is None or len(names) > 1 and prefix not in ("img_", "image_", "frame_"):
            raise ValueError(f"{path} holds " + (f"frames of several kinds, {sorted(names)}" if names else "no frame") + ": expected files img_00001.jpg ...")
        first = min(names[prefix])
        self.names = {n - first: name for n, name in names[prefix].items()}
        self.kept = np.array(sorted(self.names))
        self.num_frames, self.fps, self.duration = int(self.kept[-1]) + 1, None, None
        if os.path.exists(f"{path}/video.json"):
            try:
                with open(f"{path}/video.json") as f:
                    self.fps, self.duration = positive(json.load(f), "fps", "duration_sec")
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}/video.json is not as expected, {{\"fps\": 25, \"duration_sec\": 10.0}} ({type(error).__name__}: {error}): "
                                 "correct it, or remove it") from None

    def _reader(self, short_side):
        def read(number):
            with open(f"{self.path}/{self.names[number]}", "rb") as f:
                return f.read()
        return read

    def _name(self, number):
        return self.names[number]


class Still(Jpegs):
    """One JPEG image, as a video of one frame."""
    num_frames, fps, duration, kept = 1, 1.0, 1.0, np.zeros(1, np.int64)

    def __init__(self, path):
        self.path = path

    def _reader(self, short_side):
        return None

    def _decode(self, number, reader):
        try:
            return decode_jpeg(self.path)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{self.path} is no JPEG image ({error})") from None


def reason(error):
    """What torchcodec says, without the lines of its own source."""
    lines = [re.sub(r"^.*\.cpp:\d+,\s*", "", line).strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)


class VideoFile:
    """A video file, through torchcodec and FFmpeg. Opening it reads its packets once, to know the time of every frame; nothing is decoded."""

    def __init__(self, path):
        self.path, self.note = path, None
        try:
            from torchcodec.decoders import Demuxer, VideoDecoder
            self.decoder = VideoDecoder
        except ImportError:
            raise ValueError(f"{path} is a video file, which needs torchcodec 0.17 or newer: pip install -U torchcodec") from None
        try:
            demuxer = Demuxer(path)
            stream = demuxer.streams[0]
            about, scan = stream.metadata, stream.scan()
        except (RuntimeError, ValueError, IndexError) as error:
            if "libtorchcodec" in str(error):
                raise ValueError(f"{path} is a video file, which torchcodec reads through FFmpeg, and FFmpeg is not installed: apt-get install ffmpeg") from None
            if "No valid video stream" in str(error):
                raise ValueError(f"{path} has no video stream") from None
            raise ValueError(f"{path} cannot be opened as a video ({reason(error)}): a damaged or unfinished file? get it again") from None
        n = len(scan)
        if not n:
            raise ValueError(f"{path} has a video stream without a frame in it: get it again")
        self.times = scan.pts_seconds.numpy() - scan.pts_seconds[0].item()  # when each frame appears, from the first one on
        self.keys, self.stamps, self.height, self.width = scan.key_frame_indices.numpy(), scan.pts_seconds.numpy(), about.height, about.width
        last = scan.duration_seconds[-1].item()
        self.covered = self.times[-1] + max(last, self.times[-1] / (n - 1) if n > 1 else last or 1 / (about.average_fps_from_header or 25))
        told = min((s for s in (about.duration_seconds_from_header, demuxer.metadata.duration_seconds_from_header) if s), default=self.covered)
        if path.lower().endswith(".avi") and about.num_frames_from_header and about.average_fps_from_header:
            told = about.num_frames_from_header / about.average_fps_from_header  # FFmpeg takes the duration of a cut AVI from its size
        self.duration, self.num_frames = self.covered, n
        if self.covered < 0.99 * told:
            self.note = f"its frames cover {self.covered:.2f} of the {told:.2f} s that its header tells"
            if self.covered < ENOUGH * told:
                raise ValueError(f"{path} breaks off: {self.note}; get it again")
            self.duration, self.num_frames = told, round(n * told / self.covered)  # annotations count on the whole: the last frame stays
        self.fps = self.num_frames / self.duration

    def index(self, numbers):
        """Which frame of the file, in presentation order, has each number: (F,) int64, ascending; -1 behind the last."""
        seconds = (np.asarray(numbers) + 0.5) / self.fps
        return np.where(seconds < self.covered, np.searchsorted(self.times, seconds, side="right") - 1, -1)

    def decode(self, numbers, short_side=None, chunk=16):
        """Yields (number, frame (3, H, W) uint8) for each of the numbers, ascending, in one pass; what does not decode is left out.

        A frame that does not decode takes those behind it along, up to the next key frame: they would be built on what is not there.
        short_side: what the decoder shrinks frames to, if they are larger.
        """
        numbers = np.unique(numbers)
        index = self.index(numbers)
        numbers, index = numbers[index >= 0], index[index >= 0]
        k, decoder, careful = 0, None, 0  # careful: up to this position frames are taken one by one
        while k < len(index):
            end = k + 1 if k < careful else min(k + chunk, len(index))
            try:
                decoder = decoder or self._decoder(short_side)
                batch = decoder.get_frames_at(index[k:end].tolist())
                if np.abs(batch.pts_seconds.numpy() - self.stamps[index[k:end]]).max() > 1e-4:
                    raise RuntimeError("frames are missing")
            except RuntimeError:
                decoder = None  # its state is undefined
                if end > k + 1:
                    careful = end
                else:
                    key = self.keys[self.keys > index[k]]
                    k = int(np.searchsorted(index, key[0])) if len(key) else len(index)
                continue
            yield from zip(numbers[k:end].tolist(), batch.data)
            k = end

    def _decoder(self, short_side):
        scale = short_side / min(self.height, self.width) if short_side else 1
        from torchcodec.transforms import Resize
        resize = [Resize((round(self.height * scale), round(self.width * scale)))] if scale < 1 else None
        return self.decoder(self.path, transforms=resize)

    def read(self, numbers, short_side=None, view=None, out=None):
        """Frames by number, (F, 3, H, W) uint8: see Jpegs.read. The decoder makes them `short_side` pixels if they are larger."""
        wanted, back = np.unique(numbers, return_inverse=True)
        decoded = dict(self.decode(wanted, short_side and int(np.ceil(short_side))))
        check_coverage(self.path, len(decoded), len(wanted))
        at, back = np.unique(nearest(np.array(list(decoded)), wanted)[back], return_inverse=True)
        frames = list(decoded.values())
        return gather((frames[i] for i in at), back, view, out, self.path)


def check_coverage(path, decoded, wanted):
    if decoded < ENOUGH * wanted or not decoded:
        raise ValueError(f"{path}: only {decoded} of the {wanted} frames that are needed decode, expected at least {ENOUGH:.0%}: get it again")


# ---------------------------------------------------------------- preparation

def shrink(frame, short_side):
    """(3, H, W) uint8 with its short side at most `short_side` pixels."""
    scale = short_side / min(frame.shape[1:])
    return frame if scale >= 1 else interpolate(frame[None], [round(s * scale) for s in frame.shape[1:]], mode="bilinear", antialias=True)[0]


def prepare_video(path, target, settings):
    """Decodes one video once and writes the frames that `settings` need to `target`, whole or not at all. Returns its note, or None.

    settings: snippets (or rate, so many a second), frames, stride (see snippet_frames), short_side, copies (more, smaller short sides), quality
    (JPEG; of the copies 5 less). ValueError if less than 90 % of it decodes.
    """
    media = open_media(path)
    if media.fps is None:
        raise ValueError(f"{path} is a folder of frames that tells no frame rate: put a video.json {{\"fps\", \"duration_sec\"}} into it")
    snippets = max(round(media.duration * settings["rate"]), 1) if settings.get("rate") else settings["snippets"]
    numbers = np.unique(snippet_frames(media.num_frames, snippets, settings["frames"], settings["stride"]))
    qualities = [settings["quality"]] + [max(settings["quality"] - 5, 1)] * len(settings["copies"])  # shrunken, it has more detail a pixel to decode
    sides, kept, jpegs = [settings["short_side"], *sorted(settings["copies"], reverse=True)], [], []
    for number, frame in media.decode(numbers, settings["short_side"]):
        frame = shrink(frame, sides[0])
        sides = [sides[0], *(s for s in sides[1:] if s < min(frame.shape[1:]))]  # a small video: no copy larger than itself
        kept.append(number)
        jpegs.append([JpegEncoder(shrink(frame, s)).to_tensor(quality=q).numpy().tobytes() for s, q in zip(sides, qualities)])
    check_coverage(path, len(kept), len(numbers))
    notes = [media.note] if media.note else []
    if len(kept) < len(numbers):
        notes.append(f"{len(kept)} of {len(numbers)} frames decode, the others are replaced by their neighbours")
    times = media.times[media.index(kept)] if isinstance(media, VideoFile) else np.array(kept) / media.fps
    info = {"fps": media.fps, "num_frames": media.num_frames, "duration_sec": media.duration, "frames": kept, "times_sec": times.round(6).tolist(),
            "note": "; ".join(notes) or None, "prepared": settings, "short_sides": sides, "bytes": [[len(j[k]) for j in jpegs] for k in range(len(sides))]}
    part = f"{target}.part-{socket.gethostname()}-{os.getpid()}"  # written aside, renamed when whole
    try:
        with open(part, "wb") as f:
            with zipfile.ZipFile(f, "w", zipfile.ZIP_STORED) as z:  # fixed time stamps: the same frames, the same bytes
                z.writestr(zipfile.ZipInfo("video.json"), json.dumps(info))
                for k in range(len(sides)):
                    for number, jpeg in zip(kept, jpegs):
                        z.writestr(zipfile.ZipInfo(entry_name(number, k, sides)), jpeg[k])
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, target)
    finally:
        if os.path.exists(part):
            os.remove(part)
    return info["note"]


def prepared_already(target, settings):
    """Whether `target` is there, whole and made with these settings. ValueError if it is something else: nothing is written over."""
    if not os.path.lexists(target):
        return False
    prepared = FrameZip(target).prepared or {}
    differ = [f"{k} {prepared.get(k)} there, {v} now" for k, v in settings.items() if prepared.get(k) != v]
    if differ:
        raise ValueError(f"{target} is there already, prepared otherwise ({', '.join(differ)}): name another --out, or remove it yourself")
    return True


def _prepare_job(job):
    path, target, settings = job
    return None if prepared_already(target, settings) else prepare_video(path, target, settings) or ""


def prepare(videos, out, settings, workers, say=print):
    """Prepares {video name: path} into the folder `out`, in `workers` processes (0: in this one). Returns (names made, {name: what failed}).

    What is there and whole is skipped; a video that fails is said, and does not stop the others.
    """
    try:
        os.makedirs(out, exist_ok=True)
        remove_stale_parts(out)
        if not os.access(out, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise ValueError(f"{out} is no folder that can be written to ({error}): name another") from None
    jobs = {name: (path, f"{out}/{name}.zip", settings) for name, path in videos.items()}
    made, failed = [], {}
    for name, note, error in run_jobs(_prepare_job, jobs, workers, f"prepare {out}"):
        if error is not None:
            failed[name] = str(error)
            say(f"FAILED {name}: {error}")
        elif note is not None:
            made.append(name)
            if note:
                say(f"{name}: {note}")
    return made, failed


def remove_stale_parts(folder):
    """Removes what processes of this machine that are no more were writing when they were killed."""
    for entry in os.scandir(folder):
        found = re.search(r"\.zip\.part-(.*)-(\d+)$", entry.name)
        if found and found[1] == socket.gethostname() and not alive(int(found[2])):
            os.remove(entry.path)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group: the main process stops giving out work
    torch.set_num_threads(1)


def run_jobs(function, jobs, workers, title):
    """function(job) for {name: job} in `workers` processes (0: here), with a progress bar: yields (name, result, error) as they come.

    error: what the function raised, or a ValueError if its process died: a decoder may crash on a broken file.
    """
    left = dict(jobs)
    with tqdm(total=len(jobs), desc=title, unit="video", smoothing=0, disable=None) as bar:
        def done(name, get):
            del left[name]
            bar.update()
            try:
                return name, get(), None
            except (ValueError, OSError, RuntimeError, MemoryError) as error:
                return name, None, error

        def crashed():
            raise ValueError("its process died: the decoder crashed on it, or the machine ran out of memory")
        if not workers:
            yield from (done(name, partial(function, job)) for name, job in jobs.items())
        suspects = []  # were being worked on when a process died: each alone, to see which it was
        while left:
            batch = [suspects.pop(0)] if suspects else list(left)
            with ProcessPoolExecutor(min(workers, len(batch)), get_context("spawn"), _start_worker) as pool:
                futures = {pool.submit(function, jobs[name]): name for name in batch}
                try:
                    for future in as_completed(futures):
                        if not isinstance(future.exception(), BrokenProcessPool):
                            yield done(futures[future], future.result)
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
            died = [name for name in batch if name in left]
            if died and len(batch) == 1:
                yield done(died[0], crashed)
            else:
                suspects += died[:workers]
