"""Triton's interpreter as the tests need it: alike on every processor, and in a third of the time.

Of that time NumPy takes a small part; most goes into the types of what it computes, which are made anew in every
operation of every turn of every program. What is here leaves the numbers alone, but for the order of sums in products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


def adapt(patch: pytest.MonkeyPatch) -> None:
    """Patch the interpreter; Triton must be there."""
    from triton.runtime import interpreter

    core, semantic = interpreter.tl.core, interpreter.TritonSemantic
    builder = interpreter.interpreter_builder
    patch.setattr(interpreter.InterpreterBuilder, "create_dot", _rounding_once(interpreter))
    patch.setattr(interpreter, "_patch_lang", _patching_once(interpreter))
    patch.setattr(interpreter, "_get_np_dtype", _once_a_type(interpreter._get_np_dtype))
    patch.setattr(core.block_type, "__init__", _blocks_once(core))
    patch.setattr(core.tensor, "__init__", _tensors_once(core))
    patch.setattr(semantic, "binary_op_type_checking_impl", _alike_as_they_are(interpreter))
    # Sums of integers are computed once more in 64 bits, and nobody looks at that unless options.debug is set.
    assert not builder.options.debug
    patch.setattr(semantic, "binary_op_sanitize_overflow_impl", lambda *arguments: None)


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


def _once_a_type(np_dtype: Callable[[Any], np.dtype]) -> Callable[[Any], np.dtype]:
    """NumPy's dtype for a type, by the type's name."""
    known: dict[str, np.dtype] = {}

    def get(of: Any) -> np.dtype:
        if of.name not in known:
            known[of.name] = np_dtype(of)
        return known[of.name]

    return get


def _blocks_once(core: Any) -> Callable[..., None]:
    """Types of blocks that take their attributes from the first of their kind."""
    create = core.block_type.__init__
    known: dict[Any, dict[str, Any]] = {}

    def init(self: Any, element: Any, shape: Any) -> None:
        key = element.name, *(x.value if isinstance(x, core.constexpr) else x for x in shape)
        if key not in known:
            create(self, element, shape)
            known[key] = vars(self).copy()
        vars(self).update(known[key], element_ty=element)

    return init


def _tensors_once(core: Any) -> Callable[..., None]:
    """Tensors, too, which are a handle and what follows from their type."""
    create = core.tensor.__init__
    known: dict[str, dict[str, Any]] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        if type.name not in known:
            create(self, handle, type)
            known[type.name] = vars(self).copy()
        vars(self).update(known[type.name], handle=handle, type=type, dtype=type.scalar)

    return init


def _alike_as_they_are(interpreter: Any) -> Callable[..., tuple[Any, Any]]:
    """Two operands of one type need no common one, and a number beside a block becomes a block once.

    Not of pointers, nor of the types that are divided in another: 16 bits.
    """
    check = interpreter.TritonSemantic.binary_op_type_checking_impl
    tensor, plain = interpreter.tl.core.tensor, {"int1", "int32", "int64", "fp32", "fp64"}
    known: dict[Any, Any] = {}

    def checked(self: Any, left: Any, right: Any, *options: Any, **named: Any) -> tuple[Any, Any]:
        number_first = type(left) in (int, float)
        block, number = (right, left) if number_first else (left, right)
        if type(block) is not tensor or block.dtype.name not in plain:
            return check(self, left, right, *options, **named)
        if type(number) is tensor and block.type.name == number.type.name:
            return left, right
        if type(number) not in (int, float):
            return check(self, left, right, *options, **named)
        key = repr(number), number_first, block.type.name, options, *named.items()
        if key not in known:
            pair = check(self, left, right, *options, **named)
            if block is not pair[number_first]:  # it was cast
                return pair
            known[key] = pair[not number_first]
        return (known[key], block) if number_first else (block, known[key])

    return checked
