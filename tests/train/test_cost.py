"""What a model costs, against sums written out by hand, a clock that is set by hand, and torch's own profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

from fastkd.train.judge import cost
from fastkd.train.models.student import new_model

WIDTH, INNER, FORWARD, VOCABULARY, LAYERS = 32, 48, 80, 200, 2
SIZES: dict[str, Any] = {
    "d_model": WIDTH, "d_kv": 12, "num_heads": 4, "d_ff": FORWARD, "num_layers": LAYERS, "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
}  # fmt: skip
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
ENCODER, DECODER = 4 * WIDTH * INNER, 8 * WIDTH * INNER  # the attention of a layer


def plain() -> Any:
    return new_model(T5Config(**SIZES), 0)


def gated_untied() -> Any:
    return new_model(T5Config(**SIZES, **UNTIED, feed_forward_proj="gated-gelu"), 0, tied=False)


def multilingual() -> Any:
    return MT5ForConditionalGeneration(MT5Config(**SIZES))


MODELS = [plain, gated_untied, multilingual]


def on_meta(**sizes: Any) -> Any:
    with torch.device("meta"):
        return T5ForConditionalGeneration(T5Config(vocab_size=32128, **sizes))


def test_published_gflops() -> None:
    """MiniEnD's two figures, and T5 v1.1-base, whose feed-forward layers hold three matrices of 768 x 2048."""
    base = on_meta(d_model=768, d_kv=64, num_heads=12, d_ff=3072, num_layers=12)
    assert f"{cost.gflops(base):.1f}" == "25.4"
    student = on_meta(d_model=384, d_kv=32, num_heads=12, d_ff=1536, num_layers=6)
    assert f"{cost.gflops(student):.2f}" == "3.17"
    assert cost.gflops(student, tokens=256) == 2 * cost.gflops(student)
    gated = on_meta(d_model=768, d_kv=64, num_heads=12, d_ff=2048, num_layers=12, feed_forward_proj="gated-gelu")
    assert cost.gflops(gated) == pytest.approx(128 * 12 * (12 * 768 * 768 + 2 * 3 * 768 * 2048) / 1e9, rel=1e-12)


def test_a_head_of_its_own_costs_parameters_and_no_gflops() -> None:
    tied, untied = plain(), new_model(T5Config(**SIZES, **UNTIED), 0, tied=False)
    assert cost.gflops(tied) == cost.gflops(untied) == 128 * LAYERS * (ENCODER + DECODER + 4 * WIDTH * FORWARD) / 1e9
    assert cost.parameters(untied) - cost.parameters(tied) == VOCABULARY * WIDTH
    matrices = VOCABULARY * WIDTH + LAYERS * (ENCODER + DECODER + 4 * WIDTH * FORWARD) + 2 * 32 * 4
    norms = WIDTH * (LAYERS * (2 + 3) + 2)
    assert cost.parameters(tied) == matrices + norms


def test_a_shared_layer_is_stored_once_and_used_twice() -> None:
    model = plain()
    before = cost.gflops(model), cost.parameters(model)
    model.encoder.block[1].layer[1] = model.encoder.block[0].layer[1]
    assert cost.gflops(model) == before[0]
    assert cost.parameters(model) == before[1] - 2 * WIDTH * FORWARD - WIDTH


def test_what_only_training_needs_costs_nothing() -> None:
    model = plain()
    before = cost.gflops(model), cost.parameters(model)
    model.hidden_projection = torch.nn.Linear(WIDTH, 64, bias=False)
    assert cost.parameters(model) == before[1] + WIDTH * 64 and cost.gflops(model) > before[0]
    model._keys_to_ignore_on_save = {"hidden_projection.weight"}
    assert (cost.gflops(model), cost.parameters(model)) == before
    model._keys_to_ignore_on_save = None
    assert cost.parameters(model) == before[1] + WIDTH * 64


@pytest.mark.parametrize("make", MODELS)
def test_memory_is_what_the_profiler_counts(make: Callable[[], Any]) -> None:
    """Where every step is an operator of its own; a fused one takes memory within itself, more or less by version."""
    model = make()
    for part in (model, model.encoder, model.decoder):
        part.set_attn_implementation("eager")
    measured = cost.measure(model, tokens=96, passes=1)
    assert (measured.parameters, measured.gflops) == (cost.parameters(model), cost.gflops(model, 96))
    assert measured.latency_ms is not None and measured.latency_ms > 0

    ids = torch.arange(96)[None]
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model.eval()(input_ids=ids, decoder_input_ids=ids, use_cache=False)
    held, peak = 0, 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert measured.peak_memory_mb == pytest.approx(peak / 2**20, abs=1e-3)
    assert peak > 4 * 96 * VOCABULARY


def test_sixteen_bits_take_less_memory() -> None:
    full, half = cost.measure(plain()).peak_memory_mb, cost.measure(plain().bfloat16()).peak_memory_mb
    assert full is not None and half is not None and half < full


class Toy(torch.nn.Module):
    """A model on [1, tokens] ids with `work` for a forward pass."""

    _keys_to_ignore_on_save = None
    device = torch.device("cpu")
    config = T5Config(vocab_size=100)

    def __init__(self, work: Callable[[torch.nn.Linear], Any]):
        super().__init__()
        self.layer = torch.nn.Linear(512, 512)
        self.work = work

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: torch.Tensor, decoder_input_ids: torch.Tensor, use_cache: bool) -> Any:
        assert input_ids.shape == decoder_input_ids.shape == (1, 128) and int(input_ids.max()) == 99
        assert not use_cache and not self.training and not torch.is_grad_enabled()
        return self.work(self.layer)


def test_memory_of_a_pass_written_out() -> None:
    """1 + 2 MiB at most: views, weights and what is done in place take none, and what is freed counts no more."""

    def work(layer: torch.nn.Linear) -> torch.Tensor:
        first = torch.zeros(2**18)
        second = torch.zeros(2**19).add_(1).view(1024, 512)[:10]
        del first
        views = [layer.weight.t().detach()[:100].expand(4, -1, -1), second[1:], layer.bias.unsqueeze(0)]
        third = torch.zeros(2**16)
        return third + sum(view.sum() for view in views)

    assert cost.measure(Toy(work), passes=1).peak_memory_mb == 3.0


def test_latency_is_the_median_after_warming_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, durations = [0.0], iter([9.0, 8.0, 0.25, 0.5, 7.0, 0.75])  # the last is the pass whose memory counts

    def work(layer: torch.nn.Linear) -> None:
        clock[0] += next(durations)

    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])
    assert cost.measure(Toy(work), passes=3).latency_ms == 500.0
    assert next(durations, None) is None


def test_the_model_stays_as_it_was() -> None:
    model = plain().train()
    model.encoder.eval()
    model.decoder.block[0].train(False)
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    cost.measure(model)
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random) and torch.is_grad_enabled()

    def fail(layer: torch.nn.Linear) -> None:
        raise RuntimeError("broken")

    toy = Toy(fail).train()
    with pytest.raises(RuntimeError, match="broken"):
        cost.measure(toy)
    assert toy.training and toy.layer.training and torch.is_grad_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("make", MODELS)
def test_on_a_gpu(make: Callable[[], Any]) -> None:
    model = make().cuda()
    measured = cost.measure(model)
    assert model.device.type == "cuda" and measured.latency_ms is not None and measured.latency_ms > 0
    logits = 4 * 128 * VOCABULARY / 2**20
    assert measured.peak_memory_mb is not None and logits < measured.peak_memory_mb < 100 * logits
