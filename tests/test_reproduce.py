import copy
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import ENV, Process

import checkpoint
import config
from media import InputError
from reproduce import report, results, tables
from tools import make_toy

STUDY = report.load_study()
ROOT = config.HERE
CPU = ["--set", "device=cpu"]


@pytest.fixture(scope="module", autouse=True)
def each_file_is_parsed_once():
    """Hundreds of configs are made here of a few files."""
    parse = functools.cache(config._read_yaml)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "_read_yaml", lambda path: copy.deepcopy(parse(path)))
        yield


def make_campaign(*words):
    return tables.Campaign(tables.parse_args(STUDY, [*words, *CPU]), STUDY)


# ------------------------------------------------------------------------------------- statistics


def verdict_of(differences):
    measured = SimpleNamespace(combine=lambda weights, measure: np.array(differences))
    claim = config.Config(weights={}, measure="average")
    return report.judge(measured, [claim])[0].verdict


def test_paired_test_and_its_verdicts():
    test = report.paired_test([1.0, 2.0, 4.0, 3.0, 0.5])
    assert test.mean == 2.1
    assert test.p == pytest.approx(0.030510812580331614)
    assert test.ahead == test.n == 5
    # With two degrees of freedom p is 1 - t / sqrt(2 + t^2): here t = 2 sqrt(3).
    assert report.paired_test([1.0, 2.0, 3.0]).p == pytest.approx(1 - math.sqrt(12 / 14))
    assert verdict_of([1.0, 2.0, 4.0, 3.0, 0.5]) == "reproduced"
    assert verdict_of([-1.0, -2.0, -4.0, -3.0, -0.5]) == "not reproduced"
    assert verdict_of([1.0, -2.0, 4.0, 3.0, 0.5]) == "within noise"
    assert verdict_of([1.0, 1.1]) == verdict_of([1.0]) == "no verdict"


def test_equal_differences_leave_no_doubt():
    assert report.paired_test([0.7] * 4).p == 0
    assert verdict_of([0.7] * 4) == "reproduced"
    assert report.paired_test([0.0] * 4).p == 1
    assert verdict_of([0.0] * 4) == "within noise"


def test_holm_rejects_step_by_step():
    # 0.005 <= 0.05 / 4, 0.01 <= 0.05 / 3, 0.03 > 0.05 / 2: stop, though 0.04 <= 0.05.
    assert report.holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert report.holm([0.02, 0.03]) == [True, True]
    assert report.holm([0.03, 0.03]) == [False, False]
    assert report.holm([]) == []


# ----------------------------------------------------------------------------- rows, claims, toys


@pytest.mark.parametrize("toy", ["small", "large"])
def test_every_row_is_a_config_and_refers_only_to_rows_it_needs(toy, monkeypatch):
    monkeypatch.setattr(config, "_check_files", lambda *_: None)
    campaign = make_campaign("--toy", toy, "--seeds", "3")
    assert {job.row for job in campaign.jobs.values()} == {*STUDY.rows, "data"}
    jobs = list(campaign.jobs.values())
    for job in jobs:
        if job.row == "data":
            continue
        cfg = campaign.config(job)
        config.check(cfg)
        assert cfg.out == f"{job.runs}/{job.row}"
        assert cfg.seed == 3
        assert cfg.data.annotations == f"{job.data}/annotations.json"
        named = {row for row in STUDY.rows if f"{job.runs}/{row}/" in json.dumps(cfg)}
        assert named == set(STUDY.needs[job.row])
        assert all(jobs.index(needed) < jobs.index(job) for needed in campaign.needs(job))
    full = campaign.config(campaign.jobs[None, 3, "full"])
    assert full.lofi.chunk_snippets == full.video.snippets // 4
    assert full.lofi.fidelities == ["full"]


def test_tables_and_claims_fit_each_other():
    papers = {}
    for table in STUDY.tables.values():
        for row, entry in table["rows"].items():
            assert row in STUDY.rows
            assert entry.get("over", row) in table["rows"]
            if "paper" in entry:
                papers[row] = entry["paper"][3]
    shown = {row for table in STUDY.tables.values() for row in table["rows"]}
    claims = STUDY.claims + STUDY.controls
    for claim in claims:
        assert set(claim.weights) <= shown | STUDY.probes.keys()
        assert sum(claim.weights.values()) == pytest.approx(0)
        # The difference that is quoted is that of the numbers in the tables.
        if claim.paper is not None:
            difference = sum(weight * papers[row] for row, weight in claim.weights.items())
            assert difference == pytest.approx(claim.paper, abs=0.0051), claim.id
    assert len({claim.id for claim in claims}) == len(claims)


def test_default_jobs_start_with_all_seeds_of_the_first_table():
    keys = list(make_campaign().jobs)
    assert {seed for _, seed, _ in keys} == {21, 22, 23, 24, 25}
    order = [(None, 25, "lofi"), (None, 21, "s"), (None, 21, "arrow")]
    assert sorted(order, key=keys.index) == order


def test_a_setting_turns_one_knob_of_the_toy_in_a_folder_of_its_own():
    campaign = make_campaign("--sensitivity", "--seeds", "21")
    setting = "weaker amplitude (0.20-0.27)"
    words = " ".join(campaign.command(campaign.jobs[setting, 21, "data"]))
    assert "--out data/toy-21-weaker_amplitude_0.20-0.27 --seed 21" in words
    assert "--near 0.6" in words
    assert "--amplitude 0.2 0.27" in words


def test_settings_share_the_acp_encoder_of_their_seed(monkeypatch):
    monkeypatch.setattr(config, "_check_files", lambda *_: None)
    campaign = make_campaign("--sensitivity", "--seeds", "11", "12")
    expected = set(itertools.product((11, 12), (*STUDY.compared, "data")))
    assert {(seed, row) for _, seed, row in campaign.jobs} == expected
    for job in campaign.jobs.values():
        if job.setting is None or job.row == "data" or job.seed == 11:
            continue
        cfg = campaign.config(job)
        config.check(cfg)
        assert cfg.pretrain.pretrained == f"runs/toy-{job.seed}/acp/pretrain/encoder.pt"
        assert cfg.out.startswith(f"runs/toy-{job.seed}-")
        comparable = campaign.comparable(job)
        assert comparable == campaign.comparable(campaign.jobs[job.setting, 11, job.row])
        assert comparable["pretrain.pretrained"] == "ACP/acp/pretrain/encoder.pt"
        needed = {(job.setting, job.seed, "data"), (None, job.seed, "acp")}
        assert campaign.needs(job) == {campaign.jobs[key] for key in needed}
    base = make_toy.Toy().train
    sizes = {"half the training videos": base // 2, "twice the training videos": 2 * base}
    for setting in (None, *STUDY.settings):
        job = campaign.jobs[setting, 11, "data"]
        assert campaign.toy_of(job).train == sizes.get(setting, base)


def test_the_clips_do_not_depend_on_the_settings(tmp_path):
    campaign = make_campaign("--sensitivity", "--seeds", "11")
    clips = []
    for i, setting in enumerate((None, *STUDY.settings)):
        toy = campaign.toy_of(campaign.jobs[setting, 11, "data"])
        make_toy.write_item(("clip", 5), f"{tmp_path}/{i}", toy)
        clips += [path.read_bytes() for path in (tmp_path / str(i)).glob("clips/*/*/00005.zip")]
    assert len(clips) == 1 + len(STUDY.settings)
    assert len(set(clips)) == 1


def test_several_seeds_need_folders_of_their_own():
    with pytest.raises(InputError, match="several seeds"):
        make_campaign("--runs", "here", "--seeds", "1", "2")


# ------------------------------------------------------------------------------------- scheduling


class FakeProcess:
    """Ends after so many polls."""

    def __init__(self, polls=1, status=0):
        self.polls = polls
        self.status = status
        self.signals = []

    def poll(self):
        self.polls -= 1
        return None if self.polls > 0 else self.status

    def send_signal(self, number):
        self.signals.append(number)

    def wait(self):
        return self.status


def run_schedule(waiting, slots, lengths=None, failing=()):
    """Return what failed, and in which order jobs started (job, slot) and ended (job)."""
    events = []
    busy = set()

    def start(job, slot):
        assert slot == min({0, 1} - busy)
        busy.add(slot)
        events.append((job, slot))
        return FakeProcess((lengths or {}).get(job, 1), int(job in failing))

    def end(job, status, elapsed_sec):
        assert elapsed_sec >= 0
        busy.remove(dict(event for event in events if isinstance(event, tuple))[job])
        events.append(job)
        return status == 0

    waiting = {job: set(needs) for job, needs in waiting.items()}
    return tables.schedule(waiting, start, end, slots, pause_sec=0), events


def test_jobs_run_side_by_side_in_order_and_after_what_they_need():
    waiting = {"a": "", "b": "a", "c": "", "d": "", "e": "bd"}
    failed, events = run_schedule(waiting, 2, {"a": 3})
    assert not failed
    expected = [("a", 0), ("c", 1), "c", ("d", 1), "d", "a", ("b", 0), "b", ("e", 0), "e"]
    assert events == expected


def test_a_failure_skips_only_what_needs_it():
    failed, events = run_schedule({"a": "", "b": "a", "c": "b", "d": ""}, 1, failing="a")
    assert failed == ["a", "b", "c"]
    assert events == [("a", 0), "a", ("d", 0), "d"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_interrupts_once_what_runs(error):
    child = FakeProcess(99)

    def start(job, slot):
        return child if job == "a" else FakeProcess()

    def end(job, status, elapsed_sec):
        raise error

    with pytest.raises(error):
        tables.schedule({"a": set(), "b": set()}, start, end, 2, pause_sec=0)
    assert child.signals == [signal.SIGINT]


def test_each_job_has_a_gpu_or_a_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    automatic = config.load_config(f"{ROOT}/configs/toy.yaml")
    assert tables.visible_gpus(automatic, {}) == ["0", "1"]
    assert tables.visible_gpus(automatic, {"CUDA_VISIBLE_DEVICES": "5,7"}) == ["5", "7"]
    assert tables.visible_gpus(config.merge(automatic, {"device": "cpu"}), {}) == []
    gpus = [tables.job_environment(slot, 3, ["5", "7"], {}) for slot in (0, 1, 2)]
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in gpus] == ["5", "7", "5"]
    monkeypatch.setattr(tables, "available_cores", lambda: 8)
    assert tables.job_environment(1, 3, [], {}) == {"OMP_NUM_THREADS": "2"}
    assert tables.job_environment(1, 9, [], {}) == {"OMP_NUM_THREADS": "1"}
    given = {"OMP_NUM_THREADS": "7"}
    assert tables.job_environment(1, 3, [], given) == given


# --------------------------------------------------------------------------- records and resuming

ROWS = ("acp", "bmn_acp", "bmn_lofi")


def finish_run(campaign, job, average):
    """Leave what a run leaves, as far as records need it."""
    cfg = campaign.config(job)
    run = job.run
    checkpoint.save_json(cfg, run.config)
    versions = {"device": "cpu", "machine": "abacus", "torch": "2.11", "git": "abc"}
    checkpoint.save_json(versions, run.versions)
    metrics = {
        "mAP": {"0.5": 2 * average, "0.75": average, "0.95": 0.01},
        "average_mAP": average,
        "AR": {"AUC": 0.5},
        "seconds": 10.0,
        "class_source": "video classifier of the run",
    }
    checkpoint.save_json(metrics, run.metrics)
    stage = "lofi" if "lofi" in cfg.stages else "pretrain"
    if stage in cfg.stages:
        checkpoint.save_weights(torch.nn.BatchNorm1d(6), run.encoder(stage))
        checkpoint.save_json({"tasks": {"x": {"top1": 0.625}}}, run.accuracy)
        folder = "lofi" if stage == "lofi" else "pretrain/acp"
        os.makedirs(f"{run.path}/{folder}", exist_ok=True)
        with open(f"{run.path}/{folder}/metrics.jsonl", "w") as file:
            file.write('{"peak_memory_gb": 1.5}\n{"peak_memory_gb": 2.5}\n')
    proposals = [
        {"score": 0.9, "segment": [1.0, 4.0]},
        {"score": 0.5, "segment": [5.0, 9.0]},
    ]
    checkpoint.save_json({"results": {"v": proposals}}, run.proposals)


def write_data(folder, toy):
    """Leave what make_toy leaves, as far as records need it; False if it is there."""
    if os.path.exists(f"{folder}/toy.json"):
        if checkpoint.load_json(f"{folder}/toy.json") != toy.settings():
            raise InputError(f"{folder} is another toy")
        return False
    segment = {"segment": [1.0, 4.0], "label": "jump"}
    video = {"subset": "validation", "duration": 10.0, "annotations": [segment]}
    checkpoint.save_json({"database": {"v": video}}, f"{folder}/annotations.json")
    checkpoint.save_json(toy.settings(), f"{folder}/toy.json")
    return True


@pytest.fixture
def table_a(tmp_path, monkeypatch):
    """Return the words and the campaign of Table A on one seed, its data and its runs finished."""
    monkeypatch.setattr(tables, "make_toy", write_data)
    monkeypatch.setattr(results, "idle_memory_gb", lambda: 0.5)
    folders = {"data": "data-{seed}", "runs": "runs-{seed}", "results": "out"}
    words = ["--tables", "A", "--seeds", "11", "--jobs", "1"]
    for flag, folder in folders.items():
        words += [f"--{flag}", f"{tmp_path}/{folder}"]
    campaign = make_campaign(*words)
    assert [job.row for job in campaign.jobs.values()] == ["data", *ROWS]
    assert campaign.pending({}) == set(campaign.jobs.values())
    data = campaign.jobs[None, 11, "data"]
    write_data(data.data, campaign.toy_of(data))
    for i, row in enumerate(ROWS):
        finish_run(campaign, campaign.jobs[None, 11, row], 0.1 + i / 100)
    return words, campaign


def move_runs(tmp_path, old, new):
    for row in ROWS:
        os.rename(f"{tmp_path}/{old}/{row}", f"{tmp_path}/{new}/{row}")


def test_finished_rows_are_recorded_and_recorded_rows_are_done(table_a, tmp_path, monkeypatch):
    words, campaign = table_a
    ran = []
    popen = subprocess.Popen

    def start(command, **options):
        ran.append(command[1:])
        return popen(command, **options)

    monkeypatch.setattr(tables.subprocess, "Popen", start)
    assert tables.main([*words, *CPU]) == 0
    # Nothing is run: a finished row is only recorded.
    assert ran == [["-c", ""]] * 3
    records = results.read_records(f"{tmp_path}/out")
    record = records["small", None, 11, "bmn_lofi"]
    assert record["average"] == pytest.approx(0.12)
    assert (record["parameters"], record["peak_memory_gb"], record["top1"]) == (12, 2.0, 0.625)
    # Its best proposal is the segment.
    assert record["true"] == record["true_mAP"]["0.95"] == 1
    assert (record["git"], record["config"]["precision"]) == ("abc", "float32")
    assert records["small", None, 11, "bmn_acp"]["parameters"] == 0
    assert "| BMN, LoFi " in (tmp_path / "out/README.md").read_text()
    campaign.check(records)
    assert campaign.pending(records) == set()

    # Without their runs recorded rows count as done; a missing one brings back what it needs.
    os.mkdir(f"{tmp_path}/gone")
    move_runs(tmp_path, "runs-11", "gone")
    assert campaign.pending(records) == set()
    del records["small", None, 11, "bmn_lofi"]
    pending = {job.row for job in campaign.pending(records)}
    assert pending == {"acp", "bmn_lofi"}

    # A record has the mAP under true classes: data that are gone are made again, the rows are not.
    move_runs(tmp_path, "gone", "runs-11")
    shutil.rmtree(f"{tmp_path}/data-11")
    assert {job.row for job in campaign.pending({})} == {"data", *ROWS}
    data = campaign.jobs[None, 11, "data"]
    assert campaign.needs(campaign.jobs[None, 11, "bmn_lofi"]) == {data}


def test_what_was_made_otherwise_is_an_error(table_a, tmp_path, monkeypatch):
    words, _ = table_a
    assert tables.main([*words, *CPU]) == 0

    def refused(match, *more):
        with pytest.raises(SystemExit, match=match):
            tables.main([*words, *CPU, *more])

    # The run is another one, and so is the record, of any seed.
    refused(r"(?s)out, acp is another .*lofi.epochs: 12 there, 3 now", "--set", "lofi.epochs=3")
    elsewhere = ["--results", f"{tmp_path}/other"]
    changed = [*elsewhere, "--set", "lofi.epochs=3"]
    refused(r"(?s)runs-11/acp is another .*lofi.epochs: 12 there, 3 now", *changed)
    seeds = ["--seeds", "12", "--runs", f"{tmp_path}/new-{{seed}}"]
    refused(r"(?s)another .*lofi.lr: 0.001 there, 0.5 now", *seeds, "--set", "lofi.lr=0.5")
    refused(r"(?s)another .*'float32' there, 'bfloat16' now", *seeds, "--set", "precision=bfloat16")

    # Nor do seconds and memory of another device compare.
    for more, match in ((seeds, "out, acp is another"), (elsewhere, "runs-11/acp is another")):
        with monkeypatch.context() as patched:
            patched.setattr(tables, "visible_gpus", lambda cfg: ["0"])
            refused(rf"(?s){match} .*device: 'cpu' there, 'cuda' now", *more)
    with monkeypatch.context() as patched:
        patched.setattr(make_toy, "VERSION", 99)
        refused(r"toy.version: 2 there, 99 now|another toy")
    # Folders do not count.
    other = make_campaign("--tables", "A", "--seeds", "11", "--runs", "elsewhere/{seed}")
    records = results.read_records(f"{tmp_path}/out")
    other.check(records)
    assert other.pending(records) == set()


def test_the_probe_of_a_sola_row_is_made_if_it_is_missing(tmp_path, monkeypatch):
    run = checkpoint.RunFolder(f"{tmp_path}/sola")
    probe = {"before": {"accuracy": 0.7, "auc": 0.8}}

    def probe_sola(command, **options):
        assert command[1:] == ["-m", "tools.probe_sola", run.path]
        if probe:
            checkpoint.save_json(probe, f"{run.path}/sola/probe.json")
        return SimpleNamespace(returncode=int(not probe), stderr="no such run")

    monkeypatch.setattr(results.subprocess, "run", probe_sola)
    expected = dict(probe)
    assert results.read_probe(run) == expected
    probe.clear()
    assert results.read_probe(run) == expected
    os.remove(f"{run.path}/sola/probe.json")
    with pytest.raises(InputError, match=r"probe_sola .*failed: no such run"):
        results.read_probe(run)


def test_nothing_of_the_users_is_overwritten(tmp_path):
    words = ["--tables", "A", "--seeds", "11", "--runs", f"{tmp_path}/r"]
    words += ["--results", f"{tmp_path}", *CPU]
    for name in ("README.md", "results.json.gz"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(SystemExit, match=f"{name}.* of another program"):
            tables.main(words)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    with pytest.raises(SystemExit, match=r"no file .*none/results\.json\.gz"):
        tables.main(["--render", "--results", f"{tmp_path}/none"])
    with pytest.raises(SystemExit, match="--jobs"):
        tables.main([*words, "--jobs", "0"])


# -------------------------------------------------------------------------------------- rendering


def make_record(seed, row, average, **changes):
    record = {
        "toy": "small",
        "setting": None,
        "seed": seed,
        "row": row,
        "overrides": [],
        "mAP": {"0.5": 2 * average, "0.75": average, "0.95": 0.01},
        "average": average,
        "true": 2 * average,
        "ar_auc": 0.5 + average,
        "seconds": 10.0 + seed,
        "peak_memory_gb": 1.25,
        "parameters": 2_500_000,
        "top1": None,
        "probe": None,
        "class_source": "video classifier of the run",
        "device": "cpu",
        "machine": "abacus",
        "torch": "2.11",
        "config": {"precision": "float32"},
        "threads": 1,
        "git": "abc",
        "date": "2026-01-01",
    }
    return record | changes


def render(records, folder="nowhere"):
    return report.render({results.key_of(r): r for r in records}, STUDY, folder)


def cells_of(text, start=""):
    """Return {first cell: the others} of the first table after `start`."""
    parts = text[text.index(start) :].split("\n\n")
    lines = next(part for part in parts if part.startswith("| ")).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {first: cells for first, *cells in rows}


@pytest.fixture
def table_1():
    """Return three seeds: ICP 2, 3, 4 points behind ACP, ACP+ 1, -1, 0 ahead, LoFi always 2."""
    records = []
    for seed, acp, plus in ((11, 0.10, 0.11), (12, 0.11, 0.10), (13, 0.12, 0.12)):
        records += [
            make_record(seed, "acp", acp, top1=0.5),
            make_record(seed, "icp", 0.08),
            make_record(seed, "acp_plus", plus),
            make_record(seed, "lofi", acp + 0.02, parameters=0),
            make_record(seed, "acp_plus_background", acp + 0.03),
        ]
    return records


def test_verdicts_on_hand_made_records(table_1):
    text = render(table_1)
    verdicts = cells_of(text, "| claim")
    # t = -3 / (1 / sqrt 3) = -5.196 with 2 degrees of freedom: p = 0.0351.
    first = ["LoFi, Table 1", "+1.43", "+3.00 ± 1.00", "0.035", "3 of 3", "**reproduced**", "no"]
    assert verdicts["1.1: ACP over ICP"] == [*first, "+6.00 ± 2.00, p 0.035"]
    expected = ["+0.00 ± 1.00", "1.000", "1 of 3", "**within noise**", "-", "+0.00 ± 2.00, p 1.000"]
    assert verdicts["1.2: ACP+ over ACP"][2:] == expected
    expected = ["+2.00 ± 0.00", "< 0.001", "3 of 3", "**reproduced**", "yes"]
    assert verdicts["1.3: LoFi over ACP"][2:] == [*expected, "+4.00 ± 0.00, p < 0.001"]
    # 0, 4, 2: t = sqrt 3.
    name = "1.5: LoFi brings most: over ACP+, more than ACP+ over ACP"
    assert verdicts[name][1:4] == ["+0.40", "+2.00 ± 2.00", "0.225"]
    # The header, a rule, and Table 1's claims: what has no rows is left out.
    assert len(verdicts) == 7
    count = len(STUDY.claims)
    assert f"**Of {count} claims 2 reproduced** (1 of them still after Holm over the 5" in text
    assert f"3 within noise, 0 not reproduced; {count - 5} not judged yet (2.1, 2.2" in text
    controls = cells_of(text, "### Controls")
    name = "C.1: LoFi over ACP+ with background"
    expected = ["-1.00 ± 0.00", "< 0.001", "0 of 3", "**lower**", "-2.00 ± 0.00, p < 0.001"]
    assert controls[name][2:] == expected
    assert controls["C.12: LoFi over ACP+ with background, area under AR@AN"][2] == "-1.00 ± 0.00"


def test_tables_of_hand_made_records(table_1):
    text = render(table_1)
    assert text.startswith(results.MARK)
    assert "Made by `python -m reproduce.tables`." in text
    assert "Seeds 11, 12, 13; 15 runs, 2026-01-01; commit abc" in text
    assert "Machine: abacus; torch 2.11; float32; threads a run: 1 (15 runs)." in text
    rows = cells_of(text, "### Table 1")
    expected = ["22.00 ± 2.00", "11.00 ± 1.00", "1.00 ± 0.00", "11.00 ± 1.00", ""]
    expected += ["22.00 ± 2.00", "61.0 ± 1.0", "22", "1.25", "2.50", "50.0", "3"]
    assert rows["ACP"] == [*expected, "49.64 / 34.16 / 7.68 / 33.59", ""]
    expected = ["-3.00 ± 1.00", "16.00 ± 0.00", "58.0 ± 0.0", "22", "1.25", "2.50", "", "3"]
    assert rows["ICP"][4:] == [*expected, "48.45 / 32.40 / 6.89 / 32.16", "-1.43"]
    assert rows["LoFi"][9] == "0.00"
    assert "### Table 2" not in text
    assert "resident memory" in text
    assert "number of seeds" not in text
    assert "Rows differ in their number of seeds" in render(table_1[:-2])
    summary = cells_of(text, "Holm over")
    assert summary["ACP+"] == ["11.0 ± 1.0", "22.0 ± 2.0", "61.0 ± 1.0", "1.25"]


def test_remarks_beside_the_results_are_in_the_report(table_1, tmp_path):
    text = "In short.\n\n### At length\n\nWhat the authors read.\n"
    (tmp_path / "notes_small.md").write_text(text)
    text = render(table_1, tmp_path)
    order = ["**Of ", "In short.", "| average mAP |", "| claim", "### At length"]
    order += ["### Controls", "### Table 1", "## What to keep in mind"]
    assert sorted(order, key=text.index) == order
    assert "In short." not in render([r | {"toy": "large"} for r in table_1], tmp_path)


def test_few_seeds_have_no_verdict_and_other_toys_a_section():
    small = [make_record(11, "acp", 0.1), make_record(11, "icp", 0.08)]
    large = [make_record(11, "acp", 0.3, toy="large"), make_record(11, "icp", 0.2, toy="large")]
    large[1]["overrides"] = ["device=cuda"]
    text = render(large + small)
    assert text.index('## Toy "small"') < text.index('## Toy "large"')
    assert "`python -m reproduce.tables --toy large --tables 1 2 --set device=cuda`" in text
    expected = ["+2.00", "-", "1 of 1", "**no verdict**", "-", "+4.00, p -"]
    assert cells_of(text, "| claim")["1.1: ACP over ICP"][2:] == expected
    second = text[text.index('"large"') :]
    assert cells_of(second, "| claim")["1.1: ACP over ICP"][2] == "+10.00"
    assert f"**Of {len(STUDY.claims)} claims 0 reproduced**" in text
    # A table is shown with rows of its own.
    assert "### Table 1" in text
    assert "### Table 1" not in render([make_record(11, "acp", 0.1)])


@pytest.fixture
def sola_records():
    records = [make_record(11, "bmn_acp", 0.1, peak_memory_gb=None)]
    sizes = {"s": 2.0, "t": 2.2, "st": 2.5, "short": 3.0, "lofi": 3.0}
    for seed, gain in ((11, 0.1), (12, 0.2), (13, 0.3)):
        aucs = {"before": 0.6, "moving_average": 0.9, "after": 0.6 + gain}
        probe = {name: {"accuracy": 0.7, "auc": value} for name, value in aucs.items()}
        records += [make_record(seed, "acp", 0.1), make_record(seed, "sola", 0.1, probe=probe)]
        for row, size in sizes.items():
            records.append(make_record(seed, row, 0.1, device="cuda", peak_memory_gb=size))
    return records


def test_probe(sola_records):
    text = render(sola_records)
    verdicts = cells_of(text, "| claim")
    # t = 2 sqrt 3 with 2 degrees of freedom.
    expected = ["+0.200 ± 0.100", "0.074", "3 of 3", "**within noise**"]
    assert verdicts["sola.1: SoLa over raw features, AUC of the linear probe"][2:6] == expected
    expected = ["+0.00 ± 0.00", "1.000", "0 of 3", "**within noise**"]
    assert verdicts["sola.2: SoLa over raw features, mAP"][2:6] == expected
    name = "C.6: SoLa over a moving average of raw features, AUC of the linear probe"
    expected = ["-0.100 ± 0.100", "0.225", "0 of 3", "**within noise**"]
    assert cells_of(text, "### Controls")[name][2:6] == expected


def test_memory(sola_records):
    text = render(sola_records)

    def changed(row, size):
        records = copy.deepcopy(sola_records)
        for record in records:
            if record["row"] == row:
                record["peak_memory_gb"] = size
        return render(records)

    # What a row goes on from counts: SoLa after ACP, S after ACP, a head alone.
    assert cells_of(text, "### Table sola")["SoLa"][8] == "1.25"
    assert cells_of(text, "### Table 2")["S-LoFi"][8] == "2.00"
    assert cells_of(text, "### Table A")["BMN, ACP"][8] == "1.25"
    assert cells_of(changed("sola", 0.25), "### Table sola")["SoLa"][8] == "1.25"
    sizes = "2.00 / 2.20 / 2.50 GB, largest / smallest 1.25, to be at most 1.20: "
    assert f"{sizes}**not reproduced**" in text
    assert "largest / smallest 1.10, to be at most 1.20: **reproduced**" in changed("st", 2.2)
    assert "about the same memory" not in render([r for r in sola_records if r["seed"] < 13])
    assert "**. Cycles over them: 3.00 / 3.00 GB.\n- SoLa" in text
    assert "introduction): 1.250 / 2.200 GB, 1/1.8: **reproduced**" in text


def test_sensitivity_table():
    records = [make_record(13, "acp", 0.9)]
    for setting, shift in ((None, 0.0), ("no scene", 0.05)):
        averages = {"acp": 0.1 + shift, "acp_plus": 0.12, "acp_plus_background": 0.13}
        for seed, (row, value) in itertools.product((11, 12), averages.items()):
            records.append(make_record(seed, row, value, setting=setting))
        records += [make_record(seed, "lofi", 0.14, setting=setting) for seed in (11, 12)]
    rows = cells_of(render(records), "### Sensitivity")
    expected = ["10.00 ± 0.00", "12.00 ± 0.00", "13.00 ± 0.00", "14.00 ± 0.00"]
    expected += ["+2.00 ± 0.00", "+1.00 ± 0.00", "LoFi > ACP+bg > ACP+ > ACP", "2 of 2"]
    assert rows["as it is"] == expected
    assert rows["no scene"][6] == "ACP > LoFi > ACP+bg > ACP+"
    assert len(rows) == 4


def test_the_projects_own_records_are_of_todays_rows_and_make_its_report():
    records = results.read_records(report.HERE)
    for words in ([], ["--sensitivity", "--seeds", "21"]):
        campaign = make_campaign(*words, "--set", "precision=bfloat16")
        campaign.check(records)
        assert not campaign.pending(records)
    text = report.render(records, STUDY, report.HERE)
    with open(f"{report.HERE}/README.md", encoding="utf-8") as file:
        assert file.read() == text


@pytest.mark.beside("-c", "from reproduce import results; print(results.idle_memory_gb())")
def test_idle_memory_is_that_of_the_libraries(beside):
    assert beside.returncode == 0, beside.read(2)
    assert 0.1 < float(beside.read(1)) < 3


# --------------------------------------------------------------------------------- a real process

FAKE_ROW = """
import json, os, signal, sys, time
folder, slow = sys.argv[1], sys.argv[2] == "slow"
os.makedirs(folder, exist_ok=True)
signals = []
signal.signal(signal.SIGINT, lambda *_: signals.append(1))
with open(f"{folder}/started", "a") as file:
    file.write("x")
while slow and not signals and not os.path.exists(f"{folder}/state"):
    time.sleep(0.05)
if signals:
    time.sleep(0.5)
    with open(f"{folder}/state", "w") as file:
        file.write(str(len(signals)))
    sys.exit(130)
metrics = {"mAP": {"0.5": .1}, "average_mAP": .1, "AR": {"AUC": .5}, "seconds": 1}
with open(f"{folder}/metrics.json", "w") as file:
    json.dump(metrics | {"class_source": "own"}, file)
"""

PATCHES = """
import os, signal, sys
import checkpoint
from reproduce import results, tables

def command(campaign, job):
    if job.row == "data":
        code = f"import os; os.makedirs({job.data!r}); open({job.data!r} + '/toy.json', 'w')"
        return [sys.executable, "-c", code]
    checkpoint.save_json(campaign.config(job), job.run.config)
    checkpoint.save_json({"device": "cpu", "machine": "abacus"}, job.run.versions)
    speed = "slow" if job.row == "bmn_acp" else "fast"
    return [sys.executable, "ROOT/row.py", job.run.path, speed]

def go(replace):
    replace(tables.Campaign, "command", command)
    replace(tables, "make_toy", lambda *_: False)
    replace(results, "evaluate_true_classes", lambda *_: {"mAP": {}, "average_mAP": 0.1})
    replace(results, "idle_memory_gb", lambda: 0.1)
    words = "--tables A --seeds 11 --jobs 2 --set device=cpu"
    for flag in ("data", "runs", "results"):
        words += f" --{flag} ROOT/{flag}"
    return tables.main(words.split())
"""

START = """
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.default_int_handler)
sys.exit(go(setattr))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_rows_once_and_the_same_command_resumes(number, tmp_path, monkeypatch):
    script = PATCHES.replace("ROOT", str(tmp_path))
    (tmp_path / "row.py").write_text(FAKE_ROW)
    (tmp_path / "go.py").write_text(script + START)

    first = Process(f"{tmp_path}/go.py", env=ENV | {"PYTHONPATH": ROOT})
    deadline = time.monotonic() + 60
    ready = [tmp_path / "runs/bmn_lofi/metrics.json", tmp_path / "runs/bmn_acp/started"]
    while not all(path.exists() for path in ready):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.05)
    first.send_signal(number)
    output = "".join(first.communicate(timeout=60))
    assert first.returncode == 1
    assert "interrupted; rerun the same command to resume" in output
    # It was told once, and waited for.
    assert (tmp_path / "runs/bmn_acp/state").read_text() == "1"
    recorded = {row for *_, row in results.read_records(f"{tmp_path}/results")}
    assert "acp" in recorded

    scope = {}
    exec(script, scope)
    assert scope["go"](monkeypatch.setattr) == 0
    assert (tmp_path / "runs/acp/started").read_text() == "x"
    assert (tmp_path / "runs/bmn_acp/started").read_text() == "xx"
    assert {row for *_, row in results.read_records(f"{tmp_path}/results")} == set(ROWS)
    assert not list(tmp_path.glob("**/*.part-*"))


def test_a_row_that_fails_is_named_at_the_end_with_its_log(tmp_path, monkeypatch, capsys):
    (tmp_path / "row.py").write_text("import sys; sys.exit('no such thing')")
    scope = {}
    exec(PATCHES.replace("ROOT", str(tmp_path)), scope)
    assert scope["go"](monkeypatch.setattr) == 1
    output = capsys.readouterr()
    log = f"{tmp_path}/runs/acp.log"
    assert f"seed 11 acp: FAILED: status 1, see {log}" in output.out
    for row in ROWS:
        assert re.search(rf"failed.*: seed 11 {row}, see {tmp_path}", output.err)
    with open(log) as file:
        assert "no such thing" in file.read()
    assert (tmp_path / "results/README.md").read_text().startswith(results.MARK)
