"""tsm.py against hand-worked shifts, torchvision's ResNets and plain gradients."""

import pytest
import torch
import torchvision

import tsm
from tsm import TSM, InputError, load_weights, temporal_shift


def random_frames(*shape):
    """(B, L, T, 3, H, W) uint8"""
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def test_normalising_leaves_the_frames_and_their_bits():
    encoder = TSM(width=8).eval()
    frames = random_frames(1, 2, 2, 3, 32, 32).float()
    before = frames.clone()
    seen = []
    encoder.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for given in (frames, frames.byte()):
        encoder(given)
    assert torch.equal(frames, before)
    for x in seen:
        assert torch.equal(x, (frames[0].flatten(0, 1) - encoder.mean) / encoder.std)
        assert x.is_contiguous(memory_format=torch.channels_last)


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
        for i in range(3 * frames):
            t = i % frames
            ahead = x[i + 1, :2] if t + 1 < frames else torch.zeros_like(x[i, :2])
            behind = x[i - 1, 2:4] if t else torch.zeros_like(x[i, 2:4])
            assert (out[i] == torch.cat([ahead, behind, x[i, 4:]])).all()


def test_gradient_of_the_shift():
    x = torch.randn(6, 8, 2, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: temporal_shift(x, 3), x)
    with pytest.raises(RuntimeError, match="size of dim 0"):
        temporal_shift(torch.zeros(5, 8, 1, 1), 3)


def test_nothing_leaks_across_snippets_and_videos_but_across_frames():
    torch.manual_seed(0)
    encoder = TSM(width=8, maxpool=False).double().eval()
    frames = torch.rand(2, 3, 4, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    encoder(frames)[1, :, 2].sum().backward()
    touched = frames.grad.abs().sum((3, 4, 5)) > 0  # (B, L, T)
    assert touched[1, 2].all() and touched.sum() == 4
    # The frames of a snippet do see each other: their order matters.
    with torch.no_grad():
        assert not torch.allclose(encoder(frames), encoder(frames.flip(2)), atol=1e-6)
        still = TSM(width=8, maxpool=False, shift_div=0).double().eval()
        torch.testing.assert_close(still(frames), still(frames.flip(2)))


@pytest.mark.parametrize("depth, channels", [(18, 512), (34, 512), (50, 2048)])
def test_without_shift_it_is_torchvisions_resnet_and_loads_its_weights(depth, channels):
    torch.manual_seed(0)
    reference = torchvision.models.get_model(f"resnet{depth}", weights=None).double().eval()
    for m in reference.modules():  # as trained: statistics and offsets that are not the initial
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
            m.bias.data.normal_(0, 0.1)
    encoder = load_weights(TSM(depth=depth, shift_div=0).double().eval(), reference.state_dict())
    frames = random_frames(1, 2, 2, 3, 40, 40)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    reference.fc = torch.nn.Identity()
    with torch.no_grad():
        out = encoder(frames)
        expected = reference((frames[0].flatten(0, 1).double() / 255 - mean) / std)
    assert out.shape == (1, channels, 2) and encoder.channels == channels
    expected = expected.view(2, 2, channels).mean(1).t()[None]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------- weights


def test_official_tsm_checkpoints_load_and_what_does_not_fit_is_named(tmp_path):
    encoder = TSM(width=8)
    other = TSM(width=8)
    state = {}
    for k, v in encoder.state_dict().items():
        # The release wraps the shifted convolutions.
        k = k.replace("conv1.weight", "conv1.net.weight") if k.startswith("layer") else k
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
    with pytest.raises(InputError) as raised:
        load_weights(other, state)
    for part in ('Missing key(s) in state_dict: "layer1.0.conv1.weight"', '"odd"', "bn1.bias"):
        assert part in str(raised.value)
    assert str(raised.value).count("\n") == 1


def test_counts_of_batches_may_be_missing():
    encoder = TSM(width=8)
    state = {k: v for k, v in encoder.state_dict().items() if "num_batches" not in k}
    load_weights(TSM(width=8), state)


@pytest.mark.parametrize(
    "wrong",
    [{"model": None}, {0: torch.zeros(1)}, {"model": {"a": 3}}, {"encoder": "tsm", "epoch": 3}],
)
def test_a_dict_of_something_else_is_one_error(wrong):
    with pytest.raises(InputError, match="not a state dict"):
        load_weights(TSM(width=8), wrong)


def test_files_are_read_by_path_and_must_be_checkpoints(tmp_path):
    torch.save({"model": TSM(width=8).state_dict()}, tmp_path / "e.pt")
    load_weights(TSM(width=8), tmp_path / "e.pt")
    (tmp_path / "torn.pt").write_bytes(b"no checkpoint")
    torch.save([1], tmp_path / "list.pt")
    for name, message in {
        "torn.pt": r"torn\.pt cannot be read",
        "none.pt": r"none\.pt cannot be read.*FileNotFound",
        "list.pt": r"list\.pt cannot be read.*TypeError",
    }.items():
        with pytest.raises(InputError, match=message):
            load_weights(TSM(width=8), str(tmp_path / name))


def test_options_that_no_weight_tells_are_compared(tmp_path):
    trained = {"name": "tsm", "shift_div": 4, "maxpool": True}
    torch.save({"model": TSM(width=8).state_dict(), "encoder": trained}, tmp_path / "e.pt")
    with pytest.warns(UserWarning, match="shift_div 4"):
        load_weights(TSM(width=8), tmp_path / "e.pt")
    load_weights(TSM(width=8, shift_div=4), tmp_path / "e.pt")
    torch.save({"model": {}, "encoder": {"name": "r3d_18"}}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="encoder r3d_18, not of tsm"):
        load_weights(TSM(width=8), tmp_path / "other.pt")


def test_a_downloaded_file_of_torchvision_is_taken_from_the_hubs_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    state = torchvision.models.resnet18().state_dict()
    encoder = TSM(depth=18)
    name = encoder.torchvision_weights.url.rsplit("/", 1)[1]
    assert name.startswith("resnet18-")
    torch.save(state, tmp_path / "hub/checkpoints" / name)
    loaded = load_weights(encoder, "torchvision").state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in state.items() if not k.startswith("fc."))

    def fail(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(InputError, match=r"resnet34-.*no network.*\n.*hub/checkpoints"):
        load_weights(TSM(depth=34), "torchvision")


# -------------------------------------------------------------------------------------- BatchNorm


def test_frozen_batchnorm_keeps_its_statistics_and_learns_its_scale():
    torch.manual_seed(0)
    frames = random_frames(1, 1, 2, 3, 16, 16)
    for frozen in (True, False):
        encoder = TSM(width=8, frozen_bn=frozen).train()
        before = encoder.bn1.running_mean.clone()
        encoder(frames).sum().backward()
        assert torch.equal(before, encoder.bn1.running_mean) == frozen
        assert encoder.bn1.weight.grad is not None and encoder.layer4[1].bn2.training != frozen


def test_recalibrated_statistics_are_those_of_all_frames_together():
    torch.manual_seed(0)
    encoder = TSM(width=8, maxpool=False).train()
    batches = [random_frames(n, 2, 3, 3, 16, 16) // (4 - n) for n in (1, 3, 2)]
    tsm.recalibrate_batchnorm(encoder, batches)
    assert encoder.training and encoder.bn1.training and encoder.bn1.momentum == 0.1
    assert not encoder.bn1._forward_pre_hooks
    x = torch.cat([b.flatten(0, 2) for b in batches])  # the first conv's output knows no batch
    with torch.no_grad():
        out = encoder.conv1((x - encoder.mean) / encoder.std)
    mean = out.mean((0, 2, 3))
    var = out.var((0, 2, 3), correction=0)
    torch.testing.assert_close(encoder.bn1.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.bn1.running_var, var, rtol=1e-4, atol=1e-5)
    # Of one batch: evaluation then is what training mode gives, down to the last layer.
    tsm.recalibrate_batchnorm(encoder, batches[1:2])
    with torch.no_grad():
        evaluated = encoder.eval()(batches[1])
        trained = encoder.train()(batches[1])
    torch.testing.assert_close(trained, evaluated, rtol=1e-3, atol=1e-4)


def test_recalibration_of_two_processes_is_that_of_one_with_all():
    torch.manual_seed(0)
    batches = [random_frames(n, 2, 3, 3, 16, 16) for n in (1, 3, 2)]
    alone, first, second = (TSM(width=8, maxpool=False) for _ in range(3))
    first.load_state_dict(alone.state_dict())
    second.load_state_dict(alone.state_dict())
    sums = []

    def collect(x):
        sums.append(x)
        return x

    tsm.recalibrate_batchnorm(alone, batches)
    tsm.recalibrate_batchnorm(first, batches[:1], collect)
    totals = iter(sums)
    tsm.recalibrate_batchnorm(second, batches[1:], lambda x: (x + next(totals)) / 2)
    for key, value in alone.state_dict().items():
        if value.is_floating_point():
            found = second.state_dict()[key]
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


def test_wrong_frames_and_depths_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\), expected \(B, L, T, 3, H, W\)"):
        TSM(width=8)(torch.zeros(2, 3, 8, 8))
    with pytest.raises(InputError, match="depth 101"):
        TSM(depth=101)


# ----------------------------------------------------------------------------- gradients, memory


def gradients(encoder, frames):
    encoder.zero_grad()
    out = encoder(frames)
    out.square().sum().backward()
    return out.detach(), [p.grad.clone() for p in encoder.parameters()]


def test_the_backward_pass_shifts_again_and_gives_the_plain_gradient(monkeypatch):
    torch.manual_seed(0)
    encoder = TSM(width=8, maxpool=False, frozen_bn=True).double().train()
    frames = random_frames(1, 2, 3, 3, 16, 16)
    ours = gradients(encoder, frames)

    def plain(conv, x, frames, div):
        return conv(temporal_shift(x, frames, div))

    monkeypatch.setattr(tsm, "shifted_conv", plain)
    torch.testing.assert_close(ours, gradients(encoder, frames), rtol=0, atol=0)


def test_a_shift_holds_no_second_copy_of_the_activations():
    def memory_held(div):
        encoder = TSM(width=16, shift_div=div, frozen_bn=True).train()
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            out = encoder(torch.zeros(1, 1, 4, 3, 64, 64, dtype=torch.uint8))
        return out, sum(e.self_cpu_memory_usage for e in profile.key_averages())

    assert memory_held(8)[1] <= 1.01 * memory_held(0)[1]


@pytest.mark.parametrize("frozen", [True, False])
def test_recomputation_gives_the_plain_gradient(frozen):
    torch.manual_seed(0)
    frames = random_frames(1, 2, 3, 3, 16, 16)
    options = {"width": 8, "maxpool": False, "frozen_bn": frozen}
    plain = TSM(**options).double().train()
    again = TSM(**options, recompute=True).double().train()
    again.load_state_dict(plain.state_dict())
    expected = gradients(plain, frames)
    torch.testing.assert_close(expected, gradients(again, frames), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(plain.state_dict(), again.state_dict())  # running statistics too


@pytest.mark.beside
def test_a_compiled_encoder_gives_the_plain_gradient():
    torch.manual_seed(0)
    encoder = TSM(width=8, maxpool=False, frozen_bn=True)
    frames = random_frames(1, 2, 3, 3, 16, 16)
    encoder.layer2 = encoder.layer2[:1]  # three blocks are quick to trace
    encoder.layer3 = torch.nn.Sequential()
    encoder.layer4 = torch.nn.Sequential()
    encoder.double().train()
    plain = gradients(encoder, frames)
    names = list(encoder.state_dict())
    encoder.compile(backend="aot_eager")  # traced as for any backend; needs no C++ compiler
    torch.testing.assert_close(plain, gradients(encoder, frames), rtol=1e-8, atol=1e-10)
    assert list(encoder.state_dict()) == names


def test_bf16_and_any_number_of_frames():
    torch.manual_seed(0)
    encoder = TSM(width=8, maxpool=False).eval()
    assert encoder.layer3[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    for num_frames in (8, 3, 1):  # one encoder, in turn: nothing is kept of the number of frames
        x = random_frames(2, 2, num_frames, 3, 16, 16)
        with torch.no_grad():
            whole = encoder(x)
            alone = torch.cat([encoder(snippet[None, None]) for snippet in x.flatten(0, 1)])
        snippets = whole.transpose(1, 2).reshape(4, 64, 1)
        torch.testing.assert_close(snippets, alone, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            low = encoder(x)
        assert low.dtype == torch.bfloat16
        assert (low.float() - whole).abs().max() < 0.05 * whole.abs().max()
        low.float().square().sum().backward()
        for p in encoder.parameters():
            assert p.grad.isfinite().all() and p.grad.dtype == torch.float32
