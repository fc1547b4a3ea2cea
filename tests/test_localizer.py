import pytest
import torch

import engine
import gtad
from localizer import Localizer, encode, train_step
from tsm import TSM

SIZES = dict(hidden=8, gcn_width=8, gcn_groups=2, inner_bins=4, context_bins=2, map_hidden=(8, 4))
LOSS = {"node": 1, "regression": 10, "classification": 1}
SEGMENTS = [torch.tensor([[0.0, 0.4]]), torch.tensor([[0.1, 0.6], [0.7, 1.0]]), torch.zeros(0, 2), torch.tensor([[0.25, 0.75]])]


def model_and_batch(durations=None):
    torch.manual_seed(0)
    encoder = TSM(width=8, maxpool=False, frozen_bn=True)
    for m in encoder.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 1.5)
    model = Localizer("gtad", {**SIZES, "durations": durations}, channels=64, encoder=encoder).double().train()
    frames = torch.randint(0, 256, (4, 8, 2, 3, 16, 16), dtype=torch.uint8)
    return model, {"frames": frames, "segments": SEGMENTS}


def step(model, batch, **options):
    model.zero_grad()
    terms = train_step(model, batch, loss=LOSS, class_weight=1, generator=torch.Generator().manual_seed(1), shard=(0, 1), reduce=None, **options)
    return terms, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_a_step_is_the_plain_backward_of_the_total_loss():
    model, batch = model_and_batch()
    terms, gradients = step(model, batch)
    model.zero_grad()
    targets = gtad.make_targets(SEGMENTS, 8)
    weights = gtad.loss_weights(targets, generator=torch.Generator().manual_seed(1))
    plain = gtad.losses(*model(batch["frames"])[:3], targets, weights)
    (plain["node"] + 10 * plain["regression"] + plain["classification"]).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms["loss"], (plain["node"] + 10 * plain["regression"] + plain["classification"]).detach())


@pytest.mark.parametrize("options", [dict(accumulate=2), dict(accumulate=4), dict(chunk=3), dict(chunk=1), dict(chunk=8), dict(accumulate=2, chunk=5)])
@pytest.mark.parametrize("durations", [None, 5])
def test_accumulation_and_chunks_leave_the_gradient_as_it_is(options, durations):
    model, batch = model_and_batch(durations)
    whole, expected = step(model, batch)
    terms, gradients = step(model, batch, **options)
    for key in whole:
        torch.testing.assert_close(terms[key], whole[key], rtol=1e-10, atol=1e-10)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0 or "context" in name or name.endswith("bias"), name
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


def test_dropout_draws_the_same_in_both_passes_over_the_chunks():
    class Noisy(torch.nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder, self.dropout, self.seen = encoder, torch.nn.Dropout(0.5), []

        def forward(self, frames):
            x = self.dropout(self.encoder(frames))
            self.seen.append(x.detach())
            return x
    model, batch = model_and_batch()
    model.encoder = Noisy(model.encoder)
    step(model, batch, chunk=3)
    first, second = model.encoder.seen[:3], model.encoder.seen[3:]
    assert (first[0] == 0).double().mean() > 0.4 and not torch.equal(first[0] == 0, first[1] == 0)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, dict(chunk=3)])
def test_bfloat16_on_a_cpu_is_close_and_leaves_losses_gradients_and_features_in_float32(options):
    model, batch = model_and_batch()
    model.float()
    batch["frames"] = torch.nn.functional.interpolate(batch["frames"].flatten(0, 2).float(), 32).byte().view(4, 8, 2, 3, 32, 32)
    whole, expected = step(model, batch)
    half = engine.Process(0, 1, torch.device("cpu"), "bfloat16").autocast
    terms, gradients = step(model, batch, autocast=half, **options)
    assert all(v.dtype == torch.float32 for v in (*terms.values(), *gradients.values()))
    for key in whole:
        assert 0 < abs(terms[key] - whole[key]) < 0.05 * whole[key], key
    one, two = (torch.cat([g.flatten() for g in gs.values()]) for gs in (gradients, expected))
    assert torch.cosine_similarity(one, two, dim=0) > 0.98
    one, two = encode(model.encoder, batch["frames"], 3, half), encode(model.encoder, batch["frames"], 3)
    assert one.dtype == two.dtype == torch.float32 and 0 < (one - two).norm() < 0.02 * two.norm()


def test_the_head_and_the_classifier_see_their_own_standardized_features():
    torch.manual_seed(0)
    model = Localizer("gtad", SIZES, channels=8, classes=3)
    model.mean[:], model.std[:], model.video_std[:] = torch.randn(8), torch.rand(8) + 0.5, torch.rand(8) + 0.1
    x = torch.randn(2, 8, 8)
    start, end, map, logits = model(x)
    again = model.head((x - model.mean[:, None]) / model.std[:, None])
    torch.testing.assert_close((start, end, map), again)
    torch.testing.assert_close(logits, model.classifier((x.mean(2) - model.mean) / model.video_std))


def test_the_classifier_is_trained_beside_the_head():
    torch.manual_seed(0)
    model = Localizer("gtad", SIZES, channels=8, classes=3)
    batch = {"features": torch.randn(4, 8, 8), "segments": SEGMENTS, "target": torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 0, 0], [0, 0, 1]])}
    terms, gradients = step(model, batch)
    log = model(batch["features"])[3].log_softmax(1)
    expected = -(log[0, 0] + 0.5 * log[1, 0] + 0.5 * log[1, 1] + log[3, 2]) / 4  # a video without a class counts nothing
    torch.testing.assert_close(terms["class"], expected.detach())
    halves, again = step(model, batch, accumulate=2)
    torch.testing.assert_close(halves, terms)
    torch.testing.assert_close(again, gradients, rtol=1e-4, atol=1e-6)


def test_bmn_scores_have_the_boundaries_in_them():
    torch.manual_seed(0)
    model = Localizer("bmn", dict(hidden=8, map_hidden=(8, 4), samples=4), channels=8, classes=2).eval()
    start, end, map, _ = model(torch.randn(1, 8, 8))
    segments, scores, valid = model.proposals(start, end, map)
    s, e = (segments[0, 0] * 8).round().long().tolist()
    torch.testing.assert_close(scores[0, 0], start[0, s] * end[0, min(e, 7)] * map[0, 0, e - s - 1, s] * map[0, 1, e - s - 1, s])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, dict(accumulate=2), dict(chunk=3)])
def test_a_step_on_the_gpu_is_that_on_the_cpu(options):
    model, batch = model_and_batch()
    whole, expected = step(model, batch)
    model.cuda()
    terms, gradients = step(model, {**batch, "frames": batch["frames"].cuda()}, **options)
    for key in whole:
        torch.testing.assert_close(terms[key].cpu(), whole[key], rtol=1e-6, atol=1e-8)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name].cpu(), gradient, rtol=1e-5, atol=1e-8, msg=name)
    model.float()
    terms, _ = step(model, {**batch, "frames": batch["frames"].cuda()}, autocast=lambda: torch.autocast("cuda", torch.bfloat16), **options)
    assert terms["loss"].item() == pytest.approx(whole["loss"].item(), rel=0.1)
