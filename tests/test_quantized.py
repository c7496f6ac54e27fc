"""Heads whose weights are quantised: dequantised a block of rows at a time, as a teacher and as a student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastkd
from fastkd import quantized

from .cases import (
    LINEAR_KL,
    ROUNDING,
    UNRELATED,
    by_name,
    distance,
    group_of_one,
    installed,
    running_on,
    to,
)

VOCABULARY, WIDTH = 203, 24


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "FEWEST_ROWS", 64)  # so that the vocabulary takes several, the last a part of one


class Codes:
    """A weight in int8, a scale for each row, which notes the blocks of rows that it is asked for."""

    def __init__(self, vocabulary: int = VOCABULARY, width: int = WIDTH, device: Any = "cpu"):
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(-127, 128, (vocabulary, width), dtype=torch.int8, generator=generator)
        scales = torch.rand(vocabulary, 1, generator=generator) / 128
        self.codes, self.scales, self.asked = codes.to(device), scales.to(device), []

    def rows(self, start: int, stop: int) -> Tensor:
        self.asked.append(stop - start)
        return self.codes[start:stop] * self.scales[start:stop]

    @property
    def weight(self) -> fastkd.QuantizedWeight:
        return fastkd.QuantizedWeight(self.codes.shape, self.codes.device, self.rows)

    @property
    def whole(self) -> Tensor:
        return self.codes * self.scales


def inputs_of(dtype: torch.dtype, device: Any, tokens: int = 24, vocabulary: int = VOCABULARY) -> dict[str, Tensor]:
    torch.manual_seed(0)
    inputs = LINEAR_KL.make(UNRELATED, tokens=tokens, vocabulary=vocabulary, width=WIDTH)
    return to(inputs, dtype, device)


def run(inputs: dict[str, Any], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradients of what is a tensor of the student's."""
    leaves = {name: inputs[name].requires_grad_() for name in LINEAR_KL.student if isinstance(inputs[name], Tensor)}
    loss = fastkd.linear_kl(**inputs, **options)
    gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
    return loss.detach(), dict(zip(leaves, gradients, strict=True))


WAYS = [("reference", "mean"), ("cpp", "mean"), ("cpp", "none"), ("triton", "mean")]


@pytest.mark.parametrize(("backend", "reduction"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=by_name)
@pytest.mark.parametrize("model", ["teacher", "student"])
def test_a_head_is_what_it_is_when_dequantised(backend: str, reduction: str, dtype: torch.dtype, model: str):
    with running_on(backend) as (impl, device):
        inputs = inputs_of(dtype, device, tokens=4 if backend == "triton" else 24)
        codes = Codes(width=inputs[f"{model}_hidden"].shape[1], device=device)
        options = {"reduction": reduction, "impl": impl, "divergence": "forward_kl"}
        wanted, gradients = run({**inputs, f"{model}_weight": codes.whole.to(dtype)}, **options)
        loss, got = run({**inputs, f"{model}_weight": codes.weight}, **options)
    bound = 4 * ROUNDING[torch.promote_types(dtype, torch.float32)]
    assert loss.dtype == wanted.dtype and distance(loss, wanted) <= bound
    assert got.keys() == gradients.keys() - ({"student_weight"} if model == "student" else set())
    for name, gradient in got.items():
        assert gradient.dtype == dtype and distance(gradient, gradients[name]) <= 2 * bound + 2 * ROUNDING[dtype], name


def test_no_more_than_a_block_of_rows_is_there(monkeypatch: pytest.MonkeyPatch):
    """A block is less than a sixteenth of a chunk's scores, or FEWEST_ROWS; a ninth of the workspace is left to it."""
    monkeypatch.setattr(quantized, "FEWEST_ROWS", 8)
    vocabulary, at_once = 1003, 10
    codes, inputs = Codes(vocabulary), inputs_of(torch.float32, "cpu", 96, vocabulary)
    workspace = at_once * 2 * vocabulary * 4 * 9 / 8 + 100  # for scores of both models
    run({**inputs, "teacher_weight": codes.weight}, workspace_mb=workspace / 2**20, impl="fused")
    assert max(codes.asked) * WIDTH <= at_once * vocabulary / 16
    assert sum(codes.asked) == 10 * vocabulary, "ten chunks of tokens, each with the whole vocabulary"


def test_under_autocast_and_over_a_group(tmp_path: Path):
    codes, inputs = Codes(), inputs_of(torch.float32, "cpu")
    quantised = {**inputs, "teacher_weight": codes.weight}
    with torch.autocast("cpu", torch.bfloat16):
        wanted, _ = run({**inputs, "teacher_weight": codes.whole})
        assert torch.equal(run(quantised)[0], wanted)
    wanted, gradients = run({**inputs, "teacher_weight": codes.whole})
    with group_of_one(tmp_path) as group:
        loss, got = run(quantised, vocab_group=group)
    assert distance(loss, wanted) <= 1e-6 and distance(got["student_weight"], gradients["student_weight"]) <= 1e-6


@pytest.mark.long
def test_compiled():
    codes, inputs = Codes(), inputs_of(torch.float32, "cpu")
    compiled = torch.compile(fastkd.linear_kl, backend="eager")
    wanted, gradients = run({**inputs, "teacher_weight": codes.whole})
    leaves = {name: x.requires_grad_() for name, x in inputs.items() if name in LINEAR_KL.student}
    loss = compiled(**{**inputs, **leaves, "teacher_weight": codes.weight})
    loss.backward()
    assert distance(loss, wanted) <= 1e-6
    assert all(distance(x.grad, gradients[name]) <= 1e-6 for name, x in leaves.items())


def test_a_top_k_of_a_quantised_head():
    codes, inputs = Codes(), inputs_of(torch.float32, "cpu")
    head = fastkd.Head(codes.weight, inputs["teacher_bias"], 0.5, 3.0)
    got = fastkd.TopK.from_hidden(inputs["teacher_hidden"], head, 5)
    wanted = fastkd.TopK.from_hidden(inputs["teacher_hidden"], head._replace(weight=codes.whole), 5)
    assert torch.equal(got.indices, wanted.indices)
    torch.testing.assert_close(got.log_probs, wanted.log_probs)


def test_what_does_not_fit_is_an_error():
    codes, inputs = Codes(), inputs_of(torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"teacher_weight: expected shape \[any, 24\], got \[203, 23\]"):
        run({**inputs, "teacher_weight": Codes(width=23).weight})
    short = fastkd.QuantizedWeight(codes.codes.shape, codes.codes.device, lambda i, j: codes.whole[i : j - 1])
    with pytest.raises(ValueError, match=r"expected rows\(0, 64\) to be a plain tensor of shape \[64, 24\]"):
        run({**inputs, "teacher_weight": short})
    scaled = nn.Parameter(codes.scales)
    parameter = fastkd.QuantizedWeight(
        codes.codes.shape, codes.codes.device, lambda i, j: scaled[i:j] * codes.codes[i:j]
    )
    assert not parameter[:3].requires_grad
    listed = fastkd.QuantizedWeight(codes.codes.shape, codes.codes.device, lambda i, j: codes.whole[i:j].tolist())
    with pytest.raises(ValueError, match="got list"):
        run({**inputs, "teacher_weight": listed})
    elsewhere = fastkd.QuantizedWeight(codes.codes.shape, torch.device("meta"), codes.rows)
    with pytest.raises(ValueError, match="teacher_weight: expected device cpu, that of the student, got meta"):
        run({**inputs, "teacher_weight": elsewhere})
    top = fastkd.TopK.from_logits(torch.randn(24, VOCABULARY), 4)
    with pytest.raises(TypeError, match="student_weight: a quantised one does not go with a TopK"):
        fastkd.linear_kl(inputs["student_hidden"], Codes(width=WIDTH // 2).weight, top)
    with pytest.raises(TypeError, match="teacher_logits: expected a tensor, got QuantizedWeight"):
        fastkd.logit_kl(inputs["student_hidden"], codes.weight)


# ---- packages that quantise -----------------------------------------------------------------------------------------


def matches(module: nn.Module, whole: Tensor) -> None:
    """Rows are the dequantised weight's, whichever are asked for, and so is the loss."""
    vocabulary, width = whole.shape
    weight = fastkd.head(module).weight
    assert isinstance(weight, fastkd.QuantizedWeight) and weight.shape == whole.shape
    weight = weight.to(whole.dtype)
    for start, stop in [(0, vocabulary), (0, 1), (3, 300), (vocabulary - 1, vocabulary), (333, 334), (200, 513)]:
        assert torch.equal(weight[start:stop], whole[start:stop])
    torch.manual_seed(0)
    h_s, w_s, h_t = torch.randn(20, 8, requires_grad=True), torch.randn(vocabulary, 8), torch.randn(20, width)
    loss = fastkd.linear_kl(h_s, w_s, h_t.to(whole.dtype), fastkd.head(module))
    loss.backward()
    bias = None if module.bias is None else module.bias.detach()
    assert distance(loss, fastkd.linear_kl(h_s, w_s, h_t.to(whole.dtype), whole, teacher_bias=bias)) <= 1e-6


@pytest.mark.long
def test_what_torchao_has_quantised():
    quantization = installed("torchao.quantization")
    configs = ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig")
    for config in (*configs, "IntxWeightOnlyConfig"):
        model = nn.Sequential(nn.Linear(64, 1001)).bfloat16()
        quantization.quantize_(model, getattr(quantization, config)())
        assert type(model[0].weight).__module__.startswith("torchao")
        matches(model[0], model[0].weight.dequantize())


@pytest.mark.long
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_what_bitsandbytes_has_quantised_to_4_bits(kind: str, nested: bool):
    """Blocks of a width of 48 begin amid a row: its own kernel for CPUs takes other maxima then."""
    bnb = installed("bitsandbytes")
    for width, storage in ((64, torch.uint8), (128, torch.bfloat16), (48, torch.uint8)):
        layer = bnb.nn.Linear4bit(width, 1001, compress_statistics=nested, quant_type=kind, quant_storage=storage)
        with pytest.raises(TypeError, match="got a Linear4bit that bitsandbytes is yet to quantise"):
            fastkd.head(layer)
        layer = layer.to("cpu")
        state = layer.weight.quant_state
        if width != 48:
            matches(layer, bnb.functional.dequantize_4bit(layer.weight.data, state))
            continue
        maxima = state.absmax
        if nested:
            maxima = bnb.functional.dequantize_blockwise(maxima, state.state2) + state.offset
        codes = layer.weight.data.view(-1).long()
        values = state.code[torch.stack([codes >> 4, codes & 15], 1).view(-1)]
        matches(layer, (values * maxima.repeat_interleave(64)[: 1001 * 48]).view(1001, 48))


@pytest.mark.long
def test_what_bitsandbytes_has_quantised_to_int8():
    bnb = installed("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(64, 1001, has_fp16_weights=False)
    with pytest.raises(TypeError, match="got a Linear8bitLt that bitsandbytes is yet to quantise"):
        fastkd.head(layer)
    layer = layer.to("cpu").eval()
    whole = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    matches(layer, whole)
    with torch.no_grad():
        layer(torch.randn(3, 64))  # which moves the codes
    matches(layer, whole)


@pytest.mark.long
def test_quantised_heads_that_have_no_rows_of_their_own():
    bnb = installed("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 1024).to("cpu")
    layer.weight.quant_state.packing_format_for_cpu = True  # as it does in eval() on a CPU with bfloat16 instructions
    with pytest.raises(TypeError, match="got one that bitsandbytes has packed anew for this CPU"):
        fastkd.head(layer)
    with pytest.raises(TypeError, match=r"got bitsandbytes\.nn\.modules\.OutlierAwareLinear with a weight that is"):
        fastkd.head(bnb.nn.OutlierAwareLinear(64, 128))
    peft = installed("peft")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 1024)).to("cpu")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="expected a head without LoRA where it is quantised, got the"):
        fastkd.head(adapted.get_base_model()[0])
    with adapted.disable_adapter():
        assert isinstance(fastkd.head(adapted.get_base_model()[0]).weight, fastkd.QuantizedWeight)
