"""Measure what settings of prepare_data cost in disk, time and features, and the parts of a sample.

    python -m benchmarks.disk settings [--videos FOLDER ...]   needs FFmpeg's command
    python -m benchmarks.disk parts [--video VIDEO.mp4]        needs FFmpeg's command

settings: --most videos of each folder, repeated up to --seconds, are prepared at every quality with
every set of smaller copies: megabytes, CPU milliseconds of a sample, and the difference of the TSM
features of --snippets snippets (central crops) to those of the same frames without JPEG, mean and
largest, relative to the deviation of all those features; weights: --encoder, else random.
parts: where the time of a sample from a prepared ZIP goes, each step timed alone; flipping falls on
half of the samples, collating on batches of more than one video.
Without a video, one is made: a test picture with noise.
"""

import argparse
import itertools
import os
import shutil
import statistics
import tempfile
import time

import numpy as np
import torch

import data
import media
from benchmarks.data import FIDELITIES, FULL, PREPARED, VIDEO, loader, make_video, repeat_video
from benchmarks.table import Row
from tools.prepare_data import prepare, shrink
from tsm import TSM, load_state, load_weights

QUALITIES = (70, 80, 90, 100)
ENCODED = ("full", "S", "ST")  # T reads the frames of full
COPIES = ((), (128,), (181,), (181, 128))


def side_read(copies, fidelity):
    """Return the short side of the copy that a fidelity is read from."""
    return min(s for s in (256, *copies) if s > fidelity.size / VIDEO["crop"] - 0.5)


def microseconds(step, count):
    """Return the median CPU time of step(i), of several runs over i < count."""
    runs = []
    for _ in range(7):
        started = time.process_time()
        for i in range(count):
            step(i)
        runs.append((time.process_time() - started) / count * 1e6)
    return statistics.median(runs)


def sample_parts(path, fidelity, most=200):
    """Return milliseconds of the steps of a sample, by name, timed on so many frames."""
    source = media.FrameZip(path)
    numbers = media.snippet_frames(source.num_frames, FULL.snippets, 8, 8)
    numbers = numbers[data.snippet_rows(FULL.snippets, fidelity.snippets)].flatten().numpy()
    side = side_read(source.short_sides[1:], fidelity)
    copy = source.short_sides.index(side)
    count = min(len(source.kept), most)
    files = [source._jpeg(k, copy) for k in range(count)]
    tensors = [torch.frombuffer(file, dtype=torch.uint8) for file in files]
    frames = [media.decode_jpeg(x) for x in tensors]
    arrays = [frame.numpy().transpose(1, 2, 0) for frame in frames]
    stacked = np.zeros((count, fidelity.size, fidelity.size, 3), np.uint8)

    def crop(i, flip=False):
        stacked[i] = data.crop_resize(arrays[i], fidelity.size, VIDEO["crop"], (0.3, 0.6), flip)

    cropped = microseconds(crop, count)
    steps = {
        "decoding": microseconds(lambda i: media.decode_jpeg(tensors[i]), count),
        "reading": microseconds(lambda i: source._jpeg(i, copy), count),
        "checking the header": microseconds(lambda i: media.num_pixels(files[i]), count),
        "cropping, copying": cropped,
        "flipping": microseconds(lambda i: crop(i, True), count) - cropped,
    }
    distinct = len(np.unique(media.nearest(source.kept, numbers)))
    parts = {name: seconds * distinct / 1e3 for name, seconds in steps.items()}
    parts["opening"] = microseconds(lambda i: media.FrameZip(path), 5) / 1e3
    sample = {"frames": torch.zeros(1, len(numbers), fidelity.size, fidelity.size, 3).byte()}
    sample["frames"] = sample["frames"].movedim(-1, 2)
    return parts | {"collating": microseconds(lambda i: data.collate([sample] * 4), 1) / 4e3}


def measure_parts(video, seconds, most=200):
    """Return milliseconds of the steps of a sample, {fidelity: {step: ms}}."""
    with tempfile.TemporaryDirectory() as folder:
        repeat_video(video, seconds, f"{folder}/v.mp4")
        prepare({"v": f"{folder}/v.mp4"}, folder, {**PREPARED, "copies": [181, 128]}, 0)
        found = {name: sample_parts(f"{folder}/v.zip", f, most) for name, f in FIDELITIES.items()}
    print("\n| ms | " + " | ".join(found["full"]) + " |\n|---|" + "--:|" * len(found["full"]))
    for name, parts in found.items():
        print(f"| {name} | " + " | ".join(f"{ms:.1f}" for ms in parts.values()) + " |")
    return found


def rows(quick=False):
    """Return rows of the benchmarks' table."""
    if not shutil.which("ffmpeg"):
        return [Row("steps of a sample", "", "not measured: needs FFmpeg's command")]
    with tempfile.TemporaryDirectory() as folder:
        make_video(f"{folder}/picture.mp4")
        seconds, most = (1, 4) if quick else (117, 200)
        found = measure_parts(f"{folder}/picture.mp4", seconds, most)
    shares = []
    for parts in found.values():
        # Half of the samples are flipped; batches of one video are not collated.
        whole = sum(parts.values()) - parts["flipping"] / 2 - parts["collating"]
        shares.append(f"{parts['decoding'] / whole:.0%}")
    against = "the steps of a sample, each timed alone, added up"
    return [Row(f"JPEG decoding, {', '.join(found)}", against, ", ".join(shares))]


class Lossless:
    """A video as its decoded frames, shrunk as prepare_data does, without JPEG."""

    def __init__(self, path, numbers):
        decoded = media.open_media(path).decode(numbers, 256)
        self.frames = {number: shrink(frame, 256) for number, frame in decoded}

    def read(self, numbers, short_side=None, view=None):
        frames = (self.frames[number] for number in numbers.tolist())
        return media.stack_frames(frames, np.arange(len(numbers)), view)


def build_encoder(path):
    """Return the TSM of an encoder file, or one of random weights."""
    torch.manual_seed(0)
    if path is None:
        return TSM(frozen_bn=True).eval()
    told = load_state(path)["encoder"]
    encoder = TSM(**{key: told[key] for key in ("depth", "width", "shift_div", "maxpool")})
    return load_weights(encoder, path).eval()


@torch.no_grad()
def encode(encoder, source, numbers, size):
    """Return the features of snippets, numbers (L, T): (L, C)."""
    frames = data.read_view(source, numbers.flatten().numpy(), size, VIDEO["crop"])
    return encoder(frames.unflatten(0, (1, *numbers.shape)))[0].t()


class DiskTable:
    """Sizes, times and features of videos at each quality with each set of copies."""

    def __init__(self, args):
        self.args = args
        self.encoder = build_encoder(args.encoder)
        self.seconds = []  # of each video
        self.sizes = {}  # bytes of each video, by (quality, copies)
        self.times = {}  # seconds of each load, by (quality, copies, fidelity)
        self.features = {}  # of each video, by (quality, short side read, fidelity); lossless: None

    def add(self, path, folder):
        """Measure a video, in a folder for its files."""
        long = f"{folder}/v{os.path.splitext(path)[1]}"
        repeat_video(path, self.args.seconds, long)
        source = media.open_media(long)
        self.seconds.append(source.duration)
        numbers = media.snippet_frames(source.num_frames, FULL.snippets, 8, 8)
        rows = {}
        for name in ENCODED:
            part = data.snippet_rows(FULL.snippets, FIDELITIES[name].snippets)
            rows[name] = numbers[part[data.snippet_rows(len(part), self.args.snippets)]]
        lossless = Lossless(long, np.unique(torch.cat(list(rows.values()))))
        self._encode(lossless, None, (), rows)
        loads = {}
        for quality, copies in itertools.product(QUALITIES, COPIES):
            out = f"{folder}/{quality}-{len(loads)}"
            prepare({"v": long}, out, PREPARED | {"quality": quality, "copies": [*copies]}, 0)
            size = os.path.getsize(f"{out}/v.zip")
            self.sizes.setdefault((quality, copies), []).append(size)
            self._encode(media.open_media(f"{out}/v.zip"), quality, copies, rows)
            loads[quality, copies] = loader(f"{out}/v.zip", source.duration)
        # The settings in turn, so that what else the machine does falls on all of them.
        for seed, name in itertools.product(range(self.args.repeats), FIDELITIES):
            for key, load in loads.items():
                started = time.process_time()
                load(FIDELITIES[name], seed)
                elapsed = time.process_time() - started
                self.times.setdefault((*key, name), []).append(elapsed)

    def _encode(self, source, quality, copies, rows):
        for name, numbers in rows.items():
            found = self.features.setdefault((quality, self._side(copies, name), name), [])
            if len(found) < len(self.seconds):
                found.append(encode(self.encoder, source, numbers, FIDELITIES[name].size))

    def _side(self, copies, name):
        return side_read(copies, FIDELITIES[name])

    def difference(self, quality, copies, name):
        """Return mean and largest difference of features to lossless ones, by their deviation."""
        lossless = torch.cat(self.features[None, 256, name])
        deviation = (lossless - lossless.mean(0)).square().mean().sqrt()
        features = torch.cat(self.features[quality, self._side(copies, name), name])
        difference = (features - lossless).abs() / deviation
        return difference.mean().item(), difference.max().item()

    def print(self):
        names = " | ".join(f"{name}, ms" for name in FIDELITIES)
        names += "".join(f" | {name}: difference" for name in ENCODED)
        print(f"\n| quality | copies | MB a video | GB an hour | {names} |")
        print("|--:|---|--:|--:|" + "--:|" * 7)
        for key, sizes in self.sizes.items():
            quality, copies = key
            size = sum(sizes) / len(sizes)
            hour = 3600 * sum(sizes) / sum(self.seconds)
            times = [statistics.median(self.times[(*key, name)]) for name in FIDELITIES]
            pairs = [self.difference(*key, name) for name in ENCODED]
            cells = [quality, " and ".join(map(str, copies)) or "none"]
            cells += [f"{size / 1e6:.1f}", f"{hour / 1e9:.2f}", *(f"{1e3 * t:.0f}" for t in times)]
            cells += [f"{mean:.3f}, {largest:.2f}" for mean, largest in pairs]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def measure_settings(args):
    table = DiskTable(args)
    for folder in args.videos:
        paths = list(media.find_media(folder, prepared=False).values())
        for i in data.snippet_rows(len(paths), min(args.most, len(paths))).tolist():
            with tempfile.TemporaryDirectory() as out:
                table.add(paths[i], out)
            print(f"\n{paths[i]}: {table.seconds[-1]:.1f} s; up to here:", flush=True)
            table.print()


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=["settings", "parts"])
    parser.add_argument("--video", help="a video file, for parts")
    parser.add_argument("--videos", nargs="+", help="folders of video files, for settings")
    parser.add_argument("--seconds", type=float, default=117, help="117: the mean of ActivityNet")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--most", type=int, default=3, help="videos of each folder")
    parser.add_argument("--snippets", type=int, default=8, help="that are encoded")
    parser.add_argument("--encoder", help="encoder.pt of a run; default: random weights")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if not (args.video or args.videos):
            args.video, args.videos = f"{folder}/picture.mp4", [folder]
            make_video(args.video)
        if args.what == "settings":
            measure_settings(args)
        else:
            measure_parts(args.video, args.seconds)


if __name__ == "__main__":
    main()
