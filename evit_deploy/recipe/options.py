"""Options of conversion and measurement, each defined once.

Each struct is a section of a recipe, a group of command-line options (:mod:`evit_deploy.cli.options` creates a flag for
each field) and an argument in Python. The string below a field is its documentation in all three.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from evit_deploy.errors import InputError
from evit_deploy.recipe.sections import BatchSize, Count, Section, Threads
from evit_deploy.recipe.sections import PreprocessOptions as PreprocessOptions

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
Linear = Literal["gemm", "matmul"]


class BatchProfile(msgspec.Struct, frozen=True):
    """Batch sizes that one optimization profile of an engine covers.

    Args:
        minimum: Smallest batch size.
        optimum: Batch size that the kernels are tuned for.
        maximum: Largest batch size.
    """

    minimum: int
    optimum: int
    maximum: int

    def __str__(self) -> str:
        return f"{self.minimum}:{self.optimum}:{self.maximum}"


class BuildOptions(Section, frozen=True, kw_only=True):
    """Options for building an engine."""

    batches: tuple[tuple[BatchSize, BatchSize, BatchSize], ...] = ((1, 32, 128),)
    """Smallest, best and largest batch size of each optimization profile. [default: 1:32:128]"""
    gpus: tuple[str, ...] = ()
    """TensorRT-RTX: GPU to build for, ``sm80``; several are possible. [default: this machine's]"""
    workspace: Count | None = None
    """Maximum scratch memory in MiB. [default: the builder's own limit]"""
    optimization_level: Annotated[int, Meta(ge=0, le=5)] | None = None
    """How long to search for kernels, from 0 (quick) to 5 (thorough). [default: the builder's own]"""
    version_compatible: bool = False
    """TensorRT: build an engine that later versions can run too, with this version's lean runtime."""
    hardware_compatible: bool = False
    """TensorRT: build an engine that other GPUs from Ampere on can run too, at some cost in speed."""
    timing_cache: str | None = None
    """TensorRT: file that caches kernel timings; read and extended."""
    plugin: str | None = None
    """TensorRT: library with the plugin for ``evit::TokenReorg``; without it the operator's ONNX function is built from
    TensorRT's own layers. [default: none]"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("timing_cache", "plugin"):  # accept a Path as well
            if isinstance(value := getattr(self, field), Path):
                msgspec.structs.force_setattr(self, field, str(value))

    @property
    def profiles(self) -> tuple[BatchProfile, ...]:
        """The batch sizes, as optimization profiles."""
        return tuple(BatchProfile(*sizes) for sizes in self.batches)

    @property
    def build(self) -> "BuildOptions":
        """Only the build options, without the fields that a subclass adds."""
        return BuildOptions(**{field: getattr(self, field) for field in BuildOptions.__struct_fields__})


class ConvertOptions(BuildOptions, frozen=True, kw_only=True):
    """Options for converting a model."""

    targets: tuple[str, ...] = ()
    """What to create in addition to ``model.onnx``; repeatable, at most one engine. [default: tensorrt where it is
    usable, else onnx]"""
    precision: Precision | None = None
    """Precision of the files. [default: fp16 for an engine, else fp32]"""
    linear: Linear | None = None
    """Form of the linear layers: ``gemm``, two-dimensional with the bias inside, or ``matmul``, three-dimensional with
    a separate ``Add``. [default: the target's, gemm]"""
    calibration: str | None = None
    """Folder of real images for ``int8`` and ``fp8``; they set the range of every activation."""
    keep_precision: tuple[str, ...] = ()
    """For ``int8`` and ``fp8``: linear layers to keep in the base precision, by name or pattern such as
    ``blocks.11.mlp.*``; several are possible."""
    max_drop: Annotated[float, Meta(gt=0, le=100)] | None = None
    """For ``int8`` and ``fp8``: the most that quantizing may cost, in points of top-1 on labeled images of ``data``,
    else of agreement on the images of ``data`` or ``calibration``. The layers that cost most stay in the base
    precision."""
    sensitivity: bool = False
    """For ``int8`` and ``fp8``: measure the cost of quantizing each linear layer, with one run of 16 images each."""
    indices: bool = False
    """Add the kept candidates to ``model.onnx`` as outputs ``kept_<block>``."""
    normalize: bool = False
    """Scale the embedding of a model without classes to length 1, inside the exported files."""
    data: str | None = None
    """Folder of images to compare the answers with the dense twin's: top-1 and top-5 if they are in class folders
    (``class/image``); cosine and retrieval for a model without classes."""
    min_speedup: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    """Fail unless the model is at least this many times as fast as its dense twin at every measured batch size."""
    sign: str | None = None
    """Private key that signs the manifest: Ed25519, as written by OpenSSL (PEM) or OpenSSH."""
    target_options: dict[str, dict[str, Any]] = msgspec.field(default_factory=dict)
    """Option of a target from another package; repeatable."""
    preprocess: PreprocessOptions = PreprocessOptions()
    """Preprocessing and class names that replace the checkpoint's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("calibration", "data", "sign"):
            if isinstance(value := getattr(self, field), Path):
                msgspec.structs.force_setattr(self, field, str(value))


class ConvertSection(ConvertOptions, frozen=True, kw_only=True):
    """Options for converting the fine-tuned model."""

    targets: tuple[str, ...] = ("onnx",)
    """What to create in addition to ``model.onnx``; at most one engine."""
    calibration_images: Count = 256
    """For ``int8`` and ``fp8`` without a ``calibration`` folder: number of training images, without augmentation, to
    take activation ranges from."""


class ProfileOptions(Section, frozen=True, kw_only=True):
    """Options for measuring speed."""

    batch_sizes: Annotated[tuple[BatchSize, ...], Meta(min_length=1)] | None = None
    """Images per call, one row each. [default: 1,8,32 and on a GPU 128, as far as an engine covers them]"""
    duration: Annotated[float, Meta(gt=0, le=1e6)] = 10.0
    """Seconds to measure each batch size on each of CPU and GPU, after the warm-up. [default: 10]"""
    threads: Threads | None = None
    """CPU threads. [default: the runtime's own choice]"""


class ProfileSection(ProfileOptions, frozen=True, kw_only=True):
    """Options for measuring the speed of a run's result."""

    batch_sizes: Annotated[tuple[BatchSize, ...], Meta(min_length=1)] = (1, 8, 32)
    """Images per call, one row each."""
    duration: Annotated[float, Meta(gt=0, le=1e6)] = 3.0
    """Seconds to measure each row, after the warm-up."""


class CompareOptions(ProfileOptions, frozen=True, kw_only=True):
    """Options for comparing bundles."""

    duration: Annotated[float, Meta(gt=0, le=1e6)] = 30.0
    """Seconds to measure each runtime and batch size, all bundles and their baselines in turn. [default: 30]"""
    runtimes: tuple[str, ...] = ()
    """Runtime to compare on; several are possible, and the first one answers the images. [default: all that can run
    every bundle here]"""
    data: str | None = None
    """Folder of labeled images (``class/image``) for top-1, top-5 and agreement with the dense twin; for models
    without classes, recall@1 and cosine."""
    images: str | None = None
    """Folder of images without labels, for agreement with the dense twin only; for models without classes,
    cosine."""
    reference: str | None = None
    """Bundle to compare the others' top-1 with, by name or path. [default: the first]"""
    own_preprocessing: bool = False
    """Allow comparing top-1 of bundles with different preprocessing (size, crop or normalization), each with its own
    preprocessing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("data", "images", "reference"):
            if isinstance(value := getattr(self, field), Path):
                msgspec.structs.force_setattr(self, field, str(value))
        if self.data is not None and self.images is not None:
            raise InputError("images with labels and images without", seen="data and images", wanted="one of the two")
        idle = next((field for field in ("reference", "own_preprocessing") if getattr(self, field)), None)
        if self.data is None and idle is not None:
            what = f"{idle} is about top-1, for which there are no labeled images"
            raise InputError(what, fix=f"Give data too, or leave {idle} out.")


class TuneOptions(Section, frozen=True, kw_only=True):
    """Budget and options of the search for a schedule of token counts."""

    min_speedup: Annotated[float, Meta(gt=1, le=1e6)] | None = None
    """Budget: at least this many times as fast as the dense model."""
    max_latency: str | None = None
    """Budget: maximum time of a call, such as ``2ms``, ``800us`` or ``0.5s``."""
    max_drop: Annotated[float, Meta(ge=0, le=100)] | None = None
    """Budget: the fastest schedule at most this many points of top-1 below the dense model; needs ``data``."""
    calibration: str | None = None
    """Folder of at least 16 images like those in production, without labels: schedules are ranked by how close their
    answers are to the dense model's."""
    data: str | None = None
    """Folder of labeled images (``class/image``) to compare the finalists' top-1 with the dense model's."""
    sample: Annotated[int, Meta(ge=16, le=65_536)] = 64
    """Images to try each schedule on; finalists use up to twice as many. [default: 64]"""
    trials: Annotated[int, Meta(ge=4, le=65_536)] = 48
    """Schedules to try on images. [default: 48]"""
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] = 0
    """Seed of the search; when several processes search together, give each a different one. [default: 0]"""
    target: str | None = None
    """Target of ``convert`` to time and convert to. [default: onnx]"""
    precision: Precision | None = None
    """Precision to time and convert in. [default: fp16 for an engine, else fp32]"""
    runtime: str | None = None
    """Runtime to time on. [default: the one that verifies the target]"""
    batch: BatchSize = 1
    """Images per call. [default: 1]"""
    threads: Threads | None = None
    """CPU threads. [default: the runtime's own choice]"""
    duration: Annotated[float, Meta(gt=0, le=1e6)] = 40.0
    """Seconds to measure how block times depend on token counts, and again for the finalists. [default: 40]"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("calibration", "data"):
            if isinstance(value := getattr(self, field), Path):
                msgspec.structs.force_setattr(self, field, str(value))
        budgets = [name for name in ("min_speedup", "max_latency", "max_drop") if getattr(self, name) is not None]
        if len(budgets) != 1:
            raise InputError(
                "a search needs exactly one budget", seen=" and ".join(budgets) or "none",
                wanted="min_speedup, max_latency or max_drop",
            )  # fmt: skip
        if self.max_drop is not None and self.data is None:
            raise InputError("max_drop limits top-1, which needs labeled images", fix="Give data too.")
        if self.max_latency is not None:
            seconds_in(self.max_latency)


class PaperOptions(Section, frozen=True, kw_only=True):
    """Options for measuring the throughput of a table's rows."""

    throughput: bool = False
    """Measure the throughput of every row's model on this machine, all rows in turn."""
    runtime: str = "eager"
    """Runtime to time on. [default: eager, PyTorch as in the paper]"""
    batch: BatchSize | None = None
    """Images per call. [default: 128 on a GPU, as in the paper, else 8]"""
    threads: Threads | None = None
    """CPU threads. [default: the runtime's own choice]"""
    duration: Annotated[float, Meta(gt=0, le=1e6)] = 60.0
    """Seconds to measure, all rows together. [default: 60]"""


_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}


def seconds_in(text: str) -> float:
    """Converts a time with a unit to seconds.

    >>> seconds_in("2ms")
    0.002

    Raises:
        InputError: Not a time above 0, or without a unit.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(s|ms|us|µs)\s*", text)
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 0 < seconds <= 1e6:
        raise InputError("not a time", where="max_latency", seen=repr(text), wanted="a number and s, ms or us: 2ms")
    return seconds
