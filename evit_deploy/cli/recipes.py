"""``evit-deploy recipes``."""

from pathlib import Path

import click

from evit_deploy.cli.options import Command, Group
from evit_deploy.cli.output import Output, output_options
from evit_deploy.cli.types import PATH, RecipeName
from evit_deploy.report.lines import printable


@click.group("recipes", cls=Group, short_help="List, show and copy the recipes that come with evit-deploy.")
def command() -> None:
    """List, show and copy the recipes that come with evit-deploy; run and train also accept their names.

    \b
    evit-deploy recipes list
    evit-deploy recipes show digits
    evit-deploy recipes copy finetune mine.yaml
    """


@command.command("list", cls=Command, short_help="List them.")
@output_options
def listed(output: Output) -> None:
    """List all recipes, and what each does.

    \b
    evit-deploy recipes list
    """
    from evit_deploy.recipe.shipped import shipped_recipes

    found = shipped_recipes()
    if output.as_json:
        output.result(found)
        return
    from evit_deploy.report.tables import text_table

    cells = [(recipe.name, recipe.description) for recipe in found]
    output.table(
        lambda console: console.print(
            text_table(("recipe", "what it does"), cells, console.width), markup=False, highlight=False
        )
    )
    output.suggest(("recipes", "show", "digits"), ("run", "digits"))


@command.command("show", cls=Command, short_help="Print one.")
@click.argument("name", type=RecipeName())
@output_options
def show(name: str, output: Output) -> None:
    """Print the file of the recipe NAME.

    \b
    evit-deploy recipes show digits
    evit-deploy recipes show paper/deit-small-0.7
    """
    from evit_deploy.recipe.shipped import shipped_recipe

    recipe = shipped_recipe(name)
    text = Path(recipe.path).read_text(encoding="utf-8")
    document = {"name": recipe.name, "path": recipe.path, "text": text}
    output.result(document if output.as_json else None, text.rstrip("\n"))
    output.suggest(("recipes", "copy", recipe.name))


@command.command("copy", cls=Command, short_help="Copy one, to change it.")
@click.argument("name", type=RecipeName())
@click.argument("destination", type=PATH, required=False)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@output_options
def copy(name: str, destination: Path | None, force: bool, output: Output) -> None:
    """Copy the recipe NAME to DESTINATION, a file or a folder.  [default: NAME.yaml here]

    \b
    evit-deploy recipes copy finetune
    evit-deploy recipes copy digits mine.yaml
    """
    from evit_deploy.recipe.shipped import copy_recipe

    place = copy_recipe(name, destination, force=force)
    output.result({"path": str(place)} if output.as_json else None, printable(place))
    output.suggest(("run", place))
