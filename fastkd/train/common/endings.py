"""How a command ends: stopped by a signal outside of training, or with a standard output that takes no more."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

_stage = ["its start"]  # of the command, for those who stop it


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP has come, as KeyboardInterrupt says of SIGINT."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def stop_number(error: KeyboardInterrupt) -> int:
    """Return which signal an exception says has come."""
    return int(getattr(error, "number", signal.SIGINT))


def begin(stage: str) -> None:
    """Remember what the command does from now on."""
    _stage[0] = stage


def stage() -> str:
    """Return what the command was last said to do."""
    return _stage[0]


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise Stopped, so that what is half written is removed, where they would just end us.

    A process that was started to ignore one, as by nohup, or that handles it, goes on doing so.
    """
    numbers = [number for number in (signal.SIGTERM, getattr(signal, "SIGHUP", None)) if number is not None]
    ours = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        ours = []
    for number in ours:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _stop(number: int, frame: Any) -> None:
    raise Stopped(number)


class Output:
    """Standard output, which remembers why it takes no more, as nobody else can tell that from a full disk of files.

    As a context it stands in the place of `sys.stdout`.
    """

    def __init__(self) -> None:
        self.stream: Any = sys.stdout
        self.fault: OSError | None = None

    def __enter__(self) -> Output:
        sys.stdout = self if self.stream is not None else None
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout = self.stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write text."""
        with self._remembered():
            return int(self.stream.write(text))

    def flush(self) -> None:
        """Write what waits to be written."""
        with self._remembered():
            self.stream.flush()

    @contextlib.contextmanager
    def _remembered(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.fault = error
            raise

    def end(self, who: str, code: int, problem: object = None) -> int:
        """Write what waits to be written, and the problem as one line on stderr; return the exit code.

        That is another one if the output took no more: 1, or the shell's for a closed pipe, of which nobody is told.
        """
        if self.stream is not None:
            with contextlib.suppress(OSError):
                self.flush()
        if self.fault is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # Python flushes once more
            code, problem = 1, f"could not write to standard output: {self.fault.strerror}"
            if isinstance(self.fault, BrokenPipeError):
                code, problem = 128 + signal.SIGPIPE, None
        if problem is not None:
            with contextlib.suppress(OSError):  # a terminal that is gone
                print(f"{who}: {' '.join(str(problem).split())}", file=sys.stderr)
        return code


def launched_rank() -> int:
    """Return this process's number as its launcher gave it, also before a process group exists."""
    return int(os.environ.get("RANK", "0"))
