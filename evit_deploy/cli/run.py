"""``evit-deploy run``."""

from pathlib import Path

import click

from evit_deploy.cli.common import PATH, Output, output_options


@click.command("run")
@click.argument("recipe", type=PATH)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe's value; may be repeated."
)
@click.option("--out", type=PATH, metavar="DIR", help="Where everything goes.  [default: runs/<recipe's name>]")
@click.option("--force", is_flag=True, help="Run every stage again.")
@output_options
def command(recipe: Path, overrides: tuple[str, ...], out: Path | None, force: bool, output: Output) -> None:
    """Train, export, verify and profile as RECIPE says; stages that are up to date are skipped.

    \b
    evit-deploy run recipes/digits.yaml
    """
    from evit_deploy.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    from evit_deploy.pipeline import run

    folder = out or Path("runs") / loaded.name
    bundle, report = run(loaded, folder, force=force, progress=output.progress, notice=output.notice)
    output.result(report, f"\n{bundle.path}", bundle=str(bundle.path), plan=bundle.manifest.plan)
