"""Models of every family: which kind a run is of, what loads, what a folder must hold, and slices of a teacher."""

from __future__ import annotations

from typing import Any

import families
import pytest

from fastkd.train.common.errors import InputError
from fastkd.train.common.family import FAMILIES, kind_of
from fastkd.train.flags.fields import FastkdArguments
from fastkd.train.stages.given import Given, load_configs


def kinds(task: str, **models: Any) -> tuple[dict[str, Any], str]:
    """What a run with models of these configs, by their roles, is told."""
    flags: Any = {role: f"the-{role}" for role in models}
    return load_configs(FastkdArguments(task=task, **flags), {f"the-{role}": its for role, its in models.items()})


@pytest.mark.parametrize("model_type", families.SETTINGS)
def test_the_kind_follows_from_family_and_task(model_type: str) -> None:
    row = next(row for row in FAMILIES if model_type in row.model_types)
    texts = {"seq2seq": "span_corruption", "causal": "causal_lm", "masked": "masked_lm"}[row.kinds[0]]
    assert kinds(texts, student=families.config(model_type))[1] == row.kinds[0]
    labelled = "classifier" if "classifier" in row.kinds else row.kinds[0]
    for task in ("sst2", "classification"):
        configs, kind = kinds(task, student=families.config(model_type))
        assert kind == kind_of(configs["student"]) == labelled and not Given(configs, kind=kind).classes
    others = {"span_corruption", "causal_lm", "masked_lm"} - {texts}
    for task in (*others, *(["text2text", "translation"] if row.kinds[0] == "masked" else [])):
        with pytest.raises(InputError, match=rf"--task {task}: the teacher the-teacher is a {row.name}: expected"):
            kinds(task, teacher=families.config(model_type))


def test_a_checkpoint_that_tells_its_classes_is_asked_for_them() -> None:
    told = families.config("bert", architectures=["BertForSequenceClassification"], id2label={0: "no", 1: "yes"})
    configs, kind = kinds("sst2", teacher=told, student=families.config("roberta"))
    assert kind == "classifier" and Given(configs, kind=kind).classes == ["no", "yes"]
    assert configs["student"].architectures == ["RobertaForSequenceClassification"]
    configs, kind = kinds("masked_lm", teacher=told)
    assert kind == kind_of(configs["teacher"]) == "masked" and not Given(configs, kind=kind).classes


def test_models_that_do_not_go_together() -> None:
    bert, bart, gpt2, t5 = map(families.config, ("bert", "bart", "gpt2", "t5"))
    with pytest.raises(InputError, match="the student the-student is a GPT-2 and learns as causal, not seq2seq: "):
        kinds("text2text", teacher=bart, student=gpt2)
    with pytest.raises(InputError, match=r"the teacher the-teacher has no head for classes: .*--student the-teacher"):
        kinds("sst2", teacher=bert, student=bert)
    for task in ("masked_lm", "causal_lm"):
        with pytest.raises(InputError, match=f"--task {task}: a model made from nothing is a T5: expected --teacher"):
            kinds(task)
    with pytest.raises(InputError, match=r"the student the-student is a BERT.*expected T5s beside --architecture"):
        flags = FastkdArguments(task="sst2", student="the-student", architecture="enct5")
        load_configs(flags, {"the-student": bert})
    assert kinds("text2text", teacher=bart, student=t5)[1] == "seq2seq"
