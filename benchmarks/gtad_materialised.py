"""Compute the G-TAD head as its equations read, with the whole (C * bins, D, L) map in memory.

The yardstick for gtad.py, in speed and in exactness: written apart from it, on the modules of a
`gtad.GTAD`, so that both have the same weights. Edges are concatenated before their convolution,
all D * L cells are computed, and each sub-graph is sampled before the localization module runs.
Sampling is one matrix product with the interpolation weights.
"""

import functools

import torch


def nearest_snippets(x, k):
    """Return the k nearest snippets by Euclidean distance, itself among them: (B, L, k)."""
    square = x.square().sum(dim=1)
    distance = square.unsqueeze(1) + square.unsqueeze(2) - 2 * x.transpose(1, 2) @ x
    return distance.topk(k, dim=2, largest=False).indices


def neighbours(x, k):
    """Return the features of the nearest snippets: (B, C, L) -> (B, C, L, k)."""
    B, C, L = x.shape
    index = nearest_snippets(x.detach(), k).reshape(B, 1, L * k).expand(B, C, L * k)
    return x.gather(2, index).view(B, C, L, k)


def gcnext(block, x, k):
    near = neighbours(x, k)
    edges = torch.cat([near, x.unsqueeze(3).expand_as(near)], dim=1)  # (B, 2C, L, k)
    return torch.relu(block.tconvs(x) + x + block.sconvs(edges).max(dim=3).values)


@functools.lru_cache
def sampling(L, D, bins, device, dtype):
    """Return (L, bins * D * L): column (bin, d, s) holds the weights of a bin of anchor (s, d)."""
    d, s = torch.meshgrid(torch.arange(D).double(), torch.arange(L).double(), indexing="ij")
    d = d.flatten()
    s = s.flatten()
    inside = s + d < L
    start = torch.where(inside, s - (d + 1) / 2, 0)
    region = torch.where(inside, 2 * d + 1, 1)
    points = (region / bins).ceil()
    b = torch.arange(bins).double().unsqueeze(1)
    snippets = torch.arange(L).double()
    weight = torch.zeros(bins, D * L, L, dtype=torch.float64)
    for i in range(int(points.max())):
        position = start + region / bins * (b + (i + 0.5) / points)  # (bins, D * L)
        counts = (i < points) & (position >= -1) & (position <= L)
        position = position.clamp(0, L - 1).unsqueeze(2)
        near = (1 - (position - snippets).abs()).clamp_min(0)
        weight += near * (counts / points).unsqueeze(2)
    return weight.view(-1, L).t().to(device, dtype).contiguous()


def boundary_scores(branch, x, k):
    block, conv, sigmoid = branch
    return sigmoid(conv(gcnext(block, x, k))).squeeze(1)


def materialised(head, x):
    """Return what head(x) returns: start (B, L), end (B, L), map (B, 2, D, L)."""
    stem, relu, block = head.backbone1
    k = head.neighbours
    base = gcnext(block, relu(stem(x)), k)
    x = gcnext(head.backbone2[0], base, k)
    B, C, L = x.shape
    D = head.durations or L
    context = neighbours(x, k).mean(dim=3)
    parts = []
    for features, bins in zip((x, context), head.bins, strict=True):
        sampled = features @ sampling(L, D, bins, x.device, x.dtype)
        parts.append(sampled.view(B, C, bins, D, L))
    subgraphs = torch.cat(parts, dim=2)  # (B, C, bins, D, L)
    start = boundary_scores(head.regu_s, base, k)
    end = boundary_scores(head.regu_e, base, k)
    return start, end, head.localization(subgraphs.flatten(1, 2))
