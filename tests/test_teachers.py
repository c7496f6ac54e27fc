"""fastkd.TopK: made of logits and of a head, read of lists, indexed as a tensor of tokens, and what ops get of it."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd import Head, TopK, teacher_scores
from fastkd.teachers import TAILS

INF = float("inf")


def dense(teacher: TopK, vocabulary: int) -> Tensor:
    """What the entries give each column, [..., V] float64."""
    ids, masses = teacher.indices.long(), teacher.log_probs.double().exp()
    entries = masses.masked_fill((ids < 0) | (ids >= vocabulary), 0)
    return torch.zeros(*teacher.shape, vocabulary).double().scatter_add(-1, ids.clamp(0, vocabulary - 1), entries)


# ---- made of logits -------------------------------------------------------------------------------------------------


def whole(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log-probabilities and the tail's, of all logits at once in float64."""
    log_probs = (logits.double() / temperature).log_softmax(-1)
    values, ids = log_probs.topk(k)
    return ids, values, log_probs.scatter(-1, ids, -INF).logsumexp(-1)


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many chunks":
        monkeypatch.setattr(teacher_scores, "_CHUNK", 100)
        monkeypatch.setattr(teacher_scores, "_COLUMNS", 13)


def assert_is_whole(teacher: TopK, logits: Tensor, temperature: float = 1.0, **bounds: float) -> None:
    ids, log_probs, rest = whole(logits, teacher.indices.shape[-1], temperature)
    bounds = bounds or {"rtol": 1e-6, "atol": 1e-6}
    assert torch.equal(teacher.indices, ids)
    torch.testing.assert_close(teacher.log_probs.double(), log_probs, **bounds)
    assert teacher.tail_log_prob is not None
    torch.testing.assert_close(teacher.tail_log_prob.double(), rest, **bounds)
    teacher.check(logits.shape[:-1], logits.device)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("deviation", [1, 5, 30])
@pytest.mark.parametrize("k", [1, 8, 40])
def test_the_top_of_logits_is_exact(k: int, deviation: float) -> None:
    logits = torch.randn(3, 7, 40) * deviation
    assert_is_whole(TopK.from_logits(logits, k), logits)
    assert_is_whole(TopK.from_logits(logits, k, temperature=2.5), logits, 2.5)
    shifted = logits[:, :-1]  # does not collapse into rows without a copy
    assert_is_whole(TopK.from_logits(shifted, k), shifted)
    assert TopK.from_logits(logits.double(), k).log_probs.dtype == torch.float64


@pytest.mark.usefixtures("chunks")
def test_a_tail_of_next_to_nothing_has_its_digits() -> None:
    logits = torch.randn(5, 40)
    logits[:, 3] += 30  # the rest has a mass of about 1e-12
    teacher = TopK.from_logits(logits + 100, 1)
    assert teacher.tail_log_prob is not None and (teacher.tail_log_prob < -24).all()
    assert_is_whole(teacher, logits + 100)


@pytest.mark.usefixtures("chunks")
def test_nearly_all_mass_in_the_tail_has_its_digits() -> None:
    logits = torch.randn(5, 40, dtype=torch.float64) * 0.01 + 300.3
    teacher = TopK.from_logits(logits.float(), 1)
    assert_is_whole(teacher, logits.float(), rtol=2e-7, atol=0)


def test_logits_of_minus_infinity_are_padding() -> None:
    logits = torch.randn(4, 10)
    logits[:, 2:] = -INF
    teacher = TopK.from_logits(logits, 5)
    assert (teacher.log_probs[:, 2:] == -INF).all() and (teacher.tail_log_prob == -INF).all()
    teacher.check(logits.shape[:-1], logits.device)
    ids, log_probs, _ = teacher.for_op(1.0, 10)
    assert (ids[:, 2:] == -1).all()
    torch.testing.assert_close(log_probs[:, :2].exp().sum(-1), torch.ones(4).double())


class Sizes(TorchDispatchMode):
    """The largest tensor that anything makes, by its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and not any(x.data_ptr() == y.data_ptr() for y in args if isinstance(y, Tensor)):
                self.largest[x.dtype] = max(self.largest.get(x.dtype, 0), x.numel())
        return out


def test_nothing_of_the_logits_size_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_scores, "_CHUNK", 1000)
    monkeypatch.setattr(teacher_scores, "_COLUMNS", 50)
    logits = torch.randn(40, 3, 200).bfloat16()
    hidden, weight = torch.randn(40, 3, 8).bfloat16(), torch.randn(200, 8).bfloat16()
    for make in (
        lambda: TopK.from_logits(logits[:, :-1], 4),
        lambda: TopK.sampled(logits[:, :-1], 4),
        lambda: TopK.from_hidden(hidden, weight, 4),
    ):
        with Sizes() as sizes:
            make()
        assert sizes.largest.get(torch.bfloat16, 0) <= 1000
        assert 0 < max(sizes.largest.values()) <= 1000


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_top_of_a_head_is_that_of_its_logits(temperature: float, dtype: torch.dtype) -> None:
    hidden, weight, bias = torch.randn(2, 11, 6).to(dtype), torch.randn(70, 6).to(dtype), torch.randn(70)
    logits = hidden.double() @ weight.double().T
    capped = 6 * torch.tanh((0.3 * logits + bias.double()) / 6)
    heads: list[tuple[Tensor | Head, Tensor]] = [(weight, logits), (Head(weight, bias, 0.3, 6.0), capped)]
    for head, wanted in heads:
        teacher = TopK.from_hidden(hidden, head, 9, temperature=temperature)
        assert_is_whole(teacher, wanted, temperature, rtol=0, atol=5e-6)
    assert teacher.log_probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("k", [1, 5])
def test_blocks_of_minus_infinity_do_no_harm(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    monkeypatch.setattr(teacher_scores, "_COLUMNS", 10)
    bias = torch.zeros(40)
    bias[:10] = bias[20:30] = -INF
    hidden, weight = torch.randn(6, 4), torch.randn(40, 4)
    assert_is_whole(TopK.from_hidden(hidden, Head(weight, bias), k), hidden @ weight.T + bias)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (40,)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape)
    for teacher in (
        TopK.from_logits(logits, 3),
        TopK.sampled(logits, 3),
        TopK.from_hidden(logits, torch.randn(70, 40), 3),
    ):
        assert teacher.indices.shape == (*shape[:-1], 3)
        teacher.check(logits.shape[:-1], logits.device)


# ---- drawn ----------------------------------------------------------------------------------------------------------


def gradient(student: Tensor, teacher: Tensor | TopK) -> Tensor:
    leaf = student.clone().requires_grad_()
    fastkd.logit_kl(leaf, teacher, reduction="sum").backward()
    assert leaf.grad is not None
    return leaf.grad


def test_the_gradient_of_draws_is_right_on_average_and_that_of_a_cut_is_not() -> None:
    """The mean gradient is the dense one, within five deviations of it; the top alone leads elsewhere."""
    logits, student, n, repetitions = torch.randn(4, 30).double() * 2, torch.randn(4, 30).double(), 8, 1000
    drawn = TopK.sampled(logits.repeat(repetitions, 1, 1), n, generator=torch.Generator().manual_seed(1))
    mean, right = gradient(student.repeat(repetitions, 1, 1), drawn).mean(0), gradient(student, logits)
    p = logits.softmax(-1)
    deviation = (p * (1 - p) / (n * repetitions)).sqrt()  # of the shares, and so of the gradient
    assert ((mean - right).abs() < 5 * deviation).all()
    for tail in ("ignore", "renormalize", "bucket"):
        cut = gradient(student, TopK.from_logits(logits, n, tail=tail))
        assert ((cut - right).abs() > 5 * deviation).any(-1).all()


@pytest.mark.usefixtures("chunks")
def test_draws_are_distributions() -> None:
    logits = torch.randn(3, 5, 30).bfloat16()
    logits[..., 7] = -INF
    drawn = TopK.sampled(logits, 16)
    drawn.check(logits.shape[:-1], logits.device)
    assert drawn.tail == "ignore"
    torch.testing.assert_close(dense(drawn, 30).sum(-1), torch.ones(3, 5).double(), rtol=0, atol=1e-6)
    assert not (drawn.indices == 7).any()
    assert ((drawn.log_probs == -INF) == (drawn.indices == -1)).all()
    first = torch.zeros(1, 30)
    first[:, :20] = -INF  # a draw of exactly 0 is an id that has some probability
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *size, generator, **options: torch.zeros(*size, **options))
        assert TopK.sampled(first, 4).indices.tolist() == [[20, -1, -1, -1]]
    again = [TopK.sampled(logits, 16, generator=torch.Generator().manual_seed(s)).indices for s in (3, 3, 4)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])


def test_draws_from_what_is_not_finite_are_seen() -> None:
    logits = torch.randn(3, 5)
    logits[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"TopK.log_probs: expected log-probabilities, .* got nan"):
        TopK.sampled(logits, 4).check(logits.shape[:-1], logits.device)


# ---- what ops get ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [5, 20])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", TAILS)
def test_for_op(tail: str, temperature: float, vocabulary: int) -> None:
    """Entry by entry, in plain Python."""
    ids = torch.tensor([[3, 9, -1, 0], [4, 2, 1, 7], [-1, 5, -1, 6]])
    masses = torch.tensor([[0.5, 0.2, 0.9, 0.0], [0.4, 0.3, 0.2, 0.1], [0.7, 0.0, 0.3, 0.0]], dtype=torch.float64)
    teacher = TopK(ids, masses.log(), tail)
    teacher.check(ids.shape[:-1], ids.device)
    got_ids, got_log_probs, got_rest = teacher.for_op(temperature, vocabulary)
    for row in range(3):
        known = {i: m for i, m in zip(ids[row].tolist(), masses[row].tolist(), strict=True) if i >= 0 and m > 0}
        rest = max(1e-12, 1 - sum(known.values()))
        if temperature != 1:
            powers = {i: m ** (1 / temperature) for i, m in known.items()}
            total = sum(powers.values()) + rest ** (1 / temperature)
            known, rest = {i: m / total for i, m in powers.items()}, rest ** (1 / temperature) / total
        inside = {i: m for i, m in known.items() if i < vocabulary}
        rest += sum(m for i, m in known.items() if i >= vocabulary)
        if tail in ("renormalize", "conditional"):
            inside = {i: m / sum(inside.values()) for i, m in inside.items()}
        got = {i: m for i, m in zip(got_ids[row].tolist(), got_log_probs[row].exp().tolist(), strict=True) if i != -1}
        assert got == pytest.approx(inside, abs=1e-12)
        assert ((got_ids[row] == -1) == (got_log_probs[row] == -INF)).all()
        if tail == "bucket":
            assert got_rest[row].exp().item() == pytest.approx(rest, abs=1e-12)


def test_a_temperature_that_was_applied_is_not_applied_again() -> None:
    logits = torch.randn(4, 30)
    teacher = TopK.from_logits(logits, 6, temperature=3.0)
    ids, log_probs, rest = teacher.for_op(3.0, 30)
    for got, wanted in zip((ids, log_probs, rest), whole(logits, 6, 3.0), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_a_row_of_nothing_is_all_tail() -> None:
    teacher = TopK(torch.full((2, 3), -1), torch.zeros(2, 3), tail_log_prob=torch.full((2,), -INF))
    teacher.check(torch.Size([2]), torch.device("cpu"))
    for temperature in (1.0, 2.0):
        ids, log_probs, rest = teacher.for_op(temperature, 10)
        assert (ids == -1).all() and (log_probs == -INF).all() and (rest == 0).all()
    assert teacher.known.tolist() == [False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("deviation", [0.1, 2, 10])
@pytest.mark.parametrize("k", [10, 60])
def test_rounded_log_probabilities_are_no_error(k: int, dtype: torch.dtype, deviation: float) -> None:
    """All of a distribution in 16 bits may sum to more than 1; what ops get of it does not."""
    teacher = TopK.from_logits(torch.randn(200, 60) * deviation, k)
    rounded = TopK(teacher.indices, teacher.log_probs.to(dtype))
    for given in (rounded, rounded.to(torch.float32), teacher.to(dtype)):  # the second: it does not know it was rounded
        given.check(given.shape, given.indices.device)
        _, log_probs, rest = given.for_op(1.0, 60)
        torch.testing.assert_close(log_probs.exp().sum(-1) + rest.exp(), torch.ones(200).double(), rtol=0, atol=1e-6)


# ---- as a tensor of tokens ------------------------------------------------------------------------------------------


@pytest.fixture
def teacher() -> TopK:
    return TopK.from_logits(torch.randn(2, 5, 20), 3)


def assert_same(given: TopK, *wanted: Tensor | None) -> None:
    for got, right in zip((given.indices, given.log_probs, given.tail_log_prob), wanted, strict=True):
        assert (got is None and right is None) or torch.equal(got, right)


INDICES = [1, -1, slice(None, -1), (slice(None), slice(1, None)), (..., 2), (0, 3), ([0, 1], [4, 2]), None, ([1, 0],)]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indexing(teacher: TopK, index: Any) -> None:
    rest = teacher.tail_log_prob
    columns = [teacher.indices[..., i][index] for i in range(3)], [teacher.log_probs[..., i][index] for i in range(3)]
    assert rest is not None
    assert_same(teacher[index], *(torch.stack(x, -1) for x in columns), rest[index])


def test_indexing_stays_among_the_tokens(teacher: TopK) -> None:
    with pytest.raises(IndexError):
        teacher[0, 1, 2]
    assert [row.shape for row in teacher] == [(5,), (5,)] and len(teacher) == 2
    with pytest.raises(TypeError):
        len(teacher[0, 0])
    mask = torch.rand(2, 5) > 0.5
    assert_same(teacher[mask], teacher.indices[mask], teacher.log_probs[mask], teacher.tail_log_prob[mask])


def test_reshape_to_and_repr(teacher: TopK) -> None:
    assert teacher.reshape(-1).shape == (10,) and teacher.reshape(5, 2).shape == (5, 2)
    assert_same(teacher.reshape(10).reshape(2, -1), teacher.indices, teacher.log_probs, teacher.tail_log_prob)
    half = teacher.to(torch.bfloat16)
    assert half.log_probs.dtype == half.tail_log_prob.dtype == torch.bfloat16
    assert half.indices.dtype == torch.int64
    away = half.to("meta", non_blocking=True)
    assert away.indices.device.type == away.log_probs.device.type == away.tail_log_prob.device.type == "meta"
    assert repr(half) == "TopK([2, 5], k=3, tail='bucket', torch.bfloat16, cpu)"
    assert "temperature=2.0" in repr(TopK.from_logits(torch.randn(2, 5), 3, temperature=2.0))


# ---- lists ----------------------------------------------------------------------------------------------------------

IDS = [[[5, 2], [7], None], [[1, 2, 3]]]
LOG_PROBS = [[[-0.5, -2.0], [-0.1], None], [[-1.0, -2.0, None]]]
PADDED = [[[5, 2, -1], [7, -1, -1], [-1, -1, -1]], [[1, 2, -1], [-1, -1, -1], [-1, -1, -1]]]


def assert_padded(teacher: TopK) -> None:
    assert teacher.indices.tolist() == PADDED
    wanted = [[[-0.5, -2.0, -INF], [-0.1, -INF, -INF], [-INF] * 3], [[-1.0, -2.0, -INF], [-INF] * 3, [-INF] * 3]]
    torch.testing.assert_close(teacher.log_probs, torch.tensor(wanted))
    teacher.check(torch.Size([2, 3]), torch.device("cpu"))


def test_lists() -> None:
    assert_padded(TopK.from_lists(IDS, LOG_PROBS))
    assert_padded(TopK.from_columns({"ids": IDS, "values": LOG_PROBS}, "ids", "values"))
    assert TopK.from_lists([torch.tensor([1, 2]), [3]], [torch.tensor([-1.0, -2.0]), [-3.0]]).shape == (2,)
    assert TopK.from_lists([[], []], [[], []]).indices.tolist() == [[-1], [-1]]
    assert TopK.from_lists([[[]], [[4]]], [[[]], [[-1.0]]]).indices.tolist() == [[[-1]], [[4]]]
    assert TopK.from_lists([], []).shape == ()


@pytest.mark.long  # pandas and datasets take seconds to import
def test_tables() -> None:
    pa, pd, datasets = (pytest.importorskip(name) for name in ("pyarrow", "pandas", "datasets"))
    columns = {"ids": IDS, "values": LOG_PROBS}
    rows = datasets.Dataset.from_dict(columns)
    for table in (pa.table(columns), pa.RecordBatch.from_pydict(columns), pd.DataFrame(columns), rows, rows[:]):
        assert_padded(TopK.from_columns(table, "ids", "values"))
    formatted = datasets.Dataset.from_dict({"ids": [[[3]]], "values": [[[-1.0]]]}).with_format("torch")[:]
    assert TopK.from_columns(formatted, "ids", "values").indices.tolist() == [[[3]]]


def test_parquet(tmp_path: Any) -> None:
    """As axolotl writes them: all rows of a K, -inf and a mask of 0 where there is nothing."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = {
        "target_token_ids": [[[0, 1], [4, 2]], [[5, 6]]],
        "target_logprobs": [[[-INF, -INF], [-0.5, -0.9]], [[-0.2, -1.7]]],
        "target_mask": [[[0, 0], [1, 1]], [[1, 0]]],
    }
    parquet.write_table(pa.table(table), tmp_path / "teacher.parquet")
    read = parquet.read_table(tmp_path / "teacher.parquet")
    teacher = TopK.from_columns(read, *table, tail="renormalize", temperature=2.0)
    assert teacher.indices.tolist() == [[[-1, -1], [4, 2]], [[5, -1], [-1, -1]]]
    assert (teacher.tail, teacher.temperature) == ("renormalize", 2.0)


@dataclass
class Logprob:
    """As vLLM's."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@pytest.mark.parametrize(
    "entry", [Logprob, lambda x: {"logprob": x, "rank": 1}, float], ids=["object", "json", "float"]
)
@pytest.mark.parametrize("key", [int, str, "token_id:{}".format])
def test_vllm(entry: Any, key: Any) -> None:
    """A prompt's first token has no distribution; the prompt's own token may come on top of K."""
    prompt = [None, {key(5): entry(-0.5), key(2): entry(-2.0)}, {key(7): entry(-0.1)}]
    teacher = TopK.from_vllm(prompt)
    assert teacher.indices.tolist() == [[-1, -1], [5, 2], [7, -1]]
    torch.testing.assert_close(teacher.log_probs, torch.tensor([[-INF, -INF], [-0.5, -2.0], [-0.1, -INF]]))
    assert teacher.known.tolist() == [False, True, True]
    assert TopK.from_vllm([prompt, prompt[:2]], tail="ignore").shape == (2, 3)
    assert TopK.from_vllm([None]).indices.tolist() == [[-1]]


def test_vllm_chat() -> None:
    content = [[{"token": "token_id:17", "logprob": -0.5}, {"token": "token_id:4", "logprob": -1.5}]]
    assert TopK.from_vllm(content).indices.tolist() == [[17, 4]]


def encoded(x: Tensor) -> str:
    return base64.b64encode(bytes(x.flatten().view(torch.uint8).tolist())).decode()


def test_trl() -> None:
    assert_padded(TopK.from_trl({"logprobs": LOG_PROBS, "logprob_token_ids": IDS, "logprobs_b64": None}))
    padded = TopK.from_lists(IDS, LOG_PROBS)
    binary = {
        "token_ids_b64": encoded(padded.indices.int().clamp(min=0)),
        "logprobs_b64": encoded(padded.log_probs),
        "shape": [2, 3, 3],
        "completion_lengths": [3, 1],
    }
    assert_padded(TopK.from_trl(binary))
