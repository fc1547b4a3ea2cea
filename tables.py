"""The papers' tables in miniature: rows on toy data over several seeds, beside the papers' numbers, and a verdict on each of the papers' claims.

    python tables.py                            all tables on the small toy, five seeds: hours on two cores; writes runs/RESULTS.md and runs/RESULTS.json
    python tables.py --tables 1 2 --seeds 21    some of it
    python tables.py --toy large --tables 1 2   for one GPU
    python tables.py --sensitivity              Table 1 with one of the toy's knobs turned at a time
    python tables.py --render                   RESULTS.md from RESULTS.json alone; --results RESULTS: the project's own

A seed draws the data (toy.py), the encoders and the heads. Each row is one run of lofi_tal.py; rows share what they have in common, such as the ACP encoder.
Started again it goes on where it stopped. A row is done if its run has a metrics.json, or RESULTS.json its record, of the very config that is asked for; rows that ./train.sh
has made are taken as they are. Rows run side by side (--jobs), each with a GPU of its own or a share of the cores.
"""
import argparse
import fcntl
import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import torch
import yaml

import config
import media
import results
import toy

HERE = os.path.dirname(os.path.abspath(__file__))
FROZEN, ACP, HEAD = "stages=[pretrain,features,head,detect]", "pretrain.checkpoint={acp}/acp/pretrain/encoder.pt", "stages=[head,detect]"
SOLA, R2PLUS1D = "stages=[sola,head,detect]", "encoder.name=r2plus1d_18"

# name: (rows that must be there before it, words of lofi_tal.py --set). {runs}: the seed's folder of runs, {acp}: the one with its ACP encoder, {quarter}: of the snippets, {twice}: the epochs
ROWS = {
    "icp": ([], [FROZEN, "pretrain.method=icp", "encoder.shift_div=0"]),  # an image network has never seen shifted channels
    "acp": ([], [FROZEN, "pretrain.method=acp"]),
    "acp_plus": (["acp"], [FROZEN, "pretrain.method=acp_plus", ACP]),
    "acp_plus_background": (["acp"], [FROZEN, "pretrain.method=acp_plus_background", ACP]),
    "lofi": (["acp"], [ACP]),
    "s": (["acp"], [ACP, "lofi.cycle=[S]"]),
    "t": (["acp"], [ACP, "lofi.cycle=[T]"]),
    "st": (["acp"], [ACP, "lofi.cycle=[ST]"]),
    "short": (["acp"], [ACP, "lofi.order=short", "lofi.period=1"]),  # the paper's 16 batches of its 600 an epoch would be a whole epoch here
    "full": (["acp"], [ACP, "lofi.cycle=[full]", "lofi.chunk={quarter}"]),  # full fidelity in the memory of a quarter of the snippets, as T's
    "twice": (["acp"], [ACP, "lofi.epochs={twice}"]),
    "on_background": (["acp_plus_background"], ["pretrain.checkpoint={runs}/acp_plus_background/pretrain/encoder.pt"]),  # what a localization loss adds to having seen background
    "r2plus1d_acp": ([], [FROZEN, "pretrain.method=acp", R2PLUS1D]),
    "r2plus1d_t": (["r2plus1d_acp"], ["pretrain.checkpoint={runs}/r2plus1d_acp/pretrain/encoder.pt", R2PLUS1D, "lofi.cycle=[T]"]),
    **{f"r{depth}_acp": ([], [FROZEN, "pretrain.method=acp", f"encoder.depth={depth}"]) for depth in (34, 50)},
    **{f"r{depth}_lofi": ([f"r{depth}_acp"], [f"pretrain.checkpoint={{runs}}/r{depth}_acp/pretrain/encoder.pt", f"encoder.depth={depth}"]) for depth in (34, 50)},
    "arrow": ([], [FROZEN, "pretrain.method=arrow"]),
    "speed": ([], [FROZEN, "pretrain.method=speed"]),
    "acp_arrow": (["acp", "arrow"], [HEAD, "data.features=[{runs}/acp/features,{runs}/arrow/features]"]),
    "acp_speed": (["acp", "speed"], [HEAD, "data.features=[{runs}/acp/features,{runs}/speed/features]"]),
    "sola": (["acp"], [SOLA, "data.features={runs}/acp/features"]),
    "lofi_sola": (["lofi"], [SOLA, "data.features={runs}/lofi/features"]),
    "bmn_acp": (["acp"], [HEAD, "tal_head=bmn", "data.features={runs}/acp/features"]),
    "bmn_lofi": (["acp"], [ACP, "tal_head=bmn"]),
}

NEEDS = {row: rows for row, (rows, _) in ROWS.items()}

R18, LOFI, TLOFI = (49.64, 34.16, 7.68, 33.59), (50.68, 35.16, 8.16, 34.49), (50.28, 35.21, 8.09, 34.32)
# table: (title, {row: (its name there, the row its gain is over, the paper's mAP on ActivityNet-1.3 @0.5, @0.75, @0.95 and average; None where there is none)})
TABLES = {
    "1": ("pre-training of the encoder", {
        "icp": ("ICP", "acp", (48.45, 32.40, 6.89, 32.16)), "acp": ("ACP", None, R18), "acp_plus": ("ACP+", "acp", (49.87, 34.58, 7.85, 33.84)),
        "acp_plus_background": ("ACP+ with background", "acp", None), "lofi": ("LoFi", "acp", LOFI), "on_background": ("LoFi from ACP+ with background", "acp", None)}),
    "2": ("low-fidelity configurations", {
        "acp": ("ACP", None, R18), "s": ("S-LoFi", "acp", (50.47, 34.71, 7.57, 34.12)), "t": ("T-LoFi", "acp", TLOFI), "st": ("ST-LoFi", "acp", (50.36, 34.79, 7.59, 34.12)),
        "short": ("short cycle", "acp", (50.57, 35.12, 8.14, 34.38)), "lofi": ("long cycle (LoFi)", "acp", LOFI)}),
    "5": ("encoders", {
        "acp": ("TSM-R18, ACP", None, R18), "t": ("TSM-R18, T-LoFi", "acp", TLOFI),
        "r2plus1d_acp": ("R(2+1)D-18, ACP", None, (49.65, 34.11, 8.66, 33.55)), "r2plus1d_t": ("R(2+1)D-18, T-LoFi", "r2plus1d_acp", (49.84, 34.73, 8.64, 34.21))}),
    "6": ("depth of the encoder", {
        "acp": ("R18, ACP", None, R18), "lofi": ("R18, LoFi", "acp", LOFI),
        "r34_acp": ("R34, ACP", None, (50.16, 34.35, 8.31, 33.90)), "r34_lofi": ("R34, LoFi", "r34_acp", (50.79, 35.39, 8.38, 34.74)),
        "r50_acp": ("R50, ACP", None, (50.32, 35.07, 8.02, 34.26)), "r50_lofi": ("R50, LoFi", "r50_acp", (50.91, 35.86, 8.79, 34.96))}),
    "7": ("self-supervised pre-training", {
        "acp": ("ACP", None, R18), "arrow": ("Arrow", "acp", (44.14, 28.87, 5.90, 28.82)), "speed": ("Speed", "acp", (44.50, 29.52, 6.14, 29.39)),
        "acp_arrow": ("ACP+Arrow", "acp", (49.79, 34.48, 7.70, 33.72)), "acp_speed": ("ACP+Speed", "acp", (49.84, 34.11, 7.50, 33.75)), "lofi": ("LoFi", "acp", LOFI)}),
    "sola": ("SoLa, with the linear probe \"action or background snippet\"", {
        "acp": ("raw ACP features", None, None), "sola": ("SoLa", "acp", None), "lofi": ("LoFi", "acp", None), "lofi_sola": ("LoFi + SoLa", "acp", None)}),
    "A": ("another head, BMN (LoFi, supplementary material)", {"bmn_acp": ("BMN, ACP", None, None), "bmn_lofi": ("BMN, LoFi", "bmn_acp", None)}),
    "beyond": ("beyond the papers: full fidelity end to end, chunk by chunk; stage lofi for longer", {
        "acp": ("ACP", None, None), "acp_plus_background": ("ACP+ with background", "acp", None), "lofi": ("LoFi", "acp", None), "twice": ("LoFi, twice as long", "acp", None),
        "full": ("full fidelity", "acp", None)}),
}

ALONE = {"s": -1 / 3, "t": -1 / 3, "st": -1 / 3}
# (id, sentence, the paper's difference or None, {row: weight} whose sum of the measure is claimed to be above 0, measure, source)
CLAIMS = [
    ("1.1", "ACP over ICP", 1.43, {"acp": 1, "icp": -1}, "average", "LoFi, Table 1"),
    ("1.2", "ACP+ over ACP", 0.25, {"acp_plus": 1, "acp": -1}, "average", "LoFi, Table 1"),
    ("1.3", "LoFi over ACP", 0.90, {"lofi": 1, "acp": -1}, "average", "LoFi, Table 1"),
    ("1.4", "LoFi over ACP+", 0.65, {"lofi": 1, "acp_plus": -1}, "average", "LoFi, Table 1"),
    ("1.5", "LoFi brings most: over ACP+, more than ACP+ over ACP", 0.40, {"lofi": 1, "acp_plus": -2, "acp": 1}, "average", "LoFi, Table 1"),
    ("2.1", "S-LoFi over ACP", 0.53, {"s": 1, "acp": -1}, "average", "LoFi, Table 2"),
    ("2.2", "T-LoFi over ACP", 0.73, {"t": 1, "acp": -1}, "average", "LoFi, Table 2"),
    ("2.3", "ST-LoFi over ACP", 0.53, {"st": 1, "acp": -1}, "average", "LoFi, Table 2"),
    ("2.4", "long cycle over the mean of S, T, ST alone", 0.30, {"lofi": 1, **ALONE}, "average", "LoFi, Table 2"),
    ("2.5", "short cycle over the mean of S, T, ST alone", 0.19, {"short": 1, **ALONE}, "average", "LoFi, Table 2"),
    ("2.6", "long cycle over short cycle", 0.11, {"lofi": 1, "short": -1}, "average", "LoFi, Table 2"),
    ("5.1", "T-LoFi over ACP with R(2+1)D", 0.66, {"r2plus1d_t": 1, "r2plus1d_acp": -1}, "average", "LoFi, Table 5"),
    ("6.1", "LoFi over ACP with R34", 0.84, {"r34_lofi": 1, "r34_acp": -1}, "average", "LoFi, Table 6"),
    ("6.2", "LoFi over ACP with R50", 0.70, {"r50_lofi": 1, "r50_acp": -1}, "average", "LoFi, Table 6"),
    ("6.3", "the gain shrinks with depth: R18's over R50's", 0.20, {"lofi": 1, "acp": -1, "r50_lofi": -1, "r50_acp": 1}, "average", "LoFi, Table 6"),
    ("7.1", "ACP over Arrow", 4.77, {"acp": 1, "arrow": -1}, "average", "LoFi, Table 7"),
    ("7.2", "ACP over Speed", 4.20, {"acp": 1, "speed": -1}, "average", "LoFi, Table 7"),
    ("7.3", "ACP+Arrow over ACP", 0.13, {"acp_arrow": 1, "acp": -1}, "average", "LoFi, Table 7"),
    ("7.4", "ACP+Speed over ACP", 0.16, {"acp_speed": 1, "acp": -1}, "average", "LoFi, Table 7"),
    ("7.5", "LoFi over ACP+Arrow", 0.77, {"lofi": 1, "acp_arrow": -1}, "average", "LoFi, Table 7"),
    ("7.6", "LoFi over ACP+Speed", 0.74, {"lofi": 1, "acp_speed": -1}, "average", "LoFi, Table 7"),
    ("A.1", "LoFi over ACP with BMN", None, {"bmn_lofi": 1, "bmn_acp": -1}, "average", "LoFi, suppl. Table A"),
    ("sola.1", "SoLa over raw features, AUC of the linear probe", None, {"sola": 1, "acp": -1}, "auc", "SoLa"),
    ("sola.2", "SoLa over raw features, mAP", None, {"sola": 1, "acp": -1}, "average", "SoLa"),
]
CONTROLS = [  # claimed by nobody; the first says how much of LoFi's gain the labels of background alone can bring
    ("C.1", "LoFi over ACP+ with background", None, {"lofi": 1, "acp_plus_background": -1}, "average", "control"),
    ("C.2", "LoFi + SoLa over LoFi, mAP", None, {"lofi_sola": 1, "lofi": -1}, "average", "control"),
    ("C.3", "full fidelity over LoFi: what low fidelity loses", None, {"full": 1, "lofi": -1}, "average", "control"),
    ("C.4", "LoFi twice as long over ACP+ with background", None, {"twice": 1, "acp_plus_background": -1}, "average", "control"),
    ("C.5", "LoFi from ACP+ with background over ACP+ with background", None, {"on_background": 1, "acp_plus_background": -1}, "average", "control"),
    ("C.6", "SoLa over a moving average of raw features, AUC of the linear probe", None, {"sola": 1, "acp_smoothed": -1}, "auc", "control"),
    ("C.7", "LoFi + SoLa over a moving average of LoFi's features, AUC", None, {"lofi_sola": 1, "lofi_smoothed": -1}, "auc", "control"),
    ("C.8", "LoFi + SoLa over LoFi, AUC of the linear probe", None, {"lofi_sola": 1, "lofi": -1}, "auc", "control"),
    ("C.9", "mean of S, T, ST alone over ACP+", None, {"s": 1 / 3, "t": 1 / 3, "st": 1 / 3, "acp_plus": -1}, "average", "control"),
    ("C.10", "full fidelity over LoFi twice as long", None, {"full": 1, "twice": -1}, "average", "control"),
    ("C.11", "full fidelity over ACP+ with background", None, {"full": 1, "acp_plus_background": -1}, "average", "control"),
    ("C.12", "LoFi over ACP+ with background, area under AR@AN", None, {"lofi": 1, "acp_plus_background": -1}, "recall", "control"),
    ("C.13", "LoFi from ACP+ with background over ACP+ with background, area under AR@AN", None, {"on_background": 1, "acp_plus_background": -1}, "recall", "control"),
]
MEMORY = ("s", "t", "st"), ("short", "lofi"), "sola", "t"  # claimed to need about the same; what cycles through them; claimed to need less than the one behind it

DESIGN_SEEDS = (0, 1, 2, 7, 11, 12)  # looked at while the toy and its recipe were made

# name: (config, arguments of toy.make_toy beside its defaults, seeds, folder name, the command that makes its results)
TOYS = {
    "small": ("toy.yaml", {}, [21, 22, 23, 24, 25], "toy-{seed}", "python tables.py"),
    "large": ("toy_large.yaml", dict(train=600, val=300, clips=8000, stills=4000, size=128, snippets=100, frames_per_snippet=8), [21], "toy-large-{seed}",
              "python tables.py --toy large --tables 1 2"),
}

# sensitivity: {setting: (arguments of make_toy, "x2" for twice the toy's own; words of --set)}; none of them may change the clips, whose ACP encoder all share
SETTINGS = {
    "no competitors": ({"competitors": 0}, []),
    "1 competitor": ({"competitors": 1}, []),
    "3 competitors": ({"competitors": 3}, []),
    "near-action weaker (0.45)": ({"near": 0.45}, []),
    "near-action stronger (0.75)": ({"near": 0.75}, []),
    "weaker amplitude (0.20-0.27)": ({"amplitude": [0.20, 0.27]}, []),
    "no scene": ({"scene": 0.0}, []),
    "half the training videos": ({"train": "x0.5"}, []),
    "twice the training videos": ({"train": "x2"}, []),
}
COMPARED = ("acp", "acp_plus", "acp_plus_background", "lofi")  # in each setting
LABELS = {"acp": "ACP", "acp_plus": "ACP+", "acp_plus_background": "ACP+bg", "lofi": "LoFi"}
SHARED = {"acp": ([], ["stages=[features,head,detect]", ACP])}  # in a setting: the encoder is there already


class Job(NamedTuple):
    """A row of a seed, in a setting or none; row "data": making its data."""
    setting: str | None
    seed: int
    row: str
    data: str
    runs: str
    acp: str  # the folder of runs with the seed's ACP encoder

    @property
    def key(self):
        return self.setting, self.seed, self.row

    @property
    def name(self):
        return f"seed {self.seed} {self.row}" + (f" ({self.setting})" if self.setting else "")


def in_order(names):
    """The rows and all that they need, each after what it needs."""
    out = []
    for name in names:
        out += [n for n in in_order(ROWS[name][0]) + [name] if n not in out]
    return out


def words_of(name, seed, data, runs, acp=None, quarter=8, twice=24, setting=None):
    """Config words of a row. acp: the folder of runs with the ACP encoder; quarter: of the config's snippets; twice: its epochs of stage lofi."""
    words = (SHARED if setting else {}).get(name, ROWS[name])[1] + (SETTINGS[setting][1] if setting else [])
    return [f"seed={seed}", f"out={runs}/{name}", f"data.annotations={data}/annotations.json", f"data.frames={data}/frames",
            f"pretrain.icp.source={data}/stills", f"pretrain.acp.source={data}/clips", *(w.format(runs=runs, acp=acp or runs, quarter=quarter, twice=twice) for w in words)]


def needs(job):
    """Keys of what must be there before a job."""
    if job.row == "data":
        return set()
    rows = ROWS[job.row][0] if job.setting is None else ["acp"]
    return {(job.setting, job.seed, "data"), *((None, job.seed, row) for row in rows)}


class Plan:
    """What the arguments ask for: jobs {key: Job} in the order in which they should start, and how to make each."""

    def __init__(self, args):
        name, arguments, seeds, folder, _ = TOYS[args.toy]
        self.cfg, self.set, self.args, self.digests = f"{HERE}/configs/{name}", args.set, args, {}
        self.knobs = {k: yaml.safe_load(v) for k, _, v in (word.partition("=") for word in args.knob)}
        self.defaults = {k: p.default for k, p in inspect.signature(toy.make_toy).parameters.items() if p.default is not inspect.Parameter.empty} | arguments
        for key in (*self.knobs, *(k for knobs, _ in SETTINGS.values() for k in knobs)):
            if key not in self.defaults or key in ("seed", "workers"):
                raise ValueError(f"--knob {key}: expected {', '.join(k for k in self.defaults if k not in ('seed', 'workers'))}")
        self.arguments, self.gpus = arguments | self.knobs, gpus_of(config.load(self.cfg, self.set))
        values = [f"{k}={json.dumps(v, separators=(',', ':'))}" for k, v in sorted(self.knobs.items())]
        self.label = " ".join([args.toy, *values])
        folder = "-".join([folder, *("".join(c for c in v.replace(",", "_") if c not in "=[]") for v in values)])
        self.data, self.runs = args.data or f"data/{folder}", args.runs or f"runs/{folder}"
        cfg = config.load(self.cfg, self.set)
        self.sizes = {"quarter": max(cfg.data.snippets // 4, 1), "twice": 2 * cfg.lofi.epochs}
        self.seeds = args.seeds or (args.sensitivity_seeds if args.sensitivity and not args.tables else seeds)
        both = {*self.seeds, *(args.sensitivity_seeds if args.sensitivity else [])}
        if len(both) > 1 and not ("{seed}" in self.data and "{seed}" in self.runs):
            raise ValueError(f"--data {self.data} --runs {self.runs}: with several seeds both need {{seed}} in them")
        self.tables = args.tables or ([] if args.sensitivity else list(TABLES))
        self.jobs = {}
        for table in self.tables:
            for seed in self.seeds:
                self.add(None, seed, TABLES[table][1])
        for seed in args.sensitivity_seeds if args.sensitivity else []:
            self.add(None, seed, COMPARED)
        for setting in SETTINGS if args.sensitivity else ():
            for seed in args.sensitivity_seeds:
                self.add(setting, seed, COMPARED)

    def add(self, setting, seed, rows):
        data, runs = (x.format(seed=seed) for x in (self.data, self.runs))
        suffix = "" if setting is None else "-" + "_".join(setting.replace("(", "").replace(")", "").split())
        for row in ["data", *(in_order(rows) if setting is None else rows)]:
            job = Job(setting, seed, row, data + suffix, runs + suffix, runs)
            self.jobs.setdefault(job.key, job)

    def words(self, job):
        return words_of(job.row, job.seed, job.data, job.runs, job.acp, **self.sizes, setting=job.setting) + self.set

    def config(self, job):
        return config.load(self.cfg, self.words(job))

    def digest(self, job):
        """Hash and content of all that a row's result hangs on but its seed: config, with folders by their role, precision and the toy."""
        if (job.setting, job.row) not in self.digests:
            words = words_of(job.row, 0, "DATA", "RUNS", "ACP" if job.setting else "RUNS", **self.sizes, setting=job.setting) + self.set
            cfg = config.load(self.cfg, words)
            drawn = {f"toy.{k}": v for k, v in (self.defaults | self.toy_arguments(job) | {"version": toy.VERSION}).items() if k not in ("seed", "workers")}
            self.digests[job.setting, job.row] = results.digest(cfg, **drawn, precision=results.precision_of(cfg, bool(self.gpus)))
        return self.digests[job.setting, job.row]

    def toy_arguments(self, job):
        base = self.defaults | self.arguments
        own = {k: type(base[k])(base[k] * float(v[1:])) if isinstance(v, str) else v for k, v in SETTINGS[job.setting][0].items()} if job.setting else {}
        return self.arguments | own | ({"clips": 1, "stills": 1} if job.setting else {})

    def command(self, job):
        if job.row == "data":
            flags = [x for k, v in self.toy_arguments(job).items() for x in (f"--{k.replace('_', '-')}", *map(str, v if isinstance(v, (list, tuple)) else [v]))]
            return [sys.executable, f"{HERE}/toy.py", "--out", job.data, "--seed", str(job.seed), *flags]
        return [sys.executable, f"{HERE}/lofi_tal.py", "--cfg", self.cfg, "--set", *self.words(job)]


def look(plan, store):
    """(keys of the jobs that have to run, jobs that are done but not in the records yet). ValueError where something else is there than is asked for."""
    here, there = "cuda" if plan.gpus else "cpu", {r["device"].partition(":")[0] for r in store["records"].values() if r["toy"] == plan.label}
    if there - {here}:
        raise ValueError(f"{plan.args.results}.json holds rows of toy {plan.label} made on {', '.join(sorted(there))}, this is {here}: seconds and memory do not compare; "
                         "name another --results and --runs")
    ready, recorded, unrecorded, hashes = set(), set(), [], {}
    for r in store["records"].values():
        if r["toy"] == plan.label:
            hashes.setdefault((r["setting"], r["row"]), set()).add(r["hash"])
    for key, job in plan.jobs.items():
        if job.row == "data":
            continue
        digest, flat = plan.digest(job)
        record, out = store["records"].get((plan.label, *key)), f"{job.runs}/{job.row}"
        if other := hashes.get((job.setting, job.row), set()) - {digest}:  # of any seed: they all go into one mean
            old = store["configs"].get(other.pop(), {})
            differ = [f"  {k}: {old.get(k)!r} there, {flat.get(k)!r} now" for k in sorted(old.keys() | flat.keys()) if old.get(k) != flat.get(k)]
            raise ValueError(f"{plan.args.results}.json holds another {job.row} of toy {plan.label}:\n" + "\n".join(differ) + "\nname another --results (and --runs)")
        if record:
            recorded.add(key)
        if os.path.exists(f"{out}/metrics.json"):
            differ = config.differences(config.saved(out), plan.config(job), config.FREE)
            if differ:
                raise ValueError(f"{out} holds another row {job.row} than this one:\n" + "\n".join(differ) + "\nname another --runs, or remove that folder yourself")
            device = (results.load_json(f"{out}/versions.json") or {}).get("device", here)
            if not device.startswith(here):
                raise ValueError(f"{out} was made on {device}, this is {here}: seconds and memory do not compare; name another --runs and --results")
            ready.add(key)
            if not record or record["average"] != results.load_json(f"{out}/metrics.json")["average_mAP"]:
                unrecorded.append(job)
    run, needed = set(), {(job.setting, job.seed, "data") for job in unrecorded}  # a record has the mAP under true classes
    for key, job in reversed(plan.jobs.items()):  # what needs a row comes before it
        if job.row == "data":
            present = os.path.exists(f"{job.data}/annotations.json")
            if present:
                toy.make_toy(job.data, seed=job.seed, **plan.toy_arguments(job))  # says so if it is another
            must = key in needed and not present
        else:
            must = key not in ready and (key not in recorded or key in needed)
        if must:
            run.add(key)
            needed |= needs(job)
    return run, unrecorded


def schedule(waiting, start, ended, slots, stop=lambda: 0, pause=0.2):
    """Runs jobs side by side, at most `slots`, each as soon as what it needs is done; returns (failed, skipped) keys.

    waiting: {key: keys that it needs}, in order of preference, each behind what it needs. start(key, slot) -> a Popen; ended(key, status) -> whether it
    went well. stop(): a number once no more jobs should start and those that run should be interrupted, once; they are waited for."""
    waiting, free, running, failed, skipped, told = dict(waiting), list(range(slots)), {}, [], [], False
    try:
        while waiting or running:
            if stop() and not told:
                told, waiting = True, {}
                for process, _ in running.values():
                    process.send_signal(signal.SIGINT)
            for key in list(waiting):
                if waiting[key] & {*failed, *skipped}:
                    skipped.append(key)
                    del waiting[key]
            for key in list(waiting):
                if free and not waiting[key] & (waiting.keys() | running.keys()):
                    del waiting[key]
                    running[key] = start(key, free[0]), free.pop(0)
            for key, (process, slot) in list(running.items()):
                status = process.poll()
                if status is not None:
                    del running[key]
                    free = sorted([*free, slot])
                    if not ended(key, status) and not told:
                        failed.append(key)
            if running and pause:
                time.sleep(pause)
    finally:
        for process, _ in running.values():
            process.send_signal(signal.SIGINT)
        for process, _ in running.values():
            process.wait()
    return failed, skipped


def lock(folders):
    """File descriptors that keep other tables.py out of these folders until this one and its children, which hold them too, are gone."""
    held = []
    for folder in sorted(set(folders)):
        os.makedirs(folder, exist_ok=True)
        held.append(os.open(f"{folder}/.tables.lock", os.O_RDWR | os.O_CREAT, 0o666))
        try:
            fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another tables.py works there (or a run that one left behind): wait for it, or name another --runs") from None
    return held


def gpus_of(cfg, environment=os.environ):
    """Names of the GPUs to hand out, for CUDA_VISIBLE_DEVICES; none on a CPU."""
    if cfg.device == "cpu":
        return []
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    known = torch.cuda.device_count()
    return [g.strip() for g in visible.split(",") if g.strip()][:known] if visible is not None else [str(i) for i in range(known)]


def environment_of(slot, jobs, gpus, cores):
    """Environment of a job: its GPU, or its share of the cores; an OMP_NUM_THREADS that is set already stays."""
    own = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {"OMP_NUM_THREADS": str(max(cores // jobs, 1))}
    return os.environ | own | {k: os.environ[k] for k in ("OMP_NUM_THREADS",) if k in os.environ}


def work(plan, text):
    """Makes everything that is not there yet; returns the exit status."""
    held, signals = lock(job.runs for job in plan.jobs.values()), []
    caught = [signal.SIGINT, signal.SIGTERM] + [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)  # a closed terminal, but for nohup
    before = {s: signal.signal(s, lambda number, _: signals.append(number)) for s in caught}
    try:
        return make_all(plan, text, held, signals)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
        for descriptor in held:
            os.close(descriptor)


def make_all(plan, text, held, signals):
    path = plan.args.results
    store = results.read(f"{path}.json")
    run, unrecorded = look(plan, store)
    gpus, cores = plan.gpus, media.cores()
    slots = plan.args.jobs or len(gpus) or min(cores, 4)
    begun, took, count = {}, {}, [0]

    def keep(job):
        cfg, (digest, flat) = plan.config(job), plan.digest(job)
        record = results.record_of(cfg.out, cfg, digest, toy=plan.label, setting=job.setting, seed=job.seed, row=job.row, words=plan.set)
        results.write(path, text, record, flat)
        return record

    def start(key, slot):
        job, environment = plan.jobs[key], environment_of(slot, slots, gpus, cores)
        command = plan.command(job)
        os.makedirs(job.runs, exist_ok=True)
        begun[key] = time.monotonic()
        print(f"[{count[0]}/{len(run)}] {job.name}: starts" + (f" on GPU {environment['CUDA_VISIBLE_DEVICES']}" if gpus else ""), flush=True)
        with open(f"{job.runs}/{job.row}.log", "a") as log:
            print("$", shlex.join(command), file=log, flush=True)
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, start_new_session=True, pass_fds=held)

    def ended(key, status):
        job, seconds = plan.jobs[key], time.monotonic() - begun[key]
        if status or not os.path.exists(f"{job.data}/annotations.json" if job.row == "data" else f"{job.runs}/{job.row}/metrics.json"):
            print(f"[{count[0]}/{len(run)}] {job.name}: " + ("interrupted" if signals else f"FAILED with status {status}, see {job.runs}/{job.row}.log"), flush=True)
            return False
        count[0] += 1
        took.setdefault(job.row, []).append(seconds)
        known, everything = {k: sum(v) / len(v) for k, v in took.items()}, [x for v in took.values() for x in v]
        left = sum(known.get(k[2], sum(everything) / len(everything)) for k in run - begun.keys()) / slots
        score = "" if job.row == "data" else f", mAP {100 * keep(job)['average']:.2f} %"
        guess = f"{left / 3600:.1f} h" if left > 3600 else f"{left / 60:.0f} min"
        print(f"[{count[0]}/{len(run)}] {job.name}: {seconds:.0f} s{score}; about {guess} left", flush=True)
        return True

    for job in unrecorded:
        if os.path.exists(f"{job.data}/annotations.json"):
            keep(job)
    print(f"{len(run)} jobs to run, {len(plan.jobs) - len(run)} done or not needed; {slots} at once" + (f" on GPUs {', '.join(gpus)}" if gpus else ""), flush=True)
    if not run:
        print(f"{path}.json has every row that was asked for; to make them again, name another --results and --runs")
    failed, skipped = schedule({k: needs(plan.jobs[k]) & run for k in plan.jobs if k in run}, start, ended, slots, lambda: len(signals))
    for job in unrecorded:  # whose data had to be made again
        if (job.setting, job.seed, "data") in run and os.path.exists(f"{job.data}/annotations.json"):
            keep(job)
    results.write(path, text)
    for key in failed:
        print(f"failed: {plan.jobs[key].name}, see {plan.jobs[key].runs}/{plan.jobs[key].row}.log", file=sys.stderr)
    for key in skipped:
        print(f"skipped, as it needs one that failed: {plan.jobs[key].name}", file=sys.stderr)
    if signals:
        print(f"tables.py: stopped by {signal.Signals(signals[0]).name}; the same command goes on from there", file=sys.stderr)
        return 128 + signals[0]
    return int(bool(failed))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), help="all, unless --sensitivity is given alone")
    parser.add_argument("--toy", default="small", choices=list(TOYS))
    parser.add_argument("--seeds", nargs="+", type=int, help=", ".join(f"{k}: {' '.join(map(str, v[2]))}" for k, v in TOYS.items()))
    parser.add_argument("--knob", nargs="+", default=[], action="extend", metavar="NAME=VALUE",
                        help="another toy: arguments of toy.py, as near=0.5; its data, runs and results stay apart")
    parser.add_argument("--sensitivity", action="store_true", help="rows of Table 1 with one knob of the toy turned at a time")
    parser.add_argument("--sensitivity-seeds", nargs="+", type=int, default=[21, 22, 23])
    parser.add_argument("--data", help="folder of the toy data, made if it is not there (data/toy-{seed})")
    parser.add_argument("--runs", help="folder of the runs, one a row (runs/toy-{seed})")
    parser.add_argument("--set", nargs="+", default=[], action="extend", metavar="key.sub=value", help="change config keys of all rows")
    parser.add_argument("--jobs", type=int, help="rows at once (the number of GPUs; on a CPU the cores, up to 4)")
    parser.add_argument("--results", default="runs/RESULTS", help="where to write: PATH.md, PATH.json (runs/RESULTS; RESULTS is the project's own, with its remarks, docs/results_TOY.md)")
    parser.add_argument("--render", action="store_true", help="only write RESULTS.md from RESULTS.json")
    args = parser.parse_args(argv)
    try:
        results.check_ours(f"{args.results}.md")
        if args.jobs is not None and args.jobs < 1:
            raise ValueError(f"--jobs {args.jobs}: expected at least 1")
        plan = Plan(args)

        def text(store):
            remarks = {name: f"{HERE}/docs/results_{name}.md" for name in TOYS} if args.results == "RESULTS" else {}  # they speak of our numbers
            notes = {name: open(path).read() for name, path in remarks.items() if os.path.isfile(path)}
            return results.render(store, tables=TABLES, claims=CLAIMS, controls=CONTROLS, memory=MEMORY, settings=SETTINGS, compared=COMPARED, labels=LABELS,
                                  needs=NEEDS, design=DESIGN_SEEDS,
                                  commands={k: v[4] for k, v in TOYS.items()}, chosen=(plan.label, args.tables or ()), notes=notes)
        if args.render:
            if not os.path.exists(f"{args.results}.json"):
                raise FileNotFoundError(f"no file {args.results}.json to render")
            results.write(args.results, text)
            return 0
        status = work(plan, text)
        print(f"{args.results}.md written")
        return status
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"tables.py: {error}")


if __name__ == "__main__":
    sys.exit(main())
