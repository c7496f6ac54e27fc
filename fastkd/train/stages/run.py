"""What every stage of a run goes by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..flags.arguments import TransformersArguments
from ..flags.fields import FastkdArguments
from .given import Given
from .prepare import Data, get_data, with_classes


@dataclass(frozen=True)
class Run:
    """Flags that are checked, where results are kept for other runs, the models that were given, and the data."""

    flags: FastkdArguments
    args: TransformersArguments
    cache: Path
    given: Given
    data: Data

    @property
    def seed(self) -> int:
        """The seed of orders and corruptions."""
        return data_seed(self.args)


def data_seed(args: TransformersArguments) -> int:
    """Return the seed of orders and corruptions."""
    return args.seed if args.data_seed is None else args.data_seed


def with_data(flags: FastkdArguments, args: TransformersArguments, cache: Path, given: Given) -> Run:
    """Return a run with the data that its flags ask for, with classes for a classifier."""
    classifies = given.kind == "classifier"
    data = get_data(flags, cache, data_seed(args), given.tokenizer, given.kind, [*given.configs.values()])
    return Run(flags, args, cache, given, with_classes(data, given.classes) if classifies else data)
