"""Refuse bad files by a few strict lines each, which know nothing of the project's readers.

For tests/fuzz.py: what the project's docstrings say is refused, and no more. Each takes a file's
bytes and raises an exception if they are bad.
"""

import ast
import contextlib
import csv as csv_module
import io
import itertools
import json
import math
import zipfile

import h5py
import numpy as np
import torch


def distinct(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def expect(condition, *words):
    if not condition:
        raise ValueError(words)


def strict_json(content):
    return json.loads(content.decode("utf-8-sig"), object_pairs_hook=distinct)


def check_entries(entries, *keys):
    """Expect detections or annotations."""
    for entry in entries:
        expect("label" not in keys or isinstance(entry["label"], (str, int, float)), "label")
        expect("score" not in keys or math.isfinite(float(entry["score"])), "score")
        if "segment" in keys:
            expect(isinstance(entry["segment"], list), "segment")
            begin, end = map(float, entry["segment"])
            expect(-math.inf < begin <= end < math.inf, "segment")


def annotations(content, subset=None):
    database = strict_json(content)["database"]
    for video in database.values():
        expect(isinstance(video["subset"], str), "subset")
        if subset in (None, video["subset"]):
            seconds = video.get("duration")
            # Unknown is no fault; evaluation says so where it is 0.
            expect(seconds is None or not math.isinf(float(seconds)), "duration")
            expect(subset or seconds is None or not float(seconds) <= 0, "duration")
            expect(isinstance(video.get("annotations") or [], list), "annotations")
            # Nobody looks at segments of other subsets.
            if video["subset"] in ("training", "validation"):
                check_entries(video.get("annotations") or [], "label", "segment")


def result(content):
    for entries in strict_json(content)["results"].values():
        expect(isinstance(entries, list), "entries")
        check_entries(entries, "label", "score", "segment")


def scores(content):
    table = strict_json(content)
    if isinstance(table.get("results"), dict) and "class" in table:
        names = table["class"]
        expect(isinstance(names, list) and all(isinstance(n, (str, int)) for n in names), "names")
        for row in table["results"].values():
            expect(len(row) == len(names) and isinstance(row, list), "row")
            expect(all(0 <= float(x) < math.inf for x in row), "scores")
        return
    for entries in table.get("results", table).values():
        check_entries(entries, "label", "score")
        expect(all(float(entry["score"]) >= 0 for entry in entries), "score")


def durations(content):
    for seconds in strict_json(content).values():
        expect(0 < float(seconds) < math.inf, "seconds")


def info(content):
    info = strict_json(content)
    for video in info.get("videos", {}).values():
        expect(0 < float(video["duration_sec"]) < math.inf, "seconds")


def check_features(x):
    expect(x.ndim == 2 and len(x) and x.dtype.kind == "f", "features (L, C)")
    with np.errstate(over="ignore"):
        expect(np.isfinite(x.astype(np.float32)).all(), "finite")


def array(content):
    expect(content[:6] == b"\x93NUMPY" and content[6] in (1, 2, 3), "magic")
    size = 2 if content[6] == 1 else 4
    begin = 8 + size + int.from_bytes(content[8 : 8 + size], "little")
    header = ast.literal_eval(content[8 + size : begin].decode("latin-1").strip())
    dtype, shape = np.dtype(header["descr"]), header["shape"]
    count = math.prod(shape)
    expect(min(shape) >= 0 and count * dtype.itemsize <= len(content) - begin, "shape")
    check_features(np.frombuffer(content, dtype, count, begin).reshape(shape))


def hdf5(content):
    with h5py.File(io.BytesIO(content), "r") as file:
        for node in file.values():
            for _ in range(8):
                if isinstance(node, h5py.Group):
                    expect(len(node) == 1, "entries")
                    node = next(iter(node.values()))
            expect(node.size < 10**6, "size")
            check_features(node[()])


def frames(content):
    begin = 40 + int.from_bytes(content[18:22], "little")
    infos = [content[40:begin]] if content[8:10] + content[30:40] == b"\0\0video.json" else []
    with contextlib.suppress(Exception), zipfile.ZipFile(io.BytesIO(content)) as archive:
        infos.append(archive.read("video.json"))
    found = 0
    for info in map(json.loads, infos):
        fps, seconds, count = (info[key] for key in ("fps", "duration_sec", "num_frames"))
        consistent = min(fps, seconds, count) > 0 and 0.5 < fps * seconds / count < 2
        ascending = all(a < b for a, b in itertools.pairwise([-1, *info["frames"], count]))
        found += consistent and ascending and len(info["frames"]) > 0
    expect(found, "video.json")


def used(path):
    """Return the tensors of a file by name: counts of batches are not used, DDP adds module."""
    tensors = torch.load(path, weights_only=True)["model"].items()
    return {k.removeprefix("module."): x for k, x in tensors if "num_batches" not in k}


def weights(content):
    found, valid = used(io.BytesIO(content)), used("before")
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(io.BytesIO(content)) as archive:
        expect(archive.testzip() is None, "check sums")
    expect(found.keys() == valid.keys(), "names")
    # A single number is one in either shape.
    expect(all((x.shape or (1,)) == (valid[k].shape or (1,)) for k, x in found.items()), "shapes")
    expect(all(x.isfinite().all() for x in found.values()), "finite")


def seconds_of(text):
    """Return the seconds of 12.5 or 1:02:03.5."""
    return math.fsum(60**i * float(x) for i, x in enumerate(text.split(":")[::-1]))


def csv(content):
    text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    mark = next((mark for mark in "\t;" if mark in text.partition("\n")[0]), ",")
    lines = csv_module.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    header, *rows = ([cell.strip() for cell in cells] for cells in lines if any(cells))
    header = [name.lower() for name in header]
    expect({"path", "label"} <= set(header) <= {"path", "label", "start", "end", "split"}, header)
    for row in rows:
        expect(len(row) <= len(header), "cells")
        cells = dict(zip(header, row, strict=False))
        expect(cells["path"] and cells["label"], "path, label")
        expect(cells.get("split") in (None, "", "train", "val"), "split")
        begin, end = (seconds_of(cells.get(k) or other) for k, other in TIMES)
        expect(0 <= begin < end, "times")


TIMES = (("start", "0"), ("end", "inf"))
