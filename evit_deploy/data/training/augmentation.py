"""Extends timm's augmentation to return its parameters, for token labels and for operations on the device."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor

GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateXRel", "TranslateY", "TranslateYRel")
"""timm's augmentations that move pixels; all others change colors."""


def operations_of(transform: Any) -> Iterator[Any]:
    """The operations that timm's AutoAugment or RandAugment draws from."""
    for stage in transform.transforms:
        for policy in getattr(stage, "policy", None) or [getattr(stage, "ops", [])]:
            yield from policy


class CropAndFlip:
    """Random resized crop and horizontal flip that also returns its parameters, for token labels.

    Args:
        size: Height and width of the result.
        scale: Range of the crop's area as a fraction of the image's.
        ratio: Range of its width over its height.
        flip: Probability of a horizontal flip.
        interpolation: timm's name of the resampling filter.
    """

    def __init__(
        self,
        size: tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        interpolation: str = "bicubic",
    ) -> None:
        from timm.data.transforms import str_to_interp_mode

        self.size, self.scale, self.ratio, self.flip = list(size), list(scale), list(ratio), flip
        self.interpolation: Any = str_to_interp_mode(interpolation)

    def __call__(self, image: Any) -> tuple[Any, Tensor, bool]:
        """Returns a PIL image's crop, its box in the form for ``crop_token_labels``, and whether it was flipped."""
        from torchvision.transforms import RandomResizedCrop
        from torchvision.transforms import functional as TF

        top, left, height, width = RandomResizedCrop.get_params(image, self.scale, self.ratio)
        crop: Any = TF.resized_crop(image, top, left, height, width, self.size, self.interpolation)
        box = torch.tensor([left, top, left + width, top + height]) / torch.tensor([*image.size, *image.size])
        flipped = bool(torch.rand(()) < self.flip)
        return TF.hflip(crop) if flipped else crop, box, flipped


class Warp:
    """Replaces a PIL image in timm's geometric augmentations and records their transformations.

    Args:
        size: Width and height of the image.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size, self._matrix = size, torch.eye(3, dtype=torch.float64)

    def transform(self, size: tuple[int, int], method: Any, data: Any, **_: Any) -> "Warp":
        """Like ``PIL.Image.Image.transform`` with an affine matrix, which maps pixels of the result to the image's."""
        assert size == self.size
        self._matrix = self._matrix @ torch.tensor([*data, 0, 0, 1], dtype=torch.float64).view(3, 3)
        return self

    def rotate(self, angle: float, **_: Any) -> "Warp":
        """Like ``PIL.Image.Image.rotate``: around the center, in degrees, counterclockwise."""
        cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        x, y = (side / 2 for side in self.size)
        matrix = (cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y)
        return self.transform(self.size, None, matrix)

    def places(self) -> Tensor:
        """float32 ``[2, 3]``: maps positions in the result to positions in the image, both from -1 to 1."""
        width, height = self.size
        pixels = torch.tensor([[width / 2, 0, width / 2], [0, height / 2, height / 2], [0, 0, 1]], dtype=torch.float64)
        return (pixels.inverse() @ self._matrix @ pixels)[:2].float()


class _Noted:
    """A geometric augmentation that is also applied to the current :class:`Warp`."""

    def __init__(self, function: Callable[..., Any], owner: "FollowedTransform") -> None:
        self._function, self._owner = function, owner

    def __call__(self, image: Any, *arguments: Any, **named: Any) -> Any:
        self._function(self._owner.warp, *arguments, **named)
        return self._function(image, *arguments, **named)


class FollowedTransform:
    """timm's training transform, extended to return the parameters that token labels need.

    Args:
        crop: Replacement for timm's crop and flip.
        varied: timm's transforms after them, including AutoAugment or RandAugment; modified in place.
        final: timm's final transforms, to a tensor.
    """

    def __init__(self, crop: CropAndFlip, varied: Any, final: Callable[[Any], Tensor]) -> None:
        self._crop, self._varied, self._final = crop, varied, final
        self.warp = Warp((1, 1))
        for operation in operations_of(varied):
            if operation.name in GEOMETRIC:
                operation.aug_fn = _Noted(operation.aug_fn, self)

    def __call__(self, image: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Transforms a PIL image.

        Returns:
            The image ``[C, H, W]`` and one image's arguments for
            :func:`evit_deploy.data.training.token_labels.crop_token_labels`: its crop's box ``[4]``, whether it was
            flipped, and its warp ``[2, 3]``.
        """
        crop, box, flipped = self._crop(image)
        self.warp = Warp(crop.size)
        shown = self._final(self._varied(crop))
        return shown, box, torch.tensor(flipped), self.warp.places()


class ErasedTransform:
    """A training transform that also returns the rectangle to erase.

    Normalized images are erased with noise, so :func:`erase_` does this after normalization on the device. timm draws
    the rectangle as usual, after all other augmentations; the seed of the noise is drawn next.

    Args:
        transform: Transforms a PIL image to a uint8 tensor ``[C, H, W]``, or to a tuple that begins with one.
        probability: Probability of erasing a rectangle.
    """

    def __init__(self, transform: Callable[[Any], Any], probability: float) -> None:
        self._transform = transform
        # Filled with a constant instead of noise, because the filling is discarded.
        self._erasing = RandomErasing(probability, mode="const", device="cpu") if probability else None

    def __call__(self, image: Any) -> tuple[Tensor, ...]:
        """Returns the tensor, a row int64 ``[5]`` for :func:`erase_`, and the transform's other results."""
        made = self._transform(image)
        shown, *rest = made if isinstance(made, tuple) else (made,)
        noted = _Rectangle(shown)
        if self._erasing is not None:
            self._erasing(noted)
        seed = int(torch.randint(2**62, ())) if noted.place[2] else 0
        return shown, torch.tensor([seed, *noted.place]), *rest


class _Rectangle:
    """Replaces an image in timm's random erasing and records the erased rectangle."""

    def __init__(self, image: Tensor) -> None:
        self.size, self.dtype = image.size, torch.float32
        self.place = (0, 0, 0, 0)

    def __setitem__(self, where: tuple[slice, slice, slice], filling: Tensor) -> None:
        rows, columns = where[1:]
        self.place = (rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)


def erase_(images: Tensor, rectangles: Tensor) -> Tensor:
    """Replaces a rectangle of each image with noise from its own seed, in place.

    The same seed produces different noise on different kinds of devices.

    Args:
        images: Normalized, ``[B, C, H, W]``.
        rectangles: int64 ``[B, 5]`` on the CPU: seed, top, left, height and width in pixels; height 0 erases nothing.

    Returns:
        The images.
    """
    generator = torch.Generator(images.device)
    for image, (seed, top, left, height, width) in zip(images, rectangles.tolist(), strict=True):
        if height:
            place = image[:, top : top + height, left : left + width]
            noise = torch.empty(place.shape, dtype=images.dtype, device=images.device)
            place.copy_(noise.normal_(generator=generator.manual_seed(seed)))
    return images
