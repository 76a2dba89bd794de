"""Token labelling ("All Tokens Matter", arXiv 2104.10858): every patch token learns a label of its own.

An annotator has classified every cell of a grid on each training image; its maps, as the TokenLabeling repository
publishes them, hold the five highest logits of each cell and their classes. What a training loop needs, in order::

    map = read_token_labels(token_label_file(root, image), classes)    # per image: [2, 5, H, W]
    labels = crop_token_labels(maps, boxes, flipped, grid, classes)    # per batch: [B, patches, classes]
    out = token_logits(model, images)                                  # class_logits, token_logits, kept
    loss = token_label_loss(*out, targets, labels, weight=1.0)

With token reduction a patch token is not where it was, and some are gone: labels are gathered by the *original patch
numbers* of the tokens that are left. The fused token stands for many patches; it has no label and no part in the loss.
"""

from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evit_deploy.errors import InputError, UnsupportedModelError
from evit_deploy.tokens.reduce import TokenReducer

FUSED = -1
"""Patch number of the fused token."""


class TokenLogits(NamedTuple):
    """What a model says while it learns from token labels; :func:`token_label_loss` takes it as it is.

    Args:
        class_logits: ``[B, classes]``, of the class token alone.
        token_logits: ``[B, T, classes]``, of the T tokens that are left.
        kept: int64 ``[B, T]``: the patch that each of them is, :data:`FUSED` for a fused one.
    """

    class_logits: Tensor
    token_logits: Tensor
    kept: Tensor


class MixToken(msgspec.Struct, frozen=True):
    """MixToken: a box of patch tokens of each image comes from the image at the other end of the batch.

    Tokens are mixed after the stem, so that no patch holds parts of two images. The released code puts the token
    *logits* back in their places before the loss; tokens that were removed have none, so the *labels* move instead,
    which is the same sum.

    Args:
        grid: Rows and columns of patches.
        box: First row, first column, end row, end column.
    """

    grid: tuple[int, int]
    box: tuple[int, int, int, int]

    @classmethod
    def draw(cls, grid: tuple[int, int], rng: np.random.Generator, beta: float = 1.0) -> "MixToken":
        """A box anywhere, cut off at the borders, that covers 1 − λ of the grid, λ from Beta(beta, beta)."""
        side = (1 - rng.beta(beta, beta)) ** 0.5
        ends = []
        for size in grid:
            half, middle = int(size * side) // 2, int(rng.integers(size))
            start = middle - half
            ends.append((max(start, 0), min(start + int(size * side), size)))
        (top, bottom), (left, right) = ends
        return cls(grid, (top, left, bottom, right))

    @property
    def share(self) -> float:
        """λ as it came out: how much of the grid an image keeps for itself."""
        top, left, bottom, right = self.box
        return 1 - (bottom - top) * (right - left) / (self.grid[0] * self.grid[1])

    def tokens(self, x: Tensor) -> Tensor:
        """Mixes patch tokens, or their labels, ``[B, patches, …]``."""
        top, left, bottom, right = self.box
        inside = torch.zeros(self.grid, dtype=torch.bool, device=x.device)
        inside[top:bottom, left:right] = True
        return torch.where(inside.flatten()[:, None], x.flip(0), x)

    def labels(self, y: Tensor, classes: int) -> Tensor:
        """Mixes an image's own labels: int64 ``[B]`` or soft ``[B, classes]`` to soft ``[B, classes]``."""
        soft = y.float() if y.dim() == 2 else F.one_hot(y, classes).float()
        return self.share * soft + (1 - self.share) * soft.flip(0)


def token_logits(model: Any, images: Tensor, mix: MixToken | None = None) -> TokenLogits:
    """Runs a model, reduced or dense, in the mode it is in, and keeps its two classifiers apart.

    Args:
        model: One with a classifier on every token: an LV-ViT.
        images: ``[B, C, H, W]``.
        mix: Mixes the patch tokens after the stem; the labels are the caller's to mix.

    Raises:
        UnsupportedModelError: It has no such classifier.
    """
    if not isinstance(getattr(model, "aux_head", None), nn.Linear):
        raise UnsupportedModelError(type(model).__name__, ["it has no classifier on every token, as LV-ViT has"])
    reduced: list[tuple[Tensor, bool]] = []

    def note(reducer: nn.Module, _: Any, output: tuple[Tensor, Tensor]) -> None:
        assert isinstance(reducer, TokenReducer)
        reduced.append((output[1], reducer.plan.fused))

    handles = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, TokenReducer)]
    if mix is not None:
        handles.append(model.patch_embed.register_forward_hook(lambda _, __, tokens: mix.tokens(tokens)))
    try:
        features = model.forward_features(images)
    finally:
        for handle in handles:
            handle.remove()
    kept = _patch_numbers(reduced, len(images), model.patch_embed.num_patches, images.device)
    return TokenLogits(model.class_logits(features), model.token_logits(features), kept)


def _patch_numbers(reduced: list[tuple[Tensor, bool]], batch: int, patches: int, device: torch.device) -> Tensor:
    """As ``tokens.plan.original_patches``, on the device and after the last location."""
    numbers = torch.arange(patches, device=device).expand(batch, -1)
    for kept, fused in reduced:
        numbers = numbers.gather(1, kept.long())
        if fused:
            numbers = F.pad(numbers, (0, 1), value=FUSED)
    return numbers


class WithTokenLogits(nn.Module):
    """:func:`token_logits` as a module, for what wraps a module and calls it (``DistributedDataParallel``).

    Args:
        model: The model; its own ``state_dict`` is the one to save.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, mix: MixToken | None = None) -> TokenLogits:
        """See :func:`token_logits`."""
        return token_logits(self.model, images, mix)


def token_label_loss(
    class_logits: Tensor,
    token_logits: Tensor,
    kept: Tensor,
    labels: Tensor,
    token_labels: Tensor,
    weight: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of the class token, plus ``weight`` times the mean soft cross-entropy of the tokens with a label.

    Args:
        class_logits: See :class:`TokenLogits`.
        token_logits: See :class:`TokenLogits`.
        kept: See :class:`TokenLogits`.
        labels: int64 ``[B]``, or probabilities ``[B, classes]``.
        token_labels: Probabilities ``[B, patches, classes]``, one row a patch of the image (all of them).
        weight: Of the tokens' part; the paper's is 1.
        label_smoothing: Of the class token's part.

    Raises:
        InputError: The shapes do not fit each other.
    """
    batch, _, classes = token_logits.shape
    if token_labels.dim() != 3 or (token_labels.shape[0], token_labels.shape[2]) != (batch, classes):
        raise InputError(
            "token labels of other tokens", seen=list(token_labels.shape), wanted=f"[{batch}, patches, {classes}]"
        )
    loss = F.cross_entropy(class_logits.float(), labels, label_smoothing=label_smoothing)
    known = kept != FUSED
    wanted = token_labels.gather(1, kept.clamp(min=0).unsqueeze(-1).expand(-1, -1, classes))
    each = -(wanted * token_logits.float().log_softmax(dim=-1)).sum(dim=-1)
    return loss + weight * (each * known).sum() / known.sum().clamp(min=1)


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
    if not isinstance(content, Tensor) or content.dim() != 4 or content.shape[0] != 2 or not content.numel():
        seen = list(content.shape) if isinstance(content, Tensor) else type(content).__name__
        raise InputError("not a token label map", where=path, seen=seen, wanted="a tensor [2, k, rows, columns]")
    low, high = (int(limit) for limit in content[1].aminmax())
    if low < 0 or high >= classes:
        raise InputError(
            "token labels of other classes", where=path, seen=f"{low} to {high}", wanted=f"0 to {classes - 1}"
        )
    return content.float()


def crop_token_labels(
    maps: Tensor,
    boxes: Tensor,
    flipped: Tensor,
    grid: tuple[int, int],
    classes: int,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Token labels of augmented images: the map follows the image's crop, then its flip, and becomes probabilities.

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

    Returns:
        Probabilities, FP32 ``[B, rows · columns, classes]``.
    """
    from torchvision.ops import roi_align

    scores, indices = maps[:, 0].float(), maps[:, 1].long()
    batch, _, height, width = scores.shape
    logits = scores.new_zeros(batch, classes, height, width).scatter_(1, indices, scores)
    boxes = boxes.to(scores) * scores.new_tensor([width, height, width, height])
    cells: Tensor = roi_align(logits, list(boxes.unsqueeze(1)), output_size=grid, aligned=True)
    cells = torch.where(flipped.to(cells.device)[:, None, None, None], cells.flip(3), cells)
    soft = cells.flatten(2).transpose(1, 2).softmax(dim=-1)
    return soft * (1 - label_smoothing) + label_smoothing / classes


class CropAndFlip:
    """Random resized crop and mirroring of an image that says what it did, so that the token labels can follow.

    Args:
        size: Height and width of the result.
        scale: Range of the crop's share of the image's area.
        ratio: Range of its width over its height.
        flip: Probability of mirroring.
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
        """A PIL image to the crop, its box (see :func:`crop_token_labels`), and whether it was mirrored."""
        from torchvision.transforms import RandomResizedCrop
        from torchvision.transforms import functional as TF

        top, left, height, width = RandomResizedCrop.get_params(image, self.scale, self.ratio)
        crop: Any = TF.resized_crop(image, top, left, height, width, self.size, self.interpolation)
        box = torch.tensor([left, top, left + width, top + height]) / torch.tensor([*image.size, *image.size])
        flipped = bool(torch.rand(()) < self.flip)
        return TF.hflip(crop) if flipped else crop, box, flipped
