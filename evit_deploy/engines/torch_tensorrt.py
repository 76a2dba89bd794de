"""The ``torch-tensorrt`` target: builds engines from PyTorch models with Torch-TensorRT, without an ONNX file.

Creates a plain plan (for TensorRT, trtexec, Triton) and an exported program (for PyTorch) from one exported graph.
Torch-TensorRT 2.14 pins torch 2.14, so it needs a separate environment, see ``docs/torch-tensorrt.md``. Nothing here
imports it before :func:`require_torch_tensorrt` has checked for it.
"""

import copy
import importlib
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evit_deploy.bundle.manifest import Engine
from evit_deploy.environment.nvidia import nvidia
from evit_deploy.environment.requirements import version_of
from evit_deploy.errors import InputError, MissingRequirement, StageError
from evit_deploy.export.answer import answer_name
from evit_deploy.export.card import INPUT, LOGITS
from evit_deploy.export.precision import DTYPES
from evit_deploy.files import write_atomically
from evit_deploy.files.drafts import draft
from evit_deploy.recipe.options import BatchProfile, BuildOptions
from evit_deploy.tokens.backbone import backbone_of

TARGET = "torch-tensorrt"
RELEASE = "2.14"
"""Required release of both torch and Torch-TensorRT, which is compiled against one torch."""
DISTRIBUTIONS = ("torch-tensorrt", "torch-tensorrt-rtx")
"""Both install the Python package ``torch_tensorrt``; the second lowers to TensorRT-RTX."""
ENVIRONMENT = 'python -m venv tt-env && tt-env/bin/pip install -e ".[torch-tensorrt]"'
"""Commands that create the environment in a checkout."""


def require_torch_tensorrt() -> Any:
    """Checks that Torch-TensorRT can be used here.

    Returns:
        The package ``torch_tensorrt``.

    Raises:
        MissingRequirement: Packages or the GPU are missing; the message lists them and how to install them.
    """
    found = {name: version_of(name) for name in ("torch", *DISTRIBUTIONS)}
    missing = []
    if found["torch"] is None or not _of_release(found["torch"]):
        missing.append(f"torch {RELEASE} (here: {found['torch']})")
    versions = [version for name in DISTRIBUTIONS if (version := found[name])]
    if not any(_of_release(version) for version in versions):
        missing.append(f"{DISTRIBUTIONS[0]} {RELEASE} (here: {', '.join(versions) or 'not installed'})")
    # Checked before the import, because importing 2.14 calls the CUDA driver (pytorch/TensorRT#4504).
    gpu = torch.cuda.is_available()
    if missing:
        what = " and ".join(missing) + (" are" if len(missing) > 1 else " is") + " needed"
        fix = f"It pins its own torch, so it takes its own environment; in a checkout: {ENVIRONMENT}."
        raise MissingRequirement(
            what, where=f"target {TARGET}", fix=fix + ("" if gpu else " It also needs a CUDA GPU.")
        )
    if not gpu:
        raise MissingRequirement(
            "Torch-TensorRT builds on the GPU that will run the engine, and this machine has no GPU",
            where=f"target {TARGET}",
            fix="Run it on a machine with an NVIDIA GPU; for a plan built without one, use --target tensorrt-rtx.",
        )
    try:
        with _quiet():
            return importlib.import_module("torch_tensorrt")
    except Exception as error:  # libraries of the wrong CUDA or driver: ImportError, OSError, RuntimeError
        raise MissingRequirement(
            f"Torch-TensorRT is installed and cannot be imported ({_root(error)})",
            where=f"target {TARGET}",
            fix=f"Create the environment again; in a checkout: {ENVIRONMENT}.",
        ) from error


def _of_release(version: str) -> bool:
    return version.split("+")[0].startswith(RELEASE + ".")


def build_torch_tensorrt(
    model: nn.Module,
    plan_path: Path,
    program_path: Path,
    *,
    precision: str,
    options: BuildOptions,
) -> Engine:
    """Lowers a model to a plan, and to an exported program with an engine of the same graph.

    Both accept float32 images and return float32 answers; in the plan these are named ``input`` and ``logits`` or
    ``embedding``.

    Args:
        model: Reduced or dense, FP32; not changed.
        plan_path: Path of the plan.
        program_path: Path of the exported program, ``*.pt2``.
        precision: ``fp32``, ``fp16`` or ``bf16``; scores are always FP32.
        options: Options for the builder, with one optimization profile, see :func:`_only`.

    Returns:
        The manifest's record of the engine.

    Raises:
        InputError: The precision or the profiles are not supported.
        MissingRequirement: See :func:`require_torch_tensorrt`.
        StageError: Building or writing failed; neither file was written.
    """
    profile = check_request(precision, options.profiles)
    package = require_torch_tensorrt()
    tensorrt = importlib.import_module("tensorrt")  # with the -rtx wheel this is an alias of tensorrt_rtx
    runtime = getattr(tensorrt, "_package_name", "tensorrt")
    if options.hardware_compatible and runtime == "tensorrt_rtx":
        raise InputError(
            "TensorRT-RTX has no hardware compatibility level",
            where="hardware_compatible",
            fix="Its plans run on several GPUs as they are; leave the option out.",
        )
    workspace = options.workspace << 20 if options.workspace else None  # bytes
    settings: dict[str, Any] = {
        "optimization_level": options.optimization_level,
        "hardware_compatible": options.hardware_compatible,
        "version_compatible": options.version_compatible,
        "workspace_size": workspace or 0,
        "disable_tf32": True,  # FP32 operations (in 16 bits: the sum for the fused row) must not use TF32
        # At a fixed batch the converter of scatter creates a float64 zero, which TensorRT lacks.
        "truncate_double": True,
    }
    start = time.monotonic()
    with _failures(), _quiet(), draft(program_path.parent) as making:
        # A separate timing cache: the default is in a folder that all users of the machine share.
        settings["timing_cache_path"] = str(making.folder / "timing" / "cache.bin")
        exported = export_program(model, precision, profile, device="cuda")
        plan = lower_to_plan(package, exported, profile, settings, answer_name(model))
        program = making.folder / program_path.name
        lower_to_program(package, exported, profile, settings, program)
        making.publish(program, program_path, replace=True)
        try:
            write_atomically(plan_path, plan)
        except BaseException:
            program_path.unlink(missing_ok=True)
            raise
    major, minor = torch.cuda.get_device_capability()
    return Engine(
        target=TARGET,
        version=tensorrt.__version__,
        gpus=(f"sm{major}{minor}",),
        driver=nvidia().driver,
        precision=precision,
        profiles=(profile,),
        plugin=None,
        options={
            "runtime": runtime,
            "torch_tensorrt": package.__version__,
            "torch": torch.__version__,
            "optimization_level": options.optimization_level,
            "hardware_compatible": options.hardware_compatible,
            "version_compatible": options.version_compatible,
            "lean_runtime": False,  # Torch-TensorRT excludes it
            "workspace": workspace,
        },
        seconds=round(time.monotonic() - start, 3),
    )


def check_request(precision: str, profiles: Sequence[BatchProfile]) -> BatchProfile:
    """Checks precision and profiles before any work.

    Returns:
        The single profile.

    Raises:
        InputError: The precision or the profiles are not supported.
    """
    if precision in ("int8", "fp8"):
        raise InputError(
            f"{TARGET} cannot make {precision}: quantization happens in the ONNX file, which this target bypasses",
            where="--precision",
            seen=precision,
            wanted=", ".join(DTYPES),
            fix=f"For {precision} use --target tensorrt.",
        )
    if precision not in DTYPES:
        raise InputError("no such precision", where="--precision", seen=repr(precision), wanted=", ".join(DTYPES))
    return _only(profiles)


def _only(profiles: Sequence[BatchProfile]) -> BatchProfile:
    """Returns the single optimization profile.

    A plan could have several, but a saved program cannot choose among them: its engine is no longer a module, which
    ``torch_tensorrt.runtime.optimization_profile`` needs, so the first profile would be used for every batch or fail.

    Raises:
        InputError: There are several or none, or the numbers are not in increasing order.
    """
    if len(profiles) != 1:
        raise InputError(
            "an exported program has no way to choose between optimization profiles",
            where="--batch",
            seen=", ".join(map(str, profiles)) or "none",
            wanted="one MIN:OPT:MAX",
            fix="Give one range that covers all batches, or use --target tensorrt.",
        )
    (profile,) = profiles
    if not 1 <= profile.minimum <= profile.optimum <= profile.maximum:
        raise InputError(
            "these batch sizes are not in increasing order",
            where="--batch",
            seen=profile,
            wanted="1 <= MIN <= OPT <= MAX",
        )
    return profile


class _Images(nn.Module):
    """A model that computes in its own precision between float32 images and float32 answers."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    # Not named `input`, which torch.export would rename to `input_1` because it is a Python builtin.
    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.dtype)).float()


def export_program(
    model: nn.Module, precision: str, profile: BatchProfile, *, device: str
) -> torch.export.ExportedProgram:
    """Exports a model in a form for which Torch-TensorRT has converters.

    Args:
        model: Reduced or dense, FP32; copied, not changed.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        profile: Batch sizes that the program must support.
        device: Device of the constants.

    Returns:
        A program from float32 images to float32 answers.
    """
    size = (backbone_of(model).channels(model), *backbone_of(model).image_size(model))
    dtype = DTYPES[precision]
    # A deep copy, because casting and moving would change shared tensors.
    cast = _Images(copy.deepcopy(model).eval().to(device=device, dtype=dtype), dtype).eval()
    least = profile.minimum if _fixed(profile) else max(2, profile.minimum)  # torch.export specializes a size of 1
    example = torch.zeros(least, *size, device=device)
    with torch.no_grad():
        exported = torch.export.export(cast, (example,), dynamic_shapes=_dynamic_shapes(profile))
    return exported.run_decompositions({torch.ops.aten.sort.stable: _sort})


def _sort(scores: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """Replaces a stable sort by a plain one, which has a converter to TensorRT's TopK (pytorch/TensorRT#2514).

    TopK gives the same order except for exact ties, which TensorRT leaves unspecified anyway.
    """
    return torch.ops.aten.sort.default(scores, dim, descending)


def _fixed(profile: BatchProfile) -> bool:
    return profile.minimum == profile.maximum


def _dynamic_shapes(profile: BatchProfile) -> dict[str, Any]:
    batch = {} if _fixed(profile) else {0: torch.export.Dim("batch", min=profile.minimum, max=profile.maximum)}
    return {"images": batch}


def _input(package: Any, exported: torch.export.ExportedProgram, profile: BatchProfile) -> Any:
    size = exported.example_inputs[0][0].shape[1:]  # type: ignore[index]
    if _fixed(profile):
        return package.Input(shape=(profile.maximum, *size), dtype=torch.float32, name="images")
    # A list with one profile: given min_shape, opt_shape and max_shape, `compile` uses only the range, and tunes the
    # engine for the batch size of the export's example.
    ends = (("min_shape", profile.minimum), ("opt_shape", profile.optimum), ("max_shape", profile.maximum))
    shapes = {name: (batch, *size) for name, batch in ends}
    return package.Input(profiles=[shapes], dtype=torch.float32, name="images")


def lower_to_plan(
    package: Any,
    exported: torch.export.ExportedProgram,
    profile: BatchProfile,
    options: dict[str, Any],
    answer: str = LOGITS,
) -> bytes:
    """Builds a plain plan with the input ``input`` and one output.

    Args:
        package: ``torch_tensorrt``.
        exported: Result of :func:`export_program`.
        profile: The profile given there.
        options: Compilation settings.
        answer: Name of the output.

    Returns:
        The serialized engine.
    """
    return package.dynamo.convert_exported_program_to_serialized_trt_engine(
        exported,
        arg_inputs=(_input(package, exported, profile),),
        arg_input_binding_names=(INPUT,),
        output_binding_names=answer,
        require_full_compilation=True,
        **options,
    )


def lower_to_program(
    package: Any,
    exported: torch.export.ExportedProgram,
    profile: BatchProfile,
    options: dict[str, Any],
    path: Path,
) -> None:
    """Saves an exported program that contains a single engine.

    Args:
        package: ``torch_tensorrt``.
        exported: Result of :func:`export_program`.
        profile: The profile given there.
        options: Compilation settings.
        path: Path of the program.
    """
    compiled = package.dynamo.compile(
        exported, arg_inputs=(_input(package, exported, profile),), require_full_compilation=True, **options
    )
    # An example and its dynamic dimension instead of the Input, whose example has OPT images: a 1 would be specialized.
    package.save(
        compiled,
        str(path),
        output_format="exported_program",
        arg_inputs=exported.example_inputs[0],  # type: ignore[index]
        dynamic_shapes=_dynamic_shapes(profile),
    )


@contextmanager
def _failures() -> Iterator[None]:
    """Converts exceptions of torch, Torch-TensorRT and TensorRT to a StageError."""
    try:
        yield
    except (InputError, MissingRequirement, StageError):
        raise
    except Exception as error:
        raise StageError(
            f"Torch-TensorRT could not build the engine: {_root(error)}",
            where=f"target {TARGET}",
            fix="Nothing was written. Run with --debug for details.",
        ) from error


def _root(error: BaseException) -> str:
    """First line of the root cause; Torch-TensorRT wraps it two or three times."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences warnings and log messages; failures are also raised."""
    loggers = [logging.getLogger(name) for name in ("torch_tensorrt", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
