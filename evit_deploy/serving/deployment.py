"""Command line, image and Compose file of a package's server.

Docker, Compose and Kubernetes (:mod:`evit_deploy.serving.kubernetes`) use the same image and arguments. The server gets
as few privileges as possible: ports are published on the local machine only, interfaces that change the server are
closed, and the container has no capabilities, no writable files except ``/tmp``, and limited memory and processors.
"""

import json
import shlex
from collections.abc import Mapping
from typing import Any

import msgspec
import yaml

from evit_deploy.serving.options import Publish
from evit_deploy.serving.releases import TritonRelease

MODELS, PLUGINS = "/models", "/plugins"
"""Folders in the image."""
CLOSED_SCRIPT = "closed.sh"
"""Script in the package and in the image that starts the server with closed interfaces."""
IMAGE_ENTRYPOINT = "/opt/nvidia/nvidia_entrypoint.sh"
"""Entry point of NVIDIA's image, which the package's image still runs."""
HTTP, GRPC, METRICS = 8000, 8001, 8002
USER = 1000
"""ID of the user ``triton-server`` and of its group in NVIDIA's image."""
SHARED_MEMORY_GIB = 1
"""Size of ``/dev/shm``, through which the server exchanges tensors with its Python processes."""
EXIT_TIMEOUT = 30
"""Seconds that a stopping server waits for its running requests."""
STOP_TIMEOUT = 45
"""Seconds until a stopping server is killed."""
CLOSED = ("model-repository", "shared-memory", "trace", "logging")
"""Interfaces that change the server, read its memory or write files."""
METRIC_NAMES = {
    "nv_inference_request_success": "successful requests, for each model",
    "nv_inference_request_failure": "failed or refused requests, including invalid images",
    "nv_inference_count": "images processed",
    "nv_inference_exec_count": "model calls; images divided by calls is the average batch size",
    "nv_inference_pending_request_count": "waiting requests; use it for scaling",
    "nv_inference_queue_duration_us": "total waiting time",
    "nv_inference_compute_infer_duration_us": "total computing time",
    "nv_gpu_utilization": "share of time in which the GPU was busy",
    "nv_gpu_memory_used_bytes": "GPU memory in use",
}


class Launch(msgspec.Struct, frozen=True):
    """Settings for starting the server.

    Args:
        name: Name of the model that clients call.
        server: The server.
        on_gpu: Whether it uses GPUs.
        plugin: File name of the plugin library that the plan needs.
        version_compatible: Whether to allow plans of an older TensorRT.
        pillow: Version of Pillow for preprocessing in Python; ``None`` without it.
        publish: Who can reach the ports: ``local`` or ``network``.
        shared_memory: Whether clients on the same machine may pass tensors through shared memory.
        cpus: Processors that the container may use.
        memory: Memory of the container in GiB.
        http_limit: Maximum bytes of an HTTP request's body, if more than the server's default.
    """

    name: str
    server: TritonRelease
    on_gpu: bool
    plugin: str | None = None
    version_compatible: bool = False
    pillow: str | None = None
    publish: Publish = "local"
    shared_memory: bool = False
    cpus: int = 4
    memory: int = 8
    http_limit: int | None = None

    @property
    def tag(self) -> str:
        """Name of the image and of the Kubernetes objects, which allow fewer characters than model names."""
        name = "".join(c if c.isascii() and c.isalnum() else "-" for c in f"evit-{self.name.lower()}")
        return name[:55].rstrip("-")  # Kubernetes allows 63; leaves room for suffixes

    @property
    def closed(self) -> tuple[str, ...]:
        """Interfaces closed to clients."""
        return tuple(name for name in CLOSED if not (name == "shared-memory" and self.shared_memory))

    def arguments(self, models: str = MODELS, plugins: str = PLUGINS) -> list[str]:
        """Returns the server's command line.

        Args:
            models: Folder of the model repository.
            plugins: Folder of the plugin library.
        """
        line = ["tritonserver", f"--model-repository={models}", "--model-control-mode=none",
                f"--exit-timeout-secs={EXIT_TIMEOUT}"]  # fmt: skip
        if self.http_limit is not None:
            line.append(f"--http-max-input-size={self.http_limit}")
        if self.plugin is not None:
            line.append(f"--backend-config=tensorrt,plugins={plugins}/{self.plugin}")
        if self.version_compatible:
            line.append("--backend-config=tensorrt,version-compatible=true")
        return line

    def ports(self) -> list[str]:
        """Returns the ports for Docker to publish; the metrics port is always local."""
        shown = "" if self.publish == "network" else "127.0.0.1:"
        return [f"{shown}{HTTP}:{HTTP}", f"{shown}{GRPC}:{GRPC}", f"127.0.0.1:{METRICS}:{METRICS}"]

    def command(self) -> list[str]:
        """Returns the lines of the command that starts the server, after ``docker build -t <tag> .``."""
        words = [
            ["docker", "run", "--rm", *(["--gpus", "all"] if self.on_gpu else [])],
            ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"],
            ["--cpus", str(self.cpus), "--memory", f"{self.memory}g", "--stop-timeout", str(STOP_TIMEOUT)],
            [part for port in self.ports() for part in ("-p", port)],
            [self.tag, *self.arguments()],
        ]
        if self.shared_memory:
            words[2] += ["--ipc", "host"]
        elif self.pillow is not None:
            words[2] += ["--shm-size", f"{SHARED_MEMORY_GIB}g"]
        return [shlex.join(line) for line in words]

    def dockerfile(self) -> str:
        """Returns the ``Dockerfile`` of the server's image with its models."""
        lines = [f"FROM {self.server.image}"]
        if self.pillow is not None:  # pinned, because another version may differ in the last bit
            install = f"pip3 install --no-cache-dir --only-binary=:all: pillow=={self.pillow}"
            lines += ["ENV PIP_BREAK_SYSTEM_PACKAGES=1", f"RUN {install}"]
        # Owned by root and readable by all, whatever the modes here, so that the server's user cannot write them.
        copied = [("model_repository", MODELS), (CLOSED_SCRIPT, f"/{CLOSED_SCRIPT}")]
        copied += [("plugins", PLUGINS)] if self.plugin is not None else []
        lines += [f"COPY --chown=0:0 --chmod=755 {source} {place}" for source, place in copied]
        lines += ["ENV PYTHONDONTWRITEBYTECODE=1", f"USER {USER}:{USER}"]
        lines.append(f"ENTRYPOINT {json.dumps([IMAGE_ENTRYPOINT, f'/{CLOSED_SCRIPT}', ','.join(self.closed)])}")
        lines.append(f"CMD {json.dumps(self.arguments())}")
        return "\n".join(lines) + "\n"

    def compose(self) -> str:
        """Returns the content of ``compose.yaml``."""
        ask = f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{HTTP}/v2/health/ready', timeout=5)"
        probe = ["CMD", "python3", "-c", ask]  # the image has Python, but not necessarily curl
        resources: dict[str, Any] = {"limits": {"cpus": str(self.cpus), "memory": f"{self.memory}G"}}
        if self.on_gpu:
            device = {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
            resources["reservations"] = {"devices": [device]}
        service: dict[str, Any] = {
            "build": ".",
            "image": self.tag,
            "command": self.arguments(),
            "user": f"{USER}:{USER}",
            "read_only": True,
            "tmpfs": ["/tmp"],
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges:true"],
            "ports": self.ports(),
            "restart": "unless-stopped",
            "stop_grace_period": f"{STOP_TIMEOUT}s",
            "healthcheck": {"test": probe, "interval": "10s", "timeout": "5s", "retries": 3, "start_period": "120s"},
            "deploy": {"resources": resources},
        }
        if self.shared_memory:
            service["ipc"] = "host"
        elif self.pillow is not None:
            service["shm_size"] = f"{SHARED_MEMORY_GIB}gb"
        return documents({"services": {"triton": service}})


def documents(*contents: Mapping[str, Any]) -> str:
    """Returns the contents as YAML documents."""

    class Dumper(yaml.SafeDumper):
        """Writes repeated values in full instead of as aliases, which some tools cannot read."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump_all(contents, Dumper=Dumper, sort_keys=False)
