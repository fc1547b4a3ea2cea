"""Make the papers' tables in miniature: rows on toy data over several seeds, verdicts on claims.

    python -m reproduce.tables                           the small toy, five seeds: hours
    python -m reproduce.tables --tables 1 2 --seeds 21   some of it
    python -m reproduce.tables --toy large --tables 1 2  for one GPU
    python -m reproduce.tables --sensitivity --seeds 21  Table 1, one of the toy's knobs turned
    python -m reproduce.tables --render                  only the report of what is recorded

A seed draws data, encoders and heads. Each row is one run of lofi_tal.py; rows share what they have
in common, such as the ACP encoder, and run side by side, each with its GPU or its share of cores.
Rerun the same command to resume: what has a record, or a finished run, of the same config is done.
"""

import argparse
import dataclasses
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import torch

import config
from checkpoint import RunFolder, load_json
from media import InputError
from reproduce import report, results
from tools.jobs import available_cores
from tools.make_toy import Toy, make_toy


@dataclasses.dataclass(frozen=True)
class Job:
    """Name a row of a seed, in a setting or in none; row "data" makes the data of all others.

    acp: the folder of runs with the seed's ACP encoder.
    """

    setting: str | None
    seed: int
    row: str
    data: str
    runs: str
    acp: str

    def __str__(self):
        return f"seed {self.seed} {self.row}" + (f" ({self.setting})" if self.setting else "")

    @property
    def run(self):
        return RunFolder(f"{self.runs}/{self.row}")

    def is_done(self):
        """Return whether what it makes is there."""
        return os.path.exists(f"{self.data}/toy.json" if self.row == "data" else self.run.metrics)


def visible_gpus(cfg, environment=os.environ):
    """Return the GPUs to hand out, as CUDA_VISIBLE_DEVICES names them; none on a CPU."""
    if cfg.device == "cpu":
        return []
    count = torch.cuda.device_count()
    names = environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
    return [name.strip() for name in names.split(",") if name.strip()][:count]


def job_environment(slot, slots, gpus, environment=os.environ):
    """Return the environment of a job: its GPU, or its share of the cores unless that is set."""
    if gpus:
        return environment | {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
    return {"OMP_NUM_THREADS": str(max(available_cores() // slots, 1))} | dict(environment)


def schedule(waiting, start, end, slots, pause_sec=0.2):
    """Run jobs side by side, at most `slots`; return those that failed.

    waiting: {job: jobs that it needs}, in order of preference, each after what it needs; what needs
    one that failed counts as failed. start(job, slot) -> a Popen; end(job, status, elapsed_sec) ->
    whether it went well. An exception, as Ctrl-C, interrupts what runs and waits for it.
    """
    waiting = dict(waiting)
    running, failed = {}, []
    try:
        while waiting or running:
            for job, needs in list(waiting.items()):
                free = set(range(slots)) - {slot for _, slot, _ in running.values()}
                if needs & set(failed):
                    failed.append(job)
                    del waiting[job]
                elif free and not needs & (waiting.keys() | running.keys()):
                    del waiting[job]
                    running[job] = (start(job, min(free)), min(free), time.monotonic())
            for job, (process, _, started) in list(running.items()):
                status = process.poll()
                if status is not None:
                    del running[job]
                    if not end(job, status, time.monotonic() - started):
                        failed.append(job)
            time.sleep(pause_sec if running else 0)
    finally:
        for process, *_ in running.values():
            process.send_signal(signal.SIGINT)
        for process, *_ in running.values():
            process.wait()
    return failed


class Campaign:
    """Make the rows that are missing: jobs {(setting, seed, row): Job}, in order of preference."""

    def __init__(self, args, study):
        toy = study.toys[args.toy]
        self.args = args
        self.study = study
        self.config_file = f"{config.HERE}/configs/{toy['config']}"
        cfg = config.load_config(self.config_file, args.set)
        self.gpus = visible_gpus(cfg)
        self.device = "cuda" if self.gpus else "cpu"
        self.sizes = {"quarter": max(cfg.video.snippets // 4, 1), "twice": 2 * cfg.lofi.epochs}
        self.toy = Toy(**toy["knobs"])
        self.data = args.data or f"data/{toy['folder']}"
        self.runs = args.runs or f"runs/{toy['folder']}"
        self.slots = args.jobs or len(self.gpus) or min(available_cores(), 4)

        seeds = args.seeds or toy["seeds"]
        if len(seeds) > 1 and not ("{seed}" in self.data and "{seed}" in self.runs):
            raise InputError(f"{self.data} and {self.runs}: several seeds need {{seed}} in both")
        self.jobs = {}
        for table in args.tables or ([] if args.sensitivity else study.tables):
            for seed in seeds:
                self._add(None, seed, study.tables[table]["rows"])
        for setting in [None, *study.settings] if args.sensitivity else []:
            for seed in seeds:
                self._add(setting, seed, study.compared)

    def _add(self, setting, seed, rows):
        data, runs = (folder.format(seed=seed) for folder in (self.data, self.runs))
        suffix = "-" + setting.translate(str.maketrans(" ", "_", "()")) if setting else ""
        for row in ["data", *(rows if setting else report.with_needs(rows, self.study.needs))]:
            job = Job(setting, seed, row, data + suffix, runs + suffix, runs)
            self.jobs.setdefault((setting, seed, row), job)

    def needs(self, job):
        """Return the jobs that must be done before this one."""
        rows = ["acp"] if job.setting else self.study.needs.get(job.row, [])
        if job.is_done():  # and only to be recorded, with mAP under the true classes of its data
            rows = []
        keys = [(job.setting, job.seed, "data"), *((None, job.seed, row) for row in rows)]
        return {self.jobs[key] for key in keys} if job.row != "data" else set()

    def overrides(self, job):
        """Return a row's config overrides, "key=value"."""
        rows = self.study.rows | (self.study.rows_in_settings if job.setting else {})
        names = dataclasses.asdict(job) | self.sizes
        words = []
        for key, value in (self.study.every_row | rows[job.row]).items():
            text = value if isinstance(value, str) else json.dumps(value)
            words.append(f"{key}={text.format(**names)}")
        return words + self.args.set

    def config(self, job):
        """Return a row's config."""
        return config.load_config(self.config_file, self.overrides(job))

    def comparable(self, job):
        """Return all that a row's result depends on but its seed, flat, folders by their role."""
        acp = "ACP" if job.setting else "RUNS"
        role = dataclasses.replace(job, seed=0, data="DATA", runs="RUNS", acp=acp)
        cfg = self.config(role)
        flat = config.flatten(cfg) | {"device": self.device}
        flat |= {f"toy.{knob}": value for knob, value in self.toy_of(role).settings().items()}
        if cfg.precision == "auto":
            flat["precision"] = "bfloat16" if self.gpus else "float32"
        ignored = (config.FREE_KEYS | {"seed", "out", "toy.seed"}) - {"device"}
        return json.loads(json.dumps({k: v for k, v in flat.items() if k not in ignored}))

    def toy_of(self, job):
        """Return the toy of a job's seed and setting."""
        knobs = {"seed": job.seed}
        if job.setting:
            knobs |= {"clips": 1, "stills": 1} | self.study.settings[job.setting]
        for name, value in knobs.items():
            if isinstance(value, str):  # x2: twice the toy's own
                knobs[name] = int(getattr(self.toy, name) * float(value[1:]))
        return dataclasses.replace(self.toy, **knobs)

    def command(self, job):
        """Return the command of a job; it does nothing if the job is only to be recorded."""
        if job.row == "data":
            command = [sys.executable, "-m", "tools.make_toy", "--out", job.data]
            for name, value in dataclasses.asdict(self.toy_of(job)).items():
                values = value if isinstance(value, (list, tuple)) else [value]
                command += [f"--{name.replace('_', '-')}", *map(str, values)]
            return command
        if job.is_done():
            return [sys.executable, "-c", ""]
        script = [sys.executable, f"{config.HERE}/lofi_tal.py", "--cfg", self.config_file]
        return [*script, "--set", *self.overrides(job)]

    def check(self, records):
        """Raise InputError for a record or a run that was made otherwise than is asked for now."""
        found = {}
        defaults = config.flatten(config.load_config(config.DEFAULT))
        rows = {(self.args.toy, job.setting, job.row): job for job in self.jobs.values()}
        expected = {key: self.comparable(job) for key, job in rows.items() if job.row != "data"}
        for (toy, setting, _, row), record in records.items():  # of all seeds: one mean
            if (toy, setting, row) in expected:
                new = expected[toy, setting, row]
                # Keys that are newer than the record.
                old = {k: defaults[k] for k in new.keys() & defaults.keys()} | record["config"]
                found[f"{self.args.results}, {row}"] = config.differences(old, new, set())
        for job in self.jobs.values():
            if job.row == "data" and job.is_done():
                make_toy(job.data, self.toy_of(job))  # raises InputError if it is another toy
            elif job.is_done():
                device = load_json(job.run.versions)["device"].partition(":")[0]
                old = config.saved_config(job.run.path) | {"device": device}
                new = self.config(job) | {"device": self.device}
                ignore = config.FREE_KEYS - {"device"}
                found[job.run.path] = config.differences(old, new, ignore)
        for what, lines in found.items():
            if lines:
                lines = [f"{what} is another row than this one:", *lines]
                raise InputError("\n".join([*lines, "name another --runs and --results"]))

    def pending(self, records):
        """Return the jobs to run: rows without a record, and what they need."""
        pending, needed = set(), set()
        for key, job in reversed(self.jobs.items()):  # each comes after what it needs
            is_recorded = job.row == "data" or (self.args.toy, *key) in records
            if not is_recorded or (job in needed and not job.is_done()):
                pending.add(job)
                needed |= self.needs(job)
        return pending

    def run(self, update):
        """Run all pending jobs, update(record) after each; return the exit status."""
        self.update = update
        records = results.read_records(self.args.results)
        self.check(records)
        pending = self.pending(records)
        self.done, self.count, self.began = 0, len(pending), time.monotonic()
        print(f"{self.count} of {len(self.jobs)} jobs to run, {self.slots} at once", flush=True)
        waiting = {j: self.needs(j) & pending for j in self.jobs.values() if j in pending}
        failed = schedule(waiting, self.start, self.end, self.slots)
        for job in failed:
            print(f"failed, or needs one that did: {job}, see {job.run.path}.log", file=sys.stderr)
        return int(bool(failed))

    def log(self, job, message):
        print(f"[{self.done}/{self.count}] {job}: {message}", flush=True)

    def start(self, job, slot):
        """Start a job, in a session of its own: Ctrl-C reaches it through `schedule` alone."""
        command = self.command(job)
        environment = job_environment(slot, self.slots, self.gpus)
        gpu = f" on GPU {environment['CUDA_VISIBLE_DEVICES']}" if self.gpus else ""
        self.log(job, f"started{gpu}")
        with results.open_to_append(f"{job.run.path}.log") as log:
            print("$", shlex.join(command), file=log, flush=True)
            output = {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
            return subprocess.Popen(command, env=environment, start_new_session=True, **output)

    def end(self, job, status, elapsed_sec):
        """Record a finished row; return whether the job did what it should."""
        try:
            if status or not job.is_done():
                raise InputError(f"status {status}, see {job.run.path}.log")
            result = "" if job.row == "data" else f", mAP {100 * self.record(job):.2f} %"
        except config.INPUT_ERRORS as error:
            self.log(job, f"FAILED: {error}")
            return False
        self.done += 1
        remaining_sec = (time.monotonic() - self.began) * (self.count / self.done - 1)
        remaining = f"about {remaining_sec / 60:.0f} min remaining"
        self.log(job, f"{elapsed_sec:.0f} s{result}; {remaining}")
        return True

    def record(self, job):
        """Add a finished row to the records; return its average mAP."""
        labels = {"toy": self.args.toy, "setting": job.setting, "seed": job.seed, "row": job.row}
        labels |= {"overrides": self.args.set, "config": self.comparable(job)}
        record = labels | results.make_record(self.config(job))
        self.update(record)
        return record["average"]


def parse_args(study, argv=None):
    """Return the arguments of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--tables", nargs="+", choices=list(study.tables), help="all, but with --sensitivity none")
    add("--toy", default="small", choices=list(study.toys))
    add("--seeds", nargs="+", type=int, help="those of the toy in tables.yaml")
    add("--sensitivity", action="store_true", help="Table 1 with one knob turned at a time")
    add("--data", help="folder of the toy data, made if missing (data/toy-{seed})")
    add("--runs", help="folder of the runs, one a row (runs/toy-{seed})")
    keys = "change config keys of all rows"
    add("--set", nargs="+", default=[], action="extend", metavar="KEY=VALUE", help=keys)
    add("--jobs", type=int, help="rows at once (the number of GPUs, or of cores, up to 4)")
    add("--results", default="runs/reproduce", help="folder of README.md and results.json.gz")
    add("--render", action="store_true", help="only write the report from the records")
    args = parser.parse_args(argv)
    if args.jobs is not None and args.jobs < 1:
        raise InputError(f"--jobs is {args.jobs}, expected at least 1")
    return args


def main(argv=None):
    """Run the program; return its exit status."""
    with config.one_line_errors("reproduce.tables"):
        study = report.load_study()
        args = parse_args(study, argv)
        render = functools.partial(report.render, study=study, folder=args.results)
        update = functools.partial(results.update, args.results, render)
        if args.render and not os.path.exists(f"{args.results}/results.json.gz"):
            raise InputError(f"no file {args.results}/results.json.gz to render")
        status = 0 if args.render else Campaign(args, study).run(update)
        update()
        print(f"{args.results}/README.md written")
        return status


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # under nohup SIGHUP is ignored
            signal.signal(number, signal.default_int_handler)
    sys.exit(main())
