"""A run's detections for a file on its own are those that its stage detect gave; and what happens to files that are none."""
import json
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

import data
import engine
import localize
import lofi_tal
import media
import plots
import toy

VIDEOS = os.path.join(os.path.dirname(localize.__file__), "../shared/data/videos")
real_files = pytest.mark.skipif(not os.path.isdir(VIDEOS), reason="needs the folder of real videos")
TINY = ["data.size=16", "data.snippets=8", "data.workers=0", "encoder.width=8", "head.epochs=2", "head.batch_size=4", "features.chunk=3", "pretrain.method=none",
        "gtad={hidden: 16, gcn_width: 16, gcn_groups: 4, inner_bins: 4, context_bins: 2, map_hidden: [16, 8]}",
        "sola.subsequence=4", "sola.positions=[0,1,2,3]", "sola.hidden=16", "sola.epochs=5", "sola.lr=0.01", "sola.batch_size=4"]


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("toy") / "data")
    toy.make_toy(out, workers=1, train=4, val=3, clips=16, stills=24, size=20, snippets=16)
    return out


@pytest.fixture(scope="module")
def runs(toys, tmp_path_factory):
    """Finished runs of lofi_tal.py, moved elsewhere afterwards: {name: folder}."""
    folder, out = tmp_path_factory.mktemp("runs"), {}
    kinds = {"plain": ["stages=[pretrain,features,head,detect]"], "sola": ["stages=[pretrain,features,sola,head,detect]"],
             "windows": ["stages=[pretrain,features,head,detect]", "data.windows=true", "data.rate=2.5", "gtad.durations=6"]}  # 20 snippets in windows of 8
    for name, words in kinds.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # these few videos share no class
            lofi_tal.main(["--cfg", "configs/toy.yaml", "--set", *TINY, f"out={folder}/made", f"data.annotations={toys}/annotations.json",
                           f"data.frames={toys}/frames", *words])
        out[name] = str(folder / name)
        shutil.move(f"{folder}/made", out[name])
    return out


@pytest.fixture(scope="module")
def model(runs):
    return localize.load(runs["plain"], "cpu")


def result_of(folder):
    with open(f"{folder}/result.json") as f:
        return json.load(f)


def check_same(found, expected):
    assert [(d["label"], d["segment"]) for d in found] == [(d["label"], d["segment"]) for d in expected]
    assert np.allclose([d["score"] for d in found], [d["score"] for d in expected], rtol=1e-4)  # rounds otherwise in a batch of one


@pytest.mark.parametrize("name", ["plain", "sola", "windows"])
def test_a_video_alone_gets_the_numbers_of_its_run(runs, toys, name):
    model, results = localize.load(runs[name], "cpu"), result_of(runs[name])["results"]
    assert len(results) == 3 and (model.sola is None) == (name != "sola")
    for video, expected in results.items():
        assert len(expected) > 3
        check_same(localize.localize(model, f"{toys}/frames/{video}.zip"), expected)
        features = localize.features_of(model, media.open_media(f"{toys}/frames/{video}.zip"))
        stored = np.load(f"{runs[name]}/{'sola/' if name == 'sola' else ''}features/{video}.npy")
        assert features.shape[2] == (20 if name == "windows" else 8)
        if name == "windows":  # stage features cuts a long video into pieces first: other chunks
            assert np.allclose(features[0].t().numpy(), stored, rtol=1e-4, atol=1e-6)
        else:
            assert np.array_equal(features[0].t().numpy(), stored)


def test_features_are_computed_in_the_runs_precision(runs, toys, tmp_path):
    """As in stage features; auto, if the run is from before there was this key."""
    video, features, seen = media.open_media(f"{toys}/frames/toy_00004.zip"), {}, {}
    for precision in ("none", "auto", "float32", "bfloat16"):
        run = shutil.copytree(runs["plain"], tmp_path / precision)
        cfg = {k: v for k, v in json.load(open(run / "config.json")).items() if k != "precision"}
        (run / "config.json").write_text(json.dumps(cfg | ({} if precision == "none" else {"precision": precision})))
        model = localize.load(run, "cpu")
        model.encoder.conv1.register_forward_hook(lambda module, _, out: seen.update({precision: out.dtype}))
        features[precision] = localize.features_of(model, video)
    assert seen == {"none": torch.float32, "auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
    assert all(torch.equal(features[k], features["none"]) for k in ("auto", "float32"))
    assert features["bfloat16"].dtype == torch.float32 and not torch.equal(features["bfloat16"], features["none"])


def test_three_lines_of_python(runs, toys):
    lines = localize.__doc__.partition("From Python:\n")[2].splitlines()[:3]
    code = "\n".join(lines).replace("    ", "", 3).replace("runs/toy-0/lofi", runs["plain"]).replace("video.mp4", f"{toys}/frames/toy_00004.zip")
    done = subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(localize.__file__), capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("[{'label': ") and len(lines) == 3


# ---------------------------------------------------------------- frames

class Source(media.Jpegs):
    """A video whose frame i shows the number i, of which some do not decode; it counts how far it was read."""
    path = "made up"

    def __init__(self, num_frames, missing=()):
        self.num_frames, self.missing, self.taken = num_frames, set(missing), 0

    def decode(self, numbers, short_side=None):
        for n in np.unique(numbers).tolist():
            if n not in self.missing:
                self.taken += 1
                yield n, torch.full((3, 8, 8), n, dtype=torch.uint8)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("num_frames, snippets, frames, stride, missing", [
    (200, 10, 4, 1, ()), (100, 25, 4, 4, ()), (3, 5, 4, 2, ()), (240, 10, 4, 8, ()), (200, 20, 4, 1, (0, 77, 78)), (100, 20, 5, 3, (20, 21, 22, 99)), (60, 15, 4, 1, (4, 5))])
def test_frames_in_chunks_are_those_read_at_once(num_frames, snippets, frames, stride, missing, chunk):
    numbers = media.snippet_frames(num_frames, snippets, frames, stride).numpy()
    wanted = np.unique(numbers)
    there = np.array([n for n in wanted if n not in missing])
    expected = there[media.nearest(there, numbers.flatten())].reshape(numbers.shape)
    parts = list(localize.stream(Source(num_frames, missing), numbers, 4, 1.0, chunk))
    assert all(p.shape[1] <= chunk and p.shape[2:] == (frames, 3, 4, 4) for p in parts)
    assert np.array_equal(torch.cat(parts, 1)[0, :, :, 0, 0, 0].numpy(), expected)


def test_frames_are_taken_when_they_are_needed():
    numbers = media.snippet_frames(250, 10, 4, 8).numpy()  # 25 frames apart, each over 32: overlapping
    source = Source(250)
    for i, _ in enumerate(localize.stream(source, numbers, 4, 1.0, 2)):
        assert source.taken == len([n for n in np.unique(numbers) if n <= numbers[:2 * i + 2].max()])


def test_too_few_frames_are_an_error():
    numbers = media.snippet_frames(100, 10, 4, 2).numpy()
    for missing in (range(50, 100), range(100)):
        with pytest.raises(ValueError, match="made up: only"):
            list(localize.stream(Source(100, missing), numbers, 4, 1.0, 4))


def test_a_broken_chunk_size_changes_nothing(runs, toys, model):
    path = f"{toys}/frames/toy_00005.zip"
    for chunk in (1, 100):
        a = localize.features_of(localize.load(runs["plain"], "cpu", chunk), media.open_media(path))
        assert torch.allclose(a, localize.features_of(model, media.open_media(path)), rtol=1e-4, atol=1e-5)


@real_files
@pytest.mark.parametrize("file", ["exercise.avi", "video_90.mov", "h264_10bits.mp4", "v_ZNVhz7ctTq0.mp4"])
def test_frames_of_a_file_are_those_that_training_sees(file):
    source, options = media.open_media(f"{VIDEOS}/{file}"), {"snippets": 10, "frames": 4, "stride": 3}
    numbers = media.snippet_frames(source.num_frames, 10, 4, 3).numpy()
    video = data.Video(file, source.duration, torch.zeros(0, 2), (), f"{VIDEOS}/{file}")
    expected = data.VideoDataset([video], VIDEOS, **options)[0, data.Fidelity("full", 10, 32)]["frames"]
    assert torch.equal(torch.cat(list(localize.stream(source, numbers, 32, 0.875, 4)), 1)[0], expected)


# ---------------------------------------------------------------- the program

def start(*words):
    """The program's exit status."""
    try:
        localize.main([str(w) for w in words])
    except SystemExit as error:
        return error.code
    return 0


@real_files
def test_every_odd_file_is_handled_or_refused_in_one_line(runs, tmp_path, capsys):
    files = sorted(os.listdir(VIDEOS))
    assert start("--run", runs["plain"], "--out", tmp_path / "out", "--no-picture", "--device", "cpu", *(f"{VIDEOS}/{f}" for f in files), tmp_path / "none.mp4") == 1
    said = capsys.readouterr()
    refused = ["audio_only.wav", "corrupted.mp4", "none.mp4"]
    lines = said.err.strip().splitlines()
    assert len(lines) == 3 and all(line.startswith("localize.py: ") and file in line for line, file in zip(lines, refused))
    result = result_of(tmp_path / "out")
    assert sorted(result["results"]) == sorted(os.path.splitext(f)[0] for f in files if f not in refused)
    for name, found in result["results"].items():
        assert found and all(0 <= d["segment"][0] <= d["segment"][1] <= result["external_data"]["videos"][name]["duration"] + 1e-6 for d in found)
    assert f"{len(files) - 2} of {len(files) + 1} videos" in said.out and os.listdir(tmp_path / "out") == ["result.json"]


def test_result_table_and_picture(runs, toys, tmp_path, capsys, monkeypatch):
    pictures = {}
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: (pictures.update({os.path.basename(path): figure}), save(figure, path)))
    out = tmp_path / "out"
    assert start("--run", runs["plain"], "--out", out, "--gt", f"{toys}/annotations.json", f"{toys}/frames/toy_00004.zip", f"{toys}/frames/toy_00005.zip") == 0
    said, result = capsys.readouterr().out, result_of(out)
    assert sorted(os.listdir(out)) == ["result.json", "toy_00004.png", "toy_00005.png"]
    for name in ("toy_00004", "toy_00005"):
        check_same(result["results"][name], result_of(runs["plain"])["results"][name])
        best = result["results"][name][0]
        assert f"{best['segment'][0]:.2f}" in said and f"{name}: 8.00 s, 64 frames" in said
        with open(f"{toys}/annotations.json") as f:
            annotated = json.load(f)["database"][name]["annotations"]
        assert sum(p.get_gid() == "truth" for a in pictures[f"{name}.png"].axes for p in a.patches) == len(annotated)
    assert len([line for line in said.splitlines() if line.startswith("  ") and "->" not in line]) == 2 * (1 + 10)  # a head and the best ten
    assert "2 of 2 videos" in said and result["external_data"]["class_source"] == "video classifier of the run"
    again = plots.timelines(str(out), say=lambda words: None)  # from what lies in the folder
    assert [os.path.basename(p) for p in again] == ["timeline_toy_00004.png", "timeline_toy_00005.png"]
    shutil.copy(f"{out}/pictures/timeline_toy_00005.png", tmp_path / "b.png")
    plots.timelines(str(out), ["toy_00005"], f"{toys}/annotations.json", out=str(tmp_path / "again"), say=lambda words: None)
    assert (tmp_path / "again/toy_00005.png").read_bytes() == (out / "toy_00005.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_files_of_one_name_and_later_starts_add_up(runs, toys, tmp_path):
    for folder, number in (("a", 4), ("b", 5)):
        os.makedirs(tmp_path / folder)
        shutil.copy(f"{toys}/frames/toy_{number:05d}.zip", tmp_path / folder / "x.zip")
    words = ["--run", runs["plain"], "--out", tmp_path / "out", "--no-picture"]
    assert start(*words, tmp_path / "a/x.zip", tmp_path / "b/x.zip") == 0
    assert start(*words, tmp_path / "b/x.zip", f"{toys}/frames/toy_00006.zip") == 0
    found, run = result_of(tmp_path / "out"), result_of(runs["plain"])
    assert list(found["results"]) == ["x", "x-2", "toy_00006"]
    for name, of in (("x", "toy_00004"), ("x-2", "toy_00005"), ("toy_00006", "toy_00006")):
        check_same(found["results"][name], run["results"][of])


def test_nothing_of_somebody_else_is_written_over(runs, toys, tmp_path, capsys):
    video, before = f"{toys}/frames/toy_00004.zip", result_of(runs["plain"])
    assert "made by something else" in start("--run", runs["plain"], "--out", runs["plain"], video)
    assert result_of(runs["plain"]) == before
    assert start("--run", runs["plain"], "--out", tmp_path, "--no-picture", video) == 0
    assert f"made by {runs['plain']}" in start("--run", runs["sola"], "--out", tmp_path, "--no-picture", video)
    (tmp_path / "toy_00004.png").write_text("a picture of my cat")
    assert start("--run", runs["plain"], "--out", tmp_path, video) == 1
    assert "no picture of this program" in capsys.readouterr().err and (tmp_path / "toy_00004.png").read_text() == "a picture of my cat"


def test_runs_that_cannot_localize_say_why(runs, tmp_path):
    run = tmp_path / "run"
    assert "name the folder of a run" in start("--run", run, "x.mp4")
    shutil.copytree(runs["plain"], run)
    os.remove(run / "head/head.pt")
    assert "is not finished: no" in start("--run", run, "x.mp4")
    os.remove(run / "pretrain/encoder.pt")
    assert "stage pretrain writes" in start("--run", run, "x.mp4")
    with open(run / "config.json") as f:
        cfg = json.load(f)

    def change(**keys):
        engine.save_json({**cfg, **keys}, str(run / "config.json"))
        return start("--run", run, "x.mp4")
    foreign = change(data={**cfg["data"], "features": "data/tsp"}, stages=["head", "detect"])
    assert "trained on features from elsewhere (data/tsp) and has no encoder" in foreign and "\n" not in foreign
    assert "no encoder nowhere.pt" in change(stages=["features", "head", "detect"], pretrain={**cfg["pretrain"], "checkpoint": "nowhere.pt"})


def test_the_encoder_of_a_run(runs, tmp_path):
    cfg = localize.load(runs["plain"], "cpu").cfg
    for stages, expected in ((["pretrain", "lofi", "features"], "lofi"), (["pretrain", "features"], "pretrain"), (["lofi", "features"], "lofi")):
        for stage in ("lofi", "pretrain"):
            os.makedirs(tmp_path / stage, exist_ok=True)
            (tmp_path / stage / "encoder.pt").touch()
        assert localize.encoder_path(str(tmp_path), localize.config.merge(cfg, {"stages": stages})) == f"{tmp_path}/{expected}/encoder.pt"
    elsewhere = localize.config.merge(cfg, {"stages": ["features", "head"]})
    elsewhere["pretrain"]["checkpoint"] = str(tmp_path / "lofi/encoder.pt")
    assert localize.encoder_path("run", elsewhere) == str(tmp_path / "lofi/encoder.pt")


def test_pictures_are_optional(runs, toys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ["--run", runs["plain"], "--out", tmp_path, f"{toys}/frames/toy_00004.zip"]
    assert "pip install matplotlib" in start(*words)
    assert start(*words, "--no-picture") == 0


def test_a_folder_of_frames_needs_a_frame_rate(model, tmp_path):
    from torchcodec.encoders import JpegEncoder
    for i in range(8):
        (tmp_path / f"img_{i + 1:05d}.jpg").write_bytes(JpegEncoder(torch.full((3, 20, 20), 30 * i, dtype=torch.uint8)).to_tensor(quality=90).numpy().tobytes())
    with pytest.raises(ValueError, match="tells no frame rate"):
        localize.localize(model, tmp_path)
    (tmp_path / "video.json").write_text('{"fps": 4, "duration_sec": 2.0}')
    found = localize.localize(model, tmp_path)
    assert found and max(d["segment"][1] for d in found) <= 2


def test_table():
    lines = localize.table([{"label": "jump", "score": 0.71, "segment": [3.5, 118.25]}, {"label": "a b", "score": 0.00002, "segment": [0, 4]}]).splitlines()
    assert [line.split() for line in lines] == [["score", "start", "end", "class", "(times", "in", "seconds)"], ["0.710", "3.50", "118.25", "jump"],
                                                ["2e-05", "0.00", "4.00", "a", "b"]]
    assert len({line.index(word) for line, word in zip(lines, ("class", "jump", "a b"))}) == 1
    assert localize.table([]) == "  no detections"
