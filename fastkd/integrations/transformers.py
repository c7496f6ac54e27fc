"""The Trainer of transformers with a distillation method in place of the model's own loss.

    from fastkd.integrations.transformers import DistillTrainer  # was: from transformers import Trainer
    trainer = DistillTrainer(model, args, train_dataset=..., teacher=teacher, method="kd")

It is the trainer of `fastkd-train`; data, collators and arguments are as transformers has them.
"""

from __future__ import annotations

from .. import versions

versions.require("train")

from ..train.objectives.methods import METHODS, Method
from ..train.training.trainer import DistillTrainer

__all__ = ["METHODS", "DistillTrainer", "Method"]
