"""A model's vocabulary head as the losses need it: what makes its logits of its last hidden states.

Models of transformers are known by their model_type, the adapters of PEFT by their classes, and neither is imported.
What is not known is an error: a head that is nearly right would train, and be wrong in silence.

V vocabulary, H hidden width.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .distributed import is_dtensor
from .quantized import QuantizedWeight, comes_from, quantized

__all__ = ["Head", "gathered", "head"]


class Head(NamedTuple):
    """What makes a model's logits: ``softcap * tanh((scale * hidden @ weight.T + bias) / softcap)``.

    ``fastkd.linear_kl`` takes one in place of a weight.

    Args:
        weight: [V, H], in the dtype of the hidden states; or a ``fastkd.QuantizedWeight``.
        bias: [V], or None.
        scale: multiplies the hidden states.
        softcap: what the logits approach, or None where nothing caps them.
    """

    weight: Tensor | QuantizedWeight
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


# How many rows vocabularies of one tokenizer may differ by, as padding: those that are filled up to a multiple of 128
# for each of 8 ranks stay below.
PADDING = 1024

# What follows the head, by model_type: nothing, but for the last four. Models of images and text are the last row but
# one of those with nothing: also where their text model alone would cap its logits. The last row are masked models,
# whose head here is what follows the layer with an activation and a norm.
MASKED = frozenset((
    "albert", "bert", "camembert", "distilbert", "electra", "fastkd_pruned_bert", "modernbert", "mpnet", "roberta",
    "xlm-roberta",
))  # fmt: skip
_NOTHING = frozenset((
    "gemma", "gpt2", "gpt_neo", "gpt_neox", "llama", "mistral", "mixtral", "mt5", "olmo", "olmo2", "phi", "phi3",
    "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2",
    "gemma3", "idefics3", "internvl", "llava", "llava_next", "llava_onevision", "mistral3", "paligemma", "qwen2_vl",
    "qwen2_5_vl", "qwen3_vl", "smolvlm",
    *MASKED,
))  # fmt: skip
SCALED_IF_TIED = frozenset(("fastkd_pruned_t5", "t5", "umt5"))
_BIASED = frozenset((
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
))  # fmt: skip
_SCALES = {"cohere": "logit_scale", "cohere2": "logit_scale"}
_DIVISORS = {"granite": "logits_scaling", "granitemoe": "logits_scaling"}
_CAPPED = frozenset(("gemma2", "gemma3_text"))
KNOWN = _NOTHING | SCALED_IF_TIED | _BIASED | _SCALES.keys() | _DIVISORS.keys() | _CAPPED

# ---- weights that are spread over ranks ------------------------------------------------------------------------------


def gathered(x: Tensor) -> Tensor:
    """A tensor of which each rank may hold a shard, whole; every rank of its mesh has to ask for it.

    Its gradient is averaged over the ranks, as FSDP averages those inside its modules: ranks have different data.
    """
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import Partial

    return x.full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)  # type: ignore[attr-defined]


def _is_managed_by_fsdp(model: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def _whole(x: Any, sharding: str | None, by_fsdp: bool) -> Any:
    """A parameter as linear_kl takes it, by what its shards are for."""
    if not is_dtensor(x):
        return x
    sharding = sharding or ("data" if by_fsdp else None)
    if sharding is None:
        raise ValueError(
            'sharding: expected "data" or "vocabulary", as the head is a DTensor and no FSDP module is seen, got None: '
            '"data" where ranks have different data (FSDP), "vocabulary" where they have the same (tensor parallelism)'
        )
    return gathered(x) if sharding == "data" else x


# ---- modules --------------------------------------------------------------------------------------------------------


class _Projection(NamedTuple):
    """A head alone, without what follows it."""

    weight: Any  # Tensor | QuantizedWeight
    bias: Tensor | None


def _projection(module: Any, sharding: str | None, by_fsdp: bool) -> _Projection:
    """A head's weight and bias, adapters included."""
    if comes_from(module, "peft"):
        return _adapted(module, sharding, by_fsdp)
    weight = quantized(module)
    if weight is not None:
        return _Projection(weight, _whole(module.bias, sharding, by_fsdp))
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise TypeError(
            f"model: expected a head that is a torch.nn.Linear, got {type(module).__name__}, whose forward may do "
            "more; fastkd.Head(weight, bias, scale, softcap) says what it does"
        )
    # Some versions of transformers keep a rank's rows as a plain tensor, and this name beside it alone tells.
    if getattr(module, "_hf_tp_plan", None) is not None and not is_dtensor(module.weight):
        raise ValueError(
            f"model: expected a head that is whole or a DTensor, got {len(module.weight)} rows of one that "
            "transformers has spread over ranks as a plain tensor; fastkd.Head(weight) and vocab_group take those"
        )
    weight, bias = (_whole(x, sharding, by_fsdp) for x in (module.weight, module.bias))
    return _Projection(weight, bias)


def _adapted(module: Any, sharding: str | None, by_fsdp: bool) -> _Projection:
    """A head with adapters of PEFT on it: LoRA, or a copy that is trained in its place (modules_to_save)."""
    name = type(module).__name__
    if name == "ModulesToSaveWrapper":
        active = [] if module.disable_adapters else [a for a in module.active_adapters if a in module.modules_to_save]
        if len(active) > 1:
            raise ValueError(f"model: expected one active adapter that replaces the head, got {active}")
        inner = module.modules_to_save[active[0]] if active else module.original_module
        return _projection(inner, sharding, by_fsdp)
    if not any(
        cls.__module__.startswith("peft.tuners.lora.") and "Linear" in cls.__name__ for cls in type(module).__mro__
    ):
        raise TypeError(
            f"model: expected LoRA or modules_to_save on the head, got {type(module).__module__}.{name}; merge the "
            "adapter"
        )
    base = _projection(module.base_layer, sharding, by_fsdp)
    if module.disable_adapters:
        if module.merged:
            raise ValueError("model: expected disabled adapters that are not merged into the head; unmerge them")
        return base
    if module.merged:
        return base
    weight, bias = base
    active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
    if active and isinstance(weight, QuantizedWeight):
        raise ValueError(f"model: expected a head without LoRA where it is quantised, got the adapters {active}")
    for adapter in active:
        variant = type(module.lora_variant.get(adapter)).__name__
        if adapter in module.lora_variant and (variant != "DoraLinearVariant" or len(active) > 1):
            raise ValueError(
                f"model: expected plain LoRA on the head, or DoRA of a single adapter, got {variant} of the adapter "
                f"{adapter!r} among {active}"
            )
        dropout = module.lora_dropout[adapter]
        if dropout.training and getattr(dropout, "p", 0.0) > 0:
            raise ValueError(
                f"model: expected lora_dropout of 0 on the head, as no weight stands for a dropout, got {dropout.p}; "
                "eval() turns it off"
            )
        down, up = (side[adapter] for side in (module.lora_A, module.lora_B))
        parts = [_whole(x, sharding, by_fsdp) for x in (up.weight, down.weight)]
        if any(is_dtensor(x) for x in (weight, *parts)):
            raise ValueError("model: expected a head without LoRA where the vocabulary is spread over ranks, got one")
        product = parts[0] @ parts[1] * module.scaling[adapter]
        whole = weight + (product.t() if module.fan_in_fan_out else product)
        if adapter in module.lora_variant:
            size = _whole(module.lora_magnitude_vector[adapter].weight, sharding, by_fsdp)
            # what each row is divided by is a constant, as of its authors (section 4.3, arXiv 2402.09353)
            whole = (size / whole.detach().norm(dim=1)).unsqueeze(1) * whole
        weight = whole.to(weight.dtype)
        if up.bias is not None:
            more = _whole(up.bias, sharding, by_fsdp) * module.scaling[adapter]
            bias = more.to(weight.dtype) if bias is None else (bias + more).to(bias.dtype)
    return _Projection(weight, bias)


# ---- models ---------------------------------------------------------------------------------------------------------


def unwrapped(model: Any) -> Any:
    """A model out of what DDP, torch.compile and PEFT put around it."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif comes_from(model, "peft") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def _with_what_follows(plain: Head, model: Any) -> Head:
    """A known model's head, with what goes before it and follows it."""
    config, kind = model.config, model.config.model_type
    if kind in SCALED_IF_TIED:
        scaled = getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)  # older versions ask for ties
        return plain._replace(scale=config.d_model**-0.5) if scaled else plain
    if kind in _BIASED and hasattr(model, "final_logits_bias"):
        bias = model.final_logits_bias.view(-1).to(plain.weight.dtype)
        return plain._replace(bias=bias if plain.bias is None else plain.bias + bias)
    if kind in _SCALES or kind in _DIVISORS:
        scale = getattr(config, _SCALES[kind]) if kind in _SCALES else 1 / getattr(config, _DIVISORS[kind])
        return plain._replace(scale=scale, bias=None if plain.bias is None else plain.bias * scale)
    return plain._replace(softcap=config.final_logit_softcapping) if kind in _CAPPED else plain


def known(model: Any) -> Any:
    """A model out of its wrappers; raises unless it is one whose forward pass does what its model_type says."""
    model = unwrapped(model)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    code = type(model).forward.__module__
    if kind in KNOWN and code.startswith("transformers.models."):
        return model
    why = f"model_type {kind!r}" if kind not in KNOWN else f"a forward pass of its own, in {code}"
    raise ValueError(
        f"model: expected a torch.nn.Linear or a model whose head is known ({', '.join(sorted(KNOWN))}), got "
        f"{type(model).__name__} with {why}: what follows its head may change its logits. Where nothing does, give "
        "model.get_output_embeddings(); else fastkd.Head(weight, bias, scale, softcap) says what does"
    )


def head_module(model: Any) -> Any:
    """The module that makes the logits of a model, out of its wrappers."""
    module = model.get_output_embeddings()
    if module is None:
        raise ValueError(f"model: expected a model with a vocabulary head, got {type(model).__name__}, which has none")
    return module


def head(model: nn.Module, *, sharding: Literal["data", "vocabulary"] | None = None) -> Head:
    """The vocabulary head of a model, with all that makes logits of its last hidden states.

    Call it in every step, as weights change, adapters are part of them, and shards are gathered.

    Args:
        model: a ``torch.nn.Linear``; or a model of transformers whose family is known: T5, BART and others with
            ``final_logits_bias``, GPT-2, Llama, Mistral, Qwen, Gemma (whose second and third cap their logits), Cohere
            and Granite (which scale theirs), BERT and other masked models, models of images and text such as Qwen-VL,
            LLaVA and Gemma 3, and more that have a head and nothing after it. DDP, ``torch.compile`` and
            PEFT may be around it. Of PEFT, LoRA on the head is part of the weight, ``weight + scaling * B @ A``,
            through which A and B get their gradients, DoRA likewise with its magnitudes, and a head among
            ``modules_to_save`` is the active one. A head that torchao or bitsandbytes has quantised becomes a
            ``fastkd.QuantizedWeight``: dequantised a block of rows at a time, and a constant.
        sharding: what the shards of a head that is a DTensor are for. "data": ranks have different data (FSDP); the
            head is gathered, by all ranks, and its gradient averaged over them. "vocabulary": ranks have the same data
            (tensor parallelism); the head stays as it is, for ``linear_kl`` to compute in shards. None: "data" where a
            module of ``model`` is FSDP's, else an error.

    Returns:
        A ``Head`` for the hidden states that ``fastkd.hidden_states`` gives: but for masked models the last of
        ``output_hidden_states=True``; for a ``torch.nn.Linear``, those that it is given.

    Raises:
        TypeError, ValueError: for what is not known, saying what it is: another family or a forward pass of its own, a
            head that is no ``torch.nn.Linear``, adapters other than LoRA and DoRA, LoRA on a quantised head,
            lora_dropout while training.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if sharding not in (None, "data", "vocabulary"):
        raise ValueError(f'sharding: expected None, "data" or "vocabulary", got {sharding!r}')
    bare = unwrapped(model)
    by_fsdp = _is_managed_by_fsdp(model)
    if isinstance(bare, nn.Linear) or comes_from(bare, "peft"):
        return Head(*_projection(bare, sharding, by_fsdp))
    plain = Head(*_projection(head_module(known(bare)), sharding, by_fsdp))
    return _with_what_follows(plain, bare)
