"""The embedded corpus, which a run learns from that is given no data.

It is real English that every machine already has: the documentation strings of the running Python's standard library
and the topics of ``pydoc_data/topics.py``. Files are parsed with ``ast`` and never imported, so that none of their code
runs. It serves three tasks: texts alone, (body, summary) pairs, and (text, package) pairs.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

LIBRARY = Path(sysconfig.get_path("stdlib"))
HELD_OUT_PERCENT = 5
# What reports call embedded data.
EMBEDDED = {"docs": "documentation of Python's standard library", "dates": "dates as people write them, made here"}
MIN_CHARACTERS = 20  # shorter strings are stubs such as "See help()."
MIN_BODY_CHARACTERS = 80  # of a text to be summarised, or there is nothing to leave out
CLASSES = 10  # packages that texts are told apart by: fewer texts than these have teach nothing
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def source_files(root: Path = LIBRARY) -> list[Path]:
    """Return the ``.py`` files of a folder, by default the standard library, without tests and installed packages."""
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


def documented(files: Iterable[Path], root: Path = LIBRARY) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, documentation string) of every module below `root`, and of its classes and functions."""
    for path in files:
        with contextlib.suppress(SyntaxError, ValueError):  # as documentation_strings
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            nodes: list[tuple[str, Any]] = [(name, ast.parse(path.read_bytes()))]
            for name, node in nodes:
                if text := ast.get_docstring(node):
                    yield name, text
                kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
                nodes += [(f"{name}.{inner.name}", inner) for inner in node.body if isinstance(inner, kinds)]


def summary(text: str) -> str:
    """Return the first sentence of a documentation string, white space collapsed."""
    return " ".join(re.split(r"(?<=[.!?])\s|\n\s*\n", text.strip(), maxsplit=1)[0].split())


def embedded_corpus(files: Iterable[Path]) -> list[str]:
    """Return the distinct texts of the files in order, white space collapsed, without those of under 20 characters."""
    texts = (" ".join(text.split()) for path in files for text in documentation_strings(path))
    return list(dict.fromkeys(text for text in texts if len(text) >= MIN_CHARACTERS))


def embedded_pairs(files: Iterable[Path]) -> list[tuple[str, str]]:
    """Return (body, summary) of the documentation strings that have both, white space collapsed, bodies distinct.

    The summary is a first paragraph of one line, the body all that follows. A body that repeats its summary, or of
    under 80 characters, is left out.
    """
    pairs: dict[str, str] = {}
    for path in files:
        for text in documentation_strings(path):
            first, *rest = re.split(r"\n\s*\n", text.strip(), maxsplit=1)
            summary, body = " ".join(first.split()), " ".join("".join(rest).split())
            is_summary = "\n" not in first and len(summary) >= MIN_CHARACTERS
            if is_summary and len(body) >= MIN_BODY_CHARACTERS and summary.lower().rstrip(".") not in body.lower():
                pairs.setdefault(body, summary)
    return list(pairs.items())


def embedded_classes(files: Iterable[Path] | None = None, root: Path = LIBRARY) -> list[tuple[str, str]]:
    """Return (text, package) pairs: which part of the standard library does a documentation string come from?

    Texts are those of the embedded corpus from the ten packages, or modules, that have the most. A package's name in a
    text of its own becomes "module", which would otherwise give the answer away. A text of several packages counts for
    the first alone. files: source files below `root`, by default those of the standard library.
    """
    packages: dict[str, str] = {}
    for path in source_files(root) if files is None else files:
        package = path.relative_to(root).parts[0].removesuffix(".py")
        for text in documentation_strings(path):
            text = re.sub(rf"\b{re.escape(package)}\b", "module", " ".join(text.split()), flags=re.IGNORECASE)
            if len(text) >= MIN_CHARACTERS:
                packages.setdefault(text, package)
    kept = {package for package, _ in Counter(packages.values()).most_common(CLASSES)}
    return [(text, package) for text, package in packages.items() if package in kept]


def place(text: str) -> int:
    """Return a number that depends on the text alone (Python's own ``hash`` of a string differs between runs)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def is_held_out(text: str, percent: int = HELD_OUT_PERCENT) -> bool:
    """Return whether a text is for evaluation: by itself alone, so that its side stays when other texts come or go."""
    return place(text) % 100 < percent
