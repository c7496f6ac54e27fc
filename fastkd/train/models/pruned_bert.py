"""BERTs whose layers have widths of their own, which transformers' own classes cannot express.

Importing this module registers them with transformers' Auto classes, which then load their folders without remote code.
"""

from __future__ import annotations

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
    BertPreTrainedModel,
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


class _Pruned(BertPreTrainedModel):
    """A BERT whose layers have the widths that its config says; without any they have BERT's own."""

    config_class = PrunedBertConfig

    def __init__(self, config: PrunedBertConfig, *args: Any, **options: Any):
        super().__init__(config, *args, **options)
        for layer in layers(self, "encoder"):
            own = layer.attention.self
            layer.attention.self = PrunedBertAttention(own.config, own.is_causal, own.layer_idx)
        inside = "bert." if self.base_model is self else ""  # of the names of widths
        resize(self, {name.removeprefix(inside): width for name, width in (config.widths or {}).items()})
        self.post_init()


class PrunedBertModel(_Pruned, BertModel):
    """BERT without a head, whose layers have the widths that its config says."""


class PrunedBertForMaskedLM(_Pruned, BertForMaskedLM):
    """BERT that fills masks in, whose layers have the widths that its config says."""


class PrunedBertForSequenceClassification(_Pruned, BertForSequenceClassification):
    """BERT that tells classes apart, whose layers have the widths that its config says."""


AutoConfig.register(PrunedBertConfig.model_type, PrunedBertConfig)
AutoModel.register(PrunedBertConfig, PrunedBertModel)
AutoModelForMaskedLM.register(PrunedBertConfig, PrunedBertForMaskedLM)
AutoModelForSequenceClassification.register(PrunedBertConfig, PrunedBertForSequenceClassification)
