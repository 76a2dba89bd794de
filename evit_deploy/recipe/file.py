"""Recipe files: YAML, overrides, and structs that refuse what they do not know with the place it stands at.

What a recipe holds is in :mod:`evit_deploy.recipe.recipe`; nothing here knows of it.
"""

import ast
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from evit_deploy.errors import RecipeError, did_you_mean

_Kind = typing.TypeVar("_Kind", bound=msgspec.Struct)


def load(path: str | Path, overrides: Sequence[str], kind: type[_Kind]) -> _Kind:
    """Reads a file, overrides what is asked, and checks it all.

    Args:
        path: A YAML file, or the name of a recipe that came with the package.
        overrides: ``section.key=value`` each, applied in order; values are read as YAML.
        kind: The struct that the file holds.

    Raises:
        RecipeError: The file cannot be read, or it or an override asks for something impossible.
    """
    path = _shipped(Path(path))
    document = _read_yaml(path)
    for override in overrides:
        _override(document, override)
    _check_keys(document, kind, "", path)
    try:
        return msgspec.convert(document, kind, strict=False)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), document, kind, path) from None


def _refusal(text: str, document: dict[str, Any], kind: type[msgspec.Struct], path: Path) -> RecipeError:
    """msgspec's complaint, with the value it is about and what the field is for."""
    what, _, place = text.partition(" - at `$")
    place = place.rstrip("`").lstrip(".")
    where = f"{path}: {place}" if place else path
    if not what.startswith(("Expected ", "Invalid ")):  # a section's own words, which say all
        return RecipeError(what, where=where)
    value, purpose = _at(place, document, kind)
    if what.startswith("Invalid "):  # it has the value in it
        return RecipeError(what, where=where, fix=purpose)
    wanted, _, got = what.removeprefix("Expected ").partition(", got ")
    return RecipeError("this value does not fit", where=where, seen=value or got or None, wanted=wanted, fix=purpose)


def _at(place: str, document: dict[str, Any], kind: type[msgspec.Struct]) -> tuple[str | None, str | None]:
    """The value at a place like ``convert.batches[0]``, and what is written below the innermost field on the way."""
    value: Any = document
    struct: type[msgspec.Struct] | None = kind
    known: str | None = None
    name = ""
    for step in re.findall(r"[^.\[\]]+|\.{3}", place):
        if step == "...":  # some key of a mapping: which one is not told
            return None, known
        value = value[int(step) if isinstance(value, list) else step]
        if struct is not None:
            name += ("." if name else "") + step
            text = field_docs(struct).get(step)
            known = f"{name}: {text.replace('``', chr(39))}" if text else known
            struct = _struct_in({field.name: field.type for field in msgspec.structs.fields(struct)}[step])
    return textwrap.shorten(repr(value), 60, placeholder=" ..."), known


def read_document(path: Path) -> dict[str, Any]:
    """What stands in a recipe file, unchecked.

    Args:
        path: See :func:`load`.

    Raises:
        RecipeError: The file cannot be read.
    """
    return _read_yaml(_shipped(path))


def field_docs(struct: type[msgspec.Struct]) -> dict[str, str]:
    """What is written below the fields of a section: field -> text on one line."""
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(struct))).body[0]).body
    docs = {}
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            docs[field.target.id] = " ".join(str(typing.cast(ast.Constant, below.value).value).split())
    return docs


class _Loader(yaml.SafeLoader):
    """``yaml.safe_load`` that refuses a key written twice, of which YAML would silently drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands here twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _shipped(path: Path) -> Path:
    """Where an installed package keeps its recipes: the messages and pages name them as in a checkout."""
    folders = (Path(), Path("recipes"), Path("paper"), Path("recipes/paper"))
    if path.exists() or path.parent not in folders or path.suffix not in ("", ".yaml"):
        return path
    package = Path(__file__).parents[1]
    folder = next((f for f in (package / "recipes", package.parent / "recipes") if f.is_dir()), package)
    found = folder / ("paper" if path.parent.name == "paper" else "") / f"{path.stem}.yaml"
    return found if found.is_file() else path


def _read_yaml(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's mapping, laid over that of the file which it ``extends``, section by section."""
    document = _read_one(path)
    if "extends" not in document:
        return document
    name = document.pop("extends")
    if not isinstance(name, str):
        raise RecipeError("extends is the path of a recipe", where=path, seen=repr(name), wanted="extends: other.yaml")
    base = path.parent / name
    if base.resolve() in below:
        raise RecipeError("recipes extend each other in a circle", where=path, seen=name)
    return _laid_over(_read_yaml(base, (*below, path.resolve())), document)


def _laid_over(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _laid_over(merged[key], value) if both else value
    return merged


def _read_one(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError("no such recipe", where=path, fix="Give the path of a YAML file, or `digits`.") from None
    except IsADirectoryError:
        raise RecipeError("this is a folder", where=path, wanted="a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe cannot be read: {error}", where=path) from None
    try:
        document = yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain values only
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"this is not valid YAML: {error}", where=path) from None
    if document is None:
        raise RecipeError("the recipe is empty", where=path)
    if not isinstance(document, dict):
        raise RecipeError("a recipe is a mapping", where=path, seen=type(document).__name__, wanted="'name: ...' lines")
    return document


def _override(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    steps = [step.strip() for step in key.split(".")]
    if not equals or not all(steps):
        raise RecipeError("not an override", where="--set", seen=repr(override), wanted="section.key=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"the value is not valid YAML: {error}", where=f"--set {key}") from None
    for i, step in enumerate(steps[:-1]):
        if document.get(step) is None:  # a section that is absent or null is begun by its first key
            document[step] = {}
        document = document[step]
        if not isinstance(document, dict):
            raise RecipeError(f"{'.'.join(steps[: i + 1])} has no keys", where="--set", seen=repr(override))
    document[steps[-1]] = value


def _check_keys(document: Mapping[Any, Any], struct: type[msgspec.Struct], place: str, path: Path) -> None:
    known = {field.name: field.type for field in msgspec.structs.fields(struct)}
    for key, value in document.items():
        if key not in known:
            raise RecipeError(
                f"unknown key {place + str(key)!r}",
                where=path,
                wanted="one of " + ", ".join(known),
                fix=did_you_mean(key, known, prefix=place),
            )
        inner = _struct_in(known[key])
        if inner is not None and isinstance(value, Mapping):
            _check_keys(value, inner, f"{place}{key}.", path)


def _struct_in(annotation: Any) -> type[msgspec.Struct] | None:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((t for t in options if isinstance(t, type) and issubclass(t, msgspec.Struct)), None)


def structs_in(struct: type[msgspec.Struct]) -> Iterator[type[msgspec.Struct]]:
    """A struct, and all that its fields hold."""
    yield struct
    for field in msgspec.structs.fields(struct):
        inner = _struct_in(field.type)
        if inner is not None:
            yield from structs_in(inner)
