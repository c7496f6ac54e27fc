"""A trainer that loses nothing but the step under way: whole checkpoints, exact resuming, signals, numbers gone bad.

A checkpoint is written into `<output_dir>/_saving` and renamed when it is complete, so a folder named checkpoint-N is
whole whatever stopped the process. It keeps all that the later curve depends on, the numbers since the last log entry
included: on a CPU, a resumed run goes on as the uninterrupted one would have, to the bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import Seq2SeqTrainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy, rotate_checkpoints

from .callbacks import EpochEnd, LossBar, WindowedValues, mean_of_windows
from .errors import Interrupted, RunError
from .processes import is_first, is_lost_process, of_all, patient_group
from .sharding import not_finite, whole

STAGING = "_saving"  # no checkpoint to transformers, and left out of uploads, as is every name with that first letter
_PREFIX = "checkpoint-"
_REPLACED = "replaced-"
_WINDOW = "log_window_{}.pt"  # of one process, in a checkpoint


def fault(checkpoint: Path) -> str | None:
    """Return what keeps a folder from being a checkpoint that a run can continue from, or None if it is one."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    except (FileNotFoundError, NotADirectoryError):
        return f"it has no {TRAINER_STATE_NAME}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {TRAINER_STATE_NAME} cannot be read"
    names = [path.name for path in checkpoint.iterdir()]
    for what, prefixes in (("weights", ("model", "pytorch_model")), ("state of the optimizer", ("optimizer",))):
        if not any(name.startswith((*prefixes, "global_step")) for name in names):  # the last is DeepSpeed's
            return f"it has no {what}"
    try:
        for weights in checkpoint.glob("model*.safetensors"):
            safe_open(weights, "pt")  # which reads its head, and whether it is as long as that says
    except (OSError, SafetensorError):
        return "its weights cannot be read"
    return None


def checkpoints(run: Path) -> list[Path]:
    """Return the folders checkpoint-N of a run, whole or not, the largest N first."""
    found = [path for path in run.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)), reverse=True)


def last_checkpoint(run: Path) -> Path | None:
    """Return the whole checkpoint of a run with the largest number of steps, or None."""
    return next((path for path in checkpoints(run) if fault(path) is None), None)


def recover(run: Path) -> None:
    """Remove what a save that did not end has left in a run's folder, and undo what it did."""
    staging = run / STAGING
    for old in staging.glob(f"{_REPLACED}*"):
        target = run / old.name.removeprefix(_REPLACED)
        if not target.exists():
            old.rename(target)
    shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _writing(target: Path, run: Path) -> Iterator[None]:
    """Leave nothing half written in `run`, and turn what a full or read-only disk raises into a RunError."""
    try:
        yield
    except BaseException as error:
        if is_first():
            with contextlib.suppress(OSError):
                recover(run)
        # torch.save reports no error of the system's, only that the file is not as long as it should be.
        torn = isinstance(error, RuntimeError) and "inline_container" in str(error)
        if not torn and not isinstance(error, (OSError, SafetensorError)):
            raise
        reason = "the disk took only a part of a file" if torn else getattr(error, "strerror", None) or str(error)
        raise RunError(f"cannot write {target}: {reason}; {_way_back(run)}") from error


def _way_back(run: Path) -> str:
    last = last_checkpoint(run)
    return f"{last} is whole, --resume_from_checkpoint last continues from it" if last else "no checkpoint was saved"


def _flush(folder: Path) -> None:
    """Wait until the disk has all files: some report only now that they are full, and power may fail later."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:
                os.fsync(file.fileno())


class Signals:
    """Keeps the first SIGINT or SIGTERM that comes while a `with` lasts; another one ends the process at once.

    Only the main thread may handle signals; in others, and for signals that the process was started to ignore,
    nothing changes.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self.received = 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _keep(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received:
            raise SystemExit(128 + number)
        self.received = number


class NonFinite:
    """Remembers, on their device, when numbers first were not finite, so that no step waits for them."""

    def __init__(self) -> None:
        self._first: dict[str, torch.Tensor] = {}  # name -> [step, the number then], step 0 as long as all were finite

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


class CheckpointingTrainer(Seq2SeqTrainer):
    """Seq2SeqTrainer whose checkpoints are whole, whose signals save, and which stops at numbers that are not finite.

    `train` raises Interrupted after SIGINT or SIGTERM: the step under way is finished, logged and evaluated as it
    would be anyway, and saved, unless `save_strategy` is "no". Raises RunError if the disk is full or read-only, and
    if a loss term, a gradient or a weight is not finite: on a CPU before the weights move, on other devices, where
    looking would make every step wait, at the next log entry and before anything is saved.
    Subclasses give their numbers to `_watch_terms` and `_watch_gradients`, and those of the log to `_window`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # The filter would wait for every step's loss, and hide what stops the run here.
        self.args.logging_nan_inf_filter = False
        self._window = WindowedValues()
        self._epoch_end = EpochEnd()
        self._signals = Signals()
        self._non_finite = NonFinite()
        self._staging: Path | None = None
        self._saved_step = self._stop_signal = 0
        self._heard: tuple[Any, torch.Tensor] | None = None  # of the signals of all processes, one step ago
        self.add_callback(self._window)
        self.add_callback(self._epoch_end)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Seq2SeqTrainer does; see the class for what is raised."""
        if self.is_world_process_zero():
            recover(Path(str(self.args.output_dir)))
        self._non_finite = NonFinite()
        self._saved_step = self._stop_signal = 0
        self._heard = None
        try:
            with self._signals:
                result = super().train(*args, **kwargs)
                self._stop_if_not_finite()
                self._agree()
                self._stop_if_interrupted()
        except BaseException as error:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, LossBar):
                    callback.close()
            if is_lost_process(error):
                way_back = _way_back(Path(super()._get_output_dir(None)))
                raise RunError(f"another process of this run has ended or does not answer; {way_back}") from error
            raise
        return result

    # ---- Checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._stop_if_not_finite()
        run = Path(super()._get_output_dir(trial))
        name = f"{_PREFIX}{self.state.global_step}"
        self._staging = run / STAGING
        staged, final = self._staging / name, run / name
        try:
            with _writing(final, run):
                super()._save_checkpoint(model, trial)
                staged.mkdir(parents=True, exist_ok=True)  # by the first process, unless each has written its own file
                torch.save(self._window.state_dict(), staged / _WINDOW.format(self.args.process_index))
                best = run / f"{_PREFIX}{self.state.best_global_step}"
                if best == final or best.is_dir():
                    self.state.best_model_checkpoint = str(best)  # transformers looked for it in the staging folder
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
                    _flush(staged)
                    if final.exists():
                        os.rename(final, self._staging / f"{_REPLACED}{name}")
                    os.rename(staged, final)
                    recover(run)
                self.accelerator.wait_for_everyone()
        finally:
            self._staging = None
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            best_checkpoint, limit = self.state.best_model_checkpoint, self.args.save_total_limit
            rotate_checkpoints(str(run), limit, best_checkpoint, use_mtime=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # otherwise it is to be renamed, and is uploaded afterwards
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student; every file of an ordinary folder is replaced when all are complete, the config last."""
        self._stop_if_not_finite()
        student: Any = self.model
        for name in filter(None, of_all(not_finite(student))):
            raise self._bad_number(f"the weight {name} is not finite after step {self.state.global_step}")
        if _internal_call:  # a checkpoint, which is staged as a whole
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(str(self.args.output_dir if output_dir is None else output_dir))
        staged = folder / STAGING / "model"
        with _writing(folder, folder):
            super().save_model(str(staged), _internal_call)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                _flush(staged)
                for path in sorted(staged.iterdir(), key=lambda path: path.name == "config.json"):
                    os.replace(path, folder / path.name)
                recover(folder)

    # ---- Resuming ----

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        windows = sorted(Path(str(checkpoint)).glob(_WINDOW.format("*")))
        own = Path(str(checkpoint)) / _WINDOW.format(self.args.process_index)
        # The log is of their mean: as many processes as before go on with their own, others with that.
        read = [own] if len(windows) == self.args.world_size else windows
        states = [torch.load(window, map_location="cpu", weights_only=True) for window in read]
        if states:
            self._window.load_state_dict(mean_of_windows(states), self.args.device)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._is_at_end():  # and resumed there: transformers would take another step
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _is_at_end(self) -> bool:
        """Return whether no step is left to take."""
        return self.state.global_step >= self.state.max_steps

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        if skip_scheduler and self.state.global_step > 0:  # --eval_on_start: this run started long ago
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    # ---- Signals ----

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        self._agree()
        if self._stop_signal and not self._epoch_end.near:
            if self._saves and self._saved_step != self.state.global_step:
                self._save_checkpoint(model, trial)
            self._stop_if_interrupted()

    @property
    def _saves(self) -> bool:
        return self.args.save_strategy != SaveStrategy.NO

    def _agree(self) -> None:
        """Learn of the signals of all processes, which must stop at one step.

        Under DDP, what is learnt is of the step before, so that no step waits for another process.
        """
        if self.accelerator.num_processes == 1:
            self._stop_signal = self._signals.received
            return
        if self._heard is not None:
            pending, loudest = self._heard
            pending.wait()
            self._stop_signal = int(loudest)
        loudest = torch.tensor(self._signals.received)  # on the CPU: reading it makes no device wait
        maximum = torch.distributed.ReduceOp.MAX
        self._heard = torch.distributed.all_reduce(loudest, maximum, patient_group(), async_op=True), loudest

    def _stop_if_interrupted(self) -> None:
        if not self._stop_signal:
            return
        step = self.state.global_step
        where = f"saved in {Path(super()._get_output_dir(None)) / f'{_PREFIX}{step}'}" if self._saves else "not saved"
        how = "; --resume_from_checkpoint last continues" if self._saves else ": this training keeps no checkpoints"
        raise Interrupted(f"interrupted at step {step}, {where}{how}", self._stop_signal)

    # ---- Numbers that are not finite ----

    def _watch_terms(self, terms: Mapping[str, torch.Tensor]) -> None:
        """Stop the run if a loss term is not finite."""
        self._watch({f"the loss term {name}": value for name, value in terms.items()})

    def _watch_gradients(self, norms: Mapping[str, torch.Tensor]) -> None:
        """Stop the run if a gradient's norm is not finite, unless a GradScaler skips such steps."""
        if self.accelerator.scaler is None:
            self._watch({f"the gradient of the {name}": value for name, value in norms.items()})

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # Encoder and decoder were watched before, so it is named only if both are finite.
        total = whole(torch.as_tensor(grad_norm, device=self.args.device))
        self._watch_gradients({"embedding (or what else is outside encoder and decoder)": total})
        return grad_norm

    def _watch(self, values: Mapping[str, torch.Tensor]) -> None:
        self._non_finite.watch(values, self.state.global_step + 1)
        if self.args.device.type == "cpu":
            self._stop_if_not_finite()

    def _stop_if_not_finite(self) -> None:
        found = self._non_finite.found()
        if found:
            raise self._bad_number(found)

    def _bad_number(self, what: str) -> RunError:
        last = last_checkpoint(Path(super()._get_output_dir(None))) if self._saves else None
        return RunError(f"{what}; " + (f"last good checkpoint: {last}" if last else "no checkpoint was saved"))
