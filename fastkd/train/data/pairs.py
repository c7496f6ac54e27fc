"""Pairs of source and target as examples: tokenised into Arrow files, padded into batches, with classes for labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..common.errors import InputError
from ..models.tokenizer import special_tokens, texts_of
from .columns import finite
from .corruption import IGNORED, Item
from .encoding import Encoding
from .sources import arrow_file, blocks

STRINGS = ("source", "target", "task", "pair")  # of the columns; the others are ids


@dataclass
class Counts:
    """What tokenising pairs did: pairs in all, those whose source or target was cut, and those of the other targets
    that come back as another text, so that no output can be right, with the first of them and what became of it.
    """

    pairs: int = 0
    cut_sources: int = 0
    cut_targets: int = 0
    unwritable: int = 0
    example: tuple[str, str] | None = None


def tokenize_pairs(
    pairs: Iterable[Mapping[str, str]],
    tokenizer: Any,
    max_source_length: int,
    max_target_length: int,
    path: Path,
    *,
    cut_targets: bool = True,
    what: str = "training data",
    **reading: Any,
) -> tuple[datasets.Dataset, Counts]:
    """Tokenise pairs into an Arrow file; return the Dataset that maps it, and how many were cut.

    The Dataset has the strings, too, and ids (int32) within the limits: see `Encoding`, which takes `reading`.
    Raises InputError for a target above its limit if cut_targets is false, and if there are no pairs; no file is left.
    """
    encoding = Encoding(tokenizer, max_source_length, max_target_length, **reading)
    strings = STRINGS if encoding.has_pairs else STRINGS[:-1]
    ids = ["input_ids", "labels", *["token_type_ids"] * encoding.has_types]
    features = datasets.Features(dict.fromkeys(ids, datasets.List(datasets.Value("int32"))))
    features.update(dict.fromkeys(strings, datasets.Value("string")))
    counts = Counts()
    rows = tqdm(pairs, desc="tokenising pairs", unit="pair", mininterval=1)
    with arrow_file(path, features) as write:
        for block in blocks(rows):
            columns: dict[str, list[Any]] = {name: [row[name] for row in block] for name in strings}
            encoded, sources, targets = encoding(block)
            columns |= encoded
            over = [i for i, length in enumerate(targets) if length > max_target_length]
            if over and not cut_targets:
                n, text = over[0], columns["target"][over[0]]
                raise InputError(
                    f"{what}: the target of pair {counts.pairs + n + 1} has {targets[n]} tokens, expected at most "
                    f"{max_target_length}: {text[:60]!r}; --max_target_length cuts targets"
                )
            counts.pairs += len(block)
            counts.cut_sources += sum(length > max_source_length for length in sources)
            counts.cut_targets += len(over)
            whole = [i for i, length in enumerate(targets) if length <= max_target_length]
            written = texts_of(tokenizer, [columns["labels"][i] for i in whole], special_tokens(tokenizer).values())
            for given, text in zip((columns["target"][i] for i in whole), written, strict=True):
                if text != given.strip():
                    counts.unwritable += 1
                    counts.example = counts.example or (given, text)
            write(columns)
        if not counts.pairs:
            raise InputError("no pairs: expected at least one source and target")
    return datasets.Dataset.from_file(str(path)), counts


def pair_item(is_causal: bool, input_ids: Sequence[int], labels: Sequence[Any], **others: Sequence[int]) -> Item:
    """Return an example of ids; a causal model's is the prompt and its target in one, and learns the target alone."""
    if is_causal:
        input_ids, labels = [*input_ids, *labels], [IGNORED] * len(input_ids) + [*labels]
    ids = torch.tensor(input_ids)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(labels)}
    return {**made, **{name: torch.tensor(value) for name, value in others.items()}}


class Pairs(Dataset):
    """Tokenised pairs as examples: "input_ids", "attention_mask" and "labels" (int64), not padded; see `pad`.

    is_causal: whether a prompt and its target are one text. Pairs of sources have "token_type_ids" where models read
    them.
    """

    def __init__(self, rows: datasets.Dataset, is_causal: bool = False):
        self.rows, self.is_causal = rows, is_causal
        self.ids = rows.select_columns([name for name in rows.column_names if name not in STRINGS])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Item:
        return pair_item(self.is_causal, **self.ids[index])

    def answers(self, tokenizer: Any, texts: list[str]) -> list[list[int]]:
        """Return the "labels" of other targets, whole: texts that a model wrote."""
        end = [tokenizer.eos_token_id] * self.is_causal
        made = tokenizer(text_target=texts, add_special_tokens=not self.is_causal)["input_ids"]
        return [[*ids, *end] for ids in made]

    def select(self, indices: Sequence[int]) -> Pairs:
        """Return the examples with these numbers."""
        return Pairs(self.rows.select(indices), self.is_causal)


def class_labels(targets: Iterable[str], classes: Sequence[str]) -> list[list[Any]]:
    """Return the "labels" [1] of a classifier's pairs: each target's number among the classes, or -100.

    Where there is one class alone, it is a score, and the label the number that the target is.
    """
    if len(classes) == 1:
        return [[number(target)] for target in targets]
    numbers = {name: i for i, name in enumerate(classes)}
    return [[numbers.get(target, IGNORED)] for target in targets]


def number(target: str) -> float:
    """Return a target as the score that it is."""
    if math.isnan(value := finite(target)):
        raise InputError(f"the model has one output, a score: expected numbers for targets, got {target[:60]!r}")
    return value


def pad(tokenizer: Any, one_label: bool = False) -> Callable[[Sequence[Item]], Item]:
    """Return the collator of pairs: padded to the longest, rounded up to a multiple of 8, labels by -100.

    one_label: that of `class_labels`, which are as long as each other already.
    """
    filler = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return partial(_padded, {"input_ids": filler, "labels": IGNORED}, {"labels": 1} if one_label else {})


def _padded(fillers: dict[str, int], multiples: dict[str, int], items: Sequence[Item]) -> Item:
    batch = {}
    for name in (name for name, value in items[0].items() if isinstance(value, torch.Tensor)):  # no number of a cache
        filler = fillers.get(name, 0)  # of masks and token types
        ids = pad_sequence([item[name] for item in items], True, filler)
        batch[name] = torch.nn.functional.pad(ids, (0, -ids.shape[1] % multiples.get(name, 8)), value=filler)
    return batch
