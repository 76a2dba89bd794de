"""Types of a bundle's manifest, and the names of its files."""

import math
import typing
from collections.abc import Sequence
from typing import Any

import msgspec

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.errors import InputError
from evit_deploy.recipe.options import BatchProfile, Precision
from evit_deploy.tokens.plan import TokenPlan, TokenSpec

FORMAT = 1
MANIFEST, MODEL, DENSE, GOLDEN, REPORT = "manifest.json", "model.onnx", "dense/model.onnx", "golden.npz", "report.json"
ENGINE, OPENVINO = "engine.plan", "openvino/model.xml"
PAGE = "report.html"
"""The same as :data:`REPORT`, as a web page."""
SIGNATURE = "manifest.sig"
"""Signature of the manifest, which lists the hashes of all other files; see :mod:`evit_deploy.bundle.signature`."""
PACKAGE = "package.json"
"""Description of a package: the bundles it was made from, and its files."""
TWIN = "dense/"
"""Folder of the dense twin, with the same file names as the model."""


class Parent(msgspec.Struct, frozen=True):
    """The checkpoint that a bundle was made from.

    Args:
        source: A path relative to the bundle, or a timm name.
        sha256: Hash of the file; ``None`` for a timm name.
        model: timm name given with ``--model``, if any.
    """

    source: str
    sha256: str | None
    model: str | None = None


class Engine(msgspec.Struct, frozen=True):
    """How an engine was built, as recorded in the manifest.

    Args:
        target: ``tensorrt``, ``tensorrt-rtx`` or ``torch-tensorrt``.
        version: Version of the library that built it; a plan runs only on this version, unless it is
            version-compatible.
        gpus: Compute capabilities it runs on, ``sm80``.
        driver: Driver of the machine that built it, if it had one.
        precision: Precision of the ONNX file it was built from.
        profiles: Its optimization profiles: the batch sizes that it covers.
        plugin: SHA-256 of the plugin library it needs; ``None`` if the operator's ONNX function was built in instead.
        options: Other builder options.
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


class TensorSpec(msgspec.Struct, frozen=True):
    """One input or output.

    Args:
        name: Its name in the model.
        dtype: NumPy name, ``float32``.
        shape: Size of each dimension; ``None`` if dynamic.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]


class Manifest(msgspec.Struct, frozen=True):
    """``manifest.json``.

    Args:
        format: Version of this structure.
        kind: The method, ``evit``.
        model: timm architecture.
        model_args: Further arguments of ``timm.create_model``.
        tokens: The requested reduction.
        plan: Token counts and costs.
        preprocess: From image file to input tensor.
        precision: Precision of the weights in the files.
        labels: Class names, if known.
        inputs: The model's inputs.
        outputs: The model's outputs.
        files: Name inside the bundle -> SHA-256.
        parents: The checkpoints it was made from.
        recipe: The recipe, if ``run`` made it.
        versions: Versions of the packages that made it.
        device: The machine that made it.
        results: Main figures of the report.
        notes: Assumptions.
        engine: How ``engine.plan`` was built, if there is one.
        normalized: Whether the model scales its embedding to length 1.
        origins: Where ``preprocess`` and ``labels`` come from, as text.
        unquantized: Names of a quantized model's linear layers that stayed in the base precision.

    Raises:
        InputError: It does not describe a model that evit-deploy can make.
    """

    kind: str
    model: str
    model_args: dict[str, Any]
    tokens: TokenSpec
    plan: TokenPlan
    preprocess: Preprocess
    precision: str
    labels: list[str] | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    files: dict[str, str]
    parents: list[Parent]
    recipe: dict[str, Any] | None
    versions: dict[str, str]
    device: dict[str, Any]
    results: dict[str, Any]
    notes: list[str] = []
    engine: Engine | None = None
    normalized: bool = False
    origins: dict[str, str] = {}
    unquantized: tuple[str, ...] = ()
    format: int = FORMAT

    def __post_init__(self) -> None:
        if [len(tensor.shape) for tensor in self.inputs] != [4] or not all(self.inputs[0].shape[1:]):
            raise InputError(
                "the inputs are not a single batch of images", seen=[tensor.shape for tensor in self.inputs]
            )
        if [len(tensor.shape) for tensor in self.outputs[:1]] != [2] or not self.outputs[0].shape[1]:
            raise InputError(
                "the first output does not have one row per image", seen=[out.shape for out in self.outputs]
            )
        if self.inputs[0].shape[2:] != self.preprocess.size:
            seen = f"{self.preprocess.size} for {self.inputs[0].shape[2:]}"
            raise InputError("preprocessing size does not match the model's input size", seen=seen)
        if self.precision not in typing.get_args(Precision):
            wanted = "one of " + ", ".join(typing.get_args(Precision))
            raise InputError("unknown precision", seen=repr(self.precision), wanted=wanted)
        if not self.parents:
            raise InputError("it does not name the checkpoint it was made from", wanted="one parent")
        if self.labels is not None and len(self.labels) != self.outputs[0].shape[1]:
            seen = f"{len(self.labels)} labels for {self.outputs[0].shape[1]} classes"
            raise InputError("the number of labels is not the number of classes", seen=seen)
        if self.plan.cost is not None and self.plan.macs() <= 0:
            raise InputError("its plan costs nothing", seen=self.plan.macs())

    @property
    def answer(self) -> str:
        """Name of the model's output: ``logits``, or ``embedding`` for a model without classes."""
        return self.outputs[0].name

    @property
    def answer_size(self) -> int:
        """How many numbers that output has for each image: classes, or the width of the embedding."""
        return typing.cast(int, self.outputs[0].shape[1])

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image."""
        return typing.cast(tuple[int, ...], self.inputs[0].shape[1:])


def choose_profile(profiles: Sequence[BatchProfile], batch: int) -> int:
    """Index of the profile for a batch size: among those that cover it, the one tuned for the nearest size.

    >>> choose_profile([BatchProfile(1, 1, 1), BatchProfile(1, 32, 128)], 1)
    0

    Raises:
        InputError: No profile covers it.
    """
    covering = [index for index, p in enumerate(profiles) if p.minimum <= batch <= p.maximum]
    if not covering:
        raise InputError(
            "the engine has no profile for this batch size",
            seen=batch,
            wanted=" or ".join(f"{p.minimum} to {p.maximum}" for p in profiles),
            fix=f"Choose --batch-sizes within these, or convert again with --batch {batch}:{batch}:{batch} added.",
        )
    # Distance as a ratio: 8 is as far from 4 as from 16. Ties go to the narrower profile, which is tuned more closely.
    return min(
        covering,
        key=lambda index: (
            abs(math.log(batch / max(profiles[index].optimum, 1))),
            profiles[index].maximum - profiles[index].minimum,
        ),
    )
