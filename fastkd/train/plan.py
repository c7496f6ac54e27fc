"""Whether a run fits into memory, before it starts: `python -m fastkd.train.plan` with the flags of fastkd-train.

Nothing is loaded but the teacher's config. What one process holds is counted from the models' sizes, at the moments of
a step that can be its largest: each number is of tensors that transformers' T5, autograd, the optimiser or fastkd's ops
hold then. On a CPU the sums are tested against training steps; what sharding and a GPU's own ways change is counted and
not measured. Self-attention counts as autograd's plain softmax keeps it, and a GPU's fused kernels keep less. Left out
are a GPU's context, what an allocator cannot use again, and what is small, as token ids.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import T5Config

from fastkd.ops.drivers.cka_loss_torch import WORKSPACE as CKA_WORKSPACE
from fastkd.ops.linear_kl import WORKSPACE_MB

from .common.errors import InputError
from .common.family import PLACES, is_enct5
from .data.examples import span_counts
from .flags.arguments import TransformersArguments, parse
from .flags.fields import FastkdArguments
from .models.loading import load_config
from .objectives.methods import Method
from .stages.planning import planned_config, trained_config
from .stages.prepare import EMBEDDED_LENGTH, MODEL_LENGTH

GIB = 2**30
FLOAT = 4  # bytes: of weights that learn, of their gradients, and of the student's hidden states between layers
STACKS = ("encoder", "decoder")


def _published(d_model: int, d_ff: int, d_kv: int, heads: int, layers: int, *, gated: bool) -> Any:
    kind: dict[str, Any] = {"feed_forward_proj": "gated-gelu" if gated else "relu", "tie_word_embeddings": not gated}
    return T5Config(vocab_size=32128, d_model=d_model, d_ff=d_ff, d_kv=d_kv, num_heads=heads, num_layers=layers, **kind)


_V10 = {
    "small": (512, 2048, 64, 8, 6), "base": (768, 3072, 64, 12, 12), "large": (1024, 4096, 64, 16, 24),
    "3b": (1024, 16384, 128, 32, 24), "11b": (1024, 65536, 128, 128, 24),
}  # fmt: skip
_V11 = {
    "small": (512, 1024, 64, 6, 8), "base": (768, 2048, 64, 12, 12), "large": (1024, 2816, 64, 16, 24),
    "xl": (2048, 5120, 64, 32, 24), "xxl": (4096, 10240, 64, 64, 24),
}  # fmt: skip
# Known here, so that planning needs no network.
PUBLISHED: dict[str, Any] = {
    **{f"{at}t5-{size}": _published(*sizes, gated=False) for size, sizes in _V10.items() for at in ("", "google-t5/")},
    **{
        f"google/{kind}-{size}": _published(*sizes, gated=True)
        for size, sizes in _V11.items()
        for kind in ("t5-v1_1", "flan-t5")
    },
}


@dataclass(frozen=True)
class Model:
    """A T5 by its sizes. weight: bytes of one of its numbers; operand: of one that its matrix products read."""

    config: Any
    weight: int
    operand: int

    @property
    def inner(self) -> int:
        """Width of the queries of all heads."""
        return int(self.config.num_heads * self.config.d_kv)

    @property
    def embedding(self) -> int:
        """Numbers in the embedding."""
        return int(self.config.vocab_size * self.config.d_model)

    @property
    def root(self) -> int:
        """Numbers outside all blocks: embedding, head and last norms."""
        # Some versions of transformers call every T5 tied, and only scale the output of those that are.
        tied = getattr(self.config, "scale_decoder_outputs", self.config.tie_word_embeddings)
        return self.embedding * (1 if tied else 2) + 2 * int(self.config.d_model)

    def depth(self, stack: str) -> int:
        """How many blocks a stack has."""
        return int(self.config.num_layers if stack == "encoder" else self.config.num_decoder_layers)

    def block(self, stack: str) -> int:
        """Numbers in a block, but for the position bias of a stack's first."""
        attentions, matrices = 1 + (stack == "decoder"), 2 + self.config.is_gated_act
        return int(self.config.d_model * (4 * attentions * self.inner + matrices * self.config.d_ff + attentions + 1))

    def stack(self, stack: str) -> int:
        """Numbers in a stack's blocks."""
        bias = self.config.relative_attention_num_buckets * self.config.num_heads
        return self.depth(stack) * self.block(stack) + int(bias)

    @property
    def parameters(self) -> int:
        """Numbers in all."""
        return self.root + sum(map(self.stack, STACKS))

    @property
    def gathered(self) -> int:
        """Numbers that a sharded model has whole at a time: two blocks, of which one is fetched ahead, and the root."""
        return 2 * self.block("decoder") + self.root


@dataclass(frozen=True)
class Step:
    """One process's part of a step. lengths: tokens of an example, by stack; workspace: linear_kl's, in bytes."""

    student: Model
    teacher: Model | None
    method: Method
    batch: int
    lengths: dict[str, int]
    autocast: bool
    checkpointing: bool
    workspace: int
    on_cpu: bool

    def tokens(self, side: str) -> int:
        """Tokens of the whole batch."""
        return self.batch * self.lengths[side]

    def pairs(self) -> Iterator[tuple[int, int, int]]:
        """Yield (tokens, the student's width, the teacher's) of each pair of hidden states that is compared."""
        if self.teacher is not None:
            matched = self.method.matched_states(self.student.config, self.teacher.config)
            for stack in (stack for stack, pairs in matched.items() for _ in pairs):
                yield self.tokens(stack), self.student.config.d_model, self.teacher.config.d_model

    def captured(self) -> int:
        """Tokens of all queries, keys and values that relation terms compare."""
        return sum(self.tokens(side) for place in self.method.places for side in PLACES[place].sides)


@dataclass(frozen=True)
class Plan:
    """What one process holds: at each moment of a step the bytes of each item that it holds then."""

    step: Step
    moments: dict[str, dict[str, float]]

    def total(self, moment: str) -> float:
        """Bytes at a moment."""
        return sum(self.moments[moment].values())

    @property
    def largest(self) -> str:
        """The moment with the most bytes."""
        return max(self.moments, key=self.total)

    @property
    def peak(self) -> float:
        """The most bytes."""
        return self.total(self.largest)


# ---- what autograd saves of the student ------------------------------------------------------------------------------


def _norm(step: Step, stack: str) -> int:
    """A norm's input, that input normed, and one over each row's root mean square; all in fp32."""
    return FLOAT * step.tokens(stack) * (2 * step.student.config.d_model + 1)


def _attention(step: Step, stack: str, source: str) -> int:
    """Of a stack's tokens to those of the source, which for cross-attention is another."""
    model, config = step.student, step.student.config
    queries, keys, heads = step.tokens(stack), step.tokens(source), config.num_heads
    # The projections share an input, under autocast each has a copy; the encoder's output is counted with its stack.
    read = 3 * queries if stack == source else queries + 2 * keys
    inputs = (read if step.autocast else queries) * config.d_model
    both = (inputs + queries * model.inner) * model.operand  # and what the output projection reads
    # A fused kernel takes cross-attention, as no position bias learns there; but with checkpointing transformers asks
    # for that bias's gradient. It keeps what it read, and a number for every head and query.
    if stack != source and not step.checkpointing and not config.dropout_rate:
        return both + (queries + 2 * keys) * model.inner * model.operand + FLOAT * queries * heads
    # The plain way works in fp32: queries and keys times the root of the scale, values, and the probabilities; with
    # dropout also its mask and what it left of them.
    matrices = 3 if config.dropout_rate else 1
    scores = step.batch * heads * step.lengths[stack] * step.lengths[source]
    return both + FLOAT * ((queries + 2 * keys) * model.inner + matrices * scores)


def _feed_forward(step: Step, stack: str) -> int:
    config, operand = step.student.config, step.student.operand
    if not config.is_gated_act:  # ReLU's result, which is what is projected, under autocast by way of fp32
        inner, inputs = (2 if step.autocast else 1) * operand, 1
    else:
        # Four results on gelu_new's way, both factors of the gate, and what is projected. On a GPU, and not on a CPU,
        # autocast makes fp32 of a power, and so of what comes of it: three of the four, and a factor of the gate.
        inner = 22 if step.autocast and not step.on_cpu else 7 * operand
        inputs = 2 if step.autocast else 1
    dropped = 2 * operand if config.dropout_rate else 0  # the mask, and what it left
    return step.tokens(stack) * (inputs * config.d_model * operand + (inner + dropped) * config.d_ff)


def _block(step: Step, stack: str) -> int:
    sources = ["encoder"] if stack == "encoder" else ["decoder", "encoder"]
    mask = FLOAT * step.tokens(stack) * step.student.config.d_model if step.student.config.dropout_rate else 0
    saved = _feed_forward(step, stack) + sum(_attention(step, stack, source) for source in sources)
    copies = 2 * step.student.block(stack) if step.autocast else 0  # of the weights, in 16 bits
    return saved + (len(sources) + 1) * (_norm(step, stack) + mask) + copies


def _blocks(step: Step, stack: str) -> int:
    """All of a stack's; with checkpointing each block's input."""
    state = FLOAT * step.tokens(stack) * step.student.config.d_model
    return step.student.depth(stack) * (state if step.checkpointing else _block(step, stack))


def _output(step: Step, stack: str) -> int:
    """Behind the blocks: the last norm and the stack's output."""
    return _norm(step, stack) + FLOAT * step.tokens(stack) * step.student.config.d_model


def _backward(step: Step, stack: str) -> int:
    """What a block's backward pass holds at most beside what was saved, which with checkpointing it makes anew.

    Gradients before and behind the activation, or of scores and probabilities, and those of hidden states.
    """
    config, tokens = step.student.config, step.tokens(stack)
    inner = (4 if config.is_gated_act else 2) * tokens * config.d_ff
    scores = 2 * step.batch * config.num_heads * step.lengths[stack] ** 2
    again = _block(step, stack) if step.checkpointing else 0
    return again + FLOAT * (max(inner, scores) + 2 * tokens * config.d_model)


# ---- what the teacher takes ------------------------------------------------------------------------------------------


def _teacher_forward(step: Step, teacher: Model, stack: str) -> int:
    """The most that a stack's pass holds: in a block's feed-forward layer, or in its attention, which is fused."""
    config, tokens, length = teacher.config, step.tokens(stack), step.lengths[stack]
    casts = step.autocast and teacher.weight == FLOAT
    if not config.is_gated_act:
        inner = 6 if casts else 2 * teacher.weight  # behind the ReLU, in 16 bits and in fp32; or before and behind it
    elif step.autocast and not step.on_cpu:
        inner = 12  # four numbers on gelu_new's way, two of them fp32 as above
    else:
        inner = 10 if casts else 4 * teacher.operand  # or both factors, and their product in 16 bits and in fp32
    bias = 2 * config.num_heads * length**2 * teacher.weight  # and its contiguous copy
    attention = 4 * tokens * teacher.inner * teacher.operand + bias
    # The embeddings, the block's input, that behind its attention, and that normed; beside the encoder's output.
    hidden = (4 * tokens + (stack == "decoder") * step.tokens("encoder")) * config.d_model * teacher.weight
    cast = 2 * config.d_model * config.d_ff * casts  # of one weight: autocast keeps none that is frozen
    return hidden + max(tokens * inner * config.d_ff + cast, attention)


def _teacher_outputs(step: Step, teacher: Model) -> int:
    """What the loss compares with: the head's input, hidden states; queries, keys and values."""
    tokens = step.tokens("decoder") if "logit_kl" in step.method.terms else 0
    states = tokens + sum(tokens for tokens, *_ in step.pairs())
    return states * teacher.config.d_model * teacher.weight + step.captured() * teacher.inner * teacher.operand


# ---- what the loss takes: as it is computed, until its backward pass, and in that ------------------------------------


def _vocabulary_terms(step: Step) -> tuple[int, int, int]:
    """linear_kl: workspace and accumulators; gradients; those times the loss's, or the head's when it is made fp32."""
    if not step.method.vocabulary_terms:
        return 0, 0, 0
    student, tokens, rows = step.student, step.tokens("decoder"), step.student.config.vocab_size
    models = [student, step.teacher] if step.teacher and "logit_kl" in step.method.terms else [student]
    score_row, narrow_row = FLOAT * rows * len(models), student.operand * rows
    at_once = min(max(1, step.workspace // score_row), tokens)
    gradients = (tokens * student.config.d_model + student.embedding) * student.operand
    if student.operand == FLOAT:
        return at_once * (score_row + FLOAT * student.config.d_model), gradients, gradients
    wide = FLOAT * student.embedding  # the head's gradient in fp32, in which chunks of tokens add up
    if step.on_cpu:
        working = at_once * score_row + wide
    elif tokens * narrow_row <= wide:  # a GPU keeps the gradients of all tokens' scores instead, where they take less
        working = at_once * score_row + tokens * narrow_row
    else:
        in_one = tokens * (score_row + narrow_row) <= step.workspace
        working = tokens * (score_row + narrow_row) if in_one else step.workspace + wide
    casts = sum(2 * model.embedding for model in models if model is not None and model.weight == FLOAT)  # of heads
    return working + casts, gradients, max(gradients, wide)


def _relation_terms(step: Step) -> tuple[int, int, int]:
    """relation_kl: two fp64 numbers for a relation head's row, of three relations; gradients of what they are of."""
    sides = [side for place in step.method.places for side in PLACES[place].sides]
    rows = 3 * max(map(step.tokens, sides), default=0) * step.method.relation_heads
    return 2 * 8 * rows, step.captured() * step.student.inner * step.student.operand, 0


def _hidden_term(step: Step) -> tuple[int, int, int]:
    """CKA or squared errors: workspace; what is saved of all pairs; gradients of the student's states."""
    working, saved, back = 0, 0, 0
    for tokens, mine, its in step.pairs():
        back += FLOAT * tokens * mine
        saved += 2 * tokens * mine if step.autocast else 0  # the state, cast
        if step.method.hidden_terms != ["hidden_cka"]:  # the student's projected state and the difference
            saved += tokens * its * (step.student.operand + FLOAT)
            continue
        by_grams = tokens < mine + its  # which of CKA's products are the smaller
        saved += FLOAT * (tokens * tokens if by_grams else (mine + its) * mine)
        products = 2 * tokens**2 if by_grams else (mine + its) ** 2
        working = max(working, FLOAT * (products + min(tokens * (mine + its), CKA_WORKSPACE)))
    return working, saved, back


# ---- a step ---------------------------------------------------------------------------------------------------------


def _optimiser(step: Step, name: str) -> tuple[int, int]:
    """Return (the optimiser's state, what its update needs beside that), in bytes."""
    student, config = step.student, step.student.config
    if name == "sgd":
        return 0, 0
    if name == "adafactor":  # a number for every row and column, counted as the widest; the largest weight's update
        matrices = sum(student.depth(stack) * (4 if stack == "encoder" else 8) for stack in STACKS)
        matrices += sum(map(student.depth, STACKS)) * (2 + config.is_gated_act)
        widest = config.d_model + max(student.inner, config.d_ff)
        return FLOAT * (matrices * widest + config.vocab_size), 2 * FLOAT * student.embedding
    if name in ("adamw_torch", "adamw_torch_fused"):  # on a GPU the former takes the roots of all weights at once
        at_once = name == "adamw_torch" and not step.on_cpu
        return 2 * FLOAT * student.parameters, FLOAT * student.parameters * at_once
    raise InputError(f"--optim: adamw_torch, adamw_torch_fused, adafactor and sgd can be planned, got {name}")


def _held(step: Step, state: int, processes: int, shards: int, teacher_shards: int) -> dict[str, float]:
    """Return what is held all the time, in bytes."""
    student, teacher = step.student, step.teacher
    if shards > 1:  # gathered weights, and their gradients
        communication = 2 * student.gathered * student.operand
    else:  # DDP's buckets are a copy of all gradients
        communication = FLOAT * student.parameters if processes > 1 else 0
    return {
        "student's weights": FLOAT * student.parameters / shards,
        "teacher's weights": 0 if teacher is None else teacher.weight * teacher.parameters / teacher_shards,
        "optimiser": state / shards,
        "communication": communication,
    }


def _moments(
    step: Step, held: dict[str, float], shards: int, teacher_shards: int, updating: int
) -> dict[str, dict[str, float]]:
    """Return what is held at each moment: what always is, and what is then."""
    student, teacher = step.student, step.teacher
    working, gradients, products = _vocabulary_terms(step)
    of_rows, of_projections, _ = _relation_terms(step)
    of_pairs, of_states, states = _hidden_term(step)
    outputs = 0 if teacher is None else _teacher_outputs(step, teacher)
    compared = outputs if "hidden_cka" in step.method.terms else 0  # its gradient is made of the teacher's states too
    embedding, saved = FLOAT * student.embedding, {stack: _blocks(step, stack) for stack in STACKS}
    activations = sum(saved[stack] + _output(step, stack) for stack in STACKS)
    learnt = FLOAT * student.parameters / shards
    names = "gradients", "student's activations", "teacher's activations", "loss"
    decoder, encoder = _backward(step, "decoder"), _backward(step, "encoder")
    # Autograd takes the last term first: its gradients wait in the buffers of what they are of, as the relations' do.
    begin = max(of_states + gradients, gradients + products, embedding + decoder)
    rows: dict[str, tuple[float, ...]] = {
        "loss": (0, activations, outputs, max(working, of_rows, of_pairs) + gradients + of_projections + of_states),
        "backward begins": (0, activations, compared, begin + of_projections + states),
        "in the encoder": (
            FLOAT * (student.root + student.stack("decoder")) / shards,
            saved["encoder"] + encoder,
            0,
            of_projections + states,
        ),
        # The encoder's part of the embedding's gradient comes last, beside the sum of the others.
        "backward ends": (learnt, max(embedding, encoder), 0, 0),
        "update": (learnt, 0, 0, 0),
    }
    if teacher is not None:
        rows = {"teacher": (0, 0, outputs + max(_teacher_forward(step, teacher, s) for s in STACKS), 0), **rows}
    moments = {moment: {**held, **dict(zip(names, row, strict=True))} for moment, row in rows.items()}
    moments["update"]["optimiser"] += updating / shards
    if teacher is not None and teacher_shards > 1:
        moments["teacher"]["communication"] += teacher.weight * teacher.gathered
        moments["loss"]["communication"] += teacher.weight * teacher.embedding  # the head
    return moments


def _config(name: str, role: str) -> Any:
    return PUBLISHED[name] if name in PUBLISHED and not Path(name).is_dir() else load_config(name, role)


def _configs(flags: FastkdArguments, method: Method) -> tuple[Any, Any]:
    """Return the configs of (student, teacher), as fastkd-train makes them where none is given."""
    pieces = -(-flags.vocabulary_size // 128) * 128
    teacher = _config(flags.teacher, "teacher") if flags.teacher else trained_config(flags, pieces)
    if flags.student:
        return _config(flags.student, "student"), teacher
    student = copy.copy(planned_config(method, teacher, flags.student_d_model, flags.student_layers))
    student.vocab_size = teacher.vocab_size if teacher else pieces
    return student, teacher


def _lengths(flags: FastkdArguments) -> dict[str, int]:
    """Return the tokens of an example on both sides, of pairs the most, which `data.pad` rounds up."""
    if flags.task == "span_corruption":
        noise, spans = span_counts(flags.sequence_length)
        return {"encoder": flags.sequence_length - noise + spans + 1, "decoder": noise + spans + 1}
    source = flags.max_source_length or (EMBEDDED_LENGTH if flags.embedded_data else MODEL_LENGTH)
    lengths = source, flags.max_target_length or MODEL_LENGTH
    return {stack: -(-length // 8) * 8 for stack, length in zip(STACKS, lengths, strict=True)}


def _step(flags: FastkdArguments, args: TransformersArguments, device: str) -> Step:
    method, autocast = flags.objective, args.bf16 or args.fp16
    try:
        student, teacher = _configs(flags, method)
        if method.prunes or method.mixup_terms or is_enct5(student) or (teacher and is_enct5(teacher)):
            raise InputError("pruning, mixup and EncT5 cannot be planned, only the distillation of a T5")
        if method.needs_teacher:
            method.check_fits(student, teacher)
    except ValueError as error:
        raise InputError(f"--{error}") from error
    dtype = teacher.dtype if flags.teacher_dtype == "auto" else getattr(torch, flags.teacher_dtype)
    weight = 2 if dtype == torch.bfloat16 else FLOAT
    return Step(
        student=Model(student, FLOAT, 2 if autocast else FLOAT),
        teacher=Model(teacher, weight, 2 if autocast else weight) if method.needs_teacher else None,
        method=method,
        batch=args.per_device_train_batch_size,
        lengths=_lengths(flags),
        autocast=autocast,
        checkpointing=bool(args.gradient_checkpointing),
        workspace=int((flags.workspace_mb or WORKSPACE_MB[device]) * 2**20),
        on_cpu=device == "cpu",
    )


def plan(flags: FastkdArguments, args: TransformersArguments, processes: int = 1, device: str = "cuda") -> Plan:
    """Return what each of so many processes holds on its device, "cuda" or "cpu", in a step after the first.

    The student is sharded over them if `--fsdp` is given, and the teacher if `--teacher_sharding` is full. Pairs count
    as being as long as the flags allow.
    Raises InputError for methods, models and optimisers that it does not know, and models that do not fit together.
    """
    step = _step(flags, args, device)
    shards = processes if args.fsdp else 1
    teacher_shards = processes if flags.teacher_sharding == "full" else 1
    state, updating = _optimiser(step, str(getattr(args.optim, "value", args.optim)))
    held = _held(step, state, processes, shards, teacher_shards)
    return Plan(step, _moments(step, held, shards, teacher_shards, updating))


# ---- the command line -----------------------------------------------------------------------------------------------


def _shown(found: Plan) -> str:
    """Return a table of GiB: an item a row, a moment a column."""
    rows = [["GiB", *found.moments]]
    for name in found.moments[found.largest]:
        rows.append([name, *(f"{items[name] / GIB:.2f}" for items in found.moments.values())])
    rows.append(["sum", *(f"{found.total(moment) / GIB:.2f}" for moment in found.moments)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _others(flags: FastkdArguments, args: TransformersArguments, processes: int) -> Iterator[tuple[str, Any, Any]]:
    """Yield (flag, flags, args) of runs that differ in one flag and may need less."""
    changes: list[tuple[str, Any, Any]] = []
    if not args.gradient_checkpointing:
        changes.append(("--gradient_checkpointing true", {}, {"gradient_checkpointing": True}))
    if flags.teacher_dtype != "bfloat16" and flags.objective.needs_teacher:
        changes.append(("--teacher_dtype bfloat16", {"teacher_dtype": "bfloat16"}, {}))
    if processes > 1 and not args.fsdp:
        changes.append(("--fsdp", {}, {"fsdp": True}))
    if processes > 1 and flags.teacher_sharding != "full":
        changes.append(("--teacher_sharding full", {"teacher_sharding": "full"}, {}))
    for power in reversed(range((args.per_device_train_batch_size - 1).bit_length())):
        size = {"per_device_train_batch_size": 2**power}
        changes.append((f"--per_device_train_batch_size {2**power}", {}, size))
    for text, ours, theirs in changes:
        other_flags, other_args = copy.copy(flags), copy.copy(args)
        vars(other_flags).update(ours)
        vars(other_args).update(theirs)
        yield text, other_flags, other_args


def _verdict(flags: FastkdArguments, args: TransformersArguments, own: argparse.Namespace, device: str) -> str:
    """Return in words whether it fits, and which single flags would make it fit."""
    found, given = plan(flags, args, own.processes, device), own.memory_gb
    need = f"{found.peak / GIB:.2f} of {given:g} GiB at most ({found.largest})"
    if found.peak <= given * GIB:
        return f"fits: {need}, {given - found.peak / GIB:.2f} left"
    lines = [f"does not fit: {need}, {found.peak / GIB - given:.2f} too much; with one more flag"]
    for flag, with_flags, with_args in _others(flags, args, own.processes):
        peak = plan(with_flags, with_args, own.processes, device).peak
        if "batch" not in flag or peak <= given * GIB or flag.endswith(" 1"):
            lines.append(f"  {flag:34} {peak / GIB:8.2f} {'fits' if peak <= given * GIB else 'does not fit'}")
        if "batch" in flag and peak <= given * GIB:
            break
    return "\n".join(lines)


def table(memory_gb: float = 80.0) -> str:
    """Return in Markdown what large teachers take of a GPU by miniend-e, with a student of 6 + 6 layers, 384 wide."""
    parts = "weights", "optimiser", "communication", "gradients", "activations", "loss"
    rows = [("teacher", "GPUs", *parts, "sum", "largest at", f"fits {memory_gb:g} GiB"), ("---", *["---:"] * 10)]
    for teacher in ("t5-large", "google/flan-t5-xl", "google/flan-t5-xxl"):
        words = ["--config", "miniend-e", "--teacher", teacher, "--bf16", "--teacher_dtype", "bfloat16", "--fsdp"]
        flags, args = parse([*words, "--use_cpu"], needs_data=False)
        for processes in (1, 8, 64):
            found = plan(flags, args, processes)
            items = found.moments[found.largest]
            sizes = [sum(size for name, size in items.items() if name.endswith(part)) for part in parts]
            cells = [f"{size / GIB:.2f}" for size in (*sizes, found.peak)]
            fits = "yes" if found.peak <= memory_gb * GIB else "no"
            rows.append((teacher.removeprefix("google/"), str(processes), *cells, found.largest, fits))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan of the run that the flags ask for; return 0 if it fits, 1 if not, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m fastkd.train.plan",
        usage="%(prog)s (--table | [--processes N] [--memory_gb GIB] and the flags of fastkd-train)",
        description="Say whether a run of fastkd-train fits into memory, from the sizes of its models.",
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, default=1, help="of the run, one for each device")
    parser.add_argument("--memory_gb", type=float, default=80.0, help="GiB of each process's device")
    parser.add_argument("--table", action="store_true", help="print the documentation's table of large teachers")
    own, words = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    transformers.logging.set_verbosity_error()
    if own.table:
        print(table(own.memory_gb))
        return 0
    device = "cpu" if "--use_cpu" in words else "cuda"
    try:
        if own.processes < 1 or not own.memory_gb > 0:
            raise InputError("--processes and --memory_gb must be above 0")
        # A machine without a GPU may plan for one, but transformers refuses bf16 there.
        flags, args = parse([*words, "--use_cpu"] if words else words, needs_data=False)
        print(_shown(plan(flags, args, own.processes, device)))
        verdict = _verdict(flags, args, own, device)
    except InputError as error:
        print(f"fastkd.train.plan: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    print(verdict)
    return 0 if verdict.startswith("fits") else 1


if __name__ == "__main__":
    raise SystemExit(main())
