"""logit_kl and linear_kl of top-k teachers on the kernel in Triton, of which test_triton_topk.py has the rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.ops.drivers import linear_kl_gpu, topk_rows

from .cases import DEVICE, ROUNDING, UNRELATED, distance, interpreted, placed, running_on
from .test_triton_topk import K, R, V, _small_blocks, mostly_long  # noqa: F401

pytestmark = interpreted


def gradients_of(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves, torch.linspace(1, 2, loss.numel()).to(loss).reshape(loss.shape)))


@pytest.mark.parametrize("reduction", mostly_long(["mean", "none"], {"none"}))
def test_logit_kl(reduction: str):
    student, logits = UNRELATED.logits(R, V)
    log_probs, indices = logits.log_softmax(-1).topk(K, -1)
    options = {"divergence": "reverse_kl", "temperature": 2.0, "weight": torch.tensor([1.0, 0, 0.5, 2])}
    student = student.float()
    results = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "triton")):
        with running_on(backend) as (impl, device):
            teacher = fastkd.TopK(indices.to(device), log_probs.to(device))
            leaf = student.to(device, dtype).requires_grad_()
            loss = fastkd.logit_kl(leaf, teacher, reduction=reduction, impl=impl, **placed(options, device))
            results.append([loss, *gradients_of(loss, [leaf])])
    (loss, gradient), (got, got_gradient) = results
    assert distance(got, loss) <= 1e-6 and distance(got_gradient, gradient) <= 1e-5


@pytest.mark.parametrize("dtype", mostly_long(list(ROUNDING), {torch.bfloat16}), ids=str)
@pytest.mark.parametrize("tail", mostly_long(["bucket", "conditional"], {"bucket"}))
def test_linear_kl_in_chunks(dtype: torch.dtype, tail: str, monkeypatch: pytest.MonkeyPatch):
    """Several blocks of tokens, each of several chunks of scores; reverse KL, whose fp16 gradients have less room."""
    monkeypatch.setattr(linear_kl_gpu, "GEMM_ROWS", 4)
    tokens, vocabulary = 22, 77
    inputs = [torch.randn(tokens, 12), torch.randn(vocabulary, 12), 0.1 * torch.randn(vocabulary)]
    inputs = [x.to(dtype) for x in inputs]
    log_probs, indices = (3 * torch.randn(tokens, vocabulary)).double().log_softmax(-1).topk(K, -1)
    options = {"labels": torch.randint(0, vocabulary, (tokens,)), "ce_weight": 0.7, "student_scale": 0.5}
    options |= {"divergence": "reverse_kl", "normalizer": 1e4 if dtype == torch.float16 else None}
    options["labels"][3:9] = -100
    results = []
    for wide, backend in ((torch.float64, "reference"), (dtype, "triton")):
        with running_on(backend) as (impl, device):
            teacher = fastkd.TopK(indices.to(device), log_probs.to(device), tail)
            hidden, weight, bias = leaves = [x.to(device, wide).requires_grad_() for x in inputs]
            loss = fastkd.linear_kl(
                hidden, weight, teacher, student_bias=bias, workspace_mb=0.005, impl=impl, **placed(options, device)
            )
            results.append([loss, *gradients_of(loss, leaves)])
    for i, (wanted, got) in enumerate(zip(*results, strict=True)):
        assert distance(got, wanted) <= (1e-6 if i == 0 else 2e-6 + 3 * ROUNDING[dtype])


def test_more_ids_than_the_kernel_holds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(topk_rows, "MOST_IN_TRITON", 4)
    student, logits = (x.to(DEVICE) for x in UNRELATED.logits(R, V))
    log_probs, indices = logits.log_softmax(-1).topk(K, -1)
    teacher = fastkd.TopK(indices, log_probs)
    with running_on("triton"):
        with pytest.raises(RuntimeError, match=r"cannot run: .* at most 4 ids in a row of a TopK, got 5"):
            fastkd.logit_kl(student, teacher, impl="fused")
        assert torch.equal(fastkd.logit_kl(student, teacher), fastkd.logit_kl(student, teacher, impl="reference"))


def test_no_tokens_and_frozen_heads():
    hidden, weight = torch.randn(R, 8, device=DEVICE, requires_grad=True), torch.randn(V, 8, device=DEVICE)
    log_probs, indices = torch.randn(R, V, device=DEVICE).log_softmax(-1).topk(K, -1)
    with running_on("triton") as (impl, _):
        for tokens in (0, 2):
            teacher = fastkd.TopK(indices[:tokens], log_probs[:tokens])
            loss = fastkd.linear_kl(hidden[:tokens], weight, teacher, impl=impl)
            (gradient,) = torch.autograd.grad(loss, hidden)
            assert gradient.any(1).tolist() == [True] * tokens + [False] * (R - tokens)
            assert bool(loss > 0) == bool(tokens)
