"""Localize actions with the G-TAD head: features (B, C, L) -> start, end (B, L), map (B, 2, D, L).

Xu et al., G-TAD: Sub-Graph Localization for Temporal Action Detection, CVPR 2020, in the shape of
its release; targets, losses and decoding too. The file stands alone. The same function as the
release, weight for weight, computed lighter: everything up to the first ReLU of the localization
module is linear, so its first 1x1 convolution is applied to the L snippets before they are aligned
to the anchors, and the (9216, D, L) map of sub-graph features is never built.

    head = GTAD(in_channels=512)
    start, end, map = head(features)  # any L, the same weights
    targets = make_targets([torch.tensor([[0.2, 0.5]])], L)
    terms = losses(start, end, map, targets, loss_weights(targets))
    (terms["node"] + 10 * terms["regression"] + terms["classification"]).backward()
    segments, scores, valid = decode(start, end, map)

Legend: B videos, C channels, L snippets, D durations, N segments, K proposals, A anchors. Segments
are fractions of the video, [0, 1]. Cell (d, s) of a map is the anchor that covers snippets
s .. s + d, the segment [s/L, (s + d + 1)/L].
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@torch.no_grad()
def neighbour_graph(x: Tensor, k: int) -> Tensor:
    """Find the k nearest snippets of each snippet by Euclidean distance, itself first.

    x (B, L, C) -> (B, k, L, L) of zeros and ones: [b, j, l, m] = 1 where m is the j-th neighbour of
    l; ties go to the lower index; k is at most L. As a matrix, because graph @ x is then the gather
    and its backward a product too: no atomic additions in varying order.
    """
    x = _full(x)
    # Differences before squares: equal snippets have distance 0, not rounding noise.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")  # (B, L, L)
    distance.diagonal(dim1=1, dim2=2).fill_(-1)
    nearest = distance.sort(dim=2, stable=True).indices[:, :, :k].transpose(1, 2)  # (B, k, L)
    return x.new_zeros(*nearest.shape, x.shape[1]).scatter_(3, nearest.unsqueeze(3), 1)


def _full(x):
    """Return x in float32 at least, for what half precision would spoil."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """Apply a convolution of kernel 1 to rows (..., C)."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def relu_between(*layers: nn.Module) -> nn.Sequential:
    """Chain layers, with a ReLU between each two."""
    pairs = [(layer, nn.ReLU()) for layer in layers]
    return nn.Sequential(*itertools.chain(*pairs))[:-1]


class GCNeXt(nn.Module):
    """Graph block: ReLU(temporal stream + input + semantic stream), G-TAD, section 3.2.

    Snippets are rows. The grouped 1x1 of the semantic stream multiplies by its block-diagonal
    matrix: more arithmetic, and still faster than a grouped convolution of few channels a group.
    """

    def __init__(self, channels: int, width: int, groups: int):
        super().__init__()
        self.tconvs = relu_between(
            nn.Conv1d(channels, width, 1),
            nn.Conv1d(width, width, 3, padding=1, groups=groups),
            nn.Conv1d(width, channels, 1),
        )
        self.sconvs = relu_between(
            nn.Conv2d(2 * channels, width, 1),
            nn.Conv2d(width, width, 1, groups=groups),
            nn.Conv2d(width, channels, 1),
        )
        diagonal = torch.block_diag(*torch.ones(groups, width // groups, width // groups))
        self.register_buffer("diagonal", diagonal, persistent=False)  # (width, width)

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        """Map (B, L, C) to (B, L, C). graph: neighbour_graph(x, k)."""
        first, _, middle, _, last = self.tconvs
        temporal = middle(pointwise(first, x).relu().transpose(1, 2)).relu().transpose(1, 2)
        temporal = pointwise(last, temporal)  # (B, L, C)

        # An edge is (neighbour, self); the first 1x1 is linear, so it runs before the gather.
        first, _, middle, _, last = self.sconvs
        of_neighbour, of_self = first.weight.flatten(1).chunk(2, dim=1)  # (width, C)
        nodes = F.linear(x, of_neighbour)
        nodes = graph.flatten(1, 2).to(nodes.dtype) @ nodes
        nodes = nodes.unflatten(1, graph.shape[1:3])  # (B, k, L, width)
        edges = (nodes + F.linear(x, of_self, first.bias).unsqueeze(1)).relu()
        grouped = middle.weight.flatten(1).repeat(1, middle.groups) * self.diagonal
        semantic = pointwise(last, F.linear(edges, grouped, middle.bias).relu())
        return (temporal + x + semantic.amax(dim=1)).relu()


# ---------------------------------------------------------------------------------------- SGAlign


def anchor_grid(L: int, D: int, device=None) -> tuple[Tensor, Tensor, Tensor]:
    """Return start and duration index of each cell and whether it is in the video: (D, L) each."""
    s = torch.arange(L, device=device).expand(D, L)
    d = torch.arange(D, device=device).unsqueeze(1).expand(D, L)
    return s, d, s + d < L


def sgalign(s: Tensor, d: Tensor, L: int, bins: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return SGAlign's interpolation weights (section 3.3): anchor, bin, snippet, value of each.

    Anchor (s, d) covers n = d + 1 snippets; its region is [s - n/2, s + d + n/2] in snippet
    indices. Each of its bins is the average of g = ceil(region / bins) equally spaced points, at
    (i + 0.5)/g of the bin, linearly interpolated; a point below -1 or above L counts as zero,
    others are clamped to [0, L - 1]. Anchors with s + d >= L have the region [0, 1].

    s, d: (A,) integers on the CPU. Returns four tensors of the non-zero weights, (nnz,), values in
    float64, sorted by anchor, bin, snippet. Points are fractions of integers, so that no rounding
    decides on which side of a snippet they fall.
    """
    inside = s + d < L
    region = torch.where(inside, 2 * d + 1, 1)
    twice_start = torch.where(inside, 2 * s - d - 1, 0)
    g = (region + bins - 1) // bins  # (A,)

    # Points (P,), one after the other, group by group; a group is a bin of an anchor.
    sizes = g.repeat_interleave(bins)  # (A * bins,), the number of points of each
    begins = sizes.cumsum(0) - sizes
    groups = torch.arange(len(sizes))
    group = groups.repeat_interleave(sizes)  # (P,)
    anchor = group // bins
    nth = torch.arange(len(group)) - begins[anchor * bins]  # of the anchor's points
    g = g[anchor]
    unit = 2 * bins * g  # the denominator of `point`
    point = twice_start[anchor] * (bins * g) + (2 * nth + 1) * region[anchor]
    value = ((point >= -unit) & (point <= L * unit)) / g.double()
    point = point.clamp_min_(0).minimum((L - 1) * unit)
    snippet = point // unit
    upper = (point - snippet * unit) / unit.double() * value

    # Points of a group are at most one snippet apart: they touch g + 1 snippets, its slots.
    shift = begins + groups - snippet[begins]  # from snippet to slot
    slot = snippet + shift[group]
    values = torch.zeros(len(group) + len(groups), dtype=torch.float64)
    values.index_add_(0, slot, value - upper).index_add_(0, slot + 1, upper)
    slot = values.nonzero().squeeze(1)
    group = groups.repeat_interleave(sizes + 1)[slot]
    return group // bins, group % bins, slot - shift[group], values[slot]


class Alignment(NamedTuple):
    """Hold a fixed linear map from bins of snippets (columns) to anchors (rows), sparse or dense.

    Column snippet * bins + bin. The last row fills all cells of the map that no other row does.
    """

    cells: Tensor  # (A,) places in the flattened map of all rows but the last
    dense: Tensor | None  # (A + 1, columns)
    sparse: tuple | None  # columns (nnz,), where each row begins (A + 1,), values; its transpose


def build_alignment(entries, shape: tuple, cells: Tensor, device, dtype) -> Alignment:
    """Build the Alignment of a `shape` matrix from its row, column and value entries, (nnz,) each.

    Dense or sparse: on a CPU by measurement, equal at 20 to 25 snippets, at 100 sparse is five
    times faster. Elsewhere by arithmetic, not measured: dense products are so fast there that the
    zeros pay as long as the matrix is small. A sparse one holds at least float32.
    """
    row, column, value = entries
    if shape[0] * shape[1] <= (2**16 if device.type == "cpu" else 2**26):
        dense = torch.zeros(shape, dtype=value.dtype)
        dense.index_put_((row, column), value, accumulate=True)
        return Alignment(cells.to(device), dense.to(device, dtype), None)

    def compress(row, column, num_rows):
        order = row.int().argsort(stable=True)
        count = torch.bincount(row, minlength=num_rows)
        offsets = (count.cumsum(0) - count).int()
        values = value[order].to(torch.promote_types(dtype, torch.float32))
        parts = column[order].int(), offsets, values
        return tuple(part.to(device) for part in parts)

    sparse = compress(row, column, shape[0]), compress(column, row, shape[1])
    return Alignment(cells.to(device), None, sparse)


@functools.lru_cache(maxsize=32)
def sgalignment(L: int, D: int, bins: tuple[int, int], device, dtype) -> Alignment:
    """Return the Alignment of the valid anchors of a (D, L) map, and one row for all others.

    bins: of the two alignments, side by side in the columns: snippet * sum(bins) + bin.
    """
    # Out of inference mode, as it is kept for later calls, which may need gradients.
    with torch.inference_mode(False), torch.no_grad():
        s, d, valid = anchor_grid(L, D, "cpu")
        cells = valid.flatten().nonzero().squeeze(1)
        s = torch.cat([s[valid], torch.tensor([L])])
        d = torch.cat([d[valid], torch.tensor([0])])
        parts = []
        for count, first in zip(bins, (0, bins[0]), strict=True):
            anchor, b, snippet, value = sgalign(s, d, L, count)
            parts.append((anchor, snippet * sum(bins) + first + b, value))
        entries = [torch.cat(part) for part in zip(*parts, strict=True)]
        return build_alignment(entries, (len(s), L * sum(bins)), cells, device, dtype)


class _SparseLayer(torch.autograd.Function):
    """Compute ReLU(alignment @ y + bias), video by video in blocks of 128 channels.

    What a block needs stays in the cache that way: 2.5 times faster than 512 channels at once. The
    ReLU is inside because its gradient would be the largest tensor of the head once more.
    """

    @staticmethod
    def forward(ctx, y, bias, matrix, transpose):
        z = y.new_empty(len(y), len(matrix[1]), y.shape[2])
        for b, block in _blocks(y):
            z[b, :, block] = _sparse_product(matrix, y[b, :, block]).add_(bias[block]).relu_()
        ctx.save_for_backward(z)
        ctx.transpose = transpose
        return z

    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        grad_y = grad.new_empty(len(grad), len(ctx.transpose[1]), grad.shape[2])
        grad_bias = grad.new_zeros(grad.shape[2])
        for b, block in _blocks(grad):
            part = grad[b, :, block] * (z[b, :, block] > 0)
            grad_bias[block] += part.sum(dim=0)
            grad_y[b, :, block] = _sparse_product(ctx.transpose, part)
        return grad_y, grad_bias, None, None


def _blocks(x):
    channels = [slice(first, first + 128) for first in range(0, x.shape[2], 128)]
    return itertools.product(range(len(x)), channels)


def _sparse_product(matrix, x):
    columns, offsets, values = matrix
    return F.embedding_bag(columns, x.contiguous(), offsets, mode="sum", per_sample_weights=values)


def convolve_bins(conv: nn.Module, features: Sequence[Tensor], bins: Sequence[int]) -> Tensor:
    """Apply a convolution of sub-graph features before they are aligned: to each snippet, by bin.

    conv: its weight is (H, C * sum(bins), 1, 1), input channel * sum(bins) + bin. features: a
    (B, L, C) for each entry of bins. Returns (B, L * sum(bins), H), without the bias.
    """
    weight = conv.weight.flatten(1).t().contiguous().unflatten(0, (-1, sum(bins)))  # (C, bins, H)
    pairs = zip(features, weight.split(bins, dim=1), strict=True)
    y = torch.cat([x @ part.flatten(1) for x, part in pairs], dim=2)
    return y.unflatten(2, (sum(bins), -1)).flatten(1, 2)


def map_layers(wide: int, narrow: int, kernel: int) -> nn.Sequential:
    """Make what follows the first convolution of a map: (B, wide, D, L) -> (B, 2, D, L)."""
    middle = functools.partial(nn.Conv2d, narrow, narrow, kernel, padding=kernel // 2)
    layers = relu_between(nn.Conv2d(wide, narrow, 1), middle(), middle(), nn.Conv2d(narrow, 2, 1))
    return layers.append(nn.Sigmoid())


def score_map(layers, y: Tensor, bias: Tensor, alignment: Alignment, shape: tuple) -> Tensor:
    """Run ReLU(alignment @ y + bias), then map_layers: (B, columns, wide) -> (B, 2, *shape)."""
    D, L = shape

    def fill(z):  # (B, A + 1, H) -> (B, D, L, H): to each cell its row, or the last
        z = z[:, -1:].expand(-1, D * L, -1).index_copy(1, alignment.cells, z[:, :-1])
        return z.unflatten(1, (D, L))

    if alignment.dense is not None:
        z = (alignment.dense @ y).add_(bias).relu_()
    else:
        z = _SparseLayer.apply(_full(y), _full(bias), *alignment.sparse).to(y.dtype)
    first, _, second, _, third, _, last, _ = layers
    z = pointwise(first, z).relu_()  # (B, A + 1, narrow)
    if second.kernel_size[0] == 1:  # on rows, which are fewer than cells
        z = pointwise(third, pointwise(second, z).relu_()).relu_()
        z = fill(confidence(last, z))
    else:
        z = fill(z).permute(0, 3, 1, 2)  # channels last in memory
        z = third(second(z).relu_()).relu_()
        z = confidence(last, z.permute(0, 2, 3, 1))
    return z.permute(0, 3, 1, 2).contiguous()


def confidence(conv: nn.Module, x: Tensor) -> Tensor:
    """Return the sigmoid of a last 1x1 on rows: not in bfloat16, which would tie many proposals."""
    with torch.autocast(x.device.type, enabled=False):
        x = _full(x)
        return torch.sigmoid(F.linear(x, conv.weight.flatten(1).to(x), conv.bias.to(x)))


# ------------------------------------------------------------------------------------------- head


class GTAD(nn.Module):
    """The G-TAD head. Parameter names and shapes are those of the release.

    in_channels: C. hidden: channels of the graph blocks, gcn_width their inner width. inner_bins,
    context_bins: of the alignments of the snippets and of their neighbour means. map_hidden: the
    two widths of the localization module, kernel: of its third and fourth convolution. durations:
    D, None for D = L of the input at hand. The defaults are the ActivityNet release; THUMOS is
    inner_bins=16, context_bins=16, kernel=3, durations=64.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        hidden: int = 256,
        gcn_width: int = 128,
        gcn_groups: int = 32,
        stem_groups: int = 4,
        neighbours: int = 3,
        inner_bins: int = 32,
        context_bins: int = 4,
        map_hidden: Sequence[int] = (512, 128),
        kernel: int = 1,
        durations: int | None = None,
    ):
        super().__init__()
        self.neighbours = neighbours
        self.bins = (inner_bins, context_bins)
        self.durations = durations
        block = functools.partial(GCNeXt, hidden, gcn_width, gcn_groups)
        stem = nn.Conv1d(in_channels, hidden, 3, padding=1, groups=stem_groups)
        self.backbone1 = nn.Sequential(stem, nn.ReLU(), block())
        self.backbone2 = nn.Sequential(block())
        self.regu_s = nn.Sequential(block(), nn.Conv1d(hidden, 1, 1), nn.Sigmoid())
        self.regu_e = nn.Sequential(block(), nn.Conv1d(hidden, 1, 1), nn.Sigmoid())
        first = nn.Conv2d(hidden * sum(self.bins), map_hidden[0], 1)
        self.localization = nn.Sequential(first, nn.ReLU(), *map_layers(*map_hidden, kernel))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (B, C, L) to start, end (B, L) and map (B, 2, D, L), in [0, 1], at least float32."""
        stem, _, block = self.backbone1
        if x.dim() != 3 or x.shape[1] != stem.in_channels:
            raise ValueError(f"GTAD got {tuple(x.shape)}, expected (B, {stem.in_channels}, L)")
        x = stem(x).relu().transpose(1, 2).contiguous()  # (B, L, hidden)
        x = block(x, neighbour_graph(x, self.neighbours))
        graph = neighbour_graph(x, self.neighbours)  # of one input: three blocks share it
        start = confidence(self.regu_s[1], self.regu_s[0](x, graph)).squeeze(2)
        end = confidence(self.regu_e[1], self.regu_e[0](x, graph)).squeeze(2)

        x = self.backbone2[0](x, graph)
        context = neighbour_graph(x, self.neighbours).mean(dim=1).to(x.dtype) @ x
        first, _, *layers = self.localization
        y = convolve_bins(first, (x, context), self.bins)  # (B, L * bins, wide)
        L = x.shape[1]
        D = self.durations or L
        alignment = sgalignment(L, D, self.bins, y.device, y.dtype)
        return start, end, score_map(layers, y, first.bias, alignment, (D, L))


def load_official(state_dict: dict, *, inner_bins: int = 32, **options) -> GTAD:
    """Make a GTAD with the weights of an official checkpoint, its part called state_dict.

    Sizes are read off the tensors. What their shapes cannot tell is given, by default that of the
    ActivityNet release: inner_bins (the others are context bins), and the options durations,
    stem_groups and neighbours of GTAD. A KeyError or RuntimeError names keys that do not fit.
    """
    state = {key.removeprefix("module."): value for key, value in state_dict.items()}
    hidden, stem_width, _ = state["backbone1.0.weight"].shape
    gcn_width, group_width, _ = state["backbone1.2.tconvs.2.weight"].shape
    wide, columns = state["localization.0.weight"].shape[:2]
    narrow, _, kernel, _ = state["localization.4.weight"].shape
    context_bins = columns // hidden - inner_bins
    if context_bins < 1:
        raise ValueError(f"inner_bins={inner_bins}, expected below the {columns // hidden} bins")
    bins = {"inner_bins": inner_bins, "context_bins": context_bins}
    gcn = {"gcn_width": gcn_width, "gcn_groups": gcn_width // group_width}
    options["in_channels"] = stem_width * options.get("stem_groups", 4)
    head = GTAD(hidden=hidden, map_hidden=(wide, narrow), kernel=kernel, **gcn, **bins, **options)
    head.load_state_dict(state)
    return head


# ----------------------------------------------------------------------------- targets and losses


class Targets(NamedTuple):
    """Hold what the outputs should be."""

    start: Tensor  # (B, L) overlap of a snippet with the starts, in [0, 1]
    end: Tensor  # (B, L)
    iou: Tensor  # (B, D, L) best tIoU of a cell with any annotated segment; 0 where not valid
    valid: Tensor  # (D, L) bool: the cell's segment ends inside the video


def make_targets(segments: Sequence[Tensor], L: int, D: int | None = None, device=None) -> Targets:
    """Turn annotated segments into Targets on L snippets and D durations (default L).

    segments: list of B tensors (N_i, 2), start and end as fractions of the video; parts outside
    [0, 1] are clipped; N_i may be 0. Float32, or float64 where the segments are.
    """
    D = L if D is None else D
    for segment in segments:
        if segment.shape[1:] != (2,) or not (segment[:, 0] <= segment[:, 1]).all():
            raise ValueError(f"segments {segment.tolist()}: expected (N, 2) with start <= end")
    # Padding far outside the video overlaps nothing.
    clipped = [segment.clamp(0, 1) for segment in segments]
    padded = _full(nn.utils.rnn.pad_sequence(clipped, True, padding_value=-10.0).to(device))
    s, d, valid = anchor_grid(L, D, padded.device)
    low = s.to(padded.dtype) / L
    high = (s + d + 1).to(padded.dtype) / L
    i = torch.arange(L, device=padded.device)
    iou = padded.new_zeros(len(padded), D, L)
    near = padded.new_zeros(len(padded), 2, L)
    for segment in padded.unbind(1):  # (B, 2); N is small, D * L is not
        b, f = segment[:, :, None, None].unbind(1)
        overlap = (torch.minimum(high, f) - torch.maximum(low, b)).clamp_min(0)
        iou = torch.maximum(iou, overlap / ((high - low) + (f - b) - overlap))
        # Within 1.5 snippets of a boundary is what share of the bin [i - 0.5, i + 1.5]?
        at = segment.unsqueeze(2) * L
        overlap = torch.minimum(at + 1.5, i + 1.5) - torch.maximum(at - 1.5, i - 0.5)  # (B, 2, L)
        near = torch.maximum(near, overlap / 2)
    start, end = near.unbind(1)
    return Targets(start, end, iou * valid, valid)


class Weights(NamedTuple):
    """Hold the weight of each cell's error; a loss is the sum of weight * error."""

    start: Tensor  # (B, L)
    end: Tensor  # (B, L)
    regression: Tensor  # (B, D, L)
    classification: Tensor  # (B, D, L)


def loss_weights(
    targets: Targets, *, generator: torch.Generator | None = None, shard=(0, 1), reduce=None
) -> Weights:
    """Return class balance, random subset and normalisation of the losses; targets decide alone.

    Start, end (positive above 0.5) and classification (above 0.9, valid cells): N / (2 N_pos) for
    positives and N / (2 N_neg) for negatives, divided by N. A class without cells has no weight,
    the other keeps its half. Regression: all cells above 0.7 and, as many of each to be expected,
    a random subset of those in (0.3, 0.7] and in (0, 0.3]; 0.5 / number kept. Without a cell above
    0.7 nothing is kept and the term is 0.

    Several ranks, each with B videos: `shard` = (rank, ranks) with generators of equal state draws
    for the ranks * B videos of the global batch and keeps this rank's rows; `reduce` averages a
    small tensor over the ranks (a sum by all_reduce, divided by the ranks). Gradients averaged
    over ranks are then those of the global batch on one rank.
    """
    rank, ranks = shard
    if not 0 <= rank < ranks:
        raise ValueError(f"got shard {shard}, expected (rank, ranks) with 0 <= rank < ranks")
    reduce = reduce or (lambda counts: counts)
    iou = targets.iou
    positive = [targets.start > 0.5, targets.end > 0.5, (iou > 0.9) & targets.valid]
    negative = [targets.start <= 0.5, targets.end <= 0.5, (iou <= 0.9) & targets.valid]
    bands = [iou > 0.7, (iou > 0.3) & (iou <= 0.7), (iou > 0) & (iou <= 0.3)]
    masks = [*positive, *negative, *bands]
    counts = reduce(torch.stack([mask.sum() for mask in masks]).to(iou.dtype))  # (9,)

    def half(mask, count):
        return mask * (0.5 / count).where(count > 0, 0)

    start, end, classification = (
        half(positive[i], counts[i]) + half(negative[i], counts[3 + i]) for i in range(3)
    )

    B = len(iou)
    device = iou.device if generator is None else generator.device
    draw = torch.rand(ranks * B, *iou.shape[1:], generator=generator, device=device)
    draw = draw[rank * B : (rank + 1) * B].to(iou.device)
    high, middle, low = counts[6:]
    kept = bands[0] | bands[1] & (draw * middle < high) | bands[2] & (draw * low < high)
    regression = half(kept, reduce(kept.sum().to(iou.dtype)))
    return Weights(start, end, regression, classification)


def cross_entropy(score: Tensor, positive: Tensor, weight: Tensor) -> Tensor:
    """Sum the weighted binary cross-entropy of scores in [0, 1]; it is finite at 0 and 1, too."""
    return -(weight * torch.where(positive, score, 1 - score).clamp_min(1e-12).log()).sum()


def losses(start: Tensor, end: Tensor, map: Tensor, targets: Targets, weights: Weights) -> dict:
    """Return the three terms of the G-TAD loss (section 3.4), scalars.

    node: start and end scores; regression: channel 0 of the map; classification: channel 1. The
    total of the release is node + 10 * regression + classification.
    """
    start, end, map = (_full(output) for output in (start, end, map))
    start_loss = cross_entropy(start, targets.start > 0.5, weights.start)
    end_loss = cross_entropy(end, targets.end > 0.5, weights.end)
    return {
        "node": start_loss + end_loss,
        "regression": (weights.regression * (map[:, 0] - targets.iou).square()).sum(),
        "classification": cross_entropy(map[:, 1], targets.iou > 0.9, weights.classification),
    }


# --------------------------------------------------------------------------------------- decoding


@torch.no_grad()
def decode(start: Tensor, end: Tensor, map: Tensor, *, boundary_scores: bool = False) -> tuple:
    """Turn outputs into segments (B, K, 2) in [0, 1], scores (B, K), valid (B, K), best first.

    A start s in 0 .. L - 1 is kept if its score is a local peak or above half the video's best;
    s = 0 always. An end e in 1 .. L likewise; the last two always. Each kept pair with e > s is a
    proposal [s/L, e/L]; its score is map[1] * map[0] at cell (e - s - 1, s), with
    `boundary_scores` (BMN) times start[s] * end[e]. K is that of the video with most proposals;
    the others are padded with score 0 and valid False.

    Boundary e lies between snippets e - 1 and e, and the release reads its score from snippet e. At
    e = L there is none: the target of a segment that ends with the video is 1 at snippet L - 1,
    whose score stands for boundary L too.
    """
    start, end, map = (_full(output) for output in (start, end, map))
    D, L = map.shape[2:]
    starts = _peaks(start)
    ends = _peaks(end)
    starts[:, 0] = True
    ends[:, -1] = True
    s, d, inside = anchor_grid(L, D, map.device)
    e = (s + d + 1).clamp_max(L - 1)  # (D, L), where boundary e has its score
    keep = starts[:, s] & ends[:, e] & inside  # (B, D, L)
    score = map[:, 0] * map[:, 1]
    if boundary_scores:
        score = score * start[:, s] * end[:, e]
    K = int(keep.flatten(1).sum(dim=1).max())
    score = score.masked_fill(~keep, -1).flatten(1)
    score, cell = (x[:, :K] for x in score.sort(dim=1, descending=True, stable=True))
    segments = torch.stack([cell % L, cell % L + cell // L + 1], dim=2).to(score.dtype) / L
    valid = score >= 0
    return segments * valid.unsqueeze(2), score.clamp_min(0), valid


def _peaks(score):
    """Find the local peaks of scores (B, L), and what is above half the best: (B, L) bool."""
    keep = score > 0.5 * score.amax(dim=1, keepdim=True)
    keep[:, 1:-1] |= (score[:, 1:-1] > score[:, :-2]) & (score[:, 1:-1] > score[:, 2:])
    return keep
