"""OpenCLIP's ViT: the image tower of a full model, ``visual.*``, with its projection."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from evit_deploy.errors import CheckpointError
from evit_deploy.models.layouts import architecture
from evit_deploy.models.layouts.found import Found, Held
from evit_deploy.models.layouts.hugging_face.clip import families, projected
from evit_deploy.models.layouts.table import Same, Table, Transposed, layers

SIGNS = (("class_embedding", "positional_embedding", "conv1.weight", "ln_post.weight"),)
TYPES = ("clip",)
"""Repositories often also hold the model for transformers, with a ``config.json`` that describes the same model."""
_BLOCK, _OURS = "transformer.resblocks.{}", "blocks.{}"
TABLE = Table((
    Same("class_embedding", "cls_token", axes=2),
    Same("positional_embedding", "pos_embed", axes=1),
    Same("conv1.weight", "patch_embed.proj.weight"),
    Same(f"{_BLOCK}.attn.in_proj_weight", f"{_OURS}.attn.qkv.weight"),
    Same(f"{_BLOCK}.attn.in_proj_bias", f"{_OURS}.attn.qkv.bias"),
    Same(f"{_BLOCK}.ls_1.gamma", f"{_OURS}.ls1.gamma"),
    Same(f"{_BLOCK}.ls_2.gamma", f"{_OURS}.ls2.gamma"),
    Transposed("proj", "head.weight"),
    *layers({
        "ln_pre": "norm_pre",
        "ln_post": "norm",
        f"{_BLOCK}.attn.out_proj": f"{_OURS}.attn.proj",
        f"{_BLOCK}.ln_1": f"{_OURS}.norm1",
        f"{_BLOCK}.ln_2": f"{_OURS}.norm2",
        f"{_BLOCK}.mlp.c_fc": f"{_OURS}.mlp.fc1",
        f"{_BLOCK}.mlp.c_proj": f"{_OURS}.mlp.fc2",
    }),
))  # fmt: skip
_NAME = "OpenCLIP's ViT"
_CONFIG = "open_clip_config.json"
_NORM_EPS, _HEAD_WIDTH = 1e-5, 64


def find(held: Held) -> Found | None:
    """Identifies a file of this layout; ``None`` for other layouts.

    Raises:
        CheckpointError: Its head reads all patches, config and tensors contradict each other, or there are tensors
            unknown to the layout.
    """
    if not set(SIGNS[0]) <= held.weights.keys():
        return None
    _check_pooling(held)
    ours, left = TABLE.to_timm(held.weights)
    odd = [name for name in left if not name.startswith(("../", "/"))]
    if odd:
        raise architecture.leftover_error(held, _NAME, odd)
    wanted = architecture.described(ours) | {"norm_eps": _NORM_EPS, "global_pool": "token", "no_embed_class": False}
    wanted["img_size"] = architecture.image_size(held.where, ours["pos_embed"].shape[1], 1, wanted["patch_size"])
    said, notes = _said(held), []
    heads = None
    if said is not None:
        _check(held, said, ours, wanted)
        wanted |= {"act_layer": said["act_layer"], "norm_eps": said["norm_eps"]}
        heads = said["heads"](wanted["embed_dim"])
    elif held.model is None:
        wanted["act_layer"] = "gelu"
        notes.append(
            f"no {_CONFIG} says more of it: GELU is assumed; OpenAI's weights and some others have quick GELU (--model "
            "with a quickgelu name decides)"
        )
    name = held.model or architecture.nearest(families(wanted.get("act_layer") == "quick_gelu"), wanted)
    args, assumed = architecture.arguments(held, name, wanted, heads)
    found = Found(name, args, ours, notes=(*notes, *assumed), left_out=left, table=TABLE)
    return projected(found) if "head.weight" in ours else found


def _said(held: Held) -> dict[str, Any] | None:
    """Values of the config: OpenCLIP's, or that of transformers next to it; ``None`` without one.

    Raises:
        CheckpointError: Its head reads all patches, or an option changes what is computed.
    """
    config = held.config
    if config is None or held.model is not None:
        return None
    if isinstance(config.get("model_cfg"), dict):
        return _of_openclip(held, config["model_cfg"])
    tower = config.get("vision_config")
    if config.get("model_type") not in TYPES or not isinstance(tower, dict):
        return None
    quick = tower.get("hidden_act", "quick_gelu") == "quick_gelu"
    return {
        "act_layer": "quick_gelu" if quick else tower["hidden_act"],
        "norm_eps": tower.get("layer_norm_eps", _NORM_EPS),
        "heads": lambda width: tower.get("num_attention_heads", 12),
        "shown": {
            "width": tower.get("hidden_size"), "layers": tower.get("num_hidden_layers"),
            "patch_size": tower.get("patch_size"), "image_size": tower.get("image_size"),
            "embed_dim": config.get("projection_dim"),
        },
    }  # fmt: skip


def _of_openclip(held: Held, model: Mapping[str, Any]) -> dict[str, Any]:
    tower = model.get("vision_cfg")
    if not isinstance(tower, dict):
        raise CheckpointError(f"its {_CONFIG} has no vision_cfg", where=held.where, seen=", ".join(map(str, model)))
    pools = tower.get("pool_type", "avg" if tower.get("global_average_pool") else "tok")
    refusals = {
        "its head pools all patch tokens by attention": tower.get("attentional_pool"),
        f"its head pools the patch tokens (pool_type {pools!r})": pools != "tok",
        "its image tower is another network": tower.get("timm_model_name"),
    }
    reason = next((reason for reason, holds in refusals.items() if holds), None)
    if reason is not None:
        raise _refusal(held, reason, f"the vision_cfg of its {_CONFIG}")
    options = tower.get("act_kwargs") or {}
    approximate = options.get("approximate") == "tanh"
    strange = sorted(set(options) - {"approximate"}) + sorted(set(tower.get("norm_kwargs") or {}) - {"eps"})
    if strange:
        raise CheckpointError(f"options in its {_CONFIG} that are not supported", where=held.where, seen=strange)
    plain = "gelu_tanh" if approximate else "gelu"
    return {
        "act_layer": "quick_gelu" if model.get("quick_gelu") else plain,
        "norm_eps": (tower.get("norm_kwargs") or {}).get("eps", _NORM_EPS),
        "heads": lambda width: width // tower.get("head_width", _HEAD_WIDTH),
        "shown": {
            "width": tower.get("width"), "layers": tower.get("layers"), "patch_size": tower.get("patch_size"),
            "image_size": tower.get("image_size"), "embed_dim": model.get("embed_dim"),
        },
    }  # fmt: skip


def _check(held: Held, said: Mapping[str, Any], ours: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> None:
    """Checks that config and tensors describe the same model."""
    head = ours.get("head.weight")
    shown = {
        "width": wanted["embed_dim"], "layers": wanted["depth"], "patch_size": wanted["patch_size"],
        "image_size": wanted["img_size"], "embed_dim": None if head is None else head.shape[0],
    }  # fmt: skip
    differences = [
        f"{name} {value} in the config and {shown[name]} in the tensors"
        for name, value in said["shown"].items()
        if value is not None and shown[name] is not None and value not in (shown[name], [shown[name]] * 2)
    ]
    if differences:
        raise CheckpointError(
            "its config contradicts the tensors", where=held.where, seen="; ".join(differences),
            fix=f"Take the {_CONFIG} that belongs to these weights.",
        )  # fmt: skip


def _check_pooling(held: Held) -> None:
    name = next((name for name in held.inside() if name.startswith("attn_pool")), None)
    if name is not None:
        raise _refusal(held, "its head pools all patch tokens by attention, as CoCa's does", f"the tensor {name}")


def _refusal(held: Held, reason: str, seen: str) -> CheckpointError:
    return CheckpointError(
        f"an image tower of OpenCLIP that cannot be reduced exactly: {reason}", where=held.where, seen=seen,
        fix="A CLIP tower that reads its class token alone can be converted.",
    )  # fmt: skip
