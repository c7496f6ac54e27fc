"""The models that the user gave, and the tokenizer that they share."""

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from ..common.cache import cached
from ..common.errors import InputError
from ..common.family import is_enct5
from ..common.processes import by_first, count, is_first
from ..flags.arguments import TransformersArguments
from ..flags.fields import FastkdArguments
from ..models.loading import files_fingerprint, load_config, load_tokenizer, load_weights
from ..models.tokenizer import fingerprint
from ..teaching.cached import CachedTeacher
from .folders import write_json
from .identity import digest


@dataclass
class Teacher:
    """A teacher, which is loaded when something of it is first asked for that is not known.

    name: its folder's, or on the hub. load: loads it in the dtype `dtype`. notes: a cache where what is known of it is
    kept for other runs, by its files, if loading it is to be spared. outcome: how it did. cached: what it said of the
    training data, if that is kept.
    """

    name: str | Path
    config: Any
    load: Callable[[], Any]
    dtype: str
    notes: Path | None = None
    outcome: Any = None
    cached: CachedTeacher | None = None
    _model: Any = None

    @property
    def model(self) -> Any:
        """The model."""
        if self._model is None:
            self._model = self.load()
            self.config = self._model.config
        return self._model

    @property
    def is_loaded(self) -> bool:
        """Whether it is here already."""
        return self._model is not None

    def let_go(self) -> None:
        """Give its memory back."""
        self._model = None
        gc.collect()

    @functools.cached_property
    def facts(self) -> dict[str, str]:
        """Its fingerprint, "digest", and the "dtype" in which it computes."""

        def measured() -> dict[str, str]:
            return {"digest": digest(self.model), "dtype": str(self.model.dtype).removeprefix("torch.")}

        def make(folder: Path) -> None:
            found = measured()
            if is_first():
                write_json(folder / "facts.json", found)

        files = by_first(lambda: files_fingerprint(self.name)) if self.notes else None
        if self.notes is None or files is None:
            return measured()
        by = {"files": files, "dtype": self.dtype, "transformers": transformers.__version__}
        folder, _ = cached(self.notes, "weights", by, make, by_all=True)
        known: dict[str, str] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        self.config.dtype = getattr(torch, known["dtype"])
        return known


@dataclass
class Given:
    """The models that the user gave, and the tokenizer that they share; None for what is made here.

    configs: of the models by their roles. teacher: None too for a method that needs none, whatever was given.
    architecture: what is trained, "t5" or "enct5".
    """

    configs: dict[str, Any] = field(default_factory=dict)
    teacher: Teacher | None = None
    student: Any = None
    tokenizer: Any = None
    architecture: str = "t5"

    @property
    def classes(self) -> list[str]:
        """The classes of an EncT5 that was given."""
        labels: dict[int, str] = next((config.id2label for config in self.configs.values() if is_enct5(config)), {})
        return [labels[i] for i in range(len(labels))]

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """What tells the models that were given from others, by their roles."""
        found = {} if self.teacher is None else {"teacher": self.teacher.facts["digest"]}
        return found if self.student is None else {**found, "student": digest(self.student)}


def load_given(flags: FastkdArguments, args: TransformersArguments, cache: Path | None = None) -> Given:
    """Load `--teacher`, as far as the method needs it, and `--student`; their weights once all else is in order.

    cache: where it is looked up what is known of a teacher whose answers are cached, which need not be loaded then.
    Raises InputError if one cannot be loaded, or if they do not go together.
    """
    names = {role: getattr(flags, role) for role in ("teacher", "student") if getattr(flags, role)}
    configs = {role: load_config(name, role) for role, name in names.items()}
    tokenizers = [load_tokenizer(name, role, configs[role]) for role, name in names.items()]
    if len({fingerprint(tokenizer) for tokenizer in tokenizers}) > 1:
        both = [f"{role} {names[role]} ({len(own)} pieces)" for role, own in zip(names, tokenizers, strict=True)]
        raise InputError(f"{' and '.join(both)} have different tokenizers: expected the same, token for token")
    labels = [config.id2label for config in configs.values() if is_enct5(config)]
    if len(labels) == 2 and labels[0] != labels[1]:
        its, mine = (", ".join(classes.values()) for classes in labels)
        raise InputError(
            f"teacher {flags.teacher} ({its}) and student {flags.student} ({mine}) have different classes: expected "
            "the same, in the same order"
        )
    given = Given(configs, tokenizer=next(iter(tokenizers), None), architecture=architecture(flags, configs))
    method = flags.objective
    if flags.teacher and method.uses_teacher:
        given.teacher = teacher_on_demand(flags, args, flags.teacher, configs["teacher"], cache)
    if flags.student:
        given.student = load_weights(flags.student, "student", configs["student"])
    return given


def teacher_on_demand(
    flags: FastkdArguments, args: TransformersArguments, name: str | Path, config: Any, cache: Path | None
) -> Teacher:
    """Return a teacher of that config, sharded if there are several processes and the flags say so.

    Without `--teacher_cache` it is loaded at once.
    """
    shards = flags.teacher_sharding == "full" and count() > 1
    load = functools.partial(
        load_weights, name, "teacher", config, flags.teacher_dtype, args.device if shards else None
    )
    teacher = Teacher(name, config, load, flags.teacher_dtype, cache if flags.teacher_cache else None)
    if teacher.notes is None:
        assert teacher.model is not None
    return teacher


def architecture(flags: FastkdArguments, configs: dict[str, Any]) -> str:
    """Return the flag's, or else that of the models; a student that is to become an EncT5 may be a T5."""
    kinds = {role: "enct5" if is_enct5(config) else "t5" for role, config in configs.items()}
    chosen = flags.architecture or next(iter(kinds.values()), "t5")
    for role, kind in kinds.items():
        if kind != chosen and (role, kind) != ("student", "t5"):
            name = getattr(flags, role)
            hint = f"; fastkd-train --method scratch --architecture enct5 --student {name} makes one of it"
            raise InputError(
                f"--architecture {chosen}: the {role} {name} is of another, {kind}" + (hint if kind == "t5" else "")
            )
    return chosen
