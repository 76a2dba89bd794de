"""``evit-deploy run``."""

from pathlib import Path

import click

from evit_deploy.cli.options import Command, check_resume, recipe_options
from evit_deploy.cli.output import Output, output_options, uses_of
from evit_deploy.cli.types import PATH
from evit_deploy.report.lines import printable


@click.command("run", cls=Command, short_help="Train, export, verify and profile a recipe.")
@click.argument("recipe", type=PATH)
@recipe_options
@output_options
def command(
    recipe: Path, overrides: tuple[str, ...], out: Path | None, force: bool, resume: bool, output: Output
) -> None:
    """Train, export, verify and profile the model of RECIPE; stages that are up to date are skipped.

    RECIPE can also be a sweep (recipes/a100.yaml) or a comparison (recipes/compare.yaml), which train nothing.

    \b
    evit-deploy run recipes/digits.yaml
    """
    check_resume(force, resume)
    from evit_deploy.recipe.recipe import is_comparison, is_sweep, load_comparison, load_recipe, load_sweep
    from evit_deploy.report.verdict import verdict

    if resume and (is_comparison(recipe) or is_sweep(recipe)):
        raise click.UsageError("--resume continues a training, and this recipe trains nothing: leave it out")
    if is_comparison(recipe):
        from evit_deploy.pipeline.contenders import compare_recipe

        comparison = load_comparison(recipe, overrides)
        folder = out or Path("runs") / comparison.name
        report = compare_recipe(comparison, folder, force=force)
        output.result(report, f"\n{printable(folder)}", verdict=verdict(report))
        return
    if is_sweep(recipe):
        from evit_deploy.profiling.sweep import sweep

        output.result(sweep(load_sweep(recipe, overrides)))
        return
    loaded = load_recipe(recipe, overrides)
    from evit_deploy.pipeline.run import run

    folder = out or Path("runs") / loaded.name
    bundle, report = run(loaded, folder, force=force, resume=resume)
    first, last = f"{bundle.manifest.plan}\n", f"\n{printable(bundle.path)}"
    more = {"bundle": str(bundle.path), "plan": bundle.manifest.plan}
    output.result(report, last, first=first, verdict=verdict(report), **more)
    output.suggest(*uses_of(bundle.path, reduced=bool(bundle.manifest.plan.locations)))
