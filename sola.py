"""SoLa: a small residual network between frozen features and any localization head, trained without labels.

Kang et al., Soft-Landing Strategy for Alleviating the Task Discrepancy Problem in Temporal Action Localization Tasks, CVPR 2023.
Training is Similarity Matching: neighbouring snippets shall look alike, distant ones apart, with the distance in time as the only teacher, and
SimSiam's predictor and stop-gradient against collapse. The predictor is thrown away; the module stays in front of the head.

    x = features[:, :, start:start + 23]                                   # a subsequence, 23 consecutive snippets
    z = sola(x, POSITIONS)                                                 # (B, C, 8)
    loss = similarity_matching_loss(z, predictor, similarity_target(8))    # never below similarity_floor(similarity_target(8))

Legend: B videos, C channels, L snippets, n gathered snippets, N segments. Features are (B, C, L).
"""
import torch
from torch import nn

SUBSEQUENCE, POSITIONS = 23, (4, 6, 8, 10, 12, 14, 16, 18)  # published: consecutive snippets a sample, and those of them that are compared


class SoLa(nn.Module):
    """x + tanh(alpha) f(x) on (B, C, L), any L; f: Conv1d(C -> hidden, kernel), ReLU, Conv1d(hidden, 1), ReLU, Conv1d(-> C, 1).

    The gate alpha starts at 0, so that the module is the identity before training. The buffers `mean` and `std` (C,) standardize the input
    where they are set: the similarity of features that share a large mean is close to 1 whatever they show. Until then they change nothing.
    """

    def __init__(self, channels, hidden=512, kernel=5):
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel {kernel}: expected an odd number, so that a snippet stays in its place")
        self.sizes = {"channels": channels, "hidden": hidden, "kernel": kernel}
        self.f = nn.Sequential(nn.Conv1d(channels, hidden, kernel, padding=kernel // 2), nn.ReLU(),
                               nn.Conv1d(hidden, hidden, 1), nn.ReLU(), nn.Conv1d(hidden, channels, 1))
        self.alpha = nn.Parameter(torch.zeros(()))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    @property
    def gate(self):
        """tanh(alpha), in (-1, 1): how much of f is in the output."""
        return self.alpha.tanh()

    def standardized(self, x):
        """What the module changes, (B, C, L): the input itself unless `mean` and `std` are set."""
        if x.ndim != 3 or x.shape[1] != len(self.mean):
            raise ValueError(f"features of shape {tuple(x.shape)}, expected (B, {len(self.mean)}, L)")
        return (x - self.mean[:, None]) / self.std[:, None]

    def forward(self, x, positions=None):
        """(B, C, L) -> (B, C, L), or (B, C, n) of the n snippets `positions` alone, which costs n / L of it: equal to forward(x)[:, :, positions]."""
        x, f = self.standardized(x), self.f
        if positions is None:
            return x + self.gate * f(x)
        k, positions = self.sizes["kernel"], torch.as_tensor(positions, device=x.device)
        windows = (positions[:, None] + torch.arange(k, device=x.device)).flatten()  # what the first convolution sees of each, in padded snippets
        h = nn.functional.pad(x, (k // 2, k // 2))[:, :, windows]  # (B, C, n k)
        return x[:, :, positions] + self.gate * f[1:](nn.functional.conv1d(h, f[0].weight, f[0].bias, stride=k))

    @classmethod
    def load(cls, path):
        """The module of a file {"model": state dict, "channels", "hidden", "kernel", ...}, ready for use: frozen, in evaluation mode."""
        saved = torch.load(path, map_location="cpu", weights_only=True)
        module = cls(saved["channels"], saved["hidden"], saved["kernel"])
        module.load_state_dict(saved["model"])
        return module.eval().requires_grad_(False)


class Predictor(nn.Sequential):
    """SimSiam's predictor, (..., C) -> (..., C), for training only."""

    def __init__(self, channels, hidden=512):
        super().__init__(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))


# ---------------------------------------------------------------- similarity matching

def similarity_target(n, coefficient=16.0):
    """How likely two of n gathered snippets are to look alike, (n, n) in (0.5, 1]: sigmoid(coefficient / (i - j)^2), and 1 for i = j.

    The distance i - j is in gathered snippets: neighbours among POSITIONS are 1 apart.
    """
    i = torch.arange(n, dtype=torch.float64)
    return torch.sigmoid(coefficient / (i[:, None] - i).square()).float()  # 1 / 0 is inf, whose sigmoid is 1


def similarity_matching_loss(features, predictor, target, eps=1e-6):
    """Mean binary cross-entropy between predicted similarities and `target`, a scalar.

    features (B, C, n), gathered module output; predictor: (B, n, C) -> (B, n, C); target (n, n) in [0, 1]. The predicted similarity of i and j is
    (1 + cos(z_i, predictor(z_j))) / 2, where z_i is a constant (stop-gradient): only predictor(z_j) carries gradient. It is kept `eps` away from
    0 and 1, and a zero vector has cosine 0 with everything, so that loss and gradient are finite.
    """
    z = features.transpose(1, 2)  # (B, n, C)
    fixed = nn.functional.normalize(z.detach().float(), dim=2, eps=eps)
    predicted = nn.functional.normalize(predictor(z).float(), dim=2, eps=eps)
    with torch.autocast(z.device.type, enabled=False):  # half precision has no room for 1 - eps
        similar = ((1 + fixed @ predicted.transpose(1, 2)) / 2).clamp(eps, 1 - eps)  # (B, n, n)
    target = target.to(similar)
    return -(target * similar.log() + (1 - target) * (1 - similar).log()).mean()


def similarity_floor(target):
    """The loss where every predicted similarity equals its target, below which it cannot fall: the target's mean entropy, a scalar."""
    return (torch.special.entr(target) + torch.special.entr(1 - target)).mean()


def sample_subsequences(lengths, length=SUBSEQUENCE, *, generator=None):
    """First snippet of one random subsequence a video, uniform over all that fit: (B,) int64 in [0, lengths - length].

    lengths: B numbers of snippets. ValueError if a video is shorter than `length`: leave such videos out beforehand.
    """
    lengths = torch.as_tensor(lengths)
    if (lengths < length).any():
        raise ValueError(f"{int((lengths < length).sum())} of {len(lengths)} videos are shorter than a subsequence of {length} snippets, "
                         f"the shortest has {int(lengths.min())}: leave them out, or take shorter subsequences")
    starts = torch.rand(len(lengths), generator=generator, dtype=torch.float64) * (lengths - length + 1)
    return starts.long()


# ---------------------------------------------------------------- what training did to the features

def similarity_map(features):
    """Cosine similarity of all pairs of snippets: (B, C, L) -> (B, L, L) in [-1, 1]; 0 for a zero vector."""
    unit = nn.functional.normalize(features.float(), dim=1, eps=1e-6)
    return unit.transpose(1, 2) @ unit


def spread(features):
    """How far apart the directions of all snippets of a batch (B, C, L) lie, a scalar in [0, 1].

    The root mean square distance of the unit vectors from their mean: 0 where training has collapsed, 1 where the directions cancel out.
    """
    unit = nn.functional.normalize(features.float(), dim=1, eps=1e-6)
    return (unit - unit.mean((0, 2), keepdim=True)).square().sum(1).mean().sqrt()


def moving_average(features, taps=5):
    """Each snippet replaced by the mean of the `taps` around it, as far as the video goes: (B, C, L) -> (B, C, L). What smoothing without learning brings."""
    return nn.functional.avg_pool1d(features, taps, 1, taps // 2, count_include_pad=False)


def snippet_labels(segments, snippets):
    """Whether the centre (i + 0.5) / L of each snippet lies in an action: segments (N, 2) in [0, 1] -> (L,) bool."""
    centre = (torch.arange(snippets) + 0.5) / snippets
    return ((segments[:, :1] <= centre) & (centre < segments[:, 1:])).any(0)


def auc(scores, labels):
    """Area under the ROC curve, in [0, 1]: how often a positive scores above a negative, ties counting half. NaN without either. (N,), (N,) bool."""
    labels = labels.bool()
    positives, negatives = scores[labels], scores[~labels].sort().values
    if not len(positives) or not len(negatives):
        return float("nan")
    below = torch.searchsorted(negatives, positives) + torch.searchsorted(negatives, positives, right=True)
    return (below.double().mean() / (2 * len(negatives))).item()


def fit_probe(features, labels, *, weight_decay=1e-3, iterations=200):
    """A logistic regression of snippets, features (N, C) and labels (N,) bool; returns the function (M, C) -> logits (M,).

    On features standardized by those given: full batch, L2 penalty weight_decay / 2 |w|^2, LBFGS to convergence, nothing random.
    """
    mean, std = features.mean(0), features.std(0)
    std = std.clamp(min=float(1e-3 * std.max() + 1e-12))  # a constant channel says nothing
    x, y = (features - mean) / std, labels.to(features)
    weight, bias = torch.zeros(x.shape[1]).to(x).requires_grad_(), torch.zeros(()).to(x).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, history_size=20, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(x @ weight + bias, y) + weight_decay / 2 * weight.square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    weight, bias = weight.detach(), bias.detach()
    return lambda features: (features - mean) / std @ weight + bias


def linear_probe(features, labels, held_out, held_out_labels, **options):
    """How linearly an action can be told from background: {"accuracy", "auc", "background"} on held-out snippets, in [0, 1].

    features (N, C) and labels (N,) bool, one row a snippet, train a probe (fit_probe, with its `options`); held_out (M, C) with
    held_out_labels (M,) come from other videos. "background": what calling every held-out snippet background would reach, the accuracy to beat.
    """
    logits, truth = fit_probe(features, labels, **options)(held_out), held_out_labels.bool()
    return {"accuracy": ((logits > 0) == truth).double().mean().item(), "auc": auc(logits, truth), "background": (~truth).double().mean().item()}
