"""Deployment preprocessing, from an image to the model's input, as recorded in a manifest.

A thin layer over ``timm.data``, which is imported lazily: reading a manifest requires neither timm nor NumPy.
"""

import functools
import math
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from evit_deploy.errors import InputError
from evit_deploy.recipe.sections import CropMode, Interpolation

CENTER_FLOOR = "center-floor"
LARGEST_IMAGE = 8192
"""Maximum side in pixels, far above the image sizes of real models."""

if TYPE_CHECKING:
    import torch
    from PIL import Image


class Preprocess(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Deployment preprocessing: resize to size / crop_pct, crop, scale to 0..1, subtract mean, divide by std.

    Args:
        size: Height and width of the input in pixels.
        crop_pct: Fraction of the resized image's side that the crop keeps.
        crop_mode: timm's crop mode: ``center``, ``squash`` or ``border``. In addition, ``center-floor`` is like
            ``center``, but if the margins cannot be equal, the smaller one is always at the left or top. Hugging Face's
            processors round this way; torchvision rounds half of such margins the other way.
        interpolation: timm's name of the resampling filter.
        mean: One value per channel, for images scaled to 0..1.
        std: One value per channel.

    Raises:
        InputError: A value is invalid.
    """

    size: tuple[int, int]
    crop_pct: float = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if not all(0 < side <= LARGEST_IMAGE for side in self.size):
            raise InputError(f"size is {self.size}", wanted=f"two sides of 1 to {LARGEST_IMAGE} pixels")
        for field, known in (("interpolation", Interpolation), ("crop_mode", CropMode)):
            value = getattr(self, field)
            if value not in typing.get_args(known):
                raise InputError(f"{field} is {value!r}, none of {', '.join(typing.get_args(known))}")
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)):
            raise InputError(f"mean {self.mean} and std {self.std} are not all finite")
        if not all(value > 0 for value in self.std):
            raise InputError(f"images are divided by std, {self.std}")
        if not self.mean or len(self.mean) != len(self.std):
            raise InputError(f"mean {self.mean} and std {self.std} are of different lengths")
        if not 0 < self.crop_pct <= 4:
            raise InputError(f"crop_pct is {self.crop_pct}", wanted="more than 0, at most 4")

    @classmethod
    def from_model(cls, model: Any, image_size: int | tuple[int, int] | None = None) -> "Preprocess":
        """Reads the preprocessing that timm records for a model.

        Args:
            model: A timm model, or a ``pretrained_cfg`` mapping.
            image_size: Input size in pixels; by default, the size that the model was built for.
        """
        from timm.data import resolve_data_config

        settings = model if isinstance(model, Mapping) else getattr(model, "pretrained_cfg", None)
        found = resolve_data_config({}, pretrained_cfg=dict(settings or {"input_size": (3, 224, 224)}))
        if image_size is None:  # the model may have been built for a different size than its weights
            image_size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        size: Any = image_size or found["input_size"][1:]
        height, width = (size, size) if isinstance(size, int) else size
        return cls(
            size=(int(height), int(width)),
            crop_pct=float(found["crop_pct"]),
            crop_mode=found["crop_mode"],
            interpolation=found["interpolation"],
            mean=tuple(float(value) for value in found["mean"]),
            std=tuple(float(value) for value in found["std"]),
        )

    def transform(self) -> "Callable[[Image.Image], torch.Tensor]":
        """Returns the evaluation transform, from an RGB image to float32 ``[3, H, W]``."""
        return _transform(self)


@functools.lru_cache(maxsize=8)
def _transform(preprocess: Preprocess) -> "Callable[[Image.Image], torch.Tensor]":
    from timm.data import create_transform
    from torchvision.transforms import CenterCrop

    floors = preprocess.crop_mode == CENTER_FLOOR
    transform: Any = create_transform(
        (3, *preprocess.size),
        is_training=False,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
        crop_pct=preprocess.crop_pct,
        crop_mode="center" if floors else preprocess.crop_mode,
    )
    if floors:
        transform.transforms = [
            _floor_crop(one) if isinstance(one, CenterCrop) else one for one in transform.transforms
        ]
    return transform


def _floor_crop(crop: Any) -> "Callable[[Image.Image], Image.Image]":
    """Torchvision's center crop with margins rounded down; smaller images are padded with black, as in torchvision."""
    from PIL import Image

    def cropped(image: "Image.Image") -> "Image.Image":
        height, width = crop.size
        if image.width < width or image.height < height:
            padded = Image.new(image.mode, (max(width, image.width), max(height, image.height)))
            padded.paste(image, ((padded.width - image.width) // 2, (padded.height - image.height) // 2))
            image = padded
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))

    return cropped
