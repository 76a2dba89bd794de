"""Preprocessing of image files inside Triton.

``package`` copies this file as ``1/model.py`` of the ensemble's first model. It needs only numpy, Pillow and the
server's ``triton_python_backend_utils``, not evit-deploy or PyTorch. The results are bit-identical to
:mod:`evit_deploy.data.images`; settings come from the parameter ``preprocess`` of its ``config.pbtxt``. An invalid
image fails only its own request.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

IMAGE, INPUT, PARAMETER = "IMAGE", "input", "preprocess"
FORMATS = ("JPEG", "PNG")
MAX_PIXELS = 50_000_000
"""Default limit for an image, before and after resizing; 150 MB as RGB."""
MAX_BYTES = 32 << 20
"""Default limit for an image file."""


class ImageError(ValueError):
    """An image was refused; the text is sent to the client."""


class ImagePreprocess:
    """Converts the bytes of an image file to an input.

    Args:
        settings: Fields of :class:`evit_deploy.data.preprocess.Preprocess`, and optionally ``max_pixels`` and
            ``max_bytes`` to replace :data:`MAX_PIXELS` and :data:`MAX_BYTES`.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.height, self.width = settings["size"]
        self.scaled = tuple(math.floor(side / settings["crop_pct"]) for side in settings["size"])
        self.crop_mode = settings["crop_mode"]
        self.filter = Image.Resampling[settings["interpolation"].upper()]
        self.max_pixels = settings.get("max_pixels", MAX_PIXELS)
        self.max_bytes = settings.get("max_bytes", MAX_BYTES)
        border = self.crop_mode == "border"
        self.fill = tuple(round(255 * value) for value in settings["mean"]) if border else (0, 0, 0)
        mean, std = (np.array(settings[name], np.float32)[:, None] for name in ("mean", "std"))
        # A lookup table for the 256 values of a pixel, computed with the same order of operations as in PyTorch.
        self.shades = (np.arange(256, dtype=np.float32) / np.float32(255) - mean) / std

    def __call__(self, content: bytes) -> np.ndarray:
        """Decodes, resizes, crops and normalizes one image.

        Returns:
            float32 ``[3, H, W]``.

        Raises:
            ImageError: The file is not a complete JPEG or PNG image, or it is too large.
        """
        image = self._crop(self._resize(self._read(content)))
        pixels = np.asarray(image)
        return np.stack([shades[pixels[..., channel]] for channel, shades in enumerate(self.shades)])

    def _read(self, content: bytes) -> Image.Image:
        if not content:
            raise ImageError("the image is empty (0 bytes)")
        if len(content) > self.max_bytes:
            raise ImageError(f"the image is too large ({len(content)} bytes, at most {self.max_bytes} are taken)")
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        except Image.DecompressionBombError as error:  # above Pillow's own limit
            raise ImageError(f"the image is too large ({_brief(error)})") from None
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
            raise ImageError(f"not a JPEG or PNG image ({_brief(error)})") from None
        with image:
            self._check_pixels("the image", image.size)  # known from the header, before decoding
            try:
                return image.convert("RGB")
            except Exception as error:
                raise ImageError(f"the image cannot be read to its end ({_brief(error)})") from None

    def _check_pixels(self, what: str, size: Sequence[int]) -> None:
        width, height = size
        if width * height > self.max_pixels:
            raise ImageError(
                f"{what} is too large ({width} x {height} pixels, at most {self.max_pixels} altogether are taken)"
            )

    def _resize(self, image: Image.Image) -> Image.Image:
        height, width = self._scaled_size(image.height, image.width)
        if min(height, width) < 1:
            raise ImageError(f"the image is too narrow ({image.width} x {image.height} pixels)")
        if (width, height) == image.size:
            return image
        self._check_pixels(f"the image ({image.width} x {image.height}), once it is resized,", (width, height))
        return image.resize((width, height), self.filter)

    def _scaled_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing, with the rounding of timm and torchvision."""
        if self.crop_mode == "squash":
            return self.scaled[0], self.scaled[1]
        if min(self.scaled) < 1:  # an input of one pixel with a crop larger than the image
            return 0, 0
        if self.crop_mode != "border" and self.scaled[0] == self.scaled[1]:
            side = self.scaled[0]
            if width <= height:
                return int(side * height / width), side
            return side, int(side * width / height)
        ratios = height / self.scaled[0], width / self.scaled[1]
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return round(height / ratio), round(width / ratio)

    def _crop(self, image: Image.Image) -> Image.Image:
        if self.width > image.width or self.height > image.height:
            size = max(self.width, image.width), max(self.height, image.height)
            padded = Image.new("RGB", size, self.fill)
            padded.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
            image = padded
        margins = image.width - self.width, image.height - self.height
        floors = self.crop_mode == "center-floor"
        left, top = (margin // 2 if floors else round(margin / 2.0) for margin in margins)
        return image.crop((left, top, left + self.width, top + self.height))


def _brief(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else ""
    # Pillow's message contains the repr of the BytesIO object, which is useless to a client.
    return type(error).__name__ if not text or "BytesIO" in text else text[:200]


class TritonPythonModel:
    """The interface that the server's Python backend calls."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Reads the settings from the model's configuration; called once for each instance."""
        config = json.loads(args["model_config"])
        self.preprocess = ImagePreprocess(json.loads(config["parameters"][PARAMETER]["string_value"]))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Returns one response for each request, in order; a request with a refused image gets an error."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        import triton_python_backend_utils as backend  # type: ignore[import-not-found]  # only the server has it

        contents = backend.get_input_tensor_by_name(request, IMAGE).as_numpy().ravel()
        inputs = np.empty((len(contents), 3, self.preprocess.height, self.preprocess.width), np.float32)
        for number, content in enumerate(contents):
            try:
                inputs[number] = self.preprocess(content)
            except (ImageError, MemoryError) as error:
                place = f"image {number + 1} of {len(contents)}: " if len(contents) > 1 else ""
                text = place + (str(error) or "not enough memory for the image")
                return backend.InferenceResponse(error=backend.TritonError(text, backend.TritonError.INVALID_ARG))
        return backend.InferenceResponse(output_tensors=[backend.Tensor(INPUT, inputs)])
