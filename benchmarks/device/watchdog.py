"""Runs a command until its time is up, and keeps of what it prints as much as a log may have.

The command and all that it starts are a process group, which is killed at the end, well or not: nothing that a phase
leaves behind takes time or memory from the next one.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

SKIPPED = 77  # the exit code of a phase that says why it cannot be here
DUMP = re.compile(
    r"""\s*([%#^}"]|\)?\s*->|(module|func|llvm|tt|ttg|ttng|nvvm|nvgpu|scf|cf|arith|math|ub|gpu)[. ]|//\s)"""
)
KEPT_OF_A_DUMP = 5  # lines


class Log:
    """One phase's part of a log: its first and its last lines; of compilers' dumps, the beginning."""

    def __init__(self, file: TextIO, first: int = 200_000, last: int = 20_000) -> None:
        self.file, self.left, self.last = file, first, last
        self.tail: deque[str] = deque()
        self.in_tail = self.cut = self.dumped = 0

    def write(self, line: str) -> None:
        line = line if len(line) <= 500 else f"{line[:480]} ... ({len(line)} characters)"
        dump = bool(DUMP.match(line))
        if self.dumped > KEPT_OF_A_DUMP and not dump:
            self._keep(f"    ... {self.dumped - KEPT_OF_A_DUMP} more lines of a compiler's dump")
        self.dumped = self.dumped + 1 if dump else 0
        if self.dumped <= KEPT_OF_A_DUMP:
            self._keep(line)

    def _keep(self, line: str) -> None:
        if self.left > 0:
            self.left -= len(line) + 1
            print(line, file=self.file, flush=True)
            return
        self.tail.append(line)
        self.in_tail += len(line) + 1
        while self.in_tail > self.last:
            self.in_tail -= len(self.tail.popleft()) + 1
            self.cut += 1

    def close(self) -> None:
        if self.cut:
            print(f"    ... {self.cut} lines were cut here", file=self.file)
        for line in self.tail:
            print(line, file=self.file)
        self.file.flush()
        self.tail.clear()


@dataclass(frozen=True)
class Outcome:
    code: int | None  # None: its time was up
    seconds: float

    @property
    def well(self) -> bool:
        return self.code in (0, SKIPPED)

    def __str__(self) -> str:
        if self.code is None:
            return "OUT OF TIME"
        if self.code < 0:
            return f"DIED of {signal.Signals(-self.code).name}"
        return {0: "ok", 1: "WRONG", SKIPPED: "skipped"}.get(self.code, f"DIED with code {self.code}")


def watched(
    command: Sequence[str | Path], limit_s: float, log: Log, environment: Mapping[str, str], folder: Path
) -> Outcome:
    """Runs it, for at most so many seconds, with its output in the log."""
    begin = time.monotonic()
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    output = process.stdout
    assert output is not None

    def keep() -> None:
        for line in iter(lambda: output.readline(4000), b""):  # what prints no end of line fills no memory
            log.write(line.decode(errors="replace").rstrip("\n"))

    reader = threading.Thread(target=keep, daemon=True)
    reader.start()
    code = None
    try:
        code = process.wait(max(0.0, limit_s))
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # what hangs in a driver may outlive even this
            process.wait(5)
        reader.join(2)  # no longer: a process that left the group may hold the pipe
        log.close()
    return Outcome(code, time.monotonic() - begin)
