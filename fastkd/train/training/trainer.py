"""DistillTrainer: transformers' Trainer with a fastkd objective in place of the model's own loss."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from transformers import PrinterCallback, ProgressCallback, Trainer

from ..common.errors import RunError
from ..common.family import PLACES, STACKS
from ..common.processes import count
from ..data.examples import Chunks, EpochSampler
from ..judge.evaluate import held_out_metrics, token_scores
from ..models.anatomy import kind, logits
from ..models.sharding import is_sharded
from ..objectives.methods import Method, as_method
from ..objectives.mixup import Mixup
from ..objectives.terms import Batch, aligned_labels, losses, valid_positions
from ..teaching.cached import CachedTeacher, Numbered
from .callbacks import LossBar, LossLines, StepTimer
from .forward import Needs, compiled_blocks, forward, needs
from .guards import check_served, check_teacher
from .optimizer import gradient_norms, set_own_rate
from .parallel import count_rows, settle_fsdp, shard_student
from .resumable import CheckpointingTrainer


class DistillTrainer(CheckpointingTrainer):
    """Trains `model` by `method`; everything else (data, collator, checkpoints, precision, DDP) is transformers'.

    method: the name of a row of METHODS, a `Method`, which may be a row with other settings by `dataclasses.replace`,
    or weights of terms, as {"ce": 0.5, "logit_kl": 0.5}. teacher: a model of a known family with the student's
    vocabulary, which a method that needs none leaves as it is; else it is moved to the student's device, frozen, kept
    in evaluation mode and never part of a checkpoint. Or a `teaching.cached.CachedTeacher`, of `Numbered` data.
    workspace_mb: see `fastkd.linear_kl`. embedding_learning_rate: see `optimizer.set_own_rate`; None gives the
    embedding the rate of all other weights. projection_learning_rate: that of the matrix by which "hidden_linear"
    projects the student's hidden states to the teacher's width, one for all layers: `model.hidden_projection`, as a
    part of the student; checkpoints keep it in a file of its own, and no `save_pretrained` of the student holds it.
    Batches hold input_ids and labels (-100 where there is padding), and attention_mask where there is padding.
    Evaluation gives eval_loss (nats per target token, plain cross-entropy for every method) and eval_token_accuracy;
    and, as eval_<name>, the figures that `score(student)` returns, if it is given. With `compute_metrics`, what that
    makes of logits, as transformers hands them over, and the mean of the batches' eval_loss.
    Log entries hold, beside transformers' own, "loss_<term>" of each term times its weight (vocabulary terms together),
    which add up to "loss"; and "grad_norm_encoder" and "grad_norm_decoder", of those that the model has, before
    clipping and without the embedding: means over the steps since the last entry, and the largest as "..._max".
    cka_over_processes: computes CKA over the batches of all processes at once, as one process would.
    In several processes the student is replicated (DDP) or, with `fsdp` or accelerate's settings for it, sharded
    (FSDP2); the numbers are those of one process with the whole batch. A teacher may be sharded in either case
    (`sharding.shard`).
    Raises ValueError if the method needs a teacher and none is given, is not known, or does not fit the two models, for
    a model of another family, for what `guards.check_served` and `check_teacher` refuse, and for batches that hold more
    than is read; `train`, RunError if every gradient was 0.
    """

    def __init__(
        self,
        *args: Any,
        method: Method | str | Mapping[str, float],
        teacher: Any = None,
        workspace_mb: float | None = None,
        embedding_learning_rate: float | None = None,
        projection_learning_rate: float = 1e-4,
        cka_over_processes: bool = False,
        score: Callable[[Any], dict[str, float]] | None = None,
        **kwargs: Any,
    ):
        method = as_method(method)
        given = inspect.signature(Trainer.__init__).bind(self, *args, **kwargs).arguments
        check_served(given)
        student: Any = given["model"]
        if method.needs_teacher and teacher is None:
            raise ValueError(f"teacher: this method ({method.summary}) needs one, got None")
        if method.needs_teacher and not isinstance(teacher, CachedTeacher):
            check_teacher(teacher, student)
        uses_cache = getattr(student.config, "use_cache", None)
        self._gives_logits = bool(given.get("compute_metrics"))
        given["compute_metrics"] = given.get("compute_metrics") or held_out_metrics
        super().__init__(**{name: value for name, value in given.items() if name != "self"})
        if uses_cache is not None:  # transformers turns it off for good, and what is saved would write slowly
            student.config.use_cache = uses_cache
        self.method = method = method.on(student.config)
        self.teacher = teacher if method.needs_teacher else None
        self.kind = kind(student)
        configs = student.config, (self.teacher or student).config
        method.check_fits(*configs)
        self.of_student, self.of_teacher = needs(method, *configs)
        if isinstance(self.teacher, CachedTeacher):
            self.teacher.check_holds(self.of_teacher)
            self.teacher = self.teacher.to(self.args.device)
            self.args.remove_unused_columns = False  # the numbers of examples are none of a model's arguments
        elif self.teacher is not None:
            if not is_sharded(teacher) and {weight.device for weight in teacher.parameters()} != {self.args.device}:
                teacher.to(self.args.device)  # what is quantised may not be moved, and need not
            teacher.eval().requires_grad_(False)
        self.workspace_mb = workspace_mb
        self._own_rates = [(student.get_input_embeddings(), embedding_learning_rate)]
        self.cka_group = torch.distributed.group.WORLD if cka_over_processes and count() > 1 else None
        self.score = score
        self._steepest: torch.Tensor | None = None  # the largest gradient norm of a training
        # Other names of weights that are shared, as T5's embedding is: FSDP would save a copy for each, and
        # transformers would miss them in a checkpoint.
        names = {name for name, _ in student.named_parameters()}
        unsaved = {name for name, _ in student.named_parameters(remove_duplicate=False)} - names
        self.projection: torch.nn.Linear | None = None
        if "hidden_linear" in method.terms:
            mine, its = (config.hidden_size for config in configs)
            self.projection = torch.nn.Linear(mine, its, bias=False, device=self.args.device)
            student.hidden_projection = self.projection
            unsaved.add("hidden_projection.weight")
            self._beside["hidden_projection.pt"] = self.projection
            self._own_rates.append((self.projection, projection_learning_rate))
        student._keys_to_ignore_on_save = {*(student._keys_to_ignore_on_save or ()), *unsaved}
        if self.accelerator.ddp_handler is not None and self.args.ddp_find_unused_parameters is None:
            # They are those of the last layers of a method without vocabulary terms.
            self.accelerator.ddp_handler.find_unused_parameters = not method.vocabulary_terms
        self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO  # see forward.compiled_blocks
        self._timer = StepTimer()
        self.add_callback(self._timer)
        # Makes the Trainer count the target tokens of all accumulated batches, and not divide our loss again.
        self.model_accepts_loss_kwargs = True

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator as transformers does, with FSDP wherever it is asked for."""
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = settle_fsdp(self.accelerator.state, self.args)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # Private to transformers; those that are overridden, and why, are a table in tests/train/test_private.py.
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        examples = dataset.examples if isinstance(dataset, Numbered) else dataset
        if not isinstance(examples, Chunks):
            return super()._get_train_sampler(dataset)
        return EpochSampler(len(dataset), self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as CheckpointingTrainer does, with compiled blocks if `torch_compile` asks for them."""
        student: Any = self.model
        if not any(weight.requires_grad for weight in student.parameters()):
            raise ValueError("model: expected weights that learn, got a student that is frozen")
        self._steepest = None
        # What pads is named as transformers would, with a warning: not before there are weights, as an embedding made
        # by a config that names it learns nothing of it, and a text's end may pad.
        for its in (student.config, getattr(student, "generation_config", None)):
            if its is not None and its.pad_token_id is None:
                its.pad_token_id = getattr(self.processing_class, "pad_token_id", None)
        if self.is_fsdp_enabled and not is_sharded(student):
            within = {} if self.method.vocabulary_terms else self.of_student.layers
            shard_student(student, self.args.device, self.accelerator.state.fsdp_plugin, within)
        teacher = None if isinstance(self.teacher, CachedTeacher) else self.teacher
        models = (student, self.of_student), (teacher, self.of_teacher)
        with compiled_blocks(models, self.args) if self.args.torch_compile else contextlib.nullcontext():
            trained = super().train(*args, **kwargs)
        if self._steepest is not None and not self._steepest:
            raise RunError(
                "every gradient of this training was 0; look for labels that are all -100, rows of one token"
            )
        return trained

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return transformers' optimizer, with the embedding's own learning rate if there is one."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            for module, rate in self._own_rates:
                if rate is not None:
                    set_own_rate(optimizer, module, rate)
            self._optimized = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return transformers' schedule, of an optimizer whose parameters are still those of the student."""
        if is_sharded(self.model):
            # accelerate finds them by the addresses of their shards, and those without a number, of parameters with
            # fewer rows than there are processes, all have one address.
            prepared: Any = self.optimizer
            for group, parameters in zip(prepared.param_groups, self._optimized, strict=True):
                group["params"] = list(parameters)
        return super().create_scheduler(num_training_steps, optimizer)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Count the positions of all accumulated batches, too, where a term needs to know and they are no targets."""
        batches, targets = super().get_batch_samples(epoch_iterator, num_batches, device)
        sides = {side for place in self.method.places for side in PLACES[place].sides}
        sides -= {"decoder"} if self.kind != "causal" else set()
        if batches and sides:
            of_all = self.args.average_tokens_across_devices
            count_rows(self.accelerator, batches, self.kind, sides, device, of_all)
        return batches, targets

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the method's loss on one (micro-)batch; num_items_in_batch counts the whole batch's target tokens."""
        mixup = Mixup.draw(inputs["labels"], self.method.mixup_alpha) if self.method.mixup_terms else None
        with self.accelerator.autocast():
            teacher = {} if self.teacher is None else self._teachers(inputs, mixup)
            student = forward(model, inputs, self.of_student, mixup)
            terms = self._terms(student, teacher, inputs, num_items_in_batch, mixup)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # DDP averages gradients, the normalizers are global already.
            terms = {name: loss * self.accelerator.num_processes for name, loss in terms.items()}
        self._non_finite.watch({f"the loss term {k}": v for k, v in terms.items()}, self.state.global_step + 1)
        self._window.add({f"loss_{name}": loss for name, loss in terms.items()})
        loss = sum(terms.values())
        return (loss, student) if return_outputs else loss

    # Not inference_mode: backward passes keep some of these tensors, which it would forbid.
    @torch.no_grad()
    def _teachers(self, inputs: dict[str, Any], mixup: Mixup | None) -> dict[str, Any]:
        """Return what the loss reads of the teacher."""
        if isinstance(self.teacher, CachedTeacher):
            return self.teacher.read(inputs)
        return forward(self.teacher, inputs, self.of_teacher, mixup)

    def _terms(self, student: Any, teacher: Any, inputs: Any, targets: Any, mixup: Any) -> dict[str, torch.Tensor]:
        """Return the loss of each term of a batch; targets: how many there are in all that the losses are means of."""
        masks = valid_positions(self.kind, inputs)
        rows = {side: inputs.get(f"{side}_rows", mask.sum()) for side, mask in masks.items()}
        if targets is not None:
            rows["targets"] = torch.as_tensor(targets)
        if self.kind != "causal":
            rows["decoder"] = rows["targets"]
        stacks = [stack for stack, states in self.of_student.states.items() for _ in states]
        labels = aligned_labels(self.kind, inputs)
        batch = Batch(labels, masks, rows, self.kind, stacks, mixup, self.cka_group, self.workspace_mb)
        return losses(self.method, batch, student, teacher)

    def _backward(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        """Compute the loss of a (micro-)batch and its gradients; return the loss."""
        return super().training_step(model, inputs, num_items_in_batch)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Measure the gradients when they are complete: after the last accumulated batch, before they are clipped."""
        loss = self._backward(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            norms = gradient_norms(model, self.accelerator.scaler)
            if self.accelerator.scaler is None:  # which skips steps whose gradients are not finite
                watched = {f"the gradient of the {name}": norm for name, norm in norms.items()}
                self._non_finite.watch(watched, self.state.global_step + 1)
            steepest = torch.stack(list(norms.values())).max()
            self._steepest = steepest if self._steepest is None else torch.maximum(self._steepest, steepest)
            norms = {f"grad_norm_{name}": norm for name, norm in norms.items() if name in STACKS}
            self._window.add(norms)
            self._window.peak({f"{name}_max": norm for name, norm in norms.items()})
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms and the gradient norms to the entries that hold the loss, which becomes the terms' sum.

        transformers' own forgets, at a resume, the steps before the checkpoint.
        """
        if "loss" in logs and self._window.steps:
            self._non_finite.check(self.args)
            values = self._window.pop()
            means = self.accelerator.reduce(torch.stack(list(values.values())), "mean")
            logs |= dict(zip(values, means.tolist(), strict=True))
            logs["loss"] = sum(value for name, value in logs.items() if name.startswith("loss_"))
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return held-out loss and token accuracy, and what `score` says of the student if there is one."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.score is not None:
            bare = self.accelerator.unwrap_model(self.model)
            scores = {f"{metric_key_prefix}_{name}": value for name, value in self.score(bare).items()}
            self.log(scores)
            metrics |= scores
        self._timer.leave_out()
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict as transformers does, with logits and the caller's metrics."""
        before = self._gives_logits, self.compute_metrics
        self._gives_logits, self.compute_metrics = True, self.compute_metrics if self._gives_logits else None
        try:
            return super().predict(*args, **kwargs)
        finally:
            self._gives_logits, self.compute_metrics = before

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return held-out data with its last batch, too: --dataloader_drop_last is about what is learnt from."""
        dropped, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = dropped

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as transformers does, the model as it is."""
        if self.is_fsdp_enabled and not self.accelerator._models:
            # Not trained here, and accelerate would shard it only together with an optimizer.
            model: Any = self.model
            self.accelerator._models.append(model if is_sharded(model) else model.to(self.args.device))
        return super().evaluation_loop(*args, **kwargs)

    @torch.no_grad()
    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return (None, token scores [B, L, 2], labels [B, L]); held_out_metrics averages them over all batches.

        For metrics of the caller's, and for `predict`, as transformers does: (loss, logits, labels as they are given).
        """
        inputs = self._prepare_inputs(inputs)
        with self.accelerator.autocast():
            hidden, head = forward(model, inputs, Needs())["hidden"]
            labels = aligned_labels(self.kind, inputs)
            scores = token_scores(hidden, head, labels)
            if not self._gives_logits:
                return None, scores, labels
            loss = scores[..., 0].sum() / (labels != -100).sum()
            if prediction_loss_only:
                return loss, None, None
            found = logits(hidden, head)
            return loss, found[:, 0] if self.kind == "classifier" else found, inputs["labels"]

    @property
    def trained(self) -> dict[str, Any]:
        """How the model came about: the steps it took, the seconds of one, and what the log says of them.

        Seconds are of the last `train()`, data included and held-out evaluations not.
        """
        steps, kept = self.state.global_step, ("step", "loss", "eval_", "grad_norm")
        history = [{k: v for k, v in entry.items() if k.startswith(kept)} for entry in self.state.log_history]
        return {"steps": steps, "seconds_per_step": self._timer.seconds_per_step, "history": history if steps else []}

    def show_progress(self, title: str) -> None:
        """Show one bar with the latest losses, or without bars a line of text per log entry."""
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(LossLines(title) if self.args.disable_tqdm else LossBar(title))
