"""A folder of what a teacher said of numbered examples: shards that are whole or absent, and mapped, not read.

It holds cache.json, which says to people and to later runs what it is of; head.safetensors, the teacher's head; and
00000.safetensors and so on, each of as many examples, in the order of their numbers: what was said of each valid
position of theirs, one after the other, and under "ends" where each example ends. A file has its name only when it is
complete, so that a writer that is killed loses the shard under way, and another goes on behind the last.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ...heads import Head
from ..common.cache import lock_folder, write_whole
from ..common.errors import InputError
from ..common.processes import by_first, is_first

MANIFEST, HEAD, ENDS = "cache.json", "head.safetensors", "ends"
SHARD_BYTES = 1 << 26
MAPPED = 256  # shards at a time


@dataclass(frozen=True)
class Manifest:
    """What a folder holds, as cache.json says it.

    fits: what a run must have, too, to read it, by names that people understand. of: where that came from, which may
    change. examples, positions: how many, in all epochs. examples_per_shard: but for the last. bytes: of all shards.
    """

    fits: Mapping[str, Any]
    of: Mapping[str, Any]
    examples: int
    positions: int
    examples_per_shard: int
    bytes: int

    @property
    def shards(self) -> int:
        """How many there are once all are written."""
        return -(-self.examples // self.examples_per_shard)

    def examples_of(self, shard: int) -> range:
        """Return the numbers of a shard's examples."""
        start = shard * self.examples_per_shard
        return range(start, min(start + self.examples_per_shard, self.examples))

    def write(self, folder: Path) -> None:
        """Write it into a folder, of which no shard need be there yet."""
        write_whole(folder / MANIFEST, json.dumps(asdict(self), indent=2) + "\n")


class Store:
    """The shards of a folder, whose manifest is there."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self._shard = functools.lru_cache(MAPPED)(self._mapped)

    @classmethod
    def find(cls, folder: Path, fits: Mapping[str, Any]) -> Store | None:
        """Return what a folder holds, or None if it is empty or not there.

        Raises InputError, saying what differs, if it does not fit, or holds something else.
        """
        try:
            written = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            manifest = Manifest(**{name: written[name] for name in Manifest.__dataclass_fields__})
        except FileNotFoundError as error:
            if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
                raise InputError(
                    f"--teacher_cache_dir {folder} holds files, and no {MANIFEST} among them: expected a cache, or a "
                    "name for a new one"
                ) from error
            return None
        except NotADirectoryError as error:
            raise InputError(f"--teacher_cache_dir {folder}: expected a folder, or a name for a new one") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--teacher_cache_dir {folder}: its {MANIFEST} is none that this version wrote: remove the folder, or "
                "give another"
            ) from error
        has = [(name, manifest.fits.get(name), fits.get(name)) for name in sorted({*manifest.fits, *fits})]
        if differs := [f"{name}: it has {its}, the run {ours}" for name, its, ours in has if its != ours]:
            raise InputError(
                f"--teacher_cache_dir {folder} is of another run and does not fit ({'; '.join(differs)}): give another "
                "folder, or none, for one beside the data's cache that fits"
            )
        return cls(folder, manifest)

    def missing(self) -> list[int]:
        """Return the shards that are not there, or not whole as somebody cut them off."""
        return [shard for shard in range(self.manifest.shards) if not _is_whole(self._path(shard))]

    @property
    def head(self) -> Head | None:
        """The teacher's head, mapped; None where it is not there. Those of older versions are a weight and no more."""
        if not _is_whole(self.folder / HEAD):
            return None
        kept = _tensors(self.folder / HEAD)
        cap = kept.get("softcap")
        return Head(kept["weight"], kept.get("bias"), softcap=None if cap is None else float(cap))

    def write_head(self, head: Head) -> None:
        """Keep the teacher's head, with what follows it."""
        cap = None if head.softcap is None else torch.tensor(head.softcap, dtype=torch.float64)
        kept: dict[str, Any] = {"weight": head.weight, "bias": head.bias, "softcap": cap}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in kept.items() if tensor is not None}
        write_whole(self.folder / HEAD, save(tensors))

    def write(self, shard: int, columns: Mapping[str, torch.Tensor], lengths: np.ndarray) -> None:
        """Keep what was said of the positions of a shard's examples, [positions, ...] in order; lengths: of each."""
        write_whole(self._path(shard), save({**columns, ENDS: torch.from_numpy(np.cumsum(lengths))}))

    def read(self, example: int) -> dict[str, torch.Tensor]:
        """Return what was said of an example's positions, [positions, ...] in memory that is mapped."""
        shard, i = divmod(example, self.manifest.examples_per_shard)
        columns, ends = self._shard(shard)
        start, end = ends[i - 1] if i else 0, ends[i]
        return {name: tensor[start:end] for name, tensor in columns.items()}

    def _mapped(self, shard: int) -> tuple[dict[str, torch.Tensor], list[int]]:
        columns = _tensors(self._path(shard))
        return columns, columns.pop(ENDS).tolist()

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05}.safetensors"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let no other run write to a folder, made if need be; wait for one that does."""
    lock = by_first(lambda: _lock(folder))
    try:
        yield
    finally:
        if is_first():
            os.close(lock)


def _lock(folder: Path) -> int:
    try:
        return lock_folder(folder)
    except BlockingIOError:
        print(f"waiting for another run that writes to {folder}", flush=True)
        return lock_folder(folder, wait=True)


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):  # which reads its head, and whether it is as long as that says
            return True
    except (OSError, SafetensorError):
        return False


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return a file's tensors, which are mapped: no more of them is read than is looked at."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
