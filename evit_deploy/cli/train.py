"""``evit-deploy train``."""

from pathlib import Path

import click

from evit_deploy.cli.common import PATH, Output, output_options


@click.command("train")
@click.argument("recipe", type=PATH)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe's value; may be repeated."
)
@click.option("--out", type=PATH, metavar="DIR", help="Where checkpoints go.  [default: runs/<recipe's name>]")
@output_options
def command(recipe: Path, overrides: tuple[str, ...], out: Path | None, output: Output) -> None:
    """Fine-tune as RECIPE says.

    \b
    evit-deploy train recipes/finetune.yaml --set model.checkpoint=deit_s.pth --set tokens.keep_rate=0.7
    """
    from evit_deploy.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    from evit_deploy.pipeline import train_stage

    result = train_stage(loaded, out or Path("runs") / loaded.name, output.progress, output.notice)
    output.result(result.report, f"\n{result.checkpoint}", checkpoint=str(result.checkpoint))
