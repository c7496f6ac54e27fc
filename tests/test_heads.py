"""fastkd.head: what makes a model's logits, of families of transformers, with adapters, and over several ranks."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastkd
from fastkd.heads import KNOWN, MASKED

from .cases import distance, end_process, installed
from .forks import Forks

transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64, "decoder_start_token_id": 0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": None, "n_embd": 16, "n_head": 2,
    "n_layer": 1, "attention_types": [[["global"], 1]], "num_local_experts": 2, "num_experts_per_tok": 1,
    "attention_type": "original_full",
}  # fmt: skip
OF_IMAGES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "depth": 1,
    "embed_dim": 16, "num_heads": 2, "image_size": 28, "patch_size": 14, "out_hidden_size": 16,
    "fullatt_block_indexes": [0], "deepstack_visual_indexes": [0],
}  # fmt: skip
NOT_TRIVIAL = {"logit_scale": 0.3, "logits_scaling": 1.7, "final_logit_softcapping": 0.5}


def _small(config: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """What of these sizes a configuration has, and its kind."""
    return {"model_type": config.model_type, **{name: x for name, x in sizes.items() if hasattr(config, name)}}


def model_of(kind: str, **settings: Any) -> Any:
    """A small model with random weights, whose logits go through all that the family does to them."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind)
    parts = {"text_config": {**SIZES, **NOT_TRIVIAL}, "vision_config": OF_IMAGES}
    if "text_config" in config.sub_configs:
        given = {name: _small(getattr(config, name), sizes) for name, sizes in parts.items()}
        if kind.startswith("qwen"):
            given["text_config"]["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 1, 1]}
        auto = transformers.AutoModelForImageTextToText
    else:
        given = _small(config, parts["text_config"])
        encoder_decoder = getattr(config, "is_encoder_decoder", False)
        auto = transformers.AutoModelForSeq2SeqLM if encoder_decoder else transformers.AutoModelForCausalLM
        auto = transformers.AutoModelForMaskedLM if kind in MASKED else auto
    config = type(config)(**given | settings)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model


def hidden_and_logits(model: Any) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(0))
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    output = model(input_ids=ids, output_hidden_states=True, use_cache=False, **decoder)
    states = output.decoder_hidden_states if decoder else output.hidden_states
    return states[-1], output.logits


def logits_of(head: fastkd.Head, hidden: Tensor) -> Tensor:
    logits = nn.functional.linear(head.scale * hidden, head.weight, head.bias)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


OF_TRANSFORMERS = sorted(kind for kind in KNOWN if not kind.startswith("fastkd"))  # the others: tests/train


@pytest.mark.parametrize("kind", [kind for kind in OF_TRANSFORMERS if kind not in MASKED])
def test_a_known_model_has_the_logits_of_its_head(kind: str):
    model = model_of(kind)
    hidden, logits = hidden_and_logits(model)
    torch.testing.assert_close(logits_of(fastkd.head(model), hidden), logits, rtol=1e-5, atol=1e-5)


def test_an_untied_t5_has_no_scale():
    model = model_of("t5", tie_word_embeddings=False)
    hidden, logits = hidden_and_logits(model)
    assert fastkd.head(model).scale == 1
    torch.testing.assert_close(logits_of(fastkd.head(model), hidden), logits)


def test_linear_kl_takes_heads():
    torch.manual_seed(0)
    student, teacher = nn.Linear(8, 31), nn.Linear(12, 31)
    h_s, h_t = torch.randn(5, 8, requires_grad=True), torch.randn(5, 12)
    heads = fastkd.head(student)._replace(scale=0.5, softcap=3.0), fastkd.head(teacher)._replace(scale=2.0)
    one, two = heads
    loss = fastkd.linear_kl(h_s, one, h_t, two)
    wanted = fastkd.linear_kl(
        h_s, one.weight, h_t, two.weight, student_bias=one.bias, teacher_bias=two.bias, student_scale=0.5,
        teacher_scale=2.0, student_softcap=3.0,
    )  # fmt: skip
    assert torch.equal(loss, wanted) and torch.equal(fastkd.nn.LinearKLLoss()(h_s, one, h_t, two), wanted)
    loss.backward()
    assert student.weight.grad is not None and student.bias.grad is not None and teacher.weight.grad is None
    for name, value in {"bias": torch.zeros(31), "scale": 2.0, "softcap": 4.0}.items():
        given = "Tensor" if name == "bias" else value  # and not all of its numbers
        with pytest.raises(ValueError, match=f"teacher_{name}: expected nothing, as .* is a Head .* got {given}; head"):
            fastkd.linear_kl(h_s, one, h_t, two, **{f"teacher_{name}": value})


class _Custom(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_what_is_not_known_is_an_error():
    model = model_of("gpt2")
    model.lm_head = _Custom(16, 61)
    with pytest.raises(TypeError, match=r"expected a head that is a torch\.nn\.Linear, got _Custom, whose forward"):
        fastkd.head(model)
    with pytest.raises(ValueError, match="model_type None: what follows its head"):
        fastkd.head(nn.Sequential(nn.Linear(2, 3)))
    own = type("Own", (transformers.GPT2LMHeadModel,), {"forward": lambda self, **kwargs: None})
    with pytest.raises(ValueError, match="got Own with a forward pass of its own"):
        fastkd.head(own(model.config))
    with pytest.raises(ValueError, match="got GPT2Model, which has none"):
        fastkd.head(model.transformer)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got Tensor"):
        fastkd.head(torch.zeros(3, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='sharding: expected None, "data" or "vocabulary"'):
        fastkd.head(nn.Linear(2, 3), sharding="fsdp")  # type: ignore[arg-type]


# ---- adapters -------------------------------------------------------------------------------------------------------


def peft() -> Any:
    return installed("peft")


def with_lora(model: Any = None, **settings: Any) -> Any:
    torch.manual_seed(1)
    model = model_of("llama") if model is None else model
    config = peft().LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": ["lm_head"], "task_type": "CAUSAL_LM"} | settings
    )
    model = peft().get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model.eval()


def stock(model: Any, loss_of: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = loss_of()
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adapters", [["default"], ["default", "other"], ["other"]])
def test_lora_gets_the_gradients_of_its_own_forward_pass(adapters: list[str]):
    model = with_lora()
    model.add_adapter("other", peft().LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(adapters)
    assert len(gradients_as_its_own(model)) == 2 * len(adapters)


def gradients_as_its_own(model: Any) -> dict[str, Tensor]:
    """Those of a loss from a model's hidden states and its Head, which are those of its logits."""
    teacher = torch.randn(14, 9)
    weight = torch.randn(61, 9)

    def of_logits() -> Tensor:
        return fastkd.logit_kl(hidden_and_logits(model)[1].reshape(14, -1), teacher @ weight.T)

    def of_hidden() -> Tensor:
        return fastkd.linear_kl(hidden_and_logits(model)[0].reshape(14, -1), fastkd.head(model), teacher, weight)

    (loss, wanted), (got_loss, got) = stock(model, of_logits), stock(model, of_hidden)
    assert distance(got_loss, loss) <= 1e-6
    assert got.keys() == wanted.keys()
    for name, gradient in got.items():
        assert distance(gradient, wanted[name]) <= 1e-6, name
    return got


def test_dora_gets_the_gradients_of_its_own_forward_pass():
    model = with_lora(use_dora=True)
    gradients = gradients_as_its_own(model)
    assert len(gradients) == 3 and sum("magnitude" in name for name in gradients) == 1
    model.merge_adapter()
    hidden, logits = hidden_and_logits(model)
    torch.testing.assert_close(logits_of(fastkd.head(model), hidden), logits)


def test_adapters_that_are_merged_disabled_or_in_the_heads_place():
    model = with_lora()
    hidden, logits = hidden_and_logits(model)
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(fastkd.head(model), hidden), hidden_and_logits(model)[1])
    model.merge_adapter()
    torch.testing.assert_close(logits_of(fastkd.head(model), hidden), logits)
    model.base_model.disable_adapter_layers()
    module = model.get_base_model().lm_head
    module.merged_adapters = ["default"]
    with pytest.raises(ValueError, match="disabled adapters that are not merged"):
        fastkd.head(model)

    saved = with_lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        saved.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2)
    hidden, logits = hidden_and_logits(saved)
    torch.testing.assert_close(logits_of(fastkd.head(saved), hidden), logits)
    assert fastkd.head(saved).weight.requires_grad
    with saved.disable_adapter():
        hidden, logits = hidden_and_logits(saved)
        torch.testing.assert_close(logits_of(fastkd.head(saved), hidden), logits)


def test_adapters_that_no_weight_stands_for():
    dropping = with_lora(lora_dropout=0.1)
    assert isinstance(fastkd.head(dropping), fastkd.Head)
    with pytest.raises(ValueError, match="expected lora_dropout of 0 on the head"):
        fastkd.head(dropping.train())
    two = with_lora(use_dora=True)
    two.add_adapter("other", peft().LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    two.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="or DoRA of a single adapter, got DoraLinearVariant"):
        fastkd.head(two)
    other = peft().get_peft_model(
        model_of("llama"), peft().IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    )
    with pytest.raises(TypeError, match=r"got peft\.tuners\.ia3\.layer\.Linear; merge the adapter"):
        fastkd.head(other)


# ---- several ranks --------------------------------------------------------------------------------------------------


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 31)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).tanh()


def _loss(model: Any, data: Tensor, sharding: Any = None) -> Tensor:
    torch.manual_seed(4)
    teacher = nn.Linear(6, 31)
    return fastkd.linear_kl(model(data), fastkd.head(model.head, sharding=sharding), data, fastkd.head(teacher))


def _rank(rank: int, folder: str, ranks: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timeout)
    mesh = init_device_mesh("cpu", (ranks,))
    data = torch.randn(ranks, 5, 6, generator=torch.Generator().manual_seed(5))
    found = {}
    for sharding in ("seen", "data"):
        model = _Model()
        if sharding == "seen":
            fully_shard(model.head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        _loss(model, data[rank], None if sharding == "seen" else "data").backward()
        found[sharding] = {name: p.grad.full_tensor() for name, p in model.named_parameters()}  # type: ignore[union-attr]
    model = _Model()
    for name in ("weight", "bias"):
        x = distribute_tensor(getattr(model.head, name).detach(), mesh, [Shard(0)])
        setattr(model.head, name, nn.Parameter(x))
    try:
        fastkd.head(model.head)
    except ValueError as error:
        found["error"] = str(error)
    found["vocabulary"] = fastkd.head(model.head, sharding="vocabulary").weight is model.head.weight
    torch.save(found, f"{folder}/{rank}")
    end_process()


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_head_that_fsdp_has_sharded(ranks: int, forks: Forks, tmp_path: Path):
    """Every gradient is that of one process with the data of all ranks."""
    if not dist.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    forks.call(_rank, str(tmp_path), ranks, processes=ranks)
    model = _Model()
    _loss(model, torch.randn(ranks, 5, 6, generator=torch.Generator().manual_seed(5))).backward()
    for rank in range(ranks):
        found = torch.load(tmp_path / str(rank))
        for sharding in ("seen", "data"):
            for name, parameter in model.named_parameters():
                assert distance(found[sharding][name], parameter.grad) <= 1e-6, (sharding, name)  # type: ignore[arg-type]
        assert found["error"].startswith('sharding: expected "data" or "vocabulary", as the head is a DTensor')
        assert found["vocabulary"]
