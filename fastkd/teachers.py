"""Teachers that are known by the top of their distributions: some ids and log-probabilities for each token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import teacher_formats as formats
from . import teacher_scores as scores
from .checks import (
    INTEGERS,
    as_int,
    as_number,
    check_choice,
    check_same_device,
    check_tensor,
    is_finite,
    is_positive,
    values_are_at_hand,
)
from .heads import Head
from .quantized import QuantizedWeight

__all__ = ["TAILS", "WITHOUT_TAIL", "TopK"]

TAILS = ("bucket", "ignore", "renormalize", "conditional")
WITHOUT_TAIL = ("forward_kl", "skew_kl")
"""The divergences that "ignore" and "renormalize" serve: sums over the teacher's probabilities alone, to which a tail
without any adds nothing."""
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
    _checked: Any = field(default=None, init=False, repr=False)  # the tensors' versions when their values were checked

    def __post_init__(self) -> None:
        check_tensor("TopK.indices", self.indices)
        if self.indices.dtype not in INTEGERS:
            raise TypeError(f"TopK.indices: expected an integer dtype, got {self.indices.dtype}")
        if self.indices.dim() == 0 or self.indices.shape[-1] == 0:
            raise ValueError(f"TopK.indices: expected shape [..., K] with K > 0, got {list(self.indices.shape)}")
        check_tensor("TopK.log_probs", self.log_probs, shape=self.indices.shape, floating=True)
        check_same_device("TopK.log_probs", self.log_probs, self.indices.device, "the indices")
        check_choice("TopK.tail", self.tail, TAILS)
        object.__setattr__(self, "temperature", as_number("TopK.temperature", self.temperature, "> 0", is_positive))
        if self.tail_log_prob is not None:
            if self.tail != "bucket":
                raise ValueError(f'TopK.tail_log_prob: only used with tail="bucket", got tail={self.tail!r}')
            check_tensor("TopK.tail_log_prob", self.tail_log_prob, shape=self.shape, floating=True)
            check_same_device("TopK.tail_log_prob", self.tail_log_prob, self.indices.device, "the indices")

    # ---- made of logits -------------------------------------------------------------------------------------------

    @classmethod
    def from_logits(cls, logits: Tensor, k: int, *, tail: str = "bucket", temperature: float = 1.0) -> TopK:
        """The k likeliest ids of logits [..., V], with the exact mass of the others.

        Rows are taken in chunks: beside the logits nothing of their size is made, in any dtype.

        Args:
            logits: [..., V], float32, float64, float16 or bfloat16, of any stride.
            k: how many, at most V.
            tail: as of ``TopK``.
            temperature: of the softmax, > 0; the losses know that it has been applied.

        Raises:
            ValueError, TypeError: for arguments that do not fit.
        """
        vocabulary = _check_rows("logits", logits)
        k, temperature = _as_count("k", k, vocabulary), _as_temperature(temperature)
        check_choice("tail", tail, TAILS)
        return cls._joined(
            [scores.top([rows], k, temperature) for rows in scores.row_chunks(logits)], logits, tail, temperature
        )

    @classmethod
    def from_hidden(
        cls,
        hidden: Tensor,
        head: Tensor | Head,
        k: int,
        *,
        tail: str = "bucket",
        temperature: float = 1.0,
    ) -> TopK:
        """The k likeliest ids of a head, without its logits: scores are made a block at a time.

        They are summed up in float32 whatever the dtype of the operands, and never rounded to it.

        Args:
            hidden: [..., H], float32, float64, float16 or bfloat16.
            head: a ``fastkd.Head``, or its weight alone: [V, H], in the dtype of ``hidden``.
            k: how many ids, at most V.
            tail: as of ``TopK``.
            temperature: of the softmax, > 0; the losses know that it has been applied.

        Raises:
            ValueError, TypeError: for arguments that do not fit.
        """
        width = _check_rows("hidden", hidden)
        weight, bias, scale, softcap = head if isinstance(head, Head) else Head(head)
        if isinstance(weight, QuantizedWeight):
            weight.check("weight", width)
            weight = weight.to(hidden.dtype)
        else:
            check_tensor("weight", weight, shape=[None, width], floating=True)
        if weight.dtype != hidden.dtype:
            raise TypeError(f"weight: expected {hidden.dtype}, the dtype of hidden, got {weight.dtype}")
        check_same_device("weight", weight, hidden.device, "hidden")
        if bias is not None:
            check_tensor("bias", bias, shape=weight.shape[:1], floating=True)
            check_same_device("bias", bias, hidden.device, "hidden")
        scale = as_number("scale", scale, "that is finite", is_finite)
        softcap = None if softcap is None else as_number("softcap", softcap, "> 0", is_positive)
        k, temperature = _as_count("k", k, weight.shape[0]), _as_temperature(temperature)
        check_choice("tail", tail, TAILS)
        with torch.autocast(hidden.device.type, enabled=False):
            parts = [
                scores.top(scores.head_scores(rows, Head(weight, bias, scale, softcap)), k, temperature)
                for rows in scores.token_chunks(hidden)
            ]
        return cls._joined(parts, hidden, tail, temperature)

    @classmethod
    def sampled(
        cls, logits: Tensor, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> TopK:
        """n ids drawn from the softmax of logits [..., V], with replacement: each one's probability is its share.

        With them the gradient of ``forward_kl`` is on average that of the whole distribution, where the k likeliest
        alone lead elsewhere ("Sparse Logit Sampling", Anshumann et al., ACL 2025, arXiv 2503.16870). The rows have n
        entries, those that were drawn and padding, and the tail is ignored.

        Args:
            logits: [..., V], float32, float64, float16 or bfloat16, of any stride.
            n: how many draws.
            temperature: of the softmax, > 0; the losses know that it has been applied.
            generator: of random numbers, on the device of the logits.

        Raises:
            ValueError, TypeError: for arguments that do not fit.
        """
        _check_rows("logits", logits)
        n, temperature = _as_count("n", n), _as_temperature(temperature)
        drawn = [scores.draw(rows, n, temperature, generator) for rows in scores.row_chunks(logits)]
        return cls._joined(drawn, logits, "ignore", temperature)

    @classmethod
    def _joined(cls, parts: Sequence[Sequence[Tensor]], like: Tensor, tail: str, temperature: float) -> TopK:
        """Chunks of tokens, as one of the leading shape that `like` has."""
        whole = [torch.cat(chunks) for chunks in zip(*parts, strict=True)]
        ids, log_probs, *rest = (x.view((*like.shape[:-1], *x.shape[1:])) for x in whole)
        return cls(ids, log_probs, tail, rest[0] if tail == "bucket" else None, temperature)

    # ---- read of lists and files ------------------------------------------------------------------------------------

    @classmethod
    def from_lists(cls, indices: Any, log_probs: Any, *, tail: str = "bucket", temperature: float = 1.0) -> TopK:
        """Nested lists [..., K] of ids and of log-probabilities, padded where they are ragged, at every level.

        A batch of sequences of any length, with any number of entries for a token. None stands for a list of nothing.
        """
        return cls(*formats.ragged("TopK.from_lists", indices, log_probs), tail, None, temperature)

    @classmethod
    def from_vllm(cls, logprobs: Any, *, tail: str = "bucket", temperature: float = 1.0) -> TopK:
        """``prompt_logprobs`` or ``logprobs`` of vLLM: of a request, or a list of those of several requests.

        For each token a dict of ids, the values of which are vLLM's ``Logprob``, {"logprob": x} of its servers' JSON or
        numbers; or a list of {"token": "token_id:17", "logprob": x}. None, as for a prompt's first token, is a row
        without entries. A row is the distribution *of* its token, so it goes with the logits at the token before:
        ``logit_kl(logits[:, :-1], teacher[:, 1:])``. Sampling parameters or a ``logprobs_mode`` that change vLLM's
        log-probabilities change the teacher.
        """
        return cls(*formats.ragged("TopK.from_vllm", *formats.vllm_lists(logprobs)), tail, None, temperature)

    @classmethod
    def from_trl(cls, response: Mapping[str, Any], *, tail: str = "bucket", temperature: float = 1.0) -> TopK:
        """What TRL's vLLM server answers to ``get_sequence_logprobs``, in JSON or in base64, or its client returns.

        Rows are the distributions of the completions' tokens, [sequences, longest completion].
        """
        return cls(*formats.trl_response(response), tail, None, temperature)

    @classmethod
    def from_columns(
        cls,
        table: Any,
        indices: str,
        log_probs: str,
        mask: str | None = None,
        *,
        tail: str = "bucket",
        temperature: float = 1.0,
    ) -> TopK:
        """Columns of nested lists, by their names: of a dict of lists, or a table of pyarrow, pandas or datasets.

        Where ``mask``, a column of nested lists too, is 0, an entry is padding. axolotl writes ``target_token_ids``,
        ``target_logprobs`` and ``target_mask``, renormalised over the ids, which is ``tail="renormalize"``. DistillKit
        writes ``token_ids`` and ``top_values``; its compressed columns are not read.
        """
        return cls(*formats.columns(table, indices, log_probs, mask), tail, None, temperature)

    # ---- as of a tensor of tokens -----------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """The leading shape [...], that of the tokens."""
        return self.indices.shape[:-1]

    @property
    def known(self) -> Tensor:
        """[...] bool: the tokens that have an entry, for the losses' ``weight``."""
        return ((self.indices >= 0) & (self.log_probs > -torch.inf)).any(-1)

    def __len__(self) -> int:
        return len(self.indices[..., 0])

    def __getitem__(self, index: Any) -> TopK:
        """Some of the tokens, by an index into the leading shape."""
        rows = torch.arange(self.shape.numel(), device=self.indices.device).reshape(self.shape)[index]
        k = self.indices.shape[-1]
        return self._map(lambda x: x.reshape(-1, k)[rows], lambda x: x.flatten()[rows])

    def reshape(self, *shape: int) -> TopK:
        """With another leading shape of as many tokens."""
        k = self.indices.shape[-1]
        return self._map(lambda x: x.reshape((*shape, k)), lambda x: x.reshape(shape))

    def to(self, *args: Any, **kwargs: Any) -> TopK:
        """On another device, or with log-probabilities in another dtype: arguments are those of ``Tensor.to``."""
        log_probs = self.log_probs.to(*args, **kwargs)
        indices = self.indices.to(log_probs.device, non_blocking=kwargs.get("non_blocking", False))
        rest = None if self.tail_log_prob is None else self.tail_log_prob.to(*args, **kwargs)
        return replace(self, indices=indices, log_probs=log_probs, tail_log_prob=rest)

    def pin_memory(self) -> TopK:
        """In page-locked memory, as a DataLoader with ``pin_memory=True`` asks of what it loads."""
        return self._map(Tensor.pin_memory, Tensor.pin_memory)

    def _map(self, entries: Callable[[Tensor], Tensor], tokens: Callable[[Tensor], Tensor]) -> TopK:
        rest = None if self.tail_log_prob is None else tokens(self.tail_log_prob)
        return replace(self, indices=entries(self.indices), log_probs=entries(self.log_probs), tail_log_prob=rest)

    def __repr__(self) -> str:
        k, dtype, device = self.indices.shape[-1], self.log_probs.dtype, self.indices.device
        at = "" if self.temperature == 1 else f", temperature={self.temperature}"
        return f"TopK({list(self.shape)}, k={k}, tail={self.tail!r}{at}, {dtype}, {device})"

    # ---- for the losses ---------------------------------------------------------------------------------------------

    def check(self, leading: torch.Size, device: torch.device, kept: Callable[[], Tensor] | None = None) -> TopK:
        """Itself, but for what is no distribution in tokens that are not kept; raises unless it fits the student."""
        check_tensor("TopK.indices", self.indices, shape=[*leading, None])
        check_same_device("TopK.indices", self.indices, device)
        if not (values_are_at_hand(self.indices) and values_are_at_hand(self.log_probs)):
            return self
        given = [x for x in (self.indices, self.log_probs, self.tail_log_prob) if x is not None]
        states = None if any(x.is_inference() for x in given) else [x._version for x in given]
        if states is None or states != self._checked:  # once, unless somebody has written into them since
            try:
                self._check_values()
            except ValueError:
                if kept is None or not (dropped := ~kept()).any():
                    raise
                others = self._map(lambda x: x.masked_fill(dropped[..., None], -1), lambda x: x.masked_fill(dropped, 0))
                others._check_values()
                return others
            object.__setattr__(self, "_checked", states)
        return self

    def _check_values(self) -> None:
        indices = self.indices.long()
        padding = indices < 0
        log_probs = self.log_probs.detach().double().masked_fill(padding, -torch.inf)
        if indices.numel() and indices.amin() < -1:
            raise ValueError(
                f"TopK.indices: expected ids >= 0, or -1 for padding, got {indices[indices < -1][0].item()}"
            )
        _check_log_probs("TopK.log_probs", log_probs)
        ids = indices.masked_fill(log_probs == -torch.inf, -1).sort(-1).values
        twice = (ids[..., 1:] == ids[..., :-1]) & (ids[..., 1:] >= 0)
        if twice.any():
            raise ValueError(f"TopK.indices: expected no id twice in a row, got {ids[..., 1:][twice][0].item()} twice")
        if self.tail_log_prob is not None:
            tail = self.tail_log_prob.detach().double()
            _check_log_probs("TopK.tail_log_prob", tail)
            log_probs = torch.cat([log_probs, tail[..., None]], -1)
        masses = log_probs.exp()
        total = masses.sum(-1)
        slack = _ROUNDING * (1 + (masses * log_probs).nan_to_num_(0).sum(-1).neg())
        if self.tail_log_prob is None:
            name, most, bad = "log_probs", "at most 1", total > 1 + slack
        else:
            name, most, bad = "tail_log_prob", "1 with the ids'", (total - 1).abs() > slack
            bad &= (log_probs[..., :-1] > -torch.inf).any(-1)  # a row that says nothing says nothing of its tail
        if bad.any():
            raise ValueError(f"TopK.{name}: expected probabilities that sum to {most}, got {total[bad][0].item():.6g}")

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


def _check_rows(name: str, x: Tensor) -> int:
    """Checks a tensor [..., n] of rows, and returns n."""
    check_tensor(name, x, floating=True)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape [..., n] with n > 0, got {list(x.shape)}")
    return x.shape[-1]


def _as_count(name: str, count: int, most: int | None = None) -> int:
    count = as_int(name, count)
    if count < 1 or (most is not None and count > most):
        limit = "" if most is None else f" and at most the vocabulary's {most}"
        raise ValueError(f"{name}: expected at least 1{limit}, got {count}")
    return count


def _as_temperature(temperature: float) -> float:
    return as_number("temperature", temperature, "> 0", is_positive)
