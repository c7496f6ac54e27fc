"""Rows of a user's own data: text, JSONL, CSV, TSV and Parquet files, folders saved by `datasets`, hub names.

`datasets` keeps the rows, in Arrow files under a cache folder or as a stream; the files are parsed here, line by line,
so that every mistake in them is reported with its file and line, and nothing is guessed: CSV and TSV values stay the
text they are ("NA", "007"), JSON strings stay strings (pandas and pyarrow make dates of some).
"""

from __future__ import annotations

import contextlib
import csv
import glob
import gzip
import hashlib
import io
import json
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value
from datasets.arrow_writer import ArrowWriter

from .errors import InputError

VERSION = 1  # raise it when files are parsed differently, so that rows cached before are not reused
BLOCK = 1000  # rows whose types are inferred, or read from Parquet, together

Rows: TypeAlias = Dataset | IterableDataset
Row = dict[str, Any]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep `datasets` from showing its progress bars."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks, for one that stands in a line of our own."""
    return " ".join(str(error).split()) or type(error).__name__


# Files -----------------------------------------------------------------------------------------------------------


def data_files(where: str) -> list[Path]:
    """Return the files that a file, folder or glob means, sorted; a folder's are those of known suffixes in it.

    Raises InputError if there are none, if a suffix is unknown, or if they are of more than one format.
    """
    path = Path(where)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(f for f in path.iterdir() if f.is_file() and _suffix(f) in FORMATS and f.name[0] not in "._")
        if not files:
            raise InputError(f"{where} holds no data files: expected {_known()}, or a folder saved by datasets")
    elif glob.has_magic(where):
        files = [Path(name) for name in sorted(glob.glob(where, recursive=True)) if Path(name).is_file()]
        if not files:
            raise InputError(f"no file matches {where}")
    else:
        raise InputError(f"cannot read {where}: no such file or folder")
    for file in files:
        if _suffix(file) not in FORMATS:
            raise InputError(f"{file} has an unknown suffix: expected {_known()}")
    formats = sorted({FORMATS[_suffix(file)].name for file in files})
    if len(formats) > 1:
        raise InputError(
            f"{where} holds several formats ({', '.join(formats)}): expected one, give a glob of its files"
        )
    return files


def content_digest(where: str) -> str:
    """Return the SHA-256 (hexadecimal) of the data under `where`: its files' suffixes and contents, in order.

    Names and places do not matter, but for the splits inside a folder saved by `datasets`. Files are read in pieces.
    """
    digest = hashlib.sha256()
    folder = Path(where)
    saved = sorted(folder.rglob("*.arrow")) if is_saved(where) else []
    for file in saved or data_files(where):
        name = file.relative_to(folder).as_posix() if saved else "".join(file.suffixes[-2:]).lower()
        content = hashlib.sha256()
        with _reading(file), file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                content.update(piece)
        digest.update(f"{name}\n{content.hexdigest()}\n".encode())
    return digest.hexdigest()


def _suffix(file: Path) -> str:
    name = file.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _known() -> str:
    return ", ".join(FORMATS) + ", each also .gz"


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn what the file system and gzip may raise into an InputError."""
    try:
        yield
    except EOFError as error:
        raise InputError(f"{file} is truncated: its compressed data ends early") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{file} is no valid gzip file: {one_line(error)}") from error
    except OSError as error:
        raise InputError(f"cannot read {file}: {(error.strerror or 'unknown error').lower()}") from error


def _open(file: Path) -> Any:
    return gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line with its end) of a UTF-8 file, with or without a byte order mark."""
    with _reading(file), _open(file) as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                place = f"line {number}, byte {error.start + 1} of it"
                raise InputError(f"{file} is not UTF-8 text: {place}, does not decode") from error


# Formats ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """How files of one format are read.

    features: (files, whether they will be streamed) -> the columns; raises InputError where they do not agree.
    rows: (file, columns) -> its rows; raises InputError with file and line.
    """

    name: str
    features: Callable[[list[Path], bool], Features]
    rows: Callable[[Path, Features], Iterator[Row]]


def _text_features(files: list[Path], streaming: bool) -> Features:
    return Features({"text": Value("string")})


def _paragraphs(file: Path, features: Features) -> Iterator[Row]:
    """Yield paragraphs, white space collapsed. A blank line may hold spaces."""
    words: list[str] = []
    for _, line in _lines(file):
        words += line.split()
        if words and not line.strip():
            yield {"text": " ".join(words)}
            words = []
    if words:
        yield {"text": " ".join(words)}


def _csv_records(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the last line, fields) of each record, the header's too, blank lines left out."""
    csv.field_size_limit(2**31 - 1)  # Python's own limit of 131,072 characters is below the length of a document
    reader = csv.reader((line for _, line in _lines(file)), strict=True)
    try:
        yield from ((reader.line_num, fields) for fields in reader if fields)
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.line_num}: {one_line(error)}") from error


def _tsv_records(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, fields). Tabs always separate, quotes mean nothing: GLUE's files hold single ones."""
    for number, line in _lines(file):
        line = line.rstrip("\r\n")
        if line:
            yield number, line.split("\t")


def _table(name: str, records: Callable[[Path], Iterator[tuple[int, list[str]]]]) -> Format:
    """Return the format of files whose first record names the columns; all values are strings."""

    def header(file: Path) -> list[str]:
        _, names = next(records(file), (0, []))
        if not names:
            raise InputError(f"{file} is empty: expected a first line that names the columns")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{file}: two columns are named {twice!r}")
        return names

    def features(files: list[Path], streaming: bool) -> Features:
        expected = header(files[0])
        for file in files[1:]:
            _check_same_columns(files[0], expected, file, header(file))
        return Features(dict.fromkeys(expected, Value("string")))

    def rows(file: Path, features: Features) -> Iterator[Row]:
        names = header(file)
        for number, fields in islice(records(file), 1, None):
            if len(fields) > len(names):
                raise InputError(f"{file}, line {number}: expected {len(names)} fields, got {len(fields)}")
            # Fields missing at the end are None, which "" is not.
            yield dict.fromkeys(names) | dict(zip(names, fields, strict=False))

    return Format(name, features, rows)


def _check_same_columns(first: Path, expected: list[str], file: Path, names: list[str]) -> None:
    if set(names) != set(expected):
        raise InputError(f"{file} has the columns {', '.join(names)}; {first} has {', '.join(expected)}")


def _json_objects(file: Path) -> Iterator[tuple[int, Row]]:
    """Yield (line number, object) of each line; or of a .json file that is one array, (the array's line, object)."""
    lines = _lines(file)
    for number, line in lines:
        if not line.strip():
            continue
        is_array = _suffix(file) == ".json" and line.lstrip().startswith("[")
        text = line + "".join(rest for _, rest in lines) if is_array else line.strip()
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            at = number + error.lineno - 1 if isinstance(error, json.JSONDecodeError) else number
            reason = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
            raise InputError(f"{file}, line {at}: malformed JSON, {reason[0].lower()}{reason[1:]}") from error
        for row in value if is_array else [value]:
            if not isinstance(row, dict):
                raise InputError(f"{file}, line {number}: expected a JSON object, got {json.dumps(row)[:40]}")
            yield number, row


def _unified(schema: pa.Schema, rows: list[Row]) -> pa.Schema:
    """Return `schema` with the columns and types of `rows` as well; raises if a column's types do not go together."""
    return pa.unify_schemas([schema, pa.schema(list(pa.array(rows).type))], promote_options="permissive")


_ARROW_ERRORS = (pa.ArrowException, ValueError, TypeError, OverflowError)


def _in_blocks(file: Path, use: Callable[[list[Row]], Any]) -> Iterator[Any]:
    """Yield use(rows) of many rows at a time; of one at a time where Arrow refuses, to find the line."""
    objects = _json_objects(file)
    while block := list(islice(objects, BLOCK)):
        try:
            results = [use([row for _, row in block])]
        except _ARROW_ERRORS:
            results = []
            for number, row in block:
                with _naming(file, number):
                    results.append(use([row]))
        yield from results


def _json_features(files: list[Path], streaming: bool) -> Features:
    """Infer the columns from all rows; for a stream, from the first ones of the first file."""
    schema = pa.schema([])

    def widen(rows: list[Row]) -> None:
        nonlocal schema
        schema = _unified(schema, rows)

    for file in files[:1] if streaming else files:
        for _ in _in_blocks(file, widen):
            if streaming:
                break
    return Features.from_arrow_schema(schema)


def _json_rows(file: Path, features: Features) -> Iterator[Row]:
    """Yield the objects with all columns: the keys that one lacks are None, those that no column has are left out."""
    struct = _struct(features)
    for rows in _in_blocks(file, lambda rows: pa.array(rows, struct).to_pylist()):
        yield from rows


@contextlib.contextmanager
def _naming(file: Path, number: int) -> Iterator[None]:
    """Turn Arrow's refusal of a value into an InputError that says where it is."""
    try:
        yield
    except _ARROW_ERRORS as error:
        raise InputError(f"{file}, line {number}: {one_line(error)}") from error


@contextlib.contextmanager
def _parquet(file: Path) -> Iterator[pq.ParquetFile]:
    with _reading(file), _open(file) as stream:
        # Parquet is read from its end, which gzip cannot: a compressed one is unpacked, into memory.
        source = io.BytesIO(stream.read()) if isinstance(stream, gzip.GzipFile) else stream
        try:
            yield pq.ParquetFile(source)
        except pa.ArrowException as error:
            raise InputError(f"{file} is no valid Parquet file: {one_line(error)}") from error


def _parquet_features(files: list[Path], streaming: bool) -> Features:
    schemas = []
    for file in files:
        with _parquet(file) as table:
            schemas.append(table.schema_arrow)
        _check_same_columns(files[0], schemas[0].names, file, schemas[-1].names)
    try:
        return Features.from_arrow_schema(pa.unify_schemas(schemas, promote_options="permissive"))
    except _ARROW_ERRORS as error:
        raise InputError(f"{files[0]} and the files beside it do not agree: {one_line(error)}") from error


def _parquet_rows(file: Path, features: Features) -> Iterator[Row]:
    with _parquet(file) as table:
        for batch in table.iter_batches(batch_size=BLOCK):
            yield from batch.to_pylist()


_JSON = Format("jsonl", _json_features, _json_rows)
FORMATS = {
    ".txt": Format("text", _text_features, _paragraphs),
    ".jsonl": _JSON,
    ".json": _JSON,
    ".csv": _table("csv", _csv_records),
    ".tsv": _table("tsv", _tsv_records),
    ".parquet": Format("parquet", _parquet_features, _parquet_rows),
}


# Rows ------------------------------------------------------------------------------------------------------------


def _struct(features: Features) -> pa.StructType:
    return pa.struct(list(features.arrow_schema))


def _generate(files: list[Path], features: Features) -> Iterator[Row]:
    for file in files:
        yield from FORMATS[_suffix(file)].rows(file, features)


def _write(rows: Iterator[Row], features: Features, path: Path) -> None:
    """Write rows to an Arrow file, which appears under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-rows-") as scratch:
        made = Path(scratch) / path.name
        with ArrowWriter(features=features, path=str(made)) as writer:
            while block := list(islice(rows, BLOCK)):
                writer.write_table(pa.Table.from_struct_array(pa.array(block, _struct(features))))
            writer.finalize()
        made.replace(path)


def read_rows(where: str, *, cache_dir: Path, streaming: bool = False) -> Rows:
    """Return the rows of a file, a folder or glob of files of one format, or a folder saved by `datasets`.

    Text gives the column "text", a paragraph a row; CSV and TSV give strings; JSON and Parquet keep their types, and
    the keys that a JSON object lacks are None. The rows are kept in cache_dir, under a name made of the files'
    contents, or read anew in every epoch of a stream. A stream takes its columns from its first rows.
    Raises InputError, naming file and line where there is one, if the data cannot be read or is empty. A stream may
    do so when it comes to the line.
    """
    if is_saved(where):
        return _saved(where, None, streaming)
    files = data_files(where)
    features = FORMATS[_suffix(files[0])].features(files, streaming)
    if not features or next(_generate(files, features), None) is None:
        raise InputError(f"{where} is empty: expected at least one row or paragraph")
    if streaming:
        return IterableDataset.from_generator(_generate, features, {"files": files, "features": features})
    path = cache_dir / f"rows-{VERSION}-{content_digest(where)[:16]}.arrow"
    if not path.is_file():
        _write(_generate(files, features), features, path)
    return Dataset.from_file(str(path))


def read_hub(name: str, config: str | None, split: str, *, cache_dir: Path, streaming: bool = False) -> Rows:
    """Return one split of a data set of the Hugging Face hub, or of a folder saved by `datasets`.

    Data sets that need code of their own to be loaded are refused by `datasets`.
    Raises InputError if there is no such data set, configuration or split, or no connection.
    """
    if is_saved(name):
        return _saved(name, split, streaming)
    if Path(name).exists():
        raise InputError(f"{name} was not saved by datasets: expected a folder of save_to_disk, or a name on the hub")
    try:
        with quiet():
            return datasets.load_dataset(name, config, split=split, cache_dir=str(cache_dir), streaming=streaming)
    except Exception as error:  # of datasets, huggingface_hub and the network below: there is no common class
        what = f"{name}, configuration {config}" if config else name
        raise InputError(f"cannot load split {split!r} of {what}: {one_line(error)}") from error


def is_saved(where: str) -> bool:
    """Return whether a folder was saved by the `save_to_disk` of a Dataset or DatasetDict."""
    return any((Path(where) / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _saved(folder: str, split: str | None, streaming: bool) -> Rows:
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
        raise InputError(f"{folder} is empty: expected at least one row")
    return saved.to_iterable_dataset() if streaming else saved
