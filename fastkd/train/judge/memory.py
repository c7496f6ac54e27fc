"""What is alive while code runs: storages, from the operator that makes them to the last that holds them.

Also in a training step on fake tensors, which computes nothing, but makes and lets go of what another would.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastkd.ops.drivers.cka_loss_torch import WORKSPACE as CKA_WORKSPACE

FLOAT = 4  # bytes, of scores


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, while they live.

    item: what those that are made next are counted as. held: bytes of each item. peak: the most in all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.item, self.peak = "", 0
        self.held: Counter[str] = Counter()
        self._items: dict[int, str] = {}  # torch keeps a storage's Python object, and so its id, as long as the storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count the storages among its results that are no views of others."""
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in self._items:
                self.count(tensor, self.item)
        return results

    def count(self, tensor: torch.Tensor, item: str) -> None:
        """Count a tensor's storage as an item from now on."""
        storage = tensor.untyped_storage()
        identity, size = id(storage), storage.nbytes()
        if identity in self._items:
            self._forget(identity, size)
        else:
            weakref.finalize(storage, self._forget, identity, size)
        self._items[identity] = item
        self.held[item] += size
        self.look()

    def look(self) -> None:
        """See how much there is."""
        self.peak = max(self.peak, self.held.total())

    def _forget(self, identity: int, size: int) -> None:
        self.held[self._items.pop(identity)] -= size


class LiveStep(LiveTensors):
    """Keeps in `moments` what was alive at each moment of a step, when it was most.

    workspace: of linear_kl, in bytes. on_cpu: whether the step is a CPU's, or a GPU's.
    """

    def __init__(self, workspace: int, on_cpu: bool):
        super().__init__()
        self.workspace, self.on_cpu = workspace, on_cpu
        self.moment = ""
        self.moments: dict[str, dict[str, float]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator as it would run on tensors that are not fake."""
        aten = torch.ops.aten
        if func is aten.add.Tensor and self.moment == "backward" and not torch.is_grad_enabled():
            if isinstance(args[1], torch.Tensor) and args[0].shape == args[1].shape and args[0].dtype == args[1].dtype:
                func = aten.add_.Tensor  # autograd sums up in place, but not what is of a subclass, as fake tensors are
        elif func is aten.index.Tensor and getattr(args[1][0], "dtype", None) == torch.bool:
            # How many are taken is not known without numbers: all.
            func, args = aten.clone.default, (args[0].flatten(0, args[1][0].dim() - 1),)
        results = super().__torch_dispatch__(func, types, args, kwargs)
        namespace, _, op = func.name().partition("::")
        if namespace == "fastkd":
            self.look(_working(op, args, self.workspace, self.on_cpu))
        return results

    def look(self, working: int = 0) -> None:
        """Keep what is alive, if it is more than before. working: bytes inside an op, of its loss."""
        known = self.moments.setdefault(self.moment, {})
        if not known or self.held.total() + working > sum(known.values()):
            known.update({**self.held, "loss": self.held["loss"] + working})

    def at(self, moment: str, item: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, which runs at that moment, and makes that item."""

        def run(*args: Any, **kwargs: Any) -> Any:
            before = self.moment, self.item
            self.moment, self.item = moment, item
            try:
                self.look()
                return function(*args, **kwargs)
            finally:
                self.moment, self.item = before

        return run


def _working(op: str, args: Sequence[Any], workspace: int, on_cpu: bool) -> int:
    """Return the bytes that one of fastkd's ops works in, beside its results."""
    if op == "linear_kl":
        return _of_linear_kl(args[0].shape[0], args[1], 1 if args[4] is None else 2, workspace, on_cpu)
    if op not in ("cka_loss", "cka_loss_backward"):
        return 0  # relation_kl works in a few rows
    pairs = []
    for mine, its in zip(args[0], args[1], strict=True):
        tokens, widths = mine.shape[0], mine.shape[1] + its.shape[1]
        by_grams = tokens < widths  # which of the products are the smaller
        forward = 2 * tokens**2 if by_grams else widths**2
        factor = tokens**2 if by_grams else widths * mine.shape[1]
        pairs.append(min(tokens * widths, CKA_WORKSPACE) + (forward if op == "cka_loss" else factor))
    return FLOAT * max(pairs)


def _of_linear_kl(tokens: int, weight: torch.Tensor, models: int, workspace: int, on_cpu: bool) -> int:
    """Return the bytes of scores, of their gradients, and of the weight's gradient as it adds up in fp32."""
    score_row, narrow_row, wide = FLOAT * len(weight) * models, weight.itemsize * len(weight), FLOAT * weight.numel()
    at_once = min(max(1, workspace // score_row), tokens)
    if weight.itemsize == FLOAT:
        return at_once * (score_row + FLOAT * weight.shape[1])
    if on_cpu:
        return at_once * score_row + wide
    if tokens * narrow_row <= wide:  # a GPU keeps the gradients of all tokens' scores instead, where they take less
        return at_once * score_row + tokens * narrow_row
    in_one = tokens * (score_row + narrow_row)
    return in_one if in_one <= workspace else workspace + wide


class GpuAutocast(TorchFunctionMode):
    """On a GPU autocast takes powers in fp32, and on a CPU it does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function."""
        if func is torch.pow and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))
