"""What is here and how fast: versions, limits; compute-sanitizer and the tests, which watch kernels run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import ROOT
from benchmarks.device.phases import Here, Skipped
from benchmarks.harness import limits as best
from benchmarks.harness.machine import machine

# By their names: what runs kernels, and neither compiles for other GPUs nor tests this.
TESTS = "(gpu or triton or cuda or tuning) and not compile_gpu and not gpu_count and not benchmarks and not device"
# Libraries ask the driver for functions that it may lack: no error of ours. Triton's own copies are its own affair.
SANITIZERS = {
    "memcheck": ("--report-api-errors", "no"),
    "racecheck": ("--kernel-name", "kernel_substring=rows_kernel"),
}


def _said_by(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def versions(here: Here) -> bool:
    """Wrong where a GPU is not given kernels."""
    from fastkd import doctor
    from fastkd.backend import backend_for

    host = machine()
    nvcc = re.search(r"release ([\d.]+)", _said_by("nvcc", "--version") or "")
    driver = _said_by("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader")
    cache = Path(os.environ.get("TRITON_CACHE_DIR", ""))
    more = {"nvcc": nvcc and nvcc[1], "driver": driver, "cached": len(list(cache.glob("*/*.cubin")))}
    here.lines.write("machine", machine=host, device="cpu" if here.rehearsed else "cuda", **more)
    for name, state in [*doctor.report(), *((name, str(value)) for name, value in more.items())]:
        print(f"{name:<20} {state}")
    return here.rehearsed or backend_for(torch.device("cuda"))[0] == "triton"


def limits(here: Here) -> bool:
    device = torch.device("cpu" if here.rehearsed else "cuda")
    for limit in best.measure(device, 1e-5 if here.rehearsed else 1.0):
        here.lines.write("limit", **limit)
        rate = limit["note"] if limit["rate"] is None else f"{limit['rate']:.0f} {limit['unit']}"
        print(f"{limit['limit']:<14} {rate}")
    return True


def sanitize(here: Here) -> bool:
    """Both tools at once: their time is that of starting Python."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    calls = [sys.executable, "-m", "tests.sanitize", "--divergences", "forward_kl", "jsd", "--dtypes", "bfloat16"]
    calls += ["--ops", "logit_kl"]
    if here.rehearsed:
        return subprocess.run(calls, cwd=ROOT).returncode == 0
    if tool is None:
        raise Skipped("compute-sanitizer is not installed")
    code = subprocess.run(calls, cwd=ROOT).returncode  # compiles, so that what follows need not
    if code:
        return False
    running = {
        name: subprocess.Popen(
            [tool, "--tool", name, *options, "--error-exitcode", "9", "--print-limit", "20", *calls],
            cwd=ROOT,
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        for name, options in SANITIZERS.items()
    }
    well = True
    for name, process in running.items():
        begin = time.monotonic()
        code = process.wait()
        here.lines.write("check", case=name, problem=None if code == 0 else f"exit code {code}")
        print(f"{name}: exit code {code} after {time.monotonic() - begin:.0f} s")
        well &= code == 0
    return well


def tests(here: Here) -> bool:
    if here.rehearsed:
        raise Skipped("`make test` runs these without a GPU")
    files = sorted(ROOT.glob("tests/test_*.py"), key=lambda path: path.stem != "test_gpu")  # this one first
    command = [sys.executable, "-m", "pytest", "-k", TESTS, "--maxfail", "20", "--tb", "short", "-rfE"]
    command += ["-n", str(min(16, os.cpu_count() or 1)), "--dist", "worksteal", "-p", "no:cacheprovider"]
    return subprocess.run([*command, *map(str, files)], cwd=ROOT).returncode == 0
