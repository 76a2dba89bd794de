"""Bundles side by side: who takes turns with whom, who shares a baseline, and what the rounds say."""

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from evit_deploy.bundle.bundle import Bundle, read_bundle
from evit_deploy.bundle.manifest import DENSE, MODEL, Engine
from evit_deploy.errors import InputError
from evit_deploy.profiling.candidates import Candidate
from evit_deploy.profiling.clocks.turns import MINIMUM_ROUNDS, Times
from evit_deploy.profiling.side_by_side import (
    Entry,
    Lane,
    Parents,
    choose_runtimes,
    lane_of,
    measure_lane,
    named,
    rows_of_lane,
)
from evit_deploy.recipe.options import BatchProfile, ProfileOptions
from evit_deploy.registry import RUNTIMES
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_, token_plan
from tests.support.models import of_kind
from tests.support.standins import IdleRunner


def engine_bundle(bundle: Bundle, path: Path, **changes) -> Bundle:
    """A copy that says it holds an engine."""
    told = {"target": "tensorrt", "version": "10", "gpus": ("sm80",), "driver": None, "precision": "fp32",
            "profiles": (BatchProfile(1, 8, 16),), "plugin": None, "options": {}, "seconds": 1.0}  # fmt: skip
    shutil.copytree(bundle.path, path)
    (path / "engine.plan").write_bytes(b"ftrt")
    files = bundle.manifest.files | {"engine.plan": "0", "dense/engine.plan": "0"}
    shutil.copy(path / "engine.plan", path / "dense")
    return Bundle(path, msgspec.structs.replace(bundle.manifest, files=files, engine=Engine(**(told | changes))))


def test_bundles_of_one_dense_model_share_its_name(converted, fewer, half, other_weights):
    alike = named([("a", converted), ("b", fewer)])
    assert [(one.name, one.dense) for one in alike] == [("a", "dense"), ("b", "dense")]
    several = named([("a", converted), ("h", half), ("b", fewer), ("o", other_weights)])
    assert [one.dense for one in several] == ["dense of a", "dense of h", "dense of a", "dense of o"]
    assert [one.dense for one in named([("dense", converted), ("b", fewer)])] == ["dense of dense"] * 2


def test_other_preprocessing_or_another_engine_is_another_baseline(converted, fewer, tmp_path):
    paler = msgspec.structs.replace(fewer.manifest.preprocess, mean=(0.1, 0.1, 0.1))
    other = Bundle(fewer.path, msgspec.structs.replace(fewer.manifest, preprocess=paler))
    assert len({one.dense for one in named([("a", converted), ("b", other)])}) == 2
    first, same = (engine_bundle(b, tmp_path / b.path.name) for b in (converted, fewer))
    assert {one.dense for one in named([("a", first), ("b", same)])} == {"dense"}
    slower = msgspec.structs.replace(same.manifest.engine, seconds=9.0, plugin="f00")
    same = Bundle(same.path, msgspec.structs.replace(same.manifest, engine=slower))
    assert {one.dense for one in named([("a", first), ("b", same)])} == {"dense"}
    for changes in ({"options": {"workspace": 64}}, {"profiles": (BatchProfile(1, 1, 1),)}, {"target": "tensorrt-rtx"}):
        built = msgspec.structs.replace(same.manifest.engine, **changes)
        other = Bundle(same.path, msgspec.structs.replace(same.manifest, engine=built))
        assert len({one.dense for one in named([("a", first), ("b", other)])}) == 2


def test_a_lane_has_each_baseline_once_and_every_bundle_with_its_slice_twin(converted, fewer, other_weights, tmp_path):
    contenders = named([("a", converted), ("o", other_weights), ("b", fewer)])
    lane = lane_of("onnxruntime", contenders, Parents(), tmp_path)
    assert [entry.name for entry in lane.entries] == ["dense of a", None, "a", "dense of o", None, "o", None, "b"]
    own = {entry.name: entry for entry in lane.entries if entry.name is not None}
    for name, bundle in (("a", converted), ("o", other_weights), ("b", fewer)):
        dense, sliced = lane.entries[own[name].dense], lane.entries[own[name].sliced]
        assert dense.name == ("dense of o" if name == "o" else "dense of a")
        assert own[name].candidate.artifact == bundle.file(MODEL)
        assert own[name].plan == bundle.manifest.plan
        steps = [node.op_type for node in sliced.candidate.artifact.proto.graph.node]
        assert steps.count("Slice") >= len(bundle.manifest.plan.locations) > 0
        assert "TokenReorg" not in steps
    assert own["dense of a"].candidate.artifact == converted.file(DENSE)
    assert (own["dense of a"].dense, own["dense of a"].sliced, own["dense of a"].plan) == (None, None, None)


def test_on_pytorch_a_lane_has_no_slice_twins(converted, fewer, tmp_path):
    lane = lane_of("eager", named([("a", converted), ("b", fewer)]), Parents(), tmp_path)
    assert [(entry.name, entry.dense, entry.sliced) for entry in lane.entries] == [
        ("dense", None, None), ("a", 0, None), ("b", 0, None),
    ]  # fmt: skip


def test_an_engine_without_a_builder_has_no_overhead_and_a_note_says_why(converted, fewer, tmp_path):
    bundles = [engine_bundle(b, tmp_path / b.path.name, target="torch-tensorrt") for b in (converted, fewer)]
    lane = lane_of("tensorrt", named(list(zip("ab", bundles, strict=True))), Parents(), tmp_path)
    assert [entry.sliced for entry in lane.entries] == [None] * 3
    assert [note.split(":")[0] for note in lane.notes] == ["a", "b"]
    assert "torch-tensorrt built it" in lane.notes[0]


def lane(*entries: Entry) -> Lane:
    return Lane("onnxruntime", list(entries), [])


NOBODY = Candidate("onnxruntime", "model", None)
PLAN = token_plan(reduce_tokens_(of_kind("plain"), TokenSpec(keep_rate=0.6)))


def test_ratios_are_medians_of_rounds_to_the_own_baselines():
    # A machine that slows down: ratios of medians would be other numbers.
    drift = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    dense, other = 2.0 * drift, 5.0 * drift
    own, sliced = drift[::1] * [1.0, 1.0, 2.0, 0.5, 1.0], drift * [0.8, 1.0, 1.6, 0.5, 0.8]
    found = rows_of_lane(
        lane(Entry("dense of a", NOBODY), Entry(None, NOBODY), Entry("a", NOBODY, PLAN, 0, 1),
             Entry("dense of b", NOBODY), Entry("b", NOBODY, None, 3)),
        4,
        [Times("cpu", times[:, None]) for times in (dense, sliced, own, other, drift)],
    )  # fmt: skip
    assert [row.variant for row in found] == ["dense of a", "a", "dense of b", "b"]
    first, a, _, b = found
    assert (first.speedup, first.overhead, first.mac_efficiency) == (None, None, None)
    assert a.speedup == 2.0
    assert (a.speedup_low, a.speedup_high) == (1.0, 4.0)
    assert a.mac_efficiency == pytest.approx(2.0 * PLAN.computed_macs() / PLAN.dense().computed_macs())
    assert a.mac_ratio == pytest.approx(PLAN.mac_ratio())
    assert a.overhead == pytest.approx(0.25)
    assert (b.speedup, b.overhead, b.mac_efficiency) == (5.0, None, None)
    assert a.p50 == pytest.approx(1e3 * np.median(own))
    assert a.images_per_second == pytest.approx(4 / np.median(own))
    assert a.p99 == pytest.approx(1e3 * np.percentile(own, 99))


def test_all_take_turns_in_one_loop_and_losing_rows_stay(monkeypatch):
    asked = []

    def on_cpu(runners, batch, duration, rounds, threads):
        asked.append((len(runners), batch, duration, rounds, threads))
        return [Times("cpu", np.full((5, 1), seconds)) for seconds in (1.0, 2.0, 0.5, 1.0)]

    monkeypatch.setattr("evit_deploy.profiling.side_by_side.measure_on_cpu", on_cpu)
    plans = {"slow": PLAN, "fast": PLAN, "whole": PLAN.dense()}
    slow, fast, whole = (Entry(name, NOBODY, plan, 0) for name, plan in plans.items())
    all_four = lane(Entry("dense", NOBODY), slow, fast, whole)
    measure = ProfileOptions(batch_sizes=(1, 4), duration=3.0, threads=1)
    report = measure_lane(all_four, [IdleRunner(name) for name in "abcd"], measure)
    assert asked == [(4, 1, 3.0, MINIMUM_ROUNDS, 1), (4, 4, 3.0, MINIMUM_ROUNDS, 1)]
    assert [(row.variant, row.batch, row.speedup) for row in report.rows] == [
        ("dense", 1, None), ("slow", 1, 0.5), ("fast", 1, 2.0), ("whole", 1, 1.0),
        ("dense", 4, None), ("slow", 4, 0.5), ("fast", 4, 2.0), ("whole", 4, 1.0),
    ]  # fmt: skip
    assert report.notes == ("slow: Token reduction does not pay on onnxruntime at batch 1 (0.50x), batch 4 (0.50x).",)


def test_on_a_gpu_the_clock_is_its_own(monkeypatch):
    def on_gpu(runners, feeds, duration, rounds):
        assert len(runners) == len(feeds) == 2
        return [Times("compute", np.full((5, 4), s), np.full(5, 2 * s)) for s in (1.0, 0.5)]

    class Gpu(IdleRunner):
        on_gpu = True

    monkeypatch.setattr("evit_deploy.profiling.side_by_side.measure_on_gpu", on_gpu)
    monkeypatch.setattr("evit_deploy.profiling.side_by_side.watched", lambda stack: (None, ["nobody watched"]))
    there = Candidate("tensorrt", "model", None)
    report = measure_lane(
        Lane("tensorrt", [Entry("dense", there), Entry("a", there, PLAN, 0)], ["a note"]),
        [Gpu("a"), Gpu("b")],
        ProfileOptions(batch_sizes=(2,)),
    )
    assert [(row.clock, row.device, row.end_to_end_speedup) for row in report.rows] == [
        ("compute", "gpu", None), ("compute", "gpu", 2.0),
    ]  # fmt: skip
    assert report.notes == ("a note", "nobody watched")


def choose(bundles, asked=(), batch_sizes=None):
    return choose_runtimes(named(list(zip("abc", bundles, strict=False))), asked, batch_sizes, Parents())


def test_without_a_wish_every_runtime_that_can_run_all(converted, fewer, tmp_path):
    chosen, notes = choose([converted, fewer])
    assert "onnxruntime" in chosen
    assert "eager" in chosen
    assert not any(RUNTIMES.get(name).files for name in chosen[chosen.index("eager") :])  # files come first
    assert notes == []
    away = shutil.copytree(fewer.path, tmp_path / "without its checkpoint")
    chosen, notes = choose([converted, read_bundle(away)])
    assert "onnxruntime" in chosen
    assert "eager" not in chosen
    (note,) = [note for note in notes if note.startswith("eager")]
    assert note.startswith("eager was left out: it cannot run b (its checkpoint")
    assert "--against" not in note


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("onxruntime", "Did you mean 'onnxruntime'"),
        ("triton", "not on a server"),
        ("tensorrt", "tensorrt cannot run a: it has no engine.plan"),
    ],
)
def test_a_runtime_that_cannot_run_one_is_refused(converted, fewer, asked, message):
    with pytest.raises(InputError, match=message):
        choose([converted, fewer], (asked,))


def test_the_one_bundle_that_a_runtime_cannot_run_is_named(converted, fewer, tmp_path):
    away = shutil.copytree(fewer.path, tmp_path / "without its checkpoint")
    with pytest.raises(InputError, match=r"--runtime: eager cannot run b: its checkpoint .* is gone\.$"):
        choose([converted, read_bundle(away)], ("eager",))


def test_a_batch_size_that_an_engine_does_not_cover_is_refused(converted, fewer, tmp_path):
    bundles = [engine_bundle(b, tmp_path / b.path.name) for b in (converted, fewer)]
    with pytest.raises(InputError, match=r"no profile for this batch size .got 32, expected 1 to 16"):
        choose(bundles, ("tensorrt",), (1, 32))
