"""TRL's trainers with fastkd's losses on two gloo processes, against TRL's own there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from tests.forks import Forks

TRAINING = {"max_steps": 5, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "beta": 0.5}


def on_two(folder: Path) -> list[dict[Any, Any]]:
    """What each of two processes left."""
    forks = Forks("tests.integrations.trl_cases", ACCELERATE_USE_CPU="true")
    ran = forks.run("-m", "tests.integrations.trl_processes", folder, json.dumps(TRAINING), processes=2)
    forks.end()
    assert ran.returncode == 0, ran.stderr[-6000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.long
def test_two_processes(tmp_path: Path) -> None:
    """Five steps: what is logged is what TRL logs, and weights are equal on both ranks, and TRL's."""
    first, second = on_two(tmp_path)
    for name in ("gkd", "distillation"):
        (theirs, expected, _), (ours, weights, way) = first[name, True], first[name, False]
        assert way == "DistributedType.MULTI_CPU"
        for entry, its in zip(ours, theirs, strict=True):
            assert entry == pytest.approx(its, rel=1e-4)
        for key, x in weights.items():
            assert torch.equal(x, second[name, False][1][key]), key
            assert (x - expected[key]).abs().max() <= 1e-4, key
