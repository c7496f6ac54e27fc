"""What a row of data teaches: TASKS turns rows into pairs of source and target text, all in T5's text-to-text format.

GLUE follows Raffel et al. (2020, arXiv 1910.10683), appendix D: the task's name and the names of its fields before
their texts, and labels as words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Features, Value

from ..common.errors import InputError
from .formats import Row
from .sources import Rows, is_saved, read_hub, read_rows

TEXT_FEATURES = Features({"text": Value("string")})
PAIR_FEATURES = Features({name: Value("string") for name in ("source", "target", "task")})

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
LABELS = ("label", "labels", "class", "category", "target")


@dataclass(frozen=True)
class Columns:
    """What the user says about the data's columns; None leaves it to the guesses above.

    source_prefix: put before every source, in place of the task's own. source_lang, target_lang: codes ("en") or words.
    """

    text_column: str | None = None
    source_column: str | None = None
    target_column: str | None = None
    label_column: str | None = None
    source_prefix: str | None = None
    source_lang: str | None = None
    target_lang: str | None = None


Texts = tuple[str, ...]  # (source, target) or (text,); "" where the row has none
Bound = tuple[list[str], Callable[[Row], Texts]]  # the columns that are read, and the function of a row of them
Bind = Callable[[dict[str, Any], Columns], Bound]  # from what each column holds, and the user's Columns


@dataclass(frozen=True)
class Task:
    """One way to learn from rows.

    bind: raises InputError for absent columns; None for a mixture of tasks.
    metrics: the figures of `metrics.score`. columns: of GLUE's table, for the evaluation split; behind the task's name
    they end as that's files and splits do. parts: the tasks of a mixture.
    """

    name: str
    summary: str
    metrics: tuple[str, ...]
    bind: Bind | None = None
    columns: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    @property
    def features(self) -> Features:
        """The columns that a model learns from."""
        return TEXT_FEATURES if self.name == "span_corruption" else PAIR_FEATURES


# From rows to pairs ----------------------------------------------------------------------------------------------


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


def _text(row: Row, column: str) -> str:
    """Return a value as text without white space around it, "" for a missing one."""
    value = row.get(column)
    if value is None or value != value:  # NaN, of floats or decimals
        return ""
    if isinstance(value, list | dict | bytes):
        raise InputError(f"column {column!r} holds a {type(value).__name__}, expected text: {str(value)[:60]!r}")
    return str(value).strip()


def _prefixed(prefix: str, text: str) -> str:
    return prefix + text if text else ""


def _plain_text(features: dict[str, Any], columns: Columns) -> Bound:
    """Bind the user's column, "text", or the only one of strings."""
    strings = [name for name, held in features.items() if held in (Value("string"), Value("large_string"))]
    guesses = ["text"] if "text" in features or len(strings) != 1 else strings
    column = _chosen(features, columns.text_column, guesses, "text_column")
    if column not in strings:
        raise InputError(f"column {column!r} holds no text (columns of text: {', '.join(strings) or 'none'})")
    return [column], lambda row: (_text(row, column),)


def _two_columns(sources: Sequence[str], targets: Sequence[str], prefix: str = "") -> Bind:
    def bind(features: dict[str, Any], columns: Columns) -> Bound:
        source = _chosen(features, columns.source_column or columns.text_column, sources, "source_column")
        target = _chosen(features, columns.target_column, [t for t in targets if t != source], "target_column")
        before = prefix if columns.source_prefix is None else columns.source_prefix
        return [source, target], lambda row: (_prefixed(before, _text(row, source)), _text(row, target))

    return bind


def _language(keys: Iterable[str], language: str) -> str | None:
    """Return the key that is a language's code, or its name."""
    return next((key for key in keys if language in (key, LANGUAGES.get(key))), None)


def _translation(features: dict[str, Any], columns: Columns) -> Bound:
    """Bind rows of {"translation": {code: text}}, of one column per language code, or of sources and targets."""
    nested = columns.source_column is None and "translation" in features
    keys = _languages_of(features["translation"]) if nested else [name for name in features if name in LANGUAGES]
    given = columns.source_lang, columns.target_lang
    guessed = tuple(keys) if len(keys) == 2 and given == (None, None) else given
    if None in guessed and (columns.source_prefix is None or nested):
        found = f" (found {', '.join(sorted(keys))})" if keys else ""
        raise InputError(f"translation: expected --source_lang and --target_lang{found}")
    source, target = (_language(keys if nested else features, str(lang)) for lang in guessed)
    if nested and (source is None or target is None):
        raise InputError(
            f"translation: no {guessed[0]} to {guessed[1]} in the data (languages: {', '.join(sorted(keys))})"
        )
    if not nested:
        source = _chosen(features, columns.source_column or source, SOURCES, "source_column")
        target = _chosen(features, columns.target_column or target, TARGETS, "target_column")
    words = [LANGUAGES.get(str(lang), str(lang)) for lang in guessed]
    prefix = f"translate {words[0]} to {words[1]}: " if columns.source_prefix is None else columns.source_prefix

    def pair(row: Row) -> Texts:
        texts = (row["translation"] or dict.fromkeys(keys)) if nested else row
        return _prefixed(prefix, _text(texts, str(source))), _text(texts, str(target))

    return ["translation"] if nested else [str(source), str(target)], pair


def _languages_of(feature: Any) -> list[str]:
    """Return the keys of a "translation" column, in order."""
    if isinstance(feature, datasets.Translation):
        return list(feature.languages)
    if not isinstance(feature, dict):
        raise InputError("column 'translation' holds no texts by language: expected {'en': ..., 'es': ...}")
    return list(feature)


def _classification(features: dict[str, Any], columns: Columns) -> Bound:
    """Bind texts and labels; the numbers of a ClassLabel become its names, and -1, which means no label, ""."""
    source = _chosen(features, columns.text_column or columns.source_column, TEXTS, "text_column")
    label = _chosen(features, columns.label_column or columns.target_column, LABELS, "label_column")
    feature = features[label]
    prefix = columns.source_prefix or ""

    def pair(row: Row) -> Texts:
        target = _text(row, label)
        if isinstance(feature, ClassLabel) and target:
            target = feature.int2str(int(target)) if int(target) >= 0 else ""
        return _prefixed(prefix, _text(row, source)), target

    return [source, label], pair


def _glue(name: str, fields: dict[str, Sequence[str]], label: Sequence[str], words: Callable[[Any], str]) -> Bind:
    """Return the Bind of a GLUE task. fields: T5's name of each text -> the columns it may be in; words: see labels."""

    def bind(features: dict[str, Any], columns: Columns) -> Bound:
        texts = {field: _chosen(features, None, guesses, field) for field, guesses in fields.items()}
        target = _chosen(features, columns.label_column, label, "label_column")

        def pair(row: Row) -> Texts:
            parts = {field: _text(row, column) for field, column in texts.items()}
            source = " ".join([name, *(f"{field}: {text}" for field, text in parts.items())])
            return source if all(parts.values()) else "", words(_text(row, target))

        return [*texts.values(), target], pair

    return bind


def _label_words(name: str, *labels: str) -> Callable[[str], str]:
    """Return the function from a label, as its number or itself, to its word; "" for none ("", "-1" or "-")."""

    def word(label: str) -> str:
        if label in labels or label == "":
            return label
        if label in ("-", "-1"):
            return ""
        number = label.removesuffix(".0")  # tables with missing values often hold floats
        if not number.isascii() or not number.isdigit() or int(number) >= len(labels):
            raise InputError(
                f"{name}: unknown label {label!r} (labels: {', '.join(labels)}, or 0 to {len(labels) - 1})"
            )
        return labels[int(number)]

    return word


def _similarity(score: str) -> str:
    """Return a score of STS-B rounded to the nearest 0.2, "3.8", as T5 does; "" for none ("" or -1, of test sets)."""
    try:
        value = float(score or "-1")
    except ValueError:
        value = math.nan
    if value == -1:
        return ""
    if not 0 <= value <= 5:
        raise InputError(f"stsb: expected a score from 0 to 5, got {score!r}")
    return f"{round(value * 5) / 5:.1f}"


# The order of two fields is T5's, alphabetical. The columns: those of the hub, then those of GLUE's own files.
_SENTENCES = {"sentence1": ("sentence1", "#1 String"), "sentence2": ("sentence2", "#2 String")}
LABEL_WORDS = {
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qqp": ("not_duplicate", "duplicate"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
}
_GLUE_FIELDS: dict[str, tuple[dict[str, Sequence[str]], tuple[str, ...]]] = {
    "sst2": ({"sentence": ("sentence",)}, ("label",)),
    "mrpc": ({**_SENTENCES}, ("label", "Quality")),
    "stsb": ({**_SENTENCES}, ("label", "score")),
    "qqp": ({"question1": ("question1",), "question2": ("question2",)}, ("label", "is_duplicate")),
    "mnli": ({"hypothesis": ("hypothesis", "sentence2"), "premise": ("premise", "sentence1")}, ("label", "gold_label")),
    "qnli": ({"question": ("question",), "sentence": ("sentence",)}, ("label",)),
    "rte": ({**_SENTENCES}, ("label",)),
}
_GLUE_FOLDERS = {
    "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "qqp": "QQP", "mnli": "MNLI", "qnli": "QNLI", "rte": "RTE"
}  # fmt: skip
_GLUE_METRICS = {"mrpc": ("f1", "accuracy"), "qqp": ("f1", "accuracy"), "stsb": ("spearman",)}


def _glue_task(name: str) -> Task:
    words = _label_words(name, *LABEL_WORDS[name]) if name in LABEL_WORDS else _similarity
    return Task(
        name,
        f"GLUE's {_GLUE_FOLDERS[name]} in T5's format",
        _GLUE_METRICS.get(name, ("accuracy",)),
        _glue(name, *_GLUE_FIELDS[name], words),
        ("mnli_matched", "mnli_mismatched") if name == "mnli" else (name,),
    )


_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
TASKS: dict[str, Task] = {
    task.name: task
    for task in [
        Task("span_corruption", "T5's pre-training task on plain texts", (), _plain_text),
        Task(
            "text2text", "any source text to any target text", ("exact_match", "rougeL"), _two_columns(SOURCES, TARGETS)
        ),
        Task("summarization", "documents to summaries", _ROUGE, _two_columns(DOCUMENTS, SUMMARIES, "summarize: ")),
        Task("translation", "one language to another", ("bleu", "chrf"), _translation),
        Task("classification", "texts to the words of their labels", ("accuracy", "f1"), _classification),
        *map(_glue_task, _GLUE_FIELDS),
        Task("glue", "all seven tasks of GLUE above", ("glue_mean",), parts=tuple(_GLUE_FIELDS)),
    ]
}


def figure_names(task: Task, present: Collection[str] | None = None) -> list[str]:
    """Return the names of the figures that `metrics.score_rows` gives for a task, none for span corruption.

    present: the metric columns that there are rows of, by default all.
    """
    parts = [TASKS[name] for name in task.parts] or [task]
    every = [(column, part.metrics) for part in parts for column in part.columns]
    columns = [(column, metrics) for column, metrics in every if present is None or column in present]
    if len(columns) < 2:
        return list(columns[0][1] if columns else task.metrics)
    names = [f"{column}_{metric}" for column, metrics in columns for metric in metrics]
    return [*names, *task.metrics] if task.parts and columns == every else names


Part = tuple[Task, str, Rows]  # a task, the "task" of its pairs, which names their metric ("mnli_matched"), its rows


# GLUE ------------------------------------------------------------------------------------------------------------


def is_glue(task: Task) -> bool:
    """Return whether a task's data has GLUE's splits."""
    return bool(task.columns or task.parts)


def has_splits(where: str) -> bool:
    """Return whether a place is a folder with splits, which a file, or a folder of one `Dataset`, is not."""
    return Path(where).is_dir() and not Path(where, "state.json").is_file()


def _endings(name: str, split: str) -> dict[str, str]:
    """Return {metric column: what the names of its file and split end in} of a split of a GLUE task."""
    return {column: column.removeprefix(name) for column in ((name,) if split == "train" else TASKS[name].columns)}


def glue_files(task_name: str, folder: str | Path, split: str) -> dict[str, Path]:
    """Return {metric column: TSV file} of a GLUE task in its folder, or in the folder of all tasks.

    split: "train" or "validation", whose files are called dev; MNLI's has two. Raises InputError if one is missing.
    """
    root = Path(folder)
    inner = root / _GLUE_FOLDERS[task_name]
    root = inner if inner.is_dir() else root
    stem = "train" if split == "train" else "dev"
    files = {column: root / f"{stem}{ending}.tsv" for column, ending in _endings(task_name, split).items()}
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {' and '.join(missing)} of {task_name}: expected GLUE's layout, "
            f"{_GLUE_FOLDERS[task_name]}/{missing[0]}; its splits saved by datasets, in the folder or in {task_name} "
            f"inside of it; or, for this task alone, a file"
        )
    return files


def glue_parts(task: Task, where: str, split: str, *, cache_dir: Path) -> list[Part]:
    """Return the parts of one GLUE task, or of all seven one after the other for "glue".

    where: a folder of GLUE's TSV files, a data set of the hub with GLUE's configurations, or a folder, or one for each
    task inside of it, into which `datasets` saved their splits. split: "train" or "validation".
    Raises InputError as `glue_files`, `read_hub` and `read_rows` do.
    """
    parts: list[Part] = []
    for name in task.parts or (task.name,):
        saved = next((folder for folder in (Path(where), Path(where, name)) if is_saved(folder)), None)
        if task.parts and (Path(where).is_file() or is_saved(where)):
            raise InputError(
                f"--task glue: {where} holds one task's data: expected a folder with all of them, such as "
                f"{_GLUE_FOLDERS[name]}/train.tsv; --task {name} takes a file"
            )
        if Path(where).is_dir() and not saved:
            files = glue_files(name, where, split).items()
            parts += [(TASKS[name], column, read_rows(str(file))) for column, file in files]
            continue
        for column, ending in _endings(name, split).items():
            rows = read_hub(str(saved or where), name, split + ending, cache_dir=cache_dir)
            parts.append((TASKS[name], column, rows))
    return parts
