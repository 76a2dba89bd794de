"""Recipe files: names of the recipes that come with the package, and values that are one of some."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from evit_deploy.errors import RecipeError
from evit_deploy.recipe.recipe import load_recipe
from tests.support.paths import RECIPES

DIGITS = RECIPES / "digits.yaml"


@pytest.mark.parametrize(
    "name",
    [
        "paper/deit-small-0.7",
        "recipes/paper/deit-small-0.7",
        "paper/deit-small-0.7.yaml",
        "recipes/paper/deit-small-0.7.yaml",
    ],
)
def test_a_recipe_of_the_paper_is_found_by_its_name_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe(name) == load_recipe(RECIPES / "paper" / "deit-small-0.7.yaml")


@pytest.mark.parametrize(
    ("name", "near"),
    [("paper/deit-small-0.75", "paper/deit-small-0.7"), ("digts", "digits"), ("recipes/finetun", "finetune")],
)
def test_a_recipe_that_is_not_there_has_a_near_name(name, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=rf"no such recipe.*Did you mean '{near}'"):
        load_recipe(name)


def test_a_file_of_the_users_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text(DIGITS.read_text().replace("name: digits", "name: mine", 1))
    assert load_recipe("digits").name == "mine"


@pytest.mark.parametrize("value", ["no", "off", "null", "none", "false", "~", ""])
def test_none_may_be_written_as_yaml_has_it(value):
    assert load_recipe(DIGITS, [f"finetune.autocast={value}"]).finetune.autocast == "none"


@pytest.mark.parametrize(
    ("override", "hints"),
    [
        ("finetune.autocast=fp15", ["got 'fp15'", "one of none, bf16, fp16", "Did you mean 'fp16'"]),
        ("finetune.autocast=yes", ["got True", "one of none, bf16, fp16"]),
        ("finetune.model_mode=null", ["finetune.model_mode", "one of train, eval"]),
        ("convert.precision=fp15", ["got 'fp15'", "one of fp32, fp16, bf16, int8, fp8", "Did you mean 'fp16'"]),
        ("data.name=digit", ["got 'digit'", "one of digits, digits-in-the-wild, folder", "Did you mean 'digits'"]),
        ("data.difficulty=3", ["got 3", "one of easy, medium, hard"]),
    ],
)
def test_an_unknown_value_lists_the_choices(override, hints):
    with pytest.raises(RecipeError) as caught:
        load_recipe(DIGITS, [override])
    for hint in hints:
        assert hint in str(caught.value)


def test_a_recipe_is_found_by_name_without_the_checkout(tmp_path):
    code = "from evit_deploy import load_recipe; print(load_recipe('paper/lvvit-small-0.7').name)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "lvvit-small-0.7"
