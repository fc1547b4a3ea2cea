"""Records of finished rows in a JSON file, the statistics over their seeds, and the Markdown made of them. tables.py holds the rows, the claims and what runs them.

A record: {"toy", "setting" (null: none), "seed", "row", "hash" (of its config, see `digest`), "words" (of --set), "mAP" {threshold: fraction}, "average",
both with true classes ("true mAP", "true"), "auc of AR@AN", "seconds", "peak_memory_gb" (of a CPU process above an idle one, "idle_memory_gb"),
"parameters" (of what it trained beside its head), "top1", "probe", "class_source", "device", "precision", "threads", "machine", "torch", "git", "date"}.
"""
import fcntl
import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
import time
from functools import cache

import numpy as np
import torch

import config
import engine
import evaluate

MARK = "<!-- made by tables.py -->"
LEVEL = 0.05  # of every test
MEASURES = {"average": (100, 2), "recall": (100, 2), "auc": (1, 3), "accuracy": (100, 1), "memory": (1, 3)}  # factor and decimals to show; "@0.75" and "true" are as "average"
KEYS = {"memory": "peak_memory_gb", "recall": "auc of AR@AN"}  # of a record, where not the measure's name


# ---------------------------------------------------------------- statistics

def student_p(t, df):
    """Two-sided p-value of Student's t with a whole number of degrees of freedom, in closed form: Abramowitz & Stegun 26.7.3 and 26.7.4."""
    if df < 1 or df != int(df):
        raise ValueError(f"{df} degrees of freedom: expected a whole number of at least 1")
    angle = math.atan2(abs(t), math.sqrt(df))
    cos, term, total = math.cos(angle), 1.0, 0.0
    if df % 2:
        term = math.cos(angle)
        for k in range(3, df + 1, 2):  # cos + 2/3 cos^3 + 2*4/(3*5) cos^5 + ...
            total, term = total + term, term * cos * cos * (k - 1) / k
        within = 2 / math.pi * (angle + math.sin(angle) * total)
    else:
        for k in range(2, df + 1, 2):  # 1 + 1/2 cos^2 + 1*3/(2*4) cos^4 + ...
            total, term = total + term, term * cos * cos * (k - 1) / k
        within = math.sin(angle) * total
    return min(max(1 - within, 0.0), 1.0)


def paired_test(differences):
    """Differences, one a seed -> {"mean", "std", "n", "ahead" (seeds above 0), "p"}: two-sided paired t-test that their mean is 0; None for a single seed.

    All the same, p is 0, or 1 if they are 0: there is no spread to test against."""
    x = np.asarray(differences, dtype=np.float64)
    mean, std, p = x.mean().item(), x.std(ddof=1).item() if len(x) > 1 else None, None
    if std is not None:
        flat = std <= 1e-12 * max(1.0, np.abs(x).max().item())
        p = float(abs(mean) <= 1e-12) if flat else student_p(mean / (std / math.sqrt(len(x))), len(x) - 1)
    return {"mean": mean, "std": std, "n": len(x), "ahead": int((x > 0).sum()), "p": p}


def holm(ps, level=LEVEL):
    """p-values -> which of their hypotheses Holm and Bonferroni's step-down procedure rejects, so that one wrong rejection among all is rarer than `level`."""
    held, order = [False] * len(ps), sorted(range(len(ps)), key=lambda i: ps[i])
    for rank, i in enumerate(order):
        if ps[i] > level / (len(ps) - rank):
            break
        held[i] = True
    return held


def verdict(test, words=("reproduced", "not reproduced")):
    if test["n"] < 3:
        return "no verdict"
    return "within noise" if test["p"] >= LEVEL else words[test["mean"] <= 0]


# ---------------------------------------------------------------- records

def digest(cfg, **more):
    """Hash and flat content of a config and of `more` that a result hangs on: without the seed, and the keys that may change between two starts of a run."""
    flat = {k: v for k, v in json.loads(json.dumps(config.flat(cfg) | more)).items() if k not in config.FREE | {"seed", "out"}}
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:12], flat


def key_of(record):
    return record["toy"], record["setting"], record["seed"], record["row"]


def read(path):
    """{"records": {key: record}, "configs": {hash: flat config}} of a JSON file, empty if there is none; ValueError if it is not ours."""
    if not os.path.exists(path):
        return {"records": {}, "configs": {}}
    try:
        with open(path) as f:
            found = json.load(f)
        if found["made_by"] == "tables.py":
            return {"records": {key_of(r): r for r in found["records"]}, "configs": found["configs"]}
    except (ValueError, KeyError, TypeError, OSError):
        pass
    raise ValueError(f"{path} is there already and not made by tables.py: name another --results")


def check_ours(path):
    if os.path.isdir(path) or os.path.exists(path) and not open(path, errors="replace").readline().startswith(MARK):
        raise ValueError(f"{path} is there already and not made by tables.py: name another --results")


def write(path, text, record=None, flat=None):
    """Adds a record to PATH.json and renders PATH.md, text(store), both written aside and renamed. Several programs may add to one file."""
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    lock = os.open(f"{folder}/.{os.path.basename(path)}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        check_ours(f"{path}.md")
        store = read(f"{path}.json")
        if record:
            store["records"][key_of(record)], store["configs"][record["hash"]] = record, flat
            used = {r["hash"] for r in store["records"].values()}
            engine.save_json({"made_by": "tables.py", "records": list(store["records"].values()),
                              "configs": {k: v for k, v in store["configs"].items() if k in used}}, f"{path}.json")
        engine.write_aside(f"{path}.md", lambda f: f.write(text(store).encode()))
        return store
    finally:
        os.close(lock)


def load_json(path):
    if os.path.exists(path):
        with open(path) as f:
            return json.load(f)


def parameters_of(path):
    """How many parameters the state dict of a file holds: all but the buffers of BatchNorm and of standardization."""
    state = torch.load(path, map_location="cpu", weights_only=True)["model"]
    buffers = ("running_mean", "running_var", "num_batches_tracked", "mean", "std")
    return sum(v.numel() for k, v in state.items() if k.rsplit(".", 1)[-1] not in buffers)


def trained(folder, stages):
    """(parameters, peak memory in GB or None) of what a run trained beside its head: an encoder, or SoLa's module and predictor."""
    count = 0
    if "sola" in stages:
        whole = f"{folder}/sola/checkpoint.pt"  # has the predictor, too
        count = parameters_of(whole if os.path.exists(whole) else f"{folder}/sola/sola.pt")
    elif {"pretrain", "lofi"} & set(stages):
        count = parameters_of(f"{folder}/{'lofi' if 'lofi' in stages else 'pretrain'}/encoder.pt")
    logs = [f"{folder}/{s}/metrics.jsonl" for s in ("lofi", "sola")]
    if os.path.isdir(f"{folder}/pretrain"):
        logs += [f"{folder}/pretrain/{phase}/metrics.jsonl" for phase in os.listdir(f"{folder}/pretrain")]
    peaks = [json.loads(line)["peak_memory_gb"] for log in logs if os.path.exists(log) for line in open(log)]
    return count, max(peaks, default=None)


def with_true_classes(folder, cfg):
    """(mAP by threshold, average) of a run's class-agnostic proposals, each under its video's true classes: what is left when no row's video classifier plays a part,
    as in the papers, whose classes come from one external classifier for all rows."""
    truth, proposals = load_json(cfg.data.annotations)["database"], load_json(f"{folder}/proposals.json")["results"]
    found = {v: [p | {"label": label} for label in sorted({a["label"] for a in truth[v]["annotations"]}) for p in own] for v, own in proposals.items()}
    metrics = evaluate.evaluate(cfg.data.annotations, {"results": found}, subset=cfg.data.val_subset, thresholds=cfg.detect.tiou)
    return metrics["mAP"], metrics["average_mAP"]


def precision_of(cfg, cuda):
    """What the config key means on a GPU or on a CPU: see engine.autocast."""
    return ("bfloat16" if cuda else "float32") if cfg.precision == "auto" else cfg.precision


@cache
def idle_memory_gb():
    """Resident memory of a process on this machine that has loaded all libraries and trains nothing: it is in the peak of every CPU run."""
    code = "import torch, lofi_tal, engine; torch.ones(64, 64) @ torch.ones(64, 64); print(engine.peak_memory_gb(torch.device('cpu')))"
    return float(subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(os.path.abspath(__file__)), check=True, capture_output=True, text=True).stdout)


def record_of(folder, cfg, hash, *, toy, setting, seed, row, words=()):
    """The record of a finished run."""
    metrics, versions = load_json(f"{folder}/metrics.json"), load_json(f"{folder}/versions.json") or {}
    accuracy, probe = load_json(f"{folder}/pretrain/accuracy.json"), load_json(f"{folder}/sola/probe.json")
    device = versions.get("device", "cpu")
    cuda = device.startswith("cuda")
    parameters, peak = trained(folder, cfg.stages)
    true_map, true = with_true_classes(folder, cfg)
    idle = 0.0 if cuda else idle_memory_gb()
    return {
        "toy": toy, "setting": setting, "seed": seed, "row": row, "hash": hash, "words": list(words),
        "mAP": metrics["mAP"], "average": metrics["average_mAP"], "true mAP": true_map, "true": true, "auc of AR@AN": metrics["AR"]["AUC"],
        "seconds": metrics["seconds"], "peak_memory_gb": peak and max(peak - idle, 0.0), "idle_memory_gb": idle, "parameters": parameters,
        "top1": ([p["top1"] for p in accuracy["phases"].values()] or [None])[-1] if accuracy else None,
        "probe": {k: {m: probe[k][m] for m in ("accuracy", "auc")} for k in ("before", "moving_average", "after")} if probe else None,
        "class_source": metrics["class_source"], "device": device, "precision": precision_of(cfg, cuda), "threads": versions.get("threads"),
        "machine": versions.get("machine") or ("unknown" if cuda else engine.machine_of(torch.device("cpu"))), "torch": versions.get("torch"), "git": versions.get("git"),
        "date": time.strftime("%Y-%m-%d", time.gmtime(os.path.getmtime(f"{folder}/metrics.json")))}


# ---------------------------------------------------------------- Markdown

PROBED = {  # name: (row, which of its probes): raw features are probed in the run that SoLa lands on them; a moving average over time is the simplest that might do the same
    "acp": ("sola", "before"), "acp_smoothed": ("sola", "moving_average"), "lofi": ("lofi_sola", "before"), "lofi_smoothed": ("lofi_sola", "moving_average")}


def value(rows, row, measure):
    """A measure of one seed's records {row: record}; None if it is not there."""
    probed = measure in ("auc", "accuracy")
    name, which = PROBED.get(row, (row, "after")) if probed else (row, None)
    record = rows.get(name)
    if record is None:
        return None
    if probed:
        return (record["probe"] or {}).get(which, {}).get(measure)
    return record["mAP"].get(measure[1:]) if measure[0] == "@" else record[KEYS.get(measure, measure)]


def combine(seeds, weights, measure="average"):
    """Of every seed that has all that it takes: the weighted sum of a measure of rows. seeds: {seed: {row: record}}."""
    found = [{row: value(rows, row, measure) for row in weights} for rows in seeds.values()]
    factor = MEASURES.get(measure, MEASURES["average"])[0]
    return [factor * sum(weights[row] * x for row, x in one.items()) for one in found if None not in one.values()]


def spread(values, decimals=2, sign=""):
    if not values:
        return "-"
    return f"{np.mean(values):{sign}.{decimals}f}" + (f" ± {np.std(values, ddof=1):.{decimals}f}" if len(values) > 1 else "")


def judge(seeds, claims, words=("reproduced", "not reproduced")):
    """[(claim, test, verdict, whether it holds after Holm or None)] of the claims whose rows are there."""
    found = []
    for claim in claims:
        values = combine(seeds, claim[3], claim[4])
        if values:
            test = paired_test(values)
            found.append((claim, test, verdict(test, words)))
    judged = [test["p"] for _, test, v in found if v != "no verdict"]
    held = iter(holm(judged))
    return [(*f, next(held) if f[2] != "no verdict" else None) for f in found]


def p_of(test):
    return "-" if test["p"] is None else "< 0.001" if test["p"] < 0.001 else f"{test['p']:.3f}"


def verdict_table(judged, seeds, with_holm=True):
    lines = []
    for (name, sentence, paper, weights, measure, source), test, verdict, held in judged:
        decimals = MEASURES.get(measure, MEASURES["average"])[1]
        ours = f"{test['mean']:+.{decimals}f}" + (f" ± {test['std']:.{decimals}f}" if test["std"] is not None else "")
        p = p_of(test)
        true = paired_test(combine(seeds, weights, "true")) if measure == "average" else None
        lines.append([f"{name}: {sentence}", source, "-" if paper is None else f"{paper:+.2f}", ours, p, f"{test['ahead']} of {test['n']}", f"**{verdict}**",
                      *(["-" if "reproduced" not in verdict else "yes" if held else "no"] if with_holm else []),
                      "" if true is None else spread(combine(seeds, weights, "true"), sign="+") + f", p {p_of(true)}"])
    return evaluate._table(["claim", "source", "paper", "here", "p", "seeds ahead", "verdict", *["after Holm"] * with_holm, "with true classes"], lines)


def memory_lines(seeds, rows, cycles, small, large):
    """Claims about memory, which has no spread worth a test: that `rows` need about the same, and `small` less than `large`; none before 3 seeds have what it takes."""
    def gb(row):
        values = combine(seeds, {row: 1}, "memory")
        return np.mean(values) if len(values) >= 3 else None

    def text(means, decimals=2):
        return " / ".join(f"{m:.{decimals}f}" for m in means) + " GB"
    lines, means, other = [], [gb(row) for row in rows], [m for m in map(gb, cycles) if m is not None]
    if None not in means:
        ratio = max(means) / min(means)
        lines.append(f"- S-, T- and ST-LoFi need about the same memory (LoFi, section 3.2): {text(means)}, largest / smallest {ratio:.2f}, to be at most 1.20: "
                     f"**{'reproduced' if ratio <= 1.2 else 'not reproduced'}**." + (f" Cycles over them: {text(other)}." if other else ""))
    if (a := gb(small)) is not None and (b := gb(large)) is not None:
        lines.append("- SoLa trains in less memory than an encoder end to end at low fidelity T (SoLa, introduction): "
                     f"{text((a, b), 3)}, 1/{b / a:.1f}: **{'reproduced' if a < b else 'not reproduced'}**.")
    return lines


def counts_line(judged, claims):
    """How many of all claims came out how; those without rows or with too few seeds are named."""
    known = {j[0][0]: j[2] for j in judged if j[2] != "no verdict"}
    verdicts, open_ones = list(known.values()), [c[0] for c in claims if c[0] not in known]
    held = sum(bool(j[3]) for j in judged if j[2] == "reproduced")
    line = f"**Of {len(claims)} claims {verdicts.count('reproduced')} reproduced** ({held} of them still after Holm over the {len(verdicts)} judged), {verdicts.count('within noise')} within noise, "
    return line + f"{verdicts.count('not reproduced')} not reproduced" + (f"; {len(open_ones)} not judged yet ({', '.join(open_ones)})." if open_ones else ".")


def peak_of(rows, row, needs):
    """Peak memory of all that one seed's row took: its own training, and that of the encoders that it goes on from. needs: {row: [rows]}."""
    known = [rows[r]["peak_memory_gb"] for r in (row, *needs[row]) if r in rows] + [peak_of(rows, r, needs) for r in needs[row]]
    return max((x for x in known if x is not None), default=None)


def table(name, title, rows, seeds, needs):
    """Markdown of one table. rows: {row: (label, reference row or None, the paper's mAP @0.5, @0.75, @0.95 and average, or None)}."""
    top1, probe = name in ("1", "7"), name == "sola"
    lines = []
    for row, (label, reference, paper) in rows.items():
        records = [s[row] for s in seeds.values() if row in s]
        cells = [label, *(spread(combine(seeds, {row: 1}, m)) for m in ("@0.5", "@0.75", "@0.95", "average"))]
        cells += [spread(combine(seeds, {row: 1, reference: -1}), sign="+") if reference else "", spread(combine(seeds, {row: 1}, "true")), spread(combine(seeds, {row: 1}, "recall"), 1)]
        seconds, memory = [r["seconds"] for r in records], [peak for peak in (peak_of(s, row, needs) for s in seeds.values() if row in s) if peak is not None]
        cells += [f"{np.median(seconds):.0f}" if seconds else "-", f"{np.mean(memory):.2f}" if memory else "-", f"{records[0]['parameters'] / 1e6:.2f}" if records else "-"]
        if top1:
            accuracy = [r["top1"] for r in records if r["top1"] is not None]
            cells.append(f"{100 * np.mean(accuracy):.1f}" if accuracy else "")
        if probe:
            cells += [spread(combine(seeds, {row: 1}, "accuracy"), 1), spread(combine(seeds, {row: 1}, "auc"), 3)]
        other = rows.get(reference, (None,) * 3)[2]
        cells += [len(records), " / ".join(f"{x:.2f}" for x in paper) if paper else "", f"{paper[3] - other[3]:+.2f}" if paper and other else ""]
        lines.append(cells)
    header = ["mAP (%)", "@0.5", "@0.75", "@0.95", "average", "over its ACP", "true classes", "AR@AN area", "seconds", "peak GB", "trained M", *["own top-1"] * top1, *["probe accuracy", "probe AUC"] * probe,
              "seeds", "paper: @0.5 / 0.75 / 0.95 / average", "over its ACP"]
    used = [r for s in seeds.values() for k, r in s.items() if k in rows]
    lengths = {cells[header.index("seeds")] for cells in lines} - {0}
    below = f"Classes from the {', '.join(sorted({r['class_source'] for r in used}))}." if used else ""
    if top1:
        below += " Own top-1: accuracy (%) of the encoder on held-out clips of its own task (ICP: 24 kinds of stills; Arrow, Speed: 2 ways to play a clip), which differs from row to row."
    if any(not r["device"].startswith("cuda") for r in used):
        below += " Peak memory on a CPU: resident memory above that of a process that has loaded the libraries and trains nothing."
    if len(lengths) > 1:
        below += " Rows differ in their number of seeds: a row's mean is over its own, what it is over its ACP over those that both have."
    return f"### Table {name}: {title}\n\n{evaluate._table(header, lines)}\n\n{below}"


def sensitivity(records, toy, rows, labels, settings):
    """Markdown of the settings of which a seed has all rows, None if there are none. rows: the four compared; labels: their names."""
    seeds = sorted({r["seed"] for r in records if r["toy"] == toy and r["setting"]})
    lines = []
    for setting in [None, *settings]:
        found = {s: {r["row"]: r for r in records if key_of(r)[:3] == (toy, setting, s)} for s in seeds}
        found = {s: own for s, own in found.items() if own.keys() >= set(rows)}
        if found:
            values = {row: combine(found, {row: 1}) for row in rows}
            gains = [spread(combine(found, {"lofi": 1, row: -1}), sign="+") for row in ("acp_plus", "acp_plus_background")]
            order = sorted(rows, key=lambda r: -np.mean(values[r]))
            same = sum(sorted(rows, key=lambda r: -own[r]["average"]) == order for own in found.values())
            lines.append([setting or "as it is", *map(spread, values.values()), *gains, " > ".join(labels[r] for r in order), f"{same} of {len(found)}"])
    if lines:
        return evaluate._table(["average mAP (%)", *(labels[r] for r in rows), *(f"LoFi - {labels[r]}" for r in ("acp_plus", "acp_plus_background")), "order of the means", "seeds in that order"], lines)


def several(values):
    return ", ".join(map(str, sorted({v for v in values if v is not None}))) or "unknown"


def made_on(records):
    seeds = ", ".join(map(str, sorted({r["seed"] for r in records if not r["setting"]}))) or "none but those of the sensitivity"
    lines = [f"Seeds {seeds}; {len(records)} runs, {several(r['date'] for r in records)}; commit {several(r['git'] for r in records)}."]
    for name in sorted({r["machine"] for r in records}):
        own = [r for r in records if r["machine"] == name]
        lines.append(f"Machine: {name}; torch {several(r['torch'] for r in own)}; {several(r['precision'] for r in own)}"
                     + (f"; threads a run: {several(r['threads'] for r in own)}" if any(r["threads"] for r in own) else "") + f" ({len(own)} runs).")
    return "\n".join(lines)


def summary(seeds, rows, needs):
    """Markdown of the rows that matter most, in short; None if no seed has any of its rows."""
    lines = [[rows[row][0], *(spread(combine(seeds, {row: 1}, m), 1) for m in ("average", "true", "recall")),
              f"{np.mean([peak_of(s, row, needs) or 0 for s in seeds.values() if row in s]):.2f}"] for row in rows if any(row in s for s in seeds.values())]
    return evaluate._table(["%", "average mAP", "with true classes", "AR@AN area", "peak GB"], lines) if lines else None


def render(store, *, tables, claims, controls, memory, settings, compared, labels, commands, needs, design=(), chosen=(), notes={}):
    """The whole Markdown, from records alone. memory: arguments of memory_lines; needs: {row: rows that it goes on from}; design: seeds that were looked at while the toy was
    made; chosen: (toy, tables that are shown though they are empty); notes: {toy: Markdown}, what comes before its first ### in front of the verdicts, the rest behind."""
    records = list(store["records"].values())
    toys = sorted({r["toy"] for r in records}, key=lambda t: ([*commands, t.split()[0]].index(t.split()[0]), t))
    out = [MARK, "# The papers' tables in miniature", "Every claim of LoFi (NeurIPS 2021) and SoLa (CVPR 2023) that can be checked without their data, checked on toy data. "
           "The toy: short untrimmed videos of three moving sprites, of which one acts, now and then; it moves alike but less around its actions, and the other two at times of their own. "
           "This is not ActivityNet: **the order of the rows can be compared, their height cannot.** Differences are in points of average mAP (%), or of what the claim names; "
           "± is the standard deviation over seeds; \"paper\" is ActivityNet-1.3, \"-\" where the paper, or the part of it at hand, has no number.",
           "How a claim is judged: each seed draws data, encoders and heads anew. A two-sided paired t-test over seeds asks whether the difference is 0. *Reproduced*: "
           "the claimed direction and p < 0.05. *Not reproduced*: the other direction and p < 0.05. *Within noise*: neither. *No verdict*: fewer than 3 seeds. "
           "Claims are tested one by one; \"after Holm\" says whether the verdict also holds when all are tested at once (Holm-Bonferroni at 0.05). Rows take classes from their own "
           "video classifier, and the verdicts are on that; *with true classes* is the same of the same proposals under each video's true classes: localization alone."]
    for toy in toys:
        mine = [r for r in records if r["toy"] == toy]
        seeds = {s: {r["row"]: r for r in mine if r["seed"] == s and not r["setting"]} for s in sorted({r["seed"] for r in mine})}
        command = commands.get(toy.split()[0], "python tables.py") + (f" --knob {shlex.join(toy.split()[1:])}" if " " in toy else "")
        if any(r.get("words") for r in mine):
            command += " --set " + shlex.join(dict.fromkeys(w for r in mine for w in r.get("words", ())))
        if any(r["setting"] for r in mine):
            command += f"`, then `{command} --sensitivity"
        out += [f"## Toy \"{toy}\"", f"Made by `{command}`.\n{made_on(mine)}"]
        judged, lines = judge(seeds, claims), memory_lines(seeds, *memory)
        short, heading, long = notes.get(toy, "").partition("### ")
        if judged:
            out.append(counts_line(judged, claims))
        out += [short.strip()] * bool(short.strip())
        if judged:
            out += filter(None, (summary(seeds, tables["1"][1] | tables["beyond"][1], needs), verdict_table(judged, seeds)))
        if lines:
            out.append("Of memory, without a test:\n\n" + "\n".join(lines))
        out += [heading + long.strip()] * bool(heading)
        other = judge(seeds, controls, ("higher", "lower"))
        if other:
            out += ["### Controls: claimed by nobody, direction open", verdict_table(other, seeds, with_holm=False)]
        here = {row for s in seeds.values() for row in s}
        for name, (title, rows) in tables.items():
            own = set(rows) - {row for other, (_, others) in tables.items() if other != name for row in others}
            if own & here or chosen and toy == chosen[0] and name in chosen[1]:
                out.append(table(name, title, rows, seeds, needs))
        found = sensitivity(mine, toy, compared, labels, settings)
        if found:
            out += ["### Sensitivity to the toy's knobs", found,
                    "Each line changes one knob; all share the ACP encoder of their seed. With another number of training videos the validation videos are others, too."]
    out += ["## What to keep in mind", "\n".join([
        "- The method is the papers', sizes and lengths of training are not: small networks, short videos, a few hundred of them. What departs from LoFi's recipe beyond that (optimizer, "
        "class loss in stage lofi) stands in the toy's config, with the reason.",
        f"- The toy and its recipe were made on seeds {several(design)}" + (", some of which are among these: other seeds decide." if {r["seed"] for r in records} & set(design) else
                                                                          ", which are not among these."),
        "- Not checked here, as they need the real data sets: LoFi's Tables 3 and 4 (state of the art), all columns on HACS, supplementary Table B; SoLa's tables.",
        "- Classes come from the run's own video classifier, whose features differ from row to row; the papers take them from one external classifier for all rows. \"With true classes\" is "
        "average mAP (%) of the same proposals under each video's true classes. The verdicts are on the former. AR@AN area: under the curve of average recall over the number of proposals, "
        "up to 100 a video; no classes in it.",
        "- \"seconds\" (median over seeds) is all that a row's result took: its encoder and what that was made from, features, head, detection. Rows that run side by side slow each other down.",
        "- \"trained M\": parameters (millions) of the encoder or of SoLa that the row itself trained; the head is not counted. 0: it trained a head only.",
        "- Peak memory is that of training a row's encoder, the encoder that it goes on from, or SoLa, whichever took most: batch, head and optimizer included. Resident memory of a CPU process grows with each new shape, so cycles seem to need more than what they cycle through. Memory of one video's step at larger sizes: benchmarks/README.md.",
        "- With few seeds a true difference can stay within noise; with many claims one in twenty is significant by chance. The column \"after Holm\" guards against the latter."])]
    return "\n\n".join(out) + "\n"
