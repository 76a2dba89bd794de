"""timm's own names, and those of papers that timm can load: DeiT, DINO, DeiT III, DINOv2, MAE, LV-ViT, Evo-ViT.

Several architectures in timm have the same tensors. The config of timm's hub decides, or the user, or an order of
preference; in the last case the others are reported.
"""

import math
from typing import Any

import msgspec
import torch
from torch import Tensor

from evit_deploy.errors import CheckpointError
from evit_deploy.models.create import create_model
from evit_deploy.models.layouts import architecture, evo_vit
from evit_deploy.models.layouts.architecture import SIZES, classes_of, depth_of
from evit_deploy.models.layouts.differences import differences_of
from evit_deploy.models.layouts.found import Found, Held
from evit_deploy.models.preprocessing import of_architecture
from evit_deploy.tokens.plan import TokenSpec

SIGNS = (("cls_token", "pos_embed", "patch_embed.proj.weight"),)
# In order of preference: the first one that fits is used, and the others are reported.
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
# LV-ViT is recognized by its stem; the name determines the size, including heads and λ.
_LVVIT = {(240, 12): "lvvit_t", (384, 16): "lvvit_s", (512, 20): "lvvit_m", (768, 24): "lvvit_l"}
_LVVIT_STEM = "patch_embed.conv1.weight"
# A DeiT released only by DynamicViT's authors; the number of heads cannot be read from the tensors.
_DEIT_256 = ("deit_small_patch16_224", {"embed_dim": 256, "num_heads": 4})
_DINO_HEAD = "../head.last_layer."
_DINO = "vit_{size}_patch{patch}_224.dino"
_ANY_SIZE = ("deit_{size}_patch{patch}_224", "vit_{size}_patch{patch}_224")


def find(held: Held) -> Found | None:
    """Identifies a file with these names; ``None`` for others.

    Raises:
        CheckpointError: Its tensors fit no architecture.
    """
    weights = held.inside()
    left = {name: value for name, value in held.weights.items() if name not in weights}
    more: dict[str, Any] = {}
    tokens = None
    if evo_vit.is_evo_vit(weights):
        weights, tokens = evo_vit.to_timm(weights), TokenSpec(keep_rate=0.5, fuse=False, method="evo-vit")
    if "fc_norm.weight" in weights:
        more |= evo_vit.MODEL_ARGS
    dimensions = {"pos_embed": 3, "patch_embed.proj.weight": 4, "cls_token": 3}
    if any(name not in weights or weights[name].dim() != count for name, count in dimensions.items()):
        return None
    _check_head(held)
    if "decoder_embed.weight" in weights:  # MAE's pre-training
        spare = {n: v for n, v in weights.items() if n.startswith("decoder_") or n == "mask_token"}
        left |= spare
        weights = {name: value for name, value in weights.items() if name not in spare}
    names, own_args = _names(held, weights)
    more = own_args | more
    if held.model is None and tokens is not None:  # its authors trained DeiTs
        names = [name for name in names if name.startswith("deit_")]
    if held.model is None and _is_deit_256(weights, held):
        name, more = _DEIT_256
        names = [name]
    fitting = [found for found in (_fit(name, weights, more) for name in names) if found is not None]
    named = held.model is not None or "architecture" in (held.config or {})
    if not fitting and not named and tokens is None and _LVVIT_STEM not in weights:
        fitting = [found for found in [_of_any_size(held, weights)] if found is not None]
    if not fitting:
        raise _no_fit(held, weights, ", Evo-ViT's names" if tokens is not None else "")
    first, notes = fitting[0], []
    prepared = {msgspec.structs.replace(of_architecture(found.model), size=(1, 1)) for found in fitting}
    if len(fitting) > 1:
        others = ", ".join(found.model for found in fitting[1:])
        notes.append(
            f"its tensors fit {first.model} and {others}, which differ in what tensors do not show (preprocessing, "
            f"activation); {first.model} is assumed (--model decides)"
        )
    return msgspec.structs.replace(
        first,
        notes=(*first.notes, *notes),
        tokens=tokens,
        left_out=left | first.left_out,
        prepared=len(prepared) == 1 and first.prepared,
    )


def _names(held: Held, weights: dict[str, Tensor]) -> tuple[list[str], dict[str, Any]]:
    """Candidate architectures, and the arguments given by the config."""
    if held.model is not None:
        return [held.model], {}
    architecture_of_config = (held.config or {}).get("architecture")
    if isinstance(architecture_of_config, str):
        return [architecture_of_config], _args_of_config(held, classes_of(weights))
    if any(name.startswith(_DINO_HEAD) for name in held.weights):
        import timm

        name = _DINO.format(size=SIZES.get(_size(weights)), patch=weights["patch_embed.proj.weight"].shape[2])
        if timm.is_model_pretrained(name):
            return [name], {}
    return _candidates(weights), {}


def _args_of_config(held: Held, classes: int) -> dict[str, Any]:
    """Arguments of the model from a config of timm's hub, including the pooling.

    Args:
        held: What the file holds.
        classes: Rows of the classifier.

    Raises:
        CheckpointError: Its arguments are invalid, or the number of classes differs.
    """
    config = held.config or {}
    if classes and config.get("num_classes") not in (None, classes):
        raise CheckpointError(
            "its config.json contradicts the tensors", where=held.where,
            seen=f"num_classes {config['num_classes']} in the config and {classes} rows in the classifier",
            fix="Take the config.json that was saved with these weights.",
        )  # fmt: skip
    args = config.get("model_args") or {}
    if not isinstance(args, dict):
        raise CheckpointError(
            "model_args in its config.json that are not valid", where=held.where, seen=repr(args)[:80],
            wanted="names and values",
        )  # fmt: skip
    pooling = {"global_pool": config["global_pool"]} if config.get("global_pool") else {}
    return pooling | args


def _size(weights: dict[str, Tensor]) -> tuple[int, int]:
    return weights["patch_embed.proj.weight"].shape[0], depth_of(weights)


def _is_deit_256(weights: dict[str, Tensor], held: Held) -> bool:
    return _size(weights) == (256, 12) and any("score_predictor." in name for name in held.method_weights)


def _candidates(weights: dict[str, Tensor]) -> list[str]:
    import timm

    patch = weights["patch_embed.proj.weight"].shape[2]
    if _LVVIT_STEM in weights:
        return [name for size, name in _LVVIT.items() if size == _size(weights)]
    size = SIZES.get(_size(weights))
    names = [family.format(size=size, patch=patch, image=image) for family in _FAMILIES for image in _IMAGES]
    # One name per family: its image sizes are the same network, and the image size is read from the tensors.
    found: dict[str, str] = {}
    for family, name in zip([f for f in _FAMILIES for _ in _IMAGES], names, strict=True):
        if family not in found and timm.is_model(name):
            found[family] = name
    return list(found.values())


def _fit(name: str, weights: dict[str, Tensor], more: dict[str, Any]) -> Found | None:
    """Builds the architecture on the meta device and compares names and shapes."""
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    args: dict[str, Any] = more | {"num_classes": classes_of(weights)}
    with torch.device("meta"):
        try:
            model: Any = create_model(name, args)
        except (TypeError, RuntimeError, AssertionError):
            return None
    if not isinstance(model, VisionTransformer) or model.pos_embed is None:
        return None
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    renamed, positions = weights, weights["pos_embed"].shape[1]
    left = {}
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
        except RuntimeError:  # the number of positions does not fit these prefix tokens
            return None
        left = {key: weights[key] for key in ("mask_token",) if key in weights}
    side = math.isqrt(max(renamed["pos_embed"].shape[1] - prefix, 0))
    if side == 0 or side * side + prefix != renamed["pos_embed"].shape[1]:
        return None
    args["img_size"] = side * model.patch_embed.patch_size[0]
    wanted = model.state_dict() | {"pos_embed": renamed["pos_embed"]}  # its length is the image size, read above
    return None if differences_of(wanted, renamed) else Found(name, args, renamed, left_out=left)


def _of_any_size(held: Held, weights: dict[str, Tensor]) -> Found | None:
    """Identifies a VisionTransformer of a size for which timm has no name."""
    wanted = architecture.described(weights)
    if not wanted["depth"] or not wanted["embed_dim"]:
        return None
    families = ("deit_{size}_distilled_patch{patch}_224",) if "dist_token" in weights else _ANY_SIZE
    name = architecture.nearest(families, wanted)
    prefix = 1 + wanted["reg_tokens"] + ("dist_token" in weights)
    for without in (False, True):
        try:
            size = architecture.image_size(
                held.where, weights["pos_embed"].shape[1], 0 if without else prefix, wanted["patch_size"]
            )
            args, notes = architecture.arguments(
                held, name, wanted | {"img_size": size, "no_embed_class": without}, None
            )
        except CheckpointError:
            continue
        found = _fit(name, weights, args)
        if found is not None:
            what = f"no architecture of timm has this size: {name} with {_words(args)} is used"
            return msgspec.structs.replace(found, notes=(what, *notes), prepared=False)
    return None


def _words(args: dict[str, Any]) -> str:
    shown = {name: value for name, value in args.items() if name not in ("num_classes", "img_size")}
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
    )


def _check_head(held: Held) -> None:
    head = held.weights.get("../linear_head.weight")
    if head is not None:
        raise CheckpointError(
            "DINOv2 with its classifier, which reads class tokens and the mean of all patches", where=held.where,
            seen=f"linear_head.weight {list(head.shape)}",
            wanted="the backbone alone: once tokens are dropped, their mean changes",
            fix="Save the backbone (model.backbone) to convert it as an embedding, or train a classifier on its class "
            "token with `evit-deploy train`.",
        )  # fmt: skip


def _no_fit(held: Held, weights: dict[str, Tensor], layout: str) -> CheckpointError:
    width, depth = _size(weights)
    patch = weights["patch_embed.proj.weight"].shape[2]
    head = ", ".join(f"{name} {list(value.shape)}" for name, value in weights.items() if name.startswith("head"))
    position = list(weights["pos_embed"].shape)
    stem = ", LV-ViT's stem" if _LVVIT_STEM in weights else layout
    seen = f"width {width}, {depth} blocks, patch {patch}{stem}, pos_embed {position}, {head or 'no head'}"
    by_config = held.model is None and isinstance((held.config or {}).get("architecture"), str)
    model = (held.config or {})["architecture"] if by_config else held.model
    if model is None:
        return CheckpointError(
            "no known architecture has these tensors",
            where=held.where,
            seen=seen,
            wanted="a ViT, DeiT, DeiT III or DINOv2 of timm, an LV-ViT, a LeViT or an Evo-LeViT",
            fix="Name the architecture with --model.",
        )
    with torch.device("meta"):
        built = create_model(model, {"num_classes": classes_of(weights)})
    wanted = {name: value for name, value in built.state_dict().items() if name != "pos_embed"}
    given = {name: value for name, value in weights.items() if name != "pos_embed"}
    return CheckpointError(
        f"the weights are not those of {model}" + (", which its config.json names" if by_config else ""),
        where=held.where,
        seen="; ".join(filter(None, (seen, differences_of(wanted, given)))),
        fix="Take the config.json that was saved with these weights."
        if by_config
        else "Leave out --model to have the architecture read from the tensors.",
    )
