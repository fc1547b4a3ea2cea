"""README.md and docs/ tell what is so: snippets run, examples are read, links lead somewhere."""

import importlib
import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from processes import ENV, Process

import config
import data
import evaluate
import media
import pretrain
import sola
from tools import check_data

ROOT = Path(config.HERE)
DOCS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "CONTRIBUTING.md"]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in DOCS}
# Other pages are linked to and have links of their own.
LINKED = [*PAGES, "CHANGELOG.md", "reproduce/README.md", "benchmarks/README.md"]
ALONE = {"tsm", "video_encoders", "gtad", "bmn", "sola", "evaluate", "media"}
METHOD = "docs/method.md"  # has the BibTeX
NO_KEYS = (".py", ".yaml", ".json", ".pt", ".md")
FENCE = re.compile(r"^```(\w*) ?([\w/.]*)\n(.*?)^```$", re.S | re.M)

pages = pytest.mark.parametrize("page", PAGES)


def read(page):
    return PAGES.get(page) or (ROOT / page).read_text(encoding="utf-8")


def blocks(page, language):
    return [code for kind, _, code in FENCE.findall(PAGES[page]) if kind == language]


def prose(text):
    """Return a page without its blocks of code."""
    return FENCE.sub("", text)


# ---------------------------------------------------------------------------------------- the page


def test_readme_is_one_page():
    text = PAGES["README.md"]
    assert len(text.splitlines()) <= 150
    assert len(text.encode()) <= 8192


@pages
def test_sentences_are_wrapped(page):
    """Rows of tables and lines of code are as long as they have to be."""
    lines = [line for line in prose(PAGES[page]).splitlines() if not line.startswith("|")]
    assert max(lines, key=len)[120:] == ""


def test_readme_has_the_two_commands_of_the_ci():
    first, second = re.findall("^python3 -m venv.*", PAGES["README.md"], re.M)
    assert first.endswith("./train.sh") and second.endswith("python -m pytest -q")


def test_workflows_run_what_readme_tells_on_the_python_that_it_needs():
    steps = {}
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        (job,) = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()
        steps[path.stem] = " ".join(step.get("run", "") for step in job["steps"])
        versions = job.get("strategy", {}).get("matrix", {}).get("python-version")
        assert versions in (None, ["3.10", "3.13"])
    assert "grep '^python3 -m venv' README.md | tail -n 1" in steps["tests"]
    assert ".ci/run" in steps["nightly"] and (ROOT / ".ci/run").exists()
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'requires-python = ">=3.10"' in project


def test_the_version_and_what_is_required_stand_in_pyproject_alone():
    version = re.search('^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert f"## {version}" in read("CHANGELOG.md")
    assert not re.search("^version:", read("CITATION.cff"), re.M)
    assert not list(ROOT.glob("*requirements*.txt")) and not (ROOT / "setup.py").exists()


def test_citations_are_those_of_the_papers():
    cited = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    for paper in cited["references"]:
        assert paper["url"] in PAGES["README.md"] and f"{{{paper['title']}}}" in read(METHOD)


def test_a_page_of_docs_begins_with_a_title_and_what_it_answers():
    for page in PAGES.keys() - {"README.md"}:
        title, empty, answer, *_ = PAGES[page].splitlines()
        assert title.startswith("# ") and not empty, page
        assert answer and not answer.startswith(("#", "|", "-", "```", "!")), page


# ---------------------------------------------------------------------------------------- snippets

SNIPPETS = {
    "README.md": blocks("README.md", "python")[0].split("\n\n"),
    "docs/modules.md": blocks("docs/modules.md", "python"),
}


def copied(snippet):
    """Return the module that a snippet shows, and the files that it needs."""
    words = " ".join(re.findall(r"^(?:from|import) (.*)", snippet, re.M))
    names = [name for name in re.findall(r"\w+", words) if name in ALONE]
    return names[0], {*names, *(["gtad"] if "bmn" in names else [])}


@pytest.mark.parametrize("module", sorted(ALONE))
def test_snippets_run_beside_the_files_that_they_import(module, tmp_path):
    snippets = [s for page in SNIPPETS.values() for s in page if copied(s)[0] == module]
    for name in copied(snippets[0])[1]:
        (tmp_path / f"{name}.py").write_text((ROOT / f"{name}.py").read_text())
    code = "\n".join(snippets)
    process = Process("-c", code, cwd=tmp_path, env={**ENV, "PYTHONPATH": ""})
    assert process.wait() == 0, process.read(2)


@pytest.mark.parametrize("page", SNIPPETS)
def test_every_module_that_can_be_copied_has_a_snippet(page):
    assert sorted(copied(snippet)[0] for snippet in SNIPPETS[page]) == sorted(ALONE)


def test_a_trained_sola_stands_in_front_of_another_head(tmp_path):
    (snippet,) = blocks("docs/sola.md", "python")
    path = tmp_path / re.search(r'SoLa.load\("(.*?)"', snippet)[1]
    path.parent.mkdir(parents=True)
    module = sola.SoLa(8)
    torch.save({"model": module.state_dict(), **module.sizes}, path)
    (tmp_path / "sola.py").write_text((ROOT / "sola.py").read_text())
    before = "import torch\nhead = torch.nn.Identity()\n"
    process = Process("-c", before + snippet, cwd=tmp_path, env={**ENV, "PYTHONPATH": ""})
    assert process.wait() == 0, process.read(2)


# ------------------------------------------------------------------------------------ data formats


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Make every example of docs/data_formats.md in a folder."""
    folder = tmp_path_factory.mktemp("formats")
    for name in ("frames", "features"):
        (folder / "data" / name).mkdir(parents=True)
    for _, path, content in FENCE.findall(PAGES["docs/data_formats.md"]):
        if path:
            (folder / path).write_text(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for snippet in blocks("docs/data_formats.md", "python"):
            exec(snippet, {})
    return folder / "data"


def test_examples_of_annotations_are_read(examples, capsys):
    subsets = data.load_annotations(f"{examples}/annotations.json")
    assert [video.name for video in subsets["training"]] == ["a"]
    assert subsets["validation"][0].segments.tolist() == [[2.0, 7.5]]
    table = data.load_annotations(f"{examples}/annotations.csv")
    assert table["training"][0].segments.tolist() == [[1.5, 4.0], [5.5, 7.0]]
    assert table["training"][0].labels == ("jump", "run, slowly")
    assert [(video.name, video.labels) for video in table["validation"]] == [("b", ())]
    known = data.fill_durations(table["training"], durations=f"{examples}/durations.json")
    assert known[0].duration == 8.0
    paths = {kind: f"{examples}/{kind}" for kind in ("frames", "features")}
    words = ["--frames", paths["frames"], "--features", paths["features"]]
    assert not check_data.main(["--annotations", f"{examples}/annotations.json", *words])
    assert "0 problems" in capsys.readouterr().out


def test_examples_of_frames_and_features_are_read(examples):
    found = media.find_media(f"{examples}/frames", ["a", "v_b"])
    video = media.open_media(found["v_b"])
    assert (video.fps, video.num_frames, video.duration) == (8.0, 64, 8.0)
    assert video.read([17]).float().mean().round() == 64  # of frame 16, the nearest one kept
    paths = data.find_features(f"{examples}/features", ["a", "b"])
    assert data.read_features(paths["a"]).shape == (32, 8)
    (info,) = data.read_feature_info(f"{examples}/features")
    assert info["videos"]["a"]["duration_sec"] == 8.0


def test_examples_of_scores_clips_and_results_are_read(examples):
    scores, labels = evaluate.load_class_scores(f"{examples}/class_scores.json", ["b"])
    assert (scores.tolist(), labels) == ([[0.9, 0.1]], ["jump", "run"])
    scores, labels = evaluate.load_class_scores(f"{examples}/class_scores_by_label.json", ["b"])
    assert (scores.tolist(), labels) == ([[0.9]], ["jump"])
    clips = pretrain.load_clips("acp", {"source": f"{examples}/clips.csv", "media": None})
    assert (len(clips.train), len(clips.val), clips.classes) == (1, 1, ["jump"])
    assert media.open_media(clips.val[0].path).num_frames == 64
    truth, found = f"{examples}/annotations.json", f"{examples}/result.json"
    assert np.isclose(evaluate.evaluate(truth, found)["mAP"]["0.9"], 1.0)  # tIoU 5 / 5.5


def test_every_format_with_a_name_has_an_example():
    listed = set(re.findall(r"`(data\.\w+|\w+\.class_scores)` \|", PAGES["docs/data_formats.md"]))
    named = {path for _, path, _ in FENCE.findall(PAGES["docs/data_formats.md"]) if path}
    assert len(listed) == 5 and len(named) == 8
    for kind, _, content in FENCE.findall(PAGES["docs/data_formats.md"]):
        assert kind != "json" or json.loads(content)


# ---------------------------------------------------------------------------------- links and paths


def anchors(page):
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", read(page)), re.M)
    words = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {word.replace(" ", "-") for word in words}


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(read(page))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        path = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        assert (ROOT / path).exists(), target
        assert not anchor or anchor in anchors(path), target


def test_every_page_of_docs_is_linked_from_readme():
    linked = re.findall(r"\]\((docs/[\w.]+)", PAGES["README.md"])
    assert {page for page in PAGES if page.startswith("docs/")} <= set(linked)


@pages
def test_files_that_a_page_names_exist(page):
    folders = "configs|benchmarks|tests|docs|reproduce|tools"
    pattern = rf"(?<![\w/])(?:{folders})/[\w./]+\.(?:yaml|py|md|png|sh)"
    for path in set(re.findall(pattern, PAGES[page])):
        assert (ROOT / path).exists(), path


# ------------------------------------------------------------------------------ commands and keys


def commands(page):
    """Return the words after `python` of commands, in blocks of code and in sentences."""
    inline = re.findall(r"`((?:python|torchrun) [^`]*)`", prose(PAGES[page]))
    lines = [*"".join(code for _, _, code in FENCE.findall(PAGES[page])).splitlines(), *inline]
    found = [
        shlex.split(line, comments=True) for line in lines if re.match("python |torchrun", line)
    ]
    return [
        words[words.index("lofi_tal.py") :] if "lofi_tal.py" in words else words[1:]
        for words in found
    ]


@pages
def test_commands_name_programs_and_options_that_exist(page):
    for words in commands(page):
        module = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
        if module in ("pytest", "venv", "ruff"):
            continue
        source = ROOT / f"{module.replace('.', '/')}.py"
        text = source.read_text(encoding="utf-8")
        for option in (word.partition("=")[0] for word in words if word.startswith("--")):
            is_config = "from_command_line" in text and option in ("--cfg", "--set")
            assert is_config or option == "--help" or f'"{option}"' in text, " ".join(words)


@pages
def test_runs_that_a_page_starts_have_valid_configs(page):
    for words in commands(page):
        if (words[0] == "lofi_tal.py" or "tools.dry_run" in words) and "CONFIG" not in words:
            cfg = config.from_command_line("", words[words.index("--cfg") :])
            assert set(config.check(cfg, files=False)) <= set(cfg.stages)


@pages
def test_config_keys_that_a_page_sets_exist(page):
    keys = config.flatten(config.load_config(str(ROOT / "configs/default.yaml")))
    blocks = {key.split(".")[0] for key in keys if "." in key}
    pattern = rf"(?<![\w/])((?:{'|'.join(blocks)})\.[a-z_]+(?:\.[a-z_]+)?)(?=[=:`])"
    named = {key for key in re.findall(pattern, PAGES[page]) if not key.endswith(NO_KEYS)}
    known = {*keys, *(key.rpartition(".")[0] for key in keys)}
    assert {key for key in named if not is_code(key)} <= known


def is_code(word):
    """Return whether a word such as data.Video or sola.py is a file here, or something in one."""
    module, _, name = word.partition(".")
    exists = (ROOT / f"{module}.py").exists()
    return exists and (name == "py" or hasattr(importlib.import_module(module), name))


def test_what_the_papers_table_names_is_there():
    with open("docs/paper.md", encoding="utf-8") as file:
        words = re.findall(r"`([^`]+)`", file.read().partition("## Rows")[0])
    keys = config.flatten(config.load_config("configs/default.yaml"))
    modules = {path.removesuffix(".py") for path in os.listdir() if path.endswith(".py")}
    count = 0
    for word in words:
        module, _, names = word.partition(".")
        is_code = module in modules and re.fullmatch(r"\w+(\.\w+)?", names)
        if is_code and names != "py" and word not in keys:
            found = importlib.import_module(module)
            for name in names.split("."):
                found = getattr(found, name)
            count += 1
        for key in re.findall(r"\b([a-z]+\.[a-z_]+)(?=[=:] ?\S)", word):
            assert key in keys or key in {"fidelities.S"}, key
            count += 1
    assert count > 60


def test_every_key_of_the_default_config_is_explained():
    with open(ROOT / "configs/default.yaml") as file:
        lines = file.read().splitlines()
    in_flow = 0
    for line in lines:
        is_flow = line.lstrip().startswith("{") or in_flow
        in_flow = in_flow + line.count("{") - line.count("}")
        key = re.match(r"\s*\w+:", line)
        if key and not is_flow and " # " not in line:
            # What needs no word of its own: blocks, and options that block lofi explains.
            assert line.endswith(":") or line.strip().split(":")[0] in OBVIOUS, line


OBVIOUS = (
    *("epochs", "optimizer", "lr", "momentum", "weight_decay", "schedule"),
    *("lr_step_epochs", "lr_gamma", "warmup_fraction", "clip_grad_norm", "standardize"),
)
