"""``evit-deploy predict``."""

import shutil
import sys
from pathlib import Path
from typing import Any

import click

from evit_deploy.cli.options import Command, Option
from evit_deploy.cli.output import Output, output_options
from evit_deploy.cli.types import IMAGES, PATH, Choice, Whole

_RUNTIME = {"cls": Option, "group": "Runtime"}
_FEW = 4
"""Maximum number of images in a suggested command."""


@click.command("predict", cls=Command, short_help="Classify or embed images with a bundle.")
@click.argument("bundle", type=PATH)
@click.argument("images", nargs=-1, required=True, type=IMAGES, metavar="IMAGES...")
@click.option(
    "--top",
    cls=Option,
    group="Answers",
    type=Whole(1, 2**31 - 1),
    default=5,
    metavar="N",
    help="Classes to list for each image.  [default: 5]",
)
@click.option(
    "--out", cls=Option, group="Answers", type=PATH, metavar="FILE.npy",
    help="Write the embeddings there as float32 [images, dimensions], in the order of the list.",
)  # fmt: skip
@click.option("--force", cls=Option, group="Answers", is_flag=True, help="Replace that file.")
@click.option(
    "--runtime", type=Choice(registry="RUNTIMES"), help="Runtime to use.  [default: the best one that runs here]",
    **_RUNTIME,
)  # fmt: skip
@click.option(
    "--threads", type=Whole(1, 4_096), metavar="N", help="CPU threads.  [default: the runtime's own choice]", **_RUNTIME
)
@click.option(
    "--batch-size",
    type=Whole(1, 65_536),
    metavar="N",
    help="Maximum images per call.  [default: 32, or the size that an engine was tuned for]",
    **_RUNTIME,
)
@click.option(
    "--plugin",
    type=PATH,
    metavar="PATH",
    help="TensorRT: library with the plugin.  [default: the one in the cache that the engine was built with]",
    **_RUNTIME,
)
@output_options
def command(
    bundle: Path, images: tuple[Path, ...], top: int, out: Path | None, force: bool, output: Output, **options: Any
) -> None:
    """Classify or embed IMAGES with BUNDLE: files, or folders searched recursively.

    A model without classes returns embeddings. Images that cannot be read are listed, the others are answered, and the
    exit code is 1.

    \b
    evit-deploy predict deit_s-evit-k0.7 cat.jpg holiday/
    evit-deploy predict dinov2_s-evit-k0.7 holiday/ --out holiday.npy
    """
    from evit_deploy.inference.files import ask_about_files
    from evit_deploy.inference.model import load
    from evit_deploy.report.tables import text_table

    with load(bundle, **options) as model:
        answers = ask_about_files(model, images, top=top, out=out, force=force)
    header, rows = answers.table()
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 160
    table = text_table(header, rows, width) if rows and not output.as_json else None
    output.result(answers if output.as_json else None, table, bundle=str(bundle), runtime=model.runtime)
    answers.raise_if_unreadable()
    drawn = [("show", bundle, *images[:_FEW])] if model.bundle.manifest.plan.locations else []
    output.suggest(*drawn, ("profile", bundle))
