import hashlib
import json
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkProcess
from pathlib import Path

import numpy as np
import pytest
from processes import Process

import data
import media
import pretrain
from media import InputError
from tools import jobs, make_toy
from tools.make_toy import AUXILIARY_MOTIONS, TARGET_MOTIONS, Toy

SMALL = {"train": 3, "val": 2, "clips": 8, "stills": 24, "size": 20, "snippets": 16}


def hashes(folder):
    """Return {file: hash of its bytes}."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "data"
    assert make_toy.make_toy(str(out), Toy(seed=1, **SMALL), workers=0)
    return out


def test_the_same_seed_gives_the_same_bytes_whatever_the_workers(small, tmp_path, monkeypatch):
    # Forks, as they have all imports; the spawned ones are interrupted below.
    monkeypatch.setattr(jobs, "SpawnProcess", ForkProcess)
    make_toy.make_toy(f"{tmp_path}/again", Toy(seed=1, **SMALL), workers=2)
    make_toy.make_toy(f"{tmp_path}/other", Toy(seed=2, **SMALL), workers=0)
    first = hashes(small)
    other = hashes(tmp_path / "other")
    assert first == hashes(tmp_path / "again")
    assert first.keys() == other.keys()
    assert all(first[file] != other[file] for file in first)


def test_it_has_the_layout_of_a_real_data_set(small):
    subsets = data.load_annotations(f"{small}/annotations.json")
    assert {name: len(videos) for name, videos in subsets.items()} == {
        "training": 3,
        "validation": 2,
    }
    for video in [*subsets["training"], *subsets["validation"]]:
        source = media.open_media(f"{small}/frames/{video.name}.zip")
        assert source.num_frames == 64
        assert source.duration == video.duration == 8.0
        assert source.read(np.array([0, 63])).shape == (2, 3, 20, 20)
        assert "archive" not in vars(source)  # found by its size, without the ZIP's directory
        segments, labels = video.actions
        lengths = segments.diff(dim=1)
        assert 1 <= len(lengths) <= 3
        assert (lengths > 0.08).all() and (lengths < 0.44).all()
        assert len(set(labels)) == 1
    clips, classes = pretrain.list_clips(f"{small}/clips/train")
    assert classes == sorted(AUXILIARY_MOTIONS)
    assert len(clips) == 8
    assert len(pretrain.list_clips(f"{small}/stills/train", (".jpg",))[1]) == 24
    assert not AUXILIARY_MOTIONS.keys() & TARGET_MOTIONS.keys()


def test_segments_are_planned_as_described():
    rng = np.random.default_rng(0)
    plans = [make_toy.plan_segments(rng, 32) for _ in range(2000)]
    counts = np.bincount([len(plan) for plan in plans], minlength=4) / 2000
    np.testing.assert_allclose(counts, [0, 0.5, 0.35, 0.15], atol=0.04)
    for plan in plans:
        lengths = plan[:, 1] - plan[:, 0]
        gaps = plan[1:, 0] - plan[:-1, 1]
        assert (plan >= 0).all() and (plan <= 1).all()
        assert (lengths >= 0.1).all() and (lengths <= (0.42 if len(plan) == 1 else 0.26)).all()
        assert (gaps >= 3 / 32).all()


def test_the_main_sprite_moves_in_segments_more_than_around_them():
    """Without competitors the frame differences must tell the segments."""
    inside = []
    outside = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        toy = Toy(competitors=0, size=24)
        frames, segments = make_toy.render_video(rng, "vertical_shake", toy)
        assert frames.shape == (128, 3, 24, 24)
        change = (frames[1:].float() - frames[:-1].float()).abs().mean((1, 2, 3)).numpy()
        acting = np.zeros(127, bool)
        for start, end in segments:
            acting[start : end - 1] = True
        inside.append(change[acting].mean())
        outside.append(change[~acting].mean())
    assert np.mean(inside) > 1.3 * np.mean(outside)
    assert all(i > o for i, o in zip(inside, outside, strict=True))


class Always:
    """A random stream that gives a period of 40 frames, from phase 0."""

    def uniform(self, low, high):
        return 40 if low else 0


@pytest.mark.parametrize("name", [*AUXILIARY_MOTIONS, *TARGET_MOTIONS])
def test_a_motion_looks_different_played_backwards(name):
    """Fast one way, slow the other; but for bouncing and jumping, the same either way."""
    motion = {**AUXILIARY_MOTIONS, **TARGET_MOTIONS}[name]
    pose = np.zeros((80, 5), np.float32)
    make_toy.act(Always(), pose, motion, [(0, 80, 1.0)], 0.3)
    step = np.abs(np.diff(pose[:41], axis=0)).sum(1)
    if name not in ("bounce", "jump"):
        assert step[:10].sum() + step[30:].sum() > 1.5 * step[10:30].sum()
    periods = np.diff(pose[:40], axis=0), np.diff(pose[40:], axis=0)
    np.testing.assert_allclose(*periods, atol=1e-5)


def test_near_action_of_neighbouring_segments_counts_once():
    toy = Toy(near=0.6, snippets=16, frames_per_snippet=4)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        spans = make_toy.plan_action(rng, [(10, 20), (24, 34)], 64, toy)
        covered = np.concatenate([np.arange(start, end) for start, end, _ in spans])
        assert len(set(covered.tolist())) == len(covered)  # no frame moves twice
        assert [(s, e) for s, e, fraction in spans if fraction == 1] == [(10, 20), (24, 34)]
        assert (20, 24, 0.6) in spans


def test_clips_do_not_depend_on_what_only_videos_have(tmp_path):
    toys = [Toy(), Toy(train=480, competitors=0, near=0.4, scene=0.0, amplitude=(0.2, 0.27))]
    for i, toy in enumerate(toys):
        make_toy.write_item(("clip", 5), f"{tmp_path}/{i}", toy)
    paths = sorted(tmp_path.rglob("00005.zip"))
    assert len(paths) == 2
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_nothing_is_overwritten(small, tmp_path):
    before = hashes(small)
    assert make_toy.make_toy(str(small), Toy(seed=1, **SMALL)) is False
    assert make_toy.make_toy(f"{small}/", Toy(seed=1, busy=[0.15, 0.5], **SMALL)) is False
    with pytest.raises(InputError, match=r"already exists with \{'seed': 1\}"):
        make_toy.make_toy(str(small), Toy(seed=2, **SMALL))
    with pytest.raises(InputError, match="at least 16 snippets"):
        make_toy.make_toy(f"{tmp_path}/small", Toy(snippets=8))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    with pytest.raises(SystemExit, match=r"tools\.make_toy: .*other content"):
        make_toy.main(["--out", str(mine)])
    assert (mine / "thesis.txt").read_text() == "precious"
    assert hashes(small) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        make_toy.make_toy(f"{tmp_path}/file/data", Toy(**SMALL), workers=0)


def test_options_are_the_fields_of_a_toy(tmp_path, capsys):
    options = [f"--{key}={value}" for key, value in SMALL.items()]
    argv = ["--out", f"{tmp_path}/data", "--workers=0", "--busy", "0.2", "0.4", *options]
    make_toy.main([*argv, "--frames-per-snippet=2", "--near=0.5"])
    assert "written" in capsys.readouterr().out
    made = json.loads((tmp_path / "data/toy.json").read_text())
    toy = Toy(busy=(0.2, 0.4), near=0.5, frames_per_snippet=2, **SMALL)
    assert made == toy.settings()
    assert list(made) == ["version", *Toy().settings()][1:]
    assert (made["version"], made["busy"], made["amplitude"]) == (2, [0.2, 0.4], [0.25, 0.33])
    make_toy.main([*argv, "--frames-per-snippet=2", "--near=0.5"])
    assert "already exists" in capsys.readouterr().out


@pytest.mark.beside
@pytest.mark.parametrize("number, workers", [(signal.SIGINT, 1), (signal.SIGTERM, 0)])
def test_an_interrupted_start_leaves_nothing(number, workers, tmp_path):
    options = ["--out", f"{tmp_path}/data", f"--workers={workers}"]
    command = ["-m", "tools.make_toy", *options]
    if workers:
        process = Process(*command)
    else:
        process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/frames/*.zip")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "interrupted" in stderr and "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []
