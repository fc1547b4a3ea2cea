"""sola.py against hand-worked numbers and references that share no code with it."""

import contextlib
import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy, cosine_similarity

from sola import (
    InputError,
    Predictor,
    SimilarityMatching,
    SoLa,
    sample_subsequences,
    similarity_floor,
    similarity_matching_loss,
    similarity_step,
    similarity_target,
    spread,
)

POSITIONS = [4, 6, 8, 10, 12, 14, 16, 18]  # the published ones, of 23 snippets


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def identity(z):
    return z


# ----------------------------------------------------------------------------------------- module


@pytest.mark.parametrize("shape", [(2, 7, 23), (1, 128, 1), (3, 4, 100)])
def test_before_training_the_module_is_the_identity(shape):
    x = rand(*shape)
    assert torch.equal(SoLa(shape[1], hidden=16)(x), x)


def test_sizes_are_the_published_ones():
    count = sum(p.numel() for p in SoLa(2048).parameters())
    assert count == 6_556_673
    assert count == (2048 * 5 + 1) * 512 + (512 + 1) * 512 + (512 + 1) * 2048 + 1
    count = sum(p.numel() for p in Predictor(2048).parameters())
    assert count == (2048 + 1) * 512 + (512 + 1) * 2048


def test_forward_against_a_loop():
    module = SoLa(3, hidden=4, kernel=5).double()
    x = rand(2, 3, 6, dtype=torch.float64)
    with torch.no_grad():
        module.alpha.fill_(0.4)
        module.mean[:] = torch.tensor([1.0, -2, 0])
        module.std[:] = torch.tensor([2.0, 1, 0.5])
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
    module = SoLa(6, hidden=8, kernel=kernel).double()
    x = rand(2, 6, 23, dtype=torch.float64)
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
    module = SoLa(8, hidden=16)
    predictor = Predictor(8, hidden=16)
    optimizer = torch.optim.AdamW([*module.parameters(), *predictor.parameters()], 1e-3)
    for step in range(2):
        optimizer.zero_grad()
        z = module(rand(4, 8, 23), POSITIONS)
        similarity_matching_loss(z, predictor, similarity_target(8)).backward()
        moved = module.f[0].weight.grad.abs().sum() > 0
        assert module.alpha.grad != 0 and moved == (step > 0)  # f waits behind a closed gate
        optimizer.step()


def test_saved_module_comes_back_frozen(tmp_path):
    module = SoLa(5, hidden=6, kernel=3)
    with torch.no_grad():
        module.alpha.fill_(-1.0)
        module.mean.fill_(2.0)
    state = {"model": module.state_dict(), **module.sizes, "seconds": 1.5}
    torch.save(state, tmp_path / "sola.pt")
    back = SoLa.load(tmp_path / "sola.pt")
    flipped = bytearray((tmp_path / "sola.pt").read_bytes())
    flipped[flipped.index(module.f[0].weight.detach().numpy().tobytes())] ^= 1
    (tmp_path / "flipped.pt").write_bytes(flipped)
    with pytest.raises(InputError, match=r"flipped\.pt is not a module of stage sola"):
        SoLa.load(tmp_path / "flipped.pt")
    x = rand(2, 5, 9)
    assert torch.equal(back(x), module(x)) and not back(x).requires_grad and not back.training
    # A head of any kind trains after it.
    head = torch.nn.Conv1d(5, 2, 3, padding=1)
    torch.nn.Sequential(back, head)(x).sum().backward()
    assert head.weight.grad is not None and all(p.grad is None for p in back.parameters())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 9, 5\), expected \(B, 5, L\)"):
        SoLa(5, hidden=4)(rand(2, 9, 5))
    with pytest.raises(ValueError, match="kernel 4"):
        SoLa(5, kernel=4)


# ---------------------------------------------------------------------------- similarity matching


def test_target_by_hand():
    t = similarity_target(8)
    assert t.shape == (8, 8) and torch.equal(t, t.T) and torch.equal(t.diagonal(), torch.ones(8))
    for distance in range(1, 8):
        expected = 1 / (1 + math.exp(-16 / distance**2))
        torch.testing.assert_close(t[0, distance].item(), expected, rtol=1e-6, atol=0)
    assert abs(t[2, 4].item() - 0.98201379) < 1e-6  # sigmoid(4)
    three_quarters = similarity_target(3, coefficient=4 * math.log(3))[0, 2].item()
    assert abs(three_quarters - 0.75) < 1e-6


def test_loss_and_floor_by_hand():
    # Two orthogonal snippets: cosine 0, similarity 1/2. The diagonal costs nothing.
    e = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    half = pytest.approx(math.log(2) / 2, rel=1e-5)
    target = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    assert similarity_matching_loss(e, identity, target).item() == half
    assert similarity_floor(target).item() == half
    target = torch.tensor([[1.0, 0.25], [0.25, 1.0]])
    assert similarity_matching_loss(e, identity, target).item() == half  # -ln(1/2) at any target
    floor = similarity_floor(target).item()
    assert floor == pytest.approx((math.log(4) / 4 + math.log(4 / 3) * 3 / 4) / 2, rel=1e-6)
    # 120 degrees apart: cosine -1/2, similarity 1/4 = target, so the loss is on its floor.
    z = torch.tensor([[[1.0, -0.5], [0.0, math.sqrt(3) / 2]]])
    loss = similarity_matching_loss(z, identity, target).item()
    assert loss == pytest.approx(floor, rel=1e-5)


def test_loss_against_torch_pair_by_pair():
    z = rand(3, 6, 5, dtype=torch.float64)
    predictor = Predictor(6, hidden=7).double()
    target = similarity_target(5, 2.0)
    expected = 0.0
    for b in range(3):
        for i in range(5):
            for j in range(5):
                cosine = cosine_similarity(z[b, :, i], predictor(z[b, :, j]), dim=0)
                expected += binary_cross_entropy((1 + cosine) / 2, target[i, j].double()) / 75
    loss = similarity_matching_loss(z, predictor, target).double()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_loss_never_falls_below_its_floor():
    for seed in range(20):
        target = rand(8, 8, seed=seed).sigmoid()
        loss = similarity_matching_loss(rand(2, 4, 8, seed=seed + 100), Predictor(4, 8), target)
        assert loss > similarity_floor(target) > 0


def test_gradient_stops_on_the_side_without_the_predictor():
    z = rand(2, 4, 3, dtype=torch.float64).requires_grad_()
    target = similarity_target(3, 1.0)
    constant = rand(2, 3, 4, seed=1)
    loss = similarity_matching_loss(z, lambda _: constant.clone().requires_grad_(), target)
    # All that is left of z is its stopped side.
    assert torch.autograd.grad(loss, z, allow_unused=True)[0] is None
    # With a predictor: z_i is data, and only predictor(z_j) a variable.
    predictor = Predictor(4, hidden=5).double()
    fixed = z.detach().clone()

    def pairs(left, right):
        predicted = predictor(right.mT).mT
        rows = [cosine_similarity(left[:, :, i, None], predicted, dim=1) for i in range(3)]
        similar = (1 + torch.stack(rows, 1)) / 2
        return binary_cross_entropy(similar, target.double().expand(2, 3, 3))

    found = torch.autograd.grad(similarity_matching_loss(z, predictor, target), z)[0]
    expected = torch.autograd.grad(pairs(fixed, z), z)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    other = torch.autograd.grad(pairs(z, fixed), z)[0]
    assert (found - other).norm() > 0.1 * other.norm()  # the stopped side would have had another


INPUTS = {
    "zero": torch.zeros(2, 4, 8),
    "identical": torch.ones(2, 4, 8),
    "negative": -torch.ones(2, 4, 8),
    "huge": 1e18 * rand(2, 4, 8),
    "tiny": 1e-30 * rand(2, 4, 8),
}
PREDICTORS = {
    "identity": identity,
    "opposite": lambda z: -z,
    "zero": lambda z: 0 * z,
    "mlp": Predictor(4, 8),
}


@pytest.mark.parametrize("values", INPUTS)
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_loss_and_gradient_are_finite_whatever_arrives(values, predictor):
    z = INPUTS[values].clone().requires_grad_()
    loss = similarity_matching_loss(z, PREDICTORS[predictor], similarity_target(8))
    assert loss.ndim == 0 and loss.isfinite() and loss < 20
    assert torch.autograd.grad(loss, z)[0].isfinite().all()


def test_half_precision_stays_finite_and_close():
    z = rand(2, 16, 8)
    predictor = Predictor(16, 8)
    target = similarity_target(8)
    whole = similarity_matching_loss(z, predictor, target)
    with torch.autocast("cpu", torch.bfloat16):
        half = similarity_matching_loss(z, predictor, target)
        assert similarity_matching_loss(torch.ones(1, 16, 8), identity, target).isfinite()
    assert half.dtype == torch.float32 and half.item() == pytest.approx(whole.item(), rel=0.02)


def test_subsequences_are_a_function_of_the_generator():
    lengths = [23, 24, 40, 1000]

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        draws = [sample_subsequences(lengths, generator=generator) for _ in range(2000)]
        return torch.stack(draws)

    starts = draw(3)
    assert torch.equal(starts, draw(3)) and not torch.equal(starts, draw(4))
    assert starts.dtype == torch.int64 and (starts[:, 0] == 0).all()
    for column, length in enumerate(lengths):
        counts = torch.bincount(starts[:, column], minlength=length - 22)
        assert len(counts) == length - 22  # the last one that fits is drawn, none beyond
        expected = 2000 / len(counts)
        assert (counts[:18] - expected).abs().max() < 6 * math.sqrt(expected) + 1  # evenly
    assert sample_subsequences([5, 5], 5).tolist() == [0, 0]
    with pytest.raises(ValueError, match="22 snippets, a subsequence 23"):
        sample_subsequences([40, 22, 23])


def test_spread_by_hand():
    x = torch.tensor([[[3.0, 0.0, -5.0], [0.0, 2.0, 0.0]]])  # east, north, west
    assert spread(x[:, :, :1].expand(1, 2, 9)).item() == 0
    assert spread(x[:, :, [0, 2]]).item() == 1  # opposite
    assert spread(x[:, :, :2]).item() == pytest.approx(math.sqrt(0.5))  # orthogonal
    # Of two videos as of one, at any scale.
    assert spread(100 * x[:, :, :2].permute(2, 1, 0)).item() == pytest.approx(math.sqrt(0.5))
    assert spread(rand(4, 64, 500)) > 0.99


def test_training_brings_the_loss_towards_its_floor_without_collapse():
    """Slow random walks: neighbours are alike, distant snippets are not; no one cosine fits all."""
    torch.manual_seed(0)
    batch = {"features": rand(64, 16, 23).cumsum(2)}
    module = SoLa(16, hidden=32)
    net = SimilarityMatching(module, Predictor(16, hidden=32), POSITIONS)
    assert not {"positions", "target"} & set(net.state_dict())
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    records = []
    for _ in range(200):
        optimizer.zero_grad()
        records.append(similarity_step(net, batch, contextlib.nullcontext))
        optimizer.step()
    first, last = records[0], records[-1]
    assert not any(value.requires_grad for value in last.values())
    floor = last["floor"]
    assert floor == similarity_floor(similarity_target(8))
    assert floor < last["loss"] < floor + 0.3 * (first["loss"] - floor)
    assert first["gate"] == 0 and last["gate"].abs() > 0.02 and last["spread"] > 0.3


def test_a_step_runs_the_forward_pass_alone_in_the_given_context():
    torch.manual_seed(0)
    net = SimilarityMatching(SoLa(16, hidden=8), Predictor(16, 8), POSITIONS, coefficient=4.0)
    batch = {"features": rand(2, 16, 23)}
    seen = []

    def autocast():
        seen.append(True)
        return torch.autocast("cpu", torch.bfloat16)

    terms = similarity_step(net, batch, autocast)
    assert seen == [True] and net.sola.alpha.grad != 0
    with autocast():
        loss, z = net(batch["features"])
    assert z.dtype == torch.float32 and terms["loss"] == loss and terms["spread"] == spread(z)


@pytest.mark.parametrize("change", [{"model": {}}, {"hidden": "x"}, {"channels": 7}, None])
def test_a_foreign_module_is_named(change, tmp_path):
    module = SoLa(8, 4)
    content = {"model": module.state_dict(), "channels": 8, "hidden": 4, "kernel": 3}
    torch.save([1] if change is None else content | change, tmp_path / "sola.pt")
    with pytest.raises(
        InputError, match=r"sola\.pt is not a module of stage sola \(.*\)$"
    ) as error:
        SoLa.load(tmp_path / "sola.pt")
    assert "\n" not in str(error.value)


def test_a_flipped_bit_in_a_module_is_found(tmp_path):
    path = tmp_path / "sola.pt"
    module = SoLa(4, hidden=8)
    torch.save({"model": module.state_dict(), **module.sizes}, path)
    assert SoLa.load(str(path)).sizes == module.sizes
    content = bytearray(path.read_bytes())
    at = content.index(module.f[0].weight.detach().numpy().tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"sola\.pt is not a module of stage sola \(BadZipFile"):
        SoLa.load(str(path))
