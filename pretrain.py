"""Classification pre-training of a snippet encoder: ICP on images, ACP on trimmed clips, ACP+ on the target's trimmed segments (LoFi, section 4.2).

The tasks differ in their clips and labels only; there is one training loop. Every pre-training gives the same thing, an encoder for the later stages.
"""
import math

import torch
from torch import nn

import data
import engine


class Classifier(nn.Module):
    """Snippet encoder and a linear classifier of clips: frames (B, 1, T, 3, H, W) -> logits (B, n)."""

    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder, self.linear = encoder, nn.Linear(encoder.channels, classes)

    def forward(self, frames):
        return self.linear(self.encoder(frames).mean(2))


def clips_of(phase, source, videos, folder):
    """Training and held-out clips and their classes: ([Clip], [Clip], [names]).

    phase "icp": SOURCE/{train,val}/CLASS/*.jpg; "acp": SOURCE/{train,val}/CLASS/*.zip; "acp_plus": the annotated segments of
    videos() = (training, validation) videos, whose frames lie in `folder`.
    """
    if phase == "acp_plus":
        train, val = videos()
        classes = data.class_names(train)
        return data.segment_clips(train, folder, classes), data.segment_clips(val, folder, classes), classes
    suffix = ".jpg" if phase == "icp" else ".zip"
    train, classes = data.list_clips(f"{source}/train", suffix)
    val, _ = data.list_clips(f"{source}/val", suffix, classes)
    return train, val, classes


def train_classifier(encoder, clips, *, size, seed, options, name, folder, process, workers, save_sec=60.0, **views):
    """Trains `encoder` in place on clips = (training, held out, classes); returns (seconds, top-1 accuracy on the held-out clips).

    options: epochs, batch_size, frames and those of engine.fit. views: stride, crop and flip of data.ClipDataset.
    """
    train, held_out = (data.ClipDataset(c, frames=options["frames"], train=i == 0, seed=seed, **views) for i, c in enumerate(clips[:2]))
    torch.manual_seed(data.seed_of(seed, name))
    model, fidelity = Classifier(encoder, len(clips[2])).to(process.device), data.Fidelity("full", 1, size)

    def step(net, batch, epoch, i):
        with engine.autocast(process.device):
            logits = net(batch["frames"]).float()
        loss = nn.functional.cross_entropy(logits, batch["label"])
        loss.backward()
        return {"loss": loss.detach(), "accuracy": (logits.argmax(1) == batch["label"]).float().mean()}

    sampler = data.CyclicFidelitySampler(len(train), options["batch_size"], [fidelity], seed=data.seed_of(seed, name), rank=process.rank, world=process.world)
    seconds, _ = engine.fit(model, step, train, sampler, data.collate, options=options, name=name, folder=folder, process=process, workers=workers,
                            save_sec=save_sec)
    model.eval()
    right = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad(), engine.autocast(process.device):
        for batch in engine.batches(held_out, fidelity, 64, data.collate, name=f"{name} held out", process=process, workers=workers):
            hits = model(batch["frames"]).argmax(1) == batch["label"]
            right += torch.tensor([hits.sum(), len(hits)])
    right, total = (engine.mean_over_ranks(right.to(process.device)) * process.world).tolist()
    if not total:
        process.say(f"{name}: no held-out clips of these {len(clips[2])} classes, no accuracy")
        return seconds, math.nan
    process.say(f"{name}: top-1 accuracy on {total:.0f} held-out clips of {len(clips[2])} classes: {100 * right / total:.1f} %")
    return seconds, right / total
