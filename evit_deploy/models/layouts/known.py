"""All known layouts, one per module here or in ``hugging_face``, in the order in which they are tried."""

from collections.abc import Callable, Sequence

import msgspec

from evit_deploy.models.layouts import levit, openclip, timm_names, torchvision_vit
from evit_deploy.models.layouts.found import Found, Held
from evit_deploy.models.layouts.hugging_face import clip, deit, dinov2, mae, vit


class Layout(msgspec.Struct, frozen=True):
    """A layout.

    Args:
        name: Name in messages.
        signs: For each form, names found in all its files; used to find a model inside a larger one.
        find: Identifies a file; returns ``None`` for other layouts.
        types: Its values of ``model_type`` in configs; empty if it has no such config.
    """

    name: str
    signs: Sequence[Sequence[str]]
    find: Callable[[Held], Found | None]
    types: tuple[str, ...] = ()


LAYOUTS = (
    Layout("LeViT", levit.SIGNS, levit.find),
    Layout("Hugging Face's DeiT", deit.SIGNS, deit.find, ("deit",)),
    Layout("Hugging Face's ViT-MAE", mae.SIGNS, mae.find, ("vit_mae",)),
    Layout("Hugging Face's ViT", vit.SIGNS, vit.find, ("vit", "vit_msn")),
    Layout("Hugging Face's DINOv2", dinov2.SIGNS, dinov2.find, ("dinov2", "dinov2_with_registers")),
    Layout("Hugging Face's CLIP", clip.SIGNS, clip.find, clip.TYPES),
    Layout("OpenCLIP's ViT", openclip.SIGNS, openclip.find, openclip.TYPES),
    Layout("torchvision's ViT", torchvision_vit.SIGNS, torchvision_vit.find),
    Layout("timm's names", timm_names.SIGNS, timm_names.find),
)
"""Among similar layouts, the more specific one comes first; timm's, which matches most files, is last."""

SIGNS = tuple(sign for layout in LAYOUTS for sign in layout.signs)
TYPES = frozenset(kind for layout in LAYOUTS for kind in layout.types)
