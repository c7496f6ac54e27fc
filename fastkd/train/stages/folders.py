"""The folder of a run: what it may replace, what must not be lost with it, and what it continues from."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..common import endings
from ..common.cache import lock_folder, write_whole
from ..common.errors import InputError, Interrupted, RunError, writing
from ..common.processes import by_first, is_first
from ..flags.arguments import TransformersArguments
from ..flags.fields import FastkdArguments
from ..training.checkpoints import checkpoints, fault, last_checkpoint, recover
from .identity import RECORD

DEMO = "demo.json"  # in place of a run's record, in the folder of a demo
PREVIOUS = "previous-run"  # what a run replaces, until it is complete
# What one run makes and another may not, beside what all of them do.
_MADE = (
    "checkpoint-*", ".*", "*.safetensors*", "*_curve*.png", "assistant", "runs", "rounds", "sliced-start", "teacher",
    "added_tokens.json",
)  # fmt: skip
_MOVING = ".moving"  # files of the run's folder that are on their way to PREVIOUS, or back


def places(flags: FastkdArguments, args: TransformersArguments) -> tuple[Path, Path]:
    """Return `--output_dir` and `--cache_dir`, by default beside it, after making sure that both can be written to."""
    out = Path(str(args.output_dir))
    cache = Path(flags.cache_dir) if flags.cache_dir else out.absolute().parent / "cache"
    return writable("output_dir", out), writable("cache_dir", cache)


def writable(flag: str, folder: Path) -> Path:
    """Return a folder that can be written to, or made: not hours later; raise InputError if it is none."""
    real = Path(os.path.realpath(folder))
    try:
        str(folder).encode()
        if os.path.lexists(real) and not real.is_dir():
            raise InputError(f"--{flag} {folder} is a file: expected a folder, or a name for a new one")
        existing = next(place for place in (real, *real.parents) if place.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except UnicodeEncodeError as error:
        name = str(folder).encode(errors="backslashreplace").decode()
        raise InputError(
            f"--{flag} {name} is no text in this locale, and not every library can write there: give another name, or "
            "run under LC_ALL=C.UTF-8"
        ) from error
    except OSError as error:
        raise InputError(f"--{flag} {folder} cannot be written to: {error.strerror}") from error
    return folder


# What must not be lost -----------------------------------------------------------------------------------------------


def lies_in(path: str | Path, folder: Path) -> bool:
    """Return whether a path, or a link on the way to it, is in a folder or is the folder, however both are spelled."""
    real, given = Path(os.path.realpath(path)), Path(path).absolute()
    links = [Path(os.path.realpath(place.parent)) for place in (given, *given.parents) if place.is_symlink()]
    return any(_is_same(place, folder) for start in (real, *links) for place in (start, *start.parents))


def _is_same(place: Path, other: Path) -> bool:
    try:
        return os.path.samefile(place, other)
    except OSError:  # one of them is not there
        return place == Path(os.path.realpath(other))


def check_outside(out: Path, flags: FastkdArguments, cache: Path, is_used: bool) -> None:
    """Raise InputError if something that the run needs lies in the folder that it may replace, or would go with it.

    is_used: whether the folder holds a run that is replaced.
    """
    kept = [("teacher_cache_dir", Path(flags.teacher_cache_dir))] if flags.teacher_cache_dir else []
    for flag, path in [("cache_dir", cache), *kept, *_inputs(flags, is_used)]:
        how = "lies in" if lies_in(path, out) else None
        if how is None and is_used and "cache_dir" not in flag:
            links = (link for link in path.rglob("*") if link.is_symlink())
            how = "holds or leads into" if lies_in(out, path) or any(lies_in(link, out) for link in links) else None
        if how:
            raise InputError(f"--{flag} {path} {how} --output_dir {out}, which the run replaces: choose another place")


def _inputs(flags: FastkdArguments, with_settings: bool) -> Iterator[tuple[str, Path]]:
    """Yield (flag, path) of all that is there of what the flags say is read; with_settings: read only at the start."""
    for name in ("train_file", "eval_file", "dataset_name", "teacher", "student"):
        value = getattr(flags, name)
        found = [] if value is None else (not os.path.lexists(value) and glob.glob(value, recursive=True)) or [value]
        yield from ((name, Path(path)) for path in found)
    settings = {**flags.transformers_flags, "config": flags.config}
    for name in ("config", "fsdp_config", "accelerator_config") if with_settings else ():
        value = settings.get(name)
        if isinstance(value, str) and os.path.isfile(value):  # and no name of a configuration of ours
            yield name, Path(value)


def record_of(flags: FastkdArguments) -> str:
    """Return the name of the file that says what the run in a folder is."""
    return DEMO if flags.demo else RECORD


# What is replaced ----------------------------------------------------------------------------------------------------


def is_used(flags: FastkdArguments, out: Path, resuming: bool) -> bool:
    """Return whether the folder holds a run that is to be replaced; raise InputError if nobody asked for that.

    A demo replaces no more than what another demo made, and needs not be asked for it.
    """
    _end_moving(out)
    if resuming or not out.is_dir() or not any(out.iterdir()):
        return False
    if not flags.overwrite_output_dir and not flags.demo:
        raise _holds_files(out)
    if not (out / record_of(flags)).is_file() and not (out / PREVIOUS).is_dir():
        kind = "demo" if flags.demo else "run of fastkd-train"
        raise InputError(f"{out} already holds files that no {kind} made: give --output_dir another folder")
    runs = (record.parent for name in (RECORD, DEMO) for record in out.rglob(name))
    others = (run for run in runs if run != out and PREVIOUS not in run.relative_to(out).parts)
    if not flags.demo and (other := next(others, None)):  # what no demo makes comes back behind it
        raise InputError(f"{out} holds another run, {other}: move that, or give another folder")
    return True


def _holds_files(out: Path) -> InputError:
    return InputError(
        f"{out} already holds files: give --resume_from_checkpoint last, --overwrite_output_dir or another folder"
    )


def are_used(flags: FastkdArguments, args: TransformersArguments, out: Path, parts: Sequence[str]) -> bool:
    """Return whether one of the folders that the parts of a run have in `out` holds a run that is to be replaced.

    Raises InputError as `is_used` does, of each of them and of what else there is; and if there is none to be resumed.
    """
    others = sorted(path.name for path in out.iterdir() if path.name not in parts) if out.is_dir() else []
    if resuming := args.resume_from_checkpoint is not None:
        rounds(args, out, parts[0])
    elif others and not flags.overwrite_output_dir:
        raise _holds_files(out)
    elif others:
        raise InputError(f"{out} holds more than {' and '.join(parts)} ({others[0]}): give another folder")
    used = [is_used(flags, out / name, resuming) for name in parts]  # of all of them, for what is raised
    return any(used)


@contextlib.contextmanager
def running(out: Path, is_used: bool, identity: dict[str, Any], config: str, record: str = RECORD) -> Iterator[None]:
    """Make the run's folder and write down what the run is; the run lasts as long as the context.

    A run that it replaces waits in PREVIOUS until this one is complete, and comes back if this one fails before it has
    anything that could be continued or used. config: the YAML by which the run is repeated and, if it is cut off,
    continued.
    """
    lock = by_first(lambda: _locked(out))

    def begin() -> None:
        if is_used:
            _set_aside(out)
            print(f"what {out} holds waits in {out / PREVIOUS} until this run is complete", flush=True)
        write_json(out / record, identity)
        write_whole(out / "config.yaml", config)

    by_first(begin)
    try:
        with writing("output_dir", out):
            yield
    except BaseException as error:
        way, back = _way_on(out), ""
        if way is None and is_used and is_first():
            with contextlib.suppress(OSError):
                _bring_back(out)
                back = f"; what {out} held before is there again"
        if isinstance(error, KeyboardInterrupt):
            said = f"interrupted during {endings.stage()}; {way or 'no checkpoint was saved'}{back}"
            raise Interrupted(said, endings.stop_number(error)) from error
        if back and isinstance(error, InputError | RunError):
            error.args = (f"{error}{back}",)
        raise
    else:
        by_first(lambda: _forget(out))
    finally:
        if is_first():
            os.close(lock)


def _locked(out: Path) -> int:
    """Return a descriptor of a folder, made if need be, that no other run gets while it is open."""
    try:
        lock = lock_folder(out)
    except BlockingIOError as error:
        raise InputError(f"another run is writing to {out}: give another folder, or wait for its end") from error
    return lock


def _forget(out: Path) -> None:
    """Remove PREVIOUS; what no run makes, such as somebody's notes, stays in the folder."""
    for path in (out / PREVIOUS).glob("*"):
        if not (out / path.name).exists() and not any(path.match(kind) for kind in _MADE):
            path.rename(out / path.name)
    shutil.rmtree(out / PREVIOUS, ignore_errors=True)


def _way_on(out: Path) -> str | None:
    """Return what a run that failed has left: checkpoints, in its folder or those of its rounds, or its student."""
    if any(map(last_checkpoint, (out, *out.glob("rounds/*")))):
        return "--resume_from_checkpoint last continues"
    if (out / "config.json").is_file():
        return f"the student in {out} is whole, not its report; no checkpoint was saved"
    return None


# Files move one by one, as the folder itself may be a link or a volume. A kill may come at any time: what is in _MOVING
# belongs into the folder, and while there is PREVIOUS, all beside it is of the newer run.


def _set_aside(out: Path) -> None:
    """Move all that a folder holds into PREVIOUS."""
    moving = out / _MOVING
    moving.mkdir()
    try:
        for path in sorted(out.iterdir()):
            if path != moving:
                path.rename(moving / path.name)
        moving.rename(out / PREVIOUS)
    except OSError as error:
        _end_moving(out)
        raise InputError(f"--output_dir {out}: cannot move {error.filename} aside: {error.strerror}") from error


def _end_moving(out: Path) -> None:
    """Put what is on its way back where it was."""
    if (out / _MOVING).is_dir():
        for path in sorted((out / _MOVING).iterdir()):
            path.rename(out / path.name)
        (out / _MOVING).rmdir()


def _bring_back(out: Path) -> None:
    """Put what PREVIOUS holds in the place of all else."""
    for path in out.iterdir():
        if path.name != PREVIOUS:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (out / PREVIOUS).rename(out / _MOVING)
    _end_moving(out)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a file that is never there by half, in a folder that is made if need be, also where a link leads."""
    Path(os.path.realpath(path.parent)).mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(value, indent=2) + "\n")


# What is continued ---------------------------------------------------------------------------------------------------


def is_last(given: str | None) -> bool:
    """Return whether `--resume_from_checkpoint` leaves the choice to us."""
    return str(given).lower() in ("last", "true")


def rounds(args: TransformersArguments, out: Path, name: str = "") -> Path:
    """Return the folder of the rounds of a run that is to be resumed, and finds what is done by itself.

    name: of the folder in `out` that the run starts in, if it is another.
    """
    if not is_last(args.resume_from_checkpoint):
        raise InputError("a run of several rounds resumes with --resume_from_checkpoint last: it finds what is done")
    if not (out / name / RECORD).is_file():
        raise InputError(f"nothing to resume from: {out} holds no run")
    return out / "rounds"


def resumed(args: TransformersArguments, out: Path) -> Path | None:
    """Return the folder that `--resume_from_checkpoint` (a path, "last" or "true") means; None without the flag."""
    given = args.resume_from_checkpoint
    if given is None:
        return None
    checkpoint = _last(out) if is_last(given) else Path(given)
    why = fault(checkpoint)
    if why is not None:
        raise InputError(f"nothing to resume from: {given} is no checkpoint that is whole ({why})")
    if not _is_same(Path(os.path.realpath(checkpoint)).parent, out) and out.is_dir() and any(out.iterdir()):
        raise InputError(f"{given} is a checkpoint of another run than {out}, which holds files: give its own folder")
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    name, most, reached = "max_steps", float(args.max_steps), state["global_step"]
    if args.max_steps <= 0:
        name, most, reached = "num_train_epochs", args.num_train_epochs, round(state.get("epoch") or 0, 3)
    if most < reached:
        raise InputError(
            f"nothing to resume: {checkpoint} has {reached:g} behind it, beyond --{name} {most:g}: give {reached:g} or "
            "more, or an earlier checkpoint"
        )
    return checkpoint


def _last(out: Path) -> Path:
    """Return the last checkpoint of a run that is whole."""
    recover(out)
    broken = [f"{path.name}: {why}" for path in checkpoints(out) if (why := fault(path))]
    last = last_checkpoint(out)
    if last is None:
        other = f" that is whole ({'; '.join(broken)})" if broken else ""
        raise InputError(f"nothing to resume from: {out} holds no checkpoint{other}")
    if broken:
        print(f"continuing from {last}; passing over what is not whole ({'; '.join(broken)})")
    return last
