"""Rows of the paper's tables on the toy data, next to the paper's own numbers.

    python tables.py --tables 1 7 --seeds 0 1 2

A seed draws the data (toy.py), the encoders and the heads. Each row is one run of lofi_tal.py; rows share what they have in common, such as the ACP encoder.
Started again it goes on where it stopped: a row with a metrics.json is done, if its config is still the one asked for. Rows that ./train.sh has made are taken as they are.
The paper's numbers are LoFi's on ActivityNet-1.3, average mAP over tIoU 0.5:0.05:0.95: what can be compared is the order of the rows, not their height.
"""
import argparse
import json
import os
import subprocess
import sys

import numpy as np

import config
import evaluate

MARK = "<!-- made by tables.py -->"
HERE = os.path.dirname(os.path.abspath(__file__))
FROZEN, ACP = "stages=[pretrain,features,head,detect]", "pretrain.checkpoint={runs}/acp/pretrain/encoder.pt"

# name: (rows that must be there before it, words of lofi_tal.py --set)
ROWS = {
    "icp": ([], [FROZEN, "pretrain.method=icp", "encoder.shift_div=0"]),  # an image network has never seen shifted channels
    "acp": ([], [FROZEN, "pretrain.method=acp"]),
    "acp_plus": (["acp"], [FROZEN, "pretrain.method=acp_plus", ACP]),
    "acp_plus_background": (["acp"], [FROZEN, "pretrain.method=acp_plus_background", ACP]),
    "lofi": (["acp"], [ACP]),
    "arrow": ([], [FROZEN, "pretrain.method=arrow"]),
    "speed": ([], [FROZEN, "pretrain.method=speed"]),
    "acp_arrow": (["acp", "arrow"], ["stages=[head,detect]", "data.features=[{runs}/acp/features,{runs}/arrow/features]"]),
    "acp_speed": (["acp", "speed"], ["stages=[head,detect]", "data.features=[{runs}/acp/features,{runs}/speed/features]"]),
}

# table: (title, {row: (its name there, the paper's mAP @0.5, @0.75, @0.95 and average, None where the paper has no such row)}); gains are over the row "acp"
TABLES = {
    "1": ("pre-training of the encoder", {
        "icp": ("ICP", (48.45, 32.40, 6.89, 32.16)), "acp": ("ACP", (49.64, 34.16, 7.68, 33.59)), "acp_plus": ("ACP+", (49.87, 34.58, 7.85, 33.84)),
        "acp_plus_background": ("ACP+ with background", None), "lofi": ("LoFi", (50.68, 35.16, 8.16, 34.49))}),
    "7": ("self-supervised pre-training", {
        "acp": ("ACP", (49.64, 34.16, 7.68, 33.59)), "arrow": ("Arrow", (44.14, 28.87, 5.90, 28.82)), "speed": ("Speed", (44.50, 29.52, 6.14, 29.39)),
        "acp_arrow": ("ACP+Arrow", (49.79, 34.48, 7.70, 33.72)), "acp_speed": ("ACP+Speed", (49.84, 34.11, 7.50, 33.75)), "lofi": ("LoFi", (50.68, 35.16, 8.16, 34.49))}),
}


def in_order(names):
    """The rows and all that they need, each after what it needs."""
    out = []
    for name in names:
        out += [n for n in in_order(ROWS[name][0]) + [name] if n not in out]
    return out


def words_of(name, seed, data, runs):
    """Config words of a row."""
    return [f"seed={seed}", f"out={runs}/{name}", f"data.annotations={data}/annotations.json", f"data.frames={data}/frames",
            f"pretrain.icp.source={data}/stills", f"pretrain.acp.source={data}/clips", *(w.format(runs=runs) for w in ROWS[name][1])]


def is_done(cfg, name, words):
    """Whether a row has its metrics; ValueError if they are of another config than this row's."""
    out = (wanted := config.load(cfg, words)).out
    if not os.path.exists(f"{out}/metrics.json"):
        return False
    with open(f"{out}/config.json") as f:
        differ = config.differences(json.load(f), wanted)
    if differ:
        raise ValueError(f"{out} holds another row {name} than this one:\n" + "\n".join(differ) + "\nname another --runs, or remove that folder yourself")
    return True


def accuracy(folder):
    """Top-1 accuracy of a run's last pre-training on held-out clips, None if it has none."""
    path = f"{folder}/pretrain/accuracy.json"
    if os.path.exists(path):
        with open(path) as f:
            for record in reversed(json.load(f)["phases"].values()):
                return record["top1"]


def table(name, folders):
    """Markdown of one table. folders: {row: [the folder of each seed]}."""
    title, rows = TABLES[name]
    found = evaluate.compare([f"{rows[r][0]}={','.join(folders[r])}" for r in rows])
    average = {r: np.array([json.load(open(f"{f}/metrics.json"))["average_mAP"] for f in folders[r]]) for r in rows}
    lines = []
    for (r, (label, paper)), row in zip(rows.items(), found):
        gain, top1 = 100 * (average[r] - average["acp"]), [accuracy(f) for f in folders[r]]
        spread = row["std"] or {}
        cells = [f"{100 * row[k]:.2f}" + (f" ± {100 * spread[k]:.2f}" if spread else "") for k in ("0.5", "0.75", "0.95", "average")]
        cells.append("" if r == "acp" else f"{gain.mean():+.2f}" + (f" ± {gain.std(ddof=1):.2f}" if len(gain) > 1 else ""))
        cells += [f"{row['seconds']:.0f}", "" if None in top1 else f"{100 * np.mean(top1):.1f}", row["seeds"]]
        cells += ["", ""] if paper is None else [" / ".join(f"{x:.2f}" for x in paper), "" if r == "acp" else f"{paper[3] - rows['acp'][1][3]:+.2f}"]
        lines.append([label, *cells])
    header = ["mAP (%)", "@0.5", "@0.75", "@0.95", "average", "over ACP", "seconds", "clips top-1", "seeds", "paper: @0.5 / 0.75 / 0.95 / average", "over ACP"]
    classes = ", ".join(sorted({row["class_source"] for row in found}))
    return f"**Table {name}**, {title}. Toy data, mean ± std over seeds, classes from the {classes}; the paper on ActivityNet-1.3.\n\n{evaluate._table(header, lines)}\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data", default="data/toy-{seed}", help="folder of the toy data; made if it is not there (data/toy-{seed})")
    parser.add_argument("--runs", default="runs/toy-{seed}", help="folder of the runs, one a row (runs/toy-{seed})")
    parser.add_argument("--cfg", default=f"{HERE}/configs/toy.yaml", help="config that the rows change")
    parser.add_argument("--set", nargs="+", default=[], action="extend", metavar="key.sub=value", help="change keys of all rows")
    parser.add_argument("--markdown", default="runs/tables.md", help="file for the tables")
    args = parser.parse_args(argv)
    rows, folders = in_order([r for t in args.tables for r in TABLES[t][1]]), {}
    if os.path.isdir(args.markdown) or os.path.exists(args.markdown) and not open(args.markdown, errors="replace").readline().startswith(MARK):
        sys.exit(f"tables.py: {args.markdown} is there already and not a table of this program: name another file with --markdown")
    try:
        for seed in args.seeds:
            data, runs = args.data.format(seed=seed), args.runs.format(seed=seed)
            done = {name: is_done(args.cfg, name, words_of(name, seed, data, runs) + args.set) for name in rows}
            if not os.path.exists(f"{data}/annotations.json"):
                subprocess.run([sys.executable, f"{HERE}/toy.py", "--out", data, "--seed", str(seed)], check=True)
            for name in rows:
                folders.setdefault(name, []).append(f"{runs}/{name}")
                print(f"== seed {seed}, {name}" + ": done already" * done[name], flush=True)
                if not done[name]:
                    words = words_of(name, seed, data, runs) + args.set
                    subprocess.run([sys.executable, f"{HERE}/lofi_tal.py", "--cfg", args.cfg, "--set", *words], check=True)
        text = "\n".join(table(t, folders) for t in args.tables)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"tables.py: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"tables.py: {' '.join(error.cmd[1:])} ended with status {error.returncode}; the same command goes on from there")
    os.makedirs(os.path.dirname(args.markdown) or ".", exist_ok=True)
    with open(f"{args.markdown}.part", "w") as f:
        f.write(f"{MARK}\n{text}")
    os.replace(f.name, args.markdown)
    print(text)


if __name__ == "__main__":
    main()
