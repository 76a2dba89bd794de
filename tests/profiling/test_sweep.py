"""Sweeps: many keep rates of a model side by side, and what they refuse."""

import numpy as np
import pytest

from evit_deploy.environment.nvidia import compute_capability
from evit_deploy.errors import InputError, MissingRequirement, RecipeError
from evit_deploy.profiling.sweep import DENSE, Entry, Variant, _measured, sweep
from evit_deploy.profiling.timing import SETTLE
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
    assert (dense.speedup, dense.mac_ratio) == (1, 1)
    assert dropped.mac_ratio > fused.mac_ratio > 1.9
    assert fused.mac_efficiency == pytest.approx(fused.speedup / fused.mac_ratio)
    assert all(row.speedup_low <= row.speedup <= row.speedup_high for row in report.rows)
    assert report.clock == "cpu"
    assert "Published for deit_tiny_patch16_224, 0.5: 180 images/s, 1.80x dense." in report.notes


@pytest.mark.parametrize(
    ("threads", "speedups", "settles", "clock"),
    [
        (1, {"cpu": 4, "gpu": 2}, [0, 0], "cpu"),
        (2, {"cpu": 2, "gpu": 2}, [SETTLE, 0], "wall"),
        (None, {"cpu": 2, "gpu": 2}, [SETTLE, 0], "wall"),
    ],
)
def test_the_clock_and_the_pause_are_the_devices_own(monkeypatch, threads, speedups, settles, clock):
    variants = [
        Variant(name, model, token_plan(model))
        for name, spec in ((DENSE, TokenSpec(keep_rate=1.0)), ("0.6", KEEP))
        for model in [reduce_tokens_(of_kind("plain"), spec)]
    ]
    entries = [
        Entry(f"{device} fp32", variant, IdleRunner(device), device == "gpu")
        for device in ("gpu", "cpu")
        for variant in variants
    ]
    asked = []

    def timed(runners, batch, duration, rounds, settle):
        asked.append(({runner.artifact for runner in runners}, settle))
        return np.tile([2.0, 1.0], (5, 1)), np.tile(
            [4.0, 1.0], (5, 1)
        )  # by the wall twice as fast, by the CPU's 4 times

    monkeypatch.setattr("evit_deploy.profiling.sweep.measure", timed)
    recipe = load_sweep("a100", [*SMALL, *CPU, f"threads={'null' if threads is None else threads}"])
    report = _measured("tiny", entries, recipe)
    assert asked == [({"cpu"}, settles[0]), ({"gpu"}, settles[1])]
    assert {row.device: row.speedup for row in report.rows if row.variant == "tiny, 0.6"} == speedups
    assert {row.speedup for row in report.rows if row.variant == "tiny, dense"} == {1}
    assert all(row.p50 == (2000 if row.variant.endswith(DENSE) else 1000) for row in report.rows)
    assert report.clock == clock
    assert (len(report.notes) == 1 and "on the GPU: of wall time" in report.notes[0]) == (threads == 1)
    only = _measured("tiny", entries[:2], recipe)
    assert (only.clock, only.notes) == ("wall", ())  # nothing ran whose CPU time says anything


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("runtimes=[eager]", "RUNTIME:fp32"),
        ("runtimes=[eager:int8]", "RUNTIME:fp32"),
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
    with pytest.raises(RecipeError, match=r"published\[...\]\[...\]: .*got `str`, expected `float`.*a paper gives"):
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
