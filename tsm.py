"""TSM snippet encoders: a 2-D ResNet whose residual blocks see the neighbouring frames through a temporal shift.

TSM: Temporal Shift Module for Efficient Video Understanding, Lin et al., ICCV 2019, section 4. Snippet features as in LoFi,
NeurIPS 2021, section 3: frame features after global average pooling, averaged over the T frames of a snippet.

    encoder = TSM(depth=18)
    features = encoder(torch.randint(0, 256, (2, 100, 8, 3, 112, 112), dtype=torch.uint8))  # (B, L, T, 3, H, W) -> (2, 512, 100)

Legend: B videos, C channels, L snippets, T frames a snippet. Imports torch and torchvision only: copy this file where you need it.
"""
import warnings

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck

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

    def __init__(self, *, depth=18, width=64, shift_div=8, maxpool=True, frozen_bn=False, recompute=False):
        super().__init__()
        if depth not in ARCHITECTURES:
            raise ValueError(f"TSM got depth {depth}, expected one of {sorted(ARCHITECTURES)}")
        block, counts = ARCHITECTURES[depth]
        self.shift_div, self.frozen_bn, self.recompute, self.channels = shift_div, frozen_bn, recompute, 8 * width * block.expansion
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
        super().train(mode)
        if self.frozen_bn:
            for m in self.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.eval()
        return self

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


def load_weights(encoder, source):
    """Loads weights into an encoder, strictly: every parameter of the encoder must be there, and nothing but a classifier beside it.

    source: a state dict or the path of a checkpoint: this project's own ({"model": state dict}), torchvision's ResNets (ImageNet) or
    the official TSM release ({"state_dict": ...}, keys like module.base_model.layer1.0.conv1.net.weight). Raises ValueError that lists
    missing and unexpected keys and shapes.
    """
    state = source
    if isinstance(source, str):
        try:
            state = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a truncated or foreign file makes torch raise
            raise ValueError(f"{source} cannot be read as a PyTorch checkpoint of tensors ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{source} holds a {type(state).__name__}, expected a state dict")
    made = state.get("encoder", {})  # what no weight tells, in checkpoints of this project
    if made and (made["shift_div"], made["maxpool"]) != (encoder.shift_div, not isinstance(encoder.maxpool, nn.Identity)):
        warnings.warn(f"{source} was trained with shift_div {made['shift_div']}, maxpool {made['maxpool']}; this encoder has others")
    for wrapper in ("model", "state_dict"):
        state = state.get(wrapper, state)
    renamed = {}
    for key, value in state.items():
        key = key.removeprefix("module.").removeprefix("base_model.").replace(".net.", ".")
        if not key.startswith(("fc.", "new_fc.")):
            renamed[key] = value
    own = encoder.state_dict()
    problems = [f"missing {k}" for k in own if k not in renamed and not k.endswith("num_batches_tracked")]
    problems += [f"unexpected {k}" for k in renamed if k not in own]
    problems += [f"{k} has shape {tuple(renamed[k].shape)}, expected {tuple(v.shape)}" for k, v in own.items()
                 if k in renamed and renamed[k].shape != v.shape]
    if problems:
        raise ValueError(f"{source if isinstance(source, str) else 'the state dict'} does not fit this encoder: " + "; ".join(problems[:20])
                         + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "") + ". Check the config's encoder block (depth, width)")
    encoder.load_state_dict(renamed, strict=False)
    return encoder
