"""Artefacts (corpus, tokenizer, teacher) that later runs reuse, in folders named after what made them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import writing
from .processes import agreed, by_first, is_first


def _written(settings: Any) -> str:
    return json.dumps(settings, sort_keys=True, indent=2)


def key(settings: Any) -> str:
    """Return the key of settings (JSON values), twelve letters and digits that others do not have."""
    return hashlib.sha256(_written(settings).encode()).hexdigest()[:12]


def cached(
    cache: Path,
    kind: str,
    settings: Mapping[str, Any],
    make: Callable[[Path], dict[str, Any] | None],
    *,
    by_all: bool = False,
    says: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Return (folder `cache/kind-<key of settings>`, what `make(folder)` returned when it filled it, JSON values).

    settings: everything the result depends on (JSON values); other settings give another folder, so none is silently
    ignored. They are kept beside the result in made_by.json. The folder appears under its name only when complete.
    by_all: `make` is work of all processes of a run, such as a training, of which the first writes the files;
    otherwise the first process does it while the others wait. says: whether what is reused is said to be.
    """
    folder = cache / f"{kind}-{key(settings)}"
    if not agreed(folder.is_dir()):
        with writing("cache_dir", cache), _scratch(cache, kind) as made:
            facts = make(made) if by_all else by_first(lambda: make(made))
            by_first(lambda: _keep(made, folder, settings, facts))
    elif says:
        print(f"reusing {folder}")
    kept = folder / "facts.json"
    return folder, json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}


@contextlib.contextmanager
def _scratch(cache: Path, kind: str) -> Iterator[Path]:
    """Yield a new folder, the same to all processes, that is gone afterwards unless it was moved."""

    def new() -> Path:
        cache.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=cache, prefix=f".making-{kind}-")) / "new"
        made.mkdir()
        return made

    made = by_first(new)
    try:
        yield made
    finally:
        if is_first():
            shutil.rmtree(made.parent, ignore_errors=True)


def _keep(made: Path, folder: Path, settings: Mapping[str, Any], facts: dict[str, Any] | None) -> None:
    """Give what was made its name, beside what it was made by and what there is to say of it."""
    (made / "made_by.json").write_text(_written(settings) + "\n", encoding="utf-8")
    if facts:
        (made / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another run finished the same artefact first
            raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, or replace it, that has its name only when the disk has all of it.

    Halves of surrogate pairs become escapes. A writer that is killed leaves a hidden file, which the next one replaces.
    """
    whole = path.with_name(f".{path.name}")
    try:
        whole.write_bytes(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))
        with whole.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(whole, path)
    except BaseException:
        whole.unlink(missing_ok=True)
        raise


def replace_folder(target: Path, make: Callable[[Path], object]) -> None:
    """Fill a new folder by `make(folder)` and put it in `target`'s place, or a link's, only when it is complete."""
    target = Path(os.path.realpath(target))
    with _scratch(target.parent, target.name) as made:
        make(made)
        old = made.with_name("old")
        if target.exists():
            target.rename(old)
        try:
            made.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise


def lock_folder(folder: Path, *, wait: bool = False) -> int:
    """Return a descriptor of a folder, made if need be, that no other run gets while it is open.

    Raises BlockingIOError if another run has it, unless that is waited for.
    """
    Path(os.path.realpath(folder)).mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(lock)
        raise
    except OSError:
        pass  # a file system without locks
    return lock


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder's files into `target`, replacing it as a whole."""
    replace_folder(target, lambda made: shutil.copytree(source, made, dirs_exist_ok=True))
