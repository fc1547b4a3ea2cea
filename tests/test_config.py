import glob
import json
import os

import pytest

import config
import lofi_tal


def test_files_change_the_defaults_and_words_change_both(tmp_path):
    (tmp_path / "x.yaml").write_text("seed: 3\nlofi: {lr: 0.5}\n")
    cfg = config.load(str(tmp_path / "x.yaml"), ["lofi.cycle=[T]", "pretrain.acp.epochs=2"])
    assert (cfg.seed, cfg.lofi.lr, cfg.lofi.cycle, cfg.pretrain.acp.epochs, cfg.lofi.momentum) == (3, 0.5, ["T"], 2, 0.0)
    assert config.load(str(tmp_path / "x.yaml")).lofi.cycle == ["S", "T", "ST"]  # nothing sticks to the defaults
    assert config.load(str(tmp_path / "x.yaml"), ["data.features=[a, b]"]).data.features == ["a", "b"]  # null may become a list


@pytest.mark.parametrize("word, message", [
    ("lofi.lrr=1", "lofi.lrr is read by nothing; did you mean lofi.lr"), ("sede=1", "did you mean seed"),
    ("lofi=1", "expected a block of keys"), ("lofi.lr.x=1", "expected one value"), ("lofi.lr", "expected key.sub=value"),
    ("lofi.cycle=ST", "expected a list"), ("stages=null", "expected a list"), ("lofi.cycle=[S", "no YAML"), ("pretrain.method=[acp]", "expected one value"),
    ("lofi.lr=1e-4", "expected a number.*1.0e-4"), ("data.flip=3", "expected true or false"), ("lofi.epochs=true", "expected a number")])
def test_wrong_words_are_refused(word, message):
    with pytest.raises(ValueError, match=message):
        config.load("configs/toy.yaml", [word])


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.yaml"):
        config.load(str(tmp_path / "none.yaml"))
    for text in ("a: [", "just words", "lofi: {lr: 1}\nlofi: {epochs: 2}"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match="bad.yaml"):
            config.load(str(tmp_path / "bad.yaml"))


@pytest.mark.parametrize("path", sorted(glob.glob("configs/*.yaml")))
def test_every_config_loads(path):
    cfg = config.load(path)
    assert cfg.data.snippets > 0


def test_the_papers_recipe():
    """LoFi, section 3.3 and 4.3."""
    for path in ("configs/anet13.yaml", "configs/hacs.yaml"):
        cfg = config.load(path)
        assert (cfg.data.snippets, cfg.data.size, cfg.data.frames_per_snippet, cfg.data.stride, cfg.encoder.depth, cfg.encoder.width) == (100, 224, 8, 8, 18, 64)
        assert (cfg.lofi.optimizer, cfg.lofi.lr, cfg.lofi.momentum, cfg.lofi.weight_decay, cfg.lofi.batch_size) == ("sgd", 0.1, 0, 1e-4, 16)
        assert (cfg.lofi.schedule, cfg.lofi.every, cfg.lofi.factor) == ("step", 5, 0.5)
        assert (cfg.lofi.cycle, cfg.lofi.order, cfg.lofi.period) == (["S", "T", "ST"], "long", 1)
        assert (cfg.fidelity.r_t, cfg.fidelity.r_s, cfg.fidelity.st_r_t) == (4, 2, 2) and cfg.fidelity.st_r_s**2 == pytest.approx(2)
        assert cfg.detect.sigma == 0.84 and cfg.detect.top_k == 100
    assert (config.load("configs/anet13.yaml").detect.classes_per_video, config.load("configs/hacs.yaml").detect.classes_per_video) == (2, 1)


def test_every_key_is_read_by_something():
    """Each leaf of the default config is named in the code: as .key, ["key"] or "key", or passed whole as a block of named arguments."""
    import inspect

    import bmn
    import gtad
    import tsm
    code = "".join(open(f).read() for f in glob.glob("*.py"))
    arguments = set(inspect.signature(gtad.GTAD).parameters) | set(inspect.signature(bmn.BMN).parameters) | set(inspect.signature(tsm.make_encoder).parameters)
    for key in config.flat(config.read_yaml("configs/default.yaml")):
        leaf = key.rsplit(".", 1)[-1]
        if key.split(".")[0] in ("gtad", "bmn", "encoder"):
            assert leaf in arguments, key
        elif key.split(".")[0] != "loss":  # read by the names of the head's loss terms
            assert f".{leaf}" in code or f'"{leaf}"' in code or leaf in ("train_subset", "val_subset"), key


def test_no_git_is_no_error(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert config.about(config.load("configs/toy.yaml"))["git"] is None


def test_a_run_belongs_to_one_config(tmp_path):
    def write(obj, path):
        tmp_path.joinpath("run").mkdir(exist_ok=True)
        open(path, "w").write(json.dumps(obj))
    out = f"out={tmp_path}/run"
    config.open_run(config.load("configs/toy.yaml", [out]), write, processes=1)
    versions = json.load(open(tmp_path / "run/versions.json"))
    assert versions["processes"] == 1 and versions["torch"] and "git" in versions
    config.open_run(config.load("configs/toy.yaml", [out, "lofi.lr=0.3"]), write)  # nothing came of the first start
    config.open_run(config.load("configs/toy.yaml", [out, "stages=[pretrain]"]), write)
    (tmp_path / "run/pretrain").mkdir()
    config.open_run(config.load("configs/toy.yaml", [out, "data.workers=5"]), write)  # changes no number; more stages go on from there
    config.open_run(config.load("configs/toy.yaml", [out, "stages=[pretrain]"]), write)
    assert json.load(open(tmp_path / "run/config.json"))["stages"] == ["pretrain", "lofi", "features", "head", "detect"]  # not forgotten
    with pytest.raises(ValueError, match=r"lofi.lr: [\d.]+ there, 0.2 now\n  seed: 0 there, 4 now"):
        config.open_run(config.load("configs/toy.yaml", [out, "lofi.lr=0.2", "seed=4"]), write)
    # what only changes time and memory, and another spelling of the folder
    config.open_run(config.load("configs/toy.yaml", [f"{out}/", "lofi.chunk=4", "lofi.accumulate=2", "encoder.recompute=true", "features.chunk=8"]), write)
    for stages in ("[pretrain, features]", "[pretrain, lofi, features, head, sola]"):
        with pytest.raises(ValueError, match="stages"):
            config.open_run(config.load("configs/toy.yaml", [out, f"stages={stages}"]), write)


@pytest.mark.parametrize("more", ["lofi", "sola"])
def test_a_stage_cannot_be_put_before_those_that_are_done(more):
    """The stages run in their own order, however they are listed: the features and detections that are there would pass for those behind it."""
    done = config.load("configs/toy.yaml", ["stages=[pretrain, features, head, detect]"])
    assert "stages" in config.differences(done, config.load("configs/toy.yaml", [f"stages=[pretrain, features, head, detect, {more}]"]))[0]
    assert not config.differences(config.load("configs/toy.yaml", ["stages=[features, pretrain]"]), done)
    assert tuple(lofi_tal.STAGES) == config.STAGES


def test_what_only_costs_counts_where_it_is_more():
    base, other = config.load("configs/toy.yaml"), config.load("configs/toy.yaml", ["features.chunk=8", "lofi.chunk=4", "data.workers=3"])
    assert not config.differences(base, other)
    assert [line.split(":")[0].strip() for line in config.differences(base, other, config.FREE)] == ["features.chunk", "lofi.chunk"]  # tables.py: seconds and memory are its subject
    both = [config.merge(c, {"lofi": {"batchnorm": "recalibrate"}}) for c in (base, config.load("configs/toy.yaml", ["features.chunk=8"]))]
    assert config.differences(*both) == ["  features.chunk: 32 there, 8 now"]  # BatchNorm's statistics are of so many snippets


def test_batches_that_cannot_be_divided_are_found_before_the_first_stage(tmp_path, monkeypatch):
    def look(*words):
        lofi_tal.check(config.load("configs/toy.yaml", [f"out={tmp_path}/run", "lofi.batch_size=8", "pretrain.acp.batch_size=32", *words]), files=False)
    with pytest.raises(ValueError, match="lofi.batch_size 8 cannot be divided evenly over 1 processes and 3 micro-batches"):
        look("lofi.accumulate=3")
    look("lofi.accumulate=2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    look("lofi.accumulate=2")  # of something else: torchrun sets RANK, too
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="pretrain.acp.batch_size 32 cannot be divided evenly over 3 processes"):
        look()
    for product in ("pretrain", "lofi"):  # what is done needs no batches
        os.makedirs(f"{tmp_path}/run/{product}")
        open(f"{tmp_path}/run/{product}/encoder.pt", "w").close()
    look("stages=[pretrain, lofi, features]")
    with pytest.raises(ValueError, match="sola.batch_size 64 .* over 3 processes"):
        look("stages=[pretrain, lofi, features, sola]")


def test_a_run_of_before_the_key_precision_goes_on_as_auto(tmp_path):
    cfg = config.load("configs/toy.yaml", [f"out={tmp_path}/run"])
    (tmp_path / "run/pretrain").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text(json.dumps({k: v for k, v in cfg.items() if k != "precision"}))
    with pytest.raises(ValueError, match="precision: 'auto' there, 'bfloat16' now"):
        config.open_run(config.merge(cfg, {"precision": "bfloat16"}), lambda obj, path: None)
    config.open_run(cfg, lambda obj, path: open(path, "w").write(json.dumps(obj)))
    assert json.load(open(tmp_path / "run/config.json"))["precision"] == "auto"


def test_what_a_killed_start_was_writing_is_removed(tmp_path):
    cfg = config.load(f"{config.HERE}/configs/toy.yaml", [f"out={tmp_path}/run"])
    (tmp_path / "run/features").mkdir(parents=True)
    old, new = tmp_path / "run/features/v1.npy.part-77", tmp_path / "run/features/v2.npy.part-78"  # of a dead process; of a live one
    old.write_text("half"), new.write_text("half")
    os.utime(old, (0, 0))
    config.open_run(cfg, lambda obj, path: open(path, "w").write("{}"))
    assert not old.exists() and new.exists()


@pytest.mark.parametrize("word, message", [("lofi.chunk=-3", "at least 0"), ("lofi.chunk=2.5", "whole number"), ("features.chunk=0", "at least 1"), ("sola.every=0", "at least 1"),
                                           ("gtad.kernel=2", "odd"), ("detect.sigma=0", "positive"), ("detect.tiou=[5]", "thresholds"), ("detect.top_k=0", "at least 1"),
                                           ("stages=[]", "a list of stages"), ("out=", "a folder"), ("gtad.durations=0", "at least 1"), ("seed=1.5", "whole number"),
                                           ("lofi.clip=-1", "positive")])
def test_numbers_that_no_run_can_go_on_with(word, message):
    with pytest.raises(ValueError, match=message):
        config.check_numbers(config.load("configs/toy.yaml", [word]))


@pytest.mark.parametrize("path", glob.glob("configs/*.yaml"))
def test_numbers_of_every_config_are_possible(path):
    config.check_numbers(config.load(path))


def test_a_key_that_is_null_by_default_takes_a_list_where_a_file_names_one_thing():
    assert config.load("configs/thumos14.yaml", ["data.features=[a,b]"]).data.features == ["a", "b"]
