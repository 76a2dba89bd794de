"""``evit-deploy show``."""

from pathlib import Path
from typing import Any

import click

from evit_deploy.cli.options import Command, Option, tokens_of, tokens_options
from evit_deploy.cli.output import Output, output_options
from evit_deploy.cli.types import IMAGES, NAME, PATH, Choice, ModelName, Numbers, Whole
from evit_deploy.report.lines import printable

_RUNTIME = {"cls": Option, "group": "Runtime"}
_PICTURE = {"cls": Option, "group": "Picture"}
_CURVE = {"cls": Option, "group": "Curve"}


@click.command("show", cls=Command, short_help="Draw what a model keeps, fuses and merges of images.")
@click.argument("source", type=NAME, metavar="BUNDLE|CHECKPOINT")
@click.argument("images", nargs=-1, required=True, type=IMAGES, metavar="IMAGES...")
@click.option(
    "--blocks", type=Numbers(int, 0, 4_096), metavar="3,6,9",
    help="Locations to draw.  [default: all, or four of them if there are more]", **_PICTURE,
)  # fmt: skip
@click.option("--heat/--no-heat", default=True, help="Draw the scores below each row.  [default: on]", **_PICTURE)
@click.option(
    "--side", type=Whole(32, 2_048), default=224, metavar="PIXELS",
    help="Maximum length of an image's longer side in the picture.  [default: 224]", **_PICTURE,
)  # fmt: skip
@click.option(
    "--curve", is_flag=True, **_CURVE,
    help="Draw instead how the answers change when patches are removed by class attention, at random or in the "
    "opposite order; computed with PyTorch. If IMAGES is one folder with class folders, also draw top-1.",
)  # fmt: skip
@click.option(
    "--rates", type=Numbers(float, 0, 1), metavar="RATE[,RATE...]",
    help="Keep rates of the curve.  [default: 0.9,0.7,0.5,0.3]", **_CURVE,
)  # fmt: skip
@click.option(
    "--sample",
    type=Whole(1, 65_536),
    metavar="N",
    help="Maximum number of images for the curve.  [default: 64]",
    **_CURVE,
)
@click.option(
    "--runtime", "runtimes", type=Choice(registry="RUNTIMES"), multiple=True,
    help="Runtime for a bundle; repeatable: the first is drawn, the others are compared with it.  "
    "[default: onnxruntime, or eager where that cannot run it]", **_RUNTIME,
)  # fmt: skip
@click.option(
    "--threads", type=Whole(1, 4_096), metavar="N", help="CPU threads.  [default: the runtime's own choice]", **_RUNTIME
)
@click.option(
    "--against", type=PATH, metavar="PATH",
    help="Checkpoint of the bundle for the runtime eager, if it was moved.", **_RUNTIME,
)  # fmt: skip
@click.option(
    "--model", type=ModelName(), metavar="NAME", help="timm name of a checkpoint, if its tensors do not determine it.",
    cls=Option, group="Model",
)  # fmt: skip
@tokens_options
@click.option(
    "--out", type=PATH, metavar="FILE",
    help="Picture to write, .png or .svg; several numbered files for more than 16 images. With --curve .svg or .csv.  "
    "[default: <name>-kept.png or <name>-curve.svg here]",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace files.")
@output_options
def command(source: str, images: tuple[Path, ...], output: Output, **options: Any) -> None:
    """Draw what BUNDLE or CHECKPOINT keeps, fuses and merges of IMAGES: files, or folders searched recursively.

    Each image is one row: the model's input, then what is left after each location, with the scores below.
    Images that cannot be read are listed, the others are drawn, and the exit code is 1.

    \b
    evit-deploy show deit_s-evit-k0.7 cat.jpg holiday/
    evit-deploy show deit_s-evit-k0.7 cat.jpg --runtime openvino --runtime eager --out cat.svg
    evit-deploy show deit_s.pth cat.jpg --method merge --keep-rate 0.7
    evit-deploy show deit_s.pth IMAGENET/val --curve
    """
    tokens = tokens_of(options)
    if options.pop("curve"):
        _draw_curve(source, images, tokens, output, options)
        return
    for name in ("rates", "sample"):
        if options.pop(name) is not None:
            raise click.UsageError(f"--{name} needs --curve")
    picture = {name: options.pop(name) for name in ("blocks", "heat", "side", "out", "force")}
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


def _draw_curve(source: str, images: tuple[Path, ...], tokens: Any, output: Output, options: dict[str, Any]) -> None:
    for name, unasked in (("blocks", None), ("heat", True), ("side", 224), ("runtimes", ()), ("threads", None)):
        if options.pop(name) != unasked:
            raise click.UsageError(
                f"--{name.rstrip('s') if name == 'runtimes' else name} cannot be combined with --curve"
            )
    out, force = options.pop("out"), options.pop("force")
    from evit_deploy.report.tables import text_table
    from evit_deploy.visualization.curve import removal_curve
    from evit_deploy.visualization.files import check_out, curve_name, write_curve

    place = out or Path(curve_name(source))
    check_out([place], force=force, suffixes=(".svg", ".csv"))
    given = {name: value for name, value in options.items() if value is not None}
    curve = removal_curve(source, images, **given, **tokens)
    write_curve(curve, place)
    if output.as_json:
        output.result(curve, measure=curve.measure, file=str(place))
        return
    header, rows = curve.table()

    def render(console: Any) -> None:
        console.print(printable(f"{curve.about}, {_count(curve.images)}: {curve.caption}."), markup=False)
        console.print(text_table(header, rows, console.width), markup=False, highlight=False)

    output.table(render, "\n" + "\n".join([*curve.notes, printable(place)]))


def _count(images: int) -> str:
    return f"{images} image" + "s" * (images != 1)
