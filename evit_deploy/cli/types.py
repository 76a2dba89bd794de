"""Parameter types of the command line."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click


class _Name(click.Path):
    """A path with a UTF-8 name: the libraries that read weights and models accept no other."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns the path, or fails if its name is not UTF-8."""
        path = super().convert(value, param, ctx)
        try:
            os.fsencode(path).decode()
        except UnicodeDecodeError:
            self.fail(f"got {value}, a name that is not UTF-8: rename the file or the folder", param, ctx)
        return path


PATH = _Name(path_type=Path)
"""Path of a model, a bundle or an output."""
NAME = _Name()
"""A path, or another name such as timm's of a model."""
IMAGES = click.Path(path_type=Path)
"""Path of images; any file name is allowed."""


class Numbers(click.ParamType):
    """Comma-separated numbers, converted to a tuple.

    Args:
        kind: ``int`` or ``float``.
        low: Smallest allowed value, if limited.
        high: Largest allowed value, if limited.
    """

    name = "numbers"

    def __init__(self, kind: type[int] | type[float], low: float | None = None, high: float | None = None) -> None:
        self.kind, self.low, self.high = kind, low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """Converts ``"3,6,9"`` to ``(3, 6, 9)``."""
        if isinstance(value, tuple):
            return value
        wanted = "whole numbers" if self.kind is int else "numbers"
        try:
            numbers = tuple(self.kind(part) for part in str(value).split(","))
        except ValueError:
            percent = ", without a percent sign" if "%" in str(value) else ""
            self.fail(f"got {value!r}, expected {wanted} separated by commas{percent}", param, ctx)
        low, high = self.low, self.high
        fits = (low is None or number >= low for number in numbers)
        if not all(fits) or (high is not None and any(not number <= high for number in numbers)):
            self.fail(f"got {value!r}, expected {wanted} {_ends(low, high)}", param, ctx)
        return numbers


class Whole(click.IntRange):
    """A whole number within limits. Unlike ``click.IntRange`` it does not add the limits to the help text."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Converts ``"8"`` to ``8``."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            text = f"got {value}, expected a whole number {_ends(self.min, self.max)}"
            raise click.BadParameter(text, ctx, param) from None

    def _describe_range(self) -> str:
        return ""


def _ends(low: float | None, high: float | None) -> str:
    return f"from {low:.10g} up" if high is None else f"from {low or 0:.10g} to {high:.10g}"


class Positive(click.ParamType):
    """A finite number above 0. ``click.FloatRange`` would accept ``nan``, since every comparison with it is false.

    Args:
        high: Largest allowed value.
    """

    name = "float"

    def __init__(self, high: float = 1e6) -> None:
        self.high = high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Converts ``"1.5"`` to ``1.5``."""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 < number <= self.high:
            self.fail(f"got {value!r}, expected a number above 0, at most {self.high:.10g}", param, ctx)
        return number


class BatchRange(click.ParamType):
    """``MIN:OPT:MAX``, or one number for a fixed batch."""

    name = "min:opt:max"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Converts ``"1:32:128"`` to ``(1, 32, 128)``."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = [int(part) for part in str(value).split(":")]
        except ValueError:
            numbers = []
        numbers = numbers * 3 if len(numbers) == 1 else numbers
        if len(numbers) != 3 or not 1 <= numbers[0] <= numbers[1] <= numbers[2] <= 65_536:
            self.fail(f"got {value!r}, expected MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX <= 65536", param, ctx)
        return tuple(numbers)


class TargetOption(click.ParamType):
    """``TARGET.OPTION=VALUE``."""

    name = "target.option=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str, str]:
        """Converts ``"coreml.units=all"`` to ``("coreml", "units", "all")``."""
        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        target, _, option = key.partition(".")
        if not (equals and target and option):
            raise click.BadParameter(f"got {value!r}, expected TARGET.OPTION=VALUE", ctx, param)
        return target, option, text


class MethodOption(click.ParamType):
    """``OPTION=VALUE``; the value is read as JSON, or as text if it is not valid JSON."""

    name = "option=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        """Converts ``"squeeze=true"`` to ``("squeeze", True)``."""
        if isinstance(value, tuple):
            return value
        name, equals, text = str(value).partition("=")
        if not (equals and name):
            raise click.BadParameter(f"got {value!r}, expected OPTION=VALUE", ctx, param)
        try:
            return name, json.loads(text)
        except ValueError:
            return name, text


class Choice(click.Choice[str]):
    """One of several values. The error for an unknown value suggests the nearest one; the shell completes them.

    Args:
        choices: The values.
        registry: Name of a registry to take the values from. Names that other packages register are accepted too;
            the help lists only those of this package.
    """

    def __init__(self, choices: Sequence[str] = (), registry: str | None = None) -> None:
        self._registry: Any = None
        if registry is not None:
            from evit_deploy import registry as registries

            self._registry = getattr(registries, registry)
            choices = [name for name in self._registry.own_names() if name not in self._registry.unlisted]
        super().__init__(tuple(choices))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the value if it is one of the choices."""
        known = self._known()
        if value in known or (self._registry is not None and value in self._registry.unlisted):
            return value  # an unlisted name is refused with its reason where it is used
        from evit_deploy.errors import did_you_mean

        hint = did_you_mean(value, known)
        text = f"got {value!r}, expected one of {', '.join(known)}." + (f" {hint}" if hint else "")
        raise click.BadParameter(text, ctx, param)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        """Returns the names that start with the typed text."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(name) for name in self._known() if name.startswith(incomplete)]

    def _known(self) -> list[str]:
        return self._registry.offered() if self._registry is not None else list(self.choices)


class ModelName(click.ParamType):
    """timm's name of an architecture; the shell completes it without importing timm."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the name unchanged; it is checked when the model is built."""
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        """Returns the names that start with the typed text."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(name) for name in model_names() if name.startswith(incomplete)]


class Named(click.ParamType):
    """``NAME=FILE``; the name may contain commas and spaces, the file name an equals sign."""

    name = "name=file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Converts ``"0.7=evit.pth"`` to ``("0.7", "evit.pth")``."""
        if isinstance(value, tuple):
            return value
        name, equals, file = str(value).partition("=")
        if not (equals and name and file):
            raise click.BadParameter(f"got {value!r}, expected NAME=FILE", ctx, param)
        return name, file


class TableNumber(click.ParamType):
    """Number of a table of the EViT paper, completed by the shell."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the number without the word ``table``; it is checked when the table is read."""
        return str(value).lower().removeprefix("table").strip()

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        """Returns the numbers that start with the typed text."""
        from click.shell_completion import CompletionItem

        from evit_deploy.paper.published import paper

        return [CompletionItem(number) for number in paper().tables if number.startswith(incomplete)]


class RecipeName(click.ParamType):
    """Name of a recipe that comes with the package, completed by the shell."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the name unchanged; it is checked when the recipe is read."""
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        """Returns the names that start with the typed text."""
        from click.shell_completion import CompletionItem

        from evit_deploy.recipe.shipped import names

        return [CompletionItem(name) for name in names() if name.startswith(incomplete)]


_FAMILIES = ("vision_transformer", "deit", "levit")
"""timm's modules that define models with reducible tokens."""


def model_names() -> list[str]:
    """Returns the architectures with reducible tokens, read from timm's source because importing timm takes seconds."""
    import importlib.util
    import re

    timm, ours = importlib.util.find_spec("timm"), importlib.util.find_spec("evit_deploy")
    places = [
        Path(folder, "models") for spec in (timm, ours) if spec for folder in spec.submodule_search_locations or ()
    ]
    files = [place / f"{name}.py" for place in places for name in (*_FAMILIES, "lvvit")]
    texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    return sorted(
        {name for text in texts for name in re.findall(r"^@register_model\s+def (\w+)\(", text, re.MULTILINE)}
    )
