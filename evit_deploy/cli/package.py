"""``evit-deploy package``."""

from pathlib import Path
from typing import Any

import click

from evit_deploy.cli.options import PATH
from evit_deploy.cli.output import Output, output_options


@click.command("package", short_help="Make a folder that Triton or a C++ program runs.")
@click.argument("bundle", type=PATH, nargs=-1, required=True)
@click.option("--for", "target", required=True, metavar="triton|cpp", help="What is to run it.")
@click.option("--platform", help="tensorrt, onnxruntime, openvino; C++ also tensorrt-rtx.  [default: the bundle's]")
@click.option("--name", help="Of the model.  [default: the bundle's folder]")
@click.option("--labels", type=PATH, metavar="FILE", help="A class name on each line.  [default: the manifest's]")
@click.option("--gpu", "gpus", multiple=True, metavar="SM", help="GPU that a plan is to run on, as sm90; repeatable.")
@click.option("--plugin", metavar="PATH|auto", help="Library that the plan needs.  [default: the one in the cache]")
@click.option("--server", metavar="YY.MM", help="Triton: its release.  [default: the newest that goes with the plan]")
@click.option("--server-tensorrt", metavar="VERSION", help="Triton: TensorRT in it.  [default: what is known of it]")
@click.option(
    "--preprocess", metavar="python|dali|none", help="Triton: what makes inputs of images.  [default: python]"
)
@click.option("--max-batch", type=int, help="Triton: most images a call.  [default: the plan's; 32; OpenVINO 1]")
@click.option("--instances", type=int, help="Triton: of the model, on each GPU or the CPU.  [default: 1]")
@click.option("--queue-delay", type=int, metavar="µS", help="Triton: how long to wait for a batch.  [default: 1000]")
@click.option("--unverified", is_flag=True, help="Also what was not verified on this platform; it is written down.")
@click.option("--out", type=PATH, metavar="DIR", help="Folder to write.  [default: <name>-<triton|cpp> beside it]")
@click.option("--force", is_flag=True, help="Replace an older package there.")
@output_options
def command(
    bundle: tuple[Path, ...],
    target: str,
    server: str | None,
    server_tensorrt: str | None,
    preprocess: str | None,
    max_batch: int | None,
    instances: int | None,
    queue_delay: int | None,
    output: Output,
    **options: Any,
) -> None:
    """Make a folder of BUNDLE that Triton Inference Server or a C++ program runs.

    Several BUNDLEs are one model with a TensorRT plan for another GPU in each.

    \b
    evit-deploy package deit_s-evit-k0.7 --for triton
    evit-deploy package deit_s-a100 deit_s-h100 --for triton --gpu sm80 --gpu sm90 --server 26.07
    evit-deploy package deit_s-evit-k0.7 --for cpp
    """
    from evit_deploy.serving.package import TritonOptions, package

    given = {
        "server": server, "server_tensorrt": server_tensorrt, "preprocess": preprocess, "max_batch": max_batch,
        "instances": instances, "queue_delay": queue_delay,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    triton = TritonOptions(**given) if given else None  # type: ignore[arg-type]
    place, made = package(bundle, target, triton=triton, **options)
    output.result(made if output.as_json else None, str(place), path=str(place))
