"""What fifteen minutes with a GPU tell of fastkd: whether its kernels are right, and how fast beside their peers.

Two runs, each of one call: `--run right`, then `--run peers`. Every phase is a process of its own with a limit that is
kept, and one that dies, hangs or floods its log takes nothing from the next. What is known is in OUT/<run>.jsonl after
every line, what was printed in OUT/<run>.log. Nothing is downloaded; `--prepare` makes beforehand, elsewhere, what can
be carried. Exit code: 0 where all phases said what they should, 1 otherwise, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ROOT
from benchmarks.device import carried
from benchmarks.device.lines import Lines, read
from benchmarks.device.phases import PHASES, RUNS, Phase
from benchmarks.device.summary import summary
from benchmarks.device.watchdog import Log, Outcome, watched
from benchmarks.harness.ending import interruptible

OUT = ROOT / "build" / "device"
REHEARSED_S, REHEARSAL_S = 120, 600  # of a phase of a rehearsal, and of all of it
PROBE = """
import torch
print(torch.__version__, *(torch.cuda.get_device_capability() if torch.cuda.is_available() else ()))
"""


def gpu() -> tuple[str | None, str]:
    """(why there is none, what nvcc calls it)"""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120)
    if done.returncode:
        return f"torch cannot be imported by {sys.executable}: {done.stderr.strip().splitlines()[-1]}", ""
    version, *capability = done.stdout.split()
    return None if capability else f"no GPU is visible to torch {version}", "".join(capability)


class Session:
    """Phases one after the other, and what came of them."""

    def __init__(self, out: Path, environment: dict[str, str], rehearsed: bool) -> None:
        self.out, self.environment, self.rehearsed = out, environment, rehearsed
        self.outcomes: dict[Phase, Outcome] = {}
        self.building: threading.Thread | None = None

    def build(self, architecture: str) -> None:
        """Starts to build the extension, beside the phases that do without it."""
        environment = self.environment | {"FASTKD_BUILD": "cuda", "FASTKD_ARCHITECTURES": architecture}
        lines = Lines(self.out / "right.jsonl", "build")

        def run() -> None:
            lines.write("begin")
            with open(self.out / "build.log", "w", encoding="utf-8", errors="replace") as log:
                outcome = watched(carried.BUILD, carried.BUILD_S, Log(log), environment, ROOT)
            lines.write("end", verdict=str(outcome), seconds=round(outcome.seconds, 1))

        self.building = threading.Thread(target=run, daemon=True)
        self.building.start()

    def run(self, phase: Phase, limit: float) -> None:
        if phase.extension and self.building is not None:
            self.building.join(carried.BUILD_S)
        path = self.out / f"{phase.run}.jsonl"
        lines = Lines(path, phase.name)
        lines.write("begin", limit=limit, date=time.strftime("%Y-%m-%dT%H:%M:%S%z"), rehearsed=self.rehearsed)
        with open(self.out / f"{phase.run}.log", "a", encoding="utf-8", errors="replace") as log:
            print(f"\n==== {phase.name}: {phase.what} (at most {limit:.0f} s)", file=log, flush=True)
            command = [
                sys.executable,
                "-m",
                "benchmarks.device.phase",
                phase.name,
                phase.function,
                "--lines",
                str(path),
            ]
            command += ["--seconds", f"{0.95 * limit - 1:.1f}", *(["--rehearse"] if self.rehearsed else [])]
            outcome = watched(command, limit, Log(log), self.environment, ROOT)
        self.outcomes[phase] = outcome
        lines.write("end", verdict=str(outcome), seconds=round(outcome.seconds, 1))
        print(f"{phase.name:<14} {outcome!s:<16} {outcome.seconds:5.0f} s of {limit:.0f}", flush=True)


def chosen(options: argparse.Namespace, phases: Sequence[Phase]) -> list[Phase]:
    if options.only:
        return [phase for phase in phases if phase.name in options.only]
    runs = options.run or (RUNS[:2] if options.rehearse else ())
    return [phase for phase in phases if phase.run in runs]


def _parser(phases: Sequence[Phase]) -> argparse.ArgumentParser:
    names = [phase.name for phase in phases]
    parser = argparse.ArgumentParser(prog="benchmarks.device", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", nargs="+", choices=RUNS, help="the phases of these runs")
    parser.add_argument("--only", nargs="+", choices=names, metavar="PHASE", help=f"some of {', '.join(names)}")
    parser.add_argument("--list", action="store_true", help="say what each phase tells and how long it may take")
    parser.add_argument("--out", type=Path, default=OUT, help="where lines and logs go (default: %(default)s)")
    parser.add_argument(
        "--carried", type=Path, default=carried.FOLDER, help="what --prepare made (default: %(default)s)"
    )
    parser.add_argument("--prepare", type=Path, nargs="?", const=carried.FOLDER, metavar="FOLDER",
                        help="make what can be carried to a GPU, without one (default: %(const)s)")  # fmt: skip
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, on small inputs: shows that it runs")
    parser.add_argument("--read", type=Path, metavar="FOLDER", help="make results, page and picture of what came back")
    return parser


def main(arguments: Sequence[str] | None = None, phases: Sequence[Phase] = PHASES) -> int:
    parser = _parser(phases)
    options = parser.parse_args(arguments)
    if options.list:
        for run in RUNS:
            of_run = [phase for phase in phases if phase.run == run]
            print(f"{run}: {sum(phase.seconds for phase in of_run)} s")
            print("".join(f"  {phase.name:<14} {phase.seconds:>4} s  {phase.what}\n" for phase in of_run), end="")
        return 0
    if options.prepare:
        from benchmarks.device.prepare import prepare

        return prepare(options.prepare)
    if options.read:
        from benchmarks.device.results import publish

        return publish(options.read)
    todo = chosen(options, phases)
    if not todo:
        parser.error("say what to do: --run right, --run peers, --only PHASE, --rehearse, --list, --prepare or --read")
    problem, architecture = (None, "") if options.rehearse else gpu()
    if problem:
        print(f"benchmarks.device: {problem}")
        return 2
    with interruptible():
        return run_all(todo, options, architecture)


def run_all(todo: Sequence[Phase], options: argparse.Namespace, architecture: str) -> int:
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    notes, environment = carried.unpacked(options.carried.resolve(), not options.rehearse)
    if options.rehearse:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    print("\n".join(notes), flush=True)
    end = time.monotonic() + REHEARSAL_S
    session = Session(out, dict(os.environ) | environment, options.rehearse)
    if not options.rehearse and any(phase.extension for phase in todo) and carried.to_be_built():
        session.build(architecture)
    try:
        for phase in todo:
            limit = max(1.0, min(REHEARSED_S, end - time.monotonic())) if options.rehearse else phase.seconds
            session.run(phase, limit)
    finally:  # also where the whole is told to end
        lines = [line for run in RUNS for line in read(out / f"{run}.jsonl")]
        names = [*(["build"] if session.building else []), *(phase.name for phase in todo)]
        print("\n" + summary([line for line in lines if line["phase"] in names], names), flush=True)
    return 0 if all(outcome.well for outcome in session.outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
