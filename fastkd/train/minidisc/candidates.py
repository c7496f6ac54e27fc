"""The trainer of candidates: sub-networks of one model, which learn in the same steps and share its weights."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device

from ..common.errors import counted
from ..judge import cost
from ..training.trainer import DistillTrainer
from .prune import Widths, narrowed, skeleton, sliced
from .schedule import Candidate, Round


class CandidateTrainer(DistillTrainer):
    """DistillTrainer of several sub-networks at once, the candidates, which share the model's weights.

    candidates: widths by sparsity. Each step takes the mean of their losses; the teacher runs once. sandwich_size: how
    many learn in a step, the least and the most sparse and others that are drawn anew, as in the sandwich rule (Yu and
    Huang, 2019, arXiv 1903.05134); 0 for all of them, as in MiniDisc.
    Each evaluation is of all candidates: the entries "eval_candidate_<percent>" of the log hold their metrics, and what
    is logged as of the student is of the sparsest. metric: of evaluation's figures the one that compares candidates, 0
    to 1. The best by metric + tradeoff_lambda * sparsity is kept. patience: evaluations without a better figure of any
    candidate, after which training stops.
    """

    def __init__(
        self,
        *args: Any,
        candidates: Mapping[float, Widths],
        sandwich_size: int = 0,
        metric: Callable[[Mapping[str, float]], float] = operator.itemgetter("token_accuracy"),
        tradeoff_lambda: float = 0.0,
        patience: int = 1,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.candidates = dict(sorted(candidates.items()))
        self.sandwich_size = sandwich_size or len(candidates)
        self.metric, self.tradeoff_lambda, self.patience = metric, tradeoff_lambda, patience
        self.kept: dict[str, Any] = {}  # "sparsity", "tradeoff" and "weights" of the best candidate so far
        self.best: dict[float, tuple[float, int]] = {}  # of each candidate so far: its metric, and the step it had it
        self._evaluated, self._stale = -1, 0  # the last step that was, and how often none had become better since
        self._tokens = {who: [0, 0] for who in (None, *self.candidates)}  # read in training by each; None: the teacher
        self._seconds = 0.0  # of training before this process
        self._learning: list[float] = []  # the candidates that learn in this step
        self._taught: dict[str, Any] | None = None
        self._beside["candidates.pt"] = self

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the candidates."""
        known = {name: getattr(self, name) for name in ("kept", "best", "_evaluated", "_stale", "_tokens")}
        return {**known, "_seconds": self._seconds + self._timer.seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        vars(self).update(send_to_device(dict(state), "cpu"))

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
        if self.sandwich_size >= len(self.candidates):
            return list(self.candidates)
        least, *between, most = self.candidates
        draw = random.Random(f"{self.args.seed} {self.state.global_step}")
        return [least, *sorted(draw.sample(between, self.sandwich_size - 2)), most]

    def _teachers(self, *args: Any) -> dict[str, Any]:
        self._taught = self._taught or super()._teachers(*args)
        return self._taught

    def _terms(self, *args: Any) -> dict[str, torch.Tensor]:
        return {name: loss / len(self._learning) for name, loss in super()._terms(*args).items()}

    @property
    def gflops(self) -> float:
        """Billions of floating-point operations of training so far, in this process; see `schedule.Round`.

        What activation checkpointing computes again is not counted.
        """
        total = 0
        if self.teacher is not None:
            total += cost.multiply_accumulates(self.teacher, *self._tokens[None], head=True)
        for sparsity, widths in self.candidates.items():
            student = skeleton(self.model, widths)  # whose backward pass costs as much as two forward ones
            total += 3 * cost.multiply_accumulates(student, *self._tokens[sparsity], head=True)
        return 2e-9 * total

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate every candidate, keep the best one's weights, and stop training when patience has run out."""
        bare, sparsest = self.accelerator.unwrap_model(self.model), max(self.candidates)
        everything: dict[str, float] = {}
        figures: dict[str, float] = {}
        before, self._evaluated = dict(self.best), self.state.global_step
        for sparsity, widths in self.candidates.items():
            prefix = metric_key_prefix if sparsity == sparsest else f"{metric_key_prefix}_{100 * sparsity:g}"
            with narrowed(bare, widths):
                found = super().evaluate(eval_dataset, ignore_keys, prefix)
            everything |= found
            metric = self.metric({name.removeprefix(f"{prefix}_"): value for name, value in found.items()})
            figures[f"eval_candidate_{100 * sparsity:g}"] = metric
            if sparsity not in self.best or metric > self.best[sparsity][0]:
                self.best[sparsity] = metric, self._evaluated
            tradeoff = metric + self.tradeoff_lambda * sparsity
            if not self.kept or tradeoff > self.kept["tradeoff"]:
                weights = sliced(bare, widths).cpu().state_dict()
                self.kept = {"sparsity": sparsity, "tradeoff": tradeoff, "weights": weights}
        self._stale = self._stale + 1 if self.best == before else 0
        self.log(figures)
        self.control.should_training_stop |= self._stale >= self.patience
        self._timer.leave_out()
        return everything

    def _is_at_end(self) -> bool:
        return super()._is_at_end() or self._stale >= self.patience

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as DistillTrainer does; in the end, all candidates have been evaluated."""
        result = super().train(*args, **kwargs)
        if self._stale >= self.patience and self.state.global_step < self.state.max_steps:
            when = f"step {self.state.global_step:,} of {self.state.max_steps:,}"
            print(
                f"stopped at {when}: no candidate better in {counted(self._stale, 'evaluations')} (--patience)",
                flush=True,
            )
        if self.eval_dataset is not None and self._evaluated != self.state.global_step:
            self.evaluate()
        return result

    def best_model(self) -> Any:
        """Return the best candidate as a dense model with the weights that it had at its best."""
        made = sliced(self.model, self.candidates[self.kept["sparsity"]])
        made.load_state_dict(self.kept["weights"])
        return made

    def summary(self, name: str, teacher: float | None) -> Round:
        """Return what came of the round; name, teacher: see `schedule.Round`."""
        candidates = []
        for sparsity, (metric, step) in self.best.items():
            size = cost.parameters(skeleton(self.model, self.candidates[sparsity]))
            candidates.append(Candidate(sparsity, size, metric, metric + self.tradeoff_lambda * sparsity, step))
        steps, seconds = self.state.global_step, self._seconds + self._timer.seconds
        return Round(name, teacher, candidates, self.kept["sparsity"], steps, seconds, self.gflops)
