"""Train and evaluate temporal action localization with a low-fidelity optimized video encoder: LoFi, Xu et al., NeurIPS 2021.

    python lofi_tal.py --cfg configs/toy.yaml                                   one process, CPU or GPU
    torchrun --nproc_per_node=4 lofi_tal.py --cfg configs/anet13.yaml           four GPUs, the same global batch
    python lofi_tal.py --cfg configs/toy.yaml --set pretrain.method=icp out=runs/toy/icp
    python lofi_tal.py --cfg configs/anet13.yaml --dry-run                      no data needed: shapes, parameters, memory, time

The config lists the stages. Each writes into the run's folder; a finished one is skipped, an interrupted one goes on where it stopped:
    pretrain  the encoder before localization           -> OUT/pretrain/encoder.pt
    lofi      encoder and head end to end, low fidelity  -> OUT/lofi/encoder.pt
    features  the frozen encoder at full fidelity        -> OUT/features/VIDEO.npy
    sola      soft landing, trained on features alone    -> OUT/sola/sola.pt, OUT/sola/features/VIDEO.npy
    head      a fresh head and a video classifier        -> OUT/head/head.pt
    detect    proposals, soft-NMS, classes, mAP          -> OUT/result.json, OUT/metrics.json
"""
import argparse
import os
import sys
import time
from functools import lru_cache, partial

import numpy as np
import torch

import config
import data
import engine
import evaluate
import train_sola
from localizer import HEADS, Localizer, detections, dry_run, encode, recalibrate, score, train
from pretrain import PHASES, clips_of, dry_run_phase, options_of, phases, train_classifier
from tsm import make_encoder

load_annotations = lru_cache(1)(data.load_annotations)  # one reading serves the check and every stage of a run


def check(cfg, files=True):
    """Fails before any work is done, with the key to change; `files` looks whether there is anything to work on, too."""
    words = {"stages": (cfg.stages, STAGES), "pretrain.method": ([cfg.pretrain.method], PHASES), "tal_head": ([cfg.tal_head], HEADS),
             "lofi.batchnorm": ([cfg.lofi.batchnorm], ("frozen", "train", "recalibrate")), "lofi.order": ([cfg.lofi.order], ("long", "short")),
             "precision": ([cfg.precision], engine.PRECISIONS)}
    for name, block in {"lofi": cfg.lofi, "sola": cfg.sola, "head": cfg.head, **{f"pretrain.{k}": v for k, v in cfg.pretrain.items() if isinstance(v, dict)}}.items():
        words |= {f"{name}.optimizer": ([block.optimizer], engine.OPTIMIZERS), f"{name}.schedule": ([block.schedule], engine.SCHEDULES)}
    config.check_words(words)
    config.check_numbers(cfg)
    todo = [s for s in cfg.stages if not os.path.exists(f"{cfg.out}/{STAGES[s][1]}")]
    tasks = {f"pretrain.{p}": options_of(cfg.pretrain, p) for p in phases(cfg.pretrain.method, cfg.pretrain.checkpoint)} if "pretrain" in todo else {}
    config.check_batches(tasks | {s: cfg[s] for s in ("lofi", "sola", "head") if s in todo}, engine.world_size())
    if cfg.data.windows != bool(cfg.data.rate) and not cfg.data.features:
        raise ValueError(f"data.windows is {cfg.data.windows} and data.rate {cfg.data.rate}: features of one's own need both for windows, or none")
    low_fidelity_cycle(cfg)
    if cfg.lofi.batchnorm != "frozen" and (cfg.lofi.chunk or cfg.lofi.accumulate > 1 or cfg.encoder.recompute):
        raise ValueError("lofi.chunk, lofi.accumulate and encoder.recompute need lofi.batchnorm frozen: BatchNorm would see other statistics than in one piece")
    if cfg.data.features and {"lofi", "features"} & set(cfg.stages):
        raise ValueError(f"data.features is {cfg.data.features}: then stages lofi and features have nothing to do, take them out of `stages`")
    if files:
        data.check_segments(load_annotations(cfg.data.annotations), cfg.data.train_subset if {"lofi", "head"} & set(todo) else None,
                            cfg.data.val_subset if "detect" in todo else None, cfg.detect.classes_from == "ground_truth")
        target = {"lofi", "features"} & set(todo) or "pretrain" in todo and "acp_plus" in cfg.pretrain.method
        for which in ("train", "val") if target else ():
            subset(cfg, which, cfg.data.frames, "frames", say=lambda words: None)
        first = next((s for s in ("pretrain", "lofi", "features") if s in cfg.stages), None)  # it makes the encoder, or takes one from elsewhere
        for key, path, stage in (("pretrain.start", cfg.pretrain.start, "pretrain"), ("pretrain.checkpoint", cfg.pretrain.checkpoint, first),
                                 ("detect.classes_from", cfg.detect.classes_from, "detect")):
            if stage in todo and path not in (None, "torchvision", "own", "ground_truth") and not os.path.isfile(path):
                raise FileNotFoundError(f"no file {path} (config key {key})")


def build_encoder(cfg, path=None, **options):
    return make_encoder(**cfg.encoder, weights=path, **options)


def build_localizer(cfg, **options):
    return Localizer(cfg.tal_head, cfg[cfg.tal_head], **options)


def fit(model, dataset, fidelities, options, cfg, process, name, **cycle):
    return train(model, dataset, fidelities, options=options, loss=cfg.loss, seed=cfg.seed, name=name, folder=f"{cfg.out}/{name}", process=process,
                 workers=cfg.data.workers, save_sec=cfg.checkpoint_sec, about=config.about(cfg), **cycle)


def subset(cfg, which, source, kind, say):
    return data.select(load_annotations(cfg.data.annotations), cfg.data[f"{which}_subset"], source, kind, say, durations=cfg.data.durations, frames=cfg.data.frames, settings=data.settings_of(cfg.data))


def full_fidelity(cfg):
    return data.Fidelity("full", cfg.data.snippets, cfg.data.size)


def frame_options(cfg):
    return {"stride": cfg.data.stride, "crop": cfg.data.crop, "flip": cfg.data.flip, "seed": cfg.seed}


def video_dataset(cfg, process, which, train):
    videos = subset(cfg, which, cfg.data.frames, "frames", process.say)
    return data.VideoDataset(videos, cfg.data.frames, classes=data.class_names(videos), snippets=cfg.data.snippets, frames=cfg.data.frames_per_snippet, train=train,
                             rate=cfg.data.rate, **frame_options(cfg))


# ---------------------------------------------------------------- stages

def pretrain(cfg, process):
    """Encoder before localization: random, or trained by one of the classification tasks of pretrain.py."""
    method, checkpoint = cfg.pretrain.method, cfg.pretrain.checkpoint
    torch.manual_seed(data.seed_of(cfg.seed, "encoder"))
    encoder, seconds, records = build_encoder(cfg, checkpoint or cfg.pretrain.start), engine.seconds_of(checkpoint), {}
    left = phases(method, checkpoint)
    if checkpoint:
        process.say(f"pretrain: goes on from the encoder {checkpoint}" if left else f"pretrain: nothing to train, the encoder is {checkpoint}")
    for phase in left:
        options = options_of(cfg.pretrain, phase)
        clips = clips_of(phase, options, lambda: [subset(cfg, which, cfg.data.frames, "frames", process.say) for which in ("train", "val")], cfg.data.snippets, process.say,
                         (cfg.data.train_subset, cfg.data.val_subset))
        took, records[phase] = train_classifier(encoder, clips, size=cfg.data.size, options=options, name=phase, folder=f"{cfg.out}/pretrain/{phase}",
                                                process=process, workers=cfg.data.workers, save_sec=cfg.checkpoint_sec, **frame_options(cfg))
        seconds += took
    if process.is_main:
        engine.save_json({"method": method, "start": cfg.pretrain.start, "checkpoint": checkpoint, "phases": records}, f"{cfg.out}/pretrain/accuracy.json")
    save_encoder(cfg, process, encoder, "pretrain", seconds)


def save_encoder(cfg, process, encoder, stage, seconds):
    if process.is_main:
        engine.save_weights(encoder, f"{cfg.out}/{stage}/encoder.pt", encoder=dict(cfg.encoder), seconds=seconds)


def encoder_path(cfg, stage):
    """The encoder that `stage` starts from: the product of the stage before it in this run, or a checkpoint from elsewhere."""
    before = [s for s in ("pretrain", "lofi") if s in cfg.stages and s != stage]
    if not before and cfg.pretrain.checkpoint in (None, "torchvision"):
        raise ValueError(f"stage {stage} needs an encoder: list stage pretrain before it, or name a file in pretrain.checkpoint")
    return f"{cfg.out}/{before[-1]}/encoder.pt" if before else cfg.pretrain.checkpoint


def low_fidelity_cycle(cfg):
    known = data.fidelities(cfg.data.snippets, cfg.data.size, r_t=cfg.fidelity.r_t, r_s=cfg.fidelity.r_s, st=(cfg.fidelity.st_r_t, cfg.fidelity.st_r_s))
    config.check_words({"lofi.cycle": (cfg.lofi.cycle or [None], known)})
    return [known[f] for f in cfg.lofi.cycle]


def end_to_end(cfg, path, device, classes):
    torch.manual_seed(data.seed_of(cfg.seed, "lofi"))
    encoder = build_encoder(cfg, path, frozen_bn=cfg.lofi.batchnorm == "frozen")
    if cfg.lofi.compile:
        encoder.compile()
    return build_localizer(cfg, channels=encoder.channels, encoder=encoder, classes=classes if cfg.lofi.class_weight else 0).to(device)


def lofi(cfg, process):
    """Section 3.2: encoder and head together at low fidelity. The head only serves to train the encoder, and is thrown away."""
    path, dataset = encoder_path(cfg, "lofi"), video_dataset(cfg, process, "train", train=True)
    model = end_to_end(cfg, path, process.device, len(dataset.classes))
    seconds = fit(model, dataset, low_fidelity_cycle(cfg), cfg.lofi, cfg, process, "lofi", cycle=cfg.lofi.order, period=cfg.lofi.period)
    if cfg.lofi.batchnorm == "recalibrate":
        started = time.monotonic()
        recalibrate(model.encoder, video_dataset(cfg, process, "train", train=False), full_fidelity(cfg), cfg.features.chunk, process=process, workers=cfg.data.workers)
        seconds += time.monotonic() - started
    save_encoder(cfg, process, model.encoder, "lofi", seconds + engine.seconds_of(path))


def features(cfg, process):
    """The frozen encoder over every video at full fidelity, each rank its share, a file each."""
    path, started = encoder_path(cfg, "features"), time.monotonic()
    encoder = build_encoder(cfg, path).to(process.device).eval()
    encoded, total, parts, videos = 0, 0, [], {}
    for which in ("train", "val"):
        dataset = video_dataset(cfg, process, which, train=False)
        missing = [i for i, name in enumerate(data.names_of(dataset.videos)) if not os.path.exists(f"{cfg.out}/features/{name}.npy")]
        total, encoded = total + len(dataset.videos), encoded + len(missing)
        videos |= data.describe(dataset.videos) if process.is_main else {}
        engine.barrier(process)  # every rank has looked before any writes
        dataset = dataset.only(missing)
        for batch in engine.batches(dataset, full_fidelity(cfg), 1, data.collate, name=f"features {which}", process=process, workers=cfg.data.workers):
            parts.append(encode(encoder, batch["frames"], cfg.features.chunk, process.autocast)[0].t().cpu())
            if batch["last"]:
                x, parts = torch.cat(parts).numpy(), []  # (L, C)
                engine.write_aside(f"{cfg.out}/features/{batch['name'][0]}.npy", partial(np.save, arr=x, allow_pickle=False))
    engine.barrier(process)
    if process.is_main:
        seconds = (time.monotonic() - started) * total / max(encoded, 1)  # resumed: as if this start had encoded all
        engine.save_json({"encoder": path, "encoder_sha256": data.file_hash(path), **cfg.encoder, "snippets": cfg.data.snippets,
                          "frames_per_snippet": cfg.data.frames_per_snippet, "stride": cfg.data.stride, "size": cfg.data.size,
                          "snippet_stride_sec": 1 / cfg.data.rate if cfg.data.rate else "duration_sec / snippets",
                          "snippet_window_frames": cfg.data.frames_per_snippet * cfg.data.stride, "seconds": seconds + engine.seconds_of(path), "videos": videos},
                         f"{cfg.out}/features/features.json")


def feature_folder(cfg, raw=False):
    """Where the head's features lie: behind stage sola, if it is listed, else `raw`, from elsewhere or this run's own."""
    return f"{cfg.out}/sola/features" if "sola" in cfg.stages and not raw else cfg.data.features or f"{cfg.out}/features"


def feature_dataset(cfg, process, which, classes=None, raw=False):
    folder = feature_folder(cfg, raw)
    videos = subset(cfg, which, folder, "features", process.say)
    dataset = data.FeatureDataset(videos, folder, classes or data.class_names(videos))
    return data.WindowDataset(dataset, cfg.data.snippets, train=which == "train") if cfg.data.windows and not raw else dataset


def sola(cfg, process):
    """Soft landing (SoLa, CVPR 2023): a residual module on top of the raw features, trained without labels; the stages after it see its output."""
    train, val = (feature_dataset(cfg, process, which, raw=True) for which in ("train", "val"))
    train_sola.run(train, val, feature_folder(cfg, raw=True), options=cfg.sola, snippets=cfg.data.snippets, folder=f"{cfg.out}/sola", process=process,
                   seed=cfg.seed, workers=cfg.data.workers, save_sec=cfg.checkpoint_sec, about=config.about(cfg))


def head(cfg, process):
    """A fresh head at full fidelity on frozen features (section 3.1, stage 3), and beside it a linear classifier of the mean feature."""
    dataset = feature_dataset(cfg, process, "train")
    torch.manual_seed(data.seed_of(cfg.seed, "head"))
    model = build_localizer(cfg, channels=dataset.channels, classes=len(dataset.classes))
    if cfg.head.standardize:
        model.mean[:], model.std[:], model.video_std[:] = dataset.statistics()
    seconds = fit(model.to(process.device), dataset, [full_fidelity(cfg)], cfg.head, cfg, process, "head")
    if process.is_main:
        engine.save_weights(model, f"{cfg.out}/head/head.pt", classes=dataset.classes, seconds=seconds, training=data.fingerprint(dataset.videos))


def detect(cfg, process):
    """Proposals of every validation video, each rank its share; soft-NMS, classes, result JSON, metrics."""
    started, path = time.monotonic(), f"{cfg.out}/head/head.pt"
    if not os.path.exists(path):
        raise FileNotFoundError(f"stage detect needs {path}: list stage head before it")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    dataset = feature_dataset(cfg, process, "val", saved["classes"])
    model = build_localizer(cfg, channels=dataset.channels, classes=len(dataset.classes))
    model.load_state_dict(saved["model"])
    model.to(process.device).eval()
    duration, results, proposals = {v.name: v.duration for v in dataset.videos}, {}, {}
    source = {"own": "video classifier of the run", "ground_truth": "ground truth (analysis)"}.get(cfg.detect.classes_from, f"external file {cfg.detect.classes_from}")
    if cfg.detect.classes_from != "own":
        truth, row = cfg.detect.classes_from == "ground_truth", {name: i for i, name in enumerate(duration)}
        scores, classes = evaluate.load_class_scores(cfg.data.annotations if truth else cfg.detect.classes_from, list(row), subset=cfg.data.val_subset, ground_truth=truth)
    for batch in engine.batches(dataset, full_fidelity(cfg), 1 if cfg.data.windows else 32, data.collate, name="detect", process=process):
        names, x = batch["name"], batch["features"]
        x, windows = (x[0], (batch["first"][0], batch["snippets"].item())) if cfg.data.windows else (x, None)
        class_scores = None if cfg.detect.classes_from == "own" else (scores[[row[n] for n in names]], classes)
        found = detections(model, x, names, [duration[n] for n in names], dataset.classes, sigma=cfg.detect.sigma, top_k=cfg.detect.top_k,
                           classes_per_video=cfg.detect.classes_per_video, class_scores=class_scores, windows=windows)
        results |= found[0]
        proposals |= found[1]
    results, proposals = ({k: v for part in engine.gather(x, process) for k, v in part.items()} for x in (results, proposals))
    if not process.is_main:
        return
    order = [v.name for v in dataset.videos]  # one order, however many ranks
    evaluate.save_results({v: proposals[v] for v in order}, f"{cfg.out}/proposals.json", seed=cfg.seed)
    evaluate.save_results({v: results[v] for v in order}, f"{cfg.out}/result.json", class_source=source, seed=cfg.seed)
    metrics, words = score(cfg.data.annotations, cfg.out, cfg.data.val_subset, cfg.detect.tiou, len(load_annotations(cfg.data.annotations)[cfg.data.val_subset].segments) > 0)
    seconds = sum(f.get("seconds", 0.0) for f in data.facts_of_features(feature_folder(cfg))) + saved["seconds"] + time.monotonic() - started
    engine.save_json({**metrics, "seconds": seconds, "seed": cfg.seed, "videos": data.list_hash(order), "training": saved.get("training")}, f"{cfg.out}/metrics.json")
    process.say(f"{cfg.out}: {words}")


STAGES = {stage.__name__: (stage, product) for stage, product in (
    (pretrain, "pretrain/encoder.pt"), (lofi, "lofi/encoder.pt"), (features, "features/features.json"), (sola, "sola/features/features.json"), (head, "head/head.pt"), (detect, "metrics.json"))}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, help="a YAML of configs/")
    parser.add_argument("--set", nargs="+", default=[], action="extend", metavar="key.sub=value", help="change single keys")
    parser.add_argument("--dry-run", action="store_true", help="no data: build everything, one step at each fidelity")
    args = parser.parse_args(argv)
    try:
        cfg = config.load(args.cfg, args.set)
        check(cfg, files=not args.dry_run)
        process = engine.start_process(cfg.device, cfg.precision)
        if args.dry_run:
            for phase in phases(cfg.pretrain.method, cfg.pretrain.checkpoint) if "pretrain" in cfg.stages else ():
                dry_run_phase(build_encoder(cfg), phase, options_of(cfg.pretrain, phase), size=cfg.data.size, process=process)
            if {"pretrain", "lofi", "features"}.isdisjoint(cfg.stages):
                process.say(f"stages {', '.join(cfg.stages)} go on from features, whose channels only the data tell: no encoder to try")
            elif {"lofi", "features"} & set(cfg.stages):
                dry_run(end_to_end(cfg, None, process.device, classes=200), low_fidelity_cycle(cfg), cfg.data.frames_per_snippet, options=cfg.lofi, loss=cfg.loss, process=process)
        else:
            config.open_run(cfg, engine.save_json, process.is_main, device=str(process.device), machine=engine.machine_of(process.device), threads=torch.get_num_threads(), processes=process.world)
            took = []
            for name in [s for s in STAGES if s in cfg.stages]:
                engine.barrier(process)
                (stage, product), started = STAGES[name], time.monotonic()
                if os.path.exists(f"{cfg.out}/{product}"):
                    process.say(f"{name}: done already, {cfg.out}/{product}")
                else:
                    stage(cfg, process)
                    took.append(f"{name} {time.monotonic() - started:.1f} s")
            process.say(f"{cfg.out}: {', '.join(took) or 'nothing was left to do'}; peak memory {engine.peak_memory_gb(process.device):.2f} GB a process")
        engine.end_process(process)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit("lofi_tal.py: " + str(error).rsplit("\nValueError: ", 1)[-1])  # a loader's worker wraps its own in a traceback
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        sys.exit(f"lofi_tal.py: out of memory: {str(error).splitlines()[0]}\nin stage lofi set lofi.chunk (the memory of so many snippets) or lofi.accumulate (micro-batches), "
                 "both with the same gradient, or encoder.recompute; in stage features, a smaller features.chunk; in the others, a smaller batch_size, in another `out`")
    except KeyboardInterrupt:  # outside of training, which saves its state first
        sys.exit("lofi_tal.py: interrupted; the same command goes on from the last finished file")


if __name__ == "__main__":
    main()
