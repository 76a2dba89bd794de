"""Token label maps, an annotator model's predictions for each cell of an image: reading and cropping.

The maps published by the TokenLabeling repository contain the five highest logits of each grid cell and their classes.
Training with them is implemented in :mod:`evit_deploy.training.token_labels`.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from evit_deploy.errors import InputError, first_few


class TokenLabelMaps:
    """The label maps of a folder of images, by image index.

    Args:
        root: Folder of maps, ``<class>/<image's name>.pt``.
        images: The image files.
        classes: Number of classes.

    Raises:
        InputError: The folder does not exist, an image has no map, two images have the same map, or the first map is
            invalid.
    """

    def __init__(self, root: Path, images: Sequence[Path], classes: int) -> None:
        if not root.is_dir():
            raise InputError("no such folder", where=root, wanted="a folder of token label maps")
        self._files, self._classes = [token_label_file(root, image) for image in images], classes
        listed = {
            folder: set(os.listdir(folder)) for folder in {file.parent for file in self._files} if folder.is_dir()
        }
        missing = [file for file in self._files if file.name not in listed.get(file.parent, ())]
        if missing:
            named = first_few(file.relative_to(root) for file in missing)
            raise InputError(
                f"{len(missing)} of {len(self._files)} training images have no token labels", where=root,
                seen=f"no {named}", wanted="<class>/<image's name>.pt for every training image",
            )  # fmt: skip
        seen: set[Path] = set()
        twice = next((file for file in self._files if file in seen or seen.add(file)), None)
        if twice is not None:
            raise InputError("two training images have the same token label file", where=twice,
                             fix="Give the images of a class different names.")  # fmt: skip
        self._shape: tuple[int, ...] = tuple(read_token_labels(self._files[0], classes).shape)

    def load(self, number: int) -> Tensor:
        """Loads an image's map; see :func:`read_token_labels`.

        Raises:
            InputError: It cannot be read, or its size differs from the first map's.
        """
        found = read_token_labels(self._files[number], self._classes)
        if tuple(found.shape) != self._shape:
            seen, wanted = list(found.shape), list(self._shape)
            raise InputError(
                "a token label map of a different size", where=self._files[number], seen=seen, wanted=wanted
            )
        return found


def token_label_file(root: Path, image: Path) -> Path:
    """Path of the map for ``…/<class>/<stem>.JPEG``: ``root/<class>/<stem>.pt``."""
    return root / image.parent.name / f"{image.name.split('.')[0]}.pt"


def read_token_labels(path: Path, classes: int) -> Tensor:
    """Reads one image's map without executing code in the file.

    Args:
        path: The file.
        classes: Number of the model's classes.

    Returns:
        FP32 ``[2, k, H, W]``: the annotator's k highest logits of each cell, and their classes. The released maps have
        k = 5 and are FP16, in which classes up to 2048 are exact.

    Raises:
        InputError: The file does not exist, is not a label map, or has classes that the model does not have.
    """
    if not path.is_file():
        raise InputError("no token labels of this image", where=path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise many kinds of errors
        raise InputError(f"not a token label map ({type(error).__name__})", where=path) from None
    whole = isinstance(content, Tensor) and content.layout == torch.strided and content.device.type == "cpu"
    whole = whole and not (content.is_complex() or content.is_quantized)
    # A view can be much larger than its storage, but a valid map is no larger than its file.
    fits = whole and content.numel() * content.element_size() <= path.stat().st_size
    if not fits or content.dim() != 4 or content.shape[0] != 2 or not content.numel():
        seen = list(content.shape) if isinstance(content, Tensor) else type(content).__name__
        raise InputError("not a token label map", where=path, seen=seen, wanted="a tensor [2, k, rows, columns]")
    if not bool(content.isfinite().all()):
        raise InputError("token labels that are not finite", where=path, wanted="numbers")
    low, high = (int(limit) for limit in content[1].aminmax())
    if low < 0 or high >= classes:
        raise InputError(
            "token labels of unknown classes", where=path, seen=f"{low} to {high}", wanted=f"0 to {classes - 1}"
        )
    return content.float()


def crop_token_labels(
    maps: Tensor,
    boxes: Tensor,
    flipped: Tensor,
    grid: tuple[int, int],
    classes: int,
    label_smoothing: float = 0.0,
    warps: Tensor | None = None,
) -> Tensor:
    """Computes token labels of augmented images: applies crop, flip and warp to the maps, and returns probabilities.

    As in the released code, a cell's logits are 0 for classes outside its five, cells are resampled with RoI-align
    (half a cell is subtracted from the boxes), and the softmax is applied last. The released code passes its boxes with
    rows and columns swapped; this function does not.

    Args:
        maps: ``[B, 2, k, H, W]``; see :func:`read_token_labels`. Computation runs on their device.
        boxes: ``[B, 4]``: left, top, right and bottom of each crop as fractions of the image's width and height.
        flipped: bool ``[B]``: whether the crop was then flipped horizontally.
        grid: Rows and columns of patches.
        classes: Number of the model's classes.
        label_smoothing: Probability that is spread over all classes.
        warps: ``[B, 2, 3]``: maps positions in the augmented image to positions in the flipped crop, both from -1 to 1.
            Positions outside the crop have logits of 0.

    Returns:
        Probabilities, FP32 ``[B, rows · columns, classes]``.
    """
    from torchvision.ops import roi_align

    scores, indices = maps[:, 0].float(), maps[:, 1].long()
    batch, _, height, width = scores.shape
    logits = scores.new_zeros(batch, classes, height, width).scatter_(1, indices, scores)
    sides = (width, height, width, height)  # plain numbers: a tensor would have to be copied to the device
    boxes = torch.stack([column * side for column, side in zip(boxes.to(scores).unbind(1), sides, strict=True)], dim=1)
    cells: Tensor = roi_align(logits, list(boxes.unsqueeze(1)), output_size=grid, aligned=True)
    cells = torch.where(flipped.to(cells.device)[:, None, None, None], cells.flip(3), cells)
    if warps is not None:
        places = F.affine_grid(warps.to(cells), list(cells.shape), align_corners=False)
        cells = F.grid_sample(cells, places, align_corners=False)
    soft = cells.flatten(2).transpose(1, 2).softmax(dim=-1)
    return soft * (1 - label_smoothing) + label_smoothing / classes
