"""What ``convert`` makes of a reduced model: the ONNX file, the OpenVINO files, the engine, and the twin of each."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import torch

from evit_deploy.bundle.manifest import DENSE, ENGINE, MODEL, OPENVINO, TWIN, Engine
from evit_deploy.data.images import Preprocess
from evit_deploy.engines import build
from evit_deploy.engines.audit import engine_checks
from evit_deploy.engines.options import BUILDERS, BuildOptions, check_options, flag, usable
from evit_deploy.environment import nvidia as gpu
from evit_deploy.errors import InputError, MissingRequirement
from evit_deploy.export.portable import export_onnx
from evit_deploy.export.precision import PRECISIONS, QUANTIZED, set_precision
from evit_deploy.export.variants import with_indices
from evit_deploy.progress import doing
from evit_deploy.report.report import Report
from evit_deploy.tokens.plan import TokenPlan

_LOG = logging.getLogger(__name__)

PLAN_TARGETS = ("tensorrt", "tensorrt-rtx", "torch-tensorrt")
TARGETS = ("onnx", "openvino", *PLAN_TARGETS)
PROGRAM = "exported_program.pt2"
"""torch-tensorrt: the engine inside a PyTorch program."""


class Lowering(msgspec.Struct, frozen=True):
    """What is to be made.

    Args:
        targets: Names in :data:`TARGETS`; the ONNX file is always made.
        precision: Of the ONNX file, and so of everything that is made from it.
        options: For the builder of an engine.
        indices: Whether kept candidates are outputs ``kept_<block>``.
    """

    targets: tuple[str, ...]
    precision: str
    options: BuildOptions
    indices: bool = False

    @property
    def plan_target(self) -> str | None:
        """The target that makes ``engine.plan``, if there is one."""
        return next((target for target in self.targets if target in PLAN_TARGETS), None)

    @property
    def base(self) -> str:
        """Precision of what is not quantised: no FP32 attention is fused on a GPU, no FP16 is fast on a CPU."""
        return "fp16" if self.plan_target else "fp32"

    @property
    def runtimes(self) -> tuple[str, ...]:
        """Runtimes whose answers prove what was made; an engine for other GPUs is left to where they are."""
        cpu = "openvino" if self.precision == "bf16" else "onnxruntime"
        wanted = [cpu, *("openvino" for target in self.targets if target == "openvino")]
        here = gpu.compute_capability()
        if self.plan_target in BUILDERS and here is not None and here in (self.options.gpus or (here,)):
            wanted.append(str(self.plan_target))
        return tuple(dict.fromkeys(wanted))


def lowering(
    targets: Sequence[str] = (),
    precision: str | None = None,
    options: BuildOptions | None = None,
    calibration: Any = None,
    indices: bool = False,
) -> Lowering:
    """Fills in the defaults and makes sure, before any work, that this machine can make what is asked.

    Args:
        targets: ``tensorrt`` where it is usable, else ``onnx``, when empty.
        precision: ``fp16`` for an engine and ``fp32`` otherwise by default.
        options: For the builder.
        calibration: Real images, or where they are, if any.
        indices: See :class:`Lowering`.

    Raises:
        InputError: Targets, precision and options contradict one another.
        MissingRequirement: A package or a device is not here.
    """
    options = options or BuildOptions()
    for target in targets:
        if target not in TARGETS:
            raise InputError("unknown target", where="--target", seen=repr(target), wanted=", ".join(TARGETS))
    targets = tuple(dict.fromkeys(targets)) or (("tensorrt",) if usable("tensorrt") else ("onnx",))
    plans = [target for target in targets if target in PLAN_TARGETS]
    if len(plans) > 1:
        raise InputError(
            "a bundle holds one engine", where="--target", seen=" and ".join(plans), wanted="one of them",
            fix="Convert once for each.",
        )  # fmt: skip
    precision = precision or ("fp16" if plans else "fp32")
    _check_precision(precision, targets, calibration)
    if not plans:
        _refuse_options(options)
    for target in plans:
        check_options(target, precision, options)
        if target == "torch-tensorrt":
            check_torch_tensorrt(precision, options)
    made = Lowering(targets, precision, options, indices)
    _check_runtimes(made)
    return made


def _check_precision(precision: str, targets: Sequence[str], calibration: Any) -> None:
    if precision not in PRECISIONS:
        raise InputError("unknown precision", where="--precision", seen=repr(precision), wanted=", ".join(PRECISIONS))
    if precision in QUANTIZED and "torch-tensorrt" in targets:
        raise InputError(
            "torch-tensorrt does not quantise", where="--precision", seen=precision, wanted="fp32, fp16 or bf16",
            fix="Use --target tensorrt.",
        )  # fmt: skip
    if precision == "fp8" and "openvino" in targets:
        raise InputError("OpenVINO has no fp8", where="--precision", seen=precision, fix="Use --precision int8.")
    if precision in QUANTIZED and calibration is None:
        raise InputError(
            f"{precision} needs real images, from which it learns the range of every activation",
            where=f"--precision {precision}",
            fix="Give a folder of them with --calibration: 128 or more, like those that the model will see.",
        )
    if calibration is not None and precision not in QUANTIZED:
        raise InputError(
            f"{precision} needs no calibration images", where="--calibration", fix="Leave it out, or ask for int8."
        )


def _refuse_options(options: BuildOptions) -> None:
    """Nothing that was asked for is passed over in silence."""
    default = BuildOptions()
    for field in BuildOptions.__struct_fields__:
        if getattr(options, field) != getattr(default, field):
            fix = "Leave it out, or add a --target that builds an engine: " + ", ".join(PLAN_TARGETS) + "."
            raise InputError("there is no engine to build", where=flag(field), fix=fix)


def _check_runtimes(made: Lowering) -> None:
    """What is made is also run: without a runtime for it there would be no proof."""
    from evit_deploy.registry import RUNTIMES

    for name in made.runtimes:
        missing = RUNTIMES.get(name).missing()
        if missing is not None:
            why = "ONNX Runtime has no bf16 on a CPU" if made.precision == "bf16" else "it was asked for"
            raise MissingRequirement(f"{name} is needed ({why}): {missing.what}", seen=missing.seen, fix=missing.fix)


def write_models(
    reduced: torch.nn.Module,
    dense: torch.nn.Module,
    made: Lowering,
    name: str,
    preprocess: Preprocess,
    calibration: np.ndarray | None,
    staging: Path,
) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Exports a model and its dense twin, sets their precision and writes both.

    Args:
        reduced: The reduced model, FP32.
        dense: Its dense twin.
        made: What to make.
        name: timm name.
        preprocess: From image file to input tensor.
        calibration: Images for ``int8`` and ``fp8``.
        staging: Folder of the bundle in the making.

    Returns:
        The two files' content, without index outputs.
    """
    protos = []
    (staging / DENSE).parent.mkdir()
    for model, file, label in ((reduced, MODEL, "to ONNX"), (dense, DENSE, "the dense twin")):
        doing(_LOG, f"exporting {label}")
        proto = export_onnx(model, name=name, preprocess=preprocess)
        if made.precision != "fp32":
            doing(_LOG, f"setting {made.precision}")
            proto = set_precision(proto, made.precision, base=made.base, calibration=calibration)
        onnx.save(with_indices(proto) if made.indices else proto, staging / file)
        protos.append(proto)
    return protos[0], protos[1]


def write_openvino(staging: Path) -> None:
    """Writes the OpenVINO files of both twins."""
    from evit_deploy.export.openvino import save_openvino

    for twin in ("", TWIN):
        save_openvino(staging / twin / MODEL, staging / twin / OPENVINO)


def write_engines(
    reduced: torch.nn.Module, dense: torch.nn.Module, made: Lowering, plan: TokenPlan, staging: Path
) -> tuple[Engine, Report]:
    """Builds the engines of both twins.

    Returns:
        What the model's was built with, and the checks on it.
    """
    if made.plan_target == "torch-tensorrt":
        return _write_torch_tensorrt(reduced, dense, made, staging)

    engine: Any = None
    report = Report()
    # One after the other: a builder that times kernels must have the GPU for itself.
    for twin in (TWIN, ""):
        model, path = staging / twin / MODEL, staging / twin / ENGINE
        built = build.build_engine(model, path, str(made.plan_target), made.precision, made.options)
        engine = built.engine
        report += engine_checks(built, path, plan, "dense engine" if twin else "engine")
    return engine, report


def check_torch_tensorrt(precision: str, options: BuildOptions) -> None:
    """Makes sure, before any work, that Torch-TensorRT is here and can do what is asked.

    Raises:
        InputError: It cannot.
        MissingRequirement: It is not here, or there is no GPU.
    """
    from evit_deploy.engines.torch_tensorrt import check_request, require_torch_tensorrt

    for field in ("timing_cache", "plugin"):
        if getattr(options, field):
            raise InputError("torch-tensorrt has no use for it", where=flag(field), fix="Leave it out.")
    check_request(precision, options.profiles)
    require_torch_tensorrt()


def _write_torch_tensorrt(
    reduced: torch.nn.Module, dense: torch.nn.Module, made: Lowering, staging: Path
) -> tuple[Engine, Report]:
    from evit_deploy.engines.torch_tensorrt import build_torch_tensorrt

    engine: Any = None
    for model, twin in ((dense, TWIN), (reduced, "")):
        engine = build_torch_tensorrt(
            model,
            staging / twin / ENGINE,
            staging / twin / PROGRAM,
            precision=made.precision,
            profiles=made.options.profiles,
            optimization_level=made.options.optimization_level,
            hardware_compatible=made.options.hardware_compatible,
            version_compatible=made.options.version_compatible,
            workspace=made.options.workspace << 20 if made.options.workspace else None,
        )
    return engine, Report()
