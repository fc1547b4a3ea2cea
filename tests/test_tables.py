import argparse
import fcntl
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import config
import engine
import lofi_tal
import results
import tables
import toy

HERE = os.path.dirname(tables.__file__)


# ---------------------------------------------------------------- statistics

@pytest.mark.parametrize("t, df, p", [  # the first four from a table of critical values; then scipy.stats.t.sf
    (12.706, 1, 0.05), (4.303, 2, 0.05), (3.182, 3, 0.05), (2.776, 4, 0.05), (2.132, 4, 0.10), (0.0, 4, 1.0),
    (1.5, 4, 0.208), (-2.2, 7, 0.06373101530263678), (0.3, 10, 0.7703206075657986), (6.5, 4, 0.0028900071171007345), (2.0, 1, 0.2951672353008665)])
def test_student_p(t, df, p):
    assert results.student_p(t, df) == pytest.approx(p, rel=1e-12 if len(str(p)) > 6 or p == 0.208 else 6e-4)


def test_student_p_is_the_integral_of_the_density():
    for df in (1, 2, 3, 4, 9, 12):
        x = np.linspace(0, 1.7, 20001)
        density = math.gamma((df + 1) / 2) / math.sqrt(df * math.pi) / math.gamma(df / 2) * (1 + x * x / df) ** (-(df + 1) / 2)
        assert results.student_p(1.7, df) == pytest.approx(1 - 2 * np.trapezoid(density, x), abs=1e-8)
    with pytest.raises(ValueError, match="0 degrees of freedom"):
        results.student_p(1, 0)


def test_paired_test_and_its_verdicts():
    test = results.paired_test([1.0, 2.0, 4.0, 3.0, 0.5])  # scipy.stats.ttest_1samp: t 3.2797, p 0.030510812580331614
    assert test["mean"] == 2.1 and test["std"] == pytest.approx(math.sqrt(2.05)) and test["p"] == pytest.approx(0.030510812580331614)
    assert test["ahead"] == test["n"] == 5 and results.verdict(test) == "reproduced"
    assert results.verdict(results.paired_test([-1.0, -2.0, -4.0, -3.0, -0.5])) == "not reproduced"
    assert results.verdict(results.paired_test([1.0, -2.0, 4.0, 3.0, 0.5])) == "within noise"
    assert results.verdict(results.paired_test([1.0, 1.1])) == "no verdict" and results.verdict(results.paired_test([1.0])) == "no verdict"
    same, none = results.paired_test([0.7] * 4), results.paired_test([0.0] * 4)
    assert same["p"] == 0 and results.verdict(same) == "reproduced" and none["p"] == 1 and results.verdict(none) == "within noise"


def test_holm_rejects_step_by_step():
    assert results.holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]  # .005 <= .05/4, .01 <= .05/3, .03 > .05/2: stop, though .04 <= .05
    assert results.holm([0.02, 0.03]) == [True, True] and results.holm([0.03, 0.03]) == [False, False] and results.holm([]) == []


# ---------------------------------------------------------------- rows, claims, toys

def arguments(tmp_path=None, **changes):
    folders = dict(data=f"{tmp_path}/data-{{seed}}", runs=f"{tmp_path}/runs-{{seed}}", results=f"{tmp_path}/out/RESULTS") if tmp_path else dict(data=None, runs=None, results="RESULTS")
    return argparse.Namespace(**dict(toy="small", knob=[], set=[], seeds=None, sensitivity=False, sensitivity_seeds=[11, 12], tables=None, jobs=1) | folders | changes)


@pytest.mark.parametrize("name", ["small", "large"])
def test_every_row_is_a_config_and_refers_only_to_rows_it_needs(name):
    plan = tables.Plan(arguments(toy=name, seeds=[3]))
    assert {row for _, _, row in plan.jobs} == {*tables.ROWS, "data"}
    keys = list(plan.jobs)
    for key, job in plan.jobs.items():
        if job.row != "data":
            cfg = plan.config(job)
            lofi_tal.check(cfg, files=False)
            assert cfg.out == f"{job.runs}/{job.row}" and cfg.seed == 3 and cfg.data.annotations == f"{job.data}/annotations.json"
            assert {n for n in tables.ROWS if f"{job.runs}/{n}/" in json.dumps(cfg)} == set(tables.ROWS[job.row][0])
            assert all(keys.index(n) < keys.index(key) for n in tables.needs(job))
    full = plan.config(plan.jobs[None, 3, "full"])
    assert full.lofi.chunk == full.data.snippets // 4 and full.lofi.cycle == ["full"]


def test_tables_and_claims_fit_each_other():
    papers = {}
    for _, rows in tables.TABLES.values():
        for row, (_, reference, paper) in rows.items():
            assert row in tables.ROWS and (reference is None or reference in rows)
            papers |= {row: paper[3]} if paper else {}
    shown = {r for _, rows in tables.TABLES.values() for r in rows}
    for name, _, difference, weights, _, source in tables.CLAIMS + tables.CONTROLS:
        assert set(weights) <= shown | results.PROBED.keys() and sum(weights.values()) == pytest.approx(0)
        if difference is not None:  # the difference that is quoted is that of the numbers in the tables
            assert sum(w * papers[row] for row, w in weights.items()) == pytest.approx(difference, abs=0.0051), name
    assert len({c[0] for c in tables.CLAIMS + tables.CONTROLS}) == len(tables.CLAIMS + tables.CONTROLS)


def test_default_jobs_start_with_all_seeds_of_the_first_table():
    keys = list(tables.Plan(arguments()).jobs)
    assert {s for _, s, _ in keys} == {21, 22, 23, 24, 25}
    assert keys.index((None, 25, "lofi")) < keys.index((None, 21, "s")) < keys.index((None, 21, "arrow"))
    knob = tables.Plan(arguments(knob=["near=0.5", "amplitude=[0.2,0.3]"]))
    assert (knob.data, knob.label) == ("data/toy-{seed}-amplitude0.2_0.3-near0.5", "small amplitude=[0.2,0.3] near=0.5")
    command = knob.command(knob.jobs[None, 21, "data"])
    assert command[2:] == ["--out", "data/toy-21-amplitude0.2_0.3-near0.5", "--seed", "21", "--near", "0.5", "--amplitude", "0.2", "0.3"]
    with pytest.raises(ValueError, match="--knob nearr: expected .*near"):
        tables.Plan(arguments(knob=["nearr=0.5"]))


def test_settings_share_the_acp_encoder_of_their_seed():
    plan = tables.Plan(arguments(sensitivity=True))
    assert {(s, row) for _, s, row in plan.jobs} == {(s, row) for s in (11, 12) for row in (*tables.COMPARED, "data")}
    for job in plan.jobs.values():
        if job.setting and job.row != "data":
            cfg, (digest, flat) = plan.config(job), plan.digest(job)
            lofi_tal.check(cfg, files=False)
            assert cfg.pretrain.checkpoint == "runs/toy-%d/acp/pretrain/encoder.pt" % job.seed and cfg.out.startswith("runs/toy-%d-" % job.seed)
            assert digest == plan.digest(plan.jobs[job.setting, 11, job.row])[0] and flat["pretrain.checkpoint"] == "ACP/acp/pretrain/encoder.pt"
            assert tables.needs(job) == {(job.setting, job.seed, "data"), (None, job.seed, "acp")}
    sizes = {key[0]: plan.toy_arguments(job).get("train") for key, job in plan.jobs.items() if key[1:] == (11, "data")}
    own = plan.defaults["train"]
    assert sizes["half the training videos"] == own // 2 and sizes["twice the training videos"] == 2 * own and sizes[None] is None


def test_the_clips_do_not_depend_on_the_settings(tmp_path):
    job, base = ("clip", 5, "train", list(toy.AUXILIARY_MOTIONS)[1]), tables.Plan(arguments(sensitivity=True))
    for i, setting in enumerate([None, *tables.SETTINGS]):
        made = base.defaults | base.toy_arguments(tables.Job(setting, 11, "data", "", "", ""))
        knobs = {k: v for k, v in made.items() if k not in ("train", "val", "clips", "stills", "seed", "workers")}
        toy._make(job, folder=f"{tmp_path}/{i}", **knobs | {"seed": 11})
    paths = sorted(tmp_path.glob("*/clips/train/*/00005.zip"))
    assert len(paths) == 1 + len(tables.SETTINGS) and len({p.read_bytes() for p in paths}) == 1


# ---------------------------------------------------------------- scheduling

class Fake:
    """A process that ends after so many polls."""

    def __init__(self, polls, status=0):
        self.polls, self.status, self.signals = polls, status, []

    def poll(self):
        self.polls -= 1
        return None if self.polls > 0 else self.status

    def send_signal(self, number):
        self.signals.append(number)

    def wait(self):
        return self.status


def run(waiting, slots, lengths={}, failing=(), stop=lambda: 0):
    log, running, most, made = [], set(), [0], {}

    def start(key, slot):
        assert slot not in {s for _, s in running}
        running.add((key, slot))
        most[0] = max(most[0], len(running))
        log.append((key, slot))
        return made.setdefault(key, Fake(lengths.get(key, 1), int(key in failing)))

    def ended(key, status):
        running.difference_update([r for r in running if r[0] == key])
        log.append(key)
        return status == 0
    return *tables.schedule(waiting, start, ended, slots, stop, pause=0), log, most[0], made


def test_jobs_run_side_by_side_in_order_and_after_what_they_need():
    failed, skipped, log, most, _ = run({"a": set(), "b": {"a"}, "c": set(), "d": set(), "e": {"b", "d"}}, 2, {"a": 3})
    assert not failed and not skipped and most == 2
    assert log == [("a", 0), ("c", 1), "c", ("d", 1), "d", "a", ("b", 0), "b", ("e", 0), "e"]


def test_a_failure_skips_only_what_needs_it():
    failed, skipped, log, _, _ = run({"a": set(), "b": {"a"}, "c": {"b"}, "d": set()}, 1, failing={"a"})
    assert (failed, skipped) == (["a"], ["b", "c"]) and log == [("a", 0), "a", ("d", 0), "d"]


def test_a_stop_interrupts_once_and_waits():
    stops = iter([0, 1, 1, 1, 1, 1])
    failed, skipped, log, _, made = run({"a": set(), "b": {"a"}}, 1, {"a": 4}, failing={"a"}, stop=lambda: next(stops))
    assert made["a"].signals == [signal.SIGINT] and log == [("a", 0), "a"] and not failed and not skipped


def test_an_error_in_between_leaves_no_child_behind():
    child = Fake(99)
    with pytest.raises(ValueError):
        tables.schedule({"a": set(), "b": set()}, lambda key, slot: child if key == "a" else Fake(1), lambda key, status: int("x"), 2, pause=0)
    assert child.signals == [signal.SIGINT]


def test_each_job_has_a_gpu_or_a_share_of_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    auto = config.load("configs/toy.yaml")
    assert tables.gpus_of(auto, {}) == ["0", "1"] and tables.gpus_of(auto, {"CUDA_VISIBLE_DEVICES": "5,7"}) == ["5", "7"]
    assert tables.gpus_of(config.load("configs/toy.yaml", ["device=cpu"]), {}) == []
    assert [tables.environment_of(s, 3, ["5", "7"], 8)["CUDA_VISIBLE_DEVICES"] for s in (0, 1, 2)] == ["5", "7", "5"]
    assert tables.environment_of(1, 3, [], 8)["OMP_NUM_THREADS"] == "2" and tables.environment_of(0, 4, [], 2)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert tables.environment_of(1, 3, [], 8)["OMP_NUM_THREADS"] == "7"


# ---------------------------------------------------------------- records and resuming

def finish(plan, key, average):
    """What a run leaves behind, as far as records need it."""
    job = plan.jobs[key]
    cfg, folder = plan.config(job), f"{job.runs}/{job.row}"
    engine.save_json(cfg, f"{folder}/config.json")
    engine.save_json({"device": "cpu", "torch": "2.11", "git": "abc"}, f"{folder}/versions.json")
    engine.save_json({"mAP": {"0.5": 2 * average, "0.75": average, "0.95": 0.01}, "average_mAP": average, "AR": {"AUC": 0.5}, "seconds": 10.0, "seed": job.seed,
                      "class_source": "video classifier of the run"}, f"{folder}/metrics.json")
    stage = "lofi" if "lofi" in cfg.stages else "pretrain"
    if stage in cfg.stages:
        engine.save_weights(torch.nn.BatchNorm1d(6), f"{folder}/{stage}/encoder.pt")
        log = f"{folder}/lofi" if stage == "lofi" else f"{folder}/pretrain/{cfg.pretrain.method}"
        engine.write_aside(f"{log}/metrics.jsonl", lambda f: f.write(b'{"peak_memory_gb": 1.5}\n{"peak_memory_gb": 2.5}\n'))
        engine.save_json({"phases": {"x": {"top1": 0.625}}}, f"{folder}/pretrain/accuracy.json")
    os.makedirs(job.data, exist_ok=True)
    engine.save_json({"database": {"v": {"subset": "validation", "duration": 10.0, "annotations": [{"segment": [1.0, 4.0], "label": "jump"}]}}}, f"{job.data}/annotations.json")
    engine.save_json({"results": {"v": [{"score": 0.9, "segment": [1.0, 4.0]}, {"score": 0.5, "segment": [5.0, 9.0]}]}}, f"{folder}/proposals.json")


def test_done_rows_are_taken_from_runs_or_records_and_mismatches_are_errors(tmp_path, monkeypatch, capsys):
    args = arguments(tmp_path, tables=["A"], seeds=[11])
    plan, empty = tables.Plan(args), {"records": {}, "configs": {}}
    assert list(plan.jobs) == [(None, 11, r) for r in ("data", "acp", "bmn_acp", "bmn_lofi")]
    assert tables.look(plan, empty)[0] == set(plan.jobs)
    monkeypatch.setattr(tables.toy, "make_toy", functools.wraps(toy.make_toy)(lambda *a, **k: False))
    monkeypatch.setattr(results, "idle_memory_gb", lambda: 0.5)
    monkeypatch.setattr(tables, "gpus_of", lambda cfg: [])  # also where there are some
    for i, row in enumerate(("acp", "bmn_acp", "bmn_lofi")):
        finish(plan, (None, 11, row), 0.1 + i / 100)
    run, unrecorded = tables.look(plan, empty)
    assert not run and [j.row for j in unrecorded] == ["acp", "bmn_acp", "bmn_lofi"]
    monkeypatch.setattr(tables.subprocess, "Popen", lambda *a, **k: pytest.fail("nothing is left to run"))
    words = ["--tables", "A", "--seeds", "11", "--data", args.data, "--runs", args.runs, "--results", args.results, "--jobs", "1"]
    assert tables.main(words) == 0
    store = results.read(f"{args.results}.json")
    record = store["records"]["small", None, 11, "bmn_lofi"]
    assert (record["average"], record["parameters"], record["peak_memory_gb"], record["top1"]) == (pytest.approx(0.12), 12, 2.0, 0.625)
    assert record["true"] == 1 and record["true mAP"]["0.95"] == 1  # its best proposal is the segment
    assert store["records"]["small", None, 11, "bmn_acp"]["parameters"] == 0 and record["git"] == "abc" and record["precision"] == "float32"
    assert "| BMN, LoFi " in open(f"{args.results}.md").read()
    # runs that are gone: recorded rows count as done; one that is not recorded brings back what it needs, and no more
    for row in ("acp", "bmn_acp", "bmn_lofi"):
        os.rename(f"{tmp_path}/runs-11/{row}", f"{tmp_path}/gone-{row}")
    assert tables.look(plan, store) == (set(), [])
    del store["records"]["small", None, 11, "bmn_lofi"]
    assert tables.look(plan, store)[0] == {(None, 11, "acp"), (None, 11, "bmn_lofi")}
    # another config: named by key
    with pytest.raises(SystemExit, match="(?s)RESULTS.json holds another acp of toy small.*lofi.epochs: .* there, 3 now.*another --results"):
        tables.main([*words, "--set", "lofi.epochs=3"])
    os.rename(f"{tmp_path}/gone-acp", f"{tmp_path}/runs-11/acp")
    with pytest.raises(SystemExit, match="(?s)holds another row acp than this one.*lofi.epochs: .* there, 3 now"):
        tables.main([*words, "--set", "lofi.epochs=3", "--results", f"{tmp_path}/other"])
    # nor another recipe for another seed, another toy or another precision: they would all go into one mean
    for change in ("--seeds 12 --set lofi.lr=0.5", "--set precision=bfloat16"):
        with pytest.raises(SystemExit, match="(?s)another (acp|bmn_lofi).*(lofi.lr: 0.001 there, 0.5 now|precision: 'float32' there, 'bfloat16' now)"):
            tables.main([*words, *change.split(), "--data", f"{tmp_path}/data-{{seed}}", "--runs", f"{tmp_path}/new-{{seed}}"])
    for file, message in ((args.results, "holds rows of toy small made on cpu, this is cuda: .*another --results and --runs"),
                          (f"{tmp_path}/new", "runs-11/acp was made on cpu, this is cuda: .*another --runs and --results")):
        with monkeypatch.context() as patched, pytest.raises(SystemExit, match=message):
            patched.setattr(tables, "gpus_of", lambda cfg: ["0"])
            tables.main([*words, "--results", file])
    with monkeypatch.context() as patched:
        patched.setattr(tables.toy, "VERSION", 99)
        with pytest.raises(SystemExit, match="toy.version: 2 there, 99 now"):
            tables.main(words)
    # finished rows without a record, their data gone: it is made again, as a record has the mAP under true classes
    for row in ("bmn_acp", "bmn_lofi"):
        os.rename(f"{tmp_path}/gone-{row}", f"{tmp_path}/runs-11/{row}")
    data = args.data.format(seed=11)
    os.rename(data, f"{tmp_path}/gone-data")
    again = tables.Plan(args)
    assert tables.look(again, results.read(f"{args.results}.json")) == (set(), [])
    run, unrecorded = tables.look(again, empty)
    assert (run, len(unrecorded)) == ({(None, 11, "data")}, 3)

    class Done:
        poll = staticmethod(lambda: 0)

    def make_data(*_, **__):
        os.rename(f"{tmp_path}/gone-data", data)
        return Done
    monkeypatch.setattr(tables.subprocess, "Popen", make_data)
    assert tables.main([*words, "--results", f"{tmp_path}/again"]) == 0
    assert {r["row"] for r in results.read(f"{tmp_path}/again.json")["records"].values()} == {"acp", "bmn_acp", "bmn_lofi"}
    # folders do not count, other runs' names neither
    elsewhere = tables.Plan(arguments(tmp_path, tables=["A"], seeds=[11], runs="elsewhere/{seed}"))
    assert tables.look(elsewhere, results.read(f"{args.results}.json")) == (set(), [])


def test_nothing_of_the_users_is_overwritten(tmp_path):
    words = ["--tables", "A", "--seeds", "11", "--runs", f"{tmp_path}/r", "--results", f"{tmp_path}/RESULTS"]
    (tmp_path / "RESULTS.md").write_text("my notes")
    with pytest.raises(SystemExit, match="RESULTS.md is there already and not made by tables.py"):
        tables.main(words)
    assert (tmp_path / "RESULTS.md").read_text() == "my notes"
    (tmp_path / "RESULTS.md").unlink()
    (tmp_path / "RESULTS.json").write_text('{"mine": 1}')
    with pytest.raises(SystemExit, match="RESULTS.json is there already and not made by tables.py"):
        tables.main(words)
    assert (tmp_path / "RESULTS.json").read_text() == '{"mine": 1}'
    with pytest.raises(SystemExit, match="no file .*none.json to render"):
        tables.main(["--render", "--results", f"{tmp_path}/none"])
    with pytest.raises(SystemExit, match="--jobs 0: expected at least 1"):
        tables.main([*words, "--jobs", "0"])
    with pytest.raises(SystemExit, match="with several seeds both need {seed}"):
        tables.main([*words, "--seeds", "1", "2"])


def test_a_second_program_on_the_same_runs_is_refused(tmp_path):
    held = tables.lock([f"{tmp_path}/runs"])
    with pytest.raises(ValueError, match="another tables.py works there"):
        tables.lock([f"{tmp_path}/runs"])
    fcntl.flock(held[0], fcntl.LOCK_UN)
    os.close(held[0])
    held = tables.lock([f"{tmp_path}/runs"])
    results.write(f"{tmp_path}/runs/RESULTS", lambda store: results.MARK)  # results may lie in a folder of runs
    os.close(held[0])


# ---------------------------------------------------------------- rendering

def record(seed, row, average, toy="small", setting=None, **changes):
    return dict(toy=toy, setting=setting, seed=seed, row=row, hash="h", words=[], mAP={"0.5": 2 * average, "0.75": average, "0.95": 0.01}, average=average, true=2 * average, seconds=10.0 + seed,
                class_source="video classifier of the run", **{"auc of AR@AN": 0.5 + average}, peak_memory_gb=1.25, parameters=2_500_000, top1=None, probe=None, device="cpu", machine="abacus", torch="2.11",
                precision="float32", threads=1, git="abc", date="2026-01-01") | changes


def rendered(records, **options):
    return results.render({"records": {results.key_of(r): r for r in records}, "configs": {}}, tables=tables.TABLES, claims=tables.CLAIMS, controls=tables.CONTROLS,
                          memory=tables.MEMORY, settings=tables.SETTINGS, compared=tables.COMPARED, labels=tables.LABELS, needs=tables.NEEDS, design=tables.DESIGN_SEEDS,
                          commands={k: v[4] for k, v in tables.TOYS.items()}, **options)


def cells_of(text, title=""):
    lines = text[text.index(title):].split("\n\n")
    part = next(p for p in lines if p.startswith("| "))
    return {row[1].strip(): [c.strip() for c in row[2:-1]] for row in (line.split("|") for line in part.splitlines() if line.startswith("| "))}


def test_rendering_of_hand_made_records():
    # ACP 10, 11, 12 %; ICP 2, 3, 4 points behind (t = -3 / (1 / sqrt 3) = -5.196, 2 df: p = 0.0351); ACP+ 1, -1, 0 points ahead; LoFi always 2 ahead
    records = []
    for seed, acp, icp, plus in ((11, 0.10, 0.08, 0.11), (12, 0.11, 0.08, 0.10), (13, 0.12, 0.08, 0.12)):
        records += [record(seed, "acp", acp, top1=0.5), record(seed, "icp", icp), record(seed, "acp_plus", plus), record(seed, "lofi", acp + 0.02, parameters=0),
                    record(seed, "acp_plus_background", acp + 0.03)]
    text = rendered(records, notes={"small": "In short.\n\n### At length\n\nWhat the author reads in it."})
    assert text.startswith(results.MARK) and "python tables.py`" in text and "abacus" in text and "Seeds 11, 12, 13; 15 runs, 2026-01-01; commit abc" in text
    verdicts = cells_of(text, "| claim")
    assert verdicts["1.1: ACP over ICP"] == ["LoFi, Table 1", "+1.43", "+3.00 ± 1.00", "0.035", "3 of 3", "**reproduced**", "no", "+6.00 ± 2.00, p 0.035"]
    assert verdicts["1.2: ACP+ over ACP"] == ["LoFi, Table 1", "+0.25", "+0.00 ± 1.00", "1.000", "1 of 3", "**within noise**", "-", "+0.00 ± 2.00, p 1.000"]
    assert verdicts["1.3: LoFi over ACP"] == ["LoFi, Table 1", "+0.90", "+2.00 ± 0.00", "< 0.001", "3 of 3", "**reproduced**", "yes", "+4.00 ± 0.00, p < 0.001"]
    assert verdicts["1.5: LoFi brings most: over ACP+, more than ACP+ over ACP"][1:4] == ["+0.40", "+2.00 ± 2.00", "0.225"]  # 0, 4, 2: t = sqrt 3
    assert len(verdicts) == 6  # the header and Table 1's claims: what has no rows is left out
    assert f"**Of {len(tables.CLAIMS)} claims 2 reproduced** (1 of them still after Holm over the 5 judged), 3 within noise, 0 not reproduced; {len(tables.CLAIMS) - 5} not judged yet (2.1, 2.2" in text
    assert "made on seeds 0, 1, 2, 7, 11, 12, some of which are among these" in text and "which are not among these" in rendered([record(21, "acp", 0.1)])
    assert "In short." not in rendered(records, notes={"large": "In short."})  # another toy's
    assert text.index("**Of ") < text.index("In short.") < text.index("with true classes | AR@AN area | peak GB |") < text.index("| claim") < text.index("What the author reads") < text.index("### Controls") < text.index("### Table 1") < text.index("## What to keep in mind")
    assert cells_of(text, "In short")["ACP+"] == ["11.0 ± 1.0", "22.0 ± 2.0", "61.0 ± 1.0", "1.25"] and "number of seeds" not in text
    assert "Rows differ in their number of seeds" in rendered(records[:-2])
    assert cells_of(text, "### Controls")["C.12: LoFi over ACP+ with background, area under AR@AN"][2] == "-1.00 ± 0.00"
    assert cells_of(text, "### Controls")["C.1: LoFi over ACP+ with background"][2:] == ["-1.00 ± 0.00", "< 0.001", "0 of 3", "**lower**", "-2.00 ± 0.00, p < 0.001"]
    rows = cells_of(text, "### Table 1")
    assert rows["ACP"] == ["22.00 ± 2.00", "11.00 ± 1.00", "1.00 ± 0.00", "11.00 ± 1.00", "", "22.00 ± 2.00", "61.0 ± 1.0", "22", "1.25", "2.50", "50.0", "3", "49.64 / 34.16 / 7.68 / 33.59", ""]
    assert rows["ICP"][4:] == ["-3.00 ± 1.00", "16.00 ± 0.00", "58.0 ± 0.0", "22", "1.25", "2.50", "", "3", "48.45 / 32.40 / 6.89 / 32.16", "-1.43"]
    assert rows["LoFi"][9] == "0.00" and "### Table 2" not in text and "resident memory" in text


def test_few_seeds_have_no_verdict_and_other_toys_their_own_section():
    text = rendered([record(11, "acp", 0.1), record(11, "icp", 0.08), record(11, "acp", 0.3, toy="large"), record(11, "icp", 0.2, toy="large", words=["device=cuda"])])
    assert text.index('## Toy "small"') < text.index('## Toy "large"') and "`python tables.py --toy large --tables 1 2 --set device=cuda`" in text
    assert cells_of(text, "| claim")["1.1: ACP over ICP"][2:] == ["+2.00", "-", "1 of 1", "**no verdict**", "-", "+4.00, p -"]
    assert cells_of(text[text.index('"large"'):], "| claim")["1.1: ACP over ICP"][2] == "+10.00" and f"**Of {len(tables.CLAIMS)} claims 0 reproduced**" in text
    assert "### Table 1" in text and "### Table 2" not in text and "### Table 1" not in rendered([record(11, "acp", 0.1)]) and "### Table 1" in rendered([record(11, "acp", 0.1)], chosen=("small", ["1"]))


def test_probe_and_memory():
    def probe(before, after):
        return {"before": {"accuracy": 0.7, "auc": before}, "moving_average": {"accuracy": 0.7, "auc": before + 0.3}, "after": {"accuracy": 0.8, "auc": after}}
    records = [r for seed, d in ((11, 0.1), (12, 0.2), (13, 0.3)) for r in (
        record(seed, "acp", 0.1), record(seed, "sola", 0.1, probe=probe(0.6, 0.6 + d)), *(record(seed, x, 0.1, device="cuda", peak_memory_gb=m) for x, m in (("s", 2.0), ("t", 2.2), ("st", 2.5))))]
    records += [record(11, "bmn_acp", 0.1, peak_memory_gb=None)]
    text = rendered(records)
    # what a row goes on from counts: SoLa's own 1.25 behind ACP's 1.25, S behind it, a head alone
    assert [cells_of(text, title)[row][8] for title, row in (("### Table sola", "SoLa"), ("### Table 2", "S-LoFi"), ("### Table A", "BMN, ACP"))] == ["1.25", "2.00", "1.25"]
    assert cells_of(rendered([r | {"peak_memory_gb": 0.25} if r["row"] == "sola" else r for r in records]), "### Table sola")["SoLa"][8] == "1.25"
    verdicts = cells_of(text, "| claim")
    assert verdicts["sola.1: SoLa over raw features, AUC of the linear probe"][2:6] == ["+0.200 ± 0.100", "0.074", "3 of 3", "**within noise**"]  # t = 2 sqrt 3, 2 df
    assert cells_of(text, "### Controls")["C.6: SoLa over a moving average of raw features, AUC of the linear probe"][2:6] == ["-0.100 ± 0.100", "0.225", "0 of 3", "**within noise**"]
    assert verdicts["sola.2: SoLa over raw features, mAP"][2:6] == ["+0.00 ± 0.00", "1.000", "0 of 3", "**within noise**"]
    assert "2.00 / 2.20 / 2.50 GB, largest / smallest 1.25, to be at most 1.20: **not reproduced**" in text and "about the same memory" not in rendered([r for r in records if r["seed"] < 13])
    assert "Cycles" not in text and "Cycles over them: 3.00 GB" in rendered(records + [record(s, "lofi", 0.1, peak_memory_gb=3.0) for s in (11, 12, 13)])
    assert "SoLa trains in less memory than an encoder end to end at low fidelity T (SoLa, introduction): 1.250 / 2.200 GB, 1/1.8: **reproduced**" in text
    assert "largest / smallest 1.10, to be at most 1.20: **reproduced**" in rendered([r | {"peak_memory_gb": 2.2} if r["row"] == "st" else r for r in records])


def test_idle_memory_is_that_of_the_libraries():
    assert 0.1 < results.idle_memory_gb() < 3


def test_sensitivity_table():
    records = [record(s, row, a, setting=setting) for setting, shift in ((None, 0.0), ("no scene", 0.05)) for s in (11, 12)
               for row, a in (("acp", 0.1 + shift), ("acp_plus", 0.12), ("acp_plus_background", 0.13), ("lofi", 0.14))] + [record(13, "acp", 0.9)]
    rows = cells_of(rendered(records), "### Sensitivity")
    assert rows["as it is"] == ["10.00 ± 0.00", "12.00 ± 0.00", "13.00 ± 0.00", "14.00 ± 0.00", "+2.00 ± 0.00", "+1.00 ± 0.00", "LoFi > ACP+bg > ACP+ > ACP", "2 of 2"]
    assert rows["no scene"][6] == "ACP > LoFi > ACP+bg > ACP+" and len(rows) == 3


# ---------------------------------------------------------------- a real process

FAKE_ROW = """
import json, os, signal, sys, time
folder, slow = sys.argv[1], sys.argv[2] == "slow"
os.makedirs(folder, exist_ok=True)
count = 0
def stop(*_):
    global count
    count += 1
signal.signal(signal.SIGINT, stop)
open(f"{folder}/started", "a").write("x")
while slow and not count and not os.path.exists(f"{folder}/state"):
    time.sleep(0.05)
if count:
    time.sleep(0.5)
    open(f"{folder}/state", "w").write(str(count))
    sys.exit(130)
json.dump({"mAP": {"0.5": .1}, "average_mAP": .1, "AR": {"AUC": .5}, "seconds": 1, "class_source": "own"}, open(f"{folder}/metrics.json", "w"))
"""


GO = """
import functools, json, os, sys
import engine, results, tables

def command(plan, job):
    if job.row == "data":
        return [sys.executable, "-c", f"import os; os.makedirs({job.data!r}); open({job.data!r} + '/annotations.json', 'w').write('{{}}')"]
    engine.save_json(plan.config(job), f"{job.runs}/{job.row}/config.json")
    return [sys.executable, "ROOT/row.py", f"{job.runs}/{job.row}", "slow" if job.row == "bmn_acp" else "fast"]

def go(replace):
    replace(tables.Plan, "command", command)
    replace(tables.toy, "make_toy", functools.wraps(tables.toy.make_toy)(lambda *a, **k: False))
    replace(results, "trained", lambda *a: (0, None))
    replace(results, "with_true_classes", lambda *a: ({}, 0.1))
    return tables.main(["--tables", "A", "--seeds", "11", "--jobs", "2", "--data", "ROOT/data", "--runs", "ROOT/runs", "--results", "ROOT/RESULTS", "--set", "device=cpu"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])  # Ctrl-C, a closed terminal
def test_a_signal_reaches_children_once_and_the_same_command_goes_on(number, tmp_path, monkeypatch):
    script = GO.replace("ROOT", str(tmp_path))
    (tmp_path / "row.py").write_text(FAKE_ROW)
    (tmp_path / "go.py").write_text(script + "sys.exit(go(setattr))")
    environment = os.environ | {"PYTHONPATH": HERE, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen([sys.executable, f"{tmp_path}/go.py"], cwd=HERE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # not ignored, as it is when the tests themselves run under nohup
    deadline = time.monotonic() + 60
    while not (tmp_path / "runs/bmn_lofi/metrics.json").exists() or not (tmp_path / "runs/bmn_acp/started").exists():
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.05)
    first.send_signal(number)
    said = first.communicate(timeout=60)[0]
    assert first.returncode == 128 + number and f"stopped by {number.name}; the same command goes on" in said and "interrupted" in said
    assert (tmp_path / "runs/bmn_acp/state").read_text() == "1"  # it was waited for, and told once
    assert {k[3] for k in results.read(f"{tmp_path}/RESULTS.json")["records"]} >= {"acp"}
    scope = {}
    exec(script, scope)
    assert scope["go"](monkeypatch.setattr) == 0
    assert (tmp_path / "runs/acp/started").read_text() == "x" and (tmp_path / "runs/bmn_acp/started").read_text() == "xx"
    assert {k[3] for k in results.read(f"{tmp_path}/RESULTS.json")["records"]} == {"acp", "bmn_acp", "bmn_lofi"}
    assert not list(tmp_path.glob("*.part-*"))


def test_a_row_that_fails_is_named_at_the_end_with_its_log(tmp_path, monkeypatch, capsys):
    (tmp_path / "row.py").write_text("import sys; sys.exit('no such thing')")
    scope = {}
    exec(GO.replace("ROOT", str(tmp_path)), scope)
    assert scope["go"](monkeypatch.setattr) == 1
    said = capsys.readouterr()
    assert f"seed 11 acp: FAILED with status 1, see {tmp_path}/runs/acp.log" in said.out and f"failed: seed 11 acp, see {tmp_path}/runs/acp.log" in said.err
    assert all(f"skipped, as it needs one that failed: seed 11 {row}" in said.err for row in ("bmn_acp", "bmn_lofi"))
    assert "no such thing" in (tmp_path / "runs/acp.log").read_text() and (tmp_path / "RESULTS.md").read_text().startswith(results.MARK)
