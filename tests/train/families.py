"""Tiny models of every family that fastkd-train knows, from configs of their own, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from fastkd.train.common.family import KINDS, family_of, is_enct5

VOCABULARY, WIDTH, HEADS = 96, 32, 4
_BERT = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 64}
_BART = {
    "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "scale_embedding": True,
}  # fmt: skip
_LLAMA = {**_BERT, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {"d_model": WIDTH, "d_kv": 8, "num_heads": HEADS, "d_ff": 64, "num_layers": 2, "decoder_start_token_id": 0}
# model_type -> the settings of a small one
SETTINGS: dict[str, dict[str, Any]] = {
    "t5": _T5,
    "mt5": {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "bart": _BART,
    "mbart": _BART,
    "marian": {**_BART, "decoder_start_token_id": 1},
    "pegasus": _BART,
    "bert": {**_BERT, "max_position_embeddings": 64},
    "roberta": {**_BERT, "max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1},
    "distilbert": {"dim": WIDTH, "n_layers": 2, "n_heads": HEADS, "hidden_dim": 64, "max_position_embeddings": 64},
    "gpt2": {"n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 1},
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mistral": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": {**_LLAMA, "final_logit_softcapping": 3.0},
    "gemma3_text": _LLAMA,
}
_NO_DROPOUT = ("dropout", "dropout_rate", "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout",
               "activation_dropout", "embd_pdrop", "attn_pdrop", "resid_pdrop", "classifier_dropout",
               "seq_classif_dropout")  # fmt: skip


def config(model_type: str, **changes: Any) -> Any:
    """The config of a tiny model of a type, without dropout; `changes` by the names of its own fields."""
    made = transformers.CONFIG_MAPPING[model_type](**{"vocab_size": VOCABULARY, **SETTINGS[model_type], **changes})
    for name in _NO_DROPOUT:
        if hasattr(made, name):
            setattr(made, name, 0.0)
    return made


def model(model_type: str, kind: str | None = None, seed: int = 0, **changes: Any) -> Any:
    """A tiny model of a type, by default of its family's first kind, with weights that are not too small to matter."""
    torch.manual_seed(seed)
    made_config = config(model_type, **changes)
    kind = kind or family_of(made_config).kinds[0]
    made = getattr(transformers, KINDS[kind].auto).from_config(made_config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 1:  # biases that start at 0 would be forgotten without a difference
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in name and "wte" not in name and "shared" not in name:
                parameter.mul_(3)
        if hasattr(made, "final_logits_bias"):
            made.final_logits_bias.normal_()
    return made


def batch(kind: str, seed: int = 0, rows: int = 3, length: int = 11, classes: int = 2) -> dict[str, torch.Tensor]:
    """A batch for a model of a kind, as the trainer's collators make them: padded on the right, two rows shorter."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, -3:] = 0
    made = {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}
    if kind == "classifier":
        return {**made, "labels": torch.randint(classes, (rows, 1), generator=generator)}
    if kind == "seq2seq":
        labels = torch.randint(5, VOCABULARY, (rows, length - 4), generator=generator)
        labels[0, -2:] = -100
        return {**made, "labels": labels}
    labels = ids.masked_fill(mask == 0, -100)
    if kind == "causal":  # a prompt is not learnt
        labels[:, :3] = -100
        return {**made, "labels": labels}
    is_masked = torch.rand(ids.shape, generator=generator) < 0.4
    is_masked[:, 1] = True
    return {**made, "labels": labels.masked_fill(~is_masked, -100)}


def is_classifier(made: Any) -> bool:
    """Whether a model tells classes apart."""
    return is_enct5(made.config) or type(made).__name__.endswith("ForSequenceClassification")
