"""Inputs of a search: the dense model, the method, and the images for ranking schedules; all are checked first."""

from pathlib import Path

import msgspec
import numpy as np
import torch

from evit_deploy.bundle.manifest import Manifest
from evit_deploy.data.images import calibration_images, image_files
from evit_deploy.errors import InputError
from evit_deploy.models.checkpoint import Checkpoint, build_model, preprocess_of, resolve_tokens
from evit_deploy.pipeline.convert import (
    Job,
    Reduced,
    check_method,
    check_own_weights,
    label_by_folders,
    manifest_of,
)
from evit_deploy.pipeline.lowering import Lowering
from evit_deploy.recipe.options import TuneOptions
from evit_deploy.tokens.backbone import backbone_of, copy_sharing_weights
from evit_deploy.tokens.plan import TokenOptions, TokenSpec
from evit_deploy.tokens.reduce import dense_twin, reduce_tokens_, token_plan
from evit_deploy.tuning.schedules import Planner, check_method_has_schedules
from evit_deploy.verification.answers.pictures import Pictures, pictures_of

LEAST_IMAGES = 16
DEFAULT_RATE = 0.7
"""Keep rate of the default schedule, which is always a finalist: the paper's rate, at the paper's locations."""


class Subject(msgspec.Struct, frozen=True):
    """The model to tune, and the images to evaluate it on.

    Args:
        model: The dense model, FP32.
        manifest: Manifest that a bundle of the default schedule would have.
        planner: Planner of the model and method, with the spec of the default schedule.
        pictures: Labeled images, if any.
        images: Calibration images, float32 ``[n, C, H, W]``.
        every: The search evaluates schedules on ``images[::every]``.
    """

    model: torch.nn.Module
    manifest: Manifest
    planner: Planner
    pictures: Pictures | None
    images: np.ndarray
    every: int

    def reduced(self, spec: TokenSpec) -> torch.nn.Module:
        """Returns a model with token reduction that shares the weights of the dense model."""
        return reduce_tokens_(copy_sharing_weights(self.model), spec)


def check_request(options: TuneOptions, tokens: TokenOptions) -> None:
    """Checks the options before any weights are read.

    Raises:
        InputError: Rates or locations were given, the method cannot be exported, or there are no or too few images.
    """
    strange = next((name for name in ("keep_rate", "locations") if name in tokens), None)
    if strange is not None:
        raise InputError(f"{strange} is what tune searches for", where=strange, fix="Leave it out.")
    check_method(tokens)
    check_method_has_schedules(tokens.get("method", "evit"))
    if options.calibration is None:
        raise InputError(
            "there are no images to rank schedules by", where="--calibration",
            fix="Give a folder with 64 or more, like those that the model will see; they need no labels.",
        )  # fmt: skip
    count = len(image_files(Path(options.calibration)))
    if count < LEAST_IMAGES:
        raise InputError(
            "too few images to rank schedules by", where=options.calibration, seen=count,
            wanted=f"{LEAST_IMAGES} or more", fix="64 are better: 16 cannot tell 90 % from 70 %.",
        )  # fmt: skip


def read_subject(
    checkpoint: Checkpoint, options: TuneOptions, made: Lowering, model: str | None, tokens: TokenOptions
) -> Subject:
    """Builds the dense model and reads the images.

    Args:
        checkpoint: The checkpoint; its weights are released.
        options: Options with the images.
        made: How models are lowered.
        model: timm name of the architecture, if given.
        tokens: Method, its options and fusion.

    Raises:
        InputError: The method has no keep rate for each location, or the images do not match the model.
        UnsupportedModelError: The method does not support the model.
    """
    label_by_folders(checkpoint, options.data)
    asked: TokenOptions = {**tokens, "keep_rate": DEFAULT_RATE}
    default, notes = resolve_tokens(checkpoint, **asked)
    default = msgspec.structs.replace(default, locations=None)
    check_own_weights(checkpoint, default)
    built = build_model(checkpoint).eval()
    checkpoint.weights = {}
    backbone = backbone_of(built)
    planner = Planner(default, backbone.shape(built), backbone.method(default.method))
    reduced = reduce_tokens_(copy_sharing_weights(built), default)
    dense, preprocess = dense_twin(built), preprocess_of(checkpoint, built)
    notes = [*checkpoint.notes, *notes]
    whole = Reduced(checkpoint, reduced, dense, default, token_plan(reduced), preprocess, notes)
    manifest = manifest_of(whole, Job(made, model=model), Path())
    pictures = pictures_of(Path(options.data), manifest) if options.data is not None else None
    folder, channels = Path(options.calibration or ""), backbone.channels(built)
    images = calibration_images(folder, preprocess, channels, 2 * options.sample)
    return Subject(dense, manifest, planner, pictures, images, max(1, len(images) // options.sample))
