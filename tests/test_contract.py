"""Every op, on every backend, in every dtype, against the reference in float64."""

from __future__ import annotations

import functools
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import fastkd
from fastkd.divergence import DIVERGENCES

from .cases import (
    ATTENTION_OPS,
    BACKENDS,
    DEVICE,
    DIVERGENCE_OPS,
    DTYPES,
    HEADS,
    LINEAR_KL,
    LOGIT_KL,
    LONG_IN_TRITON,
    REGIMES,
    RELATION_KL,
    ROUNDING,
    SMALLEST,
    UNRELATED,
    Inputs,
    Op,
    Regime,
    by_name,
    distance,
    oracle,
    over_backends,
    over_divergences,
    over_fused,
    over_ops,
    over_reductions,
    over_token_ops,
    running_on,
    to,
    value_and_gradients,
)


def value_cases() -> list:
    """(divergence, backend, regime, dtype): all of them, but in Triton's interpreter, which takes seconds for some.

    There every two of them meet, and every divergence meets float32 near convergence, where least is left of it.
    """
    whole = product(enumerate(DIVERGENCES), BACKENDS, enumerate(REGIMES), enumerate(DTYPES))
    return [
        (divergence, backend, regime, dtype)
        for (i, divergence), backend, (j, regime), (k, dtype) in whole
        if backend != "triton"
        or DEVICE.type == "cuda"
        or (i + j + k) % 4 == 0
        or (regime.name, dtype) == ("near_converged", torch.float32)
    ]


@functools.cache
def wanted_of(op: Op, dtype: torch.dtype, regime: Regime, divergence: str) -> tuple:
    """Inputs, what the oracle makes of them, and what plain torch in float32 (float64) does, for every backend.

    Near convergence plain torch has few digits left.
    """
    torch.manual_seed(0)
    inputs = to(op.make(regime), dtype)
    plain = to(inputs, torch.float64 if dtype == torch.float64 else torch.float32)
    options = {"impl": "reference", "divergence": divergence}
    return inputs, oracle(op, inputs, divergence=divergence), value_and_gradients(op, plain, **options)


def largest_square(inputs: Inputs) -> float:
    """The largest score of a relation: one on its diagonal."""
    heads = [x.double().unflatten(-1, (HEADS, -1)) for x in inputs.values()]
    return max((x.square().sum(-1).max() * x.shape[-1] ** -0.5).item() for x in heads)


def cancelled(inputs: Inputs, divergence: str) -> float:
    """How much larger the gradients of attention's scores are than the sums of them that are the table's gradient.

    By so much more than in itself does a rounding of each count there: what is summed up has both signs.
    """
    inputs = to(inputs, torch.float64)
    tables = {model: inputs.pop(f"{model}_table") for model in ("student", "teacher")}
    table = tables["student"].requires_grad_()
    lengths = inputs["student_q"].shape[1], inputs["student_k"].shape[1]
    bias = fastkd.RelativeBias(table, max_distance=6).matrix(*lengths)
    dense = bias.detach()[None].requires_grad_()
    teacher_bias = fastkd.RelativeBias(tables["teacher"], max_distance=6)
    options = {"teacher_bias": teacher_bias, "num_heads": HEADS, "divergence": divergence, "impl": "reference"}
    fastkd.attention_kl(**inputs, student_bias=dense, **options).backward()
    terms = (dense.grad[0], dense.grad[0].abs())
    sums = [torch.autograd.grad((bias * term).sum(), table, retain_graph=True)[0] for term in terms]
    return (sums[1].norm() / sums[0].norm()).item()


@pytest.mark.parametrize("op", DIVERGENCE_OPS, ids=by_name)
@pytest.mark.parametrize(("divergence", "backend", "regime", "dtype"), value_cases(), ids=by_name)
def test_value_and_gradients(op: Op, backend: str, dtype: torch.dtype, regime: Regime, divergence: str):
    inputs, (loss, gradients), (plain_loss, plain_gradients) = wanted_of(op, dtype, regime, divergence)
    with running_on(backend) as (impl, device):
        got, got_gradients = value_and_gradients(op, to(inputs, dtype, device), impl=impl, divergence=divergence)

    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if backend == "reference" and dtype == torch.float64:
        assert torch.equal(got, loss)
        return
    # In float64 the oracle rounds its scores, too: the last digit of scores up to 50, over a distance of 1e-3.
    loss_bound, gradient_bound = (1e-12, 4e-11) if dtype == torch.float64 else (1e-6, 1e-5)
    # Triton's interpreter cuts float32 off at bfloat16 where a GPU rounds.
    truncates = backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available()
    # What the score rows' own last digit is worth, which counts beside a loss that has nearly converged; attention's
    # scores are few and large.
    digit = (1e-15 if dtype == torch.float64 else 3e-8 if op in ATTENTION_OPS else 1e-8) / loss.item()
    # Of rows that their diagonals decide, the loss is an exponential of scores, and as far off as these.
    loss_bound += (
        max(digit, torch.finfo(plain_loss.dtype).eps / 2 * largest_square(inputs)) if op is RELATION_KL else digit
    )
    assert distance(got, loss) <= max(loss_bound, 2 * distance(plain_loss, loss))
    # Near convergence a gradient is off by the last digits of its scores, which each processor's GEMM rounds in its own
    # way: over 16 draws attention's kernels were 1.2 to 1.7 times as far off as plain torch in the median, 2.4 at most.
    # Those in Triton round a tile's gradient to 16 bits before they multiply it, too.
    of_scores = backend != "reference" and op in ATTENTION_OPS and regime.name == "near_converged"
    tiled = backend == "triton" and op in ATTENTION_OPS
    for name, gradient in got_gradients.items():
        assert gradient.dtype == dtype
        error, wanted = distance(gradient, gradients[name]), gradients[name]
        of_tiles = 0 if not tiled else cancelled(inputs, divergence) if name == "student_table" else 1
        roundings = (2 if truncates else 1) * (1 + of_tiles)
        rounding = ROUNDING[dtype] * roundings + SMALLEST[dtype] * wanted.numel() ** 0.5 / wanted.norm().item()
        plain_error = (2.5 if tiled or of_scores else 2) * distance(plain_gradients[name], wanted)
        assert error <= max(gradient_bound, plain_error) + rounding, name


@over_divergences
@pytest.mark.parametrize("regime", REGIMES, ids=by_name)
def test_logit_kl_needs_no_help_from_the_reference(regime: Regime, divergence: str):
    """The row kernel alone meets its bound where plain torch in float32 is off by up to a tenth."""
    inputs = to(LOGIT_KL.make(regime, tokens=5, vocabulary=32100), torch.float32)
    loss, gradients = oracle(LOGIT_KL, inputs, divergence=divergence)
    got, got_gradients = value_and_gradients(LOGIT_KL, inputs, impl="fused", divergence=divergence)
    assert abs(got.item() - loss.item()) <= 1e-6 * abs(loss.item()) + 1e-10
    assert distance(got_gradients["student_logits"], gradients["student_logits"]) <= 1e-5


@over_fused
@pytest.mark.parametrize("seed", range(4))
def test_reverse_kl_of_unrelated_peaked_models(backend: str, seed: int):
    """A divergence of a hundred nats, and a gradient that is what remains when it is subtracted."""
    torch.manual_seed(seed)
    inputs = to(LOGIT_KL.make(Regime("far", 30.0, None), tokens=3, vocabulary=5000), torch.float32)
    _, gradients = oracle(LOGIT_KL, inputs, divergence="reverse_kl")
    with running_on(backend) as (impl, device):
        moved = to(inputs, torch.float32, device)
        _, got = value_and_gradients(LOGIT_KL, moved, impl=impl, divergence="reverse_kl")
    assert distance(got["student_logits"], gradients["student_logits"]) <= 1e-5


@over_divergences
@pytest.mark.parametrize("side", ["student_logits", "teacher_logits"])
@over_fused
def test_nan_scores_are_not_hidden(backend: str, side: str, divergence: str):
    inputs = to(LOGIT_KL.make(UNRELATED), torch.float32)
    inputs[side][2, 3] = float("nan")
    with running_on(backend) as (impl, device):
        moved = to(inputs, torch.float32, device)
        loss, got = value_and_gradients(LOGIT_KL, moved, impl=impl, divergence=divergence, reduction="none")
    assert loss.isnan().tolist() == [False, False, True, False, False, False]
    assert got["student_logits"].isnan().any(1).tolist() == loss.isnan().tolist()


@over_fused
@over_divergences
def test_a_masked_stretch_longer_than_a_block(backend: str, divergence: str):
    """The student rules out its first 1100 columns, and the kernels' first block with them."""
    inputs = to(LOGIT_KL.make(UNRELATED, tokens=2, vocabulary=3000), torch.float32)
    inputs["student_logits"][:, :1100] = float("-inf")
    exact = to(inputs, torch.float64)
    exact["student_logits"] = exact["student_logits"].clamp_min(-1e9)  # probability 0, and no -inf in the reference
    loss, gradients = oracle(LOGIT_KL, exact, divergence=divergence)
    with running_on(backend) as (impl, device):
        got, got_gradients = value_and_gradients(
            LOGIT_KL, to(inputs, torch.float32, device), impl=impl, divergence=divergence
        )
    if divergence == "forward_kl":
        assert got.item() == float("inf")
    else:
        assert distance(got, loss) <= 1e-6
    assert distance(got_gradients["student_logits"], gradients["student_logits"]) <= 1e-5


@over_backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fp16_gradients_survive_loss_scaling(backend: str, reduction: str):
    """A loss scale of 65536 is no fp16 number, and without it these gradients are none either."""
    inputs = to(LINEAR_KL.make(UNRELATED), torch.float16)
    weight = torch.full((24,), 1e-4)
    scale = torch.tensor(65536.0)
    options = {"normalizer": 24} if reduction == "mean" else {}
    _, gradients = oracle(LINEAR_KL, inputs, weight=weight, upstream=scale, reduction=reduction, **options)
    with running_on(backend) as (impl, device):
        options |= {"weight": weight.to(device), "upstream": scale.to(device), "reduction": reduction, "impl": impl}
        _, got = value_and_gradients(LINEAR_KL, to(inputs, torch.float16, device), **options)
    for name, gradient in got.items():
        assert gradient.dtype == torch.float16
        assert distance(gradient, gradients[name]) <= 1e-3, name


@over_backends
def test_labels_of_any_integer_dtype(backend: str):
    """Labels near the end of what a byte holds, and an ignore_index that it cannot hold."""
    inputs = to(LOGIT_KL.make(UNRELATED, tokens=2, vocabulary=40000), torch.float32)
    labels = torch.tensor([255, 100])
    with running_on(backend) as (impl, device):
        moved = to(inputs, torch.float32, device)
        losses = [
            fastkd.logit_kl(**moved, labels=labels.to(device, dtype), ce_weight=1.0, impl=impl)
            for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)
        ]
    assert all(torch.equal(loss, losses[0]) for loss in losses)


def test_near_converged_bf16_student():
    """bf16 logits would lose 4 to 23 % of this gradient; float32 score rows keep it."""
    inputs = to(LINEAR_KL.make(Regime("near", 5.0, 0.02), tokens=64, vocabulary=4096, width=64), torch.bfloat16)
    _, gradients = oracle(LINEAR_KL, inputs)
    _, got = value_and_gradients(LINEAR_KL, inputs, impl="fused")
    assert distance(got["student_hidden"], gradients["student_hidden"]) <= 1.5e-2


@over_token_ops
@over_backends
@over_reductions
def test_every_keyword(op: Op, backend: str, reduction: str):
    """Temperature, weights, labels with ignored ones, both term weights, reductions and an upstream gradient."""
    inputs = to(op.make(UNRELATED), torch.float32)
    tokens = inputs[op.student[0]].shape[0]
    labels = torch.randint(0, 203, (tokens,))
    labels[1] = -7
    weight = torch.rand(tokens)
    weight[2] = 0
    upstream = torch.randn(tokens) if reduction == "none" else torch.tensor(-2.5)
    options = {"divergence": "jsd", "beta": 0.3, "temperature": 2.0, "ce_weight": 0.7, "kd_weight": 0.4}
    options |= {"ignore_index": -7, "reduction": reduction}
    loss, gradients = oracle(op, inputs, upstream=upstream, labels=labels, weight=weight, **options)
    with running_on(backend) as (impl, device):
        tensors = {"labels": labels.to(device), "weight": weight.to(device), "upstream": upstream.to(device)}
        got, got_gradients = value_and_gradients(op, to(inputs, torch.float32, device), impl=impl, **tensors, **options)
    assert got.shape == loss.shape
    assert distance(got, loss) <= 1e-6
    for name, gradient in got_gradients.items():
        assert distance(gradient, gradients[name]) <= 1e-5, name


@over_token_ops
@over_backends
def test_definition(op: Op, backend: str):
    """The formula, written out here once more with F.kl_div and F.cross_entropy."""
    inputs = to(op.make(UNRELATED), torch.float64)
    labels = torch.randint(0, 203, (inputs[op.student[0]].shape[0],))
    if op is LINEAR_KL:
        student = 0.5 * inputs["student_hidden"] @ inputs["student_weight"].T + inputs["student_bias"]
        teacher = 2.0 * inputs["teacher_hidden"] @ inputs["teacher_weight"].T + inputs["teacher_bias"]
        options = {"student_scale": 0.5, "teacher_scale": 2.0}
    else:
        student, teacher, options = inputs["student_logits"], inputs["teacher_logits"], {}
    kl = F.kl_div((student / 3).log_softmax(-1), (teacher / 3).log_softmax(-1), log_target=True, reduction="batchmean")
    wanted = 0.4 * 3**2 * kl + 0.6 * F.cross_entropy(student, labels)
    options |= {"ce_weight": 0.6, "kd_weight": 0.4, "temperature": 3.0}
    with running_on(backend) as (impl, device):
        got = op.function(**to(inputs, torch.float64, device), labels=labels.to(device), impl=impl, **options)
    assert distance(got, wanted) <= 1e-12


@over_token_ops
@over_backends
@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_vocabularies_of_different_size(op: Op, backend: str, larger: str):
    """Models are compared over the shared prefix, and nothing reaches the columns beyond it."""
    inputs = to(op.make(UNRELATED), torch.float32)
    other = "teacher" if larger == "student" else "student"
    cut = dict(inputs)
    for name in inputs:
        if name.startswith(other) and not name.endswith("hidden"):
            axis = 1 if op is LOGIT_KL else 0
            inputs[name] = inputs[name].narrow(axis, 0, 150)
        if not name.endswith("hidden"):
            cut[name] = cut[name].narrow(1 if op is LOGIT_KL else 0, 0, 150)
    loss, gradients = oracle(op, cut)
    with running_on(backend) as (impl, device):
        got, got_gradients = value_and_gradients(op, to(inputs, torch.float32, device), impl=impl)
    assert distance(got, loss) <= 1e-6
    for name, gradient in got_gradients.items():
        beyond = torch.zeros(0)
        if name != "student_hidden":
            axis = 1 if op is LOGIT_KL else 0
            beyond = gradient.narrow(axis, 150, gradient.shape[axis] - 150)
            gradient = gradient.narrow(axis, 0, 150)
        assert distance(gradient, gradients[name]) <= 1e-5, name
        assert not beyond.any()


@over_backends
@pytest.mark.parametrize("op", [LOGIT_KL, LINEAR_KL], ids=by_name)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_labels_that_only_the_students_vocabulary_holds(op: Op, backend: str, divergence: str, reduction: str):
    """Cross-entropy over all of the student's columns, the divergence over those that both have."""
    inputs = to(op.make(UNRELATED, tokens=6), torch.float32)
    for name in [name for name in inputs if name.startswith("teacher") and not name.endswith("hidden")]:
        inputs[name] = inputs[name].narrow(1 if op is LOGIT_KL else 0, 0, 150)
    labels = torch.tensor([202, 150, 149, 0, -100, 180])
    options = {"divergence": divergence, "reduction": reduction, "temperature": 2.0, "weight": torch.rand(6)}
    apart = [{**options, "ce_weight": 0.0}, {**options, "ce_weight": 0.6, "kd_weight": 0.0}]
    found = [oracle(op, inputs, labels=labels, **terms) for terms in apart]
    wanted = sum(loss for loss, _ in found)
    with running_on(backend) as (impl, device):
        moved = to(inputs, torch.float32, device)
        options |= {"labels": labels.to(device), "weight": options["weight"].to(device), "ce_weight": 0.6}
        got, got_gradients = value_and_gradients(op, moved, impl=impl, **options)
    assert distance(got, wanted) <= 1e-6
    for name, gradient in got_gradients.items():
        assert distance(gradient, sum(gradients[name] for _, gradients in found)) <= 1e-5, name


@over_backends
@pytest.mark.parametrize("above", [90.0, 720.0, 1e4])
@pytest.mark.parametrize("op", [LOGIT_KL, LINEAR_KL], ids=by_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_students_whose_own_columns_are_far_above_the_others(op: Op, backend: str, above: float, dtype: torch.dtype):
    """By more than the sum of exponentials relative to the shared maximum can be, and below it."""
    inputs = to(op.make(UNRELATED, tokens=4), dtype)
    for name in [name for name in inputs if name.startswith("teacher") and not name.endswith("hidden")]:
        inputs[name] = inputs[name].narrow(1 if op is LOGIT_KL else 0, 0, 150)
    if op is LOGIT_KL:
        inputs["student_logits"][:2, 150:] += above
        inputs["student_logits"][2, 150:] -= above
    else:
        inputs["student_bias"][150:160] += above
        inputs["student_bias"][180:] -= above
    options = {"labels": torch.tensor([155, 3, 150, 0]), "ce_weight": 1.0, "temperature": 2.0, "reduction": "none"}
    loss, gradients = oracle(op, inputs, **options)
    with running_on(backend) as (impl, device):
        moved, labels = to(inputs, dtype, device), options.pop("labels").to(device)  # type: ignore[union-attr]
        got, got_gradients = value_and_gradients(op, moved, impl=impl, labels=labels, **options)
    digits = torch.finfo(dtype).eps * above  # of scores this large
    assert distance(got, loss) <= 1e-6
    for name, gradient in got_gradients.items():
        assert distance(gradient, gradients[name]) <= 1e-5 + digits, name


@over_backends
def test_labels_beyond_the_teachers_vocabulary_by_hand(backend: str):
    hidden, weight, teacher_hidden, teacher_weight = (torch.randn(n, 4) for n in (2, 40, 2, 32))
    labels = torch.tensor([35, 1])
    scores, target = hidden @ weight.T, teacher_hidden @ teacher_weight.T
    log_q, log_p = scores[:, :32].log_softmax(-1), target.log_softmax(-1)
    wanted = F.cross_entropy(scores, labels) + F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    with running_on(backend) as (impl, device):
        tensors = [x.to(device) for x in (hidden, weight, teacher_hidden, teacher_weight)]
        got = fastkd.linear_kl(*tensors, labels=labels.to(device), ce_weight=1, impl=impl)
    assert distance(got, wanted) <= 1e-6


@over_backends
@over_divergences
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("op", [LOGIT_KL, LINEAR_KL], ids=by_name)
def test_columns_masked_in_one_model(op: Op, backend: str, divergence: str, side: str):
    """Losses as the reference has them, infinite where it says so, and gradients finite where its are."""
    inputs = to(op.make(UNRELATED, tokens=4), torch.float32)
    if op is LOGIT_KL:
        inputs[f"{side}_logits"][1, 5:9] = -torch.inf
    else:
        inputs[f"{side}_bias"][5:9] = -torch.inf
    loss, gradients = oracle(op, inputs, divergence=divergence, reduction="none")
    with running_on(backend) as (impl, device):
        moved = to(inputs, torch.float32, device)
        got, got_gradients = value_and_gradients(op, moved, impl=impl, divergence=divergence, reduction="none")
    got = got.cpu()
    finite = loss.isfinite()
    assert torch.equal(got.isfinite(), finite) and torch.equal(got[~finite], loss[~finite].to(got))
    assert distance(got[finite], loss[finite]) <= 1e-6
    for name, gradient in got_gradients.items():
        gradient, known = gradient.cpu(), gradients[name].isfinite()
        assert torch.equal(gradient.isfinite(), known), name
        assert not known.any() or distance(gradient[known], gradients[name][known]) <= 1e-5, name


@over_token_ops
@over_backends
def test_dropped_tokens_are_not_even_read(op: Op, backend: str):
    """NaN in what belongs to a dropped token changes nothing, and its gradient is exactly zero."""
    inputs = to(op.make(UNRELATED), torch.float32)
    first = op.student[0]
    weight = torch.ones(inputs[first].shape[0])
    weight[::2] = 0
    kept = {k: x[1::2] if k.endswith(("hidden", "logits")) else x for k, x in inputs.items()}
    loss, gradients = oracle(op, kept)
    for name in inputs:
        if name.endswith(("logits", "hidden")):
            inputs[name] = inputs[name].masked_fill(weight[:, None] == 0, float("nan"))
    with running_on(backend) as (impl, device):
        moved = to(inputs, torch.float32, device)
        got, got_gradients = value_and_gradients(op, moved, impl=impl, weight=weight.to(device))
    assert distance(got, loss) <= 1e-6
    assert distance(got_gradients[first][1::2], gradients[first]) <= 1e-5
    for name in op.student[1:]:
        assert distance(got_gradients[name], gradients[name]) <= 1e-5, name
    assert torch.equal(got_gradients[first][::2].cpu(), torch.zeros_like(inputs[first][::2]))


@over_token_ops
@over_backends
@pytest.mark.parametrize("how", ["weight", "labels", "no tokens", "normalizer"])
def test_nothing_to_average_gives_zero(op: Op, backend: str, how: str):
    inputs = to(op.make(UNRELATED), torch.float32)
    if how == "no tokens":
        inputs = {k: x[:0] if k.endswith(("hidden", "logits")) else x for k, x in inputs.items()}
    tokens = inputs[op.student[0]].shape[0]
    options = {
        "weight": {"weight": torch.zeros(tokens)},
        "labels": {"labels": torch.full((tokens,), -100), "ce_weight": 1.0},
        "no tokens": {},
        "normalizer": {"normalizer": torch.tensor(0)},
    }[how]
    with running_on(backend) as (impl, device):
        options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        loss, gradients = value_and_gradients(op, to(inputs, torch.float32, device), impl=impl, **options)
    assert loss.item() == 0
    for name, gradient in gradients.items():
        assert gradient.shape == inputs[name].shape
        assert not gradient.any(), name


@over_token_ops
@over_backends
def test_weights_of_both_signs(op: Op, backend: str):
    """The mean is over their sum, of either sign; where they cancel there is none, and no loss passes for 0."""
    inputs = to(op.make(UNRELATED, tokens=3), torch.float32)
    for values in ([1.0, -3.0, 0.0], [1.0, -1.0, 0.0]):
        weight = torch.tensor(values)
        with running_on(backend) as (impl, device):
            moved = to(inputs, torch.float32, device)
            loss, gradients = value_and_gradients(op, moved, impl=impl, weight=weight.to(device))
        if weight.sum() == 0:
            assert not loss.isfinite()
        else:
            wanted, wanted_gradients = oracle(op, inputs, weight=weight)
            assert distance(loss, wanted) <= 1e-6
            assert all(distance(gradients[name], wanted_gradients[name]) <= 1e-5 for name in op.student)


@over_token_ops
@over_backends
def test_a_weight_of_0_is_a_loss_of_0(op: Op, backend: str):
    """With which a schedule may begin."""
    inputs = to(op.make(UNRELATED, tokens=3), torch.float32)
    with running_on(backend) as (impl, device):
        moved = to(inputs, torch.float32, device)
        loss, gradients = value_and_gradients(op, moved, impl=impl, kd_weight=0)
    assert loss == 0
    for name, gradient in gradients.items():
        assert not gradient.any(), name


@over_token_ops
@over_fused
def test_one_token_without_a_batch(op: Op, backend: str):
    inputs = to(op.make(UNRELATED, tokens=1), torch.float32)
    inputs = {k: x[0] if k.endswith(("hidden", "logits")) else x for k, x in inputs.items()}
    loss, gradients = oracle(op, inputs, reduction="none")
    with running_on(backend) as (impl, device):
        moved = to(inputs, torch.float32, device)
        got, got_gradients = value_and_gradients(op, moved, impl=impl, reduction="none")
    assert got.shape == loss.shape == ()
    assert distance(got, loss) <= 1e-6
    for name, gradient in got_gradients.items():
        assert distance(gradient, gradients[name]) <= 1e-5, name


@over_token_ops
@over_fused
@pytest.mark.parametrize("layout", ["shifted", "transposed", "every other column", "broadcast"])
def test_strides_are_respected(op: Op, backend: str, layout: str):
    """The usual shift `[:, :-1]`, other views, and an expanded tensor; batch [2, 4]."""

    def view(x: torch.Tensor) -> torch.Tensor:
        if layout == "shifted":
            return torch.cat([x, x[:, :1]], 1)[:, :-1]
        if layout == "transposed":
            return x.transpose(0, 2).contiguous().transpose(0, 2)
        if layout == "every other column":
            return x.repeat_interleave(2, -1)[..., ::2]
        return x[:1].expand(2, -1, -1)

    inputs = to(op.make(UNRELATED, tokens=8), torch.float32)
    for name in inputs:
        if name.endswith(("hidden", "logits")):
            inputs[name] = view(inputs[name].unflatten(0, (2, 4)))
    labels = torch.randint(0, 203, (2, 4))
    plain = {k: x.contiguous() for k, x in inputs.items()}
    loss, gradients = oracle(op, plain, labels=labels, ce_weight=0.5, reduction="none")
    with running_on(backend) as (impl, device):
        # .to() would make views contiguous, so a GPU gets its view there
        moved = {k: view(x.to(device)) if k.endswith(("hidden", "logits")) else x.to(device) for k, x in plain.items()}
        if device.type == "cpu":
            moved = inputs
        got, got_gradients = value_and_gradients(
            op, moved, impl=impl, labels=labels.to(device), ce_weight=0.5, reduction="none"
        )
    assert got.shape == (2, 4)
    assert distance(got, loss) <= 1e-6
    for name, gradient in got_gradients.items():
        assert distance(gradient, gradients[name]) <= 1e-5, name


@over_backends
@over_divergences
def test_masked_columns(backend: str, divergence: str):
    """Columns of -inf in both models have probability exactly zero; a row of nothing else counts as 0."""
    inputs = to(LOGIT_KL.make(UNRELATED), torch.float32)
    banned = torch.rand(6, 203) < 0.4
    banned[3] = True
    allowed = [row for row in range(6) if row != 3]
    masked = {k: x.masked_fill(banned, float("-inf")) for k, x in inputs.items()}
    wanted_loss, wanted = [], torch.zeros(6, 203, dtype=torch.float64)
    for row in allowed:  # the oracle sees the allowed columns alone
        columns = ~banned[row]
        row_inputs = {k: x[row : row + 1, columns] for k, x in inputs.items()}
        loss, gradients = oracle(LOGIT_KL, row_inputs, divergence=divergence, reduction="sum")
        wanted_loss.append(loss)
        wanted[row, columns] = gradients["student_logits"][0]
    with running_on(backend) as (impl, device):
        got, got_gradients = value_and_gradients(
            LOGIT_KL, to(masked, torch.float32, device), impl=impl, divergence=divergence, reduction="sum"
        )
    gradient = got_gradients["student_logits"].cpu()
    assert distance(got, torch.stack(wanted_loss).sum()) <= 1e-6
    assert distance(gradient, wanted) <= 1e-5
    assert not gradient[banned].any()


@over_fused
@pytest.mark.parametrize("share", [0.001, 0.04, 0.4])
@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "reverse_kl"])
def test_teacher_rules_out_what_the_student_would_say(backend: str, divergence: str, share: float):
    """Columns of -inf in the teacher alone, which hold a share of the student's probability; otherwise they agree."""
    inputs = to(LOGIT_KL.make(REGIMES[3]), torch.float32)
    banned = 203 // 2
    student = inputs["student_logits"]
    odds = student[:, banned:].logsumexp(-1) - student[:, :banned].logsumexp(-1)
    student[:, banned:] += (torch.tensor(share).logit() - odds)[:, None]
    inputs["teacher_logits"][:, banned:] = float("-inf")
    exact = to(inputs, torch.float64)
    exact["teacher_logits"] = exact["teacher_logits"].clamp_min(-1e9)
    loss, gradients = oracle(LOGIT_KL, exact, divergence=divergence)
    with running_on(backend) as (impl, device):
        moved = to(inputs, torch.float32, device)
        got, got_gradients = value_and_gradients(LOGIT_KL, moved, impl=impl, divergence=divergence)
    assert distance(got, loss) <= 1e-6
    assert distance(got_gradients["student_logits"], gradients["student_logits"]) <= 1e-5


@over_fused
def test_impossible_student_has_infinite_loss(backend: str):
    """The student rules out what the teacher finds likely: KL(p || q) is infinite, and says so."""
    inputs = to(LOGIT_KL.make(UNRELATED), torch.float32)
    inputs["student_logits"][0, 5] = float("-inf")
    with running_on(backend) as (impl, device):
        moved = to(inputs, torch.float32, device)
        assert fastkd.logit_kl(**moved, impl=impl).item() == float("inf")
        assert 0 < fastkd.logit_kl(**moved, impl=impl, divergence="reverse_kl").item() < 100


@over_fused
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_scores_that_are_immense(backend: str, divergence: str):
    """Within 1e19 all is right. Over 1e20 a KL counts as infinite, and its gradient is that of an infinite one."""
    of_one = torch.tensor([[1.0, -1.0, 0.5]])
    for scale in (1e19, 1e20):
        inputs = {"student_logits": scale * of_one, "teacher_logits": -scale * of_one}
        wanted, wanted_gradients = oracle(LOGIT_KL, inputs, divergence=divergence)
        with running_on(backend) as (impl, device):
            moved = to(inputs, torch.float32, device)
            loss, gradients = value_and_gradients(LOGIT_KL, moved, impl=impl, divergence=divergence)
        if wanted < 1e20:
            assert distance(loss, wanted) <= 1e-6
        else:
            assert loss.item() == float("inf")
        error = (gradients["student_logits"].cpu() - wanted_gradients["student_logits"]).abs().max()
        if divergence != "reverse_kl":
            assert error <= 1e-7
        elif wanted < 1e20:
            assert error <= torch.finfo(torch.float32).eps ** 2 * wanted  # log(q / p) - D, each of two float32 numbers
        else:
            assert error.isnan()


@over_fused
def test_columns_of_minus_infinity_that_are_next_to_impossible(backend: str):
    """Worked on as -1e30: infinite down to a probability of 1e-10, and 1e30 times the probability below."""
    student = torch.tensor([[0.0, float("-inf")]])
    for probability, wanted in [(1e-9, float("inf")), (1e-12, 1e18)]:
        teacher = torch.tensor([[1 - probability, probability]], dtype=torch.float64).log()
        with running_on(backend) as (impl, device):
            loss = fastkd.logit_kl(student.to(device), teacher.float().to(device), impl=impl)
        assert loss.item() == pytest.approx(wanted, rel=1e-4)


@over_fused
@pytest.mark.parametrize("offset", [-300.0, 1e4])
def test_common_offsets_change_nothing(backend: str, offset: float):
    """softmax does not see a constant; with fp32 inputs the rounding of s + offset is all that may show."""
    inputs = to(LOGIT_KL.make(REGIMES[3]), torch.float32)
    inputs["student_logits"] = (inputs["student_logits"] + offset).float()
    loss, gradients = oracle(LOGIT_KL, inputs)
    with running_on(backend) as (impl, device):
        got, got_gradients = value_and_gradients(LOGIT_KL, to(inputs, torch.float32, device), impl=impl)
    assert abs(got.item() - loss.item()) <= 1e-6 * abs(loss.item()) + 1e-10
    assert distance(got_gradients["student_logits"], gradients["student_logits"]) <= 1e-5


@over_ops
@over_backends
def test_two_backward_passes_agree(op: Op, backend: str):
    for reduction in ("mean", "none"):
        with running_on(backend) as (impl, device):
            inputs = to(op.make(UNRELATED), torch.float32, device)
            leaf = inputs[op.student[0]].requires_grad_()
            loss = op.function(**inputs, impl=impl, reduction=reduction).sum()
            (first,) = torch.autograd.grad(3 * loss, leaf, retain_graph=True)
            (second,) = torch.autograd.grad(3 * loss, leaf)
        assert torch.equal(first, second)


@over_ops
@over_backends
def test_only_the_student_learns(op: Op, backend: str):
    with running_on(backend) as (impl, device):
        inputs = {k: x.requires_grad_() for k, x in to(op.make(UNRELATED), torch.float32, device).items()}
        op.function(**inputs, impl=impl).backward()
    for name, x in inputs.items():
        assert (x.grad is not None) == (name in op.student), name


@over_fused
@pytest.mark.parametrize("trained", [("student_hidden",), ("student_weight",), ("student_bias",), ()])
def test_linear_kl_computes_the_gradients_that_are_asked_for(backend: str, trained: tuple[str, ...]):
    inputs = to(LINEAR_KL.make(UNRELATED), torch.float32)
    _, gradients = oracle(LINEAR_KL, inputs)
    for reduction in ("mean", "none"):
        with running_on(backend) as (impl, device):
            moved = to(inputs, torch.float32, device)
            for name in trained:
                moved[name].requires_grad_()
            loss = fastkd.linear_kl(**moved, impl=impl, reduction=reduction).mean()
            assert loss.requires_grad == bool(trained)
            if trained:
                loss.backward()
        for name in LINEAR_KL.student:
            assert (moved[name].grad is not None) == (name in trained)
            if name in trained:
                assert distance(moved[name].grad, gradients[name]) <= 1e-5


@over_fused
@pytest.mark.parametrize("workspace_mb", [1e-6, 0.004, 1.0])
def test_linear_kl_chunks_of_any_size(backend: str, workspace_mb: float):
    inputs = to(LINEAR_KL.make(UNRELATED, tokens=13), torch.float32)
    loss, gradients = oracle(LINEAR_KL, inputs)
    with running_on(backend) as (impl, device):
        moved = to(inputs, torch.float32, device)
        got, got_gradients = value_and_gradients(LINEAR_KL, moved, impl=impl, workspace_mb=workspace_mb)
    assert distance(got, loss) <= 1e-6
    for name, gradient in got_gradients.items():
        assert distance(gradient, gradients[name]) <= 1e-5, name


@over_token_ops
@over_backends
def test_without_a_teacher(op: Op, backend: str):
    """kd_weight=0 makes a (fused linear) cross-entropy."""
    inputs = to(op.make(UNRELATED), torch.float32)
    labels = torch.randint(0, 203, (inputs[op.student[0]].shape[0],))
    for name in list(inputs):
        if name.startswith("teacher"):
            del inputs[name]
    empty = {"teacher_logits": None} if op is LOGIT_KL else {"teacher_hidden": None, "teacher_weight": None}
    options = dict(empty, ce_weight=1.0, kd_weight=0.0)
    if op is LOGIT_KL:
        logits = inputs["student_logits"].double().requires_grad_()
    else:
        hidden = inputs["student_hidden"].double().requires_grad_()
        logits = hidden @ inputs["student_weight"].double().T + inputs["student_bias"].double()
    wanted = torch.nn.functional.cross_entropy(logits, labels)
    (wanted_gradient,) = torch.autograd.grad(wanted, logits if op is LOGIT_KL else hidden)
    with running_on(backend) as (impl, device):
        moved = to(inputs, torch.float32, device)
        got, gradients = value_and_gradients(op, moved, impl=impl, labels=labels.to(device), **options)
    assert distance(got, wanted) <= 1e-6
    assert distance(gradients[op.student[0]], wanted_gradient) <= 1e-5


@over_fused
def test_cross_entropy_of_a_confident_student(backend: str):
    """softmax - 1 at the label, where softmax is 1 to six digits."""
    logits = torch.randn(4, 203)
    logits[:, 7] = 22.0
    labels = torch.full((4,), 7)
    inputs = {"student_logits": logits, "teacher_logits": logits}
    loss, gradients = oracle(LOGIT_KL, inputs, labels=labels, ce_weight=1.0)
    with running_on(backend) as (impl, device):
        got, got_gradients = value_and_gradients(
            LOGIT_KL, to(inputs, torch.float32, device), impl=impl, labels=labels.to(device), ce_weight=1.0
        )
    assert distance(got, loss) <= 1e-6
    assert distance(got_gradients["student_logits"], gradients["student_logits"]) <= 1e-5


@over_token_ops
@over_backends
def test_normalizer_makes_accumulation_exact(op: Op, backend: str):
    """Two micro-batches of unequal size, each divided by the whole batch's token count, add up to the whole batch."""
    with running_on(backend) as (impl, device):
        inputs = to(op.make(UNRELATED), torch.float32, device)
        tokens = inputs[op.student[0]].shape[0]
        whole, whole_gradients = value_and_gradients(op, inputs, impl=impl)
        total, total_gradient = 0, 0
        for part in (slice(0, 2), slice(2, None)):
            micro = {k: x[part] if k.endswith(("hidden", "logits")) else x for k, x in inputs.items()}
            loss, gradients = value_and_gradients(op, micro, impl=impl, normalizer=torch.tensor(tokens, device=device))
            total = total + loss
            total_gradient = total_gradient + gradients[op.student[-1]] if op is LINEAR_KL else 0
        number = op.function(**inputs, impl=impl, normalizer=tokens)
    assert distance(total, whole) <= 1e-6
    assert distance(number, whole) <= 1e-6
    if op is LINEAR_KL:
        assert distance(total_gradient, whole_gradients["student_bias"]) <= 1e-5


@over_token_ops
@pytest.mark.parametrize("backend", LONG_IN_TRITON)
@over_divergences
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(op: Op, backend: str, divergence: str, reduction: str):
    with running_on(backend) as (impl, device):
        sizes = {"tokens": 3, "vocabulary": 5} | ({"width": 4} if op is LINEAR_KL else {})
        inputs = to(op.make(UNRELATED, **sizes), torch.float64, device)
        labels = torch.tensor([1, -100, 4], device=device)

        def function(*student):
            named = dict(inputs, **dict(zip(op.student, student, strict=True)))
            options = {"divergence": divergence, "reduction": reduction, "temperature": 1.5, "beta": 0.3}
            return op.function(**named, labels=labels, ce_weight=0.5, impl=impl, **options)

        leaves = [inputs[name].requires_grad_() for name in op.student]
        assert torch.autograd.gradcheck(function, leaves, fast_mode=backend == "triton")  # the interpreter is slow


@over_ops
def test_autocast_casts_as_linear_does(op: Op):
    inputs = to(op.make(UNRELATED), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradients = value_and_gradients(op, inputs)
    # logits are no input of a linear layer, and a bias is added in the scores' precision
    expected = {k: x if k.endswith(("logits", "table")) else x.bfloat16() for k, x in inputs.items()}
    wanted, wanted_gradients = value_and_gradients(op, expected)
    assert torch.equal(loss, wanted)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, wanted_gradients[name].float())


def test_results_do_not_depend_on_threads_or_runs():
    inputs = to(LOGIT_KL.make(UNRELATED, tokens=64), torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(value_and_gradients(LOGIT_KL, inputs, divergence="skew_kl"))
    finally:
        torch.set_num_threads(threads)
    (loss, gradients), *others = results
    for other_loss, other_gradients in others:
        assert torch.equal(loss, other_loss)
        assert torch.equal(gradients["student_logits"], other_gradients["student_logits"])
