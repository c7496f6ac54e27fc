"""What a model reads: texts packed into chunks and corrupted as its kind learns them, or pairs of source and target,
from Arrow files on disk or as endless streams.

Every example's random numbers come from (seed, epoch, index) and from no global state: the stream is the same after
a resume, on any number of data workers or processes, and for every method compared on it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info
from tqdm.auto import tqdm

from ..common.errors import InputError
from .corruption import CORRUPTIONS, Item, ends
from .encoding import NO_FRAME, Encoding, Frame, tokenize
from .pairs import pair_item
from .sources import arrow_file, blocks


def _packed(tokenizer: Any, rows: Iterable[Mapping[str, str]], length: int, frame: Frame) -> Iterator[np.ndarray]:
    """Yield texts as chunks of tokens [n, length] (int32), n > 0 and different each time; the last few are dropped.

    The texts' tokens, each text's in a frame, follow each other without padding; none is lost between the blocks in
    which they are tokenised.
    """
    left = np.empty(0, dtype=np.int32)
    for block in blocks(rows):
        ids = tokenize(tokenizer, [row["text"] for row in block])
        stream = np.concatenate([left, *(np.asarray(frame.around(text), dtype=np.int32) for text in ids)])
        whole = len(stream) // length * length
        left = stream[whole:]
        if whole:
            yield stream[:whole].reshape(-1, length)


def pack_to_arrow(
    tokenizer: Any,
    rows: Iterable[Mapping[str, str]],
    length: int,
    path: Path,
    what: str = "training text",
    frame: Frame = NO_FRAME,
) -> datasets.Dataset:
    """Pack texts into chunks of `length` tokens, "input_ids" (int32), in an Arrow file, which the Dataset maps.

    frame: what stands around each text. Raises InputError, calling the texts `what`, if they do not fill one chunk; no
    file is left then.
    """
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), length)})
    bar = tqdm(rows, desc=f"tokenising {what}", unit="text", mininterval=1)
    chunks = 0
    with arrow_file(path, features) as write:
        for block in _packed(tokenizer, bar, length, frame):
            chunks += len(block)
            write({"input_ids": pa.FixedSizeListArray.from_arrays(block.ravel(), length)})
        if not chunks:
            raise InputError(
                f"too little {what}: its tokens do not fill one chunk of {length}; --sequence_length takes less"
            )
    return datasets.Dataset.from_file(str(path))


class Chunks(Dataset):
    """Chunks as training examples, corrupted anew in every epoch.

    chunks: [N, L] token ids, as an array or as the Dataset of `pack_to_arrow`. task: that of CORRUPTIONS, which takes
    `options`. Item i + N * epoch is chunk i as that epoch sees it. All items are equally long, so nothing is padded.
    """

    def __init__(
        self,
        chunks: np.ndarray | datasets.Dataset,
        tokenizer: Any,
        seed: int,
        task: str = "span_corruption",
        **options: bool,
    ):
        self.chunks, self.seed, self.options = chunks, seed, options
        length = chunks.shape[1] if isinstance(chunks, np.ndarray) else chunks.features["input_ids"].length
        self.corrupt = CORRUPTIONS[task](tokenizer, length, **options)

    def __iter__(self) -> Iterator[Item]:
        return (self[i] for i in range(len(self)))  # the first epoch; indices beyond it are valid too

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> Item:
        epoch, chunk = divmod(index, len(self.chunks))
        tokens = self.chunks[chunk] if isinstance(self.chunks, np.ndarray) else self.chunks[chunk]["input_ids"]
        return self.corrupt(np.asarray(tokens, dtype=np.int64), (self.seed, epoch, chunk))

    def select(self, indices: Sequence[int]) -> Chunks:
        """Return the chunks with these numbers; they are corrupted otherwise than here."""
        some = copy.copy(self)
        some.chunks = self.chunks[indices] if isinstance(self.chunks, np.ndarray) else self.chunks.select(indices)
        return some

    def with_seed(self, seed: int) -> Chunks:
        """Return the same chunks, corrupted otherwise."""
        some = copy.copy(self)
        some.seed = seed
        return some


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

    def __init__(self, rows: datasets.IterableDataset, tokenizer: Any, seed: int, shuffle_buffer: int):
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


class StreamedChunks(_Streamed):
    """A corpus that is never stored: items as those of Chunks, from rows with the column "text".

    length: tokens of a chunk. In each epoch the texts are packed anew, in that epoch's order; the corruption of its
    chunk k depends on (seed, epoch, k) alone.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        tokenizer: Any,
        length: int,
        seed: int,
        shuffle_buffer: int = 10_000,
        task: str = "span_corruption",
        **options: bool,
    ):
        super().__init__(rows, tokenizer, seed, shuffle_buffer)
        self.corrupt, self.frame = CORRUPTIONS[task](tokenizer, length, **options), ends(task, tokenizer)

    def _epoch(self, rows: Iterable[Mapping[str, str]], epoch: int) -> Iterator[Item]:
        packed = _packed(self.tokenizer, rows, self.corrupt.length, self.frame)
        for k, tokens in enumerate(chunk for block in packed for chunk in block):
            yield self.corrupt(tokens.astype(np.int64), (self.seed, epoch, k))


class StreamedPairs(_Streamed):
    """Pairs that are tokenised as they come: items as those of Pairs, cut at the limits; see `Encoding`."""

    def __init__(
        self,
        rows: datasets.IterableDataset,
        tokenizer: Any,
        source: int,
        target: int,
        seed: int,
        shuffle_buffer: int = 10_000,
        **reading: Any,
    ):
        super().__init__(rows, tokenizer, seed, shuffle_buffer)
        self.encoding = Encoding(tokenizer, source, target, **reading)

    def _epoch(self, rows: Iterable[Mapping[str, str]], epoch: int) -> Iterator[Item]:
        for block in blocks(rows):
            columns, _, _ = self.encoding(block)
            columns.pop("source", None)
            for ids in zip(*columns.values(), strict=True):
                yield pair_item(self.encoding.is_causal, **dict(zip(columns, ids, strict=True)))


class EpochSampler(Sampler[int]):
    """Yields each of `size` examples once per epoch in random order, as index + size * epoch (see Chunks).

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
