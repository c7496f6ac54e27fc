"""Distils a BART that summarises into a narrower one, by HSM: hidden states by CKA, beside logits and labels.

It runs as it is, on small random models. On real ones, with what `pip install '.[train]'` installs and a JSONL file of
{"text": ..., "summary": ...}:

    python examples/bart_summarization.py --teacher facebook/bart-large-xsum --student ./small-bart --lr 3e-5 \
        --pairs train.jsonl
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from common import DEVICE, Losses, chunks, flags, load, texts, tokenizer
from transformers import AutoModelForSeq2SeqLM

import fastkd
from fastkd.train import capture_hidden

args = flags(__doc__, steps=30, pairs="JSONL with text and summary; without, paragraphs and their first words")
tokens = tokenizer(args)
if args.pairs is not None:
    lines = Path(args.pairs).read_text(encoding="utf-8").splitlines()
    pairs = [(row["text"], row["summary"]) for row in map(json.loads, lines)]
else:
    pairs = [(text, " ".join(text.split()[:6])) for text in texts(args)]

small = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
small |= {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 1, "max_position_embeddings": 256}
student = load(AutoModelForSeq2SeqLM, args.student, "bart", d_model=64, **small).to(DEVICE).train()
teacher = load(AutoModelForSeq2SeqLM, args.teacher, "bart", d_model=128, **small).to(DEVICE).eval()
optimizer, losses = torch.optim.AdamW(student.parameters(), args.lr), Losses()

# HSM compares every layer; where depths differ, each of the student's with the one as far up in the teacher.
mine, its = {}, {}
for side in ("encoder", "decoder"):
    depth, other = (getattr(model.config, f"{side}_layers") for model in (student, teacher))
    mine[side] = range(1, depth + 1)
    its[side] = [round(i * other / depth) for i in mine[side]]

for some in chunks(pairs, 8, args.steps):
    ours, summaries = zip(*some, strict=True)
    inputs = tokens(list(ours), truncation=True, max_length=128, padding=True, return_tensors="pt").to(DEVICE)
    targets = tokens(list(summaries), truncation=True, max_length=64, padding=True, return_tensors="pt").to(DEVICE)
    labels = targets.input_ids.masked_fill(targets.attention_mask == 0, -100)
    batch = {**inputs, "labels": labels}
    with torch.no_grad(), capture_hidden(teacher, its) as states_t:
        h_t = fastkd.hidden_states(teacher, **batch)  # makes the decoder's tokens of the labels
    with capture_hidden(student, mine) as states_s:
        h_s = fastkd.hidden_states(student, **batch)

    heads = fastkd.head(student), fastkd.head(teacher)
    loss = fastkd.linear_kl(h_s, heads[0], h_t, heads[1], labels=labels, ce_weight=1.0)
    for side, mask in {"encoder": inputs["attention_mask"], "decoder": labels != -100}.items():
        loss = loss + fastkd.cka_loss(states_s[side], states_t[side], mask=mask)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.add(loss)
losses.finish()
