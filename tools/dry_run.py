"""Build a config's networks and take training steps of random data; needs no data, writes nothing.

python -m tools.dry_run --cfg configs/anet13.yaml [--set key.sub=value ...]
"""

import time
from functools import partial

import torch

import checkpoint
import config
import data
import pretrain
from localizer import Localizer, build_encoder, localization_step
from lofi_tal import setup_distributed

# As ImageNet, Kinetics-400 and ActivityNet have; else two playbacks.
CLASSES = {"icp": 1000, "acp": 400, "acp_plus": 200, "acp_plus_background": 201}


def try_step(title, model, shape, step, options, ddp):
    """Take a training step on frames of this shape and log what it took."""
    started = time.monotonic()
    frames = torch.randint(0, 256, shape, dtype=torch.uint8)
    batch = {"frames": frames, "segments": [torch.tensor([[0.2, 0.6]])]}
    batch["label"] = torch.zeros(shape[0], dtype=torch.int64)
    batch["labels"] = batch["label"][:, None]
    batch["target"] = torch.full((shape[0], 200), 1 / 200)
    optimizer = checkpoint.build_optimizer(model.to(ddp.device).train(), options)
    loss = step(model, data.to_device(batch, ddp.device), generator=None)["loss"].item()
    optimizer.step()
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    memory = f"peak memory so far {checkpoint.peak_memory_gb(ddp.device):.2f} GB"
    measured = f"loss {loss:.2f}, {time.monotonic() - started:.1f} s, {memory}"
    ddp.log(f"{title}: {millions:.2f} M parameters, frames {shape}, {measured}")


def dry_run(cfg, ddp):
    """Classify two clips in each task, and localize in one video at each fidelity."""
    if not {"pretrain", "lofi", "features"} & set(cfg.stages):
        ddp.log(f"stages {', '.join(cfg.stages)} begin with features: no encoder to try")
    tasks = pretrain.tasks_of(cfg.pretrain.method, cfg.pretrain.pretrained)
    for task in tasks if "pretrain" in cfg.stages else ():
        classes = CLASSES.get(task, 2)
        options = pretrain.task_options(cfg.pretrain, task)
        model = pretrain.ClipClassifier(build_encoder(**cfg.encoder), classes)
        shape = (2, 1, options["frames"], 3, cfg.video.size, cfg.video.size)
        step = partial(pretrain.classification_step, autocast=ddp.autocast)
        try_step(f"{task}, {classes} classes", model, shape, step, options, ddp)

    options = {"frozen_bn": cfg.lofi.batchnorm == "frozen", "compile": cfg.lofi.compile}
    encoder = build_encoder(**cfg.encoder, **options)
    classes = [f"class {k}" for k in range(200)] if cfg.lofi.class_weight else ()
    sizes = config.head_options(cfg, encoder.channels)
    model = Localizer(**sizes, classes=classes, encoder=encoder)
    step = partial(localization_step, loss=cfg.loss, options=cfg.lofi, ddp=ddp)
    for name in cfg.lofi.fidelities if {"lofi", "features"} & set(cfg.stages) else ():
        snippets, size = {"full": (cfg.video.snippets, cfg.video.size), **cfg.fidelities}[name]
        shape = (1, snippets, cfg.video.frames_per_snippet, 3, size, size)
        title = f"{name}, features (1, {encoder.channels}, {snippets})"
        try_step(title, model, shape, step, cfg.lofi, ddp)


def main(argv=None):
    with config.one_line_errors("tools.dry_run"):
        cfg = config.from_command_line(__doc__, argv)
        config.check(cfg, files=False)
        dry_run(cfg, setup_distributed(cfg))


if __name__ == "__main__":
    main()
