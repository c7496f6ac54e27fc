"""How cka_loss is launched."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import for_products
from ..tuning import launch, together
from .forward import covariance_kernel, loss_kernel, means_kernel
from .gradient import gradient_kernel
from .tiles import FEW_BLOCKS, GROUP, NORMS

__all__ = ["cka_loss", "cka_loss_backward_"]

T = TypeVar("T")

MEAN_TILE = {"BLOCK_N": 128, "BLOCK_D": 32}
LOSS_BLOCK = 2048
# Pairs that one launch takes: the hidden states of encoder and decoder, say.
ENTRIES = 16


@dataclass(frozen=True)
class _Setting:
    """What all kernels of a launch have in common."""

    dtype: torch.dtype  # of operands
    exact: torch.dtype  # of sums and factors: fp64 or fp32
    masked: bool

    def launch(self, kernel: str, case: tuple, run: Callable[[dict], T]) -> T:
        return launch(kernel, self.dtype.itemsize, 0, (self, case), run)

    @property
    def kind(self) -> tl.dtype:
        return tl.float64 if self.exact == torch.float64 else tl.float32


def _setting(student: Tensor, teacher: Tensor, mask: Tensor | None) -> _Setting:
    exact = torch.float64 if student.dtype == torch.float64 else torch.float32
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    return _Setting(dtype if dtype.itemsize < exact.itemsize else exact, exact, mask is not None)


def _matrices(xs: list[Tensor], setting: _Setting) -> tuple:
    """(matrix, row stride, width) of each: where models have different dtypes, in the wider one."""
    xs = [x.to(setting.dtype) for x in xs]
    xs = [x if x.stride(1) == 1 else x.contiguous() for x in xs]
    return tuple((x, x.stride(0), x.shape[1]) for x in xs)


def _masks(masks: list[Tensor | None], student: Tensor) -> tuple | None:
    return None if masks[0] is None else tuple(for_products(x, student).contiguous() for x in masks if x is not None)


def _programs_of_upper_half(blocks: int) -> int:
    """As many as upper_tile numbers."""
    columns = GROUP.value if blocks > FEW_BLOCKS.value else 1
    bands = triton.cdiv(blocks, columns)
    return columns**2 * bands * (bands + 1) // 2


def _launch_forward(
    setting: _Setting,
    student: list[Tensor],
    teacher: list[Tensor],
    mask: list[Tensor | None],
    mean: list[Tensor],
    factor: list[Tensor] | None,
    eps: float,
    squared: bool,
) -> Tensor:
    """The losses of the pairs of a launch; fills means and factors."""
    tokens, widths = (
        tuple(x.shape[0] for x in student),
        tuple((x.shape[1], t.shape[1]) for x, t in zip(student, teacher, strict=True)),
    )
    common = _matrices(student, setting), _matrices(teacher, setting), _masks(mask, student[0]), tuple(mean), tokens
    counts = mean[0].new_empty(len(student), dtype=torch.float64)
    columns = max(sum(triton.cdiv(width, MEAN_TILE["BLOCK_D"]) for width in pair) for pair in widths)
    means_kernel[(columns, len(student))](
        *common, counts, **MEAN_TILE, F=setting.kind, num_warps=8, enable_fp_fusion=True
    )

    factors = None if factor is None else tuple(factor)

    def run(options: dict) -> Tensor:
        """[pairs, NORMS, programs]"""
        programs = [_programs_of_upper_half(sum(triton.cdiv(n, options["BLOCK"]) for n in pair)) for pair in widths]
        sums = counts.new_zeros(len(student), NORMS.value, max(1, *programs))
        covariance_kernel[(sums.shape[2], len(student))](*common, factors, sums, F=setting.kind, **options)
        return sums

    case = tokens, widths, factor is None
    sums = setting.launch("covariance", case, run)
    programs = sums.shape[2]
    sizes = tuple(0 if factor is None else factor[n].numel() for n in range(len(student)))
    teacher_sizes = tuple(ours * theirs for ours, theirs in widths)
    losses = torch.empty_like(counts)
    loss_kernel[(max(1, triton.cdiv(max(sizes), LOSS_BLOCK)), len(student))](
        factors,
        sizes,
        teacher_sizes,
        sums,
        programs,
        counts,
        losses,
        eps,
        SQUARED=squared,
        BLOCK=LOSS_BLOCK,
        enable_fp_fusion=True,
    )
    return losses


def _lifts(factor: list[Tensor]) -> Tensor:
    """Powers of two that bring factors into the range of fp16: the larger the more tokens, the smaller they are."""
    _, exponent = torch.frexp(torch.stack(torch._foreach_norm(factor, float("inf"))))
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), (12 - exponent).clamp(-100, 100))


def _launch_backward(
    setting: _Setting,
    student: list[Tensor],
    teacher: list[Tensor],
    mask: list[Tensor | None],
    mean: list[Tensor],
    factor: list[Tensor],
    gradients: list[Tensor],
    scales: Tensor,
) -> None:
    """Fills the gradients of the pairs of a launch."""

    def run(options: dict) -> None:
        rows, columns = options["BLOCK_M"], options["BLOCK_N"]
        programs = max(triton.cdiv(x.shape[0], rows) * triton.cdiv(x.shape[1], columns) for x in student)
        gradient_kernel[(programs, len(student))](
            *matrices,
            _masks(mask, student[0]),
            tuple(mean),
            tuple(x.shape[0] for x in student),
            tuple(factor),
            tuple(gradients),
            scales,
            lifts,
            F=setting.kind,
            **options,
        )

    matrices = _matrices(student, setting), _matrices(teacher, setting)
    lifts = _lifts(factor) if setting.dtype == torch.float16 else None
    case = tuple((*x.shape, t.shape[1]) for x, t in zip(student, teacher, strict=True))
    setting.launch("cka_gradient", case, run)


def cka_loss(
    student: list[Tensor],  # [N, Ds] each
    teacher: list[Tensor],  # [N, Dt] each
    mask: list[Tensor | None],  # [N] bool each
    mean: list[Tensor],  # [Dt + Ds] float64 each, of (B|A), to be written
    factor: list[Tensor],  # [Dt + Ds, Ds] each, likewise; empty where it is not wanted
    eps: float,
    squared: bool,
) -> list[Tensor]:
    """The losses, 0-d float64."""
    settings = [
        (_setting(x, t, valid), wanted.numel() > 0)
        for x, t, valid, wanted in zip(student, teacher, mask, factor, strict=True)
    ]
    losses: dict[int, Tensor] = {}
    with torch.cuda.device_of(student[0]):
        for members in together(settings, ENTRIES):
            setting, wanted = settings[members[0]]
            lists = [[xs[n] for n in members] for xs in (student, teacher, mask, mean, factor)]
            found = _launch_forward(setting, *lists[:4], lists[4] if wanted else None, eps, squared)
            losses.update(zip(members, found.unbind(), strict=True))
    return [losses[n] for n in range(len(student))]


def cka_loss_backward_(
    student: list[Tensor],  # [N, Ds] each
    teacher: list[Tensor],  # [N, Dt] each
    mask: list[Tensor | None],  # [N] bool each
    mean: list[Tensor],  # [Dt + Ds] each
    factor: list[Tensor],  # [Dt + Ds, Ds] each
    grad_loss: list[Tensor],  # 0-d float64
    results: list[Tensor],  # [N, Ds] each
) -> None:
    """Writes the gradients of the students."""
    settings = [(_setting(*pair),) for pair in zip(student, teacher, mask, strict=True)]
    with torch.cuda.device_of(student[0]):
        for members in together(settings, ENTRIES):
            lists = [[xs[n] for n in members] for xs in (student, teacher, mask, mean, factor, results)]
            _launch_backward(settings[members[0]][0], *lists, torch.stack([grad_loss[n] for n in members]))
