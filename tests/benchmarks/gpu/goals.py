"""The goals, set before any measurement."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

LARGE = 64.0
"""Size in megabytes above which bandwidth is measured, not latency."""


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        name: Subject of the goal.
        wanted: The target, as text.
        measured: The result, as text; empty if not measured.
        met: Whether it was met; ``None`` if not measured.
    """

    name: str
    wanted: str
    measured: str = ""
    met: bool | None = None

    @property
    def verdict(self) -> str:
        """``pass``, ``MISS`` or ``not measured``."""
        return "not measured" if self.met is None else ("pass" if self.met else "MISS")


def goals(document: dict[str, Any]) -> Iterator[Goal]:
    """All goals, with the results of a run."""
    rows = {part["name"]: part["rows"] for part in document["parts"]}
    for part, name in (("truth", "cases and batches"), ("capture", "graphs and streams")):
        checks = [row for row in rows.get(part, []) if "wrong" in row]
        broken = sum(1 for row in rows.get(part, []) if "failed" in row)
        bad = sum(1 for row in checks if row["wrong"])
        yield Goal(f"{name} right", "all", f"{len(checks) - bad} of {len(checks) + broken} checks",
                   bad + broken == 0) if checks else Goal(f"{name} right", "all")  # fmt: skip
    tools = [row for row in rows.get("sanitizers", []) if row.get("tool", "none") != "none"]
    clean = [row for row in tools if row.get("exit") == 0 and not row.get("wrong")]
    measured = f"{len(clean)} of {len(tools)} tools"
    yield Goal("compute-sanitizer", "clean", measured, len(clean) == len(tools) == 4) if tools else Goal(
        "compute-sanitizer", "clean")  # fmt: skip
    yield from _kernel([row for row in rows.get("bandwidth", []) if "microseconds" in row])
    yield from _models([row for row in rows.get("inference", []) if "speed-up" in row])
    paper = [row["speed-up"] for row in rows.get("paper", []) if row.get("dtype") == "tf32" and "speed-up" in row]
    for rate, wanted in (("0.7", 1.50), ("0.5", 1.85)):
        yield _least(f"{rate} eager in TF32 over dense", [each[rate][0] for each in paper], wanted)
    for how in ("eager", "compiled"):
        steps = [row["speed-up"] for row in rows.get("training", []) if row.get("how") == how and "speed-up" in row]
        yield _least(f"training step at 0.7, {how}", [each["0.7"][0] for each in steps if "0.7" in each], 1.4)


def _kernel(rows: list[dict[str, Any]]) -> Iterator[Goal]:
    first = [next(iter(row["of copy"])) for row in rows]
    large = [row["of copy"][name][0] for row, name in zip(rows, first, strict=True) if row["megabytes"] >= LARGE]
    yield _least("kernel of a copy where 64 MB move", large, 0.9)
    over = [
        row["microseconds"][name] - 2 * row["microseconds"]["empty node"]
        for row, name in zip(rows, first, strict=True) if row["batch"] == 1 and row["candidates"] == 196
    ]  # fmt: skip
    name, wanted = "kernel at batch 1, N 196, less two empty nodes", "at most 2 µs"
    yield Goal(name, wanted, f"{max(over):.2f} µs", max(over) <= 2) if over else Goal(name, wanted)
    yield _least("eager over kernel", [row["eager over kernel"][0] for row in rows], 3)


def _models(rows: list[dict[str, Any]]) -> Iterator[Goal]:
    graphs = [row for row in rows if row["dtype"] == "fp16" and "how" not in row and row["batch"] >= 128]
    for rate, wanted in (("0.7", 1.45), ("0.5", 1.85)):
        yield _least(f"{rate} over dense, FP16 graphs, batch ≥ 128", [r["speed-up"][rate][0] for r in graphs], wanted)
    for rate in ("0.7", "0.5"):
        over = [row["over slice"][rate][0] for row in graphs]
        name, wanted_text = f"{rate} over its slice twin, batch ≥ 128", "at most +2 %"
        measured = ", ".join(f"{100 * (value - 1):+.1f} %" for value in over)
        yield Goal(name, wanted_text, measured, max(over) <= 1.02) if over else Goal(name, wanted_text)


def _least(name: str, values: list[float], wanted: float) -> Goal:
    text = f"at least {wanted:g}"
    if not values:
        return Goal(name, text)
    shown = f"{min(values):.2f}" if len(values) == 1 else f"{min(values):.2f} to {max(values):.2f}"
    return Goal(name, text, shown, min(values) >= wanted)
