"""Pictures are tested by what is in them, and by the renderer's bounding boxes."""

import json
import os
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import Process

from config import INPUT_ERRORS
from media import InputError
from tools import plot

matplotlib = pytest.importorskip("matplotlib")

CLASSES = ["Putting in contact lenses", "x" * 70, "price $5_a^2$", "jump", "Removing ice from car"]
CLASS_SOURCE = "video classifier of the run"


class Clip:
    """A video of noise, as media.open_media returns one."""

    num_frames = 50
    duration = 10.0

    def __init__(self, h=30, w=40):
        generator = torch.Generator().manual_seed(0)
        size = (self.num_frames, 3, h, w)
        self.frames = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)

    def read(self, numbers, short_side=None):
        return self.frames[torch.as_tensor(numbers)]


def make_detections(count, duration, seed=0, classes=CLASSES):
    rng = np.random.default_rng(seed)
    start = rng.random(count) * duration
    end = np.minimum(start + rng.choice([0.001, 0.02, 0.3], count) * duration, duration)
    labels = [classes[i] for i in rng.integers(len(classes), size=count)]
    scores = (rng.random(count) ** 4).tolist()
    segments = np.stack([start, end], 1).tolist()
    return [
        {"label": label, "score": score, "segment": segment}
        for label, score, segment in zip(labels, scores, segments, strict=True)
    ]


def make_truth(count, duration, **options):
    entries = make_detections(count, duration, **options)
    return [{"label": entry["label"], "segment": entry["segment"]} for entry in entries]


def drawn_texts(figure, monkeypatch):
    """Return (text, bounding box in pixels) of all that is really drawn."""
    from matplotlib.backends.backend_agg import RendererAgg

    seen = {}
    original = RendererAgg.draw_text

    def draw_text(self, gc, x, y, s, prop, angle, ismath=False, mtext=None):
        seen[id(mtext)] = mtext
        return original(self, gc, x, y, s, prop, angle, ismath, mtext)

    with monkeypatch.context() as patch:
        patch.setattr(RendererAgg, "draw_text", draw_text)
        figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    texts = [text for text in seen.values() if text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in texts]


def overlap(a, b, slack=0.5):
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return width > slack and height > slack


def check_texts(figure, monkeypatch):
    texts = drawn_texts(figure, monkeypatch)
    for (a, box), (b, other) in combinations(texts, 2):
        assert not overlap(box, other), f"{a!r} lies on {b!r}"
    width, height = figure.get_size_inches() * figure.dpi
    for text, box in texts:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        assert inside, f"{text!r} leaves the picture"
    return texts


def find_bars(figure, gid):
    return [patch for axes in figure.axes for patch in axes.patches if patch.get_gid() == gid]


def starts(figure, gid, duration):
    return sorted(bar.get_x() * duration for bar in find_bars(figure, gid))


@pytest.mark.parametrize(
    "count, duration, num_truth, media",
    [
        (0, 10, 0, False),
        (1, 10, 0, False),
        (1, 0.1, 1, True),
        (10, 90.5, 3, True),
        (40, 10, 3, True),
        (40, 3725.4, 8, False),
    ],
)
def test_a_timeline_has_every_segment_and_nothing_overlaps(
    count, duration, num_truth, media, monkeypatch
):
    detections = make_detections(count, duration)
    truth = make_truth(num_truth, duration, seed=1)
    figure = plot.draw_timeline(
        detections,
        name="a video",
        duration=duration,
        truth=truth,
        media=Clip() if media else None,
        top=40,
        source=CLASS_SOURCE,
    )
    texts = check_texts(figure, monkeypatch)
    bars = find_bars(figure, "detection")
    assert len(bars) == count
    assert len(find_bars(figure, "truth")) == num_truth
    words = [text for text, _ in texts]
    assert "a video" in words
    assert ("no detections" in words) == (not count and not num_truth)
    for gid, entries in (("detection", detections), ("truth", truth)):
        expected = sorted(entry["segment"][0] for entry in entries)
        assert np.allclose(starts(figure, gid, duration), expected, atol=1e-6 * duration)
    for a, b in combinations([bar.get_bbox() for bar in bars + find_bars(figure, "truth")], 2):
        assert not overlap(a, b, slack=1e-6)
    # Each score stands in or beside one bar, and on no other. The axis lies lower.
    numbers = [(text, box) for text, box in texts if text.strip("<").replace(".", "").isdigit()]
    scores = [(text, box) for text, box in numbers if box.y0 > 0.5 * figure.dpi]
    extents = [bar.get_window_extent(figure.canvas.get_renderer()) for bar in bars]
    assert len(scores) == count
    for text, box in scores:
        touched = [extent for extent in extents if overlap(box, extent)]
        assert len(touched) <= 1
        inside = all(extent.x0 <= box.x0 and box.x1 <= extent.x1 for extent in touched)
        assert inside, f"score {text} half on a bar"


def test_bars_show_class_and_score_best_first(monkeypatch):
    detections = [
        {"label": "b", "score": 0.2, "segment": [0, 5]},
        {"label": "a", "score": 0.9, "segment": [1, 6]},
        {"label": "b", "score": 0.004, "segment": [2, 9]},
        {"label": "a", "score": 0.0001, "segment": [8, 9]},
    ]
    source = "ground truth (analysis)"
    figure = plot.draw_timeline(detections, name="v", duration=10, top=3, source=source)
    texts = dict(check_texts(figure, monkeypatch))
    subtitle = "best 3 of 4 detections, video of 10 s, classes from: ground truth (analysis)"
    assert {"a", "b", "0.90", "0.20", "0.004", subtitle} <= texts.keys()
    # The class of the best detection stands on top, and it has the stronger colour.
    assert texts["a"].y0 > texts["b"].y0
    darkness = {b.get_x(): min(b.get_facecolor()[:3]) for b in find_bars(figure, "detection")}
    assert darkness[0.1] < darkness[0.0]
    everything = plot.draw_timeline(detections, name="v", duration=10)
    assert "<0.001" in dict(drawn_texts(everything, monkeypatch))
    assert len(find_bars(everything, "detection")) == 4


def test_names_are_shown_as_they_are(monkeypatch):
    detections = make_detections(5, 10, classes=["$x_1$"])
    figure = plot.draw_timeline(detections, name="$a^2$ " + "very long " * 40, duration=10)
    texts = [text for text, _ in check_texts(figure, monkeypatch)]
    assert "$x_1$" in texts
    title = next(text for text in texts if text.startswith("$a^2$ very"))
    assert "…" in title and title.endswith("long ")


def make_font(path, letters):
    """Write a font in which each of these letters is one wide bar."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 200), (4000, 200), (4000, 0)):
        pen.lineTo(corner)
    pen.closePath()
    names = [".notdef", *(f"u{ord(letter):X}" for letter in letters)]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap(dict(zip(map(ord, letters), names[1:], strict=True)))
    font.setupGlyf(dict.fromkeys(names, pen.glyph()))
    font.setupHorizontalMetrics(dict.fromkeys(names, (4000, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Noto Sans CJK JP", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)


@pytest.mark.filterwarnings("error")
def test_letters_of_other_scripts_come_from_installed_fonts(tmp_path, capsys, monkeypatch):
    from matplotlib import font_manager

    make_font(tmp_path / "bars.ttf", "走る")
    manager = font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", [x for x in manager.ttflist if "CJK" not in x.name])

    def width_of_label():
        manager._findfont_cached.cache_clear()
        detections = [{"label": "走る", "score": 0.5, "segment": [1, 2]}]
        figure = plot.draw_timeline(detections, name="a", duration=10)
        plot.save(figure, f"{tmp_path}/x.png")
        return dict(check_texts(figure, monkeypatch))["走る"].width / figure.dpi

    assert width_of_label() < 0.4  # boxes
    manager.addfont(tmp_path / "bars.ttf")
    assert width_of_label() == pytest.approx(8 * 8 / 72, rel=0.05)  # two of 4 em, 8 point
    plot.draw_timeline([{"label": "ουρά, кухня", "score": 1, "segment": [0, 1]}], name="a")
    assert capsys.readouterr().err == ""
    manager._findfont_cached.cache_clear()


def test_without_a_duration_the_latest_end_counts():
    detections = [{"label": "a", "score": 1.0, "segment": [2, 4]}]
    truth = [{"label": "a", "segment": [6, 8]}]
    figure = plot.draw_timeline(detections, name="v", truth=truth)
    assert starts(figure, "detection", 1) == [pytest.approx(0.25)]
    assert starts(figure, "truth", 1) == [pytest.approx(0.75)]


def test_lanes_against_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(30):
        start = rng.integers(0, 30, 12)
        end = start + rng.integers(1, 9, 12)
        intervals = list(zip(start.tolist(), end.tolist(), strict=True))
        lanes = plot.assign_lanes(intervals)
        for i, (a, b) in enumerate(intervals):
            seconds = set(range(a, b))
            taken = {lanes[j] for j in range(i) if seconds & set(range(*intervals[j]))}
            assert lanes[i] == min(set(range(13)) - taken)


@pytest.mark.parametrize(
    "seconds, longest, text",
    [
        (8.5, 16, "8.5"),
        (0.05, 0.1, "0.05"),
        (8, 120, "0:00:08"),
        (754, 3600, "0:12:34"),
        (36000, 40000, "10:00:00"),
    ],
)
def test_format_time(seconds, longest, text):
    assert plot.format_time(seconds, longest) == text


@pytest.mark.parametrize(
    "duration", [0.04, 0.1, 1, 16, 39.3, 119, 121, 750, 3599, 3601, 7000, 30000, 1e6]
)
def test_ticks_are_few_and_within_the_video(duration):
    ticks = plot.tick_times(duration)
    assert ticks[0] == 0 and ticks[-1] <= duration
    assert 2 <= len(ticks) <= 11


def test_thumbnails_cover_the_video_and_keep_their_shape():
    clip = Clip()
    clip.frames = torch.arange(50, dtype=torch.uint8)[:, None, None, None].expand(50, 3, 160, 213)
    strip = plot.thumbnails(clip, 9.6)
    assert strip.shape == (10, 160, 213, 3)
    assert strip[:, 0, 0, 0].tolist() == [2, 7, 12, 17, 22, 27, 32, 37, 42, 47]
    # Portrait and panorama.
    assert plot.thumbnails(Clip(90, 30), 9.6).shape == (24, 90, 30, 3)
    assert plot.thumbnails(Clip(20, 300), 9.6).shape == (5, 20, 300, 3)


# ------------------------------------------------------------------------------ the other pictures


def map_row(name, seeds=1, class_source=CLASS_SOURCE):
    return {
        "name": name,
        "mAP": {"0.95": 0.05, "0.5": 0.8, "0.75": 0.6},
        "average": 0.5,
        "seeds": seeds,
        "std": {"average": 0.02} if seeds > 1 else None,
        "evaluated_videos": 160,
        "ground_truth_videos": 160,
        "class_source": class_source,
    }


@pytest.mark.parametrize(
    "rows",
    [
        [map_row("LoFi")],
        [map_row(f"run {i} $x$", seeds=3) for i in range(12)],
        [map_row("a"), map_row("b", class_source="external file x.json")],
    ],
)
def test_map_against_tiou(rows, monkeypatch):
    figure = plot.draw_map(rows)
    texts = [text for text, _ in check_texts(figure, monkeypatch)]
    lines = figure.axes[0].lines
    assert len(lines) == len(rows)
    for line in lines:
        assert np.allclose(line.get_xydata(), [(0.5, 80), (0.75, 60), (0.95, 5)])
    assert sum("160 of 160 videos, classes from: " in text for text in texts) == len(rows)
    assert any("50.00 ± 2.00 %, mean of 3" in text for text in texts) == (rows[0]["seeds"] > 1)
    assert all(any(row["name"] in text for text in texts) for row in rows)


def make_records(epochs, *keys, fidelities=("full",), **scale):
    records = []
    for epoch in range(1, epochs + 1):
        record = {"epoch": epoch, "fidelity": fidelities[(epoch - 1) % len(fidelities)]}
        record |= {"lr": 0.1 / epoch, "seconds": 2.0, "videos_per_sec": 3.0, "peak_memory_gb": 1.0}
        records.append(record | {key: scale.get(key, 1.0) / epoch for key in keys})
    return records


LOFI_KEYS = ("loss", "node", "regression", "classification", "class", "gradient_norm")
STAGES = {
    "pretrain/acp": make_records(6, "loss", "accuracy"),
    "lofi": make_records(24, *LOFI_KEYS, fidelities=("S", "T", "ST"), regression=0.01),
    "sola": make_records(15, "loss", "floor", "spread", "gate", gate=-0.1),
    "head": make_records(1, "loss", "node"),
}


@pytest.mark.parametrize("names", [list(STAGES), ["head"], ["pretrain/acp", "head"]])
def test_losses_learning_rate_and_fidelity(names, monkeypatch):
    stages = {name: STAGES[name] for name in names}
    figure = plot.draw_losses(stages, "a run")
    texts = {text for text, _ in check_texts(figure, monkeypatch)}
    panels = {axes.get_gid(): axes for axes in figure.axes}
    for stage, records in stages.items():
        lines = {line.get_label(): line for line in panels[f"{stage} loss"].lines}
        expected = [[record["epoch"], record["loss"]] for record in records]
        assert lines["loss"].get_xydata().tolist() == expected
        rates = panels[f"{stage} lr"].lines[0].get_ydata().tolist()
        assert rates == [record["lr"] for record in records]
    if "lofi" in stages:
        assert {"fidelity S", "fidelity T", "fidelity ST"} <= texts
        assert {"pretrain/acp (fidelity: full)", "top-1 accuracy (%)"} <= texts
        bands = panels["lofi loss"].collections
        assert [len(band.get_paths()) for band in bands] == [8, 8, 8]
        assert bands[1].get_paths()[0].get_extents().intervalx.tolist() == [1.5, 2.5]
        assert panels["pretrain/acp accuracy"].lines[0].get_ydata()[0] == 100
        assert panels["lofi loss"].get_yscale() == "log"
        assert panels["sola loss"].get_yscale() == "linear"
        assert len(panels["sola gate"].lines) == 1


def test_a_cycle_by_batches_is_named_not_drawn_as_bands(monkeypatch):
    figure = plot.draw_losses({"lofi": make_records(3, "loss", fidelities=("cycle",))}, "x")
    assert not figure.axes[0].collections
    assert "lofi (fidelity: cycle)" in dict(drawn_texts(figure, monkeypatch))


@pytest.mark.parametrize("num_videos, L", [(1, 32), (2, 8), (3, 100), (4, 1)])
@pytest.mark.parametrize("marked", [False, True])
def test_similarity_maps_side_by_side(num_videos, L, marked, monkeypatch):
    rng = np.random.default_rng(0)
    before = rng.random((num_videos, L, L))
    after = rng.random((num_videos, L, L)) - 0.5
    truth = [np.array([[0.1, 0.4], [0.5, 1.0]])] * num_videos if marked else None
    names = ["a video of a rather long name"] * num_videos
    figure = plot.draw_similarity(names, before, after, truth)
    check_texts(figure, monkeypatch)
    images = [axes.images[0] for axes in figure.axes if axes.images]
    expected = np.stack([before, after], 1).reshape(-1, L, L)
    assert np.array_equal(np.stack([image.get_array() for image in images]), expected)
    # One scale, or they could not be compared.
    assert len({image.get_clim() for image in images}) == 1
    assert len(figure.axes[0].lines) == (4 if marked else 0)


# ------------------------------------------------------------------------------------------- files


def make_figure():
    return plot.draw_timeline(make_detections(3, 10), name="v", duration=10, media=Clip())


def test_a_picture_is_opaque_whole_and_the_same_each_time(tmp_path):
    from matplotlib.image import imread

    a, b = tmp_path / "new/a.png", tmp_path / "b.png"
    plot.save(make_figure(), str(a))
    plot.save(make_figure(), str(b))
    assert a.read_bytes() == b.read_bytes()
    # White ground and dark text, of which nothing shines through in a dark viewer.
    pixels = imread(a)
    assert pixels.shape[-1] == 3 or (pixels[..., 3] == 1).all()
    assert (pixels[:3, :, :3] == 1).all()
    assert pixels[..., :3].min() < 0.2
    assert os.listdir(tmp_path / "new") == ["a.png"]


def test_only_our_own_pictures_are_replaced(tmp_path):
    foreign, ours = tmp_path / "foreign.png", tmp_path / "ours.png"
    foreign.write_bytes(b"\x89PNG of another program")
    (tmp_path / "folder.png").mkdir()
    for path in (foreign, tmp_path / "folder.png"):
        with pytest.raises(INPUT_ERRORS, match="already exists, of another program"):
            plot.save(make_figure(), str(path))
    assert foreign.read_bytes() == b"\x89PNG of another program"
    plot.save(make_figure(), str(ours))
    before = ours.read_bytes()
    plot.save(plot.draw_timeline([], name="v"), str(ours))
    assert ours.read_bytes() != before
    with pytest.raises(InputError, match=r"ends in \.png"):
        plot.save(make_figure(), str(tmp_path / "a.jpg"))
    assert sorted(os.listdir(tmp_path)) == ["folder.png", "foreign.png", "ours.png"]


def test_the_users_style_does_not_matter_and_stays(tmp_path):
    plot.save(make_figure(), str(tmp_path / "a.png"))
    style = {"axes.facecolor": "black", "savefig.transparent": True, "savefig.bbox": "tight"}
    with matplotlib.rc_context(style | {"font.size": 30}):
        before = dict(matplotlib.rcParams)
        plot.save(make_figure(), str(tmp_path / "b.png"))
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_no_display_and_no_pyplot():
    code = (
        "import sys; from tools import plot; plot.draw_timeline([], name='v').canvas.draw(); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    hidden = ("DISPLAY", "MPLBACKEND")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    assert Process("-c", code, env=environment).wait() == 0


def test_without_matplotlib_the_error_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        plot.draw_timeline([], name="v")


@pytest.fixture
def run(tmp_path):
    """Return a run's folder, as the stages leave it."""
    folder = tmp_path / "run"
    for stage, records in STAGES.items():
        (folder / stage).mkdir(parents=True)
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / stage / "metrics.jsonl").write_text(lines)
    names = [f"v{i}" for i in range(12)]
    maps = np.random.default_rng(0).random((5, 8, 8)).astype(np.float32)
    np.savez(folder / "sola/similarity.npz", names=np.array(names[:5]), raw=maps, sola=maps)
    results = {name: make_detections(12, 10, i) for i, name in enumerate(names)}
    result = {"results": results, "external_data": {"class_source": CLASS_SOURCE}}
    (folder / "result.json").write_text(json.dumps(result))
    metrics = {"mAP": {"0.5": 0.5, "0.75": 0.25, "0.95": 0.0}, "average_mAP": 0.25}
    metrics |= {"evaluated_videos": 3, "ground_truth_videos": 4}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    entry = {"subset": "validation", "duration": 10}
    entry["annotations"] = [{"segment": ["1", "2"], "label": "jump"}]
    database = {f"v_{name}": entry for name in names[:4]}
    (tmp_path / "gt.json").write_text(json.dumps({"database": database}))
    return str(folder)


def test_every_picture_of_a_run(run, tmp_path, capsys, monkeypatch):
    ground_truth = f"{tmp_path}/gt.json"
    plot.main(["losses", run])
    plot.main(["similarity", run, "--gt", ground_truth, "--video", "v3", "v4"])
    plot.main(["map", run, f"same={run}/metrics.json", "--out", f"{tmp_path}/map.png"])
    # Encoding takes the time.
    with monkeypatch.context() as patch:
        patch.setattr(plot, "save", lambda figure, path: Path(path).touch())
        plot.main(["timeline", run, "--gt", ground_truth])
    printed = capsys.readouterr().out
    assert "the first 10 of 12 videos" in printed
    assert "v9: not in" in printed and "v3: not in" not in printed
    expected = ["losses.png", "similarity.png", *(f"timeline_v{i}.png" for i in range(10))]
    assert sorted(os.listdir(f"{run}/pictures")) == sorted(expected)
    assert os.path.getsize(tmp_path / "map.png") > 1000
    plot.main(["timeline", run, "--video=v11", "--video=v10", "--out", f"{tmp_path}/mine"])
    assert sorted(os.listdir(tmp_path / "mine")) == ["v10.png", "v11.png"]


def test_the_stages_come_in_their_order(run):
    os.makedirs(f"{run}/pretrain/acp_plus")
    Path(f"{run}/pretrain/acp_plus/metrics.jsonl").write_text(json.dumps(STAGES["head"][0]))
    order = ["pretrain/acp", "pretrain/acp_plus", "lofi", "sola", "head"]
    assert list(plot.read_metrics(run)) == order


def test_the_ground_truth_of_a_renamed_video_is_found(tmp_path, capsys):
    """Its second name is x-2; the annotations know x."""
    entry = {"subset": "validation", "duration": 8, "annotations": []}
    (tmp_path / "gt.json").write_text(json.dumps({"database": {"v_x": entry}}))
    videos = {"x-2": {"path": "/b/x.zip", "duration": 8.0}, "y": {"path": "/y", "duration": 8.0}}
    result = {"results": {"x-2": [], "y": []}, "external_data": {"videos": videos}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    plot.timelines(str(tmp_path), gt=f"{tmp_path}/gt.json")
    printed = capsys.readouterr().out
    assert "y: not in" in printed and "x-2: not in" not in printed


@pytest.mark.parametrize(
    "words, message",
    [
        (["timeline", "{run}", "--video", "v99"], "no video 'v99'; it has 12: v0, v1, v2"),
        (["timeline", "{tmp}"], r"result\.json"),
        (["losses", "{tmp}"], r"no metrics\.jsonl"),
        (["similarity", "{tmp}"], r"tools\.probe_sola"),
        (["similarity", "{run}", "--video", "x"], "no video 'x'"),
        (["timeline", "{run}", "--gt", "{run}/metrics.json"], "annotation"),
        (["map", "{tmp}/none", "--out", "{tmp}/m.png"], "none"),
        (["losses", "{run}", "--out", "{tmp}/gt.json"], r"ends in \.png"),
    ],
)
def test_what_cannot_be_drawn_is_explained(run, tmp_path, words, message):
    with pytest.raises(SystemExit, match=message) as error:
        plot.main([word.format(run=run, tmp=tmp_path) for word in words])
    assert str(error.value).count("\n") <= 1
    assert not list(tmp_path.glob("*.png"))


def test_files_of_the_wrong_kind(run):
    path = Path(run, "result.json")
    path.write_text(json.dumps({"results": {"v": [{"score": 1, "segment": [0, 1]}]}}))
    with pytest.raises(INPUT_ERRORS, match="expected label"):
        plot.timelines(run)
    path.write_text("[]")
    with pytest.raises(INPUT_ERRORS, match="results"):
        plot.timelines(run)
    Path(run, "head/metrics.jsonl").write_text('{"epoch": 1, "lo')
    with pytest.raises(InputError, match="JSON object on each line"):
        plot.read_metrics(run)


@pytest.mark.parametrize(
    "record",
    [
        '{"loss": 1}',
        '{"epoch": [1]}',
        '{"epoch": 1, "loss": "nan"}',
        '{"epoch": 1, "fidelity": ["S"]}',
        '{"epoch": 1e300, "loss": 1}',
        "5",
        "[" * 99999,
    ],
)
def test_losses_of_other_kinds_are_refused(run, record):
    Path(run, "head/metrics.jsonl").write_text(record)
    with pytest.raises(InputError, match="JSON object on each line, of numbers"):
        plot.read_metrics(run)


def test_damaged_similarity_maps_are_refused(run):
    path = Path(run, "sola/similarity.npz")
    whole = path.read_bytes()
    short = {"names": np.array(["v0", "v1"]), "raw": np.zeros((1, 4, 4)), "sola": np.zeros((1, 4))}
    for content in (b"", whole[:-50], whole[:100] + bytes(50) + whole[150:], None):
        if content is None:
            np.savez(path, **short)
        else:
            path.write_bytes(content)
        with pytest.raises(InputError, match=r"similarity\.npz cannot be read"):
            plot.similarity(run)


@pytest.mark.beside
def test_numbers_as_text_and_letters_of_no_font_are_drawn(run):
    entry = {"label": "jump \ud800", "score": "0.5", "segment": ["1.5", 2]}
    result = {"results": {"v0": [entry]}, "external_data": {"class_source": "x" * 10**4}}
    Path(run, "result.json").write_text(json.dumps(result))
    plot.timelines(run, log=lambda line: None)


def test_names_that_no_file_can_have_are_refused_or_replaced(run):
    for name in ("a\0b", "v\ud800"):
        results = {name: [{"label": "jump", "score": 0.5, "segment": [1, 2]}]}
        Path(run, "result.json").write_text(json.dumps({"results": results}))
        if name == "a\0b":
            plot.timelines(run, log=lambda line: None)
            assert Path(run, "pictures/timeline_a_b.png").exists()
        else:
            with pytest.raises(INPUT_ERRORS, match="cannot be written"):
                plot.timelines(run, log=lambda line: None)
