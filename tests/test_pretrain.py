import json
import math
import os
import re

import numpy as np
import pytest
import torch

import config
import data
import engine
import lofi_tal
import pretrain
import toy
from tsm import TSM

PROCESS = engine.Process(0, 1, torch.device("cpu"))
OPTIONS = {"frames": 4, "epochs": 3, "batch_size": 8, "optimizer": "adamw", "lr": 3e-3, "momentum": 0.9, "weight_decay": 1e-4, "schedule": "cosine", "every": 1, "factor": 0.1,
           "warmup": 0.3}


def write(path, frames, fps=8):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    toy.write_zip(str(path), frames, fps)


def brightness(values, size=16):
    """Grey frames (F, 3, size, size) of these values."""
    return torch.as_tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, size, size).contiguous()


def test_frames_of_a_clip_by_hand():
    play = lambda *a, **k: data.clip_frames(*a, **k).tolist()  # noqa: E731
    assert play(10, 20, 4, 2) == [12, 14, 16, 18]  # 8 of 10 frames, in the middle; of each two the later
    assert play(10, 20, 4, 2, where=0.0) == [11, 13, 15, 17] and play(10, 20, 4, 2, where=1.0) == [13, 15, 17, 19]
    assert play(10, 20, 4, 2, play="reversed") == [18, 16, 14, 12]
    assert play(10, 13, 4, 2) == [11, 12, 12, 12]  # too short: clamped
    assert play(0, 32, 4, 2, play="normal") == [13, 15, 17, 19]
    assert play(0, 32, 4, 2, play="double") == [10, 14, 18, 22]  # 4 apart
    # no room for 4 frames 4 apart: both at stride 1, 2, and neither is clamped
    assert play(0, 11, 4, 2, play="normal", where=0.0) == [0, 1, 2, 3] and play(0, 11, 4, 2, play="double", where=1.0) == [4, 6, 8, 10]
    with pytest.raises(ValueError, match="7 frames are too few for 4 at double speed: expected at least 8"):
        play(0, 7, 4, 2, play="double")


def test_what_segments_leave_of_a_video():
    between = lambda s, least=0.1: pretrain.between(torch.tensor(s, dtype=torch.float64).view(-1, 2), least)  # noqa: E731
    assert between([]) == [(0, 1)] and between([[0.0, 1.0]]) == []
    assert between([[0.5, 0.7], [0.2, 0.6]]) == [(0, 0.2), (0.7, 1)]  # in any order, overlapping
    assert between([[0.05, 0.5], [0.55, 0.8]]) == [(0.8, 1)]  # too short before and between
    assert between([[0.2, 0.95], [0.3, 0.4]]) == [(0, 0.2)]  # one within the other


@pytest.fixture
def videos(tmp_path):
    """Two untrimmed videos of 32 frames, 4 seconds, one in each subset, and their annotations."""
    database = {}
    for name, subset, segments in (("a", "training", [([1, 2], "run"), ([3, 4], "jump")]), ("b", "validation", [([0, 1.5], "run"), ([2, 3], "swim")])):
        write(tmp_path / f"frames/{name}.zip", brightness(range(0, 64, 2)))
        database[name] = {"subset": subset, "duration": 4.0, "annotations": [{"segment": s, "label": label} for s, label in segments]}
    (tmp_path / "annotations.json").write_text(json.dumps({"database": database}))
    return tmp_path


def test_segments_of_an_activitynet_json_are_clips_and_so_is_the_background(videos):
    options = {"source": f"{videos}/annotations.json", "media": None}
    train, held_out, classes = pretrain.clips_of("acp", options, None, 8)
    assert classes == ["jump", "run"]
    assert [(os.path.basename(c.path), c.start_sec, c.end_sec, c.label) for c in train] == [("a.zip", 1, 2, 1), ("a.zip", 3, 4, 0)]
    assert [(c.start_sec, c.end_sec, c.label) for c in held_out] == [(0, 1.5, 1)]  # swim is no class of the training videos
    subsets = data.load_annotations(options["source"])
    target = lambda: [data.select(subsets, s, f"{videos}/frames", "frames") for s in ("training", "validation")]  # noqa: E731
    assert pretrain.clips_of("acp_plus", {}, target, 8) == (train, held_out, classes)
    train_too, held_out_too, classes = pretrain.clips_of("acp_plus_background", {}, target, 8)
    assert classes == ["jump", "run", "background"]
    assert train_too[:2] == train and [(c.start_sec, c.end_sec, c.label) for c in train_too[2:]] == [(0, 1, 2), (2, 3, 2)]
    assert [(c.start_sec, c.end_sec) for c in held_out_too[1:]] == [(1.5, 2), (3, 4)]  # swim is no background either
    assert len(pretrain.clips_of("acp_plus_background", {}, target, 4)[1]) == 2  # half a second is no snippet of a quarter of the video
    sample = data.ClipDataset(train_too, frames=4, stride=1, crop=1.0)[2, data.Fidelity("full", 1, 16)]
    assert sample["label"] == 2 and (sample["frames"].float().mean((0, 2, 3, 4)) - torch.tensor([4.0, 6, 8, 10])).abs().max() < 1.5


@pytest.mark.parametrize("names", [("Validation", "Test"), ("train", "val")])
def test_subsets_of_an_activitynet_json_may_have_the_names_of_the_runs(videos, names):
    options, path = {"source": f"{videos}/annotations.json", "media": None}, videos / "annotations.json"
    expected = pretrain.clips_of("acp", options, None, 8)
    assert pretrain.clips_of("acp", options, None, 8, subsets=names) == expected  # training and validation, where the run's are not there
    path.write_text(path.read_text().replace('"training"', f'"{names[0]}"').replace('"validation"', f'"{names[1]}"'))
    assert pretrain.clips_of("acp", options, None, 8, subsets=names) == expected
    with pytest.raises(ValueError, match=re.escape(f"pretrain.acp.source {path} has subsets {sorted(names)}, expected a and b (config keys data.train_subset, data.val_subset), "
                                                   "or training and validation")):
        pretrain.clips_of("acp", options, None, 8, subsets=("a", "b"))


@pytest.mark.parametrize("phase, plays", pretrain.PLAYS.items())
def test_arrow_and_speed_show_each_clip_twice(phase, plays, tmp_path):
    for split in ("train", "val"):
        write(tmp_path / split / "any/1.zip", brightness(range(0, 160, 10)))
        write(tmp_path / split / "other/2.zip", brightness(range(0, 160, 10)))
    options = {"source": str(tmp_path), "media": None}
    train, held_out, classes = pretrain.clips_of(phase, options, None, 8)
    assert classes == list(plays) and [c.play for c in train] == 2 * list(plays) and [c.label for c in train] == [0, 1, 0, 1] and len(held_out) == 4
    dataset = data.ClipDataset(train, frames=4, stride=2, crop=1.0)
    one, two = (dataset[i, data.Fidelity("full", 1, 16)] for i in (0, 1))
    steps = [(s["frames"].float().mean((0, 2, 3, 4)).diff() / 10).round().tolist() for s in (one, two)]
    assert (one["label"], two["label"]) == (0, 1)
    assert steps == ([[2, 2, 2], [-2, -2, -2]] if phase == "arrow" else [[2, 2, 2], [4, 4, 4]])


def test_both_ways_to_play_a_clip_come_in_one_batch_at_one_view(tmp_path, monkeypatch):
    rng, batches = np.random.default_rng(0), []
    for i in range(6):
        write(tmp_path / f"train/c/{i}.zip", torch.as_tensor(rng.integers(0, 255, (8, 3, 24, 24)), dtype=torch.uint8))
    write(tmp_path / "val/c/9.zip", brightness(range(8)))
    clips = pretrain.clips_of("arrow", {"source": str(tmp_path)}, None, 32)
    collate = data.collate
    monkeypatch.setattr(data, "collate", lambda samples: batches.append(collate(samples)) or batches[-1])
    pretrain.train_classifier(TSM(width=8, maxpool=False), clips, size=16, seed=0, options={**OPTIONS, "epochs": 1, "batch_size": 4}, name="arrow", folder=f"{tmp_path}/run",
                              process=PROCESS, workers=0, stride=2, crop=0.5, flip=True)
    training = [b for b in batches if len(b["name"]) == 4]
    assert len(training) == 3
    for b in training:
        assert b["name"][::2] == b["name"][1::2] and b["label"].tolist() == [0, 1, 0, 1]
        assert torch.equal(b["frames"][::2], b["frames"][1::2].flip(2)) and b["frames"].float().std() > 30


def test_a_clip_too_short_for_double_speed_is_named(tmp_path):
    write(tmp_path / "short.zip", brightness(range(7)))
    dataset = data.ClipDataset([data.Clip(str(tmp_path / "short.zip"), 0.0, math.inf, 1, play="double")], frames=4, stride=1)
    with pytest.raises(ValueError, match="short.zip: 7 frames are too few"):
        dataset[0, data.Fidelity("full", 1, 16)]


def test_a_folder_a_class_may_hold_any_media(tmp_path):
    write(tmp_path / "train/b/1.zip", brightness(range(8)))
    os.makedirs(tmp_path / "train/a/2")
    for i in range(3):
        toy.JpegEncoder(brightness([50 * i])[0]).to_file(f"{tmp_path}/train/a/2/img_{i + 1:05d}.jpg")
    write(tmp_path / "val/a/3.zip", brightness(range(8)))
    train, held_out, classes = pretrain.clips_of("acp", {"source": str(tmp_path)}, None, 8)
    assert classes == ["a", "b"] and [(os.path.basename(c.path), c.label) for c in train] == [("2", 0), ("1.zip", 1)] and len(held_out) == 1
    frames = data.ClipDataset(train, frames=3, stride=1, crop=1.0)[0, data.Fidelity("full", 1, 16)]["frames"]
    assert (frames.float().mean((0, 2, 3, 4)) - torch.tensor([0.0, 50, 100])).abs().max() < 2
    os.makedirs(tmp_path / "images/train/cat"), os.makedirs(tmp_path / "images/val/cat")
    for file in ("train/cat/1.JPEG", "val/cat/2.jpg"):  # as ImageNet spells it
        toy.JpegEncoder(brightness([9])[0]).to_file(f"{tmp_path}/images/{file.replace('JPEG', 'jpg')}")
        os.rename(f"{tmp_path}/images/{file.replace('JPEG', 'jpg')}", f"{tmp_path}/images/{file}")
    stills, _, _ = pretrain.clips_of("icp", {"source": f"{tmp_path}/images"}, None, 8)
    assert data.ClipDataset(stills, frames=1, stride=1)[0, data.Fidelity("full", 1, 8)]["frames"].shape == (1, 1, 3, 8, 8)
    with pytest.raises(ValueError, match="pretrain.arrow.source is not set"):
        pretrain.clips_of("arrow", {"source": None}, None, 8)


def test_a_csv_of_clips(tmp_path):
    said = []
    for name in ("x/1.zip", "x/2.zip", "3.zip"):
        write(tmp_path / name, brightness(range(16)))
    file = tmp_path / "clips.csv"
    file.write_text("path,label,start,end,split\nx/1.zip,run,0.5,1.5,train\nx/2.zip,\"jump, high\",,,train\n3.zip,run,1,,val\ngone.mp4,run,,,train\n")
    train, held_out, classes = pretrain.clips_of("acp", {"source": str(file)}, None, 8, said.append)
    assert classes == ["jump, high", "run"] and said == [f"{file}: 1 files are not there and are left out: gone.mp4"]
    assert train == [data.Clip(f"{tmp_path}/x/1.zip", 0.5, 1.5, 1), data.Clip(f"{tmp_path}/x/2.zip", 0.0, math.inf, 0)]
    assert held_out == [data.Clip(f"{tmp_path}/3.zip", 1.0, math.inf, 1)]
    frames = data.ClipDataset(train, frames=2, stride=4, crop=1.0)[0, data.Fidelity("full", 1, 16)]["frames"]
    assert (frames.float().mean((0, 2, 3, 4)) - torch.tensor([6.0, 10])).abs().max() < 1.5  # frames 4 .. 11
    file.write_text("label,path\nrun,3.zip\n")  # any order, no split: every clip trains
    assert pretrain.csv_clips(str(file)) == ([data.Clip(f"{tmp_path}/3.zip", 0.0, math.inf, 0)], [], ["run"])
    for text, words in (("3.zip,run\n", "must name the columns"), ("path,label,speed\n", "must name the columns"), ("", "must name the columns"),
                        ("path,label\n3.zip\n", "line 2: expected 2 values"), ("path,label\n3.zip,\n", "line 2: expected 2 values"),
                        ("path,label\n3.zip,a,b\n", "line 2: expected 2 values"), ("path,label,start\n3.zip,run,1\n3.zip,run,soon\n", "line 3: start 'soon'"),
                        ("path,label,start,end\n3.zip,run,2,1\n", "line 2: start '2' and end '1'"), ("path,label,split\n3.zip,run,test\n", "split 'test', expected train or val"),
                        ("path,label\ngone.zip,run\n", "not one training clip"), ("path,label,split\n3.zip,a,train\n3.zip,b,val\n", r"no training clip has: \['b'\]")):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            pretrain.csv_clips(str(file), said.append)
    with pytest.raises(FileNotFoundError, match="no CSV file"):
        pretrain.csv_clips(f"{file}.csv")


def test_a_checkpoint_replaces_all_but_the_target_s_segments():
    replaced = {"none": [], "acp": [], "acp_plus": ["acp_plus"], "acp_plus_background": ["acp_plus_background"]}
    assert {m: pretrain.phases(m, None) for m in pretrain.PHASES} == pretrain.PHASES
    assert {m: pretrain.phases(m, "a.pt") for m in replaced} == replaced and pretrain.phases("icp", "torchvision") == []
    for method in ("icp", "arrow", "speed"):  # an ACP encoder, say, would pass for one trained so
        with pytest.raises(ValueError, match=f"a.pt would replace the training that pretrain.method {method} asks for"):
            pretrain.phases(method, "a.pt")
    cfg = config.load("configs/toy.yaml", ["pretrain.speed.source=elsewhere"]).pretrain
    assert pretrain.options_of(cfg, "arrow")["source"] == cfg.acp.source and pretrain.options_of(cfg, "speed")["source"] == "elsewhere"
    assert pretrain.options_of(cfg, "acp_plus_background") == cfg.acp_plus
    for phase in {p for ps in pretrain.PHASES.values() for p in ps}:
        assert pretrain.options_of(cfg, phase)["epochs"] > 0


@pytest.mark.parametrize("phase", ["acp", "arrow", "speed"])
def test_each_task_is_learnt_from_clips_that_show_it(phase, tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 20)):
        for i in range(count):
            offset, label = rng.integers(0, 60), "ab"[i % 2]
            # a square that brightens frame by frame, in a corner of its own for each class
            frames = brightness([100] * 10)
            corner = slice(0, 8) if label == "a" else slice(8, 16)
            frames[:, :, corner, corner] = (offset + 12 * torch.arange(10)).to(torch.uint8)[:, None, None, None]
            write(tmp_path / f"{split}/{label}/{i}.zip", frames)
    clips = pretrain.clips_of(phase, {"source": str(tmp_path)}, None, 8)
    torch.manual_seed(0)
    encoder = TSM(width=8, maxpool=False)
    seconds, record = pretrain.train_classifier(encoder, clips, size=16, seed=0, options=OPTIONS | {"epochs": 6 if phase == "acp" else 10}, name=phase, folder=f"{tmp_path}/{phase}",
                                                process=PROCESS, workers=0, stride=1, crop=1.0, flip=False)
    assert record["top1"] >= 0.95 and record["chance"] == 0.5 and record["seconds"] == seconds > 0
    assert (record["training_clips"], record["held_out_clips"], record["classes"]) == ((40, 20, 2) if phase == "acp" else (80, 40, 2))


# ---------------------------------------------------------------- through the script

@pytest.fixture(scope="module")
def toy_data(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("toy") / "data")
    toy.make_toy(out, workers=1, train=8, val=8, clips=16, stills=24, size=20, snippets=16)
    return out


def run(toy_data, out, *words):
    lofi_tal.main(["--cfg", "configs/toy.yaml", "--set", f"out={out}", f"data.annotations={toy_data}/annotations.json", f"data.frames={toy_data}/frames", "data.size=16",
                   "data.snippets=8", f"pretrain.icp.source={toy_data}/stills", f"pretrain.acp.source={toy_data}/clips", "encoder.width=8", "lofi.epochs=2",
                   "gtad={hidden: 16, gcn_width: 16, gcn_groups: 4, inner_bins: 4, context_bins: 2, map_hidden: [16, 8]}", "head.epochs=1", "lofi.batch_size=4",
                   *(f"pretrain.{k}.epochs=1" for k in ("icp", "acp", "acp_plus", "arrow", "speed")), *words])


@pytest.mark.parametrize("method, expected", [("arrow", [2]), ("speed", [2]), ("acp_plus_background", [8, 9]), ("none", [])])
def test_every_pre_training_is_one_word_and_gives_an_encoder_and_its_accuracy(method, expected, toy_data, tmp_path, capsys):
    run(toy_data, tmp_path, "stages=[pretrain]", f"pretrain.method={method}")
    report = json.load(open(f"{tmp_path}/pretrain/accuracy.json"))
    assert report["method"] == method and [r["classes"] for r in report["phases"].values()] == expected
    assert all(0 <= r["top1"] <= 1 and r["held_out_clips"] > 0 for r in report["phases"].values())
    assert capsys.readouterr().out.count("top-1 accuracy on") == len(expected)
    saved = torch.load(f"{tmp_path}/pretrain/encoder.pt", weights_only=True)  # a plain file, for any project
    TSM(**{k: v for k, v in saved["encoder"].items() if k != "name"}).load_state_dict(saved["model"])


def test_a_video_network_goes_through_all_stages_and_features_of_two_encoders_stand_side_by_side(toy_data, tmp_path):
    words = ["pretrain.method=none", "encoder.name=r3d_18", "lofi.cycle=[T]", "lofi.chunk=1"]
    run(toy_data, tmp_path / "r3d", *words)
    run(toy_data, tmp_path / "recalibrated", "pretrain.method=none", "lofi.batchnorm=recalibrate")
    for out in ("r3d", "recalibrated"):
        assert json.load(open(f"{tmp_path}/{out}/metrics.json"))["evaluated_videos"] == 8
    before, after = (torch.load(f"{tmp_path}/recalibrated/{stage}/encoder.pt", weights_only=True)["model"]["bn1.running_mean"] for stage in ("pretrain", "lofi"))
    assert not torch.equal(before, after)
    run(toy_data, tmp_path / "both", "stages=[head, detect]", f"data.features=[{tmp_path}/r3d/features, {tmp_path}/recalibrated/features]")
    assert torch.load(f"{tmp_path}/both/head/head.pt", weights_only=True)["model"]["mean"].shape == (128,)
    assert json.load(open(f"{tmp_path}/both/metrics.json"))["evaluated_videos"] == 8
    costs = [json.load(open(f"{tmp_path}/{out}/features/features.json"))["seconds"] for out in ("r3d", "recalibrated")]
    assert json.load(open(f"{tmp_path}/both/metrics.json"))["seconds"] > sum(costs)  # both encoders are paid for
