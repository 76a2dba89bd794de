"""Token labeling ("All Tokens Matter", arXiv 2104.10858): every patch token is trained with its own label.

This module has the model's outputs for each token, and the loss. The labels come from the maps of
:mod:`evit_deploy.data.training.token_labels`, or from a teacher. In order::

    labels = crop_token_labels(maps, boxes, flipped, grid, classes)    # [B, patches, classes]
    out = token_logits(model, images)                                  # class_logits, token_logits, kept
    loss = token_label_loss(*out, targets, labels, weight=1.0)

Token reduction moves and removes patch tokens, so labels are gathered by the *original patch numbers* of the remaining
tokens. The fused token represents many patches; it has no label and does not contribute to the loss.
"""

from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from evit_deploy.errors import InputError, UnsupportedModelError
from evit_deploy.models.timm_vit import ReducedBlock
from evit_deploy.tokens.plan import FUSED


class TokenLogits(NamedTuple):
    """Outputs of a model for training with token labels; the first arguments of :func:`token_label_loss`.

    Args:
        class_logits: ``[B, classes]``, of the class token only.
        token_logits: ``[B, T, classes]``, of the T remaining tokens.
        kept: int64 ``[B, T]``: original patch number of each token, :data:`FUSED` for a fused one.
    """

    class_logits: Tensor
    token_logits: Tensor
    kept: Tensor


class WithTokenLogits(nn.Module):
    """:func:`token_logits` as a module, for ``DistributedDataParallel`` and ``torch.compile``.

    Args:
        model: The model; save its ``state_dict``, not the wrapper's.

    Raises:
        UnsupportedModelError: The model has no classifier on every token.
    """

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not has_token_classifier(model):
            raise UnsupportedModelError(type(model).__name__, ["it has no classifier on every token, as LV-ViT has"])
        self.model = model

    def forward(self, images: Tensor, mask: Tensor | None = None) -> TokenLogits:
        """See :func:`token_logits`.

        Args:
            images: ``[B, C, H, W]``.
            mask: :meth:`MixToken.mask`; a tensor, so that a compiled model works for every box.
        """
        model = self.model
        tokens = model.patch_embed(images)
        if mask is not None:
            tokens = _mixed(tokens, mask)
        x = model.norm_pre(model.patch_drop(model._pos_embed(tokens)))
        again = model.grad_checkpointing and torch.is_grad_enabled()
        reduced: list[tuple[Tensor, bool]] = []
        for block in model.blocks:  # as model.forward_features, but also collects what was kept
            run = block.with_kept if isinstance(block, ReducedBlock) else block
            found = checkpoint(run, x, use_reentrant=False) if again else run(x)
            x, kept = found if isinstance(found, tuple) else (found, None)
            if kept is not None:
                reduced.append((kept, block.reducer.plan.fused))
        features = model.norm(x)
        kept = _patch_numbers(reduced, len(images), model.patch_embed.num_patches, images.device)
        return TokenLogits(model.class_logits(features), model.token_logits(features), kept)


class MixToken(msgspec.Struct, frozen=True):
    """MixToken: replaces a box of each image's patch tokens with those of the image at the mirrored batch position.

    Tokens are mixed after the stem, so that no patch contains parts of two images. The released code moves the token
    *logits* back before the loss. Removed tokens have no logits, so here the *labels* are moved instead, which gives
    the same sum.

    Args:
        grid: Rows and columns of patches.
        box: First row, first column, end row, end column.
    """

    grid: tuple[int, int]
    box: tuple[int, int, int, int]

    @classmethod
    def draw(cls, grid: tuple[int, int], rng: np.random.Generator, beta: float = 1.0) -> "MixToken":
        """Draws a box at a random place, clipped at the borders, covering 1 − λ of the grid, λ ~ Beta(beta, beta)."""
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
        """The actual λ: share of the grid that an image keeps of its own patches."""
        top, left, bottom, right = self.box
        return 1 - (bottom - top) * (right - left) / (self.grid[0] * self.grid[1])

    def mask(self, device: torch.device | None = None) -> Tensor:
        """Returns whether each patch is in the box, bool ``[patches]``."""
        top, left, bottom, right = self.box
        inside = torch.zeros(self.grid, dtype=torch.bool, device=device)
        inside[top:bottom, left:right] = True
        return inside.flatten()

    def tokens(self, x: Tensor) -> Tensor:
        """Mixes patch tokens, or their labels, ``[B, patches, …]``."""
        return _mixed(x, self.mask(x.device))

    def labels(self, y: Tensor, classes: int) -> Tensor:
        """Mixes image labels: int64 ``[B]`` or soft ``[B, classes]`` to soft ``[B, classes]``."""
        soft = y.float() if y.dim() == 2 else F.one_hot(y, classes).float()
        return self.share * soft + (1 - self.share) * soft.flip(0)


def has_token_classifier(model: Any) -> bool:
    """Whether a model has a classifier on every token, as LV-ViT has."""
    return isinstance(getattr(model, "aux_head", None), nn.Linear)


def token_logits(model: Any, images: Tensor, mix: MixToken | None = None) -> TokenLogits:
    """Runs a reduced or dense model in its present mode, and returns the outputs of its two classifiers separately.

    Args:
        model: A model with a classifier on every token, such as LV-ViT.
        images: ``[B, C, H, W]``.
        mix: Mixes the patch tokens after the stem; the caller must mix the labels.

    Raises:
        UnsupportedModelError: The model has no classifier on every token.
    """
    return WithTokenLogits(model)(images, None if mix is None else mix.mask(images.device))


def token_label_loss(
    class_logits: Tensor,
    token_logits: Tensor,
    kept: Tensor,
    labels: Tensor,
    token_labels: Tensor,
    weight: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of the class token, plus ``weight`` times the soft cross-entropy of the tokens with a label.

    The latter is averaged over an image's tokens, then over the images.

    Args:
        class_logits: See :class:`TokenLogits`.
        token_logits: See :class:`TokenLogits`.
        kept: See :class:`TokenLogits`.
        labels: int64 ``[B]``, or probabilities ``[B, classes]``.
        token_labels: Probabilities ``[B, patches, classes]``, one row for each of the image's patches.
        weight: Weight of the tokens' term; 1 in the released training.
        label_smoothing: Label smoothing of the class token's term.

    Raises:
        InputError: The shapes do not fit each other.
    """
    batch, _, classes = token_logits.shape
    if token_labels.dim() != 3 or (token_labels.shape[0], token_labels.shape[2]) != (batch, classes):
        raise InputError(
            "token labels that do not match the tokens",
            seen=list(token_labels.shape),
            wanted=f"[{batch}, patches, {classes}]",
        )
    loss = F.cross_entropy(class_logits.float(), labels, label_smoothing=label_smoothing)
    known = kept != FUSED
    wanted = token_labels.gather(1, kept.clamp(min=0).unsqueeze(-1).expand(-1, -1, classes))
    each = -(wanted * token_logits.float().log_softmax(dim=-1)).sum(dim=-1)
    # Average for each image first: images may have different numbers of labeled tokens (a fused token can be kept at
    # later locations), and splitting a batch must not change the loss.
    return loss + weight * ((each * known).sum(dim=1) / known.sum(dim=1).clamp(min=1)).mean()


def _mixed(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask[:, None], x.flip(0), x)


def _patch_numbers(reduced: list[tuple[Tensor, bool]], batch: int, patches: int, device: torch.device) -> Tensor:
    """Like ``tokens.plan.original_patches``, but on the device and only after the last location."""
    numbers = torch.arange(patches, device=device).expand(batch, -1)
    for kept, fused in reduced:
        numbers = numbers.gather(1, kept.long())
        if fused:
            numbers = F.pad(numbers, (0, 1), value=FUSED)
    return numbers
