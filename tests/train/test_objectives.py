"""Every method's loss and gradients in a trainer equal an eager computation on materialised logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import default_data_collator

from fastkd.train.data import SpanCorruption
from fastkd.train.objectives import METHODS
from fastkd.train.trainer import without_head


def make_batch(dataset: SpanCorruption, size: int = 6) -> dict[str, torch.Tensor]:
    batch = default_data_collator([dataset[i] for i in range(size)])
    batch["labels"][0, -3:] = -100  # as padded data would have
    return batch


def eager_loss(method: str, student: Any, teacher: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same objective from the models' own logits; weights and temperatures are written out on purpose."""
    weights = {"scratch": (1, 0, 1), "mlmkd": (0, 1, 1), "kd": (1, 1, 2)}
    ce_weight, kl_weight, tau = weights[method]
    labels = batch["labels"]
    keep = labels != -100
    s = student(**batch).logits[keep].double()
    with torch.no_grad():
        t = teacher(**batch).logits[keep].double()
    ce = F.cross_entropy(s, labels[keep])
    kl = F.kl_div((s / tau).log_softmax(-1), (t / tau).log_softmax(-1), log_target=True, reduction="batchmean")
    return ce_weight * ce + kl_weight * tau**2 * kl


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients(
    method: str, tiny: Callable[..., Any], make_trainer: Callable[..., Any], dataset: SpanCorruption
) -> None:
    batch = make_batch(dataset)
    reference, teacher = tiny(32, 1), tiny(64, 2)
    expected = eager_loss(method, reference, teacher, batch)
    expected.backward()
    expected_gradients = {name: p.grad for name, p in reference.named_parameters()}

    student = tiny(32, 1)
    trainer = make_trainer(student, method, teacher=teacher)
    loss = trainer.compute_loss(student, batch)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=1e-6)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, expected_gradients[name], rtol=1e-3, atol=1e-6, msg=name)


def test_temperature_overrides_the_methods_own(
    tiny: Callable[..., Any], make_trainer: Callable[..., Any], dataset: SpanCorruption
) -> None:
    batch, student, teacher = make_batch(dataset), tiny(32, 1), tiny(64, 2)
    losses = [
        make_trainer(student, "mlmkd", teacher=teacher, temperature=tau).compute_loss(student, batch).item()
        for tau in (None, 1.0, 3.0)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_without_head_gives_the_heads_input_and_restores_the_head(
    tiny: Callable[..., Any], dataset: SpanCorruption
) -> None:
    model, batch = tiny(), make_batch(dataset)
    labels = batch.pop("labels")
    batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    logits = model(**batch).logits
    with without_head(model):
        hidden = model(**batch).logits
    assert hidden.shape == (*labels.shape, model.config.d_model)
    torch.testing.assert_close(F.linear(hidden, model.lm_head.weight), logits)
    with pytest.raises(RuntimeError, match="inside"), without_head(model):
        raise RuntimeError("inside")
    assert torch.equal(model(**batch).logits, logits)


class LogitsDetector(TorchDispatchMode):
    """Collects the operators that make a tensor of at least `tokens` rows of V columns."""

    def __init__(self, tokens: int, vocabulary: int):
        super().__init__()
        self.tokens, self.vocabulary = tokens, vocabulary
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            shape = leaf.shape if isinstance(leaf, torch.Tensor) else ()
            if shape and shape[-1] == self.vocabulary and leaf.numel() >= self.tokens * self.vocabulary:
                self.found.append(str(func))
        return out


@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_materialises_no_logits(
    method: str, tiny: Callable[..., Any], make_trainer: Callable[..., Any], dataset: SpanCorruption
) -> None:
    student, teacher, batch = tiny(32, 1), tiny(64, 2), make_batch(dataset, 16)
    tokens, vocabulary = batch["labels"].numel(), student.config.vocab_size
    widths: list[int] = []
    for model in (student, teacher):
        model.lm_head.register_forward_hook(lambda module, args, out: widths.append(out.shape[-1]))

    with LogitsDetector(tokens, vocabulary) as detector:
        student(**batch)
    assert detector.found and widths == [vocabulary]  # so the detectors do detect
    widths.clear()

    trainer = make_trainer(student, method, teacher=teacher, workspace_mb=0.05)
    with LogitsDetector(tokens, vocabulary) as detector:
        trainer.training_step(student, batch, (batch["labels"] != -100).sum())
    assert not detector.found
    assert widths == ([64, 32] if METHODS[method].needs_teacher else [32])
    assert student.shared.weight.grad.abs().sum() > 0


def test_a_method_that_needs_a_teacher_says_so(tiny: Callable[..., Any], make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="teacher"):
        make_trainer(tiny(), "kd")
