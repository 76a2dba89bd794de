"""The report page of a bundle, or of any other report."""

from collections.abc import Sequence

from evit_deploy.bundle.manifest import Manifest
from evit_deploy.pages.page import WebPage
from evit_deploy.pages.sections import (
    Curve,
    Picture,
    accuracy_section,
    agreement_section,
    blocks_section,
    environment_section,
    pictures_section,
    plan_section,
    speed_section,
    trade_section,
    verdict_section,
)
from evit_deploy.report.report import Report
from evit_deploy.tokens.plan import TokenPlan


def report_page(
    report: Report,
    title: str,
    manifest: Manifest | None = None,
    *,
    pictures: Sequence[Picture] = (),
    curves: Sequence[Curve] = (),
) -> str:
    """Renders a report as a page.

    Args:
        report: The checks and measurements.
        title: Title of the page, such as a bundle's name.
        manifest: Manifest of the bundle, if there is one.
        pictures: Pictures of the kept patches.
        curves: Training curves.

    Returns:
        A complete HTML document.
    """
    page = WebPage(title, "" if manifest is None else _subtitle(manifest))
    verdict_section(page, report)
    if manifest is not None:
        page.facts(_facts(manifest))
    accuracy_section(page, report, curves)
    agreement_section(page, report)
    speed_section(page, report)
    trade_section(page, report)
    if manifest is not None:
        plan_section(page, manifest.plan, report)
    blocks_section(page, report)
    pictures_section(page, pictures)
    if manifest is not None and manifest.engine is not None:
        page.section("Engine")
        page.facts(_engine(manifest))
    environment_section(page, report)
    return str(page)


def _subtitle(manifest: Manifest) -> str:
    return f"{manifest.model}, {manifest.kind}, {manifest.precision}"


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    spec, plan = manifest.tokens, manifest.plan
    size = "×".join(str(side) for side in manifest.preprocess.size)
    kept = ", ".join(f"{row.keep} at block {row.block}" for row in plan.locations)
    return [
        ("Method", manifest.kind),
        ("Keep rate", " / ".join(f"{rate:g}" for rate in dict.fromkeys(spec.rates))),
        ("Tokens kept", kept),
        ("Tokens", f"{plan.blocks[0].tokens_in} → {plan.blocks[-1].tokens_out}"),
        ("Images", f"{size} pixels"),
        ("Answer", manifest.answer + (", of length 1" if manifest.normalized else "")),
        ("Multiply-adds", _cost(plan)),
        ("Left in the base precision", f"{len(manifest.unquantized)} layers" if manifest.unquantized else ""),
        ("Made from", manifest.parents[0].source),
    ]


def _engine(manifest: Manifest) -> list[tuple[str, str]]:
    engine = manifest.engine
    assert engine is not None
    sizes = ", ".join(f"{one.minimum} to {one.maximum} (best at {one.optimum})" for one in engine.profiles)
    return [
        ("Built for", f"{engine.target} {engine.version}"),
        ("GPUs", ", ".join(engine.gpus)),
        ("Precision", engine.precision),
        ("Images a call", sizes),
        ("Driver", engine.driver or ""),
        ("Plugin", engine.plugin or "none: the operator's body is built in"),
        ("Build", f"{engine.seconds:.0f} s"),
        *((name, str(value)) for name, value in engine.options.items()),
    ]


def _cost(plan: TokenPlan) -> str:
    if plan.cost is None:
        return ""
    return f"{plan.macs() / 1e9:.3g} G; {plan.dense().macs() / 1e9:.3g} G dense, {plan.mac_ratio():.2f}x"
