"""Families that cannot be reduced exactly or are not vision transformers, recognized by config or tensors."""

import re
from collections.abc import Mapping
from typing import Any

import msgspec
import torch

from evit_deploy.errors import CheckpointError, InputError
from evit_deploy.models.create import create_model
from evit_deploy.models.layouts.found import Held
from evit_deploy.models.timm_vit import TimmViT


class Refusal(msgspec.Struct, frozen=True):
    """A family that is not converted.

    Args:
        family: Its name.
        reason: The reason, as a clause.
        instead: An alternative, as a sentence.
    """

    family: str
    reason: str
    instead: str


_CLASSIFIER = "A ViT, DeiT or DINOv2 of the same size can be converted."
_SIGLIP = Refusal(
    "SigLIP", "it has no class token: attention pools all patches at the end, so that no patch is known to matter less",
    "A CLIP tower of the same size has a class token and can be converted.",
)  # fmt: skip
_BEIT = Refusal("BEiT", "its relative position bias needs every patch at its position", _CLASSIFIER)
_SWIN = Refusal("Swin", "it computes attention in windows, which need every patch in their place", _CLASSIFIER)
_DINOV3 = Refusal(
    "DINOv3", "its position embedding is rotary: each attention needs every patch's place",
    "DINOv2, with or without registers, can be converted.",
)  # fmt: skip
_EVA = Refusal("EVA-02", "its position embedding is rotary: each attention needs every patch's place", _CLASSIFIER)
_SAM = Refusal(
    "SAM", "it returns a map of all patches, and has windows, relative positions and no class token",
    "An encoder that returns one vector per image, such as DINOv2, can be converted.",
)  # fmt: skip
_DENSE = Refusal(
    "a dense prediction model", "it returns a map: its decoder reads every patch of several blocks",
    "The backbone alone, saved without the decoder, can be converted as an embedding.",
)  # fmt: skip
_DETECTOR = Refusal(
    "a detector", "its boxes are read from every patch", "A classifier or an embedding model can be converted."
)
_CONVOLUTIONS = "it has convolutions or stages on a grid, and no tokens that could be dropped"
_NO_CLASS = "it has no class token, so that no patch is known to matter less"
_VIDEO = Refusal("a video transformer", "its tokens are of several frames", _CLASSIFIER)


def _staged(name: str) -> Refusal:
    return Refusal(name, _CONVOLUTIONS, _CLASSIFIER)


# `model_type` in a config of transformers -> refusal.
_TYPES: dict[str, Refusal] = {
    **dict.fromkeys(("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model"), _SIGLIP),
    "beit": _BEIT,
    "data2vec-vision": Refusal("data2vec", _BEIT.reason, _CLASSIFIER),
    **dict.fromkeys(("swin", "swinv2", "donut-swin", "maskformer-swin", "swin2sr"), _SWIN),
    **dict.fromkeys(("dinov3_vit", "eomt_dinov3"), _DINOV3),
    **dict.fromkeys(("eva", "eva02", "evaclip"), _EVA),
    **dict.fromkeys(("sam", "sam_vision_model", "sam2", "sam2_vision_model", "sam_hq", "sam3"), _SAM),
    **dict.fromkeys(("dpt", "depth_anything", "zoedepth", "vitmatte", "upernet", "eomt", "vitpose"), _DENSE),
    **dict.fromkeys(("yolos", "detr", "owlvit", "owlv2", "grounding-dino", "rt_detr", "vitdet"), _DETECTOR),
    **dict.fromkeys(("vivit", "videomae", "timesformer", "vjepa2"), _VIDEO),
    "convnext": _staged("ConvNeXt"),
    "convnextv2": _staged("ConvNeXt V2"),
    "dinov3_convnext": _staged("DINOv3's ConvNeXt"),
    "resnet": _staged("ResNet"),
    "regnet": _staged("RegNet"),
    "efficientnet": _staged("EfficientNet"),
    "mobilenet_v2": _staged("MobileNet V2"),
    "mobilevit": _staged("MobileViT"),
    "mobilevitv2": _staged("MobileViT V2"),
    "cvt": _staged("CvT"),
    "pvt": _staged("PVT"),
    "pvt_v2": _staged("PVT v2"),
    "segformer": _staged("SegFormer"),
    "hiera": Refusal("Hiera", "its blocks merge the patches of a grid", _CLASSIFIER),
    "ijepa": Refusal("I-JEPA", _NO_CLASS, _CLASSIFIER),
    "vit_hybrid": Refusal("a hybrid ViT", "its patches come from a ResNet", _CLASSIFIER),
}

# Tensor names that occur only in such families, whether or not the other tensors match a layout.
_TENSORS: tuple[tuple[str, Refusal], ...] = (
    (r"(^|\.)layers\.\d+\.blocks\.\d+\.attn\.relative_position_bias_table$", _SWIN),
    (r"(^|\.)encoder\.layers\.\d+\.blocks\.\d+\.attention\.self\.relative_position_bias_table$", _SWIN),
    (r"(^|\.)features\.\d+\.\d+\.attn\.relative_position_bias_table$", _SWIN),
    (r"relative_position_bias(\.relative_position_bias)?_table$", _BEIT),
    (r"(^|\.)(encoder\.layer|layers)\.\d+\.lambda_1$", _BEIT),
    (r"(^|\.)head\.probe$", _SIGLIP),
    (r"(^|\.)attn_pool\.latent$", _SIGLIP),
    (r"^(?!(.*\.)?encoder\.)(.*\.)?layer\.\d+\.layer_scale1\.lambda1$", _DINOV3),
    (r"(^|\.)rope_embed\.periods$", _DINOV3),
    (r"(^|\.)blocks\.\d+\.attn\.(rope\.|q_bias$|inner_attn_ln)", _EVA),
    (r"(^|\.)blocks\.\d+\.attn\.rel_pos_h$", _SAM),
    (r"(^|\.)layers\.\d+\.attn\.rel_pos_h$", _SAM),
    (r"(^|\.)embeddings\.detection_tokens$", _DETECTOR),
)
# Names checked only if no layout matches, because LeViT has stages too.
_TENSORS_OF_NO_LAYOUT: tuple[tuple[str, Refusal], ...] = (
    (r"(^|\.)layer1\.0\.conv1\.", _staged("ResNet")),
    (r"(^|\.)stages\.0\.", _staged("ConvNeXt or another staged network")),
)


def check_config(held: Held, known: frozenset[str]) -> None:
    """Refuses a config of a family that cannot be converted, unless the user gave a model.

    Args:
        held: What the file holds.
        known: Values of ``model_type`` that have a layout.

    Raises:
        CheckpointError: The config names such a family, or an unknown architecture.
    """
    config = held.config
    if config is None or held.model is not None:
        return
    if "architecture" in config:
        _check_timm(held, config)
        return
    types = [section["model_type"] for section in _sections(config)]
    if not types or known.intersection(types[:1]):
        return
    refusal = next((_TYPES[kind] for kind in types if kind in _TYPES), None)
    if refusal is not None:
        raise _error(held, refusal, f"model_type {types[0]!r} in its config.json")
    if not known.intersection(types):
        raise CheckpointError(
            "its config.json does not describe a known vision transformer", where=held.where,
            seen=f"model_type {types[0]!r}", wanted=", ".join(sorted(known)),
            fix="If it is one nevertheless, name the timm architecture with --model: the config is then ignored.",
        )  # fmt: skip


def _sections(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A config and its nested configs that have a type."""
    found = [config, *(value for value in config.values() if isinstance(value, dict))]
    return [section for section in found if isinstance(section.get("model_type"), str)]


def _check_timm(held: Held, config: Mapping[str, Any]) -> None:
    import timm

    name = config["architecture"]
    if not isinstance(name, str) or not timm.is_model(name):
        raise CheckpointError(
            "its config.json names an architecture that timm does not know", where=held.where, seen=repr(name)[:80],
            fix="Name the timm architecture with --model: the config is then ignored.",
        )  # fmt: skip
    args = config.get("model_args")
    try:
        with torch.device("meta"):
            model = create_model(name, args if isinstance(args, dict) else {})
    except (TypeError, RuntimeError, AssertionError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"timm cannot build the architecture of its config.json: {str(error)[:200]}", where=held.where,
            seen=f"{name} with {args}",
        ) from error  # fmt: skip
    reasons = TimmViT.unsupported(model)
    if reasons and reasons[0] != "it is not a timm VisionTransformer":
        raise _error(held, Refusal(name, "; ".join(reasons), _CLASSIFIER), "the architecture in its config.json")
    if reasons and not name.startswith(("levit", "evo_levit", "lvvit")):
        raise _error(held, Refusal(name, "it is no vision transformer with a class token", _CLASSIFIER),
                     "the architecture in its config.json")  # fmt: skip


def check_tensors(held: Held, *, in_no_layout: bool = False) -> None:
    """Refuses tensors that occur only in families that cannot be converted.

    Args:
        held: What the file holds.
        in_no_layout: Whether no layout matched.

    Raises:
        CheckpointError: Such tensors were found.
    """
    for pattern, refusal in _TENSORS_OF_NO_LAYOUT if in_no_layout else _TENSORS:
        search = re.compile(pattern).search
        name = next((name for name in held.inside() if search(name)), None)
        if name is not None:
            raise _error(held, refusal, f"the tensor {name}")


def _error(held: Held, refusal: Refusal, seen: str) -> InputError:
    return CheckpointError(
        f"a checkpoint of {refusal.family}, which cannot be reduced exactly: {refusal.reason}", where=held.where,
        seen=seen, fix=refusal.instead,
    )  # fmt: skip
