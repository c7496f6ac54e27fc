"""One column of a pair of rows: probabilities, how they differ, and the gradient, from statistics of the row."""

from collections import namedtuple

import triton
import triton.language as tl

from ..common import FORWARD_KL, LOG2E, MIX, REVERSE_KL, coslope_of, mixes, pair_of, slope_of, unmasked

# ---- one row ---------------------------------------------------------------------------------------------------------


# All in fp64. RowStats in divergence.h explains them; the maximum of a row of nothing but -inf is 0 here.
RowStats = namedtuple("RowStats", "max_s sum_s max_t sum_t mean careful sum_1")
# The same in the working precision, ready for the inner loop. `scale` is log2(e) / tau, and `shift` log(Z_t) - log(Z_s)
# in units of score: t - s less this is tau log(p / q), and less `centred` -tau u, for u = -log(p / q) less its mean.
RowConstants = namedtuple("RowConstants", "max_s inv_sum_s max_t inv_sum_t inv_tau scale shift centred mean")


@triton.jit
def _split(x, F: tl.constexpr):
    """An fp64 number carried as two of the working type, so that s - t + shift is exact where it matters."""
    high = x.to(F)
    return high, (x - high.to(tl.float64)).to(F)


@triton.jit
def row_constants(stats, tau, F: tl.constexpr, unit=1.0):
    """`unit` is what log(q / p) is multiplied with in u, where the mean of u is subtracted inside it."""
    shift = (stats.max_t - stats.max_s) - tau * tl.log(stats.sum_s / stats.sum_t)
    return RowConstants(
        stats.max_s.to(F),
        (1 / stats.sum_s).to(F),
        stats.max_t.to(F),
        (1 / stats.sum_t).to(F),
        (1 / tau).to(F),
        (1 / tau * LOG2E).to(F),
        _split(shift, F),
        _split(shift - tau * stats.mean / unit, F),
        stats.mean.to(F),
    )


# ---- one column ------------------------------------------------------------------------------------------------------


@triton.jit
def shifted_ratio(s, t, shift, inv_tau):
    """(t - s - shift) / tau, with what rounding takes from t - s (Knuth's two-sum) put back."""
    d = t - s
    back = d - t
    lost = (t - (d - back)) - (s + back)
    return ((d - shift[0]) + (lost - shift[1])) * inv_tau


@triton.jit
def column_pair(s, t, row):
    """What `pair_of` says of a column's scores."""
    log_ratio = shifted_ratio(s, t, row.shift, row.inv_tau)
    teacher_larger = log_ratio >= 0
    top = tl.where(teacher_larger, t - row.max_t, s - row.max_s)
    return pair_of(tl.exp2(top * row.scale) * tl.where(teacher_larger, row.inv_sum_t, row.inv_sum_s), log_ratio)


@triton.jit
def column_gradient(s, t, b, row, DIVERGENCE: tl.constexpr, CAREFUL: tl.constexpr):
    """q (u - mean): tau times the gradient of D in s. `b` are D's constants."""
    if DIVERGENCE == FORWARD_KL and not CAREFUL:
        q = tl.exp2((s - row.max_s) * row.scale) * row.inv_sum_s
        gradient = q - tl.exp2((t - row.max_t) * row.scale) * row.inv_sum_t
    else:
        s, t = unmasked(s), unmasked(t)
        if DIVERGENCE == REVERSE_KL:
            q = tl.exp2((s - row.max_s) * row.scale) * row.inv_sum_s
            gradient = -q * shifted_ratio(s, t, row.centred, row.inv_tau)
        else:
            pair = column_pair(s, t, row)
            if DIVERGENCE == FORWARD_KL:
                gradient = pair.difference
            else:
                BOUNDED: tl.constexpr = DIVERGENCE // 4 * 4 if DIVERGENCE >= MIX else DIVERGENCE
                gradient = -coslope_of(pair, b, BOUNDED) if CAREFUL else slope_of(pair, b, BOUNDED)
                if mixes(DIVERGENCE, FORWARD_KL):
                    gradient += b.weights[FORWARD_KL] * pair.difference
                if mixes(DIVERGENCE, REVERSE_KL):
                    of_log = b.weights[REVERSE_KL] * pair.q
                    gradient -= of_log * shifted_ratio(s, t, row.centred, row.inv_tau)
                else:
                    gradient -= pair.q * row.mean
    return gradient
