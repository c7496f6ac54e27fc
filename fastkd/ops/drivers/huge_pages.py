"""Large pages of memory for what an op is about to write."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backend import EXTENSION_PROBLEM

__all__ = ["in_huge_pages"]

_library = torch.library.Library("fastkd", "FRAGMENT")
_library.define("advise_huge_pages_(Tensor(a!) x) -> ()")
torch.library.register_fake("fastkd::advise_huge_pages_", lambda x: None, lib=_library)


def in_huge_pages(x: Tensor) -> Tensor:
    """x, a fresh tensor. On Linux its memory then comes in pages of 2 MB, not in a page fault for every 4 KB."""
    if x.device.type == "cpu" and EXTENSION_PROBLEM is None:
        torch.ops.fastkd.advise_huge_pages_(x)
    return x
