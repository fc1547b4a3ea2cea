"""Encoder, localization head and video classifier behind one module, and one step of training it."""
import contextlib

import torch
from torch import nn

import gtad
from bmn import BMN

HEADS = {"gtad": gtad.GTAD, "bmn": BMN}


class Localizer(nn.Module):
    """(encoder) -> (standardize) -> head (, video classifier), behind one forward for DDP.

    With an encoder it takes frames (stage lofi). Without one it takes features (stage head): the head sees them standardized over
    snippets; a linear classifier sees their mean over the video, standardized over videos, which differ less than snippets do.
    """

    def __init__(self, name, sizes, *, channels, encoder=None, classes=0):
        super().__init__()
        self.name, self.encoder, self.head = name, encoder, HEADS[name](in_channels=channels, **sizes)
        if classes:
            self.classifier = nn.Linear(channels, classes)
            for buffer, value in (("mean", 0.0), ("std", 1.0), ("video_std", 1.0)):
                self.register_buffer(buffer, torch.full((channels,), value))

    def forward(self, x):
        """frames (B, L, T, 3, H, W) or features (B, C, L) -> start (B, L), end (B, L), map (B, 2, D, L), class logits (B, n) or None."""
        if self.encoder is not None:
            return *self.head(self.encoder(x)), None
        x = x - self.mean[:, None]
        return *self.head(x / self.std[:, None]), self.classifier(x.mean(2) / self.video_std)

    def proposals(self, start, end, map):
        """Outputs -> segments (B, K, 2) in [0, 1], scores (B, K), valid (B, K); BMN's scores have the boundaries' in them."""
        return gtad.decode(start, end, map, boundary_scores=self.name == "bmn")


def train_step(net, batch, *, loss, generator, shard, reduce, autocast):
    """Forward and backward of one batch, at its own temporal resolution; returns {term: detached scalar}, "loss" their weighted sum.

    net: a Localizer, or DDP around one. batch: "frames" or "features", "segments", and with a classifier "target" (B, n), class
    distributions. loss: {term: weight}. generator, shard, reduce: see gtad.loss_weights. autocast: a context for the forward pass.
    """
    x = batch["frames"] if "frames" in batch else batch["features"]
    with autocast:
        start, end, map, logits = net(x)
    targets = gtad.make_targets(batch["segments"], start.shape[1], map.shape[2], x.device)
    terms = gtad.losses(start, end, map, targets, gtad.loss_weights(targets, generator=generator, shard=shard, reduce=reduce))
    total = sum(loss[k] * v for k, v in terms.items())
    if logits is not None:
        terms["class"] = -(batch["target"] * logits.float().log_softmax(1)).sum(1).mean()
        total = total + terms["class"]
    total.backward()
    return {"loss": total.detach(), **{k: v.detach() for k, v in terms.items()}}
