"""The errors that ``fastkd-train`` turns into a single line on stderr and an exit code."""

from __future__ import annotations


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
