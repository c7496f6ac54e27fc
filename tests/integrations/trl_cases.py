"""Tiny students and teachers, data and trainers of TRL, stock and with fastkd's losses."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import datasets
import torch
import transformers
import trl
from trl.experimental import gkd, server_distillation

from fastkd.integrations import trl as fast
from tests.train import families

# name -> stock trainer, that of fastkd, config
TRAINERS: dict[str, tuple[Any, Any, Any]] = {
    "gkd": (gkd.GKDTrainer, fast.GKDTrainer, gkd.GKDConfig),
    "distillation": (trl.DistillationTrainer, fast.DistillationTrainer, trl.DistillationConfig),
    "server": (
        server_distillation.ServerDistillationTrainer,
        fast.ServerDistillationTrainer,
        server_distillation.ServerDistillationConfig,
    ),
}
TOKENS = 480  # of the tokenizer
SHORT: dict[str, dict[str, Any]] = {  # sequences
    "gkd": {"max_length": 40, "max_new_tokens": 6},
    "distillation": {"max_completion_length": 6},
    "server": {"max_completion_length": 6, "teacher_model_server_url": "http://nowhere"},
}
CHATS = (
    ("Why?", "The river was green; the children say that a painter lived there."),
    ("Is a bus leaving the old station at nine, and is a letter on the table?", "Yes."),
    ("A", "B C D"),
    ("Nobody knows why", "the nights are warm."),
)


def model(model_type: str = "qwen2", seed: int = 0, vocabulary: int = TOKENS, **changes: Any) -> Any:
    """A tiny model whose distributions are far from uniform, as those of trained models are."""
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    made = families.model(model_type, seed=seed, vocab_size=vocabulary, **{**ids, **changes})
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(4)
    return made


def teacher(model_type: str = "qwen2", vocabulary: int = TOKENS, **changes: Any) -> Any:
    """Another one, wider than the student."""
    return model(model_type, 1, vocabulary, hidden_size=48, head_dim=12, **changes)


def data(name: str) -> datasets.Dataset:
    """Conversations for a trainer: whole ones, or their prompts."""
    rows = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] for prompt, answer in CHATS * 6
    ]
    return datasets.Dataset.from_list([{"messages": row} if name == "gkd" else {"prompt": row[:1]} for row in rows])


def trainer(
    name: str,
    stock: bool,
    folder: Path,
    student: Any = None,
    its_teacher: Any = None,
    arguments: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """A trainer of the name, of which `settings` are its config's and `arguments` its own."""
    tokenizer = families.new_tokenizer("qwen2")
    tokenizer.padding_side = "left"
    random.seed(0)  # GKD draws from it which batches are the student's own
    given = {
        "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no",
        "logging_steps": 1, "per_device_train_batch_size": 2, "seed": 3, **SHORT[name], **settings,
    }  # fmt: skip
    given = {"model": model() if student is None else student, "args": TRAINERS[name][2](str(folder), **given)}
    if name != "server":
        given["teacher_model"] = teacher() if its_teacher is None else its_teacher
    given |= {"train_dataset": data(name), "processing_class": tokenizer, **(arguments or {})}
    return TRAINERS[name][0 if stock else 1](**given)


def batch(name: str) -> dict[str, torch.Tensor]:
    """A batch as a trainer's loss gets it: prompts of several lengths, which are masked, and padding on both sides."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(5, TOKENS, (3, 13), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, -2:] = 0
    if name == "gkd":
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :5] = -100
        labels[2, :9] = -100
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {
        "prompt_ids": ids[:, :5], "prompt_mask": mask[:, :5], "completion_ids": ids[:, 5:],
        "completion_mask": mask[:, 5:], "num_items_in_batch": torch.tensor(31),
    }  # fmt: skip


def loss_and_gradients(one: Any, inputs: Mapping[str, Any], items: Any = None) -> tuple[float, dict[str, torch.Tensor]]:
    """Of a trainer's loss, in training."""
    one.model.train()
    one.model.zero_grad()
    one.current_gradient_accumulation_steps = 2
    loss = one.compute_loss(one.model, dict(inputs), num_items_in_batch=items)
    loss.backward()
    parameters = one.model.named_parameters()
    return loss.item(), {n: p.grad.clone() for n, p in parameters if p.requires_grad and p.grad is not None}


def check_equal(theirs: tuple[float, dict[str, torch.Tensor]], ours: tuple[float, dict[str, torch.Tensor]]) -> None:
    """Losses, and gradients by their norms, to 1e-5."""
    assert abs(ours[0] - theirs[0]) <= 1e-5 * abs(theirs[0])
    assert ours[1].keys() == theirs[1].keys() and theirs[1]
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def told(one: Any) -> Iterator[dict[str, float]]:
    """What a trainer logged, but for how long it took."""
    for entry in one.state.log_history:
        yield {name: x for name, x in entry.items() if "time" not in name and "per_second" not in name}


def quiet() -> None:
    """Without the lines that transformers writes."""
    transformers.logging.set_verbosity_error()
