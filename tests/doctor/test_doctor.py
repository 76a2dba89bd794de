"""What ``doctor`` finds: here as it is, and in made-up places where modules break."""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

from evit_deploy.doctor.doctor import Diagnosis, Finding, doctor
from evit_deploy.doctor.probe import ask
from evit_deploy.environment.requirements import EXTRAS, bounds, install_line, lacking, needed
from evit_deploy.registry import RUNTIMES, TARGETS
from evit_deploy.targets.target import available
from tests.support.machines import on_gpu, pretend


def named(diagnosis: Diagnosis, name: str, group: str | None = None) -> Finding:
    (found,) = [f for f in diagnosis.findings if f.name == name and group in (None, f.group)]
    return found


@pytest.fixture(scope="module")
def here() -> Diagnosis:
    return doctor()


def test_doctor_here(here):
    assert here.broken == []
    assert here.targets == available()
    assert named(here, "python").usable
    assert {f.name for f in here.findings if f.group == "Python and packages"} >= {"evit-deploy", *needed()}
    assert named(here, "torch").found == importlib.metadata.version("torch")
    assert {f.name for f in here.findings if f.group == "Extras"} == set(EXTRAS)
    assert [f.name for f in here.findings if f.group == "Runtimes"] == RUNTIMES.names()
    assert {f.name for f in here.findings if f.group == "Plugin"} == {"library", "nvcc", "CMake"}
    for finding in here.findings:
        assert "\n" not in f"{finding.found}{finding.fix}{finding.note}"
        if finding.usable:
            assert finding.fix is None


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
    code = "from evit_deploy.doctor.doctor import doctor; import msgspec; print(msgspec.json.encode(doctor()).decode())"
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
    assert {target["name"]: target["builds"] for target in document["targets"]} == dict.fromkeys(TARGETS.names(), False)
    assert "onnxscript cannot be used" in done.stderr
    assert f'pip install "onnxscript{bounds(needed()["onnxscript"])}"' == install_line("onnxscript")
    assert install_line("onnxscript") in done.stderr
    # even what doctor itself is made of may be missing
    (place / "msgspec.py").write_text("raise ImportError('no module named _core')")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "Run: pip install --force-reinstall msgspec" in done.stderr
    assert "Traceback" not in done.stderr
    (place / "msgspec.py").unlink()
    (place / "packaging.py").write_text("")  # hides the real one
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "packaging" in done.stderr.splitlines()[-1].split("Run: ")[1]
