"""Structured pruning of a T5 and of an EncT5: choosing the widths, and copying what is left into a dense model.

At two sparsities, and the whole model in the order of importance, of which all sub-networks are prefixes. The usual way
makes a model of these widths and copies into it, weight after weight. A run ends with the logits of a few tokens, which
tell its error from the model with masks in fp64. What it made goes with it, so its memory is all that pruning takes
beyond the model; at most the model's own size, the target, keeps both together below twice that. Reordering, which
prunes nothing and makes a model of that size, has no such target. The limit is a copy of all weights.

The importance pass comes before; fastkd's rows note how long one takes. s: the share of heads, and of neurons, pruned.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.command import main
from benchmarks.harness.memory import MIB
from benchmarks.harness.problem import Problem, Run, Target, noted
from benchmarks.harness.timing import seconds

LIMIT = "copy"
IMPLEMENTATIONS = ("fastkd", "eager")
T5_BASE = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "vocab_size": 32128}
TINY = {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 2, "vocab_size": 512}
CLASSES = ("no", "maybe", "yes")


@dataclass(frozen=True)
class Shape:
    architecture: str  # "t5" or "enct5"
    sparsity: float  # 0 reorders
    batch: int = 8  # of the importance pass, in tokens source and, unless it is a class, target long
    source: int = 128
    target: int = 32
    tiny: bool = False

    def __str__(self) -> str:
        what = f"prune s {self.sparsity:g}" if self.sparsity else "reorder"
        name = {"t5": "T5", "enct5": "EncT5"}[self.architecture]
        return f"{what} {name}{' tiny' if self.tiny else '-base'}"

    @property
    def sizes(self) -> dict[str, int]:
        return TINY if self.tiny else T5_BASE

    def bytes_at(self, sparsity: float) -> float:
        """Of the embeddings and of what is left of the layers; layer norms and tables of positions count nothing."""
        d_model, layers = self.sizes["d_model"], self.sizes["num_layers"]
        attention = 4 * d_model * self.sizes["d_kv"] * self.sizes["num_heads"]
        feed_forward = 2 * d_model * self.sizes["d_ff"]
        decoder_layers = layers if self.architecture == "t5" else 1
        weights = layers * (attention + feed_forward) + decoder_layers * (2 * attention + feed_forward)
        return 4 * (self.sizes["vocab_size"] * d_model + (1 - sparsity) * weights)


def plain_pruning(model: Any, widths: dict[str, int], order: dict[str, Tensor]) -> Any:
    """The usual way."""
    from fastkd.train.common.family import is_enct5
    from fastkd.train.models.architectures import (
        EncT5ForSequenceClassification,
        PrunedT5ForConditionalGeneration,
        parts,
    )

    kind: Any = EncT5ForSequenceClassification if is_enct5(model.config) else PrunedT5ForConditionalGeneration
    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
    made = kind(kind.config_class(**settings | {"widths": widths})).to(model.device).eval()
    theirs = dict(model.named_parameters())
    for name, parameter in made.named_parameters():
        if name in theirs and theirs[name].shape == parameter.shape:
            parameter.copy_(theirs[name])
    for name, part in parts(made).items():
        units = order[name][: part.units]
        rows = (units[:, None] * part.size + torch.arange(part.size, device=units.device)).flatten()
        for inner in part.inner:
            made.get_parameter(f"{name}.{inner}.weight").copy_(theirs[f"{name}.{inner}.weight"][rows])
        made.get_parameter(f"{name}.{part.outer}.weight").copy_(theirs[f"{name}.{part.outer}.weight"][:, rows])
        if name.endswith("SelfAttention"):  # every layer has a table, those of T5 are in the first ones
            first = f"{name.split('.')[0]}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            made.get_parameter(f"{name}.relative_attention_bias.weight").copy_(theirs[first][:, units])
    return made


def prepare(shape: Shape, device: torch.device) -> tuple[dict[str, Callable[[], Run]], Run]:
    from transformers import T5Config, T5ForConditionalGeneration

    from fastkd.train.minidisc.prune import importance, masked, normalised, order_of, sliced, widths_at
    from fastkd.train.models.architectures import enct5_from

    torch.manual_seed(0)
    start: dict[str, Any] = {"decoder_start_token_id": 0}
    model: Any = T5ForConditionalGeneration(T5Config(dropout_rate=0.0, **shape.sizes, **start))
    if shape.architecture == "enct5":
        model = enct5_from(model, CLASSES)
    model = model.to(device).eval()

    def tokens(*size: int) -> Tensor:
        return torch.randint(3, shape.sizes["vocab_size"], size, device=device)

    labels = tokens(shape.batch, shape.target) if shape.architecture == "t5" else tokens(shape.batch) % len(CLASSES)
    batch = {"input_ids": tokens(shape.batch, shape.source), "labels": labels}
    scores = normalised(importance(model, [{name: tensor[:1] for name, tensor in batch.items()}]))
    order = order_of(scores)
    ids = tokens(1, 8)

    def logits(network: Any) -> tuple[Tensor, ...]:
        return (network(input_ids=ids, decoder_input_ids=ids[:, :1], use_cache=False).logits,)

    def of_pruned(prune: Callable[..., Any]) -> Run:
        @torch.no_grad()
        def run() -> tuple[Tensor, ...]:
            return logits(prune(model, widths_at(scores, shape.sparsity), order))

        return run

    def by_fastkd() -> Run:
        one = seconds(lambda: tuple(importance(model, [batch]).values()), device)
        return noted(of_pruned(sliced), f"importance: {one:.2g} s a batch of {shape.batch} x {shape.source} tokens")

    def copied() -> Run:
        def run() -> tuple[Tensor, ...]:
            made = [parameter.detach().clone() for parameter in model.parameters()]
            del made
            return ()

        return run

    @torch.no_grad()
    def oracle() -> tuple[Tensor, ...]:
        masks = {}
        for name, width in widths_at(scores, shape.sparsity).items():
            masks[name] = torch.zeros_like(scores[name]).index_fill_(0, order[name][:width], 1)
        exact = copy.deepcopy(model).double()
        with masked(exact, masks):
            return logits(exact)

    return {"fastkd": by_fastkd, "eager": lambda: of_pruned(plain_pruning), LIMIT: copied}, oracle


def problem(shape: Shape, device: torch.device) -> Problem:
    model = shape.bytes_at(0.0)
    return Problem(
        title=str(shape),
        unit="GB/s",
        work=2 * shape.bytes_at(shape.sparsity),
        limit=LIMIT,
        limit_work=2 * model,
        implementations=IMPLEMENTATIONS,
        targets=(Target("ms", 60_000), *([Target("memory", model / MIB)] if shape.sparsity else [])),
        prepare=partial(prepare, shape, device),
    )


def problems(device: torch.device, quick: bool = False) -> list[Problem]:
    small: dict[str, Any] = {"batch": 2, "source": 16, "target": 8, "tiny": True} if quick else {}
    return [problem(Shape(name, s, **small), device) for name in ("t5", "enct5") for s in (0.0, 0.5, 0.95)]


if __name__ == "__main__":
    main(problems, __doc__)
