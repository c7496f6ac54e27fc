"""The divergence mathematics in Triton: what csrc/divergence.h, whose comments derive it, is in C++.

Functions have the names and order of that file. All of them work on tiles of any shape, in fp32 or fp64.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton's interpreter would multiply the bits of bf16 operands.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# The order is that of fastkd.divergence.DIVERGENCES. Those from JSD on have no closed form and can saturate.
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)
SKEW_KL = tl.constexpr(3)
SKEW_REVERSE_KL = tl.constexpr(4)
TVD = tl.constexpr(5)
# Codes from here on are those of mixes, weighted sums of the above: a bit for each member.
MIX = tl.constexpr(64)


# ---- elementary functions --------------------------------------------------------------------------------------------
# Written out, for Triton's own exist on some targets only. fp64 takes Taylor series: 17 terms reach 2e-17.


@triton.jit
def exp_nonpositive(x):
    """For x <= 0: e^x, e^x - 1 accurate near 0, and e^x - 1 - x accurate near 0."""
    if x.dtype == tl.float64:
        value = tl.exp(x)
        poly = x * 0 + 1
        for k in tl.static_range(19, 2, -1):
            poly = 1 + x * poly / k
        poly = 0.5 * poly
    else:  # relative error 2e-8 on [-1, 0]
        value = tl.exp2(x * LOG2E)  # as tl.exp, but flushes subnormal results, which saves the GPU three
        poly = 1.3742419e-4 * x + 1.32481796e-3
        poly = poly * x + 8.30117045e-3
        poly = poly * x + 4.16592554e-2
        poly = poly * x + 1.66666037e-1
        poly = poly * x + 4.99999991e-1
    near = x > -1
    tail = x * x * poly
    minus1 = tl.where(near, x + tail, value - 1)
    return value, minus1, tl.where(near, tail, minus1 - x)


@triton.jit
def log_1p(x):
    """log(1 + x) for x > -1, by 2 artanh(x / (2 + x)) near 0."""
    f = x / (2 + x)
    z = f * f
    if x.dtype == tl.float64:
        poly = z * 0
        for k in tl.static_range(35, 1, -2):
            poly = poly * z + 2.0 / k
    else:  # relative error 2e-8 on [-1/2, 1]
        poly = 2.6851498e-1 * z + 2.82366198e-1
        poly = poly * z + 4.00075606e-1
        poly = poly * z + 6.66666403e-1
    near = (x > -0.5) & (x < 1)
    return tl.where(near, 2 * f + f * z * poly, tl.log(1 + x))


@triton.jit
def rounded_to(x, DTYPE: tl.constexpr):
    """x in a dtype, rounded to the nearest. Triton's interpreter would cut bf16 off."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + (bits >> 16) % 2) // 0x10000 * 0x10000
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def double(x):
    """A number given by the host, in fp64."""
    return tl.full((), x, tl.float64)


def working_dtype(dtype: torch.dtype) -> tl.dtype:
    """What kernels compute in for scores or states of a dtype."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def write_row(to, index, numbers):
    """to[index] = numbers, where that is wanted."""
    if to is not None:
        for i in tl.static_range(len(numbers)):
            tl.store(to + index * len(numbers) + i, numbers[i])


# ---- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def choose(index, choices):
    """choices[index], for an index known when the kernel runs. Alignment common to all choices stays known."""
    chosen = choices[0]
    for n in tl.static_range(1, len(choices)):
        chosen = tl.where(index == n, choices[n], chosen)
    return chosen


@triton.jit
def choose_matrix(index, matrices):
    """matrices[index], each of three: a pointer and two numbers."""
    return [choose(index, [matrix[n] for matrix in matrices]) for n in (0, 1, 2)]


@triton.jit
def load_valid(mask, position, count):
    """Which keys, or tokens, exist and are not masked."""
    valid = position < count
    if mask is not None:
        valid &= tl.load(mask + position, mask=valid, other=0) != 0
    return valid


def for_products(x: Tensor, student: Tensor) -> Tensor:
    """A mask, a teacher's matrix or a bias as kernels take it: beside fp64 students in 32 bits at least.

    Triton lays operands out by the narrowest load that they depend on, and compiles no fp64 product of 8 or 16 bits.
    """
    if student.dtype != torch.float64 or x.dtype.itemsize >= 4:
        return x
    return x.to(torch.int32 if x.dtype == torch.bool else torch.float32)


@triton.jit
def dot(x, y, F: tl.constexpr):
    """x y in the working precision: 16-bit operands as they are, whose products are exact, and others in full."""
    if x.dtype == tl.float64 or y.dtype == tl.float64 or tl.float64 == F or INTERPRETED:
        x, y = x.to(F), y.to(F)
    return tl.dot(x, y, input_precision="ieee", out_dtype=F)


# ---- one row ---------------------------------------------------------------------------------------------------------


def beta_arguments(beta: float | Sequence[float]) -> dict:
    """`beta` and `weights` as kernels take them: weights are None, or of a mix three numbers for each divergence.

    Triton takes a float in a tuple for an fp32. Their sum is the weight in fp64.
    """
    if isinstance(beta, (int, float)):
        return {"beta": float(beta), "weights": None}
    parts = []
    for weight in beta[1:]:
        for _ in range(3):
            parts.append(ctypes.c_float(weight).value)
            weight -= parts[-1]
    return {"beta": float(beta[0]), "weights": tuple(parts)}


@triton.jit
def member_weight(weights, MEMBER: tl.constexpr):
    """A member's weight in a mix, in fp64."""
    return double(weights[3 * MEMBER]) + double(weights[3 * MEMBER + 1]) + double(weights[3 * MEMBER + 2])


class Beta(NamedTuple):
    """What mixtures need of beta, and the weights of a mix's members, of which any other divergence has none."""

    beta: tl.tensor
    rest: tl.tensor  # 1 - beta
    log_beta: tl.tensor
    log_rest: tl.tensor
    weights: tuple[tl.tensor, ...]


@triton.jit
def beta_constants(beta, weights, F: tl.constexpr):
    beta, of_members = double(beta), ()
    if weights is not None:
        of_members = [member_weight(weights, member).to(F) for member in (0, 1, 2, 3, 4, 5)]
    return Beta(beta.to(F), (1 - beta).to(F), tl.log(beta).to(F), tl.log(1 - beta).to(F), of_members)


# ---- one column ------------------------------------------------------------------------------------------------------


# The maximum of scores that are all masked, and so worked on as -1e30: e^(their difference) is 0.
NOTHING = tl.constexpr(-1e29)


@triton.jit
def unmasked(score):
    """-inf, a masked column, as a very low number: differences stay finite and zero probabilities make zero products.

    Columns past the end of a row are read as -inf of both models and add nothing to any sum.
    """
    return tl.where(score < -1e30, -1e30, score)  # NaN passes


@triton.jit
def with_infinity(divergence):
    return tl.where(divergence > 1e20, float("inf"), divergence)


class Pair(NamedTuple):
    """Both probabilities, and how they differ, to full relative accuracy."""

    p: tl.tensor  # the teacher's
    q: tl.tensor  # the student's
    difference: tl.tensor  # q - p
    log_ratio: tl.tensor  # log(p / q)
    ratio: tl.tensor  # the smaller over the larger
    ratio_minus1: tl.tensor
    teacher_larger: tl.tensor  # whether p is the larger


@triton.jit
def pair_of(larger, log_ratio):
    """Of the larger probability and log(p / q)."""
    teacher_larger = log_ratio >= 0
    ratio, ratio_minus1, _ = exp_nonpositive(-tl.abs(log_ratio))
    smaller = larger * ratio
    gap = larger * ratio_minus1
    p = tl.where(teacher_larger, larger, smaller)
    q = tl.where(teacher_larger, smaller, larger)
    difference = tl.where(teacher_larger, gap, -gap)
    return Pair(p, q, difference, log_ratio, ratio, ratio_minus1, teacher_larger)


@triton.jit
def excess_of(p, q, log_ratio):
    """p log(p / q) + q - p: never negative, and without cancellation near p = q."""
    x = -tl.abs(log_ratio)
    ratio, ratio_minus1, ratio_tail = exp_nonpositive(x)
    of_smaller = tl.where(x > -1, x * ratio_minus1 - ratio_tail, x * ratio - ratio_minus1)  # x e^x + 1 - e^x
    return tl.where(log_ratio >= 0, p * ratio_tail, q * of_smaller)


# ---- the family ------------------------------------------------------------------------------------------------------


@triton.jit
def _share(numerator, denominator):
    return tl.where(denominator > 0, numerator / tl.where(denominator > 0, denominator, 1), 0)


@triton.jit
def _mixture(pair, b, DIVERGENCE: tl.constexpr):
    """m = a p + rest q: (m, log(p / m), log(q / m), log(m / (rest q))). beta is a, but of skew_reverse_kl the rest."""
    SWAPPED: tl.constexpr = DIVERGENCE == SKEW_REVERSE_KL
    a, rest, log_rest = (b.rest, b.beta, b.log_beta) if SWAPPED else (b.beta, b.rest, b.log_rest)
    log_m_over_larger = log_1p(tl.where(pair.teacher_larger, rest, a) * pair.ratio_minus1)
    log_p_over_m = tl.where(pair.teacher_larger, 0, pair.log_ratio) - log_m_over_larger
    log_q_over_m = tl.where(pair.teacher_larger, -pair.log_ratio, 0) - log_m_over_larger
    log_m_over_limit = tl.where(pair.teacher_larger, -log_q_over_m - log_rest, log_1p(a / rest * pair.ratio))
    return a * pair.p + rest * pair.q, log_p_over_m, log_q_over_m, log_m_over_limit


@triton.constexpr_function
def mixes(divergence, member):
    """Whether a divergence is a mix with such a member."""
    return divergence >= MIX.value and divergence >> member & 1 == 1


# A mix is the sum over its members. Two of them differ: forward KL's part of the gradient, q - p of mean 0, stays apart
# from the slopes; and log(q / p) of reverse KL, which tends to no limit, is in both.


@triton.jit
def value_of(pair, b, DIVERGENCE: tl.constexpr):
    """A column's share of D, with the differences that sum to zero over a row and make it positive (m - p, m - q)."""
    p, q = pair.p, pair.q
    if DIVERGENCE >= MIX:
        value = tl.zeros_like(p)
        for member in tl.static_range(6):
            if mixes(DIVERGENCE, member):
                value += b.weights[member] * value_of(pair, b, member)
    elif DIVERGENCE == FORWARD_KL:
        value = excess_of(p, q, pair.log_ratio)
    elif DIVERGENCE == REVERSE_KL:
        value = excess_of(q, p, -pair.log_ratio)
    elif DIVERGENCE == TVD:
        value = 0.5 * tl.abs(pair.difference)
    else:
        m, log_p_over_m, log_q_over_m, _ = _mixture(pair, b, DIVERGENCE)
        if DIVERGENCE == JSD:
            value = b.beta * excess_of(p, m, log_p_over_m) + b.rest * excess_of(q, m, log_q_over_m)
        elif DIVERGENCE == SKEW_KL:
            value = excess_of(p, m, log_p_over_m)
        else:
            value = excess_of(q, m, log_q_over_m)
    return value


@triton.jit
def slope_of(pair, b, DIVERGENCE: tl.constexpr):
    """q u, with u = 0 where p = q"""
    q, difference = pair.q, pair.difference
    if DIVERGENCE >= MIX:
        slope = tl.zeros_like(q)
        for member in tl.static_range(1, 6):
            if mixes(DIVERGENCE, member):
                slope += b.weights[member] * slope_of(pair, b, member)
    elif DIVERGENCE == REVERSE_KL:
        slope = -q * pair.log_ratio
    elif DIVERGENCE == TVD:
        slope = tl.where(difference > 0, 0.5 * q, tl.where(difference < 0, -0.5 * q, difference))  # 0 or NaN
    else:
        m, _, log_q_over_m, _ = _mixture(pair, b, DIVERGENCE)
        if DIVERGENCE == JSD:
            slope = b.rest * q * log_q_over_m
        elif DIVERGENCE == SKEW_KL:
            slope = b.rest * b.rest * difference * _share(q, m)
        else:
            slope = q * log_q_over_m - b.beta * b.rest * difference * _share(q, m)
    return slope


@triton.jit
def coslope_of(pair, b, DIVERGENCE: tl.constexpr):
    """q v, v = (limit of u) - u, with v = 0 where p << q"""
    p, q, difference = pair.p, pair.q, pair.difference
    if DIVERGENCE >= MIX:
        coslope = tl.zeros_like(q)
        for member in tl.static_range(1, 6):
            if mixes(DIVERGENCE, member):
                coslope += b.weights[member] * coslope_of(pair, b, member)
    elif DIVERGENCE == REVERSE_KL:
        coslope = q * pair.log_ratio
    elif DIVERGENCE == TVD:
        coslope = tl.where(difference > 0, 0, tl.where(difference < 0, q, 0.5 * q + difference))
    else:
        m, _, _, log_m_over_limit = _mixture(pair, b, DIVERGENCE)
        if DIVERGENCE == JSD:
            coslope = b.rest * q * log_m_over_limit
        elif DIVERGENCE == SKEW_KL:
            coslope = b.rest * p * _share(q, m)
        else:
            coslope = q * log_m_over_limit - b.rest * p * _share(q, m)
    return coslope
