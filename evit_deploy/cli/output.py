"""What a command says and where: the result on stdout, everything else on stderr."""

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import click


def output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--json -v -q --debug``, handed to the command as one ``output``; the innermost decorator.

    ``--debug`` itself is read by :func:`evit_deploy.cli.run`, which prints the traceback.
    """

    @click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout and nothing else.")
    @click.option("-v", "--verbose", is_flag=True, help="Say what is being done, also without a terminal.")
    @click.option("-q", "--quiet", is_flag=True, help="Errors only.")
    @click.option("--debug", is_flag=True, help="With traceback.")
    @functools.wraps(function)
    def wrapped(*args: Any, as_json: bool, verbose: bool, quiet: bool, debug: bool, **options: Any) -> Any:
        with Output(as_json, verbose, quiet) as output:
            try:
                return function(*args, output=output, **options)
            except Exception as error:
                error.result_was_printed = output.printed  # type: ignore[attr-defined]  # stdout takes one document
                raise

    return wrapped


class Output:
    """stdout carries the result, stderr carries progress and notices.

    Args:
        as_json: Whether the result is to be JSON.
        verbose: Whether progress is told without a terminal too.
        quiet: Whether notices are left out.
    """

    def __init__(self, as_json: bool = False, verbose: bool = False, quiet: bool = False) -> None:
        self.as_json, self.verbose, self.quiet = as_json, verbose, quiet
        self.printed = False
        self._status: Any = None

    def __enter__(self) -> "Output":
        if sys.stderr.isatty() and not self.quiet and not self.verbose:
            with contextlib.suppress(ImportError):  # `doctor` has to say that rich is missing
                from rich.console import Console

                self._status = Console(stderr=True).status("starting")
                self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._status is not None:
            self._status.stop()

    def progress(self, text: str) -> None:
        """What is being done now."""
        if self._status is not None:
            self._status.update(text)
        elif self.verbose:
            click.echo(text, err=True)

    def notice(self, text: str) -> None:
        """What the user should know."""
        if not self.quiet:
            click.echo(text, err=True)

    def result(self, report: Any, text: str | None = None, **extra: Any) -> None:
        """Prints the result.

        Args:
            report: A Report; for JSON anything msgspec can encode, ``None`` for nothing but the text.
            text: What a person reads last.
            extra: More keys for the JSON document.
        """
        if self._status is not None:
            self._status.stop()
            self._status = None
        self.printed = True
        if self.as_json:
            import msgspec

            document = msgspec.to_builtins(report)
            document = document if isinstance(document, dict) else {"items": document}
            click.echo(msgspec.json.format(msgspec.json.encode(extra | document), indent=2).decode())
            return
        if report is not None:
            from rich.console import Console

            from evit_deploy.report.report import Report
            from evit_deploy.report.tables import render

            width = None if sys.stdout.isatty() else 160  # a pipe has no width; tables must not be cut there
            if isinstance(report, Report):
                render(report, Console(width=width))
        if text:
            click.echo(text)
