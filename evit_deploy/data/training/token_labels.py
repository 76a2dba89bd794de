"""Token label maps: what an annotator saw in each cell of an image, read from files and cropped as the image is.

The maps, as the TokenLabeling repository publishes them, hold the five highest logits of each cell of a grid and their
classes; how a model learns from them is :mod:`evit_deploy.training.token_labels`.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from evit_deploy.errors import InputError, first_few


class TokenLabelMaps:
    """The label maps of a folder of images, by the image's number.

    Args:
        root: Folder of maps, ``<class>/<image's name>.pt``.
        images: The images' files.
        classes: How many classes there are.

    Raises:
        InputError: There is no such folder, an image has no map, two images would share one, or the first one is not a
            map of these classes.
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
        """An image's map, see :func:`read_token_labels`.

        Raises:
            InputError: It cannot be read, or is of another size than the first.
        """
        found = read_token_labels(self._files[number], self._classes)
        if tuple(found.shape) != self._shape:
            seen, wanted = list(found.shape), list(self._shape)
            raise InputError(
                "a token label map of a different size", where=self._files[number], seen=seen, wanted=wanted
            )
        return found


def token_label_file(root: Path, image: Path) -> Path:
    """Where the map of ``…/<class>/<stem>.JPEG`` lies: ``root/<class>/<stem>.pt``."""
    return root / image.parent.name / f"{image.name.split('.')[0]}.pt"


def read_token_labels(path: Path, classes: int) -> Tensor:
    """Reads one image's map without running anything in the file.

    Args:
        path: The file.
        classes: How many classes the model has.

    Returns:
        FP32 ``[2, k, H, W]``: the annotator's k highest logits of each cell, and their classes. The released maps have
        k = 5 and are FP16, in which classes up to 2048 are exact.

    Raises:
        InputError: No such file, not such a map, or classes that the model has not.
    """
    if not path.is_file():
        raise InputError("no token labels of this image", where=path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise many kinds
        raise InputError(f"not a token label map ({type(error).__name__})", where=path) from None
    whole = isinstance(content, Tensor) and content.layout == torch.strided and content.device.type == "cpu"
    whole = whole and not (content.is_complex() or content.is_quantized)
    # A view can repeat a number without end; a map is no larger than its file.
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
    """Token labels of augmented images: maps follow crop, flip and warp of the images, and become probabilities.

    As in the released code, a cell's logits are 0 for classes outside its five, cells are resampled by RoI-align (half
    a cell's offset taken off), and the softmax comes last. The released code hands its boxes over with rows and columns
    exchanged; here they are not.

    Args:
        maps: ``[B, 2, k, H, W]``, see :func:`read_token_labels`; on the device that is to compute.
        boxes: ``[B, 4]``: left, top, right and bottom of each crop as shares of the image's width and height.
        flipped: bool ``[B]``: whether the crop was then mirrored left to right.
        grid: Rows and columns of patches.
        classes: How many classes the model has.
        label_smoothing: Share that is spread over all classes.
        warps: ``[B, 2, 3]``: where in the mirrored crop a place of the image comes from, both from -1 to 1. From
            outside the crop come logits of 0.

    Returns:
        Probabilities, FP32 ``[B, rows · columns, classes]``.
    """
    from torchvision.ops import roi_align

    scores, indices = maps[:, 0].float(), maps[:, 1].long()
    batch, _, height, width = scores.shape
    logits = scores.new_zeros(batch, classes, height, width).scatter_(1, indices, scores)
    sides = (width, height, width, height)  # by themselves: a tensor of them would have to be copied to the device
    boxes = torch.stack([column * side for column, side in zip(boxes.to(scores).unbind(1), sides, strict=True)], dim=1)
    cells: Tensor = roi_align(logits, list(boxes.unsqueeze(1)), output_size=grid, aligned=True)
    cells = torch.where(flipped.to(cells.device)[:, None, None, None], cells.flip(3), cells)
    if warps is not None:
        places = F.affine_grid(warps.to(cells), list(cells.shape), align_corners=False)
        cells = F.grid_sample(cells, places, align_corners=False)
    soft = cells.flatten(2).transpose(1, 2).softmax(dim=-1)
    return soft * (1 - label_smoothing) + label_smoothing / classes
