"""A toy data set of untrimmed videos, in exactly the layout of a real one.

    python toy.py --out data/toy --seed 0

    data/toy/annotations.json              ActivityNet JSON, subsets "training" and "validation"
    data/toy/frames/VIDEO.zip              JPEG frames 000000.jpg ... and video.json (see data.py)
    data/toy/clips/{train,val}/CLASS/*.zip trimmed clips of other actions: the auxiliary set of ACP
    data/toy/stills/{train,val}/CLASS/*.jpg still shapes: the image set of ICP
    data/toy/toy.json                      the arguments that made it

What happens in a video: sprites drift over a moving texture. One of them, the reddish *main* sprite, performs its
video's action during one to three segments. So that action is not just "something moves", it also makes the same motion
at 0.6 times the amplitude around and between segments, and two sprites of other hues make the same motion at full amplitude at
times of their own. Finding the segments therefore takes who acts, how strongly, from when to when: what a classifier of trimmed
clips is never taught. Every video has a random stream of its own: the same seed gives the same bytes, whatever the number of workers.
"""
import argparse
import colorsys
import json
import multiprocessing
import os
import shutil
import sys
import zipfile
from functools import partial

import numpy as np
import torch
from torchcodec.encoders import JpegEncoder
from tqdm import tqdm

import media

FPS = 8
VERSION = 2  # of the drawing: goes up when the same arguments give other pictures
SKEW = 0.7  # of a motion's phase: fast one way, slow the other, as most of what happens looks wrong played backwards; 0 would leave the arrow of time nothing to learn
SHAPES = ["disc", "square", "triangle", "star", "cross", "ring"]
REDS, OTHERS = (-0.08, 0.08), (0.28, 0.72)  # hue ranges of the main sprite and of its competitors
HUES = {"red": (-0.04, 0.04), "yellow": (0.13, 0.17), "green": (0.31, 0.37), "blue": (0.58, 0.66)}  # stills: shape x hue


def _pose(n, x=0.0, y=0.0, angle=0.0, sx=0.0, sy=0.0):
    """(n, 5) offsets added to a sprite's x, y, angle and, as fractions, to its width and height."""
    return np.stack([np.broadcast_to(v, n) for v in (x, y, angle, sx, sy)], 1).astype(np.float32)


# Motions: (phase (n,) in radians, amplitude a in [-1, 1] coordinates) -> (n, 5). Auxiliary and target classes share none.
TARGET_MOTIONS = {
    "figure_eight": lambda p, a: _pose(len(p), a * np.sin(p), 0.8 * a * np.sin(2 * p)),
    "vertical_shake": lambda p, a: _pose(len(p), y=a * np.sin(p)),
    "spin_and_pulse": lambda p, a: _pose(len(p), angle=3 * a * p, sx=1.4 * a * np.sin(p), sy=1.4 * a * np.sin(p)),
    "squash_and_stretch": lambda p, a: _pose(len(p), sx=1.6 * a * np.sin(p), sy=-1.6 * a * np.sin(p)),
    "antidiagonal_shake": lambda p, a: _pose(len(p), 0.8 * a * np.sin(p), -0.8 * a * np.sin(p)),
    "orbit_left": lambda p, a: _pose(len(p), a * np.cos(p), -a * np.sin(p)),
    "jump": lambda p, a: _pose(len(p), y=0.8 * a * np.sign(np.sin(p + 1e-3))),
    "swing_and_slide": lambda p, a: _pose(len(p), a * np.sin(p), angle=3 * a * np.sin(p)),
}
AUXILIARY_MOTIONS = {
    "horizontal_shake": lambda p, a: _pose(len(p), a * np.sin(p)),
    "bounce": lambda p, a: _pose(len(p), y=-1.6 * a * np.abs(np.sin(p / 2))),
    "spin": lambda p, a: _pose(len(p), angle=-3 * a * p),
    "pulse": lambda p, a: _pose(len(p), sx=1.6 * a * np.sin(p), sy=1.6 * a * np.sin(p)),
    "orbit_right": lambda p, a: _pose(len(p), a * np.cos(p), a * np.sin(p)),
    "diagonal_shake": lambda p, a: _pose(len(p), 0.8 * a * np.sin(p), 0.8 * a * np.sin(p)),
    "swing": lambda p, a: _pose(len(p), angle=4 * a * np.sin(p)),
    "horizontal_squash": lambda p, a: _pose(len(p), sx=1.8 * a * np.sin(p)),
}


def _inside(shape, u, v):
    """Signed distance (about: positive inside, 0 on the edge) to a shape of radius 1."""
    if shape == "square":
        return 0.85 - np.maximum(np.abs(u), np.abs(v))
    if shape == "cross":
        au, av = np.abs(u), np.abs(v)
        return np.minimum(1.0 - np.maximum(au, av), 0.38 - np.minimum(au, av))
    r = np.sqrt(u * u + v * v)
    if shape == "disc":
        return 0.95 - r
    if shape == "ring":
        return 0.3 - np.abs(r - 0.7)
    theta = np.arctan2(v, u)
    if shape == "star":
        return 0.72 + 0.26 * np.cos(5 * theta) - r
    return 0.55 - r * np.cos((theta + np.pi / 3) % (2 * np.pi / 3) - np.pi / 3)  # triangle


class Sprite:
    """Random look and idle motion: it always drifts, turns and breathes slowly, so that moving is not acting."""

    def __init__(self, rng, hues, spread=0.5, size=(0.30, 0.40), shape=None):
        self.shape = shape or SHAPES[rng.integers(len(SHAPES))]
        hue = rng.uniform(*hues) % 1.0
        self.tones = np.array([colorsys.hsv_to_rgb(hue, rng.uniform(0.75, 1.0), rng.uniform(0.85, 1.0)),
                               colorsys.hsv_to_rgb(hue, rng.uniform(0.4, 0.7), rng.uniform(0.35, 0.6))], np.float32)
        self.size = rng.uniform(*size)
        self.stripes = rng.uniform(3.0, 5.0)
        self.home = rng.uniform(-spread, spread, 2)
        self.drift = rng.uniform(0.05, 0.15, 2), rng.uniform(0.03, 0.10, 2), rng.uniform(0, 2 * np.pi, 2)
        self.turn = rng.uniform(0, 2 * np.pi), rng.uniform(-0.06, 0.06)
        self.breath = rng.uniform(0.03, 0.08), rng.uniform(0.1, 0.3), rng.uniform(0, 2 * np.pi)

    def idle(self, n):
        t = np.arange(n)
        reach, speed, phase = self.drift
        x, y = (self.home[i] + reach[i] * np.sin(speed[i] * t + phase[i]) for i in (0, 1))
        breath = self.breath[0] * np.sin(self.breath[1] * t + self.breath[2])
        return _pose(n, x, y, self.turn[0] + self.turn[1] * t, breath, breath)

    def draw(self, frames, pose):
        """Paints itself over frames (n, H, W, 3), in place, at pose (n, 5)."""
        h, w = frames.shape[1:3]
        gy, gx = np.meshgrid(np.linspace(-1, 1, h, dtype=np.float32), np.linspace(-1, 1, w, dtype=np.float32), indexing="ij")
        x, y, angle, sx, sy = (pose[:, i, None, None] for i in range(5))
        reach = 1.45 * self.size * (1 + np.abs(pose[:, 3:]).max())
        for k in range(0, len(frames), 32):  # a few frames at a time, and only the rows and columns that they touch: cache
            s = slice(k, k + 32)
            rows = (gy[:, 0] > y[s].min() - reach) & (gy[:, 0] < y[s].max() + reach)
            cols = (gx[0] > x[s].min() - reach) & (gx[0] < x[s].max() + reach)
            if not rows.any() or not cols.any():
                continue
            r, c = (slice(m.argmax(), len(m) - m[::-1].argmax()) for m in (rows, cols))
            dx, dy = gx[r, c] - x[s], gy[r, c] - y[s]
            cos, sin = np.cos(angle[s]), np.sin(angle[s])
            u = (cos * dx + sin * dy) / (self.size * np.maximum(1 + sx[s], 0.3))
            v = (cos * dy - sin * dx) / (self.size * np.maximum(1 + sy[s], 0.3))
            alpha = np.clip(_inside(self.shape, u, v) * (self.size * w / 2) + 0.5, 0, 1)[..., None]
            tone = (np.sin(self.stripes * u) > 0)[..., None]
            view = frames[s, r, c]
            view += alpha * (np.where(tone, self.tones[0], self.tones[1]) - view)


def _background(rng, n, size, hue=None):
    """Slowly moving, low-contrast sinusoids, (n, size, size, 3) in [0, 1], tinted at random or with a hue."""
    g = np.linspace(-1, 1, size, dtype=np.float32)
    gy, gx = np.meshgrid(g, g, indexing="ij")
    t = np.arange(n, dtype=np.float32)[:, None, None]
    grey = np.zeros((n, size, size), np.float32)
    for _ in range(2):
        fx, fy = rng.uniform(-6, 6, 2)
        grey += 0.05 * np.sin(fx * gx + fy * gy + rng.uniform(-0.15, 0.15) * t + rng.uniform(0, 6)).astype(np.float32)
    tint = rng.uniform(0.35, 0.6, 3)
    if hue is not None:
        tint = np.array(colorsys.hsv_to_rgb((hue + rng.uniform(-0.04, 0.04)) % 1, rng.uniform(0.25, 0.4), rng.uniform(0.5, 0.62)))
    return grey[..., None] + tint.astype(np.float32)


def _finish(rng, frames):
    """Pixel noise, then (n, 3, H, W) uint8."""
    frames += 0.02 * rng.standard_normal(frames.shape, dtype=np.float32)
    return torch.from_numpy((np.clip(frames, 0, 1) * 255 + 0.5).astype(np.uint8)).permute(0, 3, 1, 2)


def _act(rng, pose, motion, spans, amplitude):
    """Adds a motion over frame spans [(first, last + 1, fraction of the amplitude), ...], period 4-7 frames."""
    period = rng.uniform(4, 7)
    for first, end, fraction in spans:
        phase = 2 * np.pi * np.arange(end - first) / period + rng.uniform(0, 2 * np.pi)
        pose[first:end] += motion(phase + SKEW * np.sin(phase), amplitude * fraction)


def plan_segments(rng, snippets):
    """One to three segments of 10-42 % of the video each (26 % if several), 3 snippets apart: fractions of the video."""
    k = rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15])
    while True:
        lengths = rng.uniform(0.10, 0.42 if k == 1 else 0.26, k)
        gaps = rng.dirichlet(np.ones(k + 1)) * (1 - lengths.sum())
        if k == 1 or (gaps[1:-1] >= 3 / snippets).all():
            starts = np.cumsum(gaps[:-1]) + np.concatenate([[0], np.cumsum(lengths[:-1])])
            return np.stack([starts, starts + lengths], 1)


def render_video(rng, label, n, snippets, size, competitors=2, busy=(0.15, 0.5), near=0.6, scene=0.7,
                 amplitude=(0.25, 0.33)):
    """One untrimmed video: frames (n, 3, size, size) uint8 and its segments in frames, (N, 2) int.

    competitors: sprites of other hues, which act for a part `busy` of the video; near: amplitude of near-action, of the action's.
    scene: part of the videos whose background has the tint of their class, as a pool tells swimming, though not when.
    """
    motion, per_snippet = TARGET_MOTIONS[label], n // snippets
    segments = np.round(plan_segments(rng, snippets) * n).astype(int)
    taken = np.zeros(n, bool)
    spans = []
    for s, e in segments:
        before, after = rng.integers(1, 5, 2) * per_snippet
        spans += [(s, e, 1.0), (max(s - before, 0), s, near), (e, min(e + after, n), near)]
        taken[max(s - 5 * per_snippet, 0):e + 5 * per_snippet] = True
    for _ in range(rng.integers(1, 3)):  # near-action away from any segment
        length = rng.integers(2, 5) * per_snippet
        first = rng.integers(0, n - length)
        if not taken[first:first + length].any():
            spans.append((first, first + length, near))
    own = np.zeros(n)  # overlapping near-action spans of two neighbouring segments: the stronger wins, once
    for s, e, f in spans:
        own[s:e] = np.maximum(own[s:e], f)
    edges = np.flatnonzero(np.diff(np.concatenate([[-1], own, [-1]])))
    main = Sprite(rng, REDS)
    pose = main.idle(n)
    _act(rng, pose, motion, [(a, b, own[a]) for a, b in zip(edges[:-1], edges[1:]) if own[a]], rng.uniform(*amplitude))
    frames = _background(rng, n, size, list(TARGET_MOTIONS).index(label) / len(TARGET_MOTIONS) if rng.random() < scene else None)
    for _ in range(competitors):
        other = Sprite(rng, OTHERS, spread=0.7)
        other_pose = other.idle(n)
        if rng.random() < 0.9:
            length = int(rng.uniform(*busy) * n)
            first = rng.integers(0, n - length)
            _act(rng, other_pose, motion, [(first, first + length, 1.0)], rng.uniform(*amplitude))
        other.draw(frames, other_pose)
    main.draw(frames, pose)
    return _finish(rng, frames), segments


def render_clip(rng, label, n, size):
    """A trimmed auxiliary clip, (n, 3, size, size) uint8: one sprite of any hue acts, another idles."""
    frames = _background(rng, n, size)
    other, actor = Sprite(rng, (0, 1), spread=0.7), Sprite(rng, (0, 1))
    other.draw(frames, other.idle(n))
    pose = actor.idle(n)
    _act(rng, pose, AUXILIARY_MOTIONS[label], [(0, n, 1.0)], rng.uniform(0.16, 0.34))
    actor.draw(frames, pose)
    return _finish(rng, frames)


def render_still(rng, label, size):
    """A still image, (3, size, size) uint8: one of 6 shapes in one of 4 hues."""
    hue, shape = label.split("_")
    frames = _background(rng, 1, size)
    sprite = Sprite(rng, HUES[hue], shape=shape)
    sprite.draw(frames, sprite.idle(1))
    return _finish(rng, frames)[0]


def write_zip(path, frames, fps):
    """One video as an ordinary ZIP of JPEG frames, stored, with fixed time stamps: the same frames, the same bytes."""
    info = {"fps": fps, "num_frames": len(frames), "duration_sec": len(frames) / fps, "frames": list(range(len(frames)))}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as z:
        z.writestr(zipfile.ZipInfo("video.json"), json.dumps(info))
        for i, frame in enumerate(frames):
            z.writestr(zipfile.ZipInfo(f"{i:06d}.jpg"), JpegEncoder(frame).to_tensor(quality=92).numpy().tobytes())


def _make(job, folder, seed, size, snippets, frames_per_snippet, clip_frames, **knobs):
    """Writes one video, clip or still; returns its annotation if it is a video. Its random stream hangs on its kind and number only."""
    kind, number, subset, label = job
    rng = np.random.default_rng([seed, "vcs".index(kind[0]), number])
    if kind == "video":
        n, name = snippets * frames_per_snippet, f"toy_{number:05d}"
        frames, segments = render_video(rng, label, n, snippets, size, **knobs)
        write_zip(f"{folder}/frames/{name}.zip", frames, FPS)
        return name, {"subset": subset, "duration": n / FPS, "annotations": [
            {"segment": [int(s) / FPS, int(e) / FPS], "label": label} for s, e in segments]}
    path = f"{folder}/{kind}s/{subset}/{label}"
    os.makedirs(path, exist_ok=True)
    if kind == "clip":
        write_zip(f"{path}/{number:05d}.zip", render_clip(rng, label, clip_frames, size), FPS)
    else:
        JpegEncoder(render_still(rng, label, size)).to_file(f"{path}/{number:05d}.jpg", quality=92)


def make_toy(out, *, seed=0, train=240, val=160, clips=3000, stills=1500, size=46, snippets=32, frames_per_snippet=4,
             clip_frames=8, competitors=2, busy=(0.15, 0.5), near=0.6, scene=0.7,
             amplitude=(0.25, 0.33), workers=None):
    """Writes the data set to folder `out`, whole or not at all. Returns False if the same one is already there.

    Raises ValueError if `out` holds something else: nothing is ever written over. Also if the sizes are too small to hold what they describe.
    """
    arguments = dict(version=VERSION, seed=seed, train=train, val=val, clips=clips, stills=stills, size=size, snippets=snippets,
                     frames_per_snippet=frames_per_snippet, clip_frames=clip_frames, competitors=competitors, busy=list(busy), near=near,
                     scene=scene, amplitude=list(amplitude))
    if snippets < 16 or frames_per_snippet < 1 or size < 16 or min(train, val, clips, stills) < 1:
        raise ValueError(f"{arguments}: expected at least 16 snippets (three segments, 3 snippets apart, must fit), 16 pixels and one of each kind")
    out = out.rstrip("/")
    if os.path.exists(out):
        found = json.load(open(f"{out}/toy.json")) if os.path.exists(f"{out}/toy.json") else "no toy data set"
        if found == arguments:
            return False
        raise ValueError(f"{out} exists and holds {found}, not {arguments}: name another --out, or remove that folder yourself")
    part = f"{out}.part-{os.getpid()}"  # written aside, renamed when whole
    jobs = []
    for i in range(train + val):
        jobs.append(("video", i, "training" if i < train else "validation", list(TARGET_MOTIONS)[i % len(TARGET_MOTIONS)]))
    still_classes = [f"{hue}_{shape}" for shape in SHAPES for hue in HUES]
    for kind, number, classes in (("clip", clips, list(AUXILIARY_MOTIONS)), ("still", stills, still_classes)):
        jobs += [(kind, i, "val" if i >= number else "train", classes[i % len(classes)]) for i in range(number + number // 10)]
    try:
        os.makedirs(f"{part}/frames")
        make = partial(_make, folder=part, seed=seed, size=size, snippets=snippets, frames_per_snippet=frames_per_snippet,
                       clip_frames=clip_frames, competitors=competitors, busy=tuple(busy), near=near, scene=scene, amplitude=tuple(amplitude))
        with multiprocessing.get_context("spawn").Pool(workers or min(media.cores(), 16), torch.set_num_threads, (1,)) as pool:
            made = tqdm(pool.imap(make, jobs, chunksize=8), f"toy data in {out}", len(jobs), unit="file", smoothing=0, file=sys.stderr)
            database = dict(x for x in made if x)
        with open(f"{part}/annotations.json", "w") as f:
            json.dump({"version": "toy", "database": database}, f)
        with open(f"{part}/toy.json", "w") as f:
            json.dump(arguments, f)
        os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return True


def main():
    parser = argparse.ArgumentParser(description="Write the toy data set.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="data/toy", help="folder to make")
    for name, default in dict(seed=0, train=240, val=160, clips=3000, stills=1500, size=46, snippets=32, frames_per_snippet=4,
                              clip_frames=8, competitors=2).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--busy", type=float, nargs=2, default=(0.15, 0.5), help="part of the video in which a competitor acts")
    parser.add_argument("--near", type=float, default=0.6, help="amplitude of near-action, of the action's")
    parser.add_argument("--scene", type=float, default=0.7, help="part of the videos whose background tells the class")
    parser.add_argument("--amplitude", type=float, nargs=2, default=(0.25, 0.33), help="range of the actions' amplitude")
    parser.add_argument("--workers", type=int, default=None, help="processes (all cores)")
    args = vars(parser.parse_args())
    try:
        print(f"{args['out']}: " + ("written" if make_toy(args.pop("out"), **args) else "already there"))
    except (ValueError, OSError) as error:
        sys.exit(f"toy.py: {error}")
    except KeyboardInterrupt:
        sys.exit("toy.py: interrupted; the same command begins anew")


if __name__ == "__main__":
    main()
