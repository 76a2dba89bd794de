"""``evit-deploy train``."""

import os
from pathlib import Path

import click

from evit_deploy.cli.options import Command, check_resume, recipe_options
from evit_deploy.cli.output import Output, output_options
from evit_deploy.cli.types import PATH
from evit_deploy.report.lines import printable


@click.command("train", cls=Command, short_help="Fine-tune the model of a recipe.")
@click.argument("recipe", type=PATH)
@recipe_options
@output_options
def command(
    recipe: Path, overrides: tuple[str, ...], out: Path | None, force: bool, resume: bool, output: Output
) -> None:
    """Fine-tune the model of RECIPE; training that is up to date is not repeated.

    \b
    evit-deploy train recipes/finetune.yaml --set model.checkpoint=deit_s.pth --set tokens.keep_rate=0.7
    accelerate launch -m evit_deploy train recipes/finetune.yaml --set model.checkpoint=deit_s.pth
    """
    check_resume(force, resume)
    from evit_deploy.recipe.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    from evit_deploy.pipeline.run import train_stage
    from evit_deploy.training.loop import EVIT

    folder = out or Path("runs") / loaded.name
    report = train_stage(loaded, folder, force=force, resume=resume)
    if int(os.environ.get("RANK", "0")):  # in distributed training only the first process prints
        return
    output.result(report, f"\n{printable(folder / EVIT)}", checkpoint=str(folder / EVIT))
    output.suggest(("convert", folder / EVIT))
