"""What a model writes: by one decoding for all, and as texts that equal the targets they were learnt from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from fastkd.train.data.encoding import tokenize
from fastkd.train.judge.evaluate import generate
from fastkd.train.models.tokenizer import texts_of, train_tokenizer

OWN_WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 4, "length_penalty": -3.0, "early_stopping": True},
    "at random": {"do_sample": True, "temperature": 9.0, "top_k": 0},
    "least lengths": {"min_length": 9, "min_new_tokens": 9},
    "bans": {"no_repeat_ngram_size": 1, "encoder_no_repeat_ngram_size": 1, "bad_words_ids": [[7], [8]]},
    "penalties": {"repetition_penalty": 9.0, "encoder_repetition_penalty": 5.0},
    "forced": {"forced_bos_token_id": 7, "forced_eos_token_id": 8},
    "suppressed": {"suppress_tokens": list(range(2, 480)), "begin_suppress_tokens": [1]},
    "other ends": {"eos_token_id": list(range(2, 480)), "decoder_start_token_id": 9},
    "lengths": {"max_length": 2, "max_new_tokens": 2, "num_return_sequences": 1},
}  # fmt: skip


def greedy(model: Any, source: list[int], most: int) -> list[int]:
    """By hand: the likeliest token, again and again."""
    written = [0]
    while len(written) <= most and written[-1] != 1:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([written])).logits
        written.append(int(logits[0, -1].argmax()))
    return written


@pytest.mark.parametrize("way", OWN_WAYS)
def test_a_models_own_way_to_write_is_not_taken(way: str, tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny(32, 7).eval()
    sources = [[5, 6, 7, 1], [9, 30, 1]]
    expected = texts_of(tokenizer, [greedy(model, source, 6) for source in sources], ())
    model.generation_config = own = GenerationConfig(pad_token_id=0, **{"decoder_start_token_id": 0, **OWN_WAYS[way]})
    before = copy.deepcopy(own.to_dict())
    written = generate(model, tokenizer, sources, batch_size=2, max_new_tokens=6)
    assert written == expected and len(set(written)) == 2
    assert model.generation_config is own and own.to_dict() == before


def test_beams_are_those_that_were_asked_for(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model, source = tiny(32, 7).eval(), [5, 6, 7, 1]
    expected = model.generate(torch.tensor([source]), num_beams=3, max_new_tokens=6, do_sample=False)[0, 1:]
    model.generation_config.num_beams = 5
    (written,) = generate(model, tokenizer, [source], batch_size=2, max_new_tokens=6, num_beams=3)
    assert written == texts_of(tokenizer, [expected.tolist()], ())[0]


@pytest.mark.parametrize(
    "target",
    ["yes , sir", "it 's . what ?", "do n't", "a <sep> b", "<sep>", "a <sep> <sep> b", "a <sep>", "<sep> b . <end> c"],
)
@pytest.mark.parametrize("cleans_up", [False, True])
def test_a_perfect_output_is_the_target(
    target: str, cleans_up: bool, tiny: Callable[..., Any], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = train_tokenizer([*texts[:200], *["yes , sir do n't a b c ; it 's . what ?"] * 30], 512)
    tokenizer.add_tokens(["<sep>", "<end>"], special_tokens=True)
    tokenizer.clean_up_tokenization_spaces = cleans_up
    labels = [*tokenize(tokenizer, [target])[0], tokenizer.eos_token_id]
    model = tiny(32)
    monkeypatch.setattr(model, "generate", lambda **_: torch.tensor([[0, *labels, 0, 0]]))
    assert generate(model, tokenizer, [[5, 1]], batch_size=1, max_new_tokens=9, kept=labels) == [target]
    # Special tokens of which no target has any are none of what is written.
    monkeypatch.setattr(model, "generate", lambda **_: torch.tensor([[0, tokenizer.convert_tokens_to_ids("<sep>"), 1]]))
    assert generate(model, tokenizer, [[5, 1]], batch_size=1, max_new_tokens=9, kept=[]) == [""]
