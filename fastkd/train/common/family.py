"""What all of fastkd-train knows of a T5: where its attentions are, and which layers of two models go together.

Nothing heavy is imported: methods and flags are known without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Place:
    """One of the three attentions of an encoder-decoder.

    stack, sublayer, module: where transformers keeps it, `<stack>.block[i].layer[sublayer].<module>`.
    sides: whose positions queries, keys and values lie over, "encoder" or "decoder". causal: as the attention itself.
    """

    stack: str
    sublayer: int
    module: str
    sides: tuple[str, str, str]
    causal: bool


def is_enct5(config: Any) -> bool:
    """Return whether a config is that of `models.EncT5ForSequenceClassification`, whose decoder reads no text."""
    return bool(config.model_type == "fastkd_enct5")


PLACES: dict[str, Place] = {
    "decoder_self": Place("decoder", 0, "SelfAttention", ("decoder", "decoder", "decoder"), True),
    "decoder_cross": Place("decoder", 1, "EncDecAttention", ("decoder", "encoder", "encoder"), False),
    "encoder_self": Place("encoder", 0, "SelfAttention", ("encoder", "encoder", "encoder"), False),
}


def matched_layer(layer: int, student_layers: int, teacher_layers: int) -> int:
    """Return the teacher's layer that belongs to one of the student's: round(layer * L_T / L_S)."""
    return round(layer * teacher_layers / student_layers)
