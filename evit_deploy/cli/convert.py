"""``evit-deploy convert``."""

from pathlib import Path
from typing import Any

import click

from evit_deploy.cli.options import Command, Option, struct_of, struct_options, tokens_of, tokens_options
from evit_deploy.cli.output import Output, output_options
from evit_deploy.cli.types import PATH, ModelName

_MODEL = {"cls": Option, "group": "Model"}


@click.command("convert", cls=Command, short_help="Turn a checkpoint into a verified, measured bundle.")
@click.argument("checkpoint", type=click.Path())  # a timm name too: the type is for the shell, which completes files
@click.option("--model", type=ModelName(), metavar="NAME", help="timm name, where the tensors leave it open.", **_MODEL)
@click.option("--image-size", type=int, metavar="N", help="Pixels; the position embedding is resampled.", **_MODEL)
@struct_options("PreprocessOptions", "Preprocessing and labels")
@tokens_options
@struct_options(
    "ConvertOptions",
    "Target",
    "targets",
    "precision",
    "linear",
    "calibration",
    "indices",
    "normalize",
    "target_options",
)
@struct_options("BuildOptions", "Engine")
@struct_options("ConvertOptions", "Checks", "data", "min_speedup")
@struct_options("ProfileOptions", "Checks", "threads")
@click.option("--out", type=PATH, metavar="DIR", help="Bundle to write.  [default: <stem>-<method>-k<rate> beside it]")
@click.option("--force", is_flag=True, help="Replace an older bundle there.")
@output_options
def command(checkpoint: str, out: Path | None, force: bool, output: Output, **options: Any) -> None:
    """Turn CHECKPOINT (a file, folder, hub id or timm name) into a verified, measured bundle.

    \b
    evit-deploy convert deit_s.pth --keep-rate 0.7
    evit-deploy convert google/vit-base-patch16-224 --keep-rate 0.7
    evit-deploy convert deit_s.pth --keep-rate 0.74,0.7,0.7 --locations 2,6,9
    evit-deploy convert deit_s.pth --keep-rate 0.7 --target tensorrt-rtx --gpu sm80
    """
    tokens, preprocess = tokens_of(options), struct_of("PreprocessOptions", options)
    asked = struct_of("ConvertOptions", options, preprocess=preprocess)
    import msgspec

    from evit_deploy.pipeline.convert import FIRST_LOOK, convert

    measure = struct_of("ProfileOptions", options, **msgspec.structs.asdict(FIRST_LOOK))
    bundle, report = convert(checkpoint, options=asked, measure=measure, out=out, force=force, **options, **tokens)
    if not output.as_json:
        # What was assumed has been logged when it mattered; what remains are the verdicts.
        verdicts = tuple(note for note in report.notes if note not in bundle.manifest.notes)
        report = msgspec.structs.replace(report, notes=verdicts)
    first = f"{bundle.manifest.plan}\n"
    output.result(report, f"\n{bundle.path}", first=first, bundle=str(bundle.path), plan=bundle.manifest.plan)
