"""The ops and the row primitive that tell metrics, as torch sees them; what is told is in test_metrics.py."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from fastkd.checks import Objective
from fastkd.ops.drivers.divergence_rows import divergence_rows, gpu_rows

from .cases import LINEAR_KL, LOGIT_KL, UNRELATED, over_fused, running_on, to
from .test_metrics import check, metrics_of


def test_opcheck():
    x = to(LINEAR_KL.make(UNRELATED, tokens=3), torch.float32)
    student, teacher = (x.float() for x in UNRELATED.logits(3, 33))
    coefficient, objective = torch.tensor([1.0, 0.0, 0.5]).double(), Objective("jsd", 0.3, 2.0, 0.6, 0.0).for_op()
    opcheck(torch.ops.fastkd.logit_kl.default, (student, teacher, coefficient, None, *objective, "", 0, True))
    heads = [x[f"{model}_{part}"] for model in ("student", "teacher") for part in ("hidden", "weight", "bias")]
    sizes = torch.tensor([1.0, 1.0, 0.0, 0.0, 2**-9]).double()
    arguments = (*heads, coefficient, None, sizes, [True] * 3, *objective, "", 0, True)
    opcheck(torch.ops.fastkd.linear_kl.default, arguments)
    numbers, metrics = (2, 0.3, 2.0, 0.6, 0.0), coefficient.new_empty(3, 6)
    written = (student, teacher, coefficient, None, coefficient.clone(), None, None, *numbers)
    opcheck(torch.ops.fastkd.divergence_rows.default, written, {"metrics": metrics})
    shard = (student, teacher, coefficient, None, None, coefficient.new_empty(3, 7), None, *numbers)
    opcheck(torch.ops.fastkd.divergence_rows.default, shard, {"metrics": metrics})


@over_fused
def test_metrics_go_with_a_loss(backend: str):
    x, coefficient = torch.randn(2, 9), torch.ones(2, dtype=torch.float64)
    stats, metrics = coefficient.new_ones(2, 7), coefficient.new_empty(2, 6)
    with running_on(backend) as (_, device):
        x, coefficient, stats, metrics = (y.to(device) for y in (x, coefficient, stats, metrics))
        with pytest.raises((RuntimeError, ValueError), match=r"metrics.* go with a loss"):
            divergence_rows(x, x, coefficient, None, None, stats, x.clone(), 0, 0.5, 1.0, 1.0, 0.0, metrics=metrics)


def test_rows_in_cuda_leave_them_to_triton():
    with running_on("triton") as (impl, device):
        inputs = {name: y.float().to(device) for name, y in LOGIT_KL.make(UNRELATED, tokens=2).items()}
        wanted = metrics_of(LOGIT_KL, inputs, impl=impl)
        try:
            with gpu_rows("cuda"):
                check(metrics_of(LOGIT_KL, inputs, impl=impl), wanted, bound=0)
        except RuntimeError as error:
            assert "FASTKD_BUILD=cuda" in str(error)
