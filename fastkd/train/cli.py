"""The command line: `fastkd-train`, also `python -m fastkd.train.cli`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from .errors import InputError

_REQUIRED = ("torch", "numpy", "transformers", "accelerate", "sentencepiece", "matplotlib", "tqdm")


def main(argv: Sequence[str] | None = None) -> int:
    """Run fastkd-train and return its exit code: 0, 2 for bad input (one line on stderr), 130 if interrupted."""
    try:
        _run(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        print(f"fastkd-train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfastkd-train: interrupted; --resume_from_checkpoint last continues from a checkpoint", file=sys.stderr)
        return 130
    return 0


def _run(argv: Sequence[str]) -> None:
    _require_packages()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # ours stay: these are "Loading weights" and "Writing shards"
    from . import arguments, runs

    if any(flag in argv for flag in ("-h", "--help")):
        arguments.make_parser().print_help()
        return
    flags, args = arguments.parse(argv)
    if flags.list_methods:
        for name, method in runs.METHODS.items():
            print(f"{name:18} {method.formula:45} temperature {method.temperature:g}   {method.summary}")
    elif flags.demo:
        runs.demo(flags, args)
    else:
        runs.train(flags, args)


def _require_packages() -> None:
    missing = [name for name in _REQUIRED if not _is_installed(name)]
    if missing:
        raise InputError(f"missing {', '.join(missing)}: pip install 'fastkd[train]'")


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


if __name__ == "__main__":
    raise SystemExit(main())
