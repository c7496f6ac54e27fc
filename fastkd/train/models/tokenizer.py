"""A T5 tokenizer trained on the run's own texts: a SentencePiece unigram vocabulary plus T5's sentinels."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from typing import Any

import sentencepiece
from transformers import T5Tokenizer

from ..common.errors import InputError

# Is it normalised, and how?
_UNUSUAL = " Two  spaces, Capitals, café cafe\u0301 \ufb01 \u2460 \uff21 ßİ,\ta tab\nand a line </s> <extra_id_0> "
LEAST_KNOWN = 0.5  # of the characters, or the tokenizer is that of another language
SENTINELS = 100  # <extra_id_0> ... <extra_id_99>, as every T5 has


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Any:
    """Train a unigram vocabulary (Kudo, 2018, arXiv 1804.10959) and return it as a `transformers.T5Tokenizer`.

    texts: training texts only, so that nothing of the held-out ones leaks into the vocabulary.
    vocabulary_size: an upper limit on the pieces including the sentinels; few texts give fewer pieces.
    Ids follow T5: 0 <pad>, 1 </s>, 2 <unk>, pieces, then the sentinels with <extra_id_0> last.
    White space is collapsed, so decode(encode(text)) equals " ".join(text.split()) for known characters.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocabulary_size - SENTINELS,
            hard_vocab_limit=False,
            character_coverage=1.0,
            # T5Tokenizer collapses white space itself and changes no character, so neither may the trainer.
            normalization_rule_name="identity",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            max_sentence_length=1 << 20,  # bytes; the default of 4192 would silently drop the long topics
            input_sentence_size=1_000_000,
            shuffle_input_sentence=False,
            num_threads=1,  # the pieces' scores depend on the order of summation
            minloglevel=2,
        )
    except RuntimeError as error:  # fewer pieces than characters, or no text at all
        reason = str(error).split("] ")[-1]
        raise InputError(f"cannot train a tokenizer of {vocabulary_size} pieces: {reason}") from error
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    vocabulary += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(SENTINELS))]
    return T5Tokenizer(vocab=vocabulary, extra_ids=SENTINELS)


def padded_size(tokenizer: Any) -> int:
    """Return the rows of the embedding: the tokenizer's size rounded up, as T5's 32100 -> 32128."""
    return -(-len(tokenizer) // 128) * 128


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the id of every token that is no text: ends, <unk>, sentinels, and those that a user added as such."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)) | added


def check_known(tokenizer: Any, texts: Sequence[str], data: str, column: str) -> None:
    """Raise InputError if most of the texts' characters, but for white space, are lost to <unk>."""
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    known = tokenizer.batch_decode([[i for i in text if i != tokenizer.unk_token_id] for text in ids])
    before, after = ("".join("".join(side).split()) for side in (texts, known))
    if len(after) < LEAST_KNOWN * len(before):
        raise InputError(
            f"{data}: the tokenizer knows {len(after) / len(before):.0%} of the characters of the {column}, and <unk> "
            "stands for the others: expected a model of their language"
        )


def fingerprint(tokenizer: Any) -> str:
    """Return a short digest of what a tokenizer does: of every token's id, and of how it splits what it is shown.

    Not of its class, which transformers rewrites when it saves it. Tokens stuck together tell how it scores them.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    words = [piece.replace("▁", " ") for piece, _ in vocabulary[:: max(1, len(vocabulary) // 4096)]]
    shown = ["".join(words[i : i + 4]) for i in range(0, len(words), 4)] + [_UNUSUAL]
    known = [vocabulary, tokenizer(shown, add_special_tokens=False, verbose=False)["input_ids"]]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def frame(tokenizer: Any) -> list[int]:
    """Return the ids that a tokenizer writes around every target: T5's </s>, BART's <s> </s>, and a language's code."""
    ids: list[int] = tokenizer(text_target="", verbose=False)["input_ids"]
    return ids


def texts_of(tokenizer: Any, ids: Sequence[Sequence[int]], kept: Collection[int]) -> list[str]:
    """Return the texts that ids stand for, without special tokens but those of the ids `kept`.

    Those of its `frame` are dropped all the same. Spaces stand around one that is kept, as in "a <sep> b", where the
    tokenizer drops them.
    """
    special = set(special_tokens(tokenizer).values())
    dropped = special - set(kept) | {tokenizer.pad_token_id, tokenizer.eos_token_id, *frame(tokenizer)}
    ids = [[i for i in row if i not in dropped] for row in ids]
    # Row by row: in some versions of transformers batch_decode makes a text of no rows.
    texts = [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in ids]
    shown = special.intersection(chain.from_iterable(ids)) - {tokenizer.unk_token_id}
    names = [name for name in tokenizer.convert_ids_to_tokens(sorted(shown)) if _drops_spaces(tokenizer, name)]
    if names:
        pattern = re.compile(f"({'|'.join(map(re.escape, names))})")
        texts = [" ".join(pattern.sub(r" \1 ", text).split()) for text in texts]
    return [text.strip() for text in texts]


def _drops_spaces(tokenizer: Any, token: str) -> bool:
    with_spaces, without = tokenizer([f"a {token} a", f"a{token}a"])["input_ids"]
    return bool(with_spaces == without)
