"""``evit-deploy convert``."""

import re
from pathlib import Path
from typing import Any, get_args

import click

from evit_deploy.cli.options import Command, Option, struct_of, struct_options, tokens_of, tokens_options
from evit_deploy.cli.output import Output, output_options, uses_of
from evit_deploy.cli.types import NAME, PATH, Choice, ModelName, Numbers, Whole
from evit_deploy.recipe.options import Precision
from evit_deploy.report.lines import printable

PRECISIONS = get_args(Precision)
_MODEL = {"cls": Option, "group": "Model"}


class _Several(Command):
    """A command that accepts several values after one flag: ``--keep-rates 0.9 0.7``, ``--precision fp32 fp16``."""

    _values = {  # noqa: RUF012 -- never changed
        "--keep-rates": re.compile(r"[0-9.,]+"),
        "--precision": re.compile("|".join(PRECISIONS)),
    }

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeats the flag before each of its values, which is the form that click understands."""
        repeated: list[str] = []
        flag, given = "", 0
        for argument in args:
            if argument in self._values:
                flag, given = argument, 0
            elif flag and given and self._values[flag].fullmatch(argument):
                repeated.append(flag)
                given += 1
            elif flag and not given:
                given = 1
            else:
                flag = ""
            repeated.append(argument)
        return super().parse_args(ctx, repeated)


@click.command("convert", cls=_Several, short_help="Turn a checkpoint into a verified, measured bundle.")
@click.argument("checkpoint", type=NAME)  # may be a timm name; the type only lets the shell complete files
@click.option(
    "--model", type=ModelName(), metavar="NAME", help="timm name, if the tensors do not determine it.", **_MODEL
)
@click.option(
    "--image-size", type=Whole(1, 4_096), metavar="N", help="Pixels; the position embedding is resampled.", **_MODEL
)
@struct_options("PreprocessOptions", "Preprocessing and labels")
@tokens_options
@click.option(
    "--keep-rates",
    cls=Option,
    group="Token reduction",
    type=Numbers(float),
    multiple=True,
    metavar="RATE...",
    help="Several models in one run, one bundle each: --keep-rates 0.9 0.7 0.5.",
)
@struct_options("ConvertOptions", "Target", "targets")
@click.option(
    "--precision",
    "precisions",
    cls=Option,
    group="Target",
    type=Choice(PRECISIONS),
    multiple=True,
    help="Precision of the files; with several, one bundle each.  [default: fp16 for an engine, else fp32]",
)
@struct_options(
    "ConvertOptions",
    "Target",
    "linear",
    "calibration",
    "keep_precision",
    "max_drop",
    "sensitivity",
    "indices",
    "normalize",
    "target_options",
)
@struct_options("BuildOptions", "Engine")
@struct_options("ConvertOptions", "Checks", "data", "min_speedup", "sign")
@struct_options("ProfileOptions", "Checks", "threads")
@click.option(
    "--out",
    type=PATH,
    metavar="DIR",
    help="Bundle to write, or the folder for several.  [default: <stem>-<method>-k<rate> next to it]",
)
@click.option("--force", is_flag=True, help="Replace an older bundle there.")
@output_options
def command(checkpoint: str, out: Path | None, force: bool, output: Output, **options: Any) -> None:
    """Turn CHECKPOINT (a file, folder, hub id or timm name) into a verified, measured bundle.

    \b
    evit-deploy convert deit_s.pth --keep-rate 0.7
    evit-deploy convert google/vit-base-patch16-224 --keep-rate 0.7
    evit-deploy convert deit_s.pth --keep-rate 0.74,0.7,0.7 --locations 2,6,9
    evit-deploy convert deit_s.pth --keep-rates 0.9 0.7 0.5 --precision fp32 fp16
    evit-deploy convert deit_s.pth --keep-rate 0.7 --target tensorrt-rtx --gpu sm80
    """
    rates = tuple(rate for group in options.pop("keep_rates") for rate in group)
    precisions = options.pop("precisions")
    if rates and options["keep_rate"] is not None:
        raise click.UsageError("--keep-rate is for one model, --keep-rates for several: give one of the two")
    tokens, preprocess = tokens_of(options), struct_of("PreprocessOptions", options)
    more = {"precision": precisions[0]} if len(precisions) == 1 else {}
    asked = struct_of("ConvertOptions", options, preprocess=preprocess, **more)
    import msgspec

    from evit_deploy.pipeline.convert import FIRST_LOOK, convert

    measure = struct_of("ProfileOptions", options, **msgspec.structs.asdict(FIRST_LOOK))
    if rates or len(precisions) > 1:
        several = tokens | {"keep_rates": rates, "precisions": precisions}
        _convert_several(checkpoint, asked, measure, (out, force), output, options | {"asked": several})
        return
    bundle, report = convert(checkpoint, options=asked, measure=measure, out=out, force=force, **options, **tokens)
    if not output.as_json:
        # The manifest's notes were logged during the conversion; print only the others.
        verdicts = tuple(note for note in report.notes if note not in bundle.manifest.notes)
        report = msgspec.structs.replace(report, notes=verdicts)
    first, last = f"{bundle.manifest.plan}\n", f"\n{printable(bundle.path)}"
    from evit_deploy.report.verdict import verdict

    more = {"bundle": str(bundle.path), "plan": bundle.manifest.plan}
    output.result(report, last, first=first, verdict=verdict(report), **more)
    output.suggest(*uses_of(bundle.path, reduced=bool(bundle.manifest.plan.locations)))


def _convert_several(
    checkpoint: str, asked: Any, measure: Any, place: tuple[Path | None, bool], output: Output, options: dict[str, Any]
) -> None:
    """Converts every variant and prints a table of them; a failed variant does not stop the others.

    Raises:
        GateFailed: After all were made, if a check of one of them failed.
    """
    from evit_deploy.errors import GateFailed
    from evit_deploy.pipeline.variants import make_variants
    from evit_deploy.report.tables import render_variants

    read_as = options["model"], options["image_size"]
    made = make_variants(checkpoint, read_as, asked, measure, *place, options["asked"])
    if output.as_json:
        found = [
            {"bundle": str(one.bundle.path), "variant": one.variant.label, "plan": one.bundle.manifest.plan}
            | {"passed": one.report.passed, "report": one.report}
            for one in made
        ]
        output.result({"passed": all(one.report.passed for one in made), "variants": found})
    else:
        for one in made:
            for check in one.report.failed:
                click.echo(printable(f"{one.variant.label}: FAILED {check.name}: {check.reason}"))
        plans = [one.bundle.manifest.plan for one in made]
        costs = [(plan.macs() / 1e9, plan.mac_ratio()) for plan in plans]
        lines = [(one.variant.label, *cost, one.report) for one, cost in zip(made, costs, strict=True)]
        paths = "\n".join(printable(one.bundle.path) for one in made if one.report.passed)
        output.table(lambda console: render_variants(lines, console), f"\n{paths}" if paths else None)
    failed = [one for one in made if not one.report.passed]
    if failed:
        names = ", ".join(one.variant.label for one in failed)
        rejected = " ".join(one.rejected for one in failed)
        raise GateFailed(f"checks failed for {names}, {len(failed)} of {len(made)} variants", fix=rejected)
    output.suggest(("compare", *(one.bundle.path for one in made)))
