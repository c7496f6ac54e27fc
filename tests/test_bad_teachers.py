"""Top-k teachers that are none are refused in one clear error, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd import Head, TopK
from fastkd.teachers import TAILS

T, K, V = (2, 3), 4, 11
INF, NAN = float("inf"), float("nan")


def arguments(**changes: Any) -> dict[str, Any]:
    ids = torch.tensor([[[0, 5, 2, 9], [3, 1, 50, -1], [4, 8, -1, -1]]] * 2)
    masses = torch.tensor([[[0.4, 0.2, 0.1, 0.1], [0.5, 0.2, 0.1, 0.7], [0.2, 0.1, 0.0, 0.0]]] * 2)
    return {"indices": ids, "log_probs": masses.log()} | changes


def with_at(x: Tensor, value: float, place: tuple[int, ...] = (1, 0, 2)) -> Tensor:
    x = x.clone()
    x[place] = value
    return x


IDS, LOG_PROBS = arguments()["indices"], arguments()["log_probs"]
REST = (1 - LOG_PROBS.exp().masked_fill(IDS < 0, 0).sum(-1)).log()

# Each is wrong whatever the tail: what is changed, the error and its words.
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"indices": IDS.tolist()}, TypeError, r"TopK.indices: expected a tensor, got list"),
    ({"indices": None}, TypeError, r"TopK.indices: expected a tensor, got NoneType"),
    ({"indices": IDS.float()}, TypeError, r"TopK.indices: expected an integer dtype, got torch.float32"),
    ({"indices": IDS.bfloat16()}, TypeError, r"TopK.indices: expected an integer dtype, got torch.bfloat16"),
    ({"indices": IDS > 0}, TypeError, r"TopK.indices: expected an integer dtype, got torch.bool"),
    ({"indices": IDS.cfloat()}, TypeError, r"TopK.indices: expected an integer dtype, got torch.complex64"),
    ({"indices": torch.tensor(3)}, ValueError, r"TopK.indices: expected shape \[..., K\] with K > 0, got \[\]"),
    (
        {"indices": IDS[..., :0], "log_probs": LOG_PROBS[..., :0]},
        ValueError,
        r"TopK.indices: expected shape \[..., K\] with K > 0, got \[2, 3, 0\]",
    ),
    ({"indices": with_at(IDS, -2)}, ValueError, r"TopK.indices: expected ids >= 0, or -1 for padding, got -2"),
    ({"indices": with_at(IDS, -100)}, ValueError, r"TopK.indices: expected ids >= 0, .*, got -100"),
    ({"indices": with_at(IDS, -100).to(torch.int8)}, ValueError, r"TopK.indices: expected ids >= 0, .*, got -100"),
    ({"indices": with_at(IDS, -(2**31)).int()}, ValueError, r"TopK.indices: expected ids >= 0, .*, got -2147483648"),
    ({"indices": with_at(IDS, -(2**63))}, ValueError, r"TopK.indices: expected ids >= 0, .*, got -9223372036854775808"),
    ({"indices": with_at(IDS, 5)}, ValueError, r"TopK.indices: expected no id twice in a row, got 5 twice"),
    ({"indices": with_at(IDS, 9).short()}, ValueError, r"TopK.indices: expected no id twice in a row, got 9 twice"),
    (
        {"indices": with_at(IDS, 50, (0, 1, 0))},
        ValueError,
        r"TopK.indices: expected no id twice in a row, got 50 twice",
    ),
    ({"indices": with_at(IDS, 0, (1, 0, 3)).to(torch.int8)}, ValueError, r"TopK.indices: .* twice in a row, got 0"),
    ({"indices": IDS[0]}, ValueError, r"TopK.log_probs: expected shape \[3, 4\], got \[2, 3, 4\]"),
    ({"indices": IDS[..., :3]}, ValueError, r"TopK.log_probs: expected shape \[2, 3, 3\], got \[2, 3, 4\]"),
    ({"indices": IDS[..., None]}, ValueError, r"TopK.log_probs: expected shape \[2, 3, 4, 1\], got \[2, 3, 4\]"),
    ({"indices": IDS.to("meta")}, ValueError, r"TopK.log_probs: expected device meta, that of the indices, got cpu"),
    (
        {"indices": IDS.to("meta"), "log_probs": LOG_PROBS.to("meta")},
        ValueError,
        r"TopK.indices: expected device cpu, that of the student, got meta",
    ),
    *(
        ({"indices": IDS[part], "log_probs": LOG_PROBS[part]}, ValueError, rf"TopK.indices: expected shape {shape}")
        for part, shape in [
            (0, r"\[2, 3, any\], got \[3, 4\]"),
            ((0, 0), r"\[2, 3, any\], got \[4\]"),
            ((slice(None), slice(2)), r"\[2, 3, any\], got \[2, 2, 4\]"),
            ((slice(1),), r"\[2, 3, any\], got \[1, 3, 4\]"),
            ((slice(0),), r"\[2, 3, any\], got \[0, 3, 4\]"),
            (None, r"\[2, 3, any\], got \[1, 2, 3, 4\]"),
        ]
    ),
    ({"log_probs": LOG_PROBS.tolist()}, TypeError, r"TopK.log_probs: expected a tensor, got list"),
    ({"log_probs": None}, TypeError, r"TopK.log_probs: expected a tensor, got NoneType"),
    ({"log_probs": LOG_PROBS.long()}, TypeError, r"TopK.log_probs: expected dtype float32, .*, got torch.int64"),
    ({"log_probs": LOG_PROBS > -1}, TypeError, r"TopK.log_probs: expected dtype float32, .*, got torch.bool"),
    ({"log_probs": LOG_PROBS.cfloat()}, TypeError, r"TopK.log_probs: expected dtype float32, .*, got torch.complex64"),
    (
        {"log_probs": LOG_PROBS.to(torch.float8_e5m2)},
        TypeError,
        r"TopK.log_probs: expected dtype float32, .*, got torch.float8_e5m2",
    ),
    ({"log_probs": LOG_PROBS[..., :3]}, ValueError, r"TopK.log_probs: expected shape \[2, 3, 4\], got \[2, 3, 3\]"),
    ({"log_probs": LOG_PROBS[0]}, ValueError, r"TopK.log_probs: expected shape \[2, 3, 4\], got \[3, 4\]"),
    ({"log_probs": LOG_PROBS.mT}, ValueError, r"TopK.log_probs: expected shape \[2, 3, 4\], got \[2, 4, 3\]"),
    ({"log_probs": LOG_PROBS.to("meta")}, ValueError, r"TopK.log_probs: expected device cpu, that of the indices"),
    *(
        ({"log_probs": with_at(LOG_PROBS, value).to(dtype)}, ValueError, rf"TopK.log_probs: .* <= 0, got {value}")
        for value in (NAN, INF, 0.5, 7.0)
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    ),
    (
        {"log_probs": LOG_PROBS.exp()},
        ValueError,
        r"TopK.log_probs: expected log-probabilities, which are <= 0, got 0.4",
    ),
    ({"log_probs": -LOG_PROBS}, ValueError, r"TopK.log_probs: expected log-probabilities, which are <= 0, got 0.9"),
    (
        {"log_probs": LOG_PROBS / 2},
        ValueError,
        r"TopK.log_probs: expected probabilities that sum to at most 1, got 1.7",
    ),
    ({"log_probs": LOG_PROBS.half() * 0.5}, ValueError, r"TopK.log_probs: .* that sum to at most 1, got 1.7"),
    ({"log_probs": with_at(LOG_PROBS, 0)}, ValueError, r"TopK.log_probs: .* that sum to at most 1, got 1.7"),
    ({"log_probs": LOG_PROBS + 0.3}, ValueError, r"TopK.log_probs: .* that sum to at most 1, got 1.07"),
    ({"temperature": 0.0}, ValueError, r"TopK.temperature: expected a number > 0, got 0.0"),
    ({"temperature": -1}, ValueError, r"TopK.temperature: expected a number > 0, got -1"),
    ({"temperature": NAN}, ValueError, r"TopK.temperature: expected a number > 0, got nan"),
    ({"temperature": INF}, ValueError, r"TopK.temperature: expected a number > 0, got inf"),
    ({"temperature": "1"}, TypeError, r"TopK.temperature: expected a number > 0, got str"),
    ({"temperature": None}, TypeError, r"TopK.temperature: expected a number > 0, got NoneType"),
    ({"temperature": True}, TypeError, r"TopK.temperature: expected a number > 0, got bool"),
]

# Wrong of the tail that is named.
TAIL = r"TopK.tail: expected one of bucket, ignore, renormalize, conditional, got "
REST_NAME = r"TopK.tail_log_prob: expected "
WRONG_TAILS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"tail": "buckets"}, ValueError, TAIL + "'buckets'; did you mean 'bucket'?"),
    ({"tail": "renormalise"}, ValueError, TAIL + "'renormalise'; did you mean 'renormalize'?"),
    ({"tail": ""}, ValueError, TAIL + "''"),
    ({"tail": None}, ValueError, TAIL + "None"),
    ({"tail": True}, ValueError, TAIL + "True"),
    *(
        ({"tail": tail, "tail_log_prob": REST}, ValueError, r'TopK.tail_log_prob: only used with tail="bucket", got ')
        for tail in TAILS[1:]
    ),
    ({"tail_log_prob": REST[..., None]}, ValueError, REST_NAME + r"shape \[2, 3\], got \[2, 3, 1\]"),
    ({"tail_log_prob": REST[0]}, ValueError, REST_NAME + r"shape \[2, 3\], got \[3\]"),
    ({"tail_log_prob": torch.tensor(0.0)}, ValueError, REST_NAME + r"shape \[2, 3\], got \[\]"),
    ({"tail_log_prob": REST.long()}, TypeError, REST_NAME + r"dtype float32, .*, got torch.int64"),
    ({"tail_log_prob": REST.tolist()}, TypeError, REST_NAME + r"a tensor, got list"),
    ({"tail_log_prob": -0.5}, TypeError, REST_NAME + r"a tensor, got float"),
    ({"tail_log_prob": REST.to("meta")}, ValueError, REST_NAME + r"device cpu, that of the indices, got meta"),
    ({"tail_log_prob": with_at(REST, NAN, (1, 1))}, ValueError, REST_NAME + r"log-probabilities, .*, got nan"),
    ({"tail_log_prob": with_at(REST, 0.5, (1, 1))}, ValueError, REST_NAME + r"log-probabilities, .*, got 0.5"),
    ({"tail_log_prob": REST.exp()}, ValueError, REST_NAME + r"log-probabilities, .*, got 0.19"),
    ({"tail_log_prob": REST * 0}, ValueError, REST_NAME + r"probabilities that sum to 1 with the ids', got 1.8"),
    ({"tail_log_prob": REST * 2}, ValueError, REST_NAME + r"probabilities that sum to 1 with the ids', got 0.84"),
    (
        {"tail_log_prob": with_at(REST, -INF, (1, 1))},
        ValueError,
        REST_NAME + r"probabilities that sum to 1 .*, got 0.8",
    ),
]


LOGITS, HIDDEN, WEIGHT = torch.randn(*T, V), torch.randn(*T, 6), torch.randn(V, 6)
LOSSES: list[Callable[[TopK], Tensor]] = [
    lambda teacher: fastkd.logit_kl(LOGITS, teacher),
    lambda teacher: fastkd.linear_kl(HIDDEN, WEIGHT, teacher),
]


class Untouched(TorchDispatchMode):
    """Fails where anything is computed of the student."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(x is student for x in args for student in (LOGITS, HIDDEN, WEIGHT)), func
        return func(*args, **(kwargs or {}))


def malformed() -> Iterator[Any]:
    for i, (changes, error, message) in enumerate(WRONG):
        for tail in TAILS:
            yield pytest.param(changes | {"tail": tail}, error, message, id=f"{i}-{tail}")
    for i, (changes, error, message) in enumerate(WRONG_TAILS):
        yield pytest.param(changes, error, message, id=f"tail-{i}")


MALFORMED = list(malformed())


def test_what_the_others_change_is_right() -> None:
    for loss in LOSSES:
        for tail in TAILS:
            assert loss(TopK(**arguments(tail=tail))).isfinite()
        assert loss(TopK(**arguments(tail_log_prob=REST))).isfinite()
        with pytest.raises(AssertionError), Untouched():
            loss(TopK(**arguments()))
    assert len(MALFORMED) >= 200


@pytest.mark.parametrize(("changes", "error", "message"), MALFORMED)
def test_malformed_teachers_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    for loss in LOSSES:
        with pytest.raises(error, match=message), Untouched():
            loss(TopK(**arguments(**changes)))


def test_values_are_looked_at_once_and_again_where_they_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, look = [], TopK._check_values
    monkeypatch.setattr(TopK, "_check_values", lambda teacher: (looks.append(1), look(teacher)))
    teacher = TopK(**arguments(indices=IDS.clone()))
    for loss in LOSSES * 2:
        loss(teacher)
    assert len(looks) == 1
    teacher.indices[1, 0, 2] = 5
    for loss in LOSSES:
        with pytest.raises(ValueError, match=r"TopK.indices: expected no id twice in a row, got 5 twice"):
            loss(teacher)


# ---- what goes with a teacher's hidden states alone -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ({"teacher_weight": WEIGHT}, "None, .*, got Tensor"),
        ({"teacher_weight": Head(WEIGHT)}, "None, .*, got Head"),
        ({"teacher_bias": WEIGHT[:, 0]}, "None, .*, got Tensor"),
        ({"teacher_scale": 0.5}, "1.0, .*, got 0.5"),
        ({"teacher_scale": 0}, "1.0, .*, got 0"),
        ({"teacher_scale": torch.tensor(1.0)}, "1.0, .*, got Tensor"),
        ({"teacher_softcap": 30.0}, "None, .*, got 30.0"),
    ],
)
def test_a_dense_teachers_head_is_not_left_out_in_silence(given: dict[str, Any], got: str) -> None:
    (name,) = given
    message = rf"^{name}: expected {got}; leave it out: where TopK.from_hidden"
    for kd_weight in (1.0, 0.0):
        with pytest.raises(ValueError, match=message), Untouched():
            fastkd.linear_kl(HIDDEN, WEIGHT, TopK(**arguments()), kd_weight=kd_weight, **given)
    if name in ("teacher_scale", "teacher_softcap") and given[name] != 1:
        loss = fastkd.nn.LinearKLLoss(**given)  # it may be called with hidden states
        with pytest.raises(ValueError, match=message):
            loss(HIDDEN, WEIGHT, TopK(**arguments()))


def test_a_head_that_changes_nothing_is_none() -> None:
    teacher = TopK(**arguments())
    loss = fastkd.linear_kl(HIDDEN, WEIGHT, teacher, None, teacher_bias=None, teacher_scale=1, teacher_softcap=None)
    assert loss == fastkd.linear_kl(HIDDEN, WEIGHT, teacher)


# ---- what makes them ------------------------------------------------------------------------------------------------


def binary(**changed: object) -> dict[str, object]:
    """TRL's answer in base64, of one token with two entries, all of them id 0 at log-probability 0."""
    return {"token_ids_b64": "AAAAAAAAAAA=", "logprobs_b64": "AAAAAAAAAAA=", "shape": [1, 1, 2], **changed}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TopK.from_logits(LOGITS.tolist(), 2), TypeError, r"logits: expected a tensor, got list"),
        (lambda: TopK.from_logits(LOGITS.long(), 2), TypeError, r"logits: expected dtype .*, got torch.int64"),
        (lambda: TopK.from_logits(torch.tensor(1.0), 1), ValueError, r"logits: expected shape .* got \[\]"),
        (lambda: TopK.from_logits(LOGITS[..., :0], 1), ValueError, r"logits: expected shape .* got \[2, 3, 0\]"),
        (lambda: TopK.from_logits(LOGITS, 0), ValueError, r"k: expected at least 1 and at most .* 11, got 0"),
        (lambda: TopK.from_logits(LOGITS, 12), ValueError, r"k: expected at least 1 and at most .* 11, got 12"),
        (lambda: TopK.from_logits(LOGITS, 2.0), TypeError, r"k: expected an int, got float"),
        (lambda: TopK.from_logits(LOGITS, 2, tail="all"), ValueError, r"tail: expected one of bucket, .*, got 'all'"),
        (lambda: TopK.from_logits(LOGITS, 2, temperature=0), ValueError, r"temperature: expected a number > 0, got 0"),
        (lambda: TopK.sampled(LOGITS, 0), ValueError, r"n: expected at least 1, got 0"),
        (lambda: TopK.sampled(LOGITS, 2, temperature=NAN), ValueError, r"temperature: expected a number > 0, got nan"),
        (lambda: TopK.from_hidden(HIDDEN, WEIGHT[:, :5], 2), ValueError, r"weight: expected shape \[any, 6\], got"),
        (lambda: TopK.from_hidden(HIDDEN, WEIGHT.half(), 2), TypeError, r"weight: expected torch.float32, the dtype"),
        (lambda: TopK.from_hidden(HIDDEN, WEIGHT.to("meta"), 2), ValueError, r"weight: expected device cpu, that of"),
        (lambda: TopK.from_hidden(HIDDEN, WEIGHT, 12), ValueError, r"k: expected at least 1 and at most .* 11, got 12"),
        (lambda: TopK.from_hidden(HIDDEN, Head(WEIGHT, WEIGHT), 2), ValueError, r"bias: expected shape \[11\], got"),
        (lambda: TopK.from_hidden(HIDDEN, Head(WEIGHT, scale=INF), 2), ValueError, r"scale: expected a number that is"),
        (lambda: TopK.from_hidden(HIDDEN, Head(WEIGHT, softcap=0), 2), ValueError, r"softcap: expected a number > 0"),
        (lambda: TopK.from_lists([[1, 2]], [[-1.0]]), ValueError, r"log_probs: expected the lengths of the ids, 2"),
        (lambda: TopK.from_lists([[1, 2]], [-1.0]), ValueError, r"log_probs: expected lists in lists 2 deep"),
        (lambda: TopK.from_lists([[1.5]], [[-1.0]]), TypeError, r"from_lists.indices: expected integers, got float"),
        (lambda: TopK.from_lists([["a"]], [[-1.0]]), TypeError, r"TopK.from_lists.indices: expected integers, got str"),
        (lambda: TopK.from_lists([[2**70]], [[-1.0]]), TypeError, r"TopK.from_lists.indices: .* beyond 64 bits"),
        (lambda: TopK.from_lists([[1], 2], [[-1.0], [-1.0]]), TypeError, r"indices: expected a list, got int"),
        (lambda: TopK.from_lists([[1]], [["x"]]), TypeError, r"TopK.from_lists.log_probs: expected numbers, got str"),
        (lambda: TopK.from_vllm({"choices": []}), ValueError, r"TopK.from_vllm: expected ids of .*, got 'choices'"),
        (lambda: TopK.from_vllm([7]), TypeError, r"TopK.from_vllm: expected a list with a dict .*, got int"),
        (
            lambda: TopK.from_vllm([[{"token": "the", "logprob": -1.0}]]),
            ValueError,
            r"TopK.from_vllm: expected ids of tokens, .* \(return_tokens_as_token_ids\), got 'the'",
        ),
        (lambda: TopK.from_trl({"logprobs": []}), ValueError, r"TopK.from_trl: expected logprob_token_ids .*, got log"),
        (lambda: TopK.from_trl({}), ValueError, "got an empty dict"),
        (lambda: TopK.from_trl([]), TypeError, "TopK.from_trl: expected the server's answer, a dict, got list"),
        (lambda: TopK.from_trl(binary(shape="x")), ValueError, "shape: expected a list of sizes, got 'x'"),
        (lambda: TopK.from_trl(binary(shape=[1, 3])), ValueError, "token_ids_b64: expected 12 bytes for .*, got 8"),
        (lambda: TopK.from_trl(binary(logprobs_b64="AAAA")), ValueError, "logprobs_b64: expected 8 bytes .*, got 3"),
        (lambda: TopK.from_trl(binary(logprobs_b64="!!!")), ValueError, "logprobs_b64: expected base64, got '!!!'"),
        (lambda: TopK.from_trl(binary(token_ids_b64=None)), ValueError, "token_ids_b64: expected base64, got None"),
        (
            lambda: TopK.from_columns({"ids": [], "values": []}, "ids", "value"),
            ValueError,
            r"TopK.from_columns: log_probs: expected one of ids, values, got 'value'",
        ),
        (
            lambda: TopK.from_columns({"compressed_logprobs": [], "bytepacked_indices": []}, "ids", "values"),
            ValueError,
            r"indices: expected one of .*, got 'ids'; DistillKit's compressed columns are not read",
        ),
        (
            lambda: TopK.from_columns({"i": [[1]], "v": [[-1.0]], "m": [[1, 0]]}, "i", "v", "m"),
            ValueError,
            r"TopK.from_columns.mask: expected the lengths of the ids, 1 in list 0 of level 1, got 2",
        ),
    ],
)  # fmt: skip
def test_makers_refuse(make: Callable[[], TopK], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
