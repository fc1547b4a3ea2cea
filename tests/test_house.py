"""The house: which file may import which, what stands alone, and how long things may be."""

import ast
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import Process

import checkpoint
import config
import localizer
import lofi_tal

ROOT = Path(config.__file__).parent
TOP = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
ALONE = ["tsm", "video_encoders", "gtad", "sola", "evaluate", "media"]
# Each may import those after it, bmn only gtad.
ORDER = ["lofi_tal", "localize", "localizer", "pretrain", "config", "checkpoint", "data", "media"]
BELOW = ["bmn", *ALONE]


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """Return the first words of all that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or ".").partition(".")[0])
    return found


def allowed(name):
    if name in ALONE:
        return []
    return ["gtad"] if name == "bmn" else [*ORDER[ORDER.index(name) + 1 :], *BELOW]


def test_every_file_has_its_place():
    assert set(TOP) == {*ORDER, *BELOW}
    assert len(TOP) <= 14


@pytest.mark.parametrize("name", TOP)
def test_imports_run_downwards(name):
    project = {*TOP, "tools", "reproduce", "tests", "benchmarks"}
    assert imports(TOP[name]) & project <= set(allowed(name))


def test_what_stands_alone_is_imported_from_an_empty_folder(tmp_path):
    code = "import importlib, sys\nsys.path.insert(0, '')\n"
    for name in ALONE:
        (tmp_path / name).mkdir()
        shutil.copy(TOP[name], tmp_path / name)
        code += f"sys.path[0] = {str(tmp_path / name)!r}\n"
        code += f"assert importlib.import_module({name!r}).__file__.startswith(sys.path[0])\n"
    process = Process("-c", code, cwd=tmp_path, env={})
    assert (*process.communicate(), process.returncode) == ("", "", 0)


def functions():
    """Yield (place, node) of every function outside of benchmarks."""
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT)
        if place.parts[0] != "benchmarks" and not place.parts[0].startswith("."):
            for node in ast.walk(tree(path)):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield f"{place}:{node.lineno} {node.name}", node


def test_functions_are_short_and_take_few_parameters():
    wrong = []
    for place, node in functions():
        lines = node.end_lineno - node.lineno + 1
        arguments = node.args
        names = [arg.arg for arg in arguments.posonlyargs + arguments.args + arguments.kwonlyargs]
        count = len(set(names) - {"self", "cls"})
        if node.name != "__init__" and (lines > 60 or count > 8):
            wrong.append(f"{place}: {lines} lines, {count} parameters")
    assert not wrong, "\n".join(wrong)


def num_lines(paths):
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def test_files_are_short():
    assert num_lines([TOP["lofi_tal"]]) <= 250
    assert num_lines(TOP.values()) <= 6256


def test_tools_are_short():
    assert num_lines([*ROOT.glob("tools/*.py"), *ROOT.glob("reproduce/*.py")]) <= 2980


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_finds_nothing(command):
    ruff = shutil.which("ruff") or shutil.which("ruff", path=Path(sys.executable).parent)
    if ruff is None:
        pytest.skip("ruff is not installed")
    done = subprocess.run([ruff, *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_input_error_is_the_same_in_the_files_that_stand_alone():
    found = set()
    for name in ("media", "tsm", "video_encoders", "evaluate", "sola"):
        nodes = [node for node in tree(TOP[name]).body if getattr(node, "name", "") == "InputError"]
        assert len(nodes) == 1, name
        found.add(ast.dump(nodes[0]))
    assert len(found) == 1


def test_stages_stand_in_the_same_order_in_config_and_script():
    functions = inspect.getmembers(lofi_tal, inspect.isfunction)
    stages = [f for name, f in functions if name.endswith("_stage")]
    stages.sort(key=lambda function: function.__code__.co_firstlineno)
    names = [function.__name__.removesuffix("_stage") for function in stages]
    assert names == list(config.STAGES)
    source = inspect.getsource(lofi_tal.run_stages)
    places = [source.index(f"{name}_stage") for name in names]
    assert places == sorted(places)


def test_choices_of_the_config_are_those_of_the_code():
    assert config.CHOICES["tal_head"] == tuple(localizer.HEADS)
    assert config.CHOICES["optimizer"] == tuple(checkpoint.OPTIMIZERS)
    if "method" in config.CHOICES:
        assert config.CHOICES["method"] == tuple(lofi_tal.pretrain.METHODS)
