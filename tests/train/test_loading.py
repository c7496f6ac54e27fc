"""A model is loaded as it was saved, or not at all: what is missing, too much or another's is one line, exit code 2."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5Config

from fastkd.train.common.errors import InputError
from fastkd.train.data.pairs import pad
from fastkd.train.minidisc.prune import sliced
from fastkd.train.models.architectures import enct5_from, parts
from fastkd.train.models.loading import load_config, load_model
from fastkd.train.models.student import is_tied, new_model, t5_config
from fastkd.train.models.tokenizer import fingerprint, train_tokenizer

QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def whole(tokenizer: Any, saved: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small T5 with its tokenizer."""
    return saved(new_model(t5_config(512, 32, 1), 0), tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoiled."""
    return Path(shutil.copytree(whole, tmp_path / "copied"))


def with_weights(folder: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_settings(path: Path, *without: str, **settings: Any) -> None:
    old = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**old, **settings}.items() if k not in without}))


def refusal(folder: Path, role: str = "teacher") -> str:
    with pytest.raises(InputError) as caught:
        load_model(folder, role)
    assert "\n" not in str(caught.value) and role in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


# ---- Weights ----


WEIGHTS: dict[str, tuple[Callable[[Weights], object], str]] = {
    "missing": (lambda w: w.pop(QUERY), f"lacks {QUERY}"),
    "no embedding": (lambda w: w.pop("shared.weight"), "lacks decoder.embed_tokens.weight, "),
    "many missing": (lambda w: [w.pop(name) for name in list(w) if "decoder" in name], " more: expected the weights"),
    "too many": (
        lambda w: w.update({"encoder.pooler.weight": torch.ones(3)}),
        "has, unlike its config, encoder",
    ),
    "renamed": (lambda w: w.update({f"model.{name}": w.pop(name) for name in list(w)}), "lacks "),
    "shape": (lambda w: w.update({QUERY: torch.ones(32, 7)}), f"has {QUERY} (32, 7) for (32, 32)"),
    "nan": (lambda w: w[QUERY][3].fill_(torch.nan), f"has numbers in {QUERY} that are not finite"),
    "inf": (lambda w: w["shared.weight"][3].fill_(-torch.inf), "has numbers in shared.weight that are not finite"),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_not_those_of_the_config(kind: str, copied: Path) -> None:
    change, message = WEIGHTS[kind]
    with_weights(copied, change)
    assert message in refusal(copied)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "sharded"])
@pytest.mark.parametrize(("dtype", "named"), [(torch.int8, ("I8", "torch.int8")), (torch.bool, ("BOOL", "torch.bool"))])
def test_whole_numbers_are_no_weights(dtype: torch.dtype, named: tuple[str, str], file: str, copied: Path) -> None:
    """transformers would make floats of them, without the scales that they are to be multiplied by."""
    with_weights(copied, lambda weights: weights.update({QUERY: weights[QUERY].to(dtype)}))
    path = copied / "model.safetensors"
    if file == "sharded":
        weights = load_file(path)
        names = {name: f"model-0000{1 + (name == QUERY)}-of-00002.safetensors" for name in weights}
        for part in set(names.values()):
            own = {name: weight for name, weight in weights.items() if names[name] == part}
            save_file(own, copied / part, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": names}
        (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    elif file == "pytorch_model.bin":
        torch.save(load_file(path), copied / file)
    if file != "model.safetensors":
        path.unlink()
    message = f"has, as no floats, {QUERY} ({named[file == 'pytorch_model.bin']}): expected the weights of its config"
    assert message in refusal(copied)


@pytest.mark.parametrize("content", [b"", b"no weights", None], ids=["empty", "garbage", "cut off"])
def test_files_that_are_no_weights(content: bytes | None, copied: Path) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    said = refusal(copied, "student")
    assert "cannot load the student in" in said and "cut off, or a pointer to it that git lfs pull replaces" in said


@pytest.mark.parametrize(("name", "text"), [("config.json", "null"), ("tokenizer.json", "{}")])
def test_json_that_is_something_else(name: str, text: str, copied: Path) -> None:
    (copied / name).write_text(text)
    assert "one of its JSON files is not as save_pretrained writes it (" in refusal(copied)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 3}, "lacks encoder.block.1.layer.0"),
        ({"num_decoder_layers": 0}, "has, unlike its config, decoder.block.0.layer.0"),
        ({"d_ff": 64}, "has decoder.block.0.layer.2.DenseReluDense.wi.weight (128, 32) for (64, 32)"),
        ({"d_model": "wide"}, "cannot load the teacher in"),
        ({"model_type": "albert"}, "expected a model of one of T5 (t5, mt5, "),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "is quantised"),
        ({"dropout_rate": "0.1"}, "Validation error for field 'dropout_rate': TypeError: "),
        ({"pad_token_id": None}, "its config's pad_token_id is None: expected that of one of its "),
        ({"decoder_start_token_id": 99999}, "its config's decoder_start_token_id is 99999: expected that of one of "),
        ({"decoder_start_token_id": "0"}, "its config's decoder_start_token_id is '0': expected that of one of its "),
    ],
)
def test_a_config_that_is_not_the_weights(settings: dict[str, Any], message: str, copied: Path) -> None:
    with_settings(copied / "config.json", **settings)
    assert message in refusal(copied)


NUMBERS: dict[str, list[Any]] = {
    "relative_attention_max_distance": [0, -3, 5, 16],
    "relative_attention_num_buckets": [0, 1, 3, -2],
    "num_heads": [0, -1],
    "d_kv": [0],
    "d_ff": [0],
    "d_model": [0],
    "vocab_size": [0, -1],
    "dropout_rate": [2.0, -0.1],
    "layer_norm_epsilon": [-1.0],
    "initializer_factor": [-1.0],
    "dense_act_fn": ["none"],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in NUMBERS.items() for value in values])
def test_a_config_that_makes_no_t5_names_the_field(field: str, value: Any, copied: Path) -> None:
    config, before = load_config(copied, "teacher"), torch.get_rng_state()
    setattr(config, field, value)
    config.save_pretrained(copied)
    said = refusal(copied)
    assert f": its config's {field} is {value!r} (T5's own: {getattr(T5Config(), field)!r}), which makes no T5" in said
    assert torch.equal(torch.get_rng_state(), before)


def test_two_numbers_that_make_no_t5(copied: Path) -> None:
    with_settings(copied / "config.json", relative_attention_max_distance=0, dropout_rate=2.0)
    assert "its config makes no T5 that works: dropout probability has to be between 0 and 1" in refusal(copied)


def test_the_tool_refuses_such_a_config(
    copied: Path, tool: Callable[..., int], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_settings(copied / "config.json", relative_attention_max_distance=0)
    capsys.readouterr()
    for flag, method in (("--teacher", "kd"), ("--student", "scratch")):
        flags = ["--method", method, flag, copied, "--train_file", text_file, "--output_dir", tmp_path / "out"]
        assert tool(*flags) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and str(copied) in error and "relative_attention_max_distance is 0" in error
    assert not (tmp_path / "out").exists()


def test_a_head_of_its_own_that_is_not_there(copied: Path, tokenizer: Any, saved: Callable[..., Path]) -> None:
    """transformers ties the head then, whatever the config says."""
    config = T5Config(**{**t5_config(512, 32, 1).to_dict(), "tie_word_embeddings": False})
    saved(new_model(config, 0, tied=False), copied)
    with_settings(copied / "config.json", tie_word_embeddings=False)  # as older versions of transformers write it
    assert not is_tied(load_model(copied, "teacher")[0])
    with_weights(copied, lambda weights: weights.pop("lm_head.weight"))
    assert "lacks lm_head.weight" in refusal(copied)


def test_copies_of_a_tied_weight_and_tables_that_t5_never_used_are_nothing_wrong(copied: Path, whole: Path) -> None:
    def add(weights: Weights) -> None:
        for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
            weights[name] = weights["shared.weight"].clone()
        weights["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(32, 1)

    with_weights(copied, add)
    made, expected = (load_model(folder, "teacher")[0].state_dict() for folder in (copied, whole))
    assert all(torch.equal(made[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("kind", ["enct5", "pruned"])
def test_our_own_kinds_lack_nothing_either(kind: str, whole: Path, saved: Callable[..., Path], tmp_path: Path) -> None:
    model, _ = load_model(whole, "teacher")
    if kind == "enct5":
        model, name = enct5_from(model, ["a", "b"]), "classifier.weight"
    else:
        name = "encoder.block.0.layer.1.DenseReluDense.wi.weight"
        model = sliced(model, {part: 5 if part in name else part_of.units for part, part_of in parts(model).items()})
    folder = saved(model, tmp_path / kind)
    assert load_model(folder, "teacher")[0].get_parameter(name).shape == model.get_parameter(name).shape
    with_weights(folder, lambda weights: weights.pop(name))
    assert f"lacks {name}" in refusal(folder)


def test_bin_files_of_weights_alone_are_read(copied: Path, whole: Path) -> None:
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    made, expected = (load_model(folder, "teacher")[0].state_dict() for folder in (copied, whole))
    assert all(torch.equal(made[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("saved_in", [torch.float32, torch.bfloat16, torch.float16])
def test_a_teacher_runs_in_the_dtype_of_its_checkpoint_but_for_float16(
    saved_in: torch.dtype,
    whole: Path,
    tool: Callable[..., int],
    saved: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    trainers: list[Any],
) -> None:
    folder = saved(load_model(whole, "teacher", saved_in)[0].to(saved_in), tmp_path / "teacher")
    flags = ["--method", "kd", "--teacher", folder, "--train_file", text_file, "--output_dir", tmp_path / "run"]
    assert tool(*flags, "--max_steps", "1") == 0
    expected = torch.float32 if saved_in == torch.float16 else saved_in  # T5s overflow in it, and nobody says so
    assert trainers[-1].teacher.dtype == expected and trainers[-1].model.dtype == torch.float32
    facts = json.loads((tmp_path / "run" / "metrics.json").read_text())["run"]
    assert facts["teacher_dtype"] == str(expected).removeprefix("torch.")
    assert tool(*flags, "--teacher_dtype", "float16") == 2


def test_a_method_without_a_teacher_takes_only_its_tokenizer(
    whole: Path, copied: Path, tool: Callable[..., int], text_file: Path, tmp_path: Path, trainers: list[Any]
) -> None:
    (copied / "model.safetensors").write_bytes(b"never read")
    flags = ["--method", "scratch", "--teacher", copied, "--train_file", text_file, "--max_steps", "1"]
    assert tool(*flags, "--output_dir", tmp_path / "run") == 0
    assert [trainer.teacher for trainer in trainers] == [None]
    made, expected = (load_model(folder, "student")[1].get_vocab() for folder in (tmp_path / "run", whole))
    assert made == expected


@pytest.mark.parametrize("kind", ["missing", "nan", "cut off"])
def test_a_checkpoint_that_is_not_whole_is_not_resumed_from(
    kind: str,
    tool: Callable[..., int],
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--method", "scratch", "--train_file", text_file, "--save_strategy", "steps", "--save_steps", "2"]
    flags += ["--output_dir", tmp_path / "run"]
    assert tool(*flags) == 0
    last = tmp_path / "run" / "checkpoint-4"
    if kind == "cut off":
        (last / "model.safetensors").write_bytes((last / "model.safetensors").read_bytes()[:-100])
    else:
        with_weights(last, WEIGHTS[kind][0])
    capsys.readouterr()
    code, said = tool(*flags, "--resume_from_checkpoint", "last"), capsys.readouterr()
    if kind == "cut off":  # which shows without reading it all, so the one before it is taken
        assert code == 0 and "checkpoint-4: its weights cannot be read" in said.out
    else:
        assert code == 2 and len(said.err.splitlines()) == 1 and QUERY in said.err and str(last) in said.err


# ---- Tokenizers ----


def without_tokenizer(folder: Path, *keep: str) -> None:
    for path in folder.glob("*token*"):
        if path.name not in keep:
            path.unlink()


@pytest.mark.parametrize("keep", ["", "tokenizer_config.json"])
def test_a_folder_without_a_tokenizer(
    keep: str,
    copied: Path,
    tool: Callable[..., int],
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    without_tokenizer(copied, keep)
    capsys.readouterr()
    flags = ["--method", "kd", "--teacher", copied, "--train_file", text_file, "--output_dir", tmp_path / "out"]
    assert tool(*flags) == 2
    error = capsys.readouterr().err
    assert f"teacher {copied} has no tokenizer: expected tokenizer.json or spiece.model" in error
    assert len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model(copied: Path, texts: list[str]) -> None:
    larger = train_tokenizer(texts, 600)
    larger.save_pretrained(copied)
    assert f"its tokenizer has {len(larger)} pieces, its embedding only 512" in refusal(copied)
    train_tokenizer(texts, 512).save_pretrained(copied)
    with_settings(copied / "config.json", eos_token_id=7)
    assert "its tokenizer's eos_token_id is 1, its config's 7" in refusal(copied)


def test_a_sentencepiece_model_alone_says_which_package_reads_it(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text("\n".join("abcdefgh"))
    options = {"input": str(tmp_path / "text"), "model_prefix": str(copied / "spiece"), "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(vocab_size=20, hard_vocab_limit=False, **options)
    (copied / "spiece.vocab").unlink()
    without_tokenizer(copied)
    monkeypatch.setitem(sys.modules, "google.protobuf", None)  # which makes its import fail
    assert "pip install protobuf" in refusal(copied)


def test_padding_on_the_left_is_undone(copied: Path) -> None:
    with_settings(copied / "tokenizer_config.json", padding_side="left", truncation_side="left")
    _, tokenizer = load_model(copied, "teacher")
    texts = [torch.arange(3, n) for n in (5, 9)]
    batch = pad(tokenizer)([{"input_ids": t, "attention_mask": torch.ones_like(t), "labels": t} for t in texts])
    assert batch["input_ids"][0].tolist() == [3, 4] + 6 * [tokenizer.pad_token_id]
    assert batch["labels"][0].tolist() == [3, 4] + 6 * [-100] and tokenizer.truncation_side == "right"


def test_a_tokenizer_is_known_by_what_it_does(whole: Path, tmp_path: Path, texts: list[str]) -> None:
    tokenizer = load_model(whole, "teacher")[1]
    tokenizer.save_pretrained(tmp_path / "again")
    with_settings(tmp_path / "again" / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert type(again) is not type(tokenizer) and fingerprint(again) == fingerprint(tokenizer)
    file = tmp_path / "again" / "tokenizer.json"
    settings = json.loads(file.read_text())
    others = {"lower case": {**settings, "normalizer": {"type": "Lowercase"}}}
    scores = [[piece, -len(piece) - 0.1 * i % 7] for i, (piece, _) in enumerate(settings["model"]["vocab"])]
    others["scores"] = {**settings, "model": {**settings["model"], "vocab": scores}}
    for kind, other in others.items():
        file.write_text(json.dumps(other))
        changed = AutoTokenizer.from_pretrained(tmp_path / "again")
        assert changed.get_vocab() == again.get_vocab(), kind
        assert fingerprint(changed) != fingerprint(again), kind


@pytest.mark.parametrize("column", ["source", "target"])
def test_texts_that_the_tokenizer_does_not_know(
    column: str,
    whole: Path,
    tool: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = {"source": "ta re mon", "target": "sil", column: "数字 三 个"}
    data, held_out = tmp_path / "rows.jsonl", tmp_path / "held_out.jsonl"
    for file, count in ((data, 40), (held_out, 4)):
        file.write_text("".join(json.dumps(row) + "\n" for _ in range(count)))
    flags = ["--method", "scratch", "--student", whole, "--task", "text2text", "--train_file", data]
    capsys.readouterr()
    assert tool(*flags, "--eval_file", held_out, "--output_dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"the tokenizer knows 0% of the characters of the {column}s" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


# ---- The decoder's start ----


def test_a_decoder_starts_from_padding_where_its_config_does_not_tell(
    copied: Path, tool: Callable[..., int], text_file: Path, tmp_path: Path, trainers: list[Any]
) -> None:
    with_settings(copied / "config.json", "decoder_start_token_id")
    (copied / "generation_config.json").unlink()
    flags = ["--method", "kd", "--teacher", copied, "--student", copied, "--train_file", text_file, "--max_steps", 1]
    assert tool(*flags, "--cache_dir", tmp_path / "empty", "--output_dir", tmp_path / "run") == 0
    assert [trainer.model.config.decoder_start_token_id for trainer in trainers] == [0, 0]
    with_settings(copied / "config.json", pad_token_id=None)
    assert "neither decoder_start_token_id nor pad_token_id" in refusal(copied)


# ---- Folders ----


def test_folders_that_hold_something_else(whole: Path, copied: Path) -> None:
    expected = f"has no config.json: expected a save_pretrained folder of a model; its folders {whole.name} have"
    assert expected in refusal(whole.parent)
    (copied / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in refusal(copied)
    (copied / "adapter_config.json").unlink()
    (copied / "config.json").write_text("{")
    assert "cannot load the teacher in" in refusal(copied)
