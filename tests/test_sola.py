"""Hand-worked numbers and references that share no code with sola.py."""
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy, cosine_similarity

from sola import (POSITIONS, SUBSEQUENCE, Predictor, SoLa, auc, linear_probe, sample_subsequences, similarity_floor, similarity_map,
                  similarity_matching_loss, similarity_target, snippet_labels, spread)


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def identity(z):
    return z


# ---------------------------------------------------------------- module

@pytest.mark.parametrize("shape", [(2, 7, 23), (1, 128, 1), (3, 4, 100)])
def test_before_training_the_module_is_the_identity(shape):
    x = rand(*shape)
    assert torch.equal(SoLa(shape[1], hidden=16)(x), x)


def test_sizes_are_the_published_ones():
    count = sum(p.numel() for p in SoLa(2048).parameters())
    assert count == (2048 * 5 + 1) * 512 + (512 + 1) * 512 + (512 + 1) * 2048 + 1 == 6_556_673
    assert sum(p.numel() for p in Predictor(2048).parameters()) == (2048 + 1) * 512 + (512 + 1) * 2048
    assert (SUBSEQUENCE, POSITIONS) == (23, (4, 6, 8, 10, 12, 14, 16, 18))


def test_forward_against_a_loop():
    module, x = SoLa(3, hidden=4, kernel=5).double(), rand(2, 3, 6, dtype=torch.float64)
    with torch.no_grad():
        module.alpha.fill_(0.4)
        module.mean[:], module.std[:] = torch.tensor([1.0, -2, 0]), torch.tensor([2.0, 1, 0.5])
    first, second, third = (module.f[i] for i in (0, 2, 4))
    s = (x - module.mean[:, None]) / module.std[:, None]
    for b in range(2):
        for t in range(6):
            h = first.bias.clone()
            for k in range(5):
                if 0 <= t + k - 2 < 6:  # outside of the video: zero
                    h = h + first.weight[:, :, k] @ s[b, :, t + k - 2]
            h = second.weight[:, :, 0] @ h.relu() + second.bias
            y = s[b, :, t] + math.tanh(0.4) * (third.weight[:, :, 0] @ h.relu() + third.bias)
            torch.testing.assert_close(module(x)[b, :, t], y)
    torch.testing.assert_close(module(x)[:1], module(x[:1]))  # videos do not see each other


@pytest.mark.parametrize("kernel, positions", [(5, POSITIONS), (3, [0, 22]), (7, [5, 1, 1])])
def test_some_positions_alone_are_those_of_the_whole(kernel, positions):
    module, x = SoLa(6, hidden=8, kernel=kernel).double(), rand(2, 6, 23, dtype=torch.float64)
    with torch.no_grad():
        module.alpha.fill_(0.5)
        module.mean.fill_(0.3)  # padding is zero after standardization
    gradients = []
    for y in (module(x)[:, :, positions], module(x, positions)):
        gradients.append(torch.autograd.grad(y.square().sum(), list(module.parameters())))
        torch.testing.assert_close(y, module(x)[:, :, positions], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_gate_opens_in_the_first_step_and_the_rest_follows():
    torch.manual_seed(0)
    module, predictor = SoLa(8, hidden=16), Predictor(8, hidden=16)
    optimizer = torch.optim.AdamW([*module.parameters(), *predictor.parameters()], 1e-3)
    for step in range(2):
        optimizer.zero_grad()
        similarity_matching_loss(module(rand(4, 8, 23), POSITIONS), predictor, similarity_target(8)).backward()
        moved = module.f[0].weight.grad.abs().sum() > 0
        assert module.alpha.grad != 0 and moved == (step > 0)  # f is behind a closed gate at first
        optimizer.step()


def test_saved_module_comes_back_frozen(tmp_path):
    module = SoLa(5, hidden=6, kernel=3)
    with torch.no_grad():
        module.alpha.fill_(-1.0)
        module.mean.fill_(2.0)
    torch.save({"model": module.state_dict(), **module.sizes, "seconds": 1.5}, tmp_path / "sola.pt")
    back, x = SoLa.load(tmp_path / "sola.pt"), rand(2, 5, 9)
    assert torch.equal(back(x), module(x)) and not back(x).requires_grad and not back.training
    # somebody else's head behind it
    head = torch.nn.Conv1d(5, 2, 3, padding=1)
    model = torch.nn.Sequential(back, head)
    model(x).sum().backward()
    assert head.weight.grad is not None and all(p.grad is None for p in back.parameters())


def test_what_does_not_fit_is_one_error():
    with pytest.raises(ValueError, match=r"\(2, 9, 5\), expected \(B, 5, L\)"):
        SoLa(5, hidden=4)(rand(2, 9, 5))
    with pytest.raises(ValueError, match="kernel 4"):
        SoLa(5, kernel=4)


# ---------------------------------------------------------------- similarity matching

def test_target_by_hand():
    t = similarity_target(8)
    assert t.shape == (8, 8) and torch.equal(t, t.T) and torch.equal(t.diagonal(), torch.ones(8))
    for distance in range(1, 8):
        torch.testing.assert_close(t[0, distance].item(), 1 / (1 + math.exp(-16 / distance**2)), rtol=1e-6, atol=0)
    assert abs(t[2, 4].item() - 0.98201379) < 1e-6  # sigmoid(4)
    assert abs(similarity_target(3, coefficient=4 * math.log(3))[0, 2].item() - 0.75) < 1e-6


def test_loss_and_floor_by_hand():
    e = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # two orthogonal snippets: cosine 0, similarity 1/2
    target = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    assert similarity_matching_loss(e, identity, target).item() == pytest.approx(math.log(2) / 2, rel=1e-5)  # the diagonal costs nothing
    assert similarity_floor(target).item() == pytest.approx(math.log(2) / 2, rel=1e-6)
    target = torch.tensor([[1.0, 0.25], [0.25, 1.0]])
    assert similarity_matching_loss(e, identity, target).item() == pytest.approx(math.log(2) / 2, rel=1e-5)  # -ln(1/2) whatever the target
    assert similarity_floor(target).item() == pytest.approx((math.log(4) / 4 + math.log(4 / 3) * 3 / 4) / 2, rel=1e-6)
    # 120 degrees apart: cosine -1/2, similarity 1/4 = target, so the loss is on its floor
    z = torch.tensor([[[1.0, -0.5], [0.0, math.sqrt(3) / 2]]])
    assert similarity_matching_loss(z, identity, target).item() == pytest.approx(similarity_floor(target).item(), rel=1e-5)


def test_loss_against_torch_pair_by_pair():
    z, predictor, target = rand(3, 6, 5, dtype=torch.float64), Predictor(6, hidden=7).double(), similarity_target(5, 2.0)
    expected = 0.0
    for b in range(3):
        for i in range(5):
            for j in range(5):
                similar = (1 + cosine_similarity(z[b, :, i], predictor(z[b, :, j]), dim=0)) / 2
                expected += binary_cross_entropy(similar, target[i, j].double()) / 75
    torch.testing.assert_close(similarity_matching_loss(z, predictor, target).double(), expected, rtol=1e-5, atol=0)


def test_loss_never_falls_below_its_floor():
    for seed in range(20):
        target = rand(8, 8, seed=seed).sigmoid()
        loss = similarity_matching_loss(rand(2, 4, 8, seed=seed + 100), Predictor(4, 8), target)
        assert loss > similarity_floor(target) > 0


def test_gradient_stops_on_the_side_without_the_predictor():
    z, target = rand(2, 4, 3, dtype=torch.float64).requires_grad_(), similarity_target(3, 1.0)
    constant = rand(2, 3, 4, seed=1)
    loss = similarity_matching_loss(z, lambda _: constant.clone().requires_grad_(), target)
    assert torch.autograd.grad(loss, z, allow_unused=True)[0] is None  # all that is left of z is its stopped side
    # with a predictor: the gradient is that of a function in which z_i is data and only predictor(z_j) a variable
    predictor, fixed = Predictor(4, hidden=5).double(), z.detach().clone()

    def pairs(left, right):
        similar = (1 + torch.stack([cosine_similarity(left[:, :, i, None], predictor(right.mT).mT, dim=1) for i in range(3)], 1)) / 2
        return binary_cross_entropy(similar, target.double().expand(2, 3, 3))
    got = torch.autograd.grad(similarity_matching_loss(z, predictor, target), z)[0]
    torch.testing.assert_close(got, torch.autograd.grad(pairs(fixed, z), z)[0], rtol=1e-5, atol=1e-8)
    other = torch.autograd.grad(pairs(z, fixed), z)[0]
    assert (got - other).norm() > 0.1 * other.norm()  # the stopped side would have had one, and another one


@pytest.mark.parametrize("make", [lambda: torch.zeros(2, 4, 8), lambda: torch.ones(2, 4, 8), lambda: -torch.ones(2, 4, 8), lambda: 1e18 * rand(2, 4, 8),
                                  lambda: 1e-30 * rand(2, 4, 8)], ids=["zero", "identical", "negative", "huge", "tiny"])
@pytest.mark.parametrize("predict", [identity, lambda z: -z, lambda z: 0 * z, Predictor(4, 8)], ids=["identity", "opposite", "zero", "mlp"])
def test_loss_and_gradient_are_finite_whatever_arrives(make, predict):
    z = make().requires_grad_()
    loss = similarity_matching_loss(z, predict, similarity_target(8))
    assert loss.ndim == 0 and loss.isfinite() and loss < 20
    assert torch.autograd.grad(loss, z)[0].isfinite().all()


def test_half_precision_stays_finite_and_close():
    z, predictor = rand(2, 16, 8), Predictor(16, 8)
    whole = similarity_matching_loss(z, predictor, similarity_target(8))
    with torch.autocast("cpu", torch.bfloat16):
        half = similarity_matching_loss(z, predictor, similarity_target(8))
        assert similarity_matching_loss(torch.ones(1, 16, 8), identity, similarity_target(8)).isfinite()
    assert half.dtype == torch.float32 and half.item() == pytest.approx(whole.item(), rel=0.02)


def test_subsequences_are_a_function_of_the_generator():
    lengths = [23, 24, 40, 1000]
    draw = [torch.stack([sample_subsequences(lengths, generator=g) for _ in range(2000)]) for g in (torch.Generator().manual_seed(s) for s in (3, 3, 4))]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    starts = draw[0]
    assert starts.dtype == torch.int64 and (starts[:, 0] == 0).all()
    for column, length in enumerate(lengths):
        counts = torch.bincount(starts[:, column], minlength=length - 22)
        assert len(counts) == length - 22  # the last one that fits is drawn, none beyond
        assert (counts[:18] - 2000 / len(counts)).abs().max() < 6 * math.sqrt(2000 / len(counts)) + 1  # evenly
    assert sample_subsequences([5, 5], 5).tolist() == [0, 0]
    with pytest.raises(ValueError, match="1 of 3 videos are shorter than a subsequence of 23 snippets, the shortest has 22"):
        sample_subsequences([40, 22, 23])


def test_training_brings_the_loss_towards_its_floor_without_collapse():
    """Slow random walks: neighbours are alike, distant snippets are not; one cosine fits all of them badly."""
    torch.manual_seed(0)
    x = rand(64, 16, 23).cumsum(2)
    module, predictor, target = SoLa(16, hidden=32), Predictor(16, hidden=32), similarity_target(8)
    optimizer, losses = torch.optim.AdamW([*module.parameters(), *predictor.parameters()], 3e-3), []
    for _ in range(200):
        optimizer.zero_grad()
        losses.append(similarity_matching_loss(module(x, POSITIONS), predictor, target))
        losses[-1].backward()
        optimizer.step()
    floor = similarity_floor(target)
    assert floor < losses[-1] < floor + 0.3 * (losses[0] - floor)
    assert module.gate.abs() > 0.02 and spread(module(x)) > 0.3


# ---------------------------------------------------------------- measures

def test_similarity_map_and_spread_by_hand():
    x = torch.tensor([[[3.0, 0.0, -5.0, 0.0], [0.0, 2.0, 0.0, 0.0]]])  # east, north, west, nothing
    assert similarity_map(x)[0].tolist() == [[1, 0, -1, 0], [0, 1, 0, 0], [-1, 0, 1, 0], [0, 0, 0, 0]]
    assert spread(x[:, :, :1].expand(1, 2, 9)).item() == 0
    assert spread(x[:, :, [0, 2]]).item() == 1  # opposite
    assert spread(x[:, :, :2]).item() == pytest.approx(math.sqrt(0.5))  # orthogonal
    assert spread(100 * x[:, :, :2].permute(2, 1, 0)).item() == pytest.approx(math.sqrt(0.5))  # of two videos as of one, at any scale
    assert spread(rand(4, 64, 500)) > 0.99


def test_labels_are_those_of_snippet_centres():
    # centres of 10 snippets: .05, .15, ... ; [.1, .25) holds .15; [.5, .55) nothing but the edge; [.82, 1] holds .85 and .95
    labels = snippet_labels(torch.tensor([[0.1, 0.25], [0.46, 0.54], [0.82, 1.0]]), 10)
    assert labels.tolist() == [False, True, False, False, False, False, False, False, True, True]
    assert snippet_labels(torch.zeros(0, 2), 3).tolist() == [False] * 3


def test_auc_by_hand():
    assert auc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1])) == 0.75
    assert auc(torch.tensor([1.0, 1, 1, 1]), torch.tensor([0, 1, 0, 1])) == 0.5
    assert auc(torch.tensor([2.0, 1, 1]), torch.tensor([1, 1, 0])) == 0.75
    assert math.isnan(auc(torch.tensor([1.0, 2]), torch.tensor([1, 1])))


def newton(x, y, decay):
    """Regularized logistic regression in numpy, by Newton's method."""
    x, w = np.c_[x, np.ones(len(x))], np.zeros(x.shape[1] + 1)
    penalty = np.diag([decay] * (len(w) - 1) + [0])
    for _ in range(30):
        p = 1 / (1 + np.exp(-x @ w))
        w -= np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x / len(x) + penalty, x.T @ (p - y) / len(x) + penalty @ w)
    return w


def test_probe_is_the_logistic_regression_that_newton_finds():
    x, other = 5 + rand(400, 6, dtype=torch.float64) * torch.tensor([1.0, 10, 0.1, 1, 1, 1]), 5 + rand(301, 6, seed=1, dtype=torch.float64)
    truth = torch.tensor([1.0, -0.2, 5, 0, 0, 0.5], dtype=torch.float64)
    labels, other_labels = (((v - 5) @ truth + rand(len(v), seed=2, dtype=torch.float64)) > 0.3 for v in (x, other))
    mean, std = x.mean(0), x.std(0)
    w = newton(((x - mean) / std).numpy(), labels.numpy(), 1e-3)
    logits = ((other - mean) / std).numpy() @ w[:-1] + w[-1]
    pairs = np.sign(logits[other_labels.numpy()][:, None] - logits[~other_labels.numpy()])
    got = linear_probe(x, labels, other, other_labels)
    assert got["accuracy"] == ((logits > 0) == other_labels.numpy()).mean() and 0.6 < got["accuracy"] < 1
    assert got["auc"] == pytest.approx((pairs.mean() + 1) / 2, abs=1e-3)
    assert got["background"] == pytest.approx(1 - other_labels.double().mean().item())
    assert got == linear_probe(x, labels, other, other_labels)  # nothing random
    single = linear_probe(x.float(), labels, other.float(), other_labels)
    assert single["auc"] == pytest.approx(got["auc"], abs=1e-3)


def test_probe_of_constant_channels_and_of_one_class_is_no_crash():
    x, labels = torch.cat([rand(50, 2), torch.full((50, 1), 7.0)], 1), torch.arange(50) % 2 == 0
    assert math.isfinite(linear_probe(x, labels, x, labels)["auc"])
    got = linear_probe(x, torch.zeros(50).bool(), x, torch.zeros(50).bool())
    assert got["accuracy"] == got["background"] == 1 and math.isnan(got["auc"])
