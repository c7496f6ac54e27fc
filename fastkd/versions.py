"""Which versions of other packages fastkd is tested with: the ranges of its metadata, and what is installed.

None of the packages is imported. In a source tree that was never installed there is no metadata, and nothing is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement


@dataclass(frozen=True)
class Package:
    """A package that fastkd needs: the range that is tested, as `>=5.15,<5.25`, and what is installed, if it is."""

    name: str
    tested: str
    installed: str | None
    in_range: bool

    def __str__(self) -> str:
        if self.installed is None:
            return f"not installed, tested with {self.tested}"
        return f"{self.installed}, {'in' if self.in_range else 'NOT in'} the tested range {self.tested}"


def packages(extra: str = "") -> list[Package]:
    """Return what fastkd needs for an extra of its, and for itself."""
    try:
        lines = metadata.requires("fastkd") or []
    except metadata.PackageNotFoundError:
        return []
    wanted = [Requirement(line) for line in lines]
    return [_package(one) for one in wanted if one.marker is None or one.marker.evaluate({"extra": extra})]


def _package(wanted: Requirement) -> Package:
    tested = ",".join(sorted(map(str, wanted.specifier), reverse=True))
    try:
        installed = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return Package(wanted.name, tested, None, False)
    return Package(wanted.name, tested, installed, wanted.specifier.contains(installed, prereleases=True))


def missing(found: Sequence[Package]) -> list[str]:
    """Return the names of the packages that are not installed."""
    return [package.name for package in found if package.installed is None]


def untested(extra: str = "") -> str | None:
    """Return a line on the installed packages whose versions are outside of what is tested, or None."""
    found = [package for package in packages(extra) if package.installed and not package.in_range]
    if not found:
        return None
    names = ", ".join(f"{one.name} {one.installed} (expected {one.tested})" for one in found)
    return f"untested: {names}; pip install 'fastkd[{extra}]' brings what is tested"


def require(extra: str) -> None:
    """Raises an ImportError unless what an integration stands on is installed, in a version that is tested."""
    unfit = [one for one in packages(extra) if not one.in_range]
    if unfit:
        given = ", ".join(f"{one.name} {one.installed or 'is missing'}" for one in unfit)
        wanted = ", ".join(f"{one.name}{one.tested}" for one in unfit)
        raise ImportError(f"fastkd's {extra}: expected {wanted}, got {given}; pip install 'fastkd[{extra}]'")
