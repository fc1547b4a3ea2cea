"""docs/own_data.md: its commands run, on generated videos and on real ones where those are; all
commands of a kind in a process of their own."""

import contextlib
import csv
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
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


def set_up(folder):
    """Make a folder to work in, with the config, but less training, and go there."""
    os.makedirs(f"{folder}/configs")
    os.makedirs(f"{folder}/data/own/videos")
    cfg = yaml.safe_load((CLONE / "configs/own_data.yaml").read_text())
    cfg["lofi"] |= {"epochs": 3, "batch_size": 4}
    cfg["head"] |= {"epochs": 2, "batch_size": 4}
    os.chdir(folder)
    Path("configs/own_data.yaml").write_text(yaml.safe_dump(cfg))
    prepare_data.available_cores = lambda: 0  # all in this process


def run_all():
    """Run the commands in this process; return what they print."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for command in COMMANDS:
            _, *words = shlex.split(command)
            name, *arguments = words[1:] if words[0] == "-m" else words
            program = importlib.import_module(name.removesuffix(".py"))
            assert not program.main(arguments), command
    return printed.getvalue()


def write_table(rows):
    with open("data/own/annotations.csv", "w", newline="") as file:
        csv.writer(file).writerows([["video", "start", "end", "label"], *rows])


def generated_videos():
    for i in range(5):
        source = f"testsrc=size=64x48:rate=8:duration=4,hue=h={60 * i}"
        path = f"data/own/videos/v{i}.mp4" if i < 4 else "data/own/videos/new.mp4"
        command = ["ffmpeg", "-nostdin", "-v", "error", "-f", "lavfi", "-i", source]
        subprocess.run([*command, "-pix_fmt", "yuv420p", path], check=True)
    rows = [[f"v{i}.mp4", "0:01", 2.5 + i / 4, "jump" if i % 2 else "fall"] for i in range(3)]
    write_table([*rows, ["v3.mp4", "", "", ""]])
    printed = run_all()
    assert "0 problems" not in printed or "recommended: classes=video" in printed
    assert "recommended: video.snippets=32" in printed and "1 of 1 videos" in printed
    for path in ("runs/own/annotations.json", "runs/own/localized/new.png"):
        assert os.path.exists(path)
    assert os.listdir("runs/own/pictures")


def real_ones():
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
    assert "1 of 1 videos" in run_all()


@needs_ffmpeg
@pytest.mark.beside(__file__, "generated_videos")
def test_the_commands_run_on_generated_videos(beside):
    pytest.importorskip("matplotlib")
    assert beside.returncode == 0, beside.read(2)[-3000:]


@needs_ffmpeg
@pytest.mark.skipif(real_videos() is None, reason="no real videos here: see LOFI_TAL_DATA")
@pytest.mark.beside(__file__, "real_ones")
def test_the_commands_run_on_real_videos(beside):
    pytest.importorskip("matplotlib")
    assert beside.returncode == 0, beside.read(2)[-3000:]


def test_the_other_ways_are_configs_that_can_be_run():
    assert len(ELSEWHERE) == 3
    for command in ELSEWHERE:
        cfg = config.from_command_line("", shlex.split(command)[1:])
        assert config.check(cfg, files=False) == cfg.stages


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        set_up(folder)
        globals()[sys.argv[1]]()
        os.chdir("/")
