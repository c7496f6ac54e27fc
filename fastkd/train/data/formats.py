"""The formats of files: text, JSONL, CSV, TSV and Parquet, each also compressed by gzip.

Files are parsed here, a row at a time and only in the columns that are asked for, so that a column which nothing reads
fails no file, memory does not grow with it, and every mistake is reported with its file and line. Nothing is guessed:
CSV and TSV values stay the text they are ("NA", "007"), JSON strings stay strings, which pandas makes dates of.
What divides a file into rows and values:

- Text: a row is a paragraph, lines up to a blank one, in files where blank lines follow at least one line in a hundred
  (of the first 10,000); in others every line is a row. A row of more than 50,000 characters is cut into several.
- CSV: quotes enclose values, which may then hold commas, line breaks and doubled quotes, as `csv.writer` and pandas
  write them.
- TSV: the same, if every quote of the file stands where those would put it: around a value, or doubled inside of one.
  Where one does not (in the first 100,000 lines), quotes are text, as in GLUE's files, and tabs always separate; also
  where values would span lines each of which has all the columns.
- JSONL: an object a line; .json may also be one array. Columns are the keys of the first 1,000 objects; those that come
  later are found where they are asked for, but not in a stream.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from itertools import groupby, islice, zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Value

from ..common.errors import InputError, one_line

BATCH = 64  # rows of a Parquet file that are decoded together
LONGEST = 50_000  # characters of a text; files exist that are one line, or one paragraph
_PIECE = re.compile(
    rf"(?s).{{1,{LONGEST - 1}}}(?: |\Z)|.{{1,{LONGEST}}}"
)  # of a line, cut behind a space if there is one
JUDGED_TEXT, JUDGED_TSV, JUDGED_ROWS = 10_000, 100_000, 1000  # lines, or rows, by which a file is judged

Row = dict[str, Any]
Records = Iterator[tuple[int, list[str]]]  # the number of a line, and its fields
_NO_TEXT = Value("null")  # the feature of columns that hold neither text nor texts by name


def suffix(file: Path) -> str:
    """Return the suffix that names a file's format."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
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
    start = b""
    with reading(file), _open(file) as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                start = line[:100]
                if found := next((said for mark, said in _BINARY.items() if start.startswith(mark)), None):
                    raise InputError(f"{file} is no text but {found[0]}: {found[1]}")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(file, f"line {number}, byte {error.start + 1} of it", start) from error
            if number == 1 and 3 * start.count(0) > len(start):
                raise _not_utf8(file, "line 1, with zeros between its letters", start)
            yield number, text


# How files begin that are no text, what they are, and what makes data of them.
_BINARY = {
    b"\x1f\x8b\x08": ("compressed by gzip", "rename it, so that its name ends in .gz"),
    b"PK\x03\x04": ("a zip archive, or a spreadsheet", "give the files that unzip makes of it, or CSV"),
    b"(\xb5/\xfd": ("compressed by zstd", "give what zstd -d makes of it"),
    b"\xfd7zXZ\0": ("compressed by xz", "give what xz -d makes of it"),
    b"BZh91AY&SY": ("compressed by bzip2", "give what bzip2 -d makes of it"),
    b"PAR1\x15": ("Parquet", "rename it, so that its name ends in .parquet"),
    b"ARROW1\0": ("an Arrow file", "give Parquet, or a folder of save_to_disk"),
    b"%PDF-": ("a PDF", "give its text"),
}
_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


def _not_utf8(file: Path, place: str, start: bytes) -> InputError:
    found = next((name for mark, name in _ENCODINGS.items() if start.startswith(mark)), None)
    high, low = start[::2].count(0), start[1::2].count(0)
    if found is None and 3 * (high + low) > len(start) and not (high and low):
        found = "UTF-16LE" if low else "UTF-16BE"
    if found is None and any(byte < 9 or 13 < byte < 27 for byte in start):
        return InputError(f"{file} is no text: {place}, does not decode, and its first line has control characters")
    is_said = f"it is {found}" if found else "perhaps it is Windows-1252 (Latin-1)"
    return InputError(
        f"{file} is not UTF-8 text: {place}, does not decode; {is_said}, which "
        f"iconv -f {found or 'WINDOWS-1252'} -t UTF-8 OLD > NEW converts"
    )


def features(file: Path, whole: bool = False) -> dict[str, Any]:
    """Return what each column of a file holds, "string" or null or keys, by its first rows; whole: by all of JSON's."""
    if suffix(file) == ".parquet":
        return _parquet_features(file)
    found: dict[str, Any] = {}
    most = None if whole and suffix(file).startswith(".json") else JUDGED_ROWS
    for row in islice(FORMATS[suffix(file)][1](file, None), most):
        for name, value in row.items():
            if isinstance(value, str):
                found[name] = Value("string")
            elif isinstance(value, dict):
                known = found.get(name)
                found[name] = (known if isinstance(known, dict) else {}) | dict.fromkeys(value, Value("string"))
            else:
                found.setdefault(name, _NO_TEXT)
    return found


def rows(files: Iterable[Path], names: list[str]) -> Iterator[Row]:
    """Yield the rows of files with these columns: what a row lacks is None, what a whole file lacks is an error."""
    for file in files:
        found: Row = {}
        for row in FORMATS[suffix(file)][1](file, names):
            found.update(row)
            yield {name: row.get(name) for name in names}
        if found:
            _check_columns(file, names, found)


def _check_columns(file: Path, names: list[str], every: Collection[str]) -> None:
    if lacking := [name for name in names if name not in every]:
        raise InputError(
            f"{file} lacks {', '.join(lacking)}, which another file has: it has the columns {', '.join(every)}"
        )


def _texts(file: Path, names: list[str] | None) -> Iterator[Row]:
    """Yield texts, white space collapsed. A blank line may hold spaces."""
    in_paragraphs, size = _has_paragraphs(file), 0
    parts: list[str] = []
    for _, line in _lines(file):
        for piece in [line] if len(line) <= LONGEST else (found[0] for found in _PIECE.finditer(line)):
            part = " ".join(piece.split())
            if parts and (not part or not in_paragraphs or size + len(part) > LONGEST):
                yield {"text": " ".join(parts)}
                parts, size = [], 0
            if part:
                parts.append(part)
                size += len(part)
    if parts:
        yield {"text": " ".join(parts)}


def _has_paragraphs(file: Path) -> bool:
    runs = groupby(line.isspace() for _, line in islice(_lines(file), JUDGED_TEXT))
    sizes = [sum(1 for _ in lines) for is_blank, lines in runs if not is_blank]
    return 0 < sum(sizes) <= 100 * (len(sizes) - 1)


def _csv_records(file: Path, delimiter: str = ",") -> Records:
    """Yield (number of the last line, fields) of each record, the header's too, blank lines left out."""
    csv.field_size_limit(2**31 - 1)  # Python's own limit of 131,072 characters is below the length of a document
    reader = csv.reader((line for _, line in _lines(file)), delimiter=delimiter, strict=True)
    try:
        yield from ((reader.line_num, fields) for fields in reader if fields)
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.line_num}: {one_line(error)}") from error


def _tsv_records(file: Path) -> Records:
    """Yield (line number, fields) as `_csv_records`, or by tabs alone where quotes are text."""
    if _quotes_enclose(file):
        yield from _csv_records(file, "\t")
        return
    for number, line in _lines(file):
        line = line.rstrip("\r\n")
        if line:
            yield number, line.split("\t")


def _quotes_enclose(file: Path) -> bool:
    """Return whether each quote of a TSV file begins or ends a value, or is doubled inside of one."""
    record: list[str] = []  # its lines
    tabs: set[int] = set()
    spans = False

    def lines() -> Iterator[str]:
        for _, line in islice(_lines(file), JUDGED_TSV):
            record.append(line)
            if line.strip("\r\n"):
                tabs.add(line.count("\t"))
            yield line

    try:
        for fields in csv.reader(lines(), delimiter="\t", strict=True):
            text = "".join(record)
            if any('"' in field and '"' + field.replace('"', '""') + '"' not in text for field in fields):
                return False
            spans |= len(record) > 1
            record.clear()
    except csv.Error:
        return False
    # Where values seem to span lines, each of which has all the columns, quotes of different rows only look like pairs.
    return not (spans and len(tabs) == 1 and tabs != {0})


def _table(records: Callable[[Path], Records], file: Path, names: list[str] | None) -> Iterator[Row]:
    """Yield rows of strings; the first record names the columns."""
    lines = records(file)
    _, header = next(lines, (0, []))
    if not header:
        raise InputError(f"{file} is empty: expected a first line that names the columns")
    if len(set(header)) < len(header):
        raise InputError(f"{file}: two columns are named {Counter(header).most_common(1)[0][0]!r}")
    for number, fields in lines:
        if len(fields) > len(header):
            raise InputError(f"{file}, line {number}: expected {len(header)} fields, got {len(fields)}")
        yield dict(zip_longest(header, fields))  # fields missing at the end are None, which "" is not


def _json_rows(file: Path, names: list[str] | None) -> Iterator[Row]:
    """Yield the object of each line, or those of a .json file that is one array."""
    lines = _lines(file)
    for number, line in lines:
        if not line.strip():
            continue
        is_array = suffix(file) == ".json" and line.lstrip().startswith("[")
        text = line + "".join(rest for _, rest in lines) if is_array else line.strip()
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            at, reason = number + getattr(error, "lineno", 1) - 1, getattr(error, "msg", one_line(error))
            raise InputError(f"{file}, line {at}: malformed JSON, {reason[0].lower()}{reason[1:]}") from error
        for row in value if is_array else [value]:
            if not isinstance(row, dict):
                raise InputError(f"{file}, line {number}: expected a JSON object, got {json.dumps(row)[:40]}")
            try:
                "".join(value for name in names or () if isinstance(value := row.get(name), str)).encode()
            except UnicodeEncodeError as error:
                raise InputError(f"{file}, line {number}: half of a surrogate pair, which is no character") from error
            yield row


@contextlib.contextmanager
def _parquet(file: Path) -> Iterator[pq.ParquetFile]:
    with reading(file), _open(file) as stream:
        # Parquet is read from its end, which gzip cannot: a compressed one is unpacked, into memory.
        source = io.BytesIO(stream.read()) if isinstance(stream, gzip.GzipFile) else stream
        try:
            yield pq.ParquetFile(source)
        except pa.ArrowException as error:
            raise InputError(f"{file} is no valid Parquet file: {one_line(error)}") from error


def _parquet_features(file: Path) -> dict[str, Any]:
    """Return what each column holds, such as a ClassLabel, or that it is no text if `datasets` knows no such type."""
    with _parquet(file) as table:
        schema, found = table.schema_arrow, {}
    for field in schema:
        if pa.types.is_dictionary(field.type):
            field = field.with_type(field.type.value_type)
        found[field.name] = _NO_TEXT
        if pa.types.is_large_string(field.type) or pa.types.is_string_view(field.type):
            found[field.name] = Value("string")
        else:
            with contextlib.suppress(ValueError, TypeError, NotImplementedError):
                found |= Features.from_arrow_schema(pa.schema([field], schema.metadata))
    return found


def _parquet_rows(file: Path, names: list[str] | None) -> Iterator[Row]:
    with _parquet(file) as table:
        _check_columns(file, names or [], table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=BATCH, columns=names):
            yield from batch.to_pylist()


# The name of each format, and the function of (file, the columns that are asked for, or None) that yields rows of at
# least these columns; it raises InputError with file and line.
FORMATS: dict[str, tuple[str, Callable[[Path, list[str] | None], Iterator[Row]]]] = {
    ".txt": ("text", _texts),
    ".jsonl": ("jsonl", _json_rows),
    ".json": ("jsonl", _json_rows),
    ".csv": ("csv", partial(_table, _csv_records)),
    ".tsv": ("tsv", partial(_table, _tsv_records)),
    ".parquet": ("parquet", _parquet_rows),
}
KNOWN_SUFFIXES = f"{', '.join(FORMATS)}, each also .gz"
