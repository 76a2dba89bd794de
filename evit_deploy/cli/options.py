"""Options that commands share."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)


class Numbers(click.ParamType):
    """Comma-separated numbers of one kind, as a tuple.

    Args:
        kind: ``int`` or ``float``.
        low: Least value, if there is one.
    """

    name = "numbers"

    def __init__(self, kind: type[int] | type[float], low: float | None = None) -> None:
        self.kind, self.low = kind, low

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """``"3,6,9"`` to ``(3, 6, 9)``."""
        if isinstance(value, tuple):
            return value
        wanted = "whole numbers" if self.kind is int else "numbers"
        try:
            numbers = tuple(self.kind(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"got {value!r}, expected {wanted} separated by commas", param, ctx)
        if self.low is not None and any(not number >= self.low for number in numbers):
            self.fail(f"got {value!r}, expected {wanted} from {self.low} up", param, ctx)
        return numbers


class Positive(click.ParamType):
    """A finite number above 0; click's own range lets ``nan`` through, which is neither in nor out of it."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """``"1.5"`` to ``1.5``."""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            self.fail(f"got {value!r}, expected a number above 0", param, ctx)
        return number


class BatchRange(click.ParamType):
    """``MIN:OPT:MAX``, or one number for a fixed batch."""

    name = "min:opt:max"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """``"1:32:128"`` to a profile."""
        from evit_deploy.recipe.options import BatchProfile

        try:
            numbers = [int(part) for part in str(value).split(":")]
        except ValueError:
            numbers = []
        numbers = numbers * 3 if len(numbers) == 1 else numbers
        if len(numbers) != 3 or not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
            self.fail(f"got {value!r}, expected MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX", param, ctx)
        return BatchProfile(*numbers)


def build_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What the builder of an engine can be told; see :class:`evit_deploy.engines.options.BuildOptions`."""
    for option in (
        click.option("--hardware-compatible", is_flag=True, help="TensorRT: also for other GPUs from Ampere on."),
        click.option("--version-compatible", is_flag=True, help="TensorRT: also for its later versions."),
        click.option("--optimization-level", type=int, metavar="0-5", help="Engine: how long to search for kernels."),
        click.option("--workspace", type=click.IntRange(1), metavar="MIB", help="Engine: most scratch memory."),
        click.option("--timing-cache", type=PATH, metavar="FILE", help="TensorRT: remembers which kernels were fast."),
        click.option("--plugin", metavar="PATH|auto|none", help="TensorRT: library with the plugin.  [default: none]"),
        click.option(
            "--batch", "profiles", type=BatchRange(), multiple=True,
            help="Engine: batch sizes to cover; repeatable.  [default: 1:32:128]",
        ),
        click.option(
            "--gpu", "gpus", multiple=True, metavar="SM",
            help="TensorRT-RTX: GPU to build for, as sm80; repeatable.  [default: this machine's]",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def tokens_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--keep-rate --locations --fuse --method``."""
    for option in (
        click.option("--method", help="Token reduction method.  [default: evit]"),
        click.option("--fuse/--no-fuse", default=None, help="Sum up what is removed in one token.  [default: fuse]"),
        click.option("--locations", type=Numbers(int), metavar="3,6,9", help="Blocks, 0-based.  [default: depth·i//4]"),
        click.option(
            "--keep-rate", type=Numbers(float), metavar="RATE[,RATE...]",
            help="Share of the patches to keep, in (0, 1]; one, or one for each location.",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def tokens_of(
    keep_rate: tuple[float, ...] | None, locations: tuple[int, ...] | None, fuse: bool | None, method: str | None
) -> Any:
    """The shared token options as one value, checked before anything heavy is loaded."""
    from evit_deploy.registry import METHODS
    from evit_deploy.tokens.plan import TokenSpec

    if method is not None and method not in METHODS.names():
        METHODS.get(method)  # raises, with the nearest name
    rate = keep_rate[0] if keep_rate and len(keep_rate) == 1 else keep_rate
    TokenSpec(keep_rate=rate if rate is not None else 1.0, locations=locations)
    from evit_deploy.models.checkpoint import Tokens

    return Tokens(keep_rate=rate, locations=locations, fuse=fuse, method=method)


def run_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--runtime --threads --against --plugin``."""
    for option in (
        click.option(
            "--plugin",
            metavar="PATH|auto|none",
            help="TensorRT: library with the plugin.  [default: the one in the cache that the engine was built with]",
        ),
        click.option(
            "--against",
            type=PATH,
            metavar="PATH",
            help="Checkpoint of the bundle, or dense twin of an engine or ONNX file.",
        ),
        click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: the runtime's own choice]"),
        click.option("--runtime", "runtimes", multiple=True, help="Runtime to use; may be repeated.  [default: all]"),
    ):
        function = option(function)
    return function


def server_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--url --model-name --model-version --shared-memory --timeout``."""
    for option in (
        click.option("--timeout", type=Positive(), metavar="S", help="Server: seconds to wait for it.  [default: 60]"),
        click.option("--shared-memory", is_flag=True, help="Server: on this machine, tensors by its shared memory."),
        click.option("--model-version", metavar="N", help="Server: version of the model.  [default: its own choice]"),
        click.option(
            "--model-name", metavar="NAME",
            help="Server: model or ensemble.  [default: the only one that takes the bundle's tensors]",
        ),
        click.option("--url", help="A running Triton server, http://HOST:8000 or grpc://HOST:8001; as runtime triton."),
    ):  # fmt: skip
        function = option(function)
    return function


def server_of(options: dict[str, Any]) -> Any:
    """Takes the server's options out of a command's, a :class:`~evit_deploy.triton.connection.Served` or ``None``."""
    names = ("model_name", "model_version", "shared_memory", "timeout")
    url, (name, version, shared, timeout) = options.pop("url"), (options.pop(key) for key in names)
    if url is None:
        given = {"--model-name": name, "--model-version": version, "--shared-memory": shared, "--timeout": timeout}
        for flag, value in given.items():
            if value:
                raise click.UsageError(f"{flag} is about a server: give its --url too")
        return None
    from evit_deploy.triton.connection import TIMEOUT, Served, split_url

    split_url(url)  # before anything heavy is loaded
    return Served(url, name or "", version or "", shared, timeout or TIMEOUT)


def recipe_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--set --out --force`` of the commands that take a recipe."""
    for option in (
        click.option("--force", is_flag=True, help="Run every stage again."),
        click.option("--out", type=PATH, metavar="DIR", help="Where everything goes.  [default: runs/<recipe's name>]"),
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe's value; repeatable."
        ),
    ):
        function = option(function)
    return function
