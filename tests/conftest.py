"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("unhurried", deadline=None)  # a machine may be busy
hypothesis.settings.load_profile("unhurried")
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, and the tool goes by that

torch.set_num_threads(1)  # faster for tensors this small, and several test processes share the cores


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _interpreter() -> Iterator[None]:
    """Triton's interpreter as the tests need it: alike on every processor, and in half the time."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", _rounding_once(interpreter))
        patch.setattr(interpreter, "_patch_lang", _patching_once(interpreter))
        yield


def _rounding_once(interpreter: Any) -> Callable[..., Any]:
    """Products that are summed in float64 and rounded once, to the dtype of the sum.

    The interpreter leaves them to NumPy, and in which order NumPy sums, and how far off that is, depends on the
    processor: on the OpenBLAS kernel made for it. A GPU has an order of its own. What a kernel answers for is what it
    multiplies, and what it rounds before and after.
    """
    dot, tl = interpreter.InterpreterBuilder.create_dot, interpreter.tl

    def create_dot(self: Any, a: Any, b: Any, total: Any, *options: Any) -> Any:
        wide = interpreter.TensorHandle(total.data.astype(np.float64), tl.float64)
        rounded = dot(self, a, b, wide, *options).data.astype(total.data.dtype)
        return interpreter.TensorHandle(rounded, total.dtype.scalar)

    return create_dot


def _patching_once(interpreter: Any) -> Callable[..., Any]:
    """Triton's language is made NumPy's once in a launch for each module, not in each call of a function."""
    patch, tl = interpreter._patch_lang, interpreter.tl
    patched: set[str] = set()

    def patch_once(function: Callable[..., Any]) -> Any:
        if tl.core.is_builtin(tl.load):  # it is not while a launch goes on
            patched.clear()
        if function.__module__ in patched:
            return interpreter._LangPatchScope()
        patched.add(function.__module__)
        return patch(function)

    return patch_once
