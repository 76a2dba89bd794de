"""Summarizes a report in one sentence: whether the answers are the same, the cost in accuracy, and the speed-up."""

import re
from collections.abc import Sequence

from evit_deploy.report.report import Check, ComparedRow, ProfileRow, Report

_ON_A_RUNTIME = re.compile(r"(?P<runtime>[^,:]+), batch (?P<batch>\d+): (?P<question>(?!speed-up$).+)")
"""Matches the names of :mod:`evit_deploy.verification.verify`'s checks of answers, not those of speed."""
_PRECISION = re.compile(r"(fp16|bf16|int8|fp8): error over spread of ")


def verdict(report: Report) -> str | None:
    """The verdict of ``verify``, ``profile``, ``compare`` and ``convert``.

    Args:
        report: The report.

    Returns:
        ``Same answers as the PyTorch model to 8 images on onnxruntime; 1.47x [1.45, 1.49] as fast as its dense twin on
        onnxruntime at batch 8.`` The interval is that of the median, 95 %. ``None`` if the report has no relevant
            checks or measurements.
    """
    several = len({row.name for row in report.compared if row.dense is not None}) > 1
    parts = _of_several(report) if several else [answers(report), cost(report), speed(report)]
    said = "; ".join(part for part in parts if part)
    return f"{said[0].upper()}{said[1:]}." if said else None


def answers(report: Report) -> str | None:
    """Whether the answers match PyTorch's; ``None`` if no runtime was checked and no check failed."""
    if report.failed:
        return f"FAILED: {len(report.failed)} of {len(report.checks)} checks, first: {report.failed[0].name}"
    found = [match for check in report.checks if (match := _ON_A_RUNTIME.fullmatch(check.name))]
    if not found:
        return None
    runtimes = _listed(list(dict.fromkeys(match["runtime"] for match in found)))
    precision = next((match[1] for check in report.checks if (match := _PRECISION.match(check.name))), None)
    if precision in ("int8", "fp8"):  # the reference is the quantized graph in floating-point arithmetic
        return f"same answers on {runtimes} as its {precision} model in float arithmetic"
    asked = next((row.images for row in report.agreement if row.first == "pytorch fp32"), None)
    to = f" to {asked} images" if asked is not None else ""
    within = f", within the rounding of {precision}" if precision is not None else ""
    return f"same answers as the PyTorch model{to} on {runtimes}{within}"


def cost(report: Report) -> str | None:
    """The cost in accuracy on the images, according to the first runtime; ``None`` without images."""
    row = next((row for row in report.compared if row.dense is not None and row.images is not None), None)
    if row is None:
        return None
    return "; ".join(part for part in (_likeness(row), _points(row)) if part)


def speed(report: Report) -> str | None:
    """The speed-up over the dense twin, on the fastest runtime at the largest batch size."""
    own = [row for row in report.rows if row.variant == "model"]
    if not own:
        return None
    row = _fastest(own)
    where = f"on {row.runtime} at batch {row.batch}"
    if row.speedup is None:
        return f"{row.images_per_second:.4g} images/s {where}, with no dense twin to compare with"
    figure = f"{row.speedup:.2f}x{_interval(row)}"
    if row.speedup <= 1:
        return f"not faster than its dense twin {where}: {figure}"
    if row.speedup_low is not None and row.speedup_low <= 1:
        return f"{figure} as fast as its dense twin {where}, which is within noise"
    noisy = (
        row.speedup_low is not None
        and row.speedup_high is not None
        and (row.speedup_high - row.speedup_low > row.speedup / 2)
    )
    return f"{figure} as fast as its dense twin {where}{', too noisy to rely on: measure longer' if noisy else ''}"


def folded(checks: Sequence[Check]) -> list[Check]:
    """Combines checks that passed at several batch sizes into one, with the worst value; keeps the others.

    Args:
        checks: Checks such as ``onnxruntime, batch 1: logits``.

    Returns:
        Checks such as ``onnxruntime, batch 1, 2, 8: logits``, at the position of the first of each.
    """
    groups: dict[object, list[Check]] = {}
    for check in checks:
        match = _ON_A_RUNTIME.fullmatch(check.name) if check.passed else None
        text = None if isinstance(check.value, float) else check.value
        key = check.name if match is None else (match["runtime"], match["question"], text, check.limit)
        groups.setdefault(key, []).append(check)
    return [_together(group) for group in groups.values()]


def _together(group: Sequence[Check]) -> Check:
    first, *others = group
    matches = [match for check in group if (match := _ON_A_RUNTIME.fullmatch(check.name))]
    if not others or not matches:
        return first
    batches = ", ".join(dict.fromkeys(match["batch"] for match in matches))
    name = f"{matches[0]['runtime']}, batch {batches}: {matches[0]['question']}"
    values = [check.value for check in group if isinstance(check.value, float)]
    return Check(name, max(values, default=first.value), first.limit, True, first.reason)


def _of_several(report: Report) -> list[str | None]:
    """Which of several bundles is fastest, and which is closest to its dense twin."""
    names = {row.name for row in report.compared if row.dense is not None}
    timed = [row for row in report.rows if row.variant in names and row.speedup is not None]
    answered = [row for row in report.compared if row.name in names and _share(row) is not None]
    parts: list[str | None] = [answers(report) if report.failed else None]
    if timed:
        row = _fastest(timed)
        where = f"on {row.runtime} at batch {row.batch}"
        parts.append(f"fastest {where}: {row.variant}, {row.speedup:.2f}x{_interval(row)} as fast as its dense twin")
    if answered:
        best = max(answered, key=lambda row: _share(row) or 0.0)
        parts.append(f"closest to its dense twin: {best.name}, {_likeness(best)}")
    return parts


def _fastest(rows: Sequence[ProfileRow]) -> ProfileRow:
    """The row with the highest throughput at the largest batch size."""
    largest = max(row.batch for row in rows)
    return max((row for row in rows if row.batch == largest), key=lambda row: row.images_per_second)


def _interval(row: ProfileRow) -> str:
    if row.speedup_low is None or row.speedup_high is None:
        return ""
    return f" [{row.speedup_low:.2f}, {row.speedup_high:.2f}]"


def _share(row: ComparedRow) -> float | None:
    return row.agreement if row.agreement is not None else row.cosine_centered


def _likeness(row: ComparedRow) -> str:
    if row.agreement is not None:
        return f"the same class as its dense twin on {100 * row.agreement:.1f} % of {row.images} images"
    if row.cosine_centered is not None:
        return (
            f"embeddings with a centered cosine of {row.cosine_centered:.4f} to its dense twin's on {row.images} images"
        )
    return ""


def _points(row: ComparedRow) -> str:
    found = row.to_dense
    if found is None or found.low is None or found.high is None:
        return ""
    share = "top-1" if row.top1 is not None else "recall@1"
    return f"{share} {100 * found.value:+.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def _listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
