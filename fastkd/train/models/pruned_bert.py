"""BERTs whose layers have widths of their own, which transformers' own classes cannot express.

Importing this module registers them with transformers' Auto classes, which then load their folders without remote code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)
from transformers.models.bert.modeling_bert import BertSelfAttention

from .anatomy import layers
from .architectures import resize


class PrunedBertConfig(BertConfig):
    """BERT's config and, as `widths`, the number of heads or neurons of each of `architectures.parts`, by name."""

    model_type = "fastkd_pruned_bert"
    widths: dict[str, int] | None = None


class PrunedBertAttention(BertSelfAttention):
    """BERT's attention, of which no head need be left; then it says nothing, and its layer goes on with a bias."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """Return (what the heads found [B, L, heads * width of a head], weights)."""
        if self.query.weight.shape[0]:  # which others than BERT narrow, see `minidisc.prune.narrowed`
            found: tuple[Tensor, Any] = super().forward(hidden_states, *args, **kwargs)
            return found
        return hidden_states.new_zeros(*hidden_states.shape[:-1], 0), None


def _prune(model: Any) -> None:
    """Give a BERT's layers the widths that its config says; without any it has BERT's own."""
    for layer in layers(model, "encoder"):
        own = layer.attention.self
        layer.attention.self = PrunedBertAttention(own.config, own.is_causal, own.layer_idx)
    inside = "" if model.base_model is not model else "bert."  # of the names of widths
    widths: Mapping[str, int] = model.config.widths or {}
    resize(model, {name.removeprefix(inside): width for name, width in widths.items()})
    model.post_init()


class PrunedBertModel(BertModel):
    """BERT without a head, whose layers have the widths that its config says."""

    config_class = PrunedBertConfig

    def __init__(self, config: PrunedBertConfig, add_pooling_layer: bool = True):
        super().__init__(config, add_pooling_layer)
        _prune(self)


class PrunedBertForMaskedLM(BertForMaskedLM):
    """BERT that fills masks in, whose layers have the widths that its config says."""

    config_class = PrunedBertConfig

    def __init__(self, config: PrunedBertConfig):
        super().__init__(config)
        _prune(self)


class PrunedBertForSequenceClassification(BertForSequenceClassification):
    """BERT that tells classes apart, whose layers have the widths that its config says."""

    config_class = PrunedBertConfig

    def __init__(self, config: PrunedBertConfig):
        super().__init__(config)
        _prune(self)


AutoConfig.register(PrunedBertConfig.model_type, PrunedBertConfig)
AutoModel.register(PrunedBertConfig, PrunedBertModel)
AutoModelForMaskedLM.register(PrunedBertConfig, PrunedBertForMaskedLM)
AutoModelForSequenceClassification.register(PrunedBertConfig, PrunedBertForSequenceClassification)
