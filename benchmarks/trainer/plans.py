"""What large teachers take of each GPU by miniend-e, as a table in Markdown: what `fastkd.train.plan` counts.

The student has 6 + 6 layers, 384 wide; both models are sharded, bf16 autocast, the teacher in bf16. GiB at the largest
moment of a step. Nothing is measured: the step is one of tensors without numbers.
"""

from __future__ import annotations

from fastkd.train.flags.arguments import parse
from fastkd.train.plan import GIB, spread, step

MEMORY = 80.0  # GiB of a GPU
PARTS = "weights", "optimiser", "communication", "gradients", "activations", "loss"


def table() -> str:
    rows = [("teacher", "GPUs", *PARTS, "sum", "largest at", f"fits {MEMORY:g} GiB"), ("---", *["---:"] * 10)]
    for teacher in ("t5-large", "google/flan-t5-xl", "google/flan-t5-xxl"):
        words = f"--config miniend-e --teacher {teacher} --bf16 --teacher_dtype bfloat16 --fsdp --use_cpu".split()
        alone = step(*parse(words, needs_data=False), "cuda")
        for processes in (1, 8, 64):
            found = spread(alone, True, "full", processes)
            items = found.moments[found.largest].items()
            sizes = [sum(size for name, size in items if name.endswith(part)) for part in PARTS]
            cells = [f"{size / GIB:.2f}" for size in (*sizes, found.peak)]
            fits = "yes" if found.peak <= MEMORY * GIB else "no"
            rows.append((teacher.removeprefix("google/"), str(processes), *cells, found.largest, fits))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table())
