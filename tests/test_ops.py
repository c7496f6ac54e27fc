"""The ops as torch sees them: schemas, fake kernels, torch.compile, and what a direct call may not do."""

from __future__ import annotations

import platform
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

import fastkd.functions
from fastkd import backend
from fastkd.backend import interpret_triton
from fastkd.checks import Objective, numbers
from fastkd.divergence import divergence_code

from .cases import (
    ATTENTION_KL,
    HEADS,
    LINEAR_KL,
    LOGIT_KL,
    NAN,
    RELATION_KL,
    UNRELATED,
    Op,
    distance,
    over_attention_ops,
    over_divergences,
    over_fused,
    over_token_ops,
    running_on,
    to,
    value_and_gradients,
)

OBJECTIVE = (divergence_code("jsd"), 0.3, 2.0, 0.6, 0.4)  # of kernels, and as ops are given it:
CODE, NUMBERS = Objective("jsd", 0.3, 2.0, 0.6, 0.4).for_op()


@pytest.fixture
def rows():
    """Arguments of the row primitive: student, teacher, coefficient, labels."""
    student, teacher = UNRELATED.logits(5, 33)
    coefficient = torch.tensor([0.5, 1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    return student.float(), teacher.float(), coefficient, torch.randint(0, 33, (5,))


def test_logit_kl_opcheck(rows):
    student, teacher, coefficient, labels = rows
    opcheck(torch.ops.fastkd.logit_kl.default, (student, teacher, coefficient, labels, CODE, NUMBERS))
    _, stats, _ = torch.ops.fastkd.logit_kl(student, teacher, coefficient, labels, CODE, NUMBERS)
    arguments = (student, teacher, stats, coefficient, labels, CODE, NUMBERS)
    opcheck(torch.ops.fastkd.logit_kl_backward.default, arguments)


@pytest.mark.parametrize("gradients", [[True] * 3, [False] * 3, [True, False, False]])
def test_linear_kl_opcheck(gradients: list[bool]):
    x = to(LINEAR_KL.make(UNRELATED, tokens=5), torch.float32)
    opcheck(
        torch.ops.fastkd.linear_kl.default,
        (
            x["student_hidden"],
            x["student_weight"],
            x["student_bias"],
            x["teacher_hidden"],
            x["teacher_weight"],
            x["teacher_bias"],
            torch.rand(5, dtype=torch.float64),
            torch.randint(0, 203, (5,)),
            numbers(1.0, 1.0, 0.0, 0.0, 2**-9),
            gradients,
            CODE,
            NUMBERS,
        ),
    )


@pytest.mark.parametrize("gradients", [[True] * 3, [False] * 3, [True, False, False]])
@pytest.mark.parametrize("dense", [False, True])
def test_attention_kl_opcheck(gradients: list[bool], dense: bool):
    x = to(ATTENTION_KL.make(UNRELATED, queries=5), torch.float32)
    bias = torch.randn(1, HEADS, 5, 5) if dense else torch.randn(HEADS, 9)
    tensors = [x[name] for name in ("student_q", "student_k", "teacher_q", "teacher_k")]
    coefficient = torch.rand(2, HEADS, 5, dtype=torch.float64)
    mask = torch.rand(2, 5) < 0.7
    constants = (False, HEADS, gradients, CODE, numbers(0.3, 0.3, 0.4))
    opcheck(torch.ops.fastkd.attention_kl.default, (*tensors, bias, bias, coefficient, mask, *constants))
    tensors = [x[..., : x.shape[2] // HEADS] if i % 2 else x for i, x in enumerate(tensors)]  # of one head of keys
    opcheck(torch.ops.fastkd.attention_kl.default, (*tensors, bias, bias, coefficient, mask, *constants))


def test_relation_kl_opcheck():
    x = [to(RELATION_KL.make(UNRELATED, queries=n), torch.float32) for n in (5, 7)]
    lists = [[entry[name] for entry in x] for name in ("student", "teacher")]
    coefficient = [torch.rand(2, HEADS, n, dtype=torch.float64) for n in (5, 7)]
    masks = [torch.rand(2, 5) < 0.7, None]
    opcheck(
        torch.ops.fastkd.relation_kl.default,
        (*lists, coefficient, masks, [True, False], HEADS, [True, False], CODE, numbers(0.3)),
    )


@over_fused
def test_unwanted_gradients_are_empty(backend: str):
    """And no two of them one tensor, as everywhere: outputs of an op may not alias."""
    x = to(ATTENTION_KL.make(UNRELATED, queries=5), torch.float32)
    coefficient = torch.rand(2, HEADS, 5, dtype=torch.float64)
    with running_on(backend) as (_, device):
        tensors = [x[name].to(device) for name in ("student_q", "student_k", "teacher_q", "teacher_k")]
        constants = (coefficient.to(device), None, False, HEADS, [False] * 3, CODE, numbers(0.3, 0.3, 0.4))
        gradients = torch.ops.fastkd.attention_kl(*tensors, None, None, *constants)[1:]
        lists = ([tensors[0]] * 2, [tensors[2]] * 2, [coefficient.to(device)] * 2, [None] * 2)
        gradients += tuple(torch.ops.fastkd.relation_kl(*lists, [False] * 2, HEADS, [False] * 2, CODE, numbers(0.3))[1])
    assert all(gradient.shape == (0,) for gradient in gradients)
    assert len({id(gradient) for gradient in gradients}) == 5


def _heads(dense: bool = False, relation: bool = False) -> dict[str, Any]:
    """Arguments of attention_heads_, two sequences long: 5 queries and, but in relations, 7 keys."""
    keys, reach = 5 if relation else 7, 3
    q, k, tq, tk = (torch.randn(2, n, width) for width in (4 * HEADS, 6 * HEADS) for n in (5, keys))
    bias = torch.randn(1, HEADS, 5, keys).expand(2, -1, -1, -1) if dense else torch.randn(HEADS, 2 * reach + 1)
    shape = (1, HEADS, 5, keys) if dense else (2, HEADS, 2 * reach + 1)
    coefficient = torch.rand(2, HEADS, 5, dtype=torch.float64)
    return {
        "student_q": k if relation else q,
        "student_k": k,
        "teacher_q": tk if relation else tq,
        "teacher_k": tk,
        "student_bias": bias,
        "teacher_bias": bias,
        "coefficient": coefficient,
        "key_mask": torch.rand(2, keys) < 0.7,
        "causal": False,
        "relation": relation,
        "student_scale": 0.3,
        "teacher_scale": 0.4,
        "rows_at_once": 2,
        "divergence": 0,
        "beta": 0.5,
        "loss": torch.zeros_like(coefficient),
        "grad_q": torch.zeros_like(k if relation else q),
        "grad_k": None if relation else torch.zeros_like(k),
        "grad_bias": torch.zeros(shape, dtype=torch.float32 if dense else torch.float64),
    }


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("relation", [False, True])
def test_attention_heads_opcheck(dense: bool, relation: bool):
    opcheck(torch.ops.fastkd.attention_heads_.default, tuple(_heads(dense, relation).values()))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dense", [False, True])
def test_attention_heads_by_any_number_of_threads(threads: int, dense: bool):
    """The same to the bit, whoever computes a head."""
    torch.manual_seed(1)
    ours = _heads(dense)
    theirs = {k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in ours.items()}
    torch.ops.fastkd.attention_heads_(**ours)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        torch.ops.fastkd.attention_heads_(**theirs)
    finally:
        torch.set_num_threads(before)
    assert ours["loss"].abs().sum() > 0
    for name in ("loss", "grad_q", "grad_k", "grad_bias"):
        assert torch.equal(ours[name], theirs[name]), name


def test_attention_heads_guards_memory():
    def refused(message: str, dense: bool = False, relation: bool = False, **changed):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fastkd.attention_heads_(**{**_heads(dense, relation), **changed})

    double = torch.float64
    refused("coefficient must be", coefficient=torch.rand(2, HEADS, 5))
    refused("loss must be", loss=torch.zeros(2, HEADS, 6, dtype=double))
    refused("queries and keys must be", teacher_k=torch.randn(2, 8, 6 * HEADS))
    refused("queries and keys must be", student_q=torch.randn(2, 5, 4 * HEADS + 1))
    refused("of a floating dtype", teacher_q=torch.ones(2, 5, 6 * HEADS, dtype=torch.long))
    refused("a bias must be", student_bias=torch.randn(HEADS + 1, 7))
    refused("a bias must be", teacher_bias=torch.randn(HEADS, 7, dtype=double))
    refused("a bias must be", dense=True, student_bias=torch.randn(1, HEADS, 5, 7))
    refused("key_mask must be", key_mask=torch.ones(2, 6, dtype=torch.bool))
    refused("gradients must have", grad_k=torch.zeros(2, 5, 4 * HEADS))
    refused("a relation has one gradient", relation=True, grad_k=torch.zeros(2, 5, 4 * HEADS))
    refused("the diagonals' gradient must be", grad_bias=torch.zeros(2, HEADS, 7))
    refused("the diagonals' gradient must be", grad_bias=torch.zeros(HEADS, 7, dtype=double))
    refused("dense bias's gradient must broadcast", dense=True, grad_bias=torch.zeros(1, HEADS, 2, 7))
    refused("rows_at_once must be", rows_at_once=0)


def test_row_primitive_opcheck(rows):
    student = rows[0]
    loss, stats = torch.zeros(5, dtype=torch.float64), torch.zeros(5, 7, dtype=torch.float64)
    op, gradient = torch.ops.fastkd.divergence_rows, torch.empty_like(student)
    op(*rows, loss, stats, None, *OBJECTIVE)
    for wanted in ((loss, None, gradient), (loss, stats, None), (None, stats, gradient), (loss, stats, gradient)):
        opcheck(op.default, (*rows, *wanted, *OBJECTIVE))


@pytest.mark.parametrize("columns", [33, 2500])
@over_divergences
def test_row_primitive_agrees_with_itself(columns: int, divergence: str):
    """In place, through kept statistics or all at once: the same loss, statistics and gradient, to the bit."""
    student, teacher = (x.float() for x in UNRELATED.logits(5, columns))
    coefficient = torch.tensor([0.5, 1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    labels = torch.randint(0, columns, (5,))
    objective = (divergence_code(divergence), *OBJECTIVE[1:])

    def call(student: Tensor, *wanted: Tensor | None) -> None:
        torch.ops.fastkd.divergence_rows(student, teacher, coefficient, labels, *wanted, *objective)

    losses, stats = torch.full((3, 5), NAN).double(), torch.full((2, 5, 7), NAN).double()
    gradients = torch.full((2, 5, columns), NAN)
    call(student, losses[0], stats[0], None)
    call(student, None, stats[0], gradients[0])
    call(student, losses[1], stats[1], gradients[1])
    call(student, losses[2], None, student)
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])
    assert torch.equal(stats[0], stats[1]) and not stats[0, 2].any()
    assert torch.equal(gradients[0], student) and torch.equal(gradients[1], student)


def test_subnormals_are_flushed_in_rows_alone():
    """Rows of unrelated models took ten times as long with them; a thread's other work keeps them."""
    s, t = 30 * torch.randn(2, 4, 3000)
    fastkd.logit_kl(s.requires_grad_(), t, divergence="skew_kl", impl="fused").backward()
    assert platform.machine() != "x86_64" or s.grad[s.grad != 0].abs().min() >= torch.finfo(torch.float32).tiny
    assert torch.full((64,), 1e-40).mul(1).count_nonzero() == 64


def test_row_primitive_guards_memory(rows):
    """Called directly, wrong shapes are refused and a label out of range gives NaN instead of a wild read."""
    student, teacher, coefficient, labels = rows
    loss, stats = torch.zeros(5, dtype=torch.float64), torch.zeros(5, 7, dtype=torch.float64)

    def call(teacher=teacher, coefficient=coefficient, labels=labels, loss=loss, stats=None, gradient=student, code=2):
        wanted = loss, stats, gradient, code, *OBJECTIVE[1:]
        torch.ops.fastkd.divergence_rows(student, teacher, coefficient, labels, *wanted)

    for message, changed in [
        ("teacher must be", {"teacher": teacher[:, :-1]}),
        ("labels must be", {"labels": labels[:-1]}),
        ("coefficient has the wrong dtype", {"coefficient": coefficient.float()}),
        ("loss must be", {"loss": loss[:-1]}),
        ("stats must be", {"stats": stats[:, :-1]}),
        ("gradient must be", {"gradient": student[:-1]}),
        ("stats are needed", {"loss": None}),
        ("unknown divergence", {"code": 6}),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(**changed)
    call(labels=torch.tensor([0, 33, 2, 3, -1]))
    assert loss.isnan().tolist() == [False, True, False, False, True]
    assert student.isnan().any(1).tolist() == [False, True, False, False, True]


@over_token_ops
@pytest.mark.parametrize("reduction", ["mean", pytest.param("none", marks=pytest.mark.long)])
def test_compiles_without_a_graph_break(op: Op, reduction: str):
    """fullgraph, forward and backward, and one compilation for every batch size."""
    torch._dynamo.reset()
    compilations = 0

    def count(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph.forward

    def function(inputs, weight):
        return op.function(**inputs, weight=weight, reduction=reduction, temperature=2.0)

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    counted = torch.compile(function, fullgraph=True, dynamic=True, backend=count)
    for tokens in (5, 9, 12):
        inputs = to(op.make(UNRELATED, tokens=tokens), torch.float32)
        weight = torch.rand(tokens)
        for name in op.student:
            inputs[name].requires_grad_()
        wanted, got = function(inputs, weight), compiled(inputs, weight)
        counted(inputs, weight)
        assert distance(got, wanted) <= 1e-6
        leaves = [inputs[name] for name in op.student]
        for left, right in zip(
            torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves), strict=True
        ):
            assert distance(left, right) <= 1e-6
    assert compilations == 1


@over_attention_ops
@pytest.mark.parametrize("reduction", ["mean", pytest.param("none", marks=pytest.mark.long)])
def test_attention_compiles_without_a_graph_break(op: Op, reduction: str):
    """fullgraph, forward and backward, and one compilation for every batch size and length."""
    torch._dynamo.reset()
    compilations = 0

    def count(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph.forward

    def function(inputs, mask):
        return op.function(**inputs, key_mask=mask, reduction=reduction, causal=True)

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    counted = torch.compile(function, fullgraph=True, dynamic=True, backend=count)
    for batch, length in ((2, 5), (3, 9), (4, 12)):
        inputs = to(op.make(UNRELATED, batch=batch, queries=length), torch.float32)
        mask = torch.arange(length) < torch.randint(1, length, (batch, 1))
        for name in op.student:
            inputs[name].requires_grad_()
        wanted, got = function(inputs, mask), compiled(inputs, mask)
        counted(inputs, mask)
        assert distance(got, wanted) <= 1e-6
        leaves = [inputs[name] for name in op.student]
        gradients = (torch.autograd.grad(loss.sum(), leaves) for loss in (got, wanted))
        for left, right in zip(*gradients, strict=True):
            assert distance(left, right) <= 1e-6
    assert compilations == 1


@over_token_ops
def test_fake_tensors_have_no_values_to_check(op: Op):
    """As planning a run's memory takes them: what would be read of labels, weights and a normalizer is not there."""
    with FakeTensorMode() as fakes:
        inputs = {name: fakes.from_tensor(x) for name, x in to(op.make(UNRELATED, tokens=5), torch.float32).items()}
        labels, weight = torch.zeros(5, dtype=torch.long), torch.ones(5)
        tokens = {"labels": labels, "weight": weight, "normalizer": weight.sum()}
        loss, gradients = value_and_gradients(op, inputs, ce_weight=1.0, **tokens)
    assert loss.shape == () and {x: g.shape for x, g in gradients.items()} == {x: inputs[x].shape for x in gradients}


def test_an_extension_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch):
    """One that was built before an operator's arguments changed would take some for others."""
    assert backend._load_extension() is None
    monkeypatch.setitem(sys.modules, "fastkd._C", ModuleType("fastkd._C"))
    assert "install fastkd again" in str(backend._load_extension())


def test_functions_are_public():
    """fastkd.functions.LogitKL is the op without argument checks and reductions."""
    student, teacher = (x.float() for x in UNRELATED.logits(4, 33))
    objective = Objective("forward_kl", 0.5, 1.0, 1.0, 0.0)
    coefficient = torch.full((4,), 0.25, dtype=torch.float64)
    rows, *_ = fastkd.functions.LogitKL.apply(student, teacher, coefficient, None, *objective.for_op())
    assert torch.equal(rows.sum().float(), fastkd.logit_kl(student, teacher))


def test_modules_equal_functions():
    x = to(LINEAR_KL.make(UNRELATED), torch.float32)
    labels = torch.randint(0, 203, (x["student_hidden"].shape[0],))
    constants = {"divergence": "skew_kl", "beta": 0.1, "temperature": 2.0, "ce_weight": 0.5}
    module = fastkd.nn.LinearKLLoss(student_scale=0.5, **constants)
    assert "divergence='skew_kl'" in repr(module)
    got = module(**x, labels=labels)
    assert torch.equal(got, fastkd.linear_kl(**x, labels=labels, student_scale=0.5, **constants))
    y = to(LOGIT_KL.make(UNRELATED), torch.float32)
    labels = labels[: y["student_logits"].shape[0]]
    got = fastkd.nn.LogitKLLoss(**constants)(**y, labels=labels)
    assert torch.equal(got, fastkd.logit_kl(**y, labels=labels, **constants))
    with pytest.raises(ValueError, match="temperature"):
        fastkd.nn.LogitKLLoss(temperature=0.0)


def test_logit_kl_holds_nothing_but_the_gradient():
    """No tensor of the logits' size is saved beside the logits themselves, nor made in forward."""
    student, teacher = (x.float() for x in UNRELATED.logits(64, 1024))
    student.requires_grad_()
    saved = []

    def pack(x):
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = fastkd.logit_kl(student, teacher)
    own = {student.data_ptr(), teacher.data_ptr()}
    assert sum(x.numel() for x in saved if x.data_ptr() not in own) <= 64 * 10
    loss.backward()


def test_triton_and_cpp_agree():
    inputs = to(LOGIT_KL.make(UNRELATED), torch.float32)
    with running_on("cpp"):
        loss, gradients = value_and_gradients(LOGIT_KL, inputs, divergence="skew_reverse_kl")
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        with interpret_triton():
            other, other_gradients = value_and_gradients(LOGIT_KL, inputs, divergence="skew_reverse_kl")
        assert distance(other, loss) <= 1e-6
        assert distance(other_gradients["student_logits"], gradients["student_logits"]) <= 1e-5
