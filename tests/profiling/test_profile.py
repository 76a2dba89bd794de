"""Profiling: the arithmetic on runners that only count, and one real run. How fast anything is, is nobody's promise."""

import io
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from rich.console import Console

from evit_deploy.bundle.bundle import read_bundle
from evit_deploy.bundle.manifest import DENSE, MODEL
from evit_deploy.errors import InputError
from evit_deploy.export.card import INPUT
from evit_deploy.profiling.candidates import Candidate, candidates_of
from evit_deploy.profiling.clocks.turns import MINIMUM_ROUNDS, Times
from evit_deploy.profiling.profile import profile, speed_gate
from evit_deploy.profiling.speedup import hidden_gains, rows_of, verdict
from evit_deploy.profiling.timing import measure, measure_all
from evit_deploy.recipe.options import ProfileOptions
from evit_deploy.registry import RUNTIMES
from evit_deploy.report.report import ProfileRow, Report
from evit_deploy.report.statistics import median_interval
from evit_deploy.report.tables import render
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_, token_plan
from tests.support.logs import progress_lines
from tests.support.models import TINY, of_kind
from tests.support.standins import IdleRunner

# What takes part without being asked for, beside what the tests are about.
ONNX = [
    name
    for name in RUNTIMES.names()
    if MODEL in RUNTIMES.get(name).files and RUNTIMES.get(name).default and RUNTIMES.get(name).missing() is None
]
TORCH = ["eager", "torch.compile"] if torch.cuda.is_available() else ["eager"]


class Counting(IdleRunner):
    """Does nothing but write down who was called."""

    name = "counting"

    def __init__(self, artifact: str, calls: list[str]) -> None:
        super().__init__(artifact)
        self.calls = calls
        self.shapes: list[tuple[int, ...]] = []

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls.append(self.artifact)
        self.shapes.append(feeds[INPUT].shape)
        return {}

    def synchronize(self) -> None:
        self.calls.append("wait")


def test_candidates_take_turns_and_do_not_always_follow_the_same_one():
    calls: list[str] = []
    runners = [Counting(name, calls) for name in "abc"]
    wall, cpu = measure(runners, batch=6, duration=1e-9, minimum_rounds=40)
    assert wall.shape == cpu.shape == (40, 3)
    assert (wall > 0).all()
    assert (cpu >= 0).all()
    assert set(calls[1::2]) == {"wait"}  # after every call
    order = "".join(calls[::2])
    assert order[:3] == "abc"  # warm-up
    rounds = [order[i : i + 3] for i in range(3, len(order), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len(set(rounds)) == 6  # every order occurs
    assert {after for before, after in itertools.pairwise(order) if before == "c"} == {"a", "b", "c"}
    assert set(runners[0].shapes) == {(6, 3, 4, 5)}


def test_a_duration_is_bounded_by_rounds(monkeypatch):
    monkeypatch.setattr("evit_deploy.profiling.clocks.turns.MAXIMUM_ROUNDS", 7)
    runners = [Counting("a", [])]
    assert len(measure(runners, 1, duration=60.0, minimum_rounds=2)[0]) == 7
    assert len(measure(runners, 1, duration=1e-9, minimum_rounds=9)[0]) == 9


PLAN = token_plan(reduce_tokens_(of_kind("plain"), TokenSpec(keep_rate=0.6)))
RUNTIME = [Candidate("onnxruntime", variant, None) for variant in ("model", "slice", "dense")]


def rows_at_4(candidates: list[Candidate], wall: np.ndarray) -> list[ProfileRow]:
    return rows_of(candidates, PLAN, 4, [Times("wall", own[:, None]) for own in wall.T])


def test_ratios_are_medians_of_pairs():
    # A machine that slows down: the ratio of medians would be 3 / 2, the median of ratios is 2.
    model = np.array([1.0, 2.0, 4.0, 8.0, 2.0])
    dense = model * np.array([2.0, 2.0, 0.5, 3.0, 1.5])
    sliced = model / np.array([1.1, 1.2, 1.3, 1.0, 1.25])
    own, other, last = rows_at_4(RUNTIME, np.stack([model, sliced, dense], axis=1))
    assert own.speedup == 2.0
    assert own.mac_ratio == pytest.approx(PLAN.mac_ratio())
    assert own.mac_ratio > 1.1
    whole, computed = PLAN.dense().computed_macs(), PLAN.computed_macs()
    assert own.computed_mac_ratio == pytest.approx(whole / computed)
    assert own.computed_mac_ratio < own.mac_ratio - 0.01  # the dense last block, of more tokens, saves more
    assert own.mac_efficiency == pytest.approx(2.0 * computed / whole)
    assert own.overhead == pytest.approx(0.2)
    assert other.overhead is None
    assert other.speedup == pytest.approx(np.median(dense / sliced))
    assert (own.speedup_low, own.speedup_high) == median_interval(dense / model)
    assert (last.speedup, last.mac_ratio, last.computed_mac_ratio, last.mac_efficiency, last.overhead) == (None,) * 5


def test_all_figures_of_a_row_are_of_its_clock_but_for_those_end_to_end():
    seconds = np.array([[0.010, 0.012], [0.012, 0.014], [0.020, 0.040]])  # three rounds of two calls
    twice = np.full((3, 2), 0.026)
    times = [Times("compute", seconds, np.array([1.0, 2.0, 4.0])), Times("compute", twice, np.array([3.0, 3.0, 3.0]))]
    own, dense = rows_of([RUNTIME[0], RUNTIME[2]], PLAN, 4, times)
    assert {own.clock, dense.clock} == {"compute"}
    assert own.p50 == pytest.approx(13)
    assert own.images_per_second == pytest.approx(4 / 0.013)
    assert own.p95 == pytest.approx(1e3 * np.percentile(seconds, 95))
    assert own.p99 == pytest.approx(1e3 * np.percentile(seconds, 99))
    assert own.variation == pytest.approx(seconds.std() / seconds.mean())
    assert (own.batch, own.rounds) == (4, 3)
    assert dense.variation == 0
    assert own.speedup == pytest.approx(0.026 / 0.013)  # of the rounds' medians 0.011, 0.013 and 0.030
    assert own.overhead is None  # no slice twin took part
    assert own.end_to_end_p50 == 2000
    assert own.end_to_end_images_per_second == 2
    assert own.end_to_end_speedup == 1.5  # median of 3, 1.5 and 0.75
    assert dense.end_to_end_speedup is None
    (plain,) = rows_at_4(RUNTIME[:1], np.ones((5, 1)))
    assert plain.clock == "wall"
    assert (plain.end_to_end_p50, plain.end_to_end_images_per_second, plain.end_to_end_speedup) == (None,) * 3


def test_what_copies_hide_is_said_beside_what_the_gpu_did():
    measured = row(1.4, clock="compute", end_to_end_speedup=1.1, device="gpu")
    (note,) = hidden_gains([measured])
    assert note == "onnxruntime, batch 8: 1.10x end to end, with copies and the host's work, 1.40x in compute."
    assert hidden_gains([msgspec.structs.replace(measured, end_to_end_speedup=1.39)]) == []
    assert hidden_gains([row(1.4), row(None, clock="compute"), row(1.4, clock="cpu", end_to_end_speedup=1.1)]) == []


def test_a_runtime_is_compared_with_its_own_twins_only():
    candidates = [Candidate(r, v, None) for r, v in itertools.product(("onnxruntime", "eager"), ("model", "dense"))]
    rows = rows_at_4(candidates, np.array([[1.0, 2.0, 10.0, 15.0]] * 3))
    assert [row.speedup for row in rows] == [2.0, None, 1.5, None]


def test_without_a_dense_twin_there_is_no_speedup():
    (own,) = rows_at_4(RUNTIME[:1], np.ones((5, 1)))
    assert own.speedup is None
    assert own.mac_efficiency is None
    assert own.mac_ratio is not None


@pytest.mark.parametrize(("count", "low", "high"), [(1, 1, 1), (5, 1, 5), (9, 1, 9), (11, 2, 10), (100, 40, 61)])
def test_the_interval_of_a_median(count, low, high):
    values = np.random.default_rng(0).permutation(np.arange(1.0, count + 1))
    assert median_interval(values) == (low, high)


def test_the_interval_of_a_median_covers_it():
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        low, high = median_interval(random.exponential(size=31))
        hits += low <= np.log(2) <= high
    assert hits / 1000 > 0.93


# What is said about it.


def row(speedup: float | None, low: float | None = None, **changes: Any) -> ProfileRow:
    plain = ProfileRow("onnxruntime", "model", 8, 9, 100.0, 1.0, 1.0, 1.0, 0.0, speedup=speedup, speedup_low=low)
    return msgspec.structs.replace(plain, **changes)


def test_the_verdict_says_when_it_does_not_pay():
    assert verdict([row(1.5, 1.2), row(None, variant="dense")]) == []
    losing, unclear = verdict([row(1.5, 1.2), row(0.9, 0.8, batch=1), row(1.1, 0.99, batch=32)])
    assert losing == "Token reduction does not pay on onnxruntime at batch 1 (0.90x)."
    assert "at batch 32 (1.10x) the gain is within noise" in unclear
    notes = verdict([row(0.5, 0.4), row(0.6, 0.5, runtime="eager")])
    assert [note.split(" at ")[0] for note in notes] == [
        "Token reduction does not pay on onnxruntime",
        "Token reduction does not pay on eager",
    ]
    assert verdict([row(0.5, 0.4, variant="slice")]) == []


def test_the_gate_holds_every_batch_to_the_speedup():
    report = Report(rows=(row(1.5), row(1.2, batch=32), row(1.0, variant="slice"), row(0.1, runtime="eager")))
    assert speed_gate(report, None) == Report()
    checks = speed_gate(report, 1.3).checks
    assert [(check.name, check.value, check.limit, check.passed) for check in checks] == [
        ("onnxruntime, batch 8: speed-up", 1.5, 1.3, True),
        ("onnxruntime, batch 32: speed-up", 1.2, 1.3, False),
    ]
    assert speed_gate(report, 1.2).passed
    assert "--min-speedup" in checks[1].reason


def test_the_gate_takes_pytorch_where_nothing_else_ran():
    assert not speed_gate(Report(rows=(row(1.1, runtime="eager"),)), 1.2).passed


def test_the_gate_needs_a_dense_twin():
    with pytest.raises(InputError, match="no dense twin"):
        speed_gate(Report(rows=(row(None),)), 1.2)


# Targets.


def variants(candidates: list[Candidate]) -> list[tuple[str, str]]:
    return [(c.runtime, c.variant) for c in candidates]


def test_a_bundle_brings_its_twins(converted):
    found = candidates_of(converted.path, None, None, ())
    onnx = list(itertools.product(ONNX, ("model", "slice", "dense")))
    torch_rows = list(itertools.product(TORCH, ("model", "dense")))
    assert variants(found.candidates) == onnx + torch_rows
    assert (found.plan, found.notes, found.required) == (converted.manifest.plan, [], set())
    eager = candidates_of(converted.path, None, None, ["eager"])
    assert variants(eager.candidates) == [("eager", "model"), ("eager", "dense")]
    assert eager.required == {"eager"}
    found = candidates_of(converted.path, None, None, ["onnxruntime"]).candidates
    assert variants(found) == [("onnxruntime", variant) for variant in ("model", "slice", "dense")]
    model, dense = (row.artifact for row in eager.candidates)
    assert token_plan(dense).locations == ()
    if not torch.cuda.is_available():
        assert dense.blocks[0].attn.qkv.weight is model.blocks[0].attn.qkv.weight  # not a second copy


def test_a_file_is_compared_with_what_is_given(converted):
    path = converted.file(MODEL)
    found = candidates_of(path, None, None, ())
    assert variants(found.candidates) == list(itertools.product(ONNX, ("model", "slice")))
    assert found.plan == converted.manifest.plan
    assert "--against" in found.notes[0]
    found = candidates_of(path, converted.file(DENSE), None, ())
    assert variants(found.candidates) == list(itertools.product(ONNX, ("model", "slice", "dense")))
    assert found.notes == []


def test_a_checkpoint_runs_in_pytorch(checkpoint_file):
    found = candidates_of(checkpoint_file, None, {"keep_rate": 0.5}, ())
    assert variants(found.candidates) == list(itertools.product(TORCH, ("model", "dense")))
    assert found.plan == token_plan(reduce_tokens_(of_kind("plain"), TokenSpec(keep_rate=0.5)))


def test_targets_that_cannot_be_profiled(converted, checkpoint_file, tmp_path):
    options: dict[str, Any] = {"measure": ProfileOptions(batch_sizes=(1,), duration=1e-9)}
    with pytest.raises(InputError, match="keep rate is needed"):
        profile(checkpoint_file, **options)
    with pytest.raises(InputError, match="none of these runtimes"):
        profile(checkpoint_file, keep_rate=0.5, runtimes=["onnxruntime"], **options)
    with pytest.raises(InputError, match="none of these runtimes"):
        profile(converted.file(MODEL), runtimes=["eager"], **options)
    with pytest.raises(InputError, match="Did you mean 'eager'"):
        profile(converted.path, runtimes=["eagre"], **options)
    with pytest.raises(InputError, match="not a bundle"):
        profile(tmp_path, **options)
    (tmp_path / "other.onnx").write_bytes(b"text")
    with pytest.raises(InputError, match="not an ONNX model"):
        profile(tmp_path / "other.onnx", **options)
    with pytest.raises(InputError, match="not an ONNX model"):
        profile(converted.file(MODEL), against=tmp_path / "other.onnx", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch would run on the GPU, timed apart")
def test_a_real_run(converted):
    told = progress_lines()
    report = profile(converted.path, measure=ProfileOptions(batch_sizes=(1, 3), threads=1, duration=1e-3))
    assert told == ["reading the models", "profiling batch 1", "profiling batch 3"]
    assert [(r.runtime, r.variant, r.batch) for r in report.rows] == [
        (runtime, variant, batch)
        for batch in (1, 3)
        for runtime, variant in variants(candidates_of(converted.path, None, None, ()).candidates)
    ]
    for found in report.rows:
        assert found.rounds >= MINIMUM_ROUNDS
        assert 0 < found.p50 <= found.p95 <= found.p99
        assert found.images_per_second == pytest.approx(1e3 * found.batch / found.p50)
        assert found.clock == "cpu"
        assert found.end_to_end_images_per_second == pytest.approx(1e3 * found.batch / found.end_to_end_p50)
        if found.variant != "dense":
            assert found.speedup_low <= found.speedup <= found.speedup_high
            assert found.end_to_end_speedup > 0
            assert found.mac_efficiency == pytest.approx(found.speedup / found.computed_mac_ratio)
            assert found.mac_ratio == pytest.approx(converted.manifest.plan.mac_ratio())
            assert found.computed_mac_ratio == pytest.approx(converted.manifest.plan.computed_mac_ratio())
    again = msgspec.json.decode(msgspec.json.encode(report), type=Report)
    assert again == report


def test_more_threads_are_timed_by_the_wall(converted):
    candidates = candidates_of(converted.path, None, None, ["onnxruntime"]).candidates
    for threads in (2, None):
        report = measure_all(
            candidates, converted.manifest.plan, (1,), threads=threads, duration=1e-9, minimum_rounds=1
        )
        assert {(row.clock, row.end_to_end_p50) for row in report.rows} == {("wall", None)}


def test_the_bundles_own_report(converted: Any):
    report = msgspec.json.decode(converted.file("report.json").read_bytes(), type=Report)
    assert report.passed
    assert [(r.runtime, r.variant) for r in report.rows] == [
        ("onnxruntime", variant) for variant in ("model", "slice", "dense")
    ]
    manifest = read_bundle(Path(converted.path)).manifest
    assert manifest.results["speedup"].keys() == {"onnxruntime, batch 1"}
    assert manifest.model_args == TINY


@pytest.mark.parametrize(
    ("width", "present", "absent"),
    [
        (160, ("variation", "p99 ms", "overhead", "computed", "MAC ratio", "1.52x"), ("end to end",)),
        (80, ("overhead", "speed-up", "clock"), ("variation", "p99 ms")),
    ],
)
def test_a_narrow_terminal_gets_fewer_columns_and_no_cut_ones(width, present, absent):
    console = Console(width=width, record=True, file=io.StringIO())
    measured = row(
        1.49,
        1.48,
        mac_ratio=1.53,
        computed_mac_ratio=1.52,
        mac_efficiency=0.98,
        overhead=0.004,
        images_per_second=1234.5,
    )
    render(Report(rows=(measured,)), console)
    text = console.export_text()
    assert "…" not in text
    assert all(title in text for title in (*present, "1.49x"))
    assert not any(title in text for title in absent)
    assert "1.53x" not in text


@pytest.mark.parametrize("width", [80, 120, 200])
@pytest.mark.parametrize("clock", ["compute", "cpu", "wall"])
def test_a_table_says_what_its_figures_are_of(clock, width):
    console = Console(width=width, record=True, file=io.StringIO())
    both = {} if clock == "wall" else {"end_to_end_p50": 9.5, "end_to_end_images_per_second": 842.0}
    measured = row(
        1.49, mac_ratio=1.53, computed_mac_ratio=1.52, mac_efficiency=0.98, overhead=0.004, clock=clock, **both
    )
    render(Report(rows=(measured, msgspec.structs.replace(measured, variant="dense", speedup=None))), console)
    text = console.export_text()
    told = {"compute": "by CUDA events", "cpu": "CPU time of the one thread", "wall": "a whole call by the wall clock"}
    sentence, table = text.split("\n", 1)
    assert told.pop(clock) in sentence
    assert not any(f"{other} is" in sentence for other in told)
    assert table.count(f" {clock} ") == 2
    assert ("End to end is" in sentence) == bool(both)
    assert ("842.0" in table) == (bool(both) and width > 80)
    assert "…" not in text
