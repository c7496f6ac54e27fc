"""Names that are a folder's or one on the Hugging Face hub: what looks like a path is answered without a network."""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .errors import InputError, one_line

HUB_SECONDS = 5.0  # for the hub to answer at all


@contextlib.contextmanager
def from_hub(name: str, what: str, kind: str, reason: Callable[[Exception], str] = one_line) -> Iterator[bool]:
    """Yield whether only what the hub gave before can be loaded, and turn what goes wrong into one line.

    name: no folder. what: it should be, such as "teacher". kind: "model" or "dataset". reason: what an error says.
    Raises InputError, at once where the name is that of a path, and names folders that are called nearly so.
    """
    folder, similar = Path(name), _similar(Path(name))
    if not _may_be_on_hub(name):
        raise InputError(f"no {what} folder {name}{', which is a file' if folder.is_file() else similar}")
    none, offline = f"no {what} folder {name}{similar}, and no such {kind} from the hub", False
    try:
        offline = not _answers(name, kind)
        yield offline
    except InputError:
        raise
    except RepositoryNotFoundError as error:
        raise InputError(f"{none}: it has none of that name, or lets nobody read it without hf auth login") from error
    except Exception as error:  # of whatever loads it and of the network below: there is no common class
        if offline:
            raise InputError(
                f"{none}: it does not answer, and nothing of that name was loaded from it before"
            ) from error
        raise InputError(f"cannot load the {what} {name} of the hub: {reason(error)}") from error


def _may_be_on_hub(name: str) -> bool:
    """Return whether a name can be one on the hub, and is no path into a folder that exists."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" not in name or not Path(name).parent.is_dir()


@functools.cache
def _answers(name: str, kind: str) -> bool:
    """Return whether the hub knows a name; False if it cannot be asked, when only what it gave before can be loaded.

    One question that is not repeated: the libraries that load would repeat theirs for half a minute.
    """
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=HUB_SECONDS)
    except RepositoryNotFoundError:
        raise
    except Exception:  # whatever keeps a machine from the network
        return False
    return True


def _similar(path: Path) -> str:
    """Return "; did you mean ...?" with the folders that are called nearly so, or nothing."""
    found = _similar_folders(path)
    return f"; did you mean {' or '.join(map(str, found))}?" if found else ""


def _similar_folders(path: Path) -> list[Path]:
    parents = [path.parent] if path.parent.is_dir() else _similar_folders(path.parent)
    found = []
    for parent in parents:
        with contextlib.suppress(OSError):  # of others, which we may not list
            names = [folder.name for folder in parent.iterdir() if folder.is_dir()]
            found += [parent / name for name in difflib.get_close_matches(path.name, names)]
    return found
