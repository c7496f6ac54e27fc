"""What a model learns from rows: texts or pairs, written to an Arrow file or as a stream, and samples of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from ..common.errors import InputError
from .columns import Bound, Columns, Texts, languages
from .formats import Row
from .sources import Files, Rows, arrow_file, blocks, streamed
from .tasks import Part, Task

SAMPLE_SEED = 20  # fixed, whatever --seed is, so that runs compare
FEW_CLASSES = 100  # different targets of a task; more are texts


def _features(rows: Rows) -> dict[str, Any]:
    """Return what each column holds, by the first row if a stream does not know."""
    if rows.features is not None:
        return dict(rows.features)
    if (first := next(iter(rows), None)) is None:
        raise InputError("no rows: the data is empty")
    return dict(Dataset.from_list([first]).features)


def _bound(task: Task, rows: Rows, columns: Columns, streaming: bool = False) -> tuple[Rows, Bound]:
    if task.bind is None:
        raise ValueError(f"task: expected one with rows of its own, got {task.name!r}")
    try:
        return rows, task.bind(_features(rows), columns)
    except InputError as error:
        if not isinstance(rows, Files):
            raise
        if streaming:
            raise InputError(f"{error}; a stream has the columns of its first file, {rows.files[0]}") from error
    rows = rows.with_all_columns()
    return rows, task.bind(_features(rows), columns)


def languages_of(part: Part, columns: Columns) -> dict[str, str]:
    """Return the languages that a translation is from and to, by the flags for them; {} where none is known."""
    task, _, rows = part
    rows, _ = _bound(task, rows, columns)
    _, found = languages(_features(rows), columns)
    return {name: language for name, language in zip(("source_lang", "target_lang"), found, strict=True) if language}


def _learnt(part: Part, columns: Columns) -> Iterator[Row | None]:
    """Yield what a model learns from each row, None from one that lacks a text; raises InputError if all do."""
    task, title, rows = part
    rows, (used, texts) = _bound(task, rows, columns)
    is_empty = True
    for row in rows.select_columns(used):
        made = _columns(task, title, texts(row), columns)
        is_empty &= made is None
        yield made
    if is_empty:
        raise _nothing(task, title)


def _columns(task: Task, title: str, texts: Texts, columns: Columns) -> Row | None:
    """Return what a model learns from the texts of a row, None if one is missing; a second source may be."""
    if not all(texts[:2]):
        return None
    values = texts if task.is_text else (*texts[:2], title, *texts[2:], "")
    return dict(zip(task.features(columns), values, strict=False))


def _nothing(task: Task, title: str) -> InputError:
    return InputError(f"{title}: no row has " + ("a text" if task.is_text else "both a source and a target"))


def store(parts: Sequence[Part], path: Path, *, columns: Columns) -> tuple[Dataset, int]:
    """Write the texts, or pairs, of all parts to an Arrow file; return (the Dataset that maps it, rows dropped).

    Texts are rows "text", pairs "source", "target" and "task". Rows are dropped where one of them is blank or missing.
    Raises InputError if columns are absent, if a label is unknown, or if nothing is left of a part.
    """
    dropped = 0

    def kept() -> Iterator[Row]:
        nonlocal dropped
        for part in parts:
            for row in _learnt(part, columns):
                if row is None:
                    dropped += 1
                else:
                    yield row

    with arrow_file(path, parts[0][0].features(columns)) as write:
        for block in blocks(kept()):
            write({name: [row[name] for row in block] for name in block[0]})
    return Dataset.from_file(str(path)), dropped


def stream(task: Task, rows: Rows, *, columns: Columns) -> IterableDataset:
    """Return a stream of the texts, or pairs, of rows; as `store`, but what is dropped is not counted."""
    rows, (used, texts) = _bound(task, rows, columns, streaming=True)

    def convert(batch: dict[str, list[Any]]) -> dict[str, list[str]]:
        every = (texts(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True))
        made = [row for row in (_columns(task, task.name, each, columns) for each in every) if row is not None]
        return {name: [row[name] for row in made] for name in task.features(columns)}

    features = task.features(columns)
    made = streamed(rows, used).map(convert, batched=True, remove_columns=used, features=features)
    if next(iter(made), None) is None:
        raise _nothing(task, task.name)
    return made


def sample(rows: Dataset, most: int) -> Dataset:
    """Return at most `most` rows, drawn at random: as many of each task, as far as it has so many.

    Of a task with few different targets each is drawn, and as often as its share of the rows has it.
    """
    if len(rows) <= most:
        return rows
    if "task" not in rows.column_names:
        return rows.shuffle(seed=SAMPLE_SEED).take(most)
    table = rows.select_columns(["task", "target"]).to_pandas().sample(frac=1, random_state=SAMPLE_SEED)
    classes = table.groupby(["task", "target"])["target"]
    is_few = table.groupby("task")["target"].transform("nunique") <= FEW_CLASSES
    table["place"] = (classes.cumcount() / classes.transform("size")).where(is_few, 0)
    table["place"] = table.groupby("task")["place"].rank(method="first")  # in its task
    table = table.sort_values("place", kind="stable")
    return rows.select(sorted(table.index[:most]))
