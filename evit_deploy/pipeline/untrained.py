"""For weights trained without token reduction: compares EViT with merging on the user's images."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from evit_deploy.data.images import calibration_images
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.errors import InputError, UnsupportedModelError
from evit_deploy.tokens.backbone import backbone_of, copy_sharing_weights
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import dense_twin, reduce_tokens_, token_plan, token_spec
from evit_deploy.verification.answers.retrieval import centered_cosines

PICTURES = 32
_BATCH = 8


def merging_note(model: torch.nn.Module, preprocess: Preprocess, folder: Path) -> str | None:
    """Compares EViT with the method ``merge`` at the same multiply-adds, both without training.

    Args:
        model: A model reduced by EViT, with weights trained without token reduction.
        preprocess: How an image file becomes an input tensor.
        folder: Folder of images, of which up to 32 are used.

    Returns:
        A sentence; ``None`` if the model does not support merging.

    Raises:
        InputError: The folder has no images, or one cannot be read.
    """
    other = copy_sharing_weights(model)
    try:
        spec = merging_spec(other)
    except (InputError, UnsupportedModelError):
        return None
    images = torch.from_numpy(calibration_images(folder, preprocess, backbone_of(model).channels(model), PICTURES))
    dense, own, merged = (_answers(one, images) for one in (dense_twin(model), model, other))
    if getattr(model, "num_classes", 0):
        counts = [int((answers.argmax(1) == dense.argmax(1)).sum()) for answers in (own, merged)]
        found = f"{counts[0]} of {len(images)} of these pictures as the dense model does, and {counts[1]} of them"
        return f"Without training it answers {found} with {_flags(spec)}, at the same multiply-adds."
    if len(images) < 2:
        return None  # centering needs at least two images
    means = [float(centered_cosines(answers, dense).mean()) for answers in (own, merged)]
    found = f"has a centered cosine of {means[0]:.3f} to the dense model on {len(images)} of these pictures, and"
    return f"Without training it {found} {means[1]:.3f} with {_flags(spec)}, at the same multiply-adds."


def merging_spec(model: Any) -> TokenSpec:
    """Applies ``merge`` to a model in place, at the keep rate (in hundredths) nearest to its present multiply-adds.

    Raises:
        InputError: The keep rate does not fit the model.
        UnsupportedModelError: The model does not support merging.
    """
    wanted = token_plan(model).macs()
    low, high = 1, 99
    while low < high:  # bisection: multiply-adds grow with the rate
        middle = (low + high) // 2
        if token_plan(reduce_tokens_(model, _spec(middle))).macs() < wanted:
            low = middle + 1
        else:
            high = middle
    nearest = min((low, max(low - 1, 1)), key=lambda rate: abs(_macs(model, rate) - wanted))
    return token_spec(reduce_tokens_(model, _spec(nearest)))


def _macs(model: Any, rate: int) -> int:
    return token_plan(reduce_tokens_(model, _spec(rate))).macs()


def _spec(rate: int) -> TokenSpec:
    return TokenSpec(rate / 100, method="merge", fuse=False)


def _flags(spec: TokenSpec) -> str:
    return f"--method merge --keep-rate {spec.keep_rate}"


def _answers(model: Any, images: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return torch.cat([model.eval()(part) for part in images.split(_BATCH)]).float().numpy()
