"""Vocabularies whose columns are spread over the ranks of a process group: tensor parallelism of the vocabulary.

A row of scores is then a shard on every rank. Each rank sums its shard up alone, as if it were the row; the ranks
gather these statistics, seven float64 numbers a token, and all compute the same row from them, in float64. With P_k and
Q_k the probabilities that teacher and student give the shard k, and D_k the divergence of what each of them makes of
the tokens inside it, the chain rule gives

    forward KL   D = sum_k P_k D_k + sum_k (P_k log(P_k / Q_k) + Q_k - P_k)

and reverse KL with the models exchanged. No share of either sum is negative, and Q_k - P_k, which add up to 0, make the
second small of second order where the models nearly agree, as D is: nothing cancels. The other divergences have no such
rule. Of those the ranks look at their shards once more, and add up three numbers a token.

What a rank sends for every token that is not dropped: 56 bytes gathered, 24 reduced for `jsd` and those after it; and
for linear_kl the gradient of the student's hidden states reduced, of all tokens, 4 bytes a number (8 in float64).

Ranks that disagree would wait for each other for ever, or be wrong in silence. So every call starts with a small gather
of facts, in which each rank also says whether its arguments have failed a check.

K ranks, R rows, V columns of a shard.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .. import distributed
from ..checks import Objective, TokenArguments
from ..quantized import QuantizedWeight
from .autograd import differentiable
from .drivers.divergence_rows import ELSEWHERE

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "NO_SHARD",
    "OBJECTIVE",
    "SHARD_ARGUMENTS",
    "Facts",
    "VocabularyShard",
    "agree",
    "group_by_name",
    "local_tensor",
    "local_tokens",
    "shard_on",
    "vocabulary_group",
]

# What an op on the vocabulary is given of an Objective: the divergence's code, then beta, temperature, kd_weight and
# ce_weight, and of a mix every divergence's weight.
OBJECTIVE = "int divergence, Tensor numbers"
# What an op over shards is given after the objective: "" and 0 where there are none. Its labels are those of the shard.
SHARD_ARGUMENTS = 'str vocab_group="", int widest_shard=0'
NO_SHARD = ("", 0)

# Of independent hidden states of unit variance the sums differ by about 1.4 of their norm; of copies that were rounded
# differently on the way, by less than a hundredth.
SAME_SUM = 0.05

# ---- whose shard is whose -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's part of a vocabulary, and everybody else's: with the arguments of a kernel for it."""

    group: ProcessGroup
    rank: int
    student_columns: tuple[int, ...]  # of every rank
    teacher_columns: tuple[int, ...] | None
    objective: Objective

    @property
    def vocabulary(self) -> int:
        """That both models share."""
        totals = [sum(columns) for columns in (self.student_columns, self.teacher_columns) if columns is not None]
        return min(totals)

    def _shared(self, columns: Sequence[int], rank: int) -> tuple[int, int]:
        """The part of the shared vocabulary that a rank's shard covers."""
        first = sum(columns[:rank])
        start, stop = (min(column, self.vocabulary) for column in (first, first + columns[rank]))
        return (start, stop) if start < stop else (0, 0)

    def check_tiles(self) -> None:
        """Raises unless on each rank both models' shards cover the same part of the shared vocabulary."""
        if self.vocabulary == 0:
            raise ValueError("vocab_group: expected a vocabulary of at least one column, got shards of none")
        for rank in range(len(self.student_columns)):
            covered = [self._shared(c, rank) for c in (self.student_columns, self.teacher_columns) if c is not None]
            if covered[0] != covered[-1]:
                raise ValueError(
                    "vocab_group: expected shards of student and teacher that cover the same columns on each rank, but "
                    f"the vocabulary does not tile: on rank {rank} the student has columns [{covered[0][0]}, "
                    f"{covered[0][1]}) and the teacher [{covered[1][0]}, {covered[1][1]}) of {self.vocabulary}; sizes "
                    f"are {list(self.student_columns)} and {list(self.teacher_columns or ())}"
                )

    @property
    def widest(self) -> int:
        """Columns of the student's largest shard, by which every rank cuts its tokens into chunks."""
        return max(self.student_columns)

    def local_columns(self, labels: Tensor) -> Tensor:
        """Labels, or ids, of the whole vocabulary as this rank's kernels take them; those out of range become -1."""
        start = sum(self.student_columns[: self.rank])
        stop = start + self.student_columns[self.rank]
        known = (labels >= 0) & (labels < sum(self.student_columns))
        here = (labels >= start) & (labels < stop)
        return torch.where(here, labels - start, torch.where(known, ELSEWHERE, -1))

    def for_op(self) -> tuple:
        """The trailing arguments of an op: those of the objective, the group's name, and `widest`."""
        return *self.objective.for_op(), self.group.group_name, self.widest


def group_by_name(name: str) -> ProcessGroup | None:
    """The process group of an op's argument; None for ""."""
    if not name:
        return None
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)  # type: ignore[arg-type]


# ---- DTensors -------------------------------------------------------------------------------------------------------


def _sharding_problem(x: Any, dim: int) -> str | None:
    """Why a DTensor is no shard of a vocabulary along `dim`, or None."""
    from torch.distributed.tensor import Shard

    placement = x.placements[0]
    if x.device_mesh.ndim == 1 and isinstance(placement, Shard) and placement.dim % x.dim() == dim % x.dim():
        return None
    return (
        f"expected placements (Shard({dim}),), the vocabulary over a one-dimensional mesh, got {x.placements} over a "
        f"mesh of shape {list(x.device_mesh.shape)}"
    )


def local_tensor(name: str, x: Any, shard_dim: int | None = None) -> Any:
    """What this rank holds of a DTensor, as autograd knows it; anything else passes.

    Raises ValueError unless it is sharded along `shard_dim`, or a whole copy for None.
    """
    if not distributed.is_dtensor(x):
        return x
    if shard_dim is not None:
        problem = _sharding_problem(x, shard_dim)
    else:
        whole = all(placement.is_replicate() for placement in x.placements)
        problem = None if whole else f"expected a tensor or a DTensor of placements Replicate(), got {x.placements}"
    if problem is not None:
        raise ValueError(f"{name}: {problem}")
    return x.to_local()


def local_tokens(weight: Any, labels: Any, normalizer: Any, ignore_index: Any, reduction: Any) -> TokenArguments:
    """The keywords of tokens as this rank holds them, and as autograd knows them."""
    given = {"weight": weight, "labels": labels, "normalizer": normalizer}
    local = {name: differentiable(local_tensor(name, x)) for name, x in given.items()}
    return TokenArguments(ignore_index=ignore_index, reduction=reduction, **local)


def vocabulary_group(vocab_group: object, heads: Mapping[str, Any], dim: int) -> ProcessGroup | None:
    """The group over which the heads' vocabulary is spread along `dim`: as given, or that of heads that are DTensors.

    None where there is neither. Raises ValueError where some heads are DTensors and show no group, or some are not.
    """
    if vocab_group is not None:
        distributed.check_group(vocab_group, "vocab_group")
        return vocab_group  # type: ignore[return-value]
    sharded = {name: x for name, x in heads.items() if distributed.is_dtensor(x)}
    if not sharded:
        return None
    # an FSDP module's own weights are DTensors, too; their ranks have different data
    by_fsdp = "" if dim else "; fastkd.head(model) gathers a head that FSDP has sharded"
    for name, x in heads.items():
        problem = _sharding_problem(x, dim) if name in sharded else None
        if problem is not None:
            raise ValueError(f"{name}: {problem}{by_fsdp}")
        if name not in sharded and isinstance(x, (Tensor, QuantizedWeight)):
            raise ValueError(
                f"{name}: expected a DTensor of placements (Shard({dim}),), as {next(iter(sharded))} is one, got a "
                f"tensor; give vocab_group where it is this rank's shard{by_fsdp}"
            )
    group: ProcessGroup = next(iter(sharded.values())).device_mesh.get_group()
    return group


def shard_on(group: ProcessGroup, name: str, x: Any, dim: int) -> Any:
    """What this rank holds of a head: a tensor as it is, of a DTensor its shard along `dim`.

    Raises ValueError for a DTensor that is sharded otherwise, or over other ranks than the group's.
    """
    local = local_tensor(name, x, dim)
    if local is not x:
        ranks, others = (torch.distributed.get_process_group_ranks(g) for g in (group, x.device_mesh.get_group()))
        if ranks != others:
            raise ValueError(f"{name}: expected a mesh of the ranks {ranks}, those of the group, got {others}")
    return local


# ---- what ranks agree on --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What a rank's arguments say about those of others: equal on all ranks, but for the columns."""

    objective: Objective
    others: Mapping[str, object]  # what repr tells all about, by name
    student_columns: int
    teacher_columns: int | None
    tokens: TokenArguments
    student_hidden: Tensor | None  # [tokens, H]
    teacher_hidden: Tensor | None
    kept: Tensor  # [tokens] bool: what dropped tokens hold may differ
    topk: Tensor | None = None  # [any], all that a TopK holds

    # In the order of the numbers below: what ranks hold to the bit, and what they hold but for rounding.
    EXACT = ("labels", "weight", "normalizer", "TopK")
    ROUNDED = ("student_hidden", "teacher_hidden")

    def constants(self) -> dict[str, object]:
        return {**vars(self.objective), "ignore_index": self.tokens.ignore_index, **self.others}

    def numbers(self) -> Tensor:
        """[FACTS] int64: success, a checksum of constants, tokens, columns, and what tells tensors apart."""
        device = self.kept.device
        constants = zlib.crc32(repr(self.constants()).encode())
        teacher_columns = -1 if self.teacher_columns is None else self.teacher_columns
        given = [1, constants, self.kept.numel(), self.student_columns, teacher_columns]
        exact = [_checksum(vars(self.tokens).get(name, self.topk), device) for name in self.EXACT]
        rounded = [_sum_and_norm(getattr(self, name), self.kept) for name in self.ROUNDED]
        return torch.cat([torch.tensor(given, device=device), *exact, *rounded])


FACTS = 5 + len(Facts.EXACT) + 2 * len(Facts.ROUNDED)


def _checksum(x: Tensor | float | None, device: torch.device) -> Tensor:
    """[1] int64, another one for other numbers [n] or the same in another order, and for None."""
    if x is None:
        return torch.zeros(1, dtype=torch.int64, device=device)
    x = torch.as_tensor(x).detach().reshape(-1).to(device)
    x = x.double().view(torch.int64) if x.is_floating_point() else x.long()
    x = x + 1 + torch.arange(x.numel(), device=device) * 0x9E3779B97F4A7C1  # its place; products wrap around
    for shift, factor in ((32, 0x5851F42D4C957F2D), (29, 0x2545F4914F6CDD1D), (32, 1)):  # every bit reaches all others
        x = (x ^ (x >> shift)) * factor
    return (x.sum() * 2 + 1).view(1)


def _sum_and_norm(x: Tensor | None, kept: Tensor) -> Tensor:
    """[2] float64 of hidden states [tokens, H] that are kept, as bits."""
    if x is None:
        return torch.zeros(2, dtype=torch.int64, device=kept.device)
    x = x.detach()
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = torch.stack([x.sum(-1, dtype=dtype), torch.linalg.vector_norm(x, dim=-1, dtype=dtype)]).double()
    total, norm = rows.masked_fill(~kept, 0)
    return torch.stack([total.sum(), norm.norm()]).view(torch.int64)


def _as_floats(numbers: Sequence[int]) -> tuple[float, ...]:
    return struct.unpack(f"<{len(numbers)}d", struct.pack(f"<{len(numbers)}q", *numbers))


def _differs(name: str, rank: int) -> ValueError:
    return ValueError(
        f"{name}: expected the same on every rank that the vocabulary is spread over, but that of rank {rank} is not "
        "rank 0's. If it is FSDP that has sharded a head, its ranks hold different data: gather the head with "
        "fastkd.head(model, sharding='data') first"
    )


def _check_alike(ranks: list[list[int]], constants: dict[str, object]) -> None:
    """Raises, on every rank the same, where the ranks' facts disagree."""
    mine = ranks[0]
    for rank, other in enumerate(ranks):
        if other[1] != mine[1]:
            raise ValueError(
                "vocab_group: expected the same keywords, dtypes, widths and wanted gradients on every rank, but those "
                f"of rank {rank} are not rank 0's; this rank's are {constants}"
            )
        if other[2] != mine[2]:
            raise ValueError(
                f"vocab_group: expected as many tokens on every rank, got {mine[2]} on rank 0 and {other[2]} on {rank}"
            )
        for i, name in enumerate(Facts.EXACT, 5):
            if other[i] != mine[i]:
                raise _differs(name, rank)
        for i, name in enumerate(Facts.ROUNDED):
            at = 5 + len(Facts.EXACT) + 2 * i
            (total, norm), (other_total, _) = _as_floats(mine[at : at + 2]), _as_floats(other[at : at + 2])
            if abs(total - other_total) > SAME_SUM * norm:  # of NaN it is not
                raise _differs(name, rank)


Checked = TypeVar("Checked")


def agree(
    group: ProcessGroup | None, check: Callable[[], Checked], facts_of: Callable[[Checked], Facts]
) -> tuple[Checked, VocabularyShard | None]:
    """What `check` returns of this rank's arguments, and its shard, of which there is none without a group.

    Raises on all ranks where `check` raises on any, its error there and elsewhere a RuntimeError that names the rank,
    and where the ranks disagree. One gather, and on a GPU a wait for the device.
    """
    if group is None:
        return check(), None
    failed: Exception | None = None
    try:
        checked = check()
        facts = facts_of(checked)
        numbers = facts.numbers()
    except Exception as error:
        failed, numbers = error, torch.zeros(FACTS, dtype=torch.int64)
    ranks = distributed.gather_facts(numbers, group)
    if failed is not None:
        raise failed
    for rank, (succeeded, *_) in enumerate(ranks):
        if not succeeded:
            raise RuntimeError(f"vocab_group: the arguments of rank {rank} have failed a check; its error says which")
    _check_alike(ranks, facts.constants())
    student, teacher = (tuple(numbers_of_rank[i] for numbers_of_rank in ranks) for i in (3, 4))
    shard = VocabularyShard(
        group, distributed.rank_in(group), student, None if facts.teacher_columns is None else teacher, facts.objective
    )
    shard.check_tiles()
    facts.tokens.check_label_range(sum(student))
    return checked, shard
