"""What is captured: the right tensors, in the graph, from any number of models, and no hook left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import families
import pytest
import torch

import fastkd
from fastkd.train.common.family import PLACES, family_of
from fastkd.train.models import anatomy
from fastkd.train.models.capture import capture_hidden, capture_qkv
from fastkd.train.training.forward import Needs, forward

EVERYWHERE = dict.fromkeys(PLACES, 2)


def hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_captured_states_are_the_projections(tiny: Callable[..., Any], make_batch: Callable[..., Any]) -> None:
    model, batch = tiny(64, 1, layers=2), make_batch()
    with capture_qkv(model, EVERYWHERE) as captured:
        output = model(**batch, output_hidden_states=True)
    assert list(captured) == list(EVERYWHERE)
    for stack, states in (("encoder", output.encoder_hidden_states), ("decoder", output.decoder_hidden_states)):
        layer = getattr(model, stack).block[1].layer[0]
        normed = layer.layer_norm(states[1])
        for name, state in zip("qkv", captured[f"{stack}_self"], strict=True):
            torch.testing.assert_close(state, getattr(layer.SelfAttention, name)(normed))
    cross = model.decoder.block[1].layer[1].EncDecAttention
    q, k, v = captured["decoder_cross"]
    assert q.shape == (*batch["labels"].shape, 64)
    torch.testing.assert_close(k, cross.k(output.encoder_last_hidden_state))
    torch.testing.assert_close(v, cross.v(output.encoder_last_hidden_state))


def test_hooks_go_however_the_context_ends(tiny: Callable[..., Any], make_batch: Callable[..., Any]) -> None:
    model, batch = tiny(layers=2), make_batch()
    with pytest.raises(ZeroDivisionError), capture_qkv(model, EVERYWHERE):
        assert hooks(model) == 9
        raise ZeroDivisionError
    assert hooks(model) == 0
    with pytest.raises(RuntimeError, match=r"decoder_self.*layer 2 did not all run"), capture_qkv(model, EVERYWHERE):
        model.encoder(batch["input_ids"])
    assert hooks(model) == 0
    for layer in (0, 3):
        with pytest.raises(ValueError, match=f"expected 1 to 2 in this encoder, got {layer}"):
            capture_qkv(model, {"decoder_self": 1, "encoder_self": layer}).__enter__()
    assert hooks(model) == 0


@pytest.mark.parametrize("model_type", ["t5", "bart", "bert", "gpt2", "llama"])
def test_hidden_states_are_those_of_transformers(model_type: str) -> None:
    """Through `fastkd.hidden_states`, as examples/bart_summarization.py does it; any of them, in any order."""
    model = families.model(model_type)
    ids = torch.randint(5, families.VOCABULARY, (2, 7))
    stacks = family_of(model.config).stacks
    wanted = {name: [2, 0, 1] for name in stacks}
    with capture_hidden(model, wanted) as captured:
        fastkd.hidden_states(model, input_ids=ids, labels=ids)
    assert sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules()) == 0
    output = model(input_ids=ids, labels=ids, output_hidden_states=True)
    assert list(captured) == list(stacks)
    for name, found in captured.items():
        its = output[f"{name}_hidden_states" if len(stacks) == 2 else "hidden_states"]
        for state, number in zip(found, wanted[name], strict=True):
            torch.testing.assert_close(state, its[number])
            assert state.requires_grad


def test_hidden_states_that_are_not_there() -> None:
    model = families.model("bert")
    with pytest.raises(ValueError, match="expected encoder, as in this model, got decoder"):
        capture_hidden(model, {"encoder": [1], "decoder": [1]}).__enter__()
    for number in (-1, 3):
        with pytest.raises(ValueError, match=f"expected states 0 to 2 of this encoder, got {number}"):
            capture_hidden(model, {"encoder": [1, number]}).__enter__()
    assert sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules()) == 0
    with (
        pytest.raises(RuntimeError, match=r"encoder: states \[1, 2\] were not all"),
        capture_hidden(model, {"encoder": [1, 2]}),
    ):
        pass


def test_captures_nest_and_stand_side_by_side(tiny: Callable[..., Any], make_batch: Callable[..., Any]) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module):
            super().__init__()
            self.module = module

        def forward(self, **inputs: Any) -> Any:
            return self.module(**inputs)

    student, teacher = tiny(32, 1, layers=2), tiny(64, 2, layers=3).requires_grad_(False)
    with (
        capture_qkv(student, {"encoder_self": 1}) as outer,
        capture_qkv(teacher, {"encoder_self": 3}) as other,
        capture_qkv(student, {"encoder_self": 1, "decoder_self": 2}) as inner,
    ):
        Wrapper(student)(**make_batch())
        teacher(**make_batch())
    assert all(a is b for a, b in zip(outer["encoder_self"], inner["encoder_self"], strict=True))
    assert [x.shape[-1] for x in other["encoder_self"]] == [64] * 3 and len(inner["decoder_self"]) == 3
    assert all(x.requires_grad for x in inner["decoder_self"])
    assert not any(x.requires_grad for x in other["encoder_self"])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # but not in older transformers
@pytest.mark.parametrize("method", ["miniend-d", "miniend-e-nologit"])
def test_gradients_under_gradient_checkpointing(
    method: str, tiny: Callable[..., Any], make_trainer: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    gradients, batch = [], make_batch()
    for checkpointing in (False, True):
        student = tiny(32, 1, layers=2).train()
        if checkpointing:
            student.gradient_checkpointing_enable()
        make_trainer(student, method, teacher=tiny(64, 2)).compute_loss(student, batch).backward()
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)

    student.gradient_checkpointing_enable({"use_reentrant": True})
    before = hooks(student)  # transformers' own
    with pytest.raises(RuntimeError, match="use_reentrant"):
        make_trainer(student, method, teacher=tiny(64, 2)).compute_loss(student, batch)
    assert hooks(student) == before and "forward" not in vars(student.lm_head)


@pytest.mark.parametrize(
    ("model_type", "kind", "adapted"),
    [
        ("t5", "seq2seq", ["q", "k"]),
        ("bart", "seq2seq", ["k_proj", "fc1"]),
        ("gpt2", "causal", ["c_attn"]),
        ("qwen2", "causal", ["k_proj", "lm_head"]),
        ("bert", "masked", ["key"]),
        ("bert", "classifier", ["key", "classifier"]),
    ],
)
def test_with_lora_all_is_as_with_its_weights_merged(model_type: str, kind: str, adapted: list[str]) -> None:
    """Queries, keys and values, hidden states, what the head is given, and the head.

    In float64, as T5 does not scale its scores, which are large.
    """
    peft = pytest.importorskip("peft")
    made, batch = families.model(model_type, kind).double(), families.batch(kind)
    settings = {"fan_in_fan_out": True} if model_type == "gpt2" else {}
    wrapped = peft.get_peft_model(
        made, peft.LoraConfig(r=2, target_modules=adapted, init_lora_weights=False, **settings)
    )  # fmt: skip
    assert anatomy.kind(wrapped) == kind
    row = family_of(made.config)
    needs = Needs(dict.fromkeys(row.attentions, 2), {name: [1, 2] for name in row.stacks})
    with torch.no_grad():
        found = forward(wrapped.eval(), batch, needs)
        merged = wrapped.merge_and_unload()
        wanted = forward(merged, batch, needs)
    for place in row.attentions:
        torch.testing.assert_close(found[place], wanted[place])
    torch.testing.assert_close(found["states"], wanted["states"])
    torch.testing.assert_close(anatomy.logits(*found["hidden"]), anatomy.logits(*wanted["hidden"]))
