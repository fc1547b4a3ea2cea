"""Change the content of one file of every kind that the programs read, for tests/fuzz.py.

Each function takes a random.Random, a file's bytes and its path, and returns other bytes and words
that say what was done.
"""

import contextlib
import io
import json
import math
import re
import struct
import zipfile

import h5py
import numpy as np
import torch

VALUES = [None, True, -1, 0, 1, 2, 0.5, 1e300, math.nan, math.inf, -math.inf, 10**400, 2**63]
VALUES += ["", "x", "15", "nan", "1e3", [], {}, [1], [[[]]], {"a": 1}, [0, 1], [1.5, 0.5], ["a"]]
VALUES += ["x" * 100_000, "\ud800", "\x1b[2J", "a\0b", "../up", "training", "/dev/null", -0.0]
VALUES += [1e-320, 1e16, -1e9]
DEEP = '"deep"'
METHODS = {"deflate": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}
ENCODINGS = ["utf-8-sig", "utf-16", "utf-32", "utf-16-be"]


def mutate_bytes(rng, content, path=None):
    """Flip, cut, insert, repeat or blank bytes."""
    at, length = rng.randrange(len(content) + 1), rng.choice([1, 2, 8, 200])
    kind = rng.choice(["flip", "flip", "cut", "drop", "insert", "repeat", "zero", "empty"])
    if kind == "flip":
        changed = bytearray(content)
        for _ in range(rng.choice([1, 1, 8])):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed), kind
    middle = {"insert": rng.randbytes(length), "repeat": 2 * content[at : at + length]}
    middle |= {"zero": bytes(length)}
    end = content[at + length * (kind != "insert") :]
    content = b"" if kind == "empty" else content[:at] + middle.get(kind, b"")
    return content if kind in ("cut", "empty") else content + end, f"{kind} {length} bytes at {at}"


def places(tree, path=()):
    """Yield (container, key, path) of every value in a tree."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield tree, key, (*path, key)
        if isinstance(tree[key], (dict, list)):
            yield from places(tree[key], (*path, key))


def mutate_tree(rng, tree):
    """Change one place of a tree; return it, what was done, and a key to write twice."""
    found = {}
    for place in places(tree):
        found.setdefault(len(place[2]), []).append(place)
    if not found or rng.random() < 0.03:
        return rng.choice(VALUES), "replace all", None
    container, key, path = rng.choice(found[rng.choice(list(found))])
    where = ".".join(map(str, path))[:100]
    kinds = ["replace", "replace", "replace", "drop", "rename", "twice", "deep", "number"]
    kind = rng.choice(kinds)
    if kind == "number" and isinstance(container[key], (int, float)):
        with contextlib.suppress(OverflowError):
            container[key] *= rng.choice([-1, 0, 1.5, 1e6, 1e-6])
    elif kind == "drop":
        del container[key]
    elif kind == "deep":
        container[key] = "deep"
    elif kind in ("rename", "twice") and isinstance(container, dict):
        other = rng.choice(["x", "", "v_x", "a/b", "\ud800", "1"])
        container["twice" if kind == "twice" else other] = container[key]
        if kind == "rename":
            del container[key]
        return tree, f"{kind} {where}", key
    else:
        kind = rng.randrange(len(VALUES))
        container[key] = VALUES[kind]
        kind = f"replace by {VALUES[kind]!r:.40}"
    return tree, f"{kind} {where}", None


def mutate_json(rng, content, path=None):
    """Change a value, a key, the encoding or bytes of JSON."""
    if rng.random() < 0.2:
        return mutate_bytes(rng, content)
    encoding = rng.choice(ENCODINGS) if rng.random() < 0.05 else "utf-8"
    tree, words = json.loads(content), ""
    for _ in range(rng.choice([1, 1, 1, 2])):
        tree, more, key = mutate_tree(rng, tree)
        words += f"{more}; "
        if not isinstance(tree, (dict, list)):
            break
    text = json.dumps(tree)
    if key is not None:
        text = text.replace('"twice"', json.dumps(key))
    depth = rng.choice([3, 500, 100_000])
    text = text.replace(DEEP, "[" * depth + "]" * depth)
    return text.encode(encoding, "surrogatepass"), f"{words}{encoding}"


def mutate_lines(rng, content, path=None):
    """Change one line of a file of JSON objects."""
    lines = content.splitlines()
    i = rng.randrange(len(lines))
    lines[i], words = mutate_json(rng, lines[i])
    return b"\n".join(lines), f"line {i}: {words}"


YAML = """
null|~||true|-1|0|0.0|1|2|3|7|1.5|1e-4|1e3|.nan|.inf|-.inf|1e400|1_000|0x1F|012|1:30|x|[]|{}|[1]
[1, 2]|[0, 0]|[-1, 2]|[1.5, 2]|[[1, 2]]|[8, 8]|{a: 1}|{S: [1]}|{S: 5}|{S: [a, b]}|{S: null}|[S]
[S, S]|[full]|[T, x]|full|'x'|&a [*a]|&a {b: *a}|*a|!!python/object:os.system x|!!binary aGk=
!!set {a}|? a|- a|[|]|"|%|@|`|{1: 2}|{null: 1}|{[1]: 2}|[null]|[.nan, .inf]|['a', 1]|no
2024-01-15|!!timestamp x|/dev/null|run|data|run/head/head.pt|lofi|[lofi]|[head, detect]
[sola, head, detect]|[detect]|[pretrain]|[x]|cosine|step|adam|adamw|bmn|gtad|ground_truth|own
cuda|cpu|bfloat16|batch|train|recalibrate|arrow|acp_plus|random|torchvision|icp|speed|r3d_18
mvit_v2_s|!!float x|!!int x|!!map x|{<<: 1}|{<<: [1]}"""
YAML = [*YAML[1:].replace("\n", "|").split("|"), "9" * 400, "x" * 5000, "[" * 3000, "\0", "\ud800"]
YAML += ["a: b: c", "&a [&b [*a, *a], *b]", "#", "\t", "a\n  b\n c", str(2**63), "\U0001f600"]


def mutate_set(rng, content, path=None):
    """Make up --set key=value words, for the keys of a config."""
    with open("flat.json") as file:
        flat = json.load(file)
    blocks = sorted({key.rpartition(".")[0] for key in flat})
    keys = [*flat, *flat, *blocks, "x", "lofi.x", "a.b.c", ".", ""]
    words = []
    for _ in range(rng.choice([1, 1, 2])):
        key, value = rng.choice(keys), rng.choice(YAML)
        if rng.random() < 0.2:
            value = mutate_bytes(rng, str(flat.get(key)).encode())[0].decode(errors="replace")
        words.append(rng.choice([f"{key}={value}"] * 20 + [key, f"{key}==", f"{key}.x={value}"]))
    return json.dumps(words).encode(), str(words)[:200]


def mutate_yaml(rng, content, path=None):
    """Change a config file as JSON, which YAML holds, or a value to YAML's own words."""
    if rng.random() < 0.4:
        return mutate_json(rng, content)
    tree = json.loads(content)
    container, key, where = rng.choice([*places(tree)])
    container[key] = "word"
    word = rng.choice(YAML)
    text = json.dumps(tree).replace('"word"', word)
    return text.encode(errors="surrogatepass"), f"{where} = {word!r:.60}"


def mutate_array(rng, content, path=None):
    """Change an .npy file: its header, its numbers or its bytes."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, content)
    x = np.load(io.BytesIO(content)).copy()
    # Of some, too large for their type.
    np.seterr(all="ignore")
    types = ("f2", "f8", ">f4", "i4", "u1", "?", "c8", "S3", "U2", "O")
    arrays = [x.astype(t) for t in types]
    arrays += [x[0], x[None], x[:0], x[:, :0], x[:1], x[:, :3], x.T, np.asfortranarray(x), x * 1e39]
    arrays += [x.astype("f8") * 1e300, np.array(1.0), np.zeros(4, "f4,i4"), np.repeat(x, 100, 0)]
    arrays += [np.where(rng.random() < 0.5, x, bad).astype("f4") for bad in (np.nan, np.inf)]
    x[rng.randrange(len(x)), 0] = rng.choice([np.nan, np.inf, -np.inf, 3e38, 1e-45])
    arrays += [x, x]
    file, k = io.BytesIO(), rng.randrange(len(arrays) + 10)
    if k < len(arrays):
        np.save(file, arrays[k], allow_pickle=True)
    elif k == len(arrays):
        np.savez(file, x)
    else:
        shapes = ["(9, -16)", "(1000000000, 64)", "(8,)", "(8, 64, 1)", "(8, 65)", "(0, 64)"]
        shape = rng.choice([*shapes, "(8, 0)", f"({2**62}, 4)", "None", "8", "('a', 1)", "()"])
        descr = rng.choice(["'<f4'"] * 4 + ["'|O'", "'<f3'", "[('a', '<f4')]", "None", "'<f4', 1"])
        header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        length = rng.choice([len(header)] * 5 + [0, 5, 65535])
        version = rng.choice([b"\1\0", b"\1\0", b"\2\0", b"\x09\0"])
        file.write(b"\x93NUMPY" + version + struct.pack("<H", length) + header + content[128:])
    return file.getvalue(), f"array {k}"


def mutate_hdf5(rng, content, path):
    """Change the entry of a video in an HDF5 file, or the file's bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, content)
    with h5py.File(path, "a") as file:
        name = rng.choice(list(file))
        x = file.pop(name)[()]
        kinds = ["array", "group", "soft", "loop", "external", "huge", "text", "empty", "gone"]
        kind = rng.choice(kinds)
        if kind == "array":
            np.save(buffer := io.BytesIO(), x)
            array, _ = mutate_array(rng, buffer.getvalue())
            with contextlib.suppress(Exception):
                file[name] = np.load(io.BytesIO(array), allow_pickle=True)
        elif kind == "group":
            depth = rng.choice([1, 2, 7, 8, 9, 30])
            file["/".join([name] * (depth + 1))] = x
            if rng.random() < 0.3:
                file[f"{name}/other"] = x
        elif kind == "huge":
            shape = rng.choice([(10**9, 10**3), (2**40, 2**40), (2**20, 64)])
            file.create_dataset(name, shape, rng.choice(["f4", "f8"]), chunks=(8, 8))
        elif kind == "text":
            file[name] = rng.choice(["text", ["a", "b"], np.array([b"x", b"y"]), 1.5, [[1, 2]]])
        elif kind == "empty":
            file[name] = h5py.Empty("f4")
        elif kind == "loop":
            group = file.create_group(name)
            group[name] = group
        elif kind != "gone":
            soft = h5py.SoftLink(rng.choice([f"/{name}", "/nowhere", "/"]))
            files = ["nowhere.h5", "data/annotations.json", "feats.h5"]
            away = h5py.ExternalLink(rng.choice(files), "/")
            file[name] = soft if kind == "soft" else away
    with open(path, "rb") as file:
        return file.read(), f"{kind} {name}"


def damage_jpeg(rng, jpeg):
    """Return a JPEG that is damaged, no JPEG, or one whose header tells another size."""
    at = jpeg.find(b"\xff\xc0")
    sizes = [(60_000, 60_000), (0, 0), (8000, 8000), (5, 7)]
    resized = [jpeg[: at + 5] + struct.pack(">HH", *size) + jpeg[at + 9 :] for size in sizes]
    return rng.choice([b"", b"\xff\xd8", mutate_bytes(rng, jpeg)[0], b"\x89PNG", *resized])


def mutate_zip(rng, content, path=None):
    """Change the members of a ZIP of frames, its video.json or its bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    i = rng.randrange(1, len(members))
    name, jpeg = members[i]
    changed, words = mutate_json(rng, members[0][1])
    kinds = ["json", "json", "json", "lock", "rename", "drop", "damage", "order", "bomb", "large"]
    kind = rng.choice([*kinds, *METHODS])
    replaced = {"json": (0, "video.json", changed), "damage": (i, name, damage_jpeg(rng, jpeg))}
    replaced |= {"bomb": (i, name, bytes(60_000_000)), "rename": (i, f"x{name}", jpeg)}
    replaced["large"] = (0, "video.json", members[0][1] + b" " * 60_000_000)
    if kind in replaced:
        at, *member = replaced[kind]
        members[at] = member
    elif kind == "order":
        rng.shuffle(members)
    elif kind == "drop":
        del members[i]
    method = METHODS.get(kind, zipfile.ZIP_DEFLATED if kind in ("bomb", "large") else 0)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, member in members:
            archive.writestr(zipfile.ZipInfo(name), member, method)
    changed = file.getvalue()
    if kind == "lock":  # the bit of an encrypted member, in both its headers
        header = re.compile(rb"(PK\x03\x04..|PK\x01\x02....)\x00", re.DOTALL)
        changed = header.sub(lambda found: found[1] + b"\1", changed)
    return changed, f"{kind}: {words if kind == 'json' else i}"


def mutate_folder(rng, content, path):
    """Change an image or the video.json in a folder of frames."""
    if path.endswith(".json"):
        return mutate_json(rng, content)
    return damage_jpeg(rng, content), "image"


def mutate_weights(rng, content, path=None):
    """Change an entry of a file that torch wrote, or its bytes."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, content)
    state = torch.load(io.BytesIO(content), weights_only=True)
    found = [*places(state)]
    container, key, where = rng.choice(found if rng.random() < 0.6 else found[:8])
    x = container[key]
    kind = rng.choice(["drop", "value", "rename", "tensor", "tensor", "tensor", "all", "old"])
    if kind == "tensor" and torch.is_tensor(x):
        changed = [x[None], x.flatten()[:1], x.double(), x.long(), x.bool(), x * math.nan]
        changed += [x.flatten()[:0], torch.zeros(10**6), x.cfloat(), x.half(), x * 1e30]
        changed += [x.to_sparse() if x.ndim else x]
        kind = rng.randrange(len(changed))
        container[key] = changed[kind]
    elif kind == "drop":
        del container[key]
    elif kind == "rename" and isinstance(container, dict):
        container[rng.choice(["x", 5, "module." + str(key)])] = container.pop(key)
    elif kind == "all":
        state = rng.choice([*VALUES, torch.zeros(3), [state], {"model": state}])
    elif kind != "old":
        container[key] = rng.choice(VALUES)
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=kind != "old")
    return file.getvalue(), f"{kind} {where}"


def mutate_csv(rng, content, path=None):
    """Change cells, columns, quotes, line ends, the encoding or bytes of a CSV file."""
    if rng.random() < 0.25:
        return mutate_bytes(rng, content)
    rows = [line.split(",") for line in content.decode().split()]
    cells = ["", "-1", "nan", "inf", "1e400", "x", '"', '"a', "a,b", "'", "x" * 200_000, "\0"]
    cells += [
        "train",
        "../up",
        "\ud800",
        "0",
        "3",
        "é",
        "=1+1",
        " 1",
        "path",
        "label",
        "1\r2",
        "/dev/null",
    ]
    for _ in range(rng.choice([1, 1, 2])):
        row = rng.choice([rows[0], *rows[:3], *rows])
        i = rng.randrange(len(row))
        row[i : i + rng.choice([0, 1, 1, 1])] = rng.choice([[], *([cell] for cell in cells)])
    if rng.random() < 0.1:
        rng.shuffle(rows)
    text = rng.choice(["\n"] * 9 + ["\r", "\r\n", "\n\n"]).join(map(",".join, rows))
    text = text.replace(",", rng.choice([","] * 15 + [";", "\t"]))
    encoding = rng.choice(["utf-8"] * 9 + ENCODINGS)
    return text.encode(encoding, "surrogatepass"), f"cells, {encoding}"


def mutate_table(rng, content, path=None):
    """Change cells of a table of annotations, or its bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, content)
    mark = "\t" if b"\t" in content else ","
    rows = [line.split(mark) for line in content.decode().splitlines()]
    cells = [
        "",
        "-1",
        "nan",
        "1e400",
        "x",
        '"',
        "x" * 200_000,
        "\0",
        "\ud800",
        "1:30",
        "0:0:0:1",
        "3",
    ]
    cells += [
        "STOP",
        "START",
        "[1, 2]",
        "{",
        '{"1": "a"}',
        "[]",
        "#",
        "1,5",
        "video",
        "v.mp4",
        "../up",
    ]
    for _ in range(rng.choice([1, 1, 2])):
        row = rng.choice(rows) or [""]
        i = rng.randrange(len(row))
        row[i : i + rng.choice([0, 1, 1])] = rng.choice([[], *([cell] for cell in cells)])
    if rng.random() < 0.2:
        rows[rng.randrange(len(rows))] = rng.choice(rows)
    text = rng.choice(["\n"] * 9 + ["\r", "\n\n"]).join(map(mark.join, rows))
    encoding = rng.choice(["utf-8"] * 9 + ENCODINGS)
    return text.encode(encoding, "surrogatepass"), f"cells, {encoding}"


def mutate_archive(rng, content, path=None):
    """Change an array of an .npz file, or its bytes."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, content)
    arrays = dict(np.load(io.BytesIO(content)))
    key = rng.choice(list(arrays))
    array = io.BytesIO()
    np.save(array, arrays.pop(key))
    file = io.BytesIO()
    np.savez(file, **arrays)
    with zipfile.ZipFile(file, "a") as archive:
        changed, words = mutate_array(rng, array.getvalue()) if key != "names" else (b"", "gone")
        archive.writestr(f"{key}.npy", changed)
    return file.getvalue(), f"{key}: {words}"
