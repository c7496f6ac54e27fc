"""What is built and usable here, and the implementation that a call gets.

Three things can compute the row primitive: the compiled extension (CPU tensors), the Triton kernels (GPU tensors), and
nobody, in which case the op runs its reference. ``impl="auto"`` takes the best there is, ``"fused"`` insists on a
kernel and says why there is none, ``"reference"`` asks for plain torch.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator

import torch

from .checks import check_choice

__all__ = ["EXTENSION_PROBLEM", "TRITON_PROBLEM", "backend_for", "interpret_triton", "use_fused"]

IMPLS = ("auto", "reference", "fused")


# Of the operators' arguments, and of what they may be: raised here and in csrc/module.cpp where these change.
INTERFACE = 8


def _load_extension() -> str | None:
    try:
        extension = importlib.import_module("fastkd._C")
    except ImportError as error:
        return f"the compiled extension fastkd._C is not usable ({error}); install with FASTKD_BUILD=cpu to build it"
    if getattr(extension, "interface", 0) != INTERFACE:
        return "the compiled extension fastkd._C was built from other sources; install fastkd again to build it anew"
    return None


# Why something is not usable, or None. Found out once, at import, so that torch.compile sees constants: loading the
# extension takes a millisecond, and Triton itself is imported by the first call that needs it.
EXTENSION_PROBLEM = _load_extension()
TRITON_PROBLEM = None if importlib.util.find_spec("triton") else "Triton is not installed"

_triton_on_cpu = False


@contextlib.contextmanager
def interpret_triton() -> Iterator[None]:
    """Runs CPU tensors through the Triton kernels, for tests: needs TRITON_INTERPRET=1 before Triton is imported."""
    global _triton_on_cpu
    before, _triton_on_cpu = _triton_on_cpu, True
    try:
        yield
    finally:
        _triton_on_cpu = before


def backend_for(device: torch.device) -> tuple[str | None, str | None]:
    """(the kernels that serve this device: "cpp", "triton" or None, the reason where there are none)"""
    if device.type == "cuda" or (device.type == "cpu" and _triton_on_cpu):
        return (None, TRITON_PROBLEM) if TRITON_PROBLEM else ("triton", None)
    if device.type == "cpu":
        return (None, EXTENSION_PROBLEM) if EXTENSION_PROBLEM else ("cpp", None)
    return None, f"there are no kernels for device type {device.type!r}"


def use_fused(impl: str, device: torch.device, problem: str | None = None) -> bool:
    """Whether a call runs on kernels. Raises RuntimeError where ``impl="fused"`` has none to run on.

    `problem`: why the device's kernels do not take the call's arguments, if they do not.
    """
    check_choice("impl", impl, IMPLS)
    if impl == "reference":
        return False
    _, missing = backend_for(device)
    problem = missing or problem
    if problem is not None and impl == "fused":
        raise RuntimeError(f'impl="fused" cannot run: {problem}')
    return problem is None
