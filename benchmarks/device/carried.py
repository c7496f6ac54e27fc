"""What is brought along to a machine that can download nothing: peers as wheels, the extension, Triton's binaries.

FOLDER/wheels/*.whl, FOLDER/_C.abi3.so and FOLDER/triton, each where it could be had (prepare.py makes them).
"""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from pathlib import Path

from benchmarks import ROOT

FOLDER = ROOT / "build" / "carried"
EXTENSION = "_C.abi3.so"
# Triton notes where its binaries are by whole paths: they serve where they were made.
CACHE = Path("/tmp/fastkd-triton-cache")
BUILD, BUILD_S = (sys.executable, "setup.py", "build_ext", "--inplace"), 150


def built_extensions() -> list[Path]:
    return sorted((ROOT / "fastkd").glob("_C*.so"))


def has_cuda(extension: Path) -> bool:
    return b".nv_fatbin" in extension.read_bytes()


def to_be_built() -> bool:
    """Whether the CUDA kernels are missing and can be compiled here."""
    return shutil.which("nvcc") is not None and not any(map(has_cuda, built_extensions()))


def unpacked(folder: Path, for_gpu: bool = True) -> tuple[list[str], dict[str, str]]:
    """Puts everything where it is looked for: (lines that say so, variables for the phases).

    Without a GPU but for the extension, which a torch without CUDA cannot load.
    """
    found = []
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja is there, often
    variables = {"PATH": path, "PYTHONUNBUFFERED": "1", "TRITON_STORE_BINARY_ONLY": "1"}
    caches = {"TRITON_CACHE_DIR": CACHE, "TORCHINDUCTOR_CACHE_DIR": ROOT / "build" / "inductor"}
    variables |= {name: str(path) for name, path in caches.items() if name not in os.environ}
    wheels = sorted((folder / "wheels").glob("*.whl"))
    if wheels:
        site = ROOT / "build" / "site"
        shutil.rmtree(site, ignore_errors=True)
        for wheel in wheels:
            zipfile.ZipFile(wheel).extractall(site)
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
        found += ["-".join(wheel.name.split("-")[:2]) for wheel in wheels]
    extension = folder / EXTENSION
    if for_gpu and extension.is_file() and not any(map(has_cuda, built_extensions())):
        shutil.copy2(extension, ROOT / "fastkd" / EXTENSION)
        found.append("the compiled extension")
    if (folder / "triton").is_dir():
        shutil.copytree(folder / "triton", CACHE, dirs_exist_ok=True)
        found.append(f"{len(list((folder / 'triton').rglob('*.cubin')))} binaries of Triton")
    return [f"carried: {', '.join(found) or f'nothing, as nothing is in {folder}'}"], variables
