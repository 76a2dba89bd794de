"""Hugging Face's CLIP: the vision tower, alone or within the full model, with its projection if the file has one."""

from typing import Any

import msgspec

from evit_deploy.errors import CheckpointError
from evit_deploy.models.layouts.found import Found, Held
from evit_deploy.models.layouts.hugging_face import family as of_transformers
from evit_deploy.models.layouts.hugging_face.family import Family, blocks
from evit_deploy.models.layouts.table import Same, Table, layers

SIGNS = (("embeddings.class_embedding", "embeddings.patch_embedding.weight", "pre_layrnorm.weight"),)
TYPES = ("clip_vision_model", "clip")
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
_LAYERS = {"layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
# In files of transformers 4 and of a full CLIP, the projection is a sibling of the tower.
_PROJECTIONS = ("../visual_projection.weight", "visual_projection.weight")
TABLES = tuple(
    Table((
        Same("embeddings.class_embedding", "cls_token", axes=2),
        Same("embeddings.patch_embedding.weight", "patch_embed.proj.weight"),
        Same("embeddings.position_embedding.weight", "pos_embed", axes=1),
        *layers({"pre_layrnorm": "norm_pre", "post_layernorm": "norm"}),
        *blocks("encoder.layers.{}", _ATTENTION, _LAYERS),
        Same(projection, "head.weight"),
    ))
    for projection in _PROJECTIONS
)  # fmt: skip
# Defaults of transformers, for values missing from a config.
_DEFAULTS: dict[str, Any] = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_attention_heads": 12}

# Written into every config, even for models without classes.
_LABELS = ("id2label", "label2id", "num_labels")


def find(held: Held) -> Found | None:
    """Identifies a file of this layout; ``None`` for other layouts.

    Raises:
        CheckpointError: It has a classifier, which reads the mean of the patches, or tensors unknown to CLIP.
    """
    if not set(SIGNS[0]) <= held.weights.keys():
        return None
    _check_classifier(held)
    config = _config(held)
    quick = (config or _DEFAULTS)["hidden_act"] == "quick_gelu"
    family = Family(
        name="Hugging Face's CLIP",
        types=TYPES[:1],
        tables=TABLES,
        families=families(quick),
        norm_eps=_DEFAULTS["layer_norm_eps"],
        spare=("embeddings.position_ids",),
    )
    notes = []
    if config is None:
        quick = held.model is None or "quickgelu" in held.model
        config = {"model_type": TYPES[0], "hidden_act": "quick_gelu" if quick else "gelu"}
        if held.model is None:
            notes = ["no config.json says more of it: LayerNorm eps 1e-05 and OpenAI's quick GELU are assumed"]
    found = of_transformers.find(msgspec.structs.replace(held, config=config), family, notes=notes)
    if "head.weight" not in found.weights:
        notes = (*found.notes, "the file has no projection: the embedding is the pooler_output, the tower's own")
        return msgspec.structs.replace(found, notes=notes)
    return projected(found)


def families(quick: bool) -> tuple[str, ...]:
    """timm names of CLIP towers, with ``{size}`` and ``{patch}``.

    Args:
        quick: Whether the activation is OpenAI's quick GELU; timm has names for some of its sizes only.
    """
    plain = "vit_{size}_patch{patch}_clip_224"
    return ("vit_{size}_patch{patch}_clip_quickgelu_224", plain) if quick else (plain,)


def projected(found: Found) -> Found:
    """Treats the final matrix as a projection instead of a classifier."""
    args = found.model_args | {"num_classes": 0, "projection": found.weights["head.weight"].shape[0]}
    return msgspec.structs.replace(found, model_args=args)


def _config(held: Held) -> dict[str, Any] | None:
    """The complete config of the vision tower; ``None`` without one, or if the user gave a model."""
    config = held.config
    if config is None or held.model is not None or "model_type" not in config:
        return None
    tower = config.get("vision_config") if config["model_type"] != TYPES[0] else config
    if not isinstance(tower, dict) or "model_type" not in tower:  # written before nested configs had a type
        tower = {"model_type": TYPES[0], **(tower if isinstance(tower, dict) else {})}
    said = {name: value for name, value in tower.items() if name not in _LABELS}
    return _DEFAULTS | said


def _check_classifier(held: Held) -> None:
    head = next((name for name in held.weights if name.endswith("classifier.weight") and "/" in name), None)
    if head is not None:
        raise CheckpointError(
            "CLIP with a classifier, which reads the mean of all patches", where=held.where,
            seen=f"the tensor {head.removeprefix('../')}",
            wanted="the tower: once tokens are dropped, their mean changes",
            fix="Save the vision model alone to convert it as an embedding, or train a classifier on its class token "
            "with `evit-deploy train`.",
        )  # fmt: skip
