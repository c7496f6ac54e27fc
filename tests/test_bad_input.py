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


B, LQ, LK, A = 2, 5, 7, 2


def attention_arguments(**changes):
    arguments = {
        "student_q": torch.randn(B, LQ, 6),
        "student_k": torch.randn(B, LK, 6),
        "teacher_q": torch.randn(B, LQ, 8),
        "teacher_k": torch.randn(B, LK, 8),
        "num_heads": A,
    }
    return arguments | changes


def relation_arguments(**changes):
    return {"student": torch.randn(B, LQ, 6), "teacher": torch.randn(B, LQ, 8), "num_heads": A} | changes


def cka_arguments(**changes):
    return {"student": torch.randn(B, LQ, 6), "teacher": torch.randn(B, LQ, 8)} | changes


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


ATTENTION_SHARED = [
    ({"divergence": "kl"}, ValueError, r"divergence: expected one of .*, got 'kl'"),
    ({"beta": 1.5}, ValueError, r"beta: expected a number in \(0, 1\), got 1.5"),
    ({"reduction": "batchmean"}, ValueError, r"reduction: expected one of mean, sum, none, got 'batchmean'"),
    ({"normalizer": 3, "reduction": "none"}, ValueError, r"normalizer: only used with reduction=\"mean\""),
    ({"impl": "triton"}, ValueError, r"impl: expected one of auto, reference, fused, got 'triton'"),
    ({"num_heads": 2.0}, TypeError, r"num_heads: expected an int, got float"),
    ({"num_heads": 0}, ValueError, r"num_heads: expected a divisor of 6 \(student\w*\) and 8 .*: 1, 2; got 0"),
    ({"num_heads": 4}, ValueError, r"num_heads: expected a divisor of 6 \(student\w*\) and 8 .*: 1, 2; got 4"),
    ({"causal": 1}, TypeError, r"causal: expected a bool, got int"),
    ({"key_mask": [True]}, (TypeError, ValueError), r"key_mask: expected "),
    ({"key_mask": torch.ones(B, LQ + 3).bool()}, ValueError, r"key_mask: expected shape \[2, \d\], got \[2, 8\]"),
    ({"key_mask": torch.ones(B, 1, LQ).bool()}, ValueError, r"key_mask: expected shape \[2, \d\], got \[2, 1, 5\]"),
]

ATTENTION = [
    ({"student_q": torch.randn(B, LQ)}, ValueError, r"student_q: expected shape \[any, any, any\], got \[2, 5\]"),
    ({"student_q": torch.zeros(B, LQ, 6).long()}, TypeError, r"student_q: expected dtype .*, got torch.int64"),
    ({"student_k": torch.randn(B, LK, 8)}, ValueError, r"student_k: expected shape \[2, any, 6\], got \[2, 7, 8\]"),
    ({"num_kv_heads": 3}, ValueError, r"num_kv_heads: expected a divisor of num_heads = 2: 1, 2; got 3"),
    ({"num_kv_heads": 0}, ValueError, r"num_kv_heads: expected a divisor of num_heads = 2: 1, 2; got 0"),
    ({"num_kv_heads": 1.5}, TypeError, r"num_kv_heads: expected an int, got float"),
    ({"num_kv_heads": 1}, ValueError, r"student_k: expected shape \[2, any, 3\], got \[2, 7, 6\]"),
    ({"teacher_num_kv_heads": 0}, ValueError, r"teacher_num_kv_heads: expected a divisor of num_heads = 2: .*got 0"),
    ({"teacher_num_kv_heads": 1}, ValueError, r"teacher_k: expected shape \[2, 7, 4\], got \[2, 7, 8\]"),
    ({"student_k": torch.randn(B, LK, 6).double()}, TypeError, r"student_k: expected dtype torch.float32, .*float64"),
    ({"teacher_q": torch.randn(B, LK, 8)}, ValueError, r"teacher_q: expected shape \[2, 5, any\], got \[2, 7, 8\]"),
    ({"teacher_k": torch.randn(B, LQ, 8)}, ValueError, r"teacher_k: expected shape \[2, 7, 8\], got \[2, 5, 8\]"),
    ({"teacher_k": None}, TypeError, r"teacher_k: expected a tensor, got NoneType"),
    ({"teacher_q": torch.randn(B, LQ, 8, device="meta")}, ValueError, r"teacher_q: expected device cpu, .*got meta"),
    ({"student_scale": "1"}, TypeError, r"student_scale: expected a number that is finite, got str"),
    ({"teacher_scale": float("inf")}, ValueError, r"teacher_scale: expected a number that is finite, got inf"),
    ({"causal": True}, ValueError, r"causal: expected as many queries as keys, got 5 and 7"),
    ({"key_mask": torch.ones(B, LK)}, TypeError, r"key_mask: expected a bool or integer dtype .*got torch.float32"),
    ({"query_mask": torch.ones(B, LK).bool()}, ValueError, r"query_mask: expected shape \[2, 5\], got \[2, 7\]"),
    ({"query_mask": torch.ones(B, LQ)}, TypeError, r"query_mask: expected a bool or integer dtype"),
    (
        {"student_bias": torch.randn(A, LK, LQ)},
        ValueError,
        r"student_bias: expected a shape that broadcasts to .*\[2, 2, 5, 7\], got \[2, 7, 5\]",
    ),
    ({"teacher_bias": torch.randn(1, 1, 1, 1, 1)}, ValueError, r"teacher_bias: expected a shape that broadcasts"),
    ({"teacher_bias": torch.ones(LQ, LK).bool()}, TypeError, r"teacher_bias: expected dtype"),
    ({"student_bias": 0.0}, TypeError, r"student_bias: expected a tensor or fastkd.RelativeBias, got float"),
    (
        {"student_bias": fastkd.RelativeBias(torch.randn(32, 3))},
        ValueError,
        r"student_bias.table: expected shape \[any, 2\], got \[32, 3\]",
    ),
]

RELATION = [
    ({"student": torch.randn(B, LQ)}, ValueError, r"student: expected shape \[any, any, any\], got \[2, 5\]"),
    ({"student": []}, ValueError, r"teacher: expected a list of 0"),
    ({"student": [], "teacher": []}, ValueError, r"student: expected at least one tensor, got an empty list"),
    ({"teacher": torch.randn(B, LQ + 1, 8)}, ValueError, r"teacher: expected shape \[2, 5, any\], got \[2, 6, 8\]"),
    ({"teacher": [torch.randn(B, LQ, 8)]}, ValueError, r"teacher: expected a tensor, as student is one, got 1"),
    ({"key_mask": torch.ones(B, LQ)}, TypeError, r"key_mask: expected a bool or integer dtype .*got torch.float32"),
    ({"causal": [True]}, TypeError, r"causal: expected a single one, as student is a single tensor, got list"),
]

RELATION_LISTS = [
    ({"teacher": [torch.randn(B, LQ, 8)] * 2}, ValueError, r"teacher: expected a list of 3, as many as student, got 2"),
    ({"teacher": torch.randn(B, LQ, 8)}, ValueError, r"teacher: expected a list of 3, .*got Tensor"),
    ({"causal": [True, False]}, ValueError, r"causal: expected one for each of 3 entries, got 2"),
    ({"key_mask": [None]}, ValueError, r"key_mask: expected one for each of 3 entries, got 1"),
    ({"normalizer": [1, 2]}, ValueError, r"normalizer: expected one for each of 3 entries, got 2"),
    ({"key_mask": torch.ones(B, LK).bool()}, ValueError, r"key_mask: expected shape \[2, 5\], got \[2, 7\]"),
    (
        {"student": [torch.randn(B, LQ, 6), torch.randn(B, LQ, 6), torch.randn(B, LQ, 9)]},
        ValueError,
        r"num_heads: expected a divisor of 6 \(student\[0\]\) .* and 9 \(student\[2\]\) .*: 1; got 2",
    ),
    (
        {"student": [torch.randn(B, LQ, 6), torch.randn(B, LQ, 6), torch.randn(B + 1, LQ, 6)]},
        ValueError,
        r"student\[2\]: expected shape \[2, any, any\], got \[3, 5, 6\]",
    ),
    (
        {"student": [torch.randn(B, LQ, 6), torch.randn(B, LQ, 6), torch.randn(B, LQ, 6).half()]},
        TypeError,
        r"student\[2\]: expected dtype torch.float32, that of student\[0\], got torch.float16",
    ),
]

CKA = [
    ({"student": "x"}, TypeError, r"student: expected a tensor, got str"),
    ({"student": torch.tensor(1.0)}, ValueError, r"student: expected shape \[..., d\] with d > 0, got \[\]"),
    ({"student": torch.zeros(B, LQ, 0)}, ValueError, r"student: expected shape .* d > 0, got \[2, 5, 0\]"),
    ({"student": torch.zeros(B, LQ, 6).long()}, TypeError, r"student: expected dtype .*, got torch.int64"),
    ({"teacher": torch.randn(B, LK, 8)}, ValueError, r"teacher: expected shape \[2, 5, any\], got \[2, 7, 8\]"),
    ({"teacher": torch.zeros(B, LQ, 0)}, ValueError, r"teacher: expected shape .* d > 0, got \[2, 5, 0\]"),
    ({"teacher": None}, TypeError, r"teacher: expected a tensor, got NoneType"),
    ({"teacher": [torch.randn(B, LQ, 8)]}, TypeError, r"teacher: expected a single one, as student .*, got a list"),
    ({"teacher": torch.randn(B, LQ, 8, device="meta")}, ValueError, r"teacher: expected device cpu, .*got meta"),
    ({"mask": torch.ones(B, LK).bool()}, ValueError, r"mask: expected shape \[2, 5\], got \[2, 7\]"),
    ({"mask": torch.ones(B, LQ)}, TypeError, r"mask: expected a bool or integer dtype .*got torch.float32"),
    ({"mask": [None]}, TypeError, r"mask: expected a single one, as student is a single tensor, got a list"),
    ({"eps": 0.0}, ValueError, r"eps: expected a number > 0, got 0.0"),
    ({"eps": float("nan")}, ValueError, r"eps: expected a number > 0, got nan"),
    ({"eps": "small"}, TypeError, r"eps: expected a number > 0, got str"),
    ({"squared": 1}, TypeError, r"squared: expected a bool, got int"),
    ({"debiased": None}, TypeError, r"debiased: expected a bool, got NoneType"),
    ({"reduction": "batchmean"}, ValueError, r"reduction: expected one of sum, mean, none, got 'batchmean'"),
    ({"impl": "triton"}, ValueError, r"impl: expected one of auto, reference, fused, got 'triton'"),
    ({"group": "world"}, TypeError, r"group: expected a torch.distributed.ProcessGroup or None, got str"),
]

CKA_LISTS = [
    ({"student": [], "teacher": []}, ValueError, r"student: expected at least one tensor, got an empty list"),
    ({"teacher": torch.randn(B, LQ, 8)}, TypeError, r"teacher: expected a list of 2, as student is one, got Tensor"),
    ({"teacher": [torch.randn(B, LQ, 8)]}, ValueError, r"teacher: expected a list of 2, as many as student, got 1"),
    ({"mask": [None]}, ValueError, r"mask: expected a list of 2, as many as student, got 1"),
    ({"mask": [None, torch.ones(B, LQ)]}, TypeError, r"mask\[1\]: expected a bool or integer dtype"),
    ({"mask": torch.ones(B, LK).bool()}, ValueError, r"mask: expected shape \[2, 5\], got \[2, 7\]"),
    (
        {"student": [torch.randn(B, LQ, 6), torch.randn(B, LQ, 6).half()]},
        TypeError,
        r"student\[1\]: expected dtype torch.float32, that of student\[0\], got torch.float16",
    ),
    (
        {"student": [torch.randn(B, LQ, 6), torch.randn(B, LK, 6)]},
        ValueError,
        r"teacher\[1\]: expected shape \[2, 7, any\], got \[2, 5, 8\]",
    ),
]

RELATIVE_BIAS = [
    ({"table": torch.randn(32)}, ValueError, r"RelativeBias.table: expected shape \[any, any\], got \[32\]"),
    ({"table": torch.randn(31, 2)}, ValueError, r"RelativeBias.table: expected an even number of buckets"),
    (
        {"table": torch.randn(1, 2), "bidirectional": False},
        ValueError,
        r"RelativeBias.table: expected at least 2 buckets",
    ),
    ({"table": torch.zeros(32, 2).long()}, TypeError, r"RelativeBias.table: expected dtype"),
    ({"table": torch.randn(32, 2), "max_distance": 8}, ValueError, r"max_distance: expected more than the 8 .*got 8"),
    ({"table": torch.randn(32, 2), "max_distance": 1.5}, TypeError, r"max_distance: expected an int, got float"),
    ({"table": torch.randn(32, 2), "bidirectional": 1}, TypeError, r"bidirectional: expected a bool, got int"),
]


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("changes", "error", "message"), ATTENTION_SHARED + ATTENTION)
def test_attention_kl_refuses(changes, error, message, impl):
    with pytest.raises(error, match=message):
        fastkd.attention_kl(**attention_arguments(**({"impl": impl} | changes)))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("changes", "error", "message"), ATTENTION_SHARED + RELATION)
def test_relation_kl_refuses(changes, error, message, impl):
    with pytest.raises(error, match=message):
        fastkd.relation_kl(**relation_arguments(**({"impl": impl} | changes)))


@pytest.mark.parametrize(("changes", "error", "message"), RELATION_LISTS)
def test_relation_kl_refuses_lists(changes, error, message):
    lists = {"student": [torch.randn(B, LQ, 6)] * 3, "teacher": [torch.randn(B, LQ, 8)] * 3}
    with pytest.raises(error, match=message):
        fastkd.relation_kl(**relation_arguments(**(lists | changes)))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("changes", "error", "message"), CKA)
def test_cka_loss_refuses(changes, error, message, impl):
    with pytest.raises(error, match=message):
        fastkd.cka_loss(**cka_arguments(**({"impl": impl} | changes)))


@pytest.mark.parametrize(("changes", "error", "message"), CKA_LISTS)
def test_cka_loss_refuses_lists(changes, error, message):
    lists = {"student": [torch.randn(B, LQ, 6)] * 2, "teacher": [torch.randn(B, LQ, 8)] * 2}
    with pytest.raises(error, match=message):
        fastkd.cka_loss(**(lists | changes))


@pytest.mark.parametrize(("changes", "error", "message"), RELATIVE_BIAS)
def test_relative_bias_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        fastkd.RelativeBias(**changes)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("changes", "error", "message"), SHARED + LOGIT)
def test_logit_kl_refuses(changes, error, message, impl):
    with pytest.raises(error, match=message):
        fastkd.logit_kl(**logit_arguments(**({"impl": impl} | changes)))


@pytest.mark.parametrize(("changes", "error", "message"), SHARED + LINEAR)
def test_linear_kl_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        fastkd.linear_kl(**linear_arguments(**changes))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(
    ("op", "make"),
    [
        ("logit_kl", logit_arguments),
        ("linear_kl", linear_arguments),
        ("attention_kl", attention_arguments),
        ("relation_kl", relation_arguments),
        ("cka_loss", cka_arguments),
    ],
)
def test_sparse_tensors_are_refused(op, make, impl):
    others = {
        "logit_kl": {"weight": torch.ones(T), "labels": torch.ones(T).long()},
        "linear_kl": {"weight": torch.ones(T), "labels": torch.ones(T).long(), "student_bias": torch.randn(V)},
        "attention_kl": {"key_mask": torch.ones(B, LK).bool(), "student_bias": torch.randn(LQ, LK)},
        "relation_kl": {"key_mask": torch.ones(B, LQ).bool()},
        "cka_loss": {"mask": torch.ones(B, LQ).bool()},
    }[op]
    arguments = make(**others, impl=impl)
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor):
            with pytest.raises(TypeError, match=f"{name}: expected a dense tensor, got one of layout torch.sparse_coo"):
                getattr(fastkd, op)(**(arguments | {name: x.to_sparse()}))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout):
    nested = torch.nested.nested_tensor([torch.randn(3, V), torch.randn(2, V)], layout=layout)
    with pytest.raises(TypeError, match="student_logits: expected a dense tensor, got a nested one"):
        fastkd.logit_kl(nested, nested)


def test_sparse_top_k_is_refused():
    ids, log_probs = torch.zeros(T, 1).long(), torch.zeros(T, 1)
    with pytest.raises(TypeError, match=r"TopK.indices: expected a dense tensor, got one of layout torch.sparse_coo"):
        fastkd.TopK(ids.to_sparse(), log_probs)
    with pytest.raises(TypeError, match=r"TopK.log_probs: expected a dense tensor, got one of layout torch.sparse_coo"):
        fastkd.TopK(ids, log_probs.to_sparse())


def test_labels_beyond_the_students_vocabulary():
    """One that only the teacher's holds has no probability; one that only the student's holds has."""
    labels = torch.full((T,), 10)
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 9\)"):
        fastkd.logit_kl(torch.randn(T, 9), torch.randn(T, V), labels=labels, ce_weight=1.0)
    assert fastkd.logit_kl(torch.randn(T, V), torch.randn(T, 9), labels=labels, ce_weight=1.0).isfinite()
