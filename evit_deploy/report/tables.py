"""Prints reports as tables that fit the terminal, dropping columns rather than truncating cells."""

import io
from collections.abc import Sequence
from typing import Any

from evit_deploy.report.html import Page, is_number
from evit_deploy.report.lines import printable, wrapped
from evit_deploy.report.report import (
    BlockRow,
    ComparedRow,
    Difference,
    GpuSummary,
    LatencyRow,
    LoadRow,
    ProfileRow,
    Report,
    SensitivityRow,
    Summary,
)
from evit_deploy.report.verdict import folded


def render(report: Report, console: Any) -> None:
    """Prints a report on a rich console, as tables.

    Args:
        report: The report.
        console: A ``rich.console.Console``, or a :class:`~evit_deploy.report.html.Page` for HTML.
    """
    if report.checks:
        checks = report.checks if isinstance(console, Page) else folded(report.checks)
        _table(
            console,
            ("check", "value", "limit", ""),
            [(c.name, _number(c.value), _number(c.limit), "ok" if c.passed else "FAILED") for c in checks],
        )
        for check in report.failed:
            _print(console, f"FAILED {check.name}: {check.reason}")
    for runtime in dict.fromkeys(row.runtime for row in report.compared):
        rows = [row for row in report.compared if row.runtime == runtime]
        _compared(console, rows, [row for row in report.rows if row.runtime == runtime])
    if report.accuracy:
        _table(
            console,
            (
                "accuracy",
                "top-1 %",
                "95 % interval",
                "top-5 %",
                "images",
                "GMACs",
                "difference",
                "to",
                "by fine-tuning",
            ),
            [
                (
                    row.name,
                    f"{100 * row.top1:.2f}",
                    f"{100 * row.low:.1f} - {100 * row.high:.1f}",
                    _percent(row.top5),
                    str(row.count),
                    "" if row.gmacs is None else f"{row.gmacs:.4g}",
                    "" if row.against is None else f"{100 * row.against.value:+.2f} ± {100 * row.against.error:.2f}",
                    "" if row.against is None else row.against.other,
                    _points(row.gained),
                )
                for row in report.accuracy
            ],
            dispensable=("top-5 %", "95 % interval", "GMACs", "to", "by fine-tuning"),
            unsaid=_empty(
                {"top-5 %": "top5", "difference": "against", "to": "against", "by fine-tuning": "gained"},
                report.accuracy,
            ),
        )
    if report.agreement:
        _table(
            console,
            ("agreement of", "with", "images", "top-1 %", "lowest\ncosine", "kept\npatches %", "largest\ndifference"),
            [
                (
                    row.first,
                    row.second,
                    str(row.images),
                    _percent(row.top1),
                    _shown(row.cosine, ".6f"),
                    " / ".join(f"{100 * share:.1f}" for share in row.kept.values()) or "not known",
                    f"{row.logits:.2e}",
                )
                for row in report.agreement
            ],
            unsaid=_empty({"top-1 %": "top1", "lowest\ncosine": "cosine"}, report.agreement),
        )
    if report.sensitivity:
        _sensitivity(console, report.sensitivity)
    if report.rows:
        _print(console, _clocks(report.rows))
        whole = ("end to end\nimages/s", "end to end\nms", "end to end\nspeed-up")
        header = ("runtime", "variant", "on", "batch", "clock", "images/s", "p50 ms", "p95 ms", "p99 ms", "variation",
                  "speed-up", _INTERVAL, _MAC_RATIO, "MAC eff.", "overhead", *whole)  # fmt: skip
        several = {row.device for row in report.rows} != {"cpu"}
        beside = any(row.end_to_end_p50 is not None for row in report.rows)
        dispensable = ("variation", "p99 ms", _MAC_RATIO, "p95 ms", "on", *whole[:2], "MAC eff.", whole[2], "p50 ms",
                       _INTERVAL)  # fmt: skip
        hidden = (*(() if several else ("on",)), *(() if beside else whole))
        hidden += tuple(_empty({_INTERVAL: "speedup_low"}, report.rows))
        _table(console, header, [_profile_cells(row) for row in report.rows], dispensable, hidden)
    if report.latencies:
        header = ("engine", "variant", "batch", "images/s", "latency ms", "enqueue ms", "H2D ms", "compute ms",
                  "D2H ms", "speed-up", "overhead")  # fmt: skip
        dispensable = ("D2H ms", "H2D ms", "enqueue ms", "latency ms")
        said = (
            "Parts of a call, p50/p95/p99 by CUDA events, enqueue by the host's clock; images/s, speed-up and overhead "
            "of compute alone:"
        )
        _print(console, said)
        _table(console, header, [_latency_cells(row) for row in report.latencies], dispensable)
    if report.blocks:
        _print(console, "Time by block, by the library's own profiler, which slows the whole down a little:")
        header = ("engine", "variant", "batch", "block", "tokens in", "tokens out", "layers", "ms", "share")
        _table(console, header, [_block_cells(row) for row in report.blocks], ("layers",))
    if report.load:
        _print(console, "Many clients at a time, by their wall clock:")
        header = ("server under load", "batch", "clients", "requests", "images/s", "p50 ms", "p99 ms", "images a run")
        _table(console, header, [_load_cells(row) for row in report.load], ("requests",))
    if report.gpu:
        header = ("GPU", "batch", "samples", "SM MHz", "memory MHz", "slowed down", "°C", "W")
        _table(console, header, [_gpu_cells(row) for row in report.gpu], ("GPU", "°C", "W"))
    for note in report.notes:
        _print(console, note)


def text_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], width: int, dispensable: Sequence[str] = ()
) -> str:
    """Formats a table as plain text, in the same way.

    Args:
        header: Column titles.
        rows: Cells.
        width: Line length in characters.
        dispensable: Columns to drop if the line is too narrow, in this order.
    """
    from rich.console import Console

    text = io.StringIO()
    _table(Console(file=text, width=width), header, rows, dispensable)
    return text.getvalue().rstrip("\n")


def print_lines(console: Any, lines: Sequence[str]) -> None:
    """Prints sentences, wrapped at the console's width on a terminal.

    Args:
        console: See :func:`render`.
        lines: The sentences.
    """
    for line in lines:
        _print(console, line)


_INTERVAL, _MAC_RATIO = "95 %\ninterval", "computed\nMAC ratio"
_MOST_SENSITIVE = 12


def _sensitivity(console: Any, rows: Sequence[SensitivityRow]) -> None:
    """Prints the layers most sensitive to quantization and those left out; the others are summarized."""
    shown = [row for place, row in enumerate(rows) if place < _MOST_SENSITIVE or row.kept]
    rest = [row for row in rows if row not in shown]
    cells = [
        (row.layer, f"{row.noise:.4f}", f"{row.share:.1%}", f"{row.weights:.1%}", "kept" if row.kept else "")
        for row in shown
    ]
    if rest:
        share, weights = sum(row.share for row in rest), sum(row.weights for row in rest)
        cells.append((f"{len(rest)} more", "", f"{share:.1%}", f"{weights:.1%}", ""))
    _print(console, "What quantizing one linear layer alone costs: error of the answers divided by their spread.")
    _table(console, ("layer", "noise", "share of it", "weights", ""), cells)


def _compared(console: Any, rows: Sequence[ComparedRow], speeds: Sequence[ProfileRow]) -> None:
    """Prints a comparison of models, with their speed on the runtime that was used.

    Args:
        console: A ``rich.console.Console``.
        rows: Rows of one runtime, or rows without answers.
        speeds: Measurements on that runtime.
    """
    answered = next((row for row in rows if row.images is not None), None)
    if answered is not None:
        _print(console, _what_was_answered(rows, answered))
    measured = _speeds(rows, speeds)
    alone = {row.name for row in rows} <= {"model", "dense"}
    header = ("variant" if alone else "bundle", *_COMPARED, *measured)
    unsaid = _empty({title: field for title, field in _COMPARED.items() if field}, rows)
    _table(
        console,
        header,
        [(*_compared_cells(row), *(cells.get(row.name, "") for cells in measured.values())) for row in rows],
        dispensable=(
            "95 % interval",
            "top-5 %",
            "MAC ratio",
            "precision",
            "tokens",
            "method",
            "settings" if alone else "GMACs",
            "5 % below",
            "to the\nreference",
            "GMACs" if alone else "settings",
            "cosine",
            *measured,
        ),
        unsaid=unsaid,
    )


_COMPARED = {
    "method": "", "settings": "", "precision": "", "GMACs": "", "MAC ratio": "", "tokens": "",
    "agreement\n%": "agreement", "cosine": "cosine", "5 % below": "cosine_low", "centered\ncosine": "cosine_centered",
    "same\nneighbor %": "neighbors", "top-1 %": "top1", "recall@1 %": "recall", "95 % interval": "share",
    "top-5 %": "top5", "to dense": "to_dense", "to the\nreference": "to_reference",
}  # fmt: skip
"""Columns of a comparison, each with the field that it requires."""


def _what_was_answered(rows: Sequence[ComparedRow], answered: ComparedRow) -> str:
    said = f"{answered.images} images, answered by {answered.runtime}"
    reference = next((row.to_reference.other for row in rows if row.to_reference is not None), None)
    share = "top-1" if answered.top1 is not None else "recall@1"
    if any(row.to_dense is not None or row.to_reference is not None for row in rows):
        said += f"; differences of {share} in points, with their 95 % intervals"
    if reference is not None:
        said += f"; the reference is {reference}"
    return f"{said}:"


def _speeds(rows: Sequence[ComparedRow], speeds: Sequence[ProfileRow]) -> dict[str, dict[str, str]]:
    """Columns of latency at the smallest batch size and of throughput at the largest: title -> name -> cell."""
    names = {row.name for row in rows}
    own = [speed for speed in speeds if speed.variant in names]
    if not own:
        return {}
    small, large = min(row.batch for row in own), max(row.batch for row in own)
    return {
        f"ms\nbatch {small}": {row.variant: f"{row.p50:.2f}" for row in own if row.batch == small},
        f"images/s\nbatch {large}": {row.variant: f"{row.images_per_second:.1f}" for row in own if row.batch == large},
    }


def _compared_cells(row: ComparedRow) -> tuple[str, ...]:
    return (
        row.name,
        row.method,
        row.settings,
        row.precision,
        f"{row.gmacs:.4g}",
        f"{row.mac_ratio:.2f}x",
        str(row.tokens),
        _percent(row.agreement),
        _shown(row.cosine, ".4f"),
        _shown(row.cosine_low, ".4f"),
        _shown(row.cosine_centered, ".4f"),
        _percent(row.neighbors),
        _percent(row.top1),
        _percent(row.recall),
        "" if row.share is None else " - ".join(_percent(end, 1) for end in row.share[1:]),
        _percent(row.top5),
        _points(row.to_dense),
        _points(row.to_reference),
    )


def _percent(share: float | None, digits: int = 2) -> str:
    return "" if share is None else f"{100 * share:.{digits}f}"


def _points(found: Difference | None) -> str:
    if found is None or found.low is None or found.high is None:
        return ""
    return f"{100 * found.value:+.2f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def _empty(columns: dict[str, str], rows: Sequence[Any]) -> list[str]:
    """Columns whose field is ``None`` in every row."""
    return [title for title, field in columns.items() if all(getattr(row, field) is None for row in rows)]


_CLOCKS = {
    "compute": "compute is the work alone on the GPU, images lying there, by CUDA events",
    "cpu": "cpu is the CPU time of the one thread",
    "wall": "wall is a whole call by the wall clock",
}


def _clocks(rows: Sequence[ProfileRow]) -> str:
    """Describes the clocks of a table's figures."""
    used = [text for clock, text in _CLOCKS.items() if any(row.clock == clock for row in rows)]
    whole = any(row.end_to_end_p50 is not None for row in rows)
    end = " End to end is a whole call, host memory to host memory, by the wall clock." * whole
    return f"A row's figures are of its clock: {'; '.join(used)}.{end}"


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else format(value, form) + unit


def _profile_cells(row: ProfileRow) -> tuple[str, ...]:
    return (
        row.runtime,
        row.variant,
        row.device,
        str(row.batch),
        row.clock,
        f"{row.images_per_second:.1f}",
        f"{row.p50:.2f}",
        f"{row.p95:.2f}",
        f"{row.p99:.2f}",
        f"{row.variation:.1%}",
        _shown(row.speedup, ".2f", "x"),
        ""
        if row.speedup_low is None or row.speedup_high is None
        else f"{row.speedup_low:.2f} - {row.speedup_high:.2f}",
        _shown(row.computed_mac_ratio, ".2f", "x"),
        _shown(row.mac_efficiency, ".2f"),
        _shown(row.overhead, "+.1%"),
        _shown(row.end_to_end_images_per_second, ".1f"),
        _shown(row.end_to_end_p50, ".2f"),
        _shown(row.end_to_end_speedup, ".2f", "x"),
    )


def _load_cells(row: LoadRow) -> tuple[str, ...]:
    numbers = row.images_per_second, row.p50, row.p99, row.images_a_run
    shown = [f"{number:.{digits}f}" for number, digits in zip(numbers, (1, 2, 2, 1), strict=True)]
    return row.model, str(row.batch), str(row.clients), str(row.requests), *shown


def _latency_cells(row: LatencyRow) -> tuple[str, ...]:
    def percentiles(part: Summary) -> str:
        return f"{part.median:.3f}/{part.p95:.3f}/{part.p99:.3f}"

    return (
        row.runtime,
        row.variant,
        str(row.batch),
        f"{row.images_per_second:.1f}",
        *(percentiles(part) for part in (row.latency, row.enqueue, row.h2d, row.compute, row.d2h)),
        _shown(row.speedup, ".2f", "x"),
        _shown(row.overhead, "+.1%"),
    )


def _block_cells(row: BlockRow) -> tuple[str, ...]:
    return (
        row.runtime,
        row.variant,
        str(row.batch),
        row.blocks,
        _shown(row.tokens_in, "d"),
        _shown(row.tokens_out, "d"),
        str(row.layers),
        f"{row.milliseconds:.3f}",
        f"{row.share:.1%}",
    )


def _gpu_cells(row: GpuSummary) -> tuple[str, ...]:
    def clock(span: tuple[int, int] | None, most: int | None) -> str:
        if span is None:
            return ""
        low, high = span
        return (f"{low}" if low == high else f"{low}-{high}") + (f" of {most}" if most else "")

    return (
        row.name,
        str(row.batch),
        str(row.samples),
        clock(row.sm_clock, row.sm_clock_max),
        clock(row.memory_clock, row.memory_clock_max),
        ", ".join((f"{row.slowed_down:.0%}", *row.reasons)) if row.samples else "",
        _shown(row.temperature, "d"),
        _shown(row.power, ".0f", f" of {row.power_limit:.0f}" if row.power_limit else ""),
    )


def _number(value: float | int | str | None) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def render_variants(variants: Sequence[tuple[str, float, float, Report]], console: Any) -> None:
    """Prints one line for each variant of a model.

    Args:
        variants: For each: name, multiply-adds in 10⁹, ratio to the dense twin, and report.
        console: See :func:`render`.
    """
    timed = {row.batch for *_, report in variants for row in report.rows if row.speedup is not None}
    header = ("variant", "GMACs", "MAC ratio", *(f"speed-up at {batch}" for batch in sorted(timed)), "agreement %",
              "top-1 %", "checks")  # fmt: skip
    lines = []
    for name, gmacs, ratio, report in variants:
        speeds = {row.batch: row.speedup for row in reversed(report.rows) if row.variant == "model"}
        answered = next((row for row in report.compared if row.agreement is not None), None)
        agreement, top1 = (answered.agreement, answered.top1) if answered is not None else (None, None)
        lines.append(
            (
                name,
                f"{gmacs:.4g}",
                f"{ratio:.3f}",
                *(_shown(speeds.get(batch), ".2f", "x") for batch in sorted(timed)),
                _shown(None if agreement is None else 100 * agreement, ".1f"),
                _shown(None if top1 is None else 100 * top1, ".2f"),
                "ok" if report.passed else f"{len(report.failed)} FAILED",
            )
        )
    unsaid = [header[i] for i in range(3, len(header) - 1) if not any(line[i] for line in lines)]
    _table(console, header, lines, dispensable=("MAC ratio", "agreement %"), unsaid=unsaid)


def _table(
    console: Any,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    dispensable: Sequence[str] = (),
    unsaid: Sequence[str] = (),
) -> None:
    """Prints a table; on narrow terminals first drops dispensable columns, then wraps cells.

    Args:
        console: A ``rich.console.Console``.
        header: Column titles.
        rows: Cells.
        dispensable: Columns to drop if the line is too narrow, in this order.
        unsaid: Columns to leave out in any case, because they are empty.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    if isinstance(console, Page):  # HTML has room for all columns
        shown = [i for i, title in enumerate(header) if title not in unsaid]
        console.table([header[i] for i in shown], [[row[i] for i in shown] for row in rows])
        return
    shown, excess, table = list(range(len(header))), 1, None
    for count in range(len(dispensable) + 1):
        hidden = {*unsaid, *dispensable[:count]}
        shown = [i for i, title in enumerate(header) if title not in hidden]
        table, excess = _fitted(console, [header[i] for i in shown], [[row[i] for i in shown] for row in rows])
        if excess <= 0:
            break
    if excess > 0:
        table = _narrower(console, table, excess)
    if table is not None:
        console.print(table)
        return
    for row in rows:
        parts = [f"{' '.join(header[i].split())} {row[i]}".strip() for i in shown if row[i]]
        text = wrapped("; ".join(parts), console.width)
        console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _fitted(console: Any, header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[Any, int]:
    """A rich table, and by how many characters it is too wide."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
    for i, title in enumerate(header):
        numeric = all(is_number(row[i]) for row in rows)
        table.add_column(title, justify="right" if numeric else "left", no_wrap=True, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # as Text, so that brackets are not parsed as markup
    return table, _measure(console, table) - console.width


def _measure(console: Any, what: Any) -> int:
    """Width in characters if printed on one line."""
    # measured with a large width, because the result is limited to it
    return console.measure(what, options=console.options.update(width=10_000)).maximum


_READABLE = 16
"""Minimum width of a text column with wrapped cells, in characters."""


def _narrower(console: Any, table: Any, excess: int) -> Any:
    """The table with its widest text column wrapped; ``None`` if that is not enough."""
    texts = [column for column in table.columns if column.justify == "left"]
    widths = [max(_measure(console, cell) for cell in (column.header, *column.cells)) for column in texts]
    most = max(widths, default=0)
    if most - excess < _READABLE:
        return None
    column = texts[widths.index(most)]
    column.no_wrap, column.width = False, most - excess
    return table


def _print(console: Any, text: str) -> None:
    """Prints a sentence, wrapped on a terminal and on one line otherwise."""
    text = printable(text)
    if isinstance(console, Page):
        console.line(text)
        return
    text = wrapped(text, console.width) if console.is_terminal else text
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
