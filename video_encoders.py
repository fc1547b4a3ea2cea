"""Encode video snippets with torchvision's video networks: frames -> features (B, C, L).

    encoder = VideoEncoder("r2plus1d_18")
    features = encoder(torch.randint(0, 256, (2, 100, 16, 3, 112, 112), dtype=torch.uint8))

A snippet is a clip; its feature is what the network's classifier would see. The networks, C and the
clips (T x H x W, 15 frames/s, mvit 7.5) of their Kinetics-400 weights. Other sizes will do, but

    r2plus1d_18, r3d_18, mc3_18     512           16 x 112 x 112
    s3d                            1024          128 x 224 x 224   needs 8 x 17 x 17
    mvit_v1_b, mvit_v2_s            768           16 x 224 x 224   v1_b only so: absolute positions
    swin3d_t, swin3d_s, swin3d_b    768, b 1024   32 x 224 x 224   wants 224 x 224: where stages are
                           smaller than a window, torchvision takes other relative positions' biases

Legend: B videos, C channels, L snippets, T frames a snippet. Imports torch and torchvision only.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torchvision import models
from torchvision.models.video import resnet
from torchvision.ops import StochasticDepth

VIDEO_ENCODERS = models.list_models(module=models.video)
VIDEO_RESNETS = {
    "r3d_18": ([resnet.Conv3DSimple] * 4, resnet.BasicStem),
    "mc3_18": ([resnet.Conv3DSimple] + [resnet.Conv3DNoTemporal] * 3, resnet.BasicStem),
    "r2plus1d_18": ([resnet.Conv2Plus1D] * 4, resnet.R2Plus1dStem),
}


class InputError(ValueError):
    """What a user can mend: a file, a path, an option."""


class _VideoResNet(resnet.VideoResNet):
    """Give torchvision's network `width` channels in its first stage; the stem always gives 64."""

    def __init__(self, convs, stem, width):
        self.width = width
        super().__init__(resnet.BasicBlock, convs, [2, 2, 2, 2], stem)
        self.fc = nn.Linear(8 * width, 1)

    def _make_layer(self, block, conv, planes, blocks, stride=1):
        return super()._make_layer(block, conv, planes * self.width // 64, blocks, stride)


class VideoEncoder(nn.Module):
    """Encode snippets. Parameters carry torchvision's names, so its weights load; no classifier.

    name: one of VIDEO_ENCODERS. width: channels of the first stage of the three ResNets. frozen_bn:
    BatchNorm keeps its running statistics in training too. recompute: activation checkpointing,
    with frozen_bn only, also of the transformers, which have no BatchNorm. Stochastic depth is off:
    features must not depend on how a step is cut into chunks.
    """

    def __init__(self, name: str, *, width=64, frozen_bn=False, recompute=False):
        super().__init__()
        if name not in VIDEO_ENCODERS:
            raise InputError(f"no encoder {name!r}: expected tsm or one of {VIDEO_ENCODERS}")
        if name not in VIDEO_RESNETS and width != 64:
            raise InputError(f"{name} has width 64 only, got {width}")
        self.name = name
        self.frozen_bn = frozen_bn
        self.recompute = recompute
        self.torchvision_weights = models.get_model_weights(name)["KINETICS400_V1"]
        if name in VIDEO_RESNETS:
            network = _VideoResNet(*VIDEO_RESNETS[name], width)
        else:
            network = models.get_model(name, weights=None, num_classes=1)
        self.channels = list(network.modules())[-1].weight.shape[1]  # of the classifier
        for key, child in network.named_children():
            if key not in ("fc", "classifier", "head", "avgpool"):
                self.add_module(key, child)
        for m in self.modules():
            if isinstance(m, StochasticDepth):
                m.p = 0.0
        views = self.torchvision_weights.transforms()  # each network has a normalisation of its own
        for key, rgb in (("mean", views.mean), ("std", views.std)):
            self.register_buffer(key, 255 * torch.tensor(rgb).view(3, 1, 1, 1), persistent=False)

    def train(self, mode: bool = True):
        super().train(mode)
        for m in self.modules():
            if self.frozen_bn and isinstance(m, _BatchNorm):
                m.eval()
        return self

    def forward(self, frames: Tensor) -> Tensor:
        """Map frames (B, L, T, 3, H, W), uint8 or float in [0, 255], to features (B, C, L)."""
        if frames.ndim != 6 or frames.shape[3] != 3:
            raise ValueError(f"{self.name} got {tuple(frames.shape)}, expected (B, L, T, 3, H, W)")
        B, L, T, _, H, W = frames.shape
        size = f"{self.name} got {T} frames of {H} x {W}, expected"
        # With 5 to 7 frames s3d gives features, but PyTorch's backward pass crashes on a CPU.
        if self.name == "s3d" and (T < 8 or min(H, W) < 17):
            raise InputError(f"{size} at least 8 of 17 x 17")
        if self.name == "mvit_v1_b" and (T, H, W) != (16, 224, 224):
            raise InputError(f"{size} 16 of 224 x 224: use mvit_v2_s")
        x = frames.flatten(0, 1).transpose(1, 2)  # (B * L, 3, T, H, W)
        x = (x - self.mean).div_(self.std)  # one float copy
        if self.name.startswith("mvit"):  # as in torchvision, but for frames of any size
            x = self.conv_proj(x)
            thw = tuple(x.shape[2:])
            x = self.pos_encoding(x.flatten(2).transpose(1, 2))  # (B * L, 1 + patches, C)
            for block in self.blocks:
                x, thw = self._run(block, x, thw)
            x = self.norm(x)[:, 0]
        else:
            for module in self.children():
                x = self._run(module, x)
            x = x.mean((1, 2, 3) if self.name.startswith("swin") else (2, 3, 4))
        return x.view(B, L, -1).transpose(1, 2)

    def _run(self, module, *inputs):
        # In parts small enough to be recomputed one by one.
        if type(module) is nn.Sequential:
            for part in module:
                inputs = (self._run(part, *inputs),)
            return inputs[0]
        if self.recompute and self.frozen_bn and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)
