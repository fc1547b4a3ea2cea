"""Make valid inputs of all kinds and list the programs that read them, for tests/fuzz.py.

Paths are relative to the working folder, a copy of what `make_base` writes.
"""

import glob
import json
import os
import shutil
import sys
import zipfile
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import h5py
import numpy as np

import checkpoint
import config
import data
import evaluate
import localize
import lofi_tal
import pretrain
from tests import fuzz_mutations as m
from tests import fuzz_references as references
from tools import check_data, compare_runs, make_toy, plot, prepare_data, probe_sola

TOY = f"{config.HERE}/configs/toy.yaml"
HEAD = "hidden: 8, gcn_width: 8, gcn_groups: 4, stem_groups: 1, inner_bins: 2, context_bins: 1"
SETTINGS = ["seed=0", "data.annotations=data/annotations.json", "data.frames=data/frames"]
SETTINGS += ["video.size=16", "video.snippets=8", "video.frames_per_snippet=2"]
SETTINGS += ["fidelities={S: [8, 8], T: [2, 16], ST: [4, 11]}", "data.workers=0", "encoder.width=8"]
SETTINGS += [f"gtad={{{HEAD}, map_hidden: [8, 4]}}", "bmn={hidden: 8, map_hidden: [8, 4]}"]
SETTINGS += ["pretrain.acp.source=data/clips", "pretrain.icp.source=data/stills"]
SETTINGS += [f"pretrain.{task}.epochs=1" for task in pretrain.PLAYBACKS]
SETTINGS += ["pretrain.acp.epochs=1", "pretrain.acp_plus.epochs=1", "pretrain.acp.frames=2"]
SETTINGS += ["lofi.epochs=1", "lofi.batch_size=4", "head.batch_size=4", "sola.batch_size=4"]
SETTINGS += ["sola.epochs=1", "sola.hidden=8", "sola.subsequence=5", "sola.positions=[0, 2, 4]"]
SETTINGS += ["sola.subsequences_per_video=1", "log_every=1"]
VIDEO = "toy_00003"  # of the validation subset
TRUTH = "data/annotations.json"
ZIP = f"data/frames/{VIDEO}.zip"
TABLES = f"{config.HERE}/tests/tables"
MAPS = "run/sola/similarity.npz"

# All stages; a head on features that lie elsewhere.
WHOLE = ["stages=[pretrain, lofi, features, sola, head, detect]", "out=run", "head.epochs=1"]
HALF = ["stages=[head, detect]", "data.features=feats", "out=half", "head.epochs=2"]
QUICK = ["stages=[head, detect]", "data.features=feats", "out=new", "head.epochs=1"]


# ---------------------------------------------------------------------------------- valid inputs


def start(*overrides):
    lofi_tal.main(["--cfg", TOY, "--set", *SETTINGS, *overrides])


def make_base():
    """Write a toy data set, finished runs and one of each kind of files to the working folder."""
    sizes = {"train": 3, "val": 2, "clips": 16, "stills": 24, "size": 16, "snippets": 16}
    make_toy.make_toy("data", make_toy.Toy(**sizes, frames_per_snippet=2), workers=0)
    annotations = checkpoint.load_json(TRUTH)
    database = annotations["database"]
    for i, video in enumerate(database.values()):
        video["annotations"] = [{**a, "label": "jump"} for a in video["annotations"]]
        video["annotations"] += [{"segment": [0.5 + 0.1 * i, 2], "label": "turn"}]
    checkpoint.save_json(annotations, TRUTH)
    val = [name for name, video in database.items() if video["subset"] == "validation"]
    start(*WHOLE)
    probe_sola.main(["run"])
    localize.main(["--run", "run", "--no-picture", f"data/frames/{val[0]}.zip"])
    score("--json", "own.json")
    os.makedirs("feats")
    with h5py.File("feats.h5", "w") as file:
        for video in database:
            shutil.copy(f"run/features/{video}.npy", "feats")
            file[video] = np.load(f"feats/{video}.npy")
    shutil.copy("run/features/features.json", "feats")
    start(*HALF)
    for name in ("head/head.pt", "metrics.json", "result.json", "proposals.json"):
        os.remove(f"half/{name}")
    os.replace("half/head/checkpoint.pt.previous", "half/head/checkpoint.pt")
    scores = [{"label": "jump", "score": 0.5}, {"label": "turn", "score": 0.25}]
    cuhk = {"results": {video: [0.5, 0.25] for video in val}, "class": ["jump", "turn"]}
    durations = {name: video.pop("duration") for name, video in database.items()}
    contents = {"bare": annotations, "durations": durations, "cuhk": cuhk}
    contents |= {"scores": dict.fromkeys(val, scores)}
    contents["new"] = contents["tiny"] = config.load_config(TOY, [*SETTINGS, *QUICK])
    contents["flat"] = config.flatten(contents["new"])
    for name, content in contents.items():
        checkpoint.save_json(content, f"{name}.json")
    with open("set.json", "w") as file:
        json.dump(["seed=0"], file)
    rows = [
        f"{name},{a['segment'][0]},{a['segment'][1]},{a['label']},{video['subset']}"
        for name, video in database.items()
        for a in video["annotations"]
    ]
    shutil.copytree(TABLES, "tables")
    with open("tables/plain.csv", "w") as file:
        file.write("\n".join(["video,start,end,label,subset", *rows, ""]))
    make_media()


def make_media():
    """Write prepared ZIPs, a folder of frames and a CSV of clips."""
    os.makedirs("prepared")
    settings = {"snippets": 8, "frames": 2, "stride": 1, "short_side": 16, "quality": 90}
    settings |= {"copies": [8], "rate": None}
    for name in os.listdir("data/frames"):
        prepare_data.prepare_video(f"data/frames/{name}", f"prepared/{name}", settings)
    with zipfile.ZipFile(f"data/frames/{VIDEO}.zip") as archive:
        archive.extractall(f"folders/{VIDEO}", archive.namelist()[1:6])
    checkpoint.save_json({"fps": 8, "duration_sec": 0.625}, f"folders/{VIDEO}/video.json")
    clips = sorted(glob.glob("data/clips/*/*/*.zip"))
    rows = [f"{c},{c.split('/')[3]},0.25,1.5,{c.split('/')[2]}" for c in clips]
    with open("clips.csv", "w") as file:
        file.write("\n".join(["path,label,start,end,split", *rows, ""]))


# --------------------------------------------------------------------------------------- programs

FROM_ENCODER = ["stages=[features]", "pretrain.pretrained=run/lofi/encoder.pt", "out=new"]


def start_if_small(*argv):
    """Check a config; train by it if that takes about as long as by the valid one."""
    with config.one_line_errors("lofi_tal.py"):
        cfg = config.from_command_line("", argv)
        config.check(cfg)
    valid = config.flatten(checkpoint.load_json("new.json"))
    pairs = [(x, valid.get(key)) for key, x in config.flatten(cfg).items()]
    large = [x for x, y in pairs if isinstance(x, (int, float)) and x > max(8, y or 0)]
    if not large and set(cfg.stages) <= {"sola", "head", "detect"}:
        lofi_tal.main(argv)


def by_words(program):
    with open("set.json") as file:
        words = [word for word in json.load(file) if word]
    program("--cfg", "new.json", "--set", *words)


def read_tables():
    """Check all tables of annotations; train by the one that is of the toy data."""
    for path in sorted(glob.glob("tables/*")):
        with config.one_line_errors("data"):
            data.load_annotations(path)
    check("--annotations", "tables/plain.csv", "--features", "feats", "--json", "from_table.json")
    start(*QUICK, "data.annotations=tables/plain.csv")


def read_clips(source):
    with config.one_line_errors("pretrain"):
        options = {"source": source, "media": "data/frames"}
        clips = pretrain.load_clips("acp", options, log=print).train
        views = pretrain.ClipDataset(clips, frames=2, stride=1)
        for i in range(len(views)):
            views[i, data.Fidelity("full", 1, 16)]


def features_again():
    """Go on with a run that was killed in stage features."""
    for name in ("head", "sola", "features/features.json", "metrics.json"):
        path = f"run/{name}"
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    start(*WHOLE)


def check(*argv):
    return check_data.main(["--problems", "problems.txt", *argv])


def score(*argv):
    sys.stdout.reconfigure(errors="replace")  # as when it is started
    evaluate.main(["--gt", TRUTH, "--pred", "run/result.json", *argv])


def find(video, out="found"):
    localize.main(["--run", "run", "--no-picture", "--gt", TRUTH, "--out", out, video])


def prepare(*argv):
    settings = ["--snippets=8", "--frames-per-snippet=2", "--stride=1", "--short-side=16"]
    command = ["--out=out", "--videos=folders", "--workers=0", "--copies=8", *settings]
    return prepare_data.main([*command, *argv])


def draw(*argv):
    plot.main([*argv])


Program = namedtuple("Program", "name share run reference", defaults=(None,))


@dataclass
class Kind:
    """Files, of which a mutation changes one, and the programs that read them.

    Of a program: its name, of what share of mutations it is run, and what a file has to pass.
    """

    files: list[str]
    mutate: Callable
    programs: list[Program]


def kind_of(files, mutate, reference=None, **programs):
    """Return a Kind; programs: {name: (function, *arguments)}, or after the share of mutations."""
    listed = []
    for name, (share, *call) in programs.items():
        of_subset = partial(references.annotations, subset="validation")
        strict = of_subset if name == "evaluate" and files == [TRUTH] else reference
        # These read only a part of such a file, or nothing that the reference looks at.
        strict = None if name.startswith(("plain_", "plot")) else strict
        listed.append(Program(name, share, partial(*call), strict))
    return Kind(files, mutate, listed)


def features_kind(files, mutate, source, reference):
    """Return the Kind of features that lie in `source`."""
    sola = [*QUICK, "stages=[sola, head, detect]", f"data.features={source}", "out=other"]
    return kind_of(
        files,
        mutate,
        reference,
        check_data=(1, check, "--annotations", TRUTH, "--features", source),
        head=(1, start, *QUICK, f"data.features={source}"),
        sola=(0.2, start, *sola),
    )


def zip_kind(folder):
    """Return the Kind of a ZIP of frames in a folder."""
    path = f"{folder}/{VIDEO}.zip"
    return kind_of(
        [path],
        m.mutate_zip,
        references.frames,
        check_data=(1, check, "--annotations", TRUTH, "--frames", folder),
        localize=(0.5, find, path),
        lofi_tal=(0.3, start, *FROM_ENCODER, f"data.frames={folder}"),
        **({"plain_prepare": (0.3, prepare, "--out", folder)} if folder == "prepared" else {}),
    )


def json_kinds():
    """Return {name: Kind} of annotations, results, class scores and durations."""
    bare = ["--annotations", "bare.json", "--features", "feats"]
    untimed = [*QUICK, "data.annotations=bare.json"]
    scores = {name: [*QUICK, f"detect.class_scores={name}.json"] for name in ("scores", "cuhk")}
    kinds = {
        name: kind_of([f"{name}.json"], m.mutate_json, references.scores, lofi_tal=(1, start, *run))
        for name, run in scores.items()
    }
    kinds["annotations"] = kind_of(
        [TRUTH],
        m.mutate_json,
        references.annotations,
        check_data=(1, check, "--annotations", TRUTH, "--features", "feats"),
        lofi_tal=(1, start, *QUICK),
        head=(0.2, start, *QUICK, "data.features=feats.h5", "out=other"),
        evaluate=(1, score, "--ar"),
        plain_prepare=(0.3, prepare, "--annotations", TRUTH),
        plain_clips=(0.3, read_clips, TRUTH),
        plot=(0.1, draw, "timeline", "run", "--gt", TRUTH),
    )
    kinds["result"] = kind_of(
        ["run/result.json"],
        m.mutate_json,
        references.result,
        evaluate=(1, score),
        evaluate_ar=(1, score, "--ar"),
        plot=(0.3, draw, "timeline", "run"),
    )
    kinds["localized"] = kind_of(
        ["run/localized/result.json"],
        m.mutate_json,
        localize=(1, find, ZIP, "run/localized"),
        plot=(0.5, draw, "timeline", "run/localized"),
    )
    kinds["durations"] = kind_of(
        ["durations.json"],
        m.mutate_json,
        references.durations,
        check_data=(1, check, *bare, "--durations", "durations.json"),
        lofi_tal=(1, start, *untimed, "data.durations=durations.json"),
    )
    kinds["info"] = kind_of(
        ["feats/features.json"],
        m.mutate_json,
        references.info,
        check_data=(1, check, *bare),
        lofi_tal=(1, start, *untimed),
    )
    return kinds


def run_kinds():
    """Return {name: Kind} of what a run leaves and goes on from."""
    ours = [f"run/{name}/inputs.json" for name in ("pretrain", "lofi", "features", "sola", "head")]
    ours += [f"run/{name}" for name in ("config.json", "metrics.json", "features/features.json")]
    ours += ["run/sola/features/features.json", "own.json"]
    losses = [f"run/{stage}/metrics.jsonl" for stage in ("lofi", "sola", "head", "pretrain/acp")]
    kinds = {
        "weights": kind_of(
            ["run/lofi/encoder.pt", "run/head/head.pt", "run/sola/sola.pt"],
            m.mutate_weights,
            references.weights,
            localize=(1, find, ZIP),
            plain_start=(0.2, start, *FROM_ENCODER),
            plain_finished=(0.2, start, *WHOLE),
        ),
        "run": kind_of(
            ours,
            m.mutate_json,
            lofi_tal=(1, start, *WHOLE),
            localize=(0.3, find, ZIP),
            compare_runs=(1, compare_runs.main, ["run", "own.json", "--json=c.json"]),
            plot=(0.1, draw, "map", "run", "own.json", "--out=map.png"),
            probe_sola=(0.2, probe_sola.main, ["run"]),
        ),
        "losses": kind_of(losses, m.mutate_lines, plot=(1, draw, "losses", "run")),
    }
    for name, file, mutate, program in (
        ("resume", "half/head/checkpoint.pt", m.mutate_weights, {"lofi_tal": (1, start, *HALF)}),
        ("seconds", "run/features/seconds.json", m.mutate_json, {"lofi_tal": (1, features_again)}),
        ("similarity", MAPS, m.mutate_archive, {"plot": (1, draw, "similarity", "run")}),
    ):
        kinds[name] = kind_of([file], mutate, **program)
    return kinds


def list_kinds():
    """Return {name: Kind} of all."""
    feats = ["feats/toy_00000.npy", f"feats/{VIDEO}.npy"]
    tables = ["tables/plain.csv", *(f"tables/{name}" for name in sorted(os.listdir(TABLES)))]
    acp = ["stages=[pretrain]", "pretrain.acp.source=clips.csv", "out=new"]
    folder = [f"folders/{VIDEO}/{name}" for name in ("video.json", "000000.jpg", "000003.jpg")]
    kinds = {
        "config": kind_of(
            ["tiny.json"],
            m.mutate_yaml,
            lofi_tal=(1, start_if_small, "--cfg", "tiny.json"),
            check_data=(0.3, check, "--cfg", "tiny.json"),
        ),
        "set": kind_of(
            ["set.json"],
            m.mutate_set,
            lofi_tal=(1, by_words, start_if_small),
            check_data=(0.3, by_words, check),
        ),
        "npy": features_kind(feats, m.mutate_array, "feats", references.array),
        "hdf5": features_kind(["feats.h5"], m.mutate_hdf5, "feats.h5", references.hdf5),
        "zip": zip_kind("data/frames"),
        "prepared": zip_kind("prepared"),
        "folder": kind_of(
            folder,
            m.mutate_folder,
            localize=(1, find, f"folders/{VIDEO}"),
            plain_prepare=(1, prepare),
        ),
        "tables": kind_of(tables, m.mutate_table, tables=(1, read_tables)),
        "csv": kind_of(
            ["clips.csv"],
            m.mutate_csv,
            references.csv,
            clips=(1, read_clips, "clips.csv"),
            lofi_tal=(0.1, start, *acp),
        ),
    }
    return json_kinds() | kinds | run_kinds()
