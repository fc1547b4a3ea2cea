"""Sliding windows over long videos, as on THUMOS14: data sets, merging, and a whole run."""
import json

import numpy as np
import pytest
import torch

import data
import evaluate
import lofi_tal
import toy
from localizer import propose


def test_windows_overlap_by_half_and_the_last_ends_with_the_video():
    assert data.window_starts(256, 256) == [0]
    assert data.window_starts(100, 256) == [0]
    assert data.window_starts(300, 256) == [0, 44]
    assert data.window_starts(600, 256) == [0, 128, 256, 344]
    covered = np.zeros(600, int)
    for first in data.window_starts(600, 256):
        covered[first:first + 256] += 1
    assert covered.min() == 1


def test_a_window_sees_the_segments_that_are_at_least_half_in_it():
    """20 snippets of 1 s, window of 8 from snippet 6 on: 6-14 s."""
    video = data.Video("v", 20.0, torch.tensor([[8.0, 10.0], [4.0, 8.0], [4.0, 7.9], [12.0, 17.0], [0.0, 2.0]]) / 20, tuple("abcde"))
    seen = data.in_window(video, 20, 6, 8)
    assert seen.labels == ("a", "b")
    torch.testing.assert_close(seen.segments, torch.tensor([[0.25, 0.5], [0.0, 0.25]]))


def features_of(folder, lengths, channels=3):
    folder.mkdir()
    for name, length in lengths.items():
        np.save(folder / f"{name}.npy", np.arange(length * channels, dtype=np.float32).reshape(length, channels))
    return str(folder)


def test_training_takes_windows_with_segments_and_detection_all_windows_of_a_video(tmp_path):
    videos = [data.Video("a", 20.0, torch.tensor([[0.0, 0.1]]), ("x",)), data.Video("b", 5.0, torch.zeros(0, 2), ())]
    features = data.FeatureDataset(videos, features_of(tmp_path / "f", {"a": 20, "b": 5}), ["x"])
    train, whole = (data.WindowDataset(features, 8, train=t) for t in (True, False))
    full = data.Fidelity("full", 8, 0)
    assert len(train) == 1 and train.items.tolist() == [[0, 0]]
    assert train[0, full]["features"].shape == (3, 8) and train[0, full]["target"].tolist() == [1.0]
    torch.testing.assert_close(train[0, full]["segments"], torch.tensor([[0.0, 0.25]]))
    sample = whole[0, full]
    assert sample["first"].tolist() == [0, 4, 8, 12] and sample["snippets"] == 20
    assert sample["features"][:, 0, 0].tolist() == [0.0, 12.0, 24.0, 36.0]  # channel 0 of the first snippet of each window
    short = whole[1, full]["features"]
    assert short.shape == (1, 3, 8) and short[0, 0].tolist() == [0.0, 3.0, 6.0, 9.0, 12.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="no window of 8 snippets has a segment"):
        data.WindowDataset(data.FeatureDataset(videos[1:], features_of(tmp_path / "g", {"b": 5}), ["x"]), 8, train=True)


def test_windows_over_sources_of_two_rates(tmp_path):
    """The second source has half the rate: it is brought to the first one's before windows are cut."""
    videos = [data.Video("a", 20.0, torch.tensor([[0.0, 1.0]]), ("x",))]
    fast, slow = features_of(tmp_path / "f", {"a": 20}, 1), features_of(tmp_path / "g", {"a": 10}, 1)
    whole = data.WindowDataset(data.FeatureDataset(videos, [fast, slow], ["x"]), 8)[0, None]
    assert whole["features"].shape == (4, 2, 8)
    assert whole["features"][3, 0].tolist() == list(range(12, 20))
    torch.testing.assert_close(whole["features"][2, 1], (torch.arange(8, 16) + 0.5) / 2 - 0.5)


class Recorded:
    """A model whose proposals and class logits are told by its input: channel 0 holds start, end and score of one proposal, channel 1 the logits."""

    def __call__(self, x):
        return x, x, x, x[:, 1, :2]

    def proposals(self, start, end, map):
        return start[:, None, 0, :2], start[:, 0, 2:3], torch.ones(len(start), 1, dtype=torch.bool)


def test_proposals_of_all_windows_become_those_of_the_video():
    """Windows of 4 snippets at 0, 2 and 4 of a video of 6: the last goes beyond its end."""
    x = torch.zeros(3, 2, 4)
    x[0, 0] = torch.tensor([0.5, 1.0, 0.9, 0])   # snippets 2-4
    x[1, 0] = torch.tensor([0.0, 0.5, 0.8, 0])   # the same, seen from 2
    x[2, 0] = torch.tensor([0.25, 1.0, 0.7, 0])  # 5-8, clipped to 6
    x[:, 1, :2] = torch.tensor([[0.0, 0.0], [100.0, 0.0], [100.0, 0.0]])
    segments, scores, valid, classes = propose(Recorded(), x, (torch.tensor([0, 2, 4]), 6), at_once=2)
    torch.testing.assert_close(segments, torch.tensor([[[2 / 6, 4 / 6], [2 / 6, 4 / 6], [5 / 6, 1.0]]]))
    assert scores.tolist() == [[pytest.approx(0.9), pytest.approx(0.8), pytest.approx(0.7)]] and valid.all()
    torch.testing.assert_close(classes, torch.tensor([[2.5 / 3, 0.5 / 3]]))
    x[2, 0, 0] = 0.5  # begins where the video ends
    assert propose(Recorded(), x, (torch.tensor([0, 2, 4]), 6))[2].tolist() == [[True, True, False]]


def test_a_long_video_whose_segments_straddle_windows_is_localized(tmp_path):
    """Videos of 80 to 140 s, a snippet a second, windows of 32: each action shows in one channel, and half of them lie across a window's border.
    Annotations as THUMOS14's: numbers as strings, no durations."""
    rng, database, durations = np.random.default_rng(0), {}, {}
    (tmp_path / "features").mkdir()
    for i in range(36):
        count = int(rng.integers(80, 141))
        x, segments, at = rng.normal(0, 0.2, (count, 6)), [], int(rng.integers(2, 8))
        while at < count - 14:
            length = int(rng.integers(4, 13))
            x[at:at + length, i % 2] += 1
            segments.append({"segment": [str(float(at)), str(float(at + length))], "label": "run" if i % 2 else "jump"})
            at += length + int(rng.integers(5, 12))
        np.save(tmp_path / f"features/v{i}.npy", x.astype(np.float32))
        database[f"v{i}"], durations[f"v{i}"] = {"subset": "train" if i < 28 else "test", "annotations": segments}, count
    (tmp_path / "gt.json").write_text(json.dumps({"database": database}))
    (tmp_path / "durations.json").write_text(json.dumps(durations))
    lofi_tal.main(["--cfg", "configs/thumos14.yaml", "--set", f"out={tmp_path}/run", f"data.annotations={tmp_path}/gt.json",
                   f"data.durations={tmp_path}/durations.json", f"data.features={tmp_path}/features", f"data.frames={tmp_path}/none", "data.snippets=32",
                   "data.workers=0", "device=cpu", "gtad.durations=16", "gtad.hidden=32", "gtad.gcn_width=32", "gtad.gcn_groups=4", "gtad.inner_bins=8",
                   "gtad.stem_groups=1", "gtad.context_bins=4", "gtad.map_hidden=[32,16]", "head.epochs=10", "head.lr=0.004", "head.schedule=cosine", "head.batch_size=8"])
    metrics = json.load(open(tmp_path / "run/metrics.json"))
    assert list(metrics["mAP"]) == ["0.3", "0.4", "0.5", "0.6", "0.7"] and metrics["evaluated_videos"] == 8
    assert metrics["mAP"]["0.5"] > 0.8
    # each segment that lies across the border of two windows is found, too
    found = json.load(open(tmp_path / "run/result.json"))["results"]
    straddling = hit = 0
    for name, about in database.items():
        if about["subset"] == "test":
            borders = [b for first in data.window_starts(durations[name], 32) for b in (first, first + 32)]
            for a in about["annotations"]:
                start, end = map(float, a["segment"])
                if any(start < b < end for b in borders):
                    straddling += 1
                    best = [p["segment"] for p in found[name][:40] if p["label"] == a["label"]]
                    hit += bool((evaluate.tiou(np.array([[start, end]]), np.array(best)) > 0.7).any())
    assert straddling > 15 and hit > 0.8 * straddling


def test_frames_at_a_fixed_rate_come_in_pieces_and_as_training_windows(tmp_path):
    """A video of 64 frames at 8 a second, 2 snippets a second: 16 snippets, a snippet the 4 frames around its centre."""
    frames = torch.arange(64, dtype=torch.uint8)[:, None, None, None].mul(4).expand(-1, 3, 16, 16).contiguous()
    toy.write_zip(tmp_path / "v.zip", frames, fps=8)
    videos = [data.Video("v", 8.0, torch.tensor([[0.5, 0.75]]), ("x",))]  # snippets 8 to 12
    options = dict(classes=["x"], snippets=6, frames=4, stride=1, crop=1.0, flip=False, rate=2)
    pieces = data.VideoDataset(videos, str(tmp_path), **options)
    assert len(pieces) == 3 and pieces.share(0, 2) == [0, 1, 2] and pieces.share(1, 2) == []
    samples = [pieces[i, data.Fidelity("full", 6, 16)] for i in range(3)]
    assert [s["last"] for s in samples] == [False, False, True]
    seen = torch.cat([s["frames"] for s in samples])  # (16, 4, 3, 16, 16)
    assert seen.shape[:2] == (16, 4)
    torch.testing.assert_close(seen.float().mean((2, 3, 4)) / 4, torch.arange(64.0).view(16, 4), atol=0.6, rtol=0)
    train = data.VideoDataset(videos, str(tmp_path), train=True, **options)
    assert train.items.tolist() == [[0, 6], [0, 9], [0, 10]]
    sample = train[0, data.Fidelity("T", 3, 16)]
    assert sample["frames"].shape == (3, 4, 3, 16, 16)
    torch.testing.assert_close(sample["segments"], torch.tensor([[2 / 6, 1.0]]))
    assert 24 <= sample["frames"].float().mean((1, 2, 3, 4))[0] / 4 < 32 + 0.6


def test_a_run_with_windows_over_its_own_features(tmp_path):
    toy.make_toy(str(tmp_path / "toy"), workers=1, train=4, val=4, clips=8, stills=8, size=20, snippets=16)
    lofi_tal.main(["--cfg", "configs/toy.yaml", "--set", f"out={tmp_path}/run", f"data.annotations={tmp_path}/toy/annotations.json",
                   f"data.frames={tmp_path}/toy/frames", "stages=[pretrain, lofi, features, head, detect]", "pretrain.method=none", "device=cpu", "data.size=20",
                   "data.windows=true", "data.rate=3", "data.snippets=8", "encoder.width=8", "gtad.hidden=16", "gtad.durations=6", "lofi.epochs=3", "lofi.batch_size=4",
                   "head.epochs=2", "head.batch_size=4"])
    (tmp_path / "run/features/features.json").unlink(), (tmp_path / "run/features/toy_00007.npy").unlink()  # killed in the second half: nothing of the first is missing
    words = json.load(open(tmp_path / "run/config.json"))
    process = lofi_tal.engine.start_process("cpu")
    lofi_tal.features(lofi_tal.config.merge(lofi_tal.config.load("configs/toy.yaml"), words), process)
    assert (tmp_path / "run/features/features.json").exists() and (tmp_path / "run/features/toy_00007.npy").exists()
    features = np.load(tmp_path / "run/features/toy_00000.npy")
    assert features.shape == (24, 64)  # 8 s
    metrics = json.load(open(tmp_path / "run/metrics.json"))
    assert metrics["evaluated_videos"] == 4 and metrics["predictions"] > 8
    with pytest.raises(SystemExit, match="data.windows is True and data.rate None"):
        lofi_tal.main(["--cfg", "configs/toy.yaml", "--set", "data.windows=true"])
