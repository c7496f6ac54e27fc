"""A training step's gradients, forward + backward through both models: the trainer's against the usual way.

The usual way takes teacher and student logits, states and projections from the models and puts plain torch losses on
them, which is what a training loop has where it does not call fastkd. Both run the same models, so what no loss can
save is the limit: both models alone, the student's backward pass from a sum of its hidden states, without any head.
Memory is counted above models, inputs and gradients. Dropout is off, so that all compute the same.

Bx x Lx encoder tokens, B x Lz decoder tokens, V pieces.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.command import main
from benchmarks.harness.problem import Problem, Run, Target
from benchmarks.ops.cka_loss import plain_cka

LIMIT = "both models"
IMPLEMENTATIONS = ("fastkd", "eager")
TARGETS = (Target("eager", 0.75), Target("memory / eager", 0.4))
T5_SMALL = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
T5_BASE = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
TINY = {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 2}


@dataclass(frozen=True)
class Shape:
    method: str
    batch: int = 8
    source: int = 512
    target: int = 128
    vocabulary: int = 32128
    tiny: bool = False

    def __str__(self) -> str:
        sizes = "tiny" if self.tiny else "T5-base -> T5-small"
        return f"train step {self.method} {sizes} B {self.batch} Lx {self.source} Lz {self.target} V {self.vocabulary}"

    @property
    def sizes(self) -> tuple[dict[str, int], dict[str, int]]:
        """Of student and teacher."""
        return (TINY, TINY) if self.tiny else (T5_SMALL, T5_BASE)

    @property
    def student_flops(self) -> float:
        """Of its linear layers: three times, for its backward pass."""
        return 6 * self.batch * self._multiplications(**self.sizes[0])

    @property
    def flops(self) -> float:
        """Of the linear layers of both models."""
        return self.student_flops + 2 * self.batch * self._multiplications(**self.sizes[1])

    def _multiplications(self, d_model: int, d_kv: int, d_ff: int, num_layers: int, num_heads: int) -> int:
        """For one sequence: four projections and a feed-forward a layer, and cross-attention's in the decoder."""
        projection, feed_forward = d_model * d_kv * num_heads, 2 * d_model * d_ff
        source, target = self.source, self.target
        layer = (source + target) * (4 * projection + feed_forward) + 2 * (source + target) * projection
        return num_layers * layer


def plain_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL of softmaxes over the last dimension, for each row."""
    s, t = ((x.float() / temperature).log_softmax(-1) for x in (student, teacher))
    return temperature**2 * F.kl_div(s, t, log_target=True, reduction="none").sum(-1)


def plain_relation(student: Tensor, teacher: Tensor, heads: int, mask: Tensor, causal: bool) -> Tensor:
    """MiniLMv2's, of queries, keys or values [B, L, H]: mean over valid rows and heads."""
    scores = []
    for states in (student, teacher):
        x = states.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, A, L, d]
        allowed = mask[:, None, None, :].expand(-1, -1, x.shape[2], -1)
        allowed = allowed.tril() if causal else allowed
        scores.append((x @ x.mT / x.shape[-1] ** 0.5).masked_fill(~allowed, torch.finfo(x.dtype).min))
    return plain_kl(*scores).mean(1)[mask].mean()


def plain_objective(method: Any, models: tuple[Any, Any], batch: dict[str, Tensor]) -> Tensor:
    """The objective of a method from what both models return and what hooks on their projections see."""
    from fastkd.train.common.family import PLACES
    from fastkd.train.models.capture import capture_qkv

    outputs, captured = [], []
    for model, layers in zip(models, (method.student_layers, method.teacher_layers), strict=True):
        with torch.set_grad_enabled(model is models[0]), capture_qkv(model, layers(model.config)) as states:
            ids = model.prepare_decoder_input_ids_from_labels(batch["labels"])
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            want_states = bool(method.hidden_terms)
            outputs.append(model(**inputs, decoder_input_ids=ids, use_cache=False, output_hidden_states=want_states))
        captured.append(states)
    keep = batch["labels"] != -100
    masks = {"encoder": batch["attention_mask"].bool(), "decoder": keep}
    student, teacher = outputs
    loss = torch.zeros(())
    if "ce" in method.terms:
        loss = loss + F.cross_entropy(student.logits.flatten(0, 1), batch["labels"].flatten())
    if "logit_kl" in method.terms:
        loss = loss + plain_kl(student.logits, teacher.logits, method.temperature)[keep].mean()
    for place in method.places:
        sides, causal = PLACES[place].sides, PLACES[place].causal
        for ours, theirs, side in zip(captured[0][place], captured[1][place], sides, strict=True):
            loss = loss + plain_relation(ours, theirs, method.relation_heads, masks[side], causal) / 3
    if "hidden_cka" in method.terms:
        read = F.pad(keep, (1, 0))[:, :-1]
        for stack, mask in (("encoder", masks["encoder"]), ("decoder", read)):
            pairs = method.matched_states(models[0].config, models[1].config)[stack]
            ours, theirs = student[f"{stack}_hidden_states"], teacher[f"{stack}_hidden_states"]
            for i, j in pairs:
                loss = loss + plain_cka(ours[i][mask], theirs[j][mask], None)
    return loss


def model_of(shape: Shape, sizes: dict[str, int], seed: int, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    start: dict[str, Any] = {"decoder_start_token_id": 0}
    config = T5Config(vocab_size=shape.vocabulary, dropout_rate=0.0, **sizes, **start)
    return T5ForConditionalGeneration(config).to(dtype)


def batch_of(shape: Shape) -> dict[str, Tensor]:
    """Half of the examples are shorter by a quarter."""
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(3, shape.vocabulary, (shape.batch, shape.source), generator=generator),
        "labels": torch.randint(3, shape.vocabulary, (shape.batch, shape.target), generator=generator),
    }
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1::2, shape.source * 3 // 4 :] = 0
    batch["labels"][1::2, shape.target * 3 // 4 :] = -100
    return batch


def gradients(loss: Tensor, of: Any) -> tuple[Tensor, ...]:
    """Those of a model's parameters that have one."""
    parameters = [p for p in of.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return tuple(gradient for gradient in found if gradient is not None)


def trainer_of(shape: Any, student: Any, teacher: Any) -> Any:
    from fastkd.train.flags.arguments import TransformersArguments
    from fastkd.train.objectives.methods import METHODS
    from fastkd.train.training.trainer import DistillTrainer

    on_cpu = next(student.parameters()).device.type == "cpu"
    args = TransformersArguments(output_dir=tempfile.mkdtemp(), report_to="none", use_cpu=on_cpu)
    return DistillTrainer(model=student, args=args, method=METHODS[shape.method], teacher=teacher)


def models_alone(models: Sequence[Any], batch: dict[str, Tensor]) -> Run:
    """The forward passes of models without their heads, and the backward pass of the last from a sum of its states."""
    from fastkd.train.training.forward import Needs, forward

    def run() -> tuple[Tensor, ...]:
        for model in models:
            with torch.set_grad_enabled(model is models[-1]):
                states, _ = forward(model, batch, Needs())["hidden"]
        gradients(states.sum(), models[-1])
        return ()

    return run


def models_of(shape: Any, device: torch.device, model_of: Callable[..., Any] = model_of) -> tuple[Any, Any]:
    """The student and the teacher of a step."""
    student, teacher = (model_of(shape, sizes, seed).to(device) for seed, sizes in enumerate(shape.sizes, 1))
    return student, teacher.eval().requires_grad_(False)


def compared(
    shape: Any,
    student: Any,
    teacher: Any,
    batch: dict[str, Tensor],
    objective: Callable[..., Tensor],
    model_of: Callable[..., Any] = model_of,
) -> tuple[dict[str, Callable[[], Run]], Run]:
    """The trainer's step, that with the stock objective, the models alone, and the oracle."""
    device = student.device

    def by_fastkd() -> Run:
        made = trainer_of(shape, student, teacher)
        return lambda: gradients(made.compute_loss(student, batch), student)

    def eager() -> Run:
        from fastkd.train.objectives.methods import METHODS

        method = METHODS[shape.method]
        return lambda: gradients(objective(method, (student, teacher), batch), student)

    def oracle() -> tuple[Tensor, ...]:
        # By fastkd as well, for eager losses in fp64 take more memory than a desktop has; eager's own error shows
        # whether the two agree.
        exact, its = (model_of(shape, sizes, i, torch.float64).to(device) for i, sizes in enumerate(shape.sizes, 1))
        return gradients(trainer_of(shape, exact, its).compute_loss(exact, batch), exact)

    return {"fastkd": by_fastkd, "eager": eager, LIMIT: lambda: models_alone((teacher, student), batch)}, oracle


def prepare(shape: Shape, device: torch.device) -> tuple[dict[str, Callable[[], Run]], Run]:
    batch = {name: tensor.to(device) for name, tensor in batch_of(shape).items()}
    return compared(shape, *models_of(shape, device), batch, plain_objective)


def problem(shape: Shape, device: torch.device, targets: tuple[Target, ...] = ()) -> Problem:
    return Problem(
        title=str(shape),
        unit="GFLOP/s",
        work=shape.flops,
        limit=LIMIT,
        implementations=IMPLEMENTATIONS,
        targets=targets,
        prepare=partial(prepare, shape, device),
    )


def problems(device: torch.device, quick: bool = False) -> list[Problem]:
    methods = ("kd", "miniend-e", "hsm-cka")
    if quick:
        return [problem(Shape(m, 2, 40, 16, 512, tiny=True), device, TARGETS) for m in methods]
    return [problem(Shape(m), device, TARGETS) for m in methods]


if __name__ == "__main__":
    main(problems, __doc__)
