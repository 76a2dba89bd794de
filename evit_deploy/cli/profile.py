"""``evit-deploy profile``."""

from typing import Any

import click

from evit_deploy.cli.options import Numbers, Positive, run_options, server_of, server_options, tokens_of, tokens_options
from evit_deploy.cli.output import Output, output_options


@click.command("profile", short_help="Measure a model against its dense and slice twins.")
@click.argument("target")
@run_options
@server_options
@tokens_options
@click.option("--batch-sizes", type=Numbers(int, 1), metavar="1,8,32",
              help="Images a call.  [default: 1,8,32, on a GPU 128 too; what an engine covers of them]")  # fmt: skip
@click.option("--duration", type=Positive(), default=10.0, show_default=True,
              help="Seconds for each batch size, CPU and GPU each.")  # fmt: skip
@click.option(
    "--min-speedup", type=Positive(), metavar="F", help="Fail if it is not this much faster than the dense twin."
)
@output_options
def command(
    target: str,
    keep_rate: tuple[float, ...] | None,
    locations: tuple[int, ...] | None,
    fuse: bool | None,
    method: str | None,
    min_speedup: float | None,
    output: Output,
    **options: Any,
) -> None:
    """Measure TARGET (a bundle, engine.plan, model.onnx or checkpoint) against its dense and slice twins, interleaved.

    Of an engine it says where the time of a call goes, and which block takes how much of it.

    \b
    evit-deploy profile deit_s-evit-k0.7
    evit-deploy profile engine.plan --against dense.plan
    evit-deploy profile deit_s.pth --keep-rate 0.7 --threads 1
    """
    server = server_of(options)
    tokens = tokens_of(keep_rate, locations, fuse, method)
    from evit_deploy.profiling.profile import profile, speed_gate

    report = profile(target, tokens=tokens, server=server, **options)
    report += speed_gate(report, min_speedup)
    output.result(report)
    report.raise_if_failed("{name}", where=target)
