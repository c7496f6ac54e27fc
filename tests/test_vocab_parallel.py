"""linear_kl and logit_kl of a vocabulary that is spread over the ranks of a process group.

Three processes run all cases, as a group of three and two of them as a group of two; their parent compares what they
found with one process that has the whole vocabulary. A rank that waits for others in vain fails by its group's timeout.
"""

from __future__ import annotations

import functools
import itertools
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import opcheck

import fastkd
from fastkd.checks import Objective
from fastkd.divergence import DIVERGENCES, divergence_code
from fastkd.ops.drivers.divergence_rows import ELSEWHERE, divergence_rows
from fastkd.ops.vocabulary_shards import VocabularyShard, _checksum

from .cases import (
    LINEAR_KL,
    LOGIT_KL,
    RANKS,
    UNRELATED,
    Inputs,
    Op,
    Regime,
    distance,
    group_of_one,
    in_groups,
    oracle,
    over_fused,
    running_on,
    to,
    value_and_gradients,
)

if not dist.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)

SPLITS: dict[int, list[tuple[int, ...]]] = {2: [(120, 83), (0, 203)], 3: [(70, 1, 132), (100, 0, 103)]}
NEAR, FAR = Regime("near", 5.0, 1e-6), Regime("far", 30.0, None)
# One rounding to the dtype, as a relative Frobenius error; of results that were rounded twice, or differently, two.
ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 3.9e-3, torch.float16: 4.9e-4}


@dataclass(frozen=True)
class Case:
    """A call on inputs that every process makes alike."""

    name: str
    op: Op
    student: tuple[int, ...]  # columns of each rank
    teacher: tuple[int, ...] | None = None  # None: as the student's
    regime: Regime = UNRELATED
    dtype: torch.dtype = torch.float32
    backend: str = "cpp"
    options: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    change: Callable[[Inputs], None] | None = None  # of the inputs, in place
    upstream: bool = False
    dtensors: bool = False
    exact: bool = True  # whether the oracle knows an answer: of -inf in one model alone it does not

    def make(self) -> tuple[Inputs, dict[str, Any]]:
        """Inputs of the whole vocabulary, and keywords."""
        torch.manual_seed(zlib.crc32(self.name.encode()))
        inputs = to(self.op.make(self.regime, **self.sizes), self.dtype)
        if self.change is not None:
            self.change(inputs)
        options = {name: x(inputs) if callable(x) else x for name, x in self.options.items()}
        for name in [name for name in options if options[name] is None and name in inputs]:
            del inputs[name]
        if self.upstream:
            options["upstream"] = torch.randn(inputs[self.op.student[0]].shape[:-1])
        return inputs, options

    def columns(self, name: str) -> tuple[int, ...]:
        return self.teacher if name.startswith("teacher") and self.teacher is not None else self.student

    def shard(self, name: str, x: Tensor, rank: int) -> Tensor:
        """What a rank holds of an input or its gradient."""
        if name.endswith("hidden"):
            return x
        dim, columns = (-1 if name.endswith("logits") else 0), self.columns(name)
        return x.narrow(dim, sum(columns[:rank]), columns[rank])


def labels_of(inputs: Inputs) -> Tensor:
    """In every shard, at its edges, and ignored."""
    first = inputs.get("student_logits", inputs.get("student_hidden"))
    assert first is not None
    labels = torch.randint(0, 150, first.shape[:-1])
    known = torch.tensor([0, 149, -7, 70, 120])[: len(labels)]
    labels[: len(known)] = known
    return labels


def weights_of(inputs: Inputs) -> Tensor:
    first = inputs.get("student_logits", inputs.get("student_hidden"))
    assert first is not None
    weight = torch.rand(first.shape[:-1])
    weight.view(-1)[3] = 0
    return weight


EVERYTHING: dict[str, Any] = {
    "labels": labels_of,
    "ignore_index": -7,
    "weight": weights_of,
    "ce_weight": 0.7,
    "kd_weight": 0.4,
    "temperature": 2.0,
    "beta": 0.3,
}
SCALES = {"student_scale": 0.5, "teacher_scale": 1.5, "student_softcap": 6.0, "teacher_softcap": 5.0}


def mask_both(inputs: Inputs) -> None:
    """Rows of nothing but -inf in a shard, and a row of nothing else."""
    for x in inputs.values():
        x[0, :120] = float("-inf")
        x[1, 60:] = float("-inf")
        x[3] = float("-inf")


def mask_one(inputs: Inputs) -> None:
    """Rows of nothing but -inf in a shard of one model."""
    inputs["student_logits"][0, 120:] = float("-inf")
    inputs["teacher_logits"][1, 60:] = float("-inf")
    inputs["student_logits"][2, 60:] = float("-inf")
    inputs["teacher_logits"][2, :121] = float("-inf")


def be_sure(inputs: Inputs) -> None:
    """A student sure of a label, beside which the rest of the row would vanish."""
    inputs["student_logits"][:, 149] = 22.0


def narrow_teacher(columns: int) -> Callable[[Inputs], None]:
    def change(inputs: Inputs) -> None:
        for name in set(inputs) & {"teacher_logits", "teacher_weight", "teacher_bias"}:
            inputs[name] = inputs[name].narrow(-1 if name == "teacher_logits" else 0, 0, columns)

    return change


def labels_of_the_student(inputs: Inputs) -> Tensor:
    """Of its whole vocabulary, whatever the teacher's."""
    labels = torch.randint(0, 203, labels_of(inputs).shape)
    known = torch.tensor([202, -7, 60, 59, 150])[: len(labels)]
    labels[: len(known)] = known
    return labels


def only_wider_teacher(inputs: Inputs) -> None:
    for name in ("student_weight", "student_bias"):
        inputs[name] = inputs[name][:190]


@functools.cache
def cases(ranks: int) -> list[Case]:
    uneven, empty = SPLITS[ranks]
    few = {"tokens": 4}  # Triton's interpreter is slow
    found = []
    for op in (LOGIT_KL, LINEAR_KL):
        for divergence in DIVERGENCES:
            kind = {"divergence": divergence}
            everything = {**kind, **EVERYTHING, **(SCALES if op is LINEAR_KL else {})}
            found += [
                Case(f"{op.name} {divergence} everything", op, uneven, options=everything),
                Case(f"{op.name} {divergence} near", op, uneven, regime=NEAR, options=kind),
                Case(f"{op.name} {divergence} far", op, uneven, regime=FAR, options=kind),
                Case(f"{op.name} {divergence} float64", op, empty, dtype=torch.float64, options=everything),
            ]
            if ranks == 3 and (op is LOGIT_KL or divergence in ("forward_kl", "tvd")):
                name = f"{op.name} {divergence} triton"
                found.append(Case(name, op, uneven, backend="triton", options=everything, sizes=few))
        for reduction in ("sum", "none"):
            options = {**EVERYTHING, "divergence": "skew_kl", "reduction": reduction}
            for backend in ("cpp", "reference"):
                name, upstream = f"{op.name} {reduction} {backend}", reduction == "none"
                found.append(Case(name, op, uneven, backend=backend, options=options, upstream=upstream))
        normalized = {"normalizer": torch.tensor(31), "weight": weights_of}
        wide = (11, *[1100] * (ranks - 1))
        found += [
            Case(f"{op.name} normalizer", op, uneven, options=normalized),
            Case(f"{op.name} bfloat16", op, uneven, dtype=torch.bfloat16, options=EVERYTHING),
            Case(f"{op.name} float16", op, uneven, dtype=torch.float16, options=EVERYTHING),
            Case(f"{op.name} wide", op, wide, sizes={"vocabulary": sum(wide)}),
            Case(f"{op.name} nothing left", op, uneven, options={"weight": lambda x: 0 * weights_of(x)}),
            Case(f"{op.name} no tokens", op, uneven, sizes={"tokens": 0}),
        ]
        without = ("teacher_logits",) if op is LOGIT_KL else ("teacher_hidden", "teacher_weight", "teacher_bias")
        alone = {"kd_weight": 0.0, "ce_weight": 1.0, "labels": labels_of, "ignore_index": -7} | dict.fromkeys(without)
        found.append(Case(f"{op.name} cross-entropy", op, empty, options=alone))
        if ranks == 3:
            half = {"dtype": torch.float16, "backend": "triton", "sizes": few, "options": EVERYTHING}
            found += [
                Case(f"{op.name} cross-entropy triton", op, empty, options=alone, backend="triton", sizes=few),
                Case(f"{op.name} float16 triton", op, empty, **half),
                Case(f"{op.name} dtensors", op, _chunks(ranks, 203), dtensors=True, options=EVERYTHING),
                Case(f"{op.name} dtensors, some empty", op, _chunks(ranks, 4), dtensors=True, sizes={"vocabulary": 4}),
            ]
    for backend in ("cpp", "triton") if ranks == 3 else ("cpp",):
        on: dict[str, Any] = {"backend": backend, "sizes": few if backend == "triton" else {}}
        for megabytes in (1e-6, 0.004):
            options = {**EVERYTHING, "divergence": "reverse_kl", "workspace_mb": megabytes}
            found.append(Case(f"workspace {megabytes} {backend}", LINEAR_KL, uneven, options=options, **on))
        for divergence in ("forward_kl", "reverse_kl", "jsd"):
            name, options = f"masked {divergence} {backend}", {"divergence": divergence, "reduction": "none"}
            found.append(Case(name, LOGIT_KL, uneven, change=mask_both, options=options, **on))
            found.append(Case(f"one {name}", LOGIT_KL, uneven, change=mask_one, exact=False, options=options, **on))
        sure = {"labels": lambda x: torch.full((len(x["student_logits"]),), 149), "ce_weight": 1.0}
        found.append(Case(f"sure {backend}", LOGIT_KL, uneven, change=be_sure, options=sure, **on))
    for op, (divergence, backend), columns in itertools.product(
        (LOGIT_KL, LINEAR_KL),
        (("forward_kl", "cpp"), ("jsd", "cpp"), ("jsd", "reference"), ("reverse_kl", "triton")),
        (150, 60),
    ):
        starts = [sum(uneven[:rank]) for rank in range(ranks)]
        narrow = tuple(max(0, min(n, columns - start)) for n, start in zip(uneven, starts, strict=True))
        options = {**EVERYTHING, "divergence": divergence, "labels": labels_of_the_student}
        name, sizes = f"{op.name} {divergence} {backend} teacher of {columns}", few if backend == "triton" else {}
        change = narrow_teacher(columns)
        found.append(Case(name, op, uneven, narrow, change=change, options=options, backend=backend, sizes=sizes))
    longer = (*uneven[:-1], uneven[-1] - 13)
    found.append(Case("longer teacher", LINEAR_KL, longer, uneven, change=only_wider_teacher, options=EVERYTHING))
    assert len({case.name for case in found}) == len(found)
    return found


def _chunks(ranks: int, columns: int) -> tuple[int, ...]:
    """Columns of each rank as DTensors have them."""
    size = -(-columns // ranks)
    return tuple(max(0, min(size, columns - rank * size)) for rank in range(ranks))


# ---- in a rank ------------------------------------------------------------------------------------------------------


def _call(case: Case, group: Any) -> tuple[Tensor, Inputs, dict[str, Tensor]]:
    inputs, options = case.make()
    rank = dist.get_rank(group)
    local = {name: case.shard(name, x, rank).contiguous() for name, x in inputs.items()}
    if case.dtensors:
        from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

        mesh = init_device_mesh("cpu", (RANKS,))
        for name, x in inputs.items():
            placement = Replicate() if name.endswith("hidden") else Shard(x.dim() - 1 if name.endswith("logits") else 0)
            local[name] = DTensor.from_local(
                local[name], mesh, [placement], run_check=False, shape=x.shape, stride=x.stride()
            )
    else:
        options["vocab_group"] = group
    with running_on(case.backend) as (impl, _):
        loss, gradients = value_and_gradients(case.op, local, impl=impl, **options)
        metrics = _metrics(case.op, local, {**options, "impl": impl})
    if case.dtensors:
        assert all(type(x).__name__ == "DTensor" for x in gradients.values())
        gradients = {name: x.to_local() for name, x in gradients.items()}  # type: ignore[attr-defined]
    return loss, gradients, metrics


def _metrics(op: Op, inputs: Inputs, options: dict[str, Any]) -> dict[str, Tensor]:
    options = {name: x for name, x in options.items() if name != "upstream"}
    with torch.no_grad():
        return op.function(**inputs, **options, return_metrics=True)[1]


def _errors(rank: int) -> dict[str, str]:
    """What every wrong call raises here, by its name."""
    torch.manual_seed(0)
    x = {name: tensor for name, tensor in to(LINEAR_KL.make(UNRELATED), torch.float32).items() if "bias" not in name}
    group, columns = dist.group.WORLD, SPLITS[RANKS][0]
    local = {name: x[name] if "hidden" in name else x[name].split(columns)[rank] for name in x}
    logits = torch.randn(4, columns[rank])
    labels = torch.randint(0, 203, (24,))
    first = rank == 0

    def noise(width: int, seed: int = rank) -> Tensor:
        return torch.randn(24, width, generator=torch.Generator().manual_seed(seed))

    def linear(**changes: Any) -> Tensor:
        return fastkd.linear_kl(**{**local, "vocab_group": group, **changes})

    calls: dict[str, Callable[[], Any]] = {
        "keyword of one rank": lambda: linear(divergence="jsd" if first else "jds"),
        "no tensor on one rank": lambda: linear(student_hidden=None if first else x["student_hidden"]),
        "bias of one rank": lambda: linear(student_bias=torch.zeros(5 if first else columns[rank])),
        "other keywords": lambda: linear(temperature=1.0 + rank),
        "other reduction": lambda: linear(reduction="sum" if first else "none"),
        "other gradients": lambda: linear(student_hidden=x["student_hidden"].clone().requires_grad_(first)),
        "tokens": lambda: linear(**{k: local[k][: 20 + rank] for k in ("student_hidden", "teacher_hidden")}),
        "hidden": lambda: linear(student_hidden=noise(12)),
        "teacher hidden": lambda: linear(teacher_hidden=noise(24)),
        "labels": lambda: linear(labels=labels.roll(rank), ce_weight=1.0),
        "weight": lambda: linear(weight=torch.full((24,), 1.0 + rank)),
        "normalizer": lambda: linear(normalizer=3 + rank),
        "label range": lambda: linear(labels=labels.clamp_min(203), ce_weight=1.0),
        "does not tile": lambda: linear(student_weight=x["student_weight"].split(columns[::-1])[rank]),
        "no columns": lambda: linear(**{name: local[name][:0] for name in ("student_weight", "teacher_weight")}),
        "logits of one rank": lambda: fastkd.logit_kl(logits if first else logits[0], logits, vocab_group=group),
        "no group": lambda: linear(vocab_group="world"),
        "impl": lambda: linear(impl="fast" if first else "auto"),
    }  # fmt: skip
    calls |= _dtensor_errors(x, rank, linear)
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "nothing"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    assert linear().isfinite()  # and the group still works
    return found


def _dtensor_errors(x: Inputs, rank: int, linear: Callable[..., Tensor]) -> dict[str, Callable[[], Any]]:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh, other = init_device_mesh("cpu", (RANKS,)), init_device_mesh("cpu", (1, RANKS))
    alone = [dist.new_group([i]) for i in range(RANKS)]
    heads = {name: distribute_tensor(x[name], mesh, [Shard(0)]) for name in ("student_weight", "teacher_weight")}
    whole = distribute_tensor(x["student_weight"], mesh, [Replicate()])
    grid = distribute_tensor(x["student_weight"], other, [Replicate(), Shard(0)])
    hidden = distribute_tensor(x["student_hidden"], mesh, [Shard(0)])
    return {
        "one DTensor": lambda: linear(vocab_group=None, student_weight=heads["student_weight"]),
        "replicated head": lambda: linear(vocab_group=None, **{**heads, "student_weight": whole}),
        "two-dimensional mesh": lambda: linear(vocab_group=None, **{**heads, "student_weight": grid}),
        "sharded hidden": lambda: linear(vocab_group=None, **heads, student_hidden=hidden),
        "another group": lambda: linear(**heads, vocab_group=alone[rank]),
        "no member": lambda: linear(vocab_group=alone[(rank + 1) % RANKS]),
        "FSDP": lambda: linear(
            vocab_group=None,
            **heads,
            student_hidden=torch.randn(24, 12, generator=torch.Generator().manual_seed(rank + 7)),
        ),
    }


def _traffic(_: int) -> dict[str, list[tuple[str, int]]]:
    """The collectives of a call and its backward pass, with the bytes that this rank gives to each."""
    found = {}
    for name, options in {
        "forward_kl": {"divergence": "forward_kl"},
        "jsd": {"divergence": "jsd", "labels": lambda x: torch.zeros(24, dtype=torch.long), "ce_weight": 1.0},
        "none": {"divergence": "tvd", "reduction": "none"},
    }.items():
        case = Case(name, LINEAR_KL, SPLITS[RANKS][0], options=options, dtype=torch.bfloat16)
        calls: list[tuple[str, int]] = []

        def counted(function: Callable, calls: list[tuple[str, int]] = calls, given: int = 0) -> Callable:
            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any):
                calls.append((function.__name__, args[given].nbytes))
                return function(*args, **kwargs)

            return wrapper

        plain = dist.all_gather, dist.all_reduce
        dist.all_gather, dist.all_reduce = counted(plain[0], given=1), counted(plain[1])
        try:
            _call(case, dist.group.WORLD)
        finally:
            dist.all_gather, dist.all_reduce = plain
        found[name] = calls
    return found


# ---- in their parent ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank has found."""
    folder = tmp_path_factory.mktemp("ranks")
    return in_groups(folder, _call, cases, {"errors": _errors, "traffic": _traffic})


def _together(case: Case, name: str, parts: list[Tensor]) -> Tensor:
    """The gradient of an input from those of the ranks' shards; of replicated ones they have to be the same."""
    if name.endswith("hidden"):
        assert all(torch.equal(part, parts[0]) for part in parts)
        return parts[0]
    return torch.cat(parts, -1 if name.endswith("logits") else 0)


def _check_loss(got: Tensor, wanted: Tensor, bound: float) -> None:
    """To a relative error; a divergence of 1e-13 is as good as float64 knows a sum of exponentials."""
    assert torch.equal(got.isinf(), wanted.isinf())
    error = (got - wanted).double().abs().nan_to_num(0)  # of infinities
    assert (error <= bound * wanted.abs().nan_to_num(0, posinf=0) + 1e-15).all()


def _check(case: Case, found: list[tuple[Tensor, Inputs, dict[str, Tensor]]]) -> None:
    inputs, options = case.make()
    losses, gradients, metrics = zip(*found, strict=True)
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    for name, x in _metrics(case.op, inputs, options).items():
        assert all(torch.equal(told[name], metrics[0][name]) for told in metrics)
        assert torch.allclose(metrics[0][name], x, rtol=1e-6, atol=1e-6), name
    one, one_gradients = value_and_gradients(case.op, inputs, **options)
    double, rounding = case.dtype == torch.float64, ROUNDING[case.dtype]
    loss_bound, bound = (1e-12, 4e-11) if double else (1e-6, 1e-5)
    _check_loss(losses[0], one, loss_bound)
    whole = {name: _together(case, name, [g[name] for g in gradients]) for name in one_gradients}
    errors = dict.fromkeys(whole, 0.0)  # of one process
    if case.exact:
        options.pop("workspace_mb", None)
        wanted, wanted_gradients = _oracle(case, inputs, options)
        # near convergence an oracle that takes logarithms of probabilities has few digits of the loss itself
        if case.regime is not NEAR:
            _check_loss(losses[0].double(), wanted, loss_bound)
        for name, gradient in whole.items():
            errors[name] = distance(one_gradients[name], wanted_gradients[name])
            assert distance(gradient, wanted_gradients[name]) <= max(bound, 1.1 * errors[name]) + rounding, name
    for name, gradient in whole.items():
        assert gradient.dtype == inputs[name].dtype
        one_gradient, known = one_gradients[name], one_gradients[name].isfinite()
        assert torch.equal(gradient.isfinite(), known), name  # of an infinite divergence there is none
        gradient, one_gradient = (x.masked_fill(~known, 0) for x in (gradient, one_gradient))
        # where one process has few digits, of models far apart, neither have they all in common
        assert distance(gradient, one_gradient) <= max(bound / 10, errors[name] / 10) + 2 * rounding, name


def _oracle(case: Case, inputs: Inputs, options: dict[str, Any]) -> tuple[Tensor, Inputs]:
    """That of scores which are masked in both models sees very low ones instead: it has no answer to -inf."""
    if case.change is not mask_both:
        return oracle(case.op, inputs, **options)
    loss, gradients = oracle(case.op, {name: x.clamp_min(-1e9) for name, x in inputs.items()}, **options)
    loss[3] = 0  # nothing is left of this row
    gradients["student_logits"][3] = 0
    return loss, gradients


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.long
def test_results_are_those_of_the_whole_vocabulary(found: list[dict[str, Any]], ranks: int):
    """On every rank the same loss to the bit; against one process, and against the oracle in float64."""
    failed = {}
    for case in cases(ranks):
        try:
            _check(case, [rank["results"][ranks][case.name] for rank in found if ranks in rank["results"]])
        except AssertionError as error:
            failed[case.name] = str(error).splitlines()[:3]
    assert not failed


# What every rank raises, or first the rank 0 and then the others, or the other way round.
ALONE = "RuntimeError: vocab_group: the arguments of rank {} have failed a check"
SAME = ": expected the same on every rank .* rank 1 is not rank 0's. If it is FSDP .* fastkd.head\\(model, .*first"
GATHERED = ".*; fastkd.head\\(model\\) gathers a head that FSDP has sharded"
KEYWORDS = "ValueError: vocab_group: expected the same keywords, .* those of rank 1 are not rank 0's"
ERRORS: dict[str, str | tuple[str, str]] = {
    "keyword of one rank": (ALONE.format(1), "ValueError: divergence: expected one of .* got 'jds'"),
    "no tensor on one rank": ("TypeError: student_hidden: expected a tensor, got NoneType", ALONE.format(0)),
    "bias of one rank": ("ValueError: student_bias: expected shape \\[70\\], got \\[5\\]", ALONE.format(0)),
    "impl": ("ValueError: impl: expected one of auto, .* got 'fast'", ALONE.format(0)),
    "logits of one rank": (ALONE.format(1), "ValueError: teacher_logits: expected shape"),
    "other keywords": KEYWORDS + ".*'temperature': [123].0",
    "other reduction": KEYWORDS + ".*'reduction'",
    "other gradients": KEYWORDS + ".*'gradients'",
    "tokens": "ValueError: vocab_group: expected as many tokens on every rank, got 20 on rank 0 and 21 on 1",
    "hidden": "ValueError: student_hidden" + SAME,
    "teacher hidden": "ValueError: teacher_hidden" + SAME,
    "labels": "ValueError: labels" + SAME,
    "weight": "ValueError: weight" + SAME,
    "normalizer": "ValueError: normalizer" + SAME,
    "FSDP": "ValueError: student_hidden" + SAME,
    "label range": "ValueError: labels: expected values in \\[0, 203\\) or ignore_index=-100, got 203",
    "does not tile": "ValueError: vocab_group: expected shards .* does not tile: on rank 0 the student has columns "
    "\\[0, 132\\) and the teacher \\[0, 70\\) of 203",
    "no columns": "ValueError: vocab_group: expected a vocabulary of at least one column",
    "no group": "TypeError: vocab_group: expected a torch.distributed.ProcessGroup or None, got str",
    "no member": "ValueError: vocab_group: expected a group that this process is a member of",
    "one DTensor": "ValueError: teacher_weight: expected a DTensor .* as student_weight is one, got a tensor; give "
    "vocab_group" + GATHERED,
    "replicated head": "ValueError: student_weight: expected placements \\(Shard\\(0\\),\\), .* got \\(Replicate"
    + GATHERED,
    "two-dimensional mesh": "ValueError: student_weight: .* over a mesh of shape \\[1, 3\\]" + GATHERED,
    "sharded hidden": "ValueError: student_hidden: expected a tensor or a DTensor of placements Replicate\\(\\)",
    "another group": "ValueError: student_weight: expected a mesh of the ranks \\[[012]\\], .* got \\[0, 1, 2\\]",
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.long
def test_an_error_on_one_rank_is_one_on_all(found: list[dict[str, Any]], name: str):
    expected = ERRORS[name]
    first, others = (expected, expected) if isinstance(expected, str) else expected
    for rank, wanted in zip(found, (first, others, others), strict=True):
        assert re.match(wanted, rank["errors"][name]), rank["errors"][name]
    assert all(rank["errors"].keys() == ERRORS.keys() for rank in found)


@pytest.mark.long
def test_what_a_rank_sends(found: list[dict[str, Any]]):
    """104 bytes a call; a token 56, 24 where the divergence has no closed form, 4 for a number of its gradient.

    And 48 for metrics, for which there is another call, without gradient.
    """
    told = ("all_gather", 24 * 48)
    facts, gathered, reduced, gradient = 104, 24 * 56, 24 * 24, 24 * 12 * 4
    for rank in found:
        assert rank["traffic"] == {
            "forward_kl": [
                *[("all_gather", facts), ("all_gather", gathered), ("all_reduce", gradient)],
                *[("all_gather", facts), ("all_gather", gathered), told],
            ],
            "jsd": [
                ("all_gather", facts),
                ("all_gather", gathered),
                ("all_reduce", reduced),
                ("all_reduce", gradient),
                *[("all_gather", facts), ("all_gather", gathered), ("all_reduce", reduced), told],
            ],
            "none": [
                ("all_gather", facts),
                *[("all_gather", gathered), ("all_reduce", reduced)] * 2,
                ("all_reduce", gradient),
                *[("all_gather", facts), ("all_gather", gathered), ("all_reduce", reduced), told],
            ],
        }


# ---- without other processes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [LINEAR_KL, LOGIT_KL], ids=["linear_kl", "logit_kl"])
def test_a_group_of_one_is_no_group(op: Op, tmp_path: Path):
    module = fastkd.nn.LinearKLLoss if op is LINEAR_KL else fastkd.nn.LogitKLLoss
    inputs = to(op.make(UNRELATED), torch.float32)
    with group_of_one(tmp_path) as group:
        for divergence in DIVERGENCES:
            alone, gradients = value_and_gradients(op, inputs, divergence=divergence)
            loss, got = value_and_gradients(op, inputs, divergence=divergence, vocab_group=group)
            assert torch.equal(loss, alone)
            assert torch.equal(module(divergence=divergence, vocab_group=group)(**inputs), alone)
            for name, gradient in got.items():
                assert distance(gradient, gradients[name]) <= 1e-6
    for make in (module, lambda vocab_group: op.function(**inputs, vocab_group=vocab_group)):
        with pytest.raises(RuntimeError, match=r"vocab_group: expected an initialised torch.distributed"):
            make(vocab_group=group)


@over_fused
def test_a_label_in_another_shard_adds_its_softmax_alone(backend: str):
    """And any other label out of range makes the row's gradient NaN, as ever."""
    student, teacher = (x.float() for x in UNRELATED.logits(4, 33))
    labels, coefficient = torch.tensor([5, ELSEWHERE, -1, 33]), torch.ones(4, dtype=torch.float64)
    objective = (divergence_code("forward_kl"), 0.5, 1.0, 0.0, 1.0)
    with running_on(backend) as (_, device):
        x, t, labels, coefficient = (tensor.to(device) for tensor in (student, teacher, labels, coefficient))
        loss, stats, gradient = torch.empty_like(coefficient), coefficient.new_empty(4, 7), torch.empty_like(x)
        divergence_rows(x, t, coefficient, labels, loss, stats, None, *objective)
        divergence_rows(x, t, coefficient, labels, None, stats, gradient, *objective)
    wanted = student.double().softmax(1)
    wanted[0, 5] -= 1
    assert loss.isnan().tolist() == [False, True, True, True]
    assert distance(gradient[:2], wanted[:2]) <= 1e-6
    assert gradient[2:].isnan().any(1).all()


def test_opcheck():
    student, teacher = (x.float() for x in UNRELATED.logits(4, 33))
    coefficient, labels = torch.tensor([1.0, 0.5, 0.0, 2.0]).double(), torch.tensor([0, ELSEWHERE, 3, 32])
    stats, sums = coefficient.new_empty(4, 7), coefficient.new_empty(4, 3)
    objective = (divergence_code("jsd"), 0.3, 2.0, 0.6, 0.4)
    op, rows = torch.ops.fastkd.divergence_rows.default, (student, teacher, coefficient, labels)
    opcheck(op, (*rows, None, stats, None, *objective))
    op(*rows, None, stats, None, *objective)
    opcheck(op, (*rows, None, stats, None, *objective), {"sums": sums})


def test_labels_count_from_the_first_column_of_a_shard():
    constants = Objective("forward_kl", 0.5, 1.0, 1.0, 1.0)
    labels = torch.tensor([-1, 0, 2, 3, 4, 5, 6, 9])
    shards = [VocabularyShard(None, rank, (3, 0, 4), (3, 0, 2), constants) for rank in range(3)]  # type: ignore[arg-type]
    e = ELSEWHERE
    assert shards[0].local_columns(labels).tolist() == [-1, 0, 2, e, e, e, e, -1]
    assert shards[1].local_columns(labels).tolist() == [-1, e, e, e, e, e, e, -1]
    assert shards[2].local_columns(labels).tolist() == [
        -1,
        e,
        e,
        0,
        1,
        2,
        3,
        -1,
    ]  # two of which the teacher has none of
    assert [shard.widest for shard in shards] == [4, 4, 4]


def test_a_checksum_tells_what_ranks_must_not_differ_in():
    """Masks of zeros and ones above all, whose numbers differ in a few bits and in their order alone."""
    mask = torch.cat([torch.ones(1024), torch.zeros(1024)])
    alike = [mask, mask.flip(0), 2 * mask, torch.zeros(2048), torch.zeros(2047), mask.long(), mask.flip(0).long(), None]
    sums = [_checksum(x, torch.device("cpu")).item() for x in alike]
    assert len(set(sums)) == len(alike)
    assert _checksum(mask.clone(), torch.device("cpu")).item() == sums[0]
