"""Files as people have them become the data they mean, in bounded memory, and are worked through once."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pandas
import pytest
from huggingface_hub import HfApi
from train_flags import SIZES, effective
from transformers import ByT5Tokenizer

from fastkd.train.common.errors import InputError, counted
from fastkd.train.data import corpus, formats, sources
from fastkd.train.data import encoding as data_module
from fastkd.train.data.encoding import tokenize
from fastkd.train.data.sources import read_rows
from fastkd.train.flags.arguments import parse
from fastkd.train.models.tokenizer import texts_of, train_tokenizer
from fastkd.train.stages import prepare, sides
from fastkd.train.stages.identity import identity
from fastkd.train.stages.prepare import Data, get_data

SYLLABLES = ["ta", "re", "mon", "sil", "ver", "ka", "lo", "phi", "der", "ing", "ous", "un"]


def make_texts(count: int) -> list[str]:
    return [" ".join(SYLLABLES[(i // 12**k + k) % 12] for k in range(6)) for i in range(count)]


@pytest.fixture
def get(tokenizer: Any, tmp_path: Path) -> Callable[..., Data]:
    """get(flag, value, ...): the data that these flags ask for; every call shares a cache."""

    def made(*flags: Any, tokenizer: Any = tokenizer) -> Data:
        words = ["--method", "scratch", "--sequence_length", 32, *flags]
        if "--streaming" in flags:
            words += ["--student", "not loaded"]
        else:
            words += [*SIZES, "--vocabulary_size", 512]
        return get_data(parse(effective(*words))[0], tmp_path / "cache", 0, tokenizer)

    return made


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def classified(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows sorted by their class, as many files are."""
    return [{"text": text, "label": "ba" if i < count // 2 else "bo"} for i, text in enumerate(make_texts(count))]


# Texts -----------------------------------------------------------------------------------------------------------


def test_a_sentence_a_line_trains(get: Callable[..., Data], texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\n".join(texts), encoding="utf-8")
    facts = get("--train_file", tmp_path / "t.txt").facts
    assert facts["training_examples"] + facts["held_out_examples"] == len(texts)
    assert 5 < facts["held_out_examples"] < 40


@pytest.mark.parametrize("count", [2, 7, 30])
def test_something_is_held_out_of_few_texts(get: Callable[..., Data], tmp_path: Path, count: int) -> None:
    path = lines(tmp_path / "t.jsonl", classified(count))
    made = get("--task", "text2text", "--source_column", "text", "--target_column", "label", "--train_file", path)
    assert len(made.train) + len(made.held_out) == count and 1 <= len(made.held_out) < 5
    sources = made.train.rows["source"][:] + made.held_out_rows["source"][:]
    assert sorted(sources) == sorted(make_texts(count))


@pytest.mark.parametrize("other", [0, 1])
def test_equal_texts_are_on_one_side(get: Callable[..., Data], tmp_path: Path, other: int) -> None:
    """Also where no text is of the 5 %, or where all are."""
    texts = sorted(make_texts(400), key=corpus.is_held_out, reverse=bool(other))[:2]
    assert [corpus.is_held_out(text) for text in texts] == [bool(other)] * 2
    path = lines(tmp_path / "t.jsonl", [{"source": text, "target": "ta"} for text in texts * 5])
    made = get("--task", "text2text", "--train_file", path)
    sides = [Counter(rows["source"]) for rows in (made.train.rows, made.held_out_rows)]
    assert sides in ([{texts[0]: 5}, {texts[1]: 5}], [{texts[1]: 5}, {texts[0]: 5}])


def test_of_one_text_nothing_is_held_out(get: Callable[..., Data], tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", [{"source": "ta", "target": "re"}] * 40)
    with pytest.raises(InputError, match=r"expected at least 2 different texts, got 1 in 40 rows: give --eval_file"):
        get("--task", "text2text", "--train_file", path)


def test_held_out_data_that_is_the_training_data(
    get: Callable[..., Data], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": text} for text in make_texts(60)]
    train, part = (lines(tmp_path / f"{n}.jsonl", rows[n:]) for n in (0, 1))
    copy = lines(tmp_path / "copy.jsonl", rows)
    for flags, expected in (
        (["--eval_file", train], True),
        (["--eval_file", copy], True),
        (["--eval_file", copy, "--streaming", "--max_steps", 1], False),  # nobody reads all of a stream before
        (["--eval_file", train, "--streaming", "--max_steps", 1], True),
        (["--eval_file", part], False),
    ):
        get("--train_file", train, *flags)
        warned = (
            "warning: --eval_file is the training data: figures tell what was learnt by heart"
            in capsys.readouterr().err
        )
        assert warned == expected, flags


@pytest.mark.parametrize("between", ["\n", " "])
def test_reading_takes_no_more_memory_for_larger_files(tmp_path: Path, between: str) -> None:
    sentence = " ".join(f"word{i}" for i in range(20))
    (tmp_path / "t.txt").write_text(between.join([sentence] * 40_000), encoding="utf-8")  # 6 MB
    rows = iter(read_rows(str(tmp_path / "t.txt")))
    next(rows)  # a file of one line is in memory as such
    tracemalloc.start()
    count = sum(1 for _ in rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 100 and peak < 1 << 20


def test_texts_that_are_missing_are_left_out(
    get: Callable[..., Data], texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": text} for text in texts] + [{"text": None}, {"text": " "}, {"other": 1}]
    facts = get("--train_file", lines(tmp_path / "t.jsonl", rows)).facts
    assert facts["training_examples"] + facts["held_out_examples"] == len(texts)
    assert "train: 3 rows without a text left out" in capsys.readouterr().out
    get("--train_file", lines(tmp_path / "one.jsonl", rows[:-2]))
    assert "train: 1 row without a text left out" in capsys.readouterr().out


def test_one_is_singular() -> None:
    assert [counted(n, "held out sources cut") for n in (1, 0, 2000)] == [
        "1 held out source cut", "0 held out sources cut", "2,000 held out sources cut"
    ]  # fmt: skip


# Columns ---------------------------------------------------------------------------------------------------------


def test_columns_that_nothing_reads(get: Callable[..., Data], tmp_path: Path) -> None:
    rows = classified(60)
    mixed = [{**row, "price": i if i % 2 else {"n": [i]}, "late": "x"} for i, row in enumerate(rows)]
    table = pandas.DataFrame(rows).assign(took=pandas.to_timedelta(range(60), unit="s"))
    table["label"] = table["label"].astype("category")
    table.to_parquet(tmp_path / "t.parquet")
    made = [
        get("--task", "classification", "--train_file", path)
        for path in (lines(tmp_path / "t.jsonl", mixed), tmp_path / "t.parquet")
    ]
    for each in made:
        pairs = Counter(zip(each.train.rows["source"], each.train.rows["target"], strict=True))
        pairs += Counter(zip(each.held_out_rows["source"], each.held_out_rows["target"], strict=True))
        assert pairs == Counter((row["text"], row["label"]) for row in rows)


def test_values_of_one_column_may_differ_in_kind(get: Callable[..., Data], tmp_path: Path) -> None:
    rows = [{"question": text, "answer": (1, 2.5, "ta", True)[i % 4]} for i, text in enumerate(make_texts(40))]
    rows += [{"answer": "re", "question": "mon"}]
    path = lines(tmp_path / "t.jsonl", rows)
    made = get("--task", "text2text", "--train_file", path, "--eval_file", path)
    assert set(made.held_out_rows["target"]) == {"1", "2.5", "ta", "True", "re"}


def test_a_column_that_comes_late(get: Callable[..., Data], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "JUDGED_ROWS", 5)
    rows = [{"text": text} for text in make_texts(20)] + [{"text": text, "kind": text[:2]} for text in make_texts(4)]
    path = lines(tmp_path / "t.jsonl", rows)
    flags = ["--task", "classification", "--train_file", path, "--eval_file", path]
    assert len(get(*flags, "--label_column", "kind").held_out) == 4
    with pytest.raises(InputError, match=r"--train_file: --label_column: no column 'none' \(columns: text, kind\)"):
        get(*flags, "--label_column", "none")


def test_a_translation_without_languages_says_which_way_it_goes(
    get: Callable[..., Data], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = make_texts(60)
    path = lines(tmp_path / "t.jsonl", [{"es": text, "en": text[:9]} for text in texts])
    turned = lines(tmp_path / "e.jsonl", [{"en": text[:9], "es": text} for text in texts[:9]])
    flags = ["--task", "translation", "--train_file", path]
    for _ in range(2):  # also where the data is in the cache
        made = get(*flags)
        assert (made.facts["source_lang"], made.facts["target_lang"]) == ("es", "en")
        said = "from es to en, by the columns: --source_lang and --target_lang say otherwise"
        assert said in capsys.readouterr().out.splitlines()
    ours, args = parse(effective("--method", "scratch", *SIZES, *flags))
    run = SimpleNamespace(flags=ours, args=args, data=made, given=SimpleNamespace(digests={}))
    assert (identity(run)["source_lang"], identity(run)["target_lang"]) == ("es", "en")  # of run.json
    with pytest.raises(InputError, match="translation: es to en in --train_file, but en to es in --eval_file: give"):
        get(*flags, "--eval_file", turned)
    made = get(*flags, "--eval_file", turned, "--source_lang", "en", "--target_lang", "es")
    assert made.held_out_rows["target"][:2] == texts[:2] and "source_lang" not in made.facts  # but in the flags
    assert "by the columns" not in capsys.readouterr().out


def test_what_a_model_that_writes_is_to_classify_has_classes(get: Callable[..., Data], tmp_path: Path) -> None:
    few, letters = make_texts(9), str.maketrans("0123456789", "taremonsvk")  # which the tokenizer knows
    for count, classes, expected in (
        (60, 1, "a classifier: expected at least 2 different targets, got 't' alone"),
        (300, 300, "held-out data: expected targets among the classes .*, got only "),
        (1200, 1200, "a classifier: expected at most 1000 different targets, got 11"),
    ):
        named = [str(i % classes).translate(letters) for i in range(count)]
        rows = [{"text": f"{few[i % 9]} {i}", "label": name} for i, name in enumerate(named)]
        with pytest.raises(InputError, match=expected):
            get("--task", "classification", "--train_file", lines(tmp_path / "t.jsonl", rows))


# Samples ---------------------------------------------------------------------------------------------------------


def test_samples_are_not_the_first_rows(get: Callable[..., Data], tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", classified(200))
    flags = ["--task", "classification", "--train_file", path, "--eval_file", path]
    made = get(*flags, "--max_train_examples", 20, "--max_eval_examples", 4)
    assert Counter(made.train.rows["target"]) == {"ba": 10, "bo": 10}
    assert Counter(made.held_out_rows["target"]) == {"ba": 2, "bo": 2}
    assert get(*flags, "--max_train_examples", 20).train.rows["source"][:] == made.train.rows["source"][:]
    stream = get(*flags, "--streaming", "--max_steps", 1, "--max_train_examples", 3).train
    assert len({tuple(item["input_ids"].tolist()) for item in islice(stream, 9)}) == 3  # the first, as help says


# What a tokenizer cannot write -----------------------------------------------------------------------------------

NAMES = "a </s> b <pad> <extra_id_0> c</s>"


@pytest.mark.parametrize("kind", ["unigram", "bytes"])
def test_names_of_special_tokens_are_text(kind: str) -> None:
    known = train_tokenizer([f"{NAMES.replace('<', '< ')} {text}" for text in make_texts(40)], 512)
    tokenizer = known if kind == "unigram" else ByT5Tokenizer()
    for text in (NAMES, "</s>", "<pad>x", "<extra_id_0> <pad>"):
        ids = tokenize(tokenizer, ["a", text])[1]
        assert not {tokenizer.pad_token_id, tokenizer.eos_token_id}.intersection(ids)
        assert texts_of(tokenizer, [[*ids, tokenizer.eos_token_id]], ()) == [text]


def test_streams_of_the_hub_and_of_glue(
    get: Callable[..., Data], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = datasets.Dataset.from_list([{"text": text} for text in make_texts(40)]).to_iterable_dataset()
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: SimpleNamespace(hash="one"))
    flags = ["--streaming", "--max_steps", 1, "--eval_file", text_file]
    assert len(list(islice(get(*flags, "--dataset_name", "someone/words").train, 3))) == 3
    with pytest.raises(InputError, match="--streaming has no effect with --task sst2"):
        get(*flags, "--dataset_name", "nyu-mll/glue", "--task", "sst2")


def test_special_tokens_of_the_user_are_tokens() -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0, additional_special_tokens=["<sep>"])
    assert tokenizer.convert_tokens_to_ids("<sep>") in tokenize(tokenizer, ["a<sep>b"])[0]
    assert tokenizer.eos_token_id not in tokenize(tokenizer, ["a</s>b"])[0]


def test_a_tokenizer_of_texts_with_names_can_write_them(get: Callable[..., Data], tmp_path: Path) -> None:
    rows = [{"source": text, "target": f"{text.split()[0]} </s> <pad> <extra_id_7>"} for text in make_texts(80)]
    made = get("--task", "text2text", "--train_file", lines(tmp_path / "t.jsonl", rows), tokenizer=None)
    ids = made.train.rows["labels"][:]
    assert all(row.count(made.tokenizer.eos_token_id) == 1 and made.tokenizer.pad_token_id not in row for row in ids)
    assert texts_of(made.tokenizer, ids, ()) == made.train.rows["target"][:]


def test_vocabularies_are_trained_on_a_part_of_large_data(
    get: Callable[..., Data], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"{text} {'x' if i % 2 else 'z'}"} for i, text in enumerate(make_texts(400))]
    path, seen = lines(tmp_path / "t.jsonl", rows), []
    monkeypatch.setattr(
        prepare, "train_tokenizer", lambda texts, size: seen.extend(texts) or train_tokenizer(seen, size)
    )
    monkeypatch.setattr(prepare, "VOCABULARY_BYTES", 5000)
    get("--train_file", path, "--eval_file", path, tokenizer=None)
    texts = [text for text in seen if text]
    assert len(texts) == 134 and {text[-1] for text in texts} == {"x", "z"}


def test_targets_that_no_output_can_equal_are_counted(
    get: Callable[..., Data], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = ["ta re", "ta\nre", "ta {", "ta  re", "ta re ", "mon"] * 4
    rows = [{"source": f"sil {i}", "target": target} for i, target in enumerate(targets)]
    path = lines(tmp_path / "t.jsonl", rows)
    for _ in range(2):  # the second time from the cache
        get("--task", "text2text", "--train_file", path, "--eval_file", lines(tmp_path / "e.jsonl", rows[:1]))
        printed = capsys.readouterr().err.splitlines()
        warnings = [line for line in printed if line.startswith("warning: ")]
        assert len(warnings) == 1 and "12 of 24 training targets" in warnings[0]
        assert "the first is 'ta\\nre', which becomes 'ta re'" in warnings[0]


# Work that is done once ------------------------------------------------------------------------------------------


def counting(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Any]:
    """The first arguments of the calls of a function from now on."""
    calls, function = [], getattr(module, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0])
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return calls


def test_a_file_is_hashed_and_parsed_once(
    get: Callable[..., Data], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lines(tmp_path / "t.jsonl", classified(2100))
    flags = ["--task", "classification", "--train_file", path]
    hashed, parsed = counting(monkeypatch, sides, "content_digest"), counting(monkeypatch, formats.json, "loads")
    tokenised = counting(monkeypatch, data_module, "tokenize")
    first = get(*flags)
    assert hashed == [str(path)]
    assert sum('"label"' in str(line) for line in parsed) == 2100 + formats.JUDGED_ROWS  # whose columns are looked at
    parsed.clear()
    tokenised.clear()
    fewer = get(*flags, "--max_eval_examples", 9)
    assert not any('"label"' in str(line) for line in parsed) and len(fewer.held_out) == 9
    assert len(tokenised) == 2  # the sources and targets of nine held-out rows
    assert fewer.train.rows["input_ids"][:] == first.train.rows["input_ids"][:]
    assert fewer.digest != first.digest


def test_other_revisions_of_the_hub_are_read_anew(get: Callable[..., Data], monkeypatch: pytest.MonkeyPatch) -> None:
    revision = ["one"]

    def load(name: str, config: str | None, *, split: str, **options: Any) -> datasets.Dataset:
        return datasets.Dataset.from_list(
            [{"text": f"{revision[0]} {split} {i}", "label": "xy"[i % 2]} for i in range(9)]
        )

    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: SimpleNamespace(hash=revision[0]))
    flags = ["--task", "classification", "--dataset_name", "someone/words"]
    first = get(*flags)
    assert first.train.rows["source"][0] == "one train 0" and first.held_out_rows["source"][0] == "one validation 0"
    revision[0] = "two"
    second = get(*flags)
    assert second.train.rows["source"][0] == "two train 0" and second.digest != first.digest


# GLUE, and what cannot be read -----------------------------------------------------------------------------------

SST2 = [{"sentence": text, "label": i % 2} for i, text in enumerate(make_texts(60))]


def test_a_task_of_glue_from_a_file(get: Callable[..., Data], tmp_path: Path) -> None:
    table = pandas.DataFrame(SST2)
    table.to_csv(tmp_path / "t.tsv", sep="\t", index=False)
    flags = ["--task", "sst2", "--train_file", lines(tmp_path / "t.jsonl", SST2)]
    made = get(*flags)
    assert len(made.train) + len(made.held_out) == 60 and made.held_out_rows["source"][0].startswith("sst2 sentence: ")
    made = get(*flags, "--eval_file", tmp_path / "t.tsv")
    assert (len(made.train), len(made.held_out)) == (60, 60)
    assert Counter(made.held_out_rows["target"]) == {"negative": 30, "positive": 30}


@pytest.mark.parametrize("flag", ["--train_file", "--dataset_name"])
def test_a_task_of_glue_saved_by_datasets(get: Callable[..., Data], tmp_path: Path, flag: str) -> None:
    splits = {"train": SST2[:50], "validation": SST2[50:], "test": [{"sentence": "ta", "label": -1}]}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    saved.save_to_disk(str(tmp_path / "sst2"))
    made = get("--task", "sst2", flag, tmp_path / "sst2")
    assert (len(made.train), len(made.held_out)) == (50, 10)


def test_what_glue_needs_is_said(get: Callable[..., Data], tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", SST2)
    with pytest.raises(
        InputError, match=r"--train_file: --task glue: .*t.jsonl holds one task's data: expected a fold"
    ):
        get("--task", "glue", "--train_file", path)
    with pytest.raises(InputError, match=r"--train_file: .* lacks train.tsv of sst2: expected GLUE's layout, SST-2/tr"):
        get("--task", "glue", "--train_file", tmp_path)


def test_errors_name_the_flag_the_file_and_its_encoding(
    get: Callable[..., Data], text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_bytes("ta re mon".encode("utf-16"))
    with pytest.raises(InputError, match=rf"^--eval_file: {tmp_path / 't.txt'} is not UTF-8 text: .* it is UTF-16, wh"):
        get("--train_file", text_file, "--eval_file", tmp_path / "t.txt")
    with pytest.raises(InputError, match=rf"^--train_file: cannot read {tmp_path / 'none.txt'}: no such file"):
        get("--train_file", tmp_path / "none.txt")


def test_rows_of_many_characters_are_worked_on_in_small_blocks(
    get: Callable[..., Data], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CHARACTERS", 500)
    rows = [{"source": "ta " * 100, "target": "re"} for _ in range(40)]
    path = lines(tmp_path / "t.jsonl", rows)
    blocks = counting(monkeypatch, data_module, "tokenize")
    made = get("--task", "text2text", "--train_file", path, "--eval_file", path, "--max_source_length", 8)
    assert len(made.train) == 40 and len(blocks) == 2 * 2 * 20
