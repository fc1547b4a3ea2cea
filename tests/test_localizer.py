"""localizer.py: a training step, memory savers that leave the gradient as it is, proposals."""

import numpy as np
import pytest
import torch

import checkpoint
import config
import gtad
import localizer
from localizer import Distributed, Localizer, extract_features, localization_step
from media import InputError
from tsm import TSM

SIZES = {
    "hidden": 8,
    "gcn_width": 8,
    "gcn_groups": 2,
    "inner_bins": 4,
    "context_bins": 2,
    "map_hidden": (8, 4),
}
LOSS = {"node": 1, "regression": 10, "classification": 1}
SEGMENTS = [
    torch.tensor([[0.0, 0.4]]),
    torch.tensor([[0.1, 0.6], [0.7, 1.0]]),
    torch.zeros(0, 2),
    torch.tensor([[0.25, 0.75]]),
]
CPU = torch.device("cpu")
FULL = Distributed(0, 1, CPU, "float32")
HALF = Distributed(0, 1, CPU, "bfloat16")


def model_and_batch(durations=None):
    torch.manual_seed(0)
    encoder = TSM(width=8, maxpool=False, frozen_bn=True)
    for m in encoder.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    sizes = {**SIZES, "durations": durations}
    model = Localizer("gtad", sizes, channels=64, encoder=encoder).double().train()
    frames = torch.randint(0, 256, (4, 8, 2, 3, 16, 16), dtype=torch.uint8)
    return model, {"frames": frames, "segments": SEGMENTS}


def step(model, batch, ddp=FULL, **options):
    """Return the losses of a step and the gradients that it leaves."""
    model.zero_grad()
    options = {"class_weight": 1, **options}
    generator = torch.Generator().manual_seed(1)
    terms = localization_step(model, batch, generator, loss=LOSS, options=options, ddp=ddp)
    return terms, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_a_step_is_the_plain_backward_of_the_total_loss():
    model, batch = model_and_batch()
    terms, gradients = step(model, batch)
    model.zero_grad()
    targets = gtad.make_targets(SEGMENTS, 8)
    weights = gtad.loss_weights(targets, generator=torch.Generator().manual_seed(1))
    plain = gtad.losses(*model(batch["frames"])[:3], targets, weights)
    total = plain["node"] + 10 * plain["regression"] + plain["classification"]
    total.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms["loss"], total.detach())


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 2},
        {"accumulate": 4},
        {"chunk_snippets": 3},
        {"chunk_snippets": 1},
        {"chunk_snippets": 8},
        {"accumulate": 2, "chunk_snippets": 5},
    ],
)
@pytest.mark.parametrize("durations", [None, 5])
def test_accumulation_and_chunks_leave_the_gradient_as_it_is(options, durations):
    model, batch = model_and_batch(durations)
    whole, expected = step(model, batch)
    terms, gradients = step(model, batch, **options)
    for term in whole:
        torch.testing.assert_close(terms[term], whole[term], rtol=1e-10, atol=1e-10)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0 or "context" in name or name.endswith("bias"), name
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


class Noisy(torch.nn.Module):
    """An encoder with dropout, which notes what it returned."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.dropout, self.seen = encoder, torch.nn.Dropout(0.5), []

    def forward(self, frames):
        x = self.dropout(self.encoder(frames))
        self.seen.append(x.detach())
        return x


def test_dropout_draws_the_same_in_both_passes_over_the_chunks():
    model, batch = model_and_batch()
    model.encoder = Noisy(model.encoder)
    step(model, batch, chunk_snippets=3)
    first, second = model.encoder.seen[:3], model.encoder.seen[3:]
    assert (first[0] == 0).double().mean() > 0.4
    assert not torch.equal(first[0] == 0, first[1] == 0)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"chunk_snippets": 3}])
def test_bfloat16_is_close_and_leaves_losses_gradients_and_features_in_float32(options):
    model, batch = model_and_batch()
    model.float()
    frames = torch.nn.functional.interpolate(batch["frames"].flatten(0, 2).float(), 32)
    batch["frames"] = frames.byte().view(4, 8, 2, 3, 32, 32)
    whole, expected = step(model, batch)
    terms, gradients = step(model, batch, ddp=HALF, **options)
    assert {x.dtype for x in (*terms.values(), *gradients.values())} == {torch.float32}
    for term in whole:
        assert 0 < abs(terms[term] - whole[term]) < 0.05 * whole[term], term
    one = torch.cat([g.flatten() for g in gradients.values()])
    two = torch.cat([g.flatten() for g in expected.values()])
    assert torch.cosine_similarity(one, two, dim=0) > 0.98
    one = extract_features(model.encoder, batch["frames"], 3, HALF.autocast)
    two = extract_features(model.encoder, batch["frames"], 3)
    assert one.dtype == two.dtype == torch.float32 and 0 < (one - two).norm() < 0.02 * two.norm()


def test_precision_of_a_forward_pass():
    conv, x = torch.nn.Conv1d(2, 2, 1), torch.randn(1, 2, 4)
    dtypes = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
    for precision, dtype in dtypes.items():
        with Distributed(0, 1, CPU, precision).autocast():
            assert conv(x).dtype == dtype


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_precision_of_a_forward_pass_on_a_gpu():
    conv, x = torch.nn.Conv1d(2, 2, 1).cuda(), torch.randn(1, 2, 4).cuda()
    dtypes = {"auto": torch.bfloat16, "float32": torch.float32, "bfloat16": torch.bfloat16}
    for precision, dtype in dtypes.items():
        with Distributed(0, 1, x.device, precision).autocast():
            assert conv(x).dtype == dtype


def test_the_head_and_the_classifier_see_their_own_standardized_features():
    torch.manual_seed(0)
    model = Localizer("gtad", SIZES, channels=8, classes=["a", "b", "c"])
    model.mean[:], model.std[:] = torch.randn(8), torch.rand(8) + 0.5
    model.video_std[:] = torch.rand(8) + 0.1
    x = torch.randn(2, 8, 8)
    start, end, map, logits = model(x)
    again = model.head((x - model.mean[:, None]) / model.std[:, None])
    torch.testing.assert_close((start, end, map), again)
    expected = model.classifier((x.mean(2) - model.mean) / model.video_std)
    torch.testing.assert_close(logits, expected)


def test_the_classifier_is_trained_beside_the_head():
    torch.manual_seed(0)
    model = Localizer("gtad", SIZES, channels=8, classes=["a", "b", "c"])
    target = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 0, 0], [0, 0, 1]])
    batch = {"features": torch.randn(4, 8, 8), "segments": SEGMENTS, "target": target}
    terms, gradients = step(model, batch)
    log = model(batch["features"])[3].log_softmax(1)
    # A video without a class counts nothing.
    expected = -(log[0, 0] + 0.5 * log[1, 0] + 0.5 * log[1, 1] + log[3, 2]) / 4
    torch.testing.assert_close(terms["class"], expected.detach())
    halves, again = step(model, batch, accumulate=2)
    torch.testing.assert_close(halves, terms)
    torch.testing.assert_close(again, gradients, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------ classes of segments


def mean_by_loop(x, start, end):
    """Return the mean of x (n, L) over [start, end] in snippets, overlap by overlap."""
    total = torch.zeros(len(x), dtype=x.dtype)
    for k in range(x.shape[1]):
        total += x[:, k] * max(0.0, min(end, k + 1) - max(start, k))
    return total / (end - start)


def test_span_means_are_those_of_a_loop():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7)
    ends = [[0, 7], [1, 2], [0.25, 0.75], [1.5, 4.25], [6.5, 7], [-1, 2], [5, 9], [-3, -1], [8, 9]]
    spans = torch.tensor(ends).expand(2, -1, -1) / 7
    means = localizer.span_means(x, spans)
    assert means.shape == (2, 3, 9) and means.dtype == torch.float32
    for b in range(2):
        for k, (start, end) in enumerate(ends):
            expected = mean_by_loop(x[b].double(), start, end).float()
            torch.testing.assert_close(means[b, :, k], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(localizer.span_means(x[1:], spans[1:])[0], means[1])
    whole = torch.tensor([[[0.0, 1.0]]])
    torch.testing.assert_close(localizer.span_means(x[:1], whole)[0, :, 0], x[0].mean(1))


def test_the_gradient_of_span_means_is_that_of_finite_differences():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True)
    spans = torch.tensor([[[0.1, 0.73], [-0.2, 0.3], [0.4, 0.4 + 1e-3]]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: localizer.span_means(x, spans), x)


def test_segment_probabilities_are_what_is_more_probable_inside_than_beside():
    """8 snippets, class 0 in the middle four, with probability 0.8; else background, with 0.9."""
    inside, outside = torch.tensor([0.8, 0.1, 0.1]), torch.tensor([0.05, 0.05, 0.9])
    probabilities = torch.stack([outside] * 2 + [inside] * 4 + [outside] * 2, 1)[None]
    segments = torch.tensor([[[2.0, 6], [2, 4], [0, 8], [0, 2]]]) / 8
    found = localizer.segment_probabilities(probabilities.log(), segments)
    assert found.shape == (1, 4, 2)
    torch.testing.assert_close(found[0, 0], torch.tensor([0.75, 0.05]))
    # Half of it: one flank shows the same. The whole video: nothing lies beside it.
    torch.testing.assert_close(found[0, 1, 0], torch.tensor(0.8 - (0.05 + 0.8) / 2))
    logits = probabilities.log().mean(2).softmax(1)[0]
    torch.testing.assert_close(found[0, 2], logits[:2])
    # The first two snippets: what lies before the video counts as 0; never below 0.
    torch.testing.assert_close(found[0, 3], torch.tensor([0.0, 0.0]))


def test_spans_of_training_are_the_segments_and_as_much_background():
    segments = torch.tensor([[0.1, 0.3], [0.5, 0.9]])
    generator = torch.Generator().manual_seed(0)
    spans, classes = localizer.training_spans(segments, torch.tensor([1, 0]), 2, generator)
    assert classes.tolist() == [1, 0, 2, 2]
    moved = (spans[:2] - segments).abs()
    assert (moved <= 0.1 * torch.tensor([[0.2], [0.4]])).all() and (moved > 0).all()
    assert (localizer.evaluate.tiou(spans[2:], segments) < 0.3).all()
    nothing = localizer.training_spans(segments[:0], torch.zeros(0).long(), 2, generator)
    assert nothing[0].shape == (1, 2) and nothing[1].tolist() == [2]


PER_SEGMENT = {"width": 8, "layers": 2, "dropout": 0.0}


def test_members_are_networks_of_their_own_whose_logits_are_averaged():
    together = localizer.SnippetClassifier(6, 2, **PER_SEGMENT, members=3)
    x = torch.randn(2, 6, 10)
    each = together.train()(x)
    assert each.shape == (2, 3, 3, 10)
    torch.testing.assert_close(together.eval()(x), each.mean(1))
    for m in range(3):
        one = localizer.SnippetClassifier(6, 2, **PER_SEGMENT)
        state = {key: value.chunk(3)[m] for key, value in together.state_dict().items()}
        one.load_state_dict(state)
        torch.testing.assert_close(one.eval()(x), each[:, m])


@pytest.mark.parametrize("members", [1, 2])
def test_the_classifier_of_segments_is_trained_beside_the_head(members):
    """Micro-batches and shares of two ranks add up to the loss of the batch; so do gradients."""
    torch.manual_seed(0)
    sizes = PER_SEGMENT | {"members": members}
    model = Localizer("gtad", SIZES, 8, ["a", "b"], per_segment=sizes)
    labels = [torch.tensor(x, dtype=torch.long) for x in ([0], [1, 0], [], [1])]
    batch = {"features": torch.randn(4, 8, 8), "segments": SEGMENTS, "labels": labels}
    batch["target"] = torch.zeros(4, 2)
    terms, gradients = step(model, batch)
    assert all(g.abs().max() > 0 for name, g in gradients.items() if "classifier" in name)

    generator = torch.Generator().manual_seed(1)
    gtad.loss_weights(gtad.make_targets(SEGMENTS, 8), generator=generator)
    spans = localizer.draw_spans(batch, 2, generator, 0)
    logits = model(batch["features"])[3].detach()
    assert logits.shape == (4, members, 3, 8)
    losses = []
    for each, (places, classes) in zip(logits, spans, strict=True):
        for x in each:
            means = [mean_by_loop(x, *(8 * place).tolist()).log_softmax(0) for place in places]
            found = [-mean[c] for mean, c in zip(means, classes, strict=True)]
            losses.append(sum(found) / len(found))
    torch.testing.assert_close(terms["class"], sum(losses) / len(losses))

    halves, again = step(model, batch, accumulate=2)
    torch.testing.assert_close(halves, terms)
    torch.testing.assert_close(again, gradients, rtol=1e-4, atol=1e-6)
    generator = torch.Generator().manual_seed(1)
    gtad.loss_weights(gtad.make_targets(SEGMENTS, 8), generator=generator)
    half = {key: value[2:] for key, value in batch.items()}
    for one, two in zip(localizer.draw_spans(half, 2, generator, 1), spans[2:], strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


class Two:
    """A model of two actions of a video of 8 snippets, and of the proposals that it makes."""

    per_segment = True
    classes = ("jump", "run")

    def proposals(self, x):
        segments = torch.tensor([[[0, 4], [4, 8], [0, 8], [4, 7]]]) / 8
        scores = torch.tensor([[0.5, 0.4, 0.9, 0.4]])
        logits = torch.full((1, 3, 8), -8.0)
        logits[0, 0, :4] = logits[0, 1, 4:] = 0.0
        return segments, scores, torch.ones(1, 4).bool(), logits


DETECT = config.load_config("configs/default.yaml").detect


def predict(*class_scores, model=None, **options):
    """Return the detections and proposals of the model of two actions, of 16 seconds."""
    options = DETECT | {"sigma": 0.1, "top_k": 4, "classes_per_video": 1} | options
    features = torch.zeros(1, 1, 8)
    found = localizer.predict(model or Two(), features, ["v"], [16.0], options, *class_scores)
    return found[0]["v"], found[1]["v"]


def test_each_segment_gets_its_own_class():
    """The proposal with the highest score spans both actions, and comes last."""
    found, proposals = predict()
    best = [(d["label"], d["segment"]) for d in found]
    assert best[:2] == [("jump", [0.0, 8.0]), ("run", [8.0, 16.0])]
    assert found[0]["score"] == pytest.approx(0.5, rel=1e-2)
    assert proposals[0]["segment"] == [0.0, 16.0]
    assert "label" not in proposals[0]
    found, _ = predict((torch.tensor([[0.25, 0.75]]), ["x", "y"]))
    assert {d["label"] for d in found} == {"y"}


def test_proposals_compete_within_their_class_alone():
    """Both classes keep the proposal of the whole video, with its score times each class's."""
    scores = (np.array([[0.25, 0.75]]), ["x", "y"])
    hard = {"class_wise": True, "decay": "hard", "decay_above": [0.6, 0.6], "classes_per_video": 2}
    found, _ = predict(scores, top_k=10, **hard)
    expected = [("y", 0.675, [0.0, 16.0]), ("y", 0.375, [0.0, 8.0]), ("y", 0.3, [8.0, 16.0])]
    expected += [("x", 0.225, [0.0, 16.0]), ("x", 0.125, [0.0, 8.0]), ("x", 0.1, [8.0, 16.0])]
    assert [(d["label"], d["segment"]) for d in found] == [(x, s) for x, _, s in expected]
    assert [d["score"] for d in found] == pytest.approx([score for _, score, _ in expected])
    # Of each segment its own.
    found, _ = predict(class_wise=True, decay="hard")
    assert [d["label"] for d in found] == ["jump", "run"]
    assert found[0]["score"] == pytest.approx(0.5, rel=1e-2)


def test_options_of_block_detect():
    scores = (torch.tensor([[1.0]]), ["x"])
    found, proposals = predict(scores, decay="linear", decay_above=[0.6, 0.6], min_score=0.3)
    # [8, 14] and [8, 16] have tIoU 0.75: 0.4 * (1 - 0.75) is below 0.3.
    assert [d["score"] for d in found] == pytest.approx([0.9, 0.5, 0.4])
    assert [d["score"] for d in proposals] == pytest.approx([0.9, 0.5, 0.4])
    found, _ = predict(scores, decay="hard", decay_above=[0.6, 0.6], voting=0.75)
    # The mean of [8, 16] and [8, 14], with equal scores.
    assert [d["segment"] for d in found] == [[0.0, 16.0], [0.0, 8.0], [8.0, 15.0]]


# ---------------------------------------------------------------------------------- other parts


def test_bmn_scores_have_the_boundaries_in_them():
    torch.manual_seed(0)
    sizes = {"hidden": 8, "map_hidden": (8, 4), "samples": 4}
    model = Localizer("bmn", sizes, channels=8, classes=["a", "b"]).eval()
    x = torch.randn(1, 8, 8)
    start, end, map, _ = model(x)
    segments, scores, *_ = model.proposals(x)
    s, e = (segments[0, 0] * 8).round().long().tolist()
    confidence = map[0, 0, e - s - 1, s] * map[0, 1, e - s - 1, s]
    torch.testing.assert_close(scores[0, 0], start[0, s] * end[0, min(e, 7)] * confidence)


def test_build_encoder_gives_each_network_its_own_sizes():
    sizes = {"depth": 18, "shift_div": 4, "maxpool": False, "width": 8}
    encoder = localizer.build_encoder("tsm", **sizes)
    assert (encoder.channels, encoder.shift_div) == (64, 4)
    encoder = localizer.build_encoder("r3d_18", **sizes)
    assert encoder.name == "r3d_18" and encoder.channels == 64
    with pytest.raises(ValueError, match="r9d"):
        localizer.build_encoder("r9d")


@pytest.mark.parametrize(
    "change", [{"classes": 3}, {"classes": [5]}, {"model": {}}, {"model": 1}, {"foreign": 1}]
)
def test_a_foreign_head_is_named(change, tmp_path):
    sizes = {"hidden": 8, "map_hidden": (8, 4), "groups": 1, "samples": 2}
    model = Localizer("bmn", sizes, 4, ["jump"])
    path = f"{tmp_path}/head.pt"
    checkpoint.save_weights(model, path, classes=["jump"])
    same, saved = Localizer.load(path, "bmn", sizes, 4)
    assert same.classes == ["jump"] and saved["seconds"] == 0.0
    with pytest.raises(InputError, match=r"head\.pt is not a bmn .* for 8 channels"):
        Localizer.load(path, "bmn", sizes, 8)
    torch.save(change if "foreign" in change else torch.load(path) | change, path)
    with pytest.raises(InputError, match=r"head\.pt is not a bmn"):
        Localizer.load(path, "bmn", sizes, 4)


def test_only_the_main_process_logs(capsys):
    for rank in (0, 1):
        Distributed(rank, 2, CPU).log("loss 0.5")
    assert capsys.readouterr().out == "loss 0.5\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"chunk_snippets": 3}])
def test_a_step_on_the_gpu_is_that_on_the_cpu(options):
    model, batch = model_and_batch()
    whole, expected = step(model, batch)
    model.cuda()
    batch["frames"] = batch["frames"].cuda()
    full = Distributed(0, 1, torch.device("cuda"), "float32")
    terms, gradients = step(model, batch, full, **options)
    for term in whole:
        torch.testing.assert_close(terms[term].cpu(), whole[term], rtol=1e-6, atol=1e-8)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name].cpu(), gradient, rtol=1e-5, atol=1e-8, msg=name)
    model.float()
    terms, _ = step(model, batch, ddp=Distributed(0, 1, torch.device("cuda")), **options)
    assert terms["loss"].item() == pytest.approx(whole["loss"].item(), rel=0.1)


def test_weights_that_are_no_numbers_are_named():
    model = Localizer("gtad", SIZES, channels=8, classes=["a", "b"]).eval()
    x = torch.randn(1, 8, 6)
    assert len(model.proposals(x)) == 4
    next(model.head.parameters()).data.fill_(torch.nan)
    with pytest.raises(InputError, match="the head gives NaN or infinity"):
        model.proposals(x)
