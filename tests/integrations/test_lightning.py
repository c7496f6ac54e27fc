"""examples/lightning_module.py, on one process and on two, against a loop in plain torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.cases import installed
from tests.forks import Forks
from tests.forks import forks as forks_with
from tests.train import families

ROOT = Path(__file__).parents[2]
STEPS, BATCH, LR = 5, 8, 1e-3


def models() -> tuple[Any, Any]:
    return families.model("llama", seed=0), families.model("llama", seed=1, hidden_size=64)


def rows() -> list[list[int]]:
    """Of lengths that differ much, so that a mean of two processes' means is another one than that of all tokens."""
    drawn = torch.randint(3, families.VOCABULARY, (STEPS * BATCH, 16), generator=torch.Generator().manual_seed(0))
    return [row[: 3 + 13 * (i % 2)].tolist() for i, row in enumerate(drawn)]


def collate(some: list[list[int]]) -> dict[str, torch.Tensor]:
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in some], batch_first=True, padding_value=-100)
    mask = padded != -100
    return {"input_ids": padded.clamp(min=0), "attention_mask": mask.long(), "labels": padded}


def plain() -> dict[str, torch.Tensor]:
    """The student's weights after a loop as one writes it, on one process."""
    student, teacher = models()
    optimizer = torch.optim.AdamW(student.parameters(), LR)
    for at in range(0, STEPS * BATCH, BATCH):
        batch = collate(rows()[at : at + BATCH])
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        y = batch["labels"][:, 1:]
        s = student(**inputs).logits[:, :-1][y != -100]
        with torch.no_grad():
            t = teacher(**inputs).logits[:, :-1][y != -100]
        kl = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="batchmean")
        (kl + 0.5 * F.cross_entropy(s, y[y != -100])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return student.state_dict()


def train(rank: int, folder: Path, world: int) -> None:
    """Train by the example's module, and leave FOLDER/RANK.pt, the student's weights, and FOLDER/checkpoint."""
    if world > 1:  # as torchrun says
        os.environ |= {"LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
    sys.path.insert(0, str(ROOT / "examples"))
    import lightning as L
    from lightning_module import Distillation
    from torch.utils.data import DataLoader, DistributedSampler

    module = Distillation(*models(), LR)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", devices=world, max_steps=STEPS, **quiet)
    # Lightning's own sampler shuffles. Every second row is a process's.
    data: Any = rows()
    sampler = DistributedSampler(data, world, rank, shuffle=False)
    trainer.fit(module, DataLoader(data, BATCH // world, sampler=sampler, collate_fn=collate))
    torch.save(module.student.state_dict(), folder / f"{rank}.pt")
    trainer.save_checkpoint(folder / "checkpoint")


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """Processes that know Lightning."""
    installed("lightning")
    with forks_with(__name__, "lightning", OMP_NUM_THREADS="1") as made:
        yield made


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
def test_weights_are_those_of_a_plain_loop(world: int, forks: Forks, tmp_path: Path) -> None:
    """Five steps; on two processes each has half of every batch."""
    forks.call(train, tmp_path, world, processes=world)
    ours, expected = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)], plain()
    for key, x in expected.items():
        assert (ours[0][key] - x).abs().max() <= 1e-5, key
        assert torch.equal(ours[0][key], ours[-1][key]), key

    kept = torch.load(tmp_path / "checkpoint", weights_only=False)
    assert {*kept["state_dict"]} == {f"student.{key}" for key in expected}
    (groups,) = (one["param_groups"] for one in kept["optimizer_states"])
    assert sum(len(group["params"]) for group in groups) == len([*models()[0].parameters()])
