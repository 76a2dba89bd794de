"""The server that a package is for: which release has which libraries, how it is started, and the files that start it.

Containers, Compose and Kubernetes get the same image and the same arguments.
"""

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

import msgspec
import yaml
from packaging.version import Version

from evit_deploy.errors import InputError

IMAGE = "nvcr.io/nvidia/tritonserver"
MODELS, PLUGINS = "/models", "/plugins"
"""Where things are in the image."""
HTTP, GRPC, METRICS = 8000, 8001, 8002
METRIC_NAMES = {
    "nv_inference_request_success": "requests answered, for each model",
    "nv_inference_request_failure": "requests refused or failed; a bad image counts here",
    "nv_inference_count": "images that went through the model",
    "nv_inference_exec_count": "calls that this took: images over calls is the batch size that was reached",
    "nv_inference_pending_request_count": "requests waiting: what to scale on",
    "nv_inference_queue_duration_us": "time spent waiting, summed up",
    "nv_inference_compute_infer_duration_us": "time spent computing, summed up",
    "nv_gpu_utilization": "share of time in which the GPU was busy",
    "nv_gpu_memory_used_bytes": "GPU memory in use",
}


class Release(msgspec.Struct, frozen=True):
    """What one month's container has in it.

    Args:
        tensorrt: Version of TensorRT, as far as it is known here: only its major version for most.
        onnxruntime: Version of ONNX Runtime.
    """

    tensorrt: str
    onnxruntime: str


RELEASES = {
    "25.09": Release("10", "1.23.0"),
    "25.10": Release("10", "1.23.1"),
    "25.11": Release("10", "1.23.2"),
    "25.12": Release("10", "1.23.2"),
    "26.01": Release("10", "1.23.2"),
    "26.02": Release("10", "1.24.1"),
    "26.03": Release("10", "1.24.2"),
    "26.04": Release("10", "1.24.4"),
    "26.05": Release("10", "1.24.4"),
    "26.06": Release("11", "1.24.4"),
    "26.07": Release("11", "1.27.0"),
}
"""Month -> contents, from the first with ONNX Runtime 1.23 on, which is the first that knows ``model.onnx``'s opset.

ONNX Runtime: triton-inference-server/server, docs/introduction/compatibility.md at e1db8a6. TensorRT: that page lists
it for the TensorRT-LLM images only, which are others; the ``-py3`` images moved from 10 to 11 with 26.06 (server#8828).
The whole number is in NVIDIA's support matrix, https://docs.nvidia.com/deeplearning/frameworks/support-matrix/, and in
a container in ``dpkg -l libnvinfer-bin``.
"""


class TritonRelease(msgspec.Struct, frozen=True):
    """The server a package is for.

    Args:
        release: Month of the container, ``26.07``.
        tensorrt: Its TensorRT, as far as it is known.
        onnxruntime: Its ONNX Runtime, if it is known.
    """

    release: str
    tensorrt: str | None
    onnxruntime: str | None

    @property
    def image(self) -> str:
        """The container."""
        return f"{IMAGE}:{self.release}-py3"


def declared_server(release: str | None, tensorrt: str | None, plan: str | None) -> TritonRelease:
    """The server that was declared, filled up with what is known about its release.

    Args:
        release: Month of the container; by default the newest that fits, as far as is known.
        tensorrt: Version of TensorRT in it; by default what is known of the release.
        plan: Version of TensorRT that built the plan, if there is one.

    Raises:
        InputError: They are no versions, or nothing is known that fits.
    """
    for option, value in (("--server", release), ("--server-tensorrt", tensorrt)):
        if value is not None and not re.fullmatch(r"[0-9]+(\.[0-9]+)*", value):
            raise InputError("not a version", where=option, seen=repr(value), wanted="numbers, as in 26.07 or 11.1.0")
    if release is not None and (len(release) != 5 or release.count(".") != 1):
        raise InputError("not a release of Triton", where="--server", seen=repr(release), wanted="year.month, as 26.07")
    if release is not None and release < min(RELEASES):
        raise InputError(
            "this Triton is too old for these models", where="--server", seen=release, wanted=min(RELEASES)
        )
    if release is None:
        wanted = tensorrt or plan
        fitting = [month for month, known in RELEASES.items() if wanted is None or same(known.tensorrt, wanted)]
        if not fitting:
            raise InputError(
                f"no release of Triton with TensorRT {wanted} is known here", where="--server",
                fix="Give it: --server YY.MM --server-tensorrt VERSION.",
            )  # fmt: skip
        release = max(fitting)
    known = RELEASES.get(release)
    if known is not None and tensorrt is not None and not same(known.tensorrt, tensorrt):
        raise InputError(
            f"Triton {release} has another TensorRT", where="--server-tensorrt", seen=tensorrt, wanted=known.tensorrt
        )
    return TritonRelease(release, tensorrt or (known.tensorrt if known else None), known.onnxruntime if known else None)


def same(one: str, other: str) -> bool:
    """Whether two versions of TensorRT agree in the numbers that both have, of major, minor and patch.

    >>> same("11", "11.1.0.106"), same("11.1", "11.2.0"), same("10.14.1.48", "10.14.1.50")
    (True, False, True)
    """
    return all(a == b for a, b in _shared(one, other))


def older(one: str, other: str) -> bool:
    """Whether a version of TensorRT is older than another in the numbers that both have, of major, minor and patch.

    >>> older("10.13", "10.14.1.48"), older("10.14", "10.14.1.48"), older("11", "10.14.1")
    (True, False, False)
    """
    return next((a < b for a, b in _shared(one, other) if a != b), False)


def _shared(one: str, other: str) -> list[tuple[int, int]]:
    return list(zip(Version(one).release[:3], Version(other).release[:3], strict=False))


class Launch(msgspec.Struct, frozen=True):
    """How the server is started.

    Args:
        name: Of the model that clients call.
        server: The server.
        on_gpu: Whether it is to have GPUs.
        plugin: File name of the plugin library that the plan needs.
        version_compatible: Whether the plan is of an older TensorRT, which has to be allowed.
        pillow: Version of Pillow for the preprocessing; ``None`` where there is none.
    """

    name: str
    server: TritonRelease
    on_gpu: bool
    plugin: str | None = None
    version_compatible: bool = False
    pillow: str | None = None

    @property
    def tag(self) -> str:
        """Name of the image and of what Kubernetes makes of it: less is allowed there than in names of models."""
        name = "".join(c if c.isascii() and c.isalnum() else "-" for c in f"evit-{self.name.lower()}")
        return name[:63].rstrip("-")

    def arguments(self, models: str = MODELS, plugins: str = PLUGINS) -> list[str]:
        """The server's command line.

        Args:
            models: Folder of the model repository.
            plugins: Folder of the plugin library.
        """
        line = ["tritonserver", f"--model-repository={models}"]
        if self.plugin is not None:
            line.append(f"--backend-config=tensorrt,plugins={plugins}/{self.plugin}")
        if self.version_compatible:
            line.append("--backend-config=tensorrt,version-compatible=true")
        return line

    def command(self, *, on_cpu: bool = False) -> str:
        """The one line that starts it, after ``docker build -t <tag> .``.

        Args:
            on_cpu: Whether to leave GPUs alone, where the model has a configuration for that.
        """
        ports = [part for port in (HTTP, GRPC, METRICS) for part in ("-p", f"{port}:{port}")]
        gpus = ["--gpus", "all"] if self.on_gpu and not on_cpu else []
        line = self.arguments() + ["--model-config-name=cpu"] * on_cpu
        return shlex.join(["docker", "run", "--rm", *gpus, "--shm-size", "1g", *ports, self.tag, *line])

    def dockerfile(self) -> str:
        """The server's image with the models in it, and what they need."""
        lines = [f"FROM {self.server.image}"]
        if self.pillow is not None:  # pinned: another Pillow may decode and resize differently in the last bit
            lines += ["ENV PIP_BREAK_SYSTEM_PACKAGES=1", f"RUN pip3 install --no-cache-dir pillow=={self.pillow}"]
        lines.append(f"COPY model_repository {MODELS}")
        if self.plugin is not None:
            lines.append(f"COPY plugins {PLUGINS}")
        lines.append(f"CMD {json.dumps(self.arguments())}")
        return "\n".join(lines) + "\n"

    def compose(self) -> str:
        """``compose.yaml``."""
        ask = f"import urllib.request; urllib.request.urlopen('http://localhost:{HTTP}/v2/health/ready', timeout=5)"
        probe = ["CMD", "python3", "-c", ask]  # the image has Python, and need not have curl
        service: dict[str, Any] = {
            "build": ".",
            "image": self.tag,
            "command": self.arguments(),
            "ports": [f"{port}:{port}" for port in (HTTP, GRPC, METRICS)],
            "shm_size": "1gb",
            "restart": "unless-stopped",
            "healthcheck": {"test": probe, "interval": "10s", "timeout": "5s", "retries": 3, "start_period": "120s"},
        }
        if self.on_gpu:
            device = {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
            service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
        return _yaml({"services": {"triton": service}})

    def kubernetes(self) -> str:
        """``kubernetes.yaml``: a Deployment with probes and a Service."""
        labels = {"app": self.tag}
        container: dict[str, Any] = {
            "name": "triton",
            "image": self.tag,
            "args": self.arguments(),
            "ports": [
                {"name": name, "containerPort": port}
                for name, port in (("http", HTTP), ("grpc", GRPC), ("metrics", METRICS))
            ],
            "startupProbe": _probe("ready") | {"periodSeconds": 5, "failureThreshold": 60},
            "readinessProbe": _probe("ready") | {"periodSeconds": 5},
            "livenessProbe": _probe("live") | {"periodSeconds": 10, "failureThreshold": 3},
            "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
        }
        if self.on_gpu:
            container["resources"] = {"limits": {"nvidia.com/gpu": 1}}
        memory = {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}
        deployment = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": self.tag, "labels": labels},
            "spec": {
                "replicas": 1,
                "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {"containers": [container], "volumes": [memory], "terminationGracePeriodSeconds": 60},
                },
            },
        }
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": self.tag, "labels": labels},
            "spec": {
                "selector": labels,
                "ports": [
                    {"name": name, "port": port, "targetPort": name}
                    for name, port in (("http", HTTP), ("grpc", GRPC), ("metrics", METRICS))
                ],
            },
        }
        return _yaml(deployment, service)


def _probe(what: str) -> dict[str, Any]:
    return {"httpGet": {"path": f"/v2/health/{what}", "port": "http"}, "timeoutSeconds": 5}


def _yaml(*documents: Mapping[str, Any]) -> str:
    class Dumper(yaml.SafeDumper):
        """Writes what occurs twice twice: anchors would be read by fewer tools and people."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump_all(documents, Dumper=Dumper, sort_keys=False)
