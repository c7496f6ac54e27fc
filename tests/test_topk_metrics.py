"""What top-k teachers tell beside a loss, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import TopK

from .cases import INF, NAN, REGIMES, UNRELATED, Regime, by_name, over_backends, placed, running_on
from .test_topk import hidden_states, over_tails, top

Metrics = dict[str, Tensor]
NAMES = ["kd", "ce", "student_entropy", "teacher_entropy", "agreement", "student_mass", "teacher_mass"]


def told(student: Tensor, teacher: TopK, **options: Any) -> Metrics:
    return fastkd.logit_kl(student, teacher, return_metrics=True, **options)[1]


def moved(teacher: TopK, device: Any) -> TopK:
    return teacher.to(device)


def check(got: Metrics, wanted: Metrics, bound: float = 1e-5) -> None:
    """kd and ce to the error of a loss, the others to an absolute one."""
    assert list(got) == list(wanted)
    for name, x in got.items():
        assert x.shape == () and not x.requires_grad
        allowed = bound if name not in ("kd", "ce") else 1e-6 * abs(wanted[name].item()) + 1e-7
        assert abs(x.item() - wanted[name].item()) <= allowed or x == wanted[name], (name, x, wanted[name])


def some_options(tokens: int, columns: int) -> dict[str, Any]:
    labels, weight = torch.randint(0, columns, (tokens,)), 0.5 + torch.rand(tokens, dtype=torch.float64)
    labels[1], weight[2] = -100, 0
    return {"labels": labels, "weight": weight, "ce_weight": 0.3, "kd_weight": 0.7, "temperature": 2.0, "beta": 0.3}


@over_tails
def test_the_reference_by_hand(tail: str):
    student, logits = UNRELATED.logits(6, 50)
    student[0, 7] = logits[0, 7] = 20.0  # on which both agree
    student[1, int(logits[1].argmax())] = 19.0
    student[1, 3] = 20.0  # of the tail, most likely
    teacher = top(logits, 5, tail, dtype=torch.float64)
    q, p = student.softmax(-1), logits.softmax(-1)
    q_ids, p_ids = q.gather(-1, teacher.indices), p.gather(-1, teacher.indices)
    mass = {"student_mass": q_ids.sum(-1), "teacher_mass": p_ids.sum(-1)}
    if tail == "conditional":
        mass.pop("student_mass")
        q_ids = q_ids / q_ids.sum(-1, keepdim=True)
        agreement = student.gather(-1, teacher.indices).argmax(-1) == 0
    else:
        q_ids = torch.cat([q_ids, 1 - q_ids.sum(-1, keepdim=True)], -1)
        agreement = student.argmax(-1) == logits.argmax(-1)
    if tail in ("renormalize", "conditional"):
        p_ids = p_ids / p_ids.sum(-1, keepdim=True)
    elif tail == "bucket":
        p_ids = torch.cat([p_ids, 1 - p_ids.sum(-1, keepdim=True)], -1)
    entropies = {"student_entropy": q_ids, "teacher_entropy": p_ids}
    rows = {name: torch.special.entr(x).sum(-1) for name, x in entropies.items()}
    rows |= {"agreement": agreement.double(), **mass}
    loss, got = fastkd.logit_kl(student, teacher, return_metrics=True, impl="reference")
    check(got, {"kd": loss, **{name: x.mean() for name, x in rows.items()}}, 1e-12)


def in_every_regime() -> list:
    """(backend, regime); all but one are long in Triton's interpreter."""
    quick = {("triton", UNRELATED), *(("cpp", regime) for regime in REGIMES)}
    pairs = [(backend, regime) for backend in ("cpp", "triton") for regime in REGIMES]
    return [pytest.param(*x, marks=() if x in quick else pytest.mark.long) for x in pairs]


@pytest.mark.parametrize(("backend", "regime"), in_every_regime(), ids=by_name)
def test_every_tail_and_divergence(backend: str, regime: Regime):
    """Against the reference in float64; and the loss and its gradient are to the bit those without metrics."""
    tokens, columns = (4, 203) if backend == "triton" else (5, 2203)
    for tail, divergence in [("bucket", "jsd"), ("ignore", "skew_kl"), ("conditional", "reverse_kl")]:
        student, logits = (x.float() for x in regime.logits(tokens, columns))
        teacher, options = top(logits, 7, tail), some_options(tokens, columns) | {"divergence": divergence}
        wanted = told(student.double(), teacher, impl="reference", **options)
        assert list(wanted) == [name for name in NAMES if name != "student_mass" or tail != "conditional"]
        with running_on(backend) as (impl, device):
            leaf, kinds = student.to(device).requires_grad_(), {"impl": impl, **placed(options, device)}
            loss, got = fastkd.logit_kl(leaf, moved(teacher, device), return_metrics=True, **kinds)
            alone = fastkd.logit_kl(leaf, moved(teacher, device), **kinds)
            assert torch.equal(loss, alone)
            assert torch.equal(*(torch.autograd.grad(x, leaf)[0] for x in (loss, alone)))
        check(got, wanted)


@over_backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_of_hidden_states(backend: str, reduction: str):
    inputs, options = {name: x.float() for name, x in hidden_states(5, 203).items()}, some_options(5, 203)
    options |= {"reduction": reduction, "workspace_mb": 3 * 203 * 4 / 2**20, "student_scale": 0.7}
    teacher = top(torch.randn(5, 203), 6)
    doubles = {name: x.double() for name, x in inputs.items()}
    _, wanted = fastkd.linear_kl(teacher_hidden=teacher, impl="reference", return_metrics=True, **doubles, **options)
    with running_on(backend) as (impl, device):
        given = {name: x.to(device).requires_grad_() for name, x in inputs.items()}
        kinds = {"impl": impl, **placed(options, device)}
        loss, got = fastkd.linear_kl(teacher_hidden=moved(teacher, device), return_metrics=True, **given, **kinds)
        assert torch.equal(loss, fastkd.linear_kl(teacher_hidden=moved(teacher, device), **given, **kinds))
        assert loss.requires_grad
    check(got, wanted)


@over_backends
def test_rows_that_say_nothing_and_rows_that_are_dropped(backend: str):
    """A row without entries has no mass, one without scores no categories; of a dropped one nothing is read."""
    student, logits = (x.float() for x in UNRELATED.logits(4, 103))
    teacher = top(logits, 5)
    ids = teacher.indices.clone()
    ids[0] = -1
    student[1], student[2] = -INF, NAN
    with running_on(backend) as (impl, device):
        x, t = student.to(device), TopK(ids.to(device), teacher.log_probs.to(device))
        rows = [told(x[i : i + 1], t[i : i + 1], impl=impl) for i in (0, 1)]
        dropped = told(x[2:3], t[2:3], weight=torch.zeros(1, device=device), impl=impl)
    names = [name for name in NAMES if name != "ce"]
    assert [row[name].item() for row in rows for name in names[:-1]] == [0.0] * 10
    assert rows[0]["teacher_mass"] == 0 and abs(rows[1]["teacher_mass"] - teacher.log_probs[1].exp().sum()) < 1e-6
    assert all(x == 0 for x in dropped.values())


@over_backends
def test_scores_that_are_as_high_agree(backend: str):
    """Scores in 16 bits often are; what is asked is whether any column is higher than the teacher's first id."""
    student = torch.zeros(4, 300)
    student[0, [3, 290]] = student[1, [290]] = student[2, [3, 4]] = 5.0
    ids, log_probs = torch.tensor([[4, 3]] * 4), torch.tensor([[0.2, 0.6]] * 4).log()
    with running_on(backend) as (impl, device):
        found = [
            told(student[i : i + 1].to(device), TopK(ids[:1].to(device), log_probs[:1].to(device)), impl=impl)
            for i in range(4)
        ]
    assert [row["agreement"].item() for row in found] == [1, 0, 1, 1]


@over_backends
def test_all_columns_are_the_metrics_of_the_whole_distribution(backend: str):
    student, logits = (x.float() for x in UNRELATED.logits(4, 103))
    order = torch.randperm(103)
    teacher = TopK(order.expand(4, -1), logits.double().log_softmax(-1)[:, order])
    wanted = fastkd.logit_kl(student.double(), logits.double(), return_metrics=True, impl="reference")[1]
    with running_on(backend) as (impl, device):
        got = told(student.to(device), moved(teacher, device), impl=impl)
    assert abs(got.pop("student_mass") - 1) < 1e-6 and abs(got.pop("teacher_mass") - 1) < 1e-6
    check(got, wanted)


def test_cross_entropy_alone_tells_of_nothing_else():
    student, logits = UNRELATED.logits(3, 20)
    labels = torch.tensor([4, -100, 7])
    for impl in ("reference", "fused"):
        got = told(student, top(logits, 4), labels=labels, ce_weight=2.0, kd_weight=0.0, impl=impl)
        assert list(got) == ["ce"]


def test_the_teachers_mass_is_at_the_temperature_and_in_the_students_vocabulary():
    student, logits = UNRELATED.logits(3, 20)
    teacher = fastkd.TopK.from_logits(logits, 20, temperature=2.0)
    got = told(student[:, :12], teacher, temperature=2.0)
    p = (logits / 2).softmax(-1)
    assert abs(got["teacher_mass"] - p[:, :12].sum(-1).mean()) < 1e-12


def test_modules():
    student, logits = UNRELATED.logits(3, 20)
    teacher = top(logits, 4)
    loss, metrics = fastkd.nn.LogitKLLoss(return_metrics=True)(student, teacher)
    assert loss == fastkd.logit_kl(student, teacher) and list(metrics) == [name for name in NAMES if name != "ce"]
