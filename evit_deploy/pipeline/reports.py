"""Puts the reports of bundles side by side, without new measurements."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from evit_deploy.bundle.bundle import Bundle, read_bundle
from evit_deploy.bundle.manifest import MANIFEST, REPORT, Manifest
from evit_deploy.documents import read_bytes, read_json
from evit_deploy.errors import InputError
from evit_deploy.files import sha256, write_atomically
from evit_deploy.pages.bundle import report_page
from evit_deploy.pages.page import GENERATOR
from evit_deploy.pipeline.compare import check_place, short_names
from evit_deploy.progress import step
from evit_deploy.report.comparison import as_csv, as_latex, as_markdown, rounded
from evit_deploy.report.report import ComparedRow, ProfileRow, Report
from evit_deploy.verification.answers.cost import row_of_plan, settings_of

_LOG = logging.getLogger(__name__)

RESULTS = ("report.html", "report.csv", "report.md", "report.tex", "report.json")


def report_bundles(bundles: Sequence[str | Path], *, out: str | Path | None = None, force: bool = False) -> Report:
    """Puts the reports of bundles side by side; nothing is measured and no model is loaded.

    Args:
        bundles: Their folders. For a single bundle the page is that bundle's own.
        out: Folder for ``report.html``, ``report.csv``, ``report.md``, ``report.tex`` and ``report.json``.
        force: Whether to replace these files.

    Returns:
        A report with ``compared``, a row for each bundle and each dense twin, and ``rows``, their speeds from separate
        runs. Numbers are rounded to five significant digits.

    Raises:
        InputError: No bundles, a folder that is not a bundle, or a report that cannot be read.
        StageError: A file could not be written.
    """
    if not bundles:
        raise InputError("no bundles", wanted="at least one", fix="Name the folders that convert wrote.")
    place = Path(out) if out is not None else None
    if place is not None:
        check_place(place, RESULTS, force=force)
    found = short_names([(str(path), read_bundle(path)) for path in dict.fromkeys(map(str, bundles))])
    parts = list(_reports(found))
    together = side_by_side(parts)
    if place is not None:
        title = f"{len(parts)} bundles" if len(parts) > 1 else parts[0][0]
        _, manifest, report = parts[0]
        page = report_page(report, title, manifest) if len(parts) == 1 else report_page(together, title)
        texts = page, as_csv(together), as_markdown(together, title), as_latex(together)
        for name, text in zip(RESULTS, texts, strict=False):
            write_atomically(place / name, text.encode())
        whole = report if len(parts) == 1 else together
        write_atomically(place / RESULTS[-1], msgspec.json.format(msgspec.json.encode(whole), indent=2))
    return together


def check_page(place: Path | None) -> None:
    """Checks, before any work, that a page can be written: the path is free or holds an earlier page.

    Raises:
        InputError: The path holds another file or a folder, or cannot be written.
    """
    if place is None:
        return
    if place.is_dir():
        raise InputError("this is a folder", where=place, wanted="a file", fix=f"Give {place / RESULTS[0]}.")
    if place.exists() and f'content="{GENERATOR}"'.encode() not in read_bytes(place)[:2048]:
        raise InputError("this file is not a page that evit-deploy wrote", where=place, fix="Give another name.")
    check_place(place.absolute().parent, (), force=True)


def write_page(report: Report, target: str | Path, place: Path | None) -> None:
    """Writes the report of a command as a page.

    Args:
        report: The report.
        target: Subject of the report; for a bundle the page also shows the token plan.
        place: The page; ``None`` writes nothing.

    Raises:
        StageError: The page could not be written.
    """
    if place is None:
        return
    path = Path(target)
    manifest = read_bundle(path).manifest if (path / MANIFEST).is_file() else None
    write_atomically(place, report_page(report, path.absolute().name, manifest).encode())


def side_by_side(parts: Sequence[tuple[str, Manifest, Report]]) -> Report:
    """Combines the reports of several bundles into one.

    Args:
        parts: (name, manifest, report) of each bundle.
    """
    devices = {_device(report) for _, _, report in parts}
    compared: list[ComparedRow] = []
    rows: list[ProfileRow] = []
    for name, manifest, report in parts:
        names = {"dense": f"{name}, dense", "model": name}
        where = f" ({_device(report)})" if len(devices) > 1 else ""
        found = [rounded(row) for row in _compared(names, manifest, report, where)]
        compared += found
        known = {row.name for row in found}  # rows of models without a cost have no entry in `compared`
        rows += [
            rounded(msgspec.structs.replace(row, variant=names[row.variant], runtime=row.runtime + where))
            for row in report.rows
            if names.get(row.variant) in known
        ]
    notes = [
        note for note in (_OTHER_RUNS if len(parts) > 1 else "", _OTHER_DEVICES if len(devices) > 1 else "") if note
    ]
    silent = [name for name, _, report in parts if not report.rows]
    if silent:
        said = ", ".join(silent[:3]) + (f" and {len(silent) - 3} more" if len(silent) > 3 else "")
        notes.append(f"Without a measurement of speed: {said}. evit-deploy profile measures one.")
    return Report(compared=tuple(compared), rows=tuple(rows), notes=tuple(notes))


_OTHER_RUNS = (
    "Times and speed-ups are those of each bundle's own report, measured in runs of their own; evit-deploy compare "
    "measures all of them in one."
)
_OTHER_DEVICES = "They were measured on different machines, whose times say nothing about the bundles."


def _reports(bundles: Sequence[tuple[str, Bundle]]) -> Iterator[tuple[str, Manifest, Report]]:
    for done, (name, bundle) in enumerate(bundles):
        step(_LOG, "reading the reports", done, len(bundles))
        listed, report = bundle.manifest.files.get(REPORT), Report()
        if listed is not None:
            path = bundle.file(REPORT)
            report = read_json(path, Report)
            if sha256(path) != listed:
                raise InputError("this report is not the one that the manifest lists", where=path, fix="Convert again.")
        yield name, bundle.manifest, report


def _compared(names: dict[str, str], manifest: Manifest, report: Report, where: str) -> Iterator[ComparedRow]:
    """Yields the rows of a report, or rows from the token plan alone if the report has none."""
    own = {row.name: row for row in report.compared if row.name in names}
    for name, plan, method in (("dense", manifest.plan.dense(), "dense"), ("model", manifest.plan, manifest.kind)):
        row = own.get(name)
        if row is None and plan.cost is not None:
            settings = settings_of(manifest.tokens) if name == "model" else ""
            row = row_of_plan(name, method, settings, manifest.precision, plan)
        if row is None:
            continue
        difference = row.to_dense
        if difference is not None:
            difference = msgspec.structs.replace(difference, other=names["dense"])
        yield msgspec.structs.replace(
            row,
            name=names[name],
            dense=names["dense"] if name == "model" else None,
            runtime=None if row.runtime is None else row.runtime + where,
            to_dense=difference,
        )


def _device(report: Report) -> str:
    return report.gpu[0].name if report.gpu else str(report.device.get("cpu", ""))
