"""What the kernels of attention_kl and relation_kl have in common: heads in memory, scores and gradients of a tile."""

import triton
import triton.language as tl

from ..common import (
    FORWARD_KL,
    INTERPRETED,
    JSD,
    LOG2E,
    MIX,
    REVERSE_KL,
    TVD,
    choose_matrix,
    coslope_of,
    dot,
    double,
    load_valid,
    pair_of,
    slope_of,
    unmasked,
)  # fmt: skip

# The score of a masked key: low enough for a probability of exactly zero, and finite, so that differences are too. It
# is below what a bias of -inf makes of a score, and a power of two, whose product with a scale is exact.
MASKED = tl.constexpr(-(2.0**100))
LN2 = tl.constexpr(0.6931471805599453)
# What a row is kept as: coefficient, the logarithms log_s and log_t of both models' sums of exponentials, what rounding
# took from log_t - log_s, mean of u, saturated, and for TVD the sign of q - p at the key with most of q (or 0).
STATS = tl.constexpr(7)
# Tables by distance are padded by twice as much, so that no tile, which is at most as large, reads beyond.
SPAN = tl.constexpr(128)

# ---- memory ----------------------------------------------------------------------------------------------------------
# A matrix is (pointer, batch stride, row stride), and (pointer, row stride) once batch and head are known.


@triton.jit
def choose_head(index, matrices, b, a, WIDTH: tl.constexpr):
    """Head `a` of sequence `b` of matrices[index]."""
    pointer, batch_stride, row_stride = choose_matrix(index, matrices)
    return pointer + b * batch_stride + a * WIDTH, row_stride


@triton.jit
def head_of(matrix, b, a, WIDTH: tl.constexpr):
    pointer, batch_stride, row_stride = matrix
    return pointer + b * batch_stride + a * WIDTH, row_stride


@triton.jit
def head_pointers(matrix, start, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to rows [BLOCK, PADDED] of one head, and which columns exist. Offsets inside a block stay below 2^31."""
    pointer, stride = matrix
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, PADDED)[None, :]
    return pointer + tl.cast(start, tl.int64) * stride + (row * stride + column), column < WIDTH


@triton.jit
def load_head(matrix, start, used, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [BLOCK, PADDED] of one head, zero where they are not used: a masked NaN times zero would still be NaN."""
    pointers, exists = head_pointers(matrix, start, WIDTH, PADDED, BLOCK)
    return tl.load(pointers, mask=used[:, None] & exists, other=0)


@triton.jit
def load_stats(stats, position, queries, lift=1.0):
    """The statistics of a block of rows. Rows that do not exist have a coefficient of zero."""
    pointers, exists = stats + position, position < queries
    return (
        tl.load(pointers, mask=exists, other=0) * lift,
        tl.load(pointers + queries, mask=exists),
        tl.load(pointers + 2 * queries, mask=exists),
        tl.load(pointers + 3 * queries, mask=exists),
        tl.load(pointers + 4 * queries, mask=exists),
        tl.load(pointers + 5 * queries, mask=exists),
        tl.load(pointers + 6 * queries, mask=exists),
    )


# ---- scores ----------------------------------------------------------------------------------------------------------
# They and all logarithms are base 2, the GPU's own: scales carry log2(e), and an exponential is one instruction.
# A bias of one sequence and head is (pointer, query stride, key stride) or, by distance, in logarithms base 2, (pointer
# to that of 0, the farthest that a tile begins from there), or () where there is none.


@triton.jit
def log2_scale(scale, F: tl.constexpr):
    return (double(scale) * LOG2E).to(F)


@triton.jit
def look_up(pointers):
    """Loads of a small table, in the layout of the scores.

    tl.load would fetch neighbouring columns by neighbouring threads, and Triton then computes all else in that layout.
    """
    if not INTERPRETED and tl.target_info.is_cuda():
        if pointers.dtype.element_ty == tl.float64:
            found = tl.inline_asm_elementwise("ld.global.nc.f64 $0, [$1];", "=d,l", [pointers], tl.float64, True, 1)
        else:
            found = tl.inline_asm_elementwise("ld.global.nc.f32 $0, [$1];", "=f,l", [pointers], tl.float32, True, 1)
    else:
        found = tl.load(pointers)
    return found


@triton.jit
def bias_of_head(bias, b, a):
    if bias is None:
        head = ()
    elif len(bias) == 2:
        head = bias[0] + a * bias[1] + bias[1] // 2, bias[1] // 2 - SPAN
    else:
        head = bias[0] + b * bias[1] + tl.cast(a, tl.int64) * bias[2], bias[3], bias[4]
    return head


@triton.jit
def _load_bias(bias, query_start, key_start, query, key, used, F: tl.constexpr):
    """The bias of a tile, times log2(e): of query_start + query and key_start + key."""
    if len(bias) == 2:
        pointer, far = bias
        distance = tl.minimum(tl.maximum(key_start - query_start, -far), far)
        found = look_up(pointer + distance + (key - query))
    else:
        pointer, query_stride, key_stride = bias
        pointer += tl.cast(query_start, tl.int64) * query_stride + tl.cast(key_start, tl.int64) * key_stride
        pointers = pointer + (query * query_stride + key * key_stride)
        found = unmasked(tl.load(pointers, mask=used, other=0).to(F) * LOG2E)
    return found


@triton.jit
def tile_scores(
    own, other, scale, bias, query_start, key_start, query, key, used, SCALED: tl.constexpr, F: tl.constexpr
):
    """[own, other] scores; `used` says which of them matter. Where there is no bias they may be left to be scaled."""
    s = dot(own, tl.trans(other), F)
    if len(bias) > 0:
        s = scale * s + _load_bias(bias, query_start, key_start, query, key, used, F)
    elif SCALED:
        s *= scale
    return s


@triton.jit
def _log_probabilities(s, t, row):
    """log q, log p and log(p / q). The statistics of their rows have been broadcast along keys."""
    _, log_s, log_t, rounded, _, _, _ = row
    log_q, log_p = s - log_s, t - log_t
    return log_q, log_p, log_p - log_q - rounded


@triton.jit
def tile_pair(s, t, row):
    log_q, log_p, log_ratio = _log_probabilities(s, t, row)
    return pair_of(tl.exp2(tl.maximum(log_q, log_p)), log_ratio * LN2)


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


@triton.jit
def exp2_minus1(x):
    return tl.where(tl.abs(x) < 0.5, near_exp2_minus1(x), tl.exp2(x) - 1)


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


@triton.jit
def _difference(s, t, row):
    """q - p, to full relative accuracy."""
    log_q, log_p, log_ratio = _log_probabilities(s, t, row)
    q, p = tl.exp2(log_q), tl.exp2(log_p)
    return tl.where(tl.abs(log_ratio) < 0.5, p * near_exp2_minus1(-log_ratio), q - p)


@triton.jit
def log_ratio_of(s, t, row):
    """log(p / q), from differences of like numbers."""
    _, log_s, log_t, rounded, _, _, _ = row
    return (t - s) - ((log_t - log_s) + rounded)


@triton.jit
def _jsd_gradient(s, t, row, beta):
    """-q (rest log(m / q) + mean) or, of a saturated row, -q (rest log(m / (rest q)) + mean).

    What is in the logarithm is 1 + z, with z = beta (p / q - 1) or beta / rest p / q.
    """
    _, log_s, _, _, mean, saturated, _ = row
    x = tl.minimum(log_ratio_of(s, t, row), 100.0)  # beyond, q is nothing
    weight = tl.where(saturated != 0, beta.beta / beta.rest, beta.beta)
    z = weight * tl.where(tl.abs(x) < 0.5, near_exp2_minus1(x) + saturated, tl.exp2(x) - (1 - saturated))
    log = tl.where(tl.abs(z) < FAR, z - z * log_1p_tail(z), far_log_1p(z))
    return -tl.exp2(s - log_s) * (beta.rest * log + mean)


@triton.jit
def along(row, AXIS: tl.constexpr):
    """The statistics of a block of rows, broadcast along axis `AXIS` of a tile."""
    coefficient, log_s, log_t, rounded, mean, saturated, sign = row
    return (
        tl.expand_dims(coefficient, AXIS),
        tl.expand_dims(log_s, AXIS),
        tl.expand_dims(log_t, AXIS),
        tl.expand_dims(rounded, AXIS),
        tl.expand_dims(mean, AXIS),
        tl.expand_dims(saturated, AXIS),
        tl.expand_dims(sign, AXIS),
    )


@triton.jit
def tile_gradient(s, t, row, beta, used, DIVERGENCE: tl.constexpr):
    """coefficient * dD/ds for a tile; zero where it is not used, whatever the scores are there. None: all of it is."""
    coefficient, _, _, _, mean, saturated, sign = row
    if DIVERGENCE == FORWARD_KL:
        gradient = _difference(s, t, row)
    elif DIVERGENCE == REVERSE_KL:
        log_q, _, log_ratio = _log_probabilities(s, t, row)
        gradient = -tl.exp2(log_q) * (log_ratio + mean)
    elif DIVERGENCE == JSD:
        gradient = _jsd_gradient(s, t, row, beta)
    else:
        pair = tile_pair(s, t, row)
        # of a mix tvd, and forward and reverse KL, stay apart
        OTHERS: tl.constexpr = MIX + DIVERGENCE % 32 // 4 * 4 if DIVERGENCE >= MIX else DIVERGENCE
        slope, coslope = slope_of(pair, beta, OTHERS), coslope_of(pair, beta, OTHERS)
        if DIVERGENCE == TVD or DIVERGENCE >= MIX + 32:
            # It jumps at p = q, and every kernel rounds scores in its own way. Where nearly all of q is at one key,
            # the mean is u there: taken with the other sign here, it would not cancel.
            q = pair.q
            of_tvd = tl.where(q > 0.5, 0.5 * sign * q, slope_of(pair, beta, TVD))
            counter = tl.where(q > 0.5, 0.5 * (q - sign * q), coslope_of(pair, beta, TVD))
            if DIVERGENCE == TVD:
                slope, coslope = of_tvd, counter
            else:
                slope, coslope = slope + beta.weights[TVD] * of_tvd, coslope + beta.weights[TVD] * counter
        slope = tl.where(saturated != 0, -coslope, slope)
        if DIVERGENCE >= MIX and DIVERGENCE // 2 % 2 == 1:  # centred before it is rounded
            gradient = slope - pair.q * beta.weights[REVERSE_KL] * (pair.log_ratio + mean / beta.weights[REVERSE_KL])
        else:
            gradient = slope - pair.q * mean
        if DIVERGENCE >= MIX and DIVERGENCE % 2 == 1:
            gradient += beta.weights[FORWARD_KL] * pair.difference
    gradient *= coefficient
    if used is not None:
        gradient = tl.where(used, gradient, 0)
    return gradient


# ---- both models -----------------------------------------------------------------------------------------------------
# Here a model is (its block of queries, all of the head's keys, scale, bias).


@triton.jit
def model_of(
    q,
    k,
    b,
    a,
    start,
    exists,
    scale,
    bias,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = load_head(head_of(q, b, a, WIDTH), start, exists, WIDTH, PADDED, BLOCK)
    return tile, head_of(k, b, a // GROUP, WIDTH), scale, bias_of_head(bias, b, a)


@triton.jit
def any_masked(key_mask, start, keys, query_start, CAUSAL: tl.constexpr, BLOCK: tl.constexpr):
    """Whether any key of a tile is."""
    some = start + BLOCK > (tl.minimum(keys, query_start + 1) if CAUSAL else keys)
    if key_mask is not None:
        some |= tl.min(load_valid(key_mask, start + tl.arange(0, BLOCK), keys).to(tl.int32), 0) == 0
    return some


@triton.jit
def both_scores(
    student,
    teacher,
    key_mask,
    query_start,
    alive,
    start,
    keys,
    CAUSAL: tl.constexpr,
    WIDTH_S: tl.constexpr,
    WIDTH_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    F: tl.constexpr,
    SCALED: tl.constexpr = True,
):
    """Both models' scores for a tile of keys, and which of them are not masked."""
    q, k, scale, bias = student
    tq, tk, teacher_scale, teacher_bias = teacher
    i, j = tl.arange(0, q.shape[0])[:, None], tl.arange(0, BLOCK_N)[None, :]
    key = start + tl.arange(0, BLOCK_N)
    valid = load_valid(key_mask, key, keys)[None, :]
    if CAUSAL:
        valid = valid & (start + j <= query_start + i)
    used = valid
    if len(bias) > 0 or len(teacher_bias) > 0:
        used = valid & alive[:, None]
    key_rows = load_head(k, start, key < keys, WIDTH_S, q.shape[1], BLOCK_N)
    s = tile_scores(q, key_rows, scale, bias, query_start, start, i, j, used, SCALED, F)
    key_rows = load_head(tk, start, key < keys, WIDTH_T, tq.shape[1], BLOCK_N)
    t = tile_scores(tq, key_rows, teacher_scale, teacher_bias, query_start, start, i, j, used, SCALED, F)
    return s, t, valid
