"""What a model costs: parameters, multiply-accumulates, and the time and memory of one forward pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from ..models.anatomy import family, head_module, kind
from ..models.sharding import is_sharded
from .memory import LiveTensors

TOKENS = 128  # of which all that a model reads is made, as MiniEnD, MiniDisc and MiniLM count
MIB = 2**20


@dataclass(frozen=True)
class Cost:
    """What a model costs; None where it is not known.

    parameters: see `parameters`. gflops: see `gflops`. latency_ms, peak_memory_mb (in MiB): see `measure`.
    """

    parameters: int | None = None
    gflops: float | None = None
    latency_ms: float | None = None
    peak_memory_mb: float | None = None


def parameters(model: Any) -> int:
    """Return the number of parameters that a model is saved with, shared ones once."""
    unsaved = _unsaved(model)
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name not in unsaved)


def gflops(model: Any, tokens: int = TOKENS) -> float:
    """Return the billions of multiply-accumulates in a model's linear layers for `tokens` tokens, on both sides if any.

    Counted as in MiniEnD (Zhang et al., 2024), so 25.4 for T5-base and 10.9 for BERT-base: see `multiply_accumulates`.
    The head is left out. What tells classes apart reads one token: the decoder of an EncT5, and a BERT's pooler.
    """
    return multiply_accumulates(model, tokens, 1 if kind(model) == "classifier" else tokens) / 1e9


def multiply_accumulates(model: Any, encoder_tokens: int, decoder_tokens: int, *, head: bool = False) -> int:
    """Return the multiply-accumulates of a forward pass in a model's linear layers, and in its head if asked.

    Every weight of an `nn.Linear` counts once per token that it is applied to; a layer that stands in several places
    counts in each. The head is whatever stands behind the model's base. What is in no encoder, and does not read one's
    states, is applied to `decoder_tokens`. Embeddings, attention scores and what is not saved with the model are left
    out. Nothing is computed: the model may be on the meta device.
    """
    row, unsaved, total = family(model), _unsaved(model), 0
    counted = set(model.modules() if head else getattr(model, "base_model", model).modules())
    counted -= set() if head else {head_module(model)}
    encoder = f".{row.stacks['encoder'][0]}." if "encoder" in row.stacks else None
    reads = row.attentions["decoder_cross"].inner[1:] if "decoder_cross" in row.attentions else ()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, torch.nn.Linear | Conv1D) and module in counted and f"{name}.weight" not in unsaved:
            reads_encoder = (encoder is not None and encoder in f".{name}") or name.endswith(reads)
            total += module.weight.numel() * (encoder_tokens if reads_encoder else decoder_tokens)
    return total


def measure(model: Any, tokens: int = TOKENS, passes: int = 5) -> Cost:
    """Return a model's `Cost`, its latency and memory measured on the device and in the precision that it is in.

    One pass reads one sequence of `tokens` tokens, on either side of a model with two, or of as many as it has
    positions for, without padding, and computes all of it and the logits of all tokens at once, without gradients,
    dropout or a cache of keys; it generates nothing.
    latency_ms: median of `passes` passes, after two to warm up. peak_memory_mb: the most that one more pass holds at a
    time beyond the weights and the token ids, its logits included; as the allocator counts on CUDA, whose peak
    statistics are reset, and as the sizes of all tensors alive on a CPU, without what a fused operator takes within
    itself; None on other devices.
    Neither is measured, both are None, where the model's weights are spread over processes.
    The model stays where it is, and all of its modules stay in the mode they were in.
    """
    if is_sharded(model):
        return Cost(parameters(model), gflops(model, tokens))
    length = min(tokens, family(model).positions(model.config) or tokens)
    # [1, tokens], which do not begin with padding, for which transformers would ask for a mask.
    ids = torch.arange(5, 5 + length, device=model.device)[None] % model.config.vocab_size
    inputs = {"input_ids": ids} | ({"use_cache": False} if "decoder" in family(model).stacks else {})
    inputs |= {"decoder_input_ids": ids} if family(model).has_both else {}

    def run() -> Any:
        return model(**inputs)

    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            latency = _latency(run, model.device, passes)
            peak = _peak(run, model.device, [*model.parameters(), *model.buffers(), ids])
    finally:
        for module in training:
            module.training = True  # not train(), which would reach into its parts
    return Cost(parameters(model), gflops(model, tokens), 1e3 * latency, None if peak is None else peak / MIB)


def _unsaved(model: Any) -> Sequence[str]:
    """Return the names of parameters that only training needs, such as a projection of hidden states."""
    return model._keys_to_ignore_on_save or ()


def _latency(run: Callable[[], Any], device: torch.device, passes: int) -> float:
    """Return the median time of a run in seconds, the first two left out."""
    seconds = []
    for _ in range(passes + 2):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def _peak(run: Callable[[], Any], device: torch.device, known: Sequence[torch.Tensor]) -> int | None:
    """Return the most bytes that a run holds at a time beyond the tensors in `known`."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    live = LiveTensors()
    for tensor in known:
        live.count(tensor, "known")
    before = live.peak
    with live:
        run()
    return live.peak - before
