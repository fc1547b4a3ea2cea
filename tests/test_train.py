"""train.sh: which rows run beside which, and how it ends. A shell script stands for Python."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "train.sh"
# Notes what it is asked to do; a row whose name is in $FAILS fails, in $SLEEPS waits for a signal.
FAKE = """#!/usr/bin/env bash
row=make_toy
for word in "$@"; do
    case $word in tools.compare_runs) row=compare ;; out=*) row=${word##*/} ;; esac
done
echo "begin $row ${OMP_NUM_THREADS-all}" >> "$NOTES"
case " ${SLEEPS-} " in *" $row "*)
    trap 'sleep 0.3; echo "saved $row" >> "$NOTES"; echo "$row stopped"; exit 130' INT
    for _ in {1..200}; do sleep 0.05; done
esac
case " ${FAILS-} " in *" $row "*) exit 3 ;; esac
echo "working on $row"
echo "end $row" >> "$NOTES"
"""


@pytest.fixture
def start(tmp_path):
    """A function that starts train.sh beside a fake Python, which it returns with its notes."""
    script = tmp_path / "train.sh"
    script.write_bytes(SCRIPT.read_bytes())
    fake = tmp_path / "python"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    notes = tmp_path / "notes"
    notes.touch()
    kept = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}

    def run(**environment):
        env = {**kept, "PYTHON": str(fake), "NOTES": str(notes), **environment}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(["bash", script], env=env, start_new_session=True, **pipes), notes

    return run


def test_rows_that_need_each_other_come_one_after_the_other(start):
    process, notes = start()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    lines = notes.read_text().splitlines()
    rows = [line.split()[1] for line in lines if line.startswith("begin")]
    assert rows[:2] == ["make_toy", "acp"] and rows[-1] == "compare"
    assert sorted(rows[2:-1]) == ["acp_plus", "icp", "lofi"]
    # Nothing begins before what it needs has ended.
    for before, after in ("make_toy", "acp"), ("acp", "icp"), ("acp", "lofi"), ("lofi", "compare"):
        begin = next(line for line in lines if line.startswith(f"begin {after} "))
        assert lines.index(f"end {before}") < lines.index(begin)
    assert lines.index("end acp_plus") < len(lines) - 2
    # Alone with all cores, beside each other with half of them; lines tell whose they are.
    half = str((len(os.sched_getaffinity(0)) + 1) // 2)
    assert "begin acp all" in lines and f"begin lofi {half}" in lines
    assert "acp_plus | working on acp_plus" in output and "\nworking on acp\n" in output


@pytest.mark.parametrize("row", ["make_toy", "acp", "icp", "acp_plus", "lofi"])
def test_a_row_that_fails_ends_it_before_the_table(start, row):
    process, notes = start(FAILS=row)
    process.communicate(timeout=30)
    assert process.returncode == 3
    assert "compare" not in notes.read_text()


def test_ctrl_c_stops_both_rows_and_waits_for_them(start):
    process, notes = start(SLEEPS="icp lofi")
    deadline = time.monotonic() + 20
    while notes.read_text().count("begin") < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)  # until they can be interrupted
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=20) == 130
    text = notes.read_text()  # at once: nothing runs on
    assert text.count("saved icp") == text.count("saved lofi") == 1
    assert "acp_plus" not in text and "compare" not in text
    output = process.communicate()[0]
    assert "icp | icp stopped" in output and "lofi | lofi stopped" in output
