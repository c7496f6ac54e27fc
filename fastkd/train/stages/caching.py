"""What the teacher of a run says of its training data, kept on disk: from an earlier run, or computed once here."""

from __future__ import annotations

import math
import shutil
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import fastkd

from ..common.cache import key
from ..common.errors import InputError, writing
from ..common.family import kind_of
from ..common.processes import by_first, count, is_first, of_all, own_part
from ..data.corruption import IGNORED
from ..data.examples import Chunks
from ..models.anatomy import head_of
from ..models.sharding import is_sharded
from ..objectives.methods import METHODS
from ..objectives.terms import aligned_labels
from ..teaching.cached import CachedTeacher, content, valid_lengths
from ..teaching.kinds import Columns, Kind
from ..teaching.store import SHARD_BYTES, Manifest, Store, locked
from ..training.forward import Needs, forward
from .folders import writable
from .given import Teacher
from .identity import examples_per_step
from .prepare import heading
from .run import Run
from .trainers import make_trainer

GIB = 2**30


def cached_teacher(run: Run, teacher: Teacher) -> CachedTeacher:
    """Return what `--teacher_cache` asks for, of all examples of all epochs that it asks for.

    It is read if it is there, or else the teacher is loaded and computes it, so that the next run does not need it.
    Raises InputError for a folder that holds something else, and if there is no room for it.
    """
    flags = run.flags
    heading(f"Teacher cache: {flags.teacher_cache}")
    kind, method = Kind.parse(str(flags.teacher_cache)), flags.objective
    is_text = isinstance(run.data.train, Chunks)
    epochs = flags.teacher_cache_epochs if is_text else 1
    fits = {
        "what": str(kind),
        "teacher": teacher.facts["digest"],
        # What autocast makes of what the loss reads, or else the teacher's own dtype.
        "computed in": "bfloat16" if run.args.bf16 else "float16" if run.args.fp16 else teacher.facts["dtype"],
        "data": content(run.data.train),
        "tokenizer": run.data.parts["tokenizer"],
        "seed": run.seed if is_text or kind.name == "sampled" else None,
        "epochs": epochs,
        "temperature": method.temperature if kind.entries else None,
    }
    known = _vocabulary(teacher.config)
    if kind.entries and known == 1:
        raise InputError(f"--teacher_cache {kind}: the teacher's one output is a number: expected hidden")
    if kind.name == "topk" and kind.entries > known:
        raise InputError(f"--teacher_cache {kind}: the teacher has a vocabulary of {known}: expected at most {known}")
    folder = Path(flags.teacher_cache_dir) if flags.teacher_cache_dir else run.cache / f"teacher_cache-{key(fits)}"

    def whole() -> Manifest | None:
        store = Store.find(folder, fits)
        is_whole = store is not None and not store.missing() and (kind.entries or store.head is not None)
        return store.manifest if store is not None and is_whole else None

    if manifest := by_first(whole):
        print(f"reusing {folder}, without the teacher")
    else:
        by_first(lambda: writable("teacher_cache_dir", folder))
        with writing("teacher_cache_dir", folder), locked(folder):
            manifest, missing = by_first(lambda: _begun(run, teacher, folder, kind, fits))
            _fill(run, teacher, Store(folder, manifest), kind, missing)
    _say_what_is_read(run, epochs if is_text else None)
    store = Store(folder, manifest)
    return CachedTeacher(store, teacher.config, kind, None if kind.entries else store.head, epochs, method.temperature)


def _vocabulary(config: Any) -> int:
    """Return for how many tokens, or classes, a model's head has a score."""
    return len(config.id2label) if kind_of(config) == "classifier" else config.vocab_size


def _begun(run: Run, teacher: Teacher, folder: Path, kind: Kind, fits: dict[str, Any]) -> tuple[Manifest, list[int]]:
    """Return what a folder is to hold, and which shards are missing, all where it was empty; say what it will take."""
    store, config = Store.find(folder, fits), teacher.config
    lengths = valid_lengths(run.data.train, fits["epochs"])
    size = kind.bytes(config.hidden_size, _vocabulary(config), getattr(torch, fits["computed in"]))
    if store is None:
        positions = int(lengths.sum())
        shard = max(1, SHARD_BYTES * len(lengths) // max(1, positions * size))
        of = {"teacher": run.flags.teacher or "trained on the same data", "width": config.hidden_size}
        of |= {"bytes of a position": size, "fastkd": fastkd.__version__, "torch": torch.__version__}
        store = Store(folder, Manifest(fits, of, len(lengths), positions, shard, positions * size))
    manifest, missing = store.manifest, store.missing()
    needed = sum(int(lengths[list(manifest.examples_of(shard))].sum()) for shard in missing) * size
    free = shutil.disk_usage(folder).free
    left = "" if len(missing) == manifest.shards else f", of which {needed / GIB:.2f} GiB are missing"
    print(
        f"{manifest.positions:,} positions of {manifest.examples:,} examples, {size:,} bytes each: "
        f"{manifest.bytes / GIB:.2f} GiB{left}; {free / GIB:.2f} GiB are free in {folder}",
        flush=True,
    )
    if needed > free:
        raise InputError(
            f"--teacher_cache_dir {folder}: {needed / GIB:.2f} GiB do not fit into the {free / GIB:.2f} GiB that are "
            "free there: give another folder, less data or fewer --teacher_cache_epochs"
        )
    manifest.write(folder)
    return manifest, missing


@torch.no_grad()
def _fill(run: Run, teacher: Teacher, store: Store, kind: Kind, missing: list[int]) -> None:
    """Let the teacher compute the shards that are missing, each process its share; and keep its head.

    Batches are as large as in training, also where they have to be filled up, and examples of like length share one:
    by how many rows it computes a product, a processor may choose another order of additions.
    """
    data, batch = run.data, run.args.train_batch_size
    trainer = make_trainer(run, teacher.model, "teacher", method=METHODS["scratch"])
    model: Any = trainer.model
    model.eval()
    head = head_of(model)
    if is_first() and kind.name == "hidden" and store.head is None:
        store.write_head(head)
    dtype, each = getattr(torch, store.manifest.fits["computed in"]), store.manifest.examples_per_shard
    mine, turns = own_part(missing), -(-len(missing) // count())
    own = sum(len(store.manifest.examples_of(shard)) for shard in mine)
    shown = not is_first() or run.args.disable_tqdm
    bar = tqdm(total=own, desc=f"the teacher's {kind}", unit="example", disable=shown, mininterval=1)
    for turn in range(turns):
        shard = (mine or missing)[min(turn, max(len(mine) - 1, 0))]
        items = {number: data.train[number] for number in store.manifest.examples_of(shard)}
        numbers = sorted(items, key=lambda number: len(items[number]["input_ids"]))
        found: dict[int, Columns] = {}
        # A teacher that is sharded needs all processes for each of its batches.
        for start in range(0, each if is_sharded(model) else len(numbers), batch):
            some = numbers[start : start + batch]
            inputs = data.collate([items[number] for number in islice(chain(some, cycle(numbers)), batch)])
            valid = aligned_labels(trainer.kind, inputs) != IGNORED
            with trainer.accelerator.autocast():
                states = forward(model, trainer._prepare_inputs(inputs), Needs())["hidden"][0]
            states = states.to(dtype) if kind.name == "hidden" else states
            given = [row[mask.to(row.device)] for row, mask in zip(states, valid, strict=True)][: len(some)]
            seeds = [(run.seed, number) for number in some]
            found |= zip(some, kind.keep(given, head, run.flags.objective.temperature, seeds), strict=True)
            bar.update(len(some) if turn < len(mine) else 0)
        if turn < len(mine):
            kept = [found[number] for number in items]
            lengths = np.array([len(next(iter(columns.values()))) for columns in kept])
            store.write(shard, {name: torch.cat([columns[name] for columns in kept]) for name in kept[0]}, lengths)
    bar.close()
    of_all(None)  # have written theirs


def _say_what_is_read(run: Run, epochs: int | None) -> None:
    """Print how often the run reads what is kept; epochs: of corruptions, None for what no epoch changes."""
    args, examples = run.args, len(run.data.train)
    passes = args.max_steps * examples_per_step(args) / examples if args.max_steps > 0 else args.num_train_epochs
    if epochs is not None and passes > epochs:
        print(
            f"the corruption of epoch {epochs + 1} is that of the first again: --teacher_cache_epochs "
            f"{math.ceil(passes)} keeps one for each epoch of this run"
        )
    if passes < (epochs or 1):
        print(f"this run reads {passes / (epochs or 1):.0%} of it")
