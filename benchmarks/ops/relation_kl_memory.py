"""Peak memory of relation_kl, forward + backward, against the length; run by hand.

Writes a picture and what it shows to results/. Every figure comes from a process of its own, after a warm-up, and is
the largest of three: memory beyond inputs and gradients, as in the other benchmarks.
"""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from benchmarks import RESULTS
from benchmarks.harness.machine import machine
from benchmarks.harness.memory import peak_memory
from benchmarks.harness.saved import save
from benchmarks.ops._attention import IMPLEMENTATIONS
from benchmarks.ops.relation_kl import Shape, prepare

LENGTHS = (512, 1024, 2048, 4096, 8192)
BATCH, HEADS, TEACHER_WIDTH, STUDENT_WIDTH = 1, 2, 128, 64


def peaks(case: tuple[str, int]) -> list[float | None]:
    """In MiB, of three runs."""
    name, length = case
    device = torch.device("cpu")
    factories, _ = prepare(Shape(BATCH, HEADS, length, TEACHER_WIDTH, STUDENT_WIDTH), device)
    run = factories[name]()
    run()  # warm-up
    return [peak_memory(run, device)[1] for _ in range(3)]


def draw(results: dict[str, dict[int, float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, by_length in results.items():
        axes.loglog(list(by_length), list(by_length.values()), marker="o", label=name)
    lengths = sorted({length for by_length in results.values() for length in by_length})
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    widths = f"head widths {TEACHER_WIDTH // HEADS} and {STUDENT_WIDTH // HEADS}"
    axes.set(title=f"relation_kl, forward + backward\nbatch {BATCH}, {HEADS} heads, {widths}, fp32")
    axes.set(xlabel="length", ylabel="MiB beyond inputs and gradients, at the peak")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="L")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="default: %(default)s")
    options = parser.parse_args()

    print("L".rjust(14), *(str(length).rjust(8) for length in options.lengths), "  peak MiB")
    shape = {"batch": BATCH, "heads": HEADS, "teacher_width": TEACHER_WIDTH, "student_width": STUDENT_WIDTH}
    samples: list[dict] = []
    record, results = {"machine": machine(), "shape": shape, "results": samples}, {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name in options.implementations:
            measured = pool.map(peaks, [(name, length) for length in options.lengths], chunksize=1)
            if any(None in three for three in measured):
                parser.error("this system does not tell how much memory a process held")
            results[name] = {n: max(three) for n, three in zip(options.lengths, measured, strict=True)}
            samples += [
                {"implementation": name, "length": n, "peak_mib": max(three), "samples_mib": three}
                for n, three in zip(options.lengths, measured, strict=True)
            ]
            print(name.rjust(14), *(f"{peak:8.1f}" for peak in results[name].values()), flush=True)
            save(options.output / "relation_kl_memory.json", record)
    draw(results, options.output / "relation_kl_memory.png")


if __name__ == "__main__":
    main()
