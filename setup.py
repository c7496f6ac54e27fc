"""Builds the compiled extension fastkd/_C; everything else about the package is in pyproject.toml.

FASTKD_BUILD says what to build:
  auto  the CPU kernels always, the CUDA kernels where nvcc and a CUDA torch are present (default)
  cpu   the CPU kernels
  cuda  the CPU and CUDA kernels
  none  nothing: a pure-Python install, which works, on the reference implementations and Triton
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

MODES = ("auto", "none", "cpu", "cuda")
CXX_FLAGS = ["-O2", "-std=c++20", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11
PYTHON_ABI = "cp310"


def build_mode() -> str:
    mode = os.environ.get("FASTKD_BUILD", "auto")
    if mode not in MODES:
        sys.exit(f"FASTKD_BUILD: expected one of {', '.join(MODES)}, got {mode!r}")
    return mode


def extension_options(mode: str) -> dict:
    if mode == "none":
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        if mode != "auto":
            sys.exit(f"FASTKD_BUILD={mode} needs torch at build time: install torch, then use --no-build-isolation")
        print("fastkd: no torch at build time, so no compiled kernels; install torch, then use --no-build-isolation")
        return {}

    cuda_sources = sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))
    cuda_ready = torch.version.cuda is not None and shutil.which("nvcc") is not None
    if mode == "cuda" and not (cuda_ready and cuda_sources):
        missing = "nvcc and a torch built for CUDA" if not cuda_ready else "CUDA sources, and this version has none yet"
        sys.exit(f"FASTKD_BUILD=cuda needs {missing}; got torch {torch.__version__}")
    with_cuda = bool(cuda_sources) and (mode == "cuda" or (mode == "auto" and cuda_ready))

    extension = (cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension)(
        "fastkd._C",
        ["csrc/module.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))]
        + (cuda_sources if with_cuda else []),
        depends=[str(path) for path in Path("csrc").rglob("*.h")],
        py_limited_api=True,
        extra_compile_args={"cxx": [*CXX_FLAGS, STABLE_ABI], "nvcc": ["-O3", "-std=c++20", STABLE_ABI]},
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=with_cuda)},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON_ABI}},
    }


setup(**extension_options(build_mode()))
