"""What fastkd-train knows of models: FAMILIES says where a model keeps its parts, KINDS what it is for.

A new family is a row here, and one in tests/train/families.py, which runs every method on it.
Nothing heavy is imported: methods and flags are known without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Place:
    """One of the attentions that there are in all families.

    stack: whose layers have it. sides: whose positions queries, keys and values lie over, "encoder" or "decoder".
    causal: as the attention itself.
    """

    stack: str
    sides: tuple[str, str, str]
    causal: bool


STACKS = "encoder", "decoder"  # of which a family has one or both
PLACES: dict[str, Place] = {
    "decoder_self": Place("decoder", ("decoder", "decoder", "decoder"), True),
    "decoder_cross": Place("decoder", ("decoder", "encoder", "encoder"), False),
    "encoder_self": Place("encoder", ("encoder", "encoder", "encoder"), False),
}


@dataclass(frozen=True)
class Attention:
    """The projections of one attention, by their names within a layer.

    inner: those to queries, keys and values; one alone computes all three, side by side. outer: that of what the heads
    found.
    """

    inner: tuple[str, ...]
    outer: str


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward layer of a layer, by the names of its matrices: into the neurons, and out of them.

    Of `inner` a layer has some: one, or a gate beside it.
    """

    inner: tuple[str, ...]
    outer: str


@dataclass(frozen=True)
class Kind:
    """What a model is for, and how its states and labels lie.

    auto: the class of transformers that makes and loads such a model. corruption: the task that learns from texts
    alone, "" for none. answers: whether what it says of a text is text, and not a class.
    shifts_labels: whether the state of a position belongs to the label of the next one.
    """

    auto: str
    corruption: str
    answers: bool
    shifts_labels: bool = False


KINDS: dict[str, Kind] = {
    "seq2seq": Kind("AutoModelForSeq2SeqLM", "span_corruption", answers=True),
    "causal": Kind("AutoModelForCausalLM", "causal_lm", answers=True, shifts_labels=True),
    "masked": Kind("AutoModelForMaskedLM", "masked_lm", answers=False),
    "classifier": Kind("AutoModelForSequenceClassification", "", answers=False),
}


@dataclass(frozen=True)
class Family:
    """Where the models of a family keep their parts, by the names that transformers gives them.

    kinds: of KINDS, that of a model that does not tell first. stacks: of "encoder" and "decoder" the module, below
    `model.base_model`, whose output are its last hidden states, and the name of its list of layers. attentions: by
    their places. feed_forward: by stack.
    depths: the config's field for the number of layers of each stack. shrinks: those that shrink as the width does;
    heads: those of them that count heads. classifier: the head of a model that tells classes apart, "" for its output
    embedding. prunes: whether there are classes for what is left of its models when they are pruned.
    pads_positions: whether the first ones are those of padding.
    """

    name: str
    model_types: tuple[str, ...]
    kinds: tuple[str, ...]
    stacks: Mapping[str, tuple[str, str]]
    attentions: Mapping[str, Attention]
    feed_forward: Mapping[str, FeedForward]
    depths: Mapping[str, str]
    shrinks: tuple[str, ...]
    heads: tuple[str, ...]
    classifier: str = ""
    prunes: bool = False
    pads_positions: bool = False

    @property
    def has_both(self) -> bool:
        """Whether there is a decoder beside an encoder, with tokens of its own."""
        return len(self.stacks) == 2

    def positions(self, config: Any) -> int | None:
        """Return how many tokens a model has positions for, None if it needs none."""
        known: int | None = getattr(config, "max_position_embeddings", None)
        return known - config.pad_token_id - 1 if known and self.pads_positions else known


def _attention(module: str, inner: str, outer: str) -> Attention:
    return Attention(tuple(f"{module}.{name}" for name in inner.split()), outer)


_T5_NEURONS = "DenseReluDense.wi", "DenseReluDense.wi_0", "DenseReluDense.wi_1"


def _t5_neurons(layer: int) -> FeedForward:
    return FeedForward(tuple(f"layer.{layer}.{name}" for name in _T5_NEURONS), f"layer.{layer}.DenseReluDense.wo")


_T5 = Family(
    "T5",
    # v1.0, v1.1, Flan-T5 and ByT5 are all "t5"; the last is T5 pruned, see models/architectures.py.
    ("t5", "mt5", "umt5", "fastkd_pruned_t5"),
    ("seq2seq",),
    {"encoder": ("encoder", "block"), "decoder": ("decoder", "block")},
    {
        "decoder_self": _attention("layer.0.SelfAttention", "q k v", "layer.0.SelfAttention.o"),
        "decoder_cross": _attention("layer.1.EncDecAttention", "q k v", "layer.1.EncDecAttention.o"),
        "encoder_self": _attention("layer.0.SelfAttention", "q k v", "layer.0.SelfAttention.o"),
    },
    {"encoder": _t5_neurons(1), "decoder": _t5_neurons(2)},
    {"encoder": "num_layers", "decoder": "num_decoder_layers"},
    ("num_heads", "d_ff"),
    ("num_heads",),
    prunes=True,
)
_BART_SELF = _attention("self_attn", "q_proj k_proj v_proj", "self_attn.out_proj")
_BERT = Family(
    "BERT",
    ("bert", "fastkd_pruned_bert"),
    ("masked", "classifier"),
    {"encoder": ("encoder", "layer")},
    {"encoder_self": _attention("attention.self", "query key value", "attention.output.dense")},
    {"encoder": FeedForward(("intermediate.dense",), "output.dense")},
    {"encoder": "num_hidden_layers"},
    ("num_attention_heads", "intermediate_size"),
    ("num_attention_heads",),
    "classifier",
    prunes=True,
)

FAMILIES: tuple[Family, ...] = (
    _T5,
    replace(_T5, name="EncT5", model_types=("fastkd_enct5",), kinds=("classifier",)),
    Family(
        "BART",
        ("bart", "mbart", "marian", "pegasus"),
        ("seq2seq",),
        {"encoder": ("encoder", "layers"), "decoder": ("decoder", "layers")},
        {
            "decoder_self": _BART_SELF,
            "decoder_cross": _attention("encoder_attn", "q_proj k_proj v_proj", "encoder_attn.out_proj"),
            "encoder_self": _BART_SELF,
        },
        dict.fromkeys(STACKS, FeedForward(("fc1",), "fc2")),
        {"encoder": "encoder_layers", "decoder": "decoder_layers"},
        ("encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim"),
        ("encoder_attention_heads", "decoder_attention_heads"),
    ),
    _BERT,
    replace(
        _BERT,
        name="RoBERTa",
        model_types=("roberta",),
        classifier="classifier.out_proj",
        prunes=False,
        pads_positions=True,
    ),
    Family(
        "DistilBERT",
        ("distilbert",),
        ("masked", "classifier"),
        {"encoder": ("transformer", "layer")},
        {"encoder_self": _attention("attention", "q_lin k_lin v_lin", "attention.out_lin")},
        {"encoder": FeedForward(("ffn.lin1",), "ffn.lin2")},
        {"encoder": "n_layers"},
        ("n_heads", "hidden_dim"),
        ("n_heads",),
        "classifier",
    ),
    Family(
        "GPT-2",
        ("gpt2",),
        ("causal",),
        {"decoder": ("", "h")},
        {"decoder_self": _attention("attn", "c_attn", "attn.c_proj")},
        {"decoder": FeedForward(("mlp.c_fc",), "mlp.c_proj")},
        {"decoder": "n_layer"},
        ("n_head", "n_inner"),
        ("n_head",),
    ),
    Family(
        "Llama",
        ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text"),
        ("causal",),
        {"decoder": ("", "layers")},
        {"decoder_self": _attention("self_attn", "q_proj k_proj v_proj", "self_attn.o_proj")},
        {"decoder": FeedForward(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")},
        {"decoder": "num_hidden_layers"},
        ("num_attention_heads", "num_key_value_heads", "intermediate_size"),
        ("num_attention_heads", "num_key_value_heads"),
    ),
)
_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def family_of(config: Any) -> Family:
    """Return the row of a model's config; raises ValueError, naming the known families, if there is none."""
    given: Any = getattr(config, "model_type", None)
    try:
        return _BY_TYPE[given]
    except KeyError:
        known = "; ".join(f"{family.name} ({', '.join(family.model_types)})" for family in FAMILIES)
        raise ValueError(
            f"expected a model of one of {known}, got {given!r}; a new family is a row in "
            "fastkd/train/common/family.py; fastkd.hidden_states serves more, in the compute_loss of a Trainer of yours"
        ) from None


def kind_of(config: Any, architecture: str = "") -> str:
    """Return the name of the kind, in KINDS, of a config whose class is `architecture`, or the one that it says itself.

    That of a config that says none is its family's first.
    """
    family, names = family_of(config), [architecture] if architecture else config.architectures or [""]
    told = {"ForSequenceClassification": "classifier", "ForMaskedLM": "masked"}
    found = next((kind for ending, kind in told.items() if names[0].endswith(ending)), family.kinds[0])
    return found if found in family.kinds else family.kinds[0]


def has_types(config: Any) -> bool:
    """Return whether a model reads to which of two texts a token belongs."""
    return getattr(config, "type_vocab_size", 0) > 1


def is_enct5(config: Any) -> bool:
    """Return whether a config is that of `models.EncT5ForSequenceClassification`, whose decoder reads no text."""
    return bool(config.model_type == "fastkd_enct5")


def matched_layer(layer: int, student_layers: int, teacher_layers: int) -> int:
    """Return the teacher's layer that belongs to one of the student's: round(layer * L_T / L_S)."""
    return round(layer * teacher_layers / student_layers)
