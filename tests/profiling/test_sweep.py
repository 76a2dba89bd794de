"""Sweeps: many keep rates of a model side by side, and what they refuse."""

import numpy as np
import pytest
import torch

from evit_deploy.environment.nvidia import compute_capability
from evit_deploy.errors import InputError, MissingRequirement, RecipeError
from evit_deploy.profiling.clocks.turns import Times
from evit_deploy.profiling.sweep import DENSE, Entry, Variant, _measured, sweep
from evit_deploy.profiling.timing import SETTLE, measure_on_cpu
from evit_deploy.recipe.recipe import is_sweep, load_recipe, load_sweep
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_, token_plan
from tests.support.models import KEEP, of_kind
from tests.support.standins import IdleRunner

SMALL = ["models=[deit_tiny_patch16_224]", "keep_rates=[0.5]", "batch_size=1", "duration=0.01", "threads=1"]
CPU = ["runtimes=[eager:fp32, onnxruntime:fp16]"]


@pytest.mark.slow
def test_every_variant_on_every_runtime_beside_its_dense_model():
    overrides = [*SMALL, *CPU, "published={deit_tiny_patch16_224: {dense: 100, '0.5': 180}}"]
    report = sweep(load_sweep("a100", overrides))
    names = [f"deit_tiny_patch16_224, {name}" for name in ("dense", "0.5", "0.5 without fusion")]
    assert [(row.runtime, row.variant) for row in report.rows] == [
        (runtime, name) for runtime in ("eager fp32", "onnxruntime fp16") for name in names
    ]
    dense, fused, dropped = report.rows[:3]
    assert (dense.speedup, dense.mac_ratio, dense.computed_mac_ratio) == (1, 1, 1)
    assert dropped.mac_ratio > fused.mac_ratio > 1.9
    assert fused.mac_efficiency == pytest.approx(fused.speedup / fused.computed_mac_ratio)
    assert all(row.speedup_low <= row.speedup <= row.speedup_high for row in report.rows)
    assert {row.clock for row in report.rows} == {"cpu"}
    assert "Published for deit_tiny_patch16_224, 0.5: 180 images/s, 1.80x dense." in report.notes


@pytest.fixture
def entries() -> list[Entry]:
    """A dense and a reduced model, said to be on the GPU and on the CPU."""
    variants = [
        Variant(name, model, token_plan(model))
        for name, spec in ((DENSE, TokenSpec(keep_rate=1.0)), ("0.6", KEEP))
        for model in [reduce_tokens_(of_kind("plain"), spec)]
    ]
    return [
        Entry(f"{device} fp32", variant, IdleRunner(device), device == "gpu")
        for device in ("gpu", "cpu")
        for variant in variants
    ]


def test_the_clock_is_the_device_s_own(monkeypatch, entries):
    asked = []
    compute, wall, cpu = (np.array([[twin], [own]]) for twin, own in ((3.0, 1.0), (2.0, 1.0), (4.0, 1.0)))

    def on_gpu(runners, feeds, duration, rounds):
        asked.append(("gpu", {runner.artifact for runner in runners}, len(feeds)))
        return [Times("compute", own[None], whole) for own, whole in zip(compute, wall, strict=True)]

    def on_cpu(runners, batch, duration, rounds, threads):
        asked.append(("cpu", {runner.artifact for runner in runners}, threads))
        return [Times("cpu", own[None], whole) for own, whole in zip(cpu, wall, strict=True)]

    monkeypatch.setattr("evit_deploy.profiling.sweep.measure_on_gpu", on_gpu)
    monkeypatch.setattr("evit_deploy.profiling.sweep.measure_on_cpu", on_cpu)
    report = _measured("tiny", entries, load_sweep("a100", [*SMALL, *CPU]))
    assert asked == [("cpu", {"cpu"}, 1), ("gpu", {"gpu"}, 2)]
    assert [(row.device, row.clock, row.variant, row.speedup, row.end_to_end_speedup) for row in report.rows] == [
        ("cpu", "cpu", "tiny, dense", 1, 1),
        ("cpu", "cpu", "tiny, 0.6", 4, 2),
        ("gpu", "compute", "tiny, dense", 1, 1),
        ("gpu", "compute", "tiny, 0.6", 3, 2),
    ]
    assert [row.p50 for row in report.rows] == [4000, 1000, 3000, 1000]
    monkeypatch.undo()
    only = _measured("tiny", entries[:2], load_sweep("a100", [*SMALL, *CPU]))
    assert {row.clock for row in only.rows} == {"wall"}  # runners that cannot tell compute from the rest


@pytest.mark.parametrize(("threads", "settle", "clock"), [(1, 0, "cpu"), (2, SETTLE, "wall"), (None, SETTLE, "wall")])
def test_on_a_cpu_threads_decide_on_clock_and_pause(monkeypatch, threads, settle, clock):
    paused = []
    monkeypatch.setattr("evit_deploy.profiling.timing.time.sleep", paused.append)
    times = measure_on_cpu([IdleRunner("one"), IdleRunner("other")], 1, 1e-9, 3, threads)
    assert [(own.clock, own.seconds.shape) for own in times] == [(clock, (3, 1))] * 2
    assert paused == [settle] * 6
    assert [own.end_to_end is None for own in times] == [clock == "wall"] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_tf32_is_refused_where_there_is_none():
    with pytest.raises(MissingRequirement, match=r"tf32 is a precision of NVIDIA's GPUs.*a model on the CPU.*Use fp32"):
        sweep(load_sweep("a100", [*SMALL, "runtimes=[eager:tf32]"]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_sweep_on_a_gpu_is_of_compute_with_end_to_end_beside_it():
    overrides = [*SMALL, "runtimes=[eager:fp32, eager:tf32, eager:fp16]", "fuse=[true]", "batch_size=4"]
    report = sweep(load_sweep("a100", overrides))
    runtimes, names = ("eager fp32", "eager tf32", "eager fp16"), ("dense", "0.5")
    assert [(row.runtime, row.variant) for row in report.rows] == [
        (runtime, f"deit_tiny_patch16_224, {name}") for runtime in runtimes for name in names
    ]
    for row in report.rows:
        assert (row.device, row.clock) == ("gpu", "compute")
        assert row.speedup_low <= row.speedup <= row.speedup_high
        assert row.images_per_second == pytest.approx(4e3 / row.p50)
        assert row.end_to_end_images_per_second == pytest.approx(4e3 / row.end_to_end_p50)
        assert row.end_to_end_speedup > 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("runtimes=[eager]", "RUNTIME:fp32"),
        ("runtimes=[eager:int8]", "RUNTIME:fp32"),
        ("runtimes=[onnxruntime:tf32]", r"onnxruntime has no tf32 \(expected eager or torch.compile\)"),
        ("runtimes=[eagre:fp32]", "Did you mean 'eager'"),
        ("models=[resnet50]", "cannot be token-reduced"),
        ("models=[deit_smal]", "not a timm model"),
    ],
)
def test_what_a_sweep_refuses(override, message):
    with pytest.raises(InputError, match=message):
        sweep(load_sweep("a100", [*SMALL, *CPU, override]))


@pytest.mark.parametrize("override", ["keep_rates=[]", "keep_rates=[1.0]", "models=[]", "batch_size=0", "nothing=1"])
def test_a_sweep_that_says_nothing_sensible(override):
    with pytest.raises(RecipeError, match="a100"):
        load_sweep("a100", [override])


def test_a_value_below_a_key_of_ones_own_is_refused_with_its_kind():
    with pytest.raises(RecipeError, match=r"published\[...\]\[...\]: .*got `str`, expected `float`.*Published images"):
        load_sweep("a100", ["published={deit_tiny_patch16_224: {dense: fast}}"])


@pytest.mark.tensorrt_rtx
def test_a_sweep_needs_its_runtimes():
    if compute_capability() is not None:
        pytest.skip("this machine has a GPU")
    with pytest.raises(MissingRequirement, match=r"GPU|CUDA"):
        sweep(load_sweep("a100", [*SMALL, "runtimes=[tensorrt-rtx:fp16]"]))


def test_a_sweep_is_told_from_other_recipes(tmp_path):
    assert is_sweep("a100")
    assert not is_sweep("digits")
    assert not is_sweep(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match="unknown key"):
        load_recipe("a100")
