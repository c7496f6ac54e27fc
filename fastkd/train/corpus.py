"""The texts a run learns from: the embedded corpus, or plain text files.

The embedded corpus is real English that every machine already has: the documentation strings of the running
Python's standard library and the topics of ``pydoc_data/topics.py``. Files are parsed with ``ast`` and never
imported, so collecting it runs none of their code.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import InputError

HELD_OUT_PERCENT = 5
MIN_CHARACTERS = 20  # shorter strings are stubs such as "See help()."
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def source_files(root: Path | None = None) -> list[Path]:
    """Return the standard library's ``.py`` files, sorted, without tests and installed packages.

    root: the folder to read; by default the running Python's standard library.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    # Sorting on the parts, not on the string, gives one order whatever the platform's separator.
    kept = sorted((f for f in files if not _SKIPPED_FOLDERS.intersection(f.parts[:-1])), key=lambda f: f.parts)
    return [root / f for f in kept]


def documentation_strings(path: Path) -> Iterator[str]:
    """Yield the documentation strings of one source file in source order, and its topics if it is ``topics.py``.

    Files that do not parse (templates, bad encodings) yield nothing.
    """
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=True)
            if text:
                yield text
    if path.parts[-2:] == ("pydoc_data", "topics.py"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                yield from (str(v.value) for v in node.values if isinstance(v, ast.Constant))


def embedded_corpus(files: Iterable[Path] | None = None) -> list[str]:
    """Return the embedded corpus: distinct texts in a fixed order, white space collapsed.

    files: source files to read, by default ``source_files()``. Texts under 20 characters are dropped.
    """
    texts: dict[str, None] = {}  # a dict keeps the first of equal texts, in order
    for path in source_files() if files is None else files:
        for text in documentation_strings(path):
            text = " ".join(text.split())
            if len(text) >= MIN_CHARACTERS:
                texts.setdefault(text)
    return list(texts)


def fingerprint() -> dict[str, str]:
    """Return what the embedded corpus depends on: this Python, and this module's rules."""
    return {"python": sys.version, "rules": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]}


def read_texts(path: str | Path) -> list[str]:
    """Return the paragraphs (separated by blank lines) of a UTF-8 text file, white space collapsed.

    Raises InputError naming the path if the file is missing, unreadable, not UTF-8 text, or empty.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: byte {error.start} does not decode") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {(error.strerror or 'unknown error').lower()}") from error
    paragraphs = [" ".join(p.split()) for p in content.replace("\r\n", "\n").split("\n\n")]
    texts = [p for p in paragraphs if p]
    if not texts:
        raise InputError(f"{path} is empty: expected paragraphs of plain text")
    return texts


def split(texts: Iterable[str], held_out_percent: int = HELD_OUT_PERCENT) -> tuple[list[str], list[str]]:
    """Split texts into (train, held_out), keeping their order.

    A text's side depends on its SHA-256 alone, so it never changes when other texts come or go, or between runs
    (Python's own ``hash`` of a string does).
    """
    train: list[str] = []
    held_out: list[str] = []
    for text in texts:
        bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
        (held_out if bucket < held_out_percent else train).append(text)
    return train, held_out
