"""tools/dry_run.py: every config builds and trains a step without any data."""

import glob
import re
import shlex

import pytest
import torch

import config
from localizer import build_encoder
from pretrain import ClipClassifier
from tools import dry_run

SMALL = [
    "video.size=32",
    "video.snippets=12",
    "encoder.width=8",
    "fidelities={S: [12, 16], T: [3, 32], ST: [6, 23]}",
]


def lines_of(capsys, path, *overrides):
    dry_run.main(["--cfg", path, "--set", "device=cpu", *overrides])
    return capsys.readouterr().out.splitlines()


@pytest.mark.beside
@pytest.mark.parametrize("path", sorted(glob.glob("configs/*.yaml")))
def test_every_config(path, capsys):
    cfg = config.load_config(path)
    small = SMALL if path != "configs/toy.yaml" else []
    if cfg.encoder.name != "tsm":
        small = [*SMALL, "encoder.width=4"]
    lines = lines_of(capsys, path, *small)
    trains = "pretrain" in cfg.stages and cfg.pretrain.pretrained is None
    tasks = ["acp"] if trains and cfg.pretrain.method == "acp" else []
    fidelities = cfg.lofi.fidelities if {"lofi", "features"} & set(cfg.stages) else []
    starts = [*tasks, *fidelities] or ["stages"]
    assert [line.split(",")[0].split()[0] for line in lines] == starts
    assert all(
        "M parameters" in x and "GB" in x and " s, " in x for x in lines if starts != ["stages"]
    )


with open("docs/paper.md", encoding="utf-8") as file:
    ROWS = re.findall(r"^python lofi_tal.py --cfg (\S+)(?: --set (.*))?$", file.read(), re.M)


@pytest.mark.beside
@pytest.mark.parametrize(("path", "words"), ROWS)
def test_every_row_of_the_papers_tables(path, words, capsys):
    cfg = config.load_config(path, shlex.split(words))
    tiny = "fidelities={S: [4, 16], T: [2, 32], ST: [3, 23]}"
    tiny = [*SMALL, "encoder.width=2", "video.snippets=4", tiny]
    lines = lines_of(capsys, path, *shlex.split(words), *tiny)
    assert lines and all("loss" in line for line in lines) == (cfg.stages[0] != "head")


def test_rows_of_the_papers_tables_differ_and_are_all_there():
    runs = [config.load_config(path, shlex.split(words)) for path, words in ROWS]
    assert len({cfg.out for cfg in runs}) == len(runs) == 19
    assert [cfg.out for cfg in runs if cfg.lofi.cycle == "batch"] == ["runs/anet13/short"]
    assert {cfg.encoder.depth for cfg in runs} == {18, 34, 50}
    assert sum(cfg.encoder.name == "r2plus1d_18" for cfg in runs) == 2


def test_shapes_of_the_papers_config_without_a_file_written(tmp_path, capsys):
    lines = lines_of(capsys, "configs/anet13.yaml", *SMALL, f"out={tmp_path}/run")
    assert lines[0].startswith("S, features (1, 64, 12):")
    assert "frames (1, 12, 8, 3, 16, 16)" in lines[0]
    assert "frames (1, 3, 8, 3, 32, 32)" in lines[1]
    assert "frames (1, 6, 8, 3, 23, 23)" in lines[2]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "tasks"),
    [
        ("none", {}),
        ("icp", {"icp, 1000 classes": 1}),
        ("speed", {"speed, 2 classes": 8}),
        ("acp_plus_background", {"acp, 400 classes": 8, "acp_plus_background, 201 classes": 8}),
    ],
)
def test_pretrain_tasks_have_the_classes_of_typical_data(method, tasks, capsys):
    words = [*SMALL, "pretrain.pretrained=null", f"pretrain.method={method}", "stages=[pretrain]"]
    lines = lines_of(capsys, "configs/anet13.yaml", *words)
    for line, (title, frames) in zip(lines, tasks.items(), strict=True):
        assert line.startswith(f"{title}: ") and f"frames (2, 1, {frames}, 3, 32, 32)" in line
        cfg = config.load_config("configs/anet13.yaml", words)
        model = ClipClassifier(build_encoder(**cfg.encoder), int(title.split()[1]))
        assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M" in line


def test_compile_recompute_chunks_and_class_loss_are_one_key_each(monkeypatch, capsys):
    compiled = []
    forward = torch.nn.Module.compile

    def compile_eagerly(self):
        compiled.append(type(self).__name__)
        forward(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    words = ["lofi.compile=true", "encoder.recompute=true", "lofi.chunk_snippets=2"]
    words += ["lofi.fidelities=[S]", "lofi.class_weight=1", "stages=[pretrain, lofi]"]
    lines = lines_of(capsys, "configs/anet13.yaml", *SMALL, *words)
    assert compiled == ["TSM"] and len(lines) == 1


def test_an_error_is_one_line():
    with pytest.raises(SystemExit, match=r"^tools\.dry_run: unknown config key lofi\.lrr"):
        dry_run.main(["--cfg", "configs/toy.yaml", "--set", "lofi.lrr=1"])
