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
from datetime import timedelta
from functools import partial
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
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
    # Killed before that line, it took along its store, which is there before its processes are.
    most = 30 if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else timeout_sec
    reach = timedelta(seconds=min(timeout_sec, most))  # torch tries twice
    store, rank, world_size = next(dist.rendezvous("env://", timeout=reach))
    store.set_timeout(timedelta(seconds=timeout_sec))
    word = uuid.uuid4().hex
    missing, deadline = set(range(1, world_size)), time.monotonic() + timeout_sec
    if rank:
        store.set(f"asks/{rank}", word)
        word = store.get(f"answer/{word}").decode()
        store.set(f"heard/{word}/{rank}", "")
    while missing and not rank:
        for other in sorted(missing):
            if store.check([f"asks/{other}"]):  # perhaps a dead one's: then it is asked anew
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", word)
            if store.check([f"heard/{word}/{other}"]):
                missing.remove(other)
        if time.monotonic() > deadline:
            raise InputError(f"processes {sorted(missing)} of {world_size} have not joined in time")
        time.sleep(0.01)
    return {"store": dist.PrefixStore(word, store), "rank": rank, "world_size": world_size}


class SnippetClassifier(nn.Module):
    """Classify snippets: features (B, C, L) -> logits (B, n + 1, L), the last those of background.

    Between 1x1 convolutions are residual ones with dilation 1, 2, 4, ... (MS-TCN, Farha and Gall,
    CVPR 2019). The logits of a span, of any length, are their mean over it: see `span_means`.
    members: so many such networks side by side, whose logits are averaged, after so little data
    that they differ. In training each has its own: (B, members, n + 1, L).
    """

    def __init__(self, channels, num_classes, width=64, layers=5, dropout=0.3, members=1):
        super().__init__()
        self.members = members
        conv = partial(nn.Conv1d, groups=members)
        total = members * width
        self.first = nn.Conv1d(channels, total, 1)
        self.layers = nn.ModuleList()
        for dilation in (2**k for k in range(layers)):
            wide = conv(total, total, 3, padding=dilation, dilation=dilation)
            mix = conv(total, total, 1)
            self.layers.append(nn.Sequential(wide, nn.ReLU(), mix, nn.Dropout(dropout)))
        self.last = conv(total, members * (num_classes + 1), 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        x = self.last(x).unflatten(1, (self.members, -1))
        return x if self.training else x.mean(1)


def span_means(x: Tensor, spans: Tensor) -> Tensor:
    """Return the means of x (B, n, L) over spans (B, K, 2), fractions of the video: (B, n, K).

    x is constant over each snippet, and 0 before and after the video, where spans may lie.
    """
    L = x.shape[2]
    total = F.pad(x.double().cumsum(2), (1, 0))  # (B, n, L + 1), up to each snippet's start
    ends = (spans.double() * L).clamp(0, L)
    snippet = ends.long().clamp(max=L - 1)
    sums = []
    for end, index in zip(ends.unbind(2), snippet.unbind(2), strict=True):  # (B, K)
        columns = index[:, None].expand(-1, x.shape[1], -1)
        sums.append(total.gather(2, columns) + (end - index)[:, None] * x.gather(2, columns))
    length = (spans[:, :, 1] - spans[:, :, 0]).double() * L
    return ((sums[1] - sums[0]) / length.clamp_min(1e-6)[:, None]).to(x.dtype)


def segment_probabilities(logits: Tensor, segments: Tensor) -> Tensor:
    """Return how much more probable each class is in a segment than beside it: (B, K, n).

    logits: (B, n + 1, L), of a SnippetClassifier. segments: (B, K, 2), fractions of the video.
    From the softmax of a segment's mean logits the mean probability in its two flanks is
    subtracted, each a quarter of its length, and what is below 0 is 0. So a part of an action has
    less than all of it, and what spans two actions has little of both.
    """
    inside = span_means(logits, segments).softmax(1)
    flank = (segments[:, :, 1] - segments[:, :, 0]) / 4
    outside = [segments[:, :, 0] - flank, *segments.unbind(2), segments[:, :, 1] + flank]
    spans = torch.stack(outside, 2).unflatten(2, (2, 2))  # (B, K, before and after, 2)
    beside = span_means(logits.softmax(1), spans.flatten(1, 2)).unflatten(2, (-1, 2)).mean(3)
    return (inside - beside).relu()[:, :-1].transpose(1, 2)


def training_spans(segments: Tensor, labels: Tensor, background: int, generator) -> tuple:
    """Return spans (S, 2) of a video to train a SnippetClassifier on, and their classes (S,).

    They are the video's segments (N, 2) with labels (N,), their ends moved by up to a tenth of the
    length, and as many random spans, one at least, that overlap none by a tIoU of 0.3: background.
    """
    shift = 0.2 * torch.rand(segments.shape, generator=generator) - 0.1
    moved = segments + shift * (segments[:, 1:] - segments[:, :1])
    spans = torch.rand(50 * (len(segments) + 1), 2, generator=generator).sort(1).values
    overlaps = evaluate.tiou(spans, segments)
    spans = spans[(overlaps < 0.3).all(1)][: max(len(segments), 1)]
    classes = torch.cat([labels, labels.new_full((len(spans),), background)])
    return torch.cat([moved, spans]), classes


class Localizer(nn.Module):
    """Chain (encoder ->) head, and a classifier beside it, in one forward for DDP.

    encoder: for frames (stage lofi); features need none (stage head). head, sizes: a key of HEADS
    and its constructor's arguments. classes: names; without any, no classifier. per_segment: None,
    a linear classifier of the mean over the video, or the sizes of a SnippetClassifier.

    All see features standardized over snippets, by `mean` and `std`, but a video's mean is
    standardized over videos, which differ less than snippets do. Until these buffers are set they
    change nothing.
    """

    def __init__(self, head, sizes, channels, classes=(), encoder=None, per_segment=None):
        super().__init__()
        self.per_segment = per_segment is not None
        self.encoder = encoder
        self.head = HEADS[head](in_channels=channels, **sizes)
        self.classes = list(classes)
        self.classifier = None
        if classes:
            self.classifier = nn.Linear(channels, len(classes))
            if self.per_segment:
                self.classifier = SnippetClassifier(channels, len(classes), **per_segment)
            self.register_buffer("mean", torch.zeros(channels))
            self.register_buffer("std", torch.ones(channels))
            self.register_buffer("video_std", torch.ones(channels))

    @classmethod
    def load(cls, path, head, sizes, channels, per_segment=None):
        """Return the model that stage head saved, and what it saved beside."""
        saved = {"seconds": 0.0, "trained_on": None} | tsm.load_state(path)
        try:
            names = [name + "" for name in saved["classes"]]  # a TypeError unless they are text
            model = cls(head, sizes, channels, names, per_segment=per_segment)
            model.load_state_dict(saved["model"])
        except checkpoint.DAMAGE as error:
            words = f"{path} is not a {head} of the config's sizes for {channels} channels"
            raise InputError(f"{words} ({' '.join(str(error).split())[:300]})") from None
        return model, saved

    def forward(self, x):
        """Map frames (B, L, T, 3, H, W) or features (B, C, L) to the head's outputs and classes.

        Returns start (B, L), end (B, L), map (B, 2, D, L) and None or the classes' logits, (B, n)
        of videos or (B, n + 1, L) of snippets, in training those of each member.
        """
        if x.ndim == 6:
            x = self.encoder(x)
        if self.classifier is None:
            return *self.head(x), None
        return *self.head((x - self.mean[:, None]) / self.std[:, None]), self.classify(x)

    def classify(self, x):
        """Return the logits of features (B, C, L), as `forward` does."""
        x = x - self.mean[:, None]
        if self.per_segment:
            return self.classifier(x / self.std[:, None])
        return self.classifier(x.mean(2) / self.video_std)

    def proposals(self, x):
        """Return segments (B, K, 2) in [0, 1], scores (B, K), valid (B, K), and the logits."""
        *outputs, logits = self(x)
        if not all(output.isfinite().all() for output in outputs):
            raise InputError("the head gives NaN or infinity: weights or features are damaged")
        return *self.head.decode(*outputs), logits


def localization_step(net, batch, generator, *, loss, options, ddp):
    """Run forward and backward of one batch, at its own temporal resolution.

    net: a Localizer, or DDP around one. batch: "frames" or "features", "segments" (in [0, 1]), and
    with a classifier "labels" or "target" of data.targets_of. generator: of the loss's random
    subsets, the same on every process. loss: {term of the head: weight}. options: class_weight, of
    the classifier's loss; accumulate, micro-batches to go through one after the other;
    chunk_snippets, see `chunked_backward`. The last two save memory and leave the gradient as it
    is, as the weights of all cells are those of the global batch. Returns {term: detached scalar},
    "loss" the weighted sum.
    """
    inputs = batch.get("frames", batch.get("features"))
    num_videos, num_snippets = len(inputs), inputs.shape[1 if inputs.ndim == 6 else 2]
    model = getattr(net, "module", net)
    targets = model.head.make_targets(batch["segments"], num_snippets, inputs.device)
    ranks = {"shard": (ddp.rank, ddp.world_size), "reduce": ddp.mean}
    weights = gtad.loss_weights(targets, generator=generator, **ranks)
    spans = ()
    if model.per_segment and model.classes:
        spans = draw_spans(batch, len(model.classes), generator, ddp.rank)

    def loss_of(outputs, rows):
        *maps, logits = outputs
        part = gtad.Targets(*(t[rows] for t in targets[:3]), targets.valid)
        terms = gtad.losses(*maps, part, gtad.Weights(*(w[rows] for w in weights)))
        total = sum(loss[term] * value for term, value in terms.items())
        if logits is not None:
            sum_of_losses = class_loss(logits.float(), batch["target"][rows], spans[rows])
            terms["class"] = sum_of_losses / num_videos
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


def draw_spans(batch, background, generator, rank):
    """Return the training_spans of each video, the same on however many ranks a batch is."""
    seed = int(torch.randint(2**62, (), generator=generator))
    first = rank * len(batch["segments"])
    spans = []
    for i, actions in enumerate(zip(batch["segments"], batch["labels"], strict=True)):
        own = torch.Generator().manual_seed(data.seed_of(seed, first + i))
        spans.append(training_spans(*actions, background, own))
    return spans


def class_loss(logits, target, spans):
    """Return the cross-entropy of classes, summed over videos.

    logits: (B, n), with target (B, n), or (B, members, n + 1, L), with spans of each video and
    their classes, over which it is a mean, as over members.
    """
    if logits.ndim == 2:
        return -(target * logits.log_softmax(1)).sum()
    losses = []
    for x, (segments, classes) in zip(logits, spans, strict=True):
        means = span_means(x, segments.to(x.device).expand(len(x), -1, -1))
        losses.append(F.cross_entropy(means, classes.to(x.device).expand(len(x), -1)))
    return torch.stack(losses).sum()


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
        dims = [0, *range(2, x.ndim)]
        var, mean = torch.var_mean(x.float(), dims, correction=0)
        own = torch.stack([mean.double(), var.double() + mean.double().square()])
        # Of all processes in value, of this one in gradient.
        moments = own + (self.ddp.mean(own.detach()) - own.detach())
        if moments.requires_grad:
            moments.register_hook(self.ddp.mean)  # other processes' losses depend on them, too
        mean, square = moments
        var = square - mean.square()
        count = self.ddp.world_size * x.numel() // len(mean)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.float(), self.momentum)
            self.running_var.lerp_(var.float() * count / (count - 1), self.momentum)
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
                words = f"{folder}: NaN or infinite features for video {batch['name'][0]}"
                raise InputError(f"{words}: remove the encoder.pt or sola.pt, use a smaller lr")
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
def propose(model, features, window=None, at_once=16, nms=None):
    """Return proposals of features (B, C, L), see Localizer.proposals, and what tells their
    classes: probabilities of each video, (B, n), or logits of each snippet, (B, n + 1, L).

    window: snippets of the windows into which a long video, a batch of one, is cut for the head:
    then the proposals are those of all windows, as fractions of the video, and the probabilities of
    its classes their mean. nms: of proposals, for those of each window.
    """
    if window is None:
        *proposals, logits = model.proposals(features)
        return *proposals, logits if model.per_segment else logits.softmax(1)
    windows, first = data.cut_windows(features[0], window)
    num_snippets = features.shape[2]
    parts = []
    for x, start in zip(windows.split(at_once), first.split(at_once), strict=True):
        segments, scores, valid, logits = model.proposals(x)
        segments = (start[:, None, None] + segments * window) / num_snippets
        valid = valid & (segments[..., 0] < 1)  # the last window may go beyond the video
        found = (segments.clamp(max=1), scores, valid)
        found = nms(*found) if nms else found
        parts.append((*(x.flatten(0, 1) for x in found), logits.softmax(1)))
    *proposals, classes = (torch.cat(part)[None] for part in zip(*parts, strict=True))
    if model.per_segment:
        # Of the whole video: beside a segment lies what another window may show.
        return *proposals, model.classify(features)
    return *proposals, classes.mean(1)


def predict(model, features, names, durations, options, class_scores=None, window=None):
    """Return detections and class-agnostic proposals of B videos with their durations in seconds.

    features (B, C, L). options: those of the config's block detect. class_scores:
    (scores (B, n), n names) in place of the model's classifier. window: see `propose`. The score
    of a segment's class is its proposal's score ** confidence_power times its probability. Both
    results are {video: [{"label", "score", "segment"}]}, best first, proposals without labels.
    """
    nms_options = ("sigma", "top_k", "decay", "decay_above", "min_score")
    nms = partial(evaluate.soft_nms, **{name: options[name] for name in nms_options})
    of_windows = nms if options["window_nms"] else None
    segments, confidence, valid, classes = propose(model, features, window, nms=of_windows)
    if options["voting"]:
        nms = partial(evaluate.vote, nms, threshold=options["voting"])
    kept = agnostic = nms(segments, confidence, valid)
    scores, labels = class_scores or (classes, model.classes)
    most = options["classes_per_video"]
    per_segment = model.per_segment and class_scores is None
    if per_segment:
        confidence = confidence ** options["confidence_power"]
        scores = segment_probabilities(classes, segments)
    if options["class_wise"]:
        scores = torch.as_tensor(scores).to(confidence)
        *kept, scores = evaluate.class_wise(nms, segments, confidence, valid, scores, top_k=most)
        most = 1
    elif per_segment:
        # Proposals compete with the score of their best class, and share that out to the others.
        kept = nms(segments, confidence * scores.amax(2), valid)
        scores = segment_probabilities(classes, kept[0])
        scores = scores / scores.amax(2, keepdim=True).clamp_min(1e-12)
    detections = evaluate.fuse_classes(*kept, names, durations, scores, labels, top_k=most)
    agnostic = evaluate.fuse_classes(*agnostic, names, durations, np.ones((len(names), 1)), [""])
    for proposal in chain.from_iterable(agnostic.values()):
        del proposal["label"]
    return detections, agnostic


def detect(model, dataset, full, options, class_scores, ddp):
    """Return what `predict` does for a data set of features, each rank its share, on every rank.

    full: the Fidelity of the head. options: see `predict`, and windows, whether the head sees
    windows of so many snippets. class_scores: None, or scores (V, n) of its V videos and n names.
    """
    rows = {video.name: i for i, video in enumerate(dataset.videos)}
    how = {"fidelity": full, "batch_size": 32}
    window = None
    if options["windows"]:
        how = {"fidelity": data.NATIVE, "batch_size": 1}
        window = full.snippets
    found = {}
    for batch in data.iterate(dataset, **how, title="detect", **ddp.place):
        names = batch["name"]
        own = [rows[name] for name in names]
        durations = [dataset.videos[i].duration for i in own]
        scores = class_scores and (class_scores[0][own], class_scores[1])
        results = predict(model, batch["features"], names, durations, options, scores, window)
        found |= {name: (results[0][name], results[1][name]) for name in names}
    for part in ddp.gather(found):
        found |= part
    # One order of videos, however many ranks.
    return {name: found[name][0] for name in rows}, {name: found[name][1] for name in rows}
