"""Annotations, fidelities, the sampler, frames and features."""

import json
import math
import os
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torchcodec.encoders import JpegEncoder

import data
import evaluate
from data import InputError
from tools import prepare_data

TABLES = os.path.join(os.path.dirname(__file__), "tables")
SHARED = os.path.join(os.path.dirname(__file__), "../../shared/data")


def shared(name):
    path = f"{SHARED}/{name}"
    return path if os.path.exists(path) else pytest.skip(f"no {name} here")


def write_annotations(path, database):
    path.write_text(json.dumps({"database": database}))
    return str(path)


def entry(subset="training", duration=10.0, segments=((2.0, 5.0),), label="jump"):
    annotations = [{"segment": list(segment), "label": label} for segment in segments]
    return {"subset": subset, "duration": duration, "annotations": annotations}


def make_video(name="v", duration=8.0, segments=(), labels=(), path=None):
    segments = np.array(segments, np.float64).reshape(-1, 2)
    return data.Video(name, duration, segments, tuple(labels), path and str(path))


def numbered_frames(n, size=16):
    """Frame i is uniformly 2 * i: JPEG keeps that to within 1."""
    levels = torch.arange(n, dtype=torch.uint8) * 2
    return levels[:, None, None, None].expand(n, 3, size, size).contiguous()


def write_zip(path, frames, fps=8):
    numbers = list(range(len(frames)))
    info = {"fps": fps, "num_frames": len(frames), "duration_sec": len(frames) / fps}
    jpegs = {
        i: JpegEncoder(frame).to_tensor(quality=92).numpy().tobytes()
        for i, frame in enumerate(frames)
    }
    prepare_data.write_frame_zip(str(path), {**info, "frames": numbers}, [jpegs])
    return str(path)


# ------------------------------------------------------------------------------------- annotations


def test_annotations_become_fractions_of_the_video(tmp_path):
    v = entry(segments=[(2.0, 5.0), (-1.0, 3.0), (9.0, 12.0), (4.0, 4.0)])
    words = [{"segment": ["2", "4"], "label": "x"}]
    w = {"subset": "validation", "duration": "8", "annotations": words}
    subsets = data.load_annotations(write_annotations(tmp_path / "a.json", {"v": v, "w": w}))
    v, w = subsets["training"][0], subsets["validation"][0]
    assert v.segments.tolist() == [[2, 5], [-1, 3], [9, 12], [4, 4]] and len(v.labels) == 4
    segments, labels = v.actions
    # clipped, the empty one left out
    torch.testing.assert_close(segments, torch.tensor([[0.2, 0.5], [0.0, 0.3], [0.9, 1.0]]))
    assert labels == ("jump",) * 3 and v.duration == 10
    torch.testing.assert_close(w.actions[0], torch.tensor([[0.25, 0.5]]))
    assert data.class_names([v, w]) == ["jump", "x"]
    targets = data.targets_of(segments, ("x", "x", "jump"), ["jump", "run", "x"])
    assert targets["segments"] is segments and targets["target"].tolist() == [0.5, 0, 0.5]
    assert targets["labels"].tolist() == [2, 2, 0]
    assert data.targets_of(segments, ("x", "else"), ["x"])["labels"].tolist() == [0, -1]


def test_missing_annotation_file_says_what_makes_one(tmp_path):
    with pytest.raises(InputError, match=r"tools\.make_toy"):
        data.load_annotations(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", '{"videos": {}}', '{"database": []}'),
        '{"database": {"v": {"subset": "t", "annotations": 3}}}',
        '{"database": {"v": {"subset": null, "annotations": []}}}',
        '{"database": {"v": {"subset": "t", "annotations": [{"segment": "15", "label": "x"}]}}}',
        '{"database": {"v": {"subset": "t", "annotations": [{"segment": [1, 2], "label": []}]}}}',
        '{"database": {"v": {"subset": "t", "annotations": [], "duration": 1' + "1" * 400 + "}}}",
        '{"database": {"v": ' + "[" * 100_000,
        '{"database": {"v": {"subset": "t", "duration": 0, "annotations": []}}}',
        '{"database": {"v": {"subset": "t", "annotations": [{"segment": [1], "label": "x"}]}}}',
        '{"database": {"v": {"subset": "t", "annotations": [{"segment": [1, "a"], "label": 2}]}}}',
        '{"database": {"v": {"subset": "t", "annotations": [{"segment": [1, 2], "label": null}]}}}',
        '{"database": {"v": {"subset": [], "annotations": []}}}',
        '{"database": {"v\\u001b[31m": {"subset": "t", "annotations": []}, "w": "\'v\'"}}',
    ],
)
def test_malformed_annotations_are_one_error_that_names_the_file(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises((InputError, evaluate.InputError), match=r"bad\.json") as raised:
        data.load_annotations(str(tmp_path / "bad.json"))
    assert "'v'" in str(raised.value) or '"v"' not in text or len(text) > 10_000


def test_annotations_are_read_as_for_scoring(tmp_path):
    """Videos without annotations, class numbers and a byte order mark are good in both."""
    segment = {"segment": ["1.5", 3], "label": 7}
    database = {"a": {"subset": "t", "duration": 5, "annotations": [segment]}, "b": {"subset": "t"}}
    database["c"] = {"subset": "t", "duration": math.nan, "annotations": None}
    path = tmp_path / "good.json"
    path.write_text(json.dumps({"database": database}), encoding="utf-8-sig")
    a, b, c = data.load_annotations(str(path))["t"]
    assert a.segments.tolist() == [[1.5, 3.0]] and a.labels == ("7",)
    assert not b.labels and not c.labels and math.isnan(c.duration)
    metrics = evaluate.evaluate(path, {"results": {}}, subset="t")
    assert (metrics["segments"], metrics["classes"]) == (1, 1)


def test_ambiguous_segments_are_no_actions(tmp_path):
    (tmp_path / "v.zip").touch()
    segments, labels = [(1, 2), (3, 4), (5, 5)], ["Ambiguous", "dive", "ambiguous"]
    subsets = {"t": [make_video("v", 8.0, segments, labels), make_video("w", 8.0, [(0, 1)], ["x"])]}
    logged = []
    video, *others = data.select_videos(subsets, "t", str(tmp_path), "frames", logged.append)
    assert not others and data.class_names([video]) == ["dive"]
    assert video.actions[0].tolist() == [[0.375, 0.5]] and video.actions[1] == ("dive",)
    assert video.annotated[1] == ("Ambiguous", "dive")
    assert logged[1:] == [
        "t: 2 of 3 segments are labelled Ambiguous, and are no actions",
        "t: 1 of 3 segments cannot be used, see python -m tools.check_data",
    ]
    assert data.class_names([make_video("v", 8.0, [(1, 2)], ["Ambiguous"])]) == []


@pytest.mark.parametrize("seconds", [0, -1, math.inf, "x", [1], None])
def test_durations_are_seconds_above_0(seconds, tmp_path):
    (tmp_path / "d.json").write_text(json.dumps({"v": seconds}))
    video = data.Video("v", math.nan, np.zeros((0, 2)), ())
    with pytest.raises(InputError, match=r"d\.json is not valid"):
        data.fill_durations([video], str(tmp_path / "d.json"))


@pytest.mark.parametrize(
    "info", ["[1]", '{"videos": [1]}', '{"videos": {"v": 3}}', '{"seconds": "x"}']
)
def test_a_foreign_features_json_is_named(info, tmp_path):
    (tmp_path / "features.json").write_text(info)
    with pytest.raises(InputError, match=r"features\.json is not valid"):
        data.read_feature_info(str(tmp_path))


def test_foreign_feature_files_are_named(tmp_path):
    np.savez(tmp_path / "z.npz", x=np.ones((2, 3)))
    os.rename(tmp_path / "z.npz", tmp_path / "z.npy")
    header = b"\x93NUMPY\x01\x00F\x00{'descr': '<f4', 'fortran_order': False, 'shape': (9, -16), }"
    (tmp_path / "negative.npy").write_bytes(header.ljust(79) + b"\n" + bytes(64))
    np.save(tmp_path / "text.npy", np.array([["a"]]))
    for name in ("z", "negative", "text"):
        with pytest.raises(InputError, match=rf"{name}\.npy cannot be read"):
            data.read_features(f"{tmp_path}/{name}.npy")
    np.save(tmp_path / "huge.npy", np.full((2, 3), 1e300))
    with pytest.raises(InputError, match=r"huge\.npy has NaN or infinite"):
        data.check_finite(data.read_features(f"{tmp_path}/huge.npy"), f"{tmp_path}/huge.npy")


def test_foreign_hdf5_files_are_named(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["text"] = "a text"
        file["soft"] = h5py.SoftLink("/soft")
        loop = file.create_group("loop")
        loop["loop"] = loop
        file.create_dataset("vast", (10**6, 10**6), "f4", chunks=(1000, 1000))
        file["folder/v"] = np.ones((4, 3), np.float32)
    for key in ("text", "loop", "vast", "soft"):
        with pytest.raises(InputError, match=rf"{key} cannot be read"):
            data.read_features(f"{tmp_path}/f.h5::{key}")
    found = data.find_features(f"{tmp_path}/f.h5", ["folder/v", "none"])
    assert data.read_features(found["folder/v"]).shape == (4, 3) and len(found) == 1
    # Where only the shape is wanted, nothing is read and nothing held.
    shape = data.read_features(found["folder/v"], rows=None)
    assert shape.shape == (4, 3) and shape.strides == (0, 0)


def test_of_a_long_video_only_the_rows_asked_for_are_read(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    x = np.random.default_rng(0).normal(size=(1000, 4)).astype(np.float32)
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["v"] = x
    np.save(tmp_path / "v.npy", x)
    asked = []
    read = h5py.Dataset.__getitem__
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda s, k: asked.append(k) or read(s, k))
    for source in ("f.h5", "."):
        features = data.FeatureDataset([make_video("v")], f"{tmp_path}/{source}")
        part = data.SubsequenceDataset(features, 23, seed=1, cache_gb=0)[0, data.NATIVE]
        (start,) = np.flatnonzero(x[:, 0] == part["features"][0, 0].item())
        assert (part["features"].T.numpy() == x[start : start + 23]).all()
        assert features.features(0, rows=slice(995, 1018)).shape == (4, 5)
    assert asked == [slice(start, start + 23), slice(995, 1018)]


def test_a_duplicate_video_is_named(tmp_path):
    video = json.dumps(entry())
    text = f'{{"database": {{"v": {video}, "w": {video}, "v": {video}}}}}'
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(evaluate.InputError, match=r"bad\.json .*duplicate key 'v'"):
        data.load_annotations(str(tmp_path / "bad.json"))


def test_segments_that_cannot_be_used_are_counted_and_do_not_stop(tmp_path):
    segments = [(2, 5), (2, 5), (5, 5), (7, 6), (-1, 3), (9, 12), (20, 30), (math.nan, 3)]
    subsets = {"t": [make_video("v", 10.0, segments, "x" * 8), make_video("w")]}
    for name in "vw":
        (tmp_path / f"{name}.zip").touch()
    logged = []
    videos = data.select_videos(subsets, "t", str(tmp_path), "frames", logged.append)
    expected = torch.tensor([[0.2, 0.5], [0.2, 0.5], [0, 0.3], [0.9, 1]])
    torch.testing.assert_close(videos[0].actions[0], expected)
    assert len(logged) == 1 and "4 of 8 segments cannot be used" in logged[0]


def test_fingerprints_tell_what_is_trained_on_not_where_it_lies():
    @dataclass
    class Clip:
        path: str
        label: int

    v, w = make_video("v", 8, [(1, 2)], "x"), make_video("w", math.nan)
    whole = data.fingerprint([v, w])
    assert whole["count"] == 2
    assert whole == data.fingerprint([replace(v, path="/a/v.zip"), replace(w, duration=math.nan)])
    others = [[v], [w, v], [replace(v, labels=("y",)), w], [replace(v, duration=9.0), w]]
    others.append([make_video("v", 8, [(1, 2.5)], "x"), w])
    hashes = {data.fingerprint(videos)["hash"] for videos in others}
    assert len(hashes) == 5 and whole["hash"] not in hashes
    clip = Clip("/a/c.zip", 1)
    assert data.fingerprint([clip]) == data.fingerprint([replace(clip, path="/b/c.zip")])
    assert data.fingerprint([clip]) != data.fingerprint([replace(clip, label=2)])
    assert data.list_hash(["a", "b"]) == data.list_hash(["b", "a"]) != data.list_hash(["a"])


def test_real_annotation_files():
    path = shared("anet13_annotations.json")
    anet = data.load_annotations(path)
    counts = {k: (len(v), sum(len(x.labels) for x in v)) for k, v in anet.items()}
    assert counts == {"training": (9649, 14859), "validation": (4728, 7293)}
    assert len(data.class_names(anet["training"])) == 200
    with open(path) as file:
        database = json.load(file)["database"]
    for video in anet["validation"][::97]:
        info = database[video.name]
        segments = torch.tensor([a["segment"] for a in info["annotations"]], dtype=torch.float64)
        expected = (segments / info["duration"]).clamp(0, 1)
        torch.testing.assert_close(video.actions[0].double(), expected, atol=1e-6, rtol=0)
    thumos = data.load_annotations(shared("thumos14_annotations.json"))
    counts = {k: (len(v), sum(len(x.labels) for x in v)) for k, v in thumos.items()}
    assert counts == {"train": (200, 3007), "test": (210, 3311)}
    assert all(math.isnan(video.duration) for video in thumos["test"])
    assert len(data.class_names(thumos["test"])) == 20


# ------------------------------------------------------------------------------------------ tables


def read(path, text, encoding="utf-8", split=("training", "validation", 0.2)):
    """Return {name: (subset, segments, labels)} of a table."""
    path.write_bytes(text.encode(encoding))
    return flat(data.load_annotations(str(path), split))


def flat(subsets):
    return {v.name: (k, v.segments.tolist(), v.labels) for k, vs in subsets.items() for v in vs}


PLAIN = 'video,start,end,label,subset\na,1.5,4,jump,t\nb,,,,t\na.mp4,0:05,1:02:03.5,"run, far",\n'
EXPECTED = {"a": ("t", [[1.5, 4.0], [5.0, 3723.5]], ("jump", "run, far")), "b": ("t", [], ())}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_a_table_is_read_as_spreadsheets_write_it(mark, encoding, tmp_path):
    text = PLAIN.replace('"run, far"', "run").replace(",", mark).replace("run", '"run, far"')
    if mark != ",":
        text = text.replace("1.5", "1,5").replace("3.5", "3,5")
    text = text.replace("video", "Video").replace("\n", "\r\n")
    assert read(tmp_path / "a.csv", text, encoding) == EXPECTED
    rows = ["sep=;", "Label;END;start; video ;;", ";;;;;", " jump ;4;1,5;clips\\a.mp4;;", ""]
    found = read(tmp_path / "a.tsv", "\n".join(rows))
    assert found == {"a": ("training", [[1.5, 4.0]], ("jump",))}


def test_names_of_videos_are_those_of_their_media(tmp_path):
    names = ["clips/a.mp4", "b.MKV", "v_c", "d.1", "e.zip", "D:\\x\\f.avi", "#g"]
    text = "split,video,start,end,label\n" + "".join(f"t,{name},1,2,x\n" for name in names)
    assert list(read(tmp_path / "a.csv", text)) == ["a", "b", "v_c", "d.1", "e", "f", "#g"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,1,2", r"row 3 .*KeyError: 'label'"),
        ("a,,2,x", r"row 3 .*KeyError: 'start'"),
        ("a,1,soon,x", r"row 3 .*could not convert string to float: 'soon'"),
        ("a,1,nan,x", r"row 3 .*must be finite"),
        (',1,2,"x', r"row 2.*unexpected end of data"),
        ("\n,1,2,x", r"row 4 .*KeyError: 'video'"),
        ("a,1,2,x,t,y", r"row 3 .*'y' stands beyond the columns"),
        ('a,"1,5",2,x', r"row 3 .*could not convert"),
        ("a,1,2,x,t\na,1,2,x,u", r"row 4 .*subset 'u' of video a, which had 't' before"),
        ("a,1,2,x\nclips/a,1,2,x", r"row 4 .*folder 'clips' of video a, which had ''"),
    ],
)
def test_a_bad_row_of_a_table_is_named(rows, message, tmp_path):
    path = tmp_path / "bad.csv"
    with pytest.raises(InputError, match=rf"(?s)bad\.csv .*{message}.*expected UTF-8 columns"):
        read(path, f"video,start,end,label,subset\nz,1,2,x,t\n{rows}\n")


def test_a_spreadsheets_own_format_is_named(tmp_path):
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(InputError, match="save it as CSV"):
        data.load_annotations(str(tmp_path / "a.xlsx"))


def test_a_table_of_nothing_is_refused(tmp_path):
    for text in ("", "video,start,end,label\n", "# a note\n"):
        with pytest.raises(InputError, match="no video in it"):
            read(tmp_path / "bad.csv", text)
    (tmp_path / "latin.csv").write_bytes(b"video,start,end,label\ncaf\xe9,1,2,x\n")
    with pytest.raises(InputError, match=r"cannot read .*latin\.csv.*UnicodeDecodeError"):
        data.load_annotations(str(tmp_path / "latin.csv"))


def test_a_table_without_subsets_is_split_by_the_names_of_its_videos(tmp_path):
    def held_out(count, share=0.25):
        text = "video,start,end,label\n" + "".join(f"video {i},1,2,x\n" for i in range(count))
        found = read(tmp_path / "a.csv", text, split=("fit", "test", share))
        return {name for name, (subset, *_) in found.items() if subset == "test"}

    assert held_out(100) == {name for name in held_out(400) if int(name.split()[1]) < 100}
    assert 75 < len(held_out(400)) < 125
    assert [len(held_out(n)) for n in (1, 2)] == [0, 1]
    assert len(held_out(30, 1e-6)) == 1 and len(held_out(30, 0.999999)) == 29
    spelt = [data.held_out(names, 0.5) for names in (["v_a", "b", "c"], ["a", "v_b", "v_c"])]
    assert {name.removeprefix("v_") for name in spelt[0]} == {
        n.removeprefix("v_") for n in spelt[1]
    }


BOTH = {"v": [[1.5, 4.0], [5.0, 7.25]], "w": [[62.003, 63.0]]}


@pytest.mark.parametrize("name", ["elan.txt", "elan_tiers.txt", "boris_aggregated.csv", "via.csv"])
def test_exports_of_other_programs_are_read(name):
    """The samples are made after the programs' documentation and sources."""
    found = flat(data.load_annotations(f"{TABLES}/{name}"))
    labels = {"v": ("jump", "run, slowly"), "w": ("jump",)}
    if name == "elan_tiers.txt":
        segments = {**BOTH, "v": [[1.5, 4.0], [1.5, 4.0], [5.0, 7.25]]}
        labels["v"] = ("jump", "smile", "run, slowly")
    else:
        segments = BOTH
    assert {name: segments for name, (_, segments, _) in found.items()} == segments
    assert {name: labels for name, (*_, labels) in found.items()} == labels


def test_starts_and_stops_of_boris_are_paired_by_subject(tmp_path):
    path = f"{TABLES}/boris_tabular.tsv"
    found = flat(data.load_annotations(path))
    assert found["v"][1:] == ([[1.5, 4.0], [2.0, 6.5]], ("jump", "jump"))
    assert found["w"][1:] == ([], ())  # a moment is no segment
    with open(path) as file:
        text = file.read()
    with pytest.raises(InputError, match=r"START without a STOP of .*'ben', 'jump'"):
        read(tmp_path / "a.tsv", text.replace("ben\tjump\t\tSTOP", "ben\tjump\t\tPOINT"))
    with pytest.raises(InputError, match=r"row 6 .*STOP twice, or without the other"):
        read(tmp_path / "a.tsv", text.replace("ben\tjump\t\tSTART", "ben\tjump\t\tPOINT"))


def test_videos_become_annotations_again(tmp_path):
    database = {"a": entry(), "b": entry("x", segments=[]), "c": {"subset": "x"}}
    subsets = data.load_annotations(write_annotations(tmp_path / "a.json", database))
    again = data.activitynet(subsets)["database"]
    assert again["a"] == database["a"] and again["b"] == database["b"]
    assert again["c"] == {"subset": "x", "duration": None, "annotations": []}


# --------------------------------------------------------------------------------- choice of videos


def test_videos_without_frames_are_counted_named_and_left_out(tmp_path):
    database = {name: entry() for name in "vwx"}
    subsets = data.load_annotations(write_annotations(tmp_path / "a.json", database))
    (tmp_path / "v.zip").touch()
    logged = []
    videos = data.select_videos(subsets, "training", str(tmp_path), "frames", logged.append)
    assert [video.name for video in videos] == ["v"]
    assert len(logged) == 1 and "2 of 3" in logged[0] and "w, x" in logged[0]
    with pytest.raises(InputError, match="3 of 3 videos have no features"):
        data.select_videos(subsets, "training", str(tmp_path), "features", logged.append)
    with pytest.raises(InputError, match=r"no subset 'train'.*\['training'\]"):
        data.select_videos(subsets, "train", str(tmp_path), "frames", logged.append)
    assert subsets["training"][0].path is None


def test_names_may_be_spelt_with_v_or_without(tmp_path):
    database = {"a": entry(), "v_b": entry()}
    subsets = data.load_annotations(write_annotations(tmp_path / "a.json", database))
    for name in ("v_a", "b"):
        write_zip(tmp_path / f"{name}.zip", numbered_frames(4))
        np.save(tmp_path / f"{name}.npy", np.ones((3, 2), np.float32))
    videos = data.select_videos(subsets, "training", str(tmp_path), "frames")
    files = [(video.name, os.path.basename(video.path)) for video in videos]
    assert files == [("a", "v_a.zip"), ("v_b", "b.zip")]
    videos = data.select_videos(subsets, "training", str(tmp_path), "features")
    dataset = data.FeatureDataset(videos, str(tmp_path), [])
    assert [dataset[i, data.NATIVE]["name"] for i in range(2)] == ["a", "v_b"]


def test_a_video_in_two_subsets_is_told(tmp_path):
    for name in ("a", "v_b"):
        (tmp_path / f"{name}.zip").touch()
    subsets = {"train": [make_video("a", 8.0), make_video("b", 8.0)], "val": []}
    subsets["val"] += [make_video("v_b", 8.0), make_video("c", 8.0)]
    for subset, name in {"train": "b", "val": "v_b"}.items():
        logged = []
        data.select_videos(subsets, subset, str(tmp_path), "frames", logged.append)
        assert f"{subset}: {name} also in another subset, with v_ or without" in logged


def test_durations_that_annotations_lack_come_from_elsewhere(tmp_path):
    annotation = {"segment": ["1.0", "2.0"], "label": "x"}
    bare = {name: {"subset": "train", "annotations": [annotation]} for name in "vw"}
    subsets = data.load_annotations(write_annotations(tmp_path / "a.json", bare))
    assert data.class_names(subsets["train"]) == ["x"]
    with pytest.raises(InputError, match="video v has no known duration"):
        _ = subsets["train"][0].actions
    frames, features = tmp_path / "frames", tmp_path / "features"
    frames.mkdir()
    features.mkdir()
    write_zip(frames / "v.zip", numbered_frames(32))  # 4 s
    (frames / "w.zip").write_bytes(b"torn")
    logged = []

    def select(source, kind, **known):
        return data.select_videos(subsets, "train", str(source), kind, logged.append, **known)

    videos = select(frames, "frames")
    assert [v.name for v in videos] == ["v"] and videos[0].actions[0].tolist() == [[0.25, 0.5]]
    assert "1 of 2 videos have no duration" in logged[0] and logged[0].endswith(": w")
    for name in "vw":
        np.save(features / f"{name}.npy", np.ones((3, 2), np.float32))
    with pytest.raises(InputError, match=r"2 of 2 videos have no duration.*data\.durations"):
        select(features, "features")
    assert [v.duration for v in select(features, "features", frames=str(frames))] == [4]
    info = {"videos": {"v": {"duration_sec": 5.0}, "w": {"duration_sec": 8}}}
    (features / "features.json").write_text(json.dumps(info))
    videos = select(features, "features")
    assert [v.duration for v in videos] == [5, 8]
    assert videos[1].actions[0].tolist() == [[0.125, 0.25]]
    (tmp_path / "d.json").write_text('{"v": 1e300}')
    with pytest.raises(InputError, match=r"d\.json.*expected seconds above 0, below 1e\+09"):
        select(features, "features", durations=str(tmp_path / "d.json"))
    (tmp_path / "d.json").write_text('{"v_v": "10", "w": 20}')
    videos = select(features, "features", durations=str(tmp_path / "d.json"))
    assert [v.duration for v in videos] == [10, 20]
    select(features, "features", durations=str(tmp_path / "d.json"), frames=str(frames))
    assert "v.zip has 4 s, 10 s are given: milliseconds?" in logged[-1]
    for content in ("[]", '{"v": null}'):
        (tmp_path / "d.json").write_text(content)
        with pytest.raises(InputError, match=r"d\.json is not valid"):
            select(features, "features", durations=str(tmp_path / "d.json"))


def test_infos_beside_features_are_read_once_each(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f/features.json").write_text('{"seconds": 3}')
    sources = [str(tmp_path / "f"), str(tmp_path / "f/all.h5"), str(tmp_path)]
    assert data.read_feature_info(sources) == [{"seconds": 3}]
    assert data.read_feature_info(str(tmp_path)) == []
    (tmp_path / "f/features.json").write_text("[]")
    with pytest.raises(InputError, match=r"features\.json is not valid"):
        data.read_feature_info(sources)


def test_frames_that_were_prepared_for_other_snippets_are_reported(tmp_path):
    prepared = {"snippets": 8, "rate": None, "frames": 2, "stride": 2}
    info = {"fps": 8, "num_frames": 64, "duration_sec": 8.0, "frames": [3, 5], "prepared": prepared}
    jpeg = JpegEncoder(numbered_frames(1)[0]).to_tensor(quality=92).numpy().tobytes()
    prepare_data.write_frame_zip(str(tmp_path / "v.zip"), info, [{3: jpeg, 5: jpeg}])
    subsets = {"t": [make_video("v")]}
    logged = []
    for snippets in (8, 20):
        settings = {**prepared, "snippets": snippets}
        folder = str(tmp_path)
        data.select_videos(subsets, "t", folder, "frames", logged.append, settings=settings)
    assert len(logged) == 1 and "was prepared for" in logged[0] and "'snippets': 20" in logged[0]


# --------------------------------------------------------------------------------------- fidelities


S, T, ST = data.Fidelity("S", 8, 10), data.Fidelity("T", 2, 20), data.Fidelity("ST", 4, 14)


def epoch_of(sampler, epoch, first_step=0):
    sampler.set_epoch(epoch, first_step)
    return list(sampler)


def names_of(batches):
    return [{fidelity.name for _, fidelity in batch} for batch in batches]


def test_the_cycle_moves_with_epochs_or_with_batches():
    long = data.CyclicFidelitySampler(4, 4, [S, T, ST], cycle_length=2)
    names = [names_of(epoch_of(long, epoch))[0] for epoch in range(7)]
    assert names == [{"S"}, {"S"}, {"T"}, {"T"}, {"ST"}, {"ST"}, {"S"}]
    assert data.CyclicFidelitySampler(4, 4, [S, T]).cycle_length == 1
    short = data.CyclicFidelitySampler(20, 4, [S, T, ST], cycle="batch", cycle_length=2)
    names = [name for epoch in range(2) for name in names_of(epoch_of(short, epoch))]
    # goes on across epochs
    one_cycle = [{"S"}, {"S"}, {"T"}, {"T"}, {"ST"}, {"ST"}]
    assert names == [*one_cycle, {"S"}, {"S"}, {"T"}, {"T"}]
    assert data.CyclicFidelitySampler(4, 4, [S, T], cycle="batch").cycle_length == 16


def test_every_video_once_an_epoch_up_to_padding():
    sampler = data.CyclicFidelitySampler(10, 4, [S])
    first, second = epoch_of(sampler, 0), epoch_of(sampler, 1)
    indices, later = ([i for batch in batches for i, _ in batch] for batches in (first, second))
    assert len(first) == len(sampler) == sampler.steps_per_epoch == 3
    assert sorted(indices[:10]) == list(range(10)) and indices[10:] == indices[:2]
    # Indices go on over epochs.
    assert sorted(later[:10]) == list(range(10, 20)) and [i - 10 for i in later] != indices
    assert first == epoch_of(data.CyclicFidelitySampler(10, 4, [S]), 0)
    assert first != epoch_of(data.CyclicFidelitySampler(10, 4, [S], seed=1), 0)
    # fewer videos than a batch
    few = data.CyclicFidelitySampler(2, 5, [S])
    assert [len(batch) for batch in epoch_of(few, 0)] == [5]


def test_samples_of_a_group_stay_in_one_batch():
    sampler = data.CyclicFidelitySampler(12, 4, [S], seed=3, group_size=2)
    order = [i for batch in sampler for i, _ in batch]
    assert sorted(order) == list(range(12)) and order != list(range(12))
    pairs = zip(order[::2], order[1::2], strict=True)
    assert all(i % 2 == 0 and j == i + 1 for i, j in pairs)
    with pytest.raises(ValueError, match="7 samples, expected a multiple of 2"):
        data.CyclicFidelitySampler(7, 4, [S], group_size=2)


def test_ranks_share_fidelities_and_split_the_global_batch():
    options = {"cycle": "batch", "cycle_length": 1}
    whole = epoch_of(data.CyclicFidelitySampler(10, 4, [S, T], **options), 3)
    ranks = [
        epoch_of(data.CyclicFidelitySampler(10, 4, [S, T], rank=r, world_size=2, **options), 3)
        for r in range(2)
    ]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole
    with pytest.raises(ValueError, match="4 samples, expected a multiple of 3"):
        data.CyclicFidelitySampler(10, 4, [S], world_size=3)


def test_resuming_goes_on_with_the_remaining_batches():
    sampler = data.CyclicFidelitySampler(10, 2, [S, T], cycle="batch", cycle_length=1)
    assert epoch_of(sampler, 5)[3:] == epoch_of(sampler, 5, first_step=3) and len(sampler) == 2


def test_seeds_are_pure_functions_of_their_key():
    assert data.seed_of(0, "view", 1, 2) == data.seed_of(0, "view", 1, 2)
    seeds = {data.seed_of(0, "view", e, i) for e in range(50) for i in range(50)}
    assert len(seeds) == 2500 and all(0 <= seed < 2**63 for seed in seeds)


def test_fewer_snippets_are_evenly_spread_over_the_full_ones():
    rows = data.snippet_rows
    assert rows(8, 2).tolist() == [2, 6] and rows(8, 2, 0.5).tolist() == [1, 5]
    # an odd ratio has a middle
    assert rows(9, 3).tolist() == rows(9, 3, 0.5).tolist() == [1, 4, 7]
    for shift in (0.0, 0.5):
        assert rows(8, 8, shift).tolist() == list(range(8))
    # unbiased over the two phases
    centres = (torch.stack([rows(100, 25), rows(100, 25, 0.5)]).double().mean(0) + 0.5) / 100
    torch.testing.assert_close(centres, (torch.arange(25, dtype=torch.float64) + 0.5) / 25)


# ------------------------------------------------------------------------------------------- frames


def video_dataset(videos, **options):
    defaults = {"snippets": 8, "frames_per_snippet": 4, "stride": 2, "size": 14}
    return data.VideoDataset(videos, **{**defaults, **options})


def test_a_video_is_read_at_any_fidelity(tmp_path):
    path = write_zip(tmp_path / "v.zip", numbered_frames(64))
    dataset = video_dataset([make_video("v", 8.0, [(2, 4)], "x", path)], classes=["x"])
    sample = dataset[0, dataset.full]
    frames = sample["frames"]
    assert frames.shape == (8, 4, 3, 14, 14) and frames.dtype == torch.uint8
    seen = frames.float().mean((2, 3, 4)) / 2
    expected = data.snippet_frames(64, 8, 4, 2).float()
    torch.testing.assert_close(seen, expected, atol=0.6, rtol=0)
    assert sample["segments"].tolist() == [[0.25, 0.5]] and sample["target"].tolist() == [1.0]
    assert sample["last"]
    low = dataset[0, data.Fidelity("ST", 4, 7)]["frames"]
    assert low.shape == (4, 4, 3, 7, 7)
    fewer = seen[data.snippet_rows(8, 4)]
    torch.testing.assert_close(low.float().mean((2, 3, 4)) / 2, fewer, atol=0.6, rtol=0)


def test_views_are_random_by_epoch_and_video_and_the_same_again(tmp_path):
    # brightness tells the column
    ramp = torch.arange(16, dtype=torch.uint8).mul(15).expand(8, 3, 16, 16).contiguous()
    path = write_zip(tmp_path / "v.zip", ramp)
    videos = [make_video("v", 1.0, path=path)] * 2
    small = {"snippets": 2, "frames_per_snippet": 2, "crop": 0.5, "size": 8}
    dataset = video_dataset(videos, train=True, **small)

    def view(epoch, index):
        frames = dataset[epoch * len(dataset) + index, dataset.full]["frames"]
        # one crop and flip for all frames of the video
        assert (frames.float() - frames[:1, :1].float()).abs().max() < 1
        return frames

    torch.testing.assert_close(view(3, 1), view(3, 1))
    views = {tuple(view(e, i)[0, 0, 0, 0].tolist()) for e in range(8) for i in range(2)}
    assert len(views) > 8
    rising = [v[0] < v[-1] for v in views]
    assert any(rising) and not all(rising)  # flipped and not


def test_a_subset_and_a_shard_are_of_videos():
    videos = [make_video(name, 4.0) for name in "abc"]
    dataset = video_dataset(videos, rate=4)
    assert dataset.items == [(0, 0), (0, 8), (1, 0), (1, 8), (2, 0), (2, 8)]
    assert dataset.owners == [0, 0, 1, 1, 2, 2]
    some = dataset.subset([2, 0])
    assert [video.name for video in some.videos] == ["c", "a"] and len(some) == 4
    assert some.full == dataset.full and len(video_dataset(videos)) == 3


def test_samples_of_folders_and_of_zips_with_copies_agree(tmp_path):
    (tmp_path / "f/v").mkdir(parents=True)
    ramp = torch.arange(96, dtype=torch.uint8).mul(2).expand(3, 64, 96)
    for i in range(32):
        path = f"{tmp_path}/f/v/img_{i + 1:05d}.jpg"
        JpegEncoder((ramp + i).contiguous()).to_file(path, quality=95)
    (tmp_path / "f/v/video.json").write_text('{"fps": 8, "duration_sec": 4.0}')
    settings = {"snippets": 8, "frames": 4, "stride": 2, "short_side": 64}
    settings |= {"copies": [45, 32], "quality": 95}
    prepare_data.prepare({"v": str(tmp_path / "f/v")}, str(tmp_path / "z"), settings, 0)
    folder, prepared = (
        video_dataset([make_video("v", 4.0, path=tmp_path / path)], size=56, train=True)
        for path in ("f/v", "z/v.zip")
    )
    sizes = {"full": [8, 56], "S": [8, 28], "T": [2, 56], "ST": [4, 40]}
    for epoch in range(3):
        for name, size in sizes.items():
            fidelity = data.Fidelity(name, *size)
            a, b = (d[epoch, fidelity]["frames"].float() for d in (folder, prepared))
            assert a.shape == (fidelity.snippets, 4, 3, fidelity.size, fidelity.size)
            # two levels are a pixel: of corners
            assert a.shape == b.shape and (a - b).abs().mean() < 3


def test_crop_and_resize_take_the_square_that_they_name():
    frame = np.zeros((8, 16, 3), np.uint8)
    frame[:, 12:] = 200
    crop = data.crop_resize
    assert (crop(frame, 4, 0.5, (0, 1)) == 200).all() and not crop(frame, 4, 0.5, (1, 0)).any()
    assert (crop(frame, 2, 0.5, (0, 1)) == 200).all()
    half = crop(frame, 8, 1.0, (0, 1))
    assert (half[:, 4:] == 200).all() and (half[:, :4] == 0).all()
    assert (crop(frame, 8, 1.0, (0, 1), flip=True) == half[:, ::-1]).all()


# ----------------------------------------------------------------------------------------- features


def test_features_are_resized_to_the_fidelity_and_checked(tmp_path):
    videos = [make_video("v", 8.0, [(2, 4), (5, 6)], "xx"), make_video("w")]
    np.save(tmp_path / "v.npy", np.arange(8, dtype=np.float32).reshape(4, 2))
    np.save(tmp_path / "w.npy", np.ones((6, 2), np.float32))
    dataset = data.FeatureDataset(videos, str(tmp_path), ["x", "y"])
    assert dataset.channels == 2
    full = data.Fidelity("full", 4, 0)
    sample = dataset[0, full]
    assert sample["features"].tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert sample["target"].tolist() == [1, 0]
    assert dataset[0, data.Fidelity("T", 2, 0)]["features"].tolist() == [[1, 5], [2, 6]]
    assert dataset[1, full]["target"].tolist() == [0, 0]
    mean, std, video_std = dataset.statistics()
    x = np.concatenate([np.arange(8).reshape(4, 2), np.ones((6, 2))])
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std, x.std(0), rtol=1e-6)
    # means of the two videos: (3, 4) and (1, 1)
    np.testing.assert_allclose(video_std, [1, 1.5], rtol=1e-6)
    np.save(tmp_path / "w.npy", np.ones((6, 3), np.float32))
    for read in (dataset.statistics, lambda: dataset[1, full]):
        with pytest.raises(InputError, match=r"w\.npy has 3 channels, .*v\.npy has 2"):
            read()
    (tmp_path / "w.npy").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"w\.npy cannot be read"):
        dataset[1, full]
    np.save(tmp_path / "w.npy", np.full((6, 2), np.inf, np.float32))
    for read in (dataset.statistics, lambda: dataset[1, full]):
        with pytest.raises(InputError, match=r"w\.npy has NaN or infinite"):
            read()


def feature_files(folder):
    """Features of v (4, 2) and w (6, 2) as .npy, as one HDF5 file, as one HDF5 file each."""
    h5py = pytest.importorskip("h5py")
    v = np.arange(8, dtype=np.float32).reshape(4, 2)
    arrays = {"v": v, "w": np.ones((6, 2), np.float32)}
    (folder / "npy").mkdir()
    (folder / "h5").mkdir()
    with h5py.File(folder / "all.h5", "w") as file:
        for name, x in arrays.items():
            np.save(folder / f"npy/{name}.npy", x)
            file[f"v_{name}"] = x
            with h5py.File(folder / f"h5/{name}.hdf5", "w") as single:
                single["any/c3d_features"] = x
    return arrays, [str(folder / name) for name in ("npy", "all.h5", "h5")]


def test_features_come_from_npy_and_hdf5_files_alike(tmp_path):
    arrays, sources = feature_files(tmp_path)
    videos = [make_video("v"), make_video("w")]
    for source in sources:
        assert sorted(data.find_features(source, ["v", "w", "x"])) == ["v", "w"]
        dataset = data.FeatureDataset(videos, source, [])
        assert dataset.channels == 2 and [dataset.num_snippets(i) for i in range(2)] == [4, 6]
        for i, x in enumerate(arrays.values()):
            assert np.array_equal(dataset[i, data.NATIVE]["features"].t().numpy(), x)
            rows = dataset.features(i, rows=slice(1, 3))
            assert np.array_equal(rows.t().numpy(), x[1:3])
    # two processes read one HDF5 file
    dataset = data.FeatureDataset(videos, sources[1], [])
    full = data.Fidelity("full", 4, 0)
    batches = data.iterate(dataset, full, 1, workers=2, device=torch.device("cpu"))
    assert [batch["name"] for batch in batches] == [["v"], ["w"]]


def test_an_npy_file_is_preferred_to_hdf5(tmp_path):
    for suffix in (".npy", ".h5", ".hdf5", ".txt"):
        (tmp_path / f"v{suffix}").touch()
    (tmp_path / "w.h5").touch()
    found = data.find_features(str(tmp_path), ["v", "w"])
    assert found == {"v": f"{tmp_path}/v.npy", "w": f"{tmp_path}/w.h5"}


def test_features_of_several_sources_stand_side_by_side(tmp_path):
    arrays, sources = feature_files(tmp_path)
    videos = [make_video("v"), make_video("w")]
    (tmp_path / "long").mkdir()
    long = str(tmp_path / "long")
    v = np.repeat(arrays["v"][:, :1] + 10, 2, 0).astype(np.float16)  # (8, 1)
    np.save(f"{long}/v.npy", v)
    np.save(f"{long}/w.npy", np.full((3, 1), 5.0))
    both = data.FeatureDataset(videos, [sources[0], long], [])
    assert both.channels == 3
    x = both[0, data.Fidelity("full", 4, 0)]["features"]
    assert x.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7], [10, 12, 14, 16]]
    assert torch.equal(both[0, data.NATIVE]["features"], x)
    assert torch.equal(both.features(0, rows=slice(1, 3)), x[:, 1:3])
    parts = [data.FeatureDataset(videos, s, []).statistics() for s in (sources[0], long)]
    for whole, a, b in zip(both.statistics(), *parts, strict=True):
        torch.testing.assert_close(whole, torch.cat([a, b]))
    (tmp_path / "long/w.npy").unlink()
    with pytest.raises(InputError, match="long has no features of w"):
        data.FeatureDataset(videos, [sources[0], long], [])
    logged = []
    subsets = {"t": videos}
    some = data.select_videos(subsets, "t", [sources[0], long], "features", logged.append)
    assert [video.name for video in some] == ["v"] and "1 of 2" in logged[0]


def test_odd_feature_files_are_named(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    np.save(tmp_path / "line.npy", np.ones(5, np.float32))
    np.save(tmp_path / "whole.npy", np.ones((5, 2), np.int64))
    np.save(tmp_path / "none.npy", np.ones((0, 2)))
    with h5py.File(tmp_path / "two.h5", "w") as file:
        file["a"] = np.ones((3, 2))
        file["b"] = np.ones((3, 2))
    for name, link in (("soft", h5py.SoftLink("/g")), ("hard", None)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            group = file.create_group("g")
            group["itself"] = link or group
    (tmp_path / "torn.h5").write_bytes(b"no HDF5")
    messages = {
        r"line\.npy": r"shape \(5,\)",
        r"whole\.npy": "int64.*; expected floating-point features",
        r"none\.npy": r"shape \(0, 2\)",
        r"two\.h5": "a group of 2 within 0 groups, not an array",
        r"soft\.h5": "a group of 1 within 7 groups, not an array",
        r"hard\.h5": "a group of 1 within 7 groups, not an array",
        r"torn\.h5": "not a valid HDF5 file",
    }
    for name, message in messages.items():
        with pytest.raises(InputError, match=f"{name}.*{message}"):
            data.read_features(str(tmp_path / name.replace("\\", "")))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match="needs h5py: pip install h5py"):
        data.find_features(str(tmp_path / "two.h5"), ["a"])


def test_feature_files_that_declare_more_than_they_hold_are_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    for name, shape, chunks in (("huge", (10**6, 10**4), (8, 8)), ("zip", (2**14, 64), (512, 64))):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            options = {"chunks": chunks, "compression": "gzip"}
            stored = file.create_dataset("v", shape, "f4", **options)
            if name == "zip":
                stored[:] = 1  # which gzip makes about 500 times smaller
    with pytest.raises(InputError, match="with little in it"):
        data.read_features(f"{tmp_path}/huge.h5")
    assert (data.read_features(f"{tmp_path}/zip.h5") == 1).all()
    np.save(tmp_path / "odd.npy", np.ones((5, 2), np.float32))
    content = (tmp_path / "odd.npy").read_bytes()
    (tmp_path / "odd.npy").write_bytes(content.replace(b"(5, 2)", b"((5, 2"))
    with pytest.raises(InputError, match=r"odd\.npy cannot be read"):
        data.read_features(f"{tmp_path}/odd.npy")


def test_links_of_a_damaged_hdf5_file_are_named(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["v"] = np.ones((3, 2), np.float32)
    with pytest.raises(InputError, match=r"x\.h5 .*surrogates not allowed"):
        data.find_features(f"{tmp_path}/x.h5", ["v", "\ud800"])
    content = (tmp_path / "x.h5").read_bytes()
    (tmp_path / "x.h5").write_bytes(content.replace(b"HEAP", b"HEAD"))
    with pytest.raises(InputError, match=r"x\.h5 is not a valid HDF5 file"):
        data.find_features(f"{tmp_path}/x.h5", ["v"])


def test_a_message_is_short_and_both_readers_refuse_the_same_encodings(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"v": "x" * 10**5}))
    with pytest.raises(InputError, match="could not convert") as error:
        data.fill_durations([make_video("v", math.nan)], str(path))
    assert len(str(error.value)) < 1000
    path.write_text(json.dumps({"database": {}}), encoding="utf-16")
    with pytest.raises(evaluate.InputError, match=r"d\.json cannot be read as JSON"):
        data.load_annotations(str(path))


def test_subsequences_follow_seed_epoch_and_index_alone(tmp_path):
    lengths = {"a": 23, "b": 30, "c": 47, "d": 22, "e": 25}
    rng = np.random.default_rng(0)
    for name, length in lengths.items():
        np.save(tmp_path / f"{name}.npy", rng.normal(size=(length, 5)).astype(np.float32))
    features = data.FeatureDataset([make_video(name) for name in lengths], str(tmp_path), [])
    # from memory, from disk
    one, two = (
        data.SubsequenceDataset(features, 23, per_video=3, seed=1, cache_gb=gb) for gb in (1, 0)
    )
    other = data.SubsequenceDataset(features, 23, per_video=3, seed=2)
    assert one.cache and not two.cache
    assert len(one) == 4 * 3 and one.left_out == ["d"]
    for index in range(len(one)):
        sample = one[index, data.NATIVE]
        x = sample["features"]
        assert x.shape == (5, 23) and torch.equal(x, two[index, data.NATIVE]["features"])
        whole = features.features(list(lengths).index(sample["name"]))
        starts = range(whole.shape[1] - 22)
        assert any(torch.equal(x, whole[:, start : start + 23]) for start in starts)

    def all_of(dataset, epoch=0):
        indices = range(epoch * len(dataset), (epoch + 1) * len(dataset))
        return torch.stack([dataset[i, data.NATIVE]["features"] for i in indices])

    first = all_of(one)
    assert not torch.equal(first, all_of(one, 1)) and not torch.equal(first, all_of(other))
    # the third video, c: uniform over the starts that fit
    generator = torch.Generator().manual_seed(data.seed_of(1, "subsequence", 0, 2))
    start = int(torch.rand(1, generator=generator, dtype=torch.float64) * (47 - 23 + 1))
    assert torch.equal(first[2], features.features(2)[:, start : start + 23])
    with pytest.raises(InputError, match="99 snippets, the longest has 47"):
        data.SubsequenceDataset(features, 99)


# ------------------------------------------------------------------------------------------ collate


def test_collate_stacks_tensors_and_keeps_lists():
    a = {"name": "a", "x": torch.zeros(2), "label": 1, "segments": torch.zeros(1, 2)}
    b = {"name": "b", "x": torch.ones(2), "label": 0, "segments": torch.zeros(3, 2)}
    batch = data.collate([a, b])
    assert batch["name"] == ["a", "b"] and batch["x"].tolist() == [[0, 0], [1, 1]]
    assert batch["label"].tolist() == [1, 0] and [len(s) for s in batch["segments"]] == [1, 3]


def test_a_batch_of_frames_stays_channels_last(tmp_path):
    videos = [
        make_video("v", path=write_zip(tmp_path / "v.zip", numbered_frames(64))),
        make_video("w", path=write_zip(tmp_path / "w.zip", 255 - numbered_frames(40))),
    ]
    dataset = video_dataset(videos, train=True)
    for fidelity in (dataset.full, data.Fidelity("ST", 4, 7)):
        samples = [dataset[i, fidelity] for i in (1, 0, 1)]
        frames = data.collate(samples)["frames"]
        assert frames.shape == (3, fidelity.snippets, 4, 3, fidelity.size, fidelity.size)
        assert frames.movedim(3, -1).is_contiguous()
        for i, sample in enumerate(samples):
            assert torch.equal(frames[i], sample["frames"])
        single = data.collate(samples[:1])["frames"]
        assert single.data_ptr() == samples[0]["frames"].data_ptr()  # not copied


@pytest.mark.parametrize("row", ["v\x00,1,2,jump", "v,1,2,ju\x1bmp", "v\x00,,,"])
def test_control_characters_in_a_table_are_named(tmp_path, row):
    (tmp_path / "a.csv").write_text(f"video,start,end,label\nw,1,2,jump\n{row}\n")
    with pytest.raises(InputError, match=r"a\.csv .*(control characters|NUL)"):
        data.load_annotations(str(tmp_path / "a.csv"))
