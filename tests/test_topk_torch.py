"""The ops of top-k teachers as torch sees them: derivatives, schemas, torch.compile, torch.func, threads, modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.library import opcheck

import fastkd
from fastkd import TopK
from fastkd.checks import numbers

from .cases import UNRELATED, distance
from .test_topk import SERVED, hidden_states, over_tails, run, top

QUICK = [("bucket", "jsd"), ("ignore", "skew_kl"), ("renormalize", "forward_kl"), ("conditional", "reverse_kl")]


@pytest.mark.parametrize(
    ("tail", "divergence"), [x if x in QUICK else pytest.param(*x, marks=pytest.mark.long) for x in SERVED]
)
def test_gradcheck(tail: str, divergence: str):
    inputs = hidden_states(3, 7, 4)
    teacher = top(torch.randn(3, 7), 3, tail, dtype=torch.float64)
    options = {"divergence": divergence, "temperature": 1.5, "labels": torch.tensor([1, -100, 4]), "ce_weight": 0.5}

    def of_hidden(hidden: Tensor, weight: Tensor, bias: Tensor, reduction: str) -> Tensor:
        return fastkd.linear_kl(
            hidden, weight, teacher, student_bias=bias, reduction=reduction, impl="fused", **options
        )

    leaves = tuple(x.requires_grad_() for x in inputs.values())
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(lambda *x, r=reduction: of_hidden(*x, r), leaves)
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fastkd.logit_kl(x, teacher, **options), logits)


def test_opcheck():
    student, logits = (x.float() for x in UNRELATED.logits(5, 33))
    ids, log_probs, tail = top(logits, 4).for_op(2.0, 33)
    coefficient = torch.tensor([0.5, 1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    labels = torch.randint(0, 33, (5,))
    values = numbers(0.3, 2.0, 0.6, 0.4, *(1.0, 0.0, 0.5, 0.0, 0.0, 0.0))
    given = (ids, log_probs, tail, coefficient, labels)
    opcheck(torch.ops.fastkd.topk_logit_kl.default, (student, *given, False, values, "", 0, True))
    _, stats, _ = torch.ops.fastkd.topk_logit_kl(student, *given, False, values)
    opcheck(
        torch.ops.fastkd.topk_logit_kl_backward.default,
        (student, ids, log_probs, tail, stats, coefficient, labels, False, values),
    )
    hidden, weight, bias = (x.float() for x in hidden_states(5, 33).values())
    arguments = (hidden, weight, bias, *given, numbers(0.7, 0.0, 1.0), [True, False, True], False, values, "", 0, True)
    opcheck(torch.ops.fastkd.topk_linear_kl.default, arguments)


def test_a_mix_of_divergences_is_their_weighted_sum():
    """The row primitive takes a weight for each."""
    student, logits = UNRELATED.logits(5, 33)
    ids, log_probs, tail = top(logits, 4).for_op(1.0, 33)
    one = torch.ones(5, dtype=torch.float64)

    def both(*weights: float) -> Tensor:
        loss, gradient = torch.empty(5, dtype=torch.float64), torch.empty(5, 33, dtype=torch.float64)
        numbers = (0.3, 1.0, 1.0, 0.0)
        torch.ops.fastkd.topk_rows(
            student, ids, log_probs, tail, one, None, loss, None, gradient, weights, False, *numbers
        )
        return torch.cat([loss[:, None], gradient], 1)

    weights = (0.5, 0.25, 0.125, 2.0, 1.5, 0.75)
    units = [tuple(float(i == j) for j in range(6)) for i in range(6)]
    assert torch.allclose(both(*weights), sum(w * both(*unit) for w, unit in zip(weights, units, strict=True)))


@pytest.mark.long
@over_tails
def test_compiles_into_one_graph(tail: str):
    inputs = {name: x.float() for name, x in hidden_states().items()}
    teacher = top(torch.randn(20, 203), 8, tail)
    hidden, weight = inputs["student_hidden"].requires_grad_(), inputs["student_weight"].requires_grad_()

    def losses(hidden: Tensor, weight: Tensor, indices: Tensor, log_probs: Tensor) -> Tensor:
        given = TopK(indices, log_probs, tail)
        return (
            fastkd.linear_kl(hidden, weight, given) + fastkd.logit_kl(hidden @ weight.T, given, reduction="none").sum()
        )

    plain = losses(hidden, weight, teacher.indices, teacher.log_probs)
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")(
        hidden, weight, teacher.indices, teacher.log_probs
    )
    assert torch.allclose(compiled, plain)
    for x, y in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (compiled, plain)), strict=True):
        assert distance(x, y) < 1e-6


def test_torch_func():
    student, logits = UNRELATED.logits(6, 33)
    student, teacher = student.reshape(3, 2, 33), top(logits.reshape(3, 2, 33), 4, dtype=torch.float64)

    def loss(student: Tensor, indices: Tensor, log_probs: Tensor) -> Tensor:
        return fastkd.logit_kl(student, TopK(indices, log_probs))

    given = (student, teacher.indices, teacher.log_probs)
    one_by_one = [grad(loss)(*x) for x in zip(*given, strict=True)]
    assert torch.allclose(vmap(grad(loss))(*given), torch.stack(one_by_one))
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad(lambda x: grad(loss)(x, *given[1:]).sum())(student)


@pytest.mark.parametrize("threads", [1, 2])
def test_results_do_not_depend_on_threads(threads: int):
    student, logits = (x.float() for x in UNRELATED.logits(40, 2100))
    teacher = top(logits, 9)
    wanted = run(student, teacher)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(x, y) for x, y in zip(run(student, teacher), wanted, strict=True))
    finally:
        torch.set_num_threads(before)


def test_modules_take_a_top_k():
    inputs = {name: x.float() for name, x in hidden_states().items()}
    teacher = top(torch.randn(20, 203), 8)
    hidden, weight = inputs["student_hidden"], inputs["student_weight"]
    options = {"divergence": "jsd", "temperature": 2.0}
    logits = hidden @ weight.T
    assert fastkd.nn.LogitKLLoss(**options)(logits, teacher) == fastkd.logit_kl(logits, teacher, **options)
    assert fastkd.nn.LinearKLLoss(**options)(hidden, weight, teacher) == fastkd.linear_kl(
        hidden, weight, teacher, **options
    )
