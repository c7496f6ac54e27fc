"""Pruning: importance is the derivative that it says, and sub-networks are the masked model, in gradients as well."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    EncoderDecoderCache,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
)
from transformers.models.t5.modeling_t5 import T5LayerNorm

from fastkd.train.common.family import PLACES, family_of
from fastkd.train.minidisc.prune import importance, masked, narrowed, normalised, order_of, sliced, widths_at
from fastkd.train.models.architectures import (
    EncT5ForSequenceClassification,
    PrunedT5ForConditionalGeneration,
    enct5_from,
    parts,
)
from fastkd.train.models.capture import capture_hidden, capture_qkv
from fastkd.train.models.student import is_tied, new_model
from tests.forks import Forks

Batch = dict[str, Tensor]
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


def t5(projection: str = "relu", tied: bool = True, **changes: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 64, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2,
        "num_decoder_layers": 3, "dropout_rate": 0.0, "decoder_start_token_id": 0, "tie_word_embeddings": tied,
    }  # fmt: skip
    model = new_model(T5Config(feed_forward_proj=projection, **sizes | changes), 0, tied).double()
    for stack in (model.encoder, model.decoder):  # tables that tell the heads apart by more than their start
        torch.nn.init.normal_(stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight, std=2.0)
    return model


def enct5(projection: str = "relu", **changes: Any) -> Any:
    return enct5_from(t5(projection, **changes), ["no", "maybe", "yes"])


MODELS = [
    pytest.param(functools.partial(make, projection), id=f"{make.__name__} {projection}")
    for make in (t5, enct5)
    for projection in ("relu", "gated-gelu")
]
each_model = pytest.mark.parametrize("make", MODELS)
each_architecture = pytest.mark.parametrize("make", [t5, enct5])


def batch_for(model: Any, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "input_ids": torch.randint(3, 64, (3, 9), generator=generator),
        "labels": torch.randint(3, 64, (3, 6), generator=generator),
    }
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 5:] = 0
    batch["labels"][0, 4:] = -100
    if isinstance(model, EncT5ForSequenceClassification):
        batch["labels"] = batch["labels"][:, 0] % 3
    return batch


def random_scores(model: Any, seed: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return normalised({name: torch.rand(part.units, generator=generator) for name, part in parts(model).items()})


def full(model: Any) -> dict[str, int]:
    return {name: part.units for name, part in parts(model).items()}


def nested_and_widths(model: Any, sparsity: float) -> tuple[Any, dict[str, int]]:
    """The model, reordered, and widths, both by the same random scores."""
    scores = random_scores(model)
    return sliced(model, full(model), order_of(scores)), widths_at(scores, sparsity)


def without(model: Any, pattern: str) -> dict[str, int]:
    """Widths that leave nothing of the parts whose name has the pattern, and half of the others."""
    return {name: 0 if re.search(pattern, name) else part.units // 2 for name, part in parts(model).items()}


def prefix_masks(model: Any, widths: dict[str, int]) -> dict[str, Tensor]:
    return {name: (torch.arange(part.units) < widths[name]).double() for name, part in parts(model).items()}


def gradients(model: Any) -> dict[str, Tensor]:
    """The gradients, zeros where there is none, and none any more."""
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def prefix(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor[tuple(map(slice, like.shape))]


def patched(model: Any) -> list[str]:
    """The weights that are a part of the model's own."""
    return [name for name, weight in model.named_parameters() if not isinstance(weight, torch.nn.Parameter)]


# ---- importance ------------------------------------------------------------------------------------------------------


@each_model
def test_importance_is_the_derivative_of_the_loss(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each batch's, in absolute values, and without the dropout that the model has in training."""

    def in_double(norm: Any, x: Tensor) -> Tensor:  # T5's own is in fp32, too coarse for finite differences
        return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)

    monkeypatch.setattr(T5LayerNorm, "forward", in_double)
    model = make(dropout_rate=0.1).train()
    batches = [batch_for(model, seed) for seed in (1, 3)]
    scores = importance(model, iter(batches))
    model.eval()

    def loss(batch: Batch) -> float:
        logits = model(**batch).logits.flatten(0, -2)
        return torch.nn.functional.cross_entropy(logits, batch["labels"].flatten()).item()

    assert {name: len(score) for name, score in scores.items()} == full(model)
    step = 1e-5
    for i, (name, part) in enumerate(parts(model).items()):
        unit = 7 * i % part.units
        slopes = []
        for batch in batches:
            losses = []
            for value in (1 + step, 1 - step):
                mask = torch.ones(part.units, dtype=torch.float64)
                mask[unit] = value
                with masked(model, {name: mask}), torch.no_grad():
                    losses.append(loss(batch))
            slopes.append((losses[0] - losses[1]) / (2 * step))
        expected = sum(map(abs, slopes))
        assert scores[name][unit].item() == pytest.approx(expected, rel=1e-4, abs=1e-7), (name, unit)


@each_architecture
def test_importance_leaves_the_model_alone(make: Callable[..., Any]) -> None:
    model = make().train()
    model.get_input_embeddings().weight.requires_grad_(False)
    learning = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())

    def broken() -> Any:
        yield batch_for(model)
        raise ZeroDivisionError

    with torch.no_grad():
        assert any(score.any() for score in importance(model, [batch_for(model)]).values())
    with pytest.raises(ZeroDivisionError):
        importance(model, broken())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == learning
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    importance(model.eval(), [batch_for(model)])
    assert not any(module.training for module in model.modules())


def test_normalised() -> None:
    scores = normalised({"a": torch.tensor([3.0, 0.0, 4.0]), "tiny": torch.tensor([1e-18, 0]), "dead": torch.zeros(4)})
    torch.testing.assert_close(scores["a"], torch.tensor([0.6, 0.0, 0.8]))
    torch.testing.assert_close(scores["tiny"], torch.tensor([1.0, 0.0]))
    assert torch.equal(scores["dead"], torch.zeros(4))


# ---- widths ----------------------------------------------------------------------------------------------------------


@st.composite
def scores_of_parts(draw: st.DrawFn) -> dict[str, Tensor]:
    """Of a few attentions and feed-forward layers, with many that are equal."""
    sizes = [("Attention", unit) for unit in draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))]
    sizes += [("DenseReluDense", unit) for unit in draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))]
    return {
        f"{i}.{kind}": torch.tensor(draw(st.lists(st.integers(0, 9), min_size=units, max_size=units))) / 10
        for i, (kind, units) in enumerate(draw(st.permutations(sizes)))
    }


@settings(max_examples=150, deadline=None)
@given(scores_of_parts(), st.floats(0, 1), st.floats(0, 1))
def test_widths_are_exact_rounded_and_nested(scores: dict[str, Tensor], one: float, other: float) -> None:
    heads = [name for name in scores if name.endswith("Attention")]
    neurons = [name for name in scores if name not in heads]
    wide, narrow = (widths_at(scores, sparsity) for sparsity in sorted((one, other)))
    assert list(wide) == list(scores) and all(0 <= narrow[name] <= wide[name] <= len(scores[name]) for name in scores)
    for widths, sparsity in zip((wide, narrow), sorted((one, other)), strict=True):
        total = sum(len(scores[name]) for name in heads)
        assert sum(widths[name] for name in heads) == total - round(sparsity * total)
        order = order_of(scores)
        kept = [1.0, *(score for name in heads for score in scores[name][order[name][: widths[name]]])]
        pruned = [0.0, *(score for name in heads for score in scores[name][order[name][widths[name] :]])]
        assert min(kept) >= max(pruned)

        assert all(widths[name] % 8 == 0 or widths[name] == len(scores[name]) for name in neurons)
        total = sum(len(scores[name]) for name in neurons)
        left = sum(widths[name] for name in neurons)
        assert abs(left - (total - round(sparsity * total))) <= 4 * len(neurons)


def test_widths_at_both_ends() -> None:
    model = t5()
    assert widths_at(random_scores(model), 0.0) == full(model)
    assert not any(widths_at(random_scores(model), 1.0).values())


def test_a_layer_that_matters_more_keeps_more() -> None:
    scores = random_scores(t5())
    name, last = "encoder.block.0.layer.0.SelfAttention", "decoder.block.2.layer.2.DenseReluDense"
    widths = widths_at(scores | {name: scores[name] + 10, last: scores[last] / 1e3}, 0.5)
    assert widths[name] == 4 and widths[last] == 0


def test_one_head_of_cross_attention_is_the_last() -> None:
    """The best of them, however much the others matter: without it no answer could depend on what is read."""
    scores = random_scores(t5())
    before = {name: score.clone() for name, score in scores.items()}
    scores["decoder.block.1.layer.1.EncDecAttention"][2] += 1
    scores |= {name: score + 10 for name, score in scores.items() if name.endswith("SelfAttention")}
    widths = widths_at(scores, 31 / 32)
    left = {name: units for name, units in widths.items() if units and name.endswith("Attention")}
    assert left == {"decoder.block.1.layer.1.EncDecAttention": 1}
    cross = [name for name in scores if name.endswith("EncDecAttention")]
    assert sum(widths_at(before, 0.9)[name] for name in cross) >= 1
    assert sum(widths_at(scores, 15 / 32)[name] for name in cross) == 1 and not scores[cross[1]].isinf().any()


# ---- sub-networks ----------------------------------------------------------------------------------------------------


@each_model
def test_the_reordered_model_computes_the_same(make: Callable[..., Any]) -> None:
    model = make()
    batch, scores = batch_for(model), random_scores(model)
    nested = sliced(model, full(model), order_of(scores))
    output, expected = nested(**batch), model(**batch)
    torch.testing.assert_close(output.logits, expected.logits, **EXACT)
    torch.testing.assert_close(output.loss, expected.loss, **EXACT)
    assert full(nested) == full(model)
    for name, part in parts(model).items():
        for weight in part.inner:
            before, after = (
                m.get_parameter(f"{name}.{weight}.weight").unflatten(0, (part.units, -1)) for m in (model, nested)
            )
            assert torch.equal(after, before[scores[name].argsort(descending=True, stable=True)])
    theirs = {parameter.data_ptr() for parameter in model.parameters()}
    assert not any(parameter.data_ptr() in theirs for parameter in nested.parameters())


def assert_is_the_masked(
    small: Any, nested: Any, widths: dict[str, int], batch: Batch
) -> tuple[Any, Any, dict[str, Tensor]]:
    """Compares a slice's logits and gradients with the masked model's; returns both outputs and its gradients."""
    with masked(nested, prefix_masks(nested, widths)):
        expected = nested(**batch)
        expected.loss.backward()
    exact = gradients(nested)
    output = small(**batch)
    output.loss.backward()
    torch.testing.assert_close(output.logits, expected.logits, **EXACT)
    for name, gradient in gradients(small).items():
        torch.testing.assert_close(gradient, prefix(exact[name], gradient), rtol=1e-6, atol=1e-9, msg=name)
    return output, expected, exact


@each_model
@pytest.mark.parametrize("sparsity", [0.3, 0.8, 0.95])
def test_slices_equal_the_masked_model(make: Callable[..., Any], sparsity: float) -> None:
    model = make()
    batch, (nested, widths) = batch_for(model), nested_and_widths(model, sparsity)
    small = sliced(nested, widths)
    assert full(small) == widths == small.config.widths
    _, expected, exact = assert_is_the_masked(small, nested, widths, batch)

    with narrowed(nested, widths):
        output = nested(**batch)
        output.loss.backward()
    torch.testing.assert_close(output.logits, expected.logits, **EXACT)
    for name, gradient in gradients(nested).items():
        torch.testing.assert_close(gradient, exact[name], rtol=1e-6, atol=1e-9, msg=name)


@each_architecture
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_implementations_of_attention(make: Callable[..., Any], attention: str) -> None:
    model = make()
    model.set_attn_implementation(attention)
    nested, widths = nested_and_widths(model, 0.7)
    small = sliced(nested, widths)
    assert {m.config._attn_implementation for m in (nested, small)} == {attention}
    with masked(nested, prefix_masks(nested, widths)):
        expected = nested(**batch_for(model)).logits
    torch.testing.assert_close(small(**batch_for(model)).logits, expected, **EXACT)


@each_architecture
def test_slices_of_slices(make: Callable[..., Any]) -> None:
    """Straight from a model, from the reordered one, and from a larger sub-network: the same weights."""
    model = make().eval()
    order, (nested, larger) = order_of(random_scores(model)), nested_and_widths(model, 0.4)
    widths = widths_at(random_scores(model), 0.8)
    straight = sliced(model, widths, order)
    assert not straight.training
    for other in (sliced(nested, widths), sliced(sliced(model, larger, order), widths)):
        assert type(other) is type(straight) and other.config.to_dict() == straight.config.to_dict()
        for name, value in straight.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name
    assert not hasattr(model.config, "widths") or model.config.widths is None


def test_a_slice_keeps_precision_labels_and_generation_config() -> None:
    model = t5().bfloat16()
    model.generation_config.max_new_tokens = 17
    small = sliced(model, without(model, "^$"))
    assert small.generation_config.max_new_tokens == 17 and small.generation_config is not model.generation_config
    classifier = enct5().bfloat16()
    pruned = sliced(classifier, without(classifier, "^$"))
    assert pruned.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert {p.dtype for m in (small, pruned) for p in m.parameters()} == {torch.bfloat16}


@each_architecture
def test_wrong_widths(make: Callable[..., Any]) -> None:
    model = make()
    neurons, heads = "encoder.block.0.layer.1.DenseReluDense", "decoder.block.0.layer.1.EncDecAttention"
    with pytest.raises(ValueError, match=rf"expected 0 to 64 neurons in {re.escape(neurons)}, got 65"):
        sliced(model, full(model) | {neurons: 65})
    with pytest.raises(ValueError, match=rf"expected 0 to 4 heads in {re.escape(heads)}, got -1"):
        sliced(model, full(model) | {heads: -1})
    small = sliced(model, full(model) | {heads: 2})
    with pytest.raises(ValueError, match="expected 0 to 2 heads"):
        sliced(small, full(model))


# ---- nothing left in a layer -----------------------------------------------------------------------------------------

EMPTY = [
    *((t5, pattern) for pattern in ("encoder.block.0", "decoder.block.0", "decoder.block.1", "decoder.*SelfAttention")),
    *((t5, pattern) for pattern in ("Attention", "Dense", "")),
    *((enct5, pattern) for pattern in ("encoder.block.0", "decoder.block.0", "Attention", "Dense", "")),
]


@pytest.mark.parametrize(("make", "pattern"), EMPTY)
def test_layers_without_heads_or_neurons(make: Callable[..., Any], pattern: str, tmp_path: Path) -> None:
    model = make().eval()
    batch, widths = batch_for(model), without(model, pattern)
    nested, _ = nested_and_widths(model, 0.0)
    small = sliced(nested, widths)
    assert 0 in widths.values()
    small_output, expected, _ = assert_is_the_masked(small, nested, widths, batch)
    with narrowed(nested, widths):
        torch.testing.assert_close(nested(**batch).logits, expected.logits, **EXACT)

    small.save_pretrained(tmp_path)
    own = AutoModelForSeq2SeqLM if make is t5 else AutoModelForSequenceClassification
    for auto in (AutoModel, own):
        loaded = auto.from_pretrained(tmp_path, dtype=torch.float64)
        assert type(loaded) is type(small) and full(loaded) == widths
        assert loaded.state_dict().keys() == small.state_dict().keys()
        assert all(torch.equal(value, small.state_dict()[name]) for name, value in loaded.state_dict().items())
        torch.testing.assert_close(loaded(**batch).logits, small_output.logits, **EXACT)


@pytest.mark.parametrize("pattern", [pattern for make, pattern in EMPTY if make is t5] + ["nothing"])
def test_generation_with_a_cache_is_that_without(pattern: str) -> None:
    """It must know how far it has come, whichever layers are left to remember that."""
    model = t5(num_layers=3).eval()  # transformers' cache has as many layers as the encoder
    nested, _ = nested_and_widths(model, 0.0)
    widths, batch = without(model, pattern), batch_for(model)
    options = {name: batch[name] for name in ("input_ids", "attention_mask")} | {
        "max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "num_beams": 2,
    }  # fmt: skip
    small = sliced(nested, widths)
    expected = small.generate(**options, use_cache=False)
    assert expected.shape == (3, 10)
    assert torch.equal(small.generate(**options, use_cache=True), expected)
    with narrowed(nested, widths):
        assert torch.equal(nested.generate(**options, use_cache=True), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("pattern", ["decoder.block.0", "decoder.block.1", "decoder.*SelfAttention"])
def test_a_decoder_that_reads_in_two_goes(pattern: str, attention: str) -> None:
    """Tokens that come together after others, from a cache, must see those before them and none behind."""
    model = t5(num_layers=3).eval()
    model.set_attn_implementation(attention)
    small = sliced(model, without(model, pattern))
    batch = batch_for(model)
    ids, first = batch["input_ids"], batch["labels"].clamp_min(0)
    with torch.no_grad():
        expected = small(input_ids=ids, decoder_input_ids=first).logits
        before = small(input_ids=ids, decoder_input_ids=first[:, :2], use_cache=True)
        cache = {name: value for name, value in before.items() if isinstance(value, EncoderDecoderCache)}
        after = small(input_ids=ids, decoder_input_ids=first[:, 2:], **cache)
    torch.testing.assert_close(torch.cat([before.logits, after.logits], 1), expected, **EXACT)


def test_another_process_loads_what_was_saved(transformers_forks: Forks, tmp_path: Path) -> None:
    """One that imports only fastkd.train.models, beside transformers."""
    for make in (t5, enct5):
        model = make().eval()
        small = sliced(model, without(model, "block.0"), order_of(random_scores(model)))
        small.save_pretrained(tmp_path / make.__name__)
        batch = batch_for(model)
        torch.save((batch, small(**batch).logits.detach()), tmp_path / f"{make.__name__}.pt")
    code = f"""
import torch, transformers
import fastkd.train.models
from pathlib import Path
folder = Path({str(tmp_path)!r})
for name, auto in (("t5", "AutoModelForSeq2SeqLM"), ("enct5", "AutoModelForSequenceClassification")):
    batch, logits = torch.load(folder / f"{{name}}.pt")
    for auto in ("AutoModel", auto):
        model = getattr(transformers, auto).from_pretrained(folder / name, dtype=torch.float64)
        torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-10, atol=1e-12)
        print(type(model).__name__)
"""
    done = transformers_forks.run("-c", code)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.split()
        == [PrunedT5ForConditionalGeneration.__name__] * 2 + [EncT5ForSequenceClassification.__name__] * 2
    )


# ---- one set of weights ----------------------------------------------------------------------------------------------


@each_architecture
def test_learning_moves_only_the_prefix(make: Callable[..., Any]) -> None:
    model = make()
    batch, (nested, widths) = batch_for(model), nested_and_widths(model, 0.6)
    before = {name: parameter.detach().clone() for name, parameter in nested.named_parameters()}
    small = sliced(nested, widths)
    optimizer = torch.optim.SGD(nested.parameters(), 0.05)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        with narrowed(nested, widths):
            loss = nested(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    shapes = dict(small.named_parameters())
    assert shapes.keys() == before.keys() and any(shapes[name].shape != before[name].shape for name in shapes)
    cross = "decoder.block.0.layer.1.EncDecAttention"  # EncT5's decoder attends to one token: its q and k stay
    for name, parameter in nested.named_parameters():
        moved = parameter.detach() != before[name]
        inside = prefix(moved, shapes[name])
        assert inside.sum() == moved.sum(), name
        if make is t5 and inside.numel() and not name.startswith(cross):
            assert inside.any(), name


@each_architecture
@pytest.mark.parametrize("raises", [False, True])
def test_narrowed_restores_everything(make: Callable[..., Any], raises: bool) -> None:
    nested, widths = nested_and_widths(make(), 0.6)
    batch = batch_for(nested)
    before, heads, expected = copy.deepcopy(nested.state_dict()), full(nested), nested(**batch).logits
    try:
        with narrowed(nested, widths):
            assert patched(nested)
            assert not torch.allclose(nested(**batch).logits, expected)
            if raises:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert raises
    assert not patched(nested) and full(nested) == heads
    assert torch.equal(nested(**batch).logits, expected)
    assert all(torch.equal(value, before[name]) for name, value in nested.state_dict().items())


@each_architecture
def test_sub_networks_take_turns(make: Callable[..., Any]) -> None:
    """Gradients of several, one context after the other, add up; all widths are the model itself."""
    model = make()
    batch, (nested, _) = batch_for(model), nested_and_widths(model, 0.0)
    each = [full(model), *(widths_at(random_scores(model), sparsity) for sparsity in (0.5, 0.8))]
    separate = []
    for widths in each:
        with masked(nested, prefix_masks(nested, widths)):
            nested(**batch).loss.backward()
        separate.append(gradients(nested))
    for widths in each:
        with narrowed(nested, widths):
            nested(**batch).loss.backward()
    for name, gradient in gradients(nested).items():
        total = sum(found[name] for found in separate)
        torch.testing.assert_close(gradient, total, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # but not in older transformers
@each_architecture
def test_activation_checkpointing(make: Callable[..., Any]) -> None:
    model = make().train()
    batch, (nested, widths) = batch_for(model), nested_and_widths(model, 0.8)
    found, computed = [], []
    count = nested.encoder.block[0].layer[1].DenseReluDense.wi.register_forward_hook(lambda *_: computed.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            nested.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with narrowed(nested, widths):
            nested(**batch).loss.backward()
        found.append(gradients(nested))
    count.remove()
    assert len(computed) == 3  # the last one again, on the way back
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, **EXACT, msg=name)
    assert not patched(nested)


@each_architecture
def test_captures_see_the_narrowed_widths(make: Callable[..., Any]) -> None:
    model = make()
    batch, (nested, _) = batch_for(model), nested_and_widths(model, 0.0)
    widths = {name: max(units // 4 * (1 + i % 3), 1) for i, (name, units) in enumerate(full(model).items())}
    small = sliced(nested, widths)
    layers = dict.fromkeys(PLACES, 1)
    states = {"encoder": [0, 1, 2], "decoder": [0, 1]}
    with capture_qkv(small, layers) as expected, capture_hidden(small, states) as expected_states:
        small(**batch)
    with narrowed(nested, widths), capture_qkv(nested, layers) as found, capture_hidden(nested, states) as found_states:
        nested(**batch)
    for place, where in PLACES.items():
        module = family_of(model.config).attentions[place].outer.removesuffix(".o")
        heads = widths[f"{where.stack}.block.0.{module}"]
        for ours, theirs in zip(found[place], expected[place], strict=True):
            assert ours.shape[-1] == 8 * heads
            torch.testing.assert_close(ours, theirs, **EXACT)
    for name, numbers in states.items():
        for ours, theirs in zip(found_states[name], expected_states[name], strict=True):
            assert ours.shape[-1] == 32
            torch.testing.assert_close(ours, theirs, **EXACT)
        assert len(found_states[name]) == len(numbers)


# ---- the head --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_stays_tied_or_untied(tied: bool, tmp_path: Path) -> None:
    model = t5("gated-gelu", tied)
    batch, (nested, widths) = batch_for(model), nested_and_widths(model, 0.5)
    assert is_tied(model) == is_tied(nested) == tied
    torch.testing.assert_close(nested(**batch).logits, model(**batch).logits, **EXACT)
    small = sliced(nested, widths)
    small.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float64)
    for network in (small, loaded):
        assert is_tied(network) == tied
        assert network.encoder.embed_tokens.weight is network.decoder.embed_tokens.weight is network.shared.weight
        assert torch.equal(network.lm_head.weight, model.lm_head.weight)
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in loaded.parameters())
    torch.testing.assert_close(loaded(**batch).logits, small(**batch).logits, **EXACT)


@pytest.mark.parametrize("path", ["memory", "disk"])
def test_mt5(path: str, tmp_path: Path) -> None:
    # Its config is not T5's, and its decoder's output is never scaled.
    config = MT5Config(vocab_size=64, d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=2, dropout_rate=0.0)
    torch.manual_seed(0)
    model = MT5ForConditionalGeneration(config).double().eval()
    ids = torch.randint(3, 64, (2, 9))
    scores = {name: torch.rand(part.units) for name, part in parts(model).items()}
    made = sliced(model, {name: part.units for name, part in parts(model).items()}, order_of(scores))
    if path == "disk":
        made.save_pretrained(tmp_path)
        made = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float64)
    expected = model(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(made(input_ids=ids, decoder_input_ids=ids).logits, expected, rtol=1e-12, atol=1e-12)
