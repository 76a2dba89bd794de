"""Options shared by several commands, and their help pages."""

import functools
import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import click

from evit_deploy.cli.types import IMAGES, PATH, BatchRange, Choice, MethodOption, Numbers, Positive, TargetOption, Whole

_LAST = "Output"
"""Heading of the options without a group; always last on the page."""


class Option(click.Option):
    """An option that appears under a heading of the help page.

    Args:
        args: Passed to ``click.Option``.
        group: The heading.
        options: Passed to ``click.Option``.
    """

    def __init__(self, *args: Any, group: str = _LAST, **options: Any) -> None:
        super().__init__(*args, **options)
        self.group = group
        if isinstance(self.type, Choice) and self.metavar is None and len(self.type.choices) > 3:
            self.metavar = "NAME"
            text, bracket, default = str(self.help).partition("[default")
            self.help = f"{text.strip()} One of {', '.join(self.type.choices)}. {bracket}{default}"


def _broken(line: str, width: int) -> list[str]:
    """Splits a command that is wider than the terminal into lines joined by backslashes."""
    if len(line) <= width:
        return [line]
    parts: list[str] = []
    for word in re.split(r" (?=--)", line):  # keeps a flag and its value on one line
        if parts and len(f"{parts[-1]} {word}") <= width - 2:
            parts[-1] += f" {word}"
        else:
            parts.append(f"    {word}" if parts else word)
    return [f"{part} \\" for part in parts[:-1]] + parts[-1:]


def write_help_text(command: click.Command, formatter: click.HelpFormatter) -> None:
    """Writes a command's help with its examples first: the lines of its docstring that follow ``\\b``."""
    text = inspect.cleandoc(command.help or "").partition("\f")[0]
    paragraphs = text.split("\n\n")
    examples = [paragraph for paragraph in paragraphs if paragraph.startswith("\b\n")]
    if examples:
        with formatter.section("Examples"):
            room = formatter.width - formatter.current_indent
            lines = [
                part for paragraph in examples for line in paragraph.split("\n")[1:] for part in _broken(line, room)
            ]
            formatter.write_text("\b\n" + "\n".join(lines))
    formatter.write_paragraph()
    with formatter.indentation():
        formatter.write_text("\n\n".join(paragraph for paragraph in paragraphs if paragraph not in examples))


class Command(click.Command):
    """A command with a help page that starts with examples and groups its options under headings."""

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the examples, then the description."""
        write_help_text(self, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes one section for each heading, in the order of their first options."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                groups.setdefault(getattr(param, "group", _LAST), []).append(record)
        for heading, records in sorted(groups.items(), key=lambda group: group[0] == _LAST):
            with formatter.section(heading):
                formatter.write_dl(records)


class Group(click.Group):
    """A group of commands with a help page that starts with examples."""

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the examples, then the description."""
        write_help_text(self, formatter)


_FLAGS = {
    "batches": "--batch", "gpus": "--gpu", "targets": "--target", "indices": "--with-indices",
    "target_options": "--target-option", "runtimes": "--runtime",
}  # fmt: skip
"""Fields that have another name on the command line."""
_METAVARS = {
    "batch": "N", "batch_sizes": "1,8,32", "calibration": "DIR", "crop_pct": "F", "data": "DIR", "duration": "S",
    "gpus": "SM", "images": "DIR", "instances": "N", "keep_precision": "PATTERN[,PATTERN]",
    "labels": "FILE", "max_batch": "N", "max_drop": "POINTS",
    "max_latency": "TIME", "mean": "R,G,B", "min_speedup": "F", "name": "NAME", "optimization_level": "0-5",
    "plugin": "PATH|auto|none", "queue_delay": "µS", "reference": "BUNDLE", "sample": "N", "seed": "N",
    "server": "YY.MM", "server_tensorrt": "VERSION", "sign": "KEY", "std": "R,G,B", "threads": "N",
    "timing_cache": "FILE", "trials": "N", "workspace": "MIB",
}  # fmt: skip
_REGISTRIES = {"targets": "TARGETS", "target": "TARGETS", "runtimes": "RUNTIMES", "runtime": "RUNTIMES"}
_PATHS = ("calibration", "data", "images", "labels", "reference", "sign", "timing_cache")
_HOMES = ("evit_deploy.recipe.options", "evit_deploy.serving.options")
"""Modules with the structs of options; importing them loads no heavy library."""


def _struct(name: str) -> Any:
    modules = map(importlib.import_module, _HOMES)
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def struct_options(name: str, group: str, *fields: str) -> Callable[..., Any]:
    """Creates an option for each field of a struct, with the field's documentation as help and no default.

    Args:
        name: A struct in one of :data:`_HOMES`.
        group: Heading on the help page.
        fields: The fields. Default: all, without inherited ones.
    """
    from evit_deploy.recipe.fields import field_docs, own_fields

    struct = _struct(name)
    docs, kinds = field_docs(struct), own_fields(struct)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for field in reversed(fields or tuple(kinds)):
            text = docs[field].replace("``", "")
            flag = _FLAGS.get(field, "--" + field.replace("_", "-"))
            kind = _kind(field, own_fields(struct, inherited=True)[field])
            option = click.option(
                flag, field, cls=Option, group=group, help=text, metavar=_METAVARS.get(field), default=None, **kind
            )
            function = option(function)
        return function

    return decorate


def _kind(field: str, annotation: Any) -> dict[str, Any]:
    """Returns the arguments of ``click.option`` that read a field's type."""
    from evit_deploy.recipe.fields import choices_in, limits_in, plain

    if field == "batches":
        return {"type": BatchRange(), "multiple": True}
    if field == "target_options":
        return {"type": TargetOption(), "multiple": True}
    if field in _REGISTRIES:
        return {"type": Choice(registry=_REGISTRIES[field]), "multiple": plain(annotation)[1]}
    if choices_in(annotation):
        return {"type": Choice(choices_in(annotation))}
    kind, repeated = plain(annotation)
    if kind is bool:
        return {"is_flag": True}
    if kind is str:
        return {"multiple": repeated, "type": click.Path() if field in _PATHS else str}
    low, high = limits_in(annotation)
    if repeated:
        return {"type": Numbers(kind, low, high)}
    return {"type": Whole(low, high) if kind is int else Positive(high or 1e6)}


def struct_of(name: str, values: dict[str, Any], **more: Any) -> Any:
    """Removes a struct's fields from a command's options and creates the struct from those that were given.

    Args:
        name: A struct in one of :data:`_HOMES`.
        values: The command's options; the struct's fields are removed from it.
        more: Values for fields that were not given.
    """
    struct = _struct(name)
    given = {field: values.pop(field) for field in struct.__struct_fields__ if field in values}
    if "gpus" in given:
        given["gpus"] = tuple(part.strip().lower() for gpu in given["gpus"] or () for part in gpu.split(","))
    if given.get("keep_precision"):
        given["keep_precision"] = tuple(name.strip() for part in given["keep_precision"] for name in part.split(","))
    if given.get("target_options"):
        asked: dict[str, dict[str, str]] = {}
        for target, option, text in given["target_options"]:
            asked.setdefault(target, {})[option] = text
        given["target_options"] = asked
    kept = {field: value for field, value in given.items() if value not in (None, ()) and value is not False}
    return struct(**(more | kept))


def tokens_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--keep-rate --locations --fuse --method --merge --proportional-attention --method-option``."""
    group = "Token reduction"
    for option in (
        click.option(
            "--method-option", "method_options", cls=Option, group=group, type=MethodOption(), multiple=True,
            metavar="OPTION=VALUE", help="Option of the method, such as squeeze=true of evit; repeatable.",
        ),
        click.option(
            "--proportional-attention/--no-proportional-attention", cls=Option, group=group, default=None,
            help="merge, tome: weight attention to a merged token by its number of patches.  [default: on]",
        ),
        click.option(
            "--merge", cls=Option, group=group, type=Numbers(int, 0), metavar="R[,R...]",
            help="tome: tokens merged in each block; one number, or one for each block.",
        ),
        click.option(
            "--method", cls=Option, group=group, type=Choice(registry="METHODS"),
            help="Reduction method.  [default: evit]",
        ),
        click.option(
            "--fuse/--no-fuse", cls=Option, group=group, default=None,
            help="Fuse the removed tokens into one extra token.  [default: fuse]",
        ),
        click.option(
            "--locations", cls=Option, group=group, type=Numbers(int), metavar="3,6,9",
            help="Blocks that reduce, 0-based.  [default: depth·i//4]",
        ),
        click.option(
            "--keep-rate", cls=Option, group=group, type=Numbers(float), metavar="RATE[,RATE...]",
            help="Share of the patches to keep, in (0, 1]; one rate, or one for each location.",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def tokens_of(options: dict[str, Any]) -> dict[str, Any]:
    """Removes the token options from a command's, checks them and returns them as fields of a ``TokenSpec``.

    The check comes first because it needs no heavy import.
    """
    from evit_deploy.tokens.plan import TokenSpec

    given = {name: options.pop(name) for name in ("keep_rate", "locations", "fuse", "method")}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given.get("keep_rate", ())) == 1:
        (given["keep_rate"],) = given["keep_rate"]
    checked: dict[str, Any] = {"keep_rate": 1.0} | given
    TokenSpec(**checked)
    options_given = dict(options.pop("method_options"))
    for name in ("merge", "proportional_attention"):
        value = options.pop(name)
        if value is not None and name in options_given:
            raise click.UsageError(f"{name} is given twice, by --method-option and by its own flag")
        if value is not None:
            options_given[name] = value[0] if name == "merge" and len(value) == 1 else value
    if options_given:
        given["method_options"] = options_given
    return given


def run_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--runtime --threads --against --plugin``."""
    for option in (
        click.option(
            "--plugin",
            cls=Option,
            group="Runtimes",
            metavar="PATH|auto|none",
            help="TensorRT: library with the plugin.  [default: the one in the cache that the engine was built with]",
        ),
        click.option(
            "--against",
            cls=Option,
            group="Runtimes",
            type=PATH,
            metavar="PATH",
            help="Checkpoint of the bundle, or dense twin of an engine or ONNX file.",
        ),
        click.option(
            "--threads",
            cls=Option,
            group="Runtimes",
            type=Whole(1, 4_096),
            metavar="N",
            help="CPU threads.  [default: the runtime's own choice]",
        ),
        click.option(
            "--runtime",
            "runtimes",
            cls=Option,
            group="Runtimes",
            type=Choice(registry="RUNTIMES"),
            multiple=True,
            help="Runtime to use; repeatable.  [default: all]",
        ),
    ):
        function = option(function)
    return function


def data_option(group: str) -> Callable[..., Any]:
    """Adds ``--data`` to the commands that take a bundle.

    Args:
        group: Heading on the help page.
    """
    return click.option(
        "--data", cls=Option, group=group, type=IMAGES, metavar="DIR",
        help="Images on which the answers are compared with the dense twin's: top-1 and top-5 if they are in class "
        "folders (class/image); of a model without classes cosine and retrieval.",
    )  # fmt: skip


def page_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--report`` to the commands that measure or check."""
    return click.option(
        "--report", "page", type=PATH, metavar="FILE",
        help="Also write the result as a web page; replaces an earlier page, but no other file.",
    )(function)  # fmt: skip


def server_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--url --model-name --model-version --shared-memory --timeout``."""
    server = functools.partial(click.option, cls=Option, group="Server")
    for option in (
        server("--timeout", type=Positive(), metavar="S", help="Seconds to wait for the server.  [default: 60]"),
        server("--shared-memory", is_flag=True, help="Send tensors through shared memory (same machine only)."),
        server("--model-version", metavar="N", help="Version of the model.  [default: the server's own choice]"),
        server(
            "--model-name", metavar="NAME",
            help="Model or ensemble.  [default: the only one with the bundle's inputs and outputs]",
        ),
        server("--url", metavar="URL", help="A running Triton server, http://HOST:8000 or grpc://HOST:8001."),
    ):  # fmt: skip
        function = option(function)
    return function


def server_of(options: dict[str, Any]) -> Any:
    """Removes the server's options from a command's; returns a ``Server``, or ``None`` without ``--url``."""
    names = ("model_name", "model_version", "shared_memory", "timeout")
    url, (name, version, shared, timeout) = options.pop("url"), (options.pop(key) for key in names)
    if url is None:
        given = {"--model-name": name, "--model-version": version, "--shared-memory": shared, "--timeout": timeout}
        for flag, value in given.items():
            if value:
                raise click.UsageError(f"{flag} needs a server: give --url too")
        return None
    from evit_deploy.triton.connection import TIMEOUT, Server, split_url

    split_url(url)  # before anything heavy is loaded
    return Server(url, name or "", version or "", shared, timeout or TIMEOUT)


def recipe_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--set --out --force --resume`` to the commands that take a recipe."""
    for option in (
        click.option(
            "--resume",
            is_flag=True,
            help="Continue an interrupted training of the same recipe; start it if nothing was saved yet.",
        ),
        click.option("--force", is_flag=True, help="Run every stage again."),
        click.option("--out", type=PATH, metavar="DIR", help="Output folder.  [default: runs/<recipe's name>]"),
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe's value; repeatable."
        ),
    ):
        function = option(function)
    return function


def check_resume(force: bool, resume: bool) -> None:
    """Refuses ``--force`` together with ``--resume``."""
    if force and resume:
        raise click.UsageError("--force starts again and --resume continues: give one of them")
