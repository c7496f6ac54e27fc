"""What makes training faster or smaller changes neither losses nor updates nor the student's folder."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import T5ForConditionalGeneration, default_data_collator

from fastkd.train.common.family import PLACES
from fastkd.train.data.examples import Chunks
from fastkd.train.models.anatomy import projections
from fastkd.train.models.loading import load_model

NEVER = ["--save_strategy", "no", "--eval_strategy", "no"]


@pytest.fixture
def uneven(dataset: Chunks) -> Callable[..., dict[str, torch.Tensor]]:
    """uneven(examples): their batch, with another number of targets and of source tokens in every example."""

    def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = default_data_collator(examples)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        for i, example in enumerate(examples):
            labels, mask = batch["labels"][i], batch["attention_mask"][i]
            labels[len(labels) - int(example["input_ids"].sum()) % 5 :] = -100
            mask[len(mask) - int(example["labels"].sum()) % 13 :] = 0
        return batch

    return collate


# ---- Accumulation ----


@pytest.mark.parametrize("method", ["scratch", "minilm", "miniend-d", "miniend-e"])
def test_four_accumulated_batches_move_every_tensor_as_one_large_batch(
    method: str,
    tiny: Callable[..., Any],
    make_trainer: Callable[..., Any],
    uneven: Callable[..., Any],
) -> None:
    updates = []
    for batch, accumulation in (("16", "1"), ("4", "4")):
        student, teacher = tiny(32, 1, layers=2), tiny(64, 2)
        # Plain SGD: AdamW's first steps are sign(gradient) and would hide a wrong scale. At a rate so high, what a
        # weight rounds away of its update is far below the bound.
        flags = ["--max_steps", "1", "--optim", "sgd", "--learning_rate", "100", "--lr_scheduler_type", "constant"]
        flags += ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation]
        flags += ["--weight_decay", "0", "--max_grad_norm", "0", "--warmup_steps", "0", *NEVER]
        trainer = make_trainer(student, method, flags, teacher=teacher)
        trainer.data_collator = uneven
        before = {name: p.detach().clone() for name, p in student.named_parameters()}
        trainer.train()
        updates.append({name: p.detach() - before[name] for name, p in student.named_parameters()})
    moved = 0
    for name, large in updates[0].items():
        moved += bool(large.any())
        assert (updates[1][name] - large).norm() <= 1e-5 * large.norm(), name
    # Without a vocabulary term, what follows the last captured projections in the decoder's last layer learns nothing.
    assert len(updates[0]) - moved == (10 if method == "minilm" else 0)


# ---- Teachers in 16 bits ----


@pytest.mark.parametrize("method", ["kd", "miniend-e", "hsm-cka", "mixkd"])
def test_a_teacher_in_bfloat16_changes_the_loss_by_its_rounding_alone(
    method: str,
    tiny: Callable[..., Any],
    make_trainer: Callable[..., Any],
    make_batch: Callable[..., Any],
    saved: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = saved(tiny(64, 2, layers=2), tmp_path / "teacher")
    losses, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        teacher, student = load_model(folder, "teacher", dtype)[0], tiny(32, 1, layers=2)
        trainer = make_trainer(student, method, teacher=teacher)
        assert {p.dtype for p in trainer.teacher.parameters()} == {dtype}
        torch.manual_seed(0)  # what mixkd draws
        loss = trainer.compute_loss(student, make_batch())
        loss.backward()
        assert (
            {p.dtype for p in student.parameters()} == {p.grad.dtype for p in student.parameters()} == {torch.float32}
        )
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=2**-7)  # bfloat16 keeps 8 bits
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


def test_the_teachers_dtype_from_the_command_line(
    tool: Callable[..., int],
    tiny: Callable[..., Any],
    saved: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    trainers: list[Any],
) -> None:
    folder = saved(tiny(64, 2), tmp_path / "teacher")
    flags = ["--method", "kd", "--teacher", folder, "--train_file", text_file, "--output_dir", tmp_path / "run"]
    assert tool(*flags, "--teacher_dtype", "bfloat16") == 0
    assert trainers[-1].teacher.dtype == torch.bfloat16 and trainers[-1].model.dtype == torch.float32
    assert T5ForConditionalGeneration.from_pretrained(tmp_path / "run").dtype == torch.float32


# ---- What is kept alive ----

# Of a teacher of 4 layers: the places of its last layer, and the stacks of which the output of layer 2 is kept. A
# student of 2 layers is compared with states 0, 2 and 4, but 0 is made by no block, and 4 by the final layer norm.
ALIVE: dict[str, list[str]] = {
    "kd": [],
    "miniend-e": ["decoder_self", "encoder_self"],
    "miniend-d-nologit": ["decoder_self", "decoder_cross"],
    "hsm-cka": ["encoder", "decoder"],
}


@pytest.mark.parametrize("method", ALIVE)
def test_a_teacher_keeps_alive_what_the_terms_compare_and_nothing_else(
    method: str,
    tiny: Callable[..., Any],
    make_trainer: Callable[..., Any],
    make_batch: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher = tiny(64, 2, layers=4)
    trainer = make_trainer(tiny(32, 1, layers=2), method, teacher=teacher)
    made: dict[Any, weakref.ref[torch.Tensor]] = {}
    asked: list[dict[str, Any]] = []

    def keep(key: Any) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            made[key] = weakref.ref(output if isinstance(output, torch.Tensor) else output[0])

        return hook

    teacher.register_forward_pre_hook(lambda module, args, kwargs: asked.append(kwargs), with_kwargs=True)
    for layer in range(1, 5):
        for stack in ("encoder", "decoder"):
            getattr(teacher, stack).block[layer - 1].register_forward_hook(keep((stack, layer)))
        for place in PLACES:
            for name, projection in zip("qkv", projections(teacher, place, layer), strict=True):
                projection.register_forward_hook(keep((place, layer, name)))
    alive: set[Any] = set()
    terms = trainer._terms

    def look(*args: Any) -> Any:  # when the teacher has run and the loss has not
        gc.collect()
        alive.update(key for key, reference in made.items() if reference() is not None)
        return terms(*args)

    monkeypatch.setattr(trainer, "_terms", look)
    trainer.compute_loss(trainer.model, make_batch())
    assert len(made) == 8 + 4 * 9 and len(asked) == 1 and not asked[0].get("output_hidden_states")
    expected = {(place, 4, name) for place in ALIVE[method] if place in PLACES for name in "qkv"}
    assert alive == expected | {(stack, 2) for stack in ALIVE[method] if stack not in PLACES}


# ---- Compiled blocks, and blocks computed again in the backward pass ----


# In the last layers of miniend-e something is captured, so only the others are compiled.
@pytest.mark.parametrize(("method", "layers"), [("miniend-e", 2), ("hsm-linear", 1)])
@pytest.mark.long
def test_compiled_and_checkpointed_blocks_train_as_plain_ones(
    method: str, layers: int, tiny: Callable[..., Any], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    compiled = ["--torch_compile", "--torch_compile_backend", "aot_eager"]
    curves = {}
    for name, flags in (
        ("plain", []),
        ("compiled", compiled),
        ("checkpointed", ["--gradient_checkpointing"]),
        ("both", [*compiled, "--gradient_checkpointing"]),
    ):
        torch.compiler.reset()
        counters.clear()
        graphs: list[int] = []
        student = tiny(32, 1, layers=layers)
        flags = [*flags, "--max_steps", "4", "--logging_steps", "1", *NEVER]
        trainer = make_trainer(student, method, flags, teacher=tiny(64, 2, layers=layers))
        compute = trainer.compute_loss

        def spy(*args: Any, compute: Any = compute, graphs: list[int] = graphs, **kwargs: Any) -> Any:
            graphs.append(counters["stats"]["unique_graphs"])
            return compute(*args, **kwargs)

        trainer.compute_loss = spy
        trainer.train()
        graphs.append(counters["stats"]["unique_graphs"])
        is_checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in student.modules())
        assert is_checkpointed == ("--gradient_checkpointing" in flags)
        assert bool(graphs[1]) == ("--torch_compile" in flags), name
        assert len(set(graphs[1:])) == 1, graphs  # all batches have one shape
        curves[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer.save_model(str(tmp_path / name))
        loading: Any = T5ForConditionalGeneration.from_pretrained(tmp_path / name, output_loading_info=True)
        loaded, info = loading
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        for key, p in loaded.named_parameters():
            assert torch.equal(p, student.get_parameter(key)), key
    assert len(curves["plain"]) == 4 and all(map(math.isfinite, curves["plain"]))
    for name, losses in curves.items():
        assert losses == pytest.approx(curves["plain"], rel=1e-5), name


@pytest.mark.long
def test_compiled_blocks_stay_compiled_over_evaluations_and_lengths(
    tiny: Callable[..., Any], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    """Of a teacher and a student, which learns and is evaluated, as sizes change: nothing falls back to eager code."""
    torch.compiler.reset()
    flags = ["--torch_compile", "--torch_compile_backend", "eager", "--max_steps", "6", "--save_strategy", "no"]
    flags += ["--eval_steps", "2", "--per_device_eval_batch_size", "9"]  # the last of which is of 1 example
    trainer = make_trainer(tiny(32, 1, layers=2), "kd", flags, teacher=tiny(64, 2, layers=2))
    batches = 0

    def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        nonlocal batches
        batches += 1
        batch = default_data_collator(examples)
        ids, labels = batch["input_ids"][:, : 8 + batches % 5], batch["labels"][:, : 3 + batches % 7]
        return {"input_ids": ids, "labels": labels}

    trainer.data_collator = collate
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        trainer.train()
    assert batches > 24 and math.isfinite(trainer.state.log_history[-1]["train_loss"])
