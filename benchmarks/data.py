"""Loading frames, against the public designs, and a JSON of a million videos in loader workers.

    python benchmarks/data.py frames --video VIDEO.mp4   needs FFmpeg (its command, too) and, for the public loader, Pillow
    python benchmarks/data.py big

frames: one video, repeated up to --seconds, is prepared as `python data.py prepare` does. Then samples of the four fidelities (LoFi's ActivityNet
sizes) are loaded as training does, sample and batch of one, in one thread and one process, from:
    prepared          the ZIP, with its smaller copies
    prepared, one size  a ZIP without them
    video file        the original, for each access, through torchcodec, which decodes the same frames and shrinks them
    PIL folder        JPEG files of the same frames and quality, opened one by one with Pillow, cropped, resized, converted: the public habit
Means over --repeats random views, half of them flipped; file caches are warm. Time is CPU time, which other
programs disturb less. Share: of it within torchcodec's JPEG decoder.
big: annotations of --videos videos are written, read, and passed through a DataLoader of 4 workers for an epoch that reads names, segments and labels of
each; memory is what the processes have for themselves (PSS of /proc/PID/smaps_rollup, shared pages divided among those who share them), in the arrays of
data.Videos and in a list of one NamedTuple with a tensor a video.
"""
import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import media  # noqa: E402

L, T, STRIDE, SIZE, CROP = 100, 8, 8, 224, 0.875


# ------------------------------------------------------------------------------------------------ frames

class PilFolder:
    """The public habit: a folder of all frames, PIL images, cropped and resized one by one."""

    def __init__(self, folder):
        self.folder, self.num_frames = folder, len(os.listdir(folder))

    def load(self, fidelity, seed):
        from PIL import Image
        rng = np.random.default_rng(seed)
        rows = data.snippet_rows(L, fidelity.snippets, rng.choice([0.0, 0.5]))
        corner, flip, images = rng.random(2), rng.random() < 0.5, []
        for n in media.snippet_frames(self.num_frames, L, T, STRIDE)[rows].flatten().tolist():
            image = Image.open(f"{self.folder}/img_{n + 1:05d}.jpg").convert("RGB")
            y, x, side = data.square(image.height, image.width, CROP, corner)
            image = image.crop((x, y, x + side, y + side)).resize((fidelity.size, fidelity.size), Image.BILINEAR)
            images.append(np.asarray(image.transpose(Image.FLIP_LEFT_RIGHT) if flip else image))
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).unflatten(0, (fidelity.snippets, T))


class JpegTimer:
    """Stands in media.py in place of decode_jpeg and adds up its time."""

    def __init__(self):
        self.decode, self.seconds, self.frames = media.decode_jpeg, 0.0, 0

    def __call__(self, source):
        started = time.process_time()
        frame = self.decode(source)
        self.seconds, self.frames = self.seconds + time.process_time() - started, self.frames + 1
        return frame


def time_samples(load, fidelity, repeats):
    """Mean of several loads after two to warm up: seconds, seconds in the JPEG decoder, JPEGs decoded."""
    total = np.zeros(3)
    for seed in range(-2, repeats):
        timer = media.decode_jpeg = JpegTimer()
        try:
            started = time.process_time()
            frames = load(fidelity, seed + 2)
            if seed >= 0:
                total += time.process_time() - started, timer.seconds, timer.frames
        finally:
            media.decode_jpeg = timer.decode
        if frames.shape[-5:] != (fidelity.snippets, T, 3, fidelity.size, fidelity.size):
            raise RuntimeError(f"frames {tuple(frames.shape)} at {fidelity}")
    return total / repeats


def bench_frames(args):
    with tempfile.TemporaryDirectory() as folder:
        os.makedirs(f"{folder}/video")
        long = f"{folder}/video/v.mp4"
        subprocess.run(["ffmpeg", "-v", "error", "-stream_loop", "-1", "-i", args.video, "-t", str(args.seconds), "-an", "-c:v", "copy", long], check=True)
        settings = {"snippets": L, "frames": T, "stride": STRIDE, "short_side": 256, "quality": 90}
        for name, copies in (("prepared", [181, 128]), ("prepared, one size", [])):
            started = time.perf_counter()
            media.prepare({"v": long}, f"{folder}/{name}", {**settings, "copies": copies}, 0)
            print(f"{name}: {os.path.getsize(f'{folder}/{name}/v.zip') / 1e6:.1f} MB, made in {time.perf_counter() - started:.1f} s")
        source = media.open_media(long)
        needed = np.unique(media.snippet_frames(source.num_frames, L, T, STRIDE))
        print(f"video: {source.duration:.1f} s, {source.num_frames} frames, {source.width} x {source.height}, {os.path.getsize(long) / 1e6:.1f} MB; "
              f"full fidelity needs {len(needed)} of them")
        os.makedirs(f"{folder}/pil")
        kept, first = media.FrameZip(f"{folder}/prepared/v.zip"), None
        for n in range(source.num_frames):  # frames that no fidelity reads are there too, as links to one file
            if n in kept.at[0]:
                Path(f"{folder}/pil/img_{n + 1:05d}.jpg").write_bytes(bytes(kept._reader(None)(n).numpy()))
                first = first or f"{folder}/pil/img_{n + 1:05d}.jpg"
            else:
                os.link(first, f"{folder}/pil/img_{n + 1:05d}.jpg") if first else None

        def ours(where):
            path = {"video file": long}.get(where, f"{folder}/{where}/v.zip")
            video = data.Video("v", source.duration, torch.zeros(0, 2), (), path)
            dataset = data.VideoDataset([video], "", snippets=L, frames=T, stride=STRIDE, crop=CROP, train=True)

            def load(fidelity, seed):
                dataset.set_epoch(seed)
                return data.collate([dataset[0, fidelity]])["frames"]
            return load
        loads = {where: ours(where) for where in ("prepared", "prepared, one size", "video file")} | {"PIL folder": PilFolder(f"{folder}/pil").load}
        figures = {}
        print(f"\n{'':20} {'sample':>6} {'ms':>8} {'of full':>8} {'frames/s':>9} {'JPEG share':>10} {'prepared is faster':>19}")
        for where, load in loads.items():
            for name, fidelity in data.fidelities(L, SIZE).items():
                seconds, inside, jpegs = time_samples(load, fidelity, args.repeats if where != "video file" else 2)
                figures[f"{where}/{name}"] = {"seconds": seconds, "jpeg_share": inside / seconds, "jpegs": jpegs}
                print(f"{where:20} {name:>6} {1e3 * seconds:8.1f} {figures[f'{where}/full']['seconds'] / seconds:6.1f} x {fidelity.snippets * T / seconds:9.0f} "
                      f"{f'{inside / seconds:.1%}' if jpegs else '':>10} {seconds / figures[f'prepared/{name}']['seconds']:17.1f} x", flush=True)
        return figures


# ------------------------------------------------------------------------------------------------ big

class Touch(torch.utils.data.Dataset):
    """Reads what the data sets read of a video."""

    def __init__(self, videos):
        self.videos = videos

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, i):
        video = self.videos[i]
        return len(video.name) + len(video.segments) + len(video.labels)


def memory_mb(pid, key="Pss"):
    with open(f"/proc/{pid}/smaps_rollup") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(f"{key}:")) / 1024


def epoch_memory(videos, workers, say):
    """One epoch in a DataLoader; prints the memory of its processes at its start and end."""
    order = np.random.default_rng(0).permutation(len(videos))
    loader = torch.utils.data.DataLoader(Touch(videos), batch_sampler=[order[k:k + 256] for k in range(0, len(order), 256)], num_workers=workers)
    started, batches, first = time.monotonic(), iter(loader), None

    def report():
        pids = [w.pid for w in batches._workers]
        return memory_mb(os.getpid()), [memory_mb(p) for p in pids], [memory_mb(p, "Private_Dirty") for p in pids]
    checksum = 0
    for i, batch in enumerate(batches):
        checksum += int(batch.sum())
        if i == 4 * workers:
            first = report()
        if i == len(loader) - 4 * workers:
            last = report()
    for when, (main, pss, dirty) in (("start", first), ("end", last)):
        say(f"    epoch's {when:5}: PSS main {main:6.0f} MB, workers {' '.join(f'{p:.0f}' for p in pss)} MB, all {main + sum(pss):6.0f} MB; "
            f"private to the workers {' '.join(f'{d:.0f}' for d in dirty)} MB")
    say(f"    epoch of {len(videos):,} videos in {time.monotonic() - started:.0f} s, checksum {checksum}")


def bench_big(args):
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/annotations.json"
        with open(path, "w") as f:
            f.write('{"database": {')
            for i in range(args.videos):
                duration = rng.uniform(10, 240)
                segments = np.sort(rng.uniform(0, duration, (rng.integers(1, 4), 2)), 1).round(3).tolist()
                entry = {"subset": "training", "duration": round(duration, 3), "annotations": [{"segment": s, "label": f"class {rng.integers(200)}"} for s in segments]}
                f.write(f'{", " if i else ""}"v_{i:011d}": {json.dumps(entry)}')
            f.write("}}")
        print(f"{args.videos:,} videos, {os.path.getsize(path) / 1e6:.0f} MB of JSON")
        sys.stdout.flush()
        for kind in ("arrays", "list"):
            if os.fork() == 0:  # a fresh process each
                started = time.monotonic()
                videos = data.load_annotations(path)["training"]
                seconds, peak = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
                if kind == "list":
                    videos = list(videos)
                print(f"{'data.Videos' if kind == 'arrays' else 'a list of NamedTuples with a tensor each'}: "
                      + (f"read in {seconds:.1f} s, peak {peak:.2f} GB, " if kind == "arrays" else "") + f"then {memory_mb(os.getpid()):.0f} MB")
                epoch_memory(videos, 4, print)
                sys.stdout.flush()
                os._exit(0)
            if os.wait()[1]:
                raise RuntimeError("the simulation failed")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["frames", "big"])
    parser.add_argument("--video", help="a video file, for frames")
    parser.add_argument("--seconds", type=float, default=117, help="it is repeated up to this length; 117: the mean of ActivityNet-1.3")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--videos", type=int, default=1_000_000)
    parser.add_argument("--json", help="write the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, 1 thread, Python {platform.python_version()}, torch {torch.__version__}\n")
    if args.what == "big":
        return bench_big(args)
    if not args.video:
        parser.error("frames needs --video")
    figures = bench_frames(args)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
