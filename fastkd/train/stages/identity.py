"""What a run is, its settings and the contents of what it reads: by them a resumed run is known, and what is cached."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from ...heads import gathered
from ..common.errors import InputError
from ..flags.arguments import TransformersArguments
from ..flags.fields import FastkdArguments
from ..models.sharding import is_asked_for

RECORD = "run.json"  # in a run's folder
# The arguments of transformers that shape what a model learns, but for how long it does.
RECIPE = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "optim", "optim_args",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "train_sampling_strategy", "seed", "data_seed", "bf16",
    "fp16",
)  # fmt: skip
# Flags that a resumed run may change: what it shows, and where things are, which count by what they hold.
_MAY_CHANGE = {
    "config", "demo", "transformers_flags", "overwrite_output_dir", "cache_dir", "workspace_mb", "report_examples",
    "train_file", "eval_file", "teacher", "student", "teacher_sharding", "teacher_cache_dir",
}  # fmt: skip


def recipe(args: TransformersArguments) -> dict[str, Any]:
    """Return those arguments, and how many examples a step learns from, however they are divided."""
    batch = "per_device_train_batch_size * gradient_accumulation_steps * processes"
    return {**{name: getattr(args, name) for name in RECIPE}, batch: examples_per_step(args)}


def examples_per_step(args: TransformersArguments) -> int:
    """Return how many examples the accumulated batches of all processes hold."""
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)


def digest(model: Any) -> str:
    """Return a fingerprint of a model's configuration and weights; every process of a sharded one must ask for it."""
    ignored = ("_name_or_path", "transformers_version", "architectures")
    settings = {name: value for name, value in model.config.to_diff_dict().items() if name not in ignored}
    found = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        found.update(name.encode())
        found.update(gathered(tensor.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def held_out_digest(data: Any) -> str:
    """Return a fingerprint of what held-out figures are of: a run's targets, or for texts its chunks of tokens."""
    rows, column = data.held_out_rows, "target"
    if data.task.is_text:
        rows, column = data.held_out.chunks, "input_ids"
    found = hashlib.sha256()
    for block in rows.select_columns([column]).iter(1000):
        found.update(json.dumps(block[column]).encode())
    return found.hexdigest()[:16]


def identity(run: Any) -> dict[str, Any]:
    """Return what must not change when a run is resumed: settings, and under "contents" what the run reads.

    run: a `run.Run`. Of contents there are a name and a fingerprint.
    """
    flags, args = run.flags, run.args
    read = {**run.given.digests, **run.data.parts}
    ours = {name: value for name, value in vars(flags).items() if name not in _MAY_CHANGE and name not in read}
    ours |= {name: run.data.facts[name] for name in ("source_lang", "target_lang") if name in run.data.facts}
    contents = {name: [str(Path(str(getattr(flags, name, None) or found))), found] for name, found in read.items()}
    return json.loads(json.dumps({**ours, **recipe(args), "fsdp": is_asked_for(args), "contents": contents}))


def check_same_run(folder: Path, now: dict[str, Any]) -> None:
    """Raise InputError, saying what differs, if the run in a folder was started with another identity.

    What an older version did not record, it did not have: flags then were as they are by default, contents unknown.
    """
    record = folder / RECORD
    if not record.is_file():
        raise InputError(f"cannot resume: {folder} has no {RECORD}, which says how the run was started")
    before = {f.name: f.default for f in dataclasses.fields(FastkdArguments)}
    before |= json.loads(record.read_text(encoding="utf-8"))
    for name, value in now.items():
        if name != "contents" and before.get(name, value) != value:
            raise InputError(f"cannot resume: the run was started with {name} {before[name]!r}, now it is {value!r}")
    was, contents = before.get("contents", now["contents"]), now["contents"]
    for name in sorted({*was, *contents}):
        (old, old_digest), (new, digest) = (side.get(name, ("nothing", None)) for side in (was, contents))
        if old_digest != digest:
            where = f"{old}, now it is {new}" if old != new else f"{old} as it was then, now it holds something else"
            raise InputError(f"cannot resume: the run was started with another {name}: {where}")
