"""One phase, in a process of its own: `python -m benchmarks.device` starts it. Its exit code is its verdict."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from pathlib import Path

from benchmarks.device.lines import Lines
from benchmarks.device.phases import Here, Skipped
from benchmarks.device.watchdog import SKIPPED


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("function", metavar="MODULE:FUNCTION")
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    module, function = options.function.split(":")
    lines = Lines(options.lines, options.name)
    try:
        well = getattr(importlib.import_module(module), function)(Here(lines, end, options.rehearse))
    except Skipped as why:
        print(f"skipped: {why}")
        lines.write("skipped", why=str(why))
        return SKIPPED
    except Exception as error:
        traceback.print_exc()
        lines.write("error", error=f"{type(error).__name__}: {error}"[:300])
        return 1
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
