"""What the trainer shows and measures while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from transformers import ProgressCallback, TrainerCallback


class StepTimer(TrainerCallback):
    """Measures the time from one optimiser step's end to the next one's, less the evaluations between them."""

    def __init__(self) -> None:
        self.steps = 0
        self.seconds = 0.0
        self._mark = 0.0

    @property
    def seconds_per_step(self) -> float | None:
        """The mean, or None before the first step."""
        return self.seconds / self.steps if self.steps else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start over: a trainer may train more than once."""
        self.steps, self.seconds, self._mark = 0, 0.0, time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step."""
        now = time.perf_counter()
        self.steps, self.seconds, self._mark = self.steps + 1, self.seconds + now - self._mark, now

    def leave_out(self, *_: Any, **kwargs: Any) -> None:
        """Leave out what was done since the last step's end: an evaluation, or a checkpoint."""
        self._mark = time.perf_counter()

    on_save = leave_out


class WindowedValues(TrainerCallback):
    """Numbers of every step between two log entries, summed on their device so that no step waits for them."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start over, as a trainer may train more than once."""
        self.load_state_dict({"steps": 0, "sums": {}, "peaks": {}})

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint between two log entries must keep, for `load_state_dict`."""
        return {"steps": self.steps, "sums": self.sums, "peaks": self.peaks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the checkpoint left off."""
        self.steps: int = state["steps"]
        self.sums: dict[str, torch.Tensor] = state["sums"]
        self.peaks: dict[str, torch.Tensor] = state["peaks"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count an optimiser step, however many batches it accumulated."""
        self.steps += 1

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Add scalars to what is averaged over the steps."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()

    def peak(self, values: Mapping[str, torch.Tensor]) -> None:
        """Keep the largest of each scalar."""
        for name, value in values.items():
            self.peaks[name] = torch.maximum(self.peaks.get(name, value), value)

    def average(self, accelerator: Accelerator) -> None:
        """Make the numbers of all processes their means, as log entries do: any number of processes can go on."""
        self.sums, self.peaks = accelerator.reduce((self.sums, self.peaks), "mean")

    def pop(self) -> dict[str, torch.Tensor]:
        """Return the sums divided by the steps and the peaks, and start over."""
        values = {name: total / self.steps for name, total in self.sums.items()} | self.peaks
        self.start()
        return values


class Ends(TrainerCallback):
    """Makes a run that resumes, also where an epoch or all training ends, go on as the uninterrupted one did.

    The checkpoint of an epoch's last step comes behind what is still logged and evaluated when the epoch ends, as a run
    that resumes there starts with the next epoch. One that resumes where no step is left takes no other, and evaluates
    nothing again. over: whether that is so.
    """

    def __init__(self, is_at_end: Callable[[], bool]) -> None:
        self.over = self._held = False
        self._is_at_end = is_at_end

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log, evaluate and save as the arguments say, but not before the first step if the run started long ago."""
        state.compute_steps(args, state.max_steps)
        args.eval_on_start = args.eval_on_start and state.global_step == 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look whether a step is left."""
        self.over = control.should_training_stop = self._is_at_end()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hold the checkpoint back if no other step follows in this epoch."""
        if float(state.epoch).is_integer() or control.should_training_stop:
            self._held, control.should_save = control.should_save, False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for the checkpoint that was held back."""
        control.should_save = control.should_save or self._held
        if self.over:
            control.should_log = control.should_evaluate = control.should_save = False
        self._held = False


class LossBar(ProgressCallback):
    """One progress bar per training run that shows the latest losses."""

    def __init__(self, title: str):
        super().__init__()
        self.title = title
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar, at the step that a resumed run starts from."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def close(self) -> None:
        """Leave the bar as it is and go on below it: training ended early."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Show no second bar during training: held-out evaluations are short."""
        if self.training_bar is None:
            super().on_prediction_step(*args, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Put the training loss and the held-out loss beside the bar."""
        for key, name in (("loss", "loss"), ("eval_loss", "held_out")):
            if key in (logs or {}):
                self.shown[name] = f"{logs[key]:.3f}"
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.shown)


class LossLines(TrainerCallback):
    """A line with the loss, or the held-out loss, of each log entry, for those who want no bar."""

    def __init__(self, title: str):
        self.title = title

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print the entry's loss; the other numbers are in the report."""
        for key, name in (("loss", "loss"), ("eval_loss", "held-out loss")):
            if key in (logs or {}):
                print(f"{self.title} step {state.global_step}/{state.max_steps}: {name} {logs[key]:.4f}", flush=True)
