"""Rows become T5's pairs, by tables written out by hand; GLUE's from files in the layout of its download."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value

from fastkd.train.common.errors import InputError
from fastkd.train.data import tasks
from fastkd.train.data.rows import sample, store, stream
from fastkd.train.data.tasks import TASKS, Columns, glue_files, glue_parts


def stored(task: str, rows: Any, **columns: str) -> tuple[Dataset, int]:
    """What `store` makes of rows for a task."""
    with tempfile.TemporaryDirectory() as folder:
        made, dropped = store([(TASKS[task], task, rows)], Path(folder, "rows"), columns=Columns(**columns))
        return Dataset.from_list(list(made), features=made.features), dropped


def read_glue(task: str, where: Path | str, split: str, cache: Path) -> tuple[Dataset, int]:
    cache.mkdir(exist_ok=True)
    parts = glue_parts(TASKS[task], str(where), split, cache_dir=cache)
    return store(parts, cache / f"{task}-{split}", columns=Columns())


def pairs_of(task: str, rows: list[dict[str, Any]], **columns: str) -> list[tuple[str, str]]:
    """The pairs of a Dataset, which must be those of a stream."""
    made, dropped = stored(task, Dataset.from_list(rows), **columns)
    streamed = stream(TASKS[task], IterableDataset.from_generator(lambda: iter(rows)), columns=Columns(**columns))
    assert list(streamed) == list(made) and dropped == len(rows) - len(made)
    assert set(made["task"]) == {task}
    return list(zip(made["source"], made["target"], strict=True))


def test_text2text() -> None:
    rows = [{"id": 1, "question": " 2 + 2 ", "answer": 4}, {"id": 2, "question": "Is it?", "answer": "yes"}]
    assert pairs_of("text2text", rows[:1]) == [("2 + 2", "4")]
    assert pairs_of("text2text", rows[1:], source_prefix="q: ") == [("q: Is it?", "yes")]
    rows = [{"x": "a", "y": "b", "text": "t"}]
    assert pairs_of("text2text", rows, source_column="y", target_column="x") == [("b", "a")]


def test_rows_without_a_side_are_dropped() -> None:
    rows = [{"source": s, "target": t} for s, t in [("a", "b"), ("", "b"), ("a", None), (" \n", "b"), ("c", "d")]]
    assert pairs_of("text2text", rows, source_prefix="p: ") == [("p: a", "b"), ("p: c", "d")]
    with pytest.raises(InputError, match="text2text: no row has both"):
        pairs_of("text2text", rows[1:4])
    with pytest.raises(InputError, match="text2text: no row has both"):
        pairs_of("text2text", [{"source": float("nan"), "target": "b"}])


def test_summarization() -> None:
    rows = [{"article": "Long.\nText.", "highlights": "Short."}]
    assert pairs_of("summarization", rows) == [("summarize: Long.\nText.", "Short.")]
    assert pairs_of("summarization", [{"text": "Long.", "summary": "S", "title": "T"}]) == [("summarize: Long.", "S")]
    assert pairs_of("summarization", rows, source_prefix="") == [("Long.\nText.", "Short.")]


def test_translation() -> None:
    nested = [{"translation": {"en": "Hello", "es": "Hola"}}, {"translation": {"en": "Bye", "es": None}}]
    expected = [("translate English to Spanish: Hello", "Hola")]
    assert pairs_of("translation", nested) == expected
    assert pairs_of("translation", nested, source_lang="es", target_lang="en") == [
        ("translate Spanish to English: Hola", "Hello")
    ]
    assert pairs_of("translation", nested, source_lang="English", target_lang="Spanish") == expected
    assert pairs_of("translation", [{"id": 1, "en": "Hello", "es": "Hola"}]) == expected
    assert pairs_of("translation", [{"en": "Hello", "es": "Hola"}], source_column="es") == [
        ("translate Spanish to English: Hola", "Hello")
    ]
    assert pairs_of("translation", [{"en": "Hello", "es": "Hola"}], target_column="en") == [
        ("translate Spanish to English: Hola", "Hello")
    ]
    assert (
        pairs_of("translation", [{"source": "Hello", "target": "Hola"}], source_lang="en", target_lang="es") == expected
    )
    assert pairs_of("translation", [{"source": "Hi", "target": "Nuqneh"}], source_lang="en", target_lang="Klingon") == [
        ("translate English to Klingon: Hi", "Nuqneh")
    ]
    assert pairs_of("translation", [{"source": "Hello", "target": "Hola"}], source_prefix="x: ") == [
        ("x: Hello", "Hola")
    ]
    three = [{"translation": {"en": "a", "de": "b", "fr": "c"}}]
    assert pairs_of("translation", three, source_lang="de", target_lang="fr") == [
        ("translate German to French: b", "c")
    ]
    with pytest.raises(InputError, match=r"expected --source_lang and --target_lang \(found de, en, fr\)"):
        pairs_of("translation", three)
    with pytest.raises(InputError, match=r"no en to es in the data \(languages: de, en, fr\)"):
        pairs_of("translation", three, source_lang="en", target_lang="es")
    with pytest.raises(InputError, match="expected --source_lang and --target_lang"):
        pairs_of("translation", [{"source": "Hello", "target": "Hola"}], source_lang="en")
    with pytest.raises(InputError, match="holds no texts by language"):
        pairs_of("translation", [{"translation": "Hello"}])


def test_the_hubs_translation_feature() -> None:
    features = Features({"translation": datasets.Translation(languages=["fr", "en"])})
    rows = Dataset.from_dict({"translation": [{"fr": "Oui", "en": "Yes"}]}, features=features)
    made, _ = stored("translation", rows)
    assert made[0]["source"] == "translate French to English: Oui" and made[0]["target"] == "Yes"


def test_classification() -> None:
    assert pairs_of("classification", [{"text": "Great.", "label": "good"}]) == [("Great.", "good")]
    assert pairs_of("classification", [{"sentence": "Great.", "label": 3}]) == [("Great.", "3")]
    features = Features({"review": Value("string"), "stars": ClassLabel(names=["bad", "good"])})
    rows = Dataset.from_dict({"review": ["a", "b", "c"], "stars": [1, 0, -1]}, features=features)
    made, dropped = stored("classification", rows, label_column="stars", source_prefix="c: ")
    assert made["target"][:] == ["good", "bad"] and made["source"][0] == "c: a" and dropped == 1


def test_absent_columns_are_named_with_those_that_exist() -> None:
    rows = [{"foo": "a", "bar": "b"}]
    with pytest.raises(InputError, match=r"no column for --source_column: .* got the columns foo, bar"):
        pairs_of("text2text", rows)
    with pytest.raises(InputError, match=r"--source_column: no column 'fo' \(columns: foo, bar\)"):
        pairs_of("summarization", rows, source_column="fo")
    with pytest.raises(InputError, match=r"no column for --sentence: expected sentence, got the columns foo, bar"):
        pairs_of("sst2", rows)
    with pytest.raises(InputError, match=r"column 'answer' holds a list, expected text"):
        pairs_of("text2text", [{"question": "a", "answer": ["b"]}])
    with pytest.raises(ValueError, match="expected one with rows of its own, got 'glue'"):
        pairs_of("glue", rows)


@pytest.mark.parametrize(
    "task, row, given, named",
    [
        ("text2text", "question answer", "source_column=question target_column=question", "question"),
        ("text2text", "question answer", "target_column=question", "question"),
        ("summarization", "document summary", "text_column=summary target_column=summary", "summary"),
        ("classification", "text label", "label_column=text", "text"),
        ("classification", "text label", "source_column=label target_column=label", "label"),
        ("translation", "a b", "source_lang=en target_lang=ro source_column=a target_column=a", "a"),
        ("translation", "en ro", "source_lang=en target_lang=en", "English"),
        ("translation", "en ro", "source_lang=en target_lang=English", "English"),
        ("translation", "en ro", "source_lang=en target_lang=en_XX", "en"),
    ],
)
def test_two_flags_that_come_to_the_same(task: str, row: str, given: str, named: str) -> None:
    """A model would learn to copy."""
    columns = dict(flag.split("=") for flag in given.split())
    with pytest.raises(
        InputError, match=rf"^--\w+ and --\w+: expected two (columns|languages), got '{named}' for both"
    ):
        pairs_of(task, [dict.fromkeys(row.split(), "ta")], **columns)


def test_a_language_twice_in_a_nested_column() -> None:
    with pytest.raises(
        InputError, match=r"^--source_lang and --target_lang: expected two languages, got 'en' for both"
    ):
        pairs_of("translation", [{"translation": {"en": "a", "ro": "b"}}], source_lang="en_XX", target_lang="en")


def test_a_text_of_glue_is_no_label() -> None:
    with pytest.raises(
        InputError, match="--label_column: expected another column than those of texts, got 'sentence2'"
    ):
        pairs_of("rte", [{"sentence1": "a", "sentence2": "b", "label": 0}], label_column="sentence2")


# T5's examples of its input format (Raffel et al., 2020, appendix D), with shorter sentences.
GLUE = {
    "sst2": [({"sentence": "it confirms", "label": 1, "idx": 0}, "sst2 sentence: it confirms", "positive")],
    "mrpc": [
        (
            {"sentence1": "We acted.", "sentence2": "I took it.", "label": 1},
            "mrpc sentence1: We acted. sentence2: I took it.",
            "equivalent",
        )
    ],
    "stsb": [
        (
            {"sentence1": "A", "sentence2": "B", "label": score},
            "stsb sentence1: A sentence2: B",
            text,
        )
        for score, text in zip((3.25, 3.75, 0.0, 2.2, 4.917), ("3.2", "3.8", "0.0", "2.2", "5.0"), strict=True)
    ],
    "qqp": [({"question1": "Q?", "question2": "R?", "label": 0}, "qqp question1: Q? question2: R?", "not_duplicate")],
    "mnli": [
        (
            {"premise": "yeah well", "hypothesis": "They won.", "label": 2},
            "mnli hypothesis: They won. premise: yeah well",
            "contradiction",
        )
    ],
    "qnli": [
        ({"question": "Why?", "sentence": "There.", "label": 0}, "qnli question: Why? sentence: There.", "entailment")
    ],
    "rte": [
        (
            {"sentence1": "S", "sentence2": "T", "label": 1},
            "rte sentence1: S sentence2: T",
            "not_entailment",
        )
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", GLUE)
def test_glue_of_the_hub(name: str) -> None:
    rows = [row for row, _, _ in GLUE[name]]
    unlabelled = {**rows[0], "label": -1 if name != "stsb" else -1.0}
    assert pairs_of(name, [*rows, unlabelled]) == [(source, target) for _, source, target in GLUE[name]]


def test_glue_labels_that_are_none_of_the_tasks() -> None:
    row = {"premise": "P", "hypothesis": "H"}
    words = [*("entailment", "neutral", "contradiction"), "0", "2.0", "-", "-1", None, ""]
    made = pairs_of("mnli", [{**row, "label": word} for word in words])
    assert [target for _, target in made] == ["entailment", "neutral", "contradiction", "entailment", "contradiction"]
    for label in ("3", "Neutral", "hidden", "²"):
        with pytest.raises(InputError, match=rf"mnli: unknown label '{label}' \(labels: entailment, neutral"):
            pairs_of("mnli", [{**row, "label": label}])
    for score in ("5.1", "-0.5", "high", "nan"):
        with pytest.raises(InputError, match="stsb: expected a score from 0 to 5"):
            pairs_of("stsb", [{"sentence1": "A", "sentence2": "B", "score": score}])


TABLES = {
    "SST-2": (["sentence", "label"], [["it 's \"fine", "1"], ["bad ", "0"], ["no label"]]),
    "MRPC": (["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], [["0", "10", "11", '"One', "Two"]]),
    "STS-B": (
        ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score"],
        [["0", "main", "f", "2012", "1", "none", "none", "A plane.", "An air plane.", "3.800"]],
    ),
    "QQP": (
        ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
        [["1", "2", "3", "Why?", "How?", "1"], ["4", "5", "6", "torn row"]],
    ),
    "QNLI": (["index", "question", "sentence", "label"], [["0", "When?", "Then.", "not_entailment"]]),
    "RTE": (["index", "sentence1", "sentence2", "label"], [["0", "No.", "Yes.", "entailment"]]),
}
MNLI = ["index", "promptID", "pairID", "genre", "sentence1", "sentence2", "label1", "gold_label"]


def mnli_rows(genre: str) -> list[list[str]]:
    return [["0", "1", "1e", genre, "P", "H", "x", "neutral"], ["1", "2", "2e", genre, "P2", "H2", "x", "-"]]


@pytest.fixture
def glue(tmp_path: Path) -> Path:
    """A folder with the layout of GLUE's download."""
    files = {f"{folder}/{name}.tsv": table for folder, table in TABLES.items() for name in ("train", "dev")}
    for name, genre in (("train", "telephone"), ("dev_matched", "fiction"), ("dev_mismatched", "letters")):
        files[f"MNLI/{name}.tsv"] = (MNLI, mnli_rows(genre))
    for name, (header, rows) in files.items():
        path = tmp_path / "glue" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join("\t".join(row) + "\n" for row in [header, *rows]), encoding="utf-8")
    return tmp_path / "glue"


def test_glue_files_give_the_eight_columns(glue: Path, tmp_path: Path) -> None:
    made, dropped = read_glue("glue", glue, "validation", tmp_path / "cache")
    assert [(row["task"], row["source"], row["target"]) for row in made] == [
        ("sst2", "sst2 sentence: it 's \"fine", "positive"),
        ("sst2", "sst2 sentence: bad", "negative"),
        ("mrpc", 'mrpc sentence1: "One sentence2: Two', "not_equivalent"),
        ("stsb", "stsb sentence1: A plane. sentence2: An air plane.", "3.8"),
        ("qqp", "qqp question1: Why? question2: How?", "duplicate"),
        ("mnli_matched", "mnli hypothesis: H premise: P", "neutral"),
        ("mnli_mismatched", "mnli hypothesis: H premise: P", "neutral"),
        ("qnli", "qnli question: When? sentence: Then.", "not_entailment"),
        ("rte", "rte sentence1: No. sentence2: Yes.", "entailment"),
    ]
    assert dropped == 4  # a label, a torn row, and "-" twice


def test_one_glue_task_in_its_own_folder(glue: Path, tmp_path: Path) -> None:
    for folder in (glue, glue / "MNLI"):
        made, dropped = read_glue("mnli", folder, "train", tmp_path / "cache")
        assert made["task"][:] == ["mnli"] and dropped == 1
    assert {k: v.name for k, v in glue_files("mnli", glue, "validation").items()} == {
        "mnli_matched": "dev_matched.tsv",
        "mnli_mismatched": "dev_mismatched.tsv",
    }


def test_the_expected_layout_is_said(glue: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lacks train.tsv of sst2: expected GLUE's layout, SST-2/train.tsv"):
        glue_files("sst2", tmp_path, "train")
    (glue / "MNLI" / "dev_mismatched.tsv").unlink()
    with pytest.raises(InputError, match=r"lacks dev_mismatched.tsv of mnli"):
        read_glue("glue", glue, "validation", tmp_path / "cache")


def test_glue_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def load(where: str, config: str, split: str, *, cache_dir: Path) -> Dataset:
        asked.append((where, config, split))
        return Dataset.from_list([row for row, _, _ in GLUE[config]])

    monkeypatch.setattr(tasks, "read_hub", load)
    made, _ = read_glue("glue", "nyu-mll/glue", "validation", tmp_path / "cache")
    assert ("nyu-mll/glue", "mnli", "validation_mismatched") in asked and ("nyu-mll/glue", "rte", "validation") in asked
    assert len(asked) == 8 and len(set(made["task"])) == 8
    asked.clear()
    read_glue("mnli", "nyu-mll/glue", "train", tmp_path / "cache")
    assert asked == [("nyu-mll/glue", "mnli", "train")]


@pytest.mark.parametrize("inside", [False, True])
def test_glue_saved_by_datasets(inside: bool, tmp_path: Path) -> None:
    rows = {name: Dataset.from_list([row for row, _, _ in GLUE[name]]) for name in GLUE}
    for name, made in rows.items():
        ends = ("_matched", "_mismatched") if name == "mnli" else ("",)
        splits = {"train": made, **{f"validation{end}": made for end in ends}}
        DatasetDict(splits).save_to_disk(str(tmp_path / name))
    where = tmp_path if inside else tmp_path / "sst2"
    made, _ = read_glue("sst2", where, "validation", tmp_path / "cache")
    assert [row["source"] for row in made] == [source for _, source, _ in GLUE["sst2"]]
    if inside:
        made, _ = read_glue("glue", where, "validation", tmp_path / "cache")
        assert len(set(made["task"])) == 8
    else:
        with pytest.raises(InputError, match=r"--task glue: .*sst2 holds one task's data: expected a folder with all"):
            read_glue("glue", where, "train", tmp_path / "cache")


def rows_of(*counts: tuple[str, str, int]) -> Dataset:
    """Rows of (task, target, how many), one after the other as in a sorted file."""
    every = [(task, target) for task, target, count in counts for _ in range(count)]
    return Dataset.from_list([{"source": str(i), "target": y, "task": x} for i, (x, y) in enumerate(every)])


def counted(rows: Dataset) -> dict[tuple[str, str], int]:
    return dict(Counter(zip(rows["task"], rows["target"], strict=True)))


def test_samples_have_every_task_and_class() -> None:
    rows = rows_of(("sst2", "negative", 300), ("sst2", "positive", 700), ("rte", "yes", 10), ("rte", "no", 10))
    assert counted(sample(rows, 40)) == {
        ("sst2", "negative"): 6, ("sst2", "positive"): 14, ("rte", "yes"): 10, ("rte", "no"): 10
    }  # fmt: skip
    assert set(counted(sample(rows, 4))) == set(counted(rows))
    assert counted(sample(rows, 900)) | {("sst2", "negative"): 264, ("sst2", "positive"): 616} == counted(
        sample(rows, 900)
    )
    assert sample(rows, 1020) is rows
    rare = rows_of(("c", "a", 990), ("c", "b", 10))
    assert counted(sample(rare, 5)) == {("c", "a"): 4, ("c", "b"): 1}


def test_samples_of_texts_are_random_and_the_same_every_time() -> None:
    rows = rows_of(*(("text2text", "yes" if i % 2 else f"answer {i}", 1) for i in range(2000)))
    for every in (rows, rows.remove_columns(["target", "task"])):
        made = sample(every, 400)
        numbers = [int(source) for source in made["source"]]
        assert len(set(numbers)) == 400 and 1200 > sum(numbers) / 400 > 800
        assert 150 < sum(number % 2 for number in numbers) < 250
        assert numbers == [int(source) for source in sample(every, 400)["source"]]


def test_the_column_of_texts() -> None:
    def texts(rows: list[dict[str, Any]], **columns: str) -> list[dict[str, Any]]:
        made = list(stored("span_corruption", Dataset.from_list(rows), **columns)[0])
        as_stream = IterableDataset.from_generator(lambda: iter(rows))
        assert made == list(stream(TASKS["span_corruption"], as_stream, columns=Columns(**columns)))
        return made

    assert texts([{"id": 1, "text": "a", "more": "b"}]) == [{"text": "a"}]
    assert texts([{"id": 1, "body": "a"}]) == [{"text": "a"}]
    assert texts([{"body": "a", "text": "b"}], text_column="body") == [{"text": "a"}]
    with pytest.raises(InputError, match="no column for --text_column: expected text, got the columns one, two"):
        texts([{"one": "a", "two": "b"}])
    with pytest.raises(InputError, match=r"--text_column: no column 'x' \(columns: text\)"):
        texts([{"text": "a"}], text_column="x")
    with pytest.raises(InputError, match=r"column 'id' holds no text \(columns of text: text\)"):
        texts([{"text": "a", "id": 1}], text_column="id")


def test_a_stream_without_rows() -> None:
    with pytest.raises(InputError, match="no rows: the data is empty"):
        stream(TASKS["text2text"], IterableDataset.from_generator(lambda: iter([])), columns=Columns())


def test_the_table_is_complete() -> None:
    assert all(name == task.name and task.summary for name, task in TASKS.items())
    assert set(TASKS["glue"].parts) == {"sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"} == set(GLUE)
