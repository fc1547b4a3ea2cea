"""video_encoders.py against torchvision's own networks."""

import inspect

import pytest
import torch
import torchvision
from torch import nn

import tsm
import video_encoders
from gtad import GTAD, loss_weights, losses, make_targets
from tsm import InputError, load_weights
from video_encoders import VIDEO_ENCODERS, VIDEO_RESNETS, VideoEncoder

SIZES = {  # T, H = W
    "r2plus1d_18": (2, 16),
    "r3d_18": (2, 16),
    "mc3_18": (2, 16),
    "s3d": (8, 24),
    "mvit_v2_s": (4, 16),
    "swin3d_t": (3, 16),
}


@pytest.fixture(scope="module", params=SIZES)
def network(request):
    """An encoder with the weights of a network of torchvision's, the latter without its classifier,
    T, H; the three ResNets of a quarter's width."""
    torch.manual_seed(0)
    name = request.param
    T, H = SIZES[name]
    width = 16 if name in VIDEO_RESNETS else 64
    if width == 64:
        reference = torchvision.models.get_model(name)
    else:
        reference = video_encoders._VideoResNet(*VIDEO_RESNETS[name], width)
    for m in reference.modules():  # as trained
        if isinstance(m, nn.BatchNorm3d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
        elif isinstance(m, nn.LayerNorm):
            m.bias.data.normal_(0, 0.1)
    encoder = VideoEncoder(name, width=width, frozen_bn=True)
    load_weights(encoder, reference.state_dict())
    reference.fc = reference.head = reference.classifier = nn.Identity()
    if name == "s3d":
        reference.avgpool = nn.AdaptiveAvgPool3d(
            1
        )  # at its own 16 x 224 x 224 the same as 2 x 7 x 7
    if name == "mvit_v2_s":  # the size of the input after the first, strided convolution
        reference.pos_encoding.temporal_size = T // 2
        reference.pos_encoding.spatial_size = (H // 4, H // 4)
    return encoder, reference.eval(), T, H


def test_it_is_torchvisions_network_without_its_classifier(network):
    encoder, reference, T, H = network
    views = torchvision.models.get_model_weights(encoder.name)["KINETICS400_V1"].transforms()
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (views.mean, views.std))
    frames = torch.randint(0, 256, (2, 3, T, 3, H, H), dtype=torch.uint8)
    with torch.no_grad():
        out = encoder.eval()(frames)
        clips = (frames.transpose(2, 3) / 255 - mean) / std  # (B, L, 3, T, H, W)
        expected = torch.stack([reference(video).flatten(1).t() for video in clips])
        parts = [encoder(part) for part in frames.split(2, dim=1)]
    assert out.shape == (2, encoder.channels, 3) == expected.shape
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(parts, 2), out, rtol=1e-4, atol=1e-4)


def test_it_trains_end_to_end_in_one_piece_in_chunks_and_recomputed(network):
    encoder, _, T, H = network
    torch.manual_seed(1)
    head = GTAD(
        in_channels=encoder.channels, hidden=8, gcn_width=8, gcn_groups=2, map_hidden=(8, 4)
    )
    encoder.train()
    assert not any(m.training for m in encoder.modules() if isinstance(m, nn.BatchNorm3d))
    frames = torch.randint(0, 256, (1, 8, T, 3, H, H), dtype=torch.uint8)
    targets = make_targets([torch.tensor([[0.1, 0.6]])], 8)
    weights = loss_weights(targets)

    def gradients(chunk):
        encoder.zero_grad()
        parts = [encoder(part) for part in frames.split(chunk, dim=1)]
        terms = losses(*head(torch.cat(parts, dim=2)), targets, weights)
        loss = terms["node"] + 10 * terms["regression"] + terms["classification"]
        loss.backward()
        return loss.detach(), [p.grad for p in encoder.parameters()]

    loss, expected = gradients(8)
    assert all(grad is not None for grad in expected)
    assert sum(grad.abs().max() > 0 for grad in expected) > 0.9 * len(expected)
    for chunk, encoder.recompute in ((3, False), (8, True)):
        other_loss, found = gradients(chunk)
        torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=1e-6)
        for grad, wanted in zip(found, expected, strict=True):
            assert (grad - wanted).abs().max() <= 1e-3 * wanted.abs().max() + 1e-7
    encoder.recompute = False


def test_nothing_leaks_across_snippets(network):
    encoder, _, T, H = network
    frames = (100 + torch.randn(2, 2, T, 3, H, H)).requires_grad_()
    encoder.eval()(frames)[1, :, 0].square().sum().backward()
    touched = frames.grad.abs().sum((2, 3, 4, 5)) > 0  # (B, L)
    assert touched.tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize("name", VIDEO_ENCODERS)
def test_every_encoder_has_torchvisions_parameters(name):
    with torch.device("meta"):
        encoder = VideoEncoder(name)
        reference = torchvision.models.get_model(name).state_dict()
    classifier = ("fc.", "head.", "classifier.")
    expected = {k: v.shape for k, v in reference.items() if not k.startswith(classifier)}
    assert {k: v.shape for k, v in encoder.state_dict().items()} == expected
    last = [v for k, v in reference.items() if k.startswith(classifier) and v.ndim > 1]
    assert encoder.channels == last[0].shape[1]


def test_torchvisions_weights_are_of_kinetics(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    entry = torchvision.models.video.MC3_18_Weights.KINETICS400_V1
    state = torchvision.models.video.mc3_18().state_dict()
    torch.save(state, tmp_path / "hub/checkpoints" / entry.url.rsplit("/", 1)[1])
    loaded = load_weights(VideoEncoder("mc3_18"), "torchvision").state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in state.items() if not k.startswith("fc."))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    encoder = VideoEncoder("mc3_18", width=8)
    state = {k: v for k, v in encoder.state_dict().items() if k != "stem.0.weight"}
    wrong = {**state, "odd": torch.zeros(1), "fc.weight": torch.zeros(400, 64)}
    with pytest.raises(InputError, match=r"stem\.0\.weight.*odd"):
        load_weights(encoder, wrong)
    torch.save({"model": {}, "encoder": {"name": "r3d_18"}}, tmp_path / "encoder.pt")
    with pytest.raises(InputError, match="encoder r3d_18, not of mc3_18"):
        load_weights(encoder, str(tmp_path / "encoder.pt"))


def test_names_and_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"no encoder 'resnet101'.*r2plus1d_18"):
        VideoEncoder("resnet101")
    with pytest.raises(ValueError, match="s3d has width 64 only"):
        VideoEncoder("s3d", width=16)
    with pytest.raises(ValueError, match=r"mc3_18 got .*expected \(B, L, T, 3, H, W\)"):
        VideoEncoder("mc3_18", width=8)(torch.zeros(1, 3, 2, 8, 8))
    with pytest.raises(ValueError, match="s3d got 4 frames of 16 x 16"):
        VideoEncoder("s3d")(torch.zeros(1, 1, 4, 3, 16, 16))
    with torch.device("meta"), pytest.raises(ValueError, match="mvit_v1_b got 8 frames"):
        VideoEncoder("mvit_v1_b")(torch.zeros(1, 1, 8, 3, 224, 224))


def test_batchnorm_is_frozen_by_the_same_lines_as_in_tsm():
    assert inspect.getsource(VideoEncoder.train) == inspect.getsource(tsm.TSM.train)
