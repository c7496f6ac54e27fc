"""The tokenizer round-trips; span corruption is T5's and loses nothing; pairs, files and streams give the same."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, ByT5Tokenizer, T5TokenizerFast

from fastkd.train.common.errors import InputError
from fastkd.train.data import examples as data
from fastkd.train.data import sources
from fastkd.train.data.corruption import _random_segmentation, noise_mask, span_counts
from fastkd.train.data.examples import Chunks, EpochSampler, StreamedChunks, StreamedPairs, pack_to_arrow
from fastkd.train.data.pairs import Counts, Pairs, pad, tokenize_pairs
from fastkd.train.models.tokenizer import SENTINELS, padded_size, train_tokenizer


def as_rows(texts: list[str]) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


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
    corrupted = Chunks(chunks, tokenizer, seed)
    inputs, labels = (corrupted[index][name].tolist() for name in ("input_ids", "labels"))
    noise, spans = span_counts(length)
    sentinels = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(spans)])
    assert [t for t in inputs if t in sentinels] == [t for t in labels if t in sentinels] == sentinels
    assert inputs.pop() == labels.pop() == tokenizer.eos_token_id
    assert len(inputs) == length - noise + spans and len(labels) == noise + spans

    spans_of_labels = {}
    for token in labels:  # sentinel, its noise, sentinel, its noise, ...
        if token in sentinels:
            spans_of_labels[token] = current = []
        else:
            current.append(token)
    whole = [t for token in inputs for t in spans_of_labels.get(token, [token])]
    assert whole == chunks[index % 2].tolist()


def test_examples_depend_on_seed_epoch_and_index_alone(dataset: Chunks, tokenizer: Any) -> None:
    size = len(dataset)
    first = dataset[5]["input_ids"]
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(dataset[5]["input_ids"], first)
    assert not torch.equal(dataset[5 + size]["input_ids"], first)  # another epoch
    other = Chunks(dataset.chunks, tokenizer, dataset.seed + 1)
    assert not torch.equal(other[5]["input_ids"], first)


def test_sampler_visits_every_example_once_per_epoch_in_another_order() -> None:
    sampler = EpochSampler(10, seed=0)
    first = list(sampler)
    sampler.set_epoch(2)
    second = list(sampler)
    assert sorted(first) == list(range(10)) and sorted(second) == list(range(20, 30))
    assert [i - 20 for i in second] != first != sorted(first)
    assert list(sampler) == second


def test_packing_keeps_every_token_but_the_last_few(tokenizer: Any, texts: list[str], tmp_path: Path) -> None:
    chunks = pack_to_arrow(tokenizer, as_rows(texts[:20]), 16, tmp_path / "chunks").with_format("numpy")["input_ids"][:]
    stream = [t for text in texts[:20] for t in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert chunks.flatten().tolist() == stream[: chunks.size] and len(stream) - chunks.size < 16


def test_too_little_text_and_too_few_sentinels(tokenizer: Any, texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too little training text"):
        pack_to_arrow(tokenizer, as_rows(["ta"]), 16, tmp_path / "few")
    with pytest.raises(InputError, match="too little held-out text"):
        pack_to_arrow(tokenizer, [], 16, tmp_path / "none", what="held-out text")
    with pytest.raises(InputError, match="need 250 sentinels"):
        Chunks(np.zeros((1, 5000), dtype=np.int64), tokenizer, 0)


def test_sentinels_may_count_up() -> None:
    tokenizer = ByT5Tokenizer()
    chunks = np.arange(3, 103).reshape(1, 100)
    item = Chunks(chunks, tokenizer, seed=0)[0]
    spans = span_counts(100)[1]
    expected = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(spans)])
    assert expected == list(range(expected[0], expected[0] + spans))
    for ids in item.values():
        assert [t for t in ids.tolist() if t >= expected[0]] == expected


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_packing_into_a_file_gives_the_same_chunks(
    tokenizer: Any, texts: list[str], packed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(sources, "BLOCK", block)
    expected = packed(texts[:60], 32)
    rows = datasets.Dataset.from_dict({"text": [*texts[:30], "", *texts[30:60]]})
    for name, given_rows in (("generated", (row for row in rows)), ("rows", rows)):
        made = pack_to_arrow(tokenizer, given_rows, 32, tmp_path / name)
        assert np.array_equal(made.with_format("numpy")["input_ids"][:], expected)
        assert made.features == {"input_ids": datasets.List(datasets.Value("int32"), 32)}
        assert made.cache_files[0]["filename"] == str(tmp_path / name)  # mapped, not loaded
    for index in (0, len(expected) - 1, len(expected) + 2):
        ours, arrays = (Chunks(chunks, tokenizer, 5)[index] for chunks in (made, expected))
        assert all(torch.equal(ours[key], arrays[key]) and ours[key].dtype == torch.int64 for key in arrays)


def test_no_file_is_left_without_a_chunk(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"too little held-out text: its tokens do not fill one chunk of 32"):
        pack_to_arrow(tokenizer, as_rows(["ta"]), 32, tmp_path / "x", what="held-out text")

    def texts() -> Iterator[dict[str, str]]:
        yield from as_rows(["ta re " * 50] * 5)
        raise InputError("line 6 is bad")

    with pytest.raises(InputError, match="line 6 is bad"):
        pack_to_arrow(tokenizer, texts(), 8, tmp_path / "x")
    assert not list(tmp_path.iterdir())


PAIRS = [{"source": f"ta re mon {'sil ' * i}", "target": "ver ka " * (i + 1), "task": f"t{i % 2}"} for i in range(12)]


def ids_of(tokenizer: Any, text: str, limit: int) -> list[int]:
    """T5's own way: ids with EOS, cut by the tokenizer."""
    return tokenizer(text, truncation=True, max_length=limit)["input_ids"]


@pytest.mark.parametrize("block", [5, 1000])
def test_tokenised_pairs(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(sources, "BLOCK", block)
    full = [[len(tokenizer(row[side])["input_ids"]) for row in PAIRS] for side in ("source", "target")]
    limits = full[0][8], full[1][5]  # so that some fit exactly
    made, counts = tokenize_pairs(PAIRS, tokenizer, *limits, tmp_path / "pairs")
    assert counts == Counts(12, sum(n > limits[0] for n in full[0]), sum(n > limits[1] for n in full[1]))
    assert counts.cut_sources == 3 and counts.cut_targets == 6
    for row, pair in zip(made, PAIRS, strict=True):
        assert row == {
            **pair,
            "input_ids": ids_of(tokenizer, pair["source"], limits[0]),
            "labels": ids_of(tokenizer, pair["target"], limits[1]),
        }
    assert made.features["labels"] == datasets.List(datasets.Value("int32"))


def test_long_targets_and_no_pairs(tokenizer: Any, tmp_path: Path) -> None:
    lengths = [len(tokenizer(row["target"])["input_ids"]) for row in PAIRS]
    message = rf"the target of pair 5 has {lengths[4]} tokens, expected at most {lengths[3]}: 'ver ka "
    with pytest.raises(InputError, match=message):
        tokenize_pairs(PAIRS, tokenizer, 8, lengths[3], tmp_path / "x", cut_targets=False)
    tokenize_pairs(PAIRS[:4], tokenizer, 8, lengths[3], tmp_path / "fits", cut_targets=False)
    with pytest.raises(InputError, match="no pairs"):
        tokenize_pairs([], tokenizer, 8, 8, tmp_path / "x")
    with pytest.raises(ValueError, match="expected at least 2 tokens"):
        tokenize_pairs(PAIRS, tokenizer, 1, 8, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["fits"]


def test_batches_of_pairs(tokenizer: Any, tmp_path: Path) -> None:
    rows, _ = tokenize_pairs(PAIRS, tokenizer, 64, 64, tmp_path / "pairs")
    pairs = Pairs(rows)
    assert len(pairs) == 12 and set(pairs[3]) == {"input_ids", "attention_mask", "labels"}
    assert len(list(pairs)) == 12  # an iteration ends, which transformers' sampler by lengths relies on
    assert all(ids.dtype == torch.int64 for ids in pairs[3].values())

    collate = pickle.loads(pickle.dumps(pad(tokenizer)))  # data workers may be spawned
    batch = collate([pairs[0], pairs[5]])
    assert {name: ids.dtype for name, ids in batch.items()} == dict.fromkeys(pairs[0], torch.int64)
    for row, index in enumerate((0, 5)):
        for name, filler in (("input_ids", tokenizer.pad_token_id), ("attention_mask", 0), ("labels", -100)):
            ids = pairs[index][name].tolist()
            longest = max(len(pairs[i][name]) for i in (0, 5))
            assert batch[name].shape[1] == -(-longest // 8) * 8
            assert batch[name][row].tolist() == ids + [filler] * (batch[name].shape[1] - len(ids))


def stream_of(rows: list[dict[str, Any]], shards: int = 3) -> datasets.IterableDataset:
    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=shards)


def same(ours: Any, others: Any) -> bool:
    return len(ours) == len(others) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(ours, others, strict=True)
    )


def test_an_unshuffled_stream_is_span_corruption_epoch_after_epoch(
    tokenizer: Any, texts: list[str], packed: Any
) -> None:
    stored = Chunks(packed(texts[:60], 32), tokenizer, seed=4)
    rows = stream_of([{"text": text} for text in texts[:60]])
    streamed = StreamedChunks(rows, tokenizer, 32, seed=4, shuffle_buffer=0)
    items = list(islice(streamed, 3 * len(stored)))
    assert same(items, [stored[i] for i in range(3 * len(stored))])
    assert same(list(islice(streamed, 5)), items[:5])  # every iteration starts at the beginning


def test_shuffled_streams(tokenizer: Any, texts: list[str]) -> None:
    rows = stream_of([{"text": text} for text in texts[:60]])
    first, again = (list(islice(StreamedChunks(rows, tokenizer, 32, 4, 20), 200)) for _ in range(2))
    torch.manual_seed(1)
    np.random.seed(1)
    assert same(first, again)
    assert not same(first[:20], list(islice(StreamedChunks(rows, tokenizer, 32, 5, 20), 20)))
    assert not same(first[:20], list(islice(StreamedChunks(rows, tokenizer, 32, 4, 0), 20)))


def test_streamed_pairs(tokenizer: Any) -> None:
    expected = [(ids_of(tokenizer, row["source"], 9), ids_of(tokenizer, row["target"], 7)) for row in PAIRS]
    streamed = StreamedPairs(stream_of(PAIRS), tokenizer, 9, 7, seed=0, shuffle_buffer=4)
    epochs = [list(islice(streamed, 36))[i : i + 12] for i in (0, 12, 24)]
    orders = [[(item["input_ids"].tolist(), item["labels"].tolist()) for item in epoch] for epoch in epochs]
    assert all(sorted(order) == sorted(expected) for order in orders)
    assert orders[0] != orders[1] != orders[2] and orders[0] != expected
    assert all(item["attention_mask"].tolist() == [1] * len(item["input_ids"]) for item in epochs[0])
    batch = next(iter(DataLoader(streamed, batch_size=4, collate_fn=pad(tokenizer))))
    assert batch["input_ids"].shape[0] == 4 and batch["labels"].shape[1] == 8


def test_one_worker_reads_a_stream_and_two_do_not(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = StreamedPairs(stream_of(PAIRS), tokenizer, 9, 7, seed=0, shuffle_buffer=4)
    direct, worker = (
        list(islice(DataLoader(streamed, batch_size=4, collate_fn=pad(tokenizer), num_workers=n), 4)) for n in (0, 1)
    )
    assert same([dict(batch) for batch in direct], [dict(batch) for batch in worker])
    monkeypatch.setattr(data, "get_worker_info", lambda: SimpleNamespace(num_workers=2))
    with pytest.raises(ValueError, match="a stream is read by 0 or 1 workers, got 2"):
        next(iter(streamed))


def test_streams_with_too_little(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="too little data"):
        next(iter(StreamedChunks(stream_of([{"text": "ta"}], 1), tokenizer, 32, 0)))
    with pytest.raises(InputError, match="need 250 sentinels"):
        StreamedChunks(stream_of([{"text": "ta"}], 1), tokenizer, 5000, 0)
