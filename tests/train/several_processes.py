"""Runs fastkd-train in several gloo processes: `python -m tests.train.several_processes FOLDER`, for test_processes.py.

FOLDER holds scenarios.json, a list of {name, processes, argv}, and if need be what comes before: {copy, without, patch,
environment}. They run one after the other, those that are {aside} beside all of them, as they mostly wait; the exit
code of each process, what it wrote to stderr, how many seconds it took and what it has seen are left in NAME.RANK.json.
What is imported is imported once, and the processes are forked. Pictures are drawn where a scenario has {pictures}.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from fastkd.train import cli
from fastkd.train.models import sharding
from fastkd.train.report import plots
from fastkd.train.stages import caching, prepare
from fastkd.train.training import parallel, trainer
from tests.forks import free_port

# What runs import when they come to it, which together takes each of them two seconds.
LATER = (
    "fastkd.functions",
    *(f"fastkd.train.runs.{run}" for run in ("encoder", "interpolated", "pruned", "train")),
    "matplotlib.backends.backend_agg",
    "rouge_score.rouge_scorer",
    *(f"transformers.models.{family}.modeling_{family}" for family in ("bart", "qwen2", "t5")),
)
PATIENCE = 60  # seconds; with what sleeps, twice as much
DISTURBED = 8  # steps that are done before something happens, two after a checkpoint


def kill_in_a_step() -> None:
    """Make process 1 end without a word, as one does that runs out of memory."""
    step = trainer.DistillTrainer.training_step

    def killing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == DISTURBED and self.args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    trainer.DistillTrainer.training_step = killing  # type: ignore[method-assign]


def signal_in_a_step() -> None:
    """Make process 1 receive SIGTERM, as all do from a scheduler, but not at one time."""
    step, sent = trainer.DistillTrainer.training_step, []

    def signalling(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == DISTURBED and self.args.process_index == 1 and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    trainer.DistillTrainer.training_step = signalling  # type: ignore[method-assign]


SEEN: list[bool] = []  # by a process that hung: whether process 1 has ended


def hang() -> None:
    """Hang until process 1 has ended, or for 2.5 minutes."""
    deadline, left = time.monotonic() + 150, Path(os.environ["LEFT_BY_1"])
    while time.monotonic() < deadline and not left.is_file():
        time.sleep(0.05)
    SEEN.append(left.is_file())


def hang_over_data() -> None:
    """Make process 0 hang while it alone prepares data for all."""
    prepare.sides_of = lambda *_: hang()  # type: ignore[assignment, return-value]


def hang_over_a_step() -> None:
    """Make process 0 hang in the middle of training."""
    step = trainer.DistillTrainer.training_step

    def hanging(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == DISTURBED and self.args.process_index == 0:
            hang()
        return step(self, *args, **kwargs)

    trainer.DistillTrainer.training_step = hanging  # type: ignore[method-assign]


def nothing_stays() -> None:
    """Make the loss read a head that is sharded again when the model has run."""
    parallel.shard = lambda *args, stay, **policy: sharding.shard(*args, **policy)  # type: ignore[assignment]


def small_shards() -> None:
    """Make a teacher's cache so many shards that every process writes some."""
    caching.SHARD_BYTES = 1 << 16


PATCHES = {
    "small shards": small_shards,
    "kill": kill_in_a_step,
    "signal": signal_in_a_step,
    "nothing stays": nothing_stays,
    "hang over data": hang_over_data,
    "hang over a step": hang_over_a_step,
}


def run(scenario: dict[str, Any], rank: int, port: int, folder: Path) -> None:
    """Be process `rank` of a scenario, and end."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": scenario["processes"], "MASTER_PORT": port}
    settings = {**scenario.get("environment", {}), **own}
    os.environ.update({name: str(value) for name, value in settings.items()}, MASTER_ADDR="127.0.0.1")
    os.environ["LEFT_BY_1"] = str(folder / f"{scenario['name']}.1.json")
    transformers.logging.set_verbosity_error()
    if scenario.get("patch"):
        PATCHES[scenario["patch"]]()
    if not scenario.get("pictures"):
        plots.losses = plots.terms = lambda outcomes: b""
    stderr, began = io.StringIO(), time.monotonic()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = cli.main(scenario["argv"])
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
    lines = [line for line in stderr.getvalue().splitlines() if "fastkd-train" in line]
    left = folder / f"{scenario['name']}.{rank}.json"
    left.with_suffix(".writing").write_text(
        json.dumps({"code": code, "lines": lines, "seconds": time.monotonic() - began, "seen": SEEN})
    )
    left.with_suffix(".writing").rename(left)
    os._exit(0)  # not through what others registered for a process's end


def start(scenario: dict[str, Any], folder: Path) -> list[int]:
    """Start the processes of a scenario."""
    if "copy" in scenario:
        shutil.copytree(folder / scenario["copy"], folder / scenario["name"])
        for name in scenario["without"]:
            shutil.rmtree(folder / scenario["name"] / name)
    port, children = free_port(), []
    for rank in range(scenario["processes"]):
        child = os.fork()
        if child == 0:
            run(scenario, rank, port, folder)
        children.append(child)
    return children


def wait(children: list[int], patience: float) -> None:
    """Wait for processes, and kill what is left of them then."""
    deadline = time.monotonic() + patience
    while children and time.monotonic() < deadline:
        children = [child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0]
        time.sleep(0.02)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def main(folder: Path) -> None:
    """Run all scenarios of the folder."""
    torch.set_num_threads(1)
    for module in LATER:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # what was imported: every training ends in a garbage collection, which need not look at it
    scenarios = json.loads((folder / "scenarios.json").read_text())
    asleep = [start(scenario, folder) for scenario in scenarios if "aside" in scenario]
    for scenario in scenarios:
        if "aside" not in scenario:
            began = time.monotonic()
            wait(start(scenario, folder), PATIENCE)
            print(f"{scenario['name']}: {time.monotonic() - began:.1f} s", flush=True)
    for children in asleep:
        wait(children, 2 * PATIENCE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
