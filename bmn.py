"""Localize actions with the BMN head: features (B, C, L) -> start, end (B, L), map (B, 2, L, L).

Lin et al., BMN: Boundary-Matching Network for Temporal Action Proposal Generation, ICCV 2019, in
the shape of its PyTorch release. The same calls as gtad.GTAD; targets, losses and decoding are
gtad.py's, the latter with boundary_scores=True. As in gtad.py, the Conv3d over the 32 samples is
applied to the snippets before they are sampled, and the (256, 32, L, L) map is never built.

Legend: B videos, C channels, L snippets, A pairs. Cell (d, s) covers snippets s .. s + d.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gtad import (
    Alignment,
    anchor_grid,
    build_alignment,
    confidence,
    convolve_bins,
    map_layers,
    score_map,
)

POINTS = 3  # interpolated points averaged into one sample


def sample(s: Tensor, e: Tensor, L: int, samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the weights of boundary-matching sampling (section 3.3): pair, sample, snippet, value.

    s, e: (A,) first and last snippet of each pair, s <= e, on the CPU; n = e + 1 - s. samples * 3
    equally spaced points run from s - (n + 1)/2 to e + 1 + (n + 1)/2, both included; a sample is
    the mean of three consecutive ones, linearly interpolated. Snippets outside [0, L - 1] count as
    zero, except that points between -1 and 0 read snippet 0: the release rounds them towards zero.
    Returns four tensors of the non-zero weights, (nnz,); repeated coordinates add up.
    """
    n = (e + 1 - s).double()
    low = s - (n + 1) / 2
    step = (2 * n + 1) / (samples * POINTS - 1)
    count = torch.arange(samples * POINTS, dtype=torch.float64)
    point = low[:, None] + step[:, None] * count  # (A, points)
    point = torch.where((point > -1) & (point < 0), 0, point)
    below = point.floor()
    snippet = torch.stack([below, below + 1], dim=2).long()  # (A, points, 2)
    value = torch.stack([1 - (point - below), point - below], dim=2) / POINTS
    inside = (value > 0) & (snippet >= 0) & (snippet < L)
    pair, i, side = inside.nonzero(as_tuple=True)
    return pair, i // POINTS, snippet[pair, i, side], value[pair, i, side]


@functools.lru_cache(maxsize=32)
def sampling(L: int, samples: int, device, dtype) -> Alignment:
    """Return the Alignment of the pairs s <= e of an (L, L) map, s as row; all others are zero."""
    with torch.inference_mode(False), torch.no_grad():
        s, e = torch.triu_indices(L, L)
        pair, b, snippet, value = sample(s, e, L, samples)
        entries = (pair, snippet * samples + b, value)
        shape = (len(s) + 1, L * samples)
        return build_alignment(entries, shape, s * L + e, device, dtype)


class BMN(nn.Module):
    """The boundary-matching network. Parameter names and shapes, and sizes, are the release's.

    in_channels: C of the features. hidden: channels of the 1-d convolutions. map_hidden: the two
    widths of the map's. samples: of a pair. groups: of the 1-d convolutions, the proposal branch's
    excepted.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        hidden: int = 256,
        map_hidden: Sequence[int] = (512, 128),
        samples: int = 32,
        groups: int = 4,
    ):
        super().__init__()
        self.samples = samples
        wide, narrow = map_hidden

        def conv(channels, groups=groups):
            return nn.Conv1d(channels, hidden, 3, padding=1, groups=groups)

        def boundary():
            return nn.Sequential(conv(hidden), nn.ReLU(), nn.Conv1d(hidden, 1, 1), nn.Sigmoid())

        self.x_1d_b = nn.Sequential(conv(in_channels), nn.ReLU(), conv(hidden), nn.ReLU())
        self.x_1d_s = boundary()
        self.x_1d_e = boundary()
        self.x_1d_p = nn.Sequential(conv(hidden, 1), nn.ReLU())
        self.x_3d_p = nn.Sequential(nn.Conv3d(hidden, wide, (samples, 1, 1)), nn.ReLU())
        self.x_2d_p = map_layers(wide, narrow, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (B, C, L) to start, end (B, L) and map (B, 2, L, L), in [0, 1], at least float32.

        Map cells with s + d >= L, which the release has no pair for, are 0.
        """
        C = self.x_1d_b[0].in_channels
        if x.dim() != 3 or x.shape[1] != C:
            raise ValueError(f"BMN got {tuple(x.shape)}, expected (B, {C}, L)")
        L = x.shape[2]
        base = self.x_1d_b(x)  # (B, hidden, L)
        start = confidence(self.x_1d_s[2], self.x_1d_s[:2](base).transpose(1, 2)).squeeze(2)
        end = confidence(self.x_1d_e[2], self.x_1d_e[:2](base).transpose(1, 2)).squeeze(2)

        conv = self.x_3d_p[0]
        y = convolve_bins(conv, [self.x_1d_p(base).transpose(1, 2)], [self.samples])
        pairs = sampling(L, self.samples, y.device, y.dtype)
        z = score_map(self.x_2d_p, y, conv.bias, pairs, (L, L))  # start is row, end column
        s, d, valid = anchor_grid(L, L, x.device)
        return start, end, z[:, :, s, (s + d).clamp_max(L - 1)] * valid


def load_official(state_dict: dict, *, groups: int = 4) -> BMN:
    """Make a BMN with the weights of an official checkpoint's state dict, sizes read off them.

    A stored sample_mask is ignored. A KeyError or RuntimeError names keys that do not fit.
    """
    state = {key.removeprefix("module."): value for key, value in state_dict.items()}
    state.pop("sample_mask", None)
    hidden, stem_width, _ = state["x_1d_b.0.weight"].shape
    narrow, wide, _, _ = state["x_2d_p.0.weight"].shape
    sizes = {"map_hidden": (wide, narrow), "samples": state["x_3d_p.0.weight"].shape[2]}
    head = BMN(in_channels=stem_width * groups, hidden=hidden, groups=groups, **sizes)
    head.load_state_dict(state)
    return head
