"""The whole method on a handful of tiny videos, in real processes."""
import glob
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data
import lofi_tal
import toy
from pretrain import Classifier

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
TINY = ["data.size=16", "data.snippets=8", "data.workers=0", "encoder.width=8", "lofi.epochs=3", "lofi.batch_size=4", "head.epochs=4", "head.batch_size=4",
        "gtad={hidden: 16, gcn_width: 16, gcn_groups: 4, inner_bins: 4, context_bins: 2, map_hidden: [16, 8]}",
        "pretrain.icp.epochs=1", "pretrain.acp.epochs=1", "pretrain.acp.batch_size=8", "pretrain.acp_plus.epochs=1", "pretrain.acp_plus.batch_size=4"]


@pytest.fixture(scope="module")
def toy_data(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("toy") / "data")
    toy.make_toy(out, workers=1, train=8, val=8, clips=16, stills=24, size=20, snippets=16)
    return out


def arguments(toy_data, out, *words):
    return ["--cfg", "configs/toy.yaml", "--set", *TINY, f"out={out}", f"data.annotations={toy_data}/annotations.json", f"data.frames={toy_data}/frames",
            f"pretrain.icp.source={toy_data}/stills", f"pretrain.acp.source={toy_data}/clips", *words]


def result_of(out):
    with open(f"{out}/metrics.json") as f:
        metrics = json.load(f)
    metrics.pop("seconds")
    with open(f"{out}/result.json") as f:
        return metrics, json.load(f)["results"]


@pytest.fixture(scope="module")
def whole(toy_data, tmp_path_factory):
    """An undisturbed run of all stages in one process."""
    out = str(tmp_path_factory.mktemp("runs") / "whole")
    lofi_tal.main(arguments(toy_data, out))
    return out


def test_a_run_leaves_everything_that_a_number_needs(whole, toy_data):
    metrics, results = result_of(whole)
    assert metrics["evaluated_videos"] == metrics["ground_truth_videos"] == 8 and 0 <= metrics["average_mAP"] <= 1
    assert 0 <= metrics["AR"]["AR@1"] <= metrics["AR"]["AR@100"] <= 1 and len(metrics["videos"]) == 16
    assert all(0 <= d["segment"][0] < d["segment"][1] <= 8 for ds in results.values() for d in ds) and min(map(len, results.values())) > 3
    assert set(os.listdir(whole)) == {"config.json", "versions.json", "pretrain", "lofi", "features", "head", "result.json", "proposals.json", "metrics.json"}
    lines = [json.loads(line) for line in open(f"{whole}/lofi/metrics.jsonl")]
    assert [r["fidelity"] for r in lines] == ["S", "T", "ST"] and {"loss", "node", "regression", "classification", "lr"} <= set(lines[0])
    features = json.load(open(f"{whole}/features/features.json"))
    assert features["encoder"].endswith("lofi/encoder.pt") and features["stride"] == 1
    before, after = (torch.load(f"{whole}/{stage}/encoder.pt", weights_only=True)["model"] for stage in ("pretrain", "lofi"))
    assert not torch.equal(before["layer1.0.conv1.weight"], after["layer1.0.conv1.weight"])
    assert torch.equal(before["bn1.running_mean"], after["bn1.running_mean"])  # frozen


def test_training_goes_on_when_nobody_reads_what_it_says(whole, toy_data, tmp_path):
    """As `| head -1`, or a terminal that was closed."""
    command = [sys.executable, "lofi_tal.py", *arguments(toy_data, tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
    assert process.stdout.readline().startswith("acp: after the first step")
    process.stdout.close()
    assert (process.wait(100), process.stderr.read()) == (0, "")
    assert result_of(tmp_path / "run") == result_of(whole)


def test_a_finished_run_is_not_run_again(whole, toy_data, capsys):
    before = {f: os.stat(f"{whole}/{f}").st_mtime_ns for f in ("lofi/encoder.pt", "head/head.pt", "metrics.json")}
    lofi_tal.main(arguments(toy_data, whole))
    assert capsys.readouterr().out.count("done already") == 5
    assert before == {f: os.stat(f"{whole}/{f}").st_mtime_ns for f in before}


def test_classes_can_come_from_elsewhere_and_every_output_says_so(whole, toy_data, tmp_path, capsys):
    (tmp_path / "scores.json").write_text(json.dumps({"results": {f"toy_{i:05d}": [0.25, 0.75] for i in range(8, 16)}, "class": ["jump", "orbit_left"]}))
    words = [f"data.features={whole}/features", "stages=[head,detect]", "head.epochs=1"]
    for source, said in ((tmp_path / "scores.json", "external file"), ("ground_truth", "ground truth (analysis)")):
        out = tmp_path / said
        lofi_tal.main(arguments(toy_data, out, *words, f"detect.classes_from={source}"))
        metrics, results = result_of(out)
        assert said in metrics["class_source"]
        labels = {d["label"] for d in results["toy_00008"]}
        assert labels == ({"jump", "orbit_left"} if "external" in said else {"figure_eight"})


SIZES = {"auto": 16, "float32": 16, "bfloat16": 32}  # oneDNN's bfloat16 gradient of a 3x3 convolution of stride 2 on one single pixel is garbage (torch 2.15)


@pytest.mark.parametrize("number, precision", [(signal.SIGINT, "auto"), (signal.SIGTERM, "bfloat16")])
def test_a_signal_in_stage_lofi_and_the_same_command_again_give_the_same_result(whole, toy_data, tmp_path, number, precision):
    words = [f"precision={precision}", f"data.size={SIZES[precision]}", "lofi.epochs=20", "lofi.batch_size=2", f"pretrain.checkpoint={whole}/pretrain/encoder.pt"]
    lofi_tal.main(arguments(toy_data, tmp_path / "undisturbed", *words))
    command = [sys.executable, "lofi_tal.py", *arguments(toy_data, tmp_path / "run", "data.workers=1", *words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV, start_new_session=True)
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("lofi 2/20"):
            os.killpg(process.pid, number)  # as a terminal or a scheduler does: the whole process group, loader workers too
    assert process.wait(60) == 128 + number, "".join(said)
    assert f"stopped by {number.name} in epoch" in said[-1] and "Traceback" not in "".join(said)
    assert not os.path.exists(tmp_path / "run/lofi/encoder.pt")
    again = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "pretrain: done already" in again.stdout and "resuming at epoch" in again.stdout
    assert result_of(tmp_path / "run") == result_of(tmp_path / "undisturbed")
    for file in ("lofi/encoder.pt", "head/head.pt"):
        one, two = (torch.load(tmp_path / run / file, weights_only=True)["model"] for run in ("run", "undisturbed"))
        assert all(torch.equal(one[k], two[k]) for k in one)  # bit for bit


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_of_each_stage(whole, toy_data, tmp_path, precision):
    """On a CPU: bfloat16 is what convolutions of each training stage and of stage features give, and nothing else; float32 is what auto is, bit for bit."""
    seen, chunk = {}, "lofi.chunk=3" if precision == "bfloat16" else "lofi.chunk=0"
    stages = ["pretrain", "lofi", "features", "sola", "head"] if precision == "bfloat16" else ["pretrain", "lofi", "features", "head", "detect"]
    words = [f"precision={precision}", f"data.size={SIZES[precision]}", chunk, "sola={subsequence: 4, positions: [0, 1, 2, 3], hidden: 16, epochs: 2, batch_size: 4}"]
    for i, stage in enumerate(stages):
        hook = torch.nn.modules.module.register_module_forward_hook(
            lambda module, _, out: seen.setdefault(stage, set()).add(out.dtype) if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv1d)) else None)
        try:
            lofi_tal.main(arguments(toy_data, tmp_path, *words, f"stages=[{','.join(stages[:i + 1])}]"))
        finally:
            hook.remove()
    expected = {torch.bfloat16 if precision == "bfloat16" else torch.float32}
    assert {k: v for k, v in seen.items() if k not in ("sola", "head")} == dict.fromkeys(["pretrain", "lofi", "features"] + ["detect"] * ("detect" in stages), expected)
    assert expected <= seen["head"]
    for file in ("pretrain/encoder.pt", "lofi/encoder.pt", "head/head.pt"):
        one, two = (torch.load(f"{run}/{file}", weights_only=True)["model"] for run in (whole, tmp_path))
        assert {k: v.dtype for k, v in one.items()} == {k: v.dtype for k, v in two.items()} and torch.float32 in {v.dtype for v in two.values()}
        assert all(torch.equal(one[k], two[k]) for k in one) == (precision == "float32"), file
    for path in glob.glob(f"{tmp_path}/**/features/*.npy", recursive=True):
        assert np.load(path).dtype == np.float32
    if precision == "float32":
        assert result_of(whole) == result_of(tmp_path)


def torchrun(*words):
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", *words]


def same_encoder(whole, out, tolerance=1e-5):
    """Losses by epoch and weights of stage lofi agree."""
    one, two = ([json.loads(line) for line in open(f"{run}/lofi/metrics.jsonl")] for run in (whole, out))
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=tolerance) and a["fidelity"] == b["fidelity"]
    one, two = (torch.load(f"{run}/lofi/encoder.pt", weights_only=True)["model"] for run in (whole, out))
    for key, value in one.items():
        if value.is_floating_point():
            assert (two[key] - value).norm() <= tolerance * value.norm(), key


@pytest.mark.parametrize("words", [[], ["lofi.accumulate=2", "lofi.chunk=3"]])
def test_two_processes_give_the_losses_and_weights_of_one(whole, toy_data, tmp_path, words):
    """Same global batch, frozen BatchNorm, from one ACP encoder; loss-balance counts and random cells are those of the global batch."""
    common = [f"pretrain.checkpoint={whole}/pretrain/encoder.pt"]
    done = subprocess.run([*torchrun("2", "--standalone"), "lofi_tal.py", *arguments(toy_data, tmp_path / "two", *common, *words)],
                          capture_output=True, text=True, env=ENV, timeout=200)
    assert done.returncode == 0, done.stderr
    same_encoder(whole, tmp_path / "two")
    metrics, results = result_of(tmp_path / "two")
    assert metrics["evaluated_videos"] == 8 and list(results) == list(result_of(whole)[1])
    assert json.load(open(tmp_path / "two/versions.json"))["processes"] == 2
    assert "cannot be divided evenly over 1 processes and 3 micro-batches" in fails(arguments(toy_data, tmp_path / "three", *common, "lofi.accumulate=3"))


def wait_for(path, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not os.path.exists(path):
        assert process.poll() is None and time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


@pytest.mark.parametrize("nodes", [1, 2])
def test_kill_9_of_one_rank_under_max_restarts_ends_with_the_weights_of_an_undisturbed_run(whole, toy_data, tmp_path, nodes):
    """On one machine, and on two nodes, for which two torchrun agents stand."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        rendezvous = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{s.getsockname()[1]}", "--rdzv_id=test"] if nodes > 1 else ["--standalone"]
    command = [*torchrun(str(2 // nodes), "--max-restarts=1", *rendezvous), "lofi_tal.py",
               *arguments(toy_data, tmp_path / "run", "stages=[pretrain,lofi]", "checkpoint_sec=0", f"pretrain.checkpoint={whole}/pretrain/encoder.pt")]
    agents = [subprocess.Popen(command, stdout=open(tmp_path / f"log{n}", "w"), stderr=subprocess.STDOUT, env=ENV) for n in range(nodes)]
    wait_for(tmp_path / "run/lofi/checkpoint.pt", agents[0])
    workers = open(f"/proc/{agents[-1].pid}/task/{agents[-1].pid}/children").read().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    try:
        ends = [agent.wait(timeout=100) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    said = "".join(open(tmp_path / f"log{n}").read() for n in range(nodes))
    assert ends == [0] * nodes, said
    assert "lofi: resuming at epoch" in said
    same_encoder(whole, tmp_path / "run")


DIES = """
import os, signal, sys
import torch
import lofi_tal
count, save = 0, torch.save
def dying(obj, file):
    global count
    count += 1
    if count == int(sys.argv[1]):  # half of a checkpoint is on disk
        save(obj, file), file.flush(), os.truncate(file.name, os.path.getsize(file.name) // 2), os.kill(os.getpid(), signal.SIGKILL)
    save(obj, file)
torch.save = dying
lofi_tal.main(sys.argv[2:])
"""


def test_kill_9_in_an_epoch_and_while_a_checkpoint_is_written_lose_nothing(whole, toy_data, tmp_path):
    argv = arguments(toy_data, tmp_path / "run", "stages=[pretrain,lofi]", "checkpoint_sec=0", f"pretrain.checkpoint={whole}/pretrain/encoder.pt")
    for nth in (3, 2):  # of the process: the first is the encoder of stage pretrain, or the first after resuming
        died = subprocess.run([sys.executable, "-c", DIES, str(nth), *argv], capture_output=True, text=True, env=ENV, timeout=100)
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert glob.glob(f"{tmp_path}/run/lofi/checkpoint.pt.part-*")
    process = subprocess.Popen([sys.executable, "lofi_tal.py", *argv], stdout=subprocess.DEVNULL, env=ENV)
    at = os.stat(f"{tmp_path}/run/lofi/checkpoint.pt.previous").st_mtime_ns
    while os.stat(f"{tmp_path}/run/lofi/checkpoint.pt.previous").st_mtime_ns == at:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    lofi_tal.main(argv)
    one, two = (torch.load(f"{run}/lofi/encoder.pt", weights_only=True)["model"] for run in (whole, tmp_path / "run"))
    assert all(torch.equal(one[k], two[k]) for k in one)  # bit for bit


def test_acp_plus_and_icp_feed_the_same_stages(whole, toy_data, tmp_path, capsys):
    for name, words in {"icp": ["pretrain.method=icp", "encoder.shift_div=0"], "none": ["pretrain.method=none"],
                        "plus": ["pretrain.method=acp_plus", f"pretrain.checkpoint={whole}/pretrain/encoder.pt"]}.items():
        lofi_tal.main(arguments(toy_data, tmp_path / name, "stages=[pretrain,features,head,detect]", *words))
        assert result_of(tmp_path / name)[0]["evaluated_videos"] == 8
    said = capsys.readouterr().out
    assert "icp: top-1 accuracy on 2 held-out clips of 24 classes" in said and "acp_plus: top-1 accuracy on" in said
    one, other = (torch.load(f, weights_only=True) for f in (f"{whole}/pretrain/encoder.pt", tmp_path / "plus/pretrain/encoder.pt"))
    assert other["seconds"] > one["seconds"] > 0  # the cost of what it was made from is in it
    with pytest.warns(UserWarning, match="trained with shift_div 0"):  # no weight tells that
        lofi_tal.main(arguments(toy_data, tmp_path / "other", "stages=[pretrain]", f"pretrain.checkpoint={tmp_path}/icp/pretrain/encoder.pt"))


def test_bmn_is_one_word_away(whole, toy_data, tmp_path):
    lofi_tal.main(arguments(toy_data, tmp_path / "bmn", "tal_head=bmn", "bmn={hidden: 16, map_hidden: [16, 8], samples: 4}", "lofi.epochs=1", "detect.tiou=[0.75]",
                            f"pretrain.checkpoint={whole}/pretrain/encoder.pt"))
    assert result_of(tmp_path / "bmn")[0]["evaluated_videos"] == 8
    assert "head.x_3d_p.0.weight" in torch.load(tmp_path / "bmn/head/head.pt", weights_only=True)["model"]


def fails(argv):
    with pytest.raises(SystemExit) as stopped:
        lofi_tal.main(argv)
    assert str(stopped.value.code).startswith("lofi_tal.py: ")
    return str(stopped.value.code)


def test_bad_input_is_one_clear_error(whole, toy_data, tmp_path):
    argv = arguments(toy_data, tmp_path / "x")
    assert "python toy.py" in fails(argv + ["--set", "data.annotations=none.json"])  # no data yet
    assert "did you mean lofi.epochs" in fails(argv + ["--set", "lofi.epoch=1"])
    assert "pretrain.method has 'acpp', expected none, icp, acp, acp_plus" in fails(argv + ["--set", "pretrain.method=acpp"])
    assert "lofi.cycle has 'X', expected full, S, T, ST" in fails(argv + ["--set", "lofi.cycle=[X]"])
    assert "lofi.optimizer has 'lion', expected sgd" in fails(argv + ["--set", "lofi.optimizer=lion"])
    assert "head.schedule has 'linear'" in fails(argv + ["--set", "head.schedule=linear"])
    assert "lofi.epochs is 2.5, expected a whole number" in fails(argv + ["--set", "lofi.epochs=2.5"])
    assert "need lofi.batchnorm frozen" in fails(argv + ["--set", "lofi.batchnorm=train", "lofi.accumulate=2"])
    assert "precision has 'half', expected auto, float32, bfloat16" in fails(argv + ["--set", "precision=half"])
    assert "precision has 16, expected auto" in fails(argv + ["--set", "precision=16"])
    assert "device 'gpu': expected auto" in fails(argv + ["--set", "device=gpu"])
    assert "no file cuhk.json (config key detect.classes_from)" in fails(argv + ["--set", "detect.classes_from=cuhk.json"])
    assert "stages has 'lofy'" in fails(argv + ["--set", "stages=[lofy]"])
    assert "no file none.pt (config key pretrain.checkpoint)" in fails(argv + ["--set", "pretrain.checkpoint=none.pt"])
    assert "checkpoint none.pt would replace the training that pretrain.method icp asks for" in fails(argv + ["--set", "pretrain.method=icp", "pretrain.checkpoint=none.pt"])
    assert "list stage pretrain before it" in fails(argv + ["--set", "stages=[features]"])
    assert "head.pt" in fails(argv + ["--set", "stages=[detect]"])
    message = fails(arguments(toy_data, whole, "lofi.warmup=0.99"))
    assert "begun with another config" in message and "lofi.warmup: 0.3 there, 0.99 now" in message


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                                   RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_out_of_memory_says_what_to_change(toy_data, tmp_path, monkeypatch, error):
    def stage(cfg, process):
        raise error
    monkeypatch.setitem(lofi_tal.STAGES, "pretrain", (stage, "pretrain/encoder.pt"))
    message = fails(arguments(toy_data, tmp_path / "x"))
    assert "out of memory" in message and "lofi.chunk" in message and "lofi.accumulate" in message
    monkeypatch.setitem(lofi_tal.STAGES, "pretrain", (lambda cfg, process: 1 // 0, "pretrain/encoder.pt"))
    with pytest.raises(ZeroDivisionError):  # what is not understood keeps its traceback
        lofi_tal.main(arguments(toy_data, tmp_path / "x"))


def test_compile_recompute_and_chunks_are_one_word_each(toy_data, tmp_path, monkeypatch):
    compiled, forward = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: (compiled.append(type(self).__name__), forward(self, backend="eager")))
    lofi_tal.main(["--cfg", "configs/toy.yaml", "--dry-run", "--set", *TINY, "lofi.compile=true", "encoder.recompute=true", "lofi.chunk=2", "lofi.cycle=[full, S]"])
    assert compiled == ["TSM"]


def test_videos_without_frames_are_left_out_and_evaluation_says_so(whole, toy_data, tmp_path, capsys):
    frames = tmp_path / "frames"
    shutil.copytree(f"{toy_data}/frames", frames)
    (frames / "toy_00000.zip").unlink(), (frames / "toy_00011.zip").unlink()  # one of 8 for training, one of 8 for validation
    words = [f"data.frames={frames}", "stages=[features,head,detect]", f"pretrain.checkpoint={whole}/pretrain/encoder.pt"]
    lofi_tal.main(arguments(toy_data, tmp_path / "run", *words))
    said = capsys.readouterr().out
    assert "training: 1 of 8 videos have no frames in" in said and "toy_00000" in said and "evaluated 7 of 8 videos (on these alone average " in said
    for f in frames.glob("*.zip"):
        f.unlink()
    once = result_of(tmp_path / "run")
    (tmp_path / "run/metrics.json").unlink(), (tmp_path / "run/head/head.pt").unlink()
    lofi_tal.main(arguments(toy_data, tmp_path / "run", *words))  # what is left to do reads no frames
    assert result_of(tmp_path / "run") == once and once[0]["training"]["count"] == 7
    assert "none of the 8 training videos has frames in" in fails(arguments(toy_data, tmp_path / "none", *words))


def test_a_subset_without_segments_is_detected_in_and_not_scored(whole, toy_data, tmp_path, capsys):
    database = json.load(open(f"{toy_data}/annotations.json"))
    for entry in database["database"].values():
        if entry["subset"] == "validation":
            entry |= {"subset": "testing", "annotations": []}
    (tmp_path / "annotations.json").write_text(json.dumps(database))
    words = arguments(toy_data, tmp_path / "run", "stages=[features,head,detect]", f"pretrain.checkpoint={whole}/pretrain/encoder.pt", "data.val_subset=testing",
                      f"data.annotations={tmp_path}/annotations.json")
    for said in ("result.json is written, not scored: subset testing has no segments", "nothing was left to do"):
        lofi_tal.main(words)
        assert said in capsys.readouterr().out
    metrics, results = result_of(tmp_path / "run")
    assert len(results) == 8 and all(results.values()) and "mAP" not in metrics and len(metrics["videos"]) == 16
    assert "subset testing has no segments to take classes from" in fails([*words, f"out={tmp_path}/other", "detect.classes_from=ground_truth"])
    assert data.main(["check", *words]) == 0 and "testing: no segments, so results will be written and not scored" in capsys.readouterr().out


def test_a_dry_run_without_frames_builds_no_encoder(tmp_path, capsys):
    lofi_tal.main(["--cfg", "configs/thumos14.yaml", "--dry-run", "--set", f"out={tmp_path}/x"])
    assert capsys.readouterr().out == "stages head, detect go on from features, whose channels only the data tell: no encoder to try\n"


def test_a_folder_that_cannot_be_written_is_one_line(toy_data, tmp_path):
    (tmp_path / "file").touch()
    assert "Not a directory" in fails(arguments(toy_data, tmp_path / "file/run")) and "\n" not in fails(arguments(toy_data, tmp_path / "file/run"))


def test_dry_run_of_the_papers_config_needs_no_data(tmp_path, capsys):
    lofi_tal.main(["--cfg", "configs/anet13.yaml", "--dry-run", "--set", f"out={tmp_path}/x", "data.size=32", "data.snippets=12", "encoder.width=8"])
    said = capsys.readouterr().out
    assert "S: frames (1, 12, 8, 3, 16, 16) -> features (1, 64, 12)" in said
    assert "T: frames (1, 3, 8, 3, 32, 32)" in said and "ST: frames (1, 6, 8, 3, 23, 23)" in said and "parameters" in said and "GB" in said
    assert " classes, peak memory" not in said  # its pretrain.checkpoint leaves no phase to train
    assert not os.path.exists(tmp_path / "x")
    words = ["data.size=32", "encoder.width=8", "lofi.cycle=[full]", "data.snippets=4", "pretrain.checkpoint=null"]
    for method, phases in {"icp": ["1, 3, 32, 32) -> 1000"], "speed": ["8, 3, 32, 32) -> 2"], "none": [],
                           "acp_plus_background": ["8, 3, 32, 32) -> 400", "8, 3, 32, 32) -> 201"]}.items():
        lofi_tal.main(["--cfg", "configs/anet13.yaml", "--dry-run", "--set", *words, f"pretrain.method={method}"])
        said = capsys.readouterr().out
        assert said.count(" classes, peak memory") == len(phases) and all(f"clips (2, 1, {p} classes" in said for p in phases)
    count = sum(p.numel() for p in Classifier(lofi_tal.build_encoder(lofi_tal.config.load("configs/anet13.yaml", words)), 201).parameters())
    assert f"acp_plus_background: {count / 1e6:.2f} M parameters" in said


@pytest.mark.parametrize("module", ["tsm", "gtad", "sola", "evaluate"])
def test_modules_can_be_copied_alone(module, tmp_path):
    shutil.copy(f"{module}.py", tmp_path)
    done = subprocess.run([sys.executable, "-c", f"import {module}"], cwd=tmp_path, capture_output=True, text=True, env=ENV)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_script_stays_a_script():
    assert len(open("lofi_tal.py").read().splitlines()) <= 300
