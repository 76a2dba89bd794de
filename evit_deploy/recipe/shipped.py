"""The recipes that come with the package, by name: ``digits``, ``paper/deit-small-0.7``."""

import os
import re
from pathlib import Path

import msgspec

from evit_deploy.errors import InputError, did_you_mean
from evit_deploy.files import write_atomically

_LONG = 140
"""Maximum characters of a description."""


class ShippedRecipe(msgspec.Struct, frozen=True):
    """A recipe that comes with the package.

    Args:
        name: Its name, such as ``digits`` or ``paper/deit-small-0.7``.
        path: Its file.
        description: First sentence of the comment at its top.
    """

    name: str
    path: str
    description: str


def folder() -> Path:
    """Returns the folder of the recipes: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).parents[1]
    return next((f for f in (package / "recipes", package.parent / "recipes") if f.is_dir()), package)


def names() -> list[str]:
    """Returns all names, with those of the paper's tables last."""
    found = [path.relative_to(folder()).as_posix()[:-5] for path in folder().rglob("*.yaml")]
    return sorted(found, key=lambda name: ("/" in name, name))


def find(path: Path) -> Path | None:
    """Finds a recipe that comes with the package.

    Args:
        path: Its name, with or without ``recipes/``, ``paper/`` and ``.yaml``: messages and documentation use the
            paths of a checkout.

    Returns:
        The file, or ``None`` if no recipe has this name.
    """
    wanted = path.as_posix().removeprefix("recipes/").removesuffix(".yaml")
    known = names()
    fitting = [wanted] if wanted in known else [name for name in known if name.rpartition("/")[2] == wanted]
    return folder() / f"{fitting[0]}.yaml" if len(fitting) == 1 else None


def nearest(path: Path) -> str | None:
    """Returns "Did you mean ...?" with the most similar name, or ``None``."""
    return did_you_mean(path.as_posix().removeprefix("recipes/").removesuffix(".yaml"), names())


def shipped_recipes() -> list[ShippedRecipe]:
    """Returns all recipes that come with the package."""
    return [_described(name) for name in names()]


def shipped_recipe(name: str) -> ShippedRecipe:
    """Returns the recipe of this name.

    Args:
        name: See :func:`find`.

    Raises:
        InputError: No recipe has this name.
    """
    found = find(Path(name))
    if found is None:
        fix = f"{nearest(Path(name)) or ''} evit-deploy recipes list names them all.".strip()
        raise InputError("no recipe of this name came with the package", seen=name, fix=fix)
    return _described(found.relative_to(folder()).as_posix()[:-5])


def copy_recipe(name: str, place: Path | None = None, *, force: bool = False) -> Path:
    """Copies a recipe for editing.

    Args:
        name: See :func:`find`.
        place: The file to write, or a folder for it. Default: ``<name>.yaml`` in the current directory.
        force: Whether to replace an existing file.

    Returns:
        The file.

    Raises:
        InputError: No recipe has this name, the folder does not exist, or a file is in the way.
    """
    recipe = shipped_recipe(name)
    source = Path(recipe.path)
    target = Path(source.name) if place is None else place
    if target.is_dir():
        target /= source.name
    if target.suffix not in (".yaml", ".yml"):
        raise InputError("a recipe is a YAML file", where=target, wanted="a name that ends in .yaml, or a folder")
    if not target.parent.is_dir():
        raise InputError("no such folder", where=target.parent, fix="Make it first.")
    if os.path.lexists(target) and not (force and target.is_file()):
        fix = "Give another name, or --force." if target.is_file() else "Give another name."
        raise InputError("a file exists there already", where=target, fix=fix)
    try:
        write_atomically(target, source.read_bytes())
    except OSError as error:
        raise InputError(f"this cannot be written: {error.strerror}", where=target) from None
    return target


def _described(name: str) -> ShippedRecipe:
    path = folder() / f"{name}.yaml"
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        comment.append(line.removeprefix("# ").strip())
    sentence = re.split(r"(?<=\.)\s", " ".join(comment), maxsplit=1)[0]
    if len(sentence) > _LONG:
        sentence = sentence.partition(": ")[0]
    return ShippedRecipe(name, str(path), f"{sentence.rstrip('.:')}.")
