"""Builds the compiled extension fastkd/_C; everything else about the package is in pyproject.toml.

FASTKD_BUILD says what to build:
  auto  the CPU kernels always, the CUDA kernels where nvcc and a CUDA torch are present (default)
  cpu   the CPU kernels
  cuda  the CPU and CUDA kernels
  none  nothing: a pure-Python install, which works, on the reference implementations and Triton

FASTKD_ARCHITECTURES names the GPUs to compile for instead, as "90" or "80 90".
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

MODES = ("auto", "none", "cpu", "cuda")
CXX_FLAGS = ["-O2", "-std=c++20", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
CXX_FLAGS += ["-g0"]  # over the -g of Python's own flags, whose notes for debuggers are most of the file
# Machine code for A100 and for H100/H200, whose blocks form clusters; from the last one's PTX, drivers make the rest.
*FIRST, LAST = os.environ.get("FASTKD_ARCHITECTURES", "80 90").split()
ARCHITECTURES = [f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in FIRST]
ARCHITECTURES += [f"-gencode=arch=compute_{LAST},code=[sm_{LAST},compute_{LAST}]"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-DUSE_CUDA", "--threads=2", "--split-compile=0", *ARCHITECTURES]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11
PYTHON_ABI = "cp310"


def build_mode() -> str:
    mode = os.environ.get("FASTKD_BUILD", "auto")
    if mode not in MODES:
        sys.exit(f"FASTKD_BUILD: expected one of {', '.join(MODES)}, got {mode!r}")
    return mode


def dry_run_of_nvcc() -> str:
    """What nvcc would do, which names the folder of its toolkit and its version; nothing where there is none."""
    if shutil.which("nvcc") is None:
        return ""
    command = ["nvcc", "--dryrun", "-x", "cu", "-c", os.devnull]
    return subprocess.run(command, capture_output=True, text=True).stderr


def cuda_problem(torch) -> str | None:
    """Why the CUDA kernels cannot be built, or None. Tells torch where the toolkit is: nvcc may be a link to it."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not built for CUDA"
    said = dry_run_of_nvcc()
    folder = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    version = re.search(r"__CUDACC_VER_MAJOR__=(\d+)", said)
    if folder is None or version is None:
        return "nvcc is not on the PATH"
    if version[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {version[1]}, and torch of {torch.version.cuda}"
    os.environ.setdefault("CUDA_HOME", os.path.realpath(folder[1]))
    return None


def side_by_side(command: type) -> type:
    """The build_ext command with compilers running on every core, where setuptools starts one after the other."""

    class BuildSideBySide(command):
        def build_extensions(self) -> None:
            compiler, compile_in_turn, runs = self.compiler, self.compiler.compile, []

            def start(*args) -> None:
                as_set = copy.copy(compiler)  # torch sets its command for one source, and back
                runs.append(pool.submit(type(compiler)._compile, as_set, *args))

            def compile_all(*args, **options) -> list[str]:
                objects = compile_in_turn(*args, **options)
                for run in runs:
                    run.result()
                return objects

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                compiler._compile, compiler.compile = start, compile_all  # unless torch puts ninja in their place
                super().build_extensions()

    return BuildSideBySide


def extension_options(mode: str) -> dict:
    if mode == "none":
        return {}
    try:
        import torch

        problem = cuda_problem(torch)
        from torch.utils import cpp_extension  # reads CUDA_HOME
    except ImportError:
        if mode != "auto":
            sys.exit(f"FASTKD_BUILD={mode} needs torch at build time: install torch, then use --no-build-isolation")
        print("fastkd: no torch at build time, so no compiled kernels; install torch, then use --no-build-isolation")
        return {}

    if mode == "cuda" and problem:
        sys.exit(f"FASTKD_BUILD=cuda needs nvcc and a torch built for the same CUDA: {problem}")
    if mode == "auto" and problem:
        print(f"fastkd: no CUDA kernels, because {problem}; GPUs use those in Triton")
    with_cuda = mode != "cpu" and problem is None
    cuda_sources = sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))

    extension = (cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension)(
        "fastkd._C",
        ["csrc/module.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))]
        + (cuda_sources if with_cuda else []),
        depends=[str(path) for path in Path("csrc").rglob("*.h")],
        py_limited_api=True,
        extra_compile_args={"cxx": [*CXX_FLAGS, STABLE_ABI], "nvcc": [*NVCC_FLAGS, STABLE_ABI]},
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": side_by_side(cpp_extension.BuildExtension.with_options(use_ninja=with_cuda))},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON_ABI}},
    }


setup(**extension_options(build_mode()))
