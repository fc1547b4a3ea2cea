"""Read a run's config: configs/default.yaml, then a file, then key=value overrides; check it.

What a config names on disk is looked at before the first stage starts (`check`), and its run folder
keeps a copy (`open_run`), with the versions of everything that made the numbers.
"""

import argparse
import contextlib
import difflib
import functools
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import reprlib
import subprocess
import sys
import warnings

import numpy as np
import torch
import torchvision
import yaml

import checkpoint
import data
import evaluate
import sola
import tsm
import video_encoders
from checkpoint import RunFolder, load_json, save_json
from media import FrameZip, InputError

HERE = os.path.dirname(os.path.abspath(__file__))
DEFAULT = f"{HERE}/configs/default.yaml"

# The stages, in this order however a config lists them, and what each leaves last in the folder.
STAGES = {
    "pretrain": "pretrain/encoder.pt",
    "lofi": "lofi/encoder.pt",
    "features": "features/features.json",
    "sola": "sola/features/features.json",
    "head": "head/head.pt",
    "detect": "metrics.json",
}

# Who made the classes of a run's detections, by cfg.classes.
CLASS_SOURCES = {"video": "video classifier of the run"}
CLASS_SOURCES |= {"segment": "segments, classifier of the run"}

# Keys that may change between two starts of a run; with COST_KEYS only time and memory change.
FREE_KEYS = {"data.workers", "device", "checkpoint_sec", "log_every", "tensorboard"}
COST_KEYS = {"lofi.chunk_snippets", "lofi.accumulate", "encoder.recompute"}
COST_KEYS |= {"features.chunk_snippets"}

# One class for what a user can mend, repeated in the files that can be copied alone.
INPUT_ERRORS = (InputError, *(m.InputError for m in (tsm, video_encoders, evaluate, sola)))

OUT_OF_MEMORY = """in stage lofi set lofi.chunk_snippets or lofi.accumulate (the same gradient) or
encoder.recompute, in stage features a smaller features.chunk_snippets, else a smaller batch_size"""


@contextlib.contextmanager
def one_line_errors(program):
    """End a program with one line for what its user can mend; a slip of ours stays a traceback."""
    # Closed, as by `>&-`; what is opened here takes that place for good.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack letters of a name
    try:
        yield
    except INPUT_ERRORS as error:
        sys.exit(f"{program}: {error!s:.3000}")
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        sys.exit(f"{program}: no other process answers, did torchrun end? ({error!s:.300})")
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        first_line = str(error).partition("\n")[0]
        sys.exit(f"{program}: out of memory: {first_line}\n{OUT_OF_MEMORY}")
    except KeyboardInterrupt:
        sys.exit(f"{program}: interrupted; rerun the same command to resume")
    finally:
        data.stop_workers()


class Config(dict):
    """A dictionary whose keys are attributes too: cfg.lofi.lr."""

    def __getattr__(self, key):
        if key not in self:
            raise AttributeError(f"config has no key {key}")
        return self[key]


# ----------------------------------------------------------------------------------------- reading


class _Loader(yaml.SafeLoader):
    """Refuse duplicate keys, of which YAML keeps the last, and read 1e-4 as a number."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        key = next((key for key, _ in node.value[::-1] if keys.count(key.value) > 1), None)
        if key:
            raise yaml.MarkedYAMLError(None, None, f"duplicate key {key.value}", key.start_mark)
        return super().construct_mapping(node, deep)


_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, "-+0123456789")


def _parse_yaml(text, source):
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, *data.MALFORMED) as error:  # `!!bool x` is a KeyError
        mark, reason = getattr(error, "problem_mark", None), " ".join(str(error).split())
        reason = f"{error.problem}, line {mark.line + 1}" if mark else reason
        raise InputError(f"{source} is not valid YAML: {reason:.300}") from None


def _read_yaml(path):
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"no config file {path} ({error}): name one of configs/") from None
    content = _parse_yaml(text, path) or {}
    if not isinstance(content, dict):
        raise InputError(f"{path} is a {type(content).__name__}, expected keys and values")
    return content


_KINDS = {
    bool: "true or false",
    str: "text in quotes",
    type(None): "null",
    **dict.fromkeys((dict, Config), "a block of keys"),
    **dict.fromkeys((int, float), "a number"),
}
# Where the default is null, a number such as this is possible, elsewhere text.
NUMBERS = {"video.rate": 0.5, "lofi.chunk_snippets": 1, "lofi.cycle_length": 1}
NUMBERS |= {"gtad.durations": 1, "gtad.longest": 1}
LISTS = {"data.features", "head.lr"}  # which may be a list as well


def _kind(value):
    if isinstance(value, list):
        return f"a list, each {', '.join(sorted({str(_KINDS.get(type(x))) for x in value}))}"
    return _KINDS.get(type(value))


def _kinds(key, default):
    """Return the kinds of values that a key may have."""
    usual = _kind(NUMBERS.get(key, "") if default is None else default)
    kinds = [usual, f"a list, each {usual}"] if key in LISTS else [usual]
    return [*kinds, "null"] if default is None else kinds


def merge(base, changes, where="", kinds=None):
    """Return a new Config: `base` with `changes` in it; InputError for a key that base lacks, or a
    value of another kind than in `kinds` (default: base)."""
    kinds = base if kinds is None else kinds
    merged = Config({k: merge(v, {}) if isinstance(v, dict) else v for k, v in base.items()})
    for key, value in changes.items():
        if key not in base:
            near = difflib.get_close_matches(str(key), list(map(str, base)), 1, 0)[0]
            raise InputError(f"unknown config key {where}{key}; did you mean {where}{near}?")
        default, name = kinds[key], f"{where}{key}"
        kinds_of_key = _kinds(name, default)
        if _kind(value) not in kinds_of_key:
            # Of what may be lists of lists: a few lines of YAML with anchors stand for billions.
            words, expected = f"{reprlib.repr(value):.80}", " or ".join(kinds_of_key)
            raise InputError(f"config key {name} is {words}, expected {expected}")
        if isinstance(value, dict):
            value = merge(base[key], value, f"{where}{key}.", default)
        elif isinstance(default, int) and isinstance(value, float) and value.is_integer():
            value = int(value)  # 1e1 epochs
        merged[key] = value
    return merged


def load_config(path, overrides=()):
    """Return the config of a file over configs/default.yaml, changed by "key.sub=value" words."""
    default = _read_yaml(DEFAULT)
    defaults = flatten(default)
    cfg = merge(default, _read_yaml(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"--set {override:.80}: expected key.sub=value")
        change = _parse_yaml(text, f"--set {override:.80}")
        # A folder called 5 or 2024-01-15 is text, in which YAML reads a number or a date.
        if isinstance(defaults.get(key), str):
            change = text
        for part in reversed(key.split(".")):
            change = {part: change}
        cfg = merge(cfg, change, kinds=default)
    return cfg


def from_command_line(description, argv=None):
    """Return the config that --cfg and --set name."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    parser.add_argument("--cfg", required=True, help="a YAML of configs/")
    parser.add_argument("--set", nargs="+", default=[], action="extend", metavar="key.sub=value")
    args = parser.parse_args(argv)
    return load_config(args.cfg, args.set)


def saved_config(folder):
    """Return the Config of a run's folder."""
    path = RunFolder(folder).config
    try:
        return merge(_read_yaml(DEFAULT), load_json(path))
    except INPUT_ERRORS as error:
        remedy = "name the folder of a run, such as runs/toy-0/lofi"
        raise InputError(f"{path} is not the config of a run: {error}; {remedy}") from None


def flatten(cfg, where=""):
    """Return {"lofi.lr": 0.1, ...}."""
    flat = {}
    for key, value in cfg.items():
        inner = isinstance(value, dict)
        flat |= flatten(value, f"{where}{key}.") if inner else {f"{where}{key}": value}
    return flat


def differences(old, new, ignore=FREE_KEYS | COST_KEYS):
    """Return lines that say which keys of two configs differ, but those in `ignore`, the run's
    folder, which may move, and stages of which one list only goes on further."""
    old, new = flatten(old), flatten(new)
    if "recalibrate" in (old["lofi.batchnorm"], new["lofi.batchnorm"]):
        ignore = ignore - {"features.chunk_snippets"}  # statistics are of as many snippets at once
    for flat in (old, new):
        flat["stages"] = [stage for stage in STAGES if stage in flat["stages"]]
    if all(a == b for a, b in zip(old["stages"], new["stages"], strict=False)):
        ignore = ignore | {"stages"}
    keys = sorted((old.keys() | new.keys()) - ignore - {"out"})
    pairs = [(key, old.get(key), new.get(key)) for key in keys]
    lines = [f"  {key}: {was!r} there, {now!r} now" for key, was, now in pairs if was != now]
    more = len(lines) - 9
    return lines if more < 2 else [*lines[:9], f"  and {more} more keys"]


# ---------------------------------------------------------------------------------------- checking

CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "precision": ("auto", "float32", "bfloat16"),
    "tal_head": ("gtad", "bmn"),
    "classes": tuple(CLASS_SOURCES),
    "batchnorm": ("frozen", "train", "recalibrate"),
    "cycle": ("epoch", "batch"),
    "optimizer": ("sgd", "adam", "adamw"),
    "schedule": ("constant", "step", "cosine"),
    "decay": ("gaussian", "linear", "hard"),
}
# Other numbers are above 0 unless their default is 0, and whole if their default is.
MAY_BE_ZERO = {"momentum", "weight_decay", "class_weight", "shift_div", "workers", "positions"}
MAY_BE_ZERO |= {"checkpoint_sec", "confidence_power", "dropout", "layers"}
MAY_BE_ZERO |= {"window_overlap", "decay_above"}
AT_MOST_1 = {"val_share", "crop", "window_overlap", "decay_above", "voting", "tiou_thresholds"}


def check(cfg, files=True):
    """Return the stages that are still to run; InputError, with the key to change, for a value or,
    with `files`, a file that they cannot work with."""
    listed = [stage for stage in STAGES if stage in cfg.stages]
    pending = [stage for stage in listed if not os.path.exists(f"{cfg.out}/{STAGES[stage]}")]
    values = flatten(cfg)
    launcher = [os.environ.get(key, "") for key in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
    if "RANK" in os.environ and not (launcher[0].isdigit() and all(launcher)):
        raise InputError("RANK is set, but not all that torchrun sets: use torchrun, or unset RANK")
    rules = (_rules_of_one(values), _rules(cfg, pending), _rules_of_sizes(cfg, values, pending))
    for key, holds, expected in itertools.chain(*rules):
        if not holds:
            raise InputError(f"config key {key} is {values[key]!r:.200}, expected {expected}")
    if files:
        _check_files(cfg, values, set(pending))
    return pending


def reads_frames(cfg, stages):
    """Return whether one of these stages reads the frames of the annotated videos."""
    target_clips = "pretrain" in stages and "acp_plus" in cfg.pretrain.method
    return target_clips or "lofi" in stages or "features" in stages


def _rules_of_one(values):
    """Yield (key, whether its value can be used, what is expected) of choices and numbers."""
    usual = flatten(_read_yaml(DEFAULT)) | NUMBERS
    for key, value in values.items():
        name = key.rpartition(".")[2]
        default, numbers = data.as_list(usual[key]), data.as_list(value)
        if name in CHOICES:
            yield key, value in CHOICES[name], f"one of {', '.join(CHOICES[name])}"
        elif value == "":
            yield key, False, "text"
        elif _kind(numbers) == _kind([0]):
            whole = isinstance(default[0], int)
            zero = name in MAY_BE_ZERO or default[0] == 0
            most = 1 if name in AT_MOST_1 else sys.float_info.max
            holds = all(0 <= x <= most and (x or zero) for x in numbers)
            holds = holds and (not whole or all(isinstance(x, int) for x in numbers))
            expected = f"{'whole ' * whole}numbers {'of at least' if zero else 'above'} 0"
            expected += ", at most 1" * (most == 1)
            if len(default) == 2:  # a pair stays one
                holds, expected = holds and len(numbers) == 2, f"two {expected}"
            yield key, holds, expected


def _rules(cfg, pending):
    """Yield the same of keys with rules of their own, which count on those before."""
    lofi, elsewhere = cfg.lofi, cfg.data.features
    stages = [s for s in STAGES if not elsewhere or s not in ("lofi", "features")]
    words = f"some of {', '.join(STAGES)}; not lofi or features if data.features is set"
    yield "stages", all(s in stages for s in cfg.stages), words
    words = "true with video.rate, false without, for features of the run's own"
    yield "data.windows", elsewhere or cfg.data.windows == bool(cfg.video.rate), words
    no_gpu = cfg.device == "cuda" and not torch.cuda.is_available()
    yield "device", not no_gpu, "auto or cpu, as torch finds no GPU here"
    words = "false: it is not installed, or pip install -e '.[tensorboard]'"
    yield "tensorboard", not cfg.tensorboard or importlib.util.find_spec("tensorboard"), words
    names = ["full", *cfg.fidelities]
    yield "lofi.fidelities", all(f in names for f in lofi.fidelities), f"some of {', '.join(names)}"
    full = [cfg.video.snippets, cfg.video.size]
    for name in cfg.fidelities.keys() & lofi.fidelities if "lofi" in cfg.stages else ():
        snippets, size = cfg.fidelities[name]
        words = f"[snippets, pixels] up to {full}"
        yield f"fidelities.{name}", snippets <= full[0] and size <= full[1], words
    in_parts = lofi.chunk_snippets or lofi.accumulate > 1 or cfg.encoder.recompute
    words = "frozen with lofi.chunk_snippets, lofi.accumulate or encoder.recompute"
    yield "lofi.batchnorm", lofi.batchnorm == "frozen" or not in_parts, words
    words = f"at least two snippets, 0 to {cfg.sola.subsequence - 1}"
    holds = len(cfg.sola.positions) > 1 and max(cfg.sola.positions) < cfg.sola.subsequence
    yield "sola.positions", holds, words
    search = isinstance(cfg.head.lr, list) and "head" in cfg.stages
    yield "head.lr", not search or "detect" in cfg.stages, "one, without stage detect to compare"


def _rules_of_sizes(cfg, values, pending):
    """Yield the same of sizes of networks and of batches that must divide."""
    for key in ("gtad.kernel", "sola.kernel"):
        yield key, values[key] % 2, "an odd number"
    divided = {"gtad.gcn_groups": "gtad.gcn_width", "gtad.stem_groups": "gtad.hidden"}
    for key, channels in {**divided, "bmn.groups": "bmn.hidden"}.items():
        words = f"a divisor of {channels}, {values[channels]}"
        yield key, values[channels] % values[key] == 0, words
    world_size = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1
    blocks = {stage: cfg[stage] for stage in ("lofi", "sola", "head") if stage in pending}
    for task, block in cfg.pretrain.items() if "pretrain" in pending else ():
        if f"{cfg.pretrain.method}_".startswith(f"{task}_"):  # acp_plus goes on from acp
            blocks[f"pretrain.{task}"] = block
    for name, block in blocks.items():
        parts = world_size * block.get("accumulate", 1)
        words = f"a multiple of {parts}: {world_size} processes and their micro-batches"
        yield f"{name}.batch_size", block["batch_size"] % parts == 0, words


def _check_files(cfg, values, todo):
    subsets = read_annotations(cfg)
    train, val = cfg.data.train_subset, cfg.data.val_subset
    if {"lofi", "head"} & todo and train in subsets and not data.class_names(subsets[train]):
        raise InputError(f"subset {train} has no usable segment (start < end, within its video)")
    needed = {"frames": reads_frames(cfg, todo)}
    needed["features"] = cfg.data.features and {"sola", "head"} & todo
    for kind in filter(needed.get, needed):
        source, silent = cfg.data[kind], lambda message: None
        train_videos, _ = [load_videos(cfg, s, source, kind, silent) for s in ("train", "val")]
        if kind == "features" and "head" in todo:
            head_options(cfg, data.FeatureDataset(train_videos, source).channels)
    seconds_of_features(cfg.data.features or ())  # detect counts them: their features.json is read
    # A finished encoder is read by the first stage that has to do with one.
    first = next((s for s in ("pretrain", "lofi", "features") if s in cfg.stages), None)
    readers = {"pretrain.init": "pretrain", "pretrain.pretrained": first}
    for key, stage in {**readers, "detect.class_scores": "detect"}.items():
        word = values[key] in (None, "random", "torchvision", "own", "ground_truth")
        if stage in todo and not word and not os.path.isfile(values[key]):
            raise InputError(f"no file {values[key]} (config key {key})")
    if "detect" in todo and val in subsets:
        source, scored = cfg.detect.class_scores, any(video.labels for video in subsets[val])
        if not scored and (isinstance(cfg.head.lr, list) or source == "ground_truth"):
            words = "needed by a list as head.lr and detect.class_scores=ground_truth"
            raise InputError(f"subset {val} has no segments, {words}")
        # The last stage reads them by rules of its own: now, not after days of training.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            class_scores(cfg, subsets[val])
            if scored:
                evaluate.evaluate(ground_truth(cfg), {"results": {}}, subset=val)


# ------------------------------------------------------------------------------- inputs of the run

load_annotations = functools.lru_cache(1)(data.load_annotations)  # one reading serves all stages


def read_annotations(cfg):
    """Return the annotated videos, {subset: [data.Video, ...]}."""
    split = (cfg.data.train_subset, cfg.data.val_subset, cfg.data.val_share)
    return load_annotations(cfg.data.annotations, split)


def ground_truth(cfg, videos=()):
    """Return what evaluate.py reads: the annotations' JSON, or the same of a table, with the
    durations of `videos`."""
    if not cfg.data.annotations.lower().endswith(data.TABLES):
        return cfg.data.annotations
    known = {video.name: video for video in videos}
    subsets = read_annotations(cfg).items()
    return data.activitynet({name: [known.get(v.name, v) for v in vs] for name, vs in subsets})


def head_options(cfg, channels):
    """Return the arguments of Localizer but for its classes and encoder; InputError if the first
    convolution of its head cannot divide features of so many channels."""
    sizes = {"head": cfg.tal_head, "sizes": cfg[cfg.tal_head], "channels": channels}
    key = {"gtad": "stem_groups", "bmn": "groups"}[cfg.tal_head]
    if channels % sizes["sizes"][key]:
        words = f"config key {cfg.tal_head}.{key} is {sizes['sizes'][key]}"
        raise InputError(f"{words}, expected a divisor of {channels}, the features' channels")
    return sizes | {"per_segment": cfg.classifier if cfg.classes == "segment" else None}


def run_fidelities(cfg):
    """Return {name: data.Fidelity}: "full", and those of LoFi, section 3.2."""
    sizes = {"full": [cfg.video.snippets, cfg.video.size], **cfg.fidelities}
    return {name: data.Fidelity(name, *size) for name, size in sizes.items()}


def frame_settings(cfg):
    """Return what frames should be prepared for, as the video.json of a ZIP tells it."""
    video = cfg.video
    settings = {"frames": video.frames_per_snippet, "stride": video.stride, "rate": video.rate}
    return settings if video.rate else settings | {"snippets": video.snippets}


def load_videos(cfg, split, source, kind, log=print):
    """Return the videos of split "train" or "val" that have `kind` ("frames" or "features")."""
    known = {"durations": cfg.data.durations, "frames": cfg.data.frames}
    known |= {"settings": frame_settings(cfg), "subset": cfg.data[f"{split}_subset"]}
    return data.select_videos(read_annotations(cfg), source=source, kind=kind, log=log, **known)


def video_dataset(cfg, split, log=print, train=False):
    """Return the videos of a split, with their frames."""
    videos = load_videos(cfg, split, cfg.data.frames, "frames", log)
    classes = data.class_names(videos)
    options = {"train": train, "seed": cfg.seed, "window_overlap": cfg.data.window_overlap}
    return data.VideoDataset(videos, classes=classes, **options, **cfg.video)


def feature_source(cfg, run, raw=False):
    """Return where the head's features lie: after SoLa if it is listed, unless `raw`."""
    after_sola = "sola" in cfg.stages and not raw
    return run.sola_features if after_sola else cfg.data.features or run.features


def feature_dataset(cfg, run, split, log=print, raw=False):
    """Return the features that the head sees, training in windows; raw: what SoLa sees."""
    source = feature_source(cfg, run, raw)
    videos = load_videos(cfg, split, source, "features", log)
    in_windows = cfg.data.windows and split == "train" and not raw
    window = cfg.video.snippets if in_windows else None
    classes = data.class_names(videos)
    dataset = data.FeatureDataset(videos, source, classes, window, cfg.data.window_overlap)
    L, C = dataset.num_snippets(0), dataset.channels
    log(f"{split}: features of {len(videos)} videos, in the first {L} snippets x {C} channels")
    if C == cfg.video.snippets != L:
        log(f"{split}: are there {C} snippets of {L} channels? files must hold (L, C): transpose")
    return dataset


def subsequences(cfg, datasets, ddp):
    """Return SoLa's training data, and its options with a batch size that repeats none of them."""
    if len(widths := dict.fromkeys(dataset.channels for dataset in datasets)) > 1:
        raise InputError("features have {} channels in training, {} in validation".format(*widths))
    length, draws = cfg.sola.subsequence, cfg.sola.subsequences_per_video
    dataset = data.SubsequenceDataset(datasets[0], length, per_video=draws, seed=cfg.seed)
    if short := dataset.left_out:
        names = data.first_names(short)
        ddp.log(f"sola: {len(short)} videos are shorter than {length} snippets, left out: {names}")
    largest = math.ceil(len(dataset) / ddp.world_size) * ddp.world_size
    return dataset, cfg.sola | {"batch_size": min(cfg.sola.batch_size, largest)}


def clip_sources(cfg, task, log=print):
    """Return what pretrain.load_clips wants beside a task's options."""
    subsets = (cfg.data.train_subset, cfg.data.val_subset)
    sources = {"num_snippets": cfg.video.snippets, "subsets": subsets, "log": log}
    if task.startswith("acp_plus"):
        frames = cfg.data.frames
        sources["videos"] = [load_videos(cfg, s, frames, "frames", log) for s in ("train", "val")]
    return sources


def class_scores(cfg, videos):
    """Return (scores (V, n), n names) from elsewhere, or None, and who made the classes."""
    source = cfg.detect.class_scores
    if source == "own":
        return None, CLASS_SOURCES[cfg.classes]
    names = [video.name for video in videos]
    if source != "ground_truth":
        return evaluate.load_class_scores(source, names), f"external file {source}"
    options = {"subset": cfg.data.val_subset, "ground_truth": True}
    scores = evaluate.load_class_scores(ground_truth(cfg), names, **options)
    return scores, "ground truth (analysis)"


def encoder_path(cfg, run, stage="features"):
    """Return the encoder that a stage starts from: what an earlier stage of the run made, else the
    file pretrain.pretrained. run: the RunFolder, which may have moved since."""
    made_by = [s for s in ("pretrain", "lofi") if s in cfg.stages and s != stage]
    path = run.encoder(made_by[-1]) if made_by else cfg.pretrain.pretrained
    if path in (None, "torchvision"):
        raise InputError(f"stage {stage} needs an encoder: stage pretrain, or pretrain.pretrained")
    return path


# -------------------------------------------------------------------------------------- run folder


@functools.cache
def git_commit():
    """Return what git calls this code, or None."""
    command = ["git", "-C", HERE, "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def snapshot(cfg):
    """Return where something was made: config and code, as plain data."""
    return {"config": json.loads(json.dumps(cfg)), "git": git_commit()}


def stage_inputs(cfg, run, stage):
    """Return fingerprints of what a stage works on, {what: plain data}."""
    files = {}
    if stage == "pretrain":
        files = {"pretrain.init": cfg.pretrain.init, "pretrained": cfg.pretrain.pretrained}
    elif stage in ("lofi", "features"):
        files = {"encoder": encoder_path(cfg, run, stage)}
    elif stage == "detect":
        files = {"head": run.head, "class scores": cfg.detect.class_scores}
    inputs = {key: data.file_hash(p) for key, p in files.items() if os.path.isfile(p or "")}
    splits = {"detect": ["val"], "sola": ["train", "val"]}.get(stage, ["train"])
    if stage == "head" and isinstance(cfg.head.lr, list):
        splits = ["train", "val"]
    subsets = read_annotations(cfg)
    videos = list(itertools.chain(*(subsets.get(cfg.data[f"{s}_subset"], ()) for s in splits)))
    target_clips = stage == "pretrain" and "acp_plus" in cfg.pretrain.method
    if target_clips or stage in ("lofi", "head", "detect"):
        inputs["annotations"] = data.fingerprint(videos)
    if stage in ("sola", "head", "detect"):
        names = [video.name for video in videos]
        sources = data.as_list(feature_source(cfg, run, raw=stage == "sola"))
        found = itertools.chain(*(data.find_features(s, names).values() for s in sources))
        files = dict.fromkeys(path.partition("::")[0] for path in found)  # HDF5: one of all videos
        inputs["features"] = checkpoint.files_fingerprint([*files])
    return inputs


def check_inputs(cfg, run, pending):
    """Raise InputError if a stage, finished or begun, was made from what is not there any more."""
    missing = None
    for stage in (s for s in STAGES if s in cfg.stages):
        product, noted = f"{run.path}/{STAGES[stage]}", run.inputs(stage)
        to_remove = product if stage == "detect" else os.path.dirname(noted)
        remedy = f"restore that, or remove {to_remove} and what later stages made to go on from it"
        if stage in pending:
            missing = missing or product
        elif missing:
            raise InputError(f"stage {stage} is done, but {missing} is missing: {remedy}")
        if not os.path.exists(noted) or not (is_begun(to_remove) or os.path.isfile(to_remove)):
            continue
        was, now = load_json(noted), stage_inputs(cfg, run, stage)
        if changed := [key for key in {**was, **now} if was.get(key) != now.get(key)]:
            raise InputError(f"stage {stage} is out of date: its {changed[0]} changed; {remedy}")


def is_begun(folder):
    """Return whether a run's or a stage's folder has more than a start from which nothing came."""
    ours = ("config.json", "versions.json", "inputs.json", "lock", "events.out.tfevents.")
    return any(not name.startswith(ours) for _, _, names in os.walk(folder) for name in names)


def open_run(cfg, ddp, pending=tuple(STAGES)):
    """Return the RunFolder cfg.out, locked, with config.json and versions.json, or raise InputError
    with the differences if it was created with another config or from other files."""
    run = RunFolder(cfg.out)
    if ddp.is_main:
        run.lock()
    remedy = "name another folder with --set out=..., or remove that one yourself"
    exists = os.path.exists(run.config)
    made = [f"{cfg.out}/{stage}" for stage in STAGES] + [run.proposals, run.result, run.metrics]
    if not exists and (foreign := [path for path in made if os.path.exists(path)]):
        raise InputError(f"{foreign[0]} exists, but {run.config} does not:\n{remedy}")
    old = saved_config(cfg.out) if exists else cfg
    if exists and is_begun(cfg.out):
        if lines := differences(old, cfg):
            title = f"{cfg.out} was created with a different config:"
            raise InputError("\n".join([title, *lines, remedy]))
        # What was once made stays in the record.
        cfg = merge(cfg, {"stages": max(old.stages, cfg.stages, key=len)})
    if ddp.is_main:
        check_inputs(cfg, run, pending)
        if exists:
            checkpoint.remove_stale_parts(cfg.out)
        versions = {"git": git_commit(), "python": sys.version.split()[0]}
        versions |= {library.__name__: library.__version__ for library in (torch, torchvision, np)}
        versions |= {"device": str(ddp.device), "machine": checkpoint.machine_name(ddp.device)}
        versions |= {"threads": torch.get_num_threads(), "processes": ddp.world_size}
        save_json(versions, run.versions)
        save_json(cfg, run.config)
    return run


def save_encoder(encoder, cfg, run, stage, seconds):
    """Write what stage pretrain or lofi made, and what it cost with what it started from."""
    start = cfg.pretrain.pretrained if stage == "pretrain" else encoder_path(cfg, run, stage)
    metadata = {"encoder": dict(cfg.encoder), "seconds": seconds + checkpoint.seconds_of(start)}
    checkpoint.save_weights(encoder, run.encoder(stage), **metadata)


def search_lr(cfg, run, ddp, run_stages):
    """Train a head at each learning rate of the list head.lr, on the same features, and keep the
    one with the best average mAP in the validation videos.

    Each is a run of its own in OUT/head/lr_X, which run_stages(config, pending, ddp) goes through:
    a later start skips or resumes it. OUT/head/search.json has the average mAP of each.
    """
    source = [os.path.realpath(s) for s in data.as_list(feature_source(cfg, run))]
    trials = {lr: RunFolder(f"{run.path}/head/lr_{lr:g}") for lr in cfg.head.lr}
    for lr, folder in trials.items():
        ddp.log(f"head.lr {lr:g}: {folder.path}")
        changes = {"data": Config(cfg.data, features=source), "head": Config(cfg.head, lr=lr)}
        trial = Config(cfg, out=folder.path, stages=["head", "detect"], **changes)
        run_stages(trial, check(trial, files=False), ddp)
    if ddp.is_main:
        metrics = {lr: load_json(folder.metrics) for lr, folder in trials.items()}
        found = {lr: metrics[lr]["average_mAP"] for lr in trials}
        best = max(found, key=found.get)
        shared = seconds_of_features(source)
        seconds = sum(trial["seconds"] - shared for trial in metrics.values())
        epochs = pathlib.Path(trials[best].path, "head/metrics.jsonl").read_bytes()
        checkpoint.write_atomic(f"{run.path}/head/metrics.jsonl", lambda file: file.write(epochs))
        saved = tsm.load_state(trials[best].head) | {"seconds": seconds}
        save_json({"best_lr": best, "average_mAP": found}, f"{run.path}/head/search.json")
        checkpoint.write_atomic(run.head, functools.partial(torch.save, saved))
        table = ", ".join(f"{lr:g}: {100 * value:.2f}" for lr, value in found.items())
        ddp.log(f"average mAP (%) by head.lr: {table}; kept: {best:g}")


def save_feature_info(cfg, run, weights, datasets, seconds):
    """Write features.json beside the features of stage features: what they are of."""
    video = cfg.video
    info = {"encoder": weights, "encoder_sha256": data.file_hash(weights), **cfg.encoder, **video}
    info["snippet_stride_sec"] = 1 / video.rate if video.rate else "duration_sec / snippets"
    info["snippet_window_frames"] = video.frames_per_snippet * video.stride
    info["seconds"] = seconds + checkpoint.seconds_of(weights)
    info["videos"] = {}
    for v in itertools.chain(*(dataset.videos for dataset in datasets)):
        fps = FrameZip(v.path).fps if v.path.endswith(".zip") else None  # reading would tell
        info["videos"][v.name] = {"duration_sec": v.duration, "fps": fps}
    save_json(info, f"{run.features}/features.json")


def save_sola_info(cfg, run, datasets, seconds):
    """Write features.json beside the features of stage sola: that of those before it, and more."""
    source = feature_source(cfg, run, raw=True)
    info = dict(*data.read_feature_info(source)[:1])
    videos = [video for dataset in datasets for video in dataset.videos]
    info["videos"] = {video.name: {"duration_sec": video.duration} for video in videos}
    info |= {"sola": run.sola, "from": source, "channels": datasets[0].channels}
    info |= {"seconds": seconds + seconds_of_features(source), "sola_seconds": seconds}
    save_json(info, f"{run.sola_features}/features.json")


def seconds_of_features(source):
    """Return what features cost with all that they were made from, as far as they tell."""
    return sum(info.get("seconds", 0.0) for info in data.read_feature_info(source))


def score_run(cfg, run, videos, trained_on, seconds):
    """Evaluate what stage detect wrote, write metrics.json, and return it as text."""
    truth, subset = ground_truth(cfg, videos), cfg.data.val_subset
    names = [video.name for video in videos]
    record = {"seed": cfg.seed, "videos": data.list_hash(names), "training": trained_on}
    record["seconds"] = seconds + seconds_of_features(feature_source(cfg, run))
    if isinstance(truth, dict):
        save_json(truth, f"{run.path}/annotations.json")  # for `python evaluate.py`
    if not any(len(video.segments) for video in read_annotations(cfg)[subset]):
        save_json({"subset": subset, "evaluated_videos": 0, **record}, run.metrics)
        return f"{run.result} is not scored: subset {subset} has no segments"
    options = {"subset": subset, "thresholds": cfg.detect.tiou_thresholds}
    metrics = evaluate.evaluate(truth, run.result, **options)
    metrics["AR"] = evaluate.evaluate(truth, run.proposals, subset=subset, ar=True)["AR"]
    save_json({**metrics, **record}, run.metrics)
    return f"{run.result}: {evaluate.report(metrics)}"
