import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import data
import media
import toy

SMALL = dict(train=3, val=2, clips=8, stills=24, size=20, snippets=16)


def bytes_of(folder):
    return {os.path.relpath(os.path.join(d, f), folder): hashlib.sha256(open(os.path.join(d, f), "rb").read()).hexdigest()
            for d, _, files in os.walk(folder) for f in files}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("toy") / "data")
    assert toy.make_toy(out, seed=1, workers=1, **SMALL)
    return out


def test_the_same_seed_gives_the_same_bytes_whatever_the_workers(small, tmp_path):
    toy.make_toy(str(tmp_path / "again"), seed=1, workers=2, **SMALL)
    toy.make_toy(str(tmp_path / "other"), seed=2, workers=2, **SMALL)
    first, again, other = (bytes_of(x) for x in (small, tmp_path / "again", tmp_path / "other"))
    assert first == again
    assert first.keys() == other.keys() and all(first[k] != other[k] for k in first)


def test_it_has_the_layout_of_a_real_data_set(small):
    subsets = data.load_annotations(f"{small}/annotations.json")
    assert {k: len(v) for k, v in subsets.items()} == {"training": 3, "validation": 2}
    for video in [*subsets["training"], *subsets["validation"]]:
        source = media.FrameZip(f"{small}/frames/{video.name}.zip")
        assert source.num_frames == 64 and source.duration == video.duration == 8.0
        assert source.read(np.array([0, 63])).shape == (2, 3, 20, 20)
        lengths = video.segments.diff(dim=1)
        assert 1 <= len(lengths) <= 3 and (lengths > 0.08).all() and (lengths < 0.44).all() and len(set(video.labels)) == 1
    clips, classes = data.list_clips(f"{small}/clips/train", ".zip")
    assert classes == sorted(toy.AUXILIARY_MOTIONS) and len(clips) == 8
    assert len(data.list_clips(f"{small}/stills/train", ".jpg")[1]) == 24
    assert not set(toy.AUXILIARY_MOTIONS) & set(toy.TARGET_MOTIONS)


def test_segments_are_planned_as_described():
    rng = np.random.default_rng(0)
    plans = [toy.plan_segments(rng, 32) for _ in range(2000)]
    counts = np.bincount([len(p) for p in plans], minlength=4) / 2000
    np.testing.assert_allclose(counts, [0, 0.5, 0.35, 0.15], atol=0.04)
    for p in plans:
        lengths, gaps = p[:, 1] - p[:, 0], p[1:, 0] - p[:-1, 1]
        assert (p >= 0).all() and (p <= 1).all() and (lengths >= 0.1).all() and (lengths <= (0.42 if len(p) == 1 else 0.26)).all()
        assert (gaps >= 3 / 32).all()


def test_the_main_sprite_moves_in_segments_more_than_around_them():
    """Without competitors, noise and background motion the frame differences must tell the segments."""
    inside, outside = [], []
    for seed in range(6):
        frames, segments = toy.render_video(np.random.default_rng(seed), "vertical_shake", 128, 32, 24, competitors=0)
        change = (frames[1:].float() - frames[:-1].float()).abs().mean((1, 2, 3)).numpy()
        acting = np.zeros(127, bool)
        for s, e in segments:
            acting[s:e - 1] = True
        inside.append(change[acting].mean()), outside.append(change[~acting].mean())
    assert np.mean(inside) > 1.3 * np.mean(outside) and all(i > o for i, o in zip(inside, outside))


def test_a_motion_looks_different_played_backwards():
    """Fast one way, slow the other; but for bouncing and jumping, which are the same either way."""
    for name, motion in {**toy.AUXILIARY_MOTIONS, **toy.TARGET_MOTIONS}.items():
        class Always:  # a period of 40 frames, from phase 0
            def uniform(self, low, high):
                return 40 if low else 0
        pose = np.zeros((80, 5), np.float32)
        toy._act(Always(), pose, motion, [(0, 80, 1.0)], 0.3)
        cycle = pose[:41]
        step = np.abs(np.diff(cycle, axis=0)).sum(1)
        if name not in ("bounce", "jump"):
            assert step[:10].sum() + step[30:].sum() > 1.5 * step[10:30].sum(), name
        np.testing.assert_allclose(np.diff(pose[:40], axis=0), np.diff(pose[40:], axis=0), atol=1e-5)  # and the same in each period


def test_nothing_is_written_over(small, tmp_path):
    before = bytes_of(small)
    assert toy.make_toy(small, seed=1, **SMALL) is False  # the same one is there
    with pytest.raises(ValueError, match="exists and holds"):
        toy.make_toy(small, seed=2, **SMALL)
    with pytest.raises(ValueError, match="at least 16 snippets"):
        toy.make_toy(str(tmp_path / "small"), snippets=8)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    result = subprocess.run([sys.executable, "toy.py", "--out", str(tmp_path / "mine")], capture_output=True, text=True)
    assert result.returncode == 1 and "remove that folder yourself" in result.stderr and "Traceback" not in result.stderr
    assert (tmp_path / "mine/thesis.txt").read_text() == "precious" and bytes_of(small) == before
    assert json.load(open(f"{small}/toy.json"))["seed"] == 1
