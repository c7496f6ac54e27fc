"""Rows of a user's own data: files and folders of them (see formats.py), folders saved by `datasets`, hub names."""

from __future__ import annotations

import contextlib
import glob
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, IterableDataset
from datasets.arrow_writer import ArrowWriter

from ..common.errors import InputError, one_line
from ..common.hub import from_hub
from . import formats
from .formats import FORMATS, KNOWN_SUFFIXES, Row, reading, suffix

BLOCK = 1000  # rows that are worked on together, or fewer:
CHARACTERS = 1 << 22  # what they may hold, but for a single row: Arrow's limit, and memory, are far above

Rows: TypeAlias = "Dataset | IterableDataset | Files"
RowOf = TypeVar("RowOf", bound=Mapping[str, str])


def data_files(where: str) -> list[Path]:
    """Return the files that a file, folder or glob means, sorted; a folder's are those of known suffixes in it.

    Raises InputError if there are none, if a suffix is unknown, or if they are of more than one format.
    """
    path = Path(where)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(f for f in path.iterdir() if f.is_file() and suffix(f) in FORMATS and f.name[0] not in "._")
        if not files:
            raise InputError(f"{where} holds no data files: expected {KNOWN_SUFFIXES}, or a folder saved by datasets")
    elif glob.has_magic(where):
        files = [Path(name) for name in sorted(glob.glob(where, recursive=True)) if Path(name).is_file()]
        if not files:
            raise InputError(f"no file matches {where}")
    else:
        raise InputError(f"cannot read {where}: no such file or folder")
    for file in files:
        if suffix(file) not in FORMATS:
            raise InputError(f"{file} has an unknown suffix: expected {KNOWN_SUFFIXES}")
    found = sorted({FORMATS[suffix(file)][0] for file in files})
    if len(found) > 1:
        raise InputError(f"{where} holds several formats ({', '.join(found)}): expected one, give a glob of its files")
    return files


def content_digest(where: str, inside: Sequence[str] = ()) -> str:
    """Return the SHA-256 (hexadecimal) of the data under `where`: its files' suffixes and contents, in order.

    Names and places do not matter, but for those inside a folder saved by `datasets`, or of the files anywhere in a
    folder that match one of `inside`. Files are read in pieces.
    """
    digest, folder = hashlib.sha256(), Path(where)
    inside = ("*.arrow",) if is_saved(where) else inside
    for file in sorted(f for like in inside for f in folder.rglob(like)) if inside else data_files(where):
        name = file.relative_to(folder).as_posix() if inside else "".join(file.suffixes[-2:]).lower()
        content = hashlib.sha256()
        with reading(file), file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                content.update(piece)
        digest.update(f"{name}\n{content.hexdigest()}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Files:
    """Rows of files of one format, parsed anew whenever they are iterated over.

    features: the columns that are read, and what each holds as far as it is known; values are what the format has
    (numbers of JSON, decimals of Parquet).
    """

    files: list[Path]
    features: dict[str, Any]

    @property
    def column_names(self) -> list[str]:
        """The columns that are read."""
        return list(self.features)

    def select_columns(self, names: list[str]) -> Files:
        """Return the rows of these columns alone."""
        return replace(self, features={name: self.features[name] for name in names})

    def with_all_columns(self) -> Files:
        """Return the rows with the columns that come late in a JSONL file, too; its files are parsed for it."""
        every = [formats.features(file, whole=True) for file in self.files]
        return replace(self, features={name: held for found in every for name, held in found.items()})

    def __iter__(self) -> Iterator[Row]:
        rows = formats.rows(self.files, self.column_names)
        if (first := next(rows, None)) is None:
            raise _empty(self.files[0])
        yield first
        yield from rows


def read_rows(where: str) -> Dataset | Files:
    """Return the rows of a file, a folder or glob of files of one format, or a folder saved by `datasets`.

    Text gives the column "text". Columns are those of the first file, which the others need only where they are read.
    Raises InputError, naming file and line where there is one, if the data cannot be read or is empty: here, or when
    the reading comes to it.
    """
    if is_saved(where):
        return _saved(where, None)
    files = data_files(where)
    features = formats.features(files[0])
    if not features:
        raise _empty(files[0])
    return Files(files, features)


def _empty(where: str | Path) -> InputError:
    return InputError(f"{where} is empty: expected at least one row or text")


def streamed(rows: Rows, names: list[str]) -> IterableDataset:
    """Return a stream of the rows of these columns."""
    if isinstance(rows, Files):
        return IterableDataset.from_generator(formats.rows, gen_kwargs={"files": rows.files, "names": tuple(names)})
    return (rows.to_iterable_dataset() if isinstance(rows, Dataset) else rows).select_columns(names)


def read_hub(name: str, config: str | None, split: str, *, cache_dir: Path, streaming: bool = False) -> Any:
    """Return one split of a data set of the Hugging Face hub, or of a folder saved by `datasets`.

    Data sets that need code of their own to be loaded are refused by `datasets`.
    Raises InputError if there is no such data set, configuration or split, or no connection.
    """
    if is_saved(name):
        return _saved(name, split)
    with _of_hub(name):
        return datasets.load_dataset(name, config, split=split, cache_dir=str(cache_dir), streaming=streaming)


def hub_revision(name: str, config: str | None, *, cache_dir: Path) -> str:
    """Return which revision of a data set of the hub `read_hub` reads; raises InputError as it does."""
    with _of_hub(name):
        return str(datasets.load_dataset_builder(name, config, cache_dir=str(cache_dir)).hash)


@contextlib.contextmanager
def _of_hub(name: str) -> Iterator[None]:
    if Path(name).exists():
        raise InputError(f"{name} was not saved by datasets: expected a folder of save_to_disk, or a name on the hub")
    before = datasets.config.HF_HUB_OFFLINE
    with from_hub(name, "data", "dataset") as offline:
        datasets.config.HF_HUB_OFFLINE = before or offline
        try:
            yield
        finally:
            datasets.config.HF_HUB_OFFLINE = before


def is_saved(where: str | Path) -> bool:
    """Return whether a folder was saved by the `save_to_disk` of a Dataset or DatasetDict."""
    return any((Path(where) / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _saved(folder: str, split: str | None) -> Dataset:
    """Return a saved Dataset, or the split of a DatasetDict (its only one for None)."""
    try:
        saved = datasets.load_from_disk(folder)
    except Exception as error:  # whatever a damaged file leads to
        raise InputError(f"cannot read {folder}: {one_line(error)}") from error
    if isinstance(saved, DatasetDict):
        if split is None and len(saved) > 1:
            raise InputError(
                f"{folder} holds the splits {', '.join(saved)}: choose by --dataset_name {folder} and --train_split"
            )
        chosen = next(iter(saved)) if split is None else split
        if chosen not in saved:
            raise InputError(f"{folder} has no split {chosen!r} (splits: {', '.join(saved)})")
        saved = saved[chosen]
    if not len(saved):
        raise _empty(folder)
    return saved


def blocks(rows: Iterable[RowOf]) -> Iterator[list[RowOf]]:
    """Yield rows of strings in lists of at most BLOCK, and of about CHARACTERS characters."""
    block: list[RowOf] = []
    size = 0
    for row in rows:
        block.append(row)
        size += sum(map(len, row.values()))
        if len(block) == BLOCK or size >= CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


@contextlib.contextmanager
def arrow_file(path: Path, features: Features) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that appends columns to an Arrow file; nothing is left of the file after an error."""
    try:
        with ArrowWriter(features=features, path=str(path)) as writer:
            yield lambda columns: writer.write_table(pa.table(columns, schema=features.arrow_schema))
            writer.finalize()
    except BaseException:
        path.unlink(missing_ok=True)
        raise
