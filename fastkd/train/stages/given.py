"""The models that the user gave, and the tokenizer that they share."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..common.family import is_enct5
from ..common.processes import count
from ..flags.arguments import TransformersArguments
from ..flags.fields import FastkdArguments
from ..models.loading import load_config, load_tokenizer, load_weights
from ..models.tokenizer import fingerprint
from .identity import digest


@dataclass
class Given:
    """The models that the user gave, and the tokenizer that they share; None for what is made here.

    configs: of the models by their roles. teacher: None too for a method that needs none, whatever was given.
    architecture: what is trained, "t5" or "enct5".
    """

    configs: dict[str, Any] = field(default_factory=dict)
    teacher: Any = None
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
        models = {"teacher": self.teacher, "student": self.student}
        return {role: digest(model) for role, model in models.items() if model is not None}


def load_given(flags: FastkdArguments, args: TransformersArguments) -> Given:
    """Load `--teacher`, as far as the method needs it, and `--student`; their weights once all else is in order.

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
        given.teacher = load_teacher(flags, args, flags.teacher, configs["teacher"])
    if flags.student:
        given.student = load_weights(flags.student, "student", configs["student"])
    return given


def load_teacher(flags: FastkdArguments, args: TransformersArguments, name: str | Path, config: Any) -> Any:
    """Return a teacher of that config, sharded if there are several processes and the flags say so."""
    shards = flags.teacher_sharding == "full" and count() > 1
    return load_weights(name, "teacher", config, flags.teacher_dtype, args.device if shards else None)


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
