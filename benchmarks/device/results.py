"""Makes of what came back from a GPU pages are made of: benchmarks/results/<gpu>.json, a picture, the table."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from benchmarks import RESULTS, ROOT
from benchmarks.device.lines import read
from benchmarks.device.phases import RUNS
from benchmarks.harness.saved import save

OURS = "fastkd"


def record(folder: Path) -> dict:
    """As benchmarks.run writes it. Of a problem that was measured twice, the time beside peers counts."""
    lines = [line for run in RUNS for line in read(folder / f"{run}.jsonl")]
    if any(line.get("rehearsed") for line in lines):
        raise ValueError(f"{folder} holds a rehearsal, which measures nothing")
    machines = [line for line in lines if line["kind"] == "machine"]
    if not machines:
        raise ValueError(f"{folder} does not say which machine this was: it needs the phase versions")
    results: dict[str, dict] = {}
    for line in lines:
        if line["kind"] == "result":
            result = line["result"]
            known = results.get(result["problem"])
            if known is None or "min_s" in result["rows"][OURS] or "min_s" not in known["rows"][OURS]:
                results[result["problem"]] = result
    limits = [
        {k: v for k, v in line.items() if k not in ("phase", "kind")} for line in lines if line["kind"] == "limit"
    ]
    last = machines[-1]
    return {"machine": last["machine"], "device": last["device"], "limits": limits, "results": [*results.values()]}


def publish(folder: Path, results: Path = RESULTS) -> int:
    try:
        found = record(folder)
    except ValueError as why:
        print(f"benchmarks.device: {why}")
        return 1
    name = re.sub(r"[^a-z0-9]+", "-", found["machine"]["gpu"].lower()).strip("-")
    save(results / f"{name}.json", found)
    print(f"wrote {results / f'{name}.json'}: {len(found['results'])} problems")
    for module in ("roofline", "table") if results == RESULTS else ():
        code = subprocess.run([sys.executable, "-m", f"benchmarks.gpu.{module}"], cwd=ROOT).returncode
        if code:
            return code
    return 0
