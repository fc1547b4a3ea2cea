import json
import math
import zipfile

import numpy as np
import pytest
import torch
from torchcodec.encoders import JpegEncoder

import data
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
                                  '{"database": {"v": {"subset": "training", "duration": 3, "annotations": [{"segment": [1, "a"], "label": "x"}]}}}'])
def test_malformed_annotations_are_one_error_that_names_the_file(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match="bad.json"):
        data.load_annotations(str(tmp_path / "bad.json"))


def test_videos_without_frames_are_counted_named_and_left_out(tmp_path):
    subsets = data.load_annotations(write_annotations(tmp_path / "a.json", {"v": entry(), "w": entry(), "x": entry()}))
    (tmp_path / "v.zip").touch()
    said = []
    assert [v.name for v in data.select(subsets, "training", str(tmp_path), ".zip", said.append)] == ["v"]
    assert len(said) == 1 and "2 of 3" in said[0] and "w, x" in said[0]
    with pytest.raises(ValueError, match="none of the 3 training videos has a .npy file"):
        data.select(subsets, "training", str(tmp_path), ".npy", said.append)
    with pytest.raises(ValueError, match=r"subset 'train'.*\['training'\]"):
        data.select(subsets, "train", str(tmp_path), ".zip", said.append)


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
    read = data.FrameZip(str(tmp_path / "v.zip")).read(np.array([0, 3, 6, 7, 19, 21, 39, 10]))
    assert (read.float().mean((1, 2, 3)) / 2).round().tolist() == [3, 3, 3, 10, 10, 30, 30, 10]


def test_broken_frame_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.zip"):
        data.FrameZip(str(tmp_path / "none.zip"))
    (tmp_path / "torn.zip").write_bytes(b"PK\3\4 and then nothing")
    with pytest.raises(ValueError, match="torn.zip.*prepare this video again"):
        data.FrameZip(str(tmp_path / "torn.zip"))
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as z:
        z.writestr("video.json", json.dumps({"fps": 8, "num_frames": 2, "duration_sec": 1, "frames": [0, 1]}))
        z.writestr("000000.jpg", b"no JPEG")
    for number in (0, 1):
        with pytest.raises(ValueError, match=f"odd.zip: frame 00000{number}.jpg"):
            data.FrameZip(str(tmp_path / "odd.zip")).read(np.array([number]))


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
    with pytest.raises(ValueError, match="w.npy has 3 channels, v.npy 2"):
        dataset[1, data.Fidelity("full", 4, 0)]
    (tmp_path / "w.npy").write_bytes(b"torn")
    with pytest.raises(ValueError, match="w.npy cannot be read"):
        dataset[1, data.Fidelity("full", 4, 0)]


def test_collate_stacks_tensors_and_keeps_lists():
    batch = data.collate([{"name": "a", "x": torch.zeros(2), "label": 1, "segments": torch.zeros(1, 2)},
                          {"name": "b", "x": torch.ones(2), "label": 0, "segments": torch.zeros(3, 2)}])
    assert batch["name"] == ["a", "b"] and batch["x"].tolist() == [[0, 0], [1, 1]] and batch["label"].tolist() == [1, 0]
    assert [len(s) for s in batch["segments"]] == [1, 3]


def test_seeds_are_pure_functions_of_their_key():
    assert data.seed_of(0, "view", 1, 2) == data.seed_of(0, "view", 1, 2)
    assert len({data.seed_of(0, "view", e, i) for e in range(50) for i in range(50)}) == 2500
    assert 0 <= data.seed_of("x") < 2**63
