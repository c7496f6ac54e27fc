"""MiniDisc (Zhang et al., EACL 2024 Findings, arXiv 2205.14570): prune a teacher, pick its assistant, distil the rest.

A schedule is made of rounds. In a round, sub-networks of one pruned model, the candidates, learn from a teacher,
several in every step and sharing their weights ("sandwich training"). The best by the lambda-tradeoff, held-out metric
+ lambda * sparsity, goes on: it is the teacher, and the first weights, of the next round. MaxiDisc, the baseline,
makes rounds of one candidate only: an assistant and its student for every sparsity of the grid.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from ..common.errors import InputError
from ..flags.fields import FastkdArguments
from ..stages.run import Run
from .prune import of_kind, widths_at
from .rounds import Distiller, Parent, Result, compared_figures
from .schedule import Schedule, Trial


def check_schedule(run: Run, scores: Mapping[str, torch.Tensor], config: Any) -> None:
    """Raise InputError if the schedule cannot be run to its end, before any of it is.

    That is if no head, or no neuron, is left at the target, if the method does not fit a candidate, or if the selection
    metric is none of the data's. config: the teacher's.
    """

    flags, method = run.flags, run.flags.objective

    def leaves_both(sparsity: float) -> bool:
        left = widths_at(scores, sparsity)
        return all(any(left[name] for name in names) for names in of_kind(scores).values())

    if not leaves_both(flags.target_sparsity):
        reachable = ", ".join(f"{s:g}" for s in flags.grid if s > 0 and leaves_both(s)) or "none"
        raise InputError(
            f"--target_sparsity {flags.target_sparsity:g} would leave no head, or no neuron, of this teacher "
            f"(reachable: {reachable})"
        )
    for sparsity in trained_sparsities(flags):
        narrower = copy.deepcopy(config)
        narrower.widths = widths_at(scores, sparsity)
        try:
            method.check_fits(narrower, config)
        except ValueError as error:
            raise InputError(f"--{error} (at sparsity {sparsity:g})") from error
    compared_figures(run)


def trained_sparsities(flags: FastkdArguments) -> list[float]:
    """Return the sparsities of all that the schedule may train."""
    target = flags.target_sparsity
    if flags.assistant_sparsity is not None:
        return [flags.assistant_sparsity, target]
    if flags.objective.schedule == "maxidisc":
        return [sparsity for sparsity in flags.grid if 0 < sparsity <= target]
    least = flags.truncation if flags.objective.schedule == "minidisc" and flags.assistants else target
    return [sparsity for sparsity in flags.grid if least <= sparsity <= target]


def run_schedule(distiller: Distiller, teacher: Parent) -> tuple[Schedule, list[Result]]:
    """Run the schedule of the flags; return it, and the rounds of its best trial, the student's last."""
    flags, assistant = distiller.run.flags, distiller.run.flags.assistant_sparsity
    if assistant is None and distiller.method.schedule == "minidisc":
        trials = [_by_tradeoff(distiller, teacher)]
    else:
        assistants = [0.0 if assistant is None else assistant]
        if distiller.method.schedule == "maxidisc":
            assistants = [sparsity for sparsity in flags.grid if sparsity < flags.target_sparsity]
        trials = [_by_assistant(distiller, teacher, sparsity) for sparsity in assistants]
    done = [Trial([result.round for result in trial]) for trial in trials]
    schedule = Schedule(distiller.metric_name, flags.tradeoff_lambda, flags.target_sparsity, done)
    return schedule, trials[done.index(schedule.chosen)]


def _by_assistant(distiller: Distiller, teacher: Parent, sparsity: float) -> list[Result]:
    """Distil an assistant from the teacher, and the student from it; at sparsity 0 the assistant is the teacher."""
    target = [distiller.run.flags.target_sparsity]
    if sparsity == 0:
        return [distiller.round("student of the teacher", teacher, target)]
    assistant = distiller.round(f"assistant of {100 * sparsity:g} %", teacher, [sparsity])
    return [assistant, distiller.round(f"student of {100 * sparsity:g} %", assistant.as_parent(), target)]


def _by_tradeoff(distiller: Distiller, teacher: Parent) -> list[Result]:
    """Pick assistants by the lambda-tradeoff, one after the other, until they are enough or the target is picked."""
    flags, results, parent = distiller.run.flags, [], teacher
    candidates = trained_sparsities(flags)
    for i in range(flags.assistants):
        results.append(distiller.round(f"round {i + 1}", parent, candidates))
        chosen = results[-1].round.chosen
        if chosen == flags.target_sparsity:
            return results
        candidates, parent = [s for s in candidates if s > chosen], results[-1].as_parent()
    return [*results, distiller.round("student", parent, [flags.target_sparsity])]
