"""csrc/cuda compiled for CPU tensors, with device.h of this folder in place of a GPU."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
COMMAND = ["-x", "c++", "-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
DEFINES = ["-DFASTKD_EMULATED", "-DTORCH_TARGET_VERSION=0x020b000000000000"]


@functools.cache
def load() -> ctypes.CDLL:
    """Registers torch.ops.fastkd.divergence_rows_cuda for CPU tensors; built once for the sources as they are."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    sources = sorted([*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*"), *Path(__file__).parent.glob("*.h")])
    text = "".join([torch.__version__, compiler, *COMMAND, *(path.read_text() for path in sources)])
    library = ROOT / "build" / f"emulated-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # another process may be building it, too
            target = Path(folder) / library.name
            includes = [f"-I{path}" for path in (ROOT / "tests", *cpp_extension.include_paths())]
            libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
            unit = str(ROOT / "csrc" / "cuda" / "divergence_rows.cu")
            command = [compiler, *COMMAND, *DEFINES, *includes, unit, "-x", "none", *libraries, "-o", str(target)]
            subprocess.run(command, check=True)
            target.replace(library)
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))
