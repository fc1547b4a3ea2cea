"""A seeded share of the fuzzer's mutations, and that the fuzzer itself sees faults."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests import fuzz
from tests.fuzz_kinds import Kind, Program
from tests.fuzz_references import strict_json

BOUNDS = fuzz.Bounds(memory=2**28, cpu_sec=2, wall_sec=2)


def test_a_share_of_the_mutations_fails_nowhere():
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.fuzz", "--count", "84", "--seed", "7"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "84 mutations, 0 failures" in done.stdout
    kinds = [line.split()[0] for line in done.stdout.splitlines() if line.endswith(" 0")]
    assert set(fuzz.list_kinds()) <= set(kinds)


def outcome_of(program, tmp_path, reference=None, content=b'{"a": 1}'):
    """Return the outcome of a program on a file that is made to hold `content`."""
    (tmp_path / "file.json").write_text("{}")
    programs = [Program("planted", 1, program, reference)]
    kind = Kind(["file.json"], lambda rng, before, path: (content, "planted"), programs)
    (_, _, words), *steps = fuzz.attempt(kind, str(tmp_path), "0", BOUNDS)
    assert words == "file.json: planted"
    return steps[-1][:2]


def test_what_is_valid_is_accepted_by_every_program(tmp_path):
    """Else nothing would be tried behind the refusal."""
    code = """if True:
        import tempfile
        from tests import fuzz
        with tempfile.TemporaryDirectory() as base:
            fuzz.make_inputs(base)
            kinds = fuzz.list_kinds()
            kinds["set"].mutate = lambda rng, content, path: (b'["seed=0"]', "nothing")
            for name, kind in kinds.items():
                if name != "set":
                    kind.mutate = lambda rng, content, path: (content, "nothing")
                kind.programs = [program._replace(share=1) for program in kind.programs]
                steps = fuzz.attempt(kind, base, "0", fuzz.Bounds())
                bad = [s for s in steps[1:] if s[1] not in ("running", "accepted")]
                print("".join(f"{name}: {s}" + chr(10) for s in bad), end="")
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0), done.stderr


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
