"""Caches of teachers of every family: heads with all that follows them, labels wherever they are, classes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import families
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from train_flags import with_inputs
from transformers import default_data_collator

import fastkd
from fastkd.train.common.errors import InputError
from fastkd.train.common.family import KINDS
from fastkd.train.data.examples import Chunks
from fastkd.train.data.pairs import Pairs, pad
from fastkd.train.data.tasks import TASKS
from fastkd.train.flags.arguments import parse
from fastkd.train.models.anatomy import head_of
from fastkd.train.objectives.methods import METHODS
from fastkd.train.stages.caching import cached_teacher
from fastkd.train.stages.given import Given, Teacher
from fastkd.train.stages.prepare import Data
from fastkd.train.stages.run import Run
from fastkd.train.teaching.cached import Numbered, collated
from fastkd.train.teaching.store import HEAD, Manifest, Store
from fastkd.train.training.trainer import DistillTrainer

# What of a head each has that T5's has not: a bias of the model, biases, a cap; shifted, masked and single labels.
OF_PAIRS = [("bart", "seq2seq"), ("gpt2", "causal"), ("gemma2", "causal"), ("bert", "classifier")]
OF_TEXTS = [("gpt2", "causal"), ("bert", "masked"), ("roberta", "masked"), ("distilbert", "masked")]
EVERY = [*((*of, "pairs") for of in OF_PAIRS), *((*of, "chunks") for of in OF_TEXTS)]


def examples(name: str, kind: str, of: str) -> tuple[Any, Any]:
    """(examples, their collator): chunks, or pairs of different lengths."""
    tokenizer = families.tokenizer(name)
    if of == "chunks":
        chunks = np.random.default_rng(0).integers(5, 200, (8, 20), dtype=np.int32)
        return Chunks(chunks, tokenizer, 3, KINDS[kind].corruption), default_data_collator
    rows = [{"input_ids": [30 + i] * (9 + 3 * i), "labels": list(range(40, 42 + i))} for i in range(8)]
    rows = [{**row, "labels": [row["input_ids"][0] % 3]} for row in rows] if kind == "classifier" else rows
    return Pairs(datasets.Dataset.from_list(rows), kind == "causal"), pad(tokenizer, kind == "classifier")


def models(name: str, kind: str, **changes: Any) -> list[Any]:
    """A student and a teacher, whose config says its class, as a loaded one's does."""
    changes = {**families.fitting(name), **({"num_labels": 3} if kind == "classifier" else {}), **changes}
    made = [families.model(name, kind, seed, **changes) for seed in (1, 2)]
    for model in made:
        model.config.architectures = [type(model).__name__]
    return made


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """make_run(name, kind, of, flag, ...): a run of 4 steps by kd, each of all examples."""

    def make(name: str, kind: str, of: str, *flags: str) -> Run:
        train, collate = examples(name, kind, of)
        words = ["--method", "kd", "--output_dir", str(tmp_path / "out"), "--teacher", "t", "--max_steps", "4"]
        words += ["--per_device_train_batch_size", "8", "--save_strategy", "no", "--eval_strategy", "no"]
        words += ["--use_cpu", "--disable_tqdm", "true", "--logging_steps", "1", *flags]
        ours, args = parse(with_inputs(*words, *([] if "--teacher_cache" in flags else ["--teacher_cache", "hidden"])))
        names: Any = {"digest": "", "facts": {}, "parts": {"tokenizer": "pieces"}}
        task, none = TASKS["span_corruption"], datasets.Dataset.from_dict({})
        data = Data(task, families.tokenizer(name), train, train, none, 8, collate, **names)
        return Run(ours, args, tmp_path / "cache", Given(), data)

    return make


def cache_of(run: Run, model: Any) -> Any:
    fresh = copy.deepcopy(model)
    return cached_teacher(run, Teacher("teacher", fresh.config, lambda: fresh, "auto"))


def trained(run: Run, student: Any, teacher: Any, epochs: int = 0) -> tuple[list[float], Any]:
    """Losses and weights of a training, cached if there are epochs that are."""
    student = copy.deepcopy(student)
    train = Numbered(run.data.train, epochs) if epochs else run.data.train
    collate: Any = collated(run.data.collate) if epochs else run.data.collate
    objective: Any = {"method": METHODS["kd"], "teacher": teacher, "data_collator": collate}
    trainer = DistillTrainer(model=student, args=run.args, train_dataset=train, **objective)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], student.state_dict()


LONG = {("gpt2", "causal", "chunks"), ("roberta", "masked", "chunks"), ("distilbert", "masked", "chunks")}


@pytest.mark.parametrize(
    ("name", "kind", "of"), [pytest.param(*of, marks=[pytest.mark.long] if of in LONG else []) for of in EVERY]
)
def test_losses_are_equal_to_the_bit(make_run: Any, name: str, kind: str, of: str) -> None:
    """And the head is the teacher's own; chunks are kept for two epochs, and the four steps begin again with them."""
    flags, epochs = (["--teacher_cache_epochs", "2"], 2) if of == "chunks" else ([], 1)
    run, (student, teacher) = make_run(name, kind, of, *flags), models(name, kind)
    losses, weights = trained(run, student, teacher)
    cached = cache_of(run, teacher)
    assert cached.epochs == epochs
    again, others = trained(run, student, cached, epochs)
    steps = epochs if of == "chunks" and kind == "masked" else 4  # beyond, masks are those of the first epochs again
    assert len(losses) == 4 and losses[:steps] == again[:steps]
    assert steps < 4 or all(torch.equal(weight, others[name]) for name, weight in weights.items())
    for part, expected in zip(cached.head, head_of(teacher), strict=True):
        assert torch.equal(part, expected) if isinstance(expected, torch.Tensor) else part == expected


@pytest.mark.parametrize(("name", "kind", "of"), [*EVERY[:4], EVERY[5]])
def test_the_top_is_that_of_the_whole_head(make_run: Any, name: str, kind: str, of: str) -> None:
    """Its bias and its cap included, in the places of the labels: the top of the logits that the model itself makes."""
    run, (_, teacher) = make_run(name, kind, of, "--teacher_cache", "topk:3"), models(name, kind)
    cached = cache_of(run, teacher)
    batch = run.data.collate([run.data.train[i] for i in (5, 2)])
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    inputs |= {"labels": batch["labels"].clamp_min(1)} if kind == "seq2seq" else {}
    with torch.no_grad():
        logits = teacher.eval()(**inputs).logits
    logits, labels = (logits[:, None], batch["labels"]) if kind == "classifier" else (logits, batch["labels"])
    logits, labels = (logits[:, :-1], labels[:, 1:]) if kind == "causal" else (logits, labels)
    expected = fastkd.TopK.from_logits(logits[labels != -100], 3, temperature=2.0)
    found = cached.read({**batch, "examples": [5, 2]})["hidden"][0]
    kept = found.indices[:, : labels.shape[1]][labels != -100]
    assert torch.equal(kept.long(), expected.indices.long())
    scores = found.log_probs[:, : labels.shape[1]][labels != -100]
    torch.testing.assert_close(scores, expected.log_probs, rtol=2**-9, atol=1e-6)
    assert int((found.indices != -1).sum()) == 3 * int((labels != -100).sum())


@pytest.mark.parametrize("name", ["bert", "gemma2"])
def test_draws_know_what_follows_the_head(make_run: Any, name: str) -> None:
    """A bias that allows one token alone is drawn alone; so does a cap that leaves no token rare."""
    kind = "masked" if name == "bert" else "causal"
    run, (_, teacher) = make_run(name, kind, "chunks", "--teacher_cache", "sampled:64"), models(name, kind)
    if name == "bert":
        with torch.no_grad():
            teacher.get_output_embeddings().bias[77] += 1e4
        assert set(cache_of(run, teacher).store.read(3)["indices"].unique().tolist()) <= {77, -1}
        return
    with torch.no_grad():
        teacher.get_input_embeddings().weight.mul_(1e3)  # without its cap one token would have all of the mass
    kept = cache_of(run, teacher).store.read(3)["indices"]
    assert min(len(row[row >= 0].unique()) for row in kept) > 1


def test_a_number_has_no_top(make_run: Any) -> None:
    run, (_, teacher) = (
        make_run("bert", "classifier", "pairs", "--teacher_cache", "topk:1"),
        models("bert", "classifier", num_labels=1),
    )
    with pytest.raises(InputError, match="one output is a number: expected hidden"):
        cache_of(run, teacher)


def test_heads_of_older_caches_are_read(tmp_path: Path) -> None:
    """Those of T5s, which are a weight and no more."""
    weight = torch.randn(5, 3)
    save_file({"weight": weight}, tmp_path / HEAD)
    head = Store(tmp_path, Manifest({}, {}, 1, 1, 1, 1)).head
    assert head is not None and torch.equal(head.weight, weight)
    assert (head.bias, head.scale, head.softcap) == (None, 1.0, None)
