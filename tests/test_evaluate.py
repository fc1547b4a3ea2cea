import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate as ev

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
THUMOS_TIOU = [0.3, 0.4, 0.5, 0.6, 0.7]


# ------------------------------------------------------------------------------------------ plain references


def plain_tiou(a, b):
    """Official arithmetic: undefined for two zero-length segments."""
    inter = max(min(a[1], b[1]) - max(a[0], b[0]), 0.0)
    union = (b[1] - b[0]) + (a[1] - a[0]) - inter
    return inter / union if union else math.nan


def plain_map(gt, pred, thresholds):
    """AP (classes, thresholds) by loops. gt, pred: rows (video, label, segment[, score])."""
    table = []
    for label in dict.fromkeys(row[1] for row in gt):
        truth = [row for row in gt if row[1] == label]
        mine = [row for row in pred if row[1] == label]
        mine = [mine[i] for i in np.array([row[3] for row in mine]).argsort()[::-1]] if mine else []
        aps = []
        for threshold in thresholds:
            taken, hits = set(), []
            for video, _, segment, _ in mine:
                here = [g for g, row in enumerate(truth) if row[0] == video]
                overlap = np.array([plain_tiou(segment, truth[g][2]) for g in here])
                for k in overlap.argsort()[::-1] if here else []:
                    if overlap[k] < threshold:
                        hits.append(0)
                        break
                    if here[k] not in taken:
                        taken.add(here[k])
                        hits.append(1)
                        break
                else:
                    hits.append(0)
            precision, recall = [0.0], [0.0]
            for n in range(1, len(hits) + 1):
                precision.append(sum(hits[:n]) / n)
                recall.append(sum(hits[:n]) / len(truth))
            aps.append(
                sum((recall[i] - recall[i - 1]) * max(precision[i:]) for i in range(1, len(recall)))
            )
        table.append(aps)
    return np.array(table)


def plain_soft_nms(segments, scores, sigma, top_k):
    left, out = list(range(len(scores))), []
    scores = list(scores)
    while left and len(out) < top_k:
        best = max(left, key=lambda i: (scores[i], -i))
        left.remove(best)
        out.append((segments[best][0], segments[best][1], scores[best]))
        for i in left:
            overlap = plain_tiou(segments[best], segments[i])
            if overlap > 0:
                scores[i] *= math.exp(-(overlap**2) / sigma)
    return out


def plain_hard_nms(segments, scores, threshold, top_k):
    left, out = sorted(range(len(scores)), key=lambda i: (-scores[i], i)), []
    while left and len(out) < top_k:
        best = left.pop(0)
        out.append((segments[best][0], segments[best][1], scores[best]))
        left = [i for i in left if not plain_tiou(segments[best], segments[i]) > threshold]
    return out


def annotations(rows, durations=None, subset="validation"):
    """rows: (video, label, segment) -> ActivityNet JSON object."""
    videos = dict.fromkeys(row[0] for row in rows)
    database = {v: {"subset": subset, "duration": 10.0, "annotations": []} for v in videos}
    for video, label, segment in rows:
        database[video]["annotations"].append({"segment": list(segment), "label": label})
    for video, duration in (durations or {}).items():
        database[video]["duration"] = duration
    return {"database": database}


def result(rows, **external):
    """rows: (video, label, segment, score) -> result object."""
    results = {}
    for video, label, segment, score in rows:
        results.setdefault(video, []).append(
            {"label": label, "score": score, "segment": list(segment)}
        )
    return {"version": "1", "results": results, "external_data": external}


def mean_ap(gt, pred, thresholds=(0.5,), **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ev.evaluate(annotations(gt), result(pred), thresholds=list(thresholds), **options)


# ------------------------------------------------------------------------------------------------ tIoU and NMS


def test_tiou():
    a = np.array([[0.0, 2.0], [1.0, 1.0]])
    b = np.array([[1.0, 3.0], [0.0, 2.0], [1.0, 1.0], [5.0, 6.0]])
    expected = np.array([[1 / 3, 1, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(ev.tiou(a, b), expected, atol=1e-15)
    torch.testing.assert_close(ev.tiou(torch.tensor(a), torch.tensor(b)), torch.tensor(expected))
    assert ev.tiou(torch.zeros(0, 2), torch.zeros(3, 2)).shape == (0, 3)


def test_soft_nms_by_hand():
    segments = torch.tensor([[[0.0, 0.4], [0.0, 0.2], [0.5, 0.9]]], dtype=torch.float64)
    scores = torch.tensor([[0.9, 0.8, 0.3]], dtype=torch.float64)
    out, kept, valid = ev.soft_nms(segments, scores, sigma=0.84)
    # (0, 0.2) overlaps the first with tIoU 1/2: 0.8 exp(-0.25 / 0.84); the last candidate, untouched, is kept.
    torch.testing.assert_close(
        kept, torch.tensor([[0.9, 0.8 * math.exp(-0.25 / 0.84), 0.3]], dtype=torch.float64)
    )
    assert out.tolist() == segments.tolist() and valid.all() and out.shape == (1, 3, 2)


def random_proposals(seed, B, K, dtype=torch.float64):
    """Segments on a coarse grid with few distinct scores: duplicates, zero lengths and ties are frequent."""
    g = torch.Generator().manual_seed(seed)
    segments = (torch.randint(0, 12, (B, K, 2), generator=g).sort(-1).values / 12).to(dtype)
    scores = (torch.randint(0, 5, (B, K), generator=g) / 4).to(dtype)
    return segments, scores, torch.rand(B, K, generator=g) < 0.7


@pytest.mark.parametrize("seed", range(25))
def test_nms_equals_plain_loop(seed):
    B, K = 1 + seed % 4, (1, 2, 7, 30, 60)[seed % 5]
    top_k, sigma, threshold = (
        (100, 5, 20)[seed % 3],
        (0.84, 0.3, 1e-4)[seed % 3],
        (0.5, 0.0, 1.0)[seed % 3],
    )
    segments, scores, valid = random_proposals(seed, B, K)
    segments, scores = (
        segments.masked_fill(~valid[..., None], torch.nan),
        scores.masked_fill(~valid, torch.nan),
    )
    soft = ev.soft_nms(segments, scores, valid, sigma=sigma, top_k=top_k)
    hard = ev.hard_nms(segments, scores, valid, threshold=threshold, top_k=top_k)
    for b in range(B):
        one, s = segments[b, valid[b]].tolist(), scores[b, valid[b]].tolist()
        for (out, kept, ok), expected in (
            (soft, plain_soft_nms(one, s, sigma, top_k)),
            (hard, plain_hard_nms(one, s, threshold, top_k)),
        ):
            n = len(expected)
            assert ok[b].tolist() == [True] * n + [False] * (min(top_k, K) - n)
            got = torch.cat([out[b], kept[b, :, None]], 1)
            expected = torch.tensor(expected, dtype=torch.float64).reshape(n, 3)
            torch.testing.assert_close(got[:n], expected, rtol=1e-13, atol=0)
            assert not got[n:].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nms_on_cuda_equals_cpu():
    segments, scores, valid = random_proposals(3, 20, 3000)
    for nms in (ev.soft_nms, lambda *x: ev.hard_nms(*x, threshold=0.5)):
        for a, b in zip(
            nms(segments, scores, valid), nms(segments.cuda(), scores.cuda(), valid.cuda())
        ):
            assert b.is_cuda
            torch.testing.assert_close(a, b.cpu(), rtol=1e-12, atol=1e-300)


def test_nms_batch_equals_single_and_keeps_inputs():
    segments, scores, valid = random_proposals(0, 9, 9000, torch.float32)  # more than one block
    before = segments.clone(), scores.clone()
    together = ev.soft_nms(segments, scores, valid, top_k=7)
    assert (
        torch.equal(segments, before[0])
        and torch.equal(scores, before[1])
        and together[1].dtype == torch.float32
    )
    for b in range(9):
        for x, y in zip(
            together, ev.soft_nms(segments[b : b + 1], scores[b : b + 1], valid[b : b + 1], top_k=7)
        ):
            assert torch.equal(x[b : b + 1], y)
    empty = ev.soft_nms(torch.zeros(2, 0, 2), torch.zeros(2, 0))
    assert [x.shape for x in empty] == [(2, 0, 2), (2, 0), (2, 0)]
    assert ev.soft_nms(segments.bfloat16(), scores.bfloat16())[1].dtype == torch.float32
    with pytest.raises(ValueError, match=r"segments \(B, K, 2\)"):
        ev.soft_nms(segments, scores[:, 1:])


# ------------------------------------------------------------------------------------------- classes and result files


def test_fuse_classes_by_hand():
    segments = torch.tensor([[[0.0, 0.5], [0.25, 1.0]], [[0.1, 0.2], [0.0, 0.0]]])
    scores, valid = (
        torch.tensor([[0.5, 1.0], [0.4, 0.0]]),
        torch.tensor([[True, True], [True, False]]),
    )
    classes = np.array([[0.1, 0.5, 0.4], [0.0, 0.25, 0.0]])
    fused = ev.fuse_classes(
        segments, scores, valid, ["a", "b"], [8.0, 10.0], classes, ["x", "y", "z"], top_k=2
    )
    assert [(d["label"], d["score"], d["segment"]) for d in fused["a"]] == [  # highest score first
        ("y", 0.5, [2.0, 8.0]),
        ("z", 0.4, [2.0, 8.0]),
        ("y", 0.25, [0.0, 4.0]),
        ("z", 0.2, [0.0, 4.0]),
    ]
    assert [d["label"] for d in fused["b"]] == ["y"]  # the second-best class has score 0
    assert fused["b"][0]["segment"] == pytest.approx([1.0, 2.0]) and fused["b"][0][
        "score"
    ] == pytest.approx(0.1)
    best = ev.fuse_classes(segments, scores, None, "ab", [8, 10], classes, "xyz")
    assert [d["label"] for d in best["a"]] == ["y", "y"]
    assert ev.fuse_classes(segments, scores, valid, "ab", [8, 10], classes * 0, "xyz") == {
        "a": [],
        "b": [],
    }


def test_fuse_classes_bad_input():
    segments, scores, classes = torch.zeros(1, 2, 2), torch.zeros(1, 2), torch.ones(1, 3)
    with pytest.raises(ValueError, match=r"class_scores has shape \(1, 3\), expected \(1, 2\)"):
        ev.fuse_classes(segments, scores, None, ["a"], [1.0], classes, ["x", "y"])
    with pytest.raises(ValueError, match=r"videos has shape \(2,\), expected \(1,\)"):
        ev.fuse_classes(segments, scores, None, ["a", "b"], [1.0], classes, "xyz")
    with pytest.raises(ValueError, match="3 of 3 numbers in class_scores are NaN"):
        ev.fuse_classes(segments, scores, None, ["a"], [1.0], classes * math.nan, "xyz")
    with pytest.raises(ValueError, match="1 of 2 numbers in scores are NaN"):
        ev.fuse_classes(
            segments, torch.tensor([[0, torch.nan]]), None, ["a"], [1.0], classes, "xyz"
        )


def test_load_class_scores(tmp_path):
    cuhk = {"results": {"a": [0.1, 0.9], "b": ["0.2", 0.8]}, "class": ["x", "y"]}
    (tmp_path / "c.json").write_text(json.dumps(cuhk))
    scores, labels = ev.load_class_scores(tmp_path / "c.json", ["b", "v_a"])
    assert labels == ["x", "y"] and scores.tolist() == [[0.2, 0.8], [0.1, 0.9]]
    entries = {
        "v_b": [{"label": "y", "score": 0.7}, {"label": "x", "score": "0.2"}],
        "a": [{"label": "z", "score": 0.3}],
    }
    scores, labels = ev.load_class_scores(entries, ["a", "b"])
    assert labels == ["x", "y", "z"] and scores.tolist() == [[0, 0, 0.3], [0.2, 0.7, 0]]
    truth = annotations(
        [("a", "y", (0, 1)), ("a", "x", (1, 2)), ("a", "y", (2, 3)), ("b", "x", (0, 1))]
    )
    scores, labels = ev.load_class_scores(truth, ["a", "b"], ground_truth=True)
    assert labels == ["y", "x"] and scores.tolist() == [[1, 1], [0, 1]]
    with pytest.warns(UserWarning, match=r"no class scores for 2 videos \(c, d\) of 3"):
        assert ev.load_class_scores(cuhk, ["a", "c", "d"])[0].tolist() == [
            [0.1, 0.9],
            [0, 0],
            [0, 0],
        ]
    for bad, message in (
        (
            {"results": {"a": [0.1]}, "class": ["x", "y"]},
            "video 'a': class scores must be 2 numbers",
        ),
        ({"results": {"a": [0.1, math.nan]}, "class": ["x", "y"]}, "NaN"),
        ({"a": [{"label": "x"}]}, "video 'a', entry 0 has no score"),
    ):
        with pytest.raises(ValueError, match=message):
            ev.load_class_scores(bad, ["a"])


def test_save_results(tmp_path):
    path = tmp_path / "new" / "r.json"
    rows = result([("a", "x", (0, 1), 0.1 + 0.2)])["results"]
    ev.save_results(rows, path, class_source="external file C.json", seed=3)
    data = json.loads(path.read_text())
    assert data["results"] == rows and data["external_data"] == {
        "class_source": "external file C.json",
        "seed": 3,
    }
    assert (
        ev.evaluate(annotations([("a", "x", (0, 1))]), path)["class_source"]
        == "external file C.json"
    )
    with pytest.raises(ValueError):
        ev.save_results({"a": [{"score": math.nan}]}, path)
    assert json.loads(path.read_text()) == data and os.listdir(path.parent) == [
        "r.json"
    ]  # the old file, whole


# --------------------------------------------------------------------------------------------------- mAP by hand

ONE = [("a", "x", (0.0, 10.0))]


@pytest.mark.parametrize(
    "segment, expected",
    [((0.0, 10.0), [1, 1]), ((0.0, 5.0), [1, 0]), ((0.0, 4.9), [0, 0]), ((20.0, 30.0), [0, 0])],
)
def test_one_prediction(segment, expected):
    out = mean_ap(ONE, [("a", "x", segment, 0.3)], (0.5, 0.75))
    assert list(out["mAP"].values()) == expected and out["average_mAP"] == sum(expected) / 2


def test_precision_recall_area_by_hand():
    gt = [("a", "x", (0, 10)), ("b", "x", (0, 10)), ("c", "x", (0, 10)), ("c", "y", (0, 4))]
    pred = [
        ("a", "x", (0, 10), 0.9),
        ("a", "x", (0, 10), 0.8),
        ("b", "x", (0, 10), 0.7),
        ("c", "x", (8, 10), 0.6),
    ]
    # x: hit, duplicate, hit, miss: precision 1 at recall 1/3, 2/3 at 2/3: AP = 5/9; y: nothing found: 0.
    out = mean_ap(gt, pred)
    assert out["mAP"]["0.5"] == pytest.approx(5 / 18, abs=1e-15)
    assert out["AP"] == {"x": pytest.approx(5 / 9, abs=1e-15), "y": 0}


def test_precision_is_interpolated():
    gt = [("a", "x", (0, 1)), ("b", "x", (0, 1))]
    pred = [("a", "x", (5, 6), 0.9), ("a", "x", (0, 1), 0.8), ("b", "x", (0, 1), 0.7)]
    assert mean_ap(gt, pred)["mAP"]["0.5"] == pytest.approx(
        2 / 3, abs=1e-15
    )  # not 1/2 * 1/2 + 1/2 * 2/3


def test_a_taken_ground_truth_leaves_the_next_best():
    gt = [("a", "x", (0, 10)), ("a", "x", (0, 9))]
    pred = [("a", "x", (0, 10), 0.9), ("a", "x", (0, 10), 0.8), ("a", "x", (0, 10), 0.7)]
    out = mean_ap(gt, pred, (0.5, 0.95))
    assert out["mAP"]["0.5"] == 1 and out["mAP"]["0.95"] == 0.5


def test_zero_length():
    gt = [("a", "x", (3.0, 3.0)), ("b", "x", (0.0, 1.0))]
    both = [("a", "x", (3.0, 3.0), 0.9), ("b", "x", (0.0, 1.0), 0.8)]
    assert mean_ap(gt, both, (0.5, 0.95))["average_mAP"] == 1
    # The official quotient 0 / 0 is below no threshold: any zero-length prediction takes a zero-length ground truth.
    assert mean_ap(gt, [("a", "x", (7.0, 7.0), 0.9), both[1]])["average_mAP"] == 1
    assert mean_ap(gt, [("b", "x", (0.5, 0.5), 0.9)])["average_mAP"] == 0


def test_wrong_class_unknown_video_and_missing_video():
    gt = [("a", "x", (0, 1)), ("b", "y", (0, 1))]
    assert mean_ap(gt, [("a", "y", (0, 1), 0.9)])["average_mAP"] == 0
    out = mean_ap(gt, [("q", "x", (0, 1), 0.9), ("a", "x", (0, 1), 0.8)])
    assert out["mAP"]["0.5"] == 0.25
    assert (out["evaluated_videos"], out["ground_truth_videos"], out["unknown_videos"]) == (1, 2, 1)
    assert out["common"] == {
        "mAP": {"0.5": 1.0},
        "average_mAP": 1.0,
    }  # over video a and class x alone
    assert (out["segments"], out["classes"], out["predictions"]) == (2, 2, 2) and out[
        "class_source"
    ] == "unknown"


@pytest.mark.parametrize("results", [{}, {"a": []}])
def test_empty_result(results):
    out = ev.evaluate(annotations(ONE), {"results": results}, ar=True)
    assert (
        out["average_mAP"] == 0
        and out["common"]["average_mAP"] == 0
        and out["evaluated_videos"] == 0
    )
    assert out["AR"]["AUC"] == 0 and json.dumps(out, allow_nan=False)


def test_ties_fall_as_in_the_official_order():
    gt = [(f"v{i}", "x", (0, 1)) for i in range(40)]
    pred = [(f"v{i}", "x", (0, 1) if i % 3 else (5, 6), 0.5) for i in range(40)]
    expected = plain_map(gt, pred, [0.5]).mean()
    assert 0 < expected < 1 and mean_ap(gt, pred)["average_mAP"] == pytest.approx(
        expected, abs=1e-14
    )


# ------------------------------------------------------------------------------------ mAP against the plain loop


def random_case(seed):
    """Few videos, classes, grid points and scores: ties, duplicates, zero lengths, unknown videos, empty classes."""
    rng = np.random.default_rng(seed)
    videos, labels = [f"v{i}" for i in range(rng.integers(1, 5))], list("xyz")[: rng.integers(1, 4)]
    grid = rng.integers(2, 14)

    def segment():
        ends = rng.integers(0, grid, 2) if rng.random() < 0.8 else rng.random(2) * grid
        return tuple(np.sort(ends).tolist())

    gt = [
        (str(rng.choice(videos)), str(rng.choice(labels)), segment())
        for _ in range(rng.integers(1, 50))
    ]
    present = list(dict.fromkeys(row[1] for row in gt))
    score = [lambda: int(rng.integers(0, 3)), lambda: float(rng.integers(0, 4) / 4), rng.random][
        seed % 3
    ]
    pred = [
        (str(rng.choice(videos + ["unknown"])), str(rng.choice(present)), segment(), score())
        for _ in range(rng.integers(0, 90))
    ]
    return tuple(
        sorted(rows, key=lambda row: row[0]) for rows in (gt, pred)
    )  # video by video, as in a file


@pytest.mark.parametrize("seed", range(300))
def test_map_equals_plain_loop(seed):
    gt, pred = random_case(seed)
    thresholds = [np.linspace(0.5, 0.95, 10), np.array([0.1, 0.5, 1.0]), np.array(THUMOS_TIOU)][
        seed % 3
    ]
    out = mean_ap(gt, pred, thresholds)
    expected = plain_map(gt, pred, thresholds)
    np.testing.assert_allclose(list(out["mAP"].values()), expected.mean(0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(list(out["AP"].values()), expected.mean(1), rtol=0, atol=1e-12)
    known = {row[0] for row in pred} & {row[0] for row in gt}
    gt, pred = [r for r in gt if r[0] in known], [r for r in pred if r[0] in known]
    if gt:
        expected = plain_map(gt, pred, thresholds).mean()
        np.testing.assert_allclose(out["common"]["average_mAP"], expected, rtol=0, atol=1e-12)


def real(name, subset):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is absent")
    data = json.loads(path.read_text())
    rows = [
        (v, a["label"], tuple(map(float, a["segment"])))
        for v, info in data["database"].items()
        if info["subset"] == subset
        for a in info["annotations"]
    ]
    return path, rows


REAL = [
    ("anet13_annotations.json", "validation", np.linspace(0.5, 0.95, 10), 4728, 7293, 200),
    ("thumos14_annotations.json", "test", np.array(THUMOS_TIOU), 210, 3311, 20),
]


@pytest.mark.parametrize("name, subset, thresholds, videos, segments, classes", REAL)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_perfect_result_on_real_annotations(name, subset, thresholds, videos, segments, classes):
    path, rows = real(name, subset)
    perfect = result([(*row, 1.0) for row in rows])
    out = ev.evaluate(path, perfect, subset=subset, thresholds=thresholds)
    assert (
        set(out["mAP"].values()) == {1.0}
        and out["average_mAP"] == out["common"]["average_mAP"] == 1
    )
    assert out["evaluated_videos"] == out["ground_truth_videos"] == videos
    assert (out["segments"], out["classes"]) == (segments, classes)
    assert out["errors"]["all"]["true_positive"] == segments == sum(out["errors"]["all"].values())


@pytest.mark.parametrize("name, subset, thresholds, videos, segments, classes", REAL)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_map_equals_plain_loop_on_real_annotations(
    name, subset, thresholds, videos, segments, classes
):
    path, rows = real(name, subset)
    rng = np.random.default_rng(0)
    keep = set(rng.choice(classes, min(classes, 40), replace=False).tolist())
    labels = [c for i, c in enumerate(dict.fromkeys(row[1] for row in rows)) if i in keep]
    truth = [row for row in rows if row[1] in labels][:1500]
    pred = []
    for video, label, (start, end) in truth:
        for _ in range(3):
            s, e = np.array([start, end]) + (end - start) * rng.normal(0, 0.15, 2) * (
                rng.random() < 0.7
            )
            label = label if rng.random() < 0.85 else str(rng.choice(labels))
            pred.append((video, label, (float(s), float(max(s, e))), round(float(rng.random()), 2)))
    data = json.loads(path.read_text())
    for info in data["database"].values():
        info["annotations"] = []
    for video, label, segment in truth:
        data["database"][video]["annotations"].append({"segment": segment, "label": label})
    out = ev.evaluate(data, result(pred), subset=subset, thresholds=thresholds)
    expected = plain_map(truth, pred, thresholds)
    assert 0.1 < expected.mean() < 0.9
    np.testing.assert_allclose(list(out["mAP"].values()), expected.mean(0), rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- AR@AN


def plain_average_recall(gt, pred, thresholds):
    """ActivityNet's proposal evaluation, by loops: AN is an average, every video keeps the same fraction."""
    videos = sorted({row[0] for row in gt})
    mine, kept = {}, {}
    for v in videos:
        mine[v] = [row for row in pred if row[0] == v]
        order = np.array([row[3] for row in mine[v]]).argsort()[::-1] if mine[v] else []
        mine[v] = [mine[v][i] for i in order]
        kept[v] = min(int(len(mine[v]) * (100 * len(videos) / len(pred))), len(mine[v]))
    total, recall = sum(kept.values()), np.zeros(100)
    for an in range(1, 101):
        for threshold in thresholds:
            found = 0
            for video, _, segment in gt:
                n = min(
                    int(kept[video] * (an / 100 * (100 * float(len(videos)) / total))), kept[video]
                )
                found += any(plain_tiou(row[2], segment) >= threshold for row in mine[video][:n])
            recall[an - 1] += found / len(gt) / len(thresholds)
    return recall


def test_average_recall_by_hand():
    gt = [("a", "x", (0, 10)), ("b", "x", (0, 10))]
    pred = [
        ("a", "x", (0, 10), 0.9),
        ("a", "x", (0, 6), 0.1),
        ("b", "x", (5, 6), 0.9),
        ("b", "x", (0, 7), 0.5),
    ]
    ar = mean_ap(gt, pred, ar=True)["AR"]
    # AN = 1: a is found at all ten thresholds; AN = 2: b too, with tIoU 0.7 (0.5, 0.55, 0.6, 0.65, 0.7).
    assert ar["AR@1"] == 0.5 and ar["AR@5"] == ar["AR@100"] == 0.75
    assert ar["AUC"] == pytest.approx((0.625 + 98 * 0.75) / 100, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_average_recall_equals_plain_loop(seed):
    gt, _ = random_case(seed)
    rng = np.random.default_rng(seed)
    videos = sorted({row[0] for row in gt})
    pred = sorted(
        [
            (
                str(rng.choice(videos)),
                "x",
                tuple(np.sort(rng.random(2) * 14).tolist()),
                round(float(rng.random()), 1 + seed % 3),
            )
            for _ in range(rng.integers(20, 120 * len(videos)))
        ],
        key=lambda r: r[0],
    )
    # A proposal file has no labels: only AR@AN is computed.
    proposals = {
        v: [{k: e[k] for k in ("score", "segment")} for e in entries]
        for v, entries in result(pred)["results"].items()
    }
    out = ev.evaluate(annotations(gt), {"results": proposals}, ar=True)
    assert "mAP" not in out and out["class_source"] == "none (class-agnostic proposals)"
    expected = plain_average_recall(gt, pred, np.linspace(0.5, 0.95, 10))
    np.testing.assert_allclose(out["AR"]["recall"], expected, rtol=0, atol=1e-12)
    assert out["AR"]["AUC"] == pytest.approx(
        ((expected[1:] + expected[:-1]) / 2).sum() / 100, abs=1e-12
    )


def test_average_recall_of_a_detection_file_warns_of_repeated_segments():
    pred = [("a", "x", (0, 10), 0.9), ("a", "y", (0, 10), 0.1), ("a", "x", (1, 2), 0.1)]
    with pytest.warns(UserWarning, match="1 of 3 predictions repeat a segment"):
        ev.evaluate(annotations([("a", "x", (0, 10)), ("a", "y", (0, 5))]), result(pred), ar=True)


# ------------------------------------------------------------------------------------------------- error analysis


def test_errors_by_hand():
    gt = [("a", "x", (0, 10)), ("a", "y", (20, 30))]
    pred = [
        ("a", "x", (0, 9), 0.9),
        ("a", "x", (0, 9), 0.8),
        ("a", "y", (0, 10), 0.7),
        ("a", "x", (0, 3), 0.6),
        ("a", "y", (8, 16), 0.5),
        ("a", "x", (50, 60), 0.4),
        ("unknown", "y", (0, 10), 0.3),
    ]
    # Hit; second detection of x; label y on x; tIoU 0.3 with x; label y, tIoU 2/16 with x; nothing there, twice.
    errors = mean_ap(gt, pred, (0.3, 0.5, 0.95))["errors"]
    assert errors["tiou"] == 0.5 and errors["all"] == errors["top_10G"] == {
        "true_positive": 1,
        "double_detection": 1,
        "wrong_label": 1,
        "localization": 1,
        "confusion": 1,
        "background": 2,
    }
    many = [("a", "x", (50, 60), 0.1)] * 20
    errors = mean_ap(gt, pred + many)["errors"]
    assert (
        errors["all"]["background"] == 22 and sum(errors["top_10G"].values()) == 10 + 3
    )  # 10 times one x; all y


def test_errors_are_named_after_the_best_overlap():
    gt = [("a", "x", (0, 10)), ("a", "y", (0, 8)), ("a", "z", (0, 10))]
    pred = [
        ("a", "x", (0, 10), 0.9),
        ("a", "x", (0, 8), 0.8),
        ("a", "x", (0, 7.9), 0.75),
        ("a", "x", (0, 9.5), 0.7),
    ]
    # Hit; twice a higher tIoU with y than with x: wrong label; 0.95 with both x and z: double detection.
    errors = mean_ap(gt, pred)["errors"]["all"]
    assert (errors["true_positive"], errors["wrong_label"], errors["double_detection"]) == (1, 2, 1)


def test_map_by_length_by_hand():
    gt = [("a", "x", (0, 10)), ("a", "x", (20, 90)), ("b", "x", (0, 20)), ("b", "y", (0, 100))]
    pred = [
        ("a", "x", (95, 99), 0.95),
        ("a", "x", (0, 10), 0.9),
        ("a", "x", (20, 80), 0.8),
        ("b", "x", (0, 20), 0.6),
        ("b", "x", (0, 100), 0.5),
    ]
    truth = annotations(gt, {"a": 100.0, "b": 100.0})
    rows = ev.evaluate(truth, result(pred), thresholds=[0.5])["by_length"]
    assert [(r["from"], r["to"], r["segments"], r["classes"]) for r in rows] == [
        (0, 0.2, 2, 1),
        (0.2, 0.4, 0, 0),
        (0.4, 0.6, 0, 0),
        (0.6, 0.8, 1, 1),
        (0.8, 1, 1, 1),
    ]
    # Up to 0.2: false positive of length 0.04, hit, (the hit of the long segment is ignored), hit: precision 2/3. From
    # 0.6 to 0.8: a hit; the false positives have other lengths.
    assert [r.get("average_mAP") for r in rows] == [pytest.approx(2 / 3), None, None, 1.0, 0.0]


# ------------------------------------------------------------------------------------------------------ bad input


def entry(**changes):
    return {"label": "x", "score": 0.5, "segment": [0.0, 1.0]} | changes


@pytest.mark.parametrize(
    "results, message",
    [
        (
            {"a": [entry(), entry(score=math.nan)]},
            "1 of 2 entries have a NaN or infinite score, first: .* 'a', entry 1",
        ),
        ({"a": [entry(score=math.inf)]}, "NaN or infinite score"),
        ({"a": [entry(score=None)]}, "score"),
        ({"a": [entry(segment=[0, math.nan])]}, "NaN or infinite segment"),
        (
            {"b": [], "a": [entry(), {"label": "x", "segment": [0, 1]}]},
            r"video 'a', entry 1 has no score",
        ),
        ({"a": [entry(), {"score": 1, "segment": [0, 1]}]}, "entry 1 has no label"),
        ({"a": [entry(score="high")]}, r"video 'a', entry 0: score must be a number, got 'high'"),
        ({"a": [entry(segment=[0, 1, 2])]}, r"segment must be 2 numbers, got '\[0, 1, 2\]'"),
        ({"a": [entry(), entry(segment=3)]}, "entry 1: segment must be 2 numbers"),
        ({"a": [entry(label=["x"])]}, "label must be a string"),
        ({"a": [entry(label=None)]}, "label must be a string, got None"),
        ({"a": entry()}, "video 'a' must have a list, got dict"),
        ({"a": 3}, "video 'a' must have a list, got int"),
        ([entry()], "got list"),
    ],
)
@pytest.mark.parametrize("ar", [False, True])
def test_bad_results(results, message, ar):
    with pytest.raises(ValueError, match=message):
        ev.evaluate(annotations(ONE), {"results": results}, ar=ar)


def test_labels_that_are_numbers_are_the_same_as_words():
    """Class indices in the annotations, as some data sets have them; the detections' JSON has words."""
    truth = {
        "database": {
            "a": {
                "subset": "validation",
                "duration": 10,
                "annotations": [{"segment": [1, 4], "label": 3}, {"segment": [6, 9], "label": "7"}],
            }
        }
    }
    found = {
        "results": {
            "a": [
                {"segment": [1, 4], "score": 0.9, "label": "3"},
                {"segment": [6, 9], "score": 0.8, "label": 7},
            ]
        }
    }
    metrics = ev.evaluate(truth, found, subset="validation")
    assert metrics["average_mAP"] == 1 and not metrics["warnings"]


@pytest.mark.parametrize(
    "truth, message",
    [
        ({"results": {}}, 'no "database" object'),
        ({"database": {"a": {"annotations": []}}}, "video 'a' has no \"subset\""),
        (
            {"database": {"a": {"subset": ["validation"], "annotations": []}}},
            "video 'a' has no \"subset\"",
        ),
        ({"database": {"a": {"subset": "validation"}}}, "video 'a' has no \"annotations\""),
        (
            annotations(ONE, subset="test"),
            r"no video of subset 'validation'; there are 'test' \(1 videos\)",
        ),
        ({"database": {"a": {"subset": "validation", "annotations": []}}}, "no annotation"),
        (annotations([("a", "x", (0, math.nan))]), "ground truth: video 'a', entry 0"),
        (
            {"database": {"a": {"subset": "validation", "annotations": [{"label": "x"}]}}},
            "entry 0 has no segment",
        ),
        (annotations(ONE, {"a": "long"}), "video 'a': duration must be a number, got 'long'"),
    ],
)
def test_bad_ground_truth(truth, message):
    with pytest.raises(ValueError, match=message):
        ev.evaluate(truth, {"results": {}})


def test_bad_options():
    for thresholds in ([], [0.0], [1.5], [math.nan], 0.5):
        with pytest.raises(ValueError, match="thresholds must be"):
            ev.evaluate(annotations(ONE), {"results": {}}, thresholds=thresholds)
    with pytest.raises(ValueError, match='no "results"'):
        ev.evaluate(annotations(ONE), {"a": []})


@pytest.mark.parametrize(
    "gt, pred, note, score",
    [
        (
            ONE,
            [("a", "jump", (0, 1), 0.9), ("a", "x", (0, 10), 0.8)],
            r"1 of 2 predictions have 1 label \(jump\) that",
            1,
        ),
        (
            ONE,
            [("q", "x", (0, 10), 0.9), ("a", "x", (0, 10), 0.8)],
            r"1 predictions are for 1 video \(q\)",
            0.5,
        ),
        (
            ONE,
            [("a", "x", (10, 0), 0.9), ("a", "x", (0, 10), 0.8)],
            "1 of 2 segments end before.*video 'a', entry 0",
            0.5,
        ),
        (
            ONE + [("a", "x", (9, 1))],
            [("a", "x", (0, 10), 0.8), ("a", "x", (1, 9), 0.7)],
            "1 of 2 segments end",
            0.5,
        ),
    ],
)
def test_one_counted_warning_and_scoring_goes_on(gt, pred, note, score):
    with pytest.warns(UserWarning, match=note) as caught:
        out = ev.evaluate(annotations(gt), result(pred), thresholds=[0.5])
    assert len(caught) == len(out["warnings"]) == 1 and out["average_mAP"] == score


def test_strings_and_missing_durations_are_accepted():
    truth = annotations([("a", "x", ("0.5", "2.5")), ("b", "x", ("1", "2"))], {"a": None, "b": "0"})
    with pytest.warns(UserWarning, match=r"2 of 2 videos have no \(positive\) duration"):
        out = ev.evaluate(truth, {"results": {"a": [entry(score="0.25", segment=["0.5", 2.5])]}})
    assert out["average_mAP"] == 0.5 and "by_length" not in out


# ------------------------------------------------------------------------------------------------------- programs


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return str(path)


def test_program(tmp_path, capsys):
    gt = write(tmp_path / "gt.json", annotations([(v, "x", (0, 10)) for v in "abc"]))
    rows = [("a", "x", (0, 10), 1), ("b", "x", (0, 8), 0.5)]
    pred = write(tmp_path / "pred.json", result(rows, class_source="file C"))
    out, image = tmp_path / "out" / "m.json", tmp_path / "m.png"
    ev.main(["--gt", gt, "--pred", pred, "--tiou", "0.5:0.9:0.1", "--ar", "--json", str(out)])
    text, metrics = capsys.readouterr().out, json.loads(out.read_text())
    assert metrics == ev.evaluate(
        gt, pred, thresholds=np.linspace(0.5, 0.9, 5), ar=True
    )  # full precision
    assert metrics["mAP"] == {"0.5": 2 / 3, "0.6": 2 / 3, "0.7": 2 / 3, "0.8": 2 / 3, "0.9": 1 / 3}
    assert "evaluated 2 of 3 ground-truth videos" in text and "class labels from: file C" in text
    for words in (
        "66.67",
        "the 2 with predictions",
        "double detection",
        "AR@100",
        "by length",
        "3 segments",
    ):
        assert words in text
    pytest.importorskip("matplotlib")
    ev.main(["--gt", gt, "--pred", pred, "--plot", str(image)])
    assert image.read_bytes()[:4] == b"\x89PNG"


def test_program_errors(tmp_path, capsys, monkeypatch):
    gt = write(tmp_path / "gt.json", annotations(ONE))
    pred = write(tmp_path / "pred.json", result([("q", "x", (0, 1), 1.0)]))
    cut = tmp_path / "cut.json"
    cut.write_text(Path(pred).read_text()[:-20])
    for argv, message in (
        (["--gt", gt, "--pred", str(cut)], r"error: .*cut.json: not valid JSON.*cut off"),
        (["--gt", gt, "--pred", pred, "--subset", "test"], "error: .*no video of subset 'test'"),
        (["--gt", gt, "--pred", str(tmp_path / "none.json")], "error: .*none.json"),
        (["--compare", str(tmp_path)], "error: .*no metrics.json"),
    ):
        with pytest.raises(SystemExit, match=message):
            ev.main(argv)
    both = ["--gt", gt, "--pred", pred]
    for argv in (
        [],
        ["--gt", gt],
        [*both, "--compare", "x"],
        [*both, "--tiou", "0.5:x:1"],
        [*both, "--tiou", "0.5:0.9:0.3"],
        [*both, "--markdown", "x.md"],
    ):
        with pytest.raises(SystemExit) as stop:
            ev.main(argv)
        assert stop.value.code == 2
    capsys.readouterr()
    ev.main(["--gt", gt, "--pred", pred])
    assert "warning: 1 predictions are for 1 video (q)" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        ev.main(["--gt", gt, "--pred", pred, "--plot", str(tmp_path / "p.png")])


def metrics(average, thresholds=("0.5", "0.75", "0.95"), **more):
    return {
        "mAP": {t: average for t in thresholds},
        "average_mAP": average,
        "evaluated_videos": 9,
        "ground_truth_videos": 10,
        "subset": "validation",
        "class_source": "video classifier of the run",
    } | more


def test_compare(tmp_path, capsys):
    write(tmp_path / "icp" / "metrics.json", metrics(0.1234567890123, seconds=12.5, seed=0))
    for seed, (value, seconds) in enumerate(
        ((0.2, None), (0.3, 8.0), (0.4, None))
    ):  # one knows its cost
        write(
            tmp_path / "lofi" / f"seed{seed}" / "metrics.json",
            metrics(value, seed=seed, seconds=seconds),
        )
    out, table, image = tmp_path / "t.json", tmp_path / "t.md", tmp_path / "t.png"
    plot = ["--plot", str(image)] if importlib.util.find_spec("matplotlib") else []
    runs = [str(tmp_path / "icp"), f"LoFi={tmp_path / 'lofi'}/"]
    ev.main(["--compare", *runs, "--json", str(out), "--markdown", str(table), *plot])
    rows, text = json.loads(out.read_text())["rows"], capsys.readouterr().out
    assert [(r["name"], r["seeds"]) for r in rows] == [("icp", 1), ("LoFi", 3)]
    assert rows[0]["0.95"] == rows[0]["average"] == 0.1234567890123
    assert (
        rows[0]["seconds"] == 12.5 and rows[0]["std"] is None and rows[0]["evaluated_videos"] == 9
    )
    assert rows[1]["average"] == pytest.approx(0.3) and rows[1]["std"]["0.75"] == pytest.approx(0.1)
    assert rows[1]["seconds"] == 8.0 and rows[1]["std"]["seconds"] is None
    for shown in (text, table.read_text()):
        for words in ("30.00 ± 10.00", "12.35", " 9 of 10 |", "video classifier of the run"):
            assert words in shown
    assert table.read_text().splitlines()[1].startswith("|--") and (not plot or image.exists())


def test_compare_says_what_differs_or_is_missing(tmp_path):
    write(tmp_path / "a" / "0" / "metrics.json", metrics(0.1, ("0.3", "0.5")))
    (tmp_path / "a" / "1").mkdir()
    write(
        tmp_path / "b" / "metrics.json",
        metrics(0.2, ("0.3", "0.5"), class_source="ground truth (analysis)"),
    )
    with pytest.warns(UserWarning) as caught:
        rows = ev.compare([str(tmp_path / "a"), str(tmp_path / "b")])
    messages = [str(w.message) for w in caught]
    assert any("no metrics.json in 1 folder" in m for m in messages)
    assert any("differ in class_source" in m for m in messages)
    assert rows[0]["0.3"] == 0.1 and "0.75" not in rows[0]
    write(tmp_path / "c" / "metrics.json", {"loss": 1})
    with pytest.raises(ValueError, match='no "mAP"'):
        ev.compare([str(tmp_path / "c")])


def test_module_stands_alone(tmp_path):
    shutil.copy(ROOT / "evaluate.py", tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", "import evaluate; print(evaluate.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert run.returncode == 0 and str(tmp_path) in run.stdout and run.stderr == "", run.stderr


@pytest.mark.parametrize("run", ["X=none/there", "none/there", "X=README.md", "X=README.md,none"])
def test_compare_of_a_folder_that_is_not_there_is_one_clear_error(run):
    with pytest.raises(
        SystemExit,
        match=r"^error: no folder (README.md|none/there) \(of .*\): expected a run's folder",
    ):
        ev.main(["--compare", run])


def test_compare_of_a_folder_without_metrics_is_one_clear_error(tmp_path):
    with pytest.raises(
        SystemExit,
        match=f"^error: {tmp_path}: no metrics.json in it or in its folders; has the run finished",
    ):
        ev.main(["--compare", f"X={tmp_path}"])


def test_a_reader_that_has_seen_enough_ends_it_quietly(tmp_path):
    """As `| head -1` does: the pipe is closed at its other end before anything is written. What else was asked for is written."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.json").write_text(
        json.dumps({"mAP": {"0.5": 0.5}, "average_mAP": 0.5})
    )
    read, write = os.pipe()
    os.close(read)
    command = [
        sys.executable,
        "evaluate.py",
        "--compare",
        f"{tmp_path}/run",
        "--json",
        f"{tmp_path}/out.json",
    ]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "") and json.load(
        open(tmp_path / "out.json")
    )["rows"]


def test_compare_takes_the_seeds_of_one_row_and_refuses_other_runs_as_seeds(tmp_path):
    for name, seed, value in (("a0", 0, 0.2), ("a1", 1, 0.4), ("b0", 0, 0.6)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "metrics.json").write_text(
            json.dumps({"mAP": {"0.5": value}, "average_mAP": value, "seed": seed})
        )
    (row,) = ev.compare([f"A={tmp_path}/runs/a0,{tmp_path}/runs/a1"])
    assert (
        (row["name"], row["seeds"]) == ("A", 2)
        and row["average"] == pytest.approx(0.3)
        and row["std"]["average"] == pytest.approx(0.02**0.5)
    )
    with pytest.raises(ValueError, match=r"have seeds \[0, 1, 0\]"):
        ev.compare([f"{tmp_path}/runs"])


def test_class_scores_below_zero_are_refused():
    with pytest.raises(ValueError, match="below 0"):
        ev.load_class_scores({"v": [{"label": "x", "score": -1.5}]}, ["v"])
    with pytest.raises(ValueError, match="below 0"):
        ev.load_class_scores({"results": {"v": [-1.5, 0.1]}, "class": ["x", "y"]}, ["v"])
