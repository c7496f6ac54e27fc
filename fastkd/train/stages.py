"""The stages of a run: texts -> data (tokenizer, chunks) -> teacher -> student. Each prints a heading."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from tqdm.auto import tqdm
from transformers import AutoTokenizer, default_data_collator

from . import corpus
from .arguments import FastkdArguments, TransformersArguments, chosen_method
from .cache import cached, digest
from .data import SpanCorruption, pack
from .errors import InputError
from .objectives import METHODS, Method
from .report import Outcome
from .student import is_tied, load_teacher, new_model, slice_teacher, smaller_config, t5_config
from .tokenizer import SENTINELS, padded_size, train_tokenizer
from .trainer import DistillTrainer

HELD_OUT_SEED = 20  # one fixed corruption of the held-out chunks, whatever --seed is, so that runs compare
VERSION = 1  # raise it when a stage changes what it makes, so that older artefacts are not reused

# The arguments of transformers that shape a trained teacher; another value of one of them trains another teacher.
TEACHER_ARGUMENTS = (
    "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps", "seed",
    "bf16", "fp16",
)  # fmt: skip


@dataclass
class Data:
    """What every model of a run shares. train, held_out: chunks [N, sequence_length] of token ids."""

    tokenizer: Any
    train: np.ndarray
    held_out: np.ndarray
    digest: str


@dataclass
class Teacher:
    """A teacher, the save_pretrained folder it came from, and how it did (None for one that was given)."""

    model: Any
    folder: Path
    outcome: Outcome | None


def heading(text: str) -> None:
    """Print a stage's heading."""
    print(f"\n== {text}", flush=True)


def check_objective(flags: FastkdArguments, method: Method, teacher: Any) -> None:
    """Raise InputError if the method cannot compare the student with the teacher: one that was given, or the trained.

    Or if the student cannot be sliced from it. Before anything else is made, so that nobody waits for a teacher that is
    of no use.
    """
    student_config = t5_config(1, flags.student_d_model, flags.student_layers)
    teacher_config = teacher.config if teacher else t5_config(1, flags.teacher_d_model, flags.teacher_layers)
    try:
        if method.student_init == "slice":
            student_config = smaller_config(teacher_config, flags.student_d_model, flags.student_layers)
        method.check_fits(student_config, teacher_config)
    except ValueError as error:
        raise InputError(f"--{error}") from error


def get_texts(flags: FastkdArguments, cache: Path) -> tuple[list[str], list[str]]:
    """Return (train, held_out) texts from the files that were given, else from the embedded corpus."""
    heading("Texts")
    held_out = corpus.read_texts(flags.eval_file) if flags.eval_file else None
    if flags.train_file:
        texts = corpus.read_texts(flags.train_file)
    else:
        folder, _ = cached(cache, "corpus", {"version": VERSION, **corpus.fingerprint()}, _make_corpus)
        texts = (folder / "texts.txt").read_text(encoding="utf-8").split("\n")[:-1]
    train, held_out = (texts, held_out) if held_out else corpus.split(texts)
    characters = sum(map(len, train)) / 1e6
    print(f"{len(train):,} training texts ({characters:.2f} M characters), {len(held_out):,} held out")
    return train, held_out


def _make_corpus(folder: Path) -> None:
    texts = corpus.embedded_corpus(tqdm(corpus.source_files(), desc="reading the standard library", unit="file"))
    # White space is collapsed, so a text is a line.
    (folder / "texts.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8", newline="\n")


def get_data(flags: FastkdArguments, cache: Path, texts: tuple[list[str], list[str]], tokenizer: Any = None) -> Data:
    """Tokenise and pack the texts, with the given tokenizer or one trained on the training texts."""
    train, held_out = texts
    if tokenizer is None:
        settings = {
            "version": VERSION,
            "texts": digest(train),
            "vocabulary_size": flags.vocabulary_size,
            "sentinels": SENTINELS,
            "sentencepiece": sentencepiece.__version__,
        }

        def make(folder: Path) -> None:
            print("training a SentencePiece vocabulary ...", flush=True)
            train_tokenizer(train, flags.vocabulary_size).save_pretrained(folder)

        folder, _ = cached(cache, "tokenizer", settings, make)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    length = flags.sequence_length
    chunks = pack(tokenizer, train, length), pack(tokenizer, held_out, length, what="held-out text")
    print(f"{len(tokenizer):,} pieces; {len(chunks[0]):,} + {len(chunks[1]):,} chunks of {length} tokens")
    return Data(tokenizer, *chunks, digest([*train, "", *held_out]))


def get_teacher(flags: FastkdArguments, args: TransformersArguments, cache: Path, data: Data) -> Teacher:
    """Return the teacher trained on this run's texts, from the cache if it was trained before."""
    heading("Teacher: a T5 trained from scratch")
    args = dataclasses.replace(
        args,
        max_steps=flags.teacher_steps,
        learning_rate=flags.teacher_learning_rate,
        seed=args.seed + 1,  # other corruptions than those the student will see
        data_seed=None,
        save_strategy="no",
    )
    settings = {
        "version": VERSION,
        "texts": data.digest,
        "pieces": len(data.tokenizer),
        "sequence_length": flags.sequence_length,
        "layers": flags.teacher_layers,
        "d_model": flags.teacher_d_model,
        "embedding_learning_rate": flags.embedding_learning_rate,
        **{name: getattr(args, name) for name in TEACHER_ARGUMENTS},
    }

    def make(folder: Path) -> None:
        config = t5_config(padded_size(data.tokenizer), flags.teacher_d_model, flags.teacher_layers)
        model = new_model(config, args.seed)
        trainer = make_trainer(flags, args, data, model, "teacher", method=METHODS["scratch"])
        outcome = fit(trainer, "teacher")
        trainer.save_model(str(folder))
        (folder / "outcome.json").write_text(json.dumps(dataclasses.asdict(outcome)), encoding="utf-8")

    folder, reused = cached(cache, "teacher", settings, make)
    if reused:
        print(f"reusing {folder}")
    outcome = Outcome(**json.loads((folder / "outcome.json").read_text(encoding="utf-8")))
    return Teacher(load_teacher(folder)[0], folder, outcome)


def evaluate_given(flags: FastkdArguments, args: TransformersArguments, data: Data, model: Any) -> Outcome:
    """Evaluate a teacher that was given and not trained here."""
    heading("Teacher: held-out loss")
    metrics = make_trainer(flags, args, data, model, "teacher", method=METHODS["scratch"]).evaluate()
    loss, accuracy = metrics["eval_loss"], metrics["eval_token_accuracy"]
    return Outcome("teacher", count_parameters(model), 0, None, loss, accuracy, [])


def train_student(
    flags: FastkdArguments,
    args: TransformersArguments,
    data: Data,
    name: str,
    method: Method,
    teacher: Teacher | None,
    checkpoint: Path | None = None,
) -> tuple[DistillTrainer, Outcome]:
    """Train the student by a method. Its shape, first weights and data depend on the flags, not on the method.

    But the first weights are only a slice of the teacher for a method that starts so: the baseline is from scratch.
    """
    heading(f"Student: {name} ({method.summary})")
    student = new_student(flags, data, teacher.model if teacher else None, args.seed)
    if teacher and method.student_init == "slice":
        slice_teacher(student, teacher.model)
    trainer = make_trainer(flags, args, data, student, name, method=method, teacher=teacher.model if teacher else None)
    return trainer, fit(trainer, name, checkpoint)


def new_student(flags: FastkdArguments, data: Data, teacher: Any, seed: int) -> Any:
    """Return a student with random weights, of the teacher's variant of T5 if the flags ask for a slice of it."""
    width, layers, tokenizer = flags.student_d_model, flags.student_layers, data.tokenizer
    if chosen_method(flags).student_init == "slice":
        return new_model(smaller_config(teacher.config, width, layers), seed, tied=is_tied(teacher))
    rows = teacher.config.vocab_size if teacher else padded_size(tokenizer)
    return new_model(t5_config(rows, width, layers, tokenizer.pad_token_id, tokenizer.eos_token_id), seed)


def make_trainer(
    flags: FastkdArguments, args: TransformersArguments, data: Data, model: Any, title: str, **objective: Any
) -> DistillTrainer:
    """Return a trainer of `model` on the run's data. objective: `method` and what goes with it (see DistillTrainer)."""
    seed = args.seed if args.data_seed is None else args.data_seed
    trainer = DistillTrainer(
        model=model,
        args=args,
        train_dataset=SpanCorruption(data.train, data.tokenizer, seed),
        eval_dataset=SpanCorruption(data.held_out, data.tokenizer, HELD_OUT_SEED),
        data_collator=default_data_collator,  # all examples are equally long
        processing_class=data.tokenizer,
        workspace_mb=flags.workspace_mb,
        embedding_learning_rate=flags.embedding_learning_rate,
        projection_learning_rate=flags.projection_learning_rate,
        **objective,
    )
    trainer.show_progress(title)
    return trainer


def count_parameters(model: Any) -> int:
    """Return the number of parameters that a model is saved with, shared ones once."""
    unsaved = model._keys_to_ignore_on_save or ()  # a projection that only training needs
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name not in unsaved)


def fit(trainer: DistillTrainer, name: str, checkpoint: Path | None = None) -> Outcome:
    """Train, from a checkpoint if one is given, and evaluate on the held-out chunks."""
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    if not any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history):
        trainer.evaluate()
    final = [entry for entry in state.log_history if "eval_loss" in entry][-1]
    return Outcome(
        name=name,
        parameters=count_parameters(trainer.model),
        steps=state.global_step,
        seconds_per_step=trainer.seconds_per_step,
        loss=final["eval_loss"],
        token_accuracy=final["eval_token_accuracy"],
        history=[
            {key: value for key, value in entry.items() if key.startswith(("step", "loss", "eval_loss", "grad_norm"))}
            for entry in state.log_history
        ],
    )
