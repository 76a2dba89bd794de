"""What the GPU is and how fast it is allowed to run: clocks, throttling, temperature and power, from NVML.

A measurement on a GPU whose clocks moved measured the clocks. NVIDIA's own advice is to lock them first
(``nvidia-smi --lock-gpu-clocks``); this module sees whether they were, and whether something slowed the GPU down.
"""

import threading
from collections.abc import Sequence
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
_IDLE = 0x1
_HARMLESS = _IDLE | 0x2 | 0x100  # nobody's clock suffers from being idle between calls, or from what its owner has set
MOVED = 0.03
"""Clocks that differ by more than this share during a measurement are said to have moved."""
INTERVAL = 0.05
"""Seconds between samples: seldom enough not to take the interpreter from who is being timed."""


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


class GpuSummary(msgspec.Struct, frozen=True):
    """What a GPU did while one batch size was measured; ``None`` where the driver does not say.

    Args:
        name: As the driver calls it.
        driver: Version.
        compute_capability: ``sm80``.
        batch: Images a call.
        samples: How often it was looked at and found busy.
        sm_clock: Slowest and fastest, MHz.
        sm_clock_max: MHz at most.
        memory_clock: Slowest and fastest, MHz.
        memory_clock_max: MHz at most.
        slowed_down: Share of the samples in which something slowed it down, 0 to 1.
        reasons: What did, in words.
        temperature: Highest, °C.
        power: Highest, watts.
        power_limit: Watts.
    """

    name: str
    driver: str
    compute_capability: str
    batch: int
    samples: int
    sm_clock: tuple[int, int] | None = None
    sm_clock_max: int | None = None
    memory_clock: tuple[int, int] | None = None
    memory_clock_max: int | None = None
    slowed_down: float = 0.0
    reasons: tuple[str, ...] = ()
    temperature: int | None = None
    power: float | None = None
    power_limit: float | None = None


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
    with _Nvml(device) as nvml:
        return nvml.state()


class _Nvml:
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


class Watch:
    """Watches a GPU's clocks while something is measured; a context manager.

    Args:
        device: PyTorch's number of it.

    Raises:
        MissingRequirement: No GPU, or no nvidia-ml-py.
    """

    def __init__(self, device: int = 0) -> None:
        self.device = device
        self.states: list[GpuState] = []

    def __enter__(self) -> Self:
        lacking = missing()
        if lacking is not None:
            raise lacking
        self._nvml = _Nvml(self.device).__enter__()
        self.states.append(self._nvml.state())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="gpu-clocks", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self.look()
        finally:
            self._nvml.__exit__(kind, error, trace)

    def look(self) -> None:
        """Takes a sample now, beside those that are taken all the time."""
        self.states.append(self._nvml.state())

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.look()

    @property
    def notes(self) -> list[str]:
        """Sentences on clocks that moved and on what slowed the GPU down; none when all was steady."""
        return notes_on(self.states)


def summarize_states(states: Sequence[GpuState], batch: int) -> GpuSummary:
    """Condenses what a GPU did while one batch size was measured; idle samples are left out.

    Args:
        states: Samples of one GPU, at least one.
        batch: Images a call.
    """
    busy = [state for state in states if not state.throttled_by & _IDLE]
    slowed = 0
    for state in busy:
        slowed |= state.throttled_by & ~_HARMLESS
    last = states[-1]
    return GpuSummary(
        name=last.name,
        driver=last.driver,
        compute_capability=last.compute_capability,
        batch=batch,
        samples=len(busy),
        sm_clock=_span([state.sm_clock for state in busy]),
        sm_clock_max=last.sm_clock_max,
        memory_clock=_span([state.memory_clock for state in busy]),
        memory_clock_max=last.memory_clock_max,
        slowed_down=sum(bool(state.throttled_by & ~_HARMLESS) for state in busy) / max(len(busy), 1),
        reasons=tuple(reasons_in_words(slowed)),
        temperature=max((state.temperature for state in busy if state.temperature is not None), default=None),
        power=max((state.power for state in busy if state.power is not None), default=None),
        power_limit=last.power_limit,
    )


def _span(clocks: Sequence[int | None]) -> tuple[int, int] | None:
    known = [clock for clock in clocks if clock]
    return (min(known), max(known)) if known else None


def notes_on(states: Sequence[GpuState]) -> list[str]:
    """Says in sentences whether clocks moved between samples, and what slowed the GPU down.

    Idle samples are left out: before and between the calls a GPU lowers its clocks, and nobody is timed then.

    Args:
        states: Samples of one GPU.
    """
    busy = [state for state in states if not state.throttled_by & _IDLE]
    notes = []
    for label, clocks in (
        ("SM", [state.sm_clock for state in busy if state.sm_clock]),
        ("memory", [state.memory_clock for state in busy if state.memory_clock]),
    ):
        if clocks and max(clocks) > min(clocks) * (1 + MOVED):
            notes.append(
                f"The GPU's {label} clock moved between {min(clocks)} and {max(clocks)} MHz while it was measured: "
                "lock it (nvidia-smi --lock-gpu-clocks, --lock-memory-clocks) and measure again."
            )
    slowed = 0
    for state in busy:
        slowed |= state.throttled_by & ~_HARMLESS
    if slowed:
        share = sum(bool(state.throttled_by & ~_HARMLESS) for state in busy) / len(busy)
        notes.append(f"The GPU was slowed down in {share:.0%} of the samples: {'; '.join(reasons_in_words(slowed))}.")
    return notes
