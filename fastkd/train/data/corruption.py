"""What becomes of chunks of text, so that there is something to learn: T5's spans, BERT's masks, or nothing at all.

T5's are those of Raffel et al. (2020, arXiv 1910.10683), BERT's of Devlin et al. (2019, arXiv 1810.04805).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..common.errors import InputError
from ..models.tokenizer import special_tokens
from .encoding import NO_FRAME, Frame, frame_of

NOISE_DENSITY, MEAN_SPAN_LENGTH = 0.15, 3.0
MASKED, REPLACED = 0.8, 0.1  # of the tokens that BERT's corruption chooses; the others stay as they are
IGNORED = -100  # the label of padding, and of what is not to be learnt, which no loss counts

Item = dict[str, torch.Tensor]


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


class Spans:
    """Span corruption of chunks of one length, with the sentinels <extra_id_0>, <extra_id_1> ... in order.

    Ids are looked up by name: they count down in T5's vocabulary and up in ByT5's.
    Raises InputError if chunks of `length` tokens need more sentinels than the tokenizer has.
    """

    def __init__(self, tokenizer: Any, length: int, whole_words: bool = False):
        self.length = length
        self.eos: int = tokenizer.eos_token_id
        spans = span_counts(length)[1]
        ids = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(spans)])
        if None in ids or tokenizer.unk_token_id in ids:
            others = "has fewer, or none as all but T5's: give --task text2text, or another of pairs"
            raise InputError(f"chunks of {length} tokens need {spans} sentinels; the tokenizer {others}")
        self.sentinels = np.array(ids, dtype=np.int64)

    def __call__(self, tokens: np.ndarray, seed: Sequence[int]) -> Item:
        """Return "input_ids" [L - noise + spans + 1] and "labels" [noise + spans + 1] (int64) of tokens [L]."""
        mask = noise_mask(self.length, np.random.default_rng(seed))
        return {
            "input_ids": torch.from_numpy(_with_sentinels(tokens, mask, self.sentinels, self.eos)),
            "labels": torch.from_numpy(_with_sentinels(tokens, ~mask, self.sentinels, self.eos)),
        }


class Masks:
    """BERT's corruption of chunks of one length: 15 % of their tokens, which are the labels; special tokens never.

    Of those 80 % become the mask, and 10 % a token at random. whole_words: choose words instead, as long as they do not
    exceed the 15 %. The frame of a text stands around a chunk, beyond its `length`.
    """

    def __init__(self, tokenizer: Any, length: int, whole_words: bool = False):
        self.length, self.frame, self.mask = length, frame_of(tokenizer), tokenizer.mask_token_id
        if self.mask is None:
            raise InputError("--task masked_lm: the tokenizer has no mask token: expected one of a BERT's kind")
        names = {number: name for name, number in tokenizer.get_vocab().items()}
        pieces = [names.get(number, "") for number in range(max(names) + 1)]
        special = {"", *special_tokens(tokenizer)}
        self.is_text = np.array([piece not in special for piece in pieces])  # [V]
        self.others = np.flatnonzero(self.is_text)
        self.begins = _begin_words(pieces) if whole_words else np.ones_like(self.is_text)  # [V]

    def __call__(self, tokens: np.ndarray, seed: Sequence[int]) -> Item:
        """Return "input_ids", "attention_mask" and "labels" [L + frame] (int64) of tokens [L]."""
        rng, is_text = np.random.default_rng(seed), self.is_text[tokens]
        word = np.cumsum(self.begins[tokens] | ~is_text)
        sizes = np.bincount(word[is_text], minlength=word[-1] + 1).tolist()
        noise, total, taken = max(1, round(NOISE_DENSITY * is_text.sum())), 0, []
        for number in rng.permutation(np.flatnonzero(sizes)).tolist():
            if total + sizes[number] <= noise or not total:
                taken.append(number)
                total += sizes[number]
            if total >= noise:
                break
        is_chosen, draw = np.isin(word, taken) & is_text, rng.random(len(tokens))
        others = rng.choice(self.others, len(tokens))
        replaced = np.where(draw < MASKED, self.mask, np.where(draw < MASKED + REPLACED, others, tokens))
        ids = torch.tensor(self.frame.around(np.where(is_chosen, replaced, tokens).tolist()))
        labels = torch.full_like(ids, IGNORED)
        start = len(self.frame.before)
        labels[start : start + len(tokens)] = torch.from_numpy(np.where(is_chosen, tokens, IGNORED))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _begin_words(pieces: Sequence[str]) -> np.ndarray:
    """Return which pieces begin a word, [V], by the marks of WordPiece, byte-level BPE or SentencePiece."""
    if any(piece.startswith("##") for piece in pieces):
        return np.array([not piece.startswith("##") for piece in pieces])
    mark = next((mark for mark in ("\u0120", "\u2581") if any(piece.startswith(mark) for piece in pieces)), None)
    if mark is None:
        raise InputError("--whole_word_masking: the tokenizer does not mark where words begin: leave it away")
    return np.array([piece.startswith(mark) for piece in pieces])


class Nothing:
    """No corruption: every token of a chunk is a label, in its own place, but the first, which nothing foretells."""

    def __init__(self, tokenizer: Any, length: int, whole_words: bool = False):
        self.length = length

    def __call__(self, tokens: np.ndarray, seed: Sequence[int]) -> Item:
        """Return "input_ids", "attention_mask" and "labels" [L] (int64) of tokens [L]."""
        ids = torch.from_numpy(tokens)
        labels = ids.clone()
        labels[0] = IGNORED
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


CORRUPTIONS: dict[str, Any] = {"span_corruption": Spans, "causal_lm": Nothing, "masked_lm": Masks}  # by tasks


def ends(task: str, tokenizer: Any) -> Frame:
    """Return what stands around each of the texts that are packed: EOS between those of a causal model."""
    return Frame(frame_of(tokenizer).before, (), (tokenizer.eos_token_id,)) if task == "causal_lm" else NO_FRAME


def text_length(task: str, tokenizer: Any, length: int) -> int:
    """Return how many tokens of text are in a chunk of that length."""
    return length - frame_of(tokenizer).size if task == "masked_lm" else length
