"""From flags to data: rows are read, or taken from the embedded corpus, held out, tokenised once, kept in a cache."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import sentencepiece
from transformers import AutoTokenizer, default_data_collator

from ..common import endings
from ..common.cache import cached, key
from ..common.errors import InputError, counted
from ..common.family import family_of, has_types, kind_of
from ..common.processes import by_first
from ..data.columns import Columns
from ..data.corruption import CORRUPTIONS, ends, text_length
from ..data.encoding import PROBE, Encoding, set_languages
from ..data.examples import Chunks, StreamedChunks, StreamedPairs, pack_to_arrow
from ..data.pairs import Pairs, class_labels, pad, tokenize_pairs
from ..data.sources import blocks
from ..data.tasks import TASKS, Task, matched
from ..flags.fields import FastkdArguments
from ..models.tokenizer import SENTINELS, check_known, fingerprint, train_tokenizer
from .sides import HELD_OUT, TRAINING, VERSION, languages_of_sides, rows_of, sides_of

HELD_OUT_SEED = 20  # one fixed corruption of the held-out chunks, whatever --seed is, so that runs compare
MODEL_LENGTH = 512  # tokens that a T5 takes where its tokenizer does not tell
EMBEDDED_LENGTH = 128
VOCABULARY_BYTES = 1 << 25  # of text that a vocabulary is trained on: SentencePiece needs twenty times the memory
MOST_CLASSES = 1000  # different targets; more are hardly classes


@dataclass
class Data:
    """What every model of a run shares.

    train: a torch data set, or a stream. held_out: one with a length. held_out_rows: what the held-out pairs were made
    of, with columns "input_ids", "source", "target" and "task"; for texts, corrupted chunks, or halves of them to go on
    with. target_tokens: of the longest held-out target. digest: of the rows, the tokenizer and the lengths. parts:
    fingerprints of what they are made of, by name. facts: what a report says about them.
    classes: the targets that a classifier tells apart, in its order; one alone is a score; none for other models.
    """

    task: Task
    tokenizer: Any
    train: Any
    held_out: Any
    held_out_rows: datasets.Dataset
    target_tokens: int
    collate: Callable[..., Any]
    digest: str
    facts: dict[str, Any]
    parts: dict[str, Any]
    classes: Sequence[str] = ()

    def with_seed(self, seed: int) -> Data:
        """Return the same data with other corruptions."""
        return dataclasses.replace(self, train=self.train.with_seed(seed)) if isinstance(self.train, Chunks) else self


def heading(text: str) -> None:
    """Print a stage's heading."""
    print(f"\n== {text}", flush=True)
    endings.begin(f'"{text}"')


def get_data(
    flags: FastkdArguments,
    cache: Path,
    seed: int,
    tokenizer: Any = None,
    kind: str = "seq2seq",
    configs: Sequence[Any] = (),
) -> Data:
    """Return the data that the flags ask for, tokenised by the given tokenizer or by one trained on it.

    seed: of corruptions and orders. kind: of KINDS, what learns from it; configs: of the models that are known.
    Raises InputError for data that cannot be read or holds too little.
    """
    heading(f"Data: {flags.task}")
    task, is_text, columns = TASKS[flags.task], TASKS[flags.task].is_text, _columns(flags, kind, configs)
    if task.name == "translation" and hasattr(tokenizer, "src_lang"):
        set_languages(tokenizer, flags.source_lang, flags.target_lang)
    sides = by_first(lambda: sides_of(flags, cache, columns))
    languages = by_first(lambda: languages_of_sides(flags, cache, columns, sides))
    # Rows are not read if what they become is cached.
    rows = functools.cache(lambda side: rows_of(flags, cache, columns, sides[side]))
    if tokenizer is None:
        tokenizer = _own_tokenizer(flags, cache, sides[TRAINING].settings, lambda: rows(TRAINING))
    lengths = _lengths(flags, tokenizer, kind, configs)
    reading: dict[str, Any] = {"task": task.name, "whole_words": flags.whole_word_masking}
    frames: list[Any] = [ends(task.name, tokenizer)]
    if is_text:
        lengths = [text_length(task.name, tokenizer, lengths[0])]
        CORRUPTIONS[task.name](tokenizer, *lengths, flags.whole_word_masking)  # if the tokenizer can have it
    else:
        has_pairs = columns.has_pairs
        reads_types = has_pairs and any(map(has_types, configs))
        reading = {"kind": kind, "has_pairs": has_pairs}
        reading["has_types"] = reads_types and "token_type_ids" in tokenizer(PROBE, PROBE)
        try:
            encoding = Encoding(tokenizer, lengths[0], lengths[1], **reading)
        except ValueError as error:
            raise InputError(f"--max_source_length and --max_target_length: {error}") from error
        frames = [encoding.alone, encoding.paired, encoding.target, tokenizer.chat_template]
    made: list[Path] = []
    facts: dict[str, Any] = {}
    for side in (HELD_OUT,) if flags.streaming else (TRAINING, HELD_OUT):
        by = {
            "version": VERSION,
            "rows": sides[side].settings,
            "tokenizer": fingerprint(tokenizer),
            "lengths": lengths,
            "cut_targets": flags.max_target_length is not None,
            "reading": [reading, str(frames)],
        }
        make = functools.partial(_tokenise, flags, side, functools.partial(rows, side), tokenizer, lengths, reading)
        folder, known = cached(cache, "tokenised", by, make)
        if (warning := known.pop("warning", "")) and kind != "classifier":
            print(f"warning: {warning}", file=sys.stderr)
        facts |= known
        made.append(folder)
    print(", ".join(counted(value, name.replace("_", " ")) for name, value in facts.items() if value))
    facts |= languages
    parts = {side.flag or "embedded_data": side.rows["digest"] for side in sides.values()}
    parts |= {"tokenizer": fingerprint(tokenizer), "preparation of data": VERSION}
    digest = key([*(side.settings for side in sides.values()), *(folder.name for folder in made)])
    given, asked = (datasets.Dataset.from_file(str(made[i] / "rows.arrow")) for i in (0, -1))
    is_causal = kind == "causal"
    train: Any = Chunks(given, tokenizer, seed, **reading) if is_text else Pairs(given, is_causal)
    if flags.streaming:
        streamed: Any = StreamedChunks if is_text else StreamedPairs
        train = streamed(rows(TRAINING), tokenizer, *lengths, seed, flags.shuffle_buffer, **reading)
    if not is_text:
        longest, held_out = max(map(len, asked["labels"])), Pairs(asked, is_causal)
        if task.name == "classification" and kind != "classifier" and not flags.streaming:
            _classes_of(train, held_out, task.name)
        return Data(task, tokenizer, train, held_out, asked, longest, pad(tokenizer), digest, facts, parts)
    chunks = Chunks(asked, tokenizer, HELD_OUT_SEED, **reading)
    shown, longest = _shown(chunks, tokenizer, flags.report_examples, task.name)
    return Data(task, tokenizer, train, chunks, shown, longest, default_data_collator, digest, facts, parts)


def _columns(flags: FastkdArguments, kind: str, configs: Sequence[Any]) -> Columns:
    """Return what the user says about columns, and what the models read of them; without a model it is a T5's."""
    given = {name: getattr(flags, name) for name in Columns.__dataclass_fields__ if hasattr(flags, name)}
    families, is_classifier = [family_of(config) for config in configs], kind == "classifier"
    heads = [config.id2label for config in configs if is_classifier and kind_of(config) == kind]
    return Columns(
        **given,
        has_prefixes=all("T5" in family.name for family in families),
        has_pairs=is_classifier and any("masked" in family.kinds for family in families),
        has_scores=len(max(heads, key=lambda names: any(names.values()), default={})) == 1,  # of one with names
        is_joined=kind == "causal",
    )


def with_classes(data: Data, known: Sequence[str] = ()) -> Data:
    """Return the data with the number of each target for a label, as a classifier learns it.

    known: the model's classes, by default the different targets of the training data; of one alone, targets are
    scores. Raises InputError if the data is no pairs in memory, or if its targets are not among the known, or too many.
    """
    if not isinstance(data.train, Pairs):
        given = "--streaming" if isinstance(data.train, StreamedPairs) else data.task.name
        raise InputError(
            f"a classifier, as --architecture enct5, gives classes to sources: expected pairs in memory, got {given}"
        )
    classes = _classes_of(data.train, data.held_out, data.task.name, known)
    train, held_out = (
        Pairs(side.rows.remove_columns("labels").add_column("labels", class_labels(side.rows["target"], classes)))
        for side in (data.train, data.held_out)
    )
    made: dict[str, Any] = {"train": train, "held_out": held_out, "collate": pad(data.tokenizer, one_label=True)}
    return dataclasses.replace(data, **made, digest=key([data.digest, classes]), target_tokens=1, classes=classes)


def _classes_of(train: Pairs, held_out: Pairs, task: str, known: Sequence[str] = ()) -> list[str]:
    """Return the classes of pairs, as `with_classes`, which a model that writes them needs to be classes, too."""
    found = sorted(set(train.rows["target"]))
    if len(found) < 2 and not known:
        raise InputError(f"a classifier: expected at least 2 different targets, got {found[0]!r} alone")
    if len(found) > MOST_CLASSES and len(known) != 1:
        raise InputError(f"a classifier: expected at most {MOST_CLASSES} different targets, got {len(found)}")
    classes = list(known) if len(known) == 1 else matched(known, found, task) if known else found
    asked = sorted(set(held_out.rows["target"]))
    if len(classes) > 1 and not set(asked) & set(classes):
        expected = f"expected targets among the classes {', '.join(classes[:9])}"
        raise InputError(f"held-out data: {expected}, got only {', '.join(asked[:9])}")
    return classes


# Tokens --------------------------------------------------------------------------------------------------------------


def _own_tokenizer(flags: FastkdArguments, cache: Path, digest: Any, rows: Callable[[], Any]) -> Any:
    """Return a tokenizer trained on the rows to learn from, from the cache if it was trained before."""
    settings = {
        "version": VERSION,
        "rows": digest,
        "vocabulary_size": flags.vocabulary_size,
        "sentinels": SENTINELS,
        "sentencepiece": sentencepiece.__version__,
    }

    def texts() -> Iterator[str]:
        given = rows()
        step = 1 + given.data.nbytes // VOCABULARY_BYTES  # all of it, or every second row, and so on
        for row in given.select(range(0, len(given), step)):
            for name in ("text", "source", "target"):
                # SentencePiece would learn nothing from the letters of its own symbols.
                yield re.sub(r"<(?=(/s|unk|pad)>)", "< ", row.get(name, ""))

    def make(folder: Path) -> None:
        print("training a SentencePiece vocabulary ...", flush=True)
        train_tokenizer(texts(), flags.vocabulary_size).save_pretrained(folder)

    folder, _ = cached(cache, "tokenizer", settings, make)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _lengths(flags: FastkdArguments, tokenizer: Any, kind: str, configs: Sequence[Any]) -> list[int]:
    """Return the length of chunks, or the longest source and target, in tokens: the flags', else what the models take.

    Sources of the embedded corpus are cut sooner, so that it is learnt in minutes. A causal model reads both in one.
    """
    windows = [positions for config in configs if (positions := family_of(config).positions(config))]
    known = tokenizer.model_max_length  # transformers says 1e30 where it does not know
    longest = min([*windows, *[known] * (known < 2**20)], default=MODEL_LENGTH)
    source, target = flags.max_source_length, flags.max_target_length
    if TASKS[flags.task].is_text:
        lengths, name = [flags.sequence_length], "--sequence_length"
    else:
        target = target or (longest - (source or longest // 2) if kind == "causal" else longest)
        rest = longest - target if kind == "causal" else longest
        lengths = [source or (rest if flags.has_own_data else min(rest, EMBEDDED_LENGTH)), target]
        name = "--max_source_length and --max_target_length"
    needed = sum(lengths) if kind == "causal" else lengths[0] if kind == "classifier" else max(lengths)
    if windows and (needed > min(windows) or min(lengths) < 1):
        together = " together" if kind == "causal" and len(lengths) == 2 else ""
        if min(lengths) < 1:
            raise InputError(
                f"--max_source_length: expected fewer than the {min(windows)} tokens for which there are positions, as "
                f"the target comes behind them, got {lengths[0]}"
            )
        raise InputError(
            f"{name}: expected at most {min(windows)} tokens{together}, for which there are positions, got "
            f"{' and '.join(map(str, lengths))}"
        )
    return lengths


def _tokenise(
    flags: FastkdArguments,
    side: str,
    rows: Callable[[], Any],
    tokenizer: Any,
    lengths: Sequence[int],
    reading: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Write rows.arrow of a side; return what there is to say about it."""
    path, given, fact = folder / "rows.arrow", rows(), side.replace("-", "_")
    facts: dict[str, Any] = {f"{fact}_examples": len(given)}
    shown = next(blocks(given))
    classifies = reading.get("kind") == "classifier"  # its targets are never written
    for column in sorted({"text", "source", "pair", *["target"] * (not classifies)} & shown[0].keys()):
        check_known(tokenizer, [row[column] for row in shown], f"{side} data", f"{column}s")
    if TASKS[flags.task].is_text:
        chunks = pack_to_arrow(tokenizer, given, lengths[0], path, f"{side} text", ends(flags.task, tokenizer))
        facts[f"{fact}_chunks"] = len(chunks)
    else:
        settings = {"cut_targets": classifies or flags.max_target_length is not None, "what": f"{side} data", **reading}
        _, counts = tokenize_pairs(given, tokenizer, lengths[0], lengths[1], path, **settings)
        facts |= {f"{fact}_sources_cut": counts.cut_sources, f"{fact}_targets_cut": counts.cut_targets}
        if counts.example:
            target, written = (text if len(text) < 80 else f"{text[:80]}..." for text in counts.example)
            facts["warning"] = (
                f"{counts.unwritable:,} of {counts.pairs:,} {side} targets are not what the tokenizer makes of them, "
                f"and no output equals them; the first is {target!r}, which becomes {written!r}"
            )
    return facts


def _shown(chunks: Chunks, tokenizer: Any, most: int, task: str) -> tuple[datasets.Dataset, int]:
    """Return (the first chunks as rows of pairs, with text that shows what was corrupted; tokens of a target).

    Of texts without corruption the second half is the target, and of masked ones the whole text.
    """
    items = [{name: ids.tolist() for name, ids in chunks[i].items()} for i in range(max(1, min(most, len(chunks))))]
    sides = [(item["input_ids"], item["labels"]) for item in items]
    end = -1 if task == "span_corruption" else None
    if task == "causal_lm":
        sides = [(ids[: len(ids) // 2], ids[len(ids) // 2 :]) for ids, _ in sides]
    elif task == "masked_lm":
        sides = [(ids, [y if y >= 0 else id for id, y in zip(ids, labels, strict=True)]) for ids, labels in sides]
    columns = {
        "input_ids": [ids for ids, _ in sides],
        "source": [tokenizer.decode(ids[:end]) for ids, _ in sides],
        "target": [tokenizer.decode(labels[:end]) for _, labels in sides],
        "task": [task] * len(items),
    }
    return datasets.Dataset.from_dict(columns).take(min(most, len(items))), len(sides[0][1])
