"""tools/probe_sola.py: hand-worked measures, and the program on a run made by hand."""

import json
import math

import numpy as np
import pytest
import torch

from checkpoint import save_json, save_weights
from config import load_config
from sola import SoLa
from tools import probe_sola
from tools.probe_sola import (
    auc,
    linear_probe,
    moving_average,
    similarity_map,
    snippet_labels,
    stretch_lengths,
)


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_similarity_map_by_hand():
    x = torch.tensor([[[3.0, 0.0, -5.0, 0.0], [0.0, 2.0, 0.0, 0.0]]])  # east, north, west, nothing
    expected = [[1, 0, -1, 0], [0, 1, 0, 0], [-1, 0, 1, 0], [0, 0, 0, 0]]
    assert similarity_map(x)[0].tolist() == expected


def test_moving_average_by_hand():
    x = torch.tensor([[[0.0, 3.0, 6.0, 0.0]]])
    assert moving_average(x, 3).tolist() == [[[1.5, 3.0, 3.0, 3.0]]]  # shorter at the ends


def test_labels_are_those_of_snippet_centres():
    # Centres are .05, .15, ...: [.1, .25) holds .15, [.46, .54) none, [.82, 1) .85 and .95.
    labels = snippet_labels(torch.tensor([[0.1, 0.25], [0.46, 0.54], [0.82, 1.0]]), 10)
    assert labels.nonzero().flatten().tolist() == [1, 8, 9]
    assert snippet_labels(torch.zeros(0, 2), 3).tolist() == [False] * 3


def test_stretches_by_hand():
    labels = torch.tensor([0, 0, 1, 0, 1, 1, 1], dtype=torch.bool)
    assert stretch_lengths(labels).tolist() == [2, 2, 1, 1, 3, 3, 3]


def test_auc_by_the_length_of_gaps():
    """The one snippet of a short gap looks like action, the two of a long one do not."""
    labels = torch.tensor([1, 1, 0, 1, 0, 0], dtype=torch.bool)
    x = torch.tensor([[2.0], [3.0], [2.5], [4.0], [-1.0], [-2.0]])
    found = linear_probe(x, labels, x, labels, stretch_lengths(labels))
    assert found["auc_by_gap"] == {"1": pytest.approx(2 / 3), "2": 1.0}
    assert found["auc"] == pytest.approx((2 / 3 + 2) / 3)


def test_auc_by_hand():
    assert auc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1])) == 0.75
    assert auc(torch.tensor([1.0, 1, 1, 1]), torch.tensor([0, 1, 0, 1])) == 0.5
    assert auc(torch.tensor([2.0, 1, 1]), torch.tensor([1, 1, 0])) == 0.75
    assert math.isnan(auc(torch.tensor([1.0, 2]), torch.tensor([1, 1])))


def newton(x, y, decay):
    """Regularized logistic regression in numpy, by Newton's method."""
    x = np.c_[x, np.ones(len(x))]
    w = np.zeros(x.shape[1])
    penalty = np.diag([decay] * (len(w) - 1) + [0])
    for _ in range(30):
        p = 1 / (1 + np.exp(-x @ w))
        hessian = (x * (p * (1 - p))[:, None]).T @ x / len(x) + penalty
        w -= np.linalg.solve(hessian, x.T @ (p - y) / len(x) + penalty @ w)
    return w


def test_probe_is_the_logistic_regression_that_newton_finds():
    scale = torch.tensor([1.0, 10, 0.1, 1, 1, 1])
    x = 5 + rand(400, 6, dtype=torch.float64) * scale
    other = 5 + rand(301, 6, seed=1, dtype=torch.float64)
    truth = torch.tensor([1.0, -0.2, 5, 0, 0, 0.5], dtype=torch.float64)

    def label(v):
        return ((v - 5) @ truth + rand(len(v), seed=2, dtype=torch.float64)) > 0.3

    labels = label(x)
    other_labels = label(other)
    w = newton(((x - x.mean(0)) / x.std(0)).numpy(), labels.numpy(), 1e-3)
    logits = ((other - x.mean(0)) / x.std(0)).numpy() @ w[:-1] + w[-1]
    positive = other_labels.numpy()
    pairs = np.sign(logits[positive][:, None] - logits[~positive])
    found = linear_probe(x, labels, other, other_labels)
    assert found["accuracy"] == ((logits > 0) == positive).mean() and 0.6 < found["accuracy"] < 1
    assert found["auc"] == pytest.approx((pairs.mean() + 1) / 2, abs=1e-3)
    assert found["background"] == pytest.approx(1 - positive.mean())
    assert found == linear_probe(x, labels, other, other_labels)  # nothing random
    single = linear_probe(x.float(), labels, other.float(), other_labels)
    assert single["auc"] == pytest.approx(found["auc"], abs=1e-3)


def test_probe_of_constant_channels_and_of_one_class_does_not_crash():
    x = torch.cat([rand(50, 2), torch.full((50, 1), 7.0)], 1)
    labels = torch.arange(50) % 2 == 0
    assert math.isfinite(linear_probe(x, labels, x, labels)["auc"])
    none = torch.zeros(50).bool()
    found = linear_probe(x, none, x, none)
    assert found["accuracy"] == found["background"] == 1 and math.isnan(found["auc"])


# ---------------------------------------------------------------------------------------- program

LENGTHS = {"a": 23, "b": 30, "c": 47, "d": 22, "e": 25, "f": 31, "g": 9, "h": 60}  # f, g, h: val


@pytest.fixture
def run(tmp_path):
    """A run folder with smooth random features, shifted in actions, and a SoLa module."""
    rng = np.random.default_rng(0)
    database = {}
    (tmp_path / "run/features").mkdir(parents=True)
    for k, (name, length) in enumerate(LENGTHS.items()):
        start = 20 + 5 * (k % 3)
        x = 3 + np.cumsum(rng.normal(size=(length, 5)), 0) / 4
        x[int(start / 80 * length) : int(60 / 80 * length), 0] += 2
        np.save(tmp_path / f"run/features/{name}.npy", x.astype(np.float32))
        database[name] = {
            "subset": "validation" if name > "e" else "training",
            "duration": 80.0,
            "annotations": [{"segment": [start, 60.0], "label": "xy"[k % 2]}],
        }
    save_json({"database": database}, tmp_path / "annotations.json")
    overrides = [
        f"data.annotations={tmp_path}/annotations.json",
        f"out={tmp_path}/run",
        "stages=[features,sola]",
        "video.snippets=16",
    ]
    save_json(load_config("configs/default.yaml", overrides), tmp_path / "run/config.json")
    torch.manual_seed(0)
    module = SoLa(5, hidden=8)
    with torch.no_grad():
        module.alpha.fill_(0.5)
    save_weights(module, tmp_path / "run/sola/sola.pt", **module.sizes)
    return tmp_path / "run"


def test_the_probe_is_of_held_out_videos_before_and_after(run, capsys):
    probe_sola.main([str(run)])
    assert "3 videos" in capsys.readouterr().out
    record = json.loads((run / "sola/probe.json").read_text())
    assert record["held_out"] == {"videos": 3, "snippets": 31 + 9 + 60}
    assert record["fitted_on"] == {"videos": 5, "snippets": 23 + 30 + 47 + 22 + 25}
    assert "not by the training" in record["labels"]
    for key in ("before", "moving_average", "after"):
        assert 0 <= record[key]["accuracy"] <= 1 and 0 <= record[key]["auc"] <= 1
        assert 0 < record[key]["spread"] < 1
    assert record["before"]["auc"] > 0.7  # channel 0 tells
    assert record["before"] != record["after"]


def test_the_maps_are_of_validation_videos_before_and_after(run, monkeypatch):
    monkeypatch.setattr(probe_sola, "MOST_VIDEOS", 2)
    monkeypatch.setattr(probe_sola, "MOST_MAPS", 2)
    probe_sola.main([str(run)])
    record = json.loads((run / "sola/probe.json").read_text())
    assert record["fitted_on"] == {"videos": 2, "snippets": 23 + 25}  # evenly: the ends
    with np.load(run / "sola/similarity.npz") as maps:
        assert list(maps["names"]) == ["f", "h"]
        assert maps["raw"].shape == maps["sola"].shape == (2, 16, 16)
        assert np.abs(maps["raw"] - maps["sola"]).max() > 1e-3
        for key in ("raw", "sola"):
            np.testing.assert_allclose(maps[key].diagonal(0, 1, 2), 1, atol=1e-5)
            assert np.abs(maps[key] - maps[key].transpose(0, 2, 1)).max() < 1e-5


def test_without_segments_there_are_maps_alone(run, capsys):
    path = run.parent / "annotations.json"
    content = json.loads(path.read_text())
    for video in content["database"].values():
        video["annotations"] = []
    path.write_text(json.dumps(content))
    probe_sola.main([str(run)])
    assert "no linear probe" in capsys.readouterr().out
    assert (run / "sola/similarity.npz").exists() and not (run / "sola/probe.json").exists()


def test_a_run_without_sola_is_one_line(run, tmp_path):
    (run / "sola/sola.pt").unlink()
    for folder, message in ((run, "run stage sola first"), (tmp_path, "folder of a run")):
        with pytest.raises(SystemExit, match=message):
            probe_sola.main([str(folder)])
