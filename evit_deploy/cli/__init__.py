"""The command line, a thin layer over the library. Importing it and printing ``--help`` load no library but click."""

import importlib
import os
import shlex
import shutil
import sys

import click

from evit_deploy import __version__, interrupts
from evit_deploy.environment.command import note_command

GROUPS = {
    "Make": ("convert", "run", "train", "tune"),
    "Prove and measure": ("verify", "profile", "compare", "report", "table"),
    "Use": ("predict", "show", "package"),
    "Around it": ("recipes", "plugin", "doctor"),
}
"""Headings of the help page and their commands, in the order in which a new user needs them."""
COMMANDS = tuple(name for names in GROUPS.values() for name in names)


class LazyGroup(click.Group):
    """A group that imports a command's module only when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the commands in the order of :data:`GROUPS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports ``evit_deploy.cli.<name>``."""
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"evit_deploy.cli.{cmd_name}").command

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the examples first, as the help pages of the commands do."""
        from evit_deploy.cli.options import write_help_text

        write_help_text(self, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes one section for each heading."""
        for heading, names in GROUPS.items():
            commands = [(name, self.get_command(ctx, name)) for name in names]
            with formatter.section(heading):
                formatter.write_dl([(name, found.get_short_help_str(200)) for name, found in commands if found])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolves the command; the error for an unknown name suggests the nearest one."""
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            from evit_deploy.errors import did_you_mean

            hint = did_you_mean(args[0], COMMANDS) or f"There are: {', '.join(COMMANDS)}."
            raise click.UsageError(f"no command {args[0]!r}. {hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="%(version)s")
def cli() -> None:
    """From a pretrained vision transformer to a faster one, proven to give the same answers.

    \b
    evit-deploy convert deit_s.pth --keep-rate 0.7
    evit-deploy profile deit_s-evit-k0.7

    Exit codes: 0 ok, 1 a gate failed, 2 usage, recipe or input, 3 environment, 4 a stage failed, 130 interrupted
    (Ctrl-C), 143 terminated (SIGTERM).
    """


def main() -> None:
    """Runs the command line and exits with its exit code; prints a traceback only with ``--debug``."""
    code = invoke()
    interrupts.ignore()  # the work is done, and the interpreter takes a second to shut down
    sys.exit(code)


def invoke(args: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: Arguments. Default: ``sys.argv[1:]``.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    with interrupts.listening():
        return _run(arguments, as_json="--json" in arguments)


def _run(arguments: list[str], as_json: bool) -> int:
    note_command(arguments)
    try:
        cli.main(args=arguments, standalone_mode=False)
        return 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        return _interrupted(error.__cause__ or error, arguments, as_json)
    except click.ClickException as error:
        if isinstance(error, click.UsageError) and error.ctx is not None:
            click.echo(error.ctx.get_usage(), err=True)
        return _say(error.format_message(), 2, "UsageError", as_json)
    except BrokenPipeError:
        sys.stderr.close()  # `evit-deploy ... | head` is not an error
        return 0
    except Exception as error:
        if interrupts.asked():  # a library turned the interrupt into another exception
            return _interrupted(error, arguments, as_json)
        return _failed(error, "--debug" in arguments, as_json)


def _interrupted(error: BaseException, arguments: list[str], as_json: bool) -> int:
    from evit_deploy.errors import Interrupted

    if os.environ.get("RANK", "0") != "0":  # in distributed training only the first process prints
        return interrupts.exit_code()
    text = interrupts.SENTENCE
    if isinstance(error, Interrupted):
        text = f"interrupted: {error}. {_how_to_go_on(arguments)}"
    return _say(text, interrupts.exit_code(), "Interrupted", as_json)


def _how_to_go_on(arguments: list[str]) -> str:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # started by a launcher, whose command line is unknown here
        return "Go on by starting it in the same way with --resume."
    from evit_deploy.cli.output import program

    rest = [argument for argument in arguments if argument not in ("--force", "--resume")]
    return f"Go on with: {shlex.join([*program(), *rest, '--resume'])}"


_ANOTHER_TORCH = "operator torchvision::nms does not exist"
"""Error of a torchvision built for another PyTorch, https://github.com/pytorch/pytorch/issues/122494."""


def _failed(error: Exception, debug: bool, as_json: bool) -> int:
    from evit_deploy.errors import EvitDeployError, MissingRequirement, exhausted

    if debug:
        import traceback

        from evit_deploy.report.lines import printable_lines

        click.echo(printable_lines("".join(traceback.format_exception(error))), err=True)
    known = exhausted(error) or error
    if _ANOTHER_TORCH in str(error):
        known = MissingRequirement(
            "torchvision was built for another PyTorch than the one that is installed", seen=error,
            fix="Install both together, from the same index: pip install --force-reinstall torch torchvision",
        )  # fmt: skip
    if isinstance(known, EvitDeployError):
        code, text, kind = known.exit_code, str(known), type(known).__name__
    else:
        kind = type(error).__name__
        code, text = 4, f"unexpected {kind}: {error}. Please report it, with what --debug prints."
    return _say(text, code, kind, as_json and not getattr(error, "result_was_printed", False))


def _say(text: str, code: int, kind: str, as_json: bool) -> int:
    if as_json:
        import json

        click.echo(json.dumps({"error": {"type": kind, "message": text, "exit_code": code}}))
    from evit_deploy.report.lines import printable, wrapped

    said = f"evit-deploy: {printable(text)}"
    click.echo(wrapped(said, shutil.get_terminal_size().columns) if sys.stderr.isatty() else said, err=True)
    return code
