"""Distils a causal language model in Lightning: `training_step` has the two lines, and the teacher stays out of sight.

It runs as it is, on small random models. On real ones, with what `pip install '.[train]' lightning` installs:

    python examples/lightning_module.py --teacher Qwen/Qwen2.5-1.5B --student Qwen/Qwen2.5-0.5B --lr 5e-5 \
        --texts texts.txt

`torchrun --nproc-per-node 2 examples/lightning_module.py` does the same in two processes, by DDP.
"""

from __future__ import annotations

import os
from typing import Any

import lightning as L
import torch
from common import Losses, flags, load, texts, tokenizer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling

import fastkd


class Distillation(L.LightningModule):
    def __init__(self, student: Any, teacher: Any, lr: float) -> None:
        super().__init__()
        self.student, self.lr = student.train(), lr
        # In a list it is no part of the module: no checkpoint holds it, no optimizer, and DDP leaves it alone.
        self.teacher = [teacher.eval().requires_grad_(False)]
        self.losses = Losses()

    def on_fit_start(self) -> None:
        self.teacher[0].to(self.device)

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        with torch.no_grad():
            h_t = fastkd.hidden_states(self.teacher[0], **batch)
        # Lightning calls this method, whole, through DDP's wrapper: here the student is called as it is.
        h_s = fastkd.hidden_states(self.student, **batch)  # [batch, length, width], no logits
        # how many labels the batches of all processes have; a row's first is never predicted
        count = self.trainer.strategy.reduce((batch["labels"][:, 1:] != -100).sum(), reduce_op="sum")
        heads = fastkd.head(self.student), fastkd.head(self.teacher[0])
        where = fastkd.targets(self.student, batch["labels"], count)
        loss = fastkd.linear_kl(h_s, heads[0], h_t, heads[1], ce_weight=0.5, **where)
        self.log("loss", loss, sync_dist=True)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        if self.global_rank == 0:
            self.losses.add(self.trainer.callback_metrics["loss"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr)


if __name__ == "__main__":
    args = flags(__doc__, steps=30)
    tokens = tokenizer(args)
    small = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    student = load(AutoModelForCausalLM, args.student, "llama", hidden_size=64, intermediate_size=128, **small)
    teacher = load(AutoModelForCausalLM, args.teacher, "llama", hidden_size=128, intermediate_size=256, **small)
    rows = [tokens(text, truncation=True, max_length=128) for text in texts(args)]
    collate = DataCollatorForLanguageModeling(tokens, mlm=False)  # makes labels of the input
    module = Distillation(student, teacher, args.lr)
    trainer = L.Trainer(
        max_steps=args.steps,
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),  # torchrun's
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(rows, batch_size=8, collate_fn=collate))
    if trainer.is_global_zero:
        module.losses.finish()
