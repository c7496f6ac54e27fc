"""MiniDisc (Zhang et al., EACL 2024 Findings, arXiv 2205.14570): prune a teacher, pick its assistant, distil the rest.

A schedule is made of rounds. In a round, sub-networks of one pruned model, the candidates, learn from a teacher,
several in every step and sharing their weights ("sandwich training"). The best by the lambda-tradeoff, held-out metric
+ lambda * sparsity, goes on: it is the teacher, and the first weights, of the next round. MaxiDisc, the baseline,
makes rounds of one candidate only: an assistant and its student for every sparsity of the grid.

A round is kept in the cache when it is done, and resumed until then.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..common.cache import cached, copy_folder, key
from ..common.errors import InputError
from ..data.tasks import figure_names
from ..flags.fields import FastkdArguments
from ..models.loading import load_model
from ..stages.folders import write_json
from ..stages.identity import recipe
from ..stages.prepare import heading
from ..stages.run import Run
from ..stages.trainers import end_reports, make_trainer
from ..training.checkpoints import last_checkpoint, recover
from .candidates import CandidateTrainer
from .prune import Widths, of_kind, pruned_config, sliced, widths_at
from .schedule import Round, Schedule, Trial, round_from_json

VERSION = 2  # raise it when a round changes what it makes, so that older ones are not reused
_ROUND_FILE = "round.json"
# What a round depends on, beside `identity.recipe`: flags, and arguments of transformers.
_FLAGS = "patience", "embedding_learning_rate", "projection_learning_rate", "teacher_dtype"
_ARGUMENTS = (
    "num_train_epochs", "max_steps", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start",
    "dataloader_drop_last", "generation_max_length", "generation_num_beams",
)  # fmt: skip


@dataclass
class Model:
    """A model of a schedule: the teacher that it begins with, or what a round chose.

    folder: it is loaded from, or its name. key: what tells it from others. model: in fp32, if it is loaded already.
    order: see `prune.sliced`. round: that it came from, if it did. trained: its `DistillTrainer.trained`.
    """

    folder: str | Path
    key: str
    model: Any = None
    order: Mapping[str, torch.Tensor] | None = None
    round: Round | None = None
    trained: dict[str, Any] = field(default_factory=dict)

    @property
    def sparsity(self) -> float | None:
        """None for the teacher."""
        return self.round.chosen if self.round else None

    def load(self, dtype: str = "float32") -> Any:
        """Return the model."""
        is_here = self.model is not None and dtype == "float32"
        return self.model if is_here else load_model(self.folder, "teacher", dtype)[0]


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

    @functools.cached_property
    def compared(self) -> list[str]:
        """The names of the figures whose mean compares candidates.

        Raises InputError if the selection metric of the flags is none of the data's.
        """
        names = figure_names(self.run.data.task, set(self.run.data.held_out_rows["task"]))
        given = self.run.flags.selection_metric
        if given is None:
            return ["glue_mean"] if "glue_mean" in names else names or ["token_accuracy"]
        if given not in (known := ["token_accuracy", *names]):
            raise InputError(f"--selection_metric: expected one of {', '.join(known)}, got {given!r}")
        return [given]

    @property
    def metric_name(self) -> str:
        """What compares the candidates, in words."""
        return ("mean of " if len(self.compared) > 1 else "") + " and ".join(self.compared)

    def _metric(self, figures: Mapping[str, float]) -> float:
        """Return the figures' mean, 0 to 1; one that is undefined, as the correlation of a constant is, counts as 0."""
        if self.compared == ["token_accuracy"]:
            return figures["token_accuracy"]
        values = [figures[name] for name in self.compared]
        return sum(0.0 if math.isnan(value) else value for value in values) / len(values) / 100

    def round(self, name: str, parent: Model, sparsities: Sequence[float]) -> Model:
        """Train candidates at the sparsities with the parent as teacher, or take them from the cache."""
        widths = {sparsity: widths_at(self.scores, sparsity) for sparsity in sparsities}
        settings = self._settings(parent, widths)
        work = self.work / f"round-{key(settings)}"  # other settings must not go on from its checkpoints
        make = functools.partial(self._train, work, name, parent, widths)
        folder, _ = cached(self.run.cache, "round", settings, make, says=True)
        record = json.loads((folder / _ROUND_FILE).read_text(encoding="utf-8"))
        done = dataclasses.replace(round_from_json(record["round"]), name=name)
        print(f"{name}: {100 * done.chosen:g} % pruned, {100 * done.best.metric:.2f} % {self.metric_name}", flush=True)
        return Model(folder, folder.name, round=done, trained=record["trained"])

    def _settings(self, parent: Model, widths: Mapping[float, Widths]) -> dict[str, Any]:
        flags, is_choice = self.run.flags, len(widths) > 1
        method = dataclasses.asdict(flags.objective)
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

    def _train(self, work: Path, name: str, parent: Model, widths: Mapping[float, Widths], made: Path) -> None:
        flags, out, start = self.run.flags, self.work.parent, parent.load()
        title = f"{self.run.args.run_name or out.name}, {name}"
        args = dataclasses.replace(self.run.args, output_dir=str(work), run_name=title, resume_from_checkpoint=None)
        heading(f"Round: {name} ({', '.join(f'{100 * s:g} %' for s in widths)} pruned)")
        trainer: Any = make_trainer(
            dataclasses.replace(self.run, args=args),
            sliced(start, widths[min(widths)], parent.order),
            name,
            kind=CandidateTrainer,
            method=flags.objective,
            teacher=start if flags.teacher_dtype in ("auto", "float32") else parent.load(flags.teacher_dtype),
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


def check_schedule(distiller: Distiller, teacher: Any) -> None:
    """Raise InputError if the schedule cannot be run to its end, before any of it is.

    That is if no head, or no neuron, is left at the target, if the method does not fit a candidate, or if the selection
    metric is none of the data's.
    """
    flags, scores = distiller.run.flags, distiller.scores

    def leaves_both(sparsity: float) -> bool:
        left = widths_at(scores, sparsity)
        return all(any(left[name] for name in names) for names in of_kind(scores).values())

    if not leaves_both(flags.target_sparsity):
        reachable = ", ".join(f"{s:g}" for s in flags.grid if s > 0 and leaves_both(s)) or "none"
        raise InputError(
            f"--target_sparsity {flags.target_sparsity:g} would leave no head, or no neuron, of this teacher "
            f"(reachable: {reachable})"
        )
    for sparsity in sorted({s for rounds in trials_of(flags) for sparsities in rounds for s in sparsities}):
        try:
            flags.objective.check_fits(pruned_config(teacher, widths_at(scores, sparsity)), teacher.config)
        except ValueError as error:
            raise InputError(f"--{error} (at sparsity {sparsity:g})") from error
    assert distiller.compared


def trials_of(flags: FastkdArguments) -> list[list[list[float]]]:
    """Return for each trial its rounds, and for each of them the sparsities of its candidates.

    Behind the first round those that are not above what the one before chose are left out.
    """
    target, assistants = flags.target_sparsity, [flags.assistant_sparsity or 0.0]
    if flags.assistant_sparsity is None and flags.objective.schedule == "minidisc":
        return [[[s for s in flags.grid if flags.truncation <= s <= target]] * flags.assistants + [[target]]]
    if flags.objective.schedule == "maxidisc":
        assistants = [s for s in flags.grid if s < target]
    return [[[s], [target]] if s else [[target]] for s in assistants]  # at 0 the assistant is the teacher


def run_schedule(distiller: Distiller, teacher: Model) -> tuple[Schedule, list[Model]]:
    """Run the schedule of the flags; return it, and the models of its best trial, the student last."""
    flags = distiller.run.flags
    trials = [_trial(distiller, teacher, rounds) for rounds in trials_of(flags)]
    done = [Trial([model.round for model in trial if model.round]) for trial in trials]
    schedule = Schedule(distiller.metric_name, flags.tradeoff_lambda, flags.target_sparsity, done)
    return schedule, trials[done.index(schedule.chosen)]


def _trial(distiller: Distiller, teacher: Model, rounds: list[list[float]]) -> list[Model]:
    """Distil one model from the other until the target is picked, or is all that is left."""
    models, assistant = [teacher], f"{100 * rounds[0][0]:g} %" if len(rounds) > 1 else "the teacher"
    for i, sparsities in enumerate(rounds):
        before, is_last = models[-1].sparsity, i == len(rounds) - 1
        left = [sparsity for sparsity in sparsities if before is None or sparsity > before]
        if not left:
            break
        if len(rounds[0]) > 1:
            name = "student" if is_last else f"round {i + 1}"
        else:
            name = f"{'student' if is_last else 'assistant'} of {assistant}"
        models.append(distiller.round(name, models[-1], left))
    return models[1:]
