"""What README, CONTRIBUTING.md and docs/ say holds: blocks run, flags, names, files and links exist.

A page's blocks are taken in their order, in a folder of their own, and its Python shares one namespace. ``python`` and
``bash`` blocks run, and a ``text`` block behind one is what it prints. Of ``sh`` blocks, whose commands take too long,
every word is read by the program that it is for.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_origin

import pytest

import fastkd
from fastkd import train
from fastkd.train import cli, plan
from fastkd.train.flags import config
from fastkd.train.flags.arguments import parse

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN, READ, PRINTED = ("python", "bash"), "sh", "text"
# Not every platform has these. TRL's names are looked at where it is, in a test of their own.
NEEDS = {"liger.md": "liger_kernel", "trl.md": "trl"}
MODULES = ("fastkd.nn", "fastkd.functions", "fastkd.distributed", "fastkd.integrations.liger", "fastkd.train")


class Block(NamedTuple):
    language: str
    text: str
    line: int  # of the page, where the text begins


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [Block(m[1].strip(), m[2], text[: m.start(2)].count("\n") + 1) for m in FENCE.finditer(text)]
    assert text.count("```") == 2 * len(found), f"{page}: a block that is indented, or has no end"
    return found


def prose(page: Path) -> str:
    """The page without its blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---- commands -------------------------------------------------------------------------------------------------------


def commands(block: Block) -> list[list[str]]:
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def behind(words: Sequence[str], module: str) -> list[str] | None:
    """What a command gives to ``-m module``, or None."""
    at = next((i for i, word in enumerate(words) if words[i - 1] == "-m" and word == module), None)
    return None if at is None else list(words[at + 1 :])


def check(words: list[str]) -> None:
    """Fails unless the command is one that could run: its program is known, and takes these words."""
    program, *rest = words
    flags = rest if program == "fastkd-train" else behind(words, "fastkd.train.cli")
    if flags is not None:
        check_flags(flags)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [word for word in rest if "=" not in word and word not in targets] == []
    elif program == "pip":
        for extra in re.findall(r"\[(.*?)\]", " ".join(rest)):
            assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
    elif program == "sbatch":
        assert (train.LAUNCHERS / rest[0]).is_file()
    elif program == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), f"no module {rest[1]}"
    else:
        assert program in ("python", ".ci/run") and (ROOT / (rest or words)[0]).is_file(), f"unknown command: {words}"


def check_flags(flags: list[str]) -> None:
    """Parses them as fastkd-train does, and leaves what a run would for later commands to name."""
    if "--list_methods" in flags or "--demo" in flags:
        return
    ours, args = parse([*flags, "--use_cpu"])  # without a GPU transformers refuses --bf16 in words alone
    out = Path(str(args.output_dir))
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(ours.config_text(args), encoding="utf-8")


def run(words: list[str]) -> None:
    program, *rest = words
    if program == "fastkd-train":
        assert cli.main([*rest, "--disable_tqdm", "true"]) == 0
    elif (flags := behind(words, "fastkd.train.plan")) is not None:
        assert plan.main(flags) == 0
    else:
        raise AssertionError(f"unknown command: {words}")


def test_examples_of_the_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = re.findall(
        r"^  \w(?:.*\\\n)*.*$", (config.TEXTS / "examples.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(shown) > 7
    for words in commands(Block(READ, "\n".join(shown), 1)):
        assert words[0] in ("fastkd-train", "torchrun")
        check(words)


# ---- blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_work(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(NEEDS.get(page.name, "torch"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for block, after in pairwise([*blocks(page), None]):
        assert block is not None
        where, printed = f"{name_of(page)}:{block.line}", io.StringIO()
        with contextlib.redirect_stdout(printed):
            if block.language == "python":
                code = "\n" * (block.line - 1) + block.text  # at its place in the page, for tracebacks
                exec(compile(code, str(page), "exec", dont_inherit=True), names)
            elif block.language == "bash":
                for words in commands(block):
                    run(words)
            elif block.language == READ:
                for words in commands(block):
                    check(words)
            else:
                assert block.language == PRINTED, f"{where}: expected python, bash, sh or text, got {block.language!r}"
        if after is not None and after.language == PRINTED:
            assert block.language in RUN, f"{where}: what prints this?"
            assert printed.getvalue() == after.text, where


# ---- words ----------------------------------------------------------------------------------------------------------


def spans(page: Path) -> list[str]:
    """What the page sets in code, in its prose and its tables."""
    return re.findall(r"`([^`\n]+)`", prose(page))


@functools.cache
def known_flags() -> set[str]:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert cli.main(["--help_all"]) == 0
    return set(re.findall(r"--(\w+)", text.getvalue()))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_exist(page: Path) -> None:
    others = {
        "processes",
        "memory_gb",
        "table",
        "write",
        "json",
        "seconds",
        "quick",
    }  # of plan, of studies, of benchmarks
    others |= {"out", "only", "prepare", "read", "rehearse"}  # of benchmarks.device
    assert {flag for span in spans(page) for flag in re.findall(r"(?<!\S)--(\w+)", span)} <= known_flags() | others


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_and_files_exist(page: Path) -> None:
    for span in spans(page):
        if re.fullmatch(r"fastkd(\.\w+)+(\(.*\))?", span):
            resolve(span.partition("(")[0])
        elif re.fullmatch(r"(fastkd|tests|benchmarks|docs|csrc|kernels)/[\w./-]*", span):
            assert (ROOT / span).exists(), span
        elif span.startswith(("python -m ", "make ")):
            check(shlex.split(span))


def test_the_map_has_every_room() -> None:
    package = ROOT / "fastkd"
    files = {f"fastkd/{path.name}" for path in package.glob("[a-z]*.py")}
    rooms = {f"{path.parent.relative_to(ROOT)}/" for path in package.rglob("__init__.py")} - {"fastkd/"}
    drivers = "fastkd/ops/drivers/"  # it is named beside the ops
    assert files | rooms - {drivers} <= set(spans(ROOT / "CONTRIBUTING.md"))


def resolve(name: str) -> Any:
    """The module or the object in one that a dotted name means."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            found: Any = importlib.import_module(".".join(parts[:n]))
            for part in parts[n:]:
                found = getattr(found, part)
            return found
    raise AssertionError(name)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.is_file(), target
        if anchor and "reference" not in path:
            assert anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    """What its headings are called in links."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", title.lower()).strip().replace(" ", "-") for title in titles}


# ---- messages -------------------------------------------------------------------------------------------------------

FOREIGN = {  # of torch and transformers
    "index out of range in self",
    "aten.mm.default got mixed torch.Tensor and DTensor",
    "Your setup doesn't support bf16/gpu",
    "cannot import name 'get_kernel' from 'kernels'",
}


def test_messages_that_are_explained_are_said() -> None:
    """What docs/troubleshooting.md quotes has words of the sources, between the names and numbers that differ."""
    nodes = [node for path in (ROOT / "fastkd").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    said = FOREIGN | {text for string in strings if len(text := string.strip(": ")) >= 12 and " " in text}
    tables = re.findall(r"^\| message \|.*\n\|.*\n((?:\|.*\n)+)", prose(DOCS / "troubleshooting.md"), re.MULTILINE)
    messages = [message.rstrip(" .") for message in re.findall(r"^\| `(.*?)`", "".join(tables), re.MULTILINE)]
    assert len(messages) > 30
    assert [message for message in messages if not any(x in message or message in x for x in said)] == []


# ---- the reference --------------------------------------------------------------------------------------------------

PUBLIC = [
    *(f"fastkd.{name}" for name in fastkd.__all__),
    *(f"{module}.{name}" for module in MODULES for name in importlib.import_module(module).__all__),
]
SHOWN = re.findall(r"^::: ([\w.]+)$", "".join(page.read_text() for page in DOCS.glob("reference/*.md")), re.MULTILINE)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_in_the_reference(name: str) -> None:
    value = resolve(name)
    if inspect.ismodule(value):
        assert f"`{name}`" in "".join(page.read_text() for page in PAGES)
    elif isinstance(value, str | Path):
        assert any(f"`{name}`" in page.read_text() for page in DOCS.glob("reference/*.md"))
    else:  # by itself, or with all that its module names
        assert name in SHOWN or name.rpartition(".")[0] in SHOWN
        documented = not callable(value) or get_origin(value) is Literal  # a type's name has no docstring of its own
        assert documented or vars(value).get("__doc__", value.__doc__)


def test_the_names_for_trl_are_in_the_reference() -> None:
    pytest.importorskip("trl")
    for name in importlib.import_module("fastkd.integrations.trl").__all__:
        test_public_names_are_in_the_reference(f"fastkd.integrations.trl.{name}")


@pytest.mark.parametrize("loss", [name for name in fastkd.__all__ if name.endswith(("_kl", "_loss"))])
def test_every_argument_is_explained(loss: str) -> None:
    """Where the loss is documented, or where it says that the others are."""
    function = getattr(fastkd, loss)
    text = inspect.getdoc(function) or ""
    if other := re.search(r"The other arguments, .* are those of ``fastkd\.(\w+)``", text):
        text += inspect.getdoc(getattr(fastkd, other[1])) or ""
    lines = re.findall(r"^    ([\w, ]+):", text, re.MULTILINE)
    explained = {name for line in lines for name in line.split(", ")}
    assert set(inspect.signature(function).parameters) <= explained
    assert set(re.findall(r"^(\w+):$", text, re.MULTILINE)) >= {"Args", "Returns", "Raises"}
    assert re.search(r"(arXiv|ICLR|logit_kl)", text), "where does it come from?"


# ---- the site -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_site_builds(tmp_path: Path) -> None:
    """`make docs`, where its packages are installed."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "losses" / "linear_kl" / "index.html").read_text()
    assert "<math" in page and "arithmatex" not in page
