"""VisionTransformers of any size: the most similar timm name, and the arguments that turn it into the exact one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evit_deploy.errors import CheckpointError, first_few
from evit_deploy.models.create import create_model
from evit_deploy.models.layouts.found import Held

# (width, depth) -> the size's name in timm.
SIZES = {
    (192, 12): "tiny",
    (384, 12): "small",
    (512, 12): "medium",
    (768, 12): "base",
    (1024, 24): "large",
    (1280, 32): "huge",
    (1408, 40): "giant",
    (1536, 40): "giant",
    (1664, 48): "gigantic",
}
HEAD_WIDTH = 64
"""Head width of all released sizes up to ``large``; it cannot be read from the tensors."""


def described(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Reads the arguments of :func:`create_model` from tensors under timm's names.

    Args:
        weights: Tensors under timm's names, including ``patch_embed.proj.weight``.
    """
    width, channels, patch, _ = weights["patch_embed.proj.weight"].shape
    registers = weights.get("reg_token")
    found: dict[str, Any] = {
        "embed_dim": width,
        "depth": depth_of(weights),
        "patch_size": patch,
        "in_chans": channels,
        "num_classes": classes_of(weights),
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
        "pre_norm": "norm_pre.weight" in weights,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in weights else None,
        "reg_tokens": registers.shape[1] if registers is not None and registers.dim() == 3 else 0,
    }
    hidden = weights.get("blocks.0.mlp.fc1.weight")
    if hidden is not None and hidden.dim() == 2 and width:
        found["mlp_ratio"] = _ratio(hidden.shape[0], width)
    if "fc_norm.weight" in weights:
        found["global_pool"] = "avg"
    return found


def depth_of(weights: Mapping[str, Tensor]) -> int:
    """Number of blocks."""
    numbers = [name.split(".")[1] for name in weights if name.startswith("blocks.")]
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)


def classes_of(weights: Mapping[str, Tensor]) -> int:
    """Rows of the classifier; 0 if there is none."""
    head = weights.get("head.weight")
    return head.shape[0] if head is not None and head.dim() == 2 else 0


def _ratio(hidden: int, width: int) -> float:
    """The ratio for which timm's ``int(width * ratio)`` is the hidden width."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def image_size(where: object, positions: int, prefix: int, patch: int) -> int:
    """Side of the square image with this number of positions, in pixels.

    Args:
        where: The file, for messages.
        positions: Rows of the position embedding.
        prefix: Number of them that are not patches.
        patch: Side of a patch in pixels.

    Raises:
        CheckpointError: No square image has this number of positions.
    """
    side = math.isqrt(max(positions - prefix, 0))
    if side == 0 or side * side + prefix != positions:
        raise CheckpointError(
            "position embeddings that do not form a square", where=where,
            seen=f"{positions} positions, {prefix} of them not of patches",
        )  # fmt: skip
    return side * patch


def nearest(families: Sequence[str], wanted: Mapping[str, Any]) -> str:
    """The timm name most similar to an architecture.

    Args:
        families: timm names with ``{size}`` and ``{patch}``, in order of preference.
        wanted: Result of :func:`described`.
    """
    import timm

    width, depth, patch = wanted["embed_dim"], wanted["depth"], wanted["patch_size"]
    exact = SIZES.get((width, depth))
    others = sorted(SIZES, key=lambda size: (abs(size[0] - width), abs(size[1] - depth)))
    sizes = dict.fromkeys([*([exact] if exact else []), *(SIZES[size] for size in others)])
    for size in sizes:
        for pixels in dict.fromkeys((patch, 16, 14, 32, 8)):
            for family in families:
                name = family.format(size=size, patch=pixels)
                if timm.is_model(name) if "." not in name else timm.is_model_pretrained(name):
                    return name
    raise AssertionError(f"timm has none of {families}")


def arguments(held: Held, name: str, wanted: Mapping[str, Any], heads: int | None) -> tuple[dict[str, Any], list[str]]:
    """Arguments that turn a timm name into an architecture, and notes on what was assumed.

    Args:
        held: Content of the file.
        name: timm name.
        wanted: Arguments of :func:`create_model`, including ``img_size`` and ``num_classes``.
        heads: Number of attention heads, if the config has it.

    Raises:
        CheckpointError: timm builds no VisionTransformer under this name.
    """
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"):
        model = create_model(name, {"num_classes": wanted["num_classes"]})
    if not isinstance(model, VisionTransformer):
        raise CheckpointError(
            f"the weights are not those of {name}", where=held.where, seen="the tensors of a vision transformer",
            fix="Leave out --model to have the architecture read from the tensors.",
        )  # fmt: skip
    own = _own_values(model)
    args = {key: wanted[key] for key in ("num_classes", "img_size")}
    args |= {key: value for key, value in wanted.items() if key in own and value != own[key]}
    notes = []
    width = wanted["embed_dim"]
    if heads is None and (width, wanted["depth"]) != (own["embed_dim"], own["depth"]):
        heads = max(width // HEAD_WIDTH, 1)
        notes.append(f"tensors do not show how many heads an attention has; {heads} are assumed, {HEAD_WIDTH} wide")
    if heads is not None and heads != own["num_heads"]:
        args["num_heads"] = heads
    if width % args.get("num_heads", own["num_heads"]):
        raise CheckpointError(
            "the width is no multiple of the number of heads", where=held.where,
            seen=f"width {width}, {args.get('num_heads', own['num_heads'])} heads",
            fix="Put a config.json with the number of heads next to the weights.",
        )  # fmt: skip
    return args, notes


def _own_values(model: Any) -> dict[str, Any]:
    """Arguments that a model was built with, restricted to those that layouts override."""
    block = model.blocks[0]
    width = model.embed_dim
    return {
        "embed_dim": width,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "patch_size": model.patch_embed.patch_size[0],
        "in_chans": model.patch_embed.proj.in_channels,
        "mlp_ratio": _ratio(block.mlp.fc1.out_features, width),
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, torch.nn.Identity),
        "pre_norm": not isinstance(model.norm_pre, torch.nn.Identity),
        "init_values": 1e-5 if hasattr(block.ls1, "gamma") else None,
        "reg_tokens": model.num_reg_tokens,
        "no_embed_class": model.no_embed_class,
        "global_pool": model.global_pool,
        "norm_eps": block.norm1.eps,
        "act_layer": activation_of(block.mlp.act),
    }


_ACTIVATIONS = {"GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "ReLU": "relu", "SiLU": "silu"}


def activation_of(layer: torch.nn.Module) -> str:
    """timm's name of an activation layer."""
    name = type(layer).__name__
    return _ACTIVATIONS.get(name, name.lower())


def leftover_error(held: Held, layout: str, names: Sequence[str]) -> CheckpointError:
    """The error for tensors that do not belong to the file's layout.

    Args:
        held: Content of the file.
        layout: Name of the layout, for the message.
        names: The tensors.
    """
    return CheckpointError(
        f"tensors that {layout} does not have", where=held.where, seen=first_few(names),
        wanted="weights of that architecture alone",
        fix="A changed architecture cannot be converted; save the weights of the unchanged one.",
    )  # fmt: skip
