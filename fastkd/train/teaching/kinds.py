"""What of a teacher is kept for each position: the states before its head, or the top of its distribution, or draws."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import fastkd

from ..models.anatomy import logits

KINDS = ("hidden", "topk", "sampled")
Columns = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Kind:
    """What `--teacher_cache` names. entries: of each position, for "topk" and "sampled".

    Those are kept as ids, of 16 bits where the vocabulary allows, with log-probabilities in float16; of the top also
    the exact mass of what is left, as a logarithm. They are of the loss's temperature.
    """

    name: str
    entries: int = 0

    @classmethod
    def parse(cls, text: str) -> Kind:
        """Return what "hidden", "topk:K" or "sampled:K" says; raises ValueError for anything else."""
        name, colon, number = text.partition(":")
        entries = int(number) if number.isascii() and number.isdecimal() else 0
        if name not in KINDS or (name == "hidden") == bool(colon) or (colon and entries < 1):
            raise ValueError(f"expected hidden, topk:K or sampled:K with K at least 1, got {text!r}")
        return cls(name, entries)

    def __str__(self) -> str:
        return f"{self.name}:{self.entries}" if self.entries else self.name

    def bytes(self, width: int, vocabulary: int, dtype: torch.dtype) -> int:
        """Return what a position takes; width: of a state, which is kept in `dtype`."""
        if self.name == "hidden":
            return width * dtype.itemsize
        return self.entries * (_ids(vocabulary).itemsize + 2) + (4 if self.name == "topk" else 0)

    def keep(
        self, states: Sequence[torch.Tensor], head: fastkd.Head, temperature: float, seeds: Sequence[Sequence[int]]
    ) -> list[Columns]:
        """Return what is kept of examples, of which the head is given states [positions, H], on the CPU.

        seeds: of what is drawn, of each example, so that it is the same in any batch.
        """
        if self.name == "hidden":
            return [{"hidden": state.cpu()} for state in states]
        vocabulary, dtype = head.weight.shape[0], head.weight.dtype
        if self.name == "topk":
            joined = torch.cat(list(states)).to(dtype)
            top = _columns(fastkd.TopK.from_hidden(joined, head, self.entries, temperature=temperature), vocabulary)
            parts = {name: column.split([len(state) for state in states]) for name, column in top.items()}
            return [{name: part[i] for name, part in parts.items()} for i in range(len(states))]
        found = []
        for state, seed in zip(states, seeds, strict=True):
            number = int.from_bytes(hashlib.sha256(repr(tuple(seed)).encode()).digest()[:7], "big")
            generator = torch.Generator(state.device).manual_seed(number)
            scores = logits(state.to(dtype), head)
            drawn = fastkd.TopK.sampled(scores, self.entries, temperature=temperature, generator=generator)
            found.append(_columns(drawn, vocabulary))
        return found

    def read(self, kept: Sequence[Columns], valid: torch.Tensor, temperature: float) -> torch.Tensor | fastkd.TopK:
        """Return what was kept of a batch's examples, [B, L, ...], where valid [B, L]; elsewhere 0, or no entries.

        It goes to the device as it lies and is put in its places there, so that nothing waits for where these are.
        """
        fillers = {"indices": -1, "log_probs": -torch.inf}
        places = valid.flatten().cumsum(0).sub(1).clamp_min(0)  # of each position, in all that was kept
        found = {}
        for name in kept[0]:
            joined = torch.cat([columns[name] for columns in kept]).to(valid.device, non_blocking=True)
            whole = joined[places].unflatten(0, valid.shape)
            dropped = ~valid.view(*valid.shape, *[1] * (whole.dim() - 2))
            found[name] = whole.masked_fill(dropped, fillers.get(name, 0))
        if self.name == "hidden":
            return found["hidden"]
        tail = "bucket" if self.name == "topk" else "ignore"
        ids = found["indices"].int()
        return fastkd.TopK(ids, found["log_probs"].float(), tail, found.get("tail_log_prob"), temperature)


def _columns(top: fastkd.TopK, vocabulary: int) -> Columns:
    columns = {"indices": top.indices.to(_ids(vocabulary)), "log_probs": top.log_probs.half()}
    if top.tail_log_prob is not None:
        columns["tail_log_prob"] = top.tail_log_prob.float()
    return {name: column.cpu() for name, column in columns.items()}


def _ids(vocabulary: int) -> torch.dtype:
    return torch.int16 if vocabulary <= 2**15 else torch.int32
