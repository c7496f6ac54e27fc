"""What the demo compares, over several seeds: what the start from a slice of the teacher gives, what the teacher adds.

    python -m benchmarks.studies.demo --folder runs/study --out benchmarks/results/demo.json

Every seed has first weights, an order and labelled examples of its own; the teacher is one for all. Beside the demo's
students stands one that learns from the teacher's answers as from labels, without a loss between the two models.
Another call with the same FOLDER goes on where this one was cut off. OUT gets every student of every seed, and a figure
beside it. Printed is the table of docs/performance.md, held-out exact match in percent; --write writes it there.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.harness.machine import machine
from benchmarks.harness.saved import save
from benchmarks.studies._common import Runs, draw
from fastkd.train import cli

ANSWERS = "teacher's answers as labels"
# A method without a teacher has no answers either: the losses between the models stay, weighted by next to nothing.
RUNS = {"demo": ["--demo"], "answers": ["--config", "demo", "--weights", "logit_kl=1e-9,hidden_cka=1e-9"]}
STUDENTS = {
    "scratch": "scratch: random start, 200 labels",
    "sliced start": "sliced start: the same labels",
    ANSWERS: "sliced start, teacher's answers as further labels",
    "hsm-cka": "distilled: sliced start, answers, and the losses of `hsm-cka`",
}
LEAST_GAIN = 20  # points ahead of scratch, in the mean
PAGE = ROOT / "docs" / "performance.md"
BEGIN = "<!-- the demo over seeds: python -m benchmarks.studies.demo --write writes this -->"
END = "<!-- end of the demo over seeds -->"


def run(name: str, seed: int, folder: Path, teacher: Path | None) -> list[dict[str, Any]]:
    """Run the demo, or its companion, with one seed; return a record of each model."""
    out = folder / f"{name}-{seed}"
    flags = [*RUNS[name], "--seed", str(seed), "--output_dir", str(out), "--cache_dir", str(folder / "cache")]
    flags += ["--disable_tqdm", "true", "--eval_strategy", "no"]
    flags += ["--teacher", str(teacher)] if teacher else []
    flags += ["--overwrite_output_dir"] if name != "demo" else []
    if cli.main(flags):
        raise SystemExit(f"benchmarks.studies.demo: {' '.join(flags)} failed")
    models = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["models"]
    names = [ANSWERS if name == "answers" and model["name"] != "teacher" else model["name"] for model in models]
    return [
        {
            "run": name,
            "seed": seed,
            "student": called,
            "exact_match": model["metrics"]["exact_match"],
            **{key: model[key] for key in ("parameters", "steps", "seconds_per_step", "token_accuracy", "loss")},
        }
        for called, model in zip(names, models, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, print the table; return 0 if distillation is ahead of scratch as it must be, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--teacher", type=Path, help="that of a demo before; without it, that of the first seed's demo")
    parser.add_argument("--folder", type=Path, required=True, help="where runs and their records stay")
    parser.add_argument("--out", type=Path, help="JSON file of what was measured; a figure goes beside it")
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")
    args = parser.parse_args(argv)
    records, runs = [], Runs(args.folder)
    for seed, name in itertools.product(range(1, args.seeds + 1), RUNS):
        own = None if (name, seed) == ("demo", 1) else args.folder / "demo-1" / "teacher"
        once = functools.partial(run, name, seed, args.folder, args.teacher or own)
        records += runs.get({"run": name, "seed": seed, "teacher": str(args.teacher)}, once)
    text, is_met = tell(records)
    print(f"\n{text}\n\nahead of scratch as it must be: {'met' if is_met else 'NOT MET'}")
    if args.out:
        save(args.out, {"machine": machine(), "students": records})
        scores = {name: [r["exact_match"] for r in records if r["student"] == name] for name in STUDENTS}
        draw(args.out.with_suffix(".png"), "The demo over seeds", "exact match, %", scores)
    if args.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return 0 if is_met else 1


def tell(records: list[dict[str, Any]]) -> tuple[str, bool]:
    """Return the table with a sentence on the gains, and whether distillation is ahead of scratch as it must be."""
    scores = {name: {r["seed"]: r["exact_match"] for r in records if r["student"] == name} for name in STUDENTS}
    size = {record["student"]: record["parameters"] / 1e6 for record in records}
    teacher = next(record for record in records if record["student"] == "teacher")
    lines = ["| | parameters | exact match (%) | against the sliced start | ahead of scratch |", f"|---|{'---:|' * 4}"]
    lines.append(f"| teacher | {size['teacher']:.2f} M | {teacher['exact_match']:.1f} | | |")
    for name, title in STUDENTS.items():
        own, ahead = scores[name], _gains(scores[name], scores["scratch"])
        deviation = statistics.stdev(own.values()) if len(own) > 1 else 0.0
        start = f"{statistics.mean(_gains(own, scores['sliced start'])):+.1f}" if name != "sliced start" else ""
        wins = f"{sum(gain > 0 for gain in ahead)} of {len(ahead)}" if name != "scratch" else ""
        score = f"{statistics.mean(own.values()):.1f} +- {deviation:.1f}"
        lines.append(f"| {title} | {size[name]:.2f} M | {score} | {start} | {wins} |")
    gains, above = _gains(scores["hsm-cka"], scores["scratch"]), _gains(scores["hsm-cka"], scores["sliced start"])
    losses = _gains(scores["hsm-cka"], scores[ANSWERS])
    lines.append(
        f"\nMeans and deviations over {len(gains)} seeds, with one teacher. The distilled student is "
        f"{statistics.mean(gains):.1f} points ahead of scratch, and most of that is the start. Of the "
        f"{statistics.mean(above):+.1f} points against the start with labels alone (ahead in "
        f"{sum(x > 0 for x in above)} of {len(above)} seeds), "
        f"{statistics.mean(losses):+.1f} come from the losses between the models and the rest "
        "from the teacher's answers, which serve as labels where there are none."
    )
    return "\n".join(lines), min(gains) > 0 and statistics.mean(gains) >= LEAST_GAIN


def _gains(own: dict[int, float], others: dict[int, float]) -> list[float]:
    return [own[seed] - others[seed] for seed in sorted(own.keys() & others.keys())]


if __name__ == "__main__":
    sys.exit(main())
