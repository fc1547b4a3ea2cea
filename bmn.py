"""Localize actions with the BMN head: features (B, C, L) -> start, end (B, L), map (B, 2, L, L).

Lin et al., BMN: Boundary-Matching Network for Temporal Action Proposal Generation, ICCV 2019, in
the shape of its PyTorch release. Calls and losses are gtad.py's, and so are targets and decoding
but for what BMN.make_targets and BMN.decode say. As in gtad.py, the Conv3d over the 32 samples is
applied to the snippets before they are sampled: the (256, 32, L, L) map is never built.

Legend: B videos, C channels, L snippets, A pairs. Cell (d, s) covers snippets s .. s + d;
where these leave the video, the release has no pair, and the cell is 0.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import gtad


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
    step = (2 * n + 1) / (samples * 3 - 1)
    count = torch.arange(samples * 3, dtype=torch.float64)
    point = low[:, None] + step[:, None] * count  # (A, points)
    point = torch.where((point > -1) & (point < 0), 0, point)
    below = point.floor()
    snippet = torch.stack([below, below + 1], dim=2).long()  # (A, points, 2)
    value = torch.stack([1 - (point - below), point - below], dim=2) / 3
    inside = (value > 0) & (snippet >= 0) & (snippet < L)
    pair, i, side = inside.nonzero(as_tuple=True)
    return pair, i // 3, snippet[pair, i, side], value[pair, i, side]


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def sampling(L: int, samples: int, device, dtype) -> gtad.Alignment:
    """Return the Alignment of the pairs s <= e of an (L, L) map, s as row; all others are zero."""
    s, e = torch.triu_indices(L, L)
    valid = torch.ones(L, L, dtype=torch.bool).triu()
    return gtad.Alignment([sample(s, e, L, samples)], (samples,), valid, device, dtype)


class BMN(nn.Module):
    """The boundary-matching network. Parameter names and shapes, and sizes, are the release's.

    in_channels: C. hidden: channels of the 1-d convolutions, groups theirs, the proposal branch's
    excepted. map_hidden: the two widths of the map's convolutions. samples: of a pair.
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

        def conv(channels, groups=groups):
            return nn.Conv1d(channels, hidden, 3, padding=1, groups=groups)

        def boundary():
            return nn.Sequential(conv(hidden), nn.ReLU(), nn.Conv1d(hidden, 1, 1), nn.Sigmoid())

        self.x_1d_b = nn.Sequential(conv(in_channels), nn.ReLU(), conv(hidden), nn.ReLU())
        self.x_1d_s = boundary()
        self.x_1d_e = boundary()
        self.x_1d_p = nn.Sequential(conv(hidden, 1), nn.ReLU())
        self.x_3d_p = nn.Sequential(nn.Conv3d(hidden, map_hidden[0], (samples, 1, 1)), nn.ReLU())
        self.x_2d_p = gtad.map_layers(*map_hidden, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (B, C, L) to start, end (B, L) and map (B, 2, L, L), in [0, 1], at least float32."""
        C = self.x_1d_b[0].in_channels
        if x.dim() != 3 or x.shape[1] != C:
            raise ValueError(f"BMN got {tuple(x.shape)}, expected (B, {C}, L)")
        L = x.shape[2]
        base = self.x_1d_b(x)  # (B, hidden, L)
        start = gtad.confidence(self.x_1d_s[2], self.x_1d_s[:2](base).transpose(1, 2)).squeeze(2)
        end = gtad.confidence(self.x_1d_e[2], self.x_1d_e[:2](base).transpose(1, 2)).squeeze(2)

        features = self.x_1d_p(base).transpose(1, 2)
        pairs = sampling(L, self.samples, features.device, features.dtype)
        convs = (self.x_3d_p[0], *self.x_2d_p[::2])
        z = gtad.score_map(convs, [features], pairs)  # row s, column e
        s, d, valid = gtad.anchor_grid(L, L, x.device)
        return start, end, z[:, :, s, (s + d).clamp_max(L - 1)] * valid

    def make_targets(self, segments: Sequence[Tensor], L: int, device=None) -> gtad.Targets:
        """Return gtad.make_targets, the bin of snippet i being [i - 0.5, i + 0.5]."""
        return gtad.make_targets(segments, L, device=device, bin_width=1.0)

    @torch.no_grad()
    def decode(self, start: Tensor, end: Tensor, map: Tensor) -> tuple:
        """Return gtad.decode of every pair; scores have those of start and end in them."""
        L = start.shape[1]
        s, d, _ = gtad.anchor_grid(L, L, map.device)
        boundaries = start[:, s] * end[:, (s + d + 1).clamp_max(L - 1)]
        scores = torch.stack([map.prod(1), boundaries], dim=1)
        return gtad.decode(start, end, scores, every_pair=True)


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
