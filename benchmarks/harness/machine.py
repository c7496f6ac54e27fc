"""What a benchmark ran on."""

from __future__ import annotations

import platform
import re
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        cpu = found[1] if found else cpu
    packages = ("torch", "fastkd", "liger-kernel", "orda-kernel", "triton")
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in packages},
            "cuda": torch.version.cuda,
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def titled(host: dict, on: str) -> str:
    """A line over the tables of a machine: what measured, the versions and the day."""
    versions = ", ".join(f"{k} {v}" for k, v in host["versions"].items() if v)
    return f"{on} ({versions}; {host['date'][:10]})"
