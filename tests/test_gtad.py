"""gtad.py against brute-force loops, the materialising head and hand-worked numbers."""

import math
import threading
from fractions import Fraction

import pytest
import torch

from benchmarks.gtad_materialised import materialised
from gtad import (
    GTAD,
    Targets,
    anchor_grid,
    decode,
    load_official,
    loss_weights,
    losses,
    make_targets,
    neighbour_graph,
    sgalign,
)

SMALL = {"in_channels": 8, "hidden": 16, "gcn_width": 8, "gcn_groups": 4, "map_hidden": (12, 8)}
THUMOS = {"inner_bins": 16, "context_bins": 16, "kernel": 3, "durations": 6}


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return GTAD(**{**SMALL, **changes})


# --------------------------------------------------------------------------------- SGAlign, graph


def region_average(s, d, L, bins):
    """{(bin, snippet): weight} of one anchor, point by point from the definition, in fractions."""
    inside = s + d < L
    start = Fraction(2 * s - d - 1, 2) if inside else Fraction(0)
    length = Fraction(2 * d + 1) if inside else Fraction(1)
    points = math.ceil(length / bins)
    weights = {}
    for b in range(bins):
        for i in range(points):
            p = start + length / bins * (b + Fraction(2 * i + 1, 2 * points))
            if p < -1 or p > L:
                continue
            p = min(max(p, Fraction(0)), Fraction(L - 1))
            low = math.floor(p)
            for snippet, share in ((low, 1 - (p - low)), (low + 1, p - low)):
                if share:
                    weights[b, snippet] = weights.get((b, snippet), 0) + share / points
    return weights


@pytest.mark.parametrize("L, D", [(7, 7), (13, 5), (21, 21), (4, 6)])
@pytest.mark.parametrize("bins", [32, 4, 16, 1, 5])
def test_sgalign_is_its_definition(L, D, bins):
    s, d, _ = (index.flatten() for index in anchor_grid(L, D))
    found = [{} for _ in s]
    entries = (part.tolist() for part in sgalign(s, d, L, bins))
    for anchor, b, snippet, value in zip(*entries, strict=True):
        assert (b, snippet) not in found[anchor]
        found[anchor][b, snippet] = value
    for anchor, weights in enumerate(found):
        expected = region_average(int(s[anchor]), int(d[anchor]), L, bins)
        expected = {key: float(value) for key, value in expected.items()}
        assert weights == pytest.approx(expected, abs=1e-14)


def test_neighbours_are_nearest_itself_first_ties_to_the_lower_index():
    x = torch.tensor([0.0, 1, 2, 3, 10]).view(1, 5, 1)
    nearest = neighbour_graph(x, 3).argmax(3)[0].t()
    assert nearest.tolist() == [[0, 1, 2], [1, 0, 2], [2, 1, 3], [3, 2, 1], [4, 3, 2]]
    nearest = neighbour_graph(torch.zeros(1, 4, 2), 3).argmax(3)[0].t()
    assert nearest.tolist() == [[0, 1, 2], [1, 0, 2], [2, 0, 1], [3, 0, 1]]
    assert neighbour_graph(x[:, :2], 3).shape == (1, 2, 2, 2)


# ------------------------------------------------------------------------------------------- head


@pytest.mark.parametrize(
    "settings, L",
    [
        ({}, 9),
        ({}, 24),
        (THUMOS, 11),
        (THUMOS, 24),
        ({"durations": 5}, 12),
        ({"durations": 9}, 7),
        ({"map_hidden": (130, 8)}, 24),
        ({"map_hidden": (1, 8)}, 9),
    ],
)
def test_folded_head_is_the_materialised_one(settings, L):
    """Outputs and all gradients; with 24 snippets the alignment is sparse, with fewer dense."""
    head = small(**settings).double()
    x = torch.randn(2, 8, L, dtype=torch.float64, requires_grad=True)
    inputs = [x, *head.parameters()]
    outputs = head(x)
    expected = materialised(head, x)
    assert outputs[2].shape == (2, 2, settings.get("durations", L), L)
    upstream = [torch.randn_like(output) for output in outputs]
    outputs += torch.autograd.grad(outputs, inputs, upstream)
    expected += torch.autograd.grad(expected, inputs, upstream)
    for found, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("settings, L", [({}, 12), ({}, 24), (THUMOS, 13)])
def test_one_video_equals_its_row_in_a_batch(settings, L):
    head = small(**settings)
    x = torch.randn(2, 8, L)
    for both, first, second in zip(head(x), head(x[:1]), head(x[1:]), strict=True):
        torch.testing.assert_close(both, torch.cat([first, second]), rtol=1e-5, atol=1e-6)


def test_any_number_of_snippets_with_the_same_weights():
    head = small()
    before = set(head.state_dict())
    for L in (25, 2, 50):
        with torch.inference_mode():  # what it keeps must serve training afterwards
            head(torch.randn(1, 8, L))
        start, end, map = head(torch.randn(1, 8, L))
        assert start.shape == end.shape == (1, L) and map.shape == (1, 2, L, L)
        assert all(output.min() >= 0 and output.max() <= 1 for output in (start, end, map))
        map.sum().backward()
    assert set(head.state_dict()) == before
    assert sum(p.numel() for p in GTAD(in_channels=400).parameters()) == 5563268


@pytest.mark.parametrize("settings, L", [({}, 8), ({}, 24), (THUMOS, 24)])
def test_bfloat16_autocast(settings, L):
    head = small(**settings)
    x = torch.randn(2, 8, L)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head(x)
    for found, wanted in zip(outputs, head(x), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.02)
    sum(output.sum() for output in outputs).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("L", [8, 24])
def test_gradients_of_large_maps_take_the_place_of_their_values(L):
    """So what a step leaves of the map's rows is kept once, and a second backward is an error."""
    head = small()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        map = head(torch.randn(2, 8, L))[2]
    rows = 2 * (L * (L + 1) // 2 + 1)  # anchors of two videos, and what stands for other cells
    assert sorted(x.shape[1] for x in saved if x.dim() == 2 and len(x) == rows) == [2, 8, 8, 8, 12]
    wide = [x.data_ptr() for x in saved if x.numel() == rows * 12]
    assert len(set(wide)) == 1
    map = head(torch.randn(2, 8, L))[2]
    map.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        map.sum().backward()


def test_wrong_features_are_named():
    with pytest.raises(ValueError, match=r"\(2, 100, 8\), expected \(B, 8, L\)"):
        small()(torch.randn(2, 100, 8))


def official_shapes(C=400, bins=36, kernel=1):
    """Keys and shapes of a release's checkpoint, written out here once more."""

    def gcnext(name):
        return {
            f"{name}.tconvs.0": (128, 256, 1),
            f"{name}.tconvs.2": (128, 4, 3),
            f"{name}.tconvs.4": (256, 128, 1),
            f"{name}.sconvs.0": (128, 512, 1, 1),
            f"{name}.sconvs.2": (128, 4, 1, 1),
            f"{name}.sconvs.4": (256, 128, 1, 1),
        }

    weights = {
        "backbone1.0": (256, C // 4, 3),
        **gcnext("backbone1.2"),
        **gcnext("backbone2.0"),
        **gcnext("regu_s.0"),
        "regu_s.1": (1, 256, 1),
        **gcnext("regu_e.0"),
        "regu_e.1": (1, 256, 1),
        "localization.0": (512, 256 * bins, 1, 1),
        "localization.2": (128, 512, 1, 1),
        "localization.4": (128, 128, kernel, kernel),
        "localization.6": (128, 128, kernel, kernel),
        "localization.8": (2, 128, 1, 1),
    }
    biases = {f"{key}.bias": shape[:1] for key, shape in weights.items()}
    return {f"{key}.weight": shape for key, shape in weights.items()} | biases


@pytest.mark.parametrize(
    "shapes, arguments, L",
    [
        (official_shapes(), {}, 9),
        (official_shapes(2048, 32, 3), {"inner_bins": 16, "durations": 4}, 7),
    ],
)
def test_official_checkpoint(shapes, arguments, L):
    torch.manual_seed(0)
    state = {f"module.{key}": torch.randn(shape) * 0.02 for key, shape in shapes.items()}
    head = load_official(state, **arguments)
    assert {key: tuple(value.shape) for key, value in head.state_dict().items()} == shapes
    x = torch.randn(1, head.backbone1[0].in_channels, L)
    for found, wanted in zip(head(x), materialised(head, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_official_checkpoint_that_does_not_fit():
    state = {key: torch.zeros(shape) for key, shape in official_shapes().items()}
    wrong = {**state, "extra": torch.zeros(1)}
    del wrong["regu_e.1.bias"]
    with pytest.raises(RuntimeError, match=r'(?s)Missing.*"regu_e\.1\.bias".*Unexpected.*"extra"'):
        load_official(wrong)
    with pytest.raises(KeyError, match=r"backbone1\.0\.weight"):
        load_official({"state_dict": state})
    with pytest.raises(ValueError, match="inner_bins=36"):
        load_official(state, inner_bins=36)


# ---------------------------------------------------------------------------------------- targets


def test_targets_by_hand():
    """Four snippets, one segment over the middle two; and a video without any."""
    targets = make_targets([torch.tensor([[0.25, 0.75]]), torch.zeros(0, 2)], 4)
    third = 1 / 3
    rows = [[0, 0.5, 0.5, 0], [third, 1, third, 0], [2 * third, 2 * third, 0, 0], [0.5, 0, 0, 0]]
    torch.testing.assert_close(targets.iou, torch.stack([torch.tensor(rows), torch.zeros(4, 4)]))
    assert targets.start.tolist() == [[1, 1, 0.5, 0], [0, 0, 0, 0]]
    assert targets.end.tolist() == [[0, 0.5, 1, 1], [0, 0, 0, 0]]
    expected = [[True] * 4, [True] * 3 + [False], [True] * 2 + [False] * 2, [True] + [False] * 3]
    assert targets.valid.tolist() == expected


def overlap(a, b, c, d):
    return max(0, min(b, d) - max(a, c))


def test_targets_against_loops_at_other_durations():
    torch.manual_seed(0)
    L, D = 6, 4
    segments = [torch.rand(n, 2).double().sort(dim=1).values * 1.2 - 0.1 for n in (3, 1, 0)]
    targets = make_targets(segments, L, D)
    for v, annotated in enumerate(segments):
        clipped = annotated.clamp(0, 1).tolist()
        for d in range(D):
            for s in range(L):
                a, b = s / L, (s + d + 1) / L
                shared = [overlap(a, b, e, f) for e, f in clipped]
                lengths = [f - e for e, f in clipped]
                ious = [o / (b - a + n - o) for o, n in zip(shared, lengths, strict=True)]
                expected = max(ious, default=0) if s + d < L else 0
                assert targets.iou[v, d, s].item() == pytest.approx(expected, abs=1e-12)
        for i in range(L):
            low, high = (i - 0.5) / L, (i + 1.5) / L
            for found, side in ((targets.start, 0), (targets.end, 1)):
                places = [segment[side] for segment in clipped]
                shares = [overlap(p - 1.5 / L, p + 1.5 / L, low, high) / (2 / L) for p in places]
                assert found[v, i].item() == pytest.approx(max(shares, default=0), abs=1e-12)


@pytest.mark.parametrize("wrong", [[[0.5, 0.2]], [[0.1, 0.2, 0.3]], [0.1, 0.2], [[math.nan, 1.0]]])
def test_segments_of_other_forms_are_refused(wrong):
    with pytest.raises(ValueError, match="start <= end"):
        make_targets([torch.tensor(wrong)], 4)


# ----------------------------------------------------------------------------------------- losses


def hand_targets():
    """Two snippets, two durations; the last cell is not valid."""
    iou = torch.tensor([[[0.95, 0.5], [0.2, 0.0]]])
    valid = torch.tensor([[True, True], [True, False]])
    return Targets(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.6]]), iou, valid)


def test_losses_by_hand():
    targets = hand_targets()
    weights = loss_weights(targets, generator=torch.Generator().manual_seed(0))
    assert weights.start.tolist() == [[0.5, 0.5]] and weights.end.tolist() == [[0.5, 0.5]]
    assert weights.classification.tolist() == [[[0.5, 0.25], [0.25, 0]]]  # 1 positive, 2 negatives
    one_cell_a_band = torch.tensor([[[1, 1], [1, 0]]]) / 6  # all kept
    torch.testing.assert_close(weights.regression, one_cell_a_band)
    map = torch.tensor([[[[0.75, 0.5], [0.6, 0.9]], [[0.7, 0.2], [0.4, 0.9]]]])
    terms = losses(torch.tensor([[0.8, 0.4]]), torch.tensor([[0.3, 0.5]]), map, targets, weights)
    node = -0.5 * sum(math.log(p) for p in (0.8, 0.6, 0.7, 0.5))
    assert terms["node"].item() == pytest.approx(node)
    assert terms["regression"].item() == pytest.approx((0.2**2 + 0 + 0.4**2) / 6)
    classification = -0.5 * math.log(0.7) - 0.25 * math.log(0.8 * 0.6)
    assert terms["classification"].item() == pytest.approx(classification)


def test_class_balance_is_the_published_ratio():
    """N / N_pos = r: r/2 for positives, r/(2(r - 1)) for negatives, mean over N."""
    targets = make_targets([torch.tensor([[0.1, 0.4]]), torch.tensor([[0.3, 0.9]])], 10)
    weights = loss_weights(targets)
    positive = targets.start > 0.5
    ratio = positive.numel() / positive.sum()
    expected = torch.where(positive, ratio / 2, ratio / (2 * (ratio - 1))) / positive.numel()
    torch.testing.assert_close(weights.start, expected)
    cells = targets.valid.expand_as(targets.iou)
    positive = targets.iou > 0.9
    ratio = cells.sum() / positive.sum()
    expected = torch.where(positive, ratio / 2, ratio / (2 * (ratio - 1))) * cells / cells.sum()
    torch.testing.assert_close(weights.classification, expected)


def test_random_subset():
    targets = make_targets([torch.tensor([[0.2, 0.5]])] * 40, 20)

    def draw(seed):
        return loss_weights(targets, generator=torch.Generator().manual_seed(seed)).regression

    kept = draw(0) > 0
    iou = targets.iou
    high = iou > 0.7
    middle = (iou > 0.3) & (iou <= 0.7)
    low = (iou > 0) & (iou <= 0.3)
    assert kept[high].all() and not kept[iou == 0].any()
    for band in (middle, low):
        assert band.sum() > high.sum()
        assert abs((kept & band).sum() - high.sum()) < 4 * math.sqrt(high.sum())
    torch.testing.assert_close(draw(0)[kept], torch.full((kept.sum(),), 0.5 / kept.sum().item()))
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def filled(value, L=4, B=1):
    valid = torch.ones(L, L, dtype=torch.bool)
    row = torch.full((B, L), value)
    return Targets(row, row, torch.full((B, L, L), value), valid)


@pytest.mark.parametrize(
    "targets",
    [
        make_targets([torch.zeros(0, 2)], 4),
        make_targets([torch.tensor([[0.3, 0.6]])], 4),
        make_targets([torch.tensor([[0.0, 0.88]])], 4),
        filled(1.0),
        filled(0.8),
        filled(0.0, B=2),
    ],
    ids=["no segment", "none > 0.7", "none > 0.9", "all positive", "all between", "two empty"],
)
@pytest.mark.parametrize("scores", [None, 0.0, 1.0])
def test_finite_whatever_the_targets(targets, scores):
    B, L = targets.start.shape
    if scores is None:
        head = small()
        outputs = head(torch.randn(B, 8, L))
        parameters = list(head.parameters())
    else:
        shapes = [(B, L), (B, L), (B, 2, L, L)]
        parameters = outputs = [torch.full(shape, scores, requires_grad=True) for shape in shapes]
    terms = losses(*outputs, targets, loss_weights(targets))
    (terms["node"] + 10 * terms["regression"] + terms["classification"]).backward()
    assert all(term.isfinite() for term in terms.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in parameters)


def test_absent_classes():
    """Without positives the negatives keep their half; without a cell > 0.7 no regression."""
    weights = loss_weights(filled(0.2))
    assert weights.start.sum().item() == weights.classification.sum().item() == pytest.approx(0.5)
    assert weights.regression.sum() == 0
    with pytest.raises(ValueError, match=r"shard \(2, 2\)"):
        loss_weights(filled(0.2), shard=(2, 2))


def test_two_ranks_of_two_videos_are_one_rank_of_four():
    """Weights of the ranks, halved by the averaging of gradients, are those of the global batch."""
    rows = ([[0.1, 0.5]], [[0.0, 0.3], [0.6, 0.9]], [[0.2, 0.2]], [[0.42, 0.55]])
    segments = [torch.tensor(row) for row in rows]
    barrier = threading.Barrier(2, timeout=20)
    sent = [None, None]
    results = [None, None]

    def weights_of(segments, **options):
        generator = torch.Generator().manual_seed(3)
        return loss_weights(make_targets(segments, 16), generator=generator, **options)

    def rank(r):
        def mean(counts):
            sent[r] = counts
            barrier.wait()
            average = (sent[0] + sent[1]) / 2
            barrier.wait()
            return average

        results[r] = weights_of(segments[2 * r : 2 * r + 2], shard=(r, 2), reduce=mean)

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for whole, first, second in zip(weights_of(segments), *results, strict=True):
        torch.testing.assert_close(torch.cat([first, second]) / 2, whole)


# --------------------------------------------------------------------------------------- decoding


def test_bins_of_a_snippet():
    """A start at snippet 2.25 is near 0.75 to 3.75, of which bin [0.5, 1.5] has three quarters."""
    segments = [torch.tensor([[0.225, 1.0]]).double()]
    start = small(bin_width=1.0).make_targets(segments, 10).start[0]
    assert start.tolist() == pytest.approx([0, 0.75, 1, 1, 0.25, 0, 0, 0, 0, 0])
    start = small().make_targets(segments, 10).start[0]
    assert start.tolist() == pytest.approx([0.375, 0.875, 1, 0.625, 0.125, 0, 0, 0, 0, 0])


def decode_by_loop(start, end, map, every_pair, longest):
    """Proposals of one video, best first: [(score, s, e)]."""
    L, D = len(start), map.shape[1]

    def kept(score, i):
        peak = 0 < i < L - 1 and score[i - 1] < score[i] > score[i + 1]
        return peak or score[i] > 0.5 * max(score)

    starts = [i for i in range(L) if every_pair or i == 0 or kept(start, i)]
    ends = [i for i in range(L) if every_pair or i == L - 1 or kept(end, i)] + [L]
    found = []
    for s in starts:
        for e in ends:
            if s < e <= s + min(D, longest or D):
                score = map[1, e - s - 1, s] * map[0, e - s - 1, s]
                found.append((float(score), s, e))
    return sorted(found, reverse=True)


@pytest.mark.parametrize(("every_pair", "longest"), [(False, None), (True, None), (True, 4)])
@pytest.mark.parametrize("L, D", [(9, 9), (12, 5), (2, 2), (1, 1)])
def test_decoding_against_a_loop(L, D, every_pair, longest):
    torch.manual_seed(L)
    start, end = torch.rand(2, 3, L).double()
    map = torch.rand(3, 2, D, L).double()
    head = small(durations=D, every_pair=every_pair, longest=longest)
    segments, scores, valid = head.decode(start, end, map)
    videos = zip(start, end, map, strict=True)
    expected = [decode_by_loop(*video, every_pair, longest) for video in videos]
    assert valid.sum(dim=1).tolist() == [len(found) for found in expected]
    assert scores.shape[1] == max(len(found) for found in expected)
    for v, found in enumerate(expected):
        wanted = torch.tensor(found, dtype=torch.float64)
        torch.testing.assert_close(scores[v][valid[v]], wanted[:, 0])
        torch.testing.assert_close(segments[v][valid[v]], wanted[:, 1:] / L)
        assert (scores[v][~valid[v]] == 0).all()


def test_the_last_boundary_can_be_reached():
    L = 6
    start, end = torch.full((2, 1, L), 0.01)
    start[0, 2] = 1
    end[0, 5] = 1
    map = torch.full((1, 2, L, L), 0.1)
    map[0, :, 3, 2] = 1  # snippets 2 .. 5
    segments, scores, _ = decode(start, end, map)
    assert segments[0, 0].tolist() == pytest.approx([2 / 6, 1.0]) and scores[0, 0] == 1


def test_overfitting_puts_the_true_segments_on_top():
    torch.manual_seed(0)
    truth = [torch.tensor([[0.25, 0.5]]), torch.tensor([[0.5, 1.0]])]
    x = torch.randn(2, 8, 16) * 0.3
    x[0, 0, 4:8] += 2
    x[1, 1, 8:] += 2
    head = small(inner_bins=8, map_hidden=(32, 16))
    targets = make_targets(truth, 16)
    optimizer = torch.optim.Adam(head.parameters(), 5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        terms = losses(*head(x), targets, loss_weights(targets, generator=generator))
        optimizer.zero_grad()
        (terms["node"] + 10 * terms["regression"] + terms["classification"]).backward()
        optimizer.step()
    segments, scores, _ = decode(*head(x))
    torch.testing.assert_close(segments[:, :1], torch.stack(truth))
    assert scores[:, 0].min() > 0.8
