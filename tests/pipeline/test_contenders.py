"""A comparison by a recipe: the bundles it makes, takes again or refuses to make."""

import json
import shutil
from pathlib import Path

import msgspec
import pytest
import timm
import torch

from evit_deploy import InputError, RecipeError, read_bundle
from evit_deploy.models.checkpoint import build_model, read_checkpoint
from evit_deploy.pipeline.compare import JSON, RESULTS
from evit_deploy.pipeline.contenders import compare_recipe, seeded_checkpoint
from evit_deploy.recipe.options import ConvertOptions
from evit_deploy.recipe.recipe import CompareRecipe, is_comparison, load_comparison, load_recipe
from evit_deploy.report.report import Report
from tests.support.logs import notices
from tests.support.models import tree
from tests.support.paths import RECIPES

HERE = RECIPES / "compare.yaml"
TWO = "[{name: more, tokens: {keep_rate: 0.6}}, {name: less, tokens: {keep_rate: 0.4, fuse: false}}]"


@pytest.fixture
def recipe(checkpoint_file, tmp_path) -> CompareRecipe:
    """Two rates of a small checkpoint of the user's."""
    file = shutil.copy(checkpoint_file, tmp_path / checkpoint_file.name)
    return quick(f"checkpoint={file}", "model=null", f"compare={TWO}")


def quick(*overrides: str) -> CompareRecipe:
    return load_comparison(HERE, ["duration=0.01", "batch_sizes=[1]", *overrides])


def test_bundles_are_made_compared_and_taken_again(recipe, pictures, tmp_path):
    out = tmp_path / "out"
    report = compare_recipe(msgspec.structs.replace(recipe, data=str(pictures)), out)
    assert [row.name for row in report.compared] == ["dense", "more", "less"]
    assert [row.settings for row in report.compared[1:]] == ["keep_rate=0.6", "keep_rate=0.4, fuse=no"]
    assert all(row.images == 40 for row in report.compared)
    assert not any("seed" in note for note in report.notes)
    assert sorted(path.name for path in out.iterdir()) == sorted([*RESULTS, "more", "less"])
    assert msgspec.json.decode((out / JSON).read_bytes(), type=Report) == report
    made = {name: read_bundle(out / name).manifest for name in ("more", "less")}
    assert made["less"].tokens.fuse is False
    assert all(manifest.results["passed"] for manifest in made.values())

    before = {name: (out / name / "manifest.json").stat().st_mtime_ns for name in made}
    told = notices()
    compare_recipe(recipe, out)
    assert [line for line in told if "up to date" in line] == [f"up to date: {out / name}" for name in ("more", "less")]
    assert {name: (out / name / "manifest.json").stat().st_mtime_ns for name in made} == before

    more, less = recipe.compare
    fewer = msgspec.structs.replace(less, tokens=msgspec.structs.replace(less.tokens, keep_rate=0.5))
    again = msgspec.structs.replace(recipe, compare=(more, fewer))
    compare_recipe(again, out)  # what changed is made again, and the other is not
    assert (out / "more" / "manifest.json").stat().st_mtime_ns == before["more"]
    assert read_bundle(out / "less").manifest.tokens.keep_rate == 0.5


def test_a_bundle_that_is_there_beside_one_that_is_made(recipe, half, tmp_path):
    there = msgspec.structs.replace(recipe.compare[0], bundle=str(half.path), tokens=None, name=None)
    report = compare_recipe(msgspec.structs.replace(recipe, compare=(recipe.compare[1], there)), tmp_path / "out")
    assert [(row.name, row.precision) for row in report.compared] == [
        ("dense of less", "fp32"), ("less", "fp32"), ("dense of half", "fp16"), ("half", "fp16"),
    ]  # fmt: skip
    assert not (tmp_path / "out" / "half").exists()


def test_an_entry_may_have_its_own_precision(recipe, tmp_path):
    half = msgspec.structs.replace(recipe.compare[0], precision="fp16", name="half")
    report = compare_recipe(msgspec.structs.replace(recipe, compare=(recipe.compare[0], half)), tmp_path)
    assert [row.precision for row in report.compared] == ["fp32", "fp32", "fp16", "fp16"]
    assert read_bundle(tmp_path / "half").manifest.precision == "fp16"


def test_seeded_weights_are_the_same_file_each_time(tmp_path):
    state, path, other = torch.get_rng_state(), tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    seeded_checkpoint("test_vit", 3, path)
    seeded_checkpoint("test_vit", 3, other)
    assert path.read_bytes() == other.read_bytes()
    assert torch.equal(torch.get_rng_state(), state)  # the caller's own numbers are left alone
    torch.manual_seed(3)
    wanted = timm.create_model("test_vit").state_dict()
    found = build_model(read_checkpoint(path)).state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    seeded_checkpoint("test_vit", 4, other)
    assert path.read_bytes() != other.read_bytes()


@pytest.mark.slow
def test_a_method_with_layers_of_its_own_has_them_from_the_seed_and_the_same_dense_model(tmp_path):
    entries = "[{name: a, tokens: {keep_rate: 0.6}}, {name: d, tokens: {method: dynamicvit, keep_rate: 0.6}}]"
    report = compare_recipe(quick("model=test_vit", f"compare={entries}", "convert={}"), tmp_path)
    assert [(row.name, row.method, row.dense) for row in report.compared] == [
        ("dense", "dense", None), ("a", "evit", "dense"), ("d", "dynamicvit", "dense"),
    ]  # fmt: skip
    assert report.compared[2].settings == "keep_rate=0.6, fuse=no"
    manifest = read_bundle(tmp_path / "d").manifest
    assert report.compared[2].tokens == manifest.plan.blocks[-1].tokens_out
    assert {row.variant: row.overhead is None for row in report.rows} == {"dense": True, "a": False, "d": False}
    assert read_checkpoint(tmp_path / "test_vit-seed0-d.safetensors").method_weights
    assert not read_checkpoint(tmp_path / "test_vit-seed0.safetensors").method_weights


@pytest.mark.slow
def test_models_by_name_have_weights_from_the_seed_and_share_a_baseline(tmp_path):
    entries = "[{tokens: {keep_rate: 0.6}}, {tokens: {keep_rate: 0.5, locations: [2, 4]}}]"
    report = compare_recipe(quick("model=test_vit", f"compare={entries}", "convert={}"), tmp_path)
    assert [row.name for row in report.compared] == ["dense", "test_vit-evit-k0.6", "test_vit-evit-k0.5"]
    assert any("from a seed" in note for note in report.notes)
    assert (tmp_path / "test_vit-seed0.safetensors").is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["compare=[{tokens: {keep_rate: 0.5}}]"], "length >= 2"),
        (["compare=[{bundle: a, tokens: {keep_rate: 0.5}}, {bundle: b}]"], "accepts only a name"),
        (["compare=[{bundle: a, name: ../x}, {bundle: b}]"], "not a name for a folder .got '../x'"),
        (["compare=[{bundel: a}, {bundle: b}]"], r"compare\[0\].*bundel"),
        (["compare=[{tokens: {keep_rate: 7}}, {bundle: b}]"], "keep rate is out of range"),
        (["compare=[{bundle: a, precision: fp17}, {bundle: b}]"], "fp17"),
        (["batch_sizes=[0]"], "batch_sizes"),
        (["data=a", "images=b"], "one of the two"),
        (["reference=evit-0.7"], "reference is about top-1"),
        (["nothing=1"], "unknown key 'nothing'"),
    ],
)
def test_recipes_that_say_nothing_sensible(overrides, message):
    with pytest.raises(RecipeError, match=message):
        quick(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["compare=[{tokens: {keep_rate: 0.6}}, {tokens: {keep_rate: 0.6}}]"], "two entries have the same name"),
        (["compare=[{tokens: {keep_rate: 0.6}}, {name: x}]"], "a keep rate is needed"),
        (["compare=[{tokens: {keep_rate: 0.6}}, {name: x, model: test_vit}]"], "weights from a seed do not determine"),
        (["compare=[{tokens: {keep_rate: 0.6}}, {bundle: absent}]"], "absent: no such bundle"),
        (["compare=[{tokens: {keep_rate: 0.6}}, {checkpoint: absent.pth, tokens: {keep_rate: 0.5}}]"], "absent.pth"),
        (["compare=[{tokens: {keep_rate: 0.6}}, {model: deit_smal, tokens: {keep_rate: 0.5}}]"], "deit_smal"),
        (["compare=[{tokens: {keep_rate: 0.6}}, {name: x, tokens: {keep_rate: 0.6, method: evti}}]"], "'evit'"),
        (["compare=[{tokens: {keep_rate: 0.6}}, {name: x, tokens: {keep_rate: 0.6, method: slice}}]"], "no exported"),
        (["compare=[{tokens: {keep_rate: 0.6}}, {name: x, tokens: {keep_rate: 0.6, locations: [9]}}]"], "outside the"),
        (["compare=[{tokens: {keep_rate: 0.6}}, {name: x, tokens: {keep_rate: 0.6, options: {a: 1}}}]"], "options"),
        (
            ["compare=[{tokens: {keep_rate: 0.6}}, {tokens: {keep_rate: 0.6, method: dynamicvit}}]"],
            "these weights have none",
        ),
        (["runtimes=[onxruntime]"], "Did you mean 'onnxruntime'"),
        (["runtimes=[triton]"], "not on a server"),
        (["data=absent"], "absent: no such folder"),
        (["images=absent"], "absent: no such folder"),
        (["convert.targets=[onyx]"], "Did you mean 'onnx'"),
    ],
)
def test_what_cannot_be_carried_out_is_told_before_anything_is_made(recipe, overrides, message, tmp_path):
    own = [f"checkpoint={recipe.checkpoint}", "model=null"]
    own += [] if any(part.startswith("compare=") for part in overrides) else [f"compare={TWO}"]
    before = tree(tmp_path)
    with pytest.raises(InputError, match=message):
        compare_recipe(quick(*own, *overrides), tmp_path / "out")
    assert tree(tmp_path) == before


def test_an_entry_without_anything_to_make_it_of(tmp_path):
    with pytest.raises(RecipeError, match="names no model for a bundle"):
        compare_recipe(quick("model=null"), tmp_path)


def test_what_somebody_else_wrote_is_not_replaced(recipe, tmp_path):
    out = tmp_path / "out"
    (out / "less").mkdir(parents=True)
    (out / "less" / "thesis.txt").write_text("mine")
    before = tree(out)
    with pytest.raises(InputError, match="less: it exists already"):
        compare_recipe(recipe, out)
    with pytest.raises(InputError, match=r"do not belong to a bundle.*thesis\.txt"):
        compare_recipe(recipe, out, force=True)
    assert tree(out) == before


def test_a_comparison_is_told_from_other_recipes(tmp_path):
    assert is_comparison(HERE)
    assert not is_comparison("digits")
    assert not is_comparison("a100")
    assert not is_comparison(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match="unknown key"):
        load_recipe(HERE)


def test_the_shipped_recipe_compares_evit_with_and_without_fusion():
    recipe = load_comparison(HERE)
    specs = [entry.tokens for entry in recipe.compare if entry.tokens is not None]
    assert {(spec.method, spec.keep_rate, spec.fuse) for spec in specs} >= {
        ("evit", 0.7, True), ("evit", 0.5, True), ("evit", 0.7, False),
    }  # fmt: skip
    assert recipe.convert == ConvertOptions(targets=("onnx",), precision="fp32")
    assert json.dumps(msgspec.to_builtins(recipe))  # every value can be recorded
    assert Path(recipe.name).name == "compare"
