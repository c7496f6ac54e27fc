"""logit_kl and linear_kl with a teacher of which the top is known, against float64 and against whole distributions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import TopK
from fastkd.divergence import DIVERGENCES
from fastkd.teachers import TAILS

from .cases import INF, NAN, REGIMES, ROUNDING, UNRELATED, Regime, by_name, distance, over_divergences

IMPLS = ("reference", "fused")
over_impls = pytest.mark.parametrize("impl", IMPLS)
over_tails = pytest.mark.parametrize("tail", TAILS)
over_regimes = pytest.mark.parametrize("regime", REGIMES, ids=by_name)
WITHOUT_TAIL = ("forward_kl", "skew_kl")


def served(tail: str) -> list[str]:
    return [name for name in DIVERGENCES if tail in ("bucket", "conditional") or name in WITHOUT_TAIL]


SERVED = [(tail, name) for tail in TAILS for name in served(tail)]


def top(logits: Tensor, k: int, tail: str = "bucket", exact: bool = False, dtype: torch.dtype = torch.float32) -> TopK:
    """The top of a teacher's logits, with the tail's mass summed up on its own if asked for."""
    log_p = logits.double().log_softmax(-1)
    log_probs, indices = log_p.topk(k, -1)
    rest = log_p.scatter(-1, indices, -torch.inf).logsumexp(-1).to(dtype) if exact else None
    return TopK(indices, log_probs.to(dtype), tail, rest)


def run(student: Tensor, teacher: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Losses, and the gradient of logits."""
    student = student.detach().requires_grad_()
    loss = fastkd.logit_kl(student, teacher, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]


def oracle(student: Tensor, teacher: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return run(student.double(), teacher, impl="reference", **options)


def merged(logits: Tensor, teacher: TopK, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of the K + 1 masses of a student's logits and of a teacher's whole distribution."""

    def masses(logs: Tensor) -> Tensor:
        tail = logs.scatter(-1, teacher.indices, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([logs.gather(-1, teacher.indices), tail], -1)

    return masses(logits), masses(log_p)


# ---- the maths ------------------------------------------------------------------------------------------------------


@over_regimes
@over_divergences
@pytest.mark.parametrize("impl", IMPLS)
def test_bucket_is_the_divergence_of_merged_columns(regime: Regime, divergence: str, impl: str):
    student, logits = regime.logits(4, 203)
    teacher = top(logits, 9, exact=True, dtype=torch.float64)
    student.requires_grad_()
    wanted = fastkd.logit_kl(*merged(student, teacher, logits), divergence=divergence, beta=0.3, impl="reference")
    loss = fastkd.logit_kl(student, teacher, divergence=divergence, beta=0.3, impl=impl)
    assert abs(loss - wanted) <= 1e-11 * abs(wanted) + 1e-14
    assert distance(*(torch.autograd.grad(x, student)[0] for x in (loss, wanted))) < 1e-9
    whole = fastkd.logit_kl(student, logits, divergence=divergence, beta=0.3, impl="reference")
    assert loss <= whole + 1e-14


@over_divergences
@over_impls
def test_all_columns_are_the_whole_distribution(divergence: str, impl: str):
    student, logits = (x.float() for x in Regime("sd5", 5.0, 2.0).logits(5, 1300))
    options = {"divergence": divergence, "beta": 0.3, "temperature": 1.5, "reduction": "none"}
    order = torch.randperm(1300)
    log_probs = logits.double().log_softmax(-1)[:, order].float()
    loss, gradient = run(student, TopK(order.expand(5, -1), log_probs), impl=impl, **options)
    wanted, wanted_gradient = oracle(student, logits.double(), **options)
    assert (loss - wanted).abs().max() <= 1e-6 * wanted.max()
    assert distance(gradient, wanted_gradient) < 1e-6


@over_impls
def test_what_the_tails_mean(impl: str):
    """Against their definitions, on the columns themselves."""
    student, logits = UNRELATED.logits(3, 41)
    log_q = student.log_softmax(-1)
    teacher = top(logits, 6, dtype=torch.float64)
    p, of_ids = teacher.log_probs.exp(), log_q.gather(-1, teacher.indices)

    def loss(tail: str, **options: Any) -> Tensor:
        return fastkd.logit_kl(student, TopK(teacher.indices, teacher.log_probs, tail), impl=impl, **options)

    share = p / p.sum(-1, keepdim=True)
    assert torch.allclose(loss("ignore"), (p * (p.log() - of_ids)).sum(-1).mean())
    assert torch.allclose(loss("renormalize"), (share * (share.log() - of_ids)).sum(-1).mean())
    alone = of_ids - of_ids.logsumexp(-1, keepdim=True)
    assert torch.allclose(
        loss("conditional", divergence="reverse_kl"), (alone.exp() * (alone - share.log())).sum(-1).mean()
    )
    m = 0.3 * p + 0.7 * of_ids.exp()
    assert torch.allclose(loss("ignore", divergence="skew_kl", beta=0.3), (p * (p / m).log()).sum(-1).mean())


# ---- every implementation against float64 ----------------------------------------------------------------------------


@over_regimes
@pytest.mark.parametrize(("tail", "divergence"), SERVED)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kernel_against_float64(regime: Regime, tail: str, divergence: str, temperature: float):
    student, logits = (x.float() for x in regime.logits(5, 2203))
    teacher = top(logits, 7, tail, exact=tail == "bucket")
    labels = torch.tensor([-100, int(teacher.indices[1, 3]), 5, 2202, 0])
    for ce_weight in (0.0, 0.7):
        options = {
            "divergence": divergence,
            "beta": 0.3,
            "temperature": temperature,
            "labels": labels,
            "ce_weight": ce_weight,
            "weight": torch.tensor([1.0, 0.5, 2.0, 0.0, 1.5]),
            "reduction": "none",
        }
        loss, gradient = run(student, teacher, impl="fused", **options)
        wanted, wanted_gradient = oracle(student, teacher, **options)
        assert (loss - wanted).abs().max() <= 1e-6 * wanted.abs().max()
        assert distance(gradient, wanted_gradient) < 1e-6
        scalar, total = run(student, teacher, impl="fused", **(options | {"reduction": "sum"}))
        assert torch.allclose(scalar.double(), wanted.sum(), rtol=1e-6) and torch.equal(total, gradient)


@over_divergences
@pytest.mark.parametrize("distant", [3.0, 1e-3])
def test_tails_of_next_to_no_mass(divergence: str, distant: float):
    """1 less the ids' masses would have no digit of them, nor would exponentials relative to the row's maximum."""
    logits = torch.randn(4, 1100, dtype=torch.float64)
    logits[:, :3] += torch.tensor([[40.0], [60.0], [28.0], [100.0]], dtype=torch.float64)
    student = (logits + distant * torch.randn_like(logits)).float()
    teacher = top(logits, 3, exact=True)
    options = {"divergence": divergence, "beta": 0.3, "reduction": "none"}
    loss, gradient = run(student, teacher, impl="fused", **options)
    wanted, wanted_gradient = oracle(student, teacher, **options)
    assert ((loss - wanted).abs() <= 1e-6 * wanted.abs() + 1e-12).all()
    # a row at a time, and of the tail alone
    for got, right in zip(gradient, wanted_gradient, strict=True):
        assert distance(got, right) < 1e-5
    tail = wanted_gradient[2].scatter(0, teacher.indices[2], 0)
    assert tail.any() and distance(gradient[2].scatter(0, teacher.indices[2], 0), tail) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@over_tails
def test_dtypes_and_strides(dtype: torch.dtype, tail: str):
    student, logits = UNRELATED.logits(10, 1100)
    shifted = student.reshape(2, 5, 1100).to(dtype).transpose(0, 1)[:-1]  # [4, 2, V], of rows that do not collapse
    teacher = top(logits.reshape(2, 5, 1100).transpose(0, 1)[:-1], 5, tail)
    options = {"labels": torch.randint(0, 1100, (4, 2)), "ce_weight": 0.4, "temperature": 1.5, "reduction": "none"}
    loss, gradient = run(shifted, teacher, impl="fused", **options)
    wanted, wanted_gradient = oracle(shifted, teacher, **options)
    assert loss.shape == (4, 2) and gradient.dtype == dtype
    assert distance(loss, wanted) < 1e-6
    assert distance(gradient, wanted_gradient) < 1.1 * ROUNDING[dtype] + (1e-11 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize(("tail", "divergence"), SERVED)
@over_impls
def test_padding_and_ids_of_no_column(tail: str, divergence: str, impl: str):
    """-1, -inf and what the student has no column for are as if they were not there, their mass the tail's."""
    student, logits = UNRELATED.logits(4, 50)
    student = student[:, :40].clone()
    whole = top(logits, 12, tail, dtype=torch.float64)
    indices, log_probs = whole.indices.clone(), whole.log_probs.clone()
    indices[1, 3:], log_probs[2, 5:], indices[3] = -1, -INF, -1
    log_probs[1, 3:] = NAN  # of which nobody asks
    options = {"divergence": divergence, "beta": 0.3, "reduction": "none", "impl": impl}
    loss, gradient = run(student, TopK(indices, log_probs, tail), **options)
    for row in range(3):
        kept = (indices[row] >= 0) & (log_probs[row] > -INF)
        if tail in ("bucket", "ignore"):
            kept &= indices[row] < 40
        alone = TopK(indices[row, kept][None], log_probs[row, kept][None], tail)
        wanted, wanted_gradient = run(student[row, None], alone, **options)
        assert torch.allclose(loss[row, None], wanted, rtol=1e-12)
        assert torch.allclose(gradient[row, None], wanted_gradient, atol=1e-15)
    assert loss[3] == 0 and not gradient[3].any()  # of which the teacher says nothing


@over_divergences
@over_impls
def test_masked_columns(divergence: str, impl: str):
    """Columns that the student rules out: of the tail, all of the tail, all."""
    student, logits = UNRELATED.logits(3, 30)
    teacher = top(logits, 4, dtype=torch.float64)
    others = torch.ones(3, 30, dtype=torch.bool).scatter(1, teacher.indices, False)
    student[0, others[0].nonzero()[:9, 0]] = -INF
    student[1, others[1]] = -INF
    student[2] = -INF
    loss, gradient = run(student, teacher, divergence=divergence, reduction="none", impl=impl)
    assert loss.isfinite().all() and gradient.isfinite().all()
    assert loss[2] == 0 and not gradient[2].any() and not gradient[student == -INF].any()
    alone = TopK(teacher.indices[1:2], teacher.log_probs[1:2], "conditional")  # what no tail comes to
    wanted, wanted_gradient = run(student[1:2], alone, divergence=divergence, reduction="none", impl=impl)
    assert torch.allclose(loss[1:2], wanted) and torch.allclose(gradient[1:2], wanted_gradient, atol=1e-14)


@pytest.mark.parametrize("tail", ["bucket", "conditional"])
@over_impls
def test_what_one_model_rules_out_is_infinite_however_little_the_other_gives_it(tail: str, impl: str):
    student, logits = torch.zeros(2, 5, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.float64)
    logits[:, 1] = -80.0
    teacher = top(logits, 5, tail, dtype=torch.float64)
    student[0, 1] = -INF
    loss, gradient = run(student, teacher, reduction="none", impl=impl)
    assert loss[0] == INF and loss[1].isfinite() and gradient.isfinite().all()
    ids = teacher.indices[:, :3]  # of a teacher that has nothing else
    sure = TopK(ids, torch.full((2, 3), -math.log(3)).double(), tail_log_prob=torch.full((2,), -INF).double())
    student = torch.full_like(student, -80.0).scatter(1, ids, 0.0)
    assert (run(student, sure, divergence="reverse_kl", reduction="none", impl=impl)[0] == INF).all()


@over_impls
def test_probabilities_rounded_past_1_keep_reverse_kl_finite(impl: str):
    student, logits = Regime("sd5", 5.0, 2.0).logits(64, 300)
    teacher = top(logits, 250, dtype=torch.bfloat16)
    assert (teacher.log_probs.double().exp().sum(-1) > 1).any()
    loss, gradient = run(student.float(), teacher, divergence="reverse_kl", impl=impl)
    assert loss.isfinite() and gradient.isfinite().all()


# ---- from hidden states ---------------------------------------------------------------------------------------------


def hidden_states(tokens: int = 20, vocabulary: int = 203, width: int = 12) -> dict[str, Tensor]:
    return {
        "student_hidden": torch.randn(tokens, width, dtype=torch.float64),
        "student_weight": torch.randn(vocabulary, width, dtype=torch.float64),
        "student_bias": 0.1 * torch.randn(vocabulary, dtype=torch.float64),
    }


def run_linear(inputs: dict[str, Tensor], teacher: TopK, **options: Any) -> list[Tensor]:
    """The loss, and the gradients of the student's tensors."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    loss = fastkd.linear_kl(teacher_hidden=teacher, **leaves, **options)
    seed = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()), seed)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@over_tails
def test_linear_against_float64(dtype: torch.dtype, reduction: str, tail: str):
    inputs = {name: x.to(dtype) for name, x in hidden_states().items()}
    teacher = top(2 * torch.randn(20, 203), 8, tail)
    weight = (torch.rand(20) > 0.3).float()
    labels = torch.randint(0, 203, (20,)).masked_fill(torch.rand(20) > 0.8, -100)
    for ce_weight in (0.0, 0.5):
        options = {"reduction": reduction, "weight": weight, "student_scale": 0.7, "temperature": 1.5}
        options |= {"ce_weight": ce_weight, "labels": labels}
        got = run_linear(inputs, teacher, impl="fused", workspace_mb=5 * 203 * 4 / 2**20, **options)
        doubles = {name: x.double() for name, x in inputs.items()}
        for x, wanted in zip(got, run_linear(doubles, teacher, impl="reference", **options), strict=True):
            assert distance(x, wanted) < max(2e-6, 1.5 * ROUNDING[x.dtype])


def test_linear_takes_what_autograd_does_not_ask_for():
    inputs = {name: x.float() for name, x in hidden_states().items()}
    teacher = top(torch.randn(20, 203), 8)
    *_, of_bias = run_linear(inputs, teacher, impl="fused")
    bias = inputs["student_bias"].requires_grad_()
    fastkd.linear_kl(inputs["student_hidden"], inputs["student_weight"], teacher, student_bias=bias).backward()
    assert distance(bias.grad, of_bias) < 1e-6
    with torch.no_grad():
        assert not fastkd.linear_kl(inputs["student_hidden"], inputs["student_weight"], teacher).requires_grad


def test_no_tokens_and_none_left():
    teacher = top(torch.randn(3, 20), 4)
    for weight, teachers in ((torch.zeros(3), teacher), (None, TopK(teacher.indices[:0], teacher.log_probs[:0]))):
        count = len(teachers.indices)
        loss, gradient = run(torch.full((count, 20), NAN), teachers, weight=weight)
        assert loss == 0 and not gradient.any()
        inputs = {name: x.float() for name, x in hidden_states(count, 20).items()}
        assert not any(x.any() for x in run_linear(inputs, teachers, weight=weight))


def test_student_is_left_as_it_was():
    """K scores are set aside in place where the student is the workspace, and nowhere else."""
    student, logits = (x.float() for x in UNRELATED.logits(3, 2100))
    before = student.clone()
    run(student, top(logits, 9), labels=torch.tensor([1, 2, 3]), ce_weight=0.5)
    assert torch.equal(student, before)


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_a_divergence_that_a_tail_does_not_serve_is_an_error():
    student, logits = UNRELATED.logits(3, 20)
    for tail in ("ignore", "renormalize"):
        for divergence in set(DIVERGENCES) - set(WITHOUT_TAIL):
            with pytest.raises(ValueError, match=f"^divergence: expected forward_kl or skew_kl.*{tail}.*{divergence}"):
                fastkd.logit_kl(student, top(logits, 4, tail), divergence=divergence)


def test_bad_input():
    student, logits = UNRELATED.logits(3, 20)
    teacher = top(logits, 4)
    hidden, weight = torch.randn(3, 5), torch.randn(20, 5)
    with pytest.raises(ValueError, match=r"^TopK.indices: expected shape \[2, any\]"):
        fastkd.logit_kl(student[:2], teacher)
    with pytest.raises(ValueError, match=r"^TopK.indices: expected shape \[2, any\]"):
        fastkd.linear_kl(hidden[:2], weight, teacher)
    with pytest.raises(ValueError, match=r"^student_weight: expected shape"):
        fastkd.linear_kl(hidden, weight[:, :4], teacher)
    with pytest.raises(ValueError, match=r"^labels: expected a tensor because ce_weight"):
        fastkd.logit_kl(student, teacher, ce_weight=0.5)
    with pytest.raises(ValueError, match=r"^labels: expected values in"):
        fastkd.logit_kl(student, teacher, ce_weight=0.5, labels=torch.tensor([0, 20, 1]))
    with pytest.raises(ValueError, match=r"^TopK.log_probs"):
        fastkd.logit_kl(student, TopK(teacher.indices, teacher.log_probs.fill_(NAN)))


@over_impls
def test_a_dropped_token_may_hold_anything(impl: str) -> None:
    student, teacher = torch.randn(2, 4, 3, 20).unbind()
    known, rest = top(teacher, 5), torch.tensor([[1.0, 0, 1], [0, 1, 1], [1, 1, 1], [1, 1, 0]])
    expected = run(student, known, weight=rest, impl=impl)
    log_probs, indices = known.log_probs.clone(), known.indices.clone()
    log_probs[0, 1], log_probs[1, 0], indices[3, 2] = NAN, 0.0, -7
    damaged = TopK(indices, log_probs)
    for dropped in ({"weight": rest}, {"labels": torch.zeros(4, 3, dtype=torch.long).masked_fill(rest == 0, -100)}):
        for its, right in zip(run(student, damaged, impl=impl, **dropped), expected, strict=True):
            torch.testing.assert_close(its, right, rtol=0, atol=0)
    with pytest.raises(ValueError, match="log_probs"):
        run(student, TopK(known.indices, log_probs), weight=torch.ones(4, 3), impl=impl)
