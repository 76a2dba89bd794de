"""Preprocessing of image files with DALI inside Triton.

``package`` copies this file as ``1/dali.py`` of the ensemble's first model, and its settings as ``1/preprocess.json``;
Triton's DALI backend serializes the pipeline when it loads it. Sizes and crops are those of
:mod:`evit_deploy.data.images`. DALI decodes and resizes with results close to, but not the same as, Pillow's.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvidia.dali import fn, pipeline_def, types  # type: ignore[import-not-found]  # the server has it
from nvidia.dali.plugin.triton import autoserialize  # type: ignore[import-not-found]

_FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC, "lanczos": types.INTERP_LANCZOS3}


def images(settings: Mapping[str, Any], device: str) -> Any:
    """Builds the graph; call it inside a pipeline definition.

    Args:
        settings: Fields of :class:`evit_deploy.data.preprocess.Preprocess`.
        device: Device to decode on: ``mixed`` for a GPU, or ``cpu``.

    Returns:
        float32 ``[3, H, W]`` for each file.
    """
    height, width = settings["size"]
    scaled = [int(side / settings["crop_pct"]) for side in settings["size"]]
    files = fn.external_source(device="cpu", name="IMAGE", dtype=types.UINT8, ndim=1)
    if settings["crop_mode"] == "squash":
        size = fn.cast(fn.stack(*(types.Constant(side, device="cpu") for side in scaled)), dtype=types.INT64)
    else:
        shape = fn.peek_image_shape(files, adjust_orientation=False)
        shorter = fn.reductions.min(shape[:2])
        size = fn.stack(*(scaled[0] * shape[axis] // shorter for axis in (0, 1)))
    decoded = fn.decoders.image(
        files, device=device, output_type=types.RGB, adjust_orientation=False, jpeg_fancy_upsampling=True
    )
    # subpixel_scale=True would shift the image by the rounding of its sides, up to a pixel.
    resized = fn.resize(
        decoded,
        size=fn.cast(size, dtype=types.FLOAT),
        interp_type=_FILTERS[settings["interpolation"]],
        antialias=True,
        subpixel_scale=False,
    )
    margins = [size[0] - height, size[1] - width]
    # Half of the margin, rounded half to even as in Python.
    start = fn.stack(*(margin // 2 + (margin & 1) * ((margin // 2) & 1) for margin in margins))
    cropped = fn.slice(resized, start=fn.cast(start, dtype=types.INT32), shape=[height, width], axes=[0, 1])
    return fn.crop_mirror_normalize(
        cropped,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * value for value in settings["mean"]],
        std=[255 * value for value in settings["std"]],
    )


_settings_file = Path(__file__).with_name("preprocess.json")
if _settings_file.is_file():
    _settings = json.loads(_settings_file.read_text())

    @autoserialize
    @pipeline_def(batch_size=_settings["max_batch"], num_threads=4, device_id=0)
    def pipeline() -> Any:
        """The pipeline that the backend serializes."""
        return images(_settings, "mixed")
