"""``evit-deploy compare``."""

from pathlib import Path
from typing import Any

import click

from evit_deploy.cli.options import Command, struct_of, struct_options
from evit_deploy.cli.output import Output, output_options, typed
from evit_deploy.cli.types import PATH
from evit_deploy.report.lines import printable

_FEW = 4
"""Maximum number of suggested commands."""


@click.command("compare", cls=Command, short_help="Compare bundles side by side in one interleaved run.")
@click.argument("bundles", nargs=-1, type=PATH, metavar="BUNDLE...")
@struct_options("CompareOptions", "Measurement", "runtimes", "threads", "batch_sizes", "duration")
@struct_options("CompareOptions", "Answers", "data", "images", "reference", "own_preprocessing")
@click.option("--out", type=PATH, metavar="DIR", help="Write compare.csv, .md, .tex, .json and .html there.")
@click.option("--force", is_flag=True, help="Replace existing files.")
@output_options
def command(bundles: tuple[Path, ...], out: Path | None, force: bool, output: Output, **options: Any) -> None:
    """Compare two or more BUNDLEs of the same task, of any methods and keep rates, in one interleaved run.

    Each is compared with its dense twin, which bundles of the same dense model share, and with the slice
    twin of the same token counts; with images, also with the reference bundle.

    \b
    evit-deploy compare deit_s-evit-k0.7 deit_s-evit-k0.5 --threads 1
    evit-deploy compare deit_s-evit-k0.7 deit_s-evit-k0.5 --data IMAGENET/val --out comparison
    """
    asked = struct_of("CompareOptions", options)
    from evit_deploy.pipeline.compare import compare
    from evit_deploy.report.verdict import verdict

    report = compare(bundles, options=asked, out=out, force=force)
    output.result(report, None if out is None else f"\n{printable(out)}", verdict=verdict(report))
    missing = () if asked.data is not None else ("--data", "IMAGES")
    missing += () if out is not None else ("--out", "comparison")
    more = [("package", bundle, "--for", "triton") for bundle in bundles[:_FEW]]
    output.suggest(*([(*typed(), *missing)] if missing else more))
