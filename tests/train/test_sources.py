"""Every format gives the rows that are written in it, and every mistake is one line that says where it is."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import zipfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.arrow_writer import ArrowWriter

from fastkd.train.common.errors import InputError
from fastkd.train.data import formats, sources
from fastkd.train.data.rows import stream
from fastkd.train.data.sources import content_digest, read_hub, read_rows, streamed
from fastkd.train.data.tasks import TASKS, Columns

ROWS = [{"a": 'one "two"', "b": "NA"}, {"a": "007", "b": "null"}, {"a": "3.0", "b": ""}, {"a": "línea\ttab", "b": "x"}]


def rows_of(where: Path | str, names: list[str] | None = None, streaming: bool = False) -> list[dict[str, Any]]:
    """The rows of these columns, or of all."""
    rows = read_rows(str(where))
    names = names or rows.column_names
    return list(streamed(rows, names) if streaming else rows.select_columns(names))


@pytest.fixture
def read() -> Any:
    """read(where, streaming): the rows as a list of dicts."""
    return lambda where, streaming=False: rows_of(where, None, streaming)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> bytes:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path.read_bytes()


CONTENTS = {
    ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS) + "\n",
    ".json": json.dumps(ROWS, indent=2),
    ".csv": 'a,b\r\n"one ""two""",NA\r\n007,null\r\n3.0,\r\nlínea\ttab,x\r\n',
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("suffix", [*CONTENTS, ".parquet"])
def test_formats_keep_values(read: Any, tmp_path: Path, suffix: str, packed: str, streaming: bool) -> None:
    content = CONTENTS.get(suffix) or parquet(tmp_path / "made.pq", ROWS)
    path = write(tmp_path / f"data{suffix}{packed}", content)
    assert read(path, streaming) == ROWS


@pytest.mark.parametrize("streaming", [False, True])
def test_tsv_of_glue_knows_no_quotes(read: Any, tmp_path: Path, streaming: bool) -> None:
    path = write(tmp_path / "t.tsv", '\ufeffsentence\tlabel\n"an opened quote\t1\n\na "b" c\t\n  short\n')
    assert read(path, streaming) == [
        {"sentence": '"an opened quote', "label": "1"},
        {"sentence": 'a "b" c', "label": ""},
        {"sentence": "  short", "label": None},
    ]


@pytest.mark.parametrize(
    "lines", [['"One', "Two"], ['"One', 'Two"'], ["it 's \"fine", '"a"'], ['"a"', '"b" c'], ['""a']]
)
def test_quotes_of_tsv_that_enclose_nothing_are_text(read: Any, tmp_path: Path, lines: list[str]) -> None:
    path = write(tmp_path / "t.tsv", "text\tlabel\n" + "".join(f"{line}\t1\n" for line in lines))
    assert read(path) == [{"text": line, "label": "1"} for line in lines]


AWKWARD = ['say "hi"', "two\tparts", "two\nlines", '"', '""', "", "plain", 'a "b"\n\t"c', '"quoted"', "'", "x, y"]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_tables_of_csv_and_pandas(read: Any, tmp_path: Path, suffix: str, quoting: Any) -> None:
    rows = [{"text": text, "label": str(i)} for i, text in enumerate(AWKWARD)]
    delimiter = "\t" if suffix == ".tsv" else ","
    with (tmp_path / f"a{suffix}").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["text", "label"], delimiter=delimiter, quoting=quoting)
        table.writeheader()
        table.writerows(rows)
    pandas.DataFrame(rows).to_csv(tmp_path / f"b{suffix}", sep=delimiter, index=False, quoting=quoting)
    assert read(tmp_path / f"a{suffix}") == rows == read(tmp_path / f"b{suffix}")


def test_csv_fields_hold_line_breaks_and_long_documents(read: Any, tmp_path: Path) -> None:
    long = "word " * 40_000
    path = write(tmp_path / "t.csv", f'"first, name",b\n"two\nlines","{long}"\n')
    assert read(path) == [{"first, name": "two\nlines", "b": long}]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["t.txt", "t.TXT.gz"])
def test_paragraphs(read: Any, tmp_path: Path, name: str, streaming: bool) -> None:
    path = tmp_path / name
    content = "\ufeffOne\r\n  paragraph.\r\n   \r\n\r\nAnother.\n\t\nThe\nlast".encode()
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read(path, streaming) == [{"text": "One paragraph."}, {"text": "Another."}, {"text": "The last"}]


@pytest.mark.parametrize("gap", [50, 101])
def test_blank_lines_that_are_rare_divide_nothing(read: Any, tmp_path: Path, gap: int) -> None:
    lines = [f"line {i}" for i in range(gap)]
    path = write(tmp_path / "t.txt", "\n" + "\n".join(lines) + "\n\n \nlast\nline\n\n")
    texts = [" ".join(lines), "last line"] if gap == 50 else [*lines, "last", "line"]
    assert read(path) == [{"text": text} for text in texts]


def test_a_sentence_a_line(read: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "t.txt", "One  sentence.\r\nAnother.\n\n\n")
    assert read(path) == [{"text": "One sentence."}, {"text": "Another."}]


@pytest.mark.parametrize("between", [" ", "\n", "-"])
def test_texts_are_bounded(read: Any, tmp_path: Path, between: str) -> None:
    words = [f"word{i}" for i in range(30_000)]
    path = write(tmp_path / "t.txt", "A paragraph.\n\n" + between.join(words) + "\n\nA paragraph.\n" * 400)
    texts = [row["text"] for row in read(path)][1:-400]
    assert len(texts) > 3 and max(map(len, texts)) <= formats.LONGEST
    assert ("" if between == "-" else " ").join(texts) == between.join(words).replace("\n", " ")


def test_json_values_are_what_they_are(read: Any, tmp_path: Path) -> None:
    lines = [{"d": "2020-01-01", "n": 1}, {"d": "2021-01-01", "n": 2.5, "t": {"en": "a"}}, {"n": "x", "t": {"es": "b"}}]
    path = write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, lines)))
    assert read(path) == [{"d": None, "n": None, "t": None} | line for line in lines]


def test_json_columns_that_come_late(tmp_path: Path) -> None:
    lines = [{"a": "x"}] * 1500 + [{"a": "y", "late": 1}]
    rows = read_rows(str(write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, lines)))))
    assert rows.column_names == ["a"]  # of the first rows
    assert list(rows.with_all_columns())[-1] == {"a": "y", "late": 1}


def test_folders_and_globs_are_read_in_order(read: Any, tmp_path: Path) -> None:
    folder = tmp_path / "data [1]"
    for name, text in (("b.txt.gz", "second"), ("a.txt", "first"), (".hidden.txt", "no"), ("README.md", "no")):
        write(folder / name, text)
    expected = [{"text": "first"}, {"text": "second"}]
    assert read(folder) == expected == read(folder, streaming=True)
    write(tmp_path / "deep" / "er" / "c.csv", "x\n1\n")
    assert read(str(tmp_path / "d*" / "**" / "*.csv")) == [{"x": "1"}]
    assert read(folder / "a.txt") == expected[:1]  # brackets in a name that exists are no glob


def test_columns_may_change_their_order_between_files(read: Any, tmp_path: Path) -> None:
    write(tmp_path / "d" / "1.csv", "x,y\n1,2\n")
    write(tmp_path / "d" / "2.csv", "y,x\n4,3\n")
    assert read(tmp_path / "d") == [{"x": "1", "y": "2"}, {"x": "3", "y": "4"}]


def test_changed_files_are_read_anew(read: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "x\n1\n")
    assert read(path) == [{"x": "1"}]
    before = path.stat()
    write(path, "x\n2\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read(path) == [{"x": "2"}]


def test_class_labels_of_parquet_survive(tmp_path: Path) -> None:
    features = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_dict({"label": [1, 0]}, features=features).to_parquet(tmp_path / "t.parquet")
    rows = read_rows(str(tmp_path / "t.parquet"))
    assert rows.features["label"].names == ["no", "yes"] and list(rows) == [{"label": 1}, {"label": 0}]


def test_columns_that_nothing_reads_fail_no_file(read: Any, tmp_path: Path) -> None:
    columns = {
        "text": pa.array(["a", "b"]).dictionary_encode(),  # a category of pandas
        "price": pa.array([Decimal("1.50"), None]),
        "took": pa.array([1, 2], pa.duration("ns")),
        "deep": pa.array([[{"x": [1]}], []]),
        "map": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
        "raw": pa.array([b"\xff", b""]),
        "view": pa.array(["a", "b"], pa.string_view()),
        "large": pa.array(["a", "b"], pa.large_string()),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    mixed = '{"text": "a", "price": 1}\n{"text": "b", "price": {"n": 1}}\n{"text": "c", "price": [1, "x", "\\ud800"]}\n'
    for path, texts in (
        (tmp_path / "t.parquet", "ab"),
        (write(tmp_path / "t.jsonl", mixed), "abc"),
        (write(tmp_path / "t.json", json.dumps([json.loads(line) for line in mixed.splitlines()])), "abc"),
    ):
        for streaming in (False, True):
            assert read_rows(str(path)).features["text"] == datasets.Value("string")
            assert rows_of(path, ["text"], streaming) == [{"text": text} for text in texts]
    rows = read_rows(str(tmp_path / "t.parquet"))
    assert list(rows.select_columns(["view", "large"])) == [{"view": x, "large": x} for x in "ab"]
    assert rows.features["view"] == rows.features["large"] == datasets.Value("string")
    assert next(iter(read_rows(str(tmp_path / "t.parquet")).select_columns(["price"]))) == {"price": Decimal("1.50")}


def test_other_files_need_the_columns_that_are_read(tmp_path: Path) -> None:
    write(tmp_path / "d" / "1.csv", "x,y\n1,2\n")
    write(tmp_path / "d" / "2.csv", "z,x\n4,3\n")
    rows = read_rows(str(tmp_path / "d"))
    assert list(rows.select_columns(["x"])) == [{"x": "1"}, {"x": "3"}]
    with pytest.raises(InputError, match=r"2.csv lacks y, which .*it has the columns z, x"):
        list(rows)
    (tmp_path / "p").mkdir()
    parquet(tmp_path / "p" / "1.parquet", [{"a": 1, "b": 1}])
    parquet(tmp_path / "p" / "2.parquet", [{"a": "x"}])
    rows = read_rows(str(tmp_path / "p"))
    assert list(rows.select_columns(["a"])) == [{"a": 1}, {"a": "x"}]
    with pytest.raises(InputError, match=r"2.parquet lacks b"):
        list(rows)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_a_file_without_a_column_that_is_read_is_named(tmp_path: Path, suffix: str, streaming: bool) -> None:
    for name, rows in (("1", [{"source": "a", "target": "b"}]), ("2", [{"source": "c", "answer": "d"}] * 3)):
        frame = pandas.DataFrame(rows)
        path = tmp_path / "d" / f"{name}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        if suffix == "parquet":
            frame.to_parquet(path)
        elif suffix.startswith("json"):
            frame.to_json(path, orient="records", lines=suffix == "jsonl")
        else:
            frame.to_csv(path, sep="\t" if suffix == "tsv" else ",", index=False)
    message = rf"2.{suffix} lacks target, which another file has: it has the columns source, answer"
    with pytest.raises(InputError, match=message):
        rows_of(tmp_path / "d", ["source", "target"], streaming)


def test_a_stream_names_the_file_whose_columns_it_has(tmp_path: Path) -> None:
    write(tmp_path / "d" / "1.jsonl", '{"text": "a"}\n')
    write(tmp_path / "d" / "2.jsonl", '{"sentence": "b"}\n')
    rows = read_rows(str(tmp_path / "d"))
    with pytest.raises(InputError, match=r"no column 'sentence' \(columns: text\); .* its first file, .*1.jsonl$"):
        stream(TASKS["span_corruption"], rows, columns=Columns(text_column="sentence"))


def test_blocks_are_bounded_by_rows_and_characters() -> None:
    rows = [{"a": "x" * size, "b": "y"} for size in (1, 1, 1, sources.CHARACTERS, 5, sources.CHARACTERS // 2 + 1, 9, 9)]
    assert [len(block) for block in sources.blocks(rows)] == [4, 4]
    assert [len(block) for block in sources.blocks([{"a": ""}] * 2001)] == [1000, 1000, 1]
    assert list(sources.blocks([])) == []


@pytest.mark.parametrize(
    "encoding, found",
    [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE"), ("utf-32", "UTF-32")],
)
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv", ".jsonl", ".txt.gz"])
def test_other_encodings_are_named(tmp_path: Path, suffix: str, encoding: str, found: str) -> None:
    path = write(tmp_path / f"t{suffix}", "text,label\nA line.\n".encode(encoding))
    with pytest.raises(InputError, match=rf"not UTF-8 text: line 1.*; it is {found}, which iconv -f {found} -t UTF-8"):
        drain(path, False)


def in_parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["a"]}), sink)
    return sink.getvalue().to_pybytes()


def zipped() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("t.jsonl", '{"text": "a"}\n')
    return made.getvalue()


BINARY = {
    "gzip": (gzip.compress(b'{"text": "a"}\n'), r"no text but compressed by gzip: rename it, .* ends in \.gz$"),
    "xz": (lzma.compress(b'{"text": "a"}\n'), "no text but compressed by xz: give what xz -d makes of it"),
    "bzip2": (bz2.compress(b'{"text": "a"}\n'), "no text but compressed by bzip2: give what bzip2 -d makes"),
    "zstd": (b"(\xb5/\xfd\x04\x58\x71\x00", "no text but compressed by zstd: give what zstd -d makes of it"),
    "zip": (zipped(), "no text but a zip archive, or a spreadsheet: give the files that unzip makes"),
    "parquet": (in_parquet(), r"no text but Parquet: rename it, so that its name ends in \.parquet$"),
    "else": (pickle.dumps({"é": [1, 2]}), "is no text: line 1, byte 1 of it, does not decode, and .* control char"),
}


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".tsv", ".txt.gz"])
@pytest.mark.parametrize("kind", BINARY)
def test_what_is_no_text_is_named(tmp_path: Path, kind: str, suffix: str) -> None:
    content, message = BINARY[kind]
    path = write(tmp_path / f"t{suffix}", content)
    with pytest.raises(InputError, match=message):
        drain(path, False)


NOT_GZIP = b"plain text"
BAD = {
    "bad.jsonl": ('{"a": 1}\n\n{"a": }\n', "bad.jsonl, line 3: malformed JSON, expecting value"),
    "bad.jsonl.gz": ('{"a": 1}\n{"a"\n', "bad.jsonl.gz, line 2: malformed JSON"),
    "list.jsonl": ('{"a": 1}\n[1, 2]\n', r"list.jsonl, line 2: expected a JSON object, got \[1, 2\]"),
    "string.json": ('"a"\n', 'string.json, line 1: expected a JSON object, got "a"'),
    "array.json": ('[{"a": 1},\n{"a" 2}]\n', "array.json, line 2: malformed JSON"),
    "surrogate.jsonl": ('{"a": "x"}\n{"a": "\\ud800"}\n', "surrogate.jsonl, line 2: "),
    "huge.jsonl": ('{"a": 1}\n{"a": ' + "9" * 9999 + "}\n", "huge.jsonl, line 2: malformed JSON, exceeds the limit"),
    "latin.jsonl": (b'{"a": "x"}\n{"a": "\xe9"}\n', "latin.jsonl is not UTF-8 text: line 2, byte 8"),
    "latin.txt": (b"one\n\ncaf\xe9\n", "latin.txt is not UTF-8 text: line 3, byte 4.*iconv -f WINDOWS-1252"),
    "latin.csv.gz": (b"a\ncaf\xe9\n", "latin.csv.gz is not UTF-8 text: line 2"),
    "long.csv": ("a,b\n1,2\n1,2,3\n", "long.csv, line 3: expected 2 fields, got 3"),
    "first.csv": ("a,b\n1,2,3\n1,2,3\n", "first.csv, line 2: expected 2 fields, got 3"),
    "long.tsv": ("a\tb\n1\t2\n\n1\t2\t3\n", "long.tsv, line 4: expected 2 fields, got 3"),
    "quote.csv": ('a,b\n1,"2\n3,4\n', "quote.csv, line 3: unexpected end of data"),
    "twice.csv": ("a,b,a\n1,2,3\n", "twice.csv: two columns are named 'a'"),
    "none.csv": ("", "none.csv is empty: expected a first line"),
    "header.tsv": ("a\tb\n", "header.tsv is empty"),
    "none.jsonl": ("\n\n", "none.jsonl is empty"),
    "none.json": ("[]", "none.json is empty"),
    "objects.jsonl": ("{}\n{}\n", "objects.jsonl is empty"),
    "none.txt": (" \n\n \n", "none.txt is empty"),
    "bad.parquet": ("PAR1 no", "bad.parquet is no valid Parquet file"),
    "bad.parquet.gz": ("PAR1 no", "bad.parquet.gz is no valid Parquet file"),
    "data.xyz": ("a", r"data.xyz has an unknown suffix: expected .txt, .jsonl, .*also .gz"),
    "nosuffix": ("a", "nosuffix has an unknown suffix"),
}


def drain(where: Path | str, streaming: bool) -> None:
    rows_of(where, None, streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_one_line(tmp_path: Path, name: str, streaming: bool) -> None:
    content, message = BAD[name]
    write(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as error:
        drain(tmp_path / name, streaming)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_mistakes_far_into_a_file(tmp_path: Path, streaming: bool) -> None:
    path = write(tmp_path / "t.jsonl", '{"a": 1}\n' * 2500 + '{"a": }\n' + '{"a": 1}\n' * 2500)
    with pytest.raises(InputError, match=r"t.jsonl, line 2501: "):
        drain(path, streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_damaged_gzip(tmp_path: Path, suffix: str, streaming: bool) -> None:
    path = tmp_path / f"t{suffix}.gz"
    whole = gzip.compress(b"".join(b'{"a": "%d"}\n' % i for i in range(5000)))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"\.gz is truncated"):
        drain(path, streaming)
    path.write_bytes(NOT_GZIP)
    with pytest.raises(InputError, match=r"\.gz is no valid gzip file"):
        drain(path, streaming)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=str(path)):
        drain(path, streaming)


def test_places_without_data(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "both" / "a.csv", "a\n1\n")
    write(tmp_path / "both" / "b.jsonl", '{"a": 1}\n')
    cases = {
        "missing.csv": "no such file or folder",
        "*.csv": "no file matches",
        "empty": "holds no data files: expected .txt",
        "both": r"several formats \(csv, jsonl\)",
        "both/*": r"several formats \(csv, jsonl\)",
    }
    for where, message in cases.items():
        with pytest.raises(InputError, match=message):
            read_rows(str(tmp_path / where))


def test_digest_is_of_contents_and_suffixes(tmp_path: Path) -> None:
    one = write(tmp_path / "one.csv", "a\n1\n")
    digest = content_digest(str(one))
    assert digest == content_digest(str(write(tmp_path / "elsewhere" / "two.csv", "a\n1\n")))
    assert content_digest(str(tmp_path / "elsewhere")) == digest and len(digest) == 64
    assert content_digest(str(write(tmp_path / "one.tsv", "a\n1\n"))) != digest
    assert content_digest(str(write(tmp_path / "three.csv", "a\n2\n"))) != digest
    # The same bytes, divided into files in another way.
    write(tmp_path / "x" / "1.txt", "ab")
    write(tmp_path / "x" / "2.txt", "c")
    write(tmp_path / "y" / "1.txt", "a")
    write(tmp_path / "y" / "2.txt", "bc")
    assert content_digest(str(tmp_path / "x")) != content_digest(str(tmp_path / "y"))


def test_saved_folders(tmp_path: Path) -> None:
    train, test = (datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test"))
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "two")
    datasets.DatasetDict(only=test).save_to_disk(tmp_path / "three")
    cache = tmp_path / "cache"
    for streaming in (False, True):
        assert rows_of(tmp_path / "one", ["text"], streaming) == [{"text": "train"}]
        assert list(read_hub(str(tmp_path / "two"), None, "test", cache_dir=cache, streaming=streaming)) == [
            {"text": "test"}
        ]
    assert list(read_rows(str(tmp_path / "three"))) == [{"text": "test"}]
    assert content_digest(str(tmp_path / "one")) != content_digest(str(tmp_path / "two"))
    with pytest.raises(InputError, match="holds the splits train, test: choose by --dataset_name"):
        read_rows(str(tmp_path / "two"))
    with pytest.raises(InputError, match=r"no split 'dev' \(splits: train, test\)"):
        read_hub(str(tmp_path / "two"), None, "dev", cache_dir=cache)
    with pytest.raises(InputError, match="was not saved by datasets"):
        read_hub(str(tmp_path), None, "train", cache_dir=cache)
    train.save_to_disk(tmp_path / "empty")
    with ArrowWriter(features=train.features, path=str(next((tmp_path / "empty").glob("*.arrow")))) as writer:
        writer.finalize()
    with pytest.raises(InputError, match="empty is empty"):
        read_rows(str(tmp_path / "empty"))
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"cannot read .*one"):
        read_rows(str(tmp_path / "one"))
