"""The house: which room may import from which, no circle, no file that is too long to read in one go."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES = 400
# Each imports only from those above it, and from its own; those on one line know each other.
STOREYS = (
    "divergence versions",
    "checks",
    "backend distributed heads states quantized relative_bias teacher_formats",
    "teacher_scores",
    "teachers",
    "reference",
    "ops kernels",
    "functions",
    "nn doctor",
    "train",
    "integrations",
)
ROOMS = (
    "common",
    "models",
    "data",
    "objectives",
    "judge",
    "teaching",
    "training",
    "report",
    "flags",
    "stages",
    "minidisc",
    "runs",
    "cli plan",
)


def modules() -> dict[str, Path]:
    """Every module by its name; the Triton kernels are a folder of their own."""
    found = {}
    for folder, package in (("fastkd", "fastkd"), ("kernels", "fastkd.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(name: str) -> Iterator[str]:
    """The modules of ours that one imports when it runs, whether at its top or later."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node not in for_types:
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                if whole in MODULES or base in MODULES:
                    yield whole if whole in MODULES else base


@pytest.mark.parametrize(("package", "order"), [("fastkd", STOREYS), ("fastkd.train", ROOMS)])
def test_rooms_import_only_from_those_before_them(package: str, order: tuple[str, ...]) -> None:
    place = {room: i for i, rooms in enumerate(order) for room in rooms.split()}
    inside = [name for name in MODULES if name.startswith(f"{package}.")]
    room = {name: name.removeprefix(f"{package}.").split(".")[0] for name in inside}
    assert set(room.values()) == set(place), "a room that has no place in the table, or one that is gone"
    wrong = [
        f"{name} imports {other}"
        for name in inside
        for other in imported(name)
        if other in room and room[other] != room[name] and place[room[other]] > place[room[name]]
    ]
    assert not wrong


def test_no_module_leads_back_to_itself() -> None:
    ways = {name: {other for other in imported(name) if other != name} for name in MODULES}
    while ends := [name for name, others in ways.items() if not others]:  # what is left at last is in circles
        for name in ends:
            del ways[name]
        for others in ways.values():
            others.difference_update(ends)
    assert not ways


def test_no_file_is_too_long_to_read() -> None:
    folders = ("fastkd", "kernels", "csrc", "benchmarks")
    paths = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in (".py", ".h", ".cpp", ".cu")]
    sizes = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in paths}
    assert not {name: size for name, size in sizes.items() if size > LINES}
