"""Compare finished runs: a table of mAP, mean and standard deviation over the seeds of a row.

    python -m tools.compare_runs [NAME=]RUN[,RUN...] ... [--json FILE] [--markdown FILE]

RUN is a run's folder, a folder of such folders (one a seed), or what `evaluate.py --json` wrote.
"""

import argparse
import os
import signal
import statistics
import sys
import warnings

import config
import data
from checkpoint import load_json, save_json, write_atomic
from evaluate import markdown_table, percent
from media import InputError

__all__ = ["compare", "compare_table", "main", "markdown_table", "percent"]


def compare(runs):
    """Return a row for each run: {"name", "0.5", ..., "average", "seconds", "seeds", "std", ...}.

    runs: as on the command line. Fractions at full precision; several runs are one row's seeds,
    which must differ, with their mean, and "std", the sample standard deviation ({} of the same
    keys, None for one seed). If no run has 0.75 or 0.95 (THUMOS14), all thresholds are columns.
    """
    named = [_read(run) for run in runs]
    present = dict.fromkeys(t for _, metrics in named for one in metrics for t in one["mAP"])
    usual = {"0.75", "0.95"} & set(present)
    columns = ["0.5", "0.75", "0.95"] if usual else list(present)
    rows = [_row(name, metrics, columns) for name, metrics in named]
    for key in ("ground_truth_videos", "subset", "class_source"):
        if len({row[key] for row in rows}) > 1:
            message = f"the runs differ in {key}: their numbers are not comparable as they stand"
            warnings.warn(message, stacklevel=2)
    return rows


def _read(run):
    """Return the name of a row and the metrics of its seeds."""
    name, equals, path = run.partition("=")
    if not equals or os.path.exists(run):
        name, path = "", run
    files = []
    for part in [path] if os.path.exists(path) else path.split(","):
        files += _metrics_files(part)
    metrics = [load_json(file) for file in files]
    for file, one in zip(files, metrics, strict=True):
        valid = isinstance(one, dict) and isinstance(one.get("mAP"), dict) and "average_mAP" in one
        if not valid:
            raise InputError(f"{file}: no mAP in it; it must hold what evaluate.py measures")
    seeds = [one.get("seed") for one in metrics]
    if len(set(seeds)) < len(seeds):
        raise InputError(f"{path}: runs of one row must differ in their seed, found {seeds}")
    return name or os.path.basename(os.path.abspath(path)), metrics


def _metrics_files(path):
    """Return the metrics files of a run, of the runs in a folder, or the file itself."""
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise InputError(f"no run {path}: expected a run's folder, as PATH or NAME=PATH[,PATH...]")
    if os.path.exists(f"{path}/metrics.json"):
        return [f"{path}/metrics.json"]
    folders = sorted(entry.path for entry in os.scandir(path) if entry.is_dir())
    unfinished = [f for f in folders if not os.path.exists(f"{f}/metrics.json")]
    if len(unfinished) == len(folders):
        raise InputError(f"{path}: no metrics.json in it or in its folders; has the run finished?")
    if unfinished:
        names = data.first_names(unfinished)
        warnings.warn(f"{path}: left out without a metrics.json: {names}", stacklevel=4)
    return [f"{folder}/metrics.json" for folder in folders if folder not in unfinished]


def _row(name, metrics, columns):
    values = {t: [one["mAP"].get(t) for one in metrics] for t in columns}
    values["average"] = [one["average_mAP"] for one in metrics]
    values["seconds"] = [one.get("seconds") for one in metrics]
    known = {key: [x for x in own if x is not None] for key, own in values.items()}
    row = {"name": name}
    row |= {key: statistics.fmean(own) if own else None for key, own in known.items()}
    row["seeds"] = len(metrics)
    shared = [t for t in metrics[0]["mAP"] if all(t in one["mAP"] for one in metrics)]
    row["mAP"] = {t: statistics.fmean(one["mAP"][t] for one in metrics) for t in shared}
    row["std"] = None
    if len(metrics) > 1:
        several = {key: len(own) > 1 for key, own in known.items()}
        row["std"] = {k: statistics.stdev(own) if several[k] else None for k, own in known.items()}
    for key in ("evaluated_videos", "ground_truth_videos", "subset", "class_source"):
        different = list(dict.fromkeys(one.get(key, "unknown") for one in metrics))
        row[key] = different[0] if len(different) == 1 else ", ".join(map(str, different))
    return row


def compare_table(rows):
    """Return rows of `compare` as Markdown that also reads well on a screen."""
    columns = [key for key in rows[0] if key[0].isdigit()]
    timed = any(row["seconds"] is not None for row in rows)
    header = ["mAP (%)", *(f"@{t}" for t in columns), "average", *["seconds"] * timed]
    lines = []
    for row in rows:
        cells = [_cell(row, key, percent) for key in (*columns, "average")]
        if timed:
            cells.append(_cell(row, "seconds", lambda x: "-" if x is None else f"{x:.1f}"))
        evaluated = f"{row['evaluated_videos']} of {row['ground_truth_videos']}"
        lines.append([row["name"], *cells, row["seeds"], evaluated, row["class_source"]])
    return markdown_table([*header, "seeds", "evaluated", "classes from"], lines)


def _cell(row, key, show):
    std = (row["std"] or {}).get(key)
    return show(row[key]) + ("" if std is None else f" ± {show(std)}")


def _check_ours(path, mark):
    """Raise InputError for a file that this program did not write."""
    if os.path.lexists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            head = file.read(200)
        if not head.lstrip().startswith(mark):
            raise InputError(f"{path} already exists and is no table of this program: not replaced")


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN[,RUN...]")
    parser.add_argument("--json", metavar="FILE", help="write the numbers at full precision")
    parser.add_argument("--markdown", metavar="FILE", help="write the table")
    args = parser.parse_args(argv)
    with config.one_line_errors("compare_runs"):
        for path, mark in ((args.json, '{\n "rows"'), (args.markdown, "| mAP (%)")):
            if path:
                _check_ours(path, mark)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rows = compare(args.runs)
        for warning in caught:
            print(f"warning: {warning.message}", file=sys.stderr)
        table = compare_table(rows)
        if args.json:
            save_json({"rows": rows}, args.json)
        if args.markdown:
            text = f"{table}\n".encode()
            write_atomic(args.markdown, lambda file: file.write(text))
        sys.stdout.reconfigure(errors="replace")  # an ASCII terminal has no plus-minus sign
        print(table)  # last: a reader that is gone ends the program here


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
