"""Tables of several runs: means over seeds, what is refused, what is written."""

import json
import os
import signal
from pathlib import Path

import pytest
from processes import Process

from media import InputError
from tools import compare_runs

ROOT = Path(__file__).resolve().parent.parent


def write(path, average, thresholds=("0.5", "0.75", "0.95"), **more):
    """Write metrics as stage detect does."""
    metrics = {"mAP": dict.fromkeys(thresholds, average), "average_mAP": average}
    metrics |= {"evaluated_videos": 9, "ground_truth_videos": 10, "subset": "validation"}
    metrics["class_source"] = "video classifier of the run"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(metrics | more))
    return str(path)


def test_markdown_table_and_percent():
    rows = [["a", 1, compare_runs.percent(0.12345)], ["long name", 22, compare_runs.percent(None)]]
    assert compare_runs.markdown_table(["x", "n", "mAP"], rows).splitlines() == [
        "| x         |  n |   mAP |",
        "|-----------|---:|------:|",
        "| a         |  1 | 12.35 |",
        "| long name | 22 |     - |",
    ]


def test_table(tmp_path, capsys):
    write(tmp_path / "icp" / "metrics.json", 0.1234567890123, seconds=12.5, seed=0)
    # Of three seeds one knows its cost.
    for seed, (average, seconds) in enumerate(((0.2, None), (0.3, 8.0), (0.4, None))):
        path = tmp_path / "lofi" / f"seed{seed}" / "metrics.json"
        write(path, average, seed=seed, seconds=seconds)
    out = tmp_path / "new" / "t.json"
    markdown = tmp_path / "t.md"
    command = [str(tmp_path / "icp"), f"LoFi={tmp_path / 'lofi'}/"]
    command += ["--json", str(out), "--markdown", str(markdown)]
    compare_runs.main(command)
    text = capsys.readouterr().out
    icp, lofi = json.loads(out.read_text())["rows"]
    assert (icp["name"], icp["seeds"], icp["std"]) == ("icp", 1, None)
    assert icp["0.95"] == icp["average"] == 0.1234567890123
    assert (icp["seconds"], icp["evaluated_videos"]) == (12.5, 9)
    assert (lofi["name"], lofi["seeds"]) == ("LoFi", 3)
    assert lofi["average"] == pytest.approx(0.3)
    assert lofi["std"]["0.75"] == pytest.approx(0.1)
    assert (lofi["seconds"], lofi["std"]["seconds"]) == (8.0, None)
    assert markdown.read_text() == text
    assert text.splitlines()[1].startswith("|--")
    for words in ("30.00 ± 10.00", "12.35", " 9 of 10 |", "video classifier of the run"):
        assert words in text
    # Its own files are replaced.
    compare_runs.main(command)


def test_thresholds_of_thumos_and_what_differs_or_is_missing(tmp_path):
    write(tmp_path / "a" / "0" / "metrics.json", 0.1, ("0.3", "0.5"))
    (tmp_path / "a" / "1").mkdir()
    write(tmp_path / "b" / "metrics.json", 0.2, ("0.3", "0.5"), class_source="ground truth")
    with pytest.warns(UserWarning) as caught:
        rows = compare_runs.compare([str(tmp_path / "a"), str(tmp_path / "b")])
    messages = [str(warning.message) for warning in caught]
    assert any("no metrics.json in 1 of " in message for message in messages)
    assert any("differ in class_source" in message for message in messages)
    assert rows[0]["0.3"] == 0.1
    assert "0.75" not in rows[0]


def test_seeds_of_a_row_may_be_listed_and_other_runs_are_no_seeds(tmp_path):
    for name, seed, average in (("a0", 0, 0.2), ("a1", 1, 0.4), ("b0", 0, 0.6)):
        write(tmp_path / name / "metrics.json", average, seed=seed)
    (row,) = compare_runs.compare([f"A={tmp_path}/a0,{tmp_path}/a1"])
    assert (row["name"], row["seeds"]) == ("A", 2)
    assert row["average"] == pytest.approx(0.3)
    assert row["std"]["average"] == pytest.approx(0.02**0.5)
    with pytest.raises(InputError, match=r"have seeds \[0, 1, 0\]"):
        compare_runs.compare([str(tmp_path)])


def test_a_file_of_metrics_is_a_run_too(tmp_path):
    file = write(tmp_path / "lr=1.json", 0.5)
    rows = compare_runs.compare([file, f"named={file}"])
    assert [row["name"] for row in rows] == ["lr=1.json", "named"]
    assert rows[0]["average"] == 0.5


@pytest.mark.parametrize(
    "run, message",
    [
        ("X=none/there", "^tools.compare_runs: none/there does not exist; expected a run"),
        ("none/there", "none/there does not exist"),
        ("X=README.md,none", "none does not exist"),
        ("X=README.md", "README.md cannot be read as JSON"),
        ("X={folder}", "{folder}: no metrics.json in it or in its folders"),
        ("{folder}/proposals.json", '{folder}/proposals.json: no "mAP"'),
    ],
)
def test_what_is_no_run_is_one_clear_error(tmp_path, monkeypatch, run, message):
    monkeypatch.chdir(ROOT)
    (tmp_path / "proposals.json").write_text('{"AR": {}}')
    with pytest.raises(SystemExit, match=message.format(folder=tmp_path)):
        compare_runs.main([run.format(folder=tmp_path)])


@pytest.mark.parametrize("option", ["--json", "--markdown"])
@pytest.mark.parametrize("name", ["run/metrics.json", "list.json", "notes.txt"])
def test_a_file_of_somebody_else_is_not_replaced(tmp_path, option, name):
    write(tmp_path / "run" / "metrics.json", 0.5)
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "notes.txt").write_text("What came out:\n\n| mAP (%) | @0.5 |\n|---|---:|\n")
    before = (tmp_path / name).read_bytes()
    with pytest.raises(SystemExit, match=f"{name} already exists"):
        compare_runs.main([str(tmp_path / "run"), option, str(tmp_path / name)])
    assert (tmp_path / name).read_bytes() == before


def test_a_reader_that_has_seen_enough_ends_it_quietly(tmp_path):
    """The pipe is closed before anything is written, as by `| head`; the file is written."""
    write(tmp_path / "run" / "metrics.json", 0.5)
    read, write_end = os.pipe()
    os.close(read)
    command = ["-m", "tools.compare_runs", f"{tmp_path}/run", "--json", f"{tmp_path}/out.json"]
    process = Process(*command, stdout=write_end)
    os.close(write_end)
    assert (process.wait(), process.read(2)) == (-signal.SIGPIPE, "")
    assert json.loads((tmp_path / "out.json").read_text())["rows"]


def test_a_terminal_without_the_plus_minus_sign(tmp_path):
    for seed in (0, 1):
        write(tmp_path / f"runs/{seed}/metrics.json", 0.1 * seed, seed=seed)
    code = "import sys; sys.stdout.reconfigure(encoding='ascii'); from tools import compare_runs; "
    code += "compare_runs.main(sys.argv[1:])"
    process = Process("-c", code, f"{tmp_path}/runs")
    output, _ = process.communicate()
    assert process.returncode == 0
    assert "5.00 ? 7.07" in output


@pytest.mark.parametrize(
    "change",
    [
        {"mAP": {}},
        {"mAP": {"x": 0.5}},
        {"mAP": {"0.5": "high"}},
        {"average_mAP": [0.5]},
        {"seconds": "long"},
        {"seed": [1]},
        {"ground_truth_videos": {"a": 1}},
    ],
)
def test_metrics_of_other_kinds_are_refused(tmp_path, change):
    file = write(tmp_path / "metrics.json", 0.5, **change)
    with pytest.raises(InputError, match='no "mAP" and "average_mAP"'):
        compare_runs.compare([file])
