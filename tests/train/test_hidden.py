"""Hidden-state matching: which states, which positions, students sliced from teachers, and the learned projection."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train_flags import RECIPE, with_inputs
from transformers import T5Config, T5ForConditionalGeneration, TrainerCallback

from fastkd.train import cli
from fastkd.train.models.student import is_tied, new_model, slice_teacher, smaller_config, t5_config
from fastkd.train.models.tokenizer import padded_size
from fastkd.train.objectives.methods import METHODS
from fastkd.train.objectives.terms import hidden_masks
from fastkd.train.training.forward import forward

VARIANTS = [(tied, proj) for tied in (True, False) for proj in ("relu", "gated-gelu")]


def assert_equal_weights(a: Any, b: Any) -> None:
    for name, p in a.named_parameters():
        assert torch.equal(p, b.get_parameter(name)), name


def variant(tied: bool, feed_forward: str, width: int = 64, layers: int = 4, seed: int = 1) -> Any:
    """A T5 v1.0 (tied, relu), a v1.1 (neither), or what is between them; every weight random, norms and biases too."""
    config = T5Config(
        vocab_size=96,
        d_model=width,
        d_kv=8,
        num_heads=width // 16,  # so heads * d_kv is not d_model
        d_ff=3 * width,
        num_layers=layers,
        num_decoder_layers=layers,
        feed_forward_proj=feed_forward,
        tie_word_embeddings=tied,
        dropout_rate=0.1,
        decoder_start_token_id=0,
    )
    model = new_model(config, seed, tied=tied).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def token_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randint(1, 96, (3, 7), generator=generator) for name in ("input_ids", "labels")}


def test_states_are_matched_by_depth() -> None:
    def pairs(student: tuple[int, int], teacher: tuple[int, int]) -> dict[str, list[tuple[int, int]]]:
        configs = (T5Config(num_layers=encoder, num_decoder_layers=decoder) for encoder, decoder in (student, teacher))
        return METHODS["hsm-cka"].matched_states(*configs)

    alternating = [(0, 0), (1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12)]
    assert pairs((6, 6), (12, 12)) == {"encoder": alternating, "decoder": alternating}
    assert pairs((2, 1), (3, 6)) == {"encoder": [(0, 0), (1, 2), (2, 3)], "decoder": [(0, 0), (1, 6)]}
    assert METHODS["hsm-kd"].matched_states(T5Config(), T5Config()) == {}
    base = T5Config(num_layers=12, num_decoder_layers=6)
    same = METHODS["minidisc"].matched_states(base, base)
    assert same == {"encoder": [(i, i) for i in range(0, 13, 2)], "decoder": [(i, i) for i in range(7)]}
    few = replace(METHODS["minidisc"], mse_states=2).matched_states(base, base)
    assert few == {"encoder": [(0, 0), (12, 12)], "decoder": [(0, 0), (6, 6)]}
    assert METHODS["prune-pkd"].matched_states(base, base) == {"encoder": [(12, 12)], "decoder": [(6, 6)]}
    both = replace(METHODS["hsm-cka"], terms={"hidden_cka": 1.0, "hidden_linear": 1.0})
    with pytest.raises(ValueError, match="at most one of hidden_cka, hidden_linear"):
        both.check_fits(T5Config(), T5Config())


def test_the_states_are_those_of_transformers_and_nothing_stays_behind(
    tiny: Callable[..., Any], make_trainer: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    student, batch = tiny(32, 1, layers=2), make_batch()
    trainer = make_trainer(student, "hsm-cka", teacher=tiny(64, 2, layers=4))
    assert trainer.of_teacher.states == {"encoder": [0, 2, 4], "decoder": [0, 2, 4]}
    output = student(**batch, output_hidden_states=True)
    states = forward(student, batch, trainer.of_student)["states"]
    assert len(states) == 6 and all(state.requires_grad for state in states)
    for found, expected in zip(states, output.encoder_hidden_states + output.decoder_hidden_states, strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(states[2], output.encoder_last_hidden_state)  # after the final layer norm

    hooks = sum(len(module._forward_hooks) for module in student.modules())
    with pytest.raises(IndexError):
        trainer.compute_loss(student, {**batch, "input_ids": batch["input_ids"] + 10_000})
    output = student(**batch)
    assert output.encoder_hidden_states is None and output.logits.shape[-1] == student.config.vocab_size
    assert sum(len(module._forward_hooks) for module in student.modules()) == hooks


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # but not in older transformers
def test_gradients_under_gradient_checkpointing(
    tiny: Callable[..., Any], make_trainer: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    gradients, batch = [], make_batch()
    for checkpointing in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        student = tiny(32, 1, layers=2).train()
        if checkpointing:
            student.gradient_checkpointing_enable(checkpointing)
        make_trainer(student, "hsm-linear", teacher=tiny(64, 2)).compute_loss(student, batch).backward()
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    for name, gradient in gradients[0].items():
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], gradient, msg=name)


def test_the_first_decoder_position_counts_only_if_asked_for() -> None:
    masks = {
        "encoder": torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]),
        "decoder": torch.tensor([[True, True, True], [True, False, False], [False, False, False]]),
    }
    for first in (False, True):
        found = hidden_masks(masks, first)
        assert torch.equal(found["encoder"], masks["encoder"].bool())
        # Position i reads target i - 1: the second text's is read at position 1.
        assert found["decoder"].tolist() == [[first, True, True], [first, True, False], [False, False, False]]


@pytest.mark.parametrize("method", ["hsm-cka", "hsm-linear"])
def test_masked_positions_do_not_count(
    method: str, tiny: Callable[..., Any], make_trainer: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    student, batch = tiny(32, 1), make_batch()
    torch.manual_seed(0)
    row = replace(METHODS[method], terms={METHODS[method].hidden_terms[0]: 1.0})
    trainer = make_trainer(student, row, teacher=tiny(64, 2))
    loss = trainer.compute_loss(student, batch).item()
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 7, batch["input_ids"])}
    assert trainer.compute_loss(student, other).item() == pytest.approx(loss, rel=1e-5)
    trainer.method = replace(row, match_first_position=True)
    assert trainer.compute_loss(student, batch).item() != pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(("tied", "feed_forward"), VARIANTS)
def test_a_slice_of_full_size_is_the_teacher(tied: bool, feed_forward: str) -> None:
    teacher, batch = variant(tied, feed_forward), token_batch()
    student = new_model(smaller_config(teacher.config, 64, 4), seed=5, tied=tied).eval()
    slice_teacher(student, teacher)
    with torch.no_grad():
        assert torch.equal(student(**batch).logits, teacher(**batch).logits)


@pytest.mark.parametrize(("tied", "feed_forward"), VARIANTS)
def test_a_slice_is_the_top_left_of_every_matrix_and_an_ordinary_folder(
    tied: bool, feed_forward: str, tmp_path: Path
) -> None:
    teacher = variant(tied, feed_forward)
    student = new_model(smaller_config(teacher.config, 32, 2), seed=5, tied=tied)
    slice_teacher(student, teacher)
    config = student.config
    assert (config.num_heads, config.d_kv, config.d_ff, config.dropout_rate) == (2, 8, 96, 0.0)
    assert is_tied(student) == tied and ("lm_head.weight" in dict(student.named_parameters())) != tied
    for stack in ("encoder", "decoder"):
        for mine, its in ((0, 0), (1, 2)):
            block, source = getattr(student, stack).block[mine].layer, getattr(teacher, stack).block[its].layer
            assert torch.equal(block[0].SelfAttention.q.weight, source[0].SelfAttention.q.weight[:16, :32])
            assert torch.equal(block[0].SelfAttention.o.weight, source[0].SelfAttention.o.weight[:32, :16])
            assert torch.equal(block[-1].layer_norm.weight, source[-1].layer_norm.weight[:32])
            for name, matrix in block[-1].DenseReluDense.named_parameters():
                expected = source[-1].DenseReluDense.get_parameter(name)
                assert torch.equal(matrix, expected[: matrix.shape[0], : matrix.shape[1]])
        bias = [getattr(model, stack).block[0].layer[0].SelfAttention for model in (student, teacher)]
        assert torch.equal(*(b.relative_attention_bias.weight[:, :2] for b in bias))
    assert torch.equal(student.shared.weight, teacher.shared.weight[:, :32])
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight[:, :32])

    student.save_pretrained(tmp_path)
    loaded, info = T5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = token_batch()
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).logits, student.eval()(**batch).logits)


def test_what_cannot_be_sliced_says_why() -> None:
    teacher = variant(True, "relu", width=32, layers=2)
    cases = [
        (variant(False, "relu", width=32, layers=2), "head tied to its embedding, .* got one of its own"),
        (variant(True, "gated-gelu", width=32, layers=2), "feed_forward_proj, 'relu'.*got 'gated-gelu'"),
        (variant(True, "relu", width=64, layers=2), r"shared.weight of at most \(96, 32\).*got \(96, 64\)"),
        (variant(True, "relu", width=32, layers=3), "at most 2 encoder layers, the teacher's, got 3"),
        (new_model(t5_config(97, 32, 1), 0), "vocab_size, 96,.*got 97"),
    ]
    for student, message in cases:
        with pytest.raises(ValueError, match=message):
            slice_teacher(student, teacher)
    for name, size in (("d_model", {"d_model": 48, "layers": 1}), ("layers", {"d_model": 16, "layers": 3})):
        with pytest.raises(ValueError, match=f"student_{name}: expected at most {32 if name == 'd_model' else 2}"):
            smaller_config(teacher.config, **size)


@pytest.mark.parametrize("method", ["hsm-cka", "hsm-linear"])
def test_training_lowers_every_term(method: str, tiny: Callable[..., Any], make_trainer: Callable[..., Any]) -> None:
    teacher = tiny(64, 2, layers=2)
    student = new_model(smaller_config(teacher.config, 32, 1), seed=1)
    slice_teacher(student, teacher)
    flags = ["--max_steps", "30", "--logging_steps", "5", "--learning_rate", "0.01", "--eval_strategy", "no"]
    trainer = make_trainer(student, method, flags, teacher=teacher, projection_learning_rate=0.01)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for term in ("loss_ce+logit_kl", f"loss_{METHODS[method].hidden_terms[0]}"):
        assert 0 < entries[-1][term] < 0.95 * entries[0][term], term
        assert sum(v for k, v in entries[0].items() if k.startswith("loss_")) == pytest.approx(entries[0]["loss"])


@pytest.mark.parametrize("method", ["hsm-cka", "hsm-linear"])
def test_accumulated_batches_weigh_as_one_large_batch(
    method: str, tiny: Callable[..., Any], make_trainer: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    student, batch = tiny(32, 1), make_batch(16)
    batch["labels"] = batch["labels"].clone().masked_fill(batch["labels"] == -100, 5)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    row = replace(METHODS[method], terms={METHODS[method].hidden_terms[0]: 1.0})
    trainer = make_trainer(student, row, teacher=tiny(64, 2))
    targets = (batch["labels"] != -100).sum()
    whole = trainer.compute_loss(student, batch, num_items_in_batch=targets).item()
    halves = [
        trainer.compute_loss(student, {k: v[i : i + 8] for k, v in batch.items()}, num_items_in_batch=targets).item()
        for i in (0, 8)
    ]
    # CKA is that of each micro-batch: of the same scale, and not the same number.
    assert sum(halves) == pytest.approx(whole, rel=1e-5 if method == "hsm-linear" else 0.2)
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert trainer.compute_loss(student, nothing, num_items_in_batch=torch.tensor(0)).item() == 0


class StopAt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= 5


def test_the_projection_is_trained_resumed_and_never_part_of_the_student(
    tiny: Callable[..., Any], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    def trainer(folder: str) -> Any:
        flags = [
            "--max_steps",
            "8",
            "--save_steps",
            "5",
            "--eval_strategy",
            "no",
            "--output_dir",
            str(tmp_path / folder),
        ]
        flags += ["--learning_rate", "0.001", "--lr_scheduler_type", "constant", "--warmup_steps", "0"]
        return make_trainer(tiny(32, 1), "hsm-linear", flags, teacher=tiny(64, 2), embedding_learning_rate=0.1)

    whole, first = trainer("whole"), trainer("parts")
    start = whole.projection.weight.detach().clone()
    assert torch.equal(start, first.projection.weight)  # it depends on the seed alone
    groups = whole.create_optimizer().param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == len(list(whole.model.parameters()))
    assert rates[id(whole.projection.weight)] == 1e-4 and rates[id(whole.model.shared.weight)] == 0.1
    whole.train()
    assert whole.projection is whole.model.hidden_projection
    assert 1e-5 < (whole.projection.weight - start).abs().max() < 8 * 1e-4 * 1.1  # 8 steps of about its rate

    first.add_callback(StopAt())
    first.train()
    checkpoint = tmp_path / "parts" / "checkpoint-5"
    second = trainer("parts")
    with torch.no_grad():
        second.projection.weight.zero_()
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.state.global_step == 8
    assert_equal_weights(second.model, whole.model)  # the projection among them
    moments = (t.optimizer.state[t.projection.weight]["exp_avg"] for t in (whole, second))
    assert torch.equal(*moments)

    second.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "hidden_projection.pt").exists()
    for folder in (checkpoint, tmp_path / "saved"):
        _, info = T5ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.long
def test_from_the_command_line(
    tmp_path: Path, text_file: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(method: str, *flags: object) -> int:
        small = ["--use_cpu", "--student_layers", 1, "--student_d_model", 32, "--sequence_length", 16]
        small += ["--teacher_layers", 2, "--teacher_d_model", 64, "--vocabulary_size", 512, "--teacher_steps", 4]
        small += ["--max_steps", 4, "--per_device_train_batch_size", 4, "--save_steps", 2, "--logging_steps", 1]
        small += ["--eval_steps", 0.2, *RECIPE]
        where = ["--train_file", text_file, "--method", method, "--output_dir", tmp_path / method]
        return cli.main(with_inputs(*small, *where, *flags))

    assert run("hsm-linear") == 0 and run("hsm-kd") == 0
    out = tmp_path / "hsm-linear"
    assert (out / "checkpoint-4" / "hidden_projection.pt").is_file() and not (out / "hidden_projection.pt").exists()
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["run"]["student_init"] == "slice" and "start" in capsys.readouterr().out
    assert metrics["run"]["matched_states"] == "encoder 0 to 0, 1 to 2; decoder 0 to 0, 1 to 2"
    student = T5ForConditionalGeneration.from_pretrained(out)
    assert metrics["models"][-1]["parameters"] == sum(p.numel() for p in student.parameters())
    arm = json.loads((tmp_path / "hsm-kd" / "metrics.json").read_text())
    # The arms differ in the hidden-state term alone: before the first step, everything else is the same.
    first = [m["models"][-1]["history"][0] for m in (metrics, arm)]
    assert first[0]["loss_ce+logit_kl"] == first[1]["loss"] == first[1]["loss_ce+logit_kl"]

    resume = ["--resume_from_checkpoint", "last", "--max_steps", 6]
    assert run("hsm-linear", *resume, "--student_init", "random") == 2
    assert "student_init None" in capsys.readouterr().err
    assert run("hsm-linear", *resume) == 0

    config = t5_config(padded_size(tokenizer), 64, 2)
    config.feed_forward_proj, config.is_gated_act, config.dense_act_fn = "gated-gelu", True, "gelu_new"
    config.scale_decoder_outputs = False
    for part in (new_model(config, seed=1, tied=False), tokenizer):  # as in T5 v1.1
        part.save_pretrained(tmp_path / "teacher")
    flags = ["--teacher", tmp_path / "teacher", "--divergence", "reverse_kl", "--match_first_position"]
    assert run("hsm-cka", "--demo", *flags) == 0
    assert "starts at random" in (tmp_path / "hsm-cka" / "report.md").read_text()
    for name in ("student", "scratch"):
        model = T5ForConditionalGeneration.from_pretrained(tmp_path / "hsm-cka" / name)
        assert not is_tied(model) and not model.config.scale_decoder_outputs and model.config.is_gated_act


def test_a_slice_of_a_16_bit_teacher_learns_in_32_bits() -> None:
    teacher = new_model(t5_config(512, 64, 2), 0).to(torch.bfloat16)
    teacher.config.dtype = torch.bfloat16  # as from_pretrained leaves it
    student = new_model(smaller_config(teacher.config, 32, 1), 0)
    slice_teacher(student, teacher)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert torch.equal(student.shared.weight, teacher.shared.weight[:, :32].float())
