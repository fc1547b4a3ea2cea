"""Numbers worked by hand, and plain loops that follow the official evaluators step by step."""

import gc
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import Process

import evaluate as ev

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
THUMOS_TIOU = np.array([0.3, 0.4, 0.5, 0.6, 0.7])


# ------------------------------------------------------------------------------- plain references


def plain_tiou(a, b):
    """Return tIoU in the official arithmetic: undefined for two zero-length segments."""
    inter = max(min(a[1], b[1]) - max(a[0], b[0]), 0.0)
    union = (b[1] - b[0]) + (a[1] - a[0]) - inter
    return inter / union if union else math.nan


def plain_hits(truth, mine, threshold, ambiguous=()):
    """Return 1 or 0 for each prediction of a class, best score first, without the ignored."""
    taken = set()
    hits = []
    for video, _, segment, _ in mine:
        here = [g for g, row in enumerate(truth) if row[0] == video]
        overlap = np.array([plain_tiou(segment, truth[g][2]) for g in here])
        hit = 0
        for k in overlap.argsort()[::-1]:
            if overlap[k] < threshold:
                break
            if here[k] not in taken:
                taken.add(here[k])
                hit = 1
                break
        unclear = [row[2] for row in ambiguous if row[0] == video]
        if hit or not any(plain_tiou(segment, one) > 0 for one in unclear):
            hits.append(hit)
    return hits


def plain_ap(hits, positives, interpolate=True):
    precision = [sum(hits[:n]) / n for n in range(1, len(hits) + 1)]
    if not interpolate:
        return sum(p for p, hit in zip(precision, hits, strict=True) if hit) / positives
    recall = [0.0] + [sum(hits[:n]) / positives for n in range(1, len(hits) + 1)]
    return sum((recall[i + 1] - recall[i]) * max(precision[i:]) for i in range(len(hits)))


def plain_map(gt, pred, thresholds, interpolate=True):
    """Return AP (classes, thresholds). gt, pred: rows (video, label, segment[, score])."""
    table = []
    ambiguous = [row for row in gt if row[1] == "Ambiguous"]
    for label in dict.fromkeys(row[1] for row in gt if row[1] != "Ambiguous"):
        truth = [row for row in gt if row[1] == label]
        mine = [row for row in pred if row[1] == label]
        order = np.array([row[3] for row in mine]).argsort()[::-1]
        mine = [mine[i] for i in order]
        hits = [plain_hits(truth, mine, t, ambiguous) for t in thresholds]
        table.append([plain_ap(one, len(truth), interpolate) for one in hits])
    return np.array(table)


def plain_nms(
    segments, scores, top_k, *, sigma=0.84, decay="gaussian", decay_above=(0, 0), min_score=0.0
):
    """Return rows (start, end, score)."""
    remaining = list(range(len(scores)))
    scores = list(scores)
    out = []
    while remaining and len(out) < top_k:
        best = max(remaining, key=lambda i: (scores[i], -i))
        remaining.remove(best)
        if scores[best] < min_score:
            break
        out.append((*segments[best], scores[best]))
        for i in list(remaining):
            overlap = plain_tiou(segments[best], segments[i])
            low, high = decay_above
            if not overlap > low + (high - low) * (segments[best][1] - segments[best][0]):
                continue
            if decay == "hard":
                remaining.remove(i)
            scores[i] *= math.exp(-(overlap**2) / sigma) if decay == "gaussian" else 1 - overlap
    return out


def annotations(rows, durations=None, subset="validation"):
    """Return ActivityNet JSON of rows (video, label, segment)."""
    database = {}
    for video, label, segment in rows:
        info = {"subset": subset, "duration": 10.0, "annotations": []}
        database.setdefault(video, info)["annotations"].append(
            {"segment": list(segment), "label": label}
        )
    for video, duration in (durations or {}).items():
        database[video]["duration"] = duration
    return {"database": database}


def result(rows, **external):
    """Return a result of rows (video, label, segment, score)."""
    results = {}
    for video, label, segment, score in rows:
        detection = {"label": label, "score": score, "segment": list(segment)}
        results.setdefault(video, []).append(detection)
    return {"version": "1", "results": results, "external_data": external}


def score(gt, pred, thresholds=(0.5,), **options):
    """Return the metrics of rows."""
    return ev.evaluate(annotations(gt), result(pred), thresholds=list(thresholds), **options)


# ----------------------------------------------------------------------------------- tIoU and NMS


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
    # (0, 0.2) overlaps the first with tIoU 1/2; the last candidate, untouched, is kept.
    expected = [[0.9, 0.8 * math.exp(-0.25 / 0.84), 0.3]]
    torch.testing.assert_close(kept, torch.tensor(expected, dtype=torch.float64))
    assert out.tolist() == segments.tolist()
    assert valid.all()


def random_proposals(seed, B, K, dtype=torch.float64):
    """Return proposals on a coarse grid with few scores: duplicates, zero lengths, many ties."""
    g = torch.Generator().manual_seed(seed)
    segments = (torch.randint(0, 12, (B, K, 2), generator=g).sort(-1).values / 12).to(dtype)
    scores = (torch.randint(0, 5, (B, K), generator=g) / 4).to(dtype)
    return segments, scores, torch.rand(B, K, generator=g) < 0.7


RULES = [
    {"sigma": (0.84, 0.3, 1e-4)},
    {"decay": ["hard"], "decay_above": ((0.5, 0.5), (0.0, 0.0), (1.0, 1.0))},
    {"decay": ["linear"], "decay_above": ((0.3, 0.3), (0.2, 0.7)), "min_score": (0.0, 0.3, 0.5)},
    {"sigma": (0.5, 0.3), "decay_above": ((0.5, 0.9), (0.3, 0.3)), "min_score": (0.01, 0.25, 0.6)},
]


@pytest.mark.parametrize("rule", RULES, ids=["soft", "hard", "linear", "all"])
@pytest.mark.parametrize("seed", range(25))
def test_nms_equals_plain_loop(seed, rule):
    B = 1 + seed % 4
    K = (1, 2, 7, 30, 60)[seed % 5]
    top_k = (100, 5, 20)[seed % 3]
    options = {name: values[seed % len(values)] for name, values in rule.items()}
    segments, scores, valid = random_proposals(seed, B, K)
    segments = segments.masked_fill(~valid[..., None], torch.nan)
    scores = scores.masked_fill(~valid, torch.nan)
    out, kept, picked = ev.soft_nms(segments, scores, valid, top_k=top_k, **options)
    for b in range(B):
        one = segments[b, valid[b]].tolist()
        expected = plain_nms(one, scores[b, valid[b]].tolist(), top_k, **options)
        n = len(expected)
        assert picked[b].tolist() == [True] * n + [False] * (min(top_k, K) - n)
        got = torch.cat([out[b], kept[b, :, None]], 1)
        expected = torch.tensor(expected, dtype=torch.float64).reshape(n, 3)
        torch.testing.assert_close(got[:n], expected, rtol=1e-13, atol=0)
        assert not got[n:].any()


def plain_class_wise(segments, scores, class_scores, most, top_k):
    """Return rows (start, end, score, class): NMS of each class by itself, the best of all."""
    rows = []
    for c in range(class_scores.shape[1]):
        mine = []
        for i, row in enumerate(class_scores.tolist()):
            best = sorted(range(len(row)), key=lambda x: -row[x])[:most]
            if c in best and row[c] > 0:
                mine.append(i)
        fused = [(scores[i] * class_scores[i, c]).item() for i in mine]
        kept = plain_nms([segments[i].tolist() for i in mine], fused, top_k, sigma=0.3)
        rows += [(*row, c) for row in kept]
    return sorted(rows, key=lambda row: -row[2])[:top_k]


@pytest.mark.parametrize("per_video", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_class_wise_nms_equals_plain_loop(seed, per_video):
    B, K, n, most, top_k = 3, 20, 4, 1 + seed % 3, (5, 30)[seed % 2]
    segments, _, valid = random_proposals(seed, B, K)
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(B, K, generator=g, dtype=torch.float64)
    classes = torch.rand(B, *([] if per_video else [K]), n, generator=g, dtype=torch.float64)
    classes = classes.masked_fill(classes < 0.2, 0)
    nms = partial(ev.soft_nms, sigma=0.3, top_k=top_k)
    out, kept, picked, own = ev.class_wise(nms, segments, scores, valid, classes, top_k=most)
    classes = classes[:, None].expand(B, K, n) if per_video else classes
    for b in range(B):
        some = (segments[b, valid[b]], scores[b, valid[b]], classes[b, valid[b]])
        expected = torch.tensor(plain_class_wise(*some, most, top_k), dtype=torch.float64)
        got = torch.cat([out[b], kept[b, :, None], own[b].argmax(1)[:, None]], 1)[picked[b]]
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
        assert (own[b].sum(1) == 1).all()


def test_class_wise_nms_gives_float32_segments_back_as_they_were():
    segments, scores, valid = random_proposals(1, 2, 50, torch.float32)
    segments = segments * 0.99
    classes = torch.eye(200)[[7, 199]]
    kept, *_ = ev.class_wise(ev.soft_nms, segments, scores, valid, classes)
    assert torch.equal(kept, ev.soft_nms(segments, scores, valid)[0])


@pytest.mark.parametrize("seed", range(6))
def test_voting_equals_plain_loop(seed):
    segments, scores, valid = random_proposals(seed, 3, 30)
    broken = segments.masked_fill(~valid[..., None], torch.nan)
    unscored = scores.masked_fill(~valid, torch.nan)
    nms = partial(ev.soft_nms, top_k=10)
    kept, decayed, picked = nms(broken, unscored, valid)
    moved, *others = ev.vote(nms, broken, unscored, valid, threshold=0.6)
    assert torch.equal(others[0], decayed) and torch.equal(others[1], picked)
    for b in range(3):
        for one, new in zip(kept[b, picked[b]].tolist(), moved[b, picked[b]].tolist(), strict=True):
            others = zip(segments[b, valid[b]].tolist(), scores[b, valid[b]].tolist(), strict=True)
            near = [(s, w) for s, w in others if plain_tiou(one, s) >= 0.6]
            total = sum(w for _, w in near)
            mean = [sum(w * s[i] for s, w in near) / total for i in (0, 1)] if total else one
            assert new == pytest.approx(mean, abs=1e-12)
        assert not moved[b, ~picked[b]].any()


def test_voting_by_hand():
    segments = torch.tensor([[[0.0, 0.4], [0.0, 0.5], [0.6, 0.9]]])
    scores = torch.tensor([[0.75, 0.25, 0.5]])
    nms = partial(ev.soft_nms, decay="hard", decay_above=(0.5, 0.5))
    moved, kept, _ = ev.vote(nms, segments, scores, torch.ones(1, 3).bool(), threshold=0.75)
    # tIoU 0.8: three quarters of the first and a quarter of the second.
    torch.testing.assert_close(moved[0, :2], torch.tensor([[0.0, 0.425], [0.6, 0.9]]))
    assert kept.tolist() == [[0.75, 0.5, 0.0]]


def test_the_lines_of_the_page_on_evaluation_run():
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    names = {}
    exec(page.partition("```python\n")[2].partition("```")[0], names)
    moved, kept, _ = names["vote"](
        *(names[x] for x in ("hard", "segments", "scores", "valid")), threshold=0.75
    )
    assert moved[0, 0].tolist() == pytest.approx([0, 0.425]) and kept[0].tolist() == [0.75, 0.5, 0]
    default = (ROOT / "configs/default.yaml").read_text(encoding="utf-8")
    for key in re.findall("`([a-z_]+)`", page.partition("| key |")[2].partition("\n\n")[0]):
        assert key in default, key


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "options", [{}, {"decay": "hard", "decay_above": (0.5, 0.5)}, {"decay": "linear"}]
)
def test_nms_on_cuda_equals_cpu(options):
    segments, scores, valid = random_proposals(3, 20, 3000)
    on_cpu = ev.soft_nms(segments, scores, valid, **options)
    on_gpu = ev.soft_nms(segments.cuda(), scores.cuda(), valid.cuda(), **options)
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert b.is_cuda
        torch.testing.assert_close(a, b.cpu(), rtol=1e-12, atol=1e-300)


def test_nms_batch_equals_single_and_keeps_inputs():
    # More than one block.
    segments, scores, valid = random_proposals(0, 9, 30000, torch.float32)
    before = (segments.clone(), scores.clone())
    together = ev.soft_nms(segments, scores, valid, top_k=7)
    assert torch.equal(segments, before[0])
    assert torch.equal(scores, before[1])
    assert together[1].dtype == torch.float32
    for b in range(9):
        rows = slice(b, b + 1)
        alone = ev.soft_nms(segments[rows], scores[rows], valid[rows], top_k=7)
        for x, y in zip(together, alone, strict=True):
            assert torch.equal(x[rows], y)
    empty = ev.soft_nms(torch.zeros(2, 0, 2), torch.zeros(2, 0))
    assert [x.shape for x in empty] == [(2, 0, 2), (2, 0), (2, 0)]
    assert ev.soft_nms(segments.bfloat16(), scores.bfloat16())[1].dtype == torch.float32
    with pytest.raises(ValueError, match=r"segments \(B, K, 2\)"):
        ev.soft_nms(segments, scores[:, 1:])
    with pytest.raises(ValueError, match="decay must be"):
        ev.soft_nms(segments, scores, decay="soft")


# ---------------------------------------------------------------------- classes and result files


def test_fuse_classes_by_hand():
    segments = torch.tensor([[[0.0, 0.5], [0.25, 1.0]], [[0.1, 0.2], [0.0, 0.0]]])
    scores = torch.tensor([[0.5, 1.0], [0.4, 0.0]])
    valid = torch.tensor([[True, True], [True, False]])
    classes = np.array([[0.1, 0.5, 0.4], [0.0, 0.25, 0.0]])
    fused = ev.fuse_classes(segments, scores, valid, "ab", [8.0, 10.0], classes, "xyz", top_k=2)
    # Highest score first.
    assert [(d["label"], d["score"], d["segment"]) for d in fused["a"]] == [
        ("y", 0.5, [2.0, 8.0]),
        ("z", 0.4, [2.0, 8.0]),
        ("y", 0.25, [0.0, 4.0]),
        ("z", 0.2, [0.0, 4.0]),
    ]
    # The second-best class of b has score 0.
    (detection,) = fused["b"]
    assert detection["label"] == "y"
    assert detection["segment"] == pytest.approx([1.0, 2.0])
    assert detection["score"] == pytest.approx(0.1)
    best = ev.fuse_classes(segments, scores, None, "ab", [8, 10], classes, "xyz")
    assert [d["label"] for d in best["a"]] == ["y", "y"]
    nothing = ev.fuse_classes(segments, scores, valid, "ab", [8, 10], classes * 0, "xyz")
    assert nothing == {"a": [], "b": []}


def test_fuse_classes_bad_input():
    segments = torch.zeros(1, 2, 2)
    scores = torch.zeros(1, 2)
    classes = torch.ones(1, 3)
    with pytest.raises(ValueError, match=r"\(1, 3\)\] do not fit .* and 2 labels"):
        ev.fuse_classes(segments, scores, None, ["a"], [1.0], classes, ["x", "y"])
    with pytest.raises(ValueError, match=r"longer than argument 1"):
        ev.fuse_classes(segments, scores, None, ["a", "b"], [1.0], classes, "xyz")
    with pytest.raises(ev.InputError, match="NaN or infinite scores"):
        ev.fuse_classes(segments, scores, None, ["a"], [1.0], classes * math.nan, "xyz")
    scores = torch.tensor([[0, torch.nan]])
    with pytest.raises(ev.InputError, match="NaN or infinite scores"):
        ev.fuse_classes(segments, scores, None, ["a"], [1.0], classes, "xyz")
    valid = torch.tensor([[True, False]])
    assert ev.fuse_classes(segments, scores, valid, ["a"], [1.0], classes, "xyz")["a"]


def test_load_class_scores(tmp_path):
    cuhk = {"results": {"a": [0.1, 0.9], "b": ["0.2", 0.8]}, "class": ["x", "y"]}
    (tmp_path / "c.json").write_text(json.dumps(cuhk))
    scores, labels = ev.load_class_scores(tmp_path / "c.json", ["b", "v_a"])
    assert labels == ["x", "y"]
    assert scores.tolist() == [[0.2, 0.8], [0.1, 0.9]]
    entries = {
        "v_b": [{"label": "y", "score": 0.7}, {"label": "x", "score": "0.2"}],
        "a": [{"label": "z", "score": 0.3}],
    }
    scores, labels = ev.load_class_scores(entries, ["a", "b"])
    assert labels == ["x", "y", "z"]
    assert scores.tolist() == [[0, 0, 0.3], [0.2, 0.7, 0]]
    rows = [("a", "y", (0, 1)), ("a", "x", (1, 2)), ("a", "y", (2, 3)), ("b", "x", (0, 1))]
    scores, labels = ev.load_class_scores(annotations(rows), ["a", "b"], ground_truth=True)
    assert labels == ["y", "x"]
    assert scores.tolist() == [[1, 1], [0, 1]]
    with pytest.warns(UserWarning, match=r"no class scores for 2 videos \(c, d\) of 3"):
        scores, _ = ev.load_class_scores(cuhk, ["a", "c", "d"])
    assert scores.tolist() == [[0.1, 0.9], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    "source, message",
    [
        ({"results": {"a": [0.1]}, "class": ["x", "y"]}, "video 'a': expected 2 class"),
        ({"results": {"a": [0.1, math.nan]}, "class": ["x", "y"]}, "expected 2 class scores"),
        ({"a": [{"label": "x"}]}, "video 'a', entry 0: expected label .text., score"),
        ({"results": {}}, r"no class scores for 1 video \(a\) of 1: its names are \[\]"),
        ({"results": {"b": [1, 2]}, "class": ["x", "y"]}, r"its names are \['b'\]"),
        ({"a": [{"label": "x", "score": -1.5}]}, "at least 0, got .*-1.5"),
        ({"results": {"a": [-1.5, 0.1]}, "class": ["x", "y"]}, "at least 0, got .*-1.5"),
    ],
)
def test_bad_class_scores(source, message):
    with pytest.raises(ev.InputError, match=message):
        ev.load_class_scores(source, ["a"])


def test_save_results(tmp_path):
    path = tmp_path / "new" / "r.json"
    rows = result([("a", "x", (0, 1), 0.1 + 0.2)])["results"]
    ev.save_results(rows, path, class_source="external file C.json", seed=3)
    data = json.loads(path.read_text())
    assert data["results"] == rows
    assert data["external_data"] == {"class_source": "external file C.json", "seed": 3}
    metrics = ev.evaluate(annotations([("a", "x", (0, 1))]), path)
    assert metrics["class_source"] == "external file C.json"
    # The old file stays, whole.
    with pytest.raises(ValueError, match="not JSON compliant"):
        ev.save_results({"a": [{"score": math.nan}]}, path)
    assert json.loads(path.read_text()) == data
    assert os.listdir(path.parent) == ["r.json"]
    with pytest.raises(ev.InputError, match="cannot be written"):
        ev.save_results(rows, path / "r.json")


# ------------------------------------------------------------------------------------ mAP by hand

ONE = [("a", "x", (0.0, 10.0))]


@pytest.mark.parametrize(
    "segment, expected",
    [
        ((0.0, 10.0), [1, 1]),
        ((0.0, 5.0), [1, 0]),
        ((0.0, 4.9), [0, 0]),
        ((20.0, 30.0), [0, 0]),
    ],
)
def test_one_prediction(segment, expected):
    out = score(ONE, [("a", "x", segment, 0.3)], (0.5, 0.75))
    assert list(out["mAP"].values()) == expected
    assert out["average_mAP"] == sum(expected) / 2


def test_precision_recall_area_by_hand():
    gt = [(video, "x", (0, 10)) for video in "abc"] + [("c", "y", (0, 4))]
    pred = [
        ("a", "x", (0, 10), 0.9),
        ("a", "x", (0, 10), 0.8),
        ("b", "x", (0, 10), 0.7),
        ("c", "x", (8, 10), 0.6),
    ]
    # x: hit, duplicate, hit, miss: precision 1 at recall 1/3, 2/3 at 2/3: AP = 5/9; y: 0.
    out = score(gt, pred)
    assert out["mAP"]["0.5"] == pytest.approx(5 / 18, abs=1e-15)
    assert out["AP"] == {"x": pytest.approx(5 / 9, abs=1e-15), "y": 0}


def test_precision_is_interpolated():
    gt = [("a", "x", (0, 1)), ("b", "x", (0, 1))]
    pred = [("a", "x", (5, 6), 0.9), ("a", "x", (0, 1), 0.8), ("b", "x", (0, 1), 0.7)]
    # Not 1/2 * 1/2 + 1/2 * 2/3, unless that is asked for.
    assert score(gt, pred)["mAP"]["0.5"] == pytest.approx(2 / 3, abs=1e-15)
    out = score(gt, pred, interpolate=False)
    assert out["mAP"]["0.5"] == pytest.approx(7 / 12, abs=1e-15)
    assert out["by_length"][0]["mAP"]["0.5"] == pytest.approx(7 / 12, abs=1e-15)
    assert not out["interpolated"] and "| mAP (%), AP not interpolated, at tIoU" in ev.report(out)


def test_a_taken_ground_truth_leaves_the_next_best():
    gt = [("a", "x", (0, 10)), ("a", "x", (0, 9))]
    pred = [("a", "x", (0, 10), confidence) for confidence in (0.9, 0.8, 0.7)]
    assert score(gt, pred, (0.5, 0.95))["mAP"] == {"0.5": 1, "0.95": 0.5}


def test_zero_length():
    gt = [("a", "x", (3.0, 3.0)), ("b", "x", (0.0, 1.0))]
    both = [("a", "x", (3.0, 3.0), 0.9), ("b", "x", (0.0, 1.0), 0.8)]
    assert score(gt, both, (0.5, 0.95))["average_mAP"] == 1
    # The official 0 / 0 is below no threshold: any zero length takes a zero-length ground truth.
    assert score(gt, [("a", "x", (7.0, 7.0), 0.9), both[1]])["average_mAP"] == 1
    assert score(gt, [("b", "x", (0.5, 0.5), 0.9)])["average_mAP"] == 0


def test_wrong_class_unknown_video_and_missing_video():
    gt = [("a", "x", (0, 1)), ("b", "y", (0, 1))]
    assert score(gt, [("a", "y", (0, 1), 0.9)])["average_mAP"] == 0
    out = score(gt, [("q", "x", (0, 1), 0.9), ("a", "x", (0, 1), 0.8)])
    assert out["mAP"]["0.5"] == 0.25
    counts = {"evaluated_videos": 1, "ground_truth_videos": 2, "unknown_videos": 1}
    counts |= {"segments": 2, "classes": 2, "predictions": 2, "class_source": "unknown"}
    assert {key: out[key] for key in counts} == counts
    # Over video a and class x alone.
    assert out["common"] == {"mAP": {"0.5": 1.0}, "average_mAP": 1.0}


@pytest.mark.parametrize("results", [{}, {"a": []}])
def test_empty_result(results):
    out = ev.evaluate(annotations(ONE), {"results": results}, ar=True)
    assert out["average_mAP"] == out["common"]["average_mAP"] == out["AR"]["AUC"] == 0
    assert out["evaluated_videos"] == 0
    assert json.dumps(out, allow_nan=False)


def test_ties_fall_as_in_the_official_order():
    gt = [(f"v{i}", "x", (0, 1)) for i in range(40)]
    pred = [(f"v{i}", "x", (0, 1) if i % 3 else (5, 6), 0.5) for i in range(40)]
    expected = plain_map(gt, pred, [0.5]).mean()
    assert 0 < expected < 1
    assert score(gt, pred)["average_mAP"] == pytest.approx(expected, abs=1e-14)


# ------------------------------------------------------------------- mAP against the plain loop


def random_case(seed):
    """Return rows of few videos, classes, grid points and scores.

    Ties, duplicates, zero lengths, unknown videos and empty classes are frequent. Rows come video
    by video, as in a file.
    """
    rng = np.random.default_rng(seed)
    videos = [f"v{i}" for i in range(rng.integers(1, 5))]
    labels = list("xyz")[: rng.integers(1, 4)]
    grid = rng.integers(2, 14)

    def segment():
        ends = rng.integers(0, grid, 2) if rng.random() < 0.8 else rng.random(2) * grid
        return tuple(np.sort(ends).tolist())

    def confidence():
        if seed % 3 == 0:
            return int(rng.integers(0, 3))
        return float(rng.integers(0, 4) / 4) if seed % 3 == 1 else float(rng.random())

    gt = []
    for _ in range(rng.integers(1, 50)):
        gt.append((str(rng.choice(videos)), str(rng.choice(labels)), segment()))
    present = list(dict.fromkeys(row[1] for row in gt))
    pred = []
    for _ in range(rng.integers(0, 90)):
        video = str(rng.choice([*videos, "unknown"]))
        pred.append((video, str(rng.choice(present)), segment(), confidence()))
    gt.sort(key=lambda row: row[0])
    pred.sort(key=lambda row: row[0])
    return gt, pred


@pytest.mark.parametrize("seed", range(40))
def test_map_without_interpolation_equals_plain_loop(seed):
    gt, pred = random_case(seed)
    out = score(gt, pred, THUMOS_TIOU, interpolate=False)
    expected = plain_map(gt, pred, THUMOS_TIOU, interpolate=False)
    np.testing.assert_allclose(list(out["mAP"].values()), expected.mean(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(300))
def test_map_equals_plain_loop(seed):
    gt, pred = random_case(seed)
    thresholds = (ev.ACTIVITYNET_TIOU, np.array([0.1, 0.5, 1.0]), THUMOS_TIOU)[seed % 3]
    out = score(gt, pred, thresholds)
    expected = plain_map(gt, pred, thresholds)
    np.testing.assert_allclose(list(out["mAP"].values()), expected.mean(0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(list(out["AP"].values()), expected.mean(1), rtol=0, atol=1e-12)
    known = {row[0] for row in pred} & {row[0] for row in gt}
    gt = [row for row in gt if row[0] in known]
    pred = [row for row in pred if row[0] in known]
    if gt:
        expected = plain_map(gt, pred, thresholds).mean()
        assert out["common"]["average_mAP"] == pytest.approx(expected, rel=0, abs=1e-12)


def real_annotations(name, subset):
    """Return the path of real annotations and their rows."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is absent")
    rows = []
    for video, info in json.loads(path.read_text())["database"].items():
        if info["subset"] == subset:
            for a in info["annotations"]:
                rows.append((video, a["label"], tuple(map(float, a["segment"]))))
    return path, rows


REAL = [
    ("anet13_annotations.json", "validation", ev.ACTIVITYNET_TIOU, (4728, 7293, 200)),
    ("thumos14_annotations.json", "test", THUMOS_TIOU, (210, 3311, 20)),
]


@pytest.mark.parametrize("name, subset, thresholds, counts", REAL)
def test_perfect_result_on_real_annotations(name, subset, thresholds, counts):
    path, rows = real_annotations(name, subset)
    perfect = result([(*row, 1.0) for row in rows])
    out = ev.evaluate(path, perfect, subset=subset, thresholds=thresholds)
    assert set(out["mAP"].values()) == {1.0}
    assert out["average_mAP"] == out["common"]["average_mAP"] == 1
    assert out["evaluated_videos"] == out["ground_truth_videos"]
    assert (out["evaluated_videos"], out["segments"], out["classes"]) == counts
    assert out["errors"]["all"]["true_positive"] == counts[1] == sum(out["errors"]["all"].values())


@pytest.mark.parametrize("name, subset, thresholds, counts", REAL)
def test_map_equals_plain_loop_on_real_annotations(name, subset, thresholds, counts):
    path, rows = real_annotations(name, subset)
    rng = np.random.default_rng(0)
    labels = list(dict.fromkeys(row[1] for row in rows))
    keep = sorted(rng.choice(counts[2], min(counts[2], 40), replace=False))
    labels = [labels[i] for i in keep]
    truth = [row for row in rows if row[1] in labels][:1500]
    pred = []
    for video, label, (start, end) in np.repeat(np.array(truth, dtype=object), 3, axis=0):
        noise = rng.normal(0, 0.15, 2) * (rng.random() < 0.7)
        s, e = np.array([start, end]) + (end - start) * noise
        if rng.random() > 0.85:
            label = str(rng.choice(labels))
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


# ------------------------------------------------------------------------------------------ AR@AN


def plain_average_recall(gt, pred, thresholds, most=100):
    """Return recall by AN: AN is an average, every video keeps the same fraction."""
    videos = sorted({row[0] for row in gt})
    kept = {}
    for video in videos:
        mine = [row for row in pred if row[0] == video]
        order = np.array([row[3] for row in mine]).argsort()[::-1]
        num = min(int(len(mine) * (most * len(videos) / len(pred))), len(mine))
        kept[video] = [mine[i][2] for i in order[:num]]
    total = sum(map(len, kept.values()))
    recall = np.zeros(most)
    for an in range(1, most + 1):
        fraction = an / most * (most * float(len(videos)) / total)
        for video, _, segment in gt:
            first = kept[video][: int(len(kept[video]) * fraction)]
            overlaps = [plain_tiou(proposal, segment) for proposal in first]
            for threshold in thresholds:
                found = any(overlap >= threshold for overlap in overlaps)
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
    ar = score(gt, pred, ar=True)["AR"]
    # AN = 1: a is found at all ten thresholds; AN = 2: b too, at five of them (tIoU 0.7).
    assert ar["AR@1"] == 0.5
    assert ar["AR@5"] == ar["AR@100"] == 0.75
    assert ar["AUC"] == pytest.approx((0.625 + 98 * 0.75) / 100, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_average_recall_equals_plain_loop(seed):
    gt, _ = random_case(seed)
    rng = np.random.default_rng(seed)
    videos = sorted({row[0] for row in gt})
    pred = []
    for _ in range(rng.integers(20, 120 * len(videos))):
        segment = tuple(np.sort(rng.random(2) * 14).tolist())
        confidence = round(float(rng.random()), 1 + seed % 3)
        pred.append((str(rng.choice(videos)), "x", segment, confidence))
    pred.sort(key=lambda row: row[0])
    # A proposal file has no labels: only AR@AN is computed.
    proposals = result(pred)
    for entries in proposals["results"].values():
        for entry in entries:
            del entry["label"]
    out = ev.evaluate(annotations(gt), proposals, ar=True)
    assert "mAP" not in out
    assert out["class_source"] == "none (class-agnostic proposals)"
    expected = plain_average_recall(gt, pred, ev.ACTIVITYNET_TIOU)
    np.testing.assert_allclose(out["AR"]["recall"], expected, rtol=0, atol=1e-12)
    area = ((expected[1:] + expected[:-1]) / 2).sum() / 100
    assert out["AR"]["AUC"] == pytest.approx(area, abs=1e-12)
    for numbers in ((3, 20), (200,)):
        ar = ev.evaluate(annotations(gt), proposals, ar=numbers)["AR"]
        expected = plain_average_recall(gt, pred, ev.ACTIVITYNET_TIOU, max(numbers))
        np.testing.assert_allclose(ar["recall"], expected, rtol=0, atol=1e-12)
        assert [key for key in ar if key.startswith("AR@")] == [f"AR@{k}" for k in numbers]
        assert ar[f"AR@{numbers[0]}"] == pytest.approx(expected[numbers[0] - 1], abs=1e-12)


def test_average_recall_of_a_detection_file_warns_of_repeated_segments():
    pred = [("a", "x", (0, 10), 0.9), ("a", "y", (0, 10), 0.1), ("a", "x", (1, 2), 0.1)]
    out = ev.evaluate(annotations([*ONE, ("a", "y", (0, 5))]), result(pred), ar=True)
    assert "1 of 3 predictions repeat a segment" in out["warnings"][0]


# ---------------------------------------------------------------- recall of the first k x segments


def plain_recall(gt, pred, threshold, k):
    values = []
    for label in dict.fromkeys(row[1] for row in gt):
        truth = [row for row in gt if row[1] == label]
        found = 0
        for video in {row[0] for row in truth}:
            here = [row[2] for row in truth if row[0] == video]
            mine = [row for row in pred if row[:2] == (video, label)]
            mine = sorted(mine, key=lambda row: -row[3])[: k * len(here)]
            for one in here:
                found += any(plain_tiou(row[2], one) >= threshold for row in mine)
        values.append(found / len(truth))
    return sum(values) / len(values)


@pytest.mark.parametrize("seed", range(60))
def test_recall_of_the_first_equals_plain_loop(seed):
    gt, pred = random_case(seed)
    rng = np.random.default_rng(seed)
    # No ties.
    pred = [(*row[:3], float(x)) for row, x in zip(pred, rng.random(len(pred)), strict=True)]
    out = score(gt, pred, THUMOS_TIOU, recall=(1, 3))["recall"]
    assert out.keys() == {"R@1x", "R@3x"}
    for key, k in (("R@1x", 1), ("R@3x", 3)):
        expected = [plain_recall(gt, pred, t, k) for t in THUMOS_TIOU]
        np.testing.assert_allclose(list(out[key].values()), expected, rtol=0, atol=1e-12)


def test_recall_of_the_first_by_hand():
    """Two segments of x: the first two predictions count, then the first four."""
    gt = [("a", "x", (0, 10)), ("a", "x", (20, 30)), ("b", "y", (0, 10))]
    pred = [("a", "x", (0, 10), 0.9), ("a", "x", (0, 9), 0.8), ("a", "x", (20, 26), 0.7)]
    out = score(gt, pred, (0.5, 0.7), recall=[1, 2])
    assert out["recall"] == {"R@1x": {"0.5": 0.25, "0.7": 0.25}, "R@2x": {"0.5": 0.5, "0.7": 0.25}}
    assert "| R@2x               | 50.00 | 25.00 |" in ev.report(out)


# ---------------------------------------------------------------------------------- error analysis


def test_errors_by_hand():
    gt = [("a", "x", (0, 10)), ("a", "y", (20, 30))]
    # Hit; second detection of x; label y on x; tIoU 0.3 with x; label y, tIoU 2/16 with x; nothing
    # there, twice.
    pred = [
        ("a", "x", (0, 9), 0.9),
        ("a", "x", (0, 9), 0.8),
        ("a", "y", (0, 10), 0.7),
        ("a", "x", (0, 3), 0.6),
        ("a", "y", (8, 16), 0.5),
        ("a", "x", (50, 60), 0.4),
        ("unknown", "y", (0, 10), 0.3),
    ]
    errors = score(gt, pred, (0.3, 0.5, 0.95))["errors"]
    assert errors["tiou"] == 0.5
    assert errors["all"] == errors["top_10G"]
    assert errors["all"] == {
        "true_positive": 1,
        "double_detection": 1,
        "wrong_label": 1,
        "localization": 1,
        "confusion": 1,
        "background": 2,
    }
    many = [("a", "x", (50, 60), 0.1)] * 20
    errors = score(gt, pred + many)["errors"]
    assert errors["all"]["background"] == 22
    # Ten times one x; all y.
    assert sum(errors["top_10G"].values()) == 10 + 3


def test_errors_are_named_after_the_best_overlap():
    gt = [("a", "x", (0, 10)), ("a", "y", (0, 8)), ("a", "z", (0, 10))]
    pred = [
        ("a", "x", (0, 10), 0.9),
        ("a", "x", (0, 8), 0.8),
        ("a", "x", (0, 7.9), 0.75),
        ("a", "x", (0, 9.5), 0.7),
    ]
    # Hit; twice a higher tIoU with y than with x: wrong label; 0.95 with x and z: double detection.
    errors = score(gt, pred)["errors"]["all"]
    assert errors["true_positive"] == 1
    assert errors["wrong_label"] == 2
    assert errors["double_detection"] == 1


def test_a_ground_truth_that_ends_before_it_starts_is_no_error_either():
    gt = [*ONE, ("a", "y", (30, 20))]
    errors = score(gt, [("a", "y", (50, 60), 0.9)])["errors"]["all"]
    assert errors["background"] == 1


def test_map_by_length_by_hand():
    gt = [
        ("a", "x", (0, 10)),
        ("a", "x", (20, 90)),
        ("b", "x", (0, 20)),
        ("b", "y", (0, 100)),
    ]
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
    # Up to 0.2: false positive of length 0.04, hit, (the hit of the long segment is ignored), hit:
    # precision 2/3. From 0.6 to 0.8: a hit; the false positives have other lengths.
    average = [row.get("average_mAP") for row in rows]
    assert average == [pytest.approx(2 / 3), None, None, 1.0, 0.0]


# --------------------------------------------------------------------------------------- Ambiguous

UNCLEAR = [("a", "Diving", (10, 20)), ("a", "Ambiguous", (40, 50))]


@pytest.mark.parametrize("segment, expected", [((40, 50), 1.0), ((49, 90), 1.0), ((50, 60), 0.5)])
def test_a_prediction_that_overlaps_an_ambiguous_segment_is_no_error(segment, expected):
    """However little it overlaps, as in the official script; touching is no overlap."""
    pred = [("a", "Diving", segment, 0.9), ("a", "Diving", (10, 20), 0.8)]
    out = score(UNCLEAR, pred, (0.3, 0.7), ar=True)
    assert out["average_mAP"] == out["common"]["average_mAP"] == expected
    assert (out["segments"], out["classes"], out["ambiguous"]) == (1, 1, 1)
    assert out["AP"].keys() == {"Diving"}
    errors = out["errors"]["all"]
    assert errors["true_positive"] == 1 and errors["background"] == (expected < 1)
    # The only ground truth is [10, 20].
    assert out["AR"]["AR@100"] == 1
    assert "ambiguous, hence no segment of these, and no error there: 1" in ev.report(out)


def test_ambiguous_segments_and_length():
    """Of the same length, one is a false positive and one, in the ambiguous segment, is ignored."""
    pred = [("a", "Diving", (45, 55), 0.9), ("a", "Diving", (70, 80), 0.8)]
    truth = annotations(UNCLEAR, {"a": 100.0})
    expected = {0.8: 0.5, 0.7: 1.0}
    for confidence, value in expected.items():
        pred[1] = ("a", "Diving", (70, 80), confidence)
        found = result([*pred, ("a", "Diving", (10, 20), 0.75)])
        first, *others = ev.evaluate(truth, found, thresholds=[0.5])["by_length"]
        assert (first["segments"], first["average_mAP"]) == (1, value)
        assert not any(row["segments"] for row in others)


def test_a_hit_in_an_ambiguous_segment_counts_and_ambiguous_is_no_class_to_predict():
    gt = [("a", "x", (40, 50)), ("a", "ambiguous", (30, 60)), ("b", "ambiguous", (0, 1))]
    pred = [("a", "x", (40, 50), 0.9), ("a", "ambiguous", (30, 60), 0.8), ("b", "x", (0, 2), 1.0)]
    out = ev.evaluate(annotations(gt), result(pred), thresholds=[0.5])
    assert "1 of 3 predictions have 1 label" in out["warnings"][0]
    assert out["average_mAP"] == 1
    scores, labels = ev.load_class_scores(annotations(gt), ["a", "b"], ground_truth=True)
    assert (scores.tolist(), labels) == ([[1], [0]], ["x"])
    with pytest.raises(ev.InputError, match="no annotation"):
        ev.evaluate(annotations(gt[1:]), result(pred))


@pytest.mark.parametrize("seed", range(60))
def test_map_with_ambiguous_segments_equals_plain_loop(seed):
    gt, pred = random_case(seed)
    rng = np.random.default_rng(seed)
    gt = [(row[0], "Ambiguous" if rng.random() < 0.2 else row[1], row[2]) for row in gt]
    labels = {row[1] for row in gt} - {"Ambiguous"}
    pred = [row for row in pred if row[1] in labels]
    if labels:
        out = score(gt, pred, THUMOS_TIOU)
        expected = plain_map(gt, pred, THUMOS_TIOU)
        np.testing.assert_allclose(list(out["mAP"].values()), expected.mean(0), rtol=0, atol=1e-12)
        ranked = sum(out["errors"]["all"].values())
        assert ranked <= len(pred) and (ranked == len(pred) or out["ambiguous"])


# --------------------------------------------------------------------------------------- bad input


def entry(**changes):
    return {"label": "x", "score": 0.5, "segment": [0.0, 1.0]} | changes


@pytest.mark.parametrize(
    "results, message",
    [
        (
            {"a": [entry(), entry(score=math.nan)]},
            "'a', entry 1: expected .*score .a finite number",
        ),
        ({"a": [entry(score=math.inf)]}, "entry 0: expected .*score .a finite"),
        ({"a": [entry(score=None)]}, "entry 0: expected .*score .a finite"),
        ({"a": [entry(score=10**400)]}, "entry 0: expected .*score .a finite"),
        ({"a": [entry(segment=[0, math.nan])]}, "segment .2 finite numbers"),
        (
            {"b": [], "a": [entry(), {"label": "x", "segment": [0, 1]}]},
            "'a', entry 1: expected .* score",
        ),
        ({"a": [entry(), {"score": 1, "segment": [0, 1]}]}, "entry 1: expected .* label"),
        ({"a": [entry(score="high")]}, "'a', entry 0: expected .*, got .*'high'"),
        ({"a": [entry(segment=[0, 1, 2])]}, r"segment .2 finite.*, got .*\[0, 1, 2\]"),
        ({"a": [entry(), entry(segment=3)]}, "entry 1: expected segment"),
        ({"a": [entry(label=["x"])]}, "label .text.*got .*'x'"),
        ({"a": [entry(label=None)]}, "label .text.*got .*None"),
        ({"a": [3]}, "entry 0: expected segment.* got 3"),
        ({"a": entry()}, r"expected {video: \[entry, ...\]}, got {'a'"),
        ({"a": 3}, r"expected {video: \[entry, ...\]}, got {'a': 3}"),
        ([entry()], r"expected {video: \[entry, ...\]}, got \["),
    ],
)
@pytest.mark.parametrize("ar", [False, True])
def test_bad_results(results, message, ar):
    with pytest.raises(ev.InputError, match=message):
        ev.evaluate(annotations(ONE), {"results": results}, ar=ar)


def test_labels_that_are_numbers_are_the_same_as_words():
    """Some data sets annotate class indices; the detections' JSON has words."""
    truth = annotations([("a", 3, (1, 4)), ("a", "7", (6, 9))])
    found = result([("a", "3", (1, 4), 0.9), ("a", 7, (6, 9), 0.8)])
    metrics = ev.evaluate(truth, found)
    assert metrics["average_mAP"] == 1
    assert not metrics["warnings"]


@pytest.mark.parametrize("name", ["truth", "result"])
def test_a_video_twice_in_a_file_is_refused(name, tmp_path):
    entries = [{"segment": [0, 1], "label": "x", "score": 1}]
    video = {"subset": "validation", "duration": 2, "annotations": entries}
    texts = {
        "truth": json.dumps({"database": {"v": video, "w": video}}),
        "result": json.dumps({"results": {"v": entries, "w": entries}}),
    }
    twice = {name: texts[name].replace('"w"', '"v"')}
    for key, text in (texts | twice).items():
        (tmp_path / f"{key}.json").write_text(text)
    with pytest.raises(ev.InputError, match="duplicate key 'v'"):
        ev.evaluate(tmp_path / "truth.json", tmp_path / "result.json")


@pytest.mark.parametrize(
    "text",
    [
        '{"a:b": "http://c", "d" : {"e":[1, -0, 0.1, 1e-400, 1e22, 18446744073709551615, null]}}',
        '{"a": 1, "b": {"c": 1, "c": 2}}',
        '{"a": ":", "a": 1}',
        '{"a" : "\\":", "b": [{"c": 1}, {"c": 1, "d": 2, "c": 3}]}',
        '{"a": [NaN, Infinity, -Infinity, 1e400]}',
        '\ufeff{"a": "\u00fc"}',
        '{"a": "\\ud800"}',
        '{"a": "\n"}',
        '{"a": [1,]}',
        '{"a": 01}',
        "",
        '{"a": 1} {}',
        '{"a": 1',
        "[" * 99999,
        "9" * 5000,
    ],
)
def test_both_readers_of_json_agree(text, monkeypatch):
    orjson = pytest.importorskip("orjson")
    outcomes = []
    for module in (orjson, None):
        monkeypatch.setitem(sys.modules, "orjson", module)
        try:
            outcomes.append(repr(ev.parse_json(text.encode())))
        except (ValueError, RecursionError) as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    assert outcomes[0] == outcomes[1]


def test_orjson_reads_what_it_may_where_it_is_installed(monkeypatch):
    pytest.importorskip("orjson")
    monkeypatch.setattr(ev, "unique_keys", None)
    for text in ('{"a": {"b": [1, 2.5]}}', '{"a" : [{"url": "https://x"}, {"url":"b: c"}]}'):
        assert ev.parse_json(text.encode()) == json.loads(text)
    assert gc.isenabled()


def test_durations_of_other_subsets_are_read_by_the_same_rules():
    truth = annotations([("v", "x", (0, 1))])
    truth["database"]["w"] = {"subset": "training", "duration": 10**400}
    with pytest.raises(ev.InputError, match="'w': expected subset"):
        ev.evaluate(truth, {"results": {}})
    truth["database"] = {"w": {"subset": "training", "duration": 9}, **truth["database"]}
    truth["database"]["w"]["duration"], truth["database"]["v"]["duration"] = 9, 4
    predicted = result([("v", "x", (0, 1), 1.0)])
    (row,) = [r for r in ev.evaluate(truth, predicted)["by_length"] if r["segments"]]
    assert row["from"] == 0.2  # 1 of 4 s


@pytest.mark.parametrize("factor, word", [(1 / 40, "in seconds"), (25, "in seconds"), (1, None)])
def test_other_units_than_seconds_are_noticed(factor, word):
    annotation = {"segment": [10, 20], "label": "x"}
    truth = ground_truth(subset="validation", duration=40, annotations=[annotation])
    result = {"label": "x", "score": 1, "segment": [10 * factor, 20 * factor]}
    notes = ev.evaluate(truth, {"results": {"a": [result]}})["warnings"]
    assert any(word in note for note in notes) if word else not notes


def ground_truth(**info):
    return {"database": {"a": info}}


@pytest.mark.parametrize(
    "truth, message",
    [
        ({"results": {}}, 'no "database"'),
        (ground_truth(annotations=[]), "video 'a': expected subset"),
        (ground_truth(subset=["validation"], annotations=[]), "video 'a': expected subset"),
        (ground_truth(subset="validation", annotations=3), r"expected {video: .*, got {'a': 3}"),
        (annotations(ONE, subset="test"), "no video of subset 'validation'; there are 'test'"),
        (ground_truth(subset="validation", annotations=[]), "no annotation"),
        (annotations([("a", "x", (0, math.nan))]), "ground truth: video 'a', entry 0"),
        (
            ground_truth(subset="validation", annotations=[{"label": 1}]),
            "entry 0: expected .* segment",
        ),
        (annotations(ONE, {"a": "long"}), "video 'a': expected .*duration .*'long'"),
        (annotations(ONE, {"a": [1, 2]}), r"video 'a': expected .*duration .*\[1, 2\]"),
    ],
)
def test_bad_ground_truth(truth, message):
    with pytest.raises(ev.InputError, match=message):
        ev.evaluate(truth, {"results": {}})


def test_bad_options():
    for thresholds in ([], [0.0], [1.5], [math.nan], 0.5):
        with pytest.raises(ev.InputError, match="thresholds must be"):
            ev.evaluate(annotations(ONE), {"results": {}}, thresholds=thresholds)
    for options in ({"ar": [0]}, {"ar": [5, 2.5]}, {"recall": [-1]}, {"ar": [10**9]}):
        with pytest.raises(ev.InputError, match="whole numbers from 1"):
            ev.evaluate(annotations(ONE), {"results": {}}, **options)
    with pytest.raises(ev.InputError, match='no "results"'):
        ev.evaluate(annotations(ONE), {"a": []})


HIT = ("a", "x", (0, 10), 0.8)


@pytest.mark.parametrize(
    "gt, pred, note, expected",
    [
        (ONE, [("a", "jump", (0, 1), 0.9), HIT], r"1 of 2 predictions have 1 label \(jump\)", 1),
        (ONE, [("q", "x", (0, 10), 0.9), HIT], r"1 of 2 predictions have 1 video \(q\)", 0.5),
        (ONE, [("a", "x", (10, 0), 0.9), HIT], "1 of 2 segments end before.*'a', entry 0", 0.5),
        ([*ONE, ("a", "x", (9, 1))], [HIT, ("a", "x", (1, 9), 0.7)], "1 of 2 segments end", 0.5),
    ],
)
def test_one_counted_warning_and_scoring_goes_on(gt, pred, note, expected):
    out = ev.evaluate(annotations(gt), result(pred), thresholds=[0.5])
    assert len(out["warnings"]) == 1 and re.search(note, out["warnings"][0])
    assert ev.report(out).endswith(f"\nwarning: {out['warnings'][0]}")
    assert out["average_mAP"] == expected


@pytest.mark.parametrize("unknown", [None, math.nan])
def test_strings_and_missing_durations_are_accepted(unknown):
    rows = [("a", "x", ("0.5", "2.5")), ("b", "x", ("1", "2"))]
    truth = annotations(rows, {"a": unknown, "b": "0"})
    found = {"results": {"a": [entry(score="0.25", segment=["0.5", 2.5])]}}
    out = ev.evaluate(truth, found)
    assert out["average_mAP"] == 0.5
    assert not any(row["segments"] for row in out["by_length"])
    assert out["warnings"] == ["2 of the videos lack a duration: no mAP by length"]


# ----------------------------------------------------------------------------------------- program


def write(path, data):
    path.write_text(json.dumps(data))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Return the options that name a ground truth of three videos and a result of two."""
    gt = write(tmp_path / "gt.json", annotations([(v, "x", (0, 10)) for v in "abc"]))
    rows = [("a", "x", (0, 10), 1), ("b", "x", (0, 8), 0.5)]
    pred = write(tmp_path / "pred.json", result(rows, class_source="file C"))
    return ["--gt", gt, "--pred", pred]


def test_program(tmp_path, files, capsys):
    out = tmp_path / "out" / "m.json"
    command = [*files, "--tiou", "0.5:0.9:0.1", "--ar", "--json", str(out)]
    ev.main(command)
    text = capsys.readouterr().out
    metrics = json.loads(out.read_text())
    assert metrics.pop("made_by") == ev.MARK
    # At full precision.
    assert metrics == ev.evaluate(files[1], files[3], thresholds=np.linspace(0.5, 0.9, 5), ar=True)
    assert metrics["mAP"] == {"0.5": 2 / 3, "0.6": 2 / 3, "0.7": 2 / 3, "0.8": 2 / 3, "0.9": 1 / 3}
    assert "evaluated 2 of 3 ground-truth videos" in text
    assert "class labels from: file C" in text
    for words in ("66.67", "the 2 with predictions", "double detection", "AR@100", "by length"):
        assert words in text
    assert ev.report(metrics) + "\n" == text
    options = ["--ar", "20", "200", "--recall", "1", "--no-interpolation", "--json", str(out)]
    ev.main([*files, *options])
    text = capsys.readouterr().out
    for words in ("AR@20 ", "AR@200", "| R@1x ", "not interpolated"):
        assert words in text
    # Its own file is replaced.
    ev.main([*files, "--json", str(out)])
    assert "AR" not in json.loads(out.read_text())


def test_report_by_hand():
    metrics = score([*ONE, ("a", "x", (20, 30))], [("a", "x", (0, 10), 1)], (0.5, 0.7))
    assert ev.report(metrics).splitlines()[3:6] == [
        "| mAP (%) at tIoU        |   0.5 |   0.7 | average |",
        "|------------------------|------:|------:|--------:|",
        "| all videos             | 50.00 | 50.00 |   50.00 |",
    ]


@pytest.mark.parametrize("name", ["gt.json", "pred.json", "metrics.json", "notes.txt", "folder"])
def test_a_file_of_somebody_else_is_not_replaced(tmp_path, files, name):
    run = ev.evaluate(files[1], files[3]) | {"seed": 0, "seconds": 1.5}
    write(tmp_path / "metrics.json", run)
    (tmp_path / "notes.txt").write_text("scored with python evaluate.py --json metrics.json")
    (tmp_path / "folder").mkdir()
    path = tmp_path / name
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(SystemExit, match=f"^evaluate.py: .*{name} already exists"):
        ev.main([*files, "--json", str(path)])
    assert before == (path.read_bytes() if path.is_file() else None)


def test_program_errors(tmp_path, files, capsys):
    cut = tmp_path / "cut.json"
    cut.write_text(Path(files[3]).read_text()[:-20])
    for options, message in (
        (["--pred", str(cut)], "cut.json cannot be read as JSON"),
        (["--subset", "test"], "no video of subset 'test'"),
        (["--pred", str(tmp_path / "none.json")], "none.json cannot be read"),
        (["--json", str(cut / "out.json")], "out.json cannot be written"),
    ):
        with pytest.raises(SystemExit, match=f"^evaluate.py: .*{message}"):
            ev.main([*files, *options])
    for options in (
        [],
        files[:2],
        [*files, "--tiou", "0.5:x:1"],
        [*files, "--tiou", "0.5:0.9:0.3"],
    ):
        with pytest.raises(SystemExit) as stop:
            ev.main(options)
        assert stop.value.code == 2
    unknown = write(tmp_path / "unknown.json", result([("q", "x", (0, 1), 1.0)]))
    ev.main([*files, "--pred", unknown])
    assert "warning: 1 of 1 predictions have 1 video (q)" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough_ends_it_quietly(tmp_path, files):
    """The pipe is closed before anything is written, as by `| head`; the file is written."""
    read, write_end = os.pipe()
    os.close(read)
    out = tmp_path / "out.json"
    process = Process("evaluate.py", *files, "--json", out, stdout=write_end)
    os.close(write_end)
    assert (process.wait(), process.read(2)) == (-signal.SIGPIPE, "")
    assert json.loads(out.read_text())["mAP"]


def test_module_stands_alone(tmp_path, files):
    """A copy in an empty folder runs, also on a terminal without the letters of a video's name."""
    shutil.copy(ROOT / "evaluate.py", tmp_path)
    unknown = write(tmp_path / "unknown.json", result([("夏", "x", (0, 1), 1.0)], class_source="é"))
    command = [sys.executable, "evaluate.py", *files, "--pred", unknown]
    env = os.environ | {"PYTHONPATH": "", "PYTHONIOENCODING": "ascii"}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert run.returncode == 0
    assert "class labels from: ?" in run.stdout


def test_results_are_read_as_they_are_scored(tmp_path):
    path = tmp_path / "r.json"
    results = {"v": [{"label": "a", "score": 0.5, "segment": [0, 1]}]}
    ev.save_results(results, path, videos={"v": {"path": "v.mp4", "duration": 2.0}})
    assert ev.load_results(path) == (results, {"videos": {"v": {"path": "v.mp4", "duration": 2.0}}})
    path.write_text(json.dumps({"results": results}))
    assert ev.load_results(path) == (results, {})
    path.write_text(json.dumps({"results": {"v": [{"label": "a", "score": 0.5, "segment": [0]}]}}))
    with pytest.raises(ev.InputError, match="entry 0: expected label"):
        ev.load_results(path)
    for external in ([1], {"videos": 5}, {"videos": {"v": 1}}, {"videos": {"v": {"path": "x"}}}):
        path.write_text(json.dumps({"results": results, "external_data": external}))
        with pytest.raises(ev.InputError, match="external_data is not what localize"):
            ev.load_results(path)


@pytest.mark.parametrize("names", [["a", None], ["a", ["b"]], {"a": 0, "b": 1}, 5])
def test_class_names_of_other_kinds_are_refused(names):
    with pytest.raises(ev.InputError, match='"class" must be a list of names'):
        ev.load_class_scores({"results": {"v": [0.1, 0.2]}, "class": names}, ["v"])
