"""The ``torch-tensorrt`` target: a reduced PyTorch model through Torch-TensorRT, without an ONNX file in between.

It makes a plain plan (for TensorRT, trtexec, Triton) and an exported program (for PyTorch) from one exported graph.
Torch-TensorRT 2.14 pins torch 2.14, so it lives in an environment of its own; ``docs/torch-tensorrt.md`` has the lines.
Nothing here imports it before :func:`require_torch_tensorrt` has looked for it.
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
"""Of torch and Torch-TensorRT alike: each Torch-TensorRT is compiled against one torch."""
DISTRIBUTIONS = ("torch-tensorrt", "torch-tensorrt-rtx")
"""Both install the Python package ``torch_tensorrt``; the second lowers to TensorRT-RTX."""
ENVIRONMENT = 'python -m venv tt-env && tt-env/bin/pip install -e ".[torch-tensorrt]"'
"""In a checkout."""


def require_torch_tensorrt() -> Any:
    """Makes sure that Torch-TensorRT can be used here.

    Returns:
        The package ``torch_tensorrt``.

    Raises:
        MissingRequirement: A package or the GPU is missing; the message names all that is, and the line that helps.
    """
    found = {name: version_of(name) for name in ("torch", *DISTRIBUTIONS)}
    missing = []
    if found["torch"] is None or not _of_release(found["torch"]):
        missing.append(f"torch {RELEASE} (here: {found['torch']})")
    versions = [version for name in DISTRIBUTIONS if (version := found[name])]
    if not any(_of_release(version) for version in versions):
        missing.append(f"{DISTRIBUTIONS[0]} {RELEASE} (here: {', '.join(versions) or 'not installed'})")
    # Asked before the import: 2.14 calls the CUDA driver while it is imported (pytorch/TensorRT#4504).
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
    """Lowers a model into a plan and an exported program around an engine of the same graph.

    Both take float32 images and give float32 answers; in the plan they are called ``input`` and ``logits`` or
    ``embedding``.

    Args:
        model: Reduced or dense, FP32; it stays as it is.
        plan_path: Where the plan goes.
        program_path: Where the exported program goes, ``*.pt2``.
        precision: ``fp32``, ``fp16`` or ``bf16``; scores are FP32 in each.
        options: For the builder; one optimization profile, see :func:`_only`.

    Returns:
        What the plan was built with.

    Raises:
        InputError: The precision or the profiles cannot be had.
        MissingRequirement: See :func:`require_torch_tensorrt`.
        StageError: Building or writing failed; neither file was written.
    """
    profile = check_request(precision, options.profiles)
    package = require_torch_tensorrt()
    tensorrt = importlib.import_module("tensorrt")  # with the -rtx wheel, an alias of tensorrt_rtx that it installs
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
        "disable_tf32": True,  # what is FP32 in the graph (all of fp32, the fused row in the others) is FP32
        # At a fixed batch the converter of scatter makes its zero a float64, which TensorRT lacks; nothing else is one.
        "truncate_double": True,
    }
    start = time.monotonic()
    with _failures(), _quiet(), draft(program_path.parent) as making:
        # The cache belongs to this build: by default it lies in a folder that all users of the machine share.
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
            "lean_runtime": False,  # Torch-TensorRT leaves it out
            "workspace": workspace,
        },
        seconds=round(time.monotonic() - start, 3),
    )


def check_request(precision: str, profiles: Sequence[BatchProfile]) -> BatchProfile:
    """Looks at what is asked before any work.

    Returns:
        The one profile there may be.

    Raises:
        InputError: The precision or the profiles cannot be had.
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
    """The one profile there may be.

    A plan could hold several, and a compiled module could choose among them; a saved program cannot: its engine is no
    module any more, which is what ``torch_tensorrt.runtime.optimization_profile`` looks for, so the first would serve
    every batch or fail.

    Raises:
        InputError: There are several or none, or the numbers do not rise.
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

    # Not `input`: exported under that name it becomes `input_1`, so as not to hide Python's own function.
    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.dtype)).float()


def export_program(
    model: nn.Module, precision: str, profile: BatchProfile, *, device: str
) -> torch.export.ExportedProgram:
    """Exports a model in the form in which Torch-TensorRT has a converter for every operation.

    Args:
        model: Reduced or dense, FP32; it is copied, not changed.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        profile: Batch sizes that the program must take.
        device: Where the constants lie.

    Returns:
        A program from float32 images to float32 answers.
    """
    size = (backbone_of(model).channels(model), *backbone_of(model).image_size(model))
    dtype = DTYPES[precision]
    # A full copy: casting and moving a module changes the tensors that a copy would share.
    cast = _Images(copy.deepcopy(model).eval().to(device=device, dtype=dtype), dtype).eval()
    least = profile.minimum if _fixed(profile) else max(2, profile.minimum)  # a 1 would be taken for a constant
    example = torch.zeros(least, *size, device=device)
    with torch.no_grad():
        exported = torch.export.export(cast, (example,), dynamic_shapes=_dynamic_shapes(profile))
    return exported.run_decompositions({torch.ops.aten.sort.stable: _sort})


def _sort(scores: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """A stable sort as a plain one: only that has a converter, onto TensorRT's TopK (pytorch/TensorRT#2514).

    TopK gives the same order but for exact ties, which TensorRT leaves open with or without this.
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
    # A list of one profile: from min_shape, opt_shape and max_shape, `compile` would take the range only, and tune the
    # engine for the batch that the export happened to be traced with.
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
        exported: From :func:`export_program`.
        profile: The same as there.
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
    """Saves an exported program that holds one engine and nothing else.

    Args:
        package: ``torch_tensorrt``.
        exported: From :func:`export_program`.
        profile: The same as there.
        options: Compilation settings.
        path: Where it goes.
    """
    compiled = package.dynamo.compile(
        exported, arg_inputs=(_input(package, exported, profile),), require_full_compilation=True, **options
    )
    # An example and the dimension, not the Input: its example has OPT images, and a 1 would be taken for a constant.
    package.save(
        compiled,
        str(path),
        output_format="exported_program",
        arg_inputs=exported.example_inputs[0],  # type: ignore[index]
        dynamic_shapes=_dynamic_shapes(profile),
    )


@contextmanager
def _failures() -> Iterator[None]:
    """Turns what torch, Torch-TensorRT and TensorRT raise into one kind of error."""
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
    """First line of what went wrong in the first place; Torch-TensorRT wraps it two or three times."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps narration off stderr: what fails is raised as well."""
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
