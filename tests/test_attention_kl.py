"""attention_kl and relation_kl on every backend: masks, biases, lengths, lists, and what they may hold in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.ops.drivers import attention_kl_cpu as driver

from .cases import (
    ATTENTION_KL,
    ATTENTION_OPS,
    HEADS,
    LONG_IN_TRITON,
    RELATION_KL,
    UNRELATED,
    Op,
    Regime,
    distance,
    oracle,
    over_attention_ops,
    over_backends,
    over_fused,
    over_reductions,
    placed,
    running_on,
    to,
    value_and_gradients,
)


def agrees(op: Op, backend: str, inputs: dict[str, Tensor], bound: float = 1e-5, scores: float = 16, **options) -> None:
    """Loss and gradients in float32 are those of the oracle, or no further off than twice what plain torch is.

    scores: about the largest. What their last digit is worth in a row's loss grows with the rows' distance (Pinsker).
    """
    loss, gradients = oracle(op, inputs, **options)
    _, plain = value_and_gradients(op, inputs, impl="reference", **options)
    with running_on(backend) as (impl, device):
        moved = to(inputs, torch.float32, device), placed(options, device)
        got, got_gradients = value_and_gradients(op, moved[0], impl=impl, **moved[1])
    error = (got.cpu() - loss).abs()
    assert (error <= 1e-6 * loss.abs() + 1.2e-7 * scores * (2 * loss.abs()).sqrt()).all()
    for name, gradient in got_gradients.items():
        wanted = gradients[name]
        assert distance(gradient, wanted) <= max(bound, 2 * distance(plain[name], wanted)), name


# ---- the specification -----------------------------------------------------------------------------------------------


def test_reference_is_what_a_loop_computes():
    """Head by head and row by row, with nothing but softmax over the keys that are left."""
    inputs = ATTENTION_KL.make(UNRELATED, batch=2, queries=5)
    key_mask, query_mask = torch.rand(2, 5) < 0.7, torch.rand(2, 5) < 0.7
    bias = torch.randn(1, HEADS, 5, 5, dtype=torch.float64)
    terms = []
    for b in range(2):
        for a in range(HEADS):
            for i in range(5):
                keys = [j for j in range(i + 1) if key_mask[b, j]]
                if not keys or not query_mask[b, i]:
                    continue
                rows = []
                for model, width, scale in (("student", 5, 0.3), ("teacher", 8, 8**-0.5)):
                    q, k = (inputs[f"{model}_{x}"][b, :, a * width : (a + 1) * width] for x in "qk")
                    rows.append(scale * k[keys] @ q[i] + (bias[0, a, i, keys] if model == "student" else 0))
                log_q, log_p = (row.log_softmax(0) for row in rows)
                terms.append((log_p.exp() * (log_p - log_q)).sum())
    wanted = torch.stack(terms).mean()
    got = fastkd.attention_kl(
        *(inputs[name] for name in ("student_q", "student_k", "teacher_q", "teacher_k")),
        num_heads=HEADS,
        student_scale=0.3,
        student_bias=bias,
        key_mask=key_mask,
        query_mask=query_mask,
        causal=True,
        impl="reference",
    )
    assert distance(got, wanted) <= 1e-14


@pytest.mark.parametrize("causal", [False, True])
def test_relation_is_attention_of_a_tensor_to_itself(causal: bool):
    x = RELATION_KL.make(UNRELATED)
    mask = torch.rand(2, 13) < 0.7
    got = fastkd.relation_kl(**x, num_heads=HEADS, key_mask=mask, causal=causal)
    s, t = x["student"], x["teacher"]
    wanted = fastkd.attention_kl(s, s, t, t, num_heads=HEADS, key_mask=mask, query_mask=mask, causal=causal)
    assert distance(got, wanted) <= 1e-14


# ---- masks -----------------------------------------------------------------------------------------------------------


def _masks(batch: int, length: int) -> dict[str, Tensor]:
    position = torch.arange(length).expand(batch, -1)
    middle = torch.full((batch, 1), length // 2)
    return {
        "right padding": position < torch.tensor([[length], [length // 3]]),
        "left padding": position >= torch.tensor([[0], [length // 2]]),
        "holes": torch.rand(batch, length) < 0.6,
        "one valid key": position == middle,
        "an empty sequence": (position < length) & torch.tensor([[True], [False]]),
    }


@over_attention_ops
@over_backends
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", list(_masks(2, 3)))
def test_key_masks(op: Op, backend: str, kind: str, causal: bool):
    """What masked positions hold, NaN included, reaches nothing; their gradients are exactly 0."""
    inputs = to(op.make(UNRELATED), torch.float32)
    mask = _masks(2, 13)[kind]
    loss, gradients = oracle(op, inputs, key_mask=mask, causal=causal)
    spoilt = ("student_k", "teacher_k", "student", "teacher")
    dirty = {k: x.masked_fill(~mask.unsqueeze(2), float("nan")) if k in spoilt else x for k, x in inputs.items()}
    with running_on(backend) as (impl, device):
        got, got_gradients = value_and_gradients(
            op, to(dirty, torch.float32, device), impl=impl, key_mask=mask.to(device), causal=causal
        )
    assert abs(got.item() - loss.item()) <= 1e-6 * loss.item()
    for name, gradient in got_gradients.items():
        if gradients[name].any():
            assert distance(gradient, gradients[name]) <= 1e-5, name
        else:
            assert not gradient.any(), name
        if name in spoilt:
            assert not gradient.cpu()[~mask].any(), name


@over_backends
def test_query_masks(backend: str):
    """Masked rows count for nothing, whatever they hold: as if they were not there."""
    inputs = to(ATTENTION_KL.make(UNRELATED, queries=9, keys=13), torch.float32)
    mask = torch.rand(2, 9) < 0.6
    loss, gradients = oracle(ATTENTION_KL, inputs, query_mask=mask)
    for name in ("student_q", "teacher_q"):
        inputs[name] = inputs[name].masked_fill(~mask.unsqueeze(2), float("nan"))
    with running_on(backend) as (impl, device):
        moved = to(inputs, torch.float32, device)
        got, got_gradients = value_and_gradients(ATTENTION_KL, moved, impl=impl, query_mask=mask.to(device))
    assert distance(got, loss) <= 1e-6
    for name, gradient in got_gradients.items():
        assert distance(gradient, gradients[name]) <= 1e-5, name


@over_attention_ops
@over_backends
def test_integer_masks(op: Op, backend: str):
    """A tokenizer's attention_mask is int64."""
    mask = torch.rand(2, 13) < 0.6
    with running_on(backend) as (impl, device):
        inputs = to(op.make(UNRELATED), torch.float32, device)
        losses = [
            op.function(**inputs, key_mask=mask.to(device, dtype), impl=impl) for dtype in (torch.bool, torch.int64)
        ]
    assert torch.equal(*losses)


@over_attention_ops
@over_backends
@pytest.mark.parametrize("how", ["mask", "normalizer", "no keys", "no batch"])
def test_nothing_to_average_gives_zero(op: Op, backend: str, how: str):
    inputs = to(op.make(UNRELATED), torch.float32)
    options = {"mask": {"key_mask": torch.zeros(2, 13).bool()}, "normalizer": {"normalizer": torch.tensor(0)}}
    if how.startswith("no"):
        cut = (lambda x: x[:, :0]) if how == "no keys" else (lambda x: x[:0])
        empty = ("student_k", "teacher_k") if how == "no keys" else tuple(k for k in inputs if k[-1] in "qk")
        inputs = {k: cut(x) if k in (*empty, "student", "teacher") else x for k, x in inputs.items()}
    with running_on(backend) as (impl, device):
        moved = {k: x.to(device) for k, x in options.get(how, {}).items()}
        loss, gradients = value_and_gradients(op, to(inputs, torch.float32, device), impl=impl, **moved)
    assert loss.item() == 0
    for name, gradient in gradients.items():
        assert gradient.shape == inputs[name].shape
        assert not gradient.any(), name


# ---- lengths ---------------------------------------------------------------------------------------------------------


@over_attention_ops
@pytest.mark.parametrize("length", [1, 2, 97, 507])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("deviation", [5.0, 30.0])
def test_awkward_lengths(op: Op, length: int, causal: bool, deviation: float):
    inputs = to(op.make(Regime("", deviation, 2.0), queries=length), torch.float32)
    agrees(op, "cpp", inputs, bound=2e-5, scores=8 * deviation, causal=causal)


@over_backends
@pytest.mark.parametrize(("queries", "keys"), [(4, 19), (19, 4), (1, 7)])
def test_cross_attention(backend: str, queries: int, keys: int):
    agrees(ATTENTION_KL, backend, to(ATTENTION_KL.make(UNRELATED, queries=queries, keys=keys), torch.float32))


@over_attention_ops
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_chunks_of_any_size(op: Op, causal: bool, rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(driver, "CHUNK_ROWS", (rows, rows))
    inputs = to(op.make(UNRELATED, queries=17), torch.float32)
    mask = _masks(2, 17)["right padding"]
    agrees(op, "cpp", inputs, causal=causal, key_mask=mask)
    agrees(op, "cpp", inputs, causal=causal, reduction="sum")


@over_attention_ops
@over_fused
def test_strides_are_respected(op: Op, backend: str):
    """The batch second, as some models keep it, and a slice of a fused projection."""
    inputs = to(op.make(UNRELATED), torch.float32)
    loss, gradients = oracle(op, inputs)

    def views(x: Tensor) -> list[Tensor]:
        wide = torch.cat([x, x], 2)
        return [
            x.transpose(0, 1).contiguous().transpose(0, 1),
            wide[:, :, x.shape[2] :],
            x.repeat_interleave(2, 2)[..., ::2],
        ]

    for layout in range(3):
        with running_on(backend) as (impl, device):
            moved = to(inputs, torch.float32, device)
            moved = {k: views(x)[layout] if x.dim() == 3 else x for k, x in moved.items()}
            got, got_gradients = value_and_gradients(op, moved, impl=impl)
        assert distance(got, loss) <= 1e-6
        for name, gradient in got_gradients.items():
            assert distance(gradient, gradients[name]) <= 1e-5, name


# ---- biases ----------------------------------------------------------------------------------------------------------


@over_backends
@pytest.mark.parametrize(
    "shape",
    [
        (2, HEADS, 7, 11),
        (1, HEADS, 7, 11),
        (HEADS, 7, 11),
        (2, 1, 1, 11),
        (7, 11),
        (11,),
        (HEADS, 7, 1),
        (1, 1, 1, 1),
        (),
    ],
)
def test_bias_tensors_broadcast(backend: str, shape: tuple[int, ...]):
    """In all ways that a bias or an additive mask may, with gradients of the same shape."""
    inputs = ATTENTION_KL.make(UNRELATED, queries=7, keys=11)
    inputs = {k: x for k, x in inputs.items() if not k.endswith("table")}
    inputs["student_bias"] = torch.randn(shape, dtype=torch.float64)
    op = Op(
        "bias", lambda **x: fastkd.attention_kl(**x, num_heads=HEADS), ATTENTION_KL.make, ("student_q", "student_bias")
    )
    inputs = to(inputs, torch.float32)
    # a constant along the keys changes no distribution: its gradient is 0, up to rounding
    loss, gradients = oracle(op, inputs, reduction="sum", divergence="reverse_kl")
    with running_on(backend) as (impl, device):
        moved = to(inputs, torch.float32, device)
        got, got_gradients = value_and_gradients(op, moved, impl=impl, reduction="sum", divergence="reverse_kl")
    assert distance(got, loss) <= 1e-6
    assert distance(got_gradients["student_q"], gradients["student_q"]) <= 1e-5
    error = (got_gradients["student_bias"].cpu() - gradients["student_bias"]).abs().max()
    assert error <= 1e-5 * max(1.0, gradients["student_bias"].abs().max().item())


@over_backends
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 5), (4, 40)])
def test_relative_bias_equals_its_matrix(
    backend: str, bidirectional: bool, causal: bool, buckets: int, max_distance: int
):
    inputs = ATTENTION_KL.make(UNRELATED, batch=1, queries=21)
    inputs |= {name: torch.randn(buckets, HEADS, dtype=torch.float64) for name in ("student_table", "teacher_table")}

    def function(student_table: Tensor, teacher_table: Tensor, as_matrix: bool = False, **x) -> Tensor:
        biases = [fastkd.RelativeBias(t, bidirectional, max_distance) for t in (student_table, teacher_table)]
        student, teacher = [bias.matrix(21, 21) if as_matrix else bias for bias in biases]
        return fastkd.attention_kl(**x, num_heads=HEADS, causal=causal, student_bias=student, teacher_bias=teacher)

    op = Op("relative", function, ATTENTION_KL.make, ATTENTION_KL.student)
    inputs = to(inputs, torch.float32)
    loss, gradients = oracle(op, inputs, as_matrix=True)
    with running_on(backend) as (impl, device):
        got, got_gradients = value_and_gradients(op, to(inputs, torch.float32, device), impl=impl)
    assert distance(got, loss) <= 1e-6
    for name, gradient in got_gradients.items():
        assert distance(gradient, gradients[name]) <= 1e-5, name


@pytest.mark.parametrize("is_decoder", [False, True])
def test_relative_bias_is_t5s(is_decoder: bool):
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    from transformers import T5Config

    for buckets, max_distance in ((32, 128), (16, 20), (32, 40), (8, 1000)):
        config = T5Config(
            relative_attention_num_buckets=buckets,
            relative_attention_max_distance=max_distance,
            is_decoder=is_decoder,
            d_model=8,
            num_heads=2,
            d_kv=4,
        )
        attention = modeling.T5Attention(config, has_relative_attention_bias=True)
        table = attention.relative_attention_bias.weight
        bias = fastkd.RelativeBias(table, bidirectional=not is_decoder, max_distance=max_distance)
        assert torch.equal(bias.matrix(300, 517), attention.compute_bias(300, 517)[0])
        distance_ = torch.arange(-3000, 3001)
        reach = distance_.clamp(-max_distance, max_distance) + max_distance
        assert torch.equal(bias.diagonals()[:, reach], table[bias.bucket(distance_)].t())


@pytest.mark.parametrize("part", ["encoder", "decoder", "cross"])
def test_attention_of_a_real_t5(part: str):
    """The distributions that two T5s return with output_attentions are those that are compared."""
    transformers = pytest.importorskip("transformers")
    from transformers import T5Config, T5ForConditionalGeneration

    transformers.set_seed(0)
    models = []
    for width in (24, 16):
        config = T5Config(
            vocab_size=50, d_model=width, d_kv=width // 4, num_heads=4, d_ff=32, num_layers=1, num_decoder_layers=1,
            dropout_rate=0.0, attn_implementation="eager", decoder_start_token_id=0,
        )  # fmt: skip
        models.append(T5ForConditionalGeneration(config).eval())
    blocks = [getattr(m, "decoder" if part == "cross" else part).block[0] for m in models]
    layers = [b.layer[1].EncDecAttention if part == "cross" else b.layer[0].SelfAttention for b in blocks]
    seen: list[list[Tensor]] = [[], []]
    hooks = [
        getattr(layer, name).register_forward_hook(lambda _, __, out, into=into: into.append(out))
        for layer, into in zip(layers, seen, strict=True)
        for name in "qk"
    ]
    ids, mask = torch.randint(2, 50, (2, 9)), torch.arange(9) < torch.tensor([[9], [6]])
    labels = torch.randint(2, 50, (2, 7))
    with torch.no_grad():
        outputs = [m(input_ids=ids, attention_mask=mask.long(), labels=labels, output_attentions=True) for m in models]
    for hook in hooks:
        hook.remove()
    name = {"encoder": "encoder_attentions", "decoder": "decoder_attentions", "cross": "cross_attentions"}[part]
    teacher, student = (getattr(o, name)[0].double() for o in outputs)
    rows = torch.where(teacher > 0, teacher * (teacher.log() - student.log()), 0).sum(-1)  # [B, A, Lq]
    valid = mask if part == "encoder" else torch.ones(2, 7, dtype=torch.bool)
    wanted = rows.transpose(1, 2)[valid].mean()
    biases = [
        None if part == "cross" else fastkd.RelativeBias(a.relative_attention_bias.weight, part == "encoder")
        for a in layers
    ]
    got = fastkd.attention_kl(
        *seen[1], *seen[0], num_heads=4, student_scale=1.0, teacher_scale=1.0, teacher_bias=biases[0],
        student_bias=biases[1], key_mask=None if part == "decoder" else mask,
        query_mask=mask if part == "encoder" else None, causal=part == "decoder",
    )  # fmt: skip
    assert got > 0
    assert distance(got, wanted) <= 1e-5


# ---- lists, reductions, dtypes ---------------------------------------------------------------------------------------


@over_backends
@over_reductions
def test_lists(backend: str, reduction: str):
    """Cross-attention: queries over the decoder's positions, keys and values over the encoder's. Widths may differ."""
    lengths, widths = (6, 11, 11), ((15, 24), (15, 24), (9, 12))
    inputs = {f"s{i}": torch.randn(2, lengths[i], widths[i][0]) for i in range(3)}
    teachers = [torch.randn(2, lengths[i], widths[i][1]) for i in range(3)]
    masks = [torch.rand(2, 6) < 0.7, None, torch.rand(2, 11) < 0.7]
    causal = [True, False, False]
    upstream = [torch.randn(2, 3, length) for length in lengths]

    def together(impl: str, device: torch.device, **x: Tensor) -> Tensor:
        loss = fastkd.relation_kl(
            list(x.values()), [t.to(device) for t in teachers], num_heads=3, causal=causal, reduction=reduction,
            key_mask=[None if m is None else m.to(device) for m in masks], impl=impl,
        )  # fmt: skip
        if reduction != "none":
            return loss
        return sum((row * u.to(device)).sum() for row, u in zip(loss, upstream, strict=True))

    def apart(**x: Tensor) -> Tensor:
        losses = [
            fastkd.relation_kl(
                s, teachers[i].double(), num_heads=3, key_mask=masks[i], causal=causal[i], reduction=reduction,
                impl="reference",
            )
            for i, s in enumerate(x.values())
        ]  # fmt: skip
        if reduction == "none":
            return sum((row * u).sum() for row, u in zip(losses, upstream, strict=True))
        return torch.stack(losses).mean() if reduction == "mean" else torch.stack(losses).sum()

    names = tuple(inputs)
    wanted, gradients = value_and_gradients(Op("apart", apart, None, names), to(inputs, torch.float64))
    with running_on(backend) as (impl, device):
        op = Op("together", lambda **x: together(impl, device, **x), None, names)
        got, got_gradients = value_and_gradients(op, to(inputs, torch.float32, device))
    assert distance(got, wanted) <= 1e-5
    for name in names:
        assert distance(got_gradients[name], gradients[name]) <= 1e-5, name


@over_attention_ops
@over_backends
@over_reductions
def test_reductions(op: Op, backend: str, reduction: str):
    inputs = to(op.make(UNRELATED), torch.float32)
    mask = _masks(2, 13)["holes"]
    upstream = torch.randn(2, HEADS, 13) if reduction == "none" else torch.tensor(-2.5)
    agrees(op, backend, inputs, reduction=reduction, upstream=upstream, key_mask=mask, divergence="jsd", beta=0.3)
    rows = op.function(**inputs, key_mask=mask, reduction="none")
    assert rows.shape == (2, HEADS, 13)
    counted = mask if op is RELATION_KL else mask.any(1, keepdim=True).expand(-1, 13)
    assert distance(rows.transpose(1, 2)[counted].mean(), op.function(**inputs, key_mask=mask)) <= 1e-6


@over_attention_ops
@over_backends
def test_normalizer_makes_accumulation_exact(op: Op, backend: str):
    """Two micro-batches with unequal padding, divided by the whole batch's rows, add up to the whole batch."""
    mask = torch.arange(13) < torch.tensor([[13], [4]])
    with running_on(backend) as (impl, device):
        inputs = to(op.make(UNRELATED), torch.float32, device)
        options = {"impl": impl, "query_mask" if op is ATTENTION_KL else "key_mask": mask.to(device)}
        whole = op.function(**inputs, **options)
        total = 0
        for b in range(2):
            micro = {k: x if k.endswith("table") else x[b : b + 1] for k, x in inputs.items()}
            options |= {"query_mask" if op is ATTENTION_KL else "key_mask": mask[b : b + 1].to(device)}
            total = total + op.function(**micro, **options, normalizer=torch.tensor(17, device=device))
        number = op.function(**inputs, impl=impl, normalizer=26)
        assert distance(number, op.function(**inputs, impl=impl)) <= 1e-6
    assert distance(total, whole) <= 1e-6


@over_attention_ops
@over_backends
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_fp16_gradients_survive_loss_scaling(op: Op, backend: str, reduction: str):
    """A loss scale of 65536, and rows that count for a millionth each: no fp16 number on the way."""
    inputs = to(op.make(UNRELATED), torch.float16)
    upstream = torch.full((2, HEADS, 13), 65536e-6) if reduction == "none" else torch.tensor(65536.0)
    options = {"reduction": "none"} if reduction == "none" else {"reduction": "mean", "normalizer": 1e6}
    _, gradients = oracle(op, inputs, upstream=upstream, **options)
    with running_on(backend) as (impl, device):
        moved = to(inputs, torch.float16, device)
        _, got = value_and_gradients(op, moved, impl=impl, upstream=upstream.to(device), **options)
    for name, gradient in got.items():
        assert gradient.dtype == torch.float16
        assert distance(gradient, gradients[name]) <= 3e-3, name


@over_fused
@pytest.mark.parametrize(
    ("op", "trained"),
    [(op, trained) for op in ATTENTION_OPS for trained in ((), *((name,) for name in op.student))],
    ids=lambda x: getattr(x, "name", x),
)
def test_gradients_that_are_asked_for(op: Op, backend: str, trained: tuple[str, ...]):
    inputs = to(op.make(UNRELATED), torch.float32)
    _, gradients = oracle(op, inputs)
    for reduction in ("mean", "none"):
        with running_on(backend) as (impl, device):
            moved = to(inputs, torch.float32, device)
            for name in trained:
                moved[name].requires_grad_()
            loss = op.function(**moved, impl=impl, reduction=reduction).mean()
            assert loss.requires_grad == bool(trained)
            if trained:
                loss.backward()
        for name in op.student:
            assert (moved[name].grad is not None) == (name in trained)
            if name in trained:
                assert distance(moved[name].grad, gradients[name]) <= 1e-5


@over_attention_ops
@pytest.mark.parametrize("backend", LONG_IN_TRITON)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(op: Op, backend: str, reduction: str):
    if backend == "triton" and reduction == "mean":
        pytest.skip("the same kernels as for none, in an interpreter that is slow")
    mask = torch.tensor([[True, True, False, True], [False, True, True, True]])
    with running_on(backend) as (impl, device):
        inputs = to(op.make(UNRELATED, queries=4), torch.float64, device)
        names = op.student

        def function(*student: Tensor) -> Tensor:
            named = dict(inputs, **dict(zip(names, student, strict=True)))
            return op.function(
                **named, impl=impl, reduction=reduction, divergence="skew_kl", causal=True, key_mask=mask.to(device)
            )

        leaves = [inputs[name].requires_grad_() for name in names]
        assert torch.autograd.gradcheck(function, leaves, fast_mode=backend == "triton")  # the interpreter is slow


@over_attention_ops
@over_fused
def test_results_repeat_to_the_bit(op: Op, backend: str):
    with running_on(backend) as (impl, device):
        inputs = to(op.make(UNRELATED), torch.float32, device)
        runs = [value_and_gradients(op, inputs, impl=impl, causal=True) for _ in range(2)]
    (loss, gradients), (other_loss, other_gradients) = runs
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)


def test_short_rows_near_the_teacher():
    """Rows within a block keep their exponentials, which must do for a student very near its teacher."""
    for deviation in (0.1, 1.0, 5.0):
        teacher = deviation * torch.randn(64, 501)
        for divergence in ("forward_kl", "reverse_kl"):
            student = teacher + 1e-3 * torch.randn(64, 501) + 7.0
            exact = student.double().requires_grad_()
            wanted = fastkd.logit_kl(exact, teacher.double(), divergence=divergence, impl="reference")
            (gradient,) = torch.autograd.grad(wanted, exact)
            buffer = student.clone()
            code = list(fastkd.DIVERGENCES).index(divergence)
            coefficient = torch.full((len(teacher),), 1 / len(teacher), dtype=torch.float64)
            loss = torch.empty_like(coefficient)
            torch.ops.fastkd.divergence_rows(
                buffer, teacher, coefficient, None, loss, None, buffer, code, 0.5, 1.0, 1.0, 0.0
            )
            assert abs(loss.sum() - wanted) <= 1e-5 * wanted
            assert distance(buffer, gradient) <= 1e-6


def test_nothing_of_length_squared_is_kept():
    """Saved for backward: no more than gradients of the inputs' size."""
    length = 512
    student = torch.randn(1, length, 16, requires_grad=True)
    teacher = torch.randn(1, length, 24)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        for reduction in ("mean", "none"):
            fastkd.relation_kl(student, teacher, num_heads=2, reduction=reduction)
            fastkd.attention_kl(student, student, teacher, teacher, num_heads=2, reduction=reduction)
    assert saved
    assert max(x.numel() for x in saved) <= teacher.numel()


def test_modules_equal_functions():
    x = to(RELATION_KL.make(UNRELATED), torch.float32)
    mask = _masks(2, 13)["holes"]
    module = fastkd.nn.RelationKLLoss(num_heads=HEADS, causal=True, divergence="skew_kl", beta=0.1)
    assert "num_heads=3" in repr(module)
    wanted = fastkd.relation_kl(**x, num_heads=HEADS, causal=True, divergence="skew_kl", beta=0.1, key_mask=mask)
    assert torch.equal(module(**x, key_mask=mask), wanted)
    y = to(ATTENTION_KL.make(UNRELATED), torch.float32)
    tensors = [y[name] for name in ("student_q", "student_k", "teacher_q", "teacher_k")]
    biases = {"student_bias": fastkd.RelativeBias(y["student_table"])}
    module = fastkd.nn.AttentionKLLoss(num_heads=HEADS, student_scale=1.0)
    wanted = fastkd.attention_kl(*tensors, num_heads=HEADS, student_scale=1.0, **biases)
    assert torch.equal(module(*tensors, **biases), wanted)
    with pytest.raises(ValueError, match="divergence"):
        fastkd.nn.AttentionKLLoss(num_heads=2, divergence="kl")
