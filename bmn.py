"""BMN head: features (B, C, L) -> start (B, L), end (B, L), map (B, 2, L, L), the same calls as gtad.GTAD.

Lin et al., BMN: Boundary-Matching Network for Temporal Action Proposal Generation, ICCV 2019, in the shape of its
PyTorch release. Targets, losses and decoding are gtad.py's, the latter with boundary_scores=True. As in gtad.py, the
Conv3d over the 32 samples is applied to the snippets before they are sampled, and the (256, 32, L, L) map is never
built.

Legend: B videos, C channels, L snippets. Cell (d, s) of the map covers snippets s .. s + d.
"""
import functools

import torch
from torch import nn

from gtad import align, anchor_grid, build_alignment, confidence, convolve_bins, fill, official_state, pointwise

POINTS = 3          # interpolated points averaged into one sample


def sample(s, e, L, samples):
    """Boundary-matching sampling (BMN, section 3.3): pair, sample, snippet and value of every non-zero weight, (nnz,).

    s, e: (A,) first and last snippet of each pair, s <= e, on the CPU; n = e + 1 - s. samples * 3 equally spaced points
    run from s - (n + 1)/2 to e + 1 + (n + 1)/2, both included; a sample is the mean of three consecutive ones, linearly
    interpolated. Snippets outside [0, L - 1] count as zero, except that points between -1 and 0 read snippet 0: the
    release rounds them towards zero. Repeated coordinates add up.
    """
    n = (e + 1 - s).double()
    low, step = s - (n + 1) / 2, (2 * n + 1) / (samples * POINTS - 1)
    point = low[:, None] + step[:, None] * torch.arange(samples * POINTS, dtype=torch.float64)             # (A, points)
    point = torch.where((point > -1) & (point < 0), 0, point)
    below = point.floor()
    snippet = torch.stack([below, below + 1], dim=2).long()                                             # (A, points, 2)
    value = torch.stack([1 - (point - below), point - below], dim=2) / POINTS
    pair, i, side = ((value > 0) & (snippet >= 0) & (snippet < L)).nonzero(as_tuple=True)
    return pair, i // POINTS, snippet[pair, i, side], value[pair, i, side]


@functools.lru_cache(maxsize=32)
def sampling(L, samples, device, dtype):
    """Alignment of the pairs s <= e of an (L, L) map, s as row, and of one empty row for the others, which are zero."""
    with torch.inference_mode(False), torch.no_grad():
        s, e = torch.triu_indices(L, L)
        pair, b, snippet, value = sample(s, e, L, samples)
        return build_alignment(pair, snippet * samples + b, value, (len(s) + 1, L * samples), s * L + e, device, dtype)


class BMN(nn.Module):
    """The boundary-matching network. Parameter names and shapes are those of the release, defaults its sizes.

    in_channels: C of the features; hidden: channels of the 1-d convolutions; map_hidden: the two widths of the map's;
    samples: of a pair; groups: of the 1-d convolutions, the proposal branch's excepted.
    """

    def __init__(self, *, in_channels, hidden=256, map_hidden=(512, 128), samples=32, groups=4):
        super().__init__()
        self.samples = samples
        wide, narrow = map_hidden

        def conv(channels, groups=groups):
            return nn.Conv1d(channels, hidden, 3, padding=1, groups=groups)

        def boundary():
            return nn.Sequential(conv(hidden), nn.ReLU(), nn.Conv1d(hidden, 1, 1), nn.Sigmoid())

        self.x_1d_b = nn.Sequential(conv(in_channels), nn.ReLU(), conv(hidden), nn.ReLU())
        self.x_1d_s, self.x_1d_e = boundary(), boundary()
        self.x_1d_p = nn.Sequential(conv(hidden, 1), nn.ReLU())
        self.x_3d_p = nn.Sequential(nn.Conv3d(hidden, wide, (samples, 1, 1)), nn.ReLU())
        self.x_2d_p = nn.Sequential(
            nn.Conv2d(wide, narrow, 1), nn.ReLU(),
            nn.Conv2d(narrow, narrow, 3, padding=1), nn.ReLU(),
            nn.Conv2d(narrow, narrow, 3, padding=1), nn.ReLU(),
            nn.Conv2d(narrow, 2, 1), nn.Sigmoid())

    def forward(self, x):
        """x (B, C, L), any L -> start (B, L), end (B, L), map (B, 2, L, L), in [0, 1] and at least float32.

        Map cells with s + d >= L, which the release has no pair for, are 0.
        """
        C = self.x_1d_b[0].in_channels
        if x.dim() != 3 or x.shape[1] != C:
            raise ValueError(f"BMN got features of shape {tuple(x.shape)}, expected (B, {C}, L), "
                             "channels before snippets")
        L = x.shape[2]
        base = self.x_1d_b(x)                                                                           # (B, hidden, L)
        start, end = (confidence(branch[2], branch[:2](base).transpose(1, 2)).squeeze(2)
                      for branch in (self.x_1d_s, self.x_1d_e))

        conv, snippets = self.x_3d_p[0], self.x_1d_p(base).transpose(1, 2)
        y = convolve_bins(conv.weight.flatten(1), [snippets], [self.samples])                   # (B, L * samples, wide)
        pairs = sampling(L, self.samples, y.device, y.dtype)
        z = align(y, conv.bias, pairs)                                                            # (B, pairs + 1, wide)
        z = fill(pointwise(self.x_2d_p[0], z).relu_(), pairs, L * L)
        z = self.x_2d_p[2:6](z.unflatten(1, (L, L)).permute(0, 3, 1, 2))                      # start is row, end column
        z = confidence(self.x_2d_p[6], z.permute(0, 2, 3, 1))                                             # (B, L, L, 2)

        s, d, valid = anchor_grid(L, L, x.device)
        z = z[:, s, (s + d).clamp_max(L - 1)] * valid.unsqueeze(2)                                        # (B, D, L, 2)
        return start, end, z.permute(0, 3, 1, 2).contiguous()


def load_official(state_dict, *, groups=4):
    """A BMN with the weights of an official checkpoint's state dict; sizes are read off the tensors.

    A stored sample_mask is ignored, the sampling does not depend on weights. ValueError lists keys that do not fit.
    """
    small = BMN(in_channels=4, hidden=4, map_hidden=(1, 1), samples=1)
    state = {key: value for key, value in state_dict.items() if key.removeprefix("module.") != "sample_mask"}
    state = official_state(state, small.state_dict())
    stem, conv = state["x_1d_b.0.weight"], state["x_3d_p.0.weight"]
    head = BMN(in_channels=stem.shape[1] * groups, hidden=len(stem), samples=conv.shape[2], groups=groups,
               map_hidden=(len(conv), len(state["x_2d_p.0.weight"])))
    head.load_state_dict(state)
    return head
