"""Every member of the T5 family as teacher and as student: T5 v1.0, v1.1 (Flan-T5), mT5 and ByT5."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForSeq2SeqLM,
    ByT5Tokenizer,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from fastkd.train.data.corruption import Spans
from fastkd.train.models.loading import load_model
from fastkd.train.models.student import is_tied, new_model, slice_teacher, smaller_config, t5_config
from fastkd.train.training.trainer import DistillTrainer

# Of each member: the class, whether its head is its embedding, and what its config says. ByT5 is deeper in the encoder.
FAMILY: dict[str, tuple[Any, bool, dict[str, Any]]] = {
    "v1.0": (T5ForConditionalGeneration, True, {"feed_forward_proj": "relu"}),
    "v1.1": (T5ForConditionalGeneration, False, {"feed_forward_proj": "gated-gelu"}),
    "mt5": (MT5ForConditionalGeneration, False, {"feed_forward_proj": "gated-gelu"}),
    "byt5": (T5ForConditionalGeneration, False, {"feed_forward_proj": "gated-gelu", "num_layers": 3}),
}
MEMBERS = pytest.mark.parametrize("member", FAMILY)


@pytest.fixture(scope="module")
def folders(
    tokenizer: Any, saved: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """folders(member): the folder of a small one, 64 wide, with its tokenizer."""
    root = tmp_path_factory.mktemp("family")

    def folder(member: str) -> Path:
        if not (root / member).is_dir():
            own = ByT5Tokenizer() if member == "byt5" else tokenizer
            rows = 384 if member == "byt5" else 512
            sizes = {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2}
            of_class, tied, fields = FAMILY[member]
            settings = {"vocab_size": rows, "decoder_start_token_id": 0, "tie_word_embeddings": tied, **sizes, **fields}
            config = (MT5Config if of_class is MT5ForConditionalGeneration else T5Config)(**settings)
            saved(new_model(config, seed=5, tied=tied), root / member, own)
        return root / member

    return folder


def test_the_folders_are_what_they_stand_for(folders: Callable[[str], Path]) -> None:
    for member, (of_class, tied, fields) in FAMILY.items():
        model, tokenizer = load_model(folders(member), "teacher")
        assert type(model) is of_class and is_tied(model) == tied
        scales = member == "v1.0"  # the others do not scale the decoder's output by 64^-0.5
        ids = torch.randint(3, 200, (2, 5))
        with torch.no_grad():
            output = model(input_ids=ids, labels=ids, output_hidden_states=True)
        hidden = output.decoder_hidden_states[-1] / (8 if scales else 1)
        torch.testing.assert_close(output.logits, hidden @ model.lm_head.weight.T)
        gated = "gated" in fields["feed_forward_proj"]
        assert hasattr(model.encoder.block[0].layer[1].DenseReluDense, "wi_0") == gated
        ids = tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_1>"])
        assert ids[1] - ids[0] == (1 if member == "byt5" else -1)


def student_of(teacher: Any, kind: str) -> Any:
    """A plain T5 of our own, or a slice of the teacher, half as wide and one layer a side."""
    if kind == "plain":
        return new_model(t5_config(teacher.config.vocab_size, 32, 1), seed=6)
    student = new_model(smaller_config(teacher.config, 32, 1), seed=6, tied=is_tied(teacher))
    slice_teacher(student, teacher)
    return student


def token_batch() -> dict[str, torch.Tensor]:
    """Random tokens with padding on both sides."""
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.randint(1, 384, (4, n), generator=generator) for name, n in (("input_ids", 9), ("labels", 7))}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, -4:] = 0
    batch["labels"][2, -3:] = -100
    return batch


@MEMBERS
@pytest.mark.parametrize("kind", ["plain", "slice"])
def test_the_loss_is_that_of_the_models_own_logits(
    member: str, kind: str, folders: Callable[[str], Path], make_trainer: Callable[..., DistillTrainer]
) -> None:
    teacher, batch = load_model(folders(member), "teacher")[0], token_batch()
    student = student_of(teacher, kind)
    loss = make_trainer(student, "kd", teacher=teacher).compute_loss(student, batch)
    keep = batch["labels"] != -100
    with torch.no_grad():
        s, t = (model(**batch).logits[keep].double() for model in (student, teacher))
    kl = F.kl_div((s / 2).log_softmax(-1), (t / 2).log_softmax(-1), log_target=True, reduction="batchmean")
    expected = F.cross_entropy(s, batch["labels"][keep]) + 4 * kl  # kd's temperature is 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@MEMBERS
@pytest.mark.parametrize("kind", ["plain", "slice"])
@pytest.mark.parametrize("method", ["miniend-e", "miniend-d-nologit", "hsm-cka"])
def test_relations_and_hidden_states_of_every_member(
    member: str, kind: str, method: str, folders: Callable[[str], Path], make_trainer: Callable[..., DistillTrainer]
) -> None:
    teacher = load_model(folders(member), "teacher")[0]
    student = student_of(teacher, kind)
    loss = make_trainer(student, method, teacher=teacher).compute_loss(student, token_batch())
    assert loss.item() > 0
    loss.backward()
    for stack in (student.encoder, student.decoder):
        gradient = stack.block[0].layer[0].SelfAttention.q.weight.grad
        assert gradient.isfinite().all() and gradient.any()


@MEMBERS
def test_runs_leave_ordinary_folders_of_the_teachers_class(
    member: str,
    folders: Callable[[str], Path],
    tool: Callable[..., int],
    text_file: Path,
    tmp_path: Path,
    trainers: list[Any],
) -> None:
    folder, out = folders(member), tmp_path / "run"
    flags = ["--teacher", folder, "--train_file", text_file, "--max_steps", "2", "--max_eval_examples", "4"]
    assert tool("--method", "hsm-cka", *flags, "--output_dir", out) == 0
    of_class, tied, _ = FAMILY[member]
    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is of_class and is_tied(loaded) == tied and loaded.config.d_model == 32
    trained, batch = trainers[-1].model, token_batch()
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, trained.eval()(**batch).logits)
    assert not torch.equal(loaded.shared.weight, load_model(folder, "teacher")[0].shared.weight[:, :32])  # it learnt

    # The student's folder is a teacher and a student in its turn.
    again = ["--teacher", folder, "--student", out, "--train_file", text_file, "--max_eval_examples", "4"]
    assert tool("--method", "miniend-e", *again, "--max_steps", "2", "--output_dir", tmp_path / "again") == 0
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again")
    assert type(model) is of_class and is_tied(model) == tied
    assert not torch.equal(model.shared.weight, loaded.shared.weight)


def test_sentinels_of_byt5_count_up(folders: Callable[[str], Path]) -> None:
    _, tokenizer = load_model(folders("byt5"), "teacher")
    text = torch.tensor(tokenizer("bytes " * 10, add_special_tokens=False)["input_ids"][:50]).numpy()
    item = Spans(tokenizer, 50)(text, (0, 0, 0))
    sentinels = [int(token) for token in item["labels"] if token >= 259]
    assert sentinels == list(range(259, 259 + len(sentinels))) and len(sentinels) > 1
    assert [int(token) for token in item["input_ids"] if token >= 259] == sentinels
    assert int(item["input_ids"][-1]) == int(item["labels"][-1]) == tokenizer.eos_token_id == 1


# ---- Folders with code in them ----


class Bomb:
    """An object that, unpickled, makes a folder."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("role", ["--teacher", "--student"])
def test_pickled_weights_are_refused_unread(
    role: str,
    folders: Callable[[str], Path],
    tool: Callable[..., int],
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, tokenizer = load_model(folders("v1.0"), "teacher")
    folder, mark = tmp_path / "pickled", tmp_path / "ran"
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.save({**model.state_dict(), "extra": Bomb(mark)}, folder / "pytorch_model.bin")
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    mark.rmdir()  # the bomb works
    out = tmp_path / "out"
    capsys.readouterr()
    flags = ["--method", "kd", "--teacher", folders("v1.0"), "--train_file", text_file, "--output_dir", out]
    assert tool(*flags, role, folder) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and str(folder) in error and "safetensors" in error, error
    assert not mark.exists() and not out.exists()


def test_code_in_a_folder_does_not_run(
    folders: Callable[[str], Path],
    tool: Callable[..., int],
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A repository's own classes are passed over where transformers knows the model, and refused where it does not."""
    # Nobody is asked, and were somebody asked, the answer would be yes.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    mark, folder = tmp_path / "ran", tmp_path / "code"
    model, tokenizer = load_model(folders("v1.0"), "teacher")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    code = f"import os\nos.mkdir({str(mark)!r})\nfrom transformers import T5Config as Own\n"
    (folder / "own.py").write_text(code + "from transformers import T5ForConditionalGeneration as OwnModel\n")
    own = {"AutoConfig": "own.Own", "AutoModelForSeq2SeqLM": "own.OwnModel", "AutoTokenizer": ["own.Own", "own.Own"]}
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, "auto_map": own}))
    flags = ["--method", "kd", "--teacher", folder, "--train_file", text_file, "--max_eval_examples", "4"]
    assert tool(*flags, "--max_steps", "1", "--output_dir", tmp_path / "out") == 0
    assert not mark.exists()

    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "own"}))
    capsys.readouterr()
    assert tool(*flags, "--output_dir", tmp_path / "refused") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and str(folder) in error, error
    assert not mark.exists() and not (tmp_path / "refused").exists()
