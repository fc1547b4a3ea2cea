"""Mutate the files that the programs read, and see that nothing but a line or a result comes out.

    python -m tests.fuzz [--count 10000] [--seed 0] [--first 0] [--only KIND]

One process makes small valid inputs and a finished run, then forks a child for each mutation, in a
copy of all that, within bounds of memory and time. The child changes one file and runs the programs
that read it. Failures: a traceback, a killed child, memory or time beyond the bounds, a message of
many lines, a refusal only after the training, and silence about a file that a reference refuses.
Mutation i is a pure function of (seed, kind, i): a failure tells the command that repeats it.
"""

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, replace

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import torch

import config
from tests.fuzz_kinds import list_kinds, make_base

COMPLAINT = re.compile(r"warning|left out|FAILED|cannot|[1-9]\d* problems|no class scores|missing")
NO_MEMORY = re.compile(r"MemoryError|out of memory|allocate")
OUTCOMES = ("accepted", "refused")
FAILURES = ("traceback", "killed", "slow", "memory", "wordy", "late", "silent")
OUTCOMES += FAILURES


@dataclass
class Bounds:
    """What a child may take beyond what it starts with: bytes, seconds of CPU and in all."""

    memory: int = 2**30
    cpu_sec: int = 20
    wall_sec: float = 90


def run_program(program, refused, console):
    """Return (outcome, text) of a program in this process."""
    outcome, text = "accepted", ""
    try:
        code = program.run()
    except SystemExit as stop:
        code = stop.code
        text = code if isinstance(code, str) else ""
    except BaseException:
        outcome, text = "traceback", traceback.format_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    printed = console.seek(0) or console.read().decode(errors="replace")
    os.truncate(console.fileno(), 0)
    console.seek(0)
    if outcome == "traceback" or "Traceback (most recent call last)" in printed:
        text = f"{printed[-300:]}\n{text[-3000:]}"
        return ("memory" if NO_MEMORY.search(text) else "traceback"), text
    text = text or printed
    # numpy takes no memory for an array that a header declares, and says so.
    if NO_MEMORY.search(text) and "Unable to allocate" not in text:
        return "memory", text[-2000:]
    if code:
        late = program.name == "lofi_tal" and "stage head took" in printed
        wordy = isinstance(code, str) and (code.count("\n") > 12 or len(code) > 3200)
        return "late" if late else "wordy" if wordy else "refused", text[-3000:]
    silent = refused and not COMPLAINT.search(printed)
    return "silent" if silent else "accepted", f"the reference says {refused}" if silent else ""


def run_child(kind, base, rng, note, bounds):
    """Mutate a file in the working folder and run the programs; tell `note` of each step."""
    os.setsid()
    path = rng.choice(kind.files)
    shutil.copy(path, "before")
    with open(path, "rb") as file:
        content = file.read()
    if path.endswith(".json"):
        content = content.replace(base.encode(), os.getcwd().encode())
    # It is a hard link.
    os.replace(shutil.copy(path, "copy"), path)
    content, words = kind.mutate(rng, content, path)
    with open(path, "wb") as file:
        file.write(content)
    note("mutation", "", f"{path}: {words}")
    console = open("console", "w+b", buffering=0)  # noqa: SIM115
    for number in (1, 2):
        os.dup2(console.fileno(), number)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + bounds.memory,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (bounds.cpu_sec,) * 2)
    refusals = {}
    for program in kind.programs:
        if program.reference not in refusals:
            refusals[program.reference] = reason_against(program.reference, content)
        if rng.random() < program.share:
            note(program.name, "running", "")
            note(program.name, *run_program(program, refusals[program.reference], console))


def reason_against(reference, content):
    """Return why a reference refuses a file, or None."""
    try:
        if reference:
            reference(content)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return None


def wait_for(pid, wall_sec):
    """Return how a child ended, "" if by itself."""
    deadline = time.monotonic() + wall_sec
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "slow"
        time.sleep(0.002)
    number = ended[1] & 127
    return "" if not ended[1] else "slow" if number in (9, signal.SIGXCPU) else "killed"


def attempt(kind, base, key, bounds):
    """Try one mutation: return [(step, *words)] as the child noted it, the last one its end."""
    folder = tempfile.mkdtemp(prefix="fuzz-")
    shutil.copytree(base, f"{folder}/case", copy_function=os.link)
    pid = os.fork()
    if not pid:
        status = 1
        with open(f"{folder}/notes", "w") as notes, contextlib.suppress(BaseException):

            def note(*step):
                notes.write(json.dumps(step) + "\n")
                notes.flush()

            os.chdir(f"{folder}/case")
            os.fsync = lambda _: None
            try:
                run_child(kind, base, random.Random(key), note, bounds)
                status = 0
            except BaseException:
                note("fuzzer", "traceback", traceback.format_exc())
        os._exit(status)
    ended = wait_for(pid, bounds.wall_sec)
    with open(f"{folder}/notes") as file:
        steps = [json.loads(line) for line in file]
    shutil.rmtree(folder)
    return [*steps, ("end", ended, "")] if ended else steps


def make_inputs(folder):
    """Fill a folder with valid inputs, in a child: after a backward pass forks cannot train."""
    pid = os.fork()
    if not pid:
        os.chdir(folder)
        with open("log", "w") as log:
            os.dup2(log.fileno(), 1)
            sys.stdout = log
            try:
                make_base()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        sys.exit(f"the valid inputs cannot be made: see {folder}/log")


def fuzz(kinds, base, seed, numbers, counts, bounds):
    """Try mutations by number, kinds in turn; print failures, count each (kind, outcome)."""
    names = list(kinds)
    for i in numbers:
        name = names[i % len(names)]
        steps = attempt(kinds[name], base, f"{seed} {name} {i}", bounds)
        counts[name, "mutations"] += 1
        for step, outcome, text in steps:
            if outcome in OUTCOMES:
                counts[name, outcome] += 1
            if outcome in FAILURES:
                repeat = f"--seed {seed} --only {name} --first {i} --count 1"
                what = steps[-2][0] if step == "end" else step
                print(f"\nFAILED {name}, {what}: {outcome}; python -m tests.fuzz {repeat}")
                print(f"{steps[0][2]}\n{text.strip()}", flush=True)


def refused_valid(kinds, base, bounds):
    """Yield what a program says to a file as it was made: nothing behind that would be tried."""
    for name, kind in kinds.items():
        programs = [program._replace(share=1) for program in kind.programs]
        same = replace(kind, mutate=lambda rng, content, path: (content, ""), programs=programs)
        for step in attempt(same, base, name, bounds)[1:]:
            if step[1] not in ("running", "accepted"):
                yield f"{name}: {step}"


def table(counts):
    """Return the counts as lines, a row a kind."""
    columns = ["mutations", *OUTCOMES]
    rows = [["kind", *columns]]
    for name in dict.fromkeys(name for name, _ in counts):
        rows.append([name, *(counts[name, column] for column in columns)])
    rows.append(["all", *(sum(row[k + 1] for row in rows[1:]) for k in range(len(columns)))])
    return "\n".join(f"{row[0]:12}" + "".join(f"{cell:>11}" for cell in row[1:]) for row in rows)


def main(argv=None):
    parser = argparse.ArgumentParser("tests.fuzz")
    parser.add_argument("--count", type=int, default=10_000, help="mutations")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="KIND", nargs="+", choices=list_kinds())
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    config.git_commit()  # cached for all children
    kinds = list_kinds()
    kinds = {name: kinds[name] for name in args.only or kinds}
    with tempfile.TemporaryDirectory(prefix="fuzz-base-") as base:
        make_inputs(base)
        started = time.monotonic()
        if refused := list(refused_valid(kinds, base, Bounds())):
            sys.exit("\n".join(["valid files are refused:", *refused]))
        numbers, counts = range(args.first, args.first + args.count), Counter()
        # Interrupted, it tells what it has found by then.
        with contextlib.suppress(KeyboardInterrupt):
            fuzz(kinds, base, args.seed, numbers, counts, Bounds())
    failed = sum(number for (_, outcome), number in counts.items() if outcome in FAILURES)
    seconds = time.monotonic() - started
    count = sum(number for (_, outcome), number in counts.items() if outcome == "mutations")
    print(f"\n{table(counts)}\n{count} mutations, {failed} failures, {seconds:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
