"""The forward passes of student and teacher, and what the loss reads of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel

from ...heads import gathered
from ...quantized import comes_from
from ...states import head_input, used
from ..common.family import PLACES, has_types
from ..models.anatomy import family, head_module, head_of, layers, stack
from ..models.capture import capture_hidden, capture_qkv
from ..objectives.methods import Method
from ..objectives.mixup import Mixup
from ..teaching.cached import NUMBERS

# Of a batch. The decoder's tokens are made of the labels unless they are given.
READ = ("input_ids", "attention_mask", "token_type_ids", "labels", "decoder_input_ids", NUMBERS)

# All blocks are one function of transformers to torch's compiler, of which so many compilations may be kept, not just
# 8: for a teacher, a student that learns and one that is evaluated; for the first block of each stack, which makes T5's
# bias, and the others; for sizes (examples, source, target), which become dynamic one by one. A T5's run takes some 30.
_COMPILATIONS = 64


@dataclass(frozen=True)
class Needs:
    """What the loss reads of a model.

    layers: where it reads queries, keys and values, see `capture.capture_qkv`. states: which hidden states, see
    `capture.capture_hidden`. plain, mixed: whether what the head is given, for a batch as it is and for its mixed
    examples.
    """

    layers: Mapping[str, int] = field(default_factory=dict)
    states: Mapping[str, Sequence[int]] = field(default_factory=dict)
    plain: bool = True
    mixed: bool = False


def needs(method: Method, student: Any, teacher: Any) -> tuple[Needs, Needs]:
    """Return what a method reads of a student and of its teacher, by their configs."""
    pairs = method.matched_states(student, teacher)
    mine, its = ({stack: [pair[side] for pair in of] for stack, of in pairs.items()} for side in (0, 1))
    return (
        Needs(method.student_layers(student), mine, bool(method.vocabulary_terms), bool(method.mixup_terms)),
        Needs(method.teacher_layers(teacher), its, "logit_kl" in method.terms, "mixup_kd" in method.terms),
    )


def forward(model: Any, inputs: Mapping[str, Any], needs: Needs, mixup: Mixup | None = None) -> dict[str, Any]:
    """Run a model, which may be wrapped, on a batch, and return what is needed: [q, k, v] by the names of places.

    And "states", a list of hidden states of all stacks, projected if the model has a `hidden_projection`; and "hidden"
    and "mixed": what the head is given for the batch and for its mixed examples, [B, L, H], with the `fastkd.Head`. L
    is 1 for classes.
    """
    bare: Any = extract_model_from_parallel(model)
    names = ["hidden"] * needs.plain + ["mixed"] * needs.mixed
    project = getattr(bare, "hidden_projection", None) or torch.nn.Identity()
    given_to = head_module(bare)

    # DDP waits for the gradients of all parameters that the output depends on, so it must see what the loss is made of
    # and nothing else. FSDP gathers weights again before the gradients of what it sees: it has to see that first.
    def read(model: Any, inputs: Any, output: Any) -> dict[str, Any]:
        hidden = given[0] if given[0].dim() == 3 else given[0][:, None]
        return {
            **captured,
            # projected here, for DDP to see that the projection is used
            "states": [project(state) for of in states.values() for state in of],
            "given": dict(zip(names, hidden.chunk(max(len(names), 1)), strict=False)),
            "used": used(given_to) if names else [],
        }

    with (
        head_input(given_to) as given,
        capture_qkv(bare, needs.layers) as captured,
        capture_hidden(bare, needs.states) as states,
        bare.register_forward_hook(read, prepend=True),
    ):
        found = model(**_arguments(bare, inputs, needs, mixup))
    head, by_name = head_of(bare), found.pop("given")
    return {**found, **{name: (hidden, head) for name, hidden in by_name.items()}}


def _arguments(model: Any, inputs: Mapping[str, Any], needs: Needs, mixup: Mixup | None) -> dict[str, Any]:
    """Return the arguments of `model(...)` for what is needed of a batch: mixed examples come behind it.

    Labels stay out: the model would compute its own loss from them.
    """
    if lacking := [name for name in ("input_ids", "labels") if name not in inputs]:
        raise ValueError(f"data: expected {' and '.join(lacking)} in every batch, got {', '.join(inputs)}")
    ids = {"": inputs["input_ids"]}
    unread = [name for name in inputs if name not in READ and not name.endswith("_rows")]
    if unread:  # such as the position_ids of packed sequences, without which the states would be others
        raise ValueError(f"data: expected batches of {', '.join(READ)}, got {', '.join(unread)}, too; take them out")
    if family(model).has_both:
        made = inputs.get("decoder_input_ids")
        ids["decoder_"] = model.prepare_decoder_input_ids_from_labels(inputs["labels"]) if made is None else made
    names = ["attention_mask", *["token_type_ids"] * has_types(model.config)]  # a tokenizer may serve others too
    beside = {name: inputs.get(name) for name in names if name in inputs}
    beside |= {"use_cache": False} if "decoder" in family(model).stacks else {}
    if mixup is None or not needs.mixed:
        return {**{f"{side}input_ids": tokens for side, tokens in ids.items()}, **beside}
    embedding: Any = model.get_input_embeddings()
    if comes_from(embedding, "peft"):
        raise ValueError("mixup: expected a word embedding without adapters, as examples are mixed on its weight")
    weight = gathered(embedding.weight)

    def rows(states: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        return torch.cat([states, mixed]) if needs.plain else mixed

    for side, tokens in ids.items():
        # BART's embedding scales what it gives; Marian's encoder its tokens' alone, its decoder whatever it reads.
        scales = embedding, None if side else stack(model, next(iter(family(model).stacks)))
        scale = next((scale for x in scales if (scale := getattr(x, "embed_scale", None)) is not None), 1.0)
        embedded = torch.nn.functional.embedding(tokens, weight, embedding.padding_idx) * scale
        beside[f"{side}inputs_embeds"] = rows(embedded, mixup.mix(embedded))
    if (mask := beside.get("attention_mask")) is not None:
        beside["attention_mask"] = rows(mask, mixup.union(mask != 0).to(mask.dtype))
    if (types := beside.get("token_type_ids")) is not None:
        beside["token_type_ids"] = rows(types, types)  # as the first example of the pair has them
    return beside


@contextlib.contextmanager
def compiled_blocks(models: Sequence[tuple[Any, Needs]], args: Any) -> Iterator[None]:
    """Compile the blocks of models, or None, in place of the whole student, as accelerate would do.

    What is captured, and the head that `head_input` replaces, lie outside of compiled code: so nothing is compiled
    again when they come and go, and the blocks of a stack share their code. Blocks whose queries, keys and values are
    captured stay as they are. What generates or measures afterwards runs uncompiled.
    """
    with contextlib.ExitStack() as undo:
        undo.enter_context(torch._dynamo.config.patch(recompile_limit=_COMPILATIONS))
        for model, needs in models:
            captured = {(PLACES[place].stack, layer) for place, layer in needs.layers.items()}
            for stack in family(model).stacks if model is not None else ():
                for layer, block in enumerate(layers(model, stack), start=1):
                    if (stack, layer) not in captured:
                        options = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
                        block.forward = torch.compile(block.forward, **options)
                        undo.callback(delattr, block, "forward")
        yield
