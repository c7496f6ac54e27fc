"""The K + 1 categories of a row, the ids' and the tail's, in fp64: divergences, masses, entropy, cross-entropy."""

import triton
import triton.language as tl

from ..common import (
    FORWARD_KL,
    JSD,
    REVERSE_KL,
    SKEW_KL,
    SKEW_REVERSE_KL,
    TVD,
    _beta_constants,
    _coslope,
    _double,
    _excess,
    _log_1p,
    _pair_of,
    _slope,
    _value,
    _with_infinity,
)
from .rest import NO_MASS, NOTHING

# Lane k is the k-th id's, lane K the tail's; lanes of no category have no mass in either model.


@triton.jit
def _excluding(lane, index, x):
    """The sum of x over the lanes but one."""
    return tl.sum(tl.where(lane == index, 0.0, x), 0)


@triton.jit
def divergences(lane, log_weights, log_p, weights, beta):
    """(weighted D, q (u - mean), q, log q) from logarithms: the student's unnormalised masses, the teacher's masses.

    The largest of the student's masses is 1 less the others, and its gradient minus the sum of the others': what a
    confident student differs by from a certain one is in these alone.
    """
    largest = tl.argmax(log_weights, 0)
    relative = log_weights - tl.max(log_weights, 0)
    log_q = relative - _log_1p(_excluding(lane, largest, tl.exp(relative)))
    pair = _pair_of(tl.exp(tl.maximum(log_p, log_q)), log_p - log_q)
    p, q, difference, log_ratio, _, _, _ = pair
    gap = tl.sum(difference, 0)  # 0, unless the teacher's masses do not sum to 1
    value, slopes = _double(0.0), tl.zeros_like(q)
    if weights[FORWARD_KL] != 0:
        value += weights[FORWARD_KL] * (tl.sum(_excess(p, q, log_ratio), 0) - gap)
        slopes += weights[FORWARD_KL] * (difference - q * gap)
    if weights[REVERSE_KL] != 0:
        reverse = _with_infinity(tl.sum(_excess(q, p, -log_ratio), 0) + gap)
        value += weights[REVERSE_KL] * reverse
        slopes -= weights[REVERSE_KL] * q * (log_ratio + reverse)
    b = _beta_constants(beta, None, tl.float64)
    for code in tl.static_range(JSD, TVD + 1):
        if weights[code] != 0:
            value += weights[code] * tl.sum(_value(pair, b, code), 0)
            if code == SKEW_KL:
                value -= weights[code] * (1 - beta) * gap
            elif code == SKEW_REVERSE_KL:
                value += weights[code] * (1 - beta) * gap
            slope, coslope = _slope(pair, b, code), _coslope(pair, b, code)
            mean, comean = tl.sum(slope, 0), tl.sum(coslope, 0)
            slopes += weights[code] * tl.where(comean < mean, q * comean - coslope, slope - q * mean)
    slopes = tl.where(lane == largest, -_excluding(lane, largest, slopes), slopes)
    return _with_infinity(value), slopes, q, log_q


# ---- one row ---------------------------------------------------------------------------------------------------------
# A label is (its column, NOWHERE if out of range; its score, then NaN; whether it is an id's). Logarithms of masses are
# relative to one score of the row, and NO_MASS for none.


@triton.jit
def log_mass(score, reference, tau):
    return tl.where(score < NOTHING, NO_MASS, (score - reference) / tau)  # NaN passes


@triton.jit
def _log_sum(x, y):
    """log(e^x + e^y)"""
    return tl.maximum(x, y) + _log_1p(tl.exp(-tl.abs(x - y)))


@triton.jit
def tail_of(label, top, total, reference, tau):
    """Logarithms of the tail's mass, and of the label's in it."""
    rest = tl.where(total == 0, NO_MASS, (top - reference) / tau + tl.log(tl.where(total == 0, 1.0, total)))
    tail, own = rest, _double(NO_MASS)
    if label is not None:
        _, score, known = label
        own = tl.where(known, NO_MASS, log_mass(score, reference, tau))
        tail = _log_sum(rest, own)
    return tail, own


@triton.jit
def lane_entropy(p, log_p):
    """-sum p log p over the lanes, in nats."""
    return tl.sum(tl.where(p == 0, 0.0, -p * log_p), 0)  # NaN passes


@triton.jit
def cross_entropy(s, column, label, top, total_1):
    """(loss, gradient at the label's column, at the ids' others, and at the rest's maximum)"""
    label_column, score, _ = label
    s = tl.where(column == label_column, float("-inf"), s)
    top = tl.where(total_1 == 0, float("-inf"), top)
    highest = tl.maximum(tl.maximum(tl.max(s, 0), top), score)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    of_ids, of_rest, of_label = tl.exp(s - highest), tl.exp(top - highest), tl.exp(score - highest)
    others = tl.sum(of_ids, 0) + total_1 * of_rest  # beside them a confident student's label would hide the others
    whole = others + of_label
    loss = tl.where(score == highest, _log_1p(others), highest - score + tl.log(whole))
    share = 1 / tl.where(whole == 0, 1.0, whole)
    return loss, -others * share, of_ids * share, of_rest * share
