"""Builds engines from ONNX files with TensorRT or TensorRT-RTX, using polygraphy's loaders.

Networks are strongly typed, so the precision is that of the file. The builder runs in a separate process, because the
native library can crash, and because polygraphy chooses TensorRT or TensorRT-RTX for a whole process. This module is
also the program of that process, so it imports nothing heavy.

TensorRT builds on the GPU that will run the engine. TensorRT-RTX builds ahead of time for the named GPUs, on any
machine.
"""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from evit_deploy.bundle.manifest import Engine
from evit_deploy.engines.options import BUILDERS, TENSORRT_RTX, check_options, gpus_of
from evit_deploy.engines.plugin.library import CREATORS, PLUGIN, choose_plugin, load_plugin
from evit_deploy.environment import nvidia as gpu
from evit_deploy.environment.nvidia import nvidia
from evit_deploy.errors import EvitDeployError, InputError, StageError
from evit_deploy.files import sha256
from evit_deploy.files.drafts import draft
from evit_deploy.recipe.options import BuildOptions

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
"""Advice for some of the builder's errors."""


class Built(msgspec.Struct, frozen=True):
    """Result of a build.

    Args:
        engine: The manifest's record of the engine.
        attentions: Number of attention layers in the network that can be fused.
        layers: The engine inspector's JSON; ``None`` if no GPU could load the engine.
    """

    engine: Engine
    attentions: int
    layers: str | None


def build_engine(
    model: str | Path, plan: str | Path, target: str, precision: str, options: BuildOptions | None = None
) -> Built:
    """Builds an engine.

    Args:
        model: A file created by ``export_onnx`` and ``set_precision``.
        plan: Path of the engine; written atomically.
        target: ``tensorrt`` or ``tensorrt-rtx``.
        precision: Precision of the file.
        options: Options for the builder.

    Raises:
        InputError: See :func:`check_options`; or the file is not an exported model in this precision.
        MissingRequirement: See :func:`check_options`.
        StageError: The builder failed.
    """
    model, plan, options = Path(model), Path(plan), options or BuildOptions()
    check_options(target, precision, options)
    locations = _check_model(model, precision)
    gpus, plugin = gpus_of(options), choose_plugin(options.plugin)
    driver = nvidia().driver if gpu.compute_capability() else None
    started = time.perf_counter()
    try:
        with draft(plan.parent) as making:
            built = making.folder / plan.name
            asked = msgspec.structs.replace(options.build, gpus=gpus, plugin=str(plugin) if plugin else None)
            answer = _ask_builder(model, built, target, precision, asked)
            if plugin is not None and answer["plugins"] != locations:
                raise StageError(
                    "TensorRT did not take the plugin", where=plugin,
                    seen=f"{answer['plugins']} of {locations} reorganizations",
                )  # fmt: skip
            making.publish(built, plan, replace=True)
    except OSError as error:
        raise StageError(f"the engine could not be written ({error.strerror})", where=plan) from error
    engine = Engine(
        target=target,
        version=answer["version"],
        gpus=gpus,
        driver=driver,
        precision=precision,
        profiles=options.profiles,
        plugin=sha256(plugin) if plugin and answer["plugins"] else None,
        options={
            "workspace": options.workspace,
            "optimization_level": options.optimization_level,
            "version_compatible": options.version_compatible,
            "lean_runtime": False,
            "hardware_compatible": options.hardware_compatible,
        },
        seconds=round(time.perf_counter() - started, 2),
    )
    return Built(engine, answer["attentions"], answer["layers"])


def _check_model(model: Path, precision: str) -> int:
    """Checks that evit-deploy wrote a file in this precision; returns its number of reorganizations."""
    from evit_deploy.export.card import load_onnx, read_card
    from evit_deploy.export.variants import reorganizations

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
    """Runs the builder's process; an interrupt ends it too."""
    request = {
        "model": model.absolute(),
        "plan": plan.absolute(),
        "module": BUILDERS[target].module,
        "precision": precision,
        "options": msgspec.to_builtins(options) | {"profiles": msgspec.to_builtins(options.profiles)},
    }
    environment = os.environ | {
        "POLYGRAPHY_USE_TENSORRT_RTX": str(int(BUILDERS[target].needs.ahead)),
        "PYTHONPATH": os.pathsep.join(folder or os.getcwd() for folder in sys.path),
    }
    try:
        process = subprocess.run(
            # -P: do not import modules from the current folder.
            [sys.executable, "-P", "-m", "evit_deploy.engines.build"],
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
    """Returns why the builder's process failed: its first error, marked [E], or the exception that ended it."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"its process was ended by {name}" + (", as for want of memory" if name == "SIGKILL" else "")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    # The parser prints the node, line by line, before the actual error.
    complaints = [line for line in lines if line.startswith("[E] ") and "ModelImporter.cpp" not in line]
    reason = (complaints or lines[-1:] or [f"exit code {code}"])[0].removeprefix("[E] ").rstrip(".")
    return reason if len(reason) <= 500 else reason[:500] + " ..."


def _main() -> None:
    """Program of the builder's process: request on stdin, answer on stdout, output of libraries on stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.buffer.read())
    try:
        answers.write(json.dumps(_build(request)))
    except EvitDeployError as error:
        sys.exit(f"[E] {error}")
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
    if request["module"] == BUILDERS[TENSORRT_RTX].module:
        _refuse_registered_plugin(trt)
    G_LOGGER.module_severity = G_LOGGER.ERROR
    options = request["options"]
    path = request["model"]
    if options["plugin"]:
        load_plugin(Path(options["plugin"]))
    builder, network, parser = NetworkFromOnnxPath(path, strongly_typed=True)()
    if request["precision"] == "fp32":  # no kernel fuses FP32 attention
        builder, network, parser = SetDecomposableAttentions((builder, network, parser))()
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    settings = _settings(trt, options)
    settings["profiles"] = [_profile(network, Profile(), profile) for profile in options["profiles"]]
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


def _settings(trt: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of polygraphy's configuration that both builders share."""
    settings: dict[str, Any] = {
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        "builder_optimization_level": options["optimization_level"],
    }
    if options["version_compatible"]:
        # The lean runtime would be host code in the plan, which users would have to allow when loading it.
        settings |= {"version_compatible": True, "exclude_lean_runtime": True}
    if options["workspace"]:
        settings["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: options["workspace"] << 20}
    if options["hardware_compatible"]:
        settings["hardware_compatibility_level"] = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    return settings


def _refuse_registered_plugin(trt: Any) -> None:
    """Refuses a registered plugin: TensorRT-RTX's parser would use it and then crash, as it has no plugin layers."""
    known = trt.get_plugin_registry().all_creators
    if any((creator.plugin_namespace, creator.name) == PLUGIN for creator in known):
        raise InputError(
            f"TensorRT-RTX takes no plugins, and {'::'.join(PLUGIN)} is registered in the builder's process",
            fix=f"Load {CREATORS} nowhere that TensorRT-RTX builds: it builds in the operator's body.",
        )


def _profile(network: Any, profile: Any, batches: dict[str, int]) -> Any:
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        rest = tuple(tensor.shape)[1:]
        profile.add(tensor.name, *((batches[end], *rest) for end in ("minimum", "optimum", "maximum")))
    return profile


def _layers(trt: Any, plan: Any) -> str | None:
    """Returns the engine inspector's JSON, or ``None`` without a GPU that can load the engine."""
    try:
        engine = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR)).deserialize_cuda_engine(plan)
        return engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    except Exception:  # the kind of error depends on what is missing
        return None


if __name__ == "__main__":
    _main()
