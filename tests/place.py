"""A GPU, or what stands for one in a rehearsal; and calls of every op with inputs of usual size, or small ones.

T tokens, V vocabulary, B batch, L length, A heads, H hidden width, d head width, N tokens of hidden states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from .cases import ATTENTION_OPS, OPS, TOKEN_OPS, UNRELATED, Inputs, Op, placed, to

Run = Callable[[], tuple[Tensor, ...]]


class Place:
    """Where a test runs. In a rehearsal nothing is queued, captured or metered: the same code runs as it is."""

    def __init__(self, device: torch.device):
        self.device, self.real = device, device.type == "cuda"
        self.compiler = "inductor" if self.real else "aot_eager"

    def size(self, real: Any, rehearsed: Any) -> Any:
        return real if self.real else rehearsed

    def some(self, values: Sequence) -> Sequence:
        """All of them, or one in a rehearsal."""
        return self.size(values, values[:1])

    def rehearses(self, this: bool) -> None:
        """Skips a rehearsal of anything else."""
        if not self.real and not this:
            pytest.skip("other rehearsals are enough")

    def needs(self, size: int) -> None:
        """Skips the test where less memory is free."""
        free = torch.cuda.mem_get_info(self.device)[0] if self.real else size
        if free < size:
            pytest.skip(f"needs {size / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} GiB are free")

    def synchronize(self) -> None:
        if self.real:
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Whatever makes the host wait for the device raises RuntimeError."""
        self.synchronize()
        if self.real:
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if self.real:
                torch.cuda.set_sync_debug_mode("default")

    @contextlib.contextmanager
    def another_stream(self) -> Iterator[None]:
        """What is queued here starts a tenth of a second after what is queued elsewhere."""
        self.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()) if self.real else contextlib.nullcontext():
            if self.real:
                torch.cuda._sleep(200_000_000)
            yield
        self.synchronize()

    @contextlib.contextmanager
    def under_load(self) -> Iterator[None]:
        """Matrix products on another stream, all the while."""
        side, matrix = 0, torch.zeros(0)
        if self.real:
            side, matrix = torch.cuda.Stream(), torch.randn(4096, 4096, device=self.device)
        with torch.cuda.stream(side) if self.real else contextlib.nullcontext():
            for _ in range(self.size(50, 0)):
                matrix = torch.mm(matrix, matrix).clamp(-1, 1)
        yield
        self.synchronize()

    def captured(self, run: Run) -> Run:
        """The run as a CUDA graph: calling it replays what the device was told to do."""
        if not self.real:
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return outputs

        return replay

    def peak(self, run: Run) -> int:
        """The most bytes that a run held beyond its inputs and what it returns; 0 in a rehearsal."""
        self.synchronize()
        before = 0
        if self.real:
            run()  # compiles; libraries take memory for good
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        outputs = run()
        self.synchronize()
        most = torch.cuda.max_memory_allocated() if self.real else sum(x.nbytes for x in outputs)
        return most - before - sum(x.nbytes for x in outputs)


# ---- calls -----------------------------------------------------------------------------------------------------------


def value_and_gradients(op: Op, inputs: Inputs, impl: str = "fused", **options) -> tuple[Tensor, ...]:
    """The loss, and the gradients of the student's inputs. The upstream gradient does not come from the host."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in op.student if name in inputs}
    loss = op.function(**{**inputs, **leaves}, impl=impl, **options)
    return (loss.detach(), *torch.autograd.grad(loss.sum(), list(leaves.values())))


def arguments(op: Op, place: Place, dtype: torch.dtype = torch.float32) -> tuple[Inputs, dict[str, Any]]:
    """Inputs of usual size, and options that use every tensor an op takes; of an op that has another's inputs, too."""
    alike = next(other for other in OPS if other.make is op.make)
    sizes = {
        "logit_kl": {"tokens": place.size(64, 5), "vocabulary": place.size(32100, 67)},
        "linear_kl": {
            "tokens": place.size(300, 5), "vocabulary": place.size(32100, 67), "width": place.size(128, 16),
        },
        "attention_kl": {"batch": place.size(2, 1), "queries": place.size(507, 9)},
        "relation_kl": {"batch": place.size(2, 1), "queries": place.size(507, 9)},
        "cka_loss": {"tokens": place.size(507, 20)},
    }[alike.name]  # fmt: skip
    inputs, options = op.make(UNRELATED, **sizes), {}
    if alike in TOKEN_OPS:
        count, last = sizes["tokens"], sizes["vocabulary"] - 1
        labels = torch.randint(0, last, (count,))
        labels[1], labels[2] = -100, last
        weight = torch.rand(count)
        weight[3] = 0
        options = {"labels": labels, "weight": weight, "ce_weight": 0.5, "temperature": 2.0, "divergence": "jsd"}
    elif alike in ATTENTION_OPS:
        length = sizes["queries"]
        lengths = torch.tensor([[length // 2], [length]][: sizes["batch"]])
        options = {"key_mask": torch.arange(length) < lengths, "causal": True}
    else:
        options = {"mask": torch.arange(sizes["tokens"]) % 5 != 2}
    return to(inputs, dtype, place.device), placed(options, place.device)


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(left, right, strict=True))
