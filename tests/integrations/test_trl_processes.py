"""TRL's trainers with fastkd's losses on two gloo processes, against TRL's own there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from tests.train.several_processes import free_port

TRAINING = {"max_steps": 5, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "beta": 0.5}


def on_two(folder: Path) -> list[dict[Any, Any]]:
    """What each of two processes left."""
    command = [sys.executable, "-m", "tests.integrations.trl_processes", str(folder), json.dumps(TRAINING)]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1",
              "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    running = [
        subprocess.Popen(
            command, env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [one.communicate(timeout=400)[1] for one in running]
    finally:
        for one in running:
            one.kill()
    assert [one.returncode for one in running] == [0, 0], "\n".join(error[-3000:] for error in errors)
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
