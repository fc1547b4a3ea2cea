"""A run's config: configs/default.yaml, then a file, then key=value words; a run's folder, with what a number needs to be believed."""
import difflib
import glob
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import torch
import torchvision
import yaml

HERE = os.path.dirname(os.path.abspath(__file__))
STAGES = ("pretrain", "lofi", "features", "sola", "head", "detect")  # in this order, however a config lists them
FREE = {"data.workers", "device", "checkpoint_sec"}  # may change between two starts of a run
COST = {"lofi.chunk", "lofi.accumulate", "encoder.recompute", "features.chunk"}  # so may these: the same numbers, to rounding, in another time and memory


class Config(dict):
    """A dict whose keys are attributes too: cfg.lofi.lr."""
    __getattr__ = dict.__getitem__


def merge(base, changes, where="", kinds=None):
    """A new Config: `base` with `changes` in it. ValueError for a key that base lacks, with the nearest one that it has, and for a value of another
    kind than the one in `kinds` (default: base); what is null there may become anything but a block."""
    kinds = base if kinds is None else kinds
    out = Config({k: merge(v, {}) if isinstance(v, dict) else v for k, v in base.items()})
    for key, value in changes.items():
        if key not in base:
            near = difflib.get_close_matches(str(key), list(map(str, base)), 1, 0)[0]
            raise ValueError(f"config key {where}{key} is read by nothing; did you mean {where}{near}? configs/default.yaml has them all")
        known = kinds[key]
        for kind, words in ((dict, "a block of keys"), (list, "a list, as in [S, T, ST]")):
            if isinstance(known, kind) != isinstance(value, kind) and not (known is None and kind is list):
                raise ValueError(f"config key {where}{key} is {value!r}, expected {words if isinstance(known, kind) else 'one value'}")
        if isinstance(known, (int, float)) and (isinstance(known, bool) != isinstance(value, bool) or not isinstance(value, (int, float))):
            kind = "true or false" if isinstance(known, bool) else "a number (YAML reads 1e-4 as a word: write 1.0e-4)"
            raise ValueError(f"config key {where}{key} is {value!r}, expected {kind}")
        out[key] = merge(base[key], value, f"{where}{key}.", known) if isinstance(value, dict) else value
    return out


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys in silence; here they are an error."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(k, deep=deep) for k, _ in node.value]
        twice = [k for k in keys if keys.count(k) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no config file {path}: name one of configs/")
    with open(path) as f:
        try:
            content = yaml.load(f, UniqueKeyLoader) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {content!r}, expected keys and values")
    return content


def load(path, words=()):
    """The config of a file under configs/default.yaml, changed by words "key.sub=value" (the value as YAML)."""
    default = read_yaml(f"{HERE}/configs/default.yaml")
    cfg = merge(default, read_yaml(path))
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--set {word}: expected key.sub=value")
        try:
            change = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {word}: the value is no YAML: {error}") from None
        for part in reversed(key.split(".")):
            change = {part: change}
        cfg = merge(cfg, change, kinds=default)
    return cfg


def reference(path=f"{HERE}/configs/default.yaml"):
    """Markdown of every key, its default and its meaning: the comment beside it, which may go on in the lines below. `python config.py` prints it."""
    with open(path) as f:
        lines = f.read().splitlines()
    rows = []

    def add(node, where):
        for key, value in node.value:
            first = key.start_mark.line
            block = isinstance(value, yaml.MappingNode) and not value.flow_style
            last = first if block else max(first, value.end_mark.line - (value.end_mark.column == 0))
            words = [lines[last].partition(" # ")[2].strip()]
            for line in lines[last + 1:] if words[0] else ():
                if not line.lstrip().startswith("#") or line.index("#") < 10:  # a comment of its own
                    break
                words.append(line.strip(" #"))
            default = "" if block else f"`{lines[first].partition(':')[2].partition(' # ')[0].strip()}`"
            rows.append(f"| `{where}{key.value}` | {default} | {' '.join(words).strip()} |")
            if block:
                add(value, f"{where}{key.value}.")
    add(yaml.compose("\n".join(lines), yaml.SafeLoader), "")
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows])


def flat(cfg, where=""):
    """{"lofi.lr": 0.1, ...}"""
    return {name: leaf for key, value in cfg.items() for name, leaf in
            (flat(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value}).items()}


def differences(old, new, free=FREE | COST):
    """Lines that say which keys differ; those in `free` are left out, the name of the folder, which may have moved, and stages of which one list only goes on further."""
    old, new = flat(old), flat(new)
    if "recalibrate" in (old["lofi.batchnorm"], new["lofi.batchnorm"]):  # it takes statistics of as many snippets at once
        free = free - {"features.chunk"}
    keys = sorted((old.keys() | new.keys()) - free - {"out"})
    if all(a == b for a, b in zip(*(sorted(x["stages"], key=(*STAGES, *x["stages"]).index) for x in (old, new)))):
        keys.remove("stages")
    return [f"  {k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in keys if old.get(k) != new.get(k)]


def check_words(words):
    """words: {key: (values, known ones)}. ValueError for the first that is not known."""
    for key, (values, known) in words.items():
        for value in values:
            if value not in list(known):
                raise ValueError(f"config key {key} has {value!r}, expected {', '.join(known)}")


COUNTS = {1: ("epochs", "batch_size", "accumulate", "hidden", "subsequence", "draws", "probe_videos", "every", "period", "frames", "snippets", "frames_per_snippet", "stride",
              "size", "depth", "width", "gcn_width", "gcn_groups", "stem_groups", "neighbours", "inner_bins", "kernel", "durations", "samples", "groups", "top_k",
              "classes_per_video"), 0: ("workers", "seed", "shift_div", "context_bins")}  # whole numbers of at least so much, wherever they stand


def check_batches(blocks, world):
    """blocks: {stage or phase: its options} of what is still to be trained. ValueError if a batch cannot be divided evenly over so many processes."""
    for name, block in blocks.items():
        micro = block.get("accumulate", 1)
        if block["batch_size"] % (world * micro):
            raise ValueError(f"{name}.batch_size {block['batch_size']} cannot be divided evenly over {world} processes and {micro} micro-batches")


def check_numbers(cfg):
    """ValueError for the first number that no run can go on with."""
    least = {name: low for low, names in COUNTS.items() for name in names}
    for key, value in flat(cfg).items():
        leaf, low, number = key.rsplit(".", 1)[-1], None, isinstance(value, (int, float))
        low = 1 if key == "features.chunk" else 0 if key == "lofi.chunk" else least.get(leaf)
        if number and low is not None and (value != int(value) or value < low):
            raise ValueError(f"config key {key} is {value!r}, expected a whole number of at least {low}")
        if number and (leaf in ("lr", "factor", "sigma", "crop", "rate") and value <= 0 or leaf in ("clip", "weight_decay", "momentum", "class_weight", "coefficient") and value < 0):
            raise ValueError(f"config key {key} is {value!r}, expected a positive number")
    if not cfg["detect"]["tiou"] or not all(isinstance(t, (int, float)) and 0 < t <= 1 for t in cfg["detect"]["tiou"]):
        raise ValueError(f"config key detect.tiou is {cfg['detect']['tiou']}, expected a list of thresholds in (0, 1]")
    if not cfg["stages"] or not cfg["out"]:
        raise ValueError(f"config keys stages and out are {cfg['stages']} and {cfg['out']!r}, expected a list of stages and a folder")
    for block in ("gtad", "sola"):
        if cfg[block]["kernel"] % 2 == 0:
            raise ValueError(f"config key {block}.kernel is {cfg[block]['kernel']}, expected an odd number")


def about(cfg):
    """Where something was made: config and code, as plain data."""
    try:
        git = subprocess.run(["git", "-C", HERE, "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        git = None
    return {"config": json.loads(json.dumps(cfg)), "git": git or None}


def saved(folder):
    """The config of a run folder, as plain data; a key that is newer than the run has the value that the run had without it."""
    with open(f"{folder}/config.json") as f:
        return {"precision": "auto"} | json.load(f)


def open_run(cfg, write_json, main=True, **facts):
    """Checks that the folder cfg.out was begun with this very config, or begins it: config.json, and versions.json with `facts`.

    write_json(obj, path): an atomic writer; only the main process writes. ValueError shows the difference between the two configs.
    """
    path = f"{cfg.out}/config.json"
    if os.path.exists(path) and any(not f.startswith(("config.json", "versions.json")) for f in os.listdir(cfg.out)):  # else nothing came of it yet
        old = saved(cfg["out"])
        differ = differences(old, cfg)
        if differ:
            raise ValueError(f"{cfg.out} was begun with another config:\n" + "\n".join(differ)
                             + "\nname another folder with --set out=..., or remove that one yourself")
        cfg = merge(cfg, {"stages": max(old["stages"], cfg["stages"], key=len)})  # what was once made stays in the record
    if main:
        for part in glob.glob(f"{glob.escape(cfg['out'])}/**/*.part-*", recursive=True):  # what a killed start was writing
            if time.time() - os.path.getmtime(part) > 60:
                os.remove(part)
        write_json({"git": about(cfg)["git"], "python": sys.version.split()[0], "torch": torch.__version__, "torchvision": torchvision.__version__,
                    "numpy": np.__version__, **facts}, f"{cfg.out}/versions.json")
        write_json(cfg, path)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    print(reference())
