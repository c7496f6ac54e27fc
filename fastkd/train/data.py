"""T5 span corruption (Raffel et al., 2020, arXiv 1910.10683): packed chunks in, (input_ids, labels) pairs out.

Every example's random numbers come from (seed, epoch, index) and from no global state: the stream is the same after
a resume, on any number of data workers or processes, and for every method compared on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from .errors import InputError

NOISE_DENSITY = 0.15
MEAN_SPAN_LENGTH = 3.0


def pack(tokenizer: Any, texts: Sequence[str], length: int, what: str = "training text") -> np.ndarray:
    """Return chunks [N, length] (int64): the texts' tokens one after the other without padding; the rest is dropped.

    Raises InputError, calling the texts `what`, if they do not fill one chunk.
    """
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    stream = np.fromiter((token for text in ids for token in text), dtype=np.int64)
    chunks = len(stream) // length
    if chunks == 0:
        raise InputError(f"too little {what}: {len(stream)} tokens do not fill one chunk of {length}")
    return stream[: chunks * length].reshape(chunks, length)


def span_counts(length: int, density: float = NOISE_DENSITY, mean_span: float = MEAN_SPAN_LENGTH) -> tuple[int, int]:
    """Return (noise tokens, noise spans) of a chunk of `length` >= 2 tokens, rounded as T5 does."""
    noise = min(max(round(length * density), 1), length - 1)
    spans = min(max(round(noise / mean_span), 1), length - noise)
    return noise, spans


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


def _with_sentinels(tokens: np.ndarray, mask: np.ndarray, first_sentinel: int, eos: int) -> np.ndarray:
    """Replace each run of True in mask by one sentinel, counting down from first_sentinel, and append eos."""
    starts = mask & ~np.concatenate(([False], mask[:-1]))
    replaced = np.where(starts, first_sentinel + 1 - np.cumsum(starts), tokens)
    return np.append(replaced[starts | ~mask], eos)


class SpanCorruption(Dataset):
    """Chunks as training examples, corrupted anew in every epoch.

    chunks: [N, L] token ids. Item i + N * epoch is chunk i as that epoch sees it, a dict of
    "input_ids" [L - noise + spans + 1] and "labels" [noise + spans + 1] (int64), equally long in all
    items, so nothing is ever padded.
    Raises InputError if the chunks need more sentinels than the tokenizer has.
    """

    def __init__(self, chunks: np.ndarray, tokenizer: Any, seed: int):
        self.chunks = chunks
        self.seed = seed
        self.eos: int = tokenizer.eos_token_id
        self.first_sentinel: int = tokenizer.convert_tokens_to_ids("<extra_id_0>")
        spans = span_counts(chunks.shape[1])[1]
        last = tokenizer.convert_tokens_to_ids(f"<extra_id_{spans - 1}>")
        if self.first_sentinel == tokenizer.unk_token_id or last != self.first_sentinel - spans + 1:
            raise InputError(f"chunks of {chunks.shape[1]} tokens need {spans} sentinels; the tokenizer has fewer")

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        epoch, chunk = divmod(index, len(self.chunks))
        mask = noise_mask(self.chunks.shape[1], np.random.default_rng((self.seed, epoch, chunk)))
        tokens = self.chunks[chunk]
        return {
            "input_ids": torch.from_numpy(_with_sentinels(tokens, mask, self.first_sentinel, self.eos)),
            "labels": torch.from_numpy(_with_sentinels(tokens, ~mask, self.first_sentinel, self.eos)),
        }


class EpochSampler(Sampler[int]):
    """Yields each of `size` examples once per epoch in random order, as index + size * epoch (see SpanCorruption).

    Carrying the epoch in the index, and not in the dataset, also reaches data workers.
    """

    def __init__(self, size: int, seed: int):
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch the next iteration yields; transformers and accelerate call it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        yield from (order + self.size * self.epoch).tolist()
