"""What is done with a GPU, in two runs: is it right, and against whom. `more` is for who has longer.

A phase is a function that takes `Here` and is given as many seconds as stand beside it. It returns whether all was as
it should be, and raises `Skipped` where it cannot be. Nothing here imports torch: a broken one is a phase's trouble.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from benchmarks.device.lines import Lines


class Skipped(Exception):
    """Says why a phase cannot be here."""


@dataclass(frozen=True)
class Phase:
    name: str
    seconds: int
    what: str
    function: str  # "module:function"
    run: str = "right"
    extension: bool = False  # whether it waits for the compiled extension, where that is being built


@dataclass(frozen=True)
class Here:
    """What a phase is given."""

    lines: Lines
    end: float  # by time.monotonic()
    rehearsed: bool  # without a GPU, on small inputs, which shows that it runs

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


CHECKS, TIMES, MACHINE = "benchmarks.device.checks", "benchmarks.device.times", "benchmarks.device.machine"
PHASES = (
    Phase("versions", 15, "what is here, and whether what was carried is in use", f"{MACHINE}:versions"),
    Phase("triton", 90, "every Triton kernel against fp64; repeats, a graph, a stream", f"{CHECKS}:triton"),
    Phase("cuda", 25, "the same of the rows in CUDA C++", f"{CHECKS}:cuda", extension=True),
    Phase("sanitize", 30, "rows under compute-sanitizer's memcheck and racecheck", f"{MACHINE}:sanitize"),
    Phase("limits", 20, "how fast this GPU copies, multiplies and exponentiates", f"{MACHINE}:limits"),
    Phase("times", 110, "a time for each op; CUDA C++ rows by blocks", f"{TIMES}:alone", extension=True),
    Phase("linear-large", 70, "linear_kl, V 128256, T 8192, against its peers", f"{TIMES}:linear_large", "peers"),
    Phase("linear-narrow", 35, "linear_kl, V 32128, of T5's widths", f"{TIMES}:linear_narrow", "peers"),
    Phase("linear-short", 25, "linear_kl, V 128256, T 1024", f"{TIMES}:linear_short", "peers"),
    Phase("linear-odd", 25, "linear_kl, V 151643, whose rows are padded", f"{TIMES}:linear_odd", "peers"),
    Phase("logit", 45, "logit_kl against its peers", f"{TIMES}:logit", "peers"),
    Phase("relation", 45, "relation_kl against its peers", f"{TIMES}:relation", "peers"),
    Phase("attention", 25, "attention_kl against its peers", f"{TIMES}:attention", "peers"),
    Phase("cka", 25, "cka_loss against its peers", f"{TIMES}:cka", "peers"),
    Phase("autotune", 40, "lines for the table of launches in kernels/tuning.py", f"{TIMES}:autotune", "peers"),
    Phase("tests", 450, "the tests that run kernels, on this GPU", f"{MACHINE}:tests", "more", extension=True),
)
RUNS = ("right", "peers", "more")
