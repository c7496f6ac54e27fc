"""MiniEnD-E in a plain loop: a T5 learns the teacher's logits, and its relations of queries, keys and values.

It runs as it is, on small random models. On real ones, with what `pip install '.[train]'` installs:

    python examples/t5_miniend.py --teacher google/flan-t5-base --student google/flan-t5-small --lr 1e-4 \
        --texts texts.txt
"""

from __future__ import annotations

import torch
from common import DEVICE, Losses, chunks, flags, load, texts, tokenizer
from transformers import AutoModelForSeq2SeqLM

import fastkd
from fastkd.train import capture_qkv

args = flags(__doc__, steps=30)
tokens = tokenizer(args)
small = {"d_kv": 16, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
student = load(AutoModelForSeq2SeqLM, args.student, "t5", d_model=64, d_ff=128, **small).to(DEVICE).train()
teacher = load(AutoModelForSeq2SeqLM, args.teacher, "t5", d_model=128, d_ff=256, **small).to(DEVICE).eval()
optimizer, losses = torch.optim.AdamW(student.parameters(), args.lr), Losses()
texts_of = texts(args)


def last_layers(model):
    """Where relations are taken: of large teachers MiniLMv2 takes an upper middle layer, of small ones the last."""
    return {"encoder_self": model.config.num_layers, "decoder_self": model.config.num_decoder_layers}


for some in chunks(texts_of, 8, args.steps):
    # what there is to say of a text is its second half, for want of a corpus of pairs
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in some]
    inputs, targets = (
        tokens(list(side), truncation=True, max_length=96, padding=True, return_tensors="pt").to(DEVICE)
        for side in zip(*halves, strict=True)
    )
    labels = targets.input_ids.masked_fill(targets.attention_mask == 0, -100)
    batch = {**inputs, "labels": labels}

    # hooks on the projections, not changes to the model: the states are those before heads are split
    with torch.no_grad(), capture_qkv(teacher, last_layers(teacher)) as its:
        h_t = fastkd.hidden_states(teacher, **batch)
    with capture_qkv(student, last_layers(student)) as mine:
        h_s = fastkd.hidden_states(student, **batch)

    loss = fastkd.linear_kl(h_s, fastkd.head(student), h_t, fastkd.head(teacher), labels=labels)
    masks = {"encoder_self": inputs.attention_mask, "decoder_self": targets.attention_mask}
    for place, mask in masks.items():
        causal = place == "decoder_self"
        # as many relation heads as the paper takes where widths allow it: 32, here 16
        loss = loss + fastkd.relation_kl(mine[place], its[place], num_heads=16, key_mask=mask, causal=causal)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.add(loss)
losses.finish()
