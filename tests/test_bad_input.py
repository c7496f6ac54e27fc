"""Arguments that do not fit are refused before any work; messages name the argument, what was expected and given."""

from __future__ import annotations

import pytest
import torch

import fastkd

T, V, HS, HT = 4, 11, 6, 8


def logit_arguments(**changes):
    return {"student_logits": torch.randn(T, V), "teacher_logits": torch.randn(T, V)} | changes


def linear_arguments(**changes):
    arguments = {
        "student_hidden": torch.randn(T, HS),
        "student_weight": torch.randn(V, HS),
        "teacher_hidden": torch.randn(T, HT),
        "teacher_weight": torch.randn(V, HT),
    }
    return arguments | changes


SHARED = [
    ({"divergence": "foward_kl"}, ValueError, r"divergence: expected one of .*, got 'foward_kl'; did you mean"),
    ({"divergence": None}, ValueError, r"divergence: expected one of .*, got None"),
    ({"beta": 0.0}, ValueError, r"beta: expected a number in \(0, 1\), got 0.0"),
    ({"beta": 1}, ValueError, r"beta: expected a number in \(0, 1\), got 1"),
    ({"beta": "a"}, TypeError, r"beta: expected a number in \(0, 1\), got str"),
    ({"temperature": 0.0}, ValueError, r"temperature: expected a number > 0, got 0.0"),
    ({"temperature": -1}, ValueError, r"temperature: expected a number > 0, got -1"),
    ({"temperature": float("nan")}, ValueError, r"temperature: expected a number > 0, got nan"),
    ({"temperature": True}, TypeError, r"temperature: expected a number > 0, got bool"),
    ({"kd_weight": float("inf")}, ValueError, r"kd_weight: expected a number that is finite, got inf"),
    ({"ce_weight": float("nan")}, ValueError, r"ce_weight: expected a number that is finite, got nan"),
    ({"ce_weight": 1.0}, ValueError, r"labels: expected a tensor because ce_weight is 1.0, got None"),
    ({"reduction": "batchmean"}, ValueError, r"reduction: expected one of mean, sum, none, got 'batchmean'"),
    ({"impl": "fast"}, ValueError, r"impl: expected one of auto, reference, fused, got 'fast'"),
    ({"ignore_index": 0.5}, TypeError, r"ignore_index: expected an int, got float"),
    ({"normalizer": 3, "reduction": "sum"}, ValueError, r"normalizer: only used with reduction=\"mean\", got .*'sum'"),
    ({"normalizer": -1}, ValueError, r"normalizer: expected a number >= 0, got -1"),
    ({"normalizer": torch.ones(2)}, ValueError, r"normalizer: expected a number or 0-d tensor, got shape \[2\]"),
    ({"normalizer": "x"}, TypeError, r"normalizer: expected a number >= 0, got str"),
    ({"weight": [1, 1]}, TypeError, r"weight: expected a tensor, got list"),
    ({"weight": torch.ones(T, 1)}, ValueError, r"weight: expected shape \[4\], got \[4, 1\]"),
    ({"weight": torch.ones(T, dtype=torch.bool)}, TypeError, r"weight: expected dtype .*, got torch.bool"),
    ({"weight": torch.tensor([1, float("nan"), 1, 1])}, ValueError, r"weight: expected finite numbers, got nan"),
    ({"weight": torch.ones(T, device="meta")}, ValueError, r"weight: expected device cpu, .*got meta"),
    ({"labels": torch.zeros(T)}, TypeError, r"labels: expected an integer dtype, got torch.float32"),
    ({"labels": torch.zeros(T + 1).long()}, ValueError, r"labels: expected shape \[4\], got \[5\]"),
    ({"labels": torch.tensor([0, 1, V, 2])}, ValueError, r"labels: expected values in \[0, 11\) or .*, got 11"),
    ({"labels": torch.tensor([0, 1, -1, 2])}, ValueError, r"labels: expected values in \[0, 11\) or .*, got -1"),
]

LOGIT = [
    ({"student_logits": "x"}, TypeError, r"student_logits: expected a tensor, got str"),
    ({"student_logits": torch.zeros(T, V).long()}, TypeError, r"student_logits: expected dtype .*, got torch.int64"),
    ({"student_logits": torch.tensor(1.0)}, ValueError, r"student_logits: expected shape \[..., V\] .*, got \[\]"),
    ({"student_logits": torch.zeros(T, 0)}, ValueError, r"student_logits: expected shape \[..., V\] .*, got \[4, 0\]"),
    ({"teacher_logits": torch.zeros(T, 0)}, ValueError, r"teacher_logits: expected shape \[..., V\] .*, got \[4, 0\]"),
    (
        {"teacher_logits": torch.randn(T + 1, V)},
        ValueError,
        r"teacher_logits: expected shape \[4, any\], got \[5, 11\]",
    ),
    (
        {"teacher_logits": torch.randn(T, V, 1)},
        ValueError,
        r"teacher_logits: expected shape \[4, any\], got \[4, 11, 1",
    ),
    ({"teacher_logits": None}, ValueError, r"teacher_logits: expected a tensor because kd_weight is 1.0, got None"),
    ({"teacher_logits": torch.zeros(T, V, device="meta")}, ValueError, r"teacher_logits: expected device cpu"),
]

LINEAR = [
    ({"student_hidden": torch.tensor(1.0)}, ValueError, r"student_hidden: expected shape \[..., H\] .*, got \[\]"),
    ({"student_weight": torch.randn(V, HT)}, ValueError, r"student_weight: expected shape \[any, 6\], got \[11, 8\]"),
    ({"student_weight": torch.randn(0, HS)}, ValueError, r"student_weight: expected shape \[V, 6\] .*, got \[0, 6\]"),
    (
        {"student_weight": torch.randn(V, HS).half()},
        TypeError,
        r"student_weight: expected dtype torch.float32, .*float16",
    ),
    ({"student_bias": torch.randn(V + 1)}, ValueError, r"student_bias: expected shape \[11\], got \[12\]"),
    (
        {"teacher_hidden": torch.randn(T + 1, HT)},
        ValueError,
        r"teacher_hidden: expected shape \[4, any\], got \[5, 8\]",
    ),
    ({"teacher_hidden": None}, TypeError, r"teacher_hidden: expected a tensor, got NoneType"),
    ({"teacher_weight": None}, TypeError, r"teacher_weight: expected a tensor, got NoneType"),
    (
        {"teacher_hidden": None, "teacher_weight": None},
        ValueError,
        r"teacher_hidden: expected a tensor because kd_weight is 1.0, got None",
    ),
    ({"teacher_bias": torch.randn(V, 1)}, ValueError, r"teacher_bias: expected shape \[11\], got \[11, 1\]"),
    ({"workspace_mb": 0}, ValueError, r"workspace_mb: expected a number > 0, got 0"),
    ({"student_scale": float("nan")}, ValueError, r"student_scale: expected a number that is finite, got nan"),
    ({"teacher_scale": None}, TypeError, r"teacher_scale: expected a number that is finite, got NoneType"),
    ({"student_hidden": torch.randn(T, HS, device="meta")}, ValueError, r"student_weight: expected device meta"),
]


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("changes", "error", "message"), SHARED + LOGIT)
def test_logit_kl_refuses(changes, error, message, impl):
    with pytest.raises(error, match=message):
        fastkd.logit_kl(**logit_arguments(**({"impl": impl} | changes)))


@pytest.mark.parametrize(("changes", "error", "message"), SHARED + LINEAR)
def test_linear_kl_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        fastkd.linear_kl(**linear_arguments(**changes))


def test_labels_beyond_the_shared_vocabulary():
    """A label that only the student's vocabulary holds has no probability to compare."""
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 9\)"):
        fastkd.logit_kl(torch.randn(T, V), torch.randn(T, 9), labels=torch.full((T,), 10), ce_weight=1.0)
