"""What SoLa brings on the toy data, and what it costs; every number of a table comes from one run of this program.

    python benchmarks/sola.py study runs/toy-0 runs/toy-1 runs/toy-2 --out runs/sola-study [--conditions] [--head-seeds 2]
    python benchmarks/sola.py settings runs/toy-2 --out runs/sola-settings
    python benchmarks/sola.py cost --data data/toy-0 --checkpoint runs/toy-0/acp/pretrain/encoder.pt

study: finished runs of train.sh with rows acp and lofi, one data seed each. For the features of each encoder: raw, their moving average (the control: what
plain smoothing brings; two widths) and SoLa. Linear probe "action or background" on the validation videos, also as the plainest of heads; mAP of a fresh G-TAD head;
both again with a tenth of the labels (SoLa itself reads none). AR@5 is class-agnostic; the G-TAD head's mAP also needs the run's own video classifier. Mean +- standard
deviation over data seeds, each the mean over head seeds, and SoLa's differences paired by seed, with the number of seeds where it is ahead.
--conditions adds features that come nearer to the paper's: "ACP, fine", twice as many snippets a video, so that a subsequence covers less of it; "whole-video",
an encoder made temporally insensitive, by training it on to give one answer, the video's class, for any moment of an untrimmed video.
settings: the same probe for other settings of SoLa's training, on one data seed, which is for choosing: no result.
Stages are lofi_tal.py's own; stopped and started again, it goes on.

cost: trainable parameters, peak memory above an idle process, seconds an epoch (one pass over the training videos) of SoLa, ACP+ and LoFi end to end, each
in a process of its own, on the same machine and data.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import config
import data
import engine
import evaluate
import lofi_tal
from sola import fit_probe, linear_probe, moving_average, snippet_labels

SOLA, LOFI = f"{ROOT}/configs/sola_toy.yaml", f"{ROOT}/configs/toy.yaml"
VARIANTS = {"raw": "{}", "narrow": "{}, {}-tap moving average", "average": "{}, {}-tap moving average", "sola": "SoLa on {}"}  # narrow: linear probe only
MEASURES = {  # by table, by column: where it stands in the numbers of a row
    "linear probe, and detections by it alone": {
        "accuracy": ("probe", "accuracy"), "AUC": ("probe", "auc"), "mAP": ("probe", "average"), "@0.75": ("probe", "0.75"), "AR@5": ("probe", "AR@5"),
        "AUC, 1/10 labels": ("probe tenth", "auc"), "mAP, 1/10 labels": ("probe tenth", "average")},
    "G-TAD head": {
        "mAP": ("all", "average"), "@0.75": ("all", "0.75"), "AR@5": ("all", "AR@5"),
        "mAP, 1/10 labels": ("tenth", "average"), "@0.75, 1/10 labels": ("tenth", "0.75"), "AR@5, 1/10 labels": ("tenth", "AR@5")}}
SETTINGS = {  # of SoLa's training, one changed at a time
    "configs/sola_toy.yaml": [],
    "published length for so many videos: 1 draw": ["sola.draws=1"],
    "input not standardized": ["sola.standardize=false"],
    "learning rate 1e-3": ["sola.lr=1.0e-3"],
    "coefficient 4": ["sola.coefficient=4"],
    "coefficient 64": ["sola.coefficient=64"],
    "positions 1 apart": ["sola.positions=[8, 9, 10, 11, 12, 13, 14, 15]"],
    "positions 3 apart": ["sola.positions=[1, 4, 7, 10, 13, 16, 19, 22]"]}


def read(path):
    with open(path) as f:
        return json.load(f)


def run(cfg, out, *words):
    lofi_tal.main(["--cfg", cfg, "--set", f"out={out}", *words])


# ---------------------------------------------------------------- study

def tenth(annotations, path):
    """The same annotations with every class's first tenth of the training videos alone; all validation videos."""
    content, count = read(annotations), {}
    total = sum(v["subset"] == "training" for v in content["database"].values())
    classes = {a["label"] for v in content["database"].values() for a in v["annotations"]}
    kept = {}
    for name, video in content["database"].items():
        label = video["annotations"][0]["label"]
        if video["subset"] == "training":
            count[label] = count.get(label, 0) + 1
            if count[label] > max(total // 10 // len(classes), 1):
                continue
        kept[name] = video
    engine.save_json({**content, "database": kept}, path)


def whole_videos(annotations, path):
    """The same annotations with one segment a training video, all of it: what a label of the whole video says."""
    content = read(annotations)
    for video in content["database"].values():
        if video["subset"] == "training":
            video["annotations"] = [{"segment": [0, video["duration"]], "label": video["annotations"][0]["label"]}]
    engine.save_json(content, path)


def average(raw, out, taps):
    if os.path.exists(f"{out}/features.json"):
        return
    for file in sorted(os.listdir(raw)):
        if file.endswith(".npy"):
            x = moving_average(torch.from_numpy(np.load(f"{raw}/{file}")).t()[None], taps)[0].t()
            engine.write_aside(f"{out}/{file}", lambda f: np.save(f, x.numpy()))
    engine.save_json({"from": raw, "taps": taps}, f"{out}/features.json")


def snippet_probe(folder, annotations):
    """The linear probe, and detections by it alone: {"accuracy", "auc", "background", "average", "0.75", "AR@5"}.

    A probe with no temporal reach is the plainest head: what it gains, it gains from the features. Its detections are the runs of snippets above each of nine
    probabilities, scored by their mean against that of half a length on either side; soft-NMS; each video's true class.
    """
    rows, subsets = [], data.load_annotations(annotations)
    for subset in ("training", "validation"):
        dataset = data.FeatureDataset(subsets[subset], folder, [])
        samples = [dataset[i, data.NATIVE] for i in range(len(dataset))]
        rows += [torch.cat([s["features"].t() for s in samples]), torch.cat([snippet_labels(s["segments"], s["features"].shape[1]) for s in samples])]
    predict, results = fit_probe(*rows[:2]), {}
    for video, sample in zip(dataset.videos, samples):
        p = predict(sample["features"].t()).sigmoid()
        L, runs = len(p), set()
        for threshold in torch.arange(0.1, 0.95, 0.1):
            above = torch.nn.functional.pad((p > threshold).int(), (1, 1)).diff()
            runs |= set(zip((above == 1).nonzero()[:, 0].tolist(), (above == -1).nonzero()[:, 0].tolist()))
        runs = sorted(runs) or [(0, L)]
        around = [torch.cat([p[max(s - (e - s + 1) // 2, 0):s], p[e:e + (e - s + 1) // 2], p.new_zeros(1)]) for s, e in runs]
        scores = torch.stack([(1 + p[s:e].mean() - a.sum() / max(len(a) - 1, 1)) / 2 for (s, e), a in zip(runs, around)])
        kept = evaluate.soft_nms(torch.tensor(runs)[None] / L, scores[None])
        results |= evaluate.fuse_classes(*kept, [video.name], [video.duration], np.ones((1, 1)), [video.labels[0]])
    metrics = evaluate.evaluate(annotations, {"results": results}, ar=True, analysis=False)
    return {**linear_probe(*rows), "average": metrics["average_mAP"], "0.75": metrics["mAP"]["0.75"], "AR@5": metrics["AR"]["AR@5"]}


def sources(run_folder, out, annotations, frames, seed, conditions):
    """{name: (folder of raw features, taps of their two moving averages)}; makes those of the conditions."""
    found = {"ACP": (f"{run_folder}/acp/features", (3, 5)), "LoFi": (f"{run_folder}/lofi/features", (3, 5))}
    if conditions:
        snippets = 2 * read(f"{run_folder}/acp/features/features.json")["snippets"]
        common = [f"seed={seed}", f"data.frames={frames}", f"pretrain.checkpoint={run_folder}/acp/pretrain/encoder.pt"]
        run(LOFI, f"{out}/fine", "stages=[features]", *common, f"data.annotations={annotations}", f"data.snippets={snippets}", f"features.chunk={snippets}")
        whole_videos(annotations, f"{out}/whole.json")
        run(LOFI, f"{out}/insensitive", "stages=[pretrain,features]", *common, f"data.annotations={out}/whole.json", "pretrain.method=acp_plus")
        found |= {"ACP, fine": (f"{out}/fine/features", (5, 9)), "whole-video": (f"{out}/insensitive/features", (3, 5))}
    return found


def study_one(run_folder, out, *, annotations, frames, conditions, head_seeds, words):
    """All numbers of one data seed: {source: {variant: {"probe": {...}, "all": [metrics by head seed], "tenth": [...]}}}."""
    seed = read(f"{run_folder}/acp/config.json")["seed"]
    tenth(annotations, f"{out}/tenth.json")
    labels = {"all": (annotations, 20), "tenth": (f"{out}/tenth.json", 100)}  # epochs: a tenth of the videos, half the steps
    found = {}
    for source, (raw, taps) in sources(run_folder, out, annotations, frames, seed, conditions).items():
        place = f"{out}/{source.replace(', ', '_')}"
        average(raw, f"{place}/narrow", taps[0])
        average(raw, f"{place}/average", taps[1])
        run(SOLA, f"{place}/sola", f"seed={seed}", "stages=[sola]", f"data.annotations={annotations}", f"data.features={raw}", *words)
        folders = dict(zip(VARIANTS, (raw, f"{place}/narrow", f"{place}/average", f"{place}/sola/sola/features")))
        found[source] = {}
        for variant, folder in folders.items():
            row = found[source][variant] = {"probe": snippet_probe(folder, annotations), "probe tenth": snippet_probe(folder, f"{out}/tenth.json")}
            for name, (file, epochs) in labels.items() if variant != "narrow" else ():
                for k in range(head_seeds):
                    run(SOLA, f"{place}/{variant}-{name}-{k}", f"seed={seed + 1000 * k}", "stages=[head,detect]", f"data.annotations={file}",
                        f"data.features={folder}", f"head.epochs={epochs}")
                metrics = [read(f"{place}/{variant}-{name}-{k}/metrics.json") for k in range(head_seeds)]
                row[name] = [{"average": m["average_mAP"], **m["mAP"], "AR@5": m["AR"]["AR@5"]} for m in metrics]
        last = [json.loads(line) for line in open(f"{place}/sola/sola/metrics.jsonl")][-1]
        found[source]["training"] = {k: last[k] for k in ("loss", "floor", "spread", "gate")} | {"taps": taps}
    engine.save_json(found, f"{out}/numbers.json")
    return found


def value(seed, source, variant, where):
    row = seed[source][variant][where[0]]
    return 100 * (statistics.mean(r[where[1]] for r in row) if isinstance(row, list) else row[where[1]])


def spread_of(values):
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} +- {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def tables(seeds):
    """Markdown: for each group of measures the rows, then SoLa's paired differences from raw features and from their moving average."""
    lines = []
    for group, measures in MEASURES.items():
        lines += [f"| {group} (%) | " + " | ".join(measures) + " |", "|---|" + "--:|" * len(measures)]
        variants = [v for v in VARIANTS if v != "narrow" or "probe" in group]
        names = {(source, v): name.format(source, seeds[0][source]["training"]["taps"][v == "average"]) for source in seeds[0] for v, name in VARIANTS.items()}
        for source in seeds[0]:
            for variant in variants:
                lines.append(f"| {names[source, variant]} | " + " | ".join(spread_of([value(s, source, variant, m) for s in seeds]) for m in measures.values()) + " |")
        for source in seeds[0]:
            for other in variants[:-1]:
                cells = []
                for m in measures.values():
                    gaps = [value(s, source, "sola", m) - value(s, source, other, m) for s in seeds]
                    cells.append(f"{spread_of(gaps)} ({sum(g > 0 for g in gaps)} of {len(gaps)})")
                lines.append(f"| *SoLa on {source} - {names[source, other]}* | " + " | ".join(cells) + " |")
        lines.append("")
    lines.append("Last epoch of SoLa's training: " + "; ".join(
        f"{source} " + ", ".join(f"{k} {spread_of([abs(s[source]['training'][k]) for s in seeds])}" for k in ("loss", "floor", "spread", "gate")) for source in seeds[0]))
    return "\n".join(lines)


def study(args):
    seeds = []
    for i, folder in enumerate(args.runs):
        cfg = read(f"{folder}/acp/config.json")
        annotations = args.annotations[i] if args.annotations else cfg["data"]["annotations"]
        frames = os.path.join(os.path.dirname(annotations), "frames")
        out = f"{args.out}/{i}"
        seeds.append(study_one(folder, out, annotations=annotations, frames=frames, conditions=args.conditions, head_seeds=args.head_seeds, words=args.set))
        print(f"\n{len(seeds)} of {len(args.runs)} data seeds: {', '.join(args.runs[:len(seeds)])}\n\n{tables(seeds)}\n", flush=True)
    engine.write_aside(f"{args.out}/tables.md", lambda f: f.write((tables(seeds) + "\n").encode()))


def settings(args):
    folder = args.runs
    annotations = args.annotations or read(f"{folder}/acp/config.json")["data"]["annotations"]
    measures = MEASURES["linear probe, and detections by it alone"].values()
    print("| SoLa's training (%) | on | " + " | ".join(MEASURES["linear probe, and detections by it alone"]) + " | gate | loss - floor | seconds |\n|---|---|" + "--:|" * (len(measures) + 3))
    tenth(annotations, f"{args.out}/tenth.json")
    for source in ("acp", "lofi"):
        for number, (name, words) in enumerate({"none": None, **SETTINGS}.items()):
            out, raw = f"{args.out}/{source}-{number}", f"{folder}/{source}/features"
            if words is not None:
                run(SOLA, out, "stages=[sola]", f"data.annotations={annotations}", f"data.features={raw}", *words)
            made = raw if words is None else f"{out}/sola/features"
            found = {"probe": snippet_probe(made, annotations), "probe tenth": snippet_probe(made, f"{args.out}/tenth.json")}
            last = {} if words is None else [json.loads(line) for line in open(f"{out}/sola/metrics.jsonl")][-1]
            more = f"{last['gate']:.3f} | {last['loss'] - last['floor']:.3f} | {read(f'{made}/features.json')['sola_seconds']:.0f}" if last else "| |"
            print(f"| {name} | {source.upper()} | " + " | ".join(f"{100 * found[part][key]:.2f}" for part, key in measures) + f" | {more} |", flush=True)


# ---------------------------------------------------------------- cost

def measured(kind, data_folder, checkpoint, features, words):
    """One stage in this process: its trainable parameters, and by epoch seconds and peak memory in GB."""
    fit, parameters = engine.fit, []

    def counting(model, *args, **kwargs):
        parameters.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
        return fit(model, *args, **kwargs)
    engine.fit = counting
    idle = torch.cuda.memory_allocated() / 1e9 if torch.cuda.is_available() else engine.peak_memory_gb(torch.device("cpu"))
    common = [f"data.annotations={data_folder}/annotations.json", f"data.frames={data_folder}/frames", f"pretrain.checkpoint={checkpoint}", *words]
    with tempfile.TemporaryDirectory() as out:
        if kind == "SoLa":
            run(SOLA, out, "stages=[sola]", f"data.features={features}", "sola.draws=1", "sola.epochs=10", *common)
            log = f"{out}/sola/metrics.jsonl"
        elif kind == "ACP+":
            run(LOFI, out, "stages=[pretrain]", "pretrain.method=acp_plus", "pretrain.acp_plus.epochs=2", *common)
            log = f"{out}/pretrain/acp_plus/metrics.jsonl"
        else:
            run(LOFI, out, "stages=[pretrain,lofi]", "lofi.epochs=3", *common)  # one epoch each of S, T and ST
            log = f"{out}/lofi/metrics.jsonl"
        lines = [json.loads(line) for line in open(log)]
    seconds = [r["seconds"] for r in lines]
    return {"parameters": parameters[-1], "memory_gb": max(r["peak_memory_gb"] for r in lines) - idle,
            "seconds": statistics.median(seconds) if kind == "SoLa" else statistics.mean(seconds)}


def cost(args):
    if args.kind:
        print(json.dumps(measured(args.kind, args.data, args.checkpoint, args.features, args.set)))
        return
    with tempfile.TemporaryDirectory() as out:
        features = args.features
        if not features:  # which all three need once, for their heads
            run(LOFI, out, "stages=[features]", f"data.annotations={args.data}/annotations.json", f"data.frames={args.data}/frames",
                f"pretrain.checkpoint={args.checkpoint}", *args.set)
            features = f"{out}/features"
        rows = {}
        for kind in ("SoLa", "ACP+", "LoFi"):
            command = [sys.executable, __file__, "cost", "--data", args.data, "--checkpoint", args.checkpoint, "--features", features, "--kind", kind]
            command += ["--set", *args.set] if args.set else []
            rows[kind] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    sola, rest = config.load(SOLA).sola, config.load(LOFI)
    passes = {"SoLa": sola.epochs * sola.draws, "ACP+": rest.pretrain.acp_plus.epochs, "LoFi": rest.lofi.epochs}
    print(f"torch {torch.__version__}, {device}; {args.data}\n\n| training of | trainable parameters | peak memory, MB | seconds an epoch | of LoFi's | epochs of the toy's config "
          "| seconds in all |\n|---|--:|--:|--:|--:|--:|--:|")
    for kind, r in rows.items():
        print(f"| {kind} | {r['parameters']:,} | {1000 * r['memory_gb']:.0f} | {r['seconds']:.3g} | {r['seconds'] / rows['LoFi']['seconds']:.3g} "
              f"| {passes[kind]} | {r['seconds'] * passes[kind]:.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    a = commands.add_parser("study")
    a.set_defaults(run=study)
    a.add_argument("runs", nargs="+", help="folders with acp/ and lofi/")
    a.add_argument("--annotations", nargs="+", help="one a run; default: the path in the run's config. The frames lie beside it")
    a.add_argument("--out", default="runs/sola-study")
    a.add_argument("--head-seeds", type=int, default=2)
    a.add_argument("--conditions", action="store_true")
    a.add_argument("--set", nargs="+", default=[], metavar="sola.key=value", help="other settings of SoLa's training")
    a = commands.add_parser("settings")
    a.set_defaults(run=settings)
    a.add_argument("runs", help="a folder with acp/ and lofi/")
    a.add_argument("--annotations")
    a.add_argument("--out", default="runs/sola-settings")
    a = commands.add_parser("cost")
    a.set_defaults(run=cost)
    a.add_argument("--data", required=True)
    a.add_argument("--checkpoint", required=True, help="the encoder that ACP+ and LoFi start from")
    a.add_argument("--features", help="its features; default: extracted first")
    a.add_argument("--kind", help=argparse.SUPPRESS)
    a.add_argument("--set", nargs="+", default=[], metavar="key.sub=value")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
