"""config.py: reading, checking, and the folder of a run."""

import argparse
import glob
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from processes import Process

import bmn
import checkpoint
import config
import data
import evaluate
import gtad
import localizer
import lofi_tal
import tsm
import video_encoders
from config import load_config
from localizer import Distributed
from media import InputError

ALONE = Distributed(0, 1, torch.device("cpu"))
CONFIGS = sorted(glob.glob("configs/*.yaml"))


def toy(*overrides):
    return load_config("configs/toy.yaml", overrides)


# ----------------------------------------------------------------------------------------- reading


def test_files_change_the_defaults_and_overrides_change_both(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("seed: 3\nlofi: {lr: 0.5}\n")
    cfg = load_config(path, ["lofi.fidelities=[T]", "pretrain.acp.epochs=2"])
    assert (cfg.seed, cfg.lofi.lr, cfg.lofi.momentum) == (3, 0.5, 0.0)
    assert cfg.lofi.fidelities == ["T"] and cfg.pretrain.acp.epochs == 2
    assert load_config(path).lofi.fidelities == ["S", "T", "ST"]  # nothing sticks to the defaults
    path.write_text("")
    assert load_config(path) == load_config("configs/default.yaml")


def test_an_override_has_the_kind_of_its_default():
    cfg = toy("lofi.lr=1e-4", "lofi.weight_decay=2E-3", "out=5", "data.val_subset=2024-01-15")
    assert cfg.lofi.lr == 1e-4 and isinstance(cfg.lofi.lr, float) and cfg.lofi.weight_decay == 2e-3
    assert (cfg.out, cfg.data.val_subset) == ("5", "2024-01-15")
    assert toy("data.features=[a,b]").data.features == ["a", "b"]  # null may become a list
    assert load_config("configs/thumos14.yaml", ["data.features=[a]"]).data.features == ["a"]
    assert toy("pretrain.pretrained=null", "detect.class_scores=x=y").detect.class_scores == "x=y"
    assert toy("lofi={epochs: 3}").lofi.epochs == 3 and toy("lofi={epochs: 3}").lofi.lr == 1e-3
    with pytest.raises(AttributeError, match="no key lrr"):
        _ = cfg.lofi.lrr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lofi.lrr=1", r"unknown config key lofi\.lrr; did you mean lofi\.lr\?"),
        ("sede=1", "did you mean seed"),
        ("lofi=1", "expected a block of keys"),
        ("lofi.lr.x=1", "expected a number"),
        ("data.features.x=1", "expected text"),
        ("lofi.lr", "expected key.sub=value"),
        ("lofi.fidelities=ST", "expected a list"),
        ("stages=null", "expected a list"),
        ("lofi.fidelities=[S", "not valid YAML"),
        ("lofi.lr=1e", "expected a number"),
        ("video.flip=3", "expected true or false"),
        ("lofi.epochs=true", "expected a number"),
        ("lofi={lr: 1, lr: 2}", "not valid YAML: duplicate key lr, line 1$"),
    ],
)
def test_wrong_overrides(override, message):
    with pytest.raises(InputError, match=message):
        toy(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gtad.durations=[8]", r"gtad.durations is \[8\], expected a number or null"),
        ("video.rate=fast", "video.rate is 'fast', expected a number"),
        ("data.features=5", "data.features is 5, expected text"),
        ("data.features=[a, 5]", "data.features .* expected text"),
        ("data.durations=2024-01-15", "data.durations .* expected text"),
        ("stages=[[head]]", "stages .* expected a list, each text"),
        ("gtad.map_hidden=[8, a]", "gtad.map_hidden .* expected a list, each a number"),
        ("seed=!!bool x", "not valid YAML"),
        ("seed=!!timestamp x", "not valid YAML"),
    ],
)
def test_values_of_another_kind_where_the_default_is_null_or_a_list(override, message):
    with pytest.raises(InputError, match=message):
        toy(override)


def test_null_a_path_or_paths_are_possible_where_the_default_is_null():
    assert toy("data.features=[a, b]").data.features == ["a", "b"]
    assert toy("data.features=a", "gtad.durations=8").gtad.durations == 8
    assert toy("data.durations=null", "gtad.durations=null").gtad.durations is None


def test_letters_that_a_terminal_cannot_show_are_no_reason_to_fail():
    code = "import config\nwith config.one_line_errors('x'):\n    print(chr(0xd800))"
    process = Process("-c", code)
    assert process.communicate() == ("?\n", "") and process.returncode == 0


def test_an_error_is_shortened():
    with pytest.raises(SystemExit) as stopped, config.one_line_errors("x"):
        raise InputError("y" * 10**5)
    assert len(stopped.value.code) < 3100


def test_wrong_files(tmp_path):
    with pytest.raises(InputError, match=r"no config file .*none\.yaml"):
        load_config(tmp_path / "none.yaml")
    texts = {
        "a: [": "not valid YAML: .*, line 1$",
        "just words": "is a str, expected keys and values",
        "lofi: {lr: 1}\nlofi: {epochs: 2}": "YAML: duplicate key lofi, line 2$",
        "out: 2024-01-15": "key out .*text in quotes",
    }
    for text, message in texts.items():
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            load_config(tmp_path / "bad.yaml")


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_has_possible_values(path, tmp_path):
    with pytest.raises(InputError, match="no annotation file"):  # all that is wrong with it
        config.check(load_config(path, [f"out={tmp_path}/x", "data.annotations=none.json"]))


@pytest.mark.parametrize("path", ["configs/anet13.yaml", "configs/hacs.yaml"])
def test_the_papers_recipe(path):
    """LoFi, sections 3.3 and 4.3."""
    cfg = load_config(path)
    video = {"snippets": 100, "size": 224, "frames_per_snippet": 8, "stride": 8}
    optimizer = {"optimizer": "sgd", "lr": 0.1, "momentum": 0, "weight_decay": 1e-4}
    schedule = {"batch_size": 16, "schedule": "step", "lr_step_epochs": 5, "lr_gamma": 0.5}
    cycle = {"fidelities": ["S", "T", "ST"], "cycle": "epoch", "cycle_length": None}
    assert video.items() <= cfg.video.items()
    assert {**optimizer, **schedule, **cycle}.items() <= cfg.lofi.items()
    assert config.run_fidelities(cfg)["ST"] == data.Fidelity("ST", 50, 158)
    assert cfg.fidelities == {"S": [100, 112], "T": [25, 224], "ST": [50, 158]}
    assert (cfg.encoder.name, cfg.encoder.depth, cfg.encoder.width) == ("tsm", 18, 64)
    assert cfg.detect.sigma == 0.84 and cfg.detect.top_k == 100
    assert cfg.detect.classes_per_video == (1 if "hacs" in path else 2)
    assert cfg.head.lr == [0.0002, 0.0005, 0.001, 0.002, 0.005]
    assert cfg.head.batch_size == (32 if "hacs" in path else 16)


def test_recipes_of_other_heads_and_data():
    bmn = load_config("configs/anet13_bmn.yaml")
    assert (bmn.tal_head, bmn.detect.sigma, bmn.detect.decay_above) == ("bmn", 0.4, [0.5, 0.9])
    assert (bmn.head.epochs, bmn.head.lr, bmn.head.lr_step_epochs) == (9, 1e-3, 7)
    thumos = load_config("configs/thumos14.yaml")
    head = {"lr": 4e-5, "batch_size": 8, "clip_grad_norm": 1.0, "epochs": 10, "optimizer": "adam"}
    assert head.items() <= thumos.head.items() and thumos.loss.regression == 10
    sizes = {"durations": 64, "kernel": 3, "bin_width": 1.0, "every_pair": True, "longest": 59}
    assert sizes.items() <= thumos.gtad.items() and thumos.data.window_overlap == [0.9, 0.0]
    assert thumos.detect.window_nms and (thumos.detect.sigma, thumos.detect.top_k) == (0.46, 200)


def test_sola_is_the_published_setting_where_it_says_so():
    published = {
        "subsequence": 23,
        "positions": [4, 6, 8, 10, 12, 14, 16, 18],
        "similarity_coefficient": 16,
        "hidden": 512,
        "kernel": 5,
        "standardize": False,
        "subsequences_per_video": 1,
        "epochs": 150,
        "batch_size": 256,
        "optimizer": "adamw",
        "lr": 1e-4,
        "schedule": "constant",
    }
    hacs = load_config("configs/sola_hacs_i3d.yaml")
    assert published.items() <= hacs.sola.items() and hacs.stages == ["sola", "head", "detect"]
    sola_toy = load_config("configs/sola_toy.yaml")
    for key in ("data", "video", "encoder", "gtad", "bmn", "features", "sola", "head", "detect"):
        assert sola_toy[key] == toy()[key], key
    assert sola_toy.pretrain.acp == toy().pretrain.acp


def test_every_key_is_read_by_something():
    """Each is named in the code, or an argument of what its block mirrors."""
    code = ""
    for path in glob.glob("*.py"):
        with open(path) as file:
            code += file.read()
    mirrored = {
        "gtad": [gtad.GTAD],
        "bmn": [bmn.BMN],
        "video": [data.VideoDataset],
        "encoder": [localizer.build_encoder, tsm.TSM, video_encoders.VideoEncoder],
    }
    for key in config.flatten(load_config("configs/default.yaml")):
        block, _, leaf = key.rpartition(".")
        if block in mirrored:
            arguments = [set(inspect.signature(f).parameters) for f in mirrored[block]]
            assert leaf in set.union(*arguments), key
        elif block == "loss":
            assert f'"{leaf}"' in inspect.getsource(gtad.losses), key
        elif block != "fidelities" and leaf not in ("train_subset", "val_subset"):
            assert f".{leaf}" in code or f'"{leaf}"' in code, key


# ---------------------------------------------------------------------------------------- checking


@pytest.mark.parametrize(
    "override",
    [
        "stages=[]",
        "stages=[lofy]",
        "stages=[[lofi]]",
        "out=",
        "device=gpu",
        "precision=half",
        "precision=16",
        "seed=1.5",
        "data.windows=true",
        "data.window_overlap=[0.5, 1.5]",
        "fidelities.S=[100, 20]",
        "fidelities.S=[1]",
        "fidelities.S=[0, 1]",
        "fidelities.S=[1.5, 3]",
        "tal_head=afsd",
        "gtad.kernel=2",
        "gtad.map_hidden=[64]",
        "gtad.map_hidden=[64, -1]",
        "gtad.gcn_groups=5",
        "gtad.context_bins=0",
        "gtad.stem_groups=3",
        "bmn.map_hidden=[]",
        "bmn.groups=3",
        "video.crop=1.25",
        "data.frames=",
        "gtad.durations=0",
        "pretrain.acp.batch_size=0",
        "lofi.fidelities=[X]",
        "lofi.fidelities=[[S]]",
        "lofi.cycle=long",
        "lofi.cycle_length=1.5",
        "lofi.chunk_snippets=-3",
        "lofi.chunk_snippets=2.5",
        "lofi.batchnorm=none",
        "lofi.epochs=2.5",
        "lofi.optimizer=lion",
        "lofi.lr=.inf",
        "lofi.lr_step_epochs=0",
        "lofi.clip_grad_norm=-1",
        "features.chunk_snippets=0",
        "sola.positions=[4]",
        "sola.positions=[4, 23]",
        "sola.kernel=4",
        "sola.subsequences_per_video=0",
        "head.schedule=linear",
        "head.lr=[]",
        "head.lr=[0.1, 0]",
        "detect.sigma=0",
        "detect.decay_above=[0.5]",
        "detect.decay_above=[0.5, 2]",
        "gtad.longest=0",
        "detect.top_k=0",
        "detect.decay=soft",
        "detect.decay_above=[50, 50]",
        "detect.voting=75",
        "detect.min_score=-1",
        "detect.tiou_thresholds=[]",
        "detect.tiou_thresholds=[5]",
    ],
)
def test_a_value_that_no_run_can_work_with_is_named_with_its_key(override, tmp_path):
    key = re.escape(override.partition("=")[0])
    with pytest.raises(InputError, match=rf"{key} is .*, expected"):
        config.check(toy(f"out={tmp_path}/x", override))


def test_whole_numbers_are_integers_or_refused():
    """10.0 epochs are none of `range`'s."""
    try:
        assert isinstance(toy("lofi.epochs=1e1").lofi.epochs, int)
        assert isinstance(toy("lofi.batch_size=16.0").lofi.batch_size, int)
    except InputError as error:
        assert "lofi.epochs" in str(error)


def test_messages_tell_what_to_do():
    with pytest.raises(InputError, match=r"'lion', expected .*sgd, adam, adamw"):
        config.check(toy("lofi.optimizer=lion"))
    with pytest.raises(InputError, match=r"not lofi or features if data\.features is set"):
        config.check(toy("data.features=x"))
    with pytest.raises(InputError, match=r"no annotation file none\.json.*tools\.make_toy"):
        config.check(toy("data.annotations=none.json"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(InputError, match="torch finds no GPU"):
        config.check(toy("device=cuda"))


def test_channels_that_do_not_divide_are_named():
    for head, groups in {"gtad": "stem_groups", "bmn": "groups"}.items():
        key = f"{head}.{groups}"
        with pytest.raises(InputError, match=rf"{key} is \d, expected a divisor of 11, "):
            config.head_options(toy(f"tal_head={head}"), 11)
        assert config.head_options(toy(f"tal_head={head}", f"{key}=1"), 11)["channels"] == 11


def test_tensorboard_that_is_not_there_is_missed_at_the_start(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    install = r"tensorboard is True, expected false.*pip install -e '\.\[tensorboard\]'"
    with pytest.raises(InputError, match=install):
        config.check(toy("tensorboard=true"))


@pytest.mark.parametrize("key", ["lofi.accumulate=2", "lofi.chunk_snippets=3"])
def test_batchnorm_that_trains_needs_the_whole_batch(key):
    with pytest.raises(InputError, match=r"lofi\.batchnorm is 'train', expected frozen"):
        config.check(toy("lofi.batchnorm=train", key))


def test_batches_that_do_not_divide_are_found_before_the_first_stage(tmp_path, monkeypatch):
    def check(*overrides):
        with pytest.raises(InputError) as raised:  # without annotations the end of all checks
            common = [f"out={tmp_path}/run", "data.annotations=none.json", "lofi.batch_size=8"]
            config.check(toy(*common, "sola.batch_size=64", "head.batch_size=12", *overrides))
        return str(raised.value)

    assert "lofi.batch_size is 8" in check("lofi.accumulate=3")
    assert "no annotation file" in check("lofi.accumulate=2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "no annotation file" in check()  # of something else: torchrun sets RANK, too
    monkeypatch.setenv("RANK", "0")
    assert "RANK is set, but not all that torchrun sets" in check()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert "lofi.batch_size is 8, expected a multiple of 3" in check()
    os.makedirs(tmp_path / "run/lofi")
    (tmp_path / "run/lofi/encoder.pt").touch()  # what is done needs no batches
    assert "pretrain.acp.batch_size is 32" in check("pretrain.method=acp_plus_background")
    (tmp_path / "run/pretrain").mkdir()
    (tmp_path / "run/pretrain/encoder.pt").touch()
    (tmp_path / "run/pretrain/encoder.pt").touch()
    assert "no annotation file" in check()
    assert "sola.batch_size is 64" in check("stages=[lofi, features, sola]")


# -------------------------------------------------------------------------------------- run folder


def test_a_run_belongs_to_one_config(tmp_path):
    out = f"out={tmp_path}/run"

    def open_run(*overrides):
        return config.open_run(toy(out, *overrides), ALONE)

    assert open_run().path == f"{tmp_path}/run"
    with open(tmp_path / "run/versions.json") as file:
        versions = json.load(file)
    assert versions["processes"] == 1 and versions["torch"] and "git" in versions
    open_run("lofi.lr=0.3")  # nothing came of the first start
    (tmp_path / "run/lofi").mkdir()
    (tmp_path / "run/lofi/inputs.json").write_text('{"encoder": "0"}')
    (tmp_path / "run/lofi/events.out.tfevents.1.host.2.0").touch()
    open_run("lofi.lr=0.4")  # nor of this, for all its curves
    open_run("stages=[pretrain]")
    (tmp_path / "run/pretrain").mkdir()
    (tmp_path / "run/pretrain/encoder.pt").touch()
    open_run("data.workers=5")  # changes no number; more stages go on from there
    open_run("stages=[pretrain]")
    stages = ["pretrain", "lofi", "features", "head", "detect"]
    assert config.saved_config(tmp_path / "run").stages == stages  # not forgotten
    message = r"different config:\n  lofi\.lr: [\d.]+ there, 0\.2 now\n  seed: 0 there, 4 now\n"
    with pytest.raises(InputError, match=message):
        open_run("lofi.lr=0.2", "seed=4")
    # What only changes time and memory, and another spelling of the folder.
    cost = ["lofi.chunk_snippets=4", "lofi.accumulate=2", "encoder.recompute=true"]
    open_run(*cost, "features.chunk_snippets=8", f"{out}/")
    for stages in ("[pretrain, features]", "[pretrain, lofi, features, head, sola]"):
        with pytest.raises(InputError, match="stages"):
            open_run(f"stages={stages}")
    with pytest.raises(InputError, match=r"config\.json .*No such file.*name the folder of a"):
        config.saved_config(tmp_path)


def test_a_moved_run_is_the_same_run(tmp_path):
    config.open_run(toy(f"out={tmp_path}/run"), ALONE)
    (tmp_path / "run/pretrain").mkdir()
    (tmp_path / "run/pretrain/encoder.pt").touch()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    run = config.open_run(toy(f"out={tmp_path}/moved"), ALONE)
    assert run.encoder("lofi") == f"{tmp_path}/moved/lofi/encoder.pt"
    assert config.encoder_path(toy(), run) == run.encoder("lofi")
    assert config.encoder_path(toy(), run, "lofi") == run.encoder("pretrain")
    assert config.encoder_path(toy("pretrain.pretrained=x.pt", "stages=[features]"), run) == "x.pt"
    with pytest.raises(InputError, match=r"pretrain\.pretrained"):
        config.encoder_path(toy("stages=[features]"), run)


@pytest.mark.parametrize("more", ["lofi", "sola"])
def test_a_stage_cannot_be_put_before_those_that_are_done(more):
    """Stages run in their own order, however they are listed."""
    done = toy("stages=[pretrain, features, head, detect]")
    with_more = toy(f"stages=[pretrain, features, head, detect, {more}]")
    assert "stages" in config.differences(done, with_more)[0]
    assert not config.differences(toy("stages=[features, pretrain]"), done)


def test_what_only_costs_time_counts_where_it_is_asked_for():
    cheap = ["features.chunk_snippets=8", "lofi.chunk_snippets=4", "data.workers=3"]
    assert not config.differences(toy(), toy(*cheap))
    lines = config.differences(toy(), toy(*cheap), config.FREE_KEYS)
    keys = [line.split(":")[0].strip() for line in lines]
    assert keys == ["features.chunk_snippets", "lofi.chunk_snippets"]
    # The statistics of BatchNorm are of so many snippets.
    word = "lofi.batchnorm=recalibrate"
    lines = config.differences(toy(word), toy(word, "features.chunk_snippets=8"))
    assert lines == ["  features.chunk_snippets: 32 there, 8 now"]


def test_of_many_differences_nine_are_shown():
    keys = [f"{block}.{key}" for block in ("lofi", "head", "sola") for key in ("lr", "epochs")]
    keys += [f"{block}.batch_size" for block in ("lofi", "head", "sola")]
    lines = config.differences(toy(), toy(*(f"{key}=77" for key in keys)))
    assert len(lines) == 9
    lines = config.differences(toy(), toy(*(f"{key}=77" for key in keys), "seed=77"))
    assert len(lines) == 10 and "more" not in lines[-1]
    lines = config.differences(
        toy(), toy(*(f"{key}=77" for key in [*keys, "seed", "detect.sigma"]))
    )
    assert len(lines) == 10 and lines[-1] == "  and 2 more keys"


def test_what_a_killed_start_was_writing_is_removed_in_our_own_folders_only(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "run").mkdir()
    old = tmp_path / f"run/metrics.json.part-{dead.pid}"
    own = tmp_path / f"run/result.json.part-{os.getpid()}"
    old.touch()
    own.touch()
    config.open_run(toy(f"out={tmp_path}/run"), ALONE)
    assert old.exists() and own.exists()  # the folder was somebody else's
    config.open_run(toy(f"out={tmp_path}/run"), ALONE)
    assert not old.exists() and own.exists()


@pytest.mark.parametrize("name", ["config.json", "metrics.json", "features"])
def test_a_folder_with_files_of_others_is_refused(name, tmp_path):
    (tmp_path / "run").mkdir()
    path = tmp_path / f"run/{name}"
    path.write_text('{"a": 1}')
    with pytest.raises(InputError, match=r"not the config of a run|config\.json does not"):
        config.open_run(toy(f"out={tmp_path}/run"), ALONE)
    assert path.read_text() == '{"a": 1}'


@pytest.mark.parametrize("content", ["[1]", '{"a": 1}', '{"encoder": 3}', "{nope"])
def test_a_foreign_config_of_a_run_is_named(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json (is not the config of|cannot be read)"):
        config.saved_config(tmp_path)


def test_a_few_lines_of_yaml_do_not_become_billions(tmp_path):
    lines = ["lofi:", "  fidelities: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    keys = ("epochs", "batch_size", "accumulate", "lr", "momentum", "weight_decay", "lr_gamma")
    for i, key in enumerate(keys):
        lines.append(f"  {key}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]")
    lines.append("stages: *a7")
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"key lofi\.epochs is .*, expected a number") as raised:
        config.load_config(tmp_path / "bomb.yaml")
    assert len(str(raised.value)) < 200


def test_what_the_last_stage_reads_is_read_before_the_first(tmp_path):
    segment = {"segment": [0, 1], "label": "jump"}
    database = {
        name: {"subset": subset, "duration": 2, "annotations": [segment]}
        for name, subset in {"a": "training", "b": "validation"}.items()
    }
    (tmp_path / "annotations.json").write_text(json.dumps({"database": database}))
    (tmp_path / "scores.json").write_text("{nope")
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.ones((9, 12), np.float32))
    sources = [f"data.annotations={tmp_path}/annotations.json", f"data.features={tmp_path}"]
    cfg = toy(*sources, "stages=[head, detect]", f"out={tmp_path}/run", "data.windows=false")
    assert config.check(cfg) == ["head", "detect"]
    cfg.detect["class_scores"] = f"{tmp_path}/scores.json"
    with pytest.raises(config.INPUT_ERRORS, match=r"scores\.json cannot be read"):
        config.check(cfg)


def test_segments_that_no_run_can_use_are_found_at_its_start(tmp_path):
    def check(*overrides, train=(1, 2), val=((1, 2),)):
        train = {"segment": train, "label": "x"}
        val = [{"segment": times, "label": "x"} for times in val]
        database = {"v": {"subset": "training", "duration": 9, "annotations": [train]}}
        database["w"] = {"subset": "validation", "duration": 9, "annotations": val}
        (tmp_path / "a.json").write_text(json.dumps({"database": database}))
        config.load_annotations.cache_clear()
        words = [f"data.annotations={tmp_path}/a.json", f"data.features={tmp_path}/f"]
        return config.check(toy(*words, f"out={tmp_path}/x", "stages=[head, detect]", *overrides))

    (tmp_path / "f").mkdir()
    for name in "vw":
        np.save(tmp_path / f"f/{name}.npy", np.ones((9, 12), np.float32))
    assert check() == check(val=()) == ["head", "detect"]
    with pytest.raises(InputError, match="subset training has no usable segment"):
        check(train=(5, 2))
    with pytest.raises(config.INPUT_ERRORS, match=r"video 'w', entry 0: .*2 finite"):
        check(val=[(math.nan, 3)])
    for override in ("head.lr=[0.1, 0.2]", "detect.class_scores=ground_truth"):
        with pytest.raises(InputError, match="subset validation has no segments"):
            check(override, val=())


def test_a_run_on_a_table_is_the_run_on_the_same_json(tmp_path):
    """Bit for bit, on features whose features.json has the durations."""
    rng = np.random.default_rng(0)
    database, rows, lengths = {}, ["video;start;end;label;subset"], {}
    for i in range(8):
        subset, seconds = ("fit" if i < 5 else "test"), 20.0 + i / 3
        times = [[1.25, 6.1], [8.0, 19.7]]
        actions = [{"segment": t, "label": f"class {(i + k) % 2}"} for k, t in enumerate(times)]
        database[f"v{i}"] = {"subset": subset, "duration": seconds, "annotations": actions}
        rows += [f"clips/v{i}.mp4;{a};{b};class {(i + k) % 2};" for k, (a, b) in enumerate(times)]
        rows[-1] += subset
        lengths[f"v{i}"] = {"duration_sec": seconds}
        np.save(tmp_path / f"v{i}.npy", rng.normal(size=(16, 8)).astype(np.float32))
    (tmp_path / "features.json").write_text(json.dumps({"videos": lengths}))
    (tmp_path / "a.json").write_text(json.dumps({"database": database}))
    (tmp_path / "a.csv").write_text("\n".join(rows).replace(".25", ",25"))
    words = ["stages=[head, detect]", f"data.features={tmp_path}", "data.workers=0"]
    words += ["data.train_subset=fit", "data.val_subset=test", "video.snippets=16"]
    words += ["gtad.stem_groups=1", "head.epochs=2", "head.batch_size=5"]
    results = []
    for kind in ("json", "csv"):
        out = f"{tmp_path}/{kind}"
        more = [f"out={out}", f"data.annotations={tmp_path}/a.{kind}"]
        lofi_tal.main(["--cfg", "configs/toy.yaml", "--set", *words, *more])
        metrics = checkpoint.load_json(f"{out}/metrics.json")
        metrics.pop("seconds"), metrics.pop("training")  # the latter counts durations
        head = torch.load(f"{out}/head/head.pt", weights_only=True)["model"]
        result = checkpoint.load_json(f"{out}/result.json")
        results.append((metrics, result, {key: x.tolist() for key, x in head.items()}))
    assert results[0] == results[1] and results[0][0]["average_mAP"] > 0
    assert data.load_annotations(f"{out}/annotations.json").keys() == {"test", "fit"}
    by_hand = evaluate.evaluate(f"{out}/annotations.json", f"{out}/result.json", subset="test")
    assert by_hand["mAP"] == results[0][0]["mAP"]
    cfg = config.saved_config(out)
    cfg.detect["class_scores"] = "ground_truth"
    cfg["out"] = f"{tmp_path}/new"
    assert config.check(cfg) == ["head", "detect"]
    scores, _ = config.class_scores(cfg, config.read_annotations(cfg)["test"])
    assert scores[0].tolist() == [[1, 1]] * 3 and scores[1] == ["class 1", "class 0"]
    with pytest.raises(SystemExit, match=r"a\.csv cannot be read as JSON.*check_data --json"):
        evaluate.main(["--gt", f"{tmp_path}/a.csv", "--pred", f"{out}/result.json"])
    # What the last stage will read is read before the first.
    (tmp_path / "features.json").write_text("[]")
    with pytest.raises(SystemExit, match=r"features\.json is not valid"):
        lofi_tal.main(["--cfg", "configs/toy.yaml", "--set", *words, *more, f"out={tmp_path}/x"])
    assert not os.path.exists(f"{tmp_path}/x")


def test_the_config_says_how_a_table_is_split(tmp_path):
    (tmp_path / "a.csv").write_text(
        "video,start,end,label\n" + "".join(f"{i},1,2,x\n" for i in range(99))
    )
    words = [f"data.annotations={tmp_path}/a.csv", "data.train_subset=fit", "data.val_subset=test"]
    counts = []
    for share in (0.2, 0.5):
        subsets = config.read_annotations(toy(*words, f"data.val_share={share}"))
        assert set(subsets) == {"fit", "test"}
        counts.append(len(subsets["test"]))
    assert 10 < counts[0] < 30 < 40 < counts[1] < 60


# A program whose standard output and error are closed, and that opens a file.
CLOSED = """
import config
with config.one_line_errors('x'):
    print(1)
    raise config.InputError(open('a', 'w').name)
"""
CLOSING = f"""
import os, subprocess, sys, tempfile
with tempfile.TemporaryDirectory() as folder:
    command = [*"sh -c".split(), sys.executable + ' -c "$1" >&- 2>&-', "sh", {CLOSED!r}]
    status = subprocess.run(command, cwd=folder).returncode
    print(status, os.path.getsize(folder + "/a"))
"""


@pytest.mark.beside("-c", CLOSING)
def test_a_closed_terminal_is_none_to_fail_at(beside):
    assert beside.communicate() == ("1 0\n", "")


def test_no_git_is_no_error(monkeypatch):
    config.git_commit.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert config.snapshot(toy())["git"] is None
    config.git_commit.cache_clear()


def test_a_saved_config_that_is_nested_deeply_is_named(tmp_path):
    content = json.dumps(toy()).replace('"auto"', "[" * 500 + "]" * 500, 1)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(
        InputError, match=r"config\.json is not the config of a run: .* expected text"
    ):
        config.saved_config(tmp_path)


def test_features_of_another_width_in_validation_are_named():
    datasets = [argparse.Namespace(channels=8), argparse.Namespace(channels=9)]
    with pytest.raises(InputError, match="8 channels in training, 9 in validation"):
        config.subsequences(toy(), datasets, None)


@pytest.mark.parametrize("stages", ["[features,head,detect]", "[features,sola,head,detect]"])
def test_a_search_goes_on_when_its_folder_is_spelt_otherwise(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trials = []
    for out in ("run", "./run/", f"{tmp_path}/run"):
        words = (f"out={out}", f"stages={stages}", "head.lr=[1e-3, 2e-3]", "pretrain.pretrained=x")
        cfg = load_config(f"{config.HERE}/configs/toy.yaml", words)
        config.search_lr(
            cfg, checkpoint.RunFolder(out), Distributed(1, 2, None), lambda *run: trials.append(run)
        )
    for trial, pending, _ in trials[2:]:
        assert pending == ["head", "detect"]
        assert config.differences(trials[trial.head.lr == 2e-3][0], trial) == []
    assert len(trials) == 6
