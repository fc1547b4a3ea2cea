"""What README.md says is so: its snippets run, its configuration reference is the code's, what it names exists."""
import os
import re
import subprocess
import sys

import pytest
import torch

import config
import sola

TEXT = open("README.md").read()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[re.search(r"from (\w+)", s).group(1) for s in SNIPPETS])
def test_snippets_run_with_the_one_file_that_they_import(snippet, tmp_path):
    """Copied into an empty folder, beside nothing. An expression at a line's end is followed by what it gives."""
    module = re.search(r"from (\w+)", snippet).group(1)
    if module == "localize":
        pytest.skip("needs a run and a video: tests/test_localize.py has these lines")
    (tmp_path / f"{module}.py").write_text(open(f"{module}.py").read())
    before = ""
    if "SoLa.load(" in snippet:  # a trained module, and somebody else's head
        path = tmp_path / re.search(r'SoLa.load\("(.*?)"', snippet).group(1)
        path.parent.mkdir(parents=True)
        torch.save({"model": sola.SoLa(8).state_dict(), **sola.SoLa(8).sizes}, path)
        before = "import torch\nhead = torch.nn.Identity()\n"
    done = subprocess.run([sys.executable, "-c", before + snippet], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr


def test_every_module_that_can_be_copied_has_a_snippet():
    assert {"tsm", "gtad", "sola", "evaluate"} <= {re.search(r"from (\w+)", s).group(1) for s in SNIPPETS}


def test_the_configuration_reference_is_the_codes():
    reference = config.reference()
    assert reference in TEXT, "README's configuration reference is not what `python config.py` prints"
    rows = [line.split(" | ") for line in reference.splitlines()[2:]]
    assert {row[0].strip("| `") for row in rows if row[1].strip()} >= {k for k in config.flat(config.read_yaml("configs/default.yaml")) if k.count(".") < 2}
    lacking = [row[0] for row in rows if row[1].strip() and not row[2].strip(" |")]
    assert not lacking, f"no meaning in configs/default.yaml beside {lacking}"


def test_files_that_it_names_exist():
    for path in set(re.findall(r"(?:configs|benchmarks|tests|docs)/[\w./]+\.(?:yaml|py|md|png)", TEXT)):
        assert os.path.exists(path), path
    for command in set(re.findall(r"python (\w+\.py)", TEXT)):
        assert os.path.exists(command), command


def test_every_key_that_it_sets_exists():
    """`key.sub=value` and `key.sub: value` in the text."""
    keys = config.flat(config.read_yaml("configs/default.yaml"))
    blocks = {k.split(".")[0] for k in keys if "." in k}
    for key in set(re.findall(r"\b((?:%s)\.[a-z_.]+)(?:=|: )" % "|".join(blocks), TEXT)):
        assert key in keys or key.count(".") == 2 and key.rsplit(".", 1)[0].split(".")[0] in blocks, key
