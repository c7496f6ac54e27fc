"""Every benchmark that compares implementations, in one table; `make bench` calls it."""

from __future__ import annotations

import torch

from benchmarks.harness.command import main
from benchmarks.harness.problem import Problem
from benchmarks.ops import attention_kl, cka_loss, linear_kl, linear_kl_topk, logit_kl, logit_kl_topk, relation_kl
from benchmarks.trainer import cached_step, causal_step, integrations, prune, train_step

MODULES = (
    attention_kl,
    cached_step,
    causal_step,
    cka_loss,
    integrations,
    linear_kl,
    linear_kl_topk,
    logit_kl,
    logit_kl_topk,
    prune,
    relation_kl,
    train_step,
)


def problems(device: torch.device, quick: bool = False) -> list[Problem]:
    return [problem for module in MODULES for problem in module.problems(device, quick)]


if __name__ == "__main__":
    main(problems, __doc__)
