"""Every method's loss and gradients in a trainer equal an eager computation on logits and relation matrices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import T5Config

from fastkd.states import head_input
from fastkd.train.objectives.methods import METHODS

# The rows of the table, written out once more on purpose: terms, and the temperature of the logit term.
EXPECTED: dict[str, tuple[str, int]] = {
    "scratch": ("ce", 1),
    "mlmkd": ("kl", 1),
    "kd": ("ce kl", 2),
    "minilm": ("decoder", 1),
    "mlmkd+minilm": ("kl decoder", 1),
    "miniend-d": ("kl decoder cross", 1),
    "miniend-d-nologit": ("decoder cross", 1),
    "miniend-e": ("kl decoder encoder", 1),
    "miniend-e-nologit": ("decoder encoder", 1),
    "hsm-kd": ("ce kl", 1),
    "hsm-cka": ("ce kl cka", 1),
    "hsm-linear": ("ce kl linear", 1),
    "mixkd": ("ce sm tmkd", 1),
    "mixkd-tmkd": ("ce tmkd", 1),
    "mixkd-sm": ("ce sm", 1),
    "minidisc": ("mse kl", 1),
    "maxidisc": ("mse kl", 1),
    "prune-kd": ("ce kl", 1),
    "prune-pkd": ("pkd ce kl", 1),
}
WEIGHTS = {"minidisc": 1 / 2, "maxidisc": 1 / 2, "prune-kd": 1 / 2, "prune-pkd": 1 / 3}  # of each term, elsewhere 1
SEED = 11  # of what mixkd draws


HIDDEN = [(0, 0), (1, 2), (2, 3)]  # states of 2 layers and of 3, rounded to even: layer 1 belongs to 1.5


def forward(model: Any, batch: dict[str, torch.Tensor], layer: int) -> tuple[Any, dict[str, list[Any]]]:
    """The output, and the queries, keys and values of a layer (counted from 1) at the three places."""
    attentions = {
        "encoder": model.encoder.block[layer - 1].layer[0].SelfAttention,
        "decoder": model.decoder.block[layer - 1].layer[0].SelfAttention,
        "cross": model.decoder.block[layer - 1].layer[1].EncDecAttention,
    }
    states: dict[str, list[Any]] = {name: [] for name in attentions}
    handles = [
        projection.register_forward_hook(lambda module, args, out, name=name: states[name].append(out))
        for name, attention in attentions.items()
        for projection in (attention.q, attention.k, attention.v)
    ]
    output = model(**batch, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    return output, states


def eager_relation(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, causal: bool) -> torch.Tensor:
    """One relation term's Q, K or V: KL of 32 heads' softmax(X X^T / sqrt(d_r)), averaged over valid rows and heads."""
    logs = []
    for x in (student, teacher):
        heads = x.double().unflatten(-1, (32, -1)).transpose(1, 2)
        scores = heads @ heads.mT / heads.shape[-1] ** 0.5
        allowed = mask[:, None, None, :].expand_as(scores)
        scores = scores.masked_fill(~(allowed.tril() if causal else allowed), -1e9)
        logs.append(scores.log_softmax(-1))
    rows = (logs[1].exp() * (logs[1] - logs[0])).sum(-1)  # [B, A, L]
    return rows.mean(1)[mask].mean()


def eager_cka(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """One pair's loss, of hidden states [N, d], from their covariances."""
    a, b = (x.double() - x.double().mean(0) for x in (student, teacher))
    cross, mine, its = ((x.T @ y).norm() for x, y in ((b, a), (a, a), (b, b)))
    return 1 - cross / (mine * its).sqrt()


def eager_mixup(
    student: Any, teacher: Any, batch: dict[str, torch.Tensor], distance: str = "mse"
) -> dict[str, torch.Tensor]:
    """MixKD's terms, example by example, from the models' own logits on mixed word embeddings."""
    torch.manual_seed(SEED)
    size = len(batch["labels"])
    partner, lam = torch.randperm(size).tolist(), torch.distributions.Beta(0.4, 0.4).sample((size,)).tolist()
    labels, padding = batch["labels"], batch["attention_mask"].bool()
    sm, tmkd, positions = [], [], 0
    for i, (j, share) in enumerate(zip(partner, lam, strict=True)):
        logits = []
        for model in (student, teacher):
            read = model.prepare_decoder_input_ids_from_labels(labels)
            mixed = [
                share * model.shared(ids[i]) + (1 - share) * model.shared(ids[j]) for ids in (batch["input_ids"], read)
            ]
            output = model(
                inputs_embeds=mixed[0][None],
                attention_mask=(padding[i] | padding[j])[None].long(),
                decoder_inputs_embeds=mixed[1][None],
            )
            logits.append(output.logits[0].double())
        for example, part in ((i, share), (j, 1 - share)):
            sm.append(part * F.cross_entropy(logits[0], labels[example], ignore_index=-100, reduction="sum"))
        either = (labels[i] != -100) | (labels[j] != -100)
        if distance == "mse":
            tmkd.append((logits[0] - logits[1].detach())[either].square().mean(-1).sum())
        else:
            s, t = (x[either].log_softmax(-1) for x in logits)
            tmkd.append(F.kl_div(s, t.detach(), log_target=True, reduction="sum"))
        positions += int(either.sum())
    return {"sm": torch.stack(sm).sum() / (labels != -100).sum(), "tmkd": torch.stack(tmkd).sum() / positions}


def eager_terms(
    method: str, student: Any, teacher: Any, batch: dict[str, torch.Tensor], teacher_layer: int
) -> dict[str, torch.Tensor]:
    """The terms of the same objective from the models' own logits and projections."""
    names, tau = EXPECTED[method]
    labels = batch["labels"]
    keep = labels != -100
    student_output, student_states = forward(student, batch, len(student.encoder.block))
    with torch.no_grad():
        teacher_output, teacher_states = forward(teacher, batch, teacher_layer)
    s, t = (output.logits[keep].double() for output in (student_output, teacher_output))
    kl = F.kl_div((s / tau).log_softmax(-1), (t / tau).log_softmax(-1), log_target=True, reduction="batchmean")
    terms = {"ce": F.cross_entropy(s, labels[keep]), "kl": tau**2 * kl}
    padding = batch["attention_mask"].bool()
    masks = {"decoder": [keep] * 3, "encoder": [padding] * 3, "cross": [keep, padding, padding]}
    for name, mask in masks.items():
        pairs = zip(student_states[name], teacher_states[name], mask, strict=True)
        terms[name] = torch.stack([eager_relation(*pair, causal=name == "decoder") for pair in pairs]).mean()

    read = torch.nn.functional.pad(keep, (1, 0))[:, :-1]  # decoder positions that read a target
    if "cka" in names or "linear" in names:
        matched = []
        for stack, mask, pairs in (("encoder", padding, HIDDEN), ("decoder", read, HIDDEN)):
            mine, its = (output[f"{stack}_hidden_states"] for output in (student_output, teacher_output))
            matched += [(mine[i][mask], its[j][mask]) for i, j in pairs]
        terms["cka"] = torch.stack([eager_cka(*pair) for pair in matched]).sum()
    if "linear" in names:
        errors = [F.mse_loss(student.hidden_projection(mine), its) for mine, its in matched]
        terms["linear"] = torch.stack(errors).sum()
    if "sm" in names or "tmkd" in names:
        terms |= eager_mixup(student, teacher, batch)
    if "mse" in names or "pkd" in names:
        read_or_first = torch.cat([keep[:, :1], read[:, 1:]], 1)
        all_states = []
        for stack, mask in (("encoder", padding), ("decoder", read_or_first)):
            sides = (output[f"{stack}_hidden_states"] for output in (student_output, teacher_output))
            all_states.append([[state[mask].double() for state in side] for side in sides])
        terms["mse"] = torch.stack(
            [F.mse_loss(*pair) for sides in all_states for pair in zip(*sides, strict=True)]
        ).mean()
        last = [[side[-1] / side[-1].norm(dim=-1, keepdim=True) for side in sides] for sides in all_states]
        terms["pkd"] = torch.stack([F.mse_loss(*pair) for pair in last]).mean()
    return {name: WEIGHTS.get(method, 1) * terms[name] for name in names.split()}


def test_the_table_is_complete() -> None:
    assert list(METHODS) == list(EXPECTED)


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients(
    method: str, tiny: Callable[..., Any], make_trainer: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    batch = make_batch()
    width, depth = (32, 2) if method in WEIGHTS else (64, 3)  # a pruned student has its teacher's
    student, teacher = tiny(32, 1, layers=2), tiny(width, 2, layers=depth)
    trainer = make_trainer(student, method, teacher=teacher)
    reference = copy.deepcopy(student)
    expected = torch.stack(list(eager_terms(method, reference, teacher, batch, teacher_layer=depth).values())).sum()
    expected.backward()
    expected_gradients = {name: p.grad for name, p in reference.named_parameters()}

    torch.manual_seed(SEED)
    loss = trainer.compute_loss(student, batch)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=1e-6)
    for name, parameter in student.named_parameters():
        wanted = expected_gradients[name]
        if parameter.grad is None or wanted is None:
            assert wanted is None or not wanted.any(), name
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-6, msg=name)


def test_temperature_divergence_weights_and_layer_override_the_methods_own(
    tiny: Callable[..., Any], make_trainer: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    batch, student, teacher = make_batch(), tiny(32, 1), tiny(64, 2, layers=2)

    def loss(method: str, **settings: Any) -> float:
        trainer = make_trainer(student, replace(METHODS[method], **settings), teacher=teacher)
        return trainer.compute_loss(student, batch).item()

    assert loss("mlmkd") == loss("mlmkd", temperature=1.0) != loss("mlmkd", temperature=3.0)
    for method in ("mlmkd", "minilm"):
        assert loss(method) == loss(method, divergence="forward_kl") != loss(method, divergence="jsd")
        assert loss(method, divergence="jsd") != loss(method, divergence="jsd", divergence_beta=0.1)
        both = [loss(method, divergence=name) for name in ("forward_kl", "tvd")]
        mix = loss(method, divergence={"forward_kl": 0.25, "tvd": 3.0})
        assert mix == pytest.approx(0.25 * both[0] + 3 * both[1], rel=1e-5)
    assert loss("minilm", terms={"decoder_self": 3.0}) == pytest.approx(3 * loss("minilm"))
    first, last = (
        eager_terms("minilm", student, teacher, batch, teacher_layer=layer)["decoder"].item() for layer in (1, 2)
    )
    assert loss("minilm") == pytest.approx(last) and loss("minilm", teacher_layer=1) == pytest.approx(first)
    assert first != pytest.approx(last)


def test_mixkd_by_a_divergence_and_with_other_shares(
    tiny: Callable[..., Any], make_trainer: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    batch, student, teacher = make_batch(), tiny(32, 1), tiny(64, 2)

    def loss(**settings: Any) -> torch.Tensor:
        terms = {"mixup_kd": 1.0, "mixup_ce": 0.5}
        method = replace(METHODS["mixkd"], terms=terms, **settings)
        trainer = make_trainer(student, method, teacher=teacher)
        torch.manual_seed(SEED)
        return trainer.compute_loss(student, batch).double()

    for distance, name in (("mse", "mse"), ("divergence", "kl")):
        expected = eager_mixup(student, teacher, batch, name)
        total = expected["tmkd"] + 0.5 * expected["sm"]
        torch.testing.assert_close(loss(mixup_distance=distance), total, rtol=1e-5, atol=1e-6)
    assert loss(mixup_alpha=5.0) != loss() != loss(mixup_distance="divergence", divergence="jsd")
    with pytest.raises(ValueError, match="mixup beside vocabulary terms only"):
        make_trainer(student, replace(METHODS["mixkd"], terms={"mixup_kd": 1.0, "encoder_self": 1.0}), teacher=teacher)


def test_gradients_reach_what_a_term_depends_on_and_nothing_else(
    tiny: Callable[..., Any], make_trainer: Callable[..., Any], make_batch: Callable[..., Any], monkeypatch: Any
) -> None:
    monkeypatch.setattr("fastkd.linear_kl", None)  # without a vocabulary term it is not called
    teacher, batch = tiny(64, 2), make_batch()
    for method, reached in (
        ("minilm", {"decoder.block.1.layer.0.SelfAttention.v"}),
        ("miniend-d-nologit", {"decoder.block.1.layer.1.EncDecAttention.v", "encoder.block.1.layer.1"}),
        ("miniend-e-nologit", {"encoder.block.1.layer.0.SelfAttention.v"}),
    ):
        student = tiny(32, 1, layers=2)
        make_trainer(student, method, teacher=teacher).compute_loss(student, batch).backward()
        gradients = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
        assert all(any(name.startswith(prefix) for name in gradients) for prefix in reached), method
        assert "shared.weight" in gradients
        assert not any("decoder.block.1.layer.2" in name or "decoder.final" in name for name in gradients), method
    assert ("decoder.block.1.layer.1" in str(gradients)) is False  # cross-attention of the last layer, MiniEnD-E


def test_layers_and_heads(tiny: Callable[..., Any], make_trainer: Callable[..., Any]) -> None:
    method = METHODS["miniend-e"]
    depths = {"decoder_self": 24, "encoder_self": 24}
    assert method.student_layers(T5Config(num_layers=24, num_decoder_layers=24)) == depths
    assert set(method.teacher_layers(T5Config(num_layers=24, num_decoder_layers=24)).values()) == {21}
    assert method.teacher_layers(T5Config(num_layers=24, num_decoder_layers=6)) == {
        "encoder_self": 21,
        "decoder_self": 6,
    }
    assert set(replace(method, teacher_layer=24).teacher_layers(T5Config(num_layers=24)).values()) == {24}
    for layer in (0, 3):
        with pytest.raises(ValueError, match=f"teacher_layer: expected 1 to 2.* got {layer}"):
            make_trainer(tiny(), replace(method, teacher_layer=layer), teacher=tiny(64, 2, layers=2))
    for heads in (0, 3, 64):  # 32 and 96 wide: common divisors only
        with pytest.raises(ValueError, match=rf"32 and 96, .*\(1, 2, 4, 8, 16, 32\), got {heads}$"):
            make_trainer(tiny(), replace(method, relation_heads=heads), teacher=tiny(96, 2))
    make_trainer(tiny(), replace(METHODS["mlmkd"], relation_heads=3), teacher=tiny(96, 2))  # it has no relations


def test_head_input_gives_the_heads_input_and_restores_the_head(
    tiny: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    model, batch = tiny(), make_batch()
    labels = batch.pop("labels")
    batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    logits = model(**batch).logits
    with head_input(model.lm_head) as given:
        assert model(**batch).logits.numel() == 0
    (hidden,) = given
    assert hidden.shape == (*labels.shape, model.config.d_model)
    torch.testing.assert_close(F.linear(hidden, model.lm_head.weight), logits)
    with pytest.raises(RuntimeError, match="inside"), head_input(model.lm_head):
        raise RuntimeError("inside")
    assert torch.equal(model(**batch).logits, logits)


class LogitsDetector(TorchDispatchMode):
    """Collects the operators that make a tensor of at least `tokens` rows of V columns."""

    def __init__(self, tokens: int, vocabulary: int):
        super().__init__()
        self.tokens, self.vocabulary = tokens, vocabulary
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            shape = leaf.shape if isinstance(leaf, torch.Tensor) else ()
            if shape and shape[-1] == self.vocabulary and leaf.numel() >= self.tokens * self.vocabulary:
                self.found.append(str(func))
        return out


@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_materialises_no_logits(
    method: str, tiny: Callable[..., Any], make_trainer: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    width = 32 if METHODS[method].student_init == "prune" else 64
    student, teacher, batch = tiny(32, 1), tiny(width, 2), make_batch(16)
    tokens, vocabulary = batch["labels"].numel(), student.config.vocab_size
    sizes: list[int] = []
    for model in (student, teacher):
        model.lm_head.register_forward_hook(lambda module, args, out: sizes.append(out.numel()))

    with LogitsDetector(tokens, vocabulary) as detector:
        student(**batch)
    assert detector.found and sizes == [tokens * vocabulary]  # so the detectors do detect
    sizes.clear()

    trainer = make_trainer(student, method, teacher=teacher, workspace_mb=0.05)
    with LogitsDetector(tokens, vocabulary) as detector:
        trainer.training_step(student, batch, (batch["labels"] != -100).sum())
    assert not detector.found
    assert set(sizes) == {0}  # of what a head returns that is not asked to compute
    assert student.shared.weight.grad.abs().sum() > 0


def test_a_method_that_needs_a_teacher_says_so(tiny: Callable[..., Any], make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="teacher"):
        make_trainer(tiny(), "kd")
