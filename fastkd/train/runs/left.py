"""What a run leaves: the student's folder with its card, and the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.cache import write_whole
from ..common.processes import by_first
from ..minidisc import pages
from ..minidisc.schedule import Schedule
from ..objectives.methods import Method
from ..report import reports
from ..report.card import write_card
from ..report.outcome import Outcome
from ..report.page import table
from ..stages.run import Run
from ..training.trainer import DistillTrainer
from .facts import notes_on
from .prepared import Prepared


def leave(
    ready: Prepared,
    trainer: DistillTrainer,
    outcomes: list[Outcome],
    facts: dict[str, Any],
    schedule: Schedule | None = None,
) -> None:
    """Write the student, its card and its report, and print the report's table."""
    method = ready.run.flags.objective
    save(ready.run, trainer, method, facts, outcomes, ready.out)
    by_first(lambda: write_report(ready, outcomes, facts, schedule))
    where = f"Student, report.html and report.md in {ready.out}"
    print("\n".join(["", table(outcomes), "", *notes_on(method), where]))


def save(
    run: Run,
    trainer: DistillTrainer,
    method: Method,
    facts: dict[str, Any],
    outcomes: Sequence[Outcome],
    folder: Path,
) -> None:
    """Write a student, the configuration that repeats its run, and its model card.

    The card may be published, so it does not say where files lie.
    """
    trainer.save_model(str(folder))

    def describe() -> None:
        write_whole(folder / "config.yaml", run.flags.config_text(run.args))
        given = {name: Path(str(facts[name])) for name in ("texts", "teacher", "student") if name in facts}
        names = {name: path.name for name, path in given.items() if path.is_absolute() or path.exists()}
        teacher = run.flags.teacher if method.needs_teacher else None
        write_card(folder, method.summary, teacher, outcomes, facts | names, notes_on(method))

    by_first(describe)


def write_report(
    ready: Prepared,
    outcomes: Sequence[Outcome],
    facts: dict[str, Any],
    schedule: Schedule | None = None,
    lead: Sequence[str] = (),
) -> list[reports.Example]:
    """Write the report; return the examples that it shows."""
    run = ready.run
    rows = run.data.held_out_rows
    shown = rows.take(min(run.flags.report_examples, len(rows)))
    examples = list(zip(shown["source"], shown["target"], strict=True))
    besides = {"config": run.flags.config_text(run.args), **pages.shown(schedule)}
    reports.write(ready.out, outcomes, facts, notes_on(run.flags.objective), lead=lead, examples=examples, **besides)
    return examples
