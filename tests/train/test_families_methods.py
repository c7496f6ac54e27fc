"""Every method on every family: the trainer's loss and gradients are those of plain torch on what models give out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import HEADS, SETTINGS, batch, config, model
from torch import Tensor
from transformers import BartForConditionalGeneration

from fastkd.train.common.family import family_of, matched_layer
from fastkd.train.objectives.methods import METHODS, Method
from fastkd.train.objectives.mixup import Mixup
from fastkd.train.training.optimizer import gradient_norms

SCHEDULED = ("maxidisc",)  # as minidisc, but for what comes between teacher and student
KINDS_OF = {(kind, name) for name in SETTINGS for kind in family_of(model(name).config).kinds}
# One model type for each row of the table, and those that compute otherwise than others of their row.
TYPES = ("t5", "bart", "marian", "bert", "roberta", "distilbert", "gpt2", "qwen3", "gemma2")
# Where the attentions' projections are, from the model's own code and not from our table.
QKV = {
    "t5": ("{stack}.block.{layer}.layer.{sublayer}.{module}", "q k v"),
    "bart": ("model.{stack}.layers.{layer}.{attention}", "q_proj k_proj v_proj"),
    "marian": ("model.{stack}.layers.{layer}.{attention}", "q_proj k_proj v_proj"),
    "bert": ("bert.encoder.layer.{layer}.attention.self", "query key value"),
    "roberta": ("roberta.encoder.layer.{layer}.attention.self", "query key value"),
    "distilbert": ("distilbert.transformer.layer.{layer}.attention", "q_lin k_lin v_lin"),
    "gpt2": ("transformer.h.{layer}.attn", "c_attn"),
    "qwen3": ("model.layers.{layer}.self_attn", "q_proj k_proj v_proj"),
    "gemma2": ("model.layers.{layer}.self_attn", "q_proj k_proj v_proj"),
}
CASES = [
    pytest.param(name, kind, method, id=f"{name}-{kind}-{method}")
    for name in TYPES
    for kind, of in sorted(KINDS_OF)
    if of == name
    for method in METHODS
    if method not in SCHEDULED
]


def log_softmax(scores: Tensor, temperature: float = 1.0) -> Tensor:
    return (scores / temperature).log_softmax(-1)


def kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """Per row, with Hinton's factor."""
    p, q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    return temperature**2 * F.kl_div(q, p, log_target=True, reduction="none").sum(-1)


class Plain:
    """What a model gives out of a batch by itself: logits, hidden states, and what its projections compute."""

    def __init__(self, made: Any, name: str, kind: str, inputs: dict[str, Tensor], mixup: Mixup | None = None):
        self.kind, self.name, self.kept = kind, name, {}
        given = {k: v for k, v in inputs.items() if k != "labels"}
        if mixup is not None:
            mask = given["attention_mask"]
            given["attention_mask"] = mask | mask[mixup.partner]
            if name == "roberta":  # it gives padding a place of its own, where the other example has words
                given["position_ids"] = torch.arange(mask.shape[1])[None] + made.config.pad_token_id + 1
        if kind == "seq2seq":
            given["decoder_input_ids"] = made.prepare_decoder_input_ids_from_labels(inputs["labels"])
        hooks = [module.register_forward_hook(self.keep(path)) for path, module in made.named_modules()]
        embedding = made.get_input_embeddings().weight
        for module in made.modules():
            if mixup is not None and isinstance(module, torch.nn.Embedding) and module.weight is embedding:
                hooks.append(module.register_forward_hook(lambda module, args, out: mixup.mix(out)))
        self.out = made(**given, output_hidden_states=True)
        for hook in hooks:
            hook.remove()
        self.logits = self.out.logits if self.out.logits.dim() == 3 else self.out.logits[:, None]

    def keep(self, path: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, out: Any) -> None:
            self.kept[path] = out

        return hook

    def qkv(self, place: str, layer: int) -> list[Tensor]:
        stack = place.split("_")[0]
        pattern, names = QKV[self.name]
        path = pattern.format(
            stack=stack, layer=layer, sublayer=int("cross" in place),
            module="EncDecAttention" if "cross" in place else "SelfAttention",
            attention="encoder_attn" if "cross" in place else "self_attn",
        )  # fmt: skip
        found = [self.kept[f"{path}.{name}"] for name in names.split()]
        return list(found[0].chunk(3, -1)) if len(found) == 1 else found

    def states(self, stack: str) -> tuple[Tensor, ...]:
        return self.out[f"{stack}_hidden_states" if self.kind == "seq2seq" else "hidden_states"]


def depth(made: Any, stack: str) -> int:
    config = made.config
    names = {"encoder": ("encoder_layers",), "decoder": ("decoder_layers", "num_decoder_layers")}[stack]
    return next((getattr(config, n) for n in (*names, "num_hidden_layers") if getattr(config, n, None)), 0)


def plain_relation(ours: Tensor, theirs: Tensor, mask: Tensor, causal: bool) -> Tensor:
    allowed = mask[:, None, None, :].bool().expand(-1, 1, mask.shape[1], -1)
    if causal:
        allowed = allowed & torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
    scores = []
    for x in (ours, theirs):
        heads = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        dots = heads @ heads.mT / math.sqrt(heads.shape[-1])
        scores.append(dots.masked_fill(~allowed, -1e30))
    return kl(scores[1], scores[0]).mean(1)[mask.bool()].mean()


def plain_cka(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(0), y - y.mean(0)
    return 1 - (x.T @ y).norm() / ((x.T @ x).norm() * (y.T @ y).norm()).sqrt()


def plain_loss(method: Method, name: str, kind: str, models: list[Any], data: dict[str, Tensor], mixup: Any) -> Tensor:
    student, teacher = (Plain(made, name, kind, data) for made in models)
    labels = data["labels"]
    if kind == "causal":
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    read, targets = data["attention_mask"].bool(), labels != -100
    is_causal = kind == "causal"
    # which positions queries, keys and values lie over
    sides = {"encoder": read, "decoder": read if is_causal else targets}
    total = torch.zeros((), dtype=torch.double)

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)

    for term, weight in method.terms.items():
        if term == "ce":
            loss = cross_entropy(student.logits, labels)[targets].mean()
        elif term == "logit_kl":
            loss = kl(teacher.logits, student.logits, method.temperature)[targets].mean()
        elif term.endswith(("_self", "_cross")):
            stack = term.split("_")[0]
            layers = [depth(made, stack) - 1 for made in models]
            pairs = zip(student.qkv(term, layers[0]), teacher.qkv(term, layers[1]), strict=True)
            over = ("decoder", "encoder", "encoder") if "cross" in term else (stack,) * 3
            loss = sum(
                plain_relation(ours, theirs, sides[side], term == "decoder_self") / 3
                for (ours, theirs), side in zip(pairs, over, strict=True)
            )
        elif term.startswith("hidden"):
            loss, count = torch.zeros((), dtype=torch.double), 0
            for stack in ("encoder", "decoder"):
                if kind != "seq2seq" and stack != ("decoder" if is_causal else "encoder"):
                    continue
                mask = sides[stack]
                if kind == "seq2seq" and stack == "decoder":
                    mask = torch.cat([torch.zeros_like(targets[:, :1]), targets[:, :-1]], 1)
                    mask[:, 0] = targets[:, 0] & method.match_first_position
                mine, its = (depth(made, stack) for made in models)
                for layer in [mine] if term == "hidden_pkd" else range(mine + 1):
                    ours, theirs = student.states(stack)[layer], teacher.states(stack)[matched_layer(layer, mine, its)]
                    if term == "hidden_linear":
                        ours = models[0].hidden_projection(ours)
                    if term == "hidden_pkd":
                        ours, theirs = F.normalize(ours, dim=-1), F.normalize(theirs, dim=-1)
                    compare = plain_cka if term == "hidden_cka" else F.mse_loss
                    loss, count = loss + compare(ours[mask], theirs[mask]), count + 1
            loss = loss / count if term in ("hidden_mse", "hidden_pkd") else loss
        else:
            mixed = Plain(models[0], name, kind, data, mixup).logits
            lam = mixup.lam.double()[:, None]
            if term == "mixup_ce":
                other = labels[mixup.partner]
                ours, theirs = (cross_entropy(mixed, x) * (x != -100) for x in (labels, other))
                loss = (lam * ours + (1 - lam) * theirs).sum() / targets.sum()
            else:
                union = targets | targets[mixup.partner]
                its = Plain(models[1], name, kind, data, mixup).logits
                loss = (mixed - its).square().mean(-1)[union].mean()
        total = total + weight * loss
    return total


@pytest.mark.parametrize(("name", "kind", "method"), CASES)
def test_loss_and_gradients_are_those_of_plain_torch(
    name: str, kind: str, method: str, make_trainer: Callable[..., Any]
) -> None:
    same_shape = METHODS[method].prunes
    student, teacher = model(name, kind, 1), model(name, kind, 2, **({} if same_shape else larger(name)))
    why = METHODS[method].lacks(family_of(student.config))
    if why:
        with pytest.raises(ValueError, match="method: "):
            make_trainer(student, method, teacher=teacher)
        return
    own = replace(METHODS[method], relation_heads=HEADS)
    trainer = make_trainer(student, own, teacher=teacher)
    for made in (student, teacher):
        made.double()
        made.eval()
    data = batch(kind)
    torch.manual_seed(3)
    loss = trainer.compute_loss(student, data)
    loss.backward()
    found = {path: x.grad.clone() for path, x in student.named_parameters() if x.grad is not None}
    student.zero_grad()
    torch.manual_seed(3)
    mixup = Mixup.draw(data["labels"], own.mixup_alpha) if own.mixup_terms else None
    expected = plain_loss(trainer.method, name, kind, [student, teacher], data, mixup)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7, check_dtype=False)
    largest = max(float(x.grad.abs().max()) for x in student.parameters() if x.grad is not None)
    assert largest > 0
    for path, parameter in student.named_parameters():
        theirs = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        ours = found.get(path, torch.zeros_like(parameter))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * largest, check_dtype=False, msg=path)


def larger(name: str) -> dict[str, Any]:
    """What makes a teacher of a type deeper, and half as wide again."""
    settings = SETTINGS[name]
    deeper = {key: 3 for key in settings if key.endswith("layers") or key == "n_layer"}
    wider = {key: 48 for key in settings if key in ("d_model", "hidden_size", "dim", "n_embd")}
    return {**deeper, **wider, **{key: 12 for key in ("head_dim", "d_kv") if key in settings}}


def test_a_head_of_one_output_is_a_number(make_trainer: Callable[..., Any]) -> None:
    student, teacher = (model("bert", "classifier", seed, num_labels=1) for seed in (1, 2))
    trainer = make_trainer(student, "kd", teacher=teacher)
    data = batch("classifier")
    data["labels"] = torch.tensor([[0.2], [4.6], [3.0]])
    inputs = {name: x for name, x in data.items() if name != "labels"}
    ours, its = (made(**inputs).logits for made in (student.eval(), teacher))
    expected = (ours - data["labels"]).square().mean() + (ours - its).square().mean()
    torch.testing.assert_close(trainer.compute_loss(student, data), expected)
    _, scores, labels = trainer.prediction_step(student, data, True)
    torch.testing.assert_close(scores[..., 0], (ours - data["labels"]).square())
    assert torch.equal(labels, data["labels"])


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_minilm_of_an_encoder_compares_its_one_stack(name: str) -> None:
    made = model(name)
    config = made.config
    assert list(gradient_norms(made)) == ["encoder", "embedding (or what else is outside encoder)"]
    assert METHODS["minilm"].on(config).terms == {"encoder_self": 1.0}
    assert METHODS["mlmkd+minilm"].on(config).terms == {"logit_kl": 1.0, "encoder_self": 1.0}
    assert METHODS["minilm"].on(config).summary.startswith("encoder self-attention relations alone")


def test_models_whose_attentions_differ_do_not_go_together() -> None:
    with pytest.raises(ValueError, match=r"method: .*GPT-2 and BERT"):
        METHODS["minilm"].check_fits(model("gpt2").config, model("bert").config)


def test_a_family_that_is_not_in_the_table_says_how_a_row_is_added() -> None:
    class Other:
        model_type = "electra"

    with pytest.raises(ValueError, match=r"T5 \(t5, mt5.*GPT-2 \(gpt2\).*got 'electra'; a new family is a row in"):
        family_of(Other())


@pytest.mark.parametrize("method", ["hsm-kd", "hsm-cka", "hsm-linear"])
def test_hsm_on_bart_brings_its_loss_to_a_third_in_60_steps(method: str, make_trainer: Callable[..., Any]) -> None:
    torch.manual_seed(1)
    teacher = BartForConditionalGeneration(config("bart", d_model=64, encoder_layers=4, decoder_layers=4))
    torch.manual_seed(2)
    student, data = BartForConditionalGeneration(config("bart")), batch("seq2seq", rows=8)
    trainer = make_trainer(student, method, teacher=teacher)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = trainer.compute_loss(student, data)
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 3
