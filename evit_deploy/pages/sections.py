"""The sections of a report page, with tables and charts. Sections without content are left out."""

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from evit_deploy.charts.kinds import Axes, Point, bars, lines, points
from evit_deploy.pages.page import WebPage
from evit_deploy.report.report import BlockErrorRow, ComparedRow, ProfileRow, Report
from evit_deploy.report.tables import render
from evit_deploy.report.verdict import answers, cost, speed, verdict
from evit_deploy.tokens.plan import TokenPlan

_MOST_CHECKS = 12


class Curve(msgspec.Struct, frozen=True):
    """The log of a training run.

    Args:
        stage: ``dense`` or ``finetune``.
        rows: One per line of its CSV file: ``step``, ``loss``, ``validation_top1`` and so on; values may be missing.
    """

    stage: str
    rows: tuple[Mapping[str, float], ...]


class Picture(msgspec.Struct, frozen=True):
    """A picture for a page.

    Args:
        image: The file.
        description: Text alternative.
        kind: ``png`` or ``jpeg``.
    """

    image: bytes
    description: str
    kind: str = "png"


def verdict_section(page: WebPage, report: Report) -> None:
    """The verdict: whether the answers are the same, how much faster it is, and what it costs."""
    page.section("Verdict")
    if len({row.name for row in report.compared if row.dense is not None}) > 1:
        page.cards((("Side by side", verdict(report) or "", "bad" if report.failed else ""),))
        return
    none = "Not checked."
    said, faster, costs = answers(report), speed(report), cost(report)
    if said is None and report.checks:
        said = f"{len(report.checks)} checks passed"
    own = [row for row in report.rows if row.variant == "model" and row.speedup is not None]
    pays = bool(own) and all((row.speedup_low or row.speedup or 0) > 1 for row in own)
    page.cards(
        (
            ("Same answers?", _sentence(said) or none, "" if not report.checks else "good" if report.passed else "bad"),
            (
                "How much faster?",
                _sentence(faster) or "Not measured.",
                "good" if pays else "",
            ),
            ("What did it cost?", _sentence(costs or _trained(report)) or f"Not measured. {_NO_IMAGES}", ""),
        )
    )


_NO_IMAGES = "With --data IMAGES, convert, profile and compare compare the answers with the dense model's."


def _trained(report: Report) -> str | None:
    """Accuracy lost against the dense model on the validation images, for a model trained in this run."""
    row = next((row for row in reversed(report.accuracy) if row.against and row.against.other == "dense"), None)
    if row is None or row.against is None:
        return None
    difference = f"{100 * row.against.value:+.2f} ± {100 * row.against.error:.2f}"
    return f"{row.name}: top-1 {100 * row.top1:.2f} % on {row.count} images, {difference} points to the dense model"


def accuracy_section(page: WebPage, report: Report, curves: Sequence[Curve] = ()) -> None:
    """Accuracy, with training curves."""
    answered = [row for row in report.compared if row.images is not None]
    if not (report.accuracy or answered or curves):
        return
    page.section("Accuracy")
    charts = list(_training_charts(curves))
    render(Report(accuracy=report.accuracy, compared=report.compared), page)
    if charts:
        page.charts(charts)


def agreement_section(page: WebPage, report: Report) -> None:
    """The checks, and the agreement between runtimes."""
    if not (report.checks or report.agreement):
        return
    page.section("Agreement and checks")
    if report.agreement:
        render(Report(agreement=report.agreement), page)
    passed = tuple(check for check in report.checks if check.passed)
    if len(report.checks) <= _MOST_CHECKS:
        render(Report(checks=report.checks), page)
        return
    if report.failed:
        render(Report(checks=report.failed), page)
    page.begin_details(f"The {len(passed)} checks that passed")
    render(Report(checks=passed), page)
    page.end_details()


def speed_section(page: WebPage, report: Report) -> None:
    """Speed by batch size."""
    if not (report.rows or report.latencies or report.load):
        return
    page.section("Speed")
    charts = []
    faster = [
        Point(row.batch, row.speedup, _said(row), _lane(row, report.rows), row.speedup_low, row.speedup_high)
        for row in report.rows
        if row.speedup is not None and row.variant not in ("dense", "slice", "body")
    ]
    if faster:
        axes = Axes("images a call", "times as fast as the dense twin", logarithmic=True, line=1.0)
        charts.append(("Speed-up by batch size, with 95 % intervals", lines(faster, axes, "Speed-up by batch size")))
    rate = [
        Point(row.batch, row.images_per_second, _said(row), f"{row.variant}, {row.runtime}")
        for row in report.rows
        if row.variant != "slice"
    ]
    if rate:
        axes = Axes("images a call", "images a second", logarithmic=True)
        charts.append(("Throughput by batch size", lines(rate, axes, "Images a second by batch size")))
    if charts:
        page.charts(charts)
    render(Report(rows=report.rows, latencies=report.latencies, load=report.load, gpu=report.gpu), page)


def trade_section(page: WebPage, report: Report, title: str = "Accuracy against time") -> None:
    """Accuracy and latency of the same artifacts."""
    charts = list(trade_charts(report))
    if charts:
        page.section(title)
        page.charts(charts)


def trade_charts(report: Report) -> Iterator[tuple[str, str]]:
    """Charts of accuracy against time per call: for each measure, lane, and the smallest and largest batch size.

    A lane is a combination of runtime, device and clock; times of different lanes cannot be compared.
    """
    lanes: dict[tuple[str, str, str], list[ProfileRow]] = {}
    for row in report.rows:
        lanes.setdefault((row.runtime, row.device, row.clock), []).append(row)
    for title, field in _measures(report.compared):
        for (runtime, _, clock), rows in lanes.items():
            for batch in sorted({min(row.batch for row in rows), max(row.batch for row in rows)}):
                values = list(_trade(report, [row for row in rows if row.batch == batch], (title, field)))
                if len(values) > 1:
                    name = f"{title} against time on {runtime}, batch {batch}"
                    axes = Axes(f"milliseconds a call ({clock})", title, percent=field != "cosine_centered")
                    yield name, points(values, axes, name, lower_x=True)


def _trade(report: Report, rows: Sequence[ProfileRow], measure: tuple[str, str]) -> Iterator[Point]:
    """A point for each row whose model has this measure."""
    title, field = measure
    by_name = {row.name: row for row in report.compared} | {
        row.name: row for row in report.compared if rows and row.runtime == rows[0].runtime
    }
    many = len(rows) > _MOST_SERIES
    for row in rows:
        found = by_name.get(row.variant)
        value = None if found is None else _accuracy(found, field)
        if found is None or value is None:
            continue
        shown = f"{value:.4f}" if field == "cosine_centered" else f"{100 * value:.2f} %"
        label = f"{row.variant}: {title} {shown}, {row.p50:.2f} ms; "
        label += f"{found.method} {found.settings} {found.precision}, {found.gmacs:.4g} GMACs"
        ends = {"top1": (found.top1_low, found.top1_high), "recall": (found.recall_low, found.recall_high)}
        yield Point(row.p50, value, label, found.method if many else row.variant, *ends.get(field, (None, None)))


_MOST_SERIES = 8


def _accuracy(row: ComparedRow, field: str) -> float | None:
    """The value of a measure; a dense twin agrees with itself, which is not measured."""
    found = getattr(row, field)
    return 1.0 if found is None and row.dense is None and field in ("agreement", "cosine_centered") else found


def _measures(rows: Sequence[ComparedRow]) -> Iterator[tuple[str, str]]:
    """The measures of the models, as title and field: accuracy, and agreement with the dense model."""
    titles = {
        "top1": "Top-1", "recall": "Recall@1", "agreement": "Agreement", "cosine_centered": "Centered cosine",
    }  # fmt: skip
    for field, title in titles.items():
        if any(getattr(row, field) is not None for row in rows):
            yield title, field


def plan_section(page: WebPage, plan: TokenPlan, report: Report) -> None:
    """Tokens, multiply-adds, error and time by block."""
    page.section("Token plan")
    charts = []
    if plan.cost is not None:
        page.line(f"{plan.total[:1].upper()}{plan.total[1:]}.")
        dense = plan.dense()
        values = [
            Point(row.block, one.block_macs(row.block) / 1e6, _block_label(name, one, row.block), name)
            for name, one in (("dense", dense), ("this model", plan))
            for row in one.blocks
        ]
        counts = [
            Point(row.block, row.tokens_in, f"block {row.block}: {row.tokens_in} tokens", "") for row in plan.blocks
        ]
        axes = Axes("block", "million multiply-adds")
        charts = [
            ("Multiply-adds of each block", bars(values, axes, "Multiply-adds of each block")),
            ("Tokens that each block sees", bars(counts, Axes("block", "tokens"), "Tokens that each block sees")),
        ]
    errors = {row.block: row for row in report.block_errors}
    finite = [
        Point(row.block, row.error, f"block {row.block}: error {row.error:.2e}", "")
        for row in errors.values()
        if row.error is not None
    ]
    if any(point.y > _ROUNDING for point in finite):
        name = "Error of each block's output"
        charts.append((name, bars(finite, Axes("block", "error over spread"), name)))
    if charts:
        page.charts(charts)
    times = _times_of_blocks(report)
    columns = [[_error_of(errors.get(row.block)) for row in plan.blocks] if errors else None]
    columns += [[times.get(str(row.block), "") for row in plan.blocks] if times else None]
    titles = ("error", "ms")
    header = (*plan.header, *(title for title, column in zip(titles, columns, strict=True) if column))
    more = list(zip(*(column for column in columns if column), strict=True)) or [()] * len(plan.blocks)
    page.table(header, [(*row, *cells) for row, cells in zip(plan.rows(), more, strict=True)])
    if errors:
        images = report.block_errors[0].images
        page.line(
            f"Error: how far the tokens in front of the patches (without such tokens, the mean of all) are behind each "
            f"block of model.onnx on {report.block_errors[0].runtime} from the PyTorch model's in FP32, over how much "
            f"these differ from picture to picture; root mean squares, {images} pictures."
        )
    if times:
        first = next(row for row in report.blocks if row.variant == "model")
        page.line(f"Time: {first.runtime}, {first.batch} images a call, by the library's own profiler.")


_ROUNDING = 1e-4
"""Errors of FP32 files are below this, and not worth a chart."""


def _times_of_blocks(report: Report) -> dict[str, str]:
    """Milliseconds by block, at the first batch size of the first runtime."""
    own = [row for row in report.blocks if row.variant == "model"]
    return {
        row.blocks: f"{row.milliseconds:.3f}"
        for row in own
        if (row.runtime, row.batch) == (own[0].runtime, own[0].batch)
    }


def _error_of(row: BlockErrorRow | None) -> str:
    return "" if row is None else "not finite" if row.error is None else f"{row.error:.2e}"


def _block_label(name: str, plan: TokenPlan, block: int) -> str:
    row = plan.blocks[block]
    return f"{name}, block {block}: {plan.block_macs(block) / 1e6:.1f} MMACs, {row.tokens_in} → {row.tokens_out} tokens"


def blocks_section(page: WebPage, report: Report) -> None:
    """Time and error by block or layer."""
    if not (report.blocks or report.sensitivity):
        return
    page.section("Time and error inside the model")
    values = [
        Point(
            row.blocks, row.milliseconds, f"{row.variant}, block {row.blocks}: {row.milliseconds:.3f} ms", row.variant
        )
        for row in report.blocks
        if row.batch == report.blocks[0].batch and row.runtime == report.blocks[0].runtime
    ]
    if values:
        name = f"Time of each block, {report.blocks[0].runtime}, {report.blocks[0].batch} images a call"
        page.charts(((name, bars(values, Axes("block", "milliseconds"), name)),))
    render(Report(blocks=report.blocks, sensitivity=report.sensitivity), page)


def pictures_section(page: WebPage, pictures: Sequence[Picture]) -> None:
    """Pictures of the kept patches."""
    if not pictures:
        return
    page.section("Patches that stay")
    for picture in pictures:
        page.picture(picture.image, picture.description, picture.kind)


def environment_section(page: WebPage, report: Report, more: Sequence[str] = ()) -> None:
    """The environment, and the commands to repeat it."""
    page.section("Environment and commands")
    page.facts([(name, str(value)) for name, value in (report.device | report.versions).items()])
    commands = [*report.commands, *more]
    if commands:
        page.commands(commands)
    for note in report.notes:
        page.line(note)


def _training_charts(curves: Sequence[Curve]) -> Iterator[tuple[str, str]]:
    titles = {
        "loss": "Loss", "validation_top1": "Validation top-1", "tokens": "Tokens after the last block",
        "learning_rate": "Learning rate", "keep_rate": "Keep rate",
    }  # fmt: skip
    for field, title in titles.items():
        values: list[Point] = []
        for curve in curves:
            rows = [row for row in curve.rows if field in row and "step" in row]
            for row in rows if len(rows) > 1 else ():
                label = f"{curve.stage}, step {row['step']:g}: {row[field]:.4g}"
                values.append(Point(row["step"], row[field], label, curve.stage))
        if values:
            axes = Axes("step", title.lower(), percent=field == "validation_top1")
            yield f"{title} while training", lines(values, axes, f"{title} by step", marks=len(values) <= _FEW)


_FEW = 30


def _sentence(text: str | None) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _lane(row: ProfileRow, rows: Sequence[ProfileRow]) -> str:
    several = len({one.variant for one in rows} - {"dense", "slice", "body"}) > 1
    return f"{row.variant}, {row.runtime}" if several else row.runtime


def _said(row: ProfileRow) -> str:
    text = f"{row.variant} on {row.runtime}, batch {row.batch}: {row.images_per_second:.1f} images/s, {row.p50:.2f} ms"
    if row.speedup is not None and row.speedup_low is not None and row.speedup_high is not None:
        text += f", {row.speedup:.2f}x [{row.speedup_low:.2f}, {row.speedup_high:.2f}]"
    return text
