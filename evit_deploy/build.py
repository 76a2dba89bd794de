"""From an ONNX file to an engine, by TensorRT or TensorRT-RTX, through polygraphy's loaders.

Networks are always strongly typed: the precision is the file's. The builder runs in a process of its own, because it is
a native library that can end its process, and because polygraphy takes either TensorRT or TensorRT-RTX for the whole
process. This module is that process's program too, and imports nothing heavy.

TensorRT builds on the GPU that will run the engine. TensorRT-RTX builds ahead of time for GPUs that are named, on any
machine.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from evit_deploy import gpu
from evit_deploy.engine import BatchProfile, Engine
from evit_deploy.errors import InputError, MissingRequirement, StageError

TARGETS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Target -> the Python module that builds for it."""
RTX_GPUS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
DATA_CENTRE = ("sm90", "sm100", "sm103")
_LEAST = {"fp8": 89, "bf16": 80}
"""The first compute capability with matrix units for a type."""
TIME_LIMIT = 3600.0


class BuildOptions(msgspec.Struct, frozen=True):
    """What a builder can be told.

    Args:
        profiles: Batch sizes to cover, one optimization profile each.
        gpus: TensorRT-RTX: compute capabilities to build for (``sm80``); the GPU of this machine when empty.
        workspace: Most scratch memory in MiB; the builder's own limit by default.
        optimization_level: 0 (quick) to 5 (thorough); the builder's own by default.
        version_compatible: Whether later TensorRT versions may run the engine.
        hardware_compatible: Whether GPUs from Ampere on may run it, at some cost.
        timing_cache: TensorRT: file that remembers which kernels were fast, read and extended.
        plugin: Library with a plugin for ``evit::TokenReorg``; without it the operator's body is built in.
    """

    profiles: tuple[BatchProfile, ...] = (BatchProfile(1, 32, 128),)
    gpus: tuple[str, ...] = ()
    workspace: int | None = None
    optimization_level: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    timing_cache: Path | None = None
    plugin: Path | None = None


class Built(msgspec.Struct, frozen=True):
    """A finished build.

    Args:
        engine: For the manifest.
        attentions: Fusable attention layers in the network.
        layers: The engine inspector's JSON; ``None`` where no GPU could load the engine.
    """

    engine: Engine
    attentions: int
    layers: str | None


def check_options(target: str, precision: str, options: BuildOptions) -> None:
    """Makes sure, before any work, that this machine can build what is asked.

    Raises:
        InputError: The options contradict the target or one another.
        MissingRequirement: The builder or its GPU is not here.
    """
    for profile in options.profiles:
        if not 1 <= profile.minimum <= profile.optimum <= profile.maximum:
            raise InputError(
                "not a range of batch sizes", where="--batch", seen=profile, wanted="1 <= MIN <= OPT <= MAX"
            )
    if options.optimization_level is not None and not 0 <= options.optimization_level <= 5:
        raise InputError(
            "no such level", where="--optimization-level", seen=options.optimization_level, wanted="0 to 5"
        )
    if options.plugin is not None and not options.plugin.is_file():
        raise InputError("no such library", where="--plugin", seen=options.plugin)
    if target == "tensorrt-rtx":
        _check_rtx(precision, options)
    elif options.gpus:
        raise InputError(
            f"{target} builds for the GPU it runs on", where="--gpu", seen=", ".join(options.gpus),
            fix="Leave --gpu out, or use --target tensorrt-rtx, which builds ahead of time.",
        )  # fmt: skip
    if target not in TARGETS:  # torch-tensorrt looks after itself
        return
    missing = [name for name in (TARGETS[target], "polygraphy") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingRequirement(
            f"{target} needs {' and '.join(missing)}", where=f"--target {target}", seen="not installed",
            fix=f'pip install "evit-deploy[{target}]"',
        )  # fmt: skip
    if target == "tensorrt" and gpu.compute_capability() is None:
        raise MissingRequirement(
            "TensorRT builds on a GPU, and this machine has none",
            where="--target tensorrt",
            fix="Build where the engine will run, or ahead of time with --target tensorrt-rtx --gpu sm80.",
        )


def _check_rtx(precision: str, options: BuildOptions) -> None:
    if options.timing_cache is not None:
        raise InputError("TensorRT-RTX has no use for a timing cache", where="--timing-cache", fix="Leave it out.")
    if options.plugin is not None:
        raise InputError(
            "TensorRT-RTX takes no plugins", where="--plugin", fix="Leave it out: the operator's body is built in."
        )
    for name in options.gpus:
        if name not in RTX_GPUS:
            raise InputError(
                "not a GPU that TensorRT-RTX builds for", where="--gpu", seen=repr(name), wanted=", ".join(RTX_GPUS),
                fix="Hopper and data-centre Blackwell need --target tensorrt." if name in DATA_CENTRE else None,
            )  # fmt: skip
    current = gpu.compute_capability()
    if not options.gpus and current is None:
        raise InputError(
            "which GPU is the engine for? This machine has none to look at", where="--gpu", wanted=", ".join(RTX_GPUS),
            fix="An A100 is sm80, an A10 or RTX 30 sm86, an L4, L40 or RTX 40 sm89, an RTX 50 sm120.",
        )  # fmt: skip
    for name in options.gpus or (current,):
        least = _LEAST.get(precision, 0)
        if name is not None and int(name.removeprefix("sm")) < least:
            raise InputError(
                f"{name} cannot compute in {precision}", where="--precision", seen=precision,
                wanted=f"sm{least} or later for {precision}", fix="Use --precision fp16 or int8.",
            )  # fmt: skip


def usable(target: str) -> bool:
    """Whether this machine can build for a target without being told more."""
    modules = (TARGETS[target], "polygraphy")
    return all(importlib.util.find_spec(name) is not None for name in modules) and gpu.compute_capability() is not None


def build_engine(model: Path, plan: Path, target: str, precision: str, options: BuildOptions) -> Built:
    """Builds an engine.

    Args:
        model: A file that ``export_onnx`` and ``set_precision`` made.
        plan: Where the engine goes.
        target: ``tensorrt`` or ``tensorrt-rtx``.
        precision: Of the file.
        options: What to tell the builder.

    Raises:
        InputError: See :func:`check_options`.
        MissingRequirement: See :func:`check_options`.
        StageError: The builder failed; ``plan`` was not written.
    """
    check_options(target, precision, options)
    request = {
        "model": str(model.absolute()),
        "plan": str(plan.absolute()),
        "module": TARGETS[target],
        "precision": precision,
        "options": options,
    }
    environment = os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": str(int(target == "tensorrt-rtx"))}
    started = time.perf_counter()
    try:
        process = subprocess.run(
            [sys.executable, "-m", "evit_deploy.build"],
            input=msgspec.json.encode(request), capture_output=True, env=environment, timeout=TIME_LIMIT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise StageError(f"the builder did not finish in {TIME_LIMIT:.0f} seconds", where=model) from None
    seconds = time.perf_counter() - started
    if process.returncode or not plan.is_file():
        plan.unlink(missing_ok=True)
        raise StageError(f"{target} could not build the engine: {_reason(process)}", where=model)
    answer = json.loads(process.stdout)
    current = gpu.compute_capability()
    engine = Engine(
        target=target,
        version=answer["version"],
        gpus=options.gpus or ((current,) if current else ()),
        driver=gpu.snapshot().driver if current else None,
        precision=precision,
        profiles=options.profiles,
        plugin=_sha256(options.plugin) if options.plugin and answer["plugins"] else None,
        options={
            "workspace": options.workspace,
            "optimization_level": options.optimization_level,
            "version_compatible": options.version_compatible,
            "hardware_compatible": options.hardware_compatible,
        },
        seconds=round(seconds, 2),
    )
    return Built(engine, answer["attentions"], answer["layers"])


def _reason(process: "subprocess.CompletedProcess[bytes]") -> str:
    """What the builder complained about first; its own lines are marked [E]."""
    lines = [line.strip() for line in process.stderr.decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "[E]" in line or "Error" in line] or lines[-1:]
    if process.returncode < 0:
        errors.append(f"the process ended by signal {-process.returncode}")
    return errors[0][:500] if errors else f"exit code {process.returncode}"


def _sha256(path: Path) -> str:
    from evit_deploy.bundle import sha256

    return sha256(path)


def _main() -> None:
    """The builder's process: request on stdin, answer on stdout, everything libraries print on stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.buffer.read())
    answers.write(json.dumps(_build(request)))
    answers.close()


def _build(request: dict[str, Any]) -> dict[str, Any]:
    from polygraphy import util
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import (
        CreateConfig,
        EngineBytesFromNetwork,
        LoadPlugins,
        NetworkFromOnnxPath,
        Profile,
        SetDecomposableAttentions,
    )
    from polygraphy.logger import G_LOGGER

    trt = importlib.import_module(request["module"])
    G_LOGGER.module_severity = G_LOGGER.ERROR
    options = request["options"]
    path = request["model"]
    if options["plugin"]:
        path = LoadPlugins([options["plugin"]], path)
    builder, network, parser = NetworkFromOnnxPath(path, strongly_typed=True)()
    if request["precision"] == "fp32":  # no kernel fuses FP32 attention: it may be taken apart
        builder, network, parser = SetDecomposableAttentions((builder, network, parser))()
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    settings: dict[str, Any] = {
        "profiles": [_profile(network, Profile(), profile) for profile in options["profiles"]],
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        "builder_optimization_level": options["optimization_level"],
        "version_compatible": options["version_compatible"] or None,
    }
    if options["workspace"]:
        settings["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: options["workspace"] << 20}
    if options["hardware_compatible"]:
        settings["hardware_compatibility_level"] = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if request["module"] == "tensorrt_rtx":
        capabilities = [(int(gpu[2:-1]), int(gpu[-1])) for gpu in options["gpus"]]
        config: Any = CreateConfigRTX(**settings, compute_capabilities=capabilities or None, use_gpu=not capabilities)
    else:
        config = CreateConfig(**settings, tf32=False, load_timing_cache=options["timing_cache"])
    plan = EngineBytesFromNetwork((builder, network, parser), config, save_timing_cache=options["timing_cache"])()
    util.save_file(plan, request["plan"])
    return {
        "version": trt.__version__,
        "attentions": sum(kind == trt.LayerType.ATTENTION_INPUT for kind in kinds),
        "plugins": sum(kind == trt.LayerType.PLUGIN_V3 for kind in kinds),
        "layers": _layers(trt, plan),
    }


def _profile(network: Any, profile: Any, batches: dict[str, int]) -> Any:
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        rest = tuple(tensor.shape)[1:]
        profile.add(tensor.name, *((batches[end], *rest) for end in ("minimum", "optimum", "maximum")))
    return profile


def _layers(trt: Any, plan: Any) -> str | None:
    """What the engine inspector says; only a machine with a GPU that the engine is for can load it."""
    try:
        engine = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR)).deserialize_cuda_engine(plan)
        return engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    except Exception:
        return None


if __name__ == "__main__":
    _main()
