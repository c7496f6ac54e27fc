"""A file of lines in JSON that is whole to its last line at any time, whatever kills its writer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Lines:
    """What one phase says. Several processes may write to the file: a line is one write to its end."""

    def __init__(self, path: Path, phase: str) -> None:
        self.path, self.phase = path, phase

    def write(self, kind: str, **fields: Any) -> None:
        text = json.dumps({"phase": self.phase, "kind": kind, **fields}) + "\n"
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":  # a writer was killed within its line
                text = "\n" + text
            os.write(file, text.encode())
        finally:
            os.close(file)


def read(path: Path) -> list[dict]:
    """All lines, but of a phase that began again only the last time; half a line is none."""
    found: list[dict] = []
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if line["kind"] == "begin":
            found = [other for other in found if other["phase"] != line["phase"]]
        found.append(line)
    return found
