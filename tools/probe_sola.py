"""Measure what SoLa did to the features of a run: self-similarity maps and a linear probe.

    python -m tools.probe_sola RUN

RUN: a run folder whose stage sola has finished. Writes into RUN/sola:

    probe.json       linear probe "action or background snippet", fitted on training videos and
                     measured on validation videos: before SoLa, on a moving average (what plain
                     smoothing brings) and after SoLa, also by the length of the background
                     around a snippet; and the spread of the features
    similarity.npz   self-similarity maps of a few validation videos, raw and SoLa, for
                     `python -m tools.plot similarity RUN`

Legend: C channels, L snippets, N or M snippets of all videos, V videos.
"""

import argparse
import os

import numpy as np
import torch
from torch.nn import functional as F

from checkpoint import RunFolder, save_json, write_atomic
from config import load_videos, one_line_errors, saved_config
from data import FeatureDataset
from media import InputError
from sola import SoLa, spread

MOST_VIDEOS = 500  # of each split, for the probe
MOST_MAPS = 6


def moving_average(features, taps=5):
    """Replace each snippet by the mean of the `taps` around it: (B, C, L) -> (B, C, L)."""
    return F.avg_pool1d(features, taps, 1, taps // 2, count_include_pad=False)


# What is probed of a SoLa module and features (B, C, L).
VARIANTS = {
    "before": SoLa.standardized,
    "moving_average": lambda sola, x: moving_average(sola.standardized(x)),
    "after": SoLa.__call__,
}


def snippet_labels(segments, snippets):
    """Tell whether each snippet's centre (i + 0.5) / L is in one of (N, 2) segments: (L,) bool."""
    centre = (torch.arange(snippets) + 0.5) / snippets
    return ((segments[:, :1] <= centre) & (centre < segments[:, 1:])).any(0)


def stretch_lengths(labels):
    """Return how many snippets the stretch of equal labels around each has: (L,) -> (L,)."""
    _, stretch, counts = torch.unique_consecutive(labels, return_inverse=True, return_counts=True)
    return counts[stretch]


def auc(scores, labels):
    """Return the area under the ROC curve of (N,) scores and labels; NaN if all labels agree."""
    labels = labels.bool()
    positives = scores[labels]
    negatives = scores[~labels].sort().values
    below = torch.searchsorted(negatives, positives)
    not_above = torch.searchsorted(negatives, positives, right=True)
    return ((below + not_above).double().mean() / (2 * len(negatives))).item()


def fit_probe(features, labels):
    """Fit a logistic regression to features (N, C), standardized, and labels (N,) bool.

    L2 penalty 1e-3 / 2 |w|^2, LBFGS to convergence, nothing random. Returns the function (M, C) ->
    logits (M,).
    """
    mean = features.mean(0)
    std = features.std(0)
    std = std.clamp(min=float(1e-3 * std.max() + 1e-12))  # a constant channel says nothing
    x = (features - mean) / std
    y = labels.to(features)
    weight = x.new_zeros(x.shape[1], requires_grad=True)
    bias = x.new_zeros((), requires_grad=True)
    options = {"history_size": 20, "tolerance_grad": 1e-6, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, **options)

    def closure():
        optimizer.zero_grad()
        entropy = F.binary_cross_entropy_with_logits(x @ weight + bias, y)
        loss = entropy + 1e-3 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda features: (features - mean) / std @ weight.detach() + bias.detach()


def linear_probe(features, labels, held_out, held_out_labels, lengths=None):
    """Return how linearly action can be told from background in held-out snippets, in [0, 1].

    features (N, C) and labels (N,) bool train the probe, held_out (M, C) and its labels (M,) test
    it. "background" is the accuracy of calling each held-out snippet background. lengths (M,), see
    `stretch_lengths`: also the AUC with background of at least so many snippets, up to twice that.
    """
    logits = fit_probe(features, labels)(held_out)
    truth = held_out_labels.bool()
    accuracy = ((logits > 0) == truth).double().mean().item()
    background = (~truth).double().mean().item()
    record = {"accuracy": accuracy, "auc": auc(logits, truth), "background": background}
    if lengths is not None:
        bins = {n: (lengths >= n) & (lengths < 2 * n) & ~truth for n in (1, 2, 4, 8, 16, 32)}
        gaps = {str(n): truth | gap for n, gap in bins.items() if gap.any()}
        record["auc_by_gap"] = {n: auc(logits[rows], truth[rows]) for n, rows in gaps.items()}
    return record


def evenly(dataset, most):
    """Return at most `most` indices of a data set, evenly picked."""
    count = min(len(dataset), most)
    return np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()


def probe(sola, train, held_out, device):
    """Probe SoLa's input, its moving average and SoLa's output on two FeatureDatasets."""
    record = {"labels": "read by this evaluation alone, not by the training of SoLa"}
    samples = {}
    labels = {}
    for split, dataset in (("fitted_on", train), ("held_out", held_out)):
        picked = evenly(dataset, MOST_VIDEOS)
        samples[split] = [dataset.features(i)[None] for i in picked]
        pairs = zip(picked, samples[split], strict=True)
        parts = [snippet_labels(dataset.videos[i].actions[0], x.shape[2]) for i, x in pairs]
        labels[split] = torch.cat(parts).to(device)
        record[split] = {"videos": len(picked), "snippets": len(labels[split])}
    lengths = torch.cat([stretch_lengths(part) for part in parts]).to(device)  # of those held out
    for name, variant in VARIANTS.items():
        rows = {}  # (snippets of all videos, C)
        for split, features in samples.items():
            with torch.no_grad():
                rows[split] = torch.cat([variant(sola, x.to(device))[0].t() for x in features])
        fitted_on = (rows["fitted_on"], labels["fitted_on"])
        record[name] = linear_probe(*fitted_on, rows["held_out"], labels["held_out"], lengths)
        record[name]["spread"] = spread(rows["held_out"].t()[None]).item()
    return record


def similarity_map(features):
    """Return cosine similarities of snippets, (B, C, L) -> (B, L, L); 0 for a zero vector."""
    unit = F.normalize(features.float(), dim=1, eps=1e-6)
    return unit.transpose(1, 2) @ unit


@torch.no_grad()
def similarity_maps(sola, dataset, snippets, device):
    """Return "names" (V,) and maps "raw" and "sola", (V, L, L) each, at L = `snippets`."""
    maps = {"names": [], "raw": [], "sola": []}
    for i in evenly(dataset, MOST_MAPS):
        x = dataset.features(i)[None].to(device)
        for key, value in (("raw", sola.standardized(x)), ("sola", sola(x))):
            # As the head gets them.
            value = F.interpolate(value, snippets, mode="linear")
            maps[key].append(similarity_map(value)[0].cpu().numpy())
        maps["names"].append(dataset.videos[i].name)
    return {key: np.array(value) for key, value in maps.items()}


def run(folder):
    """Measure the run in `folder` and write both files."""
    cfg = saved_config(folder)
    paths = RunFolder(folder)
    if not os.path.isfile(paths.sola):
        raise InputError(f"no file {paths.sola}: run stage sola first")
    device = "cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu"
    sola = SoLa.load(paths.sola).to(device)
    source = cfg.data.features or paths.features
    train = FeatureDataset(load_videos(cfg, "train", source, "features"), source)
    held_out = FeatureDataset(load_videos(cfg, "val", source, "features"), source)
    maps = similarity_maps(sola, held_out, cfg.video.snippets, device)
    target = f"{folder}/sola/similarity.npz"
    write_atomic(target, lambda file: np.savez(file, **maps))
    print(f"{len(maps['names'])} self-similarity maps: {target}")
    if not any(len(video.actions[0]) for video in held_out.videos):
        print("no linear probe, as the validation videos have no segments")
        return
    record = probe(sola, train, held_out, device)
    target = f"{folder}/sola/probe.json"
    save_json(record, target)
    print(f"linear probe, action or background, on {record['held_out']['videos']} videos: {target}")
    for name in VARIANTS:
        accuracy = 100 * record[name]["accuracy"]
        gaps = ", ".join(f"{n}: {value:.3f}" for n, value in record[name]["auc_by_gap"].items())
        print(f"{name:14} accuracy {accuracy:5.1f} %   AUC {record[name]['auc']:.3f}   ({gaps})")


def main(argv=None):
    """Run the program of this file's first lines."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tools.probe_sola", None, __doc__, formatter_class=formatter)
    parser.add_argument("run", metavar="RUN", help="run folder with a finished stage sola")
    args = parser.parse_args(argv)
    with one_line_errors("tools.probe_sola"):
        run(args.run)


if __name__ == "__main__":
    main()
