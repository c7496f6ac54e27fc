"""What a run of fastkd-train in a test is given beside its own flags."""

from __future__ import annotations

from typing import Any

from fastkd.train.objectives.methods import METHODS

SIZES = ["--student_layers", "1", "--student_d_model", "32"]
TEACHER = [
    "--teacher_layers", "1", "--teacher_d_model", "32", "--teacher_steps", "4", "--teacher_learning_rate", "2e-3"
]  # fmt: skip
# Rates at which a model of random weights this small learns something in a few steps.
RECIPE = ["--lr_scheduler_type", "cosine", "--adam_beta2", "0.98", "--eval_steps", "0.2"]


def effective(*flags: Any) -> list[str]:
    """The flags but for those of sizes, lengths and teachers that would do nothing, which fastkd-train refuses."""
    words = [str(flag) for flag in flags]
    said = {name[2:]: value for name, value in zip(words, [*words[1:], ""], strict=True) if name.startswith("--")}
    method = METHODS.get(said.get("method", "mlmkd"))
    trains = "train_teacher" in said or ("demo" in said and "teacher" not in said)
    prunes = said.get("student_init", method and method.student_init) == "prune"
    idle = {
        *(TEACHER[::2] if not trains else []),
        *(SIZES[::2] if "student" in said or prunes else []),
        *(["--vocabulary_size"] if {"teacher", "student"} & said.keys() else []),
        *([] if said.get("task", "span_corruption").endswith(("_lm", "span_corruption")) else ["--sequence_length"]),
    }
    return [word for i, word in enumerate(words) if word not in idle and (not i or words[i - 1] not in idle)]


def with_inputs(*flags: Any) -> list[str]:
    """The flags that have an effect, with the embedded documentation and a teacher trained on it where none is named.

    And at the rate at which a student of random weights learns in a few steps.
    """
    words = [str(flag) for flag in flags]
    given = {word[2:].split("=")[0] for word in words if word.startswith("--")}
    method = METHODS.get(words[len(words) - words[::-1].index("--method")] if "--method" in words else "mlmkd")
    needs_teacher = method is not None and method.needs_teacher
    if not given & {"train_file", "dataset_name", "embedded_data"}:
        words += ["--embedded_data", "docs"]
    if "demo" in given:
        words += [*([] if "task" in given else ["--task", "span_corruption"])]
        words += [*([] if "method" in given else ["--method", "mlmkd"])]
    if needs_teacher and not given & {"teacher", "train_teacher", "demo", "interpolated"}:
        words += ["--train_teacher"]
    starts_random = method is not None and method.student_init == "random" and "student" not in given
    if "learning_rate" not in given and (starts_random or not given & {"teacher", "student"}):
        words += ["--learning_rate", "2e-3"]
    return effective(*words)
