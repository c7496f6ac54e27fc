"""Whole runs of fastkd-train on every family: a student is distilled, loaded by plain transformers, and trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from families import TEXTS, folder, tokenizer

from fastkd.train import cli
from fastkd.train.common.family import KINDS

ROWS = [
    {"text": text, "source": text, "target": "the cat" if i % 2 else "a dog", "label": ("odd", "even")[i % 2],
     "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "the cat"}]}
    for i, text in enumerate(f"{number} {text}" for number in range(30) for text in TEXTS)
]  # fmt: skip
LANGUAGES = ["--source_lang", "en", "--target_lang", "ro", "--source_column", "source", "--target_column", "target"]
# (model type, kind, flags of task and method)
RUNS = {
    "bart summarises by HSM": ("bart", "seq2seq", ["--task", "summarization", "--method", "hsm-cka"]),
    "mbart translates": ("mbart", "seq2seq", ["--task", "translation", *LANGUAGES, "--method", "mlmkd"]),
    "marian translates": ("marian", "seq2seq", ["--task", "translation", *LANGUAGES, "--method", "miniend-d"]),
    "pegasus summarises": ("pegasus", "seq2seq", ["--task", "summarization", "--method", "miniend-e"]),
    "bert fills masks by MiniLM": ("bert", "masked", ["--task", "masked_lm", "--method", "minilm"]),
    "bert classifies by MixKD": ("bert", "classifier", ["--task", "classification", "--method", "mixkd"]),
    "roberta fills masks by HSM": ("roberta", "masked", ["--task", "masked_lm", "--method", "hsm-linear"]),
    "distilbert classifies": ("distilbert", "classifier", ["--task", "classification", "--method", "kd"]),
    "gpt2 goes on by HSM": ("gpt2", "causal", ["--task", "causal_lm", "--method", "hsm-kd"]),
    "qwen3 answers": ("qwen3", "causal", ["--task", "text2text", "--method", "mlmkd+minilm", "--relation_heads", "2"]),
    "qwen2 chats": ("qwen2", "causal", ["--task", "chat", "--method", "kd"]),
    "gemma2 goes on": ("gemma2", "causal", ["--task", "causal_lm", "--method", "mlmkd"]),
}


def ask(folder: Path) -> str:
    """Run the snippet of a model card; return the card."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    exec(code.replace("path/to/this/folder", str(folder)), {})
    return card


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_a_student_is_distilled_loaded_and_trained_on(name: str, tmp_path: Path) -> None:
    model_type, kind, flags = RUNS[name]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    auto, texts = getattr(transformers, KINDS[kind].auto), "--task" in flags and flags[1].endswith("_lm")
    common = ["--train_file", rows, "--use_cpu", "--disable_tqdm", "true", "--cache_dir", tmp_path / "cache"]
    common += ["--max_eval_examples", "8", "--eval_strategy", "no", "--save_strategy", "no"]
    common += ["--sequence_length", "24"] if texts else []

    def run(where: str, *words: object) -> dict[str, object]:
        out = tmp_path / where
        assert cli.main([str(word) for word in [*common, *words, "--output_dir", out]]) == 0, where
        metrics: dict[str, object] = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        made, found = auto.from_pretrained(out, output_loading_info=True)
        assert not found["missing_keys"] and not found["unexpected_keys"]
        assert all(x.isfinite().all() for x in made.parameters())
        transformers.AutoTokenizer.from_pretrained(out)
        return metrics

    task = flags[: flags.index("--method")]
    first = folder(model_type, tmp_path / "first", kind if kind != "classifier" else None)
    learn = ["--method", "scratch", "--learning_rate", "5e-3", "--max_steps", "40"]
    run("teacher", *task, *learn, "--student", first)
    metrics = run("student", *flags, "--teacher", tmp_path / "teacher", "--student_layers", "1", "--max_steps", "4")
    assert "NaN" not in json.dumps(metrics)
    run("again", *task, "--method", "scratch", "--student", tmp_path / "student", "--max_steps", "2")
    ask(tmp_path / "student")
    loaded = [auto.from_pretrained(tmp_path / where) for where in ("student", "again")]
    moved = [bool((a != b).any()) for a, b in zip(*(x.parameters() for x in loaded), strict=True)]
    assert any(moved)
    first_config = auto.from_pretrained(first).config if kind != "classifier" else loaded[0].config
    assert getattr(loaded[0].config, "use_cache", None) == getattr(first_config, "use_cache", None)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_a_baseline_without_a_teacher_is_of_the_family_that_was_named(name: str, tmp_path: Path) -> None:
    task = {"gpt2": "causal_lm", "bert": "masked_lm"}.get(name, "text2text")
    rows, given = tmp_path / "rows.jsonl", folder(name, tmp_path / "given")
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    words = ["--method", "scratch", "--teacher", given, "--task", task, "--train_file", rows, "--max_steps", "1"]
    words += ["--use_cpu", "--disable_tqdm", "true", "--max_eval_examples", "4", "--cache_dir", tmp_path / "cache"]
    words += ["--eval_strategy", "no", "--save_strategy", "no", "--output_dir", tmp_path / "out"]
    words += ["--sequence_length", "24"] if task.endswith("_lm") else []
    words += ["--generation_max_length", "7", "--generation_num_beams", "2"] if name == "gpt2" else []
    assert cli.main([str(word) for word in words]) == 0
    made, its = (transformers.AutoConfig.from_pretrained(where) for where in (tmp_path / "out", given))
    assert (made.model_type, made.vocab_size, made.hidden_size) == (its.model_type, its.vocab_size, its.hidden_size)
    assert made.num_hidden_layers == 1 and getattr(made, "use_cache", None) == getattr(its, "use_cache", None)
    norms = {"gpt2": "norm of decoder", "bert": "norm of encoder", "t5": "norms of encoder and decoder"}[name]
    assert f"gradient {norms} before clipping" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")

    said = ask(tmp_path / "out")
    assert "chunks.\n" in said if task.endswith("_lm") else "examples.\n" in said
    assert said.count("Its training data were") == 1
    if name != "bert":  # they write as they were judged
        longest = max(len(tokenizer(name)(target)["input_ids"]) for target in ("the cat", "a dog"))
        wanted = {"gpt2": (7, 2), "t5": (longest, 1)}[name]
        settings = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
        assert (settings.max_new_tokens, settings.num_beams) == wanted


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_padding_that_a_config_does_not_name_is_no_reason_for_a_warning(
    name: str, tool: Callable[..., int], tmp_path: Path, trainers: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """GPT-2's tokenizer names none either, and pads with its end. Its embedding learns that."""
    given, rows, out = folder(name, tmp_path / "given", pad_token_id=None), tmp_path / "rows.jsonl", tmp_path / "out"
    before = {path: path.read_bytes() for path in given.iterdir()}
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:80]), encoding="utf-8")
    transformers.logging.enable_propagation()
    transformers.logging.set_verbosity_warning()
    try:
        words = [
            "--method",
            "kd",
            "--teacher",
            given,
            "--task",
            "causal_lm",
            "--train_file",
            rows,
            "--eval_strategy",
            "no",
        ]
        assert tool(*words, "--max_steps", "1", "--output_dir", out) == 0
    finally:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_propagation()
    assert not [record.getMessage() for record in caplog.records if "PAD/BOS/EOS" in record.getMessage()]
    assert before == {path: path.read_bytes() for path in given.iterdir()}
    pads = tokenizer(name).pad_token_id if name == "qwen2" else tokenizer(name).eos_token_id
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.pad_token_id == loaded.generation_config.pad_token_id == pads
    assert trainers[-1].model.get_input_embeddings().padding_idx is None
