"""Formats a measured table of the paper as cells for the terminal, and as Markdown."""

from evit_deploy.paper.measured import MeasuredRow, MeasuredTable

MISSING = "–"
SPARE = ("top-5 %\npaper", "top-5 %\nhere", "speed-up\npaper", "GMACs\npaper", "images/s\npaper")
"""Columns to drop if the terminal is too narrow, in this order."""


def cells(table: MeasuredTable, *, whole: bool = False) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Column titles and cells of a table.

    Args:
        table: The measured table.
        whole: Whether to keep columns without any figure.
    """
    columns = {"row": [row.row.name for row in table.rows]}
    for title, published, here in (
        ("top-1 %", [_printed(row.row.published.top1) for row in table.rows], [_top1(row) for row in table.rows]),
        ("top-5 %", [_printed(row.row.published.top5) for row in table.rows], [_top5(row) for row in table.rows]),
        ("images/s", [_shown(row.row.published.images_per_second, ".0f") for row in table.rows],
         [_shown(row.speed and row.speed.images_per_second, ".4g") for row in table.rows]),
        ("speed-up", _published_gains(table), [_gain(row) for row in table.rows]),
        ("GMACs", [_printed(row.row.published.gmacs) for row in table.rows],
         [f"{row.gmacs:.2f}" for row in table.rows]),
    ):  # fmt: skip
        columns[f"{title}\npaper"], columns[f"{title}\nhere"] = published, here
    kept = {title: column for title, column in columns.items() if whole or {*column} != {MISSING}}
    return tuple(kept), [tuple(line) for line in zip(*kept.values(), strict=True)]


def as_markdown(table: MeasuredTable) -> str:
    """The table as Markdown, with title, source and notes."""
    header, rows = cells(table, whole=True)
    titles = [title.replace("\n", ", ") for title in header]
    lines = [f"# Table {table.number}: {table.title}", "", table.source + ".", ""]
    lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    speeds = [row.speed for row in table.rows if row.speed is not None]
    if speeds:
        lines += ["", measured_on(table)]
    return "\n".join([*lines, "", *(f"- {note}" for note in table.notes), ""])


def measured_on(table: MeasuredTable) -> str:
    """Describes the conditions of the measured throughput; empty if it was not measured."""
    speed = next((row.speed for row in table.rows if row.speed is not None), None)
    if speed is None:
        return ""
    where = table.device.get("gpu") if speed.device == "gpu" else table.device.get("cpu")
    return (
        f"Throughput here: {speed.runtime}, batch {speed.batch}, {where or speed.device}, {speed.clock} clock, "
        f"{speed.rounds} rounds in turn; speed-ups with the 95 % interval of their median."
    )


def _shown(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def _printed(value: float | None) -> str:
    """Formats a figure with as many digits as the paper."""
    return MISSING if value is None else str(value)


def _top1(row: MeasuredRow) -> str:
    found = row.accuracy
    return MISSING if found is None else f"{100 * found.top1:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _top5(row: MeasuredRow) -> str:
    return _shown(None if row.accuracy is None or row.accuracy.top5 is None else 100 * row.accuracy.top5, ".1f")


def _gain(row: MeasuredRow) -> str:
    speed = row.speed
    if speed is None or speed.speedup is None:
        return MISSING
    return f"{speed.speedup:.2f}x [{speed.speedup_low:.2f}, {speed.speedup_high:.2f}]"


def _published_gains(table: MeasuredTable) -> list[str]:
    first = table.rows[0].row
    base = first.published.images_per_second if first.dense else None
    rates = [row.row.published.images_per_second for row in table.rows]
    return [
        f"{rate / base:.2f}x" if base and rate and not row.row.dense else MISSING
        for rate, row in zip(rates, table.rows, strict=True)
    ]
