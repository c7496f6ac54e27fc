"""``python -m fastkd.doctor``: what is active on this machine, what is not, and why.

Exit code 0 where the losses run on kernels, 1 where they fall back to the reference.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Sequence

import torch

from . import __version__
from .backend import EXTENSION_PROBLEM, TRITON_PROBLEM, backend_for
from .ops.drivers.divergence_rows import cuda_rows_problem
from .versions import Package, missing, packages

PARTNERS = ("trl", "liger", "peft")  # the extras of packages that fastkd works with; transformers is of "train"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_path() -> str:
    """The clone of the CPU kernels that the loader picks: by instruction set, as csrc/cpu lists them."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": "AVX-512", "AVX2": "AVX2"}.get(capability, "baseline instructions")


def report() -> list[tuple[str, str]]:
    """(what, how it is) line by line."""
    lines = [
        ("fastkd", __version__),
        ("python", f"{platform.python_version()} on {platform.machine()} {platform.system()}"),
        ("CPU threads", str(torch.get_num_threads())),
    ]
    lines.append(("CPU kernels", EXTENSION_PROBLEM or f"active, {_cpu_path()}"))
    lines.append(("Triton kernels", TRITON_PROBLEM or f"importable, triton {_version('triton')}"))
    lines.append(("CUDA C++ kernels", cuda_rows_problem() or "built for sm_80 and sm_90; newer GPUs compile them anew"))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            lines.append((f"GPU {index}", torch.cuda.get_device_name(index)))
    else:
        lines.append(("GPU", "none visible to torch"))
    for device in _devices():
        kernels, why = backend_for(device)
        lines.append((f'impl="auto" on {device.type}', kernels or f"reference, because {why}"))
    needed = packages("train")
    lines += [(package.name, str(package)) for package in needed]
    lines.append(("fastkd-train", _trainer(needed)))
    known = {name for name, _ in lines}
    lines += [(one.name, str(one)) for extra in PARTNERS for one in packages(extra) if one.name not in known]
    return lines


def _trainer(needed: Sequence[Package]) -> str:
    if not needed:
        return "unknown: fastkd is not installed, as pip install 'fastkd[train]' does"
    if lacking := missing(needed):
        return f"not usable: pip install 'fastkd[train]' (missing: {', '.join(lacking)})"
    return "usable" if all(package.in_range for package in needed) else "usable, but not tested with these versions"


def _devices() -> list[torch.device]:
    names = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [torch.device(name) for name in names]


def main() -> int:
    lines = report()
    width = max(len(name) for name, _ in lines)
    for name, state in lines:
        print(f"{name:<{width}}  {state}")
    return 0 if all(backend_for(device)[0] for device in _devices()) else 1


if __name__ == "__main__":
    sys.exit(main())
