"""Documentation, types and limits of a struct's fields. The string below a field is its documentation."""

import ast
import functools
import itertools
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

import msgspec

from evit_deploy.errors import InputError

_UNIONS = (types.UnionType, typing.Union)


@functools.cache
def field_docs(struct: type[msgspec.Struct]) -> dict[str, str]:
    """Returns the documentation of a struct's fields, inherited ones included: field -> text on one line."""
    if struct is msgspec.Struct:
        return {}
    docs = dict(field_docs(typing.cast(type[msgspec.Struct], struct.__base__)))
    body = _classes(sys.modules[struct.__module__].__file__ or "")[struct.__name__].body
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            docs[field.target.id] = " ".join(str(typing.cast(ast.Constant, below.value).value).split())
    return docs


@functools.cache
def _classes(file: str) -> dict[str, ast.ClassDef]:
    """Returns the classes of a source file; parsing it once is faster than calling ``inspect`` for each class."""
    with open(file, encoding="utf-8") as source:
        return {node.name: node for node in ast.parse(source.read()).body if isinstance(node, ast.ClassDef)}


def struct_in(annotation: Any) -> type[msgspec.Struct] | None:
    """Returns the struct that an annotation allows, if any."""
    options = typing.get_args(annotation) if typing.get_origin(annotation) in _UNIONS else (annotation,)
    return next((t for t in options if isinstance(t, type) and issubclass(t, msgspec.Struct)), None)


def choices_in(annotation: Any) -> tuple[str, ...]:
    """Returns the values that a ``Literal`` in an annotation allows; empty without one."""
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)
    parts = typing.get_args(annotation) if typing.get_origin(annotation) in _UNIONS else ()
    return next((choices for part in parts if (choices := choices_in(part))), ())


def structs_in(struct: type[msgspec.Struct]) -> Iterator[type[msgspec.Struct]]:
    """Yields a struct and, recursively, the structs of its fields."""
    yield struct
    for field in msgspec.structs.fields(struct):
        inner = struct_in(field.type)
        if inner is not None:
            yield from structs_in(inner)


def own_fields(struct: type[msgspec.Struct], *, inherited: bool = False) -> dict[str, Any]:
    """Returns a struct's fields with their annotations; with ``inherited``, those of its bases too."""
    base = typing.cast(type[msgspec.Struct], struct.__base__)
    below = () if inherited or base is msgspec.Struct else base.__struct_fields__
    return {field.name: field.type for field in msgspec.structs.fields(struct) if field.name not in below}


def plain(annotation: Any) -> tuple[type, bool]:
    """Returns the simple type of an annotation (``int`` for ``int | None``), and whether it is a tuple of these."""
    if typing.get_origin(annotation) is typing.Annotated:
        return plain(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in _UNIONS:
        return plain(next(part for part in typing.get_args(annotation) if part is not types.NoneType))
    if typing.get_origin(annotation) is tuple:
        return plain(typing.get_args(annotation)[0])[0], True
    return annotation, False


@functools.cache
def numeric_fields(struct: type[msgspec.Struct]) -> dict[str, Any]:
    """Returns the fields that hold numbers, also in tuples and mappings, with their annotations."""
    return {field.name: field.type for field in msgspec.structs.fields(struct) if _numeric(field.type)}


def _numeric(annotation: Any) -> bool:
    if typing.get_origin(annotation) is typing.Literal:
        return False
    parts = typing.get_args(annotation)
    return any(map(_numeric, parts)) if parts else annotation in (int, float)


def check_numbers(struct: msgspec.Struct) -> None:
    """Checks that numbers are within their fields' limits, which msgspec does not do for structs created in Python.

    Raises:
        InputError: A number has another type or is out of its limits.
    """
    for field, annotation in numeric_fields(type(struct)).items():
        value = getattr(struct, field)
        try:
            msgspec.convert(value, annotation)
        except msgspec.ValidationError as error:
            what = str(error).partition(" - at `")[0]
            wanted = what.removeprefix("Expected ").partition(", got ")[0].replace("`", "")
            seen = textwrap.shorten(_written(value), 60, placeholder=" ...")
            raise InputError("this number does not fit", where=field, seen=seen, wanted=wanted) from None


def _written(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return "a number of thousands of digits"


def limits_in(annotation: Any) -> tuple[int | None, int | None]:
    """Returns the smallest and the largest value that an annotation allows; ``None`` where it has no limit."""
    metas = [part for part in typing.get_args(annotation) if isinstance(part, msgspec.Meta)]
    low = next((meta.ge for meta in metas if meta.ge is not None), None)
    high = next((meta.le for meta in metas if meta.le is not None), None)
    if low is not None or high is not None:
        return typing.cast(int | None, low), typing.cast(int | None, high)
    inner = [limits_in(part) for part in typing.get_args(annotation) if typing.get_args(part)]
    return next((limits for limits in inner if limits != (None, None)), (None, None))
