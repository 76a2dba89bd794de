"""What the driver says, where it is made up and where it is missing; a GPU's own answers are tested with its clocks."""

import pytest

from evit_deploy.environment.nvidia import GpuState, nvidia
from evit_deploy.environment.requirements import install_line
from tests.support.machines import on_gpu, python


def test_a_driver_that_does_not_answer(driver):
    said = on_gpu(driver, "from evit_deploy.environment.nvidia import nvidia; print(nvidia())", 80, FAKE_RETURN="9")
    assert "driver=None" in said
    assert "Driver Not Loaded" in said


def test_without_nvidia_ml_py(place):
    (place / "pynvml.py").write_text("raise ImportError('libsomething.so: cannot open shared object file')")
    said = python("from evit_deploy.environment.nvidia import nvidia; print(nvidia().error)")
    assert "nvidia-ml-py cannot be used: ImportError: libsomething.so" in said


def test_nvidia_never_raises():
    assert nvidia() == nvidia()


# PyTorch as far as the GPU is asked for: it sees one, whose number the driver knows.
TORCH = """
from types import SimpleNamespace
class cuda:
    is_available = staticmethod(lambda: True)
    get_device_properties = staticmethod(
        lambda device: SimpleNamespace(name="NVIDIA Pretend", major=8, minor=9, uuid="{uuid}")
    )
"""
LOOK = """
from evit_deploy.environment.nvidia import gpu_reader
from evit_deploy.environment.requirements import install_line
from evit_deploy.errors import MissingRequirement
try:
    with gpu_reader() as read:
        found = read()
    print(found)
except MissingRequirement as error:
    print(error)
"""


@pytest.fixture
def torch_sees_a_gpu(place):
    (place / "torch.py").write_text(TORCH.format(uuid="0123-4567"))
    return place


def test_a_driver_is_asked_and_let_go(driver, torch_sees_a_gpu):
    """It answers some questions, one under its old name, and not the others."""
    wanted = GpuState("NVIDIA Pretend", "580.65.06", "sm89", 1410, None, 0, None, 4, None, 72.5, None)
    assert on_gpu(driver, LOOK, 89, FAKE_TRACE="1").splitlines() == ["shut down", str(wanted)]


def test_a_gpu_that_the_driver_does_not_know(driver, torch_sees_a_gpu):
    (torch_sees_a_gpu / "torch.py").write_text(TORCH.format(uuid="MIG-89"))
    assert on_gpu(driver, LOOK, 89, FAKE_TRACE="1").splitlines() == [
        "shut down",
        "the driver does not know PyTorch's GPU by its number (Not Found) (got MIG-89).",
    ]


def test_clocks_of_a_driver_that_does_not_answer(driver, torch_sees_a_gpu):
    said = on_gpu(driver, LOOK, 89, FAKE_RETURN="9", FAKE_TRACE="1").splitlines()
    assert said == [
        "the GPU driver cannot be queried (Driver Not Loaded). "
        "Install NVIDIA's driver; in a container, start it with --gpus all."
    ]


def test_clocks_without_nvidia_ml_py(torch_sees_a_gpu):
    (torch_sees_a_gpu / "pynvml.py").write_text("raise RuntimeError('damaged')")
    said = python(LOOK).strip()
    assert said == f"nvidia-ml-py is needed to read the GPU's clocks. {install_line('nvidia-ml-py')}"
