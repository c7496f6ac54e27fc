"""Masks and numbers as people have them: of integers or bool, NumPy's scalars, 0-d tensors."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastkd

from .cases import (
    ATTENTION_KL,
    CKA_LOSS,
    LINEAR_KL,
    LOGIT_KL,
    LONG_IN_TRITON,
    RELATION_KL,
    TOKEN_OPS,
    UNRELATED,
    Op,
    over_token_ops,
    running_on,
    to,
    value_and_gradients,
)

over_impls = pytest.mark.parametrize("impl", ["reference", "fused"])

# Multiples of a quarter: float32 and float16 hold them as float64 does.
TOKEN_NUMBERS: dict[str, Any] = {
    "beta": 0.25,
    "temperature": 2.0,
    "kd_weight": 0.5,
    "ce_weight": 3,
    "ignore_index": 7,
    "normalizer": 5,
}
NUMBERS: list[tuple[Op, dict[str, Any]]] = [
    (LOGIT_KL, TOKEN_NUMBERS),
    (LINEAR_KL, TOKEN_NUMBERS | {"student_scale": 0.5, "teacher_scale": 2, "workspace_mb": 1}),
    (ATTENTION_KL, {"beta": 0.25, "student_scale": 0.5, "teacher_scale": 2, "normalizer": 5}),
    (RELATION_KL, {"beta": 0.25, "normalizer": 5}),
    (CKA_LOSS, {"eps": 0.25}),
]
KINDS: dict[str, Callable[[Any], Any]] = {
    "numpy": lambda x: np.int64(x) if isinstance(x, int) else np.float32(x),
    "numpy of few bits": lambda x: np.uint8(x) if isinstance(x, int) else np.float16(x),
    "0-d": torch.tensor,
}


@over_token_ops
@pytest.mark.parametrize("backend", ["reference", *LONG_IN_TRITON])
def test_weights_are_masks_too(op: Op, backend: str):
    """The attention_mask of a tokenizer, which is int64, and masks of bool; counts are weights as they are."""
    with running_on(backend) as (impl, device):
        inputs = to(op.make(UNRELATED, tokens=6), torch.float32, device)
        for values in ([1, 0, 1, 1, 0, 1], [2, 0, 1, 200, 0, 3]):
            weight = torch.tensor(values, device=device)
            wanted = value_and_gradients(op, inputs, weight=weight.double(), impl=impl)
            dtypes = [torch.int64, torch.int32, torch.uint8] + [torch.bool] * (max(values) == 1)
            for dtype in dtypes:
                loss, gradients = value_and_gradients(op, inputs, weight=weight.to(dtype), impl=impl)
                assert torch.equal(loss, wanted[0])
                assert all(torch.equal(gradients[name], wanted[1][name]) for name in op.student)


@over_impls
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("op", "options"), NUMBERS, ids=[op.name for op, _ in NUMBERS])
def test_numbers_of_any_kind(op: Op, options: dict[str, Any], kind: str, impl: str):
    inputs = to(op.make(UNRELATED), torch.float32)
    others: dict[str, Any] = {"impl": impl}
    if op is not CKA_LOSS:
        others["divergence"] = "skew_kl"
    if op in TOKEN_OPS:
        others["labels"] = torch.arange(5, 5 + next(iter(inputs.values())).shape[0])  # one of them is ignored
    wanted = value_and_gradients(op, inputs, **options, **others)
    got = value_and_gradients(op, inputs, **{name: KINDS[kind](x) for name, x in options.items()}, **others)
    assert torch.equal(got[0], wanted[0])
    assert all(torch.equal(got[1][name], wanted[1][name]) for name in op.student)


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("LogitKLLoss", {}),
        ("LinearKLLoss", {}),
        ("RelationKLLoss", {"num_heads": 2}),
        ("AttentionKLLoss", {"num_heads": 2}),
        ("CKALoss", {}),
    ],
)
def test_modules_know_their_keywords(name: str, needed: dict[str, int]):
    """An unknown one is an error that names the class that was called; bad constants are errors before any call."""
    module = getattr(fastkd.nn, name)
    with pytest.raises(TypeError, match=rf"{name}.__init__\(\) got an unexpected keyword argument 'temperatur'"):
        module(**needed, temperatur=2.0)
    constants = module(**needed).options
    assert set(constants) == set(inspect.signature(module).parameters)
    for constant in constants:
        if constant not in ("causal", "workspace_mb", "vocab_group", "group"):
            with pytest.raises((TypeError, ValueError), match=f"{constant}: expected"):
                module(**{**needed, constant: object()})


TYPED = """
import torch
from torch import Tensor

import fastkd

x, y = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
loss = fastkd.logit_kl(x, y) + fastkd.relation_kl(x, y, num_heads=2)
loss = loss + fastkd.relation_kl([x, x], [y, y], num_heads=2, reduction="sum", causal=[True, False])
rows: tuple[Tensor, ...] = fastkd.relation_kl([x, x], [y, y], num_heads=2, reduction="none")
loss = loss + rows[0].sum() + fastkd.relation_kl(x, y, num_heads=2, reduction="none").sum()
loss = loss + fastkd.cka_loss([x], [y], reduction="none").sum() + fastkd.nn.LinearKLLoss(temperature=2.0)(x, x, y, y)
fastkd.nn.LinearKLLoss(temperatur=2.0)
x + fastkd.relation_kl([x], [y], num_heads=2, reduction="none")
fastkd.relation_kl(x, y, num_heads=2, casual=True)
loss, metrics = fastkd.linear_kl(x, x[0], y, y[0], return_metrics=True, temperature=2.0)
loss = loss + metrics["kd"] + fastkd.logit_kl(x, y, reduction="sum", return_metrics=False)
fastkd.logit_kl(x, y, return_metrics=True).sum()
fastkd.linear_kl(x, x[0], y, y[0], return_metrics=True, temperatur=2.0)
"""


@pytest.mark.long
def test_types(tmp_path: Path):
    """mypy --strict takes what is right and finds what is not."""
    pytest.importorskip("mypy")
    (tmp_path / "use.py").write_text(TYPED, encoding="utf-8")
    root = Path(fastkd.__file__).parents[1]
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", "use.py"]
    run = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(root)}, capture_output=True, text=True
    )
    found = [line.split(": ", 2) for line in run.stdout.splitlines() if ": error: " in line]
    expected = [(13, "temperatur"), (14, "Unsupported operand types"), (15, "casual"), (15, "No overload variant")]
    expected += [(18, 'has no attribute "sum"'), (19, "temperatur"), (19, "No overload variant")]
    for (place, _, message), (line, words) in zip(found, expected, strict=True):
        assert place == f"use.py:{line}" and words in message


@pytest.mark.parametrize("kind", KINDS)
def test_whole_numbers_of_any_kind(kind: str):
    """num_heads and max_distance; and modules take what functions take."""
    three, six = KINDS[kind](3), KINDS[kind](6)
    x, y = (torch.randn(2, 5, 6) for _ in range(2))
    wanted = fastkd.relation_kl(x, y, num_heads=3)
    assert torch.equal(fastkd.relation_kl(x, y, num_heads=three), wanted)
    assert torch.equal(fastkd.nn.RelationKLLoss(num_heads=three)(x, y), wanted)
    assert torch.equal(fastkd.attention_kl(x, x, y, y, num_heads=three), wanted)
    assert fastkd.TopK(torch.zeros(2, 1).long(), torch.zeros(2, 1), temperature=three).temperature == 3
    assert fastkd.RelativeBias(torch.randn(8, 3), max_distance=six).diagonals().shape == (3, 13)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"beta": torch.rand(2)}, ValueError, r"beta: expected a number in \(0, 1\), got a tensor of shape \[2\]"),
        ({"beta": np.float32(2)}, ValueError, r"beta: expected a number in \(0, 1\), got 2.0"),
        ({"temperature": torch.tensor(0)}, ValueError, "temperature: expected a number > 0, got 0"),
        ({"temperature": torch.tensor(True)}, TypeError, "temperature: expected a number > 0, got bool"),
        ({"temperature": np.bool_(True)}, TypeError, "temperature: expected a number > 0, got bool"),
        ({"temperature": torch.tensor(1j)}, TypeError, "temperature: expected a number > 0, got complex"),
        ({"temperature": torch.ones((), requires_grad=True)}, ValueError, "temperature: .* requires no gradient"),
        (
            {"temperature": torch.ones((), device="meta")},
            ValueError,
            r"temperature: .* not at hand, on meta; .*item\(\)",
        ),
        ({"ignore_index": torch.tensor(0.5)}, TypeError, "ignore_index: expected an int, got float"),
        ({"ignore_index": np.float32(1)}, TypeError, "ignore_index: expected an int, got float"),
        ({"normalizer": np.float32(-1)}, ValueError, "normalizer: expected a number >= 0, got -1.0"),
        ({"normalizer": torch.tensor(-1)}, ValueError, "normalizer: expected a number >= 0, got -1"),
        ({"weight": torch.ones(2).to(torch.complex64)}, TypeError, "weight: expected dtype .* got torch.complex64"),
    ],
)
def test_what_is_no_number(changes: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        fastkd.logit_kl(torch.randn(2, 5), torch.randn(2, 5), **changes)


@pytest.mark.parametrize(
    "temperature",
    [pytest.param(np.float32(2), marks=pytest.mark.long, id="numpy"), pytest.param(torch.tensor(2.0), id="0-d")],
)
def test_numbers_of_any_kind_under_a_compiler(temperature: Any):
    torch._dynamo.reset()
    student, teacher = torch.randn(2, 5), torch.randn(2, 5)
    compiled = torch.compile(lambda *x: fastkd.logit_kl(*x[:2], temperature=x[2]), backend="eager")
    wanted = fastkd.logit_kl(student, teacher, temperature=2.0)
    assert torch.equal(compiled(student, teacher, temperature), wanted)
