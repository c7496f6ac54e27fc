"""MiniDisc (Zhang et al., EACL 2024 Findings, arXiv 2205.14570): prune a teacher, pick its assistant, distil the rest.

A schedule is made of rounds. In a round, sub-networks of one pruned model, the candidates, learn from a teacher,
several in every step and sharing their weights ("sandwich training"). The best by the lambda-tradeoff, held-out metric
+ lambda * sparsity, goes on: it is the teacher, and the first weights, of the next round. MaxiDisc, the baseline,
makes rounds of one candidate only: an assistant and its student for every sparsity of the grid.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..common.cache import cached, copy_folder, key
from ..common.errors import InputError
from ..data.tasks import figure_names
from ..flags.arguments import TransformersArguments
from ..flags.fields import FastkdArguments
from ..judge import cost
from ..models.loading import load_model
from ..objectives.methods import Method
from ..stages.folders import write_json
from ..stages.identity import digest, recipe
from ..stages.prepare import Data, heading
from ..stages.stages import data_seed, end_reports, make_trainer
from ..training.checkpoints import last_checkpoint, recover
from ..training.trainer import DistillTrainer
from .prune import Widths, importance, narrowed, normalised, of_kind, parts, skeleton, sliced, widths_at
from .schedule import Candidate, Round, Schedule, Trial, round_from_json

VERSION = 2  # raise it when a round changes what it makes, so that older ones are not reused
ROUND_FILE = "round.json"
_PROGRESS_FILE = "candidates.pt"  # in a checkpoint


class CandidateTrainer(DistillTrainer):
    """DistillTrainer of several sub-networks at once, which share the model's weights, and keeper of the best.

    candidates: widths by sparsity. Each step takes the mean of their losses; the teacher runs once. sandwich_size: how
    many learn in a step, the least and the most sparse and others that are drawn anew, as in the sandwich rule (Yu and
    Huang, 2019, arXiv 1903.05134); 0 for all of them, as in MiniDisc. Each evaluation is of all of them: the entries
    "eval_candidate_<percent>" of the log hold their metrics, and what is logged as of the student is of the sparsest.
    metric: of evaluation's figures the one that compares candidates, 0 to 1. patience: evaluations without a better
    figure of any candidate, after which training stops.
    """

    def __init__(
        self,
        *args: Any,
        candidates: Mapping[float, Widths],
        metric: Callable[[Mapping[str, float]], float],
        tradeoff_lambda: float,
        patience: int,
        sandwich_size: int = 0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.candidates = dict(sorted(candidates.items()))
        self.metric = metric
        self.tradeoff_lambda = tradeoff_lambda
        self.patience = patience
        self.sandwich_size = sandwich_size or len(candidates)
        self.kept: dict[str, Any] = {}  # "sparsity", "tradeoff" and "weights" of the best candidate so far
        self._tokens = {who: [0, 0] for who in (None, *self.candidates)}  # read in training by each; None: the teacher
        self._seconds = 0.0  # of training before this process
        self._learning: list[float] = []  # the candidates that learn in this step
        self._taught: dict[str, Any] | None = None

    # ---- Training ----

    def _backward(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        self._learning, self._taught, losses = self._drawn(), None, []
        for who in (None, *self._learning):
            for side, name in enumerate(("input_ids", "labels")):
                self._tokens[who][side] += inputs[name].numel()
        for sparsity in self._learning:
            with narrowed(self.accelerator.unwrap_model(model), self.candidates[sparsity]):
                losses.append(super()._backward(model, inputs, num_items_in_batch))
        self._taught = None
        return torch.stack(losses).sum()

    def _drawn(self) -> list[float]:
        """Return the candidates of this step, the same after a resume and in all processes."""
        everyone = list(self.candidates)
        if self.sandwich_size >= len(everyone):
            return everyone
        draw = random.Random(f"{self.args.seed} {self.state.global_step}")
        between = draw.sample(everyone[1:-1], self.sandwich_size - 2)
        return sorted({everyone[0], everyone[-1], *between})

    def _teachers(self, *args: Any) -> dict[str, Any]:
        if self._taught is None:
            self._taught = super()._teachers(*args)
        return self._taught

    def _terms(self, *args: Any) -> dict[str, torch.Tensor]:
        return {name: loss / len(self._learning) for name, loss in super()._terms(*args).items()}

    # ---- Selection ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> dict[str, float]:
        """Evaluate every candidate, keep the best one's weights, and stop training when patience has run out."""
        bare = self.accelerator.unwrap_model(self.model)
        everything: dict[str, float] = {}
        figures: dict[str, float] = {}
        for sparsity, widths in self.candidates.items():
            is_sparsest = sparsity == max(self.candidates)
            prefix = metric_key_prefix if is_sparsest else f"{metric_key_prefix}_{100 * sparsity:g}"
            with narrowed(bare, widths):
                found = super().evaluate(eval_dataset, ignore_keys, prefix, **kwargs)
            everything |= found
            figures[_log_key(sparsity)] = self.metric({k.removeprefix(f"{prefix}_"): v for k, v in found.items()})
        self.log(figures)
        for sparsity, widths in self.candidates.items():
            tradeoff = figures[_log_key(sparsity)] + self.tradeoff_lambda * sparsity
            if not self.kept or tradeoff > self.kept["tradeoff"]:
                weights = sliced(bare, widths).cpu().state_dict()
                self.kept = {"sparsity": sparsity, "tradeoff": tradeoff, "weights": weights}
        if self._is_out_of_patience():
            self.control.should_training_stop = True
        self._timer.leave_out()
        return everything

    def _best(self) -> dict[float, tuple[float, int]]:
        """Return each candidate's best metric so far, and the first step at which it had it."""
        best: dict[float, tuple[float, int]] = {}
        for step, metrics in self._evaluations().items():
            for sparsity, metric in metrics.items():
                if sparsity not in best or metric > best[sparsity][0]:
                    best[sparsity] = metric, step
        return best

    def _evaluations(self) -> dict[int, dict[float, float]]:
        """Return the metrics of all candidates by step."""
        known = [entry for entry in self.state.log_history if _log_key(max(self.candidates)) in entry]
        return {int(entry["step"]): {s: entry[_log_key(s)] for s in self.candidates} for entry in known}

    def _is_out_of_patience(self) -> bool:
        last = max((step for _, step in self._best().values()), default=0)
        return sum(step > last for step in self._evaluations()) >= self.patience

    def _is_at_end(self) -> bool:
        return super()._is_at_end() or self._is_out_of_patience()

    # ---- Checkpoints ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as DistillTrainer does; in the end, all candidates have been evaluated."""
        result = super().train(*args, **kwargs)
        if self.state.global_step not in self._evaluations():
            self.evaluate()
        return result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model with all units, and beside it, in a checkpoint, what is known of its candidates."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.should_save:
            progress = {"kept": self.kept, "tokens": self._tokens, "seconds": self.seconds}
            torch.save(progress, Path(str(output_dir)) / _PROGRESS_FILE)

    def restore(self, checkpoint: Path) -> None:
        """Load what was known of the candidates, too."""
        super().restore(checkpoint)
        progress = torch.load(checkpoint / _PROGRESS_FILE, map_location="cpu", weights_only=True)
        self.kept, self._tokens, self._seconds = progress["kept"], progress["tokens"], progress["seconds"]

    # ---- What came of it ----

    @property
    def seconds(self) -> float:
        """Seconds of training so far, data included and evaluations not."""
        return self._seconds + self._timer.seconds

    @property
    def gflops(self) -> float:
        """Billions of floating-point operations of training so far, in this process; see `schedule.Round`.

        What activation checkpointing computes again is not counted.
        """
        total = 0
        if self.teacher is not None:
            total = cost.multiply_accumulates(self.teacher, *self._tokens[None], head=True)
        for sparsity, widths in self.candidates.items():
            student = skeleton(self.model, widths)  # whose backward pass costs as much as two forward ones
            total += 3 * cost.multiply_accumulates(student, *self._tokens[sparsity], head=True)
        return 2e-9 * total

    def best_model(self) -> Any:
        """Return the best candidate as a dense model with the weights that it had at its best."""
        made = sliced(self.model, self.candidates[self.kept["sparsity"]])
        made.load_state_dict(self.kept["weights"])
        return made

    def summary(self, name: str, teacher: float | None) -> Round:
        """Return what came of the round; name, teacher: see `schedule.Round`."""
        candidates = []
        for sparsity, (metric, step) in self._best().items():
            size = cost.parameters(skeleton(self.model, self.candidates[sparsity]))
            candidates.append(Candidate(sparsity, size, metric, metric + self.tradeoff_lambda * sparsity, step))
        steps = self.state.global_step
        return Round(name, teacher, candidates, self.kept["sparsity"], steps, self.seconds, self.gflops)


def _log_key(sparsity: float) -> str:
    return f"eval_candidate_{100 * sparsity:g}"


# ---- Ranking --------------------------------------------------------------------------------------------------------


def held_out_for_importance(flags: FastkdArguments, args: TransformersArguments, data: Data) -> tuple[Data, Any]:
    """Return (the data to train on, the examples that importance is measured on)."""
    seed = data_seed(args)
    if flags.importance_on == "dev":
        return data, data.held_out
    size = len(data.train)
    count = min(flags.importance_examples, size // 5)
    if count < 1:
        raise InputError(f"--importance_on train: {size} training examples are too few to hold any out; give dev")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    examples, rest = (data.train.select(sorted(part)) for part in (order[:count], order[count:]))
    unit = "training_chunks" if "training_chunks" in data.facts else "training_examples"
    known = hashlib.sha256(json.dumps([data.digest, seed, count]).encode()).hexdigest()[:16]
    facts = {**data.facts, unit: size - count, "importance_examples": count}
    return dataclasses.replace(data, train=rest, digest=known, facts=facts), examples


def rank(
    args: TransformersArguments, cache: Path, data: Data, examples: Any, teacher: Any
) -> tuple[dict[str, torch.Tensor], str]:
    """Return (the normalised importance of the teacher's units, what tells it and the teacher from others).

    It is measured on the examples, or taken from the cache if it was measured before.
    """
    settings = {
        "version": VERSION,
        "teacher": digest(teacher),
        "data": data.digest,
        "examples": len(examples),
        "batch": args.per_device_train_batch_size,
    }

    def make(folder: Path) -> None:
        batches = DataLoader(examples, args.per_device_train_batch_size, collate_fn=data.collate)
        scores = importance(teacher, tqdm(batches, desc="measuring importance", unit="batch"))
        save_file({name: score.cpu() for name, score in scores.items()}, folder / "importance.safetensors")

    folder, _ = cached(cache, "importance", settings, make, says=True)
    scores = load_file(folder / "importance.safetensors")
    return normalised({name: scores[name] for name in parts(teacher)}), folder.name


def check_schedule(
    flags: FastkdArguments, method: Method, data: Data, scores: Mapping[str, torch.Tensor], config: Any
) -> None:
    """Raise InputError if the schedule cannot be run to its end, before any of it is.

    That is if no head, or no neuron, is left at the target, if the method does not fit a candidate, or if the selection
    metric is none of the data's. config: the teacher's.
    """
    target, grid = flags.target_sparsity, flags.grid

    def leaves_both(sparsity: float) -> bool:
        left = widths_at(scores, sparsity)
        return all(any(left[name] for name in names) for names in of_kind(scores).values())

    if not leaves_both(target):
        reachable = ", ".join(f"{s:g}" for s in grid if s > 0 and leaves_both(s)) or "none"
        raise InputError(
            f"--target_sparsity {target:g} would leave no head, or no neuron, of this teacher (reachable: {reachable})"
        )
    for sparsity in trained_sparsities(flags, method):
        narrower = copy.deepcopy(config)
        narrower.widths = widths_at(scores, sparsity)
        try:
            method.check_fits(narrower, config)
        except ValueError as error:
            raise InputError(f"--{error} (at sparsity {sparsity:g})") from error
    names = ["token_accuracy", *_figures(data)]
    if flags.selection_metric not in (None, *names):
        raise InputError(f"--selection_metric: expected one of {', '.join(names)}, got {flags.selection_metric!r}")


def _figures(data: Data) -> list[str]:
    """Return the names of the task's figures on the held-out data."""
    return figure_names(data.task, set(data.held_out_rows["task"]))


# ---- Rounds ---------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Result:
    """A round that is done: what came of it, the folder of its model, and its `DistillTrainer.trained`."""

    round: Round
    folder: Path
    trained: dict[str, Any]


@dataclass
class Distiller:
    """Trains rounds; each is a folder in the cache, so that the runs that share it train it once.

    scores: normalised importance of the teacher's units. work: where the folders are in which rounds keep checkpoints
    while they last. resuming: whether such are continued from.
    """

    flags: FastkdArguments
    args: TransformersArguments
    method: Method
    data: Data
    scores: Mapping[str, torch.Tensor]
    cache: Path
    work: Path
    resuming: bool

    @functools.cached_property
    def _compared(self) -> list[str]:
        """The figures whose mean compares the candidates."""
        names = _figures(self.data)
        if self.flags.selection_metric is not None:
            return [self.flags.selection_metric]
        return ["glue_mean"] if "glue_mean" in names else names or ["token_accuracy"]

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
        folder, _ = cached(self.cache, "round", settings, make, says=True)
        record = json.loads((folder / ROUND_FILE).read_text(encoding="utf-8"))
        done = dataclasses.replace(round_from_json(record["round"]), name=name)
        best = done.best
        print(f"{name}: {100 * best.sparsity:g} % pruned, {100 * best.metric:.2f} % {self.metric_name}", flush=True)
        return Result(done, folder, record["trained"])

    def parent(self, result: Result) -> Parent:
        """Return a round's model as the teacher of the next."""
        model, _ = load_model(result.folder, "assistant")
        return Parent(model, str(result.folder), result.round.chosen, None, result.folder.name)

    def _settings(self, parent: Parent, widths: Mapping[float, Widths]) -> dict[str, Any]:
        flags, args, method = self.flags, self.args, dataclasses.asdict(self.method)
        besides = (
            "num_train_epochs", "max_steps", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start",
            "dataloader_drop_last", "generation_max_length", "generation_num_beams",
        )  # fmt: skip
        return {
            "version": VERSION,
            "data": self.data.digest,
            "parent": parent.key,
            "widths": {str(sparsity): dict(kept) for sparsity, kept in widths.items()},
            "method": {name: value for name, value in method.items() if name not in ("summary", "schedule")},
            "metric": flags.selection_metric,
            # A single candidate is chosen whatever lambda is.
            "tradeoff_lambda": flags.tradeoff_lambda if len(widths) > 1 else 0,
            "sandwich_size": flags.sandwich_size if len(widths) > 1 else 0,
            "patience": flags.patience,
            "embedding_learning_rate": flags.embedding_learning_rate,
            "projection_learning_rate": flags.projection_learning_rate,
            "teacher_dtype": flags.teacher_dtype,
            **recipe(args),
            **{name: getattr(args, name) for name in besides},
        }

    def _train(self, work: Path, name: str, parent: Parent, widths: Mapping[float, Widths], made: Path) -> None:
        flags = self.flags
        title = f"{self.args.run_name or self.work.parent.name}, {name}"
        args = dataclasses.replace(self.args, output_dir=str(work), run_name=title, resume_from_checkpoint=None)
        heading(f"Round: {name} ({', '.join(f'{100 * s:g} %' for s in widths)} pruned)")
        student = sliced(parent.model, widths[min(widths)], parent.order)
        trainer = make_trainer(
            flags,
            args,
            self.data,
            student,
            name,
            kind=CandidateTrainer,
            method=self.method,
            teacher=self._teacher(parent),
            candidates=widths,
            metric=self._metric,
            tradeoff_lambda=flags.tradeoff_lambda,
            patience=flags.patience,
            sandwich_size=flags.sandwich_size,
            scores=flags.selection_metric != "token_accuracy",
            reports=True,
        )
        assert isinstance(trainer, CandidateTrainer)
        recover(work)
        last = last_checkpoint(work) if self.resuming else None
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        end_reports(trainer)
        if (work / "runs").is_dir():  # TensorBoard's
            copy_folder(work / "runs", self.work.parent / "runs" / work.name)
        trainer.best_model().save_pretrained(made)
        self.data.tokenizer.save_pretrained(made)
        done = dataclasses.asdict(trainer.summary(name, parent.sparsity))
        write_json(made / ROUND_FILE, {"round": done, "trained": trainer.trained})
        shutil.rmtree(work, ignore_errors=True)

    def _teacher(self, parent: Parent) -> Any:
        """Return the parent as it teaches: in a dtype of its own, while students start from its weights in fp32."""
        if self.flags.teacher_dtype in ("auto", "float32"):
            return parent.model
        return load_model(parent.source, "teacher", self.flags.teacher_dtype)[0]


# ---- Schedules ------------------------------------------------------------------------------------------------------


def trained_sparsities(flags: FastkdArguments, method: Method) -> list[float]:
    """Return the sparsities of all that the schedule may train."""
    target = flags.target_sparsity
    if flags.assistant_sparsity is not None:
        return [flags.assistant_sparsity, target]
    if method.schedule == "maxidisc":
        return [sparsity for sparsity in flags.grid if 0 < sparsity <= target]
    least = flags.truncation if method.schedule == "minidisc" and flags.assistants else target
    return [sparsity for sparsity in flags.grid if least <= sparsity <= target]


def run_schedule(distiller: Distiller, teacher: Parent) -> tuple[Schedule, list[Result]]:
    """Run the schedule of the flags; return it, and the rounds of its best trial, the student's last."""
    flags, target = distiller.flags, distiller.flags.target_sparsity
    if flags.assistant_sparsity is not None:
        trials = [_by_assistant(distiller, teacher, flags.assistant_sparsity)]
    elif distiller.method.schedule == "minidisc":
        trials = [_by_tradeoff(distiller, teacher)]
    elif distiller.method.schedule == "maxidisc":
        assistants = [sparsity for sparsity in flags.grid if sparsity < target]
        trials = [_by_assistant(distiller, teacher, sparsity) for sparsity in assistants]
    else:
        trials = [_by_assistant(distiller, teacher, 0.0)]
    schedule = Schedule(
        distiller.metric_name,
        flags.tradeoff_lambda,
        target,
        [Trial([result.round for result in trial]) for trial in trials],
    )
    best = next(trial for trial in trials if [r.round for r in trial] == schedule.chosen.rounds)
    return schedule, best


def _by_assistant(distiller: Distiller, teacher: Parent, sparsity: float) -> list[Result]:
    """Distil an assistant from the teacher, and the student from it; at sparsity 0 the assistant is the teacher."""
    student = f"student of {100 * sparsity:g} %" if sparsity else "student of the teacher"
    if sparsity == 0:
        return [distiller.round(student, teacher, [distiller.flags.target_sparsity])]
    assistant = distiller.round(f"assistant of {100 * sparsity:g} %", teacher, [sparsity])
    return [assistant, distiller.round(student, distiller.parent(assistant), [distiller.flags.target_sparsity])]


def _by_tradeoff(distiller: Distiller, teacher: Parent) -> list[Result]:
    """Pick assistants by the lambda-tradeoff, one after the other, until they are enough or the target is picked."""
    flags, results, parent = distiller.flags, [], teacher
    candidates = trained_sparsities(flags, distiller.method)
    for i in range(flags.assistants):
        results.append(distiller.round(f"round {i + 1}", parent, candidates))
        chosen = results[-1].round.chosen
        if chosen == flags.target_sparsity:
            return results
        candidates = [sparsity for sparsity in candidates if sparsity > chosen]
        parent = distiller.parent(results[-1])
    results.append(distiller.round("student", parent, [flags.target_sparsity]))
    return results
