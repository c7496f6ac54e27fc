"""`import fastkd` needs torch alone; whatever else is missing leaves a working library that says what it lacks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def without(*names: str) -> str:
    """Code that makes these modules impossible to import."""
    return f"import sys\nsys.modules.update(dict.fromkeys({names!r}))\n"


LOSS = """
import torch, fastkd
student, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
fastkd.logit_kl(student, teacher).backward()
hidden = torch.randn(4, 3, requires_grad=True)
fastkd.linear_kl(hidden, torch.randn(9, 3), torch.randn(4, 5), torch.randn(9, 5)).backward()
assert student.grad.norm() > 0 and hidden.grad.norm() > 0
"""


# An interpreter's first seconds go into torch: here once for several codes, each of which runs in a fork.
FORKS = """
import os, torch._dynamo
for code in {codes!r}:
    if os.fork() == 0:
        exec(code, {{}})
        print(end="", flush=True), os._exit(0)
    assert os.wait()[1] == 0, code
"""


def python(*codes: str, path: str | None = None) -> str:
    """Runs code in a fresh interpreter, away from the repository; returns what it printed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment |= {} if path is None else {"PYTHONPATH": path}
    codes = tuple(map(textwrap.dedent, codes))
    code = codes[0] if len(codes) == 1 else FORKS.format(codes=codes)
    done = subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_works_without_and_pulls_in_nothing_heavy():
    heavy = "import sys, fastkd; assert not {'transformers', 'datasets', 'matplotlib'} & set(sys.modules)"
    python(heavy, *(without(name) + LOSS for name in ("triton", "transformers", "fastkd._C")))
    python(LOSS + "import sys; assert 'torch._dynamo' not in sys.modules", path=str(ROOT))  # it takes two seconds


def test_functions_bring_their_operators_along():
    names = ("logit_kl", "linear_kl", "topk_logit_kl", "topk_linear_kl", "attention_kl", "relation_kl", "cka_loss")
    code = f"import torch, fastkd.functions\nfor name in {names}: getattr(torch.ops.fastkd, name)"
    python(code, path=str(ROOT))


def test_works_with_torch_alone():
    python(without("triton", "fastkd._C", "numpy") + LOSS)


def test_what_is_missing_is_told():
    """By impl="fused", which cannot run, and by the doctor, whose exit code it is."""
    fused, missing, healthy = python(
        without("fastkd._C")
        + "import torch, fastkd\ntry: fastkd.logit_kl(torch.randn(2, 3), torch.randn(2, 3), impl='fused')\n"
        + "except RuntimeError as error: print(error, '<end>')",
        without("fastkd._C") + "from fastkd import doctor; print(doctor.main(), '<end>')",
        "from fastkd import doctor; print(doctor.main())",
    ).split("<end>")
    assert "fastkd._C" in fused and "FASTKD_BUILD=cpu" in fused
    assert "reference, because the compiled extension" in missing and missing.strip().endswith("1")
    assert 'impl="auto" on cpu' in healthy and healthy.strip().endswith("0")


@pytest.mark.parametrize("install", ["editable", "source tree"])
def test_kernels_are_ours_only_inside_fastkd(install: str):
    """The folder `kernels/` is imported as fastkd.kernels and never as `kernels`, which is another project's name."""
    out = python(
        """
        import importlib.util, fastkd.kernels
        assert fastkd.kernels.__name__ == "fastkd.kernels"
        print(importlib.util.find_spec("kernels") and importlib.util.find_spec("kernels").origin)
        """,
        path=None if install == "editable" else str(ROOT),
    )
    if install == "editable":
        assert str(ROOT) not in out


def test_wheel_holds_what_it_should(tmp_path: Path):
    """A pure-Python wheel, built from a copy of the tree: every package, the kernels inside fastkd, no other top."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("fastkd", "kernels", "csrc", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", ".*"))
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
    subprocess.run(
        [*build, "-w", str(tmp_path), str(source)],
        env=os.environ | {"FASTKD_BUILD": "none"},
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    files = {path.relative_to(source) for top in ("fastkd", "kernels") for path in (source / top).rglob("*.*")}
    wanted = {str(path if path.parts[0] == "fastkd" else "fastkd" / path) for path in files}
    assert wanted - set(names) == set()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastkd"}

    unpacked = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(unpacked)
    out = python(
        "import fastkd.kernels; print(fastkd.kernels.__file__)\n" + LOSS,
        path=str(unpacked),
    )
    assert str(unpacked) in out


@pytest.mark.parametrize(("mode", "message"), [("gpu", "expected one of auto, none, cpu, cuda, got 'gpu'")])
def test_build_mode_is_checked(mode: str, message: str):
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=os.environ | {"FASTKD_BUILD": mode},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert message in done.stderr
