"""``evit-deploy show``."""

from pathlib import Path
from typing import Any

import click

from evit_deploy.cli.options import Command, Option, tokens_of, tokens_options
from evit_deploy.cli.output import Output, output_options
from evit_deploy.cli.types import IMAGES, NAME, PATH, Choice, ModelName, Numbers, Whole

_RUNTIME = {"cls": Option, "group": "Runtime"}
_PICTURE = {"cls": Option, "group": "Picture"}


@click.command("show", cls=Command, short_help="Draw what a model keeps, fuses and merges of images.")
@click.argument("source", type=NAME, metavar="BUNDLE|CHECKPOINT")
@click.argument("images", nargs=-1, required=True, type=IMAGES, metavar="IMAGES...")
@click.option(
    "--blocks", type=Numbers(int, 0), metavar="3,6,9",
    help="Locations to draw.  [default: all, or four of more]", **_PICTURE,
)  # fmt: skip
@click.option("--heat/--no-heat", default=True, help="Draw the scores below.  [default: they are]", **_PICTURE)
@click.option(
    "--out", type=PATH, metavar="FILE.png|FILE.svg",
    help="Where the picture goes; numbered where there are over 16 images.  [default: <name>-kept.png here]",
    **_PICTURE,
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace files.", **_PICTURE)
@click.option(
    "--runtime", "runtimes", type=Choice(registry="RUNTIMES"), multiple=True,
    help="Who runs a bundle; repeatable: the first is drawn, the others are compared with it.  "
    "[default: onnxruntime, or eager where that cannot]", **_RUNTIME,
)  # fmt: skip
@click.option(
    "--threads", type=Whole(1, 4_096), metavar="N", help="CPU threads.  [default: the runtime's own choice]", **_RUNTIME
)
@click.option(
    "--against", type=PATH, metavar="PATH",
    help="Checkpoint of the bundle, for the runtime eager, where it is no longer in its place.", **_RUNTIME,
)  # fmt: skip
@click.option(
    "--model", type=ModelName(), metavar="NAME", help="Of a checkpoint: timm name, where the tensors leave it open.",
    cls=Option, group="Model",
)  # fmt: skip
@tokens_options
@output_options
def command(source: str, images: tuple[Path, ...], output: Output, **options: Any) -> None:
    """Draw what BUNDLE or CHECKPOINT keeps, fuses and merges of IMAGES: files, or folders with images below them.

    One row an image: what the model saw, and what is left of it after each location. Below, the scores that chose it.
    An image that cannot be read is named, the others are drawn, and the exit code is 1.

    \b
    evit-deploy show deit_s-evit-k0.7 cat.jpg holiday/
    evit-deploy show deit_s-evit-k0.7 cat.jpg --runtime openvino --runtime eager --out cat.svg
    evit-deploy show deit_s.pth cat.jpg --method merge --keep-rate 0.7
    """
    tokens = tokens_of(options)
    picture = {name: options.pop(name) for name in ("blocks", "heat", "out", "force")}
    picture["blocks"] = picture["blocks"] or ()
    from evit_deploy.visualization.files import draw_files
    from evit_deploy.visualization.show import opened

    with opened(source, tokens=tokens, **options) as subject:  # type: ignore[arg-type]
        drawn = draw_files(subject, images, **picture)
    if output.as_json:
        output.result(drawn)
    else:
        output.result(None, "\n".join(drawn.summary()))
    drawn.raise_if_unreadable()
