"""SoLa: a small residual network between frozen features and any head, trained without labels.

Kang et al., Soft-Landing Strategy for Alleviating the Task Discrepancy Problem in Temporal Action
Localization Tasks, CVPR 2023. Training is Similarity Matching: neighbouring snippets shall look
alike, distant ones apart, with the distance in time as the only teacher, and SimSiam's predictor
and stop-gradient against collapse. The predictor is thrown away; the module stays before the head.

    x = features[:, :, start:start + 23]  # a subsequence, 23 consecutive snippets
    z = sola(x, [4, 6, 8, 10, 12, 14, 16, 18])  # (B, C, 8)
    target = similarity_target(8)
    loss = similarity_matching_loss(z, predictor, target)  # never below similarity_floor(target)

Legend: B videos, C channels, L snippets, n gathered snippets. Features are (B, C, L).
"""

import zipfile
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class InputError(ValueError):
    """What a user can mend: a file, a path, an option."""


class SoLa(nn.Module):
    """x + tanh(alpha) f(x) on (B, C, L), any L; f is three convolutions and two ReLUs.

    The gate alpha starts at 0: before training the module is the identity. The buffers `mean` and
    `std` (C,), once set, standardize the input: the similarity of features that share a large mean
    is close to 1 whatever they show.
    """

    def __init__(self, channels: int, hidden: int = 512, kernel: int = 5):
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel {kernel}: expected an odd number, to keep snippets in place")
        self.sizes = {"channels": channels, "hidden": hidden, "kernel": kernel}
        first = nn.Conv1d(channels, hidden, kernel, padding=kernel // 2)
        second = nn.Conv1d(hidden, hidden, 1)
        self.f = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv1d(hidden, channels, 1))
        self.alpha = nn.Parameter(torch.zeros(()))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def standardized(self, x: Tensor) -> Tensor:
        """Return what the module changes, (B, C, L): x itself unless `mean` and `std` are set."""
        if x.ndim != 3 or x.shape[1] != len(self.mean):
            raise ValueError(f"SoLa got {tuple(x.shape)}, expected (B, {len(self.mean)}, L)")
        return (x - self.mean[:, None]) / self.std[:, None]

    def forward(self, x: Tensor, positions: Sequence[int] | Tensor | None = None) -> Tensor:
        """Map (B, C, L) to (B, C, L), or to its n snippets `positions` at n / L of the cost."""
        x = self.standardized(x)
        if positions is None:
            return x + self.alpha.tanh() * self.f(x)
        # The first convolution runs on the windows of these positions, side by side.
        first = self.f[0]
        kernel = self.sizes["kernel"]
        windows = F.pad(x, (kernel // 2, kernel // 2)).unfold(2, kernel, 1)[:, :, positions]
        h = F.conv1d(windows.flatten(2), first.weight, first.bias, stride=kernel)
        return x[:, :, positions] + self.alpha.tanh() * self.f[1:](h)

    @classmethod
    def load(cls, path: str) -> "SoLa":
        """Load {"model": state dict, "channels", "hidden", "kernel", ...}, ready for use."""
        try:
            # torch writes the checksum of each tensor, but does not compare it.
            if zipfile.is_zipfile(path) and (entry := zipfile.ZipFile(path).testzip()):
                raise zipfile.BadZipFile(entry)
            saved = torch.load(path, map_location="cpu", weights_only=True)
            module = cls(saved["channels"], saved["hidden"], saved["kernel"])
            module.load_state_dict(saved["model"])
        except Exception as error:  # a damaged or foreign file makes torch raise almost anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise InputError(f"{path} is not a module of stage sola ({reason})") from None
        return module.eval().requires_grad_(False)


class Predictor(nn.Sequential):
    """SimSiam's predictor, (..., C) -> (..., C), for training only."""

    def __init__(self, channels: int, hidden: int = 512):
        super().__init__(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))


def similarity_target(n: int, coefficient: float = 16.0) -> Tensor:
    """Return sigmoid(coefficient / (i - j)^2) of n gathered snippets i, j; (n, n), diagonal 1."""
    i = torch.arange(n, dtype=torch.float64)
    return torch.sigmoid(coefficient / (i[:, None] - i).square()).float()  # 1 / 0 is inf


def similarity_matching_loss(features: Tensor, predictor: Callable, target: Tensor) -> Tensor:
    """Return the mean binary cross-entropy between predicted similarities and `target`.

    features (B, C, n), gathered module output; predictor: (B, n, C) -> (B, n, C); target (n, n) in
    [0, 1]. The predicted similarity of i and j is (1 + cos(z_i, predictor(z_j))) / 2, where z_i has
    no gradient. Kept 1e-6 from 0 and 1, a zero vector's cosine 0: loss and gradient are finite.
    """
    eps = 1e-6
    z = features.transpose(1, 2)  # (B, n, C)
    fixed = F.normalize(z.detach().float(), dim=2, eps=eps)
    predicted = F.normalize(predictor(z).float(), dim=2, eps=eps)
    with torch.autocast(z.device.type, enabled=False):  # half precision has no room for 1 - eps
        similar = ((1 + fixed @ predicted.transpose(1, 2)) / 2).clamp(eps, 1 - eps)  # (B, n, n)
    target = target.to(similar)
    return -(target * similar.log() + (1 - target) * (1 - similar).log()).mean()


def similarity_floor(target: Tensor) -> Tensor:
    """Return what the loss cannot fall below: the target's mean entropy."""
    return (torch.special.entr(target) + torch.special.entr(1 - target)).mean()


def sample_subsequences(lengths, length: int = 23, *, generator=None) -> Tensor:
    """Draw the first snippet of a subsequence of each video, uniform over all that fit: (B,)."""
    lengths = torch.as_tensor(lengths)
    if (lengths < length).any():
        raise ValueError(f"a video has {lengths.min()} snippets, a subsequence {length}")
    starts = torch.rand(len(lengths), generator=generator, dtype=torch.float64)
    return (starts * (lengths - length + 1)).long()


def spread(features: Tensor) -> Tensor:
    """Return how far snippets' directions are from their mean (RMS), in [0, 1]: 0 is collapse."""
    unit = F.normalize(features.float(), dim=1, eps=1e-6)
    return (unit - unit.mean((0, 2), keepdim=True)).square().sum(1).mean().sqrt()


class SimilarityMatching(nn.Module):
    """Put module and predictor behind one forward, for DDP."""

    def __init__(self, sola: SoLa, predictor: Predictor, positions, coefficient: float = 16.0):
        super().__init__()
        self.sola = sola
        self.predictor = predictor
        self.register_buffer("positions", torch.tensor(positions), persistent=False)
        target = similarity_target(len(positions), coefficient)
        self.register_buffer("target", target, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map subsequences (B, C, length) to the loss and the gathered module output (B, C, n)."""
        z = self.sola(x, self.positions)
        return similarity_matching_loss(z, self.predictor, self.target), z


def similarity_step(net: nn.Module, batch: dict, autocast: Callable, generator=None) -> dict:
    """Run forward and backward of a SimilarityMatching, or DDP of one; return detached scalars.

    autocast(): the context of forward. batch["features"]: (B, C, length). generator: unused.
    """
    model = getattr(net, "module", net)
    with autocast():
        loss, z = net(batch["features"])
    loss.backward()
    terms = {"loss": loss.detach(), "floor": similarity_floor(model.target)}
    return terms | {"spread": spread(z.detach()), "gate": model.sola.alpha.detach().tanh()}
