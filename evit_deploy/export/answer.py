"""What a model answers: one number a class, ``logits``, or a vector that images are compared by, ``embedding``."""

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from evit_deploy.errors import InputError
from evit_deploy.export.card import EMBEDDING, LOGITS
from evit_deploy.tokens.op import precise

_SHORTEST = 1e-12  # as torch.nn.functional.normalize has it: a vector of nothing but zeros stays one


class Normalize(nn.Module):
    """Scales vectors to length 1, in FP32 at least: squares of half precision overflow and vanish early."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, width]`` to ``[B, width]``, FP32 or FP64."""
        x = precise(x)
        return x / x.norm(dim=-1, keepdim=True).clamp_min(_SHORTEST)


def normalize_(model: Any) -> None:
    """Makes a model without classes answer with vectors of length 1, in place.

    The scaling is a step of the model: what runs, copies or exports it needs to know nothing about it.

    Args:
        model: A model of a registered backbone.

    Raises:
        InputError: It has classes.
    """
    if answer_name(model) != EMBEDDING:
        raise has_classes(model.num_classes)
    if not is_normalized(model):
        model.add_module("normalize", Normalize())  # no parameters, and so no new keys in a state dict
        model.register_forward_hook(_normalized)


def _normalized(model: Any, inputs: Any, answer: Tensor) -> Tensor:
    return model.normalize(answer)


def has_classes(classes: int) -> InputError:
    """The refusal to normalize logits."""
    return InputError(
        "logits cannot be normalized, because their magnitude expresses confidence", where="--normalize",
        seen=f"{classes} classes", wanted="a model without a classifier",
        fix="Leave --normalize out, or take a checkpoint whose answer is an embedding.",
    )  # fmt: skip


def is_normalized(model: Any) -> bool:
    """Whether :func:`normalize_` has been called on a model."""
    return isinstance(getattr(model, "normalize", None), Normalize)


def answer_name(model: Any) -> str:
    """What the output of a model is called that answers: ``embedding`` where there are no classes, else ``logits``."""
    return LOGITS if model.num_classes > 0 else EMBEDDING


def answer_size(model: Any) -> int:
    """How many numbers a model answers with: its classes, or the width of its embedding."""
    if model.num_classes > 0:
        return model.num_classes
    head = getattr(model, "head", None)  # a projection, as CLIP has one
    return head.out_features if isinstance(head, nn.Linear) else model.num_features


def answer_in(names: Collection[str]) -> str:
    """Which of a model's outputs answers.

    Bundles of earlier versions call it ``logits`` in any case.

    Args:
        names: Of the outputs; a mapping's keys will do.
    """
    return EMBEDDING if EMBEDDING in names else LOGITS
