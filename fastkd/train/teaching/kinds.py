"""What of a teacher is kept for each position: the states before its head, or the top of its distribution, or draws."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import fastkd

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
        self, states: Sequence[torch.Tensor], head: torch.Tensor, temperature: float, seeds: Sequence[Sequence[int]]
    ) -> list[Columns]:
        """Return what is kept of examples, of which the head [V, H] is given states [positions, H], on the CPU.

        seeds: of what is drawn, of each example, so that it is the same in any batch.
        """
        if self.name == "hidden":
            return [{"hidden": state.cpu()} for state in states]
        if self.name == "topk":
            joined = torch.cat(list(states)).to(head.dtype)
            top = _columns(fastkd.TopK.from_hidden(joined, head, self.entries, temperature=temperature), len(head))
            parts = {name: column.split([len(state) for state in states]) for name, column in top.items()}
            return [{name: part[i] for name, part in parts.items()} for i in range(len(states))]
        found = []
        for state, seed in zip(states, seeds, strict=True):
            number = int.from_bytes(hashlib.sha256(repr(tuple(seed)).encode()).digest()[:7], "big")
            generator = torch.Generator(state.device).manual_seed(number)
            logits = torch.nn.functional.linear(state.to(head.dtype), head)
            drawn = fastkd.TopK.sampled(logits, self.entries, temperature=temperature, generator=generator)
            found.append(_columns(drawn, len(head)))
        return found

    def read(
        self, kept: Sequence[Columns], length: int, device: torch.device, temperature: float
    ) -> torch.Tensor | fastkd.TopK:
        """Return what was kept of the examples of a batch, padded to `length` [B, L, ...]: by 0, or by no entries.

        On the CPU until it is whole, as no device is to wait for lengths.
        """
        fillers = {"indices": -1, "log_probs": -torch.inf}
        padded = {}
        for name, first in kept[0].items():
            whole = first.new_full((len(kept), length, *first.shape[1:]), fillers.get(name, 0))
            for row, columns in zip(whole, kept, strict=True):
                row[: len(columns[name])] = columns[name]
            padded[name] = whole.to(device, non_blocking=True)
        if self.name == "hidden":
            return padded["hidden"]
        tail = "bucket" if self.name == "topk" else "ignore"
        ids = padded["indices"].int()
        return fastkd.TopK(ids, padded["log_probs"].float(), tail, padded.get("tail_log_prob"), temperature)


def _columns(top: fastkd.TopK, vocabulary: int) -> Columns:
    columns = {"indices": top.indices.to(_ids(vocabulary)), "log_probs": top.log_probs.half()}
    if top.tail_log_prob is not None:
        columns["tail_log_prob"] = top.tail_log_prob.float()
    return {name: column.cpu() for name, column in columns.items()}


def _ids(vocabulary: int) -> torch.dtype:
    return torch.int16 if vocabulary <= 2**15 else torch.int32
