"""DistillTrainer in place of transformers' Trainer: data and collators as users have them, losses as in plain torch."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from fastkd.integrations.transformers import METHODS, DistillTrainer
from fastkd.train.common.errors import RunError
from tests.cases import distance, furthest, installed
from tests.train import families

ROWS = torch.randint(3, families.VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()


def arguments(folder: Path, **more: Any) -> Any:
    quick = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1}
    quiet = {
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    }
    return transformers.TrainingArguments(str(folder), **{**quick, **quiet, **more})


def data(kind: str) -> tuple[list[dict[str, Any]], Any]:
    """Rows as users have them, of different lengths, and a collator as they write them."""
    rows: list[dict[str, Any]] = [{"input_ids": row[: 6 + i % 5]} for i, row in enumerate(ROWS)]
    if kind == "bert":
        rows = [{**row, "labels": [x if i % 3 == 0 else -100 for i, x in enumerate(row["input_ids"])]} for row in rows]
    else:
        rows = [{**row, "labels": list(row["input_ids"])} for row in rows]

    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(item["input_ids"]) for item in items)

        def padded(name: str, value: int) -> torch.Tensor:
            return torch.tensor([item[name] + [value] * (longest - len(item[name])) for item in items])

        ids = padded("input_ids", 0)
        mask = torch.tensor([[int(i < len(item["input_ids"])) for i in range(longest)] for item in items])
        return {"input_ids": ids, "attention_mask": mask, "labels": padded("labels", -100)}

    return rows, collate


def plain_loss(student: Any, teacher: Any, batch: dict[str, torch.Tensor], columns: int) -> torch.Tensor:
    """0.5 ce + 0.5 KL of logits, as one writes them."""
    q, labels = student(**batch).logits, batch["labels"]
    with torch.no_grad():
        p = teacher(**batch).logits
    if not student.config.is_encoder_decoder and student.can_generate():
        q, p, labels = q[:, :-1], p[:, :-1], labels[:, 1:]
    valid = labels != -100
    q, p, labels = q[valid].double(), p[valid].double(), labels[valid]
    kl = F.kl_div(q[:, :columns].log_softmax(-1), p[:, :columns].log_softmax(-1), log_target=True, reduction="none")
    return 0.5 * F.cross_entropy(q, labels) + 0.5 * kl.sum(-1).mean()


def with_lora(model: Any, *targets: str, **more: Any) -> Any:
    peft = pytest.importorskip("peft")
    targets = targets or ("q_proj", "v_proj", "lm_head")
    made = peft.get_peft_model(model, peft.LoraConfig(target_modules=[*targets], **more))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return made


CASES = ("qwen2", "gpt2", "t5", "bart", "bert", "qwen2-padded", "qwen2-lora", "qwen2-checkpointed")


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_plain_torch(case: str, tmp_path: Path) -> None:
    kind, _, how = case.partition("-")
    student = families.model(kind, tie_word_embeddings=how != "lora")
    teacher = families.model(kind, seed=1, vocab_size=families.VOCABULARY + (32 if how == "padded" else 0))
    student = with_lora(student) if how == "lora" else student
    rows, collate = data(kind)
    args = arguments(tmp_path, activation_checkpointing=True) if how == "checkpointed" else arguments(tmp_path)
    terms = {"ce": 0.5, "logit_kl": 0.5}
    trainer = DistillTrainer(student, args, collate, rows, rows[:4], teacher=teacher, method=terms)
    batch = collate(rows[:3])
    student.eval()
    plain_loss(student, teacher, batch, families.VOCABULARY).backward()
    wanted = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    stock = plain_loss(student, teacher, batch, families.VOCABULARY).detach()
    student.zero_grad()
    loss = trainer.compute_loss(student, dict(batch))
    loss.backward()
    assert distance(loss.detach(), stock) <= 1e-5
    found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert furthest(found, wanted) <= 1e-5
    trainer.train()
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 3
    with torch.no_grad():
        assert plain_loss(student.eval(), teacher, batch, families.VOCABULARY) < stock
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model(str(tmp_path / "saved"))
    assert any((tmp_path / "saved").glob("*.safetensors"))


@pytest.mark.parametrize("how", ["plain", "lora"])
def test_under_bf16_no_further_from_fp64_than_plain_torch(how: str, tmp_path: Path) -> None:
    student = families.model("qwen2", tie_word_embeddings=how != "lora")
    student = with_lora(student) if how == "lora" else student
    teacher, (rows, collate) = families.model("qwen2", seed=1), data("qwen2")
    terms, args = {"ce": 0.5, "logit_kl": 0.5}, arguments(tmp_path, bf16=True)
    trainer = DistillTrainer(student, args, collate, rows, teacher=teacher, method=terms)
    student.eval()
    batch, losses, gradients = collate(rows), [], []
    exact = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    for model, loss_of in (
        (exact[0], lambda: plain_loss(*exact, batch, families.VOCABULARY)),
        (student, lambda: plain_loss(student, teacher, batch, families.VOCABULARY)),
        (student, lambda: trainer.compute_loss(student, dict(batch))),
    ):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=model is student):
            loss = loss_of()
        loss.backward()
        losses.append(loss.double().detach())
        gradients.append(torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None]))
    plain, ours = ([distance(x[i], x[0]) for x in (losses, gradients)] for i in (1, 2))
    assert 0 < ours[1] <= 1.1 * plain[1] and ours[0] <= plain[0] + 1e-3, (ours, plain)


@pytest.mark.skipif(not installed("peft"), reason="PEFT is not installed")
def test_gradient_norms_of_adapters_are_those_of_their_stack(tmp_path: Path) -> None:
    student = with_lora(families.model("qwen2", tie_word_embeddings=False), "q_proj", "v_proj")
    rows, collate = data("qwen2")
    args = arguments(tmp_path, max_steps=1)
    trainer = DistillTrainer(student, args, collate, rows, teacher=families.model("qwen2", seed=1), method="kd")
    trainer.train()
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["grad_norm_decoder"] == pytest.approx(entry["grad_norm"], rel=1e-5) and entry["grad_norm"] > 0


@pytest.mark.skipif(not installed("peft"), reason="PEFT is not installed")
def test_reentrant_checkpointing_takes_no_gradient_in_silence(tmp_path: Path) -> None:
    student = with_lora(families.model("qwen2", tie_word_embeddings=False))
    rows, collate = data("qwen2")
    method = dataclasses.replace(METHODS["mlmkd+minilm"], relation_heads=4)
    args = arguments(tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True})
    trainer = DistillTrainer(student, args, collate, rows, teacher=families.model("qwen2", seed=1), method=method)
    with pytest.raises(RuntimeError, match="set use_reentrant to False"):
        trainer.train()


@pytest.mark.parametrize("classes", [1, 3])
def test_classes_as_transformers_collators_leave_them(classes: int, tmp_path: Path) -> None:
    """One label a row, [B]: a class, or a number where there is one output."""
    models = [families.model("bert", "classifier", seed, num_labels=classes) for seed in (0, 1)]
    labels = [i / 4 if classes == 1 else i % classes for i in range(8)]
    rows = [{"input_ids": row[: 6 + i % 5], "label": labels[i]} for i, row in enumerate(ROWS)]
    collate = transformers.DataCollatorWithPadding(families.tokenizer("bert"))
    seen: list[Any] = []

    def figures(prediction: Any) -> dict[str, float]:
        seen.append((prediction.predictions, prediction.label_ids))
        return {"own": 7.0}

    terms = {"ce": 0.5, "logit_kl": 0.5}
    args = arguments(tmp_path, per_device_eval_batch_size=8)
    trainer = DistillTrainer(
        models[0], args, collate, rows, rows, teacher=models[1], method=terms, compute_metrics=figures
    )
    batch = collate(rows)
    assert batch["labels"].shape == (8,)
    with torch.no_grad():
        q, p = (model.eval()(**batch) for model in models)
        if classes == 1:
            apart = F.mse_loss(q.logits, p.logits)
        else:
            p_log, q_log = p.logits.log_softmax(-1), q.logits.log_softmax(-1)
            apart = F.kl_div(q_log, p_log, log_target=True, reduction="batchmean")
        assert distance(trainer.compute_loss(models[0], dict(batch)), 0.5 * q.loss + 0.5 * apart) <= 1e-5
    found = trainer.evaluate()
    assert found["eval_own"] == 7.0 and found["eval_loss"] == pytest.approx(q.loss.item(), rel=1e-5)
    assert distance(torch.from_numpy(seen[0][0]), q.logits) <= 1e-5
    assert seen[0][1].tolist() == batch["labels"].tolist()
    trainer.train()


@pytest.mark.parametrize("kind", ["qwen2", "t5"])
def test_predictions_are_logits_as_transformers_gives_them(kind: str, tmp_path: Path) -> None:
    models, (rows, collate) = [families.model(kind, seed=seed) for seed in (0, 1)], data(kind)
    args = arguments(tmp_path, per_device_eval_batch_size=8)
    trainer = DistillTrainer(models[0], args, collate, rows, rows, teacher=models[1], method="kd")
    found = trainer.predict(rows)
    with torch.no_grad():
        wanted = models[0].eval()(**collate(rows))
    assert distance(torch.from_numpy(found.predictions), wanted.logits) <= 1e-5
    assert found.label_ids.tolist() == collate(rows)["labels"].tolist()
    assert found.metrics["test_loss"] == pytest.approx(wanted.loss.item(), rel=1e-5)
    assert {"eval_loss", "eval_token_accuracy"} <= trainer.evaluate().keys()


def test_tokens_of_the_decoder_that_a_batch_has(tmp_path: Path) -> None:
    """transformers' collator makes those of the labels; others are not made anew."""
    models, (rows, collate) = [families.model("t5", seed=seed) for seed in (0, 1)], data("t5")
    terms = {"ce": 0.5, "logit_kl": 0.5}
    trainer = DistillTrainer(models[0], arguments(tmp_path), collate, rows, teacher=models[1], method=terms)
    batch = transformers.DataCollatorForSeq2Seq(families.tokenizer("t5"), model=models[0])(rows[:3])
    with torch.no_grad():
        made = trainer.compute_loss(models[0].eval(), dict(batch))
        assert distance(made, trainer.compute_loss(models[0], collate(rows[:3]))) <= 1e-6
        batch["decoder_input_ids"] = batch["decoder_input_ids"].flip(1)
        wanted = plain_loss(models[0], models[1], batch, families.VOCABULARY)
        assert distance(trainer.compute_loss(models[0], dict(batch)), wanted) <= 1e-5 < distance(made, wanted)


def test_a_method_by_its_name(tmp_path: Path) -> None:
    rows, collate = data("qwen2")
    models = families.model("qwen2"), families.model("qwen2", seed=1)
    trainer = DistillTrainer(models[0], arguments(tmp_path), collate, rows, teacher=models[1], method="kd")
    assert trainer.method == METHODS["kd"]
    with pytest.raises(ValueError, match=r"method: expected scratch, .*, got 'kdd'"):
        DistillTrainer(models[0], arguments(tmp_path), collate, rows, teacher=models[1], method="kdd")
    with pytest.raises(ValueError, match=r"method: expected ce, logit_kl, .*, got 'kl'"):
        DistillTrainer(models[0], arguments(tmp_path), collate, rows, teacher=models[1], method={"kl": 1.0})
    with pytest.raises(ValueError, match=r"method\['ce'\]: expected a number > 0, got 0.0"):
        DistillTrainer(models[0], arguments(tmp_path), collate, rows, teacher=models[1], method={"ce": 0.0})


def test_what_is_not_served_is_refused(tmp_path: Path) -> None:
    rows, collate = data("gpt2")
    student, teacher = families.model("gpt2"), families.model("gpt2", seed=1)

    def made(model: Any = student, teacher: Any = teacher, more: Any = None, **args: Any) -> Any:
        given = {"teacher": teacher, "method": "kd", **(more or {})}
        return DistillTrainer(model, arguments(tmp_path, **args), collate, rows, **given)

    with pytest.raises(ValueError, match=r"label_smoothing_factor: expected none, got 0.1: .* leave it out"):
        made(label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="use_liger_kernel: expected none, got True: no logits are made without it"):
        made(use_liger_kernel=True)
    with pytest.raises(ValueError, match=r"batch_eval_metrics: expected none, got True: .* give compute_metrics"):
        made(batch_eval_metrics=True)
    with pytest.raises(ValueError, match="eval_do_concat_batches: expected True, got False"):
        made(eval_do_concat_batches=False)
    args: Any = arguments(tmp_path)
    for name, remedy in (
        ("deepspeed_plugin", "fsdp"),
        ("parallelism_config", "fsdp"),
        ("predict_with_generate", "score"),
    ):
        setattr(args, name, "set")
        with pytest.raises(ValueError, match=f"{name}: expected none, got 'set': .*{remedy}"):
            DistillTrainer(student, args, collate, rows, teacher=teacher, method="kd")
        setattr(args, name, None)
    with pytest.raises(ValueError, match=r"compute_loss_func: expected none, got .* fastkd.hidden_states in its own"):
        made(more={"compute_loss_func": lambda *args, **kwargs: None})
    with pytest.raises(ValueError, match=r"preprocess_logits_for_metrics: expected none, got .* give compute_metrics"):
        made(more={"preprocess_logits_for_metrics": lambda logits, labels: logits})
    with pytest.raises(ValueError, match=r"model: expected the student, got None; .* no model_init"):
        made(None, more={"model_init": lambda: student})
    with pytest.raises(ValueError, match=r"mixup: expected a word embedding without adapters"):
        mixed = with_lora(families.model("qwen2"), "embed_tokens")
        made(mixed, families.model("qwen2"), {"method": "mixkd"}).compute_loss(mixed, collate(rows[:2]))
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    other = transformers.AutoModelForCausalLM.from_config(transformers.GPTNeoXConfig(vocab_size=96, **settings))
    with pytest.raises(ValueError, match=r"expected a model of one of T5 .*, got 'gpt_neox'; .* fastkd.hidden_states"):
        made(other)
    with pytest.raises(ValueError, match=r"expected a model of one of T5 .*, got None"):
        made(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="data: expected labels in every batch, got input_ids, attention_mask"):
        made().compute_loss(student, {name: x for name, x in collate(rows[:2]).items() if name != "labels"})
    with pytest.raises(ValueError, match=r"data: expected batches of input_ids, .*, got position_ids, too"):
        made().compute_loss(student, {**collate(rows[:2]), "position_ids": torch.arange(7)[None]})


def test_a_training_in_which_nothing_is_learnt_does_not_end_well(tmp_path: Path) -> None:
    rows, collate = data("gpt2")

    def train(rows: Any = rows, method: Any = "kd", model: Any = None) -> None:
        student = families.model("gpt2") if model is None else model
        teacher = None if isinstance(method, dict) else families.model("gpt2", seed=1)
        DistillTrainer(student, arguments(tmp_path), collate, rows, teacher=teacher, method=method).train()

    with pytest.raises(RunError, match="every gradient of this training was 0; look for labels that are all -100"):
        train([{**row, "labels": [-100] * len(row["input_ids"])} for row in rows])
    with pytest.raises(ValueError, match="model: expected weights that learn, got a student that is frozen"):
        train(model=families.model("gpt2").requires_grad_(False))
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    classes = transformers.Qwen2ForSequenceClassification(transformers.Qwen2Config(vocab_size=96, **settings))
    with pytest.raises(ValueError, match="expected a model with a vocabulary head, got Qwen2ForSequenceClassification"):
        train(model=classes, method={"ce": 1.0})


def test_teachers_that_cannot_be_frozen_or_placed(tmp_path: Path) -> None:
    rows, collate = data("gpt2")
    student, teacher = families.model("gpt2"), families.model("gpt2", seed=1)

    def refused(teacher: Any, message: str, model: Any = student) -> None:
        with pytest.raises(ValueError, match=message):
            DistillTrainer(model, arguments(tmp_path), collate, rows, teacher=teacher, method="kd")

    refused(None, r"teacher: this method .* needs one, got None")
    larger = families.model("gpt2", vocab_size=families.model("gpt2").config.vocab_size + 1025)
    refused(larger, r"teacher: expected the student's vocabulary, \d+ but for padding up to 1024, got \d+")
    refused("gpt2", "teacher: expected a model, as from_pretrained loads one, got 'gpt2'")
    refused(torch.nn.Linear(2, 2), r"expected a model of one of T5 .*, got None")
    refused(families.model("bert"), "teacher: expected a causal model, as the student is, got Bert.*, which is masked")
    refused(student, r"teacher: expected weights of its own, .* load it once more")
    teacher.hf_device_map = {"transformer": 0, "lm_head": "cpu"}
    refused(teacher, r"teacher: expected one device, got 0, cpu; load it without device_map, and let fsdp")
    student.hf_device_map, teacher.hf_device_map = teacher.hf_device_map, {"": "cpu"}
    refused(teacher, "model: expected one device, got 0, cpu")
    assert all(weight.requires_grad for weight in student.parameters())
    if installed("peft"):
        base = families.model("qwen2", tie_word_embeddings=False)
        refused(base, r"teacher: expected weights of its own, .*PEFT puts adapters into", with_lora(base))


@pytest.mark.skipif(not installed("peft"), reason="PEFT is not installed")
@pytest.mark.parametrize("whole_head", [False, True])
def test_adapters_are_saved_and_loaded(whole_head: bool, tmp_path: Path) -> None:
    import peft

    rows, collate = data("qwen2")
    how = (("q_proj", "v_proj"), {"modules_to_save": ["lm_head"]}) if whole_head else ((), {})
    student = with_lora(families.model("qwen2", tie_word_embeddings=False), *how[0], **how[1])
    teacher = families.model("qwen2", seed=1)
    before = {name: weight.clone() for name, weight in student.named_parameters()}
    trainer = DistillTrainer(student, arguments(tmp_path), collate, rows, teacher=teacher, method="kd")
    trainer.train()
    moved = {name for name, weight in student.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {name for name, weight in student.named_parameters() if weight.requires_grad}
    assert any("lm_head" in name for name in moved)
    trainer.save_model(str(tmp_path / "adapters"))
    loaded = peft.PeftModel.from_pretrained(
        families.model("qwen2", tie_word_embeddings=False), tmp_path / "adapters"
    ).eval()
    batch = collate(rows[:2])
    assert torch.equal(loaded(**batch).logits, student.eval()(**batch).logits)
