"""A training step's gradients from a teacher's cache (`--teacher_cache`), against the same step with the teacher.

The cache is made before, and its files are mapped; a step reads its examples from them. What no cache can save is the
limit: the student alone, its backward pass from a sum of its hidden states, without any head. "hidden" is the same
objective as without a cache; "topk:64" is another one, which is exact for the cache that both its rows read.
Memory is counted above models, inputs and gradients, and so without the teacher's weights, which a run from a cache
does not load.

Bx x Lx encoder tokens, B x Lz decoder tokens, V pieces.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.command import main
from benchmarks.harness.problem import Problem, Run, Target, of_another_objective
from benchmarks.trainer.train_step import Shape, batch_of, gradients, model_of, models_alone, models_of, trainer_of

LIMIT = "student alone"
IMPLEMENTATIONS = ("fastkd", "uncached")
TARGETS = {"hidden": Target("uncached", 0.62), "topk:64": Target("uncached", 0.58)}


def cached(shape: Shape, text: str, teacher: Any, batch: dict[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """What stands for a teacher of whom a batch's examples are kept, and the batch with their numbers."""
    import numpy as np

    from fastkd.train.objectives.methods import METHODS
    from fastkd.train.teaching.cached import NUMBERS, CachedTeacher
    from fastkd.train.teaching.kinds import Kind
    from fastkd.train.teaching.store import Manifest, Store
    from fastkd.train.training.forward import Needs, forward

    kind, temperature = Kind.parse(text), METHODS[shape.method].temperature
    with torch.no_grad():
        hidden, head = forward(teacher, batch, Needs())["hidden"]
        given = [states[keep] for states, keep in zip(hidden, batch["labels"] != -100, strict=True)]
        kept = kind.keep(given, head, temperature, [(0, i) for i in range(shape.batch)])
    lengths = [len(states) for states in given]
    store = Store(Path(tempfile.mkdtemp()), Manifest({}, {}, shape.batch, sum(lengths), shape.batch, 0))
    store.write(0, {name: torch.cat([columns[name] for columns in kept]) for name in kept[0]}, np.array(lengths))
    head = head._replace(weight=head.weight.detach()) if kind.name == "hidden" else None
    return CachedTeacher(store, teacher.config, kind, head, 1, temperature), {
        **batch,
        NUMBERS: list(range(shape.batch)),
    }


def prepare(shape: Shape, kind: str, device: torch.device) -> tuple[dict[str, Callable[[], Run]], Run]:
    student, teacher = models_of(shape, device)
    batch = {name: tensor.to(device) for name, tensor in batch_of(shape).items()}

    def by_fastkd() -> Run:
        kept, numbered = cached(shape, kind, teacher, batch)
        made = trainer_of(shape, student, kept)
        return lambda: gradients(made.compute_loss(student, numbered), student)

    def uncached() -> Run:
        made = trainer_of(shape, student, teacher)

        def run() -> tuple[Tensor, ...]:
            return gradients(made.compute_loss(student, batch), student)

        return run if kind == "hidden" else of_another_objective(run)

    def oracle() -> tuple[Tensor, ...]:
        exact, its = (model_of(shape, sizes, i, torch.float64).to(device) for i, sizes in enumerate(shape.sizes, 1))
        if kind == "hidden":
            return gradients(trainer_of(shape, exact, its).compute_loss(exact, batch), exact)
        kept, numbered = cached(shape, kind, teacher, batch)
        return gradients(trainer_of(shape, exact, kept).compute_loss(exact, numbered), exact)

    return {"fastkd": by_fastkd, "uncached": uncached, LIMIT: lambda: models_alone((student,), batch)}, oracle


def problem(shape: Shape, kind: str, device: torch.device) -> Problem:
    return Problem(
        title=f"{shape} from {kind}",
        unit="GFLOP/s",
        work=shape.student_flops,
        limit=LIMIT,
        implementations=IMPLEMENTATIONS,
        targets=(TARGETS[kind],),
        prepare=partial(prepare, shape, kind, device),
    )


def problems(device: torch.device, quick: bool = False) -> list[Problem]:
    shape = Shape("kd", 2, 40, 16, 512, tiny=True) if quick else Shape("kd")
    return [problem(shape, kind, device) for kind in TARGETS]


if __name__ == "__main__":
    main(problems, __doc__)
