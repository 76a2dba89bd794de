"""Output of the commands: the result goes to stdout, everything else to stderr through one live display."""

import contextlib
import functools
import json
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import click

from evit_deploy import interrupts
from evit_deploy.report.lines import printable, printable_lines, shown_in, wrapped

SILENCE = 60.0
"""Seconds without output after which a command that has no terminal prints its progress."""


def output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--json -v -q --debug`` and passes them to the command as ``output``; must be the innermost decorator.

    ``--debug`` is handled by :func:`evit_deploy.cli.invoke`, which prints the traceback.
    """

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout and nothing else.")
    @click.option("-v", "--verbose", is_flag=True, help="Print every step as a line, also without a terminal.")
    @click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
    @click.option("--debug", is_flag=True, help="Print the traceback of an error.")
    @functools.wraps(function)
    def wrapped(*args: Any, as_json: bool, verbose: bool, quiet: bool, debug: bool, **options: Any) -> Any:
        with Output(as_json, verbose, quiet) as output:
            try:
                return function(*args, output=output, **options)
            except Exception as error:
                error.result_was_printed = output.printed  # type: ignore[attr-defined]  # stdout holds one JSON document
                raise

    return wrapped


class Output(logging.Handler):
    """Context manager around a command: prints its results on stdout and the library's log on stderr.

    On a terminal, progress is one live line (stage k of n and the elapsed time; in training also images/s, loss and
    time left), with messages above it. Elsewhere (a pipe, ``TERM=dumb``) progress is a line after each minute without
    output, so that a log shows that long work continues; with ``verbose`` it is every step. In distributed training
    only the first process prints.

    Args:
        as_json: Whether to print the result as JSON.
        verbose: Whether to print every record as a line instead of the live display.
        quiet: Whether to print errors only.
    """

    def __init__(self, as_json: bool = False, verbose: bool = False, quiet: bool = False) -> None:
        super().__init__()
        self.as_json, self.verbose = as_json, verbose
        self.quiet = quiet or os.environ.get("RANK", "0") != "0"
        self.printed = False
        dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
        self._live = sys.stderr.isatty() and not (self.quiet or verbose or dumb)
        self._display: _Display | None = None
        self._printed_at = time.monotonic()

    def __enter__(self) -> "Output":
        log = logging.getLogger("evit_deploy")
        self._before = log.level, log.propagate
        log.propagate = False  # a handler of the root logger would print every line again
        log.setLevel(logging.INFO if self.quiet else logging.DEBUG)
        log.addHandler(self)
        return self

    def __exit__(self, *exception: object) -> None:
        log = logging.getLogger("evit_deploy")
        log.removeHandler(self)
        level, log.propagate = self._before
        log.setLevel(level)
        self._stop()

    def emit(self, record: logging.LogRecord) -> None:
        """Shows one record of the library's logger, and ends work that swallowed an interrupt.

        Raises:
            KeyboardInterrupt: A signal arrived earlier and the work continued.
        """
        interrupts.raise_if_asked()
        progress = getattr(record, "progress", None)
        if self.quiet and record.levelno < logging.ERROR:
            return
        if progress is None and record.levelno >= logging.INFO:
            self._message(record.getMessage())
        elif progress is not None and not self._live and (self.verbose or self._is_silent_too_long()):
            stage = f"[{progress.stage}/{progress.stages}] " if progress.stage else ""
            self._message(", ".join((stage + record.getMessage(), *_figures(progress))))
        elif self._live and progress is not None:
            if self._display is None:
                with contextlib.suppress(ImportError):  # `doctor` must run without rich to report that it is missing
                    self._display = _Display()
            if self._display is not None:
                self._display.show(record.getMessage(), progress)

    def _is_silent_too_long(self) -> bool:
        return time.monotonic() - self._printed_at >= SILENCE

    def _message(self, text: str) -> None:
        self._printed_at = time.monotonic()
        # While the display is live, rich replaces sys.stderr with a proxy whose encoding is None.
        stream = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
        text = shown_in(printable(text), stream.encoding)
        if self._display is not None:
            self._display.message(text)
        elif sys.stderr.isatty():
            click.echo(wrapped(text, shutil.get_terminal_size().columns), err=True)
        else:
            click.echo(text, err=True)

    def _stop(self) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None
        self._live = False

    def table(self, render: Callable[[Any], None], text: str | None = None, *, verdict: str | None = None) -> None:
        """Ends the live display and prints a table that the caller renders.

        Args:
            render: Called with a rich console to print on.
            text: Text to print after the table.
            verdict: Sentence to print before the table.
        """
        from rich.console import Console

        self._stop()
        self.printed = True
        self._verdict(verdict)
        render(Console(width=self._width()))
        if text:
            click.echo(printable_lines(text))

    @staticmethod
    def _width() -> int | None:
        """Returns a fixed width for pipes and files, so that rich does not truncate tables to 80 columns there."""
        return None if sys.stdout.isatty() else 160

    def _verdict(self, sentence: str | None) -> None:
        if sentence:
            said = printable(sentence)
            width = shutil.get_terminal_size().columns
            click.echo(f"{wrapped(said, width) if sys.stdout.isatty() else said}\n")

    def suggest(self, *commands: Sequence[object], before: Sequence[Sequence[object]] = ()) -> None:
        """Prints likely next commands, one a line and ready to copy; only on a terminal.

        Args:
            commands: Arguments of each command, with the paths of this call. Commands with characters that a terminal
                cannot show unchanged are omitted.
            before: Commands of other programs, printed first.
        """
        if self.as_json or self.quiet or not sys.stderr.isatty():
            return
        words = [*before, *((*program(), *command) for command in commands)]
        lines = [" ".join(shlex.quote(str(word)) for word in line) for line in words]
        shown = [line for line in lines if printable(line) == line]
        if shown:
            click.echo("\nnext: " + "\n      ".join(shown), err=True)

    def result(
        self,
        report: Any,
        text: str | None = None,
        *,
        first: str | None = None,
        verdict: str | None = None,
        **extra: Any,
    ) -> None:
        """Ends the live display and prints the result.

        Args:
            report: A Report; with ``--json`` anything that msgspec can encode. ``None`` prints only the text.
            text: Text to print last; names in it go through :func:`~evit_deploy.report.lines.printable`.
            first: Text to print first, unless quiet.
            verdict: Sentence to print before ``first``.
            extra: Additional keys of the JSON document.
        """
        self._stop()
        self.printed = True
        if self.as_json:
            import msgspec

            document = msgspec.to_builtins(report)
            document = document if isinstance(document, dict) else {"items": document}
            try:
                click.echo(msgspec.json.format(msgspec.json.encode(extra | document), indent=2).decode())
            except UnicodeEncodeError:  # a file name that is not UTF-8
                click.echo(json.dumps(extra | document, indent=2))
            return
        self._verdict(verdict)
        if first and not self.quiet:
            click.echo(printable_lines(first))
        if report is not None:
            from rich.console import Console

            from evit_deploy.report.report import Report
            from evit_deploy.report.tables import render

            if isinstance(report, Report):
                render(report, Console(width=self._width()))
        if text:
            click.echo(printable_lines(text))


def program() -> list[str]:
    """Returns how this program was called: ``evit-deploy`` or ``python -m evit_deploy``."""
    called = os.path.basename(sys.argv[0])
    return ["python", "-m", "evit_deploy"] if called == "__main__.py" else ["evit-deploy"]


def typed() -> list[str]:
    """Returns the arguments of this call as typed."""
    return sys.argv[1:]


def uses_of(bundle: object, *, reduced: bool = True) -> list[tuple[object, ...]]:
    """Returns commands to suggest for a new bundle.

    Args:
        bundle: Its folder.
        reduced: Whether its model reduces tokens, so that ``show`` has something to draw.
    """
    found: list[tuple[object, ...]] = [("predict", bundle, "IMAGES")]
    found += [("show", bundle, "IMAGES")] if reduced else []
    return [*found, ("verify", bundle), ("profile", bundle), ("package", bundle, "--for", "triton")]


def _figures(progress: Any) -> list[str]:
    """Formats ``images_per_second`` as ``297 images/s`` and other figures as ``loss 2.36``."""
    rates = {name: name.removesuffix("_per_second") for name in progress.figures}
    return [
        f"{value:.4g} {rates[name]}/s" if rates[name] != name else f"{name} {value:.4g}"
        for name, value in progress.figures.items()
    ]


class _Display:
    """One live line on a terminal, with messages above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.table import Column

        self._console = Console(stderr=True, highlight=False)
        text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        stage, figures = (TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("stage", "figures"))
        columns = (SpinnerColumn(), stage, text, figures, TimeElapsedColumn())
        self._progress = Progress(*columns, console=self._console, transient=True)
        self._task = self._progress.add_task("", total=None, stage="", figures="")
        self._stage, self._counted = "", 0
        self._progress.start()

    def show(self, text: str, progress: Any) -> None:
        stage = f"{progress.stage}/{progress.stages}" if progress.stage else ""
        self._progress.update(self._task, description=printable(text), stage=stage, figures=self._figures(progress))

    def _figures(self, progress: Any) -> str:
        if progress.total is None:
            self._counted = 0
            return ""
        if progress.done <= self._counted or not self._counted:  # a new series of steps starts
            self._since, self._first = time.monotonic(), progress.done
        self._counted = progress.done
        parts = _figures(progress)
        if progress.done > self._first:
            left = (time.monotonic() - self._since) / (progress.done - self._first) * (progress.total - progress.done)
            minutes, seconds = divmod(round(left), 60)
            parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
        return ", ".join(parts)

    def message(self, text: str) -> None:
        self._console.print(wrapped(text, self._console.width), markup=False, emoji=False, soft_wrap=True)

    def stop(self) -> None:
        self._progress.stop()
