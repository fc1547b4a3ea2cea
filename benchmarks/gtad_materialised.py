"""The G-TAD head computed as its equations read, with the whole (C * bins, D, L) map of sub-graph features in memory.

The yardstick for gtad.py, in speed and in exactness: written apart from it, on the modules of a `gtad.GTAD`, so that
both have the same weights. Edges are concatenated before their convolution, all D * L cells are computed, and each
sub-graph is sampled before the localization module runs. Sampling is one matrix product with the interpolation weights.
"""
import functools

import torch


def knn(x, k):
    """x (B, C, L) -> (B, L, k): the nearest snippets by Euclidean distance, itself among them."""
    square = x.square().sum(dim=1)
    distance = square.unsqueeze(1) + square.unsqueeze(2) - 2 * x.transpose(1, 2) @ x
    return distance.topk(k, dim=2, largest=False).indices


def neighbours(x, k):
    """x (B, C, L) -> (B, C, L, k): the features of the nearest snippets."""
    B, C, L = x.shape
    index = knn(x.detach(), k).reshape(B, 1, L * k).expand(B, C, L * k)
    return x.gather(2, index).view(B, C, L, k)


def gcnext(block, x):
    near = neighbours(x, block.neighbours)
    edges = torch.cat([near, x.unsqueeze(3).expand_as(near)], dim=1)                                     # (B, 2C, L, k)
    return torch.relu(block.tconvs(x) + x + block.sconvs(edges).max(dim=3).values)


@functools.lru_cache
def sampling(L, D, bins, device, dtype):
    """(L, bins * D * L): column (bin, d, s) holds the interpolation weights of that bin of anchor (s, d)."""
    d, s = (index.double().flatten() for index in torch.meshgrid(torch.arange(D), torch.arange(L), indexing="ij"))
    inside = s + d < L
    start = torch.where(inside, s - (d + 1) / 2, 0)
    region = torch.where(inside, 2 * d + 1, 1)
    points = (region / bins).ceil()
    b, l = torch.arange(bins).double().unsqueeze(1), torch.arange(L).double()
    weight = torch.zeros(bins, D * L, L, dtype=torch.float64)
    for i in range(int(points.max())):
        position = start + region / bins * (b + (i + 0.5) / points)                                      # (bins, D * L)
        counts = (i < points) & (position >= -1) & (position <= L)
        position = position.clamp(0, L - 1).unsqueeze(2)
        weight += (1 - (position - l).abs()).clamp_min(0) * (counts / points).unsqueeze(2)
    return weight.view(-1, L).t().to(device, dtype).contiguous()


def materialised(head, x):
    """What head(x) returns: start (B, L), end (B, L), map (B, 2, D, L)."""
    base = head.backbone1[1](head.backbone1[0](x))
    base = gcnext(head.backbone1[2], base)
    start, end = (branch[2](branch[1](gcnext(branch[0], base))).squeeze(1) for branch in (head.regu_s, head.regu_e))
    x = gcnext(head.backbone2[0], base)
    B, C, L = x.shape
    D = head.durations or L
    context = neighbours(x, head.neighbours).mean(dim=3)
    subgraphs = torch.cat([(features @ sampling(L, D, bins, x.device, x.dtype)).view(B, C, bins, D, L)
                           for features, bins in zip((x, context), head.bins)], dim=2)              # (B, C, bins, D, L)
    return start, end, head.localization(subgraphs.flatten(1, 2))
