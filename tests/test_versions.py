"""The ranges of versions: pyproject has them, the lock keeps to them, the doctor and the tool say them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fastkd import doctor, versions
from fastkd.train import cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PYTHONS = ["3.10.0", "3.11.7", "3.12.0", "3.13.1", "3.14.0"]


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """What is to be found installed in place of what is: a version, or None for nothing; `tested` is the metadata."""
    installed: dict[str, str | None] = {}
    real = metadata.version
    tested = [
        "torch>=2.11",
        'transformers<5.25,>=5.15; extra == "train"',
        'tqdm>=4.66; extra == "train"',
        'pytest>=8; extra == "test"',
        'liger-kernel<0.9,>=0.8.5; platform_system == "Linux" and extra == "liger"',
    ]

    def version(name: str) -> str:
        found = installed[name] if name in installed else real(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: tested)
    installed["transformers"] = "5.20.0"
    return installed


@pytest.mark.parametrize(
    ("installed", "in_range"),
    [("5.15", True), ("5.15.0", True), ("5.24.3", True), ("5.25.0", False), ("5.14.9", False), ("5.25.0.dev0", False)],
)
def test_what_is_in_the_tested_range(installed: str, in_range: bool, other: dict[str, str | None]) -> None:
    other["transformers"] = installed
    torch, transformers, tqdm = versions.packages("train")
    assert (torch.name, torch.tested, torch.in_range) == ("torch", ">=2.11", True)  # also of a local build, as +cpu
    assert transformers == versions.Package("transformers", ">=5.15,<5.25", installed, in_range)
    said = versions.untested("train")
    assert said is None if in_range else f"transformers {installed} (expected >=5.15,<5.25)" in str(said)
    assert tqdm.in_range and [package.name for package in versions.packages()] == ["torch"]


def test_the_doctor_lists_every_package(other: dict[str, str | None]) -> None:
    lines = dict(doctor.report())
    assert lines["transformers"] == "5.20.0, in the tested range >=5.15,<5.25" and lines["fastkd-train"] == "usable"
    other["transformers"] = "5.25.0"
    lines = dict(doctor.report())
    assert lines["transformers"] == "5.25.0, NOT in the tested range >=5.15,<5.25"
    assert lines["fastkd-train"] == "usable, but not tested with these versions"
    other["tqdm"] = None
    lines = dict(doctor.report())
    assert lines["tqdm"] == "not installed, tested with >=4.66"
    assert lines["fastkd-train"] == "not usable: pip install 'fastkd[train]' (missing: tqdm)"


@pytest.mark.skipif(sys.platform != "linux", reason="liger-kernel needs Triton")
def test_the_doctor_tells_of_the_packages_that_others_train_with(other: dict[str, str | None]) -> None:
    other["liger-kernel"] = None
    assert dict(doctor.report())["liger-kernel"] == "not installed, tested with >=0.8.5,<0.9"
    other["liger-kernel"] = "0.9.1"
    assert dict(doctor.report())["liger-kernel"] == "0.9.1, NOT in the tested range >=0.8.5,<0.9"
    assert [name for name, _ in doctor.report()].count("torch") == 1


def test_a_source_tree_knows_no_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", unknown)
    assert versions.packages("train") == [] and versions.untested("train") is None
    assert dict(doctor.report())["fastkd-train"].startswith("unknown: fastkd is not installed")


def test_the_tool_warns_in_one_line_and_goes_on(
    other: dict[str, str | None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_run", lambda argv: print("ran"))
    assert cli.main([]) == 0
    assert capsys.readouterr() == ("ran\n", "")
    other["transformers"] = "5.31.0"
    assert cli.main([]) == 0
    assert capsys.readouterr() == (
        "ran\n",
        "fastkd-train: untested: transformers 5.31.0 (expected >=5.15,<5.25); pip install 'fastkd[train]' brings what "
        "is tested\n",
    )


def test_what_an_untested_version_breaks_is_no_traceback(
    other: dict[str, str | None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(argv: object) -> None:
        raise TypeError("forward() got an unexpected keyword argument")

    monkeypatch.setattr(cli, "_run", broken)
    with pytest.raises(TypeError):
        cli.main([])
    other["transformers"] = "5.31.0"
    assert cli.main([]) == 1
    _warning, line = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "fastkd-train: TypeError: forward() got an unexpected keyword argument; untested: transformers"
    )


def named(extra: str, environment: dict[str, str]) -> Iterator[Requirement]:
    """What an extra asks for, also by the names of others, on a machine."""
    for requirement in map(Requirement, EXTRAS[extra]):
        if requirement.name != PROJECT["name"]:
            yield requirement
        elif requirement.marker is None or requirement.marker.evaluate(environment):
            for other in requirement.extras:
                yield from named(other, environment)


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_keeps_to_the_ranges(python: str) -> None:
    """For every Python on Linux: one exact version of everything that the extras name, within its range."""
    environment = {"python_full_version": python, "python_version": python.rpartition(".")[0], "sys_platform": "linux"}
    environment |= {"platform_system": "Linux", "platform_machine": "x86_64", "extra": ""}
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text and "#" not in text
    pins = {}
    for requirement in map(Requirement, text.splitlines()):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (pin,) = requirement.specifier
            assert pin.operator == "==" and "+" not in pin.version, requirement
            assert pins.setdefault(canonicalize_name(requirement.name), pin.version) == pin.version
    wanted = [*map(Requirement, PROJECT["dependencies"]), *named("train", environment), *named("test", environment)]
    assert {"liger-kernel", "peft"} < {requirement.name for requirement in wanted}
    for requirement in wanted:
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_a_range_stands_in_one_place() -> None:
    """Other extras name the extra of a package that fastkd works with."""
    for extra in doctor.PARTNERS:
        (package,) = map(Requirement, EXTRAS[extra])
        others = [Requirement(line).name for name, lines in EXTRAS.items() if name != extra for line in lines]
        assert package.name not in others and package.specifier
