"""The whole method on a handful of tiny videos, in real processes."""

import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from processes import ENV, TORCHRUN, WARM_TORCHRUN, Process, free_port, start_ranks

import checkpoint
import config
import data
import gtad
import localizer
import lofi_tal
from checkpoint import RunFolder, load_json
from sola import SoLa, similarity_step
from tools.make_toy import Toy, make_toy
from tools.plot import read_metrics

GTAD = (
    "hidden: 16, gcn_width: 16, gcn_groups: 4, inner_bins: 4, context_bins: 2, map_hidden: [16, 8]"
)
TINY = [
    "video.size=16",
    "video.snippets=8",
    "fidelities={S: [8, 8], T: [2, 16], ST: [4, 11]}",
    "data.workers=0",
    "encoder.width=8",
    f"gtad={{{GTAD}}}",
    "pretrain.icp.epochs=1",
    "pretrain.acp.epochs=1",
    "pretrain.acp.batch_size=8",
    "pretrain.acp_plus.epochs=1",
    "pretrain.acp_plus.batch_size=4",
    "lofi.epochs=3",
    "lofi.batch_size=4",
    "head.epochs=4",
    "head.batch_size=4",
]
TINY_SOLA = [
    "video.snippets=16",
    "data.workers=0",
    "sola.epochs=3",
    "sola.batch_size=4",
    "sola.subsequences_per_video=2",
    "sola.hidden=8",
    "sola.lr=1e-2",
    "sola.standardize=true",
    f"gtad={{stem_groups: 1, {GTAD}}}",
    "head.epochs=1",
    "head.batch_size=4",
]
# oneDNN's bfloat16 gradient of a 3x3 convolution of stride 2 on a single pixel is garbage (torch
# 2.15): pixels from which that does not come about.
BFLOAT16 = [
    "precision=bfloat16",
    "video.size=32",
    "fidelities={S: [8, 16], T: [2, 32], ST: [4, 23]}",
]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("toy") / "data")
    make_toy(out, Toy(train=8, val=8, clips=16, stills=24, size=20, snippets=16), workers=0)
    return out


def arguments(toy, out, *overrides):
    sources = [f"data.annotations={toy}/annotations.json", f"data.frames={toy}/frames"]
    sources += [f"pretrain.icp.source={toy}/stills", f"pretrain.acp.source={toy}/clips"]
    return ["--cfg", "configs/toy.yaml", "--set", *TINY, f"out={out}", *sources, *overrides]


def result_of(out):
    metrics = load_json(f"{out}/metrics.json")
    metrics.pop("seconds")
    return metrics, load_json(f"{out}/result.json")["results"]


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def epochs_of(folder):
    with open(f"{folder}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def error_of(argv):
    with pytest.raises(SystemExit) as stopped:
        lofi_tal.main(argv)
    message = str(stopped.value.code)
    assert message.startswith("lofi_tal.py: ")
    return message


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """An undisturbed run of all stages in one process."""
    out = str(tmp_path_factory.mktemp("runs") / "whole")
    lofi_tal.main(arguments(toy, out))
    return out


@pytest.fixture(scope="module")
def from_acp(whole):
    """The encoder before localization of that run, for others to start from."""
    return f"pretrain.pretrained={whole}/pretrain/encoder.pt"


# ---------------------------------------------------------------------------------------- all of it


def test_a_run_leaves_everything_that_a_number_needs(whole):
    metrics, results = result_of(whole)
    assert metrics["evaluated_videos"] == metrics["ground_truth_videos"] == 8
    assert 0 <= metrics["average_mAP"] <= 1 and len(metrics["videos"]) == 16
    assert 0 <= metrics["AR"]["AR@1"] <= metrics["AR"]["AR@100"] <= 1
    for found in results.values():
        assert len(found) > 3
        assert all(0 <= d["segment"][0] < d["segment"][1] <= 8 for d in found)
    files = {"config.json", "versions.json", "result.json", "proposals.json", "metrics.json"}
    stages = {"pretrain", "lofi", "features", "head", "detect"}
    assert set(os.listdir(whole)) == {*files, "lock", *stages}
    epochs = epochs_of(f"{whole}/lofi")
    assert [r["fidelity"] for r in epochs] == ["S", "T", "ST"]
    assert {"loss", "node", "regression", "classification", "lr"} <= set(epochs[0])
    info = load_json(f"{whole}/features/features.json")
    assert info["encoder"].endswith("lofi/encoder.pt") and info["stride"] == 1
    before, after = (weights(f"{whole}/{stage}/encoder.pt") for stage in ("pretrain", "lofi"))
    assert not torch.equal(before["layer1.0.conv1.weight"], after["layer1.0.conv1.weight"])
    assert torch.equal(before["bn1.running_mean"], after["bn1.running_mean"])  # frozen


def test_what_a_killed_run_was_writing_is_removed(whole, sola_run, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name, run in {"whole": whole, "sola": sola_run}.items():
        shutil.copytree(run, tmp_path / name)
        for path in [path for path in (tmp_path / name).rglob("*") if path.is_file()]:
            path.rename(f"{path}.part-{dead.pid}")
        checkpoint.remove_stale_parts(tmp_path / name)
        left = {path.name for path in (tmp_path / name).rglob("*") if path.is_file()}
        renamed = {"lock", "checkpoint.pt.previous"}  # never written under these names
        assert left == {f"{name}.part-{dead.pid}" for name in renamed}


def test_training_goes_on_when_nobody_reads_its_log(whole, toy, tmp_path):
    """As `| head -1`, or a terminal that was closed."""
    command = [sys.executable, "lofi_tal.py", *arguments(toy, tmp_path / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, env=ENV, **pipes)
    assert process.stdout.readline().startswith("pretrain: starting from random weights")
    process.stdout.close()
    assert (process.wait(100), process.stderr.read()) == (0, "")
    assert result_of(tmp_path / "run") == result_of(whole)


def test_a_finished_run_is_not_run_again(whole, toy, capsys):
    files = [f"{whole}/{name}" for name in ("lofi/encoder.pt", "head/head.pt", "metrics.json")]
    before = [os.stat(file).st_mtime_ns for file in files]
    lofi_tal.main(arguments(toy, whole))
    assert capsys.readouterr().out.count(" is done: ") == 5
    assert before == [os.stat(file).st_mtime_ns for file in files]


def test_a_start_tells_what_is_out_of_date(toy, tmp_path, from_acp, capsys):
    out = str(tmp_path / "run")
    annotations = str(shutil.copy(f"{toy}/annotations.json", tmp_path))
    overrides = [from_acp, "stages=[lofi, features, head, detect]", "lofi.epochs=1"]
    run = arguments(toy, out, *overrides, "head.epochs=1", f"data.annotations={annotations}")
    lofi_tal.main(run)
    before = result_of(out)

    def write(database):
        with open(annotations, "w") as file:
            json.dump({"database": database}, file)
        config.load_annotations.cache_clear()

    def names(subset):
        return [name for name, video in database.items() if video["subset"] == subset]

    database = load_json(annotations)["database"]
    train, val = (names(subset)[0] for subset in ("training", "validation"))
    for name, stage in (train, "lofi"), (val, "detect"):
        segment = database[name]["annotations"][0]["segment"]
        segment[0] += 0.25
        write(database)
        assert f"stage {stage} is out of date: its annotations changed" in error_of(run)
        segment[0] -= 0.25
        write(database)

    for name, stage in (train, "head"), (val, "detect"):
        path = f"{out}/features/{name}.npy"
        x = np.load(path)
        np.save(path, x + 1)
        assert f"stage {stage} is out of date: its features changed" in error_of(run)
        np.save(path, x)
        lofi_tal.main(run)  # their times do not count

    encoder = f"{out}/lofi/encoder.pt"
    os.rename(encoder, f"{tmp_path}/encoder.pt")
    assert "stage features is done, but" in error_of(run)
    shutil.copy(from_acp.partition("=")[2], encoder)
    assert "stage features is out of date: its encoder changed" in error_of(run)
    os.replace(f"{tmp_path}/encoder.pt", encoder)

    # What a message says to remove is enough to go on.
    best = before[1][val][0]
    database[val]["annotations"][0] = {key: best[key] for key in ("segment", "label")}
    write(database)
    assert f"remove {out}/metrics.json" in error_of(run)
    os.remove(f"{out}/metrics.json")
    lofi_tal.main(run)
    after = result_of(out)
    assert after[1] == before[1] and after[0]["average_mAP"] > before[0]["average_mAP"]


def test_features_of_a_broken_encoder_are_refused(whole, toy, tmp_path):
    broken = torch.load(f"{whole}/lofi/encoder.pt", weights_only=True)
    broken["model"]["bn1.weight"].fill_(float("nan"))
    torch.save(broken, tmp_path / "encoder.pt")
    start = [f"pretrain.pretrained={tmp_path}/encoder.pt", "stages=[features]"]
    message = error_of(arguments(toy, tmp_path / "run", *start))
    assert "NaN or infinite features for video toy_00000: remove the encoder" in message
    assert not glob.glob(f"{tmp_path}/run/features/*.npy")


def test_classes_can_come_from_elsewhere_and_every_output_says_so(whole, toy, tmp_path):
    names = [f"toy_{i:05d}" for i in range(8, 16)]
    scores = {"results": {n: [0.25, 0.75] for n in names}, "class": ["jump", "orbit_left"]}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    overrides = [f"data.features={whole}/features", "stages=[head, detect]", "head.epochs=1"]
    expected = {
        tmp_path / "scores.json": ("external file", {"jump", "orbit_left"}),
        "ground_truth": ("ground truth (analysis)", {"figure_eight"}),
    }
    for source, (words, labels) in expected.items():
        out = tmp_path / words
        lofi_tal.main(arguments(toy, out, *overrides, f"detect.class_scores={source}"))
        metrics, results = result_of(out)
        assert words in metrics["class_source"]
        assert {d["label"] for d in results["toy_00008"]} == labels


def test_acp_plus_and_icp_feed_the_same_stages(whole, toy, tmp_path, from_acp):
    runs = {
        "icp": ["pretrain.method=icp", "encoder.shift_div=0"],
        "none": ["pretrain.method=none"],
        "plus": ["pretrain.method=acp_plus", from_acp],
    }
    for name, overrides in runs.items():
        stages = "stages=[pretrain, features, head, detect]"
        lofi_tal.main(arguments(toy, tmp_path / name, stages, *overrides))
        assert result_of(tmp_path / name)[0]["evaluated_videos"] == 8
    icp = load_json(tmp_path / "icp/pretrain/accuracy.json")["tasks"]["icp"]
    assert (icp["held_out_clips"], icp["classes"]) == (2, 24) and 0 <= icp["top1"] <= 1
    plus = load_json(tmp_path / "plus/pretrain/accuracy.json")
    assert list(plus["tasks"]) == ["acp_plus"]
    seconds = [
        torch.load(f"{run}/pretrain/encoder.pt", weights_only=True)["seconds"]
        for run in (whole, tmp_path / "plus")
    ]
    assert seconds[1] > seconds[0] > 0  # the cost of what it was made from is in it
    other = f"pretrain.pretrained={tmp_path}/icp/pretrain/encoder.pt"
    with pytest.warns(UserWarning, match="shift_div 0"):  # no weight tells that
        lofi_tal.main(arguments(toy, tmp_path / "other", "stages=[pretrain]", other))


def test_bmn_is_one_key_away(toy, tmp_path, from_acp):
    bmn = ["tal_head=bmn", "bmn={hidden: 16, map_hidden: [16, 8], samples: 4}"]
    overrides = [*bmn, "lofi.epochs=1", "detect.tiou_thresholds=[0.75]", from_acp]
    lofi_tal.main(arguments(toy, tmp_path / "bmn", *overrides))
    assert result_of(tmp_path / "bmn")[0]["evaluated_videos"] == 8
    assert "head.x_3d_p.0.weight" in weights(tmp_path / "bmn/head/head.pt")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_of_each_stage(whole, toy, tmp_path, precision):
    """bfloat16 is what convolutions of each training stage and of stage features give, and nothing
    else; float32 is what auto is on a CPU, bit for bit."""
    stages = ["pretrain", "lofi", "features", "head", "detect"]
    overrides = ["precision=float32"]
    if precision == "bfloat16":
        stages = ["pretrain", "lofi", "features", "sola", "head"]
        sola = (
            "sola={subsequence: 4, positions: [0, 1, 2, 3], hidden: 16, epochs: 2, batch_size: 4}"
        )
        overrides = [*BFLOAT16, "lofi.chunk_snippets=3", sola]
    convolutions = (torch.nn.Conv2d, torch.nn.Conv1d)
    seen = {stage: set() for stage in stages}
    for i, stage in enumerate(stages):

        def note(module, _, out, dtypes=seen[stage]):
            if isinstance(module, convolutions):
                dtypes.add(out.dtype)

        hook = torch.nn.modules.module.register_module_forward_hook(note)
        try:
            listed = f"stages=[{','.join(stages[: i + 1])}]"
            lofi_tal.main(arguments(toy, tmp_path, *overrides, listed))
        finally:
            hook.remove()
    dtype = getattr(torch, precision)
    assert dtype in seen.pop("head")
    seen.pop("sola", None)
    assert seen == {stage: {dtype} for stage in seen}
    for file in ("pretrain/encoder.pt", "lofi/encoder.pt", "head/head.pt"):
        one, two = weights(f"{whole}/{file}"), weights(f"{tmp_path}/{file}")
        assert {k: v.dtype for k, v in one.items()} == {k: v.dtype for k, v in two.items()}
        assert torch.float32 in {v.dtype for v in two.values()}
        assert same(one, two) == (precision == "float32"), file
    for path in glob.glob(f"{tmp_path}/**/features/*.npy", recursive=True):
        assert np.load(path).dtype == np.float32
    if precision == "float32":
        assert result_of(whole) == result_of(tmp_path)


def test_videos_without_frames_are_left_out_and_evaluation_says_so(toy, tmp_path, capsys, from_acp):
    frames = tmp_path / "frames"
    shutil.copytree(f"{toy}/frames", frames)
    for name in ("toy_00000", "toy_00011"):  # one of 8 for training, one of 8 for validation
        (frames / f"{name}.zip").unlink()
    run, overrides = tmp_path / "run", [f"data.frames={frames}", from_acp]
    overrides += ["stages=[features, head, detect]", "head.epochs=1"]
    lofi_tal.main(arguments(toy, run, *overrides))
    log = capsys.readouterr().out
    assert "training: 1 of 8 videos have no frames in" in log and "toy_00000" in log
    assert "evaluated 7 of 8 ground-truth videos" in log and "the 7 with predictions" in log
    for file in frames.glob("*.zip"):
        file.unlink()
    once = result_of(run)
    (run / "metrics.json").unlink()
    (run / "head/head.pt").unlink()
    lofi_tal.main(arguments(toy, run, *overrides))  # what is left to do reads no frames
    assert result_of(run) == once and once[0]["training"]["count"] == 7
    message = error_of(arguments(toy, tmp_path / "none", *overrides))
    assert "training: 8 of 8 videos have no frames in" in message


def test_a_subset_without_segments_is_not_scored(whole, toy, tmp_path, capsys):
    content = load_json(f"{toy}/annotations.json")
    for entry in content["database"].values():
        if entry["subset"] == "validation":
            entry |= {"subset": "testing", "annotations": []}
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    overrides = [f"data.features={whole}/features", "stages=[head, detect]", "head.epochs=1"]
    overrides += [f"data.annotations={tmp_path}/annotations.json", "data.val_subset=testing"]
    argv = arguments(toy, tmp_path / "run", *overrides)
    for words in ("is not scored: subset testing has no segments", "stage detect is done"):
        lofi_tal.main(argv)
        assert words in capsys.readouterr().out
    metrics, results = result_of(tmp_path / "run")
    assert len(results) == 8 and all(results.values())
    assert "mAP" not in metrics and len(metrics["videos"]) == 16
    for word in ("detect.class_scores=ground_truth", "head.lr=[1e-3, 2e-3]"):
        message = error_of([*argv, f"out={tmp_path}/other", word])
        assert word.partition("=")[0] in message and "testing has no segments" in message


def test_the_best_of_several_learning_rates_is_kept(whole, toy, tmp_path, monkeypatch, capsys):
    """Each head is that of a run with its rate alone, also after a kill amid the second."""
    overrides = [f"data.features={whole}/features", "stages=[head, detect]"]
    rates = [1e-5, 4e-3]
    for lr in rates:
        lofi_tal.main(arguments(toy, tmp_path / f"{lr:g}", *overrides, f"head.lr={lr}"))
    argv = arguments(toy, tmp_path / "both", *overrides, f"head.lr={rates}")
    step, steps = localizer.localization_step, []

    def killed(*args, **kwargs):
        steps.append(kwargs)
        if len(steps) == 12:  # of 8 a rate
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(lofi_tal, "localization_step", killed)
    assert "interrupted" in error_of(argv)
    monkeypatch.setattr(lofi_tal, "localization_step", step)
    capsys.readouterr()
    lofi_tal.main(argv)
    log = capsys.readouterr().out
    assert "lr_1e-05/metrics.json" in log and "head: resuming at epoch 2, step 1" in log
    alone = [result_of(tmp_path / f"{lr:g}") for lr in rates]
    for lr, expected in zip(rates, alone, strict=True):
        assert result_of(tmp_path / f"both/head/lr_{lr:g}") == expected
    averages = [metrics["average_mAP"] for metrics, _ in alone]
    scores = dict(zip(map(str, rates), averages, strict=True))
    best = max(rates, key=lambda lr: scores[str(lr)])
    search = {"best_lr": best, "average_mAP": scores}
    assert load_json(tmp_path / "both/head/search.json") == search and f"kept: {best:g}" in log
    assert result_of(tmp_path / "both") == alone[rates.index(best)]
    one, two = tmp_path / f"{best:g}/head/head.pt", tmp_path / "both/head/head.pt"
    assert same(weights(one), weights(two))
    assert torch.load(two)["seconds"] > torch.load(one)["seconds"]
    # Pictures of the run show the epochs of the head that was kept.
    epochs = read_metrics(tmp_path / "both")
    assert epochs == read_metrics(tmp_path / f"both/head/lr_{best:g}")
    assert [record["epoch"] for record in epochs["head"]] == [1, 2, 3, 4]
    assert "head.lr is [1e-05" in error_of([*argv, "stages=[head]", f"out={tmp_path}/x"])


# ------------------------------------------------------------------------------------- stage sola

CHANNELS = 5
# d is too short to train on; f, g and h are for validation.
LENGTHS = {"a": 23, "b": 30, "c": 47, "d": 22, "e": 25, "f": 31, "g": 9, "h": 60}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Smooth random features, shifted in an action; annotations with and without labels."""
    folder, rng = tmp_path_factory.mktemp("features"), np.random.default_rng(0)
    (folder / "raw").mkdir()
    database = {}
    for k, (name, length) in enumerate(LENGTHS.items()):
        segment = [20 + 5 * (k % 3), 60.0]
        x = 3 + np.cumsum(rng.normal(size=(length, CHANNELS)), 0) / 4
        x[int(segment[0] / 80 * length) : int(segment[1] / 80 * length), 0] += 2
        np.save(folder / f"raw/{name}.npy", x.astype(np.float32))
        entry = {"subset": "validation" if name > "e" else "training", "duration": 80.0}
        entry["annotations"] = [{"segment": segment, "label": "xy"[k % 2]}]
        database[name] = entry
    (folder / "annotations.json").write_text(json.dumps({"database": database}))
    for entry in database.values():
        entry["annotations"] = []
    (folder / "unlabelled.json").write_text(json.dumps({"database": database}))
    info = {"seconds": 1000.0, "encoder": "somebody else's"}
    (folder / "raw/features.json").write_text(json.dumps(info))
    return folder


def sola_arguments(files, out, *overrides):
    sources = [f"data.annotations={files}/annotations.json", f"data.features={files}/raw"]
    words = [*TINY_SOLA, f"out={out}", *sources, *overrides]
    return ["--cfg", "configs/sola_hacs_i3d.yaml", "--set", *words]


@pytest.fixture(scope="module")
def sola_run(files, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("runs") / "sola")
    lofi_tal.main(sola_arguments(files, out))
    return out


def sola_weights(out):
    return weights(f"{out}/sola/checkpoint.pt")  # with the predictor


def test_stage_sola_leaves_a_module_and_its_features(sola_run, files):
    module = SoLa.load(f"{sola_run}/sola/sola.pt")
    assert module.sizes == {"channels": CHANNELS, "hidden": 8, "kernel": 5} and module.alpha != 0
    raw = {name: np.load(f"{files}/raw/{name}.npy") for name in LENGTHS}
    for name, length in LENGTHS.items():  # short ones too: only training leaves them out
        made = torch.from_numpy(np.load(f"{sola_run}/sola/features/{name}.npy"))
        assert made.shape == (length, CHANNELS) and made.dtype == torch.float32
        expected = module(torch.from_numpy(raw[name]).t()[None])[0].t()
        torch.testing.assert_close(made, expected)
    stacked = np.concatenate([raw[name] for name in "abcde"])
    np.testing.assert_allclose(module.mean, stacked.mean(0), rtol=1e-5)
    np.testing.assert_allclose(module.std, stacked.std(0), rtol=1e-5)
    info = load_json(f"{sola_run}/sola/features/features.json")
    assert info["seconds"] == 1000 + info["sola_seconds"] > 1000
    assert info["encoder"] == "somebody else's" and len(info["videos"]) == 8
    assert all(video["duration_sec"] > 0 for video in info["videos"].values())
    # A result's cost is that of all it was made from.
    assert load_json(f"{sola_run}/metrics.json")["seconds"] > info["seconds"]
    epochs = epochs_of(f"{sola_run}/sola")
    assert [r["epoch"] for r in epochs] == [1, 2, 3]
    for r in epochs:
        assert r["loss"] > r["floor"] > 0 and 0 < r["spread"] < 1 and -1 < r["gate"] < 1
    assert epochs[-1]["gate"] != epochs[0]["gate"] and epochs[-1]["floor"] == epochs[0]["floor"]


def test_neither_labels_nor_validation_features_reach_the_training(sola_run, files, tmp_path):
    other = tmp_path / "raw"
    other.mkdir()
    for name in LENGTHS:
        np.save(other / f"{name}.npy", np.load(f"{files}/raw/{name}.npy") * (1 + (name > "e")))
    changes = {"x": f"data.annotations={files}/unlabelled.json", "y": f"data.features={other}"}
    for out, change in changes.items():
        lofi_tal.main(sola_arguments(files, tmp_path / out, "stages=[sola]", change))
        assert same(sola_weights(sola_run), sola_weights(tmp_path / out))


def test_head_and_detect_read_what_sola_wrote(sola_run, files, tmp_path):
    stages = "stages=[head, detect]"
    features = f"data.features={sola_run}/sola/features"
    lofi_tal.main(sola_arguments(files, tmp_path / "x", stages, features))
    assert load_json(f"{sola_run}/result.json") == load_json(tmp_path / "x/result.json")
    lofi_tal.main(sola_arguments(files, tmp_path / "raw", stages))
    assert load_json(f"{sola_run}/result.json") != load_json(tmp_path / "raw/result.json")


def test_a_head_that_does_not_fit_is_refused_before_sola_is_trained(files, tmp_path):
    for head, key in {"gtad": "gtad.stem_groups", "bmn": "bmn.groups"}.items():
        message = error_of(sola_arguments(files, tmp_path / "x", f"tal_head={head}", f"{key}=2"))
        assert f"{key} is 2, expected a divisor of 5" in message
    assert not os.path.exists(tmp_path / "x")
    argv = sola_arguments(files, tmp_path / "x", "gtad.stem_groups=2", "stages=[sola]")
    assert config.check(config.from_command_line("", argv)) == ["sola"]  # has no head


def test_an_interrupted_stage_sola_resumes(sola_run, files, tmp_path, capsys, monkeypatch):
    calls = []

    def step(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:  # in epoch 2
            os.kill(os.getpid(), signal.SIGTERM)
        return similarity_step(*args, **kwargs)

    argv = sola_arguments(files, tmp_path / "run", "stages=[sola]")
    monkeypatch.setattr(lofi_tal.sola, "similarity_step", step)
    with pytest.raises(SystemExit) as stopped:
        lofi_tal.main(argv)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert not os.path.exists(tmp_path / "run/sola/sola.pt")
    lofi_tal.main(argv)
    assert "sola: resuming at epoch 2, step 3" in capsys.readouterr().out
    assert same(sola_weights(sola_run), sola_weights(tmp_path / "run"))
    lofi_tal.main(argv)
    assert "stage sola is done" in capsys.readouterr().out


def test_a_batch_of_more_than_all_subsequences_is_one_of_all(files, tmp_path):
    """Not the same ones again and again, until 256 are full."""
    for size in (256, 8):
        out = tmp_path / str(size)
        lofi_tal.main(sola_arguments(files, out, "stages=[sola]", f"sola.batch_size={size}"))
        for r in epochs_of(out / "sola"):
            assert r["videos_per_sec"] * r["seconds"] == pytest.approx(8)  # what was computed
    assert same(sola_weights(tmp_path / "256"), sola_weights(tmp_path / "8"))


def test_short_videos_are_named_and_too_few_are_an_error(files, tmp_path, capsys):
    argv = sola_arguments(files, tmp_path / "x", "stages=[sola]", "sola.epochs=1")
    message = error_of([*argv, "sola.subsequence=99"])
    assert "shorter than sola.subsequence of 99 snippets, the longest has 47" in message
    lofi_tal.main(argv)
    assert "sola: 1 videos are shorter than 23 snippets, left out: d\n" in capsys.readouterr().out


# -------------------------------------------------------------------------------- several processes


TWO_RANKS = ["--standalone", "--nproc_per_node=2"]


def same_encoder(whole, out, tolerance=1e-5, stage="lofi"):
    """Assert that losses by epoch and weights of the encoder after a stage agree."""
    for one, two in zip(epochs_of(f"{whole}/{stage}"), epochs_of(f"{out}/{stage}"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=tolerance)
        assert two["fidelity"] == one["fidelity"]
    path = f"{stage.partition('/')[0]}/encoder.pt"
    one, two = weights(f"{whole}/{path}"), weights(f"{out}/{path}")
    for name, value in one.items():
        assert (two[name] - value).float().norm() <= tolerance * value.float().norm(), name


def test_two_processes_give_the_losses_and_weights_of_one(whole, toy, tmp_path):
    """Same global batch: counts of the loss and statistics of BatchNorm are those of all of it."""
    argv = arguments(toy, tmp_path / "two")
    command = [sys.executable, *TORCHRUN, *TWO_RANKS, "lofi_tal.py", *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=200)
    assert done.returncode == 0, done.stderr
    same_encoder(whole, tmp_path / "two", tolerance=1e-4, stage="pretrain/acp")
    same_encoder(whole, tmp_path / "two", tolerance=1e-4)
    metrics, results = result_of(tmp_path / "two")
    assert metrics["evaluated_videos"] == 8 and list(results) == list(result_of(whole)[1])
    assert load_json(tmp_path / "two/versions.json")["processes"] == 2


def test_two_processes_give_the_classes_of_segments_of_one(files, tmp_path):
    sizes = ["bmn={hidden: 16, groups: 1, samples: 4, map_hidden: [16, 8]}", "tal_head=bmn"]
    words = [*sizes, "classes=segment", "classifier.dropout=0", "stages=[head, detect]"]
    lofi_tal.main(sola_arguments(files, tmp_path / "one", *words))
    argv = sola_arguments(files, tmp_path / "two", *words)
    process = Process(*WARM_TORCHRUN, *TWO_RANKS, "lofi_tal.py", *argv)
    _, errors = process.communicate(200)
    assert process.returncode == 0, errors
    one, two = (weights(f"{tmp_path}/{run}/head/head.pt") for run in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)
    metrics, results = result_of(tmp_path / "one")
    assert metrics["class_source"] == "segments, classifier of the run"
    again, others = result_of(tmp_path / "two")
    assert again["average_mAP"] == pytest.approx(metrics["average_mAP"], abs=0.01)
    for name, detections in results.items():
        best, other = detections[0], others[name][0]
        assert best["label"] == other["label"] and best["score"] > 0
        assert other["score"] == pytest.approx(best["score"], rel=1e-2)


def test_two_processes_give_the_sola_module_of_one(sola_run, files, tmp_path):
    argv = sola_arguments(files, tmp_path / "two", "stages=[sola]")
    for rank in start_ranks(*[["lofi_tal.py", *argv]] * 2):
        assert rank.wait() == 0, rank.read(2)
    one, two = sola_weights(sola_run), sola_weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    folders = [os.listdir(f"{run}/sola/features") for run in (sola_run, tmp_path / "two")]
    assert sorted(folders[0]) == sorted(folders[1])


# ------------------------------------------------------------------------------- signals and kills


@pytest.mark.parametrize(
    ("number", "changes"),
    [(signal.SIGINT, []), (signal.SIGTERM, [*BFLOAT16, "stages=[pretrain, lofi]"])],
    ids=["INT", "TERM"],
)
def test_a_signal_and_the_same_command_again_give_the_same_result(
    toy, tmp_path, from_acp, capsys, number, changes
):
    overrides = [*changes, "lofi.epochs=6", "lofi.batch_size=2", "head.epochs=1", from_acp]
    lofi_tal.main(arguments(toy, tmp_path / "undisturbed", *overrides))
    argv = arguments(toy, tmp_path / "run", "data.workers=1", *overrides)
    read, write = os.pipe()
    process = Process("lofi_tal.py", *argv, stdout=write, stderr=write)
    os.close(write)
    log = []
    with open(read) as lines:
        for line in lines:
            log.append(line)
            if line.startswith("lofi 2/6"):
                # As a terminal or a scheduler does: the whole group, loader workers too.
                os.killpg(process.pid, number)
    assert process.wait() == 128 + number, "".join(log)
    assert "stopped after step" in log[-1] and "Traceback" not in "".join(log)
    assert not os.path.exists(tmp_path / "run/lofi/encoder.pt")
    capsys.readouterr()
    lofi_tal.main(argv)
    log = capsys.readouterr().out
    assert "stage pretrain is done" in log and "resuming at epoch" in log
    files = [f"{tmp_path}/{run}/lofi/encoder.pt" for run in ("run", "undisturbed")]
    assert same(*map(weights, files))  # bit for bit
    if not changes:
        assert result_of(tmp_path / "run") == result_of(tmp_path / "undisturbed")


def wait_for(path, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not os.path.exists(path):
        assert process.poll() is None and time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


ABSENT = """
import sys, time
import lofi_tal

def never(*args, **kwargs):
    open(sys.argv[1], "w").close()
    time.sleep(600)

lofi_tal.localization_step = never
lofi_tal.main(sys.argv[2:])
"""


def test_the_second_signal_ends_a_rank_that_waits_for_another(toy, tmp_path, from_acp):
    argv = arguments(toy, tmp_path / "run", "stages=[lofi]", from_acp)
    ranks = start_ranks(
        ["lofi_tal.py", *argv],
        ["-c", ABSENT, tmp_path / "there", *argv],
    )
    try:
        wait_for(tmp_path / "there", ranks[1])
        for _ in range(2):  # as a scheduler and torchrun do, of which each sends the first
            ranks[0].send_signal(signal.SIGINT)
            time.sleep(0.1)
        with pytest.raises(subprocess.TimeoutExpired):
            ranks[0].wait(1.5)
        ranks[0].send_signal(signal.SIGINT)
        assert ranks[0].wait(5) == 128 + signal.SIGINT
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


LATE = """
import os, sys, time

sys.path.insert(0, os.getcwd())
import lofi_tal

# After a restart rank 0 comes last: nothing that a dead process left may pass for its own.
if os.environ["RANK"] == "0" and os.path.exists(sys.argv[1]):
    time.sleep(1)
lofi_tal.main(sys.argv[2:])
"""


@pytest.mark.parametrize("nodes", [1, 2])
def test_kill_9_of_a_rank_under_max_restarts_loses_nothing(whole, toy, tmp_path, from_acp, nodes):
    """On one machine, there in micro-batches and chunks, and on two nodes, for which two torchrun
    agents stand."""
    overrides = ["stages=[pretrain, lofi]", "checkpoint_sec=0", from_acp]
    if nodes == 1:
        rendezvous = TWO_RANKS
        overrides += ["lofi.accumulate=2", "lofi.chunk_snippets=3"]
    else:
        rendezvous = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=test"]
        rendezvous += [f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    (tmp_path / "late.py").write_text(LATE)
    saved = str(tmp_path / "run/lofi/checkpoint.pt")
    command = [*WARM_TORCHRUN, *rendezvous, "--max-restarts=1", tmp_path / "late.py", saved]
    command += arguments(toy, tmp_path / "run", *overrides)
    agents = [Process(*command) for _ in range(nodes)]
    try:
        wait_for(saved, agents[0])
        (server,) = children_of(agents[-1].pid)
        os.kill(children_of(server)[-1], signal.SIGKILL)
        codes = [agent.wait(timeout=60) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    log = "".join(agent.read(1) + agent.read(2) for agent in agents)
    assert codes == [0] * nodes, log
    assert "lofi: resuming at epoch" in log
    same_encoder(whole, tmp_path / "run")


DIES = """
import os, signal, sys
import torch
import lofi_tal

count, save = 0, torch.save

def dying(obj, file):
    global count
    count += 1
    save(obj, file)
    if count == int(sys.argv[1]):  # half of a checkpoint is on disk
        file.flush()
        os.truncate(file.name, os.path.getsize(file.name) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = dying
lofi_tal.main(sys.argv[2:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's death")
def test_ranks_end_with_their_launcher(toy, tmp_path, from_acp):
    argv = arguments(toy, tmp_path / "run", "stages=[lofi]", "lofi.epochs=9999", from_acp)
    read, write = os.pipe()
    command = [*TORCHRUN, *TWO_RANKS, "lofi_tal.py", *argv, "checkpoint_sec=0"]
    agent = Process(*command, stdout=write, stderr=write)
    os.close(write)
    wait_for(tmp_path / "run/lofi/checkpoint.pt", agent)
    agent.kill()
    with open(read) as log:
        log.read()  # until the last of its ranks has closed it
    RunFolder(tmp_path / "run").lock()


LATE_ORPHAN = """
import functools, os, sys, time

parent = os.getppid()
open(sys.argv[1], "w").close()
while os.getppid() == parent:
    time.sleep(0.01)
sys.path.insert(0, os.getcwd())
import lofi_tal
import localizer

localizer.fresh_group = functools.partial(localizer.fresh_group, 0.5)
lofi_tal.main(sys.argv[2:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's death")
def test_a_rank_whose_launcher_ended_before_its_first_line_does_not_wait(toy, tmp_path):
    (tmp_path / "late.py").write_text(LATE_ORPHAN)
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=1", tmp_path / "late.py"]
    read, write = os.pipe()
    command += [tmp_path / "there", *arguments(toy, tmp_path / "run")]
    agent = Process(*command, stdout=write, stderr=write)
    os.close(write)
    wait_for(tmp_path / "there", agent)
    agent.kill()
    with open(read) as log:
        assert "no other process answers, did torchrun end?" in log.read().splitlines()[-1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_the_others_does_not_wait_for_ever(rank):
    code = "import config, localizer\nwith config.one_line_errors('x'): localizer.fresh_group(1)"
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    process = Process("-c", code, env={**ENV, **group, "RANK": str(rank)})
    _, errors = process.communicate(60)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("x: no other process answers, did torchrun end?")


def test_kill_9_in_an_epoch_and_while_a_checkpoint_is_written_lose_nothing(
    whole, toy, tmp_path, from_acp
):
    overrides = ["stages=[pretrain, lofi]", "checkpoint_sec=0", from_acp]
    argv = arguments(toy, tmp_path / "run", *overrides)
    path = f"{tmp_path}/run/lofi/checkpoint.pt"
    # Of a process: the first is the encoder of stage pretrain, or the first after resuming.
    for count in ("3", "2"):
        died = Process("-c", DIES, count, *argv)
        assert died.wait() == -signal.SIGKILL, died.read(2)
        assert glob.glob(f"{path}.part-*")
    process = Process("lofi_tal.py", *argv)
    written = os.stat(f"{path}.previous").st_mtime_ns
    while os.stat(f"{path}.previous").st_mtime_ns == written:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    lofi_tal.main(argv)
    one, two = weights(f"{whole}/lofi/encoder.pt"), weights(f"{tmp_path}/run/lofi/encoder.pt")
    assert same(one, two)  # bit for bit
    assert not glob.glob(f"{path}.part-*")


# ------------------------------------------------------------------------------------------ errors


@pytest.fixture(scope="module")
def damaged(toy, tmp_path_factory):
    """Frames of which one ZIP holds no valid JPEG."""
    frames = tmp_path_factory.mktemp("damaged") / "frames"
    shutil.copytree(f"{toy}/frames", frames)
    path = frames / "toy_00005.zip"
    path.write_bytes(path.read_bytes().replace(b"\xff\xd8\xff", bytes(3)))
    return frames


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_damaged_zip_in_a_loader_worker_ends_the_run(
    toy, tmp_path, from_acp, damaged, num_processes
):
    before = [] if num_processes == 1 else [*WARM_TORCHRUN, *TWO_RANKS]
    overrides = ["stages=[lofi]", "data.workers=2", f"data.frames={damaged}", from_acp]
    argv = arguments(toy, tmp_path / "run", *overrides)
    read, write = os.pipe()
    process = Process(*before, "lofi_tal.py", *argv, stderr=write)
    os.close(write)
    assert process.wait(40) == 1
    with open(read) as file:
        printed = file.read().splitlines()  # until the last loader worker has closed it
    lines = [line for line in printed if "lofi_tal.py: " in line]
    assert len(lines) == 1 and "toy_00005.zip" in lines[0]
    if num_processes == 1:
        assert printed == lines


def test_a_slip_of_ours_is_a_traceback(toy, tmp_path, from_acp, monkeypatch):
    """Also one that raises what a user's mistake raises, in this process and in a worker."""

    def slip(*args):
        (_,) = args

    argv = arguments(toy, tmp_path / "run", "stages=[lofi]", from_acp)
    with monkeypatch.context() as patch:
        patch.setattr(gtad, "losses", slip)
        with pytest.raises(ValueError, match="unpack") as raised:
            lofi_tal.main(argv)
    assert raised.type is ValueError and raised.traceback[-1].path.name == "test_lofi_tal.py"
    monkeypatch.setattr(data.VideoDataset, "__getitem__", slip)
    with pytest.raises(ValueError, match=r"test_lofi_tal\.py.*, line \d+, in slip"):
        lofi_tal.main([*argv, "data.workers=1"])


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["GPU", "CPU"])
def test_out_of_memory_says_what_to_change(toy, tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(lofi_tal, "pretrain_stage", fail)
    message = error_of(arguments(toy, tmp_path / "x"))
    assert "out of memory" in message
    assert "lofi.chunk_snippets" in message and "lofi.accumulate" in message


def test_bad_input_is_one_clear_error(whole, toy, tmp_path):
    (tmp_path / "none.json").write_text('{"results": {}}')
    argv = arguments(toy, tmp_path / "x")
    cases = {
        "data.annotations=none.json": "python -m tools.make_toy",  # no data yet
        "lofi.epoch=1": "did you mean lofi.epochs",
        "pretrain.method=acpp": "pretrain.method is 'acpp', expected",
        f"detect.class_scores={tmp_path}/none.json": "no class scores for 8 videos",
        "detect.class_scores=cuhk.json": "no file cuhk.json (config key detect.class_scores)",
        "pretrain.pretrained=none.pt": "no file none.pt (config key pretrain.pretrained)",
        "stages=[features]": "needs an encoder",
        "stages=[detect]": "8 of 8 videos have no features",
    }
    for override, words in cases.items():
        assert words in error_of([*argv, override])
    assert "cannot replace the training" in error_of(
        [*argv, "pretrain.method=icp", f"pretrain.pretrained={whole}/pretrain/encoder.pt"]
    )
    message = error_of(arguments(toy, whole, "lofi.warmup_fraction=0.99"))
    assert "different config" in message and "lofi.warmup_fraction: 0.3 there" in message


def test_a_folder_that_cannot_be_written_is_one_line(toy, tmp_path):
    (tmp_path / "file").touch()
    message = error_of(arguments(toy, tmp_path / "file/run"))
    assert "cannot be written: Not a directory" in message and "\n" not in message
