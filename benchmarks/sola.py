"""Measure what SoLa brings on the toy data, and what it costs; each table comes from one run.

    python -m benchmarks.sola study runs/toy-0 runs/toy-1 runs/toy-2 --out runs/sola-study \\
        [--conditions] [--head-seeds 2]
    python -m benchmarks.sola settings runs/toy-2 --out runs/sola-settings
    python -m benchmarks.sola cost [--data data/toy-0 \\
        --checkpoint runs/toy-0/acp/pretrain/encoder.pt]

study: finished runs of train.sh with rows acp and lofi, one data seed each. For the features of
each encoder: raw, their moving average (the control: what plain smoothing brings; two widths) and
SoLa. Linear probe "action or background" on the validation videos, also as the plainest of heads;
mAP of a fresh G-TAD head; both again with a tenth of the labels (SoLa itself reads none). AR@5 is
class-agnostic; the G-TAD head's mAP also needs the run's own video classifier. Mean +- standard
deviation over data seeds, each the mean over head seeds, and SoLa's differences paired by seed,
with the number of seeds where it is ahead.
--conditions adds features that come nearer to the paper's: "ACP, fine", twice as many snippets a
video, so that a subsequence covers less of it; "whole-video", an encoder made temporally
insensitive, by training it on to give one answer, the video's class, for any moment of a video.

settings: the same probe for other settings of SoLa's training, on one data seed, which is for
choosing: no result.

cost: trainable parameters, peak memory above an idle process, seconds an epoch (one pass over the
training videos) of SoLa, ACP+ and LoFi end to end, each in a process of its own. Without --data a
toy data set is made for it, and the encoder's weights are random.

Stages are lofi_tal.py's own; rerun the same command to resume.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass

import numpy as np
import torch

import evaluate
import lofi_tal
from benchmarks.table import Row, rounded
from checkpoint import (
    load_json,
    machine_name,
    peak_memory_gb,
    save_json,
    save_weights,
    write_atomic,
)
from config import load_config
from data import FeatureDataset, load_annotations
from localizer import build_encoder
from tools.make_toy import Toy, make_toy
from tools.probe_sola import fit_probe, linear_probe, moving_average, snippet_labels

SOLA = "configs/sola_toy.yaml"
LOFI = "configs/toy.yaml"
# Names of what is compared, for the features and the width of the average; narrow is probed only.
VARIANTS = {
    "raw": "{0}",
    "narrow": "{0}, {1}-tap moving average",
    "average": "{0}, {1}-tap moving average",
    "sola": "SoLa on {0}",
}
# By table, then by column: the group and the key of a measure in the numbers of a variant.
PROBE_TABLE = "linear probe, and detections by it alone"
HEAD_TABLE = "G-TAD head"
MEASURES = {
    PROBE_TABLE: {
        "accuracy": ("probe", "accuracy"),
        "AUC": ("probe", "auc"),
        "mAP": ("probe", "average"),
        "@0.75": ("probe", "0.75"),
        "AR@5": ("probe", "AR@5"),
        "AUC, 1/10 labels": ("probe tenth", "auc"),
        "mAP, 1/10 labels": ("probe tenth", "average"),
    },
    HEAD_TABLE: {
        "mAP": ("all", "average"),
        "@0.75": ("all", "0.75"),
        "AR@5": ("all", "AR@5"),
        "mAP, 1/10 labels": ("tenth", "average"),
        "@0.75, 1/10 labels": ("tenth", "0.75"),
        "AR@5, 1/10 labels": ("tenth", "AR@5"),
    },
}
SETTINGS = {  # of SoLa's training, one changed at a time
    "configs/sola_toy.yaml": [],
    "published length: 1 subsequence a video": ["sola.subsequences_per_video=1"],
    "input not standardized": ["sola.standardize=false"],
    "learning rate 1e-3": ["sola.lr=1e-3"],
    "coefficient 4": ["sola.similarity_coefficient=4"],
    "coefficient 64": ["sola.similarity_coefficient=64"],
    "positions 1 apart": ["sola.positions=[8, 9, 10, 11, 12, 13, 14, 15]"],
    "positions 3 apart": ["sola.positions=[1, 4, 7, 10, 13, 16, 19, 22]"],
}


def run(cfg, out, *overrides):
    """Run stages of lofi_tal.py in this process."""
    lofi_tal.main(["--cfg", cfg, "--set", f"out={out}", *overrides])


def last_epoch(path):
    """Return the last record of a metrics.jsonl."""
    with open(path) as file:
        return json.loads(file.readlines()[-1])


def row(cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def rule(columns):
    return "|---|" + "--:|" * (columns - 1)


# ------------------------------------------------------------------------------------ annotations


def write_tenth(annotations, path):
    """Write annotations with the first tenth of each class's training videos; all validation."""
    content = load_json(annotations)
    database = content["database"]
    total = sum(video["subset"] == "training" for video in database.values())
    classes = {entry["label"] for video in database.values() for entry in video["annotations"]}
    most = max(total // 10 // len(classes), 1)
    count = dict.fromkeys(classes, 0)
    kept = {}
    for name, video in database.items():
        if video["subset"] == "training":
            label = video["annotations"][0]["label"]
            count[label] += 1
            if count[label] > most:
                continue
        kept[name] = video
    save_json({**content, "database": kept}, path)


def write_whole_videos(annotations, path):
    """Write annotations with one segment a training video, all of it: a label of the video."""
    content = load_json(annotations)
    for video in content["database"].values():
        if video["subset"] == "training":
            label = video["annotations"][0]["label"]
            video["annotations"] = [{"segment": [0, video["duration"]], "label": label}]
    save_json(content, path)


# ------------------------------------------------------------------------------------------ study


def write_average(raw, out, taps):
    """Write moving averages of a folder of features."""
    if os.path.exists(f"{out}/features.json"):
        return
    for file in sorted(os.listdir(raw)):
        if file.endswith(".npy"):
            x = torch.from_numpy(np.load(f"{raw}/{file}"))
            x = moving_average(x.t()[None], taps)[0].t().numpy()
            write_atomic(f"{out}/{file}", lambda f, x=x: np.save(f, x))
    save_json({"from": raw, "taps": taps}, f"{out}/features.json")


def probe_detections(probabilities):
    """Return runs of snippets above each of nine thresholds: segments (1, N, 2), scores (1, N).

    A run is scored by its mean against that of half its length on either side.
    """
    p = probabilities
    L = len(p)
    runs = set()
    for threshold in torch.arange(0.1, 0.95, 0.1):
        edges = torch.nn.functional.pad((p > threshold).int(), (1, 1)).diff()
        starts = (edges == 1).nonzero().flatten().tolist()
        ends = (edges == -1).nonzero().flatten().tolist()
        runs |= set(zip(starts, ends, strict=True))
    runs = sorted(runs) or [(0, L)]
    scores = []
    for start, end in runs:
        before = max(start - (end - start + 1) // 2, 0)
        around = torch.cat([p[before:start], p[end : end + (end - start + 1) // 2]])
        background = around.sum() / max(len(around), 1)
        scores.append((1 + p[start:end].mean() - background) / 2)
    return torch.tensor(runs)[None] / L, torch.stack(scores)[None]


def snippet_probe(folder, annotations):
    """Return the linear probe's measures, and mAP and AR@5 of detections by it alone.

    A probe with no temporal reach is the plainest head: what it gains, it gains from the features.
    Each detection gets its video's true class.
    """
    subsets = load_annotations(annotations)
    rows = {}
    labels = {}
    for subset in ("training", "validation"):
        dataset = FeatureDataset(subsets[subset], folder)
        features = [dataset.features(i) for i in range(len(dataset))]
        rows[subset] = torch.cat([x.t() for x in features])
        actions = [video.actions[0] for video in dataset.videos]
        parts = [snippet_labels(a, x.shape[1]) for a, x in zip(actions, features, strict=True)]
        labels[subset] = torch.cat(parts)
    predict = fit_probe(rows["training"], labels["training"])
    results = {}
    for video, x in zip(dataset.videos, features, strict=True):
        segments, scores = probe_detections(predict(x.t()).sigmoid())
        kept = evaluate.soft_nms(segments, scores)
        classes = (np.ones((1, 1)), video.labels[:1])
        results |= evaluate.fuse_classes(*kept, [video.name], [video.duration], *classes)
    metrics = evaluate.evaluate(annotations, {"results": results}, ar=True, analysis=False)
    held_out = (rows["validation"], labels["validation"])
    return {
        **linear_probe(rows["training"], labels["training"], *held_out),
        **selected(metrics),
    }


def selected(metrics):
    """Return the measures of a metrics.json that the tables show, and all mAPs."""
    return {"average": metrics["average_mAP"], **metrics["mAP"], "AR@5": metrics["AR"]["AR@5"]}


@dataclass
class Seed:
    """A finished run of train.sh, and where its study goes."""

    folder: str
    out: str
    annotations: str

    @property
    def number(self):
        return load_json(f"{self.folder}/acp/config.json")["seed"]

    @property
    def frames(self):
        return os.path.join(os.path.dirname(self.annotations), "frames")


@dataclass
class Source:
    """A folder of raw features, and the widths of their two moving averages."""

    folder: str
    taps: tuple[int, int] = (3, 5)


def list_sources(seed, conditions):
    """Return {name: Source}; make those of the conditions."""
    found = {name: Source(f"{seed.folder}/{name.lower()}/features") for name in ("ACP", "LoFi")}
    if not conditions:
        return found
    snippets = 2 * load_json(f"{found['ACP'].folder}/features.json")["snippets"]
    encoder = f"{seed.folder}/acp/pretrain/encoder.pt"
    common = [f"seed={seed.number}", f"data.frames={seed.frames}", f"pretrain.pretrained={encoder}"]
    run(
        LOFI,
        f"{seed.out}/fine",
        "stages=[features]",
        f"data.annotations={seed.annotations}",
        f"video.snippets={snippets}",
        f"features.chunk_snippets={snippets}",
        *common,
    )
    write_whole_videos(seed.annotations, f"{seed.out}/whole.json")
    run(
        LOFI,
        f"{seed.out}/insensitive",
        "stages=[pretrain,features]",
        f"data.annotations={seed.out}/whole.json",
        "pretrain.method=acp_plus",
        *common,
    )
    found["ACP, fine"] = Source(f"{seed.out}/fine/features", (5, 9))
    found["whole-video"] = Source(f"{seed.out}/insensitive/features")
    return found


def train_heads(seed, folder, place, variant, head_seeds):
    """Return {"all": [metrics by head seed], "tenth": [...]} of fresh heads on features."""
    # A tenth of the videos in five times the epochs: half the steps.
    labels = {"all": (seed.annotations, 20), "tenth": (f"{seed.out}/tenth.json", 100)}
    found = {}
    for name, (annotations, epochs) in labels.items():
        found[name] = []
        for k in range(head_seeds):
            out = f"{place}/{variant}-{name}-{k}"
            run(
                SOLA,
                out,
                f"seed={seed.number + 1000 * k}",
                "stages=[head,detect]",
                f"data.annotations={annotations}",
                f"data.features={folder}",
                f"head.epochs={epochs}",
            )
            found[name].append(selected(load_json(f"{out}/metrics.json")))
    return found


def study_seed(seed, conditions, head_seeds, overrides):
    """Return all numbers of a data seed, {source: {variant: {group: measures or a list of them}}}.

    overrides: of SoLa's training.
    """
    write_tenth(seed.annotations, f"{seed.out}/tenth.json")
    found = {}
    for name, source in list_sources(seed, conditions).items():
        place = f"{seed.out}/{name.replace(', ', '_')}"
        narrow, wide = source.taps
        write_average(source.folder, f"{place}/narrow", narrow)
        write_average(source.folder, f"{place}/average", wide)
        run(
            SOLA,
            f"{place}/sola",
            f"seed={seed.number}",
            "stages=[sola]",
            f"data.annotations={seed.annotations}",
            f"data.features={source.folder}",
            *overrides,
        )
        folders = {
            "raw": source.folder,
            "narrow": f"{place}/narrow",
            "average": f"{place}/average",
            "sola": f"{place}/sola/sola/features",
        }
        found[name] = {}
        for variant, folder in folders.items():
            measures = {
                "probe": snippet_probe(folder, seed.annotations),
                "probe tenth": snippet_probe(folder, f"{seed.out}/tenth.json"),
            }
            if variant != "narrow":
                measures |= train_heads(seed, folder, place, variant, head_seeds)
            found[name][variant] = measures
        last = last_epoch(f"{place}/sola/sola/metrics.jsonl")
        training = {key: last[key] for key in ("loss", "floor", "spread", "gate")}
        found[name]["training"] = {**training, "taps": source.taps}
    save_json(found, f"{seed.out}/numbers.json")
    return found


def percent_of(numbers, source, variant, measure):
    """Return a measure of one seed in per cent, the mean over head seeds."""
    group, key = measure
    values = numbers[source][variant][group]
    values = values if isinstance(values, list) else [values]
    return 100 * statistics.mean(value[key] for value in values)


def mean_and_deviation(values):
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} +- {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def format_tables(seeds):
    """Format measures by variant, and SoLa's paired differences, over the numbers of seeds."""
    lines = []
    for title, measures in MEASURES.items():
        variants = [v for v in VARIANTS if v != "narrow" or title == PROBE_TABLE]
        lines += [row([f"{title} (%)", *measures]), rule(len(measures) + 1)]
        differences = []
        for source in seeds[0]:
            for variant in variants:
                taps = seeds[0][source]["training"]["taps"][variant == "average"]
                label = VARIANTS[variant].format(source, taps)
                cells = [label]
                gap_cells = [f"*SoLa on {source} - {label}*"]
                for measure in measures.values():
                    values = [percent_of(s, source, variant, measure) for s in seeds]
                    of_sola = [percent_of(s, source, "sola", measure) for s in seeds]
                    gaps = [a - b for a, b in zip(of_sola, values, strict=True)]
                    ahead = sum(gap > 0 for gap in gaps)
                    cells.append(mean_and_deviation(values))
                    gap_cells.append(f"{mean_and_deviation(gaps)} ({ahead} of {len(gaps)})")
                lines.append(row(cells))
                if variant != "sola":
                    differences.append(row(gap_cells))
        lines += [*differences, ""]
    lines.append("Last epoch of SoLa's training:")
    for source in seeds[0]:
        last = []
        for key in ("loss", "floor", "spread", "gate"):
            values = [abs(s[source]["training"][key]) for s in seeds]
            last.append(f"{key} {mean_and_deviation(values)}")
        lines.append(f"- {source}: {', '.join(last)}")
    return "\n".join(lines)


def annotations_of(folder):
    return load_json(f"{folder}/acp/config.json")["data"]["annotations"]


def study(args):
    seeds = []
    paths = args.annotations or [annotations_of(folder) for folder in args.runs]
    for i, (folder, path) in enumerate(zip(args.runs, paths, strict=True)):
        seed = Seed(folder, f"{args.out}/{i}", path)
        seeds.append(study_seed(seed, args.conditions, args.head_seeds, args.set))
        title = f"{i + 1} of {len(args.runs)} data seeds: {', '.join(args.runs[: i + 1])}"
        text = format_tables(seeds)
        print(f"\n{title}\n\n{text}\n", flush=True)
    write_atomic(f"{args.out}/tables.md", lambda file: file.write(f"{text}\n".encode()))


def settings(args):
    annotations = args.annotations or annotations_of(args.runs)
    write_tenth(annotations, f"{args.out}/tenth.json")
    measures = MEASURES[PROBE_TABLE]
    header = ["SoLa's training (%)", "on", *measures, "gate", "loss - floor", "seconds"]
    print(f"{row(header)}\n{rule(len(header))}")
    for source in ("acp", "lofi"):
        raw = f"{args.runs}/{source}/features"
        for number, (name, overrides) in enumerate({"none": None, **SETTINGS}.items()):
            folder = raw
            training = ["", "", ""]
            if overrides is not None:
                out = f"{args.out}/{source}-{number}"
                inputs = [f"data.annotations={annotations}", f"data.features={raw}"]
                run(SOLA, out, "stages=[sola]", *inputs, *overrides)
                folder = f"{out}/sola/features"
                last = last_epoch(f"{out}/sola/metrics.jsonl")
                seconds = load_json(f"{folder}/features.json")["sola_seconds"]
                above_floor = last["loss"] - last["floor"]
                training = [f"{last['gate']:.3f}", f"{above_floor:.3f}", f"{seconds:.0f}"]
            found = {
                "probe": snippet_probe(folder, annotations),
                "probe tenth": snippet_probe(folder, f"{args.out}/tenth.json"),
            }
            values = [f"{100 * found[group][key]:.2f}" for group, key in measures.values()]
            print(row([name, source.upper(), *values, *training]), flush=True)


# ------------------------------------------------------------------------------------------- cost

STAGES = {  # of each kind of training: config, overrides and log
    "SoLa": (
        SOLA,
        ["stages=[sola]", "sola.subsequences_per_video=1", "sola.epochs=10"],
        "sola/metrics.jsonl",
    ),
    "ACP+": (
        LOFI,
        ["stages=[pretrain]", "pretrain.method=acp_plus", "pretrain.acp_plus.epochs=2"],
        "pretrain/acp_plus/metrics.jsonl",
    ),
    "LoFi": (
        LOFI,
        ["stages=[pretrain,lofi]", "lofi.epochs=3"],  # one epoch each of S, T and ST
        "lofi/metrics.jsonl",
    ),
}


def measure(kind, overrides):
    """Train in this process; return trainable parameters, peak memory and seconds an epoch."""
    train = lofi_tal.train
    parameters = []

    def counting_train(model, *args, **options):
        parameters.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
        return train(model, *args, **options)

    lofi_tal.train = counting_train
    if torch.cuda.is_available():
        idle_gb = torch.cuda.memory_allocated() / 1e9
    else:
        idle_gb = peak_memory_gb(torch.device("cpu"))
    cfg, own_overrides, log = STAGES[kind]
    with tempfile.TemporaryDirectory() as out:
        run(cfg, out, *own_overrides, *overrides)
        with open(f"{out}/{log}") as file:
            records = [json.loads(line) for line in file]
    seconds = [record["seconds"] for record in records]
    # The first of SoLa's short epochs takes longer; LoFi's three are of three fidelities.
    average = statistics.median if kind == "SoLa" else statistics.mean
    return {
        "parameters": parameters[-1],
        "memory_mb": 1000 * (max(record["peak_memory_gb"] for record in records) - idle_gb),
        "seconds": average(seconds),
    }


def cost(args):
    with tempfile.TemporaryDirectory() as folder:
        if not args.data:
            args.data = f"{folder}/toy"
            make_toy(args.data, Toy(clips=1, stills=1))
        if not args.checkpoint:
            args.checkpoint = f"{folder}/encoder.pt"
            save_random_encoder(args.checkpoint)
        measure_costs(args)


def save_random_encoder(path):
    sizes = load_config(LOFI).encoder
    save_weights(build_encoder(**sizes), path, encoder=dict(sizes), seconds=0.0)


def inputs_of(args):
    """Return the config's overrides that all three share."""
    return [
        f"data.annotations={args.data}/annotations.json",
        f"data.frames={args.data}/frames",
        f"pretrain.pretrained={args.checkpoint}",
        *args.set,
    ]


def measure_costs(args):
    """Print what each kind of training costs; with args.kind, of one, in this process."""
    inputs = inputs_of(args)
    if getattr(args, "kind", None):
        features = [f"data.features={args.features}"] if args.kind == "SoLa" else []
        print(json.dumps(measure(args.kind, [*features, *inputs])))
        return
    rows = {}
    with tempfile.TemporaryDirectory() as out:
        features = args.features or f"{out}/features"
        if not args.features:
            run(LOFI, out, "stages=[features]", *inputs)
        options = ["--data", args.data, "--checkpoint", args.checkpoint, "--features", features]
        options += ["--set", *args.set] if args.set else []
        command = [sys.executable, "-m", "benchmarks.sola", "cost", *options]
        for kind in STAGES:
            text = subprocess.check_output([*command, "--kind", kind], text=True)
            rows[kind] = json.loads(text.splitlines()[-1])
    print_costs(rows, args.data)
    return rows


def print_costs(rows, data_folder):
    sola = load_config(SOLA).sola
    lofi = load_config(LOFI)
    epochs = {
        "SoLa": sola.epochs * sola.subsequences_per_video,
        "ACP+": lofi.pretrain.acp_plus.epochs,
        "LoFi": lofi.lofi.epochs,
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    machine = f"torch {torch.__version__}, {machine_name(device)}, {threads} threads"
    print(f"{machine}; {data_folder}\n")
    header = [
        "training of",
        "trainable parameters",
        "peak memory, MB",
        "seconds an epoch",
        "of LoFi's",
        "epochs of the toy's config",
        "seconds in all",
    ]
    print(f"{row(header)}\n{rule(len(header))}")
    for kind, cells in rows.items():
        seconds = cells["seconds"]
        share = seconds / rows["LoFi"]["seconds"]
        parameters = f"{cells['parameters']:,}"
        measured = [f"{cells['memory_mb']:.0f}", f"{seconds:.3g}", f"{share:.3g}"]
        total = f"{seconds * epochs[kind]:.0f}"
        print(row([kind, parameters, *measured, epochs[kind], total]))


def rows(quick=False):
    """Return rows of the benchmarks' table."""
    with tempfile.TemporaryDirectory() as folder:
        args = argparse.Namespace(data=f"{folder}/toy", checkpoint=f"{folder}/encoder.pt")
        args.features, args.set = None, []
        toy = Toy(clips=1, stills=1, **({"train": 2, "val": 2} if quick else {}))
        make_toy(args.data, toy, workers=0 if quick else None)
        save_random_encoder(args.checkpoint)
        if quick:
            run(LOFI, f"{folder}/run", "stages=[features]", *inputs_of(args))
            args.features = f"{folder}/run/features"
            inputs = [f"data.features={args.features}", *inputs_of(args)]
            costs = dict.fromkeys(STAGES, measure("SoLa", inputs))
        else:
            costs = measure_costs(args)
    found = []
    sola = costs.pop("SoLa")
    for kind, cells in costs.items():
        time_ratio = cells["seconds"] / sola["seconds"]
        memory_ratio = cells["memory_mb"] / max(sola["memory_mb"], 1e-3)
        ratio = f"1/{time_ratio:.0f} of the time, 1/{memory_ratio:.1f} of the memory"
        both = f"{rounded(sola['seconds'])}, {rounded(cells['seconds'])}"
        found.append(Row("an epoch of SoLa, toy data", f"an epoch of {kind}", ratio, both))
    return found


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sola",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("study")
    command.set_defaults(run=study)
    command.add_argument("runs", nargs="+", help="folders with acp/ and lofi/")
    command.add_argument(
        "--annotations", nargs="+", help="one a run, its frames beside it; default: as in the run"
    )
    command.add_argument("--out", default="runs/sola-study")
    command.add_argument("--head-seeds", type=int, default=2)
    command.add_argument("--conditions", action="store_true")
    command.add_argument("--set", nargs="+", default=[], metavar="sola.key=value")
    command = commands.add_parser("settings")
    command.set_defaults(run=settings)
    command.add_argument("runs", help="a folder with acp/ and lofi/")
    command.add_argument("--annotations")
    command.add_argument("--out", default="runs/sola-settings")
    command = commands.add_parser("cost")
    command.set_defaults(run=cost)
    command.add_argument("--data", help="a toy data set; default: one is made")
    command.add_argument("--checkpoint", help="what ACP+ and LoFi start from; default: random")
    command.add_argument("--features", help="its features; default: extracted first")
    command.add_argument("--kind", help=argparse.SUPPRESS)
    command.add_argument("--set", nargs="+", default=[], metavar="key.sub=value")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
