"""What both models' scores say: functions of one, and gradients. Logarithms are base 2."""

import triton
import triton.language as tl

from ..common import (
    FORWARD_KL,
    INTERPRETED,
    JSD,
    LN2,
    MIX,
    REVERSE_KL,
    TVD,
    coslope_of,
    mixes,
    pair_of,
    slope_of,
    value_of,
)

# ---- functions of a score --------------------------------------------------------------------------------------------


@triton.jit
def exp2_tail(x):
    """(2^x - 1) / x - log(2) for |x| < 1/2."""
    if x.dtype == tl.float64:
        y = x * LN2
        poly = x * 0 + 1
        for k in tl.static_range(14, 2, -1):
            poly = 1 + y * poly / k
        poly *= 0.5 * LN2 * LN2
    else:  # relative error of 2^x - 1: 1e-8
        poly = 1.54668417e-4 * x + 1.33863575e-3
        poly = poly * x + 9.61804236e-3
        poly = poly * x + 5.55037054e-2
        poly = poly * x + 2.40226510e-1
    return x * poly


@triton.jit
def near_exp2_minus1(x):
    """2^x - 1 for |x| < 1/2, accurate near 0."""
    return x * (LN2 + exp2_tail(x))


# The least |x| for which log(1 + x) is that of a rounded 1 + x.
FAR = tl.constexpr(0.3)


@triton.jit
def log_1p_tail(x):
    """1 - log(1 + x) / x for |x| < FAR."""
    if x.dtype == tl.float64:
        poly = x * 0
        for k in tl.static_range(32, 1, -1):
            poly = 1.0 / k - x * poly
    else:  # relative error 3e-8
        poly = 1.24506890e-1 * x - 1.32573280e-1
        poly = poly * x + 1.22663060e-1
        poly = poly * x - 1.41285860e-1
        poly = poly * x + 1.66758730e-1
        poly = poly * x - 2.00042680e-1
        poly = poly * x + 2.49998660e-1
        poly = poly * x - 3.33333010e-1
        poly = poly * x + 0.5
    return x * poly


@triton.jit
def far_log_1p(x):
    """log(1 + x) by the GPU's own logarithm, inaccurate near 0. tl.log2 is twenty instructions, and no better here."""
    if x.dtype == tl.float32 and not INTERPRETED and tl.target_info.is_cuda():
        log = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [1 + x], tl.float32, True, 1)
    else:
        log = tl.log2(1 + x)
    return LN2 * log


# ---- columns and gradients -------------------------------------------------------------------------------------------


@triton.jit
def _log_probabilities(s, t, row):
    """log q, log p and log(p / q). The statistics of their rows have been broadcast along keys."""
    log_q, log_p = s - row.log_s, t - row.log_t
    return log_q, log_p, log_p - log_q - row.rounded


@triton.jit
def _pair(s, t, row):
    log_q, log_p, log_ratio = _log_probabilities(s, t, row)
    return pair_of(tl.exp2(tl.maximum(log_q, log_p)), log_ratio * LN2)


@triton.jit
def log_ratio_of(s, t, row):
    """log(p / q), from differences of like numbers: nearer for like models, farther where one's scores are far off."""
    return (t - s) - ((row.log_t - row.log_s) + row.rounded)


@triton.jit
def _difference(s, t, row):
    """q - p, to full relative accuracy."""
    log_q, log_p, log_ratio = _log_probabilities(s, t, row)
    q, p = tl.exp2(log_q), tl.exp2(log_p)
    return tl.where(tl.abs(log_ratio) < 0.5, p * near_exp2_minus1(-log_ratio), q - p)


@triton.jit
def _jsd_columns(s, t, row, beta):
    """What value_of, slope_of and coslope_of tell, of one logarithm: that of m over one of p and q, 1 + z.

    It is the one that weighs more in m, or the larger where they are far apart. Where p is so far below q that this may
    make a row saturated, 1 + z is m / (rest q), as in the gradient of such a row.
    """
    beta, rest, log_rest = beta.beta, beta.rest, beta.log_rest
    x = log_ratio_of(s, t, row)
    q, p = tl.exp2(s - row.log_s), tl.exp2(t - row.log_t)
    limit = tl.log2(tl.sqrt(rest) / (1 + tl.sqrt(rest)))
    low, over_p = x < limit, x > tl.where(beta > 0.5, tl.maximum(limit, -3), 3)
    y = tl.where(over_p, -x, x)
    near = tl.abs(y) < 0.5
    ratio, tail = tl.exp2(y), exp2_tail(y)
    minus1 = tl.where(near, y * (LN2 + tail), ratio - 1)
    weight = tl.where(over_p, rest, beta)  # of the other
    z = tl.where(low, beta / rest * ratio, weight * minus1)
    log_tail = z * log_1p_tail(z)
    log_z = tl.where(tl.abs(z) < FAR, z - log_tail, far_log_1p(z))
    log_m = log_z + tl.where(low, log_rest, 0)
    log_m_over_q = log_m + tl.where(over_p, x * LN2, 0)
    coslope = q * tl.where(low, log_z, log_m_over_q - log_rest)
    # p log(p / m) and q log(q / m), or e^y y - (e^y - 1) and (1 + z) log(1 + z) - z, which are both of second order
    far_value = weight * LN2 * y * tl.where(over_p, q, p) - (beta * p + rest * q) * log_m
    of_other, of_m = y * (LN2 * minus1 - tail), z * z - (1 + z) * log_tail
    value = tl.where(near, tl.where(over_p, p, q) * (weight * of_other - of_m), far_value)
    return value, q * log_m_over_q, coslope


@triton.jit
def tile_columns(s, t, row, beta, DIVERGENCE: tl.constexpr):
    """(what value_of, slope_of and coslope_of tell of a tile, what adds up to its rows' signs)"""
    sign = tl.zeros_like(s)
    if DIVERGENCE == JSD:
        value, slope, coslope = _jsd_columns(s, t, row, beta)
    else:
        pair = _pair(s, t, row)
        value, slope = value_of(pair, beta, DIVERGENCE), slope_of(pair, beta, DIVERGENCE)
        coslope = coslope_of(pair, beta, DIVERGENCE)
        if DIVERGENCE == TVD or mixes(DIVERGENCE, TVD):
            difference = pair.difference
            sign = tl.where(pair.q > 0.5, (difference > 0).to(s.dtype) - (difference < 0).to(s.dtype), 0)
    return value, slope, coslope, sign


@triton.jit
def _jsd_gradient(s, t, row, beta):
    """-q (rest log(m / q) + mean) or, of a saturated row, -q (rest log(m / (rest q)) + mean).

    What is in the logarithm is 1 + z, with z = beta (p / q - 1) or beta / rest p / q.
    """
    x = tl.minimum(log_ratio_of(s, t, row), 100.0)  # beyond, q is nothing
    weight = tl.where(row.saturated != 0, beta.beta / beta.rest, beta.beta)
    z = weight * tl.where(tl.abs(x) < 0.5, near_exp2_minus1(x) + row.saturated, tl.exp2(x) - (1 - row.saturated))
    log = tl.where(tl.abs(z) < FAR, z - z * log_1p_tail(z), far_log_1p(z))
    return -tl.exp2(s - row.log_s) * (beta.rest * log + row.mean)


@triton.jit
def tile_gradient(s, t, row, beta, used, DIVERGENCE: tl.constexpr):
    """coefficient * dD/ds for a tile; zero where it is not used, whatever the scores are there. None: all of it is."""
    mean = row.mean
    if DIVERGENCE == FORWARD_KL:
        gradient = _difference(s, t, row)
    elif DIVERGENCE == REVERSE_KL:
        log_q, _, log_ratio = _log_probabilities(s, t, row)
        gradient = -tl.exp2(log_q) * (log_ratio + mean)
    elif DIVERGENCE == JSD:
        gradient = _jsd_gradient(s, t, row, beta)
    else:
        pair = _pair(s, t, row)
        # of a mix tvd, and forward and reverse KL, stay apart
        OTHERS: tl.constexpr = MIX + DIVERGENCE % 32 // 4 * 4 if DIVERGENCE >= MIX else DIVERGENCE
        slope, coslope = slope_of(pair, beta, OTHERS), coslope_of(pair, beta, OTHERS)
        if DIVERGENCE == TVD or mixes(DIVERGENCE, TVD):
            # It jumps at p = q, and every kernel rounds scores in its own way. Where nearly all of q is at one key,
            # the mean is u there: taken with the other sign here, it would not cancel.
            q = pair.q
            of_tvd = tl.where(q > 0.5, 0.5 * row.sign * q, slope_of(pair, beta, TVD))
            counter = tl.where(q > 0.5, 0.5 * (q - row.sign * q), coslope_of(pair, beta, TVD))
            if DIVERGENCE == TVD:
                slope, coslope = of_tvd, counter
            else:
                slope, coslope = slope + beta.weights[TVD] * of_tvd, coslope + beta.weights[TVD] * counter
        slope = tl.where(row.saturated != 0, -coslope, slope)
        if mixes(DIVERGENCE, REVERSE_KL):  # centred before it is rounded
            gradient = slope - pair.q * beta.weights[REVERSE_KL] * (pair.log_ratio + mean / beta.weights[REVERSE_KL])
        else:
            gradient = slope - pair.q * mean
        if mixes(DIVERGENCE, FORWARD_KL):
            gradient += beta.weights[FORWARD_KL] * pair.difference
    gradient *= row.coefficient
    if used is not None:
        gradient = tl.where(used, gradient, 0)
    return gradient
