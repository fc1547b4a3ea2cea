"""Find the actions in your own videos with a finished run: detections in seconds, and pictures.

    python localize.py --run runs/toy-0/lofi VIDEO [VIDEO ...] [--out FOLDER] [--gt ANNOTATIONS]
                       [--no-picture] [--device DEVICE] [--chunk-snippets N]

VIDEO: a file that FFmpeg decodes, a prepared ZIP or a folder of frames. FOLDER (default:
RUN/localized) gets VIDEO.png, the timeline, with the ground truth of annotations if --gt names
some, and result.json, as evaluate.py reads it, to which another start with the same run adds. Its
"external_data" says who made the classes, and where the videos lie, so that `python -m tools.plot
timeline FOLDER` can draw them again. A file that cannot be read is refused with one line and does
not stop the others; the exit status is then 1. From Python:

    from localize import load, localize
    model = load("runs/toy-0/lofi")
    print(localize(model, "video.mp4"))  # [{"label": "jump", "score": 0.71, "segment": [3.5, 8.25]}

A video is encoded as in stage features: L snippets, evenly spread, in an hour 36 s apart if L is
100; with data.windows, video.rate snippets a second. Memory holds the frames of `chunk_snippets`.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import config
import data
import evaluate
import media
from checkpoint import RunFolder, peak_memory_gb
from localizer import Distributed, Localizer, build_encoder, extract_features, predict
from media import InputError
from sola import SoLa


@dataclass
class Model:
    """A run's networks, ready for use."""

    cfg: config.Config
    encoder: torch.nn.Module
    sola: torch.nn.Module | None
    localizer: Localizer
    device: torch.device
    chunk_snippets: int


def load(run, device="auto", chunk_snippets=None):
    """Return the Model of a finished run's folder. Raises InputError if a file of it is missing.

    chunk_snippets: encoded at once, for more or less memory; None: as in stage features.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: torch finds no GPU here; use auto or cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = RunFolder(run)
    cfg = config.saved_config(run)
    if cfg.data.features:
        raise InputError(f"{run} has no encoder: its features are from {cfg.data.features}")
    for path in (folder.head, *([folder.sola] if "sola" in cfg.stages else [])):
        if not os.path.isfile(path):
            raise InputError(f"{run} is not finished: no {path}")
    encoder = build_encoder(**cfg.encoder, weights=config.encoder_path(cfg, folder))
    localizer, _ = Localizer.load(folder.head, **config.head_options(cfg, encoder.channels))
    for module in (encoder, localizer):
        module.to(device).eval().requires_grad_(False)
    sola = SoLa.load(folder.sola).to(device) if "sola" in cfg.stages else None
    chunk = chunk_snippets or cfg.features.chunk_snippets
    return Model(cfg, encoder, sola, localizer, torch.device(device), chunk)


def frame_chunks(source, numbers, size, crop, chunk_snippets):
    """Yield the frames of an opened video in one pass, (1, l, T, 3, size, size) uint8 each.

    numbers: (L, T), of which chunk_snippets rows come at a time. The frames are those of
    VideoDataset: central crops of `crop` times the short side, where the nearest frame stands for
    one that does not decode. Raises InputError at the end if too many do not.
    """
    wanted = np.unique(numbers)
    decoder = source.decode(wanted, size / crop)
    frames = {}
    last = -1
    num_decoded = 0
    for i in range(0, len(numbers), chunk_snippets):
        rows, later = numbers[i : i + chunk_snippets], numbers[i + chunk_snippets :]
        end = rows.max()
        while last < end and (decoded := next(decoder, None)):
            last = decoded[0]
            view = data.crop_resize(decoded[1].permute(1, 2, 0).numpy(), size, crop)
            frames[last] = torch.from_numpy(view).permute(2, 0, 1)
            num_decoded += 1
        if not frames:
            break
        held = np.array(list(frames))
        nearest = held[media.nearest(held, rows.flatten())]
        yield torch.stack([frames[n] for n in nearest.tolist()]).unflatten(0, (1, *rows.shape))
        if len(later):
            # Of the frames before all later ones, the last may stand for one that fails to decode.
            oldest = held[held < later[0].min()].max(initial=-1)
            frames = {n: frame for n, frame in frames.items() if n >= oldest}
    media.check_coverage(source.path, num_decoded, len(wanted))


@torch.no_grad()
def encode_video(model, source, bar=False):
    """Return the features of an opened video, (1, C, L), after SoLa if the run has it."""
    video, chunk = model.cfg.video, model.chunk_snippets
    count = max(round(source.duration * video.rate), 1) if video.rate else video.snippets
    window = (video.frames_per_snippet, video.stride)
    numbers = media.snippet_frames(source.num_frames, count, *window).numpy()
    context = Distributed(0, 1, model.device, model.cfg.precision).autocast
    features = []
    show = bar and sys.stderr.isatty()
    with tqdm(total=count, unit="snippet", leave=False, disable=not show) as progress:
        for frames in frame_chunks(source, numbers, video.size, video.crop, chunk):
            frames = frames.to(model.device)
            features.append(extract_features(model.encoder, frames, chunk, context))
            progress.update(frames.shape[1])
    x = torch.cat(features, 2)
    return x if model.sola is None else model.sola(x)


def localize(model, video, bar=False):
    """Return [{"label", "score", "segment": [start_sec, end_sec]}] of a video, best first.

    The numbers are those of stage detect. video: a path, or what media.open_media returns. Raises
    InputError, naming the file, if it cannot be read.
    """
    source = media.open_media(video) if isinstance(video, (str, os.PathLike)) else video
    if not source.duration:
        raise InputError(f"{source.path}: no frame rate; add a video.json (fps, duration_sec)")
    try:
        x = encode_video(model, source, bar)
        window = model.cfg.video.snippets if model.cfg.data.windows else None
        video = ([""], [source.duration])
        found, _ = predict(model.localizer, x, *video, model.cfg.detect, window=window)
        return found[""]
    except RuntimeError as error:
        # On a CPU, torch has no class of its own for this.
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise InputError(f"{source.path}: out of memory; try --chunk-snippets 1") from error
        raise


def table(detections, most=10):
    """Return the best detections that score 0.0001 or more as lines of text, times in seconds."""
    shown = [d for d in detections[:most] if d["score"] >= 1e-4]
    if not shown:
        return "no detection scores 0.0001 or more"
    rows = [[d["label"], f"{d['score']:.3g}", *(f"{t:.2f}" for t in d["segment"])] for d in shown]
    return evaluate.markdown_table(["class", "score", "start (s)", "end (s)"], rows)


def unique_name(path, taken):
    """Return the name of a file, made unlike those of other files in {name: path} `taken`."""
    stem = os.path.basename(path if os.path.isdir(path) else os.path.splitext(path)[0])
    name, number = stem, 1
    while taken.get(name, path) != path:
        number += 1
        name = f"{stem}-{number}"
    return name


def previous_results(path, run):
    """Return the results and videos of a result file of this run; InputError if it is another's."""
    if not os.path.exists(path):
        return {}, {}
    results, external = evaluate.load_results(path)
    if external.get("run") != os.path.abspath(run):
        maker = external.get("run", "something else")
        raise InputError(f"{path} already exists, made by {maker}; name another folder with --out")
    return results, external.get("videos", {})


def draw_pictures(folder, names, gt):
    """Draw the timelines of videos in a folder's result.json; return whether that worked."""
    folder = os.path.abspath(folder)
    command = [sys.executable, "-m", "tools.plot", "timeline", folder, "--out", folder]
    command += [f"--video={name}" for name in names]
    command += ["--gt", os.path.abspath(gt)] if gt else []
    return subprocess.run(command, cwd=config.HERE).returncode == 0


def localize_files(model, paths, result_path, run):
    """Localize files, each saved at once; return the names of those that could be read."""
    results, videos = previous_results(result_path, run)
    names = []
    for path in map(os.path.abspath, paths):
        started = time.monotonic()
        try:
            source = media.open_media(path)
            detections = localize(model, source, bar=True)
        except config.INPUT_ERRORS as error:
            print(f"localize.py: {error}", file=sys.stderr, flush=True)
            continue
        name = unique_name(path, {name: video["path"] for name, video in videos.items()})
        length = f"{source.duration:.2f} s, {source.num_frames} frames"
        length += f"; took {time.monotonic() - started:.1f} s"
        length += f"; note: {source.note}" if source.note else ""
        print(f"{name}: {length}\n{table(detections)}", flush=True)
        results[name] = detections
        videos[name] = {"path": path, "duration": source.duration}
        class_source = config.CLASS_SOURCES[model.cfg.classes]
        metadata = {"class_source": class_source, "run": os.path.abspath(run), "videos": videos}
        evaluate.save_results(results, result_path, **metadata)
        names.append(name)
    return names


def main(argv=None):
    """Run the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("videos", nargs="+", metavar="VIDEO")
    parser.add_argument("--run", required=True, help="folder of a finished run")
    parser.add_argument("--out", metavar="FOLDER", help="default: RUN/localized")
    parser.add_argument("--gt", metavar="ANNOTATIONS", help="JSON or table, for the pictures")
    parser.add_argument("--no-picture", action="store_true", help="needs no matplotlib")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--chunk-snippets", type=int, help="encoded at once (default: the run's)")
    args = parser.parse_args(argv)
    if args.chunk_snippets is not None and args.chunk_snippets < 1:
        parser.error(f"--chunk-snippets {args.chunk_snippets}: expected at least 1")
    out = args.out or f"{args.run}/localized"
    result_path = RunFolder(out).result
    with config.one_line_errors("localize.py"):
        if not args.no_picture and importlib.util.find_spec("matplotlib") is None:
            raise InputError("pictures need matplotlib: pip install matplotlib; or --no-picture")
        # Complain about these now, not after the videos.
        if args.gt:
            data.load_annotations(args.gt)
        model = load(args.run, args.device, args.chunk_snippets)
        names = localize_files(model, args.videos, result_path, args.run)
        drawn = args.no_picture or not names or draw_pictures(out, names, args.gt)
    summary = f"{len(names)} of {len(args.videos)} videos" + (f" -> {result_path}" if names else "")
    summary += "" if drawn else "; some pictures are missing"
    print(f"{summary}; peak memory {peak_memory_gb(model.device):.2f} GB")
    if not drawn or len(names) < len(args.videos):
        sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    main()
