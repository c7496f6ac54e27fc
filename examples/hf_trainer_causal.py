"""Distils a causal language model in the Trainer of transformers: `compute_loss` is all that changes.

It runs as it is, on small random models. On real ones, with what `pip install '.[train]'` installs:

    python examples/hf_trainer_causal.py --teacher Qwen/Qwen2.5-1.5B --student Qwen/Qwen2.5-0.5B --lr 5e-5 \
        --texts texts.txt

`torchrun --nproc-per-node 2 examples/hf_trainer_causal.py` does the same in two processes.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from common import Losses, flags, load, texts, tokenizer
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments

import fastkd


class DistillationTrainer(Trainer):
    def __init__(self, *args: Any, teacher: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with torch.no_grad(), self.accelerator.autocast():
            teacher_hidden = fastkd.hidden_states(self.teacher, **inputs)
        hidden = fastkd.hidden_states(model, **inputs)  # [batch, length, width], no logits
        loss = fastkd.linear_kl(
            hidden,
            fastkd.head(model),
            teacher_hidden,
            fastkd.head(self.teacher),
            ce_weight=0.5,  # cross-entropy with the labels, beside the divergence from the teacher
            **fastkd.targets(model, inputs["labels"], num_items_in_batch),
        )
        return (loss, {"loss": loss}) if return_outputs else loss  # evaluate() asks for both


args = flags(__doc__, steps=30)
tokens = tokenizer(args)
small = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
student = load(AutoModelForCausalLM, args.student, "llama", hidden_size=64, intermediate_size=128, **small)
teacher = load(AutoModelForCausalLM, args.teacher, "llama", hidden_size=128, intermediate_size=256, **small)
rows = [tokens(text, truncation=True, max_length=128) for text in texts(args)]

with tempfile.TemporaryDirectory() as folder:
    trainer = DistillationTrainer(
        student,
        TrainingArguments(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=args.lr,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),  # else processes without GPUs do not know of each other
            disable_tqdm=True,
        ),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokens, mlm=False),  # makes labels of the input
        teacher=teacher,
    )
    trainer.train()

losses = Losses(float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
losses.finish()
