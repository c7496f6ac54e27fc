"""The models that the user gave, and the tokenizer that they share."""

from __future__ import annotations

import copy
import functools
import gc
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from ..common.cache import cached
from ..common.errors import InputError
from ..common.family import KINDS, family_of, is_enct5, kind_of
from ..common.processes import by_first, count
from ..data.tasks import TASKS, is_glue
from ..flags.arguments import TransformersArguments
from ..flags.fields import FastkdArguments
from ..models.loading import files_fingerprint, load_config, load_tokenizer, load_weights
from ..models.tokenizer import fingerprint
from ..teaching.cached import CachedTeacher
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

        def measured(folder: Path | None = None) -> dict[str, str]:
            return {"digest": digest(self.model), "dtype": str(self.model.dtype).removeprefix("torch.")}

        files = by_first(lambda: files_fingerprint(self.name)) if self.notes else None
        if self.notes is None or files is None:
            return measured()
        by = {"files": files, "dtype": self.dtype, "transformers": transformers.__version__}
        _, known = cached(self.notes, "weights", by, measured, by_all=True)
        self.config.dtype = getattr(torch, known["dtype"])
        return known


@dataclass
class Given:
    """The models that the user gave, and the tokenizer that they share; None for what is made here.

    configs: of the models by their roles. teacher: None too for a method that needs none, whatever was given.
    kind: of KINDS, what is trained.
    """

    configs: dict[str, Any] = field(default_factory=dict)
    teacher: Teacher | None = None
    student: Any = None
    tokenizer: Any = None
    kind: str = "seq2seq"

    @property
    def classes(self) -> list[str]:
        """The classes of a classifier that was given; none where a head is to come, or a nameless one for scores."""
        labels: dict[int, str] = max(_classes(self.configs), key=lambda names: any(names.values()), default={})
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
    configs, kind = load_configs(flags)
    names = {role: getattr(flags, role) for role in configs}
    tokenizers = [load_tokenizer(name, role, configs[role]) for role, name in names.items()]
    if len({fingerprint(tokenizer) for tokenizer in tokenizers}) > 1:
        both = [f"{role} {names[role]} ({len(own)} pieces)" for role, own in zip(names, tokenizers, strict=True)]
        raise InputError(f"{' and '.join(both)} have different tokenizers: expected the same, token for token")
    labels = [names for names in _classes(configs) if any(names.values())]
    if len(labels) == 2 and labels[0] != labels[1]:
        its, mine = (", ".join(classes.values()) for classes in labels)
        raise InputError(
            f"teacher {flags.teacher} ({its}) and student {flags.student} ({mine}) have different classes: expected "
            "the same, in the same order"
        )
    given = Given(configs, tokenizer=next(iter(tokenizers), None), kind=kind)
    method = flags.objective
    if flags.teacher and method.uses_teacher:
        given.teacher = teacher_on_demand(flags, args, flags.teacher, configs["teacher"], cache)
    if flags.student:
        given.student = load_weights(flags.student, "student", configs["student"], seed=args.seed)
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


def load_configs(flags: FastkdArguments, known: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], str]:
    """Return the configs of the models that the user gave, by their roles, and the name of the run's kind in KINDS.

    The configs say that kind themselves; the classes of a head that is to come are its teacher's, one for scores, or
    none, and nameless.
    known: configs of names that need not be loaded.
    """
    names = {role: getattr(flags, role) for role in ("teacher", "student") if getattr(flags, role)}
    configs = {role: copy.deepcopy((known or {}).get(name)) or load_config(name, role) for role, name in names.items()}
    kind = _kind_of_run(flags, configs)
    for role, config in configs.items():
        if kind in family_of(config).kinds and kind != kind_of(config):
            if (role, kind) == ("teacher", "classifier"):
                way = f"fastkd-train --method scratch --student {flags.teacher} --task {flags.task}"
                raise InputError(f"the teacher {flags.teacher} has no head for classes: expected one as {way} makes")
            config.architectures = [type(config).__name__.removesuffix("Config") + KINDS[kind].auto[len("AutoModel") :]]
            if kind == "classifier":
                warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # of the head to come
                its = configs["teacher"].id2label if "teacher" in configs else [0] if flags.task == "stsb" else []
                config.id2label, config.label2id = dict.fromkeys(its, ""), {}
    return configs, kind


def _classes(configs: Mapping[str, Any]) -> list[dict[int, str]]:
    """Return those of each classifier."""
    return [config.id2label for config in configs.values() if kind_of(config) == "classifier"]


_ARCHITECTURES = {"seq2seq": "t5", "classifier": "enct5"}  # by the kind of the T5s that --architecture calls so


def _kind_of_run(flags: FastkdArguments, configs: Mapping[str, Any]) -> str:
    """Return the kind of `--architecture`, or else that of the models; a T5 that is the student may become an EncT5."""
    kinds = {role: _learns(flags, role, config) for role, config in configs.items()}
    if not kinds and flags.task != KINDS["seq2seq"].corruption and TASKS[flags.task].is_text:
        raise InputError(f"--task {flags.task}: a model made from nothing is a T5: expected --teacher or --student")
    asked = next((kind for kind, name in _ARCHITECTURES.items() if name == flags.architecture), None)
    chosen = asked or next(iter(kinds.values()), "seq2seq")
    for role, kind in kinds.items():
        family, name = family_of(configs[role]).name, getattr(flags, role)
        if family not in ("T5", "EncT5") and (asked or kind != chosen):
            expected = "T5s beside --architecture" if asked else "teacher and student of one kind"
            raise InputError(f"the {role} {name} is a {family} and learns as {kind}, not {chosen}: expected {expected}")
        if kind != chosen and (role, family, chosen) != ("student", "T5", "classifier"):
            hint = f"; fastkd-train --method scratch --architecture enct5 --student {name} makes one of it"
            raise InputError(
                f"--architecture {_ARCHITECTURES.get(chosen, chosen)}: the {role} {name} is of another, "
                f"{family.lower()}{hint if family == 'T5' else ''}"
            )
    return chosen


def _learns(flags: FastkdArguments, role: str, config: Any) -> str:
    """Return the kind in which a model's family learns the task."""
    family, task = family_of(config), TASKS[flags.task]
    if is_enct5(config):  # of whatever pairs that have few targets, which their own stage checks
        return "classifier"
    is_labelled = task.name == "classification" or is_glue(task)
    for kind in family.kinds:
        corruption, answers = KINDS[kind].corruption, KINDS[kind].answers
        if task.name == corruption if task.is_text else answers or (kind == "classifier" and is_labelled):
            return kind
    others = "pairs" if KINDS[family.kinds[0]].answers else "classification and GLUE's tasks"
    expected = f"expected {KINDS[family.kinds[0]].corruption}, or {others}"
    raise InputError(f"--task {task.name}: the {role} {getattr(flags, role)} is a {family.name}: {expected}")
