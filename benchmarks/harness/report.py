"""What the benchmarks print: a table that grows by problem, lines on the way there, and verdicts."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.problem import OURS

# On a GPU "min" and "median" are of its work alone, "as called" from the call to the results.
COLUMNS = (
    "implementation", "min ms", "median ms", "as called", "rate", "of limit", "peak MiB", "rel. error",
    f"time / {OURS}", "",
)  # fmt: skip
WIDTHS = (9, 9, 9, 14, 8, 8, 10, 13)  # of the numbers: what comes later is not known when the first rows are printed


def _cells(name: str, row: dict, unit: str) -> tuple[str, ...]:
    def number(key: str, form: str, scale: float = 1.0, after: str = "") -> str:
        return "-" if row.get(key) is None else format(row[key] * scale, form) + after

    return (
        name,
        number("min_s", ".1f", 1e3),
        number("median_s", ".1f", 1e3),
        number("called_s", ".1f", 1e3),
        number("rate", ".0f", 1, f" {unit}"),
        number("of_limit", ".0f", 100, " %"),
        number("peak_mib", ".0f"),
        number("error", ".1e"),
        number("ratio", ".2f"),
        row.get("note") or "",
    )


class Table:
    """One table of all problems, whose rows have these names."""

    def __init__(self, names: Sequence[str], markdown: bool = False) -> None:
        self.markdown = markdown
        self.width = max(map(len, (COLUMNS[0], *names)))

    def _line(self, row: Sequence[str]) -> str:
        numbers = (cell.rjust(width) for cell, width in zip(row[1:-1], WIDTHS, strict=True))
        padded = [row[0].ljust(self.width), *numbers, row[-1]]
        return f"| {' | '.join(padded)} |" if self.markdown else "  ".join(padded).rstrip()

    def header(self) -> str:
        rule = "\n|" + "|".join(["---", *["---:"] * len(WIDTHS), "---"]) + "|"
        return self._line(COLUMNS) + (rule if self.markdown else "")

    def problem(self, result: dict) -> str:
        title = result["problem"]
        first = self._line([f"**{title}**", *[""] * (len(WIDTHS) + 1)]) if self.markdown else f"\n{title}"
        return "\n".join(
            [first, *(self._line(_cells(name, row, result["unit"])) for name, row in result["rows"].items())]
        )


def first_run(name: str, row: dict) -> str:
    """What one run of an implementation tells, while others are still to be made ready."""
    if "first_s" not in row:
        return f"{name}: {row['note']}"
    memory = f", {row['peak_mib']:.0f} MiB" if row.get("peak_mib") is not None else ""
    error = f", error {row['error']:.1e}" if "error" in row else ""
    note = f" ({row['note']})" if row["note"] else ""
    return f"{name}: {row['first_s'] * 1e3:.1f} ms{memory}{error}{note}"


def rounds_so_far(rows: dict[str, dict]) -> str:
    times = {name: row for name, row in rows.items() if "min_s" in row}
    count = max(len(row["samples_s"]) for row in times.values())
    return f"rounds {count}: " + ", ".join(f"{name} {row['min_s'] * 1e3:.1f} ms" for name, row in times.items())


def verdicts(results: Sequence[dict]) -> str:
    """A line for every target."""
    lines = []
    for result in results:
        for t in result["targets"]:
            measured = "not measured" if t["measured"] is None else f"{t['measured']:.2f}"
            verdict = {True: "met", False: "NOT MET", None: "unknown"}[t["met"]]
            lines.append(f"- {result['problem']}: {t['target']} {t['relation']} {t['bound']:g}: {measured}, {verdict}")
    return "\n".join(lines)
