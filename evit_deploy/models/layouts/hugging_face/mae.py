"""Hugging Face's ViT-MAE: the encoder, named as in ViT. The decoder, used only in pre-training, is left out."""

from evit_deploy.models.layouts.found import Found, Held
from evit_deploy.models.layouts.hugging_face import family as of_transformers
from evit_deploy.models.layouts.hugging_face.family import SIGN, Family
from evit_deploy.models.layouts.hugging_face.vit import TABLES, has_vit_blocks

SIGNS = (SIGN,)
_MAE = Family(
    name="Hugging Face's ViT-MAE",
    types=("vit_mae",),
    tables=TABLES,
    # For sizes without an MAE name in timm: DeiT has the same preprocessing.
    families=("vit_{size}_patch{patch}_224.mae", "deit_{size}_patch{patch}_224", "vit_{size}_patch{patch}_224"),
    norm_eps=1e-12,
)


def find(held: Held) -> Found | None:
    """Identifies a file of this layout; ``None`` for other layouts."""
    typed = held.config is not None and held.config.get("model_type") == "vit_mae"
    if not has_vit_blocks(held) or not (typed or "../decoder.decoder_embed.weight" in held.weights):
        return None
    return of_transformers.find(held, _MAE)
