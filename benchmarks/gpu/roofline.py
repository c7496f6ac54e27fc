"""Draws results of the benchmarks against what the device can do: how near every op comes to its limit.

On the left, FLOP/s over FLOPs per byte, beside the slopes and roofs that a copy and matrix products set: the fewest
bytes count, whatever an implementation moves. On the right, shares of the limit that each op is judged by.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import RESULTS

OURS = "fastkd"


def gpu_results(folder: Path) -> dict[Path, dict]:
    """What was measured on GPUs."""
    records = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {path: record for path, record in records.items() if record.get("device") == "cuda"}


def rates(record: dict) -> tuple[float | None, dict[str, float]]:
    """Bytes per second of a copy, and FLOP/s of matrix products by name."""
    found = {x["limit"]: 1e9 * x["rate"] for x in record.get("limits", []) if x["rate"]}
    products = {name: rate for name, rate in found.items() if name.endswith("GEMM")}
    for result in record["results"]:  # results of a CPU have no others
        rate = result["rows"][result["limit"]].get("rate")
        if rate and result["limit"] == "copy":
            found.setdefault("copy", 1e9 * rate)
        elif rate and "GEMM" in result["limit"] and not record.get("limits"):
            products["GEMMs"] = max(products.get("GEMMs", 0), 1e9 * rate)
    return found.get("copy"), products


def points(record: dict) -> list[tuple[str, float, float]]:
    """(problem, FLOPs per byte, FLOP/s) of fastkd."""
    found = []
    for result in record["results"]:
        seconds, counts = result["rows"][OURS].get("min_s"), result.get("counts")
        if seconds and counts:
            flops, size = counts
            found.append((result["problem"], flops / size, flops / seconds))
    return found


def shares(record: dict) -> list[tuple[str, float, float | None]]:
    """(problem and its limit, fastkd's share of it, the share asked for)"""
    found = []
    for result in record["results"]:
        share = result["rows"][OURS].get("of_limit")
        asked = [t["bound"] for t in result["targets"] if t.get("relation") == ">="]
        if share is not None:
            found.append((f"{result['problem']} ({result['limit']})", share, asked[0] if asked else None))
    return found


def draw(record: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = shares(record)[::-1]
    height = max(5.0, 1.5 + 0.28 * len(bars))
    figure, (roofs, limits) = plt.subplots(1, 2, figsize=(17, height), layout="constrained")
    copy, products = rates(record)
    found = points(record)
    ridges = [rate / copy for rate in products.values()] if copy else []
    places = [x for _, x, _ in found] + ridges or [1.0]
    low, high = min(places) / 4, max(places) * 4
    for name, rate in products.items():
        roofs.plot([low, high], [rate, rate], "--", color="gray", linewidth=1)
        roofs.annotate(name, (low, rate), fontsize=8, va="bottom")
    if copy:
        top = max(products.values(), default=copy * high)
        roofs.plot([low, top / copy], [copy * low, top], color="gray", linewidth=1)
        roofs.annotate("copy", (low, copy * low), fontsize=8, va="bottom")
    for i, (title, x, y) in enumerate(found):
        roofs.plot(x, y, "os^Dv"[i // 10 % 5], color=f"C{i % 10}", label=title)
    roofs.set(xscale="log", yscale="log", xlabel="FLOPs per byte of inputs and outputs", ylabel="FLOP/s")
    if found:
        roofs.legend(fontsize=6)
    limits.barh([title for title, *_ in bars], [100 * share for _, share, _ in bars], color="C0")
    for i, (_, _, asked) in enumerate(bars):
        if asked is not None:
            limits.plot([100 * asked] * 2, [i - 0.45, i + 0.45], color="C3")
    limits.set(xlabel="% of the limit in brackets; red: what it is meant to reach")
    limits.tick_params(axis="y", labelsize=7)
    machine = record["machine"]
    figure.suptitle(f"{machine.get('gpu') or machine['cpu']}, {machine['date'][:10]}")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS, help="a file, or a folder with those of GPUs")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: where the results are")
    options = parser.parse_args()
    if options.results.is_dir():
        records = gpu_results(options.results)
    else:
        records = {options.results: json.loads(options.results.read_text())}
    if not records:
        parser.error(f"no results of a GPU in {options.results}")
    for path, record in records.items():
        picture = (options.output or path.parent) / f"{path.stem}-roofline.png"
        draw(record, picture)
        print(picture)


if __name__ == "__main__":
    main()
