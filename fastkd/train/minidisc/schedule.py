"""What a schedule of distillations did: its rounds, their candidates, and which one was chosen (MiniDisc)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """How a sub-network did at its best evaluation.

    sparsity: the share of heads, and of neurons, that is pruned, 0 to 1. parameters: its number. metric: held-out, 0 to
    1, more is better. tradeoff: metric + lambda * sparsity. step: optimiser steps until that evaluation.
    """

    sparsity: float
    parameters: int
    metric: float
    tradeoff: float
    step: int


@dataclass(frozen=True)
class Round:
    """One training: of one sub-network, or of several that share their weights.

    name: in a few words. teacher: its sparsity, or None for the teacher that the schedule began with. candidates: by
    sparsity. chosen: the sparsity of the one that went on. steps: of the optimiser. seconds: of training, evaluations
    left out. gflops: billions of floating-point operations of training, teacher included: those of linear layers, two
    for each multiply-accumulate, forward and backward.
    """

    name: str
    teacher: float | None
    candidates: Sequence[Candidate]
    chosen: float
    steps: int
    seconds: float
    gflops: float

    @property
    def best(self) -> Candidate:
        """The candidate that went on."""
        return next(candidate for candidate in self.candidates if candidate.sparsity == self.chosen)


@dataclass(frozen=True)
class Trial:
    """Rounds that end in a student, each with what the one before chose as its teacher and first weights."""

    rounds: Sequence[Round]

    @property
    def assistants(self) -> list[float]:
        """The sparsities of what came between teacher and student."""
        return [entry.chosen for entry in self.rounds[:-1]]

    @property
    def student(self) -> Candidate:
        """How the student did."""
        return self.rounds[-1].best


@dataclass(frozen=True)
class Schedule:
    """All that was trained for a student: one trial, or one per assistant, of which the best student was kept.

    metric: the name of the candidates' metric. tradeoff_lambda: see Candidate. target: the student's sparsity.
    """

    metric: str
    tradeoff_lambda: float
    target: float
    trials: Sequence[Trial]

    @property
    def chosen(self) -> Trial:
        """The trial with the best student, the first of equal ones."""
        return max(self.trials, key=lambda trial: trial.student.metric)

    @property
    def rounds(self) -> list[Round]:
        """The rounds of all trials."""
        return [entry for trial in self.trials for entry in trial.rounds]

    @property
    def steps(self) -> int:
        """Optimiser steps of all rounds."""
        return sum(entry.steps for entry in self.rounds)

    @property
    def seconds(self) -> float:
        """Seconds of training in all rounds."""
        return sum(entry.seconds for entry in self.rounds)

    @property
    def gflops(self) -> float:
        """Billions of floating-point operations of training in all rounds."""
        return sum(entry.gflops for entry in self.rounds)

    def to_json(self) -> dict[str, Any]:
        """Return the schedule as what JSON knows."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Schedule:
        """Return the schedule that `to_json` gave. Raises KeyError or TypeError if the record is none."""
        trials = [Trial([round_from_json(entry) for entry in trial["rounds"]]) for trial in record["trials"]]
        return cls(record["metric"], record["tradeoff_lambda"], record["target"], trials)


def round_from_json(record: Mapping[str, Any]) -> Round:
    """Return the round that `dataclasses.asdict` made a record of."""
    candidates = [Candidate(**candidate) for candidate in record["candidates"]]
    return Round(**{**record, "candidates": candidates})
