"""The row kernels for GPUs, in Triton and in CUDA C++.

On a GPU where there is one. Else Triton's run in its interpreter, and the CUDA C++ ones on a CPU, in place of whose
threads tests/emulated/device.h has a GPU's.

The contract test runs Triton's behind the public functions. Here both are called directly and compared with the C++
kernels for CPUs in float64, on what is particular to them: blocks, running maxima, strides, dtypes, and rows that hold
no distribution.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.divergence import divergence_code
from fastkd.ops.drivers.divergence_rows import ELSEWHERE, STATS, CudaRows, cuda_rows_problem, gpu_rows

from . import emulated
from .cases import (
    DEVICE,
    INF,
    LINEAR_KL,
    LOGIT_KL,
    NAN,
    REGIMES,
    distance,
    interpreted,
    over_divergences,
    running_on,
    to,
    value_and_gradients,
)
from .cases import oracle as op_oracle

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")
common = importlib.import_module("fastkd.kernels.common")
rows = importlib.import_module("fastkd.kernels.rows")  # ours: a failure to import it is a failure

# Relative Frobenius error of a gradient: some roundings in the working precision and one to the dtype. Mostly 1e-7 in
# fp32; reverse_kl takes a large mean from a large log-ratio where the student is confident.
TOLERANCE = {torch.float64: 2e-14, torch.float32: 5e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
if DEVICE.type == "cuda":
    TOLERANCE[torch.float32] = 1e-5  # ex2.approx
else:
    TOLERANCE[torch.bfloat16] *= 2  # the interpreter cuts digits off where a GPU rounds

pytestmark = interpreted


def cuda_rows() -> type[CudaRows]:
    """The CUDA C++ kernels: the real ones on a GPU."""
    if DEVICE.type == "cpu":
        emulated.load()
    elif cuda_rows_problem():
        pytest.skip(str(cuda_rows_problem()))
    return CudaRows


kernels: Any = rows  # what a test calls


@pytest.fixture(autouse=True, params=["triton", "cuda"])
def _kernels(request):
    global kernels
    kernels = cuda_rows() if request.param == "cuda" else rows


def skip_unless_made_for(*matrices: Tensor | None) -> None:
    if kernels is CudaRows and not CudaRows.takes(*matrices):
        pytest.skip("rows that the CUDA C++ kernels leave to Triton")


over_triton_alone = pytest.mark.parametrize("_kernels", ["triton"], indirect=True)
over_cuda_alone = pytest.mark.parametrize("_kernels", ["cuda"], indirect=True)


def objective(divergence: str, beta=0.3, temperature=1.0, kd_weight=1.0, ce_weight=0.0):
    return divergence_code(divergence), beta, temperature, kd_weight, ce_weight


def fused(student: Tensor, teacher: Tensor | None, coefficient, labels, *options) -> tuple[Tensor, Tensor]:
    """(loss [R], gradient [R, V]) on the CPU, by the kernel that writes over the student; its strides are kept."""

    def moved(x):
        if x is None or x.device == DEVICE:
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)

    target = moved(student) if DEVICE.type == "cuda" else student.clone(memory_format=torch.preserve_format)
    skip_unless_made_for(target, teacher)
    loss = torch.empty(student.shape[0], dtype=torch.float64, device=DEVICE)
    arguments = target, moved(teacher), moved(coefficient), moved(labels)
    kernels.divergence_rows(*arguments, loss, None, target, *options)
    return loss.cpu(), target.cpu()


def in_two_steps(student, teacher, coefficient, labels, *options, dtype=None) -> tuple[Tensor, Tensor]:
    """The same by way of the statistics, into a gradient of its own."""
    student, teacher, coefficient, labels = (
        x if x is None else x.to(DEVICE) for x in (student, teacher, coefficient, labels)
    )
    loss = torch.empty(student.shape[0], dtype=torch.float64, device=DEVICE)
    stats = torch.empty(student.shape[0], STATS, dtype=torch.float64, device=DEVICE)
    gradient = torch.empty(student.shape, dtype=dtype or student.dtype, device=DEVICE)
    skip_unless_made_for(student, teacher, gradient)
    kernels.divergence_rows(student, teacher, coefficient, labels, loss, stats, None, *options)
    kernels.divergence_rows(student, teacher, coefficient, labels, None, stats, gradient, *options)
    return loss.cpu(), gradient.cpu()


def oracle(student, teacher, coefficient, labels, *options) -> tuple[Tensor, Tensor]:
    """The C++ kernel in float64."""
    gradient = student.double().contiguous().clone()
    teacher = None if teacher is None else teacher.double()
    loss = torch.empty(student.shape[0], dtype=torch.float64)
    torch.ops.fastkd.divergence_rows(gradient, teacher, coefficient, labels, loss, None, gradient, *options)
    return loss, gradient


def ones(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.float64)


def check(got, wanted, loss=1e-6, gradient=TOLERANCE[torch.float32]) -> None:
    assert torch.allclose(got[0], wanted[0], rtol=loss, atol=1e-300)
    assert distance(got[1], wanted[1]) <= gradient


# ---- values ----------------------------------------------------------------------------------------------------------


@over_divergences
@pytest.mark.parametrize("temperature, ce_weight", [(1.0, 0.0), (2.0, 0.7)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_dtype(divergence: str, dtype: torch.dtype, temperature: float, ce_weight: float):
    student, teacher = (3 * torch.randn(2, 523)).to(dtype), (3 * torch.randn(2, 523)).to(dtype)
    arguments = student, teacher, torch.tensor([1.0, -0.3]).double(), torch.tensor([522, 7])
    options = objective(divergence, temperature=temperature, kd_weight=1.3, ce_weight=ce_weight)
    got = fused(*arguments, *options)
    assert got[1].dtype == dtype
    check(got, oracle(*arguments, *options), 1e-13 if dtype == torch.float64 else 1e-6, TOLERANCE[dtype])


@over_divergences
@pytest.mark.parametrize("temperature, ce_weight", [(2.0, 0.0), (1.0, 0.7)])
def test_temperature_and_cross_entropy(divergence: str, temperature: float, ce_weight: float):
    student, teacher = 3 * torch.randn(2, 523), 3 * torch.randn(2, 523)
    options = objective(divergence, temperature=temperature, ce_weight=ce_weight)
    arguments = student, teacher, ones(2), torch.tensor([522, 7]), *options
    check(fused(*arguments), oracle(*arguments))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cross_entropy_alone(dtype: torch.dtype):
    arguments = (5 * torch.randn(2, 301)).to(dtype), None, ones(2), torch.tensor([300, 0])
    options = objective("forward_kl", kd_weight=0.0, ce_weight=1.0)
    check(fused(*arguments, *options), oracle(*arguments, *options), gradient=TOLERANCE[dtype])


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_confident_student(teacher: bool, temperature: float):
    """The cross-entropy is what little the other columns have."""
    student = torch.randn(2, 3000)
    student[0, 7] = student[1, 2900] = 25.0
    arguments = student, student + 0.1 if teacher else None, ones(2), torch.tensor([7, 2900])
    options = objective("forward_kl", temperature=temperature, kd_weight=float(teacher), ce_weight=1.0)
    check(fused(*arguments, *options), oracle(*arguments, *options))


@over_divergences
@pytest.mark.parametrize("columns", [1, 5, 2048, 4112, 8195])
def test_number_of_columns(divergence: str, columns: int):
    student, teacher = 3 * torch.randn(1, columns), 3 * torch.randn(1, columns)
    options = objective(divergence, ce_weight=0.5)
    arguments = student, teacher, ones(1), torch.tensor([columns - 1]), *options
    check(fused(*arguments), oracle(*arguments))


@over_divergences
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_maxima_that_move_in_every_block(divergence: str, temperature: float):
    teacher = torch.randn(2, 8195).sort(1).values * 3
    student = teacher.flip(1) + torch.randn(2, 8195)
    student[1] = teacher[1] + torch.randn(8195)
    student[1, :2100] = -INF  # nothing in the first block
    if divergence == "forward_kl":
        teacher[1, :2100] = -INF  # else the divergence is infinite
    options = objective(divergence, temperature=temperature, ce_weight=0.5)
    arguments = student, teacher, ones(2), torch.tensor([7000, 7000]), *options
    check(fused(*arguments), oracle(*arguments))


@over_divergences
@pytest.mark.parametrize("deviation, distance_", [(5, 1e-3), (5, 1e-1), (1, 0.5), (30, 1.0), (30, 3.0)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_accuracy(divergence: str, deviation: float, distance_: float, temperature: float):
    teacher = deviation * torch.randn(2, 2500)
    student = teacher + distance_ * torch.randn(2, 2500)
    arguments = student, teacher, ones(2), None, *objective(divergence, temperature=temperature)
    # the oracle's own loss is a small difference where the models agree
    check(fused(*arguments), oracle(*arguments), loss=1e-5 if distance_ == 1e-3 else 2e-6)


@over_divergences
def test_accuracy_in_fp64(divergence: str):
    """Near p = q, where the series of the elementary functions are all there is."""
    teacher = 5 * torch.randn(2, 1500, dtype=torch.float64)
    student = teacher + 1e-6 * torch.randn(2, 1500, dtype=torch.float64)
    arguments = student, teacher, ones(2), None, *objective(divergence, temperature=0.7)
    check(fused(*arguments), oracle(*arguments), loss=1e-3, gradient=1e-8)  # what 1e-6 leaves of 16 digits


@triton.jit
def _elementary_kernel(x, minus1, tail, log_1p, log_1p_positive, N: tl.constexpr):
    i = tl.arange(0, N)
    _, m, t = common.exp_nonpositive(tl.load(x + i))
    tl.store(log_1p_positive + i, common.log_1p(-tl.load(x + i)))
    tl.store(minus1 + i, m)
    tl.store(tail + i, t)
    tl.store(log_1p + i, common.log_1p(tl.load(x + i) / 128))


@over_triton_alone
def test_elementary_functions():
    """Relative errors, against torch's expm1 and log1p in fp64 and a Taylor series."""
    magnitudes = torch.logspace(-12, 2, 512, dtype=torch.float64)
    magnitudes[0], magnitudes[1] = 0, 1  # 1 is where the series end
    for dtype, bound in ((torch.float32, 3e-7 if DEVICE.type == "cpu" else 2e-6), (torch.float64, 1e-14)):
        x = (-magnitudes).to(dtype).to(DEVICE)
        minus1, tail, log_1p, log_1p_positive = torch.empty(4, 512, dtype=dtype, device=DEVICE)
        _elementary_kernel[(1,)](x, minus1, tail, log_1p, log_1p_positive, N=512)
        exact = x.double()
        series = sum(exact ** (k - 2) / math.factorial(k) for k in range(2, 16)) * exact**2
        wanted = {
            "minus1": (minus1, exact.expm1()),
            "tail": (tail, torch.where(exact > -0.5, series, exact.expm1() - exact)),
            "log_1p": (log_1p, (x / 128).double().log1p()),
            "log_1p_positive": (log_1p_positive, (-exact).log1p()),
        }
        for name, (got, true) in wanted.items():
            error = ((got.double() - true).abs() / true.abs().clamp_min(1e-30)).max().item()
            assert error <= bound, (name, dtype, error)


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_strides_and_mixed_dtypes(divergence: str):
    student = (3 * torch.randn(601, 2)).t()  # columns far apart
    teacher = (3 * torch.randn(2, 1202)).bfloat16()[:, ::2]
    arguments = student, teacher, ones(2), torch.tensor([600, 3]), *objective(divergence, ce_weight=0.5)
    assert student.stride(1) == 2 and teacher.stride(1) == 2
    wanted = oracle(*arguments)
    check(fused(*arguments), wanted)
    check(in_two_steps(*arguments), wanted)
    check(in_two_steps(*arguments, dtype=torch.float16), wanted, gradient=TOLERANCE[torch.float16])
    check(in_two_steps(*arguments, dtype=torch.float64), wanted)


@over_divergences
def test_one_step_and_two_give_the_same_bits(divergence: str):
    student, teacher = 3 * torch.randn(2, 523), 3 * torch.randn(2, 523)
    arguments = student, teacher, ones(2), torch.tensor([1, 2]), *objective(divergence, ce_weight=0.5)
    one_binary = DEVICE.type == "cpu" or kernels is CudaRows  # two binaries may fuse products and sums differently
    for one, two in zip(fused(*arguments), in_two_steps(*arguments), strict=True):
        assert torch.equal(one, two) if one_binary else distance(one, two) <= 1e-6


def test_only_the_row_is_written():
    """The columns around a slice, and the rows beside it, stay as they are."""
    whole = torch.randn(5, 40, device=DEVICE)
    before, teacher = whole.clone(), torch.randn(3, 21, device=DEVICE)
    loss = torch.empty(3, dtype=torch.float64, device=DEVICE)
    inside = whole[1:4, 7:28]
    kernels.divergence_rows(inside, teacher, ones(3).to(DEVICE), None, loss, None, inside, *objective("forward_kl"))
    assert not torch.equal(inside, before[1:4, 7:28])
    whole[1:4, 7:28] = before[1:4, 7:28]
    assert torch.equal(whole, before)


def test_no_rows():
    loss, gradient = fused(torch.empty(0, 9), torch.empty(0, 9), ones(0), None, *objective("jsd"))
    assert loss.shape == (0,) and gradient.shape == (0, 9)


# ---- rows that are masked, dropped or wrong --------------------------------------------------------------------------


@over_divergences
def test_masked_columns(divergence: str):
    student, teacher = 3 * torch.randn(1, 523), 3 * torch.randn(1, 523)
    masked = torch.rand(523) < 0.5
    student[:, masked] = teacher[:, masked] = -INF
    options = objective(divergence, temperature=2.0)
    loss, gradient = fused(student, teacher, ones(1), None, *options)
    assert (gradient[:, masked] == 0).all()
    wanted = oracle(student[:, ~masked], teacher[:, ~masked], ones(1), None, *options)
    check((loss, gradient[:, ~masked]), wanted)


@over_divergences
def test_columns_that_one_model_masks(divergence: str):
    """A student that gives nothing to what its teacher likes is infinitely far in one direction, not in the other."""
    student, teacher = torch.randn(2, 50), torch.randn(2, 50)
    student[0, 3] = -INF
    teacher[1, 5] = -INF
    arguments = student, teacher, ones(2), None, *objective(divergence)
    got, wanted = fused(*arguments), oracle(*arguments)
    assert got[0].isinf().tolist() == [divergence == "forward_kl", divergence == "reverse_kl"]
    finite = ~wanted[0].isinf()
    check((got[0][finite], got[1][finite]), (wanted[0][finite], wanted[1][finite]))


@over_divergences
def test_rows_without_a_distribution(divergence: str):
    student, teacher = torch.randn(3, 70), torch.randn(3, 70)
    student[0] = teacher[1] = -INF
    options = objective(divergence, temperature=2.0)
    loss, gradient = fused(student, teacher, ones(3), None, *options)
    assert (loss[:2] == 0).all() and (gradient[:2] == 0).all()
    wanted = oracle(student[2:], teacher[2:], ones(1), None, *options)
    check((loss[2:], gradient[2:]), wanted)

    options = objective(divergence, ce_weight=1.0)  # the cross-entropy of a row that has one goes on
    arguments = student[1:], teacher[1:], ones(2), torch.tensor([4, 5])
    check(fused(*arguments, *options), oracle(*arguments, *options))


@over_divergences
def test_coefficient_zero_is_not_read(divergence: str):
    student, teacher = torch.randn(3, 70), torch.randn(3, 70)
    student[0], teacher[1] = NAN, NAN
    labels = torch.tensor([-100, 2**40, 3])
    coefficient = torch.tensor([0.0, 0.0, 2.0]).double()
    arguments = student, teacher, coefficient, labels, *objective(divergence, ce_weight=0.5)
    for loss, gradient in (fused(*arguments), in_two_steps(*arguments)):
        assert (loss[:2] == 0).all() and (gradient[:2] == 0).all()
        check((loss, gradient), oracle(*arguments))


@pytest.mark.parametrize("label", [-1, -100, 70, 2**31 + 3, 2**62, -(2**62)])
def test_label_out_of_range(label: int):
    arguments = torch.randn(2, 70), torch.randn(2, 70), ones(2), torch.tensor([label, 3])
    options = objective("jsd", ce_weight=0.5)
    for loss, gradient in (fused(*arguments, *options), in_two_steps(*arguments, *options)):
        assert loss.isnan().tolist() == [True, False]
        assert gradient.isnan().any(1).tolist() == [True, False]


def test_a_label_in_another_shard_leaves_the_gradient_a_softmax():
    student = torch.randn(2, 301)
    arguments = student, None, ones(2), torch.tensor([ELSEWHERE, 300]), *objective("jsd", kd_weight=0.0, ce_weight=1.0)
    _, gradient = in_two_steps(*arguments)
    wanted = student.double().softmax(1)
    wanted[1, 300] -= 1
    assert distance(gradient, wanted) <= 1e-6


@over_divergences
def test_nan_stays_in_its_row(divergence: str):
    student, teacher = torch.randn(3, 70), torch.randn(3, 70)
    student[0, 3], teacher[1, 4] = NAN, NAN
    loss, gradient = fused(student, teacher, ones(3), None, *objective(divergence))
    assert loss.isnan().tolist() == [True, True, False]
    assert gradient.isnan().any(1).tolist() == [True, True, False]


def test_wrong_arguments():
    student, one = torch.randn(2, 5, device=DEVICE), ones(2).to(DEVICE)
    options = objective("jsd")
    for bad, message in [
        ((student, student[:, :4], one, None, one, None, student, *options), "teacher"),
        ((student, student, one.float(), None, one, None, student, *options), "coefficient"),
        ((student, student, one, None, one[:1], None, student, *options), "loss"),
        ((student, None, one, None, one, None, student, *options), "teacher"),
        ((student, student, one, None, one, None, student, *objective("jsd", ce_weight=1.0)), "labels"),
        ((student, student, one, None, one, None, student, 6, *options[1:]), "divergence"),
    ]:
        with pytest.raises(RuntimeError if kernels is CudaRows else ValueError, match=message):
            kernels.divergence_rows(*bad)


# ---- how CUDA C++ shares a row out -----------------------------------------------------------------------------------


@over_cuda_alone
@over_divergences
@pytest.mark.parametrize("columns", [3, 203, 3001])
@pytest.mark.parametrize("blocks", [0, 1, 2, 4])
def test_every_way_to_share_a_row(blocks: int, columns: int, divergence: str):
    """Not kept at all, kept by one block, by the blocks of a cluster, some of which may have no columns."""
    if DEVICE.type == "cuda" and blocks > 1 and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("this GPU has no clusters")
    teacher = 5 * torch.randn(3, columns)
    student = teacher + torch.tensor([[1e-3], [0.3], [5.0]]) * torch.randn(3, columns)
    options = objective(divergence, temperature=2.0, ce_weight=0.5)
    arguments = student, teacher, torch.tensor([0.7, 0.0, -2.0]).double(), torch.tensor([columns - 1, 0, 1]), *options
    with gpu_rows("cuda", blocks):
        got, again = fused(*arguments), in_two_steps(*arguments)
    check(got, oracle(*arguments), loss=2e-6)
    assert torch.equal(got[0], again[0]) and torch.equal(got[1], again[1])


@over_cuda_alone
@pytest.mark.parametrize("shift", [(1, 0), (0, 3), (5, 5), (7, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", [-1, 0, 2])
def test_rows_off_the_grid_of_16_bytes(blocks: int, dtype: torch.dtype, shift: tuple[int, int]):
    """Odd widths, starts and strides, not the same for both models."""
    if DEVICE.type == "cuda" and blocks > 1 and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("this GPU has no clusters")
    student, teacher = ((3 * torch.randn(3, 1061)).to(dtype)[:, n : n + 1037] for n in shift)
    arguments = student, teacher, ones(3), torch.tensor([1036, 0, 5]), *objective("forward_kl", ce_weight=0.5)
    with gpu_rows("cuda", blocks):
        check(fused(*arguments), oracle(*arguments), gradient=TOLERANCE[dtype])
        target = torch.float16 if dtype == torch.float32 else dtype
        check(in_two_steps(*arguments, dtype=target), oracle(*arguments), gradient=TOLERANCE[target])


@over_cuda_alone
@pytest.mark.skipif(DEVICE.type == "cuda", reason="for the devices of other people")
@pytest.mark.parametrize("major, kilobytes", [(8, 99), (8, 163), (9, 227)])
@pytest.mark.parametrize("columns", [900, 5000, 22000])
def test_devices(major: int, kilobytes: int, columns: int):
    """Small rows are kept by a block, wide ones by a cluster or, where there is none, by nobody."""
    student, teacher = 3 * torch.randn(2, columns), 3 * torch.randn(2, columns)
    arguments = student, teacher, ones(2), torch.tensor([7, columns - 1]), *objective("jsd", ce_weight=0.5)
    library = emulated.load()
    library.fastkd_emulate(major, kilobytes * 1024)
    try:
        got = fused(*arguments)
    finally:
        library.fastkd_emulate(9, 227 * 1024)
    check(got, oracle(*arguments))


# ---- behind the public functions -------------------------------------------------------------------------------------


@over_cuda_alone
@over_divergences
@pytest.mark.parametrize("op", [LOGIT_KL, LINEAR_KL], ids=lambda op: op.name)
@pytest.mark.parametrize("regime", REGIMES[1:], ids=lambda regime: regime.name)
def test_public_functions_on_cuda_rows(op, regime, divergence: str):
    inputs = to(op.make(regime, tokens=4), torch.float32)
    loss, gradients = op_oracle(op, inputs, divergence=divergence)
    plain_loss, plain = value_and_gradients(op, inputs, impl="reference", divergence=divergence)
    with running_on("triton") as (impl, device), gpu_rows("cuda"):
        got, found = value_and_gradients(op, to(inputs, torch.float32, device), impl=impl, divergence=divergence)
    assert distance(got, loss) <= max(1e-6 + 1e-8 / loss.item(), 2 * distance(plain_loss, loss))
    for name, gradient in found.items():
        assert distance(gradient, gradients[name]) <= max(1e-5, 2 * distance(plain[name], gradients[name])), name


@over_cuda_alone
def test_what_cuda_rows_leave_to_triton():
    x = torch.randn(2, 8)
    assert CudaRows.takes(x, x) and CudaRows.takes(x, None) and CudaRows.takes(x[:, 1:], x[:, :7])
    assert not CudaRows.takes(x.double(), x.double())
    assert not CudaRows.takes(x, x.bfloat16())
    assert not CudaRows.takes(x.t(), x.t())
    assert not CudaRows.takes(x, x, x.t().contiguous().t())
    assert CudaRows.takes(x, x, x.half()) and CudaRows.takes(x.half(), None, x.half())
    assert not CudaRows.takes(x, x, x.double())
    assert not CudaRows.takes(x.bfloat16(), x.bfloat16(), x) and not CudaRows.takes(x.half(), None, x.bfloat16())


@pytest.mark.long
@over_triton_alone
@over_divergences
def test_gradcheck(divergence: str):
    teacher = torch.randn(2, 3, dtype=torch.float64)
    student = torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    head, teacher_head = torch.randn(7, 3).double().requires_grad_(), torch.randn(7, 3).double()
    labels = torch.tensor([2, 0])
    options = {"divergence": divergence, "beta": 0.3, "temperature": 1.7, "labels": labels, "ce_weight": 0.4}
    with running_on("triton") as (impl, device):
        options.update(impl=impl, labels=labels.to(device))
        student, head = (x.detach().to(device).requires_grad_() for x in (student, head))
        teacher, teacher_head = teacher.to(device), teacher_head.to(device)

        def check(function, *inputs):
            assert torch.autograd.gradcheck(function, inputs, fast_mode=True)

        check(lambda s: fastkd.logit_kl(s, teacher, reduction="none", **options), student)
        check(lambda s, w: fastkd.linear_kl(s, w, teacher, teacher_head, **options), student, head)
