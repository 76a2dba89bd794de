"""Builds a model from a timm name and JSON arguments."""

import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from torch import nn

from evit_deploy.documents import converted
from evit_deploy.errors import CheckpointError, did_you_mean

_Side = Annotated[int, Meta(ge=1, le=4096)]
_Width = Annotated[int, Meta(ge=1, le=8192)]
_Depth = Annotated[int, Meta(ge=1, le=256)]
_Heads = Annotated[int, Meta(ge=1, le=256)]
_Stages = Meta(min_length=1, max_length=8)
_Ratio = Annotated[float, Meta(gt=0, le=64)]
_Share = Annotated[float, Meta(ge=0, lt=1)]
_Layer = Annotated[str, Meta(pattern=r"^[a-z0-9_]{0,40}$")]


class _Arguments(msgspec.Struct):
    """Allowed arguments with their ranges; the largest released models use at most half of each.

    For LeViT, width, depth and number of heads are lists with one number per stage. ``None`` means timm's default.
    """

    img_size: _Side | Annotated[tuple[_Side, ...], Meta(min_length=2, max_length=2)] | None = None
    patch_size: _Side | Annotated[tuple[_Side, ...], Meta(min_length=2, max_length=2)] | None = None
    in_chans: Annotated[int, Meta(ge=1, le=64)] | None = None
    num_classes: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    projection: _Width | None = None
    global_pool: Literal["", "avg", "avgmax", "max", "token", "map", "prr"] | None = None
    embed_dim: _Width | Annotated[tuple[_Width, ...], _Stages] | None = None
    depth: _Depth | Annotated[tuple[_Depth, ...], _Stages] | None = None
    num_heads: _Heads | Annotated[tuple[_Heads, ...], _Stages] | None = None
    key_dim: Annotated[int, Meta(ge=1, le=1024)] | None = None
    heads: Annotated[tuple[_Layer, ...], _Stages] | None = None
    mlp_ratio: _Ratio | Annotated[tuple[_Ratio, ...], _Stages] | None = None
    attn_ratio: _Ratio | Annotated[tuple[_Ratio, ...], _Stages] | None = None
    qkv_bias: bool | None = None
    qk_norm: bool | None = None
    scale_attn_norm: bool | None = None
    scale_mlp_norm: bool | None = None
    proj_bias: bool | None = None
    init_values: Annotated[float, Meta(ge=0, le=1000)] | None = None
    class_token: bool | None = None
    pos_embed: Literal["", "none", "learn"] | None = None
    no_embed_class: bool | None = None
    reg_tokens: Annotated[int, Meta(ge=0, le=256)] | None = None
    pre_norm: bool | None = None
    final_norm: bool | None = None
    fc_norm: bool | None = None
    pool_include_prefix: bool | None = None
    dynamic_img_size: bool | None = None
    dynamic_img_pad: bool | None = None
    strict_img_size: bool | None = None
    drop_rate: _Share | None = None
    pos_drop_rate: _Share | None = None
    patch_drop_rate: _Share | None = None
    proj_drop_rate: _Share | None = None
    attn_drop_rate: _Share | None = None
    drop_path_rate: _Share | None = None
    weight_init: _Layer | None = None
    fix_init: bool | None = None
    act_layer: _Layer | None = None
    norm_layer: _Layer | None = None
    norm_eps: Annotated[float, Meta(gt=0, le=1)] | None = None
    skip_lam: Annotated[float, Meta(gt=0, le=1000)] | None = None
    stem_width: _Width | None = None


# Arguments of timm.create_model that do not describe an architecture: they read files or use the network.
_OUTSIDE = {"checkpoint_path", "cache_dir", "features_only", "feature_cfg", "scriptable", "exportable", "no_jit"}


def create_model(name: str, args: Mapping[str, Any]) -> Any:
    """Builds a model with random weights.

    Args:
        name: timm name.
        args: Arguments of ``timm.create_model`` as JSON values; ``act_layer`` is timm's name of the activation. Two
            more are accepted: ``norm_eps``, the epsilon of every LayerNorm, and ``projection``, the width of a final
            linear projection as in CLIP, for a model without classes.

    Raises:
        CheckpointError: The name or an argument would make timm read a file or use the network, or an argument is
            unknown or out of range.
        TypeError: The architecture has no such argument; timm raises other errors for values that do not fit.
    """
    import timm
    from timm.layers import LayerNorm

    outside = [key for key in args if key in _OUTSIDE or key.startswith("pretrained")]
    if ":" in name or outside:  # prefixes such as `hf-hub:` and `local-dir:`
        raise CheckpointError(
            "a checkpoint may describe a model, but not where timm loads one from", where=name,
            seen=", ".join(outside) or name, wanted="an architecture's name and its arguments",
        )  # fmt: skip
    known = _Arguments.__struct_fields__
    unknown = next((key for key in args if key not in known), None)
    if unknown is not None:
        raise CheckpointError(
            "unknown argument of an architecture", where=name, seen=repr(unknown)[:80], wanted=", ".join(known),
            fix=did_you_mean(unknown, known),
        )  # fmt: skip
    converted(dict(args), _Arguments, name, CheckpointError)
    given = dict(args)
    projection = given.pop("projection", None)
    if "norm_eps" in given:
        given["norm_layer"] = functools.partial(LayerNorm, eps=given.pop("norm_eps"))
    model: Any = timm.create_model(name, pretrained=False, **given)
    if projection is not None:
        model.head = nn.Linear(model.num_features, projection, bias=False)
    return model
