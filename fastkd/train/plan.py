"""Whether a run fits into memory, before it starts: `python -m fastkd.train.plan` with the flags of fastkd-train.

Nothing is loaded but the configs of models. The run's own trainer takes a step on fake tensors, which have shapes and
no numbers, and what would be alive is counted as operators make it and autograd lets go of it. On a CPU that is tested
against training steps. What sharding and a GPU's own ways change is counted by formulas and not measured:
self-attention keeps what autograd's plain softmax does, where a GPU's fused kernels keep less. Left out are a GPU's
context, what an allocator cannot use again, and token ids.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch._subclasses import FakeTensorMode
from transformers import T5Config

from fastkd.ops.linear_kl import WORKSPACE_MB

from .common.errors import InputError
from .data.corruption import span_counts
from .data.tasks import TASKS
from .flags.arguments import TransformersArguments, parse
from .flags.fields import FastkdArguments
from .judge.memory import GpuAutocast, LiveStep
from .minidisc.candidates import CandidateTrainer
from .minidisc.prune import pruned_config, sliced, widths_at
from .minidisc.rounds import trials_of
from .models.anatomy import every_layer, family, head_module, head_of, kind
from .models.architectures import parts
from .models.student import new_model
from .stages.given import load_configs
from .stages.planning import configs
from .stages.prepare import EMBEDDED_LENGTH, MODEL_LENGTH
from .teaching.cached import CachedTeacher
from .teaching.kinds import Kind
from .training.trainer import DistillTrainer

GIB = 2**30
OPTIMISERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd")
ITEMS = (
    "student's weights", "teacher's weights", "optimiser", "communication", "gradients", "student's activations",
    "teacher's activations", "loss",
)  # fmt: skip
_SIZES = {  # d_model, d_ff, d_kv, heads and layers
    "t5-": {
        "small": (512, 2048, 64, 8, 6), "base": (768, 3072, 64, 12, 12), "large": (1024, 4096, 64, 16, 24),
        "3b": (1024, 16384, 128, 32, 24), "11b": (1024, 65536, 128, 128, 24),
    },
    "google/t5-v1_1-": {
        "small": (512, 1024, 64, 6, 8), "base": (768, 2048, 64, 12, 12), "large": (1024, 2816, 64, 16, 24),
        "xl": (2048, 5120, 64, 32, 24), "xxl": (4096, 10240, 64, 64, 24),
    },
}  # fmt: skip
_SIZES |= {"google-t5/t5-": _SIZES["t5-"], "google/flan-t5-": _SIZES["google/t5-v1_1-"]}


def _published(name: str, *numbers: int) -> Any:
    settings: Any = dict(zip(("d_model", "d_ff", "d_kv", "num_heads", "num_layers"), numbers, strict=True))
    of_first = not name.startswith("google/")  # version of T5
    settings |= {"feed_forward_proj": "relu" if of_first else "gated-gelu", "tie_word_embeddings": of_first}
    settings["decoder_start_token_id"] = 0
    return T5Config(vocab_size=32128, **settings)


# Known here, so that planning needs no network.
PUBLISHED = {
    name + size: _published(name, *numbers) for name, sizes in _SIZES.items() for size, numbers in sizes.items()
}


@dataclass(frozen=True)
class Plan:
    """What one process holds: at each moment of a step the bytes of each item, when they were most.

    The moments are the teacher's pass, that of the student with the loss, the backward pass, and the update.
    """

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


@dataclass(frozen=True)
class _Kept(CachedTeacher):
    """A teacher of which a step reads what is kept, and of whose weights it holds the head alone. dtype: of states."""

    dtype: torch.dtype = torch.float32

    def read(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return states without numbers."""
        assert self.head is not None
        shape = *inputs["labels"].shape, self.head.weight.shape[-1]
        return {"hidden": (torch.zeros(shape, dtype=self.dtype), self.head)}


# ---- the step --------------------------------------------------------------------------------------------------------


def _is_tied(config: Any) -> bool:
    """Return whether the head is the embedding. Where transformers calls every T5 so, it scales only these."""
    return bool(getattr(config, "scale_decoder_outputs", config.tie_word_embeddings))


def models(flags: FastkdArguments, fakes: FakeTensorMode) -> tuple[Any, Any, Any]:
    """Return (student, teacher, candidates) of a step, all fake; see `CandidateTrainer`.

    Where a teacher is pruned the step is one of the first round, with equal shares of all layers, as only weights tell
    which of them matter. Raises ValueError for models that do not fit together.
    """
    method, teacher = flags.objective, None
    given, of_kind = load_configs(flags, {k: v for k, v in PUBLISHED.items() if not Path(k).is_dir()})
    config, its = configs(flags, method, given, of_kind, -(-flags.vocabulary_size // 128) * 128)
    with fakes:
        if method.needs_teacher:
            auto = torch.float32 if method.prunes else its.dtype
            dtype = auto if flags.teacher_dtype == "auto" else getattr(torch, flags.teacher_dtype)
            dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
            teacher = new_model(its, None, tied=_is_tied(its), dtype=dtype)
        student = new_model(config, None, tied=_is_tied(config))
    if not method.prunes:
        return student, teacher, None
    sparsities = min((rounds[0] for rounds in trials_of(flags)), key=min)  # of the first round with the widest student
    scores = {name: torch.arange(1, 1 + part.units) / part.units for name, part in parts(student).items()}
    candidates = {sparsity: widths_at(scores, sparsity) for sparsity in sparsities}
    for widths in candidates.values():
        method.check_fits(pruned_config(student, widths), its)
    with fakes:
        return sliced(student, candidates[min(candidates)]), teacher, candidates


def batch(flags: FastkdArguments, args: TransformersArguments, kind: str, most: int) -> dict[str, torch.Tensor]:
    """Return a batch of zeros for models of a kind, of pairs as long as the flags allow, which `data.pad` rounds up.

    most: positions that the models have.
    """
    if flags.task == "span_corruption":
        noise, spans = span_counts(flags.sequence_length)
        lengths = {"input_ids": flags.sequence_length - noise + spans + 1, "labels": noise + spans + 1}
    elif TASKS[flags.task].is_text:
        lengths = dict.fromkeys(("input_ids", "attention_mask", "labels"), flags.sequence_length)
    else:
        source = flags.max_source_length or (EMBEDDED_LENGTH if flags.embedded_data else MODEL_LENGTH)
        source, target = (-(-length // 8) * 8 for length in (source, flags.max_target_length or MODEL_LENGTH))
        lengths = {"input_ids": source, "attention_mask": source, "labels": 1 if kind == "classifier" else target}
        if kind == "causal":  # whose answer stands behind the question
            lengths = dict.fromkeys(lengths, source + target)
    examples = args.per_device_train_batch_size
    return {name: torch.zeros(examples, min(n, most), dtype=torch.long) for name, n in lengths.items()}


def _trainer(flags: FastkdArguments, args: TransformersArguments, folder: str, fakes: FakeTensorMode) -> Any:
    """Return a trainer of the run's models, with an optimiser."""
    changes: dict[str, Any] = {"output_dir": folder, "report_to": "none", "fsdp": None, "use_cpu": True}
    changes |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    # accelerate refuses fp16 on a CPU.
    args = dataclasses.replace(args, **changes, bf16=args.bf16 or args.fp16, fp16=False)
    names = ("workspace_mb", "embedding_learning_rate", "projection_learning_rate")
    options: dict[str, Any] = {"args": args, "method": flags.objective, **{x: getattr(flags, x) for x in names}}
    kind: Any = DistillTrainer
    try:
        student, teacher, candidates = models(flags, fakes)
        for model in (student, teacher):
            if model is not None:
                model.to = lambda *_, model=model, **__: model  # it sets the parameters' data, which fake ones refuse
        if candidates is not None:
            kind, options["candidates"], options["sandwich_size"] = CandidateTrainer, candidates, flags.sandwich_size
        if flags.teacher_cache:
            kept = Kind.parse(flags.teacher_cache)
            if kept.entries:
                raise InputError(f"--teacher_cache {kept}: only hidden can be planned, which holds more")
            head = head_of(teacher)
            shards: Any = None
            dtype: Any = torch.bfloat16 if args.bf16 else head.weight.dtype
            teacher = _Kept(shards, teacher.config, kept, head, 1, 1.0, dtype)
        with fakes:
            trainer = kind(**options, model=student, teacher=teacher)
    except ValueError as error:  # of models that do not fit together
        raise InputError(f"--{error}") from error
    if args.gradient_checkpointing:  # under the name that the installed transformers has for it
        enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
        enable(args.gradient_checkpointing_kwargs)
    trainer.create_optimizer()
    return trainer


def step(flags: FastkdArguments, args: TransformersArguments, device: str) -> dict[str, dict[str, float]]:
    """Return what one process alone holds at the moments of a step after the first, in bytes; see `plan`.

    Beside its items what would be communicated: "gathered" of a sharded student, and "its gathered" of such a teacher.
    """
    optimiser, on_cpu = str(getattr(args.optim, "value", args.optim)), device == "cpu"
    if optimiser not in OPTIMISERS:
        raise InputError(f"--optim: {', '.join(OPTIMISERS)} can be planned, got {optimiser}")
    alive = LiveStep(int((flags.workspace_mb or WORKSPACE_MB[device]) * 2**20), on_cpu)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(flags, args, folder, fakes := FakeTensorMode())
    with fakes:
        student, teacher, update = trainer.model, trainer.teacher, trainer.optimizer
        for group in update.param_groups:
            if "foreach" in group:  # as it is on a GPU without asking, which takes more
                group["foreach"] = not on_cpu and not group.get("fused")
        for parameter in student.parameters():
            alive.count(parameter, "student's weights")
            if not parameter.requires_grad:  # sinusoids
                continue
            parameter.grad = torch.empty_like(parameter)
            parameter.register_post_accumulate_grad_hook(lambda x: alive.count(x.grad, "gradients"))
        update.step()  # makes its state
        update.zero_grad()
        for tensor in [x for state in update.state.values() for x in state.values() if isinstance(x, torch.Tensor)]:
            alive.count(tensor, "optimiser")
        is_kept = isinstance(teacher, CachedTeacher)
        for parameter in () if teacher is None else [teacher.head.weight] if is_kept else teacher.parameters():
            alive.count(parameter, "teacher's weights")
        forward = alive.at("loss", "student's activations", trainer.training_step)
        trainer._teachers = alive.at("teacher", "teacher's activations", trainer._teachers)
        trainer._terms = alive.at("loss", "loss", trainer._terms)
        trainer.accelerator.backward = alive.at("backward", "student's activations", trainer.accelerator.backward)
        positions = family(student).positions(student.config) or sys.maxsize
        examples, model = batch(flags, args, kind(student), positions), trainer.accelerator.prepare_model(student)
        with alive, contextlib.nullcontext() if on_cpu else GpuAutocast():
            for _ in range(min(args.gradient_accumulation_steps, 2)):  # the second beside the first one's gradients
                forward(model, examples, torch.ones((), dtype=torch.long))
            alive.at("update", "optimiser", update.step)()
    if teacher is not None and not is_kept:
        alive.moments["teacher"]["its gathered"] = teacher.dtype.itemsize * _gathered(teacher)
        alive.moments["loss"]["its gathered"] = head_module(teacher).weight.nbytes
    gathered = 2 * (2 if args.bf16 or args.fp16 else 4) * _gathered(student)  # weights, and their gradients
    order = [moment for moment in ("teacher", "loss", "backward", "update") if moment in alive.moments]
    return {moment: {**alive.moments[moment], "gathered": gathered} for moment in order}


def _gathered(model: Any) -> int:
    """Return the numbers of a sharded model that are whole at a time: two blocks, and what is in none."""
    modules = [*every_layer(model), model]
    *blocks, everything = [sum(parameter.numel() for parameter in module.parameters()) for module in modules]
    return everything - sum(blocks) + 2 * blocks[-1]


def spread(alone: dict[str, dict[str, float]], fsdp: Any, teacher_sharding: str, processes: int) -> Plan:
    """Return what each of so many processes holds, of what `step` says of one alone."""
    shards, its_shards = processes if fsdp else 1, processes if teacher_sharding == "full" else 1
    share = {**dict.fromkeys(("student's weights", "optimiser", "gradients"), shards), "teacher's weights": its_shards}
    moments = {moment: {x: items.get(x, 0) / share.get(x, 1) for x in ITEMS} for moment, items in alone.items()}
    for moment, items in moments.items():
        if processes > 1:  # DDP's buckets are a copy of all gradients
            items["communication"] = alone[moment]["gathered"] if fsdp else items["student's weights"]
        if its_shards > 1:
            items["communication"] += alone[moment].get("its gathered", 0)
    return Plan(moments)


def plan(flags: FastkdArguments, args: TransformersArguments, processes: int = 1, device: str = "cuda") -> Plan:
    """Return what each of so many processes holds on its device, "cuda" or "cpu", in a step after the first.

    The student is sharded over them if `--fsdp` is given, and the teacher if `--teacher_sharding` is full. Pairs count
    as being as long as the flags allow. A run that prunes counts as its first round, with equal shares of all layers.
    With `--teacher_cache` what the teacher says is there: the first run, which computes it before its student is made,
    has it loaded then. Raises InputError for optimisers that it does not know, and models that do not fit together.
    """
    sharding = "none" if flags.teacher_cache else flags.teacher_sharding
    return spread(step(flags, args, device), args.fsdp, sharding, processes)


# ---- the command line -----------------------------------------------------------------------------------------------


def _parsed(words: Sequence[str]) -> tuple[FastkdArguments, TransformersArguments]:
    """Return the flags of a run on a GPU, which the machine that plans for it need not have."""
    # transformers refuses 16 bits without one, and fastkd-train fp16 on a CPU: as many bytes as bf16.
    words = [re.sub("^--fp16", "--bf16", word) for word in words]
    return parse([*words, "--use_cpu"] if words else words, needs_data=False)


def _shown(found: Plan) -> str:
    """Return a table of GiB: an item a row, a moment a column."""
    rows = [["GiB", *found.moments]]
    rows += [[name, *(f"{items[name] / GIB:.2f}" for items in found.moments.values())] for name in ITEMS]
    rows.append(["sum", *(f"{found.total(moment) / GIB:.2f}" for moment in found.moments)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _others(flags: FastkdArguments, args: TransformersArguments, processes: int) -> Iterator[str]:
    """Yield flags that may each make a run need less, smaller and smaller batches last."""
    if not args.gradient_checkpointing:  # later versions of transformers call it by the first name
        yield f"--{'activation' if hasattr(args, 'activation_checkpointing') else 'gradient'}_checkpointing true"
    if flags.teacher_dtype != "bfloat16" and flags.objective.needs_teacher:
        yield "--teacher_dtype bfloat16"
    if processes > 1 and not args.fsdp:
        yield "--fsdp"
    if not flags.teacher_cache and flags.objective.needs_teacher:
        yield "--teacher_cache hidden"
    if processes > 1 and flags.teacher_sharding != "full" and not flags.teacher_cache:
        yield "--teacher_sharding full"
    for power in reversed(range((args.per_device_train_batch_size - 1).bit_length())):
        yield f"--per_device_train_batch_size {2**power}"


def _verdict(found: Plan, words: Sequence[str], own: argparse.Namespace, device: str) -> str:
    """Return in words whether it fits, and which single flags would make it fit."""
    given = own.memory_gb
    need = f"{found.peak / GIB:.2f} of {given:g} GiB at most ({found.largest})"
    if found.peak <= given * GIB:
        return f"fits: {need}, {given - found.peak / GIB:.2f} left"
    lines = [f"does not fit: {need}, {found.peak / GIB - given:.2f} too much; with one more flag"]
    for flag in _others(*_parsed(words), own.processes):
        try:
            peak = plan(*_parsed([*words, *flag.split()]), own.processes, device).peak
        except InputError:  # the run does not take it
            continue
        fits, is_size = peak <= given * GIB, "batch" in flag
        if fits or not is_size or flag.endswith(" 1"):
            lines.append(f"  {flag:34} {peak / GIB:8.2f} {'fits' if fits else 'does not fit'}")
        if fits and is_size:
            break
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan of the run that the flags ask for; return 0 if it fits, 1 if not, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m fastkd.train.plan",
        usage="%(prog)s [--processes N] [--memory_gb GIB] and the flags of fastkd-train",
        description="Say whether a run of fastkd-train fits into memory, by a step of its models without numbers.",
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, default=1, help="of the run, one for each device")
    parser.add_argument("--memory_gb", type=float, default=80.0, help="GiB of each process's device")
    own, words = parser.parse_known_args(argv)
    transformers.logging.set_verbosity_error()
    device = "cpu" if "--use_cpu" in words else "cuda"
    try:
        if own.processes < 1 or not own.memory_gb > 0:
            raise InputError("--processes and --memory_gb must be above 0")
        found = plan(*_parsed(words), own.processes, device)
        print(_shown(found))
        verdict = _verdict(found, words, own, device)
    except InputError as error:
        print(f"fastkd.train.plan: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    print(verdict)
    return 0 if verdict.startswith("fits") else 1


if __name__ == "__main__":
    raise SystemExit(main())
