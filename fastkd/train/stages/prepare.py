"""From flags to data: rows are read, or taken from the embedded corpus, held out, tokenised once, kept in a cache."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import sentencepiece
from tqdm.auto import tqdm
from transformers import AutoTokenizer, default_data_collator

from ..common import endings
from ..common.cache import cached, key
from ..common.errors import InputError
from ..common.processes import by_first
from ..data import corpus, dates
from ..data.examples import Chunks, StreamedChunks, StreamedPairs, pack_to_arrow
from ..data.pairs import Pairs, class_labels, pad, tokenize_pairs
from ..data.rows import sample, store, stream
from ..data.sources import blocks, content_digest, data_files, hub_revision, is_saved, read_hub, read_rows
from ..data.tasks import TASKS, Columns, Part, Task, glue_parts, has_splits, is_glue
from ..flags.fields import FastkdArguments
from ..models.tokenizer import SENTINELS, check_known, fingerprint, train_tokenizer

HELD_OUT_SEED = 20  # one fixed corruption of the held-out chunks, whatever --seed is, so that runs compare
VERSION = 4  # raise it when a stage changes what it makes, so that older artefacts are not reused
MODEL_LENGTH = 512  # tokens that a T5 takes where its tokenizer does not tell
EMBEDDED_LENGTH = 128
VOCABULARY_BYTES = 1 << 25  # of text that a vocabulary is trained on: SentencePiece needs twenty times the memory
MOST_CLASSES = 1000  # different targets; more are hardly classes

TRAINING, HELD_OUT = "training", "held-out"  # the sides of the data


@dataclass
class Data:
    """What every model of a run shares.

    train: a torch data set, or a stream. held_out: one with a length. held_out_rows: what the held-out pairs were made
    of, with columns "input_ids", "source", "target" and "task"; for texts, corrupted chunks. target_tokens: of the
    longest held-out target. digest: of the rows, the tokenizer and the lengths. parts: fingerprints of what they are
    made of, by name. facts: what a report says about them.
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
    parts: dict[str, Any]
    classes: Sequence[str] = ()

    def with_seed(self, seed: int) -> Data:
        """Return the same data with other corruptions."""
        if not isinstance(self.train, Chunks):
            return self
        return dataclasses.replace(self, train=self.train.with_seed(seed))


def heading(text: str) -> None:
    """Print a stage's heading."""
    print(f"\n== {text}", flush=True)
    endings.begin(f'"{text}"')


def get_data(
    flags: FastkdArguments, cache: Path, seed: int, tokenizer: Any = None, targets_are_written: bool = True
) -> Data:
    """Return the data that the flags ask for, tokenised by the given tokenizer or by one trained on it.

    seed: of corruptions and orders. targets_are_written: whether to warn of those that no output can equal.
    Raises InputError for data that cannot be read or holds too little.
    """
    heading(f"Data: {flags.task}")
    task, sides = TASKS[flags.task], by_first(lambda: _sides(flags, cache))
    rows = functools.cache(lambda side: _rows(flags, cache, sides[side]))  # not read if what they become is cached
    if tokenizer is None:
        tokenizer = _own_tokenizer(flags, cache, sides[TRAINING].settings, lambda: rows(TRAINING))
    is_text = task.name == "span_corruption"
    lengths: Any = [flags.sequence_length] if is_text else _limits(flags, tokenizer)
    made: list[Path] = []
    facts: dict[str, Any] = {}
    for side in (HELD_OUT,) if flags.streaming else (TRAINING, HELD_OUT):
        by = {
            "version": VERSION,
            "rows": sides[side].settings,
            "tokenizer": fingerprint(tokenizer),
            "lengths": lengths,
            "cut_targets": flags.max_target_length is not None,
        }
        make = functools.partial(_tokenise, flags, side, functools.partial(rows, side), tokenizer, lengths)
        folder, _ = cached(cache, "tokenised", by, make)
        known = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        if (warning := known.pop("warning", "")) and targets_are_written:
            print(f"warning: {warning}", file=sys.stderr)
        facts |= known
        made.append(folder)
    print(", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in facts.items() if value))
    parts = {side.flag or "embedded_data": side.rows["digest"] for side in sides.values()}
    parts |= {"tokenizer": fingerprint(tokenizer), "preparation of data": VERSION}
    digest = key([*(side.settings for side in sides.values()), *(folder.name for folder in made)])
    given, asked = (datasets.Dataset.from_file(str(made[i] / "rows.arrow")) for i in (0, -1))
    train: Any = Chunks(given, tokenizer, seed) if is_text else Pairs(given)
    if flags.streaming:
        streamed: Any = StreamedChunks if is_text else StreamedPairs
        train = streamed(rows(TRAINING), tokenizer, *lengths, seed, flags.shuffle_buffer)
    if not is_text:
        longest = max(map(len, asked["labels"]))
        return Data(task, tokenizer, train, Pairs(asked), asked, longest, pad(tokenizer), digest, facts, parts)
    spans = Chunks(asked, tokenizer, HELD_OUT_SEED)
    shown, longest = _decoded(spans, tokenizer, flags.report_examples), len(spans[0]["labels"])
    return Data(task, tokenizer, train, spans, shown, longest, default_data_collator, digest, facts, parts)


def _columns(flags: FastkdArguments) -> Columns:
    return Columns(**{name: getattr(flags, name) for name in Columns.__dataclass_fields__})


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
        theirs = f"its classes are {', '.join(known)}, the data's {', '.join(found[:9])}"
        raise InputError(f"the EncT5 has no head for {data.task.name}: {theirs}")
    if len(found) > MOST_CLASSES:
        raise InputError(f"--architecture enct5: expected at most {MOST_CLASSES} different targets, got {len(found)}")
    classes = list(known) or found
    asked = sorted(set(data.held_out.rows["target"]))
    if not set(asked) & set(classes):
        expected = f"expected targets among the classes {', '.join(classes[:9])}"
        raise InputError(f"held-out data: {expected}, got only {', '.join(asked[:9])}")
    train, held_out = (
        Pairs(side.rows.remove_columns("labels").add_column("labels", class_labels(side.rows["target"], classes)))
        for side in (data.train, data.held_out)
    )
    made: dict[str, Any] = {"train": train, "held_out": held_out, "collate": pad(data.tokenizer, one_label=True)}
    return dataclasses.replace(data, **made, digest=key([data.digest, classes]), target_tokens=1, classes=classes)


# Rows ----------------------------------------------------------------------------------------------------------------


class _Side(NamedTuple):
    """Where the rows of a side come from, and what they depend on.

    flag: that says where, a file, folder, glob or data set; None for embedded data. part: which of the rows there are
    the side's, "all" or those that are held out or not. rows: what all of them depend on.
    """

    flag: str | None
    where: str
    split: str
    part: str
    at_most: int | None
    is_stream: bool
    rows: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """What the side's rows depend on."""
        return {"rows": self.rows, "part": self.part, "at_most": self.at_most}


def _sides(flags: FastkdArguments, cache: Path) -> dict[str, _Side]:
    """Return both sides of the data; they depend on the contents of files, not their names; on revisions of the hub."""
    glue, where = is_glue(TASKS[flags.task]), flags.train_file or flags.dataset_name or str(flags.embedded_data)
    flag = "train_file" if flags.train_file else "dataset_name" if flags.dataset_name else None
    if flags.streaming and glue:
        raise InputError(f"--streaming has no effect with --task {flags.task}: GLUE fits into memory")
    splits = ("train", "validation") if glue else (flags.train_split, flags.eval_split)
    origins = {TRAINING: (flag, where, splits[0], flags.max_train_examples)}
    is_whole = flags.eval_file or flags.dataset_name or (glue and has_splits(where))
    if flags.eval_file:
        origins[HELD_OUT] = "eval_file", flags.eval_file, splits[1], flags.max_eval_examples
    elif is_whole or not flags.streaming:
        origins[HELD_OUT] = flag, where, splits[1 if is_whole else 0], flags.max_eval_examples
    else:
        raise InputError("--streaming needs --eval_file: nothing can be held out of a stream")
    digest = functools.cache(functools.partial(_digest, flags, cache))
    whole = {"version": VERSION, "task": flags.task, "columns": dataclasses.asdict(_columns(flags))}
    sides = {}
    for side, (flag, where, split, at_most) in origins.items():
        is_stream = side == TRAINING and flags.streaming
        with _said_by(flag):
            rows = {**whole, "split": split, "digest": digest(where, is_stream)}
        sides[side] = _Side(flag, where, split, "all" if is_whole else side, at_most, is_stream, rows)
    return sides


@contextlib.contextmanager
def _said_by(flag: str | None) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"--{flag}: {error}" if flag else str(error)) from error


def _digest(flags: FastkdArguments, cache: Path, where: str, is_stream: bool) -> Any:
    """Return a fingerprint of data that a flag names: of what nobody has the time to read twice, sizes and times."""
    task = TASKS[flags.task]
    if where == flags.embedded_data:
        rules = Path(str((dates if where == "dates" else corpus).__file__)).read_text(encoding="utf-8")
        return [where, sys.version, key(rules)]
    if where == flags.dataset_name and not Path(where).is_dir():
        configs = task.parts or ((task.name,) if is_glue(task) else (flags.dataset_config,))
        return [where, *(hub_revision(where, config, cache_dir=cache) for config in configs)]
    if is_stream:
        files = sorted(Path(where).rglob("*.arrow")) if is_saved(where) else data_files(where)
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return content_digest(where, ("*.tsv", "*.arrow") if is_glue(task) and has_splits(where) else ())


def _rows(flags: FastkdArguments, cache: Path, side: _Side) -> Any:
    """Return the rows of a side, of the columns of the task: a stream, or from an Arrow file in the cache."""
    task, columns = TASKS[flags.task], _columns(flags)

    def make(folder: Path) -> None:
        with _said_by(side.flag):
            _, dropped = store(_parts(flags, cache, side), folder / "rows.arrow", columns=columns)
        if dropped:
            print(f"{side.split}: {dropped:,} rows that lack a text were left out")

    if side.is_stream:
        with _said_by(side.flag):
            rows = stream(task, _parts(flags, cache, side)[0][2], columns=columns)
        return rows.take(side.at_most) if side.at_most else rows
    folder, _ = cached(cache, "rows", side.rows, make)
    rows = datasets.Dataset.from_file(str(folder / "rows.arrow"))
    if side.part != "all":
        texts = rows[next(iter(task.features))]
        held = {i for i, text in enumerate(texts) if corpus.is_held_out(text)}
        held = held or {min(range(len(texts)), key=lambda i: corpus.place(texts[i]))}  # of a few dozen
        if len(held) == len(texts):
            raise InputError("too little data to hold any of it out: give --eval_file")
        rows = rows.select([i for i in range(len(texts)) if (i in held) == (side.part == HELD_OUT)])
    return sample(rows, side.at_most) if side.at_most else rows


def _parts(flags: FastkdArguments, cache: Path, side: _Side) -> list[Part]:
    """Return the rows that a side's are of, as they are, with the tasks they are for."""
    task = TASKS[flags.task]
    if side.flag is None:
        rows: Any = _embedded(side.where, task)
    elif task.parts or (is_glue(task) and (side.flag == "dataset_name" or has_splits(side.where))):
        return glue_parts(task, side.where, side.split, cache_dir=cache)
    elif side.flag == "dataset_name":
        rows = read_hub(side.where, flags.dataset_config, side.split, cache_dir=cache, streaming=side.is_stream)
    else:
        rows = read_rows(side.where)
    return [(task, task.name, rows)]


def _embedded(name: str, task: Task) -> datasets.Dataset:
    """Return embedded data as rows that suit the task."""
    if name == "dates":
        return datasets.Dataset.from_list([{"source": text, "target": digits} for text, digits in dates.date_pairs()])
    files = tqdm(corpus.source_files(), desc="reading the standard library", unit="file")
    if task.name == "span_corruption":
        return datasets.Dataset.from_dict({"text": corpus.embedded_corpus(files)})
    if task.name == "classification":
        rows = [{"text": text, "label": label} for text, label in corpus.embedded_classes(files)]
    else:
        rows = [{"source": body, "target": summary} for body, summary in corpus.embedded_pairs(files)]
    return datasets.Dataset.from_list(rows)


# Tokens --------------------------------------------------------------------------------------------------------------


def _own_tokenizer(flags: FastkdArguments, cache: Path, digest: Any, rows: Callable[[], Any]) -> Any:
    """Return a tokenizer trained on the rows to learn from, from the cache if it was trained before."""
    settings = {
        "version": VERSION,
        "rows": digest,
        "vocabulary_size": flags.vocabulary_size,
        "sentinels": SENTINELS,
        "sentencepiece": sentencepiece.__version__,
    }

    def texts() -> Iterator[str]:
        given = rows()
        step = 1 + given.data.nbytes // VOCABULARY_BYTES  # all of it, or every second row, and so on
        for row in given.select(range(0, len(given), step)):
            for name in ("text", "source", "target"):
                # SentencePiece would learn nothing from the letters of its own symbols.
                yield re.sub(r"<(?=(/s|unk|pad)>)", "< ", row.get(name, ""))

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


def _tokenise(
    flags: FastkdArguments, side: str, rows: Callable[[], Any], tokenizer: Any, lengths: Any, folder: Path
) -> None:
    """Write rows.arrow and facts.json of a side."""
    path, given, fact = folder / "rows.arrow", rows(), side.replace("-", "_")
    facts: dict[str, Any] = {f"{fact}_examples": len(given)}
    shown = next(blocks(given))
    for column in sorted({"text", "source", "target"} & shown[0].keys()):
        check_known(tokenizer, [row[column] for row in shown], f"{side} data", f"{column}s")
    if flags.task == "span_corruption":
        chunks = pack_to_arrow(tokenizer, given, lengths[0], path, f"{side} text")
        facts[f"{fact}_chunks"] = len(chunks)
    else:
        cut = flags.max_target_length is not None
        _, counts = tokenize_pairs(given, tokenizer, lengths[0], lengths[1], path, cut_targets=cut, what=f"{side} data")
        facts |= {f"{fact}_sources_cut": counts.cut_sources, f"{fact}_targets_cut": counts.cut_targets}
        if counts.example:
            target, written = (text if len(text) < 80 else f"{text[:80]}..." for text in counts.example)
            facts["warning"] = (
                f"{counts.unwritable:,} of {counts.pairs:,} {side} targets are not what the tokenizer makes of them, "
                f"and no output equals them; the first is {target!r}, which becomes {written!r}"
            )
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def _decoded(spans: Chunks, tokenizer: Any, most: int) -> datasets.Dataset:
    """Return the first corrupted chunks as rows of pairs, with text that shows their sentinels."""
    items = [spans[i] for i in range(min(most, len(spans)))]
    columns = {
        "input_ids": [item["input_ids"].tolist() for item in items],
        "source": [tokenizer.decode(item["input_ids"][:-1]) for item in items],
        "target": [tokenizer.decode(item["labels"][:-1]) for item in items],
        "task": ["span_corruption"] * len(items),
    }
    return datasets.Dataset.from_dict(columns)
