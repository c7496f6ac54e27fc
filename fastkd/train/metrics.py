"""How good generated texts are, in percent: the figures of each task, by libraries that everybody compares with.

All of them are figures of texts, so that an output outside a task's labels is wrong and nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence

from sacrebleu.metrics import BLEU, CHRF
from sklearn.metrics import accuracy_score, f1_score

from .tasks import LABEL_WORDS

Texts = Sequence[str]
Figures = dict[str, float]

# The columns of GLUE's mean, and the figure of each that counts in it.
GLUE_COLUMNS = {
    "sst2": "accuracy",
    "mrpc": "f1",
    "stsb": "spearman",
    "qqp": "f1",
    "mnli_matched": "accuracy",
    "mnli_mismatched": "accuracy",
    "qnli": "accuracy",
    "rte": "accuracy",
}


def _accuracy(outputs: Texts, targets: Texts) -> Figures:
    return {"accuracy": 100 * accuracy_score(targets, outputs)}


def _positive_f1(task: str) -> Callable[[Texts, Texts], Figures]:
    """Return F1 of the positive class, and accuracy. An output that is no label counts as the wrong one, as in T5."""
    negative, positive = LABEL_WORDS[task]

    def figures(outputs: Texts, targets: Texts) -> Figures:
        said = [
            output == positive if output in (negative, positive) else target != positive
            for output, target in zip(outputs, targets, strict=True)
        ]
        f1 = f1_score([target == positive for target in targets], said, zero_division=0)
        return {"f1": 100 * f1, **_accuracy(outputs, targets)}

    return figures


def _classification(outputs: Texts, targets: Texts) -> Figures:
    """Return accuracy, and the mean F1 of the classes that occur among the targets."""
    f1 = f1_score(targets, outputs, labels=sorted(set(targets)), average="macro", zero_division=0)
    return {**_accuracy(outputs, targets), "f1": 100 * f1}


def _number(text: str) -> float:
    """Return a score of STS-B; -1, below all others, for what is no finite number, as T5 does."""
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if math.isfinite(value) else -1.0


def _spearman(outputs: Texts, targets: Texts) -> Figures:
    """Return Spearman's rank correlation, 0 where one side is constant and has no order."""
    from scipy.stats import spearmanr

    x, y = [_number(text) for text in outputs], [_number(text) for text in targets]
    if min(len(set(x)), len(set(y))) < 2:
        return {"spearman": 0.0}
    return {"spearman": 100 * float(spearmanr(x, y).statistic)}


def _rouge(*names: str) -> Callable[[Texts, Texts], Figures]:
    """Return the mean F-measures of ROUGE, with Porter's stemmer. It knows Latin letters and digits alone."""

    def figures(outputs: Texts, targets: Texts) -> Figures:
        from rouge_score.rouge_scorer import RougeScorer  # brings nltk, which takes seconds

        scorer = RougeScorer(list(names), use_stemmer=True)
        scores = [
            scorer.score(_sentence_lines(target), _sentence_lines(output))
            for output, target in zip(outputs, targets, strict=True)
        ]
        return {name: 100 * sum(score[name].fmeasure for score in scores) / len(scores) for name in names}

    return figures


def _sentence_lines(text: str) -> str:
    """Return a text with a line for each sentence, which ROUGE-Lsum compares; the other figures take no notice."""
    return re.sub(r"(?<=[.!?])\s+", "\n", text)


def _translation(outputs: Texts, targets: Texts) -> Figures:
    return {name: metric.corpus_score(outputs, [targets]).score for name, metric in _corpus_metrics().items()}


def _corpus_metrics() -> dict[str, BLEU | CHRF]:
    return {"bleu": BLEU(), "chrf": CHRF()}


def _text2text(outputs: Texts, targets: Texts) -> Figures:
    return {"exact_match": _accuracy(outputs, targets)["accuracy"], **_rouge("rougeL")(outputs, targets)}


_FIGURES: dict[str, Callable[[Texts, Texts], Figures]] = {
    "text2text": _text2text,
    "summarization": _rouge("rouge1", "rouge2", "rougeL", "rougeLsum"),
    "translation": _translation,
    "classification": _classification,
    **dict.fromkeys(("sst2", "mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte"), _accuracy),
    "mrpc": _positive_f1("mrpc"),
    "qqp": _positive_f1("qqp"),
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


def signatures(tasks: Iterable[str]) -> dict[str, str]:
    """Return sacrebleu's signatures {"bleu": ..., "chrf": ...} if one of the tasks is translation, for reports."""
    if "translation" not in tasks:
        return {}
    metrics = _corpus_metrics()
    for metric in metrics.values():
        metric.corpus_score(["a"], [["a"]])  # a signature needs to know the number of references
    return {name: str(metric.get_signature()) for name, metric in metrics.items()}
