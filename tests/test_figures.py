"""Figures in README and docs/performance.md are those of benchmarks/results/, rounded as they are written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.trainer import plans

from .test_docs import DOCS, ROOT, prose

PAGE = DOCS / "performance.md"

CPU, XEON = "amd-epyc-2-threads", "intel-xeon-2-threads"
# The problems of the tables, as a page calls them: in which file their results are, and under which name.
PROBLEMS = {
    "`linear_kl`, fp32": (CPU, "linear_kl T 2048 V 32128 768 -> 512 float32"),
    "`linear_kl`, bf16": (CPU, "linear_kl T 2048 V 32128 768 -> 512 bfloat16"),
    "`linear_kl`, 768 -> 512, fp32": (CPU, "linear_kl T 2048 V 32128 768 -> 512 float32"),
    "`linear_kl`, 768 -> 512, bf16": (CPU, "linear_kl T 2048 V 32128 768 -> 512 bfloat16"),
    "`logit_kl`, fp32": (CPU, "logit_kl T 2048 V 32128 float32, forward + backward"),
    "`logit_kl`, fp32, forward alone": (CPU, "logit_kl T 2048 V 32128 float32, forward"),
    "`relation_kl`, fp32": (f"{CPU}-relation_kl", "relation_kl B 8 A 12 L 512 64 -> 32 float32"),
    "`relation_kl`": (f"{CPU}-relation_kl", "relation_kl B 8 A 12 L 512 64 -> 32 float32"),
    "`relation_kl`, causal": (f"{CPU}-relation_kl", "relation_kl B 8 A 12 L 512 64 -> 32 float32, causal"),
    "`relation_kl`, queries, keys and values in 32 relation heads, 24 and 12 wide": (
        f"{CPU}-relation_kl",
        "relation_kl B 8 A 32 L 512 24 -> 12 float32, [Q, K, V]",
    ),
    "`attention_kl`, T5's bias, fp32": (
        f"{CPU}-attention_kl",
        "attention_kl B 8 A 12 L 512 64 -> 32 float32, T5's bias",
    ),
    "`attention_kl`, T5's relative bias": (
        f"{CPU}-attention_kl",
        "attention_kl B 8 A 12 L 512 64 -> 32 float32, T5's bias",
    ),
    "`linear_kl` of a top-k teacher": (
        f"{XEON}-linear_kl_topk",
        "linear_kl of a top-k teacher, T 2048 V 32128 K 64 512 float32",
    ),
    "`logit_kl` of a top-k teacher": (
        f"{XEON}-logit_kl_topk",
        "logit_kl of a top-k teacher, T 2048 V 32128 K 64 float32",
    ),
    "`cka_loss`, fp32": (f"{CPU}-cka_loss", "cka_loss N 8192 768 -> 512 float32, 6 pairs"),
    "`cka_loss`": (f"{CPU}-cka_loss", "cka_loss N 8192 768 -> 512 float32, 6 pairs"),
}
UNITS = {"s": 1.0, "ms": 1e3}


def results_of(file: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text(encoding="utf-8"))


def rows_of(file: str, problem: str) -> dict[str, Any]:
    return next(result["rows"] for result in results_of(file)["results"] if result["problem"] == problem)


def row_of(rows: dict[str, Any], name: str) -> Any:
    """The results of what the pages call so."""
    if name.startswith("plain torch"):
        return rows.get("eager", rows["reference"])
    if "GEMMs" in name:
        return next(row for key, row in rows.items() if "GEMMs" in key)
    return rows.get(name) or rows[name.partition(",")[0]]


def agrees(cell: str, value: float) -> bool:
    """Whether the number that a cell begins with is a value, rounded as it is written."""
    text = cell.split()[0]
    digits = len(text.partition(".")[2])
    return float(text) == (float(f"{value:.1e}") if "e" in text else round(value, digits))


def tables(page: Path) -> list[list[list[str]]]:
    found = re.findall(r"(?:^\|.*\|\n)+", prose(page), re.MULTILINE)
    return [[[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()] for table in found]


def test_the_table_of_readme_is_what_was_measured() -> None:
    (table,) = [table for table in tables(ROOT / "README.md") if "Liger" in table[0]]
    (_, *names), _, *lines = table
    assert len(lines) == 6
    for title, *cells in lines:
        for name, cell in zip(names, cells, strict=True):
            if cell != "-":
                row, (time, memory) = row_of(rows_of(*PROBLEMS[title]), name), cell.split(", ")
                assert agrees(time, row["min_s"] * UNITS[time.split()[1]]), (title, name)
                assert agrees(memory, row["peak_mib"]), (title, name)


def test_the_tables_of_performance_are_what_was_measured() -> None:
    checked = []
    for table in tables(PAGE):
        if table[0] != ["", "time", "against fastkd", "peak memory", "error"]:
            continue
        for name, time, ratio, memory, error in table[2:]:
            if name.startswith("**"):
                rows = rows_of(*PROBLEMS[name.strip("*")])
                checked.append(name)
                continue
            row = row_of(rows, name)
            assert agrees(time, row["min_s"] * UNITS[time.split()[1]]), (checked[-1], name)
            assert agrees(ratio, row["ratio"]), (checked[-1], name)
            assert memory == "-" or agrees(memory, row["peak_mib"]), (checked[-1], name)
            assert error == "-" or agrees(error, row["error"]), (checked[-1], name)
    assert len(checked) == 11


def test_what_losses_cost_on_the_page_of_choosing() -> None:
    """Of fastkd, of the problems that README and performance.md have by these names."""
    (table,) = [table for table in tables(DOCS / "losses" / "choosing.md") if table[0][-1] == "it costs"]
    for _, loss, cell in table[2:]:
        name = re.match(r"\[(`\w+`.*?)\]", loss)
        assert name is not None, loss
        bias = ", T5's bias" if name[1] == "`attention_kl`" else ""
        row = row_of(rows_of(*PROBLEMS[name[1] if "top-k" in name[1] else f"{name[1]}{bias}, fp32"]), "fastkd")
        time, memory = cell.split(", ")
        assert agrees(time, row["min_s"] * UNITS[time.split()[1]]), loss
        assert agrees(memory, row["peak_mib"]), loss
    assert len(table) == 2 + 6


def test_readme_says_of_the_demo_what_its_table_says() -> None:
    _, _, *lines = table_of("exact match (%)")
    found = {line[0].partition(":")[0]: line[2].split()[0] for line in lines}
    text = " ".join((ROOT / "README.md").read_text().split())
    distilled, teacher, scratch = (found[name] for name in ("distilled", "teacher", "scratch"))
    assert f"reaches {distilled} % of held-out dates, the teacher {teacher} %, and" in text
    assert f"from scratch {scratch} %" in text


def table_of(cell: str) -> list[list[str]]:
    """The only table of the page with such a cell in its header."""
    (found,) = [table for table in tables(PAGE) if cell in table[0]]
    return found


def seconds(cell: str, row: Any) -> bool:
    return agrees(cell, row["min_s"] * UNITS[cell.split()[1]])


def test_steps_of_training_are_what_was_measured() -> None:
    header, _, *lines = table_of("plain losses")
    assert header[1:] == ["fastkd", "plain losses", "both models alone", "fastkd, memory", "plain losses"]
    for method, ours, plain, models, memory, plain_memory in lines:
        problem = f"train step {method.strip('`')} T5-base -> T5-small B 8 Lx 512 Lz 128 V 32128"
        rows = rows_of(f"{CPU}-train_step", problem)
        assert seconds(ours, rows["fastkd"]) and seconds(plain, rows["eager"]) and seconds(models, rows["both models"])
        assert agrees(memory, rows["fastkd"]["peak_mib"]) and agrees(plain_memory, rows["eager"]["peak_mib"])
    assert len(lines) == 3


def test_steps_from_a_cache_are_what_was_measured() -> None:
    _, _, *lines = table_of("fastkd, from it")
    for cache, *cells in lines:
        title = f"train step kd T5-base -> T5-small B 8 Lx 512 Lz 128 V 32128 from {cache.strip('`')}"
        rows = rows_of(f"{XEON}-cached_step", title)
        measured = [rows[name] for name in ("fastkd", "uncached", "student alone")]
        assert all(seconds(cell, row) for cell, row in zip(cells, measured, strict=False))
        assert all(agrees(cell, row["peak_mib"]) for cell, row in zip(cells[3:], measured, strict=False))
    assert len(lines) == 2


def test_steps_in_other_loops_are_what_was_measured() -> None:
    _, _, *lines = table_of("of the memory")
    found = []
    for problem, *cells in lines:
        rows = rows_of(f"{XEON}-integrations", problem)
        ours, stock = rows["fastkd"], rows["stock"]
        assert seconds(cells[0], ours) and seconds(cells[1], stock), problem
        assert agrees(cells[3], ours["peak_mib"]) and agrees(cells[4], stock["peak_mib"]), problem
        parts = [ours[name] / stock[name] for name in ("min_s", "peak_mib")]
        assert agrees(cells[2], parts[0]) and agrees(cells[5], parts[1]), problem
        found.append(parts)
    assert len(found) == 6
    text = " ".join((ROOT / "README.md").read_text().split())
    (low, high), (least, most) = [(min(part), max(part)) for part in zip(*found, strict=True)]
    assert f"{low:.2f} to {high:.2f} of the time and {least:.2f} to {most:.2f} of the memory" in text


def test_memory_against_length_is_what_was_measured() -> None:
    (_, *lengths), _, *lines = table_of("L")
    names = {"fastkd": "fastkd", "torch.compile": "torch.compile", "plain torch": "reference"}
    peaks = {(x["implementation"], x["length"]): x["peak_mib"] for x in results_of("relation_kl_memory")["results"]}
    for name, *cells in lines:
        for length, cell in zip(lengths, cells, strict=True):
            assert agrees(cell, peaks[names[name], int(length)]), (name, length)


def test_both_ways_of_cka_are_what_was_measured() -> None:
    (_, *tokens), _, *lines = table_of("N")
    names = {"by Grams": "Grams", "by covariances": "covariances", "plain torch": "eager"}
    for name, *cells in lines:
        for count, cell in zip(tokens, cells, strict=True):
            row = rows_of(f"{CPU}-cka_loss", f"cka_loss N {count} 768 -> 512 float32")[names[name]]
            assert seconds(cell, row), (name, count)


def test_what_pruning_reaches_is_what_was_measured() -> None:
    titles = {
        "`minidisc` (4": "minidisc", "`minidisc --sandwich_size 0`": "minidisc, all a step",
        "`minidisc --assistant_sparsity 0.7`": "assistant of 70 %", "`minidisc --assistants 0`": "no assistant",
        "`prune-kd`": "prune-kd", "`prune-pkd`": "prune-pkd", "`maxidisc`": "maxidisc",
    }  # fmt: skip
    methods = results_of("amd-epyc-1-thread-minidisc")["methods"]
    _, _, *lines = table_of("TFLOP")
    for title, score, work, share, _ in lines:
        method = methods[next(name for start, name in titles.items() if title.startswith(start))]
        mean, _, deviation = score.split()
        assert agrees(mean, method["score"]) and agrees(deviation, method["deviation"]), title
        assert agrees(work, method["tflop"]) and agrees(
            share.strip("x"), method["tflop"] / methods["maxidisc"]["tflop"]
        )
    assert len(lines) == len(titles)


@pytest.mark.long
def test_what_large_teachers_take_is_what_is_planned() -> None:
    assert f"\n{plans.table()}\n" in (DOCS / "trainer" / "memory.md").read_text(encoding="utf-8")
