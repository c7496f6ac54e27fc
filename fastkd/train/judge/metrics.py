"""How good generated texts are, in percent: the figures of each task, by libraries that everybody compares with.

All of them are figures of texts, so that an output outside a task's labels is wrong and nothing else.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from importlib.metadata import version
from typing import Any

import regex
from sacrebleu.metrics import BLEU, CHRF

from ..data.columns import LABEL_WORDS, finite
from ..data.tasks import TASKS

Texts = Sequence[str]
Figures = dict[str, float]

# Scripts that put no spaces between words: each character counts as one, as is customary for Chinese.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_WORDS = regex.compile(rf"(?V1)[{_UNSPACED}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]+")
# sacrebleu's tokenizers of the languages whose words 13a cannot tell, by a script in which they are written.
_BLEU_TOKENIZERS = {
    r"[\p{Hiragana}\p{Katakana}]": "ja-mecab",
    r"\p{Hangul}": "ko-mecab",
    r"\p{Han}": "zh",
    r"[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]": "char",
}

# The columns of GLUE's mean, and the figure of each that counts in it, its first.
GLUE_COLUMNS = {column: TASKS[name].metrics[0] for name in TASKS["glue"].parts for column in TASKS[name].columns}


def _accuracy(outputs: Texts, targets: Texts) -> Figures:
    hits = sum(output == target for output, target in zip(outputs, targets, strict=True))
    return {"accuracy": 100 * hits / len(targets)}


def _f1(outputs: Sequence[Hashable], targets: Sequence[Hashable]) -> dict[Hashable, float]:
    """Return F1 of every class that occurs, in percent."""
    hits = Counter(target for output, target in zip(outputs, targets, strict=True) if output == target)
    found = Counter(outputs) + Counter(targets)
    return {name: 200 * hits[name] / found[name] for name in found}


def _positive_f1(task: str, outputs: Texts, targets: Texts) -> Figures:
    """Return F1 of the positive class, and accuracy. An output that is no label counts as the wrong one, as in T5."""
    labels, positive = LABEL_WORDS[task], LABEL_WORDS[task][1]
    said = [
        output == positive if output in labels else target != positive
        for output, target in zip(outputs, targets, strict=True)
    ]
    f1 = _f1(said, [target == positive for target in targets])
    return {"f1": f1.get(True, 0.0), **_accuracy(outputs, targets)}


def _classification(outputs: Texts, targets: Texts) -> Figures:
    """Return accuracy, and the mean F1 of the classes that occur among the targets."""
    f1, classes = _f1(outputs, targets), set(targets)
    return {**_accuracy(outputs, targets), "f1": math.fsum(f1[name] for name in classes) / len(classes)}


def _number(text: str) -> float:
    """Return a score of STS-B; -1, below all others, for what is no finite number, as T5 does."""
    return -1.0 if math.isnan(value := finite(text)) else value


def _spearman(outputs: Texts, targets: Texts) -> Figures:
    """Return Spearman's rank correlation, 0 where one side is constant and has no order."""
    from scipy.stats import spearmanr

    x, y = [_number(text) for text in outputs], [_number(text) for text in targets]
    if min(len(set(x)), len(set(y))) < 2:
        return {"spearman": 0.0}
    return {"spearman": 100 * float(spearmanr(x, y).statistic)}


class _Words:
    """rouge_score's tokenizer, which drops all but a-z and 0-9, for the words of every script.

    Texts of ASCII give what they give there, Porter's stems; other words stay as they are.
    """

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer  # brings nltk, which takes seconds

        self._stem = functools.lru_cache(maxsize=1 << 16)(DefaultTokenizer(use_stemmer=True).tokenize)

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text in order."""
        words = _WORDS.findall(unicodedata.normalize("NFKC", text).lower())
        return [part for word in words for part in (self._stem(word) if word.isascii() else (word,))]


def _rouge(names: Texts, outputs: Texts, targets: Texts) -> Figures:
    """Return the mean F-measures of ROUGE on the words of any script."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer: Any = RougeScorer(names, tokenizer=_Words())
    scores = [
        scorer.score(_sentence_lines(target), _sentence_lines(output))
        for output, target in zip(outputs, targets, strict=True)
    ]
    return {name: 100 * sum(score[name].fmeasure for score in scores) / len(scores) for name in names}


def _sentence_lines(text: str) -> str:
    """Return a text with a line for each sentence, which ROUGE-Lsum compares; the other figures take no notice."""
    return regex.sub(r"(?<=[.!?\u061f\u0964])\s+|(?<=[\u3002\uff01\uff1f])\s*", "\n", text)


def _translation(outputs: Texts, targets: Texts) -> Figures:
    return {name: metric.corpus_score(outputs, [targets]).score for name, metric in _corpus_metrics(targets).items()}


def _corpus_metrics(targets: Texts) -> dict[str, BLEU | CHRF]:
    return {"bleu": _bleu("".join(targets)), "chrf": CHRF()}


def _bleu(text: str) -> BLEU:
    """Return BLEU with the tokenizer that sacrebleu has for the language in which most of the text is written.

    A tenth in kana is Japanese. Without MeCab, Japanese and Korean are compared by characters.
    """
    letters = len(regex.findall(r"\p{L}", text))
    for script, tokenizer in _BLEU_TOKENIZERS.items():
        if len(regex.findall(script, text)) > letters * (0.1 if tokenizer == "ja-mecab" else 0.5):
            try:
                return BLEU(tokenize=tokenizer)
            except (ImportError, RuntimeError):  # MeCab, or its dictionary, is not installed
                return BLEU(tokenize="char")
    return BLEU()


def _text2text(outputs: Texts, targets: Texts) -> Figures:
    return {"exact_match": _accuracy(outputs, targets)["accuracy"], **_rouge(["rougeL"], outputs, targets)}


_FIGURES: dict[str, Callable[[Texts, Texts], Figures]] = {
    **dict.fromkeys(("text2text", "chat"), _text2text),
    "summarization": functools.partial(_rouge, TASKS["summarization"].metrics),
    "translation": _translation,
    "classification": _classification,
    **dict.fromkeys(("sst2", "mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte"), _accuracy),
    **{name: functools.partial(_positive_f1, name) for name in ("mrpc", "qqp")},
    "stsb": _spearman,
}


def score(task: str, outputs: Texts, targets: Texts) -> Figures:
    """Return the figures of one task in percent.

    task: the name of a metric column ("sst2", "mnli_matched", "summarization" ...). outputs, targets: as many texts,
    at least one; white space around them does not count. Raises ValueError otherwise.
    """
    if task not in _FIGURES:
        raise ValueError(f"task: expected one of {', '.join(_FIGURES)}, got {task!r}")
    if not outputs or len(outputs) != len(targets):
        raise ValueError(f"outputs: expected one for each target, got {len(outputs)} for {len(targets)}")
    figures = _FIGURES[task]([text.strip() for text in outputs], [text.strip() for text in targets])
    return {name: float(value) for name, value in figures.items()}


def score_rows(tasks: Sequence[str], outputs: Texts, targets: Texts) -> Figures:
    """Return the figures of rows of one task or several, by the metric column of each row, in percent.

    One task gives the names of `score`; several give "sst2_accuracy" and so on, in the order of their first rows; the
    eight columns of GLUE together also "glue_mean", the mean of the figures in GLUE_COLUMNS.
    """
    rows: dict[str, tuple[list[str], list[str]]] = {}
    for task, output, target in zip(tasks, outputs, targets, strict=True):
        group = rows.setdefault(task, ([], []))
        group[0].append(output)
        group[1].append(target)
    scores = {task: score(task, *group) for task, group in rows.items()}
    if len(scores) == 1:
        return next(iter(scores.values()))
    figures = {f"{task}_{name}": value for task, named in scores.items() for name, value in named.items()}
    if GLUE_COLUMNS.keys() <= scores.keys():
        figures["glue_mean"] = sum(scores[task][name] for task, name in GLUE_COLUMNS.items()) / len(GLUE_COLUMNS)
    return figures


def signatures(tasks: Iterable[str], targets: Texts = ()) -> dict[str, str]:
    """Return what tells how the figures of the tasks are computed, for reports: "bleu" and "chrf", or "rouge".

    targets: those that outputs are compared with, by whose script BLEU's tokenizer is chosen.
    """
    found = {}
    for task in tasks:
        if task == "translation":
            for name, metric in _corpus_metrics(targets).items():
                metric.corpus_score(["a"], [["a"]])  # a signature needs to know the number of references
                found[name] = str(metric.get_signature())
        elif task in TASKS and any(name.startswith("rouge") for name in TASKS[task].metrics):
            found["rouge"] = f"tok:words of any script|stem:porter of a-z|version:{version('rouge_score')}"
    return found
