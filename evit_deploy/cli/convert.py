"""``evit-deploy convert``."""

from pathlib import Path
from typing import Any

import click

from evit_deploy.cli.options import PATH, Positive, build_options, tokens_of, tokens_options
from evit_deploy.cli.output import Output, output_options


@click.command("convert", short_help="Turn a checkpoint into a verified, measured bundle.")
@click.argument("checkpoint")
@tokens_options
@click.option("--model", metavar="NAME", help="timm name, where the tensors leave it open.")
@click.option("--image-size", type=int, metavar="N", help="Pixels; the position embedding is resampled.")
@click.option("--precision", help="fp32, fp16, bf16, int8 or fp8.  [default: fp16 for an engine, else fp32]")
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="onnx, openvino, tensorrt, tensorrt-rtx or torch-tensorrt; repeatable.  [default: tensorrt or onnx]",
)
@click.option("--calibration", type=PATH, metavar="DIR", help="Real images, for int8 and fp8.")
@build_options
@click.option("--with-indices", is_flag=True, help="Give out kept indices as outputs kept_<block>.")
@click.option("--data", type=PATH, metavar="DIR", help="Labelled images (class/image) for top-1 and top-5.")
@click.option(
    "--min-speedup", type=Positive(), metavar="F", help="Fail if it is not this much faster than the dense twin."
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: the runtime's own choice]")
@click.option("--out", type=PATH, metavar="DIR", help="Bundle to write.  [default: <stem>-<method>-k<rate> beside it]")
@click.option("--force", is_flag=True, help="Replace an older bundle there.")
@output_options
def command(
    checkpoint: str,
    keep_rate: tuple[float, ...] | None,
    locations: tuple[int, ...] | None,
    fuse: bool | None,
    method: str | None,
    plugin: str | None,
    gpus: tuple[str, ...],
    profiles: tuple[Any, ...],
    workspace: int | None,
    optimization_level: int | None,
    version_compatible: bool,
    hardware_compatible: bool,
    timing_cache: Path | None,
    with_indices: bool,
    out: Path | None,
    force: bool,
    output: Output,
    **options: Any,
) -> None:
    """Turn CHECKPOINT (a file or a timm name) into a verified, measured bundle.

    \b
    evit-deploy convert deit_s.pth --keep-rate 0.7
    evit-deploy convert deit_s.pth --keep-rate 0.74,0.7,0.7 --locations 2,6,9
    evit-deploy convert deit_s.pth --keep-rate 0.7 --target tensorrt-rtx --gpu sm80
    """
    tokens = tokens_of(keep_rate, locations, fuse, method)
    import msgspec

    from evit_deploy.engines.plugin.library import choose_plugin
    from evit_deploy.pipeline.convert import convert
    from evit_deploy.recipe.options import BuildOptions

    builder = BuildOptions(
        profiles=profiles or BuildOptions().profiles,
        gpus=tuple(part.strip().lower() for gpu in gpus for part in gpu.split(",")),
        workspace=workspace,
        optimization_level=optimization_level,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        timing_cache=timing_cache,
        plugin=choose_plugin(plugin),
    )

    bundle, report = convert(
        checkpoint,
        tokens=tokens,
        options=builder,
        indices=with_indices,
        out=out,
        force=force,
        **options,
    )
    if not output.as_json:
        # What was assumed has been told when it mattered; what remains are the verdicts.
        verdicts = tuple(note for note in report.notes if note not in bundle.manifest.notes)
        report = msgspec.structs.replace(report, notes=verdicts)
    first = f"{bundle.manifest.plan}\n"
    output.result(report, f"\n{bundle.path}", first=first, bundle=str(bundle.path), plan=bundle.manifest.plan)
