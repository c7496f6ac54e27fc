"""The flags that fastkd-train adds to transformers', each with its default, its bounds and its help.

Nothing heavy is imported, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..common.errors import InputError, closest
from ..objectives.methods import METHODS, MIXUP_DISTANCES, STUDENT_INITS, Method
from . import config

if TYPE_CHECKING:
    from transformers import Seq2SeqTrainingArguments

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd")  # fastkd's, known without torch
WITH_BETA = ("jsd", "skew_kl", "skew_reverse_kl")
EMBEDDED_DATA = {  # the tasks it suits
    "docs": ("span_corruption", "masked_lm", "causal_lm", "text2text", "summarization", "classification"),
    "dates": ("text2text",),
}
GLUE = ("sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)  # of sparsities; 0 is the teacher itself
TASKS = ("span_corruption", "masked_lm", "causal_lm", "text2text", "summarization", "chat", "translation",
         "classification", *GLUE, "glue")  # fmt: skip


def _flag(default: Any, help: str, choices: Sequence[str] = (), **bounds: float) -> Any:
    """Return a field. bounds: of its numbers, by the names above, least, below and most."""
    return field(default=default, metadata={"help": help, "choices": tuple(choices), **bounds})


# fmt: off
USUAL = (  # what --help shows; --help_all shows the others too
    "method", "config", "demo", "compare", "interpolated", "temperature", "divergence", "weights", "teacher",
    "train_teacher", "teacher_dtype", "teacher_cache", "student", "student_layers", "student_d_model", "student_init",
    "architecture", "task", "train_file", "eval_file", "dataset_name", "embedded_data", "text_column", "source_column",
    "target_column", "label_column", "source_lang", "target_lang", "sequence_length", "whole_word_masking",
    "max_source_length", "max_target_length", "streaming", "overwrite_output_dir", "target_sparsity",
)


@dataclass
class ObjectiveArguments:
    """What is minimised."""

    _argument_group_name = "what to do"

    method: str = _flag("mlmkd", "one of --list_methods, such as kd or hsm-cka", tuple(METHODS))
    config: str | None = _flag(None, "YAML file of flags without dashes, or the name of one of ours")
    demo: str | None = _flag(None, "distil a small student, with all that it takes", ("dates", "encoder"))
    compare: list[str] | None = _flag(None, "folders of runs, to put into one table and picture")  # noqa: RUF009
    interpolated: bool = _flag(False, "distil an assistant of medium size first, and the student from it")
    temperature: float | None = _flag(None, "of the logit term, in place of the method's own", above=0)
    divergence: str | dict[str, float] | None = _flag(  # noqa: RUF009
        None, "of logit and relation terms, in place of the method's own, or NAME=X,...", DIVERGENCES)
    divergence_beta: float | None = _flag(
        None, "of jsd, skew_kl and skew_reverse_kl, in place of the method's own", above=0, below=1)
    weights: dict[str, float] | None = _flag(None, "of some terms, in place of the method's own")  # noqa: RUF009
    relation_heads: int | None = _flag(
        None, "into which relation terms split queries, keys and values, in place of the method's own")
    teacher_layer: int | None = _flag(
        None, "whose queries, keys and values relation terms take, from 1; without it the last, but 21 of 24")
    match_first_position: bool | None = _flag(
        None, "compare hidden states of the first decoder position too, which reads the start token; without it, the "
        "method's own: hsm methods do not")
    mse_states: int | None = _flag(
        None, "hidden states of each stack that minidisc compares, evenly spaced; without it, 7", least=2)
    cka_over_processes: bool = _flag(
        False, "compute the CKA of hidden states over the batches of all processes at once, as one process would; "
        "without it, each computes that of its own batch")
    projection_learning_rate: float = _flag(1e-4, "of the matrix by which hsm-linear projects hidden states", above=0)
    mixup_alpha: float | None = _flag(None, "mixkd mixes in shares of Beta(alpha, alpha); without it, 0.4", above=0)
    mixup_distance: str | None = _flag(
        None, "of mixkd, between teacher and student on mixed examples; without it, mse", MIXUP_DISTANCES)
    workspace_mb: float | None = _flag(None, "memory of the fused loss; without it, fastkd's default", above=0)


@dataclass
class ModelArguments:
    """Which models."""

    _argument_group_name = "models"

    teacher: str | None = _flag(None, "folder or hub name of a model with its tokenizer, to learn from")
    train_teacher: bool = _flag(
        False, "train one first, on the same data, by --teacher_layers and the like")
    teacher_layers: int | None = _flag(None, "of --train_teacher", above=0)
    teacher_d_model: int | None = _flag(None, "of --train_teacher", above=0)
    teacher_steps: int | None = _flag(None, "of --train_teacher", above=0)
    teacher_learning_rate: float = _flag(3e-4, "of --train_teacher", above=0)
    # In float16 T5s overflow, and transformers clamps them in silence.
    teacher_dtype: str = _flag("auto", "auto is its checkpoint's", ("auto", "float32", "bfloat16"))
    teacher_sharding: str = _flag(
        "full", "of the teacher over the processes of a run, each of which gathers a layer when it computes, or all "
        "of it in each", ("full", "none"))
    teacher_cache: str | None = _flag(
        None, "run it once and keep for later epochs, students and runs: hidden, the states before its head; topk:K, "
        "its top; sampled:K, draws")
    teacher_cache_dir: str | None = _flag(None, "of --teacher_cache; without it, a folder in --cache_dir")
    teacher_cache_epochs: int = _flag(
        1, "of --teacher_cache: epochs of span corruption that are kept, which then begins again", least=1)
    student: str | None = _flag(None, "folder or hub name of a model to start from, in place of a new one")
    student_layers: int | None = _flag(None, "a side, of a new student; without it, half the teacher's", above=0)
    student_d_model: int | None = _flag(
        None, "its width, with heads as wide as the teacher's, but 32 in a random T5; without it, the teacher's, with "
        "its heads and feed-forward layers", above=0)
    student_init: str | None = _flag(
        None, "top-left parts of the teacher's matrices, random, or the teacher pruned, in place of the method's own",
        STUDENT_INITS)
    architecture: str | None = _flag(
        None, "of T5s: text to text, or an encoder with a head for classes, which a T5 given as --student becomes",
        ("t5", "enct5"))
    assistant_layers: int | None = _flag(
        None, "of --interpolated; without it, halfway between teacher and student", above=0)
    assistant_d_model: int | None = _flag(None, "of --interpolated; without it, halfway, a multiple of 64", above=0)
    embedding_learning_rate: float | None = _flag(
        None, "of the embedding; without it, 80 times the learning rate where it is random, as it needs larger steps "
        "than the other weights (a T5's starts at standard deviation 1); the learning rate itself where the student "
        "starts from a model of yours (--student, or a slice of --teacher)", above=0)
    vocabulary_size: int = _flag(4096, "of a tokenizer that is trained, where no model brings one", least=512)


@dataclass
class PruningArguments:
    """How the teacher becomes the student, for methods that prune it (MiniDisc, Zhang et al., 2024)."""

    _argument_group_name = "pruning (minidisc, maxidisc, prune-kd, prune-pkd, --student_init prune)"

    target_sparsity: float = _flag(0.9, "share of heads, and neurons, that the student lacks")
    sparsity_grid: list[float] | None = _flag(  # noqa: RUF009
        None, f"sparsities of possible assistants, and the target; without it {','.join(map(str, GRID))}")
    truncation: float = _flag(0.5, "minidisc's candidates are at least as sparse", least=0, most=1)
    tradeoff_lambda: float = _flag(
        0.2, "minidisc picks the candidate with the largest metric + lambda * sparsity", least=0)
    assistants: int = _flag(1, "that minidisc picks one after the other, from 0", least=0)
    sandwich_size: int = _flag(
        4, "candidates that learn in a step: the least and the most sparse, and others drawn anew; 0 for all, as in "
        "the paper", least=0)
    assistant_sparsity: float | None = _flag(None, "of one fixed assistant, in place of one that is picked")
    patience: int = _flag(5, "evaluations without a better candidate after which a round ends", least=1)
    selection_metric: str | None = _flag(
        None, "held-out figure by which candidates are compared; without it the mean of the task's, or token_accuracy")
    importance_on: str = _flag(
        "train", "what is measured to rank heads and neurons: a part of the training data that nothing is then trained "
        "on, or all held-out data, as in the paper's code", ("train", "dev"))
    importance_examples: int = _flag(512, "of --importance_on train, at most a fifth of the training data", least=1)


@dataclass
class DataArguments:
    """What to learn from."""

    _argument_group_name = "data"

    task: str = _flag("span_corruption", "what rows of data teach", TASKS)
    train_file: str | None = _flag(
        None, "file, folder or glob of text (a paragraph is an example, between blank lines, or a line if those are "
        "rare), JSONL, CSV, TSV or Parquet, plain or .gz, or a folder saved by datasets; for GLUE the folder with its "
        "TSV files or saved splits, or for one of its tasks a file")
    eval_file: str | None = _flag(None, "likewise, to evaluate on; without it, about 5 %% of the training data")
    dataset_name: str | None = _flag(None, "dataset on the hub, or folder saved by datasets")
    dataset_config: str | None = _flag(None, "configuration of --dataset_name, such as sst2 of glue")
    train_split: str = _flag("train", "split of --dataset_name to learn from")
    eval_split: str = _flag("validation", "split of --dataset_name to evaluate on")
    embedded_data: str | None = _flag(
        None, "needs no download: documentation of Python's standard library; dates in words into digits",
        tuple(EMBEDDED_DATA))
    text_column: str | None = _flag(None, "column of the text; without it, the one that fits")
    source_column: str | None = _flag(None, "column of what the model reads")
    target_column: str | None = _flag(None, "column of what the model is to write")
    label_column: str | None = _flag(None, "column of the class")
    source_lang: str | None = _flag(None, "language to translate from, such as en")
    target_lang: str | None = _flag(None, "language to translate to, such as es")
    source_prefix: str | None = _flag(None, "what every source begins with; without it, the task's own as in T5")
    sequence_length: int = _flag(128, "tokens per chunk of text, before any corruption", least=8)
    whole_word_masking: bool = _flag(False, "mask all of a word or nothing, in masked_lm")
    max_source_length: int | None = _flag(
        None, "tokens of a source, what is more is cut; without it, the model's, but 128 of embedded data", least=2)
    max_target_length: int | None = _flag(
        None, "tokens of a target, what is more is cut; without it, it is an error", least=2)
    streaming: bool = _flag(False, "read data on the way; needs --max_steps")
    shuffle_buffer: int = _flag(10_000, "of --streaming: examples among which the next is drawn", least=0)
    max_train_examples: int | None = _flag(
        None, "use at most so many, the same at random in every run, of each task and class; of a stream the first",
        above=0)
    max_eval_examples: int | None = _flag(None, "use at most so many, likewise", above=0)
    labelled_examples: int | None = _flag(
        None, "let a student see the targets of so many training examples alone; for the others it has what the "
        "teacher writes, or without a teacher nothing", above=0)
    report_examples: int = _flag(8, "held-out examples whose outputs the report shows", least=0)
    cache_dir: str | None = _flag(
        None, "where tokenised data, tokenizer and trained teacher are kept for other runs; without it, cache/ beside "
        "output_dir")
    overwrite_output_dir: bool = _flag(False, "replace the run that output_dir already holds")
# fmt: on


GROUPS = (ObjectiveArguments, ModelArguments, DataArguments, PruningArguments)


@dataclass
class FastkdArguments(ObjectiveArguments, ModelArguments, PruningArguments, DataArguments):
    """What fastkd-train adds to transformers' arguments. transformers_flags: those of transformers, as given."""

    transformers_flags: dict[str, Any] = field(default_factory=dict)

    def config_text(self, args: Seq2SeqTrainingArguments) -> str:
        """Return all flags as YAML, to repeat the run by."""
        depend_on_others = ("learning_rate", "max_steps", "num_train_epochs", "output_dir")
        settled = {name: getattr(args, name) for name in depend_on_others}
        del settled["num_train_epochs" if args.max_steps > 0 else "max_steps"]  # the other one says how long
        no_place = ("config", "compare", "overwrite_output_dir", "transformers_flags")
        ours = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in no_place}
        theirs = {name: v for name, v in self.transformers_flags.items() if name != "resume_from_checkpoint"}
        return config.dump({**theirs, **settled, **ours})

    @property
    def grid(self) -> list[float]:
        """The sparsities of `--sparsity_grid` in rising order."""
        return list(GRID) if self.sparsity_grid is None else self.sparsity_grid

    @property
    def has_own_data(self) -> bool:
        """Whether the data is the user's own, and not embedded."""
        return self.train_file is not None or self.dataset_name is not None

    @property
    def objective(self) -> Method:
        """The method with the flags' settings in place of its own.

        Raises InputError for weights of terms that the method lacks, or that leave no term.
        """
        method = METHODS[self.method]
        settings = {f.name: getattr(self, f.name, None) for f in dataclasses.fields(Method)}
        given = {name: value for name, value in settings.items() if value is not None}
        for term in self.weights or {}:
            if term not in method.terms:
                known = ", ".join(method.terms)
                raise InputError(f"--weights: no term {term!r}{closest(term, method.terms)} (terms: {known})")
        terms = {term: weight for term, weight in {**method.terms, **(self.weights or {})}.items() if weight != 0}
        if not terms:
            raise InputError(f"--weights: every term of {self.method} has weight 0")
        return replace(method, terms=terms, **given)


def parse_weights(text: str) -> dict[str, float]:
    """Return the weights in "TERM=NUMBER,..."; raises ValueError if one is not finite, or below 0."""
    weights = {}
    for part in text.split(","):
        term, _, number = part.partition("=")
        if term in weights:
            raise ValueError(f"expected each name once, got {term} twice")
        try:
            weights[term] = float(number)
        except ValueError:
            weights[term] = math.nan
        if not 0 <= weights[term] < math.inf:
            raise ValueError(f"expected {term}=NUMBER, finite and 0 or above, got {part!r}")
    return weights


def parse_mix(text: str) -> str | dict[str, float]:
    """Return a name, or the weights in "NAME=NUMBER,..."; raises ValueError if none is above 0."""
    if "=" not in text and "," not in text:
        return text
    mix = parse_weights(text)
    if not any(mix.values()):
        raise ValueError(f"expected NAME=NUMBER, one of them above 0, got {text!r}")
    return mix


def parse_grid(text: str) -> list[float]:
    """Return the sparsities in "NUMBER,..." in rising order; raises ValueError if one is not from 0 to below 1."""
    try:
        grid = sorted({float(word) for word in text.split(",")})
    except ValueError:
        grid = []
    if not grid or not all(0 <= sparsity < 1 for sparsity in grid):
        raise ValueError(f"expected NUMBER,... from 0 to below 1, got {text!r}")
    return grid
