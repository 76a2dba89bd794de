"""Results of a search as tables: CSV, Markdown, and cells for a terminal or a web page."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from evit_deploy.report.report import ComparedRow
from evit_deploy.tuning.results.front import TunedRow, Tuning

_HEADER = (
    "name", "locations", "keep_rate", "tokens", "gmacs", "expected_ms", "measured_ms", "speedup", "speedup_low",
    "speedup_high", "cosine", "cosine_error", "agreement", "images", "top1", "recall", "to_dense", "to_dense_low",
    "to_dense_high", "finalist", "winner",
)  # fmt: skip
"""Shares and differences have the same names as in :class:`ComparedRow`; recall is for models without classes."""


def as_csv(found: Tuning) -> str:
    """Formats the finalists and the front as CSV, one row each."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(_HEADER)
    names = {row.name for row in found.finalists}
    for row in (*found.finalists, *(row for row in found.front if row.name not in names)):
        lines.writerow(["" if value is None else value for value in _values(row, found.winner, row.name in names)])
    return text.getvalue()


def _values(row: TunedRow, winner: str, finalist: bool) -> list[Any]:
    speed, near, answers = row.measured, row.confirmed, row.answers
    cost = answers.to_dense if answers is not None else None
    return [
        row.name, *(_joined(numbers) for numbers in (row.schedule.locations, row.tokens.rates, row.schedule.counts)),
        f"{row.gmacs:.4g}", f"{row.expected:.5g}",
        *(_short(getattr(speed, name, None)) for name in ("p50", "speedup", "speedup_low", "speedup_high")),
        _short(row.nearness), _short(near.error if near else None), _short(row.agreeing),
        near.images if near else None, *(_short(getattr(answers, name, None)) for name in ("top1", "recall")),
        *(_short(getattr(cost, name, None)) for name in ("value", "low", "high")),
        int(finalist), int(row.name == winner),
    ]  # fmt: skip


def _joined(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:.5g}"


def table(found: Tuning) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns the column titles and cells of the table of finalists."""
    labeled = next((row.answers for row in found.finalists if row.answers is not None), None)
    classes = any(row.agreeing is not None for row in found.finalists)
    header = ("", "blocks", "tokens behind them", "GMACs", "ms", "speed-up", "95 % interval", "cosine")
    header += ("agreement %",) * classes
    header += (f"{labeled.share_name} to dense, points",) if labeled is not None else ()
    cells = []
    for row in found.finalists:
        speed = row.measured
        known = speed is not None and speed.speedup is not None
        own = [
            f"{row.name} *" if row.name == found.winner else row.name,
            _joined(row.schedule.locations),
            _joined(row.schedule.counts),
            f"{row.gmacs:.2f}",
            f"{row.milliseconds:.2f}",
            f"{speed.speedup:.2f}" if known and speed else "",
            f"{speed.speedup_low:.2f} - {speed.speedup_high:.2f}" if known and speed else "",
            f"{row.nearness:.3f}",
        ]
        own += [_percent(row.agreeing)] if classes else []
        own += [_cost(row.answers)] if labeled is not None else []
        cells.append(tuple(own))
    return header, cells


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _cost(answers: ComparedRow | None) -> str:
    cost = answers.to_dense if answers is not None else None
    if cost is None or cost.low is None or cost.high is None:
        return ""
    return f"{100 * cost.value:+.1f} [{100 * cost.low:.1f}, {100 * cost.high:.1f}]"


def as_markdown(found: Tuning) -> str:
    """Formats the verdict and the table of finalists as Markdown."""
    header, rows = table(found)
    lines = [f"# {found.budget}", "", found.verdict, "", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *found.notes]) + "\n"
