"""The one error that ``fastkd-train`` turns into a single line on stderr and exit code 2."""

from __future__ import annotations


class InputError(Exception):
    """What the user gave cannot be used; the message says what was expected and what was found."""
