"""What is published: its contents, what its extension asks of a system, an installation without a compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastkd

ROOT = Path(__file__).parents[1]
# Python's limited API, torch's stable ABI, and of C and C++ what manylinux_2_28 has: glibc 2.28, GCC 8's libstdc++.
ALLOWED = re.compile(r"PyModule_(Create2|AddIntConstant)|(aoti_)?torch_\w+|_ITM_\w+|__gmon_start__")
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}

# Every op forward and backward on the kernels: impl="fused" takes nothing else.
OPS = """
import torch, fastkd, fastkd._C
from fastkd import doctor
def leaf(*shape): return torch.randn(*shape, requires_grad=True)
s, h, q, k = leaf(6, 50), leaf(6, 8), leaf(2, 5, 8), leaf(2, 5, 8)
t, th, w, tw = torch.randn(6, 50), torch.randn(6, 12), leaf(50, 8), torch.randn(50, 12)
tq, tk = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
x, y = leaf(2, 5, 8), torch.randn(2, 5, 12)
known = fastkd.TopK.from_logits(t, 4)
for loss in (
    lambda impl: fastkd.logit_kl(s, t, impl=impl),
    lambda impl: fastkd.logit_kl(s, known, impl=impl),
    lambda impl: fastkd.linear_kl(h, w, th, tw, impl=impl),
    lambda impl: fastkd.attention_kl(q, k, tq, tk, num_heads=2, impl=impl),
    lambda impl: fastkd.relation_kl(x, y, num_heads=2, impl=impl),
    lambda impl: fastkd.cka_loss(x, y, impl=impl),
):
    found = []
    for impl in ("fused", "reference"):
        for leaf in (s, h, w, q, k, x): leaf.grad = None
        value = loss(impl)
        value.backward()
        found.append([value.detach(), *(leaf.grad for leaf in (s, h, w, q, k, x) if leaf.grad is not None)])
    for one, other in zip(*found, strict=True): torch.testing.assert_close(one, other)
state = dict(doctor.report())
print(fastkd.__file__, state["CPU kernels"], state['impl="auto" on cpu'], torch.__version__, sep="; ")
"""


def test_the_extension_is_one_stable_binary_for_every_system_of_torch() -> None:
    """abi3, no C++ symbol of torch or without a version, none newer than torch's own wheels allow, no path of here."""
    import fastkd._C

    path = Path(fastkd._C.__file__)
    assert path.name == "_C.abi3.so"

    def told(*command: str) -> str:
        return subprocess.run([*command, str(path)], capture_output=True, text=True, check=True).stdout

    dynamic = told("readelf", "-d")
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    if "libcudart" in dynamic:
        pytest.skip("built with the CUDA kernels, which are for this machine and in no wheel")
    names = [line.split()[-1] for line in told("nm", "-D", "--undefined-only").splitlines()]
    assert "torch_library_impl" in names
    wrong = []
    for name in names:
        symbol, _, version = name.partition("@")
        family, _, number = version.partition("_")
        of_system = family in NEWEST and tuple(map(int, number.split("."))) <= NEWEST[family]
        if not (of_system or (not version and ALLOWED.fullmatch(symbol))):
            wrong.append(name)
    assert not wrong


@pytest.fixture(scope="module")
def wheel() -> Path:
    found = list(ROOT.glob(f"build/dist/fastkd-{fastkd.__version__}-*.whl"))
    if not found:
        pytest.skip(f"no wheel of fastkd {fastkd.__version__} in build/dist: make wheel")
    (path,) = found
    return path


@pytest.mark.long
def test_the_wheel_holds_the_tree(wheel: Path) -> None:
    files = zipfile.ZipFile(wheel)
    names = set(files.namelist())
    assert re.search(r"-cp310-abi3-manylinux_2_28_\w+\.whl$", wheel.name)
    assert "fastkd/_C.abi3.so" in names
    for top, package in (("fastkd", "fastkd"), ("kernels", "fastkd/kernels")):
        for path in (ROOT / top).rglob("*.py"):
            inside = f"{package}/{path.relative_to(ROOT / top).as_posix()}"
            assert inside in names and files.read(inside) == path.read_bytes(), f"{inside}: make wheel"
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastkd"}


@pytest.mark.long
def test_the_source_distribution_holds_the_examples(wheel: Path) -> None:
    top = f"fastkd-{fastkd.__version__}"
    with tarfile.open(wheel.with_name(f"{top}.tar.gz")) as files:
        for path in [*(ROOT / "examples").glob("*.py"), *(ROOT / "examples").glob("*.ipynb")]:
            found = files.extractfile(f"{top}/examples/{path.name}")
            assert found is not None and found.read() == path.read_bytes(), f"{path.name}: make wheel"
        assert not [name for name in files.getnames() if "checkpoint.ipynb" in name or name.startswith(f"{top}/tests")]


@pytest.mark.long
@pytest.mark.timeout(60)  # what installing it and a first run may take
@pytest.mark.parametrize("python", [sys.executable, *filter(None, os.environ.get("FASTKD_PYTHONS", "").split(":"))])
def test_it_runs_where_no_compiler_is(wheel: Path, tmp_path: Path, python: str) -> None:
    """In a new environment that sees an interpreter's torch. FASTKD_PYTHONS names more interpreters that have one."""
    where = "import importlib.util as u, pathlib as p; print(p.Path(u.find_spec('torch').origin).parents[1])"
    asked = subprocess.run([python, "-c", where], capture_output=True, text=True)
    if asked.returncode:
        pytest.skip(f"{python} has no torch")
    new = tmp_path / "new"
    subprocess.run([python, "-m", "venv", "--without-pip", str(new)], check=True)
    alone = {"PATH": str(new / "bin"), "HOME": str(tmp_path), "CC": "/bin/false", "CXX": "/bin/false"}
    assert not any(shutil.which(name, path=alone["PATH"]) for name in ("cc", "gcc", "g++", "c++", "clang", "nvcc"))
    install = [sys.executable, "-m", "pip", "--python", str(new / "bin/python"), "install", "-q", "--no-index"]
    subprocess.run([*install, "--no-deps", str(wheel)], check=True, env={"PATH": os.defpath, "HOME": str(tmp_path)})
    (site,) = new.glob("lib/python3*/site-packages")
    (site / "torch_of_another.pth").write_text(asked.stdout)  # of there no .pth file is read: no editable fastkd
    done = subprocess.run([new / "bin/python", "-c", OPS], capture_output=True, text=True, cwd=tmp_path, env=alone)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    file, kernels, auto, _ = done.stdout.split("; ")
    assert Path(file).is_relative_to(new) and kernels.startswith("active") and not auto.startswith("reference")


def test_the_version_stands_in_one_place() -> None:
    """pyproject takes it from the package; CITATION.cff and CHANGELOG.md say the same."""
    assert f"\nversion: {fastkd.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[1] == fastkd.__version__
