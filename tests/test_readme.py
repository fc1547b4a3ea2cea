"""What README.md says is so: its snippets run, and the files and config keys it names exist."""

import importlib
import os
import re

import pytest
import torch
from processes import ENV, Process

import config
import sola

with open("README.md", encoding="utf-8") as file:
    TEXT = file.read()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.S)
NO_KEYS = (".py", ".yaml", ".json", ".pt")
MODULES = [re.search(r"from (\w+)", snippet).group(1) for snippet in SNIPPETS]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=MODULES)
def test_a_snippet_runs_beside_the_one_file_that_it_imports(snippet, tmp_path):
    module = re.search(r"from (\w+)", snippet).group(1)
    if module == "localize":
        pytest.skip("needs a run and a video: tests/test_localize.py has these lines")
    with open(f"{module}.py") as source:
        (tmp_path / f"{module}.py").write_text(source.read())
    before = ""
    loaded = re.search(r'SoLa.load\("(.*?)"', snippet)
    if loaded:  # a trained module in front of another head
        path = tmp_path / loaded.group(1)
        path.parent.mkdir(parents=True)
        module = sola.SoLa(8)
        torch.save({"model": module.state_dict(), **module.sizes}, path)
        before = "import torch\nhead = torch.nn.Identity()\n"
    process = Process("-c", before + snippet, cwd=tmp_path, env={**ENV, "PYTHONPATH": ""})
    assert process.wait() == 0, process.read(2)


def test_every_module_that_can_be_copied_has_a_snippet():
    assert {"tsm", "gtad", "sola", "evaluate"} <= set(MODULES)


def test_files_and_programs_that_it_names_exist():
    folders = "configs|benchmarks|tests|docs|reproduce|tools"
    for path in set(re.findall(rf"(?<!runs/)(?:{folders})/[\w./]+\.(?:yaml|py|md|png)", TEXT)):
        assert os.path.exists(path), path
    for command in set(re.findall(r"python (\w+\.py)", TEXT)):
        assert os.path.exists(command), command
    for module in set(re.findall(r"python -m ((?:tools|reproduce)\.\w+)", TEXT)):
        assert os.path.exists(f"{module.replace('.', '/')}.py"), module


def test_every_config_key_that_it_sets_exists():
    keys = config.flatten(config.load_config("configs/default.yaml"))
    blocks = {key.split(".")[0] for key in keys if "." in key}
    named = re.findall(rf"\b((?:{'|'.join(blocks)})\.[a-z_]+(?:\.[a-z_]+)?)(?=[=:`])", TEXT)
    named = {key for key in named if not key.endswith(NO_KEYS)}
    known = {*keys, *(key.rpartition(".")[0] for key in keys)}
    assert named <= known


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
    with open("configs/default.yaml") as file:
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
