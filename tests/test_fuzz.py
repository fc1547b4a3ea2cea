"""A seeded share of the fuzzer's mutations, and that the fuzzer itself sees faults."""

import os
import signal
import sys
import time

import pytest

from tests import fuzz
from tests.fuzz_kinds import Kind, Program
from tests.fuzz_references import strict_json

BOUNDS = fuzz.Bounds(memory=2**28, cpu_sec=2, wall_sec=2)


@pytest.mark.beside("-m", "tests.fuzz", "--count", "30", "--seed", "7")
def test_a_share_of_the_mutations_fails_nowhere(beside):
    output = beside.read(1)
    assert beside.returncode == 0, output[-5000:] + beside.read(2)[-2000:]
    assert "30 mutations, 0 failures" in output
    kinds = [line.split()[0] for line in output.splitlines() if line.endswith(" 0")]
    assert set(fuzz.list_kinds()) <= set(kinds)


def outcome_of(program, tmp_path, reference=None, content=b'{"a": 1}'):
    """Return the outcome of a program on a file that is made to hold `content`."""
    (tmp_path / "file.json").write_text("{}")
    programs = [Program("planted", 1, program, reference)]
    kind = Kind(["file.json"], lambda rng, before, path: (content, "planted"), programs)
    (_, _, words), *steps = fuzz.attempt(kind, str(tmp_path), "0", BOUNDS)
    assert words == "file.json: planted"
    return steps[-1][:2]


def test_valid_files_that_a_program_refuses_are_seen(tmp_path):
    """Else nothing would be tried behind the refusal."""
    (tmp_path / "file.json").write_text("{}")
    for code, expected in ((0, []), (2, ["planted: ['odd', 'refused', '']"])):
        programs = [Program("odd", 0, lambda code=code: code)]
        kinds = {"planted": Kind(["file.json"], None, programs)}
        assert list(fuzz.refused_valid(kinds, str(tmp_path), BOUNDS)) == expected


def stop(message):
    return lambda: sys.exit(message)


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        (lambda: 0, "accepted"),
        (stop("file.json is bad"), "refused"),
        (stop(2), "refused"),
        (lambda: {}["slip"], "traceback"),
        (lambda: print("Traceback (most recent call last)"), "traceback"),
        (lambda: bytearray(2**29), "memory"),
        (stop("out of memory: DefaultCPUAllocator"), "memory"),
        (stop("many\n" * 50), "wordy"),
    ],
)
def test_planted_faults_are_seen(tmp_path, program, outcome):
    assert outcome_of(program, tmp_path) == ["planted", outcome]


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        (lambda: time.sleep(60), "slow"),
        (lambda: any(iter(int, 1)), "slow"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "killed"),
    ],
)
def test_children_that_hang_or_die_are_seen(tmp_path, program, outcome):
    assert outcome_of(program, tmp_path) == ("end", outcome)


def test_silence_about_what_the_reference_refuses_is_seen(tmp_path):
    def warn():
        print("warning: file.json has a key twice")

    for content, expected in ((b'{"a": 1, "a": 2}', "silent"), (b'{"a": 1}', "accepted")):
        found = outcome_of(lambda: 0, tmp_path, strict_json, content)
        assert found == ["planted", expected]
    assert outcome_of(warn, tmp_path, strict_json, b'{"a": 1, "a": 2}') == ["planted", "accepted"]


def test_a_mutation_is_a_function_of_its_number():
    kind = fuzz.list_kinds()["durations"]
    content = b'{"v": 1.5, "w": 2.5}'
    made = [kind.mutate(fuzz.random.Random(f"0 durations {i}"), content, "") for i in (3, 3, 4)]
    assert made[0] == made[1] != made[2]
