"""Put encoder, localization head and video classifier behind one module; train it for a step, and
turn its outputs into detections.

Legend: B videos, C channels, L snippets, T frames a snippet, D durations, K proposals, n classes.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
import uuid
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

import bmn
import checkpoint
import data
import evaluate
import gtad
import tsm
from media import InputError
from video_encoders import VideoEncoder

HEADS = {"gtad": gtad.GTAD, "bmn": bmn.BMN}
GROUPS = {"gtad": "stem_groups", "bmn": "groups"}  # of the convolution that sees the features


def build_encoder(name="tsm", *, weights="random", compile=False, **sizes):
    """Return a snippet encoder, frames (B, L, T, 3, H, W) -> features (B, C, L), by name.

    name: "tsm" or one of torchvision's video networks. sizes: arguments of TSM and VideoEncoder;
    depth, shift_div and maxpool are TSM's alone. weights: "random", or see tsm.load_weights.
    """
    if name != "tsm":
        tsm_only = ("depth", "shift_div", "maxpool")
        sizes = {key: value for key, value in sizes.items() if key not in tsm_only}
    encoder = tsm.TSM(**sizes) if name == "tsm" else VideoEncoder(name, **sizes)
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
    def place(self):
        return {"rank": self.rank, "world_size": self.world_size, "device": self.device}

    def autocast(self):
        """Return the context of a forward pass; precision auto: bfloat16 on a GPU, else float32."""
        kind = self.device.type
        half = self.precision == "bfloat16" or (self.precision, kind) == ("auto", "cuda")
        return torch.autocast(kind, torch.bfloat16, enabled=half)

    def log(self, message):
        """Print on the main process; training goes on when nobody reads it any more."""
        if self.is_main:
            try:
                tqdm.write(message)
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


def fresh_group(timeout_sec=600):
    """Return store, rank and world size of torchrun's group: the part of its store that the
    processes of this very start share.

    torchrun's restart counts do not tell: nodes count differently. So the main process makes up a
    word, and the others ask for it under words of their own: an answer to a dead process is lost.
    """
    if sys.platform == "linux":
        # End with torchrun, should that alone be killed: 1 is PR_SET_PDEATHSIG.
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    store, rank, world_size = next(dist.rendezvous("env://"))
    word = uuid.uuid4().hex
    missing, deadline = set(range(1, world_size)), time.monotonic() + timeout_sec
    if rank:
        store.set(f"asks/{rank}", word)
        word = store.get(f"answer/{word}").decode()
        store.set(f"heard/{word}/{rank}", "")
        missing = set()
    while missing:
        for other in sorted(missing):
            if store.check([f"asks/{other}"]):  # perhaps a dead one's: then it is asked anew
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", word)
            if store.check([f"heard/{word}/{other}"]):
                missing.remove(other)
        if time.monotonic() > deadline:
            raise InputError(f"processes {sorted(missing)} of {world_size} have not joined in time")
        time.sleep(0.01)
    return {"store": dist.PrefixStore(word, store), "rank": rank, "world_size": world_size}


class Localizer(nn.Module):
    """Chain (encoder ->) head, and a linear video classifier beside it, in one forward for DDP.

    encoder: for frames (stage lofi); features need none (stage head). head, sizes: a key of HEADS
    and its constructor's arguments. classes: names; without any, no classifier.

    The head sees features standardized over snippets, by `mean` and `std`; the classifier sees
    their mean over the video standardized over videos, which differ less than snippets do. Until
    these buffers are set they change nothing.
    """

    def __init__(self, head, sizes, channels, classes=(), encoder=None):
        super().__init__()
        self.encoder = encoder
        try:
            self.head = HEADS[head](in_channels=channels, **sizes)
        except ValueError as error:
            words = f"{head} does not fit features of {channels} channels: {error}"
            raise InputError(f"{words}; set {head}.{GROUPS[head]} to a divisor of that") from None
        self.classes = list(classes)
        self.classifier = None
        if classes:
            self.classifier = nn.Linear(channels, len(classes))
            self.register_buffer("mean", torch.zeros(channels))
            self.register_buffer("std", torch.ones(channels))
            self.register_buffer("video_std", torch.ones(channels))

    @classmethod
    def load(cls, path, head, sizes, channels):
        """Return the model that stage head saved, and what it saved beside."""
        saved = {"seconds": 0.0, "trained_on": None} | tsm.load_state(path)
        try:
            model = cls(head, sizes, channels, saved["classes"])
            model.load_state_dict(saved["model"])
        except checkpoint.DAMAGE as error:
            words = f"{path} is not a {head} of the config's sizes for {channels} channels"
            raise InputError(f"{words} ({' '.join(str(error).split())[:300]})") from None
        return model, saved

    def forward(self, x):
        """Map frames (B, L, T, 3, H, W) or features (B, C, L) to the head's outputs and classes.

        Returns start (B, L), end (B, L), map (B, 2, D, L) and class logits (B, n) or None.
        """
        if x.ndim == 6:
            x = self.encoder(x)
        if self.classifier is None:
            return *self.head(x), None
        x = x - self.mean[:, None]
        return *self.head(x / self.std[:, None]), self.classifier(x.mean(2) / self.video_std)

    def proposals(self, x):
        """Return segments (B, K, 2) in [0, 1], scores (B, K), valid (B, K), classes (B, n)."""
        *outputs, logits = self(x)
        boundary_scores = isinstance(self.head, bmn.BMN)
        return *gtad.decode(*outputs, boundary_scores=boundary_scores), logits.softmax(1)


def localization_step(net, batch, generator, *, loss, options, ddp):
    """Run forward and backward of one batch, at its own temporal resolution.

    net: a Localizer, or DDP around one. batch: "frames" or "features", "segments" (in [0, 1]), and
    with a classifier "target" (B, n), class distributions. generator: of the loss's random
    subsets, the same on every process. loss: {term of the head: weight}. options: class_weight, of
    the classifier's loss; accumulate, micro-batches to go through one after the other;
    chunk_snippets, see `chunked_backward`. The last two save memory and leave the gradient as it
    is, as the weights of all cells are those of the global batch. Returns {term: detached scalar},
    "loss" the weighted sum.
    """
    inputs = batch.get("frames", batch.get("features"))
    num_videos, num_snippets = len(inputs), inputs.shape[1 if inputs.ndim == 6 else 2]
    model = getattr(net, "module", net)
    durations = getattr(model.head, "durations", None)
    targets = gtad.make_targets(batch["segments"], num_snippets, durations, inputs.device)
    ranks = {"shard": (ddp.rank, ddp.world_size), "reduce": ddp.mean}
    weights = gtad.loss_weights(targets, generator=generator, **ranks)

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

    chunk_snippets = options.get("chunk_snippets")
    sums = {}
    for part in torch.arange(num_videos).chunk(options.get("accumulate", 1)):
        rows = slice(part[0], part[-1] + 1)
        part_loss = partial(loss_of, rows=rows)
        if chunk_snippets:
            terms = chunked_backward(model, inputs[rows], chunk_snippets, part_loss, ddp.autocast)
        else:
            # DDP averages gradients over processes in the last backward pass only.
            waits = net is not model and rows.stop < num_videos
            with net.no_sync() if waits else contextlib.nullcontext():
                with ddp.autocast():
                    outputs = net(inputs[rows])
                terms = part_loss(outputs)
                terms["loss"].backward()
        for term, value in terms.items():
            sums[term] = sums.get(term, 0) + value.detach()
    if chunk_snippets:
        average_gradients(model, ddp)
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
        outputs = model(features)
    terms = loss_of(outputs)
    terms["loss"].backward()
    for k, gradient in enumerate(features.grad.split(chunk_snippets, dim=2)):
        with context():
            again = encode(k)
        again.backward(gradient)
    return terms


def average_gradients(model, ddp):
    """Average gradients over processes where DDP did not, in one message."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if ddp.world_size > 1:
        mean = ddp.mean(torch.cat([grad.flatten() for grad in grads]))
        for grad, part in zip(grads, mean.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))


class GlobalBatchNorm(nn.SyncBatchNorm):
    """Normalise by the statistics of all processes' batch in training: torch's is for GPUs only."""

    def forward(self, x):
        if x.is_cuda or not self.training:
            return super().forward(x)
        var, mean = (s.double() for s in torch.var_mean(x.float(), [0, *range(2, x.ndim)]))
        count = x.numel() // len(mean)
        own = torch.stack([mean, var * (1 - 1 / count) + mean.square()])
        moments = own + (self.ddp.mean(own.detach()) - own.detach())
        if moments.requires_grad:  # the losses of other processes depend on them, too
            moments.register_hook(self.ddp.mean)
        mean, square = moments
        var = square - mean.square()
        unbiased = var / (1 - 1 / (count * self.ddp.world_size))
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.float(), self.momentum)
            self.running_var.lerp_(unbiased.float(), self.momentum)
        scale = self.weight / (var + self.eps).sqrt()
        affine = torch.stack([scale, self.bias - mean * scale]).float()
        scale, shift = affine.view(2, -1, *[1] * (x.ndim - 2))
        return (x * scale + shift).to(x.dtype)


@contextlib.contextmanager
def global_batchnorm(model, ddp):
    """Make BatchNorm independent of the number of processes within a `with` block."""
    kinds = {m: type(m) for m in model.modules() if isinstance(m, _BatchNorm)}
    for m in kinds if ddp.world_size > 1 else ():
        m.__class__, m.ddp, m.process_group = GlobalBatchNorm, ddp, None
    try:
        yield
    finally:
        for m, kind in kinds.items():
            m.__class__ = kind


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
    options = {"workers": workers, "title": os.path.basename(folder), **ddp.place}
    for dataset in datasets:
        paths = [f"{folder}/{video.name}.npy" for video in dataset.videos]
        missing = [i for i, path in enumerate(paths) if not os.path.exists(path)]
        ddp.barrier()  # every rank has looked before any writes
        fidelity = getattr(dataset, "full", data.NATIVE)
        parts = []
        for batch in data.iterate(dataset.subset(missing), fidelity, 1, **options):
            x = encode(batch.get("frames", batch.get("features")))
            parts.append(x[0].t().cpu())
            if not parts[-1].isfinite().all():
                name = batch["name"][0]
                raise InputError(f"the encoder gives NaN or infinite features for video {name}")
            if batch.get("last", True):
                save = partial(np.save, arr=torch.cat(parts).numpy(), allow_pickle=False)
                checkpoint.write_atomic(f"{folder}/{batch['name'][0]}.npy", save)
                stopwatch.save()
                parts = []
    ddp.barrier()
    return stopwatch.save()


def recalibrate(encoder, dataset, workers, ddp, chunk_snippets):
    """Estimate the running statistics of an encoder's BatchNorm anew at full fidelity.

    Over at most 1000 evenly picked videos of a VideoDataset, the same on all processes. About
    chunk_snippets are encoded at once, taken from all over four videos (of one, where videos
    differ in length), so that each piece is much like the whole. Returns the seconds it took.
    """
    started = time.monotonic()
    count = len(dataset.videos)
    videos = dataset.subset(np.linspace(0, count - 1, min(count, 1000)).round().astype(int))
    size = 1 if dataset.rate else 4

    def pieces():
        for batch in data.iterate(videos, dataset.full, size, workers=workers, **ddp.place):
            B, L = batch["frames"].shape[:2]
            step = min(-(-B * L // chunk_snippets), L)
            for first in range(step):
                yield batch["frames"][:, first::step]

    with ddp.autocast():
        tsm.recalibrate_batchnorm(encoder, pieces(), ddp.mean)
    return time.monotonic() - started


@torch.no_grad()
def propose(model, features, windows=None, at_once=16):
    """Return proposals and class probabilities of features (B, C, L): see Localizer.proposals.

    windows: (first (B,), num_snippets), where features are B windows of one long video of
    `num_snippets` snippets that begin at the snippets `first`: then all windows' proposals, as
    fractions of the video, in a batch of one, and the mean of their class probabilities.
    """
    if windows is None:
        return model.proposals(features)
    first, num_snippets = windows
    parts = []
    for x, start in zip(features.split(at_once), first.split(at_once), strict=True):
        segments, scores, valid, classes = model.proposals(x)
        segments = (start[:, None, None] + segments * x.shape[2]) / num_snippets
        valid = valid & (segments[..., 0] < 1)  # the last window may go beyond the video
        segments = segments.clamp(max=1).flatten(0, 1)
        parts.append((segments, scores.flatten(), valid.flatten(), classes))
    *proposals, classes = (torch.cat(part)[None] for part in zip(*parts, strict=True))
    return *proposals, classes.mean(1)


def predict(model, features, names, durations, options, class_scores=None, windows=None):
    """Return detections and class-agnostic proposals of B videos with their durations in seconds.

    features (B, C, L). options: sigma and top_k of soft-NMS, classes_per_video. class_scores:
    (scores (B, n), n names) in place of the model's classifier. windows: see `propose`. Both
    results are {video: [{"label", "score", "segment"}]}, best first, proposals without labels.
    """
    *proposals, probabilities = propose(model, features, windows)
    kept = evaluate.soft_nms(*proposals, sigma=options["sigma"], top_k=options["top_k"])
    scores, labels = class_scores or (probabilities, model.classes)
    most = options["classes_per_video"]
    detections = evaluate.fuse_classes(*kept, names, durations, scores, labels, top_k=most)
    agnostic = evaluate.fuse_classes(*kept, names, durations, np.ones((len(names), 1)), [""])
    for proposal in chain.from_iterable(agnostic.values()):
        del proposal["label"]
    return detections, agnostic


def detect(model, dataset, fidelity, options, class_scores, ddp):
    """Return what `predict` does for a data set of features, each rank its share, on every rank.

    options: see `predict`. class_scores: None, or scores (V, n) of its V videos and n names.
    """
    rows = {video.name: i for i, video in enumerate(dataset.videos)}
    in_windows = isinstance(dataset, data.WindowDataset)
    size = 1 if in_windows else 32
    found = {}
    for batch in data.iterate(dataset, fidelity, size, title="detect", **ddp.place):
        x = batch["features"]
        windows = None
        if in_windows:
            x, windows = x[0], (batch["first"][0], batch["snippets"].item())
        names = batch["name"]
        own = [rows[name] for name in names]
        durations = [dataset.videos[i].duration for i in own]
        scores = class_scores and (class_scores[0][own], class_scores[1])
        results = predict(model, x, names, durations, options, scores, windows)
        found |= {name: (results[0][name], results[1][name]) for name in names}
    for part in ddp.gather(found):
        found |= part
    # One order of videos, however many ranks.
    return {name: found[name][0] for name in rows}, {name: found[name][1] for name in rows}
