"""Sliding windows over long videos, as on THUMOS14: data sets, merging, and whole runs."""

import math
import os

import numpy as np
import pytest
import torch
from test_data import make_video, write_annotations, write_zip

import config
import data
import evaluate
import lofi_tal
from checkpoint import load_json, save_json
from localizer import predict, propose
from tools.make_toy import Toy, make_toy


def test_windows_overlap_by_half_and_the_last_ends_with_the_video():
    assert data.window_starts(256, 256) == [0]
    assert data.window_starts(100, 256) == [0]
    assert data.window_starts(300, 256) == [0, 44]
    assert data.window_starts(600, 256) == [0, 128, 256, 344]
    covered = np.zeros(600, int)
    for first in data.window_starts(600, 256):
        covered[first : first + 256] += 1
    assert covered.min() == 1


def test_a_window_sees_the_segments_that_are_at_least_half_in_it():
    """20 snippets of 1 s, window of 8 from snippet 6 on: 6-14 s."""
    segments = torch.tensor([[8.0, 10.0], [4.0, 8.0], [4.0, 7.9], [12.0, 17.0], [0.0, 2.0]]) / 20
    seen, labels = data.clip_to_window(segments, tuple("abcde"), 20, 6, 8)
    assert labels == ("a", "b")
    torch.testing.assert_close(seen, torch.tensor([[0.25, 0.5], [0.0, 0.25]]))


def test_a_window_with_most_of_a_segment_is_trained_on_with_all_that_is_in_it(tmp_path):
    """20 snippets of 1 s in windows of 8, from 0, 4, 8 and 12 on."""
    segments = [(1.0, 3.0), (6.0, 10.0), (11.3, 14.0)]
    video = make_video("a", 20.0, segments, "xxx")
    source = write_features(tmp_path / "f", {"a": 20})

    def seen(*window_overlap):
        train = data.FeatureDataset([video], source, ["x"], 8, window_overlap)
        return {train.items[k][1]: train[k, None]["segments"].mul(8) for k in range(len(train))}

    def inside(first, least):
        clipped = [(max(a - first, 0.0), min(b - first, 8.0)) for a, b in segments]
        lengths = zip(clipped, segments, strict=True)
        return [c for c, (a, b) in lengths if c[1] > c[0] and c[1] - c[0] >= least * (b - a)]

    # From 12 on there are 2 of the last segment's 2.7 s.
    for shares, starts in (((0.5, 0.5), [0, 4, 8, 12]), ((0.9, 0.0), [0, 4, 8])):
        windows = seen(*shares)
        assert list(windows) == starts
        for first, found in windows.items():
            torch.testing.assert_close(found, torch.tensor(inside(first, shares[1])))
    assert [len(found) for found in windows.values()] == [2, 2, 2]
    with pytest.raises(data.InputError, match=r"holds 90% of a segment \(data\.window_overlap"):
        data.FeatureDataset([make_video("a", 20.0, [(0.0, 9.0)], "x")], source, ["x"], 8, (0.9, 0))


def write_features(folder, lengths, channels=3):
    folder.mkdir()
    for name, length in lengths.items():
        x = np.arange(length * channels, dtype=np.float32).reshape(length, channels)
        np.save(folder / f"{name}.npy", x)
    return str(folder)


def test_training_takes_windows_with_segments_and_detection_all_windows(tmp_path):
    videos = [make_video("a", 20.0, [(0.0, 2.0)], "x"), make_video("b", 5.0)]
    source = write_features(tmp_path / "f", {"a": 20, "b": 5})
    features = data.FeatureDataset(videos, source, ["x"])
    train = data.FeatureDataset(videos, source, ["x"], window=8)
    full = data.Fidelity("full", 8, 0)
    assert len(train) == 1 and train.items == [(0, 0)]
    window = train[0, full]
    assert window["features"].shape == (3, 8) and window["target"].tolist() == [1.0]
    torch.testing.assert_close(window["segments"], torch.tensor([[0.0, 0.25]]))
    assert window["labels"].tolist() == [0]
    windows, starts = data.cut_windows(features[0, data.NATIVE]["features"], 8)
    assert starts.tolist() == [0, 4, 8, 12]
    # channel 0 of the first snippet of each window
    assert windows[:, 0, 0].tolist() == [0.0, 12.0, 24.0, 36.0]
    short, _ = data.cut_windows(features[1, data.NATIVE]["features"], 8)
    assert short.shape == (1, 3, 8)
    assert short[0, 0].tolist() == [0.0, 3.0, 6.0, 9.0, 12.0, 0.0, 0.0, 0.0]
    with pytest.raises(data.InputError, match="no window of 8 snippets"):
        data.FeatureDataset(videos[1:], source, ["x"], window=8)


def test_windows_over_sources_of_two_rates(tmp_path):
    """The second source has half the rate: it is brought to the first one's before the cut."""
    videos = [make_video("a", 20.0, [(8.0, 16.0)], "x")]
    fast = write_features(tmp_path / "f", {"a": 20}, 1)
    slow = write_features(tmp_path / "g", {"a": 10}, 1)
    features = data.FeatureDataset(videos, [fast, slow], ["x"])
    windows, _ = data.cut_windows(features[0, data.NATIVE]["features"], 8)
    assert windows.shape == (4, 2, 8)
    assert windows[3, 0].tolist() == list(range(12, 20))
    torch.testing.assert_close(windows[2, 1], (torch.arange(8, 16) + 0.5) / 2 - 0.5)
    trained = data.FeatureDataset(videos, [fast, slow], ["x"], window=8)
    assert trained.items == [(0, 4), (0, 8), (0, 12)]
    assert torch.equal(trained[1, None]["features"], windows[2])


def test_frames_at_a_fixed_rate_come_in_pieces_and_as_training_windows(tmp_path):
    """64 frames at 8 a second, 2 snippets a second: 16 snippets, each of the 4 frames around."""
    levels = torch.arange(64, dtype=torch.uint8).mul(4)[:, None, None, None]
    path = write_zip(tmp_path / "v.zip", levels.expand(-1, 3, 16, 16).contiguous())
    videos = [make_video("v", 8.0, [(4.0, 6.0)], "x", path)]  # snippets 8 to 12
    options = {"classes": ["x"], "snippets": 6, "frames_per_snippet": 4, "stride": 1, "size": 16}
    options |= {"crop": 1.0, "flip": False, "rate": 2}
    pieces = data.VideoDataset(videos, **options)
    assert len(pieces) == 3 and pieces.owners == [0, 0, 0]
    samples = [pieces[i, pieces.full] for i in range(3)]
    assert [sample["last"] for sample in samples] == [False, False, True]
    seen = torch.cat([sample["frames"] for sample in samples])
    assert seen.shape == (16, 4, 3, 16, 16)
    means = seen.float().mean((2, 3, 4)) / 4
    torch.testing.assert_close(means, torch.arange(64.0).view(16, 4), atol=0.6, rtol=0)
    train = data.VideoDataset(videos, train=True, **options)
    assert train.items == [(0, 6), (0, 9), (0, 10)]
    sample = train[0, data.Fidelity("T", 3, 16)]
    assert sample["frames"].shape == (3, 4, 3, 16, 16)
    torch.testing.assert_close(sample["segments"], torch.tensor([[2 / 6, 1.0]]))
    assert 24 <= sample["frames"].float().mean((1, 2, 3, 4))[0] / 4 < 32 + 0.6


class Recorded:
    """A model that knows one proposal and the logits of each window, told by its first snippet."""

    per_segment = False

    def __init__(self, segments, scores, logits):
        self.rows = [torch.tensor(rows) for rows in (segments, scores, logits)]

    def proposals(self, x):
        windows = x[:, 0, 0].long() // 2
        segments, scores, logits = (rows[windows] for rows in self.rows)
        return segments[:, None], scores[:, None], torch.ones(len(x), 1).bool(), logits


def test_proposals_of_all_windows_become_those_of_the_video():
    """Windows of 4 snippets at 0, 2 and 4 of a video of 8: the first two see the same action."""
    logits = [[0.0, 0.0], [100.0, 0.0], [100.0, 0.0]]
    model = Recorded([[0.5, 1.0], [0.0, 0.5], [0.25, 0.75]], [0.9, 0.8, 0.7], logits)
    x = torch.arange(8.0)[None, None]
    segments, scores, valid, classes = propose(model, x, 4, at_once=2)
    torch.testing.assert_close(segments, torch.tensor([[[2, 4], [2, 4], [5, 7]]]) / 8)
    torch.testing.assert_close(scores, torch.tensor([[0.9, 0.8, 0.7]]))
    assert valid.all()
    torch.testing.assert_close(classes, torch.tensor([[2.5 / 3, 0.5 / 3]]))


def test_soft_nms_of_each_window_and_of_all():
    """One proposal a window, then two a window of which the second is decayed twice."""
    model = Recorded([[0.5, 1.0], [0.0, 0.5]], [0.9, 0.8], [[0.0], [0.0]])
    options = {"sigma": 0.5, "top_k": 3, "classes_per_video": 1, "window_nms": True}
    options = config.load_config("configs/default.yaml").detect | options
    model.classes, x = ["jump"], torch.arange(0.0, 6.0)[None, None]
    found, _ = predict(model, x, ["v"], [6.0], options, window=4)
    assert [pytest.approx(d["segment"]) for d in found["v"]] == [[2.0, 4.0], [2.0, 4.0]]
    assert [d["score"] for d in found["v"]] == pytest.approx([0.9, 0.8 * math.exp(-2)])

    class Twice(Recorded):
        def proposals(self, x):
            *found, logits = super().proposals(x)
            return *(torch.cat([part, part], 1) for part in found), logits

    twice = Twice([[0.5, 1.0], [0.0, 0.5]], [0.9, 0.8], [[0.0], [0.0]])
    twice.classes = ["jump"]
    factor = math.exp(-2)
    for window_nms, scores in (
        (False, [0.9, 0.9 * factor, 0.8 * factor**2]),
        (True, [0.9, 0.8 * factor, 0.9 * factor**3]),
    ):
        found, _ = predict(twice, x, ["v"], [6.0], options | {"window_nms": window_nms}, window=4)
        assert [d["score"] for d in found["v"]] == pytest.approx(scores)


@pytest.mark.parametrize(("start", "valid"), [(0.25, True), (0.75, False)])
def test_the_window_of_a_short_video_goes_beyond_its_end(start, valid):
    segments, _, found, _ = propose(
        Recorded([[start, 1.0]], [0.9], [[0.0]]), torch.zeros(1, 1, 3), 4
    )
    assert found.tolist() == [[valid]]
    torch.testing.assert_close(segments, torch.tensor([[[4 * start / 3, 1.0]]]))


def long_videos(folder):
    """Write features of 36 videos of 80 to 140 s, a snippet a second: an action shows in a channel.

    Annotations are as THUMOS14's: numbers as text, no durations. Returns (database, durations).
    """
    rng = np.random.default_rng(0)
    database, durations = {}, {}
    (folder / "features").mkdir()
    for i in range(36):
        count = int(rng.integers(80, 141))
        x = rng.normal(0, 0.2, (count, 6))
        segments = []
        at = int(rng.integers(2, 8))
        while at < count - 14:
            length = int(rng.integers(4, 13))
            x[at : at + length, i % 2] += 1
            segment = [str(float(at)), str(float(at + length))]
            segments.append({"segment": segment, "label": "run" if i % 2 else "jump"})
            at += length + int(rng.integers(5, 12))
        np.save(folder / f"features/v{i}.npy", x.astype(np.float32))
        database[f"v{i}"] = {"subset": "train" if i < 28 else "test", "annotations": segments}
        durations[f"v{i}"] = count
    return database, durations


@pytest.mark.beside
def test_a_long_video_whose_segments_straddle_windows_is_localized(tmp_path):
    """Windows of 32: half of the segments lie across a window's border."""
    database, durations = long_videos(tmp_path)
    annotations = write_annotations(tmp_path / "gt.json", database)
    save_json(durations, f"{tmp_path}/durations.json")
    overrides = [
        f"out={tmp_path}/run",
        f"data.annotations={annotations}",
        f"data.durations={tmp_path}/durations.json",
        f"data.features={tmp_path}/features",
        f"data.frames={tmp_path}/none",
        *("video.snippets=32", "data.workers=0", "device=cpu", "gtad.durations=16"),
        *("gtad.hidden=16", "gtad.gcn_width=16", "gtad.gcn_groups=4", "gtad.inner_bins=8"),
        *("gtad.stem_groups=1", "gtad.context_bins=4", "gtad.map_hidden=[16,16]"),
        *("head.epochs=6", "head.lr=0.004", "head.schedule=cosine", "head.batch_size=8"),
    ]
    lofi_tal.main(["--cfg", "configs/thumos14.yaml", "--set", *overrides])
    metrics = load_json(f"{tmp_path}/run/metrics.json")
    assert list(metrics["mAP"]) == ["0.3", "0.4", "0.5", "0.6", "0.7"]
    assert metrics["evaluated_videos"] == 8 and metrics["mAP"]["0.5"] > 0.8

    results = load_json(f"{tmp_path}/run/result.json")["results"]
    straddling = hits = 0
    for name, info in database.items():
        starts = data.window_starts(durations[name], 32)
        borders = [*starts, *(first + 32 for first in starts)]
        for annotation in info["annotations"] if info["subset"] == "test" else ():
            start, end = map(float, annotation["segment"])
            if not any(start < border < end for border in borders):
                continue
            straddling += 1
            same_label = [d for d in results[name][:40] if d["label"] == annotation["label"]]
            found = np.array([detection["segment"] for detection in same_label])
            hits += bool((evaluate.tiou(np.array([[start, end]]), found) > 0.7).any())
    assert straddling > 15 and hits > 0.8 * straddling


@pytest.mark.beside
def test_a_run_with_windows_over_its_own_features(tmp_path):
    toy = Toy(train=4, val=4, clips=8, stills=8, size=20, snippets=16)
    make_toy(f"{tmp_path}/toy", toy, workers=0)
    run = tmp_path / "run"
    overrides = [
        f"out={run}",
        f"data.annotations={tmp_path}/toy/annotations.json",
        f"data.frames={tmp_path}/toy/frames",
        "pretrain.method=none",
        "fidelities={S: [8, 10], T: [2, 20], ST: [4, 14]}",
        *("device=cpu", "video.size=20", "data.windows=true", "video.rate=3", "video.snippets=8"),
        *("encoder.width=8", "gtad.hidden=16", "gtad.durations=6", "lofi.epochs=3"),
        *("lofi.batch_size=4", "head.epochs=2", "head.batch_size=4"),
    ]
    command = ["--cfg", "configs/toy.yaml", "--set", *overrides]
    lofi_tal.main([*command, "stages=[pretrain, lofi, features]"])
    assert np.load(run / "features/toy_00000.npy").shape == (24, 64)  # 8 s
    # As if killed in the second half, when nothing of the first is missing.
    features = (run / "features/toy_00007.npy").read_bytes()
    os.remove(run / "features/features.json")
    os.remove(run / "features/toy_00007.npy")
    lofi_tal.main([*command, "stages=[pretrain, lofi, features, head, detect]"])
    assert (run / "features/features.json").exists()
    assert (run / "features/toy_00007.npy").read_bytes() == features
    metrics = load_json(run / "metrics.json")
    assert metrics["evaluated_videos"] == 4 and metrics["predictions"] > 8
    with pytest.raises(SystemExit, match=r"data\.windows"):
        lofi_tal.main(["--cfg", "configs/toy.yaml", "--set", "data.windows=true"])
