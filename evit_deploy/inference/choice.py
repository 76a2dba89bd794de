"""Choice of the runtime for a bundle, and of its artifact."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from evit_deploy.bundle.bundle import Bundle
from evit_deploy.bundle.manifest import MODEL
from evit_deploy.engines.plugin.library import provide_plugin
from evit_deploy.environment.availability import TENSORRT
from evit_deploy.errors import InputError
from evit_deploy.models.parent import parent_model
from evit_deploy.registry import RUNTIMES
from evit_deploy.runtimes.runner import Runner
from evit_deploy.runtimes.select import artifact_of

_BUILDS_FIRST = ("onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx")
"""Runtimes that build an engine when they are opened, which takes minutes; only used on request."""


def in_order(bundle: Bundle) -> Iterator[tuple[str, Path, list[str]]]:
    """Yields the runtimes to try by default, best first: name, file, and reasons why it cannot run the file.

    Engines come first, then runtimes that run the ONNX file on a GPU, then files in a CPU runtime's own format, then
    ONNX Runtime and OpenVINO on the ONNX file.
    """
    found = []
    for place, name in enumerate(RUNTIMES.names()):
        runtime: type[Runner] = RUNTIMES.get(name)
        artifact = artifact_of(bundle, runtime) if runtime.files and not runtime.served else None
        if artifact is not None and runtime.default and name not in _BUILDS_FIRST:
            made_for_it = artifact != bundle.path / MODEL
            rank = not (runtime.on_gpu and made_for_it), not runtime.on_gpu, not made_for_it, place
            found.append((rank, name, artifact, runtime.accepts(artifact)))
    for _, *choice in sorted(found, key=lambda one: one[0]):
        yield tuple(choice)


def asked_for(bundle: Bundle, name: str, against: Path | None) -> Any:
    """Returns the artifact for a requested runtime.

    Args:
        bundle: The bundle.
        name: Name of the runtime.
        against: For PyTorch's runtimes: checkpoint of the bundle, if it was moved.

    Returns:
        A file of the bundle, or the PyTorch model, on the GPU if there is one.

    Raises:
        InputError: There is no such runtime, or the bundle has nothing for it.
    """
    runtime: type[Runner] = RUNTIMES.get(name)
    if runtime.served:
        raise InputError(
            f"{name} asks a server, which answers to clients of its kind", where="runtime",
            fix="Send images with python -m evit_deploy.triton.client, or leave the runtime out.",
        )  # fmt: skip
    if against is not None and runtime.files:
        raise InputError(f"{name} runs files of the bundle and needs no checkpoint", where="against", seen=against)
    if runtime.files:
        artifact = artifact_of(bundle, runtime)
        if artifact is None:
            raise InputError(
                f"this bundle has nothing that {name} runs", where=bundle.path, seen=", ".join(bundle.manifest.files),
                wanted=" or ".join(runtime.files),
                fix="Convert with a --target that makes it, or leave the runtime out.",
            )  # fmt: skip
        return artifact
    model, why_not = parent_model(bundle, against)
    if model is None:
        raise InputError(f"the PyTorch model is not available: {why_not}", where=f"runtime {name}")
    return model.to("cuda") if torch.cuda.is_available() else model


def check_plugin(bundle: Bundle, name: str, plugin: str | Path | None) -> None:
    """Loads the plugin that a TensorRT engine needs.

    Args:
        bundle: The bundle.
        name: Name of the runtime.
        plugin: The library; ``None`` for the one in the user's cache that the engine was built with.

    Raises:
        InputError: It is a different library, or not a plugin.
        MissingRequirement: The library is missing.
    """
    if name == TENSORRT:
        lacking = provide_plugin(bundle.manifest.engine, plugin)
        if lacking is not None:
            raise lacking
