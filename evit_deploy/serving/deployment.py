"""How the server of a package is started, with as little as it needs: its command line, its image, Docker and Compose.

Docker, Compose and Kubernetes (:mod:`evit_deploy.serving.kubernetes`) get the same image and the same arguments. What
can be closed is: ports are published on this machine alone, interfaces that change the server are shut, and the
container has no rights, no writable files but ``/tmp``, and no more memory and processors than it was given.
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
"""Where things are in the image."""
CLOSED_SCRIPT = "closed.sh"
"""Name of the program that starts the server with interfaces closed, in the package and in the image."""
IMAGE_ENTRYPOINT = "/opt/nvidia/nvidia_entrypoint.sh"
"""Of NVIDIA's image, which the package's keeps."""
HTTP, GRPC, METRICS = 8000, 8001, 8002
USER = 1000
"""Of the user ``triton-server`` and of its group, in NVIDIA's image."""
SHARED_MEMORY_GIB = 1
"""Of ``/dev/shm``, through which the server and its Python processes pass tensors to each other."""
EXIT_TIMEOUT = 30
"""Seconds that the server waits for requests under way, once it is asked to end."""
STOP_TIMEOUT = 45
"""Seconds until it is ended by force."""
CLOSED = ("model-repository", "shared-memory", "trace", "logging")
"""Interfaces that change the server, read its memory or write its files."""
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


class Launch(msgspec.Struct, frozen=True):
    """How the server is started.

    Args:
        name: Of the model that clients call.
        server: The server.
        on_gpu: Whether it is to have GPUs.
        plugin: File name of the plugin library that the plan needs.
        version_compatible: Whether the plan is of an older TensorRT, which has to be allowed.
        pillow: Version of Pillow for the preprocessing in Python; ``None`` where there is none.
        publish: Who reaches the ports: ``local`` or ``network``.
        shared_memory: Whether clients on the same machine may pass tensors through shared memory.
        cpus: Processors that the container may use.
        memory: Its memory, GiB.
        http_limit: Most bytes of a request's body over HTTP, where that is more than the server's own limit.
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
        """Name of the image and of what Kubernetes makes of it: less is allowed there than in names of models."""
        name = "".join(c if c.isascii() and c.isalnum() else "-" for c in f"evit-{self.name.lower()}")
        return name[:55].rstrip("-")  # of 63, so that names can be made of it

    @property
    def closed(self) -> tuple[str, ...]:
        """Interfaces that nobody is to use."""
        return tuple(name for name in CLOSED if not (name == "shared-memory" and self.shared_memory))

    def arguments(self, models: str = MODELS, plugins: str = PLUGINS) -> list[str]:
        """The server's command line.

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
        """What Docker publishes: metrics stay on this machine whatever ``publish`` says."""
        shown = "" if self.publish == "network" else "127.0.0.1:"
        return [f"{shown}{HTTP}:{HTTP}", f"{shown}{GRPC}:{GRPC}", f"127.0.0.1:{METRICS}:{METRICS}"]

    def command(self) -> list[str]:
        """The command that starts it, after ``docker build -t <tag> .``; a line of the page for each entry."""
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
        """The server's image with the models in it, and what they need."""
        lines = [f"FROM {self.server.image}"]
        if self.pillow is not None:  # pinned: another Pillow may decode and resize differently in the last bit
            install = f"pip3 install --no-cache-dir --only-binary=:all: pillow=={self.pillow}"
            lines += ["ENV PIP_BREAK_SYSTEM_PACKAGES=1", f"RUN {install}"]
        # Root's, and readable whatever the modes of the files here: the server's user cannot write them.
        copied = [("model_repository", MODELS), (CLOSED_SCRIPT, f"/{CLOSED_SCRIPT}")]
        copied += [("plugins", PLUGINS)] if self.plugin is not None else []
        lines += [f"COPY --chown=0:0 --chmod=755 {source} {place}" for source, place in copied]
        lines += ["ENV PYTHONDONTWRITEBYTECODE=1", f"USER {USER}:{USER}"]
        lines.append(f"ENTRYPOINT {json.dumps([IMAGE_ENTRYPOINT, f'/{CLOSED_SCRIPT}', ','.join(self.closed)])}")
        lines.append(f"CMD {json.dumps(self.arguments())}")
        return "\n".join(lines) + "\n"

    def compose(self) -> str:
        """``compose.yaml``."""
        ask = f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{HTTP}/v2/health/ready', timeout=5)"
        probe = ["CMD", "python3", "-c", ask]  # the image has Python, and need not have curl
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
    """YAML documents."""

    class Dumper(yaml.SafeDumper):
        """Writes what occurs twice twice: anchors would be read by fewer tools and people."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump_all(contents, Dumper=Dumper, sort_keys=False)
