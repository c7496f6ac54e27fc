"""Compiles kernels/softcap.py for GPUs that need not be here, and tells what its binaries use of them."""

from __future__ import annotations

import triton
from triton.compiler import ASTSource

from fastkd.kernels import softcap

from .common import TARGETS, resources


def measure(case: tuple[str, str, bool]) -> dict:
    """Compiles one case: (target, dtype, with slope), for contiguous, aligned rows."""
    target, dtype, sloped = case
    types = {"scores": f"*{dtype}", "capped": f"*{dtype}", "slope": f"*{dtype}" if sloped else "constexpr"}
    types |= dict.fromkeys(("columns", "scores_row", "capped_row", "slope_row"), "i32") | {"cap": "fp64"}
    constants = {"BLOCK": softcap.BLOCK} | ({} if sloped else {"slope": None})
    kernel = softcap.softcap_kernel
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] in "*i"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=TARGETS[target], options={"num_warps": 4})
    return {"pass": f"{dtype}{' with slope' if sloped else ''}", "target": target, **resources(target, compiled)}
