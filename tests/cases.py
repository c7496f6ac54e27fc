"""What tests of the ops share: every op as a case, every backend as a context, inputs that are meant to hurt.

Beside them what a dtype's rounding is worth, and the parameters that tests go over.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastkd
from fastkd import backend
from fastkd.divergence import DIVERGENCES

from .forks import forks

Inputs = dict[str, Tensor]

NAN, INF = float("nan"), float("inf")
# One rounding to the dtype, as a relative Frobenius error: at most half a unit in the last place of every element.
ROUNDING = {torch.float64: 1.2e-16, torch.float32: 6e-8, torch.float16: 4.9e-4, torch.bfloat16: 3.9e-3}
# Half the smallest subnormal: what rounding can take from an element however small it is.
SMALLEST = {torch.float64: 0.0, torch.float32: 0.0, torch.float16: 3e-8, torch.bfloat16: 0.0}
DTYPES = list(ROUNDING)
RANKS = 3
PAIR = [1, 2]  # so that ranks of the group are not those of the world


@dataclass(frozen=True)
class Regime:
    """How teacher and student logits are drawn: standard deviation, and the student's distance from the teacher."""

    name: str
    deviation: float
    distance: float | None  # None: the models know nothing of each other

    def logits(self, tokens: int, vocabulary: int) -> tuple[Tensor, Tensor]:
        """(student, teacher) [tokens, vocabulary] in float64"""
        teacher = self.deviation * torch.randn(tokens, vocabulary, dtype=torch.float64)
        noise = torch.randn(tokens, vocabulary, dtype=torch.float64)
        return (self.deviation * noise if self.distance is None else teacher + self.distance * noise), teacher


UNRELATED = Regime("unrelated", 2.0, None)
REGIMES = [
    UNRELATED,
    Regime("sd5", 5.0, 2.0),
    Regime("sd30", 30.0, 3.0),
    Regime("near_converged", 5.0, 1e-3),
]


@dataclass(frozen=True)
class Op:
    """A public function, its inputs from a regime, and the names of the inputs that get gradients."""

    name: str
    function: Callable[..., Tensor]
    make: Callable[..., Inputs]
    student: tuple[str, ...]


def _logit_inputs(regime: Regime, tokens: int = 6, vocabulary: int = 203) -> Inputs:
    student, teacher = regime.logits(tokens, vocabulary)
    return {"student_logits": student, "teacher_logits": teacher}


def _linear_inputs(regime: Regime, tokens: int = 24, vocabulary: int = 203, width: int = 24) -> Inputs:
    """Hidden states of unit variance and heads scaled so that logits have the regime's deviation and distance.

    Where the student is near the teacher it has the same width plus one more, whose weights hold the noise.
    """
    teacher_hidden = torch.randn(tokens, width, dtype=torch.float64)
    teacher_weight = regime.deviation * width**-0.5 * torch.randn(vocabulary, width, dtype=torch.float64)
    if regime.distance is None:
        student_hidden = torch.randn(tokens, width // 2, dtype=torch.float64)
        student_weight = regime.deviation * (width // 2) ** -0.5 * torch.randn(vocabulary, width // 2).double()
    else:
        student_hidden = torch.cat([teacher_hidden, torch.randn(tokens, 1, dtype=torch.float64)], 1)
        student_weight = torch.cat([teacher_weight, regime.distance * torch.randn(vocabulary, 1).double()], 1)
    return {
        "student_hidden": student_hidden,
        "student_weight": student_weight,
        "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight,
        "student_bias": 0.1 * torch.randn(vocabulary, dtype=torch.float64),
        "teacher_bias": 0.1 * torch.randn(vocabulary, dtype=torch.float64),
    }


HEADS = 3  # of the attention cases


def _near(per_head: Tensor, factor: float, noise: float) -> Tensor:
    """[B, L, A, d] times a factor, with one more dimension that holds noise, as [B, L, A * (d + 1)]."""
    extra = noise * torch.randn(*per_head.shape[:-1], 1, dtype=torch.float64)
    return torch.cat([factor * per_head, extra], -1).flatten(2)


def _attention_inputs(regime: Regime, batch: int = 2, queries: int = 13, keys: int | None = None) -> Inputs:
    """Scores of the regime's deviation; a student near the teacher has heads of one dimension more for the distance."""
    keys, width = queries if keys is None else keys, 8
    root = regime.deviation**0.5
    teacher_q = root * torch.randn(batch, queries, HEADS, width, dtype=torch.float64)
    teacher_k = root * torch.randn(batch, keys, HEADS, width, dtype=torch.float64)
    if regime.distance is None:
        student_q, student_k = (root * torch.randn(batch, n, HEADS * 5).double() for n in (queries, keys))
    else:
        factor = ((width + 1) / width) ** 0.25  # makes up for 1 / sqrt(head width)
        student_q, student_k = (_near(x, factor, regime.distance**0.5) for x in (teacher_q, teacher_k))
    table = 0.3 * regime.deviation * torch.randn(8, HEADS, dtype=torch.float64)
    return {
        "student_q": student_q,
        "student_k": student_k,
        "teacher_q": teacher_q.flatten(2),
        "teacher_k": teacher_k.flatten(2),
        "student_table": table + (regime.distance or regime.deviation) * 0.1 * torch.randn(8, HEADS).double(),
        "teacher_table": table,
    }


def attention_kl(*, student_table: Tensor, teacher_table: Tensor, **inputs) -> Tensor:
    """fastkd.attention_kl of T5 encoders, by the tables of their relative biases."""
    biases = {
        "student_bias": fastkd.RelativeBias(student_table, max_distance=6),
        "teacher_bias": fastkd.RelativeBias(teacher_table, max_distance=6),
    }
    return fastkd.attention_kl(**inputs, **biases, num_heads=HEADS)


def _relation_inputs(regime: Regime, **sizes: int) -> Inputs:
    x = _attention_inputs(regime, **sizes)
    return {"student": x["student_q"], "teacher": x["teacher_q"]}


def relation_kl(student: Tensor, teacher: Tensor, **options) -> Tensor:
    return fastkd.relation_kl(student, teacher, num_heads=HEADS, **options)


def _cka_inputs(regime: Regime, tokens: int = 24, widths: tuple[int, int] = (7, 10)) -> Inputs:
    """Hidden states off their origin; a student near the teacher has its first columns, and noise."""
    width, teacher_width = widths
    teacher = 3 + regime.deviation * torch.randn(tokens, teacher_width, dtype=torch.float64)
    noise = torch.randn(tokens, width, dtype=torch.float64)
    near = None if regime.distance is None else teacher[:, :width] + regime.distance * noise
    return {"student": 3 + regime.deviation * noise if near is None else near, "teacher": teacher}


LOGIT_KL = Op("logit_kl", fastkd.logit_kl, _logit_inputs, ("student_logits",))
LINEAR_KL = Op("linear_kl", fastkd.linear_kl, _linear_inputs, ("student_hidden", "student_weight", "student_bias"))
ATTENTION_KL = Op("attention_kl", attention_kl, _attention_inputs, ("student_q", "student_k", "student_table"))
RELATION_KL = Op("relation_kl", relation_kl, _relation_inputs, ("student",))
CKA_LOSS = Op("cka_loss", fastkd.cka_loss, _cka_inputs, ("student",))
TOKEN_OPS = [LOGIT_KL, LINEAR_KL]  # with the keywords of token losses
ATTENTION_OPS = [ATTENTION_KL, RELATION_KL]
DIVERGENCE_OPS = TOKEN_OPS + ATTENTION_OPS
OPS = [*DIVERGENCE_OPS, CKA_LOSS]

BACKENDS = ["reference", "cpp", "triton"]
# For tests that call a function often: Triton's interpreter takes minutes for them.
LONG_IN_TRITON = ["cpp", pytest.param("triton", marks=pytest.mark.long)]
# Where kernels in Triton run that a test calls itself.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# NumPy, under the interpreter, warns of what kernels on a GPU compute silently: inf - inf in a branch not taken.
interpreted = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def by_name(x: Any) -> str:
    """The name of an op, or of a dtype, for a test's."""
    return getattr(x, "name", str(x).removeprefix("torch."))


over_ops = pytest.mark.parametrize("op", OPS, ids=by_name)
over_token_ops = pytest.mark.parametrize("op", TOKEN_OPS, ids=by_name)
over_attention_ops = pytest.mark.parametrize("op", ATTENTION_OPS, ids=by_name)
over_backends = pytest.mark.parametrize("backend", BACKENDS)
over_fused = pytest.mark.parametrize("backend", ["cpp", "triton"])
over_divergences = pytest.mark.parametrize("divergence", DIVERGENCES)
over_reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


@contextlib.contextmanager
def running_on(name: str) -> Iterator[tuple[str, torch.device]]:
    """(impl, device) that make a call run on this backend and no other; skips where it cannot."""
    if name == "reference":
        yield "reference", torch.device("cpu")
    elif name == "cpp":
        assert backend.EXTENSION_PROBLEM is None, backend.EXTENSION_PROBLEM  # CI builds it: never skip silently
        yield "fused", torch.device("cpu")
    else:
        if sys.platform != "linux":  # on Linux the test extra installs it: never skip silently
            pytest.importorskip("triton")
        if torch.cuda.is_available():
            yield "fused", torch.device("cuda")
        else:
            with backend.interpret_triton():
                yield "fused", torch.device("cpu")


def installed(package: str) -> Any:
    """A package of the test extra, which on Linux has it: never skip silently."""
    return importlib.import_module(package) if sys.platform == "linux" else pytest.importorskip(package)


def to(inputs: Inputs, dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
    """Copies, so that no test changes another's inputs."""
    return {name: x.to(device=device, dtype=dtype, copy=True) for name, x in inputs.items()}


def placed(options: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Options, their tensors on this device."""
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}


def value_and_gradients(op: Op, inputs: Inputs, upstream: Tensor | float = 1.0, **options) -> tuple[Tensor, Inputs]:
    """The loss, and the gradients of the student's inputs for an upstream gradient."""
    inputs = dict(inputs)
    leaves = {name: inputs[name].detach().requires_grad_() for name in op.student if name in inputs}
    inputs.update(leaves)
    loss = op.function(**inputs, **options)
    seed = torch.as_tensor(upstream, dtype=loss.dtype, device=loss.device).expand(loss.shape)
    gradients = torch.autograd.grad(loss, list(leaves.values()), seed)
    return loss.detach(), dict(zip(leaves, gradients, strict=True))


def oracle(op: Op, inputs: Inputs, **options) -> tuple[Tensor, Inputs]:
    """The reference in float64 on exactly the values that `inputs` hold: nothing is rounded on the way."""
    return value_and_gradients(op, to(inputs, torch.float64), impl="reference", **placed(options, "cpu"))


def end_process() -> NoReturn:
    """End one of the processes of a test when all of them have come so far.

    Not by Python's own end, where gloo may wait for a thread of its own that waits for Python's lock.
    """
    dist.barrier()
    os._exit(0)


def in_groups(
    folder: Path,
    call: Callable[..., Any],
    cases: Callable[[int], Sequence[Any]],
    others: Mapping[str, Callable[..., Any]],
) -> list[dict[str, Any]]:
    """What each of three processes finds, as a group of three and the last two of them as one of two.

    It is "results" of call(case, group), by the group's size and the case's name, and by their names what `others` find
    of a rank. Functions of modules, as processes are given them.
    """
    with forks(call.__module__, OMP_NUM_THREADS="1") as processes:
        processes.call(_rank, str(folder), call, cases, others, processes=RANKS)
    return [torch.load(folder / str(rank)) for rank in range(RANKS)]


def _rank(rank: int, folder: str, call: Any, cases: Any, others: Mapping[str, Any]) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timeout)
    pair = dist.new_group(PAIR, timeout=timeout)
    results = {3: {case.name: call(case, dist.group.WORLD) for case in cases(3)}}
    if rank in PAIR:
        results[2] = {case.name: call(case, pair) for case in cases(2)}
    found = {name: find(rank) for name, find in others.items()}
    torch.save({"results": results, **found}, f"{folder}/{rank}")
    end_process()


@contextlib.contextmanager
def group_of_one(folder: Path) -> Iterator[dist.ProcessGroup]:
    """Be the only process of a gloo group. What holds it, as DDP does, must be out of reach at the end.

    DDP that lets go of a group last waits, with Python's lock, for gloo's thread, which may wait for that lock.
    """
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        gc.collect()
        dist.destroy_process_group()


def distance(got: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error; NaN counts as infinite."""
    got, wanted = got.detach().cpu().double(), wanted.detach().cpu().double()
    assert got.shape == wanted.shape
    error = (got - wanted).norm() / wanted.norm().clamp_min(1e-300)
    return float("inf") if error.isnan() else error.item()


def furthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest distance of a gradient; of those near 0, as of biases of keys, by a hundredth of the largest."""
    assert found.keys() == wanted.keys()
    least = 1e-2 * max(x.norm().item() for x in wanted.values())
    errors = torch.tensor([(found[name] - x).norm().item() / max(x.norm().item(), least) for name, x in wanted.items()])
    return errors.nan_to_num(nan=float("inf")).max().item()
