"""TRL's trainers with fastkd's losses, against TRL's own: losses, gradients, logs; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from fastkd.integrations import trl as trl_module
from tests.integrations import trl_cases as cases

TOGETHER = ("gkd", "distillation")


@pytest.fixture(autouse=True)
def quiet() -> None:
    cases.quiet()


# ---- losses and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", TOGETHER)
def test_losses_and_gradients_are_trls(name: str, beta: float, tmp_path: Path) -> None:
    """For the mean over a batch, and over more items than it has; at a temperature, which GKD samples with alone."""
    both = [cases.trainer(name, stock, tmp_path, beta=beta, temperature=0.7) for stock in (True, False)]
    inputs = cases.batch(name)
    for items in (None, torch.tensor(47)):
        if name == "distillation" and items is None:
            inputs = {key: x for key, x in inputs.items() if key != "num_items_in_batch"}
        cases.check_equal(*(cases.loss_and_gradients(one, inputs, items) for one in both))
    if name == "distillation":
        entropies = [one._metrics["train"]["entropy"] for one in both]
        assert entropies[1] == pytest.approx(entropies[0], rel=1e-5) and 0 < entropies[0][0] < 6


@pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "llama"])
@pytest.mark.parametrize("name", TOGETHER)
def test_models_that_cap_their_logits_or_tie_their_heads(name: str, model_type: str, tmp_path: Path) -> None:
    """Gemma 2 caps at 3 here, where logits are many times that."""
    changes = {"tie_word_embeddings": model_type != "llama"}
    wide = {"n_embd": 48} if model_type == "gpt2" else {"hidden_size": 48, "head_dim": 12}
    both = []
    for stock in (True, False):
        student, teacher = cases.model(model_type, **changes), cases.model(model_type, 1, **wide, **changes)
        both.append(cases.trainer(name, stock, tmp_path, student, teacher, beta=0.5))
    cases.check_equal(*(cases.loss_and_gradients(one, cases.batch(name)) for one in both))


@pytest.mark.parametrize("name", TOGETHER)
def test_a_batch_of_which_nothing_counts(name: str, tmp_path: Path) -> None:
    one = cases.trainer(name, False, tmp_path)
    inputs = cases.batch(name)
    inputs |= {key: torch.full_like(inputs[key], -100) for key in ("labels",) if key in inputs}
    inputs |= {"completion_mask": torch.zeros_like(inputs["completion_mask"])} if name == "distillation" else {}
    loss, gradients = cases.loss_and_gradients(one, inputs)
    assert loss == 0 and not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("name", TOGETHER)
def test_training_logs_what_trls_does(name: str, tmp_path: Path) -> None:
    """Two batches a step, those of GKD in part the student's own answers; then an evaluation."""
    logs = []
    for stock in (True, False):
        one = cases.trainer(
            name, stock, tmp_path, beta=0.5, max_steps=3, gradient_accumulation_steps=2, learning_rate=1e-3
        )
        one.train()
        one.evaluate(one.train_dataset.select(range(3)))
        logs.append([*cases.told(one)])
    for theirs, ours in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert name == "gkd" or {"entropy", "eval_entropy"} <= {key for entry in logs[1] for key in entry}


def given(way: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a user may give a trainer: settings of its config, and arguments."""
    if way == "folders":
        for where, made in (("student", cases.model()), ("teacher", cases.teacher())):
            made.save_pretrained(folder / where)
        models = {"model": str(folder / "student"), "teacher_model": str(folder / "teacher")}
        settings = {"model_init_kwargs": {"attn_implementation": "eager"}, "teacher_model_init_kwargs": {"dtype": None}}
        return settings, models
    if way == "the teacher's answers":
        return {"lmbda": 0.0, "seq_kd": True}, {}
    peft = pytest.importorskip("peft")
    if way == "prefixes":
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        return {"lmbda": 0.0, "gradient_checkpointing": False}, {"peft_config": config}  # which TRL fails under
    torch.manual_seed(0)
    lora = {"target_modules": "all-linear", "modules_to_save": ["lm_head"], "init_lora_weights": False}
    return {}, {"peft_config": peft.LoraConfig(task_type="CAUSAL_LM", **lora)}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, way) for name in TOGETHER for way in ("folders", "adapters")),
        *(("gkd", way) for way in ("the teacher's answers", "prefixes")),
    ],
)
def test_training_with_what_users_give(name: str, way: str, tmp_path: Path) -> None:
    logs = []
    for stock in (True, False):
        settings, arguments = given(way, tmp_path)
        one = cases.trainer(name, stock, tmp_path, arguments=arguments, beta=0.5, max_steps=1, **settings)
        one.train()
        one.evaluate(one.train_dataset.select(range(2)))
        logs.append([*cases.told(one)])
    for theirs, ours in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_under_autocast_the_loss_is_near_that_of_float32(tmp_path: Path) -> None:
    for name in TOGETHER:
        whole, half = (
            cases.trainer(name, False, tmp_path, bf16=bf16, gradient_checkpointing=False) for bf16 in (False, True)
        )
        losses = []
        for one in (whole, half):
            prepared = one.accelerator.prepare_model(one.model)
            loss = one.compute_loss(prepared, cases.batch(name))
            loss.backward()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=0.05) and losses[1] != losses[0]


# ---- what TRL refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("its_rows", "teachers_rows"), [(488, 512), (512, 488)])
@pytest.mark.parametrize("name", TOGETHER)
def test_vocabularies_that_differ_by_padding(name: str, its_rows: int, teachers_rows: int, tmp_path: Path) -> None:
    """The loss is that of heads cut to the shorter one; training goes through, with the student's own answers."""
    given = {"student": cases.model(vocabulary=its_rows), "its_teacher": cases.teacher(vocabulary=teachers_rows)}
    with pytest.raises(ValueError, match="vocab_size"):
        cases.trainer(name, True, tmp_path, **given)
    ours = (
        cases.trainer(name, False, tmp_path, **given, beta=0.5, max_steps=2, lmbda=1.0)
        if name == "gkd"
        else (cases.trainer(name, False, tmp_path, **given, beta=0.5, max_steps=2))
    )
    assert type(ours.model.config.vocab_size) is int and ours.model.config.vocab_size == its_rows
    cut = []
    for made, rows in (given["student"], its_rows), (given["its_teacher"], teachers_rows):
        made = type(made)(type(made.config)(**{**made.config.to_dict(), "vocab_size": 488}))
        weights = given["student" if rows == its_rows else "its_teacher"].state_dict()
        made.load_state_dict({k: x[:488] if x.shape[:1] == (rows,) else x for k, x in weights.items()})
        cut.append(made)
    theirs = cases.trainer(name, True, tmp_path, *cut, beta=0.5)
    inputs = cases.batch(name)
    both = [cases.loss_and_gradients(one, inputs) for one in (theirs, ours)]
    both[1] = both[1][0], {k: x[:488] if x.shape[:1] == (its_rows,) else x for k, x in both[1][1].items()}
    cases.check_equal(*both)
    ours.train()
    assert [entry["loss"] > 0 for entry in ours.state.log_history[:2]] == [True, True]


def test_a_token_that_the_teacher_cannot_read_is_an_error(tmp_path: Path) -> None:
    ours = cases.trainer("gkd", False, tmp_path, cases.model(vocabulary=512), cases.teacher(vocabulary=488))
    inputs = cases.batch("gkd")
    inputs["input_ids"][0, -1] = 500
    with pytest.raises(ValueError, match=r"input_ids: expected tokens below 488, .* got 500"):
        ours.compute_loss(ours.model, inputs)
    assert ours.generation_config.suppress_tokens == [*range(488, 512)]


def test_a_teacher_that_answers_writes_nothing_that_the_student_cannot_read(tmp_path: Path) -> None:
    teacher = cases.teacher(vocabulary=512)
    with torch.no_grad():
        teacher.get_output_embeddings().weight[488:] *= 50  # so that it would write little else
    student = cases.model(vocabulary=488)
    ours = cases.trainer("gkd", False, tmp_path, student, teacher, lmbda=0.0, seq_kd=True, max_steps=1)
    ours.train()
    assert ours.state.log_history[0]["loss"] > 0


@pytest.mark.parametrize("name", TOGETHER)
def test_an_adapter_on_the_head(name: str, tmp_path: Path) -> None:
    """LoRA on q, v and lm_head, against the whole logits that PEFT computes, in plain torch."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False)
    with pytest.raises(ValueError, match="lm_head"):
        cases.trainer(name, True, tmp_path, arguments={"peft_config": lora})
    ours = cases.trainer(name, False, tmp_path, arguments={"peft_config": lora}, beta=0.5, temperature=1.0)
    inputs = cases.batch(name)
    found = cases.loss_and_gradients(ours, inputs)
    assert {"lora_A", "lora_B"} == {part for key in found[1] if "lm_head" in key for part in key.split(".")[-3:-2]}
    whole, items = inputs, None
    if name == "distillation":
        whole, counted = trl_module._joined(inputs)
        whole["labels"] = whole["input_ids"].clone()
        whole["labels"][:, :5] = -100
        whole["labels"][:, 5:][counted == 0] = -100
        items = inputs["num_items_in_batch"]
    asked = {key: whole[key] for key in ("input_ids", "attention_mask")}
    ours.model.zero_grad()
    p, q = ours.teacher_model(**asked).logits.log_softmax(-1).detach(), ours.model(**asked).logits.log_softmax(-1)
    m = ((p.exp() + q.exp()) / 2).log()
    rows = (p.exp() * (p - m) + q.exp() * (q - m)).sum(-1)[:, :-1] / 2
    counted = whole["labels"][:, 1:] != -100
    loss = rows[counted].sum() / (counted.sum() if items is None else items)
    loss.backward()
    parameters = ours.model.named_parameters()
    cases.check_equal((loss.item(), {n: x.grad for n, x in parameters if x.grad is not None}), found)


# ---- a teacher behind a server --------------------------------------------------------------------------------------


class Server:
    """TRL's client, of a server that answers from a model here."""

    def __init__(self, **_: Any) -> None:
        self.model = cases.teacher()

    def get_sequence_logprobs(
        self, sequences: list[list[int]], prompt_lengths: list[int], top_logprobs: int, temperature: float
    ) -> dict[str, Any]:
        told: dict[str, Any] = {"logprobs": [], "logprob_token_ids": [], "actual_logprobs": []}
        for sequence, start in zip(sequences, prompt_lengths, strict=True):
            ids = torch.tensor([sequence])
            with torch.no_grad():
                log_probs = (self.model(input_ids=ids).logits / temperature).log_softmax(-1)[0, start - 1 : -1]
            top = log_probs.topk(top_logprobs)
            told["logprobs"].append(top.values.tolist())
            told["logprob_token_ids"].append(top.indices.tolist())
            told["actual_logprobs"].append(log_probs.gather(-1, ids[0, start:, None]).tolist())
        return told


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize(("beta", "k"), [(0.0, 5), (0.5, 1), (1.0, 1)])
def test_a_teacher_behind_a_server(
    beta: float, k: int, tail: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of completions of several lengths, the likeliest tokens of the teacher among them."""
    monkeypatch.setattr("trl.generation.vllm_client.VLLMClient", Server)
    given = {"beta": beta, "loss_top_k": k, "loss_add_tail": tail, "temperature": 0.8}
    both = [cases.trainer("server", stock, tmp_path, **given) for stock in (True, False)]
    inputs = cases.batch("server")
    inputs["completion_mask"][0, 6:] = 0
    inputs["prompt_mask"] = torch.ones_like(inputs["prompt_mask"])
    with torch.no_grad():
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        inputs["completion_ids"][0, 0] = both[1].teacher_client.model(input_ids=ids[:, :5]).logits[0, -1].argmax()
    theirs, ours = (cases.loss_and_gradients(one, inputs) for one in both)
    if beta == 1 and not tail:  # a distribution over one id: there is nothing to learn
        assert theirs[0] == ours[0] == 0 and not any(x.any() for x in ours[1].values())
    else:
        cases.check_equal(theirs, ours)


def test_training_from_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.generation.vllm_client.VLLMClient", Server)
    logs = []
    for stock in (True, False):
        one = cases.trainer("server", stock, tmp_path, beta=0.5, max_steps=2, gradient_accumulation_steps=2)
        one.train()
        logs.append([*cases.told(one)])
    for theirs, ours in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_what_a_server_does_not_tell_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Server):
        def get_sequence_logprobs(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            told = super().get_sequence_logprobs(*args, **kwargs)
            told["actual_logprobs"][0][2] = [float("nan")]
            return told

    monkeypatch.setattr("trl.generation.vllm_client.VLLMClient", Silent)
    ours = cases.trainer("server", False, tmp_path, beta=1.0)
    with pytest.raises(ValueError, match=r"teacher: expected log-probabilities of all 22 .* got none for 1"):
        ours.compute_loss(ours.model, cases.batch("server"))
