"""Pruning of BERT, MiniDisc's own model: sub-networks are the masked model, in gradients as well, and load again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from fastkd.train.common.family import FAMILIES, family_of, kind_of
from fastkd.train.judge import cost
from fastkd.train.minidisc.prune import (
    PRUNED,
    importance,
    masked,
    narrowed,
    normalised,
    of_kind,
    order_of,
    sliced,
    widths_at,
)
from fastkd.train.models import anatomy
from fastkd.train.models.architectures import parts
from fastkd.train.models.pruned_bert import PrunedBertForMaskedLM, PrunedBertForSequenceClassification
from tests.forks import Forks

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
each_kind = pytest.mark.parametrize("kind", ["masked", "classifier"])


def bert(kind: str) -> Any:
    return families.model("bert", kind, 3).double()


def batch_for(kind: str) -> dict[str, Tensor]:
    made = families.batch(kind, 5)
    return {**made, "token_type_ids": (made["input_ids"] % 2)}


def random_scores(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return normalised({name: torch.rand(part.units, generator=generator) for name, part in parts(model).items()})


def nested_and_widths(model: Any, sparsity: float) -> tuple[Any, dict[str, int]]:
    scores = random_scores(model)
    everything = {name: part.units for name, part in parts(model).items()}
    return sliced(model, everything, order_of(scores)), widths_at(scores, sparsity)


def grads(model: Any) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def test_the_parts_are_those_of_its_layers() -> None:
    found = parts(bert("masked"))
    assert list(found) == [
        "bert.encoder.layer.0.attention", "bert.encoder.layer.0",
        "bert.encoder.layer.1.attention", "bert.encoder.layer.1",
    ]  # fmt: skip
    heads, neurons = list(found.values())[:2]
    assert (heads.kind, heads.units, heads.size) == ("heads", 4, 8)
    assert (heads.inner, heads.outer) == (("self.query", "self.key", "self.value"), "output.dense")
    assert (neurons.kind, neurons.units, neurons.size) == ("neurons", 64, 1)
    assert (neurons.inner, neurons.outer) == (("intermediate.dense",), "output.dense")
    assert of_kind(found) == {"heads": list(found)[::2], "neurons": list(found)[1::2]}


def test_what_is_said_to_be_pruned_has_a_class() -> None:
    assert {row.name for row in FAMILIES if row.prunes} == {name for name, _ in PRUNED}
    assert all((row.name, kind) in PRUNED for row in FAMILIES if row.prunes for kind in row.kinds)


@each_kind
def test_importance_is_the_derivative_of_the_loss(kind: str) -> None:
    """By central differences of the mask of every head, and of some neurons."""
    model, batch = bert(kind), batch_for(kind)
    found, step = importance(model, [batch]), 1e-5
    for name, part in parts(model).items():
        for unit in range(part.units) if part.kind == "heads" else (0, 17, 63):
            losses = []
            for sign in (1, -1):
                mask = torch.ones(part.units, dtype=torch.double)
                mask[unit] += sign * step
                with masked(model, {name: mask}), torch.no_grad():
                    losses.append(model(**batch).loss)
            expected = (losses[0] - losses[1]).abs() / (2 * step)
            torch.testing.assert_close(found[name][unit].double(), expected, rtol=1e-4, atol=1e-8)


@each_kind
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_slices_equal_the_masked_model(kind: str, sparsity: float) -> None:
    """In their logits and, in the prefix of every matrix and bias, in their gradients; and so do narrowed ones."""
    model, batch = bert(kind), batch_for(kind)
    nested, widths = nested_and_widths(model, sparsity)
    torch.testing.assert_close(nested(**batch).logits, model(**batch).logits, **EXACT)
    small = sliced(nested, widths)
    units = parts(nested)
    masks = {name: (torch.arange(units[name].units) < width).double() for name, width in widths.items()}
    with masked(nested, masks):
        expected = nested(**batch)
        expected.loss.backward()
    whole = grads(nested)
    nested.zero_grad()
    given = small(**batch)
    given.loss.backward()
    torch.testing.assert_close(given.logits, expected.logits, **EXACT)
    for name, gradient in grads(small).items():
        torch.testing.assert_close(gradient, whole[name][tuple(map(slice, gradient.shape))], **EXACT)
    with narrowed(nested, widths):
        inside = nested(**batch)
        inside.loss.backward()
    torch.testing.assert_close(inside.logits, given.logits, **EXACT)
    for name, gradient in grads(nested).items():
        mine = grads(small)[name]
        torch.testing.assert_close(gradient[tuple(map(slice, mine.shape))], mine, **EXACT)
        assert gradient.norm() == pytest.approx(float(mine.norm()), rel=1e-9)  # and nothing beyond
    assert {name: part.units for name, part in parts(nested).items()} == {n: p.units for n, p in units.items()}
    assert {name: part.units for name, part in parts(small).items()} == widths
    if sparsity:
        assert cost.parameters(small) < cost.parameters(nested) and cost.gflops(small) < cost.gflops(nested)


@each_kind
def test_layers_without_heads_or_neurons(kind: str, tmp_path: Path) -> None:
    """What is left of them is a bias; trained on, saved, and loaded again by transformers' own Auto classes."""
    model, batch = bert(kind).float(), batch_for(kind)
    widths = dict(zip(parts(model), (0, 8, 4, 0), strict=True))
    small = sliced(model, widths)
    assert type(small) is {"masked": PrunedBertForMaskedLM, "classifier": PrunedBertForSequenceClassification}[kind]
    masks = {name: (torch.arange(p.units) < widths[name]).float() for name, p in parts(model).items()}
    with masked(model, masks), torch.no_grad():
        torch.testing.assert_close(small(**batch).logits, model(**batch).logits)
    small.train()
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    small(**batch).loss.backward()
    optimizer.step()
    small.eval().save_pretrained(tmp_path)
    auto = AutoModelForMaskedLM if kind == "masked" else AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(small) and anatomy.kind(loaded) == kind_of(loaded.config) == kind
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, small(**batch).logits)
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        states = AutoModel.from_pretrained(tmp_path)(**inputs).last_hidden_state
        torch.testing.assert_close(states, small.bert(**inputs).last_hidden_state)
    widths = anatomy.shape(loaded.config).widths["encoder_self"]
    assert widths == [[0] * 3, [32] * 3]
    again = sliced(loaded, {name: part.units // 2 for name, part in parts(loaded).items()})
    assert [part.units for part in parts(again).values()] == [0, 4, 2, 0]
    assert (loaded.get_output_embeddings() is None) == (kind == "classifier")
    if kind == "masked":
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


@pytest.mark.long
def test_another_process_loads_what_was_saved(transformers_forks: Forks, tmp_path: Path) -> None:
    model = bert("classifier").float()
    sliced(model, {name: part.units // 2 for name, part in parts(model).items()}).save_pretrained(tmp_path)
    code = "import fastkd.train.models; from transformers import AutoModelForSequenceClassification as Auto; "
    code += f"print(type(Auto.from_pretrained({str(tmp_path)!r})).__name__)"
    done = transformers_forks.run("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "PrunedBertForSequenceClassification"


# ---- Schedules -------------------------------------------------------------------------------------------------------

WORDS = {"fruit": "apple pear plum fig", "metal": "iron gold zinc tin", "tree": "oak elm ash yew"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The flags of a task of three classes, and of runs of 4 steps that are evaluated twice."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 48), ("dev", 15)):
        rows = []
        for i in range(count):
            label = list(WORDS)[i % 3]
            words = WORDS[label].split()
            picked = [words[j] for j in torch.randint(0, 4, (4,), generator=generator)]
            rows.append(json.dumps({"text": f"{' '.join(picked)} {i}", "label": label}))
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    files = ["--train_file", folder / "train.jsonl", "--eval_file", folder / "dev.jsonl"]
    return ["--task", "classification", *files, "--max_steps", "4", "--eval_steps", "0.5"]


def teacher_of(folder: Path, name: str = "bert") -> Path:
    names = dict(enumerate(WORDS))
    return families.folder(name, folder, "classifier", id2label=names, label2id={n: i for i, n in names.items()})


def test_minidisc_from_a_bert_to_a_dense_student(tool: Any, data: list[Any], tmp_path: Path, trainers: Any) -> None:
    teacher, out, cache = teacher_of(tmp_path / "teacher"), tmp_path / "out", ["--cache_dir", tmp_path / "cache"]
    flags = ["--method", "minidisc", "--teacher", teacher, "--target_sparsity", "0.7", "--truncation", "0.5"]
    assert tool(*data, *cache, *flags, "--output_dir", out) == 0
    record = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    schedule = record["schedule"]
    first = schedule["trials"][0]["rounds"][0]
    assert [entry["sparsity"] for entry in first["candidates"]] == [0.5, 0.6, 0.7] and first["teacher"] is None
    for entry in first["candidates"]:
        assert entry["tradeoff"] == pytest.approx(entry["metric"] + 0.2 * entry["sparsity"])
    student = AutoModelForSequenceClassification.from_pretrained(out)
    assert type(student) is PrunedBertForSequenceClassification and student.config.id2label == dict(enumerate(WORDS))
    scores = load_file(next((tmp_path / "cache").glob("importance-*")) / "importance.safetensors")
    scores = normalised({name: scores[name] for name in parts(student)})
    assert student.config.widths == {n: part.units for n, part in parts(student).items()} == widths_at(scores, 0.7)
    assert (
        sum(p.numel() for p in student.parameters())
        == schedule["trials"][0]["rounds"][-1]["candidates"][-1]["parameters"]
    )
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "import fastkd.train.models" in card and "AutoModelForSequenceClassification" in card
    assert "BERT" in card and "T5" not in card

    # The student is a teacher, and a student, in its turn.
    again = ["--method", "kd", "--teacher", teacher, "--student", out, "--output_dir", tmp_path / "again"]
    assert tool(*data, *cache, *again) == 0
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert loaded.config.widths == student.config.widths
    more = ["--method", "prune-kd", "--teacher", out, "--target_sparsity", "0.3", "--output_dir", tmp_path / "more"]
    assert tool(*data, *cache, *more) == 0
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "more")
    assert all(width <= student.config.widths[name] for name, width in loaded.config.widths.items())


@pytest.mark.parametrize("name", ["roberta", "distilbert", "bart", "gpt2", "llama"])
def test_families_without_a_class_for_what_is_left_are_refused(
    name: str, tool: Any, data: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    is_encoder = "classifier" in family_of(families.config(name)).kinds
    teacher = teacher_of(tmp_path / name, name) if is_encoder else families.folder(name, tmp_path / name)
    flags = ["--method", "minidisc", "--teacher", teacher, "--target_sparsity", "0.7"]
    assert tool(*data, *flags, "--output_dir", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and "has no class for layers that differ in width" in error
    assert not (tmp_path / "out").exists()
