"""T5 models of a given size, and students sliced from their teacher."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch

from ...heads import gathered
from ..common.family import is_enct5, matched_layer

HEAD_WIDTH = 32


def t5_config(vocabulary_size: int, d_model: int, layers: int, pad: int = 0, eos: int = 1) -> Any:
    """Return the `T5Config` of a model `d_model` wide with `layers` encoder and as many decoder layers.

    There are d_model // 32 heads (at least 1), 32 wide each; the feed-forward layer is 4 times d_model wide. The head
    is tied and the decoder's output scaled, as in T5 v1.0: an untied head starts at standard deviation 1 in
    transformers, and a small model wastes hundreds of steps on a first loss far above ln V.
    No dropout, as in T5 v1.1's pre-training.
    """
    from transformers import T5Config

    start: dict[str, Any] = {"decoder_start_token_id": pad}  # not a declared field of T5Config
    return T5Config(
        vocab_size=vocabulary_size,
        d_model=d_model,
        d_kv=HEAD_WIDTH,
        num_heads=max(d_model // HEAD_WIDTH, 1),
        d_ff=4 * d_model,
        num_layers=layers,
        num_decoder_layers=layers,
        dropout_rate=0.0,
        pad_token_id=pad,
        eos_token_id=eos,
        **start,
    )


def new_model(config: Any, seed: int | None, tied: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model of the T5 family with random weights that depend on (config, seed, tied, dtype) alone.

    seed: None goes on with torch's generators. tied: whether the head is the embedding.
    """
    from transformers import set_seed

    from .anatomy import auto_class

    if seed is not None:
        set_seed(seed)
    model = auto_class(config).from_config(config, dtype=dtype)
    if is_enct5(config):
        return model  # nothing to tie, and nothing to generate
    if not tied:  # some versions of transformers tie every T5 made from a config, others start the head far too large
        head = torch.randn_like(model.shared.weight) * config.d_model**-0.5
        model.lm_head.weight = torch.nn.Parameter(head)
    model.generation_config.max_new_tokens = 64
    return model


def is_tied(model: Any) -> bool:
    """Return whether a T5's head is its embedding; in some versions of transformers its config does not tell."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def student_config(teacher: Any, d_model: int | None, layers: int | None) -> Any:
    """Return the `T5Config` of a new student, but for its vocabulary; see `t5_config`.

    d_model: without it the teacher's, with heads and feed-forward layers as the teacher has them. layers: without it
    half of the teacher's in each stack.
    """
    config = t5_config(2, d_model or teacher.d_model, layers or 1)
    if d_model is None:
        for name in ("d_kv", "num_heads", "d_ff", "feed_forward_proj", "is_gated_act", "dense_act_fn"):
            setattr(config, name, getattr(teacher, name))
    if layers is None:
        config.num_layers, config.num_decoder_layers = _half_as_deep(teacher)
    return config


def _half_as_deep(config: Any) -> tuple[int, int]:
    return max(config.num_layers // 2, 1), max(config.num_decoder_layers // 2, 1)


def smaller_config(config: Any, d_model: int | None, layers: int | None) -> Any:
    """Return a teacher's config, shrunk to a student `d_model` wide with `layers` encoder and as many decoder layers.

    Without d_model it stays as wide, and without layers it becomes half as deep.
    The number of heads and the width of the feed-forward layer shrink like d_model, rounded down; everything else
    stays, the width of a head included, but for the dropout, which is 0 as in `t5_config`.
    Raises ValueError, calling the sizes by their flags, if one is larger than the teacher's.
    """
    if getattr(config, "widths", None) is not None:
        raise ValueError("student_init: a pruned teacher, whose layers differ in width, cannot be sliced, give random")
    depth = config.num_layers if is_enct5(config) else min(config.num_layers, config.num_decoder_layers)
    encoder_layers, decoder_layers = (layers, layers) if layers else _half_as_deep(config)
    d_model, layers = d_model or config.d_model, layers or 1
    for name, given, largest in (("d_model", d_model, config.d_model), ("layers", layers, depth)):
        if given > largest:
            expected = f"at most {largest}, the teacher's, to be sliced from it"
            raise ValueError(f"student_{name}: expected {expected}, got {given} (--student_init random allows any)")
    smaller = copy.deepcopy(config)
    smaller.num_heads = max(config.num_heads * d_model // config.d_model, 1)
    smaller.d_ff = max(config.d_ff * d_model // config.d_model, 1)
    smaller.d_model, smaller.num_layers = d_model, encoder_layers
    smaller.num_decoder_layers = config.num_decoder_layers if is_enct5(config) else decoder_layers
    smaller.dropout_rate = 0.0
    return smaller


@torch.no_grad()
def slice_teacher(student: Any, teacher: Any) -> None:
    """Set every matrix of the student to the top-left part of the teacher's (HSM, Dasgupta and Cohn, 2025).

    Layer i of the student, from 0, comes from layer round(i * L_T / L_S) of the teacher, so the first, which holds the
    relative-position bias of its stack, from the first. Vectors, as those of layer norms, keep their first entries.
    Where both models' heads are equally wide, the top-left part of a projection is the teacher's first heads; where
    not, it cuts through them. A student of the teacher's own shape becomes its copy.
    Raises ValueError if the student is larger somewhere, or another variant of T5: another feed-forward layer, a head
    tied in one model only, another vocabulary or other buckets of relative positions.
    """
    if is_tied(student) != is_tied(teacher):
        kinds = {True: "tied to its embedding", False: "of its own"}
        its, mine = (kinds[is_tied(model)] for model in (teacher, student))
        raise ValueError(f"student: expected a head {its}, as the teacher's, to slice it, got one {mine}")
    for name in ("vocab_size", "feed_forward_proj", "relative_attention_num_buckets", "scale_decoder_outputs"):
        expected, given = (getattr(model.config, name, None) for model in (teacher, student))
        if given != expected:
            raise ValueError(f"student: expected the teacher's {name}, {expected!r}, to slice it, got {given!r}")
    sources = dict(teacher.named_parameters(remove_duplicate=False))
    for name, parameter in student.named_parameters():
        source = sources[_teacher_name(name, student, teacher)]
        if any(mine > its for mine, its in zip(parameter.shape, source.shape, strict=True)):
            most, got = tuple(source.shape), tuple(parameter.shape)
            raise ValueError(f"student: expected {name} of at most {most}, the teacher's shape, to slice it, got {got}")
        parameter.copy_(gathered(source)[tuple(map(slice, parameter.shape))])


def _teacher_name(name: str, student: Any, teacher: Any) -> str:
    """Return the name of the teacher's parameter that one of the student's is sliced from."""
    match = re.match(r"(encoder|decoder)\.block\.(\d+)\.(.*)", name)
    if match is None:
        return name
    stack, layer, rest = match.groups()
    depths = [len(getattr(model, stack).block) for model in (student, teacher)]
    if depths[0] > depths[1]:
        raise ValueError(f"student: expected at most {depths[1]} {stack} layers, the teacher's, got {depths[0]}")
    return f"{stack}.block.{matched_layer(int(layer), *depths)}.{rest}"
