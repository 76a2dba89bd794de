"""The layouts that files are known in, one a module of this folder, in the order in which they are asked."""

from collections.abc import Callable, Sequence

import msgspec

from evit_deploy.models.layouts import (
    hf_clip,
    hf_deit,
    hf_dinov2,
    hf_mae,
    hf_vit,
    levit,
    openclip,
    timm_names,
    torchvision_vit,
)
from evit_deploy.models.layouts.found import Found, Held


class Layout(msgspec.Struct, frozen=True):
    """A layout.

    Args:
        name: As messages call it.
        signs: Names that all its files have, for every form: a model inside a larger one is found by them.
        find: Gives what a file holds; ``None`` if it is of another layout.
        types: Values of ``model_type`` in the configs of its files; none if it has no such config.
    """

    name: str
    signs: Sequence[Sequence[str]]
    find: Callable[[Held], Found | None]
    types: tuple[str, ...] = ()


LAYOUTS = (
    Layout("LeViT", levit.SIGNS, levit.find),
    Layout("Hugging Face's DeiT", hf_deit.SIGNS, hf_deit.find, ("deit",)),
    Layout("Hugging Face's ViT-MAE", hf_mae.SIGNS, hf_mae.find, ("vit_mae",)),
    Layout("Hugging Face's ViT", hf_vit.SIGNS, hf_vit.find, ("vit", "vit_msn")),
    Layout("Hugging Face's DINOv2", hf_dinov2.SIGNS, hf_dinov2.find, ("dinov2", "dinov2_with_registers")),
    Layout("Hugging Face's CLIP", hf_clip.SIGNS, hf_clip.find, hf_clip.TYPES),
    Layout("OpenCLIP's ViT", openclip.SIGNS, openclip.find, openclip.TYPES),
    Layout("torchvision's ViT", torchvision_vit.SIGNS, torchvision_vit.find),
    Layout("timm's names", timm_names.SIGNS, timm_names.find),
)
"""Of layouts whose signs are alike, the narrower one comes first; timm's, which fits most, is the last."""

SIGNS = tuple(sign for layout in LAYOUTS for sign in layout.signs)
TYPES = frozenset(kind for layout in LAYOUTS for kind in layout.types)
