"""The command line: `fastkd-train`, also `python -m fastkd.train.cli`."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from .common import endings
from .common.errors import InputError, RunError, out_of_memory

_REQUIRED = (
    "torch", "numpy", "transformers", "accelerate", "sentencepiece", "datasets", "pyarrow", "yaml", "jinja2",
    "matplotlib", "rouge_score", "sacrebleu", "scipy", "regex", "tqdm",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run fastkd-train and return its exit code; every code but 0 comes with one line on stderr.

    0; 1 if the run cannot go on (a full disk, a loss that is no number); 2 for bad input; 129, 130 and 143 if
    SIGHUP, SIGINT or SIGTERM stopped it.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    output = endings.Output()
    try:
        with endings.stoppable(), output:
            code, problem = _outcome(words)
    except KeyboardInterrupt as error:
        code = 128 + endings.stop_number(error)
        problem = f"interrupted during {endings.stage()}; the same command starts, or resumes, again"
    rank = endings.launched_rank()
    return output.end(f"fastkd-train, rank {rank}" if rank else "fastkd-train", code, problem)


def _outcome(words: Sequence[str]) -> tuple[int, object]:
    """Do what the words ask for; return the exit code, and what to say if it is not 0 and another process does not."""
    try:
        if _tells(words):  # what takes no packages, and no time
            return 0, None
        if missing := [name for name in _REQUIRED if not _is_installed(name)]:
            return 2, f"missing {', '.join(missing)}: pip install 'fastkd[train]'"
        from .. import versions
        from .common import processes

        if (untested := versions.untested("train")) and not endings.launched_rank():
            print(f"fastkd-train: {untested}", file=sys.stderr)
        processes.print_by_first_only()
        _run(words)
        processes.leave()
    except (InputError, RunError, OSError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # not the system's: a library's own, and a mistake of ours
        return getattr(error, "exit_code", 1), None if getattr(error, "was_elsewhere", False) else error
    except Exception as error:
        return 1, _reason(error)
    return 0, None


def _reason(error: Exception) -> str:
    """Return what to say of an error that need not be a mistake of ours; raise it if it is one."""
    from .. import versions
    from .common.processes import is_lost_process

    if is_lost_process(error):
        return "another process of this run has ended or does not answer"
    if reason := out_of_memory(error):
        return reason
    if untested := versions.untested("train"):
        return f"{type(error).__name__}: {error}; {untested}"
    raise error


def _tells(words: Sequence[str]) -> bool:
    """Print what the words ask to be told, if they do, and return whether they did."""
    words = _underscored(words)
    if "--version" in words:
        from importlib.metadata import PackageNotFoundError, version

        import fastkd

        others = []
        for name in ("torch", "transformers"):
            with contextlib.suppress(PackageNotFoundError):
                others.append(f"{name} {version(name)}")
        print(f"fastkd {fastkd.__version__} ({', '.join(others)})")
    elif "-h" in words or "--help" in words:
        from .flags.parser import help_text

        print(help_text(), end="")
    elif "--list_methods" in words:
        from .flags import config
        from .objectives import methods

        for name, method in methods.METHODS.items():
            print(f"{name:17} {method.formula:46} {method.summary}")
        print(f"\nWhich families of models can have them:\n{methods.table()}")
        print("\n--interpolated makes two runs of any of them: teacher to assistant, assistant to student.")
        print(f"--config takes a file, or one of ours: {', '.join(config.shipped())}.")
    else:
        return False
    return True


def _underscored(words: Sequence[str]) -> list[str]:
    """Return words with underscores for dashes inside, as flags may be written with either."""
    return [f"{word[:2]}{word[2:].replace('-', '_')}" for word in words]


def _run(words: Sequence[str]) -> None:
    import transformers

    transformers.logging.disable_progress_bar()  # ours stay: these are "Loading weights" and "Writing shards"
    from .flags import arguments

    if "--help_all" in _underscored(words):
        print(arguments.help_of_everything(), end="")
        return
    flags, args = arguments.parse(words)
    from .report.comparison import compare
    from .runs import encoder, interpolated, pruned, train  # seconds, which no mistake in a flag should take

    if flags.compare:
        out = Path(str(args.output_dir))
        print(f"{compare([Path(folder) for folder in flags.compare], out)}\n\ncomparison.html and .md in {out}")
    elif flags.demo == "encoder":
        encoder.encoder(flags, args)
    elif flags.interpolated:
        interpolated.interpolated(flags, args)
    elif flags.objective.prunes:
        pruned.pruned(flags, args)
    else:
        train.train(flags, args)


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


if __name__ == "__main__":
    raise SystemExit(main())
