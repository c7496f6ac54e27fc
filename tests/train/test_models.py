"""EncT5: what it computes, what it learns, what it starts from and how it is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, T5Config

from fastkd.train.common.family import is_enct5
from fastkd.train.models.anatomy import auto_class
from fastkd.train.models.architectures import (
    EncT5Config,
    EncT5ForSequenceClassification,
    PrunedT5Config,
    enct5_config,
    enct5_from,
    parts,
)
from fastkd.train.models.student import new_model

CLASSES = ["no", "maybe", "yes"]
WIDTHS = {"encoder.block.0.layer.0.SelfAttention": 1, "decoder.block.0.layer.2.DenseReluDense": 24}


def sizes(**changes: Any) -> dict[str, Any]:
    start: dict[str, Any] = {"decoder_start_token_id": 0}
    return {
        "vocab_size": 64, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 2,
        "num_decoder_layers": 2, "dropout_rate": 0.0,
    } | start | changes  # fmt: skip


def t5(**changes: Any) -> Any:
    return new_model(T5Config(**sizes(**changes)), 0)


def enct5(**changes: Any) -> Any:
    torch.manual_seed(1)
    return enct5_from(t5(**changes), CLASSES).eval()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    batch = {"input_ids": torch.randint(3, 64, (4, 9), generator=generator), "labels": torch.tensor([2, 0, 1, 2])}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 5:] = 0
    return batch


# ---- what it computes ------------------------------------------------------------------------------------------------


def test_logits_are_those_of_t5s_parts(batch: dict[str, Tensor]) -> None:
    """Of a T5 whose decoder has one layer and reads one token, with the classes for its vocabulary."""
    source = t5(num_decoder_layers=1).eval()
    model = enct5_from(source, CLASSES).eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    decoded = source(**inputs, decoder_input_ids=torch.zeros(4, 1).long(), output_hidden_states=True)
    expected = decoded.decoder_hidden_states[-1][:, 0] @ model.classifier.weight.T
    output = model(**inputs)
    assert output.loss is None and output.logits.shape == (4, 3)
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.encoder_last_hidden_state, decoded.encoder_last_hidden_state)


def test_the_loss_is_the_cross_entropy(batch: dict[str, Tensor]) -> None:
    model = enct5()
    output = model(**batch)
    by_hand = [-output.logits[i].log_softmax(-1)[label] for i, label in enumerate(batch["labels"].tolist())]
    torch.testing.assert_close(output.loss, torch.stack(by_hand).mean())
    column = batch | {"labels": batch["labels"][:, None]}
    assert torch.equal(model(**column).loss, output.loss)

    some = batch | {"labels": torch.tensor([2, -100, -100, 2])}
    torch.testing.assert_close(model(**some).loss, (by_hand[0] + by_hand[3]) / 2)
    with pytest.raises(ValueError, match="batch_size"):
        model(**batch | {"labels": batch["labels"][:3]})


def test_padding_changes_no_answer(batch: dict[str, Tensor]) -> None:
    model = enct5()
    logits = model(**batch).logits
    other = batch["input_ids"].clone()
    other[1, 5:] = 7
    torch.testing.assert_close(model(**batch | {"input_ids": other}).logits, logits)
    torch.testing.assert_close(model(input_ids=batch["input_ids"][1:2, :5]).logits, logits[1:2])
    padded = {name: torch.nn.functional.pad(batch[name], (0, 6)) for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(**padded).logits, logits)
    other[1, 4] += 1
    assert not torch.allclose(model(**batch | {"input_ids": other}).logits[1], logits[1])


def test_embeddings_in_place_of_ids_and_the_prompt_whatever_the_decoder_is_given(batch: dict[str, Tensor]) -> None:
    model = enct5()
    logits = model(**batch).logits
    embedded = model.get_input_embeddings()(batch["input_ids"])
    assert torch.equal(model(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits, logits)
    ids = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    assert ids.tolist() == [[0]] * 4
    assert torch.equal(model(**batch, decoder_input_ids=ids).logits, logits)


def test_hidden_states(batch: dict[str, Tensor]) -> None:
    model = enct5()
    output = model(**batch, output_hidden_states=True)
    assert [tuple(x.shape) for x in output.encoder_hidden_states] == [(4, 9, 32)] * 3
    assert [tuple(x.shape) for x in output.decoder_hidden_states] == [(4, 1, 32)] * 2
    assert torch.equal(output.decoder_hidden_states[0], model.decoder.embed_tokens.weight.expand(4, 1, -1))


@pytest.mark.parametrize("projection", ["relu", "gated-gelu"])
def test_every_weight_learns(projection: str, batch: dict[str, Tensor]) -> None:
    """But for what cannot matter: which of the one prompt its decoder attends to."""
    model = enct5(feed_forward_proj=projection).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    still = {name for name, parameter in model.named_parameters() if not parameter.grad.any()}
    attention = "decoder.block.0.layer.0.SelfAttention"
    assert still <= {f"{attention}.{name}.weight" for name in ("q", "k", "relative_attention_bias")}
    assert model.decoder.embed_tokens.weight.shape == (1, 32)


def test_sixteen_bits(batch: dict[str, Tensor]) -> None:
    model = enct5()
    expected = model(**batch)
    output = model.bfloat16()(**batch)
    assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    torch.testing.assert_close(output.logits.float(), expected.logits, rtol=0.05, atol=0.05)
    output.loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.bfloat16}
    made = enct5_from(t5().bfloat16(), CLASSES)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}


# ---- what it starts from ---------------------------------------------------------------------------------------------


def test_it_starts_from_a_t5() -> None:
    source = t5(decoder_start_token_id=5)
    model = enct5_from(source, CLASSES)
    theirs, copied = source.state_dict(), 0
    for name, value in model.state_dict().items():
        if name == "decoder.embed_tokens.weight":
            assert torch.equal(value, theirs["shared.weight"][5:6])
        elif name != "classifier.weight":
            assert torch.equal(value, theirs[name]), name
            copied += 1
    assert copied == 1 + (8 + 8 + 1 + 1) + (5 + 5 + 3 + 1 + 1) and len(model.decoder.block) == 1
    addresses = {parameter.data_ptr() for parameter in source.parameters()}
    assert not any(parameter.data_ptr() in addresses for parameter in model.parameters())


def test_random_weights_have_a_sane_scale(batch: dict[str, Tensor]) -> None:
    """The first loss is about ln 3; the prompt is as large as T5's embeddings."""
    torch.manual_seed(0)
    wide = sizes(d_model=256, num_decoder_layers=1)
    labels: Any = {"id2label": dict(enumerate(map(str, range(50))))}
    model = EncT5ForSequenceClassification(EncT5Config(**wide, **labels)).eval()
    assert model.classifier.weight.shape == (50, 256)
    assert model.classifier.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert model.decoder.embed_tokens.weight.std().item() == pytest.approx(1.0, rel=0.2)
    assert model.encoder.embed_tokens.weight.std().item() == pytest.approx(1.0, rel=0.05)
    assert model(**batch).logits.std().item() == pytest.approx(1.0, rel=0.2)
    made = enct5_from(t5(d_model=256), [str(i) for i in range(50)])
    assert made.classifier.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)

    halved = EncT5ForSequenceClassification(EncT5Config(**wide, **labels, initializer_factor=0.5))
    assert halved.classifier.weight.std().item() == pytest.approx(0.5 * 256**-0.5, rel=0.05)
    assert halved.encoder.embed_tokens.weight.std().item() == pytest.approx(0.5, rel=0.05)


# ---- how it is saved -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [None, WIDTHS])
def test_saved_and_loaded(widths: dict[str, int] | None, batch: dict[str, Tensor], tmp_path: Path) -> None:
    config = enct5_config(t5().config, CLASSES)
    config.widths = widths
    torch.manual_seed(0)
    model = EncT5ForSequenceClassification(config).eval()
    for name, units in (widths or {}).items():
        assert parts(model)[name].units == units
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "fastkd_enct5" and saved["id2label"] == {"0": "no", "1": "maybe", "2": "yes"}
    for auto in (AutoModel, AutoModelForSequenceClassification):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is EncT5ForSequenceClassification and not loaded.training
        assert loaded.config.id2label == dict(enumerate(CLASSES)) and loaded.config.widths == widths
        assert loaded.config.label2id == {"no": 0, "maybe": 1, "yes": 2} and loaded.config.num_labels == 3
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    half = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("classes", [["only"], ["no", "yes"], [str(i) for i in range(7)]])
def test_any_number_of_classes(classes: list[str]) -> None:
    config = enct5_config(t5().config, classes)
    assert config.num_labels == len(classes) and config.num_decoder_layers == 1
    assert config.id2label == dict(enumerate(classes)) and config.widths is None
    assert enct5_from(t5(), classes).classifier.weight.shape == (len(classes), 32)


def test_configs(tmp_path: Path) -> None:
    """What differs from T5's defaults goes along, to EncT5 as to the folder; the T5's own config stays."""
    source = T5Config(**sizes(feed_forward_proj="gated-gelu", layer_norm_epsilon=1e-5))
    before = source.to_dict()
    config = enct5_config(source, CLASSES)
    assert source.to_dict() == before
    for name in ("d_model", "d_kv", "num_heads", "d_ff", "num_layers", "layer_norm_epsilon", "feed_forward_proj"):
        assert getattr(config, name) == getattr(source, name), name
    assert config.is_gated_act and config.dense_act_fn == "gelu_new"
    pruned = PrunedT5Config(**sizes(), widths={"encoder.block.0.layer.0.SelfAttention": 3})
    for made in (config, pruned):
        made.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert type(loaded) is type(made)
        assert loaded.to_dict() == made.to_dict() | {"_name_or_path": str(tmp_path)}
    assert is_enct5(config) and not is_enct5(pruned) and not is_enct5(source)
    assert auto_class(config) is AutoModelForSequenceClassification
    assert auto_class(pruned).__name__ == auto_class(source).__name__ == "AutoModelForSeq2SeqLM"


def test_parts_of_every_variant() -> None:
    found = parts(t5())
    assert len(found) == 2 * 2 + 2 * 3 and len(parts(enct5())) == 2 * 2 + 3
    part = found["decoder.block.1.layer.1.EncDecAttention"]
    assert (part.kind, part.units, part.size, part.inner, part.outer) == ("heads", 4, 8, ("q", "k", "v"), "o")
    part = found["encoder.block.1.layer.1.DenseReluDense"]
    assert (part.kind, part.units, part.size, part.inner, part.outer) == ("neurons", 48, 1, ("wi",), "wo")
    gated = parts(t5(feed_forward_proj="gated-gelu"))["encoder.block.1.layer.1.DenseReluDense"]
    assert gated.units == 48 and gated.inner == ("wi_0", "wi_1")
