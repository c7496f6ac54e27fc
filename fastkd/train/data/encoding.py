"""How a model reads texts and writes answers, in tokens: framed as its own tokenizer does it, cut within the frame."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from ..common.errors import InputError, one_line
from ..models.tokenizer import special_tokens
from .columns import LANGUAGES

PROBE = "a"  # a text by which a tokenizer shows what it puts around texts
Ids = list[int]


@dataclass(frozen=True)
class Frame:
    """The tokens that stand before a text, between it and a second one, and behind the last."""

    before: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self.before) + len(self.between) + len(self.after)

    def around(self, *texts: Sequence[int]) -> Ids:
        """Return the ids of a text, or two, with the frame."""
        first, *second = texts
        return [*self.before, *first, *(id for text in second for id in (*self.between, *text)), *self.after]


NO_FRAME = Frame()


def frame_of(tokenizer: Any, *, is_target: bool = False, of_pairs: bool = False) -> Frame:
    """Return what a tokenizer puts around a source or a target, or a pair of sources, found by what it does to one."""
    name, pair = ("text_target" if is_target else "text"), {"text_pair": PROBE} if of_pairs else {}
    inner = tokenizer(**{name: PROBE}, add_special_tokens=False)["input_ids"]
    whole = tokenizer(**{name: PROBE}, **pair)["input_ids"]
    size = len(inner)
    starts = [i for i in range(len(whole)) if inner and whole[i : i + size] == inner]
    if len(starts) != 1 + of_pairs:
        raise InputError(f"the tokenizer makes {whole} of {PROBE!r}, and {inner} without special tokens: expected both")
    first, last = starts[0], starts[-1]
    return Frame(tuple(whole[:first]), tuple(whole[first + size : last]), tuple(whole[last + size :]))


def set_languages(tokenizer: Any, *languages: str | None) -> None:
    """Let a tokenizer frame sources and targets by the codes of these languages, as mBART's: its codes, or LANGUAGES.

    Raises InputError, naming the flags, for a language of which it has no code, or several.
    """
    codes = sorted(name for name in special_tokens(tokenizer) if re.fullmatch(r"[a-z]{2,3}_[A-Za-z]{2,4}", name))
    for side, flag, language in zip(("src_lang", "tgt_lang"), ("source_lang", "target_lang"), languages, strict=True):
        said = (language or "").replace("-", "_").casefold()
        short = next((code for code, word in LANGUAGES.items() if said == word.casefold()), said)
        fits = [code for code in codes if code.casefold() == short]
        fits = fits or [code for code in codes if code.split("_")[0] == short]
        if len(fits) != 1:
            some = ", ".join(fits or codes[:6])
            ways = f"one of the tokenizer's, such as {some}, or its first letters, or its English name"
            raise InputError(f"--{flag}: expected a language, {ways}, got {language or 'none'}")
        setattr(tokenizer, side, fits[0])


def tokenize(tokenizer: Any, texts: list[str], *, is_target: bool = False) -> list[Ids]:
    """Return the ids of each text, without its frame.

    The names of special tokens that the tokenizer itself writes, and of sentinels, are text like all other; those that
    a user added are tokens.
    """
    side = "text_target" if is_target else "text"
    settings: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
    ids = tokenizer(**{side: texts}, split_special_tokens=True, **settings)["input_ids"]
    special = special_tokens(tokenizer)
    written = {*frame_of(tokenizer, is_target=is_target).around(()), tokenizer.pad_token_id, tokenizer.eos_token_id}
    written |= {tokenizer.mask_token_id}
    own = {name for name, id in special.items() if id in written or re.fullmatch(r"<extra_id_\d+>", name)}
    own -= {tokenizer.unk_token}  # which stands for padding in some vocabularies
    added = special.keys() - own - {tokenizer.unk_token}
    for i, text in enumerate(texts if added else ()):
        if any(name in text for name in added):
            ids[i] = tokenizer(**{side: text}, **settings)["input_ids"]
    # Unigram vocabularies hold the names as pieces, too, so that they are found in text all the same.
    spelled = {special[name]: tokenizer.convert_tokens_to_ids(list(name)) for name in own}
    return [
        text if spelled.keys().isdisjoint(text) else [part for id in text for part in spelled.get(id, (id,))]
        for text in ids
    ]


class Encoding:
    """How a model of a kind reads sources and writes targets, of at most so many tokens, frames included.

    A causal model reads a prompt, whose end is kept, and goes on with the target and EOS: one text, tokenised as such
    unless a token would span both. Of two texts the longer is cut first. The turns of "chat" are written by the
    tokenizer's template. has_pairs, has_types: whether rows have a "pair", and examples "token_type_ids".
    Raises ValueError for a limit that leaves no room within a frame.
    """

    def __init__(
        self,
        tokenizer: Any,
        source: int,
        target: int,
        kind: str = "seq2seq",
        has_pairs: bool = False,
        has_types: bool = False,
    ):
        self.tokenizer, self.limits, self.is_causal = tokenizer, (source, target), kind == "causal"
        self.has_pairs, self.has_types = has_pairs, has_types
        self.alone, self.target = (frame_of(tokenizer, is_target=is_target) for is_target in (False, True))
        self.paired = frame_of(tokenizer, of_pairs=True) if has_pairs else self.alone
        if self.is_causal:
            self.alone, self.target = Frame(self.alone.before), Frame(after=(tokenizer.eos_token_id,))
        for limit, frame in zip(self.limits, (self.paired, self.target), strict=True):
            if limit <= frame.size:
                expected = f"expected at least {frame.size + 1} tokens, one and the {frame.size} around it"
                raise ValueError(f"limit: {expected}, got {limit}")

    def __call__(self, rows: Sequence[Mapping[str, str]]) -> tuple[dict[str, list[Any]], list[int], list[int]]:
        """Return (columns of rows, lengths of sources before they were cut, those of targets).

        Columns are "input_ids", "labels" (of a causal model too those of the target alone), "token_type_ids", and
        "source" where a template writes it.
        """
        is_chat, eos = rows[0]["task"] == "chat", self.tokenizer.eos_token_id
        sources, targets = ([row[name] for row in rows] for name in ("source", "target"))
        columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "token_type_ids": []}
        if is_chat:
            sources, targets = (list(texts) for texts in zip(*map(self._templated, rows), strict=True))
            columns["source"] = sources
        split = self._with_tokens if is_chat else functools.partial(tokenize, self.tokenizer)
        firsts: list[Ids] = split(sources)
        lengths: tuple[list[int], list[int]] = [], []
        if self.is_causal:
            wholes = split([source + target for source, target in zip(sources, targets, strict=True)])
            answers = [
                whole[len(first) :] if whole[: len(first)] == first else split([target])[0]
                for first, whole, target in zip(firsts, wholes, targets, strict=True)
            ]
        else:
            answers = tokenize(self.tokenizer, targets, is_target=True)
        seconds = tokenize(self.tokenizer, [row["pair"] for row in rows]) if self.has_pairs else [[]] * len(rows)
        for first, second, answer in zip(firsts, seconds, answers, strict=True):
            frame, end = self.paired if second else self.alone, self.target
            if is_chat:
                frame, end = NO_FRAME, NO_FRAME if eos in answer else end
            room, left = (limit - its.size for limit, its in zip(self.limits, (frame, end), strict=True))
            lengths[0].append(len(first) + len(second) + frame.size)
            lengths[1].append(len(answer) + end.size)
            first, second = _shortened(first, second, room, self.is_causal)
            ids = frame.around(first, *[second] * bool(second))
            behind = len(second) + len(frame.after) if second else 0
            columns["input_ids"].append(ids or [eos])  # a causal model reads something before it writes
            columns["labels"].append(end.around(answer[:left]))
            columns["token_type_ids"].append([0] * (len(ids) - behind) + [1] * behind)
        if not self.has_types:
            del columns["token_type_ids"]
        return columns, *lengths

    def _with_tokens(self, texts: list[str]) -> list[Ids]:
        """Return the ids of texts in which the names of special tokens are tokens, as templates write them."""
        ids: list[Ids] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _templated(self, row: Mapping[str, str]) -> tuple[str, str]:
        """Return the text of all turns before the last, up to where the assistant begins, and all that comes then."""
        turns, template = json.loads(row["source"]), self.tokenizer.apply_chat_template
        if not self.tokenizer.chat_template:
            raise InputError("--task chat: the tokenizer has no chat template: expected a model that is made for chats")
        try:
            prompt = template(turns, tokenize=False, add_generation_prompt=True)
            whole = template([*turns, {"role": "assistant", "content": row["target"]}], tokenize=False)
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise InputError(f"--task chat: the chat template refuses {roles}, assistant: {one_line(error)}") from error
        if not prompt or not whole.startswith(prompt):
            raise InputError(
                "--task chat: what the chat template makes of all turns does not begin with what it makes of those "
                f"before the last: {prompt[-60:]!r}"
            )
        return prompt, whole[len(prompt) :]


def _shortened(first: Ids, second: Ids, room: int, from_left: bool) -> tuple[Ids, Ids]:
    """Return two texts, or one and none, that fit into a room together, the longer one cut first."""
    if len(first) + len(second) <= room:
        return first, second
    less = min(len(first), len(second), room // 2)
    one, other = (less, room - less) if len(first) <= len(second) else (room - less, less)
    return first[-one:] if from_left else first[:one], second[:other]
