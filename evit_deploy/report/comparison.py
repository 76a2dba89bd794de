"""Writes a comparison as CSV (one flat table), Markdown and LaTeX (two tables), with the same numbers as JSON.

Numbers are rounded once, when the rows are created, so that all formats agree; see :func:`rounded`.
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import msgspec

from evit_deploy.report.html import is_number
from evit_deploy.report.lines import printable
from evit_deploy.report.report import ComparedRow, ProfileRow, Report

DIGITS = 5
"""Significant digits of every number: more than any clock provides, and exact for fractions of 50,000 images."""

_Row = TypeVar("_Row", bound=msgspec.Struct)


def rounded(row: _Row) -> _Row:
    """Rounds the floating-point numbers of a row, including nested structs, to :data:`DIGITS` significant digits.

    >>> rounded(ComparedRow("a", "evit", "keep_rate=0.7", "fp32", 3.0012345, 1.0, 97)).gmacs
    3.0012
    """
    changes: dict[str, Any] = {}
    for field, value in msgspec.structs.asdict(row).items():
        if isinstance(value, float):
            changes[field] = float(f"{value:.{DIGITS}g}")
        elif isinstance(value, msgspec.Struct):
            changes[field] = rounded(value)
    return msgspec.structs.replace(row, **changes)


def pairs(report: Report) -> Iterator[tuple[ComparedRow, ProfileRow]]:
    """Pairs each profile row of a comparison with its model, by runtime and batch size."""
    compared = {row.name: row for row in report.compared}
    for row in report.rows:
        yield compared[row.variant], row


def as_csv(report: Report) -> str:
    """CSV with one line per bundle or baseline, runtime and batch size; empty cells were not measured.

    Columns are the fields of :class:`ComparedRow` and :class:`ProfileRow`; a difference has four columns, ``to_dense``,
    ``to_dense_error``, ``to_dense_low`` and ``to_dense_high``. A bundle's own fields are repeated in each of its lines.

    Spreadsheets evaluate cells that begin with ``=``, ``+``, ``-`` or ``@``, so such text is prefixed with an
    apostrophe. Line ends and other control characters in names are escaped. JSON contains the exact names.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_flat(ComparedRow), *_speed_columns()])
    for compared, row in pairs(report):
        writer.writerow([*_flat_values(compared), *(_csv_cell(getattr(row, name)) for name in _speed_columns())])
    return text.getvalue()


_DIFFERENCES = ("to_dense", "to_reference")
_PARTS = {"": "value", "_error": "error", "_low": "low", "_high": "high"}
_ANSWERED_BY = "answered_by"
"""Column name of :attr:`ComparedRow.runtime`, because the profile row has a runtime too."""


def _flat(kind: type[ComparedRow]) -> list[str]:
    names = []
    for field in kind.__struct_fields__:
        if field in _DIFFERENCES:
            names += [field + suffix for suffix in _PARTS]
        else:
            names.append(_ANSWERED_BY if field == "runtime" else field)
    return names


def _flat_values(row: ComparedRow) -> list[str]:
    cells = []
    for field in row.__struct_fields__:
        value = getattr(row, field)
        cells += (
            [_csv_cell(getattr(value, part, None)) for part in _PARTS.values()]
            if field in _DIFFERENCES
            else [_csv_cell(value)]
        )
    return cells


def _speed_columns() -> list[str]:
    return [name for name in ProfileRow.__struct_fields__ if name not in ("variant", "mac_ratio")]


def as_markdown(report: Report, title: str = "Comparison") -> str:
    """Markdown with a table of the bundles and their answers, a table of their speed, and the notes.

    Args:
        report: Report of a comparison.
        title: Heading.
    """
    parts = [f"# {_markdown(title)}"]
    parts.append(_markdown_table(*_answers(report.compared)))
    parts.append(_markdown_table(*_speeds(report.rows)))
    if report.notes:
        parts.append("\n".join(f"- {_markdown(note)}" for note in report.notes))
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    device = ", ".join(f"{name} {value}" for name, value in report.device.items())
    parts.append("; ".join(part for part in (versions, device) if part))
    return "\n\n".join(part for part in parts if part) + "\n"


def as_latex(report: Report) -> str:
    """LaTeX with two ``tabular`` environments (booktabs), and the notes as comments above them."""
    notes = [f"% {printable(note)}" for note in report.notes]
    parts = ["\n".join(notes), "% \\usepackage{booktabs}"]
    parts += [_latex_table(*_answers(report.compared)), _latex_table(*_speeds(report.rows))]
    return "\n".join(part for part in parts if part) + "\n"


def _answers(rows: Sequence[ComparedRow]) -> tuple[list[str], list[list[str]]]:
    reference = next((row.to_reference.other for row in rows if row.to_reference is not None), "reference")
    share = "recall@1" if any(row.recall is not None for row in rows) else "top-1"
    columns = {
        "bundle": [row.name for row in rows],
        "method": [row.method for row in rows],
        "settings": [row.settings for row in rows],
        "precision": [row.precision for row in rows],
        "GMACs": [_cell(row.gmacs) for row in rows],
        "MAC ratio": [_cell(row.mac_ratio) for row in rows],
        "tokens at the end": [_cell(row.tokens) for row in rows],
        "held against": [row.dense or "" for row in rows],
        "images": [_cell(row.images) for row in rows],
        "agreement with it": [_cell(row.agreement) for row in rows],
        "top-1": [_cell(row.top1) for row in rows],
        "95 % interval": [_span(row.top1_low, row.top1_high) for row in rows],
        "top-5": [_cell(row.top5) for row in rows],
        "cosine with it": [_cell(row.cosine) for row in rows],
        "5 % of the cosines below": [_cell(row.cosine_low) for row in rows],
        "centered cosine": [_cell(row.cosine_centered) for row in rows],
        "same nearest image": [_cell(row.neighbors) for row in rows],
        "recall@1": [_cell(row.recall) for row in rows],
        "its 95 % interval": [_span(row.recall_low, row.recall_high) for row in rows],
        f"{share} less the dense twin's": [_difference(row, "to_dense") for row in rows],
        f"{share} less that of {reference}": [_difference(row, "to_reference") for row in rows],
    }
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    return list(filled), [list(cells) for cells in zip(*filled.values(), strict=True)]


def _speeds(rows: Sequence[ProfileRow]) -> tuple[list[str], list[list[str]]]:
    header = ["runtime", "batch", "bundle", "on", "clock", "images/s", "p50 ms", "p99 ms", "speed-up", "95 % interval",
              "computed MAC ratio", "MAC efficiency", "overhead over slicing"]  # fmt: skip
    lines = []
    for row in rows:
        numbers = row.images_per_second, row.p50, row.p99, row.speedup
        span = _span(row.speedup_low, row.speedup_high)
        ratios = map(_cell, (row.computed_mac_ratio, row.mac_efficiency, row.overhead))
        place = row.runtime, str(row.batch), row.variant, row.device, row.clock
        lines.append([*place, *map(_cell, numbers), span, *ratios])
    return header, lines


def _difference(row: ComparedRow, field: str) -> str:
    found = getattr(row, field)
    return "" if found is None else f"{_cell(found.value)} ({_span(found.low, found.high)})"


def _span(low: float | None, high: float | None) -> str:
    return "" if low is None else f"{_cell(low)} to {_cell(high)}"


def _cell(value: float | str | None) -> str:
    """Formats a number as in Python and JSON, so that it can be read back exactly."""
    return "" if value is None else str(value)


def _csv_cell(value: float | str | None) -> str:
    """Formats a cell that spreadsheets read as a number or text, never as a formula."""
    if not isinstance(value, str):
        return _cell(value)
    text = printable(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _markdown(text: str) -> str:
    """Escapes untrusted text, so that Markdown contains no links or tags from it."""
    return re.sub(r"([\\`*<\[|])", r"\\\1", printable(text))


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_markdown, line)) + " |" for line in lines)


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def _latex(text: str) -> str:
    """Escapes untrusted text, so that TeX finds no commands in it."""
    return "".join(_LATEX.get(letter, letter) for letter in printable(text))


def _latex_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    sides = "".join("r" if all(is_number(row[i]) for row in rows) else "l" for i in range(len(header)))
    lines = [rf"\begin{{tabular}}{{{sides}}}", r"\toprule"]
    for place, line in enumerate((header, *rows)):
        lines.append(" & ".join(map(_latex, line)) + r" \\")
        lines += [r"\midrule"] if place == 0 else []
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])
