"""bmn.py against a loop over its sampling points and the network with its whole map in memory."""

import pytest
import torch

from benchmarks.bmn_materialised import materialised, pair_weights
from bmn import BMN, load_official, sample
from gtad import decode, loss_weights, losses, make_targets

SMALL = {"in_channels": 8, "hidden": 12, "map_hidden": (10, 6), "samples": 32}


def small(**changes):
    torch.manual_seed(0)
    return BMN(**{**SMALL, **changes})


@pytest.mark.parametrize("L", [1, 7, 20])
@pytest.mark.parametrize("samples", [32, 5])
def test_sampling_is_its_definition(L, samples):
    s, e = torch.triu_indices(L, L)
    found = torch.zeros(len(s), samples, L, dtype=torch.float64)
    pair, b, snippet, value = sample(s, e, L, samples)
    found.index_put_((pair, b, snippet), value, accumulate=True)
    pairs = zip(s.tolist(), e.tolist(), strict=True)
    expected = torch.stack([pair_weights(first, last, L, samples) for first, last in pairs])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("L", [6, 20])
def test_folded_network_is_the_materialised_one(L):
    """Outputs and all gradients; with 20 snippets the sampling is sparse, with 6 dense."""
    head = small().double()
    x = torch.randn(2, 8, L, dtype=torch.float64, requires_grad=True)
    inputs = [x, *head.parameters()]
    outputs = head(x)
    expected = materialised(head, x)
    upstream = [torch.randn_like(output) for output in outputs]
    outputs += torch.autograd.grad(outputs, inputs, upstream)
    expected += torch.autograd.grad(expected, inputs, upstream)
    for found, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_one_video_equals_its_row_in_a_batch():
    head = small()
    x = torch.randn(2, 8, 20)
    for both, first, second in zip(head(x), head(x[:1]), head(x[1:]), strict=True):
        torch.testing.assert_close(both, torch.cat([first, second]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("L", [6, 20])
def test_bfloat16_autocast(L):
    head = small()
    x = torch.randn(2, 8, L)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head(x)
    for found, wanted in zip(outputs, head(x), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.02)


def test_official_checkpoint():
    """Keys and shapes of the release, written out once more; a stored sample_mask is ignored."""
    shapes = {
        "x_1d_b.0": (256, 100, 3),
        "x_1d_b.2": (256, 64, 3),
        "x_1d_s.0": (256, 64, 3),
        "x_1d_s.2": (1, 256, 1),
        "x_1d_e.0": (256, 64, 3),
        "x_1d_e.2": (1, 256, 1),
        "x_1d_p.0": (256, 256, 3),
        "x_3d_p.0": (512, 256, 32, 1, 1),
        "x_2d_p.0": (128, 512, 1, 1),
        "x_2d_p.2": (128, 128, 3, 3),
        "x_2d_p.4": (128, 128, 3, 3),
        "x_2d_p.6": (2, 128, 1, 1),
    }
    torch.manual_seed(0)
    state = {}
    for key, shape in shapes.items():
        state[f"module.{key}.weight"] = torch.randn(shape) * 0.03
        state[f"module.{key}.bias"] = torch.randn(shape[:1]) * 0.03
    head = load_official({**state, "module.sample_mask": torch.zeros(3)})
    assert {f"module.{key}" for key in head.state_dict()} == set(state)
    x = torch.randn(1, 400, 5)
    for found, wanted in zip(head(x), materialised(head.double(), x.double()), strict=True):
        torch.testing.assert_close(found, wanted.float(), rtol=0, atol=1e-5)
    del state["module.x_2d_p.6.bias"]
    with pytest.raises(RuntimeError, match=r'(?s)Missing.*"x_2d_p\.6\.bias".*Unexpected.*"more"'):
        load_official({**state, "more": torch.zeros(1)})


def test_wrong_features_are_named():
    with pytest.raises(ValueError, match=r"\(2, 20, 8\), expected \(B, 8, L\)"):
        small()(torch.randn(2, 20, 8))


def test_overfitting_puts_the_true_segments_on_top():
    """With the targets, losses and decoding of gtad.py."""
    truth = [torch.tensor([[0.25, 0.5]]), torch.tensor([[0.5, 1.0]])]
    head = small(hidden=32, map_hidden=(32, 16), samples=16)
    x = torch.randn(2, 8, 16) * 0.3
    x[0, 0, 4:8] += 2
    x[1, 1, 8:] += 2
    targets = make_targets(truth, 16)
    optimizer = torch.optim.Adam(head.parameters(), 5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        terms = losses(*head(x), targets, loss_weights(targets, generator=generator))
        optimizer.zero_grad()
        (terms["node"] + 10 * terms["regression"] + terms["classification"]).backward()
        optimizer.step()
    segments, _, _ = decode(*head(x), boundary_scores=True)
    torch.testing.assert_close(segments[:, :1], torch.stack(truth))
