"""tools/check_data.py on a small data set with one problem of each kind."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from test_data import entry, make_video, numbered_frames, shared, write_annotations, write_zip
from torchcodec.encoders import JpegEncoder

import data
from tools import check_data, prepare_data
from tools.check_data import Sources, check, main


def silent(message):
    """Log nothing."""


@pytest.fixture
def messy(tmp_path):
    """Six training videos, of which v is fine, and a validation video: their Sources."""
    (tmp_path / "frames").mkdir()
    (tmp_path / "features").mkdir()
    database = {name: entry() for name in ("gone", "torn", "wide")}
    database["v"] = entry(duration=8.0)
    database["long"] = entry(duration=8.2)
    database["only"] = entry(segments=[(3, 2), (5, 50)])
    database["w"] = entry("validation", 8.0, label="run")
    for name in ("v", "w", "long"):
        write_zip(tmp_path / f"frames/{name}.zip", numbered_frames(64))
    (tmp_path / "frames/torn.zip").write_bytes(b"torn")
    for name, channels in {"v": 2, "w": 2, "only": 2, "wide": 3, "long": 2}.items():
        np.save(tmp_path / f"features/{name}.npy", np.ones((4, channels), np.float32))
    annotations = write_annotations(tmp_path / "a.json", database)
    return Sources(annotations, None, f"{tmp_path}/frames", [f"{tmp_path}/features"])


def test_segments_with_problems_are_found():
    segments = [(2, 5), (2, 5), (5, 5), (7, 6), (-1, 3), (9, 12), (20, 30)]
    segments += [(math.nan, 3), (10, 10.005), (1, 2)]
    video = make_video("v", 10.0, segments, ["x"] * 9 + ["Ambiguous"])
    outside = [(row, "segment outside the video") for row in (4, 5, 6)]
    reversed_ones = [(row, "segment ends before it starts") for row in (2, 3)]
    assert list(check_data.segment_problems(video)) == [
        (1, "duplicate segment"),
        *reversed_ones,
        *outside,
        (7, "segment is not a number"),
        (9, "label Ambiguous"),
    ]


def test_ambiguous_segments_are_counted_and_are_no_class(tmp_path, capsys):
    segments = [{"segment": [i, i + 1], "label": x} for i, x in enumerate(["dive", "Ambiguous"])]
    database = {"v": {"subset": "training", "duration": 9.0, "annotations": segments * 2}}
    assert main(["--annotations", write_annotations(tmp_path / "a.json", database)]) == 0
    text = capsys.readouterr().out
    assert "4 segments, 0.00 hours, 1 classes" in text and "| Ambiguous" not in text
    assert "2 x label Ambiguous (no action in training" in text


def test_problems_of_real_annotations():
    videos = data.load_annotations(shared("anet13_annotations.json"))["validation"]
    found = [problem for video in videos for _, problem in check_data.segment_problems(video)]
    duplicates = 0
    for video in videos:
        rows = {(*s, c) for s, c in zip(video.segments.tolist(), video.labels, strict=True)}
        duplicates += len(video.labels) - len(rows)
    # the three that the field knows
    assert found.count("segment ends before it starts") == 3
    assert found.count("duplicate segment") == duplicates > 0


def test_every_problem_is_listed(messy):
    logged = []
    problems, fatal = check(messy, log=logged.append)
    assert sorted(problem[:3] for problem in problems) == sorted(
        [
            ("training", "torn", "frames cannot be read"),
            ("training", "gone", "media missing"),
            ("training", "long", "duration disagrees"),
            ("training", "only", "segment ends before it starts"),
            ("training", "only", "segment outside the video"),
            ("training", "wide", "other channel count"),
        ]
    )
    (detail,) = [problem.detail for problem in problems if problem.video == "long"]
    assert detail == f"8.2 s in the annotations, 8.00 s in {messy.frames}/long.zip"
    assert len(fatal) == 1 and fatal[0].startswith("training would stop at: torn (")
    assert ", wide (" in fatal[0]
    counts = "6 videos, 7 segments, 0.02 hours, 1 classes; 2 with frames, 4 with features, 2 with"
    assert logged[0] == f"training: {counts} neither"
    counts = "1 videos, 1 segments, 0.00 hours, 1 classes; 1 with frames, 1 with features, 0 with"
    assert logged[1] == f"validation: {counts} neither"
    assert check(messy, workers=2, log=silent)[0] == problems


def test_what_keeps_training_from_starting_is_told(messy, tmp_path):
    features = messy.features[0]
    os.remove(f"{messy.frames}/w.zip")
    alone = Sources(messy.annotations, frames=messy.frames)
    _, fatal = check(alone, log=silent)
    assert "no video of subset validation has frames or features" in fatal[0]
    os.remove(f"{messy.frames}/torn.zip")
    os.remove(f"{features}/wide.npy")

    def fatal_of(frames, *required):
        sources = Sources(messy.annotations, None, frames, messy.features, required=list(required))
        return check(sources, log=silent)[1]

    assert fatal_of(messy.frames, "features") == fatal_of("/none") == []
    assert len(fatal_of(messy.frames, "frames")) == 1
    fatal = fatal_of(None, "frames")
    assert len(fatal) == 3 and "the stages read frames: set data.frames" in fatal[0]
    fatal = fatal_of("/none", "frames")
    assert len(fatal) == 3 and "there are no frames at /none" in fatal[0]
    assert all(line.startswith("training cannot start: ") for line in fatal)

    np.save(f"{features}/v.npy", np.full((4, 2), np.inf, np.float32))
    sources = Sources(messy.annotations, features=messy.features, required=["features"])
    problems, fatal = check(sources, log=silent)
    (detail,) = [p.detail for p in problems if p.kind == "features cannot be read"]
    assert "v.npy has NaN or infinite values" in detail
    assert fatal == [f"training would stop at: v ({detail})"]
    _, fatal = check(Sources(messy.annotations, ["training", "testing"]), log=silent)
    assert "no subset 'testing'" in fatal[0]


def test_statistics_are_of_what_training_sees():
    a = make_video("a", 100.0, [(0, 10), (5, 20), (90, 120), (7, 7)], "xyxx")
    b = make_video("b", math.nan, [(0, 2), (6, 8)], "xx")
    s = check_data.statistics([a, b, make_video("c", 10.0)])
    np.testing.assert_allclose(s["seconds"], [10, 15, 10, 2, 2], rtol=1e-6)
    np.testing.assert_allclose(s["share"], [0.1, 0.15, 0.1, 0.25, 0.25], rtol=1e-6)
    assert (s["label"].tolist(), s["owner"].tolist()) == (list("xyxxx"), [0, 0, 0, 1, 1])
    np.testing.assert_allclose(s["action"], [30, 50, 0], rtol=1e-6)
    assert s["classes"].tolist() == [2, 1, 0]


def test_classes_that_a_capital_letter_makes_two_are_named(tmp_path):
    database = {name: entry(label=name) for name in ("jump", "Jump", "run")}
    lines = []
    check(Sources(write_annotations(tmp_path / "a.json", database)), log=lines.append)
    assert "classes that differ in capital letters only: Jump, jump" in "\n".join(lines)


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_what_was_read_is_shown_and_settings_recommended(tmp_path):
    """Short and long videos, few and many classes, with durations and without."""
    database = {"a": entry(duration=10.0, segments=[(0, 1), (2, 4), (5, 9)])}
    database["b"] = entry("validation", 20.0, [(0, 10)], "run")
    lines = []
    check(Sources(write_annotations(tmp_path / "a.json", database)), log=lines.append)
    text = "\n".join(lines)
    assert "| jump  |               1 |                 3 |              7.0 |" in text
    assert "training lacks 1 of 2 classes: run" in lines
    rows = {first: row for first, *row in map(cells_of, text.splitlines())}
    assert rows["training: seconds of a segment"] == ["1", "1.2", "2", "3.6", "4"]
    assert rows["training: % of a video that are action"] == ["70"] * 5
    assert any("classes=video" in line for line in lines)
    assert any("video.snippets=32 or more" in line for line in lines)

    labels = [f"class {i % 3}" for i in range(40)]
    times = [(100 * i, 100 * i + 4 + i % 2) for i in range(40)]
    (text,) = ["\n".join(check_data.recommend([make_video("v", math.nan, times, labels)]))]
    assert "classes=segment: classes in the median video with actions: 3" in text
    # 3,905 s to the last end: a snippet each 2 s for segments of 4 s
    assert "data.windows=true video.rate=0.5" in text and "1953 a video" in text
    assert "video.snippets=64 (a window) gtad.durations=3" in text
    assert "data.durations=FILE, or data.frames: 1 videos have no duration" in text
    assert list(check_data.recommend([make_video("v", 8.0)])) == []


def test_a_table_is_converted_with_the_durations_of_the_media(messy, tmp_path, capsys):
    (tmp_path / "t.csv").write_text("video,start,end,label\nv.mp4,1,2,x\nw,0:03,0:04,x\n")
    table = ["--annotations", f"{tmp_path}/t.csv", "--frames", messy.frames]
    assert main([*table, "--json", f"{tmp_path}/new.json"]) == 0
    subsets = data.load_annotations(f"{tmp_path}/new.json")
    assert {subset: videos[0].duration for subset, videos in subsets.items()} == {
        "training": 8.0,
        "validation": 8.0,
    }
    with pytest.raises(SystemExit, match=r"new\.json already exists"):
        main([*table, "--json", f"{tmp_path}/new.json"])
    rows = "video,start,end,label,subset\nv,1,2,x,training\nw,,,,validation\ngone,,,,validation\n"
    (tmp_path / "t.csv").write_text(rows)
    assert main(table) == 0
    printed = capsys.readouterr().out
    assert "validation: 2 videos, 0 segments" in printed and "1 x media missing" in printed
    (tmp_path / "t.csv").write_text("video,start,end,label\nv,1,2,x\nw,7,60,x\n")
    assert main(table) == 0
    assert "segment outside the video" in capsys.readouterr().out
    words = [f"data.annotations={tmp_path}/t.csv", f"data.frames={messy.frames}"]
    words += ["data.train_subset=fit", "data.val_subset=test", "stages=[lofi]"]
    assert main(["--cfg", "configs/toy.yaml", "--set", *words]) == 0
    assert "fit: 1 videos, 1 segments" in capsys.readouterr().out


def test_durations_may_come_from_the_frames(messy, tmp_path):
    annotation = {"segment": [1, 2], "label": "x"}
    bare = {"v": {"subset": "train", "annotations": [annotation]}}
    sources = Sources(write_annotations(tmp_path / "b.json", bare))
    problems, fatal = check(sources, log=silent)
    assert problems[0].kind == "no duration" and "has a duration" in fatal[0]
    sources.frames = messy.frames
    assert check(sources, log=silent) == ([], [])
    # Those of a file are compared with the frames, too.
    (tmp_path / "ms.json").write_text('{"v": 8000}')
    sources.durations = str(tmp_path / "ms.json")
    assert [p.kind for p in check(sources, log=silent)[0]] == ["duration disagrees"]


def test_a_video_in_two_subsets_is_noticed(tmp_path):
    database = {"v_a": entry("training"), "a": entry("validation"), "b": entry("validation")}
    sources = Sources(write_annotations(tmp_path / "a.json", database))
    (problem,) = check(sources, log=silent)[0]
    assert problem == ("validation", "a", "video in two subsets", "v_a in training")


def test_frames_that_were_prepared_for_other_snippets_are_noticed(messy, tmp_path):
    folder = tmp_path / "in/v"
    folder.mkdir(parents=True)
    for i, frame in enumerate(numbered_frames(64)):
        JpegEncoder(frame).to_file(f"{folder}/img_{i:05d}.jpg")
    (folder / "video.json").write_text('{"fps": 8, "duration_sec": 8.0}')
    settings = {"snippets": 8, "frames": 2, "stride": 2, "short_side": 16}
    settings |= {"copies": [], "quality": 90}
    made = str(tmp_path / "made")
    prepare_data.prepare({"v": str(folder)}, made, settings, 0)

    def kinds(**settings):
        sources = Sources(messy.annotations, ["training"], made, settings=settings)
        return {p.kind for p in check(sources, log=silent)[0] if p.video == "v"}

    assert kinds(snippets=8, rate=None, frames=2, stride=2) == set()
    different = {"frames prepared otherwise"}
    assert kinds(snippets=8, rate=None, frames=2, stride=4) == different
    assert kinds(rate=3.0, frames=2, stride=2) == different


def test_the_list_is_written_beside_the_annotations_and_nothing_over(messy, tmp_path, capsys):
    arguments = ["--annotations", messy.annotations, "--frames", messy.frames]
    command = [*arguments, "--features", *messy.features]
    assert main(command) == main(command) == 1
    lines = (tmp_path / "a.problems.txt").read_text().splitlines()
    assert len(lines) == 7 and lines[0].startswith(check_data.MARK)
    assert any(line.startswith("training\tgone\tmedia missing\t") for line in lines)
    printed = capsys.readouterr().out
    assert "6 problems, listed in" in printed
    assert "1 x segment ends before it starts (left out)" in printed
    notes = f"my notes on\n{check_data.MARK}"
    (tmp_path / "mine.txt").write_text(notes)
    with pytest.raises(SystemExit, match="already exists, of another program"):
        main([*command, "--problems", str(tmp_path / "mine.txt")])
    assert (tmp_path / "mine.txt").read_text() == notes


def test_a_reader_that_has_seen_enough_ends_it_quietly(messy, tmp_path):
    read, write = os.pipe()
    arguments = ["--annotations", messy.annotations, "--frames", messy.frames]
    command = [sys.executable, "-m", "tools.check_data", *arguments]
    process = subprocess.Popen(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    os.close(read)
    assert process.communicate(timeout=60)[1] == "" and process.returncode != 0


def test_a_config_names_paths_and_what_training_reads(messy, tmp_path, capsys):
    features = messy.features[0]
    paths = [f"data.annotations={messy.annotations}", f"data.frames={messy.frames}"]

    def run(*overrides):
        status = main(["--cfg", "configs/toy.yaml", "--set", *paths, *overrides])
        return status, capsys.readouterr().out

    both = f"data.features=[{features}, {features}]"
    status, printed = run(both, "stages=[head, detect]")
    assert status == 1 and "training: 6 videos" in printed and "stop at: wide" in printed
    assert "wide.npy has 3 channels, most have 2" in printed
    status, printed = run(both, "stages=[lofi, features, head]")
    assert status == 1 and "stop at: torn" in printed
    os.remove(f"{features}/wide.npy")
    os.remove(f"{messy.frames}/torn.zip")
    assert run(both, "stages=[head, detect]")[0] == 0
    status, printed = run(f"out={tmp_path}/run", "stages=[head, detect]")
    assert status == 1 and f"there are no features at {tmp_path}/run/features" in printed
    status, printed = run("data.frames=/none", "stages=[lofi]")
    assert status == 1 and "there are no frames at /none" in printed
    status, printed = run("data.val_subset=test")
    assert status == 1 and "no subset 'test', only ['training', 'validation']" in printed
    database = json.loads((tmp_path / "a.json").read_text())["database"]
    database["w"]["annotations"] = []
    write_annotations(tmp_path / "a.json", database)
    status, printed = run(both, "stages=[head, detect]")
    assert status == 0 and "validation: no segments, so results will be" in printed


def test_wrong_arguments_are_one_line_each(messy, tmp_path):
    (tmp_path / "file").write_text("x")
    bare = {"v": {"subset": "train", "annotations": [{"segment": [1, 2], "label": "x"}]}}
    annotations = ["--annotations", write_annotations(tmp_path / "b.json", bare)]
    messages = {
        r"name a config with --cfg": [],
        r"none\.json": ["--annotations", str(tmp_path / "none.json")],
        r"file cannot be read": [*annotations, "--durations", f"{tmp_path}/file"],
        r"none cannot be read": [*annotations, "--durations", f"{tmp_path}/none"],
        r"cannot be written": [*annotations, "--problems", f"{tmp_path}/file/list"],
    }
    for message, arguments in messages.items():
        with pytest.raises(SystemExit, match=rf"^tools\.check_data: .*{message}"):
            main(arguments)


def test_letters_that_no_file_can_hold_are_listed_too(tmp_path):
    path = str(tmp_path / "problems.txt")
    check_data.write_problems([check_data.Problem("training", "v\ud800", "kind", "x")], path)
    assert "training\tv?\tkind\tx" in (tmp_path / "problems.txt").read_text()
