"""What the examples share: flags, texts, small models in place of real ones, and whether the loss fell. No example."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, ByT5Tokenizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def flags(about: str | None, steps: int, lr: float = 3e-3, **more: str) -> argparse.Namespace:
    """What the command line says; `more` are files that an example takes beside, with what they are."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="name or folder of a model; without both, small ones with random weights")
    parser.add_argument("--teacher", help="name or folder of a model that reads the same tokens")
    parser.add_argument("--texts", type=Path, help="a file with a text in each line; without, Python's documentation")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--lr", type=float, default=lr, help="a real model wants less, such as 5e-5")
    for name, what in more.items():
        parser.add_argument(f"--{name}", type=Path, help=what)
    args = parser.parse_args()
    if (args.student is None) != (args.teacher is None):
        parser.error("give both --student and --teacher, or neither of them")
    torch.manual_seed(0)
    return args


def load(auto: Any, name: str | None, model_type: str, **sizes: Any) -> Any:
    """The model of a name or folder; without one, a new one of a type and sizes, for the tokens of `tokenizer`."""
    if name is not None:
        return auto.from_pretrained(name)
    return auto.from_config(AutoConfig.for_model(model_type, vocab_size=384, **sizes))


def tokenizer(args: argparse.Namespace) -> Any:
    """The tokenizer of both models; of the small ones one that needs no file, as its tokens are bytes."""
    if args.teacher is None:
        return ByT5Tokenizer()
    its, other = (AutoTokenizer.from_pretrained(name) for name in (args.teacher, args.student))
    if its.get_vocab() != other.get_vocab():
        sys.exit(f"{args.student} and {args.teacher} read different tokens: distributions over them do not compare")
    its.pad_token = its.pad_token or its.eos_token
    return its


def texts(args: argparse.Namespace) -> list[str]:
    """The lines of a file, or the paragraphs of the documentation that Python brings along."""
    if args.texts is not None:
        return [line for line in args.texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [" ".join(part.split()) for text in topics.values() for part in text.split("\n\n") if len(part) > 200]


def chunks(rows: list[Any], size: int, count: int) -> Iterator[list[Any]]:
    """So many batches of rows, from the first on, again and again."""
    for i in range(count):
        yield [rows[(i * size + j) % len(rows)] for j in range(size)]


class Losses(list[float]):
    def add(self, loss: Any) -> None:
        """Keep one; print one in ten."""
        self.append(float(loss.detach()))
        if len(self) % 10 == 1:
            print(f"step {len(self):4}  loss {self[-1]:.4f}", flush=True)

    def finish(self) -> None:
        """Say how far they fell, and end the program, with 1 if they did not."""
        n = max(1, len(self) // 5)
        first, last = sum(self[:n]) / n, sum(self[-n:]) / n
        print(f"mean of the first {n} steps: {first:.4f}, of the last: {last:.4f}")
        sys.exit(0 if last < first else 1)
