"""``evit-deploy plugin``."""

from pathlib import Path

import click

from evit_deploy.cli.options import Command, Group
from evit_deploy.cli.output import Output, output_options
from evit_deploy.cli.types import PATH


@click.group("plugin", cls=Group, short_help="Build and check the TensorRT plugin.")
def command() -> None:
    """Build and check the TensorRT plugin, which reorganizes tokens in a single kernel.

    \b
    evit-deploy plugin build
    evit-deploy plugin check
    evit-deploy convert deit_s.pth --keep-rate 0.7 --target tensorrt --plugin auto
    """


@command.command("build", cls=Command, short_help="Compile it and store it for --plugin auto.")
@click.option("--tensorrt-root", type=PATH, metavar="DIR",
              help="Folder with TensorRT's include/.  [default: $TENSORRT_ROOT, system, or download]")  # fmt: skip
@click.option("--architectures", metavar="80,90,...", help="CUDA architectures.  [default: 80,86,87,89,90,100,110,120]")
@click.option("--kernel-only", is_flag=True, help="Build only the kernel for PyTorch on a GPU, without TensorRT.")
@click.option("--out", type=PATH, metavar="DIR", help="Folder for the libraries.  [default: the user's cache]")
@output_options
def build(
    tensorrt_root: Path | None, architectures: str | None, kernel_only: bool, out: Path | None, output: Output
) -> None:
    """Compile the plugin with CMake and nvcc, run its tests, and store it for --plugin auto.

    \b
    evit-deploy plugin build
    evit-deploy plugin build --tensorrt-root /opt/TensorRT-11.1 --architectures 90
    evit-deploy plugin build --kernel-only --architectures 90
    """
    from evit_deploy.engines.plugin.build import build_plugin
    from evit_deploy.engines.plugin.library import LIBRARY
    from evit_deploy.files import sha256
    from evit_deploy.tokens.operators.library import KERNEL

    names = architectures.split(",") if architectures is not None else ()
    folder = build_plugin(out, tensorrt_root=tensorrt_root, architectures=names, kernel_only=kernel_only)
    hashes = {path.name: sha256(path) for path in sorted(folder.glob("*.so"))}
    output.result(
        {"folder": str(folder), "files": hashes} if output.as_json else None,
        str(folder / (KERNEL if kernel_only else LIBRARY)),
    )
    if not kernel_only and out is None:
        output.suggest(("plugin", "check"))


@command.command("check", cls=Command, short_help="Identify a library and check whether it works here.")
@click.argument("library", type=PATH, required=False)
@output_options
def check(library: Path | None, output: Output) -> None:
    """Identify LIBRARY, and check that it matches this machine's TensorRT and GPU and returns PyTorch's results.

    Without LIBRARY, check the one that --plugin auto uses.

    \b
    evit-deploy plugin check
    """
    from evit_deploy.engines.plugin.build import check_plugin

    report = check_plugin(library)
    output.result(report, passed=report.passed)
    report.raise_if_failed("the library cannot be used: {name}", where=library)
