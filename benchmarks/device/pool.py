"""Cases shared out among processes, of which one that dies or hangs takes its case with it and no other.

A fault in a kernel spoils all that its process does on the GPU afterwards: such a process is replaced as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import ROOT

SPOILT = ("CUDA error", "illegal", "misaligned", "device-side assert", "unspecified launch failure")


class Worker:
    """A process that says when it is ready, is told a case in a line, and answers in one, all in JSON."""

    def __init__(self, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self.ready = False

    def ask(self, case: str, case_s: float, end: float) -> dict:
        """What it finds, given so many seconds and until the end; importing, before the first case, is not counted."""
        assert self.process.stdin is not None
        if not self.ready:
            first = self.answer(end - time.monotonic())
            if first["lost"]:
                return {"case": case} | first
            self.ready = True
        with contextlib.suppress(BrokenPipeError):  # its answer tells
            self.process.stdin.write(case.encode() + b"\n")
        return {"case": case} | self.answer(min(case_s, max(1.0, end - time.monotonic())))

    def answer(self, limit_s: float) -> dict:
        assert self.process.stdout is not None
        end, line = time.monotonic() + limit_s, b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return {"problem": f"hangs: no answer in {limit_s:.0f} s", "lost": True}
            part = self.process.stdout.read(65536)
            if not part:
                return {"problem": f"died: exit code {self.process.wait()}", "lost": True}
            line += part
        found = json.loads(line)
        return found | {"lost": any(text in str(found.get("problem")) for text in SPOILT)}

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def serve(examine: Callable[[str], dict], counts: dict[str, int]) -> None:
    """Is such a process, until it is told no more. What is printed otherwise goes to stderr, which is the log."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"problem": None}), file=out, flush=True)  # ready
    for line in sys.stdin:
        begin = time.monotonic()
        counts.update(dict.fromkeys(counts, 0))
        try:
            found = examine(line.rstrip("\n"))
        except Exception as error:
            traceback.print_exc()
            found = {"problem": f"{type(error).__name__}: {error}"[:300]}
        found |= {**counts, "seconds": round(time.monotonic() - begin, 2)}
        print(json.dumps(found), file=out, flush=True)


def answers(
    cases: Sequence[str], start: Callable[[], Worker], workers: int, case_s: float, end: float
) -> Iterator[dict]:
    """What is found of each case, as it is found; of those not begun at the `end` (time.monotonic()) nothing."""
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
    for case in cases:
        todo.put(case)

    def work() -> None:
        worker = None
        try:
            while time.monotonic() < end:
                case = todo.get_nowait()
                worker = worker or start()
                answer = worker.ask(case, case_s, end)
                if answer.pop("lost"):
                    worker.end()
                    worker = None
                done.put(answer)
        except queue.Empty:
            pass
        finally:
            if worker:
                worker.end()
            done.put(None)

    running = min(workers, len(cases))
    for _ in range(running):
        threading.Thread(target=work, daemon=True).start()
    while running:
        answer = done.get()
        if answer is None:
            running -= 1
        else:
            yield answer
