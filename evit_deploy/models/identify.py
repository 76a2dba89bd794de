"""What a set of tensors is: which layout they are in, and which timm architecture they belong to.

A layout is told from names and shapes, and from the ``config.json`` beside the file where there is one. The layouts are
in ``layouts/``, one a file.
"""

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


class Identity(msgspec.Struct):
    """What tensors were found to be.

    Args:
        model: timm architecture.
        model_args: What :func:`evit_deploy.models.create.create_model` needs in addition.
        weights: The tensors under timm's names.
        notes: What was assumed.
        tokens: The reduction such weights were trained with, where their names tell.
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
        """What the model answers."""
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
        path: Where the tensors come from, for messages.
        weights: Tensors under the names the file has, or what :func:`evit_deploy.models.files.prefixes.inside` made of
            them.
        model: timm name that decides, if the user gave one.
        method_weights: Names of the tensors that were set aside as a reduction method's own.
        config: The ``config.json`` that lies beside the file: of transformers, or of timm's hub.

    Raises:
        CheckpointError: The tensors are of no architecture known here, or the config contradicts them.
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
    """A config of transformers beside tensors that transformers does not write."""
    kind = (held.config or {}).get("model_type")
    if types or held.model is not None or kind in (None, "timm_wrapper"):
        return
    raise CheckpointError(
        f"the tensors have the names of {name}, but its config.json describes a different layout", where=held.where,
        seen=f"model_type {kind!r}", fix="Take the config.json that was saved with these weights, or none.",
    )  # fmt: skip


def _identity(path: Path, held: Inside, found: Found) -> Identity:
    """Makes sure that tensors are those of the architecture, all of them, and says what was left out."""
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
    """The error of tensors that are in no layout; one that has some of their names is named."""
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
    """Makes sure that timm knows a name.

    Raises:
        InputError: It does not; the message has the nearest names.
    """
    import timm

    load_backbones()
    if not timm.is_model(name.split(".")[0]):
        raise InputError(
            "not a timm model" + (" nor a file" if also else ""),
            where=where,
            seen=repr(name),
            wanted="a timm name" + (f" or {also}" if also else ""),
            fix=did_you_mean(name, timm.list_models(), choices=3),
        )
