"""The K + 1 categories of a row, the ids' and the tail's, in fp64: masses, divergences, cross-entropy, metrics."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..common import (
    FORWARD_KL,
    JSD,
    NOTHING,
    REVERSE_KL,
    SKEW_KL,
    SKEW_REVERSE_KL,
    TVD,
    beta_constants,
    coslope_of,
    double,
    excess_of,
    log_1p,
    pair_of,
    slope_of,
    value_of,
    with_infinity,
)
from .rest import NOWHERE

# The logarithm of no mass: differences stay finite, and a divergence beyond what it allows is infinite.
NO_MASS = tl.constexpr(-1e100)

# ---- one row ---------------------------------------------------------------------------------------------------------
# Lane k is the k-th id's, lane K the tail's; lanes of no category have no mass in either model. Scores and columns of
# lane K are the label's where it is none of the ids. Logarithms of masses are relative to one score of the row.


class Label(NamedTuple):
    column: tl.tensor  # NOWHERE if out of range
    score: tl.tensor  # then NaN
    is_id: tl.tensor


class Tail(NamedTuple):
    log_mass: tl.tensor  # the student's
    of_label: tl.tensor  # the label's part of it
    reference: tl.tensor  # the score that logarithms of masses are relative to


class Divergence(NamedTuple):
    """Empty is a row where one of the models has no mass at all: D and its gradient are 0."""

    value: tl.tensor  # weighted D
    slopes: tl.tensor  # q (u - mean)
    q: tl.tensor
    log_q: tl.tensor
    empty: tl.tensor


@triton.jit
def label_beside(student, label, ids):
    """A row's label, beside the columns of its ids."""
    exists = (label >= 0) & (label < student.columns)
    column = tl.where(exists, label, NOWHERE).to(tl.int32)
    score = tl.load(student.pointer + tl.where(exists, label, 0) * student.stride).to(tl.float64)
    return Label(column, tl.where(exists, score, float("nan")), tl.sum((ids == column).to(tl.int32), 0) > 0)


@triton.jit
def _log_mass(score, reference, tau):
    return tl.where(score < NOTHING, NO_MASS, (score - reference) / tau)  # NaN passes


@triton.jit
def log_masses(known, of_tail, s, log_p, tail_log_p, label, rest, tau, S):
    """Logarithms of masses: the student's, the teacher's, and what is of the tail."""
    of_ids = tl.where(known, s, float("-inf"))
    reference = tl.maximum(tl.max(of_ids, 0), NOTHING)
    tail, own = double(NO_MASS), double(NO_MASS)
    if not S.CONDITIONAL:
        reference = tl.maximum(reference, tl.maximum(tl.max(s, 0), rest.top))
        log_total = tl.log(tl.where(rest.of_tail == 0, 1.0, rest.of_tail))
        tail = tl.where(rest.of_tail == 0, NO_MASS, (rest.top - reference) / tau + log_total)
        if label is not None:
            own = tl.where(label.is_id, NO_MASS, _log_mass(label.score, reference, tau))
            tail = tl.maximum(tail, own) + log_1p(tl.exp(-tl.abs(tail - own)))
    log_p = tl.where(known, log_p, NO_MASS)
    if tail_log_p is not None:
        tail_log_p = tl.where(tail_log_p == float("-inf"), NO_MASS, tail_log_p)
        if tail < 0.5 * NO_MASS:  # the student has none: the ids share out what the teacher has
            tail_log_p = double(NO_MASS)
            log_p = tl.where(known, log_p - tl.log(tl.sum(tl.exp(log_p), 0)), NO_MASS)
        log_p = tl.where(of_tail, tail_log_p, log_p)
    return tl.where(of_tail, tail, _log_mass(of_ids, reference, tau)), log_p, Tail(tail, own, reference)


@triton.jit
def _excluding(lane, index, x):
    """The sum of x over the lanes but one."""
    return tl.sum(tl.where(lane == index, 0.0, x), 0)


@triton.jit
def divergences(lane, log_weights, log_p, weights, beta):
    """From logarithms: unnormalised q, and the teacher's p.

    The largest of the student's masses is 1 less the others, and its gradient minus the sum of the others': what a
    confident student differs by from a certain one is in these alone.
    """
    largest = tl.argmax(log_weights, 0)
    relative = log_weights - tl.max(log_weights, 0)
    log_q = relative - log_1p(_excluding(lane, largest, tl.exp(relative)))
    pair = pair_of(tl.exp(tl.maximum(log_p, log_q)), log_p - log_q)
    p, q, log_ratio = pair.p, pair.q, pair.log_ratio
    gap = tl.sum(pair.difference, 0)  # 0, unless the teacher's masses do not sum to 1
    value, slopes = double(0.0), tl.zeros_like(q)
    if weights[FORWARD_KL] != 0:
        value += weights[FORWARD_KL] * (tl.sum(excess_of(p, q, log_ratio), 0) - gap)
        slopes += weights[FORWARD_KL] * (pair.difference - q * gap)
    if weights[REVERSE_KL] != 0:
        reverse = with_infinity(tl.sum(excess_of(q, p, -log_ratio), 0) + gap)
        value += weights[REVERSE_KL] * reverse
        slopes -= weights[REVERSE_KL] * q * (log_ratio + reverse)
    b = beta_constants(beta, None, tl.float64)
    for code in tl.static_range(JSD, TVD + 1):
        if weights[code] != 0:
            value += weights[code] * tl.sum(value_of(pair, b, code), 0)
            if code == SKEW_KL:
                value -= weights[code] * (1 - beta) * gap
            elif code == SKEW_REVERSE_KL:
                value += weights[code] * (1 - beta) * gap
            slope, coslope = slope_of(pair, b, code), coslope_of(pair, b, code)
            mean, comean = tl.sum(slope, 0), tl.sum(coslope, 0)
            slopes += weights[code] * tl.where(comean < mean, q * comean - coslope, slope - q * mean)
    slopes = tl.where(lane == largest, -_excluding(lane, largest, slopes), slopes)
    empty = (tl.max(log_weights, 0) < 0.5 * NO_MASS) | (tl.max(log_p, 0) < 0.5 * NO_MASS)
    return Divergence(tl.where(empty, 0.0, with_infinity(value)), tl.where(empty, 0.0, slopes), q, log_q, empty)


@triton.jit
def shared_out(of_tail, slopes, tail, rest, tau, S):
    """The tail's slope on its columns: (what the rest's exponentials are multiplied with, slopes with the label's)."""
    of_rest, of_label = double(0.0), double(0.0)
    if not S.CONDITIONAL:
        at_tail = tl.sum(tl.where(of_tail, slopes, 0.0), 0)
        log_share = (rest.top - tail.reference) / tau - tail.log_mass
        of_rest = tl.where(rest.of_tail == 0, 0.0, at_tail * tl.exp(log_share))
        of_label = at_tail * tl.exp(tail.of_label - tail.log_mass)
    return of_rest, tl.where(of_tail, of_label, slopes)


@triton.jit
def cross_entropy(s, column, label, rest):
    """(loss, gradient at the columns set aside, and at the rest's maximum)"""
    s = tl.where(column == label.column, float("-inf"), s)
    top = tl.where(rest.of_all == 0, float("-inf"), rest.top)
    highest = tl.maximum(tl.maximum(tl.max(s, 0), top), label.score)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    of_ids, of_rest, of_label = tl.exp(s - highest), tl.exp(top - highest), tl.exp(label.score - highest)
    others = tl.sum(of_ids, 0) + rest.of_all * of_rest  # beside them a confident student's label would hide the others
    whole = others + of_label
    loss = tl.where(label.score == highest, log_1p(others), highest - label.score + tl.log(whole))
    share = 1 / tl.where(whole == 0, 1.0, whole)
    return loss, tl.where(column == label.column, -others * share, of_ids * share), of_rest * share


@triton.jit
def _entropy(p, log_p):
    """-sum p log p over the lanes, in nats."""
    return tl.sum(tl.where(p == 0, 0.0, -p * log_p), 0)  # NaN passes


@triton.jit
def metrics_of(lane, known, s, log_p, highest, found, kd_weight, cross_entropy, tau, S):
    """(tau^2 D, cross-entropy, entropies of the student and of the teacher, agreement, the ids' share of q)"""
    told, first = ~found.empty & (kd_weight != 0), tl.argmax(tl.where(known, log_p, float("-inf")), 0)
    kd = tl.where(kd_weight == 0, 0.0, tau * tau / tl.where(kd_weight == 0, 1.0, kd_weight) * found.value)
    entropy_q = tl.where(told, _entropy(found.q, found.log_q), 0.0)
    entropy_p = tl.where(told, _entropy(tl.exp(log_p), log_p), 0.0)
    agrees = told & (tl.sum(tl.where(lane == first, s, 0.0), 0) >= highest)
    mass = double(0.0) if S.CONDITIONAL else tl.where(told, tl.sum(tl.where(known, found.q, 0.0), 0), 0.0)
    return kd, cross_entropy, entropy_q, entropy_p, tl.where(agrees, 1.0, 0.0), mass
