"""Writes the table of what was measured on GPUs into docs/performance.md, from benchmarks/results/<gpu>.json.

It stands between two comments. A cell is empty where nothing was measured. --check changes nothing: exit code 1 where
the page is out of date.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import RESULTS, ROOT
from benchmarks.gpu.roofline import OURS, gpu_results

PAGE = ROOT / "docs" / "performance.md"
BEGIN = "<!-- what was measured on GPUs: python -m benchmarks.gpu.table writes this -->"
END = "<!-- end of what was measured on GPUs -->"
NOTHING = "Nothing has been measured on a GPU yet, and no figure for one appears here."
PEERS = {
    "eager": ("eager", "reference"),
    "torch.compile": ("torch.compile",),
    "Liger": ("Liger", "Liger, Triton"),
    "orda-kernel": ("orda-kernel",),
}
HEADER = ("", "fastkd", "as called", "share of the limit", "memory", "error", *PEERS, "meant to reach")


def milliseconds(row: dict, key: str = "min_s") -> str:
    return f"{row[key] * 1e3:.3g} ms" if key in row else ""


def peer(rows: dict, names: tuple[str, ...]) -> str:
    """The fastest of what runs under these names, and how much longer it takes."""
    times = [rows[name] for name in names if "min_s" in rows.get(name, {})]
    row = min(times, key=lambda row: row["min_s"], default={})
    ratio = f" ({row['ratio']:.2f}x)" if row.get("ratio") else ""
    return milliseconds(row) + ratio


def targets(result: dict) -> str:
    verdicts = {True: "met", False: "**missed**", None: "unknown"}
    return "; ".join(
        f"{t['target'].removeprefix(OURS + ' ')} {t['relation']} {t['bound']:g}: {verdicts[t['met']]}"
        for t in result["targets"]
    )


def cells(result: dict) -> tuple[str, ...]:
    rows, ours = result["rows"], result["rows"][OURS]
    share = f"{100 * ours['of_limit']:.0f} % of {result['limit']}" if "of_limit" in ours else ""
    memory = f"{ours['peak_mib']:.0f} MiB" if ours.get("peak_mib") is not None else ""
    error = f"{ours['error']:.1e}" if "error" in ours else ""
    return (
        f"`{result['problem']}`", milliseconds(ours), milliseconds(ours, "called_s"), share, memory, error,
        *(peer(rows, names) for names in PEERS.values()), targets(result),
    )  # fmt: skip


def section(record: dict) -> str:
    """One GPU's table, under the machine, the versions and the limits that were measured beside it."""
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    rates = ", ".join(f"{x['limit']} {x['rate']:.0f} {x['unit']}" for x in record.get("limits", []) if x["rate"])
    about = f"{machine['gpu']}, {machine['date'][:10]}; {versions}. Measured beside it: {rates or 'nothing'}."
    lines = [
        f"{about} Times are of the GPU's work, as called from the call to its results; in brackets: how many times as "
        "long as fastkd.",
        "",
        *(f"| {' | '.join(row)} |" for row in (HEADER, ["---", *["---:"] * (len(HEADER) - 2), "---"])),
        *(f"| {' | '.join(cells(result))} |" for result in record["results"]),
    ]
    return "\n".join(lines)


def generated(folder: Path) -> str:
    return "\n\n".join(section(record) for record in gpu_results(folder).values()) or NOTHING


def replaced(page: str, text: str) -> str:
    """The page with the text between its two comments."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        sys.exit(f"the page needs these two lines, once each:\n{BEGIN}\n{END}")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text, old = generated(options.results), options.page.read_text()
    new = replaced(old, text)
    if options.check:
        sys.exit(f"{options.page} is out of date: run python -m benchmarks.gpu.table" if new != old else 0)
    print(text)
    options.page.write_text(new)


if __name__ == "__main__":
    main()
