"""Train and evaluate LoFi: a video encoder optimized for temporal action localization, end to end
at low fidelity (Xu et al., NeurIPS 2021).

    python lofi_tal.py --cfg configs/toy.yaml                           one process, CPU or GPU
    torchrun --nproc_per_node=4 lofi_tal.py --cfg configs/anet13.yaml   the same global batch

The config lists the stages. One whose last file here exists is skipped, others start or resume:
    pretrain  the encoder before localization             OUT/pretrain/encoder.pt
    lofi      encoder and head end to end, low fidelity   OUT/lofi/encoder.pt
    features  the frozen encoder at full fidelity         OUT/features/VIDEO.npy, features.json
    sola      soft landing, on features without labels    OUT/sola/sola.pt, features/ as above
    head      a fresh head and a classifier               OUT/head/head.pt
    detect    proposals, soft-NMS, classes, mAP           OUT/result.json, OUT/metrics.json
"""

import os
import time
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import config
import data
import evaluate
import localizer
import pretrain
import sola
from localizer import Distributed, Localizer, build_encoder, localization_step


def setup_distributed(cfg):
    """Join torchrun's process group if it started this process, else run alone."""
    device, backend = torch.device("cpu"), "gloo"
    if cfg.device != "cpu" and torch.cuda.is_available():
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), "nccl"
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # inputs have few shapes, one a fidelity
    if "RANK" not in os.environ:
        return Distributed(0, 1, device, cfg.precision)
    # After a restart torchrun's store still holds the addresses of dead processes.
    group = localizer.fresh_group()
    hour = timedelta(hours=1)  # so much longer one process may encode than another
    device_id = device if backend == "nccl" else None
    dist.init_process_group(backend, timeout=hour, device_id=device_id, **group)
    return Distributed(dist.get_rank(), dist.get_world_size(), device, cfg.precision)


def train(model, dataset, fidelities, backward, name, options, cfg, ddp, **sampling):
    """Train `model` in place and return the seconds that it took, with those of earlier starts.

    backward(net, batch, generator): forward and backward of a batch through `net`, the model or
    its DDP wrapper; returns {term: loss}. name: the folder below cfg.out. options: epochs, batch
    size, optimizer. ddp: the Distributed, also of a process alone. sampling: of the sampler.
    """
    task = name.rpartition("/")[2]
    ranks = {"rank": ddp.rank, "world_size": ddp.world_size}
    order = {"seed": data.seed_of(cfg.seed, task), **ranks, **sampling}
    sampler = data.CyclicFidelitySampler(len(dataset), options["batch_size"], fidelities, **order)
    model.to(ddp.device)
    loader = data.BatchLoader(dataset, sampler, cfg.data.workers, ddp.device)
    optimizer = checkpoint.build_optimizer(model, options)
    progress = checkpoint.Progress(name, model, optimizer, sampler, options, cfg, ddp)
    progress.resume(trained_on=data.fingerprint(dataset.videos), config=config.snapshot(cfg))
    net = DistributedDataParallel(model) if ddp.world_size > 1 else model
    net.train()
    max_norm = options.get("clip_grad_norm") or float("inf")  # inf: measured, not clipped
    with checkpoint.StopSignals() as signals, localizer.global_batchnorm(model, ddp):
        for epoch in range(progress.epoch, options["epochs"]):
            sampler.set_epoch(epoch, progress.step)  # resumes here: step 0 but in the first epoch
            progress.start_epoch()
            for i, batch in enumerate(progress.batches(loader), progress.step):
                lr = checkpoint.learning_rate(options, epoch + i / sampler.steps_per_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = lr

                # Seeded by step, so resuming is exact: dropout by rank, a loss's subsets alike.
                torch.manual_seed(data.seed_of(cfg.seed, task, epoch, i, ddp.rank))
                generator = torch.Generator().manual_seed(data.seed_of(cfg.seed, task, epoch, i))
                optimizer.zero_grad(set_to_none=True)
                losses = backward(net, data.to_device(batch, ddp.device), generator=generator)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)

                # What one rank meets ends all: a bad step before it reaches weights, or a signal.
                finite = torch.isfinite(losses["loss"] + norm)
                flags = {"bad": ~finite, "stop": bool(signals.received), "wait": progress.wait}
                means = ddp.mean_of({**losses, "gradient_norm": norm, **flags})
                progress.stop_if_bad(means.pop("bad"), batch["name"], losses["loss"], norm)
                stop = means.pop("stop")
                optimizer.step()
                progress.end_step(means)
                if stop or time.monotonic() - progress.last_save > cfg.checkpoint_sec:
                    progress.save()
                if stop:
                    ddp.log(f"{progress.title}: stopped after step {i + 1}; rerun to resume")
                    raise SystemExit(128 + signals.number)
            progress.end_epoch()
    return time.monotonic() - progress.started


def pretrain_stage(cfg, run, ddp):
    """Get the encoder before localization: random, from a file, or trained to classify clips."""
    weights = cfg.pretrain.pretrained or cfg.pretrain.init
    ddp.log(f"pretrain: starting from {weights} weights")
    torch.manual_seed(data.seed_of(cfg.seed, "encoder"))
    encoder = build_encoder(**cfg.encoder, weights=weights)
    tasks = pretrain.tasks_of(cfg.pretrain.method, cfg.pretrain.pretrained)
    records = {task: pretrain_task(encoder, task, cfg, ddp) for task in tasks}
    if ddp.is_main:
        checkpoint.save_json({**cfg.pretrain, "tasks": records}, run.accuracy)
        seconds = sum(record["seconds"] for record in records.values())
        config.save_encoder(encoder, cfg, run, "pretrain", seconds)


def pretrain_task(encoder, task, cfg, ddp):
    """Train the encoder below a linear classifier of clips; return a record of how it went."""
    options = pretrain.task_options(cfg.pretrain, task)
    clips = pretrain.load_clips(task, options, **config.clip_sources(cfg, task, ddp.log))
    views = {"frames": options["frames"], **{k: cfg.video[k] for k in ("stride", "crop", "flip")}}
    train_set = pretrain.ClipDataset(clips.train, train=True, seed=cfg.seed, **views)
    torch.manual_seed(data.seed_of(cfg.seed, task))
    model = pretrain.ClipClassifier(encoder, len(clips.classes))
    step = partial(pretrain.classification_step, autocast=ddp.autocast)
    full = data.Fidelity("full", 1, cfg.video.size)
    group = {"group_size": train_set.group_size}
    seconds = train(model, train_set, [full], step, f"pretrain/{task}", options, cfg, ddp, **group)
    val_set = pretrain.ClipDataset(clips.val, **views)
    batches = data.iterate(val_set, full, 64, workers=cfg.data.workers, **ddp.place)
    record = pretrain.held_out_accuracy(model, batches, clips, ddp)
    ddp.log(f"{task}: held-out accuracy {record['top1']}, chance {record['chance']}")
    return {**record, "seconds": seconds}


def lofi_stage(cfg, run, ddp):
    """Section 3.2: train encoder and head together at low fidelity; the head is thrown away."""
    dataset = config.video_dataset(cfg, "train", ddp.log, train=True)
    weights = config.encoder_path(cfg, run, "lofi")
    torch.manual_seed(data.seed_of(cfg.seed, "lofi"))
    options = {"frozen_bn": cfg.lofi.batchnorm == "frozen", "compile": cfg.lofi.compile}
    encoder = build_encoder(**cfg.encoder, weights=weights, **options)
    classes = dataset.classes if cfg.lofi.class_weight else ()
    sizes = config.head_options(cfg, encoder.channels)
    model = Localizer(**sizes, classes=classes, encoder=encoder)
    fidelities = [config.run_fidelities(cfg)[name] for name in cfg.lofi.fidelities]
    cycle = {"cycle": cfg.lofi.cycle, "cycle_length": cfg.lofi.cycle_length}
    step = partial(localization_step, loss=cfg.loss, options=cfg.lofi, ddp=ddp)
    seconds = train(model, dataset, fidelities, step, "lofi", cfg.lofi, cfg, ddp, **cycle)
    if cfg.lofi.batchnorm == "recalibrate":
        videos = config.video_dataset(cfg, "train", ddp.log)
        seconds += localizer.recalibrate(encoder, videos, cfg.data.workers, ddp, **cfg.features)
    if ddp.is_main:
        config.save_encoder(encoder, cfg, run, "lofi", seconds)


def features_stage(cfg, run, ddp):
    """Encode every video once, at full fidelity, with the frozen encoder."""
    weights = config.encoder_path(cfg, run, "features")
    encoder = build_encoder(**cfg.encoder, weights=weights).to(ddp.device).eval()
    encode = partial(localizer.extract_features, encoder, context=ddp.autocast, **cfg.features)
    datasets = [config.video_dataset(cfg, split, ddp.log) for split in ("train", "val")]
    seconds = localizer.write_features(datasets, encode, run.features, cfg.data.workers, ddp)
    if ddp.is_main:
        config.save_feature_info(cfg, run, weights, datasets, seconds)


def sola_stage(cfg, run, ddp):
    """Train SoLa's residual module by sola.similarity_matching_loss (stop-gradient), apply it."""
    datasets = [config.feature_dataset(cfg, run, s, ddp.log, raw=True) for s in ("train", "val")]
    torch.manual_seed(data.seed_of(cfg.seed, "sola"))
    module = sola.SoLa(datasets[0].channels, cfg.sola.hidden, cfg.sola.kernel)
    predictor = sola.Predictor(datasets[0].channels, cfg.sola.hidden)
    similarity = (cfg.sola.positions, cfg.sola.similarity_coefficient)
    model = sola.SimilarityMatching(module, predictor, *similarity)
    if cfg.sola.standardize:
        module.mean[:], module.std[:], _ = datasets[0].statistics()
    subsequences, options = config.subsequences(cfg, datasets, ddp)
    step = partial(sola.similarity_step, autocast=ddp.autocast)
    seconds = train(model, subsequences, [data.NATIVE], step, "sola", options, cfg, ddp)
    module.eval().requires_grad_(False)
    seconds += localizer.write_features(datasets, module, run.sola_features, cfg.data.workers, ddp)
    if ddp.is_main:
        checkpoint.save_weights(module, run.sola, **{**options, **module.sizes})
        config.save_sola_info(cfg, run, datasets, seconds)


def head_stage(cfg, run, ddp):
    """Section 3.1: train a fresh head and a classifier at full fidelity; 3.3: search its lr."""
    if isinstance(cfg.head.lr, list):
        return config.search_lr(cfg, run, ddp, run_stages)
    dataset = config.feature_dataset(cfg, run, "train", ddp.log)
    torch.manual_seed(data.seed_of(cfg.seed, "head"))
    model = Localizer(**config.head_options(cfg, dataset.channels), classes=dataset.classes)
    if cfg.head.standardize:
        model.mean[:], model.std[:], model.video_std[:] = dataset.statistics()
    step = partial(localization_step, loss=cfg.loss, options=cfg.head, ddp=ddp)
    full = [config.run_fidelities(cfg)["full"]]
    seconds = train(model, dataset, full, step, "head", cfg.head, cfg, ddp)
    if ddp.is_main:
        metadata = {"seconds": seconds, "trained_on": data.fingerprint(dataset.videos)}
        checkpoint.save_weights(model, run.head, classes=dataset.classes, **metadata)


def detect_stage(cfg, run, ddp):
    """Find segments in the validation videos, each rank its share; NMS, classes, metrics."""
    started = time.monotonic()
    dataset = config.feature_dataset(cfg, run, "val", ddp.log)
    model, saved = Localizer.load(run.head, **config.head_options(cfg, dataset.channels))
    model.to(ddp.device).eval()
    class_scores, source = config.class_scores(cfg, dataset.videos)
    full = config.run_fidelities(cfg)["full"]
    options = cfg.detect | {"windows": cfg.data.windows}
    detections, proposals = localizer.detect(model, dataset, full, options, class_scores, ddp)
    if ddp.is_main:
        evaluate.save_results(proposals, run.proposals, seed=cfg.seed)
        evaluate.save_results(detections, run.result, class_source=source, seed=cfg.seed)
        seconds = saved["seconds"] + time.monotonic() - started
        summary = config.score_run(cfg, run, dataset.videos, saved["trained_on"], seconds)
        ddp.log(summary)  # metrics.json is written


def run_stages(cfg, pending, ddp):
    """Run those stages of a config that are still to run, in its folder."""
    run = config.open_run(cfg, ddp, pending)
    stages = pretrain_stage, lofi_stage, features_stage, sola_stage, head_stage, detect_stage
    for name, stage in zip(config.STAGES, stages, strict=True):
        ddp.barrier()
        if name in pending:
            started = time.monotonic()
            if ddp.is_main:  # what it works on, for later starts
                checkpoint.save_json(config.stage_inputs(cfg, run, name), run.inputs(name))
            stage(cfg, run, ddp)
            ddp.log(f"stage {name} took {time.monotonic() - started:.1f} s")
        elif name in cfg.stages:
            ddp.log(f"stage {name} is done: {run.path}/{config.STAGES[name]}")


def main(argv=None):
    with config.one_line_errors("lofi_tal.py"), checkpoint.StopSignals(defer=False):
        cfg = config.from_command_line(__doc__, argv)
        run_stages(cfg, config.check(cfg), setup_distributed(cfg))
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
