"""What is tuned: the dense model, its method, and the images that schedules are ranked by; checked before the work."""

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
"""Of the schedule that is always a finalist: the paper's, at its own places."""


class Subject(msgspec.Struct, frozen=True):
    """What is tuned.

    Args:
        model: The dense model, FP32.
        manifest: What a bundle of the default schedule would say.
        planner: Model and method; its spec is the default schedule's.
        pictures: Labeled images, if there are any.
        images: Calibration images, float32 ``[n, C, H, W]``.
        every: Of these, each so-manieth is one that every schedule answers.
    """

    model: torch.nn.Module
    manifest: Manifest
    planner: Planner
    pictures: Pictures | None
    images: np.ndarray
    every: int

    def reduced(self, spec: TokenSpec) -> torch.nn.Module:
        """The model with its tokens reduced; the weights are the dense one's."""
        return reduce_tokens_(copy_sharing_weights(self.model), spec)


def check_request(options: TuneOptions, tokens: TokenOptions) -> None:
    """Refuses, before a file of weights is read, what leaves nothing to search for or nothing to rank by.

    Raises:
        InputError: Rates or places were given, the method has no exported form, or there are no images, or too few.
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
        checkpoint: What was read; its weights are given up.
        options: The images.
        made: What is timed and converted.
        model: timm name that decided the architecture.
        tokens: Method, its options and fusion.

    Raises:
        InputError: The method has no keep rate for each location, or images do not fit the model.
        UnsupportedModelError: The model cannot be reduced by the method.
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
