"""Real Python processes at the cost of a fork, as most of a start is the import of libraries.

A server imports the libraries once, and nothing of the project. A process is a fork of it, in a
session of its own, that runs a program from its first line to the end of the interpreter: it ends,
gets signals, starts workers and dies as one that a shell starts.
"""

import atexit
import functools
import gc
import io
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
LIBRARIES = "numpy, torch, torch._dynamo, torch.distributed.run, torch.utils.data, torchvision, "
LIBRARIES += "torchcodec.decoders, torchcodec.encoders, tqdm, yaml"
TORCHRUN = ["-m", "torch.distributed.run"]
WARM_TORCHRUN = [__file__, "torchrun"]  # the same, and its ranks are forks, too
NUMBER = struct.Struct("q")
RUNNING = 1 << 32

# ---------------------------------------------------------------------------------------- the tests


class Process:
    """A process that runs `python *argv`, with what tests use of subprocess.Popen."""

    def __init__(self, *argv, cwd=ROOT, env=ENV, stdout=None, stderr=None):
        """argv: a script, `-m` and a module or `-c` and code, then their arguments. stdout, stderr:
        open files or their numbers, temporary files by default, which `communicate` returns."""
        self.args = [str(word) for word in argv]
        self.files = list(map(tempfile.TemporaryFile, ["w+"] * 3))
        json.dump({"argv": self.args, "cwd": str(cwd), "env": dict(env)}, self.files[0])
        self.files[0].flush()
        outputs = zip((stdout, stderr), self.files[1:], strict=True)
        outputs = [file if given is None else given for given, file in outputs]
        files = [f if isinstance(f, int) else f.fileno() for f in (self.files[0], *outputs)]
        self.returncode = None
        self.pid = ask(0, files)

    def poll(self):
        if self.returncode is None:
            answer = ask(self.pid)
            self.returncode = None if answer == RUNNING else answer
        return self.returncode

    def wait(self, timeout=100):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout=100):
        """Wait for the end; return what was written to standard output and standard error."""
        try:
            self.wait(timeout)
        finally:
            self.kill()
        return tuple(self.read(k) for k in (1, 2))

    def read(self, number):
        """Return what was written so far to standard output, 1, or standard error, 2."""
        with open(f"/proc/self/fd/{self.files[number].fileno()}") as file:
            return file.read()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def start_ranks(*commands):
    """Start a process of each command, a rank of one group, as torchrun does."""
    group = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1"}
    group["MASTER_PORT"] = free_port()
    return [
        Process(*command, env={**ENV, **group, "RANK": str(rank)})
        for rank, command in enumerate(commands)
    ]


@functools.cache
def server():
    """Start the server, which ends with the tests; return the connection to it."""
    ours, its = socket.socketpair()
    env = {key: value for key, value in ENV.items() if key != "PYTHONPATH"}
    command = [sys.executable, __file__, str(its.fileno())]
    process = subprocess.Popen(command, env=env, pass_fds=[its.fileno()], start_new_session=True)
    its.close()

    @atexit.register
    def end():
        ours.close()
        process.wait()

    return ours


def ask(pid, files=()):
    """Return how that process ended or RUNNING; of 0, the id of a process with these files."""
    socket.send_fds(server(), [NUMBER.pack(pid)], files)
    return NUMBER.unpack(server().recv(NUMBER.size))[0]


# --------------------------------------------------------------------------------------- the server


def serve(connection):
    """Answer `ask` until the tests end, which ends all processes. Return in a forked one what it
    was asked to run."""
    running = set()
    while True:
        message, files, *_ = socket.recv_fds(connection, NUMBER.size, 3)
        if not message:
            for pid in running:
                os.killpg(pid, signal.SIGKILL)  # loader workers, too
                os.waitpid(pid, 0)
            os._exit(0)
        (pid,) = NUMBER.unpack(message)
        if pid:
            ended, status = os.waitpid(pid, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else RUNNING
            running.discard(ended)
        else:
            answer = os.fork()
            if not answer:
                connection.close()
                return take_over(files)
            running.add(answer)
        for file in files:
            os.close(file)
        connection.send(NUMBER.pack(answer))


def take_over(files):
    """Make this process one of its own, with these files; return the words after `python`."""
    os.setsid()
    with open(files[0]) as file:
        file.seek(0)
        request = json.load(file)
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), *files[1:])):
        os.dup2(file, number)
        os.close(file)
    # Made anew: a stream of the server may believe that it can seek.
    for number, name in enumerate(("stdout", "stderr"), 1):
        stream = io.TextIOWrapper(io.FileIO(number, "w", closefd=False), write_through=True)
        setattr(sys, name, stream)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    return request["argv"]


def run(argv):
    """Run the program as `python *argv` does."""
    added = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:1] = ["" if argv[0].startswith("-") else os.path.dirname(argv[0]), *added]
    if argv[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(argv[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


def torchrun(argv):
    """Run `torchrun *argv` with ranks that are forks, too, of what this process was before."""
    from torch.distributed import run as program
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    ours, its = socket.socketpair()
    if not os.fork():
        ours.close()
        run(serve(its))
        sys.exit()
    its.close()

    def start(args, env, **_):  # of `python -u SCRIPT`
        return Process(*args[2:], env=env, stdout=1, stderr=2)

    globals()["server"] = lambda: ours
    subprocess_handler.Popen = start
    program.main(argv)


def main(connection):
    """Be the server, and in a fork what it was asked for."""
    for name in LIBRARIES.split(", "):
        __import__(name)
    assert len(os.listdir("/proc/self/task")) == 1  # as a fork has no other thread
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which a job in the background may ignore
    gc.freeze()  # what a fork's garbage collection touches is copied
    run(serve(socket.socket(fileno=int(connection))))


if __name__ == "__main__":
    torchrun(sys.argv[2:]) if sys.argv[1] == "torchrun" else main(sys.argv[1])
