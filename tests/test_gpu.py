"""What only a GPU can show: graphs, waiting, streams, memory, results at full size and beyond 2^31 elements.

Without one every test is rehearsed: the same lines run in Triton's interpreter, on tiny inputs and with stand-ins for
what a GPU has. That shows nothing about GPUs, but that the tests are ready for one.

T tokens, V vocabulary, B batch, L length, A heads, H hidden width, d head width, N tokens of hidden states.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import backend, checks
from fastkd.divergence import DIVERGENCES
from fastkd.ops.drivers.divergence_rows import gpu_row_kernels

from .cases import (
    ATTENTION_KL,
    CKA_LOSS,
    LINEAR_KL,
    LOGIT_KL,
    OPS,
    RELATION_KL,
    ROUNDING,
    SMALLEST,
    TOKEN_OPS,
    UNRELATED,
    Inputs,
    Op,
    Regime,
    distance,
    interpreted,
    over_attention_ops,
    placed,
    running_on,
    to,
)
from .place import Place, arguments, same, value_and_gradients
from .sanitize import main as call_everything
from .sanitize import ways

NEAR = Regime("near", 5.0, 0.01)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = interpreted


# ---- a GPU, or what stands for one -----------------------------------------------------------------------------------


@pytest.fixture(params=["gpu", "rehearsal"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    if request.param == "gpu" and not torch.cuda.is_available():
        pytest.skip("no GPU is visible")
    if request.param == "rehearsal" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with running_on("triton") as (_, device):
        yield Place(torch.device(device.type, torch.cuda.current_device()) if device.type == "cuda" else device)
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # other processes may test on this GPU


def over(ops: Sequence[Op]) -> Any:
    """Parametrizes a test by op and by way of computing it."""
    pairs = [pytest.param(op, way, id=f"{op.name}-{way}".rstrip("-")) for op in ops for way in ways(op)]
    return pytest.mark.parametrize(("op", "way"), pairs)


# ---- the host and the device -----------------------------------------------------------------------------------------


@over(OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_replays_it(place: Place, op: Op, way: str, dtype: torch.dtype):
    """Forward and backward in one graph, which sees what its inputs have become."""
    place.rehearses(dtype == torch.float32)
    with ways(op)[way]():
        inputs, options = arguments(op, place, dtype)
        replay = place.captured(lambda: value_and_gradients(op, inputs, **options))
        torch.manual_seed(1)
        others, _ = arguments(op, place, dtype)
        for name, x in inputs.items():
            x.copy_(others[name])
        got = [x.clone() for x in replay()]
        wanted = value_and_gradients(op, others, **options)
        assert same(replay(), got)
    assert wanted[0].abs() > 0
    for x, y in zip(got, wanted, strict=True):
        # a library may choose other GEMMs in a graph
        assert distance(x, y) <= (1e-6 if dtype == torch.float32 else 2 * ROUNDING[dtype])


@over(OPS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_host_never_waits(place: Place, op: Op, way: str, reduction: str):
    place.rehearses(reduction == "mean" or op in TOKEN_OPS)
    with ways(op)[way]():
        inputs, options = arguments(op, place)
        options |= {} if op is CKA_LOSS else {"reduction": reduction}
        if op in TOKEN_OPS and reduction == "mean":
            options["normalizer"] = torch.full((), 7, device=place.device)
        first = value_and_gradients(op, inputs, **options)  # compiles
        with place.no_waiting():
            second = value_and_gradients(op, inputs, **options)
    assert same(first, second)


@over(OPS)
def test_work_goes_to_the_current_stream(place: Place, op: Op, way: str):
    """On another stream inputs appear late: whatever ran on the default one would have read those before."""
    place.rehearses(op in (LOGIT_KL, CKA_LOSS))
    with ways(op)[way]():
        inputs, options = arguments(op, place)
        torch.manual_seed(1)
        others, _ = arguments(op, place)
        value_and_gradients(op, inputs, **options)  # compiles
        wanted = value_and_gradients(op, others, **options)
        with place.another_stream():
            for name, x in inputs.items():
                x.copy_(others[name])
            got = value_and_gradients(op, inputs, **options)
    for x, y in zip(got, wanted, strict=True):
        assert distance(x, y) <= 1e-6


@over(OPS)
def test_work_goes_to_the_device_of_its_inputs(place: Place, op: Op, way: str):
    if place.real and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    place.rehearses(op is LOGIT_KL)
    with ways(op)[way]():
        inputs, options = arguments(op, place)
        wanted = value_and_gradients(op, inputs, **options)
        other = Place(torch.device("cuda", 1)) if place.real else place
        got = value_and_gradients(op, to(inputs, torch.float32, other.device), **placed(options, other.device))
    for x, y in zip(got, wanted, strict=True):
        assert x.device == other.device
        assert distance(x, y) <= 1e-6


@over(OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_repeat_to_the_bit(place: Place, op: Op, way: str, dtype: torch.dtype):
    """Also while something else keeps the device busy."""
    place.rehearses(dtype == torch.float32 and op in (LOGIT_KL, RELATION_KL))
    with ways(op)[way]():
        inputs, options = arguments(op, place, dtype)
        first = value_and_gradients(op, inputs, **options)
        for _ in range(place.size(10, 1)):
            assert same(value_and_gradients(op, inputs, **options), first)
        with place.under_load():
            for _ in range(place.size(10, 1)):
                assert same(value_and_gradients(op, inputs, **options), first)


# ---- torch -----------------------------------------------------------------------------------------------------------


@over(OPS)
def test_compiles_without_a_graph_break(place: Place, op: Op, way: str):
    place.rehearses(op is CKA_LOSS)  # without a GPU tests/test_ops.py has all of them
    torch._dynamo.reset()
    inputs, options = arguments(op, place)
    compiled = torch.compile(op.function, fullgraph=True, backend=place.compiler)
    with ways(op)[way]():
        wanted = value_and_gradients(op, inputs, **options)
        got = value_and_gradients(Op(op.name, compiled, op.make, op.student), inputs, **options)
    for x, y in zip(got, wanted, strict=True):
        assert distance(x, y) <= 1e-6


@over(OPS)
def test_autocast_casts_as_linear_does(place: Place, op: Op, way: str):
    """Logits are no input of a linear layer, and a bias is added in the scores' precision."""
    inputs, options = arguments(op, place)
    cast = {name: x if name.endswith(("logits", "table")) else x.bfloat16() for name, x in inputs.items()}
    with ways(op)[way]():
        with torch.autocast(place.device.type, dtype=torch.bfloat16):
            got = value_and_gradients(op, inputs, **options)
        wanted = value_and_gradients(op, cast, **options)
    assert all(x.dtype == torch.float32 for x in got)
    assert same(got, [x.float() for x in wanted])


# ---- memory ----------------------------------------------------------------------------------------------------------


@over([LINEAR_KL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_kl_stays_within_its_workspace(place: Place, op: Op, way: str, dtype: torch.dtype):
    """And the fp32 gradient of the weight, in which chunks add up."""
    tokens, vocabulary, width = place.size((8192, 32128, 512), (9, 67, 8))
    student, teacher = (torch.randn(tokens, width, device=place.device, dtype=dtype) for _ in range(2))
    weights = [torch.randn(vocabulary, width, device=place.device, dtype=dtype) / width**0.5 for _ in range(2)]
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    inputs = dict(zip(names, (student, weights[0], teacher, weights[1]), strict=True))
    hidden = tokens * width * (4 + dtype.itemsize)  # a gradient in fp32, and a copy without dropped tokens
    with ways(op)[way]():
        peak = place.peak(lambda: value_and_gradients(op, inputs, workspace_mb=64))
    assert peak <= 64 * 2**20 + 4 * vocabulary * width + hidden + 16 * 2**20


@over_attention_ops
def test_attention_needs_memory_in_proportion_to_the_length(place: Place, op: Op):
    peaks = []
    for length in place.size((1024, 2048, 4096), (5, 6, 7)):
        inputs = op.make(UNRELATED, batch=place.size(2, 1), queries=length)  # of 3 heads
        inputs = to(inputs, torch.bfloat16, place.device)
        peaks.append(place.peak(lambda inputs=inputs: value_and_gradients(op, inputs)))
    assert peaks[2] <= 2.5 * peaks[1] and peaks[1] <= 2.5 * max(peaks[0], 2**16)
    assert peaks[2] < 2 * 3 * 4096**2  # a byte for each score


@pytest.mark.parametrize("way", ways(LOGIT_KL))
def test_logit_kl_holds_nothing_but_the_gradient(place: Place, way: str):
    inputs, options = arguments(LOGIT_KL, place)
    with gpu_row_kernels()[way]():
        peak = place.peak(lambda: value_and_gradients(LOGIT_KL, inputs, **options))
    assert peak <= 2**16  # 64 tokens of 32100 pieces are 8 MB


# ---- beyond 2^31 elements --------------------------------------------------------------------------------------------


def check_rows(got: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Losses, then gradients."""
    assert distance(got[0], wanted[0]) <= 1e-6
    for x, y in zip(got[1:], wanted[1:], strict=True):
        assert distance(x, y) <= 1e-5 + 2 * ROUNDING[dtype]  # the interpreter cuts off where a GPU rounds


@pytest.mark.parametrize("way", ways(LOGIT_KL))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("odd", [0, 1])
def test_logits_beyond_2_to_the_31(place: Place, way: str, dtype: torch.dtype, odd: int):
    """First and last rows, whole; a row of odd length begins at an odd address."""
    vocabulary = place.size(128256, 66) + odd
    tokens = place.size(2**31 // vocabulary + 9, 9)
    place.needs(5 * tokens * vocabulary * dtype.itemsize)
    student, teacher = (torch.randn(tokens, vocabulary, device=place.device, dtype=dtype).mul_(3) for _ in range(2))
    labels = torch.full((tokens,), vocabulary - 1, device=place.device)
    options: dict[str, Any] = {"ce_weight": 0.5, "reduction": "none"}
    with gpu_row_kernels()[way]():
        loss, gradient = value_and_gradients(
            LOGIT_KL, {"student_logits": student, "teacher_logits": teacher}, labels=labels, **options
        )
    assert not place.real or gradient.numel() > 2**31
    for rows in (slice(0, 2), slice(tokens // 2, tokens // 2 + 2), slice(tokens - 2, tokens)):
        exact = {"student_logits": student[rows].double(), "teacher_logits": teacher[rows].double()}
        wanted = value_and_gradients(LOGIT_KL, exact, "reference", labels=labels[rows], **options)
        check_rows((loss[rows], gradient[rows]), wanted, dtype)


def exact_linear_kl(inputs: Inputs, tokens_at_once: int = 256) -> tuple[Tensor, ...]:
    """Sum of losses and its gradients in fp64, some tokens at a time."""
    exact = {name: x.double() for name, x in inputs.items()}
    names = ("student_hidden", "student_weight")
    total = [torch.zeros((), dtype=torch.float64, device=exact[names[0]].device)]
    total += [torch.zeros_like(exact[name]) for name in names]
    for start in range(0, len(exact["student_hidden"]), tokens_at_once):
        rows = slice(start, start + tokens_at_once)
        part = {name: x[rows] if name.endswith("hidden") else x for name, x in exact.items()}
        loss, hidden, weight = value_and_gradients(LINEAR_KL, part, "reference", reduction="sum")
        total[0] += loss
        total[1][rows] = hidden
        total[2] += weight
    return tuple(total)


@over([LINEAR_KL])
@pytest.mark.parametrize("at_once", [False, True], ids=["chunks", "one chunk"])
def test_linear_kl_beyond_2_to_the_31(place: Place, op: Op, way: str, at_once: bool):
    vocabulary, width = place.size(128256, 67), place.size(64, 8)
    tokens = place.size(2**31 // vocabulary + 9, 9)
    scores = tokens * vocabulary
    place.needs((18 if at_once else 4) * scores)

    def normal(*size: int, deviation: float = 1.0) -> Tensor:
        return torch.randn(*size, device=place.device, dtype=torch.float32).mul_(deviation).bfloat16()

    inputs = {
        "student_hidden": normal(tokens, width),
        "student_weight": normal(vocabulary, width, deviation=3 * width**-0.5),
        "teacher_hidden": normal(tokens, width),
        "teacher_weight": normal(vocabulary, width, deviation=3 * width**-0.5),
    }
    # room for the scores of all tokens beside their gradients, as fastkd.ops.linear_kl shares a workspace out
    workspace_mb = 14 * (tokens + 128) * vocabulary / 2**20 if at_once else None
    with ways(op)[way]():
        loss, *got = value_and_gradients(op, inputs, reduction="sum", workspace_mb=workspace_mb)
    wanted_loss, *wanted = exact_linear_kl(inputs)
    assert distance(loss, wanted_loss) <= 1e-6
    for x, y in zip(got, wanted, strict=True):
        rounding = 2 * ROUNDING[torch.bfloat16]  # of the scores' gradient, and of this
        assert distance(x, y) <= rounding
        assert distance(x[-2:], y[-2:]) <= 2 * rounding  # the last tokens, and the last pieces of the vocabulary


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@over(TOKEN_OPS)
def test_labels_out_of_range_give_nan(place: Place, op: Op, way: str, monkeypatch: pytest.MonkeyPatch):
    """Which a GPU cannot check without waiting; nothing is read out of bounds, no other token is touched."""
    monkeypatch.setattr(checks, "values_are_at_hand", lambda x: False)  # nor does a rehearsal look
    inputs, options = arguments(op, place)
    vocabulary = inputs["student_weight" if op is LINEAR_KL else "student_logits"].shape[0 if op is LINEAR_KL else 1]
    labels = options["labels"].clamp(0, vocabulary - 1)
    for i, wrong in enumerate((vocabulary, -1, 2**40, -(2**40))):
        labels[i] = wrong
    with ways(op)[way]():
        plain = {"labels": labels, "ce_weight": 0.5, "reduction": "none"}
        loss, gradient, *_ = value_and_gradients(op, inputs, **plain)
    assert loss.isnan().tolist() == [i < 4 for i in range(len(labels))]
    assert gradient.isnan().any(1).tolist() == loss.isnan().tolist()


@over(TOKEN_OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropped_tokens_may_hold_anything(place: Place, op: Op, way: str, dtype: torch.dtype):
    place.rehearses(dtype == torch.float32)
    inputs, options = arguments(op, place, dtype)
    options = {"weight": options["weight"], "labels": options["labels"], "ce_weight": 0.5}
    dropped = (options["weight"] == 0) | (options["labels"] == -100)
    with ways(op)[way]():
        wanted = value_and_gradients(op, inputs, **options)
        for name, x in inputs.items():
            if name.endswith(("hidden", "logits")):
                x[dropped] = float("nan") if name.startswith("student") else float("inf")
        got = value_and_gradients(op, inputs, **options)
    assert same(got, wanted)
    assert not got[1][dropped].any()


@over(TOKEN_OPS)
def test_nan_is_not_hidden(place: Place, op: Op, way: str):
    inputs, _ = arguments(op, place)
    for row, name in enumerate(name for name in inputs if name.endswith(("hidden", "logits"))):
        inputs[name][row, -1] = float("nan")
    with ways(op)[way]():
        loss, gradient, *_ = value_and_gradients(op, inputs, reduction="none")
    assert loss.isnan().tolist() == [i < 2 for i in range(len(loss))]
    assert gradient.isnan().any(1).tolist() == loss.isnan().tolist()


# ---- values, at full size --------------------------------------------------------------------------------------------


def check_values(
    op: Op, inputs: Inputs, what: str, gradient_bound: float, roundings: int, exact: Inputs | None = None, **options
) -> None:
    """As tests/test_contract.py does, on the device: the oracle is the reference in fp64, on these or exact inputs."""
    device, dtype = next((x.device, x.dtype) for x in inputs.values())
    wanted = value_and_gradients(op, to(exact or inputs, torch.float64, device), "reference", **options)
    plain = value_and_gradients(op, to(inputs, torch.float32, device), "reference", **options)
    got = value_and_gradients(op, inputs, **options)
    smallest = (3e-8 + (0 if exact is None else 0.02 * ROUNDING[dtype])) / wanted[0].abs().item()
    assert distance(got[0], wanted[0]) <= max(1e-6, 2 * distance(plain[0], wanted[0])) + smallest, what
    for x, y, plain_gradient in zip(got[1:], wanted[1:], plain[1:], strict=True):
        assert x.dtype == dtype
        rounding = roundings * ROUNDING[dtype] + SMALLEST[dtype] * y.numel() ** 0.5 / y.norm().item()
        assert distance(x, y) <= max(gradient_bound, 2.5 * distance(plain_gradient, y)) + rounding, what


@over(TOKEN_OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [32100, 32128, 128256])
def test_token_losses_at_full_size(place: Place, op: Op, way: str, dtype: torch.dtype, vocabulary: int):
    place.rehearses(vocabulary == 32100 and dtype == torch.bfloat16)
    sizes = {"tokens": place.size(24, 3), "vocabulary": place.size(vocabulary, 67)}
    sizes |= {"width": place.size(96, 8)} if op is LINEAR_KL else {}
    for regime in place.some((NEAR, UNRELATED, Regime("sd30", 30.0, 3.0))):
        inputs = to(op.make(regime, **sizes), dtype, place.device)
        for divergence in place.some(list(DIVERGENCES)):
            with ways(op)[way]():
                check_values(op, inputs, f"{regime.name} {divergence}", 1e-5, 1, divergence=divergence)


@over_attention_ops
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [507, 512])
@pytest.mark.parametrize(("heads", "teacher_width", "student_width"), [(12, 64, 64), (8, 64, 32), (32, 24, 12)])
def test_attention_losses_at_full_size(
    place: Place, op: Op, dtype: torch.dtype, length: int, heads: int, teacher_width: int, student_width: int
):
    place.rehearses((length, heads) == (507, 32) and dtype == torch.bfloat16)
    length, heads = place.size(length, 9), place.size(heads, 2)
    root = 3**0.5  # scores of deviation 3

    def normal(width: int) -> Tensor:
        return (root * torch.randn(2, length, heads * width, device=place.device)).to(dtype)

    inputs = {"student": normal(student_width), "teacher": normal(teacher_width)}
    if op is ATTENTION_KL:
        inputs = {
            "student_q": inputs["student"], "student_k": normal(student_width), "teacher_q": inputs["teacher"],
            "teacher_k": normal(teacher_width),
        }  # fmt: skip
    function = functools.partial(fastkd.attention_kl if op is ATTENTION_KL else fastkd.relation_kl, num_heads=heads)
    called = Op(op.name, function, op.make, ("student_q", "student_k") if op is ATTENTION_KL else ("student",))
    mask = torch.arange(length, device=place.device) < torch.tensor([[length], [length // 2]], device=place.device)
    # each is a kernel to compile: all of them for the most usual shape
    every = heads == 12 and dtype == torch.bfloat16
    for causal in place.some((True, False)):
        for divergence in place.some(list(DIVERGENCES) if every else ["forward_kl", "jsd"]):
            options = {"key_mask": mask, "causal": causal, "divergence": divergence}
            check_values(called, inputs, f"{divergence}, causal: {causal}", 1e-5, 2, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "widths"), [(8192, (512, 768)), (8191, (510, 770)), (700, (512, 768))])
def test_cka_at_full_size(place: Place, dtype: torch.dtype, tokens: int, widths: tuple[int, int]):
    """From what hidden states were before they had 16 bits, as far as fp32 arithmetic on these at most twice."""
    place.rehearses(tokens != 8191)
    tokens, widths = place.size(tokens, 150 if tokens > 1000 else 40), place.size(widths, (20, 33))
    exact = to(CKA_LOSS.make(NEAR, tokens=tokens, widths=widths), torch.float64, place.device)
    exact["student"] += 2 * torch.randn_like(exact["student"])
    mask = torch.arange(tokens, device=place.device) % 7 != 3
    inputs = to(exact, dtype, place.device)
    for squared in place.some((False, True)):
        options = {"exact": None if dtype == torch.float32 else exact, "squared": squared, "mask": mask}
        check_values(CKA_LOSS, inputs, f"squared: {squared}", 5e-5, 1, **options)


# ---- the driver of compute-sanitizer ---------------------------------------------------------------------------------


def test_everything_can_be_called(place: Place, capsys: pytest.CaptureFixture[str]):
    few = ["--divergences", "forward_kl", "jsd", "--dtypes", "bfloat16"]  # kernels to compile one after the other
    done = call_everything(place.size(few, ["--divergences", "forward_kl", "--dtypes", "float32"]))
    assert done >= 11
    assert f"{done} calls, all finite" in capsys.readouterr().out


def test_kernels_of_rows_can_be_chosen(place: Place):
    """A test that a way does not exist would pass for the wrong reason."""
    assert "triton" in gpu_row_kernels()
    assert "triton" in ways(LINEAR_KL)
    assert backend.backend_for(place.device)[0] == "triton"
    assert RELATION_KL in OPS
