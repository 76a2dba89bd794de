"""Identifies a set of tensors: their layout and their timm architecture.

The layout is recognized by names and shapes, and by the ``config.json`` next to the file if there is one. The layouts
are in ``layouts/``, one per file.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.errors import CheckpointError, InputError, did_you_mean
from evit_deploy.models.create import create_model
from evit_deploy.models.files.prefixes import Inside, what_was_left
from evit_deploy.models.layouts import refusals
from evit_deploy.models.layouts.differences import differences_of
from evit_deploy.models.layouts.found import Found, Held, Output, output_of
from evit_deploy.models.layouts.known import LAYOUTS, TYPES
from evit_deploy.tokens.backbone import load_backbones
from evit_deploy.tokens.plan import TokenSpec

_NAME = re.compile(r"[\w.]+")  # as timm writes the names of its models


class Identity(msgspec.Struct):
    """Result of identifying tensors.

    Args:
        model: timm architecture.
        model_args: Further arguments of :func:`evit_deploy.models.create.create_model`.
        weights: The tensors under timm's names.
        notes: Assumptions.
        tokens: The reduction the weights were trained with, if their names imply one.
        prepared: See :class:`~evit_deploy.models.layouts.found.Found`; ``preprocess`` likewise.
        preprocess: See ``prepared``.
    """

    model: str
    model_args: dict[str, Any]
    weights: dict[str, Tensor]
    notes: list[str]
    tokens: TokenSpec | None = None
    prepared: bool = True
    preprocess: Preprocess | None = None

    @property
    def output(self) -> Output:
        """The model's output: logits or an embedding."""
        return output_of(self.model_args)


def identify(
    path: Path,
    weights: dict[str, Tensor] | Inside,
    model: str | None = None,
    method_weights: Collection[str] = (),
    config: dict[str, Any] | None = None,
) -> Identity:
    """Finds the architecture, image size and class count.

    Args:
        path: Source of the tensors, for messages.
        weights: Tensors under the file's names, or as returned by :func:`evit_deploy.models.files.prefixes.inside`.
        model: timm name given by the user, if any; it takes precedence.
        method_weights: Names of tensors that belong to a reduction method's own layers.
        config: The ``config.json`` next to the file, from transformers or timm's hub.

    Raises:
        CheckpointError: The architecture is unknown, or the config contradicts the tensors.
        InputError: timm does not know ``model``.
    """
    load_backbones()
    held_inside = weights if isinstance(weights, Inside) else Inside(weights)
    held = Held(path, held_inside.weights, config, model, frozenset(method_weights))
    if model is not None:
        check_model_name(model, where="--model")
    refusals.check_config(held, TYPES)
    refusals.check_tensors(held)
    for layout in LAYOUTS:
        found = layout.find(held)
        if found is not None:
            _check_kind(held, layout.name, layout.types)
            return _identity(path, held_inside, found)
    refusals.check_tensors(held, in_no_layout=True)
    raise _refusal(path, held_inside.weights)


def _check_kind(held: Held, name: str, types: tuple[str, ...]) -> None:
    """Refuses a config of transformers next to tensors that transformers does not write."""
    kind = (held.config or {}).get("model_type")
    if types or held.model is not None or kind in (None, "timm_wrapper"):
        return
    raise CheckpointError(
        f"the tensors have the names of {name}, but its config.json describes a different layout", where=held.where,
        seen=f"model_type {kind!r}", fix="Take the config.json that was saved with these weights, or none.",
    )  # fmt: skip


def _identity(path: Path, held: Inside, found: Found) -> Identity:
    """Checks that the tensors match the architecture completely, and reports those left out."""
    with torch.device("meta"):
        wanted = create_model(found.model, found.model_args).state_dict()
    differences = differences_of(wanted, found.weights)
    if differences:
        raise CheckpointError(f"not the tensors of {found.model}, which it is most like", where=path, seen=differences)
    notes = [*held.notes, *found.notes]
    if found.left_out:
        part = f"the model is the part of the file under {held.prefix!r}; " if held.prefix else ""
        notes.append(f"{part}left out: {what_was_left(found.left_out)}")
    return Identity(found.model, found.model_args, found.weights, notes, found.tokens, found.prepared, found.preprocess)


def _refusal(path: Path, weights: dict[str, Tensor]) -> CheckpointError:
    """The error for tensors in no known layout; names the layout that shares some of their names."""
    shares = {
        layout.name: max(sum(_has(weights, name) for name in sign) / len(sign) for sign in layout.signs)
        for layout in LAYOUTS
    }
    most = max(shares.values())
    near = " or ".join(name for name, share in shares.items() if share == most)
    what = "not a checkpoint of a vision transformer with a class token"
    return CheckpointError(
        f"only a part of the tensors of {near}" if 0 < most < 1 else what,
        where=path,
        seen="tensors " + ", ".join(list(weights)[:3]),
        wanted="cls_token, pos_embed, patch_embed.proj, blocks.0 as in timm and DeiT, or another layout of "
        "docs/checkpoints.md",
    )


def _has(weights: dict[str, Tensor], name: str) -> bool:
    return any(given == name or given.endswith("." + name) for given in weights)


def check_model_name(name: str, *, where: str, also: str | None = None) -> None:
    """Checks that timm knows a name.

    Raises:
        InputError: It does not; the message suggests similar names.
    """
    import timm

    load_backbones()
    if not timm.is_model(name.split(".")[0]):
        raise InputError(
            "not a timm model" + (" nor a file" if also else ""),
            where=where,
            seen=repr(name),
            wanted="a timm name" + (f" or {also}" if also else ""),
            # Names like `my model` or `out/model` are mistyped paths, which resemble no model of timm.
            fix=did_you_mean(name, timm.list_models(), choices=3) if _NAME.fullmatch(name) else "Check the path.",
        )
