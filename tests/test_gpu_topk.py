"""What only a GPU can show of top-k teachers: graphs, waiting, memory, results at full size and beyond 2^31 elements.

As tests/test_gpu.py, every test is rehearsed where there is no GPU. T tokens, V vocabulary, H hidden width, K ids.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.ops.drivers.topk_rows import MOST_IN_TRITON

from . import test_gpu
from .cases import ROUNDING, SMALLEST, distance, interpreted
from .test_gpu import DTYPES, Place, same

pytestmark = interpreted
place = test_gpu.place  # the fixture

over_losses = pytest.mark.parametrize("name", ["logit_kl", "linear_kl"])
Sizes = tuple[int, int, int, int]  # T, V, H, K


def made(name: str, place: Place, dtype: torch.dtype, sizes: Sizes) -> dict[str, Tensor]:
    """The student's inputs, scores of deviation 3, and a teacher's top."""
    tokens, vocabulary, width, entries = sizes

    def normal(*size: int, deviation: float = 1.0) -> Tensor:
        return torch.randn(*size, device=place.device).mul_(deviation).to(dtype)

    if name == "logit_kl":
        inputs = {"student_logits": normal(tokens, vocabulary, deviation=3.0)}
    else:
        weight = normal(vocabulary, width, deviation=3 * width**-0.5)
        inputs = {"student_hidden": normal(tokens, width), "student_weight": weight}
    scores = torch.randn(tokens, vocabulary // 2, device=place.device).mul_(3)  # the tail is more than a few ids
    log_probs, ids = (scores.log_softmax(-1) - 0.1).topk(entries, -1)
    return {**inputs, "ids": ids, "log_probs": log_probs}


def run(
    name: str, inputs: dict[str, Tensor], impl: str = "fused", tail: str = "bucket", **options: Any
) -> tuple[Tensor, ...]:
    """The loss, and the gradients of the student's inputs."""
    given = {key: x.detach().requires_grad_() for key, x in inputs.items() if key.startswith("student")}
    teacher = fastkd.TopK(inputs["ids"], inputs["log_probs"], tail)
    key = "teacher_logits" if name == "logit_kl" else "teacher_hidden"
    loss = getattr(fastkd, name)(**given, **{key: teacher}, impl=impl, **options)
    return (loss.detach(), *torch.autograd.grad(loss.sum(), list(given.values())))


def exact(name: str, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    wide = {key: x.double() if key.startswith("student") else x for key, x in inputs.items()}
    return run(name, wide, "reference", **options)


def with_labels(place: Place, sizes: Sizes) -> dict[str, Any]:
    """Options that use every tensor."""
    labels, weight = torch.arange(sizes[0]) % sizes[1], torch.ones(sizes[0])
    labels[1], weight[2] = -100, 0
    options = {"labels": labels.to(place.device), "weight": weight.to(place.device), "ce_weight": 0.5}
    return {**options, "temperature": 2.0, "divergence": "jsd"}


def usual(place: Place) -> Sizes:
    return place.size((300, 32100, 128, 64), (4, 33, 16, 4))


@over_losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_replays_it(place: Place, name: str, dtype: torch.dtype):
    place.rehearses(name == "linear_kl" and dtype == torch.float32)
    inputs, others = (made(name, place, dtype, usual(place)) for _ in range(2))
    options = with_labels(place, usual(place))
    replay = place.captured(lambda: run(name, inputs, **options))
    for key, x in inputs.items():
        x.copy_(others[key])
    got = [x.clone() for x in replay()]
    assert same(replay(), got)
    for x, y in zip(got, run(name, others, **options), strict=True):
        # a library may choose other GEMMs in a graph
        assert distance(x, y) <= (1e-6 if dtype == torch.float32 else 2 * ROUNDING[dtype])


@over_losses
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_host_never_waits(place: Place, name: str, reduction: str):
    place.rehearses(name == "linear_kl" and reduction == "mean")
    inputs = made(name, place, torch.float32, usual(place))
    options = with_labels(place, usual(place)) | {"reduction": reduction}
    first = run(name, inputs, **options)  # compiles
    with place.no_waiting():
        second = run(name, inputs, **options)
    assert same(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory(place: Place, dtype: torch.dtype):
    """Of logits nothing but the gradient and numbers of rows; of hidden states the workspace and fp32 gradients."""
    place.rehearses(dtype == torch.float32)
    sizes = tokens, vocabulary, width, entries = place.size((8192, 32128, 512, 64), (9, 67, 8, 4))
    of_rows = 10 * 8 * tokens * (entries + 8)  # fp64 copies of the teacher's K numbers
    inputs = made("logit_kl", place, dtype, sizes)
    assert place.peak(lambda: run("logit_kl", inputs)) <= of_rows + 2**20
    inputs = made("linear_kl", place, dtype, sizes)
    hidden = tokens * width * (4 + dtype.itemsize)
    peak = place.peak(lambda: run("linear_kl", inputs, workspace_mb=64))
    assert peak <= 64 * 2**20 + 4 * vocabulary * width + hidden + of_rows + 16 * 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("odd", [0, 1])
def test_logits_beyond_2_to_the_31(place: Place, dtype: torch.dtype, odd: int):
    """First and last rows, whole; a row of odd length begins at an odd address."""
    place.rehearses(odd == 1 and dtype == torch.float32)
    vocabulary = place.size(128256, 66) + odd
    tokens = place.size(2**31 // vocabulary + 9, 9)
    place.needs(3 * tokens * vocabulary * dtype.itemsize)
    student = torch.randn(tokens, vocabulary, device=place.device, dtype=dtype).mul_(3)
    log_probs, ids = torch.randn(tokens, 64, device=place.device).log_softmax(-1).sub(0.1).topk(8, -1)
    inputs = {"student_logits": student, "ids": ids + vocabulary - 64, "log_probs": log_probs}
    loss, gradient = run("logit_kl", inputs, reduction="none")
    assert not place.real or gradient.numel() > 2**31
    for rows in (slice(0, 2), slice(tokens - 2, tokens)):
        wanted, wanted_gradient = exact("logit_kl", {key: x[rows] for key, x in inputs.items()}, reduction="none")
        assert distance(loss[rows], wanted) <= 1e-6
        assert distance(gradient[rows], wanted_gradient) <= 1e-5 + 2 * ROUNDING[dtype]


@over_losses
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocabulary", "entries"), [(32100, 64), (128256, 20), (128256, MOST_IN_TRITON)])
def test_losses_at_full_size(place: Place, name: str, dtype: torch.dtype, vocabulary: int, entries: int):
    place.rehearses(name == "logit_kl" and entries == 64 and dtype == torch.bfloat16)
    sizes = place.size((24, vocabulary, 96, entries), (3, 67, 8, 5))
    inputs, more = made(name, place, dtype, sizes), with_labels(place, sizes)
    plain: dict[str, Any] = {"tail": "bucket", "divergence": "reverse_kl"}
    cases = [plain, {"tail": "conditional", "divergence": "forward_kl"}, {"tail": "ignore"}, more]
    for options in place.some(cases[::-1]):
        wanted, *gradients = exact(name, inputs, **options)
        got, *got_gradients = run(name, inputs, **options)
        assert distance(got, wanted) <= 1e-5, options
        for x, y in zip(got_gradients, gradients, strict=True):
            assert x.dtype == dtype
            smallest = SMALLEST[dtype] * y.numel() ** 0.5 / y.norm().item()
            assert distance(x, y) <= 1e-5 + 2 * ROUNDING[dtype] + smallest, options
