"""Held-out loss and accuracy, from hidden states, in chunks of tokens so that logits stay small; and generation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ...heads import Head
from ..common.family import KINDS, has_types
from ..common.processes import is_first, of_all, own_part
from ..models.anatomy import family, kind, logits
from ..models.sharding import is_sharded
from ..models.tokenizer import frame, texts_of

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
    token_types: Sequence[Sequence[int]] | None = None,
    title: str | None = None,
) -> list[str]:
    """Return what a model writes for each source, token ids without padding: its most likely words, or by beams.

    Whatever else its own generation_config says, such as least lengths or banned words, is not done, so that models
    are compared by one decoding; what stands before every target, as a language's code, is given. Sources of like
    length share a batch. kept: ids of special tokens that are part of what is written; others are left out.
    token_types: of each source, for models that read them. title: of the progress bar, which is not shown without one.
    A classifier gives a class, which is all that it says, or its number if it has one output. A model that continues
    texts is given them padded on the left. Processes share the sources, unless they share the model's weights, which
    takes all of them for every batch.
    """
    device, mode, shares = next(model.parameters()).device, model.training, not is_sharded(model)
    order: Sequence[int] = sorted(range(len(sources)), key=lambda i: len(sources[i]), reverse=True)
    order = own_part(order) if shares else order
    answers: dict[int, str] = {}
    of_kind, own = kind(model), getattr(model, "generation_config", None)  # a classifier has none
    positions = family(model).positions(model.config) or max_new_tokens + 1
    if KINDS[of_kind].answers:
        # How many tokens it may write depends on the batch.
        fixed = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        model.generation_config = GenerationConfig(num_beams=num_beams, **fixed, **begins(model, tokenizer))
    model.eval()
    bar = tqdm(total=len(order), desc=title, unit="text", disable=title is None or not is_first())
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            items: dict[str, Any] = {"input_ids": [list(sources[i]) for i in batch]}
            if token_types and has_types(model.config):
                items["token_type_ids"] = [list(token_types[i]) for i in batch]
            side = "left" if of_kind == "causal" else "right"
            inputs = dict(tokenizer.pad(items, return_tensors="pt", padding_side=side).to(device))
            if of_kind == "classifier":
                texts = _classes(model, model(**inputs).logits)
            else:  # processes that share a model's weights gather them together as long as one of them writes
                read = inputs["input_ids"].shape[1] if of_kind == "causal" else 1
                model.generation_config.max_new_tokens = max(1, min(max_new_tokens, positions - read))
                written = model.generate(**inputs, synced_gpus=not shares)[:, read:].tolist()
                texts = texts_of(tokenizer, written, kept)
            answers.update(zip(batch, texts, strict=True))
            bar.update(len(batch))
    finally:
        bar.close()
        model.train(mode)
        if own is not None:
            model.generation_config = own
    for others in of_all(answers) if shares else ():
        answers |= others
    return [answers[i] for i in range(len(sources))]


def begins(model: Any, tokenizer: Any) -> dict[str, int]:
    """Return the settings of a GenerationConfig by which a model begins as the targets that it has learnt from do."""
    if kind(model) != "seq2seq":
        return {}
    around = frame(tokenizer) or [tokenizer.eos_token_id]
    shifted = model.prepare_decoder_input_ids_from_labels(torch.tensor([around], device=model.device))
    start = {"decoder_start_token_id": int(shifted[0, 0])}  # of mBART a language's code, if it ends its targets
    return start if around[0] == tokenizer.eos_token_id else {**start, "forced_bos_token_id": around[0]}


def _classes(model: Any, found: torch.Tensor) -> list[str]:
    """Return the name of each likeliest class of logits [B, classes]; of a single output the number."""
    if found.shape[1] == 1:
        return [f"{number:.6g}" for number in found[:, 0].tolist()]
    return [model.config.id2label[i] for i in found.argmax(-1).tolist()]
