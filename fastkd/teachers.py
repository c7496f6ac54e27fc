"""Teachers that are known by the top of their distributions: some ids and log-probabilities for each token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import INTEGERS, as_number, check_choice, check_same_device, check_tensor, values_are_at_hand

__all__ = ["TAILS", "TopK"]

TAILS = ("bucket", "ignore", "renormalize", "conditional")
# Half a step of bfloat16 at 1: what a log-probability of that size may be off by rounding. Those in float32 have often
# been 16-bit numbers before, so it is one number for all dtypes.
_ROUNDING = 2.0**-8
# Of a tail that nobody has measured. Where rounded probabilities sum to 1 or more it is not known to be empty, and with
# a mass of 0 it would make a reverse KL infinite.
_LEAST = 1e-12


@dataclass(frozen=True, eq=False)
class TopK:
    """A teacher of which some tokens' probabilities are known, as servers and caches give them.

    The vocabulary falls into K + 1 categories: each of the K ids, and the tail, which is all the others. How the tail
    counts is the question.

    Args:
        indices: [..., K] integers, ids in the vocabulary, none twice in a row. Ids that the student's vocabulary does
            not have are fine, and count as the tail. -1 pads rows that know fewer.
        log_probs: [..., K] float32, float64, float16 or bfloat16: natural logarithms of probabilities. An entry of -inf
            is padding too, whatever its id. Constants, whatever their ``requires_grad``. A row's probabilities sum to
            at most 1. As rounding to bfloat16 may take each log-probability off by a relative 2^-8, the sum may pass 1
            by 2^-8 (1 + the entropy of the row's entries) in any dtype, and a log-probability 0 by 2^-8; "bucket"
            divides a sum above 1 by itself.
        tail: ``"bucket"`` compares the masses of the tails too: any divergence, and never more than that of the whole
            distributions. ``"ignore"`` takes the probabilities as they are and leaves the tail out (``forward_kl`` and
            ``skew_kl`` alone). ``"renormalize"`` does so with probabilities divided by their sum. ``"conditional"``
            renormalises those of both models over the ids: any divergence.
        tail_log_prob: [...] float, the tail's log-probability for ``"bucket"``; by default what the ids' leave to 1,
            which has few digits where they leave little, and is 1e-12 at least. -inf where nothing is left.
        temperature: at which the probabilities are, > 0. A loss of another temperature takes each of the K + 1
            probabilities to the power of the temperatures' quotient and renormalises them, which is an approximation:
            what is inside the tail is not known.

    Raises:
        ValueError, TypeError: for arguments that do not fit. Values are looked at by the losses, and on CPUs alone.

    A row without an entry is a token of which the teacher says nothing: its divergence is 0.
    """

    indices: Tensor
    log_probs: Tensor
    tail: str = "bucket"
    tail_log_prob: Tensor | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_tensor("TopK.indices", self.indices)
        if self.indices.dtype not in INTEGERS:
            raise TypeError(f"TopK.indices: expected an integer dtype, got {self.indices.dtype}")
        if self.indices.dim() == 0 or self.indices.shape[-1] == 0:
            raise ValueError(f"TopK.indices: expected shape [..., K] with K > 0, got {list(self.indices.shape)}")
        check_tensor("TopK.log_probs", self.log_probs, shape=self.indices.shape, floating=True)
        check_same_device("TopK.log_probs", self.log_probs, self.indices.device, "the indices")
        check_choice("TopK.tail", self.tail, TAILS)
        temperature = as_number("TopK.temperature", self.temperature, "> 0", lambda x: 0 < x < float("inf"))
        object.__setattr__(self, "temperature", temperature)
        if self.tail_log_prob is not None:
            if self.tail != "bucket":
                raise ValueError(f'TopK.tail_log_prob: only used with tail="bucket", got tail={self.tail!r}')
            check_tensor("TopK.tail_log_prob", self.tail_log_prob, shape=self.shape, floating=True)
            check_same_device("TopK.tail_log_prob", self.tail_log_prob, self.indices.device, "the indices")

    @property
    def shape(self) -> torch.Size:
        """The leading shape [...], that of the tokens."""
        return self.indices.shape[:-1]

    # ---- for the losses ---------------------------------------------------------------------------------------------

    def check(self, leading: torch.Size, device: torch.device) -> None:
        """Raises unless it goes with student tensors of shape [*leading, any], and holds distributions."""
        check_tensor("TopK.indices", self.indices, shape=[*leading, None])
        check_same_device("TopK.indices", self.indices, device)
        if values_are_at_hand(self.indices) and values_are_at_hand(self.log_probs):
            self._check_values()

    def _check_values(self) -> None:
        indices, log_probs = self.indices.long(), self.log_probs.detach().double()
        if (indices < -1).any():
            raise ValueError(
                f"TopK.indices: expected ids >= 0, or -1 for padding, got {indices[indices < -1][0].item()}"
            )
        _check_log_probs("TopK.log_probs", log_probs[indices >= 0])
        log_probs = log_probs.masked_fill(indices < 0, -torch.inf)
        ids = indices.masked_fill(log_probs == -torch.inf, -1).sort(-1).values
        twice = ids[..., 1:][(ids[..., 1:] == ids[..., :-1]) & (ids[..., 1:] >= 0)]
        if len(twice):
            raise ValueError(f"TopK.indices: expected no id twice in a row, got {twice[0].item()} twice")
        if self.tail_log_prob is not None:
            tail = self.tail_log_prob.detach().double()
            _check_log_probs("TopK.tail_log_prob", tail)
            log_probs = torch.cat([log_probs, tail[..., None]], -1)
        masses = log_probs.exp()
        total = masses.sum(-1)
        slack = _ROUNDING * (1 + torch.where(masses > 0, -masses * log_probs, 0).sum(-1))
        if (total > 1 + slack).any():
            name, most = (
                ("log_probs", "at most 1") if self.tail_log_prob is None else ("tail_log_prob", "1 with the ids'")
            )
            raise ValueError(
                f"TopK.{name}: expected probabilities that sum to {most}, got {total[total > 1 + slack][0].item():.6g}"
            )

    def for_op(self, temperature: float, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the ops take, constants of T tokens: ids, their log-probabilities, and the tail's.

        Ids are [T, K] int64, and -1 for padding and where the student's vocabulary ends. The log-probabilities [T, K]
        are float64, as dividing them by their sum would round what a student that has nearly converged differs by: at
        this temperature, of the tail's convention, -inf where the id is -1. The tail's, [T], holds what is beyond the
        vocabulary; it is of use to "bucket" alone.
        """
        k = self.indices.shape[-1]
        ids = self.indices.reshape(-1, k).long()
        log_probs = self.log_probs.detach().reshape(-1, k).double().masked_fill(ids < 0, -torch.inf)
        if self.tail_log_prob is None:
            masses, most = log_probs.exp(), log_probs.amax(-1)
            # 1 less the largest keeps the digits of a row that is all but sure
            rest = (-most.expm1() - (masses.sum(-1) - most.exp())).clamp(min=_LEAST).log()
        else:
            rest = self.tail_log_prob.detach().reshape(-1).double()
        rest = rest.masked_fill((log_probs == -torch.inf).all(-1), 0)  # a row that says nothing
        power = self.temperature / temperature
        if self.tail == "bucket" or power != 1:
            log_probs, rest = log_probs * power, rest * power
            total = torch.logaddexp(log_probs.logsumexp(-1), rest)
            log_probs, rest = log_probs - total[:, None], rest - total
        ours = (ids >= 0) & (ids < vocabulary) & (log_probs > -torch.inf)
        rest = torch.logaddexp(rest, log_probs.masked_fill(ours, -torch.inf).logsumexp(-1))
        log_probs = log_probs.masked_fill(~ours, -torch.inf)
        if self.tail in ("renormalize", "conditional"):
            total = log_probs.logsumexp(-1, keepdim=True)
            log_probs = log_probs - total.masked_fill(total == -torch.inf, 0)
        return ids.masked_fill(~ours, -1), log_probs, rest


def _check_log_probs(name: str, log_probs: Tensor) -> None:
    bad = ~(log_probs <= _ROUNDING)  # NaN too
    if bad.any():
        raise ValueError(f"{name}: expected log-probabilities, which are <= 0, got {log_probs[bad][0].item()}")
