"""Pictures are tested by what is in them, and by the renderer's bounding boxes; whether they are beautiful is for the eye."""
import json
import os
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.backends.backend_agg import RendererAgg  # noqa: E402

import plots  # noqa: E402

CLASSES = ["Putting in contact lenses", "x" * 70, "price $5_a^2$", "jump", "Removing ice from car"]


class Clip:
    """A video of noise, as media.open_media returns one."""
    num_frames, fps, duration, note, path = 50, 5.0, 10.0, None, "noise"

    def __init__(self, h=30, w=40):
        self.frames = torch.randint(0, 256, (self.num_frames, h, w, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def read(self, numbers, short_side=None, view=None):
        return torch.stack([torch.from_numpy(view(self.frames[n].numpy())) for n in numbers]).permute(0, 3, 1, 2)


def some(count, duration, seed=0, classes=CLASSES):
    rng = np.random.default_rng(seed)
    start = rng.random(count) * duration
    end = np.minimum(start + rng.choice([0.001, 0.02, 0.3], count) * duration, duration)
    return [{"label": classes[rng.integers(len(classes))], "score": float(s), "segment": [float(a), float(b)]} for a, b, s in zip(start, end, rng.random(count)**4)]


def drawn_texts(figure, monkeypatch):
    """(text, bounding box in pixels) of all that is really drawn."""
    seen, own = {}, RendererAgg.draw_text

    def draw_text(self, gc, x, y, s, prop, angle, ismath=False, mtext=None):
        seen[id(mtext)] = mtext
        return own(self, gc, x, y, s, prop, angle, ismath, mtext)
    with monkeypatch.context() as m:
        m.setattr(RendererAgg, "draw_text", draw_text)
        figure.canvas.draw()
    return [(t.get_text(), t.get_window_extent(figure.canvas.get_renderer())) for t in seen.values() if t.get_text().strip()]


def overlap(a, b, slack=0.5):
    return min(a.x1, b.x1) - max(a.x0, b.x0) > slack and min(a.y1, b.y1) - max(a.y0, b.y0) > slack


def check_texts(figure, monkeypatch):
    texts = drawn_texts(figure, monkeypatch)
    for (a, box), (b, other) in combinations(texts, 2):
        assert not overlap(box, other), f"{a!r} lies on {b!r}"
    width, height = figure.get_size_inches() * figure.dpi
    for text, box in texts:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, f"{text!r} leaves the picture"
    return texts


def bars(figure, gid):
    return [p for axes in figure.axes for p in axes.patches if p.get_gid() == gid]


@pytest.mark.parametrize("count, duration, truth, media", [(0, 10, 0, False), (1, 10, 0, False), (1, 0.1, 1, True), (10, 90.5, 3, True), (40, 10, 3, True), (40, 3725.4, 8, False)])
def test_a_timeline_has_every_segment_and_nothing_overlaps(count, duration, truth, media, monkeypatch):
    found, true = some(count, duration), some(truth, duration, 1)
    figure = plots.draw_timeline(found, name="a video", duration=duration, truth=true, media=Clip() if media else None, top=40, source="video classifier of the run")
    texts = check_texts(figure, monkeypatch)
    assert len(bars(figure, "detection")) == count and len(bars(figure, "truth")) == truth
    said = [text for text, _ in texts]
    assert sum(s in said for s in ("a video", "no detections")) == 1 + (not count and not truth)
    inner = next(a for a in figure.axes if a.get_gid() == "timeline").get_xlim()[1]
    for gid, entries in (("detection", found), ("truth", true)):  # bars are in inches from the left
        starts = sorted(p.get_x() / inner * duration for p in bars(figure, gid))
        assert np.allclose(starts, sorted(d["segment"][0] for d in entries), atol=1e-6 * duration)
    boxes = [(p.get_x(), p.get_x() + p.get_width(), p.get_y(), p.get_y() + p.get_height()) for p in bars(figure, "detection") + bars(figure, "truth")]
    for a, b in combinations(boxes, 2):
        assert not (min(a[1], b[1]) - max(a[0], b[0]) > 1e-6 and min(a[3], b[3]) - max(a[2], b[2]) > 1e-6)
    scores = [(text, box) for text, box in texts if text.replace("<", "").replace(".", "").isdigit() and box.y0 > 0.5 * figure.dpi]  # not the axis
    if count:  # each score stands in or beside one bar, and on no other
        extents = [p.get_window_extent(figure.canvas.get_renderer()) for p in bars(figure, "detection")]
        assert len(scores) == count
        for text, box in scores:
            touched = [e for e in extents if overlap(box, e)]
            assert len(touched) <= 1 and all(e.x0 <= box.x0 and box.x1 <= e.x1 for e in touched), f"score {text} half on a bar"


def test_bars_say_class_and_score_best_first(monkeypatch):
    found = [{"label": "b", "score": 0.2, "segment": [0, 5]}, {"label": "a", "score": 0.9, "segment": [1, 6]}, {"label": "b", "score": 0.004, "segment": [2, 9]},
             {"label": "a", "score": 0.0001, "segment": [8, 9]}]
    figure = plots.draw_timeline(found, name="v", duration=10, top=3, source="ground truth (analysis)")
    texts = dict(check_texts(figure, monkeypatch))
    assert {"a", "b", "0.90", "0.20", "0.004", "best 3 of 4 detections, video of 10 s, classes from: ground truth (analysis)"} <= texts.keys()
    assert texts["a"].y0 > texts["b"].y0  # the class of the best detection on top
    by_start = {round(p.get_x(), 3): p for p in bars(figure, "detection")}
    strong, weak = (p.get_facecolor() for _, p in sorted(by_start.items(), key=lambda item: item[0])[1::-1])  # starts 1 and 0: scores 0.9 and 0.2
    assert min(strong[:3]) < min(weak[:3])  # the better, the stronger
    everything = plots.draw_timeline(found, name="v", duration=10)
    assert "<0.001" in dict(drawn_texts(everything, monkeypatch)) and len(bars(everything, "detection")) == 4


def test_names_are_shown_as_they_are(monkeypatch):
    figure = plots.draw_timeline(some(5, 10, classes=["$x_1$"]), name="$a^2$ " + "very long " * 40, duration=10)
    texts = [t for t, _ in check_texts(figure, monkeypatch)]
    assert "$x_1$" in texts and any(t.startswith("$a^2$ very") and "…" in t and t.endswith("long ") for t in texts)


def test_without_a_duration_the_latest_end_counts():
    figure = plots.draw_timeline([{"label": "a", "score": 1.0, "segment": [2, 4]}], name="v", truth=[{"label": "a", "segment": [6, 8]}])
    axes = next(a for a in figure.axes if a.get_gid() == "timeline")
    assert [b.get_x() / axes.get_xlim()[1] for b in bars(figure, "detection")] == [pytest.approx(0.25)]
    assert bars(figure, "truth")[0].get_x() / axes.get_xlim()[1] == pytest.approx(0.75)


def test_packing_against_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(30):
        intervals = [(a, a + w) for a, w in zip(rng.integers(0, 30, 12).tolist(), rng.integers(1, 9, 12).tolist())]
        lanes = plots.pack(intervals)
        for i, (a, b) in enumerate(intervals):
            free = [k for k in range(13) if all(lanes[j] != k or not set(range(a, b)) & set(range(*intervals[j])) for j in range(i))]
            assert lanes[i] == free[0]


@pytest.mark.parametrize("seconds, longest, text", [(8.5, 16, "8.5"), (0.05, 0.1, "0.05"), (8, 120, "0:08"), (754, 800, "12:34"), (754, 3600, "0:12:34"), (36000, 40000, "10:00:00")])
def test_clock(seconds, longest, text):
    assert plots.clock(seconds, longest) == text


@pytest.mark.parametrize("duration", [0.04, 0.1, 1, 16, 39.3, 119, 121, 750, 3599, 3601, 7000, 30000, 1e6])
def test_ticks_are_few_and_within_the_video(duration):
    ticks = plots._ticks(duration)
    assert ticks[0] == 0 and ticks[-1] <= duration and 2 <= len(ticks) <= 11


def test_thumbnails_cover_the_video_and_keep_their_shape():
    clip = Clip(300, 400)
    clip.frames = torch.arange(50, dtype=torch.uint8)[:, None, None, None].expand(50, 300, 400, 3)
    strip = plots.thumbnails(clip, 9.6)
    assert strip.shape == (10, 160, 213, 3)
    assert strip[:, 0, 0, 0].tolist() == [2, 7, 12, 17, 22, 27, 32, 37, 42, 47]
    assert plots.thumbnails(Clip(90, 30), 9.6).shape == (24, 90, 30, 3)  # portrait
    assert plots.thumbnails(Clip(20, 300), 9.6).shape == (5, 20, 300, 3)


# ---------------------------------------------------------------- the other pictures

def row(name, seeds=1, average=0.5, **more):
    return {"name": name, "mAP": {"0.95": 0.05, "0.5": 0.8, "0.75": 0.6}, "average": average, "seeds": seeds, "std": {"average": 0.02} if seeds > 1 else None,
            "evaluated_videos": 160, "ground_truth_videos": 160, "class_source": "video classifier of the run"} | more


@pytest.mark.parametrize("rows", [[row("LoFi")], [row(f"run {i} $x$", seeds=3) for i in range(12)], [row("a"), row("b", class_source="external file x.json")]])
def test_map_against_tiou(rows, monkeypatch):
    figure = plots.draw_map(rows)
    texts = [t for t, _ in check_texts(figure, monkeypatch)]
    lines = figure.axes[0].lines
    assert len(lines) == len(rows) and all(np.allclose(line.get_xydata(), [(0.5, 80), (0.75, 60), (0.95, 5)]) for line in lines)
    assert sum("160 of 160 videos" in t for t in texts) == (1 if len({str(r["class_source"]) for r in rows}) == 1 else len(rows))  # said once if it is shared
    assert any("50.00 ± 2.00 %" in t for t in texts) == (rows[0]["seeds"] > 1)


def records(epochs, *keys, cycle=("full",), **scale):
    return [{"epoch": e, "fidelity": cycle[(e - 1) % len(cycle)], "lr": 0.1 / e, **{k: scale.get(k, 1.0) / e for k in keys}, "seconds": 2.0, "videos_per_sec": 3.0,
             "peak_memory_gb": 1.0} for e in range(1, epochs + 1)]


STAGES = {"pretrain/acp": records(6, "loss", "accuracy"), "lofi": records(24, "loss", "node", "regression", "classification", "class", "gradient_norm",
          cycle=("S", "T", "ST"), regression=0.01), "sola": records(15, "loss", "floor", "spread", "gate", gate=-0.1), "head": records(1, "loss", "node")}


@pytest.mark.parametrize("stages", [STAGES, {"head": STAGES["head"]}, {"pretrain/acp": STAGES["pretrain/acp"], "head": STAGES["head"]}])
def test_losses_learning_rate_and_fidelity(stages, monkeypatch):
    figure = plots.draw_losses(stages, "a run")
    texts = [t for t, _ in check_texts(figure, monkeypatch)]
    panels = {a.get_gid(): a for a in figure.axes}
    for stage, of in stages.items():
        line = next(line for line in panels[f"{stage} loss"].lines if line.get_label() == "loss")
        assert line.get_xydata().tolist() == [[r["epoch"], r["loss"]] for r in of]
        assert panels[f"{stage} lr"].lines[0].get_ydata().tolist() == [r["lr"] for r in of]
    if "lofi" in stages:
        assert {"fidelity S", "fidelity T", "fidelity ST", "pretrain/acp (fidelity: full)", "top-1 accuracy (%)"} <= set(texts)
        assert len(panels["lofi loss"].patches) == 24  # a band an epoch
        assert panels["pretrain/acp accuracy"].lines[0].get_ydata()[0] == 100
        assert panels["lofi loss"].get_yscale() == "log" and panels["sola loss"].get_yscale() == "linear"
        assert len(panels["sola gate"].lines) == 1


def test_a_short_cycle_is_named_not_drawn_as_bands(tmp_path):
    (tmp_path / "lofi").mkdir()
    (tmp_path / "lofi/metrics.jsonl").write_text("\n".join(json.dumps(r) for r in records(3, "loss", cycle=("S", "T"))))
    (tmp_path / "config.json").write_text(json.dumps({"lofi": {"order": "short", "cycle": ["S", "T"]}}))
    stages = plots.read_metrics(str(tmp_path))
    assert {r["fidelity"] for r in stages["lofi"]} == {"S, T by batches"}
    assert not plots.draw_losses(stages, "x").axes[0].patches


@pytest.mark.parametrize("videos, L", [(1, 32), (2, 8), (3, 100), (4, 1)])
@pytest.mark.parametrize("marked", [False, True])
def test_similarity_maps_side_by_side(videos, L, marked, monkeypatch):
    rng = np.random.default_rng(0)
    raw, sola = rng.random((videos, L, L)), rng.random((videos, L, L)) - 0.5
    truth = [np.array([[0.1, 0.4], [0.5, 1.0]])] * videos if marked else None
    names = ["a video of a rather long name"] * videos
    figure = plots.draw_similarity(names, raw, sola, truth)
    check_texts(figure, monkeypatch)
    images = [a.images[0] for a in figure.axes if a.images]
    assert [np.array_equal(im.get_array(), x) for im, x in zip(images, (x for pair in zip(raw, sola) for x in pair))] == [True] * 2 * videos
    assert len({im.get_clim() for im in images}) == 1  # one scale, or they could not be compared
    assert len(figure.axes[0].lines) == (4 if marked else 0)


def test_similarity_maps_of_odd_shapes_are_refused():
    with pytest.raises(ValueError, match="expected .V, L, L. twice"):
        plots.draw_similarity(["a"], np.zeros((1, 4, 4)), np.zeros((1, 5, 5)))


# ---------------------------------------------------------------- files

def figure():
    return plots.draw_timeline(some(3, 10), name="v", duration=10, media=Clip())


def test_a_picture_is_opaque_whole_and_the_same_each_time(tmp_path):
    from matplotlib.image import imread
    a, b = str(tmp_path / "new/a.png"), str(tmp_path / "b.png")
    plots.save(figure(), a)
    plots.save(figure(), b)
    assert open(a, "rb").read() == open(b, "rb").read()
    pixels = imread(a)  # in a dark viewer nothing shines through, and the text is dark on white
    assert (pixels[..., -1] == 1).all() if pixels.shape[-1] == 4 else True
    assert (pixels[:3, :, :3] == 1).all() and pixels[..., :3].min() < 0.2
    assert os.listdir(tmp_path / "new") == ["a.png"]


def test_only_our_own_pictures_are_replaced(tmp_path):
    theirs, ours = tmp_path / "theirs.png", tmp_path / "ours.png"
    theirs.write_bytes(b"\x89PNG somebody else's")
    for path in (theirs, tmp_path):
        with pytest.raises(ValueError, match="no picture of this program|ends in .png"):
            plots.save(figure(), str(path))
    assert theirs.read_bytes() == b"\x89PNG somebody else's"
    plots.save(figure(), str(ours))
    before = ours.read_bytes()
    plots.save(plots.draw_timeline([], name="v"), str(ours))
    assert ours.read_bytes() != before and plots.is_ours(str(ours)) and not plots.is_ours(str(theirs))
    with pytest.raises(ValueError, match="ends in .png"):
        plots.save(figure(), str(tmp_path / "a.jpg"))
    assert sorted(os.listdir(tmp_path)) == ["ours.png", "theirs.png"]


def test_the_users_style_does_not_matter_and_stays(tmp_path):
    plots.save(figure(), str(tmp_path / "a.png"))
    with matplotlib.rc_context({"axes.facecolor": "black", "savefig.transparent": True, "font.size": 30, "savefig.bbox": "tight"}):
        before = dict(matplotlib.rcParams)
        plots.save(figure(), str(tmp_path / "b.png"))
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_no_display_and_no_pyplot():
    code = "import sys, plots; plots.draw_timeline([], name='v').canvas.draw(); sys.exit('matplotlib.pyplot' in sys.modules)"
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")}
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=os.path.dirname(plots.__file__)).returncode == 0


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plots.draw_timeline([], name="v")


@pytest.fixture
def run(tmp_path):
    """A run's folder, as the stages leave it."""
    folder = tmp_path / "run"
    for stage, of in STAGES.items():
        (folder / stage).mkdir(parents=True)
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in of))
    maps = np.random.default_rng(0).random((5, 8, 8)).astype(np.float32)
    np.savez(folder / "sola/similarity.npz", names=np.array([f"v{i}" for i in range(5)]), raw=maps, sola=maps)
    results = {f"v{i}": some(12, 10, i) for i in range(12)}
    (folder / "result.json").write_text(json.dumps({"results": results, "external_data": {"class_source": "video classifier of the run"}}))
    (folder / "metrics.json").write_text(json.dumps({"mAP": {"0.5": 0.5, "0.75": 0.25, "0.95": 0.0}, "average_mAP": 0.25, "evaluated_videos": 3, "ground_truth_videos": 4}))
    database = {f"v_v{i}": {"subset": "validation", "duration": 10, "annotations": [{"segment": ["1", "2"], "label": "jump"}]} for i in range(4)}
    (tmp_path / "gt.json").write_text(json.dumps({"database": database}))
    return str(folder)


def test_every_picture_of_a_run(run, tmp_path, capsys, monkeypatch):
    plots.main(["losses", run])
    plots.main(["similarity", run, "--gt", f"{tmp_path}/gt.json", "--video", "v3", "v4"])
    plots.main(["map", run, f"same={run}", "--out", f"{tmp_path}/map.png"])
    with monkeypatch.context() as m:  # drawn, but not encoded: that takes the time
        m.setattr(plots, "save", lambda figure, path: open(path, "w"))
        plots.main(["timeline", run, "--gt", f"{tmp_path}/gt.json"])
    said = capsys.readouterr().out
    assert "the first 10 of 12 videos" in said and "v9: not in" in said and "v3: not in" not in said
    assert sorted(os.listdir(f"{run}/pictures")) == sorted(["losses.png", "similarity.png", *(f"timeline_v{i}.png" for i in range(10))])
    plots.main(["timeline", run, "--video", "v11", "--out", f"{tmp_path}/mine"])
    assert os.listdir(tmp_path / "mine") == ["v11.png"] and plots.is_ours(f"{tmp_path}/map.png")


def test_the_stages_come_in_their_order(run):
    os.makedirs(f"{run}/pretrain/acp_plus")
    with open(f"{run}/pretrain/acp_plus/metrics.jsonl", "w") as f:
        f.write(json.dumps(STAGES["head"][0]))
    assert list(plots.read_metrics(run)) == ["pretrain/acp", "pretrain/acp_plus", "lofi", "sola", "head"]


@pytest.mark.parametrize("words, message", [
    (["timeline", "{run}", "--video", "v99"], "no video 'v99'; it has 12: v0, v1, v2"), (["timeline", "{tmp}"], "no result .*result.json"),
    (["losses", "{tmp}"], "no metrics.jsonl"), (["similarity", "{tmp}"], "stage sola writes it"), (["similarity", "{run}", "--video", "x"], "no video 'x'"),
    (["timeline", "{run}", "--gt", "{run}/metrics.json"], "no ActivityNet annotation file"), (["map", "{tmp}/none", "--out", "{tmp}/m.png"], "none"),
    (["losses", "{run}", "--out", "{tmp}/gt.json"], "ends in .png")])
def test_what_cannot_be_drawn_is_said_in_one_line(run, tmp_path, words, message):
    with pytest.raises(SystemExit, match=message) as error:
        plots.main([w.format(run=run, tmp=tmp_path) for w in words])
    assert "\n" not in str(error.value) and not list(tmp_path.glob("*.png"))


def test_files_of_the_wrong_kind(run):
    with open(f"{run}/result.json", "w") as f:
        json.dump({"results": {"v": [{"score": 1, "segment": [0, 1]}]}}, f)
    with pytest.raises(ValueError, match="'v' has an entry without label"):
        plots.timelines(run)
    with open(f"{run}/head/metrics.jsonl", "a") as f:
        f.write("{\n")
    with pytest.raises(ValueError, match="head/metrics.jsonl"):
        plots.read_metrics(run)
