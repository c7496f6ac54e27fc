"""Weights of heads that are quantised: their rows as plain tensors, a block of them at a time.

torchao and bitsandbytes are known by their classes, and imported by nobody but their own weights.

V vocabulary, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["QuantizedWeight", "any_quantized", "comes_from", "quantized", "row_blocks"]

# A block of rows takes no more than this share of the scores that it is multiplied into, but at least so many rows.
SHARE_OF_SCORES = 16
FEWEST_ROWS = 256


def comes_from(x: object, package: str) -> bool:
    return any(cls.__module__.split(".")[0] == package for cls in type(x).__mro__)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight [V, H] whose rows are made when they are needed; a ``fastkd.Head`` may have one in a tensor's place.

    ``linear_kl`` and ``TopK.from_hidden`` ask for a block of rows, multiply it, and let go of it. What is multiplied is
    the dequantised weight, in the dtype of the hidden states; what layers do to their input beside, as LLM.int8() and
    dynamic quantisation do, they do not. It is a constant: a student's hidden states and bias get their gradients.

    ``fastkd.head`` makes one of what torchao and bitsandbytes have quantised. For others say how rows are made::

        weight = fastkd.QuantizedWeight(codes.shape, codes.device, lambda i, j: codes[i:j] * scales[i:j, None])

    Args:
        shape: V and H.
        device: where its rows are.
        rows: makes of numbers i < j the rows from i to before j, a floating tensor [j - i, H].
        dtype: that its rows are turned into; ``linear_kl`` sets that of the hidden states.
    """

    shape: torch.Size
    device: torch.device
    rows: Callable[[int, int], Tensor]
    dtype: torch.dtype = torch.float32

    def __getitem__(self, rows: slice) -> Tensor:
        """Rows, for a slice of them."""
        start, stop, _ = rows.indices(self.shape[0])
        wanted = [stop - start, self.shape[1]]
        if start >= stop:
            return torch.empty(0, self.shape[1], dtype=self.dtype, device=self.device)
        block = self.rows(start, stop)
        block = block.detach() if isinstance(block, Tensor) else block
        if type(block) is not Tensor or list(block.shape) != wanted or block.device != self.device:
            got = f"{list(block.shape)} on {block.device}" if isinstance(block, Tensor) else ""
            raise ValueError(
                f"QuantizedWeight: expected rows({start}, {stop}) to be a plain tensor of shape {wanted} on "
                f"{self.device}, got {type(block).__name__} {got}"
            )
        return block.to(self.dtype)

    def check(self, name: str, width: int) -> None:
        """Raises unless it is what hidden states of this width are multiplied with."""
        if len(self.shape) != 2 or self.shape[1] != width:
            raise ValueError(f"{name}: expected shape [any, {width}], got {list(self.shape)}")

    def to(self, dtype: torch.dtype) -> QuantizedWeight:
        return replace(self, dtype=dtype)


def any_quantized(weights: Iterable[object]) -> bool:
    return any(isinstance(x, QuantizedWeight) for x in weights)


def row_blocks(
    weight: Tensor | QuantizedWeight, scores: Tensor, at_once: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """A weight as blocks of rows to multiply into scores [n, V], as far as these go.

    Of a tensor they are of `at_once` rows, or all for None.
    """
    count = scores.shape[1]
    if isinstance(weight, QuantizedWeight):
        at_once = max(FEWEST_ROWS, scores.numel() // (SHARE_OF_SCORES * weight.shape[1]))
    step = max(1, at_once or count)
    for start in range(0, max(1, count), step):
        rows = slice(start, min(start + step, count))
        yield rows, weight[rows]


# ---- packages that quantise -----------------------------------------------------------------------------------------


def quantized(module: Any) -> QuantizedWeight | None:
    """The weight of a linear layer that torchao or bitsandbytes has quantised; None of another one."""
    weight: Any = getattr(module, "weight", None)
    if comes_from(weight, "torchao"):
        return _of_torchao(weight)
    for name, rows_of in (("Linear4bit", _rows_of_4bit), ("Linear8bitLt", _rows_of_int8)):
        if any(cls.__name__ == name and cls.__module__.startswith("bitsandbytes.") for cls in type(module).__mro__):
            shape = torch.Size((module.out_features, module.in_features))
            return QuantizedWeight(shape, weight.device, rows_of(module))
    for x in (module, weight):
        if comes_from(x, "torchao") or comes_from(x, "bitsandbytes"):
            raise TypeError(
                "model: expected a quantised head with a weight of torchao's, or a Linear4bit or Linear8bitLt of "
                f"bitsandbytes, got {type(module).__module__}.{type(module).__name__} with a weight that is "
                f"{type(weight).__name__}; {_ADVICE}"
            )
    return None


_ADVICE = "a fastkd.QuantizedWeight says how its rows are made, or make a Head of its dequantised weight"


def _of_torchao(weight: Any) -> QuantizedWeight:
    plain = weight.detach()

    def rows(start: int, stop: int) -> Tensor:
        return plain[start:stop].dequantize()

    try:
        rows(0, 1)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        raise TypeError(
            f"model: expected a head whose rows torchao dequantises by themselves, got a {type(weight).__name__} that "
            f"does not ({error}); {_ADVICE}"
        ) from error
    return QuantizedWeight(weight.shape, weight.device, rows, weight.dtype)


def _not_yet(module: Any) -> TypeError:
    return TypeError(
        f"model: expected a head that is quantised, got a {type(module).__name__} that bitsandbytes is yet to "
        "quantise, as it does when the model goes to its device: to(device)"
    )


def _rows_of_int8(module: Any) -> Callable[[int, int], Tensor]:
    """Of LLM.int8(): codes [V, H] int8, and the maximum of each row."""
    weight, state = module.weight, module.state
    scales = weight.SCB if weight.SCB is not None else state.SCB
    codes = weight.detach()
    if codes.dtype != torch.int8 or scales is None:
        raise _not_yet(module)
    from bitsandbytes.functional import int8_vectorwise_dequant

    codes = codes.as_subclass(Tensor)
    return lambda start, stop: int8_vectorwise_dequant(codes[start:stop], scales[start:stop])


def _rows_of_4bit(module: Any) -> Callable[[int, int], Tensor]:
    """Of NF4 and FP4: two codes a byte, in blocks along the flattened weight, which may begin amid a row."""
    weight, state = module.weight, module.weight.quant_state
    if state is None:
        raise _not_yet(module)
    if getattr(state, "packing_format_for_cpu", False):
        raise TypeError(
            "model: expected a 4-bit head in the order of its rows, got one that bitsandbytes has packed anew for this "
            "CPU, as it does where the head runs in eval(); keep the head in train(), or out of the forward pass"
        )
    from bitsandbytes.functional import dequantize_4bit

    codes, width = weight.detach().as_subclass(Tensor).view(torch.uint8).reshape(-1), module.in_features

    def rows(start: int, stop: int) -> Tensor:
        first, last = start * width // state.blocksize, -(-stop * width // state.blocksize)
        last = min(last, -(-module.out_features * width // state.blocksize))
        begin, end = first * state.blocksize, min(last * state.blocksize, module.out_features * width)
        block = type(state)(
            absmax=_maxima(state, first, last), shape=torch.Size((end - begin,)), dtype=state.dtype, code=state.code,
            blocksize=state.blocksize, quant_type=state.quant_type,
        )  # fmt: skip
        flat = dequantize_4bit(codes[begin // 2 : -(-end // 2)].unsqueeze(1), block).reshape(-1)
        return flat[start * width - begin :][: (stop - start) * width].view(stop - start, width)

    return rows


def _maxima(state: Any, first: int, last: int) -> Tensor:
    """The maxima of 4-bit blocks [last - first], which may be quantised themselves, in blocks."""
    if not state.nested:
        return state.absmax[first:last]
    from bitsandbytes.functional import dequantize_blockwise

    inner = state.state2
    begin = first // inner.blocksize
    part = type(inner)(
        absmax=inner.absmax[begin : -(-last // inner.blocksize)], code=inner.code, blocksize=inner.blocksize,
        dtype=inner.dtype,
    )  # fmt: skip
    whole = dequantize_blockwise(state.absmax[begin * inner.blocksize : last], part) + state.offset
    return whole[first - begin * inner.blocksize :].float()
