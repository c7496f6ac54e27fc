"""What fastkd's trainers for TRL refuse, and the private parts of TRL that they stand on."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import trl.trainer.distillation_trainer
import trl.trainer.sft_trainer
from trl.experimental import server_distillation

from fastkd import versions
from fastkd.integrations import trl as fast
from tests.integrations import trl_cases as cases

TOGETHER = ("gkd", "distillation")
# The private parts of TRL that fastkd stands on: what it does with each, the parameters that it relies on, and why
# there is no other way. Its losses are in `compute_loss`, which is public.
PRIVATE: dict[str, tuple[str, tuple[str, ...] | None, str]] = {
    "DistillationTrainer._metrics": ("written", None, "the entropy is logged from there; no argument adds to a log"),
    "ServerDistillationTrainer._get_teacher_token_logprobs_from_server": (
        "called", ("inputs", "aligned_prompt_length"), "asks the server and lines up its answers with the completions"
    ),
    "distillation_trainer.BaseTunerLayer": (
        "replaced while a trainer is made", None, "its check refuses adapters on heads, which fastkd.head takes"
    ),
    "sft_trainer.BaseTunerLayer": (
        "replaced while a trainer is made", None, "the same check, of what GKDTrainer is made of"
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> None:
    cases.quiet()


@pytest.mark.parametrize("name", TOGETHER)
def test_options_that_the_loss_does_not_serve(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"args.use_liger_kernel: expected False, .*use_kernels"):
        cases.trainer(name, False, tmp_path, use_liger_kernel=True)
    config = cases.TRAINERS[name][2](str(tmp_path), use_cpu=True, bf16=False)
    config.deepspeed_plugin = object()
    with pytest.raises(ValueError, match=r"args.deepspeed: expected None, .* FSDP2"):
        cases.trainer(name, False, tmp_path, arguments={"args": config})


def test_ways_to_spread_a_model_that_hide_its_head() -> None:
    def accelerator(fsdp: int | None, **sizes: int) -> Any:
        plugin = None if fsdp is None else SimpleNamespace(fsdp_version=fsdp)
        return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), parallelism_config=SimpleNamespace(**sizes))

    fast._check_parallel(accelerator(2, tp_size=1, cp_size=1, sp_size=1))
    with pytest.raises(ValueError, match="fsdp_version: expected 2, got 1"):
        fast._check_parallel(accelerator(1))
    with pytest.raises(ValueError, match=r"parallelism_config: expected whole sequences .* got tp, cp; .*vocab_group"):
        fast._check_parallel(accelerator(None, tp_size=2, cp_size=2))


@pytest.mark.parametrize("rows", [472, cases.TOKENS + fast.PADDING, 32000])
@pytest.mark.parametrize("name", TOGETHER)
def test_teachers_of_another_tokenizer(name: str, rows: int, tmp_path: Path) -> None:
    """One with too few tokens, and some with more than padding can be."""
    student = cases.model(vocabulary=488)
    with pytest.raises(ValueError, match=rf"whose tokenizer has 480 tokens, got heads of 488 .* {rows} rows: .* GOLD"):
        cases.trainer(name, False, tmp_path, student, cases.teacher(vocabulary=rows))
    assert type(student.config.vocab_size) is int


@pytest.mark.parametrize("side", ["student", "its_teacher"])
def test_models_whose_head_is_not_known(side: str, tmp_path: Path) -> None:
    import transformers

    config = transformers.FalconConfig(
        vocab_size=cases.TOKENS,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=2,
    )
    with pytest.raises(ValueError, match="FalconForCausalLM with model_type 'falcon'"):
        cases.trainer("distillation", False, tmp_path, **{side: transformers.FalconForCausalLM(config)})


@pytest.mark.parametrize("name", TOGETHER)
def test_adapters_that_no_weight_of_a_head_stands_for(name: str, tmp_path: Path) -> None:
    """Before anything is trained."""
    peft = pytest.importorskip("peft")
    config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "lm_head"], feedforward_modules=[])
    with pytest.raises(TypeError, match=r"expected LoRA or modules_to_save on the head, got peft.tuners.ia3"):
        cases.trainer(name, False, tmp_path, arguments={"peft_config": config})


def test_a_reduction_that_is_none(tmp_path: Path) -> None:
    logits = torch.randn(2, 3, 5)
    with pytest.raises(
        ValueError, match=r'reduction: expected "batchmean", "sum" or "mean", got \'none\'; .*each token'
    ):
        fast.GKDTrainer.generalized_jsd_loss(logits, logits, reduction="none")


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
@pytest.mark.parametrize("items", [None, 7])
@pytest.mark.parametrize("masked", [True, False])
def test_the_loss_of_logits(reduction: str, items: int | None, masked: bool) -> None:
    torch.manual_seed(0)
    teacher = torch.randn(2, 3, 5)
    labels = torch.tensor([[1, -100, 2], [-100, -100, 3]]) if masked else None
    found = []
    for cls in cases.TRAINERS["gkd"][:2]:
        student = torch.full((2, 3, 5), 0.5).cumsum(-1).requires_grad_()
        loss = cls.generalized_jsd_loss(student, teacher, labels, 0.3, 1.5, reduction, items)
        loss.backward()
        found.append((loss.item(), {"logits": student.grad}))
    cases.check_equal(*found)


def test_versions_that_are_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    other = versions.Package("trl", ">=1.15,<1.17", "2.0.0", False)
    for package, given in ((other, "trl 2.0.0"), (versions.Package("trl", ">=1.15,<1.17", None, False), "is missing")):
        monkeypatch.setattr(versions, "packages", lambda extra, package=package: [package])
        monkeypatch.delitem(sys.modules, "fastkd.integrations.trl", raising=False)
        with pytest.raises(ImportError, match=rf"trl>=1.15,<1.17, got .*{given}.*; pip install 'fastkd\[trl\]'"):
            importlib.import_module("fastkd.integrations.trl")
    monkeypatch.setitem(sys.modules, "fastkd.integrations.trl", fast)


def overridden(cls: type) -> set[str]:
    """The private methods of TRL that a trainer of fastkd overrides."""
    ours = [one for one in cls.__mro__ if one.__module__ == fast.__name__]
    theirs = [one for one in cls.__mro__ if one.__module__.startswith("trl.")]
    names = {name for one in ours for name in vars(one) if name.startswith("_") and not name.startswith("__")}
    return {name for name in names if any(name in vars(one) for one in theirs)}


def test_private_parts_are_listed_with_their_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _, ours, _ in cases.TRAINERS.values():
        assert not overridden(ours)
    assert "compute_loss" in vars(trl.DistillationTrainer) and "compute_loss" in vars(cases.TRAINERS["gkd"][0])
    source = inspect.getsource(fast)
    for name, (_, parameters, reason) in PRIVATE.items():
        assert name.split(".")[1] in source and len(reason) > 20
        if parameters is not None:
            method = getattr(server_distillation.ServerDistillationTrainer, name.split(".")[1])
            assert [*inspect.signature(method).parameters][1:] == [*parameters]
    assert all(module.BaseTunerLayer for module in (trl.trainer.distillation_trainer, trl.trainer.sft_trainer))
    one = cases.trainer("distillation", True, tmp_path)
    assert [*one._metrics] == ["train", "eval"]
