"""Stage sola: trains SoLa on feature files, then writes the features that it makes of them. No labels are read for training, no frames, no encoder.

    FOLDER/sola.pt              the module, for SoLa.load
    FOLDER/features/VIDEO.npy   SoLa features (L, C) of every video, as long as the raw ones; features.json beside them
    FOLDER/similarity.npz       self-similarity maps of a few validation videos, raw and SoLa
    FOLDER/probe.json           linear probe "action or background snippet" on validation videos: an evaluation, which does read labels
    FOLDER/metrics.jsonl        by epoch: loss, floor (what the loss cannot fall below), spread of the features (0: collapsed), gate tanh(alpha)
"""
import os
import sys
import time
from functools import partial

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import data
import engine
from sola import (Predictor, SoLa, linear_probe, moving_average, sample_subsequences, similarity_floor, similarity_map, similarity_matching_loss,
                  similarity_target, snippet_labels, spread)


class Subsequences:
    """Random subsequences of a FeatureDataset's videos: dataset[index, fidelity] -> {"name", "features" (C, length)}.

    Each video gives `draws` of them an epoch, a pure function of (seed, epoch, index). Videos that are shorter are left out: `left_out`.
    Features of at most `hold_gb` in all are read once and kept in memory, which a loader's workers share.
    """

    def __init__(self, features, length, draws=1, seed=0, hold_gb=1.0):
        self.features, self.length, self.draws, self.seed = features, length, draws, seed
        snippets = [features.snippets(i) for i in range(len(features))]
        self.kept = [i for i, n in enumerate(snippets) if n >= length]
        self.left_out = [features.videos[i].name for i, n in enumerate(snippets) if n < length]
        if not self.kept:
            raise ValueError(f"all {len(snippets)} videos are shorter than a subsequence of {length} snippets, the longest has {max(snippets)}: "
                             "set sola.subsequence and sola.positions, or extract features at more snippets")
        hold = 4e-9 * sum(snippets) * features.channels <= hold_gb
        self.held = {i: features[i, data.NATIVE] for i in self.kept} if hold else {}
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that live on

    def set_epoch(self, epoch):
        self.epoch.fill_(epoch)

    def __len__(self):
        return len(self.kept) * self.draws

    def __getitem__(self, pair):
        index, _ = pair
        video = self.kept[index % len(self.kept)]
        sample = self.held[video] if self.held else self.features[video, data.NATIVE]
        generator = torch.Generator().manual_seed(data.seed_of(self.seed, "subsequence", int(self.epoch), index))
        start = sample_subsequences([sample["features"].shape[1]], self.length, generator=generator).item()
        return {"name": sample["name"], "features": sample["features"][:, start:start + self.length].contiguous()}


class Matching(nn.Module):
    """Module and predictor behind one forward for DDP: subsequences (B, C, length) -> loss, gathered module output (B, C, n)."""

    def __init__(self, sola, predictor, positions, coefficient):
        super().__init__()
        self.sola, self.predictor = sola, predictor
        self.register_buffer("positions", torch.tensor(positions), persistent=False)
        self.register_buffer("target", similarity_target(len(positions), coefficient), persistent=False)

    def forward(self, x):
        z = self.sola(x, self.positions)
        return similarity_matching_loss(z, self.predictor, self.target), z


def train(dataset, *, options, seed, folder, process, workers=0, save_sec=60.0, about=None):
    """Trains SoLa on a FeatureDataset; returns (module, seconds, names of the videos that are too short).

    options: subsequence, positions, coefficient, hidden, kernel, standardize, draws, batch_size (over all processes) and those of engine.fit.
    """
    length, positions = options["subsequence"], options["positions"]
    if len(positions) < 2 or not all(isinstance(p, int) and 0 <= p < length for p in positions):
        raise ValueError(f"sola.positions is {positions}, expected at least two whole numbers in 0 ... {length - 1}: snippets of a subsequence of {length}")
    subsequences = Subsequences(dataset, length, options["draws"], seed)
    short = subsequences.left_out
    if short:
        process.say(f"sola: {len(short)} of {len(dataset)} videos have fewer than {length} snippets and are left out of training: "
                    + ", ".join(short[:10]) + (" ..." if len(short) > 10 else ""))
    torch.manual_seed(data.seed_of(seed, "sola"))
    model = Matching(SoLa(dataset.channels, options["hidden"], options["kernel"]), Predictor(dataset.channels, options["hidden"]),
                     positions, options["coefficient"])
    if options["standardize"]:
        model.sola.mean[:], model.sola.std[:] = dataset.statistics()[:2]
    model.to(process.device)
    floor = similarity_floor(model.target)

    def step(net, batch, epoch, i):
        with process.autocast():
            loss, z = net(batch["features"])
        loss.backward()
        return {"loss": loss.detach(), "floor": floor, "spread": spread(z.detach()), "gate": model.sola.gate.detach()}

    batch_size = options["batch_size"]
    if batch_size > len(subsequences):  # the sampler would repeat them to fill a batch
        batch_size = -(-len(subsequences) // process.world) * process.world
        process.say(f"sola: an epoch has {len(subsequences)} subsequences, fewer than sola.batch_size {options['batch_size']}: {batch_size} a step")
    sampler = data.CyclicFidelitySampler(len(subsequences), batch_size, [data.NATIVE], seed=data.seed_of(seed, "sola"),
                                         rank=process.rank, world=process.world)
    seconds, _ = engine.fit(model, step, subsequences, sampler, data.collate, options=options, name="sola", folder=folder, process=process,
                            workers=workers, save_sec=save_sec, about=about, training=data.fingerprint(dataset.videos))
    return model.sola.eval().requires_grad_(False), seconds, short


@torch.no_grad()
def write_features(sola, dataset, folder, process):
    """SoLa features of every video at its own length, (L, C) float32, each rank its share; those that are there already are left."""
    missing = [i for i, v in enumerate(dataset.videos) if not os.path.exists(f"{folder}/{v.name}.npy")]
    engine.barrier(process)  # every rank has looked before any writes
    for i in tqdm(missing[process.rank::process.world], "sola features", unit="video", leave=False, disable=not (process.is_main and sys.stderr.isatty())):
        sample = dataset[i, data.NATIVE]
        x = sola(sample["features"][None].to(process.device))[0].t().cpu().numpy()
        engine.write_aside(f"{folder}/{sample['name']}.npy", partial(np.save, arr=x, allow_pickle=False))


def evenly(dataset, most):
    """At most `most` samples, evenly picked, at their own length."""
    for i in np.linspace(0, len(dataset) - 1, min(len(dataset), most)).round().astype(int).tolist():
        yield dataset[i, data.NATIVE]


@torch.no_grad()
def similarity_maps(sola, dataset, snippets, device, videos=6):
    """{"names" (V,), "raw" (V, L, L), "sola" (V, L, L)}: cosine similarities of a few videos' snippets before and after the module, at L = `snippets`."""
    maps = {"names": [], "raw": [], "sola": []}
    for sample in evenly(dataset, videos):
        x = sample["features"][None].to(device)
        for key, value in (("raw", sola.standardized(x)), ("sola", sola(x))):
            value = nn.functional.interpolate(value, snippets, mode="linear", align_corners=False)  # as the head gets them
            maps[key].append(similarity_map(value)[0].cpu().numpy())
        maps["names"].append(sample["name"])
    return {key: np.array(value) for key, value in maps.items()}


def probe(sola, train, held_out, device, videos=500):
    """Linear probe on what SoLa gets, on its 5-tap moving average (what plain smoothing would bring), and on what SoLa makes of it; and their spread.

    Fitted on at most `videos` videos of `train`, measured on as many of `held_out`. Reads the labels of both: none of it goes into training.
    """
    variants = {"before": sola.standardized, "moving_average": lambda x: moving_average(sola.standardized(x)), "after": sola}
    samples = [list(evenly(dataset, videos)) for dataset in (train, held_out)]
    labels = [torch.cat([snippet_labels(s["segments"], s["features"].shape[1]) for s in part]).to(device) for part in samples]
    found = {"labels": "read by this evaluation alone, not by the training of SoLa",
             **{name: {"videos": len(part), "snippets": len(y)} for name, part, y in zip(("fitted_on", "held_out"), samples, labels)}}
    for name, variant in variants.items():
        with torch.no_grad():
            rows, other = (torch.cat([variant(s["features"][None].to(device))[0].t() for s in part]) for part in samples)
        found[name] = {**linear_probe(rows, labels[0], other, labels[1]), "spread": spread(other.t()[None]).item()}
    return found


def run(train_set, held_out, source, *, options, snippets, folder, process, workers=0, **training):
    """The whole stage on two FeatureDatasets; `source`: the folder of features that they read, or several. Writes what stands at the top of this file."""
    sola, seconds, short = train(train_set, options=options, folder=folder, process=process, workers=workers, **training)
    trained = time.monotonic()
    for dataset in (train_set, held_out):
        write_features(sola, dataset, f"{folder}/features", process)
    engine.barrier(process)
    if not process.is_main:
        return
    seconds += time.monotonic() - trained
    facts = {"subsequence": options["subsequence"], "positions": list(options["positions"]), "coefficient": options["coefficient"]}
    engine.save_weights(sola, f"{folder}/sola.pt", **sola.sizes, **facts, videos=len(train_set) - len(short), left_out=len(short))
    maps = similarity_maps(sola, held_out, snippets, process.device)
    engine.write_aside(f"{folder}/similarity.npz", partial(np.savez, **maps))
    if any(len(v.segments) for v in held_out.videos):
        found = probe(sola, train_set, held_out, process.device, options["probe_videos"])
        engine.save_json(found, f"{folder}/probe.json")
        process.say("sola: linear probe, action or background, on {} held-out videos: ".format(found["held_out"]["videos"]) + "; ".join(
            f"{k.replace('_', ' ')} accuracy {100 * found[k]['accuracy']:.1f} %, AUC {found[k]['auc']:.3f}" for k in ("before", "moving_average", "after")))
    else:
        process.say("sola: no linear probe, as the held-out videos have no segments")
    before = data.facts_of_features(source)
    videos = {v.name: {"duration_sec": v.duration} for dataset in (train_set, held_out) for v in dataset.videos}  # where annotations tell none
    engine.save_json({**(before[0] if before else {}), "videos": videos, "sola": f"{folder}/sola.pt", "from": source, "channels": train_set.channels,
                      "seconds": seconds + sum(b.get("seconds", 0.0) for b in before), "sola_seconds": seconds}, f"{folder}/features/features.json")
