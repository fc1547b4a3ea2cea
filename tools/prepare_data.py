"""Prepare videos for training: decode each once, keep the frames that full fidelity needs.

    python -m tools.prepare_data --videos DIR --annotations JSON --out DIR

Writes one ZIP of JPEG frames a video, DIR/VIDEO.zip; media.py describes it. Video files need
FFmpeg. Run again, it skips what is there. Exit status 1 if a video failed. After 5, 10, 20, ...
videos it tells what the others will take, and stops if the disk is too small for them.
"""

import argparse
import errno
import json
import os
import platform
import re
import shutil
import signal
import sys
import time
import zipfile

import numpy as np
from torch.nn.functional import interpolate
from torchcodec.encoders import JpegEncoder
from tqdm import tqdm

import media
from checkpoint import remove_stale_parts, write_atomic
from config import one_line_errors
from data import first_names, load_annotations, seed_of
from media import InputError
from tools.jobs import available_cores, run_jobs

HOST = f"{platform.node()}-"  # several machines may write to one folder
TOLD_AT = [5 * 2**i for i in range(32)]  # videos
MAKE_ROOM = "make room and rerun, or choose another --out, a lower --quality, fewer --copies"


def write_frame_zip(file, info, jpegs):
    """Write a ZIP of JPEG frames, as media.py describes it: the same frames give the same bytes.

    file: a path or a binary file. info: its video.json. jpegs: {frame number: JPEG} for each of
    info["short_sides"]; without these only one.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        # A ZipInfo has the same time stamp whenever it is made.
        archive.writestr(zipfile.ZipInfo("video.json"), json.dumps(info))
        for copy, frames in enumerate(jpegs):
            for number, jpeg in frames.items():
                name = media.entry_name(number, copy, info.get("short_sides"))
                archive.writestr(zipfile.ZipInfo(name), jpeg)


def encode_jpeg(frame, quality=92):
    """Return a frame (3, H, W) uint8 as the bytes of a JPEG."""
    return JpegEncoder(frame).to_tensor(quality=quality).numpy().tobytes()


def shrink(frame, short_side):
    """Return a frame (3, H, W) uint8 with its short side at most `short_side` pixels."""
    scale = short_side / min(frame.shape[1:])
    if scale >= 1:
        return frame
    size = [round(side * scale) for side in frame.shape[1:]]
    return interpolate(frame[None], size, mode="bilinear", antialias=True)[0]


def encode_copies(video, numbers, settings):
    """Decode frames and encode each at every size: (short sides, [{number: JPEG} for each])."""
    short_sides = [settings["short_side"], *sorted(settings["copies"], reverse=True)]
    jpegs = [{} for _ in short_sides]
    for number, frame in video.decode(numbers, settings["short_side"]):
        frame = shrink(frame, short_sides[0])
        # A small video has no copy that is larger than itself.
        smaller = [side for side in short_sides[1:] if side < min(frame.shape[1:])]
        short_sides = [short_sides[0], *smaller]
        for copy, side in enumerate(short_sides):
            # A shrunken frame has more detail a pixel, which takes longer to decode.
            quality = max(settings["quality"] - 5, 1) if copy else settings["quality"]
            jpegs[copy][number] = encode_jpeg(shrink(frame, side), quality)
    return short_sides, jpegs[: len(short_sides)]


def prepare_video(path, target, settings):
    """Decode a video once and write the frames that `settings` need to the ZIP `target`.

    settings: snippets (or rate, so many a second), frames, stride (see snippet_frames), short_side,
    copies (smaller short sides), quality (JPEG; of the copies 5 less). Returns what is wrong with
    the video, or None. Raises InputError if less than 90 % of it decodes.
    """
    video = media.open_media(path)
    if video.fps is None:
        raise InputError(f"{path} tells no frame rate: add a video.json with fps and duration_sec")
    snippets = settings["snippets"]
    if settings.get("rate"):
        snippets = max(round(video.duration * settings["rate"]), 1)
    window = (settings["frames"], settings["stride"])
    numbers = np.unique(media.snippet_frames(video.num_frames, snippets, *window))
    short_sides, jpegs = encode_copies(video, numbers, settings)
    kept = list(jpegs[0])
    media.check_coverage(path, len(kept), len(numbers))

    notes = [video.note] if video.note else []
    if len(kept) < len(numbers):
        decoded = f"{len(kept)} of {len(numbers)} frames decode"
        notes.append(f"{decoded}, the others are replaced by their neighbours")
    times = np.array(kept) / video.fps
    if isinstance(video, media.VideoFile):
        times = video.times[video.index(kept)]
    info = {
        "fps": video.fps,
        "num_frames": video.num_frames,
        "duration_sec": video.duration,
        "frames": kept,
        "times_sec": times.round(6).tolist(),
        "note": "; ".join(notes) or None,
        "prepared": settings,
        "short_sides": short_sides,
        "bytes": [[len(jpeg) for jpeg in frames.values()] for frames in jpegs],
    }
    write_atomic(target, lambda file: write_frame_zip(file, info, jpegs), HOST)
    return info["note"]


def prepare_once(job):
    """Prepare a video unless it is: return None if it was there, else its note, "" without one.

    job: path, target and settings of `prepare_video`. Raises InputError unless what is there was
    prepared just so.
    """
    path, target, settings = job
    if not os.path.lexists(target):
        return prepare_video(path, target, settings) or ""
    prepared = media.FrameZip(target).prepared or {}
    changed = [key for key, value in settings.items() if prepared.get(key) != value]
    if changed:
        changes = ", ".join(f"{key} {prepared.get(key)}, now {settings[key]}" for key in changed)
        problem = f"{target} exists, prepared with other settings ({changes})"
        raise InputError(f"{problem}: choose another --out or remove it")


def estimate(out, made, todo, names, started):
    """Return in words what all of `todo` videos take, by the mean of those made since `started`.

    names: of all that are to lie in `out`. Raises InputError if the disk is too small for them.
    """
    size_gb = 1e-9 * sum(os.path.getsize(f"{out}/{name}.zip") for name in made) / len(made)
    needed_gb = size_gb * sum(not os.path.lexists(f"{out}/{name}.zip") for name in names)
    free_gb = 1e-9 * shutil.disk_usage(out).free
    if needed_gb > free_gb:
        sizes = f"about {needed_gb:.3g} GB more needed, {free_gb:.3g} GB free"
        raise InputError(f"{out}: {sizes}: {MAKE_ROOM}")
    hours = (time.monotonic() - started) / len(made) * (todo - len(made)) / 3600
    return f"all will be {size_gb * todo:.3g} GB, {hours:.1f} h to go"


def prepare(videos, out, settings, workers, log=print, others=()):
    """Prepare {video name: path} into the folder `out`: ([names made], {name: why it failed}).

    Works in `workers` processes; 0: in this one. What is there and whole is skipped; a video that
    fails is logged and does not stop the others. Raises InputError if the disk is too small for
    these and the `others`, names of videos that other shards prepare.
    """
    try:
        os.makedirs(out, exist_ok=True)
        remove_stale_parts(out, HOST)
        if not os.access(out, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise InputError(f"cannot write to a folder {out} ({error}); choose another") from None
    jobs = {name: (path, f"{out}/{name}.zip", settings) for name, path in videos.items()}
    made = []
    failed = {}
    todo = sum(not os.path.lexists(target) for _, target, _ in jobs.values())
    started = time.monotonic()
    for name, note, error in run_jobs(prepare_once, jobs, workers, f"prepare {out}"):
        if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
            raise InputError(f"{out}: the disk or your quota is full: {MAKE_ROOM}")
        if error is not None:
            failed[name] = str(error)
            log(f"FAILED {name}: {error}")
        elif note is not None:
            made.append(name)
            if note:
                log(f"{name}: {note}")
            if len(made) in TOLD_AT and len(made) < todo:
                told = estimate(out, made, todo, [*videos, *others], started)
                log(f"{len(made)} of {todo} prepared: {told}")
    return made, failed


def find_videos(args):
    """Return the videos to prepare, {name: path}, the names of other shards', and missing ones."""
    if not os.path.isdir(args.videos):
        raise InputError(f"no folder {args.videos}: set --videos to the folder of video files")
    names = None
    if args.annotations:
        subsets = load_annotations(args.annotations)
        unknown = sorted(set(args.subsets or ()) - set(subsets))
        if unknown:
            raise InputError(f"no subset {unknown} in the annotations, only {sorted(subsets)}")
        names = [video.name for s in args.subsets or subsets for video in subsets[s]]
    found = media.find_media(args.videos, names, prepared=False, skip=args.out, log=print)
    if names is None:
        names = list(found)
    if not found:
        example = f"{args.videos}/{(names or ['VIDEO'])[0]}.mp4"
        raise InputError(f"none of {len(names)} videos in {args.videos}: expected, say, {example}")
    # By its name, however spelt: a video that comes later moves no other.
    index, shards = args.shard
    own = [n for n in names if seed_of("shard", n.removeprefix("v_")) % shards == index - 1]
    videos = {name: found[name] for name in own if name in found}
    return videos, found.keys() - videos.keys(), [name for name in own if name not in found]


def read_shard(text):
    """Return (i, n) of "i/n"."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    index, shards = map(int, found.groups()) if found else (0, 0)
    if not 1 <= index <= shards:
        raise InputError(f"--shard {text}: expected i/n, from 1/n to n/n")
    return index, shards


def read_settings(args):
    """Return the settings of prepare_video. Raises InputError if one is out of range."""
    keys = ("snippets", "frames", "stride", "short_side", "quality", "copies", "rate")
    settings = {key: getattr(args, key) for key in keys}
    if args.copies is None:
        settings["copies"] = [round(args.short_side / 2**0.5), args.short_side // 2]
    counts = [value for key, value in settings.items() if key not in ("copies", "rate")]
    if min(*counts, *settings["copies"]) < 1 or args.quality > 100:
        raise InputError(f"{settings}: expected numbers of at least 1, and a quality up to 100")
    if args.rate is not None and args.rate <= 0:
        raise InputError(f"--rate {args.rate}: expected a number above 0")
    if args.workers < 0:
        raise InputError(f"--workers {args.workers}: expected 0 or more")
    return settings


def parse_args(argv):
    raw = argparse.RawDescriptionHelpFormatter
    prog = "python -m tools.prepare_data"
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--videos", required=True, help="folder of video files, or of folders of JPEG frames")
    add("--annotations", help="JSON or table: only its videos (default: all of the folder)")
    add("--subsets", nargs="+", help="only these subsets of it (default: all)")
    add("--out", required=True, help="folder for VIDEO.zip; config key data.frames")
    add("--snippets", type=int, default=100, help="L, as in the config (default: %(default)s)")
    add("--rate", type=float, help="snippets a second instead, for windows")
    add("--frames-per-snippet", dest="frames", type=int, default=8, help="T (default: %(default)s)")
    add("--stride", type=int, default=8, help="frames from one to the next (default: %(default)s)")
    add("--short-side", type=int, default=256, help="pixels, at most (default: %(default)s)")
    copies = "short sides of smaller copies of each frame (default: short side / sqrt 2 and / 2: a "
    copies += "ZIP is 1.8 times as large, S and ST load 4 and 3 times as fast; none: none)"
    add("--copies", type=int, nargs="*", help=copies)
    add("--quality", type=int, default=90, help="of JPEGs; copies 5 less (default: %(default)s)")
    add("--workers", type=int, default=available_cores(), help="processes (default: %(default)s)")
    add("--shard", default="1/1", help="i/n: only the i-th of n parts, on several machines at once")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors("tools.prepare_data"):
        settings = read_settings(args)
        args.shard = read_shard(args.shard)
        videos, others, missing = find_videos(args)
        if missing:
            counts = f"{len(missing)} of {len(videos) + len(missing)}"
            print(f"{counts} videos are not in {args.videos}: {first_names(missing)}")
        made, failed = prepare(videos, args.out, settings, args.workers, tqdm.write, others)
        skipped = len(videos) - len(made) - len(failed)
        counts = f"{len(made)} prepared, {skipped} already prepared, {len(failed)} failed"
        print(f"{args.out}: {counts}, {len(missing)} missing")
        for name, reason in sorted(failed.items()):
            print(f"  {name}: {reason}")
        return 1 if failed else 0


if __name__ == "__main__":
    # As Ctrl-C does, SIGTERM ends the workers, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
