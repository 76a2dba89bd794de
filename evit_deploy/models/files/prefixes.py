"""Finds the model in a file: common name prefixes, and a model inside a larger one."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import msgspec
from torch import Tensor

from evit_deploy.errors import CheckpointError, first_few

# Models trained together, and the one that their authors evaluate: the teacher in DINO, iBOT and DINOv2.
_EVALUATED = {"teacher": "student"}


class Inside(msgspec.Struct, frozen=True):
    """A model inside a file.

    Args:
        weights: Every tensor of the file. Names are relative to the model; tensors one level above it begin with
            ``../``, those elsewhere with ``/``.
        prefix: Prefix of the model's names, including the dot; empty if the file is the model.
        notes: Which of several models was chosen.
    """

    weights: dict[str, Tensor]
    prefix: str = ""
    notes: tuple[str, ...] = ()


def without_common(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Removes a prefix that all names share, such as ``module.`` of DDP and ``model.`` of Lightning.

    No layout has a common prefix of its own, so nothing is lost.

    Args:
        weights: Tensors by name.
    """
    found = {str(name): value for name, value in weights.items()}
    while len(found) > 1 and all("." in name for name in found) and len({name.split(".", 1)[0] for name in found}) == 1:
        found = {name.split(".", 1)[1]: value for name, value in found.items()}
    return found


def inside(where: Path, weights: dict[str, Tensor], signs: Collection[Sequence[str]]) -> Inside:
    """Finds the model in a file.

    Args:
        where: The file, for messages.
        weights: Its tensors.
        signs: For every layout, names found in all its files.

    Raises:
        CheckpointError: There are several models, and none takes precedence.
    """
    prefixes = sorted({prefix for sign in signs for prefix in _prefixes(weights, sign)})
    if not prefixes or "" in prefixes:
        return Inside(weights)
    prefix, notes = prefixes[0], ()
    if len(prefixes) > 1:
        prefix = _meant(where, prefixes)
        others = " and ".join(repr(other) for other in prefixes if other != prefix)
        notes = (f"it holds several models; {prefix!r} is used and not {others} ('{where.name}#PREFIX' decides)",)
    parent = prefix[: prefix[:-1].rfind(".") + 1]
    return Inside({_relative(name, prefix, parent): value for name, value in weights.items()}, prefix, notes)


def _prefixes(weights: Mapping[str, Tensor], sign: Sequence[str]) -> list[str]:
    first, *others = sign
    begins = [name[: -len(first)] for name in weights if name == first or name.endswith("." + first)]
    return [begin for begin in begins if all(begin + other in weights for other in others)]


def _relative(name: str, prefix: str, parent: str) -> str:
    if name.startswith(prefix):
        return name[len(prefix) :]
    return "../" + name[len(parent) :] if name.startswith(parent) else "/" + name


def _meant(where: Path, prefixes: Sequence[str]) -> str:
    for evaluated, trained in _EVALUATED.items():
        chosen = [prefix for prefix in prefixes if evaluated in prefix.split(".")]
        if len(chosen) == 1 and all(trained in prefix.split(".") for prefix in prefixes if prefix not in chosen):
            return chosen[0]
    raise CheckpointError(
        "it holds several models", where=where, seen="tensors under " + first_few(map(repr, prefixes), 6),
        wanted="one", fix=f"Say which one: {shlex.quote(f'{where.name}#{prefixes[0][:-1]}')}.",
    )  # fmt: skip


def what_was_left(names: Collection[str]) -> str:
    """Describes the tensors that a model does not use.

    >>> what_was_left(["../decoder.a.weight", "../decoder.b.weight", "mask_token"])
    '2 tensors of decoder, mask_token'

    Args:
        names: Names as in :class:`Inside`.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        absolute = name.removeprefix("../").removeprefix("/")
        groups.setdefault(absolute.split(".", 1)[0], []).append(absolute)
    return ", ".join(
        members[0] if len(members) == 1 else f"{len(members)} tensors of {group}" for group, members in groups.items()
    )
