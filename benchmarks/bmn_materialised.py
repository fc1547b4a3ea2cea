"""Compute the BMN head as its paper reads, with the whole (hidden, samples, L, L) map in memory.

The yardstick for bmn.py, in speed and in exactness: written apart from it, on the modules of a
`bmn.BMN`, so that both have the same weights. All L * L cells are sampled by one matrix product
with the weights, then the Conv3d.
"""

import functools
import math

import torch


def pair_weights(s, e, L, samples):
    """Return (samples, L) of the pair of snippets s <= e, point by point (BMN, section 3.3)."""
    weights = torch.zeros(samples, L, dtype=torch.float64)
    n = e + 1 - s
    low = s - (n + 1) / 2
    high = e + 1 + (n + 1) / 2
    for i in range(3 * samples):
        p = low + (high - low) / (3 * samples - 1) * i
        if -1 < p < 0:
            p = 0.0  # rounded towards zero, as the release does
        below = math.floor(p)
        for snippet, share in ((below, 1 - (p - below)), (below + 1, p - below)):
            if 0 <= snippet < L:
                weights[i // 3, snippet] += share / 3
    return weights


@functools.lru_cache
def sampling(L, samples, device, dtype):
    """Return (L, samples * L * L): column (sample, s, e) holds its weights, 0 for s > e."""
    weights = torch.zeros(samples, L, L, L, dtype=dtype)  # sample, s, e, snippet
    for s in range(L):
        for e in range(s, L):
            weights[:, s, e] = pair_weights(s, e, L, samples)
    return weights.view(-1, L).t().to(device).contiguous()


def materialised(head, x):
    """Return what head(x) returns: start (B, L), end (B, L), map (B, 2, L, L)."""
    base = head.x_1d_b(x)
    features = head.x_1d_p(base)
    B, C, L = features.shape
    sampled = features @ sampling(L, head.samples, x.device, features.dtype)
    sampled = sampled.view(B, C, head.samples, L, L)
    pairs = head.x_2d_p(head.x_3d_p(sampled).squeeze(2))  # (B, 2, start, end)
    index = torch.arange(L, device=x.device)
    end = index + index.unsqueeze(1)  # of row d and column s
    cells = pairs.gather(3, end.t().clamp_max(L - 1).expand(B, 2, L, L)).transpose(2, 3)
    return head.x_1d_s(base).squeeze(1), head.x_1d_e(base).squeeze(1), cells * (end < L)
