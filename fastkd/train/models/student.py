"""Models of a given size, a T5 or as a teacher is, and students sliced from their teacher."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import T5Config, set_seed

from ...heads import gathered
from ..common.family import KINDS, family_of, kind_of, matched_layer
from .anatomy import auto_class, compared_stacks, family, layers, shape

HEAD_WIDTH = 32


def t5_config(vocabulary_size: int, d_model: int, layers: int, pad: int = 0, eos: int = 1) -> Any:
    """Return the `T5Config` of a model `d_model` wide with `layers` encoder and as many decoder layers.

    There are d_model // 32 heads (at least 1), 32 wide each; the feed-forward layer is 4 times d_model wide. The head
    is tied and the decoder's output scaled, as in T5 v1.0: an untied head starts at standard deviation 1 in
    transformers, and a small model wastes hundreds of steps on a first loss far above ln V.
    No dropout, as in T5 v1.1's pre-training.
    """
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
    """Return a model with random weights that depend on (config, seed, tied, dtype) alone.

    seed: None goes on with torch's generators. tied: whether a T5's head is its embedding; other configs tell.
    """
    if seed is not None:
        set_seed(seed)
    model = auto_class(config).from_config(config, dtype=dtype)
    if not tied and family_of(config).name == "T5":
        # Some versions of transformers tie every T5 made from a config, others start the head far too large.
        head = torch.randn_like(model.shared.weight) * config.d_model**-0.5
        model.lm_head.weight = torch.nn.Parameter(head)
    if KINDS[kind_of(config)].answers:
        model.generation_config.max_new_tokens = 64
    return model


@torch.no_grad()
def with_classes(model: Any, classes: Sequence[str], seed: int) -> Any:
    """Return a classifier whose config names no class yet with a head for these, of random weights."""
    config = copy.deepcopy(model.config)
    config.id2label, config.label2id = dict(enumerate(classes)), {name: i for i, name in enumerate(classes)}
    made, sources = new_model(config, seed, dtype=model.dtype), dict(model.named_parameters())
    for name, parameter in made.named_parameters():
        if sources[name].shape == parameter.shape:
            parameter.copy_(sources[name])
    return made


def is_tied(model: Any) -> bool:
    """Return whether a model's head is its embedding; in some versions of transformers a T5's config does not tell."""
    return getattr(model.get_output_embeddings(), "weight", None) is model.get_input_embeddings().weight


def student_config(teacher: Any, d_model: int | None, layers: int | None) -> Any:
    """Return the config of a new student, but for its vocabulary: a T5's, see `t5_config`, or as its teacher's.

    d_model: without it the teacher's, with heads and feed-forward layers as the teacher has them. layers: without it
    half of the teacher's in each stack.
    """
    if teacher is not None and not family_of(teacher).name.endswith("T5"):
        made = _resized(teacher, d_model, layers)
        if getattr(made, "widths", None) is not None:  # of a pruned one
            made.widths = None
        return made
    config = t5_config(2, d_model or teacher.d_model, layers or 1)
    if d_model is None:
        for name in ("d_kv", "num_heads", "d_ff", "feed_forward_proj", "is_gated_act", "dense_act_fn"):
            setattr(config, name, getattr(teacher, name))
    if layers is None:
        config.num_layers, config.num_decoder_layers = (max(n // 2, 1) for n in shape(teacher).depths.values())
    return config


def smaller_config(config: Any, d_model: int | None, layers: int | None) -> Any:
    """Return a teacher's config, shrunk to a student `d_model` wide with `layers` encoder and as many decoder layers.

    Without d_model it stays as wide, and without layers it becomes half as deep.
    The number of heads and the width of the feed-forward layer shrink like d_model, rounded down; everything else
    stays, the width of a head included, but for the dropout, which is 0 as in `t5_config`.
    Raises ValueError, calling the sizes by their flags, if one is larger than the teacher's.
    """
    if getattr(config, "widths", None) is not None:
        raise ValueError("student_init: a pruned teacher, whose layers differ in width, cannot be sliced, give random")
    depth = min(shape(config).depths[stack] for stack in compared_stacks(config))
    for name, given, largest in (("d_model", d_model, config.hidden_size), ("layers", layers, depth)):
        if given is not None and given > largest:
            expected = f"at most {largest}, the teacher's, to be sliced from it"
            raise ValueError(f"student_{name}: expected {expected}, got {given} (--student_init random allows any)")
    return _resized(config, d_model, layers)


def _resized(config: Any, d_model: int | None, layers: int | None) -> Any:
    """Return a config with other sizes, see `smaller_config`; raises ValueError if heads would not be as wide."""
    made, row, width = copy.deepcopy(config), family_of(config), config.hidden_size
    if d_model is not None:
        for name in row.shrinks:
            if (its := getattr(config, name)) is not None:
                setattr(made, name, max(its * d_model // width, 1))
        made.hidden_size = d_model
        if "num_key_value_heads" in row.heads or getattr(config, "head_dim", None) is None:  # where T5's may be any
            counts = [its for name in row.heads if (its := getattr(config, name)) > 1]
            step = math.lcm(*(width // math.gcd(width, its) for its in counts))
            if d_model % step:  # or another head of keys would serve a head of queries
                expected = f"a multiple of {step}, at which the teacher's heads and their groups stay as they are"
                raise ValueError(f"student_d_model: expected {expected}, got {d_model}")
    for stack in compared_stacks(config):
        its = shape(config).depths[stack]
        setattr(made, row.depths[stack], mine := layers or max(its // 2, 1))
        if kinds := getattr(config, "layer_types", None):  # sliding or full attention
            made.layer_types = [kinds[min(matched_layer(i, mine, its), its - 1)] for i in range(mine)]
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(made, name, 0.0)
    return made


@torch.no_grad()
def slice_teacher(student: Any, teacher: Any) -> None:
    """Set every matrix of the student to the top-left part of the teacher's (HSM, Dasgupta and Cohn, 2025).

    Layer i of the student, from 0, comes from layer round(i * L_T / L_S) of the teacher, so the first, which holds the
    relative-position bias of its stack, from the first. Vectors, as those of layer norms, keep their first entries.
    Where both models' heads are equally wide, the top-left part of a projection is the teacher's first heads; where
    not, it cuts through them. Of a projection to queries, keys and values at once it is that of each, and of queries
    that share a head of keys the first of each such group. What is not learnt, as sinusoids, stays the student's.
    A student of the teacher's own shape becomes its copy.
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
    sources = dict([*teacher.named_parameters(remove_duplicate=False), *teacher.named_buffers()])
    saved = student.state_dict().keys()
    for name, mine in (*student.named_parameters(), *student.named_buffers()):
        if name not in saved or (isinstance(mine, torch.nn.Parameter) and not mine.requires_grad):
            continue
        source = sources.get(_teacher_name(name, student, teacher))
        if source is None:
            raise ValueError(f"student: expected a model of the teacher's kind, to slice it, got one with {name}")
        whole, blocks = gathered(source), _blocks(name, student, teacher)
        for dim, size in enumerate(mine.shape):
            few, many = blocks.get(dim - mine.dim(), (1, 1))
            whole = whole.unflatten(dim, (many, -1))[(slice(None),) * dim + (slice(few), slice(size // few))]
            whole = whole.flatten(dim, dim + 1)
        if whole.shape != mine.shape:
            most, got = tuple(source.shape), tuple(mine.shape)
            raise ValueError(f"student: expected {name} of at most {most}, the teacher's shape, to slice it, got {got}")
        mine.copy_(whole)


def _blocks(name: str, student: Any, teacher: Any) -> dict[int, tuple[int, int]]:
    """Return of a parameter's dimensions, counted from the last, as how many blocks they lie side by side, if not one.

    The student's and the teacher's blocks: the first of these, each cut.
    """
    mine, its = (getattr(model.config, "num_key_value_heads", 1) for model in (student, teacher))
    for attention in family(student).attentions.values():
        module, _, kind = name.rpartition(".")
        if module.endswith(attention.inner) and len(attention.inner) == 1:
            return {-1: (3, 3)}
        if module.endswith(attention.inner[0]):
            return {-2 if kind == "weight" else -1: (mine, its)}
        if module.endswith(attention.outer) and kind == "weight":
            return {-1: (mine, its)}
    return {}


def _teacher_name(name: str, student: Any, teacher: Any) -> str:
    """Return the name of the teacher's parameter that one of the student's is sliced from."""
    match = re.match(r"(.*?)\.(\d+)\.(.*)", name)  # in all families that is the layer
    if match is None:
        return name
    before, layer, rest = match.groups()
    stacks = list(family(student).stacks)
    stack = next(name for name in stacks if name in before or len(stacks) == 1)
    depths = [len(layers(model, stack)) for model in (student, teacher)]
    if depths[0] > depths[1]:
        raise ValueError(f"student: expected at most {depths[1]} {stack} layers, the teacher's, got {depths[0]}")
    return f"{before}.{matched_layer(int(layer), *depths)}.{rest}"
