"""Phases that go wrong in every way, for test_device.py: benchmarks.device takes them by their names."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from benchmarks.device.phases import Here, Phase, Skipped


def works(here: Here) -> bool:
    here.lines.write("check", case="one", problem=None)
    print("said by what works")
    return True


def wrong(here: Here) -> bool:
    here.lines.write("check", case="two", problem="is wrong")
    return False


def raises(here: Here) -> bool:
    raise ValueError("broken")


def skips(here: Here) -> bool:
    raise Skipped("it is not here")


def dies(here: Here) -> bool:
    here.lines.write("check", case="before it died", problem=None)
    os.kill(os.getpid(), signal.SIGSEGV)
    return True


def hangs(here: Here) -> bool:
    """With a process of its own, which is deaf to all but SIGKILL, and half a line."""
    code = "import os, signal, time; signal.signal(2, 1); signal.signal(15, 1); print(os.getpid()); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    here.lines.write("child", pid=int(child.stdout.readline()))
    with open(here.lines.path, "a") as file:
        file.write('{"phase": "hangs", "ki')
        file.flush()
        time.sleep(600)
    return True


def floods(here: Here) -> bool:
    print("the first line")
    while here.left > 0:
        print("x" * 90, "\n" * 5, "y" * 10_000)
    print("the last line")
    return True


def of(*names: str, seconds: int = 20) -> list[Phase]:
    return [Phase(name, seconds, "made up", f"{__name__}:{name}") for name in names]
