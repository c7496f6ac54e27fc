"""Heads that cap their logits (Gemma 2): the kernel, and linear_kl with it, by every way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.ops.drivers import linear_kl_cpu
from fastkd.ops.drivers.softcap import softcap

from .cases import (
    LINEAR_KL,
    NAN,
    REGIMES,
    UNRELATED,
    Regime,
    by_name,
    distance,
    oracle,
    over_divergences,
    over_fused,
    placed,
    running_on,
    to,
    value_and_gradients,
)

FUSED = ("cpp", "triton")
CAPS = {"student_softcap": 30.0, "teacher_softcap": 20.0}


def run(backend: str, inputs: dict[str, Tensor], dtype: torch.dtype, **options):
    with running_on(backend) as (impl, device):
        moved = to(inputs, dtype, device)
        return value_and_gradients(LINEAR_KL, moved, impl=impl, **placed(options, device))


@over_fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=by_name)
def test_kernel(backend: str, dtype: torch.dtype):
    """Digits are those of tanh near 0, and of its slope where tanh is 1."""
    wide = torch.logspace(-30, 1, 1001, dtype=torch.float64)
    z = torch.cat([-wide.flip(0), wide]).to(dtype).view(2, 1001)[:, :999]  # rows that are no whole blocks
    exact = z.double() / 7
    with running_on(backend) as (_, device):
        capped, slope = (torch.empty(z.shape, dtype=dtype, device=device) for _ in range(2))
        softcap(z.to(device), capped, slope, 7.0)
        in_place = z.clone().to(device)
        softcap(in_place, in_place, None, 7.0)
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(capped.cpu().double(), 7 * exact.tanh(), rtol=4 * epsilon, atol=0)
    torch.testing.assert_close(in_place.cpu(), capped.cpu(), rtol=2 * epsilon, atol=0)
    torch.testing.assert_close(slope.cpu().double(), exact.cosh() ** -2, rtol=16 * epsilon, atol=0)


@over_fused
def test_kernel_at_its_ends(backend: str):
    z = torch.tensor([[0.0, torch.inf, -torch.inf, 3e38, NAN]])
    with running_on(backend) as (_, device):
        capped, slope = (torch.empty(z.shape, device=device) for _ in range(2))
        softcap(z.to(device), capped, slope, 30.0)
    assert torch.equal(capped.cpu()[:, :4], torch.tensor([[0.0, 30.0, -30.0, 30.0]])) and capped[0, 4].isnan()
    assert torch.equal(slope.cpu(), torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]]))


def in_every_regime() -> list:
    """(backend, regime); they are long in Triton's interpreter."""
    return [pytest.param(b, r, marks=pytest.mark.long if b == "triton" else ()) for b in FUSED for r in REGIMES]


@pytest.mark.parametrize(("backend", "regime"), in_every_regime(), ids=by_name)
@over_divergences
def test_value_and_gradients(backend: str, regime: Regime, divergence: str):
    inputs = to(LINEAR_KL.make(regime), torch.float32)
    options = {"divergence": divergence, **CAPS}
    if regime.distance is not None:
        options["teacher_softcap"] = CAPS["student_softcap"]  # or they would not be near
    loss, gradients = oracle(LINEAR_KL, inputs, **options)
    got, got_gradients = run(backend, inputs, torch.float32, **options)
    plain, plain_gradients = value_and_gradients(LINEAR_KL, inputs, impl="reference", **options)
    digit = 1e-8 / loss.item()  # the scores' own last
    assert distance(got, loss) <= max(1e-6 + digit, 2 * distance(plain, loss))
    for name, gradient in got_gradients.items():
        bound = max(1e-5, 2 * distance(plain_gradients[name], gradients[name]))
        assert distance(gradient, gradients[name]) <= bound, name


@over_fused
def test_gradients_where_the_cap_bites(backend: str):
    """Scores at several times the cap: of 1 - (s / c)^2 in float32 nothing would be left."""
    inputs = to(LINEAR_KL.make(Regime("far", 30.0, 3.0)), torch.float32)
    options = {"student_softcap": 5.0, "teacher_softcap": 5.0}
    _, gradients = oracle(LINEAR_KL, inputs, **options)
    _, got = run(backend, inputs, torch.float32, **options)
    for name, gradient in got.items():
        assert distance(gradient, gradients[name]) <= 1e-5, name


@over_fused
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=by_name)
def test_sixteen_bits(backend: str, dtype: torch.dtype):
    inputs = to(LINEAR_KL.make(UNRELATED), dtype)
    _, gradients = oracle(LINEAR_KL, inputs, **CAPS)
    _, got = run(backend, inputs, dtype, **CAPS)
    roundings = 4 if backend == "triton" else 2  # of scores' gradients as matrix operands, which it may cut off
    for name, gradient in got.items():
        assert gradient.dtype == dtype
        assert distance(gradient, gradients[name]) <= roundings * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("backend", ["cpp", pytest.param("triton", marks=pytest.mark.long)])
@pytest.mark.parametrize("models", ["student", "teacher"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_one_cap_dropped_tokens_labels_and_a_wider_student(backend: str, models: str, reduction: str):
    inputs = to(LINEAR_KL.make(UNRELATED), torch.float32)
    inputs["teacher_weight"], inputs["teacher_bias"] = inputs["teacher_weight"][:150], inputs["teacher_bias"][:150]
    labels = torch.randint(203, (24,))
    labels[::3] = -100
    options = {f"{models}_softcap": 3.0, "labels": labels, "ce_weight": 0.7, "reduction": reduction}
    loss, gradients = oracle(LINEAR_KL, inputs, **options)
    inputs["student_hidden"][::3] = NAN  # what a dropped token holds counts for nothing
    got, got_gradients = run(backend, inputs, torch.float32, workspace_mb=0.02, **options)
    assert distance(got, loss) <= 1e-6
    for name, gradient in got_gradients.items():
        assert distance(gradient, gradients[name]) <= 1e-5, name


def test_blocks_of_rows(monkeypatch: pytest.MonkeyPatch):
    """How many rows are capped at a time changes no bit."""
    inputs = to(LINEAR_KL.make(UNRELATED), torch.float32)
    loss, gradients = run("cpp", inputs, torch.float32, **CAPS)
    monkeypatch.setattr(linear_kl_cpu, "CAPPED_ROWS", 1)
    other, other_gradients = run("cpp", inputs, torch.float32, **CAPS)
    assert torch.equal(loss, other) and all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)


def test_gradcheck():
    inputs = {name: x.requires_grad_() for name, x in LINEAR_KL.make(UNRELATED, tokens=4, vocabulary=7).items()}
    student = {name: inputs.pop(name) for name in LINEAR_KL.student}

    def loss(*tensors: Tensor) -> Tensor:
        given = dict(zip(student, tensors, strict=True)) | {name: x.detach() for name, x in inputs.items()}
        return fastkd.linear_kl(**given, student_softcap=2.0, teacher_softcap=3.0, reduction="none", impl="fused")

    assert torch.autograd.gradcheck(loss, tuple(student.values()))


def test_the_module():
    inputs = to(LINEAR_KL.make(UNRELATED), torch.float32)
    assert torch.equal(fastkd.nn.LinearKLLoss(**CAPS)(**inputs), fastkd.linear_kl(**inputs, **CAPS))


@pytest.mark.long
def test_compiled_code():
    inputs = to(LINEAR_KL.make(UNRELATED), torch.float32)
    wanted = fastkd.linear_kl(**inputs, **CAPS)
    compiled = torch.compile(fastkd.linear_kl, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs, **CAPS), wanted)


@pytest.mark.parametrize(("cap", "kind"), [(0.0, ValueError), (-1.0, ValueError), (NAN, ValueError), ("30", TypeError)])
def test_a_cap_is_a_positive_number(cap, kind: type):
    inputs = to(LINEAR_KL.make(UNRELATED), torch.float32)
    with pytest.raises(kind, match="teacher_softcap: expected a number > 0"):
        fastkd.linear_kl(**inputs, teacher_softcap=cap)
