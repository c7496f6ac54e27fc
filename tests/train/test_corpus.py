"""The embedded corpus is read and never run; splits do not move."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastkd.train.data import corpus

SOURCE = '''"""Documentation of the module, long enough."""
raise SystemExit("scanned modules must not run")
class A:
    """Documentation of   the class,
    long enough."""
    async def f(self):
        """Documentation of the method, long enough."""
    def g(self):
        """Short."""
    def h(self):
        """Documentation of the method, long enough."""
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for name in ("b.py", "a/z.py", "site-packages/no.py", "a/test/no.py", "tests/no.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SOURCE)
    (tmp_path / "a" / "broken.py").write_text("def (:")
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text("topics = {'k': 'A topic of the language\\nreference.'}")
    return tmp_path


def test_files_are_sorted_without_tests_and_packages(library: Path) -> None:
    names = [path.relative_to(library).as_posix() for path in corpus.source_files(library)]
    assert names == ["a/broken.py", "a/z.py", "b.py", "pydoc_data/topics.py"]


def test_texts_are_distinct_collapsed_and_from_every_kind_of_place(library: Path) -> None:
    assert corpus.embedded_corpus(corpus.source_files(library)) == [
        "Documentation of the module, long enough.",
        "Documentation of the class, long enough.",
        "Documentation of the method, long enough.",
        "A topic of the language reference.",
    ]


def test_reading_the_standard_library_imports_nothing_of_it() -> None:
    code = (
        "import inspect, sys; from fastkd.train.data import corpus\n"  # ast imports inspect to clean strings
        "files = corpus.source_files(); before = set(sys.modules)\n"
        "files = [f for f in files if f.name in ('antigravity.py', 'this.py', 'topics.py')]\n"
        "assert len(files) == 3 and corpus.embedded_corpus(files)\n"
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"  # `this` would also have printed a poem


def test_the_same_texts_in_another_process_with_another_hash_seed(library: Path) -> None:
    code = (
        "import sys, pathlib; from fastkd.train.data import corpus\n"
        "texts = corpus.embedded_corpus(corpus.source_files(pathlib.Path(sys.argv[1])))\n"
        "print(texts, [corpus.is_held_out(text, 50) for text in texts])"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code, str(library)],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(corpus.__file__).parents[2])},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1


def test_a_texts_side_depends_on_the_text_alone(texts: list[str]) -> None:
    sides = [corpus.is_held_out(text) for text in texts]
    assert 0.02 < sum(sides) / len(texts) < 0.08
    # Fixed values: a change of the hash would silently mix the training texts of older artefacts into evaluations.
    assert [i for i in range(130) if corpus.is_held_out(f"text {i}")] == [106, 108, 110, 111, 123]


SUMMARISED = (
    '''"""Read a file.

The path is opened, its lines are taken one by one, and what they hold
is returned as a list of strings, without their ends.

    read("x")
"""
def two_lines():
    """Return what the first paragraph
    says in two lines.

    The body is long enough, at well above eighty characters, but there is no line that sums it up.
    """
def repeated():
    """Wait for the longest one.

    This function will wait for the longest one of all that were started, and returns it, if there is one.
    """
def short_body():
    """Return the longest one of them.

    None if there are none.
    """
def good():
    """Return the longest  one of them.
    '''
    + '''
    Of several that are equally long the first is returned, and None if there are none at all to choose from.
    """
def good_again():
    """Another summary of the same.

    Of several that are equally long the first is returned, and None if there are none at all to choose from.
    """
'''
)


def test_pairs_of_body_and_summary(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(SUMMARISED.replace("Read a file.", "Read the lines of a file."))
    assert corpus.embedded_pairs(corpus.source_files(tmp_path)) == [
        (
            "The path is opened, its lines are taken one by one, and what they hold is returned as a list of strings, "
            'without their ends. read("x")',
            "Read the lines of a file.",
        ),
        (
            "Of several that are equally long the first is returned, and None if there are none at all to choose from.",
            "Return the longest one of them.",
        ),
    ]


def test_classes_are_the_largest_packages_with_their_names_masked(tmp_path: Path) -> None:
    sizes = {"json": 4, "asyncio": 3, **{f"m{i}": 2 for i in range(9)}, "tiny": 1}
    for name, size in sizes.items():
        # One package has several files; the others are modules.
        path = tmp_path / ("json/decoder.py" if name == "json" else f"{name}.py")
        path.parent.mkdir(exist_ok=True)
        functions = [
            f'def f{i}():\n    """Text {i} of {name}.load, {name.upper()} and {name}x."""' for i in range(size)
        ]
        path.write_text("\n".join(functions))
    made = corpus.embedded_classes(root=tmp_path)
    assert made[:2] == [(f"Text {i} of module.load, module and asynciox.", "asyncio") for i in range(2)]
    counts = {label: sum(other == label for _, other in made) for _, label in made}
    assert len(counts) == 10 and counts["json"] == 4 and counts["asyncio"] == 3 and "tiny" not in counts
    assert len(dict(made)) == len(made)


def test_the_standard_librarys_pairs_and_classes() -> None:
    packages = ["asyncio", "email", "json", "logging", "http", "xml", "urllib", "importlib", "unittest", "ctypes"]
    packages += ["multiprocessing", "curses"]
    files = [file for file in corpus.source_files() if packages.count(file.parent.name)]
    pairs, classes = corpus.embedded_pairs(files), corpus.embedded_classes(files)
    assert len(pairs) > 300 and len(classes) > 1000
    assert len({label for _, label in classes}) == 10
    assert not any(target.lower().rstrip(".") in source.lower() for source, target in pairs)
    assert not any(label.lower() in source.lower().split() for source, label in classes)
    assert len(dict(pairs)) == len(pairs) and len(dict(classes)) == len(classes)
