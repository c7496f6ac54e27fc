"""DistillTrainer in place of transformers' Trainer: data and collators as users have them, losses as in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from fastkd.integrations.transformers import METHODS, DistillTrainer
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


def with_lora(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    made = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj", "lm_head"]))
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


def test_a_method_by_its_name(tmp_path: Path) -> None:
    rows, collate = data("qwen2")
    models = families.model("qwen2"), families.model("qwen2", seed=1)
    trainer = DistillTrainer(models[0], arguments(tmp_path), collate, rows, teacher=models[1], method="kd")
    assert trainer.method == METHODS["kd"]
    with pytest.raises(ValueError, match=r"method: expected scratch, .*, got 'kdd'"):
        DistillTrainer(models[0], arguments(tmp_path), collate, rows, teacher=models[1], method="kdd")
    with pytest.raises(ValueError, match=r"method: expected ce, logit_kl, .*, got 'kl'"):
        DistillTrainer(models[0], arguments(tmp_path), collate, rows, teacher=models[1], method={"kl": 1.0})


def test_what_is_not_served_is_refused(tmp_path: Path) -> None:
    rows, collate = data("gpt2")
    student, teacher = families.model("gpt2"), families.model("gpt2", seed=1)

    def made(model: Any = student, teacher: Any = teacher, more: Any = None, **args: Any) -> Any:
        given = {"teacher": teacher, "method": "kd", **(more or {})}
        return DistillTrainer(model, arguments(tmp_path, **args), collate, rows, **given)

    with pytest.raises(ValueError, match="label_smoothing_factor: expected none, as DistillTrainer computes the loss"):
        made(label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="compute_loss_func: expected none"):
        made(more={"compute_loss_func": lambda *args, **kwargs: None})
    with pytest.raises(ValueError, match=r"teacher: this method .* needs one, got None"):
        made(teacher=None)
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    other = transformers.AutoModelForCausalLM.from_config(transformers.GPTNeoXConfig(vocab_size=96, **settings))
    with pytest.raises(ValueError, match=r"expected a model of one of T5 .*, got 'gpt_neox'"):
        made(other)
    with pytest.raises(ValueError, match=r"data: expected batches of input_ids, .*, got position_ids, too"):
        made().compute_loss(student, {**collate(rows[:2]), "position_ids": torch.arange(7)[None]})


@pytest.mark.skipif(not installed("peft"), reason="PEFT is not installed")
def test_adapters_are_saved_and_loaded(tmp_path: Path) -> None:
    import peft

    rows, collate = data("qwen2")
    student = with_lora(families.model("qwen2", tie_word_embeddings=False))
    teacher = families.model("qwen2", seed=1)
    trainer = DistillTrainer(student, arguments(tmp_path), collate, rows, teacher=teacher, method="kd")
    trainer.train()
    trainer.save_model(str(tmp_path / "adapters"))
    loaded = peft.PeftModel.from_pretrained(
        families.model("qwen2", tie_word_embeddings=False), tmp_path / "adapters"
    ).eval()
    batch = collate(rows[:2])
    assert torch.equal(loaded(**batch).logits, student.eval()(**batch).logits)
