"""Asks a teacher once, keeps its likeliest tokens in a Parquet file, and trains a student on the file alone.

It runs as it is, on small random models. On real ones, with what `pip install '.[train]'` installs:

    python examples/offline_topk.py --teacher Qwen/Qwen2.5-7B --student Qwen/Qwen2.5-0.5B --lr 5e-5 \
        --texts texts.txt --file teacher.parquet

The second call with a file that exists starts with training, and needs no room for the teacher.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import DEVICE, Losses, chunks, flags, load, texts, tokenizer
from transformers import AutoModelForCausalLM

import fastkd

BATCH, K = 8, 16
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@torch.no_grad()
def write(file: Path, teacher: Any, tokens: Any, rows: list[str]) -> None:
    """A row for each text: its tokens, and for each of them the likeliest next ones with their log-probabilities."""
    kept = []
    for some in chunks(rows, BATCH, len(rows) // BATCH):
        inputs = tokens(some, truncation=True, max_length=128, padding=True, return_tensors="pt").to(DEVICE)
        top = fastkd.TopK.from_hidden(fastkd.hidden_states(teacher, **inputs), fastkd.head(teacher), K)
        for ids, mask, likeliest, log_probs in zip(*inputs.values(), top.indices, top.log_probs, strict=True):
            real = mask.bool()  # no padding goes into the file
            columns = {"input_ids": ids, "token_ids": likeliest, "log_probs": log_probs}
            kept.append({name: x[real].tolist() for name, x in columns.items()})
    pq.write_table(pa.Table.from_pylist(kept), file)


def train(file: Path, student: Any, tokens: Any, steps: int, lr: float) -> Losses:
    """Train on batches of the file's rows."""
    table, optimizer, losses = pq.read_table(file), torch.optim.AdamW(student.parameters(), lr), Losses()
    for rows in chunks(list(range(table.num_rows)), BATCH, steps):
        some = table.take(rows)
        ids = {"input_ids": some["input_ids"].to_pylist()}
        inputs = tokens.pad(ids, padding_side="right", return_tensors="pt").to(DEVICE)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)  # -100 drops a token
        teacher = fastkd.TopK.from_columns(some, "token_ids", "log_probs").to(DEVICE)  # padded to one length
        where = fastkd.targets(student, labels)
        loss = fastkd.linear_kl(
            fastkd.hidden_states(student, **inputs), fastkd.head(student), teacher, ce_weight=0.5, **where
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.add(loss)
    return losses


if __name__ == "__main__":
    args = flags(__doc__, steps=30, file="what the teacher said; is written if it is not there")
    tokens = tokenizer(args)
    with tempfile.TemporaryDirectory() as folder:
        file = args.file or Path(folder, "teacher.parquet")
        if not file.exists():
            sizes = {"hidden_size": 128, "intermediate_size": 256, **SMALL}
            teacher = load(AutoModelForCausalLM, args.teacher, "llama", **sizes).eval().to(DEVICE)
            write(file, teacher, tokens, texts(args)[:256])
        print(f"{file.name}: {file.stat().st_size >> 10} KiB")
        sizes = {"hidden_size": 64, "intermediate_size": 128, **SMALL}
        student = load(AutoModelForCausalLM, args.student, "llama", **sizes).to(DEVICE)
        train(file, student, tokens, args.steps, args.lr).finish()
