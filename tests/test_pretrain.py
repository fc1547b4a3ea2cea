import json
import math
import os
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import config
import data
import lofi_tal
import pretrain
from localizer import Distributed
from media import InputError
from pretrain import Clip, ClipDataset
from tools.make_toy import Toy, make_toy, write_zip
from tools.prepare_data import encode_jpeg
from tsm import TSM

DDP = Distributed(0, 1, torch.device("cpu"))
LOW = data.Fidelity("full", 1, 16)


def write(path, frames):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_zip(str(path), frames)


def grey_frames(values, size=16):
    """Return grey frames (F, 3, size, size) of these values."""
    values = torch.as_tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1)
    return values.expand(-1, 3, size, size).contiguous()


def levels(sample):
    """Return the mean value of each frame of a sample."""
    return sample["frames"].float().mean((0, 2, 3, 4))


def times(clips):
    return [(clip.start_sec, clip.end_sec, clip.label) for clip in clips]


# ------------------------------------------------------------------------------------------- clips


@pytest.mark.parametrize(
    "arguments, options, expected",
    [
        ((10, 20, 4, 2), {}, [12, 14, 16, 18]),  # 8 of 10 frames, central; of each two the later
        ((10, 20, 4, 2), {"where": 0.0}, [11, 13, 15, 17]),
        ((10, 20, 4, 2), {"where": 1.0}, [13, 15, 17, 19]),
        ((10, 20, 4, 2), {"playback": "reversed"}, [18, 16, 14, 12]),
        ((10, 13, 4, 2), {}, [11, 12, 12, 12]),  # too short: clamped
        ((0, 32, 4, 2), {"playback": "normal"}, [13, 15, 17, 19]),
        ((0, 32, 4, 2), {"playback": "double"}, [10, 14, 18, 22]),  # 4 apart
        # No room for 4 frames 4 apart: both at stride 1, 2, and neither is clamped.
        ((0, 11, 4, 2), {"playback": "normal", "where": 0.0}, [0, 1, 2, 3]),
        ((0, 11, 4, 2), {"playback": "double", "where": 1.0}, [4, 6, 8, 10]),
    ],
)
def test_frames_of_a_clip_by_hand(arguments, options, expected):
    assert pretrain.clip_frames(*arguments, **options).tolist() == expected


@pytest.mark.parametrize(
    "segments, expected",
    [
        ([], [(0, 1)]),
        ([[0.0, 1.0]], []),
        ([[0.5, 0.7], [0.2, 0.6]], [(0, 0.2), (0.7, 1)]),  # in any order, overlapping
        ([[0.05, 0.5], [0.55, 0.8]], [(0.8, 1)]),  # too short before and between
        ([[0.2, 0.95], [0.3, 0.4]], [(0, 0.2)]),  # one within the other
    ],
)
def test_what_segments_leave_of_a_video(segments, expected):
    segments = torch.tensor(segments, dtype=torch.float64).view(-1, 2)
    assert pretrain.gaps(segments, 0.1) == expected


@pytest.fixture
def videos(tmp_path):
    """Write two untrimmed videos of 32 frames, 4 seconds, one in each subset, and annotations."""
    actions = {
        "a": ("training", [([1, 2], "run"), ([3, 4], "jump")]),
        "b": ("validation", [([0, 1.5], "run"), ([2, 3], "swim")]),
    }
    database = {}
    for name, (subset, segments) in actions.items():
        write(tmp_path / f"frames/{name}.zip", grey_frames(range(0, 64, 2)))
        annotations = [{"segment": segment, "label": label} for segment, label in segments]
        database[name] = {"subset": subset, "duration": 4.0, "annotations": annotations}
    (tmp_path / "annotations.json").write_text(json.dumps({"database": database}))
    return tmp_path


def target_videos(folder):
    subsets = data.load_annotations(f"{folder}/annotations.json")
    select = partial(data.select_videos, subsets, source=f"{folder}/frames", kind="frames")
    return select("training"), select("validation")


def test_segments_of_an_activitynet_json_are_clips(videos):
    options = {"source": f"{videos}/annotations.json", "media": None}
    clips = pretrain.load_clips("acp", options)
    assert clips.classes == ["jump", "run"]
    assert times(clips.train) == [(1, 2, 1), (3, 4, 0)]
    assert times(clips.val) == [(0, 1.5, 1)]  # swim is no class of the training videos
    assert os.path.basename(clips.train[0].path) == "a.zip"
    assert pretrain.load_clips("acp_plus", {}, videos=target_videos(videos)) == clips


def test_background_is_one_more_class(videos):
    load = partial(pretrain.load_clips, "acp_plus_background", {}, videos=target_videos(videos))
    clips = load(num_snippets=8)
    assert clips.classes == ["jump", "run", "background"]
    assert times(clips.train) == [(1, 2, 1), (3, 4, 0), (0, 1, 2), (2, 3, 2)]
    assert times(clips.val) == [(0, 1.5, 1), (1.5, 2, 2), (3, 4, 2)]  # nor is swim background
    # Half a second is no snippet of a quarter of the video.
    assert len(load(num_snippets=4).val) == 2
    train, (video,) = target_videos(videos)
    unclear = replace(video, labels=("run", "Ambiguous"))
    assert load(videos=(train, [unclear]), num_snippets=8) == clips
    sample = ClipDataset(clips.train, frames=4, stride=1, crop=1.0)[2, LOW]
    assert sample["label"] == 2
    np.testing.assert_allclose(levels(sample), [4, 6, 8, 10], atol=1.5)


@pytest.mark.parametrize("names", [("Validation", "Test"), ("train", "val")])
def test_subsets_of_an_activitynet_json_may_have_the_names_of_the_runs(videos, names):
    path = videos / "annotations.json"
    load = partial(pretrain.load_clips, "acp", {"source": str(path), "media": None})
    expected = load()
    assert load(subsets=names) == expected  # training and validation, where the run's are absent
    text = path.read_text().replace('"training"', f'"{names[0]}"')
    path.write_text(text.replace('"validation"', f'"{names[1]}"'))
    assert load(subsets=names) == expected
    with pytest.raises(InputError, match=r"no subset 'a', only"):
        load(subsets=("a", "b"))


@pytest.mark.parametrize("task, playbacks", pretrain.PLAYBACKS.items())
def test_arrow_and_speed_show_each_clip_twice(task, playbacks, tmp_path):
    for split in ("train", "val"):
        write(tmp_path / split / "any/1.zip", grey_frames(range(0, 160, 10)))
        write(tmp_path / split / "other/2.zip", grey_frames(range(0, 160, 10)))
    clips = pretrain.load_clips(task, {"source": str(tmp_path), "media": None})
    assert clips.classes == list(playbacks)
    assert [clip.playback for clip in clips.train] == 2 * list(playbacks)
    assert [clip.label for clip in clips.train] == [0, 1, 0, 1]
    assert len(clips.val) == 4
    dataset = ClipDataset(clips.train, frames=4, stride=2, crop=1.0)
    samples = [dataset[i, LOW] for i in (0, 1)]
    steps = [(levels(sample).diff() / 10).round().tolist() for sample in samples]
    assert [sample["label"] for sample in samples] == [0, 1]
    assert steps == [[2, 2, 2], [-2, -2, -2] if task == "arrow" else [4, 4, 4]]


def test_both_playbacks_of_a_clip_are_in_one_batch_and_look_alike(tmp_path):
    """SpeedNet's same-batch training: same moment, crop and flip."""
    frames = torch.randint(0, 256, (16, 3, 24, 24), dtype=torch.uint8)
    for i in range(6):
        write(tmp_path / f"train/any/{i}.zip", frames.roll(i, 0))
        write(tmp_path / f"val/any/{i}.zip", frames)
    clips = pretrain.load_clips("arrow", {"source": str(tmp_path), "media": None})
    views = {"frames": 4, "stride": 2, "crop": 0.5}
    dataset = ClipDataset(clips.train, train=True, seed=3, **views)
    group = {"group_size": dataset.group_size}
    sampler = data.CyclicFidelitySampler(len(dataset), 4, [LOW], **group)
    looks = {clip.path: set() for clip in clips.train}
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in data.BatchLoader(dataset, sampler, 0, torch.device("cpu")):
            assert batch["name"][::2] == batch["name"][1::2]
            assert batch["label"].tolist() == [0, 1, 0, 1]
            assert torch.equal(batch["frames"][::2], batch["frames"][1::2].flip(2))
            assert batch["frames"].float().std() > 30
            for name, x in zip(batch["name"], batch["frames"], strict=True):
                looks[name].add(x.sum().item())
    # The other playback is the same frames, another epoch is not.
    assert [len(sums) for sums in looks.values()] == [3] * 6
    clips = pretrain.load_clips("acp", {"source": str(tmp_path), "media": None})
    assert ClipDataset(clips.train, frames=4, stride=2).group_size == 1


@pytest.mark.parametrize(
    "clip, message",
    [
        (("short.zip", 0.0, math.inf, 1, None, "double"), "7 frames .* expected 8"),
        (("short.zip", 2.0, 3.0, 1), "0 frames from 2 to 3 s"),
        (("folder", 0.0, 0.5, 1), "no frame rate"),
    ],
)
def test_a_clip_without_the_frames_it_needs_is_named(clip, message, tmp_path):
    write(tmp_path / "short.zip", grey_frames(range(7)))
    os.makedirs(tmp_path / "folder")
    (tmp_path / "folder/img_00001.jpg").write_bytes(encode_jpeg(grey_frames([9])[0]))
    name, *rest = clip
    dataset = ClipDataset([Clip(f"{tmp_path}/{name}", *rest)], frames=4, stride=1)
    with pytest.raises(InputError, match=f"{name}: {message}"):
        dataset[0, LOW]


def test_a_folder_a_class_may_hold_any_media(tmp_path):
    write(tmp_path / "train/b/1.zip", grey_frames(range(8)))
    os.makedirs(tmp_path / "train/a/2")
    for i in range(3):
        file = tmp_path / f"train/a/2/img_{i + 1:05d}.jpg"
        file.write_bytes(encode_jpeg(grey_frames([50 * i])[0]))
    write(tmp_path / "val/a/3.zip", grey_frames(range(8)))
    clips = pretrain.load_clips("acp", {"source": str(tmp_path)})
    assert clips.classes == ["a", "b"]
    found = [(os.path.basename(clip.path), clip.label) for clip in clips.train]
    assert found == [("2", 0), ("1.zip", 1)]
    assert len(clips.val) == 1
    sample = ClipDataset(clips.train, frames=3, stride=1, crop=1.0)[0, LOW]
    np.testing.assert_allclose(levels(sample), [0, 50, 100], atol=2)
    write(tmp_path / "val/c/1.zip", grey_frames(range(8)))
    with pytest.raises(InputError, match="no training clips of classes c"):
        pretrain.load_clips("acp", {"source": str(tmp_path)})
    with pytest.raises(InputError, match="no video in"):
        pretrain.load_clips("acp", {"source": f"{tmp_path}/none"})
    with pytest.raises(InputError, match=r"pretrain.arrow.source is not set"):
        pretrain.load_clips("arrow", {"source": None})


def test_still_images_by_class(tmp_path):
    for file in ("train/cat/1.JPEG", "val/cat/2.jpg"):  # as ImageNet spells it
        os.makedirs(os.path.dirname(tmp_path / file))
        (tmp_path / file).write_bytes(encode_jpeg(grey_frames([9])[0]))
    clips = pretrain.load_clips("icp", {"source": str(tmp_path)})
    sample = ClipDataset(clips.train, frames=1, stride=1)[0, data.Fidelity("full", 1, 8)]
    assert sample["frames"].shape == (1, 1, 3, 8, 8)


# --------------------------------------------------------------------------------------- CSV files


@pytest.fixture
def folder(tmp_path):
    for name in ("x/1.zip", "x/2.zip", "3.zip"):
        write(tmp_path / name, grey_frames(range(16)))
    return tmp_path


def test_a_csv_of_clips(folder):
    messages = []
    file = folder / "clips.csv"
    file.write_text(
        "path,label,start,end,split\nx/1.zip,run,0.5,1.5,train\n"
        'x/2.zip,"jump, high",,,train\n3.zip,run,1,,val\ngone.mp4,run,,,train\n'
    )
    clips = pretrain.load_clips("acp", {"source": str(file)}, log=messages.append)
    assert clips.classes == ["jump, high", "run"]
    assert len(messages) == 1
    assert messages[0].startswith(f"{file}: 1 files are missing") and "gone.mp4" in messages[0]
    assert clips.train == [
        Clip(f"{folder}/x/1.zip", 0.5, 1.5, 1),
        Clip(f"{folder}/x/2.zip", 0.0, math.inf, 0),
    ]
    assert clips.val == [Clip(f"{folder}/3.zip", 1.0, math.inf, 1)]
    sample = ClipDataset(clips.train, frames=2, stride=4, crop=1.0)[0, LOW]
    np.testing.assert_allclose(levels(sample), [6, 10], atol=1.5)  # frames 4 to 11
    file.write_text("label,path\nrun,3.zip\n")  # any order, no split: every clip trains
    clips = pretrain.csv_clips(str(file))
    assert clips == pretrain.Clips([Clip(f"{folder}/3.zip", 0.0, math.inf, 0)], [], ["run"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("3.zip,run\n3.zip,run\n", "KeyError: 'path'"),  # no first line with names
        ("path,label,speed\n3.zip,run,1\n", "speed.* columns"),
        ("", "no training clips"),
        ("path,label\n3.zip\n", "KeyError: 'label'"),
        ("path,label\n3.zip,\n", "KeyError: 'label'"),
        ("path,label\n3.zip,a,b\n", "'b'.* columns"),
        ("path,label,start\n3.zip,run,1\n3.zip,run,soon\n", "'start': 'soon'.*could not convert"),
        ("path,label,start,end\n3.zip,run,2,1\n", "'start': '2'.* start and end"),
        ("path,label,start,end\n3.zip,run,nan,1\n", "start and end"),
        ("path,label,split\n3.zip,run,test\n", "'split': 'test'.* expected .*columns"),
        ("path,label\ngone.zip,run\n", "no training clips of any class"),
        ("path,label,split\n3.zip,a,train\n3.zip,b,val\n", "no training clips of b"),
    ],
)
def test_what_is_wrong_with_a_csv_is_said(text, message, folder):
    file = folder / "clips.csv"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        pretrain.csv_clips(str(file), log=lambda message: None)


def test_a_csv_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*none\.csv"):
        pretrain.csv_clips(f"{tmp_path}/none.csv")
    (tmp_path / "latin.csv").write_bytes("path,label\n1.zip,caf\xe9\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"cannot read .*latin\.csv"):
        pretrain.csv_clips(f"{tmp_path}/latin.csv")


# ------------------------------------------------------------------------------------------- tasks


def test_a_finished_encoder_replaces_all_but_the_target_s_segments():
    tasks = {method: pretrain.tasks_of(method, None) for method in pretrain.METHODS}
    assert tasks == pretrain.METHODS
    for method in ("none", "acp"):
        assert pretrain.tasks_of(method, "a.pt") == []
    for method in ("acp_plus", "acp_plus_background"):
        assert pretrain.tasks_of(method, "a.pt") == [method]
    assert pretrain.tasks_of("icp", "torchvision") == []
    for method in ("icp", "arrow", "speed"):  # an ACP encoder, say, would pass for one trained so
        with pytest.raises(InputError, match=r"a\.pt cannot replace the training"):
            pretrain.tasks_of(method, "a.pt")
    with pytest.raises(InputError, match="expected one of none, icp, acp"):
        pretrain.tasks_of("kinetics", None)


def test_each_task_has_options():
    block = config.load_config("configs/toy.yaml", ["pretrain.speed.source=elsewhere"]).pretrain
    assert pretrain.task_options(block, "arrow")["source"] == block.acp.source
    assert pretrain.task_options(block, "speed")["source"] == "elsewhere"
    assert pretrain.task_options(block, "acp_plus_background") == block.acp_plus
    for method, tasks in pretrain.METHODS.items():
        assert method == "none" or all(pretrain.task_options(block, t)["epochs"] for t in tasks)


def make_clips(folder, rng):
    """Write clips of a square that brightens frame by frame, in a corner of its own per class."""
    for split, count in (("train", 40), ("val", 20)):
        for i in range(count):
            label = "ab"[i % 2]
            frames = grey_frames([100] * 10)
            corner = slice(0, 8) if label == "a" else slice(8, 16)
            values = rng.integers(0, 60) + 12 * torch.arange(10)
            frames[:, :, corner, corner] = values.to(torch.uint8)[:, None, None, None]
            write(folder / f"{split}/{label}/{i}.zip", frames)


@pytest.mark.beside
@pytest.mark.parametrize("task", ["acp", "arrow", "speed"])
def test_each_task_is_learnt_from_clips_that_show_it(task, tmp_path):
    make_clips(tmp_path, np.random.default_rng(0))
    clips = pretrain.load_clips(task, {"source": str(tmp_path), "media": None})
    views = {"frames": 4, "stride": 1, "crop": 1.0, "flip": False}
    dataset = ClipDataset(clips.train, train=True, **views)
    group = {"group_size": dataset.group_size}
    torch.manual_seed(0)
    model = pretrain.ClipClassifier(TSM(width=8, maxpool=False), len(clips.classes))
    epochs = 6 if task == "acp" else 10
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    sampler = data.CyclicFidelitySampler(len(dataset), 8, [LOW], **group)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs * len(sampler))
    loader = data.BatchLoader(dataset, sampler, 0, DDP.device)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            optimizer.zero_grad()
            losses = pretrain.classification_step(model, batch, DDP.autocast)
            optimizer.step()
            schedule.step()
    assert losses["loss"].isfinite() and 0 <= losses["accuracy"] <= 1
    batches = data.iterate(ClipDataset(clips.val, **views), LOW, 16, device=DDP.device)
    record = pretrain.held_out_accuracy(model, batches, clips, DDP)
    assert record.pop("top1") >= 0.95
    train, val = (40, 20) if task == "acp" else (80, 40)
    assert record == {"classes": 2, "training_clips": train, "held_out_clips": val, "chance": 0.5}


def test_accuracy_is_over_all_processes_and_needs_held_out_clips():
    model = pretrain.ClipClassifier(TSM(width=8), 2)
    model.linear.weight.data.zero_()
    model.linear.bias.data.copy_(torch.tensor([0.0, 1.0]))  # always class 1
    frames = torch.zeros(3, 1, 4, 3, 16, 16, dtype=torch.uint8)
    batch = {"frames": frames, "label": torch.tensor([1, 1, 0])}
    val = [Clip("", 0, 1, label) for label in (1, 1, 0, 1, 1, 0)]
    clips = pretrain.Clips([], val, ["a", "b"])
    two = SimpleNamespace(autocast=DDP.autocast, gather=lambda correct: [correct, correct])
    record = pretrain.held_out_accuracy(model, [batch], clips, two)
    assert record["top1"] == pytest.approx(4 / 6) and record["chance"] == pytest.approx(4 / 6)
    record = pretrain.held_out_accuracy(model, [], pretrain.Clips(val, [], ["a", "b"]), DDP)
    assert record["top1"] is None and record["chance"] is None and record["training_clips"] == 6


# ---------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def toy_data(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("toy") / "data")
    make_toy(out, Toy(train=8, val=8, clips=16, stills=24, size=20, snippets=16), workers=0)
    return out


def run(toy_data, out, *overrides):
    tasks = ("icp", "acp", "acp_plus", "arrow", "speed")
    head = "hidden: 16, gcn_width: 16, gcn_groups: 4, inner_bins: 4, context_bins: 2"
    small = [
        f"data.annotations={toy_data}/annotations.json",
        f"data.frames={toy_data}/frames",
        f"pretrain.icp.source={toy_data}/stills",
        f"pretrain.acp.source={toy_data}/clips",
        "video={size: 16, snippets: 8}",
        "fidelities={S: [8, 8], T: [2, 16], ST: [4, 11]}",
        "encoder.width=8",
        f"gtad={{{head}, map_hidden: [16, 8]}}",
        "lofi.epochs=2",
        "lofi.batch_size=4",
        "head.epochs=1",
        *(f"pretrain.{task}.epochs=1" for task in tasks),
    ]
    argv = ["--cfg", "configs/toy.yaml", "--set", f"out={out}", *small, *overrides]
    lofi_tal.main(argv)


@pytest.mark.parametrize(
    "method, num_classes",
    [("arrow", [2]), ("speed", [2]), ("acp_plus_background", [8, 9]), ("none", [])],
)
def test_every_method_is_one_word_and_gives_an_encoder_and_its_accuracy(
    method, num_classes, toy_data, tmp_path
):
    run(toy_data, tmp_path, "stages=[pretrain]", f"pretrain.method={method}")
    report = json.loads((tmp_path / "pretrain/accuracy.json").read_text())
    assert report["method"] == method
    records = report["tasks"].values()
    assert [record["classes"] for record in records] == num_classes
    assert all(0 <= r["top1"] <= 1 and r["held_out_clips"] > 0 for r in records)
    # A plain file, for any project.
    saved = torch.load(tmp_path / "pretrain/encoder.pt", weights_only=True)
    sizes = {key: value for key, value in saved["encoder"].items() if key != "name"}
    TSM(**sizes).load_state_dict(saved["model"])


def read_json(path):
    return json.loads(path.read_text())


def test_features_of_two_encoders_stand_side_by_side(toy_data, tmp_path):
    """One is a video network that went through all stages, the other recalibrates BatchNorm."""
    none = "pretrain.method=none"
    video_network = ("encoder.name=r3d_18", "lofi.fidelities=[T]", "lofi.chunk_snippets=1")
    run(toy_data, tmp_path / "r3d", none, *video_network)
    run(toy_data, tmp_path / "recalibrated", none, "lofi.batchnorm=recalibrate")
    features = [tmp_path / out / "features" for out in ("r3d", "recalibrated")]
    for folder in features:
        assert read_json(folder.parent / "metrics.json")["evaluated_videos"] == 8
    paths = [tmp_path / f"recalibrated/{stage}/encoder.pt" for stage in ("pretrain", "lofi")]
    states = [torch.load(path, weights_only=True)["model"] for path in paths]
    assert not torch.equal(*(state["bn1.running_mean"] for state in states))

    both = f"data.features=[{features[0]}, {features[1]}]"
    run(toy_data, tmp_path / "both", "stages=[head, detect]", both)
    head = torch.load(tmp_path / "both/head/head.pt", weights_only=True)
    assert head["model"]["mean"].shape == (128,)
    metrics = read_json(tmp_path / "both/metrics.json")
    assert metrics["evaluated_videos"] == 8
    # Both encoders are paid for.
    costs = [read_json(folder / "features.json")["seconds"] for folder in features]
    assert metrics["seconds"] > sum(costs)


def test_a_quote_that_never_ends_is_named(tmp_path):
    (tmp_path / "clips.csv").write_text('path,label\na.mp4,"run\nb.mp4,jump\n')
    with pytest.raises(InputError, match=r"clips\.csv.*unexpected end of data"):
        pretrain.csv_clips(f"{tmp_path}/clips.csv")
