"""What a device does at best, measured beside everything else: a copy, matrix products, exponentials.

Ops are judged by them. On a GPU, attention's scores need not go through memory, so that its tensor cores and its
exponential units are what is left to wait for. Numbers are random: products of zeros run faster.
"""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor

from benchmarks.harness.problem import Run, Unavailable, noted, on_gpu
from benchmarks.harness.timing import in_turns

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BLOCK = 1024  # exponentials in flight in a program of four warps


def copy(size: int, device: torch.device) -> Run:
    """Copies this many bytes."""
    return copy_of(torch.randint(0, 255, (size,), dtype=torch.uint8, device=device))


def copy_of(source: Tensor) -> Run:
    target = torch.zeros_like(source)

    def run() -> tuple[Tensor, ...]:
        target.copy_(source)
        return ()

    return run


def product(flops: float, dtype: torch.dtype, device: torch.device, tf32: bool = False) -> Run:
    """A product of two matrices of about this many FLOPs, as near to square as a power of two comes."""
    side = max(16, 2 ** round(math.log2(flops / 2) / 3))
    inner = max(16, round(flops / (2 * side * side) / 16) * 16)
    a, b = torch.randn(side, inner, device=device).to(dtype), torch.randn(side, inner, device=device).to(dtype)
    out = torch.zeros(side, side, dtype=dtype, device=device)

    def run() -> tuple[Tensor, ...]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            torch.mm(a, b.t(), out=out)
        finally:
            torch.set_float32_matmul_precision(before)
        return ()

    return run


if triton is not None:

    @triton.jit
    def exponentials_kernel(x, steps, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + i)
        for _ in range(steps):
            value = tl.exp2(value) - 2
        tl.store(x + i, value)


def exponentials(count: float, device: torch.device) -> Run:
    """About this many exponentials in fp32, of numbers in registers."""
    on_gpu(device)
    if triton is None:
        raise Unavailable("needs Triton")
    programs = 16 * torch.cuda.get_device_properties(device).multi_processor_count
    steps = max(1, round(count / (programs * BLOCK)))
    x = -torch.rand(programs * BLOCK, device=device)

    def run() -> tuple[Tensor, ...]:
        exponentials_kernel[(programs,)](x, steps, BLOCK=BLOCK, num_warps=4)
        return ()

    return run


def roofline(flops: float, count: float, dtype: torch.dtype, device: torch.device) -> Run:
    """These FLOPs or these exponentials alone, whichever take longer here."""
    candidates = {
        "tensor cores": product(flops, dtype, device),
        "exponential units": exponentials(count, device),
    }
    samples = in_turns(candidates, 6, device)
    name = max(samples, key=lambda name: min(samples[name][1:]))
    return noted(candidates[name], name)


def measure(device: torch.device, size: float = 1.0) -> list[dict]:
    """The rates of all of them; `size` scales the work."""
    work = {
        "copy": ("GB/s", 2 * 2**30 * size, lambda w: copy(int(w / 2), device)),
        "bf16 GEMM": ("GFLOP/s", 2 * 8192**3 * size, lambda w: product(w, torch.bfloat16, device)),
        "tf32 GEMM": ("GFLOP/s", 2 * 8192**3 * size, lambda w: product(w, torch.float32, device, tf32=True)),
        "fp32 GEMM": ("GFLOP/s", 2 * 4096**3 * size, lambda w: product(w, torch.float32, device)),
        "exponentials": ("Gexp/s", 2e11 * size, lambda w: exponentials(w, device)),
    }
    runs, found = {}, []
    for name, (_, amount, make) in work.items():
        try:
            runs[name] = make(amount)
        except Unavailable as why:
            found.append({"limit": name, "unit": work[name][0], "rate": None, "note": str(why)})
    for name, samples in in_turns(runs, 12, device).items():
        unit, amount, _ = work[name]
        rate = amount / min(samples[2:]) / 1e9  # two warm up
        median = amount / statistics.median(samples[2:]) / 1e9
        found.append({"limit": name, "unit": unit, "rate": rate, "median_rate": median, "samples_s": samples})
    return found


if __name__ == "__main__":
    default = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for limit in measure(default, 1.0 if default.type == "cuda" else 1e-3):
        rate = limit["note"] if limit["rate"] is None else f"{limit['rate']:.0f} {limit['unit']}"
        print(f"{limit['limit']:<14} {rate}")
