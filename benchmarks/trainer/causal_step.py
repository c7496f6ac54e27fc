"""A causal student's step on completions, forward + backward through both models: the trainer's against stock losses.

Those are `F.cross_entropy` and `F.kl_div` of the logits that both models return, of all their tokens, shifted as
transformers' own loss shifts them. What no loss can save is the limit: both models alone, the student's backward pass
from a sum of its hidden states, without any head. "loss alone" is the trainer's from states that are there already.
Memory is counted above models, inputs and gradients. The models are as wide as Qwen2-0.5B and half as wide, with its
vocabulary and its tied head, but of two layers in place of 24, for two cores: the deeper they are, the less of a step
is the loss, and so what it saves.

B sequences, L tokens, V pieces; a quarter of each sequence is prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.command import main
from benchmarks.harness.problem import Problem, Run, Target, of_another_objective
from benchmarks.trainer.train_step import LIMIT, compared, models_of, trainer_of

IMPLEMENTATIONS = ("fastkd", "eager", "loss alone")
TARGETS = (Target("eager", 0.6), Target("memory / eager", 0.3))
HALF = {"hidden_size": 448, "intermediate_size": 2432, "num_attention_heads": 7, "num_key_value_heads": 1}
WHOLE = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Shape:
    batch: int = 2
    length: int = 256
    vocabulary: int = 151936
    layers: int = 2
    sizes: tuple[dict[str, int], dict[str, int]] = (HALF, WHOLE)  # of student and teacher
    method: str = "kd"

    def __str__(self) -> str:
        widths = " -> ".join(str(sizes["hidden_size"]) for sizes in self.sizes[::-1])
        return f"causal step {self.method} {widths} x{self.layers} B {self.batch} L {self.length} V {self.vocabulary}"

    @property
    def flops(self) -> float:
        """Of the linear layers of both models: three times the student's, for its backward pass."""
        student, teacher = (self._multiplications(**sizes) for sizes in self.sizes)
        return 2 * self.batch * self.length * (3 * student + teacher)

    def _multiplications(
        self, hidden_size: int, intermediate_size: int, num_attention_heads: int, num_key_value_heads: int
    ) -> int:
        """For one token: queries and what heads found, narrower keys and values, a gated feed-forward."""
        narrow = hidden_size * num_key_value_heads // num_attention_heads
        return self.layers * hidden_size * (2 * hidden_size + 2 * narrow + 3 * intermediate_size)


def model_of(shape: Shape, sizes: dict[str, int], seed: int, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    depth = shape.layers
    config = Qwen2Config(vocab_size=shape.vocabulary, num_hidden_layers=depth, tie_word_embeddings=True, **sizes)
    return Qwen2ForCausalLM(config).to(dtype)


def batch_of(shape: Shape) -> dict[str, Tensor]:
    """Half of the sequences are shorter by a quarter; the prompt's tokens have no labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, shape.vocabulary, (shape.batch, shape.length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1::2, shape.length * 3 // 4 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : shape.length // 4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def stock_objective(method: Any, models: tuple[Any, Any], batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = []
    for model in models:
        with torch.set_grad_enabled(model is models[0]):
            logits.append(model(**inputs, use_cache=False).logits[:, :-1])
    labels, temperature = batch["labels"][:, 1:], method.temperature
    ce = F.cross_entropy(logits[0].flatten(0, 1), labels.flatten())
    s, t = ((x / temperature).log_softmax(-1) for x in logits)
    kl = F.kl_div(s, t, log_target=True, reduction="none").sum(-1)[labels != -100].mean()
    return method.terms["ce"] * ce + method.terms["logit_kl"] * temperature**2 * kl


def prepare(shape: Shape, device: torch.device) -> tuple[dict[str, Callable[[], Run]], Run]:
    from fastkd.train.training.forward import Needs, forward

    student, teacher = models_of(shape, device, model_of)
    batch = {name: tensor.to(device) for name, tensor in batch_of(shape).items()}
    runs, oracle = compared(shape, student, teacher, batch, stock_objective, model_of)

    def loss_alone() -> Run:
        made = trainer_of(shape, student, teacher)
        with torch.no_grad():
            states, its = (forward(model, batch, Needs()) for model in (student, teacher))
        hidden, head = states["hidden"][0].requires_grad_(), student.get_output_embeddings().weight

        def run() -> tuple[Tensor, ...]:
            given = {"hidden": (hidden, states["hidden"][1]._replace(weight=head))}
            (loss,) = made._terms(given, its, batch, None, None).values()
            return torch.autograd.grad(loss, (hidden, head))

        return of_another_objective(run)

    return {**runs, "loss alone": loss_alone}, oracle


def problem(shape: Shape, device: torch.device) -> Problem:
    return Problem(
        title=str(shape),
        unit="GFLOP/s",
        work=shape.flops,
        limit=LIMIT,
        implementations=IMPLEMENTATIONS,
        targets=TARGETS,
        prepare=partial(prepare, shape, device),
    )


def problems(device: torch.device, quick: bool = False) -> list[Problem]:
    return [problem(Shape(2, 40, 512, 2, (TINY, TINY)) if quick else Shape(), device)]


if __name__ == "__main__":
    main(problems, __doc__)
