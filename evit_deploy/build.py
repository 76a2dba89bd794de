"""From an ONNX file to an engine, by TensorRT or TensorRT-RTX, through polygraphy's loaders.

Networks are always strongly typed: the precision is the file's. The builder runs in a process of its own, because it is
a native library that can end its process, and because polygraphy takes either TensorRT or TensorRT-RTX for the whole
process. This module is that process's program too, and imports nothing heavy.

TensorRT builds on the GPU that will run the engine. TensorRT-RTX builds ahead of time for GPUs that are named, on any
machine.
"""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from evit_deploy import gpu
from evit_deploy.engine import RTX_GPUS, BatchProfile, Engine
from evit_deploy.environment import nvidia, require_extra, usable_targets
from evit_deploy.errors import InputError, MissingRequirement, StageError
from evit_deploy.plugin import choose_plugin, load_plugin

TARGETS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Target -> the Python module that builds for it."""
_DATA_CENTRE = ("sm90", "sm100", "sm103")
_LEAST = {"fp8": 89, "bf16": 80}
"""The first compute capability with matrix units for a type."""
_WHICH_GPU = "An A100 is sm80, an A10 or RTX 30 sm86, an L4, L40 or RTX 40 sm89, an RTX 50 sm120."
TIME_LIMIT = 3600.0
_ADVICE = (
    (r"not supported by a dedicated kernel", "Use --precision fp32, where attention may be taken apart."),
    (
        r"node_of_sum.*FP32 GEMM is not supported",
        "Turing cannot sum up the fused token: convert with --no-fuse, or without sm75.",
    ),
    (r"within workspace limit", "Give a larger --workspace, or none."),
    (r"exceed_int32_dim", "Give a --batch with a smaller maximum."),
)
"""What to do about some complaints of the builder."""


class BuildOptions(msgspec.Struct, frozen=True):
    """What a builder can be told.

    Args:
        profiles: Batch sizes to cover, one optimization profile each.
        gpus: TensorRT-RTX: compute capabilities to build for (``sm80``); the GPU of this machine when empty.
        workspace: Most scratch memory in MiB; the builder's own limit by default.
        optimization_level: 0 (quick) to 5 (thorough); the builder's own by default.
        version_compatible: TensorRT: whether later versions may run the engine.
        hardware_compatible: TensorRT: whether other GPUs from Ampere on may run it, at some cost.
        timing_cache: TensorRT: file that remembers which kernels were fast, read and extended.
        plugin: TensorRT: library with a plugin for ``evit::TokenReorg``; without it the operator's body is built in.
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

    Args:
        target: ``tensorrt``, ``tensorrt-rtx`` or ``torch-tensorrt``, which looks for its own packages.
        precision: Of the engine.
        options: For its builder.

    Raises:
        InputError: The options contradict the target or one another.
        MissingRequirement: The builder or its GPU is not here.
    """
    _check_values(options)
    if target == "tensorrt-rtx":
        _check_rtx(options)
    elif options.gpus:
        raise InputError(
            f"{target} builds for the GPU it runs on", where="--gpu", seen=", ".join(options.gpus),
            fix="Leave --gpu out, or use --target tensorrt-rtx, which builds ahead of time.",
        )  # fmt: skip
    for name in _gpus(options):
        least = _LEAST.get(precision, 0)
        if int(name.removeprefix("sm")) < least:
            raise InputError(
                f"{name} cannot compute in {precision}", where="--precision", seen=precision,
                wanted=f"a GPU from sm{least} on", fix="Use --precision fp16 or int8.",
            )  # fmt: skip
    if target == "tensorrt" and options.plugin is not None:
        choose_plugin(options.plugin)
    if target in TARGETS:
        require_extra(target)
    if target == "tensorrt" and (lacking := gpu.missing()) is not None:
        raise MissingRequirement(
            f"TensorRT builds on the GPU that will run the engine: {lacking.what}",
            where="--target tensorrt",
            seen=lacking.seen,
            fix="Build where the engine will run, or ahead of time with --target tensorrt-rtx --gpu sm80.",
        )


def _check_values(options: BuildOptions) -> None:
    if not options.profiles:
        raise InputError("an engine covers at least one range of batch sizes", where="--batch", wanted="MIN:OPT:MAX")
    for profile in options.profiles:
        if not 1 <= profile.minimum <= profile.optimum <= profile.maximum:
            raise InputError(
                "not a range of batch sizes", where="--batch", seen=profile, wanted="1 <= MIN <= OPT <= MAX"
            )
    if options.workspace is not None and options.workspace < 1:
        raise InputError("no room to work in", where="--workspace", seen=options.workspace, wanted="1 MiB or more")
    if options.optimization_level is not None and not 0 <= options.optimization_level <= 5:
        raise InputError(
            "no such level", where="--optimization-level", seen=options.optimization_level, wanted="0 to 5"
        )
    cache = options.timing_cache
    if cache is not None and (cache.is_dir() or not cache.parent.is_dir()):
        raise InputError("no file can be written there", where="--timing-cache", seen=cache)


def _check_rtx(options: BuildOptions) -> None:
    for field, why in (
        ("timing_cache", "has no use for a timing cache"),
        ("plugin", "takes no plugins: the operator's body is built in"),
        ("version_compatible", "runs an engine in its own version only: pip has no lean runtime for others"),
        ("hardware_compatible", "builds for every GPU that is named: repeat --gpu instead"),
    ):
        if getattr(options, field):
            raise InputError(f"TensorRT-RTX {why}", where=flag(field), fix="Leave it out.")
    gpus = _gpus(options)
    if not gpus:
        raise InputError(
            "which GPU is the engine for? This machine has none to look at", where="--gpu", wanted=", ".join(RTX_GPUS),
            fix=_WHICH_GPU,
        )  # fmt: skip
    for name in gpus:
        if name not in RTX_GPUS:
            raise InputError(
                "not a GPU that TensorRT-RTX builds for", where="--gpu", seen=repr(name), wanted=", ".join(RTX_GPUS),
                fix="Hopper and data-centre Blackwell need --target tensorrt." if name in _DATA_CENTRE else _WHICH_GPU,
            )  # fmt: skip


def flag(field: str) -> str:
    """The command line's name of a field of :class:`BuildOptions`."""
    return {"profiles": "--batch", "gpus": "--gpu"}.get(field, "--" + field.replace("_", "-"))


def _gpus(options: BuildOptions) -> tuple[str, ...]:
    """GPUs that the engine is for, each once: those that are named, else the one of this machine, if it has one."""
    current = gpu.compute_capability()
    return tuple(dict.fromkeys(options.gpus)) or ((current,) if current else ())


def usable(target: str) -> bool:
    """Whether this machine can build and run a target's engine without being told more."""
    return target in usable_targets() and gpu.missing() is None


def build_engine(model: Path, plan: Path, target: str, precision: str, options: BuildOptions) -> Built:
    """Builds an engine.

    Args:
        model: A file that ``export_onnx`` and ``set_precision`` made.
        plan: Where the engine goes; it appears there whole or not at all.
        target: ``tensorrt`` or ``tensorrt-rtx``.
        precision: Of the file.
        options: What to tell the builder.

    Raises:
        InputError: See :func:`check_options`; or the file is not what it should be.
        MissingRequirement: See :func:`check_options`.
        StageError: The builder failed.
    """
    check_options(target, precision, options)
    locations = _check_model(model, precision)
    gpus = _gpus(options)
    driver = nvidia().driver if gpu.compute_capability() else None
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(dir=plan.parent, prefix=f".{plan.name}-") as room:
            built = Path(room) / plan.name
            answer = _ask_builder(model, built, target, precision, msgspec.structs.replace(options, gpus=gpus))
            if options.plugin is not None and answer["plugins"] != locations:
                raise StageError(
                    "TensorRT did not take the plugin", where=options.plugin,
                    seen=f"{answer['plugins']} of {locations} reorganisations",
                )  # fmt: skip
            os.replace(built, plan)
    except OSError as error:
        raise StageError(f"the engine could not be written ({error.strerror})", where=plan) from error
    engine = Engine(
        target=target,
        version=answer["version"],
        gpus=gpus,
        driver=driver,
        precision=precision,
        profiles=options.profiles,
        plugin=_sha256(options.plugin) if options.plugin and answer["plugins"] else None,
        options={
            "workspace": options.workspace,
            "optimization_level": options.optimization_level,
            "version_compatible": options.version_compatible,
            "hardware_compatible": options.hardware_compatible,
        },
        seconds=round(time.perf_counter() - started, 2),
    )
    return Built(engine, answer["attentions"], answer["layers"])


def _check_model(model: Path, precision: str) -> int:
    """Makes sure that a file is ours and in a precision; gives the number of its reorganisations."""
    from evit_deploy.export import load_onnx, read_card
    from evit_deploy.variants import reorganizations

    proto = load_onnx(model)
    card = read_card(proto)
    if card is None:
        raise InputError(
            "not a model that evit-deploy exported", where=model, fix="Make one: evit-deploy convert CHECKPOINT."
        )
    if card.precision != precision:
        raise InputError("the file has another precision", where=model, seen=card.precision, wanted=precision)
    return len(reorganizations(proto))


def _ask_builder(model: Path, plan: Path, target: str, precision: str, options: BuildOptions) -> dict[str, Any]:
    """Runs the builder's process; an interruption ends it too."""
    request = {
        "model": model.absolute(),
        "plan": plan.absolute(),
        "module": TARGETS[target],
        "precision": precision,
        "options": options,
    }
    environment = os.environ | {
        "POLYGRAPHY_USE_TENSORRT_RTX": str(int(target == "tensorrt-rtx")),
        "PYTHONPATH": os.pathsep.join(folder or os.getcwd() for folder in sys.path),
    }
    try:
        process = subprocess.run(
            # -P: what happens to lie in the current folder is no module. The paths are this process's own.
            [sys.executable, "-P", "-m", "evit_deploy.build"],
            input=msgspec.json.encode(request, enc_hook=str), capture_output=True, env=environment, timeout=TIME_LIMIT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise StageError(f"no engine of {model.name} after {TIME_LIMIT:g} seconds", where=target) from None
    if process.returncode or not plan.is_file():
        reason = _reason(process.returncode, process.stderr.decode(errors="replace"))
        fix = next((advice for pattern, advice in _ADVICE if re.search(pattern, reason)), None)
        raise StageError(f"no engine of {model.name} could be built: {reason}", where=target, fix=fix)
    return json.loads(process.stdout)


def _reason(code: int, said: str) -> str:
    """Why the builder's process failed: its first complaint, which it marks [E], or the exception that ended it."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"its process was ended by {name}" + (", as for want of memory" if name == "SIGKILL" else "")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    # The parser first quotes the node, line by line, and then says what is wrong with it.
    complaints = [line for line in lines if line.startswith("[E] ") and "ModelImporter.cpp" not in line]
    reason = (complaints or lines[-1:] or [f"exit code {code}"])[0].removeprefix("[E] ").rstrip(".")
    return reason if len(reason) <= 500 else reason[:500] + " ..."


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
        load_plugin(Path(options["plugin"]))
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
        capabilities = [(int(name[2:-1]), int(name[-1])) for name in options["gpus"]]
        config: Any = CreateConfigRTX(**settings, compute_capabilities=capabilities)
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
    except Exception:  # each way of having no GPU for it ends in another error
        return None


if __name__ == "__main__":
    _main()
