import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

import data
import engine

ALONE = engine.Process(0, 1, torch.device("cpu"))
OPTIONS = dict(epochs=4, optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=1e-3, schedule="step", every=2, factor=0.5, warmup=0.3)


class Rows(torch.utils.data.Dataset):
    """20 points of a linear problem; with an epoch's random noise on each."""

    def __init__(self, n=20):
        self.x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch):
        self.epoch.fill_(epoch)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, pair):
        i, _ = pair
        noise = torch.randn(3, generator=torch.Generator().manual_seed(data.seed_of(int(self.epoch), i)))
        return {"name": f"row{i}", "x": self.x[i] + 0.1 * noise, "y": self.x[i].sum()}


def train(folder, *, stop_at=None, bad_at=None, bad_gradient_at=None, options=OPTIONS, process=ALONE, make=lambda: torch.nn.Linear(3, 1), **kwargs):
    torch.manual_seed(0)
    model = make()
    sampler = data.CyclicFidelitySampler(20, 4, [data.Fidelity("S", 1, 1)], rank=process.rank, world=process.world)

    def step(net, batch, epoch, i):
        loss = (net(batch["x"])[:, 0] - batch["y"]).square().mean()
        loss.backward()
        if (epoch, i) == bad_gradient_at:
            model.bias.grad.fill_(math.inf)
        if (epoch, i) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": loss.detach() * (math.nan if (epoch, i) == bad_at else 1)}
    result = engine.fit(model, step, Rows(), sampler, data.collate, options=options, name="test", folder=str(folder), process=process, **kwargs)
    return model, result


def test_it_trains_and_writes_a_line_an_epoch(tmp_path):
    model, (seconds, history) = train(tmp_path, workers=1, about={"config": {"lr": 1}})
    assert history[-1]["loss"] < 0.3 < 2 < history[0]["loss"] and seconds > 0
    lines = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    assert lines == history and [r["epoch"] for r in lines] == [1, 2, 3, 4]
    assert [r["lr"] for r in lines] == [0.1, 0.1, 0.05, 0.05] and all(r["videos_per_sec"] > 0 and r["peak_memory_gb"] > 0 for r in lines)
    saved = engine.load_checkpoint(str(tmp_path / "checkpoint.pt"))
    assert {"model", "optimizer", "epoch", "step", "history", "seconds"} <= saved.keys() and saved["about"] == {"config": {"lr": 1}}


@pytest.mark.parametrize("stop_at", [(0, 0), (1, 2), (2, 4)])
def test_a_stopped_run_resumes_to_the_very_same_weights_and_log(tmp_path, stop_at):
    whole, (_, history) = train(tmp_path / "whole")
    with pytest.raises(engine.Interrupted) as stopped:
        train(tmp_path / "stopped", stop_at=stop_at)
    assert stopped.value.code == 128 + signal.SIGTERM
    resumed, (_, again) = train(tmp_path / "stopped")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
    drop = {"seconds", "videos_per_sec", "peak_memory_gb"}
    assert [{k: v for k, v in r.items() if k not in drop} for r in history] == [{k: v for k, v in r.items() if k not in drop} for r in again]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # handlers are put back


def test_a_run_does_not_resume_on_other_training_data(tmp_path):
    with pytest.raises(engine.Interrupted):
        train(tmp_path, stop_at=(1, 2), training={"count": 20, "hash": "a"})
    with pytest.raises(ValueError, match=r"checkpoint.pt was begun on other training data: .*'hash': 'a'} there, .*'hash': 'b'} now"):
        train(tmp_path, training={"count": 20, "hash": "b"})
    train(tmp_path, training={"count": 20, "hash": "a"})


def test_a_loss_that_is_not_finite_stops_and_names_the_videos(tmp_path):
    with pytest.raises(FloatingPointError, match=r"epoch 2, step 3, .*'S'.*: row\d+, row\d+, row\d+, row\d+"):
        train(tmp_path, bad_at=(1, 2))


@pytest.mark.parametrize("clip", [0, 5])
def test_a_gradient_that_is_not_finite_reaches_neither_weights_nor_checkpoint(tmp_path, clip):
    options = OPTIONS | {"clip": clip}
    with pytest.raises(FloatingPointError, match=r"gradient is not finite at epoch 2, step 3, .*'S'.*: row\d+, row\d+, row\d+, row\d+$"):
        train(tmp_path, bad_gradient_at=(1, 2), options=options, save_sec=0)  # saves after every step
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 2) and all(torch.isfinite(w).all() for w in state["model"].values())
    resumed, _ = train(tmp_path, options=options)
    whole, _ = train(tmp_path / "whole", options=options)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(tmp_path):
    with pytest.raises(engine.Interrupted):
        train(tmp_path, stop_at=(1, 2))
    path, said = str(tmp_path / "checkpoint.pt"), []
    state = open(path, "rb").read()
    open(path, "wb").write(state[:len(state) // 2])
    assert engine.load_checkpoint(path, said.append)["epoch"] == 1 and "checkpoint.pt cannot be read" in said[0]
    resumed, _ = train(tmp_path)
    whole, _ = train(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
    for p in (path, f"{path}.previous"):
        open(p, "wb").write(b"torn")
    with pytest.raises(ValueError, match="neither .*checkpoint.pt"):
        engine.load_checkpoint(path, said.append)
    assert engine.load_checkpoint(str(tmp_path / "none.pt")) is None


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "sub/file"
    engine.write_aside(str(path), lambda f: f.write(b"old"))

    def fails(f):
        f.write(b"half")
        raise OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        engine.write_aside(str(path), fails)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path / "sub") == ["file"]


def test_learning_rate_schedules():
    step = [engine.lr_factor(e, 15, schedule="step", every=5, factor=0.5) for e in (0, 4.99, 5, 9, 10, 14.9)]
    assert step == [1, 1, 0.5, 0.5, 0.25, 0.25]
    cosine = [engine.lr_factor(e, 10, schedule="cosine", warmup=0.2) for e in (0, 1, 2, 6, 10)]
    assert cosine == pytest.approx([0.04, 0.52, 1, 0.5, 0])
    with pytest.raises(ValueError, match="schedule 'linear'"):
        engine.lr_factor(0, 1, schedule="linear")
    with pytest.raises(ValueError, match="optimizer 'lion'"):
        engine.make_optimizer([], optimizer="lion", lr=1, weight_decay=0)


def test_precision_of_a_forward_pass():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    conv, x = torch.nn.Conv1d(2, 2, 1), torch.randn(1, 2, 4)
    for precision, dtype in (("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with engine.start_process("cpu", precision).autocast():
            assert conv(x).dtype == dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no GPU here
        assert [bool(engine.autocast(cuda, p)._enabled) for p in engine.PRECISIONS] == ([True, False, True] if torch.cuda.is_available() else [False] * 3)
    with pytest.raises(ValueError, match="precision 'half': expected auto, float32, bfloat16"):
        engine.autocast(cpu, "half")


def test_two_gloo_processes_give_the_weights_of_one(tmp_path):
    """Real processes through torchrun; the gradients of a mean loss are averaged over ranks."""
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(f"""
        import sys; sys.path[:0] = [{os.path.dirname(__file__)!r}, {os.getcwd()!r}]
        import torch, engine, test_engine
        process = engine.start_process("cpu")
        model, (_, history) = test_engine.train({str(tmp_path)!r} + "/two", process=process)
        x = engine.mean_over_ranks(torch.tensor(float(process.rank)))
        seen = [b["name"] for b in engine.batches(test_engine.Rows(5), None, 2, test_engine.data.collate, name="x", process=process)]
        names = [None, None]
        torch.distributed.all_gather_object(names, sum(seen, []))
        normed, _ = test_engine.train({str(tmp_path)!r} + "/norm", process=process, make=lambda: torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)))
        norms = engine.gather(normed[0].running_mean, process)
        if process.is_main:
            torch.save({{"weights": [p.detach() for p in model.parameters()], "mean": x, "names": names[0] + names[1], "norms": norms}}, {str(tmp_path)!r} + "/out.pt")
    """))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)], check=True, timeout=120,
                   capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    out, (model, _) = torch.load(tmp_path / "out.pt"), train(tmp_path / "one")
    for a, b in zip(out["weights"], model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert out["mean"] == 0.5 and sorted(out["names"]) == [f"row{i}" for i in range(5)]  # each sample once
    saved = torch.load(tmp_path / "norm/checkpoint.pt")["model"]["0.running_mean"]  # each process saw other rows, and all go on with the saved statistics
    assert out["norms"][0].any() and all(torch.equal(n, saved) for n in out["norms"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere only the operating system's own measure is there")
def test_peak_memory_on_a_cpu_is_not_that_of_the_program_that_started_the_process():
    child = "import torch, engine; print(engine.peak_memory_gb(torch.device('cpu')))"
    large = f"import subprocess, sys; held = b'x' * (1 << 30); sys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode)"
    found = [float(subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(engine.__file__), check=True, capture_output=True, text=True).stdout) for code in (child, large)]
    assert 0.05 < found[0] < 0.85 and found[1] == pytest.approx(found[0], rel=0.2)
