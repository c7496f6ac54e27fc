"""MiniDisc: candidates learn together and the best goes on; schedules end in a dense student, and resume."""

from __future__ import annotations

import copy
import itertools
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_flags import with_inputs
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, TrainerCallback

from fastkd.train.common.errors import InputError
from fastkd.train.data.tasks import TASKS, figure_names
from fastkd.train.flags.arguments import parse
from fastkd.train.flags.fields import GRID, parse_grid
from fastkd.train.minidisc.candidates import CandidateTrainer
from fastkd.train.minidisc.prune import narrowed, normalised, order_of, parts, sliced, widths_at
from fastkd.train.minidisc.schedule import Candidate, Round, Schedule, Trial
from fastkd.train.models import architectures as models
from fastkd.train.objectives.methods import METHODS
from fastkd.train.runs import pruned

WORDS = {"fruit": "apple pear plum fig", "metal": "iron gold zinc tin", "tree": "oak elm ash yew"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The flags of a task that a tiny model learns: three classes, each of words of its own."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 120), ("dev", 30)):
        rows = []
        for i in range(count):
            label = list(WORDS)[i % 3]
            words = WORDS[label].split()
            picked = [words[j] for j in torch.randint(0, 4, (5,), generator=generator)]
            rows.append(json.dumps({"text": f"{' '.join(picked)} {i}", "label": label}))
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return ["--task", "classification", "--train_file", folder / "train.jsonl", "--eval_file", folder / "dev.jsonl"]


# 2 heads of 32 in each of 2 + 2 * 1 attentions of an EncT5, and 256 neurons in each of 3 feed-forward layers.
TEACHER = ["--teacher_d_model", "64", "--teacher_layers", "2", "--teacher_steps", "60", "--architecture", "enct5"]
# Evaluated at steps 2, 4 and 6, and as seldom in the teacher's training.
ROUNDS = ["--max_steps", "6", "--eval_steps", "0.3", "--max_source_length", "24"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "cache"


@pytest.fixture(scope="module")
def run(tool: Callable[..., int], data: list[Any], cache: Path) -> Callable[..., int]:
    """run(folder, flag, value, ...): a pruning run that shares its cache, and so its teacher, with the others."""
    return lambda out, *flags: tool(*data, *TEACHER, *ROUNDS, "--cache_dir", cache, "--output_dir", out, *flags)


_SIZES: dict[str, Any] = {
    "vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1,
    "decoder_start_token_id": 0,
}  # fmt: skip
_FULL = {
    "encoder.block.0.layer.0.SelfAttention": 2,
    "encoder.block.0.layer.1.DenseReluDense": 32,
    "decoder.block.0.layer.0.SelfAttention": 2,
    "decoder.block.0.layer.1.EncDecAttention": 2,
    "decoder.block.0.layer.2.DenseReluDense": 32,
}
_NARROW = {"encoder.block.0.layer.0.SelfAttention": 1, "decoder.block.0.layer.2.DenseReluDense": 8}


def schedule_of(folder: Path) -> Schedule:
    return Schedule.from_json(json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["schedule"])


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def forget_rounds(cache: Path, name: str) -> None:
    """Give the rounds in a cache other names, so that none is reused."""
    for folder in cache.glob("round-*"):
        folder.rename(folder.with_name(f"moved-{name}-{folder.name}"))


# ---- Candidates ------------------------------------------------------------------------------------------------------


@pytest.fixture
def make(
    tiny: Callable[..., Any], dataset: Any, tokenizer: Any, arguments: Callable[..., Any]
) -> Callable[..., CandidateTrainer]:
    """make(flags, **options): a trainer of three nested candidates of a T5 without dropout."""

    def build(*flags: str, sparsities: tuple[float, ...] = (0.25, 0.5, 0.75), **options: Any) -> CandidateTrainer:
        teacher = tiny(64, 3, layers=2)
        generator = torch.Generator().manual_seed(5)
        scores = normalised({name: torch.rand(p.units, generator=generator) for name, p in parts(teacher).items()})
        widths = {sparsity: widths_at(scores, sparsity) for sparsity in sparsities}
        student = sliced(teacher, widths[min(widths)], order_of(scores))
        settings: dict[str, Any] = {"tradeoff_lambda": 0.2, "patience": 5, "metric": lambda f: f["token_accuracy"]}
        trainer = CandidateTrainer(
            model=student,
            args=arguments("--save_strategy", "no", *flags),
            train_dataset=dataset,
            eval_dataset=dataset,
            data_collator=torch.utils.data.default_collate,
            processing_class=tokenizer,
            method=METHODS["minidisc"],
            teacher=teacher,
            candidates=widths,
            **(settings | options),
        )
        trainer.show_progress("test")
        return trainer

    return build


def test_a_step_is_the_mean_of_the_candidates_own(make: Callable[..., CandidateTrainer], make_batch: Any) -> None:
    trainer, batch = make(), make_batch()
    model, count = trainer.model, (batch["labels"] != -100).sum()
    expected: dict[str, torch.Tensor] = {}
    losses = []
    for widths in trainer.candidates.values():
        small = sliced(model, widths)
        alone = make(sparsities=(0.25,))
        trainer_of_one = copy.copy(alone)
        trainer_of_one._learning = [0.25]
        loss = trainer_of_one.compute_loss(small, batch, num_items_in_batch=count)
        loss.backward()
        losses.append(loss.detach())
        for name, parameter in small.named_parameters():
            whole = expected.setdefault(name, torch.zeros_like(model.get_parameter(name)))
            if parameter.grad is not None:
                whole[tuple(map(slice, parameter.shape))] += parameter.grad / len(trainer.candidates)

    runs = []
    trainer.teacher.register_forward_hook(lambda *_: runs.append(1))
    loss = trainer.training_step(model, batch, count)
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert len(runs) == 1  # the teacher, once for all
    for name, parameter in model.named_parameters():
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got, expected[name], rtol=1e-4, atol=1e-7, msg=name)
    assert sum(float(g.abs().sum()) for g in expected.values()) > 0


def test_the_best_tradeoff_is_kept_with_the_weights_that_it_had(make: Callable[..., CandidateTrainer]) -> None:
    # By evaluation, each candidate's metric: the tradeoffs are these + 0.05, 0.1 and 0.15.
    figures = [[0.50, 0.40, 0.30], [0.40, 0.48, 0.20], [0.52, 0.41, 0.42], [0.525, 0.41, 0.10]]
    told = iter(value for row in figures for value in row)
    seen: list[dict[str, torch.Tensor]] = []
    trainer = make("--max_steps", "8", "--eval_steps", "2", metric=lambda _: next(told))

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (4, 6, 8):
                seen.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})

    trainer.add_callback(Keep())
    trainer.train()
    summary = trainer.summary("round", None)
    assert [(c.sparsity, c.metric, c.step) for c in summary.candidates] == [
        (0.25, 0.525, 8),
        (0.5, 0.48, 4),
        (0.75, 0.42, 6),
    ]
    assert [c.tradeoff for c in summary.candidates] == pytest.approx([0.575, 0.58, 0.57])
    assert summary.chosen == 0.5 and summary.best.step == 4 and summary.steps == 8
    best = trainer.best_model()
    assert {name: part.units for name, part in parts(best).items()} == trainer.candidates[0.5]
    for name, parameter in best.named_parameters():
        assert torch.equal(parameter, seen[0][name][tuple(map(slice, parameter.shape))]), name
    assert any(not torch.equal(seen[0][name], seen[2][name]) for name in seen[0])
    assert [c.parameters for c in summary.candidates] == sorted(
        (c.parameters for c in summary.candidates), reverse=True
    )
    assert sum(p.numel() for p in best.parameters()) == summary.best.parameters


@pytest.mark.parametrize(("patience", "steps"), [(1, 4), (2, 6), (9, 8)])
def test_patience(
    patience: int, steps: int, make: Callable[..., CandidateTrainer], capsys: pytest.CaptureFixture[str]
) -> None:
    told = iter([0.5] * 3 + [0.4] * 99)  # nothing is better than the first evaluation, at step 2
    trainer = make("--max_steps", "8", "--eval_steps", "2", metric=lambda _: next(told), patience=patience)
    trainer.train()
    assert trainer.state.global_step == steps
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stopped at ")]
    ends = f"no candidate better in {patience} evaluation{'s' * (patience > 1)} (--patience)"
    assert said == [f"stopped at step {steps} of 8: {ends}"] * (steps < 8)


def test_what_a_sandwich_leaves_out(make: Callable[..., CandidateTrainer]) -> None:
    sparsities = (0.1, 0.25, 0.5, 0.75)
    assert make(sparsities=sparsities)._drawn() == list(sparsities)
    assert make(sparsities=sparsities, sandwich_size=9)._drawn() == list(sparsities)
    trainer, drawn = make(sparsities=sparsities, sandwich_size=3), []
    for step in range(40):
        trainer.state.global_step = step
        drawn.append(trainer._drawn())
        assert trainer._drawn() == drawn[-1]  # as after a resume
    assert all(len(d) == 3 and d[0] == 0.1 and d[-1] == 0.75 for d in drawn)
    assert {d[1] for d in drawn} == {0.25, 0.5}
    trainer.state.global_step = 0
    trainer.train()
    assert trainer._tokens[None] == trainer._tokens[0.1] > trainer._tokens[0.25]
    assert sum(trainer._tokens[s][0] for s in sparsities) == 3 * trainer._tokens[None][0]


def test_flops_are_those_of_the_linear_layers(make: Callable[..., CandidateTrainer]) -> None:
    trainer = make("--max_steps", "3")
    counted = [0]

    def count(module: Any, inputs: Any, output: Any) -> None:
        # Of a narrowed layer, the shapes of what it reads and writes tell how much of it computed.
        rows, weight = inputs[0].numel() // max(inputs[0].shape[-1], 1), inputs[0].shape[-1] * output.shape[-1]
        counted[0] += 2 * rows * weight * (3 if trainer.model.training and module in mine else 1) * learning[0]

    mine, learning = set(trainer.model.modules()), [1]
    for model in (trainer.model, trainer.teacher):
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.register_forward_hook(count)
    evaluate = trainer.evaluate

    def quietly(*args: Any, **kwargs: Any) -> Any:
        learning[0] = 0
        found = evaluate(*args, **kwargs)
        learning[0] = 1
        return found

    trainer.evaluate = quietly  # type: ignore[method-assign]
    trainer.train()
    heads = 2 * trainer._tokens[None][1] * trainer.model.lm_head.weight.numel() * (1 + 3 * len(trainer.candidates))
    assert trainer.gflops * 1e9 == pytest.approx(counted[0] + heads, rel=1e-12) and counted[0] > 0


def test_a_candidates_evaluation_is_that_of_its_dense_model(
    make: Callable[..., CandidateTrainer], make_batch: Any
) -> None:
    trainer, batch = make(), make_batch()
    for widths in trainer.candidates.values():
        with narrowed(trainer.model, widths), torch.no_grad():
            mine = trainer.model.eval()(**batch).loss
            written = trainer.model.generate(batch["input_ids"], max_new_tokens=6, do_sample=False)
        dense = sliced(trainer.model, widths)
        torch.testing.assert_close(mine, dense(**batch).loss)
        assert torch.equal(written, dense.generate(batch["input_ids"], max_new_tokens=6, do_sample=False))


# ---- Schedules -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(run: Callable[..., int], cache: Path) -> Path:
    out = cache.parent / "minidisc"
    assert run(out, "--method", "minidisc", "--target_sparsity", "0.8") == 0
    return out


def test_minidisc_from_teacher_to_dense_student(finished: Path, cache: Path) -> None:
    schedule = schedule_of(finished)
    assert len(schedule.trials) == 1
    first, *rest = schedule.rounds
    assert [c.sparsity for c in first.candidates] == [0.5, 0.6, 0.7, 0.8] and first.teacher is None
    assert first.chosen == max(first.candidates, key=lambda c: c.tradeoff).sparsity
    for candidate in first.candidates:
        assert candidate.tradeoff == pytest.approx(candidate.metric + 0.2 * candidate.sparsity)
        assert 0 <= candidate.metric <= 1 and 1 <= candidate.step <= 6
    if first.chosen == 0.8:
        assert not rest
    else:
        assert [c.sparsity for c in rest[0].candidates] == [0.8] and rest[0].teacher == first.chosen
    assert schedule.chosen.student.sparsity == 0.8 and schedule.steps == 6 * len(schedule.rounds)

    student = AutoModelForSequenceClassification.from_pretrained(finished)
    scores = load_file(next(cache.glob("importance-*")) / "importance.safetensors")
    scores = normalised({name: scores[name] for name in parts(student)})
    assert student.config.widths == {n: part.units for n, part in parts(student).items()} == widths_at(scores, 0.8)
    assert sum(p.numel() for p in student.parameters()) == schedule.chosen.student.parameters
    assert student.config.id2label == dict(enumerate(WORDS))
    record = json.loads((finished / "metrics.json").read_text(encoding="utf-8"))
    names = [model["name"] for model in record["models"]]
    assert names == ["teacher", *(["assistant 50 %"] if rest and first.chosen == 0.5 else names[1:-1]), "minidisc"]
    figures = record["models"][-1]["metrics"]
    assert schedule.chosen.student.metric == pytest.approx((figures["accuracy"] + figures["f1"]) / 200)
    assert "## Schedule" in (finished / "report.md").read_text(encoding="utf-8")
    assert (finished / "assistant" / "config.json").is_file() == bool(rest)
    assert not (finished / "rounds").exists()


def test_a_second_run_reuses_what_is_done(
    finished: Path, run: Callable[..., int], trainers: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "again", "--method", "minidisc", "--target_sparsity", "0.8") == 0
    assert not any(isinstance(trainer, CandidateTrainer) for trainer in trainers)
    assert weights(tmp_path / "again") == weights(finished)
    assert schedule_of(tmp_path / "again") == schedule_of(finished)
    assert capsys.readouterr().out.count("reusing") >= 3  # teacher, importance, rounds

    assert run(tmp_path / "other", "--method", "minidisc", "--target_sparsity", "0.8", "--learning_rate", "0.01") == 0
    assert sum(isinstance(trainer, CandidateTrainer) for trainer in trainers) == len(
        schedule_of(tmp_path / "other").rounds
    )
    assert weights(tmp_path / "other") != weights(finished)


@pytest.mark.long
def test_what_lambda_asks_for_is_picked(run: Callable[..., int], tmp_path: Path) -> None:
    flags = ["--method", "minidisc", "--target_sparsity", "0.8", "--tradeoff_lambda"]
    assert run(tmp_path / "sparse", *flags, "100") == 0
    assert [entry.chosen for entry in schedule_of(tmp_path / "sparse").rounds] == [0.8]  # stopped early
    assert (
        run(tmp_path / "two", *flags, "0", "--assistants", "2", "--sparsity_grid", "0.25,0.5,0.8", "--truncation", "0")
        == 0
    )
    rounds = schedule_of(tmp_path / "two").rounds
    chosen = [entry.chosen for entry in rounds]
    assert chosen == sorted(set(chosen)) and chosen[-1] == 0.8
    for before, entry in itertools.pairwise(rounds):
        assert entry.teacher == before.chosen and min(c.sparsity for c in entry.candidates) > before.chosen
    for entry in rounds:
        assert entry.best.metric == max(c.metric for c in entry.candidates)  # lambda is 0


@pytest.mark.long
def test_baselines_and_maxidisc(run: Callable[..., int], trainers: list[Any], tmp_path: Path) -> None:
    shared = ["--target_sparsity", "0.8", "--sparsity_grid", "0,0.25,0.5,0.8"]
    assert run(tmp_path / "fixed", "--method", "minidisc", "--assistant_sparsity", "0.5", *shared) == 0
    assert [[c.sparsity for c in e.candidates] for e in schedule_of(tmp_path / "fixed").rounds] == [[0.5], [0.8]]
    assert run(tmp_path / "none", "--method", "minidisc", "--assistants", "0", *shared) == 0
    assert [entry.chosen for entry in schedule_of(tmp_path / "none").rounds] == [0.8]
    for method in ("prune-kd", "prune-pkd"):
        assert run(tmp_path / method, "--method", method, *shared) == 0
        assert [entry.chosen for entry in schedule_of(tmp_path / method).rounds] == [0.8]
    students = {name: weights(tmp_path / name) for name in ("fixed", "none", "prune-kd", "prune-pkd")}
    assert len(set(students.values())) == 4

    trainers.clear()
    assert run(tmp_path / "maxi", "--method", "maxidisc", *shared) == 0
    maxi = schedule_of(tmp_path / "maxi")
    assert [trial.assistants for trial in maxi.trials] == [[], [0.25], [0.5]]
    assert maxi.chosen.student.metric == max(trial.student.metric for trial in maxi.trials)
    assert sum(isinstance(trainer, CandidateTrainer) for trainer in trainers) == 2  # the others are in the cache
    assert maxi.trials[2].rounds[1].best == schedule_of(tmp_path / "fixed").rounds[1].best
    assert maxi.gflops == pytest.approx(sum(entry.gflops for trial in maxi.trials for entry in trial.rounds))


def test_any_t5_and_any_method_can_be_pruned(run: Callable[..., int], data: list[Any], tmp_path: Path) -> None:
    flags = ["--architecture", "t5", "--method", "minidisc", "--target_sparsity", "0.7", "--truncation", "0.6"]
    assert run(tmp_path / "t5", *flags, "--selection_metric", "token_accuracy") == 0
    student = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5")
    assert isinstance(student, models.PrunedT5ForConditionalGeneration)
    record = json.loads((tmp_path / "t5" / "metrics.json").read_text(encoding="utf-8"))
    assert record["models"][-1]["token_accuracy"] == pytest.approx(schedule_of(tmp_path / "t5").chosen.student.metric)
    assert run(tmp_path / "cka", "--method", "hsm-cka", "--student_init", "prune", "--target_sparsity", "0.5") == 0
    assert [entry.chosen for entry in schedule_of(tmp_path / "cka").rounds] == [0.5]


_METRIC_ALONE = ["--tradeoff_lambda", "0", "--truncation", "0.7"]


@pytest.mark.parametrize(
    ("step", "more"),
    [
        (3, _METRIC_ALONE),
        pytest.param(6, _METRIC_ALONE, marks=pytest.mark.long),
        pytest.param(9, ["--assistant_sparsity", "0.5"], marks=pytest.mark.long),
    ],
)  # in the first round, at its last checkpoint, and in the student's
def test_a_schedule_resumes_from_any_interruption(
    step: int,
    more: list[str],
    run: Callable[..., int],
    cache: Path,
    trainers: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--method", "minidisc", "--target_sparsity", "0.8", "--save_strategy", "steps"]
    flags += ["--save_steps", "2", "--seed", str(step), *more]
    create = CandidateTrainer.__init__
    taken = [0]

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            taken[0] += 1
            if taken[0] == step:
                signal.raise_signal(signal.SIGTERM)

    def watched(self: CandidateTrainer, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        self.add_callback(Stop())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CandidateTrainer, "__init__", watched)
        assert run(tmp_path / "cut", *flags) == 143
    assert (
        "--resume_from_checkpoint last" in capsys.readouterr().err and not (tmp_path / "cut" / "metrics.json").exists()
    )
    assert run(tmp_path / "cut", *flags) == 2  # it is not started anew by accident
    assert run(tmp_path / "cut", *flags, "--target_sparsity", "0.85", "--resume_from_checkpoint", "last") == 2
    assert "target_sparsity" in capsys.readouterr().err
    trainers.clear()
    assert run(tmp_path / "cut", *flags, "--resume_from_checkpoint", "last") == 0
    rounds = [t for t in trainers if isinstance(t, CandidateTrainer)]
    assert rounds[0]._timer.steps == 6 - (step % 6 or 6)
    assert len(rounds) == len(schedule_of(tmp_path / "cut").rounds) - (step > 6)

    forget_rounds(cache, str(step))  # and the same without an interruption
    assert run(tmp_path / "whole", *flags) == 0
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    cut, whole = schedule_of(tmp_path / "cut"), schedule_of(tmp_path / "whole")
    assert [e.candidates for e in cut.rounds] == [e.candidates for e in whole.rounds]
    assert [e.gflops for e in cut.rounds] == [e.gflops for e in whole.rounds]


def test_other_settings_go_on_from_no_checkpoint(run: Callable[..., int], cache: Path, tmp_path: Path) -> None:
    flags = ["--method", "prune-kd", "--target_sparsity", "0.5", "--save_strategy", "steps", "--save_steps", "2"]
    create = CandidateTrainer.__init__

    def interrupted(self: CandidateTrainer, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        self.add_callback(_Stop())

    class _Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CandidateTrainer, "__init__", interrupted)
        assert run(tmp_path / "cut", *flags, "--max_steps", "9") == 143
    assert run(tmp_path / "cut", *flags, "--max_steps", "5", "--resume_from_checkpoint", "last") == 0
    assert schedule_of(tmp_path / "cut").steps == 5
    forget_rounds(cache, "5 steps")
    assert run(tmp_path / "clean", *flags, "--max_steps", "5") == 0
    assert weights(tmp_path / "cut") == weights(tmp_path / "clean")


@pytest.mark.long
def test_rounds_are_reused_only_by_what_makes_the_same(
    run: Callable[..., int], trainers: list[Any], tmp_path: Path
) -> None:
    flags = ["--method", "prune-kd", "--architecture", "t5", "--target_sparsity", "0.5"]
    rounds = []
    for i, more in enumerate(
        ([], ["--report_examples", "1"], ["--generation_max_length", "3"], ["--patience", "2"], ["--eval_on_start"])
    ):
        trainers.clear()
        assert run(tmp_path / str(i), *flags, *more) == 0
        rounds.append(sum(isinstance(trainer, CandidateTrainer) for trainer in trainers))
    assert rounds == [1, 0, 1, 1, 1]


@pytest.mark.long
def test_times_leave_scoring_out(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    from fastkd.train.stages import judging

    generate = judging.generate

    def slow(*args: Any, **kwargs: Any) -> list[str]:
        time.sleep(1)
        return generate(*args, **kwargs)

    monkeypatch.setattr(judging, "generate", slow)
    assert run(tmp_path / "out", "--method", "prune-kd", "--target_sparsity", "0.5", "--seed", "77") == 0
    assert schedule_of(tmp_path / "out").seconds < 2  # three evaluations took 3


def test_pruning_a_student_again_and_pruning_without_a_teachers_word(
    finished: Path, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = AutoModelForSequenceClassification.from_pretrained(finished)
    assert 0 in student.config.widths.values()  # it lacks whole layers
    assert run(tmp_path / "again", "--teacher", finished, "--method", "prune-kd", "--target_sparsity", "0.5") == 0
    smaller = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert all(smaller.config.widths[name] <= width for name, width in student.config.widths.items())
    flags = ["--method", "scratch", "--student_init", "prune", "--target_sparsity", "0.5"]
    if run(tmp_path / "tuned", *flags) == 0:  # prune, then fine-tune
        assert schedule_of(tmp_path / "tuned").gflops > 0
    else:
        assert "--student_init prune needs a teacher" in capsys.readouterr().err
    t5 = models.PrunedT5ForConditionalGeneration(models.PrunedT5Config(**_SIZES, widths=_NARROW))
    made = models.enct5_from(t5, ["a", "b"])
    assert {n: part.units for n, part in parts(made).items()} == {n: _NARROW.get(n, w) for n, w in _FULL.items()}
    for name, parameter in made.encoder.block.named_parameters():
        assert torch.equal(parameter, t5.encoder.block.get_parameter(name)), name


def test_what_a_method_cannot_compare_is_found_before_anything_is_replaced(
    finished: Path, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(out, "--method", "prune-kd", "--target_sparsity", "0.5") == 0
    before = weights(out)
    flags = ["--method", "miniend-e", "--student_init", "prune", "--target_sparsity", "0.85", "--overwrite_output_dir"]
    assert run(out, *flags, "--relation_heads", "8") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "(at sparsity 0.85)" in error and weights(out) == before


# ---- Importance ------------------------------------------------------------------------------------------------------


def test_importance_is_measured_on_what_nothing_is_trained_on(
    run: Callable[..., int], trainers: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Any] = []
    rank = pruned.rank
    monkeypatch.setattr(pruned, "rank", lambda *a, **k: (measured.append(a[1]), rank(*a, **k))[1])

    def ids(examples: Any) -> set[tuple[int, ...]]:
        return {tuple(examples[i]["input_ids"].tolist()) for i in range(len(examples))}

    flags = ["--method", "minidisc", "--assistants", "0", "--target_sparsity", "0.6"]
    assert run(tmp_path / "train", *flags) == 0
    trainer = next(t for t in trainers if isinstance(t, CandidateTrainer))
    assert len(measured[0]) == 24 and len(trainer.train_dataset) == 96
    assert not ids(measured[0]) & ids(trainer.train_dataset) and not ids(measured[0]) & ids(trainer.eval_dataset)

    trainers.clear()
    assert run(tmp_path / "dev", *flags, "--importance_on", "dev") == 0
    trainer = next(t for t in trainers if isinstance(t, CandidateTrainer))
    assert ids(measured[1]) == ids(trainer.eval_dataset) and len(trainer.train_dataset) == 120


# ---- Bad input -------------------------------------------------------------------------------------------------------


def test_a_fixed_assistant_goes_with_the_shipped_settings() -> None:
    given = ["--assistant_sparsity", "0.7", "--task", "sst2", "--teacher", "t", "--train_file", "glue", "--use_cpu"]
    assert parse(["--config", "minidisc", *given])[0].assistant_sparsity == 0.7
    with pytest.raises(InputError, match="--sandwich_size has no effect with --assistant_sparsity"):
        parse(["--config", "minidisc", *given, "--sandwich_size", "2"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target_sparsity", "0.97"], "--target_sparsity: expected one of the grid's above 0 (0, 0.1, 0.2, 0.3"),
        (["--target_sparsity", "0"], "above 0"),
        (["--sparsity_grid", "0.5,0.7"], "(0.5, 0.7; --sparsity_grid takes others), got 0.9"),
        (["--sparsity_grid", "0.5,much"], "--sparsity_grid: expected NUMBER,... from 0 to below 1, got '0.5,much'"),
        (["--sparsity_grid", "0.5,1"], "from 0 to below 1"),
        (["--tradeoff_lambda", "-0.1"], "--tradeoff_lambda: must be at least 0, got -0.1"),
        (["--truncation", "1.5"], "--truncation: must be at least 0 and at most 1, got 1.5"),
        (["--assistants", "-1"], "--assistants: must be at least 0"),
        (["--assistants", "6"], "--assistants 6: the grid has 5 from --truncation 0.5 to below the target 0.9"),
        (["--truncation", "0.95"], "0.9, 0.95); give a smaller --truncation, or --assistants 0"),
        (
            ["--assistant_sparsity", "0.9"],
            "--assistant_sparsity: expected one above 0 and below the target's, 0.9, got 0.9",
        ),
        (["--patience", "0"], "--patience: must be at least 1"),
        (["--sandwich_size", "1"], "--sandwich_size: expected 0 for all, or at least 2"),
        (["--importance_on", "test"], "--importance_on: unknown 'test'"),
        (
            ["--selection_metric", "bleu"],
            "--selection_metric: expected one of token_accuracy, accuracy, f1, got 'bleu'",
        ),
        (["--student", "x"], "--student is not supported with --method minidisc: the student is the teacher pruned"),
        (["--demo"], "--demo is not supported with"),
        (["--torch_compile"], "--torch_compile is not supported with --method minidisc: widths change"),
        (["--load_best_model_at_end", "--save_steps", "0.2"], "--load_best_model_at_end is not supported"),
        (["--method", "kd", "--truncation", "0.4"], "--truncation has no effect with --method kd"),
        (
            ["--method", "maxidisc", "--tradeoff_lambda", "0.1"],
            "--tradeoff_lambda has no effect with --method maxidisc",
        ),
        (["--method", "prune-kd", "--assistants", "2"], "--assistants has no effect with --method prune-kd"),
        (
            ["--assistant_sparsity", "0.5", "--truncation", "0.4"],
            "--truncation has no effect with --assistant_sparsity",
        ),
        (["--method", "maxidisc", "--assistant_sparsity", "0.5"], "which tries all of the grid"),
        (["--importance_on", "dev", "--importance_examples", "9"], "--importance_examples has no effect"),
        (["--task", "glue/classification"], "unknown 'glue/classification'"),
    ],
)
def test_flags_that_make_no_sense(flags: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        parse(with_inputs("--method", "minidisc", "--task", "classification", *flags))
    assert message in str(error.value)


def test_a_target_that_leaves_nothing(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", "--method", "minidisc", "--target_sparsity", "0.95") == 2  # round(0.95 * 8) of 8 heads
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--target_sparsity 0.95 would leave no head, or no neuron" in error and "0.85, 0.9)" in error
    assert not list((tmp_path / "out").glob("*"))


def test_a_teacher_that_does_not_know_the_task(
    run: Callable[..., int],
    tiny: Callable[..., Any],
    saved: Callable[..., Path],
    tokenizer: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    untrained = saved(tiny(64, 1), tmp_path / "untrained")
    flags = ["--method", "minidisc", "--architecture", "t5", "--teacher", untrained]
    assert run(tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "does not know classification" in error and "--method scratch --student" in error
    other = saved(models.enct5_from(tiny(64, 1), ["cat", "dog"]), tmp_path / "other")
    assert run(tmp_path / "out", "--method", "minidisc", "--teacher", other) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no head for classification: its classes are cat, dog, the data's fruit, metal, tree" in error
    assert run(tmp_path / "out", "--method", "minidisc", "--teacher", untrained) == 2
    assert "makes one of it" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list((tmp_path / "out").glob("*"))


def test_figures_of_what_there_is() -> None:
    mnli, glue = TASKS["mnli"], TASKS["glue"]
    assert figure_names(mnli) == ["mnli_matched_accuracy", "mnli_mismatched_accuracy"]
    assert figure_names(mnli, {"mnli_matched"}) == ["accuracy"]
    assert figure_names(glue)[-1] == "glue_mean"
    assert figure_names(glue, {"sst2", "rte"}) == ["sst2_accuracy", "rte_accuracy"]
    assert figure_names(TASKS["classification"], {"classification"}) == ["accuracy", "f1"]


# ---- The record ------------------------------------------------------------------------------------------------------


def test_a_schedule_goes_through_json() -> None:
    candidate = Candidate(0.5, 10, 0.7, 0.8, 4)
    entry = Round("round 1", None, [candidate], 0.5, 6, 1.5, 2.5)
    schedule = Schedule("accuracy", 0.2, 0.5, [Trial([entry]), Trial([entry, entry])])
    assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule
    assert (schedule.steps, schedule.seconds, schedule.gflops) == (18, 4.5, 7.5)
    assert schedule.trials[1].assistants == [0.5] and schedule.chosen is schedule.trials[0]
    assert parse_grid("0.9,0.1,0.9") == [0.1, 0.9] and list(GRID) == sorted(GRID)
