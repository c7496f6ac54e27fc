"""Programs in forks of one process that has imported what takes each of them seconds.

`python -m tests.forks MODULE ...` imports the modules, then runs what it is asked for: a line of JSON each, of words
behind `python`, where they are to run, a folder for what is printed, and what the environment of each process has
in addition. It answers with the exit code of the first that failed, which ends the others, or 0.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


class Forks:
    """Runs programs as Python does, with modules in memory that nothing has been done with."""

    def __init__(self, *modules: str, **environment: str):
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-m", "tests.forks", *modules]
        self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **pipes)

    def run(self, *words: str | Path, cwd: Path = ROOT, processes: int = 1) -> subprocess.CompletedProcess[str]:
        """What became of `python WORDS`, a script, module or code; of several processes, as torchrun starts them."""
        group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **group} for rank in range(processes)]
        ranks = ranks if processes > 1 else [{}]
        with tempfile.TemporaryDirectory() as folder:
            request = {"words": [*map(str, words)], "cwd": str(cwd), "folder": folder, "ranks": ranks}
            print(json.dumps(request), file=self.process.stdin, flush=True)
            assert self.process.stdout is not None
            code = int(self.process.stdout.readline())
            out, err = ("".join(path.read_text() for path in sorted(Path(folder).glob(f"*.{n}"))) for n in (1, 2))
        return subprocess.CompletedProcess(words, code, out, err)

    def call(self, function: Callable[..., None], *arguments: Any, processes: int) -> None:
        """function(rank, *arguments) in so many processes, which find both by pickle; none may fail."""
        given = pickle.dumps((function, arguments))
        code = f"import os, pickle; f, given = pickle.loads({given!r}); f(int(os.environ.get('RANK', 0)), *given)"
        done = self.run("-c", code, processes=processes)
        assert done.returncode == 0, done.stderr

    def end(self) -> None:
        """End the process, which waits for more."""
        self.process.communicate()


@contextlib.contextmanager
def forks(*modules: str, **environment: str) -> Iterator[Forks]:
    """Forks that end with the block."""
    made = Forks(*modules, **environment)
    try:
        yield made
    finally:
        made.end()


def main() -> None:
    """Run what is asked for. A fork goes on behind this function, to its program's end."""
    for module in sys.argv[1:]:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # what was imported, at which a program's garbage collections need not look
    for line in sys.stdin:
        request, children, code = json.loads(line), set(), 0
        for rank, environment in enumerate(request["ranks"]):
            child = os.fork()
            if child == 0:
                return program(request, rank, environment)
            children.add(child)
        while children:
            child, status = os.wait()
            children.remove(child)
            if status and not code:
                code = os.waitstatus_to_exitcode(status)
                for other in children:
                    os.kill(other, signal.SIGKILL)
        print(code, flush=True)


def program(request: dict[str, Any], rank: int, environment: dict[str, str]) -> None:
    """Be a process of a program."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (1, 2):
        os.dup2(os.open(f"{request['folder']}/{rank}.{number}", os.O_CREAT | os.O_WRONLY), number)
    os.environ.update(environment)
    os.chdir(request["cwd"])
    if request["words"][0] == "-c":
        exec(request["words"][1], {"__name__": "__main__"})
    elif request["words"][0] == "-m":
        _, module, *sys.argv[1:] = request["words"]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = request["words"]
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
