"""What a plan says that a step holds, against what steps of DistillTrainer do hold; and how planning is asked for."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import Dataset
from transformers import TrainerCallback, default_data_collator

from benchmarks.trainer import plans
from fastkd.train import plan
from fastkd.train.flags.arguments import parse
from fastkd.train.judge import cost
from fastkd.train.minidisc.candidates import CandidateTrainer
from fastkd.train.minidisc.prune import sliced
from fastkd.train.models.architectures import enct5_config
from fastkd.train.models.student import new_model, t5_config
from fastkd.train.training.trainer import DistillTrainer

TOLERANCE = 0.06
MIB = 2**20

# ---- the numbers in a model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("t5-small", 60_506_624), ("t5-base", 222_903_552), ("google-t5/t5-large", 737_668_096),
        ("t5-3b", 2_851_598_336), ("t5-11b", 11_307_321_344),
        ("google/flan-t5-small", 76_961_152), ("google/flan-t5-base", 247_577_856),
        ("google/t5-v1_1-large", 783_150_080), ("google/flan-t5-xl", 2_849_757_184),
        ("google/flan-t5-xxl", 11_135_332_352),
    ],
)  # fmt: skip
def test_well_known_models_have_their_published_parameters(name: str, parameters: int) -> None:
    with FakeTensorMode():
        assert cost.parameters(new_model(plan.PUBLISHED[name], 0, plan._is_tied(plan.PUBLISHED[name]))) == parameters


# ---- what a step holds -----------------------------------------------------------------------------------------------


class Ids(Dataset):
    """Random examples of the shapes of a batch, in which every fourth lacks the last token where there is a mask."""

    def __init__(self, batch: dict[str, torch.Tensor], rows: int):
        self.ids = {name: torch.randint(2, rows, (64, ids.shape[1])) for name, ids in batch.items()}
        if "attention_mask" in batch:
            self.ids["attention_mask"] = torch.ones_like(self.ids["input_ids"])
            self.ids["attention_mask"][::4, -1] = 0
        if batch["labels"].shape[1] == 1:
            self.ids["labels"] %= 2  # classes

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: ids[index] for name, ids in self.ids.items()}


def bytes_of(trainer: DistillTrainer) -> int:
    """Bytes of all that is there between two steps: weights and the optimiser's state."""
    models = [model for model in (trainer.model, trainer.teacher) if model is not None]
    assert trainer.optimizer is not None
    tensors = [tensor for model in models for tensor in model.parameters()]
    tensors += [x for state in trainer.optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


class SecondStep(TrainerCallback):
    """Leaves in `peak` the most bytes that torch's allocator has given out at a time in the second step.

    All that operators take on the way counts, whether it is a result or not, and in the backward pass too.
    """

    def __init__(self, trainer: DistillTrainer):
        self.trainer, self.peak = trainer, 0
        self.recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.held = bytes_of(self.trainer)
            self.recorded.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.recorded.__exit__(None, None, None)
            for event in self.recorded.profiler.kineto_results.events():
                if event.name() == "[memory]":
                    self.held += event.nbytes()
                    self.peak = max(self.peak, self.held)


def planned_trainer(
    folder: Path,
    flags: str,
    sizes: tuple[int, int] | None,
    teacher_sizes: tuple[int, int],
    rows: int,
    gated: bool = False,
) -> tuple[plan.Plan, DistillTrainer]:
    """The plan of two steps by these flags, and their trainer.

    sizes: width and layers; of a student without, the teacher is pruned. rows: of the embeddings.
    """
    configs = {"student": t5_config(rows, *(sizes or teacher_sizes)), "teacher": t5_config(rows, *teacher_sizes)}
    words = ["--use_cpu", "--max_steps", "2", "--disable_tqdm", "true", "--save_strategy", "no"]
    for role, config in configs.items():
        config.feed_forward_proj = "gated-gelu" if gated else "relu"
        config.is_gated_act, config.dense_act_fn = gated, "gelu_new" if gated else "relu"
        if "enct5" in flags:
            configs[role] = config = enct5_config(config, ["no", "yes"])
        config.save_pretrained(folder / role)
        words += [f"--{role}", str(folder / role)] if sizes or role == "teacher" else []
    words += ["--eval_strategy", "no", "--output_dir", str(folder / "out"), *flags.split()]
    ours, args = parse(words, needs_data=False)
    dtype = torch.bfloat16 if ours.teacher_dtype == "bfloat16" else torch.float32
    teacher, objective = new_model(configs["teacher"], 1).to(dtype), {"method": ours.objective}
    planned = plan.plan(ours, args, device="cpu")
    candidates = plan.models(ours, FakeTensorMode())[2] if ours.objective.prunes else None
    objective |= {"workspace_mb": ours.workspace_mb, "teacher": teacher}
    if candidates:
        objective |= {"model": sliced(teacher, candidates[min(candidates)]), "candidates": candidates}
    else:
        objective["model"] = new_model(configs["student"], 0)
    trainer = (CandidateTrainer if candidates else DistillTrainer)(
        args=args,
        train_dataset=Ids(plan.batch(ours, args, "classifier" if "enct5" in flags else "seq2seq", 10**6), rows),
        data_collator=default_data_collator,
        **objective,
    )
    return planned, trainer


PAIRS = "--task text2text --max_source_length {} --max_target_length {}"
RECOMPUTED = "--gradient_checkpointing true"
BATCH = "--per_device_train_batch_size"
# Each is large in another part of the count. The last number: rows of the embeddings.
STEPS: dict[str, tuple[Any, ...]] = {
    "vocabulary": (f"--method kd --sequence_length 64 {BATCH} 2", (128, 1), (128, 1), 32128),
    "vocabulary, 16 bits": (f"--method kd --sequence_length 64 {BATCH} 4 --bf16", (128, 1), (128, 1), 16384),
    "workspace": (f"--method kd {BATCH} 8 {PAIRS.format(32, 128)}", (128, 2), (128, 1), 4096),
    "small workspace": (f"--method mlmkd --workspace_mb 4 {BATCH} 8 {PAIRS.format(32, 96)}", (128, 2), (128, 1), 2048),
    "activations": (f"--method mlmkd {BATCH} 8", (256, 2), (256, 1), 512),
    "activations, 16 bits": (f"--method kd {BATCH} 8 --bf16 --teacher_dtype bfloat16", (256, 2), (256, 1), 512),
    "decoder": (f"--method kd {BATCH} 4 {PAIRS.format(128, 96)}", (256, 2), (128, 2), 512),
    "recomputed": (f"--method kd {BATCH} 8 {RECOMPUTED}", (128, 3), (128, 1), 512),
    "recomputed, 16 bits": (
        f"--method kd {BATCH} 4 {PAIRS.format(128, 96)} --bf16 {RECOMPUTED}", (256, 2), (128, 1), 512,
    ),
    "relations": (f"--method miniend-d --relation_heads 32 {BATCH} 8 {PAIRS.format(128, 128)}", (64, 1), (256, 1), 512),
    "relations, recomputed": (f"--method miniend-e --relation_heads 4 {BATCH} 8 {RECOMPUTED}", (128, 2), (256, 1), 512),
    "cka": (f"--method hsm-cka {BATCH} 8 {PAIRS.format(64, 64)}", (128, 2), (256, 3), 512),
    "cka, 16 bits": (f"--method hsm-cka {BATCH} 16 --sequence_length 64 --bf16", (128, 2), (256, 2), 1024),
    "cka of few tokens": (f"--method hsm-cka {BATCH} 2 --sequence_length 64", (128, 2), (256, 3), 512),
    "linear": (f"--method hsm-linear {BATCH} 8 --sequence_length 64", (128, 2), (256, 2), 512),
    "teacher": (f"--method mlmkd {BATCH} 16", (64, 1), (256, 2), 512),
    "teacher, autocast": (f"--method mlmkd {BATCH} 16 --bf16", (64, 1), (256, 2), 512),
    "gated teacher, autocast": (f"--method mlmkd {BATCH} 8 --bf16", (64, 1), (256, 2), 512, True),
    "gated": (f"--method scratch {BATCH} 8", (128, 2), (64, 1), 512, True),
    "gated, 16 bits": (f"--method scratch {BATCH} 8 --bf16", (128, 2), (64, 1), 512, True),
    "sgd": (f"--method kd {BATCH} 4 --sequence_length 64 --optim sgd", (256, 2), (128, 1), 512),
    "adafactor": (f"--method kd {BATCH} 4 --sequence_length 64 --optim adafactor", (256, 2), (128, 1), 512),
    "mixed examples": (f"--method mixkd {BATCH} 8 --sequence_length 64", (128, 2), (128, 2), 2048),
    "mixed examples, 16 bits": (
        f"--method mixkd-tmkd --mixup_distance divergence {BATCH} 16 --bf16", (128, 2), (128, 1), 512,
    ),
    "mixed examples, small workspace": (
        f"--method mixkd-tmkd --workspace_mb 4 {BATCH} 8 {PAIRS.format(32, 64)}", (64, 1), (64, 1), 2048,
    ),
    "pruned": (f"--method minidisc --target_sparsity 0.6 {BATCH} 8", None, (256, 2), 512),
    "pruned, sandwiched": (
        f"--method minidisc --sandwich_size 2 {BATCH} 8 {PAIRS.format(64, 64)} --bf16", None, (128, 2), 512, True,
    ),
    "pruned at once": (f"--method prune-pkd --target_sparsity 0.5 {BATCH} 4", None, (256, 2), 1024),
    "classes": (f"--method kd --architecture enct5 {BATCH} 8 {PAIRS.format(128, 8)}", (256, 2), (256, 3), 1024),
    "classes, hidden states": (
        f"--method hsm-cka --architecture enct5 {BATCH} 8 {PAIRS.format(64, 8)} --bf16", (128, 2), (256, 2), 512,
    ),
    "pruned classes": (
        f"--method minidisc --architecture enct5 --target_sparsity 0.7 {BATCH} 8 {PAIRS.format(64, 8)}",
        None, (128, 2), 512,
    ),
    "accumulated": (
        f"--method kd {BATCH} 2 --sequence_length 64 --gradient_accumulation_steps 2", (256, 2), (128, 1), 4096,
    ),
    "weights": (f"--method kd {BATCH} 2 --sequence_length 32", (256, 2), (256, 3), 512),
}  # fmt: skip


# What others are large in, too.
LONG = {
    "vocabulary, 16 bits", "small workspace", "activations", "decoder", "recomputed, 16 bits", "cka of few tokens",
    "teacher, autocast", "gated", "sgd", "weights", "mixed examples, small workspace", "pruned at once",
    "pruned classes", "classes, hidden states", "gated teacher, autocast", "cka, 16 bits", "mixed examples, 16 bits",
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.long] * (x in LONG)) for x in STEPS])
def test_a_step_holds_what_was_planned(name: str, tmp_path: Path) -> None:
    planned, trainer = planned_trainer(tmp_path, *STEPS[name])
    second = SecondStep(trainer)
    trainer.add_callback(second)
    trainer.train()
    assert planned.peak == pytest.approx(second.peak, rel=TOLERANCE)


def resident(name: str) -> int:
    """Bytes of memory that the system has given to this process: now by "VmRSS", at most so far by "VmHWM"."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def print_planned_and_resident(folder: Path) -> None:
    """Print the bytes that a step's plan says, and those by which training makes this process larger."""
    torch.set_num_threads(1)
    flags = f"--method kd --sequence_length 64 {BATCH} "
    for part in ("first", "second"):
        (folder / part).mkdir()
    planned_trainer(folder / "first", flags + "2", (64, 1), (64, 1), 512)[1].train()  # loads and compiles what it needs
    before = resident("VmRSS")
    planned, trainer = planned_trainer(folder / "second", flags + "2", (384, 1), (384, 1), 32128)
    trainer.train()
    print(f"planned {planned.peak:.0f} resident {resident('VmHWM') - before}")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of a process")
@pytest.mark.long
def test_a_process_grows_by_what_was_planned(tmp_path: Path) -> None:
    """Beside what lives the system counts what the allocator keeps for later, and what libraries take."""
    here = Path(__file__)
    code = f"import sys; sys.path.insert(0, {str(here.parent)!r}); from pathlib import Path; import {here.stem} as t\n"
    code += f"t.print_planned_and_resident(Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = re.search(r"planned (\d+) resident (\d+)", done.stdout)
    assert found is not None, done.stdout
    assert int(found[1]) == pytest.approx(int(found[2]), rel=0.15)


# ---- several processes, which are counted alone ----------------------------------------------------------------------

SHARDED = "--config miniend-e --teacher google/flan-t5-small --use_cpu --bf16 --teacher_dtype bfloat16"


@functools.cache
def one_step() -> dict[str, dict[str, float]]:
    return plan.step(*parse(SHARDED.split(), needs_data=False), "cuda")


def planned(*flags: str, processes: int = 1) -> plan.Plan:
    ours, args = parse([*SHARDED.split(), *flags], needs_data=False)
    return plan.spread(one_step(), args.fsdp, ours.teacher_sharding, processes)


def test_shards_of_weights_and_of_what_is_learnt_of_them() -> None:
    alone, shared = planned("--fsdp"), planned("--fsdp", processes=8)
    for moment, items in alone.moments.items():
        for name in ("student's weights", "teacher's weights", "optimiser"):
            assert shared.moments[moment][name] == items[name] / 8
        for name in ("student's activations", "teacher's activations", "loss"):
            assert name == "student's activations" or shared.moments[moment][name] == items[name]
    assert shared.moments["update"]["gradients"] == alone.moments["update"]["gradients"] / 8
    assert alone.moments["teacher"]["teacher's weights"] == 2 * 76_961_152
    block = 512 * (8 * 384 + 3 * 1024 + 3)
    gathered = shared.moments["teacher"]["communication"] - shared.moments["update"]["communication"]
    assert gathered == 2 * (2 * block + 2 * 32128 * 512 + 2 * 512)


def test_ddp_holds_all_of_the_student_and_buckets_of_its_gradients() -> None:
    alone, shared = planned(), planned("--teacher_sharding", "none", processes=8)
    for moment, items in alone.moments.items():
        buckets = items["student's weights"]
        assert shared.moments[moment] == {**items, "communication": buckets}
    assert shared.peak == alone.peak + buckets


# ---- what a GPU does otherwise, which is counted alone ---------------------------------------------------------------


def test_a_gpu_takes_powers_in_fp32_and_all_weights_at_once(tmp_path: Path) -> None:
    """Of gelu_new's way through a frozen layer 12 bytes a neuron and token at most, where a CPU has 10."""
    config = t5_config(512, 64, 1)
    config.feed_forward_proj, config.is_gated_act, config.dense_act_fn = "gated-gelu", True, "gelu_new"
    config.save_pretrained(tmp_path)
    flags = f"--method kd --teacher {tmp_path} --student_layers 1 --sequence_length 64 {BATCH} 8 --bf16 --use_cpu"
    flags += " --optim adamw_torch"
    by = {device: plan.plan(*parse(flags.split(), needs_data=False), device=device) for device in ("cpu", "cuda")}
    powers = [by[device].moments["teacher"]["teacher's activations"] for device in by]
    tokens = plan.batch(*parse(flags.split(), needs_data=False), "seq2seq", 10**6)["input_ids"].numel()
    assert powers[1] - powers[0] == 2 * tokens * config.d_ff
    update = by["cuda"].moments["update"]
    rest = update["student's weights"] - 4 * 512 * 64  # the embedding, of another learning rate, is taken by itself
    assert update["optimiser"] == pytest.approx(2 * update["student's weights"] + rest, rel=0.01)


# ---- the command line ------------------------------------------------------------------------------------------------


def test_a_run_that_fits_needs_no_network(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("fastkd.train.stages.given.load_config", lambda *_: pytest.fail("asked the hub"))
    flags = "--config miniend-e --teacher t5-small --fp16 --processes 64 --memory_gb 80"
    assert plan.main(flags.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = plan.plan(*parse([*flags.split()[:4], "--bf16", "--use_cpu"], needs_data=False), 64)
    assert lines[0].split()[:3] == ["GiB", "teacher", "loss"]
    assert lines[-2].split() == ["sum", *(f"{expected.total(m) / plan.GIB:.2f}" for m in expected.moments)]
    assert lines[-1].startswith(f"fits: {expected.peak / plan.GIB:.2f} of 80 GiB")


def test_a_run_that_does_not_fit_is_told_what_would(capsys: Any, tmp_path: Path) -> None:
    t5_config(512, 512, 2).save_pretrained(tmp_path)
    words = f"--method kd --teacher {tmp_path} --student_d_model 128 --student_layers 1 {BATCH} 16".split()
    several = ["--processes", "8", "--memory_gb", "0.1"]
    assert plan.main([*words, "--teacher_sharding", "none", *several]) == 1
    verdict = capsys.readouterr().out.split("does not fit: ")[1].splitlines()
    assert "of 0.1 GiB at most (teacher)" in verdict[0]
    fits = {line.split(" fits")[0].rsplit(maxsplit=1)[0].strip() for line in verdict[1:] if line.endswith(" fits")}
    for flag in fits:
        assert (
            plan.main(
                [*words, *([] if "sharding" in flag else ["--teacher_sharding", "none"]), *flag.split(), *several]
            )
            == 0
        )
    assert {"--teacher_dtype bfloat16", "--teacher_sharding full"} <= fits
    assert any(flag.startswith("--per_device_train_batch_size") for flag in fits)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give --demo, --method or --config"),
        ("--method kd --processes 0", "--processes and --memory_gb must be above 0"),
        ("--method kd --optim adafloor", "adafloor"),
        ("--method kd --teacher t5-small --optim rmsprop", "--optim: adamw_torch, adamw_torch_fused, adafactor"),
        ("--method minidisc --teacher t5-small --weights decoder_self=1", "no term 'decoder_self'"),
        ("--method mixkd --teacher t5-small --architecture enct5", "the teacher t5-small is of another, t5"),
        ("--method minilm --teacher t5-small --relation_heads 3", "relation_heads: expected a divisor of 512 and"),
        ("--method kd --student_init slice --teacher t5-small --student_d_model 1024", "at most 512, the teacher's"),
        ("--method kd --teacher ./nowhere", "no teacher folder ./nowhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_said_in_one_line(flags: str, message: str, capsys: Any) -> None:
    assert plan.main(flags.split()) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1
    assert said.err.startswith("fastkd.train.plan: ") and message in said.err


def test_the_table_of_large_teachers(monkeypatch: Any) -> None:
    monkeypatch.setattr(plans, "step", lambda *_: one_step())  # their own are those of the documentation
    header, _, *rows = plans.table().splitlines()
    assert len(rows) == 9 and {row.count("|") for row in [header, *rows]} == {12}
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert sum(map(float, cells[2:8])) == pytest.approx(float(cells[8]), abs=0.04)
        assert cells[-1] == ("yes" if float(cells[8]) <= 80 else "no")
