"""What becomes of a row's columns: texts, or pairs of source and target text as a family reads them.

GLUE as text follows Raffel et al. (2020, arXiv 1910.10683), appendix D: the task's name and the names of its fields
before their texts, and labels as words. Encoders read its one or two sentences as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from datasets import ClassLabel, Value

from ..common.errors import InputError
from .formats import Row

LANGUAGES = {
    "ar": "Arabic", "cs": "Czech", "de": "German", "en": "English", "es": "Spanish", "fi": "Finnish", "fr": "French",
    "hi": "Hindi", "it": "Italian", "ja": "Japanese", "ko": "Korean", "nl": "Dutch", "pl": "Polish",
    "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "tr": "Turkish", "zh": "Chinese",
}  # fmt: skip

# The columns taken where the user names none, the first that there is.
TEXTS = ("text", "sentence", "document", "content", "review")
SOURCES = ("source", "input", "inputs", "question", "prompt", "instruction", "text")
TARGETS = ("target", "output", "outputs", "targets", "answer", "response", "completion")
DOCUMENTS = ("document", "article", "text", "dialogue", "body", "source", "input")
SUMMARIES = ("summary", "highlights", "abstract", "title", "target", "output")
MESSAGES = ("messages", "conversation", "conversations")
LABELS = ("label", "labels", "class", "category", "target")


@dataclass(frozen=True)
class Columns:
    """What the user says about the data's columns, where None leaves it to the guesses above; and what models read.

    source_prefix: put before every source, in place of the task's own. source_lang, target_lang: codes ("en") or words.
    has_prefixes: T5's, such as "summarize: ". has_pairs: whether two texts stay two, as encoders read them. has_scores:
    whether targets that are numbers stay as exact. is_joined: whether a source and its target are one text.
    """

    text_column: str | None = None
    source_column: str | None = None
    target_column: str | None = None
    label_column: str | None = None
    source_prefix: str | None = None
    source_lang: str | None = None
    target_lang: str | None = None
    has_prefixes: bool = True
    has_pairs: bool = False
    has_scores: bool = False
    is_joined: bool = False

    def prefix(self, own: str) -> str:
        """Return what every source begins with; own: of the task, for T5s."""
        return self.source_prefix if self.source_prefix is not None else own if self.has_prefixes else ""

    @property
    def end(self) -> str:
        """What stands between a source and a target that are one text, where the data does not say it."""
        return "\n" if self.is_joined else ""


Texts = tuple[str, ...]  # (source, target), (source, target, second source) or (text,); "" where the row has none
Bound = tuple[list[str], Callable[[Row], Texts]]  # the columns that are read, and the function of a row of them
Bind = Callable[[dict[str, Any], Columns], Bound]  # from what each column holds, and the user's Columns


def _chosen(names: Collection[str], given: str | None, guesses: Sequence[str], flag: str) -> str:
    """Return the column that the user gave, or the first guess that exists; flag: how the user would name another."""
    if given is not None and given not in names:
        raise InputError(f"--{flag}: no column {given!r} (columns: {', '.join(names)})")
    found = [name for name in ([given] if given is not None else guesses) if name in names]
    if not found:
        raise InputError(
            f"no column for --{flag}: expected {' or '.join(guesses)}, got the columns {', '.join(names)}; name one"
        )
    return found[0]


def _check_differ(what: str, **chosen: str) -> None:
    """Raise InputError if two flags come to the same; what: they name; chosen: by flag."""
    first, second = chosen.items()
    if first[1] == second[1]:
        raise InputError(f"--{first[0]} and --{second[0]}: expected two {what}, got {first[1]!r} for both")


def _text(row: Row, column: str, exact: bool = False) -> str:
    """Return a value as text, without white space around it unless it is to be exact; "" for a missing one."""
    value = row.get(column)
    if value is None or value != value:  # NaN, of floats or decimals
        return ""
    if isinstance(value, list | dict | bytes):
        raise InputError(f"column {column!r} holds a {type(value).__name__}, expected text: {str(value)[:60]!r}")
    return str(value) if exact and str(value).strip() else str(value).strip()


def finite(text: str) -> float:
    """Return the number that a text is, NaN if it is no finite one."""
    try:
        return float(text) if math.isfinite(float(text)) else math.nan
    except ValueError:
        return math.nan


def _framed(before: str, text: str, behind: str) -> str:
    return before + text + behind if text else ""


def plain_text(features: dict[str, Any], columns: Columns) -> Bound:
    """Bind the user's column, "text", or the only one of strings."""
    strings = [name for name, held in features.items() if held in (Value("string"), Value("large_string"))]
    guesses = ["text"] if "text" in features or len(strings) != 1 else strings
    column = _chosen(features, columns.text_column, guesses, "text_column")
    if column not in strings:
        raise InputError(f"column {column!r} holds no text (columns of text: {', '.join(strings) or 'none'})")
    return [column], lambda row: (_text(row, column),)


def _two_columns(sources: Sequence[str], targets: Sequence[str], prefix: str = "") -> Bind:
    """Return the Bind of sources and targets; without a prefix of their own, which a causal model reads as they are."""

    def bind(features: dict[str, Any], columns: Columns) -> Bound:
        source = _chosen(features, columns.source_column or columns.text_column, sources, "source_column")
        target = _chosen(features, columns.target_column, [t for t in targets if t != source], "target_column")
        _check_differ("columns", source_column=source, target_column=target)
        before, exact = columns.prefix(prefix), columns.is_joined and not prefix
        end = "" if exact else columns.end

        def pair(row: Row) -> Texts:
            return _framed(before, _text(row, source, exact), end), _text(row, target, exact)

        return [source, target], pair

    return bind


text2text = _two_columns(SOURCES, TARGETS)
summarization = _two_columns(DOCUMENTS, SUMMARIES, "summarize: ")


def _language(keys: Iterable[str], language: str) -> str | None:
    """Return the key that is a language's code, or its name, or that of a code such as mBART's "en_XX"."""
    return next((key for key in keys if {language, language.split("_")[0]} & {key, LANGUAGES.get(key)}), None)


def languages(features: dict[str, Any], columns: Columns) -> tuple[list[str], tuple[str | None, str | None]]:
    """Return (the languages that the data has, those of source and target).

    Where the user names none, and the data has two, they are those: in the order of the columns that the user names, or
    else in the data's.
    """
    if columns.source_column is None and "translation" in features:
        keys = _languages_of(features["translation"])
    else:
        keys = [name for name in features if name in LANGUAGES]
        keys.sort(key=lambda name: (name == columns.target_column) - (name == columns.source_column))
    given = columns.source_lang, columns.target_lang
    return keys, (keys[0], keys[1]) if len(keys) == 2 and given == (None, None) else given


def translation(features: dict[str, Any], columns: Columns) -> Bound:
    """Bind rows of {"translation": {code: text}}, of one column per language code, or of sources and targets."""
    nested = columns.source_column is None and "translation" in features
    keys, guessed = languages(features, columns)
    if None in guessed and (columns.source_prefix is None or nested):
        found = f" (found {', '.join(sorted(keys))})" if keys else ""
        raise InputError(f"translation: expected --source_lang and --target_lang{found}")
    words = [LANGUAGES.get(str(lang), str(lang)) for lang in guessed]
    if guessed != (None, None):
        _check_differ("languages", source_lang=words[0], target_lang=words[1])
    source, target = (_language(keys if nested else features, str(lang)) for lang in guessed)
    if nested and (source is None or target is None):
        raise InputError(
            f"translation: no {guessed[0]} to {guessed[1]} in the data (languages: {', '.join(sorted(keys))})"
        )
    if not nested:
        source = _chosen(features, columns.source_column or source, SOURCES, "source_column")
        target = _chosen(features, columns.target_column or target, TARGETS, "target_column")
    flags = ("source_lang", "target_lang") if nested else ("source_column", "target_column")
    _check_differ("languages" if nested else "columns", **dict(zip(flags, (str(source), str(target)), strict=True)))
    prefix = columns.prefix(f"translate {words[0]} to {words[1]}: ")

    def pair(row: Row) -> Texts:
        texts = (row["translation"] or dict.fromkeys(keys)) if nested else row
        return _framed(prefix, _text(texts, str(source)), columns.end), _text(texts, str(target))

    return ["translation"] if nested else [str(source), str(target)], pair


def _languages_of(feature: Any) -> list[str]:
    """Return the keys of a "translation" column, in order."""
    if isinstance(feature, datasets.Translation):
        return list(feature.languages)
    if not isinstance(feature, dict):
        raise InputError("column 'translation' holds no texts by language: expected {'en': ..., 'es': ...}")
    return list(feature)


def classification(features: dict[str, Any], columns: Columns) -> Bound:
    """Bind texts and labels; the numbers of a ClassLabel become its names, and -1, which means no label, ""."""
    source = _chosen(features, columns.text_column or columns.source_column, TEXTS, "text_column")
    label = _chosen(features, columns.label_column or columns.target_column, LABELS, "label_column")
    _check_differ("columns", text_column=source, label_column=label)
    feature = features[label]
    prefix = columns.source_prefix or ""

    def pair(row: Row) -> Texts:
        target = _text(row, label)
        if isinstance(feature, ClassLabel) and target:
            target = feature.int2str(int(target)) if int(target) >= 0 else ""
        return _framed(prefix, _text(row, source), columns.end), target

    return [source, label], pair


def chat(features: dict[str, Any], columns: Columns) -> Bound:
    """Bind conversations, lists of {"role": ..., "content": ...}: all turns but the last as JSON, and the last."""
    column = _chosen(features, columns.source_column, MESSAGES, "source_column")

    def pair(row: Row) -> Texts:
        turns = row[column] or []
        if not isinstance(turns, list) or not all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in turns
        ):
            raise InputError(f"column {column!r}: expected a list of {{role, content}}, got {str(turns)[:60]!r}")
        roles = [turn["role"] for turn in turns]
        if roles and (len(roles) < 2 or roles[-1] != "assistant"):
            expected = "expected the last turn to be the assistant's, behind another"
            raise InputError(f"column {column!r}: {expected}, got the roles {', '.join(roles)}")
        kept = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
        return (json.dumps(kept[:-1], ensure_ascii=False), kept[-1]["content"]) if kept else ("", "")

    return [column], pair


def glue(name: str) -> Bind:
    """Return the Bind of a GLUE task."""
    fields, labels = GLUE_FIELDS[name]

    def bind(features: dict[str, Any], columns: Columns) -> Bound:
        texts = {field: _chosen(features, None, guesses, field) for field, guesses in fields.items()}
        target = _chosen(features, columns.label_column, labels, "label_column")
        if target in texts.values():
            raise InputError(f"--label_column: expected another column than those of texts, got {target!r}")

        def pair(row: Row) -> Texts:
            parts, label = {field: _text(row, column) for field, column in texts.items()}, _text(row, target)
            label = _similarity(label, columns.has_scores) if name == "stsb" else _word(name, label)
            first, *second = parts.values()
            if not columns.has_pairs:  # the order of two fields is T5's, alphabetical
                first, second = " ".join([name, *(f"{field}: {parts[field]}" for field in sorted(parts))]), []
            return _framed("", first, columns.end) if all(parts.values()) else "", label, *second

        return [*texts.values(), target], pair

    return bind


def _word(name: str, label: str) -> str:
    """Return the word of a label, which is its number or itself; "" for none ("", "-1" or "-")."""
    words = LABEL_WORDS[name]
    if label in words:
        return label
    if label in ("", "-", "-1"):
        return ""
    number = label.removesuffix(".0")  # tables with missing values often hold floats
    if not number.isascii() or not number.isdigit() or int(number) >= len(words):
        raise InputError(f"{name}: unknown label {label!r} (labels: {', '.join(words)}, or 0 to {len(words) - 1})")
    return words[int(number)]


def _similarity(score: str, exact: bool) -> str:
    """Return a score of STS-B, rounded to the nearest 0.2 as T5 does, "3.8"; "" for none ("" or -1, of test sets)."""
    value = finite(score or "-1")
    if value == -1:
        return ""
    if not 0 <= value <= 5:
        raise InputError(f"stsb: expected a score from 0 to 5, got {score!r}")
    return f"{value:g}" if exact else f"{round(value * 5) / 5:.1f}"


LABEL_WORDS = {
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qqp": ("not_duplicate", "duplicate"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
}
# By T5's names of the texts, in the order in which encoders read them, the columns they may be in, those of the hub and
# those of GLUE's own files; and the columns of the label.
_SENTENCES = {"sentence1": ("sentence1", "#1 String"), "sentence2": ("sentence2", "#2 String")}
GLUE_FIELDS: dict[str, tuple[dict[str, Sequence[str]], tuple[str, ...]]] = {
    "sst2": ({"sentence": ("sentence",)}, ("label",)),
    "mrpc": ({**_SENTENCES}, ("label", "Quality")),
    "stsb": ({**_SENTENCES}, ("label", "score")),
    "qqp": ({"question1": ("question1",), "question2": ("question2",)}, ("label", "is_duplicate")),
    "mnli": ({"premise": ("premise", "sentence1"), "hypothesis": ("hypothesis", "sentence2")}, ("label", "gold_label")),
    "qnli": ({"question": ("question",), "sentence": ("sentence",)}, ("label",)),
    "rte": ({**_SENTENCES}, ("label",)),
}
