"""Stage sola on a handful of small feature files, in real processes: no frames, no encoder anywhere."""
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import config
import data
import engine
import lofi_tal
from sola import SoLa, sample_subsequences
from train_sola import Subsequences

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
CHANNELS, LENGTHS = 5, {"a": 23, "b": 30, "c": 47, "d": 22, "e": 25, "f": 31, "g": 9, "h": 60}  # d is too short; f, g and h are for validation
TINY = ["data.snippets=16", "data.workers=0", "sola.epochs=3", "sola.batch_size=4", "sola.draws=2", "sola.hidden=8", "sola.lr=1.0e-2", "sola.standardize=true",
        "gtad={hidden: 16, gcn_width: 16, gcn_groups: 4, stem_groups: 1, inner_bins: 4, context_bins: 2, map_hidden: [16, 8]}", "head.epochs=1", "head.batch_size=4"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Smooth random features, in an action shifted; annotations with and without labels."""
    folder, rng = tmp_path_factory.mktemp("features"), np.random.default_rng(0)
    database = {}
    for k, (name, length) in enumerate(LENGTHS.items()):
        segment = [20 + 5 * (k % 3), 60.0]
        x = 3 + np.cumsum(rng.normal(size=(length, CHANNELS)), 0) / 4
        x[int(segment[0] / 80 * length):int(segment[1] / 80 * length), 0] += 2
        os.makedirs(folder / "raw", exist_ok=True)
        np.save(folder / f"raw/{name}.npy", x.astype(np.float32))
        database[name] = {"subset": "validation" if name > "e" else "training", "duration": 80.0,
                          "annotations": [{"segment": segment, "label": "xy"[k % 2]}]}
    (folder / "annotations.json").write_text(json.dumps({"database": database}))
    for entry in database.values():
        entry["annotations"] = []
    (folder / "unlabelled.json").write_text(json.dumps({"database": database}))
    (folder / "raw/features.json").write_text('{"seconds": 1000.0, "encoder": "somebody else\'s"}')
    return folder


def arguments(files, out, *words):
    return ["--cfg", "configs/sola_hacs_i3d.yaml", "--set", f"out={out}", f"data.annotations={files}/annotations.json", f"data.features={files}/raw", *TINY, *words]


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("runs") / "whole")
    lofi_tal.main(arguments(files, out))
    return out


def weights(out):
    return torch.load(f"{out}/sola/checkpoint.pt", weights_only=True)["model"]  # with the predictor


def fails(argv):
    with pytest.raises(SystemExit) as stopped:
        lofi_tal.main(argv)
    return str(stopped.value.code)


def test_a_run_leaves_module_features_maps_and_probe(whole, files):
    module = SoLa.load(f"{whole}/sola/sola.pt")
    assert module.sizes == {"channels": CHANNELS, "hidden": 8, "kernel": 5} and module.gate != 0
    for name, length in LENGTHS.items():  # short ones too: only training leaves them out
        raw, made = (torch.from_numpy(np.load(f"{folder}/{name}.npy")) for folder in (f"{files}/raw", f"{whole}/sola/features"))
        assert made.shape == (length, CHANNELS) and made.dtype == torch.float32
        torch.testing.assert_close(made, module(raw.t()[None])[0].t())
    stacked = np.concatenate([np.load(f"{files}/raw/{name}.npy") for name in "abcde"])
    np.testing.assert_allclose(module.mean, stacked.mean(0), rtol=1e-5)
    np.testing.assert_allclose(module.std, stacked.std(0), rtol=1e-5)
    saved = torch.load(f"{whole}/sola/sola.pt", weights_only=True)
    assert (saved["videos"], saved["left_out"]) == (4, 1)
    about = json.load(open(f"{whole}/sola/features/features.json"))
    assert about["seconds"] == 1000 + about["sola_seconds"] > 1000 and about["encoder"] == "somebody else's"
    assert len(about["videos"]) == 8 and all(v["duration_sec"] > 0 for v in about["videos"].values())
    assert json.load(open(f"{whole}/metrics.json"))["seconds"] > about["seconds"]  # a result's cost is that of all it was made from

    lines = [json.loads(line) for line in open(f"{whole}/sola/metrics.jsonl")]
    assert [r["epoch"] for r in lines] == [1, 2, 3]
    for r in lines:
        assert r["loss"] > r["floor"] > 0 and 0 < r["spread"] < 1 and -1 < r["gate"] < 1
    assert lines[-1]["gate"] != lines[0]["gate"] and lines[-1]["floor"] == lines[0]["floor"]

    maps = np.load(f"{whole}/sola/similarity.npz")
    assert list(maps["names"]) == ["f", "g", "h"] and maps["raw"].shape == maps["sola"].shape == (3, 16, 16)
    for key in ("raw", "sola"):
        np.testing.assert_allclose(maps[key].diagonal(0, 1, 2), 1, atol=1e-5)
        assert np.abs(maps[key] - maps[key].transpose(0, 2, 1)).max() < 1e-5
    assert np.abs(maps["raw"] - maps["sola"]).max() > 1e-3


def test_probe_is_of_held_out_videos_before_and_after(whole):
    probe = json.load(open(f"{whole}/sola/probe.json"))
    assert probe["held_out"] == {"videos": 3, "snippets": 31 + 9 + 60} and probe["fitted_on"] == {"videos": 5, "snippets": 23 + 30 + 47 + 22 + 25}
    assert "not by the training" in probe["labels"]
    for key in ("before", "moving_average", "after"):
        assert 0 <= probe[key]["accuracy"] <= 1 and 0 <= probe[key]["auc"] <= 1 and 0 < probe[key]["spread"] < 1
    assert probe["before"]["auc"] > 0.7  # channel 0 tells


def test_no_label_reaches_the_training(whole, files, tmp_path):
    lofi_tal.main(arguments(files, tmp_path / "x", "stages=[sola]", f"data.annotations={files}/unlabelled.json"))
    one, two = weights(whole), weights(tmp_path / "x")
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not (tmp_path / "x/sola/probe.json").exists()  # nothing to evaluate with


def test_validation_features_do_not_reach_the_training(whole, files, tmp_path):
    other = tmp_path / "raw"
    other.mkdir()
    for name in LENGTHS:
        np.save(other / f"{name}.npy", np.load(f"{files}/raw/{name}.npy") * (2 if name > "e" else 1))
    lofi_tal.main(arguments(files, tmp_path / "x", "stages=[sola]", f"data.features={other}"))
    one, two = weights(whole), weights(tmp_path / "x")
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_head_and_detect_read_what_sola_wrote(whole, files, tmp_path):
    lofi_tal.main(arguments(files, tmp_path / "x", "stages=[head,detect]", f"data.features={whole}/sola/features"))
    assert open(f"{whole}/result.json").read() == open(tmp_path / "x/result.json").read()
    lofi_tal.main(arguments(files, tmp_path / "raw", "stages=[head,detect]"))
    assert open(f"{whole}/result.json").read() != open(tmp_path / "raw/result.json").read()


def test_a_finished_stage_is_skipped_and_an_interrupted_one_resumed(whole, files, tmp_path, capsys):
    argv = arguments(files, tmp_path / "run", "stages=[sola]", "sola.epochs=40", "checkpoint_sec=0")
    lofi_tal.main(arguments(files, tmp_path / "undisturbed", "stages=[sola]", "sola.epochs=40", "checkpoint_sec=0"))
    process = subprocess.Popen([sys.executable, "lofi_tal.py", *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV)
    for line in process.stdout:
        if line.startswith("sola 2/40"):
            process.send_signal(signal.SIGTERM)
            break
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and not os.path.exists(tmp_path / "run/sola/sola.pt")
    capsys.readouterr()
    lofi_tal.main(argv)
    assert "sola: resuming at epoch" in capsys.readouterr().out
    one, two = weights(tmp_path / "undisturbed"), weights(tmp_path / "run")
    assert all(torch.equal(one[k], two[k]) for k in one)
    lofi_tal.main(argv)
    assert "sola: done already" in capsys.readouterr().out


def test_a_batch_of_more_than_all_subsequences_is_one_of_all(files, tmp_path, capsys):
    """Not the same ones again and again, until 256 are full."""
    lofi_tal.main(arguments(files, tmp_path / "256", "stages=[sola]", "sola.batch_size=256"))
    assert "sola: an epoch has 8 subsequences, fewer than sola.batch_size 256: 8 a step\n" in capsys.readouterr().out
    lofi_tal.main(arguments(files, tmp_path / "8", "stages=[sola]", "sola.batch_size=8"))
    assert "8 a step" not in capsys.readouterr().out
    one, two = weights(tmp_path / "256"), weights(tmp_path / "8")
    assert all(torch.equal(one[k], two[k]) for k in one)
    for run in ("256", "8"):
        for line in open(tmp_path / run / "sola/metrics.jsonl"):
            r = json.loads(line)
            assert r["videos_per_sec"] * r["seconds"] == pytest.approx(8)  # what was computed


def test_two_processes_give_the_module_of_one(whole, files, tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "lofi_tal.py",
                           *arguments(files, tmp_path / "two", "stages=[sola]")], capture_output=True, text=True, env=ENV, timeout=200)
    assert done.returncode == 0, done.stderr
    one, two = weights(whole), weights(tmp_path / "two")
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-5)
    assert sorted(os.listdir(tmp_path / "two/sola/features")) == sorted(os.listdir(f"{whole}/sola/features"))


def test_subsequences_hang_on_seed_epoch_and_index_alone(files):
    videos = data.load_annotations(f"{files}/annotations.json")["training"]
    features = data.FeatureDataset(videos, f"{files}/raw", [])
    one, two, other = (Subsequences(features, 23, draws=3, seed=s, hold_gb=gb) for s, gb in ((1, 1), (1, 0), (2, 1)))  # from memory, from disk
    assert one.held and not two.held
    assert len(one) == 4 * 3 and one.left_out == ["d"]
    for index in range(len(one)):
        x = one[index, data.NATIVE]["features"]
        assert x.shape == (CHANNELS, 23) and torch.equal(x, two[index, data.NATIVE]["features"])
        whole = features["abce".index(one[index, data.NATIVE]["name"]) + (index % 4 == 3), data.NATIVE]["features"]
        assert any(torch.equal(x, whole[:, s:s + 23]) for s in range(whole.shape[1] - 22))
    pick = lambda d: torch.stack([d[i, data.NATIVE]["features"] for i in range(len(d))])  # noqa: E731
    first = pick(one)
    one.set_epoch(1)
    assert not torch.equal(first, pick(one)) and not torch.equal(first, pick(other))
    expected = sample_subsequences([47], generator=torch.Generator().manual_seed(data.seed_of(1, "subsequence", 0, 2))).item()
    c = features[2, data.NATIVE]["features"]
    assert torch.equal(first[2], c[:, expected:expected + 23])


def test_bad_input_is_one_clear_error(files, tmp_path, capsys):
    argv = arguments(files, tmp_path / "x", "stages=[sola]")
    assert "all 5 videos are shorter than a subsequence of 99 snippets, the longest has 47" in fails(argv + ["--set", "sola.subsequence=99"])
    assert "sola.positions is [4, 23], expected at least two whole numbers in 0 ... 22" in fails(argv + ["--set", "sola.positions=[4, 23]"])
    assert "sola.positions is [4]" in fails(argv + ["--set", "sola.positions=[4]"])
    assert "sola.draws is 0, expected a whole number" in fails(argv + ["--set", "sola.draws=0"])
    assert "sola.optimizer has 'lion'" in fails(argv + ["--set", "sola.optimizer=lion"])
    assert "sola.kernel is 4, expected an odd number" in fails(argv + ["--set", "sola.kernel=4"])
    assert "did you mean sola.lr" in fails(argv + ["--set", "sola.lrr=1"])
    capsys.readouterr()
    lofi_tal.main(argv + ["--set", "sola.epochs=1"])
    assert "sola: 1 of 5 videos have fewer than 23 snippets and are left out of training: d\n" in capsys.readouterr().out


def test_configs_are_the_published_setting_where_they_say_so():
    hacs = config.load("configs/sola_hacs_i3d.yaml")
    published = dict(subsequence=23, positions=[4, 6, 8, 10, 12, 14, 16, 18], coefficient=16, hidden=512, kernel=5, standardize=False, draws=1,
                     epochs=150, batch_size=256, optimizer="adamw", lr=1e-4)
    assert published.items() <= hacs.sola.items() and hacs.stages == ["sola", "head", "detect"]
    assert {engine.lr_factor(e, 150, **{k: hacs.sola[k] for k in ("schedule", "every", "factor", "warmup")}) for e in (0, 75, 149.9)} == {1}
    lofi_tal.check(config.load("configs/sola_anet13.yaml"), files=False)
    toy, plain = config.load("configs/sola_toy.yaml"), config.load("configs/toy.yaml")
    for key in ("data", "encoder", "gtad", "bmn", "features", "head", "detect"):
        assert toy[key] == plain[key], key
    assert toy.pretrain.acp == plain.pretrain.acp
