"""What is reported of engines: from hand-made times, and from a stand-in for a runner on a GPU, all the way through."""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from evit_deploy.bundle.manifest import TensorSpec
from evit_deploy.engines.layers import Layer, parse_layers
from evit_deploy.engines.rtx_listing import plan_layers
from evit_deploy.environment.nvidia import GpuState
from evit_deploy.errors import InputError
from evit_deploy.profiling.batch_sizes import sizes_for
from evit_deploy.profiling.candidates import Candidate, candidates_of
from evit_deploy.profiling.clocks.gpu_clocks import summarize_states
from evit_deploy.profiling.clocks.latency import summarize
from evit_deploy.profiling.engine_times import (
    Timed,
    block_rows,
    latency_report,
    launch_notes,
    named_layers,
)
from evit_deploy.profiling.profile import speed_gate
from evit_deploy.profiling.speedup import verdict
from evit_deploy.profiling.timing import measure_all
from evit_deploy.recipe.options import BatchProfile
from evit_deploy.registry import RUNTIMES
from evit_deploy.report.report import BlockRow, LatencyRow, ProfileRow, Report
from evit_deploy.report.tables import render
from evit_deploy.runtimes.runner import Timings
from evit_deploy.tokens.plan import TokenSpec, make_plan
from evit_deploy.tokens.reduce import reduce_tokens_, token_plan
from tests.support.logs import progress_lines
from tests.support.models import KEEP, of_kind
from tests.support.paths import DATA
from tests.support.plans import rtx_plan, tiny_blocks
from tests.support.standins import IdleRunner

PLAN = token_plan(reduce_tokens_(of_kind("plain"), KEEP))
PROFILE = BatchProfile(1, 2, 4)

# ---- batch sizes


def test_usual_batch_sizes_are_those_that_all_engines_cover():
    wide, narrow, eight = [BatchProfile(1, 32, 128)], [BatchProfile(1, 8, 16)], [BatchProfile(8, 8, 8)]
    assert sizes_for([()], None, on_gpu=False) == (1, 8, 32)
    assert sizes_for([(), wide], None, on_gpu=True) == (1, 8, 32, 128)
    assert sizes_for([wide, narrow, ()], None, on_gpu=True) == (1, 8)
    assert sizes_for([[BatchProfile(1, 1, 1), *eight]], None, on_gpu=True) == (1, 8)
    assert sizes_for([[BatchProfile(20, 24, 30)], wide], None, on_gpu=True) == (24,)
    with pytest.raises(InputError, match="no usual batch size in common"):
        sizes_for([[BatchProfile(20, 24, 30)], narrow], None, on_gpu=True)
    assert sizes_for([wide], (3, 5), on_gpu=True) == (3, 5)
    with pytest.raises(InputError, match="got 129, expected 1 to 128"):
        sizes_for([(), wide], (1, 129), on_gpu=True)


# ---- what is reported, from hand-made times


def timings(compute: float, calls: int = 10, enqueue: float = 0.1, **parts: float) -> Timings:
    values = {"enqueue": enqueue, "h2d": 0.2, "compute": compute, "d2h": 0.05} | parts
    return Timings(**{name: np.full(calls, value) for name, value in values.items()})


def timed(*variants: str) -> list[Timed]:
    return [Timed(Candidate("tensorrt", variant, None), StandIn(variant)) for variant in variants]


def test_latencies_are_summed_up_and_compared_round_by_round():
    # Rounds of a clock that slows down: the ratio of medians would be 3, the median of ratios is 2.
    model, dense, sliced = (1.0, 2.0, 4.0), (2.0, 6.0, 8.0), (1.0, 1.6, 3.2)
    parts = [[timings(value) for value in rounds] for rounds in (model, sliced, dense)]
    report = latency_report(timed("model", "slice", "dense"), parts, 8)
    own, other, last = report.latencies
    assert (own.runtime, own.variant, own.batch) == ("tensorrt", "model", 8)
    assert own.compute == summarize(np.repeat(model, 10))
    assert own.latency.median == pytest.approx(2.25)
    assert own.images_per_second == pytest.approx(8 / 0.002)
    assert own.speedup == 2.0
    assert own.overhead == pytest.approx(0.25)
    assert other.speedup == pytest.approx(2.5)
    assert other.overhead is last.speedup is last.overhead is None
    assert any(note.startswith("tensorrt model, batch 8: the compute time is not stable") for note in report.notes)


def test_a_call_bound_by_the_host_is_said_with_engine_and_batch():
    report = latency_report(timed("dense"), [[timings(0.1, enqueue=0.09)] * 2], 1)
    assert report.notes[0].startswith("tensorrt dense, batch 1: bound by the host")


def latency_row(batch: int, compute: float, speedup: float | None = None, variant: str = "model") -> LatencyRow:
    part = summarize(np.full(5, compute))
    return LatencyRow("tensorrt", variant, batch, 1e3 * batch / compute, part, part, part, part, part, speedup, 0.01)


def test_a_launch_bound_engine_is_told_once_and_not_for_its_twins():
    rows = [latency_row(1, 1.0), latency_row(8, 1.1), latency_row(1, 1.0, variant="dense")]
    (note,) = launch_notes(rows)
    assert note.startswith("tensorrt: From batch 1 to 8 the compute time grows by 10% only")
    assert launch_notes([latency_row(1, 1.0), latency_row(8, 7.0)]) == []


def row(speedup: float | None, **changes: Any) -> ProfileRow:
    plain = ProfileRow("tensorrt", "model", 8, 9, 100.0, 1.0, 1.0, 1.0, 0.0, speedup=speedup, device="gpu")
    return msgspec.structs.replace(plain, **changes)


def test_the_verdict_is_about_engines_too():
    (note,) = verdict([row(0.9, speedup_low=0.8), row(1.5, speedup_low=1.4, batch=32)])
    assert note == "Token reduction does not pay on tensorrt at batch 8 (0.90x)."
    (note,) = verdict([row(1.05, speedup_low=0.9)])
    assert note.endswith("measure longer with --duration, or lock the GPU's clocks.")


def test_the_gate_is_about_engines_where_there_are_any():
    report = Report(rows=(row(1.5), row(0.9, runtime="onnxruntime"), row(0.8, runtime="eager")))
    assert [check.name for check in speed_gate(report, 1.2).checks] == ["tensorrt, batch 8: speed-up"]
    assert speed_gate(report, 1.2).passed


BLOCKS = tuple(Layer(f"/blocks.{block}/attn/MatMul") for block in range(4))
TIMES = [("stem", 0.1), *((layer.name, 0.2) for layer in BLOCKS), (BLOCKS[1].name, 0.1)]


def test_blocks_stand_beside_their_token_counts():
    report = block_rows(timed("model")[0], BLOCKS, TIMES, 32, PLAN)
    assert [row.blocks for row in report.blocks] == ["0", "1", "2", "3", "rest"]
    assert [(row.tokens_in, row.tokens_out) for row in report.blocks[:4]] == [
        (block.tokens_in, block.tokens_out) for block in PLAN.blocks
    ]
    assert report.blocks[1].milliseconds == pytest.approx(0.3)
    assert sum(row.share for row in report.blocks) == pytest.approx(1)
    assert {(row.runtime, row.variant, row.batch) for row in report.blocks} == {("tensorrt", "model", 32)}
    bare = block_rows(timed("model")[0], BLOCKS, TIMES, 32, None).blocks
    assert [row.milliseconds for row in bare] == [row.milliseconds for row in report.blocks]
    assert {row.tokens_in for row in bare} == {None}


@pytest.fixture(params=[10, 11], ids=["TensorRT 10", "TensorRT 11"])
def two_blocks(request) -> tuple[Layer, ...]:
    return parse_layers((DATA / f"engine_trt{request.param}.json").read_text())


TWO_BLOCKS = make_plan(TokenSpec(keep_rate=0.4, locations=(0,)), prefix=1, patches=16, depth=2)


def by_block(layers: Sequence[Layer], times: list[tuple[str, float]]) -> tuple[BlockRow, ...]:
    return block_rows(timed("model")[0], layers, times, 1, TWO_BLOCKS).blocks


def test_times_stand_beside_token_counts_and_spans_are_told(two_blocks):
    times = [(layer.name, 1.0) for layer in two_blocks]
    rows = by_block(two_blocks, times)
    assert [row.blocks for row in rows] == ["0", "0-1", "1", "rest"]
    assert [(row.tokens_in, row.tokens_out) for row in rows] == [(17, 9), (17, 9), (9, 9), (None, None)]
    assert [row.layers for row in rows] == [8, 1, 5, 4]
    assert sum(row.milliseconds for row in rows) == len(two_blocks)
    assert sum(row.share for row in rows) == pytest.approx(1)


def test_a_layer_that_the_inspector_does_not_list_is_placed_by_its_name(two_blocks):
    rows = by_block(two_blocks, [("blocks.1/Add_myl9", 2.0), ("something else", 1.0)])
    assert [(row.blocks, row.milliseconds) for row in rows] == [("1", 2.0), ("rest", 1.0)]


def test_a_block_outside_the_plan_has_no_counts():
    (row,) = by_block((), [("blocks.7/Add", 1.0)])
    assert (row.blocks, row.tokens_in, row.tokens_out) == ("7", None, None)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.floats(0.001, 10)), max_size=12))
def test_no_time_is_lost_or_counted_twice(spans):
    layers = [
        Layer(str(i), metadata=f"[ONNX Layer: blocks.{a}/Add]\x1f[ONNX Layer: blocks.{b}/Add]")
        for i, (a, b, _) in enumerate(spans)
    ]
    rows = by_block(layers, [(str(i), ms) for i, (_, _, ms) in enumerate(spans)])
    assert sum(row.milliseconds for row in rows) == pytest.approx(sum(ms for _, _, ms in spans))
    assert sum(row.layers for row in rows) == len(spans)


@pytest.mark.parametrize(("times", "why"), [([], "reports no layer times"), ([("kernel_1", 1.0)], "which block")])
def test_an_engine_without_block_times_is_said_to_have_none(times, why):
    report = block_rows(timed("model")[0], (), times, 32, PLAN)
    assert report.blocks == ()
    assert why in report.notes[0]


def test_a_plan_s_own_text_names_the_block_where_the_inspector_does_not():
    listed = (Layer("a"), Layer("b", metadata="[ONNX Layer: blocks.2.mlp/Gelu]"), Layer("c"))
    written = (Layer("a", metadata="blocks.1.attn/Add"), Layer("b", metadata="blocks.0.attn/Add"))
    assert {layer.name: layer.blocks for layer in named_layers(listed, written)} == {
        "a": (1, 1),
        "b": (2, 2),
        "c": None,
    }


@pytest.mark.tensorrt_rtx
def test_a_real_plan_s_layers_fall_into_blocks(tmp_path):
    path = tmp_path / "engine.plan"
    path.write_bytes(rtx_plan(tiny_blocks(4)))
    layers = plan_layers(path)
    report = block_rows(timed("model")[0], layers, [(layer.name, 1.0) for layer in layers], 2, PLAN)
    alone = {row.blocks: (row.tokens_in, row.tokens_out) for row in report.blocks if row.blocks.isdigit()}
    assert alone == {str(b.block): (b.tokens_in, b.tokens_out) for b in PLAN.blocks}


def state(sm_clock: int | None = 1980, throttled_by: int = 0, temperature: int | None = 60) -> GpuState:
    return GpuState("a GPU", "580.1", "sm90", sm_clock, 1980, 2619, 2619, throttled_by, temperature, 500.0, 700.0)


def test_clocks_are_summed_up_over_the_busy_samples():
    found = summarize_states([state(345, 0x1, 90), state(1410, 0x4), state(), state(None, 0, 65)], 8)
    assert (found.batch, found.samples) == (8, 3)
    assert (found.sm_clock, found.sm_clock_max, found.memory_clock) == ((1410, 1980), 1980, (2619, 2619))
    assert found.slowed_down == pytest.approx(1 / 3)
    assert found.reasons == ("the power limit is reached",)
    assert (found.temperature, found.power, found.power_limit) == (65, 500.0, 700.0)
    idle = summarize_states([state(345, 0x1)], 8)
    assert (idle.samples, idle.sm_clock, idle.slowed_down, idle.reasons) == (0, None, 0.0, ())


def full_report() -> Report:
    blocks = block_rows(timed("model")[0], BLOCKS, TIMES, 32, PLAN)
    clocks = (summarize_states([state(1410, 0x4), state()], 8), summarize_states([state(None, 0x1, None)], 32))
    return blocks + Report(rows=(row(1.1),), latencies=(latency_row(8, 1.0, 1.4),), gpu=clocks)


@pytest.mark.parametrize(("width", "absent"), [(160, ()), (80, ("D2H ms", "H2D ms", "enqueue ms"))])
def test_a_report_on_an_engine_is_printed_whole(width, absent):
    console = Console(width=width, record=True, file=io.StringIO())
    render(full_report(), console)
    text = console.export_text()
    assert "…" not in text
    wanted = ("compute ms", "1.000/1.000/1.000", "1.40x", "+1.0%", "tokens in", "1410-1980 of 1980", "rest")
    for word in (*wanted, "50%, the power limit is reached"):
        assert word in text
    assert not any(word in text for word in absent)


def test_a_report_on_an_engine_survives_json_and_addition():
    report = full_report()
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report
    document = json.loads(msgspec.json.encode(report))
    assert set(document["latencies"][0]) >= {"latency", "enqueue", "h2d", "compute", "d2h"}
    assert {"median", "p90", "p95", "p99"} <= set(document["latencies"][0]["compute"])
    assert document["blocks"][0]["tokens_in"] == PLAN.blocks[0].tokens_in
    assert document["gpu"][0]["sm_clock"] == [1410, 1980]
    twice = report + report
    assert [len(part) for part in (twice.latencies, twice.blocks, twice.gpu)] == [2, 10, 4]


# ---- the way through, with a stand-in for an engine


class StandIn(IdleRunner):
    """Runs nothing, and tells what an engine would tell."""

    name = "stand-in"
    on_gpu = True

    def __init__(self, artifact: Any, **options: Any) -> None:
        super().__init__(artifact)
        self.notes = ["No CUDA graph."] if artifact == "model" else []
        self.asked: list[int] = []

    @classmethod
    def accepts(cls, artifact: Any) -> list[str]:
        return ["it is broken"] if artifact == "broken" else []

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        shape = (None, 3, 8, 8) if self.artifact == "larger" else (None, 3, 4, 4)
        return (TensorSpec("pictures", "float16", shape),)

    @property
    def profiles(self) -> tuple[BatchProfile, ...]:
        return (PROFILE,)

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.asked.append(len(feeds["pictures"]))
        return {}

    def timings(self, batch: int, *, calls: int, duration: float, warm_up: float) -> Timings:
        return timings(batch * {"model": 1.0, "dense": 1.5, "slice": 0.8}[self.artifact], calls)

    def layers(self) -> tuple[Layer, ...]:
        return BLOCKS

    def layer_times(self, batch: int) -> list[tuple[str, float]]:
        return TIMES


@pytest.fixture
def stand_in(monkeypatch) -> list[Candidate]:
    monkeypatch.setitem(RUNTIMES._targets, "stand-in", f"{__name__}:StandIn")
    return [Candidate("stand-in", variant, variant) for variant in ("model", "slice", "dense")]


def test_engines_are_reported_whole(stand_in):
    told = progress_lines()
    report = measure_all(stand_in, PLAN, None, threads=1, duration=1e-9)
    assert [(r.variant, r.batch, r.device) for r in report.rows] == [(v, 1, "gpu") for v in ("model", "slice", "dense")]
    assert {r.clock for r in report.rows} == {"wall"}  # it cannot tell compute, and CPU time says nothing of a GPU
    assert [(r.variant, r.speedup) for r in report.latencies] == [("model", 1.5), ("slice", 1.875), ("dense", None)]
    assert report.latencies[0].overhead == pytest.approx(0.25)
    assert report.latencies[0].compute.count == 100
    assert [(r.variant, r.batch, r.tokens_in) for r in report.blocks if r.blocks == "3"] == [
        ("model", 2, PLAN.blocks[3].tokens_in),
        ("dense", 2, PLAN.blocks[0].tokens_in),
    ]
    assert "stand-in model: No CUDA graph." in report.notes
    assert told == [
        "profiling batch 1 on the GPU",
        *(f"profiling the blocks of stand-in {v}" for v in ("model", "dense")),
    ]
    if not torch.cuda.is_available():
        assert any(note.startswith("The GPU's clocks were not watched") for note in report.notes)


def test_an_engine_without_a_token_plan_is_reported_without_what_follows_from_it(stand_in):
    report = measure_all(stand_in[::2], None, (2, 4), threads=None, duration=1e-9)
    assert [(r.batch, r.mac_ratio, r.mac_efficiency) for r in report.rows if r.variant == "model"] == [
        (2, None, None),
        (4, None, None),
    ]
    assert all(r.speedup is not None for r in report.rows if r.variant == "model")
    assert {r.tokens_in for r in report.blocks} == {None}


def test_nothing_is_measured_when_something_has_to_be_refused(stand_in, monkeypatch):
    monkeypatch.setattr("evit_deploy.profiling.timing.measure_on_gpu", lambda *_: pytest.fail("measured"))
    with pytest.raises(InputError, match="got 8, expected 1 to 4"):
        measure_all(stand_in, PLAN, (1, 8), threads=1, duration=1e-9)
    larger = [*stand_in, Candidate("stand-in", "dense", "larger")]
    with pytest.raises(InputError, match="the dense takes different images than the model"):
        measure_all(larger, PLAN, (1,), threads=1, duration=1e-9)


def test_cpu_and_gpu_take_turns_among_themselves(stand_in, converted):
    candidates = [*stand_in[:1], *candidates_of(converted.path, None, None, ["onnxruntime"]).candidates]
    report = measure_all(candidates, PLAN, (1,), threads=1, duration=1e-9)
    assert [r.device for r in report.rows] == ["cpu"] * 3 + ["gpu"]
    assert [r.clock for r in report.rows] == ["cpu"] * 3 + ["wall"]


def test_who_turns_out_not_to_run_is_left_out_unless_it_was_asked_for(stand_in, converted):
    broken = [Candidate("stand-in", "model", "broken"), *stand_in[2:]]
    others = candidates_of(converted.path, None, None, ["onnxruntime"]).candidates[:1]
    with pytest.raises(InputError, match="it is broken"):
        measure_all([*broken, *others], PLAN, (1,), threads=1, duration=1e-9)
    report = measure_all([*broken, *others], PLAN, (1,), threads=1, duration=1e-9, required=frozenset())
    assert {r.runtime for r in report.rows} == {"onnxruntime"}
    assert any(note.startswith("stand-in was not timed: ") for note in report.notes)
    with pytest.raises(InputError, match="it is broken"):
        measure_all(broken, PLAN, (1,), threads=1, duration=1e-9, required=frozenset())
