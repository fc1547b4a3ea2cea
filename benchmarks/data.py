"""Measure the loading of frames as training does it, against the public designs.

    python -m benchmarks.data --video VIDEO.mp4 [--repeats 5] [--json FILE]

Needs FFmpeg (its command, too) and, for the public loader, Pillow. One video, repeated up to
--seconds, is prepared as tools.prepare_data does. Then samples of the four fidelities (LoFi's
ActivityNet sizes), in batches of one, are loaded in one thread and one process from

    prepared            the ZIP, with its smaller copies
    prepared, one size  a ZIP without them
    video file          the original, for each access, through torchcodec, which shrinks the frames
    PIL folder          JPEG files of the same frames and quality, opened one by one with Pillow,
                        cropped, resized, converted: the public habit

Means over --repeats random views, half of them flipped; file caches are warm. Time is CPU time,
which other programs disturb less. JPEG share: of it within torchcodec's JPEG decoder.
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import data
import media
from tools.prepare_data import prepare

L, T, STRIDE, SIZE, CROP = 100, 8, 8, 224, 0.875
FIDELITIES = data.fidelities(
    data.Fidelity("full", L, SIZE), {"S": [100, 112], "T": [25, 224], "ST": [50, 158]}
)


class PilFolder:
    """The public habit: a folder of all frames, PIL images, cropped and resized one by one."""

    def __init__(self, folder):
        self.folder = folder
        self.num_frames = len(os.listdir(folder))

    def load(self, fidelity, seed):
        rng = np.random.default_rng(seed)
        rows = data.snippet_rows(L, fidelity.snippets, rng.choice([0.0, 0.5]))
        corner = rng.random(2)
        flip = rng.random() < 0.5
        numbers = media.snippet_frames(self.num_frames, L, T, STRIDE)[rows].flatten().tolist()
        images = [self._open(number, fidelity.size, corner, flip) for number in numbers]
        frames = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return frames.unflatten(0, (fidelity.snippets, T))

    def _open(self, number, size, corner, flip):
        from PIL import Image

        image = Image.open(f"{self.folder}/img_{number + 1:05d}.jpg").convert("RGB")
        side = round(min(image.size) * CROP)
        x = round(corner[1] * (image.width - side))
        y = round(corner[0] * (image.height - side))
        image = image.crop((x, y, x + side, y + side)).resize((size, size), Image.BILINEAR)
        return np.asarray(image.transpose(Image.FLIP_LEFT_RIGHT) if flip else image)


class JpegTimer:
    """Stands in media.py in place of decode_jpeg and adds up its time."""

    def __init__(self):
        self.decode = media.decode_jpeg
        self.seconds = 0.0
        self.frames = 0

    def __call__(self, source):
        started = time.process_time()
        frame = self.decode(source)
        self.seconds += time.process_time() - started
        self.frames += 1
        return frame


def time_samples(load, fidelity, repeats):
    """Return means after two loads to warm up: seconds, seconds decoding JPEGs, JPEGs decoded."""
    total = np.zeros(3)
    for seed in range(-2, repeats):
        timer = media.decode_jpeg = JpegTimer()
        try:
            started = time.process_time()
            frames = load(fidelity, seed + 2)
            elapsed = time.process_time() - started
        finally:
            media.decode_jpeg = timer.decode
        if seed >= 0:
            total += elapsed, timer.seconds, timer.frames
        assert frames.shape[-5:] == (fidelity.snippets, T, 3, fidelity.size, fidelity.size)
    return total / repeats


def prepare_sources(folder, args):
    """Write the video in all forms to `folder`: {form: its path}."""
    os.makedirs(f"{folder}/video")
    video = f"{folder}/video/v.mp4"
    source = ["-stream_loop", "-1", "-i", args.video, "-t", str(args.seconds)]
    command = ["ffmpeg", "-v", "error", *source, "-an", "-c:v", "copy", video]
    subprocess.run(command, check=True)
    paths = {}
    settings = {"snippets": L, "frames": T, "stride": STRIDE, "short_side": 256, "quality": 90}
    for form, copies in {"prepared": [181, 128], "prepared, one size": []}.items():
        started = time.perf_counter()
        prepare({"v": video}, f"{folder}/{form}", {**settings, "copies": copies}, 0)
        elapsed = time.perf_counter() - started
        paths[form] = f"{folder}/{form}/v.zip"
        print(f"{form}: {os.path.getsize(paths[form]) / 1e6:.1f} MB, made in {elapsed:.1f} s")
    paths["video file"] = video
    paths["PIL folder"] = f"{folder}/pil"
    opened = media.open_media(video)
    kept = media.FrameZip(paths["prepared"])
    print(
        f"video: {opened.duration:.1f} s, {opened.num_frames} frames, {opened.width} x "
        f"{opened.height}, {os.path.getsize(video) / 1e6:.1f} MB; full fidelity needs "
        f"{len(kept.kept)} of them"
    )
    os.makedirs(paths["PIL folder"])
    for number in range(kept.num_frames):
        # Frames that no fidelity reads are there, too, as copies of those that one does.
        nearest = kept.kept[media.nearest(kept.kept, np.array([number]))[0]]
        jpeg = kept.archive.read(media.entry_name(nearest, 0, kept.short_sides))
        Path(f"{folder}/pil/img_{number + 1:05d}.jpg").write_bytes(jpeg)
    return paths


def make_load(form, path, duration):
    """Return load(fidelity, seed) -> frames."""
    if form == "PIL folder":
        return PilFolder(path).load
    video = data.Video("v", duration, np.zeros((0, 2)), (), path)
    dataset = data.VideoDataset(
        [video], snippets=L, frames_per_snippet=T, stride=STRIDE, size=SIZE, crop=CROP, train=True
    )

    def load(fidelity, seed):
        dataset.set_epoch(seed)
        return data.collate([dataset[0, fidelity]])["frames"]

    return load


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--video", required=True, help="a video file")
    parser.add_argument("--seconds", type=float, default=117, help="117: ActivityNet-1.3's mean")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, 1 thread, Python {platform.python_version()}, torch {torch.__version__}\n")
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = prepare_sources(folder, args)
        heads = ["sample", "ms", "of full", "frames/s", "JPEG share", "prepared is faster"]
        print(f"\n{'':20} {'  '.join(f'{head:>10}' for head in heads)}")
        for form, path in paths.items():
            load = make_load(form, path, args.seconds)
            for name, fidelity in FIDELITIES.items():
                repeats = 2 if form == "video file" else args.repeats
                seconds, in_decoder, jpegs = time_samples(load, fidelity, repeats)
                share = in_decoder / seconds
                figures[f"{form}/{name}"] = {
                    "seconds": seconds,
                    "jpeg_share": share,
                    "jpegs": jpegs,
                }
                cells = [
                    name,
                    f"{1e3 * seconds:.1f}",
                    f"{figures[f'{form}/full']['seconds'] / seconds:.1f} x",
                    f"{fidelity.snippets * T / seconds:.0f}",
                    f"{share:.1%}" if jpegs else "",
                    f"{seconds / figures[f'prepared/{name}']['seconds']:.1f} x",
                ]
                print(f"{form:20} {'  '.join(f'{cell:>10}' for cell in cells)}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
