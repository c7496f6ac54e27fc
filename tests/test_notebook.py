"""The notebook has no outputs, names what there is, and runs from top to bottom."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "getting_started.ipynb"
WHOLE = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
CELLS: list[dict[str, Any]] = WHOLE["cells"]


def text_of(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def resolved(name: str) -> Any:
    """What a dotted name of fastkd stands for."""
    found: Any = importlib.import_module("fastkd")
    for i, part in enumerate(name.split(".")[1:], 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(name.split(".")[:i]))
        found = getattr(found, part)
    return found


def test_the_notebook_is_one_without_outputs_and_names_what_there_is() -> None:
    whole = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (whole["nbformat"], whole["nbformat_minor"]) == (4, 5) and whole["metadata"]["kernelspec"][
        "name"
    ] == "python3"
    ids = [cell["id"] for cell in CELLS]
    assert len({*ids}) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", one) for one in ids)
    for before, cell in zip([{}, *CELLS], CELLS, strict=False):
        if cell["cell_type"] == "code":
            assert {*cell} == {"cell_type", "execution_count", "id", "metadata", "outputs", "source"}
            assert cell["outputs"] == [] and cell["execution_count"] is None and cell["metadata"] == {}, cell["id"]
            assert before["cell_type"] == "markdown", f"{cell['id']}: nothing says what it shows"
        else:
            assert cell["cell_type"] == "markdown" and {*cell} == {"cell_type", "id", "metadata", "source"}
    names = {name for cell in CELLS for name in re.findall(r"\bfastkd(?:\.[A-Za-z_]\w*)+", text_of(cell))}
    assert {"fastkd.linear_kl", "fastkd.hidden_states", "fastkd.head", "fastkd.targets"} < names
    for name in names:
        resolved(name)
    for path in re.findall(r"`(docs/[\w/.-]*)`", "".join(text_of(cell) for cell in CELLS)):
        assert (ROOT / path).exists(), path


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_the_notebook_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In half a minute of one core; what its texts say of its figures holds."""
    pytest.importorskip("transformers")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pyplot.switch_backend("Agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in CELLS:
        if cell["cell_type"] == "code":
            exec(compile(text_of(cell), f"{NOTEBOOK.name}: {cell['id']}", "exec"), names)
    assert len(pyplot.get_fignums()) == 2 and not list(tmp_path.iterdir())
    pyplot.close("all")

    plain, fused = names["found"]["plain"], names["found"]["fused"]
    assert fused["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    for ours, theirs in zip(fused["gradients"], plain["gradients"], strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert 0 < fused["MiB"] < plain["MiB"]
    losses = names["losses"]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    before, after = re.findall(r"held out, \w+: +divergence ([\d.]+)", capsys.readouterr().out)
    assert float(after) < 0.5 * float(before)
    assert names["difference"] <= 1e-5
