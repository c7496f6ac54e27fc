"""The flags of fastkd-train: its own, then every field of transformers' Seq2SeqTrainingArguments."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments

import fastkd

from . import config
from .errors import InputError
from .objectives import METHODS, MIXUP_DISTANCES, STUDENT_INITS, Method
from .schedule import GRID, parse_grid
from .sharding import is_asked_for
from .tasks import TASKS, figure_names

# Our defaults for transformers' flags; `--demo` has its own, configs/demo.yaml.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 3e-4,
    "warmup_steps": 0.05,
    "weight_decay": 0.01,
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "logging_steps": 0.01,
    "save_steps": 0.1,
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": False,  # transformers' own default follows its log level, which the command line lowers
    "dataloader_pin_memory": torch.cuda.is_available(),
}
EMBEDDING_FACTOR = 80  # an embedding of random weights learns at this many times the rate of the other weights
EMBEDDED_DATA = {"docs": ("span_corruption", "text2text", "summarization", "classification")}  # the tasks it suits
SHARDINGS = ("full", "none")
TEACHER_DTYPES = ("auto", "float32", "bfloat16")  # in float16 T5s overflow, and transformers clamps them in silence
ARCHITECTURES = ("t5", "enct5")
IMPORTANCE_DATA = ("train", "dev")

_EXAMPLES = """\
examples:
  fastkd-train --demo
      everything from nothing: corpus, tokenizer, teacher, distilled student, and the same student from scratch
  fastkd-train --config miniend-e --teacher google/flan-t5-base --train_file corpus.jsonl.gz --output_dir runs/e
      pre-training by the paper's settings; --config takes a YAML file or the name of one of ours, and flags override it
  fastkd-train --method hsm-cka --teacher ./teacher --task summarization --train_file train.jsonl \\
               --eval_file dev.jsonl --output_dir runs/s
      a student sliced from its teacher, distilled on pairs and scored by ROUGE
  fastkd-train --method kd --student runs/e --teacher ./fine-tuned --task sst2 --train_file glue --output_dir runs/sst2
      fine-tune a student that exists, by GLUE's SST-2 in the folder glue/SST-2
  fastkd-train --demo --embedded_data docs --task classification --method mixkd
      the demo in another mode; also text2text and summarization
  fastkd-train --config minidisc --teacher ./fine-tuned --task glue/mrpc --train_file glue --target_sparsity 0.95 \\
               --output_dir runs/d
      prune a teacher that was fine-tuned for a task, let one round pick its assistant, and distil what is left
  fastkd-train --method mlmkd --interpolated --teacher ./t5-3b --train_file 'texts/*.txt' --output_dir runs/small
      teacher to assistant to student in one command
  fastkd-train --method miniend-d --divergence jsd --weights logit_kl=0.5 --teacher ./t5 \\
               --train_file corpus.jsonl.gz --output_dir runs/jsd
      another divergence, and another weight of one term
  fastkd-train --compare runs/e runs/jsd --output_dir runs/comparison
      one table and one picture of runs that are done
  fastkd-train --config runs/e/config.yaml --resume_from_checkpoint last
      continue an interrupted run: the same command plus this flag
  torchrun --nproc-per-node 8 -m fastkd.train.cli --config miniend-e --teacher google/flan-t5-xxl --fsdp --bf16 \\
           --teacher_dtype bfloat16 --train_file corpus.jsonl.gz --output_dir runs/xxl
      eight GPUs, teacher and student sharded; `python -m fastkd.train.plan` with these flags says whether it fits
"""


def _help(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ObjectiveArguments:
    """What is minimised."""

    _argument_group_name = "what to do"

    method: str = _help("; ".join(f"{name}: {m.summary}" for name, m in METHODS.items()), "mlmkd")
    config: str | None = _help("YAML file of flags without their dashes, or a name that --list_methods shows", None)
    demo: bool = _help(
        "compare distillation with training from scratch, from nothing, in a few minutes: configs/demo.yaml, whose "
        "settings other flags override",
        False,
    )
    list_methods: bool = _help("print the methods with their terms and weights, and stop", False)
    compare: list[str] | None = field(
        default=None, metadata={"help": "output folders of runs to put into one table and one picture, and stop"}
    )
    interpolated: bool = _help("distil an assistant of intermediate size first, and the student from it", False)
    temperature: float | None = _help("of the logit term; without it, the method's own", None)
    divergence: str | None = _help(
        f"of logit and relation terms: {', '.join(fastkd.DIVERGENCES)}; without it, the method's own", None
    )
    divergence_beta: float | None = _help("of jsd, skew_kl and skew_reverse_kl; without it, the method's own", None)
    weights: str | None = _help("TERM=NUMBER,... in place of the method's own weights of these terms", None)
    relation_heads: int | None = _help(
        "into which relation terms split queries, keys and values; without it, the method's own", None
    )
    teacher_layer: int | None = _help(
        "whose queries, keys and values relation terms take, from 1; without it the last, but 21 of 24", None
    )
    match_first_position: bool | None = _help(
        "compare hidden states of the first decoder position too, which reads the start token; without it, the "
        "method's own: hsm methods do not",
        None,
    )
    mse_states: int | None = _help(
        "hidden states of each stack that minidisc compares, evenly spaced; without it, 7", None
    )
    cka_over_processes: bool = _help(
        "compute the CKA of hidden states over the batches of all processes at once, as one process would; without it, "
        "each computes that of its own batch",
        False,
    )
    projection_learning_rate: float = _help("of the matrix by which hsm-linear projects hidden states", 1e-4)
    mixup_alpha: float | None = _help("mixkd mixes examples in shares of Beta(alpha, alpha); without it, 0.4", None)
    mixup_distance: str | None = _help(
        f"of mixkd, between teacher and student on mixed examples: {' or '.join(MIXUP_DISTANCES)}; without it, mse",
        None,
    )
    workspace_mb: float | None = _help("memory of the fused loss; without it, fastkd's default", None)


@dataclass
class ModelArguments:
    """Which models."""

    _argument_group_name = "models"

    teacher: str | None = _help(
        "folder or hub name of a T5 with its tokenizer, to learn from, for every method but scratch and mixkd-sm", None
    )
    train_teacher: bool = _help("train a teacher first, on the same data, by the --teacher_* flags", False)
    teacher_dtype: str = _help(
        f"in which the teacher runs: {', '.join(TEACHER_DTYPES)}; auto is that of its checkpoint, float32 for float16",
        "auto",
    )
    teacher_sharding: str = _help(
        f"{' or '.join(SHARDINGS)}: of the teacher over the processes of a run, each of which gathers a layer when it "
        "computes, or all of it in each",
        "full",
    )
    student: str | None = _help("folder or hub name of a T5 to start from, in place of a new student", None)
    student_layers: int | None = _help(
        "encoder layers, and as many decoder layers, of a student that is not pruned; without it, half the teacher's",
        None,
    )
    student_d_model: int | None = _help(
        "width, with heads 32 wide and feed-forward layers 4 times as wide, or for a slice as in the teacher; without "
        "it, the teacher's, with its heads and feed-forward layers",
        None,
    )
    student_init: str | None = _help(
        f"{', '.join(STUDENT_INITS)}: the top-left part of every matrix of the teacher, whose variant of T5 it then "
        "shares; random weights; or the teacher pruned (see below); without it, the method's own",
        None,
    )
    architecture: str | None = _help(
        f"{' or '.join(ARCHITECTURES)}: text to text, or T5's encoder with one decoder layer and a head for the "
        "classes of a task, which a --student that is a T5 becomes; without it, that of the models given, else t5",
        None,
    )
    assistant_layers: int | None = _help("of --interpolated; without it, halfway between teacher and student", None)
    assistant_d_model: int | None = _help("of --interpolated; without it, halfway, a multiple of 64", None)
    embedding_learning_rate: float | None = _help(
        "of the embedding; without it, 80 times the learning rate, as a random embedding starts at standard deviation "
        "1 and needs larger steps than the other weights; the learning rate itself where the student starts from a "
        "model of yours (--student, or a slice of --teacher)",
        None,
    )
    vocabulary_size: int = _help("pieces of the trained tokenizer, 100 sentinels included", 4096)
    teacher_layers: int | None = _help("of --train_teacher", None)
    teacher_d_model: int | None = _help("of --train_teacher", None)
    teacher_steps: int | None = _help("of --train_teacher", None)
    teacher_learning_rate: float = _help("of --train_teacher", 3e-4)


@dataclass
class DataArguments:
    """What to learn from."""

    _argument_group_name = "data"

    task: str = _help(
        "; ".join(f"{name}: {t.summary}" for name, t in TASKS.items()) + "; GLUE's also as glue/NAME", "span_corruption"
    )
    train_file: str | None = _help(
        "to learn from: a file, folder or glob of text (a paragraph is an example, between blank lines, or a line if "
        "those are rare), JSONL, CSV, TSV or Parquet, plain or .gz, or a folder saved by datasets; for GLUE the folder "
        "with its TSV files or saved splits, or for one of its tasks a file",
        None,
    )
    embedded_data: str | None = _help(
        f"{' or '.join(EMBEDDED_DATA)}, in place of files: data that needs no download, the documentation strings of "
        "Python's standard library",
        None,
    )
    eval_file: str | None = _help("to evaluate on, likewise; without it, a held-out 5 %% of the training data", None)
    dataset_name: str | None = _help("dataset on the hub, or folder saved by datasets, in place of files", None)
    dataset_config: str | None = _help("configuration of --dataset_name, such as sst2 of glue", None)
    train_split: str = _help("split of --dataset_name to learn from", "train")
    eval_split: str = _help("split of --dataset_name to evaluate on", "validation")
    text_column: str | None = _help("column of the text; without it, the one that fits", None)
    source_column: str | None = _help("column of what the encoder reads", None)
    target_column: str | None = _help("column of what the decoder writes", None)
    label_column: str | None = _help("column of the class", None)
    source_lang: str | None = _help("language to translate from, such as en", None)
    target_lang: str | None = _help("language to translate to, such as es", None)
    source_prefix: str | None = _help("what every source begins with; without it, the task's own as in T5", None)
    sequence_length: int = _help("tokens per chunk of text, before span corruption", 128)
    max_source_length: int | None = _help(
        "tokens of a source, the rest is cut; without it, what the model takes, but 128 of embedded data", None
    )
    max_target_length: int | None = _help(
        "tokens of a target, the rest is cut; without it, longer ones than the model takes are an error", None
    )
    streaming: bool = _help("read data on the way, for corpora larger than memory and disk; needs --max_steps", False)
    shuffle_buffer: int = _help("of --streaming: examples among which the next is drawn", 10_000)
    max_train_examples: int | None = _help(
        "use at most so many, the same at random in every run, of each task and class; of a stream the first", None
    )
    max_eval_examples: int | None = _help("use at most so many, likewise", None)
    report_examples: int = _help("held-out examples whose outputs the report shows", 8)
    cache_dir: str | None = _help(
        "where tokenised data, tokenizer and trained teacher are kept for other runs; without it, cache/ beside "
        "output_dir",
        None,
    )
    overwrite_output_dir: bool = _help("replace the run that output_dir already holds", False)


@dataclass
class PruningArguments:
    """How the teacher becomes the student, for methods that prune it (MiniDisc, Zhang et al., 2024)."""

    _argument_group_name = "pruning (--method minidisc, maxidisc, prune-kd, prune-pkd, or --student_init prune)"

    target_sparsity: float = _help("share of the teacher's heads, and of its neurons, that the student lacks", 0.9)
    sparsity_grid: str | None = _help(
        f"sparsities of possible assistants, and the target, as NUMBER,...; without it {','.join(map(str, GRID))}", None
    )
    truncation: float = _help("minidisc's candidates are at least as sparse", 0.5)
    tradeoff_lambda: float = _help("minidisc picks the candidate with the largest metric + lambda * sparsity", 0.2)
    assistants: int = _help("that minidisc picks one after the other; 0 distils the student from the teacher", 1)
    sandwich_size: int = _help(
        "candidates that learn in a step: the least and the most sparse, and others drawn anew; 0 for all, as in the "
        "paper",
        4,
    )
    assistant_sparsity: float | None = _help("of one fixed assistant, in place of one that is picked", None)
    patience: int = _help("evaluations without a better candidate after which a round ends", 5)
    selection_metric: str | None = _help(
        "held-out figure by which candidates are compared; without it the mean of the task's, or token_accuracy", None
    )
    importance_on: str = _help(
        f"{' or '.join(IMPORTANCE_DATA)}: what is measured to rank heads and neurons, a part of the training data that "
        "nothing is then trained on, or all held-out data, as in the paper's code",
        "train",
    )
    importance_examples: int = _help("of --importance_on train, at most a fifth of the training data", 512)


@dataclass
class FastkdArguments(ObjectiveArguments, ModelArguments, PruningArguments, DataArguments):
    """What fastkd-train adds to transformers' arguments. transformers_flags: those of transformers, as given."""

    transformers_flags: dict[str, Any] = field(default_factory=dict)

    def config_text(self, args: TransformersArguments) -> str:
        """Return all flags as YAML, to repeat the run by; access tokens, which are no one's to read, are left out."""
        settled = {name: getattr(args, name) for name in _SETTLED}
        ours = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _NOT_IN_CONFIG}
        left_out = [k for k in self.transformers_flags if k.endswith("_token") or k == "resume_from_checkpoint"]
        theirs = {k: v for k, v in self.transformers_flags.items() if k not in left_out}
        return config.dump({**theirs, **settled, **ours})

    @property
    def continues_given_model(self) -> bool:
        """Whether the student starts from the weights of a model that the user gave."""
        init = chosen_method(self).student_init
        return self.student is not None or (self.teacher is not None and init == "slice") or init == "prune"

    @property
    def grid(self) -> list[float]:
        """The sparsities of `--sparsity_grid` in rising order; raises ValueError if it is not numbers from 0 to 1."""
        return list(GRID) if self.sparsity_grid is None else parse_grid(self.sparsity_grid)

    @property
    def has_own_data(self) -> bool:
        """Whether the data is the user's own, and not embedded."""
        return self.train_file is not None or self.dataset_name is not None


# Flags whose values depend on others, and those of fastkd that have no place in a configuration.
_SETTLED = ("learning_rate", "max_steps", "num_train_epochs", "output_dir")
_NOT_IN_CONFIG = ("config", "compare", "list_methods", "overwrite_output_dir", "transformers_flags")


class TransformersArguments(Seq2SeqTrainingArguments):
    """Seq2SeqTrainingArguments in a group of its own, so that --help lists fastkd's flags first."""

    _argument_group_name = "transformers.Seq2SeqTrainingArguments"


_GROUPS: Any = [ObjectiveArguments, ModelArguments, PruningArguments, DataArguments, TransformersArguments]


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)  # argparse would print a hundred flags of usage first


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the epilog's line breaks."""


def make_parser() -> HfArgumentParser:
    """Return the parser of all flags."""
    parser = _Parser(
        _GROUPS,
        prog="fastkd-train",
        usage="fastkd-train (--demo | --method METHOD | --config FILE) [--output_dir FOLDER] [flags]",
        description="Distil a T5 teacher into a smaller T5 student, without ever materialising vocabulary logits.",
        epilog=_EXAMPLES,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(**DEFAULTS)
    for action in parser._actions:
        if action.dest == "match_first_position":  # transformers lets only booleans with a default go without a value
            action.nargs, action.const = "?", True
    return parser


def closest(given: str, known: Sequence[str]) -> str:
    """Return "; did you mean 'x'?" for the most similar known word, or nothing if none is similar."""
    match = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def parse(argv: Sequence[str], needs_data: bool = True) -> tuple[FastkdArguments, TransformersArguments]:
    """Parse and check the flags, and before them those of the file that `--config` names, and of `--demo`.

    needs_data: whether it is an error that nothing says what to learn from.
    Raises InputError for unknown flags, keys and methods (with the closest known one) and for values out of range.
    """
    parser = make_parser()
    flags = [option for action in parser._actions for option in action.option_strings]
    words = _with_config(argv, parser)
    try:
        *parts, args, unknown = parser.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError) as error:  # transformers' own checks of its arguments
        raise InputError(" ".join(str(error).split())) from error
    if unknown:
        kind = "flag" if unknown[0].startswith("-") else "argument"
        raise InputError(f"unknown {kind} {unknown[0]!r}" + closest(unknown[0].split("=")[0], flags))
    ours = FastkdArguments(**{name: value for part in parts for name, value in vars(part).items()})
    given = _names(words)
    part = ours.task.removeprefix("glue/")
    if part in TASKS and TASKS[part].splits:
        ours.task = part
    _check_names(ours)
    _settle(ours, args, given)
    _check(ours, args)
    if not (ours.compare or ours.list_methods):
        _check_inputs(ours, needs_data)
    values = vars(parser.parse_known_args(words)[0])  # as they were given; TransformersArguments computes from them
    ours.transformers_flags = {name: values[name] for name in sorted({*DEFAULTS, *given}) if hasattr(args, name)}
    return ours, args


# Of these flags one takes the place of the others, where a later layer gives it: the demo, a file, the command line.
_ALTERNATIVES = (
    ("max_steps", "num_train_epochs"),
    ("train_file", "dataset_name", "embedded_data"),
    ("teacher", "train_teacher"),
)


def _with_config(argv: Sequence[str], parser: HfArgumentParser) -> list[str]:
    """Return the words of the command line, behind those that stand for the keys of `--demo`'s and `--config`'s files.

    The last of two equal flags counts, so those of the command line override the file's, and these the demo's.
    """
    if not argv:
        raise InputError("give --demo, --method or --config; --help shows every flag, with examples")
    first, given = parser.parse_known_args(list(argv))[0], _names(argv)
    layers = [config.load(first.config)] if first.config else []
    if first.demo or ("demo" not in given and layers and layers[0][1].get("demo")):
        layers.insert(0, config.load("demo"))
    words = list(argv)
    for path, settings in reversed(layers):
        replaced = {name for group in _ALTERNATIVES if given.intersection(group) for name in group} - given
        settings = {name: value for name, value in settings.items() if name not in replaced}
        words = [*_words(path, settings, parser), *words]
        given |= {name for name, value in settings.items() if value is not None and value is not False}
    return words


def _words(path: str, settings: dict[str, Any], parser: HfArgumentParser) -> list[str]:
    """Return the words that say the same as a file's settings."""
    words: list[str] = []
    choices = {action.dest: action.choices or () for action in parser._actions if action.dest not in ("help", "config")}
    for key, value in settings.items():
        if key not in choices:
            raise InputError(f"{path}: unknown key {key!r}{closest(key, list(choices))}")
        if value is False and "no" in choices[key]:
            value = "no"  # as in `save_strategy: no`, which is a boolean to YAML
        words += config.words(path, key, value)
    return words


def _names(words: Sequence[str]) -> set[str]:
    """Return the flags among words, without their dashes and values."""
    return {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")}


def chosen_method(flags: FastkdArguments) -> Method:
    """Return the method with the flags' settings in place of its own.

    Raises InputError for weights of terms that the method lacks, that are no numbers, or that leave no term.
    """
    method = METHODS[flags.method]
    names = ["temperature", "divergence", "divergence_beta", "relation_heads", "teacher_layer"]
    names += ["match_first_position", "student_init", "mse_states", "mixup_alpha", "mixup_distance"]
    given = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    terms = {**method.terms}
    if flags.weights is not None:
        terms |= dict(_weight(text, method) for text in flags.weights.split(","))
    terms = {term: weight for term, weight in terms.items() if weight != 0}
    if not terms:
        raise InputError(f"--weights: every term of {flags.method} has weight 0")
    return replace(method, terms=terms, **given)


def _weight(text: str, method: Method) -> tuple[str, float]:
    """Return (term, weight) of "TERM=NUMBER"."""
    term, _, number = text.partition("=")
    if term not in method.terms:
        terms = list(method.terms)
        raise InputError(f"--weights: no term {term!r}{closest(term, terms)} (terms: {', '.join(terms)})")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise InputError(f"--weights: expected {term}=NUMBER, 0 or above, got {text!r}")
    return term, weight


def _settle(ours: FastkdArguments, args: TransformersArguments, given: set[str]) -> None:
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
    if ours.embedding_learning_rate is None and not ours.continues_given_model:
        ours.embedding_learning_rate = EMBEDDING_FACTOR * args.learning_rate
    if args.output_dir == "trainer_output":  # transformers' default
        args.output_dir = str(Path("runs") / ("demo" if ours.demo else "comparison" if ours.compare else ours.method))


_CHOICES: dict[str, Sequence[str]] = {
    "method": tuple(METHODS),
    "embedded_data": tuple(EMBEDDED_DATA),
    "task": tuple(TASKS),
    "divergence": tuple(fastkd.DIVERGENCES),
    "student_init": STUDENT_INITS,
    "mixup_distance": MIXUP_DISTANCES,
    "teacher_dtype": TEACHER_DTYPES,
    "teacher_sharding": SHARDINGS,
    "architecture": ARCHITECTURES,
    "importance_on": IMPORTANCE_DATA,
}
_POSITIVE = (
    "student_layers", "student_d_model", "assistant_layers", "assistant_d_model", "teacher_layers", "teacher_d_model",
    "teacher_steps", "temperature", "mixup_alpha", "projection_learning_rate", "workspace_mb",
    "max_train_examples", "max_eval_examples", "embedding_learning_rate", "teacher_learning_rate",
)  # fmt: skip
_LEAST = {
    "sequence_length": 8, "vocabulary_size": 512, "report_examples": 0, "shuffle_buffer": 0, "max_source_length": 2,
    "max_target_length": 2, "tradeoff_lambda": 0, "assistants": 0, "patience": 1, "importance_examples": 1,
    "sandwich_size": 0, "mse_states": 2,
}  # fmt: skip
_LEAST_OF_TRANSFORMERS = {
    "seed": 0, "data_seed": 0, "learning_rate": 0, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
}  # fmt: skip
# Flags of transformers that would do nothing here, or something else than they say; and what to do instead.
_NOT_SUPPORTED = {
    "label_smoothing_factor": "losses are fastkd's",
    "neftune_noise_alpha": "T5 reads its embedding past it",
    "use_liger_kernel": "losses are fastkd's",
    "sortish_sampler": "--train_sampling_strategy group_by_length is like it",
    "generation_config": "--generation_num_beams and --generation_max_length are",
    "prediction_loss_only": "evaluation is the loss and the token accuracy",
    "include_for_metrics": "evaluation is the loss and the token accuracy",
    "batch_eval_metrics": "evaluation is the loss and the token accuracy",
    "eval_do_concat_batches": "evaluation is the loss and the token accuracy",
    "bf16_full_eval": "it would leave the student in bf16; --bf16 evaluates under autocast",
    "fp16_full_eval": "it would leave the student in fp16; --bf16 evaluates under autocast",
    "push_to_hub": "look at the report first, then upload the folder with `hf upload`",
    "do_predict": "outputs of held-out examples are in the report",
}
_EITHER = (
    ("train_file", "dataset_name"), ("train_file", "embedded_data"), ("dataset_name", "embedded_data"),
    ("teacher", "train_teacher"), ("student", "interpolated"), ("demo", "interpolated"),
)  # fmt: skip
_NOT_FOR_GLUE = (
    "dataset_config", "train_split", "eval_split", "text_column", "source_column", "target_column", "source_prefix",
    "source_lang", "target_lang",
)  # fmt: skip


def _check_names(flags: FastkdArguments) -> None:
    if flags.method == "interpolated":
        raise InputError("interpolated goes with any method: give --interpolated and a --method")
    for name, known in _CHOICES.items():
        given = getattr(flags, name)
        if given is not None and given not in known:
            raise InputError(f"--{name}: unknown {given!r}{closest(given, known)} (known: {', '.join(known)})")


def _check(flags: FastkdArguments, args: TransformersArguments) -> None:
    for name, least, value in [
        *((name, least, getattr(flags, name)) for name, least in _LEAST.items()),
        *((name, least, getattr(args, name)) for name, least in _LEAST_OF_TRANSFORMERS.items()),
    ]:
        if value is not None and value < least:
            raise InputError(f"--{name} must be at least {least}, got {value}")
    for name in _POSITIVE:
        value = getattr(flags, name)
        if value is not None and not value > 0:
            raise InputError(f"--{name} must be above 0, got {value}")
    defaults = {f.name: f.default for f in (*dataclasses.fields(args), *dataclasses.fields(flags))}
    for name, why in _NOT_SUPPORTED.items():
        if getattr(args, name) not in (defaults[name], []):
            raise InputError(f"--{name} is not supported: {why}")
    # Later versions of transformers call it by the first name.
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if (getattr(args, name, None) or {}).get("use_reentrant"):
            raise InputError(f"--{name}: use_reentrant is not supported, states are captured on the way")
    if TASKS[flags.task].splits or TASKS[flags.task].parts:
        for name in _NOT_FOR_GLUE:
            if getattr(flags, name) != defaults[name]:
                raise InputError(f"--{name} has no effect with --task {flags.task}, whose data is laid out as GLUE's")
    if flags.task == "span_corruption" and args.train_sampling_strategy not in (
        "random",
        defaults["train_sampling_strategy"],
    ):
        raise InputError("--train_sampling_strategy has no effect with span_corruption: chunks are equally long")
    if flags.divergence_beta is not None and not 0 < flags.divergence_beta < 1:
        raise InputError(f"--divergence_beta must be between 0 and 1, got {flags.divergence_beta}")
    method = chosen_method(flags)
    _check_pruning(flags, args, method)
    _check_processes(flags, args, method)
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
    figures = figure_names(TASKS[flags.task])
    if flags.selection_metric not in (None, "token_accuracy", *figures):
        names = ", ".join(["token_accuracy", *figures])
        raise InputError(f"--selection_metric: expected one of {names}, got {flags.selection_metric!r}")
    known = ["loss", "token_accuracy", *(figures if args.predict_with_generate else [])]
    best = args.metric_for_best_model
    if best is not None and best.removeprefix("eval_") not in known:
        raise InputError(
            f"--metric_for_best_model: expected one of {', '.join(f'eval_{name}' for name in known)}, got {best!r}"
            + ("" if args.predict_with_generate else " (those of generated texts need --predict_with_generate)")
        )
    if flags.streaming and flags.embedded_data:
        raise InputError("--streaming needs --train_file or --dataset_name: embedded data fits into memory")
    if flags.streaming and args.dataloader_num_workers > 1:
        raise InputError(f"--streaming is read by 0 or 1 --dataloader_num_workers, got {args.dataloader_num_workers}")
    if flags.streaming and not flags.teacher and not flags.student:
        raise InputError("--streaming needs --teacher or --student: a tokenizer cannot be trained on a stream")


def _check_inputs(flags: FastkdArguments, needs_data: bool) -> None:
    """Raise InputError if something is missing: data, a teacher, or the size of a model."""
    method = chosen_method(flags)
    if needs_data and not flags.has_own_data and flags.embedded_data is None:
        raise InputError(
            "nothing to learn from: give --train_file FILE, --dataset_name NAME, --embedded_data "
            f"{' or '.join(EMBEDDED_DATA)}, or --demo"
        )
    if flags.embedded_data is not None and flags.task not in EMBEDDED_DATA[flags.embedded_data]:
        raise InputError(
            f"--task {flags.task} needs --train_file or --dataset_name: --embedded_data {flags.embedded_data} is for "
            f"{', '.join(EMBEDDED_DATA[flags.embedded_data])}"
        )
    if method.needs_teacher and not (flags.teacher or flags.train_teacher):
        raise InputError(
            f"--method {flags.method} needs a teacher: give --teacher FOLDER_OR_NAME, or --train_teacher to train one "
            "on the same data first"
        )
    if flags.train_teacher and not method.needs_teacher:
        raise InputError(f"--train_teacher has no effect with --method {flags.method}, which has no teacher")
    sizes = ["teacher_layers", "teacher_d_model", "teacher_steps"] if flags.train_teacher else []
    if not (flags.teacher or flags.train_teacher or flags.student):
        sizes = ["student_layers", "student_d_model"]  # no teacher to take them from
    missing = [f"--{name}" for name in sizes if getattr(flags, name) is None]
    if missing:
        raise InputError(f"a model is to be made from nothing: give its {' and '.join(missing)}")


def _check_processes(flags: FastkdArguments, args: TransformersArguments, method: Method) -> None:
    """Raise InputError for what several processes cannot do together."""
    if flags.cka_over_processes and "hidden_cka" not in method.terms:
        raise InputError(f"--cka_over_processes has no effect with --method {flags.method}, which has no CKA")
    if flags.cka_over_processes and not args.average_tokens_across_devices:
        raise InputError("--cka_over_processes needs --average_tokens_across_devices, which is the default")
    if args.world_size == 1:
        return
    if args.torch_compile and is_asked_for(args):
        raise InputError("--torch_compile is not supported with FSDP, which gathers weights inside of what is compiled")
    if method.student_init == "prune":
        raise InputError(f"--method {flags.method} runs in one process, got {args.world_size}")
    if flags.demo:
        raise InputError(f"--demo runs in one process, got {args.world_size}")


def _check_pruning(flags: FastkdArguments, args: TransformersArguments, method: Method) -> None:
    given = [f.name for f in dataclasses.fields(PruningArguments) if getattr(flags, f.name) != f.default]
    if method.student_init == "prune":
        _check_selection(flags, method, given)
        _check_sparsities(flags, method)
        _check_beside_pruning(flags, args)
    elif given:
        raise InputError(f"--{given[0]} has no effect with --method {flags.method}, which does not prune its teacher")


def _check_sparsities(flags: FastkdArguments, method: Method) -> None:
    try:
        grid = flags.grid
    except ValueError as error:
        raise InputError(f"--sparsity_grid: {error}") from error
    target, sparsities = flags.target_sparsity, ", ".join(f"{sparsity:g}" for sparsity in grid)
    if target not in grid or target == 0:
        raise InputError(
            f"--target_sparsity: expected one of the grid's above 0 ({sparsities}; --sparsity_grid takes others), got "
            f"{target:g}"
        )
    if flags.assistant_sparsity is not None and not 0 < flags.assistant_sparsity < target:
        raise InputError(
            f"--assistant_sparsity: expected one above 0 and below the target's, {target:g}, got "
            f"{flags.assistant_sparsity:g}"
        )
    if not 0 <= flags.truncation <= 1:
        raise InputError(f"--truncation: expected 0 to 1, got {flags.truncation:g}")
    between = [sparsity for sparsity in grid if flags.truncation <= sparsity < target]
    picks = method.schedule == "minidisc" and flags.assistant_sparsity is None
    if picks and flags.assistants > len(between):
        raise InputError(
            f"--assistants {flags.assistants}: the grid has {len(between)} from --truncation {flags.truncation:g} to "
            f"below the target {target:g} ({sparsities})"
        )
    if flags.sandwich_size == 1:
        raise InputError("--sandwich_size: expected 0 for all, or at least 2, the least and the most sparse, got 1")


_OF_SELECTION = ("assistants", "truncation", "tradeoff_lambda", "sandwich_size")


def _check_selection(flags: FastkdArguments, method: Method, given: Sequence[str]) -> None:
    """Raise InputError for flags, among the given ones, that would have no effect."""
    for name in _OF_SELECTION:
        if name in given and method.schedule != "minidisc":
            raise InputError(f"--{name} has no effect with --method {flags.method}, which picks no assistant")
        if name in given and flags.assistant_sparsity is not None:
            raise InputError(f"--{name} has no effect with --assistant_sparsity, which picks the assistant")
    if method.schedule == "maxidisc" and flags.assistant_sparsity is not None:
        raise InputError("--assistant_sparsity has no effect with --method maxidisc, which tries all of the grid")
    if flags.importance_on == "dev" and "importance_examples" in given:
        raise InputError("--importance_examples has no effect with --importance_on dev, which takes all held-out data")


_NOT_WITH_PRUNING = {
    "student": "the student is the teacher pruned",
    "demo": "without --demo it makes all it needs, too",
    "interpolated": "--assistants is like it",
    "streaming": "importance and rounds need data that is read again",
    "torch_compile": "widths change in every step",
    "load_best_model_at_end": "rounds keep the best candidate already",
}


def _check_beside_pruning(flags: FastkdArguments, args: TransformersArguments) -> None:
    for name, why in _NOT_WITH_PRUNING.items():
        if getattr(flags, name, None) or getattr(args, name, None):
            raise InputError(f"--{name} is not supported with --method {flags.method}: {why}")
