"""Models of every family: which kind a run is of, what loads, what a folder must hold, and slices of a teacher."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fastkd.train import plan
from fastkd.train.common.errors import InputError
from fastkd.train.common.family import FAMILIES, KINDS, family_of, kind_of
from fastkd.train.flags.fields import FastkdArguments
from fastkd.train.models import anatomy
from fastkd.train.models.loading import _empty, load_model, load_weights
from fastkd.train.models.student import is_tied, new_model, slice_teacher, smaller_config, student_config, with_classes
from fastkd.train.stages.given import Given, load_configs

each = pytest.mark.parametrize("model_type", families.SETTINGS)
each_kind = pytest.mark.parametrize(
    ("model_type", "kind"), [(x, kind) for x in families.SETTINGS for kind in family_of(families.config(x)).kinds]
)


def kinds(task: str, **models: Any) -> tuple[dict[str, Any], str]:
    """What a run with models of these configs, by their roles, is told."""
    flags: Any = {role: f"the-{role}" for role in models}
    return load_configs(FastkdArguments(task=task, **flags), {f"the-{role}": its for role, its in models.items()})


@each
def test_the_kind_follows_from_family_and_task(model_type: str) -> None:
    row = next(row for row in FAMILIES if model_type in row.model_types)
    texts = {"seq2seq": "span_corruption", "causal": "causal_lm", "masked": "masked_lm"}[row.kinds[0]]
    assert kinds(texts, student=families.config(model_type))[1] == row.kinds[0]
    labelled = "classifier" if "classifier" in row.kinds else row.kinds[0]
    for task in ("sst2", "classification"):
        configs, kind = kinds(task, student=families.config(model_type))
        assert kind == kind_of(configs["student"]) == labelled and not Given(configs, kind=kind).classes
    others = {"span_corruption", "causal_lm", "masked_lm"} - {texts}
    for task in (*others, *(["text2text", "translation"] if row.kinds[0] == "masked" else [])):
        with pytest.raises(InputError, match=rf"--task {task}: the teacher the-teacher is a {row.name}: expected"):
            kinds(task, teacher=families.config(model_type))


def test_a_checkpoint_that_tells_its_classes_is_asked_for_them() -> None:
    told = families.config("bert", architectures=["BertForSequenceClassification"], id2label={0: "no", 1: "yes"})
    configs, kind = kinds("sst2", teacher=told, student=families.config("roberta"))
    assert kind == "classifier" and Given(configs, kind=kind).classes == ["no", "yes"]
    assert configs["student"].architectures == ["RobertaForSequenceClassification"]
    assert list(configs["student"].id2label.values()) == ["", ""]
    configs, kind = kinds("stsb", student=families.config("roberta"))  # a score has one output
    assert configs["student"].num_labels == 1 and Given(configs, kind=kind).classes == [""]
    configs, kind = kinds("masked_lm", teacher=told)
    assert kind == kind_of(configs["teacher"]) == "masked" and not Given(configs, kind=kind).classes


def test_models_that_do_not_go_together() -> None:
    bert, bart, gpt2, t5 = map(families.config, ("bert", "bart", "gpt2", "t5"))
    with pytest.raises(InputError, match=r"the student the-student is a GPT-2 and learns as causal, not seq2seq: "):
        kinds("text2text", teacher=bart, student=gpt2)
    with pytest.raises(InputError, match=r"the teacher the-teacher has no head for classes: .*--student the-teacher"):
        kinds("sst2", teacher=bert, student=bert)
    for task in ("masked_lm", "causal_lm"):
        with pytest.raises(InputError, match=f"--task {task}: a model made from nothing is a T5: expected --teacher"):
            kinds(task)
    with pytest.raises(InputError, match=r"the student the-student is a BERT.*expected T5s beside --architecture"):
        flags = FastkdArguments(task="sst2", student="the-student", architecture="enct5")
        load_configs(flags, {"the-student": bert})
    assert kinds("text2text", teacher=bart, student=t5)[1] == "seq2seq"


# ---- Loading ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of tiny models, by type and kind, each made once."""
    root = tmp_path_factory.mktemp("families")

    def folder(model_type: str, kind: str | None = None) -> Path:
        where = root / f"{model_type}-{kind or family_of(families.config(model_type)).kinds[0]}"
        return where if where.is_dir() else families.folder(model_type, where, kind)

    return folder


def changed(folder: Path, where: Path, settings: dict[str, Any] | None = None, **weights: Any) -> Path:
    """A copy of a folder with other settings in its config; weights: by name, None for one that is to be missing."""
    where.mkdir()
    for path in folder.iterdir():
        (where / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (where / "config.json").write_text(json.dumps(config | (settings or {})))
    kept = {name: x for name, x in (load_file(folder / "model.safetensors") | weights).items() if x is not None}
    save_file(kept, where / "model.safetensors", metadata={"format": "pt"})
    return where


def refusal(folder: Path, role: str = "teacher") -> str:
    """The one line for a folder that cannot be loaded."""
    with pytest.raises(InputError) as error:
        load_model(folder, role)
    assert "\n" not in str(error.value) and str(folder) in str(error.value) and role in str(error.value)
    return str(error.value)


@each_kind
def test_what_was_saved_is_what_is_loaded(model_type: str, kind: str, folders: Callable[..., Path]) -> None:
    before, folder = torch.get_rng_state(), folders(model_type, kind)
    torch.set_rng_state(before)
    model, tokenizer = load_model(folder, "teacher")
    unsaved = _empty(model.config, model.dtype, is_tied(model))  # whose weights other processes send
    assert all(torch.equal(unsaved.get_buffer(k), x) for k, x in model.named_buffers() if k not in model.state_dict())
    assert anatomy.kind(model) == kind and torch.equal(torch.get_rng_state(), before)
    plain = getattr(transformers, KINDS[kind].auto).from_pretrained(folder).state_dict()
    assert plain.keys() == model.state_dict().keys()
    assert all(torch.equal(plain[name], x) for name, x in model.state_dict().items())
    assert tokenizer.padding_side == "right" and tokenizer(["a bus", "a"], padding=True)["input_ids"]


@pytest.mark.parametrize("model_type", ["t5", "bart", "bert", "roberta", "distilbert", "gpt2", "llama", "gemma2"])
def test_weights_and_numbers_that_are_bad(model_type: str, folders: Callable[..., Path], tmp_path: Path) -> None:
    folder, row = folders(model_type), family_of(families.config(model_type))
    names = list(load_file(folder / "model.safetensors"))
    name = next(name for name in names if re.search(r"\.1\.", name) and name.endswith("weight"))
    assert f"lacks {name}: expected the weights of its config" in refusal(
        changed(folder, tmp_path / "a", **{name: None})
    )
    other = name.replace(".1.", ".7.")
    said = refusal(changed(folder, tmp_path / "b", **{other: torch.ones(2)}))
    assert f"has, unlike its config, {other}" in said
    config = json.loads((folder / "config.json").read_text())
    field = next(x for x in ("initializer_factor", "init_std", "initializer_range") if x in config)
    said = refusal(changed(folder, tmp_path / "c", {field: -1.0}))
    named = f"its config's {field} is -1.0 ({row.name}'s own: " in said and f"makes no {row.name} that works" in said
    assert named or f"Validation error for field '{field}'" in said  # by newer configs themselves
    refusal(changed(folder, tmp_path / "d", {row.heads[0]: 0}))
    if row.name != "T5":  # whose heads have a width of their own
        said = refusal(changed(folder, tmp_path / "e", {row.heads[0]: 5}))
        assert re.search(r"makes no|cannot load|for \(40, 32\)", said), said


def test_a_family_that_is_not_known(folders: Callable[..., Path], tmp_path: Path) -> None:
    said = refusal(changed(folders("bert"), tmp_path / "albert", {"model_type": "albert"}))
    assert "got 'albert'" in said and "GPT-2 (gpt2)" in said and "a row in fastkd/train/common/family.py" in said


def test_a_head_of_its_own_that_is_missing(tmp_path: Path) -> None:
    folder = families.folder("llama", tmp_path / "untied", tie_word_embeddings=False)
    assert not is_tied(load_model(folder, "teacher")[0])
    assert "lacks lm_head.weight" in refusal(changed(folder, tmp_path / "lacks", **{"lm_head.weight": None}))


def test_a_decoder_without_padding_pads_with_its_end(folders: Callable[..., Path], tmp_path: Path) -> None:
    """But its embedding is not told so, or it would learn nothing of the ends between texts."""
    folder = changed(folders("llama"), tmp_path / "llama", {"pad_token_id": None})
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model, tokenizer = load_model(folder, "teacher")
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    assert model.config.pad_token_id is None and model.get_input_embeddings().padding_idx is None
    several = changed(folder, tmp_path / "several", {"eos_token_id": [7, tokenizer.eos_token_id]})
    assert load_model(several, "teacher")[1].eos_token == "</s>"
    assert "eos_token_id is 2, its config's [7, 8]" in refusal(
        changed(folder, tmp_path / "x", {"eos_token_id": [7, 8]})
    )


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert"])
def test_an_encoder_gets_a_head_for_classes(model_type: str, folders: Callable[..., Path], tmp_path: Path) -> None:
    """Of random weights by the seed, above all that it has; one that lacks anything else is refused."""
    base = transformers.AutoModel.from_pretrained(folders(model_type))
    base.save_pretrained(tmp_path / "base")
    for folder in (folders(model_type), tmp_path / "base"):
        configs, kind = load_configs(FastkdArguments(task="sst2", student=str(folder)))
        made = []
        for seed in (1, 1, 2):
            given = load_weights(folder, "student", configs["student"], seed=seed)
            made.append(with_classes(given, ["no", "so so", "yes"], seed))
        model, states = made[0], [x.state_dict() for x in made]
        assert kind == "classifier" == anatomy.kind(model) and model.config.id2label[2] == "yes"
        assert anatomy.head_of(model).weight.shape == (3, families.WIDTH)
        head = [name for name in states[0] if not name.startswith(model.base_model_prefix)]
        assert head and all(torch.equal(states[0][name], x) for name, x in states[1].items())
        assert not any(torch.equal(states[2][name], states[0][name]) for name in head if "weight" in name)
        below = base.state_dict() if folder.name == "base" else load_file(folder / "model.safetensors")
        shared = [f"{model.base_model_prefix}." + name for name in below] if folder.name == "base" else list(below)
        kept = [(x, y) for x, y in zip(shared, below, strict=True) if x in states[0]]
        assert len(kept) > 20 and all(torch.equal(states[0][mine], below[its]) for mine, its in kept)
    lacks = changed(folders(model_type), tmp_path / "lacks", **{next(name for name in shared if ".1." in name): None})
    configs, _ = load_configs(FastkdArguments(task="sst2", student=str(lacks)))
    with pytest.raises(InputError, match=r"the checkpoint of student .* lacks .*\.1\."):
        load_weights(lacks, "student", configs["student"])


def test_a_checkpoint_of_pre_training_has_more_heads_than_one(tmp_path: Path) -> None:
    """As bert-base-uncased, which says that it is a BertForMaskedLM."""
    torch.manual_seed(0)
    model = transformers.BertForPreTraining(families.config("bert", **families.fitting("bert")))
    model.save_pretrained(tmp_path / "bert")
    families.tokenizer("bert").save_pretrained(tmp_path / "bert")
    folder = changed(tmp_path / "bert", tmp_path / "told", {"architectures": ["BertForMaskedLM"]})
    made, _ = load_model(folder, "teacher")
    assert type(made).__name__ == "BertForMaskedLM"
    assert all(torch.equal(model.state_dict()[name], x) for name, x in made.state_dict().items())
    base = changed(
        folder, tmp_path / "base", **{name: None for name in model.state_dict() if name.startswith("cls.pre")}
    )
    assert "lacks cls.predictions" in refusal(base)


def test_what_no_model_reads_may_be_no_floats(folders: Callable[..., Path], tmp_path: Path) -> None:
    """Masks and positions, which older versions of transformers saved; but for weights that are whole numbers."""
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool) for layer in range(2)}
    gpt2 = changed(folders("gpt2"), tmp_path / "gpt2", **masks)
    assert torch.equal(
        logits(load_model(gpt2, "teacher")[0], "causal"), logits(load_model(folders("gpt2"), "a")[0], "causal")
    )
    load_model(
        changed(folders("bert"), tmp_path / "bert", **{"bert.embeddings.position_ids": torch.arange(64)[None]}), "a"
    )
    name = "h.0.attn.c_attn.weight"
    whole = {f"transformer.{name}": torch.ones(32, 96, dtype=torch.int8)}
    assert f"as no floats, transformer.{name} (I8)" in refusal(changed(folders("gpt2"), tmp_path / "int8", **whole))


# ---- Students ----


def part(name: str, source: torch.Tensor, student: Any, teacher: Any) -> torch.Tensor:
    """The part of a teacher's parameter that a student gets, number by number."""
    mine, its = student.config, teacher.config
    index = [list(range(n)) for n in student.state_dict()[name].shape]
    if "c_attn" in name:  # [inputs, queries + keys + values]
        index[-1] = [third * its.n_embd + i for third in range(3) for i in range(mine.n_embd)]
    elif kv := getattr(mine, "num_key_value_heads", None):
        each, of = mine.num_attention_heads // kv, its.num_attention_heads // its.num_key_value_heads
        heads = [group * of + i for group in range(kv) for i in range(each)]
        rows = [head * mine.head_dim + i for head in heads for i in range(mine.head_dim)]
        if ".q_proj." in name:
            index[0] = rows
        elif ".o_proj.weight" in name:
            index[1] = rows
    return source[tuple(torch.meshgrid(*map(torch.tensor, index), indexing="ij"))]


def saved_whole(model: Any, where: Path) -> Any:
    """A model as plain transformers load what was saved, of which nothing is missing and nothing is left over."""
    model.save_pretrained(where)
    auto = getattr(transformers, KINDS[anatomy.kind(model)].auto)
    made, found = auto.from_pretrained(where, output_loading_info=True)
    assert not any(found.values()), found
    return made.eval()


def logits(model: Any, kind: str) -> torch.Tensor:
    """What a model says of a batch."""
    inputs = families.batch(kind)
    labels = inputs.pop("labels")
    if kind == "seq2seq":
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


@each_kind
def test_a_slice_is_the_first_part_of_everything(model_type: str, kind: str, tmp_path: Path) -> None:
    depths = family_of(families.config(model_type)).depths.values()
    teacher = families.model(model_type, kind, **dict.fromkeys(depths, 3))
    teacher.config.architectures = [type(teacher).__name__]
    student = new_model(smaller_config(teacher.config, 16, 2), 1, tied=is_tied(teacher)).eval()
    before = {name: x.clone() for name, x in student.state_dict().items()}
    slice_teacher(student, teacher)
    for name, found in student.state_dict().items():
        found_in = re.fullmatch(r"(\D*\b(?:block|layers?|h)\.)1(\..*)", name)
        its = f"{found_in[1]}2{found_in[2]}" if found_in else name  # of two the second, of three the third
        expected = part(name, teacher.state_dict()[its], student, teacher)
        if "embed_positions" in name and model_type in ("marian", "pegasus"):  # computed of the width
            expected = before[name]
        assert torch.equal(found, expected), name
    assert anatomy.shape_of(student) == anatomy.shape(student.config) and student.config.hidden_size == 16
    heads = [getattr(student.config, name) * 2 for name in student_heads(student)]
    assert heads == [getattr(teacher.config, name) for name in student_heads(student)]
    assert torch.equal(logits(saved_whole(student, tmp_path / "student"), kind), logits(student, kind))


def student_heads(model: Any) -> tuple[str, ...]:
    """The fields of a model's config that count heads."""
    return anatomy.family(model).heads


@each_kind
def test_a_slice_of_the_same_shape_is_a_copy(model_type: str, kind: str) -> None:
    teacher = families.model(model_type, kind)
    teacher.config.architectures = [type(teacher).__name__]
    student = new_model(smaller_config(teacher.config, None, 2), 1, tied=is_tied(teacher)).eval()
    assert not torch.equal(logits(student, kind), logits(teacher, kind))
    slice_teacher(student, teacher)
    assert torch.equal(logits(student, kind), logits(teacher, kind))


def test_queries_keep_their_head_of_keys() -> None:
    """A student with all heads of keys and half of the queries has half of each group."""
    teacher = families.model("qwen2", hidden_size=64, num_attention_heads=8, head_dim=8)
    config = smaller_config(teacher.config, None, 2)
    config.num_attention_heads = 4
    student = new_model(config, 1, tied=is_tied(teacher))
    slice_teacher(student, teacher)
    for name, found in student.state_dict().items():
        assert torch.equal(found, part(name, teacher.state_dict()[name], student, teacher)), name
    config.num_attention_heads, config.num_key_value_heads = 8, 1
    with pytest.raises(ValueError, match=r"expected model.layers.0.self_attn.q_proj.weight of at most \(64, 64\), the"):
        slice_teacher(new_model(config, 1), teacher)
    rows = student.state_dict()["model.layers.0.self_attn.q_proj.weight"].view(4, 8, 64)
    source = teacher.state_dict()["model.layers.0.self_attn.q_proj.weight"].view(8, 8, 64)
    assert torch.equal(rows, source[[0, 1, 4, 5]])


def test_sizes_that_a_slice_cannot_have() -> None:
    with pytest.raises(ValueError, match=r"student_d_model: expected a multiple of 8, at which .*, got 20"):
        smaller_config(families.config("bert"), 20, None)
    grouped = families.config("qwen2", hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    with pytest.raises(ValueError, match=r"student_d_model: expected a multiple of 16, .* their groups .*, got 24"):
        smaller_config(grouped, 24, None)
    single = families.config("gemma", num_key_value_heads=1)  # which serves all queries, however many
    assert smaller_config(single, 16, None).num_key_value_heads == 1
    with pytest.raises(ValueError, match="student_layers: expected at most 2, the teacher's"):
        smaller_config(families.config("gpt2"), None, 3)
    bert, roberta = families.model("bert"), families.model("roberta")
    with pytest.raises(ValueError, match="student: expected a model of the teacher's kind"):
        slice_teacher(bert, roberta)


@each
def test_a_new_student_of_random_weights_may_be_larger(model_type: str, tmp_path: Path) -> None:
    teacher = families.config(model_type)
    config = student_config(teacher, 64, 3)
    if not family_of(config).name.endswith("T5"):
        assert config.vocab_size == families.VOCABULARY and config.model_type == model_type
        assert getattr(config, family_of(config).heads[0]) == 2 * families.HEADS
    made = new_model(config, 3)
    again = saved_whole(new_model(config, 3), tmp_path / "student")
    assert all(torch.equal(again.state_dict()[name], x) for name, x in made.state_dict().items())
    assert set(anatomy.shape(config).depths.values()) == {3} and anatomy.shape(config).width == 64


@pytest.mark.parametrize(
    ("model_type", "task", "length"),
    [("marian", "text2text", 64), ("bert", "masked_lm", 24), ("gpt2", "text2text", 48), ("gemma2", "causal_lm", 24)],
)
def test_a_run_of_any_family_can_be_planned(
    model_type: str, task: str, length: int, folders: Callable[..., Path]
) -> None:
    """From the folder's config alone, in lengths of its kind and no more positions than there are."""
    limits = "--max_source_length 16 --max_target_length 32" if task == "text2text" else "--sequence_length 24"
    limits = limits.replace("16", "128") if model_type == "marian" else limits
    words = f"--method hsm-cka --teacher {folders(model_type)} --task {task} {limits} --student_d_model 16 --use_cpu"
    flags, args = plan._parsed(words.split())
    held = plan.plan(flags, args, device="cpu").moments["update"]
    teacher, _ = load_model(folders(model_type), "teacher")
    student = new_model(smaller_config(teacher.config, 16, None), 0)
    for name, model in (("student's weights", student), ("teacher's weights", teacher)):
        assert held[name] == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert plan.batch(flags, args, anatomy.kind(teacher), 64)["input_ids"].shape[1] == length
