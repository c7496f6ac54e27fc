"""DistillTrainer: transformers' Seq2SeqTrainer with a fastkd objective in place of the model's own loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, Seq2SeqTrainer

from .callbacks import LossBar, StepTimer
from .data import EpochSampler
from .evaluate import held_out_metrics, token_scores
from .objectives import Method, vocabulary_loss
from .optimizer import set_embedding_rate


@contextlib.contextmanager
def without_head(model: Any) -> Iterator[None]:
    """Make `model(...)` return as its "logits" what the head would have been given: hidden states [B, L, H].

    The head becomes the identity while the context lasts. So every scaling of the decoder's output is applied, no
    [B, L, V] tensor is made, no model code is edited, and it works inside DDP, whose wrapper runs as usual.
    """
    head = model.get_output_embeddings()
    before = vars(head).get("forward")  # accelerate's hooks, for one, set a forward on the instance
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward
        if before is not None:
            head.forward = before


class DistillTrainer(Seq2SeqTrainer):
    """Trains `model` by `method`; everything else (checkpoints, resuming, precision, DDP) is Seq2SeqTrainer's.

    method: a row of METHODS. teacher: a T5 with the student's vocabulary, or None if the method needs none; it is
    frozen, kept in evaluation mode and never part of a checkpoint. temperature: overrides the method's.
    workspace_mb: see `fastkd.linear_kl`. embedding_learning_rate: see `optimizer.set_embedding_rate`;
    None gives the embedding the rate of all other weights.
    Batches hold input_ids and labels, and attention_mask where there is padding.
    Evaluation gives eval_loss (nats per target token, plain cross-entropy for every method) and eval_token_accuracy.
    Raises ValueError if the method needs a teacher and none is given.
    """

    def __init__(
        self,
        *args: Any,
        method: Method,
        teacher: Any = None,
        temperature: float | None = None,
        workspace_mb: float | None = None,
        embedding_learning_rate: float | None = None,
        **kwargs: Any,
    ):
        kwargs["compute_metrics"] = held_out_metrics
        super().__init__(*args, **kwargs)
        if method.needs_teacher and teacher is None:
            raise ValueError(f"teacher: this method ({method.summary}) needs one, got None")
        self.method = method
        self.temperature = temperature
        self.workspace_mb = workspace_mb
        self.embedding_learning_rate = embedding_learning_rate
        self.teacher = None
        if method.needs_teacher:
            self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self._timer = StepTimer()
        self.add_callback(self._timer)
        # Makes the Trainer count the target tokens of all accumulated batches, and not divide our loss again.
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return EpochSampler(len(dataset), self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return transformers' optimizer, with the embedding's own learning rate if there is one."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.embedding_learning_rate is not None:
            set_embedding_rate(optimizer, self.model, self.embedding_learning_rate)
        return optimizer

    def _hidden(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (the head's input [B, L, H], the head's weight [V, H]) of a student (possibly wrapped) or teacher."""
        bare = self.accelerator.unwrap_model(model)
        # Labels stay out: the model would compute its own loss from them.
        inputs = {name: value for name, value in inputs.items() if name != "labels"} | {
            "decoder_input_ids": bare.prepare_decoder_input_ids_from_labels(inputs["labels"]),
            "use_cache": False,
        }
        with without_head(bare):
            return model(**inputs).logits, bare.get_output_embeddings().weight

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the method's loss on one (micro-)batch; num_items_in_batch counts the whole batch's target tokens."""
        teacher_side: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        with self.accelerator.autocast():
            if self.teacher is not None:
                with torch.no_grad():
                    teacher_side = self._hidden(self.teacher, inputs)
            student_side = self._hidden(model, inputs)
            loss = vocabulary_loss(
                self.method,
                *student_side,
                *teacher_side,
                inputs["labels"],
                temperature=self.temperature,
                normalizer=num_items_in_batch,
                workspace_mb=self.workspace_mb,
            )
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients, the normalizer is global already
        return (loss, {"hidden": student_side[0]}) if return_outputs else loss

    @torch.no_grad()
    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None, **_: Any
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Return (None, token scores [B, L, 2], labels [B, L]); held_out_metrics averages them over all batches."""
        inputs = self._prepare_inputs(inputs)
        with self.accelerator.autocast():
            scores = token_scores(*self._hidden(model, inputs), inputs["labels"])
        return None, scores, inputs["labels"]

    @property
    def seconds_per_step(self) -> float | None:
        """Seconds per optimiser step of the last `train()`, data included and held-out evaluations not."""
        return self._timer.seconds_per_step

    def show_progress(self, title: str) -> None:
        """Show one bar with the latest losses in place of a line of text per log entry."""
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if not self.args.disable_tqdm:
            self.add_callback(LossBar(title))
