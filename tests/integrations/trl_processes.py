"""One of several gloo processes that train with TRL: ``-m tests.integrations.trl_processes FOLDER SETTINGS [sharded]``.

SETTINGS is JSON: those of the configs, by the trainers' names. With the third word FSDP2 shards the student before a
trainer is given it, which takes it as it is, and each process has other rows. Each trains with TRL's trainers and
fastkd's, one after the other, and leaves what they logged and their weights, whole, in FOLDER/RANK.pt by (name, stock).
RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and what accelerate reads are in the environment.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, fully_shard

from tests.integrations import trl_cases as cases


def sharded() -> Any:
    """A student that is spread over the processes of torch's group."""
    student = cases.model()
    for part in (*student.model.layers, student):
        fully_shard(part)
    return student


def main(folder: Path, settings: dict[str, dict[str, Any]], shards: bool) -> None:
    cases.quiet()
    torch.set_num_threads(1)
    rank, found = int(os.environ["RANK"]), {}
    if shards:  # of which accelerate is not to know: it would have DDP around the student
        torch.distributed.init_process_group("gloo")
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]
    for name in ("gkd", "distillation"):
        for stock in (True, False):
            given: dict[str, Any] = {}
            if shards:
                data = cases.data(name)
                given = {"student": sharded(), "arguments": {"train_dataset": data.select(range(rank, len(data), 2))}}
            one = cases.trainer(name, stock, folder, **given, **settings[name])
            one.train()
            state = one.model.state_dict()
            weights = {key: x.full_tensor() if hasattr(x, "full_tensor") else x for key, x in state.items()}
            way = "FSDP2" if isinstance(one.model, FSDPModule) else str(one.accelerator.distributed_type)
            found[name, stock] = ([*cases.told(one)], weights, way)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), shards=sys.argv[3:] == ["sharded"])
