"""torchvision's ViT: vit_b_16, vit_b_32, vit_l_16, vit_l_32 and vit_h_14."""

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.errors import CheckpointError
from evit_deploy.models.layouts import architecture
from evit_deploy.models.layouts.found import Found, Held
from evit_deploy.models.layouts.table import Same, Table, layers

SIGNS = (("class_token", "conv_proj.weight", "encoder.pos_embedding"),)
_BLOCK, _OURS = "encoder.layers.encoder_layer_{}", "blocks.{}"
_NAME = "torchvision's ViT"


def _table(mlp: tuple[str, str]) -> Table:
    return Table((
        Same("class_token", "cls_token"),
        Same("encoder.pos_embedding", "pos_embed"),
        Same(f"{_BLOCK}.self_attention.in_proj_weight", f"{_OURS}.attn.qkv.weight"),
        Same(f"{_BLOCK}.self_attention.in_proj_bias", f"{_OURS}.attn.qkv.bias"),
        *layers({
            "conv_proj": "patch_embed.proj",
            "encoder.ln": "norm",
            "heads.head": "head",
            f"{_BLOCK}.self_attention.out_proj": f"{_OURS}.attn.proj",
            f"{_BLOCK}.ln_1": f"{_OURS}.norm1",
            f"{_BLOCK}.ln_2": f"{_OURS}.norm2",
            f"{_BLOCK}.mlp.{mlp[0]}": f"{_OURS}.mlp.fc1",
            f"{_BLOCK}.mlp.{mlp[1]}": f"{_OURS}.mlp.fc2",
        }),
    ))  # fmt: skip


TABLES = (_table(("0", "3")), _table(("linear_1", "linear_2")))
"""Current names, and those of the released files."""


def find(held: Held) -> Found | None:
    """Identifies a file of this layout; ``None`` for other layouts.

    Raises:
        CheckpointError: It has a layer before the classifier, or tensors unknown to the layout.
    """
    if not set(SIGNS[0]) <= held.weights.keys():
        return None
    ours, left, table = min(
        ((*table.to_timm(held.weights), table) for table in TABLES), key=lambda found: len(found[1])
    )
    if "heads.pre_logits.weight" in left:
        raise CheckpointError(
            "a ViT with a layer and a tanh before the classifier", where=held.where, seen="heads.pre_logits",
            wanted="a classifier of one linear layer (representation_size=None)",
        )  # fmt: skip
    odd = [name for name in left if not name.startswith(("../", "/"))]
    if odd:
        raise architecture.leftover_error(held, _NAME, odd)
    wanted = architecture.described(ours) | {"norm_eps": 1e-6, "global_pool": "token", "no_embed_class": False}
    wanted["img_size"] = architecture.image_size(held.where, ours["pos_embed"].shape[1], 1, wanted["patch_size"])
    # DeiT names first, because their preprocessing has torchvision's mean and standard deviation.
    families = ("deit_{size}_patch{patch}_224", "vit_{size}_patch{patch}_224")
    name = held.model or architecture.nearest(families, wanted)
    args, assumed = architecture.arguments(held, name, wanted, None)
    preprocess = _prepared(wanted["img_size"])
    return Found(name, args, ours, notes=tuple(assumed), left_out=left, preprocess=preprocess, table=table)


def _prepared(size: int) -> Preprocess:
    """The preprocessing of torchvision's own transforms.

    Mean and deviation are the same for all of its ViTs. The original weights at 224 pixels use a crop of 224 from 256,
    bilinear; the larger SWAG weights use the whole image, bicubic.
    """
    first = size <= 224
    return Preprocess((size, size), 0.875 if first else 1.0, "center", "bilinear" if first else "bicubic")
