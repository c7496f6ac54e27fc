"""What a T5 costs: parameters, multiply-accumulates, and the time and memory of one forward pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..common.family import is_enct5
from ..models.sharding import is_sharded
from .memory import LiveTensors

TOKENS = 128  # on both sides, as MiniEnD counts
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
    """Return the billions of multiply-accumulates in a model's linear layers for `tokens` tokens on both sides.

    Counted as in MiniEnD (Zhang et al., 2024), so 25.4 for T5-base: see `multiply_accumulates`. The head is left out.
    The decoder of an EncT5 reads one token.
    """
    return multiply_accumulates(model, tokens, 1 if is_enct5(model.config) else tokens) / 1e9


def multiply_accumulates(model: Any, encoder_tokens: int, decoder_tokens: int, *, head: bool = False) -> int:
    """Return the multiply-accumulates of a forward pass in a T5's linear layers, and in its head if asked.

    Every weight of an `nn.Linear` counts once per token that it is applied to; a layer that stands in several places
    counts in each. Embeddings, attention scores and what is not saved with the model are left out. Nothing is computed:
    the model may be on the meta device.
    """
    output, unsaved, total = model.get_output_embeddings(), _unsaved(model), 0
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, torch.nn.Linear) and (head or module is not output) and f"{name}.weight" not in unsaved:
            reads_encoder = name.startswith("encoder.") or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
            total += module.weight.numel() * (encoder_tokens if reads_encoder else decoder_tokens)
    return total


def measure(model: Any, tokens: int = TOKENS, passes: int = 5) -> Cost:
    """Return a model's `Cost`, its latency and memory measured on the device and in the precision that it is in.

    One pass reads one sequence of `tokens` tokens on either side, without padding, and computes encoder, decoder and
    the logits of all tokens at once, without gradients, dropout or a cache of keys; it generates nothing.
    latency_ms: median of `passes` passes, after two to warm up. peak_memory_mb: the most that one more pass holds at a
    time beyond the weights and the token ids, its logits included; as the allocator counts on CUDA, whose peak
    statistics are reset, and as the sizes of all tensors alive on a CPU, without what a fused operator takes within
    itself; None on other devices.
    Neither is measured, both are None, where the model's weights are spread over processes.
    The model stays where it is, and all of its modules stay in the mode they were in.
    """
    if is_sharded(model):
        return Cost(parameters(model), gflops(model, tokens))
    ids = torch.arange(tokens, device=model.device)[None] % model.config.vocab_size  # [1, tokens]

    def run() -> Any:
        return model(input_ids=ids, decoder_input_ids=ids, use_cache=False)

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
