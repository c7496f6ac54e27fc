"""Makes what can be carried to a machine with a GPU that can download nothing, as far as it can be had here.

- wheels of the peers that are pure Python;
- Triton's binaries of the kernels that are checked and timed, as the Triton that is there would find them;
- the extension with machine code for one kind of GPU, which needs nvcc here, though no torch with CUDA: its libraries
  are named in it and found in the process that loads it.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from benchmarks import ROOT
from benchmarks.device.carried import CACHE, EXTENSION
from benchmarks.device.phases import Skipped
from benchmarks.device.pool import Worker, answers

PEERS = ("liger-kernel==0.8.5", "orda-kernel==0.1.0")
GPU = "90"  # H100 and H200
TRITON = "triton==3.6.0"  # what is there, for Python 3.12
TRITON_FILES = ROOT / "build" / "triton"
AHEAD_S, CASE_S = 1800, 300
MOST_BINARIES = 40 * 2**20  # bytes
MOST = 64 * 2**20  # bytes of all of it
TORCH_LIBRARIES = ("c10", "torch", "torch_cpu", "torch_cuda")


def _downloaded(target: Path, package: str, *options: str) -> None:
    download = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:")
    _run(*download, *options, "-d", target, package)


def _run(*command: str | Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        raise Skipped((errors or lines or [f"exit code {done.returncode}"])[0][:300])
    return done.stdout


def wheels(folder: Path) -> str:
    target = folder / "wheels"
    for peer in PEERS:
        _downloaded(target, peer, "--python-version", "3.12", "--platform", "any")
    return ", ".join(sorted(path.name for path in target.glob("*.whl")))


def binaries(folder: Path) -> str:
    """A process for each core compiles; what is not right costs time there, and no more."""
    there, here = TRITON_FILES / "there", TRITON_FILES / "here"
    platforms = ("--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_27_x86_64")
    for files, options in ((there, ("--python-version", "3.12", *platforms)), (here, ())):
        if not (files / "triton").is_dir():
            _downloaded(files, TRITON, *options)
            for wheel in files.glob("*.whl"):
                zipfile.ZipFile(wheel).extractall(files)
                wheel.unlink()
    for tool in here.glob("triton/backends/nvidia/bin/*"):  # which zipfile forgets
        tool.chmod(0o755)
    shutil.rmtree(CACHE, ignore_errors=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(here), os.environ.get("PYTHONPATH")])),
        "TRITON_CACHE_DIR": str(CACHE),
        "TRITON_STORE_BINARY_ONLY": "1",
        "TRITON_INTERPRET": "0",
        "FASTKD_TRITON_THERE": str(there),
    }
    command = [sys.executable, "-m", "benchmarks.device.ahead"]
    found = _run(*command, "--list", environment=environment).split("\n")
    seen = []
    for answer in answers(
        [name for name in found if name],
        lambda: Worker(command, environment),
        os.cpu_count() or 1,
        CASE_S,
        time.monotonic() + AHEAD_S,
    ):
        said = answer["problem"] or f"{answer['misses']} compiled, {answer['hits']} there"
        print(f"  {answer['case']}: {said}", flush=True)
        seen.append(answer)
    shutil.rmtree(folder / "triton", ignore_errors=True)
    left, made = MOST_BINARIES, 0
    for binary in sorted(CACHE.glob("*/*.cubin"), key=lambda path: path.stat().st_mtime):  # most needed first
        needed = [path for path in binary.parent.iterdir() if path.suffix in (".cubin", ".json")]
        left -= sum(path.stat().st_size for path in needed)
        if left < 0:
            break
        made += 1
        target = folder / "triton" / binary.parent.name
        target.mkdir(parents=True)
        for path in needed:
            shutil.copy2(path, target)
    wrong = sum(answer["problem"] is not None for answer in seen)
    return f"{made} of {TRITON}, of {len(seen) - wrong} of {len(found) - 1} calls"


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


PARTS: tuple[Callable[[Path], str], ...] = (wheels, extension, binaries)


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
