"""Encode video snippets with a TSM ResNet: frames (B, L, T, 3, H, W) -> features (B, C, L).

Lin et al., TSM: Temporal Shift Module for Efficient Video Understanding, ICCV 2019, section 4: a
2-D ResNet whose residual blocks see the neighbouring frames through a temporal shift. Snippet
features as in LoFi, NeurIPS 2021, section 3: frame features after pooling, averaged over T.

    encoder = TSM(depth=18)
    features = encoder(torch.randint(0, 256, (2, 100, 8, 3, 112, 112), dtype=torch.uint8))
    load_weights(encoder, "torchvision")  # ImageNet's; or a checkpoint, the TSM release's too

Legend: B videos, C channels, L snippets, T frames a snippet. The file stands alone.
"""

import copy
import os
import warnings
import zipfile
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck

NUM_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}  # by depth and stage


class InputError(ValueError):
    """What a user can mend: a file, a path, an option."""


class _Shift(torch.autograd.Function):
    """Take channels `ahead` from the next frame, `behind` from the previous; gradients go back."""

    @staticmethod
    def forward(ctx, x, frames, ahead, behind):
        ctx.options = (frames, behind, ahead)
        shifted = x.clone()
        source = x.unflatten(0, (-1, frames))  # (N, T, C, H, W), a view in either memory format
        target = shifted.unflatten(0, (-1, frames))
        target[:, :-1, ahead] = source[:, 1:, ahead]
        target[:, -1, ahead] = 0
        target[:, 1:, behind] = source[:, :-1, behind]
        target[:, 0, behind] = 0
        return shifted

    @staticmethod
    def backward(ctx, grad):
        return _Shift.apply(grad, *ctx.options), None, None, None


def temporal_shift(x: Tensor, frames: int, div: int = 8) -> Tensor:
    """Shift channels along the frames of each snippet (TSM, section 3 and figure 1b).

    x: (N * frames, C, H, W), the frames of a snippet in a row. The first C // div channels take
    the next frame's value, the second C // div the previous frame's, the rest stay; what lies
    outside the snippet counts as zero. Returns a new tensor of x's shape, dtype and memory format.
    """
    n = x.shape[1] // div
    return _Shift.apply(x, frames, slice(0, n), slice(n, 2 * n))


def shifted_conv(conv: nn.Conv2d, x: Tensor, frames: int, div: int) -> Tensor:
    """Return conv(temporal_shift(x)) without holding a second, shifted copy of x for backward."""
    shifted = temporal_shift(x, frames, div) if div else x
    if not div or torch.compiler.is_compiling():  # the compiler decides itself what to keep
        return conv(shifted)

    # A convolution saves its input for the gradient of its weight: here `shifted`, as large as x,
    # which is kept anyway, as the output of a ReLU. So where autograd would save `shifted`, known
    # by its address, save x, in a tuple as a mark, and shift again in the backward pass: an eighth
    # less memory.
    address = shifted.data_ptr()

    def pack(tensor):
        return (x.detach(),) if tensor.data_ptr() == address else tensor

    def unpack(saved):
        return temporal_shift(saved[0], frames, div) if isinstance(saved, tuple) else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return conv(shifted)


def shifted_block(block: BasicBlock | Bottleneck, x: Tensor, frames: int, div: int) -> Tensor:
    """Run torchvision's block with the residual shift: before its first conv, not the identity."""
    identity = x if block.downsample is None else block.downsample(x)
    x = block.relu(block.bn1(shifted_conv(block.conv1, x, frames, div)))
    x = block.bn2(block.conv2(x))
    if isinstance(block, Bottleneck):
        x = block.bn3(block.conv3(block.relu(x)))
    return block.relu(x + identity)


class TSM(nn.Module):
    """Encode snippets. Parameters carry torchvision's ResNet names, so its weights load.

    depth: 18, 34 or 50. width: channels of the first stage (64 in the papers). shift_div: 1 in
    shift_div channels is shifted each way; 0: none (TSN: an image network, frame by frame).
    maxpool: False for frames much smaller than 112 pixels. frozen_bn: BatchNorm keeps its running
    statistics in training too, and learns scale and offset only: features then depend neither on
    the batch nor on its spread over GPUs. recompute: activation checkpointing, a third more time
    for much less memory; with frozen_bn only, as a second run would count into the statistics.
    """

    name = "tsm"

    def __init__(
        self, *, depth=18, width=64, shift_div=8, maxpool=True, frozen_bn=False, recompute=False
    ):
        super().__init__()
        if depth not in NUM_BLOCKS:
            raise InputError(f"TSM got depth {depth}, expected one of {list(NUM_BLOCKS)}")
        block = BasicBlock if depth < 50 else Bottleneck
        self.shift_div = shift_div
        self.maxpool = maxpool
        self.frozen_bn = frozen_bn
        self.recompute = recompute
        self.channels = 8 * width * block.expansion
        self.torchvision_weights = models.get_model_weights(f"resnet{depth}")["IMAGENET1K_V1"]
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, 1) if maxpool else nn.Identity()
        channels = width
        for stage, count in enumerate(NUM_BLOCKS[depth]):
            planes = width * 2**stage
            out = planes * block.expansion
            blocks = []
            for stride in [2 if stage else 1] + [1] * (count - 1):
                downsample = None
                if stride > 1 or channels != out:
                    conv = nn.Conv2d(channels, out, 1, stride, bias=False)
                    downsample = nn.Sequential(conv, nn.BatchNorm2d(out))
                blocks.append(block(channels, planes, stride, downsample))
                channels = out
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        # ImageNet's statistics; frames arrive as uint8 and are normalised on the device.
        for key, rgb in (("mean", [0.485, 0.456, 0.406]), ("std", [0.229, 0.224, 0.225])):
            self.register_buffer(key, 255 * torch.tensor(rgb).view(3, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True):
        super().train(mode)
        for m in self.modules():
            if self.frozen_bn and isinstance(m, _BatchNorm):
                m.eval()
        return self

    def forward(self, frames: Tensor) -> Tensor:
        """Map frames (B, L, T, 3, H, W), uint8 or float in [0, 255], any size, to (B, C, L)."""
        if frames.ndim != 6 or frames.shape[3] != 3:
            raise ValueError(f"TSM got {tuple(frames.shape)}, expected (B, L, T, 3, H, W)")
        B, L, T = frames.shape[:3]
        x = frames.flatten(0, 2)  # (B * L * T, 3, H, W)
        # One float copy of the frames, the largest tensor here, and that in its final layout.
        x = x.to(self.mean.dtype, memory_format=torch.channels_last, copy=True)
        x = x.sub_(self.mean).div_(self.std)
        x = self.pool(torch.relu_(self.bn1(self.conv1(x))))
        for block in (*self.layer1, *self.layer2, *self.layer3, *self.layer4):
            if self.recompute and self.frozen_bn and torch.is_grad_enabled():
                x = checkpoint(shifted_block, block, x, T, self.shift_div, use_reentrant=False)
            else:
                x = shifted_block(block, x, T, self.shift_div)
        x = x.mean((2, 3)).view(B, L, T, -1)  # (B, L, T, C)
        return x.mean(2).transpose(1, 2)


@torch.no_grad()
def recalibrate_batchnorm(encoder: nn.Module, batches: Iterable[Tensor], reduce=lambda sums: sums):
    """Set BatchNorm's running mean and variance to those over all of `batches`.

    batches: frames (B, L, T, 3, H, W), each normalised by its own statistics on the way, as in
    training. reduce: the mean of a float64 tensor over processes, which get equal statistics.
    """
    sums = {}  # for each channel of its values, then of their squares; at the end their number

    def count(m, inputs):
        x = inputs[0].transpose(0, 1).flatten(1).float()  # (C, everything else)
        var, mean = torch.var_mean(x, 1, correction=0)
        moments = torch.cat([mean, var + mean.square(), mean.new_ones(1)])
        sums[m] = sums.get(m, 0) + x.shape[1] * moments.double()

    # A copy, so that modes and hooks of the encoder stay as they are.
    copied = copy.deepcopy(encoder)
    pairs = zip(encoder.modules(), copied.modules(), strict=True)
    norms = [(m, own) for m, own in pairs if isinstance(m, _BatchNorm)]
    for _, own in norms:
        own.train()
        own.register_forward_pre_hook(count)
    for frames in batches if norms else ():
        copied.forward(frames)  # not compiled, as hooks must run
    for m, own in norms:
        total = reduce(sums[own])
        mean, square = (total[:-1] / total[-1]).chunk(2)
        m.running_mean.copy_(mean)
        m.running_var.copy_(square - mean.square())
        m.num_batches_tracked.copy_(own.num_batches_tracked)


def load_weights(encoder: nn.Module, source: dict | str | os.PathLike) -> nn.Module:
    """Load weights strictly: all of the encoder's, and nothing but a classifier beside them.

    encoder: a TSM, or any with .name and .torchvision_weights. source: a state dict, "torchvision"
    or the path of a checkpoint: this project's ({"model": state dict}), torchvision's or the TSM
    release's ({"state_dict": ...}, keys such as module.base_model.layer1.0.conv1.net.weight).
    InputError names what cannot be read, and all keys that do not fit.
    """
    label = "the state dict" if isinstance(source, dict) else source
    state = source if isinstance(source, dict) else _read_weights(encoder, source)
    metadata = state.get("encoder")  # what no weight tells, in checkpoints of this project
    if isinstance(metadata, dict):
        name = metadata.get("name", "tsm")
        if name != encoder.name:
            raise InputError(f"{label} is of encoder {name}, not of {encoder.name} (encoder.name)")
        for key in ("shift_div", "maxpool"):
            expected = getattr(encoder, key, None)  # only TSM has them
            if expected not in (None, metadata.get(key)):
                message = f"{label} has {key} {metadata.get(key)}, the encoder {expected}"
                warnings.warn(message, stacklevel=2)
    for wrapper in ("model", "state_dict"):
        state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    if not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        raise InputError(f"{label}: not a state dict of names and tensors: {list(state)[:5]}")
    renamed = {}
    for key, value in state.items():
        key = key.removeprefix("module.").removeprefix("base_model.").replace(".net.", ".")
        if not key.startswith(("fc.", "new_fc.", "classifier.", "head.")):
            renamed[key] = value
    try:
        encoder.load_state_dict(renamed)
    except RuntimeError as error:
        problems = " ".join(str(error).split())
        raise InputError(f"{label} does not fit, check the encoder's sizes:\n{problems}") from None
    return encoder


def load_state(path: str | os.PathLike) -> dict:
    """Read a dictionary that torch.save wrote; InputError if it cannot be read."""
    try:
        # torch writes the checksum of each tensor, but does not compare it.
        if zipfile.is_zipfile(path) and (entry := zipfile.ZipFile(path).testzip()):
            raise zipfile.BadZipFile(entry)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a truncated or foreign file makes torch raise almost anything
        reason = f"({type(error).__name__}): make it again"
        raise InputError(f"{path} cannot be read as a PyTorch checkpoint {reason}") from None


def _read_weights(encoder, source):
    if source == "torchvision":
        entry = encoder.torchvision_weights
        try:
            return entry.get_state_dict(progress=False, check_hash=True)
        except OSError as error:  # what urllib raises
            hint = f"Put that file into {torch.hub.get_dir()}/checkpoints, or name its path"
            raise InputError(f"{entry.url} cannot be downloaded ({error}).\n{hint}") from None
    return load_state(source)
