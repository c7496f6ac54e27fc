"""Held-out loss and accuracy, from hidden states, in chunks of tokens so that logits stay small; and generation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ...heads import Head
from ..common.family import is_enct5
from ..common.processes import is_first, of_all, own_part
from ..models.anatomy import logits
from ..models.sharding import is_sharded
from ..models.tokenizer import texts_of

CHUNK = 1024  # tokens: 16 MB of fp32 logits at 4,096 pieces


@torch.no_grad()
def token_scores(hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> torch.Tensor:
    """Return [B, L, 2] (fp32): each target token's negative log-likelihood in nats, and 1 where the argmax is right.

    hidden [B, L, H], what the head is given; labels [B, L]; where a label is -100 both scores are 0. Of a head with one
    output, which is a number: the squared error, and 1 where it rounds to what the label rounds to.
    """
    if head.weight.shape[0] == 1:
        numbers = logits(hidden, head)[..., 0]
        return torch.stack([(numbers - labels).square(), (numbers.round() == labels.round()).float()], -1)
    scores = []
    for h, y in zip(hidden.flatten(0, 1).split(CHUNK), labels.flatten().split(CHUNK), strict=True):
        scores_of_all = logits(h, head)  # [CHUNK, V]
        nats = torch.nn.functional.cross_entropy(scores_of_all, y, reduction="none", ignore_index=-100)
        scores.append(torch.stack([nats, (scores_of_all.argmax(-1) == y).float()], -1))
    return torch.cat(scores).view(*labels.shape, 2)


def held_out_metrics(prediction: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """Average token scores over all target tokens; the `compute_metrics` of DistillTrainer.

    prediction: (scores [N, L, 2], labels [N, L]). Returns "loss" in nats per target token and "token_accuracy".
    """
    scores, labels = prediction
    nats, hits = scores[labels != -100].astype(np.float64).mean(0)
    return {"loss": float(nats), "token_accuracy": float(hits)}


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    sources: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    num_beams: int = 1,
    kept: Collection[int] = (),
    title: str | None = None,
) -> list[str]:
    """Return what a model writes for each source, token ids without padding: its most likely words, or by beams.

    Whatever else its own generation_config says, such as least lengths or banned words, is not done, so that models
    are compared by one decoding. Sources of like length share a batch. kept: ids of special tokens that are part of
    what is written; others are left out. title: of the progress bar, which is not shown without one.
    An EncT5 gives a class, which is all that it says. Processes share the sources, unless they share the model's
    weights, which takes all of them for every batch.
    """
    device, mode, shares = next(model.parameters()).device, model.training, not is_sharded(model)
    order: Sequence[int] = sorted(range(len(sources)), key=lambda i: len(sources[i]), reverse=True)
    order = own_part(order) if shares else order
    answers: dict[int, str] = {}
    own = getattr(model, "generation_config", None)  # an EncT5 has none
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        decoder_start_token_id=model.config.decoder_start_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.eval()
    bar = tqdm(total=len(order), desc=title, unit="text", disable=title is None or not is_first())
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            padded = tokenizer.pad({"input_ids": [list(sources[i]) for i in batch]}, return_tensors="pt").to(device)
            inputs = {name: padded[name] for name in ("input_ids", "attention_mask")}
            if is_enct5(model.config):
                texts = [model.config.id2label[i] for i in model(**inputs).logits.argmax(-1).tolist()]
            else:  # processes that share a model's weights gather them together as long as one of them writes
                written = model.generate(**inputs, synced_gpus=not shares)[:, 1:].tolist()
                texts = texts_of(tokenizer, written, kept)
            answers.update(zip(batch, texts, strict=True))
            bar.update(len(batch))
    finally:
        bar.close()
        model.train(mode)
        model.generation_config = own
    for others in of_all(answers) if shares else ():
        answers |= others
    return [answers[i] for i in range(len(sources))]
