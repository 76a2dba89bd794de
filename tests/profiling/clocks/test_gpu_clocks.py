"""Clocks and throttling in words; the readings themselves need a GPU."""

import pytest
import torch

from evit_deploy.environment.nvidia import REASONS, GpuState, compute_capability, gpu_reader, reasons_in_words
from evit_deploy.errors import MissingRequirement
from evit_deploy.profiling.clocks.gpu_clocks import Watch, notes_on

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")


def state(sm_clock: int | None = 1980, memory_clock: int | None = 2619, throttled_by: int = 0) -> GpuState:
    return GpuState("a GPU", "580.1", "sm90", sm_clock, 1980, memory_clock, 2619, throttled_by)


def test_the_bits_are_nvml_s():
    pynvml = pytest.importorskip("pynvml")
    names = (
        "GpuIdle", "ApplicationsClocksSetting", "SwPowerCap", "HwSlowdown", "SyncBoost", "SwThermalSlowdown",
        "HwThermalSlowdown", "HwPowerBrakeSlowdown", "DisplayClockSetting",
    )  # fmt: skip
    assert list(REASONS) == [getattr(pynvml, f"nvmlClocksEventReason{name}") for name in names]


def test_reasons_in_words():
    assert reasons_in_words(0) == []
    assert reasons_in_words(0x20 | 0x4) == ["the power limit is reached", "it is too hot (software limit)"]
    assert reasons_in_words(0x1000 | 0x1) == ["it is idle", "reason 0x1000"]
    assert state(throttled_by=0x8).reasons == ["the hardware slows it down"]


def test_steady_clocks_need_no_note():
    assert notes_on([state(), state(1950), state(throttled_by=0x2)]) == []
    assert notes_on([]) == []


def test_clocks_that_moved_are_told_with_both_ends():
    (note,) = notes_on([state(1410), state(1980)])
    assert "SM clock moved between 1410 and 1980 MHz" in note
    assert "--lock-gpu-clocks" in note
    (note,) = notes_on([state(memory_clock=1313), state()])
    assert "memory clock moved between 1313 and 2619 MHz" in note


def test_an_idle_gpu_s_clocks_do_not_count():
    assert notes_on([state(345, throttled_by=0x1), state(), state()]) == []


def test_a_gpu_that_does_not_tell_its_clocks_has_no_note():
    assert notes_on([state(None, None), state(None, None)]) == []


def test_throttling_is_told_with_its_share_and_all_its_reasons():
    (note,) = notes_on([state(), state(throttled_by=0x4), state(throttled_by=0x24), state(throttled_by=0x2)])
    assert note == (
        "The GPU was slowed down in 50% of the samples: the power limit is reached; it is too hot (software limit)."
    )


@without_gpu
def test_without_a_gpu_it_is_said_what_is_missing():
    assert compute_capability() is None
    for look in (lambda: gpu_reader().__enter__(), lambda: Watch().__enter__()):
        with pytest.raises(MissingRequirement, match=r"no CUDA device|built without CUDA") as error:
            look()
        assert error.value.exit_code == 3
        assert error.value.fix


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_says_what_it_is_and_how_fast_it_runs():
    with gpu_reader() as read:
        found = read()
    assert found.name == torch.cuda.get_device_name()
    assert found.compute_capability == compute_capability()
    assert found.driver.split(".")[0].isdigit()
    assert found.sm_clock is None or 0 < found.sm_clock <= (found.sm_clock_max or 10_000)


@pytest.mark.gpu
@needs_gpu
def test_a_watch_samples_while_something_runs():
    with Watch() as watch:
        x = torch.randn(2048, 2048, device="cuda")
        for _ in range(200):
            x = x @ x / 2048
        torch.cuda.synchronize()
    assert len(watch.states) >= 2
    assert all(isinstance(note, str) for note in watch.notes)
