"""The clock of a GPU: with runners that only write down, with PyTorch on a CPU as the device, and on a real GPU."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from evit_deploy.export.card import LOGITS
from evit_deploy.profiling.clocks.gpu_times import CALLS, WINDOW, compute_times, measure_on_gpu, warm_up
from evit_deploy.profiling.clocks.turns import random_feeds
from evit_deploy.profiling.profile import profile
from evit_deploy.recipe.options import ProfileOptions
from evit_deploy.runtimes.eager import EagerRunner
from evit_deploy.runtimes.resident import HostMark
from evit_deploy.runtimes.runner import Mark, Resident
from evit_deploy.tokens.reduce import reduce_tokens_
from tests.support.models import KEEP, of_kind, write_checkpoint
from tests.support.standins import IdleRunner

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Written(IdleRunner, Resident):
    """Writes down what it is asked for, as a runner and as its own resident."""

    def __init__(self, artifact: str, calls: list[str], *, tells: bool = True) -> None:
        super().__init__(artifact)
        self.calls, self.tells, self.now = calls, tells, 0.0

    def resident(self, feeds: Mapping[str, np.ndarray]) -> Resident | None:
        return self if self.tells else None

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls.append(f"{self.artifact} infer")
        return {}

    def run(self) -> None:
        self.calls.append(f"{self.artifact} run")
        self.now += 0.25

    def round_trip(self) -> None:
        self.calls.append(f"{self.artifact} round trip")

    def answers(self) -> dict[str, np.ndarray]:
        return {}

    def mark(self) -> Mark:
        self.calls.append(f"{self.artifact} mark")
        return HostMark(self.now)

    def synchronize(self) -> None:
        self.calls.append(f"{self.artifact} wait")


def test_a_turn_is_read_after_one_wait_and_its_first_call_is_not_timed():
    calls: list[str] = []
    runner = Written("a", calls)
    assert compute_times(runner, runner, 2) == [0.25, 0.25]
    assert calls == [f"a {what}" for what in ("run", "mark", "run", "mark", "run", "mark", "wait")]


def test_turns_are_drawn_anew_and_hold_compute_and_a_whole_call(monkeypatch):
    monkeypatch.setattr("evit_deploy.profiling.clocks.gpu_times.LEAST", 0.0)
    calls: list[str] = []
    runners = [Written("a", calls), Written("b", calls, tells=False), Written("c", calls)]
    times = measure_on_gpu(runners, random_feeds(runners, 2), duration=1e-9, minimum_rounds=30)
    assert [own.clock for own in times] == ["compute", "wall", "compute"]
    assert [own.seconds.shape for own in times] == [(30, CALLS), (30, 1), (30, CALLS)]
    assert (times[0].seconds == 0.25).all()
    assert times[0].end_to_end is not None
    assert times[1].end_to_end is None
    assert (times[0].end_to_end.shape, (times[0].end_to_end > 0).all()) == ((30,), True)
    turns = [who for who, _ in itertools.groupby(calls, key=lambda call: call[0])]
    assert turns[:3] == ["a", "b", "c"]  # the warm-up
    at = {what: [i for i, call in enumerate(calls) if call == what] for what in set(calls)}
    assert min(map(len, (at["a round trip"], at["b infer"], at["c round trip"]))) >= 1 + 2 * WINDOW + 31
    whole = sorted(i for what in ("a round trip", "b infer", "c round trip") for i in at[what])[-90:]
    rounds = ["".join(calls[i][0] for i in whole[start : start + 3]) for start in range(0, 90, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len(set(rounds)) == 6  # every order occurs
    assert all(calls[i + 1].endswith("wait") for i in whole)


def falling(seconds: list[float], monkeypatch) -> int:
    """How many calls a warm-up makes whose calls take these times, the last of them for ever."""
    left, now = list(seconds), [0.0]

    def call() -> None:
        now[0] += left.pop(0) if len(left) > 1 else left[0]

    monkeypatch.setattr("evit_deploy.profiling.clocks.gpu_times.time.perf_counter", lambda: now[0])
    return warm_up(IdleRunner("a"), call)


def test_a_warm_up_ends_when_the_times_stand_still(monkeypatch):
    assert falling([0.02], monkeypatch) == 1 + 2 * WINDOW
    # The first compiles, the next warms up, the next records: none of them may be timed.
    assert falling([60.0, 0.5, 0.4, 0.02], monkeypatch) == 1 + 2 * WINDOW + 1
    # A fall of twenty calls, then as many that stand still as fill the medians of two windows.
    assert falling([60.0, *[0.04 * 0.9**i for i in range(20)], 0.004], monkeypatch) == 1 + 20 + 2 * WINDOW - 1


def test_a_warm_up_lasts_until_the_clocks_are_up(monkeypatch):
    assert falling([0.001], monkeypatch) == 1 + 100


def test_a_warm_up_that_never_stands_still_ends_at_the_ceiling(monkeypatch):
    assert falling([1.0 * 0.95**i for i in range(60)], monkeypatch) == 1 + 2 * WINDOW  # 5 seconds after the first
    assert falling([0.3 * 0.95**i for i in range(200)], monkeypatch) < 60


@pytest.fixture(scope="module")
def model() -> Any:
    return reduce_tokens_(of_kind("smallest"), KEEP)


def test_a_model_of_pytorch_is_timed_both_ways(model):
    """All lines but those of CUDA: the CPU is the device here."""
    with EagerRunner(model) as runner:
        (times,) = measure_on_gpu([runner], random_feeds([runner], 2), duration=1e-9, minimum_rounds=2)
        assert (times.clock, times.seconds.shape, times.rounds.shape) == ("compute", (2, CALLS), (2,))
        assert (times.seconds > 0).all()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compute_and_a_whole_call_only_put_work_on_the_gpu(dtype):
    model = reduce_tokens_(of_kind("plain"), KEEP).to("cuda", dtype)
    with EagerRunner(model) as runner:
        (feeds,) = random_feeds([runner], 64)
        resident = runner.resident(feeds)
        expected = runner.infer(feeds)[LOGITS]
        resident.round_trip()
        runner.synchronize()
        np.testing.assert_array_equal(resident.answers()[LOGITS], expected)
        torch.cuda.set_sync_debug_mode("error")  # whatever waits, as a copy from pageable memory does, raises now
        try:
            resident.run()
            resident.round_trip()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        (times,) = measure_on_gpu([runner], [feeds], duration=1e-9, minimum_rounds=5)
    assert times.clock == "compute"
    assert (times.seconds > 0).all()
    assert (times.end_to_end > 0).all()


@pytest.mark.gpu
@needs_gpu
def test_pytorch_is_profiled_on_a_gpu_without_any_engine(tmp_path):
    checkpoint_file = write_checkpoint(tmp_path / "smallest.safetensors", "smallest")
    measure = ProfileOptions(batch_sizes=(2,), duration=0.05)
    report = profile(checkpoint_file, runtimes=["eager", "torch.compile"], measure=measure, keep_rate=0.5)
    assert [(row.runtime, row.variant) for row in report.rows] == [
        (runtime, variant) for runtime in ("eager", "torch.compile") for variant in ("model", "dense")
    ]
    for row in report.rows:
        assert (row.device, row.clock) == ("gpu", "compute")
        assert 0 < row.p50 <= row.p95 <= row.p99
        assert row.end_to_end_p50 > 0
        if row.variant == "model":
            assert row.speedup > 0
            assert row.end_to_end_speedup > 0
