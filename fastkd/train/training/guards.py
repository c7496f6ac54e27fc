"""What ends a training early and in order: signals, and numbers that are not finite."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from ...heads import PADDING, head_module
from ..common.errors import InputError, RunError
from ..common.family import family_of
from ..common.processes import count, of_all, patient_group
from ..models.anatomy import kind
from .checkpoints import last_checkpoint

_HANGUP = getattr(signal, "SIGHUP", None)  # not on Windows


def check_arguments(args: Any, examples: Any = None) -> None:
    """Raise InputError for transformers' arguments by which a training would fail later, or say wrong numbers.

    Or for training examples that --dataloader_drop_last leaves no step of.
    """
    if args.n_gpu > 1:
        raise InputError(f"{args.n_gpu} GPUs in one process: start one for each with torchrun, or show it one alone")
    by_steps = args.eval_strategy == args.save_strategy == "steps"
    if args.load_best_model_at_end and by_steps and args.eval_steps != args.save_steps:
        raise InputError(
            f"--load_best_model_at_end: checkpoints every {args.save_steps:g} steps and evaluations every "
            f"{args.eval_steps:g} leave the best one unsaved; give --save_steps and --eval_steps the same value"
        )
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and hasattr(examples, "__len__") and len(examples) < batch:
        counts = f"a batch takes {batch} and there are {len(examples)}"
        raise InputError(f"--dataloader_drop_last drops all training examples: {counts}; give a smaller batch")


def check_served(given: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments of transformers' Trainer, by name, that would do nothing here, or something else.

    And for a model of a family that is not known, or without a head.
    """
    model, args, metrics = given.get("model"), given.get("args"), given.get("compute_metrics")
    refused = {
        "label_smoothing_factor": "the loss is the method's; leave it out",
        "use_liger_kernel": "no logits are made without it either; leave it out",
        "compute_loss_func": "the loss is the method's; a Trainer of yours can call fastkd.hidden_states in its own",
        "deepspeed_plugin": "losses need weights as torch keeps them; give fsdp",
        "parallelism_config": "losses need whole sequences and heads; give fsdp",
        "predict_with_generate": "held-out loss and accuracy are measured; score takes what generates and measures",
    }
    if not metrics:
        of_all = "figures are of all held-out data at once; give compute_metrics, which logits are made for"
        refused |= dict.fromkeys(("batch_eval_metrics", "preprocess_logits_for_metrics"), of_all)
        if not getattr(args, "eval_do_concat_batches", True):
            raise ValueError(f"eval_do_concat_batches: expected True, got False: {of_all}")
    for name, why in refused.items():
        if value := given.get(name) or getattr(args, name, None):
            raise ValueError(f"{name}: expected none, got {value!r}: {why}")
    if model is None:
        raise ValueError("model: expected the student, got None; a method fits two models, and no model_init")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and getattr(args, "world_size", started) == 1:
        raise ValueError(f"{started} processes that would each train alone: without GPUs give use_cpu=True")
    family_of(getattr(model, "config", None))
    if kind(model) != "classifier":
        head_module(model)


def check_teacher(teacher: Any, student: Any) -> None:
    """Raise ValueError for a teacher that is no match for its student, or cannot be frozen and placed beside it."""
    if not isinstance(teacher, torch.nn.Module):
        raise ValueError(f"teacher: expected a model, as from_pretrained loads one, got {teacher!r}")
    family_of(getattr(teacher, "config", None))
    if (its := kind(teacher)) != (mine := kind(student)):
        raise ValueError(
            f"teacher: expected a {mine} model, as the student is, got {type(teacher).__name__}, which is {its}: their "
            "states do not tell of the same tokens"
        )
    if not {id(weight) for weight in teacher.parameters()}.isdisjoint(map(id, student.parameters())):
        raise ValueError(
            "teacher: expected weights of its own, as it is frozen, got some of the student's; load it once more "
            "(PEFT puts adapters into the very model that it is given)"
        )
    for name, model in (("model", student), ("teacher", teacher)):
        if len(devices := {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}) > 1:
            raise ValueError(
                f"{name}: expected one device, got {', '.join(sorted(devices))}; load it without device_map, and let "
                "fsdp spread what one does not hold"
            )
    models: list[Any] = [student, teacher]
    sizes = [model.get_input_embeddings().weight.shape[0] for model in models]
    if abs(sizes[0] - sizes[1]) > PADDING:
        raise ValueError(
            f"teacher: expected the student's vocabulary, {sizes[0]} but for padding up to {PADDING}, got {sizes[1]}; "
            "both read the same tokens"
        )


class Signals(TrainerCallback):
    """Keeps the first SIGINT, SIGTERM or SIGHUP that comes while a `with` lasts; another one ends the process at once.

    But for SIGHUP, which shell and kernel may both send when a terminal goes, and what is printed with it.
    Only the main thread may handle signals; in others, and for signals that the process was started to ignore,
    nothing changes.
    stop: called with the signal's number before the step behind the one that it came in, in all processes before the
    same one. By then that step is logged, evaluated and saved as it would be anyway. Several processes learn of a
    signal one step later, so that no step waits for another process.
    """

    def __init__(self, stop: Callable[[int], None]) -> None:
        self.received = 0
        self._stop = stop
        self._before: dict[int, Any] = {}
        self._terminals: list[int] = []
        self._heard: tuple[Any, torch.Tensor] | None = None  # of the signals of all processes, one step ago

    def __enter__(self) -> Signals:
        self.received, self._heard = 0, None
        self._terminals = [stream.fileno() for stream in (sys.stdout, sys.stderr) if stream.isatty()]
        if threading.current_thread() is threading.main_thread():
            for number in filter(None, (signal.SIGINT, signal.SIGTERM, _HANGUP)):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _keep(self, number: int, frame: Any) -> None:
        if number == _HANGUP:
            for terminal in self._terminals:  # which is gone: writing there would fail
                os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)
        elif self.received:
            if callable(before := self._before[number]):
                before(number, frame)
            raise SystemExit(128 + number)
        self.received = self.received or number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop if a process has received a signal; at first the step under way is to be finished."""
        number = self.received
        if count() > 1:
            number = 0
            if self._heard is not None:
                pending, loudest = self._heard
                pending.wait()
                number = int(loudest)
            loudest = torch.tensor(self.received)  # on the CPU: reading it makes no device wait
            maximum = torch.distributed.ReduceOp.MAX
            self._heard = torch.distributed.all_reduce(loudest, maximum, patient_group(), async_op=True), loudest
        if number:
            self._stop(number)

    on_epoch_begin = on_step_begin  # before a batch of the next epoch is drawn

    def on_end(self) -> None:
        """Stop for a signal in the last step, or behind it."""
        if number := max(of_all(self.received)):
            self._stop(number)


class NonFinite(TrainerCallback):
    """Remembers, on their device, when numbers first were not finite, so that no step waits for them.

    On a CPU, where nothing waits, training stops before the weights move.
    """

    def __init__(self) -> None:
        self._first: dict[str, torch.Tensor] = {}  # name -> [step, the number then], step 0 as long as all were finite

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start over, as a trainer may train more than once."""
        self._first = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look, if that costs nothing."""
        if args.device.type == "cpu":
            self.check(args)

    def watch(self, values: Mapping[str, torch.Tensor], step: int) -> None:
        """Look at the scalars of a step, counted from 1."""
        for name, value in values.items():
            value = value.detach().float()
            now = torch.stack([torch.full_like(value, step), value])
            before = self._first.get(name, torch.zeros_like(now))
            self._first[name] = torch.where(torch.isfinite(value) | (before[0] > 0), before, now)

    def found(self) -> str | None:
        """Return "NAME is nan at step N" of the earliest, the first watched if there are several, or None."""
        rows = torch.stack(list(self._first.values())).tolist() if self._first else []
        bad = [(int(step), name, value) for name, (step, value) in zip(self._first, rows, strict=True) if step]
        if not bad:
            return None
        step, name, value = min(bad, key=lambda entry: entry[0])
        return f"{name} is {value} at step {step}"

    def check(self, args: Any) -> None:
        """Raise RunError if a number was not finite."""
        if found := self.found():
            raise bad_number(found, args)


def bad_number(what: str, args: Any) -> RunError:
    """Return the error that ends a run with transformers' arguments `args`."""
    last = last_checkpoint(Path(str(args.output_dir))) if args.save_strategy != SaveStrategy.NO else None
    return RunError(f"{what}; " + (f"last good checkpoint: {last}" if last else "no checkpoint was saved"))
