"""Options of ``package``: for the package itself, and for its Triton server."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from evit_deploy.recipe.sections import BatchSize, Section

Purpose = Literal["triton", "cpp"]
"""Purpose of a package."""
Platform = Literal["tensorrt", "tensorrt-rtx", "onnxruntime", "openvino"]
"""Runtime of the package."""
Device = Literal["gpu", "cpu"]
"""Device that the server runs the model on."""
Publish = Literal["local", "network"]
"""Who can reach the server."""


QUEUE_DELAY = 1000
"""Default queue delay in microseconds."""


class PackageOptions(Section, frozen=True, kw_only=True):
    """Options for packaging bundles."""

    platform: Platform | None = None
    """Runtime of the package: for Triton tensorrt, onnxruntime or openvino; for C++ tensorrt, tensorrt-rtx or openvino.
    [default: the first of these that the bundle has files for]"""
    name: str | None = None
    """Name of the model. [default: the bundle's folder]"""
    labels: str | None = None
    """Text file with one class name per line. [default: the manifest's]"""
    gpus: tuple[str, ...] = ()
    """GPU that the package must support, such as ``sm90``; several are possible. Every GPU needs a plan, and every plan
    a GPU."""
    plugin: str | None = None
    """Plugin library that the plan needs, a path or ``auto``. [default: the one in the user's cache that it was built
    with]"""
    unverified: bool = False
    """Also package a bundle that was not verified on this platform; the package records it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("labels", "plugin"):  # accept a Path as well
            if isinstance(value := getattr(self, field), Path):
                msgspec.structs.force_setattr(self, field, str(value))


class TritonOptions(Section, frozen=True, kw_only=True):
    """The Triton server and its settings."""

    server: str | None = None
    """Release of Triton, such as ``26.07``. [default: the newest that matches the plan]"""
    server_tensorrt: str | None = None
    """Version of TensorRT in the server. [default: that of the release, if known]"""
    preprocess: Literal["python", "dali", "none"] = "python"
    """How the server prepares image files: python, with Pillow on the CPU as in training; dali, on the GPU with
    nearly the same result; none, clients send preprocessed inputs. [default: python]"""
    max_batch: BatchSize | None = None
    """Maximum images per call. [default: the largest that the plan covers; 32 for ONNX Runtime, 1 for OpenVINO]"""
    instances: Annotated[int, Meta(ge=1, le=1_024)] = 1
    """Instances of the model, on each GPU or on the CPU. [default: 1]"""
    queue_delay: Annotated[int, Meta(ge=0, le=60_000_000)] = QUEUE_DELAY
    """Microseconds that a request may wait to be batched with others. [default: 1000]"""
    device: Device | None = None
    """Device that the server runs the model on; with cpu no file requests a GPU.
    [default: cpu for OpenVINO, else gpu]"""
    publish: Publish = "local"
    """Who can reach the server: local, only its machine or the pods of its Kubernetes namespace; network, everyone who
    can reach the machine or the load balancer. [default: local]"""
    shared_memory: bool = False
    """Let clients on the same machine pass tensors through shared memory; they can then read each other's."""
    server_digest: str | None = None
    """Digest of the server's image, ``sha256:…``, to pin it. [default: not pinned]"""
    cpus: Annotated[int, Meta(ge=1, le=4_096)] = 4
    """Processors that the server may use. [default: 4]"""
    memory: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    """Memory that the server may use, in GiB. [default: depends on the model's size]"""
