"""Distil an assistant of medium size first, and the student from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..common.errors import InputError
from ..flags.arguments import TransformersArguments
from ..flags.fields import FastkdArguments
from ..models.anatomy import shape
from ..stages.folders import are_used, check_outside, places
from ..stages.given import load_configs, load_given
from ..stages.identity import check_same_run, identity
from ..stages.planning import planned_config
from ..stages.prepare import heading
from ..stages.run import with_data
from ..training.checkpoints import last_checkpoint
from .train import train


def interpolated(flags: FastkdArguments, args: TransformersArguments) -> None:
    """Train an assistant of intermediate size by the method, then the student with the assistant as its teacher.

    "Interpolated distillation" of MiniEnD (Zhang et al., 2024), which the paper does not define: that there is one
    assistant, halfway between teacher and student in width and depth unless the flags say otherwise, is an assumption.
    The assistant's run is the folder `assistant` of output_dir, the student's the folder `student`; a run that was
    interrupted goes on with `--resume_from_checkpoint last` in whichever of the two it was.
    """
    (out, cache), resuming = places(flags, args), args.resume_from_checkpoint is not None
    method, teacher = flags.objective, load_configs(flags)[0]["teacher"]
    width, layers = flags.assistant_d_model, flags.assistant_layers
    try:  # of both runs, before the first of them
        student = planned_config(method, teacher, flags.student_d_model, flags.student_layers)
        depths = [next(iter(shape(config).depths.values())) for config in (teacher, student)]
        layers = layers or round(sum(depths) / 2)
        if width is None and flags.student_d_model is not None:  # or it stays as wide as the teacher, too
            width = max(64, round((teacher.hidden_size + student.hidden_size) / 128) * 64)
        assistant = planned_config(method, teacher, width, layers)
        method.check_fits(assistant, teacher)
        method.check_fits(planned_config(method, assistant, flags.student_d_model, depths[1]), assistant)
    except ValueError as error:
        who = f"{width or teacher.hidden_size} wide of {layers} layers a side"
        raise InputError(f"--{error} (with an assistant {who})") from error
    alone: dict[str, Any] = {"interpolated": False, "assistant_layers": None, "assistant_d_model": None}
    overwriting = flags.overwrite_output_dir or resuming
    check_outside(out, flags, cache, are_used(flags, args, out, ("assistant", "student")))
    flags = replace(flags, cache_dir=str(cache), overwrite_output_dir=overwriting, **alone)
    parts = {
        "assistant": replace(flags, student_layers=layers, student_d_model=width),
        "student": replace(flags, student_layers=depths[1], teacher=str(out / "assistant"), teacher_dtype="float32"),
    }
    for name, part in parts.items():
        folder = out / name
        if resuming and (folder / "metrics.json").is_file():  # the last file that a run writes
            check_same_run(folder, identity(with_data(part, args, cache, load_given(part, args))))
            print(f"{name}: {folder} is complete")
            continue
        heading(f"Interpolated: the {name}, {part.student_layers} layers a side")
        last = "last" if resuming and last_checkpoint(folder) else None
        title = f"{args.run_name or out.name}, {name}"
        train(part, replace(args, output_dir=str(folder), run_name=title, resume_from_checkpoint=last))
