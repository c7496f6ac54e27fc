"""The table of launch configurations, and that timing chooses among what computes the same."""

from __future__ import annotations

import importlib

import pytest
import torch

from fastkd.divergence import divergence_code

from .cases import DEVICE, distance, interpreted

pytest.importorskip("triton", reason="Triton is not installed")
tuning = importlib.import_module("fastkd.kernels.tuning")  # ours: a failure to import it is a failure
attention = importlib.import_module("fastkd.kernels.attention")

Config = tuning.Config

pytestmark = interpreted


class Timer:
    """Runs what it is given, and calls the one that comes at `fastest` the fastest."""

    def __init__(self, fastest: int):
        self.fastest, self.calls = fastest, 0

    def __call__(self, run) -> float:
        run()
        self.calls += 1
        return 1.0 if self.calls - 1 == self.fastest else 2.0


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list:
    """The configurations that kernels are launched with, in turn."""
    found, options = [], tuning._options

    def recorded(line, config):
        found.append((line[0], config))
        return options(line, config)

    monkeypatch.setattr(tuning, "_options", recorded)
    return found


# ---- table -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90", "sm_100", "gfx942", tuning.ANY])
def test_every_kernel_has_a_line(gpu: str):
    for kernel in tuning.EVERY.split():
        for size in (2, 4, 8):
            for width in (16, 32, 64, 128, 256, 512):
                config = tuning.heuristic(kernel, size, width, gpu)
                options = tuning._options((kernel, size, width, gpu), config)
                assert (options["BLOCK_M"], options["BLOCK_N"]) == config.tile
                assert gpu != "gfx942" or "maxnreg" not in options


def test_the_narrowest_line_that_fits(monkeypatch: pytest.MonkeyPatch):
    a, b, c, d, e = (Config((n, n), 4, 1) for n in range(5))
    lines = {("f", 2, 64, "any"): a, ("g f", 2, 128, "any"): b, ("f", 2, 32, "x"): c, ("f", 4, 64, "any"): d}
    lines["f", 2, 128, "z"] = e
    monkeypatch.setattr(tuning, "TABLE", lines)
    wanted = {(16, "y"): a, (64, "y"): a, (65, "y"): b, (512, "y"): b, (16, "x"): c, (33, "x"): a, (512, "x"): b}
    wanted |= {(16, "z"): e, (512, "z"): e}
    for (width, gpu), config in wanted.items():
        assert tuning.heuristic.__wrapped__("f", 2, width, gpu) == config
    assert tuning.heuristic.__wrapped__("f", 4, 16, "x") == d


def test_causal_gradients_can_run_every_configuration():
    """They split keys where a block of queries starts: rows are a multiple of columns."""
    every = [(line[:2], config) for line, config in tuning.TABLE.items()]
    every += [(line, config) for line, configs in tuning.CANDIDATES.items() for config in configs]
    for line, config in every:
        assert config.tile[0] % config.tile[1] == 0, (line, config)


# ---- tuning ----------------------------------------------------------------------------------------------------------


def attend(causal: bool = True, queries: int = 70, divergence: str = "forward_kl", bias: str = "diagonals"):
    torch.manual_seed(0)
    x, y = (torch.randn(1, queries, 2 * width, device=DEVICE).bfloat16() for width in (12, 24))
    coefficient = torch.rand(1, 2, queries, device=DEVICE).double()
    shape = (2, 9) if bias == "diagonals" else (1, 2, queries, queries)
    biases = torch.randn(shape, device=DEVICE), None
    wanted = [True, True, True]
    arguments = coefficient, None, causal, 2, 0.5, 0.4, wanted, divergence_code(divergence), 0.5
    return attention.attention_kl(x, x, y, y, *biases, *arguments)


def relate(divergence: str) -> list:
    torch.manual_seed(0)
    x, y = (torch.randn(1, 70, 2 * width, device=DEVICE).bfloat16() for width in (12, 24))
    coefficient = torch.rand(1, 2, 70, device=DEVICE).double()
    lists = [x], [y], [coefficient], [None], [True]
    losses, gradients = attention.relation_kl(*lists, 2, [True], divergence_code(divergence), 0.5)
    return losses + gradients


@pytest.mark.parametrize("kernel, call", [
    ("forward", lambda: attend(divergence="forward_kl")),
    ("scores", lambda: attend(divergence="reverse_kl")),
    ("scores", lambda: attend(divergence="jsd", bias="dense")),
    ("gradient", lambda: relate("reverse_kl")),
    ("mixture_gradient", lambda: relate("jsd")),
])  # fmt: skip
@pytest.mark.long
def test_candidates_of_attention_agree(monkeypatch: pytest.MonkeyPatch, kernel: str, call):
    """Every one of them, put in the place of the table's."""
    plain = call()
    tiles = {config.tile: config for config in tuning.CANDIDATES[kernel, 2]}
    heuristic = tuning.heuristic
    for config in tiles.values():
        monkeypatch.setattr(tuning, "heuristic", lambda *line, c=config: c if line[0] == kernel else heuristic(*line))
        for mine, other in zip(call(), plain, strict=True):
            assert distance(mine, other) <= (1e-6 if other.dtype == torch.float64 else 4e-3), config


def test_the_fastest_is_used(monkeypatch: pytest.MonkeyPatch, used: list):
    """Timed by the first call of a kind, remembered for the next, and forgotten outside."""
    monkeypatch.setattr(tuning, "CANDIDATES", {("forward", 2): [Config((64, 16), 4, 1), Config((32, 32), 4, 2)]})
    plain = attend(queries=33)
    monkeypatch.setattr(tuning, "_milliseconds", None)  # no other timer than ours
    timer = Timer(fastest=2)
    with tuning.autotune(timer) as found:
        tuned = attend(queries=33)
        assert timer.calls == 3 + 1  # those of forward; the one there is for the gradient of scores
        del used[:]
        again = attend(queries=40)
    assert timer.calls == 4 and [kernel for kernel, _ in used] == ["forward", "scores"]
    assert used[0][1] == Config((32, 32), 4, 2)
    assert all(config == tuning.heuristic(kernel, 2, 32, tuning._gpu()) for kernel, config in used[1:])
    for mine, other in zip(tuned, plain, strict=True):
        assert distance(mine, other) <= (1e-6 if other.dtype == torch.float64 else 4e-3)
    assert again[0].shape == (1, 2, 40)
    lines = found.lines().splitlines()
    assert len(lines) == 2
    table = eval("{" + lines[0].split("#")[0] + "}", {"Config": Config})
    assert table == {("forward", 2, 64, tuning._gpu()): Config((32, 32), 4, 2)}  # at least 64 beside a bias
    assert "1.0000 ms, 2.0000 by the table" in lines[0]
    del used[:]
    assert all(torch.equal(mine, other) for mine, other in zip(attend(queries=33), plain, strict=True))
    assert used[0][1] == tuning.heuristic("forward", 2, 64, tuning._gpu()) and timer.calls == 4


def test_what_is_timed_apart():
    """Causality and sizes beyond the next power of two; of equals the table's choice is taken."""
    with tuning.autotune(lambda run: 1.0) as found:
        for causal, queries, kinds in [(True, 33, 2), (False, 33, 4), (False, 40, 4), (False, 17, 6)]:
            attend(causal, queries)
            assert len(found.found) == kinds
    for (line, _, _), times in found.found.items():
        assert min(times, key=times.__getitem__) == tuning.heuristic(*line)
        assert set(tuning.CANDIDATES[line[:2]]) <= set(times)


def test_a_configuration_that_does_not_fit_is_not_taken():
    def timer(run):
        if not timer.refused:
            timer.refused = True
            raise tuning.OutOfResources(1, 0, "shared memory")
        return 1.0

    timer.refused = False
    with tuning.autotune(timer) as found:
        attend(queries=17)
    times = next(iter(found.found.values()))
    assert float("inf") == next(iter(times.values())) and min(times.values()) == 1.0
