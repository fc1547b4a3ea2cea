"""Actions in videos of one's own: a finished run and video files in, detections in seconds and a picture of each video out.

    python localize.py --run runs/toy-0/lofi VIDEO [VIDEO ...] [--out FOLDER] [--gt ANNOTATIONS] [--no-picture] [--chunk N]

VIDEO: a file that FFmpeg decodes, a prepared ZIP or a folder of frames. No annotation file is needed; with --gt, an ActivityNet JSON, the picture shows
the ground truth too. Written to FOLDER (default: RUN/localized):
    result.json    as evaluate.py reads it; another start with the same run and folder adds to it. In "external_data": the run, who made the classes, and for
                   each video its path and duration, so that `python plots.py timeline FOLDER` draws the pictures again
    VIDEO.png      the timeline
A file that cannot be read is refused with one line and does not stop the others; the exit status is then 1.

From Python:
    from localize import load, localize
    model = load("runs/toy-0/lofi")
    print(localize(model, "video.mp4"))        # [{"label": "jump", "score": 0.71, "segment": [3.5, 8.25]}, ...], best first

The video is encoded as stage features does it: L snippets, evenly spread however long it is, so that one of an hour is seen at 36 s a snippet if L is 100;
or, if the run has sliding windows (config key data.windows), data.rate snippets a second.
The frames of `chunk` snippets, and those of the next ones that overlap with them, are in memory at once, however long the video is.
"""
import argparse
import os
import signal
import sys
import time
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import config
import data
import engine
import evaluate
import media
import plots
from localizer import Localizer, detections, encode
from sola import SoLa
from tsm import make_encoder

SOURCE = "video classifier of the run"


class Model(NamedTuple):
    """A run's networks, ready for use."""
    run: str
    cfg: config.Config
    encoder: torch.nn.Module
    sola: torch.nn.Module | None
    localizer: Localizer
    classes: list
    device: torch.device
    chunk: int  # snippets encoded at once


def encoder_path(run, cfg):
    """The encoder whose features the run's head was trained on: stage lofi's, else stage pretrain's, else that of pretrain.checkpoint."""
    if cfg.data.features:
        raise ValueError(f"{run} was trained on features from elsewhere ({cfg.data.features}) and has no encoder: videos need a run with stage features")
    stage = next((s for s in ("lofi", "pretrain") if s in cfg.stages), None)
    path = f"{run}/{stage}/encoder.pt" if stage else cfg.pretrain.checkpoint
    if path != "torchvision" and not os.path.isfile(path or ""):
        raise FileNotFoundError(f"{run}: no encoder {path}" + (f", which stage {stage} writes" if stage else " (config key pretrain.checkpoint, seen from here)"))
    return path


def load(run, device="auto", chunk=None):
    """The Model of a finished run's folder; it may have been moved. FileNotFoundError or ValueError if something of it is missing.

    chunk: snippets encoded at once, for more or less memory; None: as in stage features (config key features.chunk).
    """
    run = os.fspath(run)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch finds no GPU here (torch.cuda.is_available() is False); use auto or cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not os.path.isfile(f"{run}/config.json"):
        raise FileNotFoundError(f"no {run}/config.json: name the folder of a run, such as runs/toy-0/lofi")
    cfg = config.merge(config.saved(run), {})
    path = encoder_path(run, cfg)
    for file, stage in ((f"{run}/head/head.pt", "head"), (f"{run}/sola/sola.pt", "sola")):
        if stage in (*cfg.stages, "head") and not os.path.isfile(file):
            raise FileNotFoundError(f"{run} is not finished: no {file}, which stage {stage} writes")
    encoder = make_encoder(**cfg.encoder, weights=path)
    saved = torch.load(f"{run}/head/head.pt", map_location="cpu", weights_only=True)
    localizer = Localizer(cfg.tal_head, cfg[cfg.tal_head], channels=encoder.channels, classes=len(saved["classes"]))
    localizer.load_state_dict(saved["model"])
    sola = SoLa.load(f"{run}/sola/sola.pt").to(device) if "sola" in cfg.stages else None
    ready = [m.to(device).eval().requires_grad_(False) for m in (encoder, localizer)]
    return Model(run, cfg, ready[0], sola, ready[1], list(saved["classes"]), torch.device(device), chunk or cfg.features.chunk)


def stream(source, numbers, size, ratio, chunk):
    """The frames of a video, `chunk` snippets at a time and in one pass: numbers (L, T) -> yields (1, l, T, 3, size, size) uint8.

    The very frames that VideoDataset gives: central crops of `ratio` times the short side; a number that does not decode is replaced by the
    nearest that does. ValueError, in the end, if too many do not.
    """
    wanted, held, last, count = np.unique(numbers), {}, -1, 0
    short_side = size / ratio
    frames = source.decode(wanted, int(np.ceil(short_side)) if isinstance(source, media.VideoFile) else short_side)
    for i in range(0, len(numbers), chunk):
        rows, later = numbers[i:i + chunk], numbers[i + chunk:]
        end = rows.max()
        while last < end and (found := next(frames, None)):
            last, count = found[0], count + 1
            held[last] = data.crop_resize(found[1][None], size, ratio)[0]
        if not held:
            break
        kept = np.array(list(held))
        yield torch.stack([held[n] for n in kept[media.nearest(kept, rows.flatten())].tolist()]).unflatten(0, (1, *rows.shape))
        if len(later):  # of the frames before all that is still to come one stays, to stand for a next one that does not decode
            keep = kept[kept < later.min()].max(initial=-1)
            held = {n: frame for n, frame in held.items() if n >= keep}
    media.check_coverage(source.path, count, len(wanted))


@torch.no_grad()
def features_of(model, source, bar=False):
    """Features of an opened video, (1, C, L), behind SoLa if the run has it."""
    d, chunk = model.cfg.data, model.chunk
    count = max(round(source.duration * d.rate), 1) if d.get("windows") else d.snippets
    numbers = media.snippet_frames(source.num_frames, count, d.frames_per_snippet, d.stride).numpy()
    features = []
    autocast = partial(engine.autocast, model.device, model.cfg.precision)
    with tqdm(total=count, unit="snippet", leave=False, disable=not (bar and sys.stderr.isatty())) as progress:
        for frames in stream(source, numbers, d.size, d.crop, chunk):
            features.append(encode(model.encoder, frames.to(model.device), chunk, autocast))
            progress.update(frames.shape[1])
    x = torch.cat(features, 2)
    return x if model.sola is None else model.sola(x)


def localize(model, video, bar=False):
    """Detections of a video, best first: [{"label", "score", "segment": [start_sec, end_sec]}]. The numbers that stage detect would give for it.

    video: a path, or what media.open_media returned. ValueError or FileNotFoundError, naming the file, if it cannot be read.
    """
    source = media.open_media(video) if isinstance(video, (str, os.PathLike)) else video
    if not source.duration:
        raise ValueError(f"{source.path} tells no frame rate: put a video.json {{\"fps\", \"duration_sec\"}} beside its frames")
    d, L, x, windows = model.cfg.detect, model.cfg.data.snippets, features_of(model, source, bar), None
    if model.cfg.data.get("windows"):
        count = x.shape[2]
        x, first = data.windows_of(x[0], L)
        windows = torch.tensor(first, device=x.device), count
    found, _ = detections(model.localizer, x, [""], [source.duration], model.classes, sigma=d.sigma, top_k=d.top_k, classes_per_video=d.classes_per_video,
                          windows=windows)
    return found[""]


def table(found, most=10):
    """The best detections as lines of text, times in seconds."""
    if not found:
        return "  no detections"
    rows = [(f"{d['score']:.3f}" if d["score"] >= 0.001 else f"{d['score']:.0e}", *(f"{t:.2f}" for t in d["segment"]), d["label"]) for d in found[:most]]
    wide = [max(len(h), *(len(r[i]) for r in rows)) for i, h in enumerate(("score", "start", "end"))]
    line = lambda a, b, c, label: f"  {a:>{wide[0]}}  {b:>{wide[1]}}  {c:>{wide[2]}}  {label}"
    return "\n".join([line("score", "start", "end", "class (times in seconds)"), *(line(*row) for row in rows)])


def name_of(path, taken):
    """A name for a video, that of its file, that no other file has: {name: path} `taken`."""
    path = os.path.abspath(path)
    stem = os.path.basename(path) if os.path.isdir(path) else os.path.splitext(os.path.basename(path))[0]
    number = 1
    while taken.get(name := stem if number == 1 else f"{stem}-{number}", path) != path:
        number += 1
    return name, stem


def before(folder, run):
    """Results and videos that an earlier start left in the folder. ValueError if the result there is of another making."""
    path = f"{folder}/result.json"
    if not os.path.exists(path):
        return {}, {}
    result = plots.read_json(path, "result")
    external = result.get("external_data") if isinstance(result, dict) else None
    made_by = external.get("run") if isinstance(external, dict) and "videos" in external else None
    if made_by != os.path.abspath(run):
        raise ValueError(f"{path} is there already, made by {made_by or 'something else'}: name another folder with --out")
    return result["results"], external["videos"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", metavar="VIDEO")
    parser.add_argument("--run", required=True, help="folder of a finished run")
    parser.add_argument("--out", metavar="FOLDER", help="default: RUN/localized")
    parser.add_argument("--gt", metavar="ANNOTATIONS", help="ActivityNet JSON: the pictures show the ground truth too")
    parser.add_argument("--no-picture", action="store_true", help="needs no matplotlib")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--chunk", type=int, help="snippets encoded at once: less memory (default: the run's features.chunk)")
    args = parser.parse_args(argv)
    if args.chunk is not None and args.chunk < 1:
        parser.error(f"--chunk {args.chunk}: expected at least 1")
    out = args.out or f"{args.run}/localized"
    try:
        if not args.no_picture:
            plots.need_matplotlib()
        truth = plots.read_truth(args.gt) if args.gt else {}
        model = load(args.run, args.device, args.chunk)
        results, videos = before(out, args.run)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"localize.py: {error}")
    failed = without_picture = 0
    try:
        for path in args.videos:
            started, localized = time.monotonic(), False
            try:
                source = media.open_media(path)
                found = localize(model, source, bar=True)
                name, stem = name_of(path, {v: about["path"] for v, about in videos.items()})
                print(f"{name}: {source.duration:.2f} s, {source.num_frames} frames; took {time.monotonic() - started:.1f} s"
                      + (f"; note: {source.note}" if source.note else ""))
                print(table(found))
                results[name] = found
                videos[name] = {"path": os.path.abspath(path), "duration": source.duration}
                evaluate.save_results(results, f"{out}/result.json", class_source=SOURCE, run=os.path.abspath(args.run), videos=videos)
                localized = True
                if not args.no_picture:
                    annotated = plots.of_video(truth, stem)
                    if args.gt and annotated is None:
                        print(f"  {stem} is not in {args.gt}: no ground truth in the picture")
                    figure = plots.draw_timeline(found, name=name, duration=source.duration, truth=annotated and annotated[1], media=source, source=SOURCE)
                    plots.save(figure, f"{out}/{name}.png")
                    print(f"  -> {out}/{name}.png")
            except (ValueError, OSError, RuntimeError) as error:
                failed, without_picture = failed + (not localized), without_picture + localized
                words = (str(error) or type(error).__name__).splitlines()[0]
                more = "; try a smaller --chunk" if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in words else ""
                print("localize.py: " + ("" if path in words else f"{path}: ") + words + more, file=sys.stderr)
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit("localize.py: interrupted; the videos that are done are in the result")
    done = len(args.videos) - failed
    print(f"{done} of {len(args.videos)} videos" + (f", {without_picture} of them without a picture" if without_picture else "") + (f" -> {out}/result.json" if done else "") + f"; peak memory {engine.peak_memory_gb(model.device):.2f} GB")
    if failed or without_picture:
        sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    main()
