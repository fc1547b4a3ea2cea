"""Train and evaluate temporal action localization with a low-fidelity optimized video encoder: LoFi, Xu et al., NeurIPS 2021.

    python lofi_tal.py --cfg configs/toy.yaml                                   one process, CPU or GPU
    torchrun --nproc_per_node=4 lofi_tal.py --cfg configs/anet13.yaml           four GPUs, the same global batch
    python lofi_tal.py --cfg configs/toy.yaml --set pretrain.method=icp out=runs/toy/icp
    python lofi_tal.py --cfg configs/anet13.yaml --dry-run                      no data needed: shapes, parameters, memory, time

The config lists the stages. Each writes into the run's folder; a finished one is skipped, an interrupted one goes on where it stopped:
    pretrain  the encoder before localization           -> OUT/pretrain/encoder.pt
    lofi      encoder and head end to end, low fidelity  -> OUT/lofi/encoder.pt
    features  the frozen encoder at full fidelity        -> OUT/features/VIDEO.npy
    head      a fresh head and a video classifier        -> OUT/head/head.pt
    detect    proposals, soft-NMS, classes, mAP          -> OUT/result.json, OUT/metrics.json
"""
import argparse
import difflib
import json
import os
import subprocess
import sys
import time
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torchvision
import yaml
from torch import nn
from tqdm import tqdm

import data
import engine
import evaluate
import gtad
from tsm import TSM, load_weights


# ---------------------------------------------------------------- config

class Config(dict):
    """A dict whose keys are attributes too: cfg.lofi.lr."""
    __getattr__ = dict.__getitem__


def merge(base, changes, where=""):
    """`base` with `changes` in it. ValueError for a key that base lacks, with the nearest one that it has."""
    out = Config(base)
    for key, value in (changes or {}).items():
        if key not in base:
            near = difflib.get_close_matches(str(key), base, 1, 0) or ["?"]
            raise ValueError(f"config key {where}{key} is read by nothing; did you mean {where}{near[0]}? configs/default.yaml has them all")
        if isinstance(base[key], dict) != isinstance(value, dict):
            raise ValueError(f"config key {where}{key} is {value!r}, expected {'a block of keys' if isinstance(base[key], dict) else 'one value'}")
        out[key] = merge(base[key], value, f"{where}{key}.") if isinstance(value, dict) else value
    return Config({k: merge(v, {}) if isinstance(v, dict) else v for k, v in out.items()})


def load_config(path, overrides=()):
    """configs/default.yaml, then the file, then `a.b=value` overrides."""
    def read(file):
        with open(file) as f:
            return yaml.safe_load(f)
    cfg = merge(read(os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs/default.yaml")), read(path))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text}: expected key.sub=value")
        change = yaml.safe_load(value)
        for part in reversed(key.split(".")):
            change = {part: change}
        cfg = merge(cfg, change)
    wrong = [s for s in cfg.stages if s not in STAGES]
    if wrong:
        raise ValueError(f"config key stages has {wrong}, expected some of {list(STAGES)}")
    return cfg


def flat(cfg, where=""):
    return {k: v for key, value in cfg.items() for k, v in
            (flat(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value}).items()}


def open_run(cfg, process):
    """The run's folder with the config that it was begun with; ValueError shows the difference if this is another."""
    path = f"{cfg.out}/config.json"
    if os.path.exists(path):
        with open(path) as f:
            old = flat(json.load(f))
        new = flat(cfg)
        differ = [f"  {k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in sorted({*old, *new} - {"data.workers", "device"}) if old.get(k) != new.get(k)]
        if differ:
            raise ValueError(f"{cfg.out} was begun with another config:\n" + "\n".join(differ) + "\nname another folder with --set out=..., or remove that one yourself")
    engine.barrier(process)
    if process.is_main and not os.path.exists(path):
        git = subprocess.run(["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty"], capture_output=True, text=True)
        engine.save_json({"git": git.stdout.strip() or None, "torch": torch.__version__, "torchvision": torchvision.__version__,
                          "numpy": np.__version__, "python": sys.version.split()[0], "device": str(process.device), "processes": process.world}, f"{cfg.out}/versions.json")
        engine.save_json(cfg, path)


# ---------------------------------------------------------------- models

class Localizer(nn.Module):
    """What one step of stage lofi or head runs, behind one forward for DDP: (encoder) -> (standardize) -> head (, video classifier)."""

    def __init__(self, head, *, encoder=None, channels=None, classes=0):
        super().__init__()
        self.encoder, self.head = encoder, head
        if classes:
            self.classifier = nn.Linear(channels, classes)
            self.register_buffer("mean", torch.zeros(channels))
            self.register_buffer("std", torch.ones(channels))

    def forward(self, x):
        """frames or features (B, C, L) -> start (B, L), end (B, L), map (B, 2, D, L), class logits (B, n) or None."""
        if self.encoder is not None:
            return *self.head(self.encoder(x)), None
        x = (x - self.mean[:, None]) / self.std[:, None]
        return *self.head(x), self.classifier(x.mean(2))


class Classifier(nn.Module):
    """Snippet encoder and a linear classifier of clips, for stage pretrain."""

    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder, self.linear = encoder, nn.Linear(encoder.channels, classes)

    def forward(self, frames):
        return self.linear(self.encoder(frames).mean(2))


def build_encoder(cfg, path=None, **options):
    encoder = TSM(**cfg.encoder, **options)
    if path:
        load_weights(encoder, path)
    return encoder


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def localization_step(net, batch, epoch, i, *, inputs, cfg, process, name):
    """Forward and backward of one batch; targets at the batch's own temporal resolution. Total loss as in G-TAD's release."""
    with autocast(process.device):
        start, end, map, logits = net(batch[inputs])
    targets = gtad.make_targets(batch["segments"], start.shape[1], map.shape[2], process.device)
    generator = torch.Generator().manual_seed(data.seed_of(cfg.seed, name, epoch, i))
    weights = gtad.loss_weights(targets, generator=generator, shard=(process.rank, process.world), reduce=engine.mean_over_ranks)
    terms = gtad.losses(start, end, map, targets, weights)
    loss = sum(cfg.loss[k] * v for k, v in terms.items())
    if logits is not None:
        terms["class"] = -(batch["target"] * logits.float().log_softmax(1)).sum(1).mean()
        loss = loss + terms["class"]
    loss.backward()
    return {"loss": loss.detach(), **{k: v.detach() for k, v in terms.items()}}


def classification_step(net, batch, epoch, i, *, device):
    with autocast(device):
        logits = net(batch["frames"]).float()
    loss = nn.functional.cross_entropy(logits, batch["label"])
    loss.backward()
    return {"loss": loss.detach(), "accuracy": (logits.argmax(1) == batch["label"]).float().mean()}


def fit(model, step, dataset, fidelities, options, cfg, process, name, folder, **sampling):
    """engine.fit with the options that every training block of the config has."""
    sampler = data.CyclicFidelitySampler(len(dataset), options.batch_size, fidelities, seed=data.seed_of(cfg.seed, name),
                                         rank=process.rank, world=process.world, **sampling)
    optimizer = engine.make_optimizer(model.parameters(), **{k: options[k] for k in ("optimizer", "lr", "momentum", "weight_decay")})
    schedule = partial(engine.lr_factor, epochs=options.epochs, **{k: options[k] for k in ("schedule", "every", "factor", "warmup")})
    return engine.fit(model, step, dataset, sampler, data.collate, name=name, epochs=options.epochs, optimizer=optimizer, schedule=schedule,
                      folder=folder, process=process, workers=cfg.data.workers, clip=options.get("clip", 0))


def subset(cfg, process, which, folder, suffix):
    annotations = data.load_annotations(cfg.data.annotations)
    return data.select(annotations, cfg.data[f"{which}_subset"], folder, suffix, process.say)


def frame_options(cfg):
    return {"stride": cfg.data.stride, "crop": cfg.data.crop, "flip": cfg.data.flip, "seed": cfg.seed}


def video_dataset(cfg, process, which, train):
    videos = subset(cfg, process, which, cfg.data.frames, ".zip")
    return data.VideoDataset(videos, cfg.data.frames, snippets=cfg.data.snippets, frames=cfg.data.frames_per_snippet, train=train, **frame_options(cfg))


# ---------------------------------------------------------------- stages

def pretrain(cfg, process):
    """Encoder before localization: random, ICP (images), ACP (auxiliary trimmed clips) or ACP+ (then the target's trimmed segments)."""
    method, checkpoint = cfg.pretrain.method, cfg.pretrain.checkpoint
    phases = {"none": [], "icp": ["icp"], "acp": ["acp"], "acp_plus": ["acp", "acp_plus"]}
    if method not in phases:
        raise ValueError(f"config key pretrain.method is {method!r}, expected one of {list(phases)}")
    torch.manual_seed(data.seed_of(cfg.seed, "encoder"))
    encoder, seconds = build_encoder(cfg, checkpoint), 0.0
    if checkpoint:
        seconds = torch.load(checkpoint, map_location="cpu", weights_only=True).get("seconds", 0.0)
        process.say(f"pretrain: encoder from {checkpoint}")
    for phase in [p for p in phases[method] if not checkpoint or p == "acp_plus"]:
        options, folder = cfg.pretrain[phase], f"{cfg.out}/pretrain/{phase}"
        if phase == "acp_plus":
            splits = [subset(cfg, process, which, cfg.data.frames, ".zip") for which in ("train", "val")]
            classes = sorted({label for v in splits[0] for label in v.labels})
            train, held_out = (data.segment_clips(videos, cfg.data.frames, classes) for videos in splits)
        else:
            suffix = ".jpg" if phase == "icp" else ".zip"
            (train, classes), (held_out, _) = (data.list_clips(f"{options.source}/{split}", suffix) for split in ("train", "val"))
        clips = [data.ClipDataset(c, frames=options.frames, train=c is train, **frame_options(cfg)) for c in (train, held_out)]
        torch.manual_seed(data.seed_of(cfg.seed, phase))
        model = Classifier(encoder, len(classes)).to(process.device)
        fidelity = data.Fidelity("full", 1, cfg.data.size)
        spent, _ = fit(model, partial(classification_step, device=process.device), clips[0], [fidelity], options, cfg, process, phase, folder)
        seconds += spent
        model.eval()
        right = total = 0
        loader = engine.make_loader(clips[1], [[(i, fidelity) for i in range(k, min(k + 64, len(held_out)))] for k in range(0, len(held_out), 64)],
                                    data.collate, cfg.data.workers, process.device)
        with torch.no_grad(), autocast(process.device):
            for batch in loader:
                right += (model(batch["frames"].to(process.device)).argmax(1).cpu() == batch["label"]).sum().item()
                total += len(batch["label"])
        process.say(f"{phase}: top-1 accuracy on {total} held-out clips of {len(classes)} classes: {100 * right / total:.1f} %")
    save_encoder(cfg, process, encoder, "pretrain", seconds)


def save_encoder(cfg, process, encoder, stage, seconds):
    if process.is_main:
        state = {k: v.cpu() for k, v in encoder.state_dict().items()}
        engine.write_aside(f"{cfg.out}/{stage}/encoder.pt", lambda f: torch.save({"model": state, "encoder": dict(cfg.encoder), "seconds": seconds}, f))


def encoder_path(cfg, stage):
    """The encoder that `stage` starts from: the product of the stage before it in this run, or a checkpoint from elsewhere."""
    before = [s for s in ("pretrain", "lofi") if s in cfg.stages and (s != stage)]
    path = f"{cfg.out}/{before[-1]}/encoder.pt" if before else cfg.pretrain.checkpoint
    if not path:
        raise ValueError(f"stage {stage} needs an encoder: list stage pretrain before it, or name one in pretrain.checkpoint")
    return path


def low_fidelity_cycle(cfg):
    known = data.fidelities(cfg.data.snippets, cfg.data.size, r_t=cfg.fidelity.r_t, r_s=cfg.fidelity.r_s, st=(cfg.fidelity.st_r_t, cfg.fidelity.st_r_s))
    wrong = [f for f in cfg.lofi.cycle if f not in known]
    if wrong or not cfg.lofi.cycle:
        raise ValueError(f"config key lofi.cycle is {cfg.lofi.cycle}, expected a list of {sorted(known)}")
    return [known[f] for f in cfg.lofi.cycle]


def end_to_end(cfg, path, device):
    if cfg.lofi.batchnorm not in ("frozen", "train"):
        raise ValueError(f"config key lofi.batchnorm is {cfg.lofi.batchnorm!r}, expected frozen or train")
    torch.manual_seed(data.seed_of(cfg.seed, "lofi"))
    encoder = build_encoder(cfg, path, frozen_bn=cfg.lofi.batchnorm == "frozen")
    return Localizer(gtad.GTAD(in_channels=encoder.channels, **cfg.gtad), encoder=encoder).to(device)


def lofi(cfg, process):
    """Section 3.2: encoder and head together at low fidelity. The head only serves to train the encoder, and is thrown away."""
    path = encoder_path(cfg, "lofi")
    model, dataset = end_to_end(cfg, path, process.device), video_dataset(cfg, process, "train", train=True)
    step = partial(localization_step, inputs="frames", cfg=cfg, process=process, name="lofi")
    seconds, _ = fit(model, step, dataset, low_fidelity_cycle(cfg), cfg.lofi, cfg, process, "lofi", f"{cfg.out}/lofi",
                     cycle=cfg.lofi.order, period=cfg.lofi.period)
    save_encoder(cfg, process, model.encoder, "lofi", seconds + torch.load(path, weights_only=True, map_location="cpu").get("seconds", 0.0))


def features(cfg, process):
    """The frozen encoder over every video at full fidelity, each rank its share, a file each."""
    path, started = encoder_path(cfg, "features"), time.monotonic()
    encoder = build_encoder(cfg, path).to(process.device).eval()
    full = data.Fidelity("full", cfg.data.snippets, cfg.data.size)
    for which in ("train", "val"):
        dataset = video_dataset(cfg, process, which, train=False)
        todo = [i for i in range(process.rank, len(dataset), process.world) if not os.path.exists(f"{cfg.out}/features/{dataset.videos[i].name}.npy")]
        loader = engine.make_loader(dataset, [[(i, full)] for i in todo], data.collate, cfg.data.workers, process.device)
        for batch in tqdm(loader, f"features {which}", unit="video", leave=False, disable=not (process.is_main and sys.stderr.isatty())):
            with torch.no_grad(), autocast(process.device):
                chunks = [encoder(c.to(process.device)) for c in batch["frames"].split(cfg.features.chunk, dim=1)]
            x = torch.cat(chunks, 2)[0].t().float().cpu().numpy()  # (L, C)
            engine.write_aside(f"{cfg.out}/features/{batch['name'][0]}.npy", partial(np.save, arr=x, allow_pickle=False))
    engine.barrier(process)
    if process.is_main:
        seconds = time.monotonic() - started + torch.load(path, weights_only=True, map_location="cpu").get("seconds", 0.0)
        engine.save_json({"encoder": path, **cfg.encoder, "snippets": cfg.data.snippets, "frames_per_snippet": cfg.data.frames_per_snippet,
                          "stride": cfg.data.stride, "size": cfg.data.size, "seconds": seconds}, f"{cfg.out}/features/features.json")


def feature_dataset(cfg, process, which, classes=None):
    folder = cfg.data.features or f"{cfg.out}/features"
    videos = subset(cfg, process, which, folder, ".npy")
    return data.FeatureDataset(videos, folder, classes or sorted({label for v in videos for label in v.labels}))


def head(cfg, process):
    """A fresh head at full fidelity on frozen features (section 3.1, stage 3), and beside it a linear classifier of the mean feature."""
    dataset = feature_dataset(cfg, process, "train")
    torch.manual_seed(data.seed_of(cfg.seed, "head"))
    model = Localizer(gtad.GTAD(in_channels=dataset.channels, **cfg.gtad), channels=dataset.channels, classes=len(dataset.classes))
    if cfg.head.standardize:
        model.mean[:], model.std[:] = dataset.statistics()
    step = partial(localization_step, inputs="features", cfg=cfg, process=process, name="head")
    full = data.Fidelity("full", cfg.data.snippets, cfg.data.size)
    seconds, _ = fit(model.to(process.device), step, dataset, [full], cfg.head, cfg, process, "head", f"{cfg.out}/head")
    if process.is_main:
        state = {k: v.cpu() for k, v in model.state_dict().items()}
        engine.write_aside(f"{cfg.out}/head/head.pt", lambda f: torch.save({"model": state, "classes": dataset.classes, "seconds": seconds}, f))


def detect(cfg, process):
    """Proposals of every validation video, each rank its share; soft-NMS, classes, result JSON, metrics."""
    started = time.monotonic()
    saved = torch.load(f"{cfg.out}/head/head.pt", map_location="cpu", weights_only=True)
    dataset = feature_dataset(cfg, process, "val", saved["classes"])
    model = Localizer(gtad.GTAD(in_channels=dataset.channels, **cfg.gtad), channels=dataset.channels, classes=len(dataset.classes))
    model.load_state_dict(saved["model"])
    model.to(process.device).eval()
    full, results = data.Fidelity("full", cfg.data.snippets, cfg.data.size), {}
    own = list(range(process.rank, len(dataset), process.world))
    loader = engine.make_loader(dataset, [[(i, full) for i in own[k:k + 32]] for k in range(0, len(own), 32)], data.collate, 0, process.device)
    duration = {v.name: v.duration for v in dataset.videos}
    for batch in tqdm(loader, "detect", leave=False, disable=not (process.is_main and sys.stderr.isatty())):
        with torch.no_grad():
            start, end, map, logits = model(batch["features"].to(process.device))
        proposals = evaluate.soft_nms(*gtad.decode(start, end, map), sigma=cfg.detect.sigma, top_k=cfg.detect.top_k)
        results.update(evaluate.fuse_classes(*proposals, batch["name"], [duration[n] for n in batch["name"]], logits.softmax(1),
                                             dataset.classes, top_k=cfg.detect.classes_per_video))
    if process.world > 1:
        parts = [None] * process.world
        dist.all_gather_object(parts, results)
        results = {k: v for part in parts for k, v in part.items()}
    if not process.is_main:
        return
    results = {v.name: results[v.name] for v in dataset.videos}  # one order, however many ranks
    evaluate.save_results(results, f"{cfg.out}/result.json", class_source="video classifier of the run", seed=cfg.seed)
    metrics = evaluate.evaluate(cfg.data.annotations, f"{cfg.out}/result.json", subset=cfg.data.val_subset)
    described = f"{cfg.data.features or cfg.out + '/features'}/features.json"
    before = json.load(open(described)).get("seconds", 0.0) if os.path.exists(described) else 0.0
    seconds = before + saved["seconds"] + time.monotonic() - started
    engine.save_json({**metrics, "seconds": seconds, "seed": cfg.seed}, f"{cfg.out}/metrics.json")
    process.say(f"{cfg.out}: mAP " + ", ".join(f"@{t} {100 * metrics['mAP'][t]:.2f}" for t in ("0.5", "0.75", "0.95"))
                + f", average {100 * metrics['average_mAP']:.2f} %; evaluated {metrics['evaluated_videos']} of {metrics['ground_truth_videos']} videos")


STAGES = {pretrain: "pretrain/encoder.pt", lofi: "lofi/encoder.pt", features: "features/features.json", head: "head/head.pt", detect: "metrics.json"}
STAGES = {stage.__name__: (stage, product) for stage, product in STAGES.items()}


def dry_run(cfg, process):
    """Builds everything and takes one training step of one video of random frames at each fidelity of the cycle."""
    model = end_to_end(cfg, None, process.device)
    model.train()
    count = {name: sum(p.numel() for p in m.parameters()) / 1e6 for name, m in (("encoder", model.encoder), ("head", model.head))}
    process.say(f"encoder {count['encoder']:.2f} M parameters, {model.encoder.channels} channels; G-TAD head {count['head']:.2f} M")
    optimizer = engine.make_optimizer(model.parameters(), **{k: cfg.lofi[k] for k in ("optimizer", "lr", "momentum", "weight_decay")})
    for f in low_fidelity_cycle(cfg):
        frames = torch.randint(0, 256, (1, f.snippets, cfg.data.frames_per_snippet, 3, f.size, f.size), dtype=torch.uint8, device=process.device)
        started = time.monotonic()
        terms = localization_step(model, {"frames": frames, "segments": [torch.tensor([[0.2, 0.6]])]}, 0, 0, inputs="frames", cfg=cfg, process=process, name="dry")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        process.say(f"{f.name}: frames {tuple(frames.shape)} -> features (1, {model.encoder.channels}, {f.snippets}), loss {terms['loss']:.2f}, "
                    f"{time.monotonic() - started:.1f} s a video, peak memory so far {engine.peak_memory_gb(process.device):.2f} GB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, help="a YAML of configs/")
    parser.add_argument("--set", nargs="+", default=[], action="extend", metavar="key.sub=value", help="change single keys")
    parser.add_argument("--dry-run", action="store_true", help="no data: build everything, one step at each fidelity")
    args = parser.parse_args()
    try:
        cfg = load_config(args.cfg, args.set)
        process = engine.start_process(cfg.device)
        if args.dry_run:
            dry_run(cfg, process)
        else:
            open_run(cfg, process)
            for name in [s for s in STAGES if s in cfg.stages]:
                stage, product = STAGES[name]
                if os.path.exists(f"{cfg.out}/{product}"):
                    process.say(f"{name}: done already, {cfg.out}/{product}")
                else:
                    stage(cfg, process)
                engine.barrier(process)
        if process.world > 1:
            dist.destroy_process_group()
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"lofi_tal.py: {error}")


if __name__ == "__main__":
    main()
