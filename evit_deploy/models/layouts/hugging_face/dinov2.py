"""Hugging Face's DINOv2, with and without registers, up to the giant with its SwiGLU."""

from evit_deploy.errors import CheckpointError
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
from evit_deploy.models.layouts.table import PositionsWithoutRegisters, Row, Same, Table, joined_layers

SIGNS = (SIGN,)
_BLOCK = "encoder.layer.{}"
_NORMS = {"norm1": "norm1", "norm2": "norm2"}
_PLAIN = _NORMS | {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
_SCALES: tuple[Row, ...] = tuple(Same(f"{_BLOCK}.layer_scale{i}.lambda1", f"blocks.{{}}.ls{i}.gamma") for i in (1, 2))
# Plain and gated MLP, each as named in files and in a transformers 5 model in memory.
_BLOCKS: dict[bool, tuple[tuple[Row, ...], tuple[Row, ...]]] = {
    False: (blocks(_BLOCK, OLD_ATTENTION, _PLAIN), blocks(_BLOCK, NEW_ATTENTION, _PLAIN)),
    True: (
        blocks(_BLOCK, OLD_ATTENTION, _NORMS | {"mlp.weights_in": "mlp.fc1", "mlp.weights_out": "mlp.fc2"}),
        (
            *blocks(_BLOCK, NEW_ATTENTION, _NORMS | {"mlp.down_proj": "mlp.fc2"}),
            *joined_layers((f"{_BLOCK}.mlp.gate_proj", f"{_BLOCK}.mlp.up_proj"), "blocks.{}.mlp.fc1"),
        ),
    ),
}


def find(held: Held) -> Found | None:
    """Identifies a file of this layout; ``None`` for other layouts.

    Raises:
        CheckpointError: It has DINOv2's classifier, which also reads the mean of the patches.
    """
    names = held.weights.keys()
    if not set(SIGN) <= names or "encoder.layer.0.norm1.weight" not in names:
        return None
    _check_head(held)
    gated = bool({"encoder.layer.0.mlp.weights_in.weight", "encoder.layer.0.mlp.gate_proj.weight"} & names)
    registers = held.weights.get("embeddings.register_tokens")
    family = _family(0 if registers is None else registers.shape[1], gated=gated)
    return of_transformers.find(held, family, **({"act_layer": "silu"} if gated else {}))


def _family(registers: int, *, gated: bool) -> Family:
    positions = PositionsWithoutRegisters("embeddings.position_embeddings", "pos_embed", registers)
    token = (Same("embeddings.register_tokens", "reg_token"),) if registers else ()
    rows = (positions, *EMBEDDINGS, *token, *_SCALES)
    name = "vit_{size}_patch{patch}_reg4_dinov2" if registers else "vit_{size}_patch{patch}_dinov2"
    return Family(
        name="Hugging Face's DINOv2" + (" with registers" if registers else ""),
        types=("dinov2_with_registers",) if registers else ("dinov2",),
        tables=tuple(Table((*rows, *form)) for form in _BLOCKS[gated]),
        # In timm, the giant has the gated MLP, and all other sizes the plain one.
        families=(name.format(size="giant" if gated else "{size}", patch="{patch}"),),
        norm_eps=1e-6,
        spare=("embeddings.mask_token",),
    )


def _check_head(held: Held) -> None:
    head, token = held.weights.get("../classifier.weight"), held.weights["embeddings.cls_token"]
    if head is None:
        return
    raise CheckpointError(
        "DINOv2 with its classifier, which reads the class token and the mean of all patches", where=held.where,
        seen=f"classifier.weight {list(head.shape)} on tokens of width {token.shape[-1]}",
        wanted="the backbone alone: once tokens are dropped, their mean changes",
        fix="Save the backbone (model.dinov2 or model.dinov2_with_registers) to convert it as an embedding, or train a "
        "classifier on its class token with `evit-deploy train`.",
    )  # fmt: skip
