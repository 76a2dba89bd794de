"""GPUs and their current clocks, as reported by the NVIDIA driver through NVML.

Timings are not comparable if the GPU's clocks changed in between. NVIDIA recommends locking them first (``nvidia-smi
--lock-gpu-clocks``); a :class:`GpuState` shows whether they were, and whether something slowed the GPU down.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from evit_deploy.environment.requirements import install_line
from evit_deploy.errors import MissingRequirement

# Bits of nvmlDeviceGetCurrentClocksEventReasons (nvml.h) -> reason.
REASONS = {
    0x1: "it is idle",
    0x2: "application clocks are set",
    0x4: "the power limit is reached",
    0x8: "the hardware slows it down",
    0x10: "it is kept in step with other GPUs",
    0x20: "it is too hot (software limit)",
    0x40: "it is too hot (hardware limit)",
    0x80: "the power supply asks for less",
    0x100: "display clocks are set",
}


class GpuState(msgspec.Struct, frozen=True):
    """State of a GPU at one moment; ``None`` for values that the driver does not report.

    Args:
        name: Name reported by the driver.
        driver: Driver version.
        compute_capability: ``sm80``.
        sm_clock: Current MHz.
        sm_clock_max: Maximum MHz.
        memory_clock: Current MHz.
        memory_clock_max: Maximum MHz.
        throttled_by: Bits of ``REASONS``.
        temperature: °C.
        power: Watts.
        power_limit: Watts.
    """

    name: str
    driver: str
    compute_capability: str
    sm_clock: int | None = None
    sm_clock_max: int | None = None
    memory_clock: int | None = None
    memory_clock_max: int | None = None
    throttled_by: int = 0
    temperature: int | None = None
    power: float | None = None
    power_limit: float | None = None

    @property
    def reasons(self) -> list[str]:
        """Reasons for reduced clocks, as text."""
        return reasons_in_words(self.throttled_by)


class Gpu(msgspec.Struct, frozen=True):
    """One GPU.

    Args:
        name: Name reported by the driver.
        capability: Compute capability.
        memory: Bytes.
    """

    name: str
    capability: tuple[int, int]
    memory: int

    @property
    def architecture(self) -> str:
        """``sm90``."""
        return "sm{}{}".format(*self.capability)


class Nvidia(msgspec.Struct, frozen=True):
    """Driver and GPUs, as reported by the NVIDIA driver.

    Args:
        driver: Its version; ``None`` without one.
        cuda: Newest CUDA version that it supports.
        gpus: The GPUs visible to this process.
        error: Why the query failed.
    """

    driver: str | None = None
    cuda: tuple[int, int] | None = None
    gpus: tuple[Gpu, ...] = ()
    error: str | None = None


def reasons_in_words(bits: int) -> list[str]:
    """Converts NVML's clock event reasons to text.

    >>> reasons_in_words(0x44)
    ['the power limit is reached', 'it is too hot (hardware limit)']
    """
    known = [text for bit, text in REASONS.items() if bits & bit]
    rest = bits & ~sum(REASONS)
    return [*known, f"reason {rest:#x}"] if rest else known


def missing_gpu() -> MissingRequirement | None:
    """The error for a missing GPU; ``None`` if PyTorch can use one."""
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return MissingRequirement(
            "this PyTorch was built without CUDA",
            seen=f"torch {torch.__version__}",
            fix="pip install torch torchvision, from an index with CUDA builds (https://pytorch.org/get-started).",
        )
    return MissingRequirement(
        "no CUDA device can be reached",
        wanted=f"an NVIDIA GPU, and a driver for CUDA {torch.version.cuda}",
        fix="Run it where nvidia-smi lists a GPU.",
    )


def current_device() -> int:
    """PyTorch's index of the current GPU."""
    import torch

    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def compute_capability(device: int = 0) -> str | None:
    """Compute capability as reported by PyTorch, such as ``sm80``; ``None`` without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """Initializes NVML and shuts it down at the end. NVML does not load CUDA or use GPU memory.

    Raises:
        ImportError: nvidia-ml-py is not installed, or damaged.
        Exception: The driver does not respond; pynvml creates its exception classes at run time.
    """
    try:
        import pynvml
    except Exception as error:
        raise ImportError(f"nvidia-ml-py cannot be used: {type(error).__name__}: {error}") from error
    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


@contextlib.contextmanager
def gpu_reader(device: int = 0) -> Iterator[Callable[[], GpuState]]:
    """Yields a function that reads the state of a GPU.

    Args:
        device: PyTorch's index, which depends on ``CUDA_VISIBLE_DEVICES``; NVML is queried by UUID.

    Raises:
        MissingRequirement: There is no GPU, or nvidia-ml-py is not installed.
    """
    lacking = missing_gpu()
    if lacking is not None:
        raise lacking
    import torch

    with contextlib.ExitStack() as stack:
        try:
            nvml = stack.enter_context(_nvml())
        except ImportError:
            raise MissingRequirement(
                "nvidia-ml-py is needed to read the GPU's clocks", fix=install_line("nvidia-ml-py")
            ) from None
        except Exception as error:
            fix = "Install NVIDIA's driver; in a container, start it with --gpus all."
            raise MissingRequirement(f"the GPU driver cannot be queried ({error})", fix=fix) from None
        properties = torch.cuda.get_device_properties(device)
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        except nvml.NVMLError as error:  # a slice of a GPU (MIG) has another kind of ID
            raise MissingRequirement(
                f"the driver does not know PyTorch's GPU by its number ({error})", seen=str(properties.uuid)
            ) from None
        yield functools.partial(_state, nvml, handle, properties)


def _state(nvml: Any, handle: Any, properties: Any) -> GpuState:
    def ask(function: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml, function)(handle, *arguments)
        except nvml.NVMLError:  # not every GPU supports every query; virtual ones support few
            return None

    power, limit = ask("nvmlDeviceGetPowerUsage"), ask("nvmlDeviceGetPowerManagementLimit")
    reasons = ask("nvmlDeviceGetCurrentClocksEventReasons")
    if reasons is None:  # the function's name before driver 535
        reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons")
    return GpuState(
        name=properties.name,
        driver=str(nvml.nvmlSystemGetDriverVersion()),
        compute_capability=f"sm{properties.major}{properties.minor}",
        sm_clock=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
        sm_clock_max=ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
        memory_clock=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
        memory_clock_max=ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_MEM),
        throttled_by=reasons or 0,
        temperature=ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        power=None if power is None else power / 1000,
        power_limit=None if limit is None else limit / 1000,
    )


def nvidia() -> Nvidia:
    """Queries NVML; never raises."""
    try:
        with _nvml() as nvml:
            driver = str(nvml.nvmlSystemGetDriverVersion())
            version = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
            gpus = _visible([_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())])
            return Nvidia(driver, (version // 1000, version % 1000 // 10), tuple(gpus))
    except Exception as error:  # no driver, a driver updated without a reboot, a GPU that fell off the bus
        return Nvidia(error=str(error))


def _gpu(nvml: Any, index: int) -> tuple[str, Gpu]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    memory = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    return str(nvml.nvmlDeviceGetUUID(handle)), Gpu(str(nvml.nvmlDeviceGetName(handle)), (major, minor), memory)


def _visible(gpus: list[tuple[str, Gpu]]) -> list[Gpu]:
    """Filters NVML's list of all GPUs by CUDA_VISIBLE_DEVICES, up to its first unknown entry, as CUDA does."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return [gpu for _, gpu in gpus]
    visible = []
    for name in (part.strip() for part in wanted.split(",")):
        if name.isdecimal() and int(name) < len(gpus):
            visible.append(gpus[int(name)][1])
        elif name.startswith("MIG-") and gpus:  # a slice of some GPU here; the values needed are the same
            visible.append(gpus[0][1])
        elif name and (match := [gpu for identity, gpu in gpus if identity.startswith(name)]):
            visible.append(match[0])
        else:
            break
    return visible
