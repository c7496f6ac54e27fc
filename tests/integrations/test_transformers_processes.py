"""DistillTrainer in a script of a user's own, in two gloo processes: the numbers of one process with all the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from fastkd.integrations.transformers import DistillTrainer
from tests.cases import distance, end_process
from tests.forks import Forks
from tests.integrations.test_transformers import arguments, data, with_lora
from tests.train import families

RANKS, STEPS, ROWS = 2, 5, 2  # rows of a process's batch, of which two are accumulated
# Of each: whether the head is the embedding, whether there are adapters, and what the arguments say.
WAYS: dict[str, tuple[bool, bool, dict[str, Any]]] = {
    "ddp": (True, False, {}),
    "ddp-untied": (False, False, {"ddp_find_unused_parameters": True}),
    "ddp-lora": (False, True, {}),
    "fsdp": (True, False, {"fsdp": True}),
    "fsdp-untied": (False, False, {"fsdp": True}),
}
METHODS: dict[str, Any] = {"kd": "kd", "terms": {"ce": 0.5, "hidden_linear": 0.5}}


def trained(folder: Path, way: str, method: str, ranks: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Train some steps on the same rows each, in however many processes; return losses and weights."""
    tied, has_adapters, more = WAYS[way]
    student = families.model("qwen2", tie_word_embeddings=tied)
    student = with_lora(student) if has_adapters else student
    rows, collate = data("qwen2")
    args = arguments(
        folder, max_steps=STEPS, per_device_train_batch_size=ROWS, gradient_accumulation_steps=2 * RANKS // ranks,
        optim="sgd", learning_rate=0.05, **(more if ranks > 1 else {}),
    )  # fmt: skip
    torch.manual_seed(0)
    teacher = families.model("qwen2", seed=1)
    trainer = DistillTrainer(student, args, collate, rows, teacher=teacher, method=METHODS[method])
    trainer.train()
    losses = torch.tensor([float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry])
    assert args.world_size == ranks and len(losses) == STEPS
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in student.named_parameters()}
    return losses, {name: x.detach().clone() for name, x in whole.items()}


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    found = {}
    for way in WAYS:
        for method in METHODS:
            found[way, method] = trained(Path(folder), way, method, RANKS)
            AcceleratorState._reset_state()  # which remembers FSDP
    torch.save(found, f"{folder}/{rank}")
    end_process()


@pytest.mark.long
def test_two_processes_train_as_one(forks: Forks, tmp_path: Path) -> None:
    """Under DDP and FSDP2, batches accumulated: the losses of all steps, and afterwards the weights of both ranks."""
    forks.call(_rank, str(tmp_path), processes=RANKS)
    ranks = [torch.load(tmp_path / str(rank)) for rank in range(RANKS)]
    assert ranks[0].keys() == {(way, method) for way in WAYS for method in METHODS}
    for way, method in ranks[0]:
        losses, weights = trained(tmp_path, way, method, 1)
        for found, its in (rank[way, method] for rank in ranks):
            assert distance(found, losses) <= 1e-5, (way, method)
            assert its.keys() == weights.keys()
            for name, weight in weights.items():
                assert torch.equal(its[name], ranks[0][way, method][1][name]), (way, method, name)
                assert distance(its[name], weight) <= 1e-5, (way, method, name)


def test_processes_that_do_not_know_of_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers starts them on a machine without GPUs if nobody says use_cpu."""
    rows, collate = data("gpt2")
    student, args = families.model("gpt2"), arguments(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes that would each train alone: without GPUs give use_cpu=True"):
        DistillTrainer(student, args, collate, rows, method="scratch")
