"""Encoder, localization head and video classifier behind one module; one step of training it, and its detections."""
import contextlib
import time
from functools import partial

import numpy as np
import torch
from torch import nn

import config
import data
import engine
import evaluate
import gtad
from bmn import BMN
from tsm import recalibrate_batchnorm

HEADS = {"gtad": gtad.GTAD, "bmn": BMN}


class Localizer(nn.Module):
    """(encoder) -> head (, linear video classifier on the mean feature), behind one forward for DDP.

    With an encoder it takes frames (stage lofi), without one features (stage head). The head sees features standardized over snippets, with
    `mean` and `std`; the classifier sees their mean over the video standardized over videos, which differ less than snippets do. Until these
    buffers are set they change nothing.
    """

    def __init__(self, name, sizes, *, channels, encoder=None, classes=0):
        super().__init__()
        self.name, self.encoder, self.head = name, encoder, HEADS[name](in_channels=channels, **sizes)
        self.durations = sizes.get("durations")  # D; None: as many as snippets
        self.classifier = nn.Linear(channels, classes) if classes else None
        if classes:
            for buffer, value in (("mean", 0.0), ("std", 1.0), ("video_std", 1.0)):
                self.register_buffer(buffer, torch.full((channels,), value))

    def forward(self, x):
        """frames (B, L, T, 3, H, W) or features (B, C, L) -> start (B, L), end (B, L), map (B, 2, D, L), class logits (B, n) or None."""
        return self.localize(x if self.encoder is None else self.encoder(x))

    def localize(self, x):
        if self.classifier is None:
            return *self.head(x), None
        x = x - self.mean[:, None]
        return *self.head(x / self.std[:, None]), self.classifier(x.mean(2) / self.video_std)

    def proposals(self, start, end, map):
        """Outputs -> segments (B, K, 2) in [0, 1], scores (B, K), valid (B, K); BMN's scores have the boundaries' in them."""
        return gtad.decode(start, end, map, boundary_scores=self.name == "bmn")


def _whole(net, x):
    """Forward of a batch; returns the outputs and what runs their loss backward."""
    return net(x), torch.Tensor.backward


def _chunked(net, frames, chunk, autocast):
    """The same within the encoder's memory for `chunk` snippets: features chunk by chunk without gradient; the head's forward and backward; then
    each chunk again, with its features' gradient. Exact if a snippet's features do not depend on the others', as with frozen BatchNorm."""
    model = getattr(net, "module", net)
    chunks = frames.split(chunk, dim=1)
    seeds = torch.randint(2**62, (len(chunks),)).tolist()  # dropout and stochastic depth draw the same in both passes

    def encode_chunk(k):
        torch.manual_seed(seeds[k])
        return model.encoder(chunks[k])
    with torch.no_grad():
        features = torch.cat([encode_chunk(k) for k in range(len(chunks))], dim=2)
    features.requires_grad_()

    def backward(loss):
        loss.backward()
        for k, gradient in enumerate(features.grad.split(chunk, dim=2)):
            with autocast():
                again = encode_chunk(k)
            again.backward(gradient)
    return model.localize(features), backward


def train_step(net, batch, *, loss, class_weight, generator, shard, reduce, autocast=contextlib.nullcontext, accumulate=1, chunk=0):
    """Forward and backward of one batch, at its own temporal resolution; returns {term: detached scalar}, "loss" their weighted sum.

    net: a Localizer, or DDP around one. batch: "frames" or "features", "segments", and with a classifier "target" (B, n), class
    distributions. loss: {term of the head: weight}; class_weight: the classifier's. generator, shard, reduce: see gtad.loss_weights. autocast(): the context of a forward pass.
    accumulate: micro-batches to go through one after the other. chunk: snippets to encode at once (0: all); gradients are then left
    local, for the caller to average over ranks. Both save memory and leave the gradient as it is: the weights of all cells are those of the global batch.
    """
    inputs = batch["frames"] if "frames" in batch else batch["features"]
    B, L = len(inputs), inputs.shape[1 if "frames" in batch else 2]
    model = getattr(net, "module", net)
    targets = gtad.make_targets(batch["segments"], L, model.durations or L, inputs.device)
    weights = gtad.loss_weights(targets, generator=generator, shard=shard, reduce=reduce)
    sums = {}
    for part in torch.arange(B).chunk(accumulate):
        rows = slice(part[0], part[-1] + 1)
        local = net is not model and (chunk or rows.stop < B)  # DDP averages gradients in the last backward pass
        with net.no_sync() if local else contextlib.nullcontext():
            with autocast():
                (start, end, map, logits), backward = _chunked(net, inputs[rows], chunk, autocast) if chunk else _whole(net, inputs[rows])
            terms = gtad.losses(start, end, map, gtad.Targets(*(t[rows] for t in targets[:3]), targets.valid), gtad.Weights(*(w[rows] for w in weights)))
            total = sum(loss[k] * v for k, v in terms.items())
            if logits is not None:
                terms["class"] = -(batch["target"][rows] * logits.float().log_softmax(1)).sum() / B
                total = total + class_weight * terms["class"]
            backward(total)
        for key, value in {"loss": total, **terms}.items():
            sums[key] = sums.get(key, 0) + value.detach()
    return sums


def train(model, dataset, fidelities, *, options, loss, seed, name, folder, process, workers=0, save_sec=60.0, about=None, **cycle):
    """Trains a Localizer in place on a VideoDataset or FeatureDataset, cycling through `fidelities`; returns seconds.

    options: batch_size (over all processes), class_weight, accumulate, chunk, and those of engine.fit. cycle: order and period of the
    CyclicFidelitySampler. Losses take their random subsets from (seed, name, epoch, step), the same on every process.
    """
    accumulate, chunk, autocast = options.get("accumulate", 1), options.get("chunk", 0), process.autocast
    config.check_batches({name: options}, process.world)

    def step(net, batch, epoch, i):
        generator = torch.Generator().manual_seed(data.seed_of(seed, name, epoch, i))
        torch.manual_seed(data.seed_of(seed, name, epoch, i, process.rank))  # of dropout, if there is any: a resumed run draws what an undisturbed one draws
        terms = train_step(net, batch, loss=loss, class_weight=options["class_weight"], generator=generator, shard=(process.rank, process.world),
                           reduce=engine.mean_over_ranks, autocast=autocast, accumulate=accumulate, chunk=chunk)
        if chunk:
            engine.average_gradients(model)
        return terms
    sampler = data.CyclicFidelitySampler(len(dataset), options["batch_size"], fidelities, seed=data.seed_of(seed, name), rank=process.rank,
                                         world=process.world, **cycle)
    return engine.fit(model, step, dataset, sampler, data.collate, options=options, name=name, folder=folder, process=process, workers=workers,
                      save_sec=save_sec, about=about, training=data.fingerprint(dataset.videos))[0]


def dry_run(model, fidelities, frames_per_snippet, *, options, loss, process):
    """Takes one training step of one video of random frames at each fidelity, and says shapes, parameters, seconds and memory."""
    model.train()
    say, device = process.say, process.device
    count = {name: sum(p.numel() for p in m.parameters()) / 1e6 for name, m in (("encoder", model.encoder), ("head", model.head))}
    say(f"encoder {count['encoder']:.2f} M parameters, {model.encoder.channels} channels; {model.name} head {count['head']:.2f} M")
    optimizer = engine.make_optimizer(model.parameters(), **{k: options[k] for k in ("optimizer", "lr", "momentum", "weight_decay")})
    for f in fidelities:
        frames = torch.randint(0, 256, (1, f.snippets, frames_per_snippet, 3, f.size, f.size), dtype=torch.uint8, device=device)
        batch = {"frames": frames, "segments": [torch.tensor([[0.2, 0.6]])]}
        if model.classifier is not None:
            batch["target"] = torch.full((1, model.classifier.out_features), 1 / model.classifier.out_features, device=device)
        started = time.monotonic()
        terms = train_step(model, batch, loss=loss, class_weight=options["class_weight"], generator=None, shard=(0, 1), reduce=None,
                           autocast=process.autocast, chunk=options["chunk"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        say(f"{f.name}: frames {tuple(frames.shape)} -> features (1, {model.encoder.channels}, {f.snippets}), loss {terms['loss']:.2f}, "
            f"{time.monotonic() - started:.1f} s a video, peak memory so far {engine.peak_memory_gb(device):.2f} GB")


@torch.no_grad()
def encode(encoder, frames, chunk, autocast=contextlib.nullcontext):
    """frames (B, L, T, 3, H, W) -> features (B, C, L) float32, by a frozen encoder, `chunk` snippets at once."""
    with autocast():
        return torch.cat([encoder(c).float() for c in frames.split(chunk, dim=1)], 2)


def recalibrate(encoder, dataset, fidelity, chunk, *, process, workers=0, most=1000):
    """Re-estimates the running statistics of an encoder's BatchNorm at a fidelity over a VideoDataset, at most `most` evenly picked videos of it: the
    same on all processes. About `chunk` snippets at once, taken from all over four videos (of one, where videos differ in length), so that each piece
    is much like the whole."""
    dataset = dataset.only(np.linspace(0, len(dataset.videos) - 1, min(len(dataset.videos), most)).round().astype(int))

    def pieces():
        for batch in engine.batches(dataset, fidelity, 1 if dataset.rate else 4, data.collate, name="recalibrate", process=process, workers=workers):
            B, L = batch["frames"].shape[:2]
            step = min(-(-B * L // chunk), L)
            yield from (batch["frames"][:, i::step] for i in range(step))

    with process.autocast():
        recalibrate_batchnorm(encoder, pieces(), engine.mean_over_ranks)


@torch.no_grad()
def propose(model, features, windows=None, at_once=16):
    """Features (B, C, L) -> proposals of each video, segments (B, K, 2), scores (B, K), valid (B, K), and class probabilities (B, n).

    windows: (first (B,), snippets), where features are B windows of one long video of `snippets` snippets, beginning at snippets `first`: then
    the proposals of all windows as fractions of the video, in a batch of one, and the mean of the windows' class probabilities.
    """
    if windows is None:
        *outputs, logits = model(features)
        return *model.proposals(*outputs), logits.softmax(1)
    parts, (first, snippets) = [], windows
    for x, at in zip(features.split(at_once), first.split(at_once)):
        *outputs, logits = model(x)
        segments, scores, valid = model.proposals(*outputs)
        segments = (at[:, None, None] + segments * x.shape[2]) / snippets
        valid = valid & (segments[..., 0] < 1)  # the last window may go beyond the video
        parts.append((segments.clamp(max=1).flatten(0, 1), scores.flatten(), valid.flatten(), logits.softmax(1)))
    *proposals, classes = (torch.cat(part)[None] for part in zip(*parts))
    return *proposals, classes.mean(1)


def detections(model, features, names, durations, classes, *, sigma, top_k, classes_per_video, class_scores=None, windows=None):
    """Features (B, C, L) -> detections and class-agnostic proposals, {video: [{"label", "score", "segment"}]} and without labels, in seconds.

    names, durations (seconds), classes: lists. sigma, top_k: of soft-NMS. class_scores: (scores (B, n), n classes) from elsewhere, in place
    of the model's own video classifier. windows: see propose.
    """
    *proposals, own = propose(model, features, windows)
    kept = evaluate.soft_nms(*proposals, sigma=sigma, top_k=top_k)
    fuse = partial(evaluate.fuse_classes, *kept, names, durations)
    found = fuse(*(class_scores or (own, classes)), top_k=classes_per_video)
    agnostic = fuse(np.ones((len(names), 1)), [""])
    return found, {v: [{k: p[k] for k in ("score", "segment")} for p in proposals] for v, proposals in agnostic.items()}


def score(annotations, folder, subset, thresholds, labelled=True):
    """Metrics of what stage detect has written into a run's folder, those of evaluate.evaluate and "AR" of the class-agnostic proposals, and the main ones in words.

    labelled: False for a subset without segments, such as a test set that others score: then there is nothing to measure.
    """
    if not labelled:
        return {"subset": subset, "evaluated_videos": 0}, f"{folder}/result.json is written, not scored: subset {subset} has no segments"
    metrics = evaluate.evaluate(annotations, f"{folder}/result.json", subset=subset, thresholds=thresholds)
    metrics["AR"] = evaluate.evaluate(annotations, f"{folder}/proposals.json", subset=subset, ar=True)["AR"]
    shown = [t for t in metrics["mAP"] if t in ("0.5", "0.75", "0.95")] if "0.75" in metrics["mAP"] else metrics["mAP"]
    few = metrics["evaluated_videos"] < metrics["ground_truth_videos"]
    return metrics, ("mAP " + ", ".join(f"@{t} {100 * metrics['mAP'][t]:.2f}" for t in shown) + f", average {100 * metrics['average_mAP']:.2f} %; evaluated "
                     f"{metrics['evaluated_videos']} of {metrics['ground_truth_videos']} videos" + (f" (on these alone average {100 * metrics['common']['average_mAP']:.2f} %)" if few else ""))
