"""`run`: every stage from a recipe, and only what is not up to date."""

from pathlib import Path

import msgspec
import onnx
import pytest
import torch
from PIL import Image

from evit_deploy import GateFailed, InputError, load_recipe, read_bundle, run
from evit_deploy.pipeline.run import train_stage
from evit_deploy.recipe.recipe import Recipe
from tests.support.logs import listening, notices
from tests.support.paths import RECIPES

SHORT = ("dense.steps=3", "finetune.steps=3", "model.args.depth=4", "tokens.locations=[1,2,3]", "expect={}",
         "profile.duration=0.1", "profile.batch_sizes=[1]", "compare.keep_rates=[]")  # fmt: skip


def digits(*overrides: str) -> Recipe:
    return load_recipe(RECIPES / "digits.yaml", (*SHORT, *overrides))


def trained(told: list[str]) -> set[str]:
    """Stages that were trained, by what was logged."""
    return {text.split(":")[0] for text in told if "steps (" in text}


def test_run_makes_a_verified_bundle_and_the_comparison(tmp_path: Path):
    bundle, report = run(digits(), tmp_path)
    assert report.passed
    names = [row.name for row in report.accuracy]
    assert names == [
        "dense",
        "evit 0.7, not fine-tuned",
        "random 0.7, not fine-tuned",
        "inverse 0.7, not fine-tuned",
        "evit 0.7, fine-tuned",
        "evit 0.7, fine-tuned, exported (onnxruntime, fp32)",
    ]
    finetuned, exported = report.accuracy[-2:]
    assert exported.top1 == finetuned.top1  # the same 360 images through the exported file
    assert exported.count == 360
    assert any("cannot tell" in note for note in report.notes)
    assert {row.variant for row in report.rows} == {"model", "dense", "slice"}
    manifest = read_bundle(tmp_path / "bundle").manifest
    assert manifest == bundle.manifest
    assert manifest.labels == list("0123456789")
    assert manifest.recipe is not None
    assert manifest.recipe["name"] == "digits"


@pytest.mark.slow
def test_a_recipe_says_what_the_result_is_turned_into(tmp_path: Path):
    recipe = digits("convert.precision=int8", "convert.calibration_images=40", "convert.targets=[onnx, openvino]")
    bundle, report = run(recipe, tmp_path)
    assert report.passed
    assert bundle.manifest.precision == "int8"
    assert {"openvino/model.xml", "dense/openvino/model.bin"} <= bundle.manifest.files.keys()
    assert report.accuracy[-1].name == "evit 0.7, fine-tuned, exported (onnxruntime, int8)"
    assert any("QuantizeLinear" in node.op_type for node in onnx.load(bundle.file("model.onnx")).graph.node)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("convert.targets=[tensorrt, tensorrt-rtx]", "one engine"),
        ("convert.targets=[tensorrt-rtx]", "--gpu"),
        ("convert.precision=fp64", "expected one of fp32, fp16, bf16, int8, fp8"),
    ],
)
def test_what_cannot_be_made_is_told_before_the_training(tmp_path: Path, override: str, message: str):
    if override.endswith("[tensorrt-rtx]") and torch.cuda.is_available():
        pytest.skip("with a GPU this can be made")
    told = notices()
    with pytest.raises(InputError, match=message):
        run(digits(override), tmp_path)
    assert not told
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_stages_that_are_up_to_date_are_skipped(tmp_path: Path):
    run(digits(), tmp_path)
    first = (tmp_path / "bundle" / "manifest.json").stat().st_mtime_ns

    told = notices()
    run(digits(), tmp_path)
    assert trained(told) == set()
    assert (tmp_path / "bundle" / "manifest.json").stat().st_mtime_ns == first

    told = notices()  # another keep rate: the dense weights are still right
    run(digits("tokens.keep_rate=0.5"), tmp_path)
    assert trained(told) == {"finetune"}
    assert read_bundle(tmp_path / "bundle").manifest.tokens.keep_rate == 0.5

    told = notices()  # another seed: nothing is
    run(digits("tokens.keep_rate=0.5", "seed=1"), tmp_path)
    assert trained(told) == {"dense", "finetune"}, list(told)

    told = notices()
    run(digits("tokens.keep_rate=0.5", "seed=1"), tmp_path, force=True)
    assert trained(told) == {"dense", "finetune"}, list(told)


def test_fine_tuning_from_kept_dense_weights_gives_the_same_weights(tmp_path: Path):
    train_stage(digits("tokens.keep_rate=0.5"), tmp_path / "at once")
    train_stage(digits(), tmp_path / "later")
    train_stage(digits("tokens.keep_rate=0.5"), tmp_path / "later")
    weights = [(tmp_path / name / "evit.safetensors").read_bytes() for name in ("at once", "later")]
    assert weights[0] == weights[1]


def break_off(text: str) -> None:
    """Progress: the machine stops at the first step of the fine-tuning."""
    if text.startswith("finetune: step"):
        raise RuntimeError("the machine stopped")


def test_dense_weights_are_known_when_the_fine_tuning_broke_off(tmp_path: Path):
    with listening(break_off), pytest.raises(RuntimeError):
        train_stage(digits(), tmp_path)
    assert not (tmp_path / "evit.safetensors").exists()
    with pytest.raises(InputError, match="Continue with --resume"):
        train_stage(digits(), tmp_path)
    told = notices()
    train_stage(digits(), tmp_path, resume=True)
    assert "dense: was complete" in told
    whole = tmp_path / "whole"
    train_stage(digits(), whole)
    assert (tmp_path / "evit.safetensors").read_bytes() == (whole / "evit.safetensors").read_bytes()

    from_weights = digits("dense=null", "model.init=timm", "model.name=null", "model.args={}",
                          f"model.checkpoint={whole / 'dense.safetensors'}")  # fmt: skip
    again = tmp_path / "again"
    with listening(break_off), pytest.raises(RuntimeError):
        train_stage(from_weights, again)
    assert (again / "dense.safetensors").exists()
    train_stage(from_weights, again)
    assert (again / "evit.safetensors").exists()


def test_a_run_that_was_killed_before_it_saved_anything_begins_with_resume(tmp_path: Path):
    told = notices()
    train_stage(digits(), tmp_path / "run", resume=True)
    assert trained(told) == {"dense", "finetune"}
    assert any("nothing was saved yet" in text for text in told)

    told = notices()
    train_stage(digits(), tmp_path / "run", resume=True)  # and what is done is not begun again
    assert trained(told) == set()


def test_resume_takes_no_other_recipes_folder(tmp_path: Path):
    train_stage(digits(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for other in (digits("tokens.keep_rate=0.5"), digits("seed=1")):
        with pytest.raises(
            InputError, match=r"no interrupted run to continue, and the results here are of a different"
        ):
            train_stage(other, tmp_path, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before

    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "evit.safetensors").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"evit\.safetensors that this recipe did not write"):
        train_stage(digits(), strange, resume=True)
    assert (strange / "evit.safetensors").read_bytes() == b"mine"


def test_a_damaged_checkpoint_is_not_up_to_date(tmp_path: Path):
    train_stage(digits(), tmp_path)
    right = (tmp_path / "evit.safetensors").read_bytes()
    (tmp_path / "evit.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"evit\.safetensors that this recipe did not write"):
        train_stage(digits(), tmp_path)
    train_stage(digits(), tmp_path, force=True)
    assert (tmp_path / "evit.safetensors").read_bytes() == right


def test_somebody_elses_checkpoint_is_not_overwritten(tmp_path: Path):
    (tmp_path / "dense.safetensors").write_bytes(b"mine")
    with pytest.raises(InputError, match="did not write"):
        run(digits(), tmp_path)
    assert (tmp_path / "dense.safetensors").read_bytes() == b"mine"


def test_expectations_are_gates_that_keep_the_checkpoints(tmp_path: Path):
    recipe = digits("expect={finetuned: 1.0}")
    with pytest.raises(GateFailed, match=r"evit 0\.7, fine-tuned.*expected at least 1\.0"):
        run(recipe, tmp_path)
    assert (tmp_path / "evit.safetensors").is_file()
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(GateFailed):  # and being up to date does not open the gate
        run(recipe, tmp_path)


@pytest.mark.slow
def test_the_fine_tune_recipe_runs_on_folders_of_images(tmp_path: Path):
    train_stage(digits(), tmp_path / "start")
    for split in ("train", "validation"):
        for label, color in (("dark", 40), ("light", 200)):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (40, 40), (color, color, 10 * number)).save(tmp_path / split / label / f"{number}.png")
    recipe = load_recipe(
        RECIPES / "finetune.yaml",
        (
            f"model.checkpoint={tmp_path / 'start' / 'dense.safetensors'}",
            f"data.train={tmp_path / 'train'}",
            f"data.validation={tmp_path / 'validation'}",
            "data.workers=0",
            "finetune.epochs=2",
            "finetune.batch_size=4",
            "finetune.learning_rate=1e-2",  # so that the new classifier's two logits do not cancel to almost nothing
            "finetune.min_learning_rate=0",
            "finetune.autocast=none",
            "profile.batch_sizes=[1]",
            "profile.duration=0.1",
        ),
    )
    bundle, report = run(recipe, tmp_path / "out")
    assert report.passed
    assert bundle.manifest.labels == ["dark", "light"]
    assert bundle.manifest.outputs[0].shape == (None, 2)
    assert msgspec.to_builtins(bundle.manifest.tokens)["keep_rate"] == 0.7
