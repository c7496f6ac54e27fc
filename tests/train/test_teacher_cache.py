"""--teacher_cache: the same losses without the teacher, shards that are whole or absent, folders that do not fit."""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from train_flags import with_inputs
from transformers import default_data_collator

import fastkd
from fastkd.train.common.errors import InputError
from fastkd.train.data.examples import Chunks
from fastkd.train.data.pairs import Pairs, pad
from fastkd.train.data.tasks import TASKS
from fastkd.train.flags.arguments import parse
from fastkd.train.objectives.methods import METHODS
from fastkd.train.stages import caching
from fastkd.train.stages.caching import cached_teacher
from fastkd.train.stages.given import Given, Teacher
from fastkd.train.stages.prepare import Data
from fastkd.train.stages.run import Run
from fastkd.train.teaching.cached import NUMBERS, Numbered, collated, content
from fastkd.train.teaching.store import Store, locked
from fastkd.train.training.trainer import DistillTrainer

FLAGS = [
    "--use_cpu", "--disable_tqdm", "true", "--logging_steps", "1", "--eval_strategy", "no", "--save_strategy", "no"
]  # fmt: skip
CACHE = ["--teacher_cache", "hidden"]


# ---- What is kept ----


@pytest.fixture
def examples(dataset: Chunks, tokenizer: Any) -> dict[str, Any]:
    """Training data by its kind, with its collator: chunks, and pairs of different lengths."""
    rows = [{"input_ids": [3 + i] * (9 + 3 * i), "labels": [4 + i] * (2 + i)} for i in range(8)]
    return {
        "chunks": (dataset.select(range(24)), default_data_collator),
        "pairs": (Pairs(datasets.Dataset.from_list(rows)), pad(tokenizer)),
    }


@pytest.fixture
def make_run(examples: dict[str, Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Run]:
    """make_run(kind, flag, ...): a run on one kind of the examples, by kd."""

    def make(kind: str = "chunks", *flags: str) -> Run:
        train, collate = examples[kind]
        words = ["--method", "kd", "--output_dir", str(tmp_path / "out"), "--teacher", "t5-base", *FLAGS, *flags]
        words += ["--max_steps", "6"]
        words += [] if "--per_device_train_batch_size" in flags else ["--per_device_train_batch_size", "8"]
        words = words[2:] if "--method" in flags else words
        ours, args = parse(with_inputs(*words, *([] if "--teacher_cache" in flags else CACHE)))
        names = {"digest": "", "facts": {}, "parts": {"tokenizer": "pieces"}}
        data = Data(
            TASKS["span_corruption"], tokenizer, train, train, datasets.Dataset.from_dict({}), 8, collate, **names
        )
        return Run(ours, args, tmp_path / "cache", Given(), data)

    return make


def on_demand(model: Any) -> Teacher:
    fresh = copy.deepcopy(model)  # trainers change configs
    return Teacher("teacher", fresh.config, lambda: fresh, "auto")


def trained(run: Run, student: Any, teacher: Any, epochs: int = 0) -> tuple[list[float], Any]:
    """Losses and weights of a training, cached if there are epochs that are."""
    train = Numbered(run.data.train, epochs) if epochs else run.data.train
    collate = collated(run.data.collate) if epochs else run.data.collate
    objective: Any = {"method": METHODS["kd"], "teacher": teacher, "data_collator": collate}
    trainer = DistillTrainer(model=student, args=run.args, train_dataset=train, **objective)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], student.state_dict()


@pytest.mark.parametrize("kind", ["chunks", "pairs"])
@pytest.mark.parametrize("precision", [[], ["--bf16"]], ids=["fp32", "autocast"])
def test_losses_are_equal_to_the_bit(make_run: Any, tiny: Any, kind: str, precision: list[str]) -> None:
    """Chunks of two epochs, in batches that are shuffled; pairs in one batch, as their padding is part of a sum."""
    run, epochs = make_run(kind, *precision, "--teacher_cache_epochs", "2"), 2 if kind == "chunks" else 1
    teacher = tiny(64, 1, 2)
    losses, weights = trained(run, tiny(), teacher)
    cached = cached_teacher(run, on_demand(teacher))
    assert cached.epochs == epochs
    again, others = trained(run, tiny(), cached, epochs)
    assert len(losses) == 6 and losses == again
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    dtype = torch.bfloat16 if precision else torch.float32
    assert cached.store.read(0)["hidden"].dtype == dtype and cached.head.weight.dtype == torch.float32


@pytest.mark.long
def test_other_batches_read_the_same(make_run: Any, tiny: Any) -> None:
    """Accumulated gradients, another order: as near as batches of other sizes are to each other without a cache."""
    teacher, run = tiny(64, 1, 2), make_run("chunks", "--teacher_cache_epochs", "2")
    cached = cached_teacher(run, on_demand(teacher))
    few = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--data_seed", "5"]
    other = make_run("chunks", "--teacher_cache_epochs", "2", *few)
    losses, others = (trained(other, tiny(), model, n)[0] for model, n in ((teacher, 0), (cached, 2)))
    assert losses == pytest.approx(others, rel=1e-6)


def test_corruption_begins_again_after_the_last_epoch_that_is_kept(make_run: Any, dataset: Chunks) -> None:
    twice = Numbered(dataset, 2)
    size = len(dataset)
    assert len(twice) == size
    for index, number in ((3, 3), (size + 3, size + 3), (2 * size + 3, 3), (5 * size + 3, size + 3)):
        item = twice[index]
        assert item[NUMBERS] == number and torch.equal(item["input_ids"], dataset[number]["input_ids"])
    assert not torch.equal(twice[3]["input_ids"], twice[size + 3]["input_ids"])


def test_methods_that_read_more_are_refused(make_run: Any, tiny: Any) -> None:
    run = make_run()
    cached = cached_teacher(run, on_demand(tiny(64, 1, 2)))
    with pytest.raises(ValueError, match="reads more of it than is cached"):
        DistillTrainer(model=tiny(), args=run.args, method=METHODS["hsm-cka"], teacher=cached)


# ---- The top, and draws ----


def gradients(run: Run, student: Any, teacher: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, the head's gradient) of a batch."""
    train: Any = {"train_dataset": run.data.train, "data_collator": run.data.collate}
    trainer = DistillTrainer(model=student, args=run.args, method=METHODS["mlmkd"], teacher=teacher, **train)
    loss = trainer.compute_loss(student, batch)
    return loss.detach(), torch.autograd.grad(loss, student.get_output_embeddings().weight)[0]


@pytest.mark.parametrize("kind", ["chunks", "pairs"])
def test_the_top_is_that_of_the_teacher(make_run: Any, tiny: Any, kind: str) -> None:
    """At the method's temperature, ids of 16 bits; of the whole vocabulary it is the whole divergence."""
    teacher, size = tiny(64, 1, 2), tiny(64, 1, 2).config.vocab_size
    run = make_run(kind, "--teacher_cache", "topk:5")
    cached = cached_teacher(run, on_demand(teacher))
    kept = cached.store.read(3)
    assert {name: column.dtype for name, column in kept.items()} == {
        "indices": torch.int16,
        "log_probs": torch.float16,
        "tail_log_prob": torch.float32,
    }
    batch = run.data.collate([run.data.train[3]])
    labels = batch["labels"]
    logits = teacher.eval()(**batch).logits[labels != -100]
    expected = fastkd.TopK.from_logits(logits.detach(), 5, temperature=2.0)
    assert torch.equal(kept["indices"].long(), expected.indices.long()) and cached.temperature == 2.0
    torch.testing.assert_close(kept["log_probs"].float(), expected.log_probs, rtol=2**-10, atol=0)
    torch.testing.assert_close(kept["tail_log_prob"], expected.tail_log_prob, rtol=1e-5, atol=0)

    run = make_run(kind, "--method", "mlmkd", "--teacher_cache", f"topk:{size}")
    numbers = range(8)
    batch = run.data.collate([run.data.train[i] for i in numbers]) | {NUMBERS: list(numbers)}
    loss, grad = gradients(run, tiny(32, 3), teacher, batch)
    whole, of_whole = gradients(run, tiny(32, 3), cached_teacher(run, on_demand(teacher)), batch)
    torch.testing.assert_close(whole, loss, rtol=1e-2, atol=0)  # log-probabilities have 11 bits
    assert (of_whole - grad).norm() < 1e-2 * grad.norm()


def test_draws_are_of_an_example_and_right_on_average(make_run: Any, tiny: Any) -> None:
    """The same whatever the batch; of very many the gradient is that of the whole distribution."""
    teacher = tiny(64, 1, 2)
    first, other = (
        make_run("chunks", "--teacher_cache", "sampled:6", "--per_device_train_batch_size", size) for size in "85"
    )
    kept = cached_teacher(first, on_demand(teacher)).store.read(5)
    again = cached_teacher(dataclasses.replace(other, cache=other.cache / "5"), on_demand(teacher)).store.read(5)
    assert kept.keys() == {"indices", "log_probs"} and all(torch.equal(kept[name], again[name]) for name in kept)
    assert kept["log_probs"].float().exp().sum(-1).sub(1).abs().max() < 2e-3

    run = make_run("chunks", "--method", "mlmkd", "--teacher_cache", "sampled:20000")
    batch = run.data.collate([run.data.train[i] for i in range(8)]) | {NUMBERS: list(range(8))}
    _, grad = gradients(run, tiny(32, 3), teacher, batch)
    _, drawn = gradients(run, tiny(32, 3), cached_teacher(run, on_demand(teacher)), batch)
    assert (drawn - grad).norm() < 0.1 * grad.norm()


def test_more_entries_than_the_vocabulary_are_refused(make_run: Any, tiny: Any) -> None:
    with pytest.raises(InputError, match="the teacher has a vocabulary of"):
        cached_teacher(make_run("chunks", "--teacher_cache", "topk:9999"), on_demand(tiny(64, 1, 2)))


# ---- Shards ----


def test_what_is_written_is_not_computed_again(
    make_run: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(caching, "SHARD_BYTES", 1 << 13)
    run, teacher, write = make_run(), tiny(64, 1, 2), Store.write

    def stopping(store: Store, shard: int, *rest: Any) -> None:
        if shard == 2:
            raise KeyboardInterrupt
        write(store, shard, *rest)

    monkeypatch.setattr(Store, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        cached_teacher(run, on_demand(teacher))
    (folder,) = (tmp for tmp in run.cache.iterdir() if tmp.name.startswith("teacher_cache"))
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("0*")}
    assert sorted(before) == ["00000.safetensors", "00001.safetensors"]
    monkeypatch.setattr(Store, "write", write)
    (folder / ".00002.safetensors").write_bytes(b"half")
    cut = folder / "00001.safetensors"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-1])  # by somebody else
    capsys.readouterr()

    cached = cached_teacher(run, on_demand(teacher))
    assert "are missing" in capsys.readouterr().out
    assert (
        cut.read_bytes() == whole and (folder / "00000.safetensors").stat().st_mtime_ns == before["00000.safetensors"]
    )
    assert not list(folder.glob(".*")) and not cached.store.missing() and cached.store.manifest.shards > 3
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    unloadable = dataclasses.replace(on_demand(teacher), load=lambda: pytest.fail("the teacher was loaded"))
    vars(unloadable)["facts"] = on_demand(teacher).facts
    cached_teacher(run, unloadable)
    assert "without the teacher" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(
    make_run: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(caching.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"do not fit into the 0\.00 GiB that are free there"):
        cached_teacher(make_run("chunks", "--teacher_cache_dir", str(tmp_path / "kept")), on_demand(tiny(64, 1, 2)))
    assert not list((tmp_path / "kept").iterdir())


def test_folders_that_do_not_fit(make_run: Any, tiny: Any, tmp_path: Path) -> None:
    folder, teacher = str(tmp_path / "kept"), tiny(64, 1, 2)
    run = make_run("chunks", "--teacher_cache_dir", folder)
    cached_teacher(run, on_demand(teacher))
    others = {
        "teacher": (run, tiny(64, 2, 2)),
        "computed in": (make_run("chunks", "--teacher_cache_dir", folder, "--bf16"), teacher),
        "data": (make_run("pairs", "--teacher_cache_dir", folder), teacher),
        "seed": (make_run("chunks", "--teacher_cache_dir", folder, "--data_seed", "9"), teacher),
        "epochs": (make_run("chunks", "--teacher_cache_dir", folder, "--teacher_cache_epochs", "3"), teacher),
        "tokenizer": (make_run("chunks", "--teacher_cache_dir", folder), teacher),
    }
    others["tokenizer"][0].data.parts["tokenizer"] = "other pieces"
    for what, (other, model) in others.items():
        with pytest.raises(InputError, match=rf"--teacher_cache_dir .*kept is of another run.*{what}: it has"):
            cached_teacher(other, on_demand(model))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"holds files, and no cache\.json"):
        Store.find(tmp_path / "mine", {})
    (tmp_path / "kept" / "cache.json").write_text("{}")
    with pytest.raises(InputError, match=r"cache\.json is none that this version wrote"):
        Store.find(tmp_path / "kept", {})


def test_content_is_that_of_tokens_however_they_are_stored(dataset: Chunks, tokenizer: Any) -> None:
    ids = datasets.List(datasets.Value("int32"), dataset.chunks.shape[1])
    rows = datasets.Dataset.from_dict({"input_ids": dataset.chunks}, datasets.Features({"input_ids": ids}))
    found = [content(Chunks(chunks, tokenizer, 1)) for chunks in (rows, rows.select(range(64)))]
    assert len(set(found)) == 1 and content(Chunks(rows.select(range(63)), tokenizer, 1)) != found[0]
    rows = [{"input_ids": [3, 4], "labels": [5]}, {"input_ids": [3], "labels": [4, 5]}]
    assert len({content(Pairs(datasets.Dataset.from_list(some))) for some in (rows, rows[::-1], rows[:1])}) == 3


def test_another_run_that_writes_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    let_go = threading.Timer(0.2, os.close, [other])
    let_go.start()
    began = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - began > 0.15
    assert "waiting for another run" in capsys.readouterr().out
