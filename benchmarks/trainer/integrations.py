"""A step's loss and gradients in the loops that other people have: fastkd's losses beside what stands there.

In the Trainer of transformers that is a `compute_loss` from the logits of both models; in TRL's GKDTrainer and
DistillationTrainer their own; in a plain loop Liger's loss, uncompiled. The models, batches and trainers are the same,
and so are losses and gradients, whose error against fp64 is told for both. The floor is both models alone, the
student's backward pass from a sum of its hidden states, without any head; of Liger's loss, which is given states, its
matrix products. Memory is counted above models, inputs and gradients. Students are half as wide as their teachers, of
two layers each.

B sequences, L tokens, V pieces; a quarter of each sequence is prompt.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from benchmarks.harness.command import main
from benchmarks.harness.problem import Problem, Run, Target, normals, peer
from benchmarks.ops.linear_kl import gemms
from benchmarks.trainer import train_step
from benchmarks.trainer.causal_step import batch_of
from fastkd.integrations.conventions import generalized_jsd

FLOOR = "floor"
IMPLEMENTATIONS = ("fastkd", "stock")
TARGETS = (Target("stock", 0.6), Target("memory / stock", 0.4))
SIZES = {"hidden_size": 896, "intermediate_size": 2432, "num_attention_heads": 14, "num_key_value_heads": 2}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
LAYERS = 2


@dataclass(frozen=True)
class Loop:
    """Whose, on which models; a teacher's vocabulary may be padded."""

    name: str  # of the trainer: "Trainer", "GKDTrainer" or "DistillationTrainer"
    family: str
    tied: bool
    vocabulary: int
    padding: int = 0
    beta: float = 0.0  # TRL's
    batch: int = 2
    length: int = 256
    tiny: bool = False

    def __str__(self) -> str:
        both = f"{self.vocabulary} / {self.vocabulary + self.padding}" if self.padding else str(self.vocabulary)
        whose = f"{self.name} beta {self.beta:g}" if self.name != "Trainer" else self.name
        return f"{whose}, {self.family} {'tied' if self.tied else 'untied'} V {both}, B {self.batch} L {self.length}"

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        return {name: x.to(device) for name, x in batch_of(self).items()}

    def model(self, teacher: bool, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
        import transformers

        sizes = TINY if self.tiny else SIZES
        if not teacher:
            sizes = {name: size // 2 for name, size in sizes.items()}
        if self.family == "gpt2":
            names = {"hidden_size": "n_embd", "intermediate_size": "n_inner", "num_attention_heads": "n_head"}
            sizes = {names[name]: size for name, size in sizes.items() if name in names} | {"n_layer": LAYERS}
            sizes |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0)
        else:
            sizes = {**sizes, "num_hidden_layers": LAYERS}
        vocabulary = self.vocabulary + teacher * self.padding
        config = transformers.AutoConfig.for_model(
            self.family, vocab_size=vocabulary, tie_word_embeddings=self.tied, bos_token_id=1, eos_token_id=2,
            pad_token_id=0, **sizes,
        )  # fmt: skip
        torch.manual_seed(int(teacher))
        model = transformers.AutoModelForCausalLM.from_config(config).to(device, dtype)
        return model.eval().requires_grad_(False) if teacher else model

    @property
    def flops(self) -> float:
        """Of the models' linear layers and heads: three times the student's, for its backward pass."""
        total = 0.0
        with torch.device("meta"):
            for teacher, times in ((True, 1), (False, 3)):
                model = self.model(teacher, torch.device("meta"))
                weights = [p for name, p in model.named_parameters() if p.dim() == 2 and "wpe" not in name]
                embedding = 0 if self.tied else model.get_input_embeddings().weight.numel()
                total += 2 * times * self.batch * self.length * (sum(p.numel() for p in weights) - embedding)
        return total


# ---- the losses of the Trainer's loops ------------------------------------------------------------------------------


def by_fastkd(student: Any, teacher: Any, batch: dict[str, Tensor], items: Any = None, beta: float = 0.0) -> Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        its = fastkd.hidden_states(teacher, **inputs)
    own, aligned = fastkd.hidden_states(student, **inputs), fastkd.targets(student, batch["labels"], items)
    heads = fastkd.head(student), fastkd.head(teacher)
    return fastkd.linear_kl(own, heads[0], its, heads[1], **generalized_jsd(beta), **aligned)


def by_logits(student: Any, teacher: Any, batch: dict[str, Tensor], items: Any = None) -> Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        p = teacher(**inputs, use_cache=False).logits[:, :-1, : student.config.vocab_size].log_softmax(-1)
    q = student(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
    kept = batch["labels"][:, 1:] != -100
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)[kept].sum() / items


def gradients(loss: Tensor, model: Any) -> tuple[Tensor, ...]:
    """With the loss itself before them."""
    return loss.detach(), *train_step.gradients(loss, model)


# ---- the trainers ---------------------------------------------------------------------------------------------------


def of_transformers(loop: Loop, ours: bool, student: Any, teacher: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    loss = by_fastkd if ours else by_logits

    class DistillationTrainer(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            return loss(model, teacher, inputs, num_items_in_batch)

    args = TrainingArguments(tempfile.mkdtemp(), report_to="none", use_cpu=student.device.type == "cpu")
    return DistillationTrainer(student, args)


def of_trl(loop: Loop, ours: bool, student: Any, teacher: Any) -> Any:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    module = "trl.experimental.gkd" if loop.name == "GKDTrainer" else "trl"
    kind = peer("fastkd.integrations.trl" if ours else module, loop.name)
    config = peer(module, loop.name.replace("Trainer", "Config"))
    import datasets

    on_cpu = student.device.type == "cpu"
    args = config(tempfile.mkdtemp(), report_to="none", use_cpu=on_cpu, bf16=False, beta=loop.beta)
    row = [{"role": "user", "content": "0"}, {"role": "assistant", "content": "1"}]
    data = {"messages": row} if loop.name == "GKDTrainer" else {"prompt": row[:1]}
    return kind(
        student, teacher, args=args, train_dataset=datasets.Dataset.from_list([data] * 8),
        processing_class=tokenizer(loop.vocabulary),
    )  # fmt: skip


def tokenizer(vocabulary: int) -> Any:
    """Of numbers: the trainers of TRL want one, and make nothing of it here."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = {str(i): i for i in range(vocabulary)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="3"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", bos_token="1", eos_token="2", unk_token="3")
    made.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }} 2{% endgeneration %}"
        "{% else %}{{ m.content }} {% endif %}{% endfor %}"
    )
    return made


def as_trl_has_it(loop: Loop, batch: dict[str, Tensor], items: Tensor) -> dict[str, Tensor]:
    if loop.name != "DistillationTrainer":
        return batch
    at, found = loop.length // 4, {}
    for name, x in {"ids": batch["input_ids"], "mask": batch["attention_mask"]}.items():
        found |= {f"prompt_{name}": x[:, :at], f"completion_{name}": x[:, at:]}
    return {**found, "num_items_in_batch": items}


def prepare(loop: Loop, device: torch.device) -> tuple[dict[str, Callable[[], Run]], Run]:
    student, teacher = (loop.model(is_teacher, device) for is_teacher in (False, True))
    batch = loop.inputs(device)
    items = (batch["labels"] != -100).sum()

    def step(ours: bool) -> Run:
        make = of_transformers if loop.name == "Trainer" else of_trl
        made, given = make(loop, ours, student, teacher), as_trl_has_it(loop, batch, items)
        made.model.train()

        def run() -> tuple[Tensor, ...]:
            loss = made.compute_loss(made.model, dict(given), num_items_in_batch=items)
            return gradients(loss, made.model)

        return run

    def oracle() -> tuple[Tensor, ...]:
        exact, its = (loop.model(is_teacher, device, torch.float64) for is_teacher in (False, True))
        return gradients(by_fastkd(exact, its, batch, items, loop.beta), exact)

    floor = partial(train_step.models_alone, (teacher, student), batch)
    return {"fastkd": partial(step, True), "stock": partial(step, False), FLOOR: floor}, oracle


# ---- Liger's loss in a plain loop -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LigerLoop:
    tokens: int = 512
    vocabulary: int = 32000
    widths: tuple[int, int] = (448, 896)  # of student and teacher

    def __str__(self) -> str:
        student, teacher = self.widths
        return f"Liger's JSD, T {self.tokens} V {self.vocabulary} {teacher} -> {student}"

    @property
    def flops(self) -> float:
        student, teacher = self.widths
        return 2 * self.tokens * self.vocabulary * (3 * student + teacher)

    def prepare(self, device: torch.device) -> tuple[dict[str, Callable[[], Run]], Run]:
        normal, vocabulary = normals(device), self.vocabulary
        inputs = []
        for width in self.widths:
            inputs += [normal(self.tokens, width), normal(vocabulary, width, std=3 * width**-0.5)]
        leaves = [x.requires_grad_() for x in inputs[:2]]
        labels = torch.arange(self.tokens, device=device)
        labels[: self.tokens // 4] = -100

        def step(module: str) -> Run:
            kind = peer(module, "LigerFusedLinearJSDLoss")
            loss_of = kind(weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.5, compiled=False)

            def run() -> tuple[Tensor, ...]:
                loss = loss_of(*inputs, labels)
                return loss.detach(), *torch.autograd.grad(loss, leaves)

            return run

        def oracle() -> tuple[Tensor, ...]:
            exact = [x.detach().double() for x in inputs]
            for x in exact[:2]:
                x.requires_grad_()
            options: Any = {"divergence": "jsd", "kd_weight": 0.5, "ce_weight": 0.5, "impl": "reference"}
            loss = fastkd.linear_kl(*exact, labels=labels, **options)
            return loss.detach(), *torch.autograd.grad(loss, exact[:2])

        rows = {"fastkd": "fastkd.integrations.liger", "stock": "liger_kernel.chunked_loss"}
        return {
            **{name: partial(step, module) for name, module in rows.items()},
            FLOOR: lambda: gemms(*inputs),
        }, oracle


# ---- all of them ----------------------------------------------------------------------------------------------------


def problems(device: torch.device, quick: bool = False) -> list[Problem]:
    found: list[tuple[Any, Any]] = []
    small: dict[str, Any] = {"length": 40, "tiny": True} if quick else {}

    def size(vocabulary: int) -> int:
        return min(vocabulary, 512) if quick else vocabulary

    for loop in (
        Loop("Trainer", "qwen2", True, size(151936), 128, **{"length": 192, **small}),
        Loop("Trainer", "llama", False, size(32000), **small),
        Loop("Trainer", "gpt2", True, size(50257), **small),
        Loop("GKDTrainer", "llama", False, size(32000), beta=0.5, **small),
        Loop("DistillationTrainer", "llama", False, size(32000), beta=1.0, **small),
    ):
        found.append((loop, partial(prepare, loop, device)))
    liger = LigerLoop(64, 512, (32, 64)) if quick else LigerLoop()
    found.append((liger, partial(liger.prepare, device)))
    return [
        Problem(
            title=str(loop),
            unit="GFLOP/s",
            work=loop.flops,
            limit=FLOOR,
            implementations=IMPLEMENTATIONS,
            targets=TARGETS,
            prepare=prepared,
        )
        for loop, prepared in found
    ]


if __name__ == "__main__":
    main(problems, __doc__)
