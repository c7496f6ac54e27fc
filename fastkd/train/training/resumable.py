"""A trainer that loses nothing but the step under way: whole checkpoints, exact resuming, signals, numbers gone bad.

A checkpoint keeps all that the later curve depends on, the numbers since the last log entry included: on a CPU, a
resumed run goes on as the uninterrupted one would have, to the bit.
"""

from __future__ import annotations

import contextlib
import copy
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import SaveStrategy, rotate_checkpoints

from ...heads import gathered
from ..common.errors import Interrupted, RunError, out_of_memory
from ..common.processes import is_lost_process, of_all
from ..models.sharding import is_sharded, not_finite
from .callbacks import Ends, LossBar, WindowedValues
from .checkpoints import PREFIX, STAGING, continued, flush, publish, recover, way_back, writing
from .guards import NonFinite, Signals, bad_number, check_arguments


class CheckpointingTrainer(Trainer):
    """Trainer whose checkpoints are whole, whose signals save, and which stops at numbers that are not finite.

    `train` raises Interrupted after one of `guards.Signals`: the step under way is finished, logged and evaluated as
    it would be anyway, and saved, unless `save_strategy` is "no". Raises RunError if the disk is full or read-only, if
    memory is short, and if a loss term, a gradient or a weight is not finite: on a CPU before the weights move, on
    other devices, where looking would make every step wait, at the next log entry and before anything is saved.
    Subclasses give their numbers to `_non_finite`, and those of the log to `_window`; what has a `state_dict` and is to
    be in checkpoints, in a file of its own, to `_beside`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_arguments(self.args, self.train_dataset)
        self.args = copy.copy(self.args)  # the caller's stay as they are
        # The filter would wait for every step's loss, and hide what stops the run here.
        self.args.logging_nan_inf_filter = False
        self._window = WindowedValues()
        self._beside: dict[str, Any] = {"log_window.pt": self._window}
        self._ends = Ends(self._is_at_end)
        self._signals = Signals(self._stop)
        self._non_finite = NonFinite()
        self._saved_step = 0
        for callback in (self._window, self._ends, self._signals, self._non_finite):
            self.add_callback(callback)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers does; see the class for what is raised."""
        run = self._run
        if self.is_world_process_zero():
            recover(run)
        self._window.start()
        given: Any = contextlib.nullcontext()
        if resume_from_checkpoint:
            folder = Path(resume_from_checkpoint)
            for name, part in self._beside.items():  # before transformers loads its own, which has what is sharded
                if not (isinstance(part, torch.nn.Module) and is_sharded(self.model)):
                    part.load_state_dict(torch.load(folder / name, map_location=self.args.device, weights_only=True))
            given = continued(folder, self.args)
        self._saved_step = 0
        try:
            with self._signals, given as checkpoint:
                result = super().train(checkpoint and str(checkpoint), *args, **kwargs)
                self._non_finite.check(self.args)
                self._signals.on_end()
        except BaseException as error:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, LossBar):
                    callback.close()
            if is_lost_process(error):
                raise RunError(f"another process of this run has ended or does not answer; {way_back(run)}") from error
            if reason := out_of_memory(error):
                raise RunError(f"{reason}; {way_back(run)}") from error
            raise
        return result

    @property
    def _run(self) -> Path:
        return Path(str(self.args.output_dir))

    # ---- Checkpoints ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as transformers does, but into a folder beside the run's checkpoints, and rename what is complete."""
        self._check_finite()
        args, run = self.args, self._run
        final = run / f"{PREFIX}{self.state.global_step}"
        staged = run / STAGING / final.name
        try:
            with writing(final, run):
                self.args = copy.copy(args)
                self.args.output_dir, self.args.push_to_hub = str(staged.parent), False
                super()._save_checkpoint(model, trial)
                self.args = args
                self._window.average(self.accelerator)
                states = {name: recursively_apply(gathered, part.state_dict()) for name, part in self._beside.items()}
                best = run / f"{PREFIX}{self.state.best_global_step}"
                if best == final or best.is_dir():
                    self.state.best_model_checkpoint = str(best)  # transformers looked for it in the staging folder
                self.accelerator.wait_for_everyone()
                if args.should_save:
                    for name, state in states.items():
                        torch.save(state, staged / name)
                    self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
                    torch.save(args, staged / TRAINING_ARGS_NAME)
                    publish(staged, final)
                self.accelerator.wait_for_everyone()
        finally:
            self.args = args
        self._saved_step = self.state.global_step
        if args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if args.should_save:
            rotate_checkpoints(str(run), args.save_total_limit, self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student; every file of an ordinary folder is replaced when all are complete, the config last."""
        if _internal_call:  # a checkpoint, which is staged as a whole
            super().save_model(output_dir, _internal_call)
            return
        self._check_finite()
        folder = self._run if output_dir is None else Path(output_dir)
        staged = folder / STAGING / "model"
        with writing(folder, folder):
            super().save_model(str(staged), _internal_call)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                flush(staged)
                for path in sorted(staged.iterdir(), key=lambda path: path.name == "config.json"):
                    os.replace(path, folder / path.name)
                recover(folder)

    def _check_finite(self) -> None:
        self._non_finite.check(self.args)
        student: Any = self.model
        for name in filter(None, of_all(not_finite(student))):
            raise bad_number(f"the weight {name} is not finite after step {self.state.global_step}", self.args)

    # ---- Resuming ----

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Draw the batches of a step as transformers does, but none where training has ended before it was resumed."""
        return ([], None) if self._ends.over else super().get_batch_samples(epoch_iterator, num_batches, device)

    def _is_at_end(self) -> bool:
        """Return whether no step is left to take."""
        return self.state.global_step >= self.state.max_steps

    # ---- Signals ----

    def _stop(self, number: int) -> None:
        """Save what is trained, unless it was just saved, and raise Interrupted."""
        step, saves = self.state.global_step, self.args.save_strategy != SaveStrategy.NO
        if saves and step not in (0, self._saved_step) and self.is_in_train:
            self._save_checkpoint(self.model_wrapped, None)
        saved = self._run / f"{PREFIX}{step}"
        if not saves:
            how = "not saved: this training keeps no checkpoints"
        elif self._saved_step == step and saved.is_dir():
            how = f"saved in {saved}; --resume_from_checkpoint last continues"
        else:
            how = f"not saved; {way_back(self._run)}"
        raise Interrupted(f"interrupted at step {step}, {how}", number)
