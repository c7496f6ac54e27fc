"""What is counted: kernels, which of their loops, what an element is, today's figures and budgets.

A loop is found by what its normal trip executes (`via`): the shortest trip that executes that much is the normal one.
Careful branches, rescaling when a maximum moves and unaligned ends of rows are longer and stay out. Where several loops
have such a trip, the shortest are counted: plain, and not careful, variants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TRITON = "3.7"  # of which `at_most` is; another compiles other machine code
SCORES, CENTRED = ("BLOCK_M", "BLOCK_N"), ("BLOCK_N", "BLOCK_D")


@dataclass(frozen=True)
class Part:
    """A kernel of an op."""

    title: str
    module: str  # of benchmarks/gpu/compile
    case: tuple[Any, ...]  # of that module, without the target
    kernel: str  # its name there; of csrc/cuda (divergence, dtype)
    tile: tuple[str | int, ...]  # elements of a trip of a block: constants of the launch, or numbers, multiplied
    at_most: tuple[float, float, int]  # on sm_90 today: lane-instructions and exponentials an element, barriers a trip
    via: tuple[tuple[str, int], ...] = (("MUFU.EX2", 1),)
    loops: int = 1  # how many to add up; of 0 it has none, and all of it is counted


@dataclass(frozen=True)
class Op:
    """What one call does, in one or more kernels."""

    name: str
    element: str
    elements: float  # of `problem`
    problem: str
    parts: tuple[Part, ...]
    floor: tuple[float, float, float]  # what an element takes at least: bytes of device memory, FLOPs, exponentials
    budget: float | None = None  # lane-instructions an element
    exponentials: float | None = None  # the same
    products: tuple[float, float] = (0, 0)  # torch's, of what kernels have written: bytes they read, FLOPs, an element


def _rows(dtype: str, which: str, at_most: tuple[float, float, int]) -> Part:
    return Part(which, "rows", (which, "forward_kl", dtype, dtype, False), which, ("BLOCK",), at_most)


def _cuda(dtype: str, which: str, at_most: tuple[float, float, int]) -> Part:
    """A thread's trip is two chunks of 16 bytes. Statistics copy those to come, gradients read rows kept."""
    columns = 8 if dtype == "fp32" else 16
    via = {"MUFU.EX2": 2 * columns}
    if which == "statistics":
        via |= {"LDGSTS.E.BYPASS.128": 4, "STG": 0}
    else:  # of the rows' dtype
        via |= {"STG.E.128": 2, "F2FP": 0} if dtype == "fp32" else {"STG.E.128": 2, "F2FP.BF16": 1}
    return Part(which, "cuda", (), f"ForwardKL {dtype}", (256, columns), at_most, tuple(via.items()))


def _topk(which: str, at_most: tuple[float, float, int]) -> Part:
    """Blocks that hold none of the teacher's ids, as most do."""
    via = {"MUFU.EX2": 16} | ({"STG.E.128": 4} if which == "gradient" else {})
    case = (which, "fp32", 64, "plain")
    return Part(which, "topk", case, which, ("GROUPS", "WIDTH"), at_most, tuple(via.items()))


def _attention(
    title: str, op: str, divergence: str, widths: tuple[int, int], kernel: str, at_most: tuple[float, float, int],
    masked: bool = False, loops: int = 1,
) -> Part:  # fmt: skip
    case = (op, divergence, "bf16", *widths, False, masked)
    via = (("LDG", 1),) if kernel == "diagonals" else (("MUFU.EX2", 1),)
    return Part(title, "attention", case, kernel, SCORES, at_most, via, loops)


def _heads(op: str, masked: bool, *figures: tuple[float, float, int]) -> tuple[Part, ...]:
    """attention_kl between heads of 64."""
    kernels = ("forward", "scores", "diagonals")
    titles = ("forward", "gradient of scores", "gradient of the bias")
    return tuple(
        _attention(title, op, "forward_kl", (64, 64), kernel, figure, masked)
        for title, kernel, figure in zip(titles, kernels, figures, strict=False)
    )


def _relation(divergence: str, masked: bool, *figures: tuple[float, float, int]) -> tuple[Part, ...]:
    """relation_kl from heads of 24 to heads of 12, as of MiniLM."""
    kernels = {"forward": "forward", "gradient": "gradient"}
    return tuple(
        _attention(
            title, "relation", divergence, (12, 24), kernel, figure, masked,
            loops=2 if divergence == "jsd" and title == "forward" else 1,
        )
        for (title, kernel), figure in zip(kernels.items(), figures, strict=True)
    )  # fmt: skip


LOGITS = "T 8192, V 128256"
SEQUENCES = "B 32, A 32, L 512"
N_LOGITS, N_SCORES = 8192 * 128256.0, 32 * 32 * 512 * 512.0


def _logits(name: str, part: Part, floor_bytes: float, budget: float | None = None, exponentials: float = 2) -> Op:
    return Op(name, "column", N_LOGITS, LOGITS, (part,), (floor_bytes, 0, exponentials), budget)


def _scores(
    name: str, parts: tuple[Part, ...], flops: float, budget: float | None = None, exponentials: float | None = None
) -> Op:
    """Of attention_kl, gradients of scores in bf16 are read from device memory twice, by products of heads of 64."""
    products = (4, 256) if name.startswith("attention") else (0, 0)
    return Op(name, "score", N_SCORES, SEQUENCES, parts, (0, flops, 4), budget, exponentials, products)


OPS = (
    _logits("logit_kl statistics, fp32", _rows("fp32", "stats", (19.5, 2.5, 0)), 8, 35),
    _logits("logit_kl statistics, bf16", _rows("bf16", "stats", (19.5, 2.25, 0)), 4, 35),
    _logits("logit_kl gradient, fp32", _rows("fp32", "gradient", (12.2, 2, 0)), 12, 28),
    _logits("logit_kl gradient, bf16", _rows("bf16", "gradient", (14, 2, 0)), 6, 28),
    _logits("logit_kl statistics, C++, fp32", _cuda("fp32", "statistics", (27.7, 2, 0)), 8),
    _logits("logit_kl statistics, C++, bf16", _cuda("bf16", "statistics", (22.9, 2, 0)), 4),
    _logits("logit_kl gradient, C++, fp32", _cuda("fp32", "gradient", (15.5, 2, 0)), 4),
    _logits("logit_kl gradient, C++, bf16", _cuda("bf16", "gradient", (14.9, 2, 0)), 2),
    _logits("logit_kl of a top-k, statistics", _topk("stats", (12.4, 1.25, 0)), 4, exponentials=1),
    _logits("logit_kl of a top-k, gradient", _topk("gradient", (5.7, 1, 0)), 8, exponentials=1),
    _scores("relation_kl", _relation("forward_kl", False, (14, 2.13, 2), (29, 2, 2)), 192, 50, 4),
    _scores("relation_kl, mask", _relation("forward_kl", True, (15.8, 2.13, 3), (30.7, 2, 2)), 192),
    _scores("relation_kl JSD", _relation("jsd", False, (92.7, 5.25, 4), (89.8, 4, 2)), 192, 200),
    _scores("attention_kl", _heads("attention", False, (18.4, 2.25, 2), (25, 2, 2)), 768, 60, 4),
    _scores(
        "attention_kl, T5's bias",
        _heads("diagonals", False, (23.8, 2.25, 2), (30.2, 2, 2), (7.5, 0, 0)),
        768,
        85,
        4,
    ),
    _scores(
        "attention_kl, T5's bias, mask",
        _heads("diagonals", True, (26.4, 2.25, 2), (32.6, 2, 2), (7.5, 0, 0)),
        768,
    ),
    Op(
        "cka_loss, means and centring",
        "number",
        12 * 16384 * (768 + 512),
        "12 layers, N 16384, 768 and 512",
        (
            Part("means", "cka", ("bf16", 12, False), "means", CENTRED, (8.8, 0, 2), (("LDGSTS", 1),)),
            Part("centring", "cka", ("bf16", 12, False), "centre", CENTRED, (10.5, 0, 0), loops=0),
        ),
        (6, 0, 0),
        20,
    ),
)
