import json
import math
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from torchcodec.encoders import JpegEncoder

import check
import data
import media
import toy


def write_annotations(path, database):
    path.write_text(json.dumps({"database": database}))
    return str(path)


def entry(subset="training", duration=10.0, segments=((2.0, 5.0),), label="jump"):
    return {"subset": subset, "duration": duration, "annotations": [{"segment": list(s), "label": label} for s in segments]}


# ---------------------------------------------------------------- annotations

def test_annotations_become_fractions_of_the_video(tmp_path):
    path = write_annotations(tmp_path / "a.json", {"v": entry(segments=[(2.0, 5.0), (-1.0, 3.0), (9.0, 12.0), (4.0, 4.0)]),
                                                   "w": {"subset": "validation", "duration": "8", "annotations": [{"segment": ["2", "4"], "label": "x"}]}})
    subsets = data.load_annotations(path)
    v, w = subsets["training"][0], subsets["validation"][0]
    torch.testing.assert_close(v.segments, torch.tensor([[0.2, 0.5], [0.0, 0.3], [0.9, 1.0]]))  # clipped, the empty one left out
    assert v.labels == ("jump",) * 3 and v.duration == 10
    torch.testing.assert_close(w.segments, torch.tensor([[0.25, 0.5]]))  # numbers as strings


def test_missing_annotation_file_says_what_makes_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="python toy.py"):
        data.load_annotations(str(tmp_path / "none.json"))


@pytest.mark.parametrize("text", ["{", "[]", '{"videos": {}}', '{"database": []}', '{"database": {"v": {"subset": "training", "duration": 3}}}',
                                  '{"database": {"v": {"subset": "training", "duration": 0, "annotations": []}}}',
                                  '{"database": {"v": {"subset": "training", "duration": 3, "annotations": [{"segment": [1], "label": "x"}]}}}',
                                  '{"database": {"v": {"subset": "training", "duration": 3, "annotations": [{"segment": [1, "a"], "label": "x"}]}}}',
                                  '{"database": {"v": {"subset": "training", "duration": 3, "annotations": [{"segment": [1, 2], "label": null}]}}}'])
def test_malformed_annotations_are_one_error_that_names_the_file(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match="bad.json"):
        data.load_annotations(str(tmp_path / "bad.json"))


def test_a_video_that_stands_twice_is_named(tmp_path):
    video = json.dumps(entry())
    (tmp_path / "bad.json").write_text(f'{{"database": {{"v": {video}, "w": {video}, "v": {video}}}}}')
    with pytest.raises(ValueError, match="bad.json .*'v' stands there more than once"):
        data.load_annotations(str(tmp_path / "bad.json"))


def test_videos_without_frames_are_counted_named_and_left_out(tmp_path):
    subsets = data.load_annotations(write_annotations(tmp_path / "a.json", {"v": entry(), "w": entry(), "x": entry()}))
    (tmp_path / "v.zip").touch()
    said = []
    assert [v.name for v in data.select(subsets, "training", str(tmp_path), "frames", said.append)] == ["v"]
    assert len(said) == 1 and "2 of 3" in said[0] and "w, x" in said[0]
    with pytest.raises(ValueError, match="none of the 3 training videos has features"):
        data.select(subsets, "training", str(tmp_path), "features", said.append)
    with pytest.raises(ValueError, match=r"subset 'train'.*\['training'\]"):
        data.select(subsets, "train", str(tmp_path), "frames", said.append)


SHARED = os.path.join(os.path.dirname(__file__), "../../shared/data")


def shared(name):
    path = f"{SHARED}/{name}"
    return path if os.path.exists(path) else pytest.skip(f"no {name} here")


def test_many_videos_are_a_sequence_in_arrays(tmp_path):
    path = write_annotations(tmp_path / "a.json", {f"v{i}": entry(duration=10.0 + i, segments=[(k, k + 1.0) for k in range(i)], label=f"c{i % 2}") for i in range(5)})
    videos = data.load_annotations(path)["training"]
    assert [v.name for v in videos] == ["v0", "v1", "v2", "v3", "v4"] and len(videos) == 5
    assert videos[-1].name == "v4" and videos[-1].labels == ("c0",) * 4 and videos[0].segments.shape == (0, 2)
    torch.testing.assert_close(videos[3].segments, torch.tensor([[0, 1], [1, 2], [2, 3]]) / 13.0)
    some = videos.take([4, 1, 3], paths=["/4", "/1", "/3"])
    assert [(v.name, len(v.segments), v.labels[0], v.path) for v in some] == [("v4", 4, "c0", "/4"), ("v1", 1, "c1", "/1"), ("v3", 3, "c1", "/3")]
    torch.testing.assert_close(some[2].segments, videos[3].segments)
    assert [v.path for v in some[1:]] == ["/1", "/3"] and data.class_names(some) == ["c0", "c1"] and data.class_names(videos[:2]) == ["c1"]
    assert list(videos.take([])) == []
    for i in (5, -6):
        with pytest.raises(IndexError):
            videos[i]
    names = data.Strings(["a", "", "späte Häuser", "\ud800"])
    assert list(names) == ["a", "", "späte Häuser", "\ud800"] and names[-1] == "\ud800"


def test_segments_with_problems_are_counted_said_and_do_not_stop(tmp_path):
    segments = [(2, 5), (2, 5), (5, 5), (7, 6), (-1, 3), (9, 12), (20, 30), (math.nan, 3), (10, 10.005)]
    path = write_annotations(tmp_path / "a.json", {"v": entry(segments=segments), "w": entry(label="Ambiguous")})
    videos = data.load_annotations(path)["training"]
    assert {k: rows.tolist() for k, rows in data.segment_problems(videos).items()} == {
        "segment is not a number": [7], "segment ends before it starts": [2, 3], "segment outside the video": [4, 5, 6], "segment twice": [1], "label Ambiguous": [9]}
    torch.testing.assert_close(videos[0].segments, torch.tensor([[0.2, 0.5], [0.2, 0.5], [0, 0.3], [0.9, 1]]))
    (tmp_path / "v.zip").touch(), (tmp_path / "w.zip").touch()
    said = []
    data.select({"training": videos}, "training", str(tmp_path), "frames", said.append)
    assert len(said) == 1 and "1 x segment is not a number (left out of training; evaluation refuses them), 2 x segment ends before it starts (left out), 3 x segment outside" in said[0]


def test_segments_that_no_run_can_use_are_found_at_its_start(tmp_path):
    subsets = data.load_annotations(write_annotations(tmp_path / "a.json", {"v": entry(segments=[(5, 2)]), "w": {**entry(segments=[(1, 2), (math.nan, 3)]), "subset": "validation"}}))
    data.check_segments(subsets), data.check_segments(subsets, "validation", "training"), data.check_segments(subsets, "gone", "gone")
    with pytest.raises(ValueError, match="subset training has 1 videos and no segment that can be trained on"):
        data.check_segments(subsets, "training")
    with pytest.raises(ValueError, match="subset validation has 1 segments that are NaN or infinite, first in video w"):
        data.check_segments(subsets, None, "validation")


def test_names_may_be_spelt_with_v_or_without(tmp_path):
    subsets = data.load_annotations(write_annotations(tmp_path / "a.json", {"a": entry(), "v_b": entry()}))
    for name in ("v_a", "b"):
        toy.write_zip(tmp_path / f"{name}.zip", numbered_frames(4), fps=8)
        np.save(tmp_path / f"{name}.npy", np.ones((3, 2), np.float32))
    videos = data.select(subsets, "training", str(tmp_path), "frames")
    assert [(v.name, os.path.basename(v.path)) for v in videos] == [("a", "v_a.zip"), ("v_b", "b.zip")]
    videos = data.select(subsets, "training", str(tmp_path), "features")
    assert [s["name"] for s in (data.FeatureDataset(videos, str(tmp_path), [])[i, data.NATIVE] for i in range(2))] == ["a", "v_b"]


def test_durations_that_annotations_lack_come_from_elsewhere(tmp_path):
    bare = {name: {"subset": "train", "annotations": [{"segment": ["1.0", "2.0"], "label": "x"}]} for name in ("v", "w")}
    subsets = data.load_annotations(write_annotations(tmp_path / "a.json", bare))
    assert data.class_names(subsets["train"]) == ["x"]
    with pytest.raises(ValueError, match="video v has no duration"):
        subsets["train"][0]
    frames, features = tmp_path / "frames", tmp_path / "features"
    frames.mkdir(), features.mkdir()
    toy.write_zip(frames / "v.zip", numbered_frames(32), fps=8)  # 4 s
    (frames / "w.zip").write_bytes(b"torn")
    said = []
    videos = data.select(subsets, "train", str(frames), "frames", said.append)
    assert [v.name for v in videos] == ["v"] and videos[0].segments.tolist() == [[0.25, 0.5]] and "1 of 2 videos have no duration and are left out: w" in said[0]
    for name in "vw":
        np.save(features / f"{name}.npy", np.ones((3, 2), np.float32))
    with pytest.raises(ValueError, match="none of the 2 train videos has a duration.*data.durations"):
        data.select(subsets, "train", str(features), "features", said.append)
    assert [v.duration for v in data.select(subsets, "train", str(features), "features", said.append, frames=str(frames))] == [4]
    (features / "features.json").write_text(json.dumps({"videos": {"v": {"duration_sec": 5.0}, "w": {"duration_sec": 8}}}))
    videos = data.select(subsets, "train", str(features), "features", said.append)
    assert [v.duration for v in videos] == [5, 8] and videos[1].segments.tolist() == [[0.125, 0.25]]
    (tmp_path / "d.json").write_text('{"v_v": "10", "w": 20}')
    assert [v.duration for v in data.select(subsets, "train", str(features), "features", said.append, durations=str(tmp_path / "d.json"))] == [10, 20]


def test_real_annotation_files(tmp_path):
    anet = data.load_annotations(shared("anet13_annotations.json"))
    assert {k: (len(v), len(v.segments), len(data.class_names(v))) for k, v in anet.items()} == {"training": (9649, 14859, 200), "validation": (4728, 7293, 200)}
    problems = {k: len(rows) for k, rows in data.segment_problems(anet["validation"]).items()}
    with open(shared("anet13_annotations.json")) as f:
        database = json.load(f)["database"]
    twice = sum(len(v["annotations"]) - len({(*a["segment"], a["label"]) for a in v["annotations"]}) for v in database.values() if v["subset"] == "validation")
    assert problems["segment ends before it starts"] == 3 and problems["segment twice"] == twice > 0  # the three that the field knows
    for video in anet["validation"][::97]:
        info = database[video.name]
        segments = torch.tensor([a["segment"] for a in info["annotations"]], dtype=torch.float64) / info["duration"]
        torch.testing.assert_close(video.segments.double(), segments.clamp(0, 1), atol=1e-6, rtol=0)
    thumos = data.load_annotations(shared("thumos14_annotations.json"))
    assert {k: (len(v), len(v.segments)) for k, v in thumos.items()} == {"train": (200, 3007), "test": (210, 3311)}
    assert np.isnan(thumos["test"].duration).all() and len(data.class_names(thumos["test"])) == 20


# ---------------------------------------------------------------- fidelities and the sampler

def test_fidelities_are_the_papers():
    full = data.fidelities(100, 224)
    assert [(f.name, f.snippets, f.size) for f in full.values()] == [("full", 100, 224), ("S", 100, 112), ("T", 25, 224), ("ST", 50, 158)]
    with pytest.raises(ValueError, match="leave a snippet"):
        data.fidelities(3, 224, r_t=4)


S, T, ST = (data.Fidelity(*x) for x in (("S", 8, 10), ("T", 2, 20), ("ST", 4, 14)))


def epoch_of(sampler, epoch, step=0):
    sampler.set_epoch(epoch, step)
    return list(sampler)


def test_long_cycle_moves_with_epochs_and_short_cycle_with_batches():
    long = data.CyclicFidelitySampler(20, 4, [S, T, ST], cycle="long", period=2)
    assert [{f.name for batch in epoch_of(long, e) for _, f in batch} for e in range(7)] == [{"S"}, {"S"}, {"T"}, {"T"}, {"ST"}, {"ST"}, {"S"}]
    short = data.CyclicFidelitySampler(20, 4, [S, T, ST], cycle="short", period=2)
    names = [{f.name for _, f in batch} for e in range(2) for batch in epoch_of(short, e)]
    assert names == [{"S"}, {"S"}, {"T"}, {"T"}, {"ST"}, {"ST"}, {"S"}, {"S"}, {"T"}, {"T"}]  # goes on across epochs


def test_every_video_once_an_epoch_up_to_padding():
    sampler = data.CyclicFidelitySampler(10, 4, [S])
    first, second = epoch_of(sampler, 0), epoch_of(sampler, 1)
    indices = [i for batch in first for i, _ in batch]
    assert len(first) == len(sampler) == 3 and sorted(indices[:10]) == list(range(10)) and indices[10:] == indices[:2]
    assert first != second and first == epoch_of(data.CyclicFidelitySampler(10, 4, [S]), 0)
    assert first != epoch_of(data.CyclicFidelitySampler(10, 4, [S], seed=1), 0)
    assert [len(b) for b in epoch_of(data.CyclicFidelitySampler(2, 5, [S]), 0)] == [5]  # fewer videos than a batch


def test_samples_that_belong_together_stay_in_one_batch():
    sampler = data.CyclicFidelitySampler(12, 4, [data.Fidelity("full", 1, 16)], seed=3, together=2)
    order = [i for batch in sampler for i, _ in batch]
    assert sorted(order) == list(range(12)) and order != list(range(12))
    assert all(i % 2 == 0 and j == i + 1 for i, j in zip(order[::2], order[1::2]))
    with pytest.raises(ValueError, match="7 samples cannot be kept together in groups of 2"):
        data.CyclicFidelitySampler(7, 4, [], together=2)


def test_ranks_share_fidelities_and_split_the_global_batch():
    whole = epoch_of(data.CyclicFidelitySampler(10, 4, [S, T], cycle="short"), 3)
    ranks = [epoch_of(data.CyclicFidelitySampler(10, 4, [S, T], cycle="short", rank=r, world=2), 3) for r in range(2)]
    assert [a + b for a, b in zip(*ranks)] == whole
    with pytest.raises(ValueError, match="batch size 4 cannot be divided evenly over 3"):
        data.CyclicFidelitySampler(10, 4, [S], world=3)


def test_resuming_goes_on_with_the_batches_that_were_left():
    sampler = data.CyclicFidelitySampler(10, 2, [S, T], cycle="short")
    assert epoch_of(sampler, 5)[3:] == epoch_of(sampler, 5, step=3) and len(sampler) == 2


# ---------------------------------------------------------------- snippets and frames

def test_snippets_are_windows_around_evenly_spread_centres():
    # 128 frames, 32 snippets of 4 adjacent frames tile the video
    assert data.snippet_frames(128, 32, 4, 1).flatten().tolist() == list(range(128))
    # the paper's snippet: 64 frames around 1000, every 8th
    assert data.snippet_frames(2000, 1, 8, 8).tolist() == [[972, 980, 988, 996, 1004, 1012, 1020, 1028]]
    short = data.snippet_frames(10, 2, 4, 8)  # shorter than a window: clamped
    assert short.min() == 0 and short.max() == 9 and short[0].tolist() == [0, 0, 6, 9]


def test_fewer_snippets_are_evenly_spread_over_the_full_ones():
    assert data.snippet_rows(8, 2).tolist() == [2, 6] and data.snippet_rows(8, 2, 0.5).tolist() == [1, 5]
    assert data.snippet_rows(9, 3).tolist() == data.snippet_rows(9, 3, 0.5).tolist() == [1, 4, 7]  # an odd ratio has a middle
    for shift in (0.0, 0.5):
        assert data.snippet_rows(8, 8, shift).tolist() == list(range(8))
    centres = (torch.stack([data.snippet_rows(100, 25), data.snippet_rows(100, 25, 0.5)]).double().mean(0) + 0.5) / 100
    torch.testing.assert_close(centres, (torch.arange(25, dtype=torch.float64) + 0.5) / 25)  # unbiased over the two phases


def numbered_frames(n, size=16):
    """Frame i is uniformly 2 * i: JPEG keeps that to within 1."""
    return torch.arange(n, dtype=torch.uint8).mul(2)[:, None, None, None].expand(n, 3, size, size).contiguous()


@pytest.fixture
def store(tmp_path):
    toy.write_zip(tmp_path / "v.zip", numbered_frames(64), fps=8)
    return data.VideoDataset([data.Video("v", 8.0, torch.tensor([[0.25, 0.5]]), ("x",))], str(tmp_path), snippets=8, frames=4, stride=2, flip=False)


def test_a_video_is_read_at_any_fidelity(store):
    full = store[0, data.Fidelity("full", 8, 14)]["frames"]
    assert full.shape == (8, 4, 3, 14, 14) and full.dtype == torch.uint8
    seen = full.float().mean((2, 3, 4)) / 2
    torch.testing.assert_close(seen, data.snippet_frames(64, 8, 4, 2).float(), atol=0.6, rtol=0)
    low = store[0, data.Fidelity("ST", 4, 7)]["frames"]
    assert low.shape == (4, 4, 3, 7, 7)
    torch.testing.assert_close(low.float().mean((2, 3, 4)) / 2, seen[data.snippet_rows(8, 4)], atol=0.6, rtol=0)


def test_views_are_random_by_epoch_and_video_and_the_same_again(tmp_path):
    ramp = torch.arange(16, dtype=torch.uint8).mul(15).expand(3, 16, 16)  # brightness tells the column
    toy.write_zip(tmp_path / "v.zip", ramp.expand(8, -1, -1, -1).contiguous(), fps=8)
    dataset = data.VideoDataset([data.Video("v", 1.0, torch.zeros(0, 2), ())] * 2, str(tmp_path), snippets=2, frames=2, stride=2, crop=0.5, train=True)
    fidelity = data.Fidelity("full", 2, 8)

    def view(epoch, index):
        dataset.set_epoch(epoch)
        frames = dataset[index, fidelity]["frames"]
        assert (frames.float() - frames[:1, :1].float()).abs().max() < 1  # one crop and flip for all frames of the video
        return frames
    torch.testing.assert_close(view(3, 1), view(3, 1))
    views = {tuple(view(e, i)[0, 0, 0, 0].tolist()) for e in range(8) for i in range(2)}
    assert len(views) > 8
    rising = [v[0] < v[-1] for v in views]
    assert any(rising) and not all(rising)  # flipped and not


def test_a_batch_lies_in_one_piece_and_no_sample_is_written_over(tmp_path):
    toy.write_zip(tmp_path / "v.zip", numbered_frames(64), fps=8)
    toy.write_zip(tmp_path / "w.zip", 255 - numbered_frames(40), fps=8)
    videos = [data.Video(name, 8.0, torch.zeros(0, 2), ()) for name in "vw"]
    dataset = data.VideoDataset(videos, str(tmp_path), snippets=8, frames=4, stride=2, train=True)
    for f in (data.Fidelity("full", 8, 14), data.Fidelity("ST", 4, 7)):
        pairs = [(1, f), (0, f), (1, f)]
        samples = dataset.__getitems__(pairs)
        batch = data.collate(samples)["frames"]
        assert batch.shape == (3, f.snippets, 4, 3, f.size, f.size) and batch.data_ptr() == samples[0]["frames"].data_ptr()  # not copied
        assert batch.movedim(3, -1).is_contiguous()
        again = [dataset[p] for p in pairs]  # while the batch is alive
        kept = [s["frames"].clone() for s in again]
        for i in range(3):
            assert torch.equal(batch[i], kept[i])
        assert torch.equal(data.collate(again)["frames"], batch)  # samples that lie apart
        del samples, batch
        for _ in range(3):
            dataset.__getitems__(pairs)  # may reuse the memory of the batch, not that of the samples still held
        assert all(torch.equal(s["frames"], k) for s, k in zip(again, kept))


def test_memory_of_a_batch_is_used_again_when_nobody_holds_it():
    data._spare.__dict__.clear()
    first = data.pixels(1000)
    place, part = first.data_ptr(), first.view(10, 100)[3:].movedim(0, 1)
    assert data.pixels(1000).data_ptr() != place
    del first
    assert data.pixels(1000).data_ptr() != place  # a view still holds it
    del part
    held = [data.pixels(n) for n in (1000, 900)]
    assert place in [x.data_ptr() for x in held] and len({x.data_ptr() for x in held}) == 2


def test_samples_of_folders_and_of_zips_with_copies_agree(tmp_path):
    (tmp_path / "f/v").mkdir(parents=True)
    ramp = torch.arange(96, dtype=torch.uint8).mul(2).expand(3, 64, 96)
    for i in range(32):
        JpegEncoder((ramp + i).contiguous()).to_file(f"{tmp_path}/f/v/img_{i + 1:05d}.jpg", quality=95)
    (tmp_path / "f/v/video.json").write_text('{"fps": 8, "duration_sec": 4.0}')
    settings = {"snippets": 8, "frames": 4, "stride": 2, "short_side": 64, "copies": [45, 32], "quality": 95}
    assert media.prepare({"v": str(tmp_path / "f/v")}, str(tmp_path / "z"), settings, 0) == (["v"], {})
    video = data.Video("v", 4.0, torch.zeros(0, 2), ())
    options = {"snippets": 8, "frames": 4, "stride": 2, "train": True}
    folder, prepared = (data.VideoDataset([video._replace(path=str(tmp_path / p))], "", **options) for p in ("f/v", "z/v.zip"))
    for epoch in range(3):
        folder.set_epoch(epoch), prepared.set_epoch(epoch)
        for f in data.fidelities(8, 56).values():
            a, b = folder[0, f]["frames"].float(), prepared[0, f]["frames"].float()
            assert a.shape == b.shape == (f.snippets, 4, 3, f.size, f.size) and (a - b).abs().mean() < 3  # two levels are a pixel: of corners
    clips = [data.Clip(str(tmp_path / p), 1.0, 2.0, 0) for p in ("f/v", "z/v.zip")]
    a, b = (data.ClipDataset([c], frames=4, stride=2, crop=1.0)[0, data.Fidelity("full", 1, 64)]["frames"].float() for c in clips)
    assert (a - b).abs().mean() < 1.5
    (tmp_path / "f/v/video.json").unlink()  # no frame rate: from the duration of the whole video
    c = data.ClipDataset([clips[0]._replace(duration_sec=4.0)], frames=4, stride=2, crop=1.0)[0, data.Fidelity("full", 1, 64)]["frames"]
    assert torch.equal(c.float(), a)
    with pytest.raises(ValueError, match="f/v tells no frame rate, so where are 1 to 2 s"):
        data.ClipDataset(clips[:1], frames=4, stride=2)[0, data.Fidelity("full", 1, 64)]
    assert len(data.ClipDataset([clips[0]._replace(start_sec=0.0, end_sec=math.inf)], frames=4, stride=2)[0, data.Fidelity("full", 1, 64)]["frames"]) == 1  # whole: none is needed


def test_crop_and_resize_take_the_square_that_they_say():
    frames = torch.zeros(1, 3, 8, 16, dtype=torch.uint8)
    frames[..., 12:] = 200
    assert (data.crop_resize(frames, 4, 0.5, (0, 1)) == 200).all() and (data.crop_resize(frames, 4, 0.5, (1, 0)) == 0).all()
    assert (data.crop_resize(frames, 2, 0.5, (0, 1)) == 200).all()
    half = data.crop_resize(frames, 8, 1.0, (0, 1))
    assert (half[..., 4:] == 200).all() and (half[..., :4] == 0).all()
    assert (data.crop_resize(frames, 8, 1.0, (0, 1), flip=True) == half.flip(3)).all()


def test_missing_frames_are_replaced_by_the_nearest_kept(tmp_path):
    frames, kept = numbered_frames(40), [3, 10, 30]
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as z:
        z.writestr("video.json", json.dumps({"fps": 8, "num_frames": 40, "duration_sec": 5, "frames": kept}))
        for i in kept:
            z.writestr(f"{i:06d}.jpg", JpegEncoder(frames[i]).to_tensor(quality=95).numpy().tobytes())
    read = media.FrameZip(str(tmp_path / "v.zip")).read(np.array([0, 3, 6, 7, 19, 21, 39, 10]))
    assert (read.float().mean((1, 2, 3)) / 2).round().tolist() == [3, 3, 3, 10, 10, 30, 30, 10]


def test_broken_frame_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.zip"):
        media.FrameZip(str(tmp_path / "none.zip"))
    (tmp_path / "torn.zip").write_bytes(b"PK\3\4 and then nothing")
    with pytest.raises(ValueError, match="torn.zip.*prepare this video again"):
        media.FrameZip(str(tmp_path / "torn.zip"))
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as z:
        z.writestr("video.json", json.dumps({"fps": 8, "num_frames": 2, "duration_sec": 1, "frames": [0, 1]}))
        z.writestr("000000.jpg", b"no JPEG")
    for number in (0, 1):
        with pytest.raises(ValueError, match=f"odd.zip: frame 00000{number}.jpg"):
            media.FrameZip(str(tmp_path / "odd.zip")).read(np.array([number]))


# ---------------------------------------------------------------- clips and features

def test_clips_stay_within_their_segment(tmp_path):
    toy.write_zip(tmp_path / "v.zip", numbered_frames(64), fps=8)
    clip = data.Clip(str(tmp_path / "v.zip"), 2.0, 4.0, 1)  # frames 16 .. 31
    central = data.ClipDataset([clip], frames=4, stride=2, crop=1.0)
    fidelity = data.Fidelity("full", 1, 16)
    sample = central[0, fidelity]
    assert sample["frames"].shape == (1, 4, 3, 16, 16) and sample["label"] == 1
    assert (sample["frames"].float().mean((0, 2, 3, 4)) / 2).round().tolist() == [21, 23, 25, 27]
    random = data.ClipDataset([clip], frames=4, stride=2, crop=1.0, train=True)
    firsts = set()
    for epoch in range(30):
        random.set_epoch(epoch)
        seen = (random[0, fidelity]["frames"].float().mean((0, 2, 3, 4)) / 2).round()
        assert seen.min() >= 16 and seen.max() <= 31 and (seen.diff() == 2).all()
        firsts.add(seen[0].item())
    assert len(firsts) > 5
    short = data.ClipDataset([data.Clip(str(tmp_path / "v.zip"), 2.0, 2.25, 0)], frames=4, stride=2, crop=1.0)  # frames 16, 17
    assert set((short[0, fidelity]["frames"].float().mean((0, 2, 3, 4)) / 2).round().tolist()) <= {16, 17}


def test_segments_are_parts_of_the_video_as_in_every_stage(tmp_path):
    """A video half as long as its annotation says: frames 16 to 32 of 64 are from 4 to 8 of 16 s."""
    toy.write_zip(tmp_path / "v.zip", numbered_frames(64), fps=8)
    videos = [data.Video("v", 16.0, torch.tensor([[0.25, 0.5]]), ("x",), str(tmp_path / "v.zip"))]
    sample = data.ClipDataset(data.segment_clips(videos, "", ["x"]), frames=4, stride=2, crop=1.0)[0, data.Fidelity("full", 1, 16)]
    assert (sample["frames"].float().mean((0, 2, 3, 4)) / 2).round().tolist() == [21, 23, 25, 27]


def test_a_clip_behind_the_end_of_its_media_is_named(tmp_path):
    toy.write_zip(tmp_path / "v.zip", numbered_frames(64), fps=8)
    for start in (8.0, 9.0):
        with pytest.raises(ValueError, match=rf"v.zip: a clip from {start:g} to 10 s, of a video of 8 s, has no frame"):
            data.ClipDataset([data.Clip(str(tmp_path / "v.zip"), start, 10.0, 0)], frames=4, stride=2)[0, data.Fidelity("full", 1, 16)]


def test_clips_are_listed_by_class(tmp_path):
    for name in ("b/2.zip", "a/1.zip", "a/0.zip", "a/readme.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    clips, classes = data.list_clips(str(tmp_path), ".zip")
    assert classes == ["a", "b"] and [(c.path[-7:], c.label) for c in clips] == [("a/0.zip", 0), ("a/1.zip", 0), ("b/2.zip", 1)]
    assert clips[0].start_sec == 0 and clips[0].end_sec == math.inf
    assert data.list_clips(str(tmp_path), ".zip", ["a", "aa", "b"])[0][2].label == 2
    with pytest.raises(ValueError, match=r"lack: \['b'\]"):
        data.list_clips(str(tmp_path), ".zip", ["a"])
    with pytest.raises(ValueError, match="no .jpg file in"):
        data.list_clips(str(tmp_path), ".jpg")


def test_features_are_resized_to_the_fidelity_and_checked(tmp_path):
    videos = [data.Video("v", 8.0, torch.tensor([[0.25, 0.5]]), ("x", "x")), data.Video("w", 8.0, torch.zeros(0, 2), ())]
    np.save(tmp_path / "v.npy", np.arange(8, dtype=np.float32).reshape(4, 2))
    np.save(tmp_path / "w.npy", np.ones((6, 2), np.float32))
    dataset = data.FeatureDataset(videos, str(tmp_path), ["x", "y"])
    assert dataset.channels == 2
    sample = dataset[0, data.Fidelity("full", 4, 0)]
    assert sample["features"].tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]] and sample["target"].tolist() == [1, 0]
    assert dataset[0, data.Fidelity("T", 2, 0)]["features"].tolist() == [[1, 5], [2, 6]]
    assert dataset[1, data.Fidelity("full", 4, 0)]["target"].tolist() == [0, 0]
    mean, std, video_std = dataset.statistics()
    x = np.concatenate([np.arange(8).reshape(4, 2), np.ones((6, 2))])
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std, x.std(0), rtol=1e-6)
    np.testing.assert_allclose(video_std, [1, 1.5], rtol=1e-6)  # means of the two videos: (3, 4) and (1, 1)
    np.save(tmp_path / "w.npy", np.ones((6, 3), np.float32))
    for read in (dataset.statistics, lambda: dataset[1, data.Fidelity("full", 4, 0)]):
        with pytest.raises(ValueError, match="w.npy has 3 channels, .*v.npy has 2"):
            read()
    (tmp_path / "w.npy").write_bytes(b"torn")
    with pytest.raises(ValueError, match="w.npy cannot be read"):
        dataset[1, data.Fidelity("full", 4, 0)]


def feature_files(folder):
    """Features of v (4, 2) and w (6, 2) as .npy, as one HDF5 file, as one HDF5 file each."""
    h5py = pytest.importorskip("h5py")
    arrays = {"v": np.arange(8, dtype=np.float32).reshape(4, 2), "w": np.ones((6, 2), np.float32)}
    (folder / "npy").mkdir(), (folder / "h5").mkdir()
    with h5py.File(folder / "all.h5", "w") as f:
        for name, x in arrays.items():
            np.save(folder / f"npy/{name}.npy", x)
            f[f"v_{name}"] = x
            with h5py.File(folder / f"h5/{name}.hdf5", "w") as own:
                own["any/c3d_features"] = x
    return arrays, [str(folder / x) for x in ("npy", "all.h5", "h5")]


def test_features_come_from_npy_and_hdf5_files_alike(tmp_path):
    arrays, sources = feature_files(tmp_path)
    videos = [data.Video(name, 8.0, torch.zeros(0, 2), ()) for name in "vw"]
    for source in sources:
        assert sorted(data.find_features(source, ["v", "w", "x"])) == ["v", "w"]
        dataset = data.FeatureDataset(videos, source, [])
        assert dataset.channels == 2 and [dataset.snippets(i) for i in range(2)] == [4, 6]
        for i, x in enumerate(arrays.values()):
            assert np.array_equal(dataset[i, data.NATIVE]["features"].t().numpy(), x)
        windows = data.WindowDataset(dataset, 4)[1, None]
        assert windows["first"].tolist() == [0, 2] and np.array_equal(windows["features"].permute(0, 2, 1), np.stack([x[:4], x[2:]]))
        shape = data.read_features(dataset.paths[0][1], values=False)
        assert shape.shape == (6, 2) and (source == sources[0] or shape.strides == (0, 0))  # nothing read, nothing held
    loader = torch.utils.data.DataLoader(data.FeatureDataset(videos, sources[1], []), batch_sampler=[[(0, data.Fidelity("full", 4, 0))], [(1, data.Fidelity("full", 4, 0))]],
                                         collate_fn=data.collate, num_workers=2)  # two processes read one HDF5 file
    assert [b["name"] for b in loader] == [["v"], ["w"]]


def test_features_of_several_sources_stand_side_by_side(tmp_path):
    arrays, sources = feature_files(tmp_path)
    videos = [data.Video(name, 8.0, torch.zeros(0, 2), ()) for name in "vw"]
    (tmp_path / "long").mkdir()
    np.save(tmp_path / "long/v.npy", np.repeat(arrays["v"][:, :1] + 10, 2, 0).astype(np.float16))  # (8, 1)
    np.save(tmp_path / "long/w.npy", np.full((3, 1), 5.0))
    both = data.FeatureDataset(videos, [sources[0], str(tmp_path / "long")], [])
    assert both.channels == 3
    assert both[0, data.Fidelity("full", 4, 0)]["features"].tolist() == [[0, 2, 4, 6], [1, 3, 5, 7], [10, 12, 14, 16]]
    assert both[0, data.NATIVE]["features"].shape == (3, 4)
    mean, std, video_std = both.statistics()
    parts = [data.FeatureDataset(videos, s, []).statistics() for s in (sources[0], str(tmp_path / "long"))]
    for whole, a, b in zip((mean, std, video_std), *parts):
        torch.testing.assert_close(whole, torch.cat([a, b]))
    (tmp_path / "long/w.npy").unlink()
    with pytest.raises(ValueError, match="long has no features of w"):
        data.FeatureDataset(videos, [sources[0], str(tmp_path / "long")], [])
    subsets = {"training": data.load_annotations(write_annotations(tmp_path / "a.json", {"v": entry(), "w": entry()}))["training"]}
    said = []
    assert [v.name for v in data.select(subsets, "training", [sources[0], str(tmp_path / "long")], "features", said.append)] == ["v"] and "1 of 2" in said[0]


def test_odd_feature_files_are_named(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    np.save(tmp_path / "line.npy", np.ones(5, np.float32)), np.save(tmp_path / "whole.npy", np.ones((5, 2), np.int64)), np.save(tmp_path / "none.npy", np.ones((0, 2)))
    with h5py.File(tmp_path / "two.h5", "w") as f:
        f["a"], f["b"] = np.ones((3, 2)), np.ones((3, 2))
    (tmp_path / "torn.h5").write_bytes(b"no HDF5")
    for name, words in (("line.npy", r"shape \(5,\)"), ("whole.npy", "int64; expected floating-point features"), ("none.npy", r"shape \(0, 2\)"),
                        ("two.h5", r"2 entries instead of one array: \['a', 'b'\]"), ("torn.h5", "cannot be read")):
        with pytest.raises(ValueError, match=f"{name}.*{words}"):
            data.read_features(str(tmp_path / name))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match=r"needs h5py: pip install h5py"):
        data.find_features(str(tmp_path / "two.h5"), ["a"])


def test_collate_stacks_tensors_and_keeps_lists():
    batch = data.collate([{"name": "a", "x": torch.zeros(2), "label": 1, "segments": torch.zeros(1, 2)},
                          {"name": "b", "x": torch.ones(2), "label": 0, "segments": torch.zeros(3, 2)}])
    assert batch["name"] == ["a", "b"] and batch["x"].tolist() == [[0, 0], [1, 1]] and batch["label"].tolist() == [1, 0]
    assert [len(s) for s in batch["segments"]] == [1, 3]


def test_seeds_are_pure_functions_of_their_key():
    assert data.seed_of(0, "view", 1, 2) == data.seed_of(0, "view", 1, 2)
    assert len({data.seed_of(0, "view", e, i) for e in range(50) for i in range(50)}) == 2500
    assert 0 <= data.seed_of("x") < 2**63


# ---------------------------------------------------------------- python data.py

@pytest.fixture
def messy(tmp_path):
    """Six training videos, of which v is fine, and a validation video; their annotations, frames and features."""
    (tmp_path / "frames").mkdir(), (tmp_path / "features").mkdir()
    annotations = {"v": entry(duration=8.0), "gone": entry(), "torn": entry(), "long": entry(duration=8.2), "only": entry(segments=[(3, 2), (5, 50)]), "wide": entry(),
                   "w": entry("validation", 8.0, label="run")}
    for name in ("v", "w", "long"):
        toy.write_zip(tmp_path / f"frames/{name}.zip", numbered_frames(64), fps=8)
    (tmp_path / "frames/torn.zip").write_bytes(b"torn")
    for name, c in (("v", 2), ("w", 2), ("only", 2), ("wide", 3), ("long", 2)):
        np.save(tmp_path / f"features/{name}.npy", np.ones((4, c), np.float32))
    return write_annotations(tmp_path / "a.json", annotations), str(tmp_path / "frames"), str(tmp_path / "features")


def test_check_lists_every_problem(messy):
    annotations, frames, features = messy
    said = []
    problems, fatal = check.check(annotations, frames=frames, features=features, say=said.append)
    assert sorted((s, v, p) for s, v, p, _ in problems) == sorted([
        ("training", "torn", "frames cannot be read"), ("training", "gone", "media missing"), ("training", "long", "duration disagrees"),
        ("training", "only", "segment ends before it starts"), ("training", "only", "segment outside the video"), ("training", "wide", "other channel count"),
        ("training", "-", "label lacking"), ("validation", "-", "label lacking")])
    assert {p: d for s, v, p, d in problems if v == "long"} == {"duration disagrees": f"8.2 s in the annotations, 8.00 s in {frames}/long.zip"}
    assert len(fatal) == 1 and fatal[0].startswith("training would stop at: torn (") and ", wide (" in fatal[0]
    assert said == ["training: 6 videos, 7 segments, 0.02 hours, 1 classes; 2 with frames, 4 with features, 2 with neither",
                    "validation: 1 videos, 1 segments, 0.00 hours, 1 classes; 1 with frames, 1 with features, 0 with neither"]


def test_check_says_what_keeps_training_from_starting(messy, tmp_path):
    annotations, frames, features = messy
    os.remove(f"{frames}/w.zip")
    assert check.check(annotations, frames=frames, say=lambda words: None)[1][0] == "training cannot start: no video of subset validation has frames or features that can be read"
    os.remove(f"{frames}/torn.zip"), os.remove(f"{features}/wide.npy")
    for required, where, words in ((["frames"], frames, ["no video of subset validation has frames that can be read"]), (["features"], frames, []), ([], "/none", []),
                                   (["frames"], None, ["the stages read frames: set data.frames"] + [f"no video of subset {s} has frames that can be read" for s in ("training", "validation")]),
                                   (["frames"], "/none", ["there are no frames at /none: no such file or folder"] + [f"no video of subset {s} has frames that can be read" for s in ("training", "validation")])):
        assert check.check(annotations, frames=where, features=features, required=required, say=lambda words: None)[1] == [f"training cannot start: {w}" for w in words]
    np.save(f"{features}/v.npy", np.full((4, 2), np.inf, np.float32))
    problems, fatal = check.check(annotations, features=features, required=["features"], say=lambda words: None)
    assert ("training", "v", "features cannot be read", f"{features}/v.npy has NaN or infinite features: extract this video again") in problems
    assert fatal == [f"training would stop at: v ({features}/v.npy has NaN or infinite features: extract this video again)"]
    assert "no subset 'testing'" in check.check(annotations, subsets=["training", "testing"], say=lambda words: None)[1][0]
    bare = write_annotations(tmp_path / "b.json", {"v": {"subset": "train", "annotations": [{"segment": [1, 2], "label": "x"}]}})
    assert "no duration" in check.check(bare, say=lambda words: None)[1][0].replace("has a duration", "no duration")
    assert check.check(bare, frames=frames, say=lambda words: None) == ([], [])  # from its frames


def test_check_notices_frames_that_were_prepared_for_other_snippets(messy, tmp_path):
    annotations, frames, _ = messy
    folder = tmp_path / "in/v"
    folder.mkdir(parents=True)
    for i in range(64):
        JpegEncoder(numbered_frames(64)[i]).to_file(f"{folder}/img_{i:05d}.jpg")
    (folder / "video.json").write_text('{"fps": 8, "duration_sec": 8.0}')
    settings = {"snippets": 8, "frames": 2, "stride": 2, "short_side": 16, "copies": [], "quality": 90}
    media.prepare({"v": str(folder)}, str(tmp_path / "made"), settings, 0)
    wanted = {"snippets": 8, "rate": None, "frames": 2, "stride": 2}
    look = lambda s: {p for _, v, p, _ in check.check(annotations, subsets=["training"], frames=str(tmp_path / "made"), settings=s, say=lambda w: None)[0] if v == "v"}  # noqa: E731
    assert look(wanted) == set() and look({**wanted, "stride": 4}) == look({"rate": 3.0, "frames": 2, "stride": 2}) == {"frames prepared otherwise"}
    subsets, said = data.load_annotations(annotations), []
    for s in (wanted, {**wanted, "snippets": 20}):
        data.select(subsets, "training", str(tmp_path / "made"), "frames", said.append, settings=s)
    assert len([s for s in said if "was prepared for" in s and "'snippets': 20" in s and "prepare anew" in s]) == 1


def test_check_writes_its_list_beside_the_annotations_and_nothing_over(messy, tmp_path, capsys):
    annotations, frames, features = messy
    command = ["check", "--annotations", annotations, "--frames", frames, "--features", features]
    assert data.main(command) == data.main(command) == 1
    lines = (tmp_path / "a.problems.txt").read_text().splitlines()
    assert len(lines) == 9 and lines[0].startswith(check.MARK) and "training\tgone\tmedia missing\t" in "\n".join(lines)
    printed = capsys.readouterr().out
    assert "8 problems, listed in" in printed and "2 x label lacking" in printed
    (tmp_path / "mine.txt").write_text("notes")
    assert data.main([*command, "--problems", str(tmp_path / "mine.txt")]) == 1 and (tmp_path / "mine.txt").read_text() == "notes"
    assert "is no list of problems: name another file with --problems" in capsys.readouterr().err
    assert data.main(["check", "--annotations", annotations, "--frames", str(tmp_path)]) == 1
    assert "training cannot start: no video of subset training" in capsys.readouterr().out
    assert data.main(["check", "--annotations", str(tmp_path / "none.json")]) == 1 and data.main(["check"]) == 1


@pytest.mark.parametrize("early", [True, False])
def test_a_reader_that_has_seen_enough_ends_check_quietly(messy, tmp_path, early):
    annotations, frames, _ = messy
    read, write = os.pipe()
    command = [sys.executable, "data.py", "check", "--annotations", annotations, "--frames", frames, "--problems", f"{tmp_path}/problems.txt"]
    process = subprocess.Popen(command, stdout=write, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1" if early else ""})
    os.close(write), os.close(read)
    assert (process.wait(60), process.stderr.read()) == (141, "")


def test_check_takes_a_config(messy, tmp_path, capsys):
    annotations, frames, features = messy
    words = [f"data.annotations={annotations}", f"data.frames={frames}", f"data.features=[{features}, {features}]"]
    for stages, torn in (("[head, detect]", False), ("[lofi, features, head]", True)):
        assert data.main(["check", "--cfg", "configs/toy.yaml", "--set", *words, f"stages={stages}"]) == 1
        printed = capsys.readouterr().out
        assert "training: 6 videos" in printed and ("training would stop at: torn" in printed) == torn and "wide.npy has 3 channels, most have 2)" in printed
    os.remove(f"{features}/wide.npy"), os.remove(f"{frames}/torn.zip")
    assert data.main(["check", "--cfg", "configs/toy.yaml", "--set", *words, "stages=[head, detect]"]) == 0
    assert data.main(["check", "--cfg", "configs/toy.yaml", "--set", *words[:2], f"out={tmp_path}/run", "stages=[head, detect]"]) == 1
    assert f"there are no features at {tmp_path}/run/features" in capsys.readouterr().out
    assert data.main(["check", "--cfg", "configs/toy.yaml", "--set", *words, "data.frames=/none", "stages=[lofi]"]) == 1
    assert "there are no frames at /none" in capsys.readouterr().out
    assert data.main(["check", "--cfg", "configs/toy.yaml", "--set", *words, "data.val_subset=test"]) == 1
    assert "no subset 'test', only ['training', 'validation']" in capsys.readouterr().out


def test_prepare_takes_the_annotated_videos_and_tells_what_failed(tmp_path, capsys):
    for name, content in (("a", None), ("v_b", b"broken"), ("other", None)):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(8):
            (tmp_path / "in" / name / f"img_{i}.jpg").write_bytes(content or JpegEncoder(numbered_frames(8)[i]).to_tensor().numpy().tobytes())
        (tmp_path / "in" / name / "video.json").write_text('{"fps": 8, "duration_sec": 1.0}')
    annotations = write_annotations(tmp_path / "a.json", {"a": entry(), "b": entry(), "c": entry("validation")})
    command = ["prepare", "--videos", str(tmp_path / "in"), "--annotations", annotations, "--out", str(tmp_path / "out"), "--snippets", "2", "--frames", "2", "--stride", "1",
               "--short-side", "16", "--workers", "0"]
    assert data.main(command) == 1
    printed = capsys.readouterr().out
    assert "1 of 3 videos are not in" in printed and "1 prepared, 0 were there already, 1 failed, 1 missing" in printed and "  b: " in printed
    assert os.listdir(tmp_path / "out") == ["a.zip"] and media.open_media(f"{tmp_path}/out/a.zip").kept.tolist() == [1, 2, 5, 6]
    assert media.open_media(f"{tmp_path}/out/a.zip").prepared["copies"] == [11, 8]
    assert data.main([*command, "--subsets", "validation"]) == 1 and "none of the 1 videos is in" in capsys.readouterr().err
    assert data.main([*command, "--subsets", "test"]) == 1 and "no subset ['test']" in capsys.readouterr().err
    assert data.main([*command, "--quality", "0"]) == 1 and "expected numbers of at least 1" in capsys.readouterr().err
    os.remove(tmp_path / "in/v_b/img_0.jpg"), data.main([*command, "--copies"])
    assert "prepared otherwise (copies [11, 8] there, [] now)" in capsys.readouterr().out


def test_wrong_arguments_are_one_line_each(messy, tmp_path, capsys):
    annotations, frames, features = messy
    (tmp_path / "file").write_text("x")
    (tmp_path / "videos/v").mkdir(parents=True)
    prepare = ["prepare", "--videos", str(tmp_path / "videos"), "--out"]
    bare = write_annotations(tmp_path / "b.json", {"v": {"subset": "train", "annotations": [{"segment": [1, 2], "label": "x"}]}})
    for command, words in (([*prepare, f"{tmp_path}/file"], "file is no folder that can be written to"), ([*prepare, f"{tmp_path}/file/out"], "file/out is no folder"),
                           ([*prepare, f"{tmp_path}/out", "--workers", "-1"], "--workers -1: expected 0 or more"),
                           (["check", "--annotations", bare, "--durations", f"{tmp_path}/file"], "file cannot be read as durations"),
                           (["check", "--annotations", bare, "--durations", f"{tmp_path}/none"], "none cannot be read as durations")):
        assert data.main(command) == 1
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and error.startswith("data.py: ")


@pytest.mark.parametrize("out", ["in", "in/out", "in/deep/out"])
def test_prepare_into_the_folder_of_the_videos(tmp_path, capsys, out):
    (tmp_path / "in/v").mkdir(parents=True)
    for i in range(8):
        JpegEncoder(numbered_frames(8)[i]).to_file(f"{tmp_path}/in/v/img_{i}.jpg")
    (tmp_path / "in/v/video.json").write_text('{"fps": 8, "duration_sec": 1.0}')
    for words in ("1 prepared, 0 were there already, 0 failed", "0 prepared, 1 were there already, 0 failed"):
        assert data.main(["prepare", "--videos", str(tmp_path / "in"), "--out", str(tmp_path / out), "--snippets", "2", "--workers", "0"]) == 0
        assert words in capsys.readouterr().out
