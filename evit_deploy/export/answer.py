"""A model's output: ``logits``, one per class, or ``embedding``, a vector for comparing images."""

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from evit_deploy.errors import InputError
from evit_deploy.export.card import EMBEDDING, LOGITS
from evit_deploy.tokens.operators.token_reorg import precise

_SHORTEST = 1e-12  # the eps of torch.nn.functional.normalize: a zero vector stays zero


class Normalize(nn.Module):
    """Scales vectors to length 1, in FP32 or higher, because squares in half precision overflow and underflow."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, width]`` to ``[B, width]``, FP32 or FP64."""
        x = precise(x)
        return x / x.norm(dim=-1, keepdim=True).clamp_min(_SHORTEST)


def normalize_(model: Any) -> None:
    """Makes a model without classes return vectors of length 1, in place.

    The scaling becomes part of the model, so code that runs, copies or exports it needs no special case.

    Args:
        model: A model of a registered backbone.

    Raises:
        InputError: The model has classes.
    """
    if answer_name(model) != EMBEDDING:
        raise has_classes(model.num_classes)
    if not is_normalized(model):
        model.add_module("normalize", Normalize())  # no parameters, so the state dict is unchanged
        model.register_forward_hook(_normalized)


def _normalized(model: Any, inputs: Any, answer: Tensor) -> Tensor:
    return model.normalize(answer)


def has_classes(classes: int) -> InputError:
    """The error for normalizing logits."""
    return InputError(
        "logits cannot be normalized, because their magnitude expresses confidence", where="--normalize",
        seen=f"{classes} classes", wanted="a model without a classifier",
        fix="Leave --normalize out, or take a checkpoint whose answer is an embedding.",
    )  # fmt: skip


def is_normalized(model: Any) -> bool:
    """Whether :func:`normalize_` has been called on a model."""
    return isinstance(getattr(model, "normalize", None), Normalize)


def answer_name(model: Any) -> str:
    """Name of a model's output: ``embedding`` if it has no classes, else ``logits``."""
    return LOGITS if model.num_classes > 0 else EMBEDDING


def answer_size(model: Any) -> int:
    """Size of a model's output: the number of classes, or the width of the embedding."""
    if model.num_classes > 0:
        return model.num_classes
    head = getattr(model, "head", None)  # a projection, as in CLIP
    return head.out_features if isinstance(head, nn.Linear) else model.num_features


def answer_in(names: Collection[str]) -> str:
    """The name of the model's answer among its outputs.

    In bundles of earlier versions it is always ``logits``.

    Args:
        names: Names of the outputs; a mapping can be passed.
    """
    return EMBEDDING if EMBEDDING in names else LOGITS
