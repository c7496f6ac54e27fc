"""Rounds of a schedule: each trains candidates, is kept in the cache when it is done, and resumed until then."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..common.cache import cached, copy_folder, key
from ..common.errors import InputError
from ..data.tasks import figure_names
from ..models.loading import load_model
from ..objectives.methods import Method
from ..stages.folders import write_json
from ..stages.identity import recipe
from ..stages.prepare import heading
from ..stages.run import Run
from ..stages.trainers import end_reports, make_trainer
from ..training.checkpoints import last_checkpoint, recover
from .candidates import CandidateTrainer
from .prune import Widths, sliced, widths_at
from .schedule import Round, round_from_json

VERSION = 2  # raise it when a round changes what it makes, so that older ones are not reused
_ROUND_FILE = "round.json"
# What a round depends on, beside `identity.recipe`: flags, and arguments of transformers.
_FLAGS = "patience", "embedding_learning_rate", "projection_learning_rate", "teacher_dtype"
_ARGUMENTS = (
    "num_train_epochs", "max_steps", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start",
    "dataloader_drop_last", "generation_max_length", "generation_num_beams",
)  # fmt: skip


@dataclass(frozen=True)
class Parent:
    """The teacher of a round, whose weights the round starts from. sparsity: None for the one that was not pruned.

    model: in fp32. source: the folder, or the name, that it is loaded from. order: see `prune.sliced`. key: what tells
    it from others.
    """

    model: Any
    source: str
    sparsity: float | None
    order: Mapping[str, torch.Tensor] | None
    key: str

    def as_teacher(self, dtype: str) -> Any:
        """Return the model as it teaches: in a dtype of its own, while students start from its weights in fp32."""
        return self.model if dtype in ("auto", "float32") else load_model(self.source, "teacher", dtype)[0]


@dataclass(frozen=True)
class Result:
    """A round that is done: what came of it, the folder of its model, and its `DistillTrainer.trained`."""

    round: Round
    folder: Path
    trained: dict[str, Any]

    def as_parent(self) -> Parent:
        """Return the model as the teacher of the next round."""
        model, _ = load_model(self.folder, "assistant")
        return Parent(model, str(self.folder), self.round.chosen, None, self.folder.name)


def compared_figures(run: Run) -> list[str]:
    """Return the names of the figures whose mean compares candidates.

    Raises InputError if the selection metric of the flags is none of the data's.
    """
    names = figure_names(run.data.task, set(run.data.held_out_rows["task"]))
    if run.flags.selection_metric is None:
        return ["glue_mean"] if "glue_mean" in names else names or ["token_accuracy"]
    if run.flags.selection_metric not in (known := ["token_accuracy", *names]):
        raise InputError(f"--selection_metric: expected one of {', '.join(known)}, got {run.flags.selection_metric!r}")
    return [run.flags.selection_metric]


@dataclass
class Distiller:
    """Trains rounds; each is a folder in the cache, so that the runs that share it train it once.

    scores: normalised importance of the teacher's units. work: where the folders are in which rounds keep checkpoints
    while they last. resuming: whether such are continued from.
    """

    run: Run
    scores: Mapping[str, torch.Tensor]
    work: Path
    resuming: bool

    def __post_init__(self) -> None:
        self._compared = compared_figures(self.run)

    @property
    def method(self) -> Method:
        """What the rounds minimise."""
        return self.run.flags.objective

    @property
    def metric_name(self) -> str:
        """What compares the candidates, in words."""
        return ("mean of " if len(self._compared) > 1 else "") + " and ".join(self._compared)

    def _metric(self, figures: Mapping[str, float]) -> float:
        """Return the figures' mean, 0 to 1; one that is undefined, as the correlation of a constant is, counts as 0."""
        if self._compared == ["token_accuracy"]:
            return figures["token_accuracy"]
        values = [figures[name] for name in self._compared]
        return sum(0.0 if math.isnan(value) else value for value in values) / len(values) / 100

    def round(self, name: str, parent: Parent, sparsities: Sequence[float]) -> Result:
        """Train candidates at the sparsities with the parent as teacher, or take them from the cache."""
        widths = {sparsity: widths_at(self.scores, sparsity) for sparsity in sparsities}
        settings = self._settings(parent, widths)
        work = self.work / f"round-{key(settings)}"  # other settings must not go on from its checkpoints
        make = functools.partial(self._train, work, name, parent, widths)
        folder, _ = cached(self.run.cache, "round", settings, make, says=True)
        record = json.loads((folder / _ROUND_FILE).read_text(encoding="utf-8"))
        done = dataclasses.replace(round_from_json(record["round"]), name=name)
        best = done.best
        print(f"{name}: {100 * best.sparsity:g} % pruned, {100 * best.metric:.2f} % {self.metric_name}", flush=True)
        return Result(done, folder, record["trained"])

    def _settings(self, parent: Parent, widths: Mapping[float, Widths]) -> dict[str, Any]:
        flags, method, is_choice = self.run.flags, dataclasses.asdict(self.method), len(widths) > 1
        return {
            "version": VERSION,
            "data": self.run.data.digest,
            "parent": parent.key,
            "widths": {str(sparsity): dict(kept) for sparsity, kept in widths.items()},
            "method": {name: value for name, value in method.items() if name not in ("summary", "schedule")},
            "metric": flags.selection_metric,
            # A single candidate is chosen whatever lambda is.
            "tradeoff_lambda": flags.tradeoff_lambda if is_choice else 0,
            "sandwich_size": flags.sandwich_size if is_choice else 0,
            **{name: getattr(flags, name) for name in _FLAGS},
            **{name: getattr(self.run.args, name) for name in _ARGUMENTS},
            **recipe(self.run.args),
        }

    def _train(self, work: Path, name: str, parent: Parent, widths: Mapping[float, Widths], made: Path) -> None:
        flags, out = self.run.flags, self.work.parent
        title = f"{self.run.args.run_name or out.name}, {name}"
        args = dataclasses.replace(self.run.args, output_dir=str(work), run_name=title, resume_from_checkpoint=None)
        heading(f"Round: {name} ({', '.join(f'{100 * s:g} %' for s in widths)} pruned)")
        trainer: Any = make_trainer(
            dataclasses.replace(self.run, args=args),
            sliced(parent.model, widths[min(widths)], parent.order),
            name,
            kind=CandidateTrainer,
            method=self.method,
            teacher=parent.as_teacher(flags.teacher_dtype),
            candidates=widths,
            metric=self._metric,
            tradeoff_lambda=flags.tradeoff_lambda,
            patience=flags.patience,
            sandwich_size=flags.sandwich_size,
            scores=flags.selection_metric != "token_accuracy",
            reports=True,
        )
        recover(work)
        last = last_checkpoint(work) if self.resuming else None
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        end_reports(trainer)
        if (work / "runs").is_dir():  # TensorBoard's
            copy_folder(work / "runs", out / "runs" / work.name)
        trainer.best_model().save_pretrained(made)
        self.run.data.tokenizer.save_pretrained(made)
        done = dataclasses.asdict(trainer.summary(name, parent.sparsity))
        write_json(made / _ROUND_FILE, {"round": done, "trained": trainer.trained})
        shutil.rmtree(work, ignore_errors=True)
