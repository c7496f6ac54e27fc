"""Models: loaded, sharded, sliced, captured on the way; and those that transformers' own classes cannot express.

Importing this registers the latter with transformers' Auto classes, which then load their folders without remote code.
"""

from .architectures import (
    EncT5Config,
    EncT5ForSequenceClassification,
    PrunedT5Config,
    PrunedT5ForConditionalGeneration,
)
from .pruned_bert import PrunedBertConfig, PrunedBertForMaskedLM, PrunedBertForSequenceClassification, PrunedBertModel

__all__ = [
    "EncT5Config",
    "EncT5ForSequenceClassification",
    "PrunedBertConfig",
    "PrunedBertForMaskedLM",
    "PrunedBertForSequenceClassification",
    "PrunedBertModel",
    "PrunedT5Config",
    "PrunedT5ForConditionalGeneration",
]
