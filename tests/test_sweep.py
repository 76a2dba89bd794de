"""Sweeps: many keep rates of a model side by side, and what they refuse."""

import pytest

from evit_deploy import build
from evit_deploy.errors import InputError, MissingRequirement, RecipeError
from evit_deploy.recipe import is_sweep, load_recipe, load_sweep
from evit_deploy.sweep import sweep

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
    ("override", "message"),
    [
        ("runtimes=[eager]", "RUNTIME:fp32"),
        ("runtimes=[eager:int8]", "RUNTIME:fp32"),
        ("runtimes=[eagre:fp32]", "Did you mean 'eager'"),
        ("models=[resnet50]", "cannot be token-reduced"),
        ("models=[deit_smal]", "no timm model"),
    ],
)
def test_what_a_sweep_refuses(override, message):
    with pytest.raises(InputError, match=message):
        sweep(load_sweep("a100", [*SMALL, *CPU, override]))


@pytest.mark.parametrize("override", ["keep_rates=[]", "keep_rates=[1.0]", "models=[]", "batch_size=0", "nothing=1"])
def test_a_sweep_that_says_nothing_sensible(override):
    with pytest.raises(RecipeError, match="a100"):
        load_sweep("a100", [override])


@pytest.mark.tensorrt_rtx
def test_a_sweep_needs_its_runtimes():
    if build.gpu.compute_capability() is not None:
        pytest.skip("this machine has a GPU")
    with pytest.raises(MissingRequirement, match=r"GPU|CUDA"):
        sweep(load_sweep("a100", [*SMALL, "runtimes=[tensorrt-rtx:fp16]"]))


def test_a_sweep_is_told_from_other_recipes(tmp_path):
    assert is_sweep("a100")
    assert not is_sweep("digits")
    assert not is_sweep(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match="unknown key"):
        load_recipe("a100")
