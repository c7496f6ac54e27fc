"""One column of a pair of rows: probabilities, how they differ, and the gradient, from statistics of the row."""

import triton
import triton.language as tl

from ..common import (
    FORWARD_KL,
    LOG2E,
    MIX,
    REVERSE_KL,
    coslope_of,
    double,
    member_weight,
    pair_of,
    slope_of,
    unmasked,
)

LOWEST = tl.constexpr(float("-inf"))
# The maximum of scores that are all masked, and so worked on as -1e30: e^(their difference) is 0.
NOTHING = tl.constexpr(-1e29)
# Divergence, in nats, under which a row is computed with care: csrc/cpu/row_kernel.h says why.
NEARLY_EQUAL = tl.constexpr(0.1)
# Divergence over which the mean of log(q / p) is refined: one so large is summed up with its own last digit's error.
FAR_APART = tl.constexpr(16.0)
# The label of a row that is a shard of a longer one, in another shard of which the label lies.
ELSEWHERE = tl.constexpr(-(2**63))


@triton.jit
def _split(x, F: tl.constexpr):
    """An fp64 number carried as two of the working type, so that s - t + shift is exact where it matters."""
    high = x.to(F)
    return high, (x - high.to(tl.float64)).to(F)


# ---- one row ---------------------------------------------------------------------------------------------------------
# The statistics of a row are (max_s, sum_s, max_t, sum_t, mean, careful, sum_1), all fp64; RowStats in divergence.h
# explains them. The maximum of a row of nothing but -inf is 0 here.


@triton.jit
def mean_unit(weights, DIVERGENCE: tl.constexpr):
    """What log(q / p) is multiplied with in u, where the mean of u is subtracted inside it."""
    unit = double(1.0)
    if DIVERGENCE >= MIX and DIVERGENCE // 2 % 2 == 1:
        unit = member_weight(weights, REVERSE_KL)
    return unit


@triton.jit
def row_constants(stats, tau, unit, F: tl.constexpr):
    """The same in the working precision, ready for the inner loop."""
    max_s, sum_s, max_t, sum_t, mean, _, _ = stats
    # log(Z_t) - log(Z_s) in units of score: t - s less this is tau log(p / q)
    shift = (max_t - max_s) - tau * tl.log(sum_s / sum_t)
    shift_high, shift_low = _split(shift, F)
    centred_high, centred_low = _split(shift - tau * mean / unit, F)  # for u = -log(p / q) less its mean
    return (
        max_s.to(F),
        (1 / sum_s).to(F),
        max_t.to(F),
        (1 / sum_t).to(F),
        (1 / tau).to(F),
        (1 / tau * LOG2E).to(F),
        shift_high,
        shift_low,
        centred_high,
        centred_low,
        mean.to(F),
    )


@triton.jit
def running_constants(max_s, max_t, inv_tau, F: tl.constexpr):
    """The same while the sums are not known yet: with sums of 1, probabilities are the plain exponentials."""
    one = tl.full((), 1, F)
    high, low = _split(max_t - max_s, F)
    return max_s.to(F), one, max_t.to(F), one, inv_tau.to(F), (inv_tau * LOG2E).to(F), high, low, high, low, one


# ---- one column ------------------------------------------------------------------------------------------------------


@triton.jit
def shifted_ratio(s, t, shift_high, shift_low, inv_tau):
    """(t - s - shift) / tau, with what rounding takes from t - s (Knuth's two-sum) put back."""
    d = t - s
    back = d - t
    lost = (t - (d - back)) - (s + back)
    return ((d - shift_high) + (lost - shift_low)) * inv_tau


@triton.jit
def column_pair(s, t, row):
    """What `pair_of` says of a column's scores."""
    max_s, inv_sum_s, max_t, inv_sum_t, inv_tau, scale, shift_high, shift_low, _, _, _ = row
    log_ratio = shifted_ratio(s, t, shift_high, shift_low, inv_tau)
    teacher_larger = log_ratio >= 0
    top = tl.where(teacher_larger, t - max_t, s - max_s)
    return pair_of(tl.exp2(top * scale) * tl.where(teacher_larger, inv_sum_t, inv_sum_s), log_ratio)


@triton.jit
def column_gradient(s, t, b, row, DIVERGENCE: tl.constexpr, CAREFUL: tl.constexpr):
    """q (u - mean): tau times the gradient of D in s. `b` are D's constants."""
    max_s, inv_sum_s, max_t, inv_sum_t, inv_tau, scale, _, _, centred_high, centred_low, mean = row
    if DIVERGENCE == FORWARD_KL and not CAREFUL:
        q = tl.exp2((s - max_s) * scale) * inv_sum_s
        gradient = q - tl.exp2((t - max_t) * scale) * inv_sum_t
    else:
        s, t = unmasked(s), unmasked(t)
        if DIVERGENCE == REVERSE_KL:
            q = tl.exp2((s - max_s) * scale) * inv_sum_s
            gradient = -q * shifted_ratio(s, t, centred_high, centred_low, inv_tau)
        else:
            pair = column_pair(s, t, row)
            if DIVERGENCE == FORWARD_KL:
                gradient = pair.difference
            else:
                BOUNDED: tl.constexpr = DIVERGENCE // 4 * 4 if DIVERGENCE >= MIX else DIVERGENCE
                gradient = -coslope_of(pair, b, BOUNDED) if CAREFUL else slope_of(pair, b, BOUNDED)
                if DIVERGENCE >= MIX and DIVERGENCE % 2 == 1:
                    gradient += b.weights[0] * pair.difference
                if DIVERGENCE >= MIX and DIVERGENCE // 2 % 2 == 1:
                    gradient -= b.weights[1] * pair.q * shifted_ratio(s, t, centred_high, centred_low, inv_tau)
                else:
                    gradient -= pair.q * mean
    return gradient
