"""Snippet encoders, frames (B, L, T, 3, H, W) -> features (B, C, L): TSM ResNets, and torchvision's video networks by name.

TSM: Temporal Shift Module for Efficient Video Understanding, Lin et al., ICCV 2019, section 4: a 2-D ResNet whose residual blocks see the
neighbouring frames through a temporal shift. Snippet features as in LoFi, NeurIPS 2021, section 3: frame features after global average
pooling, averaged over the T frames of a snippet.

    encoder = TSM(depth=18)
    features = encoder(torch.randint(0, 256, (2, 100, 8, 3, 112, 112), dtype=torch.uint8))  # (B, L, T, 3, H, W) -> (2, 512, 100)
    encoder = make_encoder("r2plus1d_18", weights="torchvision")  # with torchvision's Kinetics-400 weights
    encoder = make_encoder("tsm", depth=50, weights="TSM_kinetics_RGB_resnet50_shift8_blockres_avg_segment8_e100_dense.pth")

Legend: B videos, C channels, L snippets, T frames a snippet. Imports torch and torchvision only: copy this file where you need it.
"""
import os
import warnings

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.video.resnet import BasicStem, Conv2Plus1D, Conv3DNoTemporal, Conv3DSimple, R2Plus1dStem, VideoResNet
from torchvision.models.video.resnet import BasicBlock as VideoBlock
from torchvision.ops import StochasticDepth

ARCHITECTURES = {18: (BasicBlock, (2, 2, 2, 2)), 34: (BasicBlock, (3, 4, 6, 3)), 50: (Bottleneck, (3, 4, 6, 3))}


class _Shift(torch.autograd.Function):
    """The shift is a permutation with zeros at the ends, so its gradient is the shift the other way."""

    @staticmethod
    def forward(ctx, x, frames, channels):
        ctx.frames, ctx.channels = frames, channels
        return _shift(x, frames, channels, 1)

    @staticmethod
    def backward(ctx, grad):
        return _shift(grad, ctx.frames, ctx.channels, -1), None, None


def _shift(x, frames, channels, direction):
    x5 = x.unflatten(0, (-1, frames))  # (N, T, C, H, W), a view in either memory format
    out = torch.empty_like(x)
    out5 = out.unflatten(0, (-1, frames))
    ahead, behind = slice(0, channels), slice(channels, 2 * channels)  # take the next / the previous frame's value
    if direction < 0:
        ahead, behind = behind, ahead
    out5[:, :-1, ahead] = x5[:, 1:, ahead]
    out5[:, -1, ahead] = 0
    out5[:, 1:, behind] = x5[:, :-1, behind]
    out5[:, 0, behind] = 0
    out5[:, :, 2 * channels:] = x5[:, :, 2 * channels:]
    return out


def temporal_shift(x, frames, div=8):
    """Shifts channels along the frames of each snippet (TSM, section 3 and figure 1b).

    x: (N * frames, C, H, W), the frames of a snippet in a row. The first C // div channels take the next frame's value, the
    second C // div the previous frame's, the rest stay; what lies outside the snippet counts as zero. Returns a new tensor of
    x's shape, dtype and memory format. ValueError if the first dimension is no multiple of `frames`.
    """
    if x.shape[0] % frames:
        raise ValueError(f"temporal_shift got {x.shape[0]} frames, expected a multiple of the {frames} frames of a snippet")
    return _Shift.apply(x, frames, x.shape[1] // div)


def shifted_conv(conv, x, frames, div):
    """conv(temporal_shift(x)), which holds x for the backward pass, not a second, shifted copy: x is the output of a ReLU and held
    by it anyway. The weight's gradient then shifts once more."""
    if not div:
        return conv(x)
    shifted = temporal_shift(x, frames, div)
    if torch.compiler.is_compiling():  # the compiler decides itself what to keep
        return conv(shifted)
    address = shifted.data_ptr()
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (x.detach(),) if t.data_ptr() == address else t,
            lambda t: temporal_shift(t[0], frames, div) if isinstance(t, tuple) else t):
        return conv(shifted)


def shifted_block(block, x, frames, div):
    """A torchvision BasicBlock or Bottleneck with the residual shift: what enters its first conv is shifted, the identity is not."""
    identity = x if block.downsample is None else block.downsample(x)
    x = block.relu(block.bn1(shifted_conv(block.conv1, x, frames, div)))
    x = block.bn2(block.conv2(x))
    if isinstance(block, Bottleneck):
        x = block.bn3(block.conv3(block.relu(x)))
    return block.relu(x + identity)


class TSM(nn.Module):
    """Snippet encoder, frames -> features. Parameters carry torchvision's ResNet names, so its ImageNet weights load as they are.

    depth: 18, 34 or 50. width: channels of the first stage (64 in the papers; less for small machines).
    shift_div: a channel fraction of 1/shift_div is shifted each way; 0 shifts nothing (TSN: an image network, frame by frame).
    maxpool: False for frames much smaller than 112 pixels. frozen_bn: BatchNorm keeps its running statistics in training too
    (its scale and offset still learn); features then do not depend on the batch, nor on how it is spread over GPUs.
    recompute: activation checkpointing; a block keeps its input only and runs again in the backward pass, a third more time for much less memory.
    With frozen_bn only, else the second run would count into BatchNorm's running statistics again.
    """
    name = "tsm"

    def __init__(self, *, depth=18, width=64, shift_div=8, maxpool=True, frozen_bn=False, recompute=False):
        super().__init__()
        if depth not in ARCHITECTURES:
            raise ValueError(f"TSM got depth {depth}, expected one of {sorted(ARCHITECTURES)}")
        block, counts = ARCHITECTURES[depth]
        self.depth, self.shift_div, self.frozen_bn, self.recompute, self.channels = depth, shift_div, frozen_bn, recompute, 8 * width * block.expansion
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if maxpool else nn.Identity()
        channels = width
        for stage, count in enumerate(counts):
            blocks, planes = [], width * 2**stage
            for i in range(count):
                stride, downsample = (2 if stage and not i else 1), None
                if stride > 1 or channels != planes * block.expansion:
                    downsample = nn.Sequential(nn.Conv2d(channels, planes * block.expansion, 1, stride, bias=False),
                                               nn.BatchNorm2d(planes * block.expansion))
                blocks.append(block(channels, planes, stride, downsample))
                channels = planes * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        # ImageNet's statistics, as for every torchvision weight; frames arrive as uint8 and are normalised on the device
        self.register_buffer("mean", 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)

    def train(self, mode=True):
        return freeze_batchnorm(super().train(mode)) if self.frozen_bn else super().train(mode)

    def forward(self, frames):
        """frames (B, L, T, 3, H, W), uint8 (or float in [0, 255]) -> X (B, C, L). Any T, H and W."""
        if frames.ndim != 6 or frames.shape[3] != 3:
            raise ValueError(f"TSM got frames of shape {tuple(frames.shape)}, expected (B, L, T, 3, H, W)")
        b, l, t = frames.shape[:3]
        x = frames.flatten(0, 2)  # (B * L * T, 3, H, W)
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        x = self.maxpool(self.conv1_relu(x))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                if self.recompute and self.frozen_bn and torch.is_grad_enabled():
                    x = checkpoint(shifted_block, block, x, t, self.shift_div, use_reentrant=False)
                else:
                    x = shifted_block(block, x, t, self.shift_div)
        return x.mean((2, 3)).view(b, l, t, -1).mean(2).transpose(1, 2)  # (B, C, L)

    def conv1_relu(self, x):
        return torch.relu_(self.bn1(self.conv1(x)))


def freeze_batchnorm(module):
    """BatchNorm of any dimension in evaluation mode, its scale and offset still learning; returns the module."""
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval()
    return module


@torch.no_grad()
def recalibrate_batchnorm(encoder, batches, reduce=None):
    """Sets BatchNorm's running mean and variance to those over all of `batches`, an iterable of frames (B, L, T, 3, H, W).

    On the way each batch is normalised by its own statistics, as in training; the variance is that around the mean over all batches.
    reduce(x): the mean of a float64 tensor over processes, which then all get the same statistics. Leaves train and eval mode as they are.
    """
    norms = {m: torch.zeros(2 * m.num_features + 1, dtype=torch.float64, device=m.weight.device)
             for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    before = [(m, m.training, m.momentum) for m in norms]

    def count(m, inputs):
        x = inputs[0].transpose(0, 1).flatten(1).float()  # (C, everything else)
        var, mean = torch.var_mean(x, 1, correction=0)
        norms[m] += x.shape[1] * torch.cat([mean, var + mean.square(), mean.new_ones(1)]).double()

    hooks = [m.register_forward_pre_hook(count) for m in norms]
    try:
        for m in norms:
            m.train()
            m.momentum = 0.0  # the running statistics stay out of it
        for frames in batches if norms else ():
            encoder.forward(frames)  # not compiled: hooks
    finally:
        for hook in hooks:
            hook.remove()
        for m, m.training, m.momentum in before:
            pass
    for m, sums in norms.items():
        sums = sums if reduce is None else reduce(sums)
        mean, square = (sums[:-1] / sums[-1]).chunk(2)
        m.running_mean.copy_(mean)
        m.running_var.copy_(square - mean.square())


VIDEO_NETWORKS = models.list_models(module=models.video)
VIDEO_RESNETS = {"r3d_18": ([Conv3DSimple] * 4, BasicStem), "mc3_18": ([Conv3DSimple] + [Conv3DNoTemporal] * 3, BasicStem),
                 "r2plus1d_18": ([Conv2Plus1D] * 4, R2Plus1dStem)}


class _VideoResNet(VideoResNet):
    """torchvision's, with `width` channels in its first stage and 8 * width in its last; the stem always gives 64."""

    def __init__(self, convs, stem, width):
        self.width = width
        super().__init__(VideoBlock, convs, [2, 2, 2, 2], stem)
        self.fc = nn.Linear(8 * width, 1)

    def _make_layer(self, block, conv, planes, blocks, stride=1):
        return super()._make_layer(block, conv, planes * self.width // 64, blocks, stride)


def _in_turn(module):
    """The modules that a torchvision network applies one after the other, small enough to be recomputed one by one."""
    return [m for child in module for m in _in_turn(child)] if type(module) is nn.Sequential else [module]


class VideoNetwork(nn.Module):
    """A video network of torchvision as a snippet encoder, frames -> features: a snippet is a clip, its feature what the classifier would see.

    name: of torchvision. Their own sizes, C, and the clips that their Kinetics weights were trained on:

        r2plus1d_18, r3d_18, mc3_18       16 frames, 112 x 112    C  512   15 frames/s
        s3d                              128 frames, 224 x 224    C 1024   15 frames/s
        mvit_v1_b, mvit_v2_s              16 frames, 224 x 224    C  768   7.5 frames/s
        swin3d_t, swin3d_s, swin3d_b      32 frames, 224 x 224    C  768 (b: 1024), 15 frames/s

    Any T, H and W, but: s3d needs T >= 8 (its kernels span 7 frames) and at least 17 x 17 pixels; mvit_v1_b, whose positions are absolute, takes 16 x 224 x 224 only.
    mvit_v2_s' relative positions are interpolated at other sizes than its own, as it does itself between its stages.
    Each network's normalisation is its own. Parameters carry torchvision's names, so its weights load as they are; the classifier is left out.
    Stochastic depth is off: features must not depend on how a step is cut into chunks.
    swin3d wants at least 224 x 224 (T-LoFi): below, its last stages are smaller than a window, and torchvision then takes other relative positions' biases.
    width: channels of the first stage of the three ResNets, 64 in torchvision. frozen_bn, recompute: as in TSM (the transformers have no BatchNorm;
    recompute works with frozen_bn only, the same for all).
    """

    def __init__(self, name, *, width=64, frozen_bn=False, recompute=False):
        super().__init__()
        if name not in VIDEO_NETWORKS:
            raise ValueError(f"no encoder {name!r}: expected tsm or one of torchvision's video networks, {', '.join(VIDEO_NETWORKS)}")
        if name not in VIDEO_RESNETS and width != 64:
            raise ValueError(f"{name} comes in one width only, asked for was {width}: leave it at 64, or take {', '.join(VIDEO_RESNETS)}")
        net = _VideoResNet(*VIDEO_RESNETS[name], width) if name in VIDEO_RESNETS else models.get_model(name, weights=None, num_classes=1)
        self.name, self.frozen_bn, self.recompute = name, frozen_bn, recompute
        classifier = list(net.modules())[-1]
        self.channels = getattr(classifier, "in_features", None) or classifier.in_channels
        for key, child in net.named_children():
            if key not in ("fc", "classifier", "head", "avgpool"):
                self.add_module(key, child)
        for m in self.modules():
            if isinstance(m, StochasticDepth):
                m.p = 0.0
        views = models.get_model_weights(name)["KINETICS400_V1"].transforms()
        for key in ("mean", "std"):
            self.register_buffer(key, 255 * torch.tensor(getattr(views, key)).view(3, 1, 1, 1), persistent=False)

    def train(self, mode=True):
        return freeze_batchnorm(super().train(mode)) if self.frozen_bn else super().train(mode)

    def forward(self, frames):
        """frames (B, L, T, 3, H, W), uint8 (or float in [0, 255]) -> X (B, C, L)."""
        if frames.ndim != 6 or frames.shape[3] != 3:
            raise ValueError(f"{self.name} got frames of shape {tuple(frames.shape)}, expected (B, L, T, 3, H, W)")
        b, l, t, _, h, w = frames.shape
        if self.name == "s3d" and (t < 8 or min(h, w) < 17):  # 5 frames give features, but PyTorch's CPU backward pass crashes for 5 to 7
            raise ValueError(f"s3d got snippets of {t} frames of {h} x {w} pixels, it needs at least 8 of 17 x 17: see data.frames_per_snippet, data.size")
        if self.name == "mvit_v1_b" and (t, h, w) != (16, 224, 224):
            raise ValueError(f"mvit_v1_b got snippets of {t} frames of {h} x {w} pixels, its positions are learnt for 16 of 224 x 224: use mvit_v2_s")
        x = frames.flatten(0, 1).transpose(1, 2)  # (B * L, 3, T, H, W)
        x = (x - self.mean) / self.std
        if self.name.startswith("mvit"):
            x = self._class_token(x)
        else:
            for child in self.children():
                for module in _in_turn(child):
                    x = self._run(module, x)
            x = x.mean((1, 2, 3) if self.name.startswith("swin") else (2, 3, 4))
        return x.view(b, l, -1).transpose(1, 2)  # (B, C, L)

    def _class_token(self, x):
        """MViT as torchvision runs it, but at the size of the frames instead of the one that it was made for."""
        x = self.conv_proj(x)
        thw = tuple(x.shape[2:])
        x = self.pos_encoding(x.flatten(2).transpose(1, 2))  # (B * L, 1 + patches, C)
        for block in self.blocks:
            x, thw = self._run(block, x, thw)
        return self.norm(x)[:, 0]

    def _run(self, module, *inputs):
        again = self.recompute and self.frozen_bn and torch.is_grad_enabled()
        return checkpoint(module, *inputs, use_reentrant=False) if again else module(*inputs)


def make_encoder(name="tsm", *, depth=18, width=64, shift_div=8, maxpool=True, frozen_bn=False, recompute=False, weights=None):
    """An encoder by name, "tsm" or one of torchvision's video networks. depth, shift_div and maxpool are TSM's alone; weights: see load_weights."""
    if name == "tsm":
        encoder = TSM(depth=depth, width=width, shift_div=shift_div, maxpool=maxpool, frozen_bn=frozen_bn, recompute=recompute)
    else:
        encoder = VideoNetwork(name, width=width, frozen_bn=frozen_bn, recompute=recompute)
    return load_weights(encoder, weights) if weights else encoder


def torchvision_weights(encoder):
    """The state dict that torchvision offers for an encoder, downloaded once into torch.hub's folder: ImageNet's for TSM, Kinetics-400's for a video network."""
    name, weights = (f"resnet{encoder.depth}", "IMAGENET1K_V1") if encoder.name == "tsm" else (encoder.name, "KINETICS400_V1")
    entry = models.get_model_weights(name)[weights]
    try:
        return entry.get_state_dict(progress=False, check_hash=True)
    except OSError as error:  # what urllib raises
        raise ValueError(f"{entry.url} cannot be downloaded ({error}): fetch it on another machine and name that file, or put it into {torch.hub.get_dir()}/checkpoints") from None


def load_weights(encoder, source):
    """Loads weights into an encoder, strictly: every parameter of the encoder must be there, and nothing but a classifier beside it.

    source: a state dict, "torchvision" (see torchvision_weights) or the path of a checkpoint: this project's own ({"model": state dict}),
    torchvision's (ResNets for TSM, the video network itself) or the official TSM release's ({"state_dict": ...}, keys like
    module.base_model.layer1.0.conv1.net.weight). Raises ValueError that lists missing and unexpected keys and shapes.
    """
    state = torchvision_weights(encoder) if source == "torchvision" else source
    if isinstance(state, (str, os.PathLike)):
        try:
            state = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a truncated or foreign file makes torch raise
            raise ValueError(f"{source} cannot be read as a PyTorch checkpoint of tensors ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{source} holds a {type(state).__name__}, expected a state dict")
    made = state.get("encoder")  # what no weight tells, in checkpoints of this project
    made = made if isinstance(made, dict) else {}
    if made and made.get("name", "tsm") != encoder.name:
        raise ValueError(f"{source} holds the weights of {made.get('name', 'tsm')}, this encoder is {encoder.name}: check the config key encoder.name")
    if made and encoder.name == "tsm" and (made.get("shift_div"), made.get("maxpool")) != (encoder.shift_div, not isinstance(encoder.maxpool, nn.Identity)):
        warnings.warn(f"{source} was trained with shift_div {made.get('shift_div')}, maxpool {made.get('maxpool')}; this encoder has others")
    for wrapper in ("model", "state_dict"):
        state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    if not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        raise ValueError(f"{source if isinstance(source, (str, os.PathLike)) else 'the dict'} holds no state dict of names and tensors, but {list(state)[:5]}")
    renamed = {}
    for key, value in state.items():
        key = key.removeprefix("module.").removeprefix("base_model.").replace(".net.", ".")
        if not key.startswith(("fc.", "new_fc.", "classifier.", "head.")):
            renamed[key] = value
    own = encoder.state_dict()
    problems = [f"missing {k}" for k in own if k not in renamed and not k.endswith("num_batches_tracked")]
    problems += [f"unexpected {k}" for k in renamed if k not in own]
    problems += [f"{k} has shape {tuple(renamed[k].shape)}, expected {tuple(v.shape)}" for k, v in own.items()
                 if k in renamed and renamed[k].shape != v.shape]
    if problems:
        raise ValueError(f"{source if isinstance(source, str) else 'the state dict'} does not fit this encoder: " + "; ".join(problems)
                         + ". Check the config's encoder block (name, depth, width)")
    encoder.load_state_dict(renamed, strict=False)
    return encoder
