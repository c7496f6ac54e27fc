"""Mixes: divergence={"forward_kl": 0.5, "reverse_kl": 0.5} in every op that takes a divergence."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastkd
from fastkd.checks import Objective
from fastkd.divergence import DIVERGENCES, MIX

from .cases import (
    DIVERGENCE_OPS,
    HEADS,
    LOGIT_KL,
    LONG_IN_TRITON,
    UNRELATED,
    Op,
    Regime,
    by_name,
    distance,
    oracle,
    over_backends,
    running_on,
    to,
    value_and_gradients,
)

# Each a way of its own through the kernels: a closed form, no mixture m, one, or two; one of skew_kl alone, or of more;
# with tvd and without; with reverse KL and without.
MIXES = [
    {"forward_kl": 0.5, "reverse_kl": 0.5},
    {"reverse_kl": 3.0},
    {"forward_kl": 0.3, "tvd": 0.7},
    {"jsd": 0.5, "reverse_kl": 0.25},
    {"skew_reverse_kl": 1.5, "forward_kl": 1.0},
    {"skew_kl": 1.0, "forward_kl": 0.5},
    {"skew_kl": 0.5, "tvd": 0.5},
    {"skew_kl": 0.5, "skew_reverse_kl": 0.5},
    {"skew_kl": 0.5, "skew_reverse_kl": 0.25, "jsd": 1.5},
    dict(zip(DIVERGENCES, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), strict=True)),
]
NEAR, FAR = Regime("near", 5.0, 1e-3), Regime("far", 30.0, None)


def name_of(mix: dict[str, float]) -> str:
    return "+".join(mix)


over_mixes = pytest.mark.parametrize("mix", MIXES, ids=name_of)
over_ops = pytest.mark.parametrize("op", DIVERGENCE_OPS, ids=by_name)


def worst_member(op: Op, inputs: dict[str, Any], mix: dict[str, float], wanted: dict[str, Any], **options) -> float:
    """What rounding costs the gradients of the members alone, relative to the mix's: what it may cost those."""
    errors = []
    for name, gradient in wanted.items():
        exact = {m: oracle(op, inputs, divergence=m, **options)[1][name] for m in mix}
        found = {m: value_and_gradients(op, inputs, divergence=m, impl="reference", **options)[1][name] for m in mix}
        error = sum(weight * (found[m].double() - exact[m]).norm().item() for m, weight in mix.items())
        errors.append(error / gradient.norm().item())
    return max(errors)


@pytest.mark.parametrize("regime", [UNRELATED, NEAR, FAR], ids=by_name)
@pytest.mark.parametrize("backend", LONG_IN_TRITON)
@over_mixes
@over_ops
def test_a_mix_is_as_exact_as_its_members(op: Op, backend: str, regime: Regime, mix: dict[str, float]):
    inputs = to(op.make(regime), torch.float32)
    loss, gradients = oracle(op, inputs, divergence=mix, beta=0.3)
    with running_on(backend) as (impl, device):
        got, found = value_and_gradients(op, to(inputs, torch.float32, device), impl=impl, divergence=mix, beta=0.3)
    if op is LOGIT_KL:  # scores are inputs: nothing else is rounded
        assert got.item() == pytest.approx(loss.item(), rel=1e-6)
        bound = 1e-5
    else:
        bound = max(1e-5, 2 * worst_member(op, inputs, mix, gradients, beta=0.3))
    for name, gradient in found.items():
        assert distance(gradient, gradients[name]) <= bound, name


@over_backends
@over_ops
def test_a_mix_is_the_sum_of_its_members(op: Op, backend: str):
    """In float64, with a temperature and labels where there are any, in whatever order the names stand."""
    inputs = op.make(UNRELATED)
    options: dict[str, Any] = {"beta": 0.3}
    if op.name in ("logit_kl", "linear_kl"):
        labels = torch.randint(0, 203, next(iter(inputs.values())).shape[:-1])
        options |= {"temperature": 2.0, "labels": labels, "ce_weight": 0.0}
    mix = {"tvd": 0.25, "skew_kl": 0.0, "forward_kl": 0.5, "reverse_kl": 2.0, "jsd": 1.0}
    loss, gradients = 0.0, dict.fromkeys(op.student, 0.0)
    for member, weight in mix.items():
        value, parts = oracle(op, inputs, divergence=member, **options)
        loss = loss + weight * value
        gradients = {name: gradients[name] + weight * part for name, part in parts.items()}
    with running_on(backend) as (impl, device):
        moved = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in options.items()}
        got, found = value_and_gradients(op, to(inputs, torch.float64, device), impl=impl, divergence=mix, **moved)
    assert distance(got, loss) <= 1e-14
    for name, gradient in found.items():
        assert distance(gradient, gradients[name]) <= 1e-13, name


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@over_ops
def test_a_mix_of_one_is_the_divergence_itself(op: Op, backend: str):
    inputs = to(op.make(UNRELATED), torch.float32)
    with running_on(backend) as (impl, _):
        for name in DIVERGENCES:
            loss, gradients = value_and_gradients(op, inputs, impl=impl, divergence=name)
            got, found = value_and_gradients(op, inputs, impl=impl, divergence={"tvd": 0, "jsd": 0} | {name: 1})
            assert torch.equal(got, loss) and all(torch.equal(found[k], gradients[k]) for k in gradients)


@pytest.mark.parametrize("impl", ["reference", "fused"])
@over_mixes
def test_gradcheck(impl: str, mix: dict[str, float]):
    s, t = UNRELATED.logits(3, 7)

    def losses(s: torch.Tensor, beta: float) -> torch.Tensor:
        return fastkd.logit_kl(s, t, divergence=mix, beta=beta, temperature=1.5, reduction="none", impl=impl)

    for beta in (0.3, 0.5):
        assert torch.autograd.gradcheck(losses, (s.requires_grad_(), beta))


@pytest.mark.parametrize("backend", LONG_IN_TRITON)
@over_mixes
def test_rows_masked_in_part_or_whole(backend: str, mix: dict[str, float]):
    """-inf in both, in one, and in all of a row: infinite where a member is, and never NaN where it is not."""
    s, t = (x.float() for x in UNRELATED.logits(4, 40))
    s[0, :9] = t[0, :9] = -torch.inf
    s[1] = -torch.inf
    s[2, 3] = -torch.inf  # forward KL is infinite
    t[3, 3] = -torch.inf  # reverse KL is infinite
    options = {"divergence": mix, "reduction": "none"}
    with running_on(backend) as (impl, device):
        loss = fastkd.logit_kl(s.to(device), t.to(device), impl=impl, **options).cpu()
    wanted = fastkd.logit_kl(s.double(), t.double(), impl="reference", **options)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    assert loss[1] == 0
    assert loss[2].isinf() == ("forward_kl" in mix) and loss[3].isinf() == ("reverse_kl" in mix)


def test_torch_compile_takes_any_weights():
    """A schedule of weights makes no graph for each of them."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    s, t = (x.float() for x in UNRELATED.logits(4, 33))

    def loss(s, weight):
        return fastkd.logit_kl(s, t, divergence={"forward_kl": weight, "reverse_kl": 1 - weight}, impl="fused")

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for weight in (0.9, 0.7, 0.45, 0.2):
        torch.testing.assert_close(compiled(s, weight), loss(s, weight))
    assert counter.frame_count <= 2


def test_what_kernels_are_told():
    """Weights of 0 are left out, the order is that of DIVERGENCES, and one of weight 1 is no mix."""
    objective = Objective({"tvd": 2, "forward_kl": 0.5, "jsd": 0}, 0.5, 1.0, 1.0, 0.0)
    assert objective.divergence == {"forward_kl": 0.5, "tvd": 2}
    assert objective.code == MIX + 1 + 32
    _, numbers = objective.for_op()
    assert numbers.tolist() == [0.5, 1.0, 1.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 2.0]
    assert Objective({"jsd": 1.0}, 0.5, 1.0, 1.0, 0.0).for_op()[1].shape == (4,)
    shown = repr(fastkd.nn.RelationKLLoss(num_heads=HEADS, divergence={"forward_kl": 0.5, "tvd": 2}))
    assert "divergence={'forward_kl': 0.5, 'tvd': 2}" in shown


@pytest.mark.parametrize(
    ("divergence", "message"),
    [
        ({}, r"divergence: expected at least one name with a weight > 0, got \{\}"),
        ({"jsd": 0}, r"divergence: expected at least one name with a weight > 0, got \{'jsd': 0\}"),
        ({"foward_kl": 1}, r"divergence: expected one of .*, got 'foward_kl'; did you mean 'forward_kl'\?"),
        ({"jsd": -0.5}, r"divergence\['jsd'\]: expected a number >= 0, got -0.5"),
        ({"jsd": float("nan")}, r"divergence\['jsd'\]: expected a number >= 0, got nan"),
        ({"jsd": float("inf")}, r"divergence\['jsd'\]: expected a number >= 0, got inf"),
        ({"jsd": "half"}, r"divergence\['jsd'\]: expected a number >= 0, got str"),
    ],
)
def test_bad_mixes(divergence: dict, message: str):
    s, t = UNRELATED.logits(2, 5)
    for call in (
        lambda: fastkd.logit_kl(s, t, divergence=divergence),
        lambda: fastkd.nn.LinearKLLoss(divergence=divergence),
        lambda: fastkd.nn.AttentionKLLoss(num_heads=2, divergence=divergence),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()


LIMITS = [
    ("jsd", 0, "forward_kl", lambda d, beta: d / beta),
    ("jsd", 1, "reverse_kl", lambda d, beta: d / (1 - beta)),
    ("skew_kl", 0, "forward_kl", lambda d, beta: d),
    ("skew_kl", 1, None, lambda d, beta: d),
    ("skew_reverse_kl", 0, "reverse_kl", lambda d, beta: d),
    ("skew_reverse_kl", 1, None, lambda d, beta: d),
]


@pytest.mark.parametrize(("name", "end", "other", "scaled"), LIMITS, ids=lambda x: str(x) if not callable(x) else "")
def test_where_beta_ends_the_error_says_what_to_take(name: str, end: int, other: str | None, scaled):
    s, t = UNRELATED.logits(4, 30)
    for divergence, beta in itertools.product((name, {name: 0.5, "tvd": 1}), (end, float(end))):
        says = rf"beta: expected a number in \(0, 1\), as at {beta} {name} is .*{other or '0'}\"?, got {beta}$"
        with pytest.raises(ValueError, match=says):
            fastkd.logit_kl(s, t, divergence=divergence, beta=beta)
    beta = abs(end - 1e-7)
    found = scaled(fastkd.logit_kl(s, t, divergence=name, beta=beta), beta)
    wanted = fastkd.logit_kl(s, t, divergence=other) if other else torch.zeros(()).double()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
