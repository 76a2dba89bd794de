"""``evit-deploy profile``."""

from pathlib import Path
from typing import Any

import click

from evit_deploy.cli.options import (
    Command,
    Option,
    data_option,
    page_option,
    run_options,
    server_of,
    server_options,
    struct_of,
    struct_options,
    tokens_of,
    tokens_options,
)
from evit_deploy.cli.output import Output, output_options
from evit_deploy.cli.types import NAME, Positive


@click.command("profile", cls=Command, short_help="Measure a model against its dense and slice twins.")
@click.argument("target", type=NAME)
@run_options
@struct_options("ProfileOptions", "Measurement", "batch_sizes", "duration")
@click.option(
    "--min-speedup",
    cls=Option,
    group="Measurement",
    type=Positive(),
    metavar="F",
    help="Fail unless the model is at least this many times as fast as its dense twin.",
)
@data_option("Measurement")
@tokens_options
@server_options
@page_option
@output_options
def command(target: str, min_speedup: float | None, page: Path | None, output: Output, **options: Any) -> None:
    """Measure TARGET (a bundle, engine.plan, model.onnx or checkpoint) against its twins in one interleaved run.

    The dense twin has no token reduction, the slice twin the same token counts without scores. For an engine, the time
    of a call is also broken down by kind of work and by block.

    \b
    evit-deploy profile deit_s-evit-k0.7
    evit-deploy profile deit_s-evit-k0.7 --data IMAGENET/val
    evit-deploy profile engine.plan --against dense.plan
    evit-deploy profile deit_s.pth --keep-rate 0.7 --threads 1
    """
    server, tokens, measure = server_of(options), tokens_of(options), struct_of("ProfileOptions", options)
    from evit_deploy.pipeline.profile import profile
    from evit_deploy.pipeline.reports import check_page, write_page
    from evit_deploy.profiling.profile import speed_gate
    from evit_deploy.report.verdict import verdict

    check_page(page)
    report = profile(target, measure=measure, server=server, **options, **tokens)
    report += speed_gate(report, min_speedup)
    write_page(report, target, page)
    output.result(report, verdict=verdict(report))
    report.raise_if_failed("{name}", where=target)
    if Path(target).is_dir() and server is None:
        output.suggest(("package", target, "--for", "triton"))
