"""Files of results that are whole at any time, whatever cuts a run off."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def save(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
