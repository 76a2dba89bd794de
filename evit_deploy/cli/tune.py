"""``evit-deploy tune``."""

from pathlib import Path
from typing import Any

import click

from evit_deploy.cli.options import Command, Option, check_resume, struct_of, struct_options
from evit_deploy.cli.output import Output, output_options, uses_of
from evit_deploy.cli.types import NAME, PATH, Choice, MethodOption, ModelName
from evit_deploy.report.lines import printable

_TOKENS = {"cls": Option, "group": "Token reduction"}


@click.command("tune", cls=Command, short_help="Search the schedule of token counts for a budget, on this device.")
@click.argument("checkpoint", type=NAME)
@click.option(
    "--model", type=ModelName(), metavar="NAME", help="timm name, if the tensors do not determine it.", cls=Option,
    group="Model",
)  # fmt: skip
@struct_options("TuneOptions", "Budget", "min_speedup", "max_latency", "max_drop")
@struct_options("TuneOptions", "Images", "calibration", "data", "sample")
@click.option("--method", type=Choice(registry="METHODS"), help="Reduction method.  [default: evit]", **_TOKENS)
@click.option(
    "--fuse/--no-fuse", default=None, help="Fuse the removed tokens into one extra token.  [default: fuse]", **_TOKENS
)
@click.option(
    "--method-option", "method_options", type=MethodOption(), multiple=True, metavar="OPTION=VALUE",
    help="Option of the method, such as squeeze=true of evit; repeatable.", **_TOKENS,
)  # fmt: skip
@struct_options("TuneOptions", "Device", "target", "precision", "runtime", "batch", "threads", "duration")
@struct_options("TuneOptions", "Search", "trials", "seed")
@click.option("--convert", "bundle", is_flag=True, help="Also convert the winner, into DIR/bundle.")
@click.option("--out", type=PATH, metavar="DIR", help="Output folder.  [default: <stem>-tune next to the checkpoint]")
@click.option("--force", is_flag=True, help="Replace an earlier search and start again.")
@click.option("--resume", is_flag=True, help="Continue the search there; several processes can continue it together.")
@output_options
def command(
    checkpoint: str, out: Path | None, force: bool, resume: bool, bundle: bool, output: Output, **options: Any
) -> None:
    """Search the schedule (which blocks reduce, to how many tokens) that changes CHECKPOINT's answers least.

    Needs a budget and a folder of images; labels are optional. The device is measured first; the finalists are
    measured as complete models.

    \b
    evit-deploy tune deit_s.pth --calibration IMAGES --min-speedup 1.5
    evit-deploy tune deit_s.pth --calibration IMAGES --max-latency 20ms --batch 8 --threads 1
    evit-deploy tune deit_s.pth --calibration IMAGES --max-drop 0.5 --data IMAGENET/val --convert
    """
    check_resume(force, resume)
    tokens = {name: options.pop(name) for name in ("method", "fuse")}
    tokens: Any = {name: value for name, value in tokens.items() if value is not None}
    method_options = dict(options.pop("method_options"))
    if method_options:
        tokens["method_options"] = method_options
    asked = struct_of("TuneOptions", options)
    from evit_deploy.tuning.tune import tune

    found = tune(
        checkpoint, options=asked, out=out, force=force, resume=resume, bundle=bundle, tokens=tokens, **options
    )
    _show(found, output)
    if not found.met:
        from evit_deploy.errors import GateFailed

        raise GateFailed(found.verdict.partition("; ")[0].rstrip("."), fix=f"The nearest is {found.winner}.")
    if found.bundle is not None:
        output.suggest(*uses_of(found.bundle))
    elif out is not None:
        output.suggest(("run", out / "recipe.yaml"))


def _show(found: Any, output: Output) -> None:
    if output.as_json:
        output.result(found)
        return
    from evit_deploy.report.tables import text_table
    from evit_deploy.tuning.results.tables import table

    header, rows = table(found)
    spare = ("95 % interval", "GMACs", "top-1 to dense, points", "ms")
    notes = "\n".join(map(printable, found.notes))
    output.table(
        lambda console: console.print(text_table(header, rows, console.width, spare), markup=False, highlight=False),
        f"\n{notes}" if notes else None,
        verdict=found.verdict,
    )
