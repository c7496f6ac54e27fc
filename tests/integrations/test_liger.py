"""Liger's losses by fastkd: equal to Liger's own where it runs on a CPU, and to what it says of itself elsewhere."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.integrations import liger

T, V, HS, HT = 33, 101, 16, 24
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
STUDENT = ("student_input", "student_weight", "student_bias")


def inputs(dtype: torch.dtype = torch.float64, teacher_columns: int = V) -> dict[str, Tensor]:
    """Scores have standard deviations of about 5; a fifth of the labels is dropped."""
    torch.manual_seed(0)
    found = {
        "student_input": torch.randn(T, HS) * 2,
        "student_weight": torch.randn(V, HS) * 0.6,
        "teacher_input": torch.randn(T, HT) * 2,
        "teacher_weight": torch.randn(teacher_columns, HT) * 0.5,
        "student_bias": torch.randn(V),
        "teacher_bias": torch.randn(teacher_columns),
    }
    labels = torch.randint(43, V, (T,))
    labels[::5] = -100
    return {**{name: x.to(dtype) for name, x in found.items()}, "labels": labels}


def ran(loss: Callable[..., Any], tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What a loss returns, and the student's gradients of three times its first."""
    leaves = {n: x.clone().requires_grad_() if n in STUDENT else x for n, x in tensors.items()}
    result = loss(*leaves.values())
    outputs = result if isinstance(result, tuple) else (result,)
    (3 * outputs[0]).backward()
    return *(x.detach() for x in outputs), *(leaves[n].grad for n in STUDENT if n in leaves)


def assert_equal(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float = 1e-6) -> None:
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs, strict=True):
        assert x.shape == y.shape
        assert (x - y).norm() <= tolerance * max(y.norm().item(), 1e-3)


def log_probs(tensors: dict[str, Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    student = tensors["student_input"] @ tensors["student_weight"].T
    teacher = tensors["teacher_input"] @ tensors["teacher_weight"].T
    return F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)


def plain_jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """[T] of Liger's definition."""
    p, q = log_p.exp(), log_q.exp()
    if beta in (0, 1):
        return (q * (log_q - log_p) if beta else p * (log_p - log_q)).sum(-1)
    log_m = (beta * p + (1 - beta) * q).log()
    return (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)


# ---- beside Liger's own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 1.0), (0.3, 0.0)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_the_chunked_loss_is_ligers(beta: float, temperature: float, weights: tuple[float, float]) -> None:
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        tensors = inputs(dtype)
        for ignore_index, three, with_bias in ((-100, True, True), (42, False, False)):
            tensors["labels"] = tensors["labels"].masked_fill(tensors["labels"] == -100, ignore_index)
            given = dict(zip(("student_input", "student_weight", "teacher_input", "teacher_weight"), tensors.values(),
                             strict=False))  # fmt: skip
            given["labels"] = tensors["labels"]
            given |= {n: tensors[n] for n in ("student_bias", "teacher_bias")} if with_bias else {}
            constants = (*weights, beta, ignore_index, temperature, False, 8, three)
            theirs = ran(chunked.LigerFusedLinearJSDLoss(*constants), given)
            if temperature < 1 and dtype == torch.float32:  # where models are sure Liger's own has lost digits
                in_full = {n: x.double() if x.is_floating_point() else x for n, x in given.items()}
                theirs = tuple(x.float() for x in ran(chunked.LigerFusedLinearJSDLoss(*constants), in_full))
            assert_equal(ran(liger.LigerFusedLinearJSDLoss(*constants), given), theirs, tolerance)


def test_the_chunked_function_is_called_as_ligers() -> None:
    functional = pytest.importorskip("liger_kernel.chunked_loss.functional")
    tensors = inputs()
    order = [*list(tensors)[:4], "labels", "student_bias", "teacher_bias"]
    given = {name: tensors[name] for name in order}
    constants = (0.2, 0.8, 0.3, -100, 1.5, False)
    theirs = ran(lambda *x: functional.liger_fused_linear_jsd(*x, *constants), given)
    assert_equal(ran(lambda *x: liger.chunked_liger_fused_linear_jsd(*x, *constants), given), theirs)


def test_arguments_are_ligers_in_name_order_and_default() -> None:
    pytest.importorskip("liger_kernel")
    from liger_kernel import chunked_loss, transformers
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction
    from liger_kernel.transformers import functional
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    def of(function: Callable[..., Any]) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    modules = [
        (chunked_loss.LigerFusedLinearJSDLoss, liger.LigerFusedLinearJSDLoss),
        (LigerFusedLinearKLDivLoss, liger.LigerFusedLinearKLDivLoss),
        (transformers.LigerFusedLinearJSD, liger.LigerFusedLinearJSD),
        (transformers.LigerJSD, liger.LigerJSD),
    ]
    for theirs, ours in modules:
        assert of(ours) == of(theirs)
        assert [n for n, _ in of(ours.forward)] == [n for n, _ in of(theirs.forward)]
        assert set(vars(theirs())) == set(vars(ours()))  # what a schedule may set
    for name in ("liger_fused_linear_jsd", "liger_fused_linear_kl_div", "liger_jsd"):
        assert of(getattr(liger, name)) == of(getattr(functional, name))
    assert of(liger.chunked_liger_fused_linear_jsd) == of(LigerFusedLinearJSDFunction.forward)[1:]  # without ctx


# ---- beside plain torch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_jsd_of_hidden_states(beta: float, temperature: float) -> None:
    tensors = {n: x for n, x in inputs().items() if not n.endswith("bias")}

    def plain(*given: Tensor) -> Tensor:
        named = dict(zip(tensors, given, strict=True))
        return plain_jsd(*log_probs(named, temperature), beta)[named["labels"] != -100].mean()

    expected = ran(plain, tensors)
    assert_equal(ran(liger.LigerFusedLinearJSD(beta, temperature=temperature), tensors), expected)
    assert_equal(ran(liger.LigerFusedLinearJSDLoss(0.0, 1.0, beta, temperature=temperature), tensors), expected)


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_of_log_probabilities(beta: float) -> None:
    tensors = inputs()
    logits, log_p = log_probs(tensors, 1.0)
    found = []
    for loss in (lambda q, p: plain_jsd(q, p, beta)[tensors["labels"] != -100].mean(), liger.LigerJSD(beta)):
        leaf = logits.detach().requires_grad_()
        given = (leaf.log_softmax(-1), log_p)
        value = loss(*given, tensors["labels"]) if isinstance(loss, liger.LigerJSD) else loss(*given)
        value.backward()
        found.append((value.detach(), leaf.grad))
    assert_equal(found[1], found[0])
    assert liger.LigerJSD()(logits.bfloat16(), log_p.bfloat16()).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # torch's, on what it means by a mean
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("masses", ["1", "any"])
def test_kl_against_probabilities(reduction: str, masses: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "SCORES", 7 * V)  # chunks of seven tokens, the last of five
    tensors = inputs()
    target = log_probs(tensors, 1.0)[1].exp()
    target[:, 3:50] = 0  # of which 0 log 0 is none
    target = target / target.sum(-1, keepdim=True) if masses == "1" else target
    target[2] = 0
    labels = tensors["labels"]
    given = {n: tensors[n] for n in STUDENT[:2]} | {"target": target, "labels": labels}

    def plain(hidden: Tensor, weight: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        log_q = F.log_softmax(hidden @ weight.T / 1.5, -1)
        kept = labels != -100
        return F.kl_div(log_q[kept], target[kept], reduction=reduction)

    ours = ran(liger.LigerFusedLinearKLDivLoss(reduction, temperature=1.5), given)
    assert_equal(ours, ran(plain, given))
    half = {n: x.bfloat16() if x.is_floating_point() else x for n, x in given.items()}
    wide = {n: x.float() if x.is_floating_point() else x for n, x in half.items()}
    narrow = ran(liger.LigerFusedLinearKLDivLoss(reduction, temperature=1.5), half)
    assert narrow[1].dtype == narrow[2].dtype == torch.bfloat16
    expected = ran(plain, wide)
    torch.testing.assert_close(narrow[0], expected[0], rtol=1e-5, atol=0)  # scores are never rounded
    for x, y in zip(narrow[1:], expected[1:], strict=True):
        assert (x.float() - y).norm() <= 2**-8 * y.norm()


# ---- where they differ, and what is refused -------------------------------------------------------------------------


def test_columns_that_pad_a_teacher_have_no_part() -> None:
    padded = inputs(teacher_columns=V + 11)
    cut = {n: x[:V] if n in ("teacher_weight", "teacher_bias") else x for n, x in padded.items()}
    order = [*list(padded)[:4], "labels", "student_bias", "teacher_bias"]
    found = [ran(liger.LigerFusedLinearJSDLoss(), {n: x[n] for n in order}) for x in (padded, cut)]
    assert_equal(*found)


def test_nothing_left_is_zero_and_parts_have_no_gradient() -> None:
    tensors = inputs()
    hidden = tensors["student_input"].requires_grad_()
    four = (hidden, *list(tensors.values())[1:4])
    nothing = torch.full((T,), -100)
    target = torch.full((T, V), 1 / V, dtype=torch.float64)
    losses = [
        liger.LigerFusedLinearJSD()(*four, nothing),
        liger.LigerFusedLinearJSDLoss()(*four, nothing),
        liger.LigerFusedLinearKLDivLoss()(*four[:2], target, nothing),
    ]
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert loss == 0 and (gradient == 0).all()
    loss, soft, hard = liger.LigerFusedLinearJSDLoss(return_soft_hard_loss=True)(*four, tensors["labels"])
    torch.testing.assert_close(loss.detach(), (soft + hard) / 2)
    assert not soft.requires_grad and not hard.requires_grad
    first, second = (torch.autograd.grad(loss * 3, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: liger.LigerFusedLinearJSDLoss(beta=1.5), r"beta: expected a number in \[0, 1\], got 1.5"),
        (lambda: liger.LigerFusedLinearJSDLoss(temperature=0), "temperature: expected a number > 0, got 0"),
        (lambda: liger.LigerFusedLinearJSDLoss(weight_hard_loss=float("nan")), "weight_hard_loss: expected"),
        (lambda: liger.LigerFusedLinearJSD(accum_dtype=torch.float64), "accum_dtype: expected None or torch.float32"),
        (lambda: liger.LigerFusedLinearKLDivLoss("none"), 'which is of every column: fastkd.logit_kl'),
        (lambda: liger.LigerFusedLinearKLDivLoss("avg"), "reduction: expected one of batchmean, mean, sum"),
        (lambda: liger.LigerFusedLinearKLDivLoss(eps=1e-3), r"eps: expected a number in \[0, 1e-08\], got 0.001"),
        (lambda: liger.LigerJSD(beta=-1), "beta: expected"),
        (
            lambda: liger.liger_fused_linear_jsd(*list(inputs().values())[:4], inputs()["labels"], None),
            "jsd_beta: expected a number, got NoneType; .* is chunked_liger_fused_linear_jsd here",
        ),
        (
            lambda: liger.LigerFusedLinearJSDLoss()(*list(inputs().values())[:4], None),
            "true_labels: expected a tensor, got NoneType",
        ),
        (
            lambda: liger.LigerFusedLinearKLDivLoss()(*list(inputs().values())[:2], torch.ones(T, V + 1)),
            rf"target: expected shape \[{T}, {V}\], got \[{T}, {V + 1}\]",
        ),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused(call: Callable[[], Any], says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        call()


def test_it_works_without_liger() -> None:
    code = "import sys; sys.modules['liger_kernel'] = None; import fastkd.integrations.liger"
    subprocess.run([sys.executable, "-c", code], check=True)
