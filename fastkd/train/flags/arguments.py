"""From the words of a command line to flags: fastkd-train's own, and every field of Seq2SeqTrainingArguments."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments

from ..common import processes
from ..common.errors import InputError, closest
from . import checks, config
from .fields import FastkdArguments
from .parser import ABOUT, DEFAULTS, JOINED, bounded, fields_by_name, help_text, kind_of, reader

EMBEDDING_FACTOR = 80  # an embedding of random weights learns at this many times the rate of the other weights
# Flags, and those that take their place where a later layer gives them: the demo, a file, the command line.
_DATA = ("train_file", "dataset_name", "embedded_data")
_REPLACED_BY = {
    "max_steps": ("num_train_epochs",), "num_train_epochs": ("max_steps",), "teacher": ("train_teacher",),
    "train_teacher": ("teacher",), "labelled_examples": _DATA, **dict.fromkeys(_DATA, _DATA),
}  # fmt: skip
_BOUNDS = {  # of transformers' numbers; at least 0 is what its fractions have without
    "seed": {"least": 0}, "data_seed": {"least": 0},
    "learning_rate": {"above": 0},  # at 0 a student would stay what it was
    "per_device_train_batch_size": {"least": 1}, "per_device_eval_batch_size": {"least": 1},
    "gradient_accumulation_steps": {"least": 1},
}  # fmt: skip
# Old names of transformers' flags, and the new ones that they are given under where the installed version has them.
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


class TransformersArguments(Seq2SeqTrainingArguments):
    """Seq2SeqTrainingArguments in a group of its own."""

    _argument_group_name = "transformers.Seq2SeqTrainingArguments"

    @property
    def n_gpu(self) -> int:
        """The GPUs of this process: the first, where it sees several; with more, transformers takes DataParallel."""
        return min(super().n_gpu, 1)


class _Parser(HfArgumentParser):
    """Raises InputError, where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise InputError(re.sub(r"^argument (--\w+)(/--[\w-]+)?", r"\1", message))


@functools.cache
def _parser() -> HfArgumentParser:
    """Return the parser of transformers' flags and fastkd-train's own."""
    group: Any = TransformersArguments
    parser: Any = _Parser(group, prog="fastkd-train", allow_abbrev=False, add_help=False)
    parser.set_defaults(**DEFAULTS, dataloader_pin_memory=torch.cuda.is_available())
    for action in parser._actions:
        if action.dest in _BOUNDS or action.type is float:
            action.type = bounded(action.type, _BOUNDS.get(action.dest, {"least": 0}))
    nargs: dict[str, dict[str, Any]] = {"bool": {"nargs": "?", "const": True}, "list[str]": {"nargs": "+"}}
    for name, field in fields_by_name().items():
        alone = {"nargs": "?", "const": "dates"} if name == "demo" else nargs.get(kind_of(field), {})
        parser.add_argument(f"--{name}", type=reader(field), default=field.default, **alone)
    return parser


def help_of_everything() -> str:
    """Return the help of every flag."""
    theirs = _parser().format_help()
    return help_text(everything=True) + "\n" + theirs[theirs.index(TransformersArguments._argument_group_name) :]


def _suggestion(word: str, known: Sequence[str]) -> str:
    """Return "; did you mean ...?" for the flag that means what an unknown one says, or else for the most similar."""
    name = word.lstrip("-").split("=")[0]
    meant = next((flag for flag, others in config.texts("aliases").items() if name.lower() in others.split()), None)
    return f"; did you mean '--{meant}'?" if meant else closest(f"--{name}", [f"--{flag}" for flag in known])


def parse(argv: Sequence[str], needs_data: bool = True) -> tuple[FastkdArguments, TransformersArguments]:
    """Parse and check the flags, and before them those of the file that `--config` names, and of `--demo`.

    needs_data: whether it is an error that nothing says what to learn from.
    Raises InputError for unknown flags, keys and methods (with the closest known one) and for values out of range.
    """
    if not argv:
        raise InputError("give --demo, --method or --config; --help shows what there is, with examples")
    parser = _parser()
    line, unknown = _given([_underscored(word) for word in argv])
    if unknown:
        kind = "flag" if unknown[0].startswith("-") else "argument"
        known = [*(action.dest for action in parser._actions), *ABOUT]
        raise InputError(f"unknown {kind} {unknown[0]!r}" + (_suggestion(unknown[0], known) if kind == "flag" else ""))
    given = _with_files(line)
    theirs = {action.dest: given.get(action.dest, parser.get_default(action.dest)) for action in parser._actions}
    mine = {name: theirs.pop(name) for name in fields_by_name()}
    _make_intervals_agree(theirs, given)
    checks.check_supported(theirs, parser)
    checks.check_demo(mine, line)
    processes.be_patient(theirs["ddp_timeout"], theirs["use_cpu"], theirs["ddp_backend"])
    try:
        args = TransformersArguments(**theirs)
    except (ValueError, TypeError, ImportError) as error:  # transformers' own checks of its arguments
        raise InputError(" ".join(str(error).split())) from error
    named = sorted(name for name in {*DEFAULTS, *given} if name in theirs)
    ours = FastkdArguments(**mine, transformers_flags={name: theirs[name] for name in named})
    _settle(ours, args, given)
    checks.check(ours, args, line, needs_data)
    return ours, args


def _given(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the values that words give flags, renamed ones by their new names, and the words that belong to none."""
    parser = _parser()
    nothing = argparse.Namespace(**dict.fromkeys((action.dest for action in parser._actions), argparse.SUPPRESS))
    found, unknown = parser.parse_known_args(words, nothing)
    values = {name: value for name, value in vars(found).items() if value is not argparse.SUPPRESS}
    for old, new in _RENAMED.items():
        if old in values and hasattr(TransformersArguments, new):
            values.setdefault(new, values.pop(old))
    return values, unknown


def _with_files(line: dict[str, Any]) -> dict[str, Any]:
    """Return what the command line gives, over what `--config`'s file gives, over what the demo's does."""
    layers = [config.load(line["config"])] if line.get("config") else []
    if demo := line.get("demo", layers and layers[0][1].get("demo")):
        layers.insert(0, config.load("demo-encoder" if demo == "encoder" else "demo"))
    given = line
    for path, settings in reversed(layers):
        said = {name for name, value in given.items() if value is not None and value is not False}
        replaced = {name for name, by in _REPLACED_BY.items() if said.intersection(by)}
        given = {name: value for name, value in _read(path, settings).items() if name not in replaced} | given
    return given


def _read(path: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the values that a file's settings give flags; raise InputError with file and key for what is none."""
    values: dict[str, Any] = {}
    actions = {action.dest: action for action in _parser()._actions if action.dest != "config"}
    fields = fields_by_name()
    for key, value in settings.items():
        if key not in actions:
            raise InputError(f"{path}: unknown key {key!r}{_suggestion(key, list(actions)).replace('--', '')}")
        if value is False and "no" in (actions[key].choices or ()):
            value = "no"  # as in `save_strategy: no`, which is a boolean to YAML
        if key == "demo" and isinstance(value, bool):  # as it was written when there was one
            value = "dates" if value else None
        kind = kind_of(fields[key]) if key in fields else ""
        try:
            if kind == "str" and isinstance(value, bool | dict | list):
                raise InputError(f"expected a word, got {value!r}")
            found, others = _given(config.words(key, value, joined=kind in JOINED))
            if others:
                raise InputError(f"expected one value, got {value!r}")
        except InputError as error:
            raise InputError(f"{path}: {key}: {str(error).removeprefix(f'--{key}: ')}") from error
        values |= found
    return values


def _underscored(word: str) -> str:
    """Return a word of the command line with underscores in the flag's name, which may be written with dashes."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


def _make_intervals_agree(values: dict[str, Any], given: Collection[str]) -> None:
    """With `--load_best_model_at_end`, let evaluations and checkpoints come together where only one was given."""
    for what in ("strategy", "steps") if values["load_best_model_at_end"] else ():
        for one, other in ((f"eval_{what}", f"save_{what}"), (f"save_{what}", f"eval_{what}")):
            if one in given and other not in given and values[one] not in ("no", "best"):
                values[other] = getattr(values[one], "value", values[one])


def _settle(ours: FastkdArguments, args: TransformersArguments, given: Collection[str]) -> None:
    """Fill in the defaults that depend on other flags: how long, and at which rates."""
    if args.max_steps > 0:
        if "num_train_epochs" in given and args.num_train_epochs > 0:
            raise InputError("give --max_steps or --num_train_epochs, not both")
        args.num_train_epochs = 0.0
    elif args.max_steps == 0:
        raise InputError("--max_steps must be above 0, or -1 to go by --num_train_epochs")
    elif ours.streaming:
        raise InputError("--streaming needs --max_steps: nobody knows the length of a stream")
    elif args.num_train_epochs <= 0:
        raise InputError(f"--num_train_epochs must be above 0, got {args.num_train_epochs:g}")
    loading: Any = args.accelerator_config
    if ours.streaming and loading.dispatch_batches is None:
        # Every process reads the stream and takes its part; cutting up one's batches needs them to be equally long.
        loading.dispatch_batches = False
    starts_random = ours.student is None and ours.objective.student_init == "random"
    if ours.embedding_learning_rate is None and starts_random:
        ours.embedding_learning_rate = EMBEDDING_FACTOR * args.learning_rate
    if args.output_dir == "trainer_output":  # transformers' default
        demo = "demo" if ours.demo == "dates" else ours.demo
        args.output_dir = str(Path("runs") / (demo or ("comparison" if ours.compare else ours.method)))
