"""``evit-deploy doctor``."""

import click

from evit_deploy.cli.output import Output, output_options


@click.command("doctor", short_help="Say what is installed and usable here.")
@output_options
def command(output: Output) -> None:
    """Say what is installed here, what it can be used for, and the line that fixes what is not.

    \b
    evit-deploy doctor
    """
    from evit_deploy.environment import doctor
    from evit_deploy.errors import MissingRequirement

    findings = doctor()
    broken = [finding for finding in findings if finding.needed and not finding.usable]
    output.result(findings, usable=not broken) if output.as_json else None
    if not output.as_json:
        for finding in findings:
            mark = "ok" if finding.usable else "NO"
            click.echo(f"{mark}  {finding.name:24} {finding.found or 'not installed'}")
            if finding.fix:
                click.echo(f"    {finding.fix}")
    if broken:
        raise MissingRequirement(f"{broken[0].name} cannot be used", seen=broken[0].found, fix=broken[0].fix)
