"""Figures by hand, or by formulas written out here; outputs that are nonsense are wrong and nothing worse."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from fastkd.train.data.tasks import TASKS
from fastkd.train.judge.metrics import GLUE_COLUMNS, _Words, score, score_rows, signatures


def counted_f1(outputs: list[bool], targets: list[bool]) -> float:
    hits = sum(o and t for o, t in zip(outputs, targets, strict=True))
    return 200 * hits / (sum(outputs) + sum(targets))


def test_accuracy() -> None:
    assert score(
        "sst2", ["positive", " negative\n", "positive", "Positive"], ["positive", "negative", "negative", "positive"]
    ) == {"accuracy": 50.0}
    for task in ("mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte"):
        assert score(task, ["entailment", "entail", ""], ["entailment"] * 3) == {"accuracy": pytest.approx(100 / 3)}


@pytest.mark.parametrize(
    ("task", "yes", "no"), [("mrpc", "equivalent", "not_equivalent"), ("qqp", "duplicate", "not_duplicate")]
)
def test_f1_of_the_positive_class(task: str, yes: str, no: str) -> None:
    rng = np.random.default_rng(0)
    targets, outputs = rng.random(50) < 0.3, rng.random(50) < 0.5
    words = [[yes if value else no for value in side] for side in (outputs.tolist(), targets.tolist())]
    expected = {"f1": counted_f1(outputs.tolist(), targets.tolist()), "accuracy": 100 * (targets == outputs).mean()}
    assert score(task, *words) == pytest.approx(expected)
    # Nonsense is the wrong answer on both sides: two right positives, one missed and one false.
    figures = score(task, [yes, yes, "nonsense", "nonsense"], [yes, yes, yes, no])
    assert figures == pytest.approx({"f1": counted_f1([1, 1, 0, 1], [1, 1, 1, 0]), "accuracy": 50.0})
    assert score(task, [no, no], [no, no]) == {"f1": 0.0, "accuracy": 100.0}
    assert score(task, ["", ""], [no, yes]) == {"f1": 0.0, "accuracy": 0.0}


def test_classification() -> None:
    # a: precision 1, recall 1/2; b: precision 1/2, recall 1. The class "zzz" is none of the targets'.
    figures = score("classification", ["a", "b", "b", "zzz"], ["a", "a", "b", "c"])
    assert figures == pytest.approx({"accuracy": 50.0, "f1": 100 * (2 / 3 + 2 / 3 + 0) / 3})


def ranks(values: list[float]) -> np.ndarray:
    """Mean ranks, ties shared."""
    array = np.array(values)
    return np.array([(array < value).sum() + ((array == value).sum() + 1) / 2 for value in array])


def test_spearman() -> None:
    outputs, targets = ["3.8", "0.0", "nonsense", "2.2", "5.0", "2.2"], ["4.0", "1.0", "0.2", "2.0", "4.8", "3.0"]
    numbers = [3.8, 0.0, -1.0, 2.2, 5.0, 2.2]
    expected = 100 * np.corrcoef(ranks(numbers), ranks([float(t) for t in targets]))[0, 1]
    assert score("stsb", outputs, targets) == pytest.approx({"spearman": expected})
    for nonsense in ("nan", "inf", "-inf", "1e999", ""):
        assert score("stsb", [nonsense, "1", "2"], ["0", "1", "2"])["spearman"] == pytest.approx(100)
    assert score("stsb", ["2.0"] * 3, ["1.0", "2.0", "3.0"]) == {"spearman": 0.0}
    assert score("stsb", ["1", "2", "3"], ["1.0"] * 3) == {"spearman": 0.0}
    assert score("stsb", ["1"], ["1"]) == {"spearman": 0.0}
    assert score("stsb", ["x", "y"], ["1", "2"]) == {"spearman": 0.0}


def ngram_f(n: int, output: list[str], target: list[str]) -> float:
    counts = [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (output, target)]
    hits = (counts[0] & counts[1]).total()
    return 200 * hits / (counts[0].total() + counts[1].total())


def common(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence."""
    if not a or not b:
        return 0
    return common(a[:-1], b[:-1]) + 1 if a[-1] == b[-1] else max(common(a[:-1], b), common(a, b[:-1]))


def test_rouge() -> None:
    output, target = "the cat sat down. it was on a mat.", "a cat was on the mat. it sat."
    words = [text.replace(".", "").split() for text in (output, target)]
    figures = score("summarization", [output], [target])
    assert list(figures) == list(TASKS["summarization"].metrics)
    assert figures["rouge1"] == pytest.approx(ngram_f(1, *words))
    assert figures["rouge2"] == pytest.approx(ngram_f(2, *words))
    assert figures["rougeL"] == pytest.approx(200 * common(*words) / (len(words[0]) + len(words[1])))
    # Union of each target sentence's matches: "cat", "on" or "was", and "mat"; then "sat" or "it".
    assert figures["rougeLsum"] > figures["rougeL"]
    assert score("summarization", [output, ""], [target, target])["rouge1"] == pytest.approx(figures["rouge1"] / 2)
    lines = score("summarization", [output.replace(". ", ".\n")], [target.replace(". ", ".\n")])
    assert lines == figures  # sentences on lines of their own, or not
    assert score("summarization", ["He was running."], ["he was run"])["rouge1"] == 100  # stems, no case
    assert score("summarization", ["One thing. Another."], ["Another. One thing."])["rougeLsum"] == 100


def bleu(outputs: list[list[str]], targets: list[list[str]]) -> float:
    """Papineni et al. (2002), without smoothing, on words."""
    log = 0.0
    for n in range(1, 5):
        hits = total = 0
        for pair in zip(outputs, targets, strict=True):
            counts = [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in pair]
            hits, total = hits + (counts[0] & counts[1]).total(), total + counts[0].total()
        log += math.log(hits / total) / 4
    lengths = sum(map(len, targets)) / sum(map(len, outputs))
    return 100 * math.exp(log + min(0.0, 1 - lengths))


def test_translation() -> None:
    outputs = ["the cat sat on the mat today", "it is raining very hard"]
    targets = ["the cat sat on a mat today", "it is raining very hard out there"]
    figures = score("translation", outputs, targets)
    assert figures["bleu"] == pytest.approx(bleu([o.split() for o in outputs], [t.split() for t in targets]))
    assert 0 < figures["chrf"] < 100
    assert score("translation", targets, targets) == pytest.approx({"bleu": 100, "chrf": 100})
    assert score("translation", ["", ""], targets) == {"bleu": 0.0, "chrf": 0.0}
    assert list(figures) == ["bleu", "chrf"] == list(signatures(["sst2", "translation"]))
    assert "tok:13a" in signatures(["translation"])["bleu"] and "nc:6" in signatures(["translation"])["chrf"]
    assert signatures(["sst2", "glue"]) == {}


SCRIPTS = {
    "russian": ("Быстрая лиса прыгает через собаку.", 5, "13a"),
    "greek": ("Η γρήγορη αλεπού πηδά.", 4, "13a"),  # noqa: RUF001
    "arabic": ("الثعلب البني يقفز فوق الكلب؟", 5, "13a"),
    "hindi": ("तेज़ लोमड़ी कूदती है।", 4, "13a"),
    "chinese": ("敏捷的狐狸跳过了狗。", 9, "zh"),
    "japanese": ("狐が犬を飛び越える。", 9, None),
    "korean": ("여우가 개를 뛰어 넘는다.", 4, None),
    "thai": ("สวัสดี", 4, "char"),
    "accents": ("Été naïve à crème.", 4, "13a"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_perfect_outputs_of_every_script(script: str) -> None:
    """words: as ROUGE counts them, one for each character of scripts without spaces, marks with their letters."""
    text, words, tokenizer = SCRIPTS[script]
    assert score("summarization", [text], [text]) == pytest.approx(dict.fromkeys(TASKS["summarization"].metrics, 100))
    assert score("text2text", [text], [text])["rougeL"] == pytest.approx(100)
    assert len(_Words().tokenize(text)) == words
    assert score("translation", [text], [text]) == pytest.approx({"bleu": 100, "chrf": 100})
    # With MeCab Japanese and Korean are split into words, without it into characters.
    known = ["tok:char", "tok:ja-mecab", "tok:ko-mecab"] if tokenizer is None else [f"tok:{tokenizer}"]
    assert any(name in signatures(["translation"], [text])["bleu"].split("|")[3] for name in known)
    half = " ".join(_Words().tokenize(text)[: words // 2])
    assert score("summarization", [half], [text])["rouge1"] == pytest.approx(200 * (words // 2) / (words // 2 + words))


def test_english_is_counted_as_rouge_score_does() -> None:
    rng = np.random.default_rng(0)
    words = ["running", "cats", "U.S.", "it's", "co-operate", "x_y", "3.14", "A", "the", "10,000", "--", "\t", "\n"]
    outputs, targets = ([" ".join(rng.choice(words, 30)) for _ in range(20)] for _ in range(2))
    ours = score("summarization", outputs, targets)
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [theirs.score(target, output) for output, target in zip(outputs, targets, strict=True)]
    for name in ("rouge1", "rouge2", "rougeL"):
        assert ours[name] == pytest.approx(100 * np.mean([score[name].fmeasure for score in scores]), abs=1e-9)
    assert signatures(["summarization"]).keys() == signatures(["text2text"]).keys() == {"rouge"}


@pytest.mark.parametrize("task", ["text2text", "classification", "sst2", "mrpc", "summarization", "translation"])
def test_texts_that_all_differ_are_no_reason_for_warnings(task: str, recwarn: pytest.WarningsRecorder) -> None:
    texts = [f"number {i} of many" for i in range(60)]
    score(task, texts, texts[::-1])
    assert not recwarn.list


def test_text2text() -> None:
    figures = score("text2text", [" a b c ", "a b"], ["a b c", "a c"])
    assert figures == pytest.approx({"exact_match": 50.0, "rougeL": 75.0})


def test_rows_of_one_task_and_of_several() -> None:
    assert score_rows(["sst2", "sst2"], ["positive", "x"], ["positive"] * 2) == {"accuracy": 50.0}
    rows = [("rte", "entailment", "entailment"), ("sst2", "x", "positive"), ("rte", "entailment", "not_entailment")]
    assert score_rows(*zip(*rows, strict=True)) == {"rte_accuracy": 50.0, "sst2_accuracy": 0.0}


def test_the_mean_of_glue() -> None:
    rows = [
        *[("sst2", "positive", "positive"), ("sst2", "x", "positive")],  # accuracy 50
        *[("mrpc", "equivalent", "equivalent"), ("mrpc", "equivalent", "not_equivalent")],  # F1 66.7
        *[("stsb", "1.0", "1.0"), ("stsb", "2.0", "3.0")],  # Spearman 100
        *[("qqp", "duplicate", "duplicate"), ("qqp", "not_duplicate", "not_duplicate")],  # F1 100
        ("mnli_matched", "neutral", "neutral"),
        ("mnli_mismatched", "neutral", "entailment"),
        ("qnli", "entailment", "entailment"),
        ("rte", "entailment", "not_entailment"),
    ]
    figures = score_rows(*zip(*rows, strict=True))
    assert figures["glue_mean"] == pytest.approx((50 + 200 / 3 + 100 + 100 + 100 + 0 + 100 + 0) / 8)
    assert len(GLUE_COLUMNS) == 8 and figures["mrpc_accuracy"] == 50.0
    assert "glue_mean" not in score_rows(*zip(*rows[:-1], strict=True))


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.bind and task.metrics])
def test_the_table_of_tasks_says_which_figures_there_are(task: str) -> None:
    assert set(score(task, ["a", "b"], ["a", "c"])) == set(TASKS[task].metrics)


def test_misuse() -> None:
    with pytest.raises(ValueError, match="task: expected one of text2text"):
        score("glue", ["a"], ["a"])
    with pytest.raises(ValueError, match="got 1 for 2"):
        score("sst2", ["a"], ["a", "b"])
    with pytest.raises(ValueError, match="got 0 for 0"):
        score("sst2", [], [])
