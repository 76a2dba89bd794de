"""Which timm architecture a set of tensors belongs to, told from names and shapes alone."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import torch
from torch import Tensor

from evit_deploy.errors import CheckpointError, InputError, did_you_mean, first_few
from evit_deploy.models.create import create_model
from evit_deploy.models.layouts import evo_vit, levit
from evit_deploy.models.layouts.found import Found, Output
from evit_deploy.models.preprocessing import of_architecture
from evit_deploy.tokens.backbone import load_backbones
from evit_deploy.tokens.plan import TokenSpec

# (width, depth) -> the size's name in timm.
_SIZES = {
    (192, 12): "tiny",
    (384, 12): "small",
    (512, 12): "medium",
    (768, 12): "base",
    (1024, 24): "large",
    (1280, 32): "huge",
    (1408, 40): "giant",
}
# In order of preference: where several fit, the first is taken and the others are named.
_FAMILIES = (
    "deit_{size}_distilled_patch{patch}_{image}",
    "deit_{size}_patch{patch}_{image}",
    "deit3_{size}_patch{patch}_{image}",
    "vit_{size}_patch{patch}_{image}",
    "vit_{size}_patch{patch}_dinov2",
    "vit_{size}_patch{patch}_reg4_dinov2",
    "vit_{size}_patch{patch}_clip_{image}",
    "vit_{size}_patch{patch}_clip_quickgelu_{image}",
)
_IMAGES = (224, 384)
# LV-ViT is told by its stem; its names say nothing but the size, and heads and λ come with them.
_LVVIT = {(240, 12): "lvvit_t", (384, 16): "lvvit_s", (512, 20): "lvvit_m", (768, 24): "lvvit_l"}
# A DeiT that only DynamicViT's authors have released: tensors do not show how many heads it has.
_DEIT_256 = ("deit_small_patch16_224", {"embed_dim": 256, "num_heads": 4})
_LVVIT_STEM = "patch_embed.conv1.weight"
# Other families by a tensor only they have.
_FOREIGN = (
    ("layers.0.blocks.0.attn.relative_position_bias_table", "Swin"),
    ("layer1.0.conv1.", "ResNet"),
    ("stages.0.", "ConvNeXt or another staged network"),
    ("encoder.layer.0.", "a Hugging Face transformers ViT"),
    ("vit.encoder.layer.0.", "a Hugging Face transformers ViT"),
    ("encoder.layers.encoder_layer_0.", "a torchvision ViT"),
)


class Identity(msgspec.Struct):
    """What tensors were found to be.

    Args:
        model: timm architecture.
        model_args: What :func:`evit_deploy.models.create.create_model` needs besides.
        weights: The tensors under timm's names.
        notes: What was assumed.
        tokens: The reduction such weights were trained with, where their names tell.
        output: What the model answers.
        prepared: Whether images for such weights were surely prepared as timm says of the architecture.
    """

    model: str
    model_args: dict[str, Any]
    weights: dict[str, Tensor]
    notes: list[str]
    tokens: TokenSpec | None = None
    output: Output = "logits"
    prepared: bool = True


def identify(
    path: Path,
    weights: dict[str, Tensor],
    model: str | None = None,
    method_weights: Collection[str] = (),
    config: Mapping[str, Any] | None = None,
) -> Identity:
    """Finds the architecture, image size and class count.

    Args:
        path: Where the tensors come from, for messages.
        weights: Tensors under the names the file has.
        model: timm name that decides, if the user gave one.
        method_weights: Names of the tensors that were set aside as a reduction method's own.
        config: ``config.json`` beside the weights, if there is one.

    Raises:
        CheckpointError: The tensors are of no architecture known here.
        InputError: timm does not know ``model``.
    """

    load_backbones()
    found = levit.find(path, weights)
    if found is not None:
        return _released(path, found, model)
    args: dict[str, Any] = {}
    tokens = None
    if evo_vit.is_evo_vit(weights):
        weights, tokens = evo_vit.to_timm(weights), TokenSpec(keep_rate=0.5, fuse=False, method="evo-vit")
    if "fc_norm.weight" in weights:
        args |= evo_vit.MODEL_ARGS
    dimensions = {"pos_embed": 3, "patch_embed.proj.weight": 4, "cls_token": 3}
    if any(name not in weights or weights[name].dim() != count for name, count in dimensions.items()):
        _refuse(path, weights)
    foreign = next((family for key, family in _FOREIGN if any(name.startswith(key) for name in weights)), None)
    if foreign:
        _refuse(path, weights)
    if model is not None:
        check_model_name(model, where="--model")
    names = [model] if model is not None else _candidates(weights)
    if model is None and tokens is not None:  # its authors have trained DeiTs
        names = [name for name in names if name.startswith("deit_")]
    fitting = []
    if model is None and _describe(weights)[:2] == (256, 12) and any("score_predictor." in n for n in method_weights):
        (name, args) = _DEIT_256
        names = [name]
    for name in names:
        found = _fit(path, name, weights, args)
        if found is not None:
            fitting.append(found)
    if not fitting:
        _no_fit(path, weights, model, ", Evo-ViT's names" if tokens is not None else "")
    first, notes = fitting[0], []
    prepared = {msgspec.structs.replace(of_architecture(one.model), size=(1, 1)) for one in fitting}
    if len(fitting) > 1:
        others = ", ".join(identity.model for identity in fitting[1:])
        notes.append(
            f"its tensors fit {first.model} and {others}, which differ in what tensors do not show (preprocessing, "
            f"activation); {first.model} is assumed (--model decides)"
        )
    return msgspec.structs.replace(first, notes=first.notes + notes, tokens=tokens, prepared=len(prepared) == 1)


def _released(path: Path, found: Found, model: str | None) -> Identity:
    """What a file in its own released layout holds; its names tell the architecture."""
    if model is not None and model != found.model:
        check_model_name(model, where="--model")
        raise CheckpointError(
            f"the weights are not those of {model}", where=path, seen=f"the tensors of {found.model}",
            fix="Leave out --model to have the architecture read from the tensors.",
        )  # fmt: skip
    with torch.device("meta"):
        wanted = create_model(found.model, found.model_args).state_dict()
    differences = differences_of(wanted, found.weights)
    if differences:
        raise CheckpointError(f"not the tensors of {found.model}, which it is most like", where=path, seen=differences)
    return Identity(
        found.model, found.model_args, found.weights, list(found.notes), found.tokens, found.output, found.prepared
    )


def _describe(weights: dict[str, Tensor]) -> tuple[int, int, int]:
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    depth = 1 + max(
        (int(n.split(".")[1]) for n in weights if n.startswith("blocks.") and n.split(".")[1].isdigit()), default=-1
    )
    return width, depth, patch


def _classes(weights: dict[str, Tensor]) -> int:
    head = weights.get("head.weight")
    return head.shape[0] if head is not None and head.dim() == 2 else 0


def _candidates(weights: dict[str, Tensor]) -> list[str]:
    import timm

    width, depth, patch = _describe(weights)
    if _LVVIT_STEM in weights:
        return [name for size, name in _LVVIT.items() if size == (width, depth)]
    size = _SIZES.get((width, depth))
    names = [family.format(size=size, patch=patch, image=image) for family in _FAMILIES for image in _IMAGES]
    # One name a family: its image sizes are the same network, and the image size is read from the tensors.
    found: dict[str, str] = {}
    for family, name in zip([f for f in _FAMILIES for _ in _IMAGES], names, strict=True):
        if family not in found and timm.is_model(name):
            found[family] = name
    return list(found.values())


def _fit(path: Path, name: str, weights: dict[str, Tensor], more: dict[str, Any]) -> Identity | None:
    """Builds the architecture without memory and compares names and shapes."""
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    args: dict[str, Any] = {"num_classes": _classes(weights)} | more
    with torch.device("meta"):
        try:
            model: Any = create_model(name, args)
        except (TypeError, RuntimeError, AssertionError):
            return None
    if not isinstance(model, VisionTransformer) or model.pos_embed is None:
        return None
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    renamed, positions = weights, weights["pos_embed"].shape[1]
    if "mask_token" in weights or any(
        key.endswith("gamma_1") for key in weights
    ):  # as DINOv2 (a position for the class token, none for registers) and DeiT III (none for either) publish them
        side = math.isqrt(max(positions - ("mask_token" in weights), 0))
        if side == 0 or side * side + ("mask_token" in weights) != positions:
            return None
        args["img_size"] = side * model.patch_embed.patch_size[0]
        with torch.device("meta"):
            model = create_model(name, args)
        try:
            renamed = checkpoint_filter_fn(dict(weights), model, adapt_layer_scale=True)
        except RuntimeError:  # its positions are not those of an architecture with these prefix tokens
            return None
    side = math.isqrt(max(renamed["pos_embed"].shape[1] - prefix, 0))
    if side == 0 or side * side + prefix != renamed["pos_embed"].shape[1]:
        return None
    args["img_size"] = side * model.patch_embed.patch_size[0]
    wanted = model.state_dict() | {"pos_embed": renamed["pos_embed"]}  # its length is the image size, read above
    return None if differences_of(wanted, renamed) else Identity(name, args, renamed, [])


def differences_of(wanted: dict[str, Tensor], given: dict[str, Tensor]) -> str:
    """How two sets of tensors differ in names and shapes, in words; empty if they do not."""
    shapes = [
        f"{name} {list(given[name].shape)} instead of {list(wanted[name].shape)}"
        for name in wanted
        if name in given and wanted[name].shape != given[name].shape
    ]
    found = (
        ("missing", [name for name in wanted if name not in given]),
        ("unexpected", [name for name in given if name not in wanted]),
        ("other shapes:", shapes),
    )
    return "; ".join(f"{label} {first_few(names)}" for label, names in found if names)


def _refuse(path: Path, weights: dict[str, Tensor]) -> NoReturn:
    family = next((family for key, family in _FOREIGN if any(name.startswith(key) for name in weights)), None)
    raise CheckpointError(
        f"a checkpoint of {family}" if family else "not a checkpoint of a vision transformer with a class token",
        where=path,
        seen="tensors " + ", ".join(list(weights)[:3]),
        wanted="cls_token, pos_embed, patch_embed.proj, blocks.0 as in timm and DeiT",
    )


def _no_fit(path: Path, weights: dict[str, Tensor], model: str | None, layout: str) -> NoReturn:
    width, depth, patch = _describe(weights)
    head = ", ".join(f"{name} {list(value.shape)}" for name, value in weights.items() if name.startswith("head"))
    position = list(weights["pos_embed"].shape)
    stem = ", LV-ViT's stem" if _LVVIT_STEM in weights else layout
    seen = f"width {width}, {depth} blocks, patch {patch}{stem}, pos_embed {position}, {head or 'no head'}"
    if model is None:
        raise CheckpointError(
            "no known architecture has these tensors",
            where=path,
            seen=seen,
            wanted="a ViT, DeiT, DeiT III or DINOv2 of timm, an LV-ViT, a LeViT or an Evo-LeViT",
            fix="Name the architecture with --model.",
        )
    with torch.device("meta"):
        built = create_model(model, {"num_classes": _classes(weights)})
    wanted = {name: value for name, value in built.state_dict().items() if name != "pos_embed"}
    given = {name: value for name, value in weights.items() if name != "pos_embed"}
    raise CheckpointError(
        f"the weights are not those of {model}",
        where=path,
        seen="; ".join(filter(None, (seen, differences_of(wanted, given)))),
        fix="Leave out --model to have the architecture read from the tensors.",
    )


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
