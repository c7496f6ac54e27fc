"""How exact logit_kl is: relative errors against fp64, plain torch in fp32 beside fastkd; prints a Markdown table.

Cells are the worst of the six divergences, on the same fp32 logits. T tokens, V vocabulary. Divergences that saturate
when models of deviation 30 have nothing in common are left out of that row: there fp64 itself has no digits left.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fastkd

T, V = 64, 32100
SATURATING = ("jsd", "skew_reverse_kl", "tvd")
# what it is, the teacher's standard deviation, the student's distance from the teacher (None: unrelated models)
REGIMES = (
    ("unrelated models, deviation 1", 1, None),
    ("unrelated models, deviation 5", 5, None),
    ("unrelated models, deviation 30", 30, None),
    ("student 0.1 from the teacher, deviation 5", 5, 1e-1),
    ("student 0.001 from the teacher, deviation 5", 5, 1e-3),
    ("student 0.001 from the teacher, deviation 30", 30, 1e-3),
)


def value_and_gradient(student: Tensor, teacher: Tensor, divergence: str, impl: str) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    loss = fastkd.logit_kl(student, teacher, divergence=divergence, impl=impl)
    return loss.detach().double(), torch.autograd.grad(loss, student)[0].double()


def error(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


def main() -> None:
    print("| logits | plain torch: loss | gradient | fastkd: loss | gradient |\n|---|---:|---:|---:|---:|")
    for name, deviation, distance in REGIMES:
        torch.manual_seed(0)
        teacher = deviation * torch.randn(T, V)
        student = deviation * torch.randn(T, V) if distance is None else teacher + distance * torch.randn(T, V)
        worst = {"reference": [0.0, 0.0], "fused": [0.0, 0.0]}
        for divergence in fastkd.DIVERGENCES:
            if distance is None and deviation == 30 and divergence in SATURATING:
                continue
            exact = value_and_gradient(student.double(), teacher.double(), divergence, "reference")
            for impl, errors in worst.items():
                got = value_and_gradient(student, teacher, divergence, impl)
                errors[:] = [max(old, error(g, e)) for old, g, e in zip(errors, got, exact, strict=True)]
        print(f"| {name} | " + " | ".join(f"{x:.0e}" for errors in worst.values() for x in errors) + " |", flush=True)


if __name__ == "__main__":
    main()
