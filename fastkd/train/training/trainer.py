"""DistillTrainer: transformers' Seq2SeqTrainer with a fastkd objective in place of the model's own loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, DynamoBackend, FullyShardedDataParallelPlugin
from transformers import PrinterCallback, ProgressCallback

from ..common.family import PLACES
from ..common.processes import count
from ..data.examples import EpochSampler, SpanCorruption
from ..judge.evaluate import held_out_metrics, token_scores
from ..models.capture import capture_hidden, capture_qkv, returning, without_head
from ..models.sharding import is_asked_for, is_sharded, shard, whole
from ..objectives.methods import Method
from ..objectives.mixup import Mixup
from ..objectives.terms import hidden_loss, hidden_masks, mixup_loss, relation_loss, vocabulary_loss
from .callbacks import LossBar, LossLines, StepTimer
from .optimizer import gradient_norms, set_own_rate
from .resumable import CheckpointingTrainer

# The methods of transformers that fastkd overrides though they are not public: the parameters that it relies on, and
# why there is no other way. A test holds the installed transformers to this.
PRIVATE = {
    "Trainer._get_train_sampler": (
        ("train_dataset",),
        "no argument takes a sampler, and SpanCorruption's tells an example's epoch, also to data workers",
    ),
    "Trainer._save_checkpoint": (
        ("model", "trial"),
        "no event comes before a checkpoint is written, and one that is not complete must have no checkpoint's name",
    ),
    "T5PreTrainedModel._init_weights": (
        ("module",),
        "transformers' own hook for the first weights of a new model, here of EncT5's head and prompt",
    ),
    "T5Attention.forward": (
        ("hidden_states",),
        "heads are pruned inside of attention, and its table of relative positions is passed on between layers",
    ),
}
PROJECTION_FILE = "hidden_projection.pt"  # in a checkpoint, beside the student's own files


def valid_positions(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the masks of a batch, "encoder" [B, Lx] and "decoder" [B, Lz], nonzero where there is no padding."""
    encoder = inputs.get("attention_mask")
    return {
        "encoder": torch.ones_like(inputs["input_ids"]) if encoder is None else encoder,
        "decoder": inputs["labels"] != -100,
    }


def _model_arguments(model: Any, inputs: Mapping[str, Any], plain: bool, mixup: Mixup | None) -> dict[str, Any]:
    """Return the arguments of `model(...)` for a batch; with a mixup, for its mixed examples, if `plain` behind it.

    Labels stay out: the model would compute its own loss from them.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    decoder_ids = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
    if mixup is None:
        arguments = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder_ids}
    else:
        embedding = whole(model.get_input_embeddings().weight)

        def rows(states: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
            return torch.cat([states, mixed]) if plain else mixed

        embedded, decoder_embedded = (torch.nn.functional.embedding(x, embedding) for x in (ids, decoder_ids))
        arguments = {
            "inputs_embeds": rows(embedded, mixup.mix(embedded)),
            "attention_mask": None if mask is None else rows(mask, mixup.union(mask != 0).to(mask.dtype)),
            "decoder_inputs_embeds": rows(decoder_embedded, mixup.mix(decoder_embedded)),
        }
    return {**arguments, "use_cache": False}


class DistillTrainer(CheckpointingTrainer):
    """Trains `model` by `method`; everything else (checkpoints, resuming, precision, DDP) is Seq2SeqTrainer's.

    method: a row of METHODS, or one with other settings by `dataclasses.replace`. teacher: a T5 with the student's
    vocabulary, or None if the method needs none; it is frozen, kept in evaluation mode and never part of a checkpoint.
    workspace_mb: see `fastkd.linear_kl`. embedding_learning_rate: see `optimizer.set_own_rate`; None gives the
    embedding the rate of all other weights. projection_learning_rate: that of the matrix by which "hidden_linear"
    projects the student's hidden states to the teacher's width, one for all layers: `model.hidden_projection`, as a
    part of the student; checkpoints keep it in a file of its own, and no `save_pretrained` of the student holds it.
    Batches hold input_ids and labels (-100 where there is padding), and attention_mask where there is padding.
    Evaluation gives eval_loss (nats per target token, plain cross-entropy for every method) and eval_token_accuracy;
    and, as eval_<name>, the figures that `score(student)` returns, if it is given.
    Log entries hold, beside transformers' own, "loss_<term>" of each term times its weight (vocabulary terms together),
    which add up to "loss"; and "grad_norm_encoder" and "grad_norm_decoder", before clipping and without the embedding
    that both share: means over the steps since the last entry, and the largest as "..._max".
    Hidden-state terms are computed in every batch and on every device by itself, as CKA is no sum over tokens, and then
    averaged by their shares of the target tokens: accumulation keeps their scale, but CKA of fewer tokens than the
    states are wide is far off, so micro-batches should be well above that; cka_over_processes computes it over the
    batches of all processes at once, as one process would.
    In several processes the student is replicated (DDP) or, with `fsdp` or accelerate's settings for it, sharded
    (FSDP2); the numbers are those of one process with the whole batch. A teacher may be sharded in either case
    (`sharding.shard`).
    Raises ValueError if the method needs a teacher and none is given, or does not fit the two models.
    """

    def __init__(
        self,
        *args: Any,
        method: Method,
        teacher: Any = None,
        workspace_mb: float | None = None,
        embedding_learning_rate: float | None = None,
        projection_learning_rate: float = 1e-4,
        cka_over_processes: bool = False,
        score: Callable[[Any], dict[str, float]] | None = None,
        **kwargs: Any,
    ):
        kwargs["compute_metrics"] = held_out_metrics
        super().__init__(*args, **kwargs)
        if method.needs_teacher and teacher is None:
            raise ValueError(f"teacher: this method ({method.summary}) needs one, got None")
        self.method = method
        self.workspace_mb = workspace_mb
        self.embedding_learning_rate = embedding_learning_rate
        self.projection_learning_rate = projection_learning_rate
        self.cka_group = torch.distributed.group.WORLD if cka_over_processes and count() > 1 else None
        self.score = score
        student: Any = self.model
        self.student_layers = method.student_layers(student.config)
        # Other names of weights that are shared, as T5's embedding is: FSDP would save a copy for each, and
        # transformers would miss them in a checkpoint.
        names = {name for name, _ in student.named_parameters()}
        self._leave_out({name for name, _ in student.named_parameters(remove_duplicate=False)} - names)
        self.teacher = None
        self.teacher_layers: dict[str, int] = {}
        self.matched_states: dict[str, list[tuple[int, int]]] = {}
        self.projection: torch.nn.Linear | None = None
        if method.needs_teacher:
            method.check_fits(student.config, teacher.config)
            self.teacher_layers = method.teacher_layers(teacher.config)
            self.matched_states = method.matched_states(student.config, teacher.config)
            placed = teacher if is_sharded(teacher) else teacher.to(self.args.device)
            self.teacher = placed.eval().requires_grad_(False)
        self.student_states, self.teacher_states = (
            {stack: [pair[side] for pair in pairs] for stack, pairs in self.matched_states.items()} for side in (0, 1)
        )
        if "hidden_linear" in method.terms:
            widths = student.config.d_model, teacher.config.d_model
            self.projection = torch.nn.Linear(*widths, bias=False, device=self.args.device)
            student.hidden_projection = self.projection
            self._leave_out({"hidden_projection.weight"})
        if self.accelerator.ddp_handler is not None and self.args.ddp_find_unused_parameters is None:
            # They are those of the last layers of a method without vocabulary terms.
            self.accelerator.ddp_handler.find_unused_parameters = not method.vocabulary_terms
        self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO  # see _compiled_blocks
        self._timer = StepTimer()
        self.add_callback(self._timer)
        # Makes the Trainer count the target tokens of all accumulated batches, and not divide our loss again.
        self.model_accepts_loss_kwargs = True

    def create_accelerator_and_postprocess(self) -> None:
        """Turn FSDP on where it is asked for: accelerate does so on GPUs and the like, torch has it on CPUs too."""
        super().create_accelerator_and_postprocess()
        state: Any = self.accelerator.state
        if state.distributed_type == DistributedType.MULTI_CPU and is_asked_for(self.args):
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**(self.args.fsdp_plugin_args or {}))
            if state.mixed_precision != "no":
                state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
            self.is_fsdp_enabled = True
        if not self.is_fsdp_enabled:
            return
        if getattr(state.fsdp_plugin, "fsdp_version", 1) != 2:
            raise ValueError("fsdp: expected version 2, as version 1 lets nobody read a head outside its module")
        if state.fsdp_plugin.activation_checkpointing:
            raise ValueError("fsdp: its activation_checkpointing is not supported, --gradient_checkpointing is")

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, SpanCorruption):
            return super()._get_train_sampler(dataset)
        return EpochSampler(len(dataset), self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as CheckpointingTrainer does, with compiled blocks if `torch_compile` asks for them."""
        if self.is_fsdp_enabled and not is_sharded(self.model):
            self._shard_student()
        with self._compiled_blocks() if self.args.torch_compile else contextlib.nullcontext():
            return super().train(*args, **kwargs)

    def _shard_student(self) -> None:
        """Shard the student as accelerate is set to; it takes models that are sharded already.

        Its own way puts T5's embedding, which encoder, decoder and head share, into two groups, which torch refuses.
        """
        plugin: Any = self.accelerator.state.fsdp_plugin
        policy: dict[str, Any] = {
            "reshard_after_forward": plugin.reshard_after_forward,
            "offload_policy": plugin.cpu_offload,
        }
        if plugin.mixed_precision_policy is not None:
            policy["mp_policy"] = plugin.mixed_precision_policy
        plugin.auto_wrap_policy = None  # there is nothing left to wrap
        # A loss of what is captured inside a block need not be of its output, whose gradient would gather the block.
        within = {} if self.method.vocabulary_terms else self.student_layers
        blocks = [getattr(self.model, PLACES[place].stack).block[layer - 1] for place, layer in within.items()]
        shard(self.model, self.args.device, stay=[*blocks, self.model], **policy)

    @contextlib.contextmanager
    def _compiled_blocks(self) -> Iterator[None]:
        """Compile the blocks of student and teacher, in place of the whole student, as accelerate would do.

        What is captured, and the head that `without_head` replaces, lie outside of compiled code: so nothing is
        compiled again when they come and go, and the blocks of a stack share their code. Blocks whose queries, keys and
        values are captured stay as they are. What generates or measures afterwards runs uncompiled.
        """
        compiled = []
        options: Any = {"backend": self.args.torch_compile_backend, "mode": self.args.torch_compile_mode}
        for model, layers in ((self.model, self.student_layers), (self.teacher, self.teacher_layers)):
            captured = {(PLACES[place].stack, layer) for place, layer in layers.items()}
            for stack in ("encoder", "decoder") if model is not None else ():
                for layer, block in enumerate(getattr(model, stack).block, start=1):
                    if (stack, layer) not in captured:
                        block.forward = torch.compile(block.forward, **options)
                        compiled.append(block)
        try:
            yield
        finally:
            for block in compiled:
                del block.forward

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return transformers' optimizer, with the embedding's own learning rate if there is one."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if not is_new:
            return optimizer
        if self.embedding_learning_rate is not None:
            student: Any = self.model
            set_own_rate(optimizer, student.get_input_embeddings(), self.embedding_learning_rate)
        if self.projection is not None:
            set_own_rate(optimizer, self.projection, self.projection_learning_rate)
        self._optimized = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return transformers' schedule, of an optimizer whose parameters are still those of the student.

        accelerate, which has prepared it by now, finds a sharded model's by the addresses of their shards, and those
        without a number, of parameters with fewer rows than there are processes, all have one address.
        """
        prepared: Any = self.optimizer
        if is_sharded(self.model):
            for group, parameters in zip(prepared.param_groups, self._optimized, strict=True):
                group["params"] = parameters
        return super().create_scheduler(num_training_steps, optimizer)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student, and beside it, if it is a checkpoint, the projection of its hidden states."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.projection is not None:
            state = {name: whole(value) for name, value in self.projection.state_dict().items()}
            if self.args.should_save:
                torch.save(state, Path(str(output_dir)) / PROJECTION_FILE)

    def restore(self, checkpoint: Path) -> None:
        """Load the projection, too, unless it is sharded, when a checkpoint holds all that is trained."""
        super().restore(checkpoint)
        if self.projection is not None and not is_sharded(self.model):
            state = torch.load(checkpoint / PROJECTION_FILE, map_location="cpu", weights_only=True)
            self.projection.load_state_dict(state)

    def _leave_out(self, names: set[str]) -> None:
        """Keep weights out of what `save_pretrained` of the student writes."""
        student: Any = self.model
        student._keys_to_ignore_on_save = {*(student._keys_to_ignore_on_save or ()), *names}

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Count encoder positions as transformers counts targets: over all accumulated batches, and devices.

        Every batch carries the count as "encoder_rows".
        """
        batches, targets = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and any("encoder" in PLACES[place].sides for place in self.method.places):
            rows = torch.stack([valid_positions(batch)["encoder"].sum() for batch in batches]).sum().to(device)
            if self.args.average_tokens_across_devices:
                rows = self.accelerator.gather(rows).sum()
            for batch in batches:
                batch["encoder_rows"] = rows
        return batches, targets

    def _states(
        self,
        model: Any,
        inputs: dict[str, Any],
        layers: Mapping[str, int] | None = None,
        stacks: Mapping[str, Sequence[int]] | None = None,
        *,
        hidden: bool = True,
        mixup: Mixup | None = None,
    ) -> dict[str, Any]:
        """Return what the loss needs of a student (possibly wrapped) or teacher: [q, k, v] of each place in `layers`.

        And "states", a list of the hidden states in `stacks` (see `capture.capture_hidden`), the student's projected if
        there is a projection; and what the head is given [B, L, H] with its weight [V, H], if asked for "hidden" for
        the batch as it is, and "mixed" for its mixed examples if there is a mixup.
        """
        bare = self.accelerator.unwrap_model(model)
        arguments = _model_arguments(bare, inputs, hidden, mixup)

        def needed(output: Any) -> dict[str, Any]:
            states = list(captured_states)
            if self.projection is not None and bare is not self.teacher:
                # Here, and not in the loss, for DDP to see that the projection is used.
                states = [self.projection(state) for state in states]
            names = ["hidden"] * hidden + ["mixed"] * (mixup is not None)
            heads_input = output.logits if output.logits.dim() == 3 else output.logits[:, None]  # of EncT5's one step
            heads_inputs = zip(names, heads_input.chunk(max(len(names), 1)), strict=False)
            return {**captured, "states": states, "heads_inputs": dict(heads_inputs)}

        with (
            without_head(bare),
            capture_qkv(bare, layers or {}) as captured,
            capture_hidden(bare, stacks or {}) as captured_states,
            returning(bare, needed),
        ):
            states = model(**arguments)
        head, given = whole(bare.get_output_embeddings().weight), states.pop("heads_inputs")
        return {**states, **{name: (hidden_states, head) for name, hidden_states in given.items()}}

    def _terms(
        self,
        student: dict[str, Any],
        teacher: dict[str, Any],
        inputs: dict[str, Any],
        targets: torch.Tensor | int | None,
        mixup: Mixup | None,
    ) -> dict[str, torch.Tensor]:
        """Return the scalar loss of each term, times its weight; vocabulary terms are computed, and named, together."""
        method, masks = self.method, valid_positions(inputs)
        terms = {}
        if method.vocabulary_terms:
            name, heads = "+".join(method.vocabulary_terms), (student["hidden"], teacher.get("hidden"))
            terms[name] = vocabulary_loss(
                method, *heads, inputs["labels"], normalizer=targets, workspace_mb=self.workspace_mb
            )
        rows: dict[str, torch.Tensor | float] = {side: mask.sum() for side, mask in masks.items()}
        if targets is not None:
            rows["decoder"] = targets
            rows["encoder"] = inputs.get("encoder_rows", rows["encoder"])
        for place in method.places:
            terms[place] = relation_loss(method, place, student[place], teacher[place], masks, rows)
        for term in method.mixup_terms:
            assert mixup is not None
            heads = student["mixed"], teacher.get("mixed")
            terms[term] = mixup_loss(method, term, *heads, inputs["labels"], mixup, rows["decoder"], self.workspace_mb)
        for term in method.hidden_terms:
            compared = hidden_masks(masks, method.match_first_position)
            per_pair = [compared[stack] for stack, pairs in self.matched_states.items() for _ in pairs]
            states = student["states"], teacher["states"]
            terms[term] = self._share(masks["decoder"], targets) * hidden_loss(
                method, *states, per_pair, self.cka_group
            )
        return terms

    def _share(self, mask: torch.Tensor, targets: torch.Tensor | int | None) -> torch.Tensor | float:
        """Return a batch's share of all target tokens, of which `mask` [B, L] holds this process's.

        Where hidden states of several processes are compared at once, it is that of the mean of their batches.
        """
        if targets is None:
            return 1.0
        mine = mask.sum()
        if self.cka_group is not None:
            mine = self.accelerator.reduce(mine.float(), "mean")
        return mine / torch.as_tensor(targets).clamp_min(1)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the method's loss on one (micro-)batch; num_items_in_batch counts the whole batch's target tokens."""
        method, mixup = self.method, None
        if method.mixup_terms:
            mixup = Mixup.draw(len(inputs["labels"]), method.mixup_alpha, inputs["labels"].device)
        with self.accelerator.autocast():
            teacher = {} if self.teacher is None else self._teachers(inputs, mixup)
            hidden = bool(method.vocabulary_terms)
            student = self._states(model, inputs, self.student_layers, self.student_states, hidden=hidden, mixup=mixup)
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
        """Return what the loss needs of the teacher; see `_states`."""
        terms = self.method.terms
        mixed = mixup if "mixup_kd" in terms else None
        layers, stacks = self.teacher_layers, self.teacher_states
        return self._states(self.teacher, inputs, layers, stacks, hidden="logit_kl" in terms, mixup=mixed)

    def _backward(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        """Compute the loss of a (micro-)batch and its gradients; return the loss."""
        return super().training_step(model, inputs, num_items_in_batch)

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Measure the gradients when they are complete: after the last accumulated batch, before they are clipped."""
        loss = self._backward(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            norms = gradient_norms(self.accelerator.unwrap_model(model), self.accelerator.scaler)
            if self.accelerator.scaler is None:  # which skips steps whose gradients are not finite
                watched = {f"the gradient of the {name}": norm for name, norm in norms.items()}
                self._non_finite.watch(watched, self.state.global_step + 1)
            norms = {f"grad_norm_{name}": norms[name] for name in ("encoder", "decoder")}
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
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> dict[str, float]:
        """Return held-out loss and token accuracy, and what `score` says of the student if there is one."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
        if self.score is not None:
            bare = self.accelerator.unwrap_model(self.model)
            scores = {f"{metric_key_prefix}_{name}": value for name, value in self.score(bare).items()}
            self.log(scores)
            metrics |= scores
        self._timer.leave_out()
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as transformers does, every example once and the model as it is."""
        # Seq2SeqTrainer has set one that keeps the examples that fill up the last batches of several processes.
        self.gather_function = self.accelerator.gather_for_metrics
        if self.is_fsdp_enabled and not self.accelerator._models:
            # Not trained here, and accelerate would shard it only together with an optimizer.
            model: Any = self.model
            self.accelerator._models.append(model if is_sharded(model) else model.to(self.args.device))
        return super().evaluation_loop(*args, **kwargs)

    @torch.no_grad()
    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None, **_: Any
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Return (None, token scores [B, L, 2], labels [B, L]); held_out_metrics averages them over all batches."""
        inputs = self._prepare_inputs(inputs)
        with self.accelerator.autocast():
            states = self._states(model, inputs)
            hidden, head = states["hidden"]
            scores = token_scores(hidden, head, inputs["labels"])
        return None, scores, inputs["labels"]

    @property
    def seconds_per_step(self) -> float | None:
        """Seconds per optimiser step of the last `train()`, data included and held-out evaluations not."""
        return self._timer.seconds_per_step

    @property
    def trained(self) -> dict[str, Any]:
        """How the model came about: the steps it took, the time of one, and what the log says of them."""
        steps = self.state.global_step
        return {"steps": steps, "seconds_per_step": self.seconds_per_step, "history": self.history if steps else []}

    @property
    def history(self) -> list[dict[str, float]]:
        """Of the log what a report draws."""
        kept = ("step", "loss", "eval_", "grad_norm")
        return [{k: v for k, v in entry.items() if k.startswith(kept)} for entry in self.state.log_history]

    def show_progress(self, title: str) -> None:
        """Show one bar with the latest losses, or without bars a line of text per log entry."""
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(LossLines(title) if self.args.disable_tqdm else LossBar(title))
