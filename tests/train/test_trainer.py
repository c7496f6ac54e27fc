"""What building on Seq2SeqTrainer must give: accumulation, resuming, evaluation, ordinary folders."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import (
    AutoTokenizer,
    Seq2SeqTrainingArguments,
    T5ForConditionalGeneration,
    TrainerCallback,
    default_data_collator,
)

import fastkd
from fastkd.train.common.errors import InputError, RunError, out_of_memory
from fastkd.train.data.examples import Chunks
from fastkd.train.judge.evaluate import token_scores
from fastkd.train.objectives.methods import METHODS
from fastkd.train.training.guards import check_arguments
from fastkd.train.training.optimizer import gradient_norms
from fastkd.train.training.trainer import DistillTrainer
from tests.cases import group_of_one


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal_weights(a: Any, b: Any) -> None:
    for name, p in a.named_parameters():
        assert torch.equal(p, b.get_parameter(name)), name


@pytest.mark.parametrize("method", ["kd", "miniend-e-nologit"])
def test_accumulated_batches_update_as_one_large_batch(
    method: str, tiny: Callable[..., Any], make_trainer: Callable[..., Any], dataset: Chunks
) -> None:
    def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = default_data_collator(examples)
        for row, example in zip(batch["labels"], examples, strict=True):  # uneven numbers of targets per example
            row[len(row) - int(example["input_ids"].sum()) % 5 :] = -100
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        for row, example in zip(batch["attention_mask"], examples, strict=True):
            row[len(row) - int(example["labels"].sum()) % 13 :] = 0
        return batch

    results, logs = [], []
    for batch, accumulation in (("16", "1"), ("4", "4")):
        student, teacher = tiny(32, 1, layers=2), tiny(64, 2)
        # Plain SGD: AdamW's first steps are sign(gradient) and would hide a wrong scale.
        flags = ["--max_steps", "2", "--optim", "sgd", "--learning_rate", "0.1", "--lr_scheduler_type", "constant"]
        flags += ["--logging_steps", "2"]
        flags += ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation]
        trainer = make_trainer(
            student, method, [*flags, "--max_grad_norm", "0", "--warmup_steps", "0"], teacher=teacher
        )
        trainer.data_collator = collate
        before = weights(student)
        trainer.train()
        results.append({name: p - before[name] for name, p in weights(student).items()})
        logs.append(trainer.state.log_history[0])
    for key, value in logs[0].items():
        if key.startswith(("loss", "grad_norm")):
            assert logs[1][key] == pytest.approx(value, rel=1e-4), key
    reached = sum(bool(large.any()) for large in results[0].values())
    # Without a vocabulary term, what follows the last captured projections in the decoder's last layer learns nothing.
    assert len(results[0]) - reached == (10 if "nologit" in method else 0)
    for name, large in results[0].items():
        torch.testing.assert_close(results[1][name], large, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", ["kd", "miniend-d", "miniend-e-nologit"])
def test_log_entries_hold_terms_that_add_up_and_gradient_norms_before_clipping(
    method: str, tiny: Callable[..., Any], make_trainer: Callable[..., Any], monkeypatch: Any
) -> None:
    norms: dict[str, list[float]] = {"encoder": [], "decoder": []}
    student = tiny(32, 1, layers=2)

    def measure(model: Any, max_norm: float) -> torch.Tensor:
        assert max_norm == 0.01
        for stack, values in norms.items():
            gradients = [
                p.grad.flatten()
                for name, p in model.named_parameters()
                if name.startswith(f"{stack}.") and p.grad is not None
            ]
            values.append(torch.cat(gradients).norm().item())
        return clip(model.parameters(), max_norm)

    clip = torch.nn.utils.clip_grad_norm_
    flags = [
        "--max_steps",
        "6",
        "--logging_steps",
        "3",
        "--max_grad_norm",
        "0.01",
        "--gradient_accumulation_steps",
        "2",
    ]
    trainer = make_trainer(student, method, [*flags, "--max_grad_norm", "0.01"], teacher=tiny(64, 2))
    monkeypatch.setattr(
        trainer.accelerator, "clip_grad_norm_", lambda parameters, max_norm: measure(trainer.model, max_norm)
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [3, 6]
    for i, entry in enumerate(entries):
        terms = {key: value for key, value in entry.items() if key.startswith("loss_")}
        expected = {"kd": "ce+logit_kl", "miniend-d": "logit_kl decoder_self decoder_cross"}
        names = expected.get(method, "decoder_self encoder_self").split()
        assert list(terms) == [f"loss_{name}" for name in names]
        assert sum(terms.values()) == pytest.approx(entry["loss"], rel=1e-5)
        for stack, values in norms.items():
            window = values[3 * i : 3 * i + 3]
            assert min(window) > 0.01
            assert entry[f"grad_norm_{stack}"] == pytest.approx(sum(window) / 3, rel=1e-5)
            assert entry[f"grad_norm_{stack}_max"] == pytest.approx(max(window), rel=1e-5)


def test_gradient_norms_of_scaled_losses(tiny: Callable[..., Any], make_batch: Callable[..., Any]) -> None:
    model, scaler = tiny(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    model(**make_batch()).loss.backward()
    expected = gradient_norms(model)
    model.zero_grad()
    scaler.scale(model(**make_batch()).loss).backward()
    for name, norm in gradient_norms(model, scaler).items():
        torch.testing.assert_close(norm, expected[name])


@pytest.mark.parametrize("method", ["kd", "minilm", "miniend-d-nologit", "miniend-e", "hsm-cka", "hsm-linear"])
def test_ddp_reduces_all_gradients(
    method: str,
    tiny: Callable[..., Any],
    make_trainer: Callable[..., Any],
    make_batch: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """DDP reduces nothing, and says nothing, while it waits for gradients that the loss does not have."""
    student, batch, reduced = tiny(32, 1, layers=2), make_batch(), []
    trainer = make_trainer(student, method, teacher=tiny(64, 2))

    def count_and_reduce(state, bucket):  # DDP refuses annotations that are strings
        reduced.append(bucket.buffer().numel())
        return allreduce_hook(torch.distributed.group.WORLD, bucket)

    def reduce_gradients() -> None:
        wrapped = torch.nn.parallel.DistributedDataParallel(student, find_unused_parameters=True)
        wrapped.register_comm_hook(None, count_and_reduce)
        trainer.compute_loss(wrapped, batch).backward()

    with group_of_one(tmp_path):
        reduce_gradients()
    assert sum(reduced) == sum(p.numel() for p in student.parameters())


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_an_interrupted_and_resumed_run_ends_bitwise_as_an_uninterrupted_one(
    tiny: Callable[..., Any], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    # 64 examples and batches of 8: an epoch has 8 steps, so the interruption is in the middle of the second one.
    flags = ["--max_steps", "20", "--save_steps", "11", "--eval_steps", "10"]

    def trainer(folder: str) -> Any:
        where = ["--output_dir", str(tmp_path / folder)]
        return make_trainer(
            tiny(32, 1), "miniend-e", [*flags, *where], teacher=tiny(64, 2), embedding_learning_rate=0.1
        )

    whole = trainer("whole")
    whole.train()
    first = trainer("parts")
    first.add_callback(StopAt(11))
    first.train()
    assert first.state.global_step == 11
    checkpoint = tmp_path / "parts" / "checkpoint-11"
    assert not any("teacher" in path.name for path in checkpoint.iterdir())
    assert sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) < 6 * whole.model.num_parameters()

    second = trainer("parts")
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.state.global_step == 20 and second._timer.steps == 9
    assert_equal_weights(second.model, whole.model)
    logged = [[e for e in t.state.log_history if "loss" in e] for t in (whole, second)]
    assert [e["step"] for e in logged[1]] == [e["step"] for e in logged[0]] == list(range(1, 21))
    assert all(a["loss_encoder_self"] == b["loss_encoder_self"] for a, b in zip(*logged, strict=True))
    with pytest.raises(AssertionError):
        assert_equal_weights(first.model, whole.model)


def test_the_teacher_stays_as_it_was(tiny: Callable[..., Any], make_trainer: Callable[..., Any]) -> None:
    teacher = tiny(64, 2)
    teacher.train()
    teacher.config.dropout_rate = 0.5
    before = weights(teacher)
    student = tiny(32, 1)
    first = weights(student)
    make_trainer(student, "mlmkd", teacher=teacher).train()
    assert not teacher.training
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in teacher.named_parameters())
    assert not torch.equal(student.shared.weight, first["shared.weight"])


def test_training_lowers_the_held_out_loss_and_evaluation_is_exact(
    tiny: Callable[..., Any], make_trainer: Callable[..., Any], dataset: Chunks
) -> None:
    student = tiny(32, 1)
    trainer = make_trainer(
        student, "scratch", ["--max_steps", "40", "--learning_rate", "0.03"], embedding_learning_rate=0.1
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 0.5
    assert trainer.trained["seconds_per_step"] > 0

    batch = default_data_collator([dataset[i] for i in range(len(dataset))])
    with torch.no_grad():
        logits = student(**batch).logits.flatten(0, 1)
    labels = batch["labels"].flatten()
    assert math.isclose(after["eval_loss"], F.cross_entropy(logits, labels).item(), rel_tol=1e-4)
    assert math.isclose(after["eval_token_accuracy"], (logits.argmax(-1) == labels).float().mean().item(), rel_tol=1e-6)


def test_token_scores_across_chunks_and_ignored_labels() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 500, 8), torch.randn(11, 8)
    labels = torch.randint(0, 11, (5, 500))
    labels[2, 100:] = -100
    scores = token_scores(hidden, fastkd.Head(weight), labels)
    logits = hidden @ weight.T
    nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(5, 500)
    torch.testing.assert_close(scores[..., 0], nats)
    assert torch.equal(scores[..., 1], (logits.argmax(-1) == labels).float())
    assert scores[2, 100:].abs().sum() == 0


def test_a_saved_student_is_an_ordinary_t5_folder(
    tiny: Callable[..., Any], make_trainer: Callable[..., Any], tmp_path: Path, dataset: Chunks
) -> None:
    student = tiny(32, 1)
    trainer = make_trainer(student, "kd", teacher=tiny(64, 2))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded, info = T5ForConditionalGeneration.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_equal_weights(student, loaded)
    assert loaded.lm_head.weight is loaded.shared.weight
    assert loaded.config.scale_decoder_outputs and loaded.config.tie_word_embeddings
    assert loaded.config.decoder_start_token_id == 0
    batch = default_data_collator([dataset[i] for i in range(4)])
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).logits, student.eval()(**batch).logits)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    generated = loaded.generate(**tokenizer("ta re <extra_id_0> mon", return_tensors="pt"))
    assert generated.shape[0] == 1 and 2 <= generated.shape[1] <= 65
    assert isinstance(tokenizer.decode(generated[0]), str)


def test_the_embedding_has_its_own_learning_rate(tiny: Callable[..., Any], make_trainer: Callable[..., Any]) -> None:
    model = tiny(32, 1)
    trainer = make_trainer(model, "scratch", ["--learning_rate", "0.5"], embedding_learning_rate=0.25)
    groups = trainer.create_optimizer().param_groups
    assert trainer.create_optimizer().param_groups is groups and len(groups) == 3  # asked twice, made once
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert {rates[id(p)] for name, p in model.named_parameters() if name != "shared.weight"} == {0.5}
    assert rates[id(model.shared.weight)] == 0.25
    assert groups[-1]["weight_decay"] == groups[0]["weight_decay"] == 0.01


def test_one_process_takes_one_gpu(
    arguments: Callable[..., Any], make_trainer: Callable[..., Any], tiny: Callable[..., Any]
) -> None:
    """Of several that it sees, as without torchrun; transformers alone would wrap the student in DataParallel."""
    args = arguments("--per_device_train_batch_size", "8")
    args._n_gpu = 2
    assert (args.n_gpu, args.train_batch_size, args.parallel_mode.value) == (1, 8, "not_parallel")
    plain = Seq2SeqTrainingArguments(output_dir=args.output_dir, use_cpu=True)
    plain._n_gpu = 2
    with pytest.raises(InputError, match=r"2 GPUs in one process: .*torchrun"):
        DistillTrainer(tiny(), plain, method=METHODS["scratch"])


def test_the_best_checkpoint_must_be_one_that_there_is(arguments: Callable[..., Any]) -> None:
    """A checkpoint every fourth step, the best figure in the second: transformers would load none, and say nothing."""
    flags = ["--load_best_model_at_end", "true", "--save_strategy", "steps", "--eval_strategy", "steps"]
    for save, evaluate in (("4", "4"), ("0.25", "0.25")):
        check_arguments(arguments(*flags, "--save_steps", save, "--eval_steps", evaluate))
    for save, evaluate in (("4", "2"), ("0.4", "0.2")):
        with pytest.raises(InputError, match=f"every {save} steps and evaluations every {evaluate} leave the best one"):
            check_arguments(arguments(*flags, "--save_steps", save, "--eval_steps", evaluate))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError("Unable to allocate 1.0 TiB for an array"),
        MemoryError(),
    ],
)
def test_out_of_memory_is_one_line_that_names_the_plan(
    error: Exception, make_trainer: Callable[..., Any], tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    trainer = make_trainer(tiny(), "scratch")
    monkeypatch.setattr(trainer, "compute_loss", full)
    with pytest.raises(RunError) as caught:
        trainer.train()
    said = str(caught.value)
    assert said.startswith(f"out of memory ({str(error) or 'MemoryError'})") and "\n" not in said
    for part in ("python -m fastkd.train.plan", "--per_device_train_batch_size", "no checkpoint was saved"):
        assert part in said


def test_other_errors_are_not_of_memory(make_trainer: Callable[..., Any], tiny: Callable[..., Any]) -> None:
    assert out_of_memory(RuntimeError("shapes cannot be multiplied")) is None
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)  # as torch says it itself
    assert "python -m fastkd.train.plan" in str(out_of_memory(caught.value))


def test_dropped_last_batches_leave_a_step(
    make_trainer: Callable[..., DistillTrainer], tiny: Callable[..., Any]
) -> None:
    """Of 64 examples a batch of 64 is one, and a batch of 65 none that anything could be learnt from."""
    flags = ["--dataloader_drop_last", "--per_device_train_batch_size"]
    make_trainer(tiny(), "scratch", [*flags, "64"])
    message = "--dataloader_drop_last drops all training examples: a batch takes 65 and there are 64"
    with pytest.raises(InputError, match=message):
        make_trainer(tiny(), "scratch", [*flags, "65"])


@pytest.mark.parametrize("batch", [48, 100])
def test_no_held_out_example_is_dropped(
    make_trainer: Callable[..., DistillTrainer], tiny: Callable[..., Any], batch: int
) -> None:
    flags = ["--per_device_eval_batch_size", str(batch)]
    whole, dropping = (make_trainer(tiny(), "scratch", [*flags, *more]) for more in ([], ["--dataloader_drop_last"]))
    assert len(dropping.get_eval_dataloader().dataset) == 64 and dropping.args.dataloader_drop_last
    assert dropping.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]
