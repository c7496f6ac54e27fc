"""Top-k teachers of a vocabulary that is spread over the ranks of a process group, and mixes of divergences there.

Three processes run all cases, as a group of three and two of them as a group of two; their parent compares what they
found with one process that has the whole vocabulary.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import opcheck

import fastkd
from fastkd import TopK
from fastkd.ops.drivers.divergence_rows import ELSEWHERE

from .cases import INF, RANKS, UNRELATED, Regime, distance, group_of_one, in_groups, running_on
from .test_topk import SERVED, hidden_states, run, run_linear, top

if not dist.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)

COLUMNS = 203
SPLITS = {2: [(120, 83), (0, 203)], 3: [(70, 1, 132), (100, 0, 103)]}
NEAR, FAR = Regime("near", 5.0, 1e-3), Regime("far", 30.0, None)
MIX = {"forward_kl": 0.5, "reverse_kl": 0.3, "jsd": 0.2, "tvd": 0.1}


@dataclass(frozen=True)
class Case:
    """A call on inputs that every process makes alike."""

    name: str
    op: str
    columns: tuple[int, ...]  # of each rank
    tail: str | None  # None: a whole teacher
    options: dict[str, Any]
    regime: Regime = UNRELATED
    dtype: torch.dtype = torch.float32
    backend: str = "cpp"
    change: str = ""

    def make(self) -> tuple[dict[str, Tensor], Any, dict[str, Any]]:
        """The student's tensors of the whole vocabulary, the teacher and keywords."""
        torch.manual_seed(zlib.crc32(self.name.encode()))
        tokens = 4 if self.backend == "triton" else 12
        student, logits = self.regime.logits(tokens, COLUMNS)
        inputs = {"student_logits": student.to(self.dtype)}
        if self.op == "linear_kl":
            inputs = {name: x.to(self.dtype) for name, x in hidden_states(tokens, COLUMNS).items()}
        teacher: Any = (
            logits.to(self.dtype)
            if self.tail is None
            else top(logits, 9, self.tail, self.tail == "bucket" and self.change != "padded")
        )
        options = dict(self.options)
        if "labels" in options:
            options["labels"] = torch.randint(0, COLUMNS, (tokens,))
            options["labels"][:3] = torch.tensor([-100, 70, 120])
            if self.tail is not None:
                options["labels"][3] = teacher.indices[3, 2]
            options["weight"] = torch.rand(tokens).index_fill(0, torch.tensor([2]), 0)
        if self.change == "padded":
            teacher.indices[0, 4:], teacher.indices[1], teacher.log_probs[2, 3:] = -1, -1, -INF
        elif self.change == "masked":  # a shard, all of a tail, a row
            x = inputs["student_logits"]
            x[0, :120], x[3] = -INF, -INF
            x[1] = torch.full_like(x[1], -INF).scatter(0, teacher.indices[1], x[1, teacher.indices[1]])
        elif self.change == "sure":
            inputs["student_logits"][:, 149] += 40.0
        return inputs, teacher, options

    def shard(self, name: str, x: Any, rank: int) -> Any:
        if name == "student_hidden" or not isinstance(x, Tensor):
            return x
        dim = -1 if name.endswith("logits") else 0
        return x.narrow(dim, sum(self.columns[:rank]), self.columns[rank]).contiguous()

    def call(self, inputs: dict[str, Tensor], teacher: Any, **options: Any) -> list[Tensor]:
        """Loss, gradients, and metrics."""
        with running_on(self.backend) as (impl, _):
            options["impl"] = impl
            if self.op == "linear_kl":
                found = run_linear(inputs, teacher, **options)
                metrics = fastkd.linear_kl(teacher_hidden=teacher, **inputs, return_metrics=True, **options)[1]
            else:
                found = list(run(inputs["student_logits"], teacher, **options))
                metrics = fastkd.logit_kl(inputs["student_logits"], teacher, return_metrics=True, **options)[1]
        return [*found, torch.stack(list(metrics.values()))]


EVERYTHING: dict[str, Any] = {"labels": None, "ce_weight": 0.7, "kd_weight": 0.4, "temperature": 2.0, "beta": 0.3}


@functools.cache
def cases(ranks: int) -> list[Case]:
    uneven, empty = SPLITS[ranks]
    found = []
    quick = {("bucket", "jsd"), ("ignore", "skew_kl"), ("renormalize", "forward_kl"), ("conditional", "reverse_kl")}
    for tail, name in SERVED:
        kind = {"divergence": name}
        everything = {**EVERYTHING, **kind}
        if ranks == 2:
            found.append(Case(f"{tail} {name}", "logit_kl", empty, tail, everything, dtype=torch.float64))
            continue
        capped = {**everything, "student_softcap": 4.0, "student_scale": 0.7}
        found.append(Case(f"linear {tail} {name}", "linear_kl", uneven, tail, capped))
        found.append(Case(f"{tail} {name} near", "logit_kl", uneven, tail, kind, NEAR))
        if (tail, name) in quick:
            padded = kind | {"reduction": "none"}
            found += [
                Case(f"{tail} {name}", "logit_kl", uneven, tail, everything),
                Case(f"{tail} {name} far", "logit_kl", uneven, tail, kind, FAR),
                Case(f"{tail} {name} padded", "logit_kl", uneven, tail, padded, change="padded"),
            ]
    mixed = {**EVERYTHING, "divergence": MIX}
    for tail in ("bucket", "conditional") if ranks == 3 else ():
        found += [
            Case(f"mix {tail}", "logit_kl", uneven, tail, mixed),
            Case(f"mix {tail} far", "logit_kl", uneven, tail, {"divergence": MIX}, FAR),
            Case(f"none {tail}", "linear_kl", uneven, tail, mixed | {"reduction": "none"}),
            Case(f"workspace {tail}", "linear_kl", uneven, tail, EVERYTHING | {"workspace_mb": 0.003}),
            Case(f"reference {tail}", "linear_kl", uneven, tail, mixed, backend="reference"),
            Case(f"bfloat16 {tail}", "linear_kl", uneven, tail, EVERYTHING, dtype=torch.bfloat16),
            Case(f"masked {tail}", "logit_kl", uneven, tail, {"divergence": "jsd"}, change="masked"),
            Case(f"sure {tail}", "logit_kl", uneven, tail, EVERYTHING, change="sure"),
            Case(f"cross-entropy {tail}", "linear_kl", empty, tail, EVERYTHING | {"kd_weight": 0.0}),
            Case(f"triton {tail}", "logit_kl", uneven, tail, mixed, backend="triton"),
        ]
    if ranks == 3:
        found.append(Case("triton linear", "linear_kl", uneven, "bucket", EVERYTHING, backend="triton"))
        found.append(Case("mix of whole teachers triton", "logit_kl", uneven, None, mixed, backend="triton"))
        halves = {"divergence": {"skew_kl": 0.5, "skew_reverse_kl": 0.5}, "beta": 0.3}
        closed = {"divergence": {"forward_kl": 0.5, "reverse_kl": 0.5}}
        for name, options in (("two mixtures", halves), ("two KLs", closed), ("whole teachers", mixed)):
            for regime in (UNRELATED, NEAR, FAR):
                found.append(Case(f"mix of {name} {regime.name}", "logit_kl", uneven, None, options, regime))
    assert len({case.name for case in found}) == len(found)
    return found


def _in_group(case: Case, group: Any) -> list[Tensor]:
    inputs, teacher, options = case.make()
    rank = dist.get_rank(group)
    local = {name: case.shard(name, x, rank) for name, x in inputs.items()}
    teacher = case.shard("teacher_logits", teacher, rank)
    return case.call(local, teacher, vocab_group=group, **options)


def _errors(rank: int) -> dict[str, str]:
    """What wrong calls raise here, by name."""
    torch.manual_seed(0)
    student, logits = UNRELATED.logits(4, COLUMNS)
    local, teacher = student.split(SPLITS[RANKS][0], 1)[rank], top(logits, 5)
    other = TopK(teacher.indices, teacher.log_probs - 0.1 * (rank == 1))
    over, tail = {"vocab_group": dist.group.WORLD}, "conditional" if rank else "bucket"
    calls = {
        "teacher": lambda: fastkd.logit_kl(local, other, **over),
        "tail": lambda: fastkd.logit_kl(local, top(logits, 5, tail), **over),
        "bad on one": lambda: fastkd.logit_kl(local, teacher[:3] if rank == 2 else teacher, **over),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
        except (ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_groups(tmp_path_factory.mktemp("ranks"), _in_group, cases, {"errors": _errors})


def _check(case: Case, ranks: list[list[Tensor]]) -> None:
    """Against one process; of whole teachers, whose sums over ranks are of numbers in float32, against float64."""
    inputs, teacher, options = case.make()
    bound = 1e-11 if case.dtype == torch.float64 else 1e-6
    loss_bound = bound
    if case.tail is None:
        inputs, teacher, bound = {name: x.double() for name, x in inputs.items()}, teacher.double(), 1e-5
    one, *gradients, metrics = case.call(inputs, teacher, **options)
    losses, *parts, told = zip(*ranks, strict=True)
    for x in (losses, told):
        assert all(torch.equal(y, x[0]) for y in x)
    rounding = {torch.bfloat16: 3.9e-3}.get(case.dtype, 0.0)
    assert ((losses[0] - one).abs() <= loss_bound * one.abs() + 1e-15).all(), (losses[0], one)
    assert torch.allclose(told[0].double(), metrics.double(), rtol=1e-6, atol=1e-6), (told[0], metrics)
    for name, gradient, shards in zip(inputs, gradients, parts, strict=True):
        if name == "student_hidden":
            assert all(torch.equal(x, shards[0]) for x in shards)
            whole = shards[0]
        else:
            whole = torch.cat(shards, -1 if name.endswith("logits") else 0)
        assert distance(whole, gradient) <= bound + 2 * rounding, (name, distance(whole, gradient))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.long
def test_results_are_those_of_the_whole_vocabulary(found: list[dict[str, Any]], ranks: int):
    """On every rank the same loss to the bit, and those of one process."""
    failed = {}
    for case in cases(ranks):
        try:
            _check(case, [rank["results"][ranks][case.name] for rank in found if ranks in rank["results"]])
        except AssertionError as error:
            failed[case.name] = str(error).splitlines()[:2]
    assert not failed


@pytest.mark.long
def test_an_error_on_one_rank_is_one_on_all(found: list[dict[str, Any]]):
    for rank, errors in enumerate(found):
        told = errors["errors"]
        assert told["teacher"].startswith("ValueError: TopK: expected the same on every rank")
        assert told["tail"].startswith("ValueError: vocab_group: expected the same keywords")
        wanted = (
            "ValueError: TopK.indices: expected shape" if rank == 2 else "RuntimeError: vocab_group: the arguments of"
        )
        assert told["bad on one"].startswith(wanted)


# ---- without other processes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tail", "divergence"), SERVED)
def test_a_group_of_one_is_no_group(tail: str, divergence: str, tmp_path: Path):
    with group_of_one(tmp_path) as group:
        for op in ("logit_kl", "linear_kl"):
            case = Case(f"{op} {tail} {divergence}", op, (COLUMNS,), tail, {**EVERYTHING, "divergence": divergence})
            _check(case, [case.call(*(given := case.make())[:2], vocab_group=group, **given[2])])


def test_opcheck():
    student, aside = torch.randn(3, 33), torch.tensor([[4, -1, 8], [ELSEWHERE, -1, 9], [-1, -1, -1]])
    coefficient, stats = torch.tensor([1.0, 0.0, 2.0]).double(), torch.zeros(3, 3).double()
    factors, at_ids, gradient = torch.rand(3, 2).double(), torch.rand(3, 3).double(), torch.empty(3, 33)
    opcheck(torch.ops.fastkd.topk_shard_stats.default, (student, aside, coefficient, stats, 2.0))
    given = (student, aside, coefficient, stats, factors, at_ids, gradient, 2.0)
    opcheck(torch.ops.fastkd.topk_shard_gradient.default, given)
