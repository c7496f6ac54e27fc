"""Calls every op on small inputs, forward and backward: `python -m tests.sanitize`, for compute-sanitizer to watch.

Without a GPU the calls run in Triton's interpreter, which shows that they are right, and nothing about memory.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd.divergence import DIVERGENCES
from fastkd.ops.drivers.divergence_rows import gpu_row_kernels

from . import conftest  # noqa: F401  # Triton's interpreter, which must be chosen before Triton is imported
from .cases import (
    ATTENTION_KL,
    ATTENTION_OPS,
    CKA_LOSS,
    DIVERGENCE_OPS,
    LINEAR_KL,
    LOGIT_KL,
    RELATION_KL,
    TOKEN_OPS,
    UNRELATED,
    Op,
    running_on,
    to,
    value_and_gradients,
)


def _top_hidden(teacher_hidden: Tensor, teacher_weight: Tensor, teacher_bias: Tensor, **options: Any) -> Tensor:
    teacher = fastkd.TopK.from_hidden(teacher_hidden, fastkd.Head(teacher_weight, teacher_bias), 8)
    return fastkd.linear_kl(teacher_hidden=teacher, **options)


TOPK = Op("linear_kl of a TopK", _top_hidden, LINEAR_KL.make, LINEAR_KL.student)  # logit_kl has the same kernel
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LONG_ROWS = (9000, 40000, 140000)  # for kernels that keep a row in one or several multiprocessors


def ways(op: Op) -> dict[str, Callable[[], contextlib.AbstractContextManager]]:
    """The ways in which a GPU computes an op, by name: contexts in which a call goes this way."""
    return gpu_row_kernels() if op in (LOGIT_KL, LINEAR_KL) else {"": contextlib.nullcontext}


def calls(
    divergences: list[str], dtypes: list[torch.dtype], long_rows: tuple[int, ...]
) -> Iterator[tuple[Op, torch.dtype, dict, dict]]:
    """(op, dtype, sizes, options); without long rows, little else"""
    for dtype in dtypes:
        for divergence in divergences:
            for op in DIVERGENCE_OPS:
                yield op, dtype, {}, {"divergence": divergence}
            for op in [*TOKEN_OPS, TOPK]:
                tokens = 7
                some = {"labels": torch.arange(tokens), "weight": torch.arange(tokens) % 3 / 2, "reduction": "none"}
                weights = {"ce_weight": 0.5, "temperature": 2.0}
                yield op, dtype, {"tokens": tokens}, {"divergence": divergence, **some, **weights}
            for op in ATTENTION_OPS:
                mask = torch.arange(11) < torch.tensor([[11], [7]])
                yield op, dtype, {"queries": 11}, {"divergence": divergence, "causal": True, "key_mask": mask}
            for vocabulary in long_rows:
                yield LOGIT_KL, dtype, {"tokens": 3, "vocabulary": vocabulary}, {"divergence": divergence}
        yield ATTENTION_KL, dtype, {"queries": 13, "keys": 29}, {}
        if long_rows:
            yield RELATION_KL, dtype, {"batch": 1, "queries": 150}, {}
        for tokens in (9, 40):  # by Grams and by covariances
            yield CKA_LOSS, dtype, {"tokens": tokens}, {"mask": torch.arange(tokens) % 4 != 1}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--divergences", nargs="+", choices=list(DIVERGENCES), default=list(DIVERGENCES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--ops", nargs="+", metavar="OP", help="by name; all of them by default")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    dtypes, done = [DTYPES[name] for name in options.dtypes], 0
    with running_on("triton") as (impl, device):
        long_rows = LONG_ROWS if device.type == "cuda" else ()
        for op, dtype, sizes, keywords in calls(options.divergences, dtypes, long_rows):
            if options.ops and op.name not in options.ops:
                continue
            inputs = to(op.make(UNRELATED, **sizes), dtype, device)
            keywords = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in keywords.items()}
            for name, way in ways(op).items():
                results: Any
                with way():
                    loss, results = value_and_gradients(op, inputs, impl=impl, **keywords)
                wrong = [key for key, x in {"loss": loss, **results}.items() if not x.isfinite().all()]
                assert not wrong, f"{op.name} {dtype} {sizes} {keywords} {name}: {wrong} not finite"
                done += 1
    print(f"{done} calls, all finite")
    return done


if __name__ == "__main__":
    main()
