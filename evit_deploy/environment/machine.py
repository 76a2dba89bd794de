"""Machine and package versions, for reports."""

import importlib.metadata
import os
import platform
from typing import Any

import evit_deploy


def versions() -> dict[str, str]:
    """Versions of the packages that affect an exported file."""
    packages = ("torch", "timm", "onnx", "onnxscript", "onnxruntime")
    return {"evit-deploy": evit_deploy.__version__} | {name: importlib.metadata.version(name) for name in packages}


def device() -> dict[str, Any]:
    """The machine: processor, cores, operating system."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass  # not Linux
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model, "cores": cores, "machine": platform.machine(), "system": platform.system()}
