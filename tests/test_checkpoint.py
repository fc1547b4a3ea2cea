"""checkpoint.py and the training loop around it, on a linear problem and in real processes."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import torch
from processes import Process, start_ranks

import checkpoint
import data
import evaluate
import lofi_tal
import tsm
from config import INPUT_ERRORS, Config
from localizer import Distributed
from media import InputError

ALONE = Distributed(0, 1, torch.device("cpu"))
FIDELITY = [data.Fidelity("S", 1, 1)]
OPTIONS = {
    "epochs": 4,
    "batch_size": 4,
    "optimizer": "sgd",
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-3,
    "schedule": "step",
    "lr_step_epochs": 2,
    "lr_gamma": 0.5,
}


class Rows(torch.utils.data.Dataset):
    """Points of a linear problem; with an epoch's random noise on each."""

    def __init__(self, n=20, mark="row"):
        self.x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
        self.videos = [data.Video(f"{mark}{i}", 1.0, np.zeros((0, 2)), ()) for i in range(n)]

    def __len__(self):
        return len(self.x)

    def __getitem__(self, pair):
        epoch, i = divmod(pair[0], len(self.x))
        generator = torch.Generator().manual_seed(data.seed_of(epoch, i))
        x = self.x[i] + 0.1 * torch.randn(3, generator=generator)
        return {"name": self.videos[i].name, "x": x, "y": self.x[i].sum()}


def linear():
    return torch.nn.Linear(3, 1)


def train(folder, at=None, make=linear, dataset=None, ddp=ALONE, workers=0, **changes):
    """Train make() in `folder`. at: {(epoch, step): action on the model, which may change a loss}.

    changes: of OPTIONS, and checkpoint_sec and tensorboard.
    """
    torch.manual_seed(0)
    model = make()
    fields = {"seed": 0, "out": str(folder), "data": Config(workers=workers), "log_every": 2}
    fields |= {"checkpoint_sec": 60, "tensorboard": False}
    cfg = Config({key: changes.pop(key, value) for key, value in fields.items()})
    actions = {data.seed_of(0, "test", *place): action for place, action in (at or {}).items()}

    def step(net, batch, generator):
        loss = (net(batch["x"])[:, 0] - batch["y"]).square().mean()
        loss.backward()
        action = actions.get(generator.initial_seed())
        factor = action(model) if action else None
        return {"loss": loss.detach() * (factor or 1)}

    dataset = dataset or Rows()
    options = OPTIONS | changes
    seconds = lofi_tal.train(model, dataset, FIDELITY, step, "test", options, cfg, ddp)
    return model, seconds


def terminate(model):
    os.kill(os.getpid(), signal.SIGTERM)


def spoil_gradient(model):
    model.bias.grad.fill_(math.inf)


def lines_of(folder):
    with open(f"{folder}/test/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def same_weights(one, two):
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    model, _ = train(folder)
    return model, lines_of(folder)


# ---------------------------------------------------------------------------------------- training


def test_training_writes_a_line_an_epoch(tmp_path, capsys, whole):
    model, seconds = train(tmp_path, workers=1)
    history = lines_of(tmp_path)
    assert same_weights(model, whole[0])  # the number of workers changes nothing
    assert history[-1]["loss"] < 0.3 < 1.8 < history[0]["loss"] and seconds > 0
    assert [r["epoch"] for r in history] == [1, 2, 3, 4]
    assert [r["lr"] for r in history] == [0.1, 0.1, 0.05, 0.05]
    assert all(r["videos_per_sec"] > 0 and r["peak_memory_gb"] > 0 for r in history)
    saved = checkpoint.load_checkpoint(f"{tmp_path}/test/checkpoint.pt")
    assert saved["history"] == history and saved["config"]["config"]["log_every"] == 2
    log = capsys.readouterr().out
    steps = [log.count(f", step {step}/5: fidelity S, lr ") for step in range(1, 6)]
    assert steps == [1, 4, 0, 4, 0] and log.count("/4: fidelity S, lr") == 4
    assert ", peak_memory_gb " in log.splitlines()[0]
    assert log.splitlines()[-1].endswith(", 00:00 left")


def test_the_log_tells_the_share_of_waiting_for_data_and_the_time_left(tmp_path, capsys):
    class Slow(Rows):
        def __getitem__(self, pair):
            time.sleep(0.02)
            return super().__getitem__(pair)

    with pytest.raises(SystemExit):
        train(tmp_path, {(0, 3): terminate}, dataset=Slow(), epochs=1000)
    line = capsys.readouterr().out.splitlines()[-2]
    minutes = re.search(r"test 1/1000, step 4/5: .*, (\d\d):\d\d left$", line)[1]
    assert 6 <= int(minutes) < 15  # 4996 steps of 4 rows
    train(tmp_path / "loader", dataset=Slow(), epochs=1)
    train(tmp_path / "step", {(0, 1): lambda model: time.sleep(0.4)}, epochs=1)
    assert lines_of(tmp_path / "step")[0]["data_wait"] < 0.3
    assert 0.7 < lines_of(tmp_path / "loader")[0]["data_wait"] <= 1


def test_tensorboard_has_the_numbers_of_the_log_once(tmp_path):
    module = "tensorboard.backend.event_processing.event_accumulator"
    EventAccumulator = pytest.importorskip(module).EventAccumulator
    with pytest.raises(SystemExit):
        train(tmp_path, {(1, 2): terminate}, tensorboard=True)
    path = tmp_path / "test/checkpoint.pt"
    os.replace(f"{path}.previous", path)  # as if killed: steps 6 to 8 come again
    train(tmp_path, tensorboard=True)
    events = EventAccumulator(f"{tmp_path}/test")
    events.Reload()
    scalars = {
        tag: {x.step: x.value for x in events.Scalars(tag)} for tag in events.Tags()["scalars"]
    }
    assert [x.step for x in events.Scalars("loss")] == [
        1,
        2,
        4,
        5,
        7,
        9,
        10,
        12,
        14,
        15,
        17,
        19,
        20,
    ]
    history = lines_of(tmp_path)
    assert scalars.keys() == history[0].keys() - {"epoch", "fidelity"} | {"hours_left"}
    for tag in scalars.keys() - {"hours_left"}:
        epochs = [scalars[tag][step] for step in (5, 10, 15, 20)]
        assert epochs == pytest.approx([record[tag] for record in history], rel=1e-6)
    assert scalars["hours_left"][4] > scalars["hours_left"][20] == 0


@pytest.mark.parametrize("place", [(0, 0), (1, 2), (2, 4), (3, 4)])
def test_a_stopped_run_resumes_to_the_same_weights_and_log(tmp_path, whole, place):
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, {place: terminate})
    assert stopped.value.code == 128 + signal.SIGTERM
    resumed, _ = train(tmp_path)
    assert same_weights(resumed, whole[0])
    drop = {"seconds", "videos_per_sec", "data_wait", "peak_memory_gb"}
    for one, two in zip(lines_of(tmp_path), whole[1], strict=True):
        assert {k: one[k] for k in one.keys() - drop} == {k: two[k] for k in two.keys() - drop}
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # handlers are put back


def test_the_seconds_of_all_starts_are_added_up(tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path, {(1, 2): lambda model: time.sleep(0.5) or terminate(model)})
    assert train(tmp_path)[1] > 0.5


def test_training_does_not_resume_on_other_data(tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path, {(1, 2): terminate})
    with pytest.raises(InputError, match=r"checkpoint.pt was trained on other data: .*'count': 20"):
        train(tmp_path, dataset=Rows(mark="other"))
    train(tmp_path)


def test_a_loss_that_is_not_finite_stops_and_names_the_videos(tmp_path):
    pattern = r"test 2/4, step 3, S: loss nan.*not finite\n.*: row\d+, row\d+, row\d+, row\d+;"
    with pytest.raises(InputError, match=pattern):
        train(tmp_path, {(1, 2): lambda model: math.nan})


@pytest.mark.parametrize("clip_grad_norm", [0, 5])
def test_a_gradient_that_is_not_finite_reaches_no_weights(tmp_path, clip_grad_norm):
    clip = {"clip_grad_norm": clip_grad_norm}
    with pytest.raises(InputError, match=r"test 2/4, step 3, .*gradient norm inf .*\n.*row\d+"):
        train(tmp_path, {(1, 2): spoil_gradient}, checkpoint_sec=0, **clip)  # saves each step
    state = torch.load(tmp_path / "test/checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 2)
    assert all(torch.isfinite(w).all() for w in state["model"].values())
    resumed, _ = train(tmp_path, **clip)
    undisturbed, _ = train(tmp_path / "whole", **clip)
    assert same_weights(resumed, undisturbed)


def test_the_gradient_norm_is_clipped(tmp_path):
    options = {"clip_grad_norm": 1e-3, "epochs": 1, "momentum": 0, "weight_decay": 0}
    model, _ = train(tmp_path, **options)
    torch.manual_seed(0)
    moved = [a - b for a, b in zip(model.parameters(), linear().parameters(), strict=True)]
    assert 4e-4 < torch.nn.utils.get_total_norm(moved) < 5.001e-4  # 5 steps at lr 0.1
    assert lines_of(tmp_path)[0]["gradient_norm"] > 0.5  # before clipping


def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(tmp_path, whole, capsys):
    with pytest.raises(SystemExit):
        train(tmp_path, {(1, 2): terminate})
    path = tmp_path / "test/checkpoint.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    log = []
    assert checkpoint.load_checkpoint(path, log.append)["epoch"] == 1
    assert "checkpoint.pt cannot be read" in log[0]
    resumed, _ = train(tmp_path)
    assert "checkpoint.pt cannot be read" in capsys.readouterr().out
    assert same_weights(resumed, whole[0])
    for torn in (path, f"{path}.previous"):
        with open(torn, "wb") as file:
            file.write(b"torn")
    with pytest.raises(InputError, match=r"checkpoint\.pt can be read"):
        checkpoint.load_checkpoint(path, log.append)
    assert checkpoint.load_checkpoint(tmp_path / "none.pt") is None


@pytest.mark.parametrize(
    "change", [{"model": {}}, {"optimizer": {}}, {"epoch": "x"}, {"sums": 3}, {"seconds": None}]
)
def test_a_foreign_checkpoint_is_named(change, tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path, {(1, 2): terminate})
    path = f"{tmp_path}/test/checkpoint.pt"
    torch.save(checkpoint.load_checkpoint(path) | change, path)
    with pytest.raises(InputError, match=r"not a checkpoint of this training \(.*\); remove it"):
        train(tmp_path)


@pytest.mark.parametrize(
    "slot",
    [torch.zeros(2), [0.0], torch.zeros(1).to_sparse(), torch.tensor([torch.nan]), "lost"],
)
def test_the_state_of_another_optimizer_is_named(slot, tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path, {(1, 2): terminate})
    path = f"{tmp_path}/test/checkpoint.pt"
    saved = checkpoint.load_checkpoint(path)
    slots = saved["optimizer"]["state"][1]  # of the bias, (1,)
    assert slots.pop("momentum_buffer").shape == (1,)
    slots |= {} if isinstance(slot, str) else {"momentum_buffer": slot}
    torch.save(saved, path)
    with pytest.raises(InputError, match="not a checkpoint of this training"):
        train(tmp_path)


def test_json_that_is_no_object_is_named(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(INPUT_ERRORS, match=r"list\.json: expected content as a JSON object"):
        checkpoint.load_json(f"{tmp_path}/list.json")
    for text in ('{"seconds": [1]}', "{}", '{"seconds": "5"}'):
        (tmp_path / "seconds.json").write_text(text)
        assert 0 <= checkpoint.Stopwatch(f"{tmp_path}/seconds.json").save() < 60


def test_a_full_disk_is_one_line(tmp_path):
    def write(file):
        torch.save({"x": torch.zeros(10**6)}, Full(file))

    class Full:
        def __init__(self, file):
            self.file = file
            self.left = 100_000

        def write(self, content):
            self.left -= len(content)
            if self.left < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(content)

        def flush(self):
            self.file.flush()

    with pytest.raises(evaluate.InputError, match=r"x\.pt cannot be written"):
        checkpoint.write_atomic(f"{tmp_path}/x.pt", write)
    assert os.listdir(tmp_path) == []


def normed():
    torch.manual_seed(0)
    layers = [torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)]
    return torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(4, 1))


def test_two_gloo_processes_give_the_weights_of_one(tmp_path, whole):
    """The gradients of a mean loss are averaged over ranks."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path[:0] = [{os.path.dirname(__file__)!r}, {os.getcwd()!r}]
        import torch
        import data, lofi_tal, test_checkpoint
        from config import Config

        out = {str(tmp_path)!r}
        ddp = lofi_tal.setup_distributed(Config(device="cpu", precision="auto"))
        model, _ = test_checkpoint.train(out + "/two", ddp=ddp)
        mean = ddp.mean_of({{"rank": ddp.rank}})
        batches = data.iterate(test_checkpoint.Rows(5), None, 2, **ddp.place)
        names = sum((batch["name"] for batch in batches), [])

        norm, _ = test_checkpoint.train(out + "/norm", ddp=ddp, make=test_checkpoint.normed)
        norms = ddp.gather(norm[0].running_mean)
        found = {{"weights": model.state_dict(), "mean": mean, "norms": norms}}
        found["names"] = sum(ddp.gather(names), [])
        if ddp.is_main:
            torch.save(found, out + "/out.pt")
        torch.distributed.destroy_process_group()
    """)
    )
    for rank in start_ranks([script], [script]):
        assert rank.wait() == 0, rank.read(2)
    out = torch.load(tmp_path / "out.pt")
    for name, value in whole[0].state_dict().items():
        torch.testing.assert_close(out["weights"][name], value, rtol=1e-5, atol=1e-6)
    assert out["mean"] == {"rank": 0.5}
    assert sorted(out["names"]) == [f"row{i}" for i in range(5)]  # each sample once
    # Each process saw other rows, and all have the statistics of one process.
    saved = torch.load(tmp_path / "norm/test/checkpoint.pt")["model"]
    assert all(torch.equal(norm, saved["0.running_mean"]) for norm in out["norms"])
    for name, value in train(tmp_path / "one", make=normed)[0].state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-6)


def test_learning_rate_schedules():
    step = {"lr": 2.0, "schedule": "step", "lr_step_epochs": 5, "lr_gamma": 0.5, "epochs": 15}
    rates = [checkpoint.learning_rate(step, e) for e in (0, 4.99, 5, 9, 10, 14.9)]
    assert rates == [2, 2, 1, 1, 0.5, 0.5]
    cosine = {"lr": 1.0, "schedule": "cosine", "warmup_fraction": 0.2, "epochs": 10}
    rates = [checkpoint.learning_rate(cosine, e) for e in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0.04, 0.52, 1, 0.5, 0])
    assert checkpoint.learning_rate({"lr": 0.3, "schedule": "constant"}, 7.5) == 0.3


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_the_optimizer_of_a_config_block(name):
    model = linear()
    model.bias.requires_grad_(False)
    optimizer = checkpoint.build_optimizer(model, OPTIONS | {"optimizer": name})
    (group,) = optimizer.param_groups
    assert type(optimizer).__name__.lower() == name and group["weight_decay"] == 1e-3
    assert group["params"] == [model.weight] and group.get("momentum", 0.9) == 0.9
    assert group["lr"] == 0.1 and not group["fused"]

    class OnGPU(torch.nn.Parameter):
        is_cuda = True

    model.weight = OnGPU(model.weight.detach())
    (group,) = checkpoint.build_optimizer(model, OPTIONS | {"optimizer": name}).param_groups
    assert group["fused"]


# ------------------------------------------------------------------------------------------- files


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "sub/file"
    checkpoint.write_atomic(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(evaluate.InputError, match=r"sub/file cannot be written: disk full"):
        checkpoint.write_atomic(path, fail)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path / "sub") == ["file"]
    with pytest.raises(evaluate.InputError, match=r"file/below cannot be written: "):
        checkpoint.save_json({}, f"{path}/below")


def test_json_and_weights_come_back_or_are_named(tmp_path):
    checkpoint.save_json({"a": [1, None]}, f"{tmp_path}/x.json")
    assert checkpoint.load_json(f"{tmp_path}/x.json") == {"a": [1, None]}
    for name, text in {"bad": "{", "deep": "[" * 99999, "twice": '{"a": 1, "a": 2}'}.items():
        (tmp_path / f"{name}.json").write_text(text)
        with pytest.raises(evaluate.InputError, match=f"{name}.json cannot be read as JSON"):
            checkpoint.load_json(f"{tmp_path}/{name}.json")
    with pytest.raises(evaluate.InputError, match=r"none\.json"):
        checkpoint.load_json(f"{tmp_path}/none.json")
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(2**31 + 1)
    with pytest.raises(evaluate.InputError, match=r"large\.json .*it has 2147483649 bytes"):
        checkpoint.load_json(f"{tmp_path}/large.json")

    model = linear()
    checkpoint.save_weights(model, f"{tmp_path}/x.pt", encoder={"depth": 18}, seconds=7.5)
    saved = tsm.load_state(f"{tmp_path}/x.pt")
    assert torch.equal(saved["model"]["weight"], model.weight) and saved["encoder"] == {"depth": 18}
    assert checkpoint.seconds_of(f"{tmp_path}/x.pt") == 7.5
    assert [checkpoint.seconds_of(other) for other in (None, "torchvision", "none.pt")] == [0] * 3
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "torn.pt").write_bytes(b"torn")
    for name in ("none", "list", "torn"):
        with pytest.raises(tsm.InputError, match=f"{name}.pt cannot be read"):
            tsm.load_state(f"{tmp_path}/{name}.pt")


def test_only_parts_of_dead_processes_are_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    ours = ["features/v.npy", "sola/features/v.npy", "config.json", "lofi/metrics.jsonl"]
    ours += ["pretrain/acp/checkpoint.pt", "head/lr_0.1/result.json", "features/features.json"]
    # Somebody else's, in the same folders.
    others = ["thesis.doc", "v.npz", "features/film.zip", "film.mp4"]
    stays = [f"features/w.npy.part-{os.getpid()}", "features/x.part-y", "features/y.npy"]
    stays += [f"{name}.part-{dead.pid}" for name in others]
    for name in [*stays, *(f"{name}.part-{dead.pid}" for name in ours)]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    checkpoint.remove_stale_parts(tmp_path)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(tmp_path)) for path in left) == sorted(stays)


def test_a_flipped_bit_is_found(tmp_path):
    path = str(tmp_path / "encoder.pt")
    checkpoint.save_weights(torch.nn.Linear(64, 8), path)
    with open(path, "rb") as file:
        content = bytearray(file.read())
    weights = torch.load(path, weights_only=True)["model"]["weight"]
    first = content.find(weights.numpy().tobytes())
    for at in range(first, first + weights.nbytes, 97):
        content[at] ^= 4
        with open(path, "wb") as file:
            file.write(content)
        content[at] ^= 4
        with pytest.raises(tsm.InputError, match="cannot be read"):
            tsm.load_state(path)
        with pytest.raises(tsm.InputError, match="cannot be read"):
            tsm.load_weights(tsm.TSM(width=8), path)


def test_files_are_known_by_their_content(tmp_path):
    paths = [f"{tmp_path}/{i}.npy" for i in range(3)]
    for i, path in enumerate(paths):
        np.save(path, np.full(4, i))
    before = checkpoint.files_fingerprint(paths)
    assert before["count"] == 3 and checkpoint.files_fingerprint(paths[:2])["count"] == 2
    os.utime(paths[1], (1, 1))
    assert checkpoint.files_fingerprint(paths) == before
    np.save(paths[1], np.full(4, 7))
    assert checkpoint.files_fingerprint(paths)["content"] != before["content"]
    assert checkpoint.files_fingerprint([])["count"] == 0


def test_a_folder_has_one_process_at_a_time(tmp_path):
    code = f"import checkpoint\nrun = checkpoint.RunFolder({str(tmp_path)!r})\nrun.lock()\n"
    code += "print(1, flush=True)\nimport time\ntime.sleep(60)"
    read, write = os.pipe()
    other = Process("-c", code, stdout=write)
    os.close(write)
    with open(read) as lines:
        assert lines.readline() == "1\n"
    with pytest.raises(InputError, match=f"in use by process {other.pid} on "):
        checkpoint.RunFolder(tmp_path).lock()
    other.kill()
    other.wait()
    run = checkpoint.RunFolder(tmp_path)
    run.lock()
    assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()


def test_the_log_of_a_run_killed_before_its_last_line_is_completed(tmp_path):
    train(tmp_path)
    history = lines_of(tmp_path)
    with open(f"{tmp_path}/test/metrics.jsonl", "w") as file:
        file.write(json.dumps(history[0]) + "\n")
    train(tmp_path)
    assert lines_of(tmp_path) == history


def test_a_stopwatch_goes_on_where_it_was_killed(tmp_path):
    path = f"{tmp_path}/seconds.json"
    checkpoint.save_json({"seconds": 100.0}, path)
    seconds = checkpoint.Stopwatch(path).save()
    assert 100 < checkpoint.load_json(path)["seconds"] == seconds < 110
    assert checkpoint.Stopwatch(f"{tmp_path}/none.json", write=False).save() < 10
    assert os.listdir(tmp_path) == ["seconds.json"]


# --------------------------------------------------------------------------------- signals, machine


def test_a_signal_is_noted_or_raised_at_once():
    with pytest.raises(SystemExit) as stopped, checkpoint.StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
    assert stopped.value.code == 130
    with pytest.raises(KeyboardInterrupt), checkpoint.StopSignals(defer=False):
        with pytest.raises(SystemExit), checkpoint.StopSignals():  # as training in a program
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    for thread in threading.enumerate():
        if "_watch" in thread.name:
            thread.join(5)
            assert not thread.is_alive()


def test_the_second_signal_ends_a_process_that_waits_outside_python():
    """As in a collective, Python gets no turn in a lock that its own thread holds."""
    code = """
        import ctypes, checkpoint
        lock = ctypes.CDLL(None).pthread_mutex_lock
        mutex = ctypes.create_string_buffer(128)
        with checkpoint.StopSignals(defer=False):
            print("ready", flush=True)
            lock(mutex)
            lock(mutex)
    """
    read, write = os.pipe()
    process = Process("-c", textwrap.dedent(code), stdout=write)
    os.close(write)
    with open(read) as lines:
        lines.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM


# Without torchcodec, whose import takes seconds.
SMALL = "import sys, types, torch; sys.modules['media'] = types.SimpleNamespace(InputError=1);"
SMALL += "import checkpoint; print(checkpoint.peak_memory_gb(torch.device('cpu')))"
LARGE = "held = b'x' * (1 << 30)\nimport subprocess, sys\n"
LARGE += f"subprocess.run([sys.executable, '-c', {SMALL!r}], check=True)"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has VmHWM")
@pytest.mark.beside("-c", LARGE)
def test_peak_memory_is_not_that_of_the_program_that_started_the_process(beside):
    assert beside.returncode == 0, beside.read(2)
    assert 0.05 < float(beside.read(1)) < 0.85
