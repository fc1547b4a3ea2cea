"""bmn.py against loops over sampling points, targets and pairs, and the network with its whole map
in memory; soft-NMS with its release's thresholds."""

import math

import pytest
import torch

from benchmarks.bmn_materialised import materialised, pair_weights
from bmn import BMN, load_official, sample
from evaluate import soft_nms
from gtad import loss_weights, losses

SMALL = {"in_channels": 8, "hidden": 12, "map_hidden": (10, 6), "samples": 32}


def small(**changes):
    torch.manual_seed(0)
    return BMN(**{**SMALL, **changes})


@pytest.mark.parametrize("L", [1, 7, 20])
@pytest.mark.parametrize("samples", [32, 5])
def test_sampling_is_its_definition(L, samples):
    s, e = torch.triu_indices(L, L)
    found = torch.zeros(len(s), samples, L, dtype=torch.float64)
    pair, b, snippet, value = sample(s, e, L, samples)
    found.index_put_((pair, b, snippet), value, accumulate=True)
    pairs = zip(s.tolist(), e.tolist(), strict=True)
    expected = torch.stack([pair_weights(first, last, L, samples) for first, last in pairs])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("L", [6, 20])
def test_folded_network_is_the_materialised_one(L):
    """Outputs and all gradients; with 20 snippets the sampling is sparse, with 6 dense."""
    head = small().double()
    x = torch.randn(2, 8, L, dtype=torch.float64, requires_grad=True)
    inputs = [x, *head.parameters()]
    outputs = head(x)
    expected = materialised(head, x)
    upstream = [torch.randn_like(output) for output in outputs]
    outputs += torch.autograd.grad(outputs, inputs, upstream)
    expected += torch.autograd.grad(expected, inputs, upstream)
    for found, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_one_video_equals_its_row_in_a_batch():
    head = small()
    x = torch.randn(2, 8, 20)
    for both, first, second in zip(head(x), head(x[:1]), head(x[1:]), strict=True):
        torch.testing.assert_close(both, torch.cat([first, second]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("L", [6, 20])
def test_bfloat16_autocast(L):
    head = small()
    x = torch.randn(2, 8, L)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head(x)
    for found, wanted in zip(outputs, head(x), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.02)


def test_official_checkpoint():
    """Keys and shapes of the release, written out once more; a stored sample_mask is ignored."""
    shapes = {
        "x_1d_b.0": (256, 100, 3),
        "x_1d_b.2": (256, 64, 3),
        "x_1d_s.0": (256, 64, 3),
        "x_1d_s.2": (1, 256, 1),
        "x_1d_e.0": (256, 64, 3),
        "x_1d_e.2": (1, 256, 1),
        "x_1d_p.0": (256, 256, 3),
        "x_3d_p.0": (512, 256, 32, 1, 1),
        "x_2d_p.0": (128, 512, 1, 1),
        "x_2d_p.2": (128, 128, 3, 3),
        "x_2d_p.4": (128, 128, 3, 3),
        "x_2d_p.6": (2, 128, 1, 1),
    }
    torch.manual_seed(0)
    state = {}
    for key, shape in shapes.items():
        state[f"module.{key}.weight"] = torch.randn(shape) * 0.03
        state[f"module.{key}.bias"] = torch.randn(shape[:1]) * 0.03
    head = load_official({**state, "module.sample_mask": torch.zeros(3)})
    assert {f"module.{key}" for key in head.state_dict()} == set(state)
    x = torch.randn(1, 400, 5)
    for found, wanted in zip(head(x), materialised(head.double(), x.double()), strict=True):
        torch.testing.assert_close(found, wanted.float(), rtol=0, atol=1e-5)
    del state["module.x_2d_p.6.bias"]
    with pytest.raises(RuntimeError, match=r'(?s)Missing.*"x_2d_p\.6\.bias".*Unexpected.*"more"'):
        load_official({**state, "more": torch.zeros(1)})


def test_wrong_features_are_named():
    with pytest.raises(ValueError, match=r"\(2, 20, 8\), expected \(B, 8, L\)"):
        small()(torch.randn(2, 20, 8))


def test_overfitting_puts_the_true_segments_on_top():
    """With its own targets and decoding, and the losses of gtad.py."""
    truth = [torch.tensor([[0.25, 0.5]]), torch.tensor([[0.5, 1.0]])]
    head = small(hidden=32, map_hidden=(32, 16), samples=16)
    x = torch.randn(2, 8, 16) * 0.3
    x[0, 0, 4:8] += 2
    x[1, 1, 8:] += 2
    targets = head.make_targets(truth, 16)
    optimizer = torch.optim.Adam(head.parameters(), 5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        terms = losses(*head(x), targets, loss_weights(targets, generator=generator))
        optimizer.zero_grad()
        (terms["node"] + 10 * terms["regression"] + terms["classification"]).backward()
        optimizer.step()
    segments, _, _ = head.decode(*head(x))
    torch.testing.assert_close(segments[:, :1], torch.stack(truth))


# --------------------------------------------------------------------------- targets and decoding


def overlap(a, b):
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0]))


def targets_by_loop(segments, L):
    """Start, end (L) and tIoU (D, L) of one video, by the definition in snippets."""
    near = [[0.0] * L, [0.0] * L]
    for i in range(L):
        for kind in range(2):
            windows = [(segment[kind] * L - 1.5, segment[kind] * L + 1.5) for segment in segments]
            near[kind][i] = max((overlap((i - 0.5, i + 0.5), w) for w in windows), default=0.0)
    iou = [[0.0] * L for _ in range(L)]
    for d in range(L):
        for s in range(L - d):
            for b, e in segments:
                inter = overlap((s, s + d + 1), (b * L, e * L))
                iou[d][s] = max(iou[d][s], inter / (d + 1 + (e - b) * L - inter))
    return torch.tensor(near, dtype=torch.float64), torch.tensor(iou, dtype=torch.float64)


def test_targets_worked_by_hand():
    """0.2 and 0.4 of 10 snippets are at 2 and 4; bins are a snippet wide, centred on its index."""
    targets = small().make_targets([torch.tensor([[0.2, 0.4]])], 10)
    assert targets.start[0].tolist() == [0, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert targets.end[0].tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]
    targets = small().make_targets([torch.tensor([[0.025, 1.0]]).double()], 10)
    assert targets.start[0].tolist() == pytest.approx([1, 1, 0.25, 0, 0, 0, 0, 0, 0, 0])
    assert targets.end[0].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0, 1]


def test_targets_against_a_loop():
    torch.manual_seed(0)
    segments = [torch.rand(n, 2).double().sort(1).values for n in (3, 0, 1)]
    start, end, iou, valid = small().make_targets(segments, 12)
    for b, video in enumerate(segments):
        near, expected = targets_by_loop(video.tolist(), 12)
        torch.testing.assert_close(torch.stack([start[b], end[b]]), near, rtol=0, atol=1e-12)
        torch.testing.assert_close(iou[b], expected, rtol=0, atol=1e-12)
    assert valid.sum() == 12 * 13 / 2


@pytest.mark.parametrize("L", [1, 2, 9])
def test_every_pair_is_a_proposal_with_its_boundaries_in_the_score(L):
    torch.manual_seed(L)
    start, end = torch.rand(2, 2, L).double()
    map = torch.rand(2, 2, L, L).double()
    segments, scores, valid = small().decode(start, end, map)
    assert valid.all() and scores.shape == (2, L * (L + 1) // 2)
    for b in range(2):
        found = []
        for s in range(L):
            for e in range(s + 1, L + 1):
                score = start[b, s] * end[b, min(e, L - 1)]
                score = score * map[b, 0, e - s - 1, s] * map[b, 1, e - s - 1, s]
                found.append((float(score), s / L, e / L))
        expected = torch.tensor(sorted(found, reverse=True), dtype=torch.float64)
        torch.testing.assert_close(scores[b], expected[:, 0])
        torch.testing.assert_close(segments[b], expected[:, 1:])


def nms_by_loop(segments, scores, sigma, low, high):
    """[(score, segment)] of one video, in the order in which they are picked."""
    left = list(zip(scores, segments, strict=True))
    kept = []
    while left:
        best = max(left, key=lambda item: item[0])
        left.remove(best)
        kept.append(best)
        start, end = best[1]
        for i, (score, (a, b)) in enumerate(left):
            inter = overlap((a, b), (start, end))
            tiou = inter / ((b - a) + (end - start) - inter)
            if tiou > low + (high - low) * (end - start):
                left[i] = (score * math.exp(-(tiou**2) / sigma), (a, b))
    return kept


def test_soft_nms_decays_above_a_threshold_that_grows_with_the_picked_segment():
    """[0, 0.95] is picked: above 0.5 + 0.4 * 0.95 = 0.88 of tIoU is [0, 1] (0.95), not [0, 0.4]."""
    segments = torch.tensor([[[0, 1], [0, 0.4], [0, 0.95]]], dtype=torch.float64)
    scores = torch.tensor([[0.5, 0.4, 0.6]], dtype=torch.float64)
    found, kept, _ = soft_nms(segments, scores, sigma=0.4, decay_above=(0.5, 0.9))
    assert found[0, :, 1].tolist() == [0.95, 0.4, 1]
    assert kept[0].tolist() == pytest.approx([0.6, 0.4, 0.5 * math.exp(-(0.95**2) / 0.4)])
    # Without thresholds all that overlap decay: tIoU 0.4 / 0.95 and, with [0, 0.4], 0.4.
    _, kept, _ = soft_nms(segments, scores, sigma=0.4)
    short = 0.4 * math.exp(-((0.4 / 0.95) ** 2) / 0.4)
    long = 0.5 * math.exp(-(0.95**2 + 0.4**2) / 0.4)
    assert kept[0].tolist() == pytest.approx([0.6, short, long])


def test_soft_nms_with_thresholds_against_a_loop():
    torch.manual_seed(0)
    segments = torch.rand(2, 40, 2).double().sort(2).values
    scores = torch.rand(2, 40).double()
    found, kept, _ = soft_nms(segments, scores, sigma=0.4, top_k=30, decay_above=(0.2, 0.6))
    for b in range(2):
        expected = nms_by_loop(segments[b].tolist(), scores[b].tolist(), 0.4, 0.2, 0.6)[:30]
        assert kept[b].tolist() == pytest.approx([score for score, _ in expected])
        assert found[b].tolist() == [[*segment] for _, segment in expected]
