"""Options of ``package``: of the package itself, and of the Triton server that is to run it."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from evit_deploy.recipe.sections import BatchSize, Section

Purpose = Literal["triton", "cpp"]
"""What a package is for."""
Platform = Literal["tensorrt", "tensorrt-rtx", "onnxruntime", "openvino"]
"""What runs the model there."""
Device = Literal["gpu", "cpu"]
"""What the model runs on there."""
Publish = Literal["local", "network"]
"""Who reaches the server."""


QUEUE_DELAY = 1000
"""Microseconds."""


class PackageOptions(Section, frozen=True, kw_only=True):
    """How bundles are packaged."""

    platform: Platform | None = None
    """What runs the model: for Triton tensorrt, onnxruntime or openvino; for C++ tensorrt, tensorrt-rtx or openvino.
    [default: the first of them that the bundle has a file for]"""
    name: str | None = None
    """Name of the model. [default: the bundle's folder]"""
    labels: str | None = None
    """Text file with a class name on each line. [default: the manifest's]"""
    gpus: tuple[str, ...] = ()
    """GPU that a plan is to run on, ``sm90``; several are possible. Each needs a plan, and each plan one of them."""
    plugin: str | None = None
    """Library that the plan needs, a path or ``auto``. [default: the one in the user's cache that it was built with]"""
    unverified: bool = False
    """Also package a bundle that was not verified on this platform; the package records it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("labels", "plugin"):  # a Path is as good as its text
            if isinstance(value := getattr(self, field), Path):
                msgspec.structs.force_setattr(self, field, str(value))


class TritonOptions(Section, frozen=True, kw_only=True):
    """The Triton server, and how it is to serve."""

    server: str | None = None
    """Release of Triton, ``26.07``. [default: the newest that goes with the plan]"""
    server_tensorrt: str | None = None
    """Version of TensorRT in the server. [default: what is known of the release]"""
    preprocess: Literal["python", "dali", "none"] = "python"
    """How the server turns image files into inputs: Pillow on the CPU as in training, or DALI on the GPU, which is
    nearly the same; with none, clients send inputs. [default: python]"""
    max_batch: BatchSize | None = None
    """Maximum images per call. [default: what the plan covers; 32 for ONNX Runtime, 1 for OpenVINO]"""
    instances: Annotated[int, Meta(ge=1, le=1_024)] = 1
    """Instances of the model, on each GPU or on the CPU. [default: 1]"""
    queue_delay: Annotated[int, Meta(ge=0, le=60_000_000)] = QUEUE_DELAY
    """Microseconds that a request may wait to be batched with others. [default: 1000]"""
    device: Device | None = None
    """Device that the server runs the model on; with cpu no file requests a GPU.
    [default: cpu for OpenVINO, else gpu]"""
    publish: Publish = "local"
    """Who can reach the server: local, its own machine or the pods of its Kubernetes namespace; network, anyone who
    reaches the machine or the load balancer. [default: local]"""
    shared_memory: bool = False
    """Let clients on the same machine pass tensors through shared memory, where they can also read each other's."""
    server_digest: str | None = None
    """Digest of the server's image, ``sha256:…``, which pins it. [default: its release alone]"""
    cpus: Annotated[int, Meta(ge=1, le=4_096)] = 4
    """Processors that the server may use. [default: 4]"""
    memory: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    """Memory that the server may use, GiB. [default: by the model's size]"""
