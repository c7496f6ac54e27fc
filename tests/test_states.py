"""fastkd.hidden_states and fastkd.targets: of every family, through every wrapper, and over several ranks."""

from __future__ import annotations

import copy
import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastkd

from .cases import distance, end_process, furthest
from .forks import Forks
from .test_heads import OF_TRANSFORMERS, logits_of, model_of, peft, transformers, with_lora

V = 61


def small(kind: str) -> Any:
    return model_of(kind, **({"decoder_start_token_id": 0} if "t5" in kind else {}))


def batch_of(model: Any, rows: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(3, V, (rows, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def stock_loss(model: Any, batch: dict[str, Tensor], **more: Any) -> Tensor:
    """The cross-entropy that transformers itself computes."""
    loss: Tensor = model(**batch, **more).loss
    return loss


def our_loss(model: Any, batch: dict[str, Tensor], num_items: Any = None) -> Tensor:
    hidden = fastkd.hidden_states(model, **batch)
    where = fastkd.targets(model, batch["labels"], num_items)
    return fastkd.linear_kl(hidden, fastkd.head(model), None, None, ce_weight=1.0, kd_weight=0.0, **where)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- families -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OF_TRANSFORMERS)
def test_the_head_makes_the_models_logits_of_them(kind: str):
    model = small(kind)
    batch = batch_of(model)
    if kind.startswith("blenderbot"):  # which does not say how it makes them of labels
        with pytest.raises(ValueError, match="inputs: expected decoder_input_ids, as Blenderbot"):
            fastkd.hidden_states(model, **batch)
        batch["decoder_input_ids"] = batch["input_ids"]
    hidden = fastkd.hidden_states(model, **batch)
    logits = model(**batch).logits
    assert hidden.requires_grad and hidden.shape[:2] == logits.shape[:2]
    torch.testing.assert_close(logits_of(fastkd.head(model), hidden), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "mt5", "bart", "gpt2", "qwen2", "gemma2", "bert", "roberta"])
def test_the_loss_and_its_gradients_are_the_models_own(kind: str):
    model = small(kind)
    batch = batch_of(model)
    wanted = gradients(model, stock := stock_loss(model, batch))
    found = gradients(model, ours := our_loss(model, batch))
    assert distance(ours, stock) <= 1e-6
    assert furthest(found, wanted) <= 1e-5


def test_inputs_are_the_models_own():
    model = small("t5")
    batch = batch_of(model)
    hidden = fastkd.hidden_states(model, **batch)
    decoder = model.prepare_decoder_input_ids_from_labels(batch.pop("labels"))
    assert torch.equal(fastkd.hidden_states(model, **batch, decoder_input_ids=decoder), hidden)
    with pytest.raises(
        ValueError, match="inputs: expected decoder_input_ids or labels, as T5ForConditionalGeneration has"
    ):
        fastkd.hidden_states(model, **batch)
    with torch.no_grad():
        assert not fastkd.hidden_states(model, **batch, decoder_input_ids=decoder).requires_grad


def test_the_model_is_left_as_it_was():
    model = model_of("gpt2")
    batch = batch_of(model)
    logits = model(**batch).logits
    fastkd.hidden_states(model, **batch)
    assert "forward" not in vars(model.lm_head) and not model._forward_hooks
    with pytest.raises(IndexError):
        fastkd.hidden_states(model, input_ids=torch.full((1, 2), 10**6))
    assert torch.equal(model(**batch).logits, logits) and not model._forward_hooks


def test_what_is_not_known_is_an_error():
    gpt2 = model_of("gpt2")
    ids = batch_of(gpt2)["input_ids"]
    for model, error in (
        (gpt2.transformer, "got GPT2Model, which has none"),
        (nn.Linear(2, 3), "got Linear with model_type None"),
        (nn.DataParallel(gpt2), "got DataParallel with model_type None"),
    ):
        with pytest.raises(ValueError, match=error):
            fastkd.hidden_states(model, input_ids=ids)
    with pytest.raises(ValueError, match=r"labels: expected \[B, L\], got \[14\]"):
        fastkd.targets(gpt2, ids.flatten())


def test_targets_count_as_the_trainer_does():
    labels = torch.tensor([[3, 4, -100]])
    causal, masked = (
        fastkd.targets(model_of("gpt2"), labels, 6),
        fastkd.targets(model_of("bert"), labels, 6, processes=3),
    )
    assert causal["labels"].tolist() == [[4, -100, -100]] and causal["normalizer"] == 6
    assert masked["labels"].tolist() == labels.tolist() and masked["normalizer"] == 2
    assert fastkd.targets(small("t5"), labels)["normalizer"] is None
    assert fastkd.targets(model_of("gpt2"), labels, torch.tensor(6))["normalizer"].item() == 6


# ---- wrappers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2", "t5", "bert"])
def test_a_compiled_model_is_compiled_once(kind: str):
    model = small(kind)
    batch = batch_of(model)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled: Any = torch.compile(model, backend=backend)
    wanted = gradients(model, our_loss(model, batch))
    for _ in range(2):
        found = gradients(model, our_loss(compiled, batch))
        assert furthest(found, wanted) <= 1e-5
    first = len(graphs)
    assert first > 0
    again = {**batch, "input_ids": batch["input_ids"].flip(1)}
    torch.testing.assert_close(fastkd.hidden_states(compiled, **again), fastkd.hidden_states(model, **again))
    assert len(graphs) == first


def test_adapters_of_peft_apply_and_learn():
    model = with_lora()
    batch = batch_of(model)
    wanted = gradients(model, stock := stock_loss(model, batch))
    found = gradients(model, ours := our_loss(model, batch))
    assert distance(ours, stock) <= 1e-6
    assert any("lora_B" in name for name in found)
    assert furthest(found, wanted) <= 1e-5


def test_a_head_among_modules_to_save():
    settings = peft().LoraConfig(target_modules=["c_attn"], modules_to_save=["lm_head"], fan_in_fan_out=True)
    model = peft().get_peft_model(model_of("gpt2", tie_word_embeddings=False), settings)
    batch = batch_of(model)
    wanted = gradients(model, stock_loss(model, batch))
    found = gradients(model, our_loss(model, batch))
    assert any("lm_head" in name for name in found)
    assert furthest(found, wanted) <= 1e-5


def test_gradient_checkpointing_changes_nothing():
    model = model_of("qwen2").train()
    batch = batch_of(model)
    wanted = gradients(model, our_loss(model, batch))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model, our_loss(model, batch))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_accelerate_gives_them_in_the_dtype_they_were_computed_in():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    model = model_of("gpt2")
    batch = batch_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = fastkd.hidden_states(model, **batch)
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    hidden = fastkd.hidden_states(prepared, **batch)
    assert hidden.dtype == wanted.dtype and torch.equal(hidden, wanted)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


# ---- several ranks --------------------------------------------------------------------------------------------------

WRAPPERS = ("ddp", "ddp-unused", "ddp-lora", "ddp-compiled", "fsdp")
RANKS, STEPS = 2, 5


def _model(wrapper: str) -> Any:
    return with_lora() if wrapper == "ddp-lora" else model_of("qwen2", tie_word_embeddings=wrapper == "fsdp")


def _trained(model: Any, wrapped: Any, rows: slice) -> list[Tensor]:
    """Train some steps on some rows of all; return the losses."""
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.05), []
    for _ in range(STEPS):
        batch = batch_of(model, 2 * RANKS)
        count = (batch["labels"][:, 1:] != -100).sum()
        loss = our_loss(wrapped, {name: x[rows] for name, x in batch.items()}, count)
        losses.append(loss.detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _rank(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timeout)
    mesh = init_device_mesh("cpu", (RANKS,))
    found = {}
    for wrapper in WRAPPERS:
        model = _model(wrapper)
        if wrapper == "fsdp":
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            wrapped: Any = fully_shard(model, mesh=mesh)
        else:
            wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=wrapper == "ddp-unused")
            wrapped = torch.compile(wrapped, backend="eager") if wrapper == "ddp-compiled" else wrapped
        losses = _trained(model, wrapped, slice(2 * rank, 2 * rank + 2))
        total = torch.stack(losses)
        dist.all_reduce(total)
        weights = {n: p.full_tensor() if wrapper == "fsdp" else p.detach() for n, p in model.named_parameters()}
        found[wrapper] = total / RANKS, weights
        del wrapped
    torch.save(found, f"{folder}/{rank}")
    end_process()


@pytest.mark.long
def test_weights_on_all_ranks_are_those_of_one_process(forks: Forks, tmp_path: Path):
    if not dist.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    forks.call(_rank, str(tmp_path), processes=RANKS)
    ranks = [torch.load(tmp_path / str(rank)) for rank in range(RANKS)]
    for wrapper in WRAPPERS:
        model = _model(wrapper)
        before = copy.deepcopy(dict(model.named_parameters()))
        losses = torch.stack(_trained(model, model, slice(None)))
        for found, weights in (rank[wrapper] for rank in ranks):
            assert distance(found, losses) <= 1e-5, wrapper
            for name, parameter in model.named_parameters():
                assert torch.equal(weights[name], ranks[0][wrapper][1][name]), (wrapper, name)
                if parameter.requires_grad:
                    assert not torch.equal(parameter, before[name])
                    assert distance(weights[name], parameter.detach()) <= 1e-5, (wrapper, name)


# ---- tensor parallelism ---------------------------------------------------------------------------------------------

WAYS = ("head", "layers", "transformers")  # what is sharded, by torch's styles or by a model's own plan


def test_rows_of_a_head_without_their_sharding_are_an_error():
    """As some versions of transformers leave them: the loss would be that of half a vocabulary."""
    model = model_of("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight[:31].detach())
    model.lm_head._hf_tp_plan = "colwise_gather_output"
    for sharding in (None, "vocabulary", "data"):
        with pytest.raises(ValueError, match=r"got 31 rows of one that transformers has spread .*vocab_group"):
            fastkd.head(model, sharding=sharding)


def _pair(folder: str) -> list[Any]:
    """A student and a teacher of which every matrix can be halved."""
    return [transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/{kind}") for kind in ("gemma2", "llama")]


def _parallel(model: Any, way: str, mesh: Any, folder: str) -> Any:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if way == "transformers":
        auto = transformers.AutoModelForCausalLM
        config = transformers.distributed.DistributedConfig(tp_size=RANKS, tp_plan="auto")
        return auto.from_pretrained(f"{folder}/{model.config.model_type}", distributed_config=config)
    plan: dict[str, Any] = {"lm_head": RowwiseParallel() if way == "rows" else ColwiseParallel()}
    if way == "layers":
        columns = [*(f"self_attn.{name}_proj" for name in "qkv"), "mlp.gate_proj", "mlp.up_proj"]
        plan |= {f"model.layers.*.{name}": ColwiseParallel() for name in columns}
        plan |= {f"model.layers.*.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    return parallelize_module(model, mesh, plan)


def _distilled(student: Any, teacher: Any, sharding: Any = None, teachers: Any = None) -> dict[str, Tensor]:
    """A loss and its gradients, whole."""
    batch = batch_of(student)
    with torch.no_grad():
        its = fastkd.hidden_states(teacher, **batch)
    hidden, head = fastkd.hidden_states(student, **batch), fastkd.head(student, sharding=sharding)
    where = fastkd.targets(student, batch["labels"])
    loss: Any = fastkd.linear_kl(hidden, head, its, fastkd.head(teacher, sharding=teachers), ce_weight=0.5, **where)
    found = {"loss": loss, **gradients(student, loss)}
    return {n: (x.full_tensor() if hasattr(x, "full_tensor") else x).detach() for n, x in found.items()}


def _tensor_parallel(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timeout)
    mesh, found = init_device_mesh("cpu", (RANKS,)), {}
    for way in WAYS:
        student, teacher = (_parallel(model, way, mesh, folder) for model in _pair(folder))
        if way == "transformers" and type(student.lm_head.weight) is nn.Parameter:  # as of older versions
            with pytest.raises(ValueError, match="rows of one that transformers has spread"):
                fastkd.head(student, sharding="vocabulary")
            student, teacher = (_parallel(model, "head", mesh, folder) for model in _pair(folder))
        assert type(student.lm_head.weight).__name__ == type(teacher.lm_head.weight).__name__ == "DTensor"
        found[way, "vocabulary"] = _distilled(student, teacher, "vocabulary", "vocabulary")
        found[way, "data"] = _distilled(student, _pair(folder)[1], "data")
    refused = {
        "unsaid": (student, teacher),
        "a whole teacher": (student, _pair(folder)[1], "vocabulary"),
        "rows": (_parallel(_pair(folder)[0], "rows", mesh, folder), teacher, "vocabulary", "vocabulary"),
    }
    for name, call in refused.items():
        try:
            _distilled(*call)
        except ValueError as error:
            found[name] = str(error)
    torch.save(found, f"{folder}/{rank}")
    end_process()


@pytest.mark.long
def test_heads_that_tensor_parallelism_shards(forks: Forks, tmp_path: Path):
    """On both ranks the loss and all gradients of one process, also where only the student is sharded, and gathered."""
    if not dist.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    for kind in ("gemma2", "llama"):
        model_of(kind, tie_word_embeddings=False, vocab_size=V + 1).save_pretrained(tmp_path / kind)
    forks.call(_tensor_parallel, str(tmp_path), processes=RANKS)
    expected = _distilled(*_pair(str(tmp_path)))
    says = {
        "unsaid": 'sharding: expected "data" or "vocabulary", as the head is a DTensor',
        "a whole teacher": "teacher_weight: expected a DTensor of placements (Shard(0),), as student_weight is one",
        "rows": "student_weight: expected placements (Shard(0),), the vocabulary over a one-dimensional mesh",
    }
    for rank in range(RANKS):
        found = torch.load(tmp_path / str(rank))
        for name, start in says.items():
            assert found.pop(name).startswith(start)
        assert len(found) == 2 * len(WAYS)
        for name, results in found.items():
            assert results.keys() == expected.keys(), name
            for parameter, x in expected.items():
                assert distance(results[parameter], x) <= 1e-5, (name, parameter)
