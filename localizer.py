"""Put encoder, localization head and video classifier behind one module; train it for a step, and
turn its outputs into detections.

Legend: B videos, C channels, L snippets, T frames a snippet, D durations, K proposals, n classes.
"""

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import bmn
import checkpoint
import data
import evaluate
import gtad
import tsm
from video_encoders import VideoEncoder

HEADS = {"gtad": gtad.GTAD, "bmn": bmn.BMN}


def autocast(device, precision="auto"):
    """Return the context of a forward pass: bfloat16 or float32; auto: bfloat16 on a GPU only."""
    half = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


def build_encoder(name="tsm", *, weights="random", compile=False, **sizes):
    """Return a snippet encoder, frames (B, L, T, 3, H, W) -> features (B, C, L), by name.

    name: "tsm" or one of torchvision's video networks. sizes: arguments of TSM and VideoEncoder;
    depth, shift_div and maxpool are TSM's alone. weights: "random", or see tsm.load_weights.
    """
    if name == "tsm":
        encoder = tsm.TSM(**sizes)
    else:
        tsm_only = ("depth", "shift_div", "maxpool")
        sizes = {key: value for key, value in sizes.items() if key not in tsm_only}
        encoder = VideoEncoder(name, **sizes)
    if weights != "random":
        tsm.load_weights(encoder, weights)
    if compile:
        encoder.compile()
    return encoder


@dataclass
class Distributed:
    """Stand for this process among those of a run, of which there may be one."""

    rank: int
    world_size: int
    device: torch.device
    precision: str = "auto"

    @property
    def is_main(self):
        return self.rank == 0

    @property
    def device_ids(self):
        """Return what DistributedDataParallel wants to know."""
        return [self.device.index] if self.device.type == "cuda" else None

    def autocast(self):
        return autocast(self.device, self.precision)

    @property
    def shard(self):
        return {"rank": self.rank, "world_size": self.world_size}

    @property
    def place(self):
        return {**self.shard, "device": self.device}

    def log(self, *words):
        """Print on the main process; training goes on when nobody reads it any more."""
        if self.is_main:
            try:
                tqdm.write(" ".join(map(str, words)), file=sys.stdout)
                sys.stdout.flush()
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def barrier(self):
        if self.world_size > 1:
            dist.barrier()

    def mean(self, x):
        """Return the mean of a tensor over all processes."""
        if self.world_size > 1:
            x = x.clone()
            dist.all_reduce(x)
            x /= self.world_size
        return x

    def sum(self, x):
        return self.mean(x) * self.world_size

    def mean_of(self, scalars):
        """Return {name: mean over processes} of numbers, in one message and one transfer."""
        values = [torch.as_tensor(x, dtype=torch.float32) for x in scalars.values()]
        packed = torch.stack([x.detach().to(self.device) for x in values])
        return dict(zip(scalars, self.mean(packed).tolist(), strict=True))

    def gather(self, x):
        """Return a list of every process' x, by rank."""
        parts = [x] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(parts, x)
        return parts

    def broadcast(self, x):
        """Overwrite a tensor with the main process' own."""
        if self.world_size > 1:
            dist.broadcast(x, 0)

    def average_gradients(self, model):
        """Average gradients over processes where DDP did not, in one message."""
        if self.world_size > 1:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            mean = self.mean(torch.cat([grad.flatten() for grad in grads]))
            for grad, part in zip(grads, mean.split([g.numel() for g in grads]), strict=True):
                grad.copy_(part.view_as(grad))

    def close(self):
        if self.world_size > 1:
            dist.destroy_process_group()


class Localizer(nn.Module):
    """Chain (encoder ->) head, and a linear video classifier beside it, in one forward for DDP.

    With an encoder it takes frames (stage lofi), without one features (stage head). head, sizes: a
    key of HEADS and its constructor's arguments. classes: names; without any, no classifier.

    The head sees features standardized over snippets, by `mean` and `std`; the classifier sees
    their mean over the video standardized over videos, which differ less than snippets do. Until
    these buffers are set they change nothing.
    """

    def __init__(self, head, sizes, channels, classes=(), encoder=None):
        super().__init__()
        self.encoder = encoder
        self.head = HEADS[head](in_channels=channels, **sizes)
        self.classes = list(classes)
        self.classifier = None
        if self.classes:
            self.classifier = nn.Linear(channels, len(self.classes))
            self.register_buffer("mean", torch.zeros(channels))
            self.register_buffer("std", torch.ones(channels))
            self.register_buffer("video_std", torch.ones(channels))

    def forward(self, x):
        """Map frames (B, L, T, 3, H, W) or features (B, C, L) to the head's outputs and classes.

        Returns start (B, L), end (B, L), map (B, 2, D, L) and class logits (B, n) or None.
        """
        return self.localize(x if self.encoder is None else self.encoder(x))

    def localize(self, x):
        """Do the same for features (B, C, L)."""
        if self.classifier is None:
            return *self.head(x), None
        x = x - self.mean[:, None]
        return *self.head(x / self.std[:, None]), self.classifier(x.mean(2) / self.video_std)

    def proposals(self, start, end, map):
        """Decode outputs to segments (B, K, 2) in [0, 1], scores (B, K) and valid (B, K)."""
        boundary_scores = isinstance(self.head, bmn.BMN)
        return gtad.decode(start, end, map, boundary_scores=boundary_scores)


# ---------------------------------------------------------------------------------------- training


def localization_step(net, batch, generator, *, loss, options, ddp=None):
    """Run forward and backward of one batch, at its own temporal resolution.

    net: a Localizer, or DDP around one. batch: "frames" or "features", "segments" (in [0, 1]), and
    with a classifier "target" (B, n), class distributions. generator: of the loss's random
    subsets, the same on every process. loss: {term of the head: weight}. ddp: None: one process.

    options: class_weight, of the classifier's loss; accumulate, micro-batches to go through one
    after the other; chunk_snippets, see `chunked_backward`. The last two save memory and leave the
    gradient as it is, as the weights of all cells are those of the global batch. Returns
    {term: detached scalar}, "loss" the weighted sum.
    """
    inputs = batch["frames"] if "frames" in batch else batch["features"]
    num_videos, num_snippets = len(inputs), inputs.shape[1 if "frames" in batch else 2]
    model = getattr(net, "module", net)
    durations = getattr(model.head, "durations", None) or num_snippets
    targets = gtad.make_targets(batch["segments"], num_snippets, durations, inputs.device)
    shard = (ddp.rank, ddp.world_size) if ddp else (0, 1)
    weights = gtad.loss_weights(
        targets, generator=generator, shard=shard, reduce=ddp.mean if ddp else None
    )

    def loss_of(outputs, rows):
        *maps, logits = outputs
        part = gtad.Targets(*(t[rows] for t in targets[:3]), targets.valid)
        terms = gtad.losses(*maps, part, gtad.Weights(*(w[rows] for w in weights)))
        total = sum(loss[term] * value for term, value in terms.items())
        if logits is not None:
            log_likelihood = batch["target"][rows] * logits.float().log_softmax(1)
            terms["class"] = -log_likelihood.sum() / num_videos
            total = total + options["class_weight"] * terms["class"]
        return {"loss": total, **terms}

    context = ddp.autocast if ddp else contextlib.nullcontext
    chunk_snippets = options.get("chunk_snippets")
    sums = {}
    for part in torch.arange(num_videos).chunk(options.get("accumulate", 1)):
        rows = slice(part[0], part[-1] + 1)
        part_loss = partial(loss_of, rows=rows)
        if chunk_snippets:
            terms = chunked_backward(model, inputs[rows], chunk_snippets, part_loss, context)
        else:
            # DDP averages gradients over processes in the last backward pass only.
            waits = net is not model and rows.stop < num_videos
            with net.no_sync() if waits else contextlib.nullcontext():
                with context():
                    outputs = net(inputs[rows])
                terms = part_loss(outputs)
                terms["loss"].backward()
        for term, value in terms.items():
            sums[term] = sums.get(term, 0) + value.detach()
    if chunk_snippets and ddp:
        ddp.average_gradients(model)
    return sums


def chunked_backward(model, frames, chunk_snippets, loss_of, context):
    """Run forward and backward within the encoder's memory for `chunk_snippets` snippets.

    With features x = (e(f_1), ..., e(f_m)) of m chunks and head h, the gradient of the loss by the
    encoder's weights w is a sum over chunks, (dloss/dx_k) (de(f_k)/dw). So: all features without
    gradient; forward and backward of the head, which gives dloss/dx; then each chunk once more,
    with its part of dloss/dx. Exact if a snippet's features do not depend on the others', as with
    frozen BatchNorm. Gradients stay local to the process.
    """
    chunks = frames.split(chunk_snippets, dim=1)
    # Dropout and stochastic depth have to draw the same in both passes over a chunk.
    seeds = torch.randint(2**62, (len(chunks),)).tolist()

    def encode(k):
        torch.manual_seed(seeds[k])
        return model.encoder(chunks[k])

    with context():
        with torch.no_grad():
            features = torch.cat([encode(k) for k in range(len(chunks))], dim=2)
        features.requires_grad_()
        outputs = model.localize(features)
    terms = loss_of(outputs)
    terms["loss"].backward()
    for k, gradient in enumerate(features.grad.split(chunk_snippets, dim=2)):
        with context():
            again = encode(k)
        again.backward(gradient)
    return terms


# ---------------------------------------------------------------------------------------- features


@torch.no_grad()
def extract_features(encoder, frames, chunk_snippets, context=contextlib.nullcontext):
    """Encode frames (B, L, T, 3, H, W) to features (B, C, L) float32, some snippets at once."""
    with context():
        chunks = [encoder(chunk).float() for chunk in frames.split(chunk_snippets, dim=1)]
    return torch.cat(chunks, dim=2)


def write_features(datasets, encode, folder, workers, ddp):
    """Write features (L, C) of the videos that have none yet, each rank its share.

    encode: frames (1, L, T, 3, H, W) or features (1, C, L) -> features (1, C, L); long videos come
    in pieces, one after the other. Returns the seconds that it took, with those of earlier starts.
    """
    stopwatch = checkpoint.Stopwatch(f"{folder}/seconds.json", write=ddp.is_main)
    for dataset in datasets:
        paths = [f"{folder}/{video.name}.npy" for video in dataset.videos]
        missing = [i for i, path in enumerate(paths) if not os.path.exists(path)]
        ddp.barrier()  # every rank has looked before any writes
        fidelity = getattr(dataset, "full", data.NATIVE)
        options = {"workers": workers, "title": f"{os.path.basename(folder)}"}
        parts = []
        for batch in data.iterate(dataset.subset(missing), fidelity, 1, **options, **ddp.place):
            x = encode(batch["frames"] if "frames" in batch else batch["features"])
            parts.append(x[0].t().cpu())
            if batch.get("last", True):
                x = torch.cat(parts).numpy()
                path = f"{folder}/{batch['name'][0]}.npy"
                checkpoint.write_atomic(path, partial(np.save, arr=x, allow_pickle=False))
                stopwatch.save()
                parts = []
    ddp.barrier()
    return stopwatch.save()


def recalibrate(encoder, dataset, workers, ddp, chunk_snippets, max_videos=1000):
    """Estimate the running statistics of an encoder's BatchNorm anew at full fidelity.

    Over at most so many evenly picked videos of a VideoDataset, the same on all processes. About
    chunk_snippets are encoded at once, taken from all over four videos (of one, where videos
    differ in length), so that each piece is much like the whole. Returns the seconds it took.
    """
    started = time.monotonic()
    count = len(dataset.videos)
    picked = np.linspace(0, count - 1, min(count, max_videos)).round().astype(int).tolist()
    batch_size = 1 if dataset.rate else 4
    batches = data.iterate(
        dataset.subset(picked), dataset.full, batch_size, workers=workers, **ddp.place
    )

    def pieces():
        for batch in batches:
            B, L = batch["frames"].shape[:2]
            step = min(-(-B * L // chunk_snippets), L)
            for first in range(step):
                yield batch["frames"][:, first::step]

    with ddp.autocast():
        tsm.recalibrate_batchnorm(encoder, pieces(), ddp.mean)
    return time.monotonic() - started


# --------------------------------------------------------------------------------------- detection


@torch.no_grad()
def propose(model, features, windows=None, at_once=16):
    """Return proposals of each video and its class probabilities.

    features (B, C, L) -> segments (B, K, 2) in [0, 1], scores (B, K), valid (B, K), classes (B, n).
    windows: (first (B,), num_snippets), where features are B windows of one long video of
    `num_snippets` snippets that begin at the snippets `first`: then all windows' proposals, as
    fractions of the video, in a batch of one, and the mean of their class probabilities.
    """
    if windows is None:
        *outputs, logits = model(features)
        return *model.proposals(*outputs), logits.softmax(1)
    first, num_snippets = windows
    parts = []
    for x, start in zip(features.split(at_once), first.split(at_once), strict=True):
        *outputs, logits = model(x)
        segments, scores, valid = model.proposals(*outputs)
        segments = (start[:, None, None] + segments * x.shape[2]) / num_snippets
        valid = valid & (segments[..., 0] < 1)  # the last window may go beyond the video
        segments = segments.clamp(max=1).flatten(0, 1)
        parts.append((segments, scores.flatten(), valid.flatten(), logits.softmax(1)))
    *proposals, classes = (torch.cat(part)[None] for part in zip(*parts, strict=True))
    return *proposals, classes.mean(1)


def predict(
    model, features, videos, *, sigma, top_k, classes_per_video, class_scores=None, windows=None
):
    """Return detections and class-agnostic proposals of videos, in seconds.

    features (B, C, L). videos: B pairs (name, duration_sec). sigma, top_k: of soft-NMS.
    class_scores: (scores (B, n), n names) from elsewhere, in place of the model's own classifier.
    windows: see `propose`. Both results are {video: [{"label", "score", "segment"}]}, best first,
    proposals without labels.
    """
    *proposals, probabilities = propose(model, features, windows)
    kept = evaluate.soft_nms(*proposals, sigma=sigma, top_k=top_k)
    names = [name for name, _ in videos]
    durations = [duration for _, duration in videos]
    scores, labels = class_scores or (probabilities, model.classes)
    detections = evaluate.fuse_classes(
        *kept, names, durations, scores, labels, top_k=classes_per_video
    )
    single = np.ones((len(names), 1))
    agnostic = evaluate.fuse_classes(*kept, names, durations, single, [""])
    for found in agnostic.values():
        for proposal in found:
            del proposal["label"]
    return detections, agnostic


class Results(NamedTuple):
    """Detections and class-agnostic proposals, {video: [{"label", "score", "segment"}]}."""

    detections: dict
    proposals: dict


def detect(model, dataset, fidelity, options, class_scores, ddp):
    """Return the Results of a whole data set of features, each rank its share, all on every rank.

    options: sigma, top_k and classes_per_video of `predict`. class_scores: None, or scores (V, n)
    of the data set's videos and n names.
    """
    rows = {video.name: i for i, video in enumerate(dataset.videos)}
    durations = {video.name: video.duration for video in dataset.videos}
    keys = ("sigma", "top_k", "classes_per_video")
    options = {key: options[key] for key in keys}
    windows = isinstance(dataset, data.WindowDataset)
    found = {}
    batches = data.iterate(dataset, fidelity, 1 if windows else 32, title="detect", **ddp.place)
    for batch in batches:
        names, x = batch["name"], batch["features"]
        videos = [(name, durations[name]) for name in names]
        own_scores = None
        if class_scores:
            own_scores = class_scores[0][[rows[name] for name in names]], class_scores[1]
        place = (batch["first"][0], batch["snippets"].item()) if windows else None
        x = x[0] if windows else x
        parts = predict(model, x, videos, **options, class_scores=own_scores, windows=place)
        found |= {name: tuple(part[name] for part in parts) for name in names}
    merged = {}
    for part in ddp.gather(found):
        merged |= part
    # One order of videos, however many ranks.
    return Results(*({name: merged[name][k] for name in rows} for k in range(2)))
