"""What models of every family read: framed as their tokenizers write it, masked, continued, as pairs and as chats."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import families
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from fastkd.train.common.errors import InputError
from fastkd.train.data.corruption import Masks, ends, text_length
from fastkd.train.data.encoding import Encoding, frame_of, set_languages, tokenize
from fastkd.train.data.examples import Chunks, StreamedChunks, pack_to_arrow
from fastkd.train.data.pairs import class_labels, pad, pair_item
from fastkd.train.models.tokenizer import special_tokens
from fastkd.train.teaching.cached import content

LONG, SHORT = families.TEXTS[4], families.TEXTS[0]
SEQ2SEQ = ("t5", "bart", "mbart", "marian", "pegasus")
CAUSAL = ("gpt2", "llama", "qwen2", "gemma")


def encoded(model_type: str, rows: list[dict[str, str]], source: int = 99, target: int = 99, **reading: Any) -> Any:
    """(columns, lengths of sources, of targets) of rows as a model reads them."""
    return Encoding(families.tokenizer(model_type), source, target, **reading)(
        [{"task": "text2text", **r} for r in rows]
    )


# Sources and targets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", SEQ2SEQ)
def test_pairs_are_as_the_tokenizer_writes_them(model_type: str) -> None:
    tokenizer, rows = families.tokenizer(model_type), [{"source": LONG, "target": SHORT}]
    columns, sources, targets = encoded(model_type, rows)
    assert columns == {
        "input_ids": [tokenizer(LONG)["input_ids"]],
        "labels": [tokenizer(text_target=SHORT)["input_ids"]],
    }
    assert (sources, targets) == ([len(columns["input_ids"][0])], [len(columns["labels"][0])])
    if tokenizer.is_fast:
        cut, whole, _ = encoded(model_type, rows, 9, 8)
        assert cut["input_ids"] == [tokenizer(LONG, truncation=True, max_length=9)["input_ids"]] and whole == sources
        assert cut["labels"] == [tokenizer(text_target=SHORT, truncation=True, max_length=8)["input_ids"]]


def test_a_limit_leaves_room_within_the_frame() -> None:
    for model_type, least in (("t5", 2), ("bart", 3), ("mbart", 3)):
        columns, _, _ = encoded(model_type, [{"source": LONG, "target": LONG}], least, least)
        tokenizer = families.tokenizer(model_type)
        assert (
            len(columns["labels"][0]) == least
            and columns["labels"][0][-1] == tokenizer(text_target="")["input_ids"][-1]
        )
        with pytest.raises(
            ValueError, match=f"limit: expected at least {least} tokens, one and the {least - 1} around"
        ):
            encoded(model_type, [{"source": LONG, "target": LONG}], least, least - 1)


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
@pytest.mark.parametrize("limit", [99, 24, 13, 8])
@pytest.mark.parametrize("texts", [(LONG, SHORT), (SHORT, LONG), (LONG, "A bus."), (SHORT, "")])
def test_two_texts_are_framed_and_cut_as_the_tokenizer_does(
    model_type: str, limit: int, texts: tuple[str, str]
) -> None:
    tokenizer = families.tokenizer(model_type)
    own = tokenizer(*[text for text in texts if text], truncation=True, max_length=limit)
    row = {"source": texts[0], "pair": texts[1], "target": "a"}
    columns, _, _ = encoded(
        model_type, [row], limit, kind="classifier", has_pairs=True, has_types="token_type_ids" in own
    )
    del columns["labels"]
    assert columns == {name: [own[name]] for name in columns} and len(columns) == (2 if model_type == "bert" else 1)


def test_names_that_a_tokenizer_writes_itself_are_text() -> None:
    for model_type in ("bert", "roberta", "bart", "mbart", "gpt2", "llama", "pegasus", "marian"):
        tokenizer = families.tokenizer(model_type)
        for name in ("[CLS]", "[MASK]", "<s>", "</s>", "<mask>", "<|endoftext|>", "en_XX"):
            found = {*tokenize(tokenizer, [f"a {name} b"])[0]} - {tokenizer.unk_token_id}
            ids = {*frame_of(tokenizer).around(()), tokenizer.mask_token_id, tokenizer.pad_token_id}
            assert not found & ids, (model_type, name)


@pytest.mark.parametrize("model_type", CAUSAL)
def test_a_prompt_goes_on_with_its_completion(model_type: str) -> None:
    tokenizer, prompt, completion = families.tokenizer(model_type), "In summer the days are", " long, and warm."
    columns, _, _ = encoded(model_type, [{"source": prompt, "target": completion}], kind="causal")
    read, written = columns["input_ids"][0], columns["labels"][0]
    assert read == tokenizer(prompt)["input_ids"] and written[-1] == tokenizer.eos_token_id
    assert [*read, *written[:-1]] == tokenizer(prompt + completion)["input_ids"]
    item = pair_item(True, read, written)
    assert item["input_ids"].tolist() == [*read, *written]
    assert item["labels"].tolist() == [-100] * len(read) + written
    # The end of a prompt is kept, behind what begins every text; and a completion that is cut ends, too.
    columns, _, _ = encoded(model_type, [{"source": prompt, "target": completion}], 5, 3, kind="causal")
    begin = [*frame_of(tokenizer).before]
    assert columns["input_ids"][0] == begin + read[len(read) - 5 + len(begin) :]
    assert columns["labels"][0] == [*written[:2], tokenizer.eos_token_id]


def test_a_token_that_would_span_both_is_two() -> None:
    tokenizer = families.tokenizer("gpt2")
    whole = min(name for name in tokenizer.get_vocab() if name.isascii() and name.isalpha() and len(name) == 3)
    columns, _, _ = encoded("gpt2", [{"source": whole[:1], "target": whole[1:]}], kind="causal")
    assert tokenizer(whole)["input_ids"] != [*columns["input_ids"][0], *columns["labels"][0][:-1]]
    assert columns["input_ids"] == [tokenizer(whole[:1])["input_ids"]]
    assert tokenizer.decode(columns["labels"][0][:-1]) == whole[1:]


# Languages -----------------------------------------------------------------------------------------------------------


def test_languages_are_codes_of_the_tokenizer_or_their_names(tmp_path: Path) -> None:
    families.tokenizer("mbart").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    eos = tokenizer.eos_token_id
    for source, target in (
        ("de", "French"),
        ("de_DE", "fr_XX"),
        ("German", "fr"),
        ("german", "FR"),
        ("de-de", "fr_xx"),
    ):
        set_languages(tokenizer, source, target)
        german, french = tokenizer.convert_tokens_to_ids(["de_DE", "fr_XX"])
        columns, _, _ = Encoding(tokenizer, 9, 9)([{"source": LONG, "target": LONG, "task": "translation"}])
        assert columns["input_ids"][0][-2:] == [eos, german] and columns["labels"][0][-2:] == [eos, french]
    tokenizer.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert (again.src_lang, again.tgt_lang) == ("de_DE", "fr_XX")
    for source, target, flag in (("xx", "fr", "source_lang"), ("de", None, "target_lang"), ("Klingon", "de", "source")):
        with pytest.raises(
            InputError, match=rf"--{flag}.*: expected a language, one of the tokenizer's, such as ar_AR"
        ):
            set_languages(tokenizer, source, target)


# Chunks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_masks_are_on_a_share_of_the_text_and_become_what_bert_makes_of_them(model_type: str) -> None:
    tokenizer = families.tokenizer(model_type)
    ordinary = np.array(sorted({*tokenizer.get_vocab().values()} - {*special_tokens(tokenizer).values()}))
    chunks = np.random.default_rng(0).choice(ordinary, (40, 100))
    chunks[:, 7] = tokenizer.unk_token_id  # is never masked, nor anything else that is special
    made = Chunks(chunks, tokenizer, seed=1, task="masked_lm")
    kinds: Counter[str] = Counter()
    for index in range(120):
        item, chunk = made[index], chunks[index % 40]
        ids, labels = (item[name].numpy() for name in ("input_ids", "labels"))
        before = len(frame_of(tokenizer).before)
        assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id and len(ids) == 102
        assert labels[0] == labels[-1] == -100 and bool(item["attention_mask"].all())
        ids, labels = ids[before:-1], labels[before:-1]
        is_chosen = labels != -100
        assert is_chosen.sum() == 15 and not is_chosen[7]
        assert np.array_equal(labels[is_chosen], chunk[is_chosen]) and np.array_equal(
            ids[~is_chosen], chunk[~is_chosen]
        )
        new = ids[is_chosen]
        kinds["mask"] += int((new == tokenizer.mask_token_id).sum())
        kinds["same"] += int((new == chunk[is_chosen]).sum())
        assert {*new.tolist()} <= {*ordinary.tolist(), tokenizer.mask_token_id}
    assert 0.77 < kinds["mask"] / 1800 < 0.83 and 0.08 < kinds["same"] / 1800 < 0.125  # five deviations: 0.047, 0.035
    again = Chunks(chunks, tokenizer, seed=1, task="masked_lm")
    assert torch.equal(again[45]["labels"], made[45]["labels"]) and torch.equal(
        again[45]["input_ids"], made[45]["input_ids"]
    )
    others = [made[5], made.with_seed(2)[5], made[45]]  # of another seed, and in another epoch
    assert len({tuple(item["labels"].tolist()) for item in others}) == 3


@pytest.mark.parametrize(("model_type", "mark"), [("bert", "##"), ("roberta", "Ġ")])
def test_whole_words_are_masked_or_not_at_all(model_type: str, mark: str) -> None:
    tokenizer = families.tokenizer(model_type)
    texts = ["The gardener summers where children's buses ship newspapers and paintings"] * 9
    ids = [id for text in tokenize(tokenizer, texts) for id in text][:96]
    begins = [name.startswith(mark) != (mark == "##") for name in tokenizer.convert_ids_to_tokens(ids)]
    word = np.cumsum(begins)
    words, tokens = (Chunks(np.array([ids]), tokenizer, 0, "masked_lm", whole_words=x) for x in (True, False))
    assert content(words) != content(tokens)  # a teacher's cache of one does not serve the other
    counts = []
    for seed in range(50):
        item = Masks(tokenizer, 96, whole_words=True)(np.array(ids), (seed,))
        is_chosen = item["labels"].numpy()[1:-1] != -100
        assert {*word[is_chosen]}.isdisjoint(word[~is_chosen])
        counts.append(int(is_chosen.sum()))
    assert max(counts) <= 14 and min(counts) > 7 and max(np.bincount(word)) > 1
    with pytest.raises(InputError, match="--whole_word_masking: the tokenizer does not mark where words begin"):
        Masks(BareTokenizer(), 9, whole_words=True)
    with pytest.raises(InputError, match="--task masked_lm: the tokenizer has no mask token"):
        Masks(families.tokenizer("gpt2"), 9)


class BareTokenizer:
    """A tokenizer of single letters."""

    mask_token_id, added_tokens_decoder, all_special_tokens, all_special_ids = 9, {}, ["?"], [9]

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1]}

    def get_vocab(self) -> dict[str, int]:
        return {"a": 1, "b": 2, "?": 9}


def test_texts_of_causal_models_end() -> None:
    tokenizer, texts = families.tokenizer("llama"), families.TEXTS[:4]
    stream = [id for text in texts for id in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    columns = {"text": list(texts)}
    streamed = datasets.Dataset.from_dict(columns).to_iterable_dataset(num_shards=1)
    made = list(islice(StreamedChunks(streamed, tokenizer, 16, 0, 0, task="causal_lm"), len(stream) // 16))
    for i, item in enumerate(made):
        assert item["input_ids"].tolist() == stream[16 * i : 16 * i + 16]
        assert item["labels"].tolist() == [-100, *stream[16 * i + 1 : 16 * i + 16]] and bool(
            item["attention_mask"].all()
        )
    assert len(made) > 3


@pytest.mark.parametrize(("model_type", "task"), [("bert", "masked_lm"), ("gpt2", "causal_lm")])
def test_streams_give_what_is_stored(model_type: str, task: str, tmp_path: Path) -> None:
    tokenizer, rows = families.tokenizer(model_type), [{"text": text} for text in families.TEXTS]
    length = text_length(task, tokenizer, 18)
    stored = pack_to_arrow(tokenizer, rows, length, tmp_path / "x", frame=ends(task, tokenizer))
    kept = Chunks(stored, tokenizer, 4, task)
    streamed = StreamedChunks(
        datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2), tokenizer, length, 4, 0, task=task
    )
    for i, item in enumerate(islice(streamed, 2 * len(kept))):
        assert len(item["input_ids"]) == 18 and all(torch.equal(item[name], kept[i][name]) for name in item)


# Batches -------------------------------------------------------------------------------------------------------------


def test_batches_are_padded_in_every_name() -> None:
    tokenizer = families.tokenizer("bert")
    items = [
        pair_item(False, [2, 5, 3], [1], token_type_ids=[0, 1, 1]),
        pair_item(False, [2, 3], [0], token_type_ids=[0, 1]),
    ]
    batch = pad(tokenizer, one_label=True)(items)
    assert batch["input_ids"].tolist() == [[2, 5, 3] + [0] * 5, [2, 3] + [0] * 6]
    assert batch["token_type_ids"].tolist() == [[0, 1, 1] + [0] * 5, [0, 1] + [0] * 6]
    assert batch["attention_mask"].sum(1).tolist() == [3, 2] and batch["labels"].tolist() == [[1], [0]]
    causal = pad(families.tokenizer("gpt2"))([pair_item(True, [7], [8, 0]), pair_item(True, [7, 9], [8, 0, 0])])
    assert causal["labels"].tolist() == [[-100, 8, 0] + [-100] * 5, [-100, -100, 8, 0, 0] + [-100] * 3]
    assert causal["input_ids"][0].tolist() == [7, 8] + [0] * 6 and causal["attention_mask"].sum(1).tolist() == [3, 5]
    scores = pad(tokenizer, one_label=True)(
        [pair_item(False, [2, 3], label) for label in class_labels(["3.8", "1"], ["?"])]
    )
    assert scores["labels"].dtype == torch.float32 and scores["labels"].tolist() == [[pytest.approx(3.8)], [1.0]]
    with pytest.raises(InputError, match="the model has one output, a score: expected numbers for targets, got 'good'"):
        class_labels(["good"], ["?"])
