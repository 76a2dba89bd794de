"""Reading recipe files: YAML, ``extends``, overrides, and errors that name the file, the key and the value.

Works for any struct; those of recipes are in :mod:`evit_deploy.recipe.recipe`.
"""

import math
import os
import re
import textwrap
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from evit_deploy.documents import Limits, check_tree, read_bytes
from evit_deploy.errors import RecipeError, did_you_mean
from evit_deploy.recipe import shipped
from evit_deploy.recipe.fields import choices_in, field_docs, struct_in

_Kind = typing.TypeVar("_Kind", bound=msgspec.Struct)

LIMITS = Limits(size=256 << 10, depth=16, items=10_000)
"""Limits of a recipe and of each override; the longest recipe of the package has 4 KB, 4 levels and 90 items."""
_CHAIN = 8
"""Maximum number of recipes in a chain of ``extends``."""


def load(path: str | Path, overrides: Sequence[str], kind: type[_Kind]) -> _Kind:
    """Reads a file, applies overrides and checks the result.

    Args:
        path: A YAML file, or the name of a recipe that comes with the package.
        overrides: ``section.key=value`` each, applied in order; values are parsed as YAML. An override of one of two
            alternative keys, such as ``steps`` and ``epochs``, removes the other from the file's values.
        kind: The struct that the file describes.

    Raises:
        RecipeError: The file cannot be read, or it or an override is invalid.
    """
    path = _shipped(Path(path))
    document = _read_yaml(path, kind)
    asked: set[str] = set()
    for override in overrides:
        _override(document, override, kind, asked)
    check_tree(document, path, LIMITS, RecipeError)
    _check_keys(document, kind, "", path)
    _read_none(document, kind)
    try:
        return msgspec.convert(document, kind, strict=False)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), document, kind, path) from None


def _refusal(text: str, document: dict[str, Any], kind: type[msgspec.Struct], path: Path) -> RecipeError:
    """Adds the value and the field's documentation to msgspec's error."""
    what, _, place = text.partition(" - at `$")
    place = place.rstrip("`").lstrip(".")
    where = f"{path}: {place}" if place else path
    if not what.startswith(("Expected ", "Invalid ")):  # an error that a section raised itself, already complete
        return RecipeError(what, where=where)
    value, purpose, choices = _at(place, document, kind)
    if choices:
        wanted = "one of " + ", ".join(choices)
        fix = did_you_mean(str(value).strip("'"), choices) or purpose
        return RecipeError("this value does not fit", where=where, seen=value, wanted=wanted, fix=fix)
    if what.startswith("Invalid "):  # msgspec's message contains the value
        return RecipeError(what, where=where, fix=purpose)
    wanted, _, got = what.removeprefix("Expected ").partition(", got ")
    return RecipeError("this value does not fit", where=where, seen=value or got or None, wanted=wanted, fix=purpose)


def _at(
    place: str, document: dict[str, Any], kind: type[msgspec.Struct]
) -> tuple[str | None, str | None, tuple[str, ...]]:
    """Returns the value at a place like ``convert.batches[0]``, and the documentation and choices of its field."""
    value: Any = document
    struct: type[msgspec.Struct] | None = kind
    known: str | None = None
    choices: tuple[str, ...] = ()
    name = ""
    for step in re.findall(r"[^.\[\]]+|\.{3}", place):
        if step == "...":  # some key of a mapping; msgspec does not report which
            return None, known, choices
        value = value[int(step) if isinstance(value, list) else step]
        if struct is not None:
            name += ("." if name else "") + step
            text = field_docs(struct).get(step)
            known = f"{name}: {text.replace('``', chr(39))}" if text else known
            kinds = {field.name: field.type for field in msgspec.structs.fields(struct)}
            choices, struct = choices_in(kinds[step]), struct_in(kinds[step])
    return textwrap.shorten(repr(value), 60, placeholder=" ..."), known, choices


def _read_none(document: dict[str, Any], kind: type[msgspec.Struct]) -> None:
    """Replaces null and false with ``none`` where that is a choice, so that ``null``, ``no`` and ``off`` work too."""
    for field in msgspec.structs.fields(kind):
        value = document.get(field.name, "absent")
        if (value is None or value is False) and "none" in choices_in(field.type):
            document[field.name] = "none"
        inner = struct_in(field.type)
        if inner is not None and isinstance(value, dict):
            _read_none(value, inner)


def read_document(path: Path) -> dict[str, Any]:
    """Reads a recipe file without checking its keys and values.

    Args:
        path: See :func:`load`.

    Raises:
        RecipeError: The file cannot be read.
    """
    return _read_yaml(_shipped(path), None)


class _Loader(yaml.SafeLoader):
    """A ``SafeLoader`` with limits that accepts only text, numbers, booleans, null, lists and mappings.

    It refuses duplicate keys, of which PyYAML silently drops all but the last, and keys that are not text.
    """

    _nodes = _level = 0

    def get_single_node(self) -> yaml.Node | None:
        """Returns the document's tree, after checking its size with every alias and merge expanded."""
        root = super().get_single_node()
        count, depth, level = 0, 0, [root] if root is not None else []
        while level:
            count, depth, inside = count + len(level), depth + 1, []
            if depth > LIMITS.depth + 1:
                raise _refused(root, f"nested too deeply (expected at most {LIMITS.depth} levels)")
            for node in level:
                if isinstance(node, yaml.CollectionNode):
                    for part in node.value:
                        inside += part if isinstance(part, tuple) else (part,)
                if count + len(inside) > LIMITS.items:
                    raise _refused(root, f"too many parts (expected at most {LIMITS.items:,}, aliases written out)")
            level = inside
        return root

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Composes a node; stops as soon as the document is too long or too deep."""
        mark = self.peek_event().start_mark
        self._nodes, self._level = self._nodes + 1, self._level + 1
        if self._nodes > LIMITS.items:
            raise yaml.constructor.ConstructorError(
                None, None, f"too many parts (expected at most {LIMITS.items:,})", mark
            )
        if self._level > LIMITS.depth + 1:
            text = f"nested too deeply (expected at most {LIMITS.depth} levels)"
            raise yaml.constructor.ConstructorError(None, None, text, mark)
        node = super().compose_node(parent, index)
        self._level -= 1
        if node is not None and node.tag not in _TAGS:
            raise _refused(node, f"not a kind of value that a recipe has: {node.tag!r}")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Constructs a mapping, after checking that each key is text and occurs once."""
        seen = set()
        for key, _ in node.value:
            if key.tag not in (_TEXT, _MERGE):
                raise _refused(key, f"a key has to be text: put {_shown(key)} in quotes")
            if key.value in seen:
                raise _refused(node, f"the key {key.value!r} stands here twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def number(self, node: yaml.ScalarNode) -> int | float:
        """Constructs a finite float or an integer of at most 64 bits."""
        if len(node.value) > _DIGITS:  # the time that Python needs for the conversion grows quadratically
            raise _refused(node, f"a number of {len(node.value):,} digits")
        whole = node.tag.endswith(":int")
        try:
            value = self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
        except ValueError:  # such as `!!int cat`
            raise _refused(node, f"not a number: {node.value!r}") from None
        if not math.isfinite(value) if not whole else not -(2**63) <= value < 2**64:
            raise _refused(node, f"the number {node.value} is out of range")
        return value


_PREFIX = "tag:yaml.org,2002:"
_TEXT, _MERGE = f"{_PREFIX}str", f"{_PREFIX}merge"
_TAGS = {_TEXT, _MERGE, *(_PREFIX + kind for kind in ("int", "float", "bool", "null", "seq", "map"))}
_DIGITS = 100
for _tag in ("int", "float"):
    _Loader.add_constructor(_PREFIX + _tag, _Loader.number)
_Loader.yaml_implicit_resolvers = {  # read dates as text: `name: 2026-11-27`
    first: [pair for pair in pairs if not pair[0].endswith((":timestamp", ":value"))]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _refused(node: yaml.Node | None, problem: str) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, None if node is None else node.start_mark)


def _shown(node: yaml.Node) -> str:
    return repr(node.value) if isinstance(node, yaml.ScalarNode) else "a list or a mapping"


def _parse(text: str, where: object) -> Any:
    """Parses YAML.

    Raises:
        RecipeError: The text is not valid, or exceeds :data:`LIMITS`.
    """
    if len(text) > LIMITS.size:
        raise RecipeError("too long", where=where, seen=f"{len(text):,} letters", wanted=f"at most {LIMITS.size:,}")
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain values only
    except yaml.MarkedYAMLError as error:  # PyYAML's own message spans several lines and quotes the file
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise RecipeError(f"this is not valid YAML{place}: {error.problem or error.context}", where=where) from None
    except yaml.reader.ReaderError as error:
        code = f"U+{error.character:04X}"
        raise RecipeError(f"not valid YAML: the character {code} at {error.position}", where=where) from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"this is not valid YAML: {error}", where=where) from None


def _shipped(path: Path) -> Path:
    """Finds a recipe that is named as in a checkout, as messages and documentation do, in an installed package."""
    return path if os.path.lexists(path) else shipped.find(path) or path


def _read_yaml(path: Path, kind: type[msgspec.Struct] | None, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Reads a file and merges it, section by section, into the file that it ``extends``.

    Args:
        path: The file.
        kind: The struct that the file describes.
        below: The chain of files that extend it, starting with the requested recipe.
    """
    document = _read_one(path)
    if "extends" not in document:
        return document
    name = document.pop("extends")
    if not isinstance(name, str):
        raise RecipeError("extends is the path of a recipe", where=path, seen=repr(name), wanted="extends: other.yaml")
    below = (*below, path)
    base = path.parent / name
    base = base if os.path.lexists(base) else shipped.find(Path(name)) or base
    real = Path(os.path.realpath(base))
    trees = [Path(os.path.realpath(folder)) for folder in (below[0].parent, shipped.folder())]
    if not any(real.is_relative_to(tree) for tree in trees):
        raise RecipeError(
            "a recipe can only extend recipes in its folder or in the package", where=path, seen=name,
            fix="Put it next to the recipe.",
        )  # fmt: skip
    if any(real == Path(os.path.realpath(other)) for other in below):
        raise RecipeError("recipes extend each other in a circle", where=path, seen=name)
    if len(below) >= _CHAIN:
        raise RecipeError("too many recipes extend each other", where=path, wanted=f"at most {_CHAIN}")
    return _laid_over(_read_yaml(base, kind, below), document, kind)


def _laid_over(base: dict[str, Any], changes: dict[str, Any], kind: type[msgspec.Struct] | None) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        if value is not None:
            for other in _alternatives(kind, key):  # both in one file stay, and the struct refuses them
                if other not in changes:
                    merged.pop(other, None)
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            value = _laid_over(merged[key], value, _section(kind, key))
        merged[key] = value
    return merged


def _section(kind: type[msgspec.Struct] | None, key: str) -> type[msgspec.Struct] | None:
    """The struct type of a field, if it is one."""
    kinds = {} if kind is None else {field.name: field.type for field in msgspec.structs.fields(kind)}
    return struct_in(kinds[key]) if key in kinds else None


def _alternatives(kind: type[msgspec.Struct] | None, key: str) -> tuple[str, ...]:
    """The keys that exclude this one, by the struct's ``alternatives``."""
    groups: tuple[tuple[str, ...], ...] = getattr(kind, "alternatives", ())
    return tuple(other for group in groups if key in group for other in group if other != key)


def _read_one(path: Path) -> dict[str, Any]:
    if not os.path.exists(path):
        near = shipped.nearest(path) or "Give the path of a YAML file, or the name of a recipe."
        fix = f"{near} evit-deploy recipes list names those that come with it."
        raise RecipeError("no such recipe", where=path, fix=fix)
    try:
        text = read_bytes(path, LIMITS, RecipeError).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"the recipe cannot be read: not UTF-8 text at byte {error.start}", where=path) from None
    document = _parse(text, path)
    if document is None:
        raise RecipeError("the recipe is empty", where=path)
    if not isinstance(document, dict):
        raise RecipeError("a recipe is a mapping", where=path, seen=type(document).__name__, wanted="'name: ...' lines")
    return document


def _override(document: dict[str, Any], override: str, kind: type[msgspec.Struct], asked: set[str]) -> None:
    """Applies one override. ``asked`` holds the keys of earlier overrides, which an alternative does not remove."""
    key, equals, text = override.partition("=")
    steps = [step.strip() for step in key.split(".")]
    if not equals or not all(steps):
        raise RecipeError("not an override", where="--set", seen=repr(override), wanted="section.key=value")
    if len(steps) > LIMITS.depth:
        what = "a key of too many parts"
        raise RecipeError(what, where="--set", seen=f"{len(steps):,} of them", wanted=f"at most {LIMITS.depth}")
    value = _parse(text, f"--set {key}")
    for i, step in enumerate(steps[:-1]):
        if document.get(step) is None:  # create a section that is absent or null
            document[step] = {}
        document = document[step]
        if not isinstance(document, dict):
            raise RecipeError(f"{'.'.join(steps[: i + 1])} has no keys", where="--set", seen=repr(override))
    struct: type[msgspec.Struct] | None = kind
    for step in steps[:-1]:
        struct = _section(struct, step)
    document[steps[-1]] = value
    for other in _alternatives(struct, steps[-1]) if value is not None else ():
        if ".".join((*steps[:-1], other)) not in asked:
            document.pop(other, None)
    place = ".".join(steps)
    asked |= {place, *(f"{place}.{inner}" for inner in (value if isinstance(value, dict) else ()))}


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
        inner = struct_in(known[key])
        if inner is not None and isinstance(value, Mapping):
            _check_keys(value, inner, f"{place}{key}.", path)
