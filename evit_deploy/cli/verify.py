"""``evit-deploy verify``."""

from pathlib import Path
from typing import Any

import click

from evit_deploy.cli.options import Command, Option, data_option, page_option, run_options, server_of, server_options
from evit_deploy.cli.output import Output, output_options
from evit_deploy.cli.types import PATH, Numbers
from evit_deploy.report.lines import printable


@click.command("verify", cls=Command, short_help="Check that a bundle gives PyTorch's answers.")
@click.argument("bundle", type=PATH)
@run_options
@server_options
@click.option(
    "--batch-sizes",
    cls=Option,
    group="Checks",
    type=Numbers(int, 1, 65_536),
    metavar="1,2,8",
    help="Images per call.  [default: 1,2,8; for an engine the limits of its profiles]",
)
@data_option("Checks")
@click.option(
    "--trust",
    cls=Option,
    group="Checks",
    type=PATH,
    metavar="KEY",
    help="Public key; the manifest must be signed with its private key (convert --sign).",
)
@page_option
@output_options
def command(bundle: Path, output: Output, trust: Path | None, page: Path | None, **options: Any) -> None:
    """Check that BUNDLE gives PyTorch's answers, on every runtime it can use.

    \b
    evit-deploy verify deit_s-evit-k0.7
    evit-deploy verify deit_s-evit-k0.7 --url http://server:8000 --model-name deit_s
    """
    server = server_of(options)
    from evit_deploy.bundle.signature import read_signed
    from evit_deploy.pipeline.reports import check_page, write_page
    from evit_deploy.verification.verify import verify

    check_page(page)
    found = bundle if trust is None else read_signed(bundle, trust)
    report = verify(found, server=server, **options)
    write_page(report, bundle, page)
    signed = f", signed with {printable(trust)}" if trust is not None else ""
    from evit_deploy.report.verdict import verdict

    last = f"\n{'verified' if report.passed else 'NOT verified'}: {printable(bundle)}{signed}"
    output.result(report, last, verdict=verdict(report), passed=report.passed)
    report.raise_if_failed(where=bundle)
    output.suggest(("profile", bundle), ("package", bundle, "--for", "triton"))
