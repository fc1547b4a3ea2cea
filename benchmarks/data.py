"""Measure loading: samples from prepared frames against the public habits.

    python -m benchmarks.data [--video VIDEO.mp4]   needs FFmpeg's command, and Pillow

One video (default: a test picture with noise), repeated up to --seconds, is prepared as
tools.prepare_data does. Then samples of the four fidelities (LoFi's ActivityNet sizes) are loaded
as training does, in one thread, from:
    prepared            the ZIP, with its smaller copies
    prepared, one size  a ZIP without them
    video file          the original, decoded for each access by torchcodec
    PIL folder          JPEG files of the same frames, opened, cropped and resized with Pillow
Medians over --repeats random views; file caches are warm. Time is CPU time, which other programs
disturb less. JPEG share: of it within torchcodec's JPEG decoder.
"""

import argparse
import importlib.util
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

import data
import media
from benchmarks.table import Row, rounded
from tools.prepare_data import prepare

VIDEO = {"snippets": 100, "frames_per_snippet": 8, "stride": 8, "size": 224, "crop": 0.875}
# As tools.prepare_data prepares frames, without copies.
PREPARED = {"snippets": 100, "frames": 8, "stride": 8, "short_side": 256, "quality": 90}
FULL = data.Fidelity("full", 100, 224)
SIZES = {"full": [100, 224], "S": [100, 112], "T": [25, 224], "ST": [50, 158]}
FIDELITIES = {name: data.Fidelity(name, *size) for name, size in SIZES.items()}


class PilFolder:
    """The public habit: a folder of all frames, PIL images, cropped and resized one by one."""

    def __init__(self, folder):
        self.folder = folder
        self.num_frames = len(os.listdir(folder))

    def load(self, fidelity, seed):
        from PIL import Image

        rng = np.random.default_rng(seed)
        rows = data.snippet_rows(FULL.snippets, fidelity.snippets, rng.choice([0.0, 0.5]))
        corner = rng.random(2)
        flip = rng.random() < 0.5
        numbers = media.snippet_frames(self.num_frames, FULL.snippets, 8, 8)[rows]
        images = []
        for number in numbers.flatten().tolist():
            image = Image.open(f"{self.folder}/img_{number + 1:05d}.jpg").convert("RGB")
            side = round(min(image.size) * VIDEO["crop"])
            left = round(corner[1] * (image.width - side))
            top = round(corner[0] * (image.height - side))
            image = image.crop((left, top, left + side, top + side))
            image = image.resize((fidelity.size, fidelity.size), Image.BILINEAR)
            images.append(np.asarray(image.transpose(Image.FLIP_LEFT_RIGHT) if flip else image))
        frames = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return frames.unflatten(0, (fidelity.snippets, 8))


class JpegTimer:
    """Stand in media.py in place of decode_jpeg and add up its time."""

    def __init__(self):
        self.decode = media.decode_jpeg
        self.seconds = 0.0

    def __call__(self, source):
        started = time.process_time()
        frame = self.decode(source)
        self.seconds += time.process_time() - started
        return frame


def time_samples(load, fidelity, repeats):
    """Return the median seconds of several loads after two to warm up, and the JPEG share."""
    seconds, shares = [], []
    for seed in range(repeats + 2):
        timer = media.decode_jpeg = JpegTimer()
        started = time.process_time()
        frames = load(fidelity, seed)
        elapsed = time.process_time() - started
        media.decode_jpeg = timer.decode
        seconds.append(elapsed)
        shares.append(timer.seconds / elapsed)
        assert frames.shape[-5:] == (fidelity.snippets, 8, 3, fidelity.size, fidelity.size)
    return statistics.median(seconds[2:]), statistics.median(shares[2:])


def loader(path, duration):
    """Return what loads a sample of a video as training does."""
    video = data.Video("v", duration, np.zeros((0, 2)), (), path)
    dataset = data.VideoDataset([video], train=True, **VIDEO)

    def load(fidelity, seed):
        return data.collate([dataset[seed, fidelity]])["frames"]  # of one video an epoch

    return load


def write_jpegs(zip_path, num_frames, folder):
    """Write the kept frames of a ZIP as files, and links to the first in place of the others."""
    source = media.FrameZip(zip_path)
    os.makedirs(folder)
    archive = zipfile.ZipFile(zip_path)
    first = None
    for number in range(num_frames):
        path = f"{folder}/img_{number + 1:05d}.jpg"
        if number in source.kept:
            Path(path).write_bytes(archive.read(f"{number:06d}.jpg"))
            first = first or path
        elif first:
            os.link(first, path)


def make_video(path):
    """Make a short video: a test picture that moves, with noise."""
    picture = "testsrc2=size=340x256:rate=25:duration=10,noise=alls=12:allf=t"
    encode = ["-f", "lavfi", "-i", picture, "-c:v", "mpeg4", "-q:v", "4", "-pix_fmt", "yuv420p"]
    subprocess.run(["ffmpeg", "-v", "error", *encode, path], check=True)


def repeat_video(path, seconds, target):
    """Repeat a video up to so many seconds."""
    cut = ["-stream_loop", "-1", "-i", path, "-t", str(seconds), "-an", "-c", "copy"]
    subprocess.run(["ffmpeg", "-v", "error", *cut, target], check=True)


def measure_frames(args):
    """Return {source: {fidelity: (seconds, JPEG share)}}."""
    with tempfile.TemporaryDirectory() as folder:
        if not args.video:
            args.video = f"{folder}/picture.mp4"
            make_video(args.video)
        long = f"{folder}/v.mp4"
        repeat_video(args.video, args.seconds, long)
        source = media.open_media(long)
        print(f"video: {source.duration:.1f} s, {os.path.getsize(long) / 1e6:.1f} MB")
        settings = PREPARED | {"snippets": FULL.snippets}
        loads = {"video file": loader(long, source.duration)}
        for name, copies in (("prepared, one size", []), ("prepared", [181, 128])):
            prepare({"v": long}, f"{folder}/{name}", {**settings, "copies": copies}, 0)
            path = f"{folder}/{name}/v.zip"
            print(f"{name}: {os.path.getsize(path) / 1e6:.1f} MB")
            loads[name] = loader(path, source.duration)
        if not args.no_pil:
            write_jpegs(f"{folder}/prepared/v.zip", source.num_frames, f"{folder}/pil")
            loads["PIL folder"] = PilFolder(f"{folder}/pil").load
        print("\n| from | sample | ms | of full | JPEG share | prepared is faster |")
        print("|---|---|--:|--:|--:|--:|")
        prepared, found = {}, {}
        for name, load in reversed(loads.items()):
            repeats = 1 if name == "video file" else args.repeats
            times = {k: time_samples(load, f, repeats) for k, f in FIDELITIES.items()}
            found[name] = times
            prepared = times if name == "prepared" else prepared
            for key, (seconds, share) in times.items():
                of_full = seconds / times["full"][0]
                faster = f"{seconds / prepared[key][0]:.2f}" if prepared else ""
                cells = (
                    name,
                    key,
                    f"{1e3 * seconds:.1f}",
                    f"{of_full:.2f}",
                    f"{share:.1%}",
                    faster,
                )
                print("| " + " | ".join(cells) + " |")
    return found


def rows(quick=False):
    """Return rows of the benchmarks' table."""
    global FULL, FIDELITIES
    options = ["--seconds=4", "--repeats=1", "--no-pil"] if quick else ["--repeats=3"]
    if quick:
        FULL = data.Fidelity("full", 4, 32)
        FIDELITIES = {"full": FULL, "T": data.Fidelity("T", 2, 32)}
        VIDEO.update(snippets=4, size=32)
    if not shutil.which("ffmpeg"):
        return [Row("samples of a video", "", "not measured: needs FFmpeg's command")]
    if importlib.util.find_spec("PIL") is None:
        options.append("--no-pil")
    found = measure_frames(parse_arguments(options))
    prepared = found.pop("prepared")
    size = f"{FULL.snippets} x 8 frames x {FULL.size} pixels"
    what = f"samples from a prepared ZIP, {size}; {', '.join(FIDELITIES)}"
    sources = {"video file": "decoding the video file each time", "PIL folder": "JPEG files by PIL"}
    table = []
    for name, against in sources.items():
        if name not in found:
            table.append(Row(what, against, "not measured: Pillow is not installed"))
            continue
        times = found[name]
        ratios = [f"{times[key][0] / prepared[key][0]:.2g}" for key in FIDELITIES]
        both = f"{rounded(prepared['full'][0])}, {rounded(times['full'][0])} (full)"
        table.append(Row(what, against, f"{', '.join(ratios)} x faster", both))
    full = prepared["full"][0]
    low = [key for key in FIDELITIES if key != "full"]
    ratios = [f"{full / prepared[key][0]:.2g}" for key in low]
    row = Row(f"samples at {', '.join(low)}", "full fidelity", f"{', '.join(ratios)} x cheaper")
    shares = [f"{prepared[key][1]:.0%}" for key in FIDELITIES]
    what = f"JPEG decoding, {', '.join(FIDELITIES)}"
    return [*table, row, Row(what, "all of a sample's time", ", ".join(shares))]


def parse_arguments(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--video", help="a video file; default: one is made")
    parser.add_argument("--seconds", type=float, default=117, help="117: the mean of ActivityNet")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-pil", action="store_true", help="leave Pillow out")
    return parser.parse_args(argv)


def main():
    args = parse_arguments()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, 1 thread, torch {torch.__version__}")
    measure_frames(args)


if __name__ == "__main__":
    main()
