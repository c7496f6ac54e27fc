"""cka_loss on a GPU, its Triton kernels and its products: on one where there is one, else in Triton's interpreter.

tests/test_cka_loss.py runs them behind the public function. Here is what is particular to them: blocks and their edges,
lists and launches, dtypes, layouts, what they write and what they may read.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import fastkd.functions
from fastkd import reference
from fastkd.checks import numbers

from .cases import DEVICE, INF, NAN, distance, interpreted, running_on

pytest.importorskip("triton", reason="Triton is not installed")
driver = importlib.import_module("fastkd.ops.drivers.cka_loss_gpu")
kernels = importlib.import_module("fastkd.kernels.cka")  # ours: a failure to import it is a failure

EPS = 1e-8
# (tokens, widths of student and teacher): Grams and covariances, one block and several, at and off their edges
SHAPES = [(37, (24, 40)), (140, (64, 130)), (150, (20, 33)), (128, (1, 70)), (131, (130, 1))]
# Of a loss near 1, and of a gradient (relative Frobenius error).
TOLERANCE = {torch.float64: (1e-12, 1e-12), torch.float32: (2e-7, 1e-5)}

pytestmark = interpreted

over_shapes = pytest.mark.parametrize("tokens, widths", SHAPES, ids=str)


def hidden(tokens: int, widths: tuple[int, int], offset: float = 0.0, near: float | None = None) -> list[Tensor]:
    """Student and teacher in float64, of unit variance; `near` is the student's distance from the teacher."""
    student, teacher = (torch.randn(tokens, width, dtype=torch.float64) for width in widths)
    if near is not None:
        student = teacher[:, : widths[0]] + near * student
    return [student + offset, teacher + offset]


def mask_of(tokens: int) -> Tensor:
    mask = torch.rand(tokens) < 0.6
    mask[0], mask[1:3] = False, True
    return mask


def poisoned(pair: list[Tensor], mask: Tensor) -> list[Tensor]:
    return [x.masked_fill(~mask[:, None], value) for x, value in zip(pair, (NAN, INF), strict=True)]


def oracle(pair, mask=None, squared=False, dtype=torch.float64, scale=1.0) -> tuple[Tensor, Tensor]:
    """(loss, gradient) by autograd in the dtype."""
    student, teacher = (x.to(dtype, copy=True) for x in pair)
    if mask is not None:
        student, teacher = student.masked_fill(~mask[:, None], 0), teacher.masked_fill(~mask[:, None], 0)
    student.requires_grad_()
    (loss,) = reference.cka_loss([student], [teacher], mask=[mask], eps=EPS, squared=squared)
    (gradient,) = torch.autograd.grad(loss, student, torch.as_tensor(scale, dtype=loss.dtype))
    return loss.detach(), gradient


def run(pairs, masks=None, squared=False, wanted=None, scales=None) -> SimpleNamespace:
    """Both passes of the kernels, and what they return is that of the op's fake kernels."""
    masks, wanted = masks or [None] * len(pairs), wanted or [True] * len(pairs)
    student, teacher = ([pair[i].to(DEVICE) for pair in pairs] for i in range(2))
    masks = [None if mask is None else mask.to(DEVICE) for mask in masks]
    op = torch.ops.fastkd
    with running_on("triton"):
        loss, mean, factor = op.cka_loss(student, teacher, masks, wanted, numbers(EPS), squared)
    scales = torch.ones_like(loss) if scales is None else torch.tensor(scales, dtype=loss.dtype, device=DEVICE)
    with running_on("triton"):
        gradients = op.cka_loss_backward(student, teacher, masks, mean, factor, wanted, scales)
    found = loss, *mean, *factor, *gradients
    described = [
        [x.to("meta") if isinstance(x, Tensor) else x for x in xs] for xs in (student, teacher, masks, mean, factor)
    ]
    fakes = op.cka_loss(*described[:3], wanted, numbers(EPS), squared)
    fakes = fakes[0], *fakes[1], *fakes[2], *op.cka_loss_backward(*described, wanted, scales.to("meta"))
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in fakes]
    return SimpleNamespace(
        loss=loss.cpu(), mean=mean, factor=factor, gradients=[gradient.cpu() for gradient in gradients]
    )


def check(found, n: int, pair, mask=None, squared=False, scale=1.0, dtype=None) -> None:
    loss, gradient = oracle(pair, mask, squared, scale=scale)
    of_loss, of_gradient = TOLERANCE[dtype or pair[0].dtype]
    assert abs(found.loss[n].item() - loss.item()) <= of_loss
    assert distance(found.gradients[n], gradient) <= of_gradient
    if mask is not None:
        assert (found.gradients[n][~mask] == 0).all()


# ---- values ----------------------------------------------------------------------------------------------------------


@over_shapes
@pytest.mark.parametrize("masked", [False, True])
def test_values(tokens: int, widths: tuple[int, int], masked: bool):
    """Offset, squared, an upstream gradient, and NaN where nothing may be read."""
    pair = [x.float() for x in hidden(tokens, widths, offset=3.0)]
    mask = mask_of(tokens) if masked else None
    found = run([poisoned(pair, mask) if masked else pair], [mask], squared=masked, scales=[-2.5])
    check(found, 0, pair, mask, squared=masked, scale=-2.5)


@pytest.mark.parametrize("tokens, widths", [(37, (24, 40)), (75, (20, 40))], ids=str)
def test_float64(tokens: int, widths: tuple[int, int]):
    pair, mask = hidden(tokens, widths, offset=50.0), mask_of(tokens)
    check(run([poisoned(pair, mask)], [mask]), 0, pair, mask)


@pytest.mark.parametrize("tokens, widths", [(37, (24, 40)), (140, (20, 33))], ids=str)
def test_an_offset_costs_nothing(tokens: int, widths: tuple[int, int]):
    """50 and 10,000 standard deviations, as fp32 holds them."""
    for offset in (50.0, 1e3, 1e4):
        pair, mask = [x.float() for x in hidden(tokens, widths, offset)], mask_of(tokens)
        found = run([poisoned(pair, mask)], [mask])
        truth = torch.cat([pair[1], pair[0]], 1)[mask].double().mean(0)
        assert distance(found.mean[0], truth) <= 6e-8  # one rounding
        loss, gradient = oracle(pair, mask)
        assert abs(found.loss[0].item() - loss.item()) <= 2e-7
        assert distance(found.gradients[0], gradient) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("near", [None, 0.1])
@pytest.mark.parametrize("offset", [0.0, 50.0])
@pytest.mark.parametrize("tokens", [90, 150])
def test_16_bits(dtype: torch.dtype, near: float | None, offset: float, tokens: int):
    """As far from the truth, which is that of inputs not rounded, as fp32 arithmetic at most twice, and a rounding."""
    truth = hidden(tokens, (40, 70) if near is None else (70, 70), offset, near)
    pair, mask = [x.to(dtype) for x in truth], mask_of(tokens)
    found = run([poisoned(pair, mask)], [mask])
    loss, gradient = oracle(truth, mask)
    plain_loss, plain = oracle(pair, mask, dtype=torch.float32)
    rounding = torch.finfo(dtype).eps / 2
    # rounding of centred operands averages out over all that a norm sums up
    assert abs(found.loss[0].item() - loss.item()) <= 2 * abs(plain_loss.item() - loss.item()) + 0.02 * rounding
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * gradient.numel() ** 0.5
    bound = 2 * distance(plain, gradient) + rounding + smallest / gradient.norm().item()
    assert distance(found.gradients[0], gradient) <= bound


def test_fp16_factors_are_not_flushed():
    """They are about one over the number of tokens and the variance: too little for fp16, unlike what comes of them."""
    large = [(64 * x).half() for x in hidden(200, (8, 8))]
    found = run([large], scales=[2.0**14])
    assert found.factor[0].abs().max() < 2**-17
    assert distance(found.gradients[0], oracle(large, scale=2.0**14)[1]) <= 1e-3


@pytest.mark.parametrize("student, teacher", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float64")])
@pytest.mark.parametrize("tokens", [20, 90])
def test_teachers_of_another_dtype(student: str, teacher: str, tokens: int):
    """Computed in the wider one, of fp32 at most; the gradient has the student's."""
    pair = [x.to(getattr(torch, name)) for x, name in zip(hidden(tokens, (24, 40)), (student, teacher), strict=True)]
    found = run([pair])
    loss, gradient = oracle(pair)
    assert abs(found.loss[0].item() - loss.item()) <= 2e-7
    assert distance(found.gradients[0], gradient) <= (2e-3 if student == "bfloat16" else 1e-5)


@pytest.mark.parametrize("tokens", [50, 140])
def test_student_near_the_teacher(tokens: int):
    """A loss of about 5e-7 is what remains of norms that are all but alike."""
    pair = [x.float() for x in hidden(tokens, (65, 65), near=1e-3)]
    found = run([pair])
    loss, gradient = oracle(pair)
    _, plain = oracle(pair, dtype=torch.float32)
    assert abs(found.loss[0].item() - loss.item()) <= 2e-8
    assert distance(found.gradients[0], gradient) <= max(5e-5, 2 * distance(plain, gradient))


# ---- little to compare -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 9])
def test_few_tokens(dtype: torch.dtype, tokens: int):
    pair = [x.to(dtype) for x in hidden(tokens, (3, 5), offset=0.1)]
    found = run([pair])
    if tokens < 2:
        assert found.loss[0] == 0 and not found.gradients[0].any()
    elif tokens == 2:  # their kernels are both of rank one
        assert abs(found.loss[0]) <= (1e-6 if dtype == torch.float32 else 1e-3)
    else:
        assert abs(found.loss[0] - oracle(pair)[0]) <= (2e-7 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("tokens", [6, 40])
@pytest.mark.parametrize("valid", [0, 1])
def test_fewer_than_two_valid(tokens: int, valid: int):
    mask = torch.arange(tokens) >= tokens - valid
    pair = poisoned([x.float() for x in hidden(tokens, (3, 5))], mask)
    found = run([pair], [mask])
    assert found.loss[0] == 0 and not found.gradients[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [6, 140])
@pytest.mark.parametrize("which", [[0], [0, 1]], ids=str)
def test_constant_hidden_states(dtype: torch.dtype, tokens: int, which: list[int]):
    """Their mean is what they are, to the bit."""
    pair, mask = hidden(tokens, (3, 5)), mask_of(tokens)
    for i in which:
        pair[i] = (pair[i][:1] * 17 + 0.1).expand(tokens, -1)
    found = run([poisoned([x.to(dtype) for x in pair], mask)], [mask])
    assert found.loss[0] == 1 and not found.gradients[0].any()


def test_first_valid_token_far_behind():
    pair, mask = [x.float() for x in hidden(1200, (3, 5), offset=50.0)], torch.arange(1200) >= 1100
    check(run([poisoned(pair, mask)], [mask]), 0, pair, mask)


@pytest.mark.parametrize("tokens", [6, 40])
def test_nan_that_is_read_is_seen(tokens: int):
    for i in range(2):
        pair, mask = [x.float() for x in hidden(tokens, (3, 5))], mask_of(tokens)
        pair[i][1, 2] = NAN
        found = run([pair], [mask])
        assert found.loss[0].isnan() and found.gradients[0][mask].isnan().any()
        assert (found.gradients[0][~mask] == 0).all()


# ---- lists and launches ----------------------------------------------------------------------------------------------


def test_pairs_that_differ_in_everything():
    """Tokens, widths, masks, what is wanted."""
    sizes = [(9, (3, 70)), (150, (20, 33)), (90, (40, 7)), (20, (24, 1)), (200, (3, 5)), (60, (5, 6))]
    pairs = [[x.float() for x in hidden(*size)] for size in sizes]
    masks = [None, mask_of(150), mask_of(90), None, mask_of(200), None]
    wanted, scales = [True, True, False, True, True, False], [1.0, -2.0, 3.0, 0.5, 0.0, 1.0]
    found = run(pairs, masks, wanted=wanted, scales=scales)
    for n, (pair, mask, want, scale) in enumerate(zip(pairs, masks, wanted, scales, strict=True)):
        if want and scale:
            check(found, n, pair, mask, scale=scale)
        else:
            assert abs(found.loss[n] - oracle(pair, mask)[0]) <= 2e-7
            assert not found.gradients[n].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("room, entries", [(0.1, 16), (0.4, 16), (2.5, 16), (100, 2)], ids=str)
@pytest.mark.parametrize("tokens", [9, 40], ids=["Grams", "covariances"])
def test_in_parts(tokens: int, room: float, entries: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Pairs by and by, and one in parts of its tokens or columns, where there is room for no more: as all at once."""
    masks = [mask_of(tokens) for _ in range(3)]
    pairs = [poisoned([x.to(dtype) for x in hidden(tokens, (7, 9), offset=3.0)], mask) for mask in masks]
    whole = run(pairs, masks)
    monkeypatch.setattr(kernels, "ENTRIES", entries)
    monkeypatch.setattr(driver, "WORKSPACE", max(1, int(room * tokens * 16 * dtype.itemsize)))
    found = []
    for batch in driver._batches(*zip(*pairs, strict=True), masks, whole.mean, range(3)):
        for several, *_ in batch.columns(*batch.models[1]) if tokens == 9 else batch.rows():
            found.append(batch.members[several])
    assert len(found) > 3 if room < 1 else found == [[0, 1], [2]] or tokens == 9
    parts = run(pairs, masks)
    assert distance(parts.loss, whole.loss) <= 1e-6
    for mine, other in zip(parts.gradients, whole.gradients, strict=True):
        assert distance(mine, other) <= (1e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("tokens", [9, 20])
def test_pairs_that_are_alike_go_together(tokens: int, monkeypatch: pytest.MonkeyPatch):
    """A launch of each kernel for each model, and of products likewise."""
    launched = []
    for name in ("means_kernel", "centre_kernel"):
        monkeypatch.setattr(kernels, name, _Counted(name, getattr(kernels, name), launched))
    for name in ("_add_product_", "product"):
        function = getattr(driver, name)
        monkeypatch.setattr(driver, name, lambda *x, f=function, name=name: (launched.append(name), f(*x))[1])
    run([[x.float() for x in hidden(tokens, (5, 6))] for _ in range(4)])
    if tokens == 9:  # Grams
        forward, backward = 2 * ["centre_kernel", "_add_product_"], ["centre_kernel", "product"]
    else:
        forward = ["centre_kernel"] * 2 + ["_add_product_"] * 2
        backward = ["centre_kernel"] * 2 + ["product"]
    assert launched == ["means_kernel"] * 2 + forward + backward


class _Counted:
    def __init__(self, name: str, kernel, launched: list[str]):
        self.name, self.kernel, self.launched = name, kernel, launched

    def __getitem__(self, grid):
        self.launched.append(self.name)
        return self.kernel[grid]


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [20, 90])
def test_strides(tokens: int):
    """Rows with gaps, columns that are not neighbours, one row for all."""
    pair, mask = [x.float() for x in hidden(tokens, (24, 40))], mask_of(tokens)
    plain = run([pair], [mask])
    for layout in (
        lambda x: torch.cat([x, torch.full_like(x, NAN)], 1)[:, : x.shape[1]],
        lambda x: x.t().contiguous().t(),
    ):
        found = run([[layout(x) for x in pair]], [mask])
        for x, y in ((found.loss, plain.loss), (found.gradients[0], plain.gradients[0])):
            # on a GPU another binary, which may fuse products and sums differently
            assert distance(x, y) <= 1e-6 if x.is_cuda else torch.equal(x, y)
    student = pair[0][:1].expand(tokens, -1)
    assert run([[student, pair[1]]]).loss[0] == 1


@pytest.mark.parametrize("tokens", [20, 180])
def test_the_same_again(tokens: int):
    """To the bit: results do not depend on the run, nor the loss on what is wanted."""
    pair = [x.float() for x in hidden(tokens, (140, 20) if tokens == 180 else (24, 40))]
    first, second = run([pair]), run([pair])
    assert torch.equal(first.loss, second.loss) and torch.equal(first.gradients[0], second.gradients[0])
    assert torch.equal(run([pair], wanted=[False]).loss, first.loss)


def test_behind_the_public_function():
    with fastkd.backend.interpret_triton() if DEVICE.type == "cpu" else torch.cuda.device(DEVICE):
        pairs = [[x.float() for x in hidden(30, widths)] for widths in ((4, 5), (20, 30))]
        students = [pair[0].to(DEVICE).requires_grad_() for pair in pairs]
        mask = mask_of(30)
        loss = fastkd.cka_loss(
            students, [pair[1].to(DEVICE) for pair in pairs], mask=mask.to(DEVICE), squared=True, impl="fused"
        )
        loss.backward()
    truth = [oracle(pair, mask, squared=True) for pair in pairs]
    assert distance(loss, sum(one for one, _ in truth)) <= 1e-6
    for student, (_, gradient) in zip(students, truth, strict=True):
        assert distance(student.grad, gradient) <= 1e-5
