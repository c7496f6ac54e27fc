"""A teacher of whom there is only what was kept: it stands in a trainer where the model would."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset

import fastkd

from ..common.family import kind_of
from ..data.corruption import IGNORED, Item, Masks
from ..data.examples import Chunks
from ..data.pairs import Pairs
from ..objectives.terms import aligned_labels
from .kinds import Kind
from .store import Store

NUMBERS = "examples"  # in a batch: which of the training data it holds


@dataclass(frozen=True)
class CachedTeacher:
    """What a trainer reads of a teacher that is not there.

    config: the teacher's. head: its own where states are kept. epochs: of corruptions, kept. temperature:
    of what was kept.
    """

    store: Store
    config: Any
    kind: Kind
    head: fastkd.Head | None
    epochs: int
    temperature: float = 1.0

    def check_holds(self, needs: Any) -> None:
        """Raise ValueError if a loss reads more of the teacher than is kept; needs: see `forward.Needs`."""
        if needs.layers or needs.states or needs.mixed:
            raise ValueError(f"teacher: this method reads more of it than is cached, which is {self.kind} of its head")

    def to(self, device: torch.device) -> CachedTeacher:
        """Return the same with its head on a device."""
        if self.head is None:
            return self
        moved: Any = [part.to(device) if isinstance(part, torch.Tensor) else part for part in self.head]
        return dataclasses.replace(self, head=fastkd.Head(*moved))

    def read(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return what the loss reads of a batch from `Numbered`: what the head is given, [B, L, H], and the head.

        Or a `fastkd.TopK` [B, L, K], and None.
        """
        valid = aligned_labels(kind_of(self.config), inputs) != IGNORED
        kept = [self.store.read(number) for number in inputs[NUMBERS]]
        return {"hidden": (self.kind.read(kept, valid, self.temperature), self.head)}


class Numbered(Dataset):
    """Training examples that say their numbers, of which there is one for each that is kept.

    epochs: after how many corruption begins again with what it drew in the first. Items are those of `examples`,
    and under NUMBERS the number.
    """

    def __init__(self, examples: Chunks | Pairs, epochs: int):
        self.examples, self.kept = examples, len(examples) * epochs

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = index % self.kept
        return {**self.examples[number], NUMBERS: number}


def collated(collate: Callable[..., Item]) -> Callable[[Sequence[dict[str, Any]]], dict[str, Any]]:
    """Return a collator that lets examples keep their numbers, as a list, which no device gets."""

    def with_numbers(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        numbers = {NUMBERS: [item[NUMBERS] for item in items]} if NUMBERS in items[0] else {}  # none if held out
        return {**collate(items), **numbers}

    return with_numbers


def valid_lengths(examples: Chunks | Pairs, epochs: int) -> np.ndarray:
    """Return how many positions of each example, in the order of their numbers, have a label."""
    if isinstance(examples, Chunks):
        known = len(examples) * epochs if isinstance(examples.corrupt, Masks) else 1  # the others have as many each
        counts = [int((examples[i]["labels"] != IGNORED).sum()) for i in range(known)]
        return np.resize(counts, len(examples) * epochs)
    lengths = []
    for block in examples.ids.with_format("arrow").iter(10_000):
        labels = block["labels"].combine_chunks()
        has_label = pc.list_flatten(labels).to_numpy() != IGNORED
        lengths.append(np.bincount(pc.list_parent_indices(labels).to_numpy()[has_label], minlength=len(labels)))
    return np.concatenate(lengths)


def content(examples: Chunks | Pairs) -> str:
    """Return a fingerprint of the tokens and labels of training examples as they are before any corruption."""
    words = isinstance(examples, Chunks) and examples.options.get("whole_words")  # else as before there were any
    found = hashlib.sha256(b"whole words" if words else b"")
    tokens = examples.chunks if isinstance(examples, Chunks) else examples.ids
    if isinstance(tokens, np.ndarray):
        found.update(np.ascontiguousarray(tokens).data)
    else:
        for block in tokens.with_format("arrow").iter(10_000):
            for column in block.columns:
                found.update(np.ascontiguousarray(pc.list_value_length(column).to_numpy()).data)
                found.update(np.ascontiguousarray(pc.list_flatten(column).to_numpy()).data)
    return found.hexdigest()[:16]
