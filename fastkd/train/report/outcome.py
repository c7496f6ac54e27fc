"""How a model did, as a run and its metrics.json hold it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..judge.cost import Cost


@dataclass
class Outcome:
    """How one model did.

    loss: held-out, nats per target token. history: log entries of "step" and "eval_loss", or "loss", its terms
    "loss_<term>" and the gradient norms (see DistillTrainer). metrics: of the task, in percent, more is better.
    outputs: what the model generated for each of the report's examples.
    """

    name: str
    parameters: int
    steps: int
    seconds_per_step: float | None
    loss: float
    token_accuracy: float
    history: list[dict[str, float]]
    metrics: dict[str, float] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    cost: Cost | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as what JSON knows; numbers that are not finite, which it does not, become None."""
        return plain(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Outcome:
        """Return the outcome that `to_json` gave, NaN for a number that was not finite.

        What came later than the first version may be absent. Raises KeyError, TypeError, ValueError or AttributeError
        if the record is no outcome.
        """
        known = {"metrics": {}, "outputs": [], "cost": None, **record}
        history = [{key: _number(value) for key, value in entry.items()} for entry in known["history"]]
        metrics = {key: _number(value) for key, value in known["metrics"].items()}
        figures = {name: _number(known[name]) for name in ("parameters", "steps", "loss", "token_accuracy")}
        cost = None if known["cost"] is None else Cost(**known["cost"])
        return cls(**{**known, **figures, "history": history, "metrics": metrics, "cost": cost})


def _number(value: Any) -> Any:
    if value is None:
        return math.nan
    if not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, got {value!r}")
    return value


def plain(value: Any) -> Any:
    """Return a value as JSON knows it: NaN and infinities as None, NumPy's scalars as numbers, the unknown as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return plain(value.item()) if hasattr(value, "item") else str(value)
