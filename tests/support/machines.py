"""Simulated machines with real files: distributions and a driver library, found in the same way as real ones."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest

import evit_deploy
from evit_deploy.environment.requirements import version_of

# NVML of a driver 580 with one GPU; the numbers come from the environment.
NVML = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef struct { unsigned long long total, free, used; } Memory;
static int number(const char *name) { return atoi(getenv(name)); }
int nvmlInitWithFlags(unsigned flags) { return number("FAKE_RETURN"); }
int nvmlInit_v2(void) { return number("FAKE_RETURN"); }
int nvmlShutdown(void) { if (getenv("FAKE_TRACE")) { puts("shut down"); fflush(stdout); } return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned n) { snprintf(text, n, "%s", getenv("FAKE_DRIVER")); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = number("FAKE_CUDA"); return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)8; return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    *device = (void *)8; return strcmp(uuid, "GPU-0123-4567") ? 6 : 0;
}
int nvmlDeviceGetClockInfo(void *device, int type, unsigned *clock) { *clock = type == 1 ? 1410 : 0; return 0; }
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) { *milliwatts = 72500; return 0; }
int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *bits) { *bits = 4; return 0; }
int nvmlDeviceGetName(void *device, char *text, unsigned n) { snprintf(text, n, "NVIDIA Pretend"); return 0; }
int nvmlDeviceGetUUID(void *device, char *text, unsigned n) { snprintf(text, n, "GPU-0123-4567"); return 0; }
int nvmlDeviceGetMemoryInfo(void *device, Memory *m) { m->total = 24ull << 30; m->free = m->used = 0; return 0; }
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    int both = number("FAKE_SM"); *major = both / 10; *minor = both % 10; return 0;
}
const char *nvmlErrorString(int code) {
    return code == 9 ? "Driver Not Loaded" : code == 6 ? "Not Found" : "Unknown Error";
}
"""


def pretend(
    folder: Path,
    name: str,
    version: str | None,
    source: str | None = None,
    module: str | None = None,
    requires: Sequence[str] = (),
) -> None:
    """Writes a distribution to a folder: metadata, and a module if source is given."""
    info = folder / f"{name.replace('-', '_')}-{version or 'damaged'}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\n"
        + (f"Version: {version}\n" if version else "")
        + "".join(f"Requires-Dist: {line}\n" for line in requires)
    )
    if source is not None:
        package = folder / (module or name.replace("-", "_"))
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text(source)


def environment_without(folder: Path, *distributions: str) -> dict[str, str]:
    """Environment variables for a Python (with ``-S``) without these distributions."""
    installed = Path(sysconfig.get_path("purelib"))
    for entry in installed.iterdir():
        if not entry.name.lower().replace("-", "_").startswith(distributions):
            (folder / entry.name).symlink_to(entry)
    assert len(list(folder.iterdir())) < len(list(installed.iterdir()))
    root = Path(evit_deploy.__file__).parents[1]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (root, folder)))}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder whose distributions take precedence over the installed ones."""
    folder = tmp_path / "first"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture(scope="session")
def driver(tmp_path_factory) -> Path:
    """A folder with a driver library."""
    if shutil.which("gcc") is None or version_of("nvidia-ml-py") is None:
        pytest.skip("needs gcc and nvidia-ml-py")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "nvml.c").write_text(NVML)
    command = ["gcc", "-shared", "-fPIC", "-w", "-o", folder / "libnvidia-ml.so.1", folder / "nvml.c"]
    subprocess.run(command, check=True)
    return folder


def python(code: str, **environment: str) -> str:
    """Output of a new Python process in this environment."""
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def on_gpu(driver: Path, code: str, sm: int, **environment: str) -> str:
    """Output of a Python process on a machine with a GPU according to NVML."""
    answers = {"FAKE_RETURN": "0", "FAKE_DRIVER": "580.65.06", "FAKE_CUDA": "13000", "FAKE_SM": str(sm)}
    return python(code, LD_LIBRARY_PATH=str(driver), **(answers | environment))
