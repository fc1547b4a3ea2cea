"""Write a toy data set of untrimmed videos, in exactly the layout of a real one.

    python -m tools.make_toy --out data/toy --seed 0

    data/toy/annotations.json                 ActivityNet JSON, subsets training and validation
    data/toy/frames/VIDEO.zip                 frames, see media.py
    data/toy/clips/{train,val}/CLASS/*.zip    trimmed clips of other actions, for ACP
    data/toy/stills/{train,val}/CLASS/*.jpg   still shapes, for ICP
    data/toy/toy.json                         the arguments that made it

Sprites drift over a moving texture. A reddish one, the *main* sprite, performs the video's action
during one to three segments; so that action is not just "something moves", it also makes the same
motion more weakly around and between them, and sprites of other hues make it at full amplitude at
times of their own. Who acts, how strongly, from when to when is what a classifier of trimmed clips
is never taught. Each file has a random stream of its own: a seed gives the same bytes, always.
"""

import argparse
import colorsys
import json
import os
import shutil
import signal
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from numpy import cos, pi, sin

from checkpoint import load_json, save_json
from config import one_line_errors
from media import InputError
from tools.jobs import available_cores, run_jobs
from tools.prepare_data import encode_jpeg, write_frame_zip

FPS = 8
VERSION = 2  # of the drawing: goes up when the same arguments give other pictures

# Of a motion's phase: fast one way, slow the other, as most of what happens looks wrong played
# backwards; 0 would leave the arrow of time nothing to learn.
SKEW = 0.7
SHAPES = ["disc", "square", "triangle", "star", "cross", "ring"]
MAIN_HUES = (-0.08, 0.08)
OTHER_HUES = (0.28, 0.72)
HUES = {"red": (-0.04, 0.04), "yellow": (0.13, 0.17), "green": (0.31, 0.37), "blue": (0.58, 0.66)}


def _option(default, description):
    return field(default=default, metadata={"help": description})


@dataclass(frozen=True)
class Toy:
    """All that a toy data set depends on; its fields are the options of the command line."""

    seed: int = _option(0, "of everything random")
    train: int = _option(240, "training videos")
    val: int = _option(160, "validation videos")
    clips: int = _option(3000, "training clips, and a tenth of it for validation")
    stills: int = _option(1500, "training stills, and a tenth of it for validation")
    size: int = _option(46, "height and width, pixels")
    snippets: int = _option(32, "snippets of a video")
    frames_per_snippet: int = _option(4, "frames of a snippet")
    clip_frames: int = _option(8, "frames of a clip")
    competitors: int = _option(2, "sprites of other hues that make the video's motion, too")
    busy: tuple = _option((0.15, 0.5), "fraction of the video in which a competitor acts")
    near: float = _option(0.6, "amplitude of near-action, as a fraction of the action's")
    scene: float = _option(0.7, "fraction of the videos whose background tells the class")
    amplitude: tuple = _option((0.25, 0.33), "range of the actions' amplitude")

    def settings(self):
        """Return the content of toy.json."""
        return json.loads(json.dumps({"version": VERSION, **asdict(self)}))


# (phase p (n,) in radians, amplitude a, 2 being the picture's side) -> offsets of a sprite's x, y,
# angle and, as fractions, width and height. Auxiliary and target classes share none.
TARGET_MOTIONS = {
    "figure_eight": lambda p, a: (a * sin(p), 0.8 * a * sin(2 * p), 0, 0, 0),
    "vertical_shake": lambda p, a: (0, a * sin(p), 0, 0, 0),
    "spin_and_pulse": lambda p, a: (0, 0, 3 * a * p, 1.4 * a * sin(p), 1.4 * a * sin(p)),
    "squash_and_stretch": lambda p, a: (0, 0, 0, 1.6 * a * sin(p), -1.6 * a * sin(p)),
    "antidiagonal_shake": lambda p, a: (0.8 * a * sin(p), -0.8 * a * sin(p), 0, 0, 0),
    "orbit_left": lambda p, a: (a * cos(p), -a * sin(p), 0, 0, 0),
    "jump": lambda p, a: (0, 0.8 * a * np.sign(sin(p + 1e-3)), 0, 0, 0),
    "swing_and_slide": lambda p, a: (a * sin(p), 0, 3 * a * sin(p), 0, 0),
}
AUXILIARY_MOTIONS = {
    "horizontal_shake": lambda p, a: (a * sin(p), 0, 0, 0, 0),
    "bounce": lambda p, a: (0, -1.6 * a * np.abs(sin(p / 2)), 0, 0, 0),
    "spin": lambda p, a: (0, 0, -3 * a * p, 0, 0),
    "pulse": lambda p, a: (0, 0, 0, 1.6 * a * sin(p), 1.6 * a * sin(p)),
    "orbit_right": lambda p, a: (a * cos(p), a * sin(p), 0, 0, 0),
    "diagonal_shake": lambda p, a: (0.8 * a * sin(p), 0.8 * a * sin(p), 0, 0, 0),
    "swing": lambda p, a: (0, 0, 4 * a * sin(p), 0, 0),
    "horizontal_squash": lambda p, a: (0, 0, 0, 1.8 * a * sin(p), 0),
}


def make_pose(n, offsets):
    """Return offsets of x, y, angle, width and height in n frames as an array (n, 5)."""
    return np.stack([np.broadcast_to(values, n) for values in offsets], 1).astype(np.float32)


def act(rng, pose, motion, spans, amplitude):
    """Add a motion to a pose over [(first frame, end, fraction of the amplitude), ...]."""
    period = rng.uniform(4, 7)
    for first, end, fraction in spans:
        phase = 2 * pi * np.arange(end - first) / period + rng.uniform(0, 2 * pi)
        offsets = motion(phase + SKEW * sin(phase), amplitude * fraction)
        pose[first:end] += make_pose(end - first, offsets)


def inside(shape, u, v):
    """Return the distance to the edge of a shape of radius 1, about: positive inside."""
    au = np.abs(u)
    av = np.abs(v)
    if shape == "square":
        return 0.85 - np.maximum(au, av)
    if shape == "cross":
        return np.minimum(1.0 - np.maximum(au, av), 0.38 - np.minimum(au, av))
    r = np.sqrt(u * u + v * v)
    if shape == "disc":
        return 0.95 - r
    if shape == "ring":
        return 0.3 - np.abs(r - 0.7)
    theta = np.arctan2(v, u)
    if shape == "star":
        return 0.72 + 0.26 * cos(5 * theta) - r
    return 0.55 - r * cos((theta + pi / 3) % (2 * pi / 3) - pi / 3)  # triangle


class Sprite:
    """A sprite of random look that always drifts, turns and breathes: moving is not acting."""

    def __init__(self, rng, hues, spread=0.5, shape=None):
        self.shape = shape or SHAPES[rng.integers(len(SHAPES))]
        hue = rng.uniform(*hues) % 1.0
        bright = colorsys.hsv_to_rgb(hue, rng.uniform(0.75, 1.0), rng.uniform(0.85, 1.0))
        dark = colorsys.hsv_to_rgb(hue, rng.uniform(0.4, 0.7), rng.uniform(0.35, 0.6))
        self.tones = np.array([bright, dark], np.float32)
        self.size = rng.uniform(0.30, 0.40)
        self.stripes = rng.uniform(3.0, 5.0)
        self.home = rng.uniform(-spread, spread, 2)
        self.drift_reach = rng.uniform(0.05, 0.15, 2)
        self.drift_speed = rng.uniform(0.03, 0.10, 2)
        self.drift_phase = rng.uniform(0, 2 * pi, 2)
        self.angle = rng.uniform(0, 2 * pi)
        self.turn_speed = rng.uniform(-0.06, 0.06)
        self.breath_reach = rng.uniform(0.03, 0.08)
        self.breath_speed = rng.uniform(0.1, 0.3)
        self.breath_phase = rng.uniform(0, 2 * pi)

    def idle(self, n):
        """Return its pose (n, 5) while it does nothing else."""
        t = np.arange(n)
        swing = sin(self.drift_speed[:, None] * t + self.drift_phase[:, None])
        x, y = self.home[:, None] + self.drift_reach[:, None] * swing
        breath = self.breath_reach * sin(self.breath_speed * t + self.breath_phase)
        return make_pose(n, (x, y, self.angle + self.turn_speed * t, breath, breath))

    def draw(self, frames, pose):
        """Paint it over frames (n, size, size, 3), in place, at pose (n, 5)."""
        grid = np.linspace(-1, 1, frames.shape[2], dtype=np.float32)
        for first in range(0, len(frames), 32):  # a few frames at a time stay in the cache
            x, y, angle, wider, higher = pose[first : first + 32].T[:, :, None, None]
            dx = grid - x
            dy = grid[:, None] - y
            u = (cos(angle) * dx + sin(angle) * dy) / (self.size * np.maximum(1 + wider, 0.3))
            v = (cos(angle) * dy - sin(angle) * dx) / (self.size * np.maximum(1 + higher, 0.3))
            alpha = np.clip(inside(self.shape, u, v) * (self.size * len(grid) / 2) + 0.5, 0, 1)
            striped = (sin(self.stripes * u) > 0)[..., None]
            view = frames[first : first + 32]
            view += alpha[..., None] * (np.where(striped, *self.tones) - view)


def draw_background(rng, n, size, hue=None):
    """Return slowly moving, low-contrast sinusoids of a random tint, or hue: (n, size, size, 3)."""
    x = np.linspace(-1, 1, size, dtype=np.float32)
    y = x[:, None]
    t = np.arange(n, dtype=np.float32)[:, None, None]
    grey = np.zeros((n, size, size), np.float32)
    for _ in range(2):
        fx, fy = rng.uniform(-6, 6, 2)
        phase = fx * x + fy * y + rng.uniform(-0.15, 0.15) * t + rng.uniform(0, 6)
        grey += 0.05 * sin(phase).astype(np.float32)
    tint = rng.uniform(0.35, 0.6, 3)
    if hue is not None:
        hue = (hue + rng.uniform(-0.04, 0.04)) % 1
        tint = colorsys.hsv_to_rgb(hue, rng.uniform(0.25, 0.4), rng.uniform(0.5, 0.62))
    return grey[..., None] + np.asarray(tint, np.float32)


def add_noise(rng, frames):
    """Add pixel noise; return (n, 3, H, W) uint8."""
    frames += 0.02 * rng.standard_normal(frames.shape, dtype=np.float32)
    pixels = (np.clip(frames, 0, 1) * 255 + 0.5).astype(np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def plan_segments(rng, snippets):
    """Return one to three segments, 3 snippets apart, as fractions of the video: (N, 2).

    Each lasts 10-42 % of it, 10-26 % if there are several.
    """
    count = rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15])
    while True:
        lengths = rng.uniform(0.10, 0.42 if count == 1 else 0.26, count)
        gaps = rng.dirichlet(np.ones(count + 1)) * (1 - lengths.sum())
        if (gaps[1:-1] >= 3 / snippets).all():
            starts = np.cumsum(gaps[:-1]) + np.concatenate([[0], np.cumsum(lengths[:-1])])
            return np.stack([starts, starts + lengths], 1)


def plan_action(rng, segments, n, toy):
    """Return [(first frame, end, fraction of the amplitude)] of the action and the near-action."""
    per_snippet = toy.frames_per_snippet
    spans = []
    taken = np.zeros(n, bool)
    for start, end in segments:
        before, after = rng.integers(1, 5, 2) * per_snippet
        spans += [(start, end, 1.0), (max(start - before, 0), start, toy.near)]
        spans += [(end, min(end + after, n), toy.near)]
        taken[max(start - 5 * per_snippet, 0) : end + 5 * per_snippet] = True
    for _ in range(rng.integers(1, 3)):  # near-action away from any segment
        length = rng.integers(2, 5) * per_snippet
        first = rng.integers(0, n - length)
        if not taken[first : first + length].any():
            spans.append((first, first + length, toy.near))

    # Near-action around two neighbouring segments may overlap: the stronger wins, once.
    fraction = np.zeros(n)
    for start, end, f in spans:
        fraction[start:end] = np.maximum(fraction[start:end], f)
    edges = np.flatnonzero(np.diff(np.concatenate([[-1], fraction, [-1]])))
    return [(start, end, fraction[start]) for start, end in pairwise(edges) if fraction[start]]


def render_video(rng, label, toy):
    """Return an untrimmed video, (n, 3, size, size) uint8, and its segments in frames, (N, 2)."""
    n = toy.snippets * toy.frames_per_snippet
    motion = TARGET_MOTIONS[label]
    segments = np.round(plan_segments(rng, toy.snippets) * n).astype(int)
    spans = plan_action(rng, segments, n, toy)
    main = Sprite(rng, MAIN_HUES)
    pose = main.idle(n)
    act(rng, pose, motion, spans, rng.uniform(*toy.amplitude))

    # The background may have the tint of its class, as a pool tells swimming, though not when.
    hue = list(TARGET_MOTIONS).index(label) / len(TARGET_MOTIONS)
    frames = draw_background(rng, n, toy.size, hue if rng.random() < toy.scene else None)
    for _ in range(toy.competitors):
        other = Sprite(rng, OTHER_HUES, spread=0.7)
        other_pose = other.idle(n)
        if rng.random() < 0.9:
            length = int(rng.uniform(*toy.busy) * n)
            first = rng.integers(0, n - length)
            spans = [(first, first + length, 1.0)]
            act(rng, other_pose, motion, spans, rng.uniform(*toy.amplitude))
        other.draw(frames, other_pose)
    main.draw(frames, pose)
    return add_noise(rng, frames), segments


def render_clip(rng, label, toy):
    """Return a trimmed clip, (n, 3, size, size) uint8: a sprite of any hue acts, another idles."""
    n = toy.clip_frames
    frames = draw_background(rng, n, toy.size)
    other = Sprite(rng, (0, 1), spread=0.7)
    actor = Sprite(rng, (0, 1))
    other.draw(frames, other.idle(n))
    pose = actor.idle(n)
    act(rng, pose, AUXILIARY_MOTIONS[label], [(0, n, 1.0)], rng.uniform(0.16, 0.34))
    actor.draw(frames, pose)
    return add_noise(rng, frames)


def render_still(rng, label, size):
    """Return a still image, (3, size, size) uint8: one of 6 shapes in one of 4 hues."""
    hue, shape = label.split("_")
    frames = draw_background(rng, 1, size)
    sprite = Sprite(rng, HUES[hue], shape=shape)
    sprite.draw(frames, sprite.idle(1))
    return add_noise(rng, frames)[0]


def write_zip(path, frames):
    """Write frames (F, 3, H, W) uint8 as a ZIP of a video, with their sizes: it reads faster."""
    jpegs = {number: encode_jpeg(frame) for number, frame in enumerate(frames)}
    info = {"fps": FPS, "num_frames": len(frames), "duration_sec": len(frames) / FPS}
    sizes = {"short_sides": [frames.shape[2]], "bytes": [[len(jpeg) for jpeg in jpegs.values()]]}
    write_frame_zip(path, {**info, "frames": list(jpegs), **sizes}, [jpegs])


def list_kinds(toy):
    """Return {kind: (number to train on, number to validate on, classes, which take turns)}."""
    return {
        "video": (toy.train, toy.val, list(TARGET_MOTIONS)),
        "clip": (toy.clips, toy.clips // 10, list(AUXILIARY_MOTIONS)),
        "still": (toy.stills, toy.stills // 10, [f"{h}_{s}" for s in SHAPES for h in HUES]),
    }


def write_item(item, folder, toy):
    """Write item (kind, number) by a random stream of its own; return a video's annotation."""
    kind, number = item
    num_train, _, classes = list_kinds(toy)[kind]
    label = classes[number % len(classes)]
    rng = np.random.default_rng([toy.seed, "vcs".index(kind[0]), number])
    if kind == "video":
        frames, segments = render_video(rng, label, toy)
        write_zip(f"{folder}/frames/toy_{number:05d}.zip", frames)
        actions = [{"segment": times, "label": label} for times in (segments / FPS).tolist()]
        subset = "training" if number < num_train else "validation"
        return {"subset": subset, "duration": len(frames) / FPS, "annotations": actions}
    folder = f"{folder}/{kind}s/{'train' if number < num_train else 'val'}/{label}"
    os.makedirs(folder, exist_ok=True)
    if kind == "clip":
        write_zip(f"{folder}/{number:05d}.zip", render_clip(rng, label, toy))
    else:
        with open(f"{folder}/{number:05d}.jpg", "wb") as file:
            file.write(encode_jpeg(render_still(rng, label, toy.size)))


def make_toy(out, toy, workers=None):
    """Write the data set to folder `out`, whole or not at all; False if the same one is there.

    Raises InputError if `out` holds something else, or if the sizes are too small.
    """
    least = min(toy.train, toy.val, toy.clips, toy.stills, toy.frames_per_snippet)
    if toy.snippets < 16 or toy.size < 16 or least < 1:
        raise InputError(f"{toy}: expected at least 16 snippets, 16 pixels and one of each kind")
    out = out.rstrip("/")
    settings = toy.settings()
    if os.path.exists(out):
        made = load_json(f"{out}/toy.json") if os.path.exists(f"{out}/toy.json") else {}
        different = {key: made.get(key) for key in settings if made.get(key) != settings[key]}
        if not different:
            return False
        problem = f"{out} already exists with {different if made else 'other content'}"
        raise InputError(f"{problem}:\nname another --out, or remove that folder yourself")
    part = f"{out}.part-{os.getpid()}"
    items = [(kind, i) for kind, (n, m, _) in list_kinds(toy).items() for i in range(n + m)]
    jobs = dict(zip(items, items, strict=True))
    write = partial(write_item, folder=part, toy=toy)
    workers = min(available_cores(), 16) if workers is None else workers
    made = {}
    try:
        os.makedirs(f"{part}/frames")
        for item, annotation, error in run_jobs(write, jobs, workers, f"toy data in {out}", "file"):
            if error:
                raise error
            made[item] = annotation
        database = {f"toy_{i:05d}": made["video", i] for i in range(toy.train + toy.val)}
        save_json({"version": "toy", "database": database}, f"{part}/annotations.json")
        save_json(settings, f"{part}/toy.json")
        os.rename(part, out)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return True


def main(argv=None):
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("tools.make_toy", formatter_class=formatter)
    parser.add_argument("--out", default="data/toy", help="folder to make")
    parser.add_argument("--workers", type=int, help="processes (all cores, up to 16)")
    for knob in fields(Toy):
        is_range = isinstance(knob.default, tuple)
        kind = {"type": float, "nargs": 2} if is_range else {"type": type(knob.default)}
        flag = f"--{knob.name.replace('_', '-')}"
        parser.add_argument(flag, default=knob.default, help=knob.metadata["help"], **kind)
    args = vars(parser.parse_args(argv))
    out, workers = args.pop("out"), args.pop("workers")
    with one_line_errors("tools.make_toy"):
        written = make_toy(out, Toy(**args), workers)
        print(f"{out}: {'written' if written else 'already exists'}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
