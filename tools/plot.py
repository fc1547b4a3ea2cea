"""Draw a run from the files in its folder. Needs matplotlib: pip install matplotlib

    python -m tools.plot timeline RUN [--video NAME ...] [--gt ANNOTATIONS] [--frames FOLDER]
                                  [--top 10] [--out FOLDER]   detections of single videos
    python -m tools.plot map [NAME=]RUN ... --out FILE.png    mAP; RUN as for tools.compare_runs
    python -m tools.plot losses RUN [--out FILE.png]          losses, measures, fidelity by epoch
    python -m tools.plot similarity RUN [--video NAME ...] [--gt ANNOTATIONS] [--out FILE.png]
                                                              features before and after SoLa

Pictures go to RUN/pictures unless --out is given. An existing file is replaced only if it is a
picture of this program. The same files give the same bytes, white ground and dark text. Boxes
stand for letters of no installed font: try apt-get install fonts-noto-core fonts-noto-cjk.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import signal
import textwrap
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain
from pathlib import Path

import numpy as np

from checkpoint import DAMAGE, RunFolder, write_atomic
from config import STAGES, one_line_errors
from data import first_names, load_annotations
from evaluate import load_results, refuse_to_replace
from media import InputError, find_media, open_media, spellings
from pretrain import METHODS
from tools.compare_runs import compare

SOFTWARE = "LoFi-TAL"  # marks our own pictures

# Text; secondary text and ground truth; lines and bands.
DARK, MID, PALE = "#222222", "#6b6b6b", "#e4e4e4"
# Distinguishable for the colour-blind.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#B58900")
COLOURS += ("#332288", "#882255", "#44779A", "#661100", "#117733")
# Behind the epochs of a fidelity.
BANDS = {"full": "#f3f3f3", "S": "#d6e8f5", "T": "#fbe3cf", "ST": "#dcefd9"}
# Each has a panel of its own.
MEASURES = {"lr": "learning rate", "accuracy": "top-1 accuracy (%)"}
MEASURES |= {"gradient_norm": "gradient norm", "gate": "gate tanh(alpha)"}
MEASURES["spread"] = "spread of features"
NOT_DRAWN = {"epoch", "fidelity", "seconds", "videos_per_sec", "data_wait", "peak_memory_gb"}

# A letter is drawn in the first that has it: those of Linux, of macOS and of Windows.
FONTS = ["DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei"]
FONTS += ["PingFang SC", "Hiragino Sans", "Arial Unicode MS", "Microsoft YaHei", "Malgun Gothic"]
FONTS += ["Noto Sans Arabic", "Noto Sans Devanagari", "Noto Sans Thai", "Nirmala UI"]

DPI = 150
# A timeline in inches.
WIDTH, MARGIN, HEAD, FOOT = 10.0, 0.2, 0.62, 0.52
LANE, LINE, ROW_GAP = 0.22, 0.145, 0.14


@contextlib.contextmanager
def _style():
    """Draw under matplotlib's own defaults, whatever the user's style file says."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("pictures need matplotlib: pip install matplotlib") from None
    defaults = matplotlib.rcParamsDefault.items()
    style = {key: value for key, value in defaults if not key.startswith("backend")}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), DARK)
    style |= dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6)
    style |= {"axes.edgecolor": MID, "font.size": 8, "text.parse_math": False}
    style["font.family"] = FONTS
    style |= {"axes.axisbelow": True, "axes.titlelocation": "left", "axes.titlesize": 9}
    style |= {"grid.color": PALE, "grid.linewidth": 0.6, "legend.frameon": False}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # Nobody has all of FONTS, nor each in bold.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
        yield


def _figure(width, height, **options):
    """Return a white figure (inches) with a canvas of its own, made without pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, **options)
    FigureCanvasAgg(figure)
    return figure


@_style()
def save(figure, path):
    """Write a PNG. Raises InputError if anything but a picture of ours has this name."""
    if not path.endswith(".png"):
        raise InputError(f"{path}: expected a name that ends in .png")
    refuse_to_replace(path, SOFTWARE, at=50)  # among the first things that a PNG tells
    write_atomic(path, lambda file: figure.savefig(file, metadata={"Software": SOFTWARE}))


def _text_width(text, **font):
    """Return the width of a line of text in inches."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    font = FontProperties(**font)
    return RendererAgg(1, 1, DPI).get_text_width_height_descent(text, font, False)[0] / DPI


def _text(value):
    """Return a value as text of at most 1000 letters, without such as no font can have."""
    return str(value).encode(errors="replace").decode()[:1000]


def _fit(text, width, **font):
    """Return `text`, with its middle left out if it is wider than `width` inches."""
    text = shortened = _text(text)
    keep = len(text)
    while keep > 2 and _text_width(shortened, **font) > width:
        keep -= 1
        shortened = text[: (keep + 1) // 2] + "…" + text[len(text) - keep // 2 :]
    return shortened


def format_time(seconds, longest):
    """Write 8.5 as "8.5", or as "0:00:08" if `longest` is two minutes or more."""
    return f"{seconds:g}" if longest < 120 else str(timedelta(seconds=round(seconds)))


def tick_times(duration, most=10):
    """Return round times from 0 to the duration, at most `most` + 1 of them."""
    steps = [number * 10.0**power for power in range(-4, 1) for number in (1, 2, 5)]
    steps += [10, 15, 20, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 18000, 36000]
    step = next((step for step in steps if duration / step <= most), duration / most)
    return [i * step for i in range(int(duration / step + 1e-9) + 1)]


def assign_lanes(intervals):
    """Return the first free lane of each (start, end), in order; those of a lane do not overlap."""
    lanes = []
    for start, end in intervals:
        earlier = zip(lanes, intervals, strict=False)
        taken = {lane for lane, (a, b) in earlier if start < b and a < end}
        lanes.append(min(set(range(len(taken) + 1)) - taken))
    return lanes


def thumbnails(media, width, height=0.72):
    """Return evenly spread frames (F, h, w, 3) of media.open_media that fill `width` inches."""
    h, w = media.read([media.num_frames // 2], short_side=160).shape[2:]
    count = int(np.clip(round(width / height * h / w), 5, 24))
    numbers = ((np.arange(count) + 0.5) * media.num_frames / count).astype(np.int64)
    return media.read(numbers, short_side=160).permute(0, 2, 3, 1).numpy()


@dataclass
class Bar:
    """A segment in fractions of the video; its text stands in it, or to its right or left."""

    start: float
    end: float
    text: str = ""
    strength: float = 1.0  # of its colour
    align: str = ""
    lane: int = 0


@dataclass
class Row:
    """The bars of a class; top and height in inches from the top of the axes."""

    lines: list
    colour: str
    is_truth: bool
    bars: list = field(default_factory=list)
    top: float = 0.0
    height: float = 0.0


def _rows(shown, truth, duration):
    """Return the rows of a timeline: ground truth by class, then the detections (best first)."""
    labels = dict.fromkeys(_text(entry["label"]) for entry in [*shown, *truth])
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    rows = {}
    for entry in [*truth, *shown]:
        label, is_truth = _text(entry["label"]), "score" not in entry
        lines = textwrap.wrap(label, 24, max_lines=3, placeholder=" …") or [" "]
        lines += ["ground truth"] if is_truth else []
        row = rows.setdefault((label, is_truth), Row(lines, colours[label], is_truth))
        start, end = (min(max(time / duration, 0), 1) for time in map(float, entry["segment"]))
        bar = Bar(start, end)
        if not is_truth:
            score = float(entry["score"])
            bar.text = f"{score:.{2 if score >= 0.01 else 3}f}" if score >= 0.001 else "<0.001"
            # Relative to the best, but nothing of a score near 0 looks sure.
            bar.strength = 0.15 + 0.85 * score / max(float(shown[0]["score"]), 0.1)
        row.bars.append(bar)
    return list(rows.values())


def _place(rows, inner):
    """Place bars and texts on an axis `inner` inches wide; return the height of all rows."""
    y = 0.0
    for row in rows:
        occupied = []
        for bar in row.bars:
            bar.end = max(bar.end, bar.start + 0.02 / inner)
            low, high = bar.start, bar.end
            space = (_text_width(bar.text) + 0.08) / inner
            if space <= high - low:
                bar.align = "center"
            elif high + space <= 1:
                bar.align = "left"
                high += space
            else:
                bar.align = "right"
                low -= space
            occupied.append((low, high + 0.03 / inner))
        lanes = assign_lanes(occupied)
        for bar, lane in zip(row.bars, lanes, strict=True):
            bar.lane = lane
        row.top = y
        row.height = max((max(lanes) + 1) * LANE, len(row.lines) * LINE)
        y += row.height + ROW_GAP
    return max(y, 0.5)


def _draw_title(figure, text, top, colour, **font):
    text = _fit(text, WIDTH - 2 * MARGIN, **font)
    y = 1 - top / figure.get_figheight()
    figure.text(MARGIN / WIDTH, y, text, va="top", color=colour, **font)


def _draw_time_axis(axes, height, duration):
    unit = "s" if duration < 120 else "h:min:s"
    axes.set(gid="timeline", xlim=(0, 1), ylim=(height, 0), yticks=[], xlabel=f"time ({unit})")
    ticks = tick_times(duration)
    labels = [format_time(round(time, 6), duration) for time in ticks]
    axes.set_xticks([time / duration for time in ticks], labels)
    axes.grid(axis="x")
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_row(axes, row, inner):
    middle = row.top + (ROW_GAP + row.height) / 2
    for i, line in enumerate(row.lines):
        y = middle + (i + 0.5 - len(row.lines) / 2) * LINE
        colour = MID if row.is_truth and i == len(row.lines) - 1 else DARK
        axes.text(-0.1 / inner, y, line, ha="right", va="center_baseline", color=colour)
    num_lanes = 1 + max(bar.lane for bar in row.bars)
    edge = DARK if row.is_truth else row.colour
    rgb = np.array([int(edge[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    outline = {"edgecolor": edge, "linewidth": 0.7, "clip_on": False}
    gid = "truth" if row.is_truth else "detection"
    for bar in row.bars:
        y = middle + (bar.lane + 0.5 - num_lanes / 2) * LANE
        fill = (1 - bar.strength * (1 - rgb)).clip(0, 1)
        width = bar.end - bar.start
        axes.barh(y, width, LANE * 0.78, left=bar.start, color=[fill], gid=gid, **outline)
        positions = {"left": bar.end + 0.04 / inner, "right": bar.start - 0.04 / inner}
        x = positions.get(bar.align, bar.start + width / 2)
        on_dark = bar.align == "center" and fill @ (0.299, 0.587, 0.114) < 0.5
        colour = "white" if on_dark else DARK
        axes.text(x, y, bar.text, ha=bar.align, va="center_baseline", color=colour)
        if row.is_truth:
            # Down through the detections, so that starts and ends can be compared.
            axes.axvspan(bar.start, bar.end, color="#f0f0f0", linewidth=0, zorder=0)
    if row.top:
        axes.axhline(row.top, color=PALE, linewidth=0.6, zorder=0.5)


@_style()
def draw_timeline(detections, *, name, duration=None, truth=(), media=None, top=10, source=None):
    """Return the figure of a video: frames of `media` (see `thumbnails`), ground truth, and the
    best `top` detections, a row a class.

    detections, truth: [{"label", "score", "segment": [start_sec, end_sec]}], truth without scores.
    duration: seconds; None: that of `media`, else the latest end. source: who made the classes.
    """
    shown = sorted(detections, key=lambda d: -float(d["score"]))[:top]
    latest_end = max((float(entry["segment"][1]) for entry in [*truth, *detections]), default=0)
    duration = duration or (media and media.duration) or latest_end or 1.0

    # The names of the rows decide the scale, the scale which bars collide, these the height.
    rows = _rows(shown, truth, duration)
    line_widths = map(_text_width, chain.from_iterable(row.lines for row in rows))
    left = MARGIN + max([0.6, *line_widths]) + 0.1
    inner = WIDTH - left - MARGIN - 0.15
    rows_height = _place(rows, inner)
    strip = thumbnails(media, inner) if media else None
    strip_height = inner / len(strip) * strip.shape[1] / strip.shape[2] if media else 0
    height = HEAD + strip_height + 0.06 + rows_height + FOOT
    figure = _figure(WIDTH, height)

    count = f"{len(shown)} detection{'s' * (len(shown) != 1)}"
    if len(shown) < len(detections):
        count = f"best {len(shown)} of {len(detections)} detections"
    length = format_time(round(duration, 2), duration) + (" s" if duration < 120 else "")
    subtitle = f"{count}, video of {length}" + (f", classes from: {source}" if source else "")
    _draw_title(figure, name, 0.13, DARK, size=11, weight="bold")
    _draw_title(figure, subtitle, 0.36, MID)

    x, width = left / WIDTH, inner / WIDTH
    if media:
        y = (FOOT + rows_height + 0.06) / height
        axes = figure.add_axes((x, y, width, strip_height / height))
        for i, frame in enumerate(strip):
            axes.imshow(frame, extent=(i, i + 0.985, 0, 1), aspect="auto")
        axes.set(xlim=(0, len(strip) - 0.015), ylim=(0, 1))
        axes.set_axis_off()
    axes = figure.add_axes((x, FOOT / height, width, rows_height / height))
    _draw_time_axis(axes, rows_height, duration)
    for row in rows:
        _draw_row(axes, row, inner)
    if not rows:
        axes.text(0.5, rows_height / 2, "no detections", ha="center", va="center", color=MID)
    return figure


@_style()
def draw_map(rows):
    """Return mAP against tIoU of several runs: rows of tools.compare_runs.compare."""
    figure = _figure(8.0, 3.8 + 0.2 * len(rows), layout="constrained")
    axes = figure.add_subplot()
    for i, row in enumerate(rows):
        points = sorted((float(t), 100 * value) for t, value in row["mAP"].items())
        deviation = (row["std"] or {}).get("average")
        spread = "" if deviation is None else f" ± {100 * deviation:.2f}"
        seeds = f", mean of {row['seeds']} seeds" if row["seeds"] > 1 else ""
        label = f"{_fit(row['name'], 2.0)}: {100 * row['average']:.2f}{spread} %{seeds}, "
        label += f"{row['evaluated_videos']} of {row['ground_truth_videos']} videos, "
        label = _fit(f"{label}classes from: {row['class_source']}", 7.4)
        line = {"color": COLOURS[i % len(COLOURS)], "linewidth": 1.6, "markersize": 4.5}
        axes.plot(*zip(*points, strict=True), label=label, marker="osD^vPX*"[i % 8], **line)
    axes.set(xlabel="tIoU threshold", ylabel="mAP (%)", ylim=(0, max(1.0, axes.get_ylim()[1])))
    axes.set_xticks(sorted({float(t) for row in rows for t in row["mAP"]}))
    axes.grid()
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower left", title="average mAP", alignment="left")
    return figure


def read_metrics(run):
    """Return {stage: [record of an epoch]} of the metrics.jsonl in a run's folder, in order."""
    tasks = dict.fromkeys(chain.from_iterable(METHODS.values()))
    stages = {}
    for stage in (*(f"pretrain/{task}" for task in tasks), *STAGES):
        path = Path(run, stage, "metrics.jsonl")
        try:
            lines = path.read_text().splitlines() if path.is_file() else []
            stages[stage] = [json.loads(line, parse_int=float) for line in lines]
            for record in stages[stage]:
                kinds = {type(x) for key, x in record.items() if key != "fidelity"}
                plain = "".join([*record, record.get("fidelity", "")]).isascii()
                if kinds != {float} or not plain or not abs(record["epoch"]) < 1e9:
                    raise ValueError
        except DAMAGE:
            raise InputError(f"{path}: expected a JSON object on each line, of numbers") from None
    stages = {stage: records for stage, records in stages.items() if records}
    if not stages:
        raise InputError(f"{run}: no metrics.jsonl; expected a run's folder with a finished epoch")
    return stages


def _panels(records):
    """Return the keys of each panel of a stage: losses, the learning rate, then single measures."""
    keys = dict.fromkeys(chain(["lr"], *records))
    losses = [key for key in keys if key not in NOT_DRAWN | MEASURES.keys()]
    return [losses, *([key] for key in keys if key in MEASURES)]


def _draw_curves(axes, records, keys, is_losses):
    epochs = [record["epoch"] for record in records]
    finite = []
    for i, key in enumerate(keys):
        scale = 100 if key == "accuracy" else 1
        values = [record.get(key, math.nan) * scale for record in records]
        finite += [value for value in values if math.isfinite(value)]
        line = {"linewidth": 1.8 if key == "loss" else 1.1, "label": key, "zorder": 3}
        marker = {"marker": "o", "markersize": 2.5} if len(values) < 40 else {}
        colour = COLOURS[i % len(COLOURS)] if is_losses else DARK
        axes.plot(epochs, values, color=colour, **line, **marker)
    # Terms of very different sizes.
    if is_losses and finite and 0 < 20 * min(finite) < max(finite):
        axes.set_yscale("log")
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter("")
    axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_bands(axes, records, fidelities):
    """Tell epochs of several fidelities apart."""
    axes.grid(axis="y", color="white" if len(fidelities) > 1 else PALE)
    for fidelity in fidelities if len(fidelities) > 1 else ():
        epochs = [r["epoch"] for r in records if r.get("fidelity") == fidelity]
        bands = {"transform": axes.get_xaxis_transform(), "color": BANDS.get(fidelity, PALE)}
        bands |= {"label": f"fidelity {fidelity}", "linewidth": 0, "zorder": 0}
        axes.broken_barh([(epoch - 0.5, 1) for epoch in epochs], (0, 1), **bands)


@_style()
def draw_losses(stages, name):
    """Return losses, the learning rate and measures by epoch, a row a stage of `read_metrics`."""
    panels = {stage: _panels(records) for stage, records in stages.items()}
    columns = max(map(len, panels.values()))
    width, font = 3.4 + 2.7 * (columns - 1), {"weight": "bold", "size": 11}
    figure = _figure(width, 0.4 + 2.5 * len(panels), layout="constrained")
    figure.suptitle(_fit(name, width - 0.2, **font), x=0.01, ha="left", **font)
    grid = figure.add_gridspec(len(panels), columns, width_ratios=[1.25] + [1] * (columns - 1))
    for row, (stage, records) in enumerate(stages.items()):
        below = max(map(len, list(panels.values())[row + 1 :]), default=0)
        fidelities = list(dict.fromkeys(r["fidelity"] for r in records if r.get("fidelity")))
        for column, keys in enumerate(panels[stage]):
            axes = figure.add_subplot(grid[row, column])
            axes.set_gid(f"{stage} {keys[0] if keys else ''}")
            _draw_curves(axes, records, keys, is_losses=column == 0)
            _draw_bands(axes, records, fidelities)
            axes.set_xlabel("epoch" if column >= below else "")
            if column:
                axes.set_title(MEASURES[keys[0]])
                continue
            fidelity = f" (fidelity: {fidelities[0]})" if len(fidelities) == 1 else ""
            axes.set_title(stage + fidelity, weight="bold")
            axes.set_ylabel("loss and its terms" if len(keys) > 1 else "loss")
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), handlelength=1.2, borderaxespad=0)
    return figure


@_style()
def draw_similarity(names, before_sola, after_sola, truth=None):
    """Return cosine similarity of all pairs of snippets, before beside after SoLa, on one scale.

    before_sola, after_sola: (V, L, L) of V videos; truth: V arrays (N, 2) of fractions.
    """
    V = len(names)
    maps = {"raw": np.asarray(before_sola, float), "SoLa": np.asarray(after_sola, float)}
    L = maps["raw"].shape[-1]
    per_row = 2 if V > 2 else 1
    num_rows = math.ceil(V / per_row)
    figure = _figure(4.9 * per_row + 0.6, 2.75 * num_rows, layout="constrained")
    low = min(float(x.min()) for x in maps.values())
    nearest = {"interpolation": "nearest"}
    marks = {"color": COLOURS[1], "linewidth": 3, "solid_capstyle": "butt", "clip_on": False}
    for v, name in enumerate(names):
        for k, (title, x) in enumerate(maps.items()):
            axes = figure.add_subplot(num_rows, 2 * per_row, 2 * v + k + 1)
            image = axes.imshow(x[v], vmin=low, vmax=1, extent=(0, L, L, 0), **nearest)
            # The snippets of actions, along both sides.
            for segment in [] if truth is None else np.asarray(truth[v]).reshape(-1, 2) * L:
                axes.plot(segment, [-0.025 * L] * 2, **marks)
                axes.plot([-0.025 * L] * 2, segment, **marks)
            axes.set(xlim=(0, L), ylim=(L, 0), xlabel="snippet")
            title = _fit(title if k else f"{name}: {title}", 2.0, size=9)
            axes.set_title(title, pad=6 if truth is None else 11)
            axes.locator_params(integer=True, nbins=5)
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.8, aspect=30, pad=0.02)
    bar.set_label("cosine similarity" + ("" if truth is None else "; orange: action"))
    return figure


def read_truth(path):
    """Return {name, with and without v_: data.Video} of annotations; {} without a path."""
    table = {}
    for video in chain.from_iterable(load_annotations(path).values()) if path else ():
        table |= dict.fromkeys(spellings(video.name), video)
    return table


def _check_names(videos, available, path):
    for video in videos:
        if video not in available:
            some = first_names(list(available), 3)
            raise InputError(f"{path}: no video {video!r}; it has {len(available)}: {some}")


def timelines(run, videos=None, gt=None, frames=None, top=10, out=None, log=print):
    """Draw a timeline for each of `videos` (names; None: the first ten) of RUN/result.json."""
    path = RunFolder(run).result
    results, external = load_results(path)
    truth = read_truth(gt)
    if videos is None:
        videos = list(results)[:10]
        if len(results) > 10:
            log(f"the first 10 of {len(results)} videos; name others with --video")
    _check_names(videos, results, path)
    # localize.py notes where a video lies and how long it is.
    known = external.get("videos", {})
    noted = {video: about["path"] for video, about in known.items()}
    media_paths = find_media(frames, videos) if frames else noted
    for video in videos:
        media_path = media_paths.get(video)
        annotated = truth.get(video) or truth.get(Path(media_path or video).stem)
        if frames and not media_path:
            log(f"{video}: no frames in {frames}, drawn without a strip")
        if gt and not annotated:
            log(f"{video}: not in {gt}, drawn without ground truth")
        name = video.replace(os.sep, "_").replace("\0", "_")
        picture = f"{out}/{name}.png" if out else f"{run}/pictures/timeline_{name}.png"
        options = {"name": video, "source": external.get("class_source"), "top": top}
        options["duration"] = known.get(video, {}).get("duration")
        if annotated:
            segments = zip(annotated.labels, annotated.segments.tolist(), strict=True)
            options["truth"] = [{"label": label, "segment": segment} for label, segment in segments]
            options["duration"] = options["duration"] or np.nan_to_num(annotated.duration)
        if media_path and os.path.exists(media_path):
            options["media"] = open_media(media_path)
        save(draw_timeline(results[video], **options), picture)
        log(picture)


def similarity(run, videos=None, gt=None):
    """Return the figure of RUN/sola/similarity.npz: the first four videos, or `videos`."""
    path = f"{run}/sola/similarity.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            names, L = file["names"].tolist(), file["raw"].shape[-1]
            columns = [file[key].astype(float).reshape(-1, L, L) for key in ("raw", "sola")]
        maps = {str(name): pair for name, *pair in zip(names, *columns, strict=True)}
    except Exception as error:  # a damaged file makes numpy raise almost anything
        write = f"write it with python -m tools.probe_sola {run}"
        raise InputError(f"{path} cannot be read ({error!s:.200}): {write}") from None
    videos = videos or list(maps)[:4]
    _check_names(videos, maps, path)
    truth = read_truth(gt)
    segments = [np.clip(v.segments / v.duration, 0, 1) if v else [] for v in map(truth.get, videos)]
    raw, sola = zip(*map(maps.get, videos), strict=True)
    return draw_similarity(videos, raw, sola, segments if gt else None)


def main(argv=None):
    """Run the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tools.plot", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="picture", required=True)
    for picture in ("timeline", "map", "losses", "similarity"):
        command = commands.add_parser(picture)
        several = picture == "map"
        runs = "[NAME=]RUN[,RUN ...]" if several else "folder of a run"
        command.add_argument("run", nargs="+" if several else None, help=runs)
        command.add_argument("--out", required=several, help="default: in RUN/pictures")
        if picture in ("timeline", "similarity"):
            names = "of videos; --video=-ID for one that begins with a dash"
            command.add_argument("--video", nargs="+", action="extend", metavar="NAME", help=names)
            command.add_argument("--gt", metavar="ANNOTATIONS", help="draw the ground truth too")
        if picture == "timeline":
            command.add_argument("--frames", metavar="FOLDER", help="draw a strip of frames")
            command.add_argument("--top", type=int, default=10, help="detections (default: 10)")
    args = parser.parse_args(argv)
    if args.picture == "timeline" and args.top < 1:
        parser.error(f"--top {args.top}: expected at least 1")
    with one_line_errors("tools.plot"):
        if args.picture == "timeline":
            return timelines(args.run, args.video, args.gt, args.frames, args.top, args.out)
        if args.picture == "map":
            figure = draw_map(compare(args.run))
        elif args.picture == "losses":
            figure = draw_losses(read_metrics(args.run), Path(os.path.abspath(args.run)).name)
        else:
            figure = similarity(args.run, args.video, args.gt)
        out = args.out or f"{args.run}/pictures/{args.picture}.png"
        save(figure, out)
        print(out)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    main()
