"""`return_metrics` of the losses on the vocabulary: what is told beside a loss, on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

from .cases import (
    INF,
    LINEAR_KL,
    LOGIT_KL,
    LONG_IN_TRITON,
    NAN,
    REGIMES,
    TOKEN_OPS,
    UNRELATED,
    Inputs,
    Op,
    Regime,
    by_name,
    over_backends,
    over_divergences,
    over_fused,
    over_reductions,
    over_token_ops,
    placed,
    running_on,
    to,
    value_and_gradients,
)

Metrics = dict[str, Tensor]
NAMES = ["kd", "ce", "student_entropy", "teacher_entropy", "agreement"]
FLAT, PEAKED = Regime("flat", 1e-3, None), Regime("peaked", 100.0, 3.0)


def metrics_of(op: Op, inputs: Inputs, **options: Any) -> Metrics:
    with torch.no_grad():
        _, metrics = op.function(**inputs, **options, return_metrics=True)  # type: ignore[misc]
    return metrics


def wanted_of(op: Op, inputs: Inputs, **options: Any) -> Metrics:
    """The reference's in float64, of what `inputs` hold."""
    return metrics_of(op, to(inputs, torch.float64), **placed(options, "cpu"), impl="reference")


def check(
    got: Metrics,
    wanted: Metrics,
    dtype: torch.dtype = torch.float32,
    bound: float = 1e-5,
    plain: Metrics | None = None,
) -> None:
    """Entropies and agreement to an absolute error; kd and ce, which may be a hundred nats, to that of a loss.

    That is twice what plain torch is off by, if it is more.
    """
    assert list(got) == list(wanted)
    for name, x in got.items():
        assert x.shape == () and x.dtype == dtype and not x.requires_grad and x.grad_fn is None
        allowed = bound if name not in ("kd", "ce") else 1e-6 * abs(wanted[name].item()) + 1e-7
        if plain is not None:
            allowed = max(allowed, 2 * abs(plain[name].item() - wanted[name].item()))
        error = abs(x.item() - wanted[name].item())
        assert error <= allowed or (x.isinf() and x.item() == wanted[name].item()), (name, x, wanted[name])


def token_options(inputs: Inputs, vocabulary: int) -> dict[str, Any]:
    """Labels of which one is ignored, and weights of which one is 0."""
    tokens = next(iter(inputs.values())).shape[0]
    labels, weight = torch.randint(0, vocabulary, (tokens,)), 0.5 + torch.rand(tokens, dtype=torch.float64)
    labels[1], weight[2] = -100, 0
    return {"labels": labels, "weight": weight, "ce_weight": 0.3, "kd_weight": 0.7, "temperature": 2.0, "beta": 0.3}


# ---- what they are ---------------------------------------------------------------------------------------------------


def test_the_reference_by_hand():
    student, teacher = UNRELATED.logits(6, 50)
    teacher[0, 7], student[0, 7] = 20, 20  # a token on which both agree
    labels, weight = torch.randint(0, 50, (6,)), torch.rand(6, dtype=torch.float64)
    options = {"labels": labels, "ce_weight": 0.3, "kd_weight": 0.7, "temperature": 2.0, "weight": weight}
    inputs = {"student_logits": student, "teacher_logits": teacher}
    got = metrics_of(LOGIT_KL, inputs, **options, impl="reference")
    q, p = (torch.distributions.Categorical(logits=x / 2.0) for x in (student, teacher))
    rows = {
        "kd": 4 * torch.distributions.kl_divergence(p, q),
        "ce": F.cross_entropy(student, labels, reduction="none"),
        "student_entropy": q.entropy(),
        "teacher_entropy": p.entropy(),
        "agreement": (student.argmax(-1) == teacher.argmax(-1)).double(),
    }
    check(got, {name: (x * weight).sum() / weight.sum() for name, x in rows.items()}, torch.float64, 1e-12)
    loss = fastkd.logit_kl(student, teacher, **options)
    assert abs(0.7 * got["kd"] + 0.3 * got["ce"] - loss) <= 1e-12


def in_every_regime() -> list:
    """(op, backend, regime); peaked logits are not of products, of which float32 has few digits there."""
    regimes = [(op, regime) for op in TOKEN_OPS for regime in (*REGIMES, FLAT)] + [(LOGIT_KL, PEAKED)]
    return [
        pytest.param(op, backend, regime, marks=pytest.mark.long if backend == "triton" and op is LINEAR_KL else ())
        for op, regime in regimes
        for backend in ("cpp", "triton")
    ]


@pytest.mark.parametrize(("op", "backend", "regime"), in_every_regime(), ids=by_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=by_name)
def test_against_float64(op: Op, backend: str, regime: Regime, dtype: torch.dtype):
    torch.manual_seed(0)
    sizes = {"tokens": 4, "vocabulary": 203} if backend == "triton" else {"tokens": 6, "vocabulary": 2500}
    inputs = to(op.make(regime, **sizes), dtype)
    options = token_options(inputs, sizes["vocabulary"])
    double = dtype == torch.float64
    for divergence in ("forward_kl", "reverse_kl", "jsd", {"forward_kl": 0.5, "reverse_kl": 0.5}):
        wanted = wanted_of(op, inputs, divergence=divergence, **options)
        with running_on(backend) as (impl, device):
            moved, kinds = to(inputs, dtype, device), placed(options, device)
            got = metrics_of(op, moved, divergence=divergence, impl=impl, **kinds)
        scores = torch.float64 if double else torch.float32
        plain = metrics_of(op, to(inputs, scores), divergence=divergence, impl="reference", **options)
        check(got, wanted, scores, 1e-12 if double else 1e-5, plain)


@pytest.mark.parametrize("columns", [1023, 1024, 1025, 5000, 128256])
@pytest.mark.parametrize("deviation", [0.0, 1e-3, 1.0, 30.0, 300.0])
def test_entropies_from_nothing_to_all(columns: int, deviation: float):
    """Of rows in one block, in some and in many: log(V) where scores are the same, next to 0 where one is all."""
    torch.manual_seed(0)
    inputs = {name: deviation * torch.randn(3, columns) for name in ("student_logits", "teacher_logits")}
    got = metrics_of(LOGIT_KL, inputs, impl="fused")
    check(got, wanted_of(LOGIT_KL, inputs))
    if deviation == 0:
        assert abs(got["student_entropy"].item() - math.log(columns)) <= 1e-5
    assert got["student_entropy"] >= 0


@over_fused
@pytest.mark.parametrize("rising", [False, True])
def test_maxima_that_move_in_every_block(backend: str, rising: bool):
    """Sums so far become smaller than a digit of those to come, or the other way round."""
    columns = 5000 if backend == "cpp" else 700
    slope = torch.linspace(0, 200.0, columns) * (1 if rising else -1)
    inputs = {"student_logits": slope + torch.randn(2, columns), "teacher_logits": slope + torch.randn(2, columns)}
    wanted = wanted_of(LOGIT_KL, inputs, temperature=3.0)
    with running_on(backend) as (impl, device):
        check(metrics_of(LOGIT_KL, to(inputs, torch.float32, device), temperature=3.0, impl=impl), wanted)


@over_backends
def test_the_first_of_scores_that_are_as_high_is_the_top(backend: str):
    """Within a block, at its edges and blocks apart; and rows without a distribution agree on nothing."""
    columns = 2100
    tops = [((3, 2099), (3,)), ((3, 2099), (2099,)), ((1023,), (1023, 1024)), ((1024,), (1023, 1024)), ((0,), (0,))]
    x = {name: torch.full((7, columns), -1.0) for name in ("student_logits", "teacher_logits")}
    for row, pair in enumerate(tops):
        for scores, places in zip(x.values(), pair, strict=True):
            scores[row, list(places)] = 5.0
    x["student_logits"][5], x["teacher_logits"][6] = -INF, -INF
    x["student_logits"][0, 7] = x["teacher_logits"][0, 8] = -INF  # masked columns of one model
    with running_on(backend) as (impl, device):
        found = [
            metrics_of(LOGIT_KL, {name: scores[row : row + 1].to(device) for name, scores in x.items()}, impl=impl)
            for row in range(7)
        ]
    assert [row["agreement"].item() for row in found] == [1, 0, 1, 0, 1, 0, 0]
    assert all(row[name] == 0 for row in found[5:] for name in ("student_entropy", "teacher_entropy", "kd"))


@over_token_ops
@pytest.mark.parametrize("backend", ["reference", "cpp"])
@over_divergences
def test_masked_columns_and_unequal_vocabularies(op: Op, backend: str, divergence: str):
    """The divergence is of the columns that both have, the cross-entropy of all; some score -inf in both."""
    inputs = to(op.make(UNRELATED, tokens=5), torch.float32)
    for name in inputs:
        if name.endswith("_bias"):
            inputs[name][[4, 60]] = -INF
        elif name.endswith("logits"):
            inputs[name][:, [4, 60]] = -INF
    options = token_options(inputs, 4)
    for name in ("teacher_logits", "teacher_weight", "teacher_bias"):
        if name in inputs:
            inputs[name] = inputs[name].narrow(-1 if name.endswith("logits") else 0, 0, 150)
    wanted = wanted_of(op, inputs, divergence=divergence, **options)
    assert all(x.isfinite() for x in wanted.values())
    with running_on(backend) as (impl, _):
        check(metrics_of(op, inputs, divergence=divergence, impl=impl, **options), wanted)


@over_backends
def test_of_capped_logits(backend: str):
    inputs = to(LINEAR_KL.make(UNRELATED, tokens=5), torch.float32)
    options = {"student_softcap": 10.0, "teacher_softcap": 15.0, **token_options(inputs, 203)}
    wanted = wanted_of(LINEAR_KL, inputs, **options)
    with running_on(backend) as (impl, device):
        check(metrics_of(LINEAR_KL, to(inputs, torch.float32, device), **placed(options, device), impl=impl), wanted)


@over_token_ops
@over_backends
def test_which_there_are(op: Op, backend: str):
    """Those of terms that have a weight."""
    inputs = to(op.make(UNRELATED, tokens=3), torch.float32)
    labels = torch.tensor([4, -100, 7])
    with running_on(backend) as (impl, device):
        inputs, labels = to(inputs, torch.float32, device), labels.to(device)
        both = metrics_of(op, inputs, labels=labels, ce_weight=1.0, impl=impl)
        kd = metrics_of(op, inputs, labels=labels, impl=impl)
        ce = metrics_of(op, inputs, labels=labels, ce_weight=2.0, kd_weight=0.0, impl=impl)
    assert [list(x) for x in (both, kd, ce)] == [NAMES, [NAMES[0], *NAMES[2:]], ["ce"]]
    assert all(torch.equal(both[name], kd[name]) for name in kd)
    assert abs(ce["ce"] - both["ce"]) <= 1e-6


# ---- over which tokens -----------------------------------------------------------------------------------------------


@over_token_ops
@over_backends
def test_means_are_by_weight_whatever_the_reduction(op: Op, backend: str):
    inputs = to(op.make(UNRELATED, tokens=5), torch.float32)
    options = token_options(inputs, 203)
    with running_on(backend) as (impl, device):
        inputs, options = to(inputs, torch.float32, device), placed(options, device)
        means = metrics_of(op, inputs, **options, impl=impl)
        others = [{"reduction": "sum"}, {"reduction": "none"}, {"normalizer": 31}, {"normalizer": torch.tensor(0.5)}]
        for other in others:
            check(metrics_of(op, inputs, **options, **other, impl=impl), means, bound=1e-6)
        scaled = {**options, "weight": 3 * options["weight"]}
        check(metrics_of(op, inputs, **scaled, reduction="sum", impl=impl), means, bound=1e-6)


@over_token_ops
@over_backends
@pytest.mark.parametrize("why", ["weight", "labels", "normalizer", "tokens"])
def test_nothing_left_to_average(op: Op, backend: str, why: str):
    inputs = to(op.make(UNRELATED, tokens=0 if why == "tokens" else 3), torch.float32)
    labels = torch.full((len(next(iter(inputs.values()))),), -100 if why == "labels" else 5)
    options: dict[str, Any] = {"labels": labels, "ce_weight": 0.5}
    if why == "weight":
        options["weight"] = torch.zeros(3)
    elif why == "normalizer":
        options["normalizer"] = 0
    with running_on(backend) as (impl, device):
        found = metrics_of(op, to(inputs, torch.float32, device), **placed(options, device), impl=impl)
    assert list(found) == NAMES and all(x == 0 for x in found.values())


@over_token_ops
@over_backends
def test_what_dropped_tokens_hold_counts_for_nothing(op: Op, backend: str):
    inputs = to(op.make(UNRELATED, tokens=4), torch.float32)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5])
    clean = metrics_of(op, inputs, weight=weight, impl="reference")
    for name in ("student_logits", "teacher_logits", "student_hidden", "teacher_hidden"):
        if name in inputs:
            inputs[name][1] = NAN
    with running_on(backend) as (impl, device):
        check(metrics_of(op, to(inputs, torch.float32, device), weight=weight.to(device), impl=impl), clean)


# ---- beside the loss -------------------------------------------------------------------------------------------------


@over_token_ops
@pytest.mark.parametrize("backend", LONG_IN_TRITON)
@over_reductions
def test_loss_and_gradients_are_the_same_beside_them(op: Op, backend: str, reduction: str):
    """To the bit, in rows of one block and of several; and two backward passes agree."""
    for divergence, columns in (
        ("forward_kl", 203),
        ("jsd", 203),
        ("reverse_kl", 203 if backend == "triton" else 2500),
    ):
        inputs = to(op.make(UNRELATED, tokens=3, vocabulary=columns), torch.float32)
        options: dict[str, Any] = {"divergence": divergence, "reduction": reduction}
        with running_on(backend) as (impl, device):
            inputs = to(inputs, torch.float32, device)
            alone, gradients = value_and_gradients(op, inputs, impl=impl, **options)
            leaves = {name: inputs[name].requires_grad_() for name in op.student}
            loss, metrics = op.function(**inputs, impl=impl, return_metrics=True, **options)  # type: ignore[misc]
            assert torch.equal(loss, alone)
            assert all(not x.requires_grad for x in metrics.values())
            for _ in range(2):
                found = torch.autograd.grad(loss.sum(), list(leaves.values()), retain_graph=True)
                for name, gradient in zip(leaves, found, strict=True):
                    assert torch.equal(gradient, gradients[name]), name


@over_token_ops
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradcheck(op: Op, backend: str):
    inputs = op.make(UNRELATED, tokens=2, vocabulary=7)
    leaves = [inputs[name].requires_grad_() for name in op.student]

    def loss_beside_metrics(*leaves: Tensor) -> Tensor:
        given = {**inputs, **dict(zip(op.student, leaves, strict=True))}
        with running_on(backend) as (impl, _):
            loss, _ = op.function(**given, impl=impl, return_metrics=True, divergence="jsd")  # type: ignore[misc]
        return loss

    assert torch.autograd.gradcheck(loss_beside_metrics, leaves)


@over_token_ops
@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.long
def test_compiles_without_a_graph_break(op: Op, impl: str, reduction: str):
    torch._dynamo.reset()
    inputs = to(op.make(UNRELATED, tokens=5), torch.float32)
    leaves = [inputs[name].requires_grad_() for name in op.student]

    def function(inputs: Inputs) -> tuple[Tensor, Metrics]:
        return op.function(**inputs, impl=impl, reduction=reduction, return_metrics=True)  # type: ignore[return-value]

    loss, metrics = torch.compile(function, fullgraph=True, backend="aot_eager")(inputs)
    wanted, wanted_metrics = function(inputs)
    assert (loss - wanted).abs().max() <= 1e-6
    check(metrics, wanted_metrics, bound=1e-6)
    for got, one in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (loss, wanted)), strict=True):
        assert (got - one).abs().max() <= 1e-6


def test_vmap_and_func_grad():
    student, teacher = (x.float().view(3, 4, 33) for x in UNRELATED.logits(12, 33))

    def function(s: Tensor, t: Tensor) -> tuple[Tensor, Metrics]:
        return fastkd.logit_kl(s, t, return_metrics=True)

    _, metrics = torch.func.vmap(function)(student, teacher)
    assert all(torch.equal(metrics["kd"][i], function(student[i], teacher[i])[1]["kd"]) for i in range(3))
    gradient, told = torch.func.grad(function, has_aux=True)(student[0], teacher[0])
    assert torch.equal(told["student_entropy"], metrics["student_entropy"][0]) and gradient.abs().max() > 0


def test_modules():
    inputs = to(LINEAR_KL.make(UNRELATED), torch.float32)
    loss, metrics = fastkd.nn.LinearKLLoss(return_metrics=True)(**inputs)
    assert torch.equal(loss, fastkd.linear_kl(**inputs)) and "agreement" in metrics
    y = to(LOGIT_KL.make(UNRELATED), torch.float32)
    _, metrics = fastkd.nn.LogitKLLoss(return_metrics=True, temperature=2.0)(**y)
    check(metrics, metrics_of(LOGIT_KL, y, temperature=2.0), bound=0)
    assert isinstance(fastkd.nn.LogitKLLoss()(**y), Tensor)
    with pytest.raises(TypeError, match="return_metrics: expected a bool, got int"):
        fastkd.nn.LinearKLLoss(return_metrics=1)


@over_token_ops
def test_what_is_no_flag(op: Op):
    with pytest.raises(TypeError, match="return_metrics: expected a bool, got str"):
        op.function(**op.make(UNRELATED), return_metrics="kd")
