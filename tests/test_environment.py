"""What is installed and usable: here as it is, and in made-up places with real files: distributions, modules that break
and a driver library, all found the way the real ones are found."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from evit_deploy.doctor import Diagnosis, Finding, doctor
from evit_deploy.environment import (
    EXTRAS,
    REQUIRED,
    TARGETS,
    fits,
    install_line,
    lacking,
    numbers,
    nvidia,
    require,
    require_extra,
    targets,
    usable_targets,
    version_of,
)
from evit_deploy.errors import InputError, MissingRequirement
from evit_deploy.probe import ask
from evit_deploy.registry import RUNTIMES

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]

# NVML as a driver 580 with one GPU would answer; the numbers come from the environment.
NVML = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef struct { unsigned long long total, free, used; } Memory;
static int number(const char *name) { return atoi(getenv(name)); }
int nvmlInitWithFlags(unsigned flags) { return number("FAKE_RETURN"); }
int nvmlInit_v2(void) { return number("FAKE_RETURN"); }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned n) { snprintf(text, n, "%s", getenv("FAKE_DRIVER")); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = number("FAKE_CUDA"); return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)8; return 0; }
int nvmlDeviceGetName(void *device, char *text, unsigned n) { snprintf(text, n, "NVIDIA Pretend"); return 0; }
int nvmlDeviceGetUUID(void *device, char *text, unsigned n) { snprintf(text, n, "GPU-0123-4567"); return 0; }
int nvmlDeviceGetMemoryInfo(void *device, Memory *m) { m->total = 24ull << 30; m->free = m->used = 0; return 0; }
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    int both = number("FAKE_SM"); *major = both / 10; *minor = both % 10; return 0;
}
const char *nvmlErrorString(int code) { return code == 9 ? "Driver Not Loaded" : "Unknown Error"; }
"""


def pretend(folder: Path, name: str, version: str | None, source: str | None = None, module: str | None = None) -> None:
    """A distribution in a folder: metadata, and a module when there is source for one."""
    info = folder / f"{name.replace('-', '_')}-{version or 'damaged'}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\n" + (f"Version: {version}\n" if version else "")
    )
    if source is not None:
        package = folder / (module or name.replace("-", "_"))
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text(source)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder whose distributions come before the installed ones."""
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
    """What a new Python with this environment prints."""
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
    """What Python prints on a machine that has a GPU, as far as NVML knows."""
    answers = {"FAKE_RETURN": "0", "FAKE_DRIVER": "580.65.06", "FAKE_CUDA": "13000", "FAKE_SM": str(sm)}
    return python(code, LD_LIBRARY_PATH=str(driver), **(answers | environment))


TARGETS_AS_JSON = """
import msgspec
from evit_deploy.environment import targets
print(msgspec.json.encode({target.name: target for target in targets()}).decode())
"""


def named(diagnosis: Diagnosis, name: str, group: str | None = None) -> Finding:
    (found,) = [f for f in diagnosis.findings if f.name == name and group in (None, f.group)]
    return found


# ---- versions and extras


def test_bounds_are_those_of_the_project_file():
    stated = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups() for line in PROJECT["dependencies"])
    assert stated == REQUIRED
    for name, extra in EXTRAS.items():
        bounds = {}
        for line in PROJECT["optional-dependencies"][name]:
            package, least, below = re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<([\d.]+))?", line).groups()
            bounds[package] = (least, below)
        assert bounds == {package: (least, extra.below.get(package)) for package, least in extra.packages.items()}


@pytest.mark.parametrize(
    ("version", "least", "below", "fitting"),
    [
        ("2.15.0+cu132", "2.11", None, True),
        ("2.9.1", "2.11", None, False),
        ("10.14.1.48.post1", "10.15", None, False),
        ("10.15.1.29", "10.15", None, True),
        ("10.15", "10.15", None, True),
        ("2.14.3", "2.14", "2.15", True),
        ("2.15.0", "2.14", "2.15", False),
        ("2026.4.1", "2025.4", None, True),
        (None, "1", None, False),
    ],
)
def test_versions_are_compared_as_numbers(version, least, below, fitting):
    assert fits(version, least, below) is fitting


def test_a_version_that_is_no_number_has_none():
    assert numbers("unknown") == ()


def test_what_is_required_here_is_here():
    for package in REQUIRED:
        require(package)


def test_a_required_package_that_is_too_old(place):
    pretend(place, "timm", "0.9.2")
    with pytest.raises(MissingRequirement) as caught:
        require("timm")
    assert str(caught.value) == (
        'timm is needed (got 0.9.2, expected 1.0.28 or newer). Run: pip install "timm>=1.0.28"'
    )
    assert caught.value.exit_code == 3


def test_metadata_without_a_version_is_no_installation(place):
    pretend(place, "timm", None)
    assert version_of("timm") is None


def test_an_extra_that_is_missing():
    if version_of("tensorrt"):
        pytest.skip("TensorRT is installed")
    with pytest.raises(MissingRequirement) as caught:
        require_extra("tensorrt")
    assert str(caught.value) == 'tensorrt: tensorrt is not installed. Run: pip install "evit-deploy[tensorrt]"'


def test_an_extra_with_the_wrong_versions(place):
    pretend(place, "tensorrt", "10.14.1.48.post1")
    pretend(place, "polygraphy", "0.49.9")
    pretend(place, "torch-tensorrt", "2.15.0")
    assert lacking("tensorrt")[:2] == [
        "tensorrt is 10.14.1.48.post1, needed 10.15 or newer",
        "polygraphy is 0.49.9, needed 0.53 or newer",
    ]
    assert lacking("torch-tensorrt")[0] == "torch-tensorrt is 2.15.0, needed >=2.14,<2.15"


def test_a_wheel_for_one_cuda_version_counts(place):
    pretend(place, "tensorrt-cu12", "11.4.0.106")
    assert version_of("tensorrt") == "11.4.0.106"


def test_there_is_no_such_extra():
    with pytest.raises(InputError, match=r"unknown extra \(got 'tensorflow', expected one of openvino, tensorrt"):
        require_extra("tensorflow")


# ---- targets


def test_targets_are_told_quickly_and_without_loading_anything():
    code = """
import sys, time
started = time.perf_counter()
from evit_deploy.environment import usable_targets
usable_targets()
assert time.perf_counter() - started < 2, time.perf_counter() - started
print([name for name in ("torch", "numpy", "onnx", "onnxruntime", "openvino", "tensorrt_rtx") if name in sys.modules])
"""
    assert python(code).strip() == "[]"


def test_targets_here():
    here = {target.name: target for target in targets()}
    assert tuple(here) == TARGETS
    assert here["onnx"].builds
    assert here["onnx"].runs
    assert usable_targets() == tuple(name for name, target in here.items() if target.builds and target.runs)
    for target in here.values():
        assert bool(target.reasons) is bool(target.fix) is not (target.builds and target.runs)


def gpu_targets(driver: Path, sm: int, **environment: str) -> dict:
    return json.loads(on_gpu(driver, TARGETS_AS_JSON, sm, **environment))


def test_a_machine_with_a_gpu(driver, place):
    pretend(place, "tensorrt", "11.4.0.106")
    pretend(place, "tensorrt-cu13", "11.4.0.106")
    pretend(place, "tensorrt-rtx", "1.7.1.116")
    pretend(place, "tensorrt-rtx-cu13", "1.7.1.116")
    pretend(place, "torch-tensorrt", "2.14.0")
    pretend(place, "torch", "2.14.1")
    pretend(place, "polygraphy", "0.53.6")
    for name, target in gpu_targets(driver, 89).items():
        assert target["builds"], name
        assert target["runs"], name
        assert target["fix"] is None
    # TensorRT-RTX builds for its own GPUs anywhere, and runs on no Hopper
    hopper = gpu_targets(driver, 90)
    assert (hopper["tensorrt"]["builds"], hopper["tensorrt"]["runs"]) == (True, True)
    assert (hopper["tensorrt-rtx"]["builds"], hopper["tensorrt-rtx"]["runs"]) == (True, False)
    assert hopper["tensorrt-rtx"]["reasons"] == [
        "NVIDIA Pretend is sm90, TensorRT-RTX runs on sm75, sm80, sm86, sm89, sm120, sm121"
    ]
    assert hopper["tensorrt-rtx"]["fix"] == "Use --target tensorrt on this GPU."
    volta = gpu_targets(driver, 70)
    assert not volta["tensorrt"]["builds"]
    assert volta["tensorrt"]["reasons"] == ["NVIDIA Pretend is sm70, TensorRT needs sm75 or newer"]
    # hidden from CUDA, it does not count; neither does a name that CUDA would not know
    for hidden in ("", "-1", "7", "GPU-ffff"):
        unseen = gpu_targets(driver, 89, CUDA_VISIBLE_DEVICES=hidden)["tensorrt"]
        assert unseen["reasons"] == ["no NVIDIA GPU is visible"]
        assert "CUDA_VISIBLE_DEVICES" in unseen["fix"]
    for shown in ("0", "GPU-0123", " 0 , 7"):
        assert gpu_targets(driver, 89, CUDA_VISIBLE_DEVICES=shown)["tensorrt"]["runs"]


def test_a_driver_that_is_too_old(driver, place):
    pretend(place, "tensorrt", "11.4.0.106")
    pretend(place, "tensorrt-cu13", "11.4.0.106")
    pretend(place, "polygraphy", "0.53.6")
    old = {"FAKE_DRIVER": "550.54.14", "FAKE_CUDA": "12040"}
    target = gpu_targets(driver, 80, **old)["tensorrt"]
    assert not target["builds"]
    assert target["reasons"] == ["it is built with CUDA 13, and the driver 550.54.14 runs CUDA 12.4"]
    assert target["fix"].startswith(
        "Update the NVIDIA driver to 580 or newer, or: pip uninstall -y tensorrt tensorrt-cu13 "
    )
    assert target["fix"].endswith(" && pip install tensorrt-cu12")


def test_a_driver_that_does_not_answer(driver):
    said = on_gpu(driver, "from evit_deploy.environment import nvidia; print(nvidia())", 80, FAKE_RETURN="9")
    assert "driver=None" in said
    assert "Driver Not Loaded" in said


def test_without_nvidia_ml_py(place):
    (place / "pynvml.py").write_text("raise ImportError('libsomething.so: cannot open shared object file')")
    said = python("from evit_deploy.environment import nvidia; print(nvidia().error)")
    assert "nvidia-ml-py cannot be used: ImportError: libsomething.so" in said


# ---- doctor


@pytest.fixture(scope="module")
def here() -> Diagnosis:
    return doctor()


def test_doctor_here(here):
    assert here.broken == []
    assert here.targets == targets()
    assert named(here, "python").usable
    assert named(here, "torch").found == importlib.metadata.version("torch")
    assert {f.name for f in here.findings if f.group == "Extras"} == set(EXTRAS)
    assert [f.name for f in here.findings if f.group == "Runtimes"] == RUNTIMES.names()
    assert {f.name for f in here.findings if f.group == "Plugin"} == {"library", "nvcc", "CMake"}
    for finding in here.findings:
        assert "\n" not in f"{finding.found}{finding.fix}{finding.note}"
        if finding.usable:
            assert finding.fix is None


def test_doctor_takes_little_more_than_importing_pytorch():
    started = time.perf_counter()
    python("import torch")
    alone = time.perf_counter() - started
    started = time.perf_counter()
    doctor()
    assert time.perf_counter() - started < 2 * alone + 2


def test_shared_libraries_that_do_not_load(place):
    """Each in its own way: an error, an exit, a crash. The rest is told all the same."""
    missing = "raise ImportError('libopenvino.so.2640: cannot open shared object file: No such file or directory')"
    pretend(place, "openvino", "2026.4.1", missing)
    pretend(place, "safetensors", "0.8.0", "import os; os.kill(os.getpid(), 11)")
    pretend(place, "pyyaml", "6.0.3", "raise SystemExit(3)", "yaml")
    pretend(place, "tensorrt", "11.4.0.106", "print('noise on stdout'); raise RuntimeError('a\\nb')")
    diagnosis = doctor()
    assert named(diagnosis, "safetensors").note == "broken: it ends the process (SIGSEGV)"
    assert named(diagnosis, "safetensors").fix == "pip install --force-reinstall safetensors"
    assert named(diagnosis, "pyyaml").note == "broken: SystemExit: 3"
    assert {finding.name for finding in diagnosis.broken} >= {"safetensors", "pyyaml"}
    assert named(diagnosis, "numpy").usable
    openvino = named(diagnosis, "openvino", "Extras")
    assert not openvino.usable
    assert not openvino.needed
    assert (
        openvino.note
        == "broken: ImportError: libopenvino.so.2640: cannot open shared object file: No such file or directory"
    )
    assert openvino.fix == "pip install --force-reinstall openvino"
    target = next(target for target in diagnosis.targets if target.name == "openvino")
    assert not target.builds
    assert target.fix == openvino.fix
    if not lacking("tensorrt"):
        assert named(diagnosis, "tensorrt", "Extras").note == "broken: RuntimeError: a"


def test_a_torchvision_for_another_torch(place):
    (place / "torchvision").mkdir()
    (place / "torchvision" / "__init__.py").write_text("")
    (place / "torchvision" / "_C.so").write_bytes(b"this was built for something else")
    diagnosis = doctor()
    finding = named(diagnosis, "torchvision")
    assert finding.needed
    assert not finding.usable
    assert finding.note is not None
    assert finding.note.startswith("broken: OSError")
    assert finding.fix == "pip install --force-reinstall torch torchvision"
    assert not next(target for target in diagnosis.targets if target.name == "onnx").builds
    (place / "torchvision" / "_C.so").unlink()
    assert ask(["torchvision"])["torchvision"].error == "ImportError: its operators are missing"


def test_a_crash_takes_nobody_along_and_a_wait_ends(place):
    (place / "crashing.py").write_text("import os; os.abort()")
    (place / "endless.py").write_text("import time; time.sleep(100)")
    (place / "exiting.py").write_text("import os, sys; print('last words', file=sys.stderr, flush=True); os._exit(5)")
    jobs = ["module:json", "module:crashing", "module:exiting", "module:no_such_module", "module:click"]
    answers = ask(jobs)
    assert list(answers) == jobs
    assert [answers[f"module:{name}"].error for name in ("json", "click")] == [None, None]
    assert answers["module:crashing"].error == "it ends the process (SIGABRT)"
    assert answers["module:exiting"].error == "it ends the process with exit code 5: last words"
    assert answers["module:no_such_module"].missing
    waited = ask(["module:endless", "module:json"], patience=3)
    assert waited["module:endless"].error == "no answer within 3 s"
    assert waited["module:json"].error is None


def test_two_onnxruntimes(place):
    pretend(place, "onnxruntime-gpu", "1.24.4")
    finding = named(doctor(), "onnxruntime and onnxruntime-gpu")
    assert not finding.needed
    assert finding.fix == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"


def test_doctor_on_a_gpu(driver):
    code = "from evit_deploy.doctor import doctor; import msgspec; print(msgspec.json.encode(doctor()).decode())"
    document = json.loads(on_gpu(driver, code, 89).splitlines()[-1])
    found = {finding["name"]: finding for finding in document["findings"] if finding["group"] == "GPU"}
    assert found["driver"]["found"] == "580.65.06, up to CUDA 13.0"
    assert found["GPU 0"]["found"] == "NVIDIA Pretend, sm89, 24 GiB"
    # PyTorch asks CUDA itself, and there is none
    assert not found["PyTorch is built"]["usable"]
    assert found["PyTorch is built"]["fix"]


def test_doctor_with_something_needed_missing(place):
    pretend(place, "onnxscript", "0.1.0")
    command = [sys.executable, "-m", "evit_deploy", "doctor"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    document = json.loads(done.stdout)
    assert document["usable"] is False
    assert {target["name"]: target["builds"] for target in document["targets"]} == dict.fromkeys(TARGETS, False)
    assert "onnxscript cannot be used" in done.stderr
    assert install_line("onnxscript") in done.stderr
    # even what doctor itself is made of may be missing
    (place / "msgspec.py").write_text("raise ImportError('no module named _core')")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "Run: pip install --force-reinstall msgspec" in done.stderr
    assert "Traceback" not in done.stderr


def test_nvidia_never_raises():
    assert nvidia() == nvidia()
