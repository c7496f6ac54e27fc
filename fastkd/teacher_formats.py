"""Ids and log-probabilities as servers and files have them, as tensors that are padded: what ``TopK`` reads.

Lists are ragged at every level: sequences of a batch, tokens of a sequence, entries of a token. None stands for a list
of nothing, and for a log-probability that nobody knows.
"""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

__all__ = ["columns", "ragged", "trl_response", "vllm_lists"]


def _is_list(x: Any) -> bool:
    """Lists, arrays, tensors and columns, whatever their library."""
    return hasattr(x, "__len__") and not isinstance(x, (str, bytes, Mapping))


def _list(x: Any) -> Any:
    if x is None:
        return ()
    if not _is_list(x):
        raise TypeError(f"expected a list, got {type(x).__name__}")
    for name in ("to_pylist", "tolist"):  # pyarrow's; NumPy's, torch's, pandas'
        if hasattr(x, name):
            return getattr(x, name)()
    return x


def _levels(name: str, nested: Any) -> tuple[list[list[int]], list[Any]]:
    """The lengths of the lists at each level, and the numbers in the last."""
    lengths: list[list[int]] = []
    items = [nested]
    while not lengths or _is_list(next((x for x in items if x is not None), None)):
        try:
            items = [_list(x) for x in items]
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
        lengths.append([len(x) for x in items])
        items = list(chain.from_iterable(items))
    return lengths, items


def _numbers(name: str, items: list[Any], dtype: torch.dtype) -> Tensor:
    code = "q" if dtype == torch.int64 else "d"
    try:
        flat = array(code, items)  # a fifteenth of the time that torch takes for a list
    except (TypeError, OverflowError):
        if code == "d" and None in items:
            return _numbers(name, [-torch.inf if x is None else x for x in items], dtype)
        kinds = {type(x).__name__ for x in items} - ({"int"} if code == "q" else {"int", "float"})
        what = "integers" if code == "q" else "numbers"
        raise TypeError(f"{name}: expected {what}, got {', '.join(sorted(kinds)) or 'some beyond 64 bits'}") from None
    return torch.frombuffer(flat, dtype=dtype).clone() if len(flat) else torch.empty(0, dtype=dtype)


def _check_lengths(name: str, given: list[list[int]], wanted: list[list[int]]) -> None:
    if len(given) != len(wanted):
        raise ValueError(f"{name}: expected lists in lists {len(wanted)} deep, as the ids are, got {len(given)}")
    for level, (ours, others) in enumerate(zip(given, wanted, strict=True)):
        for i, (mine, other) in enumerate(zip(ours, others, strict=True)):
            if mine != other:
                raise ValueError(
                    f"{name}: expected the lengths of the ids, {other} in list {i} of level {level}, got {mine}"
                )


def ragged(name: str, indices: Any, log_probs: Any, mask: Any = None) -> tuple[Tensor, Tensor]:
    """Nested lists of equal lengths [..., K] as tensors, int64 and float32, -1 and -inf where they are padded.

    mask: the same of what is to count, 0 where it is not.
    """
    lengths, items = _levels(f"{name}.indices", indices)
    others, values = _levels(f"{name}.log_probs", log_probs)
    _check_lengths(f"{name}.log_probs", others, lengths)
    shape = [max(level, default=0) for level in lengths]
    shape[-1] = max(1, shape[-1])
    place = torch.zeros(1, dtype=torch.int64)  # of each list's first item, and at last of each number
    for level, size in zip(lengths, shape, strict=True):
        count = torch.tensor(level, dtype=torch.int64)
        before = count.cumsum(0) - count
        place = (place * size - before).repeat_interleave(count) + torch.arange(int(count.sum()))
    ids = _numbers(f"{name}.indices", items, torch.int64)
    numbers = _numbers(f"{name}.log_probs", values, torch.float64).float()
    if mask is not None:
        lengths_of_mask, counts = _levels(f"{name}.mask", mask)
        _check_lengths(f"{name}.mask", lengths_of_mask, lengths)
        numbers = numbers.masked_fill(_numbers(f"{name}.mask", counts, torch.int64) == 0, -torch.inf)
    padded = torch.full(shape, -1, dtype=torch.int64), torch.full(shape, -torch.inf)
    padded[0].view(-1)[place] = ids.masked_fill(numbers == -torch.inf, -1)
    padded[1].view(-1)[place] = numbers
    return padded


# ---- vLLM -----------------------------------------------------------------------------------------------------------


def vllm_lists(given: Any) -> tuple[Any, Any]:
    """Nested lists of ids and of log-probabilities, of what vLLM and servers of its interface return.

    A token's entries are {id: entry}, or OpenAI's list of {"token": "token_id:17", "logprob": x}; None where there are
    none. Lists of tokens may lie in lists of sequences.
    """
    if given is None:
        return [], []
    if isinstance(given, Mapping):
        return [_vllm_id(key) for key in given], [_vllm_log_prob(entry) for entry in given.values()]
    if not _is_list(given):
        raise TypeError(f"TopK.from_vllm: expected a list with a dict for each token, got {type(given).__name__}")
    first = given[0] if len(given) else None
    if isinstance(first, Mapping) and "token" in first and "logprob" in first:
        return [_vllm_id(entry["token"]) for entry in given], [_vllm_log_prob(entry) for entry in given]
    pairs = [vllm_lists(x) for x in given]
    return [ids for ids, _ in pairs], [log_probs for _, log_probs in pairs]


def _vllm_id(key: Any) -> int:
    try:
        return int(key.removeprefix("token_id:") if isinstance(key, str) else key)
    except (TypeError, ValueError):
        raise ValueError(
            f"TopK.from_vllm: expected ids of tokens, as 17, '17' or 'token_id:17' (return_tokens_as_token_ids), "
            f"got {key!r}"
        ) from None


def _vllm_log_prob(entry: Any) -> Any:
    if isinstance(entry, Mapping):
        return entry["logprob"]
    return getattr(entry, "logprob", entry)


# ---- TRL ------------------------------------------------------------------------------------------------------------


def trl_response(response: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """What TRL's ``/get_sequence_logprobs/`` answers, in either of its formats, or its client makes of that."""
    if not isinstance(response, Mapping):
        raise TypeError(f"TopK.from_trl: expected the server's answer, a dict, got {type(response).__name__}")
    if response.get("logprobs_b64") is not None:
        ids = _decoded(response, "token_ids_b64", torch.int32).long()
        log_probs = _decoded(response, "logprobs_b64", torch.float32)
        return ids.masked_fill(log_probs == -torch.inf, -1), log_probs
    if response.get("logprob_token_ids") is None or response.get("logprobs") is None:
        raise ValueError(
            "TopK.from_trl: expected logprob_token_ids and logprobs, or token_ids_b64 and logprobs_b64, "
            f"got {', '.join(map(str, response)) or 'an empty dict'}"
        )
    return ragged("TopK.from_trl", response["logprob_token_ids"], response["logprobs"])


def _decoded(response: Mapping[str, Any], key: str, dtype: torch.dtype) -> Tensor:
    """What a field holds in base64, in the shape that the answer tells."""
    shape: Any = response.get("shape")
    if not _is_list(shape) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"TopK.from_trl: shape: expected a list of sizes, got {shape!r}")
    try:
        raw = bytearray(base64.b64decode(response[key], validate=True))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"TopK.from_trl: {key}: expected base64, got {response.get(key)!r:.40}") from error
    expected = 4 * math.prod(shape)
    if len(raw) != expected:
        raise ValueError(f"TopK.from_trl: {key}: expected {expected} bytes for shape {list(shape)}, got {len(raw)}")
    return (torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)).view(list(shape))


# ---- columns --------------------------------------------------------------------------------------------------------

_COMPRESSED = {"compressed_logprobs", "packed_indices"}


def columns(table: Any, indices: str, log_probs: str, mask: str | None) -> tuple[Tensor, Tensor]:
    """Columns of a dict, or of a table of pyarrow, pandas or datasets."""
    names = list(getattr(table, "column_names", table))
    for argument, name in (("indices", indices), ("log_probs", log_probs), ("mask", mask)):
        if name is not None and name not in names:
            hint = ""
            if _COMPRESSED & set(names):
                hint = "; DistillKit's compressed columns are not read: take what its decompress_to_sparse returns"
            raise ValueError(
                f"TopK.from_columns: {argument}: expected one of {', '.join(map(str, names))}, got {name!r}{hint}"
            )
    return ragged("TopK.from_columns", table[indices], table[log_probs], None if mask is None else table[mask])
