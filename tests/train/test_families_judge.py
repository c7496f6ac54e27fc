"""What models of every family write, what it is worth, and what they cost, against loops and sums written out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from fastkd.train.common.family import KINDS, family_of
from fastkd.train.judge import cost
from fastkd.train.judge.evaluate import begins, generate
from fastkd.train.judge.metrics import score_rows
from fastkd.train.models import anatomy
from fastkd.train.report.card import write_card
from fastkd.train.report.outcome import Outcome

EVERY = [(name, kind) for name in families.SETTINGS for kind in family_of(families.config(name)).kinds]
ANSWERS = [(name, kind) for name, kind in EVERY if KINDS[kind].answers]
TARGETS = {"bart": "<s> $A </s>", "mbart": "$A </s> w90", "marian": "$A </s>", "pegasus": "$A </s>"}  # of mBART-25
SOURCES = [[5, 6, 7, 8, 9], [30, 11], [40], [50, 60, 70, 80]]
VOCABULARY, WIDTH, INNER, TOKENS = families.VOCABULARY, families.WIDTH, 64, 128


def words(template: str = "$A") -> Any:
    """A tokenizer with a word for each id, w5 to w95, that writes the template around a text."""
    names = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(4, VOCABULARY))]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    around = [(name, i) for i, name in enumerate(names) if name in template.split()]
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, extra_special_tokens=["w90"], **special)


def lively(name: str, kind: str, **changes: Any) -> Any:
    """A tiny model that says something else of every text."""
    changes |= {"decoder_start_token_id": 1} if name == "pegasus" else {}  # from </s> it would go on with </s>
    model = families.model(name, kind, {"mbart": 1, "marian": 9}.get(name, 0), **changes)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        for parameter in model.parameters():
            parameter.mul_(5 if parameter is embedding else 4 if parameter.dim() > 1 else 1)
        if kind == "classifier":
            texts = torch.arange(5, 95).view(10, 9)
            anatomy.head_module(model).bias.sub_(model(texts).logits.mean(0))
        elif hasattr(model, "final_logits_bias"):
            model.final_logits_bias.mul_(0.1)
    return model


def by_hand(model: Any, kind: str, source: list[int], begins: list[int], most: int) -> list[int]:
    """The likeliest token, again and again; begins: what a decoder of its own is given."""
    written = list(source if kind == "causal" else begins)
    read = len(written) if kind == "causal" else 1
    while len(written) < read + most and written[-1:] != [2]:
        ids = torch.tensor([written])
        inputs = {"input_ids": ids} if kind == "causal" else {"input_ids": [source], "decoder_input_ids": ids}
        with torch.no_grad():
            logits = model(**{name: torch.as_tensor(value) for name, value in inputs.items()}).logits
        written.append(int(logits[0, -1].argmax()))
    return written[read:]


@pytest.mark.parametrize(("name", "kind"), ANSWERS)
def test_what_is_written_is_the_likeliest(name: str, kind: str) -> None:
    """In one batch, of sources that differ in length; with what stands before every target."""
    model, tokenizer = lively(name, kind), words(TARGETS.get(name, "$A </s>"))
    begins = {"bart": [2, 0], "mbart": [90]}.get(name, [getattr(model.config, "decoder_start_token_id", 0) or 0])
    every = [by_hand(model, kind, source, begins, 6) for source in SOURCES]
    expected = [" ".join(f"w{i}" for i in ids if i > 3 and i != 90) for ids in every]
    own = model.generation_config.to_dict()
    assert generate(model, tokenizer, SOURCES, batch_size=4, max_new_tokens=6) == expected
    assert len(set(expected)) == 4 and model.generation_config.to_dict() == own


def test_what_stands_before_targets_is_not_left_to_the_model() -> None:
    """BART's <s> and, as mBART-50 has it, a language's code, whatever else the model would begin with."""
    for template, code in (("<s> $A </s>", 0), ("w90 $A </s>", 90)):
        model, seen = families.model("bart", seed=4), []
        model.model.decoder.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True
        )
        generate(model, words(template), [[5, 6]], batch_size=1, max_new_tokens=3)
        assert seen[0] == [[2]] and seen[1][0][-1] == code


def test_no_more_is_written_than_there_are_positions() -> None:
    model, prompt = families.model("gpt2", seed=4), [5 + i for i in range(61)]
    (text,) = generate(model, words(), [prompt], batch_size=2, max_new_tokens=9)
    assert len(text.split()) == 3


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_a_classifier_gives_the_likeliest_class(name: str) -> None:
    model = lively(name, "classifier", id2label={0: "no", 1: "yes", 2: "may be"})
    texts = [list(range(5, 5 + n)) for n in (9, 3, 5, 7)] + [[70, 80], [90, 6, 50]]
    with torch.no_grad():
        expected = [model.config.id2label[int(model(torch.tensor([ids])).logits.argmax())] for ids in texts]
    assert generate(model, words(), texts, batch_size=4, max_new_tokens=1) == expected and len(set(expected)) > 1


def test_a_single_output_is_a_number() -> None:
    model = families.model("bert", "classifier", seed=1, num_labels=1)
    texts = [list(range(5, 5 + n)) for n in (9, 3, 5, 7)]
    written = generate(model, words(), texts, batch_size=4, max_new_tokens=1)
    with torch.no_grad():
        expected = [float(model(torch.tensor([ids])).logits) for ids in texts]
    assert [float(text) for text in written] == pytest.approx(expected, rel=1e-5)
    order = [f"{rank:.1f}" for rank in torch.tensor(expected).argsort().argsort().tolist()]
    assert score_rows(["stsb"] * 4, written, order) == {"spearman": pytest.approx(100)}


def test_pairs_of_sentences_are_told_apart() -> None:
    model, ids = families.model("bert", "classifier", seed=1, num_labels=1), [[5, 6, 7, 8], [9, 10]]
    types = [[0, 0, 1, 1], [0, 1]]
    written = generate(model, words(), ids, batch_size=2, max_new_tokens=1, token_types=types)
    with torch.no_grad():
        expected = [
            float(model(torch.tensor([i]), token_type_ids=torch.tensor([t])).logits)
            for i, t in zip(ids, types, strict=True)
        ]
    assert [float(text) for text in written] == pytest.approx(expected, rel=1e-5)
    assert written != generate(model, words(), ids, batch_size=2, max_new_tokens=1)


# ---- Costs ----


def test_published_gflops() -> None:
    """BERT-base's 10.9 of MiniDisc and MiniLM; GPT-2's transposed matrices, which are as many, count as well."""
    with torch.device("meta"):
        bert = transformers.BertForSequenceClassification(transformers.BertConfig())
        masked = transformers.BertForMaskedLM(transformers.BertConfig())
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config())
        bart = transformers.BartForConditionalGeneration(transformers.BartConfig())
    layers = 128 * 12 * 12 * 768**2 / 1e9
    assert f"{cost.gflops(bert):.1f}" == "10.9"
    assert cost.gflops(bert) == pytest.approx(layers + 768**2 / 1e9, rel=1e-12)  # the pooler reads one token
    assert cost.gflops(masked) == cost.gflops(gpt2) == pytest.approx(layers, rel=1e-12)
    assert cost.gflops(bart) == pytest.approx(128 * 12 * (12 + 16) * 1024**2 / 1e9, rel=1e-12)


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_every_matrix_counts_for_what_it_reads(name: str, kind: str) -> None:
    """By what each one was given in a forward pass of 5 tokens, and 3 where there is a decoder of its own."""
    model, found = families.model(name, kind), dict.fromkeys(("base", "all"), 0)
    hooks = []
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D):

            def count(module: Any, inputs: Any, output: Any, path: str = path) -> None:
                work = module.weight.numel() * inputs[0].shape[:-1].numel()
                found["all"] += work
                found["base"] += work if path.startswith(("model.", "bert.", "roberta.", "distilbert.", "transformer.",
                                                          "encoder.", "decoder.")) else 0  # fmt: skip

            hooks.append(module.register_forward_hook(count))
    inputs = {"input_ids": torch.arange(5, 10)[None]}
    inputs |= {"decoder_input_ids": torch.arange(5, 8)[None]} if kind == "seq2seq" else {}
    model(**inputs)
    answers = {"seq2seq": 3, "classifier": 1}.get(kind, 5)
    assert cost.multiply_accumulates(model, 5, answers) == found["base"] > 0
    assert cost.multiply_accumulates(model, 5, answers, head=True) == found["all"] > found["base"]


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_a_pass_of_every_family_is_measured(name: str, kind: str) -> None:
    """Of as many tokens as there are positions, which are fewer than 128 here."""
    measured = cost.measure(families.model(name, kind), passes=1)
    assert measured.latency_ms > 0 and measured.peak_memory_mb > 0


# ---- Figures ----


def test_figures_are_those_of_text_to_text_models() -> None:
    """The classes of GLUE's tasks are the words that T5 writes."""
    said = ["equivalent", "not_equivalent", "equivalent", "equivalent"]
    right = ["equivalent", "equivalent", "not_equivalent", "equivalent"]
    assert score_rows(["mrpc"] * 4, said, right) == {"f1": pytest.approx(200 / 3), "accuracy": 50}
    tasks = ["mnli_matched", "mnli_matched", "mnli_mismatched"]
    found = score_rows(tasks, ["neutral", "neutral", "entailment"], ["neutral", "entailment", "entailment"])
    assert found == {"mnli_matched_accuracy": 50, "mnli_mismatched_accuracy": 100}


# ---- Cards ----

CARDS = [  # type, kind, task, more of the config
    ("bart", "seq2seq", "summarization", {}),
    ("mbart", "seq2seq", "translation", {}),
    ("gpt2", "causal", "text2text", {"n_positions": 160}),
    ("qwen2", "causal", "chat", {"max_position_embeddings": 160}),
    ("bert", "masked", "masked_lm", {}),
    ("roberta", "classifier", "mrpc", {"id2label": {0: "no", 1: "yes"}}),
    ("bert", "classifier", "stsb", {"num_labels": 1}),
]


@pytest.mark.parametrize(("name", "kind", "task", "changes"), CARDS)
def test_the_card_of_a_model_says_how_it_is_asked(
    name: str, kind: str, task: str, changes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its snippet runs in plain transformers, and prints what the model is judged by."""
    families.folder(name, tmp_path, kind, **changes)
    model = getattr(transformers, KINDS[kind].auto).from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for setting, value in begins(model, tokenizer).items():  # as a run saves it
        setattr(model.generation_config, setting, value)
    if KINDS[kind].answers:
        model.generation_config.max_new_tokens = 64
    model.save_pretrained(tmp_path)
    facts = {"task": task} | ({"reads": "pairs of texts"} if kind == "classifier" else {})
    facts |= {"source_lang": "en_XX", "target_lang": "de"} if task == "translation" else {}
    outcome = Outcome("kd", 1000, 1, 0.1, 1.0, 0.5, [])
    write_card(tmp_path, "both", "./teacher", [outcome], facts)
    card = ModelCard.load(tmp_path / "README.md")
    shown = {"bart": "BART", "mbart": "mbart", "gpt2": "GPT-2", "bert": "BERT", "roberta": "RoBERTa"}.get(name, name)
    assert f"# A {shown} distilled" in card.text and "T5" not in card.text and name in card.data.get("tags")
    assert card.data.get("language") == (["en", "de"] if task == "translation" else None)
    code = re.findall(r"```python\n(.*?)\n```", card.text, re.DOTALL)[0]
    assert "fastkd" not in code and f"import {KINDS[kind].auto}," in code
    capsys.readouterr()
    exec(code.replace("path/to/this/folder", str(tmp_path)), {})
    printed = capsys.readouterr().out[:-1]
    if kind == "masked":
        assert printed == tokenizer.decode(_filled(model, tokenizer))
        return
    source = tokenizer("your text", *["and another"] * (kind == "classifier"))
    if task == "chat":
        source = tokenizer.apply_chat_template([{"role": "user", "content": "your text"}], add_generation_prompt=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    types = [source["token_type_ids"]] if kind == "classifier" and "token_type_ids" in source else None
    (expected,) = generate(model, tokenizer, [source["input_ids"]], batch_size=1, max_new_tokens=64, token_types=types)
    assert float(printed) == pytest.approx(float(expected), rel=1e-4) if task == "stsb" else printed.strip() == expected


def _filled(model: Any, tokenizer: Any) -> list[int]:
    """The likeliest token at the mask."""
    ids = tokenizer(f"Paris is the {tokenizer.mask_token} of France.")["input_ids"]
    with torch.no_grad():
        return [int(model(torch.tensor([ids])).logits[0, ids.index(tokenizer.mask_token_id)].argmax())]
