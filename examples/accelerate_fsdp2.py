"""Distils a causal model whose weights FSDP2 shards over processes; accelerate knows these, and brings data to them.

It runs as it is, on small random models and without a GPU; on real ones give --teacher, --student and --texts:

    torchrun --nproc-per-node 2 examples/accelerate_fsdp2.py

The loop is that of one process: `hidden_states` calls the model with its wrapper, so weights are gathered and gradients
reduced; `head` gathers the head, and averages its gradient.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from common import Losses, chunks, flags, load, texts, tokenizer
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import fastkd

args = flags(__doc__, steps=20)
accelerator = Accelerator(cpu=not torch.cuda.is_available())
tokens = tokenizer(args)
small = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
student = load(AutoModelForCausalLM, args.student, "llama", hidden_size=64, intermediate_size=128, **small)
teacher = load(AutoModelForCausalLM, args.teacher, "llama", hidden_size=128, intermediate_size=256, **small)
for model in (student.train(), teacher.eval().requires_grad_(False)):
    model.to(accelerator.device)
    if accelerator.num_processes > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
optimizer, losses = torch.optim.AdamW(student.parameters(), args.lr), Losses()

batches = 2 * accelerator.num_processes  # a step has two for each process
for rows in chunks(texts(args), 4 * batches, args.steps):
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    micro = []
    for some in (mine[:4], mine[4:]):
        inputs = tokens(some, truncation=True, max_length=128, padding=True, return_tensors="pt")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        micro.append({name: x.to(accelerator.device) for name, x in {**inputs, "labels": labels}.items()})
    # how many labels the whole step has, over all micro-batches and processes; a row's first is never predicted
    count = torch.stack([(batch["labels"][:, 1:] != -100).sum() for batch in micro]).sum()
    count = accelerator.reduce(count, "sum")
    told = torch.zeros((), device=accelerator.device)
    for batch in micro:
        with torch.no_grad():
            h_t = fastkd.hidden_states(teacher, **batch)
        h_s = fastkd.hidden_states(student, **batch)
        heads = fastkd.head(student), fastkd.head(teacher)
        where = fastkd.targets(student, batch["labels"], count)
        loss = fastkd.linear_kl(h_s, heads[0], h_t, heads[1], ce_weight=0.5, **where)
        loss.backward()
        told += loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    told = accelerator.reduce(told, "mean")
    if accelerator.is_main_process:
        losses.add(told)
if accelerator.num_processes > 1:
    torch.distributed.destroy_process_group()
if accelerator.is_main_process:
    losses.finish()
