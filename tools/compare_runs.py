"""Compare runs in a table: mAP, cost, seeds; several seeds in a row give mean and deviation.

    python -m tools.compare_runs [NAME=]RUN[,RUN ...] ... [--json FILE] [--markdown FILE]

RUN is the folder of a run (its metrics.json), a folder of such folders, one for each seed, or a
file that `python evaluate.py --json` wrote.
"""

import argparse
import contextlib
import os
import signal
import warnings

import numpy as np

from checkpoint import RunFolder, load_json, save_json, write_atomic
from config import one_line_errors
from evaluate import markdown_table, percent, refuse_to_replace
from media import InputError

# The first cell of the table, by which a later start knows its own file.
TITLE = "mAP (%)"
SHARED = ("evaluated_videos", "ground_truth_videos", "subset", "class_source")


def compare(runs):
    """Return a row for each run: {"name", "0.5", "0.75", "0.95", "average", "seconds", ...}.

    runs: "RUN" or "NAME=RUN[,RUN ...]", see above. Several are the seeds of one row, which must
    differ: the row holds their means and as "std" their sample standard deviations (None for one
    seed), fractions at full precision; "mAP" has all thresholds. If no run has 0.75 or 0.95
    (THUMOS14), all thresholds are columns. Raises InputError if a run has no metrics.
    """
    read = [_read_run(run) for run in runs]
    present = dict.fromkeys(t for _, metrics in read for m in metrics for t in m["mAP"])
    columns = ["0.5", "0.75", "0.95"] if {"0.75", "0.95"} & present.keys() else list(present)
    rows = [_row(name, metrics, columns) for name, metrics in read]
    for key in ("ground_truth_videos", "subset", "class_source"):
        if len({row[key] for row in rows}) > 1:
            note = f"the runs differ in {key}: their numbers are not comparable as they stand"
            warnings.warn(note, stacklevel=2)
    return rows


def _read_run(run):
    """Return the name of a row and the metrics of its seeds."""
    name, paths = "", run
    if "=" in run and not os.path.exists(run):
        name, _, paths = run.partition("=")
    files = []
    for path in [paths] if os.path.exists(paths) else paths.split(","):
        files += _metrics_files(path)
    metrics = [_read_metrics(file) for file in files]
    seeds = [m.get("seed") for m in metrics]
    if len(set(seeds)) < len(seeds):
        problem = f"its {len(seeds)} runs have seeds {seeds}, so they are not the seeds of one row"
        remedy = "name each run by itself, or one row's as NAME=RUN,RUN"
        raise InputError(f"{paths}: {problem}; {remedy}")
    return name or os.path.basename(os.path.abspath(paths)), metrics


def _read_metrics(file):
    m = load_json(file)
    with contextlib.suppress(AttributeError):
        numbers = [m.get("average_mAP"), m.get("seconds") or 0.0, *m.get("mAP").values()]
        thresholds = all(t.replace(".", "", 1).isdecimal() for t in m["mAP"] or [""])
        shown = {type(m.get(key)) for key in ("seed", *SHARED)}
        if thresholds and {*map(type, numbers)} == {float} and not shown & {list, dict}:
            return m
    raise InputError(f'{file}: no "mAP" and "average_mAP"; expected what evaluate.py writes')


def _metrics_files(path):
    """Return the metrics files of a run, of a folder of runs, or the file itself."""
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        expected = "a run's folder, a folder of runs or a metrics JSON"
        raise InputError(f"{path} does not exist; expected {expected}, as [NAME=]RUN[,RUN ...]")
    file = RunFolder(path).metrics
    if os.path.exists(file):
        return [file]
    folders = sorted(entry.path for entry in os.scandir(path) if entry.is_dir())
    files = [RunFolder(folder).metrics for folder in folders]
    finished = [file for file in files if os.path.exists(file)]
    if not finished:
        raise InputError(f"{path}: no metrics.json in it or in its folders; has the run finished?")
    if len(finished) < len(files):
        count = f"{len(files) - len(finished)} of {len(files)} folders"
        warnings.warn(f"{path}: no metrics.json in {count}: left out", stacklevel=4)
    return finished


def _row(name, metrics, columns):
    """Return the means and deviations over the seeds of one row."""
    values = {t: [m["mAP"].get(t) for m in metrics] for t in columns}
    values["average"] = [m["average_mAP"] for m in metrics]
    values["seconds"] = [m.get("seconds") for m in metrics]
    row = {"name": name}
    std = {}
    for key, of_seeds in values.items():
        of_seeds = [x for x in of_seeds if x is not None]
        row[key] = float(np.mean(of_seeds)) if of_seeds else None
        std[key] = float(np.std(of_seeds, ddof=1)) if len(of_seeds) > 1 else None
    row["seeds"] = len(metrics)
    shared = [t for t in metrics[0]["mAP"] if all(t in m["mAP"] for m in metrics)]
    row["mAP"] = {t: float(np.mean([m["mAP"][t] for m in metrics])) for t in shared}
    row["std"] = std if len(metrics) > 1 else None
    for key in SHARED:
        different = list(dict.fromkeys(m.get(key, "unknown") for m in metrics))
        row[key] = different[0] if len(different) == 1 else ", ".join(map(str, different))
    return row


def table(rows):
    """Return rows of `compare` as a Markdown table, in percent."""
    columns = [key for key in rows[0] if key[0].isdigit()]
    header = [TITLE, *(f"@{column}" for column in columns), "average", "seconds"]
    lines = []
    for row in rows:
        std = row["std"] or {}
        keys = (*columns, "average")
        line = [row["name"], *(_with_deviation(percent, row[k], std.get(k)) for k in keys)]
        line.append(_with_deviation(_seconds, row["seconds"], std.get("seconds")))
        evaluated = f"{row['evaluated_videos']} of {row['ground_truth_videos']}"
        lines.append([*line, row["seeds"], evaluated, row["class_source"]])
    return markdown_table([*header, "seeds", "evaluated", "classes from"], lines)


def _with_deviation(show, mean, deviation):
    return show(mean) if deviation is None else f"{show(mean)} ± {show(deviation)}"


def _seconds(x):
    return "-" if x is None else f"{x:.1f}"


def main(argv=None):
    """Run the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN[,RUN ...]")
    parser.add_argument("--json", metavar="FILE", help="write the rows at full precision")
    parser.add_argument("--markdown", metavar="FILE", help="write the table")
    args = parser.parse_args(argv)
    with one_line_errors("tools.compare_runs"):
        refuse_to_replace(args.json, '{\n "rows": [')
        refuse_to_replace(args.markdown, f"| {TITLE} ")
        rows = compare(args.runs)
        text = table(rows)
        if args.json:
            save_json({"rows": rows}, args.json)
        if args.markdown:
            write_atomic(args.markdown, lambda file: file.write(f"{text}\n".encode()))
    # Last: a reader that is gone, as `| head` may be, ends the program here.
    print(text)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
