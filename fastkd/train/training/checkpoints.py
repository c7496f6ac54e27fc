"""Checkpoints on disk, each of them whole or absent.

One is written into `<output_dir>/_saving` and renamed when it is complete, so a folder named checkpoint-N is whole
whatever stopped the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME

from ..common.errors import RunError
from ..common.processes import is_first

STAGING = "_saving"  # no checkpoint to transformers, and left out of uploads, as is every name with that first letter
PREFIX = "checkpoint-"
_REPLACED = "replaced-"


def fault(checkpoint: Path) -> str | None:
    """Return what keeps a folder from being a checkpoint that a run can continue from, or None if it is one."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    except (FileNotFoundError, NotADirectoryError):
        return f"it has no {TRAINER_STATE_NAME}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {TRAINER_STATE_NAME} cannot be read"
    names = [path.name for path in checkpoint.iterdir()]
    for what, prefixes in (("weights", ("model", "pytorch_model")), ("state of the optimizer", ("optimizer",))):
        if not any(name.startswith((*prefixes, "global_step")) for name in names):  # the last is DeepSpeed's
            return f"it has no {what}"
    try:
        for weights in checkpoint.glob("model*.safetensors"):
            safe_open(weights, "pt")  # which reads its head, and whether it is as long as that says
    except (OSError, SafetensorError):
        return "its weights cannot be read"
    return None


def checkpoints(run: Path) -> list[Path]:
    """Return the folders checkpoint-N of a run, whole or not, the largest N first."""
    found = [path for path in run.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)), reverse=True)


def last_checkpoint(run: Path) -> Path | None:
    """Return the whole checkpoint of a run with the largest number of steps, or None."""
    return next((path for path in checkpoints(run) if fault(path) is None), None)


def recover(run: Path) -> None:
    """Remove what a save that did not end has left in a run's folder, and undo what it did."""
    staging = run / STAGING
    for old in staging.glob(f"{_REPLACED}*"):
        target = run / old.name.removeprefix(_REPLACED)
        if not target.exists():
            old.rename(target)
    shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def continued(checkpoint: Path, args: Any) -> Iterator[Path]:
    """Yield a checkpoint as one of a run by the arguments `args`, which goes on from it.

    transformers would log, evaluate and save as often as the run before, whatever the arguments say, and warn where
    they say something else: a share of all steps in place of their number, or a step divided among other processes.
    Here the intervals are left open, for `callbacks.Ends` to set, and the best checkpoint is the one beside this one.
    """
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    state |= {"logging_steps": None, "eval_steps": None, "save_steps": None, "train_batch_size": args.train_batch_size}
    best = checkpoint.parent / f"{PREFIX}{state.get('best_global_step')}"
    state["best_model_checkpoint"] = str(best) if best.is_dir() else None
    with tempfile.TemporaryDirectory() as folder:
        for path in checkpoint.iterdir():
            if path.name != TRAINER_STATE_NAME:
                (Path(folder) / path.name).symlink_to(path.resolve())
        (Path(folder) / TRAINER_STATE_NAME).write_text(json.dumps(state), encoding="utf-8")
        yield Path(folder)


@contextlib.contextmanager
def writing(target: Path, run: Path) -> Iterator[None]:
    """Leave nothing half written in `run`, and turn what a full or read-only disk raises into a RunError."""
    try:
        yield
    except BaseException as error:
        if is_first():
            with contextlib.suppress(OSError):
                recover(run)
        # torch.save reports no error of the system's, only that the file is not as long as it should be.
        torn = isinstance(error, RuntimeError) and "inline_container" in str(error)
        if not torn and not isinstance(error, (OSError, SafetensorError)):
            raise
        reason = "the disk took only a part of a file" if torn else getattr(error, "strerror", None) or str(error)
        raise RunError(f"cannot write {target}: {reason}; {way_back(run)}") from error


def way_back(run: Path) -> str:
    """Return what to say of a run that ended early: which checkpoint it can be continued from, if any."""
    last = last_checkpoint(run)
    return f"{last} is whole, --resume_from_checkpoint last continues from it" if last else "no checkpoint was saved"


def flush(folder: Path) -> None:
    """Wait until the disk has all files: some report only now that they are full, and power may fail later."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:
                os.fsync(file.fileno())


def publish(staged: Path, final: Path) -> None:
    """Rename a complete checkpoint to its final name, in place of an older one."""
    flush(staged)
    if final.exists():
        os.rename(final, staged.parent / f"{_REPLACED}{final.name}")
    os.rename(staged, final)
    recover(final.parent)
