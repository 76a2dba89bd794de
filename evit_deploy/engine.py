"""What an engine is: what it was built with, and what its file says about itself."""

from typing import Any

import msgspec


class BatchProfile(msgspec.Struct, frozen=True):
    """Batch sizes that one optimization profile of an engine covers.

    Args:
        minimum: Fewest images.
        optimum: The number of images it is tuned for.
        maximum: Most images.
    """

    minimum: int
    optimum: int
    maximum: int

    def __str__(self) -> str:
        return f"{self.minimum}:{self.optimum}:{self.maximum}"


class Engine(msgspec.Struct, frozen=True):
    """What a plan was built with, as the manifest records it.

    Args:
        target: ``tensorrt``, ``tensorrt-rtx`` or ``torch-tensorrt``.
        version: Of the library that built it; a plan runs on this one only, unless it is version-compatible.
        gpus: Compute capabilities it runs on, ``sm80``.
        driver: Of the machine that built it, where it had one.
        precision: Of the ONNX file it was built from.
        profiles: Batch sizes it covers.
        plugin: SHA-256 of the plugin library it needs; ``None`` when the operator's body is inside.
        options: What else the builder was told.
        seconds: How long the build took.
    """

    target: str
    version: str
    gpus: tuple[str, ...]
    driver: str | None
    precision: str
    profiles: tuple[BatchProfile, ...]
    plugin: str | None
    options: dict[str, Any]
    seconds: float
