"""The errors that ``fastkd-train`` turns into a single line on stderr and an exit code, and words for its lines."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator


class InputError(Exception):
    """What the user gave cannot be used; the message says what was expected and what was found."""

    exit_code = 2


class RunError(Exception):
    """A run cannot go on; the message says why, and which checkpoint it can be continued from."""

    exit_code = 1


class Interrupted(RunError):
    """A run was asked to stop by a signal, and did; the exit code is the shell's, 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def out_of_memory(error: BaseException) -> str | None:
    """Return what to say of an error if memory is what was missing, on whichever device, or None."""
    text = " ".join(str(error).split())
    # torch has a class for GPUs, and for CPUs only a text; it is looked for by its name, as torch may not be imported.
    is_torchs = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in text
    if not isinstance(error, MemoryError) and not (is_torchs and isinstance(error, RuntimeError)):
        return None
    return (
        f"out of memory ({text[:200] or type(error).__name__}): python -m fastkd.train.plan with the same flags "
        "says what a run needs; reduce --per_device_train_batch_size (and raise --gradient_accumulation_steps), "
        "--per_device_eval_batch_size or --sequence_length, or give --gradient_checkpointing"
    )


def closest(given: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the most similar known word, or nothing if none is similar."""
    match = difflib.get_close_matches(given, list(known), n=1, cutoff=0.75)
    return f"; did you mean {match[0]!r}?" if match else ""


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # what only writing meets


@contextlib.contextmanager
def writing(flag: str, folder: object) -> Iterator[None]:
    """Turn what a full or read-only disk makes any library raise into a RunError that names a flag and its folder."""
    try:
        yield
    except Exception as error:
        said = re.search(r"\(os error (\d+)\)", str(error))  # by libraries in Rust
        number = int(said[1]) if said else getattr(error, "errno", None)
        if number not in _DISK:
            raise
        where = getattr(error, "filename", None)
        what = f"--{flag} {folder}" + (f" ({where})" if where else "")
        raise RunError(f"cannot write to {what}: {os.strerror(number)}; make room there, or give another") from error


def counted(count: int, things: str) -> str:
    """Return a number and what it is of, "1 row" or "2,000 rows"; things: a plural that ends in s."""
    return f"{count:,} " + (re.sub(r"s\b", "", things) if count == 1 else things)


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks, for one that stands in a line of our own."""
    return " ".join(str(error).split()) or type(error).__name__
