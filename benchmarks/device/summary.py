"""What lines say, in as many as one reads: a verdict a phase, what was wrong, and times beside the best peer."""

from __future__ import annotations

from collections.abc import Sequence

OURS = "fastkd"
MOST_WRONG = 8  # of a phase; all of them are in the lines


def of_result(result: dict) -> str:
    """One problem: fastkd's time and share of the limit, and its fastest peer's time over it."""
    rows, ours = result["rows"], result["rows"][OURS]
    if "min_s" not in ours:
        return f"  {result['problem']}: {ours.get('note')}"
    text = f"  {result['problem']}: {1e3 * ours['min_s']:.3g} ms"
    if "called_s" in ours:
        text += f" (as called {1e3 * ours['called_s']:.3g})"
    if "of_limit" in ours:
        text += f", {100 * ours['of_limit']:.0f} % of {result['limit']}"
    if "error" in ours:
        text += f", error {ours['error']:.1e}"
    others = {
        name: row["min_s"] / ours["min_s"]
        for name, row in rows.items()
        if "min_s" in row and name not in (OURS, result["limit"])
    }
    return text + "".join(f"; {name} {ratio:.2f}x" for name, ratio in sorted(others.items(), key=lambda x: x[1]))


def of_phase(name: str, lines: Sequence[dict]) -> list[str]:
    kinds = {line["kind"]: line for line in lines}  # the last of each kind
    end = kinds.get("end", {"verdict": "DID NOT END", "seconds": 0})
    head = f"{name}: {end['verdict']}, {end['seconds']:.0f} s"
    if "checked" in kinds:
        head += "; {right} right, {wrong} wrong, {left} not reached".format(**kinds["checked"])
    elif checks := [line for line in lines if line["kind"] == "check"]:
        head += f"; {sum(line['problem'] is None for line in checks)} of {len(checks)} right so far"
    if "cache" in kinds:
        head += "; Triton: {hits} binaries cached, {misses} compiled".format(**kinds["cache"])
    text = [head]
    text += [f"  {line.get('why') or line.get('error')}" for line in lines if line["kind"] in ("skipped", "error")]
    wrong = [f"  {line['case']}: {line['problem']}" for line in lines if line["kind"] == "check" and line["problem"]]
    text += [line[:200] for line in wrong[:MOST_WRONG]]
    text += [f"  ... and {len(wrong) - MOST_WRONG} more"] if len(wrong) > MOST_WRONG else []
    text += [f"  not all of {line['case']}" for line in lines if line["kind"] == "left"]
    text += [f"  {line['line'][:150]}" for line in lines if line["kind"] == "launch"]
    if "machine" in kinds:
        host = kinds["machine"]["machine"]
        text.append("  " + ", ".join(f"{k} {v}" for k, v in {"gpu": host["gpu"], **host["versions"]}.items() if v))
    rates = [line for line in lines if line["kind"] == "limit" and line["rate"]]
    text += ["  " + ", ".join(f"{x['limit']} {x['rate']:.0f} {x['unit']}" for x in rates)] if rates else []
    results = {line["result"]["problem"]: line["result"] for line in lines if line["kind"] == "result"}
    text += [of_result(result) for result in results.values()]
    return text


def summary(lines: Sequence[dict], names: Sequence[str]) -> str:
    text = []
    for name in dict.fromkeys([*names, *(line["phase"] for line in lines)]):
        text += of_phase(name, [line for line in lines if line["phase"] == name])
    return "\n".join(text)
