"""Measure loading and disk: samples from prepared frames against the public habits, what settings
of prepare_data cost, and many annotations.

    python -m benchmarks.data frames --video VIDEO.mp4       needs FFmpeg's command, and Pillow
    python -m benchmarks.data parts --video VIDEO.mp4        needs FFmpeg's command
    python -m benchmarks.data disk --videos FOLDER [FOLDER]  needs FFmpeg's command
    python -m benchmarks.data annotations [--count 1000000]

frames: one video, repeated up to --seconds, is prepared as tools.prepare_data does. Then samples of
the four fidelities (LoFi's ActivityNet sizes) are loaded as training does, in one thread, from:
    prepared            the ZIP, with its smaller copies
    prepared, one size  a ZIP without them
    video file          the original, decoded for each access by torchcodec
    PIL folder          JPEG files of the same frames, opened, cropped and resized with Pillow
Medians over --repeats random views; file caches are warm. Time is CPU time, which other programs
disturb less. JPEG share: of it within torchcodec's JPEG decoder.
parts: where the time of such a sample from a prepared ZIP goes, each step timed alone; flipping
falls on half of the samples, collating on batches of more than one video.
disk: --most videos of each folder, repeated up to --seconds, are prepared at every quality with
every set of smaller copies: megabytes, CPU milliseconds of a sample, and the difference of the TSM
features of --snippets snippets (central crops) to those of the same frames without JPEG, mean and
largest, relative to the deviation of all those features; weights: --encoder, else random.
annotations: seconds and peak memory of reading a JSON of so many videos.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

import checkpoint
import data
import media
from tools.prepare_data import prepare, shrink
from tsm import TSM, load_state, load_weights

VIDEO = {"snippets": 100, "frames_per_snippet": 8, "stride": 8, "size": 224, "crop": 0.875}
FULL = data.Fidelity("full", 100, 224)
FIDELITIES = data.fidelities(FULL, {"S": [100, 112], "T": [25, 224], "ST": [50, 158]})
QUALITIES = (70, 80, 90, 100)
ENCODED = ("full", "S", "ST")  # T reads the frames of full
COPIES = ((), (128,), (181,), (181, 128))


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
        dataset.set_epoch(seed)
        return data.collate([dataset[0, fidelity]])["frames"]

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


def measure_frames(args):
    with tempfile.TemporaryDirectory() as folder:
        long = f"{folder}/v.mp4"
        repeat_video(args.video, args.seconds, long)
        source = media.open_media(long)
        print(f"video: {source.duration:.1f} s, {os.path.getsize(long) / 1e6:.1f} MB")
        settings = {"snippets": 100, "frames": 8, "stride": 8, "short_side": 256, "quality": 90}
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
        prepared = {}
        for name, load in reversed(loads.items()):
            repeats = 1 if name == "video file" else args.repeats
            times = {k: time_samples(load, f, repeats) for k, f in FIDELITIES.items()}
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


def sample_parts(path, fidelity):
    """Return milliseconds of the steps of a sample, by name."""
    source = media.FrameZip(path)
    numbers = media.snippet_frames(source.num_frames, FULL.snippets, 8, 8)
    numbers = numbers[data.snippet_rows(FULL.snippets, fidelity.snippets)].flatten().numpy()
    side = side_read(source.short_sides[1:], fidelity)
    copy = source.short_sides.index(side)
    count = min(len(source.kept), 200)
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


def measure_parts(args):
    with tempfile.TemporaryDirectory() as folder:
        repeat_video(args.video, args.seconds, f"{folder}/v.mp4")
        settings = {"snippets": 100, "frames": 8, "stride": 8, "short_side": 256, "quality": 90}
        prepare({"v": f"{folder}/v.mp4"}, folder, {**settings, "copies": [181, 128]}, 0)
        rows = {name: sample_parts(f"{folder}/v.zip", f) for name, f in FIDELITIES.items()}
    print("\n| ms | " + " | ".join(rows["full"]) + " |\n|---|" + "--:|" * len(rows["full"]))
    for name, parts in rows.items():
        print(f"| {name} | " + " | ".join(f"{ms:.1f}" for ms in parts.values()) + " |")


class Lossless:
    """A video as its decoded frames, shrunk as prepare_data does, without JPEG."""

    def __init__(self, path, numbers):
        decoded = media.open_media(path).decode(numbers, 256)
        self.frames = {number: shrink(frame, 256) for number, frame in decoded}

    def read(self, numbers, short_side=None, view=None):
        frames = (self.frames[number] for number in numbers.tolist())
        return media.stack_frames(frames, np.arange(len(numbers)), view)


def repeat_video(path, seconds, target):
    cut = ["-stream_loop", "-1", "-i", path, "-t", str(seconds), "-an", "-c", "copy"]
    subprocess.run(["ffmpeg", "-v", "error", *cut, target], check=True)


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
        settings = {"snippets": 100, "frames": 8, "stride": 8, "short_side": 256, "rate": None}
        loads = {}
        for quality, copies in itertools.product(QUALITIES, COPIES):
            out = f"{folder}/{quality}-{len(loads)}"
            prepare({"v": long}, out, {**settings, "quality": quality, "copies": list(copies)}, 0)
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


def measure_disk(args):
    table = DiskTable(args)
    for folder in args.videos:
        paths = list(media.find_media(folder, prepared=False).values())
        for i in data.snippet_rows(len(paths), min(args.most, len(paths))).tolist():
            with tempfile.TemporaryDirectory() as out:
                table.add(paths[i], out)
            print(f"\n{paths[i]}: {table.seconds[-1]:.1f} s; up to here:", flush=True)
            table.print()


def measure_annotations(args):
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/annotations.json"
        with open(path, "w") as file:
            file.write('{"database": {')
            for i in range(args.count):
                duration = rng.uniform(10, 240)
                segments = np.sort(rng.uniform(0, duration, (rng.integers(1, 4), 2)), 1).tolist()
                annotations = [{"segment": s, "label": f"class {i % 200}"} for s in segments]
                entry = {"subset": "training", "duration": duration, "annotations": annotations}
                file.write(f'{", " if i else ""}"v_{i:011d}": {json.dumps(entry)}')
            file.write("}}")
        started = time.monotonic()
        data.load_annotations(path)
        peak = checkpoint.peak_memory_gb(torch.device("cpu"))
        print(
            f"{args.count:,} videos read in {time.monotonic() - started:.1f} s, peak {peak:.2f} GB"
        )


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=["frames", "parts", "disk", "annotations"])
    parser.add_argument("--video", help="a video file, for frames and parts")
    parser.add_argument("--seconds", type=float, default=117, help="117: the mean of ActivityNet")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-pil", action="store_true", help="leave Pillow out")
    parser.add_argument("--videos", nargs="+", help="folders of video files, for disk")
    parser.add_argument("--most", type=int, default=3, help="videos of each folder, for disk")
    parser.add_argument("--snippets", type=int, default=8, help="that are encoded, for disk")
    parser.add_argument("--encoder", help="encoder.pt of a run, for disk; default: random weights")
    parser.add_argument("--count", type=int, default=1_000_000, help="videos, for annotations")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, 1 thread, torch {torch.__version__}")
    globals()[f"measure_{args.what}"](args)


if __name__ == "__main__":
    main()
