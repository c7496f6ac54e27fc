"""A run up to the point where its folder is first written to."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.utils import SAFE_WEIGHTS_NAME

from ..common.errors import writing
from ..common.processes import by_first
from ..flags.arguments import TransformersArguments
from ..flags.fields import FastkdArguments
from ..models.loading import load_model
from ..stages.folders import check_outside, is_used, places, record_of, resumed, rounds, running
from ..stages.given import Teacher, load_given
from ..stages.identity import check_same_run, identity
from ..stages.planning import check_objective, check_optimizer
from ..stages.run import Run, with_data
from ..stages.teachers import get_teacher


@dataclass
class Prepared:
    """A run that may begin: nothing of what it needs is missing or bad.

    is_used: whether its folder holds a run that it replaces. checkpoint: what it continues from, if it does. teacher:
    None where the method needs none. started: when, by time.perf_counter.
    """

    run: Run
    out: Path
    is_used: bool
    checkpoint: Path | None
    identity: dict[str, Any]
    teacher: Teacher | None
    started: float

    def running(self) -> AbstractContextManager[None]:
        """Return the context in which the run lasts; see `folders.running`."""
        flags, args = self.run.flags, self.run.args
        return running(self.out, self.is_used, self.identity, flags.config_text(args), record_of(flags))


def prepare(flags: FastkdArguments, args: TransformersArguments) -> Prepared:
    """Return a run, its teacher trained and judged, but its folder as it was. Raises InputError if it cannot begin."""
    started, method = time.perf_counter(), flags.objective
    prunes, resuming = method.prunes, args.resume_from_checkpoint is not None

    def folders() -> tuple[Path, Path, bool, Path | None]:
        out, cache = places(flags, args)
        used = is_used(flags, out, resuming)
        check_outside(out, flags, cache, used)
        return out, cache, used, rounds(args, out) if resuming and prunes else resumed(args, out)

    out, cache, used, checkpoint = by_first(folders)
    check_optimizer(args)
    if checkpoint is not None and (checkpoint / SAFE_WEIGHTS_NAME).is_file():  # FSDP reads others, and all of them
        load_model(checkpoint, "checkpoint")
    # What is pruned is pruned as it is, and teaches in its own dtype.
    exact = replace(flags, teacher_dtype="float32") if prunes else flags
    given = load_given(exact, args, cache)
    check_objective(flags, method, given)
    with writing("cache_dir", cache):
        run = with_data(flags, args, cache, given)
        now = identity(run)
        if checkpoint is not None:
            by_first(lambda: check_same_run(checkpoint.parent, now))
        teacher = get_teacher(replace(run, flags=exact)) if method.uses_teacher else None
    return Prepared(run, out, used, checkpoint, now, teacher, started)
