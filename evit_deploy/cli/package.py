"""``evit-deploy package``."""

from pathlib import Path
from typing import Any

import click

from evit_deploy.cli.options import Command, Option, struct_of, struct_options
from evit_deploy.cli.output import Output, output_options
from evit_deploy.cli.types import PATH, Choice
from evit_deploy.report.lines import printable


@click.command("package", cls=Command, short_help="Create a folder for Triton Inference Server or a C++ program.")
@click.argument("bundle", type=PATH, nargs=-1, required=True)
@click.option(
    "--for",
    "purpose",
    cls=Option,
    group="Package",
    required=True,
    type=Choice(("triton", "cpp")),
    help="What will run it.",
)
@struct_options("PackageOptions", "Package")
@struct_options("TritonOptions", "Triton")
@click.option(
    "--out", type=PATH, metavar="DIR", help="Folder to write.  [default: <name>-<triton|cpp> next to the bundle]"
)
@click.option("--force", is_flag=True, help="Replace an existing package.")
@output_options
def command(
    bundle: tuple[Path, ...], purpose: str, out: Path | None, force: bool, output: Output, **options: Any
) -> None:
    """Turn BUNDLE into a folder for Triton Inference Server or a C++ program.

    Several BUNDLEs must be one model, each with a TensorRT plan for a different GPU.

    \b
    evit-deploy package deit_s-evit-k0.7 --for triton
    evit-deploy package deit_s-a100 deit_s-h100 --for triton --gpu sm80 --gpu sm90 --server 26.07
    evit-deploy package deit_s-evit-k0.7 --for cpp
    """
    asked, triton = struct_of("PackageOptions", options), struct_of("TritonOptions", options)
    from evit_deploy.serving.options import TritonOptions
    from evit_deploy.serving.package import package

    served = triton if triton != TritonOptions() else None
    place, made = package(bundle, purpose, options=asked, triton=served, out=out, force=force)
    output.result(made if output.as_json else None, printable(place), path=str(place))
    if purpose == "cpp":
        output.suggest(before=[("cmake", "-S", place, "-B", place / "build", f"-DEVIT_RUNTIME={made.platform}")])
        return
    from evit_deploy.serving.deployment import HTTP

    server = ("--url", f"http://localhost:{HTTP}", "--model-name", made.called)
    output.suggest(
        ("verify", place, *server), before=[("docker", "compose", "--file", place / "compose.yaml", "up", "--build")]
    )
