"""Keep records of finished rows: FOLDER/results.json.gz, from which FOLDER/README.md is rendered.

A record: toy, setting (null: none), seed, row, overrides (of --set), config (`comparable`); mAP
{threshold: fraction} and average, the same with true classes (true_mAP, true); ar_auc; seconds;
peak_memory_gb (on a CPU above idle_memory_gb, that of an idle process); parameters (of what it
trained beside its head); top1; probe; class_source, device, machine, threads, torch, git, date.
"""

import fcntl
import functools
import glob
import gzip
import json
import operator
import os
import subprocess
import sys
import time

import evaluate
import tsm
from checkpoint import RunFolder, load_json, write_atomic
from media import InputError

MARK = "<!-- made by python -m reproduce.tables -->"  # the first line of a report
key_of = operator.itemgetter("toy", "setting", "seed", "row")  # tells a record from others
BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "mean", "std")


def read_records(folder):
    """Return a folder's records {key: record}, none of a new one; InputError for other files."""
    evaluate.refuse_to_replace(f"{folder}/README.md", MARK)
    path = f"{folder}/results.json.gz"
    if not os.path.exists(path):
        return {}
    try:
        with gzip.open(path) as file:
            return {key_of(record): record for record in json.load(file)[MARK]}
    except (ValueError, KeyError, TypeError, OSError, EOFError):
        raise InputError(f"{path} is of another program: name another --results") from None


def open_to_append(path):
    """Open a file to append to, in a folder made if missing; InputError if that fails."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return open(path, "a")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror})") from None


def update(folder, render, record=None):
    """Add a record, if given, to a folder's, then write its report, render(records).

    Several programs may add to one folder at the same time; the same records give the same bytes.
    """
    with open_to_append(f"{folder}/.results.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        records = read_records(folder)
        if record:
            records[key_of(record)] = record
            text = json.dumps({MARK: list(records.values())})
            packed = gzip.compress(text.encode(), mtime=0)
            write_atomic(f"{folder}/results.json.gz", lambda file: file.write(packed))
        report = render(records).encode()
        write_atomic(f"{folder}/README.md", lambda file: file.write(report))


def trained_parameters(run):
    """Return the number of parameters that a run trained beside its head: encoder or SoLa."""
    # The checkpoint of SoLa has the predictor, too.
    paths = [f"{run.path}/sola/checkpoint.pt", run.sola]
    paths += [run.encoder("lofi"), run.encoder("pretrain")]
    for path in paths:
        if os.path.exists(path):
            state = tsm.load_state(path)["model"].items()
            return sum(x.numel() for name, x in state if name.split(".")[-1] not in BUFFERS)
    return 0


def training_peak_gb(run):
    """Return the peak memory of training anything beside the head; None if nothing was."""
    peaks = []
    for log in glob.glob("**/metrics.jsonl", root_dir=run.path, recursive=True):
        if not log.startswith("head"):
            with open(f"{run.path}/{log}") as file:
                peaks += [json.loads(line)["peak_memory_gb"] for line in file]
    return max(peaks, default=None)


@functools.cache
def idle_memory_gb():
    """Return the memory of a process that has loaded all libraries: it is in each CPU run's."""
    code = "import torch, lofi_tal, checkpoint; torch.ones(64, 64) @ torch.ones(64, 64);"
    code += "print(checkpoint.peak_memory_gb(torch.device('cpu')))"
    return float(subprocess.check_output([sys.executable, "-c", code], text=True))


def evaluate_true_classes(run, cfg):
    """Evaluate a run's proposals, each under its video's true classes: localization alone."""
    database = load_json(cfg.data.annotations)["database"]
    detections = {}
    for video, proposals in load_json(run.proposals)["results"].items():
        labels = sorted({entry["label"] for entry in database[video]["annotations"]})
        detections[video] = [p | {"label": label} for label in labels for p in proposals]
    options = {"subset": cfg.data.val_subset, "thresholds": cfg.detect.tiou_thresholds}
    return evaluate.evaluate(cfg.data.annotations, {"results": detections}, **options)


def read_probe(run):
    """Return what the linear probe of a SoLa run measured; it is made first if it is missing."""
    path = f"{run.path}/sola/probe.json"
    if not os.path.exists(path):
        command = [sys.executable, "-m", "tools.probe_sola", run.path]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"tools.probe_sola {run.path} failed: {done.stderr[-500:]}")
    return load_json(path)


def make_record(cfg):
    """Return the record of a finished run, but for what tells the row and its config."""
    run = RunFolder(cfg.out)
    metrics = load_json(run.metrics)
    versions = load_json(run.versions)
    true_classes = evaluate_true_classes(run, cfg)
    idle_gb = 0.0 if versions["device"].startswith("cuda") else idle_memory_gb()
    peak_gb = training_peak_gb(run)
    tasks = load_json(run.accuracy)["tasks"] if os.path.exists(run.accuracy) else {}
    top1 = [task["top1"] for task in tasks.values()]
    return {
        "mAP": metrics["mAP"],
        "average": metrics["average_mAP"],
        "true_mAP": true_classes["mAP"],
        "true": true_classes["average_mAP"],
        "ar_auc": metrics["AR"]["AUC"],
        "seconds": metrics["seconds"],
        "peak_memory_gb": None if peak_gb is None else max(peak_gb - idle_gb, 0.0),
        "idle_memory_gb": idle_gb,
        "parameters": trained_parameters(run),
        "top1": top1[-1] if top1 else None,
        "probe": read_probe(run) if "sola" in cfg.stages else None,
        "class_source": metrics["class_source"],
        "date": time.strftime("%Y-%m-%d", time.gmtime(os.path.getmtime(run.metrics))),
        **{key: versions.get(key) for key in ("device", "machine", "threads", "torch", "git")},
    }
