"""What a row of data teaches: TASKS, and where the rows of GLUE's are."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Features, Value

from ..common.errors import InputError
from .columns import (
    GLUE_FIELDS,
    LABEL_WORDS,
    Bind,
    Columns,
    chat,
    classification,
    glue,
    plain_text,
    summarization,
    text2text,
    translation,
)
from .sources import Rows, is_saved, read_hub, read_rows


@dataclass(frozen=True)
class Task:
    """One way to learn from rows.

    bind: raises InputError for absent columns; None for a mixture of tasks.
    metrics: the figures of `metrics.score`. columns: of GLUE's table, for the evaluation split; behind the task's name
    they end as that's files and splits do. parts: the tasks of a mixture.
    """

    name: str
    summary: str
    metrics: tuple[str, ...]
    bind: Bind | None = None
    columns: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    @property
    def is_text(self) -> bool:
        """Whether texts alone are learnt from."""
        return self.bind is plain_text

    def features(self, columns: Columns) -> Features:
        """Return the columns that a model learns from."""
        names = ["text"] if self.is_text else ["source", "target", "task", *["pair"] * columns.has_pairs]
        return Features(dict.fromkeys(names, Value("string")))


_GLUE_FOLDERS = {
    "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "qqp": "QQP", "mnli": "MNLI", "qnli": "QNLI", "rte": "RTE"
}  # fmt: skip
_GLUE_METRICS = {"mrpc": ("f1", "accuracy"), "qqp": ("f1", "accuracy"), "stsb": ("spearman",)}


def _glue_task(name: str) -> Task:
    return Task(
        name,
        f"GLUE's {_GLUE_FOLDERS[name]}, of T5 and causal models in T5's format",
        _GLUE_METRICS.get(name, ("accuracy",)),
        glue(name),
        ("mnli_matched", "mnli_mismatched") if name == "mnli" else (name,),
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in [
        Task("span_corruption", "T5's pre-training task on plain texts", (), plain_text),
        Task("masked_lm", "BERT's pre-training task on plain texts", (), plain_text),
        Task("causal_lm", "plain texts, each token from those before it", (), plain_text),
        Task("text2text", "any source text to any target text", ("exact_match", "rougeL"), text2text),
        Task("summarization", "documents to summaries", ("rouge1", "rouge2", "rougeL", "rougeLsum"), summarization),
        Task("chat", "conversations, the assistant's last turn to be written", ("exact_match", "rougeL"), chat),
        Task("translation", "one language to another", ("bleu", "chrf"), translation),
        Task("classification", "texts to the words of their labels", ("accuracy", "f1"), classification),
        *map(_glue_task, GLUE_FIELDS),
        Task("glue", "all seven tasks of GLUE above", ("glue_mean",), parts=tuple(GLUE_FIELDS)),
    ]
}


def matched(theirs: Sequence[str], found: Collection[str], task: str) -> list[str]:
    """Return the classes of a model, in its order, by the names that the data has for them.

    theirs: the model's names, which are those of the data in any case, or mere numbers ("LABEL_0"), which are GLUE's
    (LABEL_WORDS) or those that the data itself gives. Raises InputError for a class of the data that is none of them.
    """

    def plain(name: str) -> str:
        return re.sub(r"[\W_]+", "_", name.casefold())

    usual = LABEL_WORDS.get(task, [str(i) for i in range(len(theirs))])
    names = {plain(name): name for name in found}
    classes = [names.get(plain(name), name) for name in theirs]
    if [re.sub(r"(?i)^label_?", "", name) for name in theirs] == [str(i) for i in range(len(usual))]:
        classes = classes if {*found} <= {*classes} else list(usual)
        if classes != [*theirs]:
            print(f"the model's classes {', '.join(theirs)} are taken for {', '.join(classes)}, in this order")
    if not {*found} <= {*classes} or len({*classes}) < len(classes):
        own, given = (", ".join(sorted(some)[:9]) for some in (theirs, found))
        raise InputError(
            f"the model has no head for {task}: its classes are {own}, the data's {given}: expected the same names, in "
            "the id2label of its config.json"
        )
    return classes


def figure_names(task: Task, present: Collection[str] | None = None) -> list[str]:
    """Return the names of the figures that `metrics.score_rows` gives for a task, none for texts.

    present: the metric columns that there are rows of, by default all.
    """
    parts = [TASKS[name] for name in task.parts] or [task]
    every = [(column, part.metrics) for part in parts for column in part.columns]
    columns = [(column, metrics) for column, metrics in every if present is None or column in present]
    if len(columns) < 2:
        return list(columns[0][1] if columns else task.metrics)
    names = [f"{column}_{metric}" for column, metrics in columns for metric in metrics]
    return [*names, *task.metrics] if task.parts and columns == every else names


Part = tuple[Task, str, Rows]  # a task, the "task" of its pairs, which names their metric ("mnli_matched"), its rows


# GLUE ------------------------------------------------------------------------------------------------------------


def is_glue(task: Task) -> bool:
    """Return whether a task's data has GLUE's splits."""
    return bool(task.columns or task.parts)


def has_splits(where: str) -> bool:
    """Return whether a place is a folder with splits, which a file, or a folder of one `Dataset`, is not."""
    return Path(where).is_dir() and not Path(where, "state.json").is_file()


def _endings(name: str, split: str) -> dict[str, str]:
    """Return {metric column: what the names of its file and split end in} of a split of a GLUE task."""
    return {column: column.removeprefix(name) for column in ((name,) if split == "train" else TASKS[name].columns)}


def glue_files(task_name: str, folder: str | Path, split: str) -> dict[str, Path]:
    """Return {metric column: TSV file} of a GLUE task in its folder, or in the folder of all tasks.

    split: "train" or "validation", whose files are called dev; MNLI's has two. Raises InputError if one is missing.
    """
    root = Path(folder)
    inner = root / _GLUE_FOLDERS[task_name]
    root = inner if inner.is_dir() else root
    stem = "train" if split == "train" else "dev"
    files = {column: root / f"{stem}{ending}.tsv" for column, ending in _endings(task_name, split).items()}
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {' and '.join(missing)} of {task_name}: expected GLUE's layout, "
            f"{_GLUE_FOLDERS[task_name]}/{missing[0]}; its splits saved by datasets, in the folder or in {task_name} "
            f"inside of it; or, for this task alone, a file"
        )
    return files


def glue_parts(task: Task, where: str, split: str, *, cache_dir: Path) -> list[Part]:
    """Return the parts of one GLUE task, or of all seven one after the other for "glue".

    where: a folder of GLUE's TSV files, a data set of the hub with GLUE's configurations, or a folder, or one for each
    task inside of it, into which `datasets` saved their splits. split: "train" or "validation".
    Raises InputError as `glue_files`, `read_hub` and `read_rows` do.
    """
    parts: list[Part] = []
    for name in task.parts or (task.name,):
        saved = next((folder for folder in (Path(where), Path(where, name)) if is_saved(folder)), None)
        if task.parts and (Path(where).is_file() or is_saved(where)):
            raise InputError(
                f"--task glue: {where} holds one task's data: expected a folder with all of them, such as "
                f"{_GLUE_FOLDERS[name]}/train.tsv; --task {name} takes a file"
            )
        if Path(where).is_dir() and not saved:
            files = glue_files(name, where, split).items()
            parts += [(TASKS[name], column, read_rows(str(file))) for column, file in files]
            continue
        for column, ending in _endings(name, split).items():
            rows = read_hub(str(saved or where), name, split + ending, cache_dir=cache_dir)
            parts.append((TASKS[name], column, rows))
    return parts
