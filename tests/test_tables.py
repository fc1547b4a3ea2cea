import json

import pytest

import config
import engine
import tables


def test_every_row_is_a_config_and_comes_after_what_it_needs():
    order = tables.in_order(list(tables.ROWS)[::-1])
    assert sorted(order) == sorted(tables.ROWS)
    for name, (needs, _) in tables.ROWS.items():
        cfg = config.load("configs/toy.yaml", tables.words_of(name, 3, "data/x", "runs/y"))
        assert cfg.out == f"runs/y/{name}" and cfg.seed == 3 and cfg.data.annotations.startswith("data/x")
        assert all(order.index(n) < order.index(name) for n in needs)
        taken = json.dumps(cfg)
        assert {n for n in tables.ROWS if f"runs/y/{n}/" in taken} == set(needs)
    for _, rows in tables.TABLES.values():
        assert set(rows) <= set(tables.ROWS) and "acp" in rows
    assert tables.in_order(["acp_speed"]) == ["acp", "speed", "acp_speed"]


def finished(runs, name, seed, average, words=()):
    folder = f"{runs}/{name}"
    engine.save_json(config.load("configs/toy.yaml", tables.words_of(name, seed, "data/toy", runs) + list(words)), f"{folder}/config.json")
    engine.save_json({"mAP": {"0.5": 2 * average, "0.75": average, "0.95": 0.01}, "average_mAP": average, "seconds": 10.0 + seed, "seed": seed, "evaluated_videos": 8,
                      "ground_truth_videos": 8, "subset": "validation", "class_source": "video classifier of the run"}, f"{folder}/metrics.json")
    if name == "arrow":
        engine.save_json({"phases": {"arrow": {"top1": 0.625}}}, f"{folder}/pretrain/accuracy.json")


def test_a_table_has_means_spreads_gains_and_the_papers_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tables.subprocess, "run", lambda *a, **k: pytest.fail("nothing is left to run"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/annotations.json").write_text("{}")
    for seed in (0, 1):
        for i, name in enumerate(tables.TABLES["7"][1]):
            finished(f"{tmp_path}/{seed}", name, seed, 0.10 + 0.02 * i + 0.01 * seed * (i + 1), [f"data.annotations={tmp_path}/data/annotations.json"])
    argv = ["--tables", "7", "--seeds", "0", "1", "--data", f"{tmp_path}/data", "--runs", f"{tmp_path}/{{seed}}", "--cfg", "configs/toy.yaml", "--markdown", f"{tmp_path}/t.md"]
    changed = ["--set", f"data.annotations={tmp_path}/data/annotations.json", "data.frames=data/toy/frames", "pretrain.icp.source=data/toy/stills", "pretrain.acp.source=data/toy/clips"]
    tables.main(argv + changed)
    text = (tmp_path / "t.md").read_text()
    assert text.startswith(tables.MARK) and text.partition("\n")[2] in capsys.readouterr().out
    (tmp_path / "mine.md").write_text("my notes")
    with pytest.raises(SystemExit, match="not a table of this program"):
        tables.main([*argv, "--markdown", f"{tmp_path}/mine.md", *changed])
    assert (tmp_path / "mine.md").read_text() == "my notes"
    rows = {cells[1].strip(): [c.strip() for c in cells[2:-1]] for cells in (line.split("|") for line in text.splitlines() if line.startswith("| "))}
    # ACP 10 and 11 %, Arrow 12 and 14 %: 13 on average with a sample deviation of sqrt 2, 2 and 3 points ahead
    assert rows["ACP"] == ["21.00 ± 1.41", "10.50 ± 0.71", "1.00 ± 0.00", "10.50 ± 0.71", "", "10", "", "2", "49.64 / 34.16 / 7.68 / 33.59", ""]
    assert rows["Arrow"] == ["26.00 ± 2.83", "13.00 ± 1.41", "1.00 ± 0.00", "13.00 ± 1.41", "+2.50 ± 0.71", "10", "62.5", "2", "44.14 / 28.87 / 5.90 / 28.82", "-4.77"]
    assert list(rows)[1:] == ["ACP", "Arrow", "Speed", "ACP+Arrow", "ACP+Speed", "LoFi"]
    with pytest.raises(SystemExit, match="holds another row acp than this one(.|\n)*lofi.epochs: 24 there, 3 now"):
        tables.main(argv + changed + ["lofi.epochs=3"])
