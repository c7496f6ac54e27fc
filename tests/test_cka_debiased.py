"""cka_loss(debiased=True): HSIC_1 by its own formula, both forms, what is too few or constant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd.checks import numbers
from fastkd.ops import cka_loss as op_file
from fastkd.ops.drivers import cka_loss_torch as gemms

from .cases import (
    CKA_LOSS,
    DTYPES,
    LONG_IN_TRITON,
    ROUNDING,
    SMALLEST,
    by_name,
    distance,
    oracle,
    over_backends,
    running_on,
    to,
    value_and_gradients,
)
from .test_cka_loss import hidden, over_forms, poison

over_squared = pytest.mark.parametrize("squared", [False, True])
over_impls = pytest.mark.parametrize("impl", ["reference", "fused"])


def hsic_1(k: Tensor, m: Tensor) -> Tensor:
    """Equation 5 of Song et al., 2012"""
    n, ones = k.shape[0], k.new_ones(k.shape[0])
    k, m = (x - x.diag().diag() for x in (k, m))
    sums = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return ((k @ m).trace() + sums - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))


@over_impls
@pytest.mark.parametrize(("tokens", "widths"), [(5, (2, 1)), (9, (12, 7)), (50, (6, 9)), (4, (3, 3))])
def test_definition(tokens: int, widths: tuple[int, int], impl: str):
    """Of Grams that nobody has centred."""
    inputs = hidden(tokens, widths, offset=2.0)
    k, m = (x @ x.T for x in inputs.values())
    cka = hsic_1(k, m) / (hsic_1(k, k) * hsic_1(m, m)).sqrt()
    options: dict[str, Any] = {"debiased": True, "eps": 1e-14, "impl": impl}
    assert distance(1 - fastkd.cka_loss(**inputs, squared=True, **options), cka) <= 1e-10
    assert distance(1 - fastkd.cka_loss(**inputs, **options), cka.sign() * cka.abs().sqrt()) <= 1e-5


def test_independent_hidden_states_have_nothing_in_common():
    """In the mean; the biased estimate has them nearly alike."""
    draws = [to(hidden(32, (768, 768)), torch.float32) for _ in range(100)]
    losses = torch.stack([fastkd.cka_loss(**x, squared=True, debiased=True) for x in draws])
    assert abs(losses.mean() - 1) <= 4 * losses.std() / 10 <= 0.04
    assert max(fastkd.cka_loss(**x, squared=True) for x in draws) < 0.1
    x = draws[0]["student"]
    for squared in (False, True):
        assert abs(fastkd.cka_loss(x, 3 * x + 1, squared=squared, debiased=True)) <= 1e-6


SHAPES = [(7, (30, 20)), (50, (1, 1)), (129, (63, 65)), (700, (257, 33)), (8, (768, 512))]


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("tokens", "widths"), SHAPES)
@pytest.mark.parametrize("backend", LONG_IN_TRITON)
def test_value_and_gradients(backend: str, tokens: int, widths: tuple[int, int], masked: bool, dtype: torch.dtype):
    mask = torch.ones(tokens, dtype=torch.bool)
    if masked:
        mask = torch.rand(2 * tokens) < 0.5
        mask[:tokens] |= mask[tokens:].logical_not()  # at least `tokens` are left
        mask[0] = False
    options = {"squared": tokens % 2 == 0, "debiased": True}
    inputs = to(hidden(mask.numel(), widths, offset=1.0, distance=1.0 if widths[0] <= widths[1] else None), dtype)
    kept = {name: x[mask] for name, x in inputs.items()}
    loss, gradients = oracle(CKA_LOSS, kept, **options)
    with running_on(backend) as (impl, device):
        option = {"mask": mask.to(device)} if masked else {}
        moved = to(poison(inputs, mask), dtype, device)
        got, got_gradients = value_and_gradients(CKA_LOSS, moved, impl=impl, **options, **option)
    exact, wanted, gradient = dtype == torch.float64, gradients["student"], got_gradients["student"]
    assert abs(got.item() - loss.item()) <= (1e-12 if exact else 1e-6)
    assert gradient.dtype == dtype
    assert not gradient[~mask].any()
    rounding = 2 * ROUNDING[dtype] + SMALLEST[dtype] * wanted.numel() ** 0.5 / wanted.norm().item()
    assert distance(gradient[mask], wanted) <= (1e-11 if exact else 1e-5) + rounding


@over_forms
@over_squared
def test_student_near_the_teacher(grams: bool, squared: bool):
    """At least as exact as the biased loss."""
    inputs = to(hidden(60 if grams else 900, (130, 130), distance=1e-3), torch.float32)
    errors = {}
    for debiased in (True, False):
        options = {"debiased": debiased, "squared": squared}
        loss, gradients = oracle(CKA_LOSS, inputs, **options)
        got, got_gradients = value_and_gradients(CKA_LOSS, inputs, impl="fused", **options)
        assert loss < 3e-6
        assert abs(got - loss) <= 1e-7
        errors[debiased] = distance(got_gradients["student"], gradients["student"])
    assert errors[True] <= 1.5 * errors[False] <= 1e-3


@over_forms
@pytest.mark.parametrize("far", [30, 1000])
def test_a_token_far_from_all_others(grams: bool, far: float):
    """|A^T A|^2 is then nearly all of the diagonal that is taken off."""
    inputs = to(hidden(100 if grams else 1000, (64, 64)), torch.float32)
    for x in inputs.values():
        x[3] *= far
    loss, gradients = oracle(CKA_LOSS, inputs, debiased=True, squared=True)
    got, got_gradients = value_and_gradients(CKA_LOSS, inputs, impl="fused", debiased=True, squared=True)
    assert abs(got - loss) <= 5e-6
    assert distance(got_gradients["student"], gradients["student"]) <= 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=by_name)
@pytest.mark.parametrize("masked", [False, True])
@over_forms
def test_both_forms_in_chunks_of_any_size(dtype, masked: bool, grams: bool, monkeypatch: pytest.MonkeyPatch):
    inputs = to(hidden(57, (23, 36), offset=5.0), dtype)
    mask = torch.rand(57) < 0.6 if masked else torch.ones(57, dtype=torch.bool)
    options = {"debiased": True, "squared": True}
    loss, gradients = oracle(CKA_LOSS, inputs, mask=mask, **options)
    monkeypatch.setattr(op_file, "_by_grams", lambda tokens, widths: grams)
    for workspace, strip in ((1, 1), (600, 16), (2**20, 128)):
        monkeypatch.setattr(gemms, "WORKSPACE", workspace)
        monkeypatch.setattr(gemms, "STRIP", strip)
        moved = poison(inputs, mask)
        got, got_gradients = value_and_gradients(
            CKA_LOSS, moved, impl="fused", mask=mask if masked else None, **options
        )
        assert abs(got - loss) <= 1e-6
        assert distance(got_gradients["student"], gradients["student"]) <= 2e-5 + 2 * ROUNDING[dtype]


@over_impls
@over_squared
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck(impl: str, squared: bool, reduction: str):
    """Both forms, in one list, and a pair of which less than nothing is in common."""
    pairs = [to(hidden(*size), torch.float64) for size in ((7, (2, 2)), (7, (6, 4)), (7, (1, 1)))]
    pairs[2]["student"], pairs[2]["teacher"] = torch.eye(7)[:, :1].double() + 0.1, torch.eye(7)[:, 1:2].double()
    pairs[2]["student"] += 0.05 * torch.randn(7, 1)
    teachers = [pair["teacher"] for pair in pairs]
    mask = torch.tensor([True, True, True, False, True, True, True])

    def function(*students):
        options: dict[str, Any] = {"squared": squared, "debiased": True, "reduction": reduction, "impl": impl}
        return fastkd.cka_loss(students, teachers, mask=mask, eps=0.3, **options)

    students = [pair["student"].requires_grad_() for pair in pairs]
    assert torch.autograd.gradcheck(function, students)


@over_backends
@over_squared
@pytest.mark.parametrize("valid", [0, 1, 2, 3])
def test_too_few_valid_tokens(backend: str, squared: bool, valid: int):
    """For each form; what else there is is dropped."""
    for tokens, widths in ((3, (6, 5)), (3, (1, 1)), (9, (6, 5)), (9, (2, 2))):
        inputs = to(hidden(tokens, widths), torch.float32)
        mask = torch.arange(tokens) < valid
        with running_on(backend) as (impl, device):
            moved = to(poison(inputs, mask), torch.float32, device)
            options = {"squared": squared, "debiased": True, "mask": mask.to(device), "impl": impl}
            loss, gradients = value_and_gradients(CKA_LOSS, moved, **options)
        assert loss == 0
        assert not gradients["student"].any()


@over_impls
@over_squared
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=by_name)
@pytest.mark.parametrize("tokens", [6, 300])
@pytest.mark.parametrize("apart", [0, 1], ids=["all the same", "all but one"])
def test_constant_hidden_states(impl: str, squared: bool, dtype: torch.dtype, tokens: int, apart: int):
    """Beside them nothing varies, or the only token that does has no other like it: loss 1, zero gradients."""
    for which in ("student", "teacher"):
        inputs = to(hidden(tokens, (3, 5)), dtype)
        same = (inputs[which][:1] * 17 + 0.1).to(dtype).expand_as(inputs[which]).clone()
        same[:apart] = inputs[which][:apart] * 3
        inputs[which] = same
        loss, gradients = value_and_gradients(CKA_LOSS, inputs, squared=squared, debiased=True, impl=impl)
        assert loss == 1
        assert not gradients["student"].any()


@over_impls
@over_squared
def test_gradients_are_finite_where_nothing_is_in_common(impl: str, squared: bool):
    """A CKA of exactly 0: the student's likenesses are all between tokens that are nothing to the teacher, and even."""
    student, teacher = torch.zeros(8, 4), torch.zeros(8, 4)
    for i, (a, b) in enumerate(((0, 1), (2, 3), (4, 5), (6, 7))):
        student[[a, b], i] = 1.0
    for i, (a, b) in enumerate(((0, 2), (1, 3), (4, 6), (5, 7))):
        teacher[[a, b], i] = torch.tensor([1.0, 1.0])
    for x, t in ((student, teacher), (student, torch.randn(8, 4)), (1e-4 * student, 1e4 * teacher)):
        inputs = {"student": x, "teacher": t}
        loss, gradients = value_and_gradients(CKA_LOSS, inputs, squared=squared, debiased=True, impl=impl)
        assert 0 <= loss <= 2
        assert gradients["student"].isfinite().all()
        assert gradients["student"].norm() * x.norm() <= 1e3


def test_nan_is_not_hidden():
    for tokens, name in ((9, "student"), (40, "teacher")):
        inputs = to(hidden(tokens, (6, 5)), torch.float32)
        inputs[name][2, 1] = torch.nan
        loss, gradients = value_and_gradients(CKA_LOSS, inputs, impl="fused", debiased=True)
        assert loss.isnan()
        assert gradients["student"].isnan().any()


def test_many_tokens_make_no_matrix_of_tokens():
    """Nothing larger than the hidden states of both models, forward and backward."""

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            if isinstance(result, Tensor):
                self.numbers = max(self.numbers, result.numel())
            return result

    inputs = to(hidden(3000, (20, 30)), torch.float32)
    with Largest() as largest:
        loss = fastkd.cka_loss(inputs["student"].requires_grad_(), inputs["teacher"], debiased=True, impl="fused")
        loss.backward()
    assert 3000 * 20 <= largest.numbers <= 3000 * 50


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.long)], ids=by_name)
def test_opcheck(dtype: torch.dtype):
    pairs = [to(hidden(*size), dtype) for size in ((12, (2, 3)), (6, (3, 4)), (12, (2, 3)))]
    student, teacher = ([pair[name] for pair in pairs] for name in ("student", "teacher"))
    masks, wanted = [torch.rand(12) < 0.7, None, None], [True, True, False]
    ops = torch.ops.fastkd
    opcheck(ops.cka_loss.default, (student, teacher, masks, wanted, numbers(1e-8), True, True))
    losses, means, factors = ops.cka_loss(student, teacher, masks, wanted, numbers(1e-8), False, True)
    assert factors[2].shape == (0,)
    arguments = (student, teacher, masks, means, factors, wanted, torch.ones_like(losses), True)
    opcheck(ops.cka_loss_backward.default, arguments)


def test_module_equals_function():
    inputs = to(hidden(20, (3, 5)), torch.float32)
    loss = fastkd.nn.CKALoss(debiased=True)
    assert torch.equal(loss(**inputs), fastkd.cka_loss(**inputs, debiased=True))
    assert not torch.equal(loss(**inputs), fastkd.cka_loss(**inputs))
    assert "debiased=True" in repr(loss)
