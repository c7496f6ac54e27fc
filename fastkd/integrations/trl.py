"""TRL's trainers of distillation with fastkd's losses in place: the line that imports them changes, nothing else.

    from fastkd.integrations.trl import DistillationConfig, DistillationTrainer  # was: from trl import ...

Arguments, configs, data, generation and what is logged are TRL's. The losses are TRL's, too, to rounding: beta is the
teacher's share of the mixture, 0 and 1 are forward and reverse KL, and no divergence is multiplied by the temperature
squared. Only what they are computed from differs: hidden states and heads, of which logits are never made as a whole.
The page "From TRL" says where the two differ.

B sequences, L positions, C of them of a completion, H hidden width, V vocabulary, K ids that a server tells.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import versions

versions.require("trl")

import trl.trainer.distillation_trainer
import trl.trainer.sft_trainer
from transformers import TrainerCallback
from trl import DistillationConfig
from trl.experimental import gkd, server_distillation
from trl.experimental.gkd import GKDConfig
from trl.experimental.server_distillation import ServerDistillationConfig

from ..heads import PADDING, head
from ..ops.linear_kl import linear_kl
from ..ops.logit_kl import logit_kl
from ..states import hidden_states, targets
from ..teachers import TopK
from .conventions import generalized_jsd

__all__ = [
    "DistillationConfig",
    "DistillationTrainer",
    "GKDConfig",
    "GKDTrainer",
    "ServerDistillationConfig",
    "ServerDistillationTrainer",
]

# What TRL puts in a batch beside the inputs of a model.
NO_INPUTS = frozenset((
    "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask", "num_items_in_batch", "num_images",
    "num_tiles",
))  # fmt: skip

# ---- their conventions ----------------------------------------------------------------------------------------------


def _joined(inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """Of prompts and completions: what a model is given, and which tokens of the completions count [B, C]."""
    whole = {
        "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        **{name: x for name, x in inputs.items() if name not in NO_INPUTS},
    }
    counted = inputs["completion_mask"]
    return whole, counted * inputs["tool_mask"] if "tool_mask" in inputs else counted


# ---- what TRL refuses, and fastkd does not --------------------------------------------------------------------------


class _Any(int):
    """A vocabulary's size that is like every other."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


class _StudentOfAnySize(TrainerCallback):
    """Between TRL's loading of the student and its look at the vocabularies: that finds them alike."""

    config: Any = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.config = kwargs["model"].config.get_text_config()
        self.config.vocab_size = _Any(self.config.vocab_size)

    def undo(self) -> None:
        if self.config is not None:
            self.config.vocab_size = int(self.config.vocab_size)


@contextlib.contextmanager
def _adapters_on_heads() -> Iterator[None]:
    """Inside, TRL takes students whose head has an adapter, which the losses that it has read no gradient from."""
    modules: list[Any] = [trl.trainer.distillation_trainer, trl.trainer.sft_trainer]
    before = [module.BaseTunerLayer for module in modules]
    try:
        for module in modules:
            module.BaseTunerLayer = ()
        yield
    finally:
        for module, one in zip(modules, before, strict=True):
            module.BaseTunerLayer = one


# ---- what fastkd refuses --------------------------------------------------------------------------------------------


def _check_config(config: Any) -> None:
    if config.use_liger_kernel:
        raise ValueError(
            "args.use_liger_kernel: expected False, as fastkd's loss stands in the place of Liger's, got True; kernels "
            'of layers come with model_init_kwargs={"use_kernels": True}'
        )
    if config.deepspeed_plugin is not None:
        raise ValueError(
            "args.deepspeed: expected None, as DeepSpeed hides a sharded head from the loss, got a configuration; DDP "
            "and FSDP2 (fsdp_version: 2 of accelerate) are served"
        )


def _check_parallel(accelerator: Any) -> None:
    """Raises unless every process has whole sequences and the model or, by FSDP2, shards of it."""
    plugin, parallel = getattr(accelerator.state, "fsdp_plugin", None), accelerator.parallelism_config
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version: expected 2, got {plugin.fsdp_version}, which hides a sharded head from the loss"
        )
    spread = [name for name in ("tp", "cp", "sp") if getattr(parallel, f"{name}_size", 1) > 1]
    if spread:
        raise ValueError(
            f"parallelism_config: expected whole sequences and heads on each process, got {', '.join(spread)}; a loop "
            "of your own has fastkd.linear_kl(vocab_group=...) for a vocabulary over several ranks"
        )


def _shared_vocabulary(models: list[Any], processing_class: Any) -> int | None:
    """How many tokens both models have where that is less than one of them has, which has to be by padding alone."""
    sizes = [model.config.get_text_config().vocab_size for model in models]
    if len({*sizes}) == 1:
        return None
    tokens = len(getattr(processing_class, "tokenizer", processing_class))
    if not all(tokens <= size < tokens + PADDING for size in sizes):
        raise ValueError(
            f"teacher_model: expected the vocabulary of the student, whose tokenizer has {tokens} tokens, got heads of "
            f"{sizes[0]} (student) and {sizes[1]} rows: more than padding differs, as across tokenizers, for which TRL "
            "has the GOLDTrainer"
        )
    return min(sizes)


# ---- the trainers ---------------------------------------------------------------------------------------------------


class _OnFastkd:
    """What the trainers have in common: what they refuse, and the states that their losses are made of."""

    # of TRL's trainers, which come after this in the order of bases
    accelerator: Any
    generation_config: Any
    model: Any
    processing_class: Any
    remove_callback: Any
    teacher_model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(super().__init__).bind(*args, **kwargs)
        config = given.arguments.get("args")
        if config is not None:
            _check_config(config)
        student = _StudentOfAnySize()
        given.arguments["callbacks"] = [*(given.arguments.get("callbacks") or []), student]
        try:
            with _adapters_on_heads():
                super().__init__(*given.args, **given.kwargs)
        finally:
            student.undo()
        self.remove_callback(student)
        _check_parallel(self.accelerator)
        models = [self.model, *([] if self.teacher_model is None else [self.teacher_model])]
        with torch.no_grad():  # raises for one that is not known
            for model in models:
                head(model)
        self._vocabulary = _shared_vocabulary(models, self.processing_class)
        if self._vocabulary is not None:  # what pads one head is nothing that the other model can read
            padding = range(self._vocabulary, max(model.config.get_text_config().vocab_size for model in models))
            self.generation_config.suppress_tokens = [*(self.generation_config.suppress_tokens or []), *padding]

    def _states(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """What the heads of student and teacher are given, [B, L, H] each."""
        if self._vocabulary is not None and int(inputs["input_ids"].max()) >= self._vocabulary:
            raise ValueError(
                f"input_ids: expected tokens below {self._vocabulary}, the vocabulary that student and teacher share, "
                f"got {int(inputs['input_ids'].max())}, a row of padding of one of them"
            )
        student = hidden_states(model, **inputs)
        self.teacher_model.eval()
        with torch.no_grad():
            return student, hidden_states(self.teacher_model, **inputs)

    def _loss(self, model: Any, student: Tensor, teacher: Tensor | TopK, **options: Any) -> Any:
        its, teachers = head(model), None if isinstance(teacher, TopK) else head(self.teacher_model)
        with self.accelerator.autocast():  # in which the models have run
            return linear_kl(student, its, teacher, teachers, **options)

    def _with_outputs(self, loss: Tensor, model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """A loss beside the outputs of the student, with the logits that it was made without."""
        with torch.no_grad():
            return loss, model(**inputs)


class GKDTrainer(_OnFastkd, gkd.GKDTrainer):
    """TRL's ``GKDTrainer``, of which the arguments are, with fastkd's loss."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        student, teacher = self._states(model, given)
        aligned = targets(model, inputs["labels"], num_items_in_batch, processes=1)  # TRL's convention
        loss: Tensor = self._loss(model, student, teacher, **generalized_jsd(self.beta), **aligned)
        return self._with_outputs(loss, model, given) if return_outputs else loss

    @staticmethod
    def generalized_jsd_loss(
        student_logits: Tensor,  # [B, L, V]
        teacher_logits: Tensor,  # [B, L, V]
        labels: Tensor | None = None,  # [B, L], those of -100 are left out
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        num_items_in_batch: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of logits that exist, which training does not call: as TRL's, but for ``reduction="none"``."""
        rows = student_logits.shape[:-1].numel() if labels is None else int((labels != -100).sum())
        sizes = {"sum": 1, "mean": rows * student_logits.shape[-1]}
        sizes["batchmean"] = len(student_logits) if labels is None else rows
        if reduction not in sizes:
            raise ValueError(
                f'reduction: expected "batchmean", "sum" or "mean", got {reduction!r}; fastkd.logit_kl with '
                'reduction="none" has a loss for each token'
            )
        return logit_kl(
            student_logits, teacher_logits, labels=labels, **generalized_jsd(beta, temperature),
            normalizer=max(sizes[reduction], 1) if num_items_in_batch is None else num_items_in_batch,
        )  # fmt: skip


class DistillationTrainer(_OnFastkd, trl.DistillationTrainer):
    """TRL's ``DistillationTrainer``, of which the arguments are, with fastkd's loss."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        mode = "train" if self.model.training else "eval"
        if mode == "train" and inputs.get("num_items_in_batch") is not None:
            # counted over all processes, which average their gradients
            num_items_in_batch = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        whole, counted = _joined(inputs)
        completion = slice(-counted.shape[1] - 1, -1)  # a state tells of the next token
        student, teacher = (x[:, completion] for x in self._states(model, whole))
        loss, told = self._loss(
            model, student, teacher, **generalized_jsd(self.beta, self.temperature), weight=counted,
            normalizer=num_items_in_batch, return_metrics=True,
        )  # fmt: skip
        tokens = counted.sum()
        entropies = self.accelerator.gather_for_metrics(told["student_entropy"] * tokens).sum()
        tokens = self.accelerator.gather_for_metrics(tokens).sum()
        self._metrics[mode]["entropy"].append((entropies / tokens.clamp(min=1)).item())
        return (loss, None) if return_outputs else loss


class ServerDistillationTrainer(_OnFastkd, server_distillation.ServerDistillationTrainer):
    """TRL's ``ServerDistillationTrainer``, of which the arguments are, with fastkd's loss of a ``TopK``."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        whole, counted = _joined(inputs)
        start = inputs["prompt_ids"].shape[1]
        labels = whole["input_ids"].masked_fill(whole["attention_mask"] == 0, -100)
        labels[:, :start] = -100
        asked = {**whole, "labels": labels, "prompt_attention_mask": inputs["prompt_mask"]}
        told = self._get_teacher_token_logprobs_from_server(asked, start)
        length = told["actual_logprobs"].shape[1]  # of the longest completion that the server tells of
        counted = counted[:, :length]
        teacher = self._teacher(told, inputs["completion_ids"][:, :length], counted)
        student = hidden_states(model, **whole)[:, start - 1 : start - 1 + length]
        loss: Tensor = self._loss(
            model, student, teacher, weight=counted, **generalized_jsd(self.beta, self.temperature)
        )
        if self.model.training:  # a mean of this batch alone, of which the step adds up several
            loss = loss / self.current_gradient_accumulation_steps
        return self._with_outputs(loss, model, whole) if return_outputs else loss

    def _teacher(self, told: Mapping[str, Tensor], completion_ids: Tensor, counted: Tensor) -> TopK:
        """What the server told, of the ids that TRL compares: its likeliest, and those of the completion [B, C, K]."""
        how: dict[str, Any] = {
            "tail": "bucket" if self.loss_add_tail else "conditional", "temperature": self.temperature
        }  # fmt: skip
        likeliest, their_log_probs = told["topk_token_ids"], told["topk_logprobs"]
        if self.beta == 0:
            return TopK(likeliest, their_log_probs, **how)
        ids, log_probs = completion_ids.unsqueeze(-1), told["actual_logprobs"].unsqueeze(-1)
        if self.beta < 1:
            ids = torch.cat([likeliest, ids.masked_fill(ids == likeliest, -1)], dim=-1)
            log_probs = torch.cat([their_log_probs, log_probs], dim=-1)
        missing = int((~log_probs.isfinite().all(-1) & counted.bool()).sum())
        if missing:
            raise ValueError(
                f"teacher: expected log-probabilities of all {int(counted.sum())} tokens of the completions and of the "
                f"server's likeliest, got none for {missing}"
            )
        return TopK(ids, log_probs, **how)
