"""Hugging Face's DeiT, with a distillation token and two, one or no classifiers.

With one classifier the head does not use the distillation token; timm calls such a token a register.
"""

from evit_deploy.models.layouts.found import Found, Held
from evit_deploy.models.layouts.hugging_face import family as of_transformers
from evit_deploy.models.layouts.hugging_face.family import EMBEDDINGS, SIGN, Family
from evit_deploy.models.layouts.hugging_face.vit import NEW_BLOCKS, OLD_BLOCKS, POOLER, POSITIONS, has_vit_blocks
from evit_deploy.models.layouts.table import Same, Table, layers

SIGNS = ((*SIGN, "embeddings.distillation_token"),)
_TEACHER = (
    POSITIONS,
    *EMBEDDINGS,
    Same("embeddings.distillation_token", "dist_token"),
    *layers({"../cls_classifier": "head", "../distillation_classifier": "head_dist"}),
)
_ALONE = (
    POSITIONS,
    *EMBEDDINGS,
    Same("embeddings.distillation_token", "reg_token"),
    *layers({"../classifier": "head"}),
)


def _family(rows: tuple, families: tuple[str, ...]) -> Family:
    return Family(
        name="Hugging Face's DeiT",
        types=("deit",),
        tables=(Table((*rows, *OLD_BLOCKS)), Table((*rows, *NEW_BLOCKS))),
        families=families,
        norm_eps=1e-12,
        spare=("pooler.", "embeddings.mask_token"),
    )


_WITH_TEACHER = _family(_TEACHER, ("deit_{size}_distilled_patch{patch}_224",))
_WITHOUT = _family(_ALONE, ("deit_{size}_patch{patch}_224",))


def find(held: Held) -> Found | None:
    """Identifies a file of this layout; ``None`` for other layouts."""
    if not has_vit_blocks(held) or "embeddings.distillation_token" not in held.weights:
        return None
    notes = [POOLER] if "pooler.dense.weight" in held.weights else []
    return of_transformers.find(
        held, _WITH_TEACHER if "../cls_classifier.weight" in held.weights else _WITHOUT, notes=notes
    )
