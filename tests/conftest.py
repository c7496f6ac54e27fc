"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
from collections.abc import Generator, Iterator

# Of torch, NumPy's OpenBLAS and what tests start: their threads wait for each other by turning round, and on cores that
# several test processes share they do nothing else for most of the time. Before any of them is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

from . import interpreter
from .forks import Forks
from .forks import forks as forks_with

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("unhurried", deadline=None)  # a machine may be busy
hypothesis.settings.load_profile("unhurried")
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, and the tool goes by that

torch.set_num_threads(1)  # whatever is set

HANDLED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM") if hasattr(signal, name)]

# The files that take longest, of the long tests and of the others: one that is begun last leaves the other cores idle.
FIRST = (
    "tests/test_compile_gpu.py",
    "tests/train/test_processes.py",
    "tests/test_benchmarks.py",
    "tests/test_examples.py",
    "tests/test_contract.py",
    "tests/test_cka_loss.py",
    "tests/train/test_minidisc.py",
    "tests/train/test_tool.py",
    "tests/train/test_plan.py",
    "tests/train/test_faults.py",
    "tests/test_triton_attention.py",
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays: no garbage is looked for meanwhile, nor in it later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with them; the others stay in their order."""
    place = {name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.nodeid.split("::")[0], len(FIRST)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _handlers_of_signals() -> Iterator[None]:
    """A handler that a test leaves behind is that test's failure, not one of whichever comes next in its process."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    yield
    left = {number: signal.getsignal(number) for number in HANDLED}
    for number in HANDLED:
        signal.signal(number, before[number] or signal.SIG_DFL)
    assert left == before


@pytest.fixture(scope="module")
def forks(request: pytest.FixtureRequest) -> Iterator[Forks]:
    """What the tests of a file run in processes, which have its module in memory."""
    with forks_with(request.module.__name__, OMP_NUM_THREADS="1") as made:
        yield made


@pytest.fixture(scope="session")
def transformers_forks() -> Iterator[Forks]:
    """Programs in processes with transformers in memory, and nothing of fastkd that registers models there."""
    pytest.importorskip("transformers")
    modules = ["fastkd", "torch._dynamo", "torch.distributed.fsdp", "transformers.trainer"]
    modules += [f"transformers.models.{family}.modeling_{family}" for family in ("bert", "t5")]
    with forks_with(*modules, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="") as made:
        yield made


@pytest.fixture(scope="session", autouse=True)
def _interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
            interpreter.adapt(patch)
        yield
