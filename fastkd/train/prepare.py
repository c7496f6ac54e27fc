"""From flags to data: rows are read, or taken from the embedded corpus, held out, tokenised once, kept in a cache."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import sentencepiece
from tqdm.auto import tqdm
from transformers import AutoTokenizer, default_data_collator

from . import corpus
from .arguments import FastkdArguments
from .cache import cached
from .data import Classes, Pairs, SpanCorruption, StreamedPairs, StreamedSpans, pack_to_arrow, pad, tokenize_pairs
from .errors import InputError
from .sources import content_digest, data_files, is_saved, read_hub, read_rows
from .tasks import TASKS, Columns, Task, read_glue, to_pairs, to_texts
from .tokenizer import SENTINELS, fingerprint, known_share, train_tokenizer

HELD_OUT_SEED = 20  # one fixed corruption of the held-out chunks, whatever --seed is, so that runs compare
VERSION = 3  # raise it when a stage changes what it makes, so that older artefacts are not reused
MODEL_LENGTH = 512  # tokens that a T5 takes where its tokenizer does not tell
EMBEDDED_LENGTH = 128
LEAST_KNOWN = 0.5  # of the characters, or the tokenizer is that of another language
MOST_CLASSES = 1000  # different targets; more are hardly classes

Sides = tuple[Any, datasets.Dataset]  # rows to learn from (streamed or not) and held-out ones


@dataclass
class Data:
    """What every model of a run shares.

    train: a torch data set, or a stream. held_out: one with a length. held_out_rows: what the held-out pairs were made
    of, with columns "input_ids", "source", "target" and "task"; for texts, corrupted chunks. target_tokens: of the
    longest held-out target. digest: of the rows, the tokenizer and the lengths. facts: what a report says about them.
    classes: the targets that an EncT5 tells apart, none for other models.
    """

    task: Task
    tokenizer: Any
    train: Any
    held_out: Any
    held_out_rows: datasets.Dataset
    target_tokens: int
    collate: Callable[..., Any]
    digest: str
    facts: dict[str, Any]
    classes: Sequence[str] = ()

    def with_seed(self, seed: int) -> Data:
        """Return the same data with other corruptions."""
        if not isinstance(self.train, SpanCorruption):
            return self
        return dataclasses.replace(self, train=SpanCorruption(self.train.chunks, self.tokenizer, seed))


def heading(text: str) -> None:
    """Print a stage's heading."""
    print(f"\n== {text}", flush=True)


def get_data(flags: FastkdArguments, cache: Path, seed: int, tokenizer: Any = None) -> Data:
    """Return the data that the flags ask for, tokenised by the given tokenizer or by one trained on it.

    seed: of corruptions and orders. Raises InputError for data that cannot be read or holds too little.
    """
    heading(f"Data: {flags.task}")
    task, rows_digest = TASKS[flags.task], _digest(flags)
    sides = functools.cache(lambda: _sides(flags, task, cache))  # not read at all if what is made of them is cached
    if tokenizer is None:
        tokenizer = _own_tokenizer(flags, cache, rows_digest, lambda: sides()[0])
    limits = _limits(flags, tokenizer)
    settings = {
        "version": VERSION,
        "rows": rows_digest,
        "tokenizer": fingerprint(tokenizer),
        "lengths": [flags.sequence_length] if task.name == "span_corruption" else limits,
        "cut_targets": flags.max_target_length is not None,
    }
    folder, _ = cached(cache, "tokenised", settings, lambda made: _tokenise(flags, sides(), tokenizer, limits, made))
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    print(", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in facts.items() if value))
    held_out = datasets.Dataset.from_file(str(folder / "held_out.arrow"))
    train = None if flags.streaming else datasets.Dataset.from_file(str(folder / "train.arrow"))
    rows = sides()[0] if flags.streaming else None
    if task.name == "span_corruption":
        if train is None:
            train = StreamedSpans(rows, tokenizer, flags.sequence_length, seed, flags.shuffle_buffer)
        else:
            train = SpanCorruption(train, tokenizer, seed)
        spans = SpanCorruption(held_out, tokenizer, HELD_OUT_SEED)
        shown = _decoded(spans, tokenizer, flags.report_examples)
        longest = len(spans[0]["labels"])
        return Data(task, tokenizer, train, spans, shown, longest, default_data_collator, folder.name, facts)
    train = StreamedPairs(rows, tokenizer, *limits, seed, flags.shuffle_buffer) if train is None else Pairs(train)
    longest = max(map(len, held_out["labels"]))
    return Data(task, tokenizer, train, Pairs(held_out), held_out, longest, pad(tokenizer), folder.name, facts)


def _columns(flags: FastkdArguments) -> Columns:
    return Columns(**{name: getattr(flags, name) for name in Columns.__dataclass_fields__})


def _digest(flags: FastkdArguments) -> str:
    """Return a fingerprint of the rows that the flags stand for: the contents of files, not their names."""
    where: dict[str, Any] = {"task": flags.task, "columns": vars(_columns(flags)), "streaming": flags.streaming}
    where |= {"at_most": [flags.max_train_examples, flags.max_eval_examples]}
    if flags.embedded_data:
        where |= {"embedded_data": flags.embedded_data, **corpus.fingerprint()}
    names = ("dataset_name", "dataset_config", "train_split", "eval_split")
    where |= {name: getattr(flags, name) for name in names if flags.dataset_name}
    files = {name: getattr(flags, name) for name in ("train_file", "eval_file")}
    if flags.dataset_name and Path(flags.dataset_name).is_dir():
        files["dataset_name"] = flags.dataset_name
    read_whole = _glue_digest if _is_glue(TASKS[flags.task]) else content_digest
    for name, path in files.items():
        if path is not None:
            where[name] = _stamp(path) if flags.streaming and name == "train_file" else read_whole(path)
    return hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()[:16]


def _stamp(where: str) -> list[list[Any]]:
    """Return names, sizes and times of the files of a stream, which nobody has the time to read twice."""
    files = sorted(Path(where).rglob("*.arrow")) if is_saved(where) else data_files(where)
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _is_glue(task: Task) -> bool:
    return bool(task.splits or task.parts)


def _glue_digest(folder: str) -> str:
    files = sorted(Path(folder).rglob("*.tsv"))
    return hashlib.sha256("".join(content_digest(str(file)) for file in files).encode()).hexdigest()


def with_classes(data: Data, known: Sequence[str] = ()) -> Data:
    """Return the data with the number of each target for a label, as an EncT5 learns it.

    known: the classes, by default the different targets of the training data. Raises InputError if the data is no
    pairs in memory, or if its targets are not among the known, or too many.
    """
    if not isinstance(data.train, Pairs):
        given = "--streaming" if isinstance(data.train, StreamedPairs) else data.task.name
        raise InputError(f"--architecture enct5 gives a class to each source: expected pairs in memory, got {given}")
    found = sorted(set(data.train.rows["target"]))
    unknown = [target for target in found if target not in known]
    if known and unknown:
        raise InputError(
            f"the EncT5 has no head for {data.task.name}: its classes are {', '.join(known)}, the data's "
            f"{', '.join(found[:9])}"
        )
    if len(found) > MOST_CLASSES:
        raise InputError(f"--architecture enct5: expected at most {MOST_CLASSES} different targets, got {len(found)}")
    classes = list(known) or found
    asked = sorted(set(data.held_out.rows["target"]))
    if not set(asked) & set(classes):
        raise InputError(
            f"held-out data: expected targets among the classes {', '.join(classes[:9])}, got only "
            f"{', '.join(asked[:9])}"
        )
    digest = hashlib.sha256(json.dumps([data.digest, classes]).encode()).hexdigest()[:16]
    train, held_out = (Classes(side.rows, classes) for side in (data.train, data.held_out))
    collate = pad(data.tokenizer, one_label=True)
    return dataclasses.replace(
        data, train=train, held_out=held_out, collate=collate, digest=digest, target_tokens=1, classes=classes
    )


# Rows ----------------------------------------------------------------------------------------------------------------


def _sides(flags: FastkdArguments, task: Task, cache: Path) -> Sides:
    """Return the rows to learn from and the held-out ones, of the columns "text" or "source", "target" and "task"."""
    train = _rows(flags, task, cache, flags.train_file, flags.train_split, flags.streaming)
    if flags.eval_file or flags.dataset_name or (_is_glue(task) and flags.train_file):
        where = flags.eval_file or flags.train_file
        held_out = _rows(flags, task, cache, where, "validation" if _is_glue(task) else flags.eval_split, False)
    elif flags.streaming:
        raise InputError("--streaming needs --eval_file: nothing can be held out of a stream")
    else:
        column = "text" if task.name == "span_corruption" else "source"
        kept: tuple[list[int], list[int]] = ([], [])
        for i, text in enumerate(train[column]):
            kept[corpus.is_held_out(text)].append(i)
        train, held_out = (train.select(indices) for indices in kept)
        if not kept[1]:
            raise InputError("too little data to hold any of it out: give --eval_file")
    if flags.max_train_examples:
        train = train.take(flags.max_train_examples)
    if flags.max_eval_examples:
        held_out = held_out.take(flags.max_eval_examples)
    return train, held_out


def _rows(flags: FastkdArguments, task: Task, cache: Path, where: str | None, split: str, streaming: bool) -> Any:
    columns = _columns(flags)
    if _is_glue(task):
        folder_or_name = str(where or flags.dataset_name)
        made: tuple[Any, int | None] = read_glue(task, folder_or_name, split, cache_dir=cache, columns=columns)
    else:
        options: dict[str, Any] = {"cache_dir": cache, "streaming": streaming}
        if where is not None:
            rows = read_rows(where, **options)
        elif flags.dataset_name is not None:
            rows = read_hub(flags.dataset_name, flags.dataset_config, split, **options)
        else:
            rows = _embedded(task, cache)
        if task.name == "span_corruption":
            return to_texts(rows, columns=columns)
        made = to_pairs(task, rows, columns=columns, cache_dir=cache)
    pairs, dropped = made
    if dropped:
        print(f"{split}: {dropped:,} rows without a source or a target were left out")
    return pairs


def _embedded(task: Task, cache: Path) -> datasets.Dataset:
    """Return the embedded corpus as rows that suit the task."""
    kind = {"span_corruption": "texts", "classification": "classes"}.get(task.name, "pairs")

    def make(folder: Path) -> None:
        files = tqdm(corpus.source_files(), desc="reading the standard library", unit="file")
        if kind == "texts":
            rows = [{"text": text} for text in corpus.embedded_corpus(files)]
        elif kind == "classes":
            rows = [{"text": text, "label": label} for text, label in corpus.embedded_classes(files)]
        else:
            rows = [{"source": body, "target": summary} for body, summary in corpus.embedded_pairs(files)]
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")

    folder, _ = cached(cache, "corpus", {"version": VERSION, "kind": kind, **corpus.fingerprint()}, make)
    with (folder / "rows.jsonl").open(encoding="utf-8") as lines:
        return datasets.Dataset.from_list([json.loads(line) for line in lines])


# Tokens --------------------------------------------------------------------------------------------------------------


def _own_tokenizer(flags: FastkdArguments, cache: Path, digest: str, rows: Callable[[], Any]) -> Any:
    """Return a tokenizer trained on the rows to learn from, from the cache if it was trained before."""
    settings = {
        "version": VERSION,
        "rows": digest,
        "vocabulary_size": flags.vocabulary_size,
        "sentinels": SENTINELS,
        "sentencepiece": sentencepiece.__version__,
    }

    def texts() -> Iterator[str]:
        for row in rows():
            yield from (row[name] for name in ("text", "source", "target") if name in row)

    def make(folder: Path) -> None:
        print("training a SentencePiece vocabulary ...", flush=True)
        train_tokenizer(texts(), flags.vocabulary_size).save_pretrained(folder)

    folder, _ = cached(cache, "tokenizer", settings, make)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _limits(flags: FastkdArguments, tokenizer: Any) -> tuple[int, int]:
    """Return the longest source and target in tokens: the flags', else what the model takes.

    Sources of the embedded corpus are cut sooner, so that it is learnt in minutes.
    """
    known = tokenizer.model_max_length
    longest = known if known < 2**20 else MODEL_LENGTH  # transformers says 1e30 where it does not know
    source = longest if flags.has_own_data else EMBEDDED_LENGTH
    return flags.max_source_length or source, flags.max_target_length or longest


def _tokenise(flags: FastkdArguments, sides: Sides, tokenizer: Any, limits: tuple[int, int], folder: Path) -> None:
    """Write train.arrow (but for a stream), held_out.arrow and facts.json."""
    facts: dict[str, int] = {}
    for name, title, rows in zip(("train", "held_out"), ("training", "held-out"), sides, strict=True):
        if isinstance(rows, datasets.IterableDataset):
            continue
        _check_known(tokenizer, rows, title)
        path, fact = folder / f"{name}.arrow", title.replace("-", "_")
        facts[f"{fact}_examples"] = len(rows)
        if flags.task == "span_corruption":
            chunks = pack_to_arrow(tokenizer, rows, flags.sequence_length, path, f"{title} text", len(rows))
            facts[f"{fact}_chunks"] = len(chunks)
            continue
        cut = flags.max_target_length is not None
        try:
            _, counts = tokenize_pairs(rows, tokenizer, *limits, path, cut_targets=cut, total=len(rows))
        except InputError as error:
            hint = "" if cut else "; --max_target_length cuts targets"
            raise InputError(f"{title} data: {error}{hint}") from error
        facts |= {f"{fact}_sources_cut": counts.cut_sources, f"{fact}_targets_cut": counts.cut_targets}
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def _check_known(tokenizer: Any, rows: datasets.Dataset, title: str) -> None:
    """Raise InputError if most of the first rows' text is nothing but <unk> to the tokenizer."""
    shown = rows.select(range(min(1000, len(rows))))
    for column in ("text", "source", "target"):
        share = known_share(tokenizer, shown[column][:]) if column in shown.column_names else 1
        if share < LEAST_KNOWN:
            raise InputError(
                f"{title} data: the tokenizer knows {share:.0%} of the characters of the {column}s, and <unk> stands "
                "for the others: expected a model of their language"
            )


def _decoded(spans: SpanCorruption, tokenizer: Any, most: int) -> datasets.Dataset:
    """Return the first corrupted chunks as rows of pairs, with text that shows their sentinels."""
    columns: dict[str, list[Any]] = {"input_ids": [], "source": [], "target": [], "task": []}
    for i in range(min(most, len(spans))):
        item = spans[i]
        columns["input_ids"].append(item["input_ids"].tolist())
        columns["source"].append(tokenizer.decode(item["input_ids"][:-1].tolist()))
        columns["target"].append(tokenizer.decode(item["labels"][:-1].tolist()))
        columns["task"].append("span_corruption")
    return datasets.Dataset.from_dict(columns)
