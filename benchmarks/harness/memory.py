"""Peak memory: what a run took beyond its inputs and what it returns, in units of 2**20 bytes."""

from __future__ import annotations

import ctypes
import gc
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.problem import Run

MIB = 2**20


def _status_bytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def peak_memory(run: Run, device: torch.device) -> tuple[tuple[Tensor, ...], float | None]:
    """What a run returns, and the most it held beside that, in MiB; None where the system does not tell.

    A GPU's allocator counts. On Linux the process's high-water mark of resident memory is reset, after memory that
    earlier runs freed went back to the system. Call it after a warm-up, so that code and library buffers are there.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    elif os.access("/proc/self/clear_refs", os.W_OK):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        outputs = run()
        peak = _status_bytes("VmHWM") - before
    else:
        return run(), None
    return outputs, max(0, peak - sum(x.nbytes for x in outputs)) / MIB


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
