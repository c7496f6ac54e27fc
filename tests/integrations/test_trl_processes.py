"""TRL's trainers with fastkd's losses on two gloo processes, against TRL's own there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from tests.forks import Forks, forks

TRAINING = {"max_steps": 5, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "beta": 0.5}
BOTH = {"gkd": TRAINING, "distillation": TRAINING}
# Processes that share a model's weights have to write equally many tokens.
ALIKE = {
    "gkd": {**TRAINING, "lmbda": 0.0},
    "distillation": {**TRAINING, "generation_kwargs": {"min_new_tokens": 6}},
}


@pytest.fixture(scope="module")
def trl() -> Iterator[Forks]:
    """Processes that know TRL."""
    with forks("tests.integrations.trl_cases", OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true") as made:
        yield made


@pytest.mark.long
@pytest.mark.parametrize(
    ("settings", "sharded", "way"), [(BOTH, [], "DistributedType.MULTI_CPU"), (ALIKE, ["sharded"], "FSDP2")]
)
def test_two_processes(settings: dict[str, Any], sharded: list[str], way: str, trl: Forks, tmp_path: Path) -> None:
    """Five steps: what is logged is what TRL logs, and weights are equal on both ranks, and TRL's.

    With DDP, as accelerate has it on CPUs; and of a student that FSDP2 has sharded, as it would on GPUs.
    """
    words = ("-m", "tests.integrations.trl_processes", tmp_path, json.dumps(settings), *sharded)
    ran = trl.run(*words, processes=2)
    assert ran.returncode == 0, ran.stderr[-6000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in ("gkd", "distillation"):
        (theirs, expected, _), (ours, weights, its_way) = first[name, True], first[name, False]
        assert its_way == way
        for entry, its in zip(ours, theirs, strict=True):
            assert entry == pytest.approx(its, rel=1e-4)
        if sharded:  # of other rows each
            assert ours[0]["loss"] != second[name, False][0][0]["loss"]
        for key, x in weights.items():
            assert torch.equal(x, second[name, False][1][key]), key
            assert (x - expected[key]).abs().max() <= 1e-4, key
