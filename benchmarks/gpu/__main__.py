"""Everything that can be told on a machine with a GPU: builds, tests, measures, draws. `make gpu` calls it.

It takes the Python that runs it, which has torch, Triton, pytest, setuptools and, for the CUDA kernels, nvcc and ninja;
nothing is downloaded. Every part is a process of its own with a time limit, and one that fails stops no other. All that
is printed is in OUT/gpu.log, too. Exit code: 0, 1 where a part failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from benchmarks import RESULTS, ROOT

BUILD = ROOT / "build"  # ignored by git
OVERLAY = BUILD / "gpu-venv"
SKIPPED = -1
# By their names: what runs kernels, and neither compiles for other GPUs nor tests this.
TESTS = "(gpu or triton or cuda or tuning) and not compile_gpu and not gpu_count and not benchmarks"
# Of a part's time, what starting Python and the last problem may take beyond what bench is told.
BENCH_MARGIN = 75


def environment() -> dict[str, str]:
    """Binaries compiled by one process serve all, and the next run. Ninja is often installed beside Python."""
    caches = {"TRITON_CACHE_DIR": str(BUILD / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(BUILD / "inductor")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return caches | os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1"}


@dataclass
class Session:
    """What a part needs to run commands: until when, and where their output goes."""

    out: Path
    log: TextIO
    dry: bool
    end: float = 0.0

    def say(self, text: str) -> None:
        print(text, flush=True)
        print(text, file=self.log, flush=True)

    def run(self, *command: str | Path, **variables: str) -> int:
        """The command's exit code; 124 where it took too long and was stopped, with all it had started."""
        assigned = [f"{name}={value}" for name, value in variables.items()]
        self.say("$ " + shlex.join([*assigned, *map(str, command)]))
        if self.dry:
            return 0
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=environment() | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        stopped = threading.Event()
        left = self.end - time.monotonic()
        grace = min(20.0, left / 4)

        def stop() -> None:
            """First as by Ctrl-C, on which pytest says what has failed so far."""
            stopped.set()
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(max(1.0, left - grace), stop)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                self.say(line.rstrip("\n"))
            code = process.wait()
        except KeyboardInterrupt:
            grace = 0.0
            stop()
            raise
        finally:
            timer.cancel()
        return 124 if stopped.is_set() else code

    @property
    def python(self) -> Path:
        return OVERLAY / "bin" / "python" if OVERLAY.is_dir() else Path(sys.executable)


# ---- parts -----------------------------------------------------------------------------------------------------------


def build(session: Session) -> int:
    """installs fastkd, editable: CUDA kernels where there is nvcc"""
    shutil.rmtree(OVERLAY, ignore_errors=True)
    install = ("-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-e")
    if os.access(sysconfig.get_path("purelib"), os.W_OK):
        return session.run(sys.executable, *install, ".")
    session.say("this Python takes no packages: an environment on top of it is made in build/")
    code = session.run(sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", OVERLAY)
    if code:
        return code
    # where this Python is itself such an environment, the packages of that are needed as well
    (site_packages,) = OVERLAY.glob("lib/python*/site-packages")
    (site_packages / "below.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("-packages")))
    return session.run(session.python, *install, ".")


def doctor(session: Session) -> int:
    """tells what is active here"""
    return session.run(session.python, "-m", "fastkd.doctor")


def tests(session: Session) -> int:
    """the tests of tests/test_gpu.py, and all others that run Triton kernels, on the GPU"""
    files = sorted(ROOT.glob("tests/test_*.py"), key=lambda path: path.stem != "test_gpu")  # this one first
    # kernels are compiled on the CPU, which is most of the time
    together = ["-n", str(min(16, os.cpu_count() or 1)), "--dist", "worksteal"]
    options = together if importlib.util.find_spec("xdist") else []
    selected = ["-k", TESTS, "--durations", "10", "--maxfail", "20", "--tb", "short", "-rfE", "-p", "no:cacheprovider"]
    return session.run(session.python, "-m", "pytest", *options, *selected, *(file.relative_to(ROOT) for file in files))


def sanitize(session: Session) -> int:
    """every op on small inputs, under compute-sanitizer's memcheck and racecheck"""
    calls = ("-m", "tests.sanitize", "--divergences", "forward_kl", "jsd", "--dtypes", "bfloat16")
    code = session.run(session.python, *calls)  # compiles, so that what follows need not
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if code or not (found or session.dry):
        if not code:
            session.say("compute-sanitizer is not installed")
        return code or SKIPPED
    # Libraries ask the driver for functions that it may lack: no error of ours. Triton's own copies are its own affair.
    tools = {
        "memcheck": ("--report-api-errors", "no"),
        "racecheck": ("--kernel-name", "kernel_substring=rows_kernel"),
    }
    codes = []
    for tool, options in tools.items():
        options += ("--error-exitcode", "9", "--print-limit", "20")
        command = (found or "compute-sanitizer", "--tool", tool, *options)
        codes.append(session.run(*command, session.python, *calls, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))
    return next((code for code in codes if code), 0)


def limits(session: Session) -> int:
    """how fast this GPU copies, multiplies and exponentiates"""
    return session.run(session.python, "-m", "benchmarks.harness.limits")


def bench(session: Session) -> int:
    """every benchmark beside the peers that are installed; writes OUT/<gpu>.json"""
    budget = max(10, session.end - time.monotonic() - BENCH_MARGIN)
    options = ("--json", session.out, "--budget", f"{budget:.0f}", "--seconds", "60")
    return session.run(session.python, "-m", "benchmarks.run", *options)


def roofline(session: Session) -> int:
    """draws OUT/<gpu>-roofline.png of what bench wrote"""
    return session.run(session.python, "-m", "benchmarks.gpu.roofline", session.out)


def table(session: Session) -> int:
    """prints the table of what bench wrote, and puts it into docs/performance.md"""
    return session.run(session.python, "-m", "benchmarks.gpu.table", "--results", session.out)


# Seconds that each may take: each less than nine minutes, all less than twenty-five.
PARTS: dict[Callable[[Session], int], int] = {
    build: 300, doctor: 20, tests: 450, sanitize: 150, limits: 40, bench: 470, roofline: 40, table: 30,
}  # fmt: skip


# ---- all of it -------------------------------------------------------------------------------------------------------


def gpu_problem() -> str | None:
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported by {sys.executable}: {error}"
    return None if torch.cuda.is_available() else f"no GPU is visible to torch {torch.__version__}"


def main() -> int:
    by_name = {part.__name__: part for part in PARTS}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all of {', '.join(by_name)}")
    parser.add_argument("--list", action="store_true", help="say what each part does and how long it may take")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=sum(PARTS.values()), help="time for all of it (default: %(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    options = parser.parse_args()
    unknown = set(options.parts) - set(by_name)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(by_name)}")
    if options.list:
        for name, part in by_name.items():
            print(f"{name:<10} {PARTS[part]:>4} s  {part.__doc__}")
        return 0
    problem = None if options.dry_run else gpu_problem()
    if problem:
        print(f"make gpu: {problem}")
        return 2

    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end, results = time.monotonic() + options.seconds, []
    with open(os.devnull if options.dry_run else out / "gpu.log", "w") as log:
        session = Session(out, log, options.dry_run)
        for name in options.parts or by_name:
            begin = time.monotonic()
            session.end = min(end, begin + PARTS[by_name[name]])
            limit = session.end - begin
            session.say(f"\n==== {name} (at most {max(0, limit):.0f} s)")
            code = by_name[name](session) if limit > 5 else 124
            verdict = {0: "ok", SKIPPED: "skipped", 124: "OUT OF TIME"}.get(code, f"FAILED ({code})")
            results.append((name, code, f"{name:<10} {verdict:<12} {time.monotonic() - begin:5.0f} s of {limit:.0f}"))
        session.say("\n" + "\n".join(line for *_, line in results))
    return 0 if all(code in (0, SKIPPED) for _, code, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
