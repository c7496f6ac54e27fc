"""What runs of every family make of files: GLUE as two sentences, classes by name, chats, lengths that models take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from train_flags import effective

from fastkd.train.common.errors import InputError
from fastkd.train.data.tasks import TASKS, matched
from fastkd.train.flags.arguments import parse
from fastkd.train.stages import prepare, students
from fastkd.train.stages.prepare import Data, get_data, with_classes

FIRST, SECOND = "A bus is leaving the old station.", "Nobody knows why."


@pytest.fixture
def get(tmp_path: Path) -> Callable[..., Data]:
    """get(model_type, kind, rows or folder, flag, value, ..., tokenizer=...): the data that a run of that model reads.

    changes: of its config.
    """

    def made(model_type: str, kind: str, rows: Any, *flags: Any, tokenizer: Any = None, **changes: Any) -> Data:
        path = rows
        if isinstance(rows, list):
            path = tmp_path / "rows.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        words = ["--method", "scratch", "--student", "known", "--train_file", path, "--eval_file", path, *flags]
        config = families.config(model_type, **{**families.fitting(model_type), **changes})
        parsed = parse(effective(*words))[0]
        return get_data(parsed, tmp_path / "cache", 0, tokenizer or families.tokenizer(model_type), kind, [config])

    return made


def shown(data: Data, index: int = 0) -> str:
    """What an example holds, as text."""
    return str(data.tokenizer.decode(data.train[index]["input_ids"]))


# Pairs ---------------------------------------------------------------------------------------------------------------

TRANSLATED = [{"translation": {"en": FIRST, "de": "Ein Brief."}}] * 3
SUMMARISED = [{"document": FIRST, "summary": "A bus."}] * 3
LANGUAGES = ["--task", "translation", "--source_lang", "English", "--target_lang", "de"]


def test_prefixes_are_t5s_alone(get: Callable[..., Data]) -> None:
    assert shown(get("t5", "seq2seq", TRANSLATED, *LANGUAGES)).startswith("translate English to German: A bus")
    for model_type, framed in (("marian", f"{FIRST}</s>"), ("mbart", f"{FIRST}</s>en_XX"), ("gpt2", f"{FIRST}\n")):
        kind = "causal" if model_type == "gpt2" else "seq2seq"
        tokenizer = families.new_tokenizer(model_type)
        data = get(model_type, kind, TRANSLATED, *LANGUAGES, tokenizer=tokenizer)
        assert shown(data).startswith(framed)
        end = {"marian": "Brief.</s>", "mbart": "Brief.</s>de_DE", "gpt2": "Brief.<|endoftext|>"}[model_type]
        assert data.tokenizer.decode([y for y in data.train[0]["labels"].tolist() if y >= 0]).endswith(end)
    summary = ["--task", "summarization"]
    assert shown(get("t5", "seq2seq", SUMMARISED, *summary)).startswith("summarize: A bus")
    assert shown(get("bart", "seq2seq", SUMMARISED, *summary)) == f"<s>{FIRST}</s>"
    prefixed = get("bart", "seq2seq", SUMMARISED, *summary, "--source_prefix", "In short: ")
    assert shown(prefixed) == f"<s>In short: {FIRST}</s>"


def test_prompts_are_as_the_data_says_and_what_is_judged_reads_them_alone(get: Callable[..., Data]) -> None:
    rows = [{"prompt": "In summer the days are", "completion": " long."}] * 3
    data = get("gpt2", "causal", rows, "--task", "text2text")
    assert shown(data) == "In summer the days are long.<|endoftext|>"
    assert data.tokenizer.decode(data.held_out_rows["input_ids"][0]) == "In summer the days are"
    assert data.target_tokens == len(data.held_out_rows["labels"][0])
    labels = data.train.answers(data.tokenizer, [" long."])
    assert labels == data.held_out_rows["labels"][:1]


def test_texts_of_every_kind(get: Callable[..., Data]) -> None:
    rows = [{"text": text} for text in families.TEXTS * 2]
    for model_type, kind, task in (("bert", "masked", "masked_lm"), ("llama", "causal", "causal_lm")):
        data = get(model_type, kind, rows, "--task", task, "--sequence_length", 24)
        batch = data.collate([data.train[i] for i in range(4)])
        assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (4, 24)
        model = families.model(model_type, kind, **families.fitting(model_type))
        assert model(**batch).loss.isfinite()
        again = get(model_type, kind, rows, "--task", task, "--sequence_length", 24)
        assert torch.equal(data.held_out[1]["labels"], again.held_out[1]["labels"])
        assert not torch.equal(data.with_seed(9).train[0]["labels"], data.train[0]["labels"]) or task == "causal_lm"
        source, target = data.held_out_rows["source"][0], data.held_out_rows["target"][0]
        assert ("[MASK]" in source and "[MASK]" not in target) or task == "causal_lm"
        assert len(data.held_out_rows["input_ids"][0]) == (24 if task == "masked_lm" else 12)
    with pytest.raises(InputError, match="chunks of 24 tokens need 1 sentinels; the tokenizer has fewer, or none"):
        get("bart", "seq2seq", rows, "--sequence_length", 24)


def test_lengths_are_those_that_there_are_positions_for(get: Callable[..., Data]) -> None:
    rows = [{"source": FIRST * 6, "target": SECOND}] * 3
    text2text = ["--task", "text2text", "--max_target_length", 20]
    data = get("gpt2", "causal", rows, *text2text)
    assert len(data.train[0]["input_ids"]) == 64 - 20 + len(data.held_out_rows["labels"][0])
    assert len(get("bart", "seq2seq", rows, *text2text).train[0]["input_ids"]) == 64
    assert len(get("t5", "seq2seq", rows, *text2text).train[0]["input_ids"]) > 64
    with pytest.raises(
        InputError, match=r"expected at most 64 tokens together, for which there are positions, got 60 a"
    ):
        get("gpt2", "causal", rows, *text2text, "--max_source_length", 60)
    with pytest.raises(
        InputError, match="length: expected at most 64 tokens, for which there are positions, got 65 and"
    ):
        get("bart", "seq2seq", rows, *text2text, "--max_source_length", 65)
    texts = [{"text": FIRST * 20}] * 3
    for length in (64, 65):  # RoBERTa's first two of 66 are padding's
        flags = ["--task", "masked_lm", "--sequence_length", length]
        if length == 64:
            model = families.model("roberta", **families.fitting("roberta"))
            item = get("roberta", "masked", texts, *flags).train[0]
            assert model(**{name: ids[None] for name, ids in item.items()}).loss.isfinite()
        else:
            with pytest.raises(InputError, match="--sequence_length: expected at most 64 tokens, for which"):
                get("roberta", "masked", texts, *flags)
    with pytest.raises(InputError, match="--max_source_length and --max_target_length: limit: expected at least 3"):
        get("bart", "seq2seq", rows, "--task", "text2text", "--max_target_length", 2)


# Chats ---------------------------------------------------------------------------------------------------------------


def chat(*turns: str, last: str = "assistant") -> list[dict[str, Any]]:
    roles = [*("system", "user", "assistant", "user")[: len(turns) - 1], last]
    return [{"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]}] * 3


def test_chats_are_written_by_the_template(get: Callable[..., Data]) -> None:
    data = get("qwen2", "causal", chat("Be kind.", "Why?", "Because.", "A bus?", "At nine."), "--task", "chat")
    before = "".join(
        f"<|im_start|>{role}\n{text}<|im_end|>\n"
        for role, text in (("system", "Be kind."), ("user", "Why?"), ("assistant", "Because."), ("user", "A bus?"))
    )
    item, tokenizer = data.train[0], data.tokenizer
    assert tokenizer.decode(item["input_ids"]) == f"{before}<|im_start|>assistant\nAt nine.<|im_end|>\n"
    learnt = item["labels"] != -100
    assert tokenizer.decode(item["labels"][learnt]) == "At nine.<|im_end|>\n"
    assert torch.equal(item["labels"][learnt], item["input_ids"][learnt])
    assert data.held_out_rows["source"][0] == f"{before}<|im_start|>assistant\n"
    assert data.held_out_rows["target"][0] == "At nine."
    own = tokenizer.apply_chat_template(chat("Be kind.", "Why?", "Because.", "A bus?", "At nine.")[0]["messages"])
    assert item["input_ids"].tolist() == (own if isinstance(own, list) else own["input_ids"])


def test_chats_that_cannot_be_learnt(get: Callable[..., Data], tmp_path: Path) -> None:
    good = chat("Be kind.", "Why?", "Because.")
    cases: list[tuple[str, Any, str]] = [
        ("gpt2", good, "--task chat: the tokenizer has no chat template: expected a model that is made for chats"),
        (
            "qwen2",
            chat("Be kind.", "Why?", last="user"),
            "expected the last turn to be the assistant's, behind another, g",
        ),
        (
            "qwen2",
            chat("Because."),
            "expected the last turn to be the assistant's, behind another, got the roles assis",
        ),
        (
            "qwen2",
            [{"messages": "Why?"}] * 3,
            r"column 'messages': expected a list of \{role, content\}, got 'Why\?'|exp",
        ),
        ("qwen2", [{"messages": [{"role": "user"}]}] * 3, r"expected a list of \{role, content\}, got"),
        (
            "qwen2",
            [{"messages": [{"role": "tool", "content": "1"}, {"role": "assistant", "content": "2"}]}] * 3,
            "--task chat: the chat template refuses tool, assistant: unknown role tool",
        ),
    ]
    for model_type, rows, message in cases:
        with pytest.raises(InputError, match=message):
            get(model_type, "causal", rows, "--task", "chat")
    changing = families.new_tokenizer("qwen2")
    changing.chat_template = "{{ messages|length }}{{ messages[0].content }}"
    with pytest.raises(InputError, match="what the chat template makes of all turns does not begin with what"):
        get("qwen2", "causal", good, "--task", "chat", tokenizer=changing)


# Classes -------------------------------------------------------------------------------------------------------------

GLUE = {  # of each task two rows, and what an encoder reads of the first one
    "sst2": ("SST-2", "sentence\tlabel", [f"{FIRST}\t1", f"{SECOND}\t0"], (FIRST, "")),
    "mrpc": ("MRPC", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", [f"1\t1\t2\t{FIRST}\t{SECOND}", "0\t1\t2\tWhy\tA"],
             (FIRST, SECOND)),
    "stsb": ("STS-B", "index\tsentence1\tsentence2\tscore", [f"0\t{FIRST}\t{SECOND}\t3.75", "1\tWhy\tA\t1.0"],
             (FIRST, SECOND)),
    "qqp": ("QQP", "id\tquestion1\tquestion2\tis_duplicate", [f"0\t{FIRST}\t{SECOND}\t1", "1\tWhy\tA\t0"],
            (FIRST, SECOND)),
    "mnli": ("MNLI", "index\tsentence1\tsentence2\tgold_label", [f"0\t{FIRST}\t{SECOND}\tneutral",
             "1\tWhy\tA\tcontradiction", "2\tA\tA\tentailment"], (FIRST, SECOND)),
    "qnli": ("QNLI", "index\tquestion\tsentence\tlabel", [f"0\t{FIRST}\t{SECOND}\tentailment",
             "1\tWhy\tA\tnot_entailment"], (FIRST, SECOND)),
    "rte": ("RTE", "index\tsentence1\tsentence2\tlabel", [f"0\t{FIRST}\t{SECOND}\tentailment",
            "1\tWhy\tA\tnot_entailment"], (FIRST, SECOND)),
}  # fmt: skip


@pytest.fixture
def glue(tmp_path: Path) -> Path:
    """A folder of GLUE's files, with both of MNLI's."""
    for folder, header, rows, _ in GLUE.values():
        where = tmp_path / "glue" / folder
        where.mkdir(parents=True)
        for name in ("train", "dev", "dev_matched", "dev_mismatched"):
            (where / f"{name}.tsv").write_text("\n".join([header, *rows, ""]), encoding="utf-8")
    return tmp_path / "glue"


@pytest.mark.parametrize("task", GLUE)
def test_glue_is_two_sentences_to_encoders_and_t5s_text_to_others(
    task: str, get: Callable[..., Data], glue: Path
) -> None:
    flags, (first, second) = ["--task", task], GLUE[task][3]
    every = task == "mnli"  # the others differ in no way that a model's type has to do with
    for model_type in ("bert", "roberta", "distilbert") if every else ("bert",):
        data = get(model_type, "classifier", glue, *flags)
        own = data.tokenizer(*[text for text in (first, second) if text])
        item, types = data.train[0], model_type == "bert"
        assert item["input_ids"].tolist() == own["input_ids"]
        assert ("token_type_ids" in item) == types and (
            not types or item["token_type_ids"].tolist() == own["token_type_ids"]
        )
        assert {*data.held_out_rows["task"]} == {*TASKS[task].columns}
        data = with_classes(data)
        words = {"stsb": ["1.0", "3.8"]}.get(task, sorted({*data.held_out_rows["target"]}))
        assert data.classes == words and len(words) == (3 if task == "mnli" else 2)
        batch = data.collate([data.train[i] for i in range(2)])
        assert batch["labels"].tolist() == [[words.index(data.train.rows["target"][i])] for i in range(2)]
        model = families.model(model_type, "classifier", num_labels=len(words), **families.fitting(model_type))
        assert model(**batch).loss.isfinite()
    for model_type, kind in (("bart", "seq2seq"), ("gpt2", "causal"), ("t5", "seq2seq")) if every else ():
        source = get(model_type, kind, glue, *flags).held_out_rows["source"][0]
        assert source.startswith(f"{task} ") and source.endswith("\n") == (kind == "causal")
        assert first in source and second in source
        assert source.startswith(f"mnli hypothesis: {SECOND} premise: {FIRST}")


def test_all_of_glue_has_eight_columns(get: Callable[..., Data], glue: Path) -> None:
    rows = get("bert", "classifier", glue, "--task", "glue").held_out_rows
    assert [*dict.fromkeys(rows["task"])] == [column for name in GLUE for column in TASKS[name].columns]
    assert len({*rows["task"]}) == 8 and {*rows["pair"]} >= {"", SECOND}


def test_one_output_learns_scores(get: Callable[..., Data], glue: Path) -> None:
    head = {"architectures": ["BertForSequenceClassification"], "num_labels": 1}
    data = get("bert", "classifier", glue, "--task", "stsb", **head)
    assert data.held_out_rows["target"] == ["3.75", "1"]
    data = with_classes(data, ["LABEL_0"])
    batch = data.collate([data.train[i] for i in range(2)])
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [[3.75], [1.0]]
    model = families.model("bert", "classifier", num_labels=1, **families.fitting("bert"))
    expected = (model(**{name: x for name, x in batch.items() if name != "labels"}).logits - batch["labels"]).square()
    assert model(**batch).loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    with pytest.raises(InputError, match="the model has one output, a score: expected numbers for targets, got 'pos"):
        with_classes(get("bert", "classifier", glue, "--task", "sst2", **head), ["LABEL_0"])


def test_one_class_alone_is_none(get: Callable[..., Data]) -> None:
    data = get("bert", "classifier", [{"text": FIRST, "label": "good"}] * 3, "--task", "classification")
    with pytest.raises(InputError, match="a classifier: expected at least 2 different targets, got 'good' alone"):
        with_classes(data)


def test_classes_of_a_model_are_those_of_the_data_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    both = ["negative", "positive"]
    assert matched(["POSITIVE", "Negative"], both, "sst2") == ["positive", "negative"]  # in the model's own order
    assert matched(["Not Equivalent", "equivalent"], ["equivalent", "not_equivalent"], "mrpc") == [
        "not_equivalent",
        "equivalent",
    ]
    assert matched(["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], ["neutral", "entailment"], "mnli") == [
        "CONTRADICTION",
        "neutral",
        "entailment",
    ]
    assert matched(["cat", "dog", "cow"], ["dog"], "classification") == ["cat", "dog", "cow"]
    assert not capsys.readouterr().out
    assert matched(["LABEL_0", "LABEL_1"], both, "sst2") == both
    assert matched(["LABEL_0", "LABEL_1", "LABEL_2"], ["neutral"], "mnli") == ["entailment", "neutral", "contradiction"]
    assert (
        "classes LABEL_0, LABEL_1, LABEL_2 are taken for entailment, neutral, contradiction" in capsys.readouterr().out
    )
    assert matched(["LABEL_0", "LABEL_1"], ["0", "1"], "classification") == ["0", "1"]
    assert matched(["1", "0"], ["0", "1"], "classification") == ["1", "0"]
    assert matched(["LABEL_1", "LABEL_0"], ["LABEL_0", "LABEL_1"], "classification") == ["LABEL_1", "LABEL_0"]


@pytest.mark.parametrize(
    ("theirs", "found", "task"),
    [
        (["LABEL_0", "LABEL_1"], ["bad", "good"], "classification"),  # which is which, nobody says
        (["LABEL_1", "LABEL_0"], ["negative", "positive"], "sst2"),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["negative", "positive"], "sst2"),
        (["LABEL_0", "LABEL_1"], ["entailment", "neutral"], "mnli"),
        (["neg", "pos"], ["negative", "positive"], "sst2"),
        (["entailment", "neutral", "contradiction"], ["entailment", "not_entailment"], "rte"),
        (["Yes", "yes"], ["yes"], "classification"),
        (["0", "1"], ["1", "2"], "classification"),
        (["False", "True"], ["0", "1"], "classification"),
    ],
)
def test_classes_that_nobody_can_match_are_refused(theirs: list[str], found: list[str], task: str) -> None:
    message = (
        f"the model has no head for {task}: its classes are .*: expected the same names, in the id2label of its con"
    )
    with pytest.raises(InputError, match=message):
        matched(theirs, found, task)


def test_what_a_teacher_writes_stands_where_the_target_stood(
    get: Callable[..., Data], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"{text} and", "completion": " a bus."} for text in families.TEXTS[:5]]
    data = get("gpt2", "causal", [*rows] * 2, "--task", "text2text")
    monkeypatch.setattr(students, "written", lambda run, model, others, title: ["why."] * len(others))
    flags = SimpleNamespace(labelled_examples=4)
    run = SimpleNamespace(flags=flags, args=SimpleNamespace(max_steps=0), data=data, seed=0)
    train = students._labelled(run, SimpleNamespace(model=None)).train  # type: ignore[arg-type]
    texts = [data.tokenizer.decode(train[i]["input_ids"]) for i in range(len(train))]
    assert sum(text.endswith(" and a bus.<|endoftext|>") for text in texts) == 4
    assert sum(text.endswith(" and why.<|endoftext|>") for text in texts) == 6


def test_a_head_that_is_to_come_learns_what_the_teachers_does() -> None:
    flags = parse(effective("--method", "scratch", "--student", "known", "--task", "stsb", "--train_file", "x"))[0]
    head = {"architectures": ["BertForSequenceClassification"]}
    score, classes, new = (
        families.config("bert", id2label=names, **head) for names in ({0: "LABEL_0"}, {0: "0.0", 1: "0.2"}, {0: ""})
    )
    for configs, has_scores in (([score, new], True), ([classes, new], False), ([new], True), ([classes], False)):
        assert prepare._columns(flags, "classifier", configs).has_scores == has_scores
