"""Configuration files: flags in YAML, those that ship with fastkd, and the one that every run leaves behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..common.errors import InputError

FOLDER = Path(__file__).parent / "configs"
TEXTS = FOLDER.parent / "texts"


class _Loader(yaml.SafeLoader):
    """Reads YAML, in which one key twice is an error: the first would go without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(problem=f"{twice} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def shipped() -> dict[str, Path]:
    """Return the configurations that ship with fastkd, by name: of methods, and the demo's."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def load(name: str) -> tuple[str, dict[str, Any]]:
    """Return (what to call it, its keys and values) of a YAML file, or of a shipped configuration with that name.

    A file goes before a shipped one; "miniend-e" and "miniend-e.yaml" both name the shipped one.
    Raises InputError for a file that is missing, no YAML, or no mapping of names to values.
    """
    path = Path(name)
    if not path.is_file():
        known = shipped()
        if (path / "config.yaml").is_file():
            raise InputError(f"--config: expected a file, got the folder {name}: give {path / 'config.yaml'}")
        if path.name != name or path.stem not in known:
            raise InputError(f"--config: no file {name}, and none of ours is called so ({', '.join(known)})")
        path = known[path.stem]
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config: cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise InputError(f"--config: {path} is no mapping of flags to values, such as 'method: kd'")
    return str(path), settings


def texts(name: str) -> dict[str, str]:
    """Return what a file of texts says, by what it says it of."""
    return dict(yaml.safe_load((TEXTS / f"{name}.yaml").read_text(encoding="utf-8")))


def words(key: str, value: Any, joined: bool = False) -> list[str]:
    """Return the words of a command line that say the same as `key: value`; none where there is no value.

    joined: whether the flag takes one word of parts between commas, "a,b" or "a=1,b=2".
    """
    if value is None or value == []:
        return []
    if joined and isinstance(value, list | dict):
        parts = [f"{name}={part}" for name, part in value.items()] if isinstance(value, dict) else map(str, value)
        return [f"--{key}={','.join(parts)}"]
    if isinstance(value, list):
        return [f"--{key}", *(json.dumps(item) if isinstance(item, dict | list) else str(item) for item in value)]
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"]


def dump(settings: Mapping[str, Any]) -> str:
    """Return settings as YAML that `--config` reads again, without those that are None."""
    plain = (bool, int, float, str, list, dict)
    given = {key: value for key, value in settings.items() if value is not None}
    return yaml.safe_dump({k: v if isinstance(v, plain) else str(v) for k, v in given.items()}, sort_keys=False)
