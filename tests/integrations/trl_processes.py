"""One of several gloo processes that train with TRL: ``python -m tests.integrations.trl_processes FOLDER SETTINGS``.

SETTINGS is JSON: those of the config. Each process trains with TRL's trainers and fastkd's, one after the other, and
leaves what they logged and their weights, whole, in FOLDER/RANK.pt by (name, stock). RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT and what accelerate reads are in the environment.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.integrations import trl_cases as cases


def main(folder: Path, settings: dict[str, Any]) -> None:
    cases.quiet()
    torch.set_num_threads(1)
    found = {}
    for name in ("gkd", "distillation"):
        for stock in (True, False):
            one = cases.trainer(name, stock, folder, **settings)
            one.train()
            state = one.model.state_dict()
            weights = {key: x.full_tensor() if hasattr(x, "full_tensor") else x for key, x in state.items()}
            found[name, stock] = ([*cases.told(one)], weights, str(one.accelerator.distributed_type))
    torch.save(found, folder / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
