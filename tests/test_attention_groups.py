"""attention_kl where keys have fewer heads than queries: what repeated keys give, on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastkd

from .cases import (
    REGIMES,
    UNRELATED,
    Inputs,
    Op,
    Regime,
    by_name,
    distance,
    over_backends,
    over_divergences,
    over_reductions,
    placed,
    running_on,
    to,
    value_and_gradients,
)

HEADS, WIDTHS, LENGTH = 6, {"student": 5, "teacher": 8}, 13
COUNTS = [(2, 3), (1, 6), (6, 2)]  # of keys' heads, the student's and the teacher's
over_counts = pytest.mark.parametrize("counts", COUNTS, ids=str)
STUDENT = ("student_q", "student_k", "student_bias")


def make(
    counts: tuple[int, int], regime: Regime = UNRELATED, queries: int = LENGTH, keys: int = LENGTH, bias: bool = False
) -> Inputs:
    """Scores of the regime's deviation; a student near the teacher has as many heads, as wide."""
    root, inputs = regime.deviation**0.5, {}
    for model, count in zip(("teacher", "student"), counts[::-1], strict=True):
        for name, length, heads in (("q", queries, HEADS), ("k", keys, count)):
            inputs[f"{model}_{name}"] = root * torch.randn(2, length, heads, WIDTHS[model], dtype=torch.float64)
    if regime.distance is not None:
        for name in "qk":
            near = torch.randn_like(inputs[f"teacher_{name}"])
            inputs[f"student_{name}"] = inputs[f"teacher_{name}"] + regime.distance / root * near
    inputs = {name: x.flatten(2) for name, x in inputs.items()}
    return inputs | ({"student_bias": torch.randn(1, 1, queries, keys, dtype=torch.float64)} if bias else {})


def grouped(counts: tuple[int, int]) -> Op:
    student, teacher = counts

    def function(**inputs) -> Tensor:
        return fastkd.attention_kl(**inputs, num_heads=HEADS, num_kv_heads=student, teacher_num_kv_heads=teacher)

    return Op("grouped", function, make, STUDENT)


def oracle(counts: tuple[int, int], inputs: Inputs, dtype: torch.dtype = torch.float64, **options):
    """The reference on keys that are repeated outside of it; their gradients are summed by autograd."""

    def function(student_k: Tensor, teacher_k: Tensor, **inputs) -> Tensor:
        keys = [
            x.unflatten(2, (count, -1)).repeat_interleave(HEADS // count, 2).flatten(2)
            for x, count in zip((student_k, teacher_k), counts, strict=True)
        ]
        return fastkd.attention_kl(student_k=keys[0], teacher_k=keys[1], **inputs, num_heads=HEADS, impl="reference")

    return value_and_gradients(Op("repeated", function, make, STUDENT), to(inputs, dtype), **options)


def agrees(counts: tuple[int, int], backend: str, inputs: Inputs, dtype=torch.float32, bound=1e-5, **options) -> None:
    """Loss and gradients are the oracle's, or no further off than twice what plain torch is."""
    inputs = to(inputs, dtype)
    loss, wanted = oracle(counts, inputs, **options)
    plain_loss, plain = oracle(counts, inputs, torch.float32, **options)
    with running_on(backend) as (impl, device):
        moved = to(inputs, dtype, device), placed(options, device)
        got, gradients = value_and_gradients(grouped(counts), moved[0], impl=impl, **moved[1])
    assert distance(got, loss) <= max(1e-6, 2 * distance(plain_loss, loss))
    for name, gradient in gradients.items():
        assert gradient.shape == inputs[name].shape
        assert distance(gradient, wanted[name]) <= max(bound, 2 * distance(plain[name], wanted[name])), name


@over_counts
@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("causal", [False, True])
@over_divergences
def test_equals_repeated_keys(counts: tuple[int, int], backend: str, divergence: str, causal: bool):
    agrees(counts, backend, make(counts), causal=causal, divergence=divergence)


@over_counts
@pytest.mark.parametrize(("divergence", "causal"), [("forward_kl", False), ("reverse_kl", True), ("jsd", True)])
def test_equals_repeated_keys_in_triton(counts: tuple[int, int], divergence: str, causal: bool):
    agrees(counts, "triton", make(counts), causal=causal, divergence=divergence)


@over_backends
@pytest.mark.parametrize("regime", REGIMES, ids=by_name)
def test_regimes(backend: str, regime: Regime, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(WIDTHS, "student", WIDTHS["teacher"])
    counts = (2, 2) if regime.distance is not None else (2, 3)
    agrees(counts, backend, make(counts, regime, queries=9, keys=21))


@over_backends
@over_reductions
def test_masks_and_reductions(backend: str, reduction: str):
    """With NaN where nothing is read, rows without a key, and heads of a group that count for different rows."""
    counts, inputs = (2, 3), make((2, 3))
    key_mask = torch.rand(2, LENGTH) < 0.6
    key_mask[0, :2], key_mask[1, -1] = False, True
    query_mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [5]])
    upstream: Tensor | float = 1.0
    if reduction == "none":
        upstream = torch.randn(2, HEADS, LENGTH) * (torch.rand(2, HEADS, LENGTH) < 0.5)
        upstream[:, ::3] = 0  # of one head in each group, no row
    options = {"key_mask": key_mask, "query_mask": query_mask, "causal": True, "reduction": reduction}
    loss, wanted = oracle(counts, inputs, upstream=upstream, **options)
    for name in ("student_k", "teacher_k"):
        inputs[name] = inputs[name].masked_fill(~key_mask[:, :, None], float("nan"))
    with running_on(backend) as (impl, device):
        moved = to(inputs, torch.float32, device)
        options = placed({**options, "upstream": upstream}, device)
        got, gradients = value_and_gradients(grouped(counts), moved, impl=impl, **options)
    assert distance(got, loss) <= 1e-6
    for name, gradient in gradients.items():
        assert distance(gradient, wanted[name]) <= 1e-5, name
    assert not gradients["student_k"].cpu()[~key_mask].any()


@over_backends
@over_counts
def test_a_bias_that_all_heads_share(backend: str, counts: tuple[int, int]):
    """Its gradient is a sum over heads, the keys' over groups of them: one thread has them all."""
    agrees(counts, backend, make(counts, queries=7, bias=True), divergence="reverse_kl")


@over_backends
@pytest.mark.parametrize("bidirectional", [False, True])
def test_relative_bias(backend: str, bidirectional: bool):
    tables = [torch.randn(8, HEADS) for _ in range(2)]
    inputs = to(make((2, 3)), torch.float32)

    def biases(dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, fastkd.RelativeBias]:
        made = [fastkd.RelativeBias(table.to(device, dtype), bidirectional, 6) for table in tables]
        return {"student_bias": made[0], "teacher_bias": made[1]}

    op = Op("grouped", grouped((2, 3)).function, make, STUDENT[:2])
    keys = {k: x.unflatten(2, (n, -1)) for k, n in (("student_k", 2), ("teacher_k", 3)) for x in [inputs[k].double()]}
    repeated = {k: x.repeat_interleave(HEADS // x.shape[2], 2).flatten(2).requires_grad_() for k, x in keys.items()}
    q = {k: inputs[k].double().requires_grad_() for k in ("student_q", "teacher_q")}
    loss = fastkd.attention_kl(**q, **repeated, **biases(torch.float64), num_heads=HEADS, impl="reference")
    loss.backward()
    with running_on(backend) as (impl, device):
        got, gradients = value_and_gradients(
            op, to(inputs, torch.float32, device), impl=impl, **biases(torch.float32, device)
        )
    assert distance(got, loss) <= 1e-6
    assert distance(gradients["student_q"], q["student_q"].grad) <= 1e-5
    summed = repeated["student_k"].grad.unflatten(2, (2, HEADS // 2, -1)).sum(3).flatten(2)
    assert distance(gradients["student_k"], summed) <= 1e-5


@over_backends
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)], ids=str)
def test_half_precision_is_rounded_once(backend: str, dtype: torch.dtype, bound: float):
    """A group's gradients are summed before they are rounded."""
    agrees((1, 2), backend, make((1, 2)), dtype, bound)


@over_counts
def test_of_keys_alone_and_of_queries_alone(counts: tuple[int, int]):
    inputs = to(make(counts), torch.float32)
    _, wanted = oracle(counts, inputs)
    for name in ("student_q", "student_k"):
        op = Op("grouped", grouped(counts).function, make, (name,))
        _, gradients = value_and_gradients(op, inputs, impl="fused")
        assert distance(gradients[name], wanted[name]) <= 1e-5


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_a_bit(threads: int):
    inputs, before = to(make((2, 3), queries=40, keys=40), torch.float32), torch.get_num_threads()
    one = value_and_gradients(grouped((2, 3)), inputs, impl="fused")
    try:
        torch.set_num_threads(threads)
        other = value_and_gradients(grouped((2, 3)), inputs, impl="fused")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], other[0])
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def test_one_number_is_for_both_models():
    inputs = to(make((2, 2)), torch.float32)
    options = {"num_heads": HEADS, "num_kv_heads": 2}
    loss = fastkd.attention_kl(**inputs, **options)
    assert torch.equal(loss, fastkd.attention_kl(**inputs, **options, teacher_num_kv_heads=2))
    module = fastkd.nn.AttentionKLLoss(**options)
    assert torch.equal(loss, module(*(inputs[f"{m}_{x}"] for m in ("student", "teacher") for x in "qk")))


def test_gradcheck():
    inputs = make((2, 3), queries=4, keys=4)
    leaves = [inputs[name].requires_grad_() for name in STUDENT[:2]]

    def function(student_q: Tensor, student_k: Tensor) -> Tensor:
        named = {**inputs, "student_q": student_q, "student_k": student_k}
        return grouped((2, 3)).function(**named, reduction="none", causal=True, impl="fused")

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_attention_of_a_real_qwen2():
    """The maps of attention that the model returns, whose rotary embedding is made to turn by nothing."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).eval()
    model.model.rotary_emb.inv_freq.zero_()
    attention, seen = model.model.layers[0].self_attn, {}
    for name in ("q", "k"):
        getattr(attention, f"{name}_proj").register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        output = model(torch.randint(0, 40, (2, 9)), output_attentions=True)
    teacher_q, teacher_k = torch.randn(2, 9, 12), torch.randn(2, 9, 6)
    loss = fastkd.attention_kl(
        seen["q"], seen["k"], teacher_q, teacher_k, num_heads=6, num_kv_heads=2, teacher_num_kv_heads=3, causal=True
    )
    q, k = teacher_q.double().unflatten(2, (6, -1)), teacher_k.double().unflatten(2, (3, -1)).repeat_interleave(2, 2)
    scores = torch.einsum("biad,bjad->baij", q, k) * 2**-0.5
    p = scores.masked_fill(~torch.ones(9, 9).tril().bool(), -torch.inf).softmax(-1)
    student = output.attentions[0].double()
    wanted = torch.where(p > 0, p * (p / student).log(), 0).sum(-1).mean()
    assert distance(loss, wanted) <= 1e-5
