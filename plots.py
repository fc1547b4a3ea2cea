"""Pictures of a run, drawn from the files in its folder, so that they can be made again at any time. Needs matplotlib: pip install matplotlib.

    python plots.py timeline RUN [--video NAME ...] [--gt ANNOTATIONS] [--frames FOLDER] [--top 10] [--out FOLDER]
    python plots.py map RUN [NAME=RUN ...] --out map.png       mAP against tIoU; RUN as for evaluate.py --compare
    python plots.py losses RUN [--out FILE.png]                losses, measures and learning rate by epoch, with the fidelities
    python plots.py similarity RUN [--video NAME ...] [--gt ANNOTATIONS] [--out FILE.png]     self-similarity of features, raw beside SoLa

Without --out they go to RUN/pictures. A file that is there already is replaced only if it is a picture of this program. White ground and dark
text, whatever the viewer; the same files give the same bytes.

From Python, draw_* return a matplotlib Figure and save(figure, path) writes it. Nothing global of matplotlib is changed, no display is needed.
"""
import argparse
import json
import math
import os
import signal
import sys
import textwrap

import numpy as np

MARK = "LoFi-TAL"  # in the PNG's "Software" field: by this a later start knows its own picture
DARK, MID, PALE = "#222222", "#6b6b6b", "#e4e4e4"  # text, secondary text and ground truth, lines and bands
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#B58900", "#332288", "#882255", "#44779A", "#661100", "#117733")  # told apart by the colour-blind
BANDS = {"full": "#f3f3f3", "S": "#d6e8f5", "T": "#fbe3cf", "ST": "#dcefd9"}  # behind the epochs of a fidelity
MEASURES = {"accuracy": "top-1 accuracy (%)", "gradient_norm": "gradient norm", "gate": "gate tanh(alpha)", "spread": "spread of features"}
NOT_LOSSES = {"epoch", "fidelity", "lr", "seconds", "videos_per_sec", "peak_memory_gb"}
MARGIN, LANE, ROW_GAP, FONT = 0.2, 0.22, 0.14, 8  # inches, and points


def need_matplotlib():
    try:
        import matplotlib
    except ImportError:
        raise ImportError('pictures need matplotlib: pip install matplotlib') from None
    return matplotlib


def _figure(width, height, **options):
    """A white figure with a canvas of its own (inches); pyplot, and with it any global state, stays out of it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white", **options)
    FigureCanvasAgg(figure)
    return figure


def _defaults(draw):
    """Draws under matplotlib's own defaults, whatever the user's style file says, and puts the user's back."""
    def drawn(*args, **kwargs):
        matplotlib = need_matplotlib()
        own = {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith("backend")}
        with matplotlib.rc_context(own | {"text.color": DARK, "axes.labelcolor": DARK, "xtick.color": DARK, "ytick.color": DARK, "axes.edgecolor": MID,
                                          "font.size": FONT, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6}):
            return draw(*args, **kwargs)
    drawn.__doc__, drawn.__name__ = draw.__doc__, draw.__name__
    return drawn


@_defaults
def save(figure, path):
    """Writes a PNG aside, then renames it. ValueError if `path` does not end in .png or has a file that is no picture of ours: it is left as it is."""
    if not path.endswith(".png"):
        raise ValueError(f"{path}: pictures are PNG files, name one that ends in .png")
    if os.path.exists(path) and not is_ours(path):
        raise ValueError(f"{path} exists and is no picture of this program: move it away or name another with --out")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    aside = f"{path}.part-{os.getpid()}"
    try:
        figure.savefig(aside, format="png", facecolor="white", metadata={"Software": MARK})
        os.replace(aside, path)
    finally:
        if os.path.exists(aside):
            os.remove(aside)


def is_ours(path):
    """Whether a file is a picture that `save` wrote."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as f:
        head = f.read(512)
    return head.startswith(b"\x89PNG") and b"tEXtSoftware\0" + MARK.encode() in head


def _text_inches(figure, text, size=FONT, weight="normal"):
    """Width and height of a line of text."""
    from matplotlib.font_manager import FontProperties
    w, h, _ = figure.canvas.get_renderer().get_text_width_height_descent(text, FontProperties(size=size, weight=weight), ismath=False)
    return w / figure.dpi, h / figure.dpi


def _fit(figure, text, width, size=FONT, weight="normal"):
    """`text`, its middle left out if it is wider than `width` inches."""
    def cut(keep):
        return text if keep == len(text) else text[:(keep + 1) // 2] + "…" + text[len(text) - keep // 2:]
    low, high = 2, len(text)
    while low < high:
        keep = (low + high + 1) // 2
        low, high = (keep, high) if _text_inches(figure, cut(keep), size, weight)[0] <= width else (low, keep - 1)
    return cut(min(low, len(text)))


# ---------------------------------------------------------------- timeline

def clock(seconds, longest):
    """8.5 as "8.5", under a longest time from two minutes on "0:08", from an hour on "0:00:08"."""
    if longest < 120:
        return f"{seconds:g}"
    whole = round(seconds)
    if longest < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _ticks(duration, most=10):
    """Round times from 0 to the duration, at most `most` + 1 of them."""
    steps = [s * 10.0**e for e in range(-4, 1) for s in (1, 2, 5)] + [10, 15, 20, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 18000, 36000]
    step = next((s for s in steps if duration / s <= most), duration / most)
    return [i * step for i in range(int(duration / step + 1e-9) + 1)]


def score_text(score):
    return f"{score:.2f}" if score >= 0.01 else f"{score:.3f}" if score >= 0.001 else "<0.001"


def pack(intervals):
    """First free lane of each interval (start, end), in the order given: (n,) from 0. Those of a lane do not overlap."""
    lanes, out = [], []
    for start, end in intervals:
        lane = next((i for i, taken in enumerate(lanes) if all(end <= a or start >= b for a, b in taken)), len(lanes))
        if lane == len(lanes):
            lanes.append([])
        lanes[lane].append((start, end))
        out.append(lane)
    return out


def _blend(colour, strength):
    """A colour over white, strength in [0, 1] of it: (r, g, b)."""
    rgb = np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)]) / 255
    return tuple((1 - strength * (1 - rgb)).clip(0, 1).tolist())


def thumbnails(media, width, height=0.72):
    """Evenly spread frames of a video that fill `width` inches at about `height`: (F, h, w, 3) uint8. media: what media.open_media returns."""
    from torch import from_numpy
    from torch.nn.functional import interpolate

    def view(frame):  # (h, w, 3) array, at most 160 pixels
        h, w = frame.shape[:2]
        scale = 160 / min(h, w)
        if scale >= 1:
            return frame
        x = from_numpy(frame).permute(2, 0, 1)[None]
        return interpolate(x, (max(1, round(h * scale)), max(1, round(w * scale))), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()

    def read(count):
        numbers = ((np.arange(count) + 0.5) * media.num_frames / count).astype(np.int64)
        return media.read(numbers, short_side=160, view=view).permute(0, 2, 3, 1).numpy()
    h, w = read(1).shape[1:3]
    return read(int(np.clip(round(width / height * h / w), 5, 24)))


@_defaults
def draw_timeline(detections, *, name, duration=None, truth=None, media=None, top=10, source=None):
    """One video: its best `top` detections as bars, a row a class, under a strip of frames and, if given, the ground truth.

    detections, truth: [{"label", "score", "segment": [start_sec, end_sec]}], truth without scores. duration: seconds; None: the latest end.
    media: see `thumbnails`. source: who made the classes. Bars are the stronger the higher their score, which stands in or beside them.
    """
    shown = sorted(detections, key=lambda d: -d["score"])[:top]
    ends = [d["segment"][1] for d in (*detections, *(truth or ()))]
    duration = max([duration or 0, *([] if duration else ends)]) or 1.0
    by_class = {}
    for d in shown:
        by_class.setdefault(str(d["label"]), []).append(d)
    true = {}
    for t in truth or ():
        true.setdefault(str(t["label"]), []).append(t)
    names = list(dict.fromkeys([*by_class, *true]))
    colour = {c: COLOURS[i % len(COLOURS)] for i, c in enumerate(names)}

    # Widths first: how far the row's names reach decides the scale, the scale which bars collide, the collisions the height.
    width, probe = 10.0, _figure(1, 1)
    wrap = lambda c: textwrap.wrap(c, 24, max_lines=3, placeholder=" …", break_long_words=True) or [" "]
    rows = [(c, [*wrap(c), "ground truth"], true[c], True) for c in true] + [(c, wrap(c), by_class[c], False) for c in by_class]
    lines_wide = [_text_inches(probe, line)[0] for _, lines, _, _ in rows for line in lines]
    left = MARGIN + max([0.6, *lines_wide]) + 0.1
    inner = width - left - MARGIN - 0.15
    strip = None if media is None else thumbnails(media, inner)
    strip_height = 0 if strip is None else inner / len(strip) * strip.shape[1] / strip.shape[2]
    line_height, placed, y = 0.145, [], 0.0
    for c, lines, entries, is_true in rows:
        boxes = []  # inches from the left of the axes: bar, label, all that the bar occupies
        for d in entries:
            a, b = (min(max(t / duration, 0), 1) * inner for t in d["segment"])
            b = max(b, a + 0.02)
            text = "" if is_true else score_text(d["score"])
            w = _text_inches(probe, text)[0] if text else 0
            where = "in" if w + 0.08 <= b - a else "right" if b + w + 0.08 <= inner else "left"
            at = (a + b) / 2 if where == "in" else b + 0.04 if where == "right" else a - 0.04
            boxes.append((a, b, text, where, at, (min(a, a - w - 0.08 if where == "left" else a), max(b, b + w + 0.08 if where == "right" else b) + 0.03)))
        lanes = pack([box[5] for box in boxes])
        height = max((max(lanes) + 1) * LANE, len(lines) * line_height)
        placed.append((c, lines, is_true, y, height, list(zip(entries, boxes, lanes))))
        y += height + ROW_GAP
    lanes_height = max(y, 0.5)
    head = 0.62
    height = head + strip_height + 0.06 + lanes_height + 0.52
    figure = _figure(width, height)

    def box(bottom, high):
        return figure.add_axes([left / width, bottom / height, inner / width, high / height])

    # Title and what is shown
    best = f"best {len(shown)} of {len(detections)} detections" if len(shown) < len(detections) else f"{len(shown)} detection{'s' * (len(shown) != 1)}"
    under = [best, f"video of {clock(round(duration, 2), duration)} {'s' if duration < 120 else ''}".strip()] + [f"classes from: {source}"] * bool(source)
    for text, size, top_inches, ink, weight in ((name, 11, 0.13, DARK, "bold"), (", ".join(under), FONT, 0.36, MID, "normal")):
        figure.text(MARGIN / width, 1 - top_inches / height, _fit(figure, text, width - 2 * MARGIN, size, weight), size=size, color=ink, weight=weight, va="top",
                    parse_math=False)
    if strip is not None:
        axes = box(0.52 + lanes_height + 0.06, strip_height)
        for i, picture in enumerate(strip):
            axes.imshow(picture, extent=(i, i + 0.985, 0, 1), aspect="auto", interpolation="nearest" if min(picture.shape[:2]) < 80 else "antialiased")
        axes.set(xlim=(0, len(strip) - 0.015), ylim=(0, 1))
        axes.set_axis_off()
    axes = box(0.52, lanes_height)
    axes.set_gid("timeline")
    axes.set(xlim=(0, inner), ylim=(lanes_height, 0), yticks=[])
    ticks = _ticks(duration)
    axes.set_xticks([t / duration * inner for t in ticks], [clock(round(t, 6), duration) for t in ticks])
    axes.grid(axis="x", color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("time (s)" if duration < 120 else "time (min:s)" if duration < 3600 else "time (h:min:s)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    if not rows:
        axes.text(inner / 2, lanes_height / 2, "no detections", ha="center", va="center", color=MID)
    for c, lines, is_true, y, high, entries in placed:
        for i, line in enumerate(lines):
            shift = (high - len(lines) * line_height) / 2 + (i + 0.5) * line_height
            quiet = is_true and i == len(lines) - 1
            axes.text(-0.1, y + ROW_GAP / 2 + shift, line, ha="right", va="center_baseline", size=FONT, color=MID if quiet else DARK, parse_math=False)
        for d, (a, b, text, where, at, _), lane in entries:
            middle = y + ROW_GAP / 2 + (lane + 0.5) * LANE + (high - (max(e[2] for e in entries) + 1) * LANE) / 2
            strength = 1 if is_true else 0.15 + 0.85 * d["score"] / max(shown[0]["score"], 0.1)  # nothing of a score near 0 looks sure
            fill = DARK if is_true else _blend(colour[c], strength)
            axes.barh(middle, b - a, LANE * 0.78, left=a, color=[fill], edgecolor=DARK if is_true else colour[c], linewidth=0.7, clip_on=False,
                      gid="truth" if is_true else "detection")
            if text:
                ink = "white" if where == "in" and np.dot(fill, (0.299, 0.587, 0.114)) < 0.5 else DARK
                axes.text(at, middle, text, ha={"in": "center", "right": "left", "left": "right"}[where], va="center_baseline", size=FONT, color=ink, parse_math=False)
        if is_true:  # down through the predictions, so that starts and ends can be compared
            for d, (a, b, *_), _ in entries:
                axes.axvspan(a, b, color="#f0f0f0", linewidth=0, zorder=0)
        if y:
            axes.axhline(y, color=PALE, linewidth=0.6, zorder=0.5)
    return figure


# ---------------------------------------------------------------- the other pictures

@_defaults
def draw_map(rows):
    """mAP against tIoU of several runs: rows of evaluate.compare. Means over the seeds of a row."""
    figure = _figure(7.0, 3.8 + 0.2 * len(rows), layout="constrained")
    axes = figure.add_subplot()
    facts = [[f"{row['evaluated_videos']} of {row['ground_truth_videos']} videos"] + [f"mean of {row['seeds']} seeds"] * (row["seeds"] > 1)
             + [f"classes from: {row['class_source']}"] for row in rows]
    shared = facts[0] if all(f == facts[0] for f in facts) else []  # said once
    for i, (row, fact) in enumerate(zip(rows, facts)):
        points = sorted((float(t), 100 * v) for t, v in row["mAP"].items())
        spread = f" ± {100 * row['std']['average']:.2f}" if row["std"] and row["std"].get("average") is not None else ""
        said = ", ".join([f"{row['name']}: {100 * row['average']:.2f}{spread} %"] + fact * (not shared))
        axes.plot(*zip(*points), color=COLOURS[i % len(COLOURS)], marker="osD^vPX*"[i % 8], markersize=4.5, linewidth=1.6, label=said.replace("$", r"\$"))
    axes.set(xlabel="tIoU threshold", ylabel="mAP (%)", ylim=(0, max(1.0, axes.get_ylim()[1])))
    axes.set_xticks(sorted({float(t) for row in rows for t in row["mAP"]}))
    axes.grid(color=PALE, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower left", frameon=False, title=", ".join(["average mAP", *shared]).replace("$", r"\$"), alignment="left")
    return figure


def read_metrics(run):
    """{stage: [record of an epoch]} of RUN/{pretrain/*,lofi,sola,head}/metrics.jsonl, in the stages' order. ValueError if there is none."""
    inside = sorted(os.listdir(f"{run}/pretrain")) if os.path.isdir(f"{run}/pretrain") else []
    stages = {}
    for stage in (*(f"pretrain/{p}" for p in sorted(inside, key=lambda p: ("icp", "acp", "acp_plus").index(p) if p in ("icp", "acp", "acp_plus") else 9)),
                  "lofi", "sola", "head"):
        path = f"{run}/{stage}/metrics.jsonl"
        if os.path.isfile(path):
            with open(path) as f:
                try:
                    stages[stage] = [json.loads(line) for line in f if line.strip()]
                    assert all("epoch" in r for r in stages[stage])
                except (ValueError, TypeError, AssertionError):
                    raise ValueError(f"{path}: expected a JSON object with its \"epoch\" a line") from None
    if not any(stages.values()):
        raise ValueError(f"{run}: no metrics.jsonl in pretrain/*, lofi, sola or head; is it a run's folder, and has an epoch been finished?")
    lofi = read_json(f"{run}/config.json", "config").get("lofi", {}) if "lofi" in stages and os.path.isfile(f"{run}/config.json") else {}
    if lofi.get("order") == "short":  # a line has the fidelity of its epoch's first batch
        for record in stages["lofi"]:
            record["fidelity"] = ", ".join(lofi["cycle"]) + " by batches"
    return {stage: records for stage, records in stages.items() if records}


@_defaults
def draw_losses(stages, name):
    """Losses, other measures and the learning rate over epochs, a row a stage: {stage: records} of `read_metrics`. Bands tell fidelities apart."""
    panels = {}
    for stage, records in stages.items():
        numbers = list(dict.fromkeys(k for r in records for k, v in r.items() if isinstance(v, (int, float)) and k not in NOT_LOSSES))
        panels[stage] = [[k for k in numbers if k not in MEASURES], ["lr"], *([k] for k in numbers if k in MEASURES)]
    columns = max(map(len, panels.values()))
    figure = _figure(3.4 + 2.7 * (columns - 1), 0.4 + 2.5 * len(panels), layout="constrained")
    figure.suptitle(name.replace("$", r"\$"), x=0.01, ha="left", weight="bold", size=11)
    grid = figure.add_gridspec(len(panels), columns, width_ratios=[1.25] + [1] * (columns - 1))
    for row, (stage, records) in enumerate(stages.items()):
        epochs = [r["epoch"] for r in records]
        fidelity = [str(r.get("fidelity", "")) for r in records]
        kinds = list(dict.fromkeys(f for f in fidelity if f))
        for column, keys in enumerate(panels[stage]):
            axes = figure.add_subplot(grid[row, column])
            axes.set_gid(f"{stage} {keys[0] if keys else ''}")
            values = {k: [r.get(k, math.nan) * (100 if k == "accuracy" else 1) for r in records] for k in keys}
            for i, (k, v) in enumerate(values.items()):
                mark = {"marker": "o", "markersize": 2.5} if len(v) < 40 else {}
                axes.plot(epochs, v, color=COLOURS[i % len(COLOURS)] if column == 0 else DARK, linewidth=1.8 if k == "loss" else 1.1, label=k, zorder=3, **mark)
            flat = [x for v in values.values() for x in v if math.isfinite(x)]
            if keys == ["lr"] and flat:
                axes.set_ylim(0, 1.05 * max(flat) or 1)
            if column == 0 and flat and 0 < 20 * min(flat) < max(flat):  # terms of different sizes
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
                axes.yaxis.set_minor_formatter("")
            bands = len(kinds) > 1
            for e, f in zip(epochs, fidelity) if bands else ():
                axes.axvspan(e - 0.5, e + 0.5, color=BANDS.get(f, PALE), linewidth=0, zorder=0)
            low, high = min(epochs), max(epochs)
            axes.set_xlim(low - 0.5, high + 0.5)
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            axes.grid(axis="y", color=PALE if not bands else "white", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xlabel("epoch" if row == len(panels) - 1 else "")
            if column == 0:
                axes.set_title(stage + (f" (fidelity: {kinds[0]})" if len(kinds) == 1 else ""), loc="left", size=9, weight="bold")
                handles, labels = axes.get_legend_handles_labels()
                if bands:
                    from matplotlib.patches import Patch
                    handles, labels = handles + [Patch(color=BANDS.get(k, PALE)) for k in kinds], labels + [f"fidelity {k}" for k in kinds]
                axes.set_ylabel("loss and its terms" if len(keys) > 1 else "loss")
                axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, handlelength=1.2, borderaxespad=0)
            else:
                axes.set_title("learning rate" if keys == ["lr"] else MEASURES[keys[0]], loc="left", size=9)
    return figure


@_defaults
def draw_similarity(names, raw, sola, truth=None):
    """Cosine similarity of all pairs of snippets, raw features beside SoLa's, one colour scale: (V, L, L) each; truth: [(N, 2) fractions] of V videos."""
    names, both = list(names), (np.asarray(raw, np.float64), np.asarray(sola, np.float64))
    V = len(names)
    if both[0].shape != both[1].shape or both[0].shape != (V, *both[0].shape[-1:] * 2):
        raise ValueError(f"similarity maps of shape {both[0].shape} and {both[1].shape}, expected (V, L, L) twice, for the {V} names")
    L = both[0].shape[1]
    per_row = 2 if V > 2 else 1
    lines = math.ceil(V / per_row)
    figure = _figure(4.9 * per_row + 0.6, 2.75 * lines, layout="constrained")
    off = ~np.eye(L, dtype=bool) if L > 1 else np.ones((1, 1), bool)
    low = min(float(x[:, off].min()) for x in both)
    drawn = []
    for v, name in enumerate(names):
        for k, (what, maps) in enumerate(zip(("raw", "SoLa"), both)):
            axes = figure.add_subplot(lines, 2 * per_row, (v // per_row) * 2 * per_row + 2 * (v % per_row) + k + 1)
            drawn.append(axes)
            picture = axes.imshow(maps[v], vmin=low, vmax=1, cmap="viridis", extent=(0, L, L, 0), interpolation="nearest")
            for a, b in () if truth is None else np.asarray(truth[v]).reshape(-1, 2) * L:  # an action's snippets, along both sides
                axes.plot([a, b], [-0.025 * L] * 2, color="#D55E00", linewidth=3, solid_capstyle="butt", clip_on=False)
                axes.plot([-0.025 * L] * 2, [a, b], color="#D55E00", linewidth=3, solid_capstyle="butt", clip_on=False)
            axes.set(xlim=(0, L), ylim=(L, 0))
            axes.set_title(_fit(figure, f"{name}: {what}" if k == 0 else what, 2.0, 9), loc="left", size=9, pad=6 if truth is None else 11, parse_math=False)
            axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
            axes.yaxis.get_major_locator().set_params(integer=True, nbins=5)
            axes.set_xlabel("snippet")
    bar = figure.colorbar(picture, ax=drawn, shrink=0.8, aspect=30, pad=0.02)
    bar.set_label("cosine similarity" + ("" if truth is None else "; orange: action"))
    return figure


# ---------------------------------------------------------------- files

def read_json(path, what):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no {what} {path}")
    with open(path, encoding="utf-8") as f:
        try:
            return json.load(f)
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON ({error}); is the file cut off?") from None


def read_truth(path):
    """ActivityNet annotations: {video: (duration in seconds or None, [{"label", "segment"}])}."""
    found = read_json(path, "annotation file")
    try:
        return {v: (float(e["duration"]) if e.get("duration") else None,
                    [{"label": a["label"], "segment": [float(t) for t in a["segment"]]} for a in e.get("annotations", [])]) for v, e in found["database"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no ActivityNet annotation file ({type(error).__name__}: {error})") from None


def of_video(table, name):
    """The entry of a video, under its name with or without the prefix "v_"; None if there is none."""
    return next((table[v] for v in (name, name.removeprefix("v_"), f"v_{name}") if v in table), None)


def timelines(run, videos=None, gt=None, frames=None, top=10, out=None, say=print):
    """Writes a timeline for each of `videos` (names; None: the first ten) of RUN/result.json; returns the paths."""
    result = read_json(f"{run}/result.json", "result")
    external = result.get("external_data") if isinstance(result.get("external_data"), dict) else {}
    known = external.get("videos", {})  # localize.py notes there where a video lies and how long it is
    results, truth, media = result.get("results", {}), read_truth(gt) if gt else {}, None
    if frames:
        from media import find_media
        media = find_media(frames)
    for video, found in results.items():
        if not all(isinstance(d, dict) and {"label", "score", "segment"} <= d.keys() for d in found):
            raise ValueError(f"{run}/result.json: video {video!r} has an entry without label, score or segment: expected detections")
    missing = [v for v in videos or () if v not in results]
    if missing:
        raise ValueError(f"{run}/result.json has no video {missing[0]!r}; it has {len(results)}: {', '.join(list(results)[:3])} ...")
    if videos is None:
        videos = list(results)[:10]
        if len(results) > 10:
            say(f"the first 10 of {len(results)} videos; name others with --video")
    from media import open_media
    paths = []
    for video in videos:
        path = of_video(media or {}, video) if media is not None else known.get(video, {}).get("path")
        if path is None and media is not None:
            say(f"{video}: no frames in {frames}, drawn without a strip")
        strip = open_media(path) if path and os.path.exists(path) else None
        annotated = of_video(truth, video)
        if gt and annotated is None:
            say(f"{video}: not in {gt}, drawn without ground truth")
        duration = known.get(video, {}).get("duration") or (annotated or (None,))[0] or (strip.duration if strip else None)
        figure = draw_timeline(results[video], name=video, duration=duration, truth=annotated[1] if annotated else None, media=strip, top=top,
                               source=external.get("class_source"))
        paths.append(f"{out or run + '/pictures'}/{'' if out else 'timeline_'}{video.replace(os.sep, '_')}.png")
        save(figure, paths[-1])
    for path in paths:  # a reader of the words who is gone takes no picture with him
        say(path)
    return paths


def similarity(run, videos=None, gt=None):
    """The figure of RUN/sola/similarity.npz: the first four videos, or `videos`."""
    path = f"{run}/sola/similarity.npz"
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no {path}: stage sola writes it")
    with np.load(path, allow_pickle=False) as f:
        names, raw, sola = [str(n) for n in f["names"]], f["raw"], f["sola"]
    missing = [v for v in videos or () if v not in names]
    if missing:
        raise ValueError(f"{path} has no video {missing[0]!r}; it has {', '.join(names)}")
    rows = [names.index(v) for v in videos] if videos else list(range(min(len(names), 4)))
    truth = None
    if gt:
        table = read_truth(gt)
        truth = [np.array([a["segment"] for a in e[1]]).reshape(-1, 2) / e[0] if (e := of_video(table, names[r])) and e[0] else np.zeros((0, 2)) for r in rows]
    return draw_similarity([names[r] for r in rows], raw[rows], sola[rows], truth)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    for what, words in (("timeline", "detections of single videos"), ("map", "mAP against tIoU"), ("losses", "training, by epoch"),
                        ("similarity", "SoLa's self-similarity maps")):
        sub = commands.add_parser(what, help=words, description=words)
        sub.add_argument("run", nargs="+" if what == "map" else None,
                         help="the run's folder" + (", or NAME=FOLDER, or NAME=FOLDER,FOLDER of several seeds" if what == "map" else ""))
        if what in ("timeline", "similarity"):
            sub.add_argument("--video", nargs="+", metavar="NAME", help="which videos (default: the first ten of timeline, the first four of similarity)")
            sub.add_argument("--gt", metavar="ANNOTATIONS", help="ActivityNet JSON: draw the ground truth too")
        if what == "timeline":
            sub.add_argument("--frames", metavar="FOLDER", help="prepared frames or video files: draw a strip of frames")
            sub.add_argument("--top", type=int, default=10, help="how many detections to draw (default: %(default)s)")
        sub.add_argument("--out", required=what == "map", metavar="FOLDER" if what == "timeline" else "FILE.png", help="default: RUN/pictures")
    args = parser.parse_args(argv)
    if args.what == "timeline" and args.top < 1:
        parser.error(f"--top {args.top}: expected at least 1")
    try:
        if args.what == "timeline":
            timelines(args.run, args.video, args.gt, args.frames, args.top, args.out)
            return
        if args.what == "map":
            import evaluate
            figure = draw_map(evaluate.compare(args.run))
        elif args.what == "losses":
            figure = draw_losses(read_metrics(args.run), os.path.basename(os.path.abspath(args.run)))
        else:
            figure = similarity(args.run, args.video, args.gt)
        out = args.out or f"{args.run}/pictures/{args.what}.png"
        save(figure, out)
        print(out)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"plots.py: {error}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    main()
