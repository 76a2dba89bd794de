"""The types that travel between stages: what a bundle's manifest records, and the names of its files."""

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
"""The same as :data:`REPORT`, to read."""
SIGNATURE = "manifest.sig"
"""Of the manifest, which lists the hash of everything else; see :mod:`evit_deploy.bundle.signature`."""
PACKAGE = "package.json"
"""Of a package, which is made of bundles: says what it was made of, and lists its files."""
TWIN = "dense/"
"""Folder of the dense twin; in it, files are named as the model's own."""


class Parent(msgspec.Struct, frozen=True):
    """What a bundle was made from.

    Args:
        source: A path relative to the bundle, or a timm name.
        sha256: Hash of the file; ``None`` for a timm name.
        model: timm name that was forced with ``--model``, if any.
    """

    source: str
    sha256: str | None
    model: str | None = None


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
        options: Other options of the builder.
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
        shape: Sizes; ``None`` where a dimension is dynamic.
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
        model_args: What ``timm.create_model`` needs in addition.
        tokens: What was asked for.
        plan: Token counts and costs.
        preprocess: From image file to input tensor.
        precision: Of the weights in the files.
        labels: Class names, if known.
        inputs: What the model wants.
        outputs: What it gives.
        files: Name inside the bundle -> SHA-256.
        parents: What it was made from.
        recipe: The recipe, when ``run`` made it.
        versions: Packages that made it.
        device: Machine that made it.
        results: The figures that matter, from the report.
        notes: What was assumed.
        engine: What ``engine.plan`` was built with, if there is one.
        normalized: Whether the embedding is scaled to length 1, inside the files.
        origins: Where ``preprocess`` and ``labels`` come from, for people.
        unquantized: Linear layers of a quantized model that stayed in the base precision, by name.

    Raises:
        InputError: It describes no model that evit-deploy makes.
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
        """Name of the output that answers: ``logits``, or ``embedding`` of a model without classes."""
        return self.outputs[0].name


def choose_profile(profiles: Sequence[BatchProfile], batch: int) -> int:
    """The profile to run a batch in: of those that cover it, the one tuned for the nearest size.

    >>> choose_profile([BatchProfile(1, 1, 1), BatchProfile(1, 32, 128)], 1)
    0

    Raises:
        InputError: None covers it.
    """
    covering = [index for index, p in enumerate(profiles) if p.minimum <= batch <= p.maximum]
    if not covering:
        raise InputError(
            "the engine has no profile for this batch size",
            seen=batch,
            wanted=" or ".join(f"{p.minimum} to {p.maximum}" for p in profiles),
            fix=f"Give --batch-sizes within, or convert again with --batch {batch}:{batch}:{batch} beside the others.",
        )
    # Distance in ratios: 8 is as far from 4 as from 16. Of two as near, the narrower one was tuned more closely.
    return min(
        covering,
        key=lambda index: (
            abs(math.log(batch / max(profiles[index].optimum, 1))),
            profiles[index].maximum - profiles[index].minimum,
        ),
    )
