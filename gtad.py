"""Localize actions with the G-TAD head: features (B, C, L) -> start, end (B, L), map (B, 2, D, L).

Xu et al., G-TAD: Sub-Graph Localization for Temporal Action Detection, CVPR 2020: the release's
function, weight for weight, its targets, losses and decoding, in a file that stands alone. All up
to the first ReLU of the localization module is linear, so its first 1x1 convolution is applied to
the L snippets before they are aligned to anchors: the (9216, D, L) map of sub-graphs is not built.

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
    """Apply a convolution of kernel 1 to rows (..., C), in their dtype."""
    return F.linear(x, conv.weight.flatten(1).to(x), conv.bias.to(x))


def confidence(conv: nn.Module, x: Tensor) -> Tensor:
    """Return the sigmoid of a last 1x1 on rows: not in bfloat16, which would tie many proposals."""
    with torch.autocast(x.device.type, enabled=False):
        return pointwise(conv, _full(x)).sigmoid()


class GCNeXt(nn.Module):
    """Graph block: ReLU(temporal stream + input + semantic stream), G-TAD, section 3.2.

    Snippets are rows. The grouped 1x1 of the semantic stream multiplies by its block-diagonal
    matrix: more arithmetic, and still faster than a grouped convolution of few channels a group.
    """

    def __init__(self, channels: int, width: int, groups: int):
        super().__init__()

        def stream(conv, channels_in, kernel):
            first = conv(channels_in, width, 1)
            middle = conv(width, width, kernel, padding=kernel // 2, groups=groups)
            return nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), conv(width, channels, 1))

        self.tconvs = stream(nn.Conv1d, channels, 3)
        self.sconvs = stream(nn.Conv2d, 2 * channels, 1)
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
        nodes = graph.flatten(1, 2).to(x.dtype) @ F.linear(x, of_neighbour)
        nodes = nodes.unflatten(1, graph.shape[1:3])  # (B, k, L, width)
        edges = (nodes + F.linear(x, of_self, first.bias).unsqueeze(1)).relu()
        grouped = middle.weight.flatten(1).repeat(1, middle.groups) * self.diagonal
        semantic = pointwise(last, F.linear(edges, grouped, middle.bias).relu())
        return (temporal + x + semantic.amax(dim=1)).relu()


def anchor_grid(L: int, D: int, device=None) -> tuple[Tensor, Tensor, Tensor]:
    """Return start and duration index of each cell and whether it is in the video: (D, L) each."""
    s = torch.arange(L, device=device).expand(D, L)
    d = torch.arange(D, device=device).unsqueeze(1).expand(D, L)
    return s, d, s + d < L


def sgalign(s: Tensor, d: Tensor, L: int, bins: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return SGAlign's interpolation weights (section 3.3): anchor, bin, snippet, value of each.

    Anchor (s, d) has the region [s - (d + 1)/2, s + d + (d + 1)/2] in snippet indices, and [0, 1]
    where s + d >= L. Each of its bins is the average of g = ceil(region / bins) equally spaced
    points, at (i + 0.5)/g of the bin, linearly interpolated; a point below -1 or above L counts as
    zero, others are clamped to [0, L - 1].

    s, d: (A,) integers on the CPU. Returns the non-zero weights, (nnz,) each, sorted, in float64.
    Points are fractions of integers: no rounding decides on which side of a snippet they fall.
    """
    s, d = s[:, None, None], d[:, None, None]  # dimensions: anchors, bins, points of a bin
    inside = s + d < L
    region = torch.where(inside, 2 * d + 1, 1)
    twice_start = torch.where(inside, 2 * s - d - 1, 0)
    g = (region + bins - 1) // bins
    unit = 2 * bins * g  # the denominator of `point`
    i = torch.arange(int(g.max()))
    nth = torch.arange(bins)[:, None] * g + i  # of the anchor's points
    point = (2 * nth + 1) * region + twice_start * (bins * g)
    value = ((i < g) & (point >= -unit) & (point <= L * unit)) / g.double()
    point = point.clamp_min_(0).minimum((L - 1) * unit)
    snippet = point // unit
    upper = (point - snippet * unit) / unit.double() * value

    # Points are at most one snippet apart: those of a bin touch its first snippet and g more.
    slot = snippet - snippet[:, :, :1]
    values = value.new_zeros(*slot.shape[:2], len(i) + 1)
    values.scatter_add_(2, slot, value - upper).scatter_add_(2, slot + 1, upper)
    anchor, b, slot = values.nonzero(as_tuple=True)
    return anchor, b, snippet[anchor, b, 0] + slot, values[anchor, b, slot]


class Alignment:
    """Hold a fixed linear map from bins of snippets to the anchors of a (D, L) map, as a matrix.

    parts: anchor, bin, snippet and value of the weights, for each entry of `bins`. valid: (D, L)
    bool, the cells with an anchor of their own, in order; one more stands for all other cells. The
    matrix has a row an anchor; columns are snippet * sum(bins) + bin.

    Dense if small: on a CPU by measurement, equal at 20 to 25 snippets, at 100 sparse is five times
    faster; elsewhere by arithmetic, not measured, as zeros cost little there.
    """

    def __init__(self, parts, bins: Sequence[int], valid: Tensor, device, dtype):
        self.bins = bins
        self.shape = valid.shape
        self.cells = valid.flatten().nonzero().squeeze(1).to(device)
        size = (len(self.cells) + 1, valid.shape[1] * sum(bins))
        entries = []
        for i, (row, b, snippet, value) in enumerate(parts):
            entries.append((row, snippet * sum(bins) + sum(bins[:i]) + b, value))
        row, column, value = map(torch.cat, zip(*entries, strict=True))
        self.dense = None
        if size[0] * size[1] <= (2**16 if device.type == "cpu" else 2**26):
            dense = value.new_zeros(size).index_put_((row, column), value, accumulate=True)
            self.dense = dense.to(device, dtype)
            return

        def compress(row, column, num_rows):
            row, order = row.int().sort(stable=True)
            begins = torch.searchsorted(row, torch.arange(num_rows).int(), out_int32=True)
            values = value[order].to(torch.promote_types(dtype, torch.float32))
            return [part.to(device) for part in (column[order].int(), begins, values)]

        self.sparse = compress(row, column, size[0])
        self.transpose = compress(column, row, size[1])

    def fill(self, z: Tensor) -> Tensor:
        """Give each cell the row of its anchor: (B, A, H) -> (B, D, L, H)."""
        others = z[:, -1:].expand(-1, self.shape.numel(), -1)
        return others.index_copy(1, self.cells, z[:, :-1]).unflatten(1, self.shape)


class _SnippetLayer(torch.autograd.Function):
    """Apply a map's first convolution to snippets, by bin: (B, L, C) each -> (B, L * bins, wide).

    The weights, as the product wants them, are made again for the backward pass, not kept.
    """

    @staticmethod
    def forward(ctx, weight, bins, *features):
        ctx.bins = bins
        ctx.save_for_backward(weight, *features)
        y = features[0].new_empty(features[0].shape[:2].numel(), sum(bins), len(weight))
        parts = _by_bin(weight, bins, y.dtype)
        for x, part, out in zip(features, parts, y.split(bins, dim=1), strict=True):
            torch.mm(x.flatten(0, 1), part.flatten(1), out=out.flatten(1))
        return y.view(len(features[0]), -1, len(weight))

    @staticmethod
    def backward(ctx, grad):
        weight, *features = ctx.saved_tensors
        grads = grad.reshape(-1, sum(ctx.bins), len(weight)).split(ctx.bins, dim=1)
        parts = _by_bin(weight, ctx.bins, grad.dtype)
        grad_features = []
        for x, part, rows in zip(features, parts, grads, strict=True):
            grad_features.append((rows.flatten(1) @ part.flatten(1).t()).view(x.shape))
            # The place of the weights, which have served, takes their gradient.
            torch.mm(x.flatten(0, 1).t(), rows.flatten(1), out=part.flatten(1))
        grad_weight = parts[0]._base.view(-1, len(weight)).t().to(weight.dtype)
        return grad_weight.view(weight.shape), None, *grad_features


def _by_bin(weight, bins, dtype):
    """Return parts (C, bins, wide), views of one copy, of a weight (wide, C * sum(bins), ...)."""
    x = weight.detach().flatten(1).t().to(dtype, copy=True, memory_format=torch.contiguous_format)
    return x.view(-1, sum(bins), len(weight)).split(bins, dim=1)


class _SparseLayer(torch.autograd.Function):
    """Compute alignment @ y + bias: (B, columns, H) -> (B, A, H). Nothing is kept for backward."""

    @staticmethod
    def forward(ctx, y, bias, alignment):
        ctx.transpose = alignment.transpose
        z = y.new_empty(len(y), len(alignment.sparse[1]), y.shape[2])
        for video, out in zip(y, z, strict=True):
            _sparse_product(alignment.sparse, video, out).add_(bias)
        return z

    @staticmethod
    def backward(ctx, grad):
        grad_y = grad.new_empty(len(grad), len(ctx.transpose[1]), grad.shape[2])
        grad_bias = grad.new_zeros(grad.shape[2])
        for part, out in zip(grad, grad_y, strict=True):
            grad_bias += part.sum(dim=0)
            _sparse_product(ctx.transpose, part, out)
        return grad_y, grad_bias, None


class _ReluLinear(torch.autograd.Function):
    """Compute linear(ReLU(x)) of rows (N, C). x must be nobody else's: it becomes its ReLU.

    That alone is kept, and in backward its gradient takes its place: rows of anchors are the
    largest tensors of the head. So a second backward pass through it is an error.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x.relu_(), weight)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_weight = grad.t() @ x
        for rows, out in zip(grad.split(4096), x.split(4096), strict=True):
            off = out <= 0
            torch.mm(rows, weight, out=out).masked_fill_(off, 0)
        return x, grad_weight, grad.sum(dim=0)


def relu_pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """Return pointwise(conv, x.relu_()) of rows (N, C) that nothing else needs."""
    return _ReluLinear.apply(x, conv.weight.flatten(1).to(x), conv.bias.to(x))


def _sparse_product(matrix, x, out):
    """Write matrix @ x to out, by 128 channels, which stay in the cache: 2.5 times faster."""
    columns, begins, values = matrix
    options = {"mode": "sum", "per_sample_weights": values}
    for source, target in zip(x.split(128, dim=1), out.split(128, dim=1), strict=True):
        target.copy_(F.embedding_bag(columns, source.contiguous(), begins, **options))
    return out


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)  # it is kept for later calls, which may need gradients
def sgalignment(L: int, D: int, bins: tuple[int, int], device, dtype) -> Alignment:
    """Return the Alignment of the valid anchors of a (D, L) map, and one anchor for all others."""
    s, d, valid = anchor_grid(L, D)
    s = F.pad(s[valid], (0, 1), value=L)
    d = F.pad(d[valid], (0, 1))
    return Alignment([sgalign(s, d, L, count) for count in bins], bins, valid, device, dtype)


def map_layers(wide: int, narrow: int, kernel: int) -> nn.Sequential:
    """Make what follows the first convolution of a map: (B, wide, D, L) -> (B, 2, D, L)."""
    first = nn.Conv2d(wide, narrow, 1)
    second, third = (nn.Conv2d(narrow, narrow, kernel, padding=kernel // 2) for _ in range(2))
    last = nn.Conv2d(narrow, 2, 1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third, nn.ReLU(), last, nn.Sigmoid())


def score_map(convs, features: Sequence[Tensor], alignment: Alignment) -> Tensor:
    """Score the sub-graphs of features, (B, L, C) for each entry of alignment.bins: (B, 2, D, L).

    convs: the first, its weight (wide, C * sum(bins), 1, 1), input channel * sum(bins) + bin, and
    those of map_layers. The first is applied before the alignment: to each snippet, by bin.
    """
    first, second, third, fourth, last = convs
    y = _SnippetLayer.apply(first.weight, alignment.bins, *features)  # (B, L * bins, wide)
    B, dtype = len(y), y.dtype
    if alignment.dense is None:
        y = _SparseLayer.apply(_full(y), _full(first.bias), alignment).to(dtype)
    else:
        y = (alignment.dense @ y).add_(first.bias)
    z = relu_pointwise(second, y.flatten(0, 1))  # (B * A, narrow)
    if third.kernel_size[0] == 1:  # on rows, which are fewer than cells
        z = relu_pointwise(fourth, relu_pointwise(third, z))
        z = relu_pointwise(last, _full(z)).sigmoid()  # as in `confidence`
        z = alignment.fill(z.unflatten(0, (B, -1)))
    else:
        z = alignment.fill(z.relu_().unflatten(0, (B, -1))).permute(0, 3, 1, 2)  # channels last
        z = fourth(third(z).relu_()).relu_()
        z = confidence(last, z.permute(0, 2, 3, 1))
    return z.permute(0, 3, 1, 2).contiguous()


class GTAD(nn.Module):
    """The G-TAD head. Parameter names and shapes are those of the release.

    in_channels: C. hidden: channels of the graph blocks, gcn_width their inner width. inner_bins,
    context_bins: of the alignments of the snippets and of their neighbour means. map_hidden: widths
    of the localization module, kernel: of its two middle convolutions. durations: D, None for D = L
    of the input. bin_width: see the function `make_targets`; every_pair, longest: see `decode`. The
    defaults are ActivityNet's release; configs/thumos14.yaml has THUMOS14's.
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
        bin_width: float = 2.0,
        every_pair: bool = False,
        longest: int | None = None,
    ):
        super().__init__()
        self.neighbours = neighbours
        self.bins = (inner_bins, context_bins)
        self.durations = durations
        self.bin_width = bin_width
        self.proposals = {"every_pair": every_pair, "longest": longest}
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
        L = x.shape[1]
        alignment = sgalignment(L, self.durations or L, self.bins, x.device, x.dtype)
        return start, end, score_map(self.localization[::2], (x, context), alignment)

    def make_targets(self, segments: Sequence[Tensor], L: int, device=None) -> "Targets":
        """Return what the outputs should be: see the function."""
        return make_targets(segments, L, self.durations, device, bin_width=self.bin_width)

    def decode(self, start: Tensor, end: Tensor, map: Tensor) -> tuple:
        """Turn outputs into proposals: see the function."""
        return decode(start, end, map, **self.proposals)


def load_official(state_dict: dict, *, inner_bins: int = 32, **options) -> GTAD:
    """Make a GTAD with the weights of an official checkpoint, its part called state_dict.

    Sizes are read off the tensors, but for inner_bins (the others are context bins) and the options
    durations, stem_groups and neighbours. KeyError or RuntimeError name keys that do not fit.
    """
    state = {key.removeprefix("module."): value for key, value in state_dict.items()}
    hidden, stem_width, _ = state["backbone1.0.weight"].shape
    gcn_width, group_width, _ = state["backbone1.2.tconvs.2.weight"].shape
    wide, columns, _, _ = state["localization.0.weight"].shape
    narrow, _, kernel, _ = state["localization.4.weight"].shape
    bins = columns // hidden
    if inner_bins >= bins:
        raise ValueError(f"inner_bins={inner_bins}, expected below the {bins} bins")
    sizes = {"hidden": hidden, "gcn_width": gcn_width, "gcn_groups": gcn_width // group_width}
    sizes |= {"inner_bins": inner_bins, "context_bins": bins - inner_bins, "kernel": kernel}
    options["in_channels"] = stem_width * options.get("stem_groups", 4)
    head = GTAD(map_hidden=(wide, narrow), **sizes, **options)
    head.load_state_dict(state)
    return head


# ---------------------------------------------------------------------- targets, losses, decoding


class Targets(NamedTuple):
    """Hold what the outputs should be."""

    start: Tensor  # (B, L) overlap of a snippet with the starts, in [0, 1]
    end: Tensor  # (B, L)
    iou: Tensor  # (B, D, L) best tIoU of a cell with any annotated segment; 0 where not valid
    valid: Tensor  # (D, L) bool: the cell's segment ends inside the video


def make_targets(
    segments: Sequence[Tensor], L: int, D: int | None = None, device=None, *, bin_width=2.0
) -> Targets:
    """Turn annotated segments into Targets on L snippets and D durations (default L).

    segments: list of B tensors (N_i, 2), start and end as fractions of the video; parts outside
    [0, 1] are clipped; N_i may be 0. Float32, or float64 where the segments are. bin_width: of
    start and end, in snippets: the bin of snippet i is [i - 0.5, i - 0.5 + bin_width].
    """
    for segment in segments:
        if segment.shape[1:] != (2,) or not (segment[:, 0] <= segment[:, 1]).all():
            raise ValueError(f"segments {segment.tolist()}: expected (N, 2) with start <= end")
    # Padding far outside the video overlaps nothing.
    clipped = [segment.clamp(0, 1) for segment in segments]
    padded = _full(nn.utils.rnn.pad_sequence(clipped, True, padding_value=-10.0).to(device))
    s, d, valid = anchor_grid(L, D or L, padded.device)
    low = s.to(padded.dtype) / L
    high = (s + d + 1).to(padded.dtype) / L
    i = torch.arange(L, device=padded.device)
    iou = padded.new_zeros(len(padded), *valid.shape)
    near = padded.new_zeros(len(padded), 2, L)
    for segment in padded.unbind(1):  # (B, 2); N is small, D * L is not
        b, f = segment[:, :, None, None].unbind(1)
        overlap = (torch.minimum(high, f) - torch.maximum(low, b)).clamp_min(0)
        iou = torch.maximum(iou, overlap / ((high - low) + (f - b) - overlap))
        # Within 1.5 snippets of a boundary is what share of the bin?
        at = segment.unsqueeze(2) * L
        overlap = torch.minimum(at + 1.5, i - 0.5 + bin_width) - torch.maximum(at - 1.5, i - 0.5)
        near = torch.maximum(near, overlap / bin_width)  # (B, 2, L)
    return Targets(*near.unbind(1), iou * valid, valid)


class Weights(NamedTuple):
    """Hold the weight of each cell's error; a loss is the sum of weight * error."""

    start: Tensor  # (B, L)
    end: Tensor  # (B, L)
    regression: Tensor  # (B, D, L)
    classification: Tensor  # (B, D, L)


def loss_weights(targets: Targets, *, generator=None, shard=(0, 1), reduce=lambda x: x) -> Weights:
    """Return class balance, random subset and normalisation of the losses; targets decide alone.

    Start, end (positive above 0.5) and classification (above 0.9, valid cells): 0.5 / number of
    positives, and of negatives. Regression: 0.5 / number kept: all cells above 0.7, and as many of
    each to be expected, at random, in (0.3, 0.7] and (0, 0.3]. What has no cells has no weight.

    Several ranks, each with B videos: `shard` = (rank, ranks) with generators of equal state draws
    for the global batch and keeps this rank's rows; `reduce` averages a tensor over the ranks.
    Gradients averaged over ranks are then those of the global batch on one rank.
    """
    rank, ranks = shard
    if not 0 <= rank < ranks:
        raise ValueError(f"got shard {shard}, expected (rank, ranks) with 0 <= rank < ranks")
    iou, valid = targets.iou, targets.valid

    def half(mask, count):
        return mask * (0.5 / count).where(count > 0, 0)

    masks = [targets.start > 0.5, targets.end > 0.5, (iou > 0.9) & valid]
    masks += [targets.start <= 0.5, targets.end <= 0.5, (iou <= 0.9) & valid]
    bands = [iou > 0.7, (iou > 0.3) & (iou <= 0.7), (iou > 0) & (iou <= 0.3)]
    # In one message.
    counts = reduce(torch.stack([mask.sum() for mask in masks + bands]).to(iou.dtype))  # (9,)
    halves = [half(mask, count) for mask, count in zip(masks, counts[:6], strict=True)]
    start, end, classification = (halves[i] + halves[i + 3] for i in range(3))
    high, middle, low = counts[6:]
    device = iou.device if generator is None else generator.device
    draw = torch.rand(ranks * len(iou), *iou.shape[1:], generator=generator, device=device)
    draw = draw.chunk(ranks)[rank].to(iou.device)
    kept = bands[0] | bands[1] & (draw * middle < high) | bands[2] & (draw * low < high)
    regression = half(kept, reduce(kept.sum().to(iou.dtype)))
    return Weights(start, end, regression, classification)


def cross_entropy(score: Tensor, positive: Tensor, weight: Tensor) -> Tensor:
    """Sum the weighted binary cross-entropy of scores in [0, 1]; it is finite at 0 and 1, too."""
    return -(weight * torch.where(positive, score, 1 - score).clamp_min(1e-12).log()).sum()


def losses(start: Tensor, end: Tensor, map: Tensor, targets: Targets, weights: Weights) -> dict:
    """Return the loss's terms (section 3.4): one of start and end, one of each channel of map."""
    node = cross_entropy(start, targets.start > 0.5, weights.start)
    node = node + cross_entropy(end, targets.end > 0.5, weights.end)
    regression = (weights.regression * (map[:, 0] - targets.iou).square()).sum()
    classification = cross_entropy(map[:, 1], targets.iou > 0.9, weights.classification)
    return {"node": node, "regression": regression, "classification": classification}


@torch.no_grad()
def decode(start: Tensor, end: Tensor, map: Tensor, *, every_pair=False, longest=None) -> tuple:
    """Turn outputs into segments (B, K, 2) in [0, 1], scores (B, K), valid (B, K), best first.

    A start s in 0 .. L - 1 is kept if its score is a local peak or above half the video's best;
    s = 0 always. An end e in 1 .. L likewise, by the score of snippet e as in the release; the last
    two always, by that of snippet L - 1, where the target of a segment that ends with the video is
    1. Each kept pair with e > s is a proposal [s/L, e/L]; its score is map[1] * map[0] at cell
    (e - s - 1, s). every_pair: all pairs are kept. longest: those of at most so many snippets. K is
    that of the video with most proposals; others are padded with score 0 and valid False.
    """
    D, L = map.shape[2:]
    scores = torch.stack([start, end])  # (2, B, L)
    inner = scores[:, :, 1:-1]
    keep = scores > 0.5 * scores.amax(dim=2, keepdim=True)
    keep[:, :, 1:-1] |= (inner > scores[:, :, :-2]) & (inner > scores[:, :, 2:])
    starts, ends = keep
    starts[:, 0] = True
    ends[:, -1] = True
    s, d, inside = anchor_grid(L, D, map.device)
    e = (s + d + 1).clamp_max(L - 1)  # (D, L), where boundary e has its score
    inside = inside & (d < (longest or D))
    keep = (starts[:, s] & ends[:, e] | every_pair) & inside  # (B, D, L)
    score = map[:, 0] * map[:, 1]
    K = int(keep.flatten(1).sum(dim=1).max())
    score = score.masked_fill(~keep, -1).flatten(1)
    score, cell = (x[:, :K] for x in score.sort(dim=1, descending=True, stable=True))
    segments = torch.stack([cell % L, cell % L + cell // L + 1], dim=2).to(score.dtype) / L
    valid = score >= 0
    return segments * valid.unsqueeze(2), score.clamp_min(0), valid
