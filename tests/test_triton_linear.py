"""linear_kl on a GPU, by tiles and by rows: on one where there is one, else in Triton's interpreter.

tests/test_contract.py runs the way that a call chooses, which in the interpreter is by rows. Here ways are forced, with
tiles so small that every shape has several, at and off their edges; and what is particular to them is checked: parts
of the vocabulary, blocks of tokens and columns, what is written and what may be read.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.checks import numbers
from fastkd.divergence import divergence_code
from fastkd.ops.drivers import linear_kl_gpu as op

from .cases import (
    DEVICE,
    INF,
    LINEAR_KL,
    NAN,
    REGIMES,
    UNRELATED,
    Regime,
    distance,
    interpreted,
    oracle,
    over_divergences,
    placed,
    running_on,
    to,
    value_and_gradients,
)

pytest.importorskip("triton", reason="Triton is not installed")
kernels = importlib.import_module("fastkd.kernels.linear_kl")  # ours: a failure to import it is a failure
rows = importlib.import_module("fastkd.kernels.rows")
tuning = importlib.import_module("fastkd.kernels.tuning")

T, V = 20, 103
WAYS = ["tiles", "rows"]
# One rounding of the gradient's dtype, of an element of the scores' gradient and of the sum that it is multiplied into.
ROUNDINGS = {torch.float64: 0.0, torch.float32: 0.0, torch.float16: 2 * 4.9e-4, torch.bfloat16: 2 * 3.9e-3}

pytestmark = interpreted

over_ways = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that T tokens are two blocks, and V columns four tiles, in up to three stretches."""
    monkeypatch.setattr(tuning, "heuristic", lambda *line: tuning.Config((16, 32, 16), 4, 1))
    monkeypatch.setattr(kernels, "STRETCHES", 3)


@pytest.fixture(params=["one", "many"])
def stretches(request, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The vocabulary whole, and in stretches."""
    monkeypatch.setattr(kernels, "STRETCHES", 1 if request.param == "one" else 8)
    monkeypatch.setattr(kernels, "_processors", lambda x: 64)
    yield request.param


def run(way: str, inputs: dict[str, Tensor], **options):
    """Loss and gradients of the public function, which goes this way."""
    options = placed(options, DEVICE)
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    with running_on("triton") as (impl, _), op._going_by(way):
        return value_and_gradients(LINEAR_KL, inputs, impl=impl, **options)


def largest_score(inputs: dict[str, Tensor]) -> float:
    exact = to(inputs, torch.float64)
    scores = exact["student_hidden"] @ exact["student_weight"].t() + exact["student_bias"]
    return scores.abs().max().item()


def check(way: str, inputs: dict[str, Tensor], **options) -> None:
    """Against the oracle on the same inputs, and what float32 arithmetic makes of it."""
    dtype = inputs["student_hidden"].dtype
    loss, gradients = oracle(LINEAR_KL, inputs, **options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    plain_loss, plain = value_and_gradients(LINEAR_KL, to(inputs, wide), impl="reference", **options)
    got, got_gradients = run(way, inputs, **options)
    loss_bound, gradient_bound = (1e-12, 4e-11) if wide == torch.float64 else (1e-6, 1e-5)
    # What the last digit of the scores is worth: a loss moves by it times the total variation, at most sqrt(D / 2).
    size = loss.abs().max().item()
    loss_bound += torch.finfo(wide).eps / 4 * largest_score(inputs) * (2 * size) ** 0.5 / size
    assert distance(got, loss) <= max(loss_bound, 2 * distance(plain_loss, loss))
    for name, gradient in got_gradients.items():
        assert gradient.dtype == dtype
        bound = max(gradient_bound, 2 * distance(plain[name], gradients[name]))
        assert distance(gradient, gradients[name]) <= bound + ROUNDINGS[dtype], name


def inputs_of(regime: Regime = UNRELATED, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Tensor]:
    return to(LINEAR_KL.make(regime, **({"tokens": T, "vocabulary": V} | sizes)), dtype)


def everything(tokens: int = T, vocabulary: int = V) -> dict:
    """Labels at both edges and ignored, weights, both terms, a temperature and an upstream gradient."""
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[:4] = torch.tensor([0, vocabulary - 1, -100, 31])
    weight = torch.rand(tokens)
    weight[5] = 0
    options = {"labels": labels, "weight": weight, "ce_weight": 0.7, "kd_weight": 0.4}
    return options | {"temperature": 2.0, "beta": 0.3, "upstream": torch.tensor(-2.5)}


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("regime", REGIMES[2:], ids=lambda regime: regime.name)
def test_tiles_in_float32(regime: Regime, divergence: str):
    check("tiles", inputs_of(regime), divergence=divergence)


@over_divergences
def test_tiles_of_every_divergence_with_everything(divergence: str):
    check("tiles", inputs_of(), divergence=divergence, **everything())


@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "tvd"])
def test_every_dtype(dtype: torch.dtype, divergence: str):
    check("tiles", inputs_of(REGIMES[1], dtype), divergence=divergence, **everything())


def test_temperature_one_with_labels():
    """Where the cross-entropy takes the divergence's exponentials."""
    check("tiles", inputs_of(), **(everything() | {"temperature": 1.0}))


@over_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_alone(way: str, dtype: torch.dtype):
    """There is no teacher then."""
    inputs = {name: x for name, x in inputs_of(dtype=dtype).items() if name.startswith("student")}
    inputs |= {"teacher_hidden": None, "teacher_weight": None}
    options = everything() | {"kd_weight": 0.0}
    options.pop("temperature")

    def copied(kind: torch.dtype) -> dict:
        return {name: x if x is None else x.to(kind) for name, x in inputs.items()}

    loss, gradients = value_and_gradients(LINEAR_KL, copied(torch.float64), impl="reference", **options)
    moved = {name: x if x is None else x.to(DEVICE) for name, x in inputs.items()}
    options = placed(options, DEVICE)
    with running_on("triton") as (impl, _), op._going_by(way):
        got, got_gradients = value_and_gradients(LINEAR_KL, moved, impl=impl, **options)
    assert distance(got, loss) <= 1e-6
    for name, gradient in got_gradients.items():
        assert distance(gradient, gradients[name]) <= 1e-5 + ROUNDINGS[dtype], name


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_vocabularies_of_different_size_and_scales(larger: str):
    inputs, options = inputs_of(), {"student_scale": 0.5, "teacher_scale": 2.0, "divergence": "jsd"}
    other = "teacher" if larger == "student" else "student"
    for name in (f"{other}_weight", f"{other}_bias"):
        inputs[name] = inputs[name][:80]
    cut = {name: x if name.endswith("hidden") else x[:80] for name, x in inputs.items()}
    loss, gradients = oracle(LINEAR_KL, cut, **options)
    got, got_gradients = run("tiles", inputs, **options)
    assert distance(got, loss) <= 1e-6
    for name, gradient in got_gradients.items():
        kept = len(gradients[name])
        assert distance(gradient[:kept], gradients[name]) <= 1e-5, name
        assert not gradient[kept:].any()


@pytest.mark.parametrize("tokens, vocabulary, width", [(1, 5, 3), (16, 32, 16), (17, 33, 40), (5, 1, 2)])
def test_shapes_at_and_off_the_edges(tokens: int, vocabulary: int, width: int):
    inputs = inputs_of(tokens=tokens, vocabulary=vocabulary, width=width)
    if vocabulary == 1:  # nothing to tell apart
        loss, gradients = run("tiles", inputs)
        assert loss == 0 and not any(gradient.any() for gradient in gradients.values())
    else:
        check("tiles", inputs, divergence="jsd")


@over_ways
def test_reduction_none(way: str):
    options = everything() | {"reduction": "none", "upstream": torch.randn(T)}
    check(way, inputs_of(), **options)


def test_student_near_the_teacher_in_one_stretch_and_many(stretches: str):
    """Where sums and moments must not lose what two all but equal models differ by."""
    for divergence in ("forward_kl", "reverse_kl"):
        check("tiles", inputs_of(REGIMES[3]), divergence=divergence)


def test_references_that_move_in_every_tile(stretches: str):
    """Scores that rise by more than the slack from tile to tile, and fall in the other model."""
    inputs = inputs_of()
    ramp = torch.linspace(0, 90, V)
    inputs["student_bias"], inputs["teacher_bias"] = ramp, ramp.flip(0)
    check("tiles", inputs, divergence="reverse_kl", **everything())
    inputs["teacher_bias"] = ramp + 0.01 * torch.randn(V)
    check("tiles", inputs, divergence="forward_kl")


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_both_ways_agree(divergence: str):
    inputs, options = inputs_of(), everything()
    (loss, gradients), (other, others) = (run(way, inputs, divergence=divergence, **options) for way in WAYS)
    assert distance(loss, other) <= 1e-6
    for name, gradient in gradients.items():
        assert distance(gradient, others[name]) <= 1e-5, name


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "tvd"])
def test_gradient_of_the_row_kernel_continues_from_the_statistics(divergence: str):
    """They are those of kernels/rows.py, number by number but for the references of the exponentials."""
    inputs = {name: x.to(DEVICE) for name, x in inputs_of(REGIMES[1]).items()}
    student = inputs["student_hidden"], inputs["student_weight"], inputs["student_bias"], 1.0
    teacher = inputs["teacher_hidden"], inputs["teacher_weight"], inputs["teacher_bias"], 1.0
    coefficient = torch.rand(T, dtype=torch.float64, device=DEVICE)
    labels = torch.randint(0, V, (T,), device=DEVICE)
    objective = divergence_code(divergence), 0.3, 2.0, 1.3, 0.7
    loss, gradient, other = torch.empty_like(coefficient), *(torch.empty(T, V, device=DEVICE) for _ in range(2))
    stats, scores = kernels.statistics(student, teacher, V, coefficient, labels, loss, *objective)
    kernels.gradient(student, teacher, V, coefficient, labels, stats, scores, 0, gradient, *objective)
    matrices = [torch.addmm(bias, hidden, weight.t()) for hidden, weight, bias, _ in (student, teacher)]
    rows.divergence_rows(*matrices, coefficient, labels, None, stats, other, *objective)
    assert distance(gradient, other) <= 2e-6


# ---- what may not be read, and what may not be hidden ----------------------------------------------------------------


@over_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropped_tokens_leave_nothing(way: str, dtype: torch.dtype):
    """Every other one, and a whole block of them."""
    inputs = inputs_of(dtype=dtype, tokens=40)
    weight = torch.ones(40)
    weight[::2] = 0
    weight[16:32] = 0
    kept = weight != 0
    exact = {name: x[kept] if name.endswith("hidden") else x for name, x in inputs.items()}
    loss, gradients = oracle(LINEAR_KL, exact)
    poisoned = {
        name: x.masked_fill(~kept[:, None], NAN if "student" in name else INF) if name.endswith("hidden") else x
        for name, x in inputs.items()
    }
    got, got_gradients = run(way, poisoned, weight=weight)
    assert distance(got, loss) <= 1e-6
    hidden = got_gradients["student_hidden"].cpu()
    assert not hidden[~kept].any()
    assert distance(hidden[kept], gradients["student_hidden"]) <= 1e-5 + ROUNDINGS[dtype]
    for name in ("student_weight", "student_bias"):
        assert distance(got_gradients[name], gradients[name]) <= 1e-5 + ROUNDINGS[dtype], name


@over_ways
def test_all_tokens_dropped_and_none_there(way: str):
    inputs = inputs_of()
    for tokens in (T, 0):
        some = {name: x[:tokens] if name.endswith("hidden") else x for name, x in inputs.items()}
        loss, gradients = run(way, some, weight=torch.zeros(tokens))
        assert loss == 0 and not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("side", ["student_hidden", "teacher_hidden"])
def test_nan_is_not_hidden(side: str):
    inputs = inputs_of()
    inputs[side][3, 2] = NAN
    loss, gradients = run("tiles", inputs, reduction="none")
    assert loss.isnan().nonzero().flatten().tolist() == [3]
    assert gradients["student_hidden"].isnan().any(1).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("divergence", ["forward_kl", "skew_kl"])
def test_masked_columns(divergence: str):
    """-inf in both biases, also of the whole first tiles: the oracle sees the other columns alone."""
    inputs = inputs_of()
    banned = torch.rand(V) < 0.3
    banned[:40] = True
    exact = {name: x if name.endswith("hidden") else x[~banned] for name, x in inputs.items()}
    for name in ("student_bias", "teacher_bias"):
        inputs[name] = inputs[name].masked_fill(banned, -INF)
    loss, gradients = oracle(LINEAR_KL, exact, divergence=divergence)
    got, got_gradients = run("tiles", inputs, divergence=divergence)
    assert distance(got, loss) <= 1e-6
    assert distance(got_gradients["student_hidden"], gradients["student_hidden"]) <= 1e-5
    for name in ("student_weight", "student_bias"):
        assert not got_gradients[name].cpu()[banned].any()
        assert distance(got_gradients[name].cpu()[~banned], gradients[name]) <= 1e-5, name


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("side", ["student_bias", "teacher_bias"])
def test_a_model_of_nothing_but_masked_columns(side: str, divergence: str):
    inputs = inputs_of()
    inputs[side] = inputs[side].fill_(-INF)
    loss, gradients = run("tiles", inputs, divergence=divergence)
    assert loss == 0 and not any(gradient.any() for gradient in gradients.values())


def test_labels_out_of_range():
    """Where a GPU cannot check them: the loss is NaN, nothing beyond the scores is read, and others are not touched."""
    inputs = {name: x.to(DEVICE) for name, x in inputs_of().items()}
    labels = torch.randint(0, V, (T,), device=DEVICE)
    labels[3], labels[7] = 2**40, -5
    with running_on("triton"), op._going_by("tiles"):
        loss, *gradients = torch.ops.fastkd.linear_kl(
            *(inputs[f"student_{name}"] for name in ("hidden", "weight", "bias")),
            *(inputs[f"teacher_{name}"] for name in ("hidden", "weight", "bias")),
            torch.ones(T, dtype=torch.float64, device=DEVICE), labels,
            numbers(1.0, 1.0, 0.0, 0.0, 1.0), [True] * 3, 0, numbers(0.5, 1.0, 1.0, 1.0),
        )  # fmt: skip
    assert loss.isnan().nonzero().flatten().tolist() == [3, 7]
    assert gradients[0].isnan().any(1).nonzero().flatten().tolist() == [3, 7]


# ---- memory and blocks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows with gaps", "columns first", "every other column"])
def test_strides(layout: str):
    def view(x: Tensor) -> Tensor:
        if layout == "rows with gaps":
            return torch.cat([x, torch.full_like(x, NAN)], 1)[:, : x.shape[1]]
        return x.t().contiguous().t() if layout == "columns first" else x.repeat_interleave(2, 1)[:, ::2]

    inputs = {name: x.to(DEVICE) for name, x in inputs_of().items()}
    loss, gradients = run("tiles", inputs)
    got, got_gradients = run("tiles", {name: view(x) if x.dim() == 2 else x for name, x in inputs.items()})
    # on a GPU another binary, which may fuse products and sums differently
    assert distance(got, loss) <= 1e-6 if loss.is_cuda else torch.equal(got, loss)
    for name, gradient in gradients.items():
        assert distance(got_gradients[name], gradient) <= 1e-6, name


@over_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_small_workspaces(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Several blocks of tokens, each of several chunks of scores, or several of columns: as with memory for all."""
    monkeypatch.setattr(op, "GEMM_ROWS", 16)
    inputs, options = inputs_of(dtype=dtype, tokens=30), everything(tokens=30)
    loss, gradients = run(way, inputs, **options)
    got, got_gradients = run(way, inputs, workspace_mb=0.004, **options)
    assert distance(got, loss) <= 1e-7
    for name, gradient in gradients.items():
        assert distance(got_gradients[name], gradient) <= 1e-6 + ROUNDINGS[dtype], name


def test_blocks_of_tokens():
    """Those of T 8192 and 1024, V 128256, H 4096, and of T 16384, V 32128, H 512, in bf16 and 768 MiB."""
    mebibytes = 768 * 2**20
    for tokens, wanted in ((8192, (768, 8192)), (1024, (768, 1024))):
        assert op.rows_at_once(tokens, 8 * 128256, 2 * 128256, 4 * 128256 * 4096, mebibytes) == wanted
    scores, gradients = op.rows_at_once(16384, 8 * 32128, 2 * 32128, 4 * 32128 * 512, mebibytes)
    assert scores % 128 == gradients % 128 == 0 and gradients >= 3 * scores
    assert 0.95 * mebibytes <= 32128 * (8 * scores + 2 * gradients) <= mebibytes
    assert [part.stop - part.start for part in op.parts_of(1024, 768)] == [512, 512]
    assert [part.stop - part.start for part in op.parts_of(300, 128)] == [128, 128, 44]


def test_work_is_shared_out_evenly():
    """On 132 multiprocessors none has much more to do than the mean, and few blocks of tokens split the vocabulary."""
    for row_blocks, tiles in ((1, 502), (8, 502), (64, 2004), (128, 502), (200, 502)):
        stretches = kernels._stretches(row_blocks, tiles, 132)
        items, length = row_blocks * -(-tiles // -(-tiles // stretches)), -(-tiles // stretches)
        busiest = -(-items // 132) * length
        assert busiest <= 1.35 * row_blocks * tiles / 132 or stretches == kernels.STRETCHES


def test_the_way_that_is_chosen():
    """As the table in fastkd/ops/drivers/linear_kl_gpu.py says; nothing else than 16 bits on a GPU goes by tiles."""

    def way(width_t: int, width_s: int, gradients: bool, divergence: str, dtype: torch.dtype = torch.bfloat16) -> bool:
        class Hidden:
            is_cuda, itemsize = True, dtype.itemsize

            def __init__(self, width: int):
                self.shape = (8, width)

        student, teacher = (op.Projection(Hidden(width), None, None, 1.0) for width in (width_s, width_t))  # type: ignore[arg-type]
        return op._by_tiles(student, teacher, gradients, divergence_code(divergence))

    assert way(768, 192, False, "forward_kl") and not way(768, 192, True, "forward_kl")
    assert not way(768, 192, False, "jsd") and not way(256, 256, False, "jsd") and way(256, 256, True, "reverse_kl")
    assert not way(768, 512, False, "forward_kl") and not way(4096, 4096, False, "forward_kl")
    assert not way(256, 256, True, "forward_kl", torch.float32)


def test_fp16_gradients_are_lifted_into_range():
    """Coefficients of one over a million tokens times probabilities are no fp16 numbers."""
    inputs = inputs_of(dtype=torch.float16)
    for way in WAYS:
        arguments = {"normalizer": 1e6, "upstream": torch.tensor(2.0**16)}
        _, gradients = oracle(LINEAR_KL, inputs, **arguments)
        _, got = run(way, inputs, **arguments)
        for name, gradient in got.items():
            assert distance(gradient, gradients[name]) <= 2e-3, (way, name)


def test_the_same_again():
    inputs, options = inputs_of(), everything()
    first, second = run("tiles", inputs, **options), run("tiles", inputs, **options)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(x, second[1][name]) for name, x in first[1].items())


@pytest.mark.long
def test_gradcheck():
    inputs = {
        name: x.to(DEVICE) for name, x in inputs_of(dtype=torch.float64, tokens=3, vocabulary=19, width=4).items()
    }
    leaves = [inputs[name].requires_grad_() for name in LINEAR_KL.student]
    rest = {name: x for name, x in inputs.items() if name not in LINEAR_KL.student}
    with running_on("triton") as (impl, _), op._going_by("tiles"):

        def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return fastkd.linear_kl(hidden, weight, student_bias=bias, divergence="skew_kl", impl=impl, **rest)

        assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)
