"""All benchmarks run as their page says, without any data; what they find is on that page."""

import json
import re
from pathlib import Path

from processes import Process

from benchmarks import __main__ as benchmarks

ROOT = Path(benchmarks.HERE).parent


def test_one_command_makes_the_page(tmp_path):
    process = Process("-m", "benchmarks", "--quick", "--out", tmp_path, cwd=ROOT)
    assert process.wait(timeout=400) == 0, process.read(2)
    (found,) = json.loads((tmp_path / "figures.json").read_text()).values()
    assert list(found["rows"]) == list(benchmarks.PROGRAMS)
    text = (tmp_path / "README.md").read_text()
    for program, rows in found["rows"].items():
        assert rows and all(len(row) == 4 for row in rows), program
        assert text.count(f"| `{program}` |") == len(rows)
    assert found["date"] in text and found["versions"] in text
    assert "failed" not in text


def test_the_page_is_that_of_the_figures():
    figures = json.loads(Path(f"{benchmarks.HERE}/figures.json").read_text())
    assert Path(f"{benchmarks.HERE}/README.md").read_text() == benchmarks.page(figures)
    named = re.findall(r"^python -m benchmarks\.(\w+)", benchmarks.INTRODUCTION, re.M)
    assert {*named} == {*benchmarks.PROGRAMS}
