"""Hugging Face's ViT and ViT-MSN, which share their names: ViTModel, ViTForImageClassification and so on."""

from evit_deploy.models.layouts.found import Found, Held
from evit_deploy.models.layouts.hugging_face import family as of_transformers
from evit_deploy.models.layouts.hugging_face.family import (
    EMBEDDINGS,
    NEW_ATTENTION,
    OLD_ATTENTION,
    SIGN,
    Family,
    blocks,
)
from evit_deploy.models.layouts.table import Same, Table, layers

SIGNS = (SIGN,)
_NORMS = {"layernorm_before": "norm1", "layernorm_after": "norm2"}
OLD_BLOCKS = blocks(
    "encoder.layer.{}", OLD_ATTENTION, _NORMS | {"intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}
)
"""Rows of the blocks as named in files."""
NEW_BLOCKS = blocks("layers.{}", NEW_ATTENTION, _NORMS | {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"})
"""Rows of the blocks as named in a transformers 5 model in memory."""
POSITIONS = Same("embeddings.position_embeddings", "pos_embed")
_OTHERS = (POSITIONS, *EMBEDDINGS, *layers({"../classifier": "head"}))
TABLES = (Table((*_OTHERS, *OLD_BLOCKS)), Table((*_OTHERS, *NEW_BLOCKS)))
POOLER = "the embedding is the class token, last_hidden_state[:, 0], and not the pooler's tanh of a linear layer of it"

_VIT = Family(
    name="Hugging Face's ViT",
    types=("vit",),
    tables=TABLES,
    families=("vit_{size}_patch{patch}_224",),
    norm_eps=1e-12,
    spare=("pooler.", "embeddings.mask_token"),
)
_MSN = Family(
    name="Hugging Face's ViT-MSN",
    types=("vit_msn",),
    tables=TABLES,
    families=("deit_{size}_patch{patch}_224", "vit_{size}_patch{patch}_224"),  # both with ImageNet's preprocessing
    norm_eps=1e-6,
    spare=("embeddings.mask_token",),
)


def find(held: Held) -> Found | None:
    """Identifies a file of this layout; ``None`` for other layouts."""
    if not has_vit_blocks(held):
        return None
    of_msn = held.config is not None and held.config.get("model_type") == "vit_msn"
    notes = [POOLER] if "pooler.dense.weight" in held.weights else []
    return of_transformers.find(held, _MSN if of_msn else _VIT, notes=notes)


def has_vit_blocks(held: Held) -> bool:
    """Whether a file has the embeddings and block names of ViT, which DeiT and ViT-MAE share."""
    norms = {"encoder.layer.0.layernorm_before.weight", "layers.0.layernorm_before.weight"}
    return set(SIGN) <= held.weights.keys() and bool(norms & held.weights.keys())
