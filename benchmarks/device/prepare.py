"""Makes what can be carried to a machine with a GPU that can download nothing, as far as it can be had here.

- wheels of the peers that are pure Python;
- the extension with machine code for one kind of GPU, which needs nvcc here, though no torch with CUDA: its libraries
  are named in it and found in the process that loads it.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from benchmarks import ROOT
from benchmarks.device.carried import EXTENSION
from benchmarks.device.phases import Skipped

PEERS = ("liger-kernel==0.8.5", "orda-kernel==0.1.0")
GPU = "90"  # H100 and H200
MOST = 64 * 2**20  # bytes of all of it
TORCH_LIBRARIES = ("c10", "torch", "torch_cpu", "torch_cuda")


def _run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        raise Skipped((errors or lines or [f"exit code {done.returncode}"])[0][:300])
    return done.stdout


def wheels(folder: Path) -> str:
    target = folder / "wheels"
    for peer in PEERS:
        options = ("--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--platform", "any", "-d", target)
        _run(sys.executable, "-m", "pip", "download", "-q", *options, peer)
    return ", ".join(sorted(path.name for path in target.glob("*.whl")))


def _setup() -> dict:
    """What setup.py would compile with."""
    with (
        mock.patch("setuptools.setup"),
        mock.patch.dict(os.environ, FASTKD_BUILD="none", FASTKD_ARCHITECTURES=GPU),
    ):
        return runpy.run_path(str(ROOT / "setup.py"))


def extension(folder: Path) -> str:
    """As setup.py builds it, but for torch's libraries, in whose places it is linked to empty ones of their names."""
    from torch.utils import cpp_extension

    setup = _setup()
    toolkit = setup["dry_run_of_nvcc"]()
    if "#$ TOP=" not in toolkit:
        raise Skipped("nvcc is not on the PATH")
    cuda = Path(os.path.realpath(toolkit.split("#$ TOP=")[1].splitlines()[0]))
    paths = [*cpp_extension.include_paths(), sysconfig.get_path("include"), cuda / "include"]
    common = [*(f"-I{path}" for path in paths), setup["STABLE_ABI"], "-DPy_LIMITED_API=0x030a0000"]
    common += ["-DTORCH_EXTENSION_NAME=_C"]
    sources = [ROOT / "csrc" / "module.cpp", *sorted(ROOT.glob("csrc/cpu/*.cpp")), *sorted(ROOT.glob("csrc/cuda/*.cu"))]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)

        def compiled(source: Path) -> Path:
            target = scratch / f"{source.stem}-{source.suffix[1:]}.o"
            if source.suffix == ".cu":
                _run("nvcc", *setup["NVCC_FLAGS"], "-Xcompiler", "-fPIC", *common, "-c", source, "-o", target)
            else:
                _run("g++", "-fPIC", *setup["CXX_FLAGS"], *common, "-c", source, "-o", target)
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, reversed(sources)))  # nvcc takes longest
        for library in TORCH_LIBRARIES:
            file = f"lib{library}.so"
            _run("g++", "-shared", "-x", "c++", os.devnull, f"-Wl,-soname,{file}", "-o", scratch / file)
        libraries = [f"-l{library}" for library in TORCH_LIBRARIES]
        toolkit_libraries = next(path for path in (cuda / "lib64", cuda / "lib") if path.is_dir())
        _run(
            "g++", "-shared", "-s", *objects, f"-L{scratch}", "-Wl,--no-as-needed", *libraries,
            f"-L{toolkit_libraries}", "-lcudart_static", "-lrt", "-lpthread", "-ldl", "-o", folder / EXTENSION,
        )  # fmt: skip
    return f"{EXTENSION} for sm_{GPU}"


PARTS: tuple[Callable[[Path], str], ...] = (wheels, extension)


def prepare(folder: Path) -> int:
    """0 where all of it could be made; what could not is said."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lacking = 0
    for part in PARTS:
        begin = time.monotonic()
        try:
            said = part(folder)
        except (Skipped, OSError) as why:
            lacking, said = lacking + 1, f"could not be had: {why}"
        print(f"{part.__name__:<10} {said} ({time.monotonic() - begin:.0f} s)", flush=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB" + (f", more than {MOST >> 20}" if size > MOST else ""))
    return 1 if lacking or size > MOST else 0
