"""The losses as autograd and torch.func see them: every op, by its kernels and by its reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jacfwd, vmap
from torch.utils.checkpoint import checkpoint

import fastkd

from .cases import (
    CKA_LOSS,
    DIVERGENCE_OPS,
    LINEAR_KL,
    LOGIT_KL,
    LONG_IN_TRITON,
    OPS,
    RELATION_KL,
    TOKEN_OPS,
    UNRELATED,
    Inputs,
    Op,
    Regime,
    distance,
    oracle,
    over_backends,
    over_divergences,
    over_fused,
    over_ops,
    over_reductions,
    over_token_ops,
    placed,
    running_on,
    to,
    value_and_gradients,
)


def inputs_of(op: Op) -> Inputs:
    sizes = {"tokens": 6} if op in (*TOKEN_OPS, CKA_LOSS) else {"queries": 4}
    return to(op.make(UNRELATED, **sizes), torch.float32)


def options_of(op: Op, inputs: Inputs) -> dict[str, Any]:
    """Every tensor that an op takes beside its inputs."""
    if op in TOKEN_OPS:
        labels = torch.tensor([1, -100, 3, 4, 0, 2])
        return {"labels": labels, "weight": torch.rand(6), "ce_weight": 0.5}
    if op is CKA_LOSS:
        return {"mask": torch.tensor([1, 1, 0, 1, 1, 1]).bool()}
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    return {"key_mask": mask} if op is RELATION_KL else {"key_mask": mask, "query_mask": mask}


# ---- tensors made under torch.inference_mode() -----------------------------------------------------------------------


def made_for_inference(x: Any) -> Any:
    with torch.inference_mode():
        return x.clone() if isinstance(x, Tensor) else x


@over_ops
@over_backends
@over_reductions
def test_inference_tensors(op: Op, backend: str, reduction: str):
    """A teacher's outputs and weights, labels, masks, weights and the normalizer: as if made outside."""
    inputs = inputs_of(op)
    options = options_of(op, inputs) | {"reduction": reduction}
    if reduction == "mean" and op is not CKA_LOSS:
        options["normalizer"] = torch.tensor(3.0)
    with running_on(backend) as (impl, device):
        inputs, options = to(inputs, torch.float32, device), placed(options, device)
        loss, gradients = value_and_gradients(op, inputs, impl=impl, **options)
        inputs = {name: x if name in op.student else made_for_inference(x) for name, x in inputs.items()}
        options = {name: made_for_inference(x) for name, x in options.items()}
        got, got_gradients = value_and_gradients(op, inputs, impl=impl, **options)
    assert torch.equal(got, loss)
    for name, gradient in gradients.items():
        assert torch.equal(got_gradients[name], gradient), name


@over_reductions
def test_a_head_that_was_made_for_inference(reduction: str):
    """Frozen weights and biases of the student: nothing but its hidden states needs a gradient."""
    inputs = inputs_of(LINEAR_KL)
    loss, gradients = value_and_gradients(LINEAR_KL, inputs, reduction=reduction)
    frozen = {name: made_for_inference(x) for name, x in inputs.items()}
    hidden = inputs["student_hidden"].clone().requires_grad_()
    got = fastkd.linear_kl(**frozen | {"student_hidden": hidden}, reduction=reduction)
    assert torch.equal(got, loss)
    assert torch.equal(torch.autograd.grad(got.sum(), hidden)[0], gradients["student_hidden"])


def test_inference_tensors_are_not_copied():
    x = inputs_of(LOGIT_KL)
    student, teacher = x["student_logits"].requires_grad_(), made_for_inference(x["teacher_logits"])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        fastkd.logit_kl(student, teacher)
    assert teacher.data_ptr() in [x.data_ptr() for x in saved]


@over_ops
def test_under_inference_mode(op: Op):
    inputs = inputs_of(op)
    wanted = op.function(**inputs)
    with torch.inference_mode():
        assert torch.equal(op.function(**inputs), wanted)


# ---- second derivatives ----------------------------------------------------------------------------------------------


@over_ops
@pytest.mark.parametrize("backend", LONG_IN_TRITON)
@over_reductions
def test_second_derivatives_are_refused(op: Op, backend: str, reduction: str):
    """By a message with the op's name and what to do, whatever asks for them; first ones pass."""
    with running_on(backend) as (impl, device):
        inputs = to(inputs_of(op), torch.float32, device)
        _, wanted = value_and_gradients(op, inputs, impl=impl, reduction=reduction)
        for name in op.student:
            leaf = inputs[name].detach().requires_grad_()
            loss = op.function(**inputs | {name: leaf}, impl=impl, reduction=reduction).sum()
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
            assert torch.equal(gradient, wanted[name])
            with pytest.raises(RuntimeError, match=rf'fastkd\.{op.name}: .*impl="reference"'):
                gradient.square().sum().backward()

        def of_first(x: Tensor) -> Tensor:
            return op.function(**inputs | {op.student[0]: x}, impl=impl, reduction=reduction).sum()

        with pytest.raises(RuntimeError, match=rf'fastkd\.{op.name}: .*impl="reference"'):
            torch.autograd.functional.hessian(of_first, inputs[op.student[0]])


@pytest.mark.long
@over_ops
def test_second_derivatives_of_the_reference(op: Op):
    inputs = to(inputs_of(op), torch.float64)
    name = op.student[0]

    def loss(x: Tensor) -> Tensor:
        return op.function(**inputs | {name: x}, impl="reference")

    assert torch.autograd.gradgradcheck(loss, inputs[name].requires_grad_())


# ---- torch.func ------------------------------------------------------------------------------------------------------


@over_ops
@pytest.mark.parametrize("backend", ["reference", *LONG_IN_TRITON])
@over_reductions
def test_func_grad(op: Op, backend: str, reduction: str):
    with running_on(backend) as (impl, device):
        inputs = to(inputs_of(op), torch.float32, device)
        options = placed(options_of(op, inputs), device) | {"reduction": reduction}
        _, wanted = value_and_gradients(op, inputs, impl=impl, **options)
        student = {name: inputs[name] for name in op.student}
        got = grad(lambda student: op.function(**inputs | student, impl=impl, **options).sum())(student)
    for name, gradient in wanted.items():
        assert torch.equal(got[name], gradient), name


def per_example(op: Op, impl: str) -> tuple[Callable[[Inputs], Tensor], Inputs]:
    """A loss of one example, and three examples; heads, tables and the teacher's tensors like the rest."""
    examples = [inputs_of(op) for _ in range(3)]
    options = options_of(op, examples[0])
    return lambda x: op.function(**x, impl=impl, **options), {
        k: torch.stack([x[k] for x in examples]) for k in examples[0]
    }


@over_ops
@pytest.mark.parametrize("backend", ["reference", *LONG_IN_TRITON])
def test_vmap(op: Op, backend: str):
    """Losses and gradients for each example, as a loop over them; of kernels, to the bit."""

    def alike(got: Tensor, wanted: Tensor) -> bool:
        return distance(got, wanted) <= (1e-5 if backend == "reference" else 0)

    with running_on(backend) as (impl, device):
        loss, examples = per_example(op, impl)
        if device.type != "cpu":
            pytest.skip("masks are on the CPU")
        split = [{name: x[i] for name, x in examples.items()} for i in range(3)]
        assert alike(vmap(loss)(examples), torch.stack([loss(x) for x in split]))

        def of_student(student: Inputs, others: Inputs) -> Tensor:
            return loss(student | others)

        def parts(x: Inputs) -> tuple[Inputs, Inputs]:
            return {k: x[k] for k in op.student}, {k: v for k, v in x.items() if k not in op.student}

        got = vmap(grad(of_student))(*parts(examples))
        looped = [grad(of_student)(*parts(x)) for x in split]
        mapped = grad(lambda student: vmap(of_student)(student, parts(examples)[1]).sum())(parts(examples)[0])
        leaves = {name: x.clone().requires_grad_() for name, x in parts(examples)[0].items()}
        plain = torch.autograd.grad(vmap(of_student)(leaves, parts(examples)[1]).sum(), list(leaves.values()))
    for i, name in enumerate(op.student):
        wanted = torch.stack([x[name] for x in looped])
        assert alike(got[name], wanted), name
        assert alike(mapped[name], wanted), name
        assert alike(plain[i], wanted), name


def test_vmap_over_labels_and_weights():
    x = inputs_of(LOGIT_KL)
    labels, weight = torch.randint(0, 203, (3, 6)), torch.rand(3, 6)

    def loss(labels: Tensor, weight: Tensor) -> Tensor:
        return fastkd.logit_kl(**x, labels=labels, weight=weight, ce_weight=1.0)

    got = vmap(loss)(labels, weight)
    assert torch.equal(got, torch.stack([loss(*pair) for pair in zip(labels, weight, strict=True)]))


@pytest.mark.parametrize("op", [op for op in OPS if op.name in ("attention_kl", "relation_kl")], ids=lambda op: op.name)
def test_vmap_over_masks(op: Op):
    """Masks of their own for each example, of hidden states that are all the same or not."""
    x = inputs_of(op)
    masks = {name: torch.rand(3, *mask.shape) < 0.7 for name, mask in options_of(op, x).items()}
    got = vmap(lambda masks: op.function(**x, **masks))(masks)
    looped = [op.function(**x, **{name: mask[i] for name, mask in masks.items()}) for i in range(3)]
    assert torch.equal(got, torch.stack(looped))


@over_ops
def test_forward_mode(op: Op):
    """Kernels say that they have no such derivative; the reference has that of the others."""
    inputs = inputs_of(op)
    name = op.student[0]

    def loss(x: Tensor, impl: str = "reference") -> Tensor:
        return op.function(**inputs | {name: x}, impl=impl)

    with pytest.raises(NotImplementedError, match=r'no forward-mode derivative.*; impl="reference" has one'):
        jacfwd(partial(loss, impl="fused"))(inputs[name])
    assert distance(jacfwd(loss)(inputs[name]), grad(loss)(inputs[name])) <= 1e-5


@over_reductions
def test_functional_call(reduction: str):
    """A head whose parameters are given to the call."""
    head = torch.nn.Linear(12, 203)
    x = inputs_of(LINEAR_KL)

    class Student(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, hidden: Tensor) -> Tensor:
            arguments = hidden, self.head.weight, x["teacher_hidden"], x["teacher_weight"]
            return fastkd.linear_kl(*arguments, student_bias=self.head.bias, reduction=reduction).sum()

    student, hidden = Student(), x["student_hidden"]
    got = grad(lambda parameters: functional_call(student, parameters, (hidden,)))(dict(student.named_parameters()))
    wanted = torch.autograd.grad(student(hidden), list(student.parameters()))
    for gradient, (name, _) in zip(wanted, student.named_parameters(), strict=True):
        assert torch.equal(got[name], gradient.detach()), name


@over_ops
@over_reductions
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(op: Op, reduction: str, reentrant: bool):
    inputs = inputs_of(op)
    _, wanted = value_and_gradients(op, inputs, reduction=reduction)
    leaves = {name: inputs[name].requires_grad_() for name in op.student}

    def loss(*student: Tensor) -> Tensor:
        return op.function(**inputs | dict(zip(leaves, student, strict=True)), reduction=reduction).sum()

    checkpoint(loss, *leaves.values(), use_reentrant=reentrant).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and torch.equal(leaf.grad, wanted[name]), name


class Stop(torch.autograd.Function):
    """Nothing, of which there is no derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        return None


@over_ops
def test_a_loss_that_nothing_depends_on_asks_for_no_gradient(op: Op):
    inputs = inputs_of(op)
    leaves = [inputs[name].requires_grad_() for name in op.student]
    loss = op.function(**inputs)
    (Stop.apply(loss) + 0 * leaves[0].sum()).backward()
    assert not leaves[0].grad.any() and all(leaf.grad is None for leaf in leaves[1:])


# ---- what asks for a gradient that there is none of ------------------------------------------------------------------


@over_token_ops
@over_backends
@pytest.mark.parametrize("name", ["weight", "normalizer"])
def test_constants_that_require_a_gradient(op: Op, backend: str, name: str):
    value = torch.rand(6) if name == "weight" else torch.tensor(2.0)
    with running_on(backend) as (impl, device):
        inputs = to(inputs_of(op), torch.float32, device)
        value = value.to(device).requires_grad_()
        with pytest.raises(ValueError, match=f"{name}: expected a tensor that requires no gradient"):
            op.function(**inputs, impl=impl, **{name: value})
        with torch.no_grad():  # nobody waits for one here
            op.function(**inputs, impl=impl, **{name: value})


@pytest.mark.parametrize("op", [op for op in OPS if op.name in ("attention_kl", "relation_kl")], ids=lambda op: op.name)
def test_normalizers_that_require_a_gradient(op: Op):
    with pytest.raises(ValueError, match="normalizer: expected a tensor that requires no gradient"):
        op.function(**inputs_of(op), normalizer=torch.tensor(2.0, requires_grad=True))


# ---- torch.compile ---------------------------------------------------------------------------------------------------

KNOBS: dict[str, list[dict[str, list[float]]]] = {
    "logit_kl": [
        {"temperature": [1.0, 2.0, 3.5, 0.5]},
        {"kd_weight": [1.0, 0.6, 0.3, 0.0], "ce_weight": [0.0, 0.4, 0.7, 1.0]},
        {"normalizer": [3.0, 5.0, 7.5, 0.0]},
        {"ignore_index": [-100, -5, -9, 2]},
    ],
    "linear_kl": [
        {
            "temperature": [1.0, 2.0, 3.5, 0.5],
            "student_scale": [1.0, 0.3, 0.4, 0.5],
            "teacher_scale": [1.0, 0.2, 0.1, 2.0],
        },
        {"kd_weight": [1.0, 0.6, 0.3, 0.0], "ce_weight": [0.0, 0.4, 0.7, 1.0], "workspace_mb": [1.0, 2.0, 3.0, 4.5]},
    ],
    "attention_kl": [{"student_scale": [1.0, 0.3, 0.4, 0.5], "teacher_scale": [1.0, 0.2, 0.1, 2.0]}],
    "relation_kl": [{"normalizer": [3.0, 5.0, 7.5, 2.5]}],
    "cka_loss": [{"eps": [1e-8, 1e-2, 0.5, 3.0]}],
}
BETA = {"beta": [0.5, 0.1, 0.2, 0.9]}
OF_ALL = [
    pytest.param(op, knobs, marks=[pytest.mark.long] if i else [])
    for op in OPS
    for i, knobs in enumerate(KNOBS[op.name] + ([] if op is CKA_LOSS else [BETA]))
]


@pytest.mark.parametrize("impl", ["fused", pytest.param("reference", marks=pytest.mark.long)])
@pytest.mark.parametrize(("op", "knobs"), OF_ALL, ids=lambda x: getattr(x, "name", None) or "-".join(x))
def test_knobs_that_change_do_not_recompile(op: Op, knobs: dict[str, list[float]], impl: str):
    """Two graphs for any number of values: the first call's, and one for all that follow."""
    if impl == "reference":  # which asks whether a term has a weight
        knobs = {name: [value or 0.1 for value in values] for name, values in knobs.items() if name != "workspace_mb"}
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    inputs = inputs_of(op)
    options: dict[str, Any] = {"impl": impl}
    if op in TOKEN_OPS:
        options |= {"labels": torch.tensor([1, -100, 3, 4, 0, 2]).clamp_min(0), "ce_weight": 0.5}
    if "beta" in knobs:
        options["divergence"] = "jsd"

    def loss(inputs: Inputs, values: dict[str, float]) -> Tensor:
        return op.function(**inputs, **options | values)

    compiled = torch.compile(loss, fullgraph=True, backend=graphs)
    leaves = [inputs[name].requires_grad_() for name in op.student]
    for i in range(4):
        values = {name: each[i] for name, each in knobs.items()}
        wanted, got = loss(inputs, values), compiled(inputs, values)
        assert distance(got, wanted) <= 1e-6 or wanted == got == 0
        for left, right in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(wanted, leaves), strict=True):
            assert distance(left, right) <= 1e-5 or left.equal(right)
    assert graphs.frame_count <= 2


SHARED: dict[str, Callable[[Tensor, Tensor, Tensor, str], Any]] = {
    "linear_kl": lambda x, w, _, reduction: fastkd.linear_kl(x, w, 2 * x, w, reduction=reduction),
    "attention_kl": lambda x, y, mask, reduction: fastkd.attention_kl(
        x,
        x,
        y[None].expand(2, -1, -1),
        y[None].expand(2, -1, -1),
        num_heads=2,
        key_mask=mask,
        query_mask=mask,
        reduction=reduction,
    ),
    "relation_kl": lambda x, y, mask, reduction: fastkd.relation_kl(
        [x, x], [y[None].expand(2, -1, -1)] * 2, num_heads=2, key_mask=mask, reduction=reduction
    ),
    "cka_loss": lambda x, y, mask, reduction: fastkd.cka_loss(
        [x, x], [y[None].expand(2, -1, -1)] * 2, mask=mask, reduction=reduction
    ),
}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("reduction", ["mean", "none"])  # a sum goes the way of a mean
def test_compiled_with_a_tensor_in_several_places(name: str, reduction: str):
    """A mask for all entries, queries that are the keys."""
    x, y, mask = torch.randn(2, 5, 4), torch.randn(5, 4), torch.tensor([[1, 1, 0, 1, 1], [1] * 5]).bool()

    def loss(x: Tensor) -> Tensor:
        found = SHARED[name](x, y, mask, reduction)
        return sum(part.sum() for part in found) if isinstance(found, tuple) else found.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = []
    for function in (loss, compiled):
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        found.append((value, *torch.autograd.grad(value, leaf)))
    assert all(distance(left, right) <= 1e-6 for left, right in zip(*found, strict=True))


# ---- properties ------------------------------------------------------------------------------------------------------


def equal_models(op: Op, deviation: float) -> Inputs:
    inputs = to(
        op.make(Regime("equal", deviation, None), **({"tokens": 5} if op in TOKEN_OPS else {"queries": 5})),
        torch.float32,
    )
    return inputs | {name.replace("teacher", "student"): x for name, x in inputs.items() if name.startswith("teacher")}


@pytest.mark.parametrize("op", DIVERGENCE_OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("backend", LONG_IN_TRITON)
@over_divergences
def test_equal_models_have_nothing_to_learn(op: Op, backend: str, divergence: str):
    """A loss of 0 and gradients of 0, to the bit."""
    for deviation in (0.1, 30.0):
        with running_on(backend) as (impl, device):
            inputs = to(equal_models(op, deviation), torch.float32, device)
            loss, gradients = value_and_gradients(op, inputs, impl=impl, divergence=divergence)
        assert loss == 0
        assert not any(gradient.any() for gradient in gradients.values())


@over_token_ops
@over_fused
@over_divergences
def test_low_temperatures_of_peaked_models(op: Op, backend: str, divergence: str):
    inputs = to(op.make(Regime("peaked", 30.0, None), tokens=3), torch.float32)
    options = {"temperature": 0.05, "divergence": divergence}
    wanted, _ = oracle(op, inputs, **options)
    with running_on(backend) as (impl, device):
        loss, gradients = value_and_gradients(op, to(inputs, torch.float32, device), impl=impl, **options)
    assert distance(loss, wanted) <= 1e-5
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@over_ops
def test_upstream_gradients_of_stride_0(op: Op):
    inputs, many = inputs_of(op), {"reduction": "none"}
    if op is CKA_LOSS:
        inputs = {name: [x, x + 1] for name, x in inputs.items()}  # type: ignore[dict-item]
    leaves = {
        name: [x.clone().requires_grad_() for x in xs] if isinstance(xs, list) else xs.clone().requires_grad_()
        for name, xs in inputs.items()
        if name in op.student
    }
    flat = [x for xs in leaves.values() for x in (xs if isinstance(xs, list) else [xs])]
    loss = op.function(**inputs | leaves, **many)
    upstream = torch.tensor(0.7)
    got = torch.autograd.grad(loss, flat, upstream.expand(loss.shape), retain_graph=True)
    wanted = torch.autograd.grad(loss, flat, torch.full(loss.shape, 0.7))
    assert all(torch.equal(left, right) for left, right in zip(got, wanted, strict=True))


@over_reductions
def test_a_frozen_head_costs_no_gradient(reduction: str):
    """Neither as an output of the op nor kept for the backward pass: nothing of the weight's size."""
    inputs = inputs_of(LINEAR_KL)
    inputs["student_hidden"].requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss = fastkd.linear_kl(**inputs, reduction=reduction)
    given = {x.data_ptr() for x in inputs.values()}
    assert max(x.numel() for x in saved if x.data_ptr() not in given) <= inputs["student_hidden"].numel()
    (gradient,) = torch.autograd.grad(loss.sum(), inputs["student_hidden"])
    assert gradient.any()
