import pytest
import torch
import torchvision

import tsm
from localizer import Localizer, encode, train_step
from tsm import TSM, VideoNetwork, load_weights, make_encoder, temporal_shift


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


def test_recalibrated_statistics_are_those_of_all_frames_together():
    torch.manual_seed(0)
    encoder = TSM(width=8, maxpool=False).train()
    batches = [torch.randint(0, 60 * n, (n, 2, 3, 3, 16, 16), dtype=torch.uint8) for n in (1, 3, 2)]
    tsm.recalibrate_batchnorm(encoder, batches)
    assert encoder.training and encoder.bn1.training and encoder.bn1.momentum == 0.1 and not encoder.bn1._forward_pre_hooks
    x = torch.cat([b.flatten(0, 2) for b in batches])  # the first convolution's output knows of no batch
    with torch.no_grad():
        out = encoder.conv1((x - encoder.mean) / encoder.std)
    torch.testing.assert_close(encoder.bn1.running_mean, out.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.bn1.running_var, out.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-5)
    # of one batch: evaluation then is what training mode gives, down to the last layer
    tsm.recalibrate_batchnorm(encoder, batches[1:2])
    with torch.no_grad():
        evaluated, trained = encoder.eval()(batches[1]), encoder.train()(batches[1])
    torch.testing.assert_close(trained, evaluated, rtol=1e-3, atol=1e-4)
    # two processes, each with its share, as one with all
    alone, shares, sums = TSM(width=8, maxpool=False), [TSM(width=8, maxpool=False) for _ in range(2)], []
    for e in shares:
        e.load_state_dict(alone.state_dict())
    tsm.recalibrate_batchnorm(alone, batches)
    tsm.recalibrate_batchnorm(shares[0], batches[:1], lambda x: sums.append(x) or x)
    totals = iter(sums)
    tsm.recalibrate_batchnorm(shares[1], batches[1:], lambda x: (x + next(totals)) / 2)
    for key, value in alone.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(shares[1].state_dict()[key], value, rtol=1e-4, atol=1e-5)


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
    encoder, frames = TSM(width=8, maxpool=False, frozen_bn=True), torch.randint(0, 256, (1, 2, 3, 3, 16, 16), dtype=torch.uint8)
    encoder.layer2, encoder.layer3, encoder.layer4 = encoder.layer2[:1], torch.nn.Sequential(), torch.nn.Sequential()  # three blocks are quick to trace
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
    for frames in (8, 3, 1):  # one encoder, one after the other: nothing is kept of the number of frames
        x = torch.randint(0, 256, (2, 2, frames, 3, 16, 16), dtype=torch.uint8)
        with torch.no_grad():
            whole, alone = encoder(x), torch.cat([encoder(x[i:i + 1, j:j + 1]) for i in range(2) for j in range(2)])
            torch.testing.assert_close(whole.transpose(1, 2).reshape(4, 64, 1), alone, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            low = encoder(x)
        assert low.dtype == torch.bfloat16 and (low.float() - whole).abs().max() < 0.05 * whole.abs().max()
        low.float().square().sum().backward()
        assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in encoder.parameters())


# ---------------------------------------------------------------- torchvision's video networks

NETWORKS = {"r2plus1d_18": (2, 16), "r3d_18": (2, 16), "mc3_18": (2, 16), "s3d": (8, 24), "mvit_v2_s": (4, 16), "swin3d_t": (3, 16)}  # T, H = W


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """An encoder with the weights of a network of torchvision's, this network without its classifier, T, H; the three ResNets of a quarter's width."""
    torch.manual_seed(0)
    name, width = request.param, 16 if request.param in tsm.VIDEO_RESNETS else 64
    if width == 64:
        reference = torchvision.models.get_model(name)
    else:
        reference = tsm._VideoResNet(*tsm.VIDEO_RESNETS[name], width)
    for m in reference.modules():  # as trained
        if isinstance(m, torch.nn.BatchNorm3d):
            m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 1.5)
        elif isinstance(m, torch.nn.LayerNorm):
            m.bias.data.normal_(0, 0.1)
    encoder = make_encoder(name, width=width, frozen_bn=True, weights=reference.state_dict())
    reference.fc = reference.head = reference.classifier = torch.nn.Identity()
    if name == "s3d":
        reference.avgpool = torch.nn.AdaptiveAvgPool3d(1)  # at its own 16 x 224 x 224 the same as its 2 x 7 x 7
    if name == "mvit_v2_s":  # what its forward takes for the size of the input after the first, strided convolution
        reference.pos_encoding.temporal_size, reference.pos_encoding.spatial_size = NETWORKS[name][0] // 2, (NETWORKS[name][1] // 4,) * 2
    return encoder, reference.eval(), *NETWORKS[name]


def test_a_video_network_is_torchvisions_without_its_classifier(network):
    encoder, reference, t, h = network
    views = torchvision.models.get_model_weights(encoder.name)["KINETICS400_V1"].transforms()
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (views.mean, views.std))
    frames = torch.randint(0, 256, (2, 3, t, 3, h, h), dtype=torch.uint8)
    with torch.no_grad():
        out = encoder.eval()(frames)
        expected = torch.stack([reference((video.transpose(1, 2) / 255 - mean) / std).flatten(1).t() for video in frames])
        assert out.shape == (2, encoder.channels, 3) == expected.shape
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(encode(encoder, frames, 2), out, rtol=1e-4, atol=1e-4)  # stage features


def test_a_video_network_trains_end_to_end_in_one_piece_in_chunks_and_recomputed(network):
    encoder, _, t, h = network
    torch.manual_seed(1)
    sizes = dict(hidden=8, gcn_width=8, gcn_groups=2, inner_bins=4, context_bins=2, map_hidden=(8, 4))
    model = Localizer("gtad", sizes, channels=encoder.channels, encoder=encoder).train()
    assert not any(m.training for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm3d))
    batch = {"frames": torch.randint(0, 256, (1, 8, t, 3, h, h), dtype=torch.uint8), "segments": [torch.tensor([[0.1, 0.6]])]}
    results = []
    for chunk, encoder.recompute in ((0, False), (3, False), (0, True)):
        model.zero_grad()
        terms = train_step(model, batch, loss={"node": 1, "regression": 10, "classification": 1}, class_weight=0, generator=torch.Generator().manual_seed(1),
                           shard=(0, 1), reduce=None, chunk=chunk)
        results.append((terms["loss"], {k: p.grad.clone() for k, p in encoder.named_parameters() if p.grad is not None}))
    encoder.recompute = False
    unused = {k for k, p in encoder.named_parameters() if p.grad is None}
    assert not unused
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-5, atol=1e-6)
        for key, expected in results[0][1].items():
            assert (gradients[key] - expected).abs().max() <= 1e-3 * expected.abs().max() + 1e-7, key
    assert sum(g.abs().max() > 0 for g in results[0][1].values()) > 0.9 * len(results[0][1])


def test_nothing_leaks_across_the_snippets_of_a_video_network(network):
    encoder, _, t, h = network
    frames = torch.full((2, 2, t, 3, h, h), 100.0) + torch.randn(2, 2, t, 3, h, h)
    frames.requires_grad_()
    encoder.eval()(frames)[1, :, 0].square().sum().backward()
    touched = frames.grad.abs().sum((2, 3, 4, 5)) > 0  # (B, L)
    assert touched.tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize("name", tsm.VIDEO_NETWORKS)
def test_every_video_network_has_torchvisions_parameters(name):
    with torch.device("meta"):
        encoder, reference = VideoNetwork(name), torchvision.models.get_model(name)
    classifier = ("fc.", "head.", "classifier.")
    expected = {k: v.shape for k, v in reference.state_dict().items() if not k.startswith(classifier)}
    assert {k: v.shape for k, v in encoder.state_dict().items()} == expected
    assert encoder.channels == next(v.shape[1] for k, v in reference.state_dict().items() if k.startswith(classifier) and v.ndim > 1)


def test_a_downloaded_file_of_torchvision_is_taken_from_the_hubs_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    for name, options, entry in (("mc3_18", {}, torchvision.models.video.MC3_18_Weights.KINETICS400_V1),
                                 ("tsm", dict(depth=18), torchvision.models.ResNet18_Weights.IMAGENET1K_V1)):
        state = torchvision.models.get_model("resnet18" if name == "tsm" else name).state_dict()
        torch.save(state, tmp_path / "hub/checkpoints" / entry.url.rsplit("/", 1)[1])
        encoder = make_encoder(name, weights="torchvision", **options)
        own = encoder.state_dict()
        assert all(torch.equal(own[k], v) for k, v in state.items() if not k.startswith("fc."))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(ValueError, match="r3d_18-.*cannot be downloaded .no network.*hub/checkpoints"):
        make_encoder("r3d_18", width=8, weights="torchvision")


def test_weights_and_sizes_that_do_not_fit_a_video_network_are_refused(tmp_path):
    encoder = VideoNetwork("mc3_18", width=8)
    state = {k: v for k, v in encoder.state_dict().items() if k != "stem.0.weight"}
    with pytest.raises(ValueError, match="missing stem.0.weight; unexpected odd"):
        load_weights(encoder, {**state, "odd": torch.zeros(1), "fc.weight": torch.zeros(400, 64)})
    torch.save({"model": {}, "encoder": {"name": "r3d_18"}}, tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match="holds the weights of r3d_18, this encoder is mc3_18"):
        load_weights(encoder, str(tmp_path / "encoder.pt"))
    for name, options, words in (("resnet101", {}, "no encoder 'resnet101': expected tsm or one of.*r2plus1d_18"), ("s3d", {"width": 16}, "s3d comes in one width")):
        with pytest.raises(ValueError, match=words):
            make_encoder(name, **options)
    with pytest.raises(ValueError, match="expected .B, L, T, 3, H, W"):
        encoder(torch.zeros(1, 3, 2, 8, 8))
    with pytest.raises(ValueError, match="s3d got snippets of 4 frames of 16 x 16 pixels"):
        VideoNetwork("s3d")(torch.zeros(1, 1, 4, 3, 16, 16))
    with torch.device("meta"), pytest.raises(ValueError, match="mvit_v1_b got snippets of 8 frames"):
        VideoNetwork("mvit_v1_b")(torch.zeros(1, 1, 8, 3, 224, 224))


@pytest.mark.parametrize("wrong", [{"model": None}, {0: torch.zeros(1)}, {"model": {"conv1.weight": 3}}, {"encoder": "tsm", "epoch": 3}])
def test_a_dict_of_something_else_is_one_error(wrong):
    with pytest.raises(ValueError, match="holds no state dict"):
        load_weights(TSM(width=8), wrong)


def test_a_path_may_be_a_path_object(tmp_path):
    torch.save({"model": TSM(width=8).state_dict()}, tmp_path / "e.pt")
    load_weights(TSM(width=8), tmp_path / "e.pt")
