"""The ranking of a teacher's heads and neurons by their importance, measured once and kept in the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..common.cache import cached
from ..common.errors import InputError
from ..models.architectures import parts
from ..stages.identity import digest
from ..stages.run import Run
from .prune import importance, normalised

VERSION = 2  # raise it when measuring changes what it gives, so that older files are not reused


def held_out_for_importance(run: Run) -> tuple[Run, Any]:
    """Return (the run on the data to train on, the examples that importance is measured on)."""
    flags, data, seed = run.flags, run.data, run.seed
    if flags.importance_on == "dev":
        return run, data.held_out
    size = len(data.train)
    count = min(flags.importance_examples, size // 5)
    if count < 1:
        raise InputError(f"--importance_on train: {size} training examples are too few to hold any out; give dev")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    examples, rest = (data.train.select(sorted(part)) for part in (order[:count], order[count:]))
    unit = "training_chunks" if "training_chunks" in data.facts else "training_examples"
    known = hashlib.sha256(json.dumps([data.digest, seed, count]).encode()).hexdigest()[:16]
    facts = {**data.facts, unit: size - count, "importance_examples": count}
    data = dataclasses.replace(data, train=rest, digest=known, facts=facts)
    return dataclasses.replace(run, data=data), examples


def rank(run: Run, examples: Any, teacher: Any) -> tuple[dict[str, torch.Tensor], str]:
    """Return (the normalised importance of the teacher's units, what tells it and the teacher from others).

    It is measured on the examples, or taken from the cache if it was measured before.
    """
    data, batch = run.data, run.args.per_device_train_batch_size
    settings = {
        "version": VERSION,
        "teacher": digest(teacher),
        "data": data.digest,
        "examples": len(examples),
        "batch": batch,
    }

    def make(folder: Path) -> None:
        batches = DataLoader(examples, batch, collate_fn=data.collate)
        scores = importance(teacher, tqdm(batches, desc="measuring importance", unit="batch"))
        save_file({name: score.cpu() for name, score in scores.items()}, folder / "importance.safetensors")

    folder, _ = cached(run.cache, "importance", settings, make, says=True)
    scores = load_file(folder / "importance.safetensors")
    return normalised({name: scores[name] for name in parts(teacher)}), folder.name
