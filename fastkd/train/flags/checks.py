"""What flags may be given together, and which of transformers' flags fastkd-train does not take."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from ...teachers import WITHOUT_TAIL
from ..common.errors import InputError
from ..data.tasks import TASKS, figure_names, is_glue
from ..models.sharding import is_asked_for
from ..objectives.methods import Method
from ..teaching.kinds import Kind
from . import config
from .fields import EMBEDDED_DATA, WITH_BETA, FastkdArguments, PruningArguments

if TYPE_CHECKING:
    from transformers import HfArgumentParser, Seq2SeqTrainingArguments

_NO_DEEPSPEED = "losses and checkpoints need weights as torch keeps them; --fsdp shards the student"
_EITHER = (
    ("train_file", "dataset_name"), ("train_file", "embedded_data"), ("dataset_name", "embedded_data"),
    ("teacher", "train_teacher"), ("student", "interpolated"), ("demo", "interpolated"),
)  # fmt: skip
_OF_ENCODER = (
    "demo", "config", "teacher", "student_layers", "sequence_length", "max_eval_examples", "cache_dir",
    "overwrite_output_dir",
)  # fmt: skip
_NOT_OF_ENCODER = (
    "eval_strategy", "save_strategy", "load_best_model_at_end", "resume_from_checkpoint", "predict_with_generate",
)  # fmt: skip
_OF_PAIRS = "source_column target_column source_prefix source_lang target_lang"
_NOT_READ = {
    **dict.fromkeys(("span_corruption", "masked_lm", "causal_lm"), "max_source_length max_target_length"),
    "chat": "text_column target_column label_column source_prefix source_lang target_lang",
    "text2text": "label_column source_lang target_lang",
    "summarization": "label_column source_lang target_lang",
    "translation": "text_column label_column",
    "classification": "source_lang target_lang",
}


def check_supported(values: dict[str, Any], parser: HfArgumentParser) -> None:
    """Raise InputError for a value of transformers' flags that would not have its effect here."""
    refused = {_NO_DEEPSPEED: "deepspeed", **config.texts("refused")}
    for name, why in ((name, why) for why, names in refused.items() for name in names.split()):
        value, default = values[name], parser.get_default(name)
        if value not in (None, False, [], default) or (value is False and default):
            raise InputError(f"--{name} is not supported: {why}")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise InputError(f"accelerate's DeepSpeed is not supported: {_NO_DEEPSPEED}")


def check_demo(mine: dict[str, Any], line: Collection[str]) -> None:
    """Raise InputError for a flag of the command line that the demo of encoders does not read; mine: fastkd's own."""
    others = [name for name in line if name in _NOT_OF_ENCODER or (name in mine and name not in _OF_ENCODER)]
    if mine["demo"] == "encoder" and others:
        raise InputError(f"--{others[0]} has no effect with --demo encoder, whose methods and data are its own")


def check(
    flags: FastkdArguments, args: Seq2SeqTrainingArguments, line: Collection[str], needs_data: bool = True
) -> None:
    """Raise InputError for flags that do not go together, or if something is missing.

    line: those that the command line gives itself. needs_data: whether there must be data to learn from.
    """
    _check_transformers(flags, args)
    method = flags.objective
    if method.prunes:
        _check_pruning(flags, args, method)
    _check_processes(flags, args, method)
    if flags.teacher_cache:
        _check_cache(flags, method)
    if flags.demo and not method.needs_teacher:
        raise InputError("--demo compares a distillation method with scratch: choose another --method")
    if method.student_init == "slice" and not method.needs_teacher:
        raise InputError(f"--student_init: without a term for it {flags.method} has no teacher to slice, give random")
    for first, second in _EITHER:
        if getattr(flags, first) and getattr(flags, second):
            raise InputError(f"give --{first} or --{second}, not both")
    if flags.interpolated and not method.needs_teacher:
        raise InputError(f"--interpolated: {flags.method} has no teacher, so nothing comes between")
    if flags.interpolated and not flags.teacher:
        raise InputError("--interpolated needs a --teacher: the one that would be trained here is small already")
    if flags.labelled_examples and (flags.streaming or TASKS[flags.task].is_text or method.prunes):
        raise InputError("--labelled_examples needs pairs in memory: no --streaming, texts alone, or pruning")
    if flags.streaming and flags.embedded_data:
        raise InputError("--streaming needs --train_file or --dataset_name: embedded data fits into memory")
    if flags.streaming and args.dataloader_num_workers > 1:
        raise InputError(f"--streaming is read by 0 or 1 --dataloader_num_workers, got {args.dataloader_num_workers}")
    if flags.streaming and not flags.teacher and not flags.student:
        raise InputError("--streaming needs --teacher or --student: a tokenizer cannot be trained on a stream")
    if not flags.compare:
        _check_no_effect(flags, method, line)
        _check_inputs(flags, args, method, needs_data)


def _check_transformers(flags: FastkdArguments, args: Seq2SeqTrainingArguments) -> None:
    if args.load_best_model_at_end and "no" in (args.eval_strategy, args.save_strategy):
        raise InputError("--load_best_model_at_end needs --eval_strategy and --save_strategy other than no")
    if args.fp16 and args.device.type == "cpu":
        raise InputError("--fp16 needs a GPU: give --bf16, which CPUs compute in, too")
    # Later versions of transformers call it by the first name.
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if (getattr(args, name, None) or {}).get("use_reentrant"):
            raise InputError(f"--{name}: use_reentrant is not supported, states are captured on the way")
    if TASKS[flags.task].is_text and args.train_sampling_strategy != "random":
        raise InputError(f"--train_sampling_strategy has no effect with {flags.task}: chunks are equally long")
    figures = figure_names(TASKS[flags.task])
    if flags.selection_metric not in (None, "token_accuracy", *figures):
        names = ", ".join(["token_accuracy", *figures])
        raise InputError(f"--selection_metric: expected one of {names}, got {flags.selection_metric!r}")
    known = ["loss", "token_accuracy", *(figures if args.predict_with_generate else [])]
    best = args.metric_for_best_model
    if best is not None and best.removeprefix("eval_") not in known:
        names = ", ".join(f"eval_{name}" for name in known)
        others = "" if args.predict_with_generate else " (those of generated texts need --predict_with_generate)"
        raise InputError(f"--metric_for_best_model: expected one of {names}, got {best!r}{others}")


def _check_no_effect(flags: FastkdArguments, method: Method, line: Collection[str]) -> None:
    """Raise InputError for flags that would do nothing beside the others, if the command line says them.

    Files of flags may serve many runs; but the layout of data and the ways of pruning are of one, wherever it was said.
    """
    task, terms, of_method = TASKS[flags.task], method.terms, f"with --method {flags.method}, "
    is_text, glue, no_term = task.is_text, is_glue(task), f"{of_method}none of whose terms it is for"
    diverges = "logit_kl" in terms or ("mixup_kd" in terms and method.mixup_distance == "divergence")
    divergence, has_beta = method.divergence_in_words, set(WITH_BETA) & set(method.divergences)
    prunes, picks = method.prunes, "assistants truncation tradeoff_lambda sandwich_size"
    has_teacher, pruning = method.uses_teacher, [f.name for f in dataclasses.fields(PruningArguments)]
    reads = f"with --task {flags.task}"
    of_teacher = "teacher_layers teacher_d_model teacher_steps teacher_learning_rate"
    everywhere = (
        (f"{_OF_PAIRS} label_column", is_text, f"{reads}, which reads texts alone"),
        (f"{_OF_PAIRS} text_column dataset_config train_split eval_split", glue, f"{reads}, whose data is GLUE's"),
        ("text_column", flags.source_column and flags.task != "classification", f"{reads} beside --source_column"),
        ("source_column", flags.text_column and flags.task == "classification", f"{reads} beside --text_column"),
        ("target_column", flags.label_column and flags.task == "classification", f"{reads} beside --label_column"),
        (" ".join(pruning), not prunes, f"{of_method}which does not prune its teacher"),
        ("assistant_sparsity", method.schedule == "maxidisc", f"{of_method}which tries all of the grid"),
        (
            "importance_examples",
            flags.importance_on == "dev",
            "with --importance_on dev, which takes all of it",
        ),
        ("train_teacher teacher_cache", not has_teacher, f"{of_method}which has no teacher"),
        ("cka_over_processes", "hidden_cka" not in terms, f"{of_method}which has no CKA"),
    )
    on_the_line = (
        (picks, method.schedule != "minidisc", f"{of_method}which picks no assistant"),
        (picks, flags.assistant_sparsity is not None, "with --assistant_sparsity, which picks the assistant"),
        (_NOT_READ.get(flags.task, ""), True, reads),
        ("sequence_length", not is_text, f"{reads}: pairs have --max_source_length and --max_target_length"),
        ("dataset_config train_split eval_split", not flags.dataset_name, "without --dataset_name"),
        ("shuffle_buffer", not flags.streaming, "without --streaming"),
        ("vocabulary_size", flags.teacher or flags.student, "beside a model, which brings its tokenizer"),
        (of_teacher, not flags.train_teacher, "without --train_teacher"),
        ("teacher_dtype teacher_sharding", not has_teacher, f"{of_method}which has no teacher"),
        ("teacher_cache_dir teacher_cache_epochs", not flags.teacher_cache, "without --teacher_cache"),
        ("whole_word_masking", flags.task != "masked_lm", reads),
        ("teacher_cache_epochs", not is_text, f"{reads}: pairs are the same in every epoch"),
        ("student_layers student_d_model student_init", flags.student, "beside --student, which is the student"),
        ("student_layers student_d_model", prunes, "with a student that is its teacher pruned: give --target_sparsity"),
        ("assistant_layers assistant_d_model", not flags.interpolated, "without --interpolated"),
        ("temperature", not diverges, no_term),
        ("divergence divergence_beta", not diverges and not method.places, no_term),
        ("divergence_beta", not has_beta, f"with --divergence {divergence}"),
        ("relation_heads teacher_layer", not method.places, no_term),
        ("match_first_position", not method.hidden_terms, no_term),
        ("mse_states", "hidden_mse" not in terms, no_term),
        ("projection_learning_rate", "hidden_linear" not in terms, no_term),
        ("mixup_alpha", not method.mixup_terms, no_term),
        ("mixup_distance", "mixup_kd" not in terms, no_term),
        ("workspace_mb", not method.vocabulary_terms and not method.mixup_terms, no_term),
    )
    changed = {f.name for f in dataclasses.fields(flags) if getattr(flags, f.name) != f.default}
    for given, rules in (({*line, *changed}, everywhere), (line, on_the_line)):
        for names, has_none, why in rules:
            found = next((name for name in names.split() if has_none and name in given), None)
            if found:
                raise InputError(f"--{found} has no effect {why}")


def _check_inputs(flags: FastkdArguments, args: Seq2SeqTrainingArguments, method: Method, needs_data: bool) -> None:
    """Raise InputError if something is missing: data, a teacher, or the size of a model."""
    if needs_data and not flags.has_own_data and flags.embedded_data is None:
        hint = f"to resume a run, give --config {args.output_dir}/config.yaml" if args.resume_from_checkpoint else ""
        ways = f"--train_file FILE, --dataset_name NAME, --embedded_data {' or '.join(EMBEDDED_DATA)}, or --demo"
        raise InputError(f"nothing to learn from: give {ways}" + (f"; {hint}" if hint else ""))
    suited = EMBEDDED_DATA[flags.embedded_data] if flags.embedded_data else [flags.task]
    if flags.task not in suited:
        limits = f"--embedded_data {flags.embedded_data} is for {', '.join(suited)}"
        raise InputError(f"--task {flags.task} needs --train_file or --dataset_name: {limits}")
    if method.uses_teacher and not (flags.teacher or flags.train_teacher):
        why = "" if method.needs_teacher else " with --student_init prune"
        ways = "--teacher FOLDER_OR_NAME, or --train_teacher to train one on the same data"
        raise InputError(f"--method {flags.method}{why} needs a teacher: give {ways}")
    sizes = ["teacher_layers", "teacher_d_model", "teacher_steps"] if flags.train_teacher else []
    if not (flags.teacher or flags.train_teacher or flags.student):
        sizes = ["student_layers", "student_d_model"]  # no teacher to take them from
    missing = [f"--{name}" for name in sizes if getattr(flags, name) is None]
    if missing:
        raise InputError(f"a model is to be made from nothing: give its {' and '.join(missing)}")


def _check_processes(flags: FastkdArguments, args: Seq2SeqTrainingArguments, method: Method) -> None:
    """Raise InputError for what several processes cannot do together."""
    if flags.cka_over_processes and not args.average_tokens_across_devices:
        raise InputError("--cka_over_processes needs --average_tokens_across_devices, which is the default")
    if args.world_size == 1:
        return
    if args.torch_compile and is_asked_for(args):
        raise InputError("--torch_compile is not supported with FSDP, which gathers weights inside of what is compiled")
    if method.prunes:
        raise InputError(f"--method {flags.method} runs in one process, got {args.world_size}")
    if flags.demo:
        raise InputError(f"--demo runs in one process, got {args.world_size}")


_NOT_WITH_CACHE = {
    "streaming": "examples of a stream have no numbers",
    "labelled_examples": "its teacher writes targets, which are then other examples",
}


def _check_cache(flags: FastkdArguments, method: Method) -> None:
    """Raise InputError for a cache of the teacher that is no such, or that would not hold what the run needs."""
    this = f"--teacher_cache {flags.teacher_cache} is not supported with"
    try:
        kind = Kind.parse(str(flags.teacher_cache))
    except ValueError as error:
        raise InputError(f"--teacher_cache: {error}") from error
    if kind.name == "sampled" and not set(method.divergences) <= set(WITHOUT_TAIL):
        given, ways = method.divergence_in_words, f"expected {' or '.join(WITHOUT_TAIL)}, or --teacher_cache topk:K"
        raise InputError(f"{this} --divergence {given}, which asks for the whole distribution: {ways}")
    for name, why in _NOT_WITH_CACHE.items():
        if getattr(flags, name):
            raise InputError(f"{this} --{name}: {why}")
    if method.prunes:
        raise InputError(f"{this} --method {flags.method}: each round has another teacher")
    if "mixup_kd" in method.terms:
        raise InputError(f"{this} --method {flags.method}: every step mixes other examples")
    if others := [*method.places, *method.hidden_terms]:
        raise InputError(f"{this} --method {flags.method}: {', '.join(others)} compares states of its layers")
    if flags.interpolated and flags.teacher_cache_dir:
        raise InputError("--teacher_cache_dir is of one teacher, and --interpolated has two: leave it away")


_NOT_WITH_PRUNING = {
    "student": "the student is the teacher pruned",
    "demo": "without --demo it makes all it needs, too",
    "interpolated": "--assistants is like it",
    "streaming": "importance and rounds need data that is read again",
    "torch_compile": "widths change in every step",
    "load_best_model_at_end": "rounds keep the best candidate already",
}


def _check_pruning(flags: FastkdArguments, args: Seq2SeqTrainingArguments, method: Method) -> None:
    for name, why in _NOT_WITH_PRUNING.items():
        if getattr(flags, name, None) or getattr(args, name, None):
            raise InputError(f"--{name} is not supported with --method {flags.method}: {why}")
    grid = flags.grid
    target, sparsities = flags.target_sparsity, ", ".join(f"{sparsity:g}" for sparsity in grid)
    if target not in grid or target == 0:
        expected = f"one of the grid's above 0 ({sparsities}; --sparsity_grid takes others)"
        raise InputError(f"--target_sparsity: expected {expected}, got {target:g}")
    fixed = flags.assistant_sparsity
    if fixed is not None and not 0 < fixed < target:
        raise InputError(f"--assistant_sparsity: expected one above 0 and below the target's, {target:g}, got {fixed}")
    between = [sparsity for sparsity in grid if flags.truncation <= sparsity < target]
    if method.schedule == "minidisc" and fixed is None and flags.assistants > len(between):
        raise InputError(
            f"--assistants {flags.assistants}: the grid has {len(between)} from --truncation {flags.truncation:g} to "
            f"below the target {target:g} ({sparsities}); give a smaller --truncation, or --assistants {len(between)}"
        )
    if flags.sandwich_size == 1:
        raise InputError("--sandwich_size: expected 0 for all, or at least 2, the least and the most sparse, got 1")
