"""Classification pre-training of a snippet encoder, the baselines of LoFi's Tables 1 and 7: each is a choice of clips and labels for one training loop.

    icp                  still images: SOURCE/{train,val}/CLASS/*.jpg
    acp                  trimmed clips of an auxiliary set, by action
    acp_plus             the target's trimmed segments, by action (section 4.2)
    acp_plus_background  the same, and what lies between the segments as one more class: a control that the paper lacks
    arrow                is a clip played forward or reversed? Arrow of Time, Wei et al., CVPR 2018 (section 4.7; there on Kinetics, so on ACP's clips here)
    speed                is it played at normal or at double speed? SpeedNet, Benaim et al., CVPR 2020 (likewise)

Sources of acp, arrow and speed: a folder SOURCE/{train,val}/CLASS/ of ZIPs of frames, folders of frames or video files; a CSV; or the segments of an
ActivityNet JSON. Every pre-training gives the same thing, an encoder for the later stages.
"""
import csv
import math
import os

import torch
from torch import nn

import data
import engine

PHASES = {"none": [], "icp": ["icp"], "acp": ["acp"], "acp_plus": ["acp", "acp_plus"], "acp_plus_background": ["acp", "acp_plus_background"],
          "arrow": ["arrow"], "speed": ["speed"]}  # of stage pretrain, by method
PLAYS = {"arrow": ("forward", "reversed"), "speed": ("normal", "double")}
CSV_COLUMNS = ("path", "label", "start", "end", "split")


class Classifier(nn.Module):
    """Snippet encoder and a linear classifier of clips: frames (B, 1, T, 3, H, W) -> logits (B, n)."""

    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder, self.linear = encoder, nn.Linear(encoder.channels, classes)

    def forward(self, frames):
        return self.linear(self.encoder(frames).mean(2))


def phases(method, checkpoint):
    """What is left to train when `checkpoint`, if any, replaces the training of all but the second phase. ValueError where it would pass for what it is not."""
    if checkpoint and (method in PLAYS or method == "icp" and checkpoint != "torchvision"):
        raise ValueError(f"pretrain.checkpoint {checkpoint} would replace the training that pretrain.method {method} asks for, under its name: set pretrain.checkpoint=null, "
                         "or, if this encoder is what you want, pretrain.method=none")
    return PHASES[method][1 if checkpoint else 0:]


def options_of(block, phase):
    """The options of a phase from the config block `pretrain`: arrow and speed without a source of their own take ACP's clips."""
    options = dict(block[phase.removesuffix("_background")])
    if phase in PLAYS and options["source"] is None:
        options |= {k: block["acp"][k] for k in ("source", "media")}
    return options


def clips_of(phase, options, target, snippets, say=print, subsets=("training", "validation")):
    """Training and held-out clips and their classes: ([Clip], [Clip], [names]).

    options: source and media. target(): (training, validation) videos with their media, for acp_plus. snippets: background shorter than 1 / snippets of its
    video is none. subsets: names of the training and held-out subsets in an ActivityNet JSON; if it lacks them, training and validation. ValueError says what
    a source lacks.
    """
    if phase.startswith("acp_plus"):
        return segments_of(*target(), background=snippets if phase.endswith("background") else 0)
    source = options["source"]
    if source is None:
        raise ValueError(f"pretrain.{phase}.source is not set: name a folder, a CSV or an ActivityNet JSON, or an encoder in pretrain.checkpoint")
    if phase != "icp" and source.lower().endswith(".csv"):
        clips = csv_clips(source, say)
    elif phase != "icp" and source.lower().endswith(".json"):
        folder, videos = options["media"] or f"{os.path.dirname(source) or '.'}/frames", data.load_annotations(source)
        names = next((names for names in (subsets, ("training", "validation")) if set(names) <= set(videos)), None)
        if names is None:
            raise ValueError(f"pretrain.{phase}.source {source} has subsets {sorted(videos)}, expected {' and '.join(subsets)} (config keys data.train_subset, "
                             "data.val_subset), or training and validation")
        clips = segments_of(*(data.select(videos, name, folder, "frames", say) for name in names))
    else:
        suffix = (".jpg", ".jpeg", ".JPG", ".JPEG") if phase == "icp" else None
        train, classes = data.list_clips(f"{source}/train", suffix)
        clips = train, data.list_clips(f"{source}/val", suffix, classes)[0], classes
    if phase in PLAYS:
        return *([c._replace(label=i, play=play) for c in part for i, play in enumerate(PLAYS[phase])] for part in clips[:2]), list(PLAYS[phase])
    return clips


def segments_of(train, held_out, background=0):
    """The segments of untrimmed videos as clips, by label; held-out ones of other labels are left out. background: n, for the stretches of at least 1 / n of
    their video that no segment covers, as one more class."""
    classes = data.class_names(train)
    parts = []
    for videos in (train, held_out):
        clips = data.segment_clips(videos, None, classes)
        if background and clips:  # without segments, nothing tells what is background
            clips += [data.Clip(v.path, start * v.duration, end * v.duration, len(classes), v.duration)
                      for v in videos for start, end in between(v.segments, 1 / background)]
        parts.append(clips)
    return *parts, classes + ["background"] * bool(background)


def between(segments, least):
    """[(start, end), ...] of at least `least`: what segments (N, 2) leave of [0, 1]."""
    found, end = [], 0.0
    for s, e in sorted(segments.tolist()) + [[1.0, 1.0]]:
        if s - end >= least:
            found.append((end, s))
        end = max(end, e)
    return found


def csv_clips(path, say=print):
    """Clips of a CSV file: ([training Clip], [held-out Clip], [names of the training clips' classes]).

    Its first line names the columns: path (of a video file, a ZIP or a folder of frames; relative to the CSV's folder), label, and as wanted start and end
    (seconds; empty: the whole clip) and split (train or val; without this column every clip trains). Files that are not there are counted, named and left out.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no CSV file {path}")
    rows, missing = {"train": [], "val": []}, []
    with open(path, newline="", encoding="utf-8-sig") as f:
        reader = csv.DictReader(f)
        columns = reader.fieldnames or []
        if not {"path", "label"} <= set(columns) <= set(CSV_COLUMNS) or len(set(columns)) < len(columns):
            raise ValueError(f"{path}: the first line is {','.join(columns)!r}; it must name the columns: path, label and as wanted start, end, split")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values() or not row["path"] or not row["label"]:
                raise ValueError(f"{where}: expected {len(columns)} values, {', '.join(columns)}, of which path and label are not empty")
            try:
                start, end = float(row.get("start") or 0), float(row.get("end") or math.inf)
            except ValueError:
                start, end = math.nan, math.nan
            if not 0 <= start < end:
                raise ValueError(f"{where}: start {row.get('start')!r} and end {row.get('end')!r}; expected seconds, 0 <= start < end")
            if row.get("split", "train") not in rows:
                raise ValueError(f"{where}: split {row['split']!r}, expected train or val")
            file = os.path.join(os.path.dirname(path), row["path"])
            if os.path.exists(file):
                rows[row.get("split", "train")].append((file, start, end, row["label"]))
            else:
                missing.append(row["path"])
    if missing:
        say(f"{path}: {len(missing)} files are not there and are left out: " + ", ".join(missing[:10]) + (" ..." if len(missing) > 10 else ""))
    classes = sorted({label for *_, label in rows["train"]})
    unknown = sorted({label for *_, label in rows["val"]} - set(classes))
    if not classes or unknown:
        raise ValueError(f"{path}: " + (f"held-out clips have labels that no training clip has: {unknown[:10]}" if classes else "not one training clip whose file is there"))
    index = {c: i for i, c in enumerate(classes)}
    return *([data.Clip(file, start, end, index[label]) for file, start, end, label in rows[split]] for split in ("train", "val")), classes


def dry_run_phase(encoder, phase, options, *, size, process):
    """Takes one training step of two random clips (BatchNorm wants more than one), and says shapes, parameters and memory. Classes: as many as ImageNet,
    Kinetics-400 and ActivityNet have."""
    classes = len(PLAYS.get(phase, ())) or {"icp": 1000, "acp": 400, "acp_plus": 200}.get(phase, 201)
    model = Classifier(encoder, classes).to(process.device).train()
    optimizer = engine.make_optimizer(model.parameters(), **{k: options[k] for k in ("optimizer", "lr", "momentum", "weight_decay")})
    frames = torch.randint(0, 256, (2, 1, options["frames"], 3, size, size), dtype=torch.uint8, device=process.device)
    with process.autocast():
        logits = model(frames).float()
    nn.functional.cross_entropy(logits, torch.zeros(2, dtype=torch.int64, device=process.device)).backward()
    optimizer.step()
    process.say(f"{phase}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, clips {tuple(frames.shape)} -> {classes} classes, "
                f"peak memory so far {engine.peak_memory_gb(process.device):.2f} GB")


def train_classifier(encoder, clips, *, size, seed, options, name, folder, process, workers, save_sec=60.0, **views):
    """Trains `encoder` in place on clips = (training, held out, classes); returns seconds and a record {"classes", "training_clips", "held_out_clips",
    "top1": accuracy on the held-out clips, "chance": the share of their most frequent class; null without any, "seconds"}.

    options: epochs, batch_size, frames and those of engine.fit. views: stride, crop and flip of data.ClipDataset.
    """
    together = len(PLAYS.get(name, ("one",)))  # both ways to play a clip in one batch, at one view (SpeedNet's same-batch training): else the clip's looks drown what tells them apart
    train, held_out = (data.ClipDataset(c, frames=options["frames"], train=i == 0, seed=seed, together=together, **views) for i, c in enumerate(clips[:2]))
    torch.manual_seed(data.seed_of(seed, name))
    model, fidelity = Classifier(encoder, len(clips[2])).to(process.device), data.Fidelity("full", 1, size)

    def step(net, batch, epoch, i):
        torch.manual_seed(data.seed_of(seed, name, epoch, i, process.rank))  # of dropout and stochastic depth, if there is any
        with process.autocast():
            logits = net(batch["frames"]).float()
        loss = nn.functional.cross_entropy(logits, batch["label"])
        loss.backward()
        return {"loss": loss.detach(), "accuracy": (logits.argmax(1) == batch["label"]).float().mean()}

    sampler = data.CyclicFidelitySampler(len(train), options["batch_size"], [fidelity], seed=data.seed_of(seed, name), rank=process.rank, world=process.world,
                                         together=together)
    seconds, _ = engine.fit(model, step, train, sampler, data.collate, options=options, name=name, folder=folder, process=process, workers=workers,
                            save_sec=save_sec, training=data.fingerprint(clips[0]))
    model.eval()
    right = torch.zeros(1, dtype=torch.float64)
    with torch.no_grad(), process.autocast():
        for batch in engine.batches(held_out, fidelity, 64, data.collate, name=f"{name} held out", process=process, workers=workers):
            right += (model(batch["frames"]).argmax(1) == batch["label"]).sum().cpu()
    right, total = (engine.mean_over_ranks(right.to(process.device)) * process.world).item(), len(held_out)
    record = {"classes": len(clips[2]), "training_clips": len(train), "held_out_clips": total, "top1": None, "chance": None, "seconds": seconds}
    if total:
        record |= {"top1": right / total, "chance": max(torch.bincount(torch.tensor([c.label for c in clips[1]])).tolist()) / total}
        process.say(f"{name}: top-1 accuracy on {total} held-out clips of {len(clips[2])} classes: {100 * record['top1']:.1f} % "
                    f"(always the most frequent class: {100 * record['chance']:.1f} %)")
    else:
        process.say(f"{name}: no held-out clips of these {len(clips[2])} classes, no accuracy")
    return seconds, record
