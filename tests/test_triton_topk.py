"""The row primitive of top-k teachers in Triton: on a GPU where there is one, else in Triton's interpreter.

Blocks are so small that every row has several, at and off their edges, and what is particular to the kernel is checked:
what it sets aside, what is written and what may be read. The oracle is the reference's D in float64, and decimal
arithmetic where a tail is too small for that. The public functions on the kernel: test_triton_topk_losses.py.
"""

from __future__ import annotations

import importlib
from decimal import Decimal, getcontext
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastkd.divergence import DIVERGENCES

from .cases import (
    DEVICE,
    INF,
    NAN,
    REGIMES,
    UNRELATED,
    Regime,
    by_name,
    distance,
    interpreted,
)

pytest.importorskip("triton", reason="Triton is not installed")
kernels = importlib.import_module("fastkd.kernels.topk_rows.host")  # ours: a failure to import it is a failure

R, V, K = 4, 103, 5
MIX = [0.3, 0.5, 0.1, 0.2, 0.4, 0.6]
NAMES = list(DIVERGENCES)

pytestmark = interpreted


def mostly_long(names: list, quick: set) -> list:
    """Parameters, of which the interpreter takes its time for all but some."""
    return [pytest.param(x, marks=[] if getattr(x, "name", x) in quick else pytest.mark.long) for x in names]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that V columns are four blocks."""
    monkeypatch.setattr(kernels, "LARGEST_BLOCK", 32)


def one(name: str) -> list[float]:
    return [float(name == other) for other in NAMES]


class Teacher(NamedTuple):
    ids: Tensor  # [R, K]
    log_probs: Tensor  # [R, K]
    tail: Tensor | None  # [R]


class Options(NamedTuple):
    divergences: list[float]
    conditional: bool = False
    beta: float = 0.3
    temperature: float = 1.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0


EVERYTHING = Options(MIX, temperature=2.0, kd_weight=0.4, ce_weight=0.7)


def top_of(teacher: Tensor, k: int = K, conditional: bool = False) -> Teacher:
    """The top of rows of scores, and the tail that is left, which is a sum of its own."""
    log_p = teacher.double().log_softmax(-1)
    log_probs, ids = log_p.topk(k, -1)
    tail = log_p.scatter(1, ids, -INF).logsumexp(-1)
    return Teacher(ids, log_probs.log_softmax(-1) if conditional else log_probs, tail)


def rows_of(regime: Regime = UNRELATED, dtype: torch.dtype = torch.float32, **sizes: int) -> tuple[Tensor, Teacher]:
    student, teacher = regime.logits(**({"tokens": R, "vocabulary": V} | sizes))
    return student.to(dtype), top_of(teacher)


def run(
    student: Tensor,
    teacher: Teacher,
    options: Options,
    coefficient: Tensor | None = None,
    labels: Tensor | None = None,
    gradient: Tensor | None = None,
    stats: Tensor | None = None,
    loss: bool = True,
    metrics: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, stats, gradient); without `loss` by the stats given."""
    rows = len(student)
    student, ids, log_probs, tail = (x if x is None else x.to(DEVICE) for x in (student, *teacher))
    coefficient = torch.ones(rows).double() if coefficient is None else coefficient
    labels = labels if labels is None else labels.to(DEVICE)
    losses = torch.full((rows,), NAN, dtype=torch.float64, device=DEVICE)
    stats = torch.full((rows, 3), NAN, dtype=torch.float64, device=DEVICE) if stats is None else stats
    gradient = torch.full_like(student, NAN) if gradient is None else gradient
    kernels.topk_rows(
        student,
        ids,
        log_probs,
        tail,
        coefficient.to(DEVICE),
        labels,
        losses if loss else None,
        stats,
        gradient,
        *options,
        metrics=metrics,
    )
    return losses.cpu(), stats, gradient.cpu()


def oracle(
    student: Tensor,
    teacher: Teacher,
    options: Options,
    coefficient: Tensor | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What fastkd/ops/drivers/topk_rows.py promises, row by row in float64: (loss, gradient)."""
    student = student.double().requires_grad_()
    tau, losses = options.temperature, []
    for r, scores in enumerate(student):
        kept = (teacher.ids[r] >= 0) & (teacher.ids[r] < len(scores)) & (teacher.log_probs[r] > -INF)
        ids, log_p = teacher.ids[r][kept], teacher.log_probs[r][kept]
        others = torch.ones_like(scores, dtype=torch.bool).index_fill(0, ids, False)
        log_q = scores[ids] / tau
        if not options.conditional:
            tail = scores[others] / tau
            if (tail > -INF).any():
                log_q = torch.cat([log_q, tail.logsumexp(0, keepdim=True)])
                log_p = torch.cat([log_p, log_p.new_tensor([-INF]) if teacher.tail is None else teacher.tail[r, None]])
            elif teacher.tail is not None:
                log_p = log_p - log_p.logsumexp(0)
        loss = scores.new_zeros(())
        if (log_q > -INF).any() and (log_p > -INF).any():
            members = zip(options.divergences, DIVERGENCES.values(), strict=True)
            divergence = sum(w * f(log_p, log_q.log_softmax(0), options.beta) for w, f in members if w)
            loss = options.kd_weight * tau**2 * divergence
        if labels is not None:
            loss = loss - options.ce_weight * scores.log_softmax(0)[labels[r]]
        losses.append(loss if coefficient is None else loss * coefficient[r])
    total = torch.stack(losses)
    return total.detach(), torch.autograd.grad(total.sum(), student, materialize_grads=True)[0]


def check(student: Tensor, teacher: Teacher, options: Options, **rest: Tensor) -> None:
    """Against the oracle on the same scores: fused, in place, and from statistics."""
    loss, gradient = oracle(student, teacher, options, **rest)
    before = student.clone()
    got, stats, got_gradient = run(student, teacher, options, **rest)
    assert torch.equal(student, before)
    exact = student.dtype == torch.float64
    rounding = {torch.float16: 4.9e-4, torch.bfloat16: 3.9e-3}.get(student.dtype, 0.0)
    assert distance(got, loss) <= (1e-12 if exact else 1e-6)
    assert distance(got_gradient, gradient) <= (1e-11 if exact else 1e-5) + rounding
    in_place = student.to(DEVICE, copy=True)
    again, _, written = run(in_place, teacher, options, gradient=in_place, **rest)
    assert torch.equal(again, got) and torch.equal(written, got_gradient)
    *_, later = run(student, teacher, options, stats=stats, loss=False, **rest)
    assert torch.equal(later, got_gradient)


def some_labels(teacher: Teacher) -> Tensor:
    """At both edges, and an id of the row's."""
    labels = torch.randint(0, V, (len(teacher.ids),))
    labels[:3] = torch.tensor([0, V - 1, teacher.ids[2, 1].item()])
    return labels


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", mostly_long(REGIMES, {"near_converged"}), ids=by_name)
def test_regimes(regime: Regime):
    check(*rows_of(regime, tokens=2), Options(MIX))


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_every_divergence_with_everything(name: str):
    student, teacher = rows_of()
    check(
        student,
        teacher,
        EVERYTHING._replace(divergences=one(name)),
        labels=some_labels(teacher),
        coefficient=torch.rand(R).double(),
    )


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype):
    student, teacher = rows_of(dtype=dtype)
    check(student, teacher, EVERYTHING, labels=some_labels(teacher))


@pytest.mark.long
def test_labels_at_temperature_one():
    """Where the cross-entropy takes the divergence's exponentials."""
    student, teacher = rows_of()
    check(student, teacher, EVERYTHING._replace(temperature=1.0), labels=some_labels(teacher))


@pytest.mark.parametrize("ce_weight", mostly_long([0.0, 0.7], {0.0}))
def test_conditional(ce_weight: float):
    student, teacher = UNRELATED.logits(R, V)
    teacher = top_of(teacher, conditional=True)
    labels = some_labels(teacher) if ce_weight else None
    options = EVERYTHING._replace(divergences=MIX if ce_weight else one("jsd"), conditional=True, ce_weight=ce_weight)
    check(student.float(), teacher, options, **({} if labels is None else {"labels": labels}))


@pytest.mark.parametrize("name", mostly_long(["forward_kl", "skew_kl"], {"forward_kl"}))
def test_a_tail_without_mass(name: str):
    """The ids' masses then sum to less than 1."""
    student, teacher = rows_of()
    check(student, teacher._replace(tail=None), Options(one(name)))


@pytest.mark.long
def test_cross_entropy_alone():
    student, teacher = rows_of()
    check(student, teacher, Options(MIX, kd_weight=0.0, ce_weight=1.5), labels=some_labels(teacher))


# ---- tails of next to no mass ----------------------------------------------------------------------------------------


def exact(name: str, q: list[Decimal], p: list[Decimal], beta: Decimal) -> list[Decimal]:
    """q (u - sum q u) of categories, u = dD/dq, to 50 digits."""
    rest = 1 - beta
    of_p = rest if name == "skew_reverse_kl" else beta
    m = [of_p * y + (1 - of_p) * x for x, y in zip(q, p, strict=True)]
    u = {
        "forward_kl": lambda q, p, m: -p / q,
        "reverse_kl": lambda q, p, m: (q / p).ln(),
        "jsd": lambda q, p, m: rest * (q / m).ln(),
        "skew_kl": lambda q, p, m: -rest * p / m,
        "skew_reverse_kl": lambda q, p, m: (q / m).ln() - beta * q / m,
        "tvd": lambda q, p, m: Decimal("0.5").copy_sign(q - p),
    }[name]
    slopes = [u(*x) for x in zip(q, p, m, strict=True)]
    mean = sum(x * slope for x, slope in zip(q, slopes, strict=True))
    return [x * (slope - mean) for x, slope in zip(q, slopes, strict=True)]


@pytest.mark.parametrize("name", mostly_long(NAMES, {"forward_kl"}))
@pytest.mark.parametrize("apart", [3.0, 0.01])
def test_tails_of_next_to_no_mass(name: str, apart: float):
    """1e-12 of each model's mass, and 1e-25: columns of the tail, and ids of a sure row, keep their digits."""
    getcontext().prec = 60
    student, logits = Regime("", 2.0, apart).logits(2, 40)
    for x in (student, logits):
        x[:, 5] += torch.tensor([30.0, 60.0])
    student, teacher = student.float(), top_of(logits, 2)
    *_, gradient = run(student, teacher, Options(one(name)))
    for row, scores in enumerate(student.double().tolist()):
        ids = teacher.ids[row].tolist()
        powers = [Decimal(s).exp() for s in scores]
        tail = sum(x for j, x in enumerate(powers) if j not in ids)
        q = [*(powers[i] for i in ids), tail]
        p = [Decimal(x).exp() for x in (*teacher.log_probs[row].tolist(), teacher.tail[row].item())]
        p[0] = 1 - p[1] - p[2]  # of the largest, a double has not the digits
        slopes = exact(name, [x / sum(q) for x in q], p, Decimal("0.3"))
        wanted = [slopes[2] * x / tail for x in powers]
        for i, slope in zip(ids, slopes, strict=False):
            wanted[i] = slope
        assert distance(gradient[row], torch.tensor([float(x) for x in wanted], dtype=torch.float64)) <= 1e-5


# ---- what may not be read, and what may not be hidden ----------------------------------------------------------------


def test_dropped_rows_are_not_read():
    student, teacher = rows_of()
    coefficient = torch.rand(R).double()
    coefficient[1] = 0
    loss, gradient = oracle(student, teacher, EVERYTHING, coefficient, labels := some_labels(teacher))
    student[1] = NAN
    teacher.log_probs[1] = NAN
    got, stats, got_gradient = run(student, teacher, EVERYTHING, coefficient, labels)
    assert got[1] == 0 and not got_gradient[1].any() and not stats[1].any()
    assert distance(got, loss) <= 1e-6 and distance(got_gradient, gradient) <= 1e-5


@pytest.mark.long
def test_padding_and_ids_of_no_column():
    """-1, beyond the columns, and -inf: as if they were not there; and a row without any."""
    student, teacher = rows_of()
    more = [torch.cat([x, torch.zeros_like(x[:, :3])], 1) for x in (teacher.ids, teacher.log_probs)]
    ids, log_probs = more
    ids[:, K:] = torch.tensor([-1, V + 5, 7])
    log_probs[:, K + 2] = -INF
    padded = Teacher(ids, log_probs, teacher.tail)
    plain, got = run(student, teacher, Options(MIX)), run(student, padded, Options(MIX))
    assert distance(got[0], plain[0]) <= 1e-14 and distance(got[2], plain[2]) <= 1e-7
    padded.ids[0], padded.tail[0] = -1, 0
    loss, _, gradient = run(student, padded, Options(MIX))
    assert loss[0] == 0 and not gradient[0].any() and torch.equal(gradient[1:], got[2][1:])


@pytest.mark.long
def test_masked_columns():
    """The student rules out an id, some of the tail, all of the tail, and all."""
    student, teacher = rows_of()
    ids = teacher.ids
    student[0, ids[0, 1]] = -INF
    student[1, torch.ones(V, dtype=torch.bool).index_fill(0, ids[1], False).nonzero()[::2, 0]] = -INF
    student[2, torch.ones(V, dtype=torch.bool).index_fill(0, ids[2], False)] = -INF
    student[3] = -INF
    for name in ("reverse_kl", "tvd"):
        loss, gradient = oracle(student[:3], Teacher(*(x[:3] for x in teacher)), Options(one(name)))
        got, _, got_gradient = run(student, teacher, Options(one(name)))
        assert distance(got[:3], loss) <= 1e-6 and distance(got_gradient[:3], gradient) <= 1e-5
        assert got[3] == 0 and not got_gradient[3].any()
    got, *_ = run(student, teacher, Options(one("forward_kl")))
    assert got[0] == INF and got[1:].isfinite().all()


@pytest.mark.long
def test_a_tail_without_columns():
    """Every column is an id: then p is divided by its sum, if it has a tail."""
    student, logits = UNRELATED.logits(2, 6)
    teacher = top_of(logits, 6)._replace(tail=torch.full((2,), -3.0).double())
    check(student.float(), teacher, Options(MIX), labels=torch.tensor([3, 0]))
    check(student.float(), teacher._replace(tail=None), Options(one("skew_kl")))


def test_nan_is_not_hidden():
    student, teacher = rows_of()
    student[0, teacher.ids[0, 2]], student[1, 50] = NAN, NAN
    teacher.log_probs[2, 1] = NAN
    loss, _, gradient = run(student, teacher, Options(one("jsd")))
    assert loss.isnan().tolist() == [True, True, True, False]
    assert gradient.isnan().any(1).tolist() == [True, True, True, False]


@pytest.mark.long
def test_labels_out_of_range():
    """NaN is the cross-entropy, and with it the row. Its other metrics are those of the divergence."""
    student, teacher = rows_of()
    told, usual = torch.full((2, R, 6), NAN, dtype=torch.float64, device=DEVICE)
    loss, _, gradient = run(student, teacher, EVERYTHING, labels=torch.tensor([2**40, -5, V, 3]), metrics=told)
    assert loss.isnan().tolist() == gradient.isnan().any(1).tolist() == [True, True, True, False]
    assert told[:, 1].isnan().tolist() == loss.isnan().tolist()
    run(student, teacher, EVERYTHING, labels=some_labels(teacher), metrics=usual)
    assert distance(told[:, [0, 2, 3, 4, 5]], usual[:, [0, 2, 3, 4, 5]]) <= 1e-6


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_strides():
    """Rows with gaps, and columns first; a gradient in another dtype."""
    student, teacher = rows_of()
    labels = some_labels(teacher)
    loss, _, gradient = run(student, teacher, EVERYTHING, labels=labels)
    wide = torch.full((R, V + 9), NAN).to(DEVICE)
    wide[:, :V] = student.to(DEVICE)
    narrow = torch.full((V, R), NAN, dtype=torch.bfloat16, device=DEVICE).t()
    got, _, written = run(wide[:, :V], teacher, EVERYTHING, labels=labels, gradient=narrow)
    assert wide[:, V:].isnan().all()
    assert distance(got, loss) <= 1e-7 and distance(written, gradient) <= 4e-3


def test_bad_arguments():
    student, teacher = rows_of()
    for wrong, message in (
        ({"ids": teacher.ids.int()}, r"^ids: expected contiguous torch.int64 \[4, 5\], got torch.int32 \[4, 5\]"),
        ({"log_probs": teacher.log_probs.float()}, r"^log_probs: expected contiguous torch.float64"),
        ({"tail": teacher.tail[:2]}, r"^tail_log_prob: expected contiguous torch.float64 \[4\]"),
        ({"ids": teacher.ids.t().contiguous().t()}, r"^ids: expected contiguous torch.int64 .* strides \(1, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            run(student, teacher._replace(**wrong), Options(MIX))
    with pytest.raises(ValueError, match=r"^divergences: expected 6 weights, got 5"):
        run(student, teacher, Options(MIX[:5]))
