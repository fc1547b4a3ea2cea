"""G-TAD head: features (B, C, L) -> start (B, L), end (B, L), map (B, 2, D, L); targets, losses, decoding.

Xu et al., G-TAD: Sub-Graph Localization for Temporal Action Detection, CVPR 2020, in the shape of its release. The file
stands alone. The same function as the release, weight for weight, computed lighter: everything up to the first ReLU of the
localization module is linear, so its first 1x1 convolution is applied to the L snippets before they are aligned to the
anchors, and the (9216, D, L) map of sub-graph features is never built.

    head = GTAD(in_channels=512)
    start, end, map = head(features)                             # any L, the same weights
    targets = make_targets([torch.tensor([[0.2, 0.5]])], L)
    terms = losses(start, end, map, targets, loss_weights(targets))
    (terms["node"] + 10 * terms["regression"] + terms["classification"]).backward()
    segments, scores, valid = decode(start, end, map)

Legend: B videos, C channels, L snippets, D durations, N segments, K proposals, A anchors. Segments are fractions of the
video, [0, 1]. Cell (d, s) of a map is the anchor that covers snippets s .. s + d, the segment [s/L, (s + d + 1)/L].
"""
import functools
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


# ---------------------------------------------------------------------------------------------------------------- graph

@torch.no_grad()
def neighbour_graph(x, k):
    """The k nearest snippets of every snippet, itself first, by Euclidean distance; ties go to the lower index.

    x (B, C, L) -> (B, L, k, L) of zeros and ones: [b, m, j, l] = 1 where m is the j-th neighbour of l. As a matrix, because
    x @ graph is then the gather and its backward a matrix product too, which no atomic additions make non-deterministic.
    k is at most L. Differences are taken before squaring: equal snippets have distance 0, not rounding noise.
    """
    B, _, L = x.shape
    k = min(k, L)
    rows = x.transpose(1, 2).to(_full(x.dtype)).contiguous()
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")                         # (B, L, L)
    distance.diagonal(dim1=1, dim2=2).fill_(-1)
    nearest = distance.sort(dim=2, stable=True).indices[:, :, :k]                                           # (B, L, k)
    return rows.new_zeros(B, L, k, L).scatter_(1, nearest.transpose(1, 2).unsqueeze(1), 1)


def _full(dtype):
    """The dtype for what must not be rounded to half precision: float64 stays, all others become float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class GCNeXt(nn.Module):
    """Graph block: ReLU(temporal stream + input + semantic stream), (B, C, L) -> (B, C, L); G-TAD, section 3.2."""

    def __init__(self, channels, *, width=128, groups=32, neighbours=3):
        super().__init__()
        self.neighbours = neighbours
        self.tconvs = nn.Sequential(
            nn.Conv1d(channels, width, 1), nn.ReLU(),
            nn.Conv1d(width, width, 3, padding=1, groups=groups), nn.ReLU(),
            nn.Conv1d(width, channels, 1))
        self.sconvs = nn.Sequential(
            nn.Conv2d(2 * channels, width, 1), nn.ReLU(),
            nn.Conv2d(width, width, 1, groups=groups), nn.ReLU(),
            nn.Conv2d(width, channels, 1))

    def forward(self, x, graph=None):
        """x (B, C, L); graph: neighbour_graph(x, k) where the caller has it already."""
        B, C, L = x.shape
        if graph is None:
            graph = neighbour_graph(x, self.neighbours)
        k = graph.shape[2]
        # An edge is (neighbour, self), and the first 1x1 is linear in it: convolve the snippets, then gather.
        first = self.sconvs[0]
        weight = first.weight.view(-1, 2, C).transpose(0, 1).reshape(-1, C, 1)                              # (2 width, C, 1)
        neighbour, itself = F.conv1d(x, weight).chunk(2, dim=1)                                             # (B, width, L)
        itself = itself + first.bias[:, None]
        edges = (neighbour @ graph.flatten(2).to(neighbour.dtype)).unflatten(2, (k, L)) + itself.unsqueeze(2)
        semantic = self.sconvs[1:](edges).max(dim=2).values                                                 # (B, C, L)
        return torch.relu(self.tconvs(x) + x + semantic)


# -------------------------------------------------------------------------------------------------------------- SGAlign

class Alignment(NamedTuple):
    """A fixed linear map from snippets and bins to anchors, in compressed sparse rows; see `sgalign`."""
    columns: torch.Tensor       # (nnz,) snippet * bins + bin, row after row
    offsets: torch.Tensor       # (A,) where each row begins
    values: torch.Tensor        # (nnz,)


def anchor_grid(L, D, device=None):
    """Start and duration index of every cell of a (D, L) map and whether its anchor lies in the video: three (D, L)."""
    s = torch.arange(L, device=device).expand(D, L)
    d = torch.arange(D, device=device).unsqueeze(1).expand(D, L)
    return s, d, s + d < L


def sgalign(s, d, L, bins, dtype=torch.float32):
    """SGAlign's interpolation weights (G-TAD, section 3.3): anchor, bin, snippet and value of every non-zero weight.

    Anchor (s, d) covers n = d + 1 snippets; its region is [s - n/2, s + d + n/2] in snippet indices. Each of its bins is the
    average of g = ceil(region / bins) equally spaced points, at (i + 0.5)/g of the bin, linearly interpolated; a point
    below -1 or above L counts as zero, others are clamped to [0, L - 1]. Anchors with s + d >= L have the region [0, 1].

    s, d: (A,) integers on the CPU. Returns four (nnz,) tensors, sorted by anchor, bin, snippet. Points are fractions of
    integers, so that no rounding decides on which side of a snippet they fall.
    """
    inside = s + d < L
    region = torch.where(inside, 2 * d + 1, 1)
    twice_start = torch.where(inside, 2 * s - d - 1, 0)
    g = (region + bins - 1) // bins                                                                          # (A,)

    group = torch.arange(len(s) * bins).repeat_interleave(g.repeat_interleave(bins))     # (P,) anchor * bins + bin
    anchor, b = group // bins, group % bins
    slots = g.repeat_interleave(bins) + 1                      # a bin's points touch at most g + 1 neighbouring snippets
    first_slot = slots.cumsum(0) - slots                                                                     # (A * bins,)
    first_point = first_slot - torch.arange(len(slots))
    i = torch.arange(len(group)) - first_point[group]
    g = g[anchor]
    unit = 2 * g * bins
    point = twice_start[anchor] * g * bins + (2 * (b * g + i) + 1) * region[anchor]                          # / unit
    value = ((point >= -unit) & (point <= L * unit)).to(torch.float64) / g
    point = point.clamp_min(0).minimum((L - 1) * unit)
    snippet = point // unit
    upper = (point - snippet * unit) / unit.to(torch.float64) * value

    first_snippet = snippet[first_point]
    slot = first_slot[group] + snippet - first_snippet[group]
    values = torch.zeros(int(slots.sum()), dtype=torch.float64)
    values.index_add_(0, slot, value - upper).index_add_(0, slot + 1, upper)
    slot = values.nonzero().squeeze(1)
    group = torch.arange(len(slots)).repeat_interleave(slots)[slot]
    snippet = first_snippet[group] + slot - first_slot[group]
    return group // bins, group % bins, snippet, values[slot].to(dtype)


class _Matrix(NamedTuple):
    """A sparse matrix in compressed rows and its transpose, or the same matrix dense; the other one is None."""
    forward: tuple              # (columns (nnz,) int32, row offsets (rows,) int32, values (nnz,))
    backward: tuple
    dense: torch.Tensor


def _rows(row, column, value, rows):
    count = torch.bincount(row, minlength=rows)
    return column.int(), (count.cumsum(0) - count).int(), value


DENSE_LIMIT = 2 ** 19           # entries up to which one dense product beats the sparse one; measured on CPU


@functools.lru_cache(maxsize=32)
def alignment(L, D, bins, whole, sparse, device, dtype):
    """The fixed map from the snippets, convolved once per bin, to the anchors of a (D, L) map: (_Matrix, valid (D, L)).

    bins: of the two alignments; the columns are snippet * sum(bins) + bin. Rows: the valid anchors, row by row of the map,
    then one that stands for all the others, which share one region; with `whole`, all D * L cells.
    """
    with torch.inference_mode(False), torch.no_grad():
        s, d, valid = anchor_grid(L, D, "cpu")
        if whole:
            s, d = s.flatten(), d.flatten()
        else:
            s, d = torch.cat([s[valid], torch.tensor([L])]), torch.cat([d[valid], torch.tensor([0])])
        total, parts = sum(bins), []
        for count, first in zip(bins, (0, bins[0])):
            anchor, b, snippet, value = sgalign(s, d, L, count, dtype)
            parts.append((anchor, snippet * total + first + b, value))
        row, column, value = (torch.cat(part) for part in zip(*parts))
        valid = valid.to(device)
        if not sparse:
            dense = torch.zeros(len(s), L * total, dtype=dtype)
            dense[row, column] = value
            return _Matrix(None, None, dense.to(device)), valid
        order, back = row.argsort(stable=True), column.argsort(stable=True)
        there = _rows(row[order], column[order], value[order], len(s))
        back = _rows(column[back], row[back], value[back], L * total)
        return _Matrix(*(tuple(part.to(device) for part in side) for side in (there, back)), None), valid


def _sparse_product(rows, y):
    """(B, columns, H) -> (B, rows, H)"""
    columns, offsets, values = rows
    B = len(y)
    if B > 1:
        shift = torch.arange(B, dtype=columns.dtype, device=y.device).unsqueeze(1)
        columns = (columns + shift * y.shape[1]).flatten()
        offsets = (offsets + shift * len(values)).flatten()
        values = values.repeat(B)
    return F.embedding_bag(columns, y.flatten(0, 1), offsets, mode="sum", per_sample_weights=values).unflatten(0, (B, -1))


class _SparseProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, matrix):
        ctx.matrix = matrix
        return _sparse_product(matrix.forward, y)

    @staticmethod
    def backward(ctx, grad):
        return _sparse_product(ctx.matrix.backward, grad.contiguous()), None


# ----------------------------------------------------------------------------------------------------------------- head

class GTAD(nn.Module):
    """The G-TAD head. Parameter names and shapes are those of the release.

    in_channels: C of the features. hidden: channels of the graph blocks, gcn_width their inner width. inner_bins,
    context_bins: of the alignments of a snippet sequence and of its neighbour means. map_hidden: the two widths of the
    localization module, kernel: of its two last-but-one convolutions. durations: D, None for D = L of the input at hand.
    The defaults are the ActivityNet release; THUMOS is inner_bins=16, context_bins=16, kernel=3, durations=64.
    """

    def __init__(self, *, in_channels, hidden=256, gcn_width=128, gcn_groups=32, stem_groups=4, neighbours=3,
                 inner_bins=32, context_bins=4, map_hidden=(512, 128), kernel=1, durations=None):
        super().__init__()
        self.neighbours, self.bins, self.durations = neighbours, (inner_bins, context_bins), durations

        def block():
            return GCNeXt(hidden, width=gcn_width, groups=gcn_groups, neighbours=neighbours)

        self.backbone1 = nn.Sequential(nn.Conv1d(in_channels, hidden, 3, padding=1, groups=stem_groups), nn.ReLU(), block())
        self.backbone2 = nn.Sequential(block())
        self.regu_s = nn.Sequential(block(), nn.Conv1d(hidden, 1, 1), nn.Sigmoid())
        self.regu_e = nn.Sequential(block(), nn.Conv1d(hidden, 1, 1), nn.Sigmoid())
        wide, narrow = map_hidden
        self.localization = nn.Sequential(
            nn.Conv2d(hidden * sum(self.bins), wide, 1), nn.ReLU(),
            nn.Conv2d(wide, narrow, 1), nn.ReLU(),
            nn.Conv2d(narrow, narrow, kernel, padding=kernel // 2), nn.ReLU(),
            nn.Conv2d(narrow, narrow, kernel, padding=kernel // 2), nn.ReLU(),
            nn.Conv2d(narrow, 2, 1), nn.Sigmoid())

    def forward(self, x):
        """x (B, C, L), any L -> start (B, L), end (B, L), map (B, 2, D, L), in [0, 1] and at least float32."""
        C = self.backbone1[0].in_channels
        if x.dim() != 3 or x.shape[1] != C:
            raise ValueError(f"GTAD got features of shape {tuple(x.shape)}, expected (B, {C}, L): channels before snippets")
        base = self.backbone1(x)                                                                            # (B, hidden, L)
        graph = neighbour_graph(base, self.neighbours)          # of one input: three blocks share it
        start, end = (_score(branch[1], branch[0](base, graph)).squeeze(1) for branch in (self.regu_s, self.regu_e))
        return start, end, self._map(self.backbone2[0](base, graph))

    def _map(self, x):
        B, C, L = x.shape
        D = L if self.durations is None else self.durations
        graph = neighbour_graph(x, self.neighbours)
        context = x @ graph.mean(dim=2).to(x.dtype)                                                         # (B, C, L)

        first, *between, last, _ = self.localization
        H, bins, total = len(first.weight), self.bins, sum(self.bins)
        weight = first.weight.view(H, C * total).t().reshape(C, total, H)
        y = torch.cat([(features.transpose(1, 2) @ part.reshape(C, -1)).unflatten(2, (-1, H))
                       for features, part in zip((x, context), weight.split(bins, dim=1))], dim=2)          # (B, L, bins, H)
        whole = first_kernel(between) > 1
        cells = D * L if whole else L * D
        sparse = cells * L * total > DENSE_LIMIT
        dtype = _full(y.dtype) if sparse else y.dtype
        matrix, valid = alignment(L, D, bins, whole, sparse, x.device, dtype)
        y = y.flatten(1, 2).to(dtype)
        if sparse:
            z = _SparseProduct.apply(y, matrix)
        else:
            z = matrix.dense @ y                                                                            # (B, A, H)
        z = (z + first.bias)
        if whole:
            z = z.transpose(1, 2).unflatten(2, (D, L))                                                      # channels last
        else:
            z = z.transpose(1, 2).unsqueeze(3)                                                              # (B, H, A, 1)
        for layer in between:
            z = layer(z)
        z = _score(last, z).flatten(2)                                                                      # (B, 2, A)
        if not whole:
            z = z[:, :, -1:].expand(-1, -1, D * L).index_copy(2, valid.flatten().nonzero().squeeze(1), z[:, :, :-1])
        return z.unflatten(2, (D, L))


def first_kernel(layers):
    return max(layer.kernel_size[0] for layer in layers if hasattr(layer, "kernel_size"))


def _score(layer, x):
    """Sigmoid of a last convolution, both in full precision: logits rounded to bfloat16 would tie many proposals."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.sigmoid(layer(x.to(layer.weight.dtype)))


# -------------------------------------------------------------------------------------------------------------- targets

class Targets(NamedTuple):
    start: torch.Tensor         # (B, L) overlap of a snippet with the starts, in [0, 1]
    end: torch.Tensor           # (B, L)
    iou: torch.Tensor           # (B, D, L) best tIoU of a cell's segment with any annotated one; 0 where not valid
    valid: torch.Tensor         # (D, L) bool: the cell's segment ends inside the video


def make_targets(segments, L, D=None, device=None):
    """Annotated segments -> Targets on L snippets and D durations (default L).

    segments: list of B tensors (N_i, 2), start and end as fractions of the video; parts outside [0, 1] are clipped; N_i may
    be 0. Float32, or float64 where the segments are.
    """
    D = L if D is None else D
    for segment in segments:
        if segment.dim() != 2 or segment.shape[1] != 2 or not (segment[:, 0] <= segment[:, 1]).all():
            raise ValueError(f"make_targets got segments {segment.tolist()}, expected rows of start <= end, shape (N, 2)")
    # Padding far outside the video overlaps nothing.
    padded = nn.utils.rnn.pad_sequence([segment.clamp(0, 1) for segment in segments], True, padding_value=-10.0)
    padded = padded.to(device, _full(padded.dtype))
    begin, finish = padded.unbind(2)                                                                        # (B, N)
    s, d, valid = anchor_grid(L, D, padded.device)
    low, high = s / L, (s + d + 1) / L
    iou = padded.new_zeros(len(padded), D, L)
    for b, f in zip(begin.t()[..., None, None], finish.t()[..., None, None]):       # (B, 1, 1); N is small, D * L is not
        overlap = (torch.minimum(high, f) - torch.maximum(low, b)).clamp_min(0)
        iou = torch.maximum(iou, overlap / ((high - low) + (f - b) - overlap))

    i = torch.arange(L, device=padded.device)

    def near(boundary):
        """Share of each snippet's bin [(i - 0.5)/L, (i + 1.5)/L] within 1.5 snippets of a boundary, the best boundary's."""
        position = boundary.unsqueeze(2) * L                                                                # (B, N, 1)
        overlap = torch.minimum(position + 1.5, i + 1.5) - torch.maximum(position - 1.5, i - 0.5)
        return (overlap.clamp_min(0) / 2).amax(dim=1) if boundary.shape[1] else iou.new_zeros(len(iou), L)

    return Targets(near(begin), near(finish), iou * valid, valid)


# --------------------------------------------------------------------------------------------------------------- losses

class Weights(NamedTuple):
    """Weight of every cell's error; a loss is the sum of weight * error. See `loss_weights`."""
    start: torch.Tensor         # (B, L)
    end: torch.Tensor           # (B, L)
    regression: torch.Tensor    # (B, D, L)
    classification: torch.Tensor  # (B, D, L)


def loss_weights(targets, *, generator=None, shard=(0, 1), reduce=None):
    """Class balance, random subset and normalisation of the three losses; they depend on the targets alone.

    Start, end (positive above 0.5) and classification (above 0.9, valid cells): N / (2 N_pos) for positives and
    N / (2 N_neg) for negatives, divided by N. A class without cells has no weight, the other keeps its half.
    Regression: all cells above 0.7 and, as many of each to be expected, a random subset of those in (0.3, 0.7] and in (0, 0.3];
    0.5 / number kept. Without a cell above 0.7 nothing is kept and the term is 0.

    Several ranks, each with B videos: `shard` = (rank, ranks) with generators of equal state draws for the ranks * B videos
    of the global batch and keeps this rank's rows; `reduce` averages a small tensor over the ranks (e.g. all-reduce,
    divided by the ranks). Gradients averaged over ranks are then those of the global batch on one rank.
    """
    rank, ranks = shard
    if not 0 <= rank < ranks:
        raise ValueError(f"loss_weights got shard {shard}, expected (rank, ranks) with 0 <= rank < ranks")
    reduce = reduce or (lambda counts: counts)
    iou, valid = targets.iou, targets.valid
    sides = [(target > 0.5, target <= 0.5) for target in (targets.start, targets.end)]
    sides.append(((iou > 0.9) & valid, (iou <= 0.9) & valid))
    bands = iou > 0.7, (iou > 0.3) & (iou <= 0.7), (iou > 0) & (iou <= 0.3)
    masks = [mask for side in sides for mask in side] + list(bands)
    counts = reduce(torch.stack([mask.sum() for mask in masks]).to(iou.dtype))                              # (9,)

    def share(mask, count):
        return mask * (0.5 / count).where(count > 0, 0)

    balanced = [share(positive, counts[2 * i]) + share(negative, counts[2 * i + 1])
                for i, (positive, negative) in enumerate(sides)]

    B = len(iou)
    draw = torch.rand(ranks * B, *iou.shape[1:], generator=generator,
                      device=iou.device if generator is None else generator.device)
    draw = draw[rank * B:(rank + 1) * B].to(iou.device)
    high, middle, low = counts[6:]
    kept = bands[0] | bands[1] & (draw * middle < high) | bands[2] & (draw * low < high)
    return Weights(balanced[0], balanced[1], share(kept, reduce(kept.sum().to(iou.dtype))), balanced[2])


def cross_entropy(score, positive, weight):
    """Weighted sum of the binary cross-entropy of scores in [0, 1]; finite, with finite gradients, at 0 and 1."""
    return -(weight * torch.where(positive, score, 1 - score).clamp_min(1e-12).log()).sum()


def losses(start, end, map, targets, weights):
    """The three terms of the G-TAD loss (section 3.4), scalars, for outputs of the head and weights of `loss_weights`.

    node: start and end scores; regression: channel 0 of the map; classification: channel 1. The total of the release is
    node + 10 * regression + classification.
    """
    start, end, map = (output.to(_full(output.dtype)) for output in (start, end, map))
    return {
        "node": cross_entropy(start, targets.start > 0.5, weights.start) + cross_entropy(end, targets.end > 0.5, weights.end),
        "regression": (weights.regression * (map[:, 0] - targets.iou).square()).sum(),
        "classification": cross_entropy(map[:, 1], targets.iou > 0.9, weights.classification)}


# ------------------------------------------------------------------------------------------------------------- decoding

@torch.no_grad()
def decode(start, end, map, *, boundary_scores=False):
    """Outputs of the head -> segments (B, K, 2) in [0, 1], scores (B, K), valid (B, K); by score, best first.

    A start s in 0 .. L - 1 is kept if its score is a local peak or above half the video's best; s = 0 always. An end e in
    1 .. L likewise; the last two always. Each kept pair with e > s is a proposal [s/L, e/L]; its score is
    map[1] * map[0] at cell (e - s - 1, s), with `boundary_scores` (BMN) times start[s] * end[e].
    K is that of the video with most proposals; the others are padded with score 0 and valid False.

    Boundary e lies between snippets e - 1 and e, and the release reads its score from snippet e. At e = L there is none: the
    target of a segment that ends with the video is 1 at snippet L - 1, whose score stands for boundary L too.
    """
    start, end, map = (output.to(_full(output.dtype)) for output in (start, end, map))
    B, _, D, L = map.shape

    def kept(score):
        left, right = score[:, :-2], score[:, 2:]
        peak = F.pad((score[:, 1:-1] > left) & (score[:, 1:-1] > right), (1, 1)) if L > 2 else torch.zeros_like(score, dtype=torch.bool)
        return peak | (score > 0.5 * score.amax(dim=1, keepdim=True))

    starts, ends = kept(start), kept(end)
    starts[:, 0] = True
    ends[:, -1] = True
    ends = torch.cat([ends, ends[:, -1:]], dim=1)                                                           # (B, L + 1)
    end = torch.cat([end, end[:, -1:]], dim=1)
    s, d, inside = anchor_grid(L, D, map.device)
    e = (s + d + 1).clamp_max(L)                                                                            # (D, L)
    keep = starts[:, s] & ends[:, e] & inside                                                               # (B, D, L)
    score = map[:, 0] * map[:, 1]
    if boundary_scores:
        score = score * start[:, s] * end[:, e]
    K = int(keep.flatten(1).sum(dim=1).max())
    score, cell = score.masked_fill(~keep, -1).flatten(1).sort(dim=1, descending=True, stable=True)
    score, cell = score[:, :K], cell[:, :K]
    segments = torch.stack([cell % L, cell % L + cell // L + 1], dim=2) / L
    valid = score >= 0
    return segments.to(score.dtype) * valid.unsqueeze(2), score.clamp_min(0), valid
