"""T5s that transformers' own classes cannot express: with a width for every layer, and with a class for an answer.

Importing this module registers both with transformers' Auto classes, which then load their folders without remote code.
What is pruned of a model of any family, its `parts`, is here, too; BERTs of such parts are in pruned_bert.py.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    EncoderDecoderCache,
    T5Config,
    T5ForConditionalGeneration,
    T5PreTrainedModel,
)
from transformers.modeling_outputs import Seq2SeqSequenceClassifierOutput
from transformers.models.t5.modeling_t5 import T5Attention, T5Stack

from ..common.family import PLACES
from .anatomy import family, layers


class PrunedT5Config(T5Config):
    """T5's config and, as `widths`, the number of heads or neurons of each of the model's `parts`, by name."""

    model_type = "fastkd_pruned_t5"
    widths: dict[str, int] | None = None


class EncT5Config(PrunedT5Config):
    """The config of EncT5: PrunedT5's, with the classes as `id2label`; there is one decoder layer."""

    model_type = "fastkd_enct5"


class PrunedAttention(T5Attention):
    """T5's attention with a number of heads of its own, and with its own table of relative positions if it has one.

    T5 shares one table, that of a stack's first layer; here no layer need have the heads of another.
    """

    def __init__(self, config: Any, heads: int, has_bias: bool, layer_idx: int | None, is_causal: bool):
        narrower = copy.copy(config)
        narrower.num_heads = heads
        super().__init__(narrower, has_bias, layer_idx, is_causal)
        self.config = config  # which implementation of attention to take is said there, also later

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None, Any]:
        """Return (output [B, L, d_model], None, weights); without heads the output is zeros.

        position_bias, that of another layer, is ignored, and so that the next layer ignores this one's it is None. The
        cache is looked for by its class, as its name is another in every few versions of transformers.
        """
        if self.n_heads > 0:
            output, _, weights = super().forward(hidden_states, **{**kwargs, "position_bias": None})
            return output, None, weights
        cache: Any = next((value for value in kwargs.values() if isinstance(value, EncoderDecoderCache)), None)
        if cache is not None and kwargs.get("key_value_states") is None:
            # From the first layer's cache the decoder knows how far it has come.
            seen = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            cache.self_attention_cache.update(seen, seen, self.layer_idx)
        return torch.zeros_like(hidden_states), None, None


@dataclass(frozen=True)
class Part:
    """The heads of one attention, or the neurons of one feed-forward layer.

    name: of the module that holds all of its matrices. kind: "heads" or "neurons". units: how many there are. size:
    rows of a projection that belong to one, the width of a head or 1. inner: by their names in that module, the
    projections whose outputs are the units', so rows of their weights. outer: the one whose inputs they are, so columns
    of its weight.
    """

    name: str
    kind: str
    units: int
    size: int
    inner: tuple[str, ...]
    outer: str


def parts(model: Any) -> dict[str, Part]:
    """Return all parts of a model, by name."""
    row, config, found = family(model), model.config, {}
    base = "" if model.base_model is model else f"{model.base_model_prefix}."
    head = getattr(config, "d_kv", None) or config.hidden_size // config.num_attention_heads
    for stack, (path, listed) in row.stacks.items():
        places = [place for place in row.attentions if PLACES[place].stack == stack]
        kinds: list[tuple[str, int, Any]] = [("heads", head, row.attentions[place]) for place in places]
        kinds.append(("neurons", 1, row.feed_forward[stack]))
        for i, layer in enumerate(layers(model, stack)):
            own = {name for name, _ in layer.named_modules()}
            for kind, size, of in kinds:
                names = [*(name for name in of.inner if name in own), of.outer]
                shared, units = _shared(names), layer.get_submodule(of.outer).in_features // size
                *inner, outer = (name.removeprefix(shared).removeprefix(".") for name in names)
                where = f"{base}{path}.{listed}.{i}.{shared}".rstrip(".")
                found[where] = Part(where, kind, units, size, tuple(inner), outer)
    return found


def _shared(paths: Sequence[str]) -> str:
    """Return the module in which all of the paths begin, "" for that in which they are."""
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(names[0] for names in itertools.takewhile(lambda names: len({*names}) == 1, levels))


def resize(model: Any, widths: Mapping[str, int]) -> None:
    """Give every part a width of its own, by default that which it has; its weights are still to be set."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # of parts that are pruned away
        for name, part in parts(model).items():
            module, units = model.get_submodule(name), widths.get(name, part.units)
            if isinstance(module, T5Attention):
                has_bias = name.endswith("SelfAttention")  # cross-attention has none
                made = PrunedAttention(module.config, units, has_bias, module.layer_idx, module.is_causal)
                model.set_submodule(name, made)
                continue
            for inside, own in [(inside, module.get_submodule(inside)) for inside in (*part.inner, part.outer)]:
                width = units * part.size
                ins, outs = (width, own.out_features) if inside == part.outer else (own.in_features, width)
                module.set_submodule(inside, nn.Linear(ins, outs, bias=own.bias is not None))


class PrunedT5ForConditionalGeneration(T5ForConditionalGeneration):
    """T5 whose layers have the widths that its config says; without any it has T5's own."""

    config_class = PrunedT5Config

    def __init__(self, config: PrunedT5Config):
        super().__init__(config)
        resize(self, config.widths or {})
        self.post_init()


class EncT5ForSequenceClassification(T5PreTrainedModel):
    """EncT5 (Liu et al., 2021, arXiv 2110.08426): T5's encoder, one decoder layer that reads one prompt, a linear head.

    The prompt is learnt, and is the decoder's whole vocabulary. The head has no bias, as no layer of T5 has one. Layers
    have the widths that the config says, if it says any.
    """

    config_class = EncT5Config

    def __init__(self, config: EncT5Config):
        super().__init__(config)
        encoder, decoder = copy.deepcopy(config), copy.deepcopy(config)
        encoder.is_decoder = encoder.use_cache = decoder.use_cache = False
        decoder.is_decoder = True
        decoder.num_layers = decoder.vocab_size = 1
        self.encoder = T5Stack(encoder)
        self.decoder = T5Stack(decoder)
        self.classifier = nn.Linear(config.d_model, len(config.id2label or ()), bias=False)
        if config.widths is not None:
            resize(self, config.widths)
        self.post_init()

    def get_input_embeddings(self) -> Any:
        """Return the encoder's."""
        return self.encoder.embed_tokens

    def set_input_embeddings(self, new_embeddings: Any) -> None:
        """Set the encoder's."""
        self.encoder.embed_tokens = new_embeddings

    def get_output_embeddings(self) -> Any:
        """Return the head, whose "vocabulary" is the classes."""
        return self.classifier

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Return the prompt for each example, [B, 1]."""
        return labels.new_zeros(len(labels), 1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return logits [B, classes] and, with labels ([B] or [B, 1], -100 for none), the mean cross-entropy.

        input_ids, attention_mask [B, L]; inputs_embeds [B, L, d_model] in place of input_ids. decoder_input_ids and
        use_cache are not used: the decoder reads the prompt, once.
        """
        encoded = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        states = encoded.last_hidden_state
        decoded = self.decoder(
            input_ids=torch.zeros(len(states), 1, dtype=torch.long, device=states.device),
            encoder_hidden_states=states,
            encoder_attention_mask=attention_mask,
            use_cache=False,
            **kwargs,
        )
        logits = self.classifier(decoded.last_hidden_state[:, 0])
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels.flatten())
        return Seq2SeqSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            decoder_hidden_states=decoded.hidden_states,
            encoder_last_hidden_state=states,
            encoder_hidden_states=encoded.hidden_states,
        )

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        head: Any = getattr(self, "classifier", None)
        if head is not None and module is head:
            nn.init.normal_(head.weight, std=self.config.initializer_factor * self.config.d_model**-0.5)
        elif isinstance(module, T5Stack):
            embedding: Any = module.embed_tokens
            nn.init.normal_(embedding.weight, std=self.config.initializer_factor)


AutoConfig.register(PrunedT5Config.model_type, PrunedT5Config)
AutoConfig.register(EncT5Config.model_type, EncT5Config)
AutoModel.register(PrunedT5Config, PrunedT5ForConditionalGeneration)
AutoModel.register(EncT5Config, EncT5ForSequenceClassification)
AutoModelForSeq2SeqLM.register(PrunedT5Config, PrunedT5ForConditionalGeneration)
AutoModelForSequenceClassification.register(EncT5Config, EncT5ForSequenceClassification)


def enct5_config(config: Any, classes: Sequence[str]) -> EncT5Config:
    """Return the config of an EncT5 that has a T5's encoder, and tells apart the classes."""
    settings = config.to_dict()
    widths = settings.get("widths")  # of a pruned T5
    for name in ("model_type", "architectures", "widths", "id2label", "label2id"):
        settings.pop(name, None)
    if widths is not None:
        settings["widths"] = {k: v for k, v in widths.items() if k.startswith(("encoder.", "decoder.block.0."))}
    settings |= {"num_decoder_layers": 1, "id2label": dict(enumerate(classes))}
    return EncT5Config(**settings, label2id={name: i for i, name in enumerate(classes)})


@torch.no_grad()
def enct5_from(model: Any, classes: Sequence[str]) -> EncT5ForSequenceClassification:
    """Return an EncT5 that starts from a T5's encoder and first decoder layer, with a head of random weights.

    The prompt starts as the embedding of the token that T5's decoder starts from, which is an assumption.
    """
    made = EncT5ForSequenceClassification(enct5_config(model.config, classes)).to(model.device, model.dtype)
    sources = dict(model.named_parameters(remove_duplicate=False))
    start = getattr(model.config, "decoder_start_token_id", None) or 0
    for name, parameter in made.named_parameters():
        if name == "encoder.embed_tokens.weight":
            parameter.copy_(model.get_input_embeddings().weight)
        elif name == "decoder.embed_tokens.weight":
            parameter.copy_(model.get_input_embeddings().weight[start : start + 1])
        elif name in sources:
            parameter.copy_(sources[name])
    return made
