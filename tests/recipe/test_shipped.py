"""The recipes that come with the package, by name."""

from pathlib import Path

import pytest

from evit_deploy.errors import InputError
from evit_deploy.recipe.recipe import load_recipe
from evit_deploy.recipe.shipped import copy_recipe, find, folder, names, shipped_recipe, shipped_recipes


def test_every_recipe_has_a_name_and_a_sentence():
    found = shipped_recipes()
    assert {Path(recipe.path) for recipe in found} == set(folder().rglob("*.yaml"))
    assert [recipe.name for recipe in found] == names()
    assert found[0].name == "a100"
    assert "/" in found[-1].name
    for recipe in found:
        assert 20 < len(recipe.description) < 200, recipe
        assert recipe.description.endswith(".")
        assert not recipe.description.startswith("#")


@pytest.mark.parametrize("name", ["digits", "digits.yaml", "recipes/digits.yaml", "deit-small-0.7",
                                  "paper/deit-small-0.7", "recipes/paper/deit-small-0.7.yaml"])  # fmt: skip
def test_a_recipe_is_found_by_what_pages_call_it(name):
    found = find(Path(name))
    assert found is not None
    assert found.is_file()
    assert found.stem == name.rpartition("/")[2].removesuffix(".yaml")


@pytest.mark.parametrize(
    "name", ["absent", "", "..", "../recipes/digits", "paper/digits", "small-0.7", "/digits", "digits/"]
)
def test_nothing_else_is_found(name):
    assert find(Path(name)) is None or name == "digits/"


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"digit.*Did you mean 'digits'\? evit-deploy recipes list"):
        shipped_recipe("digit")


@pytest.mark.parametrize("name", ["digits", "paper/deit-small-0.5", "lvvit-small-0.7"])
def test_a_copy_is_the_same_recipe(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = copy_recipe(name)
    assert copy == Path(shipped_recipe(name).path.rpartition("/")[2])
    assert load_recipe(copy) == load_recipe(name)  # what it extends is found from anywhere
    assert copy_recipe(name, tmp_path / "mine.yaml") == tmp_path / "mine.yaml"
    folder = tmp_path / "sub"
    folder.mkdir()
    assert copy_recipe(name, folder).read_bytes() == copy.read_bytes()


def test_what_is_in_the_way_stays(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("mine")
    with pytest.raises(InputError, match=r"a file exists there already.*--force"):
        copy_recipe("digits", mine)
    assert mine.read_text() == "mine"
    copy_recipe("digits", mine, force=True)
    assert mine.read_text() != "mine"


@pytest.mark.parametrize(
    ("place", "hint"),
    [("absent/mine.yaml", "no such folder"), ("mine.txt", "ends in .yaml"), ("none.yaml", "exists there already")],
)
def test_places_that_cannot_be(place, hint, tmp_path):
    (tmp_path / "none.yaml").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=hint):
        copy_recipe("digits", tmp_path / place)
    assert sorted(tmp_path.iterdir()) == before
