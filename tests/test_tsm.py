import pytest
import torch
import torchvision

import tsm
from tsm import TSM, load_weights, temporal_shift


def test_shift_by_hand_on_three_frames_of_eight_channels():
    x = torch.arange(24, dtype=torch.float64).view(3, 8, 1, 1)  # frame t, channel c holds 8 t + c
    out = temporal_shift(x, 3).view(3, 8)
    assert out[:, 0].tolist() == [8, 16, 0]  # the next frame's value, zero after the last
    assert out[:, 1].tolist() == [0, 1, 9]  # the previous frame's, zero before the first
    assert (out[:, 2:] == x.view(3, 8)[:, 2:]).all()
    assert (x.view(-1) == torch.arange(24)).all()  # not in place


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shift_keeps_dtype_and_memory_format_for_any_number_of_frames(memory_format, dtype):
    for frames in (1, 2, 5):
        x = torch.randn(3 * frames, 16, 4, 5).to(dtype).contiguous(memory_format=memory_format)
        out = temporal_shift(x, frames)
        assert out.dtype == dtype and out.is_contiguous(memory_format=memory_format)
        for n in range(3):  # snippet by snippet, frame by frame
            for t in range(frames):
                i = n * frames + t
                ahead = x[i + 1, :2] if t + 1 < frames else torch.zeros_like(x[i, :2])
                behind = x[i - 1, 2:4] if t else torch.zeros_like(x[i, 2:4])
                assert (out[i] == torch.cat([ahead, behind, x[i, 4:]])).all()


def test_gradient_of_the_shift():
    x = torch.randn(6, 8, 2, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: temporal_shift(x, 3), x)
    with pytest.raises(ValueError, match="5 frames, expected a multiple of the 3"):
        temporal_shift(torch.zeros(5, 8, 1, 1), 3)


def test_nothing_leaks_across_snippets_and_videos_but_across_frames():
    torch.manual_seed(0)
    encoder = TSM(width=8, maxpool=False).double().eval()
    frames = torch.rand(2, 3, 4, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    encoder(frames)[1, :, 2].sum().backward()
    touched = frames.grad.abs().sum((3, 4, 5)) > 0  # (B, L, T)
    assert touched[1, 2].all() and touched.sum() == 4
    # the frames of a snippet do see each other: their order matters
    with torch.no_grad():
        assert not torch.allclose(encoder(frames), encoder(frames.flip(2)), atol=1e-6)
        still = TSM(width=8, maxpool=False, shift_div=0).double().eval()
        torch.testing.assert_close(still(frames), still(frames.flip(2)))


@pytest.mark.parametrize("depth, name, channels", [(18, "resnet18", 512), (34, "resnet34", 512), (50, "resnet50", 2048)])
def test_without_shift_it_is_torchvisions_resnet_and_loads_its_weights(depth, name, channels):
    torch.manual_seed(0)
    reference = getattr(torchvision.models, name)(weights=None).double().eval()
    for m in reference.modules():  # as trained: statistics and offsets that are not the initial ones
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 1.5), m.bias.data.normal_(0, 0.1)
    encoder = load_weights(TSM(depth=depth, shift_div=0).double().eval(), reference.state_dict())
    frames = torch.randint(0, 256, (1, 2, 2, 3, 40, 40), dtype=torch.uint8)
    x = (frames[0].flatten(0, 1).double() / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    reference.fc = torch.nn.Identity()
    with torch.no_grad():
        out, expected = encoder(frames), reference(x).view(2, 2, channels).mean(1).t()[None]
    assert out.shape == (1, channels, 2) and encoder.channels == channels
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_official_tsm_checkpoints_load_and_do_not_load_by_half(tmp_path):
    encoder, other = TSM(width=8), TSM(width=8)
    state = {}
    for k, v in encoder.state_dict().items():
        k = k.replace("conv1.weight", "conv1.net.weight") if k.startswith("layer") else k  # shifted convs are wrapped there
        state[f"module.base_model.{k}"] = v + 1 if v.is_floating_point() else v
    state |= {"module.new_fc.weight": torch.zeros(4, 64), "module.new_fc.bias": torch.zeros(4)}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "tsm.pth")
    load_weights(other, str(tmp_path / "tsm.pth"))
    for k, v in encoder.state_dict().items():
        if v.is_floating_point():
            torch.testing.assert_close(other.state_dict()[k], v + 1)
    del state["module.base_model.layer1.0.conv1.net.weight"]
    state["module.base_model.odd"] = torch.zeros(1)
    state["module.base_model.bn1.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"missing layer1.0.conv1.weight; unexpected odd; bn1.bias has shape \(3,\), expected \(8,\)"):
        load_weights(other, state)
    (tmp_path / "torn.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="torn.pt cannot be read"):
        load_weights(other, str(tmp_path / "torn.pt"))


def test_frozen_batchnorm_keeps_its_statistics_and_learns_its_scale():
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (1, 1, 2, 3, 16, 16), dtype=torch.uint8)
    for frozen in (True, False):
        encoder = TSM(width=8, frozen_bn=frozen).train()
        before = encoder.bn1.running_mean.clone()
        encoder(frames).sum().backward()
        assert torch.equal(before, encoder.bn1.running_mean) == frozen
        assert encoder.bn1.weight.grad is not None and encoder.layer4[1].bn2.training != frozen


def test_wrong_frames_and_depths_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\), expected \(B, L, T, 3, H, W\)"):
        TSM(width=8)(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="depth 101"):
        TSM(depth=101)


def gradients(encoder, frames):
    encoder.zero_grad()
    out = encoder(frames)
    out.square().sum().backward()
    return out.detach(), [p.grad.clone() for p in encoder.parameters()]


def test_the_backward_pass_shifts_again_and_gives_the_plain_gradient(monkeypatch):
    torch.manual_seed(0)
    encoder, frames = TSM(width=8, maxpool=False, frozen_bn=True).double().train(), torch.randint(0, 256, (1, 2, 3, 3, 16, 16), dtype=torch.uint8)
    ours = gradients(encoder, frames)
    monkeypatch.setattr(tsm, "shifted_conv", lambda conv, x, frames, div: conv(temporal_shift(x, frames, div)))
    torch.testing.assert_close(ours, gradients(encoder, frames), rtol=0, atol=0)


def test_a_shift_holds_no_second_copy_of_the_activations():
    def held(div):
        encoder = TSM(width=16, shift_div=div, frozen_bn=True).train()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            out = encoder(torch.zeros(1, 1, 4, 3, 64, 64, dtype=torch.uint8))
        return out, sum(e.self_cpu_memory_usage for e in profile.key_averages())
    assert held(8)[1] <= 1.01 * held(0)[1]


@pytest.mark.parametrize("frozen", [True, False])
def test_recomputation_gives_the_plain_gradient(frozen):
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (1, 2, 3, 3, 16, 16), dtype=torch.uint8)
    plain, again = (TSM(width=8, maxpool=False, frozen_bn=frozen, recompute=r).double().train() for r in (False, True))
    again.load_state_dict(plain.state_dict())
    torch.testing.assert_close(gradients(plain, frames), gradients(again, frames), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(plain.state_dict(), again.state_dict())  # running statistics too


def test_a_compiled_encoder_gives_the_plain_gradient():
    torch.manual_seed(0)
    encoder, frames = TSM(width=8, maxpool=False, frozen_bn=True).double().train(), torch.randint(0, 256, (1, 2, 3, 3, 16, 16), dtype=torch.uint8)
    plain = gradients(encoder, frames)
    names = list(encoder.state_dict())
    encoder.compile(backend="aot_eager")  # traced as for any backend; needs no C++ compiler
    torch.testing.assert_close(plain, gradients(encoder, frames), rtol=1e-8, atol=1e-10)
    assert list(encoder.state_dict()) == names
