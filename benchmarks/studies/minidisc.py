"""MiniDisc against MaxiDisc, and other baselines, on the embedded classification task: scores, cost, and tradeoffs.

    python -m benchmarks.studies.minidisc --seeds 3 --out benchmarks/results/minidisc.json

A small EncT5 learns from which package of the standard library a documentation string comes; then each method makes a
student of it, with several seeds. The task is that of `fastkd-train --task classification`, but with a fifth of its
texts held out, as scores of the usual twentieth would have steps of more than half a point. Printed are each method's
mean score, steps, floating-point operations and seconds of training, what must be reached, and how well the tradeoff of
a candidate in MiniDisc's one round tells the score of the student that MaxiDisc distils by that candidate. Another call
with the same folder goes on where this one was cut off. OUT gets every schedule, and a figure beside it.
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

from benchmarks.harness.machine import machine
from benchmarks.harness.saved import save
from benchmarks.studies._common import Runs, draw
from fastkd.train import cli
from fastkd.train.data import corpus
from fastkd.train.minidisc.schedule import Schedule

ARMS: dict[str, list[str]] = {
    "minidisc": ["--method", "minidisc"],  # whose default is that four of the candidates learn in a step
    "minidisc, all a step": ["--method", "minidisc", "--sandwich_size", "0"],  # as in the paper
    "assistant of 70 %": ["--method", "minidisc", "--assistant_sparsity", "0.7"],
    "no assistant": ["--method", "minidisc", "--assistants", "0"],
    "prune-kd": ["--method", "prune-kd"],
    "prune-pkd": ["--method", "prune-pkd"],
    "maxidisc": ["--method", "maxidisc"],
}
SETTINGS = ("seed", "target", "steps", "teacher_steps", "width", "layers", "length", "rate")  # of every run
HELD_OUT_PERCENT = 20
MOST_COST, MOST_LOSS = 0.2, 1.0  # of MaxiDisc's operations; in points of its score


def write_data(folder: Path) -> list[str]:
    """Write the embedded classes as train.jsonl and dev.jsonl; return the flags that name them."""
    sides: dict[str, list[str]] = {"train": [], "dev": []}
    for text, label in corpus.embedded_classes():
        side = "dev" if corpus.is_held_out(text, HELD_OUT_PERCENT) else "train"
        sides[side].append(json.dumps({"text": text, "label": label}))
    for side, lines in sides.items():
        (folder / f"{side}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ["--train_file", str(folder / "train.jsonl"), "--eval_file", str(folder / "dev.jsonl")]


def run(arm: str, seed: int, args: argparse.Namespace, data: Sequence[str]) -> dict[str, Any]:
    """Run one method with one seed; return its schedule, as JSON has it."""
    out = args.folder / f"{arm.replace(' ', '-')}-{seed}"
    flags = [
        *ARMS[arm], *data, "--task", "classification", "--architecture", "enct5", "--output_dir", str(out),
        "--cache_dir", str(args.folder / "cache"), "--target_sparsity", str(args.target),
        "--max_steps", str(args.steps),
        "--train_teacher", "--teacher_learning_rate", "2e-3", "--adam_beta2", "0.98",
        "--per_device_train_batch_size", "32", "--teacher_layers", str(args.layers),
        "--teacher_d_model", str(args.width),
        "--teacher_steps", str(args.teacher_steps), "--max_source_length", str(args.length), "--seed", str(args.seed),
        "--data_seed", str(seed), "--lr_scheduler_type", "linear", "--warmup_steps", "0.1", "--max_grad_norm", "5",
        "--learning_rate", str(args.rate), "--eval_steps", "0.1", "--save_strategy", "no", "--disable_tqdm", "true",
        "--train_sampling_strategy", "group_by_length", "--report_examples", "0", "--overwrite_output_dir",
    ]  # fmt: skip
    code = cli.main(flags)
    if code:
        raise SystemExit(code)
    return json.loads((out / "metrics.json").read_text(encoding="utf-8"))["schedule"]


def correlation(minidisc: Schedule, maxidisc: Schedule) -> tuple[float, float] | None:
    """Return Pearson's correlations of the candidates' (tradeoffs, metrics) with the scores of MaxiDisc's students."""
    students = {trial.assistants[0]: trial.student.metric for trial in maxidisc.trials if trial.assistants}
    shared = [c for c in minidisc.rounds[0].candidates if c.sparsity in students]
    columns = [[c.tradeoff for c in shared], [c.metric for c in shared], [students[c.sparsity] for c in shared]]
    if len(shared) < 3 or any(len(set(column)) < 2 for column in columns):
        return None  # a constant has no correlation
    return statistics.correlation(columns[0], columns[2]), statistics.correlation(columns[1], columns[2])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; return 0 whatever it finds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="of the order of the data (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the teacher (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="methods to run")
    parser.add_argument("--target", type=float, default=0.95, help="sparsity of the student (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps of each round (default: %(default)s)")
    parser.add_argument("--teacher_steps", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--width", type=int, default=192, help="of the teacher (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="of the teacher's encoder (default: %(default)s)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a text (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate (default: %(default)s)")
    where = Path("runs/minidisc")
    parser.add_argument("--folder", type=Path, default=where, help="of runs and their cache (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file of what was measured; a figure goes beside it")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    data, runs = write_data(args.folder), Runs(args.folder)
    found: dict[str, list[Schedule]] = {arm: [] for arm in args.arms}
    for arm, order in itertools.product(args.arms, range(args.seeds)):
        settings = {"arm": arm, "order": order, **{name: getattr(args, name) for name in SETTINGS}}
        schedule = runs.get(settings, functools.partial(run, arm, order, args, data))
        found[arm].append(Schedule.from_json(schedule))
    tell(found, args)
    return 0


def tell(found: dict[str, list[Schedule]], args: argparse.Namespace) -> None:
    """Print what was found, and write it to the file that was asked for."""
    rows = {arm: _summary(schedules) for arm, schedules in found.items()}
    best = rows.get("maxidisc")
    print(
        f"\n{'method':20} {'score (%)':>16} {'of maxidisc':>12} {'steps':>7} {'TFLOP':>8} {'seconds':>8}  assistants, %"
    )
    for arm, row in rows.items():
        share = f"{row['tflop'] / best['tflop']:.3f}x" if best else "-"
        score = f"{row['score']:.2f} +- {row['deviation']:.2f}"
        picked = ", ".join(f"{100 * s:g}" if s is not None else "none" for s in row["assistants"])
        print(
            f"{arm:20} {score:>16} {share:>12} {row['steps']:7.0f} {row['tflop']:8.2f} {row['seconds']:8.1f}  {picked}"
        )
    for arm, row in rows.items():
        if best and arm.startswith("minidisc"):
            share, loss = row["tflop"] / best["tflop"], best["score"] - row["score"]
            print(
                f"\n{arm}: {share:.3f}x of maxidisc's operations: {_judged(share <= MOST_COST)} (at most {MOST_COST}x)"
            )
            print(f"{arm}: {loss:+.2f} points below maxidisc: {_judged(loss <= MOST_LOSS)} (at most {MOST_LOSS})")
    correlations = {}
    for arm in found:
        if best and arm.startswith("minidisc"):
            pairs = [correlation(*both) for both in zip(found[arm], found["maxidisc"], strict=True)]
            correlations[arm] = pairs
            shown = "; ".join(f"{p[0]:+.2f} ({p[1]:+.2f})" if p else "undefined" for p in pairs)
            print(f"\n{arm}: correlation of tradeoff (of metric alone) with maxidisc's students, by seed: {shown}")
    if args.out:
        record = {
            "machine": machine(),
            "settings": {name: getattr(args, name) for name in ("seeds", *SETTINGS)},
            "methods": rows,
            "correlations": correlations,
            "schedules": {arm: [s.to_json() for s in schedules] for arm, schedules in found.items()},
        }
        save(args.out, record)
        scores = {arm: _scores(schedules) for arm, schedules in found.items()}
        draw(args.out.with_suffix(".png"), "Students by method", "mean of accuracy and F1, %", scores)


def _scores(schedules: Sequence[Schedule]) -> list[float]:
    return [100 * schedule.chosen.student.metric for schedule in schedules]


def _summary(schedules: Sequence[Schedule]) -> dict[str, Any]:
    scores = _scores(schedules)
    return {
        "score": statistics.mean(scores),
        "deviation": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "steps": statistics.mean(schedule.steps for schedule in schedules),
        "tflop": statistics.mean(schedule.gflops for schedule in schedules) / 1e3,
        "seconds": statistics.mean(schedule.seconds for schedule in schedules),
        "assistants": [next(iter(schedule.chosen.assistants), None) for schedule in schedules],
    }


def _judged(is_met: bool) -> str:
    return "met" if is_met else "NOT MET"


if __name__ == "__main__":
    sys.exit(main())
