"""Recipes: what they hold, how they are overridden, and how they are refused."""

import subprocess
import sys

import msgspec
import pytest

from evit_deploy.errors import RecipeError
from evit_deploy.recipe.file import field_docs
from evit_deploy.recipe.recipe import (
    Recipe,
    dump_recipe,
    is_comparison,
    is_sweep,
    load_comparison,
    load_recipe,
    load_sweep,
    recipe_schema,
)
from evit_deploy.recipe.sections import TrainSection
from tests.support.paths import RECIPES

SHIPPED = sorted(RECIPES.glob("*.yaml"))
DIGITS = RECIPES / "digits.yaml"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_recipe_parses_and_is_listed(path):
    load = load_sweep if is_sweep(path) else load_comparison if is_comparison(path) else load_recipe
    assert load(path).name == path.stem
    assert f"[{path.name}]({path.name})" in (path.parent / "README.md").read_text()


def test_there_are_recipes():
    assert {path.stem for path in SHIPPED} >= {"digits", "finetune"}


def test_dumped_recipe_reads_back_equal(tmp_path):
    recipe = load_recipe(DIGITS)
    (tmp_path / "copy.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "copy.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("tokens.keep_rate=0.5", "tokens.keep_rate", 0.5),
        ("tokens.keep_rate=[0.7, 0.6, 0.5]", "tokens.keep_rate", (0.7, 0.6, 0.5)),
        ("finetune.learning_rate=1e-5", "finetune.learning_rate", 1e-5),
        ("dense=null", "dense", None),
        ("finetune.clip=", "finetune.clip", None),
        ("model.checkpoint=a=b.pth", "model.checkpoint", "a=b.pth"),
        ("seed=7", "seed", 7),
    ],
)
def test_override(override, path, value):
    found = load_recipe(DIGITS, [override])
    for step in path.split("."):
        found = getattr(found, step)
    assert found == value


def test_override_of_one_model_argument_leaves_its_neighbors():
    args = load_recipe(DIGITS, ["model.args.depth=4"]).model.args
    assert (args["depth"], args["patch_size"]) == (4, 4)


def test_later_override_wins_and_begins_an_absent_section():
    recipe = load_recipe(DIGITS, ["dense=null", "dense.steps=5", "dense.learning_rate=1", "dense.learning_rate=2"])
    assert recipe.dense == TrainSection(steps=5, learning_rate=2.0)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("finetune.step=3", ["finetune.step", "Did you mean 'finetune.steps'"]),
        ("finetun.steps=3", ["finetun", "Did you mean 'finetune'"]),
        ("tokens.keep_rates=0.5", ["Did you mean 'tokens.keep_rate'"]),
        ("tokens.keep_rate=0", ["keep rate is out of range", "tokens"]),
        ("tokens.keep_rate=1.5", ["keep rate is out of range"]),
        ("tokens.keep_rate=.nan", ["--set tokens.keep_rate", "number .nan is out of range"]),
        ("finetune.learning_rate=.nan", ["finetune.learning_rate"]),
        ("finetune.learning_rate=.inf", ["finetune.learning_rate"]),
        ("finetune.learning_rate=fast", ["finetune.learning_rate", "got 'fast'", "float", "after the warm-up"]),
        ("finetune.betas=[0.9, 1]", ["finetune.betas[1]", "got 1", "AdamW's decay rates"]),
        (
            "convert.batches=[[1, 2]]",
            ["convert.batches[0]", "got [1, 2]", "length 3", "Smallest, best and largest batch"],
        ),
        ("convert.batches=8", ["convert.batches", "got 8", "`array`", "Smallest, best and largest batch"]),
        ("convert.batches=[[1, 2, 0]]", ["convert.batches[0][2]", "got 0", ">= 1"]),
        ("model.args=3", ["model.args", "got 3", "timm.create_model"]),
        ("tokens=3", ["tokens", "got 3", "How tokens are reduced"]),
        ("finetune.steps=null", ["length of the run", "neither"]),
        ("finetune.min_learning_rate=1", ["min_learning_rate", "0.0003"]),
        ("data.name=mnist", ["mnist", "data.name", "'folder': your own images"]),
        ("data.train=/images", ["digits have no folders"]),
        ("model.args.num_classes=3", ["num_classes", "the data decides"]),
        ("data.crop=[0.5, 0.1]", ["crop is not a range"]),
        ("profile.batch_sizes=[]", ["profile.batch_sizes"]),
        ("name.first=x", ["name has no keys"]),
        ("finetune", ["not an override", "section.key=value"]),
        ("=3", ["not an override"]),
        ("a..b=3", ["not an override"]),
        ("seed=[", ["not valid YAML", "--set seed"]),
    ],
)
def test_bad_override_is_refused_with_reason(override, words):
    with pytest.raises(RecipeError) as error:
        load_recipe(DIGITS, [override])
    for word in words:
        assert word in str(error.value)
    assert error.value.exit_code == 2


def test_one_of_two_alternatives_takes_the_place_of_the_other():
    finetune = load_recipe(DIGITS, ["finetune.epochs=3"]).finetune
    assert (finetune.steps, finetune.epochs) == (None, 3)
    finetune = load_recipe("finetune", ["finetune.steps=24"]).finetune
    assert (finetune.steps, finetune.epochs) == (24, None)
    data = load_recipe("small", ["data.train=a", "data.validation=b"]).data
    assert (data.validation, data.validation_share) == ("b", None)


def test_null_is_no_alternative():
    with pytest.raises(RecipeError, match="neither"):
        load_recipe(DIGITS, ["finetune.epochs=null", "finetune.steps=null"])
    assert load_recipe(DIGITS, ["finetune.epochs=null"]).finetune.steps == 200


@pytest.mark.parametrize(
    "overrides",
    [["finetune.steps=24", "finetune.epochs=3"], ["finetune={steps: 24, learning_rate: 1e-3}", "finetune.epochs=3"],
     ["finetune={steps: 24, epochs: 3, learning_rate: 1e-3}"]],
)  # fmt: skip
def test_both_alternatives_on_the_command_line_are_refused(overrides):
    with pytest.raises(RecipeError, match=r"length of the run is not clear \(got both"):
        load_recipe(DIGITS, overrides)


def test_a_recipe_that_extends_another_replaces_its_alternative(tmp_path):
    (tmp_path / "base.yaml").write_text(DIGITS.read_text())
    own = tmp_path / "own.yaml"
    own.write_text("extends: base.yaml\nfinetune: {epochs: 2}\n")
    recipe = load_recipe(own)
    assert (recipe.finetune.steps, recipe.finetune.epochs, recipe.finetune.clip) == (None, 2, 1)
    assert recipe.dense is not None
    assert recipe.dense.steps == 1000
    own.write_text("extends: base.yaml\nfinetune: {epochs: 2, steps: 24}\n")
    with pytest.raises(RecipeError, match="both"):
        load_recipe(own)


@pytest.mark.parametrize(
    ("override", "words"),
    [("data.validation_share=0", ["data.validation_share", "> 0"]),
     ("data.validation_share=1", ["data.validation_share", "< 1"]),
     ("data={name: folder, train: a, validation: b, validation_share: 0.2}", ["validation images are not clear"]),
     ("data={name: digits, validation_share: 0.2}", ["digits have no folders"])],
)  # fmt: skip
def test_shares_to_validate_on_that_cannot_be(override, words):
    with pytest.raises(RecipeError) as error:
        load_recipe("small", [override])
    for word in words:
        assert word in str(error.value)


def test_mixup_needs_an_even_batch():
    overrides = ["data={name: folder, train: a, validation: b}", "finetune.batch_size=7"]
    with pytest.raises(RecipeError, match="even batch size"):
        load_recipe(DIGITS, overrides)
    assert load_recipe(DIGITS, [*overrides, "data.mixup=0", "data.cutmix=0"]).finetune.batch_size == 7


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "empty"),
        ("# nothing but a comment\n", "empty"),
        ("- 1\n", "mapping"),
        ("just text", "mapping"),
        ("a: [1", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("name: a\nname: b\n", "twice"),
        ("? [a]\n: b\n", "YAML"),
        ("name: a\n", "missing required field"),
        ("1: a\n", "a key has to be text: put '1' in quotes"),
        ("[" * 3000, "not valid YAML"),
    ],
)
def test_bad_file_is_refused_with_reason(tmp_path, text, word):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(RecipeError, match=word) as error:
        load_recipe(tmp_path / "bad.yaml")
    assert "bad.yaml" in str(error.value)


def test_bytes_missing_files_and_folders_are_refused(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    for path, word in [("bytes.yaml", "cannot be read"), ("none.yaml", "no such recipe"), (".", "folder")]:
        with pytest.raises(RecipeError, match=word):
            load_recipe(tmp_path / path)


def test_learning_rate_is_scaled_only_where_asked():
    plain = TrainSection(steps=1, learning_rate=2e-5, batch_size=256)
    assert plain.effective_learning_rate() == 2e-5
    assert msgspec.structs.replace(plain, learning_rate_batch=512).effective_learning_rate() == 1e-5


@pytest.mark.parametrize("name", ["finetune", "paper/deit-small-0.7", "small"])
def test_small_batches_are_legal(name):
    finetune = load_recipe(name, ["finetune.batch_size=8"]).finetune
    assert 0 < finetune.lowest_learning_rate() < finetune.effective_learning_rate()


def test_the_lowest_rate_is_scaled_only_where_it_is_above_the_highest():
    run = load_recipe("finetune").finetune
    assert run.lowest_learning_rate() == run.lowest_learning_rate(8) == 2e-6  # the paper's, at 1e-5 and at 8e-5
    few = msgspec.structs.replace(run, batch_size=8)
    assert few.effective_learning_rate() == 2e-5 * 8 / 512
    assert few.lowest_learning_rate() == pytest.approx(2e-6 * 8 / 512, rel=1e-12)
    assert few.lowest_learning_rate(32) == 2e-6  # 32 processes make the step large enough


def test_schema_documents_every_field():
    schema = recipe_schema()
    for name in ("Recipe", "ModelSection", "DataSection", "TrainSection", "CompareSection", "ProfileSection"):
        for field, entry in schema["$defs"][name]["properties"].items():
            assert entry.get("description"), f"{name}.{field}"
    assert schema["$defs"]["TrainSection"]["additionalProperties"] is False
    assert field_docs(Recipe)["seed"] == "Seed of all random numbers."


def test_reading_a_recipe_does_not_import_torch():
    code = (
        "import sys; from evit_deploy.recipe.recipe import load_recipe; load_recipe(sys.argv[1]);"
        "sys.exit(len({'torch', 'timm', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(DIGITS)], check=False).returncode == 0


@pytest.mark.parametrize("name", ["digits", "recipes/digits.yaml", "digits.yaml"])
def test_recipes_of_the_package_are_found_from_anywhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert load_recipe(name).name == "digits"
    own = tmp_path / name
    own.parent.mkdir(exist_ok=True)
    own.write_text("name: [", encoding="utf-8")
    with pytest.raises(RecipeError, match="not valid YAML"):  # one's own file comes first
        load_recipe(name)


def test_only_the_packages_own_places_are_searched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("elsewhere/digits.yaml", "digits.yml", "nothing"):
        with pytest.raises(RecipeError, match="no such recipe"):
            load_recipe(name)
