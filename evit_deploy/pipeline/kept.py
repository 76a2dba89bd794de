"""Pictures of the patches that a model keeps of the user's images, for the page of its bundle."""

import io
from pathlib import Path
from typing import Any

import msgspec

from evit_deploy.data.images import calibration_images
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.drawing.seen import title_of
from evit_deploy.drawing.sheet import Sheet
from evit_deploy.errors import InputError, UnsupportedModelError
from evit_deploy.pages.sections import Picture
from evit_deploy.tokens.backbone import backbone_of
from evit_deploy.visualization.show import blocks_to_draw, legend, see
from evit_deploy.visualization.subject import subject_of_model

PICTURES = 4
_QUALITY = 85  # JPEG quality with which a page of four photographs stays below half a megabyte


def kept_pictures(model: Any, preprocess: Preprocess, labels: list[str] | None, folder: Path) -> tuple[Picture, ...]:
    """Draws what a model keeps of up to four images, evenly spaced in a folder.

    Args:
        model: A PyTorch model.
        preprocess: How an image file becomes an input tensor.
        labels: Class names, if known.
        folder: Folder of images, searched recursively.

    Returns:
        One picture; empty if the model keeps every patch or its choice cannot be drawn.

    Raises:
        InputError: An image cannot be read.
    """
    images = calibration_images(folder, preprocess, backbone_of(model).channels(model), PICTURES)
    try:
        subject = subject_of_model(model, preprocess, labels)
    except (InputError, UnsupportedModelError):
        return ()
    names = [f"picture {i + 1}" for i in range(len(images))]
    seen, _ = see(subject, images, names)
    blocks = blocks_to_draw(subject.plan, ())
    drawn = [
        msgspec.structs.replace(one, stages=tuple(stage for stage in one.stages if stage.block in blocks))
        for one in seen
    ]
    text = legend(subject.plan)
    file = io.BytesIO()
    Sheet(drawn, scores="").image().convert("RGB").save(file, "JPEG", quality=_QUALITY)
    stages = "; ".join(title_of(of_a_block) for of_a_block in zip(*(one.stages for one in drawn), strict=True))
    return (Picture(file.getvalue(), f"{text} {stages[:1].upper()}{stages[1:]}.", "jpeg"),)
