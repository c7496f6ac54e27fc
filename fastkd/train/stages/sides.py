"""Where the rows of a run come from, training data and what is held out, read once and kept in a cache."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from tqdm.auto import tqdm

from ..common.cache import cached, key
from ..common.errors import InputError, counted
from ..data import corpus, dates
from ..data.columns import Columns
from ..data.rows import languages_of, sample, store, stream
from ..data.sources import content_digest, data_files, hub_revision, is_saved, read_hub, read_rows
from ..data.tasks import TASKS, Part, Task, glue_parts, has_splits, is_glue
from ..flags.fields import FastkdArguments

VERSION = 5  # raise it when a stage changes what it makes, so that older artefacts are not reused
TRAINING, HELD_OUT = "training", "held-out"  # the sides of the data


class Side(NamedTuple):
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


def sides_of(flags: FastkdArguments, cache: Path, columns: Columns) -> dict[str, Side]:
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
    whole = {"version": VERSION, "task": flags.task, "columns": dataclasses.asdict(columns)}
    sides = {}
    for side, (flag, where, split, at_most) in origins.items():
        is_stream = side == TRAINING and flags.streaming
        with _said_by(flag):
            rows = {**whole, "split": split, "digest": digest(where, is_stream)}
        sides[side] = Side(flag, where, split, "all" if is_whole else side, at_most, is_stream, rows)

    def contents(side: Side) -> Any:
        is_split = side.flag == "dataset_name" or (glue and has_splits(side.where))
        return digest(side.where, flags.streaming), side.split if is_split else None

    if is_whole and contents(sides[TRAINING]) == contents(sides[HELD_OUT]):
        named = "eval_file" if flags.eval_file else "eval_split"
        print(f"warning: --{named} is the training data: figures tell what was learnt by heart", file=sys.stderr)
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


def rows_of(flags: FastkdArguments, cache: Path, columns: Columns, side: Side) -> Any:
    """Return the rows of a side, of the columns of the task: a stream, or from an Arrow file in the cache."""
    task = TASKS[flags.task]

    def make(folder: Path) -> None:
        with _said_by(side.flag):
            _, dropped = store(_parts(flags, cache, side), folder / "rows.arrow", columns=columns)
        if dropped:
            print(f"{side.split}: {counted(dropped, 'rows')} without a text left out")

    if side.is_stream:
        with _said_by(side.flag):
            rows = stream(task, _parts(flags, cache, side)[0][2], columns=columns)
        return rows.take(side.at_most) if side.at_most else rows
    folder, _ = cached(cache, "rows", side.rows, make)
    rows = datasets.Dataset.from_file(str(folder / "rows.arrow"))
    if side.part != "all":
        texts = rows["text" if task.is_text else "source"]
        held = {i for i, text in enumerate(texts) if corpus.is_held_out(text)}
        if not 0 < len(held) < len(texts):  # of a few dozen rows
            first = min(texts, key=corpus.place)
            held = {i for i, text in enumerate(texts) if text == first}
        if len(held) == len(texts):
            raise InputError(
                "too little data to hold any of it out: expected at least 2 different texts, got 1 in "
                f"{counted(len(held), 'rows')}: give --eval_file"
            )
        rows = rows.select([i for i in range(len(texts)) if (i in held) == (side.part == HELD_OUT)])
    return sample(rows, side.at_most) if side.at_most else rows


def languages_of_sides(flags: FastkdArguments, cache: Path, columns: Columns, sides: dict[str, Side]) -> dict[str, str]:
    """Return the languages of a translation, "source_lang" and "target_lang", where the data and no flag tells them.

    Raises InputError if the sides differ.
    """
    if flags.task != "translation" or flags.source_lang or flags.target_lang:
        return {}
    found = []
    for side in sides.values():
        with _said_by(side.flag):
            found.append(languages_of(_parts(flags, cache, side)[0], columns))
    if found[0] != found[1]:
        first, second = (
            f"{' to '.join(each.values()) or 'no language'} in --{side.flag}"
            for each, side in zip(found, sides.values(), strict=True)
        )
        raise InputError(f"translation: {first}, but {second}: give --source_lang and --target_lang")
    if found[0]:
        print(f"from {' to '.join(found[0].values())}, by the columns: --source_lang and --target_lang say otherwise")
    return found[0]


def _parts(flags: FastkdArguments, cache: Path, side: Side) -> list[Part]:
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
    if task.is_text:
        return datasets.Dataset.from_dict({"text": corpus.embedded_corpus(files)})
    if task.name == "classification":
        rows = [{"text": text, "label": label} for text, label in corpus.embedded_classes(files)]
    else:
        rows = [{"source": body, "target": summary} for body, summary in corpus.embedded_pairs(files)]
    return datasets.Dataset.from_list(rows)
