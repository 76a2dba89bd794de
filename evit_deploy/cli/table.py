"""``evit-deploy table``."""

from pathlib import Path
from typing import Any

import click

from evit_deploy.cli.options import Command, Option, struct_of, struct_options
from evit_deploy.cli.output import Output, output_options
from evit_deploy.cli.types import IMAGES, Named, TableNumber
from evit_deploy.report.lines import printable


@click.command("table", cls=Command, short_help="Compare a table of the EViT paper with your own figures.")
@click.argument("number", type=TableNumber())
@struct_options("PaperOptions", "Throughput")
@click.option(
    "--weights", cls=Option, group="Accuracy", type=Named(), multiple=True, metavar="NAME=FILE",
    help="Checkpoint for the row of this name; repeatable.",
)  # fmt: skip
@click.option(
    "--data", cls=Option, group="Accuracy", type=IMAGES, metavar="DIR",
    help="Labeled images (class/image), with a folder for each of the model's classes.",
)  # fmt: skip
@click.option("--markdown", is_flag=True, help="Print Markdown.")
@output_options
def command(
    number: str, weights: tuple[tuple[str, str], ...], data: Path | None, markdown: bool, output: Output, **options: Any
) -> None:
    """Compare table NUMBER (1, 2a, 2b, 3a, 3b, 4, 5, 6a, 6b or 7) of the EViT paper with your own figures.

    Multiply-adds are computed. With --throughput speed is measured, all rows in turn, with random weights. Accuracy
    needs trained weights and labeled images. Notes list what is missing.

    \b
    evit-deploy table 2b
    evit-deploy table 2b --throughput --threads 1
    evit-deploy table 1 --weights DeiT-S=deit_s.pth --data IMAGENET/val
    """
    if markdown and output.as_json:
        raise click.UsageError("--json and --markdown are two forms: give one of them")
    asked = struct_of("PaperOptions", options)
    names = [name for name, _ in weights]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise click.UsageError(f"--weights names {twice!r} twice")
    from evit_deploy.paper.published import published_table

    published_table(number)  # before anything heavy is loaded
    from evit_deploy.paper.forms import SPARE, as_markdown, cells, measured_on
    from evit_deploy.paper.measured import paper_table

    found = paper_table(number, options=asked, weights=dict(weights), data=data)
    if output.as_json or markdown:
        output.result(found if output.as_json else None, as_markdown(found).rstrip("\n"))
        return
    from evit_deploy.report.tables import print_lines, text_table

    header, rows = cells(found)
    lines = [measured_on(found), *found.notes]

    def render(console: Any) -> None:
        console.print(text_table(header, rows, console.width, SPARE), markup=False, highlight=False)
        print_lines(console, [line for line in lines if line])

    output.table(render, verdict=f"Table {number}: {printable(found.title)}. {found.source}.")
