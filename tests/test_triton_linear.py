"""linear_kl on a GPU: on one where there is one, else in Triton's interpreter.

tests/test_contract.py runs it against the oracle. Here is what is particular to its driver: blocks of tokens and chunks
of scores, what is written and what may be read, and how much memory it takes.
"""

from __future__ import annotations

import importlib
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastkd
from fastkd.checks import numbers
from fastkd.ops.drivers import chunks
from fastkd.ops.drivers import linear_kl_gpu as op
from fastkd.ops.drivers.linear_kl_call import Call, Projection

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
    placed,
    running_on,
    to,
    value_and_gradients,
)

pytest.importorskip("triton", reason="Triton is not installed")
rows = importlib.import_module("fastkd.kernels.rows.host")  # ours: a failure to import it is a failure

T, V = 20, 103
# One rounding of the gradient's dtype, of an element of the scores' gradient and of the sum that it is multiplied into.
ROUNDINGS = {torch.float64: 0.0, torch.float32: 0.0, torch.float16: 2 * 4.9e-4, torch.bfloat16: 2 * 3.9e-3}

pytestmark = interpreted


def run(inputs: dict[str, Tensor], **options):
    """Loss and gradients of the public function."""
    options = placed(options, DEVICE)
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    with running_on("triton") as (impl, _):
        return value_and_gradients(LINEAR_KL, inputs, impl=impl, **options)


def largest_score(inputs: dict[str, Tensor]) -> float:
    exact = to(inputs, torch.float64)
    scores = exact["student_hidden"] @ exact["student_weight"].t() + exact["student_bias"]
    return scores.abs().max().item()


def check(inputs: dict[str, Tensor], **options) -> None:
    """Against the oracle on the same inputs, and what float32 arithmetic makes of it."""
    dtype = inputs["student_hidden"].dtype
    loss, gradients = oracle(LINEAR_KL, inputs, **options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    plain_loss, plain = value_and_gradients(LINEAR_KL, to(inputs, wide), impl="reference", **options)
    got, got_gradients = run(inputs, **options)
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


@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "tvd"])
def test_every_dtype(dtype: torch.dtype, divergence: str):
    check(inputs_of(REGIMES[1], dtype), divergence=divergence, **everything())


def test_temperature_one_with_labels():
    """Where the cross-entropy takes the divergence's exponentials."""
    check(inputs_of(), **(everything() | {"temperature": 1.0}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_alone(dtype: torch.dtype):
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
    with running_on("triton") as (impl, _):
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
    got, got_gradients = run(inputs, **options)
    assert distance(got, loss) <= 1e-6
    for name, gradient in got_gradients.items():
        kept = len(gradients[name])
        assert distance(gradient[:kept], gradients[name]) <= 1e-5, name
        assert not gradient[kept:].any()


@pytest.mark.parametrize("tokens, vocabulary, width", [(1, 5, 3), (16, 32, 16), (17, 33, 40), (5, 1, 2)])
def test_shapes_at_and_off_the_edges(tokens: int, vocabulary: int, width: int):
    inputs = inputs_of(tokens=tokens, vocabulary=vocabulary, width=width)
    if vocabulary == 1:  # nothing to tell apart
        loss, gradients = run(inputs)
        assert loss == 0 and not any(gradient.any() for gradient in gradients.values())
    else:
        check(inputs, divergence="jsd")


def test_reduction_none():
    options = everything() | {"reduction": "none", "upstream": torch.randn(T)}
    check(inputs_of(), **options)


# ---- what may not be read, and what may not be hidden ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropped_tokens_leave_nothing(dtype: torch.dtype):
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
    got, got_gradients = run(poisoned, weight=weight)
    assert distance(got, loss) <= 1e-6
    hidden = got_gradients["student_hidden"].cpu()
    assert not hidden[~kept].any()
    assert distance(hidden[kept], gradients["student_hidden"]) <= 1e-5 + ROUNDINGS[dtype]
    for name in ("student_weight", "student_bias"):
        assert distance(got_gradients[name], gradients[name]) <= 1e-5 + ROUNDINGS[dtype], name


def test_all_tokens_dropped_and_none_there():
    inputs = inputs_of()
    for tokens in (T, 0):
        some = {name: x[:tokens] if name.endswith("hidden") else x for name, x in inputs.items()}
        loss, gradients = run(some, weight=torch.zeros(tokens))
        assert loss == 0 and not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("side", ["student_hidden", "teacher_hidden"])
def test_nan_is_not_hidden(side: str):
    inputs = inputs_of()
    inputs[side][3, 2] = NAN
    loss, gradients = run(inputs, reduction="none")
    assert loss.isnan().nonzero().flatten().tolist() == [3]
    assert gradients["student_hidden"].isnan().any(1).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("divergence", ["forward_kl", "skew_kl"])
def test_masked_columns(divergence: str):
    """-inf in both biases, also of all that come first: the oracle sees the other columns alone."""
    inputs = inputs_of()
    banned = torch.rand(V) < 0.3
    banned[:40] = True
    exact = {name: x if name.endswith("hidden") else x[~banned] for name, x in inputs.items()}
    for name in ("student_bias", "teacher_bias"):
        inputs[name] = inputs[name].masked_fill(banned, -INF)
    loss, gradients = oracle(LINEAR_KL, exact, divergence=divergence)
    got, got_gradients = run(inputs, divergence=divergence)
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
    loss, gradients = run(inputs, divergence=divergence)
    assert loss == 0 and not any(gradient.any() for gradient in gradients.values())


def test_labels_out_of_range():
    """Where a GPU cannot check them: the loss is NaN, nothing beyond the scores is read, and others are not touched."""
    inputs = {name: x.to(DEVICE) for name, x in inputs_of().items()}
    labels = torch.randint(0, V, (T,), device=DEVICE)
    labels[3], labels[7] = 2**40, -5
    with running_on("triton"):
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
    loss, gradients = run(inputs)
    got, got_gradients = run({name: view(x) if x.dim() == 2 else x for name, x in inputs.items()})
    # on a GPU another binary, which may fuse products and sums differently
    assert distance(got, loss) <= 1e-6 if loss.is_cuda else torch.equal(got, loss)
    for name, gradient in gradients.items():
        assert distance(got_gradients[name], gradient) <= 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_small_workspaces(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Several blocks of tokens, each of several chunks of scores: as with memory for all."""
    monkeypatch.setattr(op, "GEMM_ROWS", 16)
    inputs, options = inputs_of(dtype=dtype, tokens=30), everything(tokens=30)
    loss, gradients = run(inputs, **options)
    got, got_gradients = run(inputs, workspace_mb=0.004, **options)
    assert distance(got, loss) <= 1e-7
    for name, gradient in gradients.items():
        assert distance(got_gradients[name], gradient) <= 1e-6 + ROUNDINGS[dtype], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [33, 103, 112])
def test_rows_of_any_vocabulary_are_aligned(vocabulary: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """And what comes of them is what it was of rows side by side."""
    inputs, options = inputs_of(dtype=dtype, vocabulary=vocabulary), everything(vocabulary=vocabulary)
    seen, call_rows = [], Call.rows

    def spied(call: Call, student: Tensor, teacher: Tensor, *rest, **others) -> None:
        seen.extend([student, teacher, rest[3]])
        call_rows(call, student, teacher, *rest, **others)

    monkeypatch.setattr(Call, "rows", spied)
    loss, gradients = run(inputs, **options)
    wanted = -(-vocabulary // 16) * 16
    assert [(x.shape[1], x.stride()) for x in seen] == 3 * [(vocabulary, (wanted, 1))]
    assert all(x.data_ptr() % 16 == 0 for x in seen)
    monkeypatch.setattr(chunks, "PADDED", 1)
    got, got_gradients = run(inputs, **options)
    assert seen[3].stride() == (vocabulary, 1)
    assert distance(got, loss) <= 1e-7
    for name, gradient in gradients.items():
        assert distance(got_gradients[name], gradient) <= 1e-6 + ROUNDINGS[dtype], name


@pytest.mark.parametrize("workspace_mb", [None, 0.001])
def test_hidden_gradients_are_summed_up_in_fp32(workspace_mb: float | None, monkeypatch: pytest.MonkeyPatch):
    """Where a GEMM that writes bf16 adds up parts of its sums in bf16, as on a GPU."""
    monkeypatch.setattr(op, "GEMM_ROWS", 4)
    inputs, options, multiply_ = inputs_of(dtype=torch.bfloat16, width=40), everything(), op.multiply_
    _, gradients = run(inputs, workspace_mb=workspace_mb, **options)

    def divided_(out: Tensor, a: Tensor, b: Tensor, scale: float, add: bool = False) -> None:
        parts = zip(a.split(8, 1), b.split(8, 0), strict=True)
        for i, (x, y) in enumerate(parts if out.dtype == torch.bfloat16 else [(a, b)]):
            multiply_(out, x, y, scale, add=add or i > 0)

    monkeypatch.setattr(op, "multiply_", divided_)
    _, got = run(inputs, workspace_mb=workspace_mb, **options)
    assert torch.equal(got["student_hidden"], gradients["student_hidden"])


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


class Memory(TorchDispatchMode):
    """The most bytes that tensors made within held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is not None and id(storage) not in given | self.live.keys():
                self.live[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, id(storage))
        self.peak = max(self.peak, sum(self.live.values()))
        return out


@pytest.mark.parametrize("workspace_mb", [16, 128, 768])
@pytest.mark.parametrize("gradients", [[False] * 3, [True, False, False], [True] * 3], ids=["none", "hidden", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_memory_is_the_workspace(
    dtype: torch.dtype, gradients: list[bool], workspace_mb: int, monkeypatch: pytest.MonkeyPatch
):
    """Beside the gradients: the hidden states without dropped tokens, numbers of tokens, and what sums up the weight's
    gradient in fp32, or as much. Narrow hidden states, whose products are small beside their scores, take no more."""
    monkeypatch.setattr(op, "multiply_", lambda *_, **__: None)
    monkeypatch.setattr(Call, "rows", lambda *_, **__: None)
    tokens, vocabulary, widths, mebibyte = 4096, 32128, (192, 256), 2**20
    student, teacher = (
        Projection(
            *(
                torch.empty(*shape, dtype=dtype, device="meta")
                for shape in ((tokens, H), (vocabulary, H), (vocabulary,))
            ),
            1.0,
        )
        for H in widths
    )
    coefficient = torch.empty(tokens, dtype=torch.float64, device="meta")
    workspace = workspace_mb * mebibyte
    call = Call(
        student, teacher, vocabulary, vocabulary, coefficient, None, workspace, gradients, None, vocabulary, None
    )
    with Memory() as memory:
        outputs = op.on_gpu(call, 0, 0.5, 1.0, 1.0, 0.0)
    beside = sum(x.numel() * x.element_size() for x in outputs)
    accumulator = 4 * vocabulary * widths[0] if gradients[1] and dtype.itemsize == 2 else 0
    numbers_of_tokens = 2**20
    masked = student.hidden.numel() * student.hidden.element_size()
    assert memory.peak - beside <= workspace + accumulator + masked + numbers_of_tokens
    assert memory.peak >= min(workspace, 2 * 4 * tokens * vocabulary) // 2  # it was looked at


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_launch_makes_loss_and_gradient(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    launched = []
    kernel = rows.rows_kernel

    class Counted:
        def __getitem__(self, grid):
            launched.append(grid)
            return kernel[grid]

    monkeypatch.setattr(rows, "rows_kernel", Counted())
    run(inputs_of(dtype=dtype), **everything())
    assert launched == [(T,)]


def test_fp16_gradients_are_lifted_into_range():
    """Coefficients of one over a million tokens times probabilities are no fp16 numbers."""
    inputs = inputs_of(dtype=torch.float16)
    arguments = {"normalizer": 1e6, "upstream": torch.tensor(2.0**16)}
    _, gradients = oracle(LINEAR_KL, inputs, **arguments)
    _, got = run(inputs, **arguments)
    for name, gradient in got.items():
        assert distance(gradient, gradients[name]) <= 2e-3, name


def test_the_same_again():
    inputs, options = inputs_of(), everything()
    first, second = run(inputs, **options), run(inputs, **options)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(x, second[1][name]) for name, x in first[1].items())


@pytest.mark.long
def test_gradcheck():
    inputs = {
        name: x.to(DEVICE) for name, x in inputs_of(dtype=torch.float64, tokens=3, vocabulary=19, width=4).items()
    }
    leaves = [inputs[name].requires_grad_() for name in LINEAR_KL.student]
    rest = {name: x for name, x in inputs.items() if name not in LINEAR_KL.student}
    with running_on("triton") as (impl, _):

        def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return fastkd.linear_kl(hidden, weight, student_bias=bias, divergence="skew_kl", impl=impl, **rest)

        assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)
