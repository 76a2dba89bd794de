"""What the GPU is and how fast it is allowed to run: clocks, throttling, temperature and power, from NVML.

A measurement on a GPU whose clocks moved measured the clocks. NVIDIA's own advice is to lock them first
(``nvidia-smi --lock-gpu-clocks``); this module sees whether they were, and whether something slowed the GPU down.
"""

import os
from types import TracebackType
from typing import Any, Self

import msgspec

from evit_deploy.errors import MissingRequirement

# Bits of nvmlDeviceGetCurrentClocksEventReasons (nvml.h) -> what slows the GPU down.
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
    """A GPU at one moment; ``None`` where the driver does not say.

    Args:
        name: As the driver calls it.
        driver: Version.
        compute_capability: ``sm80``.
        sm_clock: MHz now.
        sm_clock_max: MHz at most.
        memory_clock: MHz now.
        memory_clock_max: MHz at most.
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
        """What slows it down, in words."""
        return reasons_in_words(self.throttled_by)


def reasons_in_words(bits: int) -> list[str]:
    """Puts NVML's clock event reasons into words.

    >>> reasons_in_words(0x44)
    ['the power limit is reached', 'it is too hot (hardware limit)']
    """
    known = [text for bit, text in REASONS.items() if bits & bit]
    rest = bits & ~sum(REASONS)
    return [*known, f"reason {rest:#x}"] if rest else known


def missing() -> MissingRequirement | None:
    """What is missing here for work on a GPU; ``None`` when PyTorch reaches one."""
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
    """PyTorch's number of the GPU that work goes to."""
    import torch

    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def compute_capability(device: int = 0) -> str | None:
    """``sm80`` and the like, from PyTorch; ``None`` without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def snapshot(device: int = 0) -> GpuState:
    """Looks at a GPU once.

    Args:
        device: PyTorch's number of it, which ``CUDA_VISIBLE_DEVICES`` renumbers; NVML is asked by its UUID.

    Raises:
        MissingRequirement: No GPU, or no nvidia-ml-py.
    """
    lacking = missing()
    if lacking is not None:
        raise lacking
    with Nvml(device) as nvml:
        return nvml.state()


class Nvml:
    """NVML between its init and its shutdown, looking at one of PyTorch's devices."""

    def __init__(self, device: int) -> None:
        self._device = device

    def __enter__(self) -> Self:
        try:
            import pynvml
        except ImportError:
            fix = 'pip install "nvidia-ml-py>=12"'
            raise MissingRequirement("nvidia-ml-py is needed to read the GPU's clocks", fix=fix) from None
        import torch

        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            fix = "Install NVIDIA's driver; in a container, start it with --gpus all."
            raise MissingRequirement(f"the GPU's driver cannot be asked ({error})", fix=fix) from None
        properties = torch.cuda.get_device_properties(self._device)
        self._name, self._capability = properties.name, f"sm{properties.major}{properties.minor}"
        try:
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        except pynvml.NVMLError as error:  # a slice of a GPU (MIG) has another kind of number
            pynvml.nvmlShutdown()
            raise MissingRequirement(
                f"the driver does not know PyTorch's GPU by its number ({error})", seen=str(properties.uuid)
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._nvml.nvmlShutdown()

    def state(self) -> GpuState:
        """What the GPU does now."""
        nvml = self._nvml
        power, limit = self._ask("nvmlDeviceGetPowerUsage"), self._ask("nvmlDeviceGetPowerManagementLimit")
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:  # its name before driver 535
            reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        driver = nvml.nvmlSystemGetDriverVersion()
        return GpuState(
            name=self._name,
            driver=driver.decode() if isinstance(driver, bytes) else driver,
            compute_capability=self._capability,
            sm_clock=self._ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            sm_clock_max=self._ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
            memory_clock=self._ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            memory_clock_max=self._ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_MEM),
            throttled_by=reasons or 0,
            temperature=self._ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            power=None if power is None else power / 1000,
            power_limit=None if limit is None else limit / 1000,
        )

    def _ask(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except self._nvml.NVMLError:  # not every GPU answers every question; a virtual one answers few
            return None


class Gpu(msgspec.Struct, frozen=True):
    """One GPU.

    Args:
        name: As the driver calls it.
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
    """What the NVIDIA driver says.

    Args:
        driver: Its version; ``None`` without one.
        cuda: The newest CUDA version it runs.
        gpus: Those that this process may use.
        error: Why nothing more could be learnt.
    """

    driver: str | None = None
    cuda: tuple[int, int] | None = None
    gpus: tuple[Gpu, ...] = ()
    error: str | None = None


def nvidia() -> Nvidia:
    """Asks NVML, which neither loads CUDA nor takes memory on the GPU."""
    try:
        import pynvml
    except Exception as error:  # not installed, or damaged
        return Nvidia(error=f"nvidia-ml-py cannot be used: {type(error).__name__}: {error}")
    try:
        pynvml.nvmlInit()
    except Exception as error:  # pynvml makes its classes at run time
        return Nvidia(error=str(error))
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        version = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
        gpus = _visible([_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())])
        return Nvidia(driver, (version // 1000, version % 1000 // 10), tuple(gpus))
    except Exception as error:  # a driver that was updated under a running machine, a GPU that fell off its bus
        return Nvidia(error=str(error))
    finally:
        pynvml.nvmlShutdown()


def _gpu(pynvml, index: int) -> tuple[str, Gpu]:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    memory = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    return str(pynvml.nvmlDeviceGetUUID(handle)), Gpu(str(pynvml.nvmlDeviceGetName(handle)), (major, minor), memory)


def _visible(gpus: list[tuple[str, Gpu]]) -> list[Gpu]:
    """NVML knows all GPUs; CUDA only those that CUDA_VISIBLE_DEVICES names, up to the first name it does not know."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return [gpu for _, gpu in gpus]
    visible = []
    for name in (part.strip() for part in wanted.split(",")):
        if name.isdecimal() and int(name) < len(gpus):
            visible.append(gpus[int(name)][1])
        elif name.startswith("MIG-") and gpus:  # a slice of some GPU here; all that is asked of it is the same
            visible.append(gpus[0][1])
        elif name and (match := [gpu for identity, gpu in gpus if identity.startswith(name)]):
            visible.append(match[0])
        else:
            break
    return visible
