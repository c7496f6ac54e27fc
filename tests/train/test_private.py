"""What fastkd overrides of transformers' private parts: the installed one has it, with that signature, and calls it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from fastkd.train.minidisc import candidates
from fastkd.train.models import architectures as models
from fastkd.train.training import resumable, trainer

# The methods of transformers that fastkd overrides though they are not public: the parameters that it relies on, and
# why there is no other way.
PRIVATE = {
    "Trainer._get_train_sampler": (
        ("train_dataset",),
        "no argument takes a sampler, and Chunks's tells an example's epoch, also to data workers",
    ),
    "Trainer._save_checkpoint": (
        ("model", "trial"),
        "no event comes before a checkpoint is written, and one that is not complete must have no checkpoint's name",
    ),
    "T5PreTrainedModel._init_weights": (
        ("module",),
        "transformers' own hook for the first weights of a new model, here of EncT5's head and prompt",
    ),
    "T5Attention.forward": (
        ("hidden_states",),
        "heads are pruned inside of attention, and its table of relative positions is passed on between layers",
    ),
}
OURS = [
    cls for module in (candidates, models, resumable, trainer) for cls in vars(module).values() if inspect.isclass(cls)
]


def overridden(cls: type) -> list[tuple[str, Any]]:
    """(class.method, the method) of each private method of transformers that a class of fastkd overrides."""
    found = []
    for name in vars(cls):
        if name.startswith("_") and not name.startswith("__") and callable(getattr(cls, name)):
            for base in cls.__mro__[1:]:
                if base.__module__.startswith("transformers.") and name in vars(base):
                    found.append((f"{base.__name__}.{name}", vars(base)[name]))
                    break
    return found


def test_all_of_them_are_listed_with_their_reasons_and_signatures() -> None:
    """T5Attention's forward, which is as private as its class, is listed too."""
    ours = [cls for cls in OURS if cls.__module__.startswith("fastkd.")]
    found = dict(entry for cls in ours for entry in overridden(cls))
    found["T5Attention.forward"] = models.T5Attention.forward
    assert set(found) == set(PRIVATE)
    for name, (parameters, reason) in PRIVATE.items():
        actual = list(inspect.signature(found[name]).parameters)
        assert actual[1 : 1 + len(parameters)] == list(parameters) and len(reason) > 20, name


def test_transformers_calls_them(
    tiny: Callable[..., Any], make_trainer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = set()

    def spy(cls: type, name: str) -> None:
        method = getattr(cls, name.partition(".")[2])

        def noted(*args: Any, **kwargs: Any) -> Any:
            called.add((name, inspect.stack()[1].frame.f_globals["__name__"].partition(".")[0]))
            return method(*args, **kwargs)

        monkeypatch.setattr(cls, name.partition(".")[2], noted)

    spy(resumable.CheckpointingTrainer, "Trainer._save_checkpoint")
    spy(trainer.DistillTrainer, "Trainer._get_train_sampler")
    spy(models.EncT5ForSequenceClassification, "T5PreTrainedModel._init_weights")
    spy(models.PrunedAttention, "T5Attention.forward")
    config = tiny().config.to_dict() | {"widths": {}}
    pruned = models.PrunedT5ForConditionalGeneration(models.PrunedT5Config(**config))
    make_trainer(pruned, "scratch", ["--save_strategy", "steps", "--save_steps", "2"]).train()
    models.EncT5ForSequenceClassification(models.enct5_config(transformers.T5Config(**config), ["no", "yes"]))
    assert {name for name, _ in called} == set(PRIVATE)
    assert {caller for name, caller in called if name != "T5Attention.forward"} == {"transformers"}
