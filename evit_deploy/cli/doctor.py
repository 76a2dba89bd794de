"""``evit-deploy doctor``."""

from itertools import groupby
from typing import Any

import click

from evit_deploy.cli.options import Command
from evit_deploy.cli.output import Output, output_options

_FASTEST_FIRST = ("tensorrt", "tensorrt-rtx", "openvino")
"""Targets to suggest where they are usable, fastest first."""


@click.command("doctor", cls=Command, short_help="List what is installed and usable here.")
@output_options
def command(output: Output) -> None:
    """List what is installed, what it can be used for, and the command that installs what is missing.

    Covers packages, extras, GPU and driver, the plugin's build tools, runtimes, and whether each target can be built
    and run here. A missing optional package is not a failure; a broken required one ends with exit code 3.

    \b
    evit-deploy doctor
    """
    from evit_deploy.errors import MissingRequirement

    try:
        from evit_deploy.doctor.doctor import doctor
    except ImportError as error:  # the only packages that doctor itself needs
        raise MissingRequirement(
            f"msgspec and packaging are needed: {error}", fix="Run: pip install --force-reinstall msgspec packaging"
        ) from error

    diagnosis = doctor()
    output.result(diagnosis if output.as_json else None, _text(diagnosis), usable=not diagnosis.broken)
    if diagnosis.broken:
        first = diagnosis.broken[0]
        raise MissingRequirement(f"{first.name} cannot be used", seen=first.note or first.found, fix=first.fix)
    able = [target.name for target in diagnosis.targets if target.builds and target.runs]
    best = next((name for name in _FASTEST_FIRST if name in able), None)
    output.suggest(("convert", "CHECKPOINT", *(("--target", best) if best else ())), ("run", "digits"))


def _text(diagnosis: Any) -> str:
    lines = []
    for group, findings in groupby(diagnosis.findings, key=lambda finding: finding.group):
        lines += ["", group]
        for finding in findings:
            mark = "ok" if finding.usable else "NO" if finding.needed else "--"
            note = f"  ({finding.note})" if finding.note else ""
            lines.append(f"  {mark}  {finding.name:18} {finding.found or 'not there'}{note}")
            lines += [f"        {finding.fix}"] if finding.fix else []
    lines += ["", "Targets"]
    for target in diagnosis.targets:
        mark = "ok" if target.builds and target.runs else "--"
        able = {(True, True): "builds and runs here", (True, False): "builds here, does not run here"}
        found = able.get((target.builds, target.runs), "neither builds nor runs here")
        reasons = f"  ({'; '.join(target.reasons)})" if target.reasons else ""
        lines.append(f"  {mark}  {target.name:18} {found}{reasons}")
        lines += [f"        {target.fix}"] if target.fix else []
    return "\n".join(lines[1:])
