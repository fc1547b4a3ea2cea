"""A file on its own gets the detections of its run; what cannot be read is refused in one line."""

import inspect
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import Process

import config
import data
import localize
import lofi_tal
import media
from checkpoint import save_json
from media import InputError
from tools import plot
from tools.make_toy import Toy, make_toy

VIDEOS = os.path.join(config.HERE, "../shared/data/videos")
real_files = pytest.mark.skipif(not os.path.isdir(VIDEOS), reason="needs real videos")
TINY = [
    *("video.size=16", "video.snippets=8", "data.workers=0", "encoder.width=8", "device=cpu"),
    *("pretrain.method=none", "features.chunk_snippets=3", "head.epochs=2", "head.batch_size=4"),
    "gtad={hidden: 16, gcn_width: 16, gcn_groups: 4, inner_bins: 4, context_bins: 2, "
    "map_hidden: [16, 8]}",
    *("sola.subsequence=4", "sola.positions=[0,1,2,3]", "sola.hidden=16", "sola.epochs=5"),
    *("sola.lr=0.01", "sola.batch_size=4"),
]
# Of "windows": 20 snippets in windows of 8.
KINDS = {
    "plain": ["stages=[pretrain,features,head,detect]"],
    "sola": ["stages=[pretrain,features,sola,head,detect]", "classes=segment"],
    "windows": [
        *("stages=[pretrain,features,head,detect]", "gtad.durations=6"),
        *("data.windows=true", "video.rate=2.5", "classes=segment"),
    ],
}


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("toy") / "data")
    make_toy(out, Toy(train=4, val=3, clips=16, stills=24, size=20, snippets=16), workers=0)
    return out


@pytest.fixture(scope="module")
def runs(toys, tmp_path_factory):
    """Return {kind: folder} of finished runs, moved elsewhere afterwards."""
    folder = tmp_path_factory.mktemp("runs")
    paths = [f"data.annotations={toys}/annotations.json", f"data.frames={toys}/frames"]
    for kind, overrides in KINDS.items():
        words = [*TINY, f"out={folder}/made", *paths, *overrides]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # these few videos share no class
            lofi_tal.main(["--cfg", "configs/toy.yaml", "--set", *words])
        shutil.move(f"{folder}/made", folder / kind)
    return {kind: str(folder / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def model(runs):
    return localize.load(runs["plain"], "cpu")


def frames_of(toys, number):
    return f"{toys}/frames/toy_{number:05d}.zip"


def read_json(*path):
    return json.loads(Path(*path).read_text())


def check_same(detections, expected):
    # A batch of one rounds otherwise.
    for key in ("label", "segment"):
        assert [d[key] for d in detections] == [d[key] for d in expected]
    scores = [d["score"] for d in detections]
    assert np.allclose(scores, [d["score"] for d in expected], rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_video_alone_gets_the_numbers_of_its_run(runs, toys, kind):
    model = localize.load(runs[kind], "cpu")
    results = read_json(runs[kind], "result.json")["results"]
    assert len(results) == 3
    assert (model.sola is None) == (kind != "sola")
    for video, expected in results.items():
        path = f"{toys}/frames/{video}.zip"
        assert len(expected) > 3
        check_same(localize.localize(model, path), expected)
        features = localize.encode_video(model, media.open_media(path))[0].t().numpy()
        folder = "sola/features" if kind == "sola" else "features"
        stored = np.load(f"{runs[kind]}/{folder}/{video}.npy")
        assert len(features) == (20 if kind == "windows" else 8)
        if kind == "windows":
            # Stage features cuts a long video into pieces first: other chunks.
            assert np.allclose(features, stored, rtol=1e-4, atol=1e-6)
        else:
            assert np.array_equal(features, stored)


def test_features_are_computed_in_the_runs_precision(runs, toys, tmp_path):
    video = media.open_media(frames_of(toys, 4))
    features, dtypes = {}, {}
    for precision in ("auto", "float32", "bfloat16"):
        run = shutil.copytree(runs["plain"], tmp_path / precision)
        save_json(read_json(run, "config.json") | {"precision": precision}, f"{run}/config.json")
        model = localize.load(run, "cpu")

        def note(module, inputs, out, precision=precision):
            dtypes[precision] = out.dtype

        model.encoder.conv1.register_forward_hook(note)
        features[precision] = localize.encode_video(model, video)
    assert dtypes["auto"] == dtypes["float32"] == torch.float32
    assert dtypes["bfloat16"] == torch.bfloat16
    assert torch.equal(features["auto"], features["float32"])
    assert features["bfloat16"].dtype == torch.float32
    assert not torch.equal(features["bfloat16"], features["auto"])


def test_three_lines_of_python(runs, toys):
    lines = localize.__doc__.partition("From Python:\n\n")[2].splitlines()[:3]
    code = inspect.cleandoc("\n".join(lines))
    code = code.replace("runs/toy-0/lofi", runs["plain"]).replace("video.mp4", frames_of(toys, 4))
    process = Process("-c", code)
    printed, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert printed.startswith("[{'label': ")


# ------------------------------------------------------------------------------------------ frames


class Source(media.JpegFrames):
    """A video whose frame i shows the number i; some do not decode. It counts what was read."""

    path = "made up"

    def __init__(self, num_frames, missing=()):
        self.num_frames = num_frames
        self.missing = set(missing)
        self.num_read = 0

    def decode(self, numbers, short_side=None):
        for n in np.unique(numbers).tolist():
            if n not in self.missing:
                self.num_read += 1
                yield n, torch.full((3, 8, 8), n, dtype=torch.uint8)


@pytest.mark.parametrize("chunk_snippets", [1, 3, 100])
@pytest.mark.parametrize(
    "num_frames, snippets, frames, stride, missing",
    [
        (200, 10, 4, 1, ()),
        (100, 25, 4, 4, ()),
        (3, 5, 4, 2, ()),
        (240, 10, 4, 8, ()),
        (200, 20, 4, 1, (0, 77, 78)),
        (100, 20, 5, 3, (20, 21, 22, 99)),
        (60, 15, 4, 1, (4, 5)),
    ],
)
def test_frames_in_chunks_are_those_read_at_once(
    num_frames, snippets, frames, stride, missing, chunk_snippets
):
    numbers = media.snippet_frames(num_frames, snippets, frames, stride).numpy()
    available = np.setdiff1d(numbers, missing)
    expected = available[media.nearest(available, numbers.flatten())].reshape(numbers.shape)
    source = Source(num_frames, missing)
    parts = list(localize.frame_chunks(source, numbers, 4, 1.0, chunk_snippets))
    for part in parts:
        assert part.shape[1] <= chunk_snippets
        assert part.shape[2:] == (frames, 3, 4, 4)
    assert np.array_equal(torch.cat(parts, 1)[0, :, :, 0, 0, 0].numpy(), expected)


def test_frames_are_read_when_they_are_needed():
    # 25 frames apart, each over 32: overlapping.
    numbers = media.snippet_frames(250, 10, 4, 8).numpy()
    source = Source(250)
    for i, _ in enumerate(localize.frame_chunks(source, numbers, 4, 1.0, 2)):
        needed = np.unique(numbers[numbers <= numbers[: 2 * i + 2].max()])
        assert source.num_read == len(needed)


@pytest.mark.parametrize("missing", [range(50, 100), range(100)])
def test_too_few_frames_are_an_error(missing):
    numbers = media.snippet_frames(100, 10, 4, 2).numpy()
    with pytest.raises(InputError, match="made up is damaged"):
        list(localize.frame_chunks(Source(100, missing), numbers, 4, 1.0, 4))


def test_the_chunk_size_changes_nothing(runs, toys, model):
    source = media.open_media(frames_of(toys, 5))
    expected = localize.encode_video(model, source)
    for chunk_snippets in (1, 100):
        other = localize.load(runs["plain"], "cpu", chunk_snippets)
        features = localize.encode_video(other, source)
        assert torch.allclose(features, expected, rtol=1e-4, atol=1e-5)


@real_files
@pytest.mark.parametrize(
    "file", ["exercise.avi", "video_90.mov", "h264_10bits.mp4", "v_ZNVhz7ctTq0.mp4"]
)
def test_frames_of_a_file_are_those_that_training_sees(file):
    source = media.open_media(f"{VIDEOS}/{file}")
    numbers = media.snippet_frames(source.num_frames, 10, 4, 3).numpy()
    video = data.Video(file, source.duration, np.zeros((0, 2)), (), f"{VIDEOS}/{file}")
    dataset = data.VideoDataset(
        [video], snippets=10, frames_per_snippet=4, stride=3, size=32, crop=0.875
    )
    frames = torch.cat(list(localize.frame_chunks(source, numbers, 32, 0.875, 4)), 1)
    assert torch.equal(frames[0], dataset[0, dataset.full]["frames"])


# ------------------------------------------------------------------------------------- the program


def start(*words):
    """Run the program; return its exit status or its message."""
    try:
        localize.main([str(word) for word in words])
    except SystemExit as error:
        return error.code
    return 0


@real_files
def test_every_odd_file_is_handled_or_refused_in_one_line(runs, tmp_path, capsys):
    files = sorted(os.listdir(VIDEOS))
    paths = [*(f"{VIDEOS}/{file}" for file in files), tmp_path / "none.mp4"]
    options = ["--run", runs["plain"], "--out", tmp_path / "out", "--no-picture"]
    assert start(*options, "--device", "cpu", *paths) == 1
    printed = capsys.readouterr()
    refused = ["audio_only.wav", "corrupted.mp4", "none.mp4"]
    lines = printed.err.strip().splitlines()
    assert len(lines) == 3
    for line, file in zip(lines, refused, strict=True):
        assert line.startswith("localize.py: ") and file in line
    result = read_json(tmp_path / "out/result.json")
    expected = [os.path.splitext(file)[0] for file in files if file not in refused]
    assert sorted(result["results"]) == sorted(expected)
    for name, detections in result["results"].items():
        duration = result["external_data"]["videos"][name]["duration"]
        assert detections
        for start_sec, end_sec in (d["segment"] for d in detections):
            assert 0 <= start_sec <= end_sec <= duration + 1e-6
    assert f"{len(files) - 2} of {len(files) + 1} videos" in printed.out
    assert os.listdir(tmp_path / "out") == ["result.json"]


def test_result_table_and_picture(runs, toys, tmp_path, capfd):
    out = tmp_path / "out"
    ground_truth = f"{toys}/annotations.json"
    videos = [frames_of(toys, 4), frames_of(toys, 5)]
    assert start("--run", runs["plain"], "--out", out, "--gt", ground_truth, *videos) == 0
    printed = capfd.readouterr().out
    result = read_json(out, "result.json")
    assert sorted(os.listdir(out)) == ["result.json", "toy_00004.png", "toy_00005.png"]
    for name in ("toy_00004", "toy_00005"):
        check_same(
            result["results"][name], read_json(runs["plain"], "result.json")["results"][name]
        )
        assert f"{result['results'][name][0]['segment'][0]:.2f}" in printed
        assert f"{name}: 8.00 s, 64 frames" in printed
        assert f"{name}.png" in printed
    # A head and the best ten of each.
    assert sum(line.startswith("| ") for line in printed.splitlines()) == 2 * (1 + 10)
    assert "2 of 2 videos" in printed
    assert result["external_data"]["class_source"] == "video classifier of the run"
    # The same can be drawn from what lies in the folder.
    again = {"log": lambda message: None, "out": str(tmp_path / "again")}
    plot.timelines(str(out), gt=ground_truth, **again)
    pictures = [(tmp_path / "again" / f"toy_0000{i}.png").read_bytes() for i in (4, 5)]
    assert pictures == [(out / f"toy_0000{i}.png").read_bytes() for i in (4, 5)]
    plot.timelines(str(out), ["toy_00004"], **again)
    assert (tmp_path / "again/toy_00004.png").read_bytes() != pictures[0]


def test_files_of_one_name_and_later_starts_add_up(runs, toys, tmp_path):
    for folder, number in (("a", 4), ("b", 5)):
        os.makedirs(tmp_path / folder)
        shutil.copy(frames_of(toys, number), tmp_path / folder / "x.zip")
    options = ["--run", runs["plain"], "--out", tmp_path / "out", "--no-picture"]
    assert start(*options, tmp_path / "a/x.zip", tmp_path / "b/x.zip") == 0
    assert start(*options, tmp_path / "b/x.zip", frames_of(toys, 6)) == 0
    results = read_json(tmp_path / "out/result.json")["results"]
    expected = read_json(runs["plain"], "result.json")["results"]
    assert list(results) == ["x", "x-2", "toy_00006"]
    for detections, name in zip(results.values(), expected, strict=True):
        check_same(detections, expected[name])


def test_foreign_files_are_never_overwritten(runs, toys, tmp_path, capfd, monkeypatch):
    def run(command, cwd):
        process = Process(*command[1:], cwd=cwd, stdout=1, stderr=2)
        return subprocess.CompletedProcess(command, process.wait())

    monkeypatch.setattr(localize.subprocess, "run", run)
    video = frames_of(toys, 4)
    before = read_json(runs["plain"], "result.json")
    message = start("--run", runs["plain"], "--out", runs["plain"], video)
    assert "made by something else" in message
    assert read_json(runs["plain"], "result.json") == before
    assert start("--run", runs["plain"], "--out", tmp_path, "--no-picture", video) == 0
    message = start("--run", runs["sola"], "--out", tmp_path, "--no-picture", video)
    assert f"made by {runs['plain']}" in message
    (tmp_path / "toy_00004.png").write_text("a picture of my cat")
    capfd.readouterr()
    assert start("--run", runs["plain"], "--out", tmp_path, video) == 1
    printed = capfd.readouterr()
    assert "already exists, of another program" in printed.err
    assert printed.err.count("\n") == 1
    assert "pictures are missing" in printed.out
    assert (tmp_path / "toy_00004.png").read_text() == "a picture of my cat"


def test_runs_that_cannot_localize_are_refused(runs, tmp_path):
    run = tmp_path / "run"
    assert "name the folder of a run" in start("--run", run, "x.mp4")
    shutil.copytree(runs["plain"], run)
    os.remove(run / "pretrain/encoder.pt")
    assert "pretrain/encoder.pt" in start("--run", run, "x.mp4")
    os.remove(run / "head/head.pt")
    assert "is not finished: no" in start("--run", run, "x.mp4")
    cfg = read_json(run, "config.json")
    shutil.copytree(runs["plain"], run, dirs_exist_ok=True)

    def change(**keys):
        save_json({**cfg, **keys}, f"{run}/config.json")
        return start("--run", run, "x.mp4")

    external = {**cfg["data"], "features": "data/tsp"}
    assert "features are from data/tsp" in change(data=external, stages=["head", "detect"])
    stages = ["features", "head", "detect"]
    pretrained = {**cfg["pretrain"], "pretrained": "nowhere.pt"}
    assert "nowhere.pt" in change(stages=stages, pretrain=pretrained)


def test_the_encoder_is_that_of_the_last_stage_before_features(runs, toys, tmp_path):
    run = shutil.copytree(runs["plain"], tmp_path / "run")
    cfg = read_json(run, "config.json")
    state = torch.load(run / "pretrain/encoder.pt", weights_only=True)
    for parameter in state["model"].values():
        parameter.zero_()
    (run / "lofi").mkdir()
    torch.save(state, run / "lofi/encoder.pt")
    torch.save(state, tmp_path / "zeros.pt")
    pretrained = {**cfg["pretrain"], "pretrained": f"{tmp_path}/zeros.pt"}
    for stages, zeros in (
        (["pretrain", "lofi", "features"], True),
        (["pretrain", "features"], False),
        (["lofi", "features"], True),
        (["features"], True),
    ):
        save_json({**cfg, "stages": stages, "pretrain": pretrained}, f"{run}/config.json")
        encoder = localize.load(run, "cpu").encoder
        assert (not encoder.conv1.weight.any()) == zeros


def test_pictures_are_optional(runs, toys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ["--run", runs["plain"], "--out", tmp_path, frames_of(toys, 4)]
    assert "pip install matplotlib" in start(*words)
    assert start(*words, "--no-picture") == 0


def test_a_folder_of_frames_needs_a_frame_rate(model, tmp_path):
    from torchcodec.encoders import JpegEncoder

    for i in range(8):
        frame = torch.full((3, 20, 20), 30 * i, dtype=torch.uint8)
        jpeg = JpegEncoder(frame).to_tensor(quality=90).numpy().tobytes()
        (tmp_path / f"img_{i + 1:05d}.jpg").write_bytes(jpeg)
    with pytest.raises(InputError, match="no frame rate"):
        localize.localize(model, tmp_path)
    (tmp_path / "video.json").write_text('{"fps": 4, "duration_sec": 2.0}')
    detections = localize.localize(model, tmp_path)
    assert detections
    assert max(d["segment"][1] for d in detections) <= 2


def test_memory_errors_name_the_option_and_others_stay(model, toys, monkeypatch):
    path = frames_of(toys, 4)
    for error, expected in (
        (torch.OutOfMemoryError("CUDA"), (InputError, "--chunk-snippets")),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), (InputError, "--chunk")),
        (RuntimeError("sizes differ"), (RuntimeError, "sizes differ")),
    ):

        def fail(*args, error=error):
            raise error

        monkeypatch.setattr(localize, "encode_video", fail)
        with pytest.raises(expected[0], match=expected[1]):
            localize.localize(model, path)


def test_table():
    detections = [
        {"label": "jump", "score": 0.71, "segment": [3.5, 118.25]},
        {"label": "a b", "score": 0.0005, "segment": [0, 4]},
        {"label": "jump", "score": 0.00002, "segment": [0, 2]},
    ]
    lines = localize.table(detections).splitlines()
    assert lines == [
        "| class |  score | start (s) | end (s) |",
        "|-------|-------:|----------:|--------:|",
        "| jump  |   0.71 |      3.50 |  118.25 |",
        "| a b   | 0.0005 |      0.00 |    4.00 |",
    ]
    assert localize.table(detections[2:]) == "no detection scores 0.0001 or more"


def test_a_damaged_result_is_named(runs, toys, tmp_path):
    options = ["--run", runs["plain"], "--out", tmp_path, "--no-picture", frames_of(toys, 4)]
    ours = {"run": os.path.abspath(runs["plain"]), "videos": 5}
    for content in ([], {}, {"results": {}, "external_data": ours}, {"results": 5}):
        (tmp_path / "result.json").write_text(json.dumps(content))
        assert "result.json" in start(*options)
