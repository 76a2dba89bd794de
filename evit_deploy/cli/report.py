"""``evit-deploy report``."""

from pathlib import Path

import click

from evit_deploy.cli.options import Command
from evit_deploy.cli.output import Output, output_options
from evit_deploy.cli.types import PATH
from evit_deploy.report.lines import printable


@click.command("report", cls=Command, short_help="Write the reports of bundles as a page, side by side.")
@click.argument("bundles", nargs=-1, type=PATH, metavar="BUNDLE...")
@click.option(
    "--out",
    type=PATH,
    metavar="DIR",
    help="Write report.html, report.csv, report.md, report.tex and report.json there.",
)
@click.option("--force", is_flag=True, help="Replace existing files.")
@output_options
def command(bundles: tuple[Path, ...], out: Path | None, force: bool, output: Output) -> None:
    """Put the reports of one or more BUNDLEs side by side, without new measurements.

    Writes a page with a chart of accuracy against time and sortable tables, and the same data as CSV, Markdown, LaTeX
    and JSON. Times come from each bundle's own run; evit-deploy compare measures all bundles in one run.

    \b
    evit-deploy report deit_s-evit-k0.7 --out report
    evit-deploy report deit_s-evit-k0.7 deit_s-evit-k0.5 --out report
    """
    from evit_deploy.pipeline.reports import report_bundles

    report = report_bundles(bundles, out=out, force=force)
    output.result(report, None if out is None else f"\n{printable(out / 'report.html')}")
