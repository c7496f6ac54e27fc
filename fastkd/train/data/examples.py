"""What a model reads: texts packed into chunks and corrupted as T5 does (Raffel et al., 2020, arXiv 1910.10683), or
pairs of source and target, from Arrow files on disk or as endless streams.

Every example's random numbers come from (seed, epoch, index) and from no global state: the stream is the same after
a resume, on any number of data workers or processes, and for every method compared on it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info
from tqdm.auto import tqdm

from ..common.errors import InputError
from ..models.tokenizer import special_tokens, texts_of
from .sources import arrow_file, blocks

NOISE_DENSITY, MEAN_SPAN_LENGTH = 0.15, 3.0
IGNORED = -100  # the label of padding, which no loss counts

Item = dict[str, torch.Tensor]
Stream: TypeAlias = datasets.IterableDataset


def tokenize(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text, without EOS.

    The names of padding, EOS and sentinels are text like all other; special tokens that a user added are tokens.
    """
    settings: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
    ids = tokenizer(texts, split_special_tokens=True, **settings)["input_ids"]
    special = special_tokens(tokenizer)
    own = {name for name in special if re.fullmatch(r"<extra_id_\d+>", name)}
    own |= {tokenizer.pad_token, tokenizer.eos_token}
    added = special.keys() - own - {tokenizer.unk_token}
    for i, text in enumerate(texts if added else ()):
        if any(name in text for name in added):
            ids[i] = tokenizer(text, **settings)["input_ids"]
    # Unigram vocabularies hold the names as pieces, too, so that they are found in text all the same.
    spelled = {special[name]: tokenizer.convert_tokens_to_ids(list(name)) for name in own}
    return [
        text if spelled.keys().isdisjoint(text) else [part for id in text for part in spelled.get(id, (id,))]
        for text in ids
    ]


def _packed(tokenizer: Any, rows: Iterable[Mapping[str, str]], length: int) -> Iterator[np.ndarray]:
    """Yield texts as chunks of tokens [n, length] (int32), n > 0 and different each time; the last few are dropped.

    The texts' tokens follow each other without padding; none is lost between the blocks in which they are tokenised.
    """
    left = np.empty(0, dtype=np.int32)
    for block in blocks(rows):
        ids = tokenize(tokenizer, [row["text"] for row in block])
        stream = np.concatenate([left, *(np.asarray(text, dtype=np.int32) for text in ids)])
        whole = len(stream) // length * length
        left = stream[whole:]
        if whole:
            yield stream[:whole].reshape(-1, length)


def pack_to_arrow(
    tokenizer: Any, rows: Iterable[Mapping[str, str]], length: int, path: Path, what: str = "training text"
) -> datasets.Dataset:
    """Pack texts into chunks of `length` tokens, "input_ids" (int32), in an Arrow file, which the Dataset maps.

    Raises InputError, calling the texts `what`, if they do not fill one chunk; no file is left then.
    """
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), length)})
    bar = tqdm(rows, desc=f"tokenising {what}", unit="text", mininterval=1)
    chunks = 0
    with arrow_file(path, features) as write:
        for block in _packed(tokenizer, bar, length):
            chunks += len(block)
            write({"input_ids": pa.FixedSizeListArray.from_arrays(block.ravel(), length)})
        if not chunks:
            raise InputError(
                f"too little {what}: its tokens do not fill one chunk of {length}; --sequence_length takes less"
            )
    return datasets.Dataset.from_file(str(path))


def span_counts(length: int) -> tuple[int, int]:
    """Return (noise tokens, noise spans) of a chunk of `length` >= 2 tokens, rounded as T5 does."""
    noise = min(max(round(length * NOISE_DENSITY), 1), length - 1)
    return noise, min(max(round(noise / MEAN_SPAN_LENGTH), 1), length - noise)


def _random_segmentation(rng: np.random.Generator, items: int, segments: int) -> np.ndarray:
    """Return the lengths [segments], each >= 1 and `items` in sum, of a uniformly random division."""
    cuts = np.sort(rng.permutation(items - 1)[: segments - 1]) + 1
    return np.diff(cuts, prepend=0, append=items)


def noise_mask(length: int, rng: np.random.Generator) -> np.ndarray:
    """Return a mask [length], True on noise. Spans alternate, clean text first and noise last (T5's construction)."""
    noise, spans = span_counts(length)
    lengths = np.empty(2 * spans, dtype=np.int64)
    lengths[0::2] = _random_segmentation(rng, length - noise, spans)
    lengths[1::2] = _random_segmentation(rng, noise, spans)
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def _with_sentinels(tokens: np.ndarray, mask: np.ndarray, sentinels: np.ndarray, eos: int) -> np.ndarray:
    """Replace each run of True in mask by one sentinel, the first by sentinels[0] and so on, and append eos."""
    starts = mask & ~np.concatenate(([False], mask[:-1]))
    replaced = np.where(starts, sentinels[np.cumsum(starts) - 1], tokens)
    return np.append(replaced[starts | ~mask], eos)


class Corruption:
    """Span corruption of chunks of one length, with the sentinels <extra_id_0>, <extra_id_1> ... in order.

    Ids are looked up by name: they count down in T5's vocabulary and up in ByT5's.
    Raises InputError if chunks of `length` tokens need more sentinels than the tokenizer has.
    """

    def __init__(self, tokenizer: Any, length: int):
        self.length = length
        self.eos: int = tokenizer.eos_token_id
        spans = span_counts(length)[1]
        ids = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(spans)])
        if None in ids or tokenizer.unk_token_id in ids:
            raise InputError(f"chunks of {length} tokens need {spans} sentinels; the tokenizer has fewer")
        self.sentinels = np.array(ids, dtype=np.int64)

    def __call__(self, tokens: np.ndarray, seed: Sequence[int]) -> Item:
        """Return "input_ids" [L - noise + spans + 1] and "labels" [noise + spans + 1] (int64) of tokens [L]."""
        mask = noise_mask(self.length, np.random.default_rng(seed))
        return {
            "input_ids": torch.from_numpy(_with_sentinels(tokens, mask, self.sentinels, self.eos)),
            "labels": torch.from_numpy(_with_sentinels(tokens, ~mask, self.sentinels, self.eos)),
        }


class SpanCorruption(Dataset):
    """Chunks as training examples, corrupted anew in every epoch.

    chunks: [N, L] token ids, as an array or as the Dataset of `pack_to_arrow`. Item i + N * epoch is chunk i as that
    epoch sees it. All items are equally long, so nothing is ever padded.
    """

    def __init__(self, chunks: np.ndarray | datasets.Dataset, tokenizer: Any, seed: int):
        self.chunks, self.seed = chunks, seed
        length = chunks.shape[1] if isinstance(chunks, np.ndarray) else chunks.features["input_ids"].length
        self.corrupt = Corruption(tokenizer, length)

    def __iter__(self) -> Iterator[Item]:
        return (self[i] for i in range(len(self)))  # the first epoch; indices beyond it are valid too

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> Item:
        epoch, chunk = divmod(index, len(self.chunks))
        tokens = self.chunks[chunk] if isinstance(self.chunks, np.ndarray) else self.chunks[chunk]["input_ids"]
        return self.corrupt(np.asarray(tokens, dtype=np.int64), (self.seed, epoch, chunk))

    def select(self, indices: Sequence[int]) -> SpanCorruption:
        """Return the chunks with these numbers; they are corrupted otherwise than here."""
        some = copy.copy(self)
        some.chunks = self.chunks[indices] if isinstance(self.chunks, np.ndarray) else self.chunks.select(indices)
        return some


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


def _cut(tokenizer: Any, texts: list[str], limit: int) -> tuple[list[list[int]], list[int]]:
    """Return (ids of each text, at most `limit` with EOS at the end; their lengths before they were cut)."""
    if limit < 2:
        raise ValueError(f"limit: expected at least 2 tokens, one and EOS, got {limit}")
    ids = tokenize(tokenizer, texts)
    return [[*text[: limit - 1], tokenizer.eos_token_id] for text in ids], [len(text) + 1 for text in ids]


def tokenize_pairs(
    pairs: Iterable[Mapping[str, str]],
    tokenizer: Any,
    max_source_length: int,
    max_target_length: int,
    path: Path,
    *,
    cut_targets: bool = True,
    what: str = "training data",
) -> tuple[datasets.Dataset, Counts]:
    """Tokenise pairs into an Arrow file; return the Dataset that maps it, and how many were cut.

    The Dataset has the strings, too, and "input_ids" and "labels" (int32), which end in EOS within the limits.
    Raises InputError for a target above its limit if cut_targets is false, and if there are no pairs; no file is left.
    """
    ids, words = datasets.List(datasets.Value("int32")), datasets.Value("string")
    features = datasets.Features({"input_ids": ids, "labels": ids, "source": words, "target": words, "task": words})
    counts = Counts()
    rows = tqdm(pairs, desc="tokenising pairs", unit="pair", mininterval=1)
    with arrow_file(path, features) as write:
        for block in blocks(rows):
            columns: dict[str, list[Any]] = {name: [row[name] for row in block] for name in list(features)[2:]}
            columns["input_ids"], sources = _cut(tokenizer, columns["source"], max_source_length)
            columns["labels"], targets = _cut(tokenizer, columns["target"], max_target_length)
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


def _pair_item(input_ids: Sequence[int], labels: Sequence[int]) -> Item:
    ids = torch.tensor(input_ids)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(labels)}


class Pairs(Dataset):
    """Tokenised pairs as examples: "input_ids", "attention_mask" and "labels" (int64), not padded; see `pad`."""

    def __init__(self, rows: datasets.Dataset):
        self.rows = rows
        self.ids = rows.select_columns(["input_ids", "labels"])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Item:
        return _pair_item(**self.ids[index])

    def select(self, indices: Sequence[int]) -> Pairs:
        """Return the examples with these numbers."""
        return Pairs(self.rows.select(indices))


def class_labels(targets: Iterable[str], classes: Sequence[str]) -> list[list[int]]:
    """Return the "labels" [1] of an EncT5's pairs: each target's number among the classes, or -100."""
    numbers = {name: i for i, name in enumerate(classes)}
    return [[numbers.get(target, IGNORED)] for target in targets]


def pad(tokenizer: Any, one_label: bool = False) -> Callable[[Sequence[Item]], Item]:
    """Return the collator of pairs: padded to the longest, rounded up to a multiple of 8, labels by -100.

    one_label: that of `class_labels`, which are as long as each other already.
    """
    fillers = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORED}
    return partial(_padded, fillers, {"labels": 1} if one_label else {})


def _padded(fillers: dict[str, int], multiples: dict[str, int], items: Sequence[Item]) -> Item:
    batch = {}
    for name, filler in fillers.items():
        ids = pad_sequence([item[name] for item in items], True, filler)
        batch[name] = torch.nn.functional.pad(ids, (0, -ids.shape[1] % multiples.get(name, 8)), value=filler)
    return batch


def _shuffled(rows: Iterable[Any], size: int, rng: np.random.Generator) -> Iterator[Any]:
    """Yield the rows in random order, each drawn from a buffer of `size`, then what is left in it."""
    buffer: list[Any] = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
        else:
            at = int(rng.integers(size))
            yield buffer[at]
            buffer[at] = row
    yield from (buffer[at] for at in rng.permutation(len(buffer)))


class _Streamed(IterableDataset):
    """An endless stream of items: the rows again and again, in another order each time.

    shuffle_buffer: rows among which the next one is drawn, and files are shuffled too; 0 keeps their order.
    Every iteration starts at the beginning and gives the same items, so a run resumes by skipping those it has seen.
    Processes of a distributed run all see the whole stream, of which accelerate gives each its share. One data worker
    may read it: several would each give all of it.
    """

    _epoch: Callable[[Iterable[Mapping[str, str]], int], Iterator[Item]]  # the items of one pass over rows

    def __init__(self, rows: Stream, tokenizer: Any, seed: int, shuffle_buffer: int):
        self.rows, self.tokenizer, self.seed, self.shuffle_buffer = rows, tokenizer, seed, shuffle_buffer

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(f"dataloader_num_workers: a stream is read by 0 or 1 workers, got {worker.num_workers}")
        for epoch in count():
            rows = self.rows
            if self.shuffle_buffer:
                rng = np.random.default_rng((self.seed, epoch))
                # A buffer of 1 shuffles the files alone: the library's own buffer would draw otherwise in a worker.
                rows = _shuffled(rows.shuffle(seed=int(rng.integers(2**31)), buffer_size=1), self.shuffle_buffer, rng)
            items = self._epoch(rows, epoch)
            first = next(items, None)
            if first is None:
                raise InputError("too little data: one pass over the stream gives no example")
            yield first
            yield from items


class StreamedSpans(_Streamed):
    """Span corruption of a corpus that is never stored: items as SpanCorruption's, from rows with the column "text".

    length: tokens of a chunk. In each epoch the texts are packed anew, in that epoch's order; the corruption of its
    chunk k depends on (seed, epoch, k) alone.
    """

    def __init__(self, rows: Stream, tokenizer: Any, length: int, seed: int, shuffle_buffer: int = 10_000):
        super().__init__(rows, tokenizer, seed, shuffle_buffer)
        self.corrupt = Corruption(tokenizer, length)

    def _epoch(self, rows: Iterable[Mapping[str, str]], epoch: int) -> Iterator[Item]:
        packed = _packed(self.tokenizer, rows, self.corrupt.length)
        for k, tokens in enumerate(chunk for block in packed for chunk in block):
            yield self.corrupt(tokens.astype(np.int64), (self.seed, epoch, k))


class StreamedPairs(_Streamed):
    """Pairs that are tokenised as they come: items as those of Pairs, cut at the limits, in tokens with EOS."""

    def __init__(self, rows: Stream, tokenizer: Any, source: int, target: int, seed: int, shuffle_buffer: int = 10_000):
        super().__init__(rows, tokenizer, seed, shuffle_buffer)
        self.limits = source, target

    def _epoch(self, rows: Iterable[Mapping[str, str]], epoch: int) -> Iterator[Item]:
        for block in blocks(rows):
            sources, _ = _cut(self.tokenizer, [row["source"] for row in block], self.limits[0])
            targets, _ = _cut(self.tokenizer, [row["target"] for row in block], self.limits[1])
            yield from map(_pair_item, sources, targets)


class EpochSampler(Sampler[int]):
    """Yields each of `size` examples once per epoch in random order, as index + size * epoch (see SpanCorruption).

    Carrying the epoch in the index, and not in the dataset, also reaches data workers.
    """

    def __init__(self, size: int, seed: int):
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch the next iteration yields; transformers and accelerate call it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        yield from (order + self.size * self.epoch).tolist()
