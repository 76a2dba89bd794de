"""Numbers out of range: refused by every struct of options, recipe key and flag, with exit code 2."""

import importlib
import math
import typing
from collections.abc import Iterator
from typing import Any

import click
import msgspec
import pytest

from evit_deploy.cli import COMMANDS
from evit_deploy.cli import cli as group
from evit_deploy.cli import invoke as run
from evit_deploy.cli.types import BatchRange, Numbers, Positive, Whole
from evit_deploy.errors import InputError
from evit_deploy.recipe.fields import check_numbers, numeric_fields
from evit_deploy.recipe.sections import Section
from evit_deploy.tokens.plan import TokenSpec

NUMBERS = (-1, 0, -0.0, 10**18, 10**400, -(10**400), 10**5_000, math.nan, math.inf, -math.inf, 1e308, True)
TEXTS = ("-1", "nan", "inf", "-inf", "1e999", str(10**18), "1" + "0" * 400, "1" * 5_000, "one", "")


def structs(base: type[msgspec.Struct] = Section) -> Iterator[type[msgspec.Struct]]:
    for home in ("evit_deploy.recipe.recipe", "evit_deploy.serving.options"):
        importlib.import_module(home)
    for struct in base.__subclasses__():
        yield struct
        yield from structs(struct)


FIELDS = [(struct, field) for struct in dict.fromkeys(structs()) for field in numeric_fields(struct)]


def leaves(annotation: Any, metas: tuple[msgspec.Meta, ...] = ()) -> Iterator[tuple[Any, tuple[msgspec.Meta, ...]]]:
    """The numbers in an annotation, each with its limits."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *more = typing.get_args(annotation)
        yield from leaves(inner, tuple(more))
    elif typing.get_args(annotation):
        for part in typing.get_args(annotation):
            yield from leaves(part)
    elif annotation in (int, float):
        yield annotation, metas


def shaped(annotation: Any, number: Any) -> Any:
    """A value of the annotation with the number everywhere."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return shaped(parts[0], number)
    if origin is tuple:
        several = [part for part in parts if part is not ...]
        return tuple(shaped(part, number) for part in several)
    if origin is dict:
        return {"key": shaped(parts[1], number)}
    if parts:  # a union
        return shaped(next(part for part in parts if part is not type(None)), number)
    return number


def test_there_are_many_fields():
    names = {(struct.__name__, field) for struct, field in FIELDS}
    assert {("ConvertOptions", "workspace"), ("TritonOptions", "instances"), ("TrainSection", "betas"),
            ("BuildOptions", "batches"), ("Sweep", "published"), ("PreprocessOptions", "mean")} <= names  # fmt: skip
    assert len(names) > 90


@pytest.mark.parametrize(("struct", "field"), FIELDS, ids=lambda part: getattr(part, "__name__", part))
def test_a_number_out_of_range_is_refused_wherever_it_comes_from(struct, field):
    annotation = numeric_fields(struct)[field]
    for kind, metas in leaves(annotation):
        lows = [end for meta in metas for end in (meta.ge, meta.gt) if end is not None]
        highs = [end for meta in metas for end in (meta.le, meta.lt) if end is not None]
        assert lows, f"{struct.__name__}.{field} has no least value"
        assert highs, f"{struct.__name__}.{field} has no largest value"
        assert all(math.isfinite(end) for end in (*lows, *highs))
        fits = [
            number for number in NUMBERS
            if not isinstance(number, bool) and (kind is float or isinstance(number, int))
            and all(number >= (meta.ge if meta.ge is not None else -math.inf) for meta in metas)
            and all(number > (meta.gt if meta.gt is not None else -math.inf) for meta in metas)
            and all(number <= (meta.le if meta.le is not None else math.inf) for meta in metas)
            and all(number < (meta.lt if meta.lt is not None else math.inf) for meta in metas)
        ]  # fmt: skip
        refused = [number for number in NUMBERS if not any(number is one for one in fits)]
        assert len(refused) >= 8
        for number in refused:
            if number == 0 and kind is int and 0 in fits:
                continue  # -0.0 is a whole number to msgspec
            value = shaped(annotation, number)
            with pytest.raises(InputError, match=rf"{field}: this number does not fit .*expected") as caught:
                _made(struct, field, value)  # an argument in Python
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 200
            with pytest.raises(msgspec.ValidationError):  # a key of a recipe
                msgspec.convert(value, annotation, strict=False)


def _made(struct: type[msgspec.Struct], field: str, value: Any) -> None:
    """Makes the struct with one field, and others only where it cannot do without."""
    needed = {
        each.name: None for each in msgspec.structs.fields(struct)
        if each.required and each.name != field
    }  # fmt: skip
    if needed:  # what they would have to be does not matter here
        empty = msgspec.defstruct("Empty", [(field, numeric_fields(struct)[field])], module=struct.__module__)
        check_numbers(empty(value))
    else:
        struct(**{field: value})


def test_token_specs_have_limits():
    for number in (-1, 10**18, 10**400, math.nan, math.inf, 1e308, True, -0.0):
        with pytest.raises(InputError):
            TokenSpec(keep_rate=0.7, locations=(number,))  # type: ignore[arg-type]
        if number is not True:
            with pytest.raises(InputError):
                TokenSpec(keep_rate=number)
            with pytest.raises(InputError):
                TokenSpec(keep_rate=(0.7, number), locations=(1, 2))


def flags() -> Iterator[tuple[str, str, click.Parameter]]:
    context = click.Context(group)
    for name in COMMANDS:
        command = group.get_command(context, name)
        assert command is not None
        for param in command.params:
            if isinstance(param.type, Numbers | Whole | Positive | BatchRange):
                yield name, param.opts[0], param
            assert not isinstance(param.type, click.types.IntParamType | click.types.FloatParamType) or isinstance(
                param.type, Whole
            ), f"{name} {param.opts[0]} has no limits"


FLAGS = list(flags())
METHODS = ("--keep-rate", "--keep-rates", "--locations", "--merge")
"""Flags whose limits are the method's, which names the option instead."""
ARGUMENTS = {
    "convert": ["absent.pth"],
    "predict": ["absent", "image.png"],
    "package": ["absent", "--for", "triton"],
    "show": ["absent", "image.png"],
}


@pytest.mark.parametrize(("name", "flag", "param"), FLAGS, ids=lambda part: part if isinstance(part, str) else "")
def test_a_flag_refuses_what_is_no_number_or_out_of_range(capsys, monkeypatch, name, flag, param):
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the test's process keeps its own
    for text in TEXTS:
        if flag == "--mean" and text == "-1":
            continue
        code = run([name, f"{flag}={text}", *ARGUMENTS.get(name, ["absent"])])
        said = capsys.readouterr().err
        assert code == 2
        assert "Traceback" not in said
        assert said.splitlines()[-1].startswith("evit-deploy: ")
        if flag not in METHODS:
            assert flag in said.splitlines()[-1]
