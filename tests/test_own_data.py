"""docs/own_data.md: its commands run, on generated videos and on real ones where those are."""

import csv
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import config
from tools import prepare_data

CLONE = Path(config.HERE)
with open(CLONE / "docs/own_data.md", encoding="utf-8") as file:
    TEXT = file.read()
COMMANDS = "".join(re.findall(r"```bash\n(.*?)```", TEXT, re.S)).splitlines()
ELSEWHERE = re.findall(r"^python (lofi_tal\.py --cfg .*)$", TEXT, re.M)
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the ffmpeg command")


def real_videos():
    folder = os.environ.get("LOFI_TAL_DATA", str(CLONE.parent / "shared/data/fight"))
    return folder if os.path.exists(f"{folder}/annotations.json") else None


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with the config, but less training."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "data/own/videos").mkdir(parents=True)
    cfg = yaml.safe_load((CLONE / "configs/own_data.yaml").read_text())
    cfg["lofi"] |= {"epochs": 3, "batch_size": 4}
    cfg["head"] |= {"epochs": 2, "batch_size": 4}
    (tmp_path / "configs/own_data.yaml").write_text(yaml.safe_dump(cfg))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_data, "available_cores", lambda: 0)  # all in this process
    return tmp_path


def run_all(capsys):
    """Run the commands in this process; return what they print."""
    printed = ""
    for command in COMMANDS:
        _, *words = shlex.split(command)
        name, *arguments = words[1:] if words[0] == "-m" else words
        program = importlib.import_module(name.removesuffix(".py"))
        assert not program.main(arguments), command
        printed += capsys.readouterr().out
    return printed


def write_table(rows):
    config.load_annotations.cache_clear()  # of the test before, by the same relative path
    with open("data/own/annotations.csv", "w", newline="") as file:
        csv.writer(file).writerows([["video", "start", "end", "label"], *rows])


@needs_ffmpeg
def test_the_commands_run_on_generated_videos(folder, capsys):
    pytest.importorskip("matplotlib")
    for i in range(5):
        source = f"testsrc=size=64x48:rate=8:duration=4,hue=h={60 * i}"
        path = f"data/own/videos/v{i}.mp4" if i < 4 else "data/own/videos/new.mp4"
        command = ["ffmpeg", "-nostdin", "-v", "error", "-f", "lavfi", "-i", source]
        subprocess.run([*command, "-pix_fmt", "yuv420p", path], check=True)
    rows = [[f"v{i}.mp4", "0:01", 2.5 + i / 4, "jump" if i % 2 else "fall"] for i in range(3)]
    write_table([*rows, ["v3.mp4", "", "", ""]])
    printed = run_all(capsys)
    assert "0 problems" not in printed or "recommended: classes=video" in printed
    assert "recommended: video.snippets=32" in printed and "1 of 1 videos" in printed
    for path in ("runs/own/annotations.json", "runs/own/localized/new.png"):
        assert os.path.exists(path)
    assert os.listdir("runs/own/pictures")


@needs_ffmpeg
@pytest.mark.skipif(real_videos() is None, reason="no real videos here: see LOFI_TAL_DATA")
def test_the_commands_run_on_real_videos(folder, capsys):
    pytest.importorskip("matplotlib")
    with open(f"{real_videos()}/annotations.json") as file:
        database = json.load(file)["database"]
    shortest = sorted(database, key=lambda name: database[name]["duration"])[:5]
    rows = []
    for name in shortest[:4]:
        os.symlink(f"{real_videos()}/videos/{name}.mp4", f"data/own/videos/{name}.mp4")
        actions = database[name]["annotations"]
        rows += [[name, *action["segment"], action["label"]] for action in actions]
    os.symlink(f"{real_videos()}/videos/{shortest[4]}.mp4", "data/own/videos/new.mp4")
    write_table(rows)
    assert "1 of 1 videos" in run_all(capsys)


def test_the_other_ways_are_configs_that_can_be_run():
    assert len(ELSEWHERE) == 3
    for command in ELSEWHERE:
        cfg = config.from_command_line("", shlex.split(command)[1:])
        assert config.check(cfg, files=False) == cfg.stages
