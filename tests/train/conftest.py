"""A tiny tokenizer, tiny texts and tiny T5s that the fastkd-train tests share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from train_flags import RECIPE, SIZES, TEACHER, with_inputs
from transformers import default_data_collator

from fastkd.train import cli
from fastkd.train.data.examples import Chunks
from fastkd.train.flags.arguments import TransformersArguments, parse
from fastkd.train.minidisc import pages
from fastkd.train.models.student import new_model, t5_config
from fastkd.train.models.tokenizer import padded_size, train_tokenizer
from fastkd.train.objectives.methods import METHODS, Method
from fastkd.train.report import plots
from fastkd.train.training.trainer import DistillTrainer

LENGTH = 32


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> None:
    """Every training ends in a garbage collection, which need not look at all that was imported, again and again."""
    gc.collect()
    gc.freeze()


def make_texts(count: int) -> list[str]:
    """English-like texts of random words, distinct and reproducible."""
    rng = np.random.default_rng(0)
    syllables = [
        "ta",
        "re",
        "mon",
        "sil",
        "ver",
        "ka",
        "lo",
        "phi",
        "der",
        "ing",
        "ous",
        "un",
        "pre",
        "ment",
        "ly",
        "x",
    ]
    words = ["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(400)]
    return [" ".join(rng.choice(words, rng.integers(10, 40))).capitalize() + "." for _ in range(count)]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(400)


@pytest.fixture(scope="session")
def tokenizer(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_tokenizer(texts, vocabulary_size=512)


@pytest.fixture(scope="session")
def packed(tokenizer: Any) -> Callable[[Sequence[str], int], np.ndarray]:
    """packed(texts, length): chunks [N, length] of all their tokens at once but the last few, as packing must give."""

    def chunks(texts: Sequence[str], length: int) -> np.ndarray:
        stream = [t for text in texts for t in tokenizer(text, add_special_tokens=False)["input_ids"]]
        return np.array(stream[: len(stream) // length * length]).reshape(-1, length)

    return chunks


@pytest.fixture(scope="session")
def dataset(tokenizer: Any, texts: list[str], packed: Callable[..., np.ndarray]) -> Chunks:
    return Chunks(packed(texts, LENGTH)[:64], tokenizer, seed=3)


@pytest.fixture
def make_batch(dataset: Chunks) -> Callable[..., dict[str, torch.Tensor]]:
    """make_batch(size): a batch with some padding on both sides."""

    def make(size: int = 6) -> dict[str, torch.Tensor]:
        batch = default_data_collator([dataset[i] for i in range(size)])
        batch["labels"][0, -3:] = -100
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1, -7:] = 0
        return batch

    return make


@pytest.fixture(scope="session")
def text_file(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


@pytest.fixture
def tiny(tokenizer: Any) -> Callable[..., Any]:
    """tiny(width, seed, layers): a T5 with that many layers a side."""
    return lambda width=32, seed=0, layers=1: new_model(t5_config(padded_size(tokenizer), width, layers), seed)


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., TransformersArguments]:
    """arguments("--flag", "value", ...): parsed flags for a short run on the CPU into tmp_path/out."""

    def make(*flags: str) -> TransformersArguments:
        base = ["--output_dir", str(tmp_path / "out"), "--max_steps", "4", "--per_device_train_batch_size", "8"]
        base += ["--per_device_eval_batch_size", "32"]
        return parse(with_inputs(*base, *SIZES, *TEACHER, *RECIPE, "--use_cpu", "--disable_tqdm", "true", *flags))[1]

    return make


@pytest.fixture
def make_trainer(
    dataset: Chunks, tokenizer: Any, arguments: Callable[..., TransformersArguments]
) -> Callable[..., DistillTrainer]:
    """make_trainer(model, method, flags, teacher=..., ...): a DistillTrainer on the tiny dataset.

    method: a name in METHODS, or a Method.
    """

    def make(model: Any, method: str | Method, flags: Sequence[str] = (), **objective: Any) -> DistillTrainer:
        trainer = DistillTrainer(
            model=model,
            args=arguments(*flags),
            train_dataset=dataset,
            eval_dataset=dataset,
            data_collator=default_data_collator,
            processing_class=tokenizer,
            method=METHODS[method] if isinstance(method, str) else method,
            **objective,
        )
        trainer.show_progress("test")
        return trainer

    return make


# Flags of a run that takes a second or two. Progress bars and checkpoints come where a test asks for them.
SMALL = [
    "--use_cpu", "--disable_tqdm", "true", "--save_strategy", "no", *SIZES, *TEACHER, *RECIPE,
    "--max_steps", "4", "--per_device_train_batch_size", "4", "--sequence_length", "32", "--vocabulary_size", "512",
    "--per_device_eval_batch_size", "16",
]  # fmt: skip


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The --cache_dir of all runs that need none of their own: what one prepares and trains, the next ones reuse."""
    return tmp_path_factory.mktemp("runs") / "cache"


@pytest.fixture(scope="session")
def tool(shared_cache: Path) -> Callable[..., int]:
    """tool("--flag", value, ...): the exit code of fastkd-train with these flags, run in this process.

    Behind SMALL and before what `with_inputs` adds; without pictures.
    """

    def run(*flags: Any) -> int:
        with pytest.MonkeyPatch.context() as patch:
            _draw_nothing(patch)
            return cli.main(with_inputs("--cache_dir", shared_cache, *SMALL, *flags))

    return run


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report's pictures, which take as long as the rest of a short run, are empty."""
    _draw_nothing(monkeypatch)


def _draw_nothing(patch: pytest.MonkeyPatch) -> None:
    for picture in ("losses", "terms"):
        patch.setattr(plots, picture, lambda outcomes: b"")
    patch.setattr(pages, "_pictures", lambda schedule: [])


@pytest.fixture(scope="session")
def saved(tokenizer: Any) -> Callable[..., Path]:
    """saved(model, folder): the folder, with a model and the tokenizer (or another one) as --teacher takes it."""

    def save(model: Any, folder: Path, tokenizer: Any = tokenizer) -> Path:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trainers that the test's runs made, in order, each with its model as the run left it."""
    made: list[Any] = []
    create = DistillTrainer.__init__

    def keep(self: DistillTrainer, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(DistillTrainer, "__init__", keep)
    return made
