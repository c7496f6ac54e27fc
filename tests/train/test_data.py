"""The tokenizer round-trips; span corruption is T5's and loses nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, T5TokenizerFast

from fastkd.train.data import EpochSampler, SpanCorruption, _random_segmentation, noise_mask, pack, span_counts
from fastkd.train.errors import InputError
from fastkd.train.tokenizer import SENTINELS, padded_size, train_tokenizer


@pytest.fixture(scope="module")
def reloaded(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_round_trip_after_reloading(tokenizer: Any, reloaded: Any, texts: list[str]) -> None:
    for text in [*texts[:50], "  ta   re\n mon ", ""]:
        ids = reloaded(text)["input_ids"]
        assert ids == tokenizer(text)["input_ids"]
        assert ids[-1] == reloaded.eos_token_id == 1
        assert reloaded.unk_token_id not in ids
        assert reloaded.decode(ids, skip_special_tokens=True) == " ".join(text.split())


def test_ids_are_t5s(reloaded: Any) -> None:
    assert isinstance(reloaded, T5TokenizerFast)
    assert [reloaded.pad_token_id, reloaded.eos_token_id, reloaded.unk_token_id] == [0, 1, 2]
    last = len(reloaded) - 1
    assert reloaded.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(SENTINELS)]) == [
        last - i for i in range(SENTINELS)
    ]
    assert reloaded("ta <extra_id_0> re")["input_ids"].count(last) == 1
    assert len(reloaded) <= 512 and padded_size(reloaded) == 512


def test_few_texts_give_a_smaller_vocabulary() -> None:
    small = train_tokenizer(["a few words and no more", "a few other words"], vocabulary_size=4096)
    assert SENTINELS + 3 < len(small) < 512
    assert padded_size(small) % 128 == 0 and padded_size(small) >= len(small)


@given(st.integers(8, 600), st.integers(0, 2**32 - 1))
def test_noise_masks(length: int, seed: int) -> None:
    mask = noise_mask(length, np.random.default_rng(seed))
    noise, spans = span_counts(length)
    assert mask.shape == (length,) and mask.sum() == noise
    assert not mask[0] and mask[-1]  # T5 begins with clean text and ends with noise
    assert (np.diff(mask.astype(int)) == 1).sum() == spans
    assert abs(noise - 0.15 * length) <= 1 and abs(spans - noise / 3) <= 1


def test_segmentations_are_uniform() -> None:
    rng = np.random.default_rng(0)
    drawn = [tuple(_random_segmentation(rng, 5, 3)) for _ in range(6000)]
    counts = {division: drawn.count(division) for division in set(drawn)}
    assert all(min(d) >= 1 and sum(d) == 5 for d in counts)
    assert len(counts) == 6  # choose(4, 2)
    assert all(850 < n < 1150 for n in counts.values())  # 1000 each, five standard deviations


@given(length=st.integers(8, 200), seed=st.integers(0, 2**32 - 1), index=st.integers(0, 9))
def test_inputs_and_labels_reassemble_to_the_chunk(tokenizer: Any, length: int, seed: int, index: int) -> None:
    chunks = np.random.default_rng(seed).integers(3, 300, (2, length))
    data = SpanCorruption(chunks, tokenizer, seed)
    inputs, labels = (data[index][name].tolist() for name in ("input_ids", "labels"))
    noise, spans = span_counts(length)
    sentinels = [data.first_sentinel - i for i in range(spans)]
    assert [t for t in inputs if t in sentinels] == [t for t in labels if t in sentinels] == sentinels
    assert inputs.pop() == labels.pop() == data.eos
    assert len(inputs) == length - noise + spans and len(labels) == noise + spans

    spans_of_labels = {}
    for token in labels:  # sentinel, its noise, sentinel, its noise, ...
        if token in sentinels:
            spans_of_labels[token] = current = []
        else:
            current.append(token)
    whole = [t for token in inputs for t in spans_of_labels.get(token, [token])]
    assert whole == chunks[index % 2].tolist()


def test_examples_depend_on_seed_epoch_and_index_alone(dataset: SpanCorruption, tokenizer: Any) -> None:
    size = len(dataset)
    first = dataset[5]["input_ids"]
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(dataset[5]["input_ids"], first)
    assert not torch.equal(dataset[5 + size]["input_ids"], first)  # another epoch
    other = SpanCorruption(dataset.chunks, tokenizer, dataset.seed + 1)
    assert not torch.equal(other[5]["input_ids"], first)


def test_sampler_visits_every_example_once_per_epoch_in_another_order() -> None:
    sampler = EpochSampler(10, seed=0)
    first = list(sampler)
    sampler.set_epoch(2)
    second = list(sampler)
    assert sorted(first) == list(range(10)) and sorted(second) == list(range(20, 30))
    assert [i - 20 for i in second] != first != sorted(first)
    assert list(sampler) == second


def test_packing_keeps_every_token_but_the_last_few(tokenizer: Any, texts: list[str]) -> None:
    chunks = pack(tokenizer, texts[:20], 16)
    stream = [t for text in texts[:20] for t in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert chunks.flatten().tolist() == stream[: chunks.size] and len(stream) - chunks.size < 16


def test_too_little_text_and_too_few_sentinels(tokenizer: Any, texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too little training text"):
        pack(tokenizer, ["ta"], 16)
    with pytest.raises(InputError, match="too little held-out text"):
        pack(tokenizer, [], 16, what="held-out text")
    with pytest.raises(InputError, match="need 250 sentinels"):
        SpanCorruption(np.zeros((1, 5000), dtype=np.int64), tokenizer, 0)
